"""The vocabulary: names, their groups and their text embeddings, as one checked artefact.

Only this file converts between a data set's `category_id` and the contiguous `label`.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from dkdetr.atomic_file import write_bytes
from dkdetr.data.annotations import Category
from dkdetr.data.prompts import fill_prompt, readable_name
from dkdetr.encoders import TextEncoder
from dkdetr.errors import CorruptArtefactError, DataError, MismatchError, UsageError

_NORM_TOLERANCE = 2e-3
_THRESHOLDS_HASH = "thresholds_hash"
_FIELDS = ("names", "category_ids", "is_base", "frequencies", "prompts", "teacher")


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Category i has names[i], category_ids[i], ... and the unit vector embeddings[i].

    `prompts` are the templates whose embeddings were averaged, `teacher` the identity of the text
    encoder; `frequencies` are LVIS's r, c, f, and '' where unknown. `thresholds` are the least
    scores that `predict` shows of some names, no part of the hash: they change nothing of what a
    student is asked, nor of its scores.

    Raises:
        DataError: the parts differ in length, an id occurs twice, a row is not of unit norm, or a
            threshold is no score or of a name that is not there.
    """

    names: tuple[str, ...]
    category_ids: tuple[int, ...]
    is_base: tuple[bool, ...]
    frequencies: tuple[str, ...]
    prompts: tuple[str, ...]
    teacher: str
    embeddings: Float[np.ndarray, "num_classes embed_dim"]
    thresholds: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        lengths = {len(self.names), len(self.category_ids), len(self.is_base)}
        if lengths | {len(self.frequencies), len(self.embeddings)} != {len(self.names)}:
            raise DataError("a vocabulary's names, ids, groups and embeddings differ in number")
        if self.embeddings.dtype != np.float32 or self.embeddings.ndim != 2:
            raise DataError("a vocabulary's embeddings are float32 rows, one a name")
        if len(set(self.category_ids)) != len(self.category_ids):
            raise DataError("a category_id occurs twice in a vocabulary")
        if strange := sorted(self.thresholds.keys() - set(self.names)):
            raise DataError(f"a vocabulary has a threshold of '{strange[0]}', but no such name")
        if not all(0 <= least <= 1 for least in self.thresholds.values()):
            raise DataError("a vocabulary's thresholds are scores: they lie in 0..1")
        norms = np.linalg.norm(self.embeddings.astype(np.float64), axis=1)
        bad = np.flatnonzero(~(np.abs(norms - 1) <= _NORM_TOLERANCE))
        if len(bad):
            first = int(bad[0])
            raise DataError(
                f"{len(bad)} text embeddings are not of unit norm; the first is "
                f"'{self.names[first]}' with {norms[first]:.4g}"
            )

    def __len__(self) -> int:
        return len(self.names)

    @property
    def embed_dim(self) -> int:
        """The length of a text embedding."""
        return self.embeddings.shape[1]

    def base(self) -> "Vocabulary":
        """Returns the base rows only, in the same order: all that training may see."""
        return self._rows([i for i, is_base in enumerate(self.is_base) if is_base])

    def _rows(self, rows: Sequence[int]) -> "Vocabulary":
        names = tuple(self.names[i] for i in rows)
        return Vocabulary(
            names=names,
            category_ids=tuple(self.category_ids[i] for i in rows),
            is_base=tuple(self.is_base[i] for i in rows),
            frequencies=tuple(self.frequencies[i] for i in rows),
            prompts=self.prompts,
            teacher=self.teacher,
            embeddings=self.embeddings[list(rows)],
            thresholds={name: self.thresholds[name] for name in names if name in self.thresholds},
        )

    @cached_property
    def _labels(self) -> dict[int, int]:
        return {category_id: label for label, category_id in enumerate(self.category_ids)}

    def label_of(self, category_id: int) -> int:
        """Returns the row of a data set's category id; raises DataError if it has none."""
        label = self._labels.get(category_id)
        if label is None:
            raise DataError(f"category id {category_id} is not in the vocabulary")
        return label

    def category_id_of(self, label: int) -> int:
        """Returns the data set's category id of a row."""
        return self.category_ids[label]

    def require_space_of(self, student: "Vocabulary", named: str, remedy: str = "") -> None:
        """Returns if a student that learned from another vocabulary understands this one.

        Raises:
            MismatchError: another teacher's, or not as wide; its sentence begins with `named`.
        """
        student.require_teacher(self.teacher, named, remedy)
        if self.embed_dim != student.embed_dim:
            raise MismatchError(
                f"{named} embedded in {self.embed_dim} numbers, the student's names in "
                f"{student.embed_dim}, though both are said to be {self.teacher}'s"
            )

    def require_teacher(self, teacher: str, named: str, remedy: str = "") -> None:
        """Returns if the student that learned from this vocabulary understands a teacher.

        Raises:
            MismatchError: it learned from another; `named` begins its sentence, `remedy` ends it.
        """
        if teacher != self.teacher:
            ending = f"; {remedy}" if remedy else ""
            raise MismatchError(
                f"{named} embedded by {teacher}, the student learned from {self.teacher}: "
                f"their spaces have nothing in common{ending}"
            )

    @cached_property
    def hash(self) -> str:
        """64 hex digits that change with any name, group, prompt, teacher or embedding."""
        digest = hashlib.sha256(_canonical(self._asked()).encode())
        digest.update(np.ascontiguousarray(self.embeddings, dtype="<f4").tobytes())
        return digest.hexdigest()

    def _asked(self) -> dict[str, Any]:
        listed = {name: getattr(self, name) for name in _FIELDS}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in listed.items()
        }

    def metadata(self) -> dict[str, Any]:
        """Returns all but the embeddings, as plain JSON values; thresholds where there are any."""
        return self._asked() | ({"thresholds": dict(self.thresholds)} if self.thresholds else {})


