"""Tensors that say `cuda:0` and hold a CPU's numbers, and the waits that they would ask for."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

GPU = torch.device("cuda", 0)
waits: list[str] = []
late: list[tuple[Tensor, Tensor]] = []
"""Copies down that nobody has waited for, and what they will hold."""

aten = torch.ops.aten
_COPIES = (aten.copy_, aten._to_copy)
_JOINS = (aten.cat, aten.stack)
_SHAPES = (
    aten.nonzero, aten.masked_select, aten._unique2, aten.unique_dim, aten.unique_consecutive,
    aten.equal,
)  # fmt: skip
_INDEXED = (aten.index, aten.index_put_, aten.index_put, aten._index_put_impl_)


class OnGPU(Tensor):
    """A tensor of the pretended GPU; `held` has its numbers."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "OnGPU":
        # PyTorch's own code is told `cpu`: with `cuda` it would look for a driver.
        made = Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(),
            dtype=held.dtype, device=torch.device("cpu"),
        )  # fmt: skip
        made.held = held
        return made

    device: Any = property(lambda _self: GPU)
    is_cuda: Any = property(lambda _self: True)

    def record_stream(self, s: object) -> None: ...

    def numpy(self, *_: object, **__: object) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    __array__ = numpy

    def tolist(self) -> Any:
        wait_for("numbers")
        return self.held.tolist()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            copy = OnGPU(self.held.clone())
            parameter = isinstance(self, nn.Parameter)
            copy = nn.Parameter(copy, self.requires_grad) if parameter else copy
            memo[id(self)] = copy.requires_grad_(self.requires_grad)
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.held.detach().__reduce_ex__(protocol)  # what `map_location` makes of it

    __torch_function__ = torch._C._disabled_torch_function_impl  # the mode sees all

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # A backward pass makes zeros by PyTorch's own code, which was told `cpu`.
        if torch._C._current_graph_task_id() == -1:
            _refuse_mixing(func, args, kwargs)
            _note_waits(func, args)
        if func is aten.copy_.default and not isinstance(args[0], OnGPU):
            return _brought_down(*args)
        held_args, held_kwargs = tree_map_only(OnGPU, lambda each: each.held, (args, kwargs))
        if held_kwargs.get("device") is not None:
            held_kwargs["device"] = torch.device("cpu")
        result = func(*held_args, **held_kwargs)
        return return_and_correct_aliasing(func, args, kwargs, tree_map_only(Tensor, OnGPU, result))


def _refuse_mixing(func: Any, args: Any, kwargs: Any) -> None:
    operator = func.overloadpacket
    if operator in _COPIES:
        return
    for each in tree_leaves((args, kwargs)):
        if not isinstance(each, Tensor) or isinstance(each, OnGPU):
            continue
        written = func._schema.is_mutable and each is args[0]
        if each.ndim > 0 or operator in _JOINS or written:  # else it is a number to a kernel
            raise RuntimeError(
                f"{func}: expected all tensors on one device, but a tensor {tuple(each.shape)} "
                "is on the CPU"
            )


def _note_waits(func: Any, args: Any) -> None:
    operator = func.overloadpacket
    if operator is aten._local_scalar_dense:
        wait_for("a number")
    if operator in _SHAPES:
        wait_for("a shape")
    if operator in _INDEXED and any(
        each.dtype == torch.bool for each in args[1] if each is not None
    ):
        wait_for("a shape")
    if operator is aten.copy_ and not all(isinstance(each, OnGPU) for each in args[:2]):
        _note_copy(*args[1:])


def wait_for(what: str) -> None:
    """Notes a wait; all that was queued before is there then."""
    waits.append(what)
    arrive(late)


