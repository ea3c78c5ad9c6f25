"""What CLIP is to the student's side: objects that come from outside, known by what they do.

Kept apart from `dkdetr.structures`, so that a vocabulary is read without PyTorch.
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float


@runtime_checkable
class TextEncoder(Protocol):
    """Turns words into unit vectors: the teacher's text tower, wherever it lives."""

    @property
    def identity(self) -> str:
        """Names the model and its weights; equal identities give equal embeddings."""
        ...

    def encode_texts(self, texts: Sequence[str]) -> Float[np.ndarray, "num_texts embed_dim"]:
        """Returns float32 vectors of unit norm, one a text."""
        ...


@runtime_checkable
class RegionEncoder(Protocol):
    """Turns parts of a picture into unit vectors: the teacher's image tower."""

    @property
    def identity(self) -> str:
        """Names the model and its weights; equal identities give equal embeddings."""
        ...

    def encode_regions(
        self, image: np.ndarray, boxes_xyxy: Float[np.ndarray, "num_boxes 4"]
    ) -> Float[np.ndarray, "num_boxes embed_dim"]:
        """Returns float32 unit vectors of the boxes (pixels) of an RGB uint8 picture (h, w, 3)."""
        ...
