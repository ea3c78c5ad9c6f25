"""`--proposals fit` by itself: it learns, resumes bitwise, is reused."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dkdetr.data.splits import Split, load_split
from dkdetr.errors import DataError, MismatchError, PreemptedError, UsageError
from pipeline import fit
from pipeline.fit import fit_plan, fit_proposals
from pipeline.fit_training import NetworkTraining
from pipeline.proposal_network import load_network
from pipeline.proposal_sources import open_source, parse_proposals, prepare_source
from pipeline.proposals import ProposalRule, SourceImage, apply_rule
from pipeline.recall import proposal_recall
from pipeline.request import CacheRequest
from pipeline.source_images import check_images
from tests.e2e.small_coco import write_coco_folder

CPU = torch.device("cpu")
OVERRIDES = (
    "student.backbone.weights=random", "student.backbone.width=16", "student.embed_dim=64",
    "student.num_heads=4", "student.ffn_dim=64", "student.dropout=0.1",
    "data.image_size=64", "data.batch_size=4", "optim.lr=8e-4",
)  # fmt: skip


@pytest.fixture
def request_(tmp_path: Path) -> CacheRequest:
    split = write_coco_folder(tmp_path, "train2017", num_images=12, seed=1)
    return CacheRequest(
        split=split,
        out=tmp_path / "cache",
        experiment="pictograms_tiny",
        overrides=OVERRIDES,
        fit_epochs=2,
        device="cpu",
    )


def _fit(request: CacheRequest) -> tuple[Path, Split]:
    split = load_split(request.split, request.data_root)
    images = check_images(split, decode=False)
    request.out.mkdir(exist_ok=True)
    return fit_proposals(request, split, images, lambda _: None), split


@pytest.mark.parametrize("step", [1, 3, 5])  # the first, an epoch's last, the last but one
def test_a_training_stopped_at_any_step_ends_in_the_same_bits(
    request_: CacheRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    path, _ = _fit(request_)
    whole, facts = load_network(path)
    assert facts["seen"]["iterations"] == 6
    written = path.stat().st_mtime_ns
    _fit(request_)  # the finished one is reused
    assert path.stat().st_mtime_ns == written

    stopped = replace(request_, out=tmp_path / "stopped")
    _terminate_at(step, monkeypatch)
    with pytest.raises(PreemptedError, match=f"at step {step} of 6") as caught:
        _fit(stopped)
    assert caught.value.exit_code == 75
    monkeypatch.undo()
    assert not (stopped.out / "proposals/network.safetensors").exists()
    resumed, _ = load_network(_fit(stopped)[0])
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    assert not (stopped.out / "proposals/fit_state.safetensors").exists()


def test_an_unfinished_training_of_other_settings_is_not_thrown_away_in_silence(
    request_: CacheRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _terminate_at(1, monkeypatch)
    with pytest.raises(PreemptedError):
        _fit(request_)
    file = tmp_path / "own.toml"
    file.write_text('extends = "pictograms_tiny"\n[optim]\nema_decay = 0.9\n')
    monkeypatch.setattr(NetworkTraining, "run", _begun)
    state = request_.out / "proposals/fit_state.safetensors"
    split = load_split(request_.split, request_.data_root)
    images = check_images(split, decode=False)

    def begin(request: CacheRequest, step: int) -> list[str]:
        said: list[str] = []
        with pytest.raises(_BegunError, match=f"^{step}$"):
            fit_proposals(request, split, images, said.append)
        return [line for line in said if str(state) in line]

    assert begin(request_, 1) == []
    (line,) = begin(replace(request_, experiment=str(file)), 0)
    assert "is of other settings or inputs: this one starts at step 0" in line
    state.write_bytes(state.read_bytes()[:1000])
    (line,) = begin(request_, 0)
    assert "cannot be read" in line


class _BegunError(Exception):
    """A training would begin, at this step."""


def _begun(training: NetworkTraining) -> None:
    raise _BegunError(training._iteration)


def _terminate_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sends this process a SIGTERM in the middle of a step of the training."""
    calls = iter(range(1, 100))
    take_step = NetworkTraining._step

    def take_step_and_terminate(*args: object) -> torch.Tensor:
        loss = take_step(*args)  # type: ignore[arg-type]
        if next(calls) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss

    monkeypatch.setattr(NetworkTraining, "_step", take_step_and_terminate)


@pytest.mark.parametrize("epochs", [0, -1])
def test_no_epochs_are_refused_not_taken_for_the_default(
    request_: CacheRequest, epochs: int
) -> None:
    with pytest.raises(UsageError, match=f"--fit-epochs {epochs}"):
        replace(request_, fit_epochs=epochs)


