"""What a step draws by chance: dropout, the classes of FedLoss, the noise of denoising queries.

Every draw is a function of its moment, not of the past, so that a resumed run draws the same.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dkdetr.config import ExperimentConfig
from dkdetr.losses.denoising import make_denoising
from dkdetr.losses.federated import draw_classes
from dkdetr.structures import DenoisingQueries, LoadedBatch


@dataclass(frozen=True)
class Moment:
    """When and where a micro-batch is computed: `place` counts all ranks' parts of a step."""

    epoch: int
    iteration: int
    place: int


class StepChance:
    """Draws for one micro-batch after the other, on the CPU, from what still lies there.

    Args:
        config: the experiment.
        num_classes: those of the text embeddings.
        class_weights: how likely a class is drawn; None: all classes take part.
        device: where what was drawn is wanted.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        *,
        num_classes: int,
        class_weights: Tensor | None,
        device: torch.device,
    ) -> None:
        self._config = config
        self._num_classes = num_classes
        self._class_weights = class_weights
        self._device = device

    def seed_dropout(self, moment: Moment) -> None:
        """Seeds torch's own generators, which dropout draws from."""
        torch.manual_seed(self._seed(moment))

    def classes(self, batch: LoadedBatch, moment: Moment) -> Tensor | None:
        """Returns the classes that the focal loss looks at; None: at all."""
        if self._class_weights is None:
            return None
        drawn = draw_classes(
            batch.targets,
            self._class_weights,
            num_drawn=self._config.detection.fed_classes,
            generator=torch.Generator().manual_seed(self._seed(moment, 1)),
        )
        return drawn.to(self._device, non_blocking=True)

    def denoising(self, batch: LoadedBatch, moment: Moment) -> DenoisingQueries | None:
        """Returns the objects with noise; None: the student has no denoising queries."""
        student = self._config.student
        if student.denoising == 0:
            return None
        denoising = make_denoising(
            batch.targets,
            self._num_classes,
            num_groups=student.denoising,
            box_noise=student.denoising_box_noise,
            label_noise=student.denoising_label_noise,
            generator=torch.Generator().manual_seed(self._seed(moment, 2)),
        )
        return denoising.to(self._device)

    def _seed(self, moment: Moment, *purpose: int) -> int:
        return hash((self._config.seed, moment.iteration, moment.place, *purpose)) % 2**63
