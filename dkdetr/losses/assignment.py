"""The assignment itself, on the CPU: scipy for each layer and image, NumPy for all of them at once.

A GPU waits while this runs, so that what can be done for a whole stage is not done problem by
problem.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from dkdetr.errors import NonFiniteLossError


def assign_candidates(
    cost: Float[np.ndarray, "num_targets num_layers k"],
    query: Int[np.ndarray, "num_targets num_layers k"],
    counts: Sequence[int],
    *,
    num_queries: int,
    repeats: int,
) -> Int[np.ndarray, "4 num_layers num_pairs"]:
    """Returns the (image, query, target, place) of each layer's pairs, by image and query.

    Every layer has as many pairs. A place counts through all queries of layers and images; what is
    not among the candidates of a target is never its own.

    Args:
        cost: of each target's candidates, cheapest first; infinite: not allowed, minus infinite:
            broken.
        query: which queries of the target's image they are.
        counts: targets of each image.
        num_queries: of an image and layer.
        repeats: how many queries each target is to have.

    Raises:
        NonFiniteLossError: a cost is broken.
    """
    if np.isneginf(cost).any():
        raise NonFiniteLossError("a matching cost is not finite: the student's output is broken")
    num_layers = int(cost.shape[1])
    if len(cost) == 0:
        return np.zeros((4, num_layers, 0), np.int64)
    numbered = _number(cost, query, counts, num_queries, repeats)
    first = np.cumsum((0, *counts))
    places: list[NDArray[np.int64]] = []
    targets: list[NDArray[np.int64]] = []
    for layer in range(num_layers):
        for image, count in enumerate(counts):
            if count == 0:
                continue
            problem = layer * len(counts) + image
            start, end = numbered.starts[problem], numbered.ends[problem]
            own = slice(first[image], first[image + 1])
            full = np.full((end - start + 1, count), np.inf)
            row = numbered.row[own, layer] - start
            full[row, np.arange(count)[:, None]] = numbered.cost[own, layer]
            whole = np.concatenate([full[:-1]] * repeats, axis=1)
            chosen, column = linear_sum_assignment(whole)
            places.append(numbered.place[start + chosen])
            targets.append(column % count + first[image])
    place = np.concatenate(places)
    image, query = place // num_queries % len(counts), place % num_queries
    rows = np.stack((image, query, np.concatenate(targets), place))
    return rows.reshape(4, num_layers, -1)


@dataclass(frozen=True)
class _Candidates:
    """Candidates of all problems, numbered from one end to the other in the order of places.

    A problem is a layer's image: its candidates are those from `starts` to `ends`. `row` is the
    number of each cost's candidate; an infinite one's is `ends`, which no place belongs to.
    """

    cost: Float[np.ndarray, "num_targets num_layers k"]
    row: Int[np.ndarray, "num_targets num_layers k"]
    place: Int[np.ndarray, "num_candidates"]
    starts: Int[np.ndarray, "num_problems"]
    ends: Int[np.ndarray, "num_problems"]


def _number(
    cost: Float[np.ndarray, "num_targets num_layers k"],
    query: Int[np.ndarray, "num_targets num_layers k"],
    counts: Sequence[int],
    num_queries: int,
    repeats: int,
) -> _Candidates:
    _, num_layers, k = map(int, cost.shape)
    per_image = np.array(counts, np.int64)
    image: NDArray[np.int64] = np.repeat(np.arange(len(counts)), per_image)
    # As many as the fullest image wants came: each image's targets keep as many as they want.
    wanted = per_image[image] * repeats
    cost = np.where(np.arange(k) < wanted[:, None, None], cost, np.inf)
    # One key more for each problem, behind its queries, for the infinite ones.
    width = num_queries + 1
    problem = np.arange(num_layers)[:, None] * len(counts) + image[:, None, None]
    key = problem * width + np.where(np.isfinite(cost), query, num_queries)
    taken = np.zeros(num_layers * len(counts) * width, bool)
    taken[key] = True
    keys = np.flatnonzero(taken)
    number = np.zeros(len(taken), np.int64)
    number[keys] = np.arange(len(keys))
    begins = np.arange(num_layers * len(counts)) * width
    return _Candidates(
        cost=cost,
        row=number[key],
        place=keys - keys // width,
        starts=np.searchsorted(keys, begins),
        ends=np.searchsorted(keys, begins + num_queries),
    )
