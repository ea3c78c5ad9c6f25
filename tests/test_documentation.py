"""What the pages say can be typed, runs or at least parses; what they link to is there."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from tiny_student import save_speaking_student

import cli
from dkdetr.data.vocabulary import load_vocabulary
from pipeline.open_vocabulary import build_vocabulary_file
from tests.commands_in_text import (
    ROOT,
    blocks,
    commands_of,
    commands_of_header,
    documents,
    inline_commands,
    known_part,
    parse,
    words_of,
)

BLOCKS = [block for file in documents() for block in blocks(file)]
TYPED = [(str(block), line) for block in BLOCKS for line in commands_of(block.text)]
HEADERS = [
    (file.name, line)
    for file in sorted((ROOT / "dkdetr" / "experiments").glob("*.toml"))
    for line in commands_of_header(file)
]
EXAMPLES = [(name, line) for name, lines in cli._EXAMPLES.items() for line in lines]
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)#\s]+)(#[^)]*)?\)|!\[[^\]]*\]\(([^)\s]+)\)")


@pytest.mark.parametrize(("place", "command"), TYPED + HEADERS + EXAMPLES)
def test_every_command_is_one_that_the_program_takes(place: str, command: str):
    parse(words_of(command))


@pytest.mark.parametrize("file", documents(), ids=lambda file: str(file.relative_to(ROOT)))
def test_commands_that_a_text_alludes_to_exist(file: Path):
    wrong = {}
    for command in inline_commands(file):
        words = command.replace("...", " ").split()[1:]
        first = [part for word in words[:2] for part in word.split("|")]
        # `cache info|verify`, `--format onnx|torchscript`: each alternative for itself.
        heads = [[words[0], part] for part in words[1].split("|")] if len(words) > 1 else [first]
        for head in heads:
            problem = known_part([*head, *words[2:]])
            if problem and not head[0].isupper():
                wrong[command] = problem
    assert not wrong


def test_there_is_something_to_look_at():
    assert len(TYPED) > 25
    assert len(HEADERS) > 10
    assert any(block.is_runnable for block in BLOCKS)


def test_a_command_that_does_not_exist_is_noticed():
    for wrong in ("dkdetr trian", "dkdetr train", "dkdetr eval --speed 3", "dkdetr cache show x"):
        with pytest.raises(Exception, match=r"(?i)no such|missing"):
            parse(words_of(wrong))
    assert known_part(["train", "--cash", "x"])
    assert known_part(["cache", "shake"])


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with what the pages' short examples name: pictures, names, a student."""
    folder = tmp_path_factory.mktemp("pages")
    (folder / "names.txt").write_text("hammer, mallet\nred apple\n")
    build_vocabulary_file(
        str(folder / "names.txt"), folder / "tools.vocab", "pictograms", "single", "cpu"
    )
    vocabulary = load_vocabulary(folder / "tools.vocab")
    save_speaking_student(folder / "student.safetensors", vocabulary)
    (folder / "photos").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    for name in ("a.jpg", "b.jpg", "photos/c.jpg"):
        Image.fromarray(pixels).save(folder / name)
    document = {"images": [], "annotations": [], "categories": []}
    (folder / "instances_val2017.json").write_text(json.dumps(document))
    found = [{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}]
    (folder / "results.json").write_text(json.dumps(found))
    programs = folder / "programs"
    programs.mkdir()
    dkdetr = programs / "dkdetr"
    dkdetr.write_text(
        f"#!/bin/sh\nexec {sys.executable} -c 'from cli import main; main()' \"$@\"\n"
    )
    dkdetr.chmod(0o755)
    return folder


def environment(place: Path) -> dict[str, str]:
    return os.environ | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "PATH": f"{place / 'programs'}:{os.environ['PATH']}",
    }


@pytest.mark.parametrize(
    "block", [b for b in BLOCKS if b.is_runnable and b.language != "python"], ids=str
)
def test_a_block_marked_runnable_runs(place: Path, block):
    bash = shutil.which("bash")
    assert bash
    done = subprocess.run(
        [bash, "-euo", "pipefail", "-c", block.text],
        cwd=place, env=environment(place), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "python"], ids=str)
def test_python_blocks_run(place: Path, block):
    done = subprocess.run(
        [sys.executable, "-c", block.text],
        cwd=place, env=environment(place), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("file", documents(), ids=lambda file: str(file.relative_to(ROOT)))
def test_links_lead_somewhere_and_pictures_are_there(file: Path):
    for link in LINK.finditer(file.read_text(encoding="utf-8")):
        target = link.group(1) or link.group(3)
        if "://" not in target and not target.startswith("mailto:"):
            assert (file.parent / target).exists(), f"{file}: {target}"


def test_the_citation_is_whole_and_of_this_version():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert cited["version"] == project["version"]
    assert cited["license"] == project["license"] == "Apache-2.0"
    assert {"cff-version", "message", "title", "authors"} <= cited.keys()
    (paper,) = cited["references"]
    assert paper["title"] in " ".join((ROOT / "README.md").read_text("utf-8").split())


def test_the_readme_s_pictures_are_small():
    pictures = [path for path in ROOT.rglob("pictures/*.jpg") if "cache" not in path.parts]
    assert len(pictures) >= 4
    assert all(path.stat().st_size < 150_000 for path in pictures)
