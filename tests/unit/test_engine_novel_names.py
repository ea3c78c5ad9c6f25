"""Novel names reach nothing that a training learns from: their rows may be anything."""

from dataclasses import replace

import numpy as np

from dkdetr.data.vocabulary import Vocabulary
from dkdetr.engine.train import train
from tests.training_world import checkpoint_of, difference, make_world, settings


def other_novel_rows(vocabulary: Vocabulary) -> Vocabulary:
    embeddings = vocabulary.embeddings.copy()
    novel = ~np.array(vocabulary.is_base)
    assert novel.sum() > 1
    embeddings[novel] = np.roll(embeddings[novel], 1, axis=0)
    return replace(vocabulary, embeddings=embeddings)


def test_other_novel_text_rows_change_no_bit_of_a_training(tmp_path):
    config = settings(optim={"epochs": 3, "lr_drop_epochs": []})
    worlds = make_world(tmp_path / "a"), make_world(tmp_path / "b", change=other_novel_rows)
    for world in worlds:
        train(world.request("run", config))
    one, other = (checkpoint_of(world, "run") for world in worlds)
    assert difference(one, other) == ""
    assert not np.array_equal(one.vocabulary.embeddings, other.vocabulary.embeddings)
    assert len(one.vocabulary.base()) < len(one.vocabulary)
