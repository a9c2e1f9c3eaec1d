"""Ordered parallel map over threads. The compiled kernels release the GIL; results never depend on the number."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def default_threads() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_ordered(
    work: Callable[[T], R],
    items: Iterable[T],
    executor: ThreadPoolExecutor | None,
) -> Iterator[R]:
    """``map(work, items)`` on ``executor`` (in this thread if None), results in the order of ``items``.

    At most twice as many items as there are cores are under way, so that memory stays bounded. After an
    error or an early stop no further item is started, and those under way are waited for.
    """
    if executor is None:
        yield from map(work, items)
        return
    ahead = 2 * default_threads() + 2
    pending: deque[Future[R]] = deque()
    try:
        for item in items:
            pending.append(executor.submit(work, item))
            if len(pending) >= ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()
        for future in pending:
            if not future.cancelled():
                future.exception()
