"""A training's start from a student file instead of from fresh weights."""

from pathlib import Path

from dkdetr.data.prompts import readable_name
from dkdetr.data.splits import Split
from dkdetr.engine.run_folder import RunFolder
from dkdetr.errors import DataError
from dkdetr.student.detector import DKDETR
from dkdetr.student_file import StudentFile, load_into

_SHOWN = 3


def start_from_file(
    student: DKDETR, path: Path, file: StudentFile, split: Split
) -> tuple[str, ...]:
    """Fills a student from what a student file holds; returns what a user should know, in lines.

    Raises:
        DataError: its detector has seen boxes of OV-COCO's novel classes and the split is of that
            protocol.
        MismatchError: it does not fit the student.
    """
    seen = boxes_seen(file, split)
    if seen is not None and split.protocol == "ovcoco" and _novel_names(split):
        raise DataError(
            f"'{path}' has seen {seen}: a student that starts from it cannot be scored on "
            "OV-COCO's novel classes. Start from a backbone alone"
        )
    lines = leak_lines(f"'{path}'", seen, split)
    fresh = load_into(path, file, student)
    if fresh:
        rooms = ", ".join(dict.fromkeys(name.partition(".")[0] for name in fresh))
        lines.append(f"start: {len(fresh)} tensors are fresh, '{path}' has none for them: {rooms}")
    return tuple(lines)


def leak_lines(start: str, seen: str | None, split: Split) -> list[str]:
    """Returns a line for the user if what a run began from has seen more than it may.

    Args:
        start: what it began from, as the line calls it.
        seen: the mark (`boxes_seen`); None: it saw nothing it should not.
        split: what is trained on.
    """
    if seen is None or not _novel_names(split):
        return []
    return [
        f"LEAK: {start} has seen {seen}: the run is marked, and its scores on novel names "
        "compare with no other's"
    ]


def boxes_seen(file: StudentFile, split: Split) -> str | None:
    """Returns whose boxes, beyond the split's base ones, a file's weights have learned, or None.

    A file's own mark is kept, whatever it is to be trained on next. Of a student of ours without
    one, the names of its last training are compared (as `pipeline.leaks` does of proposals), and
    for OV-COCO, where names may be spelled otherwise, its split must be of that protocol too. What
    an unmarked file began from in turn is not known. No novel box is looked at.
    """
    stated = file.provenance.get("saw_boxes_of")
    if stated is not None:
        return str(stated)
    trained_on = file.provenance.get("train_split")
    mere_backbone = trained_on is None and file.provenance.get("layout") in (None, "resnet50")
    if file.vocabulary is None or mere_backbone:
        return None
    names = {readable_name(name) for name in file.vocabulary.base().names}
    learned = sorted(_novel_names(split) & names)
    if learned:
        shown = ", ".join(learned[:_SHOWN]) + (", ..." if len(learned) > _SHOWN else "")
        return f"boxes of {len(learned)} of the novel classes ({shown})"
    of_protocol = trained_on is None or trained_on.startswith(("ovcoco", "pictograms"))
    return None if split.protocol != "ovcoco" or of_protocol else f"'{trained_on}'"


def boxes_seen_before(file: StudentFile | None, burn_in: Path | None, split: Split) -> str | None:
    """Returns the mark of a run that starts from a student file, from a burn-in, or from both.

    Args:
        file: what `student.weights` names.
        burn_in: a run's folder or checkpoint, whose `run.json` says what it began from.
        split: what is trained on.
    """
    seen = None if file is None else boxes_seen(file, split)
    if seen is None and burn_in is not None:
        # Not looked for here: a run that goes on from its own checkpoints needs it no more.
        is_file = burn_in.suffix == ".pt"
        run = RunFolder.of_checkpoint(burn_in) if is_file else RunFolder(burn_in)
        seen = run.read_provenance().get("saw_boxes_of")
    return seen


def _novel_names(split: Split) -> set[str]:
    return {readable_name(each.name) for each in split.categories if not each.is_base}
