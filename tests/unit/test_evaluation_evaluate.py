import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from dkdetr.config import DataConfig, EvalConfig, ExperimentConfig, OptimConfig
from dkdetr.data.splits import load_split
from dkdetr.data.vocabulary import Vocabulary
from dkdetr.errors import CorruptArtefactError, MismatchError
from dkdetr.evaluation import evaluate as evaluate_module
from dkdetr.evaluation.detect import detect
from dkdetr.evaluation.evaluate import evaluate_student, score_predictions
from dkdetr.structures import EncoderOutput, ImageBatch, QueryOutput, StudentOutput

NAMES = {11: "cat", 5: "gnu", 8: "person"}


class Oracle(nn.Module):
    """Gives each image its ground truth, as three queries of which the last finds nothing."""

    def __init__(self, split, *, broken=False):
        super().__init__()
        self.split, self.broken = split, broken
        self.modes, self.seen = [], []

    def forward(self, images: ImageBatch, text_embeddings):
        self.modes.append((self.training, torch.is_grad_enabled()))
        self.seen += images.image_ids
        batch, num_classes = len(images.image_ids), len(text_embeddings)
        logits = torch.full((1, batch, 3, num_classes), -9.0)
        boxes = torch.full((1, batch, 3, 4), 0.1)
        for row, image_id in enumerate(images.image_ids):
            found = self.split.all_boxes(image_id)
            height, width = images.original_sizes_hw[row].tolist()
            pairs = zip(found.boxes_xyxy.tolist(), found.category_ids.tolist(), strict=True)
            for query, ((x0, y0, x1, y1), category_id) in enumerate(pairs):
                box = ((x0 + x1) / 2 / width, (y0 + y1) / 2 / height)
                box += ((x1 - x0) / width, (y1 - y0) / height)
                boxes[0, row, query] = torch.tensor(box)
                # The class is found through the text, as a student does.
                target = torch.eye(16)[category_id]
                logits[0, row, query] = 20 * (text_embeddings @ target) - 9
        if self.broken:
            logits[0, 0, 0, 0] = torch.nan
        nothing = torch.zeros(batch, 3)
        encoder = EncoderOutput(nothing, boxes[0], nothing.bool())
        detection = QueryOutput(torch.zeros(1, batch, 3, 16), boxes)
        return StudentOutput(detection, logits, encoder, boxes[0], nothing, None)


@pytest.fixture
def split(tmp_path):
    images, annotations = [], []
    for image_id, ids in {3: (5, 8), 1: (11,), 2: ()}.items():
        width, height = 40 + 10 * image_id, 50
        Image.new("RGB", (width, height), (90, 9, 200)).save(tmp_path / f"{image_id}.png")
        size = {"width": width, "height": height}
        images.append({"id": image_id, "file_name": f"{image_id}.png"} | size)
        annotations += [
            {"id": 10 * image_id + place, "image_id": image_id, "category_id": category_id}
            | {"bbox": [4 + 9 * place, 6, 21, 32], "area": 500, "iscrowd": 0}
            for place, category_id in enumerate(ids, start=1)
        ]
    categories = [
        {"id": category_id, "name": name, "split": "novel" if name == "gnu" else "base"}
        for category_id, name in NAMES.items()
    ]
    path = tmp_path / "val.json"
    file = {"images": images, "annotations": annotations, "categories": categories}
    path.write_text(json.dumps(file))
    return load_split(f"ovcoco:{tmp_path}:{path}", tmp_path)


@pytest.fixture
def config():
    return ExperimentConfig(
        name="test",
        data=DataConfig(workers=0, image_size=64),
        eval=EvalConfig(batch_size=2, max_detections=4),
        optim=OptimConfig(precision="fp32"),
    )


def vocabulary_of(names):
    return Vocabulary(
        names=tuple(names.values()),
        category_ids=tuple(names),
        is_base=(True,) * len(names),
        frequencies=("",) * len(names),
        prompts=("{}",),
        teacher="oracle",
        embeddings=np.eye(16, dtype=np.float32)[list(names)],
    )


def test_an_oracle_scores_one_and_leaves_four_files(split, config, tmp_path):
    student = Oracle(split).train()
    out_dir = tmp_path / "run" / "eval"
    evaluation = evaluate_student(
        student, split, vocabulary_of(NAMES), config, device=torch.device("cpu"), out_dir=out_dir
    )
    values = evaluation.metrics.values
    assert values["AP"] == values["AP50_novel"] == values["AP50_base"] == pytest.approx(1.0)
    assert student.training
    assert set(student.modes) == {(False, False)}
    # An image without a base or novel object is no part of OV-COCO's validation set.
    assert sorted(student.seen) == sorted(image.image_id for image in split.images)
    assert sorted(path.name for path in out_dir.iterdir()) == [
        "confusion.csv",
        "metrics.json",
        "per_category.csv",
        "results.json",
    ]
    records = json.loads((out_dir / "results.json").read_text())
    assert len(records) == 4 * len(split.images)
    assert records[0]["image_id"] == 1
    assert records[0]["category_id"] == 11
    assert records[0]["bbox"] == pytest.approx([13, 6, 21, 32], abs=1e-4)
    described = json.loads((out_dir / "metrics.json").read_text())
    assert described["AP50_all"] == pytest.approx(1.0)
    assert described["APl"] is None
    assert described["num_images"] == len(split.images)
    lines = (out_dir / "per_category.csv").read_text().splitlines()
    assert lines[0] == "category_id,name,group,AP,AP50,AP75,num_gt,num_detections"
    assert any(line.startswith("5,gnu,novel,") and ",1," in line for line in lines)


