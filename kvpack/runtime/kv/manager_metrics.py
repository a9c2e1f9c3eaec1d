"""What happens in a :class:`~kvpack.runtime.kv.prefix_store.PrefixStore`: counted, and said as Prometheus text."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, OrderedDict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

SECONDS = (1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 14400.0, 86400.0)
# More would-be entries of the working set than this are forgotten, the oldest first.
_MOST_REMEMBERED = 1 << 18
_MUCH_THRASHING = 0.1
# Into so many spans the window is cut, whose queries are counted together: there may be any number of queries.
_SPANS = 1024


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
        self.queried_tokens = 0
        self.blocks_cached = 0
        self.evictions: Counter[str] = Counter()
        self.lifetimes, self.idle_times, self.reuse_gaps = _Seconds(), _Seconds(), _Seconds()
        # Hash and time of last use, least recent first, of blocks used within the window, cached or not.
        self._recent: OrderedDict[bytes, float] = OrderedDict()
        # Evicted within the window, in order of eviction.
        self._evicted: OrderedDict[bytes, float] = OrderedDict()
        # (time of the first, pages asked for, pages asked for that were evicted within the window) of the window's
        # queries, those of a span together.
        self._queries: deque[tuple[float, int, int]] = deque()
        self._asked = self._thrashed = 0  # their sums

    def queried(self, tokens: int, pages: int, hit_pages: int, missed: Sequence[bytes], now_s: float) -> None:
        """A prompt of so many tokens and full pages was looked up. ``missed``: hashes of pages that were not found."""
        self._forget(now_s)
        self.queries += 1
        self.queried_tokens += tokens
        self.queried_pages += pages
        self.hit_pages += hit_pages
        self.hit_queries += hit_pages > 0
        thrashed = sum(one in self._evicted for one in missed)
        self.thrashed_pages += thrashed
        if self._queries and now_s - self._queries[-1][0] < self.window_s / _SPANS:
            first_s, asked, evicted = self._queries.pop()
            self._queries.append((first_s, asked + pages, evicted + thrashed))
        else:
            self._queries.append((now_s, pages, thrashed))
        self._asked += pages
        self._thrashed += thrashed

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
            _, pages, thrashed = self._queries.popleft()
            self._asked -= pages
            self._thrashed -= thrashed

    def working_set_pages(self, now_s: float) -> int:
        """Distinct blocks used within the window."""
        self._forget(now_s)
        return len(self._recent)

    def thrashing(self, now_s: float) -> float:
        """Of the pages asked for within the window, the share that had been evicted less than a window before."""
        self._forget(now_s)
        return self._thrashed / self._asked if self._asked else 0.0


@dataclass(frozen=True)
class TierMetrics:
    """Slower memory behind the cache at one moment. Counts are since it was made.

    Attributes:
        host_hit_pages, disk_hit_pages: pages of prompts that were missing in the cache and came back from there.
        host_blocks, host_bytes, host_capacity_bytes: in host memory, and the most that may be.
        disk_blocks, disk_bytes, disk_capacity_bytes: in files, as far as is known; of the files of all processes, and
            the most that they may take, or None.
        fetched_bytes: of pages that came back.
        taken_blocks: that were evicted from the cache and kept.
        dropped_blocks: that went and are in no file: no disk tier, or no room.
        refused_pages: found, but the cache had no memory for them.
        written_files, failed_writes: that were written, and that could not be.
        damaged_files, foreign_files: met, and passed over: those that cannot be read, and snapshots of other caches.
    """

    host_hit_pages: int
    disk_hit_pages: int
    host_blocks: int
    host_bytes: int
    host_capacity_bytes: int
    disk_blocks: int
    disk_bytes: int
    disk_capacity_bytes: int | None
    fetched_bytes: int
    taken_blocks: int
    dropped_blocks: int
    refused_pages: int
    written_files: int
    failed_writes: int
    damaged_files: int
    foreign_files: int

    def shown(self) -> Iterator[tuple[str, str, str, float]]:
        """Name, type, help and value of each."""
        yield "tier_host_hit_pages_total", "counter", "Pages that came back from host memory.", self.host_hit_pages
        yield "tier_disk_hit_pages_total", "counter", "Pages that came back from files.", self.disk_hit_pages
        yield "tier_host_blocks", "gauge", "Blocks in host memory.", self.host_blocks
        yield "tier_host_bytes", "gauge", "Bytes of these.", self.host_bytes
        yield "tier_host_capacity_bytes", "gauge", "The most that they may take.", self.host_capacity_bytes
        yield "tier_disk_blocks", "gauge", "Blocks in files that are known.", self.disk_blocks
        yield "tier_disk_bytes", "gauge", "Bytes of all files of the directory.", self.disk_bytes
        if self.disk_capacity_bytes is not None:
            yield "tier_disk_capacity_bytes", "gauge", "The most that they may take.", self.disk_capacity_bytes
        yield "tier_fetched_bytes_total", "counter", "Bytes of pages that came back.", self.fetched_bytes
        yield "tier_taken_blocks_total", "counter", "Evicted blocks that were kept.", self.taken_blocks
        yield "tier_dropped_blocks_total", "counter", "Blocks that went and are in no file.", self.dropped_blocks
        yield "tier_refused_pages_total", "counter", "Pages found, with no memory for them.", self.refused_pages
        yield "tier_written_files_total", "counter", "Files written.", self.written_files
        yield "tier_failed_writes_total", "counter", "Files that could not be written.", self.failed_writes
        yield "tier_damaged_files_total", "counter", "Files passed over that cannot be read.", self.damaged_files
        yield "tier_foreign_files_total", "counter", "Snapshots passed over of other caches.", self.foreign_files


@dataclass(frozen=True)
class ManagerMetrics:
    """A :class:`~kvpack.runtime.kv.manager.KVManager` at one moment. Counts are since it was made.

    Attributes:
        prefix_bytes: of all cached blocks; those of running sequences among them.
        prefix_capacity_bytes: the most that they may take, or None.
        held_bytes: of pages that no running sequence has.
        page_bytes, slab_bytes: of all of the cache's pages in use, and of the memory that is allocated for pages.
        blocks: cached, of 64 tokens each.
        running_sequences, max_sequences: that are started, and that the cache has.
        queries, hit_queries: prompts that were looked up, and those of which at least a page was found.
        queried_pages, hit_pages: full pages of these prompts, and those that were found.
        queried_tokens, hit_tokens: the same in tokens; those behind the last full page are never found.
        cached_blocks: that came.
        evictions: blocks that went, by reason: ``capacity`` (of the prefixes), ``memory`` (the cache's had ended),
            ``asked`` (:meth:`~kvpack.runtime.kv.prefix_store.PrefixStore.evict`).
        lifetimes, idle_times: of evicted blocks: since they came, and since they were last used.
        reuse_gaps: between two uses of a block.
        window_s: the time that the following look back.
        working_set_pages: distinct blocks that were used, cached or not.
        thrashed_pages: pages that were asked for, not found, and had been evicted within the window; since the start.
        thrashing: their share of all pages that were asked for within the window.
        is_thrashing: whether that is more than a tenth: the capacity is too small for what is asked.
        tiers: of host memory and disk, or None where there are none. Pages that came back from there are no hits.
    """

    prefix_bytes: int
    prefix_capacity_bytes: int | None
    held_bytes: int
    page_bytes: int
    slab_bytes: int
    blocks: int
    running_sequences: int
    max_sequences: int
    queries: int
    hit_queries: int
    queried_pages: int
    hit_pages: int
    queried_tokens: int
    hit_tokens: int
    cached_blocks: int
    evictions: Mapping[str, int]
    lifetimes: HistogramOfSeconds
    idle_times: HistogramOfSeconds
    reuse_gaps: HistogramOfSeconds
    window_s: float
    working_set_pages: int
    thrashed_pages: int
    thrashing: float
    tiers: TierMetrics | None = None

    @property
    def hit_rate(self) -> float:
        """Of the full pages of all prompts, those that were found; 0.0 before the first prompt."""
        return self.hit_pages / self.queried_pages if self.queried_pages else 0.0

    @property
    def is_thrashing(self) -> bool:
        return self.thrashing > _MUCH_THRASHING

    def prometheus(self) -> str:
        """In the text format that Prometheus reads (version 0.0.4)."""
        lines: list[str] = []
        for name, kind, what, value in self._shown():
            lines += [f"# HELP kvpack_{name} {what}", f"# TYPE kvpack_{name} {kind}"]
            if isinstance(value, HistogramOfSeconds):
                lines += _histogram_lines(name, value)
            elif isinstance(value, Mapping):
                lines += [f'kvpack_{name}{{reason="{reason}"}} {count}' for reason, count in sorted(value.items())]
            else:
                lines.append(f"kvpack_{name} {value}")
        return "\n".join(lines) + "\n"

    def _shown(self) -> Iterator[tuple[str, str, str, float | HistogramOfSeconds | Mapping[str, int]]]:
        """Name, type, help and value of each."""
        yield "prefix_bytes", "gauge", "Bytes of all cached blocks.", self.prefix_bytes
        if self.prefix_capacity_bytes is not None:
            yield "prefix_capacity_bytes", "gauge", "The most that they may take.", self.prefix_capacity_bytes
        yield "held_bytes", "gauge", "Bytes of pages that no running sequence has.", self.held_bytes
        yield "page_bytes", "gauge", "Bytes of all pages in use.", self.page_bytes
        yield "slab_bytes", "gauge", "Bytes allocated for pages.", self.slab_bytes
        yield "prefix_blocks", "gauge", "Cached blocks of 64 tokens.", self.blocks
        yield "running_sequences", "gauge", "Sequences that are started.", self.running_sequences
        yield "max_sequences", "gauge", "Sequences that the cache has.", self.max_sequences
        yield "prefix_queries_total", "counter", "Prompts that were looked up.", self.queries
        yield "prefix_hit_queries_total", "counter", "Prompts of which a page was found.", self.hit_queries
        yield "prefix_queried_pages_total", "counter", "Full pages of prompts.", self.queried_pages
        yield "prefix_hit_pages_total", "counter", "Pages of prompts that were found.", self.hit_pages
        yield "prefix_queried_tokens_total", "counter", "Tokens of prompts.", self.queried_tokens
        yield "prefix_hit_tokens_total", "counter", "Tokens of prompts that were found.", self.hit_tokens
        yield "prefix_cached_blocks_total", "counter", "Blocks that were cached.", self.cached_blocks
        yield "prefix_evictions_total", "counter", "Blocks that were evicted.", self.evictions
        yield "prefix_thrashed_pages_total", "counter", "Pages asked for soon after eviction.", self.thrashed_pages
        yield "prefix_thrashing_ratio", "gauge", "Their share of the pages of recent prompts.", self.thrashing
        yield "prefix_working_set_pages", "gauge", "Distinct blocks used lately.", self.working_set_pages
        yield "prefix_block_lifetime_seconds", "histogram", "From coming to eviction.", self.lifetimes
        yield "prefix_block_idle_seconds", "histogram", "From the last use to eviction.", self.idle_times
        yield "prefix_block_reuse_gap_seconds", "histogram", "Between two uses of a block.", self.reuse_gaps
        if self.tiers is not None:
            yield from self.tiers.shown()


def _histogram_lines(name: str, histogram: HistogramOfSeconds) -> list[str]:
    lines, total = [], 0
    for bound, count in zip([*map(str, SECONDS), "+Inf"], histogram.counts, strict=True):
        total += count
        lines.append(f'kvpack_{name}_bucket{{le="{bound}"}} {total}')
    return [*lines, f"kvpack_{name}_sum {histogram.sum_s}", f"kvpack_{name}_count {total}"]
