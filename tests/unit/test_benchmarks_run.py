"""The run of all benchmarks: complete, and honest about what fails."""

from pathlib import Path

from tests.benchmarks.__main__ import BENCHMARKS, Benchmark, _run

FOLDER = Path(__file__).parents[1] / "benchmarks"
NOT_ALONE = {"__main__", "machine", "made_up", "recorded", "scale"}


def test_every_benchmark_takes_part() -> None:
    there = {path.stem for path in FOLDER.glob("*.py")} - NOT_ALONE
    assert there <= {each.module for each in BENCHMARKS}


def test_a_page_has_command_output_and_peers_and_a_failure_is_told() -> None:
    peers = "figures\n| a |\n|---|\n| 1 |\nAim: 2."
    page, code = _run(Benchmark("matching", "M", "--tokens 64 --targets 2", peers=peers), "cpu")
    assert code == 0
    assert "`python -m tests.benchmarks.matching --tokens 64 --targets 2`" in page
    assert "targets   cost" in page
    assert "figures\n\n| a |\n|---|\n| 1 |\n\nAim: 2." in page
    page, code = _run(Benchmark("matching", "M", "--tokens none"), "cpu")
    assert code == 2
    assert "FAILED with exit code 2" in page
    assert "invalid int value" in page
