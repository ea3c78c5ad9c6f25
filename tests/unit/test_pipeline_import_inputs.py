"""What an import is made of: what its files hold, whose they are, and where they lie."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cache.spec import StaleCacheError
from dkdetr.errors import DataError
from pipeline.import_cache import import_cache
from pipeline.repair import repair_cache
from tests.unit.data_world import coco_document, write_world
from tests.unit.test_pipeline_import import (
    COUNTS,
    _boxes_of,
    _request,
    _scores_of,
    _vectors,
    _write,
    write_import_world,
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_import_world(tmp_path_factory.mktemp("world"))


def test_files_of_the_same_size_and_another_content_are_another_cache(world, tmp_path):
    source = _write(tmp_path / "foreign", "oadp")
    wholes = tmp_path / "globals"
    wholes.mkdir()
    for number in COUNTS:
        torch.save(_vectors(300 + number, 1)[0], wholes / f"{number}.pth")
    request = _request(world, "oadp", source, tmp_path / "c", image_source=wholes)
    import_cache(request)

    def refuses(change, field):
        path, tensor = change
        before = path.read_bytes()
        torch.save(tensor, path)
        assert len(path.read_bytes()) == len(before)
        with pytest.raises(StaleCacheError, match=rf"proposals\.{field}"):
            import_cache(request)
        path.write_bytes(before)

    refuses((wholes / "5.pth", _vectors(999, 1)[0]), "wholes_xxh3_128")
    content = {
        "embeddings": _vectors(999, COUNTS[5]).half(),
        "bboxes": _boxes_of(5),
        "objectness": _scores_of(5),
    }
    refuses((source / "5.pth", content), "files_xxh3_128")
    with pytest.raises(StaleCacheError, match=r"proposals\.wholes_xxh3_128"):
        import_cache(replace(request, image_source=None))
    assert import_cache(request).num_images == 7


def test_pictures_that_would_share_a_file_are_refused(world, tmp_path):
    document = coco_document()
    for folder, image in zip(("cam1", "cam2"), document["images"][:2], strict=False):
        image["file_name"] = f"{folder}/0001.png"
        (tmp_path / "world/images" / folder).mkdir(parents=True)
    split = write_world(tmp_path / "world", document)
    source = _write(tmp_path / "foreign", "oadp")
    (source / "1.pth").rename(source / "0001.pth")
    with pytest.raises(DataError, match=r"'cam1/0001\.png' and 'cam2/0001\.png' are one name"):
        import_cache(replace(_request(world, "oadp", source, tmp_path / "c"), split=split))
    assert not (tmp_path / "c").exists()


def test_an_import_with_relative_words_is_repaired_from_elsewhere(world, tmp_path, monkeypatch):
    _write(tmp_path / "foreign", "detpro")
    monkeypatch.chdir(world[0])
    request = _request(world, "detpro", tmp_path / "foreign", tmp_path / "c", boxes="boxes.json")
    import_cache(replace(request, split="ovcoco:images:train.json", text_bank=Path("bank.npy")))
    (tmp_path / "c/manifest/000000.json").unlink()
    monkeypatch.chdir(tmp_path)
    assert repair_cache(tmp_path / "c").same_bytes
