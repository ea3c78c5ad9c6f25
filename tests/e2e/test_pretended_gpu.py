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
    "--set", "data.workers=0", "--set", "optim.precision=fp32",
]  # fmt: skip
EXTRAS = [
    "--set", "student.mask_head=true", "--set", "student.denoising=2",
    "--set", "kd.hybrid_queries=2", "--set", "data.augment=device",
]  # fmt: skip
DEVICES = ("cpu", "cuda")

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a real one: pytest -m gpu")


def on(device: str, *words: str, cwd: Path) -> str:
    """What a command printed that ran on `device`."""
    if device == "cpu":
        return call_well(*words, "--device", device, cwd=cwd)
    with pretended_gpu():
        return call_well(*words, "--device", device, cwd=cwd)


def close(ours: list[float], theirs: list[float]) -> bool:
    """Whether scores or cosines are alike, in order of size.

    A GPU makes its views in float16, a grey level off here and there, and these pictures are noise
    to a student that has learned nothing.
    """
    return bool(np.mean(np.abs(np.sort(ours) - np.sort(theirs)) < 0.02) > 0.9)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Caches and runs of both devices."""
    folder = tmp_path_factory.mktemp("pretended")
    split = write_coco_folder(folder, "train2017", num_images=12, seed=1)
    write_coco_folder(folder, "val2017", num_images=4, seed=2)
    for device in DEVICES:
        on(
            device, "cache-teacher", "--split", split, "--out", f"cache/{device}",
            "--teacher", "pictograms", "--experiment", "trial", "--fit-epochs", "1",
            "--keep", "6", "--prompts", "single", *SMALL, cwd=folder,
        )  # fmt: skip
        for name, more in (("plain", []), ("extras", EXTRAS)):
            on(
                device, "train", "--cache", "cache/cpu", "--experiment", "trial",
                "--run", f"runs/{name}_{device}", *SMALL, *more, cwd=folder,
            )  # fmt: skip
    return folder


def test_stage_one_gives_the_same_cache(folder: Path):
    ours, theirs = (open_cache(folder / "cache" / device) for device in DEVICES)
    assert ours.image_ids.tolist() == theirs.image_ids.tolist()
    found = []
    for image_id in ours.image_ids.tolist():
        one, other = ours.rows(image_id), theirs.rows(image_id)
        # Scores that are nearly equal order, or cut off, as rounding has it.
        apart = np.abs(one.boxes_xyxy[:, None] - other.boxes_xyxy).max(2)
        nearest = apart.argmin(1)
        cosine = (one.region_embeddings * other.region_embeddings[nearest]).sum(1)
        found += list(zip(apart.min(1) < 0.1, cosine > 0.99, strict=True))
    same_box, same_embedding = np.array(found).T
    assert same_box.mean() > 0.8
    assert same_embedding[same_box].all()  # by way of fp16 there


@pytest.mark.parametrize("name", ["plain", "extras"])
def test_training_learns_the_same(folder: Path, name: str):
    runs = [folder / "runs" / f"{name}_{device}" for device in DEVICES]
    ours, theirs = (load_checkpoint(find_checkpoint(run)) for run in runs)
    assert ours.progress == theirs.progress
    for key, weight in ours.student.items():
        torch.testing.assert_close(theirs.student[key], weight, rtol=1e-2, atol=1e-3, msg=key)


def test_a_run_goes_on_there(folder: Path):
    words = ("train", "--cache", "cache/cpu", "--experiment", "trial", "--run", "runs/resumed")
    on("cuda", *words, *SMALL, "--until", "1", cwd=folder)
    on("cuda", *words, *SMALL, cwd=folder)
    ours, theirs = (
        load_checkpoint(find_checkpoint(folder / "runs" / name)).student
        for name in ("plain_cuda", "resumed")
    )
    assert all(torch.equal(weight, theirs[key]) for key, weight in ours.items())


def test_half_precision_and_the_teacher_in_the_loop(folder: Path):
    on(
        "cuda", "train", "--cache", "cache/cpu", "--experiment", "trial", "--run", "runs/online",
        *SMALL, "--set", "kd.alignment=online", "--set", "optim.precision=auto",
        "--set", "kd.start_epoch=0", "--until", "1",
        cwd=folder,
    )  # fmt: skip
    diary = (folder / "runs" / "online" / "metrics.jsonl").read_text().splitlines()
    last = json.loads(diary[-1])
    assert last["iteration"] == 3
    assert np.isfinite([last["total"], last["skd"]]).all()


@pytest.mark.parametrize("name", ["plain", "extras"])
def test_detections_are_the_same(folder: Path, name: str):
    for device in DEVICES:
        on(
            device, "predict", "val2017", "--model", f"runs/{name}_cpu", "-c", "cat, car",
            "--threshold", "0", "--precision", "fp32", "--out", device, cwd=folder,
        )  # fmt: skip
    ours, theirs = (
        json.loads((folder / device / "predictions.json").read_text())["annotations"]
        for device in DEVICES
    )
    assert len(ours) == len(theirs) > 10
    assert close([each["score"] for each in ours], [each["score"] for each in theirs])
    assert all(("segmentation" in each) == (name == "extras") for each in theirs)


def test_runs_are_scored_the_same(folder: Path):
    split = "ovcoco:val2017:val2017.json"
    words = ("eval", "runs/extras_cpu", "--split", split, "--precision", "fp32")
    scores, agreements = [], []
    for device in DEVICES:
        on(device, *words, "--json", "scores.json", cwd=folder)
        results = json.loads((folder / "scores.json").read_text())["files"]["results"]
        scores.append([each["score"] for each in json.loads((folder / results).read_text())])
        on(device, *words, "--json", "a.json", "--agreement", "cache/cpu", cwd=folder)
        tables = json.loads((folder / "a.json").read_text())["agreement"]
        agreements += [[group["cosine"] for table in tables for group in table["groups"]]]
    assert len(scores[0]) > 10
    assert close(*scores)
    assert close(*agreements)


def test_the_pretence_refuses_what_a_gpu_does():
    linear, rows = nn.Linear(3, 2), torch.ones(4, 3)
    before = linear.weight
    with pretended_gpu():
        moved = linear.to("cuda")
        assert moved.weight is before
        assert (
            moved.weight.device == rows.to(GPU).device == torch.zeros(2, device=GPU).device == GPU
        )
        with pytest.raises(RuntimeError, match="one device"):
            moved(rows)
        with pytest.raises(TypeError, match="numpy"):
            moved(rows.cuda()).detach().numpy()
        moved(rows.cuda()).sum().backward()
        gradient = moved.weight.grad
        assert gradient is not None
        assert gradient.device == GPU
        assert gradient.tolist() == [[4.0] * 3] * 2
        assert copy.deepcopy(moved).cpu().weight.detach().numpy().shape == (2, 3)
    assert not torch.cuda.is_available()
