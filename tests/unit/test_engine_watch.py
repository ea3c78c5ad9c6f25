"""What one sees of a run, and that looking changes nothing."""

import json
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dkdetr.data.neighbor_batches import places_for_neighbors
from dkdetr.data.splits import load_split
from dkdetr.engine import recent_figures
from dkdetr.engine.metric_log import read_metrics
from dkdetr.engine.profiling import WARMUP_STEPS
from dkdetr.engine.smoke import _with_company, smoke
from dkdetr.engine.step_parts import PARTS, REST
from dkdetr.engine.trackers import TensorBoard
from dkdetr.engine.train import train
from dkdetr.engine.train_request import Watch
from dkdetr.errors import DataError, UsageError
from dkdetr.losses import criterion
from tests.training_world import checkpoint_of, difference, make_world, settings

CONFIG = settings(optim={"epochs": 7})  # 21 steps: one line of the diary


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    world = make_world(tmp_path_factory.mktemp("world"))
    train(world.request("plain", CONFIG))
    return world


def test_the_diary_has_rates_memory_losses_by_part_and_the_time_left(world) -> None:
    first, last = read_metrics(world.root / "runs" / "plain" / "metrics.jsonl")
    wanted = {"class", "bbox", "giou", "skd", "rkd_image", "rkd_batch", "grad_norm",
              "kd_regions_per_image", "kd_margin", "kd_anchor_giou", "learning_rate",
              "images_per_s", "step_s", "data_wait", "memory_gib", "eta_s", "epoch"}  # fmt: skip
    assert wanted <= first.keys()
    assert (first["iteration"], last["iteration"]) == (20, 21)
    assert last["eta_s"] == 0.0
    assert first["eta_s"] == pytest.approx(first["step_s"], abs=0.06)


def test_pictures_are_drawn_and_change_nothing(world) -> None:
    train(world.request("drawn", CONFIG, watch=Watch(pictures_every=7)))
    assert difference(checkpoint_of(world, "plain"), checkpoint_of(world, "drawn")) == ""
    pictures = sorted((world.root / "runs" / "drawn" / "pictures").glob("*.png"))
    assert len(pictures) == 3 * 4
    drawn = np.asarray(Image.open(pictures[-1]).convert("RGB")).reshape(-1, 3)
    colours = set(map(tuple, drawn.tolist()))
    assert {(0, 192, 64), (255, 48, 48), (48, 128, 255)} <= colours  # object, detection, region


def test_tensorboard_gets_the_diary_s_numbers(world) -> None:
    train(world.request("board", CONFIG, watch=Watch(trackers=("tensorboard",))))
    events = EventAccumulator(str(world.root / "runs" / "board" / "tensorboard")).Reload()
    first = read_metrics(world.root / "runs" / "board" / "metrics.jsonl")[0]
    assert events.Scalars("skd")[0].value == pytest.approx(first["skd"], rel=1e-5)
    assert [event.step for event in events.Scalars("total")] == [20, 21]


def test_a_tracker_that_is_not_installed_is_named_before_the_first_step(world) -> None:
    with pytest.raises(UsageError, match="pip install trackio"):
        train(world.request("tracked", CONFIG, watch=Watch(trackers=("trackio",))))
    assert not (world.root / "runs" / "tracked" / "checkpoints").exists()


def test_a_tracker_that_is_installed_is_told_everything(world, monkeypatch) -> None:
    told = []
    library = types.ModuleType("wandb")
    library.init = lambda **words: told.append(words["name"])
    library.log = lambda values: told.append(values["iteration"])
    library.finish = lambda: told.append("finished")
    monkeypatch.setitem(sys.modules, "wandb", library)
    train(world.request("wand", CONFIG, watch=Watch(trackers=("wandb",))))
    assert told == ["wand", 20, 21, "finished"]


