"""Files that appear whole or not at all."""

import os
import subprocess
import sys
from pathlib import Path

from dkdetr.atomic_file import atomic_file, write_bytes


def test_two_writers_of_one_name_and_one_process_number_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    with atomic_file(path) as slow:
        slow.write(b"slow ")
        with atomic_file(path) as fast:
            fast.write(b"fast and long")
        assert path.read_bytes() == b"fast and long"
        assert len(list(tmp_path.glob(".*.partial"))) == 1
        slow.write(b"one")
    assert [*tmp_path.iterdir()] == [path]
    assert path.read_bytes() == b"slow one"


KILLED = """
import os, signal, sys
from pathlib import Path
from dkdetr.atomic_file import atomic_file
with atomic_file(Path(sys.argv[1]), large=True) as file:
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_large_files_next_writer_removes_what_a_killed_one_left_and_nothing_of_others(
    tmp_path: Path,
) -> None:
    path, other = tmp_path / "w[1].pt", tmp_path / "w1.pt"
    for place in (path, other):
        subprocess.run([sys.executable, "-c", KILLED, str(place)], check=False)
    write_bytes(path, b"too soon", large=True)  # where locks are each machine's own it may live
    path.unlink()
    for file in tmp_path.iterdir():
        os.utime(file, (0, 0))
    dead, of_other = sorted(tmp_path.iterdir(), key=lambda file: "w1" in file.name)
    with atomic_file(path, large=True) as slow:
        slow.write(b"slow")
        slow.flush()
        (living,) = {*tmp_path.iterdir()} - {of_other}  # `dead` is gone
        assert living != dead
        write_bytes(path, b"fast", large=True)  # leaves `living` where it is
        assert {*tmp_path.iterdir()} == {of_other, living, path}
    assert {*tmp_path.iterdir()} == {of_other, path}
    assert path.read_bytes() == b"slow"


def test_a_name_that_goes_on_behind_a_dot_is_another_file(tmp_path: Path) -> None:
    """Who writes that one need not lock it."""
    with atomic_file(tmp_path / "w.pt") as living:
        living.write(b"live")
        living.flush()
        write_bytes(tmp_path / "w", b"other", large=True)
    assert (tmp_path / "w.pt").read_bytes() == b"live"
