"""Where a run's figures go: its diary, and the trackers that are asked for."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from dkdetr.config import ExperimentConfig
from dkdetr.engine.metric_log import MetricLog, Values
from dkdetr.engine.run_folder import RunFolder
from dkdetr.engine.trackers import Tracker, TrackerName, open_trackers


class RunDiary:
    """Tells the same line to all of them; without a log, as on all ranks but the first, to none."""

    def __init__(self, log: MetricLog | None = None, trackers: Sequence[Tracker] = ()) -> None:
        self._log, self._trackers = log, trackers

    def write(self, kind: str, iteration: int, values: Values) -> None:
        """Adds one line; trackers plot numbers, and are told nothing else of it."""
        if self._log is None:
            return
        self._log.write(kind, iteration, values)
        figures = {
            name: value
            for name, value in values.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        for tracker in self._trackers:
            tracker.write(iteration, figures)


@contextmanager
def open_diary(
    folder: RunFolder,
    trackers: Sequence[TrackerName],
    config: ExperimentConfig,
    *,
    after_iteration: int,
) -> Iterator[RunDiary]:
    """Yields the diary of a run that goes on behind an iteration; closed at the end.

    Raises:
        UsageError: a tracker's library is not installed; names the command.
    """
    with ExitStack() as closing:
        log = MetricLog(folder.metrics, after_iteration=after_iteration)
        closing.callback(log.close)
        opened = open_trackers(trackers, folder.path, config, after_iteration=after_iteration)
        yield RunDiary(log, closing.enter_context(opened))
