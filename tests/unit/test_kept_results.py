"""What the pages of the smaller world say is what the kept records say."""

import json
from statistics import mean

import pytest

from tests.kept_records import (
    EXPERIMENTS,
    GROUPS,
    apart,
    average,
    bracket,
    by_seed,
    figures,
    less,
    record,
    rows_of,
    scores,
    words_of,
)

LONGER = {
    "baseline": "baseline",
    "SKD (BCE)": "skd",
    "RKD (image + batch)": "rkd",
    "SKD + RKD": "both",
    "both, no auxiliary queries": "both_no_auxiliary",
    "both, auxiliary, `iou` (the control)": "both_iou",
    "L1": "skd_l1",
    "RKD, image": "rkd_image",
    "RKD, batch": "rkd_batch",
}
EARLIER = {label: row for label, row in LONGER.items() if row != "both_iou"}
FIFTY = "SKD + RKD, from 50 %"
LONG, EARLY, OTHER = "small_long_again", "small_start_0", "small_long"


def shown_between(start: str, end: str) -> dict[str, list[str]]:
    page = (EXPERIMENTS / "README.md").read_text()
    return {row[0]: row[1:] for row in rows_of(page[page.index(start) : page.index(end)])[2:]}


def require_of_records(cells: list[str], values: list[list[float]], baseline: list[list[float]]):
    for place, (own, its) in enumerate(zip(values, baseline, strict=True)):
        assert len(own) == 3
        wanted = [mean(own), max(own) - min(own)]
        assert figures(cells[place]) == pytest.approx(wanted, abs=0.0501)
        if own != its:
            gains = apart(own, its)
            wanted = [mean(gains), min(gains), max(gains)]
            assert figures(cells[place + 4]) == pytest.approx(wanted, abs=0.0501)


@pytest.mark.parametrize(
    ("start", "end", "folder", "rows"),
    [("### Longer:", "### Larger:", LONG, LONGER), ("### Earlier:", "### Longer:", EARLY, EARLIER)],
)
def test_another_schedules_table_is_of_its_records(
    start: str, end: str, folder: str, rows: dict[str, str]
):
    shown = shown_between(start, end)
    shown.pop(FIFTY, None)
    assert shown.keys() == rows.keys()
    baseline = [scores(folder, "baseline", group) for group in GROUPS]
    for label, row in rows.items():
        require_of_records(shown[label], [scores(folder, row, g) for g in GROUPS], baseline)


def test_what_the_earlier_start_shows_is_of_its_records():
    late = [scores("small_start_50", "both", group) for group in GROUPS]
    baseline = [scores(EARLY, "baseline", group) for group in GROUPS]
    require_of_records(shown_between("### Earlier:", "### Longer:")[FIFTY], late, baseline)
    novel, common, frequent, ap = (
        bracket(apart(scores(EARLY, "both", group), values))
        for group, values in zip(GROUPS, late, strict=True)
    )
    page = words_of("README.md")
    earlier = f"{novel} on novel, {common} on common, {frequent} on frequent names, {ap} in AP"
    assert f"less 50 % {earlier}" in page
    skd, rkd = (
        {group: by_seed(EARLY, "both", row, group) for group in GROUPS} for row in ("skd", "rkd")
    )
    assert f"more than SKD by {skd['APr']}, than RKD by {rkd['APr']}; in AP by " in page
    assert f"in AP by {skd['AP']} and {rkd['AP']}." in page
    l1 = {group: by_seed(EARLY, "skd", "skd_l1", group) for group in GROUPS}
    assert f"novel {l1['APr']}, AP {l1['AP']}." in page
    for row in ("skd", "rkd", "both"):
        for group in ("APr", "AP"):
            assert min(less(EARLY, row, "baseline", group)) > 0
    for group in GROUPS:
        assert min(less(EARLY, "skd", "skd_l1", group)) > 0
        assert all(
            float(average(EARLY, row, "baseline", group)) > 0 for row in ("skd", "rkd", "both")
        )
    aside = [less(EARLY, "both", "both_no_auxiliary", group) for group in GROUPS]
    novel, common, frequent, ap = (", ".join(f"{each:.1f}" for each in values) for values in aside)
    assert f"in every seed, by {novel} and {ap}; base names are level" in page
    assert f"(common by {common}, frequent by {frequent})" in page
    for group in ("APr", "AP"):
        assert min(less(EARLY, "rkd_image", "rkd", group)) > 0


