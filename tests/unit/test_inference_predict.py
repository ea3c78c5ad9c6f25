"""Words in, boxes out: what is kept, in which form, of pictures in any form."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import supervision
import torch
from PIL import Image
from tiny_student import TEXT_DIM, tiny_config, tiny_student
from torch import nn

from dkdetr import DKDETR
from dkdetr.config import ExperimentConfig
from dkdetr.data.picture_input import image_batch, rgb_pixels
from dkdetr.data.vocabulary import Vocabulary
from dkdetr.errors import DataError, MismatchError, UsageError
from dkdetr.evaluation.detect import detect
from dkdetr.inference.picture_sources import find_sources, open_pictures
from dkdetr.student_file import StudentFile, save_student_file

NAMES = ("cat", "traffic cone", "dog")


def vocabulary(teacher: str = "t", rows: int = 3) -> Vocabulary:
    return Vocabulary(
        NAMES[:rows],
        tuple(range(5, 5 + rows)),
        (True,) * rows,
        ("",) * rows,
        ("a {}.",),
        teacher,
        np.eye(rows, TEXT_DIM, dtype=np.float32),
    )


class FakeText:
    identity = "t"

    def encode_texts(self, texts):
        rows = [np.random.default_rng(list(text.encode())).normal(size=TEXT_DIM) for text in texts]
        return (np.stack(rows) / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def small_views() -> ExperimentConfig:
    config = tiny_config()
    return replace(config, data=replace(config.data, image_size=128))


@pytest.fixture
def detector() -> DKDETR:
    return DKDETR(tiny_student(), small_views(), vocabulary(), text_encoder=FakeText())


def picture(seed: int, height: int = 60, width: int = 90) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_a_prediction_is_the_evaluations_detection(detector: DKDETR):
    image = picture(0)
    (found,) = detector.predict(image, threshold=0.0)
    batch = image_batch([image], [0], image_size=detector.config.data.image_size)
    text = torch.from_numpy(vocabulary().embeddings)
    ((_, expected),) = detect(
        detector.student, [batch], text, device=torch.device("cpu"), max_detections=300
    )
    np.testing.assert_array_equal(found.boxes_xyxy, expected.boxes_xyxy.numpy())
    np.testing.assert_array_equal(found.scores, expected.scores.numpy())
    assert found.names == tuple(NAMES[i] for i in expected.labels.tolist())
    assert found.category_ids.tolist() == [5 + i for i in expected.labels.tolist()]
    assert found.boxes_xyxy.min() >= 0
    assert (found.boxes_xyxy[:, 2] <= 90).all()


def test_a_student_with_masks_predicts_the_boxes_of_one_without(detector: DKDETR):
    segmenter = tiny_student(tiny_config(mask_head=True))
    segmenter.load_state_dict(detector.student.state_dict(), strict=False)
    image = picture(0)
    with_masks = DKDETR(segmenter, small_views(), vocabulary())
    options = {"threshold": 0.0, "nms_iou": 0.5}
    (found,), (expected,) = (each.predict(image, **options) for each in (with_masks, detector))
    assert len(found) > 0
    np.testing.assert_array_equal(found.boxes_xyxy, expected.boxes_xyxy)


def test_every_form_of_a_picture_gives_the_same(detector: DKDETR, tmp_path: Path):
    image = picture(1)
    Image.fromarray(image).save(tmp_path / "p.png")
    forms = [
        image,
        tmp_path / "p.png",
        str(tmp_path / "p.png"),
        Image.fromarray(image),
        torch.from_numpy(image).permute(2, 0, 1),
        torch.from_numpy(image).permute(2, 0, 1).float() / 255,
    ]
    found = detector.predict(forms, threshold=0.0, batch_size=4)
    assert len(found) == len(forms)
    for each in found[1:]:
        np.testing.assert_array_equal(each.image, image)
        np.testing.assert_allclose(each.scores, found[0].scores, atol=1e-6)
    grey = detector.predict(image[:, :, 0])[0].image
    np.testing.assert_array_equal(grey, np.repeat(image[:, :, :1], 3, axis=2))


@pytest.mark.parametrize(
    "bad",
    [
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        torch.zeros(4, 4, 3, dtype=torch.uint8),
        torch.full((3, 4, 4), 2.0),
        torch.full((3, 4, 4), float("nan")),
    ],
)
def test_pixels_of_another_kind_are_refused(bad):
    with pytest.raises(UsageError, match="an image"):
        rgb_pixels(bad)


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_pictures_of_more_than_8_bits_a_channel_are_refused(mode: str):
    """Pillow would turn nearly all of their pixels white."""
    with pytest.raises(UsageError, match="more than 8 bits"):
        rgb_pixels(Image.new(mode, (4, 4), 1000))


class Fixed(nn.Module):
    """Answers every picture with the same boxes: three on one place, one elsewhere."""

    def __init__(self):
        super().__init__()
        inner = tiny_student()
        self.inner = inner

    def forward(self, images, text_embeddings):
        output = self.inner(images, text_embeddings)
        batch = len(images.image_ids)
        logits = torch.full((1, batch, 4, len(text_embeddings)), -9.0)
        boxes = torch.tensor(
            [
                [0.3, 0.3, 0.2, 0.2],
                [0.3, 0.3, 0.21, 0.2],
                [0.3, 0.3, 0.2, 0.22],
                [0.8, 0.8, 0.1, 0.1],
            ]
        )
        for query, (label, logit) in enumerate([(0, 2.0), (1, 1.0), (2, 0.0), (1, 0.5)]):
            logits[:, :, query, label] = logit
        detection = type(output.detection)(
            output.detection.features[-1:, :, :4], boxes.expand(1, batch, 4, 4)
        )
        return type(output)(
            detection, logits, output.encoder, output.anchors_cxcywh[:, :4],
            output.anchor_objectness[:, :4], None,
        )  # fmt: skip


def test_thresholds_and_suppression(detector: DKDETR):
    detector.student = Fixed()  # pyright: ignore
    image = picture(2)

    def names(**options):
        return list(detector.predict(image, **options)[0].names)

    assert names(threshold=0.4) == ["cat", "traffic cone", "traffic cone", "dog"]
    assert names(threshold=0.55) == ["cat", "traffic cone", "traffic cone"]  # sigmoid(.5) = .622
    assert names(threshold=0.4, nms_iou=0.5) == ["cat", "traffic cone"]
    assert names(threshold=0.7) == ["cat", "traffic cone"]
    assert names(threshold=0.4, thresholds={"Traffic_Cone": 0.7}) == ["cat", "traffic cone", "dog"]
    with pytest.raises(UsageError, match="'horse', which is none of the names"):
        names(thresholds={"horse": 0.5})
    with pytest.raises(UsageError, match=r"0\.\.1"):
        names(threshold=1.5)
    for beyond in (-0.1, 1.5, float("nan")):
        with pytest.raises(UsageError, match=r"IoU of .*0\.\.1"):
            names(nms_iou=beyond)
    with pytest.raises(UsageError, match="batch_size=0"):
        names(batch_size=0)


def test_a_vocabularys_own_thresholds_count_unless_the_call_says_otherwise(detector: DKDETR):
    detector.student = Fixed()  # pyright: ignore
    detector.vocabulary = replace(vocabulary(), thresholds={"traffic cone": 0.7, "dog": 0.1})
    for options, expected in (  # cat .88, traffic cone .73 and .62, dog .5
        ({}, ["cat", "traffic cone", "dog"]),
        ({"threshold": 0.6}, ["cat", "traffic cone", "traffic cone"]),
        ({"thresholds": {"dog": 0.6}}, ["cat", "traffic cone"]),
        ({"thresholds": {"traffic cone": 0.2, "cat": 0.9}}, ["traffic cone"] * 2 + ["dog"]),
    ):
        assert list(detector.predict(picture(2), **options)[0].names) == expected


def test_bare_words_and_other_teachers(detector: DKDETR):
    spoken = detector.resolve(["zebra", " crossing "])
    assert spoken.names == ("zebra", "crossing")
    assert spoken.category_ids == (1, 2)
    # By the sentences that the student learned from, not by those taken where none are known.
    assert spoken.prompts == ("a {}.",)
    expected = FakeText().encode_texts(["a zebra.", "a crossing."])
    np.testing.assert_allclose(spoken.embeddings, expected, atol=1e-6)
    found = detector.predict(picture(3), ["zebra"], threshold=0.0)[0]
    assert set(found.names) == {"zebra"}
    with pytest.raises(MismatchError, match="embedded by other"):
        detector.predict(picture(3), vocabulary(teacher="other"))
    mute = DKDETR(detector.student, detector.config, vocabulary())
    with pytest.raises(UsageError, match="dkdetr vocab build"):
        mute.predict(picture(3), ["zebra"])


def test_forms_of_a_result(detector: DKDETR):
    (found,) = detector.predict(picture(4), threshold=0.0, max_detections=5)
    assert len(found) == 5
    records = found.to_coco(image_id=9)
    for record, (x0, y0, x1, y1) in zip(records, found.boxes_xyxy.tolist(), strict=True):
        assert record["image_id"] == 9
        assert record["bbox"] == pytest.approx([x0, y0, x1 - x0, y1 - y0])
    detections = found.to_supervision()
    assert isinstance(detections, supervision.Detections)
    np.testing.assert_allclose(detections.xyxy, found.boxes_xyxy)
    assert detections["class_name"].tolist() == list(found.names)
    annotated = supervision.BoxAnnotator().annotate(found.image.copy(), detections)
    assert (annotated != found.image).any()
    plot = np.asarray(found.plot())
    assert plot.shape == found.image.shape
    assert (plot != found.image).any()


def test_nothing_found_is_empty_in_every_form(detector: DKDETR):
    (found,) = detector.predict(picture(4), threshold=1.0)
    assert len(found) == 0
    assert found.to_coco() == []
    assert len(found.to_supervision()) == 0
    np.testing.assert_array_equal(np.asarray(found.plot()), found.image)


def test_from_pretrained(tmp_path: Path, detector: DKDETR):
    (tmp_path / "model").mkdir()
    path = tmp_path / "model/model.safetensors"
    state = detector.student.state_dict()
    save_student_file(path, StudentFile(state, detector.config, vocabulary(), {}))
    for place in (path, path.parent):
        loaded = DKDETR.from_pretrained(place)
        (theirs,) = loaded.predict(picture(5), threshold=0.0)
        (ours,) = detector.predict(picture(5), threshold=0.0)
        np.testing.assert_array_equal(theirs.scores, ours.scores)
    with pytest.raises(DataError, match="dkdetr export"):
        DKDETR.from_pretrained(tmp_path)
    with pytest.raises(DataError, match="no student file"):
        DKDETR.from_pretrained(tmp_path / "absent.safetensors")


def write_names(folder: Path, *names: str) -> None:
    """Files of these names, of which nobody reads more."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


