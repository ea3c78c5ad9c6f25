"""Three packages that score LVIS come to our numbers: `lvis`, another, and ours by itself."""

from pathlib import Path

import pytest

from tests.benchmarks.scoring import (
    faster_coco_eval,
    hotcoco,
    official,
    ours,
    write_problem,
)


@pytest.fixture(scope="module")
def problem(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("problem")
    write_problem(folder, num_images=25, num_detections=40, num_classes=30)
    return folder


@pytest.mark.parametrize("theirs", [official, faster_coco_eval, hotcoco])
def test_the_same_numbers(problem: Path, theirs) -> None:
    mine = ours(problem)
    assert mine["AP"] > 0.1
    found = theirs(problem)
    assert {key: found[key] for key in mine} == pytest.approx(mine, abs=1e-12)
