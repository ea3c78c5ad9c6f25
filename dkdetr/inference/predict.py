"""Words in, boxes out: a trained student as an object to call."""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Self

import numpy as np
import torch

from dkdetr.boxes import nms_keep
from dkdetr.config import ExperimentConfig, Precision
from dkdetr.data.annotations import Category
from dkdetr.data.picture_input import Picture, decoded_batch, image_batch, rgb_pixels
from dkdetr.data.prompts import prompt_set
from dkdetr.data.vocabulary import (
    Vocabulary,
    build_vocabulary,
    load_vocabulary,
    thresholds_by_name,
)
from dkdetr.defaults import DEFAULT_PROMPTS, DEFAULT_THRESHOLD
from dkdetr.encoders import TextEncoder
from dkdetr.errors import MismatchError, UsageError
from dkdetr.evaluation.compiled import NAMES_MULTIPLE
from dkdetr.evaluation.detect import detect
from dkdetr.evaluation.postprocess import Detections
from dkdetr.inference.hub import fetch_student_file
from dkdetr.inference.prediction import Prediction
from dkdetr.inference.ready_student import ReadyStudent
from dkdetr.structures import DecodedImages, ImageBatch
from dkdetr.student.detector import DKDETR as Student
from dkdetr.student_file import build_from_file, load_student_file

LookedFor = Vocabulary | Path | str | Sequence[str]
"""A vocabulary, the path of its file, or a list of words."""


class DKDETR:
    """A student that finds what words name.

    Args:
        student: the network; `predict` asks a copy made ready for it, and another one after weights
            have changed.
        config: the settings it was trained with.
        vocabulary: the names and embeddings it speaks unless others are given.
        text_encoder: the text tower of its teacher, for bare words; None: vocabularies only.
        device: where it runs.
        precision: see `dkdetr.precision.computing`.
        compiled: detects through torch.compile, on a GPU with CUDA graphs: then always from the
            same thread. Each batch size is compiled when it first comes, and each number of
            names, counted in 64s; see `dkdetr.evaluation.compiled`.
    """

    def __init__(
        self,
        student: Student,
        config: ExperimentConfig,
        vocabulary: Vocabulary,
        *,
        text_encoder: TextEncoder | None = None,
        device: torch.device | str = "cpu",
        precision: Precision = "auto",
        compiled: bool = False,
    ) -> None:
        self.student = student.to(device).eval()
        self.config = config
        self.vocabulary = vocabulary
        self._text_encoder = text_encoder
        self._device = torch.device(device)
        self._precision: Precision = precision
        self._compiled = compiled
        self._ready = ReadyStudent(self._device, precision, compiled=compiled)

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | Path,
        *,
        device: torch.device | str = "cpu",
        text_encoder: TextEncoder | None = None,
        revision: str | None = None,
        precision: Precision = "auto",
        compiled: bool = False,
    ) -> Self:
        """Returns the student of a student file, or of a model repository on the Hugging Face hub.

        Args:
            path_or_hub_id: a `.safetensors` that `dkdetr export` or `dkdetr convert` wrote, a
                folder that holds `model.safetensors`, or `owner/name`.
            device: where it runs.
            text_encoder: see the class.
            revision: of the repository: a commit's hash (which nobody can move), a tag or a
                branch; None: its main branch.
            precision: see the class.
            compiled: see the class.

        Raises:
            UsageError: a revision of something that is no repository.
            DataError: there is no such file or repository.
            CorruptArtefactError: not a student file, or damaged.
            MismatchError: the file holds no whole student or no vocabulary.
        """
        path = fetch_student_file(str(path_or_hub_id), revision=revision)
        file = load_student_file(path)
        if file.vocabulary is None:
            raise MismatchError(f"'{path}' brings no vocabulary, so nobody knows its text space")
        student = build_from_file(path, file, text_dim=file.vocabulary.embed_dim)
        return cls(
            student,
            file.config,
            file.vocabulary,
            text_encoder=text_encoder,
            device=device,
            precision=precision,
            compiled=compiled,
        )

    def predict(
        self,
        images: Picture | Iterable[Picture],
        vocabulary: LookedFor | None = None,
        *,
        threshold: float | None = None,
        thresholds: Mapping[str, float] | None = None,
        nms_iou: float | None = None,
        max_detections: int = 300,
        batch_size: int | None = None,
        masks: bool = True,
    ) -> list[Prediction]:
        """Returns what was found in each picture, best first.

        Args:
            images: one picture or several: files, PIL, arrays or tensors.
            vocabulary: what to look for: a vocabulary or its file, or a list of bare words where a
                text encoder is there; None: the student's own names.
            threshold: least score, of all names; None: the vocabulary's own of a name that has
                one, else 0.3.
            thresholds: least scores by name, instead of the one above for these names.
            nms_iou: of boxes of whatever name that overlap by more, 0..1, only the best stays;
                None: all stay, as in evaluation.
            max_detections: the most of one picture.
            batch_size: pictures at once; None: the experiment's `eval.batch_size`.
            masks: whether a student that has a mask head draws them, of what is kept alone.

        Raises:
            DataError: a picture cannot be read.
            UsageError: bare words without a text encoder, a threshold for an unknown name, or an
                overlap or score beyond 0..1.
            MismatchError: the vocabulary is of another teacher than the student's.
        """
        single = isinstance(images, Picture)
        several = [images] if single else images
        return list(
            self.stream(
                several,
                vocabulary,
                threshold=threshold,
                thresholds=thresholds,
                nms_iou=nms_iou,
                max_detections=max_detections,
                batch_size=batch_size,
                masks=masks,
            )
        )

    def stream(
        self,
        images: Iterable[Picture],
        vocabulary: LookedFor | None = None,
        *,
        threshold: float | None = None,
        thresholds: Mapping[str, float] | None = None,
        nms_iou: float | None = None,
        max_detections: int = 300,
        batch_size: int | None = None,
        masks: bool = True,
    ) -> Iterator[Prediction]:
        """Yields as `predict` returns, holding one batch of pictures at a time.

        On a GPU two: the next one is decoded and begun before the last one's results are yielded.
        """
        spoken = self.resolve(vocabulary)
        least = _least_scores(spoken, threshold, thresholds or {})
        if nms_iou is not None and not 0 <= nms_iou <= 1:
            raise UsageError(f"suppression above an IoU of {nms_iou}: it lies in 0..1")
        size = self.config.eval.batch_size if batch_size is None else batch_size
        begun: deque[np.ndarray] = deque()
        found = detect(
            self._ready.of(self.student),
            self._inputs(_batches(images, size), begun),
            torch.from_numpy(spoken.embeddings.copy()),
            device=self._device,
            max_detections=max_detections,
            precision=self._precision,
            with_masks=masks and self.config.student.mask_head,
            keep=partial(_keep, least=least, nms_iou=nms_iou),
            names_multiple=NAMES_MULTIPLE if self._compiled else 1,
        )
        for _, detections in found:
            yield _prediction(begun.popleft(), detections, spoken)

    def _inputs(
        self, batches: Iterable[list[Picture]], begun: deque[np.ndarray]
    ) -> Iterator[ImageBatch | DecodedImages]:
        """Yields what the student is given; the pictures themselves go to the end of `begun`."""
        side = self.config.data.image_size
        for batch in batches:
            pixels = [rgb_pixels(picture) for picture in batch]
            begun.extend(pixels)
            if self._device.type == "cuda":  # which resamples faster, and is sent a tenth
                yield decoded_batch(pixels, range(len(pixels)), image_size=side).pin_memory()
            else:
                yield image_batch(pixels, range(len(pixels)), image_size=side)

    def resolve(self, vocabulary: LookedFor | None) -> Vocabulary:
        """Returns the vocabulary that `predict` would use; words go through the text encoder."""
        if vocabulary is None:
            return self.vocabulary
        if isinstance(vocabulary, Vocabulary):
            spoken = vocabulary
        elif isinstance(vocabulary, Path | str):
            spoken = _vocabulary_file(vocabulary)
        elif self._text_encoder is None:
            raise UsageError(
                "bare words want the teacher's text tower: pass text_encoder=..., or a vocabulary "
                "made with `dkdetr vocab build`"
            )
        else:
            spoken = words_vocabulary(vocabulary, self._text_encoder, self.vocabulary.prompts)
        spoken.require_space_of(self.vocabulary, "these words were")
        return spoken


