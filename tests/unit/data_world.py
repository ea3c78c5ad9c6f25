"""Small generated data sets for the tests of dkdetr.data: pictures, annotation files, encoders."""

import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dkdetr.data.coco_names import OVCOCO_BASE, OVCOCO_NOVEL
from dkdetr.data.vocabulary import Vocabulary, build_vocabulary


def coco_categories() -> list[dict[str, Any]]:
    """Returns the 65 names with ids 1.. in alphabetical order, and one that takes no part."""
    names = [*sorted(OVCOCO_BASE | OVCOCO_NOVEL), "traffic light"]
    return [{"id": number, "name": name} for number, name in enumerate(names, start=1)]


def category_id(name: str) -> int:
    return next(each["id"] for each in coco_categories() if each["name"] == name)


def annotation(number: int, image_id: int, name: str, bbox: list[float], **more: Any) -> dict:
    return {
        "id": number,
        "image_id": image_id,
        "category_id": category_id(name),
        "bbox": bbox,
        "iscrowd": 0,
        "segmentation": [[bbox[0], bbox[1], bbox[0] + 1.5, bbox[1], 1e-1, 2]],
        **more,
    }


def write_images(folder: Path, sizes_hw: dict[str, tuple[int, int]], seed: int = 0) -> None:
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for name, (height, width) in sizes_hw.items():
        pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)


def png_header(side: int) -> bytes:
    """Returns a PNG of hardly more than its header, which speaks of `side` x `side` pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IEND", b"")


def write_json(path: Path, document: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


def coco_document(num_images: int = 8, seed: int = 0) -> dict[str, Any]:
    """Returns an OV-COCO file: each image has a cat (novel) and, but for the last, base boxes."""
    random = np.random.default_rng(seed)
    images, annotations = [], []
    for number in range(1, num_images + 1):
        height, width = 48 + 4 * (number % 3), 64
        images.append(
            {"id": number, "file_name": f"{number}.png", "height": height, "width": width}
        )
        names = ["cat", "person", "car", "person"] if number < num_images else ["cat"]
        for name in names:
            x, y = random.uniform(0, 30, 2)
            w, h = random.uniform(6, 18, 2)
            box = [round(float(side), 2) for side in (x, y, w, h)]
            annotations.append(annotation(len(annotations) + 1, number, name, box))
    return {"images": images, "annotations": annotations, "categories": coco_categories()}


def write_world(root: Path, document: dict[str, Any], name: str = "train") -> str:
    """Writes pictures and annotations; returns the split's name, `ovcoco:DIR:JSON`."""
    sizes = {each["file_name"]: (each["height"], each["width"]) for each in document["images"]}
    write_images(root / "images", sizes)
    path = write_json(root / f"{name}.json", document)
    return f"ovcoco:{root / 'images'}:{path}"


class FakeTextEncoder:
    """A text encoder whose vectors depend on the text alone."""

    identity = "fake:0"

    def __init__(self, embed_dim: int = 8) -> None:
        self._embed_dim = embed_dim

    def encode_texts(self, texts: list[str]) -> np.ndarray:
        rows = [
            np.random.default_rng(list(text.encode())).normal(size=self._embed_dim)
            for text in texts
        ]
        vectors = np.stack(rows)
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def vocabulary_of(split: Any) -> Vocabulary:
    return build_vocabulary(split.categories, ["a photo of {article} {}."], FakeTextEncoder())
