"""Writes proposals whose quality is known beforehand: the ends of the scale for other sources.

    python -m pipeline.pictograms.control_proposals --size small --kind true --out true.json
    dkdetr cache-teacher --split pictograms_small_train --teacher pictograms --keep 24 \
        --proposals 'file:true.json?novel=seen' --out cache/true

true     the boxes of all objects of the training pictures. Novel ones too, which nobody who
         distils may know: the cache is marked, and the source is a control, never a method.
chance   boxes at random places with sides as objects have them.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from dkdetr.atomic_file import write_text
from dkdetr.progress import progress
from pipeline.pictograms.scenes import SpriteBank, render_scene
from pipeline.pictograms.worlds import SIZES, PlannedImage, World, plan_world

Kind = Literal["true", "chance"]
_BY_CHANCE = 24


def control_boxes(world: World, kind: Kind) -> Iterator[tuple[PlannedImage, np.ndarray]]:
    """Yields each training picture with its boxes [num_boxes, 4], x1 y1 x2 y2 in pixels."""
    bank = SpriteBank([category.drawing for category in world.categories])
    for image in world.images:
        if image.part != "train":
            continue
        if kind == "true":
            yield image, render_scene(image.plan, bank).boxes_xyxy
        else:
            yield image, _by_chance(world, image.image_id)


def coco_results(image_id: int, boxes_xyxy: np.ndarray) -> list[dict[str, Any]]:
    """Returns boxes as COCO results, the first with the highest score."""
    corners, sides = boxes_xyxy[:, :2], boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]
    scores = np.linspace(1, 0.5, len(boxes_xyxy))
    return [
        {
            "image_id": image_id,
            "category_id": 1,
            "bbox": [*corner, *side],
            "score": score,
        }
        for corner, side, score in zip(
            corners.tolist(), sides.tolist(), scores.tolist(), strict=True
        )
        if min(side) > 0  # a hidden object has no box
    ]


def _by_chance(world: World, image_id: int) -> np.ndarray:
    random = np.random.default_rng((world.seed, image_id))
    low, high = world.size.side_range
    sides = random.uniform(low, high, (_BY_CHANCE, 2))
    corners = random.uniform(0, world.size.image_size - sides)
    return np.concatenate([corners, corners + sides], axis=1)


def main() -> None:
    """Writes the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--seed", type=int, default=0, help="of the world")
    parser.add_argument("--kind", choices=get_args(Kind), required=True)
    parser.add_argument("--out", type=Path, required=True)
    words = parser.parse_args()
    world = plan_world(SIZES[words.size], protocol="lvis-like", seed=words.seed)
    results: list[dict[str, Any]] = []
    with progress("control proposals", world.size.num_train) as advance:
        for done, (image, boxes) in enumerate(control_boxes(world, words.kind), start=1):
            results += coco_results(image.image_id, boxes)
            advance(done, "")
    write_text(words.out, json.dumps(results))
    print(f"{len(results):,} boxes: {words.out}")


if __name__ == "__main__":
    main()
