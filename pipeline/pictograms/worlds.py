"""Worlds: which names a seed draws, which of them are novel, and what stands in every scene.

Nothing here looks at pixels: a world's hash is the same on every platform.
"""

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

from dkdetr.errors import UsageError
from pipeline.pictograms.drawings import Drawing, named_drawings
from pipeline.pictograms.scenes import ScenePlan, plan_scene

GENERATOR_VERSION = 1
"""Counts up with every change that gives other scenes for the same seed."""

Protocol = Literal["lvis-like", "coco-like"]
PROTOCOLS: tuple[Protocol, ...] = ("lvis-like", "coco-like")
Part = Literal["train", "val", "held"]
_PARTS: tuple[Part, ...] = ("train", "val", "held")

_NOVEL_SHARE = 0.26
_NEGATIVE_SHARE = 0.2
_NOT_EXHAUSTIVE_SHARE = 0.3


@dataclass(frozen=True)
class WorldSize:
    """How large a world is. `num_held` scenes are drawn wholly in the held-out style."""

    num_names: int
    num_base: int
    image_size: int
    num_train: int
    num_val: int
    num_held: int
    objects_per_scene: tuple[int, int]
    side_range: tuple[float, float]


SIZES: Mapping[str, WorldSize] = MappingProxyType(
    {
        "tiny": WorldSize(65, 48, 128, 1500, 250, 0, (3, 7), (18, 62)),
        "small": WorldSize(120, 84, 144, 3000, 500, 300, (3, 8), (18, 70)),
        "full": WorldSize(300, 210, 192, 12000, 1500, 1500, (3, 9), (18, 90)),
        "full70": WorldSize(300, 70, 192, 12000, 1500, 1500, (3, 9), (18, 90)),
    }
)


@dataclass(frozen=True)
class NamedCategory:
    """A name of a world; `group` is f, c or r (lvis-like), base or novel (coco-like)."""

    category_id: int
    drawing: Drawing
    group: str

    @property
    def is_base(self) -> bool:
        """True if training may read the category's boxes."""
        return self.group not in {"r", "novel"}


@dataclass(frozen=True)
class PlannedImage:
    """A scene, which of its objects are annotated, and LVIS's two federated lists."""

    image_id: int
    part: Part
    plan: ScenePlan
    annotated: tuple[bool, ...]
    neg_category_ids: tuple[int, ...] = ()
    not_exhaustive_category_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class World:
    """Categories (category_id = label + 1) and the plans of all images."""

    protocol: Protocol
    seed: int
    size: WorldSize
    categories: tuple[NamedCategory, ...]
    images: tuple[PlannedImage, ...]

    @property
    def split_hash(self) -> str:
        """Names, groups, images, who stands in them and who is annotated, as one sha256."""
        facts: list[Any] = [
            GENERATOR_VERSION,
            [[c.category_id, c.drawing.name, c.drawing.stem, c.group] for c in self.categories],
        ]
        facts += [
            [
                image.image_id,
                image.part,
                [[each.label, each.style] for each in image.plan.objects],
                image.annotated,
                image.neg_category_ids,
                image.not_exhaustive_category_ids,
            ]
            for image in self.images
        ]
        return hashlib.sha256(json.dumps(facts, separators=(",", ":")).encode()).hexdigest()


def plan_world(size: WorldSize, *, protocol: Protocol, seed: int) -> World:
    """Returns the world of a seed.

    Base names of a lvis-like world are drawn along a long tail; those on more training images
    than the average base name are `f`, the others `c`. In validation all names are equally
    likely, so that every name is scored on about as many objects.

    Raises:
        UsageError: unknown protocol, negative seed, or a missing extra.
    """
    if protocol not in PROTOCOLS:
        raise UsageError(f"unknown protocol '{protocol}'; known: {', '.join(PROTOCOLS)}")
    if seed < 0:
        raise UsageError(f"the seed of a world is 0 or more, got {seed}")
    drawings, is_base = _draw_names(size, seed)
    chances = _train_chances(is_base, seed, long_tail=protocol == "lvis-like")
    even = np.full(size.num_names, 1 / size.num_names)
    plans = {
        "train": _plan_scenes(size, seed, "train", size.num_train, chances),
        "val": _plan_scenes(size, seed, "val", size.num_val, even),
        "held": _plan_scenes(size, seed, "held", size.num_held, even),
    }
    groups = _groups(is_base, plans["train"], protocol)
    categories = tuple(
        NamedCategory(category_id=label + 1, drawing=drawing, group=group)
        for label, (drawing, group) in enumerate(zip(drawings, groups, strict=True))
    )
    images: list[PlannedImage] = []
    for part in _PARTS:
        for plan in plans[part]:
            image = _annotate(len(images) + 1, part, plan, is_base)
            if protocol == "lvis-like":
                image = _federate(image, seed, size.num_names)
            images.append(image)
    return World(
        protocol=protocol, seed=seed, size=size, categories=categories, images=tuple(images)
    )


