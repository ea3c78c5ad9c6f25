"""CUDA's autocast on a CPU: norms and softmax are float32, which a CPU's leaves in half.

And a GPU of fake tensors, on which memory is counted and nothing is computed.
"""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from dkdetr.student import deformable_attention

_IN_FLOAT32 = {functional.layer_norm, functional.group_norm, functional.softmax, Tensor.softmax}


class _Float32(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _IN_FLOAT32 and torch.is_autocast_enabled("cpu"):
            args = tuple(
                each.float() if isinstance(each, Tensor) and each.dtype != torch.float64 else each
                for each in args
            )
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def as_on_cuda(dtype: torch.dtype) -> Iterator[None]:
    """Autocast to `dtype`, of which no norm or softmax on the CPU makes half precision."""
    with torch.autocast("cpu", dtype=dtype), _Float32():
        yield


@contextlib.contextmanager
def on_fake_cuda(dtype: torch.dtype) -> Iterator[None]:
    """CUDA's own autocast, for fake tensors: `torch.autocast` wants a device for it."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", dtype)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])


@contextlib.contextmanager
def fake_gpu(*, kernel: bool) -> Iterator[None]:
    """New tensors are fake ones of a GPU; attention takes the Triton kernel, or plain PyTorch."""
    with (
        FakeTensorMode(),
        torch.device("cuda"),  # whose dropout keeps a byte where a CPU's keeps four
        mock.patch.object(deformable_attention, "picks_triton", return_value=kernel),
    ):
        yield
