"""The frozen teacher: crops and words in, unit vectors out.

`pipeline.teacher` loads it; nothing here knows where its weights come from.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from dkdetr.resampling import Interpolation
from pipeline.crops import CropRule, combine_crops, crop_windows
from pipeline.fused_tower import FromCrops, FusedTower
from pipeline.resampling import cut_pictures, cut_windows, resampling_on
from pipeline.teacher_source import TeacherSource
from pipeline.window_fit import Look, Placement

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
Encoder = Literal["open_clip", "fused", "compiled"]
"""Whose code computes the image tower: open_clip's, ours, or ours through torch.compile."""
_ENCODERS = {"fused": "fused ViT", "compiled": "fused ViT, torch.compile"}
_TEXT_BATCH = 256
_TOKENIZER_PROBE = "A photo of the RED umbrella's handle, 2 o'clock!"


@dataclass(frozen=True)
class Preprocessing:
    """What becomes of a crop's pixels: size, then (x / 255 - mean) / std.

    `placement` is how the model's own preprocessing fits a picture into its input: the crop mode
    `native`.
    """

    size_hw: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Interpolation
    placement: Placement = "clip_center"

    @property
    def fill(self) -> tuple[int, int, int]:
        """The mean colour in grey levels: what padding shows, near 0 for the network."""
        red, green, blue = (round(255 * value) for value in self.mean)
        return red, green, blue


