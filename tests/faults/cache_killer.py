"""A process that has imported everything and touched nothing; it forks one writer for each trial.

Its standard input holds JSON lines `{"path", "fault", "kill_after_s"}`; it answers each with how
the writer ended: an exit code, or minus the signal. Forking here is safe, as no thread runs yet,
and saves each trial the seconds of imports.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from cache.spec import CacheError
from tests.cache_samples import write_sample_cache


def _trial(path: str, fault: str, kill_after_s: float) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.environ["DKDETR_FAULT"] = fault
            write_sample_cache(Path(path))
            code = 0
        except CacheError as error:
            code = error.exit_code
        finally:
            os._exit(code)
    if kill_after_s:
        time.sleep(kill_after_s)
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


if __name__ == "__main__":
    for line in sys.stdin:
        print(_trial(**json.loads(line)), flush=True)
