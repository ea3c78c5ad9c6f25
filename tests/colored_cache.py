"""A small cache whose pictures are known: each region is a rectangle of its kind's colour."""

from pathlib import Path

import numpy as np
from PIL import Image

from cache.plan import make_plan
from cache.rows import ImageRows
from cache.writer import create_or_resume
from tests.cache_samples import parts
from tests.unit.data_world import coco_categories, write_json

KINDS = ("red", "green", "blue", "yellow")
COLORS = np.array([(220, 30, 30), (30, 190, 30), (40, 40, 220), (220, 220, 30)])
HEIGHT, WIDTH, DIM = 90, 120, 24
# In order of objectness; the last overlaps a base object and takes no part.
BOXES = np.array([(2, 3, 42, 33), (50, 8, 110, 38), (10, 50, 60, 85), (70, 45, 115, 80)], float)


def kind_of(image_id: int, region: int) -> int:
    return (image_id * 3 + region * (1 + image_id % 2)) % len(KINDS)


def text_embeddings() -> np.ndarray:
    return np.eye(DIM, dtype=np.float32)[: len(KINDS)]


def write_colored_cache(root: Path, *, num_images: int = 12, names=KINDS) -> Path:
    """Writes pictures, annotations and a sealed cache; returns the cache's folder."""
    (root / "images").mkdir(parents=True)
    images = []
    for image_id in range(1, num_images + 1):
        pixels = np.full((HEIGHT, WIDTH, 3), 128, np.uint8)
        for region, (x1, y1, x2, y2) in enumerate(BOXES.astype(int)):
            pixels[y1:y2, x1:x2] = COLORS[kind_of(image_id, region)]
        Image.fromarray(pixels).save(root / "images" / f"{image_id}.png")
        images.append(
            {"id": image_id, "file_name": f"{image_id}.png", "height": HEIGHT, "width": WIDTH}
        )
    document = {"images": images, "annotations": [], "categories": coco_categories()}
    annotations = write_json(root / "train.json", document)
    plan = make_plan(
        range(1, num_images + 1),
        max_regions=len(BOXES), embed_dim=DIM, max_gt=1, storage="fp16", batch_layout={},
    )  # fmt: skip
    path = root / "cache"
    split = {"name": f"coco:{root / 'images'}:{annotations}"}
    with create_or_resume(path, parts=parts(split=split), plan=plan, provenance={}) as writer:
        for shard in range(plan.num_shards):
            writer.commit_shard(shard, [_rows(i) for i in plan.shard_image_ids(shard)])
        metadata = {"names": list(names), "is_base": [True, True, False, True]}
        writer.write_text(metadata, text_embeddings())
        writer.seal()
    return path


def _rows(image_id: int) -> ImageRows:
    random = np.random.default_rng(image_id)
    kinds = [kind_of(image_id, region) for region in range(len(BOXES))]
    noise = 0.12 * random.standard_normal((len(BOXES), DIM))
    embeddings = text_embeddings()[kinds] + noise
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    none = np.zeros((0, 4), np.float32)
    return ImageRows(
        image_id=image_id,
        image_size_hw=(HEIGHT, WIDTH),
        boxes_xyxy=BOXES.astype(np.float32),
        objectness=np.float32([0.9, 0.8, 0.7, 0.6]),
        max_base_iou=np.float32([0, 0.1, 0.2, 0.8]),
        region_embeddings=embeddings.astype(np.float32),
        image_embedding=embeddings[0].astype(np.float32),
        gt_boxes_xyxy=none,
        gt_category_ids=np.zeros(0, np.int64),
        gt_embeddings=np.zeros((0, DIM), np.float32),
    )
