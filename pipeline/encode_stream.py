"""Crops through the teacher in batches of fixed composition, and how busy that keeps its device.

Batches are launched ahead of the ones whose rows are fetched, so that a GPU has its next batch in
the queue while the CPU cuts, combines and hands on.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

_IN_FLIGHT = 2
Encode = Callable[[Tensor], Tensor]
"""Crops [batch, 3, h, w] to features [batch, embed_dim] on the same device, float32."""


def embed_stream(
    stacks: Iterable[UInt8[Tensor, "_ 3 crop_height crop_width"]],
    encode: Encode,
    *,
    batch_size: int,
) -> Iterator[Float[np.ndarray, "_ embed_dim"]]:
    """Yields each stack's features, in order, computed in batches of exactly `batch_size`.

    Batches run across stacks and the last one is padded with black, so that a crop's batch, and
    with it every bit of its embedding, depends on the stacks alone (an encoder's output changes
    in the last digits with the batch's size and a row's place in it).

    Args:
        stacks: crops, a stack for each picture; a stack may be empty, but not all of them.
        encode: see `Encode`.
        batch_size: crops at once.
    """
    waiting: deque[int] = deque()  # sizes of stacks not yet yielded
    crops: list[Tensor] = []
    num_crops = 0
    launched: deque[_Rows] = deque()
    ready = _Ready()
    for stack in stacks:
        waiting.append(len(stack))
        crops.append(stack)
        num_crops += len(stack)
        while num_crops >= batch_size:
            joined = torch.cat(crops) if len(crops) > 1 else crops[0]
            launched.append(_Rows(encode(joined[:batch_size])))
            crops, num_crops = [joined[batch_size:]], num_crops - batch_size
            if len(launched) > _IN_FLIGHT:
                ready.add(launched.popleft().fetch())
        while waiting and ready.has(waiting[0]):
            yield ready.take(waiting.popleft())
    if num_crops:
        last = torch.cat(crops)
        padding = last.new_zeros((batch_size - num_crops, *last.shape[1:]))
        launched.append(_Rows(encode(torch.cat((last, padding)))[:num_crops]))
    for rows in launched:
        ready.add(rows.fetch())
    for size in waiting:
        yield ready.take(size)


class _Rows:
    """Features on their way to the CPU; the copy is queued behind their own batch, not later ones.

    Args:
        features: [batch, embed_dim], perhaps still being computed.
    """

    def __init__(self, features: Tensor) -> None:
        self._event = None
        self._rows = features
        if features.is_cuda:
            self._rows = torch.empty(features.shape, dtype=features.dtype, pin_memory=True)
            self._rows.copy_(features, non_blocking=True)
            # By name: the current device may be another one, whose stream is idle.
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(features.device))

    def fetch(self) -> np.ndarray:
        if self._event is not None:
            self._event.synchronize()
        return self._rows.numpy()


class _Ready:
    """Rows in order, put in by batches and taken out by stacks."""

    def __init__(self) -> None:
        self._parts: list[np.ndarray] = []
        self._count = 0

    def has(self, size: int) -> bool:
        return bool(self._parts) and size <= self._count

    def add(self, rows: np.ndarray) -> None:
        self._parts.append(rows)
        self._count += len(rows)

    def take(self, size: int) -> np.ndarray:
        joined = np.concatenate(self._parts)
        self._parts, self._count = [joined[size:]], self._count - size
        return joined[:size]


class BusyClock:
    """How long the encoder computes: by CUDA events on a GPU, by the clock around it elsewhere.

    Args:
        device: the encoder's.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._on_gpu = device.type == "cuda"
        self._spans: list[tuple[Any, Any]] = []

    def around(self, encode: Encode) -> Encode:
        """Returns the same function, measured."""

        def measured(crops: Tensor) -> Tensor:
            begun = self._now()
            features = encode(crops)
            self._spans.append((begun, self._now()))
            return features

        return measured

    def seconds(self) -> float:
        """Returns the sum so far; on a GPU everything launched must be finished."""
        if self._on_gpu:
            return sum(begun.elapsed_time(ended) for begun, ended in self._spans) / 1000
        return sum(ended - begun for begun, ended in self._spans)

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event
