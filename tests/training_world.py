"""A world in which a whole training run takes a second: generated pictures, cache and student."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cache.plan import make_plan
from cache.spec import PART_NAMES
from cache.writer import create_or_resume
from dkdetr.config import ExperimentConfig
from dkdetr.data.splits import load_split
from dkdetr.data.vocabulary import Vocabulary
from dkdetr.engine.checkpoint import Checkpoint, open_checkpoint
from dkdetr.engine.train_request import TrainRequest
from dkdetr.experiment_file import config_from_dict
from tests.unit.data_cache import DIM, cached_rows
from tests.unit.data_world import coco_document, vocabulary_of, write_world


@dataclass(frozen=True)
class TrainingWorld:
    root: Path
    split: str
    cache: Path

    def request(self, run: str, config: ExperimentConfig, **more: Any) -> TrainRequest:
        folder = self.root / "runs" / run
        return TrainRequest(self.cache, config, folder, self.root, "cpu", **more)


def make_world(
    root: Path, num_images: int = 13, change: Callable[[Vocabulary], Vocabulary] = lambda v: v
) -> TrainingWorld:
    """Writes pictures, annotations (the last picture has no base box) and a sealed cache.

    `change` may put another vocabulary into the cache.
    """
    name = write_world(root, coco_document(num_images))
    split = load_split(name, root)
    plan = make_plan(
        [image.image_id for image in split.images],
        max_regions=12, embed_dim=DIM, max_gt=8, storage="fp16", batch_layout={},
    )  # fmt: skip
    parts = {part: {} for part in PART_NAMES} | {"split": {"name": name}}
    path = root / "cache"
    with create_or_resume(path, parts=parts, plan=plan, provenance={}) as writer:
        for shard in writer.missing_shards():
            ids = set(plan.shard_image_ids(shard))
            images = [image for image in split.images if image.image_id in ids]
            writer.commit_shard(
                shard, [cached_rows(split, image) for image in images], quarantined={}
            )
        vocabulary = change(vocabulary_of(split))
        writer.write_text(vocabulary.metadata(), vocabulary.embeddings)
        writer.seal()
    return TrainingWorld(root, name, path)


def settings(**tables: Any) -> ExperimentConfig:
    """Three steps an epoch, six epochs, distillation from the third, a rate step at the fifth.

    With batch norm, dropout and a running average: all that a resumed run could get wrong.
    """
    base: dict[str, Any] = {
        "name": "world",
        "checkpoint_every_s": 1e6,
        "student": {
            "embed_dim": 32, "num_heads": 4, "num_points": 2, "ffn_dim": 32, "dropout": 0.1,
            "num_encoder_layers": 1, "num_decoder_layers": 2, "num_queries": 10,
            "backbone": {"arch": "slim_resnet", "weights": "random", "norm": "batch",
                         "frozen_stages": 0, "width": 8, "stages": [4, 5], "extra_levels": 0},
        },
        "kd": {"start_epoch": 2, "regions_per_image": 4,
               "selection": {"min_side": 2.0, "min_visible": 0.2}},
        "optim": {"epochs": 6, "lr": 1e-3, "lr_drop_epochs": [4], "warmup_iterations": 4,
                  "ema_decay": 0.9},
        "data": {"batch_size": 4, "workers": 0, "sampler": "uniform", "image_size": 64},
    }  # fmt: skip
    return config_from_dict(_merged(base, tables))


def checkpoint_of(world: TrainingWorld, run: str) -> Checkpoint:
    return open_checkpoint(world.root / "runs" / run)[1]


def difference(one: Checkpoint, two: Checkpoint) -> str:
    """Returns the first thing in which two checkpoints are not bitwise the same, or ''."""
    if one.progress != two.progress:
        return f"progress {one.progress} {two.progress}"
    for part in ("student", "average"):
        ours, theirs = getattr(one, part), getattr(two, part)
        if ours.keys() != theirs.keys():
            return part
        for name in ours:
            if not torch.equal(ours[name], theirs[name]):
                return f"{part} {name}"
    if one.optimizer["param_groups"] != two.optimizer["param_groups"]:
        return "parameter groups"
    ours, theirs = one.optimizer["state"], two.optimizer["state"]
    if ours.keys() != theirs.keys():
        return "optimizer"
    for index, state in ours.items():
        for name, value in state.items():
            if not torch.equal(value, theirs[index][name]):
                return f"optimizer {index} {name}"
    return "" if one.step == two.step else "step"


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        inner = base.get(key)
        both = isinstance(inner, dict) and isinstance(value, dict)
        merged[key] = _merged(inner, value) if both else value
    return merged
