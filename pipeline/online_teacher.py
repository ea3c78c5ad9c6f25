"""The teacher for training with crops embedded on the fly (`kd.alignment = "online"`)."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from cache.location import CachePath
from cache.store import open_cache
from pipeline.crops import CropRule, rule_from_parts
from pipeline.recorded_teacher import load_recorded_teacher
from pipeline.teacher_model import Teacher


@dataclass(frozen=True)
class OnlineTeacher:
    """A cache's teacher with that cache's rule of cropping; a `RegionEncoder`."""

    teacher: Teacher
    rule: CropRule

    @property
    def identity(self) -> str:
        """Names the model and its weights."""
        return self.teacher.identity

    def encode_regions(
        self, image: np.ndarray, boxes_xyxy: Float[np.ndarray, "num_boxes 4"]
    ) -> Float[np.ndarray, "num_boxes embed_dim"]:
        """Returns float32 unit vectors of the boxes (pixels) of an RGB uint8 picture (h, w, 3)."""
        return self.teacher.encode_regions(image, boxes_xyxy, self.rule)


def teacher_of_cache(path: CachePath, device: Any) -> OnlineTeacher:
    """Returns the teacher that made a cache; raises what `load_recorded_teacher` does."""
    info = open_cache(path).info
    teacher = load_recorded_teacher(info, device)
    return OnlineTeacher(teacher, rule_from_parts(info.parts["crops"]))
