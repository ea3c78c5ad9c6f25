"""What was found in one picture, in the forms that people go on with."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image

from dkdetr.errors import UsageError
from dkdetr.inference.drawing import draw_boxes
from dkdetr.run_lengths import Rle, decode_mask


@dataclass(frozen=True, eq=False)
class Prediction:
    """Detections of one picture, best first; boxes in its own pixels.

    `masks` are COCO's packed run lengths, where the student has a mask head and was asked.
    """

    image: UInt8[np.ndarray, "height width 3"]
    boxes_xyxy: Float[np.ndarray, "n 4"]
    scores: Float[np.ndarray, "n"]
    category_ids: Int[np.ndarray, "n"]
    names: tuple[str, ...]
    masks: tuple[Rle, ...] | None = None

    def __len__(self) -> int:
        return len(self.scores)

    def mask_arrays(self) -> Bool[np.ndarray, "n height width"] | None:
        """Returns the masks pixel by pixel, None where there are none."""
        if self.masks is None:
            return None
        drawn = [decode_mask(each) for each in self.masks]
        return np.array(drawn, dtype=bool).reshape(len(drawn), *self.image.shape[:2])

    def to_coco(self, image_id: int = 0, *, boxes: bool = True) -> list[dict[str, Any]]:
        """Returns records of COCO's results form: box as x, y, width, height, mask as run lengths.

        Args:
            image_id: goes into each record.
            boxes: False leaves `bbox` out of records with masks: the official tools score masks
                rightly only without it, since they take a box's area for its mask's.
        """
        masks = self.masks or [None] * len(self)
        wanted = boxes or self.masks is None
        return [
            {"image_id": image_id, "category_id": int(category_id), "score": float(score)}
            | ({"bbox": [float(v) for v in (x0, y0, x1 - x0, y1 - y0)]} if wanted else {})
            | ({"segmentation": dict(mask)} if mask is not None else {})
            for (x0, y0, x1, y1), score, category_id, mask in zip(
                self.boxes_xyxy.tolist(), self.scores, self.category_ids, masks, strict=True
            )
        ]

    def to_rows(self) -> list[Mapping[str, Any]]:
        """Returns one flat record a detection, names included: what a CSV holds."""
        return [
            {"name": name, "score": record["score"], "category_id": record["category_id"]}
            | dict(zip(("left", "top", "right", "bottom"), box, strict=True))
            for name, record, box in zip(
                self.names, self.to_coco(), self.boxes_xyxy.tolist(), strict=True
            )
        ]

    def to_supervision(self) -> Any:
        """Returns `supervision.Detections`, the names under `data["class_name"]`.

        Raises:
            UsageError: the package supervision is not installed.
        """
        try:
            import supervision
        except ImportError:
            raise UsageError("to_supervision wants the package: pip install supervision") from None
        return supervision.Detections(
            xyxy=self.boxes_xyxy.astype(np.float32),
            confidence=self.scores.astype(np.float32),
            class_id=self.category_ids.astype(int),
            mask=self.mask_arrays(),
            data={"class_name": np.array(self.names, dtype=object).astype(str)},
        )

    def plot(self) -> Image.Image:
        """Returns the picture with boxes, names, scores and masks drawn on it."""
        texts = [f"{n} {s:.2f}" for n, s in zip(self.names, self.scores.tolist(), strict=True)]
        masks = self.mask_arrays()
        return draw_boxes(self.image, self.boxes_xyxy, texts, colour_keys=self.names, masks=masks)
