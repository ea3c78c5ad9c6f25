"""Burn-ins are shared: a run that begins with one ends as a run that did it all itself."""

from dataclasses import replace

import pytest
import torch

from dkdetr.engine.checkpoint import load_checkpoint
from dkdetr.engine.train import train
from dkdetr.errors import MismatchError
from tests.training_world import checkpoint_of, difference, make_world, settings

CONFIG = settings(optim={"epochs": 4})
WITHOUT_KD = replace(CONFIG, kd=replace(CONFIG.kd, regions_per_image=0))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    world = make_world(tmp_path_factory.mktemp("world"))
    train(world.request("whole", CONFIG))
    train(world.request("burn-in", WITHOUT_KD, until_epoch=2))
    return world


def test_until_ends_before_its_epoch(world) -> None:
    at = checkpoint_of(world, "burn-in").progress
    assert (at.epoch, at.batch, at.iteration) == (2, 0, 6)


def test_a_run_on_a_shared_burn_in_equals_one_that_did_it_all(world) -> None:
    """The burn-in had no KD queries at all; the optimiser's state finds its weights by name."""
    start = world.root / "runs" / "burn-in"
    train(world.request("from", CONFIG, start_from=start))
    assert difference(checkpoint_of(world, "whole"), checkpoint_of(world, "from")) == ""


def test_the_run_itself_keeps_the_checkpoint_at_the_edge(world) -> None:
    path = world.root / "runs" / "whole" / "checkpoints" / "burn_in.pt"
    assert load_checkpoint(path).progress.epoch == 2
    train(world.request("again", CONFIG, start_from=path))
    assert difference(checkpoint_of(world, "whole"), checkpoint_of(world, "again")) == ""


def test_a_baseline_goes_on_from_a_burn_in_that_had_kd_queries(world) -> None:
    path = world.root / "runs" / "whole" / "checkpoints" / "burn_in.pt"
    train(world.request("baseline", WITHOUT_KD, start_from=path))
    train(world.request("burn-in", WITHOUT_KD))
    assert difference(checkpoint_of(world, "baseline"), checkpoint_of(world, "burn-in")) == ""


def test_a_second_start_goes_on_with_its_own_checkpoint(world) -> None:
    start = world.root / "runs" / "whole" / "checkpoints" / "burn_in.pt"
    train(world.request("cut", CONFIG, start_from=start, until_iteration=8))
    train(world.request("cut", CONFIG, start_from=start))
    assert difference(checkpoint_of(world, "whole"), checkpoint_of(world, "cut")) == ""


def test_what_belongs_to_distillation_starts_fresh(world) -> None:
    edge = load_checkpoint(world.root / "runs" / "whole" / "checkpoints" / "burn_in.pt")
    other = replace(CONFIG, seed=5)
    train(world.request("fresh", other, start_from=world.root / "runs" / "whole" / "checkpoints"
                        / "burn_in.pt", until_iteration=6))  # fmt: skip
    fresh = checkpoint_of(world, "fresh")
    assert not torch.equal(fresh.student["kd_content"], edge.student["kd_content"])
    same = [name for name in edge.student if name != "kd_content"]
    assert all(torch.equal(fresh.student[name], edge.student[name]) for name in same)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"student": {"num_queries": 11}}, "student.num_queries=10"),
        ({"student": {"backbone": {"width": 16}}}, "student.backbone.width=8"),
        ({"classifier": {"temperature": 0.1}}, "classifier.temperature=0.05"),
        ({"kd": {"start_epoch": 1}}, "kd.start_epoch=1 lies before"),
    ],
)
def test_a_burn_in_of_something_else_is_refused_by_name(world, changes, named) -> None:
    start = world.root / "runs" / "whole" / "checkpoints" / "burn_in.pt"
    config = settings(**{"optim": {"epochs": 4}, **changes})
    with pytest.raises(MismatchError, match=named):
        train(world.request(f"refused-{named}", config, start_from=start))


def test_another_order_of_samples_is_refused_in_mid_epoch_only(world) -> None:
    train(world.request("mid", CONFIG, until_iteration=4))
    start = world.root / "runs" / "mid"
    config = settings(optim={"epochs": 4}, data={"batch_size": 6})
    with pytest.raises(MismatchError, match=r"data\.batch_size=4"):
        train(world.request("refused", config, start_from=start))
    edge = world.root / "runs" / "whole" / "checkpoints" / "burn_in.pt"
    assert train(world.request("wider", config, start_from=edge)).iterations == 10


def test_another_vocabulary_is_refused(world, tmp_path) -> None:
    other = make_world(tmp_path, num_images=14)
    cut = world.root / "runs" / "whole" / "checkpoints" / "burn_in.pt"
    assert train(other.request("same names", CONFIG, start_from=cut)).iterations > 6
    loaded = load_checkpoint(cut)
    from dkdetr.engine.burn_in import check_burn_in

    renamed = replace(loaded.vocabulary, teacher="another")
    with pytest.raises(MismatchError, match="another"):
        check_burn_in(loaded, CONFIG, renamed)


def test_a_checkpoint_that_has_distilled_is_no_burn_in(world) -> None:
    with pytest.raises(MismatchError, match=r"distilled since epoch 2.*burn_in\.pt"):
        train(world.request("late", CONFIG, start_from=world.root / "runs" / "whole"))


def test_extra_queries_end_a_burn_in_as_distillation_does(world) -> None:
    """Their run keeps the checkpoint at the edge, and its later ones are no burn-in."""
    kd = replace(CONFIG.kd, regions_per_image=0, hybrid_queries=2, hybrid_repeats=1)
    run = world.root / "runs" / "extra"
    train(world.request("extra", replace(CONFIG, kd=kd), until_iteration=7))
    train(world.request("after extra", CONFIG, start_from=run / "checkpoints" / "burn_in.pt"))
    assert difference(checkpoint_of(world, "whole"), checkpoint_of(world, "after extra")) == ""
    with pytest.raises(MismatchError, match="distilled since epoch 2"):
        train(world.request("late too", CONFIG, start_from=run))
