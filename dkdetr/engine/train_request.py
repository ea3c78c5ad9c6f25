"""What is asked of a training, and what else it shows of itself."""

from dataclasses import dataclass, field
from pathlib import Path

from cache.location import CachePath
from dkdetr.config import ExperimentConfig
from dkdetr.engine.pairing import TeacherBuilder
from dkdetr.engine.trackers import TrackerName


@dataclass(frozen=True, kw_only=True)
class Watch:
    """What else a run shows of itself; nothing of it changes what it learns."""

    trackers: tuple[TrackerName, ...] = ()
    pictures_every: int = 0
    """Steps between sample pictures in RUN/pictures; 0 = none."""
    profile_steps: int = 0
    """Profiles so many steps, saves, and ends; 0 = off."""
    eval_every: int = 0
    """Epochs from one scoring to the next, on `eval_split` or the run's validation; 0 = none."""
    eval_split: str | None = None


@dataclass(frozen=True)
class TrainRequest:
    """What to train: a sealed cache, an experiment, and where the run lives."""

    cache: CachePath
    config: ExperimentConfig
    run: Path
    data_root: Path
    device: str = "auto"
    build_teacher: TeacherBuilder | None = None
    """Loads the cache's teacher; called for `kd.alignment = "online"` alone."""
    start_from: Path | None = None
    """A burn-in to begin with (`dkdetr.engine.burn_in`): a checkpoint or a run's folder."""
    until_epoch: int | None = None
    """Ends, saved, before this epoch: how a burn-in to share is made."""
    deterministic: bool = False
    watch: Watch = field(default_factory=Watch)
    image_limit: int | None = None
    """Trains on the first images only."""
    until_iteration: int | None = None
