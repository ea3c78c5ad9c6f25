"""How many kernels an operation launches, counted without a GPU."""

from collections import Counter
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_FREE = {
    "_local_scalar_dense", "_unsafe_view", "alias", "detach", "empty", "empty_like",
    "empty_strided", "lift_fresh", "new_empty", "new_empty_strided", "promote_types",
}  # fmt: skip


class Launches(TorchDispatchMode):
    """Counts operations that compute or copy; those that only look at memory differently are free.

    A GPU launches at least one kernel for each; for some, as `topk`, several.
    """

    def __init__(self) -> None:
        super().__init__()
        self.by_name: Counter[str] = Counter()
        self.cast: set[int] = set()
        """`id` of every tensor that was copied to another type."""

    @property
    def total(self) -> int:
        return self.by_name.total()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        if not func.is_view and name not in _FREE:
            self.by_name[name] += 1
        if name == "_to_copy":
            self.cast.add(id(args[0]))
        return result


def launches_of_backward(loss: Tensor) -> int:
    """Launches of a backward pass, which runs in the same thread on a CPU."""
    with Launches() as counted:
        loss.backward()
    return counted.total
