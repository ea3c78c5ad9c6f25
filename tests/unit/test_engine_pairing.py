"""What options are told of the teacher and the classes, from a cache and its split."""

import numpy as np
import pytest
import torch

from cache.store import open_cache
from dkdetr.data.splits import load_split
from dkdetr.data.teacher_mean import mean_embedding
from dkdetr.engine.pairing import teacher_side
from tests.training_world import make_world, settings

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def side_of(world, **tables):
    split = load_split(world.split, world.root)
    return teacher_side(settings(**tables), open_cache(world.cache), split, CPU, None)


@pytest.mark.parametrize(("given", "power"), [({}, 0.5), ({"fed_power": 1.0}, 1.0)])
def test_classes_are_drawn_by_a_power_of_their_images(world, given, power):
    split = load_split(world.split, world.root)
    images: dict[int, set[int]] = {}
    for image in split.images:
        for category_id in split.base_boxes(image.image_id).category_ids.tolist():
            images.setdefault(category_id, set()).add(image.image_id)
    base = [each.category_id for each in split.categories if each.is_base]
    counts = torch.tensor([float(len(images.get(each, ()))) for each in base])
    assert counts.max() > 4  # where the powers differ
    weights = side_of(world, detection={"loss_class": "fed", **given}).class_weights
    assert weights is not None
    expected = torch.where(counts > 0, counts**power, 0.0).double()
    torch.testing.assert_close(weights.double(), expected)


def test_the_mean_is_that_of_the_first_regions_of_every_image(world):
    reader = open_cache(world.cache)
    rows = [reader.rows(each).region_embeddings[:4] for each in reader.image_ids.tolist()]
    expected = np.concatenate(rows).mean(axis=0)
    np.testing.assert_allclose(mean_embedding(reader, regions_per_image=4), expected, atol=1e-4)
    mean = side_of(world, kd={"skd": {"loss": "centred"}}).mean
    assert mean is not None
    np.testing.assert_allclose(mean.numpy(), expected, atol=1e-4)


def test_nothing_is_made_that_no_option_wants(world):
    side = side_of(world)
    assert (side.encoder, side.mean, side.class_weights) == (None, None, None)
