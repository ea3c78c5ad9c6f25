"""A GPU does what a CPU does: training steps, detections, teacher's crops, whole runs.

Every test runs on a CPU too, against itself, so that it is known to work before a GPU is at hand;
`pytest -m gpu` takes the device.
"""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from step_options import option_config, training_batch
from tiny_student import image_batch, text_embeddings, tiny_student
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from training_world import make_world, settings

from dkdetr.engine.distributed import Ranks
from dkdetr.engine.optim import make_optimizer
from dkdetr.engine.step import MAX_OVERFLOWS, TrainingStep
from dkdetr.engine.train import train
from dkdetr.engine.train_request import Watch
from dkdetr.evaluation.detect import detect
from dkdetr.losses.matcher import match
from dkdetr.losses.matching_cost import MatchingCosts
from dkdetr.precision import float32_products
from dkdetr.structures import Targets
from pipeline.decoding import EncodedImage, decode_on_device
from pipeline.encode_stream import BusyClock, embed_stream
from pipeline.resampling import cut_pictures
from pipeline.teacher import load_teacher
from pipeline.window_fit import Look

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
OPTIONS = ["cached", "iou", "everything extra", "masks", "cached without auxiliary"]


@pytest.fixture(autouse=True)
def _exact_convolutions():
    """A GPU rounds a convolution's float32 to 10 bits, unless it is told not to."""
    with float32_products("fp32", torch.device("cuda")):
        yield


def one_step(name: str, device: str, dtype: torch.dtype) -> tuple[dict[str, float], list[Tensor]]:
    """The loss parts of a step and its gradients."""
    config = option_config(name)
    config = replace(config, kd=replace(config.kd, start_epoch=0))
    student = tiny_student(config).to(device).train()
    step = TrainingStep(
        student, make_optimizer(student, config.optim), text_embeddings().to(device), config,
        Ranks(rank=0, world_size=1, device=torch.device(device)),
        precision=dtype, dumps=Path("nonfinite"),
    )  # fmt: skip
    batch = training_batch(config)
    batch = batch.pin_memory() if device == "cuda" else batch
    for _ in range(MAX_OVERFLOWS):  # the scaler of float16 finds its scale
        result = step([batch], epoch=0, iteration=0)
        if not result.skipped:
            break
    parts = {name: value.item() for name, value in result.parts.items()}
    parts["grad_norm"] = result.statistics["grad_norm"].item()
    gradients = [weight.grad for weight in student.parameters() if weight.grad is not None]
    return parts, [gradient.cpu() for gradient in gradients]


