"""`cache repair` where the network of `fit` is damaged: nothing is taken out before it is back."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cache.damage import find_damage, uncommit
from cache.layout import load_provenance, write_provenance
from cache.location import cache_path
from cache.spec import StaleCacheError
from cli import app
from dkdetr.data.splits import load_split
from dkdetr.errors import CorruptArtefactError, MismatchError
from pipeline import build
from pipeline.build import cache_teacher
from pipeline.fit import fit_proposals
from pipeline.inspect import verify_and_report
from pipeline.proposal_network import load_network
from pipeline.repair import repair_cache
from pipeline.request import CacheRequest
from pipeline.source_images import check_images
from pipeline.teacher_model import tensors_sha256
from tests.cache_samples import committed_bytes
from tests.e2e.test_fit_proposals import OVERRIDES
from tests.e2e.tiny_stage_one import one_pixel_changed, tiny_request

NETWORK, REMADE = "proposals/network.safetensors", "proposals/remade.safetensors"
ROWS = "data.zarr/objectness/c/1/0"


@pytest.fixture(scope="module")
def made(
    world: Path, teacher_spec: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[CacheRequest, str]:
    """A cache by `fit` that lies where no test harms it, and a hash of its network."""
    request = replace(
        tiny_request(world, teacher_spec, tmp_path_factory.mktemp("made") / "cache"),
        proposals="fit", experiment="pictograms_tiny", overrides=OVERRIDES, fit_epochs=1,
    )  # fmt: skip
    cache_teacher(request)
    return request, _weights(request.out)


@pytest.fixture
def cache(made: tuple[CacheRequest, str], tmp_path: Path) -> Path:
    return Path(shutil.copytree(made[0].out, tmp_path / "cache"))


@pytest.fixture(scope="module")
def other_network(made: tuple[CacheRequest, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network of `fit` of two epochs, where the cache's was trained for one."""
    out = tmp_path_factory.mktemp("other") / "cache"
    return fit_proposals(
        replace(made[0], out=out, fit_epochs=2),
        split := load_split(made[0].split, made[0].data_root),
        check_images(split, decode=False),
        print,
    )


def _weights(cache: Path) -> str:
    return tensors_sha256(load_network(cache / NETWORK)[0])


def _flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 16
    file.write_bytes(data)


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:1000])


def _committed(cache: Path) -> dict[str, bytes]:
    """Returns the cache's files without the network and the lease."""
    files = committed_bytes(cache)
    return {name: data for name, data in files.items() if not name.startswith(("prop", ".lock"))}


@pytest.mark.parametrize("harm", [_flip, _cut, Path.unlink])
def test_the_network_is_trained_anew_while_the_cache_still_stands(
    cache: Path, made: tuple[CacheRequest, str], harm: Callable[[Path], None]
) -> None:
    before = _committed(cache)
    harm(cache / NETWORK)
    _flip(cache / ROWS)
    harmed = _committed(cache)
    stood: list[bool] = []

    def say(line: str) -> None:
        if "training a network" in line:
            stood.append(_committed(cache) == harmed)

    summary = repair_cache(cache, say=say)
    assert stood == [True]
    assert summary.repaired == ("shard 000001", NETWORK)
    assert _committed(cache) == before
    assert _weights(cache) == made[1]
    assert [file.name for file in (cache / "proposals").iterdir()] == ["network.safetensors"]


@pytest.mark.parametrize(
    ("harm", "told"), [(_cut, "is no proposal network"), (Path.unlink, "network of fit is missing")]
)
def test_a_broken_or_lost_network_alone_is_told_and_repaired(
    cache: Path, made: tuple[CacheRequest, str], harm: Callable[[Path], None], told: str
) -> None:
    harm(cache / NETWORK)
    if harm is _cut:
        with pytest.raises(CorruptArtefactError, match=f"next: dkdetr cache repair {cache}"):
            cache_teacher(replace(made[0], out=cache))
    result = CliRunner().invoke(app, ["cache", "verify", str(cache)])
    assert result.exit_code == 5, result.output
    assert told in result.output
    assert "recall of base objects" in result.output  # the cache itself is whole
    assert f"next: dkdetr cache repair {cache}" in result.output
    result = CliRunner().invoke(app, ["cache", "repair", str(cache)])
    assert result.exit_code == 0, result.output
    assert f"repaired  {NETWORK}" in result.output
    assert _weights(cache) == made[1]
    assert repair_cache(cache).repaired == ()


def test_an_experiment_that_asks_for_a_gpu_s_attention_is_repaired_without_one(
    cache: Path, tmp_path: Path
) -> None:
    experiment = tmp_path / "gpu.toml"
    experiment.write_text(
        'extends = "pictograms_tiny"\nname = "pictograms_tiny"\n[ops]\nbackend = "triton"\n'
    )
    provenance = load_provenance(cache)
    recorded = provenance["request"] | {"experiment": str(experiment)}
    write_provenance(cache, provenance | {"request": recorded})
    before = (cache / ROWS).read_bytes()
    _flip(cache / ROWS)
    assert repair_cache(cache).same_bytes
    assert (cache / ROWS).read_bytes() == before