def test_what_a_repetition_from_another_cache_gave_is_of_the_records():
    """A baseline's steps are the same whenever the others begin to distil."""
    page = words_of("README.md")
    pairs = [
        {group: (scores(folder, row, group), scores("small", row, group)) for group in GROUPS}
        for row, folder in (("both", "small_start_50"), ("baseline", EARLY))
    ]
    both, baseline = (
        " / ".join(f"{mean(apart(*of[group])):+.1f}" for group in GROUPS) for of in pairs
    )
    assert f"were {both} for SKD + RKD and {baseline} for the baseline" in page
    gains = [mean(apart(pairs[0]["APr"][place], pairs[1]["APr"][place])) for place in (0, 1)]
    assert f"both's gain on novel names was {gains[0]:+.1f}, not {gains[1]:+.1f}" in page
    most = {group: max(abs(each) for of in pairs for each in apart(*of[group])) for group in GROUPS}
    ap = most.pop("AP")
    assert f"moved by up to {max(most.values()):.1f} in a group and {ap:.1f} in AP" in page


def test_figures_by_seed_and_of_short_are_of_the_records():
    page = words_of("README.md")
    for said in (
        f"more than SKD by {by_seed('small', 'both', 'skd', 'APr')} by seed",
        f"than SKD by {by_seed(LONG, 'both', 'skd', 'APr')}, than RKD",
        f"(by seed {by_seed('small', 'skd', 'skd_l1', 'APr')} and "
        f"{by_seed(LONG, 'skd', 'skd_l1', 'APr')})",
        f"both have {by_seed('small', 'rkd', 'rkd_batch', 'APr')} by seed, then "
        f"{by_seed(LONG, 'rkd', 'rkd_batch', 'APr')}",
        f"in every seed ({by_seed(LONG, 'both_iou', 'both_no_auxiliary', 'AP')};",
        *(
            f"common {average(folder, 'skd', 'baseline', 'APc')} against "
            f"{average(folder, 'skd_l1', 'baseline', 'APc')}"
            for folder in ("small", LONG)
        ),
    ):
        assert said in page


def test_what_another_cache_and_another_weight_of_l1_moved_is_of_the_records():
    page = words_of("README.md")
    for label, row in (("baseline", "baseline"), ("SKD", "skd"), ("RKD", "rkd"), ("L1", "skd_l1"),
                       ("SKD + RKD", "both")):  # fmt: skip
        values = scores(LONG, row, "APr")
        assert (
            f"{label} {scores(OTHER, row, 'APr')[0]:.2f} ({min(values):.2f} to {max(values):.2f}"
        ) in page
    lighter = json.loads((EXPERIMENTS / "results/small_long/l1_weight_0.3.json").read_text())
    gains = [100 * lighter["metrics"][g] - scores(OTHER, "baseline", g)[0] for g in GROUPS]
    assert f"{gains[0]:+.1f} (common {gains[1]:+.1f}, frequent {gains[2]:+.1f})" in page


