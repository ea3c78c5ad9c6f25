"""Proposals by a network: the student's backbone, neck, encoder and first stage, no decoder.

The same reader serves the network that `fit` trains and a student's own first stage.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dkdetr.atomic_file import write_bytes
from dkdetr.boxes import cxcywh_to_xyxy
from dkdetr.config import StudentConfig
from dkdetr.data.device_views import decoded_images, render_images
from dkdetr.data.transforms import evaluation_geometry, render_view
from dkdetr.errors import CorruptArtefactError, DataError
from dkdetr.precision import computing, computing_type
from dkdetr.structures import ImageBatch
from dkdetr.student.build import build_trunk
from dkdetr.student.detector import ProposingTrunk
from pipeline.proposals import RawProposals, Seen, SourceImage
from pipeline.teacher_model import tensors_sha256

_CONFIG = TypeAdapter(StudentConfig)


class NetworkProposals:
    """Proposes with a trained trunk.

    Args:
        trunk: in evaluation mode, on its device.
        image_size: longest side of the network's input, pixels.
        batch_size: images at once, always: the last batch is padded with black pictures, because
            a network's output changes in its last bits with the batch.
        source: `fit` or `student`, for the fingerprint.
        names: of the categories whose boxes it has learned from.
        details: what else is known of its training, for the cache's provenance.
        saw_boxes_of: the mark of a run whose first weights had seen more than base boxes.
    """

    def __init__(
        self,
        trunk: ProposingTrunk,
        *,
        image_size: int,
        batch_size: int,
        source: str,
        names: tuple[str, ...],
        details: Mapping[str, Any],
        saw_boxes_of: str | None = None,
    ) -> None:
        self._trunk = trunk.eval()
        self._image_size = image_size
        self._batch_size = batch_size
        self._device = next(trunk.parameters()).device
        weights = tensors_sha256(trunk)
        self.identity: Mapping[str, Any] = {
            "source": source,
            "weights_sha256": weights,
            "image_size": image_size,
        }
        if self._device.type == "cuda":
            self.identity = {
                **self.identity,
                "resampling": "matrix products, float16",
                "precision": str(computing_type("auto", self._device)).removeprefix("torch."),
            }
        # It was trained on base boxes alone, and pipeline.leaks compares whose base with whose
        # novel; what it began from may have seen more.
        leaks = saw_boxes_of is not None
        self.seen = Seen(
            source=source,
            detector=f"sha256:{weights}",
            uses_novel_names=leaks,
            saw_novel_boxes=leaks,
            names=names,
            details=details,
            reason=f"it began from weights that had seen {saw_boxes_of}" if leaks else "",
        )

    @torch.inference_mode()
    def propose(self, images: Sequence[SourceImage]) -> list[RawProposals]:
        """Returns every token's box and the sigmoid of its objectness, one entry an image.

        They stay on the trunk's device. A token that may not propose has an objectness of minus
        infinity. On a GPU the trunk computes in half precision, as a student in training.
        """
        found: list[RawProposals] = []
        for start in range(0, len(images), self._batch_size):
            chunk = images[start : start + self._batch_size]
            batch = self._collate(chunk).to(self._device)
            with computing("auto", self._device):
                _, _, encoder = self._trunk(batch)
            boxes = cxcywh_to_xyxy(encoder.boxes_cxcywh.float())
            scores = encoder.objectness_logits.float().sigmoid()
            scores = scores.masked_fill(~encoder.valid, -torch.inf)
            for index, image in enumerate(chunk):
                height, width = image.pixels.shape[:2]
                across, down = boxes[index, :, 0::2] * width, boxes[index, :, 1::2] * height
                in_pixels = torch.stack((across, down), dim=-1).flatten(1)
                found.append(RawProposals(in_pixels, scores[index]))
        return found

    def _collate(self, images: Sequence[SourceImage]) -> ImageBatch:
        if self._device.type == "cuda":
            return self._collate_on_device(images)
        size = self._image_size
        pixels = torch.zeros((self._batch_size, 3, size, size))
        mask = torch.zeros((self._batch_size, size, size), dtype=torch.bool)
        sizes = torch.full((self._batch_size, 2), size)
        for index, image in enumerate(images):
            height, width = image.pixels.shape[:2]
            geometry = evaluation_geometry((height, width), image_size=size)
            picture = torch.as_tensor(image.pixels).cpu().numpy()
            pixels[index], mask[index] = render_view(picture, geometry, image_size=size)
            sizes[index] = torch.tensor(geometry.view_hw)
        return ImageBatch(
            pixels=pixels,
            padding_mask=mask,
            image_sizes_hw=sizes,
            original_sizes_hw=sizes,
            image_ids=tuple(image.image_id for image in images),
        )

    def _collate_on_device(self, images: Sequence[SourceImage]) -> ImageBatch:
        """Returns the same batch, resampled where the network computes."""
        size, missing = self._image_size, self._batch_size - len(images)
        black = torch.zeros((1, 1, 3), dtype=torch.uint8, device=self._device)
        pixels = [torch.as_tensor(image.pixels).to(self._device) for image in images]
        pixels += [black] * missing
        ids = [image.image_id for image in images] + [0] * missing
        geometries = [
            evaluation_geometry((each.shape[0], each.shape[1]), image_size=size) for each in pixels
        ]
        decoded = decoded_images(pixels, geometries, ids, image_size=size)
        return render_images(decoded.to(self._device))


def save_network(
    path: Path, trunk: ProposingTrunk, config: StudentConfig, facts: Mapping[str, Any]
) -> None:
    """Writes a trunk with all that is needed to use it again; `facts` is plain JSON data."""
    state = {name: tensor.contiguous() for name, tensor in trunk.state_dict().items()}
    described = {
        "config": json.dumps(asdict(config)),
        "facts": json.dumps(dict(facts)),
        "sha256": tensors_sha256(trunk),
    }
    write_bytes(path, save(state, metadata=described))


def load_network(path: Path) -> tuple[ProposingTrunk, dict[str, Any]]:
    """Returns the trunk that `save_network` wrote, on the CPU, and its facts.

    Raises:
        DataError: no such file.
        CorruptArtefactError: another kind of file, or not the tensors that were saved.
    """
    if not path.is_file():
        raise DataError(
            f"no proposal network '{path}'; make one with --proposals fit on a training split"
        )
    try:
        with safe_open(path, framework="pt") as file:
            described = file.metadata() or {}
            state: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        config = _CONFIG.validate_json(described["config"])
        facts = json.loads(described["facts"])
        trunk = build_trunk(config, load_weights=False)
        trunk.load_state_dict(state)
        expected = described["sha256"]
    except (SafetensorError, KeyError, ValueError, ValidationError, RuntimeError) as error:
        raise CorruptArtefactError(f"'{path}' is no proposal network: {error}") from None
    if tensors_sha256(trunk) != expected:
        raise CorruptArtefactError(f"'{path}' is damaged: its tensors do not give its own hash")
    return trunk.eval(), facts
