"""`dkdetr vocab build` and `dkdetr predict` as typed, with the shipped small CLIP for the words."""

import csv
import json
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from tiny_student import save_speaking_student

from dkdetr import progress
from dkdetr.data.vocabulary import load_vocabulary
from dkdetr.inference import prediction_files
from tests.e2e.commands import exit_code


@pytest.fixture
def place(tmp_path: Path, monkeypatch, capsys) -> Path:
    """A folder with pictures, a list of names, its vocabulary and a student that speaks it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "names.txt").write_text("# tools\nhammer, mallet\nred apple\n\nparty_popper\n")
    code = exit_code(
        monkeypatch, "vocab", "build", "names.txt", "-o", "tools.vocab", "--teacher", "pictograms",
        "--prompts", "single",
    )  # fmt: skip
    assert code == 0, capsys.readouterr().err
    vocabulary = load_vocabulary(tmp_path / "tools.vocab")
    save_speaking_student(tmp_path / "s.safetensors", vocabulary)
    rng = np.random.default_rng(0)
    for number, name in enumerate(("a.png", "sub/a.png", "größe.png")):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (60 + number, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "in" / name)
    capsys.readouterr()
    return tmp_path


def test_a_vocabulary_of_names_and_synonyms(place: Path, monkeypatch, capsys):
    built = load_vocabulary(place / "tools.vocab")
    assert built.names == ("hammer", "red apple", "party_popper")
    (place / "plain.txt").write_text("hammer\nmallet\nHammer\n")
    assert exit_code(
        monkeypatch, "vocab", "build", "plain.txt", "-o", "plain.vocab", "--teacher", "pictograms",
        "--prompts", "single",
    ) == 0  # fmt: skip
    printed = capsys.readouterr().out
    assert "warning: hammer and Hammer read the same" in printed
    assert "'hammer' and 'Hammer' are near-duplicates (cosine 1.000)" in printed
    plain = load_vocabulary(place / "plain.vocab").embeddings
    mean = plain[0] + plain[1]
    np.testing.assert_allclose(built.embeddings[0], mean / np.linalg.norm(mean), atol=1e-6)
    assert exit_code(monkeypatch, "vocab", "show", "tools.vocab", "--json", "-") == 0
    assert json.loads(capsys.readouterr().out)["names"] == list(built.names)


def test_words_in_boxes_out(place: Path, monkeypatch, capsys):
    code = exit_code(
        monkeypatch, "predict", "in", "in/sub", "--model", "s.safetensors", "-c",
        "hammer, traffic light", "--threshold", "0", "--out", "found", "--json", "r.json",
    )  # fmt: skip
    printed = capsys.readouterr()
    assert code == 0, printed.err
    document = json.loads((place / "found/predictions.json").read_text())
    # As they were named, and by their folders where that alone tells them apart.
    names = ["in/a.png", "größe.png", "in/sub/a.png"]
    assert [image["file_name"] for image in document["images"]] == names
    drawings = [image["drawing"] for image in document["images"]]
    assert drawings == ["a.jpg", "größe.jpg", "a-2.jpg"]
    assert [c["name"] for c in document["categories"]] == ["hammer", "traffic light"]
    assert len(COCO(str(place / "found/predictions.json")).getImgIds()) == 3
    text = (place / "found/predictions.csv").read_text(encoding="utf-8")
    rows = list(csv.DictReader(text.splitlines()))
    assert len(rows) == len(document["annotations"]) == 3 * 12 * 2
    assert {row["file"] for row in rows} == set(names)
    assert [line.split("  ")[0].strip() for line in printed.out.splitlines()[:3]] == names
    for row, record in zip(rows, document["annotations"], strict=True):
        assert float(row["score"]) == pytest.approx(record["score"])
        assert float(row["right"]) - float(row["left"]) == pytest.approx(record["bbox"][2])
    for name, size in (("a.jpg", (80, 60)), ("a-2.jpg", (80, 61))):
        with Image.open(place / "found" / name) as drawn:
            assert drawn.size == size
    assert "72 boxes in 3 pictures" in printed.out
    assert json.loads((place / "r.json").read_text())["detections"] == 72


def test_words_that_mean_the_same_are_warned_of_once(place: Path, monkeypatch, capsys):
    common = ("predict", "in", "--model", "s.safetensors", "--no-draw", "--batch-size", "1")
    assert exit_code(monkeypatch, *common, "-c", "hammer, Hammer", "--json", "-") == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["pictures"] == 2
    warned = [line for line in printed.err.splitlines() if line.startswith("warning: ")]
    assert warned == [
        "warning: hammer and Hammer read the same",
        "warning: 'hammer' and 'Hammer' are near-duplicates (cosine 1.000)",
    ]


def test_what_cannot_be_read_is_told_and_the_others_are_written(place: Path, monkeypatch, capsys):
    for number in range(22):
        (place / "in" / f"b{number:02}.jpg").write_bytes(b"a download that broke off")
    common = ("predict", "--model", "s.safetensors", "--no-draw", "--json", "r.json")
    assert exit_code(monkeypatch, *common, "in") == 3
    printed = capsys.readouterr()
    done, *named, rest, error = printed.err.strip().splitlines()
    assert done.startswith("predict, files: 24/24 in ")
    assert len(named) == 20
    assert all(line.startswith(f"left out: image in/b{n:02}.jpg") for n, line in enumerate(named))
    assert rest == "left out: 2 more"
    assert error.startswith("error [3]: 22 of 24 files could not be read")
    assert "'predictions'" in error
    assert "in 2 pictures" in printed.out
    document = json.loads((place / "predictions/predictions.json").read_text())
    assert [each["file_name"] for each in document["images"]] == ["a.png", "größe.png"]
    assert not any("drawing" in each for each in document["images"])
    assert (place / "predictions/predictions.csv").is_file()
    answer = json.loads((place / "r.json").read_text())
    assert (answer["pictures"], len(answer["unreadable"])) == (2, 22)


def test_progress_counts_files_and_says_what_was_found(place: Path, monkeypatch, capsys):
    monkeypatch.setattr(progress, "_LINE_EVERY_S", 0.0)
    common = ("predict", "in", "in/sub", "--model", "s.safetensors", "--threshold", "0")
    assert exit_code(monkeypatch, *common, "--batch-size", "2", "--json", "-") == 0
    printed = capsys.readouterr()
    shown = [line for line in printed.err.splitlines() if line.startswith("predict, files: ")]
    assert [line.split()[2] for line in shown] == ["1/3", "2/3", "3/3", "3/3", "3/3"]
    assert shown[0].endswith("36 boxes in 1 picture")
    assert shown[-1].endswith("108 boxes in 3 pictures")
    assert json.loads(printed.out)["detections"] == 108


def test_sigterm_leaves_no_half_file(place: Path, monkeypatch, capsys):
    """It comes while the second picture is drawn."""
    calls: list[str] = []
    real = prediction_files.Prediction.plot

    def plot(prediction):
        calls.append("plot")
        if len(calls) == 2:
            signal.raise_signal(signal.SIGTERM)
        return real(prediction)

    monkeypatch.setattr(prediction_files.Prediction, "plot", plot)
    before = signal.getsignal(signal.SIGTERM)
    common = ("predict", "in", "--model", "s.safetensors", "--out", "found")
    assert exit_code(monkeypatch, *common) == 75
    assert signal.getsignal(signal.SIGTERM) == before
    assert [each.name for each in (place / "found").iterdir()] == ["a.jpg"]
    error = capsys.readouterr().err.strip()
    assert error.startswith("error [75]: stopped by SIGTERM before predictions.json and ")
    assert len(error.splitlines()) == 1


def test_where_nothing_can_be_read_nothing_is_written(place: Path, monkeypatch, capsys):
    (place / "bad.jpg").write_bytes(b"no picture")
    words = ("predict", "bad.jpg", "--model", "s.safetensors")
    assert exit_code(monkeypatch, *words) == 3
    error = capsys.readouterr().err.strip()
    assert error.startswith("error [3]: image bad.jpg: empty, damaged")
    assert len(error.splitlines()) == 1
    assert not list((place / "predictions").iterdir())


def test_the_students_own_names_and_a_file_of_others(place: Path, monkeypatch, capsys):
    common = ("predict", "in/a.png", "--model", "s.safetensors", "--threshold", "0", "--no-draw")
    assert exit_code(monkeypatch, *common, "--out", "own", "--nms", "0.5") == 0
    assert exit_code(monkeypatch, *common, "--vocab", "tools.vocab", "--out", "given") == 0
    own, given = (
        json.loads((place / folder / "predictions.json").read_text()) for folder in ("own", "given")
    )
    assert own["categories"] == given["categories"]
    assert 0 < len(own["annotations"]) < len(given["annotations"])
    assert not list((place / "own").glob("*.jpg"))


@pytest.mark.parametrize(
    "words",
    [
        ("in", "--out", "in"),
        ("in/a.png", "--out", "in"),  # a.jpg there would be another picture
        ("a.jpg",),  # --out . below: the drawing has the picture's own name
        ("linked/a.png", "--out", "in"),
        ("in/sub", "--out", "way"),  # a link to in/sub
        ("link.jpg", "--out", "in"),  # which leads into it
        ("clip.mp4",),
        ("in", "--out", "found", "--json", "in/a.png"),
    ],
)
def test_a_source_is_never_written_over(place: Path, monkeypatch, capsys, words):
    Image.open(place / "in/a.png").convert("RGB").save(place / "a.jpg")
    (place / "clip.mp4").write_bytes(b"a video, as far as names go")
    (place / "linked").symlink_to("in")
    (place / "way").symlink_to("in/sub")
    (place / "link.jpg").symlink_to("in/a.png")
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    out = () if "--out" in words else ("--out", ".")
    common = ("predict", "--model", "s.safetensors", "--threshold", "0")
    assert exit_code(monkeypatch, *common, *words, *out) == 2
    error = capsys.readouterr().err.strip()
    assert ("--out, or --no-draw" in error) or ("--json in/a.png" in error)
    assert len(error.splitlines()) == 1
    assert {path: path.read_bytes() for path in place.rglob("*") if path.is_file()} == before


def test_without_drawings_predictions_may_lie_beside_the_pictures(place: Path, monkeypatch):
    before = (place / "in/a.png").read_bytes()
    words = ("predict", "in", "--model", "s.safetensors", "--no-draw", "--out", "in")
    assert exit_code(monkeypatch, *words) == 0
    assert {each.name for each in (place / "in").iterdir()} == {
        "a.png", "größe.png", "sub", "predictions.json", "predictions.csv",
    }  # fmt: skip
    assert (place / "in/a.png").read_bytes() == before


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("absent.jpg",), 3, "no picture, folder or video 'absent.jpg'"),
        (("in", "-c", "a", "--vocab", "tools.vocab"), 2, "not both"),
        (("in", "--teacher", "pictograms"), 2, "--teacher is for words"),
        (("in", "--class-threshold", "hammer"), 2, "NAME=SCORE"),
        (("in", "--class-threshold", "saw=0.5"), 2, "'saw', which is none of the names"),
        (("in", "--vocab", "names.txt"), 5, "is not a vocabulary file"),
        (("in", "-c", "a", "--teacher", "ViT-B-32:random"), 4, "nothing in common"),
        (("in", "--model", "absent"), 3, "no run folder"),
        (("in", "-c", " , "), 3, "at least one name"),
    ],
)
def test_mistakes_are_one_line(place: Path, monkeypatch, capsys, words, code, message):
    assert exit_code(monkeypatch, "predict", "--model", "s.safetensors", *words) == code
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
