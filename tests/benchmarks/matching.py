"""Prints how long the encoder's matching takes, solved whole and on the candidate set.

python -m tests.benchmarks.matching [--tokens 21760] [--targets 12 40]
"""

import argparse
import time
from collections.abc import Callable

import torch
from scipy.optimize import linear_sum_assignment

from dkdetr.losses.matcher import MatchingCosts, match_image, matching_cost
from dkdetr.structures import Targets

COSTS = MatchingCosts(cost_class=2, cost_bbox=5, cost_giou=2, focal_alpha=0.25, focal_gamma=2)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=21760)
    parser.add_argument("--targets", type=int, nargs="+", default=[12, 40])
    options = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(options.tokens, 1, generator=generator)
    boxes = 0.2 + 0.3 * torch.rand(options.tokens, 4, generator=generator)
    print(f"{options.tokens} tokens, one image, one thread; milliseconds")
    print("targets   cost   whole   candidates (cost included)")
    for count in options.targets:
        target = Targets(
            torch.zeros(count, dtype=torch.long),
            0.2 + 0.3 * torch.rand(count, 4, generator=generator),
        )
        cost = matching_cost(logits, boxes, target, COSTS)
        array = cost.double().numpy()
        cost_ms = milliseconds(lambda t=target: matching_cost(logits, boxes, t, COSTS))
        whole_ms = milliseconds(lambda a=array: linear_sum_assignment(a))
        candidates_ms = milliseconds(lambda t=target: match_image(logits, boxes, t, COSTS))
        print(f"{count:7d} {cost_ms:6.1f} {cost_ms + whole_ms:7.1f} {candidates_ms:12.1f}")


def milliseconds(function: Callable[[], object], repeats: int = 7) -> float:
    """The median time of a call."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return 1000 * sorted(times)[repeats // 2]


if __name__ == "__main__":
    main()
