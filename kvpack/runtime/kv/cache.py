"""A paged KV cache in which each page has the bits that it is worth (docs/KV.md).

A sequence's tokens lie in pages of 64, K and V apart, layer by layer. New tokens are written to pages of 16 bits. A
page that has left the recent window is quantized once, and may be quantized further when bytes are needed elsewhere; it
never gains bits. The pages of the first tokens, which attention leans on, are never quantized::

    [ sinks: 16 bits ][ open: 2, 3, 4, 8 or 16 bits ][ the recent window: 16 bits ]

**Budget.** Bytes of pages, scales included, as a fraction of those that the same pages would take in 16 bits. What
pinned pages (sinks, recent window) take beyond it is taken from the open pages, but at most a tenth of what they
would have: otherwise the first pages of a sequence, which fill while pinned pages are most of it, would be cut for good
to less than what later ones get. So a layer's pages take at most the larger of::

    budget · (all pages in 16 bits)      and      pinned pages + 0.9 · budget · (open pages in 16 bits)

the first of which rules from some 50 pages a sequence on, at a budget of 0.3; only where all open pages at 2 bits take
more does the cache. Each layer holds its share by itself when tokens are appended; :meth:`KVCache.reallocate` moves
shares between layers.

**Streams.** The host decides and enqueues; it waits for the device in :meth:`KVCache.reallocate`, and once a layer to
measure what each width spoils. Freed pages are handed out again at once, which is right where all that uses the cache
is enqueued on one stream.

**CUDA graphs.** What is decided cannot be repeated by a graph, what is enqueued can: an append that is captured writes
tokens and advances the lengths on the device, and nothing else. Before each replay :meth:`KVCache.plan` does the rest.

**Failures.** An operation that raises leaves tokens, pages and what is known of widths as they were. Attention that has
been observed until then stays counted.
"""

from __future__ import annotations

import itertools
import operator
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import numpy.typing as npt
import torch

from kvpack.encode.page_coder import dequantize_blocks, quantize_blocks
from kvpack.errors import CacheFullError, CacheInputError, PageEntryError
from kvpack.format.layout import ceil_div
from kvpack.format.pages import ENTRY_FORMAT_MASK, PAGE_TOKENS, PageFormat, PageLayout, Side
from kvpack.runtime.device import semaphores
from kvpack.runtime.device.devices import resolve_device
from kvpack.runtime.kv.allocator import (
    LADDER,
    POLICIES,
    Allocation,
    ImportanceEMA,
    Outcome,
    Pages,
    Policy,
    allocate_widths,
)
from kvpack.runtime.kv.attention_kernels import MASS_FRACTION_BITS
from kvpack.runtime.kv.page_kernels import PAGE_FORMATS, left_out, new_status, quantize_pages, read_tokens, write_tokens
from kvpack.runtime.kv.page_pools import SLAB_BYTES, PageOwner, PagePools, PageViews

Widths = PageFormat | Sequence[tuple[PageFormat, PageFormat]]

# Called with a batch's page table, i64 [2, batch, pages], and its lengths, i32 [batch], new tokens included.
Attend = Callable[[torch.Tensor, torch.Tensor], None]

# In page tables, of no page.
NO_PAGE = -1
# Of attention mass, which is counted in integers so that sums do not depend on their order.
MASS_UNIT = 2.0**-MASS_FRACTION_BITS
# Of scores, where no query has been seen: the mean of books-27m's layers.
_SCORE_SQUARE = 14.0
# How much of their bytes open pages yield at most to pinned ones.
YIELDED = 0.1
# Lengths are i32, and kernels add to places.
_MOST_TOKENS = 1 << 30

_Ints = npt.NDArray[np.int64]

_numbers = itertools.count()
_caches: WeakValueDictionary[int, KVCache] = WeakValueDictionary()


def cache_of(number: int) -> KVCache:
    """The cache that has a number.

    Raises:
        CacheInputError: it is no more.
    """
    if (found := _caches.get(number)) is None:
        raise CacheInputError(f"cache number {number} is no more: what was compiled for it must be compiled anew")
    return found


@dataclass(frozen=True)
class Bucket:
    """A sequence's pages of one side and format in a layer, oldest first; nothing is copied.

    Attributes:
        indices: which pages of the sequence they are.
        entries, views: of each.
    """

    side: Side
    format: PageFormat
    indices: _Ints
    entries: _Ints
    views: list[PageViews]


@dataclass(frozen=True)
class BucketedCacheLayer:
    """What a layer holds, page by page of one kind: views, valid until the cache changes."""

    cache: KVCache
    layer: int

    def buckets(self, sequence: int) -> list[Bucket]:
        """All of a sequence's pages, K before V, wider before narrower."""
        found = []
        for side in Side:
            entries = self.cache.entries[self.layer, side, sequence]
            formats = np.where(entries == NO_PAGE, -1, entries & ENTRY_FORMAT_MASK)
            for page_format in PageFormat:
                indices = np.flatnonzero(formats == page_format)
                if len(indices):
                    views = [self.cache.pools.page_views(int(entry)) for entry in entries[indices]]
                    found.append(Bucket(side, page_format, indices, entries[indices], views))
        return found


@dataclass(frozen=True)
class _Places:
    """Pages by where they are, arrays of n."""

    layer: _Ints
    side: _Ints
    sequence: _Ints
    index: _Ints

    def __len__(self) -> int:
        return len(self.layer)

    def __getitem__(self, chosen: npt.NDArray[np.generic]) -> _Places:
        return _Places(self.layer[chosen], self.side[chosen], self.sequence[chosen], self.index[chosen])

    @property
    def where(self) -> tuple[_Ints, _Ints, _Ints, _Ints]:
        """For indexing page tables."""
        return self.layer, self.side, self.sequence, self.index


