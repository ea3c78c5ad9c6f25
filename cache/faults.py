"""Named points at which a test can kill the process, to prove that nothing is lost there.

`DKDETR_FAULT=commit.before_manifest:3` kills the process (SIGKILL: no clean-up runs) when it
reaches that point for the third time. Without the variable a point costs one dictionary look-up.
"""

import os
import signal

FAULT_VARIABLE = "DKDETR_FAULT"

_hits: dict[str, int] = {}


def fault_point(name: str) -> None:
    """Kills this process if `DKDETR_FAULT` names this point and this is the hit it asks for."""
    wanted = os.environ.get(FAULT_VARIABLE)
    if not wanted:
        return
    wanted_name, _, wanted_hit = wanted.partition(":")
    if wanted_name != name:
        return
    _hits[name] = _hits.get(name, 0) + 1
    if _hits[name] == int(wanted_hit or "1"):
        os.kill(os.getpid(), signal.SIGKILL)
