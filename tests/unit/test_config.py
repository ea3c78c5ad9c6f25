"""Settings: one source, the dotted path in every complaint."""

import hashlib
import json
import re
from dataclasses import fields, is_dataclass, replace

import pytest
from typer.testing import CliRunner

import cli
from dkdetr.engine.optim import learning_rate_factor
from dkdetr.experiment_file import (
    ConfigError,
    config_from_dict,
    config_hash,
    config_to_dict,
    deciding_settings,
    dump_toml,
    flatten,
    load_experiment,
    refuse_late_start,
    shipped_experiments,
)
from dkdetr.setting_ranges import RANGES


@pytest.mark.parametrize("name", shipped_experiments())
def test_every_shipped_experiment_loads_and_survives_a_dump(name, tmp_path) -> None:
    config = load_experiment(name).config
    assert config.name == name
    path = tmp_path / "again.toml"
    path.write_text(dump_toml(config))
    assert load_experiment(str(path)).config == config


def test_the_paper_s_numbers() -> None:
    config = load_experiment("lvis_r50_70e").config
    assert (config.optim.epochs, config.optim.lr_drop_epochs, config.kd.start_epoch) == (
        70,
        (55,),
        40,
    )
    assert (config.data.batch_size, config.optim.lr, config.optim.weight_decay) == (128, 8e-4, 0.05)
    assert (config.kd.skd.temperature, config.kd.rkd.temperature) == (0.05, 0.2)
    assert (config.kd.skd.weight, config.kd.rkd.weight, config.kd.regions_per_image) == (0.1, 2, 20)
    assert config.classifier.temperature == 0.05
    assert config.classifier.bias_init is None
    assert config.data.scale_range == (0.1, 2.0)


def test_what_is_trained_on_gpus_has_its_views_made_there() -> None:
    """Settings of a CPU's experiments, and so their runs' names and kept tables, stay."""
    there = {name for name in shipped_experiments() if "r50" in name}
    for name in shipped_experiments():
        wanted = "auto" if name in there else "loader"
        assert load_experiment(name).config.data.augment == wanted
    lvis = {"lvis_r50_36e", "lvis_r50_70e", "lvis_r50_70e_mask"}
    assert there == lvis | {"ovcoco_r50", "own_r50"}


def test_masks_are_the_70_epoch_model_s_alone() -> None:
    segmenter = load_experiment("lvis_r50_70e_mask").config
    assert segmenter.student.mask_head
    assert (segmenter.detection.weight_dice, segmenter.detection.weight_mask_bce) == (8, 2)
    assert segmenter.student.mask_side(segmenter.data.image_size) == 512
    others = [name for name in shipped_experiments() if name != "lvis_r50_70e_mask"]
    assert not any(load_experiment(name).config.student.mask_head for name in others)


def test_later_sources_win_and_are_named(tmp_path) -> None:
    (tmp_path / "parent.toml").write_text("[optim]\nlr = 1e-3\nepochs = 60\n")
    child = tmp_path / "child.toml"
    child.write_text('extends = "parent.toml"\nname = "child"\n[optim]\nlr = 2e-3\n')
    resolved = load_experiment(str(child), ["optim.lr=3e-3", "kd.layers=all"])
    assert (resolved.config.optim.lr, resolved.config.optim.epochs) == (3e-3, 60)
    assert resolved.config.kd.layers == "all"
    assert resolved.origins["optim.lr"] == "--set"
    assert resolved.origins["optim.epochs"].endswith("parent.toml")


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("kd.skd.wieght=1", "unknown setting 'kd.skd.wieght'"),
        ("optim.lr=fast", "setting 'optim.lr'"),
        ("data.batch_size=1.5", "setting 'data.batch_size'"),
        ("kd.layers=first", "setting 'kd.layers'"),
        ("student.masks_at_once=0", "setting 'student.masks_at_once'"),
        ("detection.weight_dice=-1", "setting 'detection.weight_dice'"),
        ("kd", "KEY=VALUE"),
        ("=3", "KEY=VALUE"),
        ("kd=3", "'kd' is a table, got 3; known here: start_epoch"),
        ("optim=3", "'optim' is a table, got 3; known here: lr"),
        ("optim.epochs.x=3", "setting 'optim.epochs': Input should be a valid integer"),
        ("optim.precision.x=3", "'optim.precision' is 'tf32' and no table, but --set sets"),
        ("optim.epochs=1.5", "setting 'optim.epochs'"),
        ("kd.start_epoch=true", "setting 'kd.start_epoch' is no switch, got True"),
        ("classifier.bias_init=false", "setting 'classifier.bias_init' is no switch"),
        ("optim.betas=[0.9, true]", "setting 'optim.betas' is no switch"),
        ("optim.lr=none", "setting 'optim.lr'"),
        ("kd.skd.weight=inf", "setting 'kd.skd.weight' must be a finite number, got inf"),
        ("kd.skd.temperature=inf", "setting 'kd.skd.temperature' must be a finite number"),
        ("student.backbone.stages=[]", "setting 'student.backbone.stages' must rise"),
        ("student.backbone.stages=[4, 3]", "setting 'student.backbone.stages' must rise"),
        (
            "optim.epochs=50 optim.lr_drop_epochs=[55]",
            "55 lies behind the last of optim.epochs = 50",
        ),
        ("optim.lr_drop_epochs=[60, 70]", "70 lies behind the last of optim.epochs = 70"),
    ],
)
def test_a_wrong_setting_is_named_by_its_path(override: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(complaint)) as raised:
        load_experiment("lvis_r50_70e", re.split(" (?=optim)", override))
    assert raised.value.exit_code == 2


