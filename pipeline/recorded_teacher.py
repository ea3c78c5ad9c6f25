"""The teacher of a cache, loaded again from where it was when the cache was made."""

import torch

from cache.store import CacheInfo
from dkdetr.errors import MismatchError
from pipeline.teacher import load_teacher
from pipeline.teacher_model import Teacher


def load_recorded_teacher(info: CacheInfo, device: torch.device) -> Teacher:
    """Returns the teacher that made a cache, in the precision it had then.

    Raises:
        MismatchError: the cache does not say which it was, or other weights lie there now.
        DkdetrError: see `load_teacher`.
    """
    spec = info.provenance.get("teacher_spec")
    if not isinstance(spec, str):
        raise MismatchError(
            f"the cache {info.path} does not say which teacher made it, which kd.alignment=online "
            "and --crop-modes look with; next: kd.alignment=cached, and no --crop-modes"
        )
    precision = info.parts["teacher"]["precision"]
    teacher = load_teacher(spec, device, precision=precision, encoder="auto")
    if teacher.identity != info.teacher:
        raise MismatchError(
            f"the teacher '{spec}' is {teacher.identity} now, that of {info.path} was "
            f"{info.teacher}: its embeddings would not fit the cache's"
        )
    return teacher
