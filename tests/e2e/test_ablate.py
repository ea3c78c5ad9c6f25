"""`ablate`, `report` and `eval --agreement` as typed, on a few pictures and a sealed cache."""

import json

from tests.e2e.commands import dkdetr, succeed
from tests.e2e.small_coco import write_coco_folder

TINY = [
    "--set", "optim.epochs=2", "--set", "optim.lr_drop_epochs=[1]", "--set", "data.image_size=96",
    "--set", "data.batch_size=4", "--set", "student.num_queries=12", "--set", "kd.start_epoch=1",
]  # fmt: skip


def test_two_rows_of_a_table_share_a_burn_in_and_are_reported(tmp_path):
    train = write_coco_folder(tmp_path, "train2017", num_images=12, seed=1)
    val = write_coco_folder(tmp_path, "val2017", num_images=4, seed=2)
    make = ("cache-teacher", "--teacher", "pictograms", "--prompts", "single", "--keep", "12")
    succeed(*make, "--split", train, "--out", "cache/trial", "--experiment", "trial",
            "--fit-epochs", "1", *TINY, cwd=tmp_path)  # fmt: skip
    words = ("ablate", "--cache", "cache/trial", "--experiment", "trial", "--table", "5",
             "--split", val, "--out", "ablation", "--rows", "baseline,both_no_auxiliary",
             "--jobs", "1", *TINY)  # fmt: skip
    priced = succeed(*words, "--dry-run", cwd=tmp_path)
    assert "seed0/burn_in" in priced
    assert "unknown" in priced
    printed = succeed(*words, "--json", "table.json", cwd=tmp_path)
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert rows["baseline"]["seeds"].keys() == {"0"}
    assert rows["both_no_auxiliary"]["seeds"]["0"]["AP50_all"] is not None
    assert rows["both"]["seeds"] == {}
    assert "not run" in printed
    assert "9.0 / 61.2" in printed  # the paper's baseline on OV-COCO
    seed = tmp_path / "ablation" / "seed0"
    # Both rows go on where the one burn-in ended: 3 steps an epoch.
    first = [json.loads((seed / r / "metrics.jsonl").read_text().splitlines()[0])
             for r in ("baseline", "both_no_auxiliary")]  # fmt: skip
    assert [line["iteration"] for line in first] == [6, 6]
    assert "skd" in first[1]
    assert "skd" not in first[0]
    again = succeed(*words, cwd=tmp_path)
    assert again.split("one burn-in")[0] == printed.split("one burn-in")[0]

    refused = dkdetr(*words, "--rows", "nonsense", cwd=tmp_path)
    assert refused.returncode == 2
    assert "its rows: baseline, skd, rkd" in refused.stderr

    succeed(*make, "--split", val.replace("ovcoco:", "coco:"), "--out", "cache/val",
            "--proposals", "fit:cache/trial", cwd=tmp_path)  # fmt: skip
    agreed = succeed("eval", "ablation/seed0/baseline", "--agreement", "cache/val", cwd=tmp_path)
    assert "4 held-out images" in agreed
    succeed("report", "ablation/seed0/baseline", "ablation/seed0/both_no_auxiliary", "--split", val,
            "--out", "page.html", cwd=tmp_path)  # fmt: skip
    page = (tmp_path / "page.html").read_text()
    assert "Agreement with the teacher" in page
    assert "kd.rkd.weight" in page
