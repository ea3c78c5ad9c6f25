"""What training reads of an image: its regions, with their embeddings still as they are stored."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from cache.arrays import REGION_VIEWS
from cache.codec import dequantize
from cache.plan import Plan
from cache.rows import Floats, norm_problem
from cache.spec import CorruptCacheError


@dataclass(frozen=True, eq=False)
class RegionRows:
    """The regions of an image, best first; arrays may be read-only. Embeddings come on demand.

    A view distils twenty of three hundred regions: only theirs are converted and checked.
    """

    image_id: int
    image_size_hw: tuple[int, int]
    boxes_xyxy: Floats
    """[n, 4], pixels of the original file."""
    objectness: Floats
    """[n]"""
    max_base_iou: Floats
    """[n]"""
    vectors: Mapping[str, NDArray[Any]]
    """`region_embeddings` and perhaps `flipped_embeddings`, [n, embed_dim], half floats or int8
    levels; of levels also `embedding_scale` and `flipped_scale`, [n]."""

    @property
    def has_flipped(self) -> bool:
        """Returns True if the mirrored crops have embeddings of their own."""
        return REGION_VIEWS[1][0] in self.vectors

    @property
    def embed_dim(self) -> int:
        """Returns the length of an embedding."""
        return self.vectors[REGION_VIEWS[0][0]].shape[1]

    def embeddings(self, regions: NDArray[Any] | slice, *, flipped: bool = False) -> Floats:
        """Returns the embeddings of some regions, float32 [k, embed_dim], of unit norm.

        Args:
            regions: which.
            flipped: of their mirrored crops.

        Raises:
            CorruptCacheError: one is not.
        """
        name, scale_name = REGION_VIEWS[flipped]
        scale = self.vectors.get(scale_name)
        stored = self.vectors[name][regions]
        embeddings = dequantize(stored, None if scale is None else scale[regions])
        problem = norm_problem(name, embeddings)
        if problem is not None:
            raise CorruptCacheError(f"image {self.image_id}: {problem}")
        return embeddings


@runtime_checkable
class RegionSource(Protocol):
    """Whatever hands out regions by image id; it pickles, for the loader's processes."""

    plan: Plan

    def regions(self, image_id: int) -> RegionRows:
        """Returns the regions of an image; raises KeyError, CorruptCacheError."""
        ...


def size_hw(stored: NDArray[np.int32]) -> tuple[int, int]:
    """Returns (height, width) of a stored pair."""
    height, width = stored.tolist()
    return height, width
