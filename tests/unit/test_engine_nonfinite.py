"""A rank that breaks where the others wait for it tells which images, and waits for nobody."""

import json
import math
from typing import Any, NoReturn

import pytest
import torch

from dkdetr.engine.distributed import Ranks
from dkdetr.engine.optim import make_optimizer
from dkdetr.engine.step import TrainingStep
from dkdetr.errors import NonFiniteLossError
from tests.step_options import option_config, training_batch
from tests.tiny_student import text_embeddings, tiny_student


class OneOfTwo(Ranks):
    """The first of two ranks, the other of which has the same pictures and does not vote."""

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        return value

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.cat((rows, rows))

    def vote(self, *_flags: bool) -> NoReturn:
        pytest.fail("waits for the other rank")


class OneThatVotes(OneOfTwo):
    """The same, where the other is whole."""

    def vote(self, *flags: bool) -> tuple[bool, ...]:
        return flags


def broken_step(
    tmp_path,
    *,
    pixel: float = 0.0,
    option: str = "relations apart",
    ranks: type[Ranks] = OneOfTwo,
    room_for: int = 2,
) -> str:
    """Returns what is said of a step that breaks; the device has room for so many passes."""
    config = option_config(option)
    assert config.kd.rkd.gather == (option == "relations apart")
    student = tiny_student(config).train()
    step = TrainingStep(
        student,
        make_optimizer(student, config.optim),
        text_embeddings(),
        config,
        ranks(rank=0, world_size=2, device=torch.device("cpu")),
        precision=torch.float32,
        dumps=tmp_path,
    )
    passes = iter(range(room_for))

    def take_room(*_: Any) -> None:
        if next(passes, None) is None:
            raise torch.OutOfMemoryError("no room")

    student.register_forward_pre_hook(take_room)
    batch = training_batch(config)
    batch.images.pixels[0, 0, 5, 5] = pixel
    with pytest.raises(NonFiniteLossError) as raised:
        step([batch], epoch=40, iteration=10_000)
    return str(raised.value)


def test_where_relations_are_gathered_images_are_named_without_a_vote(tmp_path) -> None:
    words = broken_step(tmp_path, pixel=math.nan)
    assert "first bad tensor: image; images [0, 1]" in words
    assert "other ranks" not in words
    dump = json.loads((tmp_path / "step_00010000_rank0.json").read_text())
    assert dump["began_here"]
    assert dump["bad_parts"] == ["total"]


def break_matching(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_given: Any, **_how: Any) -> NoReturn:
        raise NonFiniteLossError("a matching cost is not finite")

    monkeypatch.setattr("dkdetr.losses.criterion.assign", broken)


def test_a_rank_that_is_whole_by_itself_says_so(tmp_path, monkeypatch) -> None:
    """As if joined statistics had brought another rank's fault into the matching."""
    break_matching(monkeypatch)
    words = broken_step(tmp_path)
    assert "This rank alone is not broken: other ranks' images may have done it" in words


@pytest.mark.parametrize(
    ("option", "ranks"), [("relations apart", OneOfTwo), ("cached", OneThatVotes)]
)
def test_a_look_that_finds_no_room_leaves_the_error_what_it_is(
    tmp_path, monkeypatch, option: str, ranks: type[Ranks]
) -> None:
    """The loss is still the news, and nothing is said of what nobody has looked at."""
    break_matching(monkeypatch)
    words = broken_step(tmp_path, option=option, ranks=ranks, room_for=1)
    assert "first bad tensor: not found, the device is out of memory; images [0, 1]" in words
    assert "other ranks" not in words
    dump = json.loads((tmp_path / "step_00010000_rank0.json").read_text())
    assert (dump["out_of_memory"], dump["began_here"]) == (True, False)


def test_a_loss_that_no_other_rank_has_part_in_is_not_laid_to_others(tmp_path, monkeypatch) -> None:
    """What the student says is finite; neither norms nor relations bring others' pictures in."""
    break_matching(monkeypatch)
    words = broken_step(tmp_path, option="cached", ranks=OneThatVotes)
    assert "images [0, 1]" in words
    assert "other ranks" not in words
