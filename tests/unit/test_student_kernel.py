"""The Triton kernel: equal to the reference, chosen where it runs, dropped where it does not."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dkdetr.errors import UsageError
from dkdetr.student import attention_backend
from dkdetr.student.attention_backend import picks_triton, use_backend
from tests.attention_cases import CASES, SHARE, check
from tests.e2e.commands import ROOT
from tests.tiny_student import tiny_config, tiny_student

CUDA = torch.device("cuda", 0)
DIMS = (8, 32, 4, 4)


@pytest.fixture(autouse=True)
def _forget():
    """What was tried and said before."""
    yield
    attention_backend._problem.cache_clear()
    attention_backend._say_once.cache_clear()


def test_in_the_interpreter():
    """All of `kernel_in_interpreter.py`, in a process that sees Triton for the first time."""
    pytest.importorskip("triton")
    cases = Path(__file__).with_name("kernel_in_interpreter.py")
    done = subprocess.run(
        # Without the shape checks of conftest.py, which torch.compile cannot look through.
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--noconftest", str(cases)],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:]
    assert re.search(r"\d+ passed", done.stdout)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", SHARE)
@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference_on_a_gpu(name: str, dtype: torch.dtype):
    from dkdetr.student.attention_op import triton_attention

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


def test_a_kernel_that_fails_is_dropped_once_and_loudly(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    pytest.importorskip("triton")
    tries: list[torch.dtype] = []

    def fail(device: torch.device, dtype: torch.dtype, dims: object, num_queries: int) -> None:
        tries.append(dtype)
        raise RuntimeError("ptxas: no such architecture\nmore of it")

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


# Queries of a program, neighbouring channels that a thread adds to at once, and how.
ADDITIONS = {80: (4, 1, r"(atom|red)\.global"), 90: (8, 4, r"(atom|red)\.global[^;]*\.v4\.f32")}


def resources(cubin: bytes, path: Path) -> str:
    """What a compiled kernel takes: its stack is where registers spill to."""
    import triton

    path.write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = [str(tool), "-res-usage", str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("capability", ADDITIONS)
def test_compiles_for_gpus_that_are_not_here(capability: int, tmp_path: Path):
    """Registers do not spill, a thread reads 16 bytes at once, Hopper adds four floats at once."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from dkdetr.student.attention_kernels import backward_kernel, forward_kernel

    few, together, additions = ADDITIONS[capability]
    sizes = dict.fromkeys(("heights", "widths", "starts"), ("i32",) * 4)
    constants = {"H": 8, "C": 32, "L": 4, "P": 4, "BLOCK_P": 4, "BLOCK_C": 32}
    constants["EXACT"] = triton.language.float32
    for kernel, block_q in ((forward_kernel, 16), (backward_kernel, few)):
        half = ("value_ptr", "out_ptr", "grad_out_ptr")
        types = {
            name: ("*bf16" if name in half else "*fp32") if name.endswith("_ptr") else "constexpr"
            for name in kernel.arg_names
        }
        types |= {"num_tokens": "i32", "num_queries": "i32", **sizes}
        aligned = {
            (place,): [["tt.divisibility", 16]]
            for place, name in enumerate(kernel.arg_names)
            if name.endswith("_ptr")
        }
        own = {"BLOCK_Q": block_q} | ({"TOGETHER": together} if kernel is backward_kernel else {})
        source = ASTSource(kernel, types, constants | own, aligned)
        target = GPUTarget("cuda", capability, 32)
        compiled = triton.compile(source, target=target, options={"num_warps": 4}).asm
        assert "STACK:0 " in resources(compiled["cubin"], tmp_path / "kernel.cubin")
        ptx = compiled["ptx"]
        if kernel is forward_kernel:
            assert re.search(r"ld\.global[^;]*\.v4\.b32", ptx)
        else:
            assert re.search(additions, ptx)
