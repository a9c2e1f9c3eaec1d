"""Ordered parallel map over threads. The compiled kernels release the GIL; results never depend on the number."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def default_threads() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class ThreadPool:
    """Threads that are started when they are first needed, in each process anew.

    A fork copies the calling thread alone: work given to an executor that was made before it waits for ever. So a child
    makes its own executor and leaves the parent's as it is.

    Args:
        threads: how many; all cores by default.
        name: what their names begin with.
    """

    def __init__(self, threads: int | None = None, name: str = "kvpack") -> None:
        self._threads = threads or default_threads()
        self._name = name
        self._process = os.getpid()
        self._executor: ThreadPoolExecutor | None = None

    @property
    def executor(self) -> ThreadPoolExecutor:
        """This process's executor."""
        with _making:
            if self._process != os.getpid():
                self._process, self._executor = os.getpid(), None
            if self._executor is None:
                self._executor = ThreadPoolExecutor(self._threads, thread_name_prefix=self._name)
            return self._executor

    def close(self) -> None:
        """Wait for what is under way, and end the threads. What is asked for later starts them again."""
        with _making:
            executor, self._executor = self._executor, None
            own = self._process == os.getpid()
        if executor is not None and own:
            executor.shutdown()


def _renew_lock() -> None:
    """Another thread of the parent may have held it, and does not exist here."""
    global _making
    _making = threading.Lock()


_making = threading.Lock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


def map_ordered(
    work: Callable[[T], R],
    items: Iterable[T],
    executor: ThreadPoolExecutor | None,
    *,
    ahead: int | None = None,
    cost: Callable[[T], int] | None = None,
    give_up: Callable[[], object] | None = None,
) -> Generator[R]:
    """``map(work, items)`` on ``executor`` (in this thread if None), results in the order of ``items``.

    At most ``ahead`` items, by default twice as many as there are cores, are under way, so that memory stays bounded;
    with ``cost``, items that cost so much together, or a single one. After an error or an early stop no further item
    is started, and those under way are waited for, after ``give_up`` was called to make them end sooner.
    """
    if executor is None:
        yield from map(work, items)
        return
    most = 2 * default_threads() + 2 if ahead is None else ahead
    pending: deque[tuple[Future[R], int]] = deque()
    taken = 0

    def first() -> R:
        nonlocal taken
        result = pending[0][0].result()  # if this is interrupted, it is still under way
        taken -= pending.popleft()[1]
        return result

    try:
        for item in items:
            own = 1 if cost is None else cost(item)
            while pending and taken + own > most:
                yield first()
            pending.append((executor.submit(work, item), own))
            taken += own
            while pending and taken >= most:
                yield first()
        while pending:
            yield first()
    finally:
        for future, _ in pending:
            future.cancel()
        if give_up is not None and pending:
            give_up()
        for future, _ in pending:
            if not future.cancelled():
                future.exception()
