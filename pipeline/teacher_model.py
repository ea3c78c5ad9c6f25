"""The frozen teacher: crops and words in, unit vectors out.

`pipeline.teacher` loads it; nothing here knows where its weights come from.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from pipeline.crops import CropRule, Interpolation, combine_scales, crop_windows, cut_crops
from pipeline.teacher_source import TeacherSource

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_TEXT_BATCH = 256


@dataclass(frozen=True)
class Preprocessing:
    """What becomes of a crop's pixels: size, then (x / 255 - mean) / std."""

    size_hw: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Interpolation


class Teacher:
    """A frozen CLIP; implements `TextEncoder` and `RegionEncoder` of dkdetr.structures.

    Attributes:
        spec: what the user typed.
        random: True if its weights are random, for trials only.
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
        note: str = "",
    ) -> None:
        self.spec = source.spec
        self.model_name = source.model
        self.random = source.kind == "random"
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

    @property
    def identity(self) -> str:
        """Names the model and its weights; equal identities give equal embeddings."""
        mark = " (random weights)" if self.random else ""
        return f"{self.model_name}/{self.activation}/sha256:{self._weights_sha256[:16]}{mark}"

    def parts(self) -> dict[str, Any]:
        """Returns all that decides an embedding, as the cache's fingerprint records it."""
        size = self.preprocessing.size_hw
        return {
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
        }

    def text_parts(self) -> dict[str, Any]:
        """Returns what else decides a text embedding."""
        return {"tokenizer": type(self._tokenize).__name__}

    @torch.inference_mode()
    def encode_crops(
        self, crops: UInt8[Tensor, "batch 3 height width"]
    ) -> Float[np.ndarray, "batch embed_dim"]:
        """Returns float32 unit vectors of crops that already have the teacher's size."""
        pixels = crops.to(self.device, memory_format=torch.channels_last).float()
        pixels = pixels * self._scale - self._shift
        with self._autocast():
            features = cast("Tensor", self._model.encode_image(pixels))  # pyright: ignore[reportCallIssue]
        return _unit_rows(features)

    def encode_regions(
        self,
        image: np.ndarray,
        boxes_xyxy: Float[np.ndarray, "num_boxes 4"],
        rule: CropRule | None = None,
    ) -> Float[np.ndarray, "num_boxes embed_dim"]:
        """Returns float32 unit vectors of the boxes (pixels) of an RGB uint8 picture (h, w, 3)."""
        rule = rule or CropRule()
        height, width = image.shape[:2]
        windows = crop_windows(boxes_xyxy, rule, height=height, width=width)
        pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1).contiguous()
        crops = self.cut(pixels, windows.reshape(-1, 4), rule)
        batches = [self.encode_crops(batch) for batch in crops.split(64) if len(batch)]
        if not batches:
            return np.zeros((0, self.embed_dim), dtype=np.float32)
        rows = np.concatenate(batches)
        return combine_scales(rows.reshape(-1, len(rule.scales), self.embed_dim))

    def cut(self, pixels: Tensor, windows: np.ndarray, rule: CropRule) -> Tensor:
        """Returns the windows of a uint8 picture [3, h, w] as this teacher wants to see them."""
        how = self.preprocessing
        return cut_crops(
            pixels, windows, how.size_hw, mode=rule.mode, interpolation=how.interpolation
        )

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


def tensors_sha256(model: nn.Module) -> str:
    """Returns a hash of every parameter and buffer: names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _unit_rows(features: Tensor) -> Float[np.ndarray, "n embed_dim"]:
    return nn.functional.normalize(features.float(), dim=-1).cpu().numpy()
