"""How many bytes a layer's pages may take, and which formats pages get from what is left. Functions over arrays.

Lengths that say what is pinned are *settled* ones: without tokens that wait for their cell to end
(:mod:`kvpack.runtime.kv.steps`), whose pages are pinned with those of the window.

A *share* is the part of their bytes in 16 bits that a layer's pages may take. Pages of the recent window and of the
sinks are pinned: they have 16 bits. A page is *open* when it has left the window; it never gains bits.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvpack.format.layout import ceil_div
from kvpack.format.pages import PAGE_TOKENS, PageFormat, Side
from kvpack.runtime.kv.page_table import Ints, Places

# The most of their bytes that open pages yield to pinned ones.
YIELDED = 0.1

# Lengths are i32 and end here: whoever keeps more than this in 16 bits keeps all.
_MOST_TOKENS = 1 << 30

_Lengths = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Window:
    """Which tokens of a sequence are pinned: the newest ``recent_tokens``, and the first ``sinks``."""

    recent_tokens: int
    sinks: int

    def __post_init__(self) -> None:
        for name in ("recent_tokens", "sinks"):
            object.__setattr__(self, name, min(getattr(self, name), _MOST_TOKENS))

    @property
    def sink_pages(self) -> int:
        return ceil_div(self.sinks, PAGE_TOKENS)

    def open_ends(self, lengths: _Lengths) -> _Lengths:
        """How many pages of each sequence have left the recent window."""
        return np.maximum(0, (lengths - self.recent_tokens) // PAGE_TOKENS)

    def pinned(self, places: Places, lengths: _Lengths) -> npt.NDArray[np.bool_]:
        """Whether each page is pinned in sequences of these lengths."""
        is_recent = places.index >= self.open_ends(lengths)[places.sequence]
        return np.asarray((places.index < self.sink_pages) | is_recent)

    def pinned_pages(self, lengths: _Lengths, settled: _Lengths) -> tuple[Ints, Ints]:
        """(sequences, indices) of the pages of one side that are pinned in sequences of these lengths."""
        pages = -(-lengths // PAGE_TOKENS)
        sinks = np.minimum(self.sink_pages, pages)
        recent = np.maximum(self.open_ends(settled), sinks)
        counts = sinks + pages - recent
        sequences = np.repeat(np.arange(len(counts)), counts)
        indices = np.arange(len(sequences)) - np.repeat(np.cumsum(counts) - counts, counts)
        skipped = (recent - sinks)[sequences]
        return sequences, np.where(indices < sinks[sequences], indices, indices + skipped)

    def open_pages(self, lengths: _Lengths) -> int:
        """How many pages of one side are open."""
        return int(np.maximum(0, self.open_ends(lengths) - self.sink_pages).sum())


@dataclass(frozen=True)
class Room:
    """Bytes that a layer's pages take in 16 bits: all of them and the pinned ones, each with those that are coming."""

    all: int
    pinned: int
    coming: int

    @property
    def open(self) -> int:
        return self.all - self.pinned

    def budget(self, share: float) -> float:
        """For the pages that are there."""
        return max(share * self.all, self.pinned + (1 - YIELDED) * share * self.open) - self.coming

    def shares(self, budgets: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """The inverse of :meth:`budget`; the mean share is at most that of the mean budget."""
        of_all = budgets + self.coming
        if not self.open:
            return of_all / self.all
        return np.minimum(of_all / self.all, (of_all - self.pinned) / ((1 - YIELDED) * self.open))


def room(lengths: _Lengths, settled: _Lengths, window: Window, max_pages: int, full_bytes: int) -> Room:
    """For a layer's pages, and those that come until the next one leaves the window.

    Args:
        lengths: i32 [sequences]: tokens.
        settled: i32 [sequences]: those that count for the window.
        max_pages: how many a sequence can have.
        full_bytes: of a page in 16 bits.
    """
    pages = -(-lengths // PAGE_TOKENS)
    last = PAGE_TOKENS * (window.open_ends(settled) + 1) - 1 + window.recent_tokens
    most = np.maximum(np.minimum(-(-last // PAGE_TOKENS), max_pages), pages)
    total = len(Side) * int(pages.sum())
    pinned = total - len(Side) * window.open_pages(settled)
    coming = len(Side) * int((most - pages)[lengths > 0].sum())
    return Room(*(count * full_bytes for count in (total + coming, pinned + coming, coming)))


class FormatPairs:
    """Formats of K and of V that are worth their bytes, for pages of one layer that leave the window.

    Args:
        errors: fp64 [2 sides, formats of the ladder], what each spoils.
        page_bytes: i64 [2 sides, formats].
        ladder: ascending.
        is_uniform: whether K and V have the same format.
    """

    def __init__(
        self, errors: npt.NDArray[np.float64], page_bytes: Ints, ladder: Sequence[PageFormat], *, is_uniform: bool
    ) -> None:
        rungs = range(len(ladder))
        pairs = [(k, v) for k in rungs for v in rungs if k == v or not is_uniform]
        by_bytes = sorted(
            (int(page_bytes[Side.K, k] + page_bytes[Side.V, v]), float(errors[Side.K, k] + errors[Side.V, v]), k, v)
            for k, v in pairs
        )
        self._bytes: list[int] = []
        self._formats: list[tuple[PageFormat, PageFormat]] = []
        least = np.inf
        for pair_bytes, error, k, v in by_bytes:
            if error < least or is_uniform:
                least = error
                self._bytes.append(pair_bytes)
                self._formats.append((ladder[k], ladder[v]))

    def nearest(self, fair_bytes: float, most_bytes: float) -> tuple[int, tuple[PageFormat, PageFormat]] | None:
        """Bytes and formats of the pair whose bytes are nearest to ``fair_bytes``, of those that take ``most_bytes`` or
        less; None if not even the least does."""
        at = bisect.bisect_right(self._bytes, min(fair_bytes, most_bytes)) - 1
        if at < 0:
            return (self._bytes[0], self._formats[0]) if self._bytes[0] <= most_bytes else None
        if at + 1 < len(self._bytes):
            above = self._bytes[at + 1]
            if above <= most_bytes and above - fair_bytes < fair_bytes - self._bytes[at]:
                at += 1
        return self._bytes[at], self._formats[at]


def formats_from_what_is_left(
    pairs: FormatPairs, pages: int, left_bytes: float, fair_bytes: float, sequences: int
) -> list[tuple[PageFormat, PageFormat]] | None:
    """Formats of ``pages`` pairs of K and V pages that leave the window; None if what is left does not do.

    A pair gets its fair part, and of what is left beyond that as much as each of ``sequences`` could have: all of them
    will have a page leave in the next 64 tokens.
    """
    found = []
    for number in range(pages):
        beyond = left_bytes - fair_bytes * (pages - number)
        nearest = pairs.nearest(fair_bytes + beyond / sequences, left_bytes)
        if nearest is None:
            return None
        left_bytes -= nearest[0]
        found.append(nearest[1])
    return found
