"""The shipped lists of names, and a vocabulary's file read without PyTorch or CLIP."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dkdetr.data.clean_names import CLEAN_NAMES
from dkdetr.data.coco_names import OVCOCO_BASE, OVCOCO_NOVEL
from dkdetr.data.name_lists import SHIPPED, NameEntry, read_entries, shipped_entries
from dkdetr.data.prompts import PROMPT_SETS, read_templates, readable_name
from dkdetr.data.voc import VOC_NAMES
from dkdetr.data.vocabulary import Vocabulary, save_vocabulary
from dkdetr.errors import DataError, UsageError

ROOT = Path(__file__).resolve().parents[2]


def names_of(name: str) -> list[str]:
    return [entry.name for entry in shipped_entries(name)]


@pytest.mark.parametrize(
    ("name", "number", "first", "last"),
    [
        ("lvis", 1203, (1, "aerosol_can"), (1203, "zucchini")),
        ("coco", 80, (1, "person"), (90, "toothbrush")),
        ("objects365", 365, (1, "Person"), (365, "Table Tennis ")),
        ("voc", 20, (1, "aeroplane"), (20, "tvmonitor")),
    ],
)
def test_each_list_is_whole_and_both_kinds_name_the_same_things(name, number, first, last):
    entries, clean = shipped_entries(name), shipped_entries(f"{name}-clean")
    assert len(entries) == len(clean) == len({e.name for e in entries}) == number
    assert len({e.name for e in clean}) == number
    assert [(e.category_id, e.name) for e in (entries[0], entries[-1])] == [first, last]
    ids = [e.category_id for e in entries]
    assert ids == sorted(set(ids)) == [e.category_id for e in clean]


def test_facts_known_of_lvis():
    names = names_of("lvis")
    assert sum("_" in name for name in names) == 412
    assert sum("(" in name for name in names) == 108
    assert len({name.split("_(")[0].split(" (")[0] for name in names}) == 1198
    assert len({readable_name(name) for name in names}) == 1203
    assert names[654] == "speaker_(stero_equipment)"  # as published
    assert names_of("lvis-clean")[654] == "speaker (stereo equipment)"
    assert not [name for name in names_of("lvis-clean") if "_" in name]


def test_lists_agree_with_what_the_protocols_say():
    assert set(names_of("coco")) > OVCOCO_BASE | OVCOCO_NOVEL
    assert tuple(names_of("voc")) == VOC_NAMES
    everything = {" ".join(name.split()) for each in SHIPPED for name in names_of(each)}
    assert set(CLEAN_NAMES) <= everything, "a correction of a name that nobody published"
    assert "Monitor/TV" in names_of("objects365-clean")
    assert "Moniter/TV" in names_of("objects365")


def test_a_file_of_ones_own_goes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(read_entries("voc")) == 20
    Path("coco").mkdir()  # pictures, say: no list
    assert read_entries("coco") == shipped_entries("coco")
    Path("voc").write_text("cat, kitty\n# no\n\ndog\n")
    assert read_entries("voc") == (NameEntry(1, "cat", ("kitty",)), NameEntry(2, "dog"))
    with pytest.raises(DataError, match=r"'absent'; shipped ones: lvis, coco.*voc-clean"):
        read_entries("absent")
    Path("twice").write_text("a\nb\na\n")
    with pytest.raises(DataError, match="'a' twice: lines 1, 3"):
        read_entries("twice")
    with pytest.raises(DataError, match=str(tmp_path.name)):
        read_entries(str(tmp_path))


def test_templates_of_sets_and_files(tmp_path):
    assert read_templates("vild63") == PROMPT_SETS["vild63"].templates
    assert len(read_templates("single,clip7")) == 8
    assert read_templates("single, single") == PROMPT_SETS["single"].templates
    path = tmp_path / "mine.txt"
    path.write_text("# mine\na sketch of {article} {}.\n\nthe {}\nthe {}\n")
    assert read_templates(str(path)) == ("a sketch of {article} {}.", "the {}")
    path.write_text("a sketch\n")
    with pytest.raises(UsageError, match="'a sketch' has no place"):
        read_templates(str(path))
    path.write_text("\n")
    with pytest.raises(UsageError, match="holds no template"):
        read_templates(str(path))
    path.write_bytes("ein {} für {}\n".encode("latin-1"))
    with pytest.raises(UsageError, match="not UTF-8"):
        read_templates(str(path))
    with pytest.raises(UsageError, match="or a file of templates"):
        read_templates("absent.txt")


def test_a_vocabulary_is_read_without_torch_and_clip(tmp_path):
    many = 1203
    rows = np.random.default_rng(0).normal(size=(many, 512)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    groups = (tuple(range(1, many + 1)), (True,) * many, ("",) * many, ("{}",), "t")
    save_vocabulary(Vocabulary(tuple(names_of("lvis")), *groups, rows), tmp_path / "v")
    code = (
        "import sys, cli\n"
        f"sys.argv = ['dkdetr', 'vocab', 'show', r'{tmp_path / 'v'}']\n"
        "try:\n    cli.main()\n"
        "except SystemExit as ended:\n    assert not ended.code\n"
        "heavy = {'torch', 'torchvision', 'open_clip', 'zarr', 'scipy', 'PIL'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "names: 1203" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"
