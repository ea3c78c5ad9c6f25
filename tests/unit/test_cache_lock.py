import json
import os
import re
import socket
import subprocess
import sys
import time

import pytest

from cache.lock import _GUARD_WAIT_S, LOCK_FILE, Lease
from cache.spec import CacheLockedError


def _holder(path):
    return json.loads((path / LOCK_FILE).read_text())


def _hold_elsewhere(path):
    """Returns a process that holds the lease of `path` until its input closes."""
    code = (
        "import sys, pathlib\n"
        "from cache.lock import Lease\n"
        "with Lease(pathlib.Path(sys.argv[1])):\n"
        "    print('held', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    return process


def test_a_lease_is_given_back(tmp_path):
    with Lease(tmp_path) as lease:
        assert lease.held()
        assert _holder(tmp_path)["pid"] == os.getpid()
    assert not (tmp_path / LOCK_FILE).exists()
    with Lease(tmp_path):
        pass


def test_a_second_writer_is_refused_quickly_and_told_who_holds_it(tmp_path):
    other = _hold_elsewhere(tmp_path)
    try:
        started, began = time.process_time(), time.monotonic()
        with pytest.raises(CacheLockedError) as caught, Lease(tmp_path):
            pass
        # Within 2 s, of which a busy machine's are not counted.
        assert _GUARD_WAIT_S + time.process_time() - started < 2
        assert time.monotonic() - began < 60  # nor may it wait for more than the guard
        assert f"held by {socket.gethostname()}:{other.pid} since 20" in str(caught.value)
        assert re.search(r"heartbeat \d+ s ago", str(caught.value))
        assert other.poll() is None
    finally:
        other.communicate("")
    assert other.returncode == 0
    with Lease(tmp_path):
        pass


def test_the_lease_of_a_killed_process_is_taken_over_at_once(tmp_path):
    other = _hold_elsewhere(tmp_path)
    other.kill()
    other.communicate()
    assert (tmp_path / LOCK_FILE).exists()
    with Lease(tmp_path):
        assert _holder(tmp_path)["pid"] == os.getpid()


def _edit(path, **changes):
    (path / LOCK_FILE).write_text(json.dumps({**_holder(path), **changes}))


def test_a_process_that_cannot_be_asked_keeps_its_lease_while_its_heart_beats(tmp_path):
    # Another host, another boot, another container: its number means nothing here.
    for change in ({"host": "elsewhere"}, {"boot_id": "other"}, {"namespace": "pid:[1]"}):
        first = Lease(tmp_path).__enter__()
        _edit(tmp_path, pid=2**22 + 1, **change)
        with pytest.raises(CacheLockedError), Lease(tmp_path):
            pass
        old = time.time() - 61
        os.utime(tmp_path / LOCK_FILE, (old, old))
        with Lease(tmp_path):
            assert _holder(tmp_path)["pid"] == os.getpid()
        first.release()


def test_a_later_process_with_the_same_number_is_not_the_holder(tmp_path):
    first = Lease(tmp_path).__enter__()
    _edit(tmp_path, started_ticks="1")
    with Lease(tmp_path):
        pass
    first.release()


def test_the_heart_beats(tmp_path):
    with Lease(tmp_path, heartbeat_s=0.05):
        old = time.time() - 50
        os.utime(tmp_path / LOCK_FILE, (old, old))
        deadline = time.monotonic() + 60
        while (tmp_path / LOCK_FILE).stat().st_mtime < old + 1:
            assert time.monotonic() < deadline, "no beat"
            time.sleep(0.02)


def test_a_sleeper_notices_that_it_lost_its_lease_and_leaves_the_new_one(tmp_path):
    sleeper = Lease(tmp_path).__enter__()
    old = time.time() - 61
    os.utime(tmp_path / LOCK_FILE, (old, old))
    with Lease(tmp_path) as new:
        with pytest.raises(CacheLockedError, match="lost its lease"):
            sleeper.check()
        sleeper.release()
        new.check()


def test_an_unreadable_lease_is_taken_over(tmp_path):
    (tmp_path / LOCK_FILE).write_bytes(b"{")
    with Lease(tmp_path) as lease:
        assert lease.held()
