"""Other projects' caches and text banks, fabricated in each layout, and what must be refused."""

import json
import os
import pickle  # noqa: TID251  the lists that our reader reads are written with the real one
import shutil
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch

from cache.spec import StaleCacheError
from cache.store import open_cache
from cache.verify import verify_cache
from dkdetr.data.splits import load_split
from dkdetr.errors import (
    CorruptArtefactError,
    DataError,
    DkdetrError,
    MismatchError,
    UsageError,
)
from pipeline.import_cache import ImportRequest, import_cache
from pipeline.repair import repair_cache
from pipeline.text_bank import read_text_bank
from tests.cache_samples import committed_bytes
from tests.unit.data_world import coco_document, write_world

DIM = 16
COUNTS = {number: number % 4 + 1 for number in range(1, 8)} | {3: 0}  # the split drops image 8


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_import_world(tmp_path_factory.mktemp("world"))


def write_import_world(root):
    """Returns a folder of pictures, annotations, a text bank and boxes, and its split's name."""
    split = write_world(root, coco_document())
    generator = np.random.default_rng(0)
    np.save(root / "bank.npy", generator.normal(size=(65, DIM)).astype(np.float16) * 9)
    records = [
        {"image_id": number, "bbox": [5 * at, 4, 12, 40], "score": (7 * at % 5) / 10 + 0.1}
        for number, count in COUNTS.items()
        for at in range(count)
    ]
    (root / "boxes.json").write_text(json.dumps(records))
    return root, split


def _vectors(number, count, factor=1.0):
    generator = np.random.default_rng(number)
    return torch.from_numpy(generator.normal(size=(count, DIM)) * factor).float()


def _boxes_of(number):
    boxes = [[5 * at, 4, 5 * at + 12, 44] for at in range(COUNTS[number])]
    return torch.tensor(boxes, dtype=torch.float16).reshape(-1, 4)


def _scores_of(number):
    scores = [(7 * at % 5) / 10 + 0.1 for at in range(COUNTS[number])]
    return torch.tensor(scores, dtype=torch.float32)


def _write(folder, layout, **changes):
    folder.mkdir(parents=True)
    for number, count in COUNTS.items():
        vectors = _vectors(number, count, factor=11.0)
        if layout == "detpro":
            content = vectors
        elif layout == "oadp":
            content = {
                "embeddings": vectors.half(),
                "bboxes": _boxes_of(number),
                "objectness": _scores_of(number),
            }
        else:
            content = {
                "proposal_clip_image_embedding": vectors,
                "gt_clip_image_embedding": _vectors(100 + number, 3),
                "proposal_clip_text_embedding": vectors,
                "clip_full_image_embedding": _vectors(200 + number, 1),
            }
        torch.save(changes.get(str(number), content), folder / f"{number}.pth")
    return folder


def _request(world, layout, source, out, **changes):
    root, split = world
    boxes = None if layout == "oadp" else str(root / "boxes.json")
    request = ImportRequest(
        layout=layout, source=source, split=split, out=out, text_bank=root / "bank.npy", boxes=boxes
    )
    return replace(request, **changes)


@pytest.mark.parametrize("layout", ["detpro", "oadp", "hdovd"])
def test_a_foreign_cache_is_taken_over(world, tmp_path, layout):
    source = _write(tmp_path / "foreign", layout)
    summary = import_cache(_request(world, layout, source, tmp_path / "c"))
    assert (summary.num_images, summary.num_absent) == (7, 0)
    assert summary.num_regions == sum(COUNTS.values())
    assert verify_cache(tmp_path / "c").good
    reader = open_cache(tmp_path / "c")
    assert reader.info.provenance["imported"] == layout
    assert reader.info.teacher == "imported:ViT-B-32-quickgelu:openai"
    for number, count in COUNTS.items():
        rows = reader.rows(number)
        scores = _scores_of(number).numpy()
        order = np.argsort(-scores, kind="stable")
        wanted = _vectors(number, count).numpy()[order]
        wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
        np.testing.assert_allclose(rows.region_embeddings, wanted, atol=2e-3)
        np.testing.assert_allclose(rows.objectness, scores[order], atol=1e-6)
        if count:
            np.testing.assert_array_equal(rows.boxes_xyxy, _boxes_of(number).numpy()[order])
        num_gt = 3 if layout == "hdovd" else 0
        assert rows.gt_embeddings.shape == (num_gt, DIM)
        assert np.isnan(rows.image_embedding).all() == (layout != "hdovd")
    metadata, embeddings = reader.text()
    assert len(metadata["names"]) == len(embeddings) == 65
    again = import_cache(_request(world, layout, source, tmp_path / "c"))
    assert again.merkle_root == summary.merkle_root


