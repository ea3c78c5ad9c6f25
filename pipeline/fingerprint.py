"""What a cache is made from, in words and hashes: its fingerprint's parts and its provenance."""

import platform
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch
import xxhash

from cache.plan import Plan
from cache.spec import SCHEMA
from dkdetr.data.splits import Split
from pipeline.crops import CropRule
from pipeline.decoding import choose_decoder, decoder_name
from pipeline.hub_weights import weights_record
from pipeline.leaks import LeakCheck
from pipeline.proposals import ProposalRule, ProposalSource
from pipeline.request import CacheRequest, request_record
from pipeline.source_images import ImageCheck
from pipeline.teacher_model import Teacher
from pipeline.vocabularies import text_parts


def cache_parts(
    request: CacheRequest,
    split: Split,
    images: ImageCheck,
    source: ProposalSource,
    teacher: Teacher,
    plan: Plan,
    rule: CropRule,
) -> dict[str, Any]:
    """Returns all that decides a byte of the cache; no clock, host, path or worker count."""
    decoder = choose_decoder(request.decoder, teacher.device)
    return {
        **settled_parts(request, split, teacher, plan, rule),
        "images": images.parts() | {"decoder": decoder_name(decoder, teacher.device)},
        "proposals": {**source.identity, **ProposalRule(keep=request.keep).parts()},
        "text": text_parts(split, request.prompts, request.prompt_templates(), teacher),
    }


def settled_parts(
    request: CacheRequest, split: Split, teacher: Teacher, plan: Plan, rule: CropRule
) -> dict[str, Any]:
    """Returns the parts that are known before a picture is read or a network trained."""
    return {
        "schema": SCHEMA,
        "split": split_parts(split),
        "crops": rule.parts(),
        "teacher": {"name": teacher.identity, **teacher.parts()},
        "storage": {"region_embeddings": request.storage},
        "batch_layout": dict(plan.batch_layout),
    }


def split_parts(split: Split) -> dict[str, Any]:
    """Returns what the fingerprint records of a split: its images and its base boxes."""
    table = split.base_table
    boxes = xxhash.xxh3_128()
    for array in (table.offsets, table.boxes_xyxy, table.category_ids):
        boxes.update(np.ascontiguousarray(array).tobytes())
    ids = np.array([image.image_id for image in split.images], dtype="<i8")
    base = ",".join(map(str, sorted(split.base_category_ids)))
    return {
        # A user's own split is named by its folders; what they hold counts, not where they lie.
        "name": split.name.partition(":")[0],
        "protocol": split.protocol,
        "num_images": len(split.images),
        "image_ids_xxh3_128": xxhash.xxh3_128_hexdigest(ids.tobytes()),
        "base_category_ids_xxh3_128": xxhash.xxh3_128_hexdigest(base.encode()),
        "base_boxes_xxh3_128": boxes.hexdigest(),
    }


def cache_provenance(
    request: CacheRequest, split: Split, teacher: Teacher, leaks: LeakCheck, canary: str
) -> dict[str, Any]:
    """Returns what is kept of a cache's making but never compared."""
    weights = weights_record(teacher.weights_file)
    return {
        "command": request.command,
        "request": request_record(request),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": platform.node(),
        "torch": torch.__version__,
        "device": str(teacher.device),
        "split": split.name,
        "data_root": str(request.data_root.resolve()),
        "teacher_spec": request.teacher,
        **({"teacher_weights": weights} if weights else {}),
        "proposals": leaks.provenance(),
        "uses_novel_names": leaks.provenance()["uses_novel_names"],
        "canary": canary,
    }
