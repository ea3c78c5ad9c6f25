"""Whether the Triton kernels cut the teacher's crops on a device, or the products of matrices."""

import functools

import numpy as np
import torch

from dkdetr.resampling import Interpolation
from dkdetr.triton_trial import problem_of, say_once
from pipeline.window_fit import Look

_RAMP = tuple(range(0, 256, 17))
_WANTED: dict[Interpolation, tuple[int, ...]] = {
    "bicubic": (20, 72, 127, 183, 235),
    "bilinear": (24, 73, 128, 182, 231),
}
"""What Pillow makes of the ramp in five pixels."""


def cuts_by_kernel(device: torch.device) -> bool:
    """Returns whether the kernels run here: on CUDA devices, once they were tried out.

    They are compiled and run once, small, and must give Pillow's pixels before they are trusted;
    where that fails, a line on stderr says so and the products of matrices take over.
    """
    if device.type != "cuda":
        return False
    problem = _problem(device)
    if problem is None:
        return True
    say_once(f"crops are cut by products of matrices, which is slower: {problem}")
    return False


@functools.cache
def _problem(device: torch.device) -> str | None:
    """Returns why the kernels cannot run; None if they did."""
    return problem_of(device, lambda: _try_out(device))


def _try_out(device: torch.device) -> str | None:
    """Returns what is wrong with the pixels that the kernels give; None if nothing is."""
    from pipeline.crop_launch import cut_in_parts

    ramp = torch.tensor([[_RAMP], [_RAMP], [_RAMP[::-1]]], dtype=torch.uint8).to(device)
    whole = np.array([[0, 0, len(_RAMP), 1]])
    for interpolation, levels in _WANTED.items():
        look = Look((3, len(levels)), "squash", interpolation)
        (crops,) = cut_in_parts([ramp], np.zeros(1, dtype=np.int64), whole, look)
        wanted = torch.tensor([[levels], [levels], [levels[::-1]]]).expand(3, 3, -1)
        if not torch.equal(crops[0].cpu().long(), wanted):
            return f"the kernels give other pixels than Pillow ({interpolation})"
    return None
