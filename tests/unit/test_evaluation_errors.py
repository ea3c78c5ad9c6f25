"""Kinds of errors and what they cost, on cases small enough to do by hand."""

import numpy as np
import pytest

from dkdetr.data.annotations import Category, ImageInfo
from dkdetr.evaluation.confusion import ConfusedPair, confused_pairs, confusion_csv
from dkdetr.evaluation.curves import ERROR_KINDS, error_kinds, group_curves
from dkdetr.evaluation.ground_truth import GroundTruth
from dkdetr.evaluation.results import Results
from dkdetr.evaluation.verdicts import Verdict, judge

CAT, DOG = 1, 2


def truth_of(objects, *, protocol="ovcoco", negative=(), not_exhaustive=(), crowd=()):
    """One image of 200 x 200; objects are (category, x, y, w, h); dogs are novel."""
    boxes = np.array([row[1:] for row in objects], dtype=float).reshape(-1, 4)
    return GroundTruth(
        name="by hand",
        protocol=protocol,
        categories=(Category(CAT, "cat", "f", True), Category(DOG, "dog", "r", False)),
        images=(ImageInfo(7, "x.png", 200, 200, tuple(negative), tuple(not_exhaustive)),),
        image_ids=np.full(len(objects), 7),
        category_ids=np.array([row[0] for row in objects], dtype=np.int64),
        boxes_xywh=boxes,
        areas=boxes[:, 2] * boxes[:, 3],
        is_crowd=np.isin(np.arange(len(objects)), crowd),
    )


def results_of(*rows):
    """Rows are (category, x, y, w, h, score)."""
    columns = np.array(rows, dtype=float).reshape(-1, 6)
    return Results(
        np.full(len(rows), 7), columns[:, 0].astype(np.int64), columns[:, 1:5], columns[:, 5]
    )


def costs(truth, results, group="all"):
    return {each.kind: each.cost[group] for each in error_kinds(truth, judge(truth, results))}


def test_each_kind_of_error_is_known_by_its_overlaps():
    truth = truth_of([(CAT, 0, 0, 40, 40), (DOG, 100, 100, 40, 40)])
    results = results_of(
        (CAT, 0, 0, 40, 40, 0.9),  # found
        (CAT, 0, 0, 40, 38, 0.8),  # the same cat again
        (DOG, 0, 2, 40, 38, 0.7),  # a dog where the cat is
        (DOG, 100, 100, 40, 16, 0.6),  # IoU .4 with the dog
        (CAT, 100, 100, 40, 16, 0.5),  # IoU .4 with the dog, said to be a cat
        (CAT, 60, 0, 20, 20, 0.4),  # nothing there
    )
    judged = judge(truth, results)
    assert [Verdict(v) for v in judged.verdicts] == [
        Verdict.FOUND, Verdict.DUPLICATE, Verdict.CLASSIFICATION, Verdict.LOCALISATION,
        Verdict.BOTH, Verdict.BACKGROUND,
    ]  # fmt: skip
    assert judged.partner.tolist() == [0, 0, 0, 1, 1, -1]
    assert judged.finder.tolist() == [0, -1]
    assert judged.reached.tolist() == [True, False]
    assert judged.rank.tolist() == [0, 1, 2, 3, 4, 5]


def test_what_mending_a_kind_would_win():
    """Cat: background .9, then found .8: AP50 1/2. Dog: a loose box: AP50 0."""
    truth = truth_of([(CAT, 0, 0, 40, 40), (DOG, 100, 100, 40, 40)])
    results = results_of(
        (CAT, 60, 0, 20, 20, 0.9), (CAT, 0, 0, 40, 40, 0.8), (DOG, 100, 100, 40, 16, 0.6)
    )
    curve = {each.group: each for each in group_curves(truth, judge(truth, results))}
    assert curve["base"].precision.mean() == pytest.approx(0.5)
    assert curve["novel"].precision.mean() == 0.0
    assert (curve["base"].recall, curve["novel"].recall) == (1.0, 0.0)
    gained = costs(truth, results)
    # The background gone: cat 1. The box put right: dog 1. Each is half of the mean of two.
    assert gained["background"] == pytest.approx(0.25)
    assert gained["localisation"] == pytest.approx(0.5)
    # The dog was nearly found, so it does not count as missed.
    assert gained["missed"] == gained["duplicate"] == gained["classification"] == 0.0
    assert costs(truth, results, "base")["localisation"] == 0.0


