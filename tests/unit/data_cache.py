"""A sealed cache of a generated split: random regions, some of them near base objects."""

import dataclasses
from pathlib import Path

import numpy as np

from cache.plan import make_plan
from cache.rows import ImageRows
from cache.spec import PART_NAMES
from cache.writer import create_or_resume
from dkdetr.data.splits import Split
from tests.unit.data_world import vocabulary_of

DIM = 8
PARTS = {name: {} for name in PART_NAMES}


def unit(random, *shape):
    vectors = random.normal(size=shape)
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def cached_rows(split: Split, image) -> ImageRows:
    random = np.random.default_rng(image.image_id)
    gt = split.base_boxes(image.image_id)
    corners = random.uniform(0, 25, (12, 2))
    boxes = np.concatenate((corners, corners + random.uniform(8, 20, (12, 2))), axis=1)
    return ImageRows(
        image_id=image.image_id,
        image_size_hw=(image.height, image.width),
        boxes_xyxy=boxes.astype(np.float32),
        objectness=np.sort(random.uniform(0, 1, 12).astype(np.float32))[::-1].copy(),
        max_base_iou=random.uniform(0, 0.7, 12).astype(np.float32),
        region_embeddings=unit(random, 12, DIM),
        image_embedding=unit(random, DIM),
        gt_boxes_xyxy=gt.boxes_xyxy,
        gt_category_ids=gt.category_ids,
        gt_embeddings=unit(random, len(gt.category_ids), DIM),
    )


def write_cache(
    path: Path, split: Split, *, quarantined=(), images=None, seal=True, flipped=False
) -> Path:
    images = split.images if images is None else images
    plan = make_plan(
        [image.image_id for image in images],
        max_regions=12, embed_dim=DIM, max_gt=8, storage="fp16", batch_layout={}, flipped=flipped,
    )  # fmt: skip
    # A root of its own: caches in shared memory are named by it, for all of this machine.
    parts = PARTS | {"split": {"name": str(path)}}
    with create_or_resume(path, parts=parts, plan=plan, provenance={}) as writer:
        for shard in range(plan.num_shards):
            ids = set(plan.shard_image_ids(shard))
            mine = [image for image in images if image.image_id in ids]
            rows = [cached_rows(split, i) for i in mine if i.image_id not in quarantined]
            if flipped:
                rows = [
                    dataclasses.replace(r, flipped_embeddings=-r.region_embeddings) for r in rows
                ]
            bad = {i.image_id: "truncated" for i in mine if i.image_id in quarantined}
            writer.commit_shard(shard, rows, quarantined=bad)
        if seal:
            vocabulary = vocabulary_of(split)
            writer.write_text(vocabulary.metadata(), vocabulary.embeddings)
            writer.seal()
    return path