def arrive(copies: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Lets copies down be there; those that are already stay as they are."""
    for copy in list(copies):
        if any(copy is each for each in late):
            copy[0].copy_(copy[1])
            late[:] = [each for each in late if each is not copy]


def _sent(numbers: Tensor, kept: Tensor) -> Tensor:
    """`kept`, which will hold `numbers` when somebody has waited; until then it holds nonsense."""
    late.append((kept, numbers.clone()))
    return kept.fill_(
        torch.nan if kept.is_floating_point() else -(2**7) * (kept.dtype != torch.bool)
    )


def _brought_down(kept: Tensor, source: OnGPU, non_blocking: bool = False) -> Tensor:
    """`kept.copy_(source)`, from the GPU into a CPU's memory."""
    return _sent(source.held.to(kept.dtype), kept) if non_blocking else kept.copy_(source.held)


def _note_copy(source: Tensor, non_blocking: bool = False) -> None:
    """Nobody waits for a copy down, if asked so, nor for one up out of pinned memory."""
    if not (non_blocking and (isinstance(source, OnGPU) or getattr(source, "pinned", False))):
        wait_for("a copy")


def moved(tensor: Tensor, device: Any, *, non_blocking: bool = False) -> Tensor:
    """The tensor on a device; itself if it is there, or if None is asked for."""
    if device is None or (torch.device(device).type == "cuda") == isinstance(tensor, OnGPU):
        return tensor
    assert not (tensor.requires_grad and torch.is_grad_enabled()), "a gradient ends here"
    _note_copy(tensor, non_blocking)
    if isinstance(tensor, OnGPU):
        kept = tensor.held.detach().clone()
        return _sent(kept, kept) if non_blocking else kept
    return OnGPU(tensor.detach().clone())


def _to(func: Any, tensor: Tensor, *words: Any, **kwargs: Any) -> Tensor:
    """`Tensor.to`, in its several forms."""
    device, dtype = kwargs.pop("device", None), kwargs.pop("dtype", None)
    non_blocking = kwargs.pop("non_blocking", False)
    for word in words:
        if isinstance(word, Tensor):
            device, dtype = word.device, word.dtype
        elif isinstance(word, torch.dtype):
            dtype = word
        elif isinstance(word, str | torch.device):
            device = word
    there = moved(tensor, device, non_blocking=non_blocking)
    copied = there is not tensor and kwargs.pop("copy", False)
    return there if copied or not (dtype or kwargs) else func(there, dtype or there.dtype, **kwargs)


def _set_data(target: Tensor, value: Tensor) -> None:
    """`target.data = value`, as moving a module does; the tensor stays who it is."""
    if not isinstance(target, nn.Parameter):
        return  # the gradient of one, of which nobody speaks after a move
    with torch.no_grad():
        new = nn.Parameter(value.detach(), target.requires_grad)
        gradient, target.grad = target.grad, None
        torch.utils.swap_tensors(target, new)
        target.grad = gradient


def _backward(loss: Tensor, gradient: Any = None, *rest: Any, **kwargs: Any) -> None:
    assert not rest
    with Pretence():
        torch.autograd.backward(loss, gradient, **kwargs)


def _pinned(tensor: Any, *_: Any) -> Tensor:
    assert not isinstance(tensor, OnGPU), "only a CPU's memory is pinned"
    tensor.pinned = True
    return tensor


def _from_data(func: Any, *args: Any, device: Any = None, **kwargs: Any) -> Any:
    return moved(func(*args, **kwargs), device)


def _made(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """What a call gives; on the device that it names, if it names one."""
    wanted = kwargs.get("device")
    if wanted is None or torch.device(wanted).type != "cuda":
        return func(*args, **kwargs)
    made = func(*args, **kwargs | {"device": torch.device("cpu")})
    return tree_map_only(
        Tensor, lambda each: each if isinstance(each, OnGPU) else OnGPU(each), made
    )


_CALLS: dict[Any, Callable[..., Any]] = {
    Tensor.cpu: lambda tensor, *_, **__: moved(tensor, "cpu"),
    Tensor.cuda: lambda tensor, *_, **__: moved(tensor, "cuda"),
    Tensor.pin_memory: _pinned,
    Tensor.backward: _backward,
    Tensor.data.__set__: _set_data,  # pyright: ignore[reportAttributeAccessIssue]
}


def _called(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    kwargs = dict(kwargs)
    if kwargs.get("memory_format") is torch.channels_last:
        kwargs["memory_format"] = torch.contiguous_format
    if kwargs.get("pin_memory"):
        kwargs["pin_memory"] = False
    if func in _CALLS:
        return _CALLS[func](*args, **kwargs)
    if func is Tensor.to:
        return _to(func, *args, **kwargs)
    if func in (torch.tensor, torch.as_tensor):
        return _from_data(func, *args, **kwargs)
    if func is nn.functional.one_hot and isinstance(args[0], OnGPU):
        return OnGPU(func(args[0].held, *args[1:], **kwargs))  # counts by a CPU's tensor
    return _made(func, args, kwargs)


class Pretence(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return _called(func, args, kwargs or {})
