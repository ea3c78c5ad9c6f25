"""SKD: each KD feature is to be recognised as its own region's teacher embedding (paper 3.3)."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from dkdetr.losses.precision import NEVER, at_least_float32, unit_vectors


def semantic_bce_loss(
    student_features: Float[Tensor, "batch num_regions embed_dim"],
    teacher_embeddings: Float[Tensor, "batch num_regions embed_dim"],
    valid: Bool[Tensor, "batch num_regions"],
    *,
    scale: float | Float[Tensor, ""],
    bias: float | Float[Tensor, ""] = 0.0,
    duplicate_similarity: float = 0.0,
) -> Float[Tensor, ""]:
    """Returns the summed cross-entropy of "same object?" over the pairs of each image (Eq. 4).

    Pair (i, j) has the logit scale * cos(F_i, V_j) + bias; i = j is positive, the rest negative.
    Pairs with an empty place count nothing. To be divided by the number of regions, not of pairs:
    the negatives of an image weigh more the more regions it has, as in the paper.

    Note that perfect imitation is not the minimum: without a bias the negatives of a teacher
    whose embeddings all lie in one cone push the features out of it (method A.6).

    Args:
        student_features: not normalised.
        teacher_embeddings: of unit norm.
        valid: the filled places.
        scale: 1 / temperature; a tensor learns (arXiv 2303.15343).
        bias: 0 in the paper; a tensor learns.
        duplicate_similarity: pairs of regions whose embeddings' cosine is above it are no
            negatives; 0: all are.
    """
    similarity = _similarity(student_features, teacher_embeddings)
    terms = _same_object_entropy(similarity * scale + bias)
    counted = _counted_pairs(teacher_embeddings, valid, duplicate_similarity)
    return torch.where(counted, terms, 0.0).sum()


def semantic_centred_loss(
    student_features: Float[Tensor, "batch num_regions embed_dim"],
    teacher_embeddings: Float[Tensor, "batch num_regions embed_dim"],
    valid: Bool[Tensor, "batch num_regions"],
    *,
    teacher_mean: Float[Tensor, "embed_dim"],
    scale: float,
    bias: float = 0.0,
    duplicate_similarity: float = 0.0,
) -> Float[Tensor, ""]:
    """Returns `semantic_bce_loss` of what is left of unit vectors when a common mean is taken off.

    Both sides lose the same constant vector and are normalised again: pairs of the teacher's then
    have cosines about 0, so that imitation is close to the minimum. Duplicates are told by
    the teacher's embeddings as they were.

    Args:
        student_features: not normalised.
        teacher_embeddings: of unit norm.
        valid: the filled places.
        teacher_mean: the mean of the teacher's embeddings over the cache.
        scale: 1 / temperature.
        bias: added to every logit.
        duplicate_similarity: as in `semantic_bce_loss`.
    """
    student = unit_vectors(student_features)
    mean = teacher_mean.to(student.dtype)
    centred = functional.normalize(teacher_embeddings.to(student.dtype) - mean, dim=-1)
    terms = _same_object_entropy(_similarity(student - mean, centred) * scale + bias)
    counted = _counted_pairs(teacher_embeddings, valid, duplicate_similarity)
    return torch.where(counted, terms, 0.0).sum()


def semantic_infonce_loss(
    student_features: Float[Tensor, "batch num_regions embed_dim"],
    teacher_embeddings: Float[Tensor, "batch num_regions embed_dim"],
    valid: Bool[Tensor, "batch num_regions"],
    *,
    temperature: float,
    duplicate_similarity: float = 0.0,
) -> Float[Tensor, ""]:
    """Returns the sum over regions of the symmetric cross-entropy "which one?" in each image.

    Half is the student's feature among the teacher's embeddings, half the other way round. Shifts
    of all similarities change nothing, so that a cone costs nothing: but neither is the absolute
    level learned. To be divided by the number of regions.
    """
    similarity = _similarity(student_features, teacher_embeddings) / temperature
    counted = _counted_pairs(teacher_embeddings, valid, duplicate_similarity)
    logits = similarity.masked_fill(~counted, NEVER)
    which_embedding = logits.log_softmax(2).diagonal(dim1=1, dim2=2)
    which_feature = logits.log_softmax(1).diagonal(dim1=1, dim2=2)
    return torch.where(valid, -(which_embedding + which_feature) / 2, 0.0).sum()


def semantic_l1_loss(
    student_features: Float[Tensor, "batch num_regions embed_dim"],
    teacher_embeddings: Float[Tensor, "batch num_regions embed_dim"],
    valid: Bool[Tensor, "batch num_regions"],
) -> Float[Tensor, ""]:
    """Returns the summed distance sum_d |F_id - V_id| of unit vectors (Eq. 3).

    To be divided by the number of regions.
    """
    student = unit_vectors(student_features)
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
    similarity = _similarity(student_features, teacher_embeddings)
    own = similarity.diagonal(dim1=1, dim2=2)
    counts = valid.sum(-1, keepdim=True).clamp(min=1)
    mean = torch.where(valid[:, None, :], similarity, 0.0).sum(-1) / counts
    return torch.where(valid, own - mean, 0.0).sum() / valid.sum().clamp(min=1)


def _similarity(student_features: Tensor, teacher_embeddings: Tensor) -> Tensor:
    student = unit_vectors(student_features)
    return student @ teacher_embeddings.to(student.dtype).transpose(1, 2)


def _same_object_entropy(logits: Tensor) -> Tensor:
    same = torch.eye(logits.shape[-1], dtype=logits.dtype, device=logits.device)
    return functional.binary_cross_entropy_with_logits(
        logits, same.expand_as(logits), reduction="none"
    )


def _counted_pairs(embeddings: Tensor, valid: Tensor, duplicate_similarity: float) -> Tensor:
    """Returns which pairs take part: both filled, and either the same or not duplicates."""
    pairs = valid[:, :, None] & valid[:, None, :]
    if duplicate_similarity == 0:
        return pairs
    embeddings = at_least_float32(embeddings)
    alike = embeddings @ embeddings.transpose(1, 2) > duplicate_similarity
    own = torch.eye(alike.shape[-1], dtype=torch.bool, device=alike.device)
    return pairs & (own | ~alike)