def test_a_wrong_name_put_right_finds_its_object_but_only_once():
    truth = truth_of([(CAT, 0, 0, 40, 40), (DOG, 100, 100, 40, 40)])
    results = results_of(
        (CAT, 0, 0, 40, 40, 0.9),
        (CAT, 100, 100, 40, 40, 0.8),  # is a dog
        (CAT, 100, 100, 40, 38, 0.7),  # the same: becomes nothing when mended
    )
    # Mended: cat 1 (was 1: false ones come after the only cat), dog 1 (was 0).
    assert costs(truth, results)["classification"] == pytest.approx(0.5)
    shares = {each.kind: each for each in error_kinds(truth, judge(truth, results))}
    # Two objects: the best two detections are looked at.
    assert shares["classification"].count == 1
    assert shares["classification"].share == pytest.approx(0.5)


def test_missed_objects_are_those_without_any_hint():
    truth = truth_of([(CAT, 0, 0, 40, 40), (CAT, 100, 100, 40, 40)])
    results = results_of((CAT, 0, 0, 40, 40, 0.9))
    # 51 of the 101 recalls are at most .5; without the missed cat all of them are reached.
    gained = costs(truth, results)
    assert gained["missed"] == pytest.approx(1 - 51 / 101)
    missed = next(e for e in error_kinds(truth, judge(truth, results)) if e.kind == "missed")
    assert (missed.count, missed.share) == (1, 0.5)
    assert set(gained) == set(ERROR_KINDS)


def test_lvis_judges_only_what_was_checked():
    truth = truth_of([(CAT, 0, 0, 40, 40)], protocol="lvis")
    dog = results_of((DOG, 60, 60, 20, 20, 0.9))
    assert judge(truth, dog).verdicts.tolist() == [Verdict.IGNORED]
    checked = truth_of([(CAT, 0, 0, 40, 40)], protocol="lvis", negative=[DOG])
    assert judge(checked, dog).verdicts.tolist() == [Verdict.BACKGROUND]
    unsure = truth_of([(CAT, 0, 0, 40, 40)], protocol="lvis", not_exhaustive=[CAT])
    cat = results_of((CAT, 60, 60, 20, 20, 0.9), (CAT, 0, 0, 40, 40, 0.8))
    assert judge(unsure, cat).verdicts.tolist() == [Verdict.IGNORED, Verdict.FOUND]


def test_what_lies_in_a_crowd_is_ignored():
    truth = truth_of([(CAT, 0, 0, 100, 100), (CAT, 120, 0, 40, 40)], crowd=[0])
    results = results_of((CAT, 10, 10, 20, 20, 0.9), (DOG, 10, 10, 20, 20, 0.8))
    judged = judge(truth, results)
    assert judged.verdicts.tolist() == [Verdict.IGNORED, Verdict.BACKGROUND]
    assert judged.counted.tolist() == [False, True]


def test_nothing_found_and_nothing_there():
    truth = truth_of([])
    assert all(
        np.isnan(curve.precision).all() for curve in group_curves(truth, judge(truth, results_of()))
    )
    judged = judge(truth, results_of((CAT, 0, 0, 9, 9, 0.5)))
    assert judged.verdicts.tolist() == [Verdict.BACKGROUND]


def pairs(truth, results, **options):
    """Returns (true, named, count, number of objects) of each pair, in order."""
    found = confused_pairs(truth, results, **options)
    return [(each.name, each.named_as, each.count, each.num_objects) for each in found]


TWO_CATS_AND_A_DOG = ((CAT, 0, 0, 40, 40), (CAT, 60, 0, 40, 40), (DOG, 0, 100, 40, 40))


def test_an_object_counts_by_the_best_name_it_was_given():
    truth = truth_of(TWO_CATS_AND_A_DOG)
    results = results_of(
        (DOG, 0, 0, 40, 40, 0.9),  # the first cat, a dog
        (CAT, 0, 0, 40, 38, 0.8),  # and a cat only after that: it is taken
        (DOG, 0, 0, 40, 36, 0.7),  # once more: taken as well
        (CAT, 60, 0, 40, 40, 0.6),  # the second cat, rightly
        (DOG, 60, 0, 40, 40, 0.5),  # a dog only after that
        (CAT, 0, 100, 40, 40, 0.4),  # the dog, a cat
        (CAT, 0, 160, 20, 20, 0.9),  # nothing there
    )
    assert pairs(truth, results) == [("dog", "cat", 1, 1), ("cat", "dog", 1, 2)]
    first, second = confused_pairs(truth, results)
    assert (first.share, second.share) == (1.0, 0.5)
    assert (first.group, first.named_group) == ("novel", "base")
    assert confusion_csv([second], least_score=0.25).splitlines() == [
        "category_id,name,group,named_category_id,named_as,named_group,count,num_objects,share,"
        "least_score",
        "1,cat,base,2,dog,novel,1,2,0.5,0.25",
    ]


