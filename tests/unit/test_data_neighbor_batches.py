"""Batches of related images: the same epoch in other company."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from cache.image_graph import image_graph
from cache.neighbor_lists import NeighborLists
from cache.neighbors import NeighborSettings, build_neighbors
from dkdetr.config import ComputeConfig, RelationalKDConfig
from dkdetr.data.loader import make_training_loader
from dkdetr.data.neighbor_batches import (
    RelatedCompany,
    RelatedImages,
    gather_related,
    places_for_neighbors,
    related_images,
)
from dkdetr.data.samplers import (
    BatchPlan,
    TrainingBatchSampler,
    epoch_length,
    epoch_order,
    uniform_factors,
)
from dkdetr.errors import MismatchError, UsageError
from dkdetr.experiment_file import ConfigError, load_experiment
from tests.unit.data_cache import write_cache
from tests.unit.data_world import vocabulary_of
from tests.unit.test_data_loader import assert_same, config, run, world

__all__ = ["world"]


def clusters(num_images: int, size: int) -> RelatedImages:
    """Images of one cluster are all related to each other."""
    members = [
        [other for other in range(i - i % size, min(i - i % size + size, num_images)) if other != i]
        for i in range(num_images)
    ]
    indptr = np.cumsum([0, *(len(each) for each in members)])
    return RelatedImages(indptr, np.array([m for each in members for m in each], dtype=np.int64))


def company(related, factors, *, share, places, start_epoch=0, seed=3):
    return RelatedCompany(related, factors, share, places, seed, start_epoch)


def batches(factors, arrange, *, batch_size, rank=0, world_size=1, start=(0, 0), epochs=3):
    plan = BatchPlan(epoch_length(factors), batch_size, rank, world_size)
    return list(
        TrainingBatchSampler(
            factors, plan, seed=3, epochs=epochs, start_epoch=start[0], start_batch=start[1],
            arrange=arrange,
        )
    )  # fmt: skip


@given(
    n=st.integers(20, 90), share=st.integers(2, 6), cluster=st.integers(1, 9),
    repeat=st.booleans(), data=st.data(),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_an_epoch_shows_the_same_images_and_resumes_anywhere(n, share, cluster, repeat, data):
    factors = np.linspace(1, 2.7, n) if repeat else uniform_factors(n)
    places = data.draw(st.integers(1, share - 1))
    arrange = company(clusters(n, cluster), factors, share=share, places=places)
    size = 2 * share
    if epoch_length(factors) < size:
        return
    plain = batches(factors, None, batch_size=size)
    ranks = [
        batches(factors, arrange, batch_size=size, rank=rank, world_size=2) for rank in range(2)
    ]
    together = [[*one, *two] for one, two in zip(*ranks, strict=True)]
    assert len(together) == len(plain)
    for epoch in range(3):
        shown = sorted(k.image_index for batch in together for k in batch if k.epoch == epoch)
        wanted = sorted(k.image_index for batch in plain for k in batch if k.epoch == epoch)
        assert shown == wanted
    positions = [[(k.epoch, k.position) for k in batch] for batch in together]
    assert positions == [[(k.epoch, k.position) for k in batch] for batch in plain]
    cut = data.draw(st.integers(0, len(plain)))
    start = divmod(cut, len(plain) // 3)
    resumed = batches(factors, arrange, batch_size=size, rank=1, world_size=2, start=start)
    assert resumed == ranks[1][cut:]


def test_groups_hold_the_share_of_related_images_that_was_asked_for():
    num_images, share, places = 2000, 8, 2
    related = clusters(num_images, 10)
    order = epoch_order(uniform_factors(num_images), seed=0, epoch=0)
    mixed = gather_related(
        order, related, uniform_factors(num_images), share=share, num_neighbors=places, seed=0,
        epoch=0,
    )  # fmt: skip

    def pairs(samples):
        cluster = samples.reshape(-1, share) // 10
        return np.array([share - len(np.unique(row)) for row in cluster])

    assert pairs(order).mean() < 0.2
    assert pairs(mixed).mean() > 0.85 * places
    # Nearly all groups have theirs; the last few find their relatives shown already.
    assert (pairs(mixed)[: int(0.9 * len(mixed) / share)] >= places).mean() > 0.99


def test_neighbours_are_drawn_in_proportion_to_their_repeat_factors():
    # One seed, four relatives; all copies are still to be shown.
    factors = np.array([1.0, 1.0, 2.0, 3.0, 4.0])
    related = RelatedImages(np.array([0, 4, 4, 4, 4, 4]), np.array([1, 2, 3, 4]))
    order = np.array([0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 1])
    drawn = np.array([
        gather_related(order, related, factors, share=2, num_neighbors=1, seed=seed, epoch=0)[1]
        for seed in range(4000)
    ])  # fmt: skip
    counts = np.bincount(drawn, minlength=5)[1:]
    expected = 4000 * factors[1:] / factors[1:].sum()
    statistic = ((counts - expected) ** 2 / expected).sum()
    assert statistic < chi2.ppf(0.999, 3)


def test_the_marginals_are_those_of_repeat_factor_sampling():
    random = np.random.default_rng(0)
    num_images, share, epochs = 160, 8, 400
    factors = np.where(random.random(num_images) < 0.3, random.uniform(1, 3, num_images), 1.0)
    # A graph of hubs: ten images are everybody's neighbours, which would show them far too often.
    links = np.concatenate([np.arange(10), random.integers(10, num_images, 6)])
    indptr = np.arange(num_images + 1) * len(links)
    related = RelatedImages(indptr, np.tile(links, num_images))
    arrange = company(related, factors, share=share, places=4)
    shown = batches(factors, arrange, batch_size=2 * share, world_size=2, epochs=epochs)
    shown += batches(factors, arrange, batch_size=2 * share, rank=1, world_size=2, epochs=epochs)
    counts = np.bincount(
        [key.image_index for batch in shown for key in batch], minlength=num_images
    )
    expected = factors * counts.sum() / factors.sum()
    statistic = float(((counts - expected) ** 2 / expected).sum())
    # Far below a free draw's, since each epoch rounds every factor up or down.
    assert statistic < chi2.ppf(0.05, num_images - 1)
    np.testing.assert_allclose(counts / epochs, expected / epochs, atol=0.08)


def test_links_to_images_that_are_not_trained_on_are_left_out():
    rows = np.int32([0, 1, 2, 3])
    indices = np.int32([[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]])
    sims = np.float32([[0.9, 0.8, 0.7], [0.9, 0.6, 0.5], [0.8, 0.6, 0.4], [0.7, 0.5, 0.4]])
    graph = image_graph(rows, indices, sims, 4)
    lists = NeighborLists(
        object_rows=rows, object_regions=rows, indices=indices, sims=sims.astype(np.float16),
        graph_indptr=graph.indptr, graph_rows=graph.rows, graph_weights=graph.weights,
    )  # fmt: skip
    related = related_images(lists, np.array([0, 2, 3]))  # row 1 has no base box, say
    assert [related.of(i).tolist() for i in range(3)] == [[1, 2], [0, 2], [0, 1]]
    few = related_images(lists, np.array([3, 0, 2]), most=1)
    assert [few.of(i).tolist() for i in range(3)] == [[1], [2], [1]]


def with_fraction(fraction, **changes):
    base = config(**changes)
    rkd = RelationalKDConfig(neighbor_fraction=fraction)
    return dataclasses.replace(base, kd=dataclasses.replace(base.kd, rkd=rkd))


def test_the_loader_brings_related_images_together(world, tmp_path):
    _, split, _ = world
    path = write_cache(tmp_path / "c", split)
    settings = with_fraction(0.5, batch_size=2)
    with pytest.raises(MismatchError, match=r"neighbor_fraction=0\.5 .* dkdetr cache neighbors"):
        run(world, settings=settings, cache_path=path)
    lists = build_neighbors(path, NeighborSettings(k=3, device="cpu"))
    mixed = run(world, settings=settings, cache_path=path)
    plain = run(world, settings=config(batch_size=2), cache_path=path)
    per_epoch = len(plain) // 3
    assert len(mixed) == len(plain)
    assert_same(mixed[:per_epoch], plain[:per_epoch])  # burn-in: nothing is distilled
    row_of = {image.image_id: row for row, image in enumerate(split.images)}
    for epoch in (1, 2):
        mine = mixed[epoch * per_epoch : (epoch + 1) * per_epoch]
        ids = sorted(i for batch in mine for i in batch.images.image_ids)
        other = plain[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert ids == sorted(i for batch in other for i in batch.images.image_ids)
        seed, neighbor = mine[0].images.image_ids
        assert row_of[neighbor] in lists.related_images(row_of[seed])[0]
    resumed = run(world, settings=settings, cache_path=path, start_epoch=1, start_batch=1)
    assert_same(resumed, mixed[per_epoch + 1 :])


def test_each_micro_batch_has_related_images_of_its_own(world, tmp_path):
    """RKD sees one part at a time: k parts of one rank are the parts of k ranks."""
    _, split, _ = world
    path = write_cache(tmp_path / "c", split)
    build_neighbors(path, NeighborSettings(k=3, device="cpu"))
    settings = with_fraction(0.5, batch_size=4)
    in_parts = dataclasses.replace(settings, compute=ComputeConfig(micro_batches=2))
    parts = [batch.images.image_ids for batch in run(world, settings=in_parts, cache_path=path)]
    first, second = (
        [b.images.image_ids
         for b in run(world, settings=settings, cache_path=path, rank=rank, world_size=2)]
        for rank in range(2)
    )  # fmt: skip
    assert parts == [ids for pair in zip(first, second, strict=True) for ids in pair]


def test_impossible_fractions_are_refused(world):
    _, split, path = world
    assert [places_for_neighbors(f, 8) for f in (0.1, 0.25, 0.5, 0.99)] == [1, 2, 4, 7]
    with pytest.raises(UsageError, match="of 1 images a micro-batch"):
        make_training_loader(
            split, vocabulary_of(split), with_fraction(0.5, batch_size=2), cache_path=path,
            world_size=2,
        )  # fmt: skip
    for value in ("1.0", "-0.1"):
        with pytest.raises(ConfigError, match=r"kd\.rkd\.neighbor_fraction"):
            load_experiment("lvis_r50_70e", [f"kd.rkd.neighbor_fraction={value}"])
    assert load_experiment("lvis_r50_70e").config.kd.rkd.neighbor_fraction == 0
