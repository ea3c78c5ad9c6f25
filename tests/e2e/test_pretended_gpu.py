"""Both stages and what follows by `--device cuda`, on a GPU that is pretended.

What lies on two devices at once, or is read from a GPU as if it lay on a CPU, fails here as it
would there. A CPU's run of the same commands is what the numbers are held against.
"""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from cache.store import open_cache
from dkdetr.engine.checkpoint import find_checkpoint, load_checkpoint
from tests.e2e.commands import call_well
from tests.e2e.small_coco import write_coco_folder
from tests.pretended_gpu import GPU, pretended_gpu

SMALL = [
    "--set", "optim.epochs=2", "--set", "optim.lr_drop_epochs=[1]", "--set", "data.image_size=96",
    "--set", "data.batch_size=4", "--set", "student.num_queries=12", "--set", "kd.start_epoch=1",
    "--set", "data.workers=0",
]  # fmt: skip
EXTRAS = [
    "--set", "student.mask_head=true", "--set", "student.denoising=2",
    "--set", "kd.hybrid_queries=2",
]  # fmt: skip
RUNS = {"plain": [], "extras": EXTRAS, "other": ["--set", "kd.rkd.weight=0"]}
DEVICES = ("cpu", "cuda")
SPLIT = "ovcoco:val2017:val2017.json"

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a real one: pytest -m gpu")


def on(device: str, *words: str, cwd: Path) -> str:
    """What a command printed that ran on `device`."""
    if device == "cpu":
        return call_well(*words, "--device", device, cwd=cwd)
    with pretended_gpu():
        return call_well(*words, "--device", device, cwd=cwd)


