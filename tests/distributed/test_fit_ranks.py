"""`fit` under torchrun: two gloo ranks train one process's network, and nobody is left hanging."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from cache.store import open_cache
from pipeline.proposal_network import load_network
from tests.e2e.commands import DKDETR, dkdetr, environment, run_command, succeed
from tests.e2e.small_coco import write_coco_folder

# What a rank computes alone must not depend on the rest of the batch, nor on dropout's draws.
SETTINGS = (
    "--experiment", "trial", "--set", "data.image_size=64", "--set", "data.batch_size=4",
    "--set", "student.backbone.norm=frozen", "--set", "student.dropout=0.0",
    "--set", "student.backbone.weights=random",
)  # fmt: skip
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
            "--no-python", "--")  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fit-ranks")
    write_coco_folder(folder, "train2017", num_images=12, seed=3)
    return folder


def _words(out: str, *more: str, epochs: int = 2) -> tuple[str, ...]:
    return (
        "cache-teacher", "--split", "ovcoco:train2017:train2017.json", "--out", out, "--teacher",
        "pictograms", "--prompts", "single", "--keep", "8", "--device", "cpu", "--fit-epochs",
        str(epochs), *SETTINGS, *more,
    )  # fmt: skip


def test_two_ranks_train_the_network_of_one_process_and_one_goes_on(folder: Path) -> None:
    succeed(*_words("one", "--only-proposals"), cwd=folder)
    assert not (folder / "one" / "CACHE.json").exists()
    done = run_command([*TORCHRUN, *DKDETR, *_words("two", "--json", "two.json")], folder)
    assert done.returncode == 0, done.stderr
    one, two = (
        load_network(folder / name / "proposals" / "network.safetensors")[0]
        for name in ("one", "two")
    )
    for name, weights in one.state_dict().items():
        torch.testing.assert_close(two.state_dict()[name], weights, atol=2e-4, rtol=2e-3, msg=name)
    # The first rank alone went on to a sealed cache, and said so once.
    assert open_cache(folder / "two").info.num_images == 12
    assert done.stdout.count("cache      two") == 1
    assert (folder / "two.json").is_file()


def test_an_error_of_the_first_rank_ends_the_others(folder: Path) -> None:
    picture = folder / "train2017" / "000005.jpg"
    picture.rename(folder / "away.jpg")
    try:
        started = time.monotonic()
        done = run_command([*TORCHRUN, *DKDETR, *_words("three")], folder)
        assert time.monotonic() - started < 60
    finally:
        (folder / "away.jpg").rename(picture)
    assert done.returncode != 0
    assert "000005.jpg" in done.stderr


def test_sigterm_to_all_ranks_keeps_the_state_and_the_same_command_goes_on(folder: Path) -> None:
    words = _words("four", "--only-proposals", epochs=40)
    process = subprocess.Popen(
        [*TORCHRUN, *DKDETR, *words], cwd=folder, env=environment(), stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    state = folder / "four" / "proposals" / "fit_state.safetensors"
    deadline = time.monotonic() + 120
    while not state.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "stopped by SIGTERM at step" in said, said
    assert state.exists()
    resumed = dkdetr(*words, cwd=folder)  # on one process
    assert resumed.returncode == 0, resumed.stderr
    assert not state.exists()


def test_batches_must_divide_by_the_ranks(folder: Path) -> None:
    words = _words("five", "--only-proposals", "--set", "data.batch_size=3")
    done = run_command([*TORCHRUN, *DKDETR, *words], folder)
    assert done.returncode != 0
    assert "do not divide by 2 ranks" in done.stderr
