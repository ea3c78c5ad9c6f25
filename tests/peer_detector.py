"""transformers' Deformable DETR of our shape: the peer of parity tests and benchmarks."""

from typing import Any

import transformers
from torch import nn


def two_stage_deformable_detr(**sizes: Any) -> nn.Module:
    """Returns it with random weights: two stages, box refinement, ResNet-50, without CUDA kernels.

    Args:
        sizes: of `transformers.DeformableDetrConfig`.
    """
    return transformers.DeformableDetrForObjectDetection(
        transformers.DeformableDetrConfig(
            backbone_config=transformers.TimmBackboneConfig(
                backbone="resnet50", out_indices=[2, 3, 4], use_pretrained_backbone=False
            ),
            two_stage=True,
            with_box_refine=True,
            tie_word_embeddings=False,
            disable_custom_kernels=True,
            **sizes,
        )
    )
