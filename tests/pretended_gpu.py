"""A GPU that is only pretended: its tensors say `cuda:0`, their numbers are a CPU's.

What CUDA refuses is refused: operators over tensors of both devices (and indices from the CPU, for
which CUDA would wait), `numpy()` of what lies on the GPU. So whole commands run by `--device cuda`
where there is none, with real numbers. Triton finds no driver, as on a machine without one, and
what falls back for that does so. Not pretended: other processes, streams that overlap, NCCL,
torch.compile, memory formats (all is contiguous).
"""

import contextlib
import threading
import warnings
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
_COPIES = ("aten::copy_", "aten::_to_copy")
_waits: list[str] = []


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

    def get_device(self) -> int:
        return 0

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

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return _called(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # A backward pass makes zeros by PyTorch's own code, which was told `cpu`.
        if func._schema.name not in _COPIES and torch._C._current_graph_task_id() == -1:
            for each in tree_leaves((args, kwargs)):
                if isinstance(each, Tensor) and not isinstance(each, OnGPU) and each.ndim > 0:
                    raise RuntimeError(
                        f"{func}: expected all tensors on one device, but a tensor "
                        f"{tuple(each.shape)} is on the CPU"
                    )
        if func is torch.ops.aten._local_scalar_dense.default:
            _waits.append("a number")
        within = all(isinstance(each, OnGPU) for each in args[:2])
        if func is torch.ops.aten.copy_.default and not within and len(args) < 3:  # non_blocking
            _waits.append("a copy")
        held_args, held_kwargs = tree_map_only(OnGPU, lambda each: each.held, (args, kwargs))
        if held_kwargs.get("device") is not None:
            held_kwargs["device"] = torch.device("cpu")
        result = func(*held_args, **held_kwargs)
        if func is torch.ops.aten.copy_.default and not isinstance(args[0], OnGPU):
            return args[0]
        return return_and_correct_aliasing(func, args, kwargs, tree_map_only(Tensor, OnGPU, result))


class _Up(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return OnGPU(tensor.detach().clone())

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        return grad_outputs[0].held


class _Down(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Any) -> Tensor:
        return tensor.held.detach().clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        return OnGPU(grad_outputs[0])


def _moved(tensor: Tensor, device: Any, *, non_blocking: bool = False) -> Tensor:
    if device is None or (torch.device(device).type == "cuda") == isinstance(tensor, OnGPU):
        return tensor
    if not non_blocking:
        _waits.append("a copy")
    return (_Down if isinstance(tensor, OnGPU) else _Up).apply(tensor)


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
    if device is not None and torch.device(device).type == "meta":
        return func(tensor, device, **kwargs)
    moved = _moved(tensor, device, non_blocking=non_blocking)
    copied = moved is not tensor and kwargs.pop("copy", False)
    return moved if copied or not (dtype or kwargs) else func(moved, dtype or moved.dtype, **kwargs)


def _set_data(target: Tensor, value: Tensor) -> None:
    """`target.data = value`, as moving a module does; the tensor stays who it is."""
    with torch.no_grad():
        new = value.detach()
        if not isinstance(target, nn.Parameter):
            return  # a gradient, which goes with the next step anyway
        new = nn.Parameter(new, target.requires_grad)
        gradient, target.grad = target.grad, None
        torch.utils.swap_tensors(target, new)
        target.grad = gradient


def _backward(loss: Tensor, gradient: Any = None, *rest: Any, **kwargs: Any) -> None:
    assert not rest
    with _Pretence():
        torch.autograd.backward(loss, gradient, **kwargs)


def _pinned(tensor: Tensor, *_: Any) -> Tensor:
    assert not isinstance(tensor, OnGPU), "only a CPU's memory is pinned"
    return tensor


def _made(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """A tensor made on the device that is named, if one is."""
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
    Tensor.is_pinned: lambda *_: False,
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
    with torch._C.DisableTorchFunctionSubclass():
        if isinstance(args[0] if args else None, OnGPU) and func is Tensor.numpy:
            return args[0].numpy()
        if func in _CALLS:
            return _CALLS[func](*args, **kwargs)
        if func is Tensor.to:
            return _to(func, *args, **kwargs)
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

    def query(self) -> bool:
        return True

    def elapsed_time(self, end_event: object) -> float:
        return 1.0


class Stream:
    """A queue without anything in it."""

    def __init__(self, *_: object) -> None: ...
    def record_event(self, *_: object) -> Event:
        return Event()

    def wait_stream(self, _other: "Stream") -> None: ...
    def wait_event(self, _event: Event) -> None: ...
    def synchronize(self) -> None:
        _waits.append("a queue")


_CAPTURE_CHECKS = [name for name in dir(torch.optim.Optimizer) if "graph_capture_health" in name]
_STREAM = Stream()
_CUDA: dict[str, Any] = {
    "is_available": lambda: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "set_device": lambda _device: None,
    "device": lambda _device: contextlib.nullcontext(),
    "synchronize": lambda *_: _waits.append("the device"),
    "get_device_capability": lambda *_: (8, 0),
    "get_device_name": lambda *_: "a pretended GPU",
    "max_memory_allocated": lambda *_: 2**30,
    "reset_peak_memory_stats": lambda *_: None,
    "empty_cache": lambda: None,
    "get_rng_state": lambda *_: torch.zeros(1, dtype=torch.uint8),
    "get_rng_state_all": lambda: [torch.zeros(1, dtype=torch.uint8)],
    "set_rng_state": lambda *_: None,
    "set_rng_state_all": lambda _states: None,
    "Event": Event,
    "Stream": Stream,
    "stream": lambda _stream: contextlib.nullcontext(),
    "current_stream": lambda *_: _STREAM,
    "default_stream": lambda *_: _STREAM,
}
_ACCELERATOR: dict[str, Any] = {
    "is_available": lambda: False,  # of which a loader asks, before it pins in a thread
    "current_device_index": lambda: 0,
    "current_stream": lambda *_: _STREAM,
}


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


@contextlib.contextmanager
def pretended_gpu() -> Iterator[list[str]]:
    """A context in which `cuda` is there; gives what a CPU waited for meanwhile, as it goes on."""
    _waits.clear()
    autocast, decode = torch.autocast.__init__, decoding.decode_jpeg

    def autocast_of_cpu(self: Any, device_type: str, **kwargs: Any) -> None:
        assert device_type != "cuda" or kwargs.get("dtype") or not kwargs.get("enabled", True)
        autocast(self, "cpu", **kwargs)

    def decode_jpegs(data: Any, *args: Any, device: Any = "cpu", **kwargs: Any) -> Any:
        found = decode(data, *args, **kwargs)
        return tree_map_only(Tensor, lambda each: each.to(device), found)

    changes: list[tuple[Any, str, Any]] = [
        *((torch.cuda, name, value) for name, value in _CUDA.items()),
        *((torch.accelerator, name, value) for name, value in _ACCELERATOR.items()),
        (torch.autocast, "__init__", autocast_of_cpu),
        (torch.inference_mode, "__enter__", _as_no_grad),
        (torch.inference_mode, "__exit__", lambda mode, *error: mode.pretended.__exit__(*error)),
        *((torch.optim.Optimizer, name, lambda _self: None) for name in _CAPTURE_CHECKS),
        (clip_grad, "_group_tensors_by_device_and_dtype", _grouped_there),
        (decoding, "decode_jpeg", decode_jpegs),
        (threading.Thread, "run", _within(threading.Thread.run)),
        (checkpoint, "_run_fn_with_dynamo_disabled", _within(_recompute)),
    ]
    with contextlib.ExitStack() as stack:
        for owner, name, value in changes:
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "'pin_memory' argument is set")  # nothing to pin for
        stack.enter_context(_Pretence())
        yield _waits


_group = clip_grad._group_tensors_by_device_and_dtype
_recompute = checkpoint._run_fn_with_dynamo_disabled
