"""Convolutional trunks: torchvision's ResNet-50 and a slim ResNet for small pictures.

Both give the feature maps of the stages asked for, C2 (stride 4) to C5 (stride 32).
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, Literal

import torch
import torchvision
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models.resnet import ResNet
from torchvision.ops import FrozenBatchNorm2d

from dkdetr.errors import CorruptArtefactError, DataError, UsageError
from dkdetr.offline import is_offline
from dkdetr.student.conv_norm import FoldingBasicBlock, FoldingBottleneck, Stem
from dkdetr.student.sync_norm import SyncBatchNorm2d

Norm = Literal["sync_batch", "batch", "frozen"]
_SLIM_BLOCKS = {2: 1, 3: 2, 4: 2, 5: 2}


class Backbone(nn.Module):
    """A stem and stages C2..C5, of which some are handed on.

    Attributes:
        num_channels: channels of each map handed on, finest first.
    """

    def __init__(
        self, stem: nn.Module, stages: Sequence[nn.Module], channels: Sequence[int],
        *, used_stages: Sequence[int], frozen_stages: int,
    ) -> None:  # fmt: skip
        super().__init__()
        if not used_stages or sorted(set(used_stages)) != list(used_stages):
            raise UsageError(f"backbone.stages must rise, got {list(used_stages)}")
        if used_stages[0] < 2 or used_stages[-1] > 5:
            raise UsageError(f"backbone.stages lie in 2..5, got {list(used_stages)}")
        self.stem = stem
        self.stages = nn.ModuleList(stages[: used_stages[-1] - 1])  # later ones would idle
        self._used_stages = tuple(used_stages)
        self.num_channels = tuple(channels[stage - 2] for stage in used_stages)
        self._frozen = (self.stem, *self.stages)[: frozen_stages + 1] if frozen_stages else ()
        for part in self._frozen:
            part.requires_grad_(requires_grad=False)

    def train(self, mode: bool = True) -> "Backbone":
        """Sets the mode; frozen stages stay in evaluation mode, their statistics unmoved."""
        super().train(mode)
        for part in self._frozen:
            part.eval()
        return self

    def forward(
        self, pixels: Float[Tensor, "batch 3 height width"]
    ) -> list[Float[Tensor, "batch channels h w"]]:
        """Returns the maps of the used stages, finest first."""
        maps: list[Tensor] = []
        # Tensor cores read channels side by side; the weights follow, whatever their own layout.
        layout = torch.channels_last if pixels.is_cuda else torch.contiguous_format
        x = self.stem(pixels.contiguous(memory_format=layout))
        for number, stage in enumerate(self.stages, start=2):
            x = stage(x)
            if number in self._used_stages:
                maps.append(x)
        return maps


def resnet50(
    *, weights: str, norm: Norm, frozen_stages: int, used_stages: Sequence[int]
) -> Backbone:
    """Returns torchvision's ResNet-50 (stride on the 3x3), from `weights`.

    Args:
        weights: `imagenet` (torchvision IMAGENET1K_V1, downloaded or from torch's cache),
            `random`, or a .pth / .safetensors file with torchvision's or timm's key names.
        norm: trainable batch norm, over ranks or not, or frozen statistics.
        frozen_stages: 0 none, 1 the stem and C2, ...
        used_stages: C-numbers handed on.
    """
    _refuse_word(weights, "pictograms", arch="resnet50", known="imagenet")
    trunk = ResNet(FoldingBottleneck, [3, 4, 6, 3], norm_layer=_norm_layer(norm))
    if weights != "random":
        state = _imagenet_weights() if weights == "imagenet" else _read_weights(Path(weights))
        _load_trunk(trunk, state, source=weights)
    stem = Stem(trunk.conv1, trunk.bn1, trunk.relu, trunk.maxpool)
    stages = [trunk.layer1, trunk.layer2, trunk.layer3, trunk.layer4]
    return Backbone(
        stem,
        stages,
        [256, 512, 1024, 2048],
        used_stages=used_stages,
        frozen_stages=frozen_stages,
    )


def slim_resnet(
    *, weights: str, norm: Norm, frozen_stages: int, used_stages: Sequence[int], width: int
) -> Backbone:
    """Returns a small ResNet of basic blocks: stem stride 2, then C2..C5 of w, 2w, 4w, 4w channels.

    Args:
        weights: `pictograms` (shipped, width 32), `random`, or a .safetensors or .pth file.
        norm: see `resnet50`.
        frozen_stages: see `resnet50`.
        used_stages: C-numbers handed on.
        width: channels of C2.
    """
    _refuse_word(weights, "imagenet", arch="slim_resnet", known="pictograms")
    norm_layer = _norm_layer(norm)
    channels = [width, 2 * width, 4 * width, 4 * width]
    stem = Stem(
        nn.Conv2d(3, width, 3, stride=2, padding=1, bias=False), norm_layer(width), nn.ReLU()
    )
    stages: list[nn.Module] = []
    num_in = width
    for number, num_out in enumerate(channels, start=2):
        blocks: list[nn.Module] = []
        for index in range(_SLIM_BLOCKS[number]):
            stride = 2 if index == 0 else 1
            shortcut = None
            if stride != 1 or num_in != num_out:
                shortcut = nn.Sequential(
                    nn.Conv2d(num_in, num_out, 1, stride=stride, bias=False), norm_layer(num_out)
                )
            blocks.append(
                FoldingBasicBlock(
                    num_in, num_out, stride, downsample=shortcut, norm_layer=norm_layer
                )
            )
            num_in = num_out
        stages.append(nn.Sequential(*blocks))
    backbone = Backbone(
        stem, stages, channels, used_stages=used_stages, frozen_stages=frozen_stages
    )
    _initialise_convolutions(backbone)
    if weights != "random":
        state = _shipped_pictogram_weights() if weights == "pictograms" else None
        _load_slim(backbone, state or _read_weights(Path(weights)), source=weights)
    return backbone


def _refuse_word(weights: str, word: str, *, arch: str, known: str) -> None:
    """Raises UsageError for weights that are the other trunk's."""
    if weights == word:
        raise UsageError(
            f"student.backbone.arch = {arch} has no weights = {word}: set "
            f"student.backbone.weights={known}, random or a file, or another student.backbone.arch"
        )


def _norm_layer(norm: Norm) -> Callable[[int], nn.Module]:
    layers: dict[Norm, Callable[[int], nn.Module]] = {
        "sync_batch": SyncBatchNorm2d,
        "batch": nn.BatchNorm2d,
        "frozen": FrozenBatchNorm2d,
    }
    return layers[norm]


def _initialise_convolutions(module: nn.Module) -> None:
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")


def fetch_imagenet_weights() -> Path:
    """Returns the file of torchvision's ResNet-50 weights, downloaded if it is not there.

    Raises:
        DataError: it can be neither found nor reached.
        CorruptArtefactError: the download has another hash than its name says.
    """
    _imagenet_weights()
    return imagenet_folder() / _imagenet_name()


def imagenet_folder() -> Path:
    """Returns where torch keeps what it downloads."""
    return Path(torch.hub.get_dir()) / "checkpoints"


def _imagenet_name() -> str:
    return torchvision.models.ResNet50_Weights.IMAGENET1K_V1.url.rsplit("/", 1)[-1]


def _imagenet_weights() -> dict[str, Tensor]:
    weights = torchvision.models.ResNet50_Weights.IMAGENET1K_V1
    name, folder = _imagenet_name(), imagenet_folder()
    try:
        if not (folder / name).is_file():
            if is_offline():
                raise OSError("offline")  # noqa: TRY301  the same answer as to a broken line
            told = f"fetching torchvision's ImageNet weights of ResNet-50 from {weights.url}, once"
            print(told, file=sys.stderr, flush=True)
        return dict(weights.get_state_dict(progress=False, check_hash=True))
    except OSError as error:
        raise DataError(
            f"torchvision's ImageNet weights of ResNet-50 cannot be reached ({error}). Put {name} "
            f"into {folder} (from a machine with a network: dkdetr fetch --bundle b.tar, here: "
            "dkdetr fetch --from-bundle b.tar), or name a file: --set "
            f"student.backbone.weights=/path/{name}; for a trial without them: --set "
            "student.backbone.weights=random"
        ) from None
    except Exception as error:
        raise CorruptArtefactError(
            f"torchvision's download of ResNet-50 is broken: {error}; next: delete "
            f"'{folder / name}' if it is there, and the same command fetches it anew"
        ) from error


def _read_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise DataError(
            f"no backbone weights at '{path}': student.backbone.weights is a file, random, "
            "imagenet (of resnet50) or pictograms (of slim_resnet)"
        )
    try:
        if path.suffix == ".safetensors":
            loaded: dict[str, Any] = load_file(path)
        else:
            # Foreign tensors, never code: weights_only refuses anything but plain types.
            loaded = torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251
    except Exception as error:
        raise CorruptArtefactError(f"'{path}' does not hold backbone weights: {error}") from error
    state: dict[str, Any] = loaded.get("state_dict", loaded)
    return {
        key.removeprefix("backbone."): value
        for key, value in state.items()
        if isinstance(value, Tensor)
    }


def _shipped_pictogram_weights() -> dict[str, Tensor]:
    resource = files("dkdetr.student") / "slim_resnet_pictograms.safetensors"
    with as_file(resource) as path:
        return load_file(path)


def _load_trunk(trunk: nn.Module, state: dict[str, Tensor], *, source: str) -> None:
    wanted = {key for key in trunk.state_dict() if not key.startswith("fc.")}
    usable = {key: value for key, value in state.items() if key in wanted}
    missing = sorted(key for key in wanted - usable.keys() if "num_batches_tracked" not in key)
    if missing:
        raise CorruptArtefactError(
            f"'{source}' is no ResNet-50: {len(missing)} tensors missing, first {missing[:3]}"
        )
    _refuse_other_shapes(trunk, usable, f"'{source}' is no ResNet-50")
    trunk.load_state_dict(usable, strict=False)


def _refuse_other_shapes(module: nn.Module, state: Mapping[str, Tensor], verdict: str) -> None:
    own = module.state_dict()
    wrong = sorted(key for key, value in state.items() if value.shape != own[key].shape)
    if wrong:
        raise CorruptArtefactError(
            f"{verdict}: {len(wrong)} tensors of other shapes, first {wrong[:3]}"
        )


def _load_slim(backbone: Backbone, state: dict[str, Tensor], *, source: str) -> None:
    usable = {key: value.float() for key, value in state.items() if key in backbone.state_dict()}
    own = backbone.state_dict()
    first = next(key for key, value in own.items() if value.ndim == 4)  # the stem's convolution
    width = len(own[first])
    if first in usable and usable[first].ndim == 4 and len(usable[first]) != width:
        raise UsageError(
            f"student.backbone.weights = {source} are of width {len(usable[first])}, and "
            f"student.backbone.width = {width}: set that width, or student.backbone.weights=random"
        )
    _refuse_other_shapes(backbone, usable, f"'{source}' is no slim ResNet")
    missing, _ = backbone.load_state_dict(usable, strict=False)
    missing = [key for key in missing if "num_batches_tracked" not in key]
    if missing:
        raise CorruptArtefactError(
            f"'{source}' is no slim ResNet: {len(missing)} tensors missing, first {missing[:3]}"
        )
