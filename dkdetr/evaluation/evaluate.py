"""Evaluation of a student, or of anybody's results file, on a split."""

import contextlib
import csv
import io
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import orjson
import torch
from torch import nn

from cache.durable import hash_file
from dkdetr.atomic_file import write_bytes
from dkdetr.config import ExperimentConfig
from dkdetr.data.loader import make_evaluation_loader
from dkdetr.data.splits import Split
from dkdetr.data.vocabulary import Vocabulary
from dkdetr.errors import MismatchError
from dkdetr.evaluation.confusion import confused_pairs, confusion_csv
from dkdetr.evaluation.detect import detect
from dkdetr.evaluation.detection_metrics import Evaluator, Metrics, score
from dkdetr.evaluation.gather import RankShare, gather_results
from dkdetr.evaluation.ground_truth import ground_truth_of
from dkdetr.evaluation.mask_column import join_masks
from dkdetr.evaluation.results import Results, read_results
from dkdetr.evaluation.results_writer import ResultsWriter
from dkdetr.evaluation.scored_weights import ScoredWeights
from dkdetr.progress import progress

_NUM_NAMED = 5
_ALONE = RankShare()


@dataclass(frozen=True)
class Evaluation:
    """Metrics, their files (`results`, `metrics`, `per_category`, `confusion`), and the time."""

    metrics: Metrics
    paths: Mapping[str, Path]
    seconds: float


def evaluate_student(
    student: nn.Module,
    split: Split,
    vocabulary: Vocabulary,
    config: ExperimentConfig,
    *,
    device: torch.device,
    out_dir: Path,
    evaluator: Evaluator = "fast",
    share: RankShare = _ALONE,
    weights: ScoredWeights | None = None,
) -> Evaluation | None:
    """Returns the student's metrics on a split; leaves four files in `out_dir`.

    Each of several ranks detects on its share of the images; the first gathers all results, scores
    and writes, the others return None.

    `results.json` (every detection kept, COCO form), `metrics.json`, `per_category.csv`, and
    `confusion.csv` (which names were taken for which). A student with a mask head leaves
    `results_segm.json` and `per_category_segm.csv` too. Each appears whole; `metrics.json` comes
    last and names the hash of the results it was computed of.

    Args:
        student: called as `student(images, text_embeddings)`, already on `device`.
        split: its images are all scored.
        vocabulary: the names to look for, the split's own categories.
        config: for the view's size, batch size, number of detections and precision.
        device: where the student is.
        out_dir: made if it is not there.
        evaluator: see `score`.
        share: this process among those of a process group.
        weights: whose student it is and what it is asked with, for `metrics.json`.

    Raises:
        MismatchError: the vocabulary is not of the split's categories.
        DataError: the student draws masks and the split has none to compare them with.
    """
    started = time.monotonic()
    with_masks = config.student.mask_head
    if with_masks:
        ground_truth_of(split, with_masks=True)  # to fail before the work, not after it
    name_notes = check_vocabulary(vocabulary, split)
    category_ids = np.array(vocabulary.category_ids, dtype=np.int64)
    loader = make_evaluation_loader(
        split,
        config,
        rank=share.rank,
        world_size=share.world_size,
        # On a CPU there is nothing to gain, and scores stay those of the loader's views.
        leave_views=config.data.augment != "loader" and device.type == "cuda",
        pin_memory=device.type == "cuda",
    )
    found = detect(
        student,
        loader,
        torch.from_numpy(vocabulary.embeddings),
        device=device,
        max_detections=config.eval.max_detections,
        precision=config.optim.precision,
        with_masks=with_masks,
    )
    results_path = out_dir / "results.json"
    masks_path = out_dir / "results_segm.json" if with_masks else None
    title, num_images = f"detecting on {split.name}", len(split.images) // share.world_size
    with contextlib.ExitStack() as open_files:
        advance = open_files.enter_context(progress(title, num_images, quiet=not share.is_first))
        paths = [results_path, *([masks_path] if masks_path else [])]
        writers = [
            open_files.enter_context(ResultsWriter(path, commits=share.is_first)) for path in paths
        ]
        writer, mask_writer = writers[0], writers[1] if with_masks else None
        for image_id, detections in found:
            scores = detections.scores.numpy()
            categories = category_ids[detections.labels.numpy()]
            writer.write(image_id, detections.boxes_xyxy.numpy(), scores, categories)
            if mask_writer is not None and detections.masks is not None:
                mask_writer.write_masks(image_id, detections.masks, scores, categories)
            advance(writer.num_images, "")
        for each in writers:
            gather_results(each, share, device)
        if not share.is_first:
            return None
        assert writer.num_images == len(split.images), "the loader left out images"
        _remove_old_metrics(out_dir)
        if masks_path is None:  # of an earlier student, beside this one's boxes
            (out_dir / "results_segm.json").unlink(missing_ok=True)
    # Read back from the file: what is scored is what anybody else can score.
    evaluation = score_predictions(
        results_path,
        split,
        out_dir=out_dir,
        evaluator=evaluator,
        notes=name_notes,
        masks_file=masks_path,
        weights=weights,
    )
    return replace(evaluation, seconds=time.monotonic() - started)


