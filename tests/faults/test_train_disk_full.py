"""A disk that is full, or a quota: the old checkpoint stands, and the run goes on from it."""

import errno
import resource
import signal
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

import cli
from dkdetr.atomic_file import write_text
from dkdetr.engine.checkpoint import load_checkpoint, load_latest, save_checkpoint, write_checkpoint
from dkdetr.engine.metric_log import MetricLog, read_metrics
from dkdetr.engine.train import train
from tests.faults.checkpoint_killer import numbered
from tests.training_world import checkpoint_of, difference, make_world, settings

SIZES = 30


@contextmanager
def files_up_to(num_bytes: int):
    """Lets no file of this process grow beyond so many bytes."""
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, old)


def test_a_save_without_room_leaves_the_old_checkpoint_at_thirty_sizes(tmp_path) -> None:
    save_checkpoint(tmp_path, numbered(1))
    size = save_checkpoint(tmp_path, numbered(2)).stat().st_size
    burn_in = tmp_path / "burn_in.pt"
    for step in range(SIZES):
        for save in (
            lambda: save_checkpoint(tmp_path, numbered(3)),
            lambda: write_checkpoint(burn_in, numbered(3)),
        ):
            with files_up_to(step * size // SIZES), pytest.raises(OSError) as raised:
                save()
            assert cli._exit_code(raised.value) == 6, raised.value
        assert not list(tmp_path.glob(".*.partial"))
        assert not burn_in.exists()
        found = load_latest(tmp_path)
        assert found is not None
        assert found[1].progress.iteration == 2
        assert torch.equal(found[1].student["weight"], numbered(2).student["weight"])
    save_checkpoint(tmp_path, numbered(3))
    write_checkpoint(burn_in, numbered(3))
    assert load_checkpoint(burn_in).progress.iteration == 3


def test_the_message_names_the_file_and_what_comes_next(tmp_path) -> None:
    with files_up_to(1000), pytest.raises(OSError) as raised:
        save_checkpoint(tmp_path, numbered(7))
    said = cli._sentence(raised.value, cli._exit_code(raised.value))
    assert "step_00000007.pt" in said
    assert "the same command resumes" in said


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_a_quota_and_a_limit_have_exit_code_6(number) -> None:
    assert cli._exit_code(OSError(number, "no room")) == 6


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_a_place_of_others_has_exit_code_2_and_is_named(number, tmp_path, monkeypatch) -> None:
    def refuse(self, *_words):
        raise OSError(number, "Forbidden", str(self))

    monkeypatch.setattr("pathlib.Path.open", refuse)
    with pytest.raises(OSError) as raised:
        write_text(tmp_path / "run.json", "{}")
    assert cli._exit_code(raised.value) == 2
    said = cli._sentence(raised.value, 2)
    assert said.startswith(f"Forbidden: '{tmp_path}/run.json'.")
    assert "name another place" in said


@pytest.mark.parametrize("error", [OSError(errno.EIO, "broken"), OSError(errno.EPERM, "no file")])
def test_other_errors_of_files_have_neither(error) -> None:
    assert cli._exit_code(error) == 1


def test_the_diary_without_room_keeps_its_whole_lines(tmp_path) -> None:
    for step in range(SIZES):
        path = tmp_path / f"{step}.jsonl"
        log = MetricLog(path, after_iteration=0)
        with files_up_to(10 + 40 * step), pytest.raises(OSError) as raised:
            _write_a_hundred(log)
        assert cli._exit_code(raised.value) == 6
        _close_without_room(log)
        log = MetricLog(path, after_iteration=99)
        log.write("train", 100, {"total": 2.0})
        log.close()
        found = [record["iteration"] for record in read_metrics(path)]
        assert found == [*range(len(found) - 1), 100]


def _write_a_hundred(log: MetricLog) -> None:
    for iteration in range(100):
        log.write("train", iteration, {"total": 1.0})


def _close_without_room(log: MetricLog) -> None:
    # As the end of the process does: what its buffer holds is tried once more, and lost.
    with files_up_to(0):
        try:
            log.close()
        except OSError:
            return


def test_a_run_goes_on_from_before_the_disk_was_full_as_if_nothing_had_been(tmp_path) -> None:
    world = make_world(tmp_path)
    config = settings()
    train(world.request("whole", config, until_iteration=8))
    train(world.request("full", config, until_iteration=5))
    saved = world.root / "runs" / "full" / "checkpoints" / "step_00000005.pt"
    often = replace(config, checkpoint_every_s=0.0)
    with files_up_to(saved.stat().st_size // 2), pytest.raises(OSError) as raised:
        train(world.request("full", often, until_iteration=8))
    assert cli._exit_code(raised.value) == 6
    assert checkpoint_of(world, "full").progress.iteration == 5
    train(world.request("full", config, until_iteration=8))
    assert difference(checkpoint_of(world, "whole"), checkpoint_of(world, "full")) == ""


def test_a_device_without_memory_has_exit_code_9_with_figures_and_settings() -> None:
    error = torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 31.7 GiB "
        "of which 1.1 GiB is free.\nfurther lines"
    )
    assert cli._exit_code(error) == 9
    said = cli._sentence(error, 9)
    assert "Tried to allocate 2.00 GiB" in said
    assert "further lines" not in said
    compute = ("compute.micro_batches", "compute.activation_checkpointing")
    for setting in (*compute, "optim.precision=auto", "data.image_size"):
        assert setting in said
    assert "eval, predict: --batch-size 1" in said
    assert "for `fit` of cache-teacher, too" in said
    for command in ("eval", "predict"):
        wide = {"COLUMNS": "200"}
        assert "--batch-size" in CliRunner().invoke(cli.app, [command, "--help"], env=wide).output
