"""Images, layers and stages judged together: as one after the other, in a tenth of the launches."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from launches import Launches, launches_of_backward
from plain_detection_losses import (
    candidate_assignment,
    plain_cost,
    plain_parts,
    whole_assignment,
)
from tiny_student import boxes_inside, targets, tiny_config
from torch import Tensor

from dkdetr.losses import matcher
from dkdetr.losses.criterion import Criterion, Normalisers
from dkdetr.losses.denoising import make_denoising
from dkdetr.losses.matcher import StageMatches, assign, send_costs
from dkdetr.losses.matching_cost import MatchingCosts, PairCosts, Stage, TargetRows
from dkdetr.structures import (
    EncoderOutput,
    ExtraDetections,
    QueryOutput,
    StudentOutput,
    Targets,
)

COSTS = MatchingCosts(cost_class=2, cost_bbox=5, cost_giou=2, focal_alpha=0.25, focal_gamma=2)
SETTINGS = tiny_config().detection
REPEATS = 3
NUM_CLASSES = 7


@dataclass(frozen=True)
class Case:
    """A student's output in float64, leaves of a graph, and what is wanted of it."""

    output: StudentOutput
    targets: tuple[Targets, ...]
    leaves: dict[str, Tensor]

    def stages(self) -> list[Stage]:
        encoder, hybrid = self.output.encoder, self.output.hybrid
        objectness = encoder.objectness_logits[None, ..., None]
        assert hybrid is not None
        return [
            Stage(self.output.logits, self.output.detection.boxes_cxcywh),
            Stage(objectness, encoder.boxes_cxcywh[None], encoder.valid),
            Stage(hybrid.logits, hybrid.queries.boxes_cxcywh, repeats=REPEATS),
        ]


def make_case(
    counts: Sequence[int],
    *,
    seed: int = 0,
    num_layers: int = 3,
    num_queries: int = 20,
    num_tokens: int = 60,
    num_classes: int = NUM_CLASSES,
    num_denoising: int = 0,
    kinds: int = 0,
) -> Case:
    """With `kinds`, queries are of so many kinds, equal among themselves: most costs are ties."""
    generator = torch.Generator().manual_seed(seed)
    batch = len(counts)

    def drawn(layers: int, queries: int, width: int) -> tuple[Tensor, Tensor]:
        logits = torch.randn(layers, batch, queries, width, generator=generator).double()
        boxes = boxes_inside(layers, batch, queries, seed=seed + queries, dtype=torch.float64)
        if kinds:
            kind = torch.randint(kinds, (queries,), generator=generator)
            logits, boxes = logits[:, :, kind % queries], boxes[:, :, kind % queries]
        return logits.requires_grad_(), boxes.requires_grad_()

    logits, boxes = drawn(num_layers, num_queries, num_classes)
    objectness, token_boxes = drawn(1, num_tokens, 1)
    hybrid_logits, hybrid_boxes = drawn(num_layers, num_queries + 1, num_classes)
    noisy_logits, noisy_boxes = drawn(num_layers, max(1, num_denoising), num_classes)

    def said(boxes: Tensor) -> QueryOutput:
        return QueryOutput(boxes.detach(), boxes)

    output = StudentOutput(
        detection=said(boxes),
        logits=logits,
        encoder=EncoderOutput(
            objectness[0, ..., 0],
            token_boxes[0],
            torch.rand(batch, num_tokens, generator=generator) < 0.8,
        ),
        anchors_cxcywh=boxes[0].detach(),
        anchor_objectness=logits[0, ..., 0].detach(),
        distillation=None,
        hybrid=ExtraDetections(said(hybrid_boxes), hybrid_logits),
        denoised=ExtraDetections(said(noisy_boxes), noisy_logits),
    )
    wanted = tuple(
        Targets(torch.randint(num_classes, (count,), generator=generator), each.boxes_cxcywh)
        for count, each in zip(counts, targets(counts, seed=seed, dtype=torch.float64), strict=True)
    )
    leaves = {
        "logits": logits, "boxes": boxes, "objectness": objectness, "token boxes": token_boxes,
        "hybrid logits": hybrid_logits, "hybrid boxes": hybrid_boxes,
        "noisy logits": noisy_logits, "noisy boxes": noisy_boxes,
    }  # fmt: skip
    return Case(output, wanted, leaves)


