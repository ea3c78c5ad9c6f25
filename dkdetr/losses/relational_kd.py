"""RKD: the KD features' similarities to each other imitate the teacher's (paper 3.3, Eq. 5)."""

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor
from torch.nn import functional

from dkdetr.losses.precision import at_least_float32

# Stands for minus infinity in a softmax: a row without any valid entry stays finite.
_NEVER = -1e9


def relational_loss(
    student_features: Float[Tensor, "groups num_regions embed_dim"],
    teacher_embeddings: Float[Tensor, "groups num_regions embed_dim"],
    valid: Bool[Tensor, "groups num_regions"],
    *,
    temperature: float,
) -> Float[Tensor, ""]:
    """Returns the sum over regions of KL(teacher's row || student's row) within each group.

    A row holds a region's cosine similarities to all regions of its group, itself included,
    divided by the temperature and turned into a distribution by softmax. The self-similarity is
    kept because softmax ignores shifts: it alone ties down the absolute level. To be divided by
    the number of regions. The printed Eq. 5 has a minus sign that would maximise the divergence
    (method A.6).

    A group is an image for the image-level loss; `as_one_group` makes the batch-level one.
    """
    unit = functional.normalize(at_least_float32(student_features), dim=-1)
    student = _row_log_softmax(unit, valid, temperature)
    with torch.no_grad():
        teacher = _row_log_softmax(teacher_embeddings.to(student.dtype), valid, temperature)
    terms = teacher.exp() * (teacher - student)
    pairs = valid[:, :, None] & valid[:, None, :]
    return torch.where(pairs, terms, 0.0).sum()


def as_one_group(
    per_image: Shaped[Tensor, "batch num_regions *rest"],
) -> Shaped[Tensor, "1 batch_times_regions *rest"]:
    """Returns the same rows as one group, so that relations reach across the batch."""
    return per_image.flatten(0, 1)[None]


def _row_log_softmax(unit: Tensor, valid: Tensor, temperature: float) -> Tensor:
    similarity = unit @ unit.transpose(1, 2) / temperature
    return similarity.masked_fill(~valid[:, None, :], _NEVER).log_softmax(-1)
