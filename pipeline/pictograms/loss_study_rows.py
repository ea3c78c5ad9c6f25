"""The rows of the study of losses: which there are, and which of them are asked for."""

from collections.abc import Sequence
from dataclasses import dataclass

TEMPERATURE = 0.05
_SPACES = ("plain", "cone", "dim32", "dim512")


@dataclass(frozen=True)
class Recipe:
    """A row: weights of the losses (0: off), SKD's kind, bias and temperature."""

    name: str
    skd: str = "bce"
    skd_weight: float = 0.0
    skd_bias: float = 0.0
    rkd_weight: float = 0.0
    temperature: float = TEMPERATURE


def recipes(skd_bias: float) -> list[Recipe]:
    """Returns the rows: every loss over the same factors of its weight, five steps of about 3.

    Without a bias there is no `bce_biased`, which would be `bce` again. `sharp` is BCE at a
    temperature of .02 (bias in proportion), where it still pulls at features that are already half
    turned to their embeddings.
    """
    rows = [Recipe("none")]
    steps = (0.03, 0.1, 0.3, 1.0, 3.0)
    for name, kind in (("bce", "bce"), ("l1", "l1"), ("infonce", "infonce")):
        rows += [Recipe(name, kind, w) for w in steps]
    if skd_bias:
        rows += [Recipe("bce_biased", "bce", w, skd_bias) for w in steps]
    rows += [Recipe("sharp", "bce", w, 2.5 * skd_bias, temperature=0.02) for w in steps]
    rows += [Recipe("rkd", rkd_weight=10 * w) for w in steps]
    pairs = [(w, 10 * v) for w in (0.3, 1.0) for v in (0.3, 1.0)]
    rows += [Recipe("bce+rkd", "bce", w, skd_bias, v) for w, v in pairs]
    rows += [Recipe("l1+rkd", "l1", w, 0.0, v) for w, v in pairs]
    return rows


def selected(
    names: Sequence[str],
    losses: Sequence[str] | None,
    weights: Sequence[float] | None,
    skd_bias: float | None,
) -> list[tuple[str, float, Recipe]]:
    """Returns each row to run as its space, the classifier's bias there and its recipe.

    Args:
        names: of spaces.
        losses: names of recipes; None: all.
        weights: of SKD; None: all.
        skd_bias: of SKD's rows in every space; None: the classifier's, 0 with cones and -4 without.

    Raises:
        ValueError: an unknown name, or a space of which no row is left.
    """
    known = {recipe.name for recipe in recipes(-4.0)}
    for kind, asked, choices in (("space", names, _SPACES), ("loss", losses or (), known)):
        if unknown := sorted(set(asked) - set(choices)):
            raise ValueError(f"no {kind} '{unknown[0]}'; there are {', '.join(sorted(choices))}")
    rows: list[tuple[str, float, Recipe]] = []
    for name in names:
        bias = 0.0 if name == "cone" else -4.0
        of_skd = recipes(bias if skd_bias is None else skd_bias)
        missing = sorted(set(losses or ()) - {recipe.name for recipe in of_skd})
        if missing:
            raise ValueError(f"'{missing[0]}' in space '{name}' is 'bce' again: add --skd-bias -4")
        chosen = [recipe for recipe in of_skd
                  if (losses is None or recipe.name in losses)
                  and (weights is None or recipe.skd_weight in weights)]  # fmt: skip
        if not chosen:
            raise ValueError(f"--losses and --weights leave no row in space '{name}'")
        rows += [(name, bias, recipe) for recipe in chosen]
    return rows
