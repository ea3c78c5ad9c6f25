"""What the Triton kernels share: a trial before they are trusted, and the device they start on.

Triton itself is imported when a kernel is first wanted, and only then.
"""

import contextlib
import functools
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch

from dkdetr.device_failures import DEVICE_FAILURES

LEAST_CAPABILITY = (7, 0)
"""The oldest GPUs that Triton compiles for: Volta."""


def problem_of(device: torch.device, trial: Callable[[], str | None]) -> str | None:
    """Returns why kernels cannot run on a device; None if they did.

    Args:
        device: where they should.
        trial: imports, compiles and runs them once, small; returns what is wrong with what they
            give, if anything is.

    Raises:
        DEVICE_FAILURES: which say nothing of the kernels, or leave nothing to go on with.
    """
    try:
        from triton.errors import TritonError
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
        return f"the kernels want compute capability {LEAST_CAPABILITY} or newer"
    try:
        return trial()
    except DEVICE_FAILURES:
        raise
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    except (TritonError, RuntimeError, OSError, subprocess.SubprocessError) as error:
        return _do_not_run(error)
    except AssertionError as error:
        if "libcuda" not in str(error):  # in some images Triton does not find it, and says so thus
            raise
        return _do_not_run(error)


def _do_not_run(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"the kernels do not run here ({type(error).__name__}: {lines[0]})"


@functools.cache
def say_once(sentence: str) -> None:
    """Prints a line on stderr, the first time that it is to be said."""
    print(sentence, file=sys.stderr)


def on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Returns a context in which kernels start on `device`; without a GPU, in the interpreter."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