def matched(stages: Sequence[Stage], wanted: Sequence[Targets]) -> list[StageMatches]:
    return assign(send_costs(stages, TargetRows.of(wanted), COSTS))


def pairs_of(found: StageMatches, layer: int, counts: Sequence[int]) -> list[tuple[int, int, int]]:
    """(image, query, target of the image) of a layer."""
    first = np.cumsum([0, *counts])
    columns = found.of_layer(layer)
    return [
        (image, query, target - int(first[image]))
        for image, query, target in zip(
            columns.image_index.tolist(), columns.query_index.tolist(),
            columns.target_index.tolist(), strict=True,
        )
    ]  # fmt: skip


def some_counts(seed: int) -> tuple[int, ...]:
    generator = np.random.default_rng(seed)
    counts = generator.integers(0, 9, generator.integers(1, 5))
    return tuple(int(count) for count in counts)


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("kinds", [0, 4])
def test_the_pairs_are_those_of_one_image_after_the_other(seed: int, kinds: int):
    """Ties are settled alike; what is assigned costs as little as on the whole matrix."""
    counts = some_counts(seed)
    case = make_case(counts, seed=seed, kinds=kinds, num_queries=5 + seed)
    stages = case.stages()
    found = matched(stages, case.targets)
    rows = TargetRows.of(case.targets)
    image_index = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    price = PairCosts(stages, COSTS)
    cost = price(rows.labels, rows.boxes_cxcywh, image_index).detach()
    sizes = [len(stage.logits) * stage.logits.shape[2] for stage in stages]
    for stage, matches, of_stage in zip(stages, found, cost.split(sizes, dim=1), strict=True):
        num_layers, batch, num_queries = stage.logits.shape[:3]
        layers = of_stage.view(-1, num_layers, num_queries).transpose(0, 1)
        for layer, of_layer in enumerate(layers):
            expected = []
            for image, part in enumerate(of_layer.split(counts)):
                full = np.tile(part.T.numpy(), (1, stage.repeats))
                allowed = np.ones(num_queries, bool)
                if stage.valid is not None:
                    allowed = stage.valid[image].numpy()
                if full.shape[1] == 0:
                    continue
                pairs = candidate_assignment(full, allowed)
                expected += [(image, query, number % counts[image]) for query, number in pairs]
                least = full[allowed][tuple(np.array(whole_assignment(full[allowed])).T)].sum()
                assert full[tuple(np.array(pairs).T)].sum() == pytest.approx(least, abs=1e-9)
            assert pairs_of(matches, layer, counts) == expected
            places = [(layer * batch + image) * num_queries + query for image, query, _ in expected]
            assert matches.place[layer].tolist() == places


@pytest.mark.parametrize("seed", range(10))
def test_costs_are_those_of_the_formulas(seed: int):
    counts = some_counts(seed)
    case = make_case(counts, seed=seed)
    for stage in case.stages():
        rows = TargetRows.of(case.targets)
        images = rows.image_index() if sum(counts) else torch.zeros(0, dtype=torch.long)
        cost = PairCosts([stage], COSTS)(rows.labels, rows.boxes_cxcywh, images)
        num_layers, _, num_queries = stage.logits.shape[:3]
        for row, (image, number) in enumerate(
            (image, number) for image, count in enumerate(counts) for number in range(count)
        ):
            target = case.targets[image]
            if not stage.knows_labels:
                target = replace(target, labels=torch.zeros_like(target.labels))
            expected = [
                plain_cost(logits, boxes, target, SETTINGS)[:, number]
                for logits, boxes in zip(
                    stage.logits[:, image], stage.boxes_cxcywh[:, image], strict=True
                )
            ]
            torch.testing.assert_close(
                cost[row].view(num_layers, num_queries), torch.stack(expected),
                rtol=1e-12, atol=1e-12,
            )  # fmt: skip


