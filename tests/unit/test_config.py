"""Settings: one source, the dotted path in every complaint."""

import pytest

from dkdetr.experiment_file import (
    ConfigError,
    config_from_dict,
    config_hash,
    dump_toml,
    load_experiment,
    shipped_experiments,
)


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