def test_a_tracker_is_told_numbers_alone(world, monkeypatch) -> None:
    """Figures that there are none of are null in the diary; the libraries plot numbers."""
    told = []
    monkeypatch.setattr(recent_figures, "_mean", lambda _: None)
    monkeypatch.setattr(TensorBoard, "write", lambda _, iteration, values: told.append(values))
    board = Watch(trackers=("tensorboard",))
    train(world.request("nothing", CONFIG, watch=board, until_iteration=2))
    assert "total" not in told[0]
    assert None not in told[0].values()
    (line,) = read_metrics(world.root / "runs" / "nothing" / "metrics.jsonl")
    assert line["total"] is None


@pytest.mark.parametrize(("until", "steps"), [(None, 21), (0, 0), (1, 3)])
def test_a_run_ends_before_the_epoch_it_is_to_end_before(world, until, steps) -> None:
    summary = train(world.request(f"until {until}", CONFIG, until_epoch=until))
    assert summary.iterations == steps


def test_a_profile_leaves_trace_and_table_and_ends(world, capsys) -> None:
    before = dict(vars(criterion))
    summary = train(world.request("profiled", CONFIG, watch=Watch(profile_steps=2)))
    assert summary.iterations == WARMUP_STEPS + 2
    folder = world.root / "runs" / "profiled" / "profile"
    assert (folder / "trace.json").stat().st_size > 10_000
    table = (folder / "table.txt").read_text()
    assert "aten::" in table
    assert "Self CPU" in capsys.readouterr().out
    shares = {line[:18].strip(): line.split() for line in table.splitlines()}
    wanted = set(PARTS) - {"masks"}  # there is no mask head
    assert wanted <= shares.keys()
    ms = {name: float(shares[name][-3]) for name in (*wanted, REST)}
    assert all(ms[name] > 0 for name in wanted)
    whole = float(shares["a whole step"][-2])
    assert sum(ms.values()) == pytest.approx(whole, abs=0.1)
    assert 0 <= ms[REST] < 0.5 * whole  # what no mark covers: saving, the diary, the loop
    assert vars(criterion) == before  # the marks are gone


def test_smoke_goes_through_every_phase_and_leaves_nothing(world, capsys) -> None:
    # It begins afresh, whatever burn-in is named, and what is to be watched is not its concern.
    watch = Watch(trackers=("wandb",), pictures_every=1, profile_steps=1)
    burn_in = world.root / "runs" / "plain"
    summary = smoke(world.request("smoked", CONFIG, start_from=burn_in, watch=watch))
    assert summary.iterations == 4
    assert {"skd", "rkd_batch"} <= summary.last_losses.keys()
    assert not list((world.root / "runs").glob("smoked*"))
    assert "resumed" in capsys.readouterr().err


def test_smoke_finds_that_the_burn_in_is_not_there(world) -> None:
    absent = world.root / "runs" / "nowhere"
    with pytest.raises(DataError, match="nowhere"):
        smoke(world.request("smoked", CONFIG, start_from=absent))
    assert not list((world.root / "runs").glob("smoked*"))


@pytest.mark.parametrize(("share", "places"), [(1, 0), (4, 1), (8, 1)])
def test_smoke_leaves_a_small_batch_what_company_it_has_room_for(share: int, places: int) -> None:
    """A tenth of 64 images are 6 in the run itself; of 8 images' small batches it would be none."""
    config = settings(kd={"rkd": {"neighbor_fraction": 0.1}})
    fraction = _with_company(config, share).neighbor_fraction
    assert (places_for_neighbors(fraction, share) if fraction else 0) == places
    assert _with_company(CONFIG, share) == CONFIG.kd.rkd


def test_smoke_has_the_outlines_of_a_student_with_masks(tmp_path) -> None:
    world = make_world(tmp_path)
    annotations = load_split(world.split, world.root).annotations_path
    document = json.loads(annotations.read_text())
    for each in document["annotations"]:
        x, y, width, height = each["bbox"]
        each["segmentation"] = [[x, y, x + width, y, x + width, y + height, x, y + height]]
    annotations.write_text(json.dumps(document))
    done = smoke(world.request("smoked", settings(student={"mask_head": True})))
    assert {"skd", "dice"} <= done.last_losses.keys()


def test_deterministic_is_switched_on(world) -> None:
    try:
        train(world.request("exact", CONFIG, deterministic=True, until_iteration=2))
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
