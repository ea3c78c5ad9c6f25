"""From a command's words to a training run: which experiment, which folder."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cache.location import CachePath
from cache.store import open_cache
from dkdetr.engine.pairing import TeacherBuilder
from dkdetr.engine.run_folder import portable_name
from dkdetr.engine.smoke import smoke
from dkdetr.engine.train import TrainRequest, TrainSummary, Watch, train
from dkdetr.errors import UsageError
from dkdetr.experiment_file import config_hash, load_experiment, shipped_experiments

_BY_SPLIT = {"lvis": "lvis_r50_70e", "ovcoco": "ovcoco_r50"}


@dataclass(frozen=True, kw_only=True)
class StartOptions:
    """What a start may ask for beside its settings; see `TrainRequest`."""

    start_from: Path | None = None
    until_epoch: int | None = None
    smoke: bool = False
    deterministic: bool = False
    watch: Watch = field(default_factory=Watch)
    build_teacher: TeacherBuilder | None = None


_PLAIN = StartOptions()


def start_training(
    cache: CachePath,
    experiment: str | None,
    overrides: Sequence[str],
    run: Path | None,
    data_root: Path,
    device: str,
    options: StartOptions = _PLAIN,
) -> TrainSummary:
    """Returns the finished run of an experiment on a cache.

    Args:
        cache: a sealed cache, or an export of one.
        experiment: a shipped name or a file; None: the one that belongs to the cache's split.
        overrides: `a.b=c` settings.
        run: the folder; None: runs/EXPERIMENT-HASH.
        data_root: where the split's pictures lie.
        device: see `dkdetr.engine.distributed.pick_device`.
        options: the rest.
    """
    if experiment is None:
        experiment = experiment_of_split(open_cache(cache).info.split)
    config = load_experiment(experiment, overrides).config
    folder = run or Path("runs") / f"{portable_name(config.name)}-{config_hash(config)}"
    request = TrainRequest(
        cache,
        config,
        folder,
        data_root,
        device,
        start_from=options.start_from,
        until_epoch=options.until_epoch,
        deterministic=options.deterministic,
        watch=options.watch,
        build_teacher=options.build_teacher,
    )
    return smoke(request) if options.smoke else train(request)


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
