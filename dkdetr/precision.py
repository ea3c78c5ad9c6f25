"""What a precision means on a device: the type under autocast, and how float32 is multiplied."""

import contextlib
from collections.abc import Iterator

import torch

from dkdetr.config import Precision
from dkdetr.errors import UsageError

_TYPES = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}


def computing_type(precision: Precision, device: torch.device) -> torch.dtype:
    """Returns the type under autocast; float32: there is none.

    `auto` is float32 but on a GPU; there it is bfloat16 where the hardware has it, else float16.
    """
    if precision != "auto":
        return _TYPES[precision]
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if _has_bf16(device) else torch.float16


def training_type(precision: Precision, device: torch.device) -> torch.dtype:
    """Returns what `computing_type` does, where a training can bear it.

    Raises:
        UsageError: the device cannot do it.
    """
    if precision == "fp16" and device.type != "cuda":
        raise UsageError("optim.precision=fp16 wants a CUDA device; use fp32 or auto on a CPU")
    if precision == "bf16" and device.type == "cuda" and not _has_bf16(device):
        raise UsageError("optim.precision=bf16: this GPU has no bf16; use fp16 or auto")
    return computing_type(precision, device)


@contextlib.contextmanager
def computing(precision: Precision, device: torch.device) -> Iterator[None]:
    """The context in which a student computes where nothing is differentiated."""
    dtype = computing_type(precision, device)
    enabled = dtype is not torch.float32
    with (
        float32_products(precision, device),
        torch.autocast(device.type, dtype=dtype if enabled else None, enabled=enabled),
    ):
        yield


@contextlib.contextmanager
def float32_products(precision: Precision, device: torch.device) -> Iterator[None]:
    """Lets a GPU multiply float32 with 10 bits of mantissa (TF32) meanwhile, but for `fp32`.

    Sums, and all that is no product or convolution, stay exact. PyTorch's own default is in
    between: convolutions in TF32, products not. GPUs before Ampere have no TF32 and ignore it. The
    switches are the process's own, so a backward pass must lie within, too.
    """
    if device.type != "cuda":
        yield
        return
    try:
        before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    except RuntimeError:
        # The caller has spoken by the newer switches, which do not mix with these.
        yield
        return
    exact = precision == "fp32"
    torch.set_float32_matmul_precision("highest" if exact else "high")
    torch.backends.cudnn.allow_tf32 = not exact
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def _has_bf16(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)
