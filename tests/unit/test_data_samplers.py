import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dkdetr.data.annotations import BoxTable
from dkdetr.data.samplers import (
    BatchPlan,
    TrainingBatchSampler,
    derive_seed,
    epoch_length,
    epoch_order,
    repeat_factors,
    uniform_factors,
)
from dkdetr.errors import DataError, UsageError


def table(categories_of_images: list[list[int]]) -> BoxTable:
    counts = [len(each) for each in categories_of_images]
    ids = np.array([number for each in categories_of_images for number in each], dtype=np.int64)
    return BoxTable(
        offsets=np.concatenate(([0], np.cumsum(counts))).astype(np.int64),
        boxes_xyxy=np.zeros((len(ids), 4), np.float32),
        category_ids=ids,
        is_crowd=np.zeros(len(ids), bool),
        file_rows=np.arange(len(ids)),
    )


def test_repeat_factors_by_hand():
    # Category 7 on all four images, 5 on two, 9 on one (twice there, which counts once).
    boxes = table([[7, 7], [7, 5], [5, 7, 7], [9, 9, 7]])
    half, quarter = np.sqrt(0.8 / 0.5), np.sqrt(0.8 / 0.25)
    factors = repeat_factors(boxes, threshold=0.8)
    np.testing.assert_allclose(factors, [1, half, half, quarter])
    np.testing.assert_array_equal(repeat_factors(boxes, threshold=1e-3), np.ones(4))
    assert repeat_factors(table([[], []]), threshold=1.0).tolist() == [1, 1]


@given(n=st.integers(1, 300), seed=st.integers(0, 99), epoch=st.integers(0, 200))
@settings(max_examples=60, deadline=None)
def test_a_uniform_epoch_shows_each_image_once(n, seed, epoch):
    order = epoch_order(uniform_factors(n), seed=seed, epoch=epoch)
    assert sorted(order.tolist()) == list(range(n))
    np.testing.assert_array_equal(order, epoch_order(uniform_factors(n), seed=seed, epoch=epoch))


def test_epochs_and_seeds_differ():
    orders = {
        tuple(epoch_order(uniform_factors(50), seed=seed, epoch=epoch))
        for seed in range(4)
        for epoch in range(4)
    }
    assert len(orders) == 16
    assert derive_seed("view", 1, 23) != derive_seed("view", 12, 3)


@given(
    factors=st.lists(st.floats(1, 6), min_size=1, max_size=60),
    seed=st.integers(0, 9),
    epoch=st.integers(0, 50),
)
@settings(max_examples=120, deadline=None)
def test_a_repeat_factor_epoch_has_a_fixed_length_and_rounds_each_factor(factors, seed, epoch):
    values = np.array(factors)
    order = epoch_order(values, seed=seed, epoch=epoch)
    assert len(order) == epoch_length(values)
    counts = np.bincount(order, minlength=len(values))
    assert (counts <= np.ceil(values)).all()
    # One sample may be cut off the end to hold the length.
    assert np.maximum(np.floor(values) - counts, 0).sum() <= 1


def test_repeat_factors_are_met_in_the_mean():
    values = np.array([1.0, 1.3, 2.5, 1.1, 3.0, 1.7, 1.4])
    counts = np.zeros(len(values))
    for epoch in range(3000):
        counts += np.bincount(epoch_order(values, seed=3, epoch=epoch), minlength=len(values))
    np.testing.assert_allclose(counts / 3000, values, atol=0.06)


def run(factors, *, batch_size, rank=0, world_size=1, epochs=3, start=(0, 0), seed=5):
    plan = BatchPlan(epoch_length(factors), batch_size, rank, world_size)
    sampler = TrainingBatchSampler(
        factors, plan, seed=seed, epochs=epochs, start_epoch=start[0], start_batch=start[1]
    )
    batches = list(sampler)
    assert len(batches) == len(sampler)
    return batches


@given(
    n=st.integers(12, 80), share=st.integers(1, 3), world_size=st.sampled_from([1, 2, 4]),
    repeat=st.booleans(), data=st.data(),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_ranks_share_each_batch_and_a_resumed_run_goes_on(n, share, world_size, repeat, data):
    factors = np.linspace(1, 2.7, n) if repeat else uniform_factors(n)
    size = share * world_size
    alone = run(factors, batch_size=size)
    ranks = [
        run(factors, batch_size=size, rank=r, world_size=world_size) for r in range(world_size)
    ]
    together = [[key for part in parts for key in part] for parts in zip(*ranks, strict=True)]
    assert together == alone
    first_epoch = [key for batch in alone for key in batch if key.epoch == 0]
    assert [key.position for key in first_epoch] == list(range(len(first_epoch)))
    if not repeat:
        assert len({key.image_index for key in first_epoch}) == len(first_epoch) > n - size
    per_epoch = len(alone) // 3
    cut = data.draw(st.integers(0, len(alone)))
    start = divmod(cut, per_epoch)
    assert run(factors, batch_size=size, start=start) == alone[cut:]


def test_impossible_batches_are_refused():
    with pytest.raises(UsageError, match="does not divide by 3 ranks"):
        BatchPlan(100, 8, 0, 3)
    with pytest.raises(DataError, match=r"5 usable training images.*data\.batch_size=5"):
        BatchPlan(5, 8, 0, 1)
    with pytest.raises(DataError, match="no image can be trained on") as raised:
        BatchPlan(0, 1, 0, 1)
    assert "batch_size" not in str(raised.value)
    with pytest.raises(UsageError, match="outside an epoch of 5"):
        run(uniform_factors(10), batch_size=2, start=(0, 6))
