"""What the benchmarks of whole detectors share: sizes as options, our student, its peer."""

import argparse
import gc
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor, nn

from dkdetr.config import ExperimentConfig
from dkdetr.experiment_file import load_experiment
from dkdetr.structures import ImageBatch, TrainingBatch
from dkdetr.student.attention_backend import picks_triton, use_backend
from dkdetr.student.build import build_student
from dkdetr.student.detector import DKDETR
from tests.benchmarks.machine import describe
from tests.benchmarks.made_up import TEXT_DIM

PEER, PEER_WANTS = "transformers", ("transformers", "timm")
"""The peer's name, and what it wants to import."""
_BY_OPTIONS = {
    "optim.precision": "--precision",
    "data.image_size": "--size",
    "student.num_queries": "--queries",
    "student.num_encoder_layers": "--layers",
    "student.num_decoder_layers": "--layers",
}


def size_options(parser: argparse.ArgumentParser) -> None:
    """Adds what both benchmarks may be told: the paper's sizes on a GPU, small ones on a CPU."""
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--size", type=int, default=1024 if on_gpu else 192)
    parser.add_argument("--classes", type=int, default=1203 if on_gpu else 80)
    parser.add_argument("--queries", type=int, default=300 if on_gpu else 100)
    parser.add_argument("--layers", type=int, default=6 if on_gpu else 3)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--set", action="append", default=[], help="of our settings")


def size_choices(
    parser: argparse.ArgumentParser, instead: Mapping[str, str] = MappingProxyType({})
) -> argparse.Namespace:
    """Returns the options; ends where a setting would change nothing, or ours and not the peer."""
    options = parser.parse_args()
    refuse_idle(parser, options.set, {**_BY_OPTIONS, **instead})
    return options


def refuse_idle(
    parser: argparse.ArgumentParser, settings: Sequence[str], instead: Mapping[str, str]
) -> None:
    """Ends where one of `settings` (`a.b=c`) is in a table of those that do nothing, or no good.

    Args:
        parser: says it.
        settings: as `--set` takes them.
        instead: by name, or by its beginning up to a dot, the option that does it, or why none.
    """
    for setting in settings:
        name = setting.partition("=")[0].strip()
        for idle in (name, name.partition(".")[0]):
            if idle in instead:
                parser.error(f"--set {name} is not for this benchmark: {instead[idle]}")


def begin(options: argparse.Namespace) -> torch.device:
    """Prints what is measured on what; returns the device."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    print(describe("torch", "torchvision", "triton", "transformers"))
    sizes = (f"{options.size} px", f"{options.classes} classes", f"{options.queries} queries")
    how = (f"{options.layers} layers", options.precision, str(device), *options.set)
    print(", ".join((*sizes, *how)))
    return device


def our_student(
    options: argparse.Namespace, more: Sequence[str] = ()
) -> tuple[DKDETR, ExperimentConfig]:
    """Returns the student of these sizes, of random weights on the CPU, and its settings."""
    sizes = {
        "num_queries": options.queries,
        "num_encoder_layers": options.layers,
        "num_decoder_layers": options.layers,
        "backbone.weights": "random",
        "backbone.norm": "batch",
    }
    overrides = [f"student.{name}={value}" for name, value in sizes.items()]
    overrides += [f"optim.precision={options.precision}", *more, *options.set]
    config = load_experiment("lvis_r50_70e", overrides).config
    torch.manual_seed(0)
    return build_student(config, text_dim=TEXT_DIM), config


def take_attention(
    student: DKDETR, config: ExperimentConfig, device: torch.device, dtype: torch.dtype
) -> None:
    """Lets the student take the attention of `ops.backend`, and says which that is here."""
    use_backend(student, config.ops.backend, device)
    settings = config.student
    heads, points = settings.num_heads, settings.num_points
    dims = (heads, settings.embed_dim // heads, student.trunk.neck.num_levels, points)
    triton = picks_triton(config.ops.backend, device, dtype, dims)
    print("attention by", "the Triton kernel" if triton else "plain PyTorch")


def peer_detector(options: argparse.Namespace) -> nn.Module:
    """Returns transformers' Deformable DETR: two-stage, box refinement, ResNet-50."""
    from tests.peer_detector import two_stage_deformable_detr

    torch.manual_seed(0)
    return two_stage_deformable_detr(
        encoder_layers=options.layers,
        decoder_layers=options.layers,
        two_stage_num_proposals=options.queries,
        num_labels=options.classes,
    )


def peer_inputs(images: ImageBatch, device: torch.device) -> dict[str, Tensor]:
    """Returns the pictures as transformers takes them, copied to the device as ours are."""
    moved = images.to(device)
    return {"pixel_values": moved.pixels, "pixel_mask": (~moved.padding_mask).long()}


def as_loaded(batch: TrainingBatch, device: torch.device) -> TrainingBatch:
    """Returns the batch as a loader hands it over: for a GPU in page-locked memory."""
    return batch.pin_memory() if device.type == "cuda" else batch


def reset_peak(device: torch.device) -> None:
    """Frees what is left of the one before, and counts memory anew."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_gib(device: torch.device) -> str:
    """Returns the most memory since `reset_peak`, on a GPU."""
    if device.type != "cuda":
        return "-"
    return f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f}"
