"""`fit` under torchrun: two gloo ranks train one process's network, and nobody is left hanging."""

import sys
from pathlib import Path

import pytest
import torch

from cache.store import open_cache
from dkdetr.data.splits import load_split
from dkdetr.engine.distributed import Ranks
from dkdetr.engine.interruption import StopFlag
from dkdetr.errors import UsageError
from dkdetr.experiment_file import load_experiment
from pipeline.fit_training import NetworkTraining, StateFile
from pipeline.proposal_network import load_network
from tests.e2e.commands import DKDETR, call_well, run_command
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


def fit_words(out: str, *more: str, epochs: int = 2) -> tuple[str, ...]:
    return (
        "cache-teacher", "--split", "ovcoco:train2017:train2017.json", "--out", out, "--teacher",
        "pictograms", "--prompts", "single", "--keep", "8", "--device", "cpu", "--fit-epochs",
        str(epochs), *SETTINGS, *more,
    )  # fmt: skip


def test_two_ranks_train_the_network_of_one_process_and_one_goes_on(folder: Path) -> None:
    call_well(*fit_words("one", "--only-proposals"), cwd=folder)
    assert not (folder / "one" / "CACHE.json").exists()
    # Parts exchange their gradients once, after the last.
    more = ("--json", "two.json", "--set", "compute.micro_batches=2")
    done = run_command([*TORCHRUN, *DKDETR, *fit_words("two", *more)], folder)
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


def test_batches_must_divide_by_the_ranks(folder: Path) -> None:
    split = load_split(f"ovcoco:{folder}/train2017:{folder}/train2017.json", folder)
    config = load_experiment("trial", ["data.batch_size=3"]).config
    ranks = Ranks(rank=0, world_size=2, device=torch.device("cpu"))
    with pytest.raises(UsageError, match="do not divide by 2 ranks: start"):
        NetworkTraining(config, split, StateFile(folder / "x", ""), ranks, StopFlag())
