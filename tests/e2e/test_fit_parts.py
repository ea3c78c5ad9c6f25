"""`fit` with less memory: batches in parts, encoder layers computed twice."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dkdetr.data.loader import make_training_loader
from dkdetr.data.splits import load_split
from dkdetr.engine.distributed import Ranks
from dkdetr.engine.interruption import StopFlag
from dkdetr.errors import UsageError
from dkdetr.student.encoder import EncoderLayer
from pipeline import fit_training
from pipeline.fit import fit_plan, fit_proposals
from pipeline.fit_training import NetworkTraining, StateFile, refuse_impossible
from pipeline.proposal_network import load_network
from pipeline.request import CacheRequest
from pipeline.source_images import check_images
from tests.e2e.small_coco import write_coco_folder
from tests.e2e.test_fit_proposals import OVERRIDES

EXACT = (*OVERRIDES, "student.dropout=0.0", "student.backbone.norm=frozen", "data.workers=0")
"""No batch statistics and no draws: what a part computes does not depend on the others."""
ALONE = Ranks(rank=0, world_size=1, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def request_(tmp_path_factory: pytest.TempPathFactory) -> CacheRequest:
    folder = tmp_path_factory.mktemp("fit-parts")
    split = write_coco_folder(folder, "train2017", num_images=8, seed=2)
    return CacheRequest(
        split=split, out=folder / "whole", experiment="pictograms_tiny", overrides=EXACT,
        fit_epochs=1, device="cpu",
    )  # fmt: skip


def first_gradients(request: CacheRequest) -> tuple[dict[str, torch.Tensor], list[int]]:
    """Returns the first step's gradients and how many objects each part of its batch has."""
    split = load_split(request.split, request.data_root)
    config = fit_plan(request, split).config
    training = NetworkTraining(config, split, StateFile(request.out, ""), ALONE, StopFlag())
    loader = iter(make_training_loader(split, training._vocabulary, config, cache_path=None))
    group = [next(loader) for _ in range(config.compute.micro_batches)]
    training._step(training.trunk, group)
    counts = [sum(len(each.labels) for each in part.targets) for part in group]
    weights = training.trunk.named_parameters()
    return {name: each.grad for name, each in weights if each.grad is not None}, counts


def with_more(request: CacheRequest, *more: str, out: str = "more") -> CacheRequest:
    return replace(request, overrides=(*request.overrides, *more), out=request.out.with_name(out))


def test_parts_add_up_to_the_gradient_of_the_whole(request_: CacheRequest) -> None:
    whole, (num_objects,) = first_gradients(request_)
    parts, counts = first_gradients(with_more(request_, "compute.micro_batches=4"))
    assert sum(counts) == num_objects
    assert len(set(counts)) > 1, "or each part's own count would divide it as well"
    assert parts.keys() == whole.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, atol=1e-6, rtol=1e-3, msg=name)


def trained(request: CacheRequest, said: list[str] | None = None) -> dict[str, torch.Tensor]:
    split = load_split(request.split, request.data_root)
    request.out.mkdir(exist_ok=True)
    say = (lambda _: None) if said is None else said.append
    path = fit_proposals(request, split, check_images(split, decode=False), say)
    return load_network(path)[0].state_dict()


def test_layers_computed_twice_train_the_same_network_and_are_told(
    request_: CacheRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    request_ = with_more(request_, "student.dropout=0.1", out="drops")
    calls: list[int] = []
    forward = EncoderLayer.forward

    def counted(layer: EncoderLayer, *args: object) -> torch.Tensor:
        calls.append(1)
        return forward(layer, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(EncoderLayer, "forward", counted)
    kept, num_calls = trained(request_), len(calls)
    asked = trained(with_more(request_, "compute.activation_checkpointing=true", out="asked"))
    assert len(calls) == 3 * num_calls
    monkeypatch.setattr(fit_training, "wants_recomputing", lambda *_: True)  # a GPU's answer
    said: list[str] = []
    by_itself = trained(with_more(request_, out="itself"), said)
    assert len(calls) == 5 * num_calls
    assert any("computed twice" in line for line in said)
    for other in (asked, by_itself):
        assert all(torch.equal(tensor, other[name]) for name, tensor in kept.items())


def test_parts_come_of_set_alone_and_must_divide(request_: CacheRequest, tmp_path: Path) -> None:
    split = load_split(request_.split, request_.data_root)
    file = tmp_path / "own.toml"
    file.write_text('extends = "pictograms_tiny"\n[compute]\nmicro_batches = 3\n')

    def parts(*more: str) -> int:
        request = replace(with_more(request_, *more), experiment=str(file))
        config = fit_plan(request, split).config
        refuse_impossible(config, world_size=1)
        return config.compute.micro_batches

    assert parts() == 1  # three parts of `train`'s batches
    assert parts("compute.micro_batches=2") == 2
    with pytest.raises(UsageError, match="4 images do not divide by 3 micro-batches: lower"):
        parts("compute.micro_batches=3")


def test_the_training_takes_batches_part_by_part(
    request_: CacheRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[list[int]] = []
    step = NetworkTraining._step

    def noted(self: NetworkTraining, model: torch.nn.Module, group: Sequence) -> torch.Tensor:
        taken.append([len(part.targets) for part in group])
        return step(self, model, group)

    monkeypatch.setattr(NetworkTraining, "_step", noted)
    trained(with_more(request_, "compute.micro_batches=2", out="halves"))
    assert taken == [[2, 2], [2, 2]]
