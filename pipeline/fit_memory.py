"""Whether a GPU can hold what `fit`'s encoder keeps for its backward pass.

What is learned does not depend on the answer: layers computed twice have the same gradients.
"""

from math import ceil

import torch

from dkdetr.config import ExperimentConfig
from dkdetr.student.attention_backend import picks_triton

_SHARE = 0.5
"""The encoder's part of free memory: the backbone keeps more than half as much again."""


def wants_recomputing(config: ExperimentConfig, num_images: int, device: torch.device) -> bool:
    """Returns True if encoder layers shall be computed again in backward.

    Args:
        config: of the network; where it says so, they are.
        num_images: at once.
        device: where it is trained. On a GPU, its free memory decides too.
    """
    if config.compute.activation_checkpointing:
        return True
    if device.type != "cuda":
        return False
    free, _ = torch.cuda.mem_get_info(device)
    student = config.student
    dims = (student.num_heads, student.embed_dim // student.num_heads, _levels(config),
            student.num_points)  # fmt: skip
    kernel = picks_triton(config.ops.backend, device, torch.float32, dims)
    return num_images * encoder_bytes(config, kernel=kernel) > _SHARE * free


def encoder_bytes(config: ExperimentConfig, *, kernel: bool) -> int:
    """Returns about how many bytes the encoder keeps of an image for backward, in float32.

    Args:
        config: of the network.
        kernel: attention goes by the Triton kernel. Plain PyTorch keeps every sampled value.
    """
    student, side = config.student, config.data.image_size
    stages = student.backbone.stages
    further = range(stages[-1] + 1, stages[-1] + 1 + student.backbone.extra_levels)
    num_tokens = sum(ceil(side / 2**stage) ** 2 for stage in (*stages, *further))
    # Of a layer: two floats of the inner width and a byte of dropout's mask; eight of the outer.
    a_token = 9 * student.ffn_dim + 32 * student.embed_dim
    if not kernel:
        a_token += 4 * _levels(config) * student.num_points * student.embed_dim
    return a_token * num_tokens * student.num_encoder_layers


def _levels(config: ExperimentConfig) -> int:
    backbone = config.student.backbone
    return len(backbone.stages) + backbone.extra_levels
