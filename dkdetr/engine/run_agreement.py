"""`dkdetr eval --agreement CACHE`: a run's agreement with the teacher, kept in its folder."""

import json
import sys
from pathlib import Path
from typing import Any

from cache.location import CachePath
from cache.store import open_cache
from dkdetr.atomic_file import write_text
from dkdetr.data.splits import load_split
from dkdetr.engine.distributed import pick_device
from dkdetr.engine.evaluate_run import with_batch_size
from dkdetr.engine.subject import load_subject
from dkdetr.errors import CorruptArtefactError
from dkdetr.evaluation.agreement_pass import measure_agreement
from dkdetr.evaluation.teacher_agreement import TeacherAgreement

_FILE = "agreement.json"


def measure_run_agreement(
    run: Path, cache: CachePath, data_root: Path, device: str, batch_size: int | None = None
) -> list[TeacherAgreement]:
    """Returns a run's agreement on the images of a cache; leaves it in the run's `eval/` folder.

    Held-out images are those of a cache of another split than the run was trained on; on its own
    training images the result says so. `batch_size` images at once; None: the run's own.

    Raises:
        MismatchError: the cache is another teacher's.
    """
    subject = load_subject(run)
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
    measured = measure_agreement(
        subject.student.to(on),
        load_split(reader.info.split, data_root),
        reader,
        with_batch_size(subject.config, batch_size),
        device=on,
        held_out=held_out,
    )
    described = [each.as_json() for each in measured]
    write_text(subject.folder / "eval" / _FILE, json.dumps(described, indent=2) + "\n")
    return measured


def read_agreement(run: Path) -> list[TeacherAgreement]:
    """Returns what was measured of a run, nothing if it was not."""
    path = run / "eval" / _FILE
    if not path.is_file():
        return []
    try:
        described: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
        return [TeacherAgreement.from_json(each) for each in described]
    except (ValueError, TypeError, KeyError) as error:
        raise CorruptArtefactError(f"'{path}' is damaged: {error}; measure it again") from None
