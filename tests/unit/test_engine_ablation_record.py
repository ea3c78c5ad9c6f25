"""A row's record on a later day: settings that were added since count as their defaults."""

import json
from dataclasses import replace

import pytest

from dkdetr.engine.ablation_plan import AblationPlan, PlannedRun
from dkdetr.engine.ablation_record import record_row
from dkdetr.engine.ablation_tables import table_of
from dkdetr.errors import MismatchError
from dkdetr.experiment_file import config_hash, dump_toml, load_experiment


@pytest.fixture
def kept(tmp_path):
    """A finished row of `trial`, and the plan that asks for it."""
    config = load_experiment("trial").config
    folder = tmp_path / "seed0" / "baseline"
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(dump_toml(config))
    (folder / "score.json").write_text(json.dumps({"AP": 0.2, "APr": 0.1, "split": "s"}))
    run = PlannedRun("baseline", 0, folder, config_hash(config), 30, 16, (("train",),))
    plan = AblationPlan(
        table=table_of("7"), out=tmp_path, split="s", protocol="lvis", experiment="trial",
        cache_fingerprint="f", seeds=(0,), runs=(run,), burn_ins=(), wanted=frozenset({"baseline"}),
    )  # fmt: skip
    record_row(plan, run)
    return plan, run, folder / "row.json"


def rewrite(path, change):
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def test_a_setting_that_did_not_exist_then_counts_as_its_default(kept):
    plan, run, path = kept

    def forget(record):
        del record["config"]["optim"]["ema_decay"]
        record["config_hash"] = "00000000"  # of the settings that there were

    rewrite(path, forget)
    assert plan.finished(run)["metrics"]["APr"] == 0.1
    other = config_hash(load_experiment("trial", ["optim.ema_decay=0.9"]).config)
    with pytest.raises(MismatchError, match="config_hash"):
        plan.finished(replace(run, hash=other))


def test_a_setting_that_is_gone_makes_it_another_row(kept):
    plan, run, path = kept
    rewrite(
        path,
        lambda record: record["config"]["optim"].update(gone=1) or record.update(config_hash="0"),
    )
    with pytest.raises(MismatchError, match="config_hash 0"):
        plan.finished(run)
