"""Neighbour lists as stage 1's last step: in a process of their own, and never a reason to fail."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from cache.neighbors import build_neighbors
from cache.plan import Plan
from cache.spec import CacheError
from cache.store import open_cache

_MAX_REGIONS = 100_000
_PER_IMAGE = 50


@dataclass(frozen=True)
class _NeighborTask:
    path: Path
    per_image: int

    def run(self) -> None:
        build_neighbors(self.path, per_image=self.per_image)


def add_neighbors(path: Path, plan: Plan) -> tuple[str, ...]:
    """Returns notes on what was not built; the lists themselves are derived data."""
    later = f"dkdetr cache neighbors {path}"
    if open_cache(path).neighbors() is not None:
        return ()
    per_image = min(_PER_IMAGE, plan.max_regions, _MAX_REGIONS // plan.num_images)
    if per_image < 1:
        return (
            f"no neighbour lists: an exact search over {plan.num_images:,} images takes too long "
            f"to be done unasked, and training does without them; {later}",
        )
    try:
        rebuild_neighbors(path, per_image=per_image)
    except CacheError as error:
        return (f"no neighbour lists: {error}; the cache is whole without them; {later}",)
    return ()


def rebuild_neighbors(path: Path, *, per_image: int = _PER_IMAGE) -> None:
    """Builds the lists of a sealed cache anew, over the best `per_image` regions of an image.

    Raises:
        CacheError: the cache is unsealed or damaged, or faiss is not installed.
    """
    # Of its own process: faiss's OpenMP and torch's do not share one well.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        pool.submit(_NeighborTask(path.resolve(), per_image).run).result()
