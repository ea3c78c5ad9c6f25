"""Times the neighbour lists of a cache, exact and by inverted file, beside a bare flat search.

python -m tests.benchmarks.neighbors [--images 3000] [--regions 20] [--width 128]
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from cache.neighbor_lists import load_parameters  # noqa: E402
from cache.neighbors import NeighborSettings, build_neighbors  # noqa: E402
from cache.store import open_cache  # noqa: E402
from cache.writer import create_or_resume  # noqa: E402
from tests.benchmarks.machine import describe  # noqa: E402
from tests.benchmarks.scale import PARTS, Rows, plan_of  # noqa: E402

K = 16


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=3000)
    parser.add_argument("--regions", type=int, default=20, help="of an image")
    parser.add_argument("--width", type=int, default=128, help="of an embedding")
    options = parser.parse_args()
    print(describe("numpy", "faiss-cpu"))
    print(
        f"{options.images * options.regions:,} regions of {options.width} numbers, {K} neighbours "
        f"each; CPU-seconds; {faiss.omp_get_max_threads()} threads"
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cache"
        write_cache(path, options.images, options.regions, options.width)
        reader = open_cache(path)
        vectors = np.concatenate([reader.rows(int(i)).region_embeddings for i in reader.image_ids])
        flat = seconds(lambda: flat_search(vectors, K + options.regions))
        exact = NeighborSettings(per_image=options.regions, k=K, exact_below=len(vectors) + 1)
        inverted = NeighborSettings(per_image=options.regions, k=K, exact_below=1)
        print("| what | CPU-seconds | times the flat search | recall |\n|---|---|---|---|")
        print(f"| bare flat search of {K} + {options.regions} candidates | {flat:.1f} | 1.00 | |")
        for name, settings in (("exact lists, whole", exact), ("inverted file, whole", inverted)):
            took = seconds(lambda chosen=settings: build_neighbors(path, chosen))
            how = load_parameters(path) or {}
            print(
                f"| {name} ({how['search']}, reading and writing included) | {took:.1f} | "
                f"{took / flat:.2f} | {how['recall']:.3f} |"
            )


def flat_search(vectors: np.ndarray, depth: int) -> None:
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    for start in range(0, len(vectors), 16_384):
        index.search(vectors[start : start + 16_384], depth)


def write_cache(path: Path, images: int, regions: int, width: int) -> None:
    generated, plan = Rows(regions, width), plan_of(images, regions, width)
    with create_or_resume(path, parts=PARTS, plan=plan, provenance={}) as writer:
        for shard in writer.missing_shards():
            writer.commit_shard(shard, [generated.of(i) for i in plan.shard_image_ids(shard)])
        writer.write_text({"names": ["a"]}, generated.kinds[:1])
        writer.seal()


def seconds(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


if __name__ == "__main__":
    main()
