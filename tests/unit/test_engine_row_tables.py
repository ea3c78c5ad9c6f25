"""`[ablate.ROW]` tables of experiment files: a mistyped one is refused before anything runs."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

import cli
from dkdetr.engine.ablate import ablate
from dkdetr.engine.ablation_plan import AblateRequest, check_row_tables, make_plan
from dkdetr.errors import MismatchError
from dkdetr.experiment_file import ConfigError, load_experiment, shipped_experiments
from tests.training_world import make_world
from tests.unit.data_world import coco_document, write_world


@pytest.mark.parametrize(
    ("table", "complaint"),
    [
        ("[ablate.skd-l1.kd.skd]\nweight = 0.3", r"\[ablate.skd-l1\]: no such row; rows: baseline"),
        ("[ablate.skd.kd.skd]\nwieght = 9", r"\[ablate.skd\]: unknown setting 'kd.skd.wieght'"),
        (
            "[ablate.both_hybrid.kd]\nregions_per_image = 1",
            r"\[ablate.both_hybrid\]: .* at least 2",
        ),
    ],
)
def test_a_mistyped_table_is_refused(table: str, complaint: str, tmp_path: Path):
    path = tmp_path / "mine.toml"
    path.write_text(f'extends = "trial"\n{table}\n')
    with pytest.raises(ConfigError, match=complaint):
        check_row_tables(load_experiment(str(path)), str(path))
    checked = CliRunner().invoke(cli.app, ["config", "check", str(path)])
    assert checked.exit_code == 2
    assert re.search(complaint, checked.stderr)


def test_ablate_refuses_it_before_anything_runs(tmp_path: Path):
    world = make_world(tmp_path)
    path = tmp_path / "mine.toml"
    path.write_text('extends = "trial"\n[ablate.skd-l1.kd.skd]\nweight = 0.3\n')
    request = AblateRequest(
        cache=world.cache, table="7", experiment=str(path), overrides=(), seeds=1, rows=(), jobs=1,
        split=None, out=None, data_root=tmp_path, device="cpu",
    )  # fmt: skip
    with pytest.raises(ConfigError, match="no such row"):
        make_plan(request)


def test_curves_on_a_split_of_other_names_are_refused_before_anything_runs(tmp_path: Path):
    world = make_world(tmp_path)
    document = coco_document(num_images=2)
    first, second = document["categories"][:2]
    first["name"], second["name"] = second["name"], first["name"]
    (tmp_path / "other").mkdir()
    other = write_world(tmp_path / "other", document)
    request = AblateRequest(
        cache=world.cache, table="5", experiment="trial", overrides=(), seeds=1, rows=(), jobs=1,
        split=other, out=tmp_path / "out", data_root=tmp_path, device="cpu", eval_every=1,
    )  # fmt: skip
    with pytest.raises(MismatchError, match="leave --eval-every out, or name another --split"):
        ablate(request, ("/nothing/such",))
    assert not (tmp_path / "out").exists()
    make_plan(replace(request, eval_every=0))
    make_plan(replace(request, split=world.split))


def test_sound_tables_pass_though_the_run_itself_may_not_distil():
    assert load_experiment("pictograms_small").rows
    for name in shipped_experiments():
        check_row_tables(load_experiment(name), name)
    words = ["config", "check", "pictograms_small", "--set", "kd.rkd.weight=0"]
    assert CliRunner().invoke(cli.app, words).exit_code == 0


def test_a_table_that_a_setting_makes_impossible_is_nobodys_concern_who_asks_for_other_rows(
    tmp_path: Path,
):
    path = tmp_path / "mine.toml"
    path.write_text('extends = "trial"\n[ablate.both_hybrid.kd.skd]\nweight = 0.5\n')
    words = ["config", "check", str(path), "--set", "kd.auxiliary_queries=false"]
    assert CliRunner().invoke(cli.app, words).exit_code == 0
