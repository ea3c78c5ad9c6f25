"""What a rank behind the first leaves in RUN/logs."""

import re
import sys
from pathlib import Path

import pytest
import torch

from dkdetr.engine.distributed import Ranks
from dkdetr.engine.rank_log import rank_log
from dkdetr.errors import DataError, PreemptedError

FIRST, THIRD = (Ranks(rank=rank, world_size=4, device=torch.device("cpu")) for rank in (0, 2))


def speak_and_break(run: Path) -> None:
    before = sys.stderr
    with rank_log(run, THIRD):
        print("reading", file=sys.stderr)
        sys.stderr.write("beware\n")
        assert sys.stderr.isatty() is before.isatty()
        raise DataError("picture 7 is broken")


def test_words_and_a_traceback_are_kept_after_what_was_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sys.stderr
    with pytest.raises(DataError, match="picture 7"):
        speak_and_break(tmp_path)
    assert sys.stderr is before
    said = capsys.readouterr().err
    assert said.startswith("reading\n")
    assert "picture 7" not in said  # that is the command's to say
    lines = (tmp_path / "logs/rank_2.log").read_text().splitlines()
    assert " rank 2 of 4, cpu, " in lines[0]
    assert lines[1] == "reading"
    assert lines[2] == "beware"
    assert "Traceback" in "".join(lines[3:5])
    assert lines[-1] == "dkdetr.errors.DataError: picture 7 is broken"
    with rank_log(tmp_path, THIRD):
        print("again", file=sys.stderr)
    again = (tmp_path / "logs/rank_2.log").read_text().splitlines()
    assert again[: len(lines)] == lines
    assert again[-1] == "again"


def test_a_stop_by_sigterm_is_one_line_and_no_break(tmp_path: Path) -> None:
    with pytest.raises(PreemptedError), rank_log(tmp_path, THIRD):
        raise PreemptedError("stopped by SIGTERM at iteration 7; saved")
    head, end = (tmp_path / "logs/rank_2.log").read_text().splitlines()
    assert " rank 2 of 4, " in head
    assert re.fullmatch(r"\S+ stopped by SIGTERM at iteration 7; saved", end)


def test_a_file_name_that_is_no_utf_8_breaks_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError), rank_log(tmp_path, THIRD):
        raise DataError("picture caf\udce9.jpg is broken")
    assert r"caf\udce9.jpg is broken" in (tmp_path / "logs/rank_2.log").read_text()


def test_the_first_rank_and_a_silent_one_leave_nothing(tmp_path: Path) -> None:
    with rank_log(tmp_path, FIRST):
        print("words", file=sys.stderr)
    with rank_log(tmp_path, THIRD):
        pass
    assert not [*tmp_path.iterdir()]


def test_a_log_that_cannot_be_written_stops_nothing_and_is_told_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "logs").touch()
    with pytest.raises(DataError, match="broken"):
        speak_and_break(tmp_path)
    said = capsys.readouterr().err
    assert said.count("rank_2.log' cannot be written") == 1
    assert said.endswith("\nreading\nbeware\n")
