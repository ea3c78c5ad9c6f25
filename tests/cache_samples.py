"""Small caches for tests: deterministic rows, and one call that writes a sealed cache."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from cache.plan import Plan, make_plan
from cache.rows import ImageRows
from cache.writer import create_or_resume

HEIGHT, WIDTH = 90, 120
QUARANTINED = {23: "truncated JPEG"}


def parts(**changes):
    table = {
        "schema": 1,
        "split": {"name": "lvis_train", "annotations": "ab12"},
        "images": {"hash": "cd34"},
        "proposals": {"source": "fit", "nms": 0.7},
        "crops": {"scales": [1.0, 1.5]},
        "teacher": {"name": "ViT-B-32-quickgelu:openai", "activation": "quick_gelu"},
        "storage": {"dtype": "fp16"},
        "batch_layout": {"crops": 64},
        "text": {"prompts": ["a photo of {}"], "names": ["cat", "dog"]},
    }
    return {**table, **changes}


def sample_plan(num_images: int = 40, storage: str = "fp16", **changes) -> Plan:
    settings = {"max_regions": 6, "embed_dim": 16, "max_gt": 3, "batch_layout": {"crops": 64}}
    ids = range(3, 3 + 2 * num_images, 2)
    return make_plan(ids, storage=storage, **{**settings, **changes})


def unit_rows(generator: np.random.Generator, count: int, dim: int) -> np.ndarray:
    rows = generator.standard_normal((count, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def sample_rows(image_id: int, plan: Plan) -> ImageRows:
    generator = np.random.default_rng(image_id)
    n = int(generator.integers(0, plan.max_regions + 1))
    m = int(generator.integers(0, plan.max_gt + 1))
    return ImageRows(
        image_id=image_id,
        image_size_hw=(HEIGHT, WIDTH),
        boxes_xyxy=_boxes(generator, n),
        objectness=np.sort(generator.random(n).astype(np.float32))[::-1].copy(),
        max_base_iou=generator.random(n).astype(np.float32),
        region_embeddings=unit_rows(generator, n, plan.embed_dim),
        image_embedding=unit_rows(generator, 1, plan.embed_dim)[0],
        gt_boxes_xyxy=_boxes(generator, m),
        gt_category_ids=generator.integers(1, 1000, m),
        gt_embeddings=unit_rows(generator, m, plan.embed_dim),
    )


def clustered_rows(image_id: int, plan: Plan) -> ImageRows:
    """Rows of 20 kinds of object: like views of a kind, and some that are nearly the same."""
    rows = sample_rows(image_id, plan)
    generator = np.random.default_rng(image_id)
    kinds = unit_rows(np.random.default_rng(77), 20, plan.embed_dim)
    spread = np.where(generator.random(rows.num_regions) < 0.3, 0.02, 0.12)[:, None]
    noise = generator.standard_normal((rows.num_regions, plan.embed_dim))
    mixed = kinds[generator.integers(0, 20, rows.num_regions)] + spread * noise
    embeddings = (mixed / np.linalg.norm(mixed, axis=1, keepdims=True)).astype(np.float32)
    return replace(rows, region_embeddings=embeddings)


def shard_rows(
    plan: Plan, shard: int, rows_of: Callable[[int, Plan], ImageRows] = sample_rows
) -> tuple[list[ImageRows], dict[int, str]]:
    ids = plan.shard_image_ids(shard)
    good = [rows_of(i, plan) for i in ids if i not in QUARANTINED]
    return good, {i: reason for i, reason in QUARANTINED.items() if i in ids}


def write_sample_cache(
    path: Path, plan: Plan | None = None, order=sorted, text_seed: int = 0, rows_of=sample_rows
):
    """Writes what is missing of a cache and seals it; returns the seal."""
    plan = plan or sample_plan()
    with create_or_resume(path, parts=parts(), plan=plan, provenance={"host": "h"}) as writer:
        for shard in order(writer.missing_shards()):
            rows, quarantined = shard_rows(plan, shard, rows_of)
            writer.commit_shard(shard, rows, quarantined=quarantined)
        if not writer.text_is_current():
            names = ["cat", "dog"]
            embeddings = unit_rows(np.random.default_rng(text_seed), 2, plan.embed_dim)
            writer.write_text({"names": names}, embeddings)
        return writer.seal()


def committed_bytes(path: Path) -> dict[str, bytes]:
    """Returns every file of a cache but the provenance and the lease's guard."""
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.name not in ("provenance.json", ".lock.guard")
    }


def _boxes(generator: np.random.Generator, count: int) -> np.ndarray:
    low = generator.uniform(0, [WIDTH / 2, HEIGHT / 2], (count, 2))
    high = low + generator.uniform(1, [WIDTH / 2, HEIGHT / 2], (count, 2))
    return np.concatenate([low, high], axis=1).astype(np.float32)
