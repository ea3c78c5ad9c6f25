"""Bundles arrive whole or not at all, and cannot write where they should not."""

import io
import json
import tarfile
from pathlib import Path

import pytest

from dkdetr.errors import CorruptArtefactError, DataError, MismatchError
from pipeline.bundle import MANIFEST, BundleFile, install_bundle, write_bundle

NAMES = ("hub/models--a--b/snapshots/abc/weights.bin", "hub/models--a--b/refs/main", "torch/r.pth")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    files = []
    for number, name in enumerate(NAMES):
        source = tmp_path / "here" / name
        source.parent.mkdir(parents=True, exist_ok=True)
        source.write_bytes(bytes([number]) * (3000 + number))
        files.append(BundleFile(name, source))
    write_bundle(tmp_path / "b.tar", files, {"teacher": "t"})
    return tmp_path / "b.tar"


def places(root: Path) -> dict[str, Path]:
    return {"hub": root / "there/hub", "torch": root / "there/torch"}


def written(root: Path) -> list[str]:
    there = root / "there"
    return sorted(str(p.relative_to(there)) for p in there.rglob("*") if p.is_file())


def test_files_come_to_their_places_once(bundle, tmp_path):
    manifest, new = install_bundle(bundle, places(tmp_path))
    assert manifest.made_for == {"teacher": "t"}
    assert manifest.total_bytes == 9003
    assert sorted(new) == written(tmp_path) == sorted(NAMES)
    for name in NAMES:
        there, here = tmp_path / "there" / name, tmp_path / "here" / name
        assert there.read_bytes() == here.read_bytes()
    assert install_bundle(bundle, places(tmp_path))[1] == ()


def test_the_same_files_make_the_same_bytes(bundle, tmp_path):
    files = [BundleFile(name, tmp_path / "here" / name) for name in reversed(NAMES)]
    write_bundle(tmp_path / "again.tar", files, {"teacher": "t"})
    assert (tmp_path / "again.tar").read_bytes() == bundle.read_bytes()


def test_another_file_there_is_left(bundle, tmp_path):
    path = tmp_path / "there/torch/r.pth"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"mine")
    with pytest.raises(MismatchError, match=r"r\.pth' is there and is not the bundle's"):
        install_bundle(bundle, places(tmp_path))
    assert written(tmp_path) == ["torch/r.pth"]
    assert path.read_bytes() == b"mine"


@pytest.mark.parametrize("place", [600, 2100, 5000, 9000, -2000])
def test_damage_anywhere_leaves_nothing(bundle, tmp_path, place):
    content = bytearray(bundle.read_bytes())
    content[place] ^= 1
    bundle.write_bytes(content)
    try:
        install_bundle(bundle, places(tmp_path))
    except CorruptArtefactError:
        assert written(tmp_path) == []
    else:  # a byte of a header or of the padding that says nothing
        for name in NAMES:
            assert (tmp_path / "there" / name).stat().st_size >= 3000


def test_every_cut_is_noticed(bundle, tmp_path):
    whole = bundle.read_bytes()
    for length in range(0, len(whole) - 10240, 700):
        bundle.write_bytes(whole[:length])
        with pytest.raises(CorruptArtefactError):
            install_bundle(bundle, places(tmp_path))
        assert written(tmp_path) == []


def forged(path: Path, name: str, *, kind: bytes = tarfile.REGTYPE, more: int = 0) -> Path:
    """A bundle whose manifest vouches for one member, of any name and kind."""
    import hashlib

    content = b"x" * 10
    digest = hashlib.sha256(content).hexdigest()
    manifest = {
        "format": "dkdetr-bundle-1", "sizes": {name: 10}, "hashes": {name: digest}, "made_for": {},
    }  # fmt: skip
    text = json.dumps(manifest).encode()
    with tarfile.open(path, "w") as tar:
        first = tarfile.TarInfo(MANIFEST)
        first.size = len(text)
        tar.addfile(first, io.BytesIO(text))
        for each in (name, *(f"hub/more{n}" for n in range(more))):
            info = tarfile.TarInfo(each)
            info.type, info.linkname = kind, "elsewhere"
            info.size = 10 if kind == tarfile.REGTYPE else 0
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize(
    "name",
    ["hub/../../out", "/etc/out", "out", "hub", "hub/", "hub//out", "hub/./out", "other/out",
     "hub/a\\..\\out", "hub/C:out", "hub/a\nb", "../hub/out"],
)  # fmt: skip
def test_names_that_lead_out_are_refused(tmp_path, name):
    with pytest.raises(CorruptArtefactError, match=r"not its own|not as its manifest"):
        install_bundle(forged(tmp_path / "f.tar", name), places(tmp_path))
    assert written(tmp_path) == []
    assert not list(tmp_path.rglob("out"))


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE, tarfile.CHRTYPE]
)
def test_links_and_other_kinds_are_refused(tmp_path, kind):
    with pytest.raises(CorruptArtefactError, match="no plain file"):
        install_bundle(forged(tmp_path / "f.tar", "hub/a", kind=kind), places(tmp_path))
    assert written(tmp_path) == []


def test_a_file_that_the_manifest_does_not_know(tmp_path):
    with pytest.raises(CorruptArtefactError, match="'hub/more0' is not as its manifest says"):
        install_bundle(forged(tmp_path / "f.tar", "hub/a", more=1), places(tmp_path))


def test_a_file_is_no_folder_of_another(bundle, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there/torch").write_bytes(b"mine")
    with pytest.raises(CorruptArtefactError, match=r"'torch/r\.pth' lies below what is a file"):
        install_bundle(bundle, places(tmp_path))
    assert written(tmp_path) == ["torch"]


@pytest.mark.parametrize("size", ["Infinity", "[" * 100_000])
def test_a_manifest_that_no_number_fits(tmp_path, size):
    text = f'{{"format": "dkdetr-bundle-1", "sizes": {{"hub/a": {size}'.encode()
    text += b'}, "hashes": {"hub/a": ""}, "made_for": {}}' if size == "Infinity" else b""
    with tarfile.open(tmp_path / "f.tar", "w") as tar:
        first = tarfile.TarInfo(MANIFEST)
        first.size = len(text)
        tar.addfile(first, io.BytesIO(text))
    with pytest.raises(CorruptArtefactError, match="manifest cannot be read"):
        install_bundle(tmp_path / "f.tar", places(tmp_path))


def test_a_link_in_the_place_leads_nowhere(bundle, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / "there/hub").mkdir(parents=True)
    (tmp_path / "there/hub/models--a--b").symlink_to(outside)
    with pytest.raises(CorruptArtefactError, match="leads out of"):
        install_bundle(bundle, places(tmp_path))
    assert list(outside.iterdir()) == []


def test_what_is_no_bundle(tmp_path):
    with pytest.raises(DataError, match="no bundle"):
        install_bundle(tmp_path / "absent.tar", places(tmp_path))
    for content in (b"", b"no tar at all", b"\0" * 20480):
        (tmp_path / "n.tar").write_bytes(content)
        with pytest.raises(CorruptArtefactError):
            install_bundle(tmp_path / "n.tar", places(tmp_path))
    with tarfile.open(tmp_path / "n.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("hub/a"))
    with pytest.raises(CorruptArtefactError, match="does not stand in front"):
        install_bundle(tmp_path / "n.tar", places(tmp_path))
