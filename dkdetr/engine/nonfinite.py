"""Why a step's loss is not finite: which images, which first tensor; said, and written down."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dkdetr.atomic_file import write_text
from dkdetr.data.device_views import on_device
from dkdetr.structures import LoadedBatch, StudentOutput, TrainingBatch
from dkdetr.student.sync_norm import own_statistics


@dataclass(frozen=True)
class Diagnosis:
    """The images of the broken micro-batch (of all, if only a gradient broke), and what broke."""

    image_ids: tuple[int, ...]
    bad_parts: tuple[str, ...]
    first_bad_tensor: str
    began_here: bool
    """True if a weight, an input or an output is broken without anything of other ranks."""
    parts: Mapping[str, float | str]
    out_of_memory: bool = False
    """True if the device had no room for the look: where it began is then not known."""

    def sentence(self) -> str:
        """Returns the diagnosis in words."""
        return (
            f"the loss or its gradient is not finite (parts: {', '.join(self.bad_parts) or 'none'};"
            f" first bad tensor: {self.first_bad_tensor}; images {list(self.image_ids)}); the "
            "weights were left as they were. Look at these images, or lower optim.lr"
        )


def diagnose(
    student: nn.Module,
    forward: Callable[[TrainingBatch], StudentOutput],
    group: Sequence[LoadedBatch],
    parts: Sequence[Mapping[str, Tensor]],
    *,
    device: torch.device,
) -> Diagnosis:
    """Returns what broke a step; looks in the order in which values are made.

    Norms over ranks go by the pictures at hand: of the joined statistics nobody could say whose
    pictures broke them.

    Args:
        student: in evaluation mode where there are other ranks; with the gradients of the step.
        forward: runs the student; done again for the micro-batches in question.
        group: the micro-batches of the step, as they were loaded.
        parts: the loss parts of each.
        device: the student's.
    """
    bad = [number for number, each in enumerate(parts) if _bad_names(each)]
    suspects = bad or range(len(group))
    bad_parts = dict.fromkeys(name for number in bad for name in _bad_names(parts[number]))
    weights = {f"weight {name}": value for name, value in student.named_parameters()}
    first = next(iter(_bad_names(weights)), None)
    out_of_memory = False
    if first is None:
        batches = [group[number] for number in suspects]
        first, out_of_memory = _first_bad_among(student, forward, batches, device)
    gradients = {
        f"gradient of {name}": value.grad
        for name, value in student.named_parameters()
        if value.grad is not None
    }
    if first is not None:
        named = first
    elif out_of_memory and bad:  # gradients are broken by then, and by what is not known
        named = "not found, the device is out of memory"
    else:
        named = next(iter(_bad_names(gradients)), "none")
    image_ids = [i for number in suspects for i in group[number].images.image_ids]
    shown = parts[bad[0]] if bad else parts[0]
    return Diagnosis(
        image_ids=tuple(image_ids),
        bad_parts=tuple(bad_parts),
        first_bad_tensor=named,
        began_here=first is not None,
        # JSON has no NaN: what is not finite is written as a word.
        parts={
            name: value.item() if value.isfinite() else str(value.item())
            for name, value in shown.items()
        },
        out_of_memory=out_of_memory,
    )


def write_dump(folder: Path, diagnosis: Diagnosis, place: Mapping[str, Any]) -> Path:
    """Writes the diagnosis of a step as JSON and returns the file."""
    path = folder / f"step_{place['iteration']:08d}_rank{place['rank']}.json"
    write_text(path, json.dumps({**place, **asdict(diagnosis)}, indent=2) + "\n")
    return path


def _bad_names(tensors: Mapping[str, Tensor]) -> list[str]:
    return [name for name, value in tensors.items() if not value.isfinite().all()]


def _first_bad_among(
    student: nn.Module,
    forward: Callable[[TrainingBatch], StudentOutput],
    batches: Sequence[LoadedBatch],
    device: torch.device,
) -> tuple[str | None, bool]:
    """Returns the first bad tensor of some micro-batches; if none, whether memory ended a look."""
    out_of_memory = False
    for batch in batches:
        try:
            first = _first_bad_of(student, forward, on_device(batch, device))
        except torch.OutOfMemoryError:  # what broke the step is the news, not the look for it
            out_of_memory = True
            continue
        if first is not None:
            return first, False
    return None, out_of_memory


def _first_bad_of(
    student: nn.Module, forward: Callable[[TrainingBatch], StudentOutput], batch: TrainingBatch
) -> str | None:
    """Returns the first bad tensor of a micro-batch: an input, or the first module's output."""
    inputs = {"image": batch.images.pixels}
    inputs |= {"target boxes": torch.cat([t.boxes_cxcywh for t in batch.targets])}
    if batch.regions is not None:
        inputs |= {
            "region boxes": batch.regions.boxes_cxcywh,
            "teacher embeddings": batch.regions.embeddings,
        }
    found = _bad_names(inputs)
    if found:
        return found[0]
    # A compiled student would not see who watches.
    with (
        torch.compiler.set_stance("force_eager"),
        own_statistics(student),
        _watched(student) as broken,
        torch.no_grad(),
    ):
        forward(batch)
    return broken[0] if broken else None


@contextmanager
def _watched(student: nn.Module) -> Iterator[list[str]]:
    """Yields a list that fills with the names of modules whose output is not finite, in order."""
    broken: list[str] = []

    def look(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not output.isfinite().all():
                broken.append(f"output of {name}")

        return hook

    handles = [
        module.register_forward_hook(look(name)) for name, module in student.named_modules() if name
    ]
    try:
        yield broken
    finally:
        for handle in handles:
            handle.remove()
