"""Shows how planning, committing, sealing, opening and neighbours grow with the number of images.

Plans at their true sizes (LVIS, Objects365, a billion regions); whole caches of generated rows at
reduced width. One process a size; CPU-seconds (a busy machine changes them little) and anonymous
memory above what the process began with.

python -m tests.benchmarks.scale [--images 9000 18000 36000] [--regions 16] [--width 16]
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from cache.layout import load_plan  # noqa: E402
from cache.neighbors import NeighborSettings, build_neighbors  # noqa: E402
from cache.plan import Plan, make_plan  # noqa: E402
from cache.rows import ImageRows  # noqa: E402
from cache.spec import PART_NAMES  # noqa: E402
from cache.store import open_cache  # noqa: E402
from cache.writer import create_or_resume  # noqa: E402
from tests.benchmarks.machine import describe  # noqa: E402

PLAN_STAGES = ("write", "read", "one shard")
STAGES = ("commit", "seal", "open", "neighbours")
TARGETS = {
    "LVIS": 100_170,
    "Objects365": 1_742_289,
    "a billion regions": 3_333_333,
}
PARTS = {name: {} for name in PART_NAMES}
KINDS = 500


@dataclass(frozen=True)
class Growth:
    """A stage's growth over the sizes: t = start + slope * images, and the log-log exponent."""

    start: float
    slope: float
    exponent: float

    def at(self, images: int) -> float:
        return self.start + self.slope * images


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, nargs="+", default=[9000, 18000, 36000])
    parser.add_argument("--plans", type=int, nargs="+", default=[25_000, *TARGETS.values()])
    parser.add_argument("--regions", type=int, default=16, help="of an image")
    parser.add_argument("--width", type=int, default=16, help="of an embedding")
    parser.add_argument("--one", nargs=2, help="internal: measure this in this process")
    options = parser.parse_args()
    if options.one:
        what, images = options.one[0], int(options.one[1])
        measure = measure_plan if what == "plan" else measure_cache
        print(json.dumps(measure(images, options.regions, options.width)))
        return
    print(describe("numpy", "zarr", "faiss-cpu"))
    print(f"{options.regions} regions an image, {options.width} numbers an embedding")
    for what, sizes, stages in (
        ("plan", options.plans, PLAN_STAGES),
        ("cache", options.images, STAGES),
    ):
        results = {images: _apart(what, images, options) for images in sizes}
        for title, key, unit in (("CPU-seconds", "seconds", "s"), ("memory", "megabytes", "MB")):
            _print_table(f"{what}, {title}", results, stages, key, unit)


