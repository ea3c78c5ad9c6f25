"""The student as a plain function of tensors, and what others' runtimes make of it.

`differences` tries a graph on other batches, sizes and numbers of classes than it was traced with:
a shape that became a constant shows there.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn import functional

from dkdetr.boxes import cxcywh_to_xyxy
from dkdetr.data.transforms import PIXEL_MEAN, PIXEL_STD
from dkdetr.structures import ImageBatch
from dkdetr.student.deformable_attention import MultiScaleDeformableAttention
from dkdetr.student.detector import DKDETR

INPUTS = ("pixels", "padding_mask", "text_embeddings")
OUTPUTS = ("scores", "boxes_xyxy")
_STRIDE = 64
_CLOSE = 1e-2


class StudentGraph(nn.Module):
    """Pixels, where they are padding, and text embeddings in; scores and boxes out.

    Args:
        student: copied and put on the CPU, with attention in plain PyTorch; without its mask head,
            since masks are drawn for chosen queries alone.
        text_embeddings: baked in; None: they are an input.
    """

    mean: Tensor
    std: Tensor
    baked: Tensor | None

    def __init__(
        self, student: DKDETR, text_embeddings: Float[Tensor, "num_classes text_dim"] | None = None
    ) -> None:
        super().__init__()
        self.student = copy.deepcopy(student).cpu()
        self.student.mask_head = None
        for part in self.student.modules():
            if isinstance(part, MultiScaleDeformableAttention):
                part.backend = "torch"
        self.requires_grad_(requires_grad=False)
        self.register_buffer("mean", torch.tensor(PIXEL_MEAN)[:, None, None])
        self.register_buffer("std", torch.tensor(PIXEL_STD)[:, None, None])
        self.register_buffer("baked", text_embeddings)
        self.eval()  # exporters put back the mode of the whole, and of its parts with it

    def forward(
        self,
        pixels: Float[Tensor, "batch 3 height width"],
        padding_mask: Bool[Tensor, "batch height width"],
        text_embeddings: Float[Tensor, "num_classes text_dim"] | None = None,
    ) -> tuple[
        Float[Tensor, "batch num_queries num_classes"], Float[Tensor, "batch num_queries 4"]
    ]:
        """Returns scores in 0..1 and boxes as shares of the un-padded picture.

        Args:
            pixels: RGB, 0 to 255; what lies in padding has no say.
            padding_mask: True on padding, right of and below each picture.
            text_embeddings: unit vectors; left out where they are baked in.
        """
        text = self.baked if text_embeddings is None else text_embeddings
        normalised = ((pixels - self.mean) / self.std).masked_fill(padding_mask[:, None], 0.0)
        sizes_hw = torch.stack(
            ((~padding_mask[:, :, 0]).sum(1), (~padding_mask[:, 0, :]).sum(1)), dim=-1
        )
        images = ImageBatch(normalised, padding_mask, sizes_hw, sizes_hw, ())
        output = self.student(images, text)
        return output.logits[-1].sigmoid(), cxcywh_to_xyxy(output.detection.boxes_cxcywh[-1])


@dataclass(frozen=True)
class Example:
    """Inputs of a graph."""

    pixels: Float[Tensor, "batch 3 height width"]
    padding_mask: Bool[Tensor, "batch height width"]
    text_embeddings: Float[Tensor, "num_classes text_dim"]

    @classmethod
    def drawn(
        cls, batch: int, size_hw: tuple[int, int], num_classes: int, text_dim: int, *, seed: int
    ) -> Self:
        """Returns noise; of all pictures but the first a part is padding."""
        generator = torch.Generator().manual_seed(seed)
        height, width = size_hw
        pixels = 255 * torch.rand(batch, 3, height, width, generator=generator)
        mask = torch.zeros(batch, height, width, dtype=torch.bool)
        for image in range(1, batch):
            mask[image, height - height // (3 + image) :] = True
            mask[image, :, width - width // (2 + image) :] = True
        text = torch.randn(num_classes, text_dim, generator=generator)
        return cls(pixels, mask, functional.normalize(text, dim=-1))

    def arguments(self, *, baked: bool) -> tuple[Tensor, ...]:
        """Returns the inputs in their order."""
        inputs = (self.pixels, self.padding_mask)
        return inputs if baked else (*inputs, self.text_embeddings)


Run = Callable[[tuple[Tensor, ...]], tuple[np.ndarray, np.ndarray]]
"""Runs a graph somewhere: inputs to scores and boxes."""


@dataclass(frozen=True)
class Differences:
    """The largest differences from PyTorch, and on what."""

    boxes: float
    scores: float
    runtime: str
    tried: tuple[str, ...]

    def line(self) -> str:
        """Returns them for people."""
        return (
            f"largest difference to PyTorch in {self.runtime}: boxes {self.boxes:.1e} (of the "
            f"picture's sides), scores {self.scores:.1e}; on {', '.join(self.tried)}"
        )


def least_side(num_queries: int) -> int:
    """Returns the least side, a multiple of 64, of a square with a token for each query."""
    side = _STRIDE * 2
    while sum((side // stride) ** 2 for stride in (8, 16, 32, 64)) < num_queries:
        side += _STRIDE
    return side


def traced_with(graph: StudentGraph, text_dim: int) -> Example:
    """Returns the inputs to trace with: no two sizes alike, so that none is taken for another."""
    side = least_side(graph.student.num_queries)
    return Example.drawn(2, (side, side + _STRIDE), 5, text_dim, seed=0)


def differences(graph: StudentGraph, run: Run, text_dim: int, *, runtime: str) -> Differences:
    """Returns how far a runtime is from PyTorch, on other inputs than were traced.

    A query of one is compared with the query of the other whose box and scores are the nearest:
    where two tokens' objectness differ by a rounding, their queries may change places.
    """
    baked = graph.baked is not None
    far_boxes, far_scores, tried = 0.0, 0.0, []
    for example in _others(graph.student.num_queries, text_dim):
        arguments = example.arguments(baked=baked)
        with torch.inference_mode():
            scores, boxes = (each.numpy() for each in graph(*arguments))
        other_scores, other_boxes = run(arguments)
        batch, height, width = example.padding_mask.shape
        tried.append(f"{batch}x3x{height}x{width}" + ("" if baked else f" and {scores.shape[2]}"))
        for image in range(batch):
            mine, theirs = _matched(
                (scores[image], boxes[image]), (other_scores[image], other_boxes[image])
            )
            far_boxes = max(far_boxes, _far(boxes[image][mine], other_boxes[image][theirs]))
            far_scores = max(far_scores, _far(scores[image][mine], other_scores[image][theirs]))
    return Differences(far_boxes, far_scores, runtime, tuple(tried))


def _others(num_queries: int, text_dim: int) -> Iterator[Example]:
    # Half a picture may be padding: there are proposals enough all the same.
    side = least_side(4 * num_queries)
    yield Example.drawn(1, (side + 96, side), 1, text_dim, seed=1)
    yield Example.drawn(3, (side + 8, side + 40), 12, text_dim, seed=2)


def _far(mine: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(mine - theirs).max())


def _matched(
    mine: tuple[np.ndarray, np.ndarray], theirs: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    rows, columns = (np.concatenate(each, axis=1) for each in (mine, theirs))
    if _far(rows, columns) < _CLOSE:
        return np.arange(len(rows)), np.arange(len(rows))
    return linear_sum_assignment(np.abs(rows[:, None] - columns[None]).max(-1))
