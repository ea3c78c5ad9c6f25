"""The data set on disk: what it says is what was drawn, and a second call never spoils it."""

import dataclasses
import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from dkdetr.data.split_sources import known_splits
from dkdetr.data.splits import load_split
from dkdetr.engine.start import ablated_experiment, experiment_of_split
from dkdetr.errors import CorruptArtefactError, DataError, MismatchError, UsageError
from pipeline.pictograms import dataset
from pipeline.pictograms.dataset import prepare_pictograms
from pipeline.pictograms.worlds import SIZES, WorldSize, plan_world

MINI = WorldSize(14, 10, 64, 40, 14, 3, (2, 4), (18, 34))


@pytest.fixture(autouse=True)
def mini_size(monkeypatch):
    monkeypatch.setattr(dataset, "SIZES", {"tiny": MINI})


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    patch = pytest.MonkeyPatch()
    patch.setattr(dataset, "SIZES", {"tiny": MINI})
    folder = prepare_pictograms(root, size="tiny", protocol="lvis-like", seed=3)
    patch.undo()
    return root, folder


def read(folder, part):
    return json.loads((folder / f"annotations/{part}.json").read_text())


@pytest.mark.parametrize(
    ("protocol", "known"),
    [
        ("lvis-like", "fbd75c6d334ebd7bf2591821aefd94e39a691b6f7b2ab7b44e6849dbb826a7e9"),
        ("coco-like", "bb9b74a1a529276e4f0e81d5cc841303465078584fedc4fba8d25fe37d99a0b6"),
    ],
)
def test_the_tiny_world_is_the_known_one(protocol, known):
    """Change it only together with GENERATOR_VERSION: published numbers hang on it."""
    assert plan_world(SIZES["tiny"], protocol=protocol, seed=0).split_hash == known


def test_the_tiny_world_is_as_the_benchmark_describes_it():
    world = plan_world(SIZES["tiny"], protocol="lvis-like", seed=0)
    groups = Counter(category.group for category in world.categories)
    assert groups["r"] == 17
    assert groups["f"] + groups["c"] == 48
    assert min(groups["f"], groups["c"]) >= 12
    novel = {c.category_id - 1 for c in world.categories if not c.is_base}
    labels = [
        o.label for image in world.images if image.part == "train" for o in image.plan.objects
    ]
    assert sum(label in novel for label in labels) / len(labels) == pytest.approx(0.26, abs=0.02)
    counts = Counter(labels)
    base = sorted((counts[n] for n in range(65) if n not in novel), reverse=True)
    assert base[0] > 5 * base[-1]  # a long tail


def test_the_two_full_protocols_share_names_and_differ_in_what_is_base():
    few = {name: dataclasses.replace(SIZES[name], num_train=2, num_val=2, num_held=2)
           for name in ("full", "full70")}  # fmt: skip
    worlds = {
        name: plan_world(size, protocol="coco-like", seed=0).categories
        for name, size in few.items()
    }
    base = {name: {c.drawing.name for c in each if c.is_base} for name, each in worlds.items()}
    assert {c.drawing.name for c in worlds["full"]} == {c.drawing.name for c in worlds["full70"]}
    assert (len(worlds["full"]), len(base["full"]), len(base["full70"])) == (300, 210, 70)
    assert base["full70"] < base["full"]


def test_every_size_is_a_split_and_has_an_experiment_of_its_own():
    for size in SIZES:
        assert f"pictograms_{size}_train" in known_splits()
        assert experiment_of_split(f"pictograms_{size}_train") == f"pictograms_{size}"
        assert experiment_of_split(f"pictograms_{size}_held") == f"pictograms_{size}"
        assert ablated_experiment(f"pictograms_{size}_train") == f"pictograms_{size}"
        assert (f"pictograms_{size}_held" in known_splits()) == (SIZES[size].num_held > 0)


def test_pictures_of_the_held_out_style_are_a_split(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "SIZES", {"small": MINI})
    prepare_pictograms(tmp_path, size="small", protocol="lvis-like", seed=3)
    held = load_split("pictograms_small_held", tmp_path)
    assert (len(held.images), held.is_train, held.protocol) == (MINI.num_held, False, "lvis")
    assert all(held.image_path(image).is_file() for image in held.images)
    with pytest.raises(UsageError, match="unknown split"):
        load_split("pictograms_tiny_held", tmp_path)


