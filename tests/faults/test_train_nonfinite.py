"""Twenty ways to break a loss: each is stopped or skipped as promised, none is ever saved."""

import json
import math
import re
from dataclasses import replace

import pytest
import torch

import dkdetr.engine.run_state as run_state
from dkdetr.engine import optim
from dkdetr.engine.checkpoint import load_latest
from dkdetr.engine.step import MAX_OVERFLOWS, TrainingStep
from dkdetr.engine.train import train
from dkdetr.errors import NonFiniteLossError
from tests.training_world import checkpoint_of, make_world, settings

NAN, INF = math.nan, math.inf
STEP = 8  # of 18; distillation began at 6


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def _in_image(value):
    def spoil(step, group, number):
        group[number].images.pixels[0, 0, 5, 5] = value

    return spoil


def _in_box(value):
    def spoil(step, group, number):
        group[number].targets[0].boxes_cxcywh[0, 2] = value

    return spoil


def _in_embedding(value):
    def spoil(step, group, number):
        group[number].regions.embeddings[group[number].regions.valid] = value

    return spoil


def _in_anchor(value):
    def spoil(step, group, number):
        group[number].regions.boxes_cxcywh[0, 0, 0] = value

    return spoil


def _in_weight(name, value):
    def spoil(step, group, number):
        dict(step.student.named_parameters())[name].data.view(-1)[0] = value

    return spoil


def _in_gradient(step, group, number):
    weight = dict(step.student.named_parameters())["trunk.level_embeddings"]
    weight.register_hook(lambda gradient: gradient * NAN)


DECODER = "decoder.layers.1.feed_forward.linear2.weight"
INJECTIONS = {
    "image nan": (_in_image(NAN), "image"),
    "image inf": (_in_image(INF), "image"),
    "image -inf": (_in_image(-INF), "image"),
    "image nan in the second part": (_in_image(NAN), "image"),
    "box nan": (_in_box(NAN), "target boxes"),
    "box inf": (_in_box(INF), "target boxes"),
    "box nan in the second part": (_in_box(NAN), "target boxes"),
    "teacher nan": (_in_embedding(NAN), "teacher embeddings"),
    "teacher inf": (_in_embedding(INF), "teacher embeddings"),
    "teacher nan in the second part": (_in_embedding(NAN), "teacher embeddings"),
    "anchor nan": (_in_anchor(NAN), "region boxes"),
    "anchor inf": (_in_anchor(INF), "region boxes"),
    "backbone weight nan": (_in_weight("trunk.backbone.stem.0.weight", NAN), "weight trunk.backb"),
    "encoder weight nan": (_in_weight("trunk.level_embeddings", NAN), "weight trunk.level_emb"),
    "decoder weight nan": (_in_weight(DECODER, NAN), f"weight {DECODER}"),
    "decoder weight inf": (_in_weight(DECODER, INF), f"weight {DECODER}"),
    "huge weight": (_in_weight(DECODER, 1e38), "output of decoder.layers.1"),
    "kd content nan": (_in_weight("kd_content", NAN), "weight kd_content"),
    "kd content inf": (_in_weight("kd_content", INF), "weight kd_content"),
    "gradient nan": (_in_gradient, "gradient of"),
}
assert len(INJECTIONS) == 20
QUICK = {"image nan in the second part", "teacher inf", "huge weight", "gradient nan"}


def spoil_at(monkeypatch, steps, spoil, *, part=0) -> None:
    """Lets `spoil` loose on the group of these steps."""
    real = TrainingStep.__call__

    def spoiled(self, group, *, epoch, iteration):
        if iteration in steps:
            spoil(self, group, part)
        return real(self, group, epoch=epoch, iteration=iteration)

    monkeypatch.setattr(TrainingStep, "__call__", spoiled)


@pytest.mark.parametrize(
    "kind",
    [pytest.param(k, marks=[] if k in QUICK else pytest.mark.slow) for k in INJECTIONS],
)
def test_an_injection_ends_the_run_with_a_report_and_is_not_saved(world, monkeypatch, kind) -> None:
    spoil, suspect = INJECTIONS[kind]
    part = 1 if "second" in kind else 0
    spoil_at(monkeypatch, {STEP}, spoil, part=part)
    config = settings(compute={"micro_batches": 2}, checkpoint_every_s=0.0)
    with pytest.raises(NonFiniteLossError, match="not finite") as raised:
        train(world.request(kind, config))
    assert raised.value.exit_code == 8
    folder = world.root / "runs" / kind
    dump = json.loads((folder / "nonfinite" / f"step_{STEP:08d}_rank0.json").read_text())
    assert dump["iteration"] == STEP
    assert dump["first_bad_tensor"].startswith(suspect)
    assert len(dump["image_ids"]) in (2, 4)
    saved = checkpoint_of(world, kind)
    assert saved.progress.iteration == STEP
    assert all(v.isfinite().all() for state in (saved.student, saved.average)
               for v in state.values())  # fmt: skip


