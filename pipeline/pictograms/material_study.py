"""How good the benchmark's two ingredients are on validation pictures: proposals and teacher.

    python -m pipeline.pictograms.material_study CACHE --val SPLIT \
        --sources fit:CACHE student:RUN

Prints the recall of base and novel objects at 20, 100 and 300 boxes for each source, and how often
the teacher's first (and one of its first five) among all names is a true box's: of base and novel
objects, and by the groups that scores have (common and frequent are base, rare is novel). It reads
novel annotations: a report, of which nothing goes into a cache or a training.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cache.store import CacheReader, open_cache
from dkdetr.data.splits import Split, load_split
from dkdetr.evaluation.protocols import group_of, in_group_order
from pipeline.crops import rule_from_parts
from pipeline.proposal_sources import open_source, parse_proposals, prepare_source
from pipeline.proposals import ProposalRule, SourceImage, apply_rule
from pipeline.recall import proposal_recall
from pipeline.recorded_teacher import load_recorded_teacher

_BATCH = 16


def source_recall(split: Split, source: str, cache: Path) -> dict[str, Any]:
    """Returns recall by group and number of boxes, of `fit:CACHE`, `student:RUN` or `file:PATH`."""
    prepared = prepare_source(parse_proposals(source), cache, split)
    proposer = open_source(prepared, torch.device("cpu"), batch_size=_BATCH)
    boxes: dict[int, np.ndarray] = {}
    for start in range(0, len(split.images), _BATCH):
        images = _read(split, start)
        for image, raw in zip(images, proposer.propose(images), strict=True):
            height, width = image.pixels.shape[:2]
            kept = apply_rule(raw, ProposalRule(), height=height, width=width)
            boxes[image.image_id] = kept.boxes_xyxy
    found = proposal_recall(split, boxes, boxes.__getitem__)
    return {each.group: {n: round(share, 3) for n, share in each.shares.items()} for each in found}


def teacher_accuracy(split: Split, reader: CacheReader) -> dict[str, Any]:
    """Returns the shares of true boxes that the cache's teacher names rightly among all names."""
    teacher = load_recorded_teacher(reader.info, torch.device("cpu"))
    rule = rule_from_parts(reader.info.parts["crops"])
    metadata, text = reader.text()
    label_of = {int(number): row for row, number in enumerate(metadata["category_ids"])}
    vectors: list[np.ndarray] = []
    labels: list[int] = []
    for start in range(0, len(split.images), _BATCH):
        for image in _read(split, start):
            true = split.all_boxes(image.image_id)
            vectors.append(teacher.encode_regions(np.asarray(image.pixels), true.boxes_xyxy, rule))
            labels += [label_of[int(number)] for number in true.category_ids]
    similarity, wanted = np.concatenate(vectors) @ text.T, np.array(labels)
    rank = (similarity > similarity[np.arange(len(wanted)), wanted][:, None]).sum(axis=1)
    groups = {label_of[each.category_id]: each for each in split.categories}
    return shares_by_group(
        rank,
        ["base" if groups[label].is_base else "novel" for label in labels],
    ) | shares_by_group(rank, [group_of(split.protocol, groups[label]) for label in labels])


def shares_by_group(rank: np.ndarray, groups: Sequence[str]) -> dict[str, Any]:
    """Returns objects, and the shares that are first and among the first five, of each group.

    Args:
        rank: by object, how many names the teacher puts before the right one.
        groups: by object; "" is left out.
    """
    of = np.array(groups)
    return {
        name: {
            "objects": int((of == name).sum()),
            "top1": round(float((rank[of == name] < 1).mean()), 3),
            "top5": round(float((rank[of == name] < 5).mean()), 3),
        }
        for name in in_group_order(group for group in groups if group)
    }


def _read(split: Split, start: int) -> Sequence[SourceImage]:
    return [
        SourceImage(image.image_id, split.read(image))
        for image in split.images[start : start + _BATCH]
    ]


def main() -> None:
    """Prints the report as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cache", type=Path)
    parser.add_argument("--val", required=True)
    parser.add_argument("--sources", nargs="*", default=[])
    parser.add_argument("--data-root", type=Path, default=Path("data"))
    words = parser.parse_args()
    split = load_split(words.val, words.data_root)
    report = {
        "teacher": teacher_accuracy(split, open_cache(words.cache)),
        "recall": {each: source_recall(split, each, words.cache) for each in words.sources},
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
