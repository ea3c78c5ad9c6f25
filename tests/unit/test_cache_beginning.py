"""Which folders a cache may be begun in."""

import pytest

from cache.beginning import refuse_foreign_folder
from cache.layout import CACHE_FILE, PLAN_FILE, PROVENANCE_FILE
from cache.spec import CacheError


@pytest.mark.parametrize("name", [CACHE_FILE, PLAN_FILE, PROVENANCE_FILE])
def test_what_a_kill_left_of_the_first_files_is_ours(tmp_path, name: str) -> None:
    (tmp_path / f"{name}.0123abcd.partial").write_bytes(b"{")
    refuse_foreign_folder(tmp_path)


def test_anything_else_is_foreign_and_named(tmp_path) -> None:
    (tmp_path / "holiday.jpg").write_bytes(b"")
    with pytest.raises(CacheError, match=r"holiday\.jpg"):
        refuse_foreign_folder(tmp_path)
