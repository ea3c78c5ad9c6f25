"""What a benchmark's figures were measured on: the line that stands above every table."""

import platform
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from dkdetr.cores import cores_at_hand


def describe(*packages: str) -> str:
    """Returns the machine, the versions of these packages, and the date."""
    cores = cores_at_hand()
    found = [f"{name} {_version(name)}" for name in packages]
    python = ".".join(str(part) for part in sys.version_info[:3])
    date = datetime.now(UTC).date().isoformat()
    return f"{cores} cores of {_processor()}{_gpu()}; Python {python}, {', '.join(found)}; {date}"


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _gpu() -> str:
    try:
        import torch
    except ModuleNotFoundError:
        return ""
    if not torch.cuda.is_available():
        return ", no GPU"
    return f", {torch.cuda.get_device_name()}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"
