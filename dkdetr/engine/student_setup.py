"""Puts around the student what computing asks for: DDP, recomputed activations, a compiler."""

import os
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from dkdetr.config import ComputeConfig
from dkdetr.engine.distributed import Ranks
from dkdetr.errors import UsageError
from dkdetr.student.detector import DKDETR


def prepare_student(student: DKDETR, config: ComputeConfig) -> None:
    """Makes the student, on its device, compute as the settings say; weights and names stay.

    Raises:
        UsageError: CUDA graphs are wanted where they cannot be recorded.
    """
    if config.activation_checkpointing:
        recompute_layers((*student.trunk.encoder.layers, *student.decoder.layers))
    if config.cuda_graphs:
        _check_graphs(student, config)
    if config.compile != "off":
        student.compile(backend=config.compile, **_compiler_words(student, config))


def _compiler_words(student: DKDETR, config: ComputeConfig) -> dict[str, Any]:
    if config.cuda_graphs:
        return {"mode": "reduce-overhead"}
    if config.compile == "inductor" and next(student.parameters()).device.type == "cpu":
        # There PyTorch 2.14's backward pass of a 1 x 1 convolution of stride 2 may crash, compiled
        # or not, where maps have their channels side by side, as inductor would lay them.
        return {"options": {"layout_optimization": False}}
    return {}


def recompute_layers(layers: Iterable[nn.Module]) -> None:
    """Lets layers forget their activations and compute them again in backward.

    The same gradients, dropout included, for about a third more time and much less memory.
    """
    for layer in layers:
        layer.forward = partial(_recomputed, layer.forward)


def wrap_for_ranks(module: nn.Module, ranks: Ranks) -> nn.Module:
    """Returns the module, in DDP where there are several ranks.

    Buffers are made equal once, here. After that frozen ones stand still, `sync_batch` moves them
    alike, and those of plain `batch` are each rank's own: what is saved are the first rank's.
    """
    if ranks.world_size == 1:
        return module
    devices = [ranks.device] if ranks.device.type == "cuda" else None
    wrapped = DistributedDataParallel(module, device_ids=devices, gradient_as_bucket_view=True)
    # Not as an argument: torch 2.13 renamed that, and the old name would skip the first time too.
    wrapped.broadcast_buffers = False
    return wrapped


def make_deterministic() -> None:
    """Lets torch use deterministic algorithms only; it raises where there is none.

    On CUDA the sampling of deformable attention goes by gathering then, which is slower.
    """
    # cuBLAS reads it when its first matrix is multiplied.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def _check_graphs(student: DKDETR, config: ComputeConfig) -> None:
    if config.compile != "inductor":
        raise UsageError("compute.cuda_graphs wants compute.compile=inductor, which records them")
    # A gradient lies in the graph's memory, which its next replay overwrites: those of several
    # micro-batches add up to something else, silently (pytorch #96693).
    if config.micro_batches > 1:
        raise UsageError("compute.cuda_graphs wants compute.micro_batches=1")
    device = student.trunk.level_embeddings.device
    if device.type != "cuda":
        raise UsageError(f"compute.cuda_graphs wants a GPU; this is '{device.type}'")


def _recomputed(forward: Any, *args: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args)
    return checkpoint(forward, *args, use_reentrant=False)
