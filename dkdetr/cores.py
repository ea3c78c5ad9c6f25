"""How many cores of the machine this process may use."""

import os


def cores_at_hand() -> int:
    """Returns the cores that the process is bound to; all, on systems that bind none (macOS)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
