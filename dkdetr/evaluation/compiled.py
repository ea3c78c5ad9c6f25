"""A student made ready for inference: prepared once, and on demand put through torch.compile."""

import torch
from torch import nn

from dkdetr.config import Precision
from dkdetr.precision import computing_type
from dkdetr.student.detector import DKDETR
from dkdetr.student.inference_copy import inference_copy

NAMES_MULTIPLE = 64
"""To which the number of names is filled up for a compiled student (`detect`, `names_multiple`)."""


def ready_for_inference(
    student: DKDETR, device: torch.device, precision: Precision, *, compiled: bool = False
) -> DKDETR:
    """Returns a copy of the student, on its device, that only detects.

    Args:
        student: stays as it is; see `inference_copy`.
        device: where it is.
        precision: in which it is going to be called.
        compiled: see `compile_for_inference`.
    """
    ready = inference_copy(student, computing_type(precision, device))
    if compiled:
        compile_for_inference(ready, device)
    return ready


def compile_for_inference(
    student: nn.Module, device: torch.device, *, backend: str = "inductor"
) -> None:
    """Makes the student compute through a compiler; its weights and their names stay.

    On a GPU inductor records CUDA graphs: a batch of one is bound by launches. Each batch size and
    each number of text embeddings is compiled and recorded when it first comes, which takes
    minutes; what went before is slower than without. Recorded graphs belong to the thread that
    recorded them (pytorch issue 123177): call such a student from one thread only.
    """
    graphs = device.type == "cuda" and backend == "inductor"
    student.compile(backend=backend, mode="reduce-overhead" if graphs else None)
