"""What a precision means on a device, and that the process's switches are put back."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from dkdetr.errors import UsageError
from dkdetr.precision import computing, computing_type, float32_products, training_type
from tests.e2e.commands import ROOT

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
VOLTA, AMPERE = (7, 0), (8, 0)


@pytest.fixture(autouse=True)
def _switches() -> Iterator[None]:
    """A failing test must not leave them to the others."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


def on(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> torch.device:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    return CUDA


def test_auto_is_half_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch):
    assert computing_type("auto", CPU) is torch.float32
    assert computing_type("auto", on(VOLTA, monkeypatch)) is torch.float16
    assert computing_type("auto", on(AMPERE, monkeypatch)) is torch.bfloat16


def test_a_training_refuses_what_the_device_cannot(monkeypatch: pytest.MonkeyPatch):
    assert training_type("bf16", CPU) is torch.bfloat16
    assert training_type("tf32", CPU) is torch.float32
    with pytest.raises(UsageError, match="fp16 wants a CUDA device"):
        training_type("fp16", CPU)
    with pytest.raises(UsageError, match="no bf16"):
        training_type("bf16", on(VOLTA, monkeypatch))
    assert training_type("fp16", on(VOLTA, monkeypatch)) is torch.float16
    assert training_type("bf16", on(AMPERE, monkeypatch)) is torch.bfloat16


def test_a_cpu_computes_in_the_type_that_is_asked_for():
    one = torch.ones(2, 2)
    for precision in ("fp32", "tf32", "auto"):
        with computing(precision, CPU):
            assert (one @ one).dtype is torch.float32
    with computing("bf16", CPU):
        assert (one @ one).dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("precision", "matmul", "convolutions"),
    [("fp32", "highest", False), ("tf32", "high", True), ("bf16", "high", True)],
)
def test_float32_is_multiplied_as_asked_for_and_meanwhile_alone(
    precision: str, matmul: str, convolutions: bool
):
    torch.set_float32_matmul_precision("medium")
    torch.backends.cudnn.allow_tf32 = not convolutions
    with contextlib.suppress(ZeroDivisionError), float32_products(precision, CUDA):
        assert torch.get_float32_matmul_precision() == matmul
        assert torch.backends.cudnn.allow_tf32 is convolutions
        raise ZeroDivisionError
    assert torch.get_float32_matmul_precision() == "medium"
    assert torch.backends.cudnn.allow_tf32 is not convolutions


def test_a_cpu_s_switches_are_left_alone():
    before = torch.get_float32_matmul_precision()
    with float32_products("tf32", CPU):
        assert torch.get_float32_matmul_precision() == before


@pytest.mark.skipif(
    not hasattr(torch.backends.cudnn, "conv"), reason="torch 2.9 brought the newer switches"
)
def test_switches_that_the_caller_has_set_are_left_alone():
    """By the newer ones, in a process of its own: torch has no way back to the older."""
    code = """
import torch
from dkdetr.precision import float32_products
torch.backends.cuda.matmul.fp32_precision = "tf32"
torch.backends.cudnn.conv.fp32_precision = "ieee"
with float32_products("fp32", torch.device("cuda")):
    print(torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["tf32", "ieee"], done.stderr


@pytest.mark.gpu
def test_tf32_rounds_and_fp32_does_not():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 256, 256, generator=generator)
    exact = (a.double() @ b.double()).abs().max()
    errors = {}
    for precision in ("fp32", "tf32"):
        with float32_products(precision, CUDA):
            found = (a.to(CUDA) @ b.to(CUDA)).cpu().double()
        errors[precision] = ((found - a.double() @ b.double()).abs().max() / exact).item()
    assert errors["fp32"] < 1e-6
    if torch.cuda.get_device_capability(CUDA) >= AMPERE:
        assert 1e-5 < errors["tf32"] < 1e-2
