"""Others' code in the same run: who is not here is named, who fails is told; ours is timed."""

import importlib
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import TypeVar

import torch

from dkdetr.device_failures import DEVICE_FAILURES

Result = TypeVar("Result")


class Peers:
    """Measures peers of one benchmark.

    Attributes:
        failed: names of those that are here and could not do their work.
    """

    def __init__(self) -> None:
        self.failed: list[str] = []
        self._said: set[str] = set()

    def measured(
        self, name: str, modules: Sequence[str], measure: Callable[[], Result]
    ) -> Result | None:
        """Returns what `measure` does; None, after a line that says why, where it cannot.

        Args:
            name: of the peer.
            modules: what it wants to import.
            measure: may run out of memory, where ours does not, or fail otherwise. What leaves the
                device without an answer is raised: nothing after it could be trusted.
        """
        missing = [module for module in modules if find_spec(module) is None]
        if missing:
            return self._say(f"{name}: not installed ({', '.join(missing)}), so not timed")
        try:
            for module in modules:
                importlib.import_module(module)
        except (ImportError, OSError) as error:
            return self._say(f"{name}: does not load here ({error}), so not timed")
        try:
            return measure()
        except Exception as error:
            out_of_memory = isinstance(error, torch.OutOfMemoryError)
            if isinstance(error, DEVICE_FAILURES) and not out_of_memory:
                raise
            traceback.print_exc()
            self.failed.append(name)
            first = (str(error).splitlines() or [""])[0]
            return self._say(f"{name} FAILED: {type(error).__name__}: {first}")

    def exit_code(self) -> int:
        """Returns 1 where a peer failed."""
        if self.failed:
            print(f"failed: {', '.join(dict.fromkeys(self.failed))}", file=sys.stderr)
        return 1 if self.failed else 0

    def _say(self, line: str) -> None:
        if line not in self._said:
            print(line, flush=True)
        self._said.add(line)
