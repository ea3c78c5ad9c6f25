"""The copy of a student that `predict` asks: made once, and anew when weights have changed."""

from typing import Any

import torch
from torch import Tensor, nn

from dkdetr.config import Precision
from dkdetr.evaluation.compiled import ready_for_inference
from dkdetr.student.detector import DKDETR as Student


class ReadyStudent:
    """Keeps the copy of the student that it was last asked for.

    Args:
        device: where students are.
        precision: in which they are called.
        compiled: see `ready_for_inference`.
    """

    def __init__(self, device: torch.device, precision: Precision, *, compiled: bool) -> None:
        self._device = device
        self._precision: Precision = precision
        self._compiled = compiled
        self._copied: Any = None
        self._ready: nn.Module | None = None
        self._versions: list[tuple[Tensor, int]] = []

    def of(self, student: nn.Module) -> nn.Module:
        """Returns the student's copy; whatever else answers as a student does, itself.

        Weights written to in place, by an optimiser or `load_state_dict`, are noticed; those
        written to through `.data` are not.
        """
        if not isinstance(student, Student):
            return student
        changed = any(_version(each) != version for each, version in self._versions)
        if self._ready is None or student is not self._copied or changed:
            self._ready = ready_for_inference(
                student, self._device, self._precision, compiled=self._compiled
            )
            self._copied = student
            tensors = (*student.parameters(), *student.buffers())
            self._versions = [(each, _version(each)) for each in tensors]
        return self._ready


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version  # torch counts what is written in place
