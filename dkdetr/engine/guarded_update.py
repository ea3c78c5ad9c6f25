"""The optimiser's step, left out where the gradients' norm is not finite.

On a GPU the decision falls there. The process hears of it as soon as the norm is known, while the
update is still being computed, so that the next step's work is queued before the GPU runs dry.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim import AdamW


def update_where_finite(optimizer: AdamW, norm: Float[Tensor, ""]) -> Callable[[], bool]:
    """Takes the step unless `norm` is not finite; returns a function that tells if it was taken.

    Where it was not, weights and the optimiser's state are as before, bit by bit.
    """
    if not all(group["fused"] for group in optimizer.param_groups):
        taken = math.isfinite(norm.item())
        if taken:
            optimizer.step()
        return lambda: taken
    told = on_its_way(norm)
    # The way in which GradScaler tells a fused optimiser; 1 leaves everything as it is.
    fused: Any = optimizer
    fused.found_inf = norm.isfinite().logical_not().float()
    try:
        optimizer.step()
    finally:
        del fused.found_inf
    return lambda: math.isfinite(told())


def on_its_way(number: Float[Tensor, ""]) -> Callable[[], float]:
    """Returns a function that gives a number; it waits for nothing that is queued from here on."""
    if number.device.type != "cuda":
        return number.item
    kept = torch.empty((), dtype=number.dtype, pin_memory=True)
    kept.copy_(number.detach(), non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()

    def read() -> float:
        arrived.synchronize()
        return kept.item()

    return read
