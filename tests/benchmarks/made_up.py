"""Made-up training batches of the paper's shape, and the clock."""

from collections.abc import Callable
from time import perf_counter, process_time

import torch
from torch import Tensor
from torch.nn.functional import normalize

from dkdetr.boxes import xyxy_to_cxcywh
from dkdetr.structures import ImageBatch, Targets, TeacherRegions, TrainingBatch

TEXT_DIM = 512
REGIONS = 20


def made_up_batch(batch: int, size: int, num_classes: int, *, seed: int = 0) -> TrainingBatch:
    """Returns pictures of noise with 8 to 16 boxes and 20 regions each."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.tensor([[size, size]] * batch)
    targets = []
    for _ in range(batch):
        count = int(torch.randint(8, 17, (), generator=generator))
        labels = torch.randint(num_classes, (count,), generator=generator)
        targets.append(Targets(labels, _boxes(count, generator)))
    regions = TeacherRegions(
        boxes_cxcywh=_boxes(batch * REGIONS, generator).view(batch, REGIONS, 4),
        embeddings=normalize(torch.randn(batch, REGIONS, TEXT_DIM, generator=generator), dim=-1),
        valid=torch.ones(batch, REGIONS, dtype=torch.bool),
    )
    images = ImageBatch(
        pixels=torch.randn(batch, 3, size, size, generator=generator),
        padding_mask=torch.zeros(batch, size, size, dtype=torch.bool),
        image_sizes_hw=sizes,
        original_sizes_hw=sizes,
        image_ids=tuple(range(batch)),
    )
    return TrainingBatch(images, tuple(targets), regions)


def _boxes(count: int, generator: torch.Generator) -> Tensor:
    low = 0.7 * torch.rand(count, 2, generator=generator)
    sides = 0.05 + 0.25 * torch.rand(count, 2, generator=generator)
    return xyxy_to_cxcywh(torch.cat((low, low + sides), dim=-1))


def made_up_text(num_classes: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return normalize(torch.randn(num_classes, TEXT_DIM, generator=generator), dim=-1)


def seconds_a_call(function: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Returns the median seconds of a call, after two to warm up.

    On a CPU they are seconds of this process, so that a busy machine changes them little.
    """
    clock = perf_counter if device.type == "cuda" else process_time
    times = []
    for _ in range(repeats + 2):
        finish(device)
        begun = clock()
        function()
        finish(device)
        times.append(clock() - begun)
    return sorted(times[2:])[repeats // 2]


def finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
