"""What is refused: before anything is trained or written, and by `--dry-run` as by the command."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from cache.spec import CacheError, StaleCacheError
from dkdetr.errors import DataError, UsageError
from pipeline import build
from pipeline.build import cache_teacher
from pipeline.calibrate import price_cache
from pipeline.crops import CropRule
from pipeline.request import CacheRequest
from tests.e2e.test_fit_proposals import OVERRIDES

both = pytest.mark.parametrize("command", [cache_teacher, price_cache])
Command = Callable[[CacheRequest], object]


@pytest.fixture(autouse=True)
def _no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("it trained for hours first")

    monkeypatch.setattr(build, "fit_proposals", never)
    monkeypatch.setattr("pipeline.calibrate._time_fit", never)


def _fit(request: CacheRequest) -> CacheRequest:
    return replace(
        request, proposals="fit", experiment="pictograms_tiny", overrides=OVERRIDES, fit_epochs=1
    )


def _files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@both
@pytest.mark.parametrize("with_fit", [False, True])
def test_a_folder_of_something_else_is_left_as_it_is(
    request_: CacheRequest, command: Command, with_fit: bool
) -> None:
    request_.out.mkdir()
    (request_.out / "thesis.tex").write_text("years")
    with pytest.raises(CacheError, match=r"holds 'thesis\.tex'") as caught:
        command(_fit(request_) if with_fit else request_)
    assert caught.value.exit_code == 2
    assert _files(request_.out) == ["thesis.tex"]


@both
def test_a_cache_of_other_settings_is_told_before_the_training(
    request_: CacheRequest, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache_teacher(request_)
    monkeypatch.setattr(build, "check_images", None)  # nor are all pictures hashed first
    with pytest.raises(StaleCacheError, match=r"proposals\.source  cache: file  wanted: fit"):
        command(_fit(request_))
    with pytest.raises(StaleCacheError, match=r"crops\.mode"):
        command(replace(request_, crops=CropRule("clip_center")))
    with pytest.raises(StaleCacheError, match=r"proposals\.keep"):
        command(replace(request_, keep=4))


def test_a_cache_of_the_same_settings_has_a_price(request_: CacheRequest) -> None:
    cache_teacher(request_)
    before = _files(request_.out)
    assert price_cache(request_).num_shards == 3
    assert price_cache(replace(request_, prompts="clip7")).num_texts == 21  # embeds no crop again
    assert _files(request_.out) == before


@both
@pytest.mark.parametrize(
    ("word", "changed"),
    [
        ("--experiment", {"experiment": "pictograms_tiny"}),
        ("--set", {"overrides": OVERRIDES}),
        ("--set", {"overrides": ("ops.backend=torch",)}),
        ("--fit-epochs", {"fit_epochs": 2}),
    ],
)
def test_words_of_a_network_that_is_not_trained(
    request_: CacheRequest, command: Command, word: str, changed: dict
) -> None:
    with pytest.raises(UsageError, match=f"trains no network, and {word} would be"):
        command(replace(request_, **changed))


@both
def test_fit_wants_a_split_to_train_on(
    request_: CacheRequest, command: Command, world: Path, tmp_path: Path
) -> None:
    shutil.copy(world / "train.json", tmp_path / "val.json")
    split = f"ovcoco:{world / 'images'}:{tmp_path / 'val.json'}"
    with pytest.raises(UsageError, match="is no training split"):
        command(_fit(replace(request_, split=split)))


@both
def test_batches_that_do_not_divide_are_told_before_the_teacher_is_loaded(
    request_: CacheRequest, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("build", "calibrate"):
        monkeypatch.setattr(f"pipeline.{module}.load_teacher", None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    asked = _fit(request_)  # batches of 4
    asked = replace(asked, overrides=(*asked.overrides, "compute.micro_batches=4"))
    with pytest.raises(UsageError, match="by 2 ranks of 4 micro-batches: lower"):
        command(asked)
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UsageError, match="by 3 ranks: start fewer"):
        command(_fit(request_))
    assert not request_.out.exists()


@both
def test_proposals_of_another_split_or_of_novel_names_are_refused(
    request_: CacheRequest, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(*_: object, **__: object) -> None:
        raise DataError("no weights")

    monkeypatch.setattr("pipeline.calibrate.load_teacher", absent)  # a price goes without
    path = tmp_path / "boxes.json"
    request = replace(request_, proposals=f"file:{path}")
    record = {"bbox": [1, 1, 5, 5], "score": 0.5}
    path.write_text(json.dumps([{"image_id": 999, **record}]))
    with pytest.raises(DataError, match="belongs to another split"):
        command(request)
    path.write_text(
        json.dumps([{"image_id": n, "category_id": 3 + n % 2 * 6, **record} for n in range(1, 36)])
    )
    with pytest.raises(DataError, match="leaks novel categories"):
        command(request)
