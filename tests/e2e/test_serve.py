"""`dkdetr serve` as typed: a student file, its teacher's words, a cache, curves; how it ends."""

import json
import re
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_student import shake, tiny_config

from cache.neighbors import NeighborSettings
from cache.spec import CacheError
from dkdetr.data.vocabulary import load_vocabulary
from dkdetr.errors import DataError, MismatchError, UsageError
from dkdetr.student.build import build_student
from dkdetr.student_file import StudentFile, save_student_file
from pipeline.neighbor_stage import ensure_neighbors
from pipeline.open_vocabulary import build_vocabulary_file
from pipeline.served_page import PageRequest, open_page
from tests.colored_cache import write_colored_cache
from tests.e2e.commands import DKDETR, call, environment
from tests.served_world import ask, encoded


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serve") / "größe 1"
    (folder / "pictures").mkdir(parents=True)
    (folder / "pictures" / "a b.png").write_bytes(encoded())
    (folder / "pictures" / "notes.txt").write_text("no picture")
    (folder / "names.txt").write_text("hammer\nred apple\n")
    build_vocabulary_file(
        str(folder / "names.txt"), folder / "tools.vocab", "pictograms", "single", "cpu"
    )
    vocabulary = load_vocabulary(folder / "tools.vocab")
    student = build_student(tiny_config(), text_dim=vocabulary.embed_dim)
    shake(student)
    for name, teacher in (("s", {"teacher_spec": "pictograms"}), ("mute", {})):
        file = StudentFile(student.state_dict(), tiny_config(), vocabulary, teacher)
        save_student_file(folder / f"{name}.safetensors", file)
    cache = write_colored_cache(folder / "world", num_images=4)
    ensure_neighbors(cache, NeighborSettings(k=2))
    (folder / "run").mkdir()
    (folder / "run" / "metrics.jsonl").write_text(
        "".join(json.dumps({"iteration": step, "total": 5 - step / 40}) + "\n" for step in (0, 20))
    )
    return folder


def start(place: Path, *words: str) -> tuple[subprocess.Popen[str], int]:
    # Of tests in a shell's background Ctrl-C is ignored, and so it would be of what they start.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        [*DKDETR, "serve", *words, "--port", "0"],
        cwd=place, env=environment(), stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr
    said = ""
    for line in process.stderr:
        said += line
        if found := re.search(r"http://127\.0\.0\.1:(\d+)/", line):
            return process, int(found.group(1))
    raise AssertionError(said)


def test_served_as_typed_and_ended_by_ctrl_c(place: Path):
    process, port = start(
        place, "s.safetensors", "run", "--cache", "world/cache", "--pictures", "pictures",
        "--threshold", "0.4", "--data-root", ".",
    )  # fmt: skip
    try:
        about = json.loads(ask(port, "GET", "/api/about")[2])
        assert about["examples"] == ["a b.png"]
        assert about["names"] == ["hammer", "red apple"]
        assert (about["cache"], about["curves"], about["report"]) == (True, True, False)
        assert about["threshold"] == 0.4
        assert about["words_problem"] == ""
        status, _, answer = ask(
            port, "POST", "/api/predict?words=watering%20can,saw", body=encoded(),
            headers={"content-type": "image/png"},
        )  # fmt: skip
        assert status == 200, answer
        found = json.loads(answer)
        assert {each["name"] for each in found["boxes"]} <= {"watering can", "saw"}
        assert found["boxes"]
        assert ask(port, "GET", "/cache?images=2")[0] == 200
        assert b"<path" in ask(port, "GET", "/curves")[2]
    finally:
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
    assert process.returncode == 130, errors
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ((), 3, "nothing to show"),
        (("absent",), 3, "no run folder"),
        (("s.safetensors", "--pictures", "run"), 3, "holds no picture"),
        (("s.safetensors", "--pictures", "absent"), 3, "no folder of pictures"),
        (("s.safetensors", "run", "owner/name"), 2, "'owner/name' is no run"),
        (("run", "s.safetensors"), 2, "leave it out"),
        (("s.safetensors", "absent"), 2, "'absent' is no run"),
        (("--cache", "absent"), 4, "no cache at absent"),
        (("s.safetensors", "--host", "0.0.0.0"), 2, "without a password"),
        (("s.safetensors", "--port", "99999"), 2, "65535"),
    ],
)
def test_mistakes_are_told_before_anything_is_served(place: Path, words, code, message):
    done = call("serve", *words, cwd=place)
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_student_that_does_not_name_its_teacher_has_its_own_names_alone(place: Path):
    parts = open_page(PageRequest(runs=(place / "mute.safetensors",), device="cpu"))
    assert "--teacher" in parts.words_problem
    assert parts.detector is not None
    given = PageRequest(
        runs=(place / "mute.safetensors",), teacher="pictograms", device="cpu",
        vocabulary=place / "tools.vocab",
    )  # fmt: skip
    assert open_page(given).words_problem == ""


def test_a_vocabularys_own_thresholds_give_way_to_the_one_typed(place: Path):
    words = (str(place / "names.txt"), place / "strict.vocab", "pictograms", "single", "cpu")
    build_vocabulary_file(*words, thresholds={"hammer": 0.7})
    asked = PageRequest(
        runs=(place / "s.safetensors",), vocabulary=place / "strict.vocab", device="cpu"
    )
    for threshold, own, begins in ((None, {"hammer": 0.7}, 0.3), (0.2, {}, 0.2)):
        parts = open_page(replace(asked, threshold=threshold))
        assert parts.detector is not None
        assert (parts.detector.vocabulary.thresholds, parts.threshold) == (own, begins)


def test_curves_are_of_every_run_however_it_is_named(place: Path):
    runs = [place / seed / "both" for seed in ("seed0", "seed1")]
    for step, run in enumerate(runs):
        (run / "checkpoints").mkdir(parents=True)
        (run / "metrics.jsonl").write_text(json.dumps({"iteration": step, "total": 1.0}) + "\n")
    begun = place / "begun"
    begun.mkdir()
    (begun / "config.toml").touch()
    named = (place / "s.safetensors", runs[0], runs[1] / "checkpoints" / "step_00000001.pt", begun)
    parts = open_page(PageRequest(runs=named, device="cpu"))
    assert parts.histories is not None
    steps = {name: [each["iteration"] for each in told] for name, told in parts.histories().items()}
    assert steps == {"seed0/both": [0], "seed1/both": [1], "begun": []}
    assert open_page(PageRequest(runs=named[:1], device="cpu")).histories is None


def test_words_of_another_teacher_are_refused(place: Path):
    with pytest.raises(MismatchError, match="nothing in common"):
        open_page(PageRequest(runs=(place / "s.safetensors",), teacher="RN50:random", device="cpu"))


def test_a_cache_alone(place: Path):
    parts = open_page(PageRequest(cache=place / "world" / "cache", data_root=place))
    assert parts.detector is None
    assert parts.cache_page is not None
    assert "image 1" in parts.cache_page("1,")
    with pytest.raises(CacheError, match="holds no image"):
        parts.cache_page("99,")
    with pytest.raises(DataError, match="nothing to show"):
        open_page(PageRequest())
    for given in ({"vocabulary": place}, {"teacher": "pictograms"}, {"pictures": place}):
        with pytest.raises(UsageError, match="no student is served"):
            open_page(PageRequest(cache=place / "world" / "cache", data_root=place, **given))
