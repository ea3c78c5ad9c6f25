"""Whether a GPU can hold what `fit`'s encoder keeps for its backward pass.

What is learned does not depend on the answer: layers computed twice have the same gradients.
"""

from math import ceil

import torch

from dkdetr.config import ExperimentConfig

_SHARE = 0.6
"""The encoder's part of free memory: the backbone keeps nearly half as much again."""


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
    return num_images * encoder_bytes(config) > _SHARE * free


def encoder_bytes(config: ExperimentConfig) -> int:
    """Returns about how many bytes the encoder keeps of an image for backward.

    In float32 and with the Triton kernel; plain PyTorch's attention keeps nearly as much again.
    """
    student, side = config.student, config.data.image_size
    stages = student.backbone.stages
    further = range(stages[-1] + 1, stages[-1] + 1 + student.backbone.extra_levels)
    num_tokens = sum(ceil(side / 2**stage) ** 2 for stage in (*stages, *further))
    a_token = 3 * student.ffn_dim + 8 * student.embed_dim  # floats a layer
    return 4 * a_token * num_tokens * student.num_encoder_layers