def _apart(what: str, images: int, options: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--one", what, str(images)]
    command += ["--regions", str(options.regions), "--width", str(options.width)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    print(f"{what} of {images:,} images measured", file=sys.stderr)
    return json.loads(done.stdout)


def _print_table(
    title: str, results: dict[int, Any], stages: tuple[str, ...], key: str, unit: str
) -> None:
    sizes = list(results)
    columns = [*(f"{images:,}" for images in sizes), "exponent", *TARGETS]
    print("\n| " + " | ".join([title, *columns]) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for stage in stages:
        values = [results[images][stage][key] for images in sizes]
        growth = fit(sizes, values)
        cells = [f"{value:.2f}" for value in values] + [f"{growth.exponent:.2f}"]
        cells += [f"{growth.at(size):,.0f} {unit}" for size in TARGETS.values()]
        print("| " + " | ".join([stage, *cells]) + " |")


def fit(sizes: list[int], values: list[float]) -> Growth:
    """Returns the least-squares line and the exponent of a power law."""
    slope, start = np.polyfit(sizes, values, 1)
    exponent = np.polyfit(np.log(sizes), np.log(np.maximum(values, 1e-3)), 1)[0]
    return Growth(float(start), float(slope), float(exponent))


def measure_plan(images: int, regions: int, width: int) -> dict[str, dict[str, float]]:
    """Returns what a plan of that many images costs to write, to read, and in every commit."""
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cache"
        with measured(found, "write"):
            plan = plan_of(images, regions, width)
            writer = create_or_resume(path, parts=PARTS, plan=plan, provenance={})
            writer.missing_shards()
        with measured(found, "read"):
            assert len(load_plan(path).row_of) == images
        generated = Rows(regions, width)
        with writer:
            rows = [generated.of(image) for image in plan.shard_image_ids(1)]
            with measured(found, "one shard"):
                writer.commit_shard(1, rows)
    return found


def measure_cache(images: int, regions: int, width: int) -> dict[str, dict[str, float]]:
    """Returns what each stage of a whole cache of that many images costs."""
    found: dict[str, dict[str, float]] = {}
    generated = Rows(regions, width)
    plan = plan_of(images, regions, width)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cache"
        with create_or_resume(path, parts=PARTS, plan=plan, provenance={}) as writer:
            for shard in writer.missing_shards():
                rows = [generated.of(image) for image in plan.shard_image_ids(shard)]
                with measured(found, "commit"):
                    writer.commit_shard(shard, rows)
            with measured(found, "seal"):
                writer.write_text({"names": ["a"]}, generated.kinds[:1])
                writer.seal()
        with measured(found, "open"):
            reader = open_cache(path)
            for shard in range(plan.num_shards):
                reader.rows(plan.shard_image_ids(shard)[0])
        with measured(found, "neighbours"):
            build_neighbors(path, NeighborSettings(per_image=regions, exact_below=1))
    return found


def plan_of(images: int, regions: int, width: int) -> Plan:
    return make_plan(
        range(images), max_regions=regions, embed_dim=width, max_gt=1, storage="fp16",
        batch_layout={},
    )  # fmt: skip


class Rows:
    """Generated rows: views of a few hundred kinds of object."""

    def __init__(self, regions: int, width: int) -> None:
        random = np.random.default_rng(0)
        self.kinds = unit(random.standard_normal((KINDS, width)))
        self._regions = regions
        low = random.uniform(0, 300, (regions, 2))
        self._boxes = np.concatenate([low, low + 100], axis=1).astype(np.float32)

    def of(self, image_id: int) -> ImageRows:
        random = np.random.default_rng(image_id)
        n, width = self._regions, self.kinds.shape[1]
        noise = 0.6 / np.sqrt(width) * random.standard_normal((n, width))
        embeddings = unit(self.kinds[random.integers(0, KINDS, n)] + noise)
        return ImageRows(
            image_id=image_id,
            image_size_hw=(480, 640),
            boxes_xyxy=self._boxes,
            objectness=np.linspace(1, 0, n, dtype=np.float32),
            max_base_iou=np.zeros(n, np.float32),
            region_embeddings=embeddings,
            image_embedding=embeddings[0],
            gt_boxes_xyxy=self._boxes[:1],
            gt_category_ids=np.ones(1, np.int64),
            gt_embeddings=embeddings[:1],
        )


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@contextmanager
def measured(found: dict[str, dict[str, float]], stage: str) -> Iterator[None]:
    """Adds CPU-seconds and takes the greatest anonymous memory, sampled every 10 ms."""
    before, begun, stop = anonymous_megabytes(), time.process_time(), threading.Event()
    most = [before]

    def sample() -> None:
        while not stop.wait(0.01):
            most[0] = max(most[0], anonymous_megabytes())

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield
    finally:
        most[0] = max(most[0], anonymous_megabytes())
        stop.set()
        thread.join()
        seconds = time.process_time() - begun
        old = found.get(stage, {"seconds": 0.0, "megabytes": 0.0})
        found[stage] = {
            "seconds": old["seconds"] + seconds,
            "megabytes": max(old["megabytes"], most[0] - before),
        }


def anonymous_megabytes() -> float:
    """Returns the memory of this process that no file backs."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024
    raise AssertionError("a Linux kernel says RssAnon")


if __name__ == "__main__":
    main()
