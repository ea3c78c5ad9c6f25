"""The crop kernels: Pillow's pixels, few launches, no copy that waits, and another way where they
cannot run.

In Triton's interpreter everywhere (`crops_in_interpreter.py`), by the compiler where there is a
GPU; for GPUs that are not here they are compiled.
"""

import contextlib
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dkdetr.triton_trial import say_once
from pipeline import crop_backend, resampling
from pipeline.crop_backend import cuts_by_kernel
from pipeline.crops import CropRule
from pipeline.proposals import Proposals, SourceImage
from pipeline.resampling import resampling_on
from pipeline.shard_worker import PendingImage, crops_of
from pipeline.window_fit import Look, fit_windows
from tests.absent_gpu import AbsentGPU, resources
from tests.crop_cases import FILL, check_crops, fitted
from tests.interpreted import pass_in_interpreter

CUDA = torch.device("cuda", 0)
PLACEMENTS = ("squash", "clip_center", "pad_square")


@pytest.fixture(autouse=True)
def _forget():
    """What was tried and said before."""
    yield
    crop_backend._problem.cache_clear()
    say_once.cache_clear()


def test_in_the_interpreter():
    """All of `crops_in_interpreter.py`, in a process that sees Triton for the first time."""
    cases = Path(__file__).with_name("crops_in_interpreter.py")
    crops = Path(__file__).parents[1] / "contracts" / "test_crops_equal_open_clip.py"
    pass_in_interpreter(cases, crops)


@pytest.mark.gpu
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("size", [(224, 224), (17, 40)])
def test_crops_are_pillow_s_on_a_gpu(size: tuple[int, int], placement: Any, interpolation: Any):
    look = Look(size, placement, interpolation, FILL)
    check_crops(look, "cuda", count=40, layouts=("pixels", "channels", "neither"))


@pytest.mark.gpu
def test_pixels_far_into_the_buffer_are_reached():
    """Addresses of more than 32 bits."""
    from pipeline import crop_launch

    far, (height, width) = (1 << 32) + 8, (8, 8)
    buffer = torch.zeros(far + 3 * height * width, dtype=torch.uint8, device="cuda")
    buffer[far:] = 77
    windows, look = np.array([[0, 0, width, height]]), Look((4, 4))
    made = crop_launch._table(np.array([[far, 3 * width, 3, 1]]), windows, look)
    table = torch.from_numpy(made.rows).to("cuda")
    assert (crop_launch._cut_part(buffer, table, made.parts[0], look) == 77).all()


@pytest.mark.gpu
def test_a_gpu_cuts_by_the_kernels():
    assert cuts_by_kernel(CUDA)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("size", [(32, 32), (24, 50)])
def test_windows_fit_as_one_by_one(placement: Any, size: tuple[int, int]):
    random = np.random.default_rng(0)
    sides = np.concatenate((random.integers(1, 700, (400, 2)), [[1, 699], [699, 1], [32, 32]]))
    corners = random.integers(0, 50, sides.shape)
    look = Look(size, placement)
    fits = fit_windows(np.concatenate((corners, corners + sides), axis=1), look)
    for (w, h), found, offset in zip(sides.tolist(), fits.sizes_hw, fits.offsets_yx, strict=True):
        (width, height), (left, top) = fitted((w, h), look)
        assert found.tolist() == [height, width], (w, h)
        assert offset.tolist() == [top, left], (w, h)


class OnTheDevice(TorchDispatchMode):
    """Counts what is started on a device, and copies to it; none of them may wait."""

    VIEWS = ("view", "permute", "slice", "select", "empty", "alias", "transpose", "detach")

    def __init__(self) -> None:
        super().__init__()
        self.started: Counter[str] = Counter()
        self.up: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.__name__.partition(".")[0]
        copies = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        if not isinstance(result, Tensor) or not result.is_cuda:
            return result
        source = args[1] if func is copies[1] else args[0] if args else None
        if func in copies and isinstance(source, Tensor) and not source.is_cuda:
            assert (kwargs or {}).get("non_blocking"), "a copy that waits"
            self.up.append(source.numel() * source.element_size())
        elif not any(view in name for view in self.VIEWS):
            self.started[name] += 1
        return result


class FakeTeacher:
    """As much of a teacher as cutting wants, on a GPU that is not there."""

    device = CUDA

    def cut_pictures(self, pictures: Any, windows: Any, rule: CropRule) -> Any:
        return resampling.cut_pictures(pictures, windows, Look((224, 224), rule.placement))


def cut_on_a_fake_gpu(
    monkeypatch: pytest.MonkeyPatch, *, kernel: bool, decoded_there: bool
) -> tuple[OnTheDevice, list[Any]]:
    """Cuts 8 pictures of 300 boxes at two scales; returns what torch and Triton started."""
    from pipeline import crop_launch

    launched: list[Any] = []
    empty = torch.empty

    def launch(kernel: Any, *_given: Any, **_options: Any) -> None:
        launched.append(kernel)

    def unpinned(*size: Any, pin_memory: bool = False, **more: Any) -> Tensor:
        return empty(*size, **more)

    monkeypatch.setattr(resampling, "cuts_by_kernel", lambda _device: kernel)
    monkeypatch.setattr(crop_launch, "_launch", launch)
    monkeypatch.setattr(crop_launch, "on", lambda _device: contextlib.nullcontext())
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(torch, "empty", unpinned)
    random = np.random.default_rng(0)
    pictures: list[SourceImage] = []
    images: list[Any] = []
    watch = OnTheDevice()
    with FakeTensorMode(allow_non_fake_inputs=True):
        for number in range(8):
            low = random.uniform(0, 0.7, (300, 2)) * (640, 480)
            high = low + random.uniform(0.02, 0.3, (300, 2)) * (640, 480)
            boxes = np.concatenate((low, high), axis=1).astype(np.float32)
            pixels: Any = np.zeros((480, 640, 3), dtype=np.uint8)
            if decoded_there:
                pixels = torch.zeros((3, 480, 640), dtype=torch.uint8, device="cuda")
                pixels = pixels.permute(1, 2, 0)
            pictures.append(SourceImage(number, pixels))
            nothing = Proposals(boxes[:0], np.zeros(0, dtype=np.float32))
            images.append(PendingImage(None, Proposals(boxes, boxes[:, 0]), nothing))  # type: ignore[arg-type]
        with watch:
            crops = list(crops_of(pictures, images, FakeTeacher(), CropRule()))  # type: ignore[arg-type]
        assert [tuple(each.shape) for each in crops] == [(601, 3, 224, 224)] * 8
        assert all(each.is_cuda for each in crops)
    return watch, launched


