"""A student that only detects: what every call would do anew is done once, and the rest left out.

The student that is trained, saved and loaded keeps its names and its numbers; the copy shares
with it every tensor that it does not change.
"""

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from dkdetr.student.conv_norm import fold_norms
from dkdetr.student.detector import DKDETR
from dkdetr.student.heads import BoxHead, TextClassifier
from dkdetr.student.mask_head import MaskHead
from dkdetr.student.query_selection import QuerySelection

_IN_FULL: dict[type[nn.Module], tuple[str, ...]] = {
    BoxHead: ("linear1", "linear2", "linear3"),
    TextClassifier: ("projection",),
    QuerySelection: ("objectness",),
    MaskHead: ("projection", "linear1", "linear2", "linear3"),
}
"""Parts that compute outside of autocast, in their weights' own type."""


def inference_copy(student: DKDETR, dtype: torch.dtype = torch.float32) -> DKDETR:
    """Returns a copy in evaluation mode that detects as the student does, in fewer launches.

    Its norms lie in its convolutions; weights are of the type that autocast would round them to
    in every call; the last decoder layer alone is projected, scored and, with a mask head, asked
    for masks, so outputs have one layer. Detections are bitwise the student's on a CPU. It takes
    neither regions nor further queries, and its state dict is no checkpoint.

    Later changes of the student's weights reach the copy only in part: make another one.

    Args:
        student: on its device.
        dtype: what the student is called in under autocast; float32: without.
    """
    shared = {id(each): each for each in (*student.parameters(), *student.buffers())}
    copied = copy.deepcopy(student, shared).eval()
    copied.denoising_content = None
    copied.classifiers = copied.classifiers[-1:]
    fold_norms(copied)
    for part in list(_autocast_parts(copied)):
        for name, weight in list(part.named_parameters(recurse=False)):
            rounded = weight if dtype == torch.float32 else weight.detach().to(dtype)
            fitting = _laid_out(rounded)
            if fitting is not weight:
                setattr(part, name, nn.Parameter(fitting.detach(), requires_grad=False))
    return copied


def _autocast_parts(student: DKDETR) -> Iterator[nn.Module]:
    """Yields the modules whose weights autocast rounds."""
    in_full = {
        getattr(part, name)
        for part in student.modules()
        for kind, names in _IN_FULL.items()
        if isinstance(part, kind)
        for name in names
    }
    for part in student.modules():
        rounded = isinstance(part, nn.Linear | nn.Conv2d | nn.MultiheadAttention)
        if rounded and part not in in_full:
            yield part


def _laid_out(weight: Tensor) -> Tensor:
    # On a GPU maps have their channels side by side, and a convolution's weights are laid out
    # like them in every call, unless they lie so.
    if weight.is_cuda and weight.ndim == 4:
        return weight.contiguous(memory_format=torch.channels_last)
    return weight
