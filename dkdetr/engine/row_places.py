"""Where an ablation's rows run side by side: which GPU, how many threads and loader processes."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from dkdetr.cores import cores_at_hand
from dkdetr.engine.distributed import pick_device


@dataclass(frozen=True)
class RowPlaces:
    """As many places as rows run at once.

    Attributes:
        environments: what a process has in each, beside its starter's.
        cores: how many of them a place's share is.
        gpus: how many GPUs the places are on.
    """

    environments: tuple[Mapping[str, str], ...]
    cores: int
    gpus: int

    @property
    def share_gpus(self) -> bool:
        """Returns True if several places are on one GPU."""
        return 0 < self.gpus < len(self.environments)

    @property
    def loader_processes(self) -> int:
        """Returns how many loader processes of a row its cores feed, beside its own process."""
        return max(1, self.cores - 1)


def places_for(device: str, jobs: int | None, *, most: int) -> RowPlaces:
    """Returns the places of `jobs` rows; None: one a GPU or, where there is none, one a core.

    There are `most` rows: no more places than that, so that the cores are theirs. Rows take GPUs
    in turn. On a CPU a row has one thread whatever the number of jobs: sums, and so
    results, must not depend on it.

    Raises:
        UsageError: the device is not there.
    """
    cores = cores_at_hand()
    if device in ("auto", "cuda") and pick_device(device).type == "cuda":
        gpus: Sequence[str | None] = _visible_gpus()
    elif device.startswith("cuda"):
        gpus = [None]  # the rows' own --device names it
    else:
        count = min(jobs or cores, most)
        return RowPlaces(({"OMP_NUM_THREADS": "1"},) * count, max(1, cores // count), gpus=0)
    count = min(jobs or len(gpus), most)
    share = max(1, cores // count)
    environments: list[Mapping[str, str]] = []
    for place in range(count):
        gpu = gpus[place % len(gpus)]
        chosen = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}
        environments.append(chosen | {"OMP_NUM_THREADS": str(share)})
    return RowPlaces(tuple(environments), share, gpus=len(gpus))


def _visible_gpus() -> list[str]:
    count = torch.cuda.device_count()
    if shown := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return shown.split(",")[:count]  # CUDA stops at the first that is not there
    return [str(number) for number in range(count)]
