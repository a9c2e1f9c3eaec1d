"""Which of a layer's pages come, and which leave the recent window, when tokens are appended.

It depends on numbers of tokens alone. Layers of a model have the same ones, so that what has been found for the first
layer of a step serves the others; a layer that has other tokens is not in the same step.

**Cells.** A long prompt is quantized cell by cell: the tokens of a *cell*, from one multiple of 2,048 in their sequence
to the next, see each other in 16 bits, and earlier cells as their pages have them. So what a token sees depends on
where it stands, and not on how the prompt is cut into calls. Tokens of a prompt that goes on *wait*: their pages stay
in 16 bits until a token behind their cell comes, or a call that ends the prompt.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import numpy.typing as npt

from kvpack.format.layout import ceil_div
from kvpack.format.pages import PAGE_TOKENS
from kvpack.runtime.kv.budget import Room, Window, room
from kvpack.runtime.kv.ragged import Counts

# Of one cell. More take more memory in 16 bits, fewer see more of the prompt quantized.
CELL_TOKENS = 2048

_Lengths = npt.NDArray[np.int32]
# A sequence, and which of its pages.
Page = tuple[int, int]


class Step:
    """More tokens of some sequences of a layer.

    Args:
        lengths: i32 [sequences], of all of the layer's sequences, before.
        ids: to which tokens are appended.
        counts: how many, to each or to each of them.
        window, max_tokens, full_bytes: of the cache; the bytes are those of a page in 16 bits.
        waiting: i32 [sequences], how many of the last tokens wait before; None: none do.
        waits: how many of each of ``ids`` wait behind it.

    Attributes:
        ids: as given.
        lengths: i32 [sequences], behind it.
        settled: i32 [sequences], behind it: tokens that do not wait.
        coming: pages that sequences need, oldest first.
        leaving: pages that leave the window; those of the sinks do not.
        begins: whether one of the sequences has had no tokens, and gets some.
        pages: for how many pages of a sequence there has to be room for the sake of ``coming``.
    """

    def __init__(
        self,
        lengths: _Lengths,
        ids: list[int],
        counts: Counts,
        window: Window,
        max_tokens: int,
        full_bytes: int,
        waiting: _Lengths | None = None,
        waits: _Lengths | int = 0,
    ) -> None:
        self.ids, self._window, self._max_tokens, self._full_bytes = ids, window, max_tokens, full_bytes
        before = lengths[ids]
        self._after = after = before + (counts if isinstance(counts, int) else np.array(counts, np.int32))
        self.lengths = lengths.copy()
        self.lengths[ids] = after
        settled = lengths if waiting is None else lengths - waiting
        self.settled = settled.copy()
        self.settled[ids] = after - waits
        self.begins = bool((after[before == 0] > 0).any())
        self.coming = _pages_between(ids, -(-before // PAGE_TOKENS), -(-after // PAGE_TOKENS))
        ends = np.maximum(window.open_ends(settled[ids]), window.sink_pages)
        self.leaving = _pages_between(ids, ends, window.open_ends(self.settled[ids]))
        self.pages = max((index + 1 for _, index in self.coming), default=0)

    @cached_property
    def quiet_tokens(self) -> int:
        """How many more tokens the sequences take before a page comes or leaves the window, if none wait."""
        return quiet_tokens(self._after, self._window, self._max_tokens)

    @cached_property
    def room(self) -> Room:
        """Of a layer's pages behind it."""
        max_pages = ceil_div(self._max_tokens, PAGE_TOKENS)
        return room(self.lengths, self.settled, self._window, max_pages, self._full_bytes)

    @cached_property
    def sequences(self) -> int:
        """How many of the layer's have tokens behind it."""
        return int(np.count_nonzero(self.lengths))


def quiet_tokens(lengths: _Lengths, window: Window, max_tokens: int) -> int:
    """How many tokens sequences of these lengths take before a page comes or leaves the window, or they are full."""
    until_new = -lengths % PAGE_TOKENS
    until_leaving = PAGE_TOKENS - 1 - (lengths - window.recent_tokens) % PAGE_TOKENS
    return int(np.minimum(np.minimum(until_new, until_leaving), max_tokens - lengths).min())


def _pages_between(ids: list[int], begins: _Lengths, ends: _Lengths) -> list[Page]:
    return [
        (ids[at], index)
        for at in (begins < ends).nonzero()[0].tolist()
        for index in range(int(begins[at]), int(ends[at]))
    ]
