"""A cache's bytes are a format: they change only when somebody says so."""

import json
from pathlib import Path

import pytest

from tests.golden.golden_cache import RECORD, STORAGES, golden_root, zarr_major


@pytest.mark.parametrize("storage", STORAGES)
def test_the_same_rows_are_the_same_bytes_as_ever(tmp_path: Path, storage: str) -> None:
    recorded = json.loads(RECORD.read_text())
    assert zarr_major() in recorded, (
        f"no hash for {zarr_major()}: python -m tests.golden.golden_cache records one"
    )
    assert golden_root(tmp_path / "cache", storage) == recorded[zarr_major()][storage]
