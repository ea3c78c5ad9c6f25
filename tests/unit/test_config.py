"""Settings: one source, the dotted path in every complaint."""

import re
from dataclasses import fields, is_dataclass

import pytest

from dkdetr.experiment_file import (
    ConfigError,
    config_from_dict,
    config_hash,
    dump_toml,
    load_experiment,
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
    (tmp_path / "parent.toml").write_text("[optim]\nlr = 1e-3\nepochs = 4\n")
    child = tmp_path / "child.toml"
    child.write_text('extends = "parent.toml"\nname = "child"\n[optim]\nlr = 2e-3\n')
    resolved = load_experiment(str(child), ["optim.lr=3e-3", "kd.layers=all"])
    assert (resolved.config.optim.lr, resolved.config.optim.epochs) == (3e-3, 4)
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
    ],
)
def test_a_wrong_setting_is_named_by_its_path(override: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        load_experiment("lvis_r50_70e", [override])


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
    same = ["data.workers=3", "compute.micro_batches=4", "checkpoint_every_s=5"]
    assert config_hash(load_experiment("trial", same).config) == config_hash(config)
    assert config_hash(load_experiment("trial", ["seed=1"]).config) != config_hash(config)


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


@pytest.mark.parametrize("share", ["half", "50", "101%", "-1%", "x%", "%"])
def test_what_is_no_share_is_refused_by_its_path(share) -> None:
    with pytest.raises(ConfigError, match=r"'kd.start_epoch' wants an epoch"):
        load_experiment("trial", [f'kd.start_epoch="{share}"'])
