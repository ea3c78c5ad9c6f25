"""Benchmarks beside others' code: who is not here is named, ours is timed and printed anyhow."""

import argparse
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from dkdetr.student.attention_reference import plain_attention
from tests.attention_cases import draw
from tests.benchmarks import attention, inference, step, teacher_free
from tests.benchmarks.detectors import refuse_idle
from tests.benchmarks.original_op import MODULE
from tests.benchmarks.peers import Peers


def test_who_is_not_installed_is_named_once_and_is_no_failure(capsys):
    peers = Peers()
    for _ in range(2):
        assert peers.measured("theirs", ("json", "no_such_module"), lambda: 1) is None
    assert capsys.readouterr().out == "theirs: not installed (no_such_module), so not timed\n"
    assert peers.measured("theirs", ("json",), lambda: 1) == 1
    assert peers.exit_code() == 0


def test_who_does_not_load_is_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "built_for_another.py").write_text("raise ImportError('libcudart.so.12: no file')")
    monkeypatch.syspath_prepend(tmp_path)
    peers = Peers()
    assert peers.measured("theirs", ("built_for_another",), lambda: 1) is None
    assert "does not load here (libcudart.so.12: no file)" in capsys.readouterr().out
    assert peers.exit_code() == 0


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, TypeError])
def test_who_fails_is_told_and_makes_the_exit_code(kind: type[Exception], capsys):
    def fail() -> None:
        raise kind("42 GB\nand more")

    peers = Peers()
    assert peers.measured("theirs", (), fail) is None
    said = capsys.readouterr()
    assert said.out == f"theirs FAILED: {kind.__name__}: 42 GB\n"
    assert "in fail" in said.err
    assert peers.exit_code() == 1


@pytest.mark.skipif(not hasattr(torch, "AcceleratorError"), reason="since torch 2.8")
def test_a_device_that_answers_no_more_ends_the_benchmark():
    def fail() -> None:
        raise torch.AcceleratorError("an illegal memory access")

    with pytest.raises(torch.AcceleratorError):
        Peers().measured("theirs", (), fail)


def test_attention_is_timed_without_transformers(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    shapes = [(8, 8), (4, 4), (2, 2), (1, 1)]
    inputs = attention.draw("decoder", 1, shapes, torch.float32, torch.device("cpu"))
    attention.report("decoder", inputs, shapes, 1, Peers())
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "transformers: not installed (transformers), so not timed"
    assert lines[1].split()[:3] == ["decoder", "float32", "torch"]
    assert "(-, -)" in lines[1]
    assert len(lines) == 2


def test_detections_without_a_peer_have_no_ratio(capsys):
    inference.report("ours", 2, 0.5, None)
    inference.report("ours", 2, 0.5, 1.0)
    assert capsys.readouterr().out.splitlines() == [
        "| ours | 2 | 500.0 | 4.00 | - |", "| ours | 2 | 500.0 | 4.00 | 2.00 |",
    ]  # fmt: skip


def stand_in() -> ModuleType:
    """The original's extension: (values, sizes, first tokens, places, weights, images at once)."""
    module: Any = ModuleType(MODULE)

    def forward(value: Tensor, sizes: Tensor, starts: Tensor, places: Tensor, weights: Tensor,
                images: int) -> Tensor:  # fmt: skip
        assert starts.tolist() == [0, 12]
        assert images == 64
        assert places.is_contiguous()
        assert weights.is_contiguous()
        middles = places.new_full((1, places.shape[1], len(sizes), 2), 0.5)
        offsets = (places - 0.5) * sizes.flip(1)[:, None]
        shapes = [(height, width) for height, width in sizes.tolist()]
        return plain_attention(value, shapes, middles, offsets, weights.log())

    def backward(*given: Any) -> tuple[Tensor, ...]:
        *tensors, grad, images = given
        leaves = [tensors[0], *tensors[3:]]
        with torch.enable_grad():
            wanted = [each.detach().requires_grad_() for each in leaves]
            out = forward(wanted[0], tensors[1], tensors[2], wanted[1], wanted[2], images)
            return torch.autograd.grad(out, wanted, grad)

    module.ms_deform_attn_forward, module.ms_deform_attn_backward = forward, backward
    return module


def test_the_original_operator_is_given_what_it_takes(monkeypatch):
    monkeypatch.setitem(sys.modules, MODULE, stand_in())
    case = draw(((4, 3), (2, 2)), H=2)
    run = attention.the_original(list(case.shapes), torch.device("cpu"))
    found, wanted = (
        [each.clone().requires_grad_() for each in (case.value, case.offsets, case.logits)]
        for _ in range(2)
    )
    outs = (
        run(found[0], case.reference_points, *found[1:]),
        plain_attention(wanted[0], case.shapes, case.reference_points, *wanted[1:]),
    )
    torch.testing.assert_close(*outs)
    grads = (torch.autograd.grad(out.square().sum(), leaves)
             for out, leaves in zip(outs, (found, wanted), strict=True))  # fmt: skip
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("main", "setting", "instead"),
    [
        (step.main, "optim.precision=fp32", "--precision"),
        (step.main, "compute.micro_batches=2", "one batch"),
        (inference.main, "student.num_queries=7", "--queries"),
        (inference.main, "compute.compile=inductor", "--compile"),
        (teacher_free.main, "data.image_size=64", "--image-size"),
    ],
)
def test_settings_that_are_not_for_a_benchmark_are_refused(
    main, setting, instead, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "argv", ["benchmark", "--set", setting])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert f"--set {setting.partition('=')[0]} is not for this benchmark" in said
    assert instead in said


def test_settings_that_do_something_are_taken():
    refuse_idle(argparse.ArgumentParser(), ["ops.backend=torch", "computer=1"], {"compute": "no"})
