"""How region embeddings are stored, as half floats or as int8 levels, and what that costs."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def quantize(embeddings: NDArray[Any]) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    """Returns int8 levels [n, D] and float16 scales [n]: levels * scale ~ the unit embeddings.

    The scale is the one that gives unit norm back, whatever the rounding did.
    """
    greatest = np.abs(embeddings).max(axis=1, initial=0, keepdims=True)
    levels = np.rint(embeddings * (127 / greatest)).astype(np.int8)
    norms = np.linalg.norm(levels.astype(np.float32), axis=1)
    return levels, (1 / norms).astype(np.float16)


def dequantize(stored: NDArray[Any], scale: NDArray[Any] | None) -> NDArray[np.float32]:
    """Returns float32 embeddings [n, D] of what is stored: half floats, or levels and scales."""
    embeddings = stored.astype(np.float32)
    if scale is not None:
        embeddings *= scale[:, None].astype(np.float32)
    return embeddings


def cosine_errors(embeddings: NDArray[Any], storage: str) -> NDArray[np.float64]:
    """Returns 1 - cosine [n] between embeddings and what a reader will get back of them."""
    given = np.asarray(embeddings, np.float64)
    if storage == "int8":
        back = dequantize(*quantize(np.asarray(embeddings))).astype(np.float64)
    else:
        back = np.asarray(embeddings).astype(np.float16).astype(np.float64)
    # Of unit vectors, |a - b|^2 / 2: one minus their product would drown in its own rounding.
    given /= np.linalg.norm(given, axis=1, keepdims=True)
    back /= np.linalg.norm(back, axis=1, keepdims=True)
    return np.square(given - back).sum(axis=1) / 2