def alike(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    """Whether gradients are the same but for rounding, which may close a ReLU that was open."""

    def norm(gradients: list[Tensor]) -> Tensor:
        return torch.cat([gradient.flatten() for gradient in gradients]).norm()

    errors = [one - other for one, other in zip(theirs, ours, strict=True)]
    whole = norm(ours)
    of_each = zip(errors, ours, strict=True)
    return bool(norm(errors) < whole / 50) and all(
        error.norm() < 0.2 * gradient.norm() + whole / 1e6 for error, gradient in of_each
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", OPTIONS)
def test_a_step_is_the_same(name: str, device: str):
    wanted, gradients = one_step(name, "cpu", torch.float32)
    found, theirs = one_step(name, device, torch.float32)
    norms = found.pop("grad_norm"), wanted.pop("grad_norm")
    assert norms[0] == pytest.approx(norms[1], rel=0.02)
    assert found == pytest.approx(wanted, rel=1e-3, abs=1e-5)
    assert alike(gradients, theirs)


def test_a_small_gradient_that_is_wrong_is_seen():
    _, gradients = one_step("cached", "cpu", torch.float32)
    for number in sorted(range(len(gradients)), key=lambda each: gradients[each].norm())[::20]:
        for factor in (0, 2, -1):
            wrong = [gradient.clone() for gradient in gradients]
            wrong[number] *= factor
            assert not alike(gradients, wrong), (number, gradients[number].norm())


@pytest.mark.parametrize(
    ("device", "dtype"),
    [
        ("cpu", torch.bfloat16),
        pytest.param("cuda", torch.bfloat16, marks=pytest.mark.gpu),
        pytest.param("cuda", torch.float16, marks=pytest.mark.gpu),
    ],
)
def test_a_step_in_half_precision_is_close(device: str, dtype: torch.dtype):
    wanted, _ = one_step("cached", "cpu", torch.float32)
    found, _ = one_step("cached", device, dtype)
    assert found["total"] == pytest.approx(wanted["total"], rel=0.1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", ["fp32", "auto"])
def test_detections_are_the_same(precision: Any, device: str):
    student, images = tiny_student(), image_batch()
    wanted, found = (
        dict(detect(
            student.to(place), [images], text_embeddings(), device=torch.device(place),
            max_detections=10, precision=how,
        ))
        for place, how in (("cpu", "fp32"), (device, precision))
    )  # fmt: skip
    close = 1e-4 if precision == "fp32" else 0.3
    for image_id, detections in wanted.items():
        torch.testing.assert_close(found[image_id].scores, detections.scores, rtol=0, atol=close)


@pytest.mark.parametrize("device", DEVICES)
def test_matches_are_the_same_where_costs_are_equal(device: str):
    costs = MatchingCosts(cost_class=0, cost_bbox=1, cost_giou=0, focal_alpha=0.25, focal_gamma=2)
    kinds = torch.randint(5, (1, 4000), generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([[side / 10, 0.5, 0.2, 0.2] for side in (1, 3, 5, 7, 9)])[kinds]
    wanted = Targets(torch.zeros(3, dtype=torch.long), boxes[0, :3] + 0.01)
    logits = torch.zeros(1, 4000, 1)
    one = match(logits, boxes, [wanted], costs)
    other = match(logits.to(device), boxes.to(device), [wanted.to(device)], costs)
    assert torch.equal(one.query_index, other.query_index.cpu())
    assert torch.equal(one.target_index, other.target_index.cpu())


@pytest.mark.parametrize("device", DEVICES)
def test_the_teacher_sees_the_same(device: str):
    teachers = load_teacher("pictograms"), load_teacher("pictograms", device)
    side = teachers[0].preprocessing.size_hw[0]
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, 256, (2, 3, 12, 16), generator=generator).float()
    pictures = torch.nn.functional.interpolate(coarse, (120, 160), mode="bilinear").byte()
    windows = np.array([[3, 5, 90, 70], [0, 0, 160, 120], [40, 20, 100, 119]])
    rows = []
    for teacher in teachers:
        images = [picture.to(teacher.device).contiguous() for picture in pictures]
        stacks = cut_pictures(images, [windows, windows[:1]], Look((side, side)))
        clock = BusyClock(teacher.device)
        encode = clock.around(teacher.features_on_device)
        found = np.concatenate(list(embed_stream(stacks, encode, batch_size=3)))
        assert clock.seconds() > 0
        rows.append(found / np.linalg.norm(found, axis=1, keepdims=True))
    assert (rows[0] * rows[1]).sum(1).min() > 0.999


@pytest.mark.parametrize("device", DEVICES)
def test_jpegs_decode_alike(device: str, tmp_path: Path):
    from PIL import Image

    generator = np.random.default_rng(0)
    encoded = []
    for number, (height, width) in enumerate(((48, 64), (61, 35))):
        small = generator.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
        path = tmp_path / f"{number}.jpg"
        # Whole chroma: at edges of colour nvJPEG repeats halved chroma where Pillow interpolates.
        Image.fromarray(small).resize((width, height)).save(path, quality=95, subsampling=0)
        encoded.append(EncodedImage(path.read_bytes(), path, (height, width)))
    for image, pixels in zip(encoded, decode_on_device(encoded, torch.device(device)), strict=True):
        wanted = np.asarray(Image.open(image.path)).astype(int)
        assert np.abs(torch.as_tensor(pixels).cpu().numpy().astype(int) - wanted).mean() < 3


@pytest.mark.parametrize("device", DEVICES)
def test_photographs_with_halved_chroma_decode_nearly_alike(device: str, tmp_path: Path):
    from PIL import Image

    down, across = np.mgrid[:120, :160]
    smooth = np.stack((across, down * 2, 255 - across), axis=-1).clip(0, 255).astype(np.uint8)
    path = tmp_path / "smooth.jpg"
    Image.fromarray(smooth).save(path, quality=95, subsampling=2)
    (pixels,) = decode_on_device(
        [EncodedImage(path.read_bytes(), path, (120, 160))], torch.device(device)
    )
    wanted = np.asarray(Image.open(path)).astype(int)
    assert np.abs(torch.as_tensor(pixels).cpu().numpy().astype(int) - wanted).mean() < 3


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("augment", ["loader", "device"])
def test_a_whole_run_learns_resumes_and_is_profiled(augment: str, device: str, tmp_path: Path):
    world = make_world(tmp_path)
    config = settings(
        data={"augment": augment, "workers": 2 * (device == "cuda")}, optim={"precision": "auto"}
    )
    request = replace(world.request("run", config), device=device)
    first = train(replace(request, until_iteration=7))
    assert first.iterations == 7
    profiled = train(replace(request, watch=Watch(profile_steps=2)))
    table = (tmp_path / "runs" / "run" / "profile" / "table.txt").read_text()
    whole = next(line for line in table.splitlines() if line.startswith("a whole step"))
    assert (whole.split()[-1] != "-") == (device == "cuda")  # kernels were counted
    last = train(request)
    assert last.iterations > profiled.iterations > first.iterations
    assert np.isfinite(last.last_losses["total"])


class WholeNumbersOnly(TorchDispatchMode):
    """Refuses the running sum of floats, which a GPU has no deterministic kernel for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.cumsum.default:
            assert not args[0].is_floating_point(), "cumsum of floats"
        return func(*args, **(kwargs or {}))


def test_running_sums_are_of_whole_numbers():
    with WholeNumbersOnly():
        one_step("masks", "cpu", torch.float32)
    with WholeNumbersOnly(), pytest.raises(AssertionError, match="cumsum"):
        torch.ones(3).cumsum(0)


# In processes of their own: determinism is set for good, and torch.compile cannot look through the
# shape checks of tests.
TWICE = """
import torch
from dkdetr.engine.student_setup import make_deterministic
from tests.unit.test_devices_agree import one_step

make_deterministic()
one, other = (one_step("masks", "{device}", torch.float32)[1] for _ in range(2))
assert all(map(torch.equal, one, other))
"""
COMPILED = """
import torch
from tests.unit.test_devices_agree import *
from dkdetr.engine.student_setup import prepare_student
from dkdetr.evaluation.compiled import compile_for_inference

config, device = option_config("cached"), torch.device("{device}")
plain, compiled = (tiny_student(config).to(device).train() for _ in range(2))
prepare_student(compiled, replace(config.compute, compile="{backend}"))
batch, text = training_batch(config).to(device), text_embeddings().to(device)
for regions in (None, batch.regions):
    one, other = (student(batch.images, text, regions) for student in (plain, compiled))
    torch.testing.assert_close(one.logits, other.logits, rtol=1e-2, atol=1e-1)
    other.logits.sum().backward()
compile_for_inference(plain, device, backend="{backend}")
for count in (2, 1, 2, 2):
    images = image_batch(((64, 96), (96, 64))[:count])
    found = dict(detect(plain, [images], text, device=device, max_detections=9, precision="auto"))
    assert len(found) == count
"""


REPLAYED = """
import torch
from tests.unit.test_devices_agree import *
from dkdetr.engine.student_setup import prepare_student

config, device = option_config("cached"), torch.device("{device}")
config = replace(
    config,
    student=replace(config.student, dropout=0.0), kd=replace(config.kd, start_epoch=1),
)
losses = []
for compute in (
    config.compute,
    replace(config.compute, compile="{backend}", cuda_graphs=device.type == "cuda"),
):
    under = replace(config, compute=compute)
    torch.manual_seed(0)
    student = tiny_student(under).to(device).train()
    prepare_student(student, compute)
    step = TrainingStep(
        student, make_optimizer(student, under.optim), text_embeddings().to(device), under,
        Ranks(rank=0, world_size=1, device=device),
        precision=torch.float32, dumps=Path("nonfinite"),
    )
    batch = training_batch(under)
    batch = batch.pin_memory() if device.type == "cuda" else batch
    batches = [replace(batch, regions=None)] * 4 + [batch] * 4  # burn-in, distillation
    losses.append([
        step([each], epoch=number // 4, iteration=number).parts["total"].item()
        for number, each in enumerate(batches)
    ])
assert len(set(losses[0])) == 8
torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-2, atol=1e-2)
assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0
if device.type == "cuda":
    from torch._inductor.cudagraph_trees import get_manager

    manager = get_manager(torch.cuda.current_device(), create_if_none_exists=False)
    assert manager is not None and manager.new_graph_id().id > 0, "nothing was recorded"
"""


def alone(code: str, **words: str) -> None:
    root = Path(__file__).parents[2]
    paths = os.pathsep.join((str(root), str(root / "tests")))
    done = subprocess.run(
        [sys.executable, "-c", code.format(**words)], cwd=root, capture_output=True, text=True,
        check=False, env=os.environ | {"PYTHONPATH": paths},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("device", DEVICES)
def test_deterministic_steps_are_bitwise_the_same(device: str):
    alone(TWICE, device=device)


BACKENDS = pytest.mark.parametrize(
    ("device", "backend"),
    [
        pytest.param("cpu", "aot_eager", marks=pytest.mark.slow),
        pytest.param("cpu", "inductor", marks=pytest.mark.slow),
        pytest.param("cuda", "inductor", marks=pytest.mark.gpu),
    ],
)


@BACKENDS
def test_compiled_students_say_the_same(device: str, backend: str):
    alone(COMPILED, device=device, backend=backend)


@BACKENDS
def test_compiled_steps_learn_the_same(device: str, backend: str):
    """Burn-in, then distillation; on a GPU by CUDA graphs, replayed over weights that moved."""
    alone(REPLAYED, device=device, backend=backend)
