"""What the KD queries add to the student's arithmetic at the paper's size: a thousandth."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from dkdetr.experiment_file import load_experiment
from dkdetr.structures import ImageBatch, StudentOutput, TeacherRegions
from dkdetr.student.attention_backend import use_backend
from dkdetr.student.build import build_student


def sum_of(output: StudentOutput) -> torch.Tensor:
    parts = [output.logits, output.detection.boxes_cxcywh, output.encoder.objectness_logits,
             output.encoder.boxes_cxcywh]  # fmt: skip
    if output.distillation is not None:
        parts.append(output.distillation.features)
    return torch.stack([each.sum() for each in parts]).sum()


def test_kd_queries_add_a_thousandth_of_the_products():
    """Matrix products and convolutions, forward and backward, without sampling and losses."""
    config = load_experiment("lvis_r50_70e", ["student.backbone.weights=random"]).config
    side, kept, products = config.data.image_size, config.kd.regions_per_image, []
    assert (side, kept, config.student.num_queries) == (1024, 20, 300)
    with FakeTensorMode():  # shapes without numbers: a GPU's size in a laptop's memory
        student = build_student(config, text_dim=512).train()
        use_backend(student, "torch", torch.device("cpu"))
        size = torch.full((1, 2), side)
        mask = torch.zeros(1, side, side, dtype=torch.bool)
        images = ImageBatch(torch.zeros(1, 3, side, side), mask, size, size, (1,))
        regions = TeacherRegions(
            torch.zeros(1, kept, 4), torch.zeros(1, kept, 512),
            torch.ones(1, kept, dtype=torch.bool),
        )  # fmt: skip
        for given in (None, regions):
            with FlopCounterMode(display=False) as counter:
                sum_of(student(images, torch.zeros(866, 512), given)).backward()
            products.append(counter.get_total_flops())
    assert products[0] > 1e12
    assert 1.0005 < products[1] / products[0] < 1.0015