def test_three_weights_of_l1_are_of_the_records():
    page, studies = words_of("README.md"), words_of("STUDIES.md")
    ahead = {}
    for weight in (".1", ".3", "1"):
        folder = LONG if weight == "1" else f"small_long_l1/weight_0{weight}"
        records = sorted((EXPERIMENTS / "results" / folder).glob("seed*/skd_l1/row.json"))
        for place, path in enumerate(records):
            kept = json.loads(path.read_text())
            beside = record(EXPERIMENTS / "results" / LONG, "skd", str(place))
            assert kept["cache_fingerprint"] == beside["cache_fingerprint"]
            assert kept["config"]["kd"]["skd"].pop("weight") == float(weight)
            table_6 = record(EXPERIMENTS / "results" / LONG, "skd_l1", str(place))["config"]
            table_6["kd"]["skd"].pop("weight")
            assert kept["config"] == table_6
        l1 = {group: scores(folder, "skd_l1", group) for group in GROUPS}
        assert len(l1["AP"]) == 3
        gains = {group: apart(l1[group], scores(LONG, "baseline", group)) for group in GROUPS}
        ahead[weight] = {group: apart(scores(LONG, "skd", group), l1[group]) for group in GROUPS}
        assert min(ahead[weight]["AP"]) > 0
        assert min(ahead[weight]["APf"]) > 0
        if weight != "1":
            told = " / ".join(bracket(gains[group]) for group in GROUPS)
            assert f"weight {weight} {told}" in page
            assert min(ahead[weight]["APr"]) > 0
    assert sum(each > 0 for each in ahead[".1"]["APc"]) == 2
    assert min(ahead[".3"]["APc"] + ahead["1"]["APc"]) > 0
    ap = {weight: bracket(of["AP"]) for weight, of in ahead.items()}
    assert f"in AP is {ap['.1']} at .1, {ap['.3']} at .3 and {ap['1']} at 1;" in page
    novel = ", ".join(bracket(of["APr"]) for of in ahead.values())
    assert f"on novel names {novel}." in page
    less_baseline = {
        group: ", ".join(
            f"{mean(scores(folder, 'skd_l1', group)) - mean(scores(LONG, 'baseline', group)):+.1f}"
            for folder in (*(f"small_long_l1/weight_0{w}" for w in (".1", ".3")), LONG)
        )
        for group in GROUPS
    }
    ap = [mean(scores(folder, "skd_l1", "AP")) for folder in
          (LONG, "small_long_l1/weight_0.3", "small_long_l1/weight_0.1")]  # fmt: skip
    assert (
        f"({ap[1]:.1f}, .1 {ap[2]:.1f}, 1 {ap[0]:.1f}; BCE {mean(scores(LONG, 'skd', 'AP')):.1f})"
    ) in words_of("DIARY.md")
    bce = {group: average(LONG, "skd", "baseline", group) for group in GROUPS}
    assert (
        f"common {bce['APc']} against {less_baseline['APc']}; "
        f"novel {bce['APr']} against {less_baseline['APr']} |"
    ) in page
    means = [[f"{mean(of[group]):.1f}" for of in ahead.values()] for group in ("AP", "APr")]
    assert f"(by {', '.join(means[0])} on average)" in studies
    assert f"at .1 and .3 (by {', '.join(means[1][:2])})" in studies


def test_figures_of_tuning_and_of_the_losses_alone_are_of_the_records():
    page, full = words_of("README.md"), words_of("FULL.md")
    results = EXPERIMENTS / "results"
    lines = (results / "tuning_small.jsonl").read_text().splitlines()
    tuning = [json.loads(line) for line in lines]

    def tuned(row: str, *settings: str) -> dict[str, str]:
        wanted = {"seed=100", *settings}
        found = [each["metrics"] for each in tuning
                 if each["row"] == row and wanted <= set(each["settings"])]  # fmt: skip
        assert len(found) == 1
        # Kept to a hundredth of a point: halves go up.
        return {group: f"{100 * found[0][group] + 1e-6:.1f}" for group in GROUPS}

    alone, both = (tuned(row, "kd.rkd.weight=8") for row in ("rkd", "both"))
    assert (
        f"{alone['APr']} against {both['APr']} on novel names and {alone['AP']} against "
        f"{both['AP']} in AP"
    ) in full
    l1 = ", ".join(tuned("skd_l1", f"kd.skd.weight={w}")["AP"] for w in ("0.1", "0.3", "1"))
    assert f"({l1})" in page
    best = {}
    for space in ("plain", "cone"):
        for line in (results / f"loss_study_{space}.jsonl").read_text().splitlines():
            each = json.loads(line)
            at = (space, each["name"])
            best[at] = max(best.get(at, 0.0), each["map_novel"])
    assert f"novel {best['plain', 'bce']} without SKD's, {best['plain', 'bce_biased']} with" in page
    assert f"reaches the same ({best['cone', 'bce']})" in page
    lines = (results / "loss_study_cone_biased.jsonl").read_text().splitlines()
    later = [json.loads(line) for line in lines]
    without, biased = (
        max(each["map_novel"] for each in later if each["name"] == name)
        for name in ("bce", "bce_biased")
    )
    assert f"novel {without} at best without SKD's and {biased} with it" in page
    ap, novel = ([scores("full_first", row, group)[0] for row in ("rkd", "both")]
                 for group in ("AP", "APr"))  # fmt: skip
    assert (
        f"AP {ap[0]:.1f} against {ap[1]:.1f} with both, novel names {novel[0]:.2f} against "
        f"{novel[1]:.2f}"
    ) in words_of("STUDIES.md")