def test_other_seeds_draw_other_names():
    first, second = (plan_world(MINI, protocol="lvis-like", seed=seed) for seed in (0, 1))
    assert {c.drawing for c in first.categories} != {c.drawing for c in second.categories}
    assert first.split_hash != second.split_hash


def test_the_folder_holds_what_its_description_says(prepared):
    _, folder = prepared
    described = json.loads((folder / "dataset.json").read_text())
    assert described["protocol"] == "lvis"
    assert described["seed"] == 3
    assert described["num_images"] == {"train": 40, "val": 14, "held": 3}
    assert described["split_hash"] == plan_world(MINI, protocol="lvis-like", seed=3).split_hash
    assert "CC BY-SA 4.0" in (folder / "ATTRIBUTION.txt").read_text()
    for part in ("train", "val", "held"):
        document = read(folder, part)
        for image in document["images"]:
            with Image.open(folder / "images" / part / image["file_name"]) as picture:
                assert picture.size == (image["width"], image["height"]) == (64, 64)
    ids = [
        image["id"] for part in ("train", "val", "held") for image in read(folder, part)["images"]
    ]
    assert len(set(ids)) == len(ids)


def test_novel_objects_stand_in_training_images_without_annotation(prepared):
    _, folder = prepared
    world = plan_world(MINI, protocol="lvis-like", seed=3)
    novel = {c.category_id for c in world.categories if c.group == "r"}
    standing = [
        o.label + 1 in novel for i in world.images if i.part == "train" for o in i.plan.objects
    ]
    assert sum(standing) > 5
    assert not [a for a in read(folder, "train")["annotations"] if a["category_id"] in novel]
    assert [a for a in read(folder, "val")["annotations"] if a["category_id"] in novel]


def test_validation_annotates_every_object(prepared):
    _, folder = prepared
    world = plan_world(MINI, protocol="lvis-like", seed=3)
    for part in ("val", "held"):
        found = Counter(
            (a["image_id"], a["category_id"]) for a in read(folder, part)["annotations"]
        )
        drawn = Counter(
            (i.image_id, o.label + 1)
            for i in world.images
            if i.part == part
            for o in i.plan.objects
        )
        assert found == drawn


def test_federated_lists_tell_the_truth(prepared):
    _, folder = prepared
    world = plan_world(MINI, protocol="lvis-like", seed=3)
    by_id = {image.image_id: image for image in world.images}
    negatives = 0
    for part in ("train", "val"):
        document = read(folder, part)
        annotated = Counter((a["image_id"], a["category_id"]) for a in document["annotations"])
        for record in document["images"]:
            image = by_id[record["id"]]
            drawn = Counter(o.label + 1 for o in image.plan.objects)
            assert not set(record["neg_category_ids"]) & drawn.keys()
            negatives += len(record["neg_category_ids"])
            for category_id in record["not_exhaustive_category_ids"]:
                missing = drawn[category_id] - annotated[record["id"], category_id]
                assert missing == (1 if part == "train" else 0)
                assert annotated[record["id"], category_id] >= 1
    assert negatives > 50


def test_counts_in_the_category_table_are_those_of_the_file(prepared):
    _, folder = prepared
    document = read(folder, "train")
    for category in document["categories"]:
        own = [a for a in document["annotations"] if a["category_id"] == category["id"]]
        assert category["instance_count"] == len(own)
        assert category["image_count"] == len({a["image_id"] for a in own})


# pycocotools 2.0.x decodes through numpy 1's array protocol.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_boxes_are_tight_around_the_masks(prepared):
    _, folder = prepared
    for record in read(folder, "val")["annotations"]:
        mask = coco_mask.decode(record["segmentation"])
        assert int(mask.sum()) == record["area"]
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        left, top, width, height = record["bbox"]
        assert (left, top) == (columns[0], rows[0])
        assert (left + width, top + height) == (columns[-1] + 1, rows[-1] + 1)