def test_sources(tmp_path: Path, monkeypatch):
    write_names(tmp_path, "b.jpg", "a.PNG", "größe 1.jpeg", "notes.txt", "sub/c.jpg")
    monkeypatch.chdir(tmp_path)

    def names(*words: str, stdin: str = "") -> list[str]:
        return [str(path) for path in find_sources(words, stdin=io.StringIO(stdin))]

    assert names(".") == ["a.PNG", "b.jpg", "größe 1.jpeg"]
    assert names("*.jp*g", "b.jpg") == ["b.jpg", "größe 1.jpeg"]
    assert names("**/*.jpg") == ["b.jpg", "sub/c.jpg"]
    assert names("-", stdin="sub\n\nb.jpg\n") == ["sub/c.jpg", "b.jpg"]
    for word in ("notes.txt", "absent.jpg", "*.gif"):
        with pytest.raises(DataError, match=r"'[^']+'"):
            names(word)
    with pytest.raises(DataError, match=r"'https://host/a\.jpg' is an address.*download it"):
        names("https://host/a.jpg")


def test_a_folder_of_folders_is_told_the_pattern_that_takes_them(tmp_path: Path, monkeypatch):
    write_names(tmp_path, "[2026] all/a/c.jpg", "[2026] all/b/b/d.mp4", "notes/notes.txt")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="not looked into") as caught:
        find_sources(["[2026] all/"])
    pattern = str(caught.value).split("'")[-2]
    assert list(map(str, find_sources([pattern]))) == [
        "[2026] all/a/c.jpg", "[2026] all/b/b/d.mp4",
    ]  # fmt: skip
    with pytest.raises(DataError, match=r"no picture and no video$"):
        find_sources(["notes"])