def test_a_file_scores_as_the_run_that_wrote_it(split, config, tmp_path):
    vocabulary = vocabulary_of(NAMES)
    run = evaluate_student(
        Oracle(split), split, vocabulary, config, device=torch.device("cpu"), out_dir=tmp_path / "a"
    )
    for evaluator in ("fast", "official"):
        again = score_predictions(
            run.paths["results"], split, out_dir=tmp_path / evaluator, evaluator=evaluator
        )
        for key, value in run.metrics.values.items():
            assert again.metrics.values[key] == pytest.approx(value, abs=1e-12, nan_ok=True)
    assert (tmp_path / "fast/metrics.json").read_bytes() == (
        tmp_path / "a/metrics.json"
    ).read_bytes()


def test_a_broken_student_leaves_what_was_there(split, config, tmp_path):
    out_dir = tmp_path / "out"
    vocabulary = vocabulary_of(NAMES)
    cpu = torch.device("cpu")
    evaluate_student(Oracle(split), split, vocabulary, config, device=cpu, out_dir=out_dir)
    before = {path.name: path.read_bytes() for path in out_dir.iterdir()}
    student = Oracle(split, broken=True).train()
    with pytest.raises(CorruptArtefactError, match="not finite"):
        evaluate_student(student, split, vocabulary, config, device=cpu, out_dir=out_dir)
    assert {path.name: path.read_bytes() for path in out_dir.iterdir()} == before
    assert student.training


def test_new_results_never_stand_beside_old_metrics(split, config, tmp_path, monkeypatch):
    out_dir = tmp_path / "out"
    vocabulary = vocabulary_of(NAMES)
    cpu = torch.device("cpu")
    evaluate_student(Oracle(split), split, vocabulary, config, device=cpu, out_dir=out_dir)

    def killed(*_args, **_more):
        raise KeyboardInterrupt

    monkeypatch.setattr("dkdetr.evaluation.evaluate.score", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate_student(Oracle(split), split, vocabulary, config, device=cpu, out_dir=out_dir)
    assert [path.name for path in out_dir.iterdir()] == ["results.json"]


def test_a_vocabulary_of_another_split_is_refused(split, config, tmp_path):
    for names in ({11: "cat", 5: "gnu"}, NAMES | {9: "dog"}, {1: "cat"}):
        with pytest.raises(MismatchError, match="--vocab"):
            evaluate_student(
                Oracle(split),
                split,
                vocabulary_of(names),
                config,
                device=torch.device("cpu"),
                out_dir=tmp_path / "out",
            )
    assert not (tmp_path / "out").exists()


def test_other_names_for_the_same_ids_are_told(split, config, tmp_path):
    evaluation = evaluate_student(
        Oracle(split),
        split,
        vocabulary_of(NAMES | {5: "wildebeest"}),
        config,
        device=torch.device("cpu"),
        out_dir=tmp_path / "out",
    )
    assert evaluation.metrics.notes == (
        "1 categories were looked for under another name: 'gnu' as 'wildebeest'",
    )


@pytest.mark.parametrize(
    ("augment", "device", "left"),
    [
        ("loader", "cuda", False),
        ("device", "cuda", True),
        ("device", "cpu", False),
        ("auto", "cuda", True),
        ("auto", "cpu", False),
    ],
)
def test_views_are_made_on_a_gpu_where_training_does_so(
    augment, device, left, split, config, tmp_path, monkeypatch
):
    """On a CPU scores stay those of the loader's views, whatever training did."""

    class Asked(Exception):
        pass

    def asked(*_, leave_views: bool, **__):
        assert leave_views == left
        raise Asked

    monkeypatch.setattr(evaluate_module, "make_evaluation_loader", asked)
    config = replace(config, data=replace(config.data, augment=augment))
    with pytest.raises(Asked):
        evaluate_student(
            Oracle(split), split, vocabulary_of(NAMES), config, device=torch.device(device),
            out_dir=tmp_path,
        )  # fmt: skip


def test_detect_gives_images_in_the_order_of_batches(split):
    batches = [
        ImageBatch(
            pixels=torch.zeros(len(ids), 3, 8, 8),
            padding_mask=torch.zeros(len(ids), 8, 8, dtype=torch.bool),
            image_sizes_hw=torch.full((len(ids), 2), 8),
            original_sizes_hw=torch.full((len(ids), 2), 50),
            image_ids=ids,
        )
        for ids in ((3, 1), (3,))
    ]
    found = detect(
        Oracle(split), batches, torch.eye(16), device=torch.device("cpu"), max_detections=1
    )
    assert [image_id for image_id, _ in found] == [3, 1, 3]


def test_evaluation_imports_no_official_tool():
    program = (
        "import sys, dkdetr.evaluation.evaluate, dkdetr.evaluation.report\n"
        "print(sorted({'lvis', 'matplotlib', 'pycocotools'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