def test_the_report_names_the_part_s_images_alone(world, monkeypatch) -> None:
    seen = []

    def spoil(step, group, number):
        seen.extend(group[number].images.image_ids)
        group[number].images.pixels[0, 0, 5, 5] = NAN

    spoil_at(monkeypatch, {STEP}, spoil, part=1)
    with pytest.raises(NonFiniteLossError) as raised:
        train(world.request("named", settings(compute={"micro_batches": 2})))
    assert f"images {seen}" in str(raised.value)


def _with_scaler(monkeypatch) -> None:
    """fp16 with its scaler on a CPU, which the settings refuse because it is slow."""
    monkeypatch.setattr(run_state, "training_type", lambda *_: torch.float16)


@pytest.mark.parametrize("kind", ["image nan", "box inf", "teacher nan", "gradient nan"])
def test_under_fp16_a_step_is_skipped_and_counted(world, monkeypatch, kind) -> None:
    _with_scaler(monkeypatch)
    spoil, _ = INJECTIONS[kind]
    once = []

    def spoil_once(step, group, number):
        spoil(step, group, number)
        once.append({name: v.clone() for name, v in step.student.state_dict().items()})

    spoil_at(monkeypatch, {STEP}, spoil_once)
    if kind == "gradient nan":  # its hook stays with the weight: end after this step
        summary = train(world.request(f"skip {kind}", settings(), until_iteration=STEP + 1))
    else:
        summary = train(world.request(f"skip {kind}", settings()))
        assert summary.iterations == 18
        assert summary.last_losses["skipped_steps"] >= 1
    diary = (world.root / "runs" / f"skip {kind}" / "metrics.jsonl").read_text()
    assert not re.search("NaN|Infinity", diary)  # which are no JSON
    line = json.loads(diary.splitlines()[-1])
    assert line["skipped_steps"] >= 1
    none_taken = line["skipped_steps"] == line["iteration"]
    assert all((line[name] is None) == none_taken for name in ("total", "grad_norm"))
    saved = load_latest(world.root / "runs" / f"skip {kind}" / "checkpoints")
    assert saved is not None
    state = saved[1].student
    assert all(value.isfinite().all() for value in state.values())
    if kind == "gradient nan":
        assert all(torch.equal(state[name], value) for name, value in once[0].items())


def test_a_fused_update_is_forbidden_where_the_norm_is(world, monkeypatch) -> None:
    """As on a GPU, where the process learns of it after the update was queued; fp16 and not."""
    monkeypatch.setattr(optim, "_may_fuse", lambda _: True)
    spoil_at(monkeypatch, {STEP}, _in_image(NAN))
    config = replace(settings(), checkpoint_every_s=0.0)
    with pytest.raises(NonFiniteLossError, match="bad tensor: image"):
        train(world.request("fused", config))
    stopped = checkpoint_of(world, "fused")
    assert stopped.progress.iteration == STEP
    assert all(group["fused"] for group in stopped.optimizer["param_groups"])
    _with_scaler(monkeypatch)
    summary = train(world.request("fused fp16", settings()))
    assert summary.iterations == 18
    assert summary.last_losses["skipped_steps"] >= 1
    moments = checkpoint_of(world, "fused fp16").optimizer["state"].values()
    assert all(value.isfinite().all() for each in moments for value in each.values())
    assert max(each["step"].item() for each in moments) == 18 - summary.last_losses["skipped_steps"]


def test_more_than_ten_in_a_row_end_the_run_across_a_resumed_start_too(world, monkeypatch) -> None:
    _with_scaler(monkeypatch)
    # The scaler begins high: the very first steps overflow by themselves.
    config = settings(optim={"epochs": 10, "lr_drop_epochs": [8]})
    spoil_at(monkeypatch, set(range(14, 30)), _in_image(NAN))
    train(world.request("row", config, until_iteration=19))
    with pytest.raises(NonFiniteLossError):
        train(world.request("row", config))
    dumps = world.root / "runs" / "row" / "nonfinite"
    dump = json.loads((dumps / f"step_{14 + MAX_OVERFLOWS:08d}_rank0.json").read_text())
    assert dump["overflows"] == MAX_OVERFLOWS + 1


def test_weights_that_are_not_finite_are_never_saved(world) -> None:
    config = replace(settings(), checkpoint_every_s=0.0)
    request = world.request("guard", config, until_iteration=2)
    train(request)
    real = run_state.RunState.train_on

    def broken_after(self, group, *, epoch_length):
        result = real(self, group, epoch_length=epoch_length)
        self.student.trunk.level_embeddings.data[0, 0] = NAN
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_state.RunState, "train_on", broken_after)
        with pytest.raises(NonFiniteLossError, match=r"trunk\.level_embeddings"):
            train(world.request("guard", config))
    assert checkpoint_of(world, "guard").progress.iteration == 2
