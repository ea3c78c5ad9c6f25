"""`dkdetr doctor`: does this machine fit this installation? Looks only; needs no network."""

import os
import platform
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from dkdetr.installation import nvidia_driver, package_version

Verdict = Literal["ok", "warning", "problem"]

_GIB = 1 << 30
_LEAST_RUNS_GIB = 20
_LEAST_CACHE_GIB = 35
"""LVIS's 31 GB, and the 6 GB that neighbour lists want while they are built."""
_LEAST_SHARED_GIB = 1
_RESNET = "resnet50-0676ba61.pth"
_WEIGHTS = (".safetensors", ".bin")
_TEACHER = "models--timm--vit_base_patch32_clip_224.openai"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; `advice` says what to do where it is not ok."""

    subject: str
    verdict: Verdict
    found: str
    advice: str = ""


@dataclass(frozen=True)
class Examination:
    """All findings."""

    findings: tuple[Finding, ...]

    @property
    def healthy(self) -> bool:
        """True if nothing is a problem; warnings are none."""
        return all(each.verdict != "problem" for each in self.findings)

    def lines(self) -> list[str]:
        """Returns a line a finding, its advice below it."""
        shown = []
        for each in self.findings:
            shown.append(f"{each.verdict:8s} {each.subject:14s} {each.found}")
            if each.advice:
                shown.append(f"{'':8s} {'':14s} -> {each.advice}")
        return shown

    def as_json(self) -> dict[str, Any]:
        """Returns the findings as plain tables."""
        return {"healthy": self.healthy, "findings": [asdict(each) for each in self.findings]}


def examine(data_root: Path, runs: Path, cache: Path) -> Examination:
    """Returns what this machine and installation have and lack.

    Args:
        data_root: where data sets should lie.
        runs: where runs go; its disk is looked at.
        cache: where caches go; likewise.
    """
    checks: tuple[Callable[[], Sequence[Finding]], ...] = (
        _versions,
        _gpus,
        lambda: _disks(runs, cache),
        lambda: [_shared_memory()],
        lambda: [_faiss()],
        lambda: [_backbone_weights(), _teacher_weights()],
        lambda: [_data(data_root)],
    )
    return Examination(tuple(finding for check in checks for finding in check()))


def gpu_findings(
    name: str, capability: tuple[int, int], architectures: Sequence[str], cuda: str
) -> list[Finding]:
    """Returns whether a torch build has kernels for a GPU, and what precision fits it.

    Args:
        name: of the GPU.
        capability: its compute capability.
        architectures: `torch.cuda.get_arch_list()`: sm_80 are kernels, compute_80 is PTX, which
            newer GPUs of any generation can translate.
        cuda: the build's CUDA version.
    """
    major, minor = capability
    own = major * 10 + minor
    kernels = [int(each[3:].rstrip("af")) for each in architectures if each.startswith("sm_")]
    ptx = [int(each[8:].rstrip("af")) for each in architectures if each.startswith("compute_")]
    runs = any(each // 10 == major and each <= own for each in kernels)
    translated = any(each <= own for each in ptx)
    built = f"{name}, compute capability {major}.{minor}; torch for CUDA {cuda}"
    if not runs and not translated:
        volta = (
            "PyTorch 2.14.1 built for CUDA 12.6 is the last with kernels for it (docker target "
            "v100)" if major < 8 else "install a newer PyTorch build"
        )  # fmt: skip
        lowest = min(kernels, default=0)
        return [
            Finding("gpu", "problem", f"{built} has no kernels for it (from {lowest} on)", volta)
        ]
    first = Finding("gpu", "ok", built)
    if not runs:
        advice = "the first start of each kernel is slow; a newer PyTorch build has them ready"
        first = Finding("gpu", "warning", f"{built} translates its kernels for it", advice)
    if major >= 8:
        return [
            first,
            Finding("precision", "ok", "bf16 in hardware: precision auto takes it"),
        ]
    return [first, Finding("precision", "ok", "no bf16: precision auto takes fp16 + scaler")]


def _versions() -> list[Finding]:
    import torch

    python, system = platform.python_version(), platform.system()
    findings = [Finding("python", "ok", f"{python} on {system}")]
    if torch.cuda.is_available():
        return [*findings, Finding("torch", "ok", torch.__version__)]
    if torch.version.cuda is None:
        return [*findings, Finding("torch", "ok", f"{torch.__version__}, built for CPUs")]
    if nvidia_driver() is None:
        advice = "no NVIDIA driver is loaded: in a container, start it with --gpus all"
        found = f"{torch.__version__} for CUDA {torch.version.cuda} sees no GPU"
        return [*findings, Finding("torch", "warning", found, advice)]
    advice = "the driver may be older than this CUDA build wants: see nvidia-smi"
    found = f"{torch.__version__} for CUDA {torch.version.cuda} cannot use the GPU of this machine"
    return [*findings, Finding("torch", "problem", found, advice)]


def _gpus() -> list[Finding]:
    import torch

    if not torch.cuda.is_available():
        return [Finding("gpu", "ok", "none: training on the CPU, for trials")]
    driver = nvidia_driver() or "not told by this system"
    findings = [Finding("driver", "ok", driver), compiler_finding()]
    for index in range(torch.cuda.device_count()):
        findings += gpu_findings(
            torch.cuda.get_device_name(index),
            torch.cuda.get_device_capability(index),
            torch.cuda.get_arch_list(),
            torch.version.cuda or "",
        )
    return findings


def compiler_finding() -> Finding:
    """Returns whether there is a C compiler, with which Triton builds what starts its kernels."""
    # As Triton looks for it: what $CC says and nothing else, or these two.
    named = os.environ.get("CC", "").split()
    for name in named[:1] or ("gcc", "clang"):
        if shutil.which(name):
            return Finding("C compiler", "ok", name)
    advice = (
        "without one attention and crops go by plain PyTorch, which is slower, and "
        "compute.compile=inductor fails: install gcc"
    )
    return Finding("C compiler", "warning", f"none: {named[0] if named else 'gcc, clang'}", advice)


def _disks(runs: Path, cache: Path) -> list[Finding]:
    runs, cache = _existing(runs), _existing(cache)
    advice = "two checkpoints of the paper's student are 1.2 GB, and every run keeps two"
    findings = [_disk("disk", runs, "runs", _LEAST_RUNS_GIB, advice)]
    advice = (
        "LVIS's cache is 31 GB, 10 GB with --keep 100, and 6 GB more while neighbour lists are "
        "built; --out names another place"
    )
    if runs.stat().st_dev == cache.stat().st_dev:
        both = _LEAST_RUNS_GIB + _LEAST_CACHE_GIB
        findings.append(_disk("cache disk", cache, "caches beside the runs", both, advice))
    else:
        findings.append(_disk("cache disk", cache, "caches", _LEAST_CACHE_GIB, advice))
    return findings


def _existing(folder: Path) -> Path:
    """Returns the folder, or the nearest above it that is there."""
    return next(each for each in (folder.absolute(), *folder.absolute().parents) if each.exists())


def _disk(subject: str, place: Path, used_for: str, least_gib: float, advice: str) -> Finding:
    free = shutil.disk_usage(place).free / _GIB
    found = f"{free:.1f} GiB free at {place}, for {used_for}"
    if free < least_gib:
        return Finding(subject, "warning", found, advice)
    return Finding(subject, "ok", found)


def _shared_memory(path: Path = Path("/dev/shm")) -> Finding:
    if not path.is_dir():
        return Finding("shared memory", "ok", "this system has no /dev/shm")
    free = shutil.disk_usage(path).free / _GIB
    if free < _LEAST_SHARED_GIB:
        advice = "loader processes hand batches over in it: docker run --shm-size 8g, or workers=0"
        return Finding("shared memory", "warning", f"{free:.2f} GiB free in {path}", advice)
    return Finding("shared memory", "ok", f"{free:.1f} GiB free in {path}")


def _faiss() -> Finding:
    versions = {name: package_version(name) for name in _faiss_packages()}
    installed = [name for name, version in versions.items() if version]
    described = ", ".join(f"{name} {versions[name]}" for name in installed) or "none"
    if len(installed) > 1:
        advice = f"one overwrites the other: pip uninstall {' '.join(installed)}, then take one"
        return Finding("faiss", "problem", described, advice)
    if not installed:
        advice = "neighbour lists want it: pip install 'dkdetr[cpu]'"
        return Finding("faiss", "warning", described, advice)
    return Finding("faiss", "ok", described)


def _faiss_packages() -> tuple[str, ...]:
    return ("faiss-cpu", "faiss-gpu", "faiss-gpu-cu11", "faiss-gpu-cu12")


def _backbone_weights() -> Finding:
    import torch

    path = Path(torch.hub.get_dir()) / "checkpoints" / _RESNET
    if path.is_file():
        return Finding("backbone", "ok", f"ImageNet weights of ResNet-50 at {path}")
    advice = "dkdetr fetch (by --bundle without a network), or --set student.backbone.weights=FILE"
    return Finding("backbone", "warning", f"no ImageNet weights at {path}", advice)


def _teacher_weights() -> Finding:
    home = os.environ.get("HF_HOME", str(Path.home() / ".cache" / "huggingface"))
    hub = Path(os.environ.get("HF_HUB_CACHE", str(Path(home) / "hub")))
    # A download that was cut leaves the folder; its weights are linked there when they are whole.
    found = (hub / _TEACHER / "snapshots").glob("*/*")
    if any(each.suffix in _WEIGHTS and each.is_file() for each in found):
        return Finding("teacher", "ok", f"CLIP ViT-B/32 of OpenAI below {hub}")
    advice = "dkdetr fetch, or --teacher MODEL:/path/to/weights; training never needs it"
    return Finding("teacher", "warning", f"no CLIP ViT-B/32 below {hub}", advice)


def _data(root: Path) -> Finding:
    known = ("coco", "lvis", "objects365", "VOCdevkit", "pictograms")
    there = [name for name in known if (root / name).is_dir()]
    if there:
        return Finding("data", "ok", f"{root}: {', '.join(there)}")
    advice = "give --data-root or DKDETR_DATA; dkdetr data list names the splits"
    return Finding("data", "warning", f"{root} holds no data set", advice)