def test_a_network_that_comes_out_otherwise_leaves_the_cache_as_it_is(cache: Path) -> None:
    provenance = load_provenance(cache)
    write_provenance(cache, provenance | {"request": provenance["request"] | {"fit_epochs": 2}})
    _flip(cache / NETWORK)
    _flip(cache / ROWS)
    before, trained = committed_bytes(cache), []
    for _ in range(2):
        with pytest.raises(StaleCacheError, match=r"proposals\.weights_sha256 +cache: \w+.* want"):
            repair_cache(cache, say=trained.append)
        after = committed_bytes(cache)
        assert after.pop(REMADE)  # kept: another start compares it at once
        assert {name: data for name, data in after.items() if not name.startswith(".lock")} == {
            name: data for name, data in before.items() if not name.startswith(".lock")
        }
    assert sum("training a network" in line for line in trained) == 1


def test_another_network_in_its_place_is_found_and_replaced(
    cache: Path, made: tuple[CacheRequest, str], other_network: Path
) -> None:
    shutil.copyfile(other_network, cache / NETWORK)
    assert _weights(cache) != made[1]
    told = f"{cache / NETWORK}: another network than the cache was made with"
    assert verify_and_report(cache, made[0].data_root).report.problems == (told,)
    said: list[str] = []
    assert repair_cache(cache, say=said.append).repaired == (NETWORK,)
    assert any("another network than the cache was made with" in line for line in said)
    assert _weights(cache) == made[1]
    assert verify_and_report(cache, made[0].data_root).report.good


def test_a_network_behind_a_url_is_read_like_one_in_a_folder(
    cache: Path, made: tuple[CacheRequest, str]
) -> None:
    url = cache_path(f"file://{cache}")
    assert verify_and_report(url, made[0].data_root).report.good
    _cut(cache / NETWORK)
    (problem,) = verify_and_report(url, made[0].data_root).report.problems
    assert f"'file://{cache / NETWORK}' is no proposal network" in problem


def test_a_repair_that_fails_before_or_after_the_training_goes_on_where_it_was(
    cache: Path, made: tuple[CacheRequest, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _cut(cache / NETWORK)
    _flip(cache / ROWS)
    before = _committed(cache)
    _, images, _ = made[0].split.split(":")
    said: list[str] = []
    told = r"images\.content_xxh3_128(.|\n)*nothing was taken"
    with (
        one_pixel_changed(min(Path(images).glob("*.png"))),
        pytest.raises(StaleCacheError, match=told),
    ):
        repair_cache(cache, say=said.append)
    assert not any("training a network" in line for line in said)  # known before it

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    for moment in ("uncommit", "_adopt_remade", "create_or_resume"):
        with monkeypatch.context() as patched:
            patched.setattr(build, moment, killed)
            with pytest.raises(KeyboardInterrupt):
                repair_cache(cache, say=said.append)
        if moment == "uncommit":
            assert _committed(cache) == before
    repair_cache(cache, say=said.append)
    assert sum("training a network" in line for line in said) == 1
    assert _weights(cache) == made[1]
    assert [file.name for file in (cache / "proposals").iterdir()] == ["network.safetensors"]
    assert repair_cache(cache).repaired == ()


def test_single_shards_ask_nothing_of_a_network_that_they_do_not_need(cache: Path) -> None:
    _cut(cache / NETWORK)
    assert repair_cache(cache, shards=[0]).repaired == ()


def test_without_provenance_the_command_names_no_repair(
    cache: Path, made: tuple[CacheRequest, str]
) -> None:
    _cut(cache / NETWORK)
    (cache / "provenance.json").unlink()
    with pytest.raises(CorruptArtefactError, match="next: delete it"):
        cache_teacher(replace(made[0], out=cache))


def test_changed_pictures_and_a_lost_head_never_train_over_the_network(
    cache: Path, made: tuple[CacheRequest, str]
) -> None:
    _flip(cache / "CACHE.json")
    before = committed_bytes(cache)
    _, images, _ = made[0].split.split(":")
    with one_pixel_changed(min(Path(images).glob("*.png"))):
        with pytest.raises(MismatchError, match="was trained on other inputs"):
            repair_cache(cache)
        assert committed_bytes(cache) == before
        uncommit(find_damage(cache))  # as by a repair that is cut short after that
        with pytest.raises(MismatchError, match="was trained on other inputs"):
            cache_teacher(replace(made[0], out=cache))
    assert _weights(cache) == made[1]
