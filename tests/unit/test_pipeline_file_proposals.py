"""Proposals from files: results json, and pickled lists that must not run, nor be misread."""

import io
import json
import os
import pickle  # noqa: TID251  what our reader reads is written, and attacked, with the real one
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import IO

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.durable import sweep_partial_files
from dkdetr.data.splits import Split, load_split
from dkdetr.errors import CorruptArtefactError, DataError, UsageError
from pipeline.file_proposals import FileOptions, FileProposals, pack_file, parse_file_options
from pipeline.leaks import check_leaks, remarks
from pipeline.pickled_lists import read_pickled_lists
from pipeline.proposal_sources import parse_proposals
from pipeline.proposals import Seen, SourceImage

NOVEL = {"cat", "umbrella"}


@pytest.fixture
def split(tmp_path: Path) -> Split:
    """Three pictures of other sizes, listed by their annotation file in the order 9, 4, 6."""
    return _split(tmp_path, "ovcoco")


def _split(folder: Path, protocol: str) -> Split:
    (folder / "images").mkdir(exist_ok=True)
    sizes = {9: (100, 40), 4: (40, 100), 6: (60, 60)}
    images = [
        {"id": number, "file_name": f"{number}.png", "width": width, "height": height,
         "neg_category_ids": [], "not_exhaustive_category_ids": []}
        for number, (width, height) in sizes.items()
    ]  # fmt: skip
    names = {1: "person", 2: "car", 3: "cat", 4: "umbrella"}
    categories = [
        {"id": number, "name": name, "split": "novel" if name in NOVEL else "base",
         "frequency": "r" if name in NOVEL else "f"}
        for number, name in names.items()
    ]  # fmt: skip
    annotations = [
        {"id": number, "image_id": number, "category_id": 1, "bbox": [1, 1, 9, 9], "area": 81,
         "iscrowd": 0, "segmentation": [[1, 1, 9, 9, 1, 9]]}
        for number in sizes
    ]  # fmt: skip
    document = {"images": images, "annotations": annotations, "categories": categories}
    path = folder / f"{protocol}.json"
    path.write_text(json.dumps(document))
    return load_split(f"{protocol}:{folder / 'images'}:{path}", folder)


def _boxes(*rows: list[float]) -> np.ndarray:
    return np.array(rows, dtype=np.float32).reshape(-1, 5)


def _write(path: Path, value: object, protocol: int = 4) -> Path:
    path.write_bytes(pickle.dumps(value, protocol=protocol))
    return path


def _propose(packed: Path, *image_ids: int) -> list[list[list[float]]]:
    picture = np.zeros((8, 8, 3), dtype=np.uint8)
    found = FileProposals(packed).propose([SourceImage(number, picture) for number in image_ids])
    return [each.boxes_xyxy.tolist() for each in found]


def test_results_file_round_trips_by_image(split: Split, tmp_path: Path) -> None:
    records = [
        {"image_id": 9, "bbox": [1, 2, 3, 4], "score": 0.5, "category_id": 1},
        {"image_id": 4, "bbox": [0, 0, 5, 5], "score": 0.25},
        {"image_id": 9, "bbox": [2, 2, 6, 6], "score": 0.75},
    ]
    path, folder = tmp_path / "r.json", tmp_path / "packed"
    path.write_text(json.dumps(records))
    packed = pack_file(path, FileOptions(), split, folder)
    assert packed == pack_file(path, FileOptions(), split, folder)
    assert _propose(packed, 4, 9, 5) == [[[0, 0, 5, 5]], [[1, 2, 4, 6], [2, 2, 8, 8]], []]
    source = FileProposals(packed)
    assert source.image_ids == {4, 9}
    records[0]["score"] = 0.6
    path.write_text(json.dumps(records))
    other = FileProposals(pack_file(path, FileOptions(), split, folder))
    assert other.identity != source.identity
    packed.write_bytes(b"nonsense")
    with pytest.raises(CorruptArtefactError):
        FileProposals(packed)
    with pytest.raises(UsageError, match="names its images"):
        pack_file(path, FileOptions(order="image_id"), split, folder)