@pytest.mark.parametrize("decoded_there", [False, True])
def test_a_chunk_takes_few_launches_and_no_copy_that_waits(
    decoded_there: bool, monkeypatch: pytest.MonkeyPatch
):
    """The pictures in one copy, the windows' numbers in another; three launches a part."""
    pytest.importorskip("triton")
    watch, launched = cut_on_a_fake_gpu(monkeypatch, kernel=True, decoded_there=decoded_there)
    print(watch.up, watch.started, len(launched))
    of_windows = 8 * 601 * 17 * 8
    assert watch.up == ([] if decoded_there else [8 * 480 * 640 * 3]) + [of_windows]
    assert len(launched) <= 12
    assert watch.started.total() <= 4  # side by side; crops of a picture in two parts


def test_matrices_wait_for_no_copy_either(monkeypatch: pytest.MonkeyPatch):
    watch, launched = cut_on_a_fake_gpu(monkeypatch, kernel=False, decoded_there=False)
    assert not launched
    assert watch.started.total() > 100


def test_a_cpu_cuts_by_torchvision_without_a_word(capsys: pytest.CaptureFixture[str]):
    assert not cuts_by_kernel(torch.device("cpu"))
    assert "torchvision" in resampling_on(torch.device("cpu"))
    assert capsys.readouterr().err == ""


def test_kernels_that_fail_are_dropped_once_and_loudly(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    pytest.importorskip("triton")
    tries: list[torch.device] = []

    def fail(device: torch.device) -> None:
        tries.append(device)
        raise RuntimeError("ptxas: no such architecture\nmore of it")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))
    monkeypatch.setattr(crop_backend, "_try_out", lambda _device: None)
    by_kernel = resampling_on(CUDA)
    crop_backend._problem.cache_clear()
    monkeypatch.setattr(crop_backend, "_try_out", fail)
    for _ in range(3):
        assert not cuts_by_kernel(CUDA)
    assert tries == [CUDA]
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert "products of matrices" in said[0]
    assert "no such architecture" in said[0]
    # A cache tells the three ways apart, and is finished by the one that began it.
    assert len({by_kernel, resampling_on(CUDA), resampling_on(torch.device("cpu"))}) == 3


def test_old_gpus_and_other_pixels_go_by_matrices(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (6, 1))
    assert not cuts_by_kernel(CUDA)
    assert "(7, 0)" in capsys.readouterr().err
    crop_backend._problem.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))
    monkeypatch.setattr(crop_backend, "_try_out", lambda _device: "other pixels")
    assert not cuts_by_kernel(CUDA)
    assert "other pixels" in capsys.readouterr().err


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_they_compile_for_gpus_that_are_not_here(
    capability: int, interpolation: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """No register spills; double precision is neither fused nor divided nearly."""
    pytest.importorskip("triton")
    from triton.runtime.driver import driver

    from pipeline import crop_kernels, crop_launch

    kernels: list[Any] = []
    monkeypatch.setattr(driver, "_active", AbsentGPU(capability))
    for name in ("weigh_kernel", "across_kernel", "down_kernel"):
        kernel = getattr(crop_kernels, name)

        # As in a launch, down to how Triton tells arguments apart; but nothing is launched.
        def compile_only(*args: Any, warmup: bool, run: Any = kernel.run, **more: Any) -> None:
            kernels.append(run(*args, warmup=True, **more))

        monkeypatch.setattr(kernel, "run", compile_only)
    monkeypatch.setattr(crop_launch, "_INTERPRETED", crop_launch._ON_GPU)
    look, windows = Look((224, 224), "squash", interpolation, FILL), np.array([[3, 4, 300, 200]])
    made = crop_launch._table(np.array([[0, 1920, 3, 1]]), windows, look)
    with torch.device("meta"):
        buffer = torch.empty(480 * 1920, dtype=torch.uint8)
        table = torch.empty(made.rows.shape, dtype=torch.int64)
    crop_launch._cut_part(buffer, table, made.parts[0], look)
    assert len(kernels) == 3
    for kernel in kernels:
        taken = resources(kernel.asm["cubin"], tmp_path / "kernel.cubin")
        print(capability, kernel.name, re.findall(r"REG:\d+ STACK:\d+", taken))
        assert re.findall(r"STACK:(\d+)", taken) == ["0"]
    weights = kernels[0].asm["ptx"]
    assert "fma.rn.f64" not in weights
    assert set(re.findall(r"div\.\S*f64", weights)) == {"div.rn.f64"}
    assert "f64" not in kernels[1].asm["ptx"] + kernels[2].asm["ptx"]
