"""What `dkdetr serve` shows, put together from runs, a cache and the teacher's text tower."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cache.spec import CacheError
from dkdetr.data.vocabulary import load_vocabulary
from dkdetr.defaults import DEFAULT_THRESHOLD
from dkdetr.encoders import TextEncoder
from dkdetr.engine.distributed import pick_device
from dkdetr.engine.metric_log import read_metrics
from dkdetr.engine.run_folder import RUNS, RunFolder, newest_run
from dkdetr.engine.run_titles import titled
from dkdetr.engine.subject import Subject, load_subject
from dkdetr.errors import DataError, DkdetrError, UsageError
from dkdetr.inference.hub import student_place
from dkdetr.inference.picture_sources import PICTURE_SUFFIXES
from dkdetr.inference.predict import DKDETR
from dkdetr.inference.serve import ServedParts
from pipeline.browse import CacheBrowser
from pipeline.teacher import load_teacher

_MAX_EXAMPLES = 24


@dataclass(frozen=True)
class PageRequest:
    """What to show.

    Args:
        runs: a run, a checkpoint, a student file or `owner/name` on the hub, whose student looks
            at pictures; behind it further runs, or checkpoints of theirs, whose curves are drawn
            beside the first one's, if it has any. None: the newest run below `runs/`, if any.
        cache: a sealed cache with neighbour lists.
        vocabulary: a vocabulary file instead of the student's own names.
        teacher: the text tower for words; None: the one the student learned from.
        pictures: a folder of pictures to try.
        threshold: the least score that the page begins with, of all names; None: a name's own
            in the vocabulary, else 0.3.
        report: a page that `dkdetr report` or the demo wrote; None: RUN/report.html.
        data_root: where the cache's pictures lie.
        device: see `pick_device`.
    """

    runs: Sequence[Path] = ()
    cache: Path | None = None
    vocabulary: Path | None = None
    teacher: str | None = None
    pictures: Path | None = None
    threshold: float | None = None
    report: Path | None = None
    data_root: Path = Path("data")
    device: str = "auto"


def open_page(request: PageRequest) -> ServedParts:
    """Returns the page's parts; everything that can fail fails here, not under a visitor.

    Raises:
        UsageError: options of a student, and none is served; a place behind the first that is no
            run.
        DataError: nothing to show, or a run, a cache or pictures that are not there.
        CacheError: a cache that cannot be shown.
        MismatchError: words of another teacher than the student's.
    """
    newest = newest_run(RUNS)
    runs = tuple(request.runs) or ((newest,) if newest is not None else ())
    if not runs and request.cache is None:
        raise DataError("nothing to show: name a run (dkdetr serve RUN) or a cache (--cache PATH)")
    of_a_student = {
        "--vocab": request.vocabulary,
        "--teacher": request.teacher,
        "--pictures": request.pictures,
    }
    if not runs and (given := [word for word, value in of_a_student.items() if value]):
        raise UsageError(f"{', '.join(given)}: no student is served; name a run (dkdetr serve RUN)")
    diaries = _diaries(runs)
    about: dict[str, str] = {}
    detector, problem = None, ""
    if runs:
        detector, problem = _load_student(runs[0], request, about)
    browse = None
    if request.cache is not None:
        browse = CacheBrowser(request.cache, request.data_root)
        about["cache"] = str(request.cache)

    def histories() -> Mapping[str, Sequence[Mapping[str, Any]]]:
        return {name: read_metrics(path) for name, path in diaries.items()}

    report = request.report or (runs[0] / "report.html" if runs else None)
    return ServedParts(
        about=about,
        detector=detector,
        words_problem=problem,
        cache_page=(lambda images: browse.page(images, served=True).html) if browse else None,
        histories=histories if diaries else None,
        report=report if report is not None and report.is_file() else None,
        examples=_examples(request.pictures),
        threshold=DEFAULT_THRESHOLD if request.threshold is None else request.threshold,
    )


def _diaries(places: Sequence[Path]) -> dict[str, Path]:
    """Returns each run's diary by the run's title: what curves are drawn of.

    Raises:
        UsageError: a place behind the first, which may be a student alone, is no run.
    """
    runs: list[RunFolder] = []
    for place in places:
        run = RunFolder.of_checkpoint(place) if place.suffix == ".pt" else RunFolder(place)
        if run.metrics.is_file() or run.config.is_file():  # a run that begins has no diary yet
            runs.append(run)
        elif place != places[0]:
            raise UsageError(
                f"'{place}' is no run: of what stands behind the first, '{places[0]}', curves are "
                "drawn, and only runs have them; name a run's folder, or leave it out"
            )
    return {title: RunFolder(path).metrics for path, title in titled([run.path for run in runs])}


def _load_student(run: Path, request: PageRequest, about: dict[str, str]) -> tuple[DKDETR, str]:
    """Returns the student and why it cannot be asked for words ('' if it can)."""
    given = load_vocabulary(request.vocabulary) if request.vocabulary else None
    subject = load_subject(student_place(run), given)
    device = pick_device(request.device)
    encoder, problem = _text_encoder(subject, request.teacher, device)
    own = DKDETR(
        subject.student, subject.config, subject.vocabulary, text_encoder=encoder, device=device
    )
    looked_for = own.resolve(given)
    if request.threshold is not None:
        looked_for = replace(looked_for, thresholds={})
    if encoder is not None:
        own.resolve(own.vocabulary.names[:1])  # another teacher's words fail here
    detector = DKDETR(
        subject.student, subject.config, looked_for, text_encoder=encoder, device=device
    )
    about["student"] = f"{subject.path} on {device}"
    about["teacher"] = subject.vocabulary.teacher
    if subject.provenance.get("random_teacher"):
        about["warning"] = "random teacher: this student learned from random embeddings"
    return detector, problem


def _text_encoder(
    subject: Subject, teacher: str | None, device: torch.device
) -> tuple[TextEncoder | None, str]:
    """Returns the text tower, or None and why; one that was asked for must be there."""
    if teacher is not None:
        return load_teacher(teacher, device), ""
    spec = subject.provenance.get("teacher_spec")
    if spec is None:
        return None, "the student does not say whose text tower it learned from (--teacher)."
    try:
        return load_teacher(spec, device), ""
    except (DkdetrError, CacheError) as error:
        return None, str(error)


def _examples(folder: Path | None) -> tuple[Path, ...]:
    if folder is None:
        return ()
    if not folder.is_dir():
        raise DataError(f"no folder of pictures '{folder}'")
    found = sorted(p for p in folder.iterdir() if p.suffix.lower() in PICTURE_SUFFIXES)
    if not found:
        raise DataError(f"the folder '{folder}' holds no picture")
    return tuple(found[:_MAX_EXAMPLES])
