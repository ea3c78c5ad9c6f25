"""A GPU that is only pretended: its tensors say `cuda:0`, their numbers are a CPU's.

Whole commands run on it by `--device cuda` where there is no GPU. Refused as by CUDA: operators
over tensors of both devices (indices from the CPU, too, for which CUDA would wait), `numpy()` of a
GPU's tensor, a CPU's autocast. What a CPU would wait for is noted. Triton finds no driver, as on a
machine without one, and what falls back for that does so. Nobody looks into a backward pass. Not
pretended: other processes, queues that run side by side, copies that arrive later, generators,
NCCL, torch.compile, a GPU's rounding and memory formats (all is contiguous).
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

from pipeline import decoding

GPU = torch.device("cuda", 0)
_waits: list[str] = []

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

    def record_stream(self, s: object) -> None:
        assert isinstance(s, Stream)

    def numpy(self, *_: object, **__: object) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    __array__ = numpy

    def tolist(self) -> Any:
        _waits.append("numbers")
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
        held_args, held_kwargs = tree_map_only(OnGPU, lambda each: each.held, (args, kwargs))
        if held_kwargs.get("device") is not None:
            held_kwargs["device"] = torch.device("cpu")
        result = func(*held_args, **held_kwargs)
        if func is aten.copy_.default and not isinstance(args[0], OnGPU):
            return args[0]
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
        _waits.append("a number")
    if operator in _SHAPES:
        _waits.append("a shape")
    if operator in _INDEXED and any(
        each.dtype == torch.bool for each in args[1] if each is not None
    ):
        _waits.append("a shape")
    if operator is aten.copy_ and not all(isinstance(each, OnGPU) for each in args[:2]):
        _note_copy(args[1], non_blocking=len(args) > 2 and args[2])


def _note_copy(source: Tensor, *, non_blocking: bool) -> None:
    """Nobody waits for a copy down, if asked so, nor for one up out of pinned memory."""
    if not (non_blocking and (isinstance(source, OnGPU) or getattr(source, "pinned", False))):
        _waits.append("a copy")


def _moved(tensor: Tensor, device: Any, *, non_blocking: bool = False) -> Tensor:
    if device is None or (torch.device(device).type == "cuda") == isinstance(tensor, OnGPU):
        return tensor
    assert not (tensor.requires_grad and torch.is_grad_enabled()), "a gradient ends here"
    _note_copy(tensor, non_blocking=non_blocking)
    if isinstance(tensor, OnGPU):
        return tensor.held.detach().clone()
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
    moved = _moved(tensor, device, non_blocking=non_blocking)
    copied = moved is not tensor and kwargs.pop("copy", False)
    return moved if copied or not (dtype or kwargs) else func(moved, dtype or moved.dtype, **kwargs)


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
    with _Pretence():
        torch.autograd.backward(loss, gradient, **kwargs)


def _pinned(tensor: Any, *_: Any) -> Tensor:
    assert not isinstance(tensor, OnGPU), "only a CPU's memory is pinned"
    tensor.pinned = True
    return tensor


def _from_data(func: Any, *args: Any, device: Any = None, **kwargs: Any) -> Any:
    return _moved(func(*args, **kwargs), device)


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
    Tensor.cpu: lambda tensor, *_, **__: _moved(tensor, "cpu"),
    Tensor.cuda: lambda tensor, *_, **__: _moved(tensor, "cuda"),
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


class _Pretence(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return _called(func, args, kwargs or {})


class Event(torch.cuda.Event):
    """An event that has passed."""

    def record(self, stream: object = None) -> None: ...
    def synchronize(self) -> None:
        _waits.append("an event")

    def elapsed_time(self, end_event: object) -> float:
        return 1.0


class Stream:
    """A queue without anything in it."""

    def __init__(self, *_: object) -> None: ...
    def record_event(self, *_: object) -> Event:
        return Event()

    def synchronize(self) -> None:
        _waits.append("a queue")


_CAPTURE_CHECKS = [name for name in dir(torch.optim.Optimizer) if "graph_capture_health" in name]
_STREAM = Stream()
_CUDA: dict[str, Any] = {
    "is_available": lambda: True,
    "device_count": lambda: 1,
    "set_device": lambda _device: None,
    "device": lambda _device: contextlib.nullcontext(),
    "synchronize": lambda *_: _waits.append("the device"),
    "get_device_capability": lambda *_: (8, 0),
    "get_device_name": lambda *_: "a pretended GPU",
    "max_memory_allocated": lambda *_: 2**30,
    "get_rng_state_all": lambda: [torch.zeros(1, dtype=torch.uint8)],
    "set_rng_state_all": lambda _states: None,
    "Event": Event,
    "Stream": Stream,
    "stream": lambda _stream: contextlib.nullcontext(),
    "current_stream": lambda *_: _STREAM,
    "default_stream": lambda *_: _STREAM,
}


class _Autocast(torch.autocast):
    """Autocast of the GPU: the CPU's, which alone there is, while CUDA's own switch says so too."""

    def __init__(self, device_type: str, **kwargs: Any) -> None:
        assert device_type == "cuda", "a CPU's autocast changes nothing on a GPU"
        super().__init__("cpu", **kwargs)

    def __enter__(self) -> Any:
        self._before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        torch.set_autocast_enabled("cuda", self._enabled)
        torch.set_autocast_dtype("cuda", self.fast_dtype)
        return super().__enter__()

    def __exit__(self, *error: Any) -> Any:
        torch.set_autocast_enabled("cuda", self._before[0])
        torch.set_autocast_dtype("cuda", self._before[1])
        return super().__exit__(*error)


def _within(run: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `run` under the pretence: a mode is a thread's own, and a backward pass's."""

    def pretended(*args: Any, **kwargs: Any) -> Any:
        with _Pretence():
            return run(*args, **kwargs)

    return pretended


