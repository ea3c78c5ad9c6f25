"""From the student's masks to a results file: by hand, in chunks, and scored whole."""

import json
from dataclasses import dataclass

import numpy as np
import orjson
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dkdetr.config import DataConfig, EvalConfig, ExperimentConfig, StudentConfig
from dkdetr.data.splits import load_split
from dkdetr.errors import DataError
from dkdetr.evaluation.detection_metrics import score
from dkdetr.evaluation.evaluate import evaluate_student, score_predictions
from dkdetr.evaluation.ground_truth import ground_truth_of
from dkdetr.evaluation.mask_postprocess import mask_rles, original_masks
from dkdetr.evaluation.results import read_results
from dkdetr.evaluation.results_writer import ResultsWriter
from dkdetr.run_lengths import decode_mask, encode_masks
from dkdetr.structures import EncoderOutput, ImageBatch, QueryOutput, StudentOutput
from tests.tiny_student import image_batch, text_embeddings, tiny_config, tiny_student
from tests.unit.data_world import annotation, coco_document, vocabulary_of, write_world


@dataclass
class Ready:
    """Masks that lie ready, and how often each was drawn."""

    maps: Tensor  # [batch, queries, height, width], logits
    masks_at_once: int = 2
    stride: float = 2.0

    def __post_init__(self) -> None:
        self.drawn: list[list[int]] = []
        self.padding_mask = torch.zeros(len(self.maps), *self.maps.shape[2:], dtype=torch.bool)

    def logits(self, layer: int, image_index: Tensor, query_index: Tensor) -> Tensor:
        assert layer == -1
        self.drawn.append(query_index.tolist())
        return self.maps[image_index, query_index]

    def graph_zero(self) -> Tensor:
        return self.maps.sum() * 0


def test_a_half_by_hand():
    logits = torch.full((1, 4, 4), -30.0)
    logits[:, :, :2] = 30.0
    drawn = original_masks(logits, input_hw=(8, 8), image_hw=(8, 6), original_hw=(16, 12))
    # 2 of 4 columns, 4 of 8 pixels of the input; 6 of these are picture, and the file has 12.
    expected = torch.zeros(1, 16, 12, dtype=torch.bool)
    expected[:, :, :8] = True
    assert torch.equal(drawn, expected)
    same = original_masks(logits, input_hw=(8, 8), image_hw=(8, 8), original_hw=(4, 4))
    assert torch.equal(same, logits > 0)


def test_every_query_is_drawn_once_and_detections_keep_their_order():
    maps = torch.full((2, 5, 4, 4), -20.0)
    for query in range(5):
        maps[1, query, :, : query % 4 + 1] = 20.0
    masks = Ready(maps)
    queries = torch.tensor([4, 1, 4, 3, 0, 1])
    rles = mask_rles(masks, 1, queries, image_hw=(8, 8), original_hw=(4, 4))
    assert masks.drawn == [[0, 1], [3, 4]]
    widths = [int(decode_mask(rle).any(0).sum()) for rle in rles]
    assert widths == [1, 2, 1, 4, 1, 2]
    none = mask_rles(masks, 1, queries[:0], image_hw=(8, 8), original_hw=(4, 4))
    assert none == ()


