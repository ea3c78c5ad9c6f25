"""A student for inference through torch.compile."""

import torch
from torch import nn


def compile_for_inference(
    student: nn.Module, device: torch.device, *, backend: str = "inductor"
) -> None:
    """Makes the student compute through a compiler; its weights and their names stay.

    On a GPU inductor records CUDA graphs: a batch of one is bound by launches. Each batch size is
    compiled when it first comes, which takes minutes; what went before is slower than without.
    """
    graphs = device.type == "cuda" and backend == "inductor"
    student.compile(backend=backend, mode="reduce-overhead" if graphs else None)
