"""Prints how long a generated LVIS train file takes to read, and the memory at its peak.

python -m tests.benchmarks.annotations [--annotations 1300000] [--images 100000]
"""

import argparse
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
NUM_CLASSES = 1203


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--annotations", type=int, default=1_300_000)
    parser.add_argument("--images", type=int, default=100_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lvis_v1_train.json"
        write_lvis(path, options.images, options.annotations)
        size = path.stat().st_size / 1e9
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        sys.path.insert(0, str(ROOT))
        from dkdetr.data.annotations import read_annotations

        start, start_cpu = time.perf_counter(), time.process_time()
        found = read_annotations(path, style="lvis")
        seconds, cpu = time.perf_counter() - start, time.process_time() - start_cpu
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        print(
            f"{len(found.boxes.category_ids):,} boxes of {len(found.images):,} images, "
            f"{size:.2f} GB of text: {seconds:.1f} s ({cpu:.1f} s of a core), "
            f"peak {peak:.2f} GB (before: {before:.2f})"
        )


def write_lvis(path: Path, num_images: int, num_annotations: int, seed: int = 0) -> None:
    """Writes an LVIS file with a polygon of 120 numbers a box, as LVIS has on average."""
    rng = np.random.default_rng(seed)
    polygons = [
        "[[" + ",".join(f"{x:.2f}" for x in rng.uniform(0, 640, size=120)) + "]]" for _ in range(64)
    ]
    with path.open("w") as file:
        file.write('{"images":[')
        for i in range(num_images):
            file.write(
                f'{"," if i else ""}{{"id":{i + 1},"height":480,"width":640,"coco_url":'
                f'"http://images.cocodataset.org/train2017/{i + 1:012d}.jpg","neg_category_ids":'
                f'[{i % 1203 + 1},7],"not_exhaustive_category_ids":[]}}'
            )
        file.write('],"categories":[')
        groups = "f" * 405 + "c" * 461 + "r" * 337
        for i, group in enumerate(groups):
            comma = "," if i else ""
            file.write(f'{comma}{{"id":{i + 1},"name":"n{i}","frequency":"{group}"}}')
        file.write('],"annotations":[')
        image_ids = rng.integers(1, num_images + 1, size=num_annotations).tolist()
        categories = rng.integers(1, NUM_CLASSES + 1, size=num_annotations).tolist()
        boxes = rng.uniform(1, 200, size=(num_annotations, 4)).round(2)
        for i, (image_id, category, box) in enumerate(
            zip(image_ids, categories, boxes.tolist(), strict=True)
        ):
            file.write(
                f'{"," if i else ""}{{"id":{i + 1},"image_id":{image_id},"category_id":{category},'
                f'"bbox":{box},"area":99.5,"segmentation":{polygons[i % 64]}}}'
            )
        file.write("]}")


if __name__ == "__main__":
    main()
