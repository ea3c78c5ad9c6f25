"""Text banks of other projects: a matrix of name embeddings, in whatever orientation it came.

opera and DetPro keep (names, dim) in .pt; Detic the same in .npy, un-normalised half floats; ViLD
(dim, names) in .npy, some with a row more for the background.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float

from dkdetr.data.annotations import Category
from dkdetr.data.vocabulary import Vocabulary
from dkdetr.errors import MismatchError, UsageError
from pipeline.foreign_tensors import load_matrix, unit_rows

Background = Literal["first", "last"]


def read_text_bank(
    path: Path,
    num_names: int,
    *,
    embed_dim: int | None = None,
    background: Background | None = None,
) -> Float[np.ndarray, "num_names embed_dim"]:
    """Returns unit rows, one a name, in the bank's order.

    Args:
        path: .npy, .pt or .pth.
        num_names: how many names it must have.
        embed_dim: how long a row must be; None: any length.
        background: which row of a bank with one too many is the background; a row of zeros tells
            itself.

    Raises:
        MismatchError: neither side of the matrix has that many names, or the other not that length.
        UsageError: the sides cannot be told apart, or a row too many is not explained.
        DataError, CorruptArtefactError: see `load_matrix`.
    """
    matrix = load_matrix(path)
    counts = (num_names, num_names + 1)
    fits = [
        axis
        for axis in (0, 1)
        if matrix.shape[axis] in counts and embed_dim in (None, matrix.shape[1 - axis])
    ]
    if not fits:
        wanted = f"{num_names} names" + (f" of {embed_dim} numbers" if embed_dim else "")
        raise MismatchError(f"{path} is {list(matrix.shape)}, and not {wanted}, either way round")
    if len(fits) == 2:
        raise UsageError(
            f"{path} is {list(matrix.shape)}: names and numbers cannot be told apart; transpose "
            "it so that rows are names, and give its width"
        )
    rows = matrix if fits[0] == 0 else matrix.T
    if len(rows) > num_names:
        rows = np.delete(rows, _background_row(rows, background, path), axis=0)
    return unit_rows(rows, str(path))


def import_vocabulary(
    path: Path,
    categories: Sequence[Category],
    *,
    teacher: str,
    embed_dim: int | None = None,
    background: Background | None = None,
) -> Vocabulary:
    """Returns a bank as the vocabulary of categories, which come in the bank's order.

    `teacher` names what embedded it; its prompts are not known.
    """
    rows = read_text_bank(path, len(categories), embed_dim=embed_dim, background=background)
    return Vocabulary(
        names=tuple(category.name for category in categories),
        category_ids=tuple(category.category_id for category in categories),
        is_base=tuple(category.is_base for category in categories),
        frequencies=tuple(category.frequency for category in categories),
        prompts=(f"imported from {path.name}",),
        teacher=teacher,
        embeddings=rows,
    )


def _background_row(rows: np.ndarray, background: Background | None, path: Path) -> int:
    zero = [place for place in (0, len(rows) - 1) if not rows[place].any()]
    if background is None and len(zero) == 1:
        return zero[0]
    if background is None:
        raise UsageError(
            f"{path} has one row more than there are names: say which is the background, "
            "--background first or --background last"
        )
    return 0 if background == "first" else len(rows) - 1
