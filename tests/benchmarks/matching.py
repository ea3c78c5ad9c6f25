"""Prints how long the encoder's matching takes, solved whole and on the candidate set.

python -m tests.benchmarks.matching [--tokens 21760] [--targets 12 40] [--images 8]
"""

import argparse
import time
from collections.abc import Callable

import torch
from scipy.optimize import linear_sum_assignment

from dkdetr.losses.matcher import PAIRS_IN_CACHE, match
from dkdetr.losses.matching_cost import MatchingCosts, PairCosts, Stage
from dkdetr.structures import Targets

COSTS = MatchingCosts(cost_class=2, cost_bbox=5, cost_giou=2, focal_alpha=0.25, focal_gamma=2)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=21760)
    parser.add_argument("--targets", type=int, nargs="+", default=[12, 40])
    parser.add_argument("--images", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(options.images, options.tokens, 1, generator=generator)
    boxes = 0.2 + 0.3 * torch.rand(options.images, options.tokens, 4, generator=generator)
    print(f"{options.tokens} tokens, one thread; milliseconds of it an image")
    print(f"targets   cost   whole   candidates   {options.images} images together")
    for count in options.targets:
        targets = [
            Targets(
                torch.zeros(count, dtype=torch.long),
                0.2 + 0.3 * torch.rand(count, 4, generator=generator),
            )
            for _ in range(options.images)
        ]
        one = (logits[:1], boxes[:1], targets[:1])
        array = cost_of(*one).T.double().numpy()
        cost_ms = milliseconds(lambda o=one: cost_of(*o))
        whole_ms = milliseconds(lambda a=array: linear_sum_assignment(a))
        candidates_ms = milliseconds(lambda o=one: match(*o, COSTS))
        every = (logits, boxes, targets)
        together_ms = milliseconds(lambda e=every: match(*e, COSTS)) / options.images
        print(
            f"{count:7d} {cost_ms:6.1f} {cost_ms + whole_ms:7.1f} {candidates_ms:12.1f}"
            f" {together_ms:12.1f}"
        )


def cost_of(logits: torch.Tensor, boxes: torch.Tensor, targets: list[Targets]) -> torch.Tensor:
    """The costs alone, of one image, as many targets at a time as the matcher takes."""
    (target,) = targets
    price = PairCosts([Stage(logits[None], boxes[None])], COSTS)
    at_once = max(1, PAIRS_IN_CACHE // logits.shape[1])
    of_all = (target.labels, target.boxes_cxcywh, torch.zeros_like(target.labels))
    parts = zip(*(tensor.split(at_once) for tensor in of_all), strict=True)
    return torch.cat([price(*part) for part in parts])


def milliseconds(function: Callable[[], object], repeats: int = 7) -> float:
    """The median time of a call, the process's own: there is one thread."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return 1000 * sorted(times)[repeats // 2]


if __name__ == "__main__":
    main()
