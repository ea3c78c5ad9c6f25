"""The precision that losses are computed in."""

import torch
from jaxtyping import Float
from torch import Tensor


def at_least_float32(tensor: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Returns the tensor in float32, or as it is where it is wider already.

    Half precision must not reach a loss, and a float64 reference must not be rounded on its way.
    """
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
