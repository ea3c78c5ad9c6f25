"""What is installed here, as records name it: packages, the source's commit, the GPU's driver."""

import importlib.metadata
from pathlib import Path

_PACKAGES = (
    "dkdetr",
    "torch",
    "torchvision",
    "triton",
    "numpy",
    "scipy",
    "pillow",
    "pycocotools",
    "hotcoco",
    "lvis",
    "zarr",
    "numcodecs",
    "safetensors",
    "open_clip_torch",
)
"""Those whose version can change a number."""
_CLONE = Path(__file__).parent.parent
_DRIVER = Path("/proc/driver/nvidia/version")
_HEAD_IS = "ref: "


def package_version(package: str) -> str | None:
    """Returns the version of a package; None: it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def package_versions() -> dict[str, str]:
    """Returns the versions of the installed packages that can change a number."""
    found = {package: package_version(package) for package in _PACKAGES}
    return {package: version for package, version in found.items() if version is not None}


def nvidia_driver() -> str | None:
    """Returns how the NVIDIA driver calls itself; None: there is none, or the system hides it."""
    return _DRIVER.read_text().splitlines()[0] if _DRIVER.is_file() else None


def source_commit(clone: Path = _CLONE) -> str | None:
    """Returns the commit that the clone is at; None: what runs is no clone, or its git is unlike.

    Read from its files, without git. Changes that were not committed are not seen.
    """
    try:
        git = clone / ".git"
        if git.is_file():  # a worktree's, which says where its own folder is
            git = clone / git.read_text(encoding="utf-8").removeprefix("gitdir:").strip()
        head = (git / "HEAD").read_text(encoding="utf-8").strip()
        if not head.startswith(_HEAD_IS):
            return head
        shared = git / "commondir"
        if shared.is_file():  # branches are the whole clone's
            git = git / shared.read_text(encoding="utf-8").strip()
        return _commit_of(git, head.removeprefix(_HEAD_IS))
    except (OSError, UnicodeDecodeError):
        return None


def _commit_of(git: Path, branch: str) -> str | None:
    if (git / branch).is_file():
        return (git / branch).read_text(encoding="utf-8").strip()
    for line in (git / "packed-refs").read_text(encoding="utf-8").splitlines():
        commit, _, name = line.partition(" ")
        if name == branch:
            return commit
    return None
