"""Predictions on disk: annotated pictures, one COCO document, one CSV."""

import csv
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import tee
from pathlib import Path
from typing import Any

from dkdetr.atomic_file import atomic_file, write_text
from dkdetr.data.vocabulary import Vocabulary
from dkdetr.errors import UsageError
from dkdetr.inference.picture_sources import NamedPicture
from dkdetr.inference.predict import DKDETR
from dkdetr.inference.prediction import Prediction
from dkdetr.progress import progress
from dkdetr.run_lengths import areas

_COLUMNS = ("file", "name", "score", "category_id", "left", "top", "right", "bottom")
_MOST_NAMES = 6


@dataclass(frozen=True)
class PredictionSummary:
    """How many of what were found, and where the files lie."""

    pictures: int
    detections: int
    by_name: Mapping[str, int]
    per_picture: tuple[tuple[str, str], ...]
    """(file, names and counts) of each picture."""
    files: Mapping[str, str]

    def lines(self) -> list[str]:
        """Returns a short table for people."""
        width = max((len(name) for name, _ in self.per_picture), default=0)
        table = [f"{name:{width}s}  {found}" for name, found in self.per_picture]
        total = _so_far(self.detections, self.pictures)
        return [*table, total, *(f"{kind}: {path}" for kind, path in self.files.items())]

    def as_json(self) -> dict[str, Any]:
        """Returns the counts and paths as a plain table."""
        return {
            "pictures": self.pictures,
            "detections": self.detections,
            "by_name": dict(self.by_name),
            "files": dict(self.files),
        }


def require_sources_apart(sources: Iterable[Path], out: Path) -> None:
    """Refuses to draw in a folder where a source lies; called before anything is written.

    A drawing is called after its picture, `a.jpg` of `a.jpg` and of `a.png`: in the pictures' own
    folder it would replace one, asked for or not.

    Args:
        sources: the pictures and videos.
        out: the folder for the drawings.

    Raises:
        UsageError: a source lies there, links followed.
    """
    folder = out.resolve()
    for source in sources:
        # By its own place and, of a link, by that of the file it leads to.
        if folder in (source.parent.resolve(), source.resolve().parent):
            raise UsageError(
                f"'{source}' lies in '{out}', where drawings would replace pictures: give another "
                "folder with --out, or --no-draw"
            )


def predict_to_folder(
    detector: DKDETR,
    pictures: Iterable[NamedPicture],
    vocabulary: Vocabulary,
    out: Path,
    *,
    num_files: int,
    draw: bool = True,
    **options: Any,
) -> PredictionSummary:
    """Writes predictions.json (a COCO document), predictions.csv and the pictures; returns counts.

    Both call the pictures by their names. Drawings of equal stems are told apart by numbers; which
    is whose, `drawing` of the document's images says.

    Args:
        detector: the student.
        pictures: as they come; one batch is held at a time.
        vocabulary: what to look for.
        out: the folder, made if need be; files of the same names are replaced.
        num_files: how many the pictures are of, for the progress on stderr.
        draw: whether to write annotated pictures.
        options: of `DKDETR.stream`.
    """
    out.mkdir(parents=True, exist_ok=True)
    named, handed_on = tee(pictures)
    found = detector.stream((each.pixels for each in handed_on), vocabulary, **options)
    document = _Document(vocabulary)
    counts: Counter[str] = Counter()
    table: list[tuple[str, str]] = []
    drawings: set[str] = set()
    with (
        progress("predict, files", num_files) as advance,
        atomic_file(out / "predictions.csv") as raw,
    ):
        rows = csv.writer(_Utf8(raw), lineterminator="\n")
        rows.writerow(_COLUMNS)
        for each, prediction in zip(named, found, strict=True):
            name = each.name
            rows.writerows(
                [name, *(row[key] for key in _COLUMNS[1:])] for row in prediction.to_rows()
            )
            drawing = _drawing_name(name, drawings) if draw else None
            if drawing is not None:
                picture = prediction.plot()
                with atomic_file(out / drawing) as file:
                    picture.save(file, format="JPEG", quality=92)
            document.add(name, prediction, drawing)
            own = Counter(prediction.names)
            counts += own
            table.append((name, _described(own)))
            advance(each.files_done, _so_far(counts.total(), len(table)))
        advance(num_files, _so_far(counts.total(), len(table)))
        # The table gets its name last: where it is new, the document is.
        write_text(out / "predictions.json", json.dumps(document.content))
    files = {"json": str(out / "predictions.json"), "csv": str(out / "predictions.csv")}
    if draw:
        files["pictures"] = str(out)
    return PredictionSummary(
        pictures=len(table),
        detections=counts.total(),
        by_name=dict(counts.most_common()),
        per_picture=tuple(table),
        files=files,
    )


class _Document:
    """A COCO data set whose annotations carry scores."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        names = zip(vocabulary.category_ids, vocabulary.names, strict=True)
        self.content: dict[str, list[dict[str, Any]]] = {
            "images": [],
            "annotations": [],
            "categories": [{"id": number, "name": name} for number, name in names],
        }

    def add(self, name: str, prediction: Prediction, drawing: str | None) -> None:
        image_id = len(self.content["images"]) + 1
        height, width = prediction.image.shape[:2]
        image = {"id": image_id, "file_name": name, "height": height, "width": width}
        self.content["images"].append(image | ({"drawing": drawing} if drawing else {}))
        for record in prediction.to_coco(image_id):
            number = len(self.content["annotations"]) + 1
            area = _area(record)
            self.content["annotations"].append({"id": number, **record, "area": area, "iscrowd": 0})


def _area(record: Mapping[str, Any]) -> float:
    if "segmentation" in record:
        return float(areas([record["segmentation"]])[0])
    return record["bbox"][2] * record["bbox"][3]


class _Utf8:
    """The text face of a binary file, for the csv module."""

    def __init__(self, raw: Any) -> None:
        self._raw = raw

    def write(self, text: str) -> None:
        self._raw.write(text.encode())


def _drawing_name(name: str, taken: set[str]) -> str:
    """Returns the file name of a picture's drawing, with a number where its stem is `taken`."""
    stem, number = Path(name).stem, 2
    free = stem
    while free in taken:
        free, number = f"{stem}-{number}", number + 1
    taken.add(free)
    return f"{free}.jpg"


def _so_far(num_boxes: int, num_pictures: int) -> str:
    pictures = "picture" if num_pictures == 1 else "pictures"
    return f"{num_boxes} boxes in {num_pictures} {pictures}"


def _described(counts: Counter[str]) -> str:
    shown = [f"{count} {name}" for name, count in counts.most_common(_MOST_NAMES)]
    more = len(counts) - _MOST_NAMES
    return ", ".join(shown) + (f" and {more} more names" if more > 0 else "") or "nothing"
