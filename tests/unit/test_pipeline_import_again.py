"""An import whose lost shard comes out otherwise is sealed again, and says so."""

from dataclasses import replace

from cache.verify import verify_cache
from pipeline import import_cache as import_module
from pipeline.import_cache import import_cache
from tests.unit import test_pipeline_import as foreign

world = foreign.world


def test_a_lost_shard_that_is_imported_otherwise_is_sealed_and_told(world, tmp_path, monkeypatch):
    source = foreign._write(tmp_path / "foreign", "oadp")
    request = foreign._request(world, "oadp", source, tmp_path / "c")
    old = import_cache(request).merkle_root
    (tmp_path / "c/data.zarr/objectness/c/0/0").unlink()
    read = import_module._Source.rows

    def otherwise(self, image):
        rows = read(self, image)
        return replace(rows, objectness=rows.objectness / 2)

    monkeypatch.setattr(import_module._Source, "rows", otherwise)
    said = []
    new = import_cache(request, said.append).merkle_root
    assert new != old
    assert f"was {old} and is {new}" in said[-1]
    assert verify_cache(tmp_path / "c").good
