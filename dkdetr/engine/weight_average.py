"""A running average of the student's weights (EMA), often better than the last ones."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class WeightAverage:
    """Follows a student at a distance.

    Parameters are averaged; running statistics are averages already and are taken as they are.
    The decay grows to its full value over the first updates, (1 + n) / (10 + n) after n of them,
    so that the random start is soon forgotten.

    Args:
        student: what is followed; the average starts as its copy.
        decay: share of the old average that an update keeps, below 1.
    """

    def __init__(self, student: nn.Module, decay: float) -> None:
        self._decay = decay
        self._state = {name: value.clone() for name, value in student.state_dict().items()}

    @torch.no_grad()
    def update(self, student: nn.Module, iteration: int) -> None:
        """Moves towards the student, `iteration` updates after the start."""
        share = 1 - min(self._decay, (1 + iteration) / (10 + iteration))
        parameters = {name for name, _ in student.named_parameters()}
        for name, value in student.state_dict().items():
            if name in parameters:
                self._state[name].lerp_(value, share)
            else:
                self._state[name].copy_(value)

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the averaged student's state."""
        return self._state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Goes on from a `state_dict`."""
        for name, value in self._state.items():
            value.copy_(state[name])
