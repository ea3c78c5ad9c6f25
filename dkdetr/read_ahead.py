"""Work done ahead by threads, and handed out in order."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def done_ahead(
    pool: ThreadPoolExecutor, work: Callable[[Item], Result], items: Iterable[Item], most: int
) -> Generator[tuple[Item, Result]]:
    """Yields every item and its result, in order; at most `most` of them wait.

    What `work` raises is raised at its item's place. Closed early, it leaves nothing in the queue.
    """
    ahead: deque[tuple[Item, Future[Result]]] = deque()
    remaining = iter(items)
    try:
        while True:
            for item in islice(remaining, most - len(ahead)):
                ahead.append((item, pool.submit(work, item)))
            if not ahead:
                return
            item, future = ahead.popleft()
            yield item, future.result()
    finally:
        for _, future in ahead:
            future.cancel()
