"""What torch is told to do: kernels that are launched, and copies between a CPU and a GPU."""

from collections import Counter

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_COPIES = ("aten::_to_copy", "aten::copy_", "aten::to")
"""The last comes whole in inference mode."""


class Launches(TorchDispatchMode):
    """Counts the operations that write something: views and shapes are free on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.by_name: Counter[str] = Counter()
        self.cast: set[int] = set()
        """`id` of every tensor that was copied to another type."""

    @property
    def total(self) -> int:
        return sum(self.by_name.values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        returned = func._schema.returns
        alias = returned[0].alias_info if returned else None
        if alias is None or alias.is_write:
            self.by_name[str(func)] += 1
        if func is torch.ops.aten._to_copy.default:
            self.cast.add(id(args[0]))
        return result


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
