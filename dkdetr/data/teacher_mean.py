"""The direction that a cache's embeddings have in common (`kd.skd.loss = "centred"`)."""

import numpy as np
from jaxtyping import Float

from cache.store import CacheReader

_IMAGES = 512


def mean_embedding(
    reader: CacheReader, *, regions_per_image: int
) -> Float[np.ndarray, "embed_dim"]:
    """Returns the mean of the most object-like regions' unit embeddings; its norm is below 1.

    Of at most 512 images, evenly spread over the cache: a function of the cache alone, so that
    ranks and resumed runs agree and nothing has to be remembered. With n of its vectors the mean
    is wrong by about 1 / sqrt(n): 1 % here.
    """
    ids = reader.image_ids
    chosen = np.unique(np.linspace(0, len(ids) - 1, min(_IMAGES, len(ids))).astype(np.int64))
    total = np.zeros(reader.info.embed_dim, dtype=np.float64)
    count = 0
    for image_id in ids[chosen].tolist():
        rows = reader.rows(image_id).region_embeddings[:regions_per_image]
        total += rows.sum(axis=0, dtype=np.float64)
        count += len(rows)
    return (total / max(count, 1)).astype(np.float32)
