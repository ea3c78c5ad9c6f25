"""The precision that losses are computed in."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

NEVER = -1e9
"""Stands for minus infinity in a softmax: a row without any valid entry stays finite."""


def at_least_float32(tensor: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Returns the tensor in float32, or as it is where it is wider already.

    Half precision must not reach a loss, and a float64 reference must not be rounded on its way.
    """
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def unit_vectors(features: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Returns the last axis's vectors with norm 1, in float32 at least."""
    return functional.normalize(at_least_float32(features), dim=-1)
