"""Figures since the last line of the log; tensors stay on the device until it is written."""

import math
import resource
import time
from collections import defaultdict

import torch
from torch import Tensor

from dkdetr.engine.step import StepResult


class RecentFigures:
    """Collects what steps report; `means` empties it.

    Args:
        device: whose memory is watched.
    """

    def __init__(self, device: torch.device) -> None:
        self.last: dict[str, float | None] = {}
        self._device = device
        self._most_gib = 0.0
        self._clear()

    def add(self, result: StepResult, wait: float, num_images: int) -> None:
        """Adds a step, the seconds that it waited for data, and its images over all ranks.

        Of a step that the fp16 scaler skipped only this is kept: what overflowed is no figure.
        """
        self._steps += 1
        for name, value in (result.parts | result.statistics).items():
            known = self._tensors[name]
            if not result.skipped:
                known.append(value)
        self._wait += wait
        self._images += num_images
        self._skipped += result.skipped
        self._learning_rate = result.learning_rate

    def leave_out(self, seconds: float) -> None:
        """Takes out of the rates, and of a GPU's memory, what went into no step."""
        self._since += seconds
        if seconds > 0 and self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)

    def means(self, iterations_left: int) -> dict[str, float | None]:
        """Returns the means since the last call, with rates, memory and the seconds left.

        None where every step was skipped, or the mean is not finite: JSON has no such number.
        """
        seconds = time.monotonic() - self._since
        means: dict[str, float | None] = {k: _mean(v) for k, v in self._tensors.items()}
        means |= {
            "learning_rate": self._learning_rate,
            "images_per_s": round(self._images / seconds, 3),
            "step_s": round(seconds / self._steps, 4),
            "data_wait": round(self._wait / seconds, 4),
            "skipped_steps": self._skipped,
            "memory_gib": round(self.keep_peak(), 3),
            "eta_s": round(seconds / self._steps * iterations_left, 1),
        }
        self._clear()
        self.last = means
        return dict(means)

    def keep_peak(self) -> float:
        """Returns the most memory used so far: of the GPU by steps, or of this process on a CPU."""
        if self._device.type == "cuda":
            now = torch.cuda.max_memory_allocated(self._device) / 2**30
        else:
            now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        self._most_gib = max(self._most_gib, now)
        return self._most_gib

    def note(self) -> str:
        """Returns the last means as the line behind the progress."""
        last = {name: value for name, value in self.last.items() if value is not None}
        parts = [f"loss {last['total']:.2f}" if "total" in last else "loss -"]
        kd = sum(value for name, value in last.items() if name == "skd" or name.startswith("rkd_"))
        if "kd_margin" in last:
            parts.append(f"kd {kd:.2f}")
            parts.append(f"margin {last['kd_margin']:.2f}")
            parts.append(f"{last['kd_regions_per_image']:.1f} regions")
        parts.append(f"lr {last['learning_rate']:.1e}")
        parts.append(f"{last['images_per_s']:.1f} img/s")
        parts.append(f"{100 * last['data_wait']:.0f}% wait")
        parts.append(f"{last['memory_gib']:.1f} GiB")
        if last["skipped_steps"]:
            parts.append(f"{last['skipped_steps']:.0f} skipped")
        return ", ".join(parts)

    def _clear(self) -> None:
        self._tensors: dict[str, list[Tensor]] = defaultdict(list)
        self._steps = self._images = self._skipped = 0
        self._wait = self._learning_rate = 0.0
        self._since = time.monotonic()


def _mean(values: list[Tensor]) -> float | None:
    mean = torch.stack(values).mean().item() if values else math.nan
    return round(mean, 6) if math.isfinite(mean) else None
