"""`dkdetr eval --agreement CACHE`: a run's agreement with the teacher, kept in its folder."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from cache.location import CachePath
from cache.store import open_cache
from dkdetr.atomic_file import write_text
from dkdetr.config import Precision
from dkdetr.data.cached_split import load_cached_split
from dkdetr.engine.distributed import num_ranks, pick_device
from dkdetr.engine.evaluate_run import with_batch_size, with_precision
from dkdetr.engine.run_folder import RunFolder
from dkdetr.engine.subject import load_subject
from dkdetr.errors import CorruptArtefactError, UsageError
from dkdetr.evaluation.agreement_pass import measure_agreement
from dkdetr.evaluation.teacher_agreement import TeacherAgreement

_FILE = "agreement.json"


def measure_run_agreement(
    run: Path,
    cache: CachePath,
    data_root: Path,
    device: str,
    batch_size: int | None = None,
    *,
    averaged: bool = False,
    precision: Precision | None = None,
) -> list[TeacherAgreement]:
    """Returns a run's agreement on the images of a cache; leaves it in the run's `eval/SPLIT/`.

    Held-out images are those of a cache of another split than the run was trained on; on its own
    training images the result says so.

    Args:
        run: a run, a checkpoint or a student file.
        cache: sealed, of the run's teacher; its split names the folder.
        data_root: where the cache's pictures lie.
        device: see `pick_device`.
        batch_size: images at once; None: the run's own.
        averaged: measures the average of the weights; the folder is `eval/SPLIT-ema/`.
        precision: None: the run's own, `optim.precision`.

    Raises:
        MismatchError: the cache is another teacher's.
        UsageError: an average is asked for and there is none; or there are several ranks.
    """
    if num_ranks() > 1:
        raise UsageError("--agreement takes one process: start it without torchrun")
    subject = load_subject(run, averaged=averaged)
    reader = open_cache(cache)
    subject.vocabulary.require_teacher(reader.info.teacher, f"the cache {cache} was")
    # A shared file names a split of one's own without its folders; the fingerprint stays.
    own_cache = subject.provenance.get("cache_fingerprint") == reader.info.fingerprint
    held_out = reader.info.split != subject.train_split and not own_cache
    if not held_out:
        print(
            f"note: {cache} holds the student's own training images: not a measure of what is new "
            "to it; a cache of the validation split would be",
            file=sys.stderr,
        )
    on = pick_device(device)
    config = with_batch_size(with_precision(subject.config, precision), batch_size)
    weights = subject.scored(subject.vocabulary, "own", config.optim.precision)
    found = measure_agreement(
        subject.student.to(on),
        load_cached_split(reader.info.split, data_root),
        reader,
        config,
        device=on,
        held_out=held_out,
    )
    measured = [replace(each, weights=weights) for each in found]
    described = [each.as_json() for each in measured]
    folder = RunFolder(subject.folder).evaluation(reader.info.split, averaged=averaged)
    write_text(folder / _FILE, json.dumps(described, indent=2) + "\n")
    return measured


def read_agreement(
    run: Path, split: str, *, averaged: bool = False, weights: str | None = None
) -> list[TeacherAgreement]:
    """Returns what was measured of a run on one cache, nothing if nothing was.

    Of several caches' the one on `split`, else another one on held-out images, else on the
    training's; before all these, one of the weights with the hash `weights`.
    """
    folders = RunFolder(run).evaluations(averaged=averaged)
    paths = [path / _FILE for path in folders]
    if not averaged:
        paths.append(run / "eval" / _FILE)  # where runs of before have theirs
    found = [measured for path in paths if path.is_file() and (measured := _read(path))]

    def fits(measured: list[TeacherAgreement]) -> tuple[bool, bool, bool]:
        first = measured[0]
        own = first.weights is not None and first.weights.xxh3_128 == weights
        return own, first.split == split, first.held_out

    return max(found, key=fits, default=[])


def _read(path: Path) -> list[TeacherAgreement]:
    try:
        described: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
        return [TeacherAgreement.from_json(each) for each in described]
    except (ValueError, TypeError, KeyError) as error:
        raise CorruptArtefactError(f"'{path}' is damaged: {error}; measure it again") from None