@pytest.mark.parametrize(
    "words", [["kd.start_epoch=100%"], ["optim.epochs=1", "optim.lr_drop_epochs=[]"]]
)
def test_distillation_behind_the_end_is_for_those_to_refuse_who_train(words: list[str]) -> None:
    config = load_experiment("lvis_r50_70e", words).config
    with pytest.raises(ConfigError, match=r"'kd.start_epoch': \d+ lies behind the last of optim"):
        refuse_late_start(config)
    checked = CliRunner().invoke(
        cli.app, ["config", "check", "lvis_r50_70e", *(f"--set={word}" for word in words)]
    )
    assert checked.exit_code == 2
    off = replace(config, kd=replace(config.kd, regions_per_image=0))
    refuse_late_start(off)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"optim = 3\n", "'optim' is a table, got 3"),
        (b'name = "\xff"\n', "is not UTF-8 text"),
        (b"[optim]\nepochs = 30\n", "55 lies behind the last of optim.epochs = 30"),  # the default
    ],
)
def test_a_wrong_file_is_refused(content, complaint, tmp_path) -> None:
    (tmp_path / "mine.toml").write_bytes(content)
    with pytest.raises(ConfigError, match=complaint):
        load_experiment(str(tmp_path / "mine.toml"))


def test_a_file_without_a_name_has_its_own(tmp_path) -> None:
    (tmp_path / "mine.toml").write_text('extends = "trial"\n')
    assert load_experiment(str(tmp_path / "mine.toml")).config.name == "mine"
    assert load_experiment(str(tmp_path / "mine.toml"), ["name=other"]).config.name == "other"


def test_none_takes_an_option_back(tmp_path) -> None:
    assert load_experiment("trial").config.classifier.bias_init == -4
    (tmp_path / "mine.toml").write_text('extends = "trial"\n[classifier]\nbias_init = "none"\n')
    for given in ((str(tmp_path / "mine.toml"),), ("trial", ["classifier.bias_init=none"])):
        config = load_experiment(*given).config
        assert config.classifier.bias_init is None
        assert config.student.weights is None


def test_a_circle_of_experiments_is_refused(tmp_path) -> None:
    path = tmp_path / "a.toml"
    path.write_text('extends = "a.toml"\n')
    with pytest.raises(ConfigError, match="extends"):
        load_experiment(str(path))


def test_the_hash_follows_every_setting() -> None:
    base = {"name": "x"}
    assert config_hash(config_from_dict(base)) == config_hash(config_from_dict(base))
    other = config_from_dict(base | {"kd": {"rkd": {"weight": 2.5}}})
    assert config_hash(other) != config_hash(config_from_dict(base))


def _numeric_paths(table, prefix="") -> set[str]:
    found = set()
    for entry in fields(table):
        value = getattr(table, entry.name)
        path = prefix + entry.name
        if is_dataclass(value):
            found |= _numeric_paths(value, f"{path}.")
        elif "Annotated" not in str(entry.type) and re.search("int|float", str(entry.type)):
            found.add(path)
    return found


def test_every_numeric_setting_has_a_range() -> None:
    """Of its own, by annotation, or in the table; never both."""
    assert _numeric_paths(config_from_dict({"name": "x"})) == set(RANGES)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("optim.lr=0", "'optim.lr' must be above 0, got 0.0"),
        ("optim.lr=nan", "'optim.lr' must be above 0, got nan"),
        ("student.dropout=1.0", "'student.dropout' must be from 0 to below 1, got 1.0"),
        ("kd.skd.weight=-1", "'kd.skd.weight': Input should be greater than or equal to 0"),
        ("data.scale_range=[2.0, 0.5]", "'data.scale_range' must be (least, most)"),
        ("optim.lr_drop_epochs=[3, -1]", "'optim.lr_drop_epochs' must be 0 or above"),
        ("compute.micro_batches=0", "'compute.micro_batches' must be 1 or above"),
    ],
)
def test_a_number_out_of_range_is_refused_by_its_path(setting, words) -> None:
    with pytest.raises(ConfigError) as raised:
        load_experiment("trial", [setting])
    assert words in str(raised.value)


