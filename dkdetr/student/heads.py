"""The heads: boxes by a small MLP, classes by cosine similarity to text embeddings."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from dkdetr.structures import SkdCalibration


class BoxHead(nn.Module):
    """Three linear layers that give a change of (cx, cy, w, h) before the sigmoid.

    The last one starts at zero, so that a refined box starts as its anchor.
    """

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(embed_dim, embed_dim)
        self.linear2 = nn.Linear(embed_dim, embed_dim)
        self.linear3 = nn.Linear(embed_dim, 4)
        nn.init.zeros_(self.linear3.weight)
        nn.init.zeros_(self.linear3.bias)

    def forward(self, x: Float[Tensor, "*batch embed_dim"]) -> Float[Tensor, "*batch 4"]:
        """Returns the changes, float32 whatever the precision around."""
        with torch.autocast(device_type=x.device.type, enabled=False):
            x = x.to(self.linear1.weight.dtype)
            return self.linear3(self.linear2(self.linear1(x).relu()).relu())


class TextClassifier(nn.Module):
    """One decoder layer's projection to the teacher's space and its optional logit bias.

    Args:
        embed_dim: width of the queries.
        text_dim: width of the text embeddings.
        temperature: divides the cosine.
        bias_init: start of a learnable logit bias; None: no bias (the paper).
    """

    def __init__(
        self, embed_dim: int, text_dim: int, *, temperature: float, bias_init: float | None
    ) -> None:
        super().__init__()
        self.projection = nn.Linear(embed_dim, text_dim)
        self.temperature = temperature
        self.bias = None if bias_init is None else nn.Parameter(torch.tensor(float(bias_init)))

    def project(
        self, queries: Float[Tensor, "*batch embed_dim"]
    ) -> Float[Tensor, "*batch text_dim"]:
        """Returns the queries' features in the teacher's space, not normalised, float32."""
        with torch.autocast(device_type=queries.device.type, enabled=False):
            return self.projection(queries.to(self.projection.weight.dtype))

    def logits(
        self,
        features: Float[Tensor, "*batch text_dim"],
        text_embeddings: Float[Tensor, "num_classes text_dim"],
    ) -> Float[Tensor, "*batch num_classes"]:
        """Returns cos(features, text) / temperature (+ bias), before the sigmoid.

        Args:
            features: from `project`.
            text_embeddings: unit vectors, one a class.
        """
        with torch.autocast(device_type=features.device.type, enabled=False):
            text = text_embeddings.to(features.dtype)
            logits = functional.normalize(features, dim=-1) @ text.T / self.temperature
            return logits if self.bias is None else logits + self.bias


class SimilarityCalibration(nn.Module):
    """A learnable scale and bias of the similarity logits of SKD (SigLIP, arXiv 2303.15343).

    The scale is stored as its logarithm, so that it stays positive.
    """

    def __init__(self, *, temperature: float, bias: float) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(-math.log(temperature)))
        self.bias = nn.Parameter(torch.tensor(float(bias)))

    def forward(self) -> SkdCalibration:
        """Returns what logit = scale * cos + bias is made with."""
        return SkdCalibration(scale=self.log_scale.exp(), bias=self.bias)
