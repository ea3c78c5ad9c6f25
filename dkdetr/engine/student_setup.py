"""Puts around the student what computing asks for: DDP, recomputed activations, a compiler."""

import os
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from dkdetr.config import ComputeConfig
from dkdetr.engine.distributed import Ranks
from dkdetr.student.detector import DKDETR


def prepare_student(student: DKDETR, config: ComputeConfig) -> None:
    """Makes the student compute as the settings say; its weights and their names stay."""
    if config.activation_checkpointing:
        recompute_layers(student)
    if config.compile != "off":
        student.compile(backend=config.compile)


def recompute_layers(student: DKDETR) -> None:
    """Lets encoder and decoder layers forget their activations and compute them again in backward.

    The same gradients, dropout included, for about a third more time and much less memory.
    """
    for layer in (*student.trunk.encoder.layers, *student.decoder.layers):
        layer.forward = partial(_recomputed, layer.forward)


def wrap_for_ranks(student: DKDETR, ranks: Ranks) -> nn.Module:
    """Returns the student, in DDP where there are several ranks."""
    if ranks.world_size == 1:
        return student
    devices = [ranks.device] if ranks.device.type == "cuda" else None
    return DistributedDataParallel(student, device_ids=devices)


def make_deterministic() -> None:
    """Lets torch use deterministic algorithms only; it raises where there is none.

    On CUDA the sampling of deformable attention goes by gathering then, which is slower.
    """
    # cuBLAS reads it when its first matrix is multiplied.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def _recomputed(forward: Any, *args: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args)
    return checkpoint(forward, *args, use_reentrant=False)