def _as_no_grad(mode: Any) -> None:
    """Inference mode would want versions of tensors that wrapped ones do not have."""
    mode.pretended = torch.no_grad() if mode.mode else contextlib.nullcontext()
    mode.pretended.__enter__()


def _grouped_there(*args: Any, **kwargs: Any) -> Any:
    """Tensors by device and type, as clipping asks for them: of PyTorch's own code, told `cpu`."""
    found = _group(*args, **kwargs)
    return {
        (GPU if isinstance(lists[0][0], OnGPU) else device, dtype): (lists, places)
        for (device, dtype), (lists, places) in found.items()
    }


def _decoded(data: Any, *args: Any, device: Any = "cpu", **kwargs: Any) -> Any:
    return tree_map_only(Tensor, lambda each: _moved(each, device), _decode(data, *args, **kwargs))


_group = clip_grad._group_tensors_by_device_and_dtype
_recompute = checkpoint._run_fn_with_dynamo_disabled
_decode = decoding.decode_jpeg


@contextlib.contextmanager
def pretended_gpu() -> Iterator[list[str]]:
    """A context in which `cuda` is there; gives what a CPU waited for meanwhile, as it goes on."""
    _waits.clear()
    changes: list[tuple[Any, str, Any]] = [
        *((torch.cuda, name, value) for name, value in _CUDA.items()),
        (torch.accelerator, "is_available", lambda: True),
        (torch.accelerator, "current_device_index", lambda: 0),
        (torch.accelerator, "set_device_index", lambda _device: None),
        (torch.accelerator, "current_stream", lambda *_: _STREAM),
        (torch, "autocast", _Autocast),
        (torch.inference_mode, "__enter__", _as_no_grad),
        (torch.inference_mode, "__exit__", lambda mode, *error: mode.pretended.__exit__(*error)),
        *((torch.optim.Optimizer, name, lambda _self: None) for name in _CAPTURE_CHECKS),
        (clip_grad, "_group_tensors_by_device_and_dtype", _grouped_there),
        (decoding, "decode_jpeg", _decoded),
        (threading.Thread, "run", _within(threading.Thread.run)),
        (checkpoint, "_run_fn_with_dynamo_disabled", _within(_recompute)),
    ]
    with contextlib.ExitStack() as stack:
        for owner, name, value in changes:
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(_Pretence())
        yield _waits
