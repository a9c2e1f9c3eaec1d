"""What happens in a :class:`~kvpack.runtime.kv.prefix_store.PrefixStore`: counted, and said as Prometheus text."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass

SECONDS = (1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 14400.0, 86400.0)
# More would-be entries of the working set than this are forgotten, the oldest first.
_MOST_REMEMBERED = 1 << 20


@dataclass(frozen=True)
class HistogramOfSeconds:
    """How many of each length.

    Attributes:
        counts: of those up to 1, 5, 15, 60, … seconds (:data:`SECONDS`), and of longer ones; none is counted twice.
        sum_s: of all.
    """

    counts: tuple[int, ...]
    sum_s: float

    @property
    def count(self) -> int:
        return sum(self.counts)


class _Seconds:
    def __init__(self) -> None:
        self.counts, self.sum_s = [0] * (len(SECONDS) + 1), 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(SECONDS, seconds)] += 1
        self.sum_s += seconds

    def read(self) -> HistogramOfSeconds:
        return HistogramOfSeconds(tuple(self.counts), self.sum_s)


class PrefixCounters:
    """Counts what a store does; the store calls it with its lock held.

    Args:
        window_s: of the working set, and of what counts as thrashing.
    """

    def __init__(self, window_s: float) -> None:
        self.window_s = window_s
        self.queries = self.queried_pages = self.hit_queries = self.hit_pages = self.thrashed_pages = 0
        self.blocks_cached = 0
        self.evictions: Counter[str] = Counter()
        self.lifetimes, self.idle_times, self.reuse_gaps = _Seconds(), _Seconds(), _Seconds()
        # Hash and time of last use, least recent first, of blocks used within the window, cached or not.
        self._recent: OrderedDict[bytes, float] = OrderedDict()
        # Evicted within the window, in order of eviction.
        self._evicted: OrderedDict[bytes, float] = OrderedDict()
        # (time, pages asked for, pages asked for that were evicted within the window) of the window's queries.
        self._queries: deque[tuple[float, int, int]] = deque()

    def queried(self, pages: int, hit_pages: int, missed: Sequence[bytes], now_s: float) -> None:
        """A prompt of so many full pages was looked up. ``missed``: hashes of those that were not found."""
        self._forget(now_s)
        self.queries += 1
        self.queried_pages += pages
        self.hit_pages += hit_pages
        self.hit_queries += hit_pages > 0
        thrashed = sum(one in self._evicted for one in missed)
        self.thrashed_pages += thrashed
        self._queries.append((now_s, pages, thrashed))

    def seen(self, hashes: Sequence[bytes], now_s: float) -> None:
        """Blocks were used or came."""
        for one in hashes:
            self._recent[one] = now_s
            self._recent.move_to_end(one)
        self._forget(now_s)

    def reused(self, gap_s: float) -> None:
        self.reuse_gaps.add(gap_s)

    def came(self, count: int) -> None:
        self.blocks_cached += count

    def evicted(self, block_hash: bytes, reason: str, lifetime_s: float, idle_s: float, now_s: float) -> None:
        self.evictions[reason] += 1
        self.lifetimes.add(lifetime_s)
        self.idle_times.add(idle_s)
        self._evicted[block_hash] = now_s
        self._evicted.move_to_end(block_hash)
        self._forget(now_s)

    def _forget(self, now_s: float) -> None:
        for known in (self._recent, self._evicted):
            while known and (len(known) > _MOST_REMEMBERED or next(iter(known.values())) < now_s - self.window_s):
                known.popitem(last=False)
        while self._queries and self._queries[0][0] < now_s - self.window_s:
            self._queries.popleft()

    def working_set_pages(self, now_s: float) -> int:
        """Distinct blocks used within the window."""
        self._forget(now_s)
        return len(self._recent)

    def thrashing(self, now_s: float) -> float:
        """Of the pages asked for within the window, the share that had been evicted less than a window before."""
        self._forget(now_s)
        asked = sum(pages for _, pages, _ in self._queries)
        return sum(thrashed for *_, thrashed in self._queries) / asked if asked else 0.0
