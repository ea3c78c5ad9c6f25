"""Annotation files with anything in them: read, or refused in a sentence, never a traceback."""

import copy
import json
import random

import pytest

from cache.spec import CacheError
from dkdetr.data.splits import load_split
from dkdetr.errors import DkdetrError
from tests.unit.data_world import coco_document, write_images

_REFUSALS = (DkdetrError, CacheError)


_VALUES = [
    None, True, -1, 0, 1, 10**30, -0.5, 1e308, float("nan"), float("inf"), "", "x", "../x", "\0",
    [], [1], [1, 2, 3, 4], [[1]], {}, {"id": 1}, "9" * 50, "é", [None] * 4, ["a"] * 4,
    -(2**63), 2**63,
]  # fmt: skip


def _mutate(document, generator):
    """Changes one to three places of a document: values, keys, list lengths, order."""
    for _ in range(generator.randint(1, 3)):
        parent, key = document, generator.choice(list(document))
        while isinstance(parent[key], (dict, list)) and parent[key] and generator.random() < 0.9:
            parent = parent[key]
            key = (
                generator.choice(list(parent))
                if isinstance(parent, dict)
                else generator.randrange(len(parent))
            )
        kind = generator.randrange(4)
        if kind == 0 and isinstance(parent, dict):
            parent[str(key) + "_"] = parent.pop(key)
        elif kind == 1:
            del parent[key]
        elif kind == 2 and isinstance(parent, list):
            parent.insert(key, copy.deepcopy(generator.choice(parent)))
        else:
            parent[key] = copy.deepcopy(generator.choice(_VALUES))
    return document


def _lvis_document():
    document = coco_document()
    names = ("f", "c", "r")
    for number, category in enumerate(document["categories"]):
        category |= {
            "frequency": names[number % 3], "synset": "a.n.01", "synonyms": [category["name"]],
            "image_count": 1, "instance_count": 1, "def": "x",
        }  # fmt: skip
    for image in document["images"]:
        image |= {
            "neg_category_ids": [1], "not_exhaustive_category_ids": [2],
            "coco_url": f"http://images.cocodataset.org/train2017/{image.pop('file_name')}",
        }  # fmt: skip
    return document


def _fuzz(tmp_path, count, seed):
    """Returns how many mutated documents were valid, and how many were refused."""
    generator = random.Random(seed)
    write_images(tmp_path / "images", {"1.png": (48, 64)})
    documents = {"ovcoco": coco_document(), "lvis": _lvis_document(), "coco": coco_document()}
    texts = {kind: json.dumps(document) for kind, document in documents.items()}
    path = tmp_path / "train.json"
    valid, refusals = 0, []
    for number in range(count):
        kind = list(texts)[number % 3]
        if number % 20 == 19:
            cut = bytearray(texts[kind].encode())
            cut[generator.randrange(len(cut))] = generator.randrange(256)
            path.write_bytes(cut[: generator.randrange(len(cut))] if number % 40 == 39 else cut)
        else:
            path.write_text(json.dumps(_mutate(json.loads(texts[kind]), generator)))
        try:
            split = load_split(f"{kind}:{tmp_path / 'images'}:{path}", tmp_path)
            for image in split.images:
                split.base_boxes(image.image_id)
            valid += 1
        except DkdetrError as error:
            refusals.append(error)
    assert {error.exit_code for error in refusals} == {3}
    assert not any("\n" in str(error) for error in refusals)
    return valid, len(refusals)


def test_mutated_annotations_are_valid_or_refused(tmp_path):
    valid, refused = _fuzz(tmp_path, 300, seed=0)
    assert valid + refused == 300
    assert min(valid, refused) > 10


@pytest.mark.slow
def test_five_thousand_mutated_annotations_are_valid_or_refused(tmp_path):
    valid, refused = _fuzz(tmp_path, 5000, seed=1)
    assert valid + refused == 5000
