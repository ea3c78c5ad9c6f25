import copy
import dataclasses
import gc
import os

import numpy as np
import pytest
import torch

from cache.export import export_cache
from cache.location import RemotePath
from cache.resident import MEMORY_FOLDER
from cache.spec import UnsealedCacheError
from cache.store import open_cache
from dkdetr.boxes import cxcywh_to_xyxy
from dkdetr.config import (
    DataConfig,
    EvalConfig,
    ExperimentConfig,
    KDConfig,
    OptimConfig,
)
from dkdetr.data.image_files import UnreadableImageError
from dkdetr.data.loader import batches_per_epoch, make_evaluation_loader, make_training_loader
from dkdetr.data.splits import load_split
from dkdetr.data.vocabulary import from_metadata
from dkdetr.errors import DataError, MismatchError, UsageError
from tests.unit.data_cache import DIM, write_cache
from tests.unit.data_world import (
    annotation,
    category_id,
    coco_document,
    vocabulary_of,
    write_world,
)


def config(**changes) -> ExperimentConfig:
    base = ExperimentConfig(
        name="test",
        seed=7,
        kd=KDConfig(start_epoch=1, regions_per_image=5),
        optim=OptimConfig(epochs=3),
        data=DataConfig(batch_size=2, workers=0, sampler="uniform", image_size=96),
        eval=EvalConfig(batch_size=3),
    )
    data = {key: changes.pop(key) for key in list(changes) if hasattr(base.data, key)}
    return dataclasses.replace(base, data=dataclasses.replace(base.data, **data), **changes)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    split = load_split(write_world(root, coco_document()), root)
    return root, split, write_cache(root / "cache", split)


def tensors_of(batch) -> list[torch.Tensor]:
    images = batch.images
    found = [images.pixels, images.padding_mask, images.image_sizes_hw, images.original_sizes_hw]
    found.append(torch.tensor(images.image_ids))
    for target in batch.targets:
        found += [target.labels, target.boxes_cxcywh]
    if batch.regions is not None:
        found += [batch.regions.boxes_cxcywh, batch.regions.embeddings, batch.regions.valid]
    return found


def assert_same(batches, others):
    assert len(batches) == len(others)
    for ours, theirs in zip(batches, others, strict=True):
        for one, two in zip(tensors_of(ours), tensors_of(theirs), strict=True):
            assert one.dtype == two.dtype
            assert torch.equal(one, two)


def run(world, *, settings=None, **options):
    _, split, cache_path = world
    settings = settings or config()
    arguments = {"cache_path": cache_path, **options}
    return list(make_training_loader(split, vocabulary_of(split), settings, **arguments))


def test_a_batch_holds_what_the_structures_promise(world):
    _, split, _ = world
    vocabulary = vocabulary_of(split).base()
    batches = run(world)
    assert len(batches) == 3 * 3  # seven images have base boxes
    for number, batch in enumerate(batches):
        images = batch.images
        assert images.pixels.shape == (2, 3, 96, 96)
        assert images.pixels.dtype == torch.float32
        for row, target in enumerate(batch.targets):
            height, width = images.image_sizes_hw[row].tolist()
            assert (~images.padding_mask[row]).sum() == height * width
            assert not images.padding_mask[row, :height, :width].any()
            assert target.labels.dtype == torch.int64
            names = {vocabulary.names[label] for label in target.labels.tolist()}
            assert names <= {"person", "car"}
            corners = cxcywh_to_xyxy(target.boxes_cxcywh)
            assert (corners >= -1e-6).all()
            assert (corners <= 1 + 1e-6).all()
        if number < 3:
            assert batch.regions is None
            continue
        assert batch.regions.embeddings.shape == (2, 5, DIM)
        norms = batch.regions.embeddings.norm(dim=-1)
        torch.testing.assert_close(norms, batch.regions.valid.float(), atol=2e-3, rtol=0)
        assert (batch.regions.boxes_cxcywh > 0).all()
    assert any(batch.regions is not None and batch.regions.valid.any() for batch in batches)


def test_each_sample_draws_its_own_view(world):
    settings = config(scale_range=(0.1, 0.9), kd=KDConfig(regions_per_image=0))
    batches = run(world, settings=settings, cache_path=None)
    scales = [max(size) for batch in batches for size in batch.images.image_sizes_hw.tolist()]
    assert len(scales) == 18
    assert len(set(scales)) >= 12  # of the 77 lengths that a longest side can have


