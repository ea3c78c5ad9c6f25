"""A tiny CLIP and a folder of pictures with annotations and proposals: stage 1 in a second."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image
from safetensors.torch import save_file

from pipeline.request import CacheRequest

TINY_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
CATEGORIES = [
    {"id": 3, "name": "square", "split": "base"},
    {"id": 5, "name": "disc", "split": "base"},
    {"id": 9, "name": "cross", "split": "novel"},
]
NUM_IMAGES = 35  # three shards: 16, 16, 3


def write_tiny_teacher(folder: Path) -> str:
    """Writes configuration and weights; returns the teacher's spec."""
    (folder / "tiny-cache-clip.json").write_text(json.dumps(TINY_CLIP))
    open_clip.add_model_config(folder / "tiny-cache-clip.json")
    torch.manual_seed(0)
    save_file(open_clip.create_model("tiny-cache-clip").state_dict(), folder / "w.safetensors")
    return f"tiny-cache-clip:{folder}"


def write_world(folder: Path) -> None:
    """Writes pictures, OV-COCO annotations, and proposals for all but picture 7."""
    (folder / "images").mkdir()
    generator = np.random.default_rng(0)
    images, annotations, proposals = [], [], []
    for number in range(1, NUM_IMAGES + 1):
        height, width = 60 + number % 5, 80
        picture = generator.integers(0, 255, (height, width, 3), dtype=np.uint8)
        name = f"{number:03d}.png"
        Image.fromarray(picture).save(folder / "images" / name)
        images.append({"id": number, "file_name": name, "height": height, "width": width})
        for offset, category in enumerate(CATEGORIES):
            box = [5 + 20 * offset, 10 + number % 20, 15, 18]
            annotations.append(
                {"id": len(annotations), "image_id": number, "category_id": category["id"],
                 "bbox": box, "area": 270, "iscrowd": 0}
            )  # fmt: skip
            if number != 7:
                proposals.append({"image_id": number, "bbox": box, "score": 0.9 - 0.1 * offset})
                shifted = [box[0] + 1, *box[1:]]
                proposals.append({"image_id": number, "bbox": shifted, "score": 0.3})
    document = {"images": images, "annotations": annotations, "categories": CATEGORIES}
    (folder / "train.json").write_text(json.dumps(document))
    (folder / "proposals.json").write_text(json.dumps(proposals))


@contextmanager
def one_pixel_changed(path: Path) -> Iterator[None]:
    """Lets a picture differ in one pixel while it is open."""
    before = path.read_bytes()
    try:
        with Image.open(path) as picture:
            changed = picture.copy()
        changed.putpixel((0, 0), (1, 2, 3))
        changed.save(path)
        yield
    finally:
        path.write_bytes(before)


def tiny_request(world: Path, teacher_spec: str, out: Path) -> CacheRequest:
    """Returns a request over that folder."""
    return CacheRequest(
        split=f"ovcoco:{world / 'images'}:{world / 'train.json'}",
        out=out,
        teacher=teacher_spec,
        proposals=f"file:{world / 'proposals.json'}",
        prompts="single",
        keep=5,
        device="cpu",
        crop_batch=16,
        neighbors=False,
    )
