"""The noise of denoising queries, and that they are judged as what they were."""

import pytest
import torch
from tiny_student import (
    NUM_CLASSES,
    image_batch,
    targets,
    text_embeddings,
    tiny_config,
    tiny_student,
)

from dkdetr.boxes import box_area, cxcywh_to_xyxy
from dkdetr.losses.criterion import Criterion, Normalisers
from dkdetr.losses.denoising import make_denoising
from dkdetr.structures import DenoisingQueries


def made(counts=(2, 1), *, box: float = 0.4, label: float = 0.2, seed: int = 0) -> DenoisingQueries:
    generator = torch.Generator().manual_seed(seed)
    return make_denoising(
        targets(counts), NUM_CLASSES, num_groups=3, box_noise=box, label_noise=label,
        generator=generator,
    )  # fmt: skip


def test_without_noise_they_are_the_objects():
    queries = made(box=0, label=0)
    assert queries.valid.tolist() == [[True] * 6, [True, False] * 3]
    torch.testing.assert_close(queries.boxes_cxcywh, queries.wanted_boxes_cxcywh)
    assert torch.equal(queries.labels, queries.wanted_labels)
    for image, target in enumerate(targets((2, 1))):
        kept = queries.wanted_boxes_cxcywh[image, queries.valid[image]]
        assert torch.equal(kept, target.boxes_cxcywh.repeat(3, 1))


@pytest.mark.parametrize("seed", range(10))
def test_noise_keeps_its_bounds_and_follows_its_generator(seed: int):
    queries, again = made(seed=seed), made(seed=seed)
    assert torch.equal(queries.boxes_cxcywh, again.boxes_cxcywh)
    wanted = queries.wanted_boxes_cxcywh
    corners = cxcywh_to_xyxy(queries.boxes_cxcywh)
    assert (corners >= 0).all()
    assert (corners <= 1).all()
    assert (box_area(corners)[queries.valid] > 0).all()
    farthest = cxcywh_to_xyxy(wanted) - corners
    # A corner moves by at most 0.2 of a side with the centre and 0.2 with the side.
    assert (farthest.abs() <= 0.4 * wanted[..., 2:].repeat(1, 1, 2) + 1e-6).all()
    assert not torch.equal(queries.boxes_cxcywh[:, :2], queries.boxes_cxcywh[:, 2:4])


def test_noise_is_as_great_as_asked_for():
    queries = made((40, 40), box=0.4, label=0.5)
    # Half the labels are drawn anew, and a fifth of those hits the old one.
    changed = (queries.labels != queries.wanted_labels)[queries.valid].float().mean()
    assert changed == pytest.approx(0.5 * (NUM_CLASSES - 1) / NUM_CLASSES, abs=0.06)
    wanted = queries.wanted_boxes_cxcywh
    inside = queries.valid & (cxcywh_to_xyxy(queries.boxes_cxcywh) % 1 > 0).all(dim=-1)
    shift = (queries.boxes_cxcywh - wanted).abs() / wanted[..., 2:].repeat(1, 1, 2)
    greatest = shift[inside].amax(dim=0)
    assert (greatest[:2] > 0.17).all()  # centres by up to 0.2 of a side, sides by up to 0.4
    assert (greatest[2:] > 0.35).all()


def test_an_empty_batch_has_places_without_objects():
    queries = made((0, 0))
    assert queries.valid.shape == (2, 3)
    assert not queries.valid.any()


def test_groups_change_neither_detections_nor_each_other():
    config = tiny_config(denoising=3)
    student = tiny_student(config, dtype=torch.float64)
    images, text = image_batch(dtype=torch.float64), text_embeddings(torch.float64)
    queries = made()
    noisy = [DenoisingQueries(
        q.boxes_cxcywh.double(), q.labels, q.valid, q.wanted_boxes_cxcywh.double(),
        q.wanted_labels, 3,
    ) for q in (queries, made(seed=1))]  # fmt: skip
    first = slice(0, 2)
    noisy[1].boxes_cxcywh[:, first] = noisy[0].boxes_cxcywh[:, first]
    noisy[1].labels[:, first] = noisy[0].labels[:, first]
    plain = student(images, text)
    one, other = (student(images, text, denoising=each) for each in noisy)
    torch.testing.assert_close(one.logits, plain.logits, rtol=0, atol=1e-10)
    assert torch.equal(one.logits, other.logits)
    same, different = (slice(0, 1), slice(2, 3))
    assert torch.equal(one.denoised.logits[:, :, same], other.denoised.logits[:, :, same])
    assert not torch.equal(
        one.denoised.logits[:, :, different], other.denoised.logits[:, :, different]
    )


def test_loss_by_hand():
    config = tiny_config(denoising=3)
    queries = made()
    output = tiny_student(config)(image_batch(), text_embeddings(), denoising=queries)
    criterion = Criterion(config.detection, config.kd)
    normalisers = Normalisers(torch.tensor(2.0), torch.tensor(1.0))
    parts = criterion(output, targets(), None, normalisers, denoising=queries).parts
    valid = queries.valid
    distance = (output.denoised.queries.boxes_cxcywh[-1] - queries.wanted_boxes_cxcywh).abs()
    expected = 5 * distance[valid].sum() / 2 / 3
    torch.testing.assert_close(parts["bbox.denoising"], expected)
    assert {"class.denoising", "class.denoising.0", "giou.denoising"} <= parts.keys()