def test_epochs_differ_and_each_shows_an_image_once(world):
    batches = run(world)
    epochs = [batches[start : start + 3] for start in (0, 3, 6)]
    shown = [[i for batch in epoch for i in batch.images.image_ids] for epoch in epochs]
    assert all(len(set(each)) == 6 for each in shown)
    assert len({tuple(each) for each in shown}) == 3
    assert 8 not in {number for each in shown for number in each}


def test_loader_processes_ranks_and_resuming_change_nothing(world):
    alone = run(world)
    assert_same(run(world, settings=config(workers=2)), alone)
    assert_same(run(world, start_epoch=1, start_batch=2), alone[5:])
    assert run(world, start_epoch=2, start_batch=3) == []
    ranks = [run(world, rank=rank, world_size=2) for rank in (0, 1)]
    for whole, first, second in zip(alone, *ranks, strict=True):
        assert whole.images.image_ids == first.images.image_ids + second.images.image_ids
        together = torch.cat((first.images.pixels, second.images.pixels))
        assert torch.equal(together, whole.images.pixels)
        if whole.regions is not None:
            together = torch.cat((first.regions.embeddings, second.regions.embeddings))
            assert torch.equal(together, whole.regions.embeddings)


def test_exports_shared_memory_and_urls_give_the_same_batches(world, tmp_path, monkeypatch):
    # Or two loader processes would be one on a machine of one core.
    monkeypatch.setattr("dkdetr.data.loader.cores_at_hand", lambda: 4)
    _, _, cache_path = world
    alone = run(world)
    export_cache(open_cache(cache_path), tmp_path / "export")
    assert_same(run(world, cache_path=tmp_path / "export"), alone)
    resident = config(cache_mode="resident")
    assert_same(run(world, settings=resident), alone)
    assert_same(run(world, settings=config(cache_mode="resident", workers=2)), alone)
    assert_same(run(world, settings=resident, cache_path=tmp_path / "export"), alone)
    assert_same(run(world, cache_path=RemotePath(f"file://{cache_path}")), alone)
    gc.collect()
    root = open_cache(cache_path).info.merkle_root
    assert not list(MEMORY_FOLDER.glob(f"dkdetr-{os.getuid()}-{root[:24]}*"))


@pytest.mark.parametrize("cache_mode", ["stored", "resident"])
def test_what_overlaps_a_base_object_is_never_handed_out(world, cache_mode):
    reader = open_cache(world[2])
    allowed, refused = [], []
    for image_id in reader.image_ids.tolist():
        rows = reader.rows(image_id)
        near = rows.max_base_iou >= 0.5
        allowed.append(rows.region_embeddings[~near])
        refused.append(rows.region_embeddings[near])
    allowed, refused = np.concatenate(allowed), np.concatenate(refused)
    assert len(allowed) > len(refused) > 10
    given = [
        row
        for batch in run(world, settings=config(cache_mode=cache_mode))
        if batch.regions is not None
        for row in batch.regions.embeddings[batch.regions.valid].numpy()
    ]
    assert len(given) > 20
    for row in given:
        assert np.abs(allowed - row).max(axis=1).min() < 1e-3
        assert np.abs(refused - row).max(axis=1).min() > 1e-2


def test_the_global_generators_do_not_notice(world):
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002
    before = (torch.get_rng_state(), np.random.get_state()[1])  # noqa: NPY002
    run(world)
    assert torch.equal(torch.get_rng_state(), before[0])
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002


def test_novel_annotations_have_no_say(world, tmp_path):
    _, _, cache_path = world
    document = coco_document()
    changed = copy.deepcopy(document)
    kept = [each for each in changed["annotations"] if each["category_id"] != category_id("cat")]
    novel = [
        annotation(1000 + i, 1 + i % 7, "dog", [i, i, 20, 20], iscrowd=i % 2) for i in range(14)
    ]
    changed["annotations"] = [*novel[:7], *kept, *novel[7:]]
    split = load_split(write_world(tmp_path, document), tmp_path)
    other = load_split(write_world(tmp_path, changed), tmp_path)
    vocabulary = vocabulary_of(split)
    novel_rows = ~np.array(vocabulary.is_base)
    embeddings = vocabulary.embeddings.copy()
    embeddings[novel_rows] = np.roll(embeddings[novel_rows], 1, axis=0)
    noisy = from_metadata(vocabulary.metadata(), embeddings)
    ours = make_training_loader(split, vocabulary, config(), cache_path=cache_path)
    theirs = make_training_loader(other, noisy, config(), cache_path=cache_path)
    assert_same(list(ours), list(theirs))


