"""From a command's words to a training run: which experiment, which folder."""

from collections.abc import Sequence
from pathlib import Path

from cache.store import open_cache
from dkdetr.engine.pairing import TeacherBuilder
from dkdetr.engine.train import TrainRequest, TrainSummary, train
from dkdetr.errors import UsageError
from dkdetr.experiment_file import config_hash, load_experiment, shipped_experiments

_BY_SPLIT = {"lvis": "lvis_r50_70e", "ovcoco": "ovcoco_r50"}


def start_training(
    cache: Path,
    experiment: str | None,
    overrides: Sequence[str],
    run: Path | None,
    data_root: Path,
    device: str,
    build_teacher: TeacherBuilder | None = None,
) -> TrainSummary:
    """Returns the finished run of an experiment on a cache.

    Args:
        cache: a sealed cache.
        experiment: a shipped name or a file; None: the one that belongs to the cache's split.
        overrides: `a.b=c` settings.
        run: the folder; None: runs/EXPERIMENT-HASH.
        data_root: where the split's pictures lie.
        device: see `dkdetr.engine.distributed.pick_device`.
        build_teacher: loads a cache's teacher, for `kd.alignment=online`.
    """
    if experiment is None:
        experiment = experiment_of_split(open_cache(cache).info.split)
    config = load_experiment(experiment, overrides).config
    folder = run or Path("runs") / f"{config.name}-{config_hash(config)}"
    return train(TrainRequest(cache, config, folder, data_root, device, build_teacher))


def experiment_of_split(split: str) -> str:
    """Returns the experiment that a cache's split means where none is named.

    Raises:
        UsageError: the split says nothing about it (plain COCO, say).
    """
    kind = split.partition(":")[0].removesuffix("_train").removesuffix("_val")
    experiment = _BY_SPLIT.get(kind.partition("_")[0], kind)
    if experiment not in shipped_experiments():
        known = ", ".join(shipped_experiments())
        raise UsageError(f"no experiment belongs to split '{split}': give --experiment ({known})")
    return experiment
