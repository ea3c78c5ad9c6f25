"""A GPU that is only pretended: its tensors say `cuda:0`, their numbers are a CPU's.

Whole commands run on it by `--device cuda` where there is no GPU. Refused as by CUDA: operators
over tensors of both devices (indices from the CPU, too, for which CUDA would wait), `numpy()` of a
GPU's tensor, a CPU's autocast. What a CPU would wait for is noted, and what a copy brings down is
not there before somebody waits for it. Triton finds no driver, as on a machine without one, and
what falls back for that does so. Nobody looks into a backward pass. Not pretended: other
processes, queues that run side by side, generators, NCCL, torch.compile, a GPU's rounding and
memory formats (all is contiguous).
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.utils import clip_grad
from torch.optim import optimizer
from torch.utils import checkpoint
from torch.utils._pytree import tree_map_only

from pipeline import decoding
from tests.pretended_tensor import (
    GPU,
    OnGPU,
    Pretence,
    arrive,
    late,
    moved,
    wait_for,
    waits,
)


class Event(torch.cuda.Event):
    """An event that has passed; copies before it are there once it is awaited."""

    before: list[tuple[Tensor, Tensor]] | tuple[()] = ()

    def record(self, stream: object = None) -> None:
        self.before = list(late)

    def synchronize(self) -> None:
        waits.append("an event")
        arrive(self.before)

    def elapsed_time(self, end_event: object) -> float:
        return 1.0


class Stream:
    """A queue without anything in it."""

    def __init__(self, *_: object) -> None: ...
    def record_event(self, *_: object) -> Event:
        event = Event()
        event.record()
        return event

    def synchronize(self) -> None:
        wait_for("a queue")


_CAPTURE_CHECKS = [name for name in dir(torch.optim.Optimizer) if "graph_capture_health" in name]
_STREAM = Stream()
_CUDA: dict[str, Any] = {
    "is_available": lambda: True,
    "device_count": lambda: 1,
    "set_device": lambda _device: None,
    "device": lambda _device: contextlib.nullcontext(),
    "synchronize": lambda *_: wait_for("the device"),
    "get_device_capability": lambda *_: (8, 0),
    "get_device_name": lambda *_: "a pretended GPU",
    "max_memory_allocated": lambda *_: 2**30,
    "mem_get_info": lambda *_: (2**34, 2**34),
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
        with Pretence():
            return run(*args, **kwargs)

    return pretended


def _as_no_grad(mode: Any) -> None:
    """Inference mode would want versions of tensors that wrapped ones do not have."""
    mode.pretended = torch.no_grad() if mode.mode else contextlib.nullcontext()
    mode.pretended.__enter__()


def _grouped_there(*args: Any, **kwargs: Any) -> Any:
    """Tensors by device and type, as clipping and optimisers ask for them: of code told `cpu`."""
    found = _group(*args, **kwargs)
    return {
        (GPU if isinstance(lists[0][0], OnGPU) else device, dtype): (lists, places)
        for (device, dtype), (lists, places) in found.items()
    }


def _decoded(data: Any, *args: Any, device: Any = "cpu", **kwargs: Any) -> Any:
    return tree_map_only(Tensor, lambda each: moved(each, device), _decode(data, *args, **kwargs))


_GROUPING: tuple[Any, ...] = (clip_grad, optimizer)
_group = _GROUPING[0]._group_tensors_by_device_and_dtype
_recompute = checkpoint._run_fn_with_dynamo_disabled
_decode = decoding.decode_jpeg


@contextlib.contextmanager
def pretended_gpu() -> Iterator[list[str]]:
    """A context in which `cuda` is there; gives what a CPU waited for meanwhile, as it goes on."""
    waits.clear()
    late.clear()
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
        *((who, "_group_tensors_by_device_and_dtype", _grouped_there) for who in _GROUPING),
        (decoding, "decode_jpeg", _decoded),
        (threading.Thread, "run", _within(threading.Thread.run)),
        (checkpoint, "_run_fn_with_dynamo_disabled", _within(_recompute)),
    ]
    with contextlib.ExitStack() as stack:
        for owner, name, value in changes:
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(Pretence())
        yield waits