def from_metadata(
    metadata: Mapping[str, Any], embeddings: Float[np.ndarray, "num_classes embed_dim"]
) -> Vocabulary:
    """Returns the vocabulary that `Vocabulary.metadata` and its embeddings describe.

    Raises:
        DataError: a part is missing or malformed.
    """
    try:
        return Vocabulary(
            names=tuple(str(name) for name in metadata["names"]),
            category_ids=tuple(int(number) for number in metadata["category_ids"]),
            is_base=tuple(bool(flag) for flag in metadata["is_base"]),
            frequencies=tuple(str(group) for group in metadata["frequencies"]),
            prompts=tuple(str(prompt) for prompt in metadata["prompts"]),
            teacher=str(metadata["teacher"]),
            embeddings=np.ascontiguousarray(embeddings, dtype=np.float32),
            thresholds={
                str(name): float(least)
                for name, least in dict(metadata.get("thresholds", {})).items()
            },
        )
    except KeyError as error:
        raise DataError(f"a vocabulary's description lacks {error}") from None
    except TypeError as error:
        raise DataError(f"a vocabulary's description is malformed: {error}") from None


def build_vocabulary(
    categories: Sequence[Category],
    prompts: Sequence[str],
    encoder: TextEncoder,
    *,
    synonyms: Mapping[str, Sequence[str]] | None = None,
) -> Vocabulary:
    """Returns the vocabulary of `categories`: for each, the unit mean of its prompts' unit vectors.

    Args:
        categories: the names, in the order of the rows.
        prompts: templates (see `fill_prompt`).
        encoder: the teacher's text tower.
        synonyms: further words by name; every prompt of every word of a name counts alike.

    Raises:
        DataError: no category, a name twice, or prompts whose vectors cancel out.
        UsageError: no prompt, or one without a place for the name.
    """
    names = [category.name for category in categories]
    if len(set(names)) != len(names):
        twice = [name for name, count in Counter(names).items() if count > 1]
        raise DataError(f"a vocabulary wants distinct names; twice: {', '.join(twice)}")
    if not names:
        raise DataError("a vocabulary wants at least one name")
    if not prompts:
        raise UsageError("a vocabulary wants at least one prompt")
    words = [(name, *(synonyms or {}).get(name, ())) for name in names]
    texts = [fill_prompt(t, word) for group in words for word in group for t in prompts]
    each = np.asarray(encoder.encode_texts(texts), dtype=np.float64)
    ends = np.cumsum([len(group) * len(prompts) for group in words])
    mean = np.stack([part.mean(axis=0) for part in np.split(each, ends[:-1])])
    norms = np.linalg.norm(mean, axis=1, keepdims=True)
    if not (norms > 0).all():
        raise DataError("the prompts of a name have embeddings that cancel out")
    return Vocabulary(
        names=tuple(names),
        category_ids=tuple(category.category_id for category in categories),
        is_base=tuple(category.is_base for category in categories),
        frequencies=tuple(category.frequency for category in categories),
        prompts=tuple(prompts),
        teacher=encoder.identity,
        embeddings=(mean / norms).astype(np.float32),
    )