def test_only_proposals_wants_something_to_train(request_: CacheRequest) -> None:
    with pytest.raises(UsageError, match="--only-proposals"):
        replace(request_, only_proposals=True, proposals="fit:elsewhere")


def test_another_split_uses_a_network_by_the_cache_it_lies_in(request_: CacheRequest) -> None:
    path, split = _fit(request_)
    prepared = prepare_source(parse_proposals(f"fit:{request_.out}"), Path("unused"), split)
    source = open_source(prepared, CPU, batch_size=2)
    assert source.identity["source"] == "fit"
    assert source.seen.saw_novel_boxes is False
    assert "person" in source.seen.names
    assert "cat" not in source.seen.names
    assert prepared.endswith(str(path))


def test_other_settings_never_overwrite_the_network_of_a_cache(request_: CacheRequest) -> None:
    _fit(request_)
    (request_.out / "CACHE.json").write_text("{}")
    with pytest.raises(MismatchError, match="trained on other inputs"):
        _fit(replace(request_, fit_epochs=1))


def test_a_broken_picture_does_not_stop_the_training(request_: CacheRequest) -> None:
    split = load_split(request_.split, request_.data_root)
    broken = split.image_path(split.images[3])
    broken.write_bytes(broken.read_bytes()[:100])
    assert _fit(replace(request_, fit_epochs=1))[0].is_file()


def test_too_many_broken_pictures_are_refused_before_the_training(
    request_: CacheRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("it trained for hours first")

    monkeypatch.setattr(NetworkTraining, "run", never)
    split = load_split(request_.split, request_.data_root)
    for image in split.images[3:5]:
        broken = split.image_path(image)
        broken.write_bytes(broken.read_bytes()[:100])
    with pytest.raises(DataError, match=r"2 of 12 .*--max-bad 0\.001 allows \(1\)") as caught:
        _fit(request_)
    assert caught.value.exit_code == 3
    assert str(caught.value).endswith("the same command: nothing was trained yet")
    with pytest.raises(AssertionError, match="trained"):
        _fit(replace(request_, max_bad=0.1))  # ceil(1.2) may be bad


def test_the_plan_is_a_sixth_of_the_experiment_in_small_batches(request_: CacheRequest) -> None:
    split = load_split(request_.split, request_.data_root)
    plan = fit_plan(
        replace(request_, experiment="lvis_r50_70e", overrides=(), fit_epochs=None), split
    )
    assert plan.config.optim.epochs == 12
    assert plan.config.data.batch_size == 12  # no more than there are pictures
    assert plan.config.optim.lr == pytest.approx(2.5 * 8e-4 * 12 / 128)
    assert not plan.config.kd.enabled
    with pytest.raises(UsageError, match="--experiment"):
        fit_plan(replace(request_, experiment=None), replace(split, name="coco:a:b"))


def test_what_decides_no_weight_asks_for_no_other_network(request_: CacheRequest) -> None:
    split = load_split(request_.split, request_.data_root)
    images = check_images(split, decode=False)
    how = ("data.workers=3", "data.cache_mode=resident", "student.masks_at_once=4",
           "compute.micro_batches=2", "compute.activation_checkpointing=true")  # fmt: skip
    keys = [
        fit._fit_key(fit_plan(replace(request_, overrides=given), split), split, images)
        for given in ((), how, ("data.image_size=64",))
    ]
    assert keys[0] == keys[1] != keys[2]


def test_training_finds_more_objects_than_chance(request_: CacheRequest) -> None:
    recalls = []
    for epochs in (1, 12):
        out = request_.out.with_name(f"epochs{epochs}")
        path, split = _fit(replace(request_, out=out, fit_epochs=epochs))
        source = open_source(f"network:{path}", CPU, batch_size=4)
        recalls.append(_base_recall(split, source))
    assert recalls[1] > recalls[0] + 0.1, recalls


def _base_recall(split: Split, source) -> float:
    from dkdetr.data.image_files import read_image

    boxes: dict[int, np.ndarray] = {}
    for image in split.images:
        hw = (image.height, image.width)
        picture = SourceImage(image.image_id, read_image(split.image_path(image), expected_hw=hw))
        raw = source.propose([picture])[0]
        kept = apply_rule(raw, ProposalRule(keep=10), height=hw[0], width=hw[1])
        boxes[image.image_id] = kept.boxes_xyxy
    base, _ = proposal_recall(split, boxes, boxes.__getitem__, budgets=(10,))
    return base.shares[10]
