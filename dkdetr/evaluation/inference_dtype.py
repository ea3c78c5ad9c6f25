"""In which type a student computes where nobody learns from it."""

import contextlib
from typing import Literal

import torch

Precision = Literal["auto", "fp32", "fp16", "bf16"]
_HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}


def computing_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """Returns the type that a precision means on a device; `auto` is float32 but on a GPU.

    On a GPU `auto` takes bfloat16 where the hardware has it, else float16.
    """
    if precision == "auto" and device.type == "cuda":
        precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return _HALF.get(precision, torch.float32)


def autocast(
    precision: Precision, device: torch.device
) -> contextlib.AbstractContextManager[object]:
    """Returns the context in which the student computes; see `computing_dtype`."""
    dtype = computing_dtype(precision, device)
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype)
