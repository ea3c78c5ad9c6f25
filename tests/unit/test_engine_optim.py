"""Parameter groups and the learning rate, against method A.1 and values worked out by hand."""

from dataclasses import replace

import pytest
import torch
from step_options import option_config, step_under, training_batch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dkdetr.config import OptimConfig
from dkdetr.engine.optim import (
    learning_rate_factor,
    load_optimizer,
    make_optimizer,
    parameter_groups,
    set_learning_rate,
)


class _Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.sampling_offsets = nn.Linear(4, 2)
        self.norm = nn.LayerNorm(4)
        self.neck = nn.GroupNorm(2, 4)
        self.linear = nn.Linear(4, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.kd_calibration = nn.Linear(1, 1)
        self.kd_content = nn.Parameter(self.linear.weight[0].detach().clone(), requires_grad=False)


def _by_name(toy, config):
    return {group["name"]: group for group in parameter_groups(toy, config)}


def _ids(parameters):
    return {id(parameter) for parameter in parameters}


def test_the_backbone_is_slow_and_its_norms_decay() -> None:
    toy = _Toy()
    slow = _by_name(toy, OptimConfig())["slow"]
    assert _ids(slow["params"]) == _ids(
        [*toy.backbone.parameters(), *toy.sampling_offsets.parameters()]
    )
    assert (slow["lr"], slow["weight_decay"]) == (pytest.approx(8e-5), 0.05)


def test_norms_elsewhere_do_not_decay_and_biases_do() -> None:
    toy = _Toy()
    groups = _by_name(toy, OptimConfig())
    still = [*toy.norm.parameters(), *toy.neck.parameters(), *toy.kd_calibration.parameters()]
    assert _ids(groups["norm"]["params"]) == _ids(still)
    assert groups["norm"]["weight_decay"] == 0.0
    assert id(toy.linear.bias) in _ids(groups["rest"]["params"])
    assert groups["rest"]["weight_decay"] == 0.05


def test_frozen_weights_are_left_out_but_the_kd_content_keeps_its_place() -> None:
    toy = _Toy()
    everything = _ids(p for group in parameter_groups(toy, OptimConfig()) for p in group["params"])
    assert id(toy.frozen.weight) not in everything
    assert id(toy.kd_content) in everything


@pytest.mark.parametrize(
    ("epoch", "iteration", "factor"),
    [
        (0, 0, 0.001),  # warm-up starts at its ratio
        (0, 1000, 1 - 0.5 * 0.999),  # half-way
        (2, 2000, 1.0),  # warm-up is over
        (54, 60_000, 1.0),
        (55, 60_001, 0.1),  # the drop
        (69, 80_000, 0.1),
    ],
)
def test_learning_rate(epoch: int, iteration: int, factor: float) -> None:
    assert learning_rate_factor(OptimConfig(), epoch=epoch, iteration=iteration) == pytest.approx(
        factor
    )


def test_two_drops_multiply() -> None:
    config = OptimConfig(lr_drop_epochs=(2, 4), lr_drop_factor=0.5, warmup_iterations=0)
    assert learning_rate_factor(config, epoch=5, iteration=10) == 0.25


def test_setting_the_rate_keeps_the_groups_apart() -> None:
    config = OptimConfig()
    optimizer = make_optimizer(_Toy(), config)
    assert set_learning_rate(optimizer, config, 0.5) == pytest.approx(4e-4)
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert rates == pytest.approx({"slow": 4e-5, "norm": 4e-4, "rest": 4e-4})


def test_a_saved_state_does_not_say_how_it_is_computed() -> None:
    """One saved on a GPU goes on with this machine's code, bit by bit as one saved here."""
    one, other = _Toy(), _Toy()
    other.load_state_dict(one.state_dict())
    first, second = (make_optimizer(toy, OptimConfig()) for toy in (one, other))

    def step(toy, optimizer) -> None:
        optimizer.zero_grad()
        toy.linear(torch.ones(1, 4)).sum().backward()
        optimizer.step()

    step(one, first)
    step(other, second)
    saved = first.state_dict()
    saved["param_groups"] = [group | {"fused": True} for group in saved["param_groups"]]
    load_optimizer(second, saved)
    assert [group["fused"] for group in second.param_groups] == [None] * len(second.param_groups)
    step(one, first)
    step(other, second)
    assert torch.equal(one.linear.weight, other.linear.weight)


@pytest.mark.parametrize(("device", "fused"), [("cuda", True), ("cpu", None)])
def test_on_a_gpu_one_kernel_updates_many_parameters(device: str, fused: bool | None) -> None:
    with FakeTensorMode(), torch.device(device):
        groups = make_optimizer(_Toy(), OptimConfig()).param_groups
    assert [group["fused"] for group in groups] == [fused] * len(groups)


@pytest.mark.gpu
def test_a_gpu_updates_many_parameters_at_once() -> None:
    groups = make_optimizer(_Toy().cuda(), OptimConfig()).param_groups
    assert all(group["fused"] for group in groups)


def test_a_step_goes_by_the_schedule_and_clips() -> None:
    config = option_config("cached")
    config = replace(config, optim=replace(config.optim, betas=(0.8, 0.99)))
    step = step_under(config)
    result = step.step([training_batch(config)], epoch=56, iteration=0)
    # Behind the drop (0.1), at the first step of the warm-up (0.001).
    assert result.learning_rate == pytest.approx(1e-3 * 1e-4)
    for group in step.step.optimizer.param_groups:
        assert group["lr"] == pytest.approx(1e-3 * group["lr_scale"] * 1e-4)
        assert group["betas"] == (0.8, 0.99)
    gradients = [each.grad for each in step.student.parameters() if each.grad is not None]
    clipped = torch.stack([each.norm() for each in gradients]).norm()
    assert result.statistics["grad_norm"] > 0.2  # as it was
    assert clipped == pytest.approx(0.1, rel=1e-3)
