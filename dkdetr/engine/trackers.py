"""The same figures for other eyes than the diary's: TensorBoard, trackio, wandb."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from dkdetr.config import ExperimentConfig
from dkdetr.errors import UsageError
from dkdetr.experiment_file import config_to_dict

TrackerName = Literal["tensorboard", "trackio", "wandb"]


@runtime_checkable
class Tracker(Protocol):
    """Takes numbers by iteration."""

    def write(self, iteration: int, values: Mapping[str, float]) -> None:
        """Takes the figures of one line of the diary."""
        ...

    def close(self) -> None:
        """Ends the record."""
        ...


class TensorBoard:
    """Writes event files into RUN/tensorboard; what a resumed run repeats is dropped there."""

    def __init__(self, run: Path, *, after_iteration: int) -> None:
        module = _library("torch.utils.tensorboard", "tensorboard")
        folder = str(run / "tensorboard")
        self._writer = module.SummaryWriter(folder, purge_step=after_iteration + 1)

    def write(self, iteration: int, values: Mapping[str, float]) -> None:
        """Takes the figures of one line of the diary."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, iteration)
        self._writer.flush()

    def close(self) -> None:
        """Ends the record."""
        self._writer.close()


class RunTracker:
    """A library with `init`, `log` and `finish`: trackio (on this machine) or wandb."""

    def __init__(self, name: str, run: Path, config: ExperimentConfig) -> None:
        self._library = _library(name, name)
        self._library.init(project="dkdetr", name=run.name, config=config_to_dict(config))

    def write(self, iteration: int, values: Mapping[str, float]) -> None:
        """Takes the figures of one line of the diary."""
        self._library.log({**values, "iteration": iteration})

    def close(self) -> None:
        """Ends the record."""
        self._library.finish()


@contextmanager
def open_trackers(
    names: Sequence[TrackerName], run: Path, config: ExperimentConfig, *, after_iteration: int
) -> Iterator[list[Tracker]]:
    """Yields the named trackers; they are closed at the end.

    Raises:
        UsageError: a library is not installed; names the command.
    """
    with ExitStack() as open_ones:
        trackers: list[Tracker] = []
        for name in names:
            if name == "tensorboard":
                tracker: Tracker = TensorBoard(run, after_iteration=after_iteration)
            else:
                tracker = RunTracker(name, run, config)
            open_ones.callback(tracker.close)
            trackers.append(tracker)
        yield trackers


def _library(module: str, package: str) -> Any:
    try:
        return import_module(module)
    except ImportError:
        raise UsageError(
            f"{package} is not installed: pip install {package} (the diary metrics.jsonl holds the "
            "same figures without it)"
        ) from None
