"""From an uploaded picture and words to boxes, as plain data; limits are checked first."""

from functools import lru_cache
from pathlib import Path
from typing import Any

from dkdetr.data.image_files import decode_upright
from dkdetr.data.vocabulary import Vocabulary
from dkdetr.errors import UsageError
from dkdetr.inference.predict import DKDETR

MAX_UPLOAD_BYTES = 32 * 2**20
MAX_WORDS_LENGTH = 2_000
MAX_NAMES = 200
LEAST_SCORE = 0.01
"""The page's slider hides boxes; below this score none is sent to it."""
MAX_BOXES = 300
_VOCABULARIES_KEPT = 16


class Finder:
    """Answers for one student; not for several threads at once.

    Args:
        detector: the student; with a text encoder if words may be typed.
    """

    def __init__(self, detector: DKDETR) -> None:
        self._detector = detector
        self._vocabulary = lru_cache(maxsize=_VOCABULARIES_KEPT)(self._embed)

    @property
    def own_names(self) -> tuple[str, ...]:
        """The names that are looked for where no words are given."""
        return self._detector.vocabulary.names

    def find(self, data: bytes, words: str) -> dict[str, Any]:
        """Returns what was found in an encoded picture, best first.

        Width, height and boxes are those of the picture upright; `orientation` is EXIF's, 1 to 8,
        by which the page turns what it shows. `least` is the threshold of a name that has one of
        its own, by which the page goes until its slider is moved.

        Args:
            data: a JPEG, PNG, WebP or BMP.
            words: names parted by commas or lines; none: the student's own names.

        Raises:
            UsageError: too many words, or none can be looked for.
            DataError: not a picture, damaged, or of too many pixels.
        """
        vocabulary = self._vocabulary(words_of(words))
        pixels, orientation = decode_upright(data, Path("the upload"))
        (found,) = self._detector.predict(
            pixels, vocabulary, threshold=LEAST_SCORE, max_detections=MAX_BOXES
        )
        least = {name: {"least": value} for name, value in vocabulary.thresholds.items()}
        boxes = [
            {"name": name, "score": round(float(score), 4), "box": [round(v, 1) for v in box]}
            | least.get(name, {})
            for name, score, box in zip(
                found.names, found.scores, found.boxes_xyxy.tolist(), strict=True
            )
        ]
        height, width = pixels.shape[:2]
        return {
            "width": width,
            "height": height,
            "orientation": orientation,
            "names": len(vocabulary),
            "boxes": boxes,
        }

    def _embed(self, words: tuple[str, ...]) -> Vocabulary:
        return self._detector.resolve(words or None)


def words_of(text: str) -> tuple[str, ...]:
    """Returns the names in a text, each once, in their order.

    Raises:
        UsageError: more than the page takes.
    """
    if len(text) > MAX_WORDS_LENGTH:
        raise UsageError(f"{len(text):,} characters of words: at most {MAX_WORDS_LENGTH:,}")
    parts = (" ".join(part.split()) for line in text.splitlines() for part in line.split(","))
    names = tuple(dict.fromkeys(part for part in parts if part))
    if len(names) > MAX_NAMES:
        raise UsageError(f"{len(names)} names: at most {MAX_NAMES} on the page")
    return names