def test_the_ordinary_reader_reads_it(prepared):
    root, folder = prepared
    train, val = (load_split(f"pictograms_tiny_{part}", root) for part in ("train", "val"))
    assert train.protocol == val.protocol == "lvis"
    assert (len(train.images), len(val.images)) == (40, 14)
    document = read(folder, "train")
    assert sum(len(train.base_boxes(i.image_id).category_ids) for i in train.images) == len(
        document["annotations"]
    )
    assert train.image_path(train.images[0]).is_file()


def test_coco_like_categories_say_base_or_novel(tmp_path):
    folder = prepare_pictograms(tmp_path, size="tiny", protocol="coco-like", seed=0)
    document = read(folder, "train")
    assert Counter(c["split"] for c in document["categories"]) == {"base": 10, "novel": 4}
    novel = {c["id"] for c in document["categories"] if c["split"] == "novel"}
    assert not novel & {a["category_id"] for a in document["annotations"]}
    assert "neg_category_ids" not in document["images"][0]
    assert load_split("pictograms_tiny_val", tmp_path).protocol == "ovcoco"


def test_a_complete_folder_is_reused(prepared, monkeypatch):
    root, folder = prepared
    monkeypatch.setattr(dataset, "write_world", lambda *_args, **_kw: pytest.fail("made again"))
    before = (folder / "dataset.json").stat().st_mtime_ns
    assert prepare_pictograms(root, size="tiny", protocol="lvis-like", seed=3) == folder
    assert (folder / "dataset.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(("protocol", "seed"), [("coco-like", 3), ("lvis-like", 4)])
def test_another_world_in_the_same_folder_is_refused(prepared, protocol, seed):
    root, _ = prepared
    with pytest.raises(MismatchError, match="another --data-root") as caught:
        prepare_pictograms(root, size="tiny", protocol=protocol, seed=seed)
    assert caught.value.exit_code == 4


def test_damage_is_named(tmp_path):
    folder = prepare_pictograms(tmp_path, size="tiny", protocol="lvis-like", seed=3)
    image = next((folder / "images/val").glob("*.jpg"))
    data = image.read_bytes()
    image.unlink()
    with pytest.raises(CorruptArtefactError, match="13 images instead of 14"):
        prepare_pictograms(tmp_path, size="tiny", protocol="lvis-like", seed=3)
    image.write_bytes(data)
    with (folder / "annotations/train.json").open("a") as file:
        file.write(" ")
    with pytest.raises(CorruptArtefactError, match=r"train\.json") as caught:
        prepare_pictograms(tmp_path, size="tiny", protocol="lvis-like", seed=3)
    assert caught.value.exit_code == 5
    (folder / "dataset.json").write_text("{")
    with pytest.raises(CorruptArtefactError, match="delete"):
        prepare_pictograms(tmp_path, size="tiny", protocol="lvis-like", seed=3)


def test_a_folder_of_someone_else_is_left_alone(tmp_path):
    mine = tmp_path / "pictograms/tiny/notes.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with pytest.raises(DataError, match=r"no dataset\.json"):
        prepare_pictograms(tmp_path, size="tiny", protocol="lvis-like", seed=0)
    assert mine.read_text() == "mine"


def test_a_death_half_way_leaves_nothing_that_looks_whole(tmp_path, monkeypatch):
    real, calls = dataset.render_scene, []

    def dying(plan, bank):
        calls.append(plan)
        if len(calls) > 5:
            raise KeyboardInterrupt
        return real(plan, bank)

    monkeypatch.setattr(dataset, "render_scene", dying)
    with pytest.raises(KeyboardInterrupt):
        prepare_pictograms(tmp_path, size="tiny", protocol="lvis-like", seed=3)
    assert not (tmp_path / "pictograms/tiny").exists()
    monkeypatch.setattr(dataset, "render_scene", real)
    folder = prepare_pictograms(tmp_path, size="tiny", protocol="lvis-like", seed=3)
    assert len(list((folder / "images/train").iterdir())) == 40


@pytest.mark.parametrize(
    ("size", "protocol", "message"),
    [("huge", "lvis-like", "unknown size 'huge'"), ("tiny", "lvis", "unknown protocol 'lvis'")],
)
def test_unknown_parameters_name_the_known_ones(tmp_path, size, protocol, message):
    with pytest.raises(UsageError, match=message):
        prepare_pictograms(tmp_path, size=size, protocol=protocol, seed=0)