@dataclass(frozen=True)
class _Changes:
    """Pages that shall have another format."""

    places: _Places
    formats: npt.NDArray[np.uint8]
    outcome: Outcome


@dataclass(frozen=True)
class _Tokens:
    """Tokens that are not in the cache yet: [batch, heads, tokens, head_dim], at ``starts`` of ``sequences``."""

    k: torch.Tensor
    v: torch.Tensor
    sequences: list[int]
    starts: list[int]
    queries: Queries | None


@dataclass
class Queries:
    """Squares of queries, times those of the scale: how much each dimension of keys counts.

    Attributes:
        squares: fp32 [num_kv_heads, head_dim], sums over query heads and tokens.
        count: of each sum.
    """

    squares: torch.Tensor
    count: int

    @classmethod
    def of(cls, q: torch.Tensor, num_kv_heads: int, scale: float) -> Queries:
        """q [batch, query heads, tokens, head_dim], multiplied with ``scale`` before keys."""
        squares = (q.detach().float() * scale).square().unflatten(1, (num_kv_heads, -1))
        return cls(squares.sum((0, 2, 3)), squares[:, 0, :, :, 0].numel())

    def __add__(self, other: Queries | None) -> Queries:
        return self if other is None else Queries(self.squares + other.squares, self.count + other.count)