def save_vocabulary(vocabulary: Vocabulary, path: Path) -> None:
    """Writes a vocabulary as safetensors, atomically; its hash travels inside, and one of its
    thresholds, if it has any."""
    described = {"vocabulary": _canonical(vocabulary.metadata()), "hash": vocabulary.hash}
    if vocabulary.thresholds:
        described[_THRESHOLDS_HASH] = _thresholds_hash(vocabulary)
    data = save({"embeddings": np.ascontiguousarray(vocabulary.embeddings)}, metadata=described)
    write_bytes(path, data)


def load_vocabulary(path: Path) -> Vocabulary:
    """Returns a vocabulary from its file; needs no CLIP.

    Raises:
        DataError: no such file.
        CorruptArtefactError: not a vocabulary, or its content does not give the hash inside.
    """
    if not path.is_file():
        raise DataError(f"no vocabulary file {path}")
    try:
        with safe_open(path, framework="numpy") as file:
            described = file.metadata() or {}
            embeddings = file.get_tensor("embeddings")
        vocabulary = from_metadata(json.loads(described["vocabulary"]), embeddings)
        expected = described["hash"]
    except (SafetensorError, KeyError, ValueError) as error:
        raise CorruptArtefactError(f"{path} is not a vocabulary file: {error}") from None
    known = _thresholds_hash(vocabulary) if vocabulary.thresholds else None
    if vocabulary.hash != expected or described.get(_THRESHOLDS_HASH) != known:
        raise CorruptArtefactError(f"{path} is damaged: its content does not give its own hash")
    return vocabulary


def thresholds_by_name(names: Sequence[str], given: Mapping[str, float]) -> dict[str, float]:
    """Returns thresholds by the names as a vocabulary has them: `Fire Hydrant` for `fire_hydrant`.

    Raises:
        UsageError: one is of none of the names, or no score.
    """
    known: dict[str, list[str]] = {}
    for name in names if given else ():
        known.setdefault(readable_name(name), []).append(name)  # `Cat` and `cat` may be there
    found: dict[str, float] = {}
    for name, least in given.items():
        if (same := known.get(readable_name(name))) is None:
            raise UsageError(f"a threshold is given for '{name}', which is none of the names")
        if not 0 <= least <= 1:
            raise UsageError(f"the threshold of '{name}' is {least}: scores lie in 0..1")
        found |= dict.fromkeys(same, least)
    return found


def with_thresholds(vocabulary: Vocabulary, given: Mapping[str, float]) -> Vocabulary:
    """Returns a vocabulary with further least scores, each instead of the one it may have.

    Raises:
        UsageError: as `thresholds_by_name`.
    """
    least = {**vocabulary.thresholds, **thresholds_by_name(vocabulary.names, given)}
    return replace(vocabulary, thresholds=in_order_of(vocabulary.names, least))


def in_order_of(names: Sequence[str], thresholds: Mapping[str, float]) -> dict[str, float]:
    """Returns thresholds in the names' order; a student file has them in another."""
    return {name: thresholds[name] for name in names if name in thresholds}


def _thresholds_hash(vocabulary: Vocabulary) -> str:
    return hashlib.sha256(_canonical(dict(vocabulary.thresholds)).encode()).hexdigest()


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
