"""RKD: the KD features' similarities to each other imitate the teacher's (paper 3.3, Eq. 5)."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dkdetr.losses.precision import NEVER, unit_vectors


@dataclass(frozen=True)
class RelatedRegions:
    """Regions of several images laid end to end, as rows or columns of a map of relations."""

    features: Float[Tensor, "num_regions embed_dim"]
    """The student's, of unit norm."""
    embeddings: Float[Tensor, "num_regions embed_dim"]
    """The teacher's, of unit norm."""
    valid: Bool[Tensor, "num_regions"]
    image: Int[Tensor, "num_regions"]
    """A number that regions of one image share, unlike over all ranks."""


def relational_loss(
    student_features: Float[Tensor, "groups num_regions embed_dim"],
    teacher_embeddings: Float[Tensor, "groups num_regions embed_dim"],
    valid: Bool[Tensor, "groups num_regions"],
    *,
    temperature: float,
    include_self: bool = True,
    reverse: bool = False,
) -> Float[Tensor, ""]:
    """Returns the sum over regions of KL(teacher's row || student's row) within each group.

    A row holds a region's cosine similarities to all regions of its group, itself included,
    divided by the temperature and turned into a distribution by softmax. The self-similarity is
    kept because softmax ignores shifts: it alone ties down the absolute level. To be divided by
    the number of regions. The printed Eq. 5 has a minus sign that would maximise the divergence
    (method A.6). A group is an image.

    Args:
        student_features: not normalised.
        teacher_embeddings: of unit norm.
        valid: the filled places.
        temperature: divides the similarities.
        include_self: whether a row holds the self-similarity.
        reverse: the divergence the other way round, KL(student || teacher).
    """
    unit = unit_vectors(student_features)
    allowed = valid[:, :, None] & valid[:, None, :]
    if not include_self:
        own = torch.eye(valid.shape[1], dtype=torch.bool, device=valid.device)
        allowed = allowed & ~own
    likeness = unit @ unit.mT
    with torch.no_grad():
        teacher = teacher_embeddings.to(unit.dtype)
        wanted = teacher @ teacher.mT
    return _divergence(likeness, wanted, allowed, temperature, reverse=reverse)


def batch_relational_loss(
    rows: RelatedRegions,
    columns: RelatedRegions,
    *,
    first_column: int,
    temperature: float,
    include_self: bool = True,
    cross_only: bool = False,
    reverse: bool = False,
) -> Float[Tensor, ""]:
    """Returns the same sum for relations that reach across images, and across ranks if gathered.

    Row i is column `first_column + i`. The rows are this rank's own, so that the sum of the
    ranks' values is the value of the whole map.

    Args:
        rows: this rank's regions.
        columns: the regions to relate them to: the same, or those of all ranks.
        first_column: where the rows lie among the columns.
        temperature: divides the similarities.
        include_self: whether a row holds the self-similarity.
        cross_only: leave out the other regions of a row's own image.
        reverse: KL(student || teacher).
    """
    own = torch.zeros(
        len(rows.valid), len(columns.valid), dtype=torch.bool, device=rows.valid.device
    )
    own.diagonal(first_column)[: len(rows.valid)] = True
    allowed = rows.valid[:, None] & columns.valid[None, :]
    if cross_only:
        allowed = allowed & (own | (rows.image[:, None] != columns.image[None, :]))
    if not include_self:
        allowed = allowed & ~own
    likeness = rows.features @ columns.features.mT
    with torch.no_grad():
        dtype = likeness.dtype
        wanted = rows.embeddings.to(dtype) @ columns.embeddings.to(dtype).mT
    return _divergence(likeness, wanted, allowed, temperature, reverse=reverse)


def lay_end_to_end(
    student_features: Float[Tensor, "batch num_regions embed_dim"],
    teacher_embeddings: Float[Tensor, "batch num_regions embed_dim"],
    valid: Bool[Tensor, "batch num_regions"],
    *,
    first_image: int = 0,
) -> RelatedRegions:
    """Returns the regions of a batch as one list; its images are numbered from `first_image`."""
    batch, num_regions = valid.shape
    image = torch.arange(first_image, first_image + batch, device=valid.device)
    return RelatedRegions(
        features=unit_vectors(student_features).flatten(0, 1),
        embeddings=teacher_embeddings.flatten(0, 1),
        valid=valid.flatten(),
        image=image.repeat_interleave(num_regions),
    )


def _divergence(
    likeness: Tensor, wanted: Tensor, allowed: Tensor, temperature: float, *, reverse: bool
) -> Tensor:
    """Returns the summed divergence of rows of similarities from the wanted ones' rows."""
    said, wanted = (
        (similarity / temperature).masked_fill(~allowed, NEVER).log_softmax(-1)
        for similarity in (likeness, wanted)
    )
    terms = said.exp() * (said - wanted) if reverse else wanted.exp() * (wanted - said)
    return torch.where(allowed, terms, 0.0).sum()
