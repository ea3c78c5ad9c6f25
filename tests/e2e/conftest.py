"""A few pictures, a tiny CLIP and the request of a cache of them."""

from pathlib import Path

import pytest

from pipeline.request import CacheRequest
from tests.e2e.tiny_stage_one import tiny_request, write_tiny_teacher, write_world


@pytest.fixture(scope="module")
def teacher_spec(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tiny_teacher(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_world(folder)
    return folder


@pytest.fixture
def request_(world: Path, teacher_spec: str, tmp_path: Path) -> CacheRequest:
    return tiny_request(world, teacher_spec, tmp_path / "cache")
