"""SKD: each KD feature is to be recognised as its own region's teacher embedding (paper 3.3)."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from dkdetr.losses.precision import at_least_float32


def semantic_bce_loss(
    student_features: Float[Tensor, "batch num_regions embed_dim"],
    teacher_embeddings: Float[Tensor, "batch num_regions embed_dim"],
    valid: Bool[Tensor, "batch num_regions"],
    *,
    temperature: float,
    bias: float = 0.0,
) -> Float[Tensor, ""]:
    """Returns the summed cross-entropy of "same object?" over the pairs of each image (Eq. 4).

    Pair (i, j) has the logit cos(F_i, V_j) / temperature + bias; i = j is positive, the rest
    negative. Pairs with an empty place count nothing. To be divided by the number of regions,
    not of pairs: the negatives of an image weigh more the more regions it has, as in the paper.

    Note that perfect imitation is not the minimum: without a bias the negatives of a teacher
    whose embeddings all lie in one cone push the features out of it (method A.6).
    """
    student = functional.normalize(at_least_float32(student_features), dim=-1)
    similarity = student @ teacher_embeddings.to(student.dtype).transpose(1, 2)
    same = torch.eye(similarity.shape[-1], dtype=similarity.dtype, device=similarity.device)
    terms = functional.binary_cross_entropy_with_logits(
        similarity / temperature + bias, same.expand_as(similarity), reduction="none"
    )
    pairs = valid[:, :, None] & valid[:, None, :]
    return torch.where(pairs, terms, 0.0).sum()


def semantic_l1_loss(
    student_features: Float[Tensor, "batch num_regions embed_dim"],
    teacher_embeddings: Float[Tensor, "batch num_regions embed_dim"],
    valid: Bool[Tensor, "batch num_regions"],
) -> Float[Tensor, ""]:
    """Returns the summed distance sum_d |F_id - V_id| of unit vectors (Eq. 3).

    To be divided by the number of regions.
    """
    student = functional.normalize(at_least_float32(student_features), dim=-1)
    distance = (student - teacher_embeddings.to(student.dtype)).abs().sum(-1)
    return torch.where(valid, distance, 0.0).sum()


@torch.no_grad()
def alignment_margin(
    student_features: Float[Tensor, "batch num_regions embed_dim"],
    teacher_embeddings: Float[Tensor, "batch num_regions embed_dim"],
    valid: Bool[Tensor, "batch num_regions"],
) -> Float[Tensor, ""]:
    """Returns the mean of cos(F_i, V_i) - mean over j of cos(F_i, V_j), j in the same image.

    What SKD works for, in a form that does not depend on the loss: 0 means that the features
    tell the regions of an image apart no better than chance.
    """
    student = functional.normalize(at_least_float32(student_features), dim=-1)
    similarity = student @ teacher_embeddings.to(student.dtype).transpose(1, 2)
    own = similarity.diagonal(dim1=1, dim2=2)
    counts = valid.sum(-1, keepdim=True).clamp(min=1)
    mean = torch.where(valid[:, None, :], similarity, 0.0).sum(-1) / counts
    return torch.where(valid, own - mean, 0.0).sum() / valid.sum().clamp(min=1)
