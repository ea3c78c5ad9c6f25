"""Mask losses by hand, their chunks, and that learning lowers them."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from dkdetr.losses.masks import (
    dice_loss,
    mask_cross_entropy,
    matched_mask_losses,
    stacked_masks,
)
from dkdetr.losses.matcher import Matches
from dkdetr.structures import Targets
from tests.tiny_student import (
    image_batch,
    loss_of,
    targets,
    text_embeddings,
    tiny_config,
    tiny_student,
)


@dataclass
class Drawn:
    """Masks that lie ready; it counts how many are asked for at a time."""

    maps: Tensor  # [layers, batch, queries, height, width]
    padding_mask: Tensor
    masks_at_once: int
    stride: float = 2.0
    most: int = 0

    def logits(self, layer: int, image_index: Tensor, query_index: Tensor) -> Tensor:
        self.most = max(self.most, len(query_index))
        return self.maps[layer, image_index, query_index]

    def graph_zero(self) -> Tensor:
        return 0.0 * self.maps.sum()


def test_dice_and_cross_entropy_by_hand():
    logits = torch.tensor([[[0.0, 0.0], [math.log(3), 7.0]]], dtype=torch.float64)
    wanted = torch.tensor([[[1.0, 0.0], [1.0, 1.0]]], dtype=torch.float64)
    inside = torch.tensor([[[True, True], [True, False]]])
    # Chances 1/2, 1/2, 3/4; the fourth pixel is padding.
    dice = 1 - 2 * (0.5 + 0.75) / (0.25 + 0.25 + 0.5625 + 2 + 1e-5)
    assert dice_loss(logits, wanted, inside).item() == pytest.approx(dice, rel=1e-12)
    entropy = (2 * math.log(2) - math.log(0.75)) / 3
    assert mask_cross_entropy(logits, wanted, inside).item() == pytest.approx(entropy, rel=1e-12)
    nothing = torch.zeros_like(inside)
    assert mask_cross_entropy(logits, wanted, nothing).item() == 0
    # Sums, not means, over masks.
    twice = [tensor.repeat(2, 1, 1) for tensor in (logits, wanted, inside)]
    assert dice_loss(*twice).item() == pytest.approx(2 * dice, rel=1e-12)


def test_losses_are_finite_far_out_and_for_an_empty_target():
    logits = torch.tensor([[[300.0, -300.0]]], requires_grad=True)
    wanted = torch.zeros(1, 1, 2)
    inside = torch.ones(1, 1, 2, dtype=torch.bool)
    loss = dice_loss(logits, wanted, inside) + mask_cross_entropy(logits, wanted, inside)
    loss.backward()
    assert loss.item() == pytest.approx(1 + 150)
    assert logits.grad.isfinite().all()


def test_gradients_are_those_of_finite_differences():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    wanted = (torch.rand(2, 3, 4, generator=generator) > 0.5).double()
    inside = torch.rand(2, 3, 4, generator=generator) > 0.2
    assert torch.autograd.gradcheck(lambda x: dice_loss(x, wanted, inside), logits)
    assert torch.autograd.gradcheck(lambda x: mask_cross_entropy(x, wanted, inside), logits)


def problem(masks_at_once: int):
    generator = torch.Generator().manual_seed(3)
    maps = torch.randn(2, 2, 4, 6, 6, generator=generator, dtype=torch.float64)
    padding = torch.zeros(2, 6, 6, dtype=torch.bool)
    padding[1, :, 4:] = True
    masks = Drawn(maps.requires_grad_(), padding, masks_at_once)
    matches = Matches(
        image_index=torch.tensor([0, 0, 1, 1, 1]),
        query_index=torch.tensor([0, 3, 0, 1, 2]),
        target_index=torch.tensor([1, 0, 2, 4, 3]),
    )
    wanted = torch.rand(5, 6, 6, generator=generator) > 0.5
    return masks, matches, wanted


def test_chunks_change_nothing_but_how_many_stand_at_a_time():
    results = []
    for at_once in (1, 2, 100):
        masks, matches, wanted = problem(at_once)
        losses = matched_mask_losses(masks, 1, matches, wanted)
        (losses[0] + 3 * losses[1]).backward()
        assert masks.most == min(at_once, 5)
        results.append((*losses, masks.maps.grad))
    for others in results[1:]:
        for value, first in zip(others, results[0], strict=True):
            torch.testing.assert_close(value, first)
    grad = results[0][2]
    assert not grad[0].any()
    assert not grad[1, 1, :, :, 4:].any()
    assert not grad[1, 0, 1].any()


def test_what_is_kept_for_the_gradient_does_not_grow_with_the_objects():
    student = tiny_student(tiny_config(mask_head=True, masks_at_once=2))
    masks = student(image_batch(), text_embeddings()).masks
    kept = []
    for count in (2, 12):
        queries = torch.arange(count)
        matches = Matches(torch.zeros_like(queries), queries, queries % 2)
        wanted = torch.rand(2, 64, 64) > 0.5
        held: dict[int, Tensor] = {}  # each storage once: a reference costs nothing

        def hold(tensor: Tensor, held: dict[int, Tensor] = held) -> Tensor:
            held[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
            losses = matched_mask_losses(masks, -1, matches, wanted)
        sum(losses).backward(retain_graph=True)
        kept.append(sum(tensor.numel() for tensor in held.values()))
    # Less than one drawn mask of 64 x 64, let alone its samples, for ten more of them.
    assert kept[1] - kept[0] < 64 * 64
    assert student.mask_head.linear3.weight.grad.any()


def test_the_pairs_are_the_matched_ones():
    masks, matches, wanted = problem(2)
    dice, entropy = matched_mask_losses(masks, 0, matches, wanted)
    expected = [0.0, 0.0]
    for image, query, target in ((0, 0, 1), (0, 3, 0), (1, 0, 2), (1, 1, 4), (1, 2, 3)):
        columns = 4 if image else 6
        logits = masks.maps[0, image, query, :, :columns]
        t = wanted[target, :, :columns].double()
        p = logits.sigmoid()
        expected[0] += 1 - 2 * (p * t).sum() / ((p * p).sum() + t.sum() + 1e-5)
        expected[1] -= (t * p.log() + (1 - t) * (1 - p).log()).mean()
    assert dice.item() == pytest.approx(expected[0].item(), rel=1e-10)
    assert entropy.item() == pytest.approx(expected[1].item(), rel=1e-10)


def test_without_a_match_a_zero_that_is_tied_to_the_graph():
    masks, _, wanted = problem(2)
    none = torch.zeros(0, dtype=torch.long)
    losses = matched_mask_losses(masks, 0, Matches(none, none, none), wanted[:0])
    assert [loss.item() for loss in losses] == [0, 0]
    sum(losses).backward()
    assert masks.maps.grad is not None
    assert not masks.maps.grad.any()


def test_masks_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"\(6, 6\), the targets hold \(5, 5\)"):
        stacked_masks(masked_targets((1,), side=5), (6, 6))
    with pytest.raises(ValueError, match="hold none"):
        stacked_masks(targets((1,)), (6, 6))


def masked_targets(counts=(2, 1), side: int = 64):
    """Targets whose masks are the left halves of their boxes, in the un-padded picture."""
    sizes = ((64, 96), (96, 64))
    made = []
    for target, (height, width) in zip(targets(counts), sizes, strict=False):
        masks = torch.zeros(len(target.labels), side, side, dtype=torch.bool)
        for mask, (cx, cy, w, h) in zip(masks, target.boxes_cxcywh.tolist(), strict=True):
            x0, x1 = (cx - w / 2) * width / 2, cx * width / 2
            y0, y1 = (cy - h / 2) * height / 2, (cy + h / 2) * height / 2
            mask[round(y0) : round(y1), round(x0) : round(x1)] = True
        made.append(Targets(target.labels, target.boxes_cxcywh, masks))
    return tuple(made)


def test_every_layer_is_judged_with_its_weights_and_its_matches():
    config = tiny_config(mask_head=True)
    student = tiny_student(config)
    output = student(image_batch(), text_embeddings())
    wanted = masked_targets()
    report = loss_of(output, wanted, None, config)
    names = {"dice", "dice.0", "mask_bce", "mask_bce.0"}
    assert names <= set(report.parts)
    torch.testing.assert_close(report.total, sum(report.parts.values()))
    heavier = replace(
        config, detection=replace(config.detection, weight_dice=16.0, weight_mask_bce=1.0)
    )
    other = loss_of(output, wanted, None, heavier).parts
    for layer in ("", ".0"):
        torch.testing.assert_close(other[f"dice{layer}"], 2 * report.parts[f"dice{layer}"])
        torch.testing.assert_close(other[f"mask_bce{layer}"], report.parts[f"mask_bce{layer}"] / 2)
    # 8 x the mean over objects of a number between 0 and 1.
    assert 0 < report.parts["dice"] < 8
    plain = loss_of(replace(output, masks=None), targets(), None, config).parts
    assert not names & set(plain)
    for name, value in plain.items():
        torch.testing.assert_close(value, report.parts[name])


def test_a_batch_without_an_object_has_a_gradient_everywhere():
    config = tiny_config(mask_head=True)
    student = tiny_student(config).train()
    loss_of(student(image_batch(), text_embeddings()), masked_targets((0, 0)), None,
            config).total.backward()  # fmt: skip
    head = dict(student.mask_head.named_parameters())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.values())


def test_steps_lower_the_mask_losses_of_a_fixed_batch():
    config = tiny_config(mask_head=True)
    student = tiny_student(config)
    images, wanted, text = image_batch(), masked_targets(), text_embeddings()
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    seen = []
    for _ in range(40):
        parts = loss_of(student(images, text), wanted, None, config).parts
        loss = parts["dice"] + parts["mask_bce"]
        seen.append(loss.item())
        optimizer.zero_grad()
        torch.stack(list(parts.values())).sum().backward()
        optimizer.step()
    assert seen[-1] < 0.6 * seen[0], seen
