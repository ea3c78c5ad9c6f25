"""Updates that a norm forbids: nothing moves, and a GPU's numbers are asked for without waiting."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dkdetr.engine import guarded_update
from dkdetr.engine.guarded_update import update_where_finite


def layer_and_optimizer(fused: bool | None) -> tuple[nn.Module, torch.optim.AdamW]:
    torch.manual_seed(0)
    layer = nn.Linear(5, 3)
    return layer, torch.optim.AdamW(layer.parameters(), lr=0.1, fused=fused)


def fill_gradients(layer: nn.Module, step: int, factor: float = 1.0) -> None:
    torch.manual_seed(step)
    for weight in layer.parameters():
        weight.grad = factor * torch.randn_like(weight)


def state_of(layer: nn.Module, optimizer: torch.optim.AdamW) -> list[Tensor]:
    moments = [each for state in optimizer.state.values() for each in state.values()]
    return [tensor.clone() for tensor in (*layer.parameters(), *moments)]


@pytest.mark.parametrize("fused", [True, None])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_is_not_taken_leaves_no_trace(fused: bool | None, bad: float):
    """Weights, moments and counts of steps are bitwise those of a run that never had it."""
    layer, optimizer = layer_and_optimizer(fused)
    plain, plain_optimizer = layer_and_optimizer(fused)
    for step in range(3):
        fill_gradients(layer, step)
        assert update_where_finite(optimizer, torch.tensor(1.0))()
        fill_gradients(plain, step)
        plain_optimizer.step()
        before = state_of(layer, optimizer)
        fill_gradients(layer, step, bad)
        assert not update_where_finite(optimizer, torch.tensor(bad))()
        assert not hasattr(optimizer, "found_inf")
        after, wanted = state_of(layer, optimizer), state_of(plain, plain_optimizer)
        for one, other, third in zip(before, after, wanted, strict=True):
            assert torch.equal(one, other)
            assert torch.equal(one, third)


class Order(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_on_a_gpu_the_norm_is_on_its_way_before_the_update_and_nobody_waits(monkeypatch):
    order = Order()

    def noted(number: Tensor) -> Callable[[], float]:
        order.names.append("on its way")
        return number.item

    monkeypatch.setattr(guarded_update, "on_its_way", noted)
    with FakeTensorMode():
        with torch.device("cuda"):
            layer = nn.Linear(5, 3)
            norm = torch.zeros(())
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)
        for weight in layer.parameters():
            weight.grad = torch.zeros_like(weight)
        with order:
            taken = update_where_finite(optimizer, norm)
        assert order.names[0] == "on its way"
        assert "_fused_adamw_" in order.names
        with pytest.raises(DataDependentOutputException):
            taken()
        for group in optimizer.param_groups:
            group["fused"] = False
        with pytest.raises(DataDependentOutputException):
            update_where_finite(optimizer, norm)


@pytest.mark.gpu
def test_a_number_on_its_way_is_not_changed_by_what_follows():
    number = torch.full((), 3.0, device="cuda")
    read = guarded_update.on_its_way(number)
    number.fill_(4.0)
    assert read() == 3.0
