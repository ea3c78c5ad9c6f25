"""The neighbour commands and the page: what they say is what the pictures show."""

import base64
import io
import json
import signal
import subprocess
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cache.neighbor_lists import load_parameters
from cache.neighbors import NeighborSettings
from cache.spec import CacheError, StaleCacheError
from cache.store import open_cache
from dkdetr.errors import DataError, PreemptedError, UsageError
from pipeline.browse import browse_cache
from pipeline.neighbor_stage import add_neighbors, ensure_neighbors
from pipeline.region_views import RegionViews, neighbors_command
from tests.colored_cache import BOXES, COLORS, KINDS, kind_of, write_colored_cache
from tests.e2e import commands
from tests.e2e.commands import call, call_well, start_dkdetr

EVIL = ("<b>red</b>", 'green" onload="x', "blue & <script>alert(1)</script>", "yellow")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = write_colored_cache(tmp_path_factory.mktemp("colored"), names=EVIL)
    ensure_neighbors(path, NeighborSettings(k=5))
    return path


def test_a_region_s_neighbours_have_its_colour(path):
    views = RegionViews(path)
    for image_id in (1, 4, 9):
        for region in range(3):
            found = views.neighbors(image_id, region)
            assert found.region.names[0].name == EVIL[kind_of(image_id, region)]
            assert found.region.names[0].is_base == (kind_of(image_id, region) != 2)
            assert len(found.neighbors) == 5
            cosines = [each.cosine for each in found.neighbors]
            assert cosines == sorted(cosines, reverse=True)
            for each in found.neighbors:
                other = each.region
                assert other.image_id != image_id
                assert kind_of(other.image_id, other.region) == kind_of(image_id, region)
                assert other.box_xyxy == tuple(BOXES[other.region])
                mine = open_cache(path).rows(image_id).region_embeddings[region]
                theirs = open_cache(path).rows(other.image_id).region_embeddings[other.region]
                assert each.cosine == pytest.approx(float(mine @ theirs), abs=1e-3)


def test_impossible_questions_are_answered_in_a_line(path, tmp_path):
    views = RegionViews(path)
    with pytest.raises(CacheError, match=r"region 3 of image 2 takes no part .* 0\.80"):
        views.neighbors(2, 3)
    with pytest.raises(CacheError, match="regions 0 to 3"):
        views.neighbors(2, 7)
    with pytest.raises(CacheError, match="holds no image 77; its ids are from 1 to 12"):
        views.objects(77)
    with pytest.raises(UsageError, match="--image too"):
        neighbors_command(path, None, 3, {}, rebuild=False)
    others = {
        "--neighbors": {"k": 32},
        "--per-image": {"per_image": 9, "k": 5},
        "--exact-below": {"exact_below": 7},
        "--device": {"device": "cpu"},
    }
    for word, other in others.items():
        with pytest.raises(UsageError, match=f"not made with {word} as given here: add --rebuild"):
            neighbors_command(path, 4, 1, other, rebuild=False)
    bare = write_colored_cache(tmp_path / "bare", num_images=3)
    with pytest.raises(StaleCacheError, match="no neighbour lists; next: dkdetr cache neighbors"):
        RegionViews(bare)


def test_lists_are_built_once_and_again_when_settings_change(path, tmp_path):
    bare = write_colored_cache(tmp_path / "bare", num_images=4)
    built = ensure_neighbors(bare, NeighborSettings(k=3))
    assert built.made
    before = (bare / "neighbors" / "manifest.json").stat().st_mtime_ns
    there = ensure_neighbors(bare, NeighborSettings(k=3))
    assert not there.made
    assert "--rebuild" in there.lines()[0]
    assert (bare / "neighbors" / "manifest.json").stat().st_mtime_ns == before
    assert ensure_neighbors(bare, NeighborSettings(k=2)).made
    assert load_parameters(bare)["k"] == 2
    assert ensure_neighbors(bare, NeighborSettings(k=2), rebuild=True).made
    (bare / "neighbors" / "sims.npy").write_bytes(b"spoilt")
    assert ensure_neighbors(bare, NeighborSettings(k=2)).made
    assert add_neighbors(bare) == ()
    assert load_parameters(bare)["k"] == 2  # the settings that somebody chose are kept