class LargestTensor(TorchDispatchMode):
    """Notes the elements of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor):
            self.numel = max(self.numel, made.numel())
        return made


@pytest.mark.parametrize(("original_hw", "at_once"), [((60, 80), 4), ((240, 320), 1)])
def test_no_more_masks_stand_in_memory_than_allowed(original_hw, at_once):
    torch.manual_seed(0)
    masks = Ready(torch.randn(1, 50, 32, 32), masks_at_once=4)
    whole = mask_rles(
        Ready(masks.maps, masks_at_once=100), 0, torch.arange(50),
        image_hw=(48, 64), original_hw=original_hw,
    )  # fmt: skip
    with LargestTensor() as largest:
        rles = mask_rles(masks, 0, torch.arange(50), image_hw=(48, 64), original_hw=original_hw)
    assert rles == whole
    assert max(map(len, masks.drawn)) <= 4
    # Four inputs of 64 x 64, or one file where a file is larger than that.
    height, width = original_hw
    assert largest.numel <= max(4 * 64 * 64, at_once * height * width)
    assert largest.numel < 50 * max(64 * 64, height * width) / 8


def test_the_student_s_own_masks_stay_in_their_chunks():
    student = tiny_student(tiny_config(mask_head=True, masks_at_once=1))
    with torch.inference_mode():
        masks = student(image_batch(), text_embeddings()).masks
        with LargestTensor() as one:
            mask_rles(masks, 0, torch.arange(12), image_hw=(64, 96), original_hw=(64, 96))
        # 16 x 16 places, 4 heads of 4 points of 2 channels.
        assert one.numel <= max(16 * 16 * 4 * 4 * 2, 128 * 128)


def test_written_read_and_without_a_box(tmp_path):
    rng = np.random.default_rng(0)
    rles = encode_masks(rng.random((3, 5, 7)) > 0.5)
    path = tmp_path / "results_segm.json"
    with ResultsWriter(path) as writer:
        writer.write_masks(7, rles, np.float32([0.2, 0.9, 0.5]), np.array([1, 2, 3]))
        writer.write_masks(3, rles[:1], np.float32([0.1]), np.array([2]))
    records = json.loads(path.read_text())
    assert [(r["image_id"], r["category_id"]) for r in records] == [(3, 2), (7, 2), (7, 3), (7, 1)]
    assert all(r.keys() == {"image_id", "category_id", "segmentation", "score"} for r in records)
    assert all(type(r["segmentation"]["counts"]) is str for r in records)
    results = read_results(path)
    order = [rles[0], rles[1], rles[2], rles[0]]
    assert [rle["counts"].decode() for rle in results.masks.objects(np.arange(4))] == [
        rle["counts"] for rle in order
    ]
    assert results.masks.sizes_hw.tolist() == [[5, 7]] * 4
    (second,) = results.take(np.array([1])).masks.objects(np.array([0]))
    assert second["counts"].decode() == rles[1]["counts"]


@pytest.mark.parametrize(
    "segmentation",
    [
        None,
        [[1, 2, 3, 4, 5, 6]],
        {"size": [5, 7]},
        {"size": [5.0, 7], "counts": "0S1"},
        {"size": [5, 7], "counts": [35]},
        {"size": [5, 7], "counts": "z"},
    ],
)
def test_records_that_are_no_masks_are_named(tmp_path, segmentation):
    good = {"image_id": 1, "category_id": 2, "score": 0.5}
    good |= {"segmentation": encode_masks(np.ones((1, 5, 7), bool))[0]}
    path = tmp_path / "results.json"
    path.write_text(json.dumps([good, good | {"segmentation": segmentation}]))
    with pytest.raises(DataError, match="index 1"):
        read_results(path)


SIDE = 64
"""Pictures and the network's input have one size, so that an oracle's masks can be exact."""


@pytest.fixture
def split(tmp_path):
    """Objects on whole 4-pixel places, a crowd among them, in pictures of 64 x 64."""
    document = coco_document(num_images=4)
    for image in document["images"]:
        image["height"] = image["width"] = SIDE
    for number, each in enumerate(document["annotations"]):
        x, y = 8 * (number % 4), 4 * (number % 3)
        each["bbox"], each["area"] = [x, y, 16, 24], 16 * 24
        each["segmentation"] = [[x, y, x + 16, y, x + 16, y + 24, x, y + 24]]
    crowd = annotation(900, 1, "person", [0, 32, 64, 32], iscrowd=1, area=64 * 32)
    crowd["segmentation"] = {"size": [SIDE, SIDE], "counts": [32, 32] * SIDE}
    document["annotations"].append(crowd)
    return load_split(write_world(tmp_path, document, "val"), tmp_path)


class Oracle(nn.Module):
    """Gives each image its objects, boxes and masks."""

    def __init__(self, split) -> None:
        super().__init__()
        self.split = split

    def forward(self, images: ImageBatch, text: Tensor) -> StudentOutput:
        batch = len(images.image_ids)
        ids = [category.category_id for category in self.split.categories]
        logits = torch.full((1, batch, 6, len(ids)), -9.0)
        boxes = torch.full((1, batch, 6, 4), 0.1)
        maps = torch.full((batch, 6, SIDE // 2, SIDE // 2), -30.0)
        for row, image_id in enumerate(images.image_ids):
            found = self.split.all_boxes(image_id)
            for query, (box, category_id) in enumerate(
                zip(found.boxes_xyxy.tolist(), found.category_ids.tolist(), strict=True)
            ):
                x0, y0, x1, y1 = box
                middle = ((x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0)
                boxes[0, row, query] = torch.tensor(middle) / SIDE
                logits[0, row, query, ids.index(category_id)] = 5.0
                maps[row, query, int(y0) // 2 : int(y1) // 2, int(x0) // 2 : int(x1) // 2] = 30.0
        nothing = torch.zeros(batch, 3)
        return StudentOutput(
            detection=QueryOutput(torch.zeros(1, batch, 6, 8), boxes),
            logits=logits,
            encoder=EncoderOutput(nothing, boxes[0, :, :3], nothing.bool()),
            anchors_cxcywh=boxes[0],
            anchor_objectness=torch.zeros(batch, 6),
            distillation=None,
            masks=Ready(maps),
        )


def evaluate(split, out_dir, *, mask_head=True, evaluator="fast"):
    config = ExperimentConfig(
        name="test",
        student=StudentConfig(mask_head=mask_head),
        data=DataConfig(workers=0, image_size=SIDE),
        eval=EvalConfig(batch_size=2, max_detections=10),
    )
    return evaluate_student(
        Oracle(split), split, vocabulary_of(split), config,
        device=torch.device("cpu"), out_dir=out_dir, evaluator=evaluator,
    )  # fmt: skip


def test_an_oracle_scores_one_in_boxes_and_masks(split, tmp_path):
    evaluation = evaluate(split, tmp_path / "eval")
    values = evaluation.metrics.values
    assert values["AP"] == values["segm.AP"] == values["segm.AP50_novel"] == pytest.approx(1.0)
    assert len([key for key in values if key.startswith("segm.")]) == len(values) / 2
    names = {path.name for path in (tmp_path / "eval").iterdir()}
    tables = {"per_category.csv", "per_category_segm.csv", "metrics.json", "confusion.csv"}
    assert names == {"results.json", "results_segm.json", *tables}
    assert all(path.is_file() for path in evaluation.paths.values())
    described = orjson.loads((tmp_path / "eval/metrics.json").read_bytes())
    assert {"results_xxh3_128", "results_segm_xxh3_128", "segm.AP"} <= described.keys()
    official = evaluate(split, tmp_path / "official", evaluator="official").metrics.values
    assert official == pytest.approx(values, abs=1e-12, nan_ok=True)
    # Anybody's file of masks scores the same; it has no boxes to be confused by.
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "confusion.csv").touch()
    again = score_predictions(
        tmp_path / "eval/results_segm.json", split, out_dir=tmp_path / "again"
    ).metrics.values
    assert again == pytest.approx(
        {key: value for key, value in values.items() if key.startswith("segm.")}, nan_ok=True
    )
    assert not (tmp_path / "again" / "confusion.csv").exists()


def test_a_student_of_boxes_leaves_no_masks_of_an_earlier_one(split, tmp_path):
    evaluate(split, tmp_path)
    values = evaluate(split, tmp_path, mask_head=False).metrics.values
    assert not any(key.startswith("segm.") for key in values)
    assert not list(tmp_path.glob("*segm*"))


def test_a_split_without_masks_is_refused_before_the_work(split, tmp_path):
    document = orjson.loads(split.annotations_path.read_bytes())
    del document["annotations"][0]["segmentation"]
    split.annotations_path.write_bytes(orjson.dumps(document))
    with pytest.raises(DataError, match=r"annotations have no segmentation.* id 1"):
        evaluate(split, tmp_path / "eval")
    assert not (tmp_path / "eval").exists()


def test_nothing_found_scores_nothing(split, tmp_path):
    for name in ("results.json", "results_segm.json"):
        (tmp_path / name).write_text("[]")
    metrics = score_predictions(
        tmp_path / "results.json", split,
        out_dir=tmp_path, masks_file=tmp_path / "results_segm.json",
    ).metrics  # fmt: skip
    assert metrics.values["segm.AP"] == metrics.values["AP"] == 0


def test_masks_of_another_size_than_the_image_are_refused(split, tmp_path):
    path = tmp_path / "results.json"
    with ResultsWriter(path) as writer:
        masks = encode_masks(np.ones((1, 5, 7), bool))
        writer.write_masks(split.images[0].image_id, masks, np.ones(1), np.array([5]))
    with pytest.raises(DataError, match="another size"):
        score(ground_truth_of(split, with_masks=True), read_results(path))
