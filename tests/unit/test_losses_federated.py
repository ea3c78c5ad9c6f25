"""The draw of a federated loss, and that undrawn classes have no say."""

from dataclasses import replace

import pytest
import torch
from tiny_student import image_batch, targets, text_embeddings, tiny_config, tiny_student

from dkdetr.losses.criterion import Criterion, Normalisers
from dkdetr.losses.federated import draw_classes
from dkdetr.structures import Targets

ONE = torch.tensor(1.0)


def draw(labels, weights, number, seed=0):
    wanted = [Targets(torch.tensor(labels, dtype=torch.long), torch.zeros(len(labels), 4))]
    generator = torch.Generator().manual_seed(seed)
    return draw_classes(wanted, torch.tensor(weights), num_drawn=number, generator=generator)


def test_own_classes_always_and_weightless_ones_never():
    for seed in range(30):
        chosen = draw([3, 3], [1.0, 0.0, 2.0, 0.0, 5.0], 3, seed)
        assert chosen[3]
        assert not chosen[1]
        assert chosen.sum() == 3
    assert draw([0, 1, 2], [1.0] * 5, 2).tolist() == [True, True, True, False, False]
    assert draw([], [1.0, 0.0, 1.0], 50).tolist() == [True, False, True]
    assert not draw([], [0.0, 0.0], 5).any()


def test_the_draw_follows_the_weights_and_the_generator():
    counts = sum(draw([], [1.0, 3.0], 1, seed).int() for seed in range(2000))
    assert counts[1].item() / 2000 == pytest.approx(0.75, abs=0.03)
    assert torch.equal(draw([1], [1.0] * 9, 4, 5), draw([1], [1.0] * 9, 4, 5))


def test_only_drawn_classes_enter_the_decoders_class_loss():
    config = tiny_config()
    output = tiny_student()(image_batch(), text_embeddings())
    criterion = Criterion(config.detection, config.kd)
    drawn = torch.tensor([True, True, False, True, False])
    normalisers = Normalisers(ONE, ONE)
    few = criterion(output, targets(), None, normalisers, drawn_classes=drawn).parts
    everything = torch.ones(5, dtype=torch.bool)
    all_of_them = criterion(output, targets(), None, normalisers, drawn_classes=everything).parts
    plain = criterion(output, targets(), None, normalisers).parts
    torch.testing.assert_close(all_of_them, plain)
    assert few["class"] < plain["class"]
    assert torch.equal(few["class.encoder"], plain["class.encoder"])
    spoilt = torch.where(drawn, output.logits, output.logits.clamp(max=-3) - 1)
    changed = replace(output, logits=spoilt)
    torch.testing.assert_close(
        criterion(changed, targets(), None, normalisers, drawn_classes=drawn).parts["class"],
        few["class"],
    )
