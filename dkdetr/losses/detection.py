"""Detection losses: terms and their sums, to be divided by the criterion."""

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from dkdetr.boxes import cxcywh_to_xyxy, elementwise_giou


def focal_terms(
    logits: Float[Tensor, "*shape"],
    targets: Float[Tensor, "*shape"],
    *,
    alpha: float,
    gamma: float,
    weights: Float[Tensor, "*#shape"] | None = None,
) -> Float[Tensor, "*shape"]:
    """Returns the sigmoid focal loss of each logit (arXiv 1708.02002, Eq. 5).

    Args:
        logits: before the sigmoid, float32 or wider.
        targets: 0 or 1.
        alpha: share of the positives; the negatives get 1 - alpha.
        gamma: how strongly easy examples fade.
        weights: factor of each term; 0 leaves it out.
    """
    cross_entropy = functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    probability = logits.sigmoid()
    miss = probability + targets - 2 * probability * targets  # 1 - p of the true answer
    share = alpha * targets + (1 - alpha) * (1 - targets)
    terms = share * miss**gamma * cross_entropy
    return terms if weights is None else terms * weights


def focal_loss(
    logits: Float[Tensor, "*shape"],
    targets: Float[Tensor, "*shape"],
    *,
    alpha: float,
    gamma: float,
    weights: Float[Tensor, "*#shape"] | None = None,
) -> Float[Tensor, ""]:
    """Returns the sum of `focal_terms`."""
    return focal_terms(logits, targets, alpha=alpha, gamma=gamma, weights=weights).sum()


def box_l1_terms(
    boxes_cxcywh: Float[Tensor, "*shape 4"], targets_cxcywh: Float[Tensor, "*#shape 4"]
) -> Float[Tensor, "*shape"]:
    """Returns the absolute differences of normalised coordinates, summed for each box."""
    return (boxes_cxcywh - targets_cxcywh).abs().sum(-1)


def box_giou_terms(
    boxes_cxcywh: Float[Tensor, "*shape 4"], targets_cxcywh: Float[Tensor, "*#shape 4"]
) -> Float[Tensor, "*shape"]:
    """Returns 1 - generalised IoU of each pair."""
    return 1 - elementwise_giou(cxcywh_to_xyxy(boxes_cxcywh), cxcywh_to_xyxy(targets_cxcywh))


def box_l1_loss(
    boxes_cxcywh: Float[Tensor, "num_pairs 4"], targets_cxcywh: Float[Tensor, "num_pairs 4"]
) -> Float[Tensor, ""]:
    """Returns the sum of `box_l1_terms`."""
    return box_l1_terms(boxes_cxcywh, targets_cxcywh).sum()


def box_giou_loss(
    boxes_cxcywh: Float[Tensor, "num_pairs 4"], targets_cxcywh: Float[Tensor, "num_pairs 4"]
) -> Float[Tensor, ""]:
    """Returns the sum of `box_giou_terms`."""
    return box_giou_terms(boxes_cxcywh, targets_cxcywh).sum()