def test_the_head_of_small_and_what_is_said_in_short_are_of_the_records():
    head = (EXPERIMENTS / "pictograms_small.toml").read_text()
    for row in ("both", "skd", "baseline"):
        means = " / ".join(f"{mean(scores('small', row, group)):.1f}" for group in GROUPS)
        assert means in head
    shown = shown_between("### In short", "```")
    for claim, row in (("SKD raises novel AP", "skd"), ("RKD raises novel AP", "rkd"),
                       ("both together raise it most", "both")):  # fmt: skip
        first = f"{figures(shown[claim][-1])[0]:+.1f}"
        assert first == average(LONG, row, "baseline", "APr")
        assert min(less(LONG, row, "baseline", "APr")) > 0
    plain = [mean(scores(LONG, "baseline", group)) for group in ("APr", "AP")]
    assert f"has {plain[0]:.1f} on novel names and {plain[1]:.1f} on all" in words_of("README.md")


def test_both_raise_novel_ap_most_in_eight_of_nine_seeds():
    ahead = [
        both
        for folder in ("small", LONG, EARLY)
        for both in zip(*(less(folder, "both", row, "APr") for row in ("skd", "rkd")), strict=True)
    ]
    assert len(ahead) == 9
    assert sum(min(each) > 0.05 for each in ahead) == 8
    assert "in eight of nine seeds over three schedules" in words_of("README.md")


def test_the_diarys_rows_with_learned_content_are_of_their_records():
    page = (EXPERIMENTS / "DIARY.md").read_text()
    section = page[page.index("content of a detection query") :]
    shown = {row[0]: row[1] for row in rows_of(section)[2:5]}
    for label, row in (("SKD", "skd"), ("RKD", "rkd"), ("SKD + RKD", "both")):
        values = [scores(EARLY, row, group)[0] for group in GROUPS]
        assert figures(shown[label]) == pytest.approx(values, abs=0.0501)


def test_the_surer_teachers_table_is_of_its_records():
    page = (EXPERIMENTS / "STUDIES.md").read_text()
    section = page[page.index("**A surer teacher**") : page.index("**The surer teacher's")]
    folders = {"shipped": EARLY, "surer": "small_sure_teacher"}
    rows = {"baseline": "baseline", "SKD": "skd", "RKD": "rkd", "SKD + RKD": "both"}
    lines = rows_of(section)[2:]
    assert [(line[0], line[1]) for line in lines] == [(t, r) for t in folders for r in rows]
    for teacher, label, *cells in lines:
        folder, row = folders[teacher], rows[label]
        many = 2 if row in ("baseline", "both") else 1
        for place, group in enumerate(GROUPS):
            values = scores(folder, row, group)[:many]
            assert figures(cells[place]) == pytest.approx(values, abs=0.0501)
        if row != "baseline":
            for place, group in ((4, "APr"), (5, "AP")):
                own, plain = (scores(folder, each, group)[:many] for each in (row, "baseline"))
                wanted = apart(own, plain)
                assert figures(cells[place]) == pytest.approx(wanted, abs=0.0501)
    ratios = [
        [both / plain for both, plain in zip(scores(folder, "both", "APr"),
                                             scores(folder, "baseline", "APr"), strict=False)][:2]
        for folder in folders.values()
    ]  # fmt: skip
    novel, all_names = (
        [apart(scores("small_sure_teacher", "both", group), scores(EARLY, "both", group)[:2])
         for group in ("APr", "AP")]
    )  # fmt: skip
    assert min(novel) < 0 < max(novel)  # "no higher on novel names"
    assert min(all_names) > 0
    (few, more), (sure, surer) = ratios
    said = f"{sure:.2f} and {surer:.2f} times the baseline's, with the shipped teacher {few:.2f} "
    assert f"{said}and {more:.2f} times" in words_of("STUDIES.md")
