"""Commands side by side: what is told of one that failed."""

import sys

from dkdetr.engine.interruption import StopFlag
from dkdetr.engine.jobs import Job, Jobs, Outcome


def test_a_row_is_not_blamed_on_an_earlier_attempt_s_error(tmp_path):
    """Its log is appended to; the second command of the second attempt names no error."""
    log = tmp_path / "log.txt"
    words = ("print('error [9]: out of memory')", "raise SystemExit(9)"), ("", "exit('no disk')")
    for (first, second), code, message in zip(
        words, (9, 1), ("error [9]: out of memory", "no disk"), strict=True
    ):
        jobs = Jobs([Job("row", ((first,), (second,)), log)], (sys.executable, "-c"), ({},))
        jobs.run(StopFlag(), watch=lambda: None, done=lambda *_: None)
        assert jobs.outcomes["row"] == Outcome(code, message)
    assert "out of memory" in log.read_text()
