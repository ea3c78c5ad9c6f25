"""Where the shipped weights lie, how they are written, and how the teacher is named."""

from importlib.resources import files
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

TEACHER_NAME = "pictograms_clip"


def assets_folder() -> Path:
    """Returns the folder of what ships with the package."""
    return Path(str(files("pipeline.pictograms"))) / "assets"


def merges_path(folder: Path) -> Path:
    """Returns the tokenizer's merges in a folder; the configuration names the file relatively."""
    return folder / f"{TEACHER_NAME}_merges.txt.gz"


def config_path(folder: Path) -> Path:
    """Returns open_clip's model configuration in a folder."""
    return folder / f"{TEACHER_NAME}.json"


def weights_path(folder: Path) -> Path:
    """Returns the weights in a folder."""
    return folder / f"{TEACHER_NAME}.safetensors"


def teacher_spec() -> str:
    """Returns the shipped teacher as `--teacher` takes it: MODEL:/path/to/weights."""
    return f"{TEACHER_NAME}:{weights_path(assets_folder())}"


def backbone_weights_path() -> Path:
    """Returns where `slim_resnet(weights="pictograms")` reads."""
    return Path(str(files("dkdetr.student"))) / "slim_resnet_pictograms.safetensors"


def save_half(state: dict[str, Tensor], path: Path) -> None:
    """Writes tensors as safetensors, floats in half precision."""
    halved = {
        key: (value.half() if value.is_floating_point() else value).contiguous()
        for key, value in state.items()
    }
    save_file(halved, path)
    path.chmod(0o644)  # safetensors makes it readable for its owner only
