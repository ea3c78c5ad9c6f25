"""The Triton kernel: equal to the reference, chosen where it runs, dropped where it does not."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from dkdetr.device_failures import DEVICE_FAILURES
from dkdetr.errors import UsageError
from dkdetr.student import attention_backend
from dkdetr.student.attention_backend import picks_triton, use_backend
from dkdetr.triton_trial import problem_of, say_once
from tests.absent_gpu import AbsentGPU, resources
from tests.attention_cases import CASES, SHARE, SUMMED, check, sum_levels
from tests.interpreted import pass_in_interpreter
from tests.tiny_student import tiny_config, tiny_student

CUDA = torch.device("cuda", 0)
DIMS = (8, 32, 4, 4)


@pytest.fixture(autouse=True)
def _forget():
    """What was tried and said before."""
    yield
    attention_backend._problem.cache_clear()
    say_once.cache_clear()


def test_in_the_interpreter():
    """All of `kernel_in_interpreter.py`, in a process that sees Triton for the first time."""
    pass_in_interpreter(Path(__file__).with_name("kernel_in_interpreter.py"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", SHARE)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("summed", SUMMED)
def test_equals_the_reference_on_a_gpu(
    name: str, dtype: torch.dtype, summed: str, monkeypatch: pytest.MonkeyPatch
):
    from dkdetr.student.attention_op import triton_attention

    sum_levels(monkeypatch, SUMMED[summed])
    check(CASES[name](), triton_attention, "cuda", dtype)


@pytest.mark.gpu
def test_is_picked_on_a_gpu():
    assert picks_triton("auto", CUDA, torch.bfloat16, DIMS)


def test_a_cpu_goes_by_torch_without_a_word(capsys: pytest.CaptureFixture[str]):
    assert not picks_triton("auto", torch.device("cpu"), torch.float32, DIMS)
    assert not picks_triton("torch", CUDA, torch.float32, DIMS)
    assert capsys.readouterr().err == ""


def test_asked_for_where_it_cannot_run_it_is_refused():
    with pytest.raises(UsageError, match=r"ops.backend=triton.*not on 'cpu'"):
        use_backend(tiny_student(), "triton", torch.device("cpu"))


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("ptxas: no such architecture\nmore of it"),
        AssertionError("libcuda.so cannot found, no such architecture\nmore of it"),
    ],
    ids=["compiler", "driver"],
)
def test_a_kernel_that_fails_is_dropped_once_and_loudly(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    pytest.importorskip("triton")
    tries: list[torch.dtype] = []

    def fail(
        device: torch.device, dtype: torch.dtype, dims: object, num_queries: int, coordinates: int
    ) -> None:
        tries.append(dtype)
        raise error

    monkeypatch.setattr(attention_backend, "_try_out", fail)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))
    for _ in range(3):
        for dtype in (torch.float32, torch.bfloat16):
            assert not picks_triton("auto", CUDA, dtype, DIMS)
    assert tries == [torch.float32, torch.bfloat16]
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert "plain PyTorch" in said[0]
    assert "no such architecture" in said[0]
    with pytest.raises(UsageError, match="no such architecture"):
        picks_triton("triton", CUDA, torch.float32, DIMS)


def test_a_device_that_fails_is_no_reason_to_go_by_torch(monkeypatch: pytest.MonkeyPatch):
    """Out of memory, or after an illegal access: plain PyTorch would fail next."""
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))
    for kind in DEVICE_FAILURES:

        def trial(kind: type[Exception] = kind) -> None:
            raise kind("an illegal memory access")

        with pytest.raises(kind, match="illegal"):
            problem_of(CUDA, trial)


def test_what_is_wrong_with_the_trial_itself_is_no_reason_to_go_by_torch(
    monkeypatch: pytest.MonkeyPatch,
):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))

    def trial() -> None:
        raise AssertionError("a trial of two shapes")

    with pytest.raises(AssertionError, match="two shapes"):
        problem_of(CUDA, trial)


def test_old_gpus_go_by_torch(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (6, 1))
    assert not picks_triton("auto", CUDA, torch.float32, DIMS)
    assert "(7, 0)" in capsys.readouterr().err


def test_the_setting_reaches_every_attention():
    student = tiny_student(tiny_config(mask_head=True))
    use_backend(student, "torch", torch.device("cpu"))
    found = [m.backend for m in student.modules() if hasattr(m, "backend")]
    # Two encoder and two decoder layers; the mask head's encoder and its dynamic attention.
    assert found == ["torch"] * 6


# What adds to memory: Hopper four neighbouring floats at once.
ADDITIONS = {80: r"(atom|red)\.global", 90: r"(atom|red)\.global[^;]*\.v4\.f32"}
PRODUCTS = {80: r"mma\.sync[^;]*\.bf16", 90: r"wgmma[^;]*\.bf16"}


def compiled_for(
    capability: int,
    dtype: torch.dtype,
    dims: tuple[int, ...],
    coordinates: int,
    monkeypatch: pytest.MonkeyPatch,
    sizes: list[int] | None = None,
) -> list[Any]:
    """The kernels that a call compiles on such a GPU: forward, backward, level sum if it has one.

    `sizes`: of levels of 64 tokens each on average; None: 8 by 8.
    """
    from triton.runtime.driver import driver

    from dkdetr.student import attention_op

    kernels: list[Any] = []
    tile = attention_op._TILES[capability // 10, capability % 10]
    monkeypatch.setattr(attention_op, "_tile_for", lambda _device: tile)
    monkeypatch.setattr(driver, "_active", AbsentGPU(capability))
    H, C, L, P = dims
    with torch.device("meta"):
        exact = torch.promote_types(dtype, torch.float32)
        value = torch.empty(1, 64 * L, H, C, dtype=dtype)
        reference = torch.empty(1, 100, L, coordinates, dtype=exact)
        offsets = torch.empty(1, 100, H, L, P, 2, dtype=dtype)
        logits, out = offsets[..., 0], torch.empty(1, 100, H * C, dtype=dtype)
        softmax, sums = torch.empty(1, 100, H, 2, dtype=exact), value.to(exact)
    for name in ("forward_kernel", "backward_kernel", "level_sum_kernel"):
        kernel = getattr(attention_op, name)

        # As in a launch, down to how Triton tells arguments apart; but nothing is launched.
        def compile_only(*args: Any, warmup: bool, run: Any = kernel.run, **more: Any) -> None:
            kernels.append(run(*args, warmup=True, **more))

        monkeypatch.setattr(kernel, "run", compile_only)
    inputs, sizes = [value, reference, offsets, logits], sizes or [8, 8] * L
    block_s = 1 << (L * P - 1).bit_length()
    attention_op._launch(
        attention_op.forward_kernel, inputs, [out, softmax], sizes, BLOCK_S=block_s
    )
    attention_op._launch(
        attention_op.backward_kernel,
        [*inputs, softmax, out], [sums, offsets, logits], sizes, ADDED=L - 1,
    )  # fmt: skip
    if dtype is not torch.float64 and tile.summed_cells:
        attention_op._sum_level(L - 1, [*inputs[1:], softmax, out, sums], sizes)
    return kernels


@pytest.mark.parametrize("coordinates", [2, 4])
@pytest.mark.parametrize("capability", ADDITIONS)
def test_compiles_for_gpus_that_are_not_here(
    capability: int, coordinates: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Hardly a register spills, a thread reads 16 bytes at once, Hopper adds four floats at once;
    a level's sum is a product on tensor cores."""
    pytest.importorskip("triton")
    forward, backward, level_sum = compiled_for(
        capability, torch.bfloat16, DIMS, coordinates, monkeypatch
    )
    for kernel in (forward, backward, level_sum):
        taken = resources(kernel.asm["cubin"], tmp_path / "kernel.cubin")
        print(capability, kernel.name, re.findall(r"REG:\d+ STACK:\d+", taken))
        spilled = int(re.findall(r"STACK:(\d+)", taken)[0])
        assert spilled <= (8 if kernel is level_sum else 0)  # Triton 3.6 on Ampere: two registers
    assert re.search(r"ld\.global[^;]*\.v4\.b32", forward.asm["ptx"])
    assert re.search(ADDITIONS[capability], backward.asm["ptx"])
    assert re.search(PRODUCTS[capability], level_sum.asm["ptx"])


