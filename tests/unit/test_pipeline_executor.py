"""What a Dask worker's name says."""

import pytest

from pipeline.executor import worker_number


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("3", 3),  # LocalCluster's
        ("gpu-12", 12),
        ("node7.cluster-0", 0),
        ("tcp://10.0.0.1:40123", 0),  # nobody named it: that is a port
        ("10.0.0.1:40123", 0),
        ("alice", 0),
    ],
)
def test_a_number_at_the_end_of_a_workers_name_is_its_own(name: str, number: int) -> None:
    assert worker_number(name) == number
