"""Random scoring problems that hold every oddity the official tools have an opinion on."""

from dataclasses import replace

import numpy as np

from dkdetr.data.annotations import Category, ImageInfo
from dkdetr.evaluation.ground_truth import GroundTruth
from dkdetr.evaluation.results import Results
from dkdetr.run_lengths import boxes_xywh, segmentation_rle


def random_problem(
    protocol, seed, *, num_images=24, num_categories=9, detections_per_image=(0, 60)
):
    """Returns ground truth and results with ties, empty images, crowds, lists and thin boxes."""
    rng = np.random.default_rng(seed)
    category_ids = rng.permutation(np.arange(3, 3 + 2 * num_categories, 2))
    categories = tuple(
        Category(int(i), f"name {i}", "rcf"[rng.integers(3)], bool(rng.integers(3)))
        for i in category_ids
    )
    image_ids = rng.permutation(np.arange(100, 100 + num_images))
    images, gt = [], []
    for image_id in image_ids.tolist():
        num_gt = int(rng.integers(0, 9)) if rng.random() > 0.2 else 0
        present = rng.choice(category_ids[:-1], size=num_gt)  # the last is never there
        absent = [c for c in category_ids.tolist() if c not in present]
        negative = [c for c in absent if rng.random() < 0.5]
        unsure = [c for c in set(present.tolist()) if rng.random() < 0.3]
        images.append(ImageInfo(image_id, "x.png", 480, 640, tuple(negative), tuple(unsure)))
        gt += [(image_id, c, *_box(rng), rng.random() < 0.1) for c in present.tolist()]
    columns = np.array([row[:6] for row in gt]).reshape(-1, 6)
    boxes = columns[:, 2:]
    areas = boxes[:, 2] * boxes[:, 3] * rng.uniform(0.3, 1.0, len(boxes))
    areas[rng.random(len(areas)) < 0.05] = 0.0
    truth = GroundTruth(
        name="random",
        protocol=protocol,
        categories=categories,
        images=tuple(images),
        image_ids=columns[:, 0].astype(np.int64),
        category_ids=columns[:, 1].astype(np.int64),
        boxes_xywh=boxes,
        areas=areas,
        is_crowd=np.array([row[6] for row in gt], dtype=bool),
    )
    return truth, random_detections(truth, rng, detections_per_image)


def random_detections(truth, rng, detections_per_image):
    """Returns detections near the ground truth and elsewhere, in no order, with tied scores."""
    all_ids = np.array([c.category_id for c in truth.categories])
    rows = []
    for image in truth.images:
        own = truth.of_image(image.image_id)
        for _ in range(int(rng.integers(*detections_per_image, endpoint=True))):
            if len(own) and rng.random() < 0.6:
                index = rng.choice(own)
                shake = rng.normal(0, rng.choice([0.0, 0.05, 0.15]), 4)
                x, y, w, h = truth.boxes_xywh[index]
                sides = np.abs([w * (1 + shake[2]), h * (1 + shake[3])])
                box = (x + w * shake[0], y + h * shake[1], *sides)
                category_id = truth.category_ids[index] if rng.random() < 0.8 else None
            else:
                box, category_id = _box(rng), None
            if rng.random() < 0.03:
                box = (*box[:3], 0.0)
            category_id = rng.choice(all_ids) if category_id is None else category_id
            rows.append((image.image_id, category_id, round(rng.random(), 1), *box))
    columns = np.array(rows).reshape(-1, 7)[rng.permutation(len(rows))]
    return Results(
        image_ids=columns[:, 0].astype(np.int64),
        category_ids=columns[:, 1].astype(np.int64),
        boxes_xywh=columns[:, 3:],
        scores=columns[:, 2],
    )


def _box(rng):
    # Whole numbers now and then, so that overlaps hit thresholds exactly.
    side = rng.choice([20.0, 60.0, 160.0])
    x, y, w, h = (*rng.uniform(0, 300, 2), *rng.uniform(0.5, 2.0, 2) * side)
    return (x, y, w, h) if rng.random() < 0.5 else (round(x), round(y), round(w), round(h))


def masked(truth, results):
    """Returns the problem with a diamond in every box for its mask."""
    sizes = {image.image_id: (image.height, image.width) for image in truth.images}

    def diamonds(image_ids, boxes):
        masks = np.empty(len(boxes), dtype=object)
        for index, (image_id, (x, y, w, h)) in enumerate(zip(image_ids, boxes, strict=True)):
            ring = [x + w / 2, y, x + w, y + h / 2, x + w / 2, y + h, x, y + h / 2]
            masks[index] = segmentation_rle([list(map(float, ring))], sizes[int(image_id)])
        return masks

    truth = replace(truth, masks=diamonds(truth.image_ids, truth.boxes_xywh))
    masks = diamonds(results.image_ids, results.boxes_xywh)
    boxes = boxes_xywh(masks.tolist())
    return truth, replace(results, masks=masks, boxes_xywh=boxes)