def test_one_kernel_serves_pictures_of_every_size(monkeypatch: pytest.MonkeyPatch):
    """Triton tells 1 and what 16 divides from other numbers: nothing of it reaches a kernel."""
    pytest.importorskip("triton")
    dims, first = (2, 8, 2, 2), None
    for sizes in ([8, 8, 8, 8], [16, 7, 4, 4], [64, 1, 1, 64], [112, 1, 16, 1]):
        with monkeypatch.context() as patch:
            found = compiled_for(90, torch.bfloat16, dims, 2, patch, sizes)
        first = first or found
        assert all(one is other for one, other in zip(first, found, strict=True)), sizes


@pytest.mark.parametrize(
    ("dtype", "capability", "num_kernels"),
    [
        (torch.float64, 90, 2),
        (torch.float32, 90, 3),
        (torch.float16, 90, 3),
        (torch.float16, 70, 2),  # no level is summed there
    ],
)
def test_other_types_compile_too(
    dtype: torch.dtype, capability: int, num_kernels: int, monkeypatch: pytest.MonkeyPatch
):
    """The interpreter knows operations that the compiler lacks for a type, or for an old GPU."""
    pytest.importorskip("triton")
    assert len(compiled_for(capability, dtype, (2, 5, 2, 3), 2, monkeypatch)) == num_kernels