@pytest.mark.parametrize("pairs_at_once", [1, 300, 1000])
def test_chunks_of_targets_change_nothing(pairs_at_once: int, monkeypatch: pytest.MonkeyPatch):
    case = make_case((4, 0, 7, 1), kinds=5)
    plain = matched(case.stages(), case.targets)
    calls = []

    class Counted(PairCosts):
        def __call__(self, labels: Tensor, boxes_cxcywh: Tensor, image_index: Tensor) -> Tensor:
            calls.append(len(labels))
            return super().__call__(labels, boxes_cxcywh, image_index)

    monkeypatch.setattr(matcher, "PAIRS_IN_CACHE", pairs_at_once)
    monkeypatch.setattr(matcher, "PairCosts", Counted)
    chunked = matched(case.stages(), case.targets)
    places = 20 * 3 + 60 + 21 * 3
    assert max(calls) == max(1, pairs_at_once // places)
    assert sum(calls) == 12
    for one, other in zip(plain, chunked, strict=True):
        assert torch.equal(one.place, other.place)
        assert torch.equal(one.target_index, other.target_index)


CASES = {
    "plain": ((3, 1, 4), {}),
    "an image without objects": ((0, 2, 0, 5), {}),
    "no objects": ((0, 0), {}),
    "one layer": ((2, 3), {"num_layers": 1}),
    "more objects than queries": ((6, 2, 1), {"num_queries": 4}),
    "more objects than tokens": ((6, 2), {"num_tokens": 5}),
    "ties": ((3, 4), {"kinds": 4}),
    "one class": ((3, 1), {"num_classes": 1}),
}


@pytest.mark.parametrize("option", ["focal", "fed", "valid tokens"])
@pytest.mark.parametrize("name", CASES)
def test_parts_and_gradients_are_those_of_one_layer_after_the_other(name: str, option: str):
    counts, more = CASES[name]
    generator = torch.Generator().manual_seed(1)
    num_classes = more.get("num_classes", NUM_CLASSES)
    case = make_case(counts, num_denoising=2 * max(1, *counts), **more)
    denoising = make_denoising(
        case.targets, num_classes, num_groups=2, box_noise=0.4, label_noise=0.5,
        generator=generator,
    )  # fmt: skip
    tokens = "valid" if option == "valid tokens" else "all"
    settings = replace(SETTINGS, encoder_tokens=tokens)
    drawn = torch.arange(num_classes) % 3 > 0 if option == "fed" else None
    kd = replace(tiny_config().kd, hybrid_repeats=REPEATS)
    one = torch.ones((), dtype=torch.float64)
    report = Criterion(settings, kd)(
        case.output, case.targets, None, Normalisers(5 * one, one),
        drawn_classes=drawn, denoising=denoising,
    )  # fmt: skip
    expected = plain_parts(
        case.output, case.targets, settings, 5.0,
        drawn=drawn, hybrid_repeats=REPEATS, denoising=denoising,
    )  # fmt: skip
    assert list(report.parts) == list(expected)
    for part, value in expected.items():
        torch.testing.assert_close(
            report.parts[part], value, rtol=1e-12, atol=1e-12, msg=lambda m, p=part: f"{p}: {m}"
        )
    # Each part by a weight of its own, so that none can stand for another.
    weigh = 1 + torch.rand(len(expected), generator=generator).double()
    gradients = []
    for parts in (report.parts, expected):
        total = (torch.stack(list(parts.values())) * weigh).sum()
        gradients.append(
            torch.autograd.grad(total, list(case.leaves.values()), materialize_grads=True)
        )
    for leaf, ours, plain in zip(case.leaves, *gradients, strict=True):
        torch.testing.assert_close(
            ours, plain, rtol=1e-12, atol=1e-12, msg=lambda m, n=leaf: f"{n}: {m}"
        )
    if name != "no objects":
        assert all(gradient.any() for gradient in gradients[0] if option != "fed")


def launches(counts: Sequence[int], num_layers: int) -> tuple[int, int, int]:
    """Launches of matching, losses (without it) and their backward pass; one class and many."""
    case = make_case(counts, num_layers=num_layers, num_classes=30, num_tokens=500)
    output = replace(case.output, hybrid=None, denoised=None)
    rows = TargetRows.of(case.targets)
    with Launches() as matching:
        assign(send_costs(case.stages()[:2], rows, COSTS))
    one = torch.ones(())
    with Launches() as forward:
        report = Criterion(SETTINGS, tiny_config().kd)(
            output, case.targets, None, Normalisers(one, one)
        )
    backward = launches_of_backward(report.total)
    return matching.total, forward.total - matching.total, backward


def test_launches_do_not_grow_with_images_layers_and_objects():
    """One after the other eight images and seven stages took 1,409, 558 and 956."""
    whole = launches((8, 9, 10, 11, 12, 13, 14, 16), 6)
    assert whole == launches((2, 1), 2)
    matching, losses, backward = whole
    assert matching <= 110
    assert losses <= 97
    assert backward <= 131
