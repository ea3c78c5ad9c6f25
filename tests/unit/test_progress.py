"""Progress as lines: what an earlier run finished is shown, and counts in no rate."""

import pytest

from dkdetr import progress as progress_module
from dkdetr.progress import progress, progress_of


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    return now


def test_the_time_left_is_by_what_this_run_has_done(clock, capsys):
    with progress("work", 1000, done=900) as advance:
        advance(905, "early")
        assert capsys.readouterr().err == ""  # a line every 30 seconds
        clock[0] = 30.0
        advance(910, "on the way")
        assert capsys.readouterr().err == "work: 910/1000 in 30s, about 4m30s left  on the way\n"
        clock[0] = 300.0
        advance(1000, "")
        assert capsys.readouterr().err == "work: 1000/1000 in 5m00s\n"
    assert capsys.readouterr().err == "work: 1000/1000 in 5m00s\n"


def test_a_run_that_fell_back_behind_its_start_tells_no_time(clock, capsys):
    with progress("work", 1000, done=900) as advance:
        clock[0] = 30.0
        advance(880, "")
        assert capsys.readouterr().err == "work: 880/1000 in 30s\n"


def test_a_total_may_come_with_the_first_unit(clock, capsys):
    with progress_of("verify"):
        pass
    assert capsys.readouterr().err == ""  # nothing was begun
    with progress_of("verify") as advance:
        advance(1, 4)
        clock[0] = 30.0
        advance(2, 4)
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["verify: 2/4 in 30s, about 30s left", "verify: 2/4 in 30s, about 30s left"]


def test_a_bar_within_a_bar_shows_nothing(capsys):
    with progress("outer", 2) as outer:
        with progress("inner", 1) as inner:
            inner(1, "")
        outer(2, "")
    with progress("next", 1) as after:
        after(1, "")
    said = capsys.readouterr().err
    assert "inner" not in said
    assert "outer: 2/2" in said
    assert "next: 1/1" in said