def _vocabulary_file(path: Path | str) -> Vocabulary:
    if isinstance(path, str) and not Path(path).is_file():
        raise UsageError(f"no vocabulary file '{path}'; bare words are given as a list: ['{path}']")
    return load_vocabulary(Path(path))


def words_vocabulary(
    words: Sequence[str], encoder: TextEncoder, templates: Sequence[str] = ()
) -> Vocabulary:
    """Returns a vocabulary of bare words, ids from 1 in their order.

    Without `templates` ViLD's 63 sentences are used.
    """
    names = [word.strip() for word in words if word.strip()]
    categories = [
        Category(category_id=number, name=name, frequency="", is_base=True)
        for number, name in enumerate(names, start=1)
    ]
    return build_vocabulary(categories, templates or prompt_set(DEFAULT_PROMPTS).templates, encoder)


def _least_scores(
    vocabulary: Vocabulary, threshold: float | None, by_name: Mapping[str, float]
) -> torch.Tensor:
    others = DEFAULT_THRESHOLD if threshold is None else threshold
    if not 0 <= others <= 1:
        raise UsageError("thresholds are scores: they lie in 0..1")
    least = dict(vocabulary.thresholds) if threshold is None else {}
    least |= thresholds_by_name(vocabulary.names, by_name)
    return torch.tensor([least.get(name, others) for name in vocabulary.names])


def _keep(found: Detections, least: torch.Tensor, nms_iou: float | None) -> Detections:
    keep = found.scores >= least[found.labels]
    kept = found.take(keep)
    if nms_iou is None:
        return kept
    best = nms_keep(kept.boxes_xyxy, kept.scores, iou_threshold=nms_iou)
    return kept.take(best)


def _prediction(image: np.ndarray, found: Detections, vocabulary: Vocabulary) -> Prediction:
    labels = found.labels.tolist()
    return Prediction(
        image=image,
        boxes_xyxy=found.boxes_xyxy.numpy(),
        scores=found.scores.numpy(),
        category_ids=np.array([vocabulary.category_id_of(i) for i in labels], dtype=np.int64),
        names=tuple(vocabulary.names[label] for label in labels),
        masks=found.masks,
    )


def _batches(images: Iterable[Picture], size: int) -> Iterator[list[Picture]]:
    if size < 1:
        raise UsageError(f"batch_size={size}: at least 1")
    iterator = iter(images)
    while batch := list(islice(iterator, size)):
        yield batch
