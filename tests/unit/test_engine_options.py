"""What may be put around a student: an average of its weights, recomputed layers, a compiler."""

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from dkdetr.config import ComputeConfig
from dkdetr.engine import student_setup
from dkdetr.engine.checkpoint import load_student
from dkdetr.engine.distributed import Ranks
from dkdetr.engine.student_setup import prepare_student, recompute_layers
from dkdetr.engine.train import _refuse_impossible, train
from dkdetr.engine.weight_average import WeightAverage
from dkdetr.errors import UsageError
from tests.e2e.commands import ROOT
from tests.step_options import option_config, step_under, training_batch
from tests.tiny_student import (
    image_batch,
    loss_of,
    targets,
    teacher_regions,
    text_embeddings,
    tiny_config,
    tiny_student,
)
from tests.training_world import checkpoint_of, make_world, settings


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def gradients_of(student) -> dict[str, torch.Tensor]:
    student.train()
    torch.manual_seed(3)  # for dropout
    regions = teacher_regions()
    loss_of(student(image_batch(), text_embeddings(), regions), targets(), regions).total.backward()
    return {name: p.grad for name, p in student.named_parameters() if p.grad is not None}


def test_the_average_by_hand() -> None:
    """Decay 0.5, but (1 + n) / (10 + n) is less for the first updates: 0.1, 2/11."""
    module = torch.nn.Linear(1, 1, bias=False)
    module.register_buffer("seen", torch.zeros(()))
    module.weight.data.fill_(0.0)
    average = WeightAverage(module, 0.5)
    module.weight.data.fill_(1.0)
    module.seen.fill_(7.0)
    average.update(module, 0)
    assert average.state_dict()["weight"].item() == pytest.approx(0.9)
    assert average.state_dict()["seen"].item() == 7.0
    average.update(module, 1)
    assert average.state_dict()["weight"].item() == pytest.approx(0.9 * 2 / 11 + 9 / 11)
    average.update(module, 10_000)
    assert average.state_dict()["weight"].item() == pytest.approx(
        1 - 0.5 * (0.1 - 0.1 * 9 / 11), abs=1e-6
    )


def test_a_run_keeps_its_average_apart_from_its_weights(world) -> None:
    train(world.request("average", settings(optim={"epochs": 3})))
    saved = checkpoint_of(world, "average")
    last, averaged = load_student(saved), load_student(saved, averaged=True)
    weight = "decoder.layers.0.feed_forward.linear1.weight"
    assert torch.equal(last.state_dict()[weight], saved.student[weight])
    assert torch.equal(averaged.state_dict()[weight], saved.average[weight])
    assert not torch.equal(saved.average[weight], saved.student[weight])


def test_without_an_average_there_is_none_to_score(world) -> None:
    train(world.request("plain", settings(optim={"epochs": 3, "ema_decay": 0.0})))
    with pytest.raises(UsageError, match="ema_decay"):
        load_student(checkpoint_of(world, "plain"), averaged=True)


def test_recomputed_layers_have_the_same_gradients() -> None:
    config = tiny_config(dropout=0.2)
    kept, recomputed = (tiny_student(config) for _ in range(2))
    recompute_layers((*recomputed.trunk.encoder.layers, *recomputed.decoder.layers))
    saved: list[int] = []
    wanted = gradients_of(kept)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, _same):
        gradients = gradients_of(recomputed)
    recomputed_numbers, saved = sum(saved), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, _same):
        gradients_of(tiny_student(config))
    assert recomputed_numbers < 0.8 * sum(saved)
    assert gradients.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(gradients[name], value), name


def _same(tensor):
    return tensor


_COMPILED = """
import torch
from torch._dynamo.utils import counters
from dkdetr.config import ComputeConfig
from dkdetr.engine.distributed import Ranks
from dkdetr.engine.student_setup import prepare_student
from tests.tiny_student import image_batch, teacher_regions, text_embeddings, tiny_student

torch.set_num_threads(1)
plain, compiled = tiny_student().train(), tiny_student().train()
prepare_student(compiled, ComputeConfig(compile="eager", activation_checkpointing=True))
wanted, found = (
    student(image_batch(), text_embeddings(), teacher_regions()) for student in (plain, compiled)
)
torch.testing.assert_close(found.logits, wanted.logits)
for output in (wanted, found):
    (output.logits.sum() + output.distillation.features.sum()).backward()
for (name, one), other in zip(plain.named_parameters(), compiled.parameters(), strict=True):
    if one.grad is not None:
        torch.testing.assert_close(other.grad, one.grad, msg=name)
assert list(plain.state_dict()) == list(compiled.state_dict())
assert counters["stats"]["unique_graphs"] >= 1
"""


def test_a_compiled_student_computes_the_same() -> None:
    """In a process of its own: torch.compile cannot look through the shape checks of tests."""
    done = subprocess.run(
        [sys.executable, "-c", _COMPILED], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("settings_of_compute", "reason"),
    [
        ({}, "compile=inductor"),
        ({"compile": "inductor", "micro_batches": 2}, "micro_batches=1"),
        ({"compile": "inductor"}, "wants a GPU"),
    ],
)
def test_cuda_graphs_are_refused_where_they_cannot_be(
    world, settings_of_compute: dict[str, Any], reason: str
) -> None:
    config = settings(compute={"cuda_graphs": True} | settings_of_compute)
    with pytest.raises(UsageError, match=reason):
        train(world.request("graphs", config))


def test_cuda_graphs_are_refused_on_several_ranks() -> None:
    config = settings(compute={"cuda_graphs": True, "compile": "inductor"})
    ranks = Ranks(rank=0, world_size=2, device=torch.device("cpu"))
    with pytest.raises(UsageError, match="cuda_graphs wants one process, and there are 2"):
        _refuse_impossible(config, ranks)


def test_cuda_graphs_are_asked_for_and_each_step_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    compute = ComputeConfig(compile="inductor", cuda_graphs=True)
    student, asked = tiny_student(), []
    monkeypatch.setattr(student_setup, "_check_graphs", lambda *_: None)
    monkeypatch.setattr(student, "compile", lambda **words: asked.append(words))
    prepare_student(student, compute)
    assert asked == [{"backend": "inductor", "mode": "reduce-overhead"}]
    prepare_student(student, ComputeConfig(compile="inductor"))  # of a CPU
    assert asked[1] == {"backend": "inductor", "options": {"layout_optimization": False}}
    told: list[None] = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: told.append(None))
    for graphs in (False, True):
        config = option_config("cached")
        config = replace(config, compute=replace(config.compute, cuda_graphs=graphs))
        step_under(config).step([training_batch(config)], epoch=0, iteration=0)
        assert len(told) == graphs


def test_ranks_vote_once_before_the_first_step_and_once_after_each(world, monkeypatch) -> None:
    votes: list[tuple[bool, ...]] = []
    real = Ranks.vote

    def counted(self: Ranks, *flags: bool) -> tuple[bool, ...]:
        votes.append(flags)
        return real(self, *flags)

    monkeypatch.setattr(Ranks, "vote", counted)
    train(world.request("votes", replace(settings(), checkpoint_every_s=0.0), until_iteration=3))
    assert votes == [(False,)] + 3 * [(False, True)]


def test_other_machine_settings_go_on_with_the_same_run(world) -> None:
    config = settings(optim={"epochs": 3})
    train(world.request("moved", config, until_iteration=4))
    moved = replace(config, compute=replace(config.compute, activation_checkpointing=True))
    moved = replace(moved, data=replace(moved.data, workers=1))
    assert train(world.request("moved", moved)).iterations == 9