def test_a_zip_gives_the_same_rows_as_a_folder(world, tmp_path):
    source = _write(tmp_path / "foreign", "detpro")
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for file in sorted(source.iterdir()):
            archive.write(file, f"data/lvis_clip_image_embedding/train2017/{file.name}")
    import_cache(_request(world, "detpro", source, tmp_path / "a"))
    import_cache(_request(world, "detpro", tmp_path / "all.zip", tmp_path / "b"))
    first, second = open_cache(tmp_path / "a"), open_cache(tmp_path / "b")
    for number in COUNTS:
        np.testing.assert_array_equal(
            first.rows(number).region_embeddings, second.rows(number).region_embeddings
        )


def test_oadps_globals_become_the_whole_images(world, tmp_path):
    source = _write(tmp_path / "foreign", "oadp")
    (tmp_path / "globals").mkdir()
    for number in COUNTS:
        torch.save(_vectors(300 + number, 1)[0], tmp_path / "globals" / f"{number}.pth")
    request = _request(world, "oadp", source, tmp_path / "c", image_source=tmp_path / "globals")
    import_cache(request)
    wanted = _vectors(305, 1)[0].numpy()
    found = open_cache(tmp_path / "c").rows(5).image_embedding
    np.testing.assert_allclose(found, wanted / np.linalg.norm(wanted), atol=2e-3)


class _Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_what_is_not_what_it_says_is_refused_by_image(world, tmp_path):
    canary = tmp_path / "ran"
    cases = [
        ("detpro", {"4": _vectors(4, 3)}, DataError, "image 4 has 3 embeddings.* 1 boxes"),
        ("detpro", {"4": _vectors(4, 1)[:, :8]}, DataError, "vectors of 8 numbers"),
        ("detpro", {"4": _vectors(4, 1) * 0}, DataError, "zero or not finite"),
        ("detpro", {"4": _vectors(4, 1) / 0}, DataError, "zero or not finite"),
        ("oadp", {"4": {"embeddings": _vectors(4, 1)}}, DataError, "lacks bboxes, objectness"),
        ("hdovd", {"4": {
            "proposal_clip_image_embedding": _vectors(4, 1),
            "gt_clip_image_embedding": _vectors(4, 9),
            "clip_full_image_embedding": _vectors(4, 1),
        }}, DataError, "3 base boxes.*--no-gt"),
        ("detpro", {"4": _Payload(str(canary))}, CorruptArtefactError, "without running it"),
    ]  # fmt: skip
    for number, (layout, changes, error, message) in enumerate(cases):
        source = _write(tmp_path / f"foreign{number}", layout, **changes)
        with pytest.raises(error, match=message):
            import_cache(_request(world, layout, source, tmp_path / f"c{number}"))
    assert not canary.exists()


def test_absent_images_are_set_aside_and_a_foreign_split_is_refused(world, tmp_path):
    source = _write(tmp_path / "foreign", "oadp")
    (source / "6.pth").unlink()
    summary = import_cache(_request(world, "oadp", source, tmp_path / "c"))
    assert summary.num_absent == 1
    assert open_cache(tmp_path / "c").quarantined == {6: "not in the imported cache"}
    for number in (1, 2, 4, 5):
        (source / f"{number}.pth").unlink()
    with pytest.raises(DataError, match="belongs to another split"):
        import_cache(_request(world, "oadp", source, tmp_path / "d"))
    with pytest.raises(UsageError, match="--boxes"):
        _request(world, "detpro", source, tmp_path / "e", boxes=None)
    with pytest.raises(UsageError, match="its own boxes"):
        _request(world, "oadp", source, tmp_path / "e", boxes=str(tmp_path))
    whole = _write(tmp_path / "whole", "detpro")
    pickled = _request(world, "detpro", whole, tmp_path / "e", boxes=str(world[0] / "boxes.pkl"))
    (world[0] / "boxes.pkl").write_bytes(b"any")
    with pytest.raises(UsageError, match="state the order"):
        import_cache(pickled)
    with pytest.raises(UsageError, match="drop 'novel='"):
        import_cache(replace(pickled, boxes="x.pkl?order=image_id&novel=unseen"))


def test_boxes_of_mmdets_pickled_list_give_the_same_cache(world, tmp_path):
    root, split = world
    order = [image.image_id for image in load_split(split, root).images]
    document = json.loads(load_split(split, root).annotations_path.read_bytes())
    listed = [image["id"] for image in document["images"]]
    records = json.loads((root / "boxes.json").read_text())

    def table(number):
        own = [each for each in records if each["image_id"] == number]
        rows = [
            [x, y, x + width, y + height, each["score"]]
            for each in own
            for x, y, width, height in [each["bbox"]]
        ]
        return np.array(rows, dtype=np.float32).reshape(-1, 5)

    source = _write(tmp_path / "foreign", "detpro")
    summary = import_cache(_request(world, "detpro", source, tmp_path / "json"))
    roots = set()
    for name, ids in (("image_id", sorted(order)), ("annotations", listed)):
        path = tmp_path / f"{name}.pkl"
        path.write_bytes(pickle.dumps([table(number) for number in ids]))
        request = _request(world, "detpro", source, tmp_path / name, boxes=f"{path}?order={name}")
        roots.add(import_cache(request).merkle_root)
    assert roots == {summary.merkle_root}
    wrong = tmp_path / "wrong.pkl"
    wrong.write_bytes(pickle.dumps([table(number) for number in sorted(order, reverse=True)]))
    request = _request(world, "detpro", source, tmp_path / "w", boxes=f"{wrong}?order=image_id")
    with pytest.raises(DataError, match="not of one run, or not in one order"):
        import_cache(request)


