"""The small teacher: its vocabulary, its crops, and the weights that ship with the package."""

import hashlib
import json
import re
from dataclasses import replace

import numpy as np
import open_clip
import pytest
import torch

from dkdetr.student.backbone import slim_resnet
from pipeline.pictograms import teacher_training
from pipeline.pictograms.backbone_training import Classifier
from pipeline.pictograms.captions import caption, merges_file, plain_captions
from pipeline.pictograms.crop_pool import jittered_windows, make_pool, scaled_windows, soften
from pipeline.pictograms.drawings import named_drawings
from pipeline.pictograms.scenes import SpriteBank, render_scene
from pipeline.pictograms.teacher_assets import (
    assets_folder,
    backbone_weights_path,
    config_path,
    merges_path,
    save_half,
    teacher_spec,
    weights_path,
)
from pipeline.pictograms.worlds import SIZES, plan_world
from pipeline.teacher import load_teacher

NAMES = ["red apple", "T-Rex", "ear of corn", "jack-o-lantern"]


def test_every_word_of_a_caption_is_one_token(tmp_path):
    path = tmp_path / "merges.txt.gz"
    path.write_bytes(merges_file(NAMES))
    tokenize = open_clip.SimpleTokenizer(bpe_path=str(path), context_length=20)
    assert tokenize.vocab_size < 1200
    assert len(tokenize.encode("This is a photo of the red apple.")) == 9
    assert len(tokenize.encode("ear of corn")) == 3
    # A word that no caption has is spelled out and comes back whole.
    assert tokenize.decode(tokenize.encode("a zyzzyva")).strip() == "a zyzzyva"


def test_the_same_names_give_the_same_vocabulary():
    assert merges_file(NAMES) == merges_file(NAMES)
    assert merges_file(NAMES) != merges_file(NAMES[:2])


def test_captions_hold_the_name_and_leave_no_place_empty():
    generator = np.random.default_rng(0)
    drawn = {caption("ear of corn", generator) for _ in range(300)}
    assert len(drawn) > 40
    for text in drawn:
        assert "ear of corn" in text
        assert "{" not in text
    assert plain_captions(["ant", "bat"])[0][0] == "a photo of an ant."
    assert plain_captions(["ant", "bat"])[1][0] == "a photo of a bat."


@pytest.fixture(scope="module")
def pool():
    return make_pool(named_drawings()[:8], 24, seed=1, held_out_style=False, title="test")


def test_a_pool_shows_every_drawing_equally_often(pool):
    assert pool.regions.dtype == torch.uint8
    assert len(pool.regions) == len(pool.boxes_xyxy) == len(pool.labels) >= 24
    counts = torch.bincount(pool.labels, minlength=8)
    assert counts.max() - counts.min() <= 1