def train(device: str, run: str, *more: str, cwd: Path) -> list[dict[str, float]]:
    """Trains a run from the CPU's cache; returns what its diary says of the losses."""
    words = ("train", "--cache", "cache/cpu", "--experiment", "trial", "--run", f"runs/{run}")
    on(device, *words, *SMALL, "--set", "optim.precision=fp32", *more, cwd=cwd)
    lines = (cwd / "runs" / run / "metrics.jsonl").read_text().splitlines()
    entries = [entry for entry in map(json.loads, lines) if entry["kind"] == "train"]
    measured = ("time", "images_per_s", "step_s", "data_wait", "memory_gib", "eta_s", "kind")
    return [{key: entry[key] for key in entry if key not in measured} for entry in entries]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The caches of both devices."""
    folder = tmp_path_factory.mktemp("pretended")
    split = write_coco_folder(folder, "train2017", num_images=12, seed=1)
    write_coco_folder(folder, "val2017", num_images=4, seed=2)
    for device in DEVICES:
        on(
            device, "cache-teacher", "--split", split, "--out", f"cache/{device}",
            "--teacher", "pictograms", "--experiment", "trial", "--fit-epochs", "1",
            "--keep", "6", "--prompts", "single", *SMALL, cwd=folder,
        )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def diaries(folder: Path) -> dict[str, dict[str, list[dict[str, float]]]]:
    """What the diaries of each device say, by run; a run lies in runs/NAME_DEVICE."""
    return {
        device: {
            name: train(device, f"{name}_{device}", *more, cwd=folder)
            for name, more in RUNS.items()
        }
        for device in DEVICES
    }


def test_stage_one_gives_the_same_cache(folder: Path):
    ours, theirs = (open_cache(folder / "cache" / device) for device in DEVICES)
    assert ours.image_ids.tolist() == theirs.image_ids.tolist()
    found = []
    for image_id in ours.image_ids.tolist():
        one, other = ours.rows(image_id), theirs.rows(image_id)
        # Scores that are nearly equal order, or cut off, as rounding has it.
        apart = np.abs(one.boxes_xyxy[:, None] - other.boxes_xyxy).max(2)
        cosine = (one.region_embeddings * other.region_embeddings[apart.argmin(1)]).sum(1)
        found += list(zip(apart.min(1) < 0.1, cosine > 0.99, strict=True))
    same_box, same_embedding = np.array(found).T
    assert same_box.mean() > 0.8
    assert same_embedding[same_box].all()  # by way of fp16 there


@pytest.mark.parametrize("name", RUNS)
def test_training_learns_the_same(diaries, name: str):
    found, wanted = diaries["cuda"][name], diaries["cpu"][name]
    assert wanted[-1]["iteration"] == 6
    assert found == [pytest.approx(entry, rel=1e-4) for entry in wanted]


@pytest.mark.usefixtures("diaries")
def test_a_run_goes_on_there(folder: Path):
    train("cuda", "resumed", "--until", "1", cwd=folder)
    train("cuda", "resumed", cwd=folder)
    ours, theirs = (
        load_checkpoint(find_checkpoint(folder / "runs" / name)).student
        for name in ("plain_cuda", "resumed")
    )
    assert all(torch.equal(weight, theirs[key]) for key, weight in ours.items())


def test_half_precision_the_teacher_in_the_loop_and_views_made_there(folder: Path):
    half = ("--set", "optim.precision=auto", "--set", "kd.start_epoch=0", "--until", "1")
    other = ("--set", "kd.alignment=online", "--set", "data.augment=device")
    diary = train("cuda", "online", *half, *other, cwd=folder)
    assert diary[-1]["iteration"] == 3
    assert np.isfinite([diary[-1]["total"], diary[-1]["skd"]]).all()
    assert len(scored("cuda", "online", folder, "auto")) > 10


@pytest.mark.usefixtures("diaries")
@pytest.mark.parametrize("name", ["plain", "extras"])
def test_detections_are_alike(folder: Path, name: str):
    found = []
    for device in DEVICES:
        on(
            device, "predict", "val2017", "--model", f"runs/{name}_cpu", "-c", "cat, car",
            "--threshold", "0", "--precision", "fp32", "--out", device, cwd=folder,
        )  # fmt: skip
        found.append(json.loads((folder / device / "predictions.json").read_text())["annotations"])
    assert all(("segmentation" in each) == (name == "extras") for each in found[1])
    ours, theirs = ([each["score"] for each in annotations] for annotations in found)
    # Not the same views: a grey level is off here and there, and these pictures are noise.
    assert len(ours) == len(theirs) > 10
    assert np.mean(np.abs(np.divide(theirs, ours) - 1) < 0.05) > 0.7


def scored(device: str, run: str, folder: Path, precision: str = "fp32") -> list[float]:
    words = ("--split", SPLIT, "--precision", precision, "--json", "scores.json")
    on(device, "eval", f"runs/{run}", *words, cwd=folder)
    results = json.loads((folder / "scores.json").read_text())["files"]["results"]
    return [each["score"] for each in json.loads((folder / results).read_text())]


@pytest.mark.usefixtures("diaries")
def test_runs_are_scored_the_same(folder: Path):
    wanted = scored("cpu", "plain_cpu", folder)
    assert len(wanted) > 10
    assert scored("cuda", "plain_cpu", folder) == pytest.approx(wanted, rel=1e-4)
    assert scored("cpu", "other_cpu", folder) != pytest.approx(wanted, rel=1e-4)


@pytest.mark.usefixtures("diaries")
def test_agreement_is_the_same(folder: Path):
    cosines = []
    for device in DEVICES:
        words = ("--agreement", "cache/cpu", "--precision", "fp32", "--json", "agreement.json")
        on(device, "eval", "runs/extras_cpu", *words, cwd=folder)
        tables = json.loads((folder / "agreement.json").read_text())["agreement"]
        cosines.append([group["cosine"] for table in tables for group in table["groups"]])
    assert cosines[1] == pytest.approx(cosines[0], abs=1e-4)


def test_the_pretence_refuses_what_a_gpu_does():
    linear, rows = nn.Linear(3, 2), torch.ones(4, 3)
    before = linear.weight
    with pretended_gpu():
        moved = linear.to("cuda")
        assert moved.weight is before
        assert (
            moved.weight.device == rows.to(GPU).device == torch.zeros(2, device=GPU).device == GPU
        )
        there, number = rows.cuda(), torch.zeros(())
        assert (there + number).is_cuda
        for refused in (
            lambda: moved(rows),
            lambda: there[torch.zeros(1, dtype=torch.long)],
            lambda: torch.stack([there[0, 0], number]),
            lambda: number.add_(there[0, 0]),
        ):
            with pytest.raises(RuntimeError, match="one device"):
                refused()
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
        with pytest.raises(AssertionError, match="autocast"):
            torch.autocast("cpu", dtype=torch.bfloat16)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            assert moved(there).dtype == torch.bfloat16
            assert torch.is_autocast_enabled("cuda")
        moved(there).sum().backward()
        gradient = moved.weight.grad
        assert gradient is not None
        assert gradient.device == GPU
        assert gradient.tolist() == [[4.0] * 3] * 2
        assert copy.deepcopy(moved).cpu().weight.detach().numpy().shape == (2, 3)
    assert not torch.cuda.is_available()


def test_the_pretence_notes_what_waits():
    rows = torch.ones(4, 3)
    with pretended_gpu() as waits:
        there = rows.to("cuda")
        for work, noted in (
            (lambda: rows.to("cuda", non_blocking=True), ["a copy"]),
            (lambda: rows.pin_memory().to("cuda", non_blocking=True), []),
            (lambda: there.to("cpu", non_blocking=True), []),
            (lambda: there.cpu(), ["a copy"]),
            (lambda: torch.tensor([1.0], device="cuda"), ["a copy"]),
            (lambda: torch.full((2,), 1.0, device="cuda"), []),
            (lambda: there.sum().item(), ["a number"]),
            (lambda: there.tolist(), ["numbers"]),
            (lambda: there[there > 0], ["a shape"]),
            (lambda: there.nonzero(), ["a shape"]),
            (lambda: torch.equal(there, there), ["a shape"]),
            (lambda: torch.where(there > 0, there, 0), []),
            (lambda: torch.zeros(4, 3).copy_(there), ["a copy"]),
            (lambda: torch.cuda.synchronize(), ["the device"]),
            (lambda: torch.cuda.Event().synchronize(), ["an event"]),
        ):  # fmt: skip
            waits.clear()
            work()
            assert waits == noted


def test_what_is_copied_down_is_there_when_somebody_has_waited():
    with pretended_gpu():
        there, kept = torch.arange(1.0, 4).cuda(), torch.zeros(3, pin_memory=True)
        passed = torch.cuda.current_stream().record_event()
        first = there.to("cpu", non_blocking=True)
        event = torch.cuda.current_stream().record_event()
        kept.copy_(there, non_blocking=True)
        passed.synchronize()
        assert first.isnan().all()
        event.synchronize()
        assert first.tolist() == [1.0, 2.0, 3.0]
        assert kept.isnan().all()
        assert there.sum().item() == 6
        assert kept.tolist() == [1.0, 2.0, 3.0]