@pytest.mark.parametrize(
    "record",
    [
        {"image_id": 1, "bbox": [1, 2, 3], "score": 0.5},
        {"image_id": "1", "bbox": [1, 2, 3, 4], "score": 0.5},
        {"image_id": 1, "bbox": [1, 2, -3, 4], "score": 0.5},
        {"image_id": 1, "bbox": [1, 2, 3, "4"], "score": 0.5},
        {"image_id": 1, "bbox": [1, 2, 3, 4]},
        {"image_id": 2**64 - 1, "bbox": [1, 2, 3, 4], "score": 0.5},
        {"image_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5, "category_id": [1]},
        {"image_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5, "category_id": 2**63},
        [1, 2],
    ],
)
def test_bad_records_are_named(record: object, split: Split, tmp_path: Path) -> None:
    good = {"image_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}
    (tmp_path / "r.json").write_text(json.dumps([good, good, record]))
    with pytest.raises(DataError, match="first: /2"):
        pack_file(tmp_path / "r.json", FileOptions(), split, tmp_path)


def test_a_packed_file_that_is_cut_or_flipped_anywhere_is_named(
    split: Split, tmp_path: Path
) -> None:
    path = tmp_path / "r.json"
    path.write_text(json.dumps([{"image_id": 9, "bbox": [1, 2, 3, 4], "score": 0.5}]))
    packed = pack_file(path, FileOptions(), split, tmp_path)
    whole = packed.read_bytes()
    cuts = [whole[:length] for length in (0, 3, len(whole) // 2, len(whole) - 40)]
    flips = [
        whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in range(0, len(whole), 7)
    ]
    loaded = 0
    for data in cuts + flips:
        packed.write_bytes(data)
        with suppress(CorruptArtefactError):
            FileProposals(packed)
            loaded += 1  # a member's time, for one, may be anything
    assert loaded < len(flips) / 2
    for data in cuts:
        packed.write_bytes(data)
        with pytest.raises(CorruptArtefactError, match=r"file-\w+\.npz' cannot be read"):
            FileProposals(packed)


def test_a_packed_file_appears_whole_or_not_at_all(
    split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, folder = tmp_path / "r.json", tmp_path / "cache/proposals"
    path.write_text(json.dumps([{"image_id": 9, "bbox": [1, 2, 3, 4], "score": 0.5}]))

    def killed(file: IO[bytes], **_: object) -> None:
        file.write(b"half")
        # What lies there at this moment, the sweep of the next writer takes away.
        assert sweep_partial_files(tmp_path / "cache") == 1
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", killed)
    with pytest.raises(OSError, match="No space left"):
        pack_file(path, FileOptions(), split, folder)
    monkeypatch.undo()
    assert not list(folder.iterdir())
    synced: list[int] = []
    monkeypatch.setattr("dkdetr.atomic_file.os.fsync", synced.append)
    assert pack_file(path, FileOptions(), split, folder).is_file()
    assert len(synced) == 2  # the file, then its folder


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", "<i4", "<u2"])
def test_lists_of_arrays_are_read_as_they_were_written(protocol: int, dtype: str) -> None:
    arrays = [np.arange(10).reshape(2, 5).astype(dtype), np.zeros((0, 5), dtype=dtype)]
    arrays.append(np.asfortranarray(np.arange(15).reshape(3, 5).astype(dtype)))
    arrays.append(np.arange(40).reshape(8, 5).astype(dtype)[::2])
    read = read_pickled_lists(pickle.dumps([*arrays, arrays[:2]], protocol=protocol), "it")
    assert isinstance(read[4], list)
    for ours, theirs in zip([*read[:4], *read[4]], [*arrays, *arrays[:2]], strict=True):
        np.testing.assert_array_equal(ours, theirs)


class _Runs:
    """Writes a pickle that calls a function when it is loaded."""

    def __init__(self, function: object, *arguments: object) -> None:
        self._call = (function, arguments)

    def __reduce__(self) -> tuple[object, ...]:
        return self._call


def _inst(path: Path) -> bytes:
    return f"(S'touch {path}'\nios\nsystem\n.".encode()


def _payloads(canary: Path) -> dict[str, tuple[bytes, str]]:
    touch, code = f"touch {canary}", f"open({str(canary)!r}, 'w')"
    objects = np.array([[_Runs(os.system, touch)]], dtype=object)
    rows = np.zeros((1, 5))
    structured = np.zeros(3, dtype=[("a", "f4"), ("b", "O")])
    dumps = pickle.dumps
    return {
        "os.system": (dumps([_Runs(os.system, touch)]), r"GLOBAL posix\.system"),
        "protocol 0": (dumps([_Runs(os.system, touch)], protocol=0), r"GLOBAL posix\.system"),
        "eval": (dumps([rows, _Runs(eval, code)]), r"GLOBAL (builtins|__builtin__)\.eval"),
        "exec": (dumps([_Runs(exec, code)], protocol=2), r"GLOBAL \w+\.exec"),
        "getattr": (dumps([_Runs(getattr, rows, "tofile")]), r"GLOBAL \w+\.getattr"),
        "importlib": (dumps(_Runs(__import__, "os")), r"GLOBAL \w+\.__import__"),
        "objects": (dumps([objects]), "array of objects|GLOBAL"),
        "structured": (dumps([structured]), "array of objects|structured dtype"),
        "inst": (_inst(canary), r"GLOBAL os\.system"),
        "build": (dumps([_Runs(io.BytesIO, b"x")]), r"GLOBAL _io\.BytesIO"),
        "open": (dumps([_Runs(open, str(canary), "w")]), r"GLOBAL _?io\.open"),
        "numpy load": (dumps([_Runs(np.load, str(canary))]), r"GLOBAL numpy\.load"),
        "fake array": (b"cnumpy\nndarray\n(cos\nsystem\ntR.", r"GLOBAL os\.system"),
        "call ndarray": (b"(lcnumpy\nndarray\n(tRa.", "a call of ndarray"),
        "persistent": (b"Pother\n.", "opcode PERSID"),
        "extension": (b"\x80\x02\x82\x01.", "opcode EXT1"),
    }


@pytest.mark.parametrize("name", sorted(_payloads(Path("x"))))
def test_malicious_pickles_run_nothing_and_are_named(name: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    data, words = _payloads(canary)[name]
    with pytest.raises(CorruptArtefactError, match=words) as caught:
        read_pickled_lists(data, "proposals 'x.pkl'")
    assert caught.value.exit_code == 5
    assert not canary.exists()


@given(st.data())
def test_a_spoilt_pickle_is_refused_or_read_but_never_crashes(data: st.DataObject) -> None:
    whole = pickle.dumps([np.arange(10.0).reshape(2, 5)], protocol=data.draw(st.integers(0, 5)))
    spoilt = bytearray(whole[: data.draw(st.integers(0, len(whole)))])
    for place in data.draw(st.lists(st.integers(0, max(0, len(spoilt) - 1)), max_size=3)):
        if spoilt:
            spoilt[place] = data.draw(st.integers(0, 255))
    with suppress(CorruptArtefactError):  # any other exception fails the test
        read_pickled_lists(bytes(spoilt), "it")


def test_a_list_goes_to_its_images_by_the_stated_order(split: Split, tmp_path: Path) -> None:
    # In the file's order 9, 4, 6: each box fits its own picture alone.
    wide, tall, small = [90, 5, 99, 30, 0.5], [5, 90, 30, 99, 0.25], [50, 50, 59, 59, 0.125]
    path = _write(tmp_path / "p.pkl", [_boxes(wide), _boxes(tall, tall), _boxes(small)])
    packed = pack_file(path, FileOptions(order="annotations"), split, tmp_path)
    assert _propose(packed, 9, 4, 6) == [[wide[:4]], [tall[:4]] * 2, [small[:4]]]
    with pytest.raises(DataError, match=r"order 'image_id'.*\?order=annotations"):
        pack_file(path, FileOptions(order="image_id"), split, tmp_path)
    by_id = _write(tmp_path / "q.pkl", [_boxes(tall), _boxes(small), _boxes(wide)], protocol=2)
    packed = pack_file(by_id, FileOptions(order="image_id"), split, tmp_path)
    assert _propose(packed, 9, 4, 6) == [[wide[:4]], [tall[:4]], [small[:4]]]
    neither = _write(tmp_path / "n.pkl", [_boxes(tall), _boxes(tall), _boxes(tall)])
    with pytest.raises(DataError, match="belongs to other pictures"):
        pack_file(neither, FileOptions(order="image_id"), split, tmp_path)
    with pytest.raises(UsageError, match="state the order"):
        pack_file(path, FileOptions(), split, tmp_path)


def test_a_list_by_class_is_joined_and_wrong_lists_are_refused(
    split: Split, tmp_path: Path
) -> None:
    box, order = [1, 1, 9, 9, 0.5], FileOptions(order="image_id")
    by_class = [[_boxes(box), _boxes(), _boxes(box)]] * 3
    packed = pack_file(_write(tmp_path / "c.pkl", by_class), order, split, tmp_path)
    assert _propose(packed, 4) == [[box[:4]] * 2]
    assert FileProposals(packed).seen.num_classes == 3
    wrong = {
        "4 entries": [_boxes(box)] * 4,
        r"entry 1 has shape \[1, 4\]": [_boxes(box), _boxes(box)[:, :4], _boxes()],
        "entry 2 has a box that ends": [_boxes(), _boxes(), _boxes([9, 9, 1, 1, 0.5])],
        "entry 0 has a box": [_boxes([1, 1, 9, 9, np.nan]), _boxes(), _boxes()],
    }
    for words, value in wrong.items():
        with pytest.raises(DataError, match=words):
            pack_file(_write(tmp_path / "w.pkl", value), order, split, tmp_path)


def test_options_of_a_file() -> None:
    assert parse_file_options("a/b.json") == ("a/b.json", FileOptions())
    options = FileOptions(order="image_id", novel="unseen")
    assert parse_file_options("b?c.pkl?order=image_id&novel=unseen") == ("b?c.pkl", options)
    assert parse_proposals("file:b.pkl?order=annotations").options.order == "annotations"
    for wrong in ("b.pkl?order=random", "b.pkl?sort=image_id", "b.pkl?order=image_id&x=1"):
        with pytest.raises(UsageError, match="is none of order=image_id"):
            parse_file_options(wrong)


def _seen(**facts: object) -> Seen:
    known = {"uses_novel_names": False, "saw_novel_boxes": False}
    return Seen(source="it", detector="x", **{**known, **facts})  # type: ignore[arg-type]


LEAKS = {
    "learned": _seen(names=("Person", "UMBRELLA")),
    "stated": _seen(saw_novel_boxes=True, reason="it says so"),
    "labelled": _seen(category_ids=(1, 3)),
    "classes": _seen(num_classes=4),
}


@pytest.mark.parametrize("name", sorted(LEAKS))
def test_what_has_seen_novel_categories_is_refused_for_ovcoco_and_marked_for_lvis(
    name: str, split: Split, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="leaks novel categories") as caught:
        check_leaks(LEAKS[name], split)
    assert caught.value.exit_code == 3
    lvis = _split(tmp_path, "lvis")
    found = check_leaks(LEAKS[name], lvis)
    assert found.leaks
    assert found.provenance()["saw_novel_boxes"] is True
    assert remarks(found, lvis)[0].startswith("LEAK")
    all_base = replace(split, categories=tuple(replace(c, is_base=True) for c in split.categories))
    assert not check_leaks(LEAKS[name], all_base).leaks  # nothing is novel there


def test_what_is_known_clean_passes_and_what_is_unknown_is_said(split: Split) -> None:
    clean = check_leaks(_seen(names=("person", "car"), category_ids=(1,), num_classes=2), split)
    assert not clean.leaks
    assert not remarks(clean, split)
    assert clean.provenance()["uses_novel_names"] is False
    unknown = check_leaks(_seen(uses_novel_names=None, saw_novel_boxes=None), split)
    assert not unknown.leaks
    assert unknown.provenance()["uses_novel_names"] == "unknown"
    assert "novel=unseen" in remarks(unknown, split)[0]