class KVCache:
    """Keys and values of several layers and sequences, in pages of mixed precision.

    Args:
        num_layers, num_kv_heads, head_dim: of the model; head_dim a multiple of 16 up to 256.
        max_tokens: of one sequence; page tables have room for them, pages come as needed.
        max_sequences: how many there are; they are named 0, 1, ….
        dtype: of keys and values, fp16 or bf16.
        device: of everything; None is CUDA if torch has it, else the CPU.
        budget: bytes of pages as a fraction of those in 16 bits, more than 0 and at most 1, which long sequences keep;
            short ones are mostly pages that stay in 16 bits. See the module.
        policy: which pages get the budget's bytes: see :func:`allocate_widths`.
        widths: without a budget, the formats that pages get when they leave the recent window: one for all, or
            (of K, of V) of each layer. With neither, all pages stay in 16 bits.
        recent_tokens: the newest ones of each sequence, in 16 bits.
        sinks: the first ones of each sequence, in 16 bits.
        max_bytes, slab_bytes: as of :class:`PagePools`.

    Attributes:
        pools: where the pages lie.
        page_table: i64 [layers, 2, max_sequences, max_pages] on the device: entries, or -1. Its address stays.
        entries: the same on the host.
        lengths: i32 [layers, max_sequences] on the device: tokens. Its address stays.
        mass: i64 [layers, max_sequences, max_pages] on the device, in :data:`MASS_UNIT`: attention that pages have
            received since :meth:`reallocate`, summed over steps.
        observed_steps: i32 [layers, max_sequences] on the device: how many steps those are.
        errors: fp64 [layers, 2, widths of the ladder]: what each width spoils: of K the mean squared error of scores,
            of V that of values relative to their mean square, which change the result of attention about alike. NaN
            until it has been measured, on the first page that is open to be quantized; values from elsewhere may be put
            in before.
        importance: what :meth:`reallocate` knows of the pages.
        shares: fp64 [layers]: the budget of each; their mean is at most that of all.
        number: what compiled graphs name the cache by (:func:`cache_of`).
        calls: i32 [1] on the host, which operators of compiled graphs pretend to change, so that they keep their order.

    Raises:
        CacheInputError: an argument is not what it must be.
        PageError: a head_dim that pages cannot have.
        CacheFullError: the system does not provide the address space (on the CPU).
    """

    def __init__(
        self,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        max_tokens: int,
        *,
        max_sequences: int = 1,
        dtype: torch.dtype = torch.float16,
        device: torch.device | str | None = None,
        budget: float | None = None,
        policy: Policy = "importance",
        widths: Widths | None = None,
        recent_tokens: int = 64,
        sinks: int = 4,
        max_bytes: int | None = None,
        slab_bytes: int = SLAB_BYTES,
    ) -> None:
        sizes = {"num_layers": num_layers, "num_kv_heads": num_kv_heads, "max_tokens": max_tokens}
        for name, value in (sizes | {"max_sequences": max_sequences}).items():
            if value < 1:
                raise CacheInputError(f"{name} is {value}; it must be at least 1")
        for name, value in (("recent_tokens", recent_tokens), ("sinks", sinks)):
            if value < 0:
                raise CacheInputError(f"{name} is {value}; it must not be negative")
        if max_tokens > _MOST_TOKENS:
            raise CacheInputError(f"max_tokens is {max_tokens}; it must be at most {_MOST_TOKENS}")
        if dtype not in PAGE_FORMATS:
            raise CacheInputError(f"dtype is {dtype}; keys and values are float16 or bfloat16")
        if budget is not None and not 0 < budget <= 1:
            raise CacheInputError(f"budget is {budget}; it is a fraction, more than 0 and at most 1")
        if budget is not None and widths is not None:
            raise CacheInputError("either a budget or widths can be given, not both")
        if policy not in POLICIES:
            raise CacheInputError(f"policy is {policy!r}; there are {', '.join(POLICIES)}")
        self.num_layers, self.num_kv_heads, self.head_dim = num_layers, num_kv_heads, head_dim
        self.max_tokens, self.max_sequences, self.dtype = max_tokens, max_sequences, dtype
        self.device = resolve_device(device)
        self.budget, self.policy = budget, policy
        self.recent_tokens, self.sinks = recent_tokens, sinks
        self.full_format = PAGE_FORMATS[dtype]
        self.ladder = (*LADDER[:-1], self.full_format)
        self._widths = self._checked_widths(widths)
        self._possible_formats = [
            tuple(frozenset((self.full_format, PageFormat(f)) if budget is None else self.ladder) for f in pair)
            for pair in self._widths
        ]
        self.pools = PagePools(num_kv_heads, head_dim, self.device, max_bytes=max_bytes, slab_bytes=slab_bytes)
        self._page_bytes = np.array([[self.pools.page_bytes(side, f) for f in self.ladder] for side in Side])
        self._full_bytes = int(self._page_bytes[0, -1])
        max_pages = ceil_div(max_tokens, PAGE_TOKENS)
        self.entries: _Ints = np.full((num_layers, len(Side), max_sequences, max_pages), NO_PAGE, np.int64)
        self._lengths: npt.NDArray[np.int32] = np.zeros((num_layers, max_sequences), np.int32)
        with torch.inference_mode(False):  # they may be changed outside of it
            self._make_tensors()
        self.errors = np.full((num_layers, len(Side), len(self.ladder)), np.nan)
        self._queries: list[Queries | None] = [None] * num_layers
        self.importance = ImportanceEMA(num_layers, max_sequences, max_pages)
        self.shares = np.full(num_layers, 1.0 if budget is None else budget)
        self._rows: dict[tuple[int, ...], torch.Tensor] = {}
        self._captured_rows: dict[tuple[int, ...], torch.Tensor] = {}  # graphs hold their addresses
        self.number = next(_numbers)
        _caches[self.number] = self
        if self.device.type == "cuda":
            semaphores.prepare(self.device)

    def _make_tensors(self) -> None:
        layers, _, max_sequences, max_pages = self.entries.shape
        self.page_table = torch.from_numpy(self.entries).to(self.device, copy=True)
        self.lengths = torch.zeros((layers, max_sequences), dtype=torch.int32, device=self.device)
        self.mass = torch.zeros((layers, max_sequences, max_pages), dtype=torch.int64, device=self.device)
        self.observed_steps = torch.zeros_like(self.lengths)
        self.status = new_status(self.device)
        self.calls = torch.zeros(1, dtype=torch.int32)
        # Indexing a tensor takes as long as a launch.
        self._tables, self._layer_lengths = self.page_table.unbind(), self.lengths.unbind()

    def __repr__(self) -> str:
        lengths = self._lengths[0].tolist()
        shown = lengths if len(lengths) <= 8 else [*lengths[:8], "…"]
        return (
            f"KVCache({self.num_layers} layers, {self.num_kv_heads} heads of {self.head_dim}, {self.dtype} on "
            f"{self.device}; tokens {', '.join(map(str, shown))} of {self.max_tokens} each; {self.average_bits():.2f} "
            f"bits, pages {self.pools.bytes_in_use / 1e6:.2f} MB in {self.estimate_memory_mb():.2f} MB)"
        )

    def __reduce_ex__(self, protocol: object) -> str:
        raise TypeError("a KVCache cannot be copied or pickled: its pages are known by where they lie")

    def possible_formats(self, layer: int, side: Side) -> frozenset[PageFormat]:
        """What a layer's pages can come to have, so that one kernel serves all that the cache becomes."""
        return self._possible_formats[layer][side]

    def _checked_widths(self, widths: Widths | None) -> npt.NDArray[np.uint8]:
        """[layers, 2]"""
        if widths is None:
            widths = self.full_format
        pairs: Any = [(widths, widths)] * self.num_layers if isinstance(widths, PageFormat) else widths
        wanted = f"a PageFormat for all, or a pair (of K, of V) for each of {self.num_layers} layers"
        if not isinstance(pairs, Sequence) or isinstance(pairs, str) or len(pairs) != self.num_layers:
            raise CacheInputError(f"widths are {widths!r}; {wanted} is wanted")
        for pair in pairs:
            is_pair = isinstance(pair, Sequence) and len(pair) == len(Side)
            if not is_pair or not all(isinstance(page_format, PageFormat) for page_format in pair):
                raise CacheInputError(f"widths have {pair!r} for a layer; {wanted} is wanted")
        for page_format in {page_format for pair in pairs for page_format in pair}:
            if not page_format.is_quantized and page_format != self.full_format:
                raise CacheInputError(f"pages of {self.dtype} cannot become {page_format.name}")
        return np.array(pairs, np.uint8)

    # Tokens ----------------------------------------------------------------------------------------------------------

    def append(
        self,
        layer: int,
        k: torch.Tensor,
        v: torch.Tensor,
        sequences: Sequence[int] | None = None,
        attend: Attend | None = None,
        queries: Queries | None = None,
    ) -> None:
        """Write new tokens behind a layer's last ones, and quantize pages that have left the recent window.

        Until then all of the new tokens take 16 bits: give long prompts in pieces.

        In a CUDA graph's capture only what is on the device changes; before each replay, :meth:`plan` is to be called.

        Args:
            k, v: [batch, num_kv_heads, tokens, head_dim], of the cache's dtype and device.
            sequences: which ones the batch is, each once; None is 0, 1, ….
            attend: called when the tokens are written, and nothing has been quantized for their sake yet.
            queries: that meet these keys, as long as :meth:`wants_queries`.

        Raises:
            CacheInputError: a wrong layer, sequence, shape, dtype or device.
            CacheFullError: a sequence would exceed ``max_tokens``, or pages ``max_bytes`` or the device's memory.
        """
        ids = self.checked_input(layer, k, v, sequences)
        k, v, count = k.detach(), v.detach(), k.shape[2]
        if not ids or count == 0:
            return
        rows = self._row_index(ids)
        written: list[torch.Tensor] = []

        def write() -> None:
            written.append(self._write(layer, k, v, rows, attend))

        def undo() -> None:
            self._clear(layer, k, rows)

        if self._is_captured():
            write()
        else:
            before, errors = self._lengths[layer, ids].tolist(), self.errors[layer].copy()
            try:
                plan: tuple[_Places, _Changes | None] = _NO_PLACES, None
                if not self._changes_no_page(before, count):
                    plan = self._planned_for([layer], ids, count, _Tokens(k, v, ids, before, queries))
                self._commit(*plan, write, undo)
            except BaseException:
                self.errors[layer] = errors
                raise
            self._lengths[layer, ids] += count
            if queries is not None:
                self._queries[layer] = queries + self._queries[layer]
        (after,) = written
        if rows is None:
            self._layer_lengths[layer].copy_(after)
        else:
            self._layer_lengths[layer].index_copy_(0, rows, after)

    def _changes_no_page(self, before: list[int], count: int) -> bool:
        """Whether sequences of these lengths have room for so many tokens and no page leaves the window: most steps."""
        recent = self.recent_tokens
        return all(
            0 < length % PAGE_TOKENS <= PAGE_TOKENS - count
            and (length - recent) // PAGE_TOKENS == (length + count - recent) // PAGE_TOKENS
            and length + count <= self.max_tokens
            for length in before
        )

    def wants_queries(self, layer: int) -> bool:
        """Whether it is not known yet what a layer's widths spoil, and shall be. Not in a CUDA graph's capture."""
        if self.budget is None or not 0 <= layer < self.num_layers or self._is_captured():
            return False
        return bool(np.isnan(self.errors[layer, Side.K]).any())

    def try_tokens(
        self, layer: int, k: torch.Tensor, v: torch.Tensor, sequences: Sequence[int] | None, attend: Attend
    ) -> None:
        """As :meth:`append`, but afterwards the cache holds what it did before.

        Raises:
            CacheInputError: as of :meth:`append`; also in a CUDA graph's capture, which cannot allocate pages.
            CacheFullError: as of :meth:`append`.
        """
        ids = self.checked_input(layer, k, v, sequences)
        k, v, count = k.detach(), v.detach(), k.shape[2]
        if not ids or count == 0:
            return
        if self._is_captured():
            raise CacheInputError("tokens that are not kept need pages, which a CUDA graph's capture cannot allocate")
        rows = self._row_index(ids)
        new = self._new_pages([layer], ids, count)

        def undo() -> None:
            self._clear(layer, k, rows)

        def write() -> None:
            self._write(layer, k, v, rows, attend)
            undo()

        self._commit(new, None, write, undo)
        self._forget_pages(new)

    def plan(self, tokens: int = 1, sequences: Sequence[int] | None = None) -> None:
        """Make room in every layer for tokens that a replayed CUDA graph appends next, once.

        The graph has been captured from calls of :meth:`append` with as many tokens of these sequences, one a layer.
        The host counts the tokens from here on; the device does when the graph has run, which is to be enqueued before
        anything else that uses the cache. With a budget, what keys spoil is measured with the queries of calls that no
        graph has captured; without any, books-27m's mean square of scores stands in for theirs.

        Raises:
            CacheInputError: a wrong sequence; layers that have different numbers of tokens; more tokens than the recent
                window has, of which some would have to be quantized before they are written.
            CacheFullError: a sequence would exceed ``max_tokens``, or pages ``max_bytes`` or the device's memory.
        """
        ids = list(range(self.max_sequences) if sequences is None else sequences)
        self._check_place(0, ids)
        quantizes = self.budget is not None or (self._widths != self.full_format).any()
        if tokens < 1 or (quantizes and tokens > self.recent_tokens):
            raise CacheInputError(f"{tokens} tokens cannot be planned for; at most recent_tokens, {self.recent_tokens}")
        if (self._lengths[:, ids] != self._lengths[0, ids]).any():
            raise CacheInputError("plan() in the midst of a step: layers have different numbers of tokens")
        if not ids:
            return
        self._commit(*self._planned_for(range(self.num_layers), ids, tokens, None), _nothing, _nothing)
        self._lengths[:, ids] += tokens

    def _is_captured(self) -> bool:
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def _write(
        self, layer: int, k: torch.Tensor, v: torch.Tensor, rows: torch.Tensor | None, attend: Attend | None
    ) -> torch.Tensor:
        """Into pages that are there. Returns the lengths with new tokens; those of the cache are not advanced."""
        table, positions = self._places_of_rows(layer, rows)
        write_tokens(k, v, table, positions, self.status, self.pools.pages)
        after = positions + k.shape[2]
        if attend is not None:
            attend(table, after)
        return after

    def _clear(self, layer: int, k: torch.Tensor, rows: torch.Tensor | None) -> None:
        """Zeros where tokens were that are not kept: what may be no number must not stay behind a sequence's end."""
        none = torch.zeros_like(k[:, :, : PAGE_TOKENS - 1])
        write_tokens(none, none, *self._places_of_rows(layer, rows), self.status, self.pools.pages)

    def _places_of_rows(self, layer: int, rows: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Page table [2, batch, pages] and lengths [batch]."""
        table, lengths = self._tables[layer], self._layer_lengths[layer]
        return (table, lengths) if rows is None else (table[:, rows], lengths[rows])

    def check_room(self, layer: int, sequences: Sequence[int], tokens: int) -> None:
        """
        Raises:
            CacheFullError: a sequence would exceed ``max_tokens`` with so many more.
        """
        for sequence in sequences:
            if (before := int(self._lengths[layer, sequence])) + tokens > self.max_tokens:
                raise CacheFullError(
                    f"layer {layer}, sequence {sequence}: {tokens} tokens behind {before} are more than the "
                    f"{self.max_tokens} of max_tokens; free() the sequence, or make a larger cache"
                )

    def _new_pages(self, layers: Sequence[int], ids: list[int], count: int) -> _Places:
        """Pages that sequences need for so many more tokens.

        Raises:
            CacheFullError: a sequence would exceed ``max_tokens``.
        """
        rows = []
        for layer in layers:
            self.check_room(layer, ids, count)
            for sequence, before in zip(ids, self._lengths[layer, ids].tolist(), strict=True):
                for index in range(ceil_div(before, PAGE_TOKENS), ceil_div(before + count, PAGE_TOKENS)):
                    rows += [(layer, int(side), sequence, index) for side in Side]
        return _places(rows)

    def _planned_for(
        self, layers: Sequence[int], ids: list[int], count: int, tokens: _Tokens | None
    ) -> tuple[_Places, _Changes | None]:
        """New pages, and pages that change, when so many tokens are appended."""
        new = self._new_pages(layers, ids, count)
        plans = []
        for layer in layers:
            before, lengths = self._lengths[layer, ids], self._lengths[layer].copy()
            lengths[ids] += count
            # A sequence's beginning, and pages that leave the window, are what the budget is sensitive to: the pages
            # that come until the next one leaves are counted beforehand.
            if (before == 0).any() or (self._open_end(before) != self._open_end(before + count)).any():
                plans.append(self._planned(layer, lengths, tokens))
        return new, _joined(plans) if plans else None

    def read(self, layer: int, sequence: int, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values that a sequence has in a layer, dequantized: [num_kv_heads, tokens, head_dim] each.

        Args:
            dtype: fp16, bf16 or fp32, to which values are rounded once; None is the cache's.

        Raises:
            CacheInputError: a wrong layer or sequence.
        """
        self._check_place(layer, [sequence])
        ends = self.lengths[layer, sequence : sequence + 1]
        starts, count = torch.zeros_like(ends), int(self._lengths[layer, sequence])
        k, v = (
            read_tokens(
                self.page_table[layer, side, sequence : sequence + 1],
                side,
                starts,
                ends,
                count,
                self.head_dim,
                self.num_kv_heads,
                self.dtype if dtype is None else dtype,
                self.status,
                self.pools.pages,
            )[0]
            for side in Side
        )
        return k, v

    def free(self, sequence: int) -> None:
        """Forget all tokens of a sequence. The others then hold the budget of what is left.

        Raises:
            CacheInputError: a wrong sequence.
        """
        self._check_place(0, [sequence])
        for entry in self.entries[:, :, sequence][self.entries[:, :, sequence] != NO_PAGE].tolist():
            self.pools.free(entry)
        self.entries[:, :, sequence] = NO_PAGE
        self.page_table[:, :, sequence] = NO_PAGE
        self._lengths[:, sequence] = 0
        self.lengths[:, sequence] = 0
        self.mass[:, sequence] = 0
        self.observed_steps[:, sequence] = 0
        self.importance.forget(sequence)
        # Freeing must not fail for want of memory; who appends next will be told.
        with suppress(CacheFullError):
            for layer in range(self.num_layers):
                if self.budget is not None:
                    self._commit(_NO_PLACES, self._planned(layer, self._lengths[layer]), _nothing, _nothing)

    def _commit(
        self, new: _Places, changes: _Changes | None, write: Callable[[], None], undo: Callable[[], None]
    ) -> None:
        """Allocate new pages, write, quantize: all or nothing. ``undo`` is called while new pages are still there."""
        if not len(new) and changes is None:  # most steps
            try:
                write()
            except BaseException:
                undo()
                raise
            return
        places, formats = (_NO_PLACES, np.empty(0, np.uint8)) if changes is None else (changes.places, changes.formats)
        wanted = [(Side(side), self.full_format) for side in new.side.tolist()]
        wanted += [(Side(side), PageFormat(f)) for side, f in zip(places.side.tolist(), formats.tolist(), strict=True)]
        self.pools.reserve(Counter(wanted))
        allocated: list[int] = []
        try:
            rows = [row for part in (new, places) for row in zip(*(a.tolist() for a in part.where), strict=True)]
            for kind, (layer, _, sequence, index) in zip(wanted, rows, strict=True):
                allocated.append(self.pools.allocate(*kind, PageOwner(layer, sequence, index)))
            targets = np.array(allocated[len(new) :], np.int64)
            self._set_entries(new, np.array(allocated[: len(new)], np.int64))
            try:
                write()
                sources = self.entries[places.where]
                self._quantize(places.side, sources, targets)
            except BaseException:
                undo()
                raise
        except BaseException:
            self._set_entries(new, np.full(len(new), NO_PAGE))
            for entry in reversed(allocated):
                self.pools.free(entry)
            raise
        self._set_entries(places, targets)
        for entry in sources.tolist():
            self.pools.free(entry)

    def _forget_pages(self, places: _Places) -> None:
        for entry in self.entries[places.where].tolist():
            self.pools.free(entry)
        self._set_entries(places, np.full(len(places), NO_PAGE))

    def _set_entries(self, places: _Places, entries: _Ints) -> None:
        """On the host and, behind what is enqueued, on the device."""
        if not len(places):
            return
        self.entries[places.where] = entries
        flat = np.ravel_multi_index(places.where, self.entries.shape)
        where, values = self._upload(np.stack([flat, entries]))
        self.page_table.view(-1)[where] = values

    def _quantize(self, sides: _Ints, sources: _Ints, targets: _Ints) -> None:
        kinds = np.stack([sides, sources & ENTRY_FORMAT_MASK, targets & ENTRY_FORMAT_MASK], axis=1)
        for kind in np.unique(kinds, axis=0):
            chosen = (kinds == kind).all(axis=1)
            jobs = self._upload(np.stack([sources[chosen], targets[chosen]], axis=1))
            side, source, target = kind.tolist()
            quantize_pages(
                jobs,
                Side(side),
                PageFormat(source),
                PageFormat(target),
                self.head_dim,
                self.num_kv_heads,
                self.status,
                self.pools.pages,
            )

    def is_everything(self, sequences: Sequence[int]) -> bool:
        """Whether these are all sequences, in order."""
        return list(sequences) == list(range(self.max_sequences))

    def _row_index(self, sequences: list[int]) -> torch.Tensor | None:
        """On the device; None if they are all, in order."""
        if self.is_everything(sequences):
            return None
        key, captured = tuple(sequences), self._is_captured()
        if key not in self._rows:
            if captured:
                raise CacheInputError(f"sequences {sequences} are captured in a CUDA graph: use them once before")
            self._rows.clear()
            self._rows[key] = self._upload(np.array(sequences, np.int64))
        if captured:
            self._captured_rows[key] = self._rows[key]
        return self._rows[key]

    def _upload(self, values: _Ints) -> torch.Tensor:
        """Without waiting: CUDA has taken what lies in pageable memory when it returns."""
        return torch.from_numpy(values).to(self.device, non_blocking=True)

    def checked_input(self, layer: int, k: torch.Tensor, v: torch.Tensor, sequences: Sequence[int] | None) -> list[int]:
        """The sequences that a batch is.

        Raises:
            CacheInputError: a wrong layer, sequence, shape, dtype or device.
        """
        shape = ("batch", self.num_kv_heads, "tokens", self.head_dim)
        if k.shape != v.shape or k.dim() != 4 or (k.shape[1], k.shape[3]) != (self.num_kv_heads, self.head_dim):
            raise CacheInputError(
                f"k has shape {list(k.shape)} and v {list(v.shape)}; this cache takes [{', '.join(map(str, shape))}]"
            )
        for name, tensor in (("k", k), ("v", v)):
            if tensor.dtype != self.dtype or tensor.device != self.device:
                raise CacheInputError(
                    f"{name} is {tensor.dtype} on {tensor.device}; this cache is {self.dtype} on {self.device} "
                    "(KVCache(dtype=…, device=…))"
                )
        ids = list(range(k.shape[0]) if sequences is None else map(operator.index, sequences))
        if len(ids) != k.shape[0]:
            raise CacheInputError(f"{len(ids)} sequences are named for a batch of {k.shape[0]}")
        self._check_place(layer, ids)
        return ids

    def _check_place(self, layer: int, sequences: list[int]) -> None:
        if not 0 <= layer < self.num_layers:
            raise CacheInputError(f"layer is {layer}; there are {self.num_layers}")
        if sequences and not 0 <= min(sequences) <= max(sequences) < self.max_sequences:
            raise CacheInputError(f"sequences are {sequences}; the cache has max_sequences={self.max_sequences}")
        if len(set(sequences)) != len(sequences):
            raise CacheInputError(f"sequences are {sequences}; each may be named once")

    # Bits ------------------------------------------------------------------------------------------------------------

    def observe(
        self,
        layer: int,
        mass: torch.Tensor,
        sequences: Sequence[int] | None = None,
        head_importance: torch.Tensor | None = None,
    ) -> None:
        """Take note of the attention that pages have received in a decoding step; does not wait for the device.

        Args:
            mass: [batch, query heads, pages], softmax probabilities summed over each page's tokens; pages may be fewer
                than a page table has room for. All that is observed of a page until :meth:`reallocate` is less than
                2^31.
            sequences: as of :meth:`append`.
            head_importance: [query heads], how much each counts, compared with those of other layers as well.

        What is negative or no number counts as 0.

        Raises:
            CacheInputError: a wrong layer, sequence or shape.
        """
        ids = list(range(mass.shape[0]) if sequences is None else sequences)
        self._check_place(layer, ids)
        batch, heads, pages = mass.shape
        if batch != len(ids) or pages > self.mass.shape[2]:
            raise CacheInputError(
                f"mass has shape {list(mass.shape)}; {len(ids)} sequences have at most {self.mass.shape[2]} pages"
            )
        by_page = mass.detach().float()
        if head_importance is not None and head_importance.shape == (heads,):
            by_page = by_page * head_importance.float()[:, None]
        elif head_importance is not None:
            raise CacheInputError(f"head_importance has shape {list(head_importance.shape)}; mass has {heads} heads")
        by_page = by_page.nan_to_num(0, 0, 0).clamp(min=0).mean(1)
        units = (by_page.double() / MASS_UNIT).round().long()
        self.add_observed(layer, units, torch.ones(batch, dtype=torch.int32, device=self.device), ids)

    def add_observed(
        self, layer: int, mass: torch.Tensor, steps: torch.Tensor, sequences: Sequence[int] | None = None
    ) -> None:
        """What an attention kernel has observed: ``mass`` i64 [batch, pages], ``steps`` i32 [batch]."""
        ids = list(range(len(mass)) if sequences is None else sequences)
        self._check_place(layer, ids)
        rows = self._row_index(ids)
        if rows is None:
            self.mass[layer, :, : mass.shape[1]] += mass
            self.observed_steps[layer] += steps
        else:
            self.mass[layer, :, : mass.shape[1]].index_add_(0, rows, mass)
            self.observed_steps[layer].index_add_(0, rows, steps)

    def reallocate(self) -> Outcome:
        """Move the budget's bytes between layers, by what has been observed; waits for the device.

        Shares are chosen for the pages that leave the recent window next, which alone can have more bits than now; from
        a layer that has more than its new share, pages lose bits. Call it between steps, every few dozen of them.

        Returns:
            Whether the budget is held; HELD without one.

        Raises:
            CacheInputError: layers have different numbers of tokens: a step is not complete.
            CacheFullError: narrower pages need more than ``max_bytes``, before wider ones can be freed.
        """
        if (self._lengths != self._lengths[0]).any():
            raise CacheInputError("reallocate() in the midst of a step: layers have different numbers of tokens")
        lengths = self._lengths[0]
        self._take_in_observed(lengths)
        if self.budget is None:
            return Outcome.HELD
        before = self.shares.copy()
        self._choose_shares(self.budget, lengths)
        try:
            plans = [self._planned(layer, lengths) for layer in range(self.num_layers)]
            self._commit(_NO_PLACES, _joined(plans), _nothing, _nothing)
        except BaseException:
            self.shares[:] = before
            raise
        outcomes = [plan.outcome for plan in plans]
        return next((outcome for outcome in outcomes if outcome != Outcome.HELD), Outcome.HELD)

    def _choose_shares(self, budget: float, lengths: npt.NDArray[np.int32]) -> None:
        """As if all pages but the sinks had left the recent window."""
        places = self._places_of(range(self.num_layers), lengths)
        for layer in range(self.num_layers):
            self._measure(
                layer, places[(places.layer == layer) & (places.index < lengths[places.sequence] // PAGE_TOKENS)]
            )
        ahead = np.minimum(-(lengths // -PAGE_TOKENS) * PAGE_TOKENS + self.recent_tokens, self.max_tokens)
        ahead = np.where(lengths > 0, ahead, 0)
        pinned = self._pinned(places, ahead)
        self.shares[:] = budget
        if pinned.all() or np.isnan(self.errors).any():
            return
        room = self._room(len(places) // self.num_layers, int(pinned.sum()) // self.num_layers, lengths, ahead)
        allowed = self.num_layers * room.budget(budget)
        allocation = self._allocated(places, pinned, allowed)
        if allocation.outcome != Outcome.HELD:
            return
        used = np.zeros(self.num_layers)
        for page_format in self.ladder:
            of_side = [self.pools.page_bytes(side, page_format) for side in Side]
            chosen = allocation.formats == page_format
            used += np.bincount(places.layer[chosen], np.take(of_side, places.side[chosen]), self.num_layers)
        # What is left is divided equally.
        self.shares[:] = room.shares(used + (allowed - used.sum()) / self.num_layers)

    def _take_in_observed(self, lengths: npt.NDArray[np.int32]) -> None:
        counts = -(-lengths // PAGE_TOKENS)
        steps = self.observed_steps.cpu().numpy()
        mass = np.maximum(self.mass.cpu().numpy(), 0) * MASS_UNIT / np.maximum(steps, 1)[:, :, None]
        for layer in np.flatnonzero(steps.any(axis=1)).tolist():
            self.importance.update(layer, mass[layer], counts, steps=steps[layer])
        self.mass.zero_()
        self.observed_steps.zero_()

    def _planned(self, layer: int, lengths: npt.NDArray[np.int32], tokens: _Tokens | None = None) -> _Changes:
        """What changes in a layer that has these numbers of tokens, so that it holds its share."""
        places = self._places_of([layer], lengths)
        pinned = self._pinned(places, lengths)
        formats = self._formats(places)
        outcome = Outcome.HELD
        if self.budget is None:
            is_open = ~pinned & (formats == self.full_format)
            wanted = np.where(is_open, self._widths[layer][places.side], formats)
        else:
            self._measure(layer, places[~pinned], tokens)
            room = self._room(len(places), int(pinned.sum()), lengths, lengths)
            allocation = self._allocated(places, pinned, room.budget(float(self.shares[layer])))
            wanted, outcome = allocation.formats, allocation.outcome
        changed = wanted != formats
        return _Changes(places[changed], wanted[changed], outcome)

    def _allocated(self, places: _Places, pinned: npt.NDArray[np.bool_], budget: float) -> Allocation:
        importance = np.empty(len(places))
        for layer in np.unique(places.layer).tolist():
            chosen = places.layer == layer
            importance[chosen] = self.importance.forecast(layer)[places.sequence[chosen], places.index[chosen]]
        pages = Pages(
            places.layer,
            places.sequence,
            places.index,
            places.side,
            self._formats(places),
            importance,
            np.where(pinned[:, None], 0, self.errors[places.layer, places.side]),
            pinned,
        )
        return allocate_widths(pages, self._page_bytes, round(budget), ladder=self.ladder, policy=self.policy)

    def _measure(self, layer: int, pages: _Places, tokens: _Tokens | None = None) -> None:
        """The errors of a layer's widths, on the first of these that is in 16 bits. Once, since the host must wait."""
        if not np.isnan(self.errors[layer]).any():
            return
        for side in Side:
            found = np.flatnonzero((pages.side == side) & (self._formats(pages) == self.full_format))
            if not len(found):
                continue
            sequence, index = int(pages.sequence[found[0]]), int(pages.index[found[0]])
            x = self._page_values(layer, side, sequence, index, tokens)
            x = np.where(np.isfinite(x), x, 0)
            weights = self._weights(layer, side, x, tokens)
            for rung, page_format in enumerate(self.ladder[:-1]):
                layout = PageLayout(side, page_format, self.head_dim)
                error = dequantize_blocks(quantize_blocks(x, layout), layout) - x.astype(np.float64)
                self.errors[layer, side, rung] = (np.square(error).mean(1) * weights).sum(-1).mean()
            self.errors[layer, side, -1] = 0

    def _weights(
        self, layer: int, side: Side, x: npt.NDArray[np.float32], tokens: _Tokens | None
    ) -> npt.NDArray[np.float64]:
        """What a squared error in each dimension counts, [heads or 1, head_dim], where x are a page's values."""
        queries = self._queries[layer]
        if tokens is not None and tokens.queries is not None:
            queries = tokens.queries + queries
        if side == Side.K and queries is not None:
            squares = queries.squares.double().cpu().numpy() / queries.count
            if np.isfinite(squares).all():
                return np.asarray(squares)
        energy = np.square(x, dtype=np.float64).mean()
        weight = (_SCORE_SQUARE if side == Side.K else 1.0) / energy if energy else 0.0
        return np.full((1, self.head_dim), weight / self.head_dim)

    def _page_values(
        self, layer: int, side: Side, sequence: int, index: int, tokens: _Tokens | None
    ) -> npt.NDArray[np.float32]:
        """[heads, 64, head_dim], of a page of 16 bits that is complete with ``tokens``."""
        entry, first = int(self.entries[layer, side, sequence, index]), index * PAGE_TOKENS
        values = np.zeros((self.num_kv_heads, PAGE_TOKENS, self.head_dim), np.float32)
        if entry != NO_PAGE:
            layout = PageLayout(side, self.full_format, self.head_dim)
            values[:] = dequantize_blocks(self.pools.blocks(entry).cpu().numpy(), layout)
        if tokens is not None and sequence in tokens.sequences:
            row = tokens.sequences.index(sequence)
            given, start = (tokens.k, tokens.v)[side][row], tokens.starts[row]
            begin, end = max(first, start), min(first + PAGE_TOKENS, start + given.shape[1])
            if begin < end:
                values[:, begin - first : end - first] = given[:, begin - start : end - start].float().cpu().numpy()
        return values

    def _places_of(self, layers: Sequence[int], lengths: npt.NDArray[np.int32]) -> _Places:
        """All pages of sequences of these lengths."""
        pages = -(-lengths // PAGE_TOKENS)
        present = np.arange(self.entries.shape[3]) < pages[:, None]
        shape = (len(layers), len(Side), *present.shape)
        layer, side, sequence, index = np.nonzero(np.broadcast_to(present, shape))
        return _Places(np.asarray(layers, np.int64)[layer], side, sequence, index)

    def _formats(self, places: _Places) -> npt.NDArray[np.uint8]:
        """Of pages that are there, and of those to come."""
        entries = self.entries[places.where]
        return np.where(entries == NO_PAGE, self.full_format, entries & ENTRY_FORMAT_MASK).astype(np.uint8)

    def _open_end(self, lengths: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        """How many pages of each sequence have left the recent window."""
        return np.maximum(0, (lengths - self.recent_tokens) // PAGE_TOKENS)

    def _pinned(self, places: _Places, lengths: npt.NDArray[np.int32]) -> npt.NDArray[np.bool_]:
        is_recent = places.index >= self._open_end(lengths)[places.sequence]
        return np.asarray((places.index < ceil_div(self.sinks, PAGE_TOKENS)) | is_recent)

    def _room(self, pages: int, pinned: int, lengths: npt.NDArray[np.int32], ahead: npt.NDArray[np.int32]) -> _Room:
        """For a layer's pages, and those that come until, from the lengths ``ahead`` on, one leaves the window."""
        last = PAGE_TOKENS * (self._open_end(ahead) + 1) - 1 + self.recent_tokens
        most = np.minimum(-(-last // PAGE_TOKENS), self.entries.shape[3])
        coming = len(Side) * int((most + lengths // -PAGE_TOKENS)[lengths > 0].sum())
        return _Room(*(count * self._full_bytes for count in (pages + coming, pinned + coming, coming)))

    # What there is ---------------------------------------------------------------------------------------------------

    def length(self, layer: int, sequence: int) -> int:
        """Tokens, as the host knows them.

        Raises:
            CacheInputError: a wrong layer or sequence.
        """
        self._check_place(layer, [sequence])
        return int(self._lengths[layer, sequence])

    def longest_pages(self, layer: int, tokens: int) -> int:
        """Of the longest sequence with so many more tokens; in a CUDA graph's capture, of the longest possible."""
        if self._is_captured():
            return self.entries.shape[3]
        return ceil_div(int(self._lengths[layer].max()) + tokens, PAGE_TOKENS)

    def layer(self, layer: int) -> BucketedCacheLayer:
        """A layer's pages by kind.

        Raises:
            CacheInputError: a wrong layer.
        """
        self._check_place(layer, [])
        return BucketedCacheLayer(self, layer)

    def precision_map(self, layer: int) -> npt.NDArray[np.int8]:
        """[2, max_sequences, max_pages]: the number of each page's :class:`PageFormat`, or -1 of no page.

        The number is no width: ``PageFormat(number).element_bits`` is.

        Raises:
            CacheInputError: a wrong layer.
        """
        self._check_place(layer, [])
        entries = self.entries[layer]
        return np.where(entries == NO_PAGE, -1, entries & ENTRY_FORMAT_MASK).astype(np.int8)

    def average_bits(self) -> float:
        """Bits of pages in use per element of K and V held: scales, and what is empty of last pages, counted; 0.0 of
        an empty cache."""
        elements = len(Side) * int(self._lengths.sum(dtype=np.int64)) * self.num_kv_heads * self.head_dim
        return 8 * self.pools.bytes_in_use / elements if elements else 0.0

    def estimate_memory_mb(self) -> float:
        """Device memory in MB (10^6 bytes): the slabs that are allocated, and the tables."""
        tables = (self.page_table, self.lengths, self.mass, self.observed_steps, self.status)
        return (self.pools.bytes_allocated + sum(table.nbytes for table in tables)) / 1e6

    def check(self) -> None:
        """Wait for the device.

        Raises:
            PageEntryError: kernels met entries that are none: something has written to the page table.
        """
        if (found := left_out(self.status)) is not None:
            self.status.zero_()
            raise PageEntryError(f"{found[0]} tokens or pages were left out, the first of them at {found[1]}")


@dataclass(frozen=True)
class _Room:
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
        return np.minimum(of_all / self.all, (of_all - self.pinned) / ((1 - YIELDED) * self.open))


def _nothing() -> None:
    pass


def _joined(changes: Sequence[_Changes]) -> _Changes:
    """Of several layers; the outcome is the first one's."""
    columns = zip(*(change.places.where for change in changes), strict=True)
    places = _Places(*(np.concatenate(column) for column in columns))
    return _Changes(places, np.concatenate([change.formats for change in changes]), changes[0].outcome)


def _places(rows: list[tuple[int, int, int, int]]) -> _Places:
    """Of (layer, side, sequence, index)."""
    return _Places(*np.array(rows, np.int64).reshape(-1, 4).T)


_NO_PLACES = _places([])
