"""How often a teacher is right, by hand."""

import numpy as np

from pipeline.pictograms.material_study import shares_by_group


def test_shares_are_of_each_groups_own_objects():
    rank = np.array([0, 4, 5, 0, 0, 9])
    groups = ["frequent", "frequent", "rare", "rare", "rare", ""]
    assert shares_by_group(rank, groups) == {
        "rare": {"objects": 3, "top1": 0.667, "top5": 0.667},
        "frequent": {"objects": 2, "top1": 0.5, "top5": 1.0},
    }
