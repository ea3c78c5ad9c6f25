"""What the pages say of proposals, teachers, single losses and settings is what is kept of them."""

import json
import re

import pytest

from tests.kept_records import EXPERIMENTS, GROUPS, figures, rows_of, scores, words_of

RESULTS = EXPERIMENTS / "results"
MATERIAL = json.loads((RESULTS / "material_small.json").read_text())
# Percents are shown to a tenth, of records to a hundredth: halves may go either way.
TENTH = 0.0501


def lines_of(name: str) -> list[dict]:
    return [json.loads(line) for line in (RESULTS / name).read_text().splitlines()]


def table_after(page: str, start: str) -> list[list[str]]:
    """Returns the rows of the first table after some words, its head and rule left out."""
    text = (EXPERIMENTS / page).read_text()
    _, _, rest = text.partition(start)
    assert rest, start
    table = re.search(r"(?:^\|.*\n)+", rest, re.MULTILINE)
    assert table
    return rows_of(table[0])[2:]


def percents(metrics: dict[str, float]) -> list[float]:
    return [100 * metrics[group] for group in GROUPS]


def of_row(row: str) -> list[float]:
    return [scores("small", row, group)[0] for group in GROUPS]


def test_recall_of_proposals_and_accuracy_of_the_teacher():
    shown = table_after("STUDIES.md", "## Teacher and proposals")
    sources = MATERIAL["recall"]
    assert list(sources) == ["fit", "student: burn-in", "student: baseline"]
    for cells, recall in zip(shown, sources.values(), strict=True):
        for cell, boxes in zip(cells[1:], ("20", "100", "300"), strict=True):
            wanted = [recall[group][boxes] for group in ("base", "novel")]
            assert figures(cell) == pytest.approx(wanted, abs=0.00501)
    base, novel = (MATERIAL["teacher"][group] for group in ("base", "novel"))
    page = words_of("STUDIES.md")
    assert f"({base['objects']:,} base, {novel['objects']} novel objects)" in page
    assert (
        f"right for {100 * base['top1']:.1f} % of base and {100 * novel['top1']:.1f} % of novel "
        f"objects (one of five: {100 * base['top5']:.1f} and {100 * novel['top5']:.1f} %)"
    ) in page
    groups = [
        f"{100 * MATERIAL['teacher'][g]['top1']:.1f} %" for g in ("rare", "common", "frequent")
    ]
    assert (
        f"for {groups[0]} of rare (the novel), {groups[1]} of common and {groups[2]} of frequent"
    ) in page
    right = sum(each["top1"] * each["objects"] for each in (base, novel))
    assert f"the shipped one on {100 * right / (base['objects'] + novel['objects']):.1f} %" in page


def test_rows_with_other_proposals_and_other_teachers():
    kept = {(row["teacher"], row["proposals"], row["row"]): row for row in MATERIAL["rows"]}
    shown = table_after("STUDIES.md", "What other proposals make of novel AP")
    sources = (None, "boxes by chance", "student: burn-in", "fit", "true boxes, novel ones too")
    for cells, source in zip(shown, sources, strict=True):
        found = [float(cell) for cell in cells[1:]]
        if source in (None, "fit"):
            assert found[1:] == pytest.approx(of_row("both" if source else "baseline"), abs=TENTH)
        else:
            row = kept["shipped", source, "both"]
            wanted = [row["regions_per_image"], *percents(row["metrics"])]
            assert found == pytest.approx(wanted, abs=TENTH)
    shown = table_after("STUDIES.md", "What another teacher makes of it")
    labels = {"baseline": "baseline", "SKD + RKD": "both"}
    assert [(cells[0], labels[cells[1]]) for cells in shown] == [
        (teacher, row) for teacher in ("shipped", "240 steps") for row in labels.values()
    ]
    for teacher, label, *cells in shown:
        row = labels[label]
        other = kept.get((teacher, "fit", row))
        wanted = percents(other["metrics"]) if other else of_row(row)
        assert [float(cell) for cell in cells] == pytest.approx(wanted, abs=TENTH)


def test_agreement_and_the_style_held_out():
    kept = {
        (each["row"], each["queries"] == "KD queries"): each["groups"]
        for each in json.loads((RESULTS / "agreement_small.json").read_text())
    }
    labels = {"baseline": "baseline", "SKD": "skd", "RKD": "rkd", "SKD + RKD": "both",
              "L1": "skd_l1"}  # fmt: skip
    shown = table_after("STUDIES.md", "How far a student agrees")
    assert len(shown) == 7
    for label, *cells in shown:
        name, of_kd, _ = label.partition(", its KD queries")
        groups = [each for each in kept[labels[name], bool(of_kd)] if each["group"] != "all"]
        for cell, group in zip(cells, groups, strict=True):
            cosine, margin = figures(cell)
            assert cosine == pytest.approx(group["cosine"], abs=0.0051)
            assert margin == pytest.approx(group["margin"], abs=0.00051)
    held = MATERIAL["held_out_style"]["metrics"]
    told = re.search(r"APf / AP: (baseline .*?)\.$", (EXPERIMENTS / "STUDIES.md").read_text(),
                     re.MULTILINE)  # fmt: skip
    assert told
    names = ("baseline", "SKD", "RKD", "both", "L1")
    for part, name, row in zip(told[1].split(", "), names, held, strict=True):
        assert part.startswith(f"{name} ")
        assert figures(part[-22:]) == pytest.approx(percents(held[row]), abs=TENTH)


def best(file: str, space: str, name: str) -> list[float]:
    """Returns novel and base of the weight that is best for novel names."""
    found = [each for each in lines_of(file) if (each["space"], each["name"]) == (space, name)]
    top = max(found, key=lambda each: each["map_novel"])
    return [top["map_novel"], top["map_base"]]


