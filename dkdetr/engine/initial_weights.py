"""A training's start from a student file instead of from fresh weights."""

from pathlib import Path

from dkdetr.data.splits import Split
from dkdetr.errors import DataError
from dkdetr.student.detector import DKDETR
from dkdetr.student_file import load_into, load_student_file


def start_from_file(student: DKDETR, path: Path, split: Split) -> tuple[str, ...]:
    """Fills a student from a student file; returns the names that keep their fresh start.

    Raises:
        DataError: no such file, or its detector has seen boxes of the split's novel classes.
        CorruptArtefactError: not a student file, or damaged.
        MismatchError: it does not fit the student.
    """
    file = load_student_file(path)
    if split.protocol == "ovcoco":
        seen = file.provenance.get("saw_boxes_of")
        trained_on = file.provenance.get("train_split")
        if seen is None and trained_on is not None and not trained_on.startswith("ovcoco"):
            seen = f"'{trained_on}'"
        if seen is not None:
            raise DataError(
                f"'{path}' has seen {seen}: a student that starts from it cannot be scored on "
                "OV-COCO's novel classes. Start from a backbone alone"
            )
    return load_into(path, file, student)
