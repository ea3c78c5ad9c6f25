"""Prompts of a cache that stand in a file."""

from dataclasses import replace
from pathlib import Path

import pytest

from cache.store import open_cache
from dkdetr.errors import UsageError
from pipeline.build import cache_teacher
from pipeline.repair import repair_cache
from pipeline.request import CacheRequest, prompts_of


def test_prompts_of_a_file_are_kept_by_what_they_say(
    request_: CacheRequest, tmp_path: Path
) -> None:
    """Another file that says the same is the same cache, and a repair needs neither."""
    made = []
    for name, text in (("a.txt", "a {} here.\n# not\nmy {}.\n"), ("b.txt", "a {} here.\nmy {}.")):
        (tmp_path / name).write_text(text)
        prompts, templates = prompts_of(str(tmp_path / name))
        made.append(cache_teacher(replace(request_, prompts=prompts, templates=templates)))
        (tmp_path / name).unlink()
    assert made[0].merkle_root == made[1].merkle_root
    reader = open_cache(request_.out)
    assert reader.text()[0]["prompts"] == ["a {} here.", "my {}."]
    described = (request_.out / "text" / "manifest.json").read_text()
    assert '"file"' in described
    assert ".txt" not in described
    (request_.out / "text" / "embeddings.npy").unlink()
    repaired = repair_cache(
        request_.out, shards=(), data_root=None, device="cpu", workers=0, say=lambda _: None
    )
    assert repaired.same_bytes
    (tmp_path / "c.txt").write_text("the {}.")
    prompts, templates = prompts_of(str(tmp_path / "c.txt"))
    other = cache_teacher(replace(request_, prompts=prompts, templates=templates))
    assert (other.num_made, other.merkle_root == made[0].merkle_root) == (0, False)


def test_prompts_are_sets_or_a_file_of_templates(tmp_path: Path) -> None:
    assert prompts_of("single, clip7") == ("single,clip7", ())
    (tmp_path / "bad.txt").write_text("a photo")
    for word in ("haiku", str(tmp_path / "bad.txt")):
        with pytest.raises(UsageError, match=r"haiku|no place"):
            prompts_of(word)
