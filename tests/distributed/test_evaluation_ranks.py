"""Evaluation on several gloo ranks gives the files of one process, bit for bit."""

import json
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_student import TEXT_DIM, tiny_config, tiny_student

from dkdetr.config import DataConfig, EvalConfig
from dkdetr.data.coco_names import OVCOCO_BASE
from dkdetr.data.vocabulary import Vocabulary
from dkdetr.student_file import StudentFile, save_student_file
from tests.e2e.commands import DKDETR, call, run_command, start_dkdetr
from tests.e2e.small_coco import ovcoco_names, write_coco_folder

FILES = ("results.json", "metrics.json", "per_category.csv", "confusion.csv")


def write_student(path: Path, *, batch_size: int, image_size: int = 128) -> None:
    """A student that learned nothing; its detections are as good as any for this."""
    names = dict(sorted(ovcoco_names().items()))
    rng = np.random.default_rng(0)
    embeddings = rng.normal(size=(len(names), TEXT_DIM))
    vocabulary = Vocabulary(
        names=tuple(names.values()),
        category_ids=tuple(names),
        is_base=tuple(name in OVCOCO_BASE for name in names.values()),
        frequencies=("",) * len(names),
        prompts=("{}",),
        teacher="none",
        embeddings=(embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)).astype("f4"),
    )
    config = replace(
        tiny_config(),
        data=DataConfig(workers=0, image_size=image_size),
        eval=EvalConfig(batch_size=batch_size),
    )
    save_student_file(path, StudentFile(tiny_student(config).state_dict(), config, vocabulary, {}))


def evaluate(folder: Path, student: str, split: str, ranks: int) -> dict[str, bytes]:
    words = ("eval", student, "--split", split, "--device", "cpu", "--json", "out.json")
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks),
                "--no-python", "--", *DKDETR)  # fmt: skip
    done = run_command([*torchrun, *words], folder) if ranks > 1 else call(*words, cwd=folder)
    assert done.returncode == 0, done.stderr
    (out,) = (folder / Path(student).stem / "eval").iterdir()
    assert sorted(each.name for each in out.iterdir()) == sorted(FILES)
    files = {name: (out / name).read_bytes() for name in FILES}
    for name in FILES:
        (out / name).unlink()
    assert json.loads((folder / "out.json").read_text())["num_images"] > 0
    (folder / "out.json").unlink()
    return files


# Uneven shards; and one rank without an image.
@pytest.mark.parametrize(
    ("num_images", "batch_size", "ranks"),
    [pytest.param(7, 2, 2, marks=pytest.mark.slow), (2, 1, 3)],
)
def test_ranks_write_what_one_process_writes(num_images, batch_size, ranks, tmp_path):
    split = write_coco_folder(tmp_path, "val2017", num_images=num_images, seed=1)
    write_student(tmp_path / "s.safetensors", batch_size=batch_size)
    several = evaluate(tmp_path, "s.safetensors", split, ranks)
    assert several == evaluate(tmp_path, "s.safetensors", split, 1)
    assert len(json.loads(several["results.json"])) == 300 * num_images  # all that 12 queries say


def test_sigterm_ends_an_evaluation_with_75_and_leaves_what_was_there(tmp_path):
    split = write_coco_folder(tmp_path, "val2017", num_images=120, seed=1)
    write_student(tmp_path / "s.safetensors", batch_size=1, image_size=640)
    words = ("eval", "s.safetensors", "--split", split, "--device", "cpu")
    out = tmp_path / "s/eval" / f"ovcoco-val2017-{folder_digest(split)}"
    out.mkdir(parents=True)
    (out / "metrics.json").write_text("of before")
    process = start_dkdetr(*words, cwd=tmp_path)
    # The temporary file has no name, but Linux shows it among the process's open files.
    while not is_spooling(process.pid, out):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate()
    assert process.returncode == 75, said
    assert "SIGTERM" in said
    assert "Traceback" not in said
    assert [(each.name, each.read_text()) for each in out.iterdir()] == [
        ("metrics.json", "of before")
    ]


def folder_digest(split: str) -> str:
    from hashlib import sha256

    return sha256(split.partition(":")[2].encode()).hexdigest()[:6]


def is_spooling(pid: int, out: Path) -> bool:
    try:
        opened = [each.readlink() for each in Path(f"/proc/{pid}/fd").iterdir()]
    except OSError:
        return False
    return any(str(each).startswith(str(out)) for each in opened)


def test_a_file_is_scored_by_one_process(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = call("eval", "--predictions", "x.json", "--split", "coco_val", cwd=tmp_path)
    assert done.returncode == 2
    assert "one process" in done.stderr
