"""SIGTERM in every stage of `cache-teacher`: exit code 75, and the same command makes the rest.

And a second command that comes in between.
"""

import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest

from cache.spec import CacheLockedError
from dkdetr.errors import PreemptedError
from pipeline import build, shard_worker
from pipeline.build import cache_teacher
from pipeline.request import CacheRequest
from pipeline.teacher_model import Teacher
from tests.e2e.tiny_stage_one import tiny_request, write_tiny_teacher, write_world


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[CacheRequest, str]:
    """A request, and the Merkle root of its undisturbed cache."""
    folder = tmp_path_factory.mktemp("stops")
    write_world(folder)
    request = tiny_request(folder, write_tiny_teacher(folder), folder / "cache")
    request = replace(request, neighbors=True)
    return request, cache_teacher(request).merkle_root


def _terminating(function: Callable[..., Any], *, call: int, after: bool) -> Callable[..., Any]:
    """Returns the function, which sends this process a SIGTERM at one of its calls.

    `raise_signal` sends it to the calling thread: `os.kill` leaves the choice to the kernel, and
    another thread of a busy machine may take it to where the stage is long over.
    """
    count = iter(range(1, 1000))

    def terminate(*args: Any, **kwargs: Any) -> Any:
        now = next(count) == call
        if now and not after:
            signal.raise_signal(signal.SIGTERM)
        result = function(*args, **kwargs)
        if now and after:
            signal.raise_signal(signal.SIGTERM)
        return result

    return terminate


STAGES = {
    "hashing": (build, "check_images", 1, False),
    "teacher": (build, "load_teacher", 1, True),
    "proposals": (build, "prepare_source", 1, False),
    "planning": (build, "create_or_resume", 1, False),
    "first shard": (shard_worker, "commit_shard", 1, False),
    "between shards": (shard_worker, "commit_shard", 2, True),
    "crops": (Teacher, "features_on_device", 30, False),
    "text": (build, "build_vocabulary", 1, False),
    "sealing": (build.CacheWriter, "seal", 1, False),
    "neighbours": (build, "add_neighbors", 1, False),
    "summary": (build, "open_cache", 1, False),
}


@pytest.mark.parametrize("stage", STAGES)
def test_sigterm_is_answered_with_75_and_loses_nothing(
    stage: str, made: tuple[CacheRequest, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request, root = made
    stopped = replace(request, out=tmp_path / "cache")
    home, name, call, after = STAGES[stage]
    terminate = _terminating(getattr(home, name), call=call, after=after)
    monkeypatch.setattr(home, name, terminate)
    with pytest.raises(PreemptedError, match="stopped by SIGTERM") as caught:
        cache_teacher(stopped)
    assert caught.value.exit_code == 75
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert cache_teacher(stopped).merkle_root == root


def test_two_commands_that_pack_one_file_at_once_never_spoil_each_other(
    request_: CacheRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second comes while the first one's copy is half written: it would sweep that away."""
    pack = np.savez
    second: list[CacheLockedError] = []

    def half_written(file: IO[bytes], **arrays: np.ndarray) -> None:
        monkeypatch.setattr(np, "savez", pack)
        file.write(b"half")
        with pytest.raises(CacheLockedError) as caught:
            cache_teacher(request_)
        second.append(caught.value)
        file.seek(0)
        pack(file, **arrays)

    monkeypatch.setattr(np, "savez", half_written)
    root = cache_teacher(request_).merkle_root
    assert second[0].exit_code == 7
    assert "wait until that command is done" in str(second[0])
    # What is packed is taken as it is, and the lease was given back.
    monkeypatch.setattr(np, "savez", None)
    assert cache_teacher(request_).merkle_root == root
