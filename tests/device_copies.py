"""Copies between a CPU and a GPU, counted without one."""

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_COPIES = ("aten::_to_copy", "aten::copy_", "aten::to")
"""The last comes whole in inference mode."""


class Copies(TorchDispatchMode):
    """Remembers the copies from one device to another, and whether one waits for them."""

    def __init__(self, *, down_may_wait: bool = True) -> None:
        super().__init__()
        self.down: list[str] = []
        self.up: list[str] = []
        self.bytes_up = 0
        self._down_may_wait = down_may_wait

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        if name in _COPIES and isinstance(result, Tensor):
            source = args[1] if name == "aten::copy_" else args[0]
            if source.device != result.device:
                (self.down if source.is_cuda else self.up).append(str(tuple(source.shape)))
                self.bytes_up += 0 if source.is_cuda else source.numel() * source.element_size()
                may_wait = source.is_cuda and self._down_may_wait
                assert may_wait or (kwargs or {}).get("non_blocking")
        return result