def test_a_damaged_import_is_imported_again_to_the_same_bytes(world, tmp_path):
    source = _write(tmp_path / "foreign", "hdovd")
    cache = tmp_path / "c"
    summary = import_cache(_request(world, "hdovd", source, cache, data_root=world[0]))
    file = cache / "data.zarr/region_embeddings/c/0/0/0"
    whole = bytearray(file.read_bytes())
    whole[len(whole) // 2] ^= 8
    file.write_bytes(whole)
    assert not verify_cache(cache).good
    # Not there, and other than it was: nothing is taken out of what can still be read.
    before = committed_bytes(cache)
    moved = source.rename(tmp_path / "elsewhere")
    with pytest.raises(DkdetrError):
        repair_cache(cache)
    first, second, *_ = sorted(_write(source, "hdovd").glob("*.pth"))
    shutil.copyfile(second, first)
    with pytest.raises(StaleCacheError, match="nothing was taken out"):
        repair_cache(cache)
    after = committed_bytes(cache)
    assert after.pop(".lock", None) == before.pop(".lock", None)
    assert after == before
    shutil.rmtree(source)
    moved.rename(source)
    repaired = repair_cache(cache)
    assert repaired.repaired == ("shard 000000",)
    assert repaired.merkle_root == summary.merkle_root
    assert verify_cache(cache).good


def _bank(num, dim=DIM):
    return np.random.default_rng(3).normal(size=(num, dim))


@pytest.mark.parametrize(
    ("layout", "suffix"),
    [("rows", "npy"), ("rows", "pt"), ("half", "npy"), ("columns", "npy"), ("columns", "pt")],
)
def test_a_text_bank_comes_in_any_orientation(tmp_path, layout, suffix):
    matrix = _bank(12) * 7
    stored = {"rows": matrix, "half": matrix.astype(np.float16), "columns": matrix.T}[layout]
    path = tmp_path / f"bank.{suffix}"
    if suffix == "npy":
        np.save(path, stored)
    else:
        torch.save(torch.from_numpy(stored.copy()), path)
    rows = read_text_bank(path, 12)
    wanted = matrix / np.linalg.norm(matrix, axis=1, keepdims=True)
    np.testing.assert_allclose(rows, wanted, atol=1e-3)
    assert rows.dtype == np.float32


def test_a_row_for_the_background_is_taken_out(tmp_path):
    path, matrix = tmp_path / "vild.npy", _bank(13)
    np.save(path, matrix.T)
    with pytest.raises(UsageError, match="--background first"):
        read_text_bank(path, 12)
    unit = matrix / np.linalg.norm(matrix, axis=1, keepdims=True)
    np.testing.assert_allclose(read_text_bank(path, 12, background="first"), unit[1:], atol=1e-6)
    np.testing.assert_allclose(read_text_bank(path, 12, background="last"), unit[:-1], atol=1e-6)
    matrix[0] = 0
    np.save(path, matrix.T)
    np.testing.assert_allclose(read_text_bank(path, 12), unit[1:], atol=1e-6)


def test_a_bank_that_does_not_fit_is_refused(tmp_path, world):
    np.save(tmp_path / "a.npy", _bank(12))
    with pytest.raises(MismatchError, match=r"\[12, 16\], and not 99 names"):
        read_text_bank(tmp_path / "a.npy", 99)
    with pytest.raises(MismatchError, match="of 8 numbers"):
        read_text_bank(tmp_path / "a.npy", 12, embed_dim=8)
    np.save(tmp_path / "square.npy", _bank(16))
    with pytest.raises(UsageError, match="cannot be told apart"):
        read_text_bank(tmp_path / "square.npy", 16)
    zero = _bank(12)
    zero[5] = 0
    np.save(tmp_path / "zero.npy", zero)
    with pytest.raises(DataError, match="zero or not finite"):
        read_text_bank(tmp_path / "zero.npy", 12)
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(CorruptArtefactError, match=r"no plain \.npy"):
        read_text_bank(tmp_path / "objects.npy", 1)
    assert load_split(world[1], world[0]).categories