def test_the_losses_alone_at_their_best_weights():
    shown = table_after("STUDIES.md", "mean AP over classes of")
    spaces = (("plain", "plain"), ("cone", "cone"), ("dims", "dim32"), ("dims", "dim512"))
    names = ("none", "bce", "bce_biased", "infonce", "l1", "rkd", "bce+rkd")
    for cells, (file, space) in zip(shown, spaces, strict=True):
        for cell, name in zip(cells[1:], names, strict=True):
            kept_in = "cone_biased" if (space, name) == ("cone", "bce_biased") else file
            if cell != "not run":
                wanted = best(f"loss_study_{kept_in}.jsonl", space, name)
                assert figures(cell.split("(")[0]) == wanted


@pytest.mark.parametrize(
    ("start", "file", "names"),
    [
        ("`plain`; without", "plain", ("bce", "bce_biased", "infonce", "l1", "rkd")),
        ("`cone`, the classifier's", "cone", ("bce", "sharp", "infonce", "l1", "rkd")),
        ("does biased BCE lose", "cone_biased", ("bce", "bce_biased")),
    ],
)
def test_the_losses_alone_at_every_weight(start: str, file: str, names: tuple[str, ...]):
    kept = lines_of(f"loss_study_{file}.jsonl")
    shown = table_after("DIARY.md", start)
    for cells, name in zip(shown, names, strict=True):
        found = [each for each in kept if each["name"] == name]
        assert [figures(cell) for cell in cells[1:]] == [
            [each["map_novel"], each["map_base"]] for each in found
        ]


TUNING = lines_of("tuning_small.jsonl")


def tuned(*settings: str, date: str | None = None, row: str | None = None) -> list[float]:
    """Returns the percents of the one kept run that has just these settings."""
    (found,) = [
        each["metrics"]
        for each in TUNING
        if set(each["settings"]) == set(settings)
        and each.get("date") == date
        and row in (None, each["row"])
    ]
    return percents(found)


OFF = ("kd.skd.weight=0", "kd.rkd.weight=0")
LATER = ("seed=100", "kd.start_epoch=25%")


def test_the_settings_of_small_were_chosen_by_the_kept_runs():
    rates = table_after("DIARY.md", "First the baseline")
    for cells in rates:
        rate = cells[0].strip("*")
        wanted = tuned(f"optim.lr={rate}", *OFF)
        assert [float(cell) for cell in cells[1:]] == pytest.approx(wanted, abs=TENTH)
    for cells in table_after("DIARY.md", "Then SKD and RKD together"):
        start, skd, rkd = (cell.strip("*").replace(" ", "") for cell in cells[:3])
        wanted = tuned(f"kd.start_epoch={start}", f"kd.skd.weight={skd}", f"kd.rkd.weight={rkd}")
        assert [float(cell) for cell in cells[3:]] == pytest.approx(wanted, abs=TENTH)
    starts = table_after("DIARY.md", "when distillation starts")
    for cells in starts:
        share = re.match(r"\d+", cells[0].strip("*"))
        of_start = (f'kd.start_epoch="{share[0]}%"',) if share else OFF
        wanted = tuned("seed=100", *of_start, date="2026-11-30")
        assert [float(cell) for cell in cells[1:]] == pytest.approx(wanted, abs=TENTH)
    assert [len(rates), len(starts)] == [4, 4]


def test_every_loss_met_three_weights_on_the_tuning_world():
    both = tuned(*LATER, row="both")
    singles = {
        "no distillation": tuned(*LATER, *OFF),
        "**SKD 1, RKD 3** (the preset)": both,
        "... RKD 8": tuned(*LATER, "kd.rkd.weight=8"),
        "... the last layer alone": tuned(*LATER, "kd.layers=last"),
        "... SKD without bias": tuned(*LATER, "kd.skd.bias=0"),
    }
    alone = {
        "SKD": lambda w: tuned(*LATER, f"kd.skd.weight={w}", OFF[1]),
        "RKD": lambda w: tuned(*LATER, f"kd.rkd.weight={w}", OFF[0]),
        "L1": lambda w: tuned(*LATER, "kd.skd.loss=l1", f"kd.skd.weight={w}", OFF[1]),
    }
    for label, *cells in table_after("DIARY.md", "with a seed of their own"):
        if label in singles:
            found = [float(cell) for cell in cells]
            assert found == pytest.approx(singles.pop(label), abs=TENTH)
            continue
        loss, *weights = label.removesuffix(" alone").replace(",", "").split()
        runs = [alone[loss](f"{float(weight):g}") for weight in weights]
        assert len(runs) == 3
        for cell, values in zip(cells, zip(*runs, strict=True), strict=True):
            assert figures(cell) == pytest.approx(list(values), abs=TENTH)
    assert not singles
    shown = table_after("STUDIES.md", "In the detector every loss met three weights")
    for cells, loss in zip(shown, ("SKD", "L1", "RKD"), strict=True):
        for cell, weight in zip(cells[1:], ("0.1", "0.3", "1", "3", "8"), strict=True):
            if cell:
                assert figures(cell) == pytest.approx(alone[loss](weight), abs=TENTH)


def test_a_step_with_the_teacher_in_the_loop_costs_what_is_kept():
    folder = RESULTS / "small" / "seed0"
    online, cached = (
        json.loads((folder / row / "row.json").read_text())["seconds_per_step"]
        for row in ("both_online", "both")
    )
    page = words_of("STUDIES.md")
    assert f"a step took {online:.3f} s" in page
    assert f"and {cached:.3f} for an earlier one from the cache" in page