def test_a_build_that_fails_is_a_note_and_an_exit_code(tmp_path, monkeypatch):
    bare = write_colored_cache(tmp_path / "bare", num_images=3)
    _shadow_faiss(tmp_path, monkeypatch, "raise ModuleNotFoundError('faiss')")
    (note,) = add_neighbors(bare)
    assert "faiss, which is not installed" in note
    with pytest.raises(CacheError, match="pip install"):
        ensure_neighbors(bare, NeighborSettings())


def test_a_file_that_cannot_be_written_is_a_note_too(tmp_path, monkeypatch):
    bare = write_colored_cache(tmp_path / "bare", num_images=3)
    _shadow_faiss(tmp_path, monkeypatch, "raise OSError(5, 'Input/output error')")
    (note,) = add_neighbors(bare)
    assert "Input/output error" in note
    assert "whole without them" in note
    with pytest.raises(OSError, match="Input/output error"):
        ensure_neighbors(bare, NeighborSettings())


@pytest.mark.parametrize("told", ["both", "builder"])
def test_sigterm_of_the_whole_group_is_no_note(tmp_path, monkeypatch, told):
    """The builder dies of it at once, before this process has looked at its flag."""
    bare = write_colored_cache(tmp_path / "bare", num_images=3)
    kill = "import os, signal; os.kill({}, signal.SIGTERM)\n"
    to_both = kill.format("os.getppid()") if told == "both" else ""
    _shadow_faiss(tmp_path, monkeypatch, to_both + kill.format("os.getpid()"))
    with pytest.raises(PreemptedError, match="the same command builds them"):
        add_neighbors(bare)


def _shadow_faiss(tmp_path, monkeypatch, code):
    (tmp_path / "shadow").mkdir()
    (tmp_path / "shadow" / "faiss.py").write_text(f"{code}\n")
    monkeypatch.syspath_prepend(tmp_path / "shadow")  # a spawned process takes the path over


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in {"meta", "img", "br", "rect", "image"}:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_shows_the_crops_of_its_boxes_and_nothing_from_elsewhere(path, tmp_path):
    out = tmp_path / "browse.html"
    summary = browse_cache(path, out, images="4", data_root=tmp_path)
    assert summary.image_ids == (1, 5, 8, 12)
    assert summary.num_regions == 4 * 3
    assert summary.num_crops == 12 * (1 + 5)
    source = out.read_text()
    page = _Page()
    page.feed(source)
    assert page.open == []
    crops = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(crops) == summary.num_crops
    for crop in crops:
        image, region = int(crop["data-image"]), int(crop["data-region"])
        kind, _, data = crop["src"].partition(",")
        assert kind.startswith("data:image/")
        picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))
        x1, y1, x2, y2 = (float(side) for side in crop["data-box"].split())
        assert (x1, y1, x2, y2) == tuple(BOXES[region])
        assert picture.shape[:2] == (y2 - y1, x2 - x1)
        np.testing.assert_allclose(picture.mean((0, 1)), COLORS[kind_of(image, region)], atol=6)
    # Self-contained, no scripts, and names are text whatever they hold.
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "link", "iframe", "object"}
    for _, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href"):
            assert attributes.get(name, "#").startswith(("data:", "#"))
    assert "http:" not in source
    assert "https:" not in source
    assert "<script" not in source
    assert "<b>red" not in source
    shown = " ".join(page.text)
    assert all(name in shown for name in EVIL)


