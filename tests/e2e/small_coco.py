"""A COCO folder of a few generated pictures with real COCO names, for the three commands."""

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

# Base and novel names of OV-COCO with a colour each, so that there is something to learn.
_NAMES = {
    1: ("person", (220, 60, 60)),
    3: ("car", (60, 60, 220)),
    16: ("bird", (60, 180, 60)),
    17: ("cat", (230, 200, 40)),  # novel
    28: ("umbrella", (160, 60, 200)),  # novel
}


def ovcoco_names() -> dict[int, str]:
    """Returns the 65 names by id: ours keep COCO's numbers, the others follow."""
    from dkdetr.data.coco_names import OVCOCO_BASE, OVCOCO_NOVEL

    names = {number: name for number, (name, _) in _NAMES.items()}
    others = [name for name in (*OVCOCO_BASE, *OVCOCO_NOVEL) if name not in names.values()]
    return names | dict(enumerate(others, start=100))


def write_coco_folder(folder: Path, part: str, *, num_images: int, seed: int) -> str:
    """Writes PART/ and PART.json; returns the split's name `ovcoco:DIR:JSON`."""
    rng = np.random.default_rng(seed)
    images_dir = folder / part
    images_dir.mkdir(parents=True)
    images, annotations = [], []
    for image_id in range(1, num_images + 1):
        height, width = (int(side) for side in rng.integers(80, 140, size=2))
        noise = rng.integers(90, 160, size=(height, width, 3), dtype=np.uint8)
        picture = Image.fromarray(noise)
        draw = ImageDraw.Draw(picture)
        for category_id in rng.permutation(list(_NAMES))[:3].tolist():
            side = int(rng.integers(24, 50))
            left, top = int(rng.integers(0, width - side)), int(rng.integers(0, height - side))
            ring = [(left + side / 2 * (1 + np.cos(turn)), top + side / 2 * (1 + np.sin(turn)))
                    for turn in np.linspace(0, 2 * np.pi, 24, endpoint=False)]  # fmt: skip
            draw.ellipse((left, top, left + side, top + side), fill=_NAMES[category_id][1])
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": category_id,
                    "bbox": [left, top, side, side],
                    "segmentation": [np.array(ring).round(2).ravel().tolist()],
                    "area": side * side,
                    "iscrowd": 0,
                }
            )
        name = f"{image_id:06d}.jpg"
        picture.save(images_dir / name, quality=95)
        images.append({"id": image_id, "file_name": name, "height": height, "width": width})
    categories = [{"id": number, "name": name} for number, name in ovcoco_names().items()]
    annotation_file = folder / f"{part}.json"
    content = {"images": images, "annotations": annotations, "categories": categories}
    annotation_file.write_text(json.dumps(content))
    return f"ovcoco:{images_dir}:{annotation_file}"
