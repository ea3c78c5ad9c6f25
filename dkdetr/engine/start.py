"""From a command's words to a training run: which experiment, which folder."""

from collections.abc import Sequence
from pathlib import Path

from cache.location import CachePath
from cache.store import open_cache
from dkdetr.config import ExperimentConfig
from dkdetr.engine.run_folder import RUNS, portable_name
from dkdetr.errors import UsageError
from dkdetr.experiment_file import config_hash, load_experiment, shipped_experiments

_BY_SPLIT = {"lvis": "lvis_r50_70e", "ovcoco": "ovcoco_r50"}


def settings_and_folder(
    cache: CachePath, experiment: str | None, overrides: Sequence[str], run: Path | None
) -> tuple[ExperimentConfig, Path]:
    """Returns the settings of an experiment on a cache, and the folder of its run.

    Args:
        cache: a sealed cache, or an export of one.
        experiment: a shipped name or a file; None: the one that belongs to the cache's split.
        overrides: `a.b=c` settings.
        run: the folder; None: runs/EXPERIMENT-HASH.
    """
    if experiment is None:
        experiment = experiment_of_split(open_cache(cache).info.split)
    config = load_experiment(experiment, overrides).config
    return config, run or RUNS / f"{portable_name(config.name)}-{config_hash(config)}"


def experiment_of_split(split: str) -> str:
    """Returns the experiment that a cache's split means where none is named.

    Raises:
        UsageError: the split says nothing about it (plain COCO, say).
    """
    kind = split.partition(":")[0]
    for part in ("_train", "_val", "_held"):
        kind = kind.removesuffix(part)
    experiment = _BY_SPLIT.get(kind.partition("_")[0], kind)
    if experiment not in shipped_experiments():
        known = ", ".join(shipped_experiments())
        raise UsageError(f"no experiment belongs to split '{split}': give --experiment ({known})")
    return experiment


def ablated_experiment(split: str) -> str:
    """Returns the experiment whose rows an ablation is of where none is named.

    The paper's Tables 5 to 7 are of 36 epochs.

    Raises:
        UsageError: as `experiment_of_split`.
    """
    experiment = experiment_of_split(split)
    return "lvis_r50_36e" if experiment == "lvis_r50_70e" else experiment
