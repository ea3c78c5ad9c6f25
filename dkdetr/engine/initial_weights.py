"""A training's start from a student file instead of from fresh weights."""

from pathlib import Path

from dkdetr.data.prompts import readable_name
from dkdetr.data.splits import Split
from dkdetr.errors import DataError
from dkdetr.student.detector import DKDETR
from dkdetr.student_file import StudentFile, load_into, load_student_file

_SHOWN = 3


def start_from_file(student: DKDETR, path: Path, split: Split) -> tuple[str, ...]:
    """Fills a student from a student file; returns what a user should know of it, in lines.

    Raises:
        DataError: no such file, or its detector has seen boxes of OV-COCO's novel classes and the
            split is of that protocol.
        CorruptArtefactError: not a student file, or damaged.
        MismatchError: it does not fit the student.
    """
    file = load_student_file(path)
    seen = boxes_seen(file, split)
    if seen is not None and split.protocol == "ovcoco":
        raise DataError(
            f"'{path}' has seen {seen}: a student that starts from it cannot be scored on "
            "OV-COCO's novel classes. Start from a backbone alone"
        )
    lines: list[str] = []
    if seen is not None:
        lines.append(
            f"LEAK: '{path}' has seen {seen}: the run is marked, and its scores on novel names "
            "compare with no other's"
        )
    fresh = load_into(path, file, student)
    if fresh:
        rooms = ", ".join(dict.fromkeys(name.partition(".")[0] for name in fresh))
        lines.append(f"start: {len(fresh)} tensors are fresh, '{path}' has none for them: {rooms}")
    return tuple(lines)


def boxes_seen(file: StudentFile, split: Split) -> str | None:
    """Returns whose boxes a file's weights have learned that the split calls novel, or None.

    A foreign detector is taken at its word; of a student of ours the names it was trained on are
    compared (as `pipeline.leaks` does of proposals). No novel box is looked at.
    """
    novel = {readable_name(each.name) for each in split.categories if not each.is_base}
    stated = file.provenance.get("saw_boxes_of")
    if not novel:
        return None
    if stated is not None:
        return str(stated)
    if file.vocabulary is None or file.provenance.get("train_split") is None:
        return None  # a backbone
    learned = sorted(novel & {readable_name(name) for name in file.vocabulary.base().names})
    if not learned:
        return None
    shown = ", ".join(learned[:_SHOWN]) + (", ..." if len(learned) > _SHOWN else "")
    return f"boxes of {len(learned)} of the novel classes ({shown})"


def boxes_seen_before(path: str | None, split: Split) -> str | None:
    """Returns `boxes_seen` of the file that an experiment starts from; None if it names none."""
    return None if path is None else boxes_seen(load_student_file(Path(path)), split)
