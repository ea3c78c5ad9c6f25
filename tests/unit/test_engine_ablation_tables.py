"""The tables of ablations: their rows, the paper's numbers, and differences as they are shown."""

import pytest

from dkdetr.engine.ablation_results import AblationResult, RowResult, comma_separated, markdown
from dkdetr.engine.ablation_tables import (
    TABLE_NAMES,
    TableRow,
    row_overrides,
    set_words,
    table_of,
    with_weights,
)
from dkdetr.errors import UsageError
from dkdetr.experiment_file import ConfigError, load_experiment


def test_paired_differences_and_the_papers():
    rows = (
        RowResult(
            TableRow("baseline", "baseline", {"AP": 30.5}), {0: {"AP": 0.1}, 1: {"AP": 0.2}}, {}
        ),
        RowResult(TableRow("skd", "SKD", {"AP": 31.5}), {0: {"AP": 0.14}, 1: {"AP": 0.22}}, {}),
        RowResult(TableRow("skd_l1", "L1"), {1: {"AP": 0.17}}, {}),
    )
    result = AblationResult(table_of("6"), "x", ("AP",), (0, 1), rows, ())
    text = markdown(result)
    assert result.differences(rows[1], "AP") == pytest.approx([4.0, 2.0])
    assert "+3.0 [+2.0, +4.0]" in text
    assert "+1.0" in text  # the paper's own difference
    assert "18.0 (8.0)" in text
    # One seed only: compared with the same seed of the baseline, and said so.
    assert result.difference_cell(rows[2], "AP") == "-3.0"
    assert "1 of 2" in text
    assert (
        comma_separated(result)
        .splitlines()[1]
        .startswith("6,baseline,baseline,0,done,10.0000,30.5")
    )


def test_every_table_is_of_known_rows_and_its_settings_load():
    base = load_experiment("lvis_r50_36e").config
    known = row_overrides(base)
    used = set()
    for name in TABLE_NAMES:
        table = table_of(name)
        assert table.baseline in {row.run for row in table.rows}
        used |= {row.run for row in table.rows}
    assert used == set(known)
    for run, overrides in known.items():
        config = load_experiment("lvis_r50_36e", set_words(overrides)).config
        assert config.kd.start_epoch == base.kd.start_epoch, run
        assert (config == base) == (run in ("both", "layers_last")), run
    control = load_experiment("lvis_r50_36e", set_words(known["extra_queries"])).config.kd
    assert (control.hybrid_queries, control.hybrid_repeats) == (base.kd.regions_per_image, 1)
    eight = {row.run for name in "567" for row in table_of(name).rows} - {"both_iou"}
    assert len(eight) == 8
    with pytest.raises(UsageError, match="no table '8'"):
        table_of("8")


def test_the_papers_numbers_are_the_papers():
    rows = {row.run: row.paper for name in "567" for row in table_of(name).rows}
    keys = ("APr", "APc", "APf", "AP")
    assert [rows["both"][key] for key in keys] == [20.4, 30.9, 37.6, 31.7]
    assert [rows["both_no_auxiliary"][key] for key in keys] == [19.7, 27.3, 35.6, 29.2]
    assert [rows["skd_l1"][key] for key in keys] == [18.9, 30.8, 37.3, 31.4]
    assert rows["both_iou"] == {}


def test_an_experiment_without_distillation_is_no_base():
    for setting in ("kd.regions_per_image=0", "kd.skd.weight=0", "kd.rkd.weight=0"):
        with pytest.raises(UsageError, match="no base for an ablation"):
            row_overrides(load_experiment("trial", [setting]).config)


def test_an_experiment_file_may_tune_rows(tmp_path):
    path = tmp_path / "mine.toml"
    words = 'extends = "trial"\nname = "trial"\n[ablate.skd_l1.kd.skd]\nweight = 0.3\n'
    path.write_text(words)
    resolved = load_experiment(str(path))
    assert resolved.rows == {"skd_l1": {"kd.skd.weight": 0.3}}
    assert resolved.config == load_experiment("trial").config
    path.write_text('extends = "trial"\nablate = 3\n')
    with pytest.raises(ConfigError, match="ablate"):
        load_experiment(str(path))
    for override in ("ablate.skd_l1.kd.skd.weight=0.3", "ablate=3"):
        with pytest.raises(ConfigError, match="stands in an experiment file"):
            load_experiment("trial", [override])


def test_table_6_states_the_weight_that_l1_is_trained_with():
    def note(name: str, experiment: str) -> str:
        resolved = load_experiment(experiment)
        known = row_overrides(resolved.config)
        own = {row: known[row] | dict(resolved.rows.get(row, {})) for row in known}
        return with_weights(table_of(name), own).note

    unstated = "The paper does not state the weight of L1. Here it is "
    assert note("6", "lvis_r50_36e") == f"{unstated}0.5, ViLD's."
    assert note("6", "pictograms_small") == f"{unstated}1, the experiment's."
    assert note("5", "pictograms_small") == table_of("5").note