def _draw_names(size: WorldSize, seed: int) -> tuple[list[Drawing], np.ndarray]:
    """Returns the world's drawings in code point order and which of them are base."""
    known = named_drawings()
    generator = np.random.default_rng((seed, 0))
    chosen = np.sort(generator.choice(len(known), size.num_names, replace=False))
    is_base = generator.permutation(size.num_names) < size.num_base
    return [known[index] for index in chosen], is_base


def _train_chances(is_base: np.ndarray, seed: int, *, long_tail: bool) -> np.ndarray:
    """Returns how likely each label is in a training scene; novel names share a quarter."""
    num_base = int(is_base.sum())
    ranks = np.arange(num_base) if long_tail else np.zeros(num_base)
    weights = 1 / (ranks + 1 + num_base / 8)
    shuffled = np.random.default_rng((seed, 1)).permutation(weights / weights.sum())
    chances = np.full(len(is_base), _NOVEL_SHARE / max(1, len(is_base) - num_base))
    chances[is_base] = shuffled * (1 - _NOVEL_SHARE)
    return chances / chances.sum()


def _plan_scenes(
    size: WorldSize, seed: int, part: Part, count: int, chances: np.ndarray
) -> list[ScenePlan]:
    cumulative = np.cumsum(chances)
    cumulative[-1] = 1.0

    def draw_label(generator: np.random.Generator) -> int:
        return int(np.searchsorted(cumulative, generator.random(), side="right"))

    low, high = size.objects_per_scene
    return [
        plan_scene(
            (seed, 2 + _PARTS.index(part), index),
            size=size.image_size,
            num_objects=low + _spread(index, high - low + 1),
            side_range=size.side_range,
            held_out_style=part == "held",
            draw_label=draw_label,
        )
        for index in range(count)
    ]


def _spread(index: int, num_values: int) -> int:
    """Returns index's place in a fixed irregular round of 0..num_values - 1."""
    return (index * 7919 // 7) % num_values


def _groups(is_base: np.ndarray, plans: Sequence[ScenePlan], protocol: Protocol) -> list[str]:
    if protocol == "coco-like":
        return ["base" if base else "novel" for base in is_base]
    counts = Counter(label for plan in plans for label in {each.label for each in plan.objects})
    base_labels = [int(label) for label in np.flatnonzero(is_base)]
    average = sum(counts[label] for label in base_labels) / max(1, len(base_labels))
    return [
        "r" if not base else "f" if counts[label] > average else "c"
        for label, base in enumerate(is_base)
    ]


def _annotate(image_id: int, part: Part, plan: ScenePlan, is_base: np.ndarray) -> PlannedImage:
    """Novel objects stand in training scenes unannotated; elsewhere everything is annotated."""
    annotated = tuple(part != "train" or bool(is_base[each.label]) for each in plan.objects)
    return PlannedImage(image_id=image_id, part=part, plan=plan, annotated=annotated)


def _federate(image: PlannedImage, seed: int, num_names: int) -> PlannedImage:
    """Adds LVIS's lists: some absent names are known absent, some present ones not exhaustive.

    Where a training image has a name twice, now and then one object stays without annotation and
    the name is listed as not exhaustive. Validation lists such names too (unmatched detections
    of them are then ignored) but annotates every object.
    """
    generator = np.random.default_rng((seed, 9, image.image_id))
    labels = [each.label for each in image.plan.objects]
    coins = generator.random(num_names)
    absent = [label for label in range(num_names) if label not in labels]
    negative = tuple(label + 1 for label in absent if coins[label] < _NEGATIVE_SHARE)
    annotated = list(image.annotated)
    not_exhaustive: list[int] = []
    for label, count in sorted(Counter(labels).items()):
        places = [index for index, each in enumerate(labels) if each == label]
        if count > 1 and annotated[places[0]] and coins[label] < _NOT_EXHAUSTIVE_SHARE:
            not_exhaustive.append(label + 1)
            if image.part == "train":
                annotated[places[-1]] = False
    return dataclasses.replace(
        image,
        annotated=tuple(annotated),
        neg_category_ids=negative,
        not_exhaustive_category_ids=tuple(not_exhaustive),
    )