def test_a_mirrored_view_learns_from_mirrored_crops(world, tmp_path):
    _, split, _ = world
    both = write_cache(tmp_path / "both", split, flipped=True)
    # Of these, the view decides which of the two vectors a region has: here they are opposites.
    for probability, sign in ((0.0, 1), (1.0, -1)):
        settings = config(flip_probability=probability)
        plain = run(world, settings=settings, start_epoch=1)
        ours = run(world, settings=settings, start_epoch=1, cache_path=both)
        assert any(batch.regions.valid.any() for batch in plain)
        for one, two in zip(plain, ours, strict=True):
            assert torch.equal(one.regions.boxes_cxcywh, two.regions.boxes_cxcywh)
            assert torch.equal(sign * one.regions.embeddings, two.regions.embeddings)


def test_quarantined_images_are_left_out(world, tmp_path):
    _, split, _ = world
    cache_path = write_cache(tmp_path / "cache", split, quarantined={2, 5})
    shown = {i for batch in run(world, cache_path=cache_path) for i in batch.images.image_ids}
    assert shown <= {1, 3, 4, 6, 7}
    vocabulary = vocabulary_of(split)
    assert batches_per_epoch(split, vocabulary, config(), cache_path=cache_path) == 2
    assert batches_per_epoch(split, vocabulary, config(), cache_path=None) == 3


def test_a_run_without_distillation_needs_no_cache(world):
    settings = config(kd=KDConfig(regions_per_image=0))
    plain = run(world, settings=settings, cache_path=None)
    assert all(batch.regions is None for batch in plain)
    assert_same(run(world, settings=settings), plain)
    with pytest.raises(UsageError, match="--cache"):
        run(world, cache_path=None)


def test_a_cache_or_vocabulary_of_something_else_is_refused(world, tmp_path):
    root, split, _ = world
    partial = write_cache(tmp_path / "partial", split, images=split.images[:4])
    with pytest.raises(MismatchError, match="lacks 3 of the 7"):
        run(world, cache_path=partial)
    with pytest.raises(UnsealedCacheError):
        run(world, cache_path=write_cache(tmp_path / "open", split, seal=False))
    vocabulary, undistilled = vocabulary_of(split), config(kd=KDConfig(regions_per_image=0))
    leaking = from_metadata(vocabulary.metadata() | {"is_base": [True] * 65}, vocabulary.embeddings)
    with pytest.raises(DataError, match=r"17 novel categories.*airplane"):
        make_training_loader(split, leaking, undistilled, cache_path=None)
    fewer = vocabulary.metadata()
    fewer["is_base"] = [False, *fewer["is_base"][1:]]
    fewer["is_base"][1] = False
    with pytest.raises(MismatchError, match="another split"):
        make_training_loader(
            split,
            from_metadata(fewer, vocabulary.embeddings),
            undistilled,
            cache_path=None,
        )
    val = load_split(write_world(root / "val", coco_document(), "my_val"), root)
    with pytest.raises(DataError, match="no training split"):
        make_training_loader(val, vocabulary, undistilled, cache_path=None)


def test_evaluation_shows_each_image_once_over_all_ranks(world):
    _, split, _ = world
    shown = []
    for rank in range(3):
        loader = make_evaluation_loader(split, config(), rank=rank, world_size=3)
        batches = list(loader)
        assert len(batches) == len(loader)
        for batch in batches:
            assert batch.image_sizes_hw.amax(dim=1).tolist() == [96] * len(batch.image_ids)
            shown += batch.image_ids
    assert sorted(shown) == [image.image_id for image in split.images]
    one = [i for batch in make_evaluation_loader(split, config()) for i in batch.image_ids]
    assert one == sorted(shown)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_truncated_image_is_one_clear_line_from_any_process(workers, tmp_path):
    document = coco_document(3)
    split = load_split(write_world(tmp_path, document), tmp_path)
    path = tmp_path / "images/2.png"
    path.write_bytes(path.read_bytes()[:500])
    settings = config(kd=KDConfig(regions_per_image=0), workers=workers)
    loader = make_training_loader(split, vocabulary_of(split), settings, cache_path=None)
    with pytest.raises(UnreadableImageError, match=r"images/2\.png") as caught:
        list(loader)
    assert "\n" not in str(caught.value)
    path.unlink()
    with pytest.raises(DataError, match=r"1 of 2 images.*2\.png"):
        make_training_loader(split, vocabulary_of(split), settings, cache_path=None)
