"""Short names for runs, by which each is told from the others that stand beside it."""

from collections.abc import Iterable, Sequence
from pathlib import Path


def titled(paths: Sequence[Path]) -> list[tuple[Path, str]]:
    """Returns each path with a short name that no other has: as many folders as it takes."""
    whole = [
        path.resolve().with_suffix("").parts if path.is_file() else path.resolve().parts
        for path in paths
    ]
    different = set(whole)
    titled: list[tuple[Path, str]] = []
    for path, own in zip(paths, whole, strict=True):
        depth = next(n for n in range(1, len(own) + 1) if _is_alone(own[-n:], different))
        name, number = "/".join(own[-depth:]), 1
        while (title := f"{name} ({number})" if number > 1 else name) in (
            each for _, each in titled
        ):
            number += 1  # the same path again
        titled.append((path, title))
    return titled


def _is_alone(end: tuple[str, ...], paths: Iterable[tuple[str, ...]]) -> bool:
    return sum(path[-len(end) :] == end for path in paths) == 1