def test_detections_below_the_score_give_no_name():
    truth = truth_of(TWO_CATS_AND_A_DOG)
    results = results_of((DOG, 0, 0, 40, 40, 0.29), (DOG, 60, 0, 40, 40, 0.3))
    assert pairs(truth, results) == [("cat", "dog", 1, 2)]
    assert pairs(truth, results, least_score=0.29) == [("cat", "dog", 2, 2)]
    assert pairs(truth, results, least_score=0.5) == []


def test_a_detection_with_an_object_of_its_name_is_no_confusion():
    both = truth_of([(CAT, 0, 0, 40, 40), (DOG, 0, 4, 40, 40)])  # IoU .82
    # The dog is found; the second dog lies on it as well, so it is a duplicate, not a wrong cat.
    results = results_of((DOG, 0, 4, 40, 40, 0.9), (DOG, 0, 0, 40, 40, 0.8))
    assert pairs(both, results) == []
    # With the dog far off the same detections are one wrong cat; near by less than half, too.
    apart = truth_of([(CAT, 0, 0, 40, 40), (DOG, 0, 24, 40, 40)])
    assert pairs(apart, results_of((DOG, 0, 0, 40, 40, 0.8))) == [("cat", "dog", 1, 1)]


def test_of_two_objects_the_one_it_covers_most_that_is_left_is_claimed():
    truth = truth_of([(CAT, 0, 0, 40, 40), (CAT, 0, 4, 40, 40)])
    assert pairs(truth, results_of((DOG, 0, 0, 40, 40, 0.9))) == [("cat", "dog", 1, 2)]
    thrice = [(DOG, 0, 0, 40, 40, score) for score in (0.9, 0.8, 0.7)]
    assert pairs(truth, results_of(*thrice)) == [("cat", "dog", 2, 2)]
    # The first one is taken by its best box; what lies on both is left the other one.
    mixed = results_of((CAT, 0, 0, 40, 40, 0.9), (DOG, 0, 0, 40, 40, 0.8))
    assert pairs(truth, mixed) == [("cat", "dog", 1, 2)]


def test_lvis_calls_a_name_wrong_only_where_it_was_looked_for_and_marked_throughout():
    cat, dog = [(CAT, 0, 0, 40, 40)], results_of((DOG, 0, 0, 40, 40, 0.9))
    lists = {"none": {}, "absent": {"negative": [DOG]}, "there": {}}
    found = {
        name: pairs(truth_of(cat + [(DOG, 100, 0, 40, 40)] * (name == "there"), protocol="lvis",
                             **of_image), dog)
        for name, of_image in lists.items()
    }  # fmt: skip
    assert found == {
        "none": [], "absent": [("cat", "dog", 1, 1)], "there": [("cat", "dog", 1, 1)],
    }  # fmt: skip
    unsure = truth_of([*cat, (DOG, 100, 0, 40, 40)], protocol="lvis", not_exhaustive=[DOG])
    assert pairs(unsure, dog) == []
    # A name of which not all are marked still finds its own, and so takes it from others.
    right_first = results_of((DOG, 100, 0, 40, 40, 0.9), (CAT, 100, 0, 40, 40, 0.8))
    assert pairs(unsure, right_first) == []
    (pair,) = confused_pairs(truth_of(cat, protocol="lvis", negative=[DOG]), dog)
    assert pair == ConfusedPair(CAT, "cat", "frequent", DOG, "dog", "rare", 1, 1)


def test_crowds_neither_get_names_nor_make_them_wrong():
    crowd_of_cats = truth_of([(CAT, 0, 0, 100, 100), (CAT, 120, 0, 40, 40)], crowd=[0])
    assert pairs(crowd_of_cats, results_of((DOG, 0, 0, 100, 100, 0.9))) == []
    # What lies in a crowd of dogs may be a dog.
    crowd_of_dogs = truth_of([(DOG, 0, 0, 100, 100), (CAT, 0, 0, 40, 40)], crowd=[0])
    assert pairs(crowd_of_dogs, results_of((DOG, 0, 0, 40, 40, 0.9))) == []
    assert pairs(truth_of([]), results_of((DOG, 0, 0, 40, 40, 0.9))) == []
    assert pairs(crowd_of_dogs, results_of()) == []