def test_images_are_chosen_by_number_or_by_id(path, tmp_path):
    page = tmp_path / "page.html"
    chosen = browse_cache(path, page, images="7,3", data_root=tmp_path)
    assert chosen.image_ids == (7, 3)
    assert browse_cache(path, page, images="99", data_root=tmp_path).image_ids == tuple(
        range(1, 13)
    )
    with pytest.raises(CacheError, match="holds no image 400"):
        browse_cache(path, page, images="400,", data_root=tmp_path)
    for wrong in ("all", "0", "-3", ""):
        with pytest.raises(UsageError, match="--images"):
            browse_cache(path, page, images=wrong, data_root=tmp_path)


def test_pictures_that_are_gone(tmp_path):
    path = write_colored_cache(tmp_path / "w", num_images=3)
    ensure_neighbors(path, NeighborSettings(k=2))
    file = tmp_path / "w" / "images" / "2.png"
    file.write_bytes(file.read_bytes()[:60])
    browse_cache(path, tmp_path / "page.html", images="3", data_root=tmp_path)
    assert "not readable" in (tmp_path / "page.html").read_text()
    file.unlink()
    with pytest.raises(DataError, match=r"1 of 3 images are not under"):
        browse_cache(path, tmp_path / "page.html", images="3", data_root=tmp_path)


def test_the_commands(path, tmp_path):
    words = ("cache", "neighbors", str(path), "--neighbors", "5")
    assert "are there already" in call_well(*words, cwd=tmp_path)
    table = json.loads(call_well(*words, "--image", "4", "--box", "1", "--json", "-", cwd=tmp_path))
    assert (table["region"]["image_id"], table["region"]["region"]) == (4, 1)
    assert len(table["neighbors"]) == 5
    first = table["neighbors"][0]
    assert set(first) == {"region", "cosine"}
    assert first["region"]["names"][0]["name"] == EVIL[kind_of(4, 1)]
    lines = call_well(*words, "--image", "4", cwd=tmp_path).splitlines()
    assert len(lines) == 4
    assert KINDS[kind_of(4, 0)] in lines[1]
    call_well("cache", "neighbors", str(path), "--image", "4", cwd=tmp_path)
    other = call(*words[:-1], "16", "--image", "4", cwd=tmp_path)  # the default, and yet other
    assert other.returncode == 2
    assert "--neighbors as given here" in other.stderr
    wrong = call(*words, "--image", "4", "--box", "3", cwd=tmp_path)
    assert wrong.returncode == 2
    assert "takes no part" in wrong.stderr
    call_well("cache", "browse", str(path), "--images", "1,2", cwd=tmp_path)
    assert (tmp_path / "browse.html").stat().st_size > 10_000


def test_sigterm_ends_the_builder_too(tmp_path, monkeypatch):
    path = write_colored_cache(tmp_path / "w", num_images=6)
    ensure_neighbors(path, NeighborSettings(k=2))
    older = (path / "neighbors" / "manifest.json").read_bytes()
    (tmp_path / "shadow").mkdir()
    slow = "import pathlib, os, time\npathlib.Path(os.environ['MARK']).touch()\ntime.sleep(3600)\n"
    (tmp_path / "shadow" / "faiss.py").write_text(slow)
    monkeypatch.setenv("MARK", str(tmp_path / "mark"))
    monkeypatch.setattr(commands, "ROOT", f"{tmp_path / 'shadow'}:{commands.ROOT}")
    process = start_dkdetr("cache", "neighbors", str(path), "--rebuild", cwd=tmp_path)
    children = _wait_for(tmp_path / "mark", process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == 75, errors
    assert "the same command builds them" in errors
    while any(_alive(child) for child in children):  # it would sleep for an hour
        time.sleep(0.05)
    assert (path / "neighbors" / "manifest.json").read_bytes() == older


def _wait_for(mark, process):
    while not mark.exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    listed = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True, check=True
    )
    return [int(pid) for pid in listed.stdout.split()]


def _alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"