def test_files_are_called_as_they_were_named(tmp_path: Path, monkeypatch):
    write_names(tmp_path, "a/1.jpg", "a/1.png", "b/1.jpg", "b/2.jpg", "1.jpg")
    monkeypatch.chdir(tmp_path)

    def names(*words: str, stdin: str = "") -> list[str]:
        return list(find_sources(words, stdin=io.StringIO(stdin)).values())

    assert names("a") == ["1.jpg", "1.png"]
    assert names(str(tmp_path / "b")) == ["1.jpg", "2.jpg"]
    assert names("a", "b/") == ["a/1.jpg", "1.png", "b/1.jpg", "2.jpg"]
    assert names("a", "1.jpg") == ["a/1.jpg", "1.png", "1.jpg"]
    assert names("./b/1.jpg", "a/*.png", str(tmp_path / "1.jpg")) == [
        "./b/1.jpg", "a/1.png", (tmp_path / "1.jpg").as_posix(),
    ]  # fmt: skip
    assert names("-", stdin="./a/1.jpg\nb\n") == ["./a/1.jpg", "1.jpg", "2.jpg"]
    assert names("b/1.jpg", "b") == ["b/1.jpg", "2.jpg"]


def test_frames_of_a_video(tmp_path: Path):
    import av

    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"  # pyright: ignore
        for shade in range(0, 250, 50):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), shade, np.uint8))
            container.mux(stream.encode(frame))  # pyright: ignore
        container.mux(stream.encode())  # pyright: ignore
    found = list(open_pictures({path: "sub/clip.mp4"}, every=2))
    assert [each.name for each in found] == [f"sub/clip.mp4_{n:06d}.jpg" for n in (0, 2, 4)]
    for each, shade in zip(found, (0, 100, 200), strict=True):
        assert each.pixels.shape == (48, 64, 3)
        assert abs(float(each.pixels.mean()) - shade) < 4
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    with pytest.raises(DataError, match="broken"):
        list(open_pictures({tmp_path / "broken.mp4": "broken.mp4"}))


@pytest.mark.parametrize("degrees", [0, -90, 90, 180])
def test_frames_of_a_lying_video_are_upright(tmp_path: Path, degrees: int):
    import av

    path = tmp_path / "clip.mp4"
    upright = np.zeros((96, 64, 3), np.uint8)
    upright[:48] = 255
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stored = np.ascontiguousarray(np.rot90(upright, -degrees // 90))
        stream.height, stream.width = stored.shape[:2]  # pyright: ignore
        stream.pix_fmt = "yuv420p"  # pyright: ignore
        stream.set_display_rotation(degrees)  # pyright: ignore
        container.mux(stream.encode(av.VideoFrame.from_ndarray(stored)))  # pyright: ignore
        container.mux(stream.encode())  # pyright: ignore
    (found,) = open_pictures({path: "clip.mp4"})
    assert found.pixels.shape == (96, 64, 3)
    assert found.pixels[:40].mean() > 240
    assert found.pixels[56:].mean() < 15
