"""Work done by threads a little ahead of whoever takes its results, in order."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

A = TypeVar("A")
B = TypeVar("B")

ITEMS_PER_THREAD = 4
"""Items a thread that are begun before the first of them is taken."""


def threads() -> int:
    """How many threads decode images: pillow and hashlib let others run meanwhile."""
    return min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 4)


def prefetch(work: Callable[[A], B], items: Iterable[A], workers: int | None = None) -> Iterator[B]:
    """Yield work(item) for each item, in the order of the items.

    Only a few items a thread are taken ahead of the results, so that unfinished ones do not pile
    up. An error of `work` is raised in the place of its result; items that wait then, or when the
    caller stops, are not begun.
    """
    count = workers or threads()
    waiting: deque[Future[B]] = deque()
    pool = ThreadPoolExecutor(count)
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) >= count * ITEMS_PER_THREAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