def test_cutting_the_whole_region_gives_the_region(pool):
    whole = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    side = pool.regions.shape[-1]
    cut = pool.cut(torch.tensor([2]), whole, side)
    torch.testing.assert_close(cut[0], pool.regions[2].float() / 255, atol=1e-5, rtol=0)
    half = pool.cut(torch.tensor([2]), torch.tensor([[0.5, 0.0, 1.0, 0.5]]), side // 2)
    expected = pool.regions[2, :, : side // 2, side // 2 :].float() / 255
    torch.testing.assert_close(half[0], expected, atol=1e-5, rtol=0)


def test_windows_are_boxes_grown_or_moved(pool):
    boxes = torch.tensor([[0.3, 0.4, 0.7, 0.6]])
    torch.testing.assert_close(scaled_windows(boxes, 1.0), boxes)
    expected = torch.tensor([[0.2, 0.35, 0.8, 0.65]])
    torch.testing.assert_close(scaled_windows(boxes, 1.5), expected)
    windows = jittered_windows(pool.boxes_xyxy, torch.Generator().manual_seed(0))
    assert windows.min() >= 0
    assert windows.max() <= 1
    assert (windows[:, 2:] > windows[:, :2]).all()


def test_softened_pixels_stay_in_range(pool):
    pixels = soften(pool.regions[:8].float() / 255, torch.Generator().manual_seed(0))
    assert pixels.min() >= 0
    assert pixels.max() <= 1


def test_the_classifier_scores_every_stage():
    backbone = slim_resnet(
        weights="random", norm="batch", frozen_stages=0, used_stages=(4, 5), width=8
    )
    logits = Classifier(backbone, 11)(torch.zeros(2, 3, 40, 40))
    assert [tuple(each.shape) for each in logits] == [(2, 11), (2, 11)]


def test_half_precision_files_keep_whole_numbers(tmp_path):
    state = {"weight": torch.tensor([0.5, 2.0]), "count": torch.tensor(70001)}
    save_half(state, tmp_path / "w.safetensors")
    from safetensors.torch import load_file

    loaded = load_file(tmp_path / "w.safetensors")
    assert loaded["weight"].dtype == torch.float16
    assert loaded["count"].item() == 70001


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
    open_clip.add_model_config(config_path(assets_folder()))


@pytest.mark.usefixtures("one_thread")
def test_a_control_is_trained_on_its_world_s_names_alone(tmp_path, monkeypatch):
    size = replace(SIZES["tiny"], num_names=9, num_base=6, num_train=4, num_val=3)
    drawings = tuple(
        category.drawing for category in plan_world(size, protocol="lvis-like", seed=0).categories
    )
    names = [drawing.name for drawing in drawings]
    assert 9 == len(set(names)) < len(named_drawings())
    monkeypatch.setattr(teacher_training, "SIZES", {"nine": size})
    monkeypatch.setattr(teacher_training, "_FRESH_CROPS", 18)
    drawn = []

    def spied(of, *given, **named):
        drawn.append(of)
        return make_pool(of, *given, **named)

    monkeypatch.setattr(teacher_training, "make_pool", spied)
    out = tmp_path / "control"
    words = ["--world", "nine", "--out", str(out), "--steps", "2", "--crops", "27", "--batch", "4"]
    monkeypatch.setattr("sys.argv", ["teacher_training", *words])
    teacher_training.main()
    assert drawn == [drawings] * 3  # to train on, fresh scenes, the held-out style
    assert merges_path(out).read_bytes() == merges_file(names)
    log = json.loads((out / "teacher_training.log").read_text())
    assert (log["world"], log["names"], log["steps"]) == ("nine", 9, 2)
    assert log["nine_val_boxes"]["crops"] > 0
    teacher = load_teacher(f"pictograms_clip:{weights_path(out)}")
    assert teacher.encode_texts(names).shape == (9, 128)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--world", "small"], "say where, with --out"),
        (["--world", "small", "--out", "here/assets"], "say where, with --out"),
        (["--world", "huge", "--out", "control"], "invalid choice: 'huge'"),
    ],
)
def test_a_control_never_takes_the_shipped_teacher_s_place(
    tmp_path, monkeypatch, capsys, words, told
):
    shipped = tmp_path / "package/assets"
    shipped.mkdir(parents=True)
    (tmp_path / "here").symlink_to(shipped.parent)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(teacher_training, "assets_folder", lambda: shipped)
    monkeypatch.setattr("sys.argv", ["teacher_training", *words])
    with pytest.raises(SystemExit) as caught:
        teacher_training.main()
    assert caught.value.code == 2
    assert told in capsys.readouterr().err
    assert sorted(each.name for each in tmp_path.rglob("*")) == ["assets", "here", "package"]


def test_shipped_weights_are_small_and_those_of_the_readme():
    readme = (assets_folder() / "README.md").read_text(encoding="utf-8")
    known = dict(re.findall(r"^\| `([^`]+)` \|.*\| `([0-9a-f]{64})` \|$", readme, re.MULTILINE))
    paths = [weights_path(assets_folder()), merges_path(assets_folder()), backbone_weights_path()]
    assert sum(path.stat().st_size for path in paths) <= 8_000_000
    for path in paths:
        assert hashlib.sha256(path.read_bytes()).hexdigest() == known[path.name]


def test_the_shipped_backbone_loads_whole():
    for stages in ((3, 4), (3, 4, 5)):
        backbone = slim_resnet(
            weights="pictograms", norm="batch", frozen_stages=0, used_stages=stages, width=32
        )
        maps = backbone.eval()(torch.zeros(1, 3, 64, 64))
        assert all(torch.isfinite(each).all() for each in maps)


def test_the_shipped_teacher_recognises_what_it_never_saw_drawn(tmp_path, monkeypatch):
    """Fresh scenes of the tiny world, true boxes, all 65 names, the pipeline's own crops."""
    monkeypatch.chdir(tmp_path)  # its files are found from anywhere
    teacher = load_teacher("pictograms")
    same = load_teacher(teacher_spec())
    assert teacher.identity == same.identity
    world = plan_world(SIZES["tiny"], protocol="lvis-like", seed=0)
    names = [category.drawing.name for category in world.categories]
    texts = teacher.encode_texts([f"a photo of a {name}." for name in names])
    bank = SpriteBank([category.drawing for category in world.categories])
    hits: list[bool] = []
    for image in [image for image in world.images if image.part == "val"][:25]:
        scene = render_scene(image.plan, bank)
        rows = teacher.encode_regions(scene.pixels, scene.boxes_xyxy)
        labels = [planned.label for planned in image.plan.objects]
        hits += list((rows @ texts.T).argmax(1) == labels)
    assert len(hits) > 100
    assert np.mean(hits) > 0.8