class Teacher:
    """A frozen CLIP; implements `TextEncoder` and `RegionEncoder` of dkdetr.encoders.

    Attributes:
        spec: what the user typed.
        random: True if its weights are random, for trials only.
        weights_file: what its weights were read from; None if they are random.
        embed_dim: length of its vectors.
        preprocessing: as frozen.
        activation: `quick_gelu` or `gelu`.
        note: what a user should know about the choice of activation, or an empty string.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenize: Any,
        preprocessing: Preprocessing,
        source: TeacherSource,
        config: Mapping[str, Any],
        *,
        device: torch.device,
        precision: Literal["fp32", "fp16", "bf16"],
        encoder: Encoder = "open_clip",
        note: str = "",
    ) -> None:
        self.spec = source.spec
        self.model_name = source.model
        self.random = source.kind == "random"
        self.weights_file = source.path
        self.embed_dim = int(config["embed_dim"])
        self.preprocessing = preprocessing
        self.activation = "quick_gelu" if config.get("quick_gelu") else "gelu"
        self.device = device
        self.precision: Literal["fp32", "fp16", "bf16"] = precision
        self.note = note
        self._model = model.eval().requires_grad_(requires_grad=False)
        self._tokenize = tokenize
        self._architecture = json.loads(json.dumps(config))
        self._weights_sha256 = tensors_sha256(model)
        # Channels last: a third faster for convolutional towers, no matter for the others.
        self._model.to(device).to(memory_format=torch.channels_last)
        mean = torch.tensor(preprocessing.mean, device=device).view(1, 3, 1, 1)
        std = torch.tensor(preprocessing.std, device=device).view(1, 3, 1, 1)
        # (x / 255 - mean) / std as one multiplication and one subtraction.
        self._scale, self._shift = 1 / (255 * std), mean / std
        self.encoder: Encoder = encoder
        self._tower: Any = None
        if encoder != "open_clip":
            tower = FusedTower(cast("Any", model).visual, _DTYPES[precision])
            self._tower = FromCrops(tower, self._scale, self._shift)
        self._region_batch = usual_batch(device)
        if encoder == "compiled":
            # One program a batch size, none of any size, which would be slower: so regions, the
            # canary's with them, come in whole batches (`_region_features`).
            self._tower = torch.compile(self._tower, dynamic=False)

    @property
    def identity(self) -> str:
        """Names the model and its weights; equal identities give equal embeddings."""
        mark = " (random weights)" if self.random else ""
        return f"{self.model_name}/{self.activation}/sha256:{self._weights_sha256[:16]}{mark}"

    def parts(self) -> dict[str, Any]:
        """Returns all that decides an embedding, as the cache's fingerprint records it."""
        size = self.preprocessing.size_hw
        how = {} if self.encoder == "open_clip" else {"encoder": _ENCODERS[self.encoder]}
        return how | {
            "model": self.model_name,
            "architecture": self._architecture,
            "activation": self.activation,
            "weights_sha256": self._weights_sha256,
            "random": self.random,
            "embed_dim": self.embed_dim,
            "precision": self.precision,
            "image_size_hw": list(size),
            "mean": list(self.preprocessing.mean),
            "std": list(self.preprocessing.std),
            "interpolation": self.preprocessing.interpolation,
            "resampling": resampling_on(self.device),
        }

    def text_parts(self) -> dict[str, Any]:
        """Returns what else decides a text embedding: the tokenizer, by its name and its doing."""
        tokens = self._tokenize([_TOKENIZER_PROBE])
        return {
            "tokenizer": type(self._tokenize).__name__,
            "context_length": tokens.shape[1],
            "probe_tokens": [int(token) for token in tokens[0]],
        }

    def resolve(self, rule: CropRule) -> CropRule:
        """Returns the rule with `native` replaced by what this teacher means by it."""
        if rule.mode != "native":
            return rule
        return replace(rule, mode=self.preprocessing.placement)

    def encode_crops(
        self, crops: UInt8[Tensor, "batch 3 height width"]
    ) -> Float[np.ndarray, "batch embed_dim"]:
        """Returns float32 unit vectors of crops that already have the teacher's size."""
        return _unit_rows(torch.from_numpy(self.crop_features(crops)))

    def crop_features(
        self, crops: UInt8[Tensor, "batch 3 height width"]
    ) -> Float[np.ndarray, "batch embed_dim"]:
        """Returns float32 vectors of crops as the teacher gives them, of any length."""
        return self.features_on_device(crops).cpu().numpy()

    @torch.inference_mode()
    def features_on_device(
        self, crops: UInt8[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch embed_dim"]:
        """Returns the same on the teacher's device; a GPU may still be at it."""
        if self._tower is not None:
            return self._tower(crops.to(self.device)).float()
        pixels = crops.to(self.device, memory_format=torch.channels_last).float()
        pixels = pixels * self._scale - self._shift
        with self._autocast():
            features = cast("Tensor", self._model.encode_image(pixels))  # pyright: ignore[reportCallIssue]
        return features.float()

    def encode_regions(
        self,
        image: np.ndarray,
        boxes_xyxy: Float[np.ndarray, "num_boxes 4"],
        rule: CropRule | None = None,
    ) -> Float[np.ndarray, "num_boxes embed_dim"]:
        """Returns float32 unit vectors of the boxes (pixels) of an RGB uint8 picture (h, w, 3)."""
        rule = self.resolve(rule or CropRule())
        height, width = image.shape[:2]
        windows = crop_windows(boxes_xyxy, rule, height=height, width=width)
        pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)
        crops = self.cut(pixels.to(self.device), windows.reshape(-1, 4), rule)
        crops = crops.unflatten(0, windows.shape[:2])
        if rule.views == "avg":
            crops = torch.cat((crops, crops.flip(-1)), dim=1)
        per_box = crops.shape[1]
        parts = [part for part in crops.flatten(0, 1).split(self._region_batch) if len(part)]
        if not parts:
            return np.zeros((0, self.embed_dim), dtype=np.float32)
        rows = np.concatenate([self._region_features(part) for part in parts])
        return combine_crops(rows.reshape(-1, per_box, self.embed_dim), rule.combine)

    def _region_features(
        self, crops: UInt8[Tensor, "batch 3 height width"]
    ) -> Float[np.ndarray, "batch embed_dim"]:
        """Returns the crops' features; a compiled tower is given whole batches alone."""
        missing = self._region_batch - len(crops)
        if self.encoder != "compiled" or not missing:
            return self.crop_features(crops)
        padding = crops.new_zeros((missing, *crops.shape[1:]))
        return self.crop_features(torch.cat((crops, padding)))[: len(crops)]

    def cut(
        self, pixels: UInt8[Tensor, "3 height width"], windows: np.ndarray, rule: CropRule
    ) -> UInt8[Tensor, "num_windows 3 crop_height crop_width"]:
        """Returns the windows of a picture as this teacher wants to see them, on its device."""
        return cut_windows(pixels, windows, self._look(rule))

    def cut_pictures(
        self,
        pictures: Sequence[UInt8[Tensor, "3 _h _w"]],
        windows: Sequence[np.ndarray],
        rule: CropRule,
    ) -> Iterator[UInt8[Tensor, "_ 3 crop_height crop_width"]]:
        """Yields the windows of each picture, as `cut`; a GPU cuts those of several at once."""
        return cut_pictures(pictures, windows, self._look(rule))

    def _look(self, rule: CropRule) -> Look:
        how = self.preprocessing
        return Look(how.size_hw, rule.placement, how.interpolation, how.fill)

    @torch.inference_mode()
    def encode_texts(self, texts: Sequence[str]) -> Float[np.ndarray, "num_texts embed_dim"]:
        """Returns float32 vectors of unit norm, one a text."""
        rows: list[np.ndarray] = []
        for start in range(0, len(texts), _TEXT_BATCH):
            tokens = self._tokenize(list(texts[start : start + _TEXT_BATCH])).to(self.device)
            with self._autocast():
                features = cast("Tensor", self._model.encode_text(tokens))  # pyright: ignore[reportCallIssue]
            rows.append(_unit_rows(features))
        return np.concatenate(rows) if rows else np.zeros((0, self.embed_dim), dtype=np.float32)

    def _autocast(self) -> torch.autocast:
        enabled = self.precision != "fp32"
        dtype = _DTYPES[self.precision] if enabled else torch.bfloat16
        return torch.autocast(self.device.type, dtype=dtype, enabled=enabled)


def usual_batch(device: torch.device) -> int:
    """Returns how many crops a device encodes at once where nobody says otherwise."""
    return 256 if device.type == "cuda" else 64


def tensors_sha256(model: nn.Module) -> str:
    """Returns a hash of every parameter and buffer: names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _unit_rows(features: Tensor) -> Float[np.ndarray, "n embed_dim"]:
    return nn.functional.normalize(features.float(), dim=-1).cpu().numpy()
