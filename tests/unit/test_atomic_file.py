"""Files that appear whole or not at all."""

from pathlib import Path

from dkdetr.atomic_file import atomic_file


def test_two_writers_of_one_name_and_one_process_number_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    with atomic_file(path) as slow:
        slow.write(b"slow ")
        with atomic_file(path) as fast:
            fast.write(b"fast and long")
        assert path.read_bytes() == b"fast and long"
        assert len(list(tmp_path.glob(".*.partial"))) == 1
        slow.write(b"one")
    assert [*tmp_path.iterdir()] == [path]
    assert path.read_bytes() == b"slow one"