def test_how_the_work_is_done_does_not_change_what_run_it_is() -> None:
    config = load_experiment("trial").config
    same = ["data.workers=3", "compute.micro_batches=4", "checkpoint_every_s=5",
            "data.cache_mode=resident", "eval.batch_size=2", "student.masks_at_once=4"]  # fmt: skip
    assert config_hash(load_experiment("trial", same).config) == config_hash(config)
    assert deciding_settings(load_experiment("trial", same).config) == deciding_settings(config)
    assert config_hash(load_experiment("trial", ["seed=1"]).config) != config_hash(config)


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("lvis_r50_36e", "c4928004"),
        ("lvis_r50_70e", "4f5cc810"),
        ("lvis_r50_70e_mask", "ad5831fe"),
        ("ovcoco_r50", "d0f79676"),
        ("own_r50", "4f0a83d9"),
    ],
)
def test_what_decides_a_run_is_what_method_a_and_b_say(name, known) -> None:
    """Every deciding setting, defaults included, was read against the paper's numbers: a hash
    that changes wants that reading again, and a line in the changelog."""
    assert config_hash(load_experiment(name).config) == known


@pytest.mark.parametrize("name", shipped_experiments())
def test_a_hash_is_that_of_the_days_when_it_held_more(name) -> None:
    """Or runs would be sought in folders of other names."""
    config = load_experiment(name).config
    left_out = ("compute.", "ops.", "data.workers", "checkpoint_every_s")
    flat = flatten(json.loads(json.dumps(config_to_dict(config))))
    held = {key: value for key, value in flat.items() if not key.startswith(left_out)}
    assert {"data.cache_mode", "eval.batch_size", "student.masks_at_once"} < held.keys()
    then = hashlib.sha256(json.dumps(held, sort_keys=True).encode()).hexdigest()[:8]
    assert config_hash(config) == then


@pytest.mark.parametrize(
    ("epochs", "share", "epoch"),
    [(8, "50%", 4), (6, "50%", 3), (5, "50%", 3), (70, "57.142857%", 40), (8, "0%", 0)],
)
def test_a_share_of_the_run_becomes_the_epoch(epochs, share, epoch) -> None:
    words = [f"kd.start_epoch={share}", f"optim.epochs={epochs}", "optim.lr_drop_epochs=[0]"]
    config = load_experiment("trial", words).config
    assert config.kd.start_epoch == epoch
    assert config == load_experiment("trial", [*words, f"kd.start_epoch={epoch}"]).config


def test_shares_follow_a_run_that_is_made_longer(tmp_path) -> None:
    preset = tmp_path / "preset.toml"
    preset.write_text(
        '[kd]\nstart_epoch = "25%"\n[optim]\nepochs = 8\nlr_drop_epochs = ["75%", 7]\n'
    )
    short = load_experiment(str(preset)).config
    long = load_experiment(str(preset), ["optim.epochs=40"]).config
    assert (short.kd.start_epoch, short.optim.lr_drop_epochs) == (2, (6, 7))
    assert (long.kd.start_epoch, long.optim.lr_drop_epochs) == (10, (30, 7))


def test_whole_epochs_may_be_written_with_a_point() -> None:
    config = load_experiment("trial", ["optim.epochs=72.0", 'kd.start_epoch="50%"']).config
    assert (config.optim.epochs, config.kd.start_epoch) == (72, 36)


@pytest.mark.parametrize("name", shipped_experiments())
@pytest.mark.parametrize("epochs", [6, 36, 50])
def test_the_rate_falls_in_a_run_of_another_length(name, epochs) -> None:
    config = load_experiment(name, [f"optim.epochs={epochs}"]).config
    assert learning_rate_factor(config.optim, epoch=epochs - 1, iteration=10**6) < 1
    assert config.kd.start_epoch < epochs


def test_a_share_may_come_to_lie_at_the_end() -> None:
    """As in the kept rows of two epochs of pictograms_full."""
    assert load_experiment("pictograms_full", ["optim.epochs=2"]).config.optim.lr_drop_epochs == (
        2,
    )


@pytest.mark.parametrize("share", ["half", "50", "101%", "-1%", "x%", "%"])
def test_what_is_no_share_is_refused_by_its_path(share) -> None:
    with pytest.raises(ConfigError, match=r"'kd.start_epoch' wants an epoch"):
        load_experiment("trial", [f'kd.start_epoch="{share}"'])


def test_a_number_beyond_any_float_is_out_of_range() -> None:
    with pytest.raises(ConfigError, match="'seed' must be"):
        load_experiment("trial", ["seed=" + 400 * "9"])
