"""Files made to do harm: no code runs, nothing outside is read, memory stays small."""

import io
import json
import os
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch

from cache.durable import dump_checked_json
from cache.spec import CacheError
from cache.store import open_cache
from cache.verify import verify_cache
from dkdetr.data.image_files import safe_join
from dkdetr.data.splits import load_split
from dkdetr.data.vocabulary import load_vocabulary
from dkdetr.engine.checkpoint import load_checkpoint
from dkdetr.errors import DkdetrError
from dkdetr.inference.convert import read_tensors
from pipeline.file_proposals import FileOptions, read_boxes
from pipeline.foreign_caches import PthFiles
from pipeline.foreign_tensors import load_matrix, load_pth
from pipeline.teacher import load_teacher
from tests.cache_samples import write_sample_cache
from tests.unit.data_world import coco_document, write_world

_REFUSALS = (DkdetrError, CacheError)


class _Payload:
    """Makes a folder when it is unpickled: the proof that code has run."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture
def ran(tmp_path):
    return tmp_path / "code-has-run"


def _torch_file(path, payload):
    torch.save({"state_dict": payload, "model": payload, "embeddings": payload}, path)
    return path


def _plain_pickle(path, payload):
    path.write_bytes(bytes(ForkingPickler.dumps(payload)))
    return path


def _object_array(path, payload):
    np.save(path, np.array([payload], dtype=object), allow_pickle=True)
    return path


def _cache_with_object_text(path, payload):
    write_sample_cache(path)
    _object_array(path / "text/embeddings.npy", payload)
    return path


def _cache_with_pickle_codec(path, payload):
    write_sample_cache(path)
    file = path / "data.zarr/objectness/zarr.json"
    table = json.loads(file.read_text())
    table["codecs"] = [{"name": "numcodecs.pickle", "configuration": {"protocol": 5}}]
    file.write_text(json.dumps(table))
    _plain_pickle(path / "data.zarr/objectness/c/0/0", payload)
    return path


def _cache_with_pickled_neighbors(path, payload):
    write_sample_cache(path)
    (path / "neighbors").mkdir()
    (path / "neighbors/manifest.json").write_bytes(
        dump_checked_json({"data_root": "x", "parameters": {}, "files": {}})
    )
    _object_array(path / "neighbors/indices.npy", payload)
    return path


def _checkpoint(path, payload):
    import xxhash

    _torch_file(path, payload)
    data = path.read_bytes()
    marker = {"size": len(data), "xxh3_128": xxhash.xxh3_128_hexdigest(data), "iteration": 1}
    path.with_suffix(".json").write_text(json.dumps(marker))
    return path


def _zip_of_pth(path, payload):
    buffer = io.BytesIO()
    torch.save(payload, buffer)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("train2017/1.pth", buffer.getvalue())
    return path


def _teacher_folder(path, payload):
    path.mkdir()
    _torch_file(path / "open_clip_pytorch_model.bin", payload)
    return path


def _tar_as_pt(path, payload):
    inner = _plain_pickle(path.with_suffix(".pickle"), payload)
    with tarfile.open(path, "w") as archive:
        archive.add(inner, "pickle")
    return path


def _read_all(path):
    reader = open_cache(path)
    reader.rows(int(reader.image_ids[0]))
    reader.text()
    return reader.neighbors()


_BY_IMAGE_ID = FileOptions(order="image_id")


def _packed(path, options):
    split = load_split(write_world(path.parent / "world", coco_document()), path.parent)
    return read_boxes(path, options, split)


_ARTEFACTS = {
    "weights to convert": (_torch_file, "w.pth", read_tensors),
    "weights as a bare pickle": (_plain_pickle, "w.pt", read_tensors),
    "checkpoint with a fitting marker": (_checkpoint, "step_00000001.pt", load_checkpoint),
    "vocabulary": (_plain_pickle, "v.safetensors", load_vocabulary),
    "text bank .npy": (_object_array, "bank.npy", load_matrix),
    "text bank .pt": (_torch_file, "bank.pt", load_matrix),
    "legacy tar as .pt": (_tar_as_pt, "old.pt", load_matrix),
    "imported .pth in a zip": (_zip_of_pth, "all.zip", lambda path: PthFiles(path).load("1")),
    "imported .pth": (_torch_file, "1.pth", lambda path: load_pth(path.read_bytes(), "x")),
    "proposals": (_plain_pickle, "p.json", lambda path: _packed(path, FileOptions())),
    "pickled proposals": (_plain_pickle, "p.pkl", lambda path: _packed(path, _BY_IMAGE_ID)),
    "teacher's folder": (_teacher_folder, "t", lambda path: load_teacher(f"ViT-B-32:{path}")),
    "cache: text": (_cache_with_object_text, "c1", _read_all),
    "cache: codec": (_cache_with_pickle_codec, "c2", _read_all),
    "cache: neighbours": (_cache_with_pickled_neighbors, "c3", _read_all),
}


@pytest.mark.parametrize("kind", _ARTEFACTS)
def test_no_artefact_runs_code(tmp_path, ran, kind):
    make, name, read = _ARTEFACTS[kind]
    path = make(tmp_path / name, _Payload(ran))
    with pytest.raises(_REFUSALS) as caught:
        read(path)
    assert not ran.exists()
    assert caught.value.exit_code in (2, 3, 4, 5)


def test_the_payload_would_have_run(tmp_path, ran):
    ForkingPickler.loads(ForkingPickler.dumps(_Payload(ran)))
    assert ran.is_dir()


_PATHS = [
    "../secret.jpg", "a/../../secret.jpg", "/etc/passwd", "..\\secret.jpg", "C:\\secret.jpg",
    "C:secret.jpg", "http://host/secret.jpg", "file:///etc/passwd", "x\0.jpg", "",
    "link/secret.jpg", "loop/x.jpg", "a" * 300 + ".jpg",
]  # fmt: skip


@pytest.mark.parametrize("name", _PATHS)
def test_no_file_name_leads_out_of_the_image_folder(tmp_path, name):
    root = tmp_path / "images"
    root.mkdir()
    (tmp_path / "secret.jpg").write_bytes(b"x")
    (root / "link").symlink_to(tmp_path)
    (root / "loop").symlink_to(root / "loop")
    with pytest.raises(DkdetrError) as caught:
        safe_join(root, name)
    assert caught.value.exit_code == 3


def test_no_name_inside_a_cache_leads_out_of_it(tmp_path):
    path = tmp_path / "c"
    write_sample_cache(path)
    for name in ("manifest/000000.json", "text/manifest.json", "COMPLETE.json"):
        file = path / name
        good = file.read_bytes()
        table = json.loads(good)
        del table["check"]
        key = "leaves" if name == "COMPLETE.json" else "files"
        table[key]["../../secret"] = next(iter(table[key].values()))
        file.write_bytes(dump_checked_json(table))
        with pytest.raises(CacheError):
            _read_all(path)
        with pytest.raises(CacheError, match="not its own"):
            verify_cache(path)
        file.write_bytes(good)


def _png(width, height, *, size_of_data=None, depth=1, color=0):
    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    rows = zlib.compress(bytes(size_of_data or (height * (width // 8 + 1))), 9)
    head = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    signature = b"\x89PNG\r\n\x1a\n"
    return signature + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def _text_bomb():
    plain = _png(8, 8)
    text = zlib.compress(b"\0" * (1 << 28), 9)
    body = b"key\0\0" + text
    chunk = struct.pack(">I", len(body)) + b"zTXt" + body
    chunk += struct.pack(">I", zlib.crc32(b"zTXt" + body))
    return plain[:33] + chunk + plain[33:]


def _bmp():
    head = struct.pack("<2sIHHI", b"BM", 1 << 30, 0, 0, 54)
    return head + struct.pack("<IiiHHIIiiII", 40, 60000, 60000, 1, 24, 0, 0, 0, 0, 0, 0)


_BOMBS = {
    "one bit a pixel": lambda: _png(30000, 30000, size_of_data=1 << 20),
    "a billion pixels": lambda: _png(1 << 16, 1 << 16, size_of_data=1 << 16),
    "as large as its annotation": lambda: _png(20000, 20000, size_of_data=1 << 20),
    "compressed text": _text_bomb,
    "a header of a bitmap": _bmp,
}

_DECODE = """
import sys
from pathlib import Path
from dkdetr.data.image_files import UnreadableImageError, read_image
try:
    read_image(Path(sys.argv[1]), expected_hw=(20000, 20000))
    print("read")
except UnreadableImageError:
    print("refused")
# Not ru_maxrss: that remembers the process which started this one.
lines = Path("/proc/self/status").read_text().splitlines()
print(next(line.split()[1] for line in lines if line.startswith("VmHWM")))
"""


def test_five_image_bombs_are_refused_in_little_memory(tmp_path):
    for name, make in _BOMBS.items():
        path = tmp_path / "bomb.png"
        path.write_bytes(make())
        done = subprocess.run(
            [sys.executable, "-c", _DECODE, path], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, (name, done.stderr)
        outcome, peak_kib = done.stdout.split()
        assert outcome == "refused", name
        assert int(peak_kib) < 1_000_000, name