def score_predictions(
    predictions_file: Path,
    split: Split,
    *,
    out_dir: Path,
    evaluator: Evaluator = "fast",
    notes: tuple[str, ...] = (),
    masks_file: Path | None = None,
    weights: ScoredWeights | None = None,
) -> Evaluation:
    """Returns the metrics of a COCO results file; leaves metrics.json and tables beside it.

    The predictions stay where they are. The tables are per_category.csv and, of boxes,
    confusion.csv. A file of masks gives the metrics `segm.AP`, ...; so does `masks_file`, the masks
    of the same detections, beside those of the boxes, and its categories are in
    per_category_segm.csv. `notes` go into the metrics, whose weights found all that into
    metrics.json.
    """
    started = time.monotonic()
    results = read_results(predictions_file)
    with_masks = results.masks is not None or masks_file is not None
    truth = ground_truth_of(split, with_masks=with_masks)
    metrics = score(truth, results, evaluator=evaluator)
    files = {"results": predictions_file}
    tables = {"per_category": per_category_csv(metrics)}
    if results.has_boxes:
        tables["confusion"] = confusion_csv(confused_pairs(truth, results))
    if masks_file is not None:
        of_masks = score(truth, _read_masks(masks_file), evaluator=evaluator)
        metrics = replace(metrics, values={**metrics.values, **of_masks.values})
        files["results_segm"] = masks_file
        tables["per_category_segm"] = per_category_csv(of_masks)
    metrics = replace(metrics, notes=(*metrics.notes, *notes))
    paths = files | {"metrics": out_dir / "metrics.json"}
    paths |= {name: out_dir / f"{name}.csv" for name in tables}
    _remove_old_metrics(out_dir)
    for name, table in tables.items():
        write_bytes(paths[name], table.encode())
    described = metrics.as_json() | {
        f"{name}_xxh3_128": hash_file(path) for name, path in files.items()
    }
    described |= {} if weights is None else weights.as_json()
    write_bytes(paths["metrics"], orjson.dumps(described, option=orjson.OPT_INDENT_2) + b"\n")
    return Evaluation(metrics=metrics, paths=paths, seconds=time.monotonic() - started)


def check_vocabulary(vocabulary: Vocabulary, split: Split) -> tuple[str, ...]:
    """Returns remarks on names that differ between a vocabulary and a split of the same ids.

    Raises:
        MismatchError: the vocabulary lacks categories of the split, or has others.
    """
    names = {category.category_id: category.name for category in split.categories}
    missing = sorted(names.keys() - set(vocabulary.category_ids))
    strange = sorted(set(vocabulary.category_ids) - names.keys())
    if missing or strange:
        raise MismatchError(
            f"the vocabulary is not that of split '{split.name}': {len(missing)} of its "
            f"{len(names)} categories are missing (ids {missing[:_NUM_NAMED]}), {len(strange)} are "
            f"strange to it (ids {strange[:_NUM_NAMED]}). Its numbers would mean nothing; give one "
            "of the split's own names with --vocab"
        )
    pairs = zip(vocabulary.category_ids, vocabulary.names, strict=True)
    renamed = [f"'{names[i]}' as '{name}'" for i, name in pairs if names[i] != name]
    if not renamed:
        return ()
    first = ", ".join(renamed[:_NUM_NAMED])
    return (f"{len(renamed)} categories were looked for under another name: {first}",)


def per_category_csv(metrics: Metrics) -> str:
    """Returns one line a category; AP in [0, 1], an empty cell where there is no ground truth."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    has_both = any(not math.isnan(line.segm_ap) for line in metrics.per_category)
    aps = ("AP", "AP50", "AP75", *(("segm.AP",) if has_both else ()))
    writer.writerow(("category_id", "name", "group", *aps, "num_gt", "num_detections"))
    for line in metrics.per_category:
        values = (line.ap, line.ap50, line.ap75, line.segm_ap)[: len(aps)]
        numbers = ("" if math.isnan(value) else repr(value) for value in values)
        counts = (line.num_gt, line.num_detections)
        writer.writerow((line.category_id, line.name, line.group, *numbers, *counts))
    return text.getvalue()


def _read_masks(path: Path) -> Results:
    results = read_results(path)
    # A file without a detection does not say what it is of.
    none = join_masks([], np.zeros((0, 2)))
    return results if len(results) else replace(results, masks=none, has_boxes=False)


def _remove_old_metrics(out_dir: Path) -> None:
    # Metrics of an earlier evaluation must not be found beside this one's results; until these
    # are about to take their name, the earlier ones stay: a failure loses nothing.
    for name in ("metrics.json", "per_category.csv", "per_category_segm.csv", "confusion.csv"):
        (out_dir / name).unlink(missing_ok=True)
