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
more does the cache. Each layer holds its share by itself when tokens are appended: pages that leave the window take
from what is left, and only where nothing is left do others lose bits. :meth:`KVCache.reallocate` looks at all pages.

**Streams.** The host decides and enqueues. It waits for the device in :meth:`KVCache.reallocate` and
:meth:`KVCache.check`, in the first use after :meth:`KVCache.plan`, and once a layer to measure what each format spoils.
Freed pages are handed out again at once, which is right where all that uses the cache is enqueued on one
stream.

**CUDA graphs.** What is decided cannot be repeated by a graph, what is enqueued can: an append that is captured writes
tokens and advances the lengths on the device, and nothing else. Before each replay :meth:`KVCache.plan` does the rest.

**Failures.** An operation that raises leaves tokens, pages and what is known of formats as they were. Attention that
has been observed until then stays counted.
"""

from __future__ import annotations

import itertools
import operator
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import ReferenceType, WeakValueDictionary, ref

import numpy as np
import numpy.typing as npt
import torch

from kvpack.encode.page_coder import dequantize_blocks
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
    PageImportance,
    Pages,
    Policy,
    allocate_formats,
)
from kvpack.runtime.kv.attention_kernels import MASS_FRACTION_BITS
from kvpack.runtime.kv.budget import FormatPairs, Room, Window, formats_from_what_is_left, room
from kvpack.runtime.kv.distortion import Queries, format_errors
from kvpack.runtime.kv.page_holders import Kind, PageHolder
from kvpack.runtime.kv.page_kernels import PAGE_FORMATS, left_out, new_status, quantize_pages, read_tokens, write_tokens
from kvpack.runtime.kv.page_pools import SLAB_BYTES, PageOwner, PagePools
from kvpack.runtime.kv.page_slots import PageSlots
from kvpack.runtime.kv.page_summaries import PageSummaries
from kvpack.runtime.kv.page_table import NO_PAGE, Ints, PageTable, Place, Places, widened
from kvpack.runtime.kv.ragged import Counts, checked_counts, most
from kvpack.runtime.kv.shared_pages import (
    DistinctPages,
    held_by_others,
    is_any_shared,
    is_quantized,
    pages_lost,
    places_to_copy,
    repeats,
)
from kvpack.runtime.kv.steps import CELL_TOKENS, Step, quiet_tokens

OpenFormats = PageFormat | Sequence[tuple[PageFormat, PageFormat]]

# Attention mass is counted in integers, so that sums do not depend on their order.
MASS_UNIT = 2.0**-MASS_FRACTION_BITS
# Lengths are i32, and kernels add to places.
_MOST_TOKENS = 1 << 30
# By number, which takes a fifth of the time that calling the class takes.
_SIDES, _FORMATS = tuple(Side), tuple(PageFormat)
# How many are gathered at a time on their way to another device.
_COPIED_PAGES = 1024
# How many batches' rows are remembered on the device.
_REMEMBERED_ROWS = 256

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
        entries: of each.
        blocks: u8 [num_kv_heads, block bytes] of each, which :func:`kvpack.format.pages.split_block` takes apart.
    """

    side: Side
    format: PageFormat
    indices: Ints
    entries: Ints
    blocks: list[torch.Tensor]


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
                    blocks = [self.cache.pools.blocks(int(entry)) for entry in entries[indices]]
                    found.append(Bucket(side, page_format, indices, entries[indices], blocks))
        return found


@dataclass(frozen=True)
class KVView:
    """A batch's keys and values in a layer, as attention sees them: new tokens included, in 16 bits.

    Attributes:
        cache, layer, sequences: whose they are.
        page_table: i64 [2, batch, pages] on the device.
        lengths: i32 [batch] on the device: tokens.
    """

    cache: KVCache
    layer: int
    sequences: tuple[int, ...]
    page_table: torch.Tensor
    lengths: torch.Tensor


class _Changes(NamedTuple):
    """Pages that shall have another format."""

    places: list[Place]
    formats: list[int]
    outcome: Outcome = Outcome.HELD


class _Tokens(NamedTuple):
    """Tokens that are not in the cache yet: [batch, heads, columns, head_dim], the last of which, ``counts``, go behind
    those of ``sequences``."""

    k: torch.Tensor
    v: torch.Tensor
    counts: Counts
    sequences: list[int]
    queries: Queries | None


class _Begun(NamedTuple):
    """Pages that have come, and others that are to take the place of some; what is on the device is a tensor.

    Attributes:
        new, new_at, new_there, new_entries: places of pages that have come, and their entries.
        places, at, there, put, put_there: of pages that change, in each sequence, with their entries to be.
        owners, sources, targets: of the same pages, each once, with their entries before and after.
        kinds: side, format and format to be of these; those of a kind lie side by side.
        twins: those of the targets that have been there before, held for as long as this lasts.
        jobs: i64 [n, 2]: sources and targets, without those that have been there before.
    """

    new: list[Place]
    new_at: list[int]
    new_there: torch.Tensor
    new_entries: list[int]
    places: list[Place]
    at: list[int]
    there: torch.Tensor
    put: list[int]
    put_there: torch.Tensor
    owners: list[Place]
    sources: list[int]
    targets: list[int]
    kinds: list[tuple[int, int, int]]
    twins: set[int]
    jobs: torch.Tensor


class KVCache:
    """Keys and values of several layers and sequences, in pages of mixed precision.

    Args:
        num_layers, num_kv_heads, head_dim: of the model; head_dim a multiple of 16 up to 256.
        max_tokens: of one sequence; page tables and pages come as needed.
        max_sequences: how many there are; they are named 0, 1, ….
        dtype: of keys and values, fp16 or bf16.
        device: of everything; None is CUDA if torch has it, else the CPU.
        budget: bytes of pages as a fraction of those in 16 bits, at most 1 and at least what pages of 2 bits take
            (0.17 at a head_dim of 64), which long sequences keep; short ones are mostly pages that stay in 16 bits.
            See the module. Slabs come on top: those of a side and format have room for 8 pages, or for at most twice
            the most that were ever in use, and less than ``slab_bytes`` of it unused; ``pools.bytes_allocated`` counts
            them.
        policy: which pages get the budget's bytes: see :func:`allocate_formats`.
        formats: without a budget, the formats that pages get when they leave the recent window: one for all, or
            (of K, of V) of each layer. With neither, all pages stay in 16 bits.
        recent_tokens: the newest ones of each sequence, in 16 bits.
        sinks: the first ones of each sequence, in 16 bits.
        max_bytes, slab_bytes: as of :class:`PagePools`.
        widths: the former name of ``formats``.
        key_order: groups of 16 dimensions of keys, those first that quantized pages shall keep best. None is
            :func:`~kvpack.format.pages.half_split_order`, for RoPE as Llama has it.
        device_pages: quantized pages lie in host memory, and so many of each layer and sequence, those that
            ``attend(…, pages=k)`` has chosen last, on the device too: at least ``k``. ``max_bytes`` counts all of
            them. None: all pages lie on the device. With it, ``formats`` or a ``budget`` has to be given.

    Attributes:
        pools: where the pages lie.
        summaries: the ranges of pages' keys, which ``attend(…, pages=k)`` chooses by; made when first asked for.
        slots: with ``device_pages``, the pages that are on the device too; or None.
        table: entries of pages and numbers of tokens, on the host and on the device.
        mass: i64 [layers, max_sequences, pages that the table has room for] on the device, in :data:`MASS_UNIT`: the
            *attention mass* of each page, softmax probabilities of its tokens summed, averaged over query heads, since
            :meth:`reallocate`, summed over steps.
        observed_steps: i32 [layers, max_sequences] on the device: how many steps those are.
        errors: fp64 [layers, 2, formats of the ladder]: what each width spoils: of K the mean squared error of scores,
            of V that of values relative to their mean square, which change the result of attention about alike. NaN
            until it has been measured, on the first page that is open to be quantized; values from elsewhere may be put
            in before.
        importance: what :meth:`reallocate` knows of the pages.
        shares: fp64 [layers]: the budget of each; their mean is at most that of all.
        number: what compiled graphs name the cache by (:func:`cache_of`).
        calls: i32 [1] on the host, which operators of compiled graphs pretend to change, so that they keep their order.

    Raises:
        CacheInputError: an argument is not what it must be.
        PageError: a head_dim or a key_order that pages cannot have.
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
        formats: OpenFormats | None = None,
        recent_tokens: int = 64,
        sinks: int = 4,
        max_bytes: int | None = None,
        slab_bytes: int = SLAB_BYTES,
        widths: OpenFormats | None = None,
        key_order: Sequence[int] | None = None,
        device_pages: int | None = None,
    ) -> None:
        if widths is not None:
            warnings.warn("KVCache(widths=…) is called formats=…", DeprecationWarning, stacklevel=2)
            if formats is not None:
                raise CacheInputError("formats, and widths, their former name, are both given")
            formats = widths
        num_layers = _integer("num_layers", num_layers, 1)
        num_kv_heads = _integer("num_kv_heads", num_kv_heads, 1)
        head_dim = _integer("head_dim", head_dim, 1)
        max_tokens = _integer("max_tokens", max_tokens, 1)
        max_sequences = _integer("max_sequences", max_sequences, 1)
        recent_tokens = _integer("recent_tokens", recent_tokens, 0)
        sinks = _integer("sinks", sinks, 0)
        slab_bytes = _integer("slab_bytes", slab_bytes, 1)
        max_bytes = None if max_bytes is None else _integer("max_bytes", max_bytes, 0)
        if max_tokens > _MOST_TOKENS:
            raise CacheInputError(f"max_tokens is {max_tokens}; it must be at most {_MOST_TOKENS}")
        if dtype not in PAGE_FORMATS:
            raise CacheInputError(f"dtype is {dtype}; keys and values are float16 or bfloat16")
        if budget is not None and not (isinstance(budget, (float, int, np.floating)) and 0 < budget <= 1):
            raise CacheInputError(f"budget is {budget!r}; it is a fraction, more than 0 and at most 1")
        if budget is not None and formats is not None:
            raise CacheInputError("either a budget or formats can be given, not both")
        if device_pages is not None:
            device_pages = _integer("device_pages", device_pages, 1)
            if budget is None and formats is None:
                raise CacheInputError(
                    f"device_pages is {device_pages} without formats or a budget: pages of 16 bits stay on the device"
                )
        if policy not in POLICIES:
            raise CacheInputError(f"policy is {policy!r}; there are {', '.join(POLICIES)}")
        self.num_layers, self.num_kv_heads, self.head_dim = num_layers, num_kv_heads, head_dim
        self.max_tokens, self.max_sequences, self.dtype = max_tokens, max_sequences, dtype
        self.device = resolve_device(device)
        self.key_order = _checked_order(key_order)
        self.budget, self.policy = budget, policy
        self.recent_tokens, self.sinks = recent_tokens, sinks
        self.full_format = PAGE_FORMATS[dtype]
        self.ladder = (*LADDER[:-1], self.full_format)
        self._open_formats = self._checked_formats(formats)
        self._possible_formats = [
            tuple(frozenset((self.full_format, PageFormat(f)) if budget is None else self.ladder) for f in pair)
            for pair in self._open_formats
        ]
        self.pools = PagePools(
            num_kv_heads,
            head_dim,
            self.device,
            max_bytes=max_bytes,
            slab_bytes=slab_bytes,
            key_order=self.key_order,
            on_host=device_pages is not None,
        )
        self.summaries = PageSummaries(self.pools, num_layers, max_sequences, self.key_order)
        self.slots: PageSlots | None = None
        if device_pages is not None:
            possible = [
                frozenset[PageFormat]().union(*of_side) for of_side in zip(*self._possible_formats, strict=True)
            ]
            self.slots = PageSlots(self.pools, num_layers, max_sequences, device_pages, possible)
        self._options: dict[str, Any] = {
            "dtype": dtype,
            "budget": budget,
            "policy": policy,
            "recent_tokens": recent_tokens,
            "sinks": sinks,
            "max_bytes": max_bytes,
            "slab_bytes": slab_bytes,
            "key_order": key_order,
            "device_pages": device_pages,
        }
        # They hold the cache, and are known for as long as they live.
        self._holders: list[ReferenceType[PageHolder]] = []
        self.pools.reclaim = _Reclaimer(self._holders)
        self._page_bytes = np.array([[self.pools.page_bytes(side, f) for f in self.ladder] for side in Side])
        self._full_bytes = int(self._page_bytes[0, -1])
        least = self._page_bytes.min(1).sum() / self._page_bytes[:, -1].sum()
        if budget is not None and budget < least:
            raise CacheInputError(
                f"budget is {budget}; with head_dim {head_dim}, pages of {self.ladder[0].name} take {least:.4f} of the "
                "bytes of those in 16 bits: that is the least"
            )
        self.window = Window(recent_tokens, sinks)
        self.table = PageTable(num_layers, max_sequences, ceil_div(max_tokens, PAGE_TOKENS), self.device)
        # Of a layer's pages, each once however many sequences have it.
        self._used_bytes, self._used_pages = [0] * num_layers, [0] * num_layers
        with torch.inference_mode(False):  # they may be changed outside of it
            shape = (num_layers, max_sequences, self.table.pages)
            self.mass = torch.zeros(shape, dtype=torch.int64, device=self.device)
            self.observed_steps = torch.zeros((num_layers, max_sequences), dtype=torch.int32, device=self.device)
            self.status = new_status(self.device)
            self.calls = torch.zeros(1, dtype=torch.int32, device="cpu")
        self.errors = np.full((num_layers, len(Side), len(self.ladder)), np.nan)
        self._pairs: list[tuple[bytes, FormatPairs] | None] = [None] * num_layers
        self._queries: list[Queries | None] = [None] * num_layers
        self.importance = ImportanceEMA(num_layers, max_sequences, self.table.pages)
        self.shares = np.full(num_layers, 1.0 if budget is None else budget)
        self._rows: dict[tuple[int, ...], torch.Tensor] = {}
        self._captured_rows: dict[tuple[int, ...], torch.Tensor] = {}  # graphs hold their addresses
        self._is_in_graphs = self._is_open = False
        self._is_planned_ahead = False
        self._everything = list(range(max_sequences))
        self._last_step: tuple[tuple[bytes, bytes, list[int], Counts, bool], Step] | None = None
        self._last_counts: tuple[list[int], torch.Tensor] | None = None
        # Each page is of one sequence, and pinned ones are in 16 bits: so it is until sequences are selected or cut.
        self._is_plain = True
        # By layer: whether pages have come that no step has planned for.
        self._is_unplanned = [False] * num_layers
        # By layer: the last batch, and how many tokens it takes before a page comes or leaves the window.
        self._quiet: list[tuple[list[int], int] | None] = [None] * num_layers
        # By layer: sequences of whose next token it is known that it goes to a page of their own. Pages that come are,
        # and what has been copied stays so until a sequence becomes another, or adopts pages.
        self._owning: list[set[int]] = [set() for _ in range(num_layers)]
        # What pages that are still in use have been quantized to, by format; and the other way round.
        self._twins: dict[int, dict[int, int]] = {}
        self._twin_of: dict[int, tuple[int, int]] = {}
        # Incomplete pages that have been adopted, which others may hold still.
        self._adopted_open: set[int] = set()
        self.number = next(_numbers)
        _caches[self.number] = self
        if self.device.type == "cuda":
            semaphores.prepare(self.device)

    @property
    def entries(self) -> Ints:
        """i64 [layers, 2, max_sequences, pages] on the host: entries of pages, or -1."""
        return self.table.entries

    @property
    def page_table(self) -> torch.Tensor:
        """:attr:`entries` on the device. Its address changes when the table grows, which it does not once captured."""
        return self.table.device_entries

    @property
    def lengths(self) -> torch.Tensor:
        """i32 [layers, max_sequences] on the device: tokens. Its address stays."""
        return self.table.device_lengths

    def __repr__(self) -> str:
        lengths = self.table.lengths[0].tolist()
        shown = lengths if len(lengths) <= 8 else [*lengths[:8], "…"]
        stored, room = sum(lengths), PAGE_TOKENS * sum(ceil_div(length, PAGE_TOKENS) for length in lengths)
        whole = "" if stored == room else f"; pages are allocated whole: {room} tokens, of which {stored} are stored"
        return (
            f"KVCache({self.num_layers} layers, {self.num_kv_heads} heads of {self.head_dim}, {self.dtype} on "
            f"{self.device}; tokens {', '.join(map(str, shown))} of {self.max_tokens} each; {self.average_bits():.2f} "
            f"bits, pages {self.pools.bytes_in_use / 1e6:.2f} MB in {self.estimate_memory_mb():.2f} MB{whole})"
        )

    def __reduce_ex__(self, protocol: object) -> str:
        raise TypeError(
            "a KVCache cannot be copied or pickled: its pages are known by where they lie; KVCache.copy() makes one "
            "that holds the same"
        )

    def possible_formats(self, layer: int, side: Side) -> frozenset[PageFormat]:
        """What a layer's pages can come to have, so that one kernel serves all that the cache becomes."""
        return self._possible_formats[layer][side]

    def _checked_formats(self, formats: OpenFormats | None) -> npt.NDArray[np.uint8]:
        """[layers, 2]"""
        if formats is None:
            formats = self.full_format
        pairs: Any = [(formats, formats)] * self.num_layers if isinstance(formats, PageFormat) else formats
        wanted = f"a PageFormat for all, or a pair (of K, of V) for each of {self.num_layers} layers"
        if not isinstance(pairs, Sequence) or isinstance(pairs, str):
            raise CacheInputError(f"formats are {formats!r}; {wanted} is wanted")
        if len(pairs) != self.num_layers:
            raise CacheInputError(f"formats are a list of {len(pairs)}; {wanted} is wanted")
        for pair in pairs:
            is_pair = isinstance(pair, Sequence) and len(pair) == len(Side)
            if not is_pair or not all(isinstance(page_format, PageFormat) for page_format in pair):
                raise CacheInputError(f"formats have {pair!r} for a layer; {wanted} is wanted")
        for page_format in {page_format for pair in pairs for page_format in pair}:
            if not page_format.is_quantized and page_format != self.full_format:
                raise CacheInputError(f"pages of {self.dtype} cannot become {page_format.name}")
        return np.array(pairs, np.uint8)

    # Tokens ----------------------------------------------------------------------------------------------------------

    @contextmanager
    def writing(
        self,
        layer: int,
        k: torch.Tensor,
        v: torch.Tensor,
        sequences: Sequence[int] | None = None,
        *,
        queries: Queries | None = None,
        keep: bool = True,
        tokens: Sequence[int] | None = None,
        partial: bool = False,
    ) -> Iterator[KVView]:
        """New tokens behind a layer's last ones, to be attended to before any page is quantized for their sake.

        On exit pages that have left the recent window are quantized. Until then all of the new tokens take 16 bits:
        give long prompts in pieces. What is raised inside takes the tokens back.

        The pieces of a prompt are ``partial``, but for its last one: their pages are quantized when a token behind
        their cell of 2,048 comes, which is before that token is written, or at the next call that is not partial. So
        pages do not depend on the pieces, as long as none goes over the end of a cell (:meth:`cell_ends`).

        In a CUDA graph's capture only what is on the device changes; before each replay, :meth:`plan` is to be called.

        Args:
            k, v: [batch, num_kv_heads, tokens, head_dim], of the cache's dtype and device.
            sequences: which ones the batch is, each once; None is 0, 1, ….
            queries: that meet these keys, as long as :meth:`wants_queries`.
            keep: whether the tokens stay. Without, the cache holds afterwards what it did before.
            tokens: how many each row brings, where they differ: of row i the last ``tokens[i]`` of k and v, 0 or more.
                Inputs that are padded on the left have them so. None: all of each row.
            partial: whether more of the prompt follows, so that these tokens wait.

        Raises:
            CacheInputError: a wrong layer, sequence, shape, dtype, device or number of tokens; in a CUDA graph's
                capture, tokens that are not kept, since it cannot allocate pages, partial ones, or numbers of tokens
                that differ;
                :meth:`plan` was called without a replay of its graph; another ``writing`` has not ended.
            CacheFullError: a sequence would exceed ``max_tokens``, or pages ``max_bytes`` or the device's memory.

        >>> import torch
        >>> from kvpack import KVCache
        >>> cache = KVCache(1, 2, 16, 1024, device="cpu")
        >>> k, v = torch.randn(2, 1, 2, 10, 16).half()
        >>> with cache.writing(0, k, v) as view:
        ...     print(view.lengths.tolist(), cache.length(0, 0))
        [10] 0
        >>> cache.length(0, 0)
        10
        """
        self._require_closed()
        ids = self.checked_input(layer, k, v, sequences)
        counts = k.shape[2] if tokens is None else checked_counts(tokens, len(ids), k.shape[2])
        k, v = k.detach(), v.detach()
        if tokens is not None and isinstance(counts, int):
            k, v = (x[:, :, x.shape[2] - counts :] for x in (k, v))
        rows = self._row_index(ids) if ids else None
        self._require_replayed()
        if not ids or counts == 0:
            table, lengths = self._view_of(layer, rows)
            yield KVView(self, layer, tuple(ids), table[:, : len(ids)], lengths[: len(ids)])
            return
        self._is_open, errors = True, self.errors
        try:
            if self._is_captured():
                self.require_equal_in_graphs(counts)
                self.check_room(layer, ids, counts)
                if not keep:
                    raise CacheInputError(
                        "tokens that are not kept need pages, which a CUDA graph's capture cannot allocate"
                    )
                if partial:
                    raise CacheInputError("a CUDA graph's capture takes no part of a prompt: partial is for prefills")
                view = self._written(layer, ids, k, v, rows, counts)
                yield view
                self._set_lengths(layer, rows, view.lengths)
                return
            step, begun = None, None
            if partial or not self._is_quiet(layer, ids, counts):
                if keep:
                    self._settle_cells(layer, ids)
                self._own_pages([layer], ids, counts)
                step = self._step(layer, ids, counts, partial=partial)
                new, changes = self._coming(layer, step), _NO_CHANGES
                if keep and not partial:
                    changes = self._changes_for(layer, step, _Tokens(k, v, counts, ids, queries))
                begun = self._begin(new, changes)
            try:
                view = self._written(layer, ids, k, v, rows, counts)
                yield view
                if not keep:
                    self._clear(layer, k, rows, counts)
                elif queries is not None:
                    queries = queries + self._queries[layer]
                if begun is not None:
                    self._change(begun, keep_new=keep)
            except BaseException:
                try:
                    self._clear(layer, k, rows, counts)
                finally:
                    if begun is not None:
                        self._take_back(begun)
                raise
            if keep:
                self._advance(layer, ids, rows, counts, step, view)
                if queries is not None:
                    self._queries[layer] = queries
        except BaseException:
            self.errors = errors
            raise
        finally:
            self._is_open = False

    def require_equal_in_graphs(self, counts: Counts) -> None:
        """
        Raises:
            CacheInputError: a CUDA graph is being captured, and rows bring different numbers of tokens.
        """
        if not isinstance(counts, int) and self._is_captured():
            raise CacheInputError(
                f"tokens is {counts}: a CUDA graph repeats a call in which all rows bring as many tokens"
            )

    def _require_closed(self) -> None:
        """
        Raises:
            CacheInputError: a ``with cache.writing(…)`` has not ended.
        """
        if self._is_open:
            raise CacheInputError("the cache is being written to: end the `with cache.writing(…)` first")

    def _require_between_steps(self, what: str) -> None:
        """
        Raises:
            CacheInputError: a ``with cache.writing(…)`` has not ended; a CUDA graph is being captured.
        """
        self._require_closed()
        if self._is_captured():
            raise CacheInputError(f"{what} cannot be captured in a CUDA graph: the host's tables would not follow")

    def append(
        self,
        layer: int,
        k: torch.Tensor,
        v: torch.Tensor,
        sequences: Sequence[int] | None = None,
        queries: Queries | None = None,
        *,
        tokens: Sequence[int] | None = None,
        partial: bool = False,
    ) -> None:
        """:meth:`writing` with nothing inside."""
        with self.writing(layer, k, v, sequences, queries=queries, tokens=tokens, partial=partial):
            pass

    def cell_ends(self, layer: int, ids: Sequence[int], counts: Counts, columns: int) -> list[int]:
        """Where new tokens of a batch are to be cut so that none of a row's pieces goes over the end of a cell.

        Args:
            layer, ids: which sequences of which layer.
            counts: how many tokens each row brings, the last ones of its ``columns``.

        Returns:
            Columns, ascending; the last one is ``columns``. In a CUDA graph's capture, which is replayed with other
            lengths, it is the only one.
        """
        if columns <= 1 or self._is_captured():
            return [columns]
        before = self.table.lengths[layer, list(ids)].tolist()
        of_rows = [counts] * len(before) if isinstance(counts, int) else counts
        ends = {columns}
        for held, count in zip(before, of_rows, strict=True):
            first = CELL_TOKENS - held % CELL_TOKENS
            ends.update(range(columns - count + first, columns, CELL_TOKENS))
        return sorted(ends)

    def ends_cell(self, layer: int, ids: Sequence[int], counts: Counts) -> bool:
        """Whether so many more tokens of each bring one of these sequences to the end of a cell."""
        more = np.array(counts)
        return bool(((more > 0) & ((self.table.lengths[layer, list(ids)] + more) % CELL_TOKENS == 0)).any())

    def settle(self, sequences: Sequence[int] | None = None) -> None:
        """The prompts of these sequences have ended: what waits is quantized, as far as it has left the window.

        The next token that is appended does so by itself. None: all sequences.

        Raises:
            CacheInputError: no such sequence; a ``with cache.writing(…)`` has not ended; a CUDA graph's capture;
                :meth:`plan` was called without a replay of its graph.
            CacheFullError: narrower pages need more than ``max_bytes``, before wider ones can be freed. The layers
                before the one that failed are settled.
        """
        self._require_between_steps("settle()")
        ids = self._checked_sequences(0, range(self.max_sequences) if sequences is None else sequences)
        self._require_replayed()
        for layer in np.flatnonzero(self.table.waiting[:, ids].any(axis=1)).tolist():
            self._settle(layer, ids, 0)

    def _settle_cells(self, layer: int, ids: list[int]) -> None:
        """What waits in cells that have ended is quantized: tokens behind them come."""
        waiting = self.table.waiting[layer, ids]
        within = self.table.lengths[layer, ids] % CELL_TOKENS
        if (waiting > within).any():
            self._settle(layer, ids, np.minimum(waiting, within))

    def _settle(self, layer: int, ids: list[int], waits: npt.NDArray[np.int32] | int) -> None:
        """Of the last tokens of sequences no more than so many wait."""
        lengths, waiting = self.table.lengths[layer], self.table.waiting[layer]
        step = Step(lengths, ids, 0, self.window, self.max_tokens, self._full_bytes, waiting, waits)
        errors = self.errors
        try:
            self._change_all([], self._changes_for(layer, step, None))
        except BaseException:
            self.errors = errors
            raise
        waiting[ids] = waits

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor | None = None,
        v: torch.Tensor | None = None,
        sequences: Sequence[int] | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """Attention of new tokens to themselves and to what the cache holds of their sequences.

        Args:
            q: [batch, query heads, tokens, head_dim]; k, v: [batch, num_kv_heads, tokens, head_dim], or None: q alone.
            sequences: as of :meth:`writing`.
            options: ``tokens``, ``cached_tokens``, ``update_cache``, ``causal``, ``scale``, ``window``, ``sinks``,
                ``softcap``, ``sink_logits``, ``observe``, ``head_importance``, ``chunk_tokens``, ``partial``,
                ``pages``, ``progress``: as of :func:`kvpack.attention_with_kv_cache`.

        Returns:
            The result, like q.

        Raises:
            CacheInputError, CacheFullError: as of :func:`kvpack.attention_with_kv_cache`.
        """
        from kvpack.runtime.kv.attention import attend  # which stands on this module

        return attend(self, layer, q, k, v, sequences, **options)

    def _is_quiet(self, layer: int, ids: list[int], counts: Counts) -> bool:
        """Whether it is known that sequences have room for so many tokens and no page leaves the window: most steps."""
        known = self._quiet[layer]
        if known is None or known[0] != ids:
            return False
        return (counts if isinstance(counts, int) else max(counts)) <= known[1]

    def _step(self, layer: int, ids: list[int], counts: Counts, *, partial: bool = False) -> Step:
        """What so many more tokens of each do to a layer's pages; ``partial`` ones wait.

        Raises:
            CacheFullError: a sequence would exceed ``max_tokens``.
        """
        lengths, waiting = self.table.lengths[layer], self.table.waiting[layer]
        key = lengths.tobytes(), waiting.tobytes(), ids, counts, partial
        if self._last_step is None or self._last_step[0] != key:
            self.check_room(layer, ids, counts)
            waits = waiting[ids] + np.array(counts, np.int32) if partial else 0
            step = Step(lengths, ids, counts, self.window, self.max_tokens, self._full_bytes, waiting, waits)
            self._last_step = key, step
        return self._last_step[1]

    def _advance(
        self, layer: int, ids: list[int], rows: torch.Tensor | None, counts: Counts, step: Step | None, view: KVView
    ) -> None:
        """Tokens that are written stay."""
        self._set_lengths(layer, rows, view.lengths)
        lengths = self.table.lengths[layer]
        if rows is None:
            lengths += counts
        else:
            lengths[ids] += counts
        known = self._quiet[layer]
        if step is not None:
            self.table.waiting[layer] = step.lengths - step.settled
        if step is not None and (step.settled[ids] != step.lengths[ids]).any():
            self._quiet[layer] = None
            self._is_unplanned[layer] = True
        elif not self._is_plain and not isinstance(counts, int):
            self._quiet[layer] = None  # who brings no tokens may share the page that it writes to next
        elif step is not None:
            self._quiet[layer] = ids, step.quiet_tokens
        elif known is not None:
            self._quiet[layer] = ids, known[1] - most(counts)

    def wants_queries(self, layer: int) -> bool:
        """Whether it is not known yet what a layer's formats spoil, and shall be. Not in a CUDA graph's capture."""
        if self.budget is None or not 0 <= layer < self.num_layers or self._is_captured():
            return False
        return bool(np.isnan(self.errors[layer, Side.K]).any())

    def reserve_tokens(self, tokens: int) -> None:
        """Have page tables for so many tokens of each sequence, as is needed before CUDA graphs hold their addresses.

        Raises:
            CacheInputError: more than ``max_tokens``.
            CacheFullError: there is no memory for them, or a CUDA graph has been captured.
        """
        self._require_between_steps("reserve_tokens()")
        tokens = _integer("tokens", tokens)
        if not 0 <= tokens <= self.max_tokens:
            raise CacheInputError(f"{tokens} tokens cannot be reserved; max_tokens is {self.max_tokens}")
        self._grow_tables(ceil_div(tokens, PAGE_TOKENS))

    def keep_layers(self, count: int) -> None:
        """Have the first layers alone. The others hold no tokens, as those that turn out to lie on another device.

        Raises:
            CacheInputError: there are not so many layers, or others hold tokens; a ``with cache.writing(…)`` has not
                ended; a CUDA graph's capture.
        """
        self._require_between_steps("keep_layers()")
        count = _integer("count", count)
        if not 1 <= count <= self.num_layers:
            raise CacheInputError(f"{count} layers cannot be kept; there are {self.num_layers}")
        if self.table.lengths[count:].any():
            raise CacheInputError(f"{count} of {self.num_layers} layers cannot be kept alone: others hold tokens")
        self.num_layers = count
        self._open_formats, self._possible_formats = self._open_formats[:count], self._possible_formats[:count]
        self._used_bytes, self._used_pages = self._used_bytes[:count], self._used_pages[:count]
        self._is_unplanned = self._is_unplanned[:count]
        self._pairs, self._queries, self._quiet = self._pairs[:count], self._queries[:count], self._quiet[:count]
        self._owning = self._owning[:count]
        self.errors, self.shares = self.errors[:count], self.shares[:count]
        self.importance.keep_layers(count)
        self.summaries.keep_layers(count)
        if self.slots is not None:
            self.slots.keep_layers(count)
        with torch.inference_mode(False):
            self.table.keep_layers(count)
            self.mass, self.observed_steps = self.mass[:count], self.observed_steps[:count]

    def plan(self, tokens: int = 1, sequences: Sequence[int] | None = None) -> None:
        """Make room in every layer for tokens that a replayed CUDA graph appends next, once.

        The graph has been captured from calls of :meth:`writing` or :meth:`append` with as many tokens of these
        sequences, one a layer. The host counts the tokens from here on; the device does when the graph has run, which
        is to be enqueued before anything else that uses the cache: the first use outside of graphs waits for the device
        and sees whether it has. With a budget, what keys spoil is measured with the queries of calls that no graph has
        captured; without any, books-27m's mean square of scores stands in for theirs.

        Raises:
            CacheInputError: a wrong sequence; layers that have different numbers of tokens; more tokens than the recent
                window has, of which some would have to be quantized before they are written; a capture.
            CacheFullError: a sequence would exceed ``max_tokens`` or what its graph has room for
                (:meth:`reserve_tokens`), or pages ``max_bytes`` or the device's memory.
        """
        self._require_between_steps("plan()")
        ids = self._checked_sequences(0, range(self.max_sequences) if sequences is None else sequences)
        tokens = _integer("tokens", tokens)
        quantizes = self.budget is not None or (self._open_formats != self.full_format).any()
        if tokens < 1 or (quantizes and tokens > self.recent_tokens):
            raise CacheInputError(f"{tokens} tokens cannot be planned for; at most recent_tokens, {self.recent_tokens}")
        if (self.table.lengths[:, ids] != self.table.lengths[0, ids]).any():
            raise CacheInputError("plan() in the midst of a step: layers have different numbers of tokens")
        if not ids:
            return
        self._own_pages(range(self.num_layers), ids, tokens)
        left = quiet_tokens(self.table.lengths[0, ids], self.window, self.max_tokens)
        if tokens > left or self.table.waiting[:, ids].any():
            errors = self.errors
            try:
                steps = [self._step(layer, ids, tokens) for layer in range(self.num_layers)]
                new = [place for layer, step in enumerate(steps) for place in self._coming(layer, step)]
                changes = [self._changes_for(layer, step, None) for layer, step in enumerate(steps)]
                self._change_all(new, _joined(changes))
            except BaseException:
                self.errors = errors
                raise
        self.table.lengths[:, ids] += tokens
        self.table.waiting[:, ids] = 0
        self._is_planned_ahead, self._quiet = True, [None] * self.num_layers

    def _require_replayed(self) -> None:
        """After :meth:`plan`, once: the device has to have the tokens that the host counts.

        Raises:
            CacheInputError
        """
        if self._is_planned_ahead and not self._is_captured():
            self._compare_lengths()
            self._is_planned_ahead = False

    def _compare_lengths(self) -> None:
        """Waits for the device.

        Raises:
            CacheInputError: it has other tokens than the host counts.
        """
        ahead = self.table.lengths - self.table.device_lengths.cpu().numpy()
        if not ahead.any():
            return
        sequences = np.flatnonzero(ahead.any(axis=0)).tolist()
        most = int(ahead.max())
        what = (
            f"plan() made room for tokens that no graph has appended: sequences {sequences} are up to {most} tokens "
            "behind on the device"
            if most > 0
            else f"a graph was replayed without plan(): sequences {sequences} are up to {-int(ahead.min())} tokens "
            "ahead on the device"
        )
        raise CacheInputError(f"{what}; call plan() once before each replay, and free() them now")

    def _is_captured(self) -> bool:
        if self.device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
            return False
        self._is_in_graphs = True  # and tables stay where they are
        return True

    def _written(
        self, layer: int, ids: list[int], k: torch.Tensor, v: torch.Tensor, rows: torch.Tensor | None, counts: Counts
    ) -> KVView:
        """Tokens in pages that are there; the cache's lengths are not advanced."""
        table, positions = self._view_of(layer, rows)
        of_rows = None if isinstance(counts, int) else self._counts_on_device(counts)
        write_tokens(k, v, table, positions, self.status, self.pools.pages, of_rows, self.key_order)
        return KVView(self, layer, tuple(ids), table, positions + (k.shape[2] if of_rows is None else of_rows))

    def _clear(self, layer: int, k: torch.Tensor, rows: torch.Tensor | None, counts: Counts) -> None:
        """Zeros where tokens were that are not kept: what may be no number must not stay behind a sequence's end."""
        none = torch.zeros_like(k[:, :, : PAGE_TOKENS - 1])
        of_rows = None
        if not isinstance(counts, int):
            of_rows = self._counts_on_device([min(count, none.shape[2]) for count in counts])
        write_tokens(none, none, *self._view_of(layer, rows), self.status, self.pools.pages, of_rows, self.key_order)

    def _counts_on_device(self, counts: list[int]) -> torch.Tensor:
        """i32, without waiting; all layers of a step have the same."""
        if self._last_counts is None or self._last_counts[0] != counts:
            self._last_counts = list(counts), self._upload(np.array(counts, np.int32))
        return self._last_counts[1]

    def _set_lengths(self, layer: int, rows: torch.Tensor | None, lengths: torch.Tensor) -> None:
        """On the device."""
        if rows is None:
            self.table.layer_lengths[layer].copy_(lengths)
        else:
            self.table.layer_lengths[layer].index_copy_(0, rows, lengths)

    def _view_of(self, layer: int, rows: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Page table [2, batch, pages] and lengths [batch]."""
        table, lengths = self.table.layer_entries[layer], self.table.layer_lengths[layer]
        return (table, lengths) if rows is None else (table[:, rows], lengths[rows])

    def check_room(self, layer: int, sequences: Sequence[int], tokens: Counts) -> None:
        """
        Raises:
            CacheFullError: a sequence would exceed ``max_tokens`` with so many more.
        """
        before = self.table.lengths[layer, list(sequences)]
        after = before + (tokens if isinstance(tokens, int) else np.array(tokens, np.int64))
        if len(after) and int(after.max()) > self.max_tokens:
            row = int(after.argmax())
            more = tokens if isinstance(tokens, int) else tokens[row]
            raise CacheFullError(
                f"layer {layer}, sequence {sequences[row]}: {more} tokens behind {before[row]} are more than "
                f"the {self.max_tokens} of max_tokens; free() the sequence, or make a larger cache"
            )

    def _coming(self, layer: int, step: Step) -> list[Place]:
        """Where pages come; there is room for them in the tables.

        Raises:
            CacheFullError: tables exceed the memory.
        """
        self._grow_tables(step.pages)
        return [(layer, side, *page) for page in step.coming for side in (0, 1)]

    def _grow_tables(self, pages: int) -> None:
        """
        Raises:
            CacheFullError
        """
        if pages <= self.table.pages:
            return
        if self._is_in_graphs:
            raise CacheFullError(
                f"CUDA graphs hold page tables of {self.table.pages * PAGE_TOKENS} tokens a sequence, and "
                f"{pages * PAGE_TOKENS} are needed: call reserve_tokens() before the first capture"
            )
        grown = self.table.grown_pages(pages)
        mass, importance = widened(self.mass, grown, 0), self.importance.grown(grown)
        self.table.grow(grown)
        self.mass, self.importance = mass, importance

    def read(self, layer: int, sequence: int, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values that a sequence has in a layer, dequantized: [num_kv_heads, tokens, head_dim] each.

        Args:
            dtype: fp16, bf16 or fp32, to which values are rounded once; None is the cache's.

        Raises:
            CacheInputError: a wrong layer or sequence.
        """
        (sequence,) = self._checked_sequences(layer, [sequence])
        self._require_replayed()
        ends = self.lengths[layer, sequence : sequence + 1]
        starts, count = torch.zeros_like(ends), int(self.table.lengths[layer, sequence])
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
                self.key_order,
            )[0]
            for side in Side
        )
        return k, v

    def free(self, sequence: int) -> None:
        """Forget all tokens of a sequence. The others then hold the budget of what is left.

        Raises:
            CacheInputError: a wrong sequence; a CUDA graph's capture.
        """
        self._require_between_steps("free()")
        (sequence,) = self._checked_sequences(0, [sequence])
        self._cut(sequence, 0)
        self.observed_steps[:, sequence] = 0
        self._is_plain = self._is_plain or not self._is_mixed()
        self._hold_budget()

    def _cut(self, sequence: int, tokens: int) -> None:
        """A sequence has no pages behind its first tokens, and those that nobody else holds are free."""
        first = ceil_div(tokens, PAGE_TOKENS)
        cut = self.entries[:, :, sequence, first:].copy()
        if not self._is_plain:
            cut[held_by_others(self.entries[..., first:], sequence)] = NO_PAGE
        self.table.cut_sequence(sequence, tokens)
        for layer, entries in enumerate(cut.reshape(self.num_layers, -1)):
            for entry in entries[entries != NO_PAGE].tolist():
                self._let_go(layer, entry)
        self._quiet = [None] * self.num_layers
        self._may_share([sequence])
        self.mass[:, sequence, first:] = 0
        self.importance.forget(sequence, first)
        self._forget_copies(sequence, tokens // PAGE_TOKENS)

    def _forget_copies(self, sequence: int, first: int = 0) -> None:
        """What is held of a sequence's pages, from one on, is of pages that may be others now."""
        self.summaries.forget(sequence, first)
        if self.slots is not None:
            self.slots.forget(sequence, first)

    def _has_come(self, layer: int, size_bytes: int) -> None:
        """The table has a page that it did not have."""
        self._used_bytes[layer] += size_bytes
        self._used_pages[layer] += 1

    def _let_go(self, layer: int, entry: int) -> bool:
        """The table has a page no longer. Whether it is free: others may hold it."""
        self._used_bytes[layer] -= self.pools.bytes_of(entry)
        self._used_pages[layer] -= 1
        if not self.pools.free(entry):
            return False
        self._forget_page(entry)
        return True

    def _release(self, entry: int) -> int:
        """Someone other than the table holds a page no longer; returns the bytes that have come free."""
        if freed := self.pools.release(entry):
            self._forget_page(entry)
        return freed

    def _forget_page(self, entry: int) -> None:
        """Of a page that is free: its entry can come to name another, or none."""
        self._forget_twins(entry)
        self._adopted_open.discard(entry)

    def _hold_budget(self) -> None:
        """When pages have gone. That must not fail for want of memory; who appends next will be told."""
        with suppress(CacheFullError):
            for layer in range(self.num_layers):
                if self.budget is not None and self._is_over(layer):
                    self._change_all([], self._planned(layer, self.table.lengths[layer], self.table.settled[layer]))

    def _is_mixed(self) -> bool:
        """Whether pages are shared, or pinned ones are quantized."""
        lengths = self.table.lengths
        places = self.table.all_places(range(self.num_layers), lengths.max(axis=0))
        entries = self.entries[places.where]
        ends = self.window.open_ends(self.table.settled)[places.layer, places.sequence]
        is_pinned = (places.index >= ends) | (places.index < self.window.sink_pages)
        return is_any_shared(self.entries) or bool((is_pinned & is_quantized(entries, self.full_format)).any())

    def truncate(self, sequence: int, tokens: int, *, takes_back: bool = False) -> None:
        """Keep the first tokens of a sequence in all layers, and forget those behind them.

        A page that is cut becomes one of 16 bits, whatever it was: its kept tokens have the values that they had, those
        of :meth:`read`. Pages in front of it stay as they are; those that are quantized gain no bits, though they may
        be among the newest now. The attention that has been observed of forgotten pages is forgotten.

        Args:
            tokens: how many are kept, at most as many as there are; with 0 it is :meth:`free`.
            takes_back: whether this takes back a step that has failed half-way, so that layers may have different
                numbers of tokens: at most the fewest of them are kept.

        Raises:
            CacheInputError: a wrong sequence; more tokens than it has; layers have different numbers of its tokens, in
                the midst of a step; a CUDA graph's capture; :meth:`plan` was called without a replay of its graph.
            CacheFullError: a cut page of 16 bits needs more than ``max_bytes``. The cache is as it was.

        >>> import torch
        >>> from kvpack import KVCache
        >>> cache = KVCache(1, 2, 16, 1024, device="cpu")
        >>> cache.append(0, *torch.randn(2, 1, 2, 300, 16).half())
        >>> cache.truncate(0, 100)
        >>> cache.length(0, 0)
        100
        """
        self._require_between_steps("truncate()")
        (sequence,) = self._checked_sequences(0, [sequence])
        tokens, held = _integer("tokens", tokens), self.table.lengths[:, sequence]
        if not takes_back and (held != held[0]).any():
            raise CacheInputError(
                f"truncate() in the midst of a step: sequence {sequence} has different numbers of tokens in the layers"
            )
        if not 0 <= tokens <= held.min():
            raise CacheInputError(f"sequence {sequence} has {held.min()} tokens; {tokens} of them cannot be kept")
        self._require_replayed()
        if tokens == held.max():
            return
        if tokens == 0:
            self.free(sequence)
            return
        if tokens % PAGE_TOKENS:
            self._rewrite_last_page(sequence, tokens)
        self._cut(sequence, tokens)
        newest = self.entries[:, :, sequence, int(self.window.open_ends(self.table.settled[:, sequence]).min()) :]
        self._is_plain = self._is_plain and not is_quantized(newest, self.full_format).any()
        self._hold_budget()

    def _rewrite_last_page(self, sequence: int, tokens: int) -> None:
        """The page that has the last of these tokens has nothing behind it and is the sequence's own, in 16 bits.

        Raises:
            CacheFullError: there is no memory for it. Nothing has changed.
        """
        index, kept = divmod(tokens, PAGE_TOKENS)
        entries = self.entries[:, :, sequence, index].copy()  # [layers, 2]
        is_shared = held_by_others(self.entries[..., index : index + 1], sequence)[..., 0]
        is_held = np.array([[self.pools.info(entry).held > 0 for entry in pair] for pair in entries.tolist()])
        is_new = is_shared | is_held | is_quantized(entries, self.full_format)
        new: list[Place] = [(layer, side, sequence, index) for layer, side in np.argwhere(is_new).tolist()]
        old = entries[is_new].tolist()
        for entry in entries[~is_new].tolist():
            self._forget_twins(entry)
        values = self._last_values(sequence, index, kept)
        self.pools.reserve(Counter((_SIDES[place[1]], self.full_format) for place in new))
        allocated: list[int] = []
        try:
            for layer, side, _, _ in new:
                allocated.append(self.pools.allocate(_SIDES[side], self.full_format, PageOwner(layer, index)))
            at = [self.table.flat(place) for place in new]
            entries[is_new] = allocated
            targets = self._upload(np.ascontiguousarray(entries.T).reshape(-1)).view(2, self.num_layers, 1)
            there, put = self._upload(np.array([at, allocated], np.int64)).unbind()
            starts = torch.zeros(self.num_layers, dtype=torch.int32, device=self.device)
            write_tokens(*values, targets, starts, self.status, self.pools.pages, key_order=self.key_order)
            self.table.set(at, allocated, there, put)
        except BaseException:
            self._free_again(allocated)
            raise
        for place, entry, shared in zip(new, old, is_shared[is_new].tolist(), strict=True):
            self._has_come(place[0], self._full_bytes)
            if not shared:
                self._let_go(place[0], entry)

    def _last_values(self, sequence: int, index: int, kept: int) -> tuple[torch.Tensor, torch.Tensor]:
        """[layers, num_kv_heads, kept, head_dim] of K and V: a page's first tokens in all layers."""
        table = self.page_table[:, :, sequence, index].t().contiguous()[..., None]
        starts = torch.zeros(self.num_layers, dtype=torch.int32, device=self.device)
        k, v = (
            read_tokens(
                table[side],
                side,
                starts,
                starts + kept,
                kept,
                self.head_dim,
                self.num_kv_heads,
                self.dtype,
                self.status,
                self.pools.pages,
                self.key_order,
            )
            for side in Side
        )
        return k, v

    def select_sequences(self, rows: Sequence[int]) -> None:
        """Sequence i becomes what sequence ``rows[i]`` was, in all layers; those behind the last of them become empty.

        So sequences are put in another order, repeated, and dropped, as a beam search does. Nothing is copied: who has
        become the same holds the same pages, and only when one of them writes to a page that is not full is it copied
        for it. Pages take bytes once, and count once in a budget, however many sequences hold them. A page that leaves
        the recent window of all who hold it is quantized once; one that stays in the window of some stays theirs in 16
        bits, and the others share a quantized one. What has been observed of attention goes with the sequences.

        Raises:
            CacheInputError: no such sequence, or more than ``max_sequences``; layers have different numbers of tokens,
                in the midst of a step; a CUDA graph's capture; :meth:`plan` was called without a replay of its graph.

        >>> import torch
        >>> from kvpack import KVCache
        >>> cache = KVCache(1, 2, 16, 1024, max_sequences=4, device="cpu")
        >>> cache.append(0, *torch.randn(2, 1, 2, 300, 16).half())
        >>> cache.select_sequences([0, 0, 0])
        >>> [cache.length(0, sequence) for sequence in range(4)]
        [300, 300, 300, 0]
        """
        self._require_between_steps("select_sequences()")
        sources = [_integer("a sequence", sequence) for sequence in rows]
        for sequence in set(sources):
            self._check_place(0, [sequence])
        if len(sources) > self.max_sequences:
            raise CacheInputError(f"{len(sources)} sequences are selected; the cache has {self.max_sequences}")
        lengths = self.table.lengths
        if (lengths != lengths[0]).any():
            raise CacheInputError("select_sequences() in the midst of a step: layers have different numbers of tokens")
        self._require_replayed()
        # Those that become empty, and those that stay empty, have nothing to take over.
        held = lengths[0] > 0
        emptied = [i for i in range(self.max_sequences) if held[i] and (i >= len(sources) or not held[sources[i]])]
        changed = [i for i, source in enumerate(sources) if source != i and held[source]]
        if not changed and not emptied:
            return
        kept = sorted({source for source in sources if held[source]})
        dropped = [i for i in np.flatnonzero(held).tolist() if i not in kept]
        pages = ceil_div(int(lengths.max()), PAGE_TOKENS)
        lost = pages_lost(self.entries[..., :pages], dropped, [] if self._is_plain else kept) if dropped else []
        if changed:
            self._become(changed, [sources[i] for i in changed])
        for sequence in emptied:
            self.table.cut_sequence(sequence, 0)
            self.mass[:, sequence] = 0
            self.observed_steps[:, sequence] = 0
            self.importance.forget(sequence)
            self._forget_copies(sequence)
        for layer, entry in lost:
            self._let_go(layer, entry)
        self._quiet = [None] * self.num_layers
        self._may_share(range(self.max_sequences))
        if len(kept) < sum(source in kept for source in sources):
            self._is_plain, self._is_unplanned = False, [True] * self.num_layers
        if any(entry & ENTRY_FORMAT_MASK != self.full_format for _, entry in lost):
            self._hold_budget()

    def fork(self, source: int, target: int | None = None) -> int:
        """An empty sequence becomes what another is, in all layers; the others stay what they are.

        Nothing is copied: both hold the same pages until one of them writes to one, as of :meth:`select_sequences`.

        Args:
            target: which one; None is the first empty one.

        Returns:
            The target.

        Raises:
            CacheInputError: no such sequence; the target has tokens, or is the source; layers have different numbers of
                the source's tokens, in the midst of a step; a CUDA graph's capture; :meth:`plan` was called without a
                replay of its graph.
            CacheFullError: no sequence is empty.

        >>> import torch
        >>> from kvpack import KVCache
        >>> cache = KVCache(1, 2, 16, 1024, max_sequences=4, device="cpu")
        >>> cache.append(0, *torch.randn(2, 1, 2, 300, 16).half())
        >>> cache.fork(0), cache.fork(0), cache.length(0, 2)
        (1, 2, 300)
        """
        self._require_between_steps("fork()")
        (source,) = self._checked_sequences(0, [source])
        held = (self.table.lengths.max(axis=0) > 0).tolist()
        if target is None:
            empty = [sequence for sequence, has in enumerate(held) if not has and sequence != source]
            if not empty:
                raise CacheFullError(
                    f"sequence {source} cannot be forked: all {self.max_sequences} sequences are in use; free() one, "
                    "or make a cache of more max_sequences"
                )
            target = empty[0]
        (target,) = self._checked_sequences(0, [target])
        if target == source or held[target]:
            what = "is the source itself" if target == source else "has tokens"
            raise CacheInputError(f"fork() to sequence {target}, which {what}: free() it, or name an empty one")
        self._require_whole_steps("fork()", source)
        self._require_replayed()
        if held[source]:
            self._become([target], [source])
            self._quiet = [None] * self.num_layers
            self._may_share([source, target])
            self._is_plain, self._is_unplanned = False, [True] * self.num_layers
        return target

    def _require_whole_steps(self, what: str, sequence: int) -> None:
        """
        Raises:
            CacheInputError: layers have different numbers of a sequence's tokens.
        """
        held = self.table.lengths[:, sequence]
        if (held != held[0]).any():
            raise CacheInputError(
                f"{what} in the midst of a step: sequence {sequence} has different numbers of tokens in the layers"
            )

    def _become(self, changed: list[int], taken: list[int]) -> None:
        """Each of the sequences that are ``changed`` has what the one beside it in ``taken`` had."""
        pages = ceil_div(int(self.table.lengths.max()), PAGE_TOKENS)
        there, chosen = self._upload(np.array([changed, taken], np.int64)).unbind()
        mass, steps = self.mass[..., :pages].index_select(1, chosen), self.observed_steps.index_select(1, chosen)
        self.table.select(changed, taken, there, chosen)
        self.mass[..., :pages].index_copy_(1, there, mass)
        self.observed_steps.index_copy_(1, there, steps)
        self.importance.select(changed, taken)
        for sequence in changed:
            self._forget_copies(sequence)

    def copy(self, sequences: Sequence[int] | None = None, *, device: torch.device | str | None = None) -> KVCache:
        """A cache of its own, with the same options, that holds the same: pages are copied byte by byte.

        Nothing is quantized anew, so that copies of copies are equal, which those by :meth:`read` and :meth:`append`
        are not. What has been observed of attention and measured of formats goes with them. Pages that sequences share
        are shared in the copy; pages that others hold alone are not copied.

        Args:
            sequences: sequence i of the copy is ``sequences[i]``, as of :meth:`select_sequences`. None: all of them.
            device: of the copy; None is the same.

        Raises:
            CacheInputError: no such sequence, or more than ``max_sequences``; a CUDA graph's capture; :meth:`plan` was
                called without a replay of its graph.
            CacheFullError: the device has no memory for it.

        >>> import torch
        >>> from kvpack import KVCache, PageFormat
        >>> cache = KVCache(1, 2, 16, 1024, device="cpu", formats=PageFormat.INT4)
        >>> cache.append(0, *torch.randn(2, 1, 2, 300, 16).half())
        >>> torch.equal(cache.copy().copy().read(0, 0)[0], cache.read(0, 0)[0])
        True
        """
        self._require_between_steps("copy()")
        rows = list(range(self.max_sequences)) if sequences is None else [_integer("a sequence", s) for s in sequences]
        for sequence in set(rows):
            self._check_place(0, [sequence])
        if len(rows) > self.max_sequences:
            raise CacheInputError(f"{len(rows)} sequences are copied; the cache has {self.max_sequences}")
        self._require_replayed()
        formats = None if self.budget is not None else [tuple(_FORMATS[f] for f in p) for p in self._open_formats]
        made = KVCache(
            self.num_layers,
            self.num_kv_heads,
            self.head_dim,
            self.max_tokens,
            max_sequences=self.max_sequences,
            device=self.device if device is None else device,
            formats=formats,
            **self._options,
        )
        made._take_copies(self, rows)
        return made

    def _take_copies(self, other: KVCache, rows: list[int]) -> None:
        """An empty cache holds what sequences of another one do.

        Raises:
            CacheFullError
        """
        count, table = len(rows), other.table
        self._grow_tables(table.pages)
        taken = table.entries[:, :, rows]
        present = taken != NO_PAGE
        held, member = np.unique(taken[present], return_inverse=True)
        infos = other.pools.infos(held)
        kinds = [
            (_SIDES[side], _FORMATS[f]) for side, f in zip(infos.side.tolist(), infos.format.tolist(), strict=True)
        ]
        owners = map(PageOwner, infos.layer.tolist(), infos.page.tolist())
        self.pools.reserve(Counter(kinds))
        made = np.array(
            [self.pools.allocate(*kind, owner) for kind, owner in zip(kinds, owners, strict=True)], np.int64
        )
        self._copy_blocks(other.read_pages(held), self.read_pages(made))
        entries = np.full(taken.shape, NO_PAGE)
        entries[present] = made[member]
        self.table.put_copies(rows, table, entries)
        self._used_bytes = np.bincount(infos.layer, infos.bytes, self.num_layers).astype(int).tolist()
        self._used_pages = np.bincount(infos.layer, minlength=self.num_layers).tolist()
        self.mass[:, :count, : table.pages] = other.mass[:, rows].to(self.device)
        self.observed_steps[:, :count] = other.observed_steps[:, rows].to(self.device)
        self.importance = other.importance.selected(rows).grown(self.table.pages)
        self.errors, self.shares = other.errors.copy(), other.shares.copy()
        self._queries = [None if q is None else Queries(q.squares.to(self.device), q.count) for q in other._queries]
        self._is_plain = not self._is_mixed()
        self._is_unplanned = [True] * self.num_layers

    def _copy_blocks(self, sources: list[torch.Tensor], targets: list[torch.Tensor]) -> None:
        """Pages of whatever kinds, from whichever device."""
        for first in range(0, len(sources), _COPIED_PAGES):
            these, those = sources[first : first + _COPIED_PAGES], targets[first : first + _COPIED_PAGES]
            if self.slots is not None:  # some of them lie in host memory
                for block, copied in zip(those, these, strict=True):
                    block.copy_(copied)
                continue
            if these[0].device != self.device:
                sizes = [block.numel() for block in these]
                flat = torch.cat([block.reshape(-1) for block in these]).to(self.device)
                these = [x.view_as(y) for x, y in zip(flat.split_with_sizes(sizes), those, strict=True)]
            torch._foreach_copy_(those, these)

    def save(self, path: str | os.PathLike[str], **options: Any) -> int:
        """Write a sequence to a file: :func:`kvpack.runtime.kv.snapshot.save_snapshot`, which has the options."""
        from kvpack.runtime.kv.snapshot import save_snapshot

        return save_snapshot(self, path, **options)

    @classmethod
    def load(cls, path: str | os.PathLike[str], **options: Any) -> KVCache:
        """A cache of what a file holds: :func:`kvpack.runtime.kv.snapshot.load_cache`, which has the options."""
        from kvpack.runtime.kv.snapshot import load_cache

        return load_cache(path, **options)

    # Pages that others hold ------------------------------------------------------------------------------------------

    def add_holder(self, holder: PageHolder) -> None:
        """From now on a holder is told of its pages' changes and asked for memory, for as long as it lives.

        Who does no more than :meth:`retain` pages need not be added. See :mod:`kvpack.runtime.kv.page_holders`.
        """
        self._holders[:] = [known for known in self._holders if known() is not None]
        self._holders.append(ref(holder))

    def page_entries(self, sequence: int, first: int, end: int) -> Ints:
        """i64 [layers, 2, end − first] on the host: entries of a sequence's full pages.

        They name pages for as long as these are in the table, or retained.

        Raises:
            CacheInputError: no such sequence, or not so many full pages in all layers.
        """
        (sequence,) = self._checked_sequences(0, [sequence])
        first, end = _integer("first", first, 0), _integer("end", end, 0)
        full = int(self.table.lengths[:, sequence].min()) // PAGE_TOKENS
        if not first <= end <= full:
            raise CacheInputError(f"sequence {sequence} has {full} full pages; {first} to {end} are asked for")
        return self.entries[:, :, sequence, first:end].copy()

    def retain(self, entries: Ints) -> None:
        """Hold pages, one reference of each more: they stay as they are until they are released, whoever else has them.

        Args:
            entries: of full pages, of any shape, as :meth:`page_entries` gives them; of none, nothing is done.

        Raises:
            PageEntryError: one is of no page in use, or of one that is not full. Nothing has changed.
        """
        found, lengths = _flat(entries), self.table.lengths
        layers, sequences = np.nonzero(lengths % PAGE_TOKENS)
        indices = lengths[layers, sequences] // PAGE_TOKENS
        is_retained = np.isin(self.entries[layers, :, sequences, indices], found)
        if is_retained.any():
            at = int(np.argwhere(is_retained)[0, 0])
            raise PageEntryError(
                f"page {indices[at]} of sequence {sequences[at]} is not full: it is written to, and cannot be retained"
            )
        self.pools.hold(found)

    def release(self, entries: Ints) -> int:
        """Hold pages no longer, one reference of each less.

        Returns:
            The bytes of pages that nobody holds any more.

        Raises:
            PageEntryError: one is of no page in use, or not retained so often. Nothing has changed.
        """
        found = _flat(entries)
        pages, counts = np.unique(found, return_counts=True)
        infos = self.pools.infos(pages)
        if len(few := np.flatnonzero(infos.held < counts)):
            raise PageEntryError(
                f"{pages[few[0]]:#x} is released {counts[few[0]]} times; it is retained {infos.held[few[0]]} times"
            )
        stays = infos.references > counts
        self.pools.drop_holds(pages[stays], counts[stays])
        return sum(self._release(entry) for entry in found[np.isin(found, pages[~stays])].tolist())

    def new_pages(self, formats: npt.NDArray[np.uint8], *, first_page: int = 0) -> Ints:
        """Pages to be filled by the caller (:meth:`read_pages`), who holds them as by :meth:`retain`.

        Args:
            formats: u8 [layers, 2, n], numbers of :class:`PageFormat`.
            first_page: which page of a sequence the first of each layer and side will be.

        Returns:
            i64 [layers, 2, n], their entries. What they hold is undefined.

        Raises:
            CacheInputError: another shape, formats that the cache's pages cannot have, or pages beyond ``max_tokens``.
            CacheFullError: pages exceed ``max_bytes`` or the device's memory. Nothing has changed.
        """
        self._require_between_steps("new_pages()")
        first_page, shape = _integer("first_page", first_page, 0), np.shape(formats)
        if len(shape) != 3 or shape[:2] != (self.num_layers, len(Side)):
            raise CacheInputError(f"formats have shape {list(shape)}; [{self.num_layers}, 2, pages] is wanted")
        if first_page + shape[2] > self.table.max_pages:
            raise CacheInputError(
                f"pages {first_page} to {first_page + shape[2]} are asked for; max_tokens is {self.max_tokens}"
            )
        formats = np.asarray(formats)
        for layer, side in np.ndindex(shape[:2]):
            possible = self._possible_formats[layer][side]
            if others := set(np.unique(formats[layer, side]).tolist()) - possible:
                raise CacheInputError(
                    f"layer {layer}, {_SIDES[side].name}: pages of format {min(others)} cannot be in this cache, which "
                    f"has {', '.join(f.name for f in sorted(possible))} there"
                )
        kinds = [(side, _FORMATS[number]) for side in _SIDES for number in np.unique(formats[:, side]).tolist()]
        places = {kind: np.nonzero(formats[:, kind[0]] == kind[1]) for kind in kinds}
        self.pools.reserve({kind: len(layers) for kind, (layers, _) in places.items()})
        entries = np.empty(shape, np.int64)
        for (side, page_format), (layers, pages) in places.items():
            entries[layers, side, pages] = self.pools.allocate_held(side, page_format, layers, first_page + pages)
        return entries

    def read_pages(self, entries: Ints | Sequence[int]) -> list[torch.Tensor]:
        """u8 [num_kv_heads, block bytes] of each page, flattened: views, to be written to by who has made the page.

        With ``device_pages`` it waits for the device, whose kernels use pages in host memory.

        Raises:
            PageEntryError: one is of no page in use.
        """
        if self.slots is not None and self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        return [self.pools.blocks(entry) for entry in _flat(entries).tolist()]

    def adopt(
        self,
        sequence: int,
        entries: Ints,
        tokens: int,
        importance: PageImportance | None = None,
        *,
        first_page: int = 0,
    ) -> None:
        """An empty sequence gets pages that the caller holds, who keeps his references.

        A last page that is not full will be written to, and copied before if it is still held by someone: release it
        first. Behind its tokens it has to be zero.

        Args:
            entries: i64 [layers, 2, ceil(tokens / 64)], of :meth:`page_entries` or :meth:`new_pages`.
            tokens: of these pages.
            importance: what is known of the attention that the pages receive, as of :meth:`importance_of`.
            first_page: which page of the sequence the first of these is: it is not empty then, but has just the full
                pages before that.

        Raises:
            CacheInputError: no such sequence, or one that has other tokens; another shape; more than ``max_tokens``; a
                CUDA graph's capture; :meth:`plan` was called without a replay of its graph.
            PageEntryError: an entry is of no page in use, or of one of another layer, side or place in its sequence; a
                last page that is not full is quantized, or some other sequence's. Nothing has changed.
            CacheFullError: tables exceed the memory. Nothing has changed.
        """
        self._require_between_steps("adopt()")
        (sequence,) = self._checked_sequences(0, [sequence])
        tokens, first_page = _integer("tokens", tokens, 0), _integer("first_page", first_page, 0)
        before = first_page * PAGE_TOKENS
        if (self.table.lengths[:, sequence] != before).any():
            wanted = f"it must have the {before} before them" if before else "free() it before it gets others"
            raise CacheInputError(f"sequence {sequence} has tokens: {wanted}")
        if before + tokens > self.max_tokens:
            raise CacheInputError(f"{before + tokens} tokens are adopted; max_tokens is {self.max_tokens}")
        pages = ceil_div(tokens, PAGE_TOKENS)
        shape = (self.num_layers, len(Side), pages)
        entries = np.asarray(entries)
        if entries.shape != shape or not np.issubdtype(entries.dtype, np.integer):
            raise CacheInputError(
                f"entries are {entries.dtype} {list(entries.shape)}; {tokens} tokens have i64 {list(shape)}"
            )
        if importance is not None and {importance.average.shape, importance.weight.shape} != {(shape[0], pages)}:
            raise CacheInputError(
                f"importance has shapes {importance.average.shape} and {importance.weight.shape}; {(shape[0], pages)} "
                "is wanted"
            )
        self._require_replayed()
        self.settle([sequence])
        found = _flat(entries)
        infos = self.pools.infos(found)
        layers, sides, indices = (of.reshape(-1) for of in np.indices(shape))
        indices += first_page
        wrong = (infos.layer != layers) | (infos.side != sides) | (infos.page != indices)
        if len(at := np.flatnonzero(wrong)):
            info = self.pools.info(int(found[at[0]]))
            raise PageEntryError(
                f"{found[at[0]]:#x} is page {info.owner.page} of layer {info.owner.layer}, {info.side.name}; it cannot "
                f"be page {indices[at[0]]} of layer {layers[at[0]]}, {_SIDES[sides[at[0]]].name}"
            )
        is_open = (indices + 1) * PAGE_TOKENS > before + tokens
        is_others = infos.is_in_table | (infos.held > 1) | (infos.format != self.full_format)
        if len(at := np.flatnonzero(is_open & is_others)):
            raise PageEntryError(
                f"{found[at[0]]:#x}, a {_FORMATS[infos.format[at[0]]].name} page, is the last one of {tokens} tokens: "
                "it will be written to, so it must be in 16 bits and the caller's alone"
            )
        if not tokens:
            return
        self._grow_tables(first_page + pages)
        uploaded = self._upload(entries.astype(np.int64))
        is_new = self.pools.enter(found)
        for layer, size_bytes in zip(infos.layer[is_new].tolist(), infos.bytes[is_new].tolist(), strict=True):
            self._has_come(layer, size_bytes)
        self.table.put_pages(sequence, entries, uploaded, first_page, before + tokens)
        self.mass[:, sequence, first_page:] = 0
        if not first_page:
            self.observed_steps[:, sequence] = 0
        self.importance.forget(sequence, first_page)
        self._forget_copies(sequence, first_page)
        if importance is not None:
            self.importance.put(sequence, importance, first_page)
        if tokens % PAGE_TOKENS:
            self._adopted_open.update(entries[:, :, -1].reshape(-1).tolist())
        self._quiet, self._is_unplanned = [None] * self.num_layers, [True] * self.num_layers
        self._may_share([sequence])
        is_pinned = indices >= int(self.window.open_ends(self.table.lengths[0])[sequence])
        is_pinned |= indices < self.window.sink_pages
        is_mixed = is_quantized(found[is_pinned], self.full_format).any()
        self._is_plain = self._is_plain and bool(is_new.all()) and not is_mixed

    def importance_of(self, sequence: int) -> PageImportance:
        """What is known of the attention that a sequence's pages receive: fp32 [layers, pages], for :meth:`adopt`.

        What has been observed since :meth:`reallocate` is taken in before, of all sequences; waits for the device.

        Raises:
            CacheInputError: no such sequence; layers have different numbers of tokens, in the midst of a step; a CUDA
                graph's capture; :meth:`plan` was called without a replay of its graph.
        """
        self._require_between_steps("importance_of()")
        (sequence,) = self._checked_sequences(0, [sequence])
        self._require_replayed()
        lengths = self.table.lengths
        if (lengths != lengths[0]).any():
            raise CacheInputError("importance_of() in the midst of a step: layers have different numbers of tokens")
        self._take_in_observed(lengths[0])
        return self.importance.of(sequence, ceil_div(int(lengths[0, sequence]), PAGE_TOKENS))

    @property
    def held_bytes(self) -> int:
        """Of pages that no sequence has and others hold. A budget does not count them; ``max_bytes`` does."""
        return self.pools.bytes_in_use - sum(self._used_bytes)

    def _follow(self, changes: list[tuple[int, int]]) -> None:
        """Pages that no sequence has any more, and those that they have instead: who follows holds these."""
        for known in self._holders:
            if (holder := known()) is None:
                continue
            moved = {}
            for source, target in changes:
                if self.pools.is_held(source) and holder.follows(source):
                    self.pools.hold(np.array([target]))
                    self._release(source)
                    moved[source] = target
            if moved:
                holder.replaced(moved)

    def _may_share(self, sequences: Iterable[int]) -> None:
        """Pages of these have changed, so it is not known any more whose the next token is written to."""
        for owning in self._owning:
            owning.difference_update(sequences)

    def _own_pages(self, layers: Sequence[int], ids: list[int], counts: Counts) -> None:
        """Sequences that get tokens share no page that these are written to: it is copied for them.

        Raises:
            CacheFullError: there is no memory for it. Nothing has changed.
        """
        if self._adopted_open:
            self._adopted_open = {entry for entry in self._adopted_open if self.pools.is_held(entry)}
        if self._is_plain and not self._adopted_open:
            return
        if isinstance(counts, int):
            writing = ids if counts else []
        else:
            writing = [sequence for sequence, count in zip(ids, counts, strict=True) if count]
        if all(self._owning[layer].issuperset(writing) for layer in layers):
            return
        places: list[Place] = []
        for layer in layers:
            unsure = [sequence for sequence in writing if sequence not in self._owning[layer]]
            lengths = self.table.lengths[layer, unsure].tolist()
            writers = [
                (sequence, length // PAGE_TOKENS)
                for sequence, length in zip(unsure, lengths, strict=True)
                if length % PAGE_TOKENS
            ]
            places += [(layer, *place) for place in places_to_copy(self.entries[layer], writers, self._adopted_open)]
        if places:
            self._copy_shared(places)
        for layer in layers:
            self._owning[layer].update(writing)

    def _copy_shared(self, places: list[Place]) -> None:
        """Pages at these places are copied for those who have them there.

        Raises:
            CacheFullError: there is no memory for it. Nothing has changed.
        """
        self.pools.reserve(Counter((_SIDES[side], self.full_format) for _, side, _, _ in places))
        allocated: list[int] = []
        try:
            for layer, side, _, index in places:
                allocated.append(self.pools.allocate(_SIDES[side], self.full_format, PageOwner(layer, index)))
            at = [self.table.flat(place) for place in places]
            there, put = self._upload(np.array([at, allocated], np.int64)).unbind()
            shared = [self.table.entry(place) for place in at]
            torch._foreach_copy_(self.read_pages(allocated), self.read_pages(shared))
            self.table.set(at, allocated, there, put)
        except BaseException:
            self._free_again(allocated)
            raise
        for layer, *_ in places:
            self._has_come(layer, self._full_bytes)
            self._is_unplanned[layer] = True
        left = {entry: place for place, entry in zip(places, shared, strict=True) if entry in self._adopted_open}
        for entry, (layer, side, _, index) in left.items():
            if not (self.entries[layer, side, :, index] == entry).any():
                self._let_go(layer, entry)

    def _change_all(self, new: list[Place], changes: _Changes) -> None:
        """Pages come, and others get other formats: all or nothing."""
        if (begun := self._begin(new, changes)) is None:
            return
        try:
            self._change(begun)
        except BaseException:
            self._take_back(begun)
            raise

    def _begin(self, new: list[Place], changes: _Changes) -> _Begun | None:
        """New pages come, and pages of other formats are allocated; None if there are none of either.

        Behind it, :meth:`_change` or :meth:`_take_back` is to be called.
        """
        if not new and not changes.places:
            return None
        table, full = self.table, int(self.full_format)
        new_at = [table.flat(place) for place in new]
        wanted = [(_SIDES[place[1]], self.full_format) for place in new]
        # Pages of a kind lie side by side, so that one launch takes them.
        changing = []
        for number, (place, target) in enumerate(zip(changes.places, changes.formats, strict=True)):
            at = table.flat(place)
            entry = table.entry(at)
            source = full if entry == NO_PAGE else entry & ENTRY_FORMAT_MASK
            changing.append((place[1], source, target, number, place, at, entry))
        changing.sort()
        places, changed_at = [one[4] for one in changing], [one[5] for one in changing]
        pages = list(range(len(changing)))
        keys = [] if self._is_plain else [one[5] if one[6] == NO_PAGE else ~one[6] for one in changing]
        if len(set(keys)) < len(keys):  # once for all who hold one
            first_of = {key: number for number, key in reversed(list(enumerate(keys)))}
            changing = [one for number, one in enumerate(changing) if first_of[keys[number]] == number]
            number_of = {key: number for number, key in enumerate(sorted(first_of, key=first_of.__getitem__))}
            pages = [number_of[key] for key in keys]
        owners = [one[4] for one in changing]
        kinds = [one[:3] for one in changing]
        # Another sequence may have been quantized before, or a holder may keep the page as it was.
        known = [self._twins.get(one[6], {}).get(one[2]) for one in changing] if self._twins else [None] * len(changing)
        twins = {twin for twin in known if twin is not None}
        made = [number for number, twin in enumerate(known) if twin is None]
        wanted += [(_SIDES[kinds[number][0]], _FORMATS[kinds[number][2]]) for number in made]
        if twins:
            self.pools.hold(np.array(list(twins), np.int64))
        allocated: list[int] = []
        try:
            self.pools.reserve(Counter(wanted))
            for kind, place in zip(wanted, new + [owners[number] for number in made], strict=True):
                allocated.append(self.pools.allocate(*kind, PageOwner(place[0], place[3])))
            new_entries, coming = allocated[: len(new)], iter(allocated[len(new) :])
            targets = [next(coming) if twin is None else twin for twin in known]
            came = dict(zip(new_at, new_entries, strict=True))  # some leave the window as soon as they come
            sources = [came[one[5]] if one[6] == NO_PAGE else one[6] for one in changing]
            put = [targets[page] for page in pages]
            jobs = [entry for number in made for entry in (sources[number], targets[number])]
            # One copy, before anything has changed.
            uploaded = self._upload(np.array(new_at + changed_at + new_entries + put + jobs, np.int64))
            counts = [len(new), len(places), len(new), len(places), len(jobs)]
            new_there, there, new_to_put, put_there, all_jobs = uploaded.split_with_sizes(counts)
            table.set(new_at, new_entries, new_there, new_to_put)
        except BaseException:
            self._free_again(allocated)
            self._release_twins(twins)
            raise
        return _Begun(
            new,
            new_at,
            new_there,
            new_entries,
            places,
            changed_at,
            there,
            put,
            put_there,
            owners,
            sources,
            targets,
            kinds,
            twins,
            all_jobs,
        )

    def _change(self, begun: _Begun, *, keep_new: bool = True) -> None:
        """Pages get their other formats. What raises has changed nothing: :meth:`_take_back`.

        Without ``keep_new`` new pages go; nothing else may change then.
        """
        if begun.places:
            kinds = zip(begun.kinds, begun.targets, strict=True)
            self._quantize([kind for kind, target in kinds if target not in begun.twins], begun.jobs.view(-1, 2))
            self.table.set(begun.at, begun.put, begun.there, begun.put_there)
            self._is_plain = self._is_plain and not begun.twins
        if not keep_new:
            self.table.clear(begun.new_at, begun.new_there)
            for entry in begun.new_entries:
                self.pools.free(entry)
            return
        for layer, _, _, _ in begun.new:
            self._has_come(layer, self._full_bytes)
        changes = []
        for (layer, _, _, index), (side, _, target), source, put in zip(
            begun.owners, begun.kinds, begun.sources, begun.targets, strict=True
        ):
            if put not in begun.twins or self.pools.enter(np.array([put]))[0]:
                self._has_come(layer, self.pools.page_bytes(_SIDES[side], _FORMATS[target]))
            if self._is_plain or not (self.entries[layer, side, :, index] == source).any():
                if not self._let_go(layer, source):
                    changes.append((source, put))
                    self._set_twin(source, target, put)
            else:
                self._set_twin(source, target, put)
        if changes:
            self._follow(changes)
        self._release_twins(begun.twins)

    def _take_back(self, begun: _Begun) -> None:
        """What :meth:`_begin` has done."""
        try:
            self.table.clear(begun.new_at, begun.new_there)
        finally:
            self._free_again(begun.new_entries + [entry for entry in begun.targets if entry not in begun.twins])
            self._release_twins(begun.twins)

    def _set_twin(self, source: int, page_format: int, target: int) -> None:
        """A page that is in use yet has been quantized: who has it too need not do so again."""
        self._twins.setdefault(source, {})[page_format] = target
        self._twin_of[target] = source, page_format

    def _forget_twins(self, entry: int) -> None:
        """Of a page that is no more, or no longer what it was."""
        for target in self._twins.pop(entry, {}).values():
            del self._twin_of[target]
        if (of := self._twin_of.pop(entry, None)) is not None:
            source, page_format = of
            del self._twins[source][page_format]
            if not self._twins[source]:
                del self._twins[source]

    def _release_twins(self, twins: set[int]) -> None:
        for twin in twins:
            self._release(twin)

    def _free_again(self, allocated: list[int]) -> None:
        for entry in reversed(allocated):
            self.pools.free(entry)

    def _quantize(self, kinds: list[tuple[int, int, int]], jobs: torch.Tensor) -> None:
        """``kinds``: side, format, format to be; those of a kind lie side by side. ``jobs``: i64 [n, 2]."""
        first = 0
        for (side, source, target), count in Counter(kinds).items():
            quantize_pages(
                jobs[first : first + count],
                _SIDES[side],
                _FORMATS[source],
                _FORMATS[target],
                self.head_dim,
                self.num_kv_heads,
                self.status,
                self.pools.pages,
            )
            first += count

    def is_everything(self, sequences: Sequence[int]) -> bool:
        """Whether these are all sequences, in order."""
        return list(sequences) == self._everything

    def _row_index(self, sequences: list[int]) -> torch.Tensor | None:
        """On the device; None if they are all, in order."""
        if sequences == self._everything:
            return None
        key, captured = tuple(sequences), self._is_captured()
        found = self._rows.get(key)
        if found is None:
            found = self._captured_rows.get(key)
        if found is None:
            if captured:
                raise CacheInputError(f"sequences {sequences} are captured in a CUDA graph: use them once before")
            if len(self._rows) >= _REMEMBERED_ROWS:
                del self._rows[next(iter(self._rows))]  # the oldest
            found = self._rows[key] = self._upload(np.array(sequences, np.int64))
        if captured:
            self._captured_rows[key] = found
        return found

    def _upload(self, values: npt.NDArray[np.signedinteger[Any]]) -> torch.Tensor:
        """Without waiting: CUDA has taken what lies in pageable memory when it returns.

        Raises:
            CacheFullError: the device has no memory for it.
        """
        try:
            return torch.from_numpy(values).to(self.device, non_blocking=True)
        except torch.OutOfMemoryError as error:
            raise CacheFullError(f"{self.device} has no memory for {values.nbytes} bytes of places: {error}") from None

    def checked_input(self, layer: int, k: torch.Tensor, v: torch.Tensor, sequences: Sequence[int] | None) -> list[int]:
        """The sequences that a batch is.

        Raises:
            CacheInputError: a wrong layer, sequence, shape, dtype or device.
        """
        for name, tensor in (("k", k), ("v", v)):
            if not isinstance(tensor, torch.Tensor):
                raise CacheInputError(f"{name} is a {type(tensor).__name__}; a tensor is wanted")
        shape = k.shape
        if shape != v.shape or len(shape) != 4 or (shape[1], shape[3]) != (self.num_kv_heads, self.head_dim):
            wanted = f"[batch, {self.num_kv_heads}, tokens, {self.head_dim}]"
            raise CacheInputError(f"k has shape {list(shape)} and v {list(v.shape)}; this cache takes {wanted}")
        for name, tensor in (("k", k), ("v", v)):
            if tensor.dtype != self.dtype or tensor.device != self.device:
                raise CacheInputError(
                    f"{name} is {tensor.dtype} on {tensor.device}; this cache is {self.dtype} on {self.device} "
                    "(KVCache(dtype=…, device=…))"
                )
        if sequences is None and shape[0] == self.max_sequences:
            self._check_place(layer, [])
            return self._everything
        ids = self._checked_sequences(layer, range(shape[0]) if sequences is None else sequences)
        if len(ids) != shape[0]:
            raise CacheInputError(f"{len(ids)} sequences are named for a batch of {shape[0]}")
        return ids

    def _checked_sequences(self, layer: int, sequences: Sequence[int]) -> list[int]:
        """As plain numbers.

        Raises:
            CacheInputError: no such layer or sequence, no integer, or a sequence named twice.
        """
        try:
            ids = list(sequences) if isinstance(sequences, range) else [_integer("a sequence", s) for s in sequences]
        except TypeError:
            raise CacheInputError(f"sequences are {sequences!r}; a sequence of integers is wanted") from None
        self._check_place(layer, ids)
        return ids

    def _check_place(self, layer: int, sequences: list[int]) -> None:
        # To NumPy, True is no number but a mask.
        if isinstance(layer, bool) or not 0 <= _integer("layer", layer) < self.num_layers:
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
        ids = self._checked_sequences(layer, range(mass.shape[0]) if sequences is None else sequences)
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
        ids = self._checked_sequences(layer, range(len(mass)) if sequences is None else sequences)
        self._is_captured()  # a graph would hold the address of what is added to
        rows = self._row_index(ids)
        if rows is None:
            self.mass[layer, :, : mass.shape[1]] += mass
            self.observed_steps[layer] += steps
        else:
            self.mass[layer, :, : mass.shape[1]].index_add_(0, rows, mass)
            self.observed_steps[layer].index_add_(0, rows, steps)

    def reallocate(self) -> Outcome:
        """Divide the budget's bytes anew between pages and layers, by what has been observed; waits for the device.

        Pages that are about to leave the recent window compete with those that have left it: these lose bits where
        those are worth more. Call it between steps, every few dozen of them; in between, pages that leave the window
        take from what is left.

        Returns:
            Whether the budget is held; HELD without one.

        Raises:
            CacheInputError: layers have different numbers of tokens: a step is not complete; a CUDA graph's capture;
                :meth:`plan` was called without a replay of its graph.
            CacheFullError: narrower pages need more than ``max_bytes``, before wider ones can be freed.
        """
        self._require_between_steps("reallocate()")
        self._require_replayed()
        if (self.table.lengths != self.table.lengths[0]).any():
            raise CacheInputError("reallocate() in the midst of a step: layers have different numbers of tokens")
        lengths = self.table.lengths[0]
        self._take_in_observed(lengths)
        if self.budget is None:
            return Outcome.HELD
        errors, shares = self.errors, self.shares
        try:
            changes = self._competition(self.budget, lengths)
            if changes is None:
                self.shares = np.full(self.num_layers, self.budget)
                settled = self.table.settled
                changes = _joined([self._planned(layer, lengths, settled[layer]) for layer in range(self.num_layers)])
            self._change_all([], changes)
        except BaseException:
            self.errors, self.shares = errors, shares
            raise
        return changes.outcome

    def _competition(self, budget: float, lengths: npt.NDArray[np.int32]) -> _Changes | None:
        """One allocation for all layers, and shares to go with it; None where it cannot be held, or nothing is known.

        Pages of the recent window are counted as if each had its part of the budget, and may win more.
        """
        layers = range(self.num_layers)
        settled = self.table.settled
        places = self.table.all_places(layers, lengths)
        pinned = self.window.pinned(places, settled.min(axis=0))
        for layer in np.flatnonzero(np.isnan(self.errors).any(axis=(1, 2))).tolist():
            is_full = (places.layer == layer) & (places.index < lengths[places.sequence] // PAGE_TOKENS)
            self._measure(layer, places[is_full])
        if pinned.all() or np.isnan(self.errors).any():
            return None
        distinct = self._distinct(places, pinned)
        pages, pinned = places[distinct.first], distinct.pinned
        is_sink = pages.index < self.window.sink_pages
        recent = pinned & ~is_sink
        rooms = [self._room(layer, lengths, settled.min(axis=0)) for layer in ([0] if self._is_plain else layers)]
        may = self.num_layers * float(np.mean([of_layer.budget(budget) for of_layer in rooms]))
        total = may - int(recent.sum()) * self._full_bytes * (1 - budget)
        formats = self._formats(pages)
        allocation = self._allocated(layers, places, distinct, formats, is_sink, total)
        if allocation.outcome != Outcome.HELD:
            return None
        is_changing = ~pinned & (allocation.formats != formats)
        changing = np.flatnonzero(is_changing)
        changed, narrower = pages[changing], allocation.formats[changing]
        lost = self._bytes_of(changed.side, formats[changing]) - self._bytes_of(changed.side, narrower)
        used = np.array(self._used_bytes) - np.bincount(changed.layer, lost, self.num_layers)
        spare = may - used.sum()
        if spare < 0:
            return None
        # What is left is for those who leave the window next, as much as they have won.
        winning = np.flatnonzero(recent)
        won_bytes = self._bytes_of(pages.side[winning], allocation.formats[winning])
        won = np.bincount(pages.layer[winning], won_bytes, self.num_layers)
        parts = won / won.sum() if won.any() else np.full(self.num_layers, 1 / self.num_layers)
        budgets = used + spare * parts
        if self._is_plain:
            self.shares = rooms[0].shares(budgets)
        else:
            self.shares = np.array([of_layer.shares(may) for of_layer, may in zip(rooms, budgets, strict=True)])
        everywhere = np.flatnonzero(is_changing[distinct.member])
        return _Changes(places[everywhere].each(), allocation.formats[distinct.member[everywhere]].tolist())

    def _bytes_of(self, sides: Ints, formats: npt.NDArray[np.uint8]) -> Ints:
        """Bytes of pages, by side and format."""
        by_format = np.zeros((len(Side), max(PageFormat) + 1), np.int64)
        by_format[:, list(self.ladder)] = self._page_bytes
        return by_format[sides, formats]

    def _take_in_observed(self, lengths: npt.NDArray[np.int32]) -> None:
        counts = -(-lengths // PAGE_TOKENS)
        steps = self.observed_steps.cpu().numpy()
        mass = np.maximum(self.mass.cpu().numpy(), 0) * MASS_UNIT / np.maximum(steps, 1)[:, :, None]
        for layer in np.flatnonzero(steps.any(axis=1)).tolist():
            self.importance.update(layer, mass[layer], counts, steps=steps[layer])
        self.mass.zero_()
        self.observed_steps.zero_()

    def _changes_for(self, layer: int, step: Step, tokens: _Tokens | None) -> _Changes:
        """Pages of a layer that change in a step; pages to come are not in use yet."""
        places: list[Place] = [(layer, side, *page) for page in step.leaving for side in (0, 1)]
        if not self._is_plain:
            places = self._in_full(places)
        if self.budget is None:
            formats = self._open_formats[layer].tolist() * (len(places) // 2)
            return _Changes(*self._changed(places, formats))
        # A sequence's beginning, and pages that leave the window, are what the budget is sensitive to: the pages that
        # come until the next one leaves are counted beforehand.
        if not step.leaving and not step.begins and not self._is_unplanned[layer]:
            return _NO_CHANGES
        few = len(step.leaving) <= len(step.ids)
        changes = self._from_what_is_left(layer, step, places, tokens) if few else None
        return self._planned(layer, step.lengths, step.settled, tokens) if changes is None else changes

    def _in_full(self, places: list[Place]) -> list[Place]:
        """Of K and V pages side by side, those that are both in 16 bits: others have been in a longer sequence, which
        was cut, and have left the window before."""
        table, full = self.table, int(self.full_format)
        entries = [table.entry(table.flat(place)) for place in places]  # mostly two, for which arrays are too slow
        is_full = [entry == NO_PAGE or entry & ENTRY_FORMAT_MASK == full for entry in entries]
        return [place for at, place in enumerate(places) if is_full[at] and is_full[at ^ 1]]

    def _changed(self, places: list[Place], formats: list[int]) -> tuple[list[Place], list[int]]:
        """Without those that stay in 16 bits."""
        if self.full_format not in formats:
            return places, formats
        changed = [i for i, page_format in enumerate(formats) if page_format != self.full_format]
        return [places[i] for i in changed], [formats[i] for i in changed]

    def _from_what_is_left(
        self, layer: int, step: Step, places: list[Place], tokens: _Tokens | None
    ) -> _Changes | None:
        """Formats of pages that leave the window, without a look at the others; None where those must lose bits."""
        leaving = len(places) // len(Side)
        pairs = self._format_pairs(layer)
        if leaving and pairs is None:
            self._measure(layer, Places.of(places), tokens)
            pairs = self._format_pairs(layer)
        share = float(self.shares[layer])
        full_pair = len(Side) * self._full_bytes
        freed_bytes, pair_of = leaving * full_pair, list(range(leaving))
        if not self._is_plain:
            freed_bytes, pair_of = self._shared_pairs(places)
            leaving = max(pair_of, default=-1) + 1
        used = self._used_bytes[layer] + len(step.coming) * full_pair - freed_bytes
        left = (step.room if self._is_plain else self._room(layer, step.lengths, step.settled)).budget(share) - used
        if not leaving:
            is_held = left >= 0 or self._is_lowest(layer, step.lengths, step.settled, used)
            self._is_unplanned[layer] &= not is_held
            return _NO_CHANGES if is_held else None
        if pairs is None:
            return None
        found = formats_from_what_is_left(pairs, leaving, left, share * full_pair, step.sequences)
        self._is_unplanned[layer] &= found is None
        if found is None:
            if not self._is_lowest(layer, step.lengths, step.settled, used, places):
                return None
            found = [(self.ladder[0], self.ladder[0])] * leaving
        return _Changes(*self._changed(places, [page_format for pair in pair_of for page_format in found[pair]]))

    def _shared_pairs(self, places: list[Place]) -> tuple[int, list[int]]:
        """What pages of K and V side by side free when they change: the bytes of those that nobody else holds. And the
        number of each pair, counted without those that are the same pages."""
        entries = self.entries[Places.of(places).where].tolist()
        pairs = list(zip(entries[::2], entries[1::2], strict=True))
        # A page to come is a sequence's own.
        keys = [(*pair, -1 if pair[0] != NO_PAGE else at) for at, pair in enumerate(pairs)]
        numbers: dict[tuple[int, int, int], int] = {}
        pair_of = [numbers.setdefault(key, len(numbers)) for key in keys]
        going = Counter(entries)
        freed = 0
        for (layer, side, _, index), entry in zip(places, entries, strict=True):
            holders = int(np.count_nonzero(self.entries[layer, side, :, index] == entry))
            if entry == NO_PAGE or going.pop(entry, 0) == holders:
                freed += 1
        return freed * self._full_bytes, pair_of

    def _is_lowest(
        self,
        layer: int,
        lengths: npt.NDArray[np.int32],
        settled: npt.NDArray[np.int32],
        used: int,
        leaving: Sequence[Place] = (),
    ) -> bool:
        """Whether open pages, but for those that are ``leaving`` and not in ``used``, have no bits to lose."""
        if self._is_plain:
            pages = int((-(-lengths // PAGE_TOKENS)).sum())
            is_open = self.window.open_pages(settled)
            lowest = int(self._page_bytes[:, 0].sum())
            left = is_open - len(leaving) // len(Side)
            return used <= (pages - is_open) * len(Side) * self._full_bytes + left * lowest
        places = self.table.all_places(range(layer, layer + 1), lengths)
        stays = np.ones(self.entries.shape[1:], np.bool_)
        stays[Places.of(list(leaving)).where[1:]] = False
        places = places[np.flatnonzero(stays[places.where[1:]])]
        distinct = DistinctPages.of(self.entries[places.where], self.window.pinned(places, settled))
        pages_of = places[distinct.first]
        as_they_are = self._bytes_of(pages_of.side, self._formats(pages_of))
        return used <= int(np.where(distinct.pinned, as_they_are, self._page_bytes[pages_of.side, 0]).sum())

    def _room(self, layer: int, lengths: npt.NDArray[np.int32], settled: npt.NDArray[np.int32]) -> Room:
        """Of a layer whose sequences have, or will have, these numbers of tokens; pages that several hold are counted
        once. Looks at pinned pages alone."""
        found = room(lengths, settled, self.window, self.table.max_pages, self._full_bytes)
        if self._is_plain:
            return found
        again = len(Side) * int((-(-self.table.lengths[layer] // PAGE_TOKENS)).sum()) - self._used_pages[layer]
        sequences, indices = self.window.pinned_pages(lengths, settled)
        pinned_again = repeats(self.entries[layer][:, sequences, indices])
        return Room(found.all - again * self._full_bytes, found.pinned - pinned_again * self._full_bytes, found.coming)

    def _is_over(self, layer: int) -> bool:
        """Whether a layer's pages take more than its share, and have bits to lose."""
        lengths, settled, used = self.table.lengths[layer], self.table.settled[layer], self._used_bytes[layer]
        may = self._room(layer, lengths, settled).budget(float(self.shares[layer]))
        return used > may and not self._is_lowest(layer, lengths, settled, used)

    def _format_pairs(self, layer: int) -> FormatPairs | None:
        """Made anew when the layer's errors have changed, which others may set; None while some are not known."""
        errors = self.errors[layer]
        key = errors.tobytes()
        known = self._pairs[layer]
        if known is None or known[0] != key:
            if np.isnan(errors).any():
                return None
            is_uniform = self.policy == "uniform"
            known = key, FormatPairs(errors, self._page_bytes, self.ladder, is_uniform=is_uniform)
            self._pairs[layer] = known
        return known[1]

    def _planned(
        self,
        layer: int,
        lengths: npt.NDArray[np.int32],
        settled: npt.NDArray[np.int32],
        tokens: _Tokens | None = None,
    ) -> _Changes:
        """What changes in a layer that has these numbers of tokens, so that it holds its share: a look at all pages."""
        layers = range(layer, layer + 1)
        places = self.table.all_places(layers, lengths)
        pinned = self.window.pinned(places, settled)
        self._measure(layer, places[~pinned], tokens)
        distinct = self._distinct(places, pinned)
        pages = places[distinct.first]
        formats, may = self._formats(pages), self._room(layer, lengths, settled).budget(float(self.shares[layer]))
        allocation = self._allocated(layers, places, distinct, formats, distinct.pinned, may)
        changed = np.flatnonzero((allocation.formats != formats)[distinct.member])
        self._is_unplanned[layer] = False
        return _Changes(
            places[changed].each(), allocation.formats[distinct.member[changed]].tolist(), allocation.outcome
        )

    def _distinct(self, places: Places, pinned: npt.NDArray[np.bool_]) -> DistinctPages:
        """The pages of these places."""
        if self._is_plain:
            every = np.arange(len(places))
            return DistinctPages(every, every, pinned)
        return DistinctPages.of(self.entries[places.where], pinned)

    def _allocated(
        self,
        layers: range,
        places: Places,
        distinct: DistinctPages,
        formats: npt.NDArray[np.uint8],
        pinned: npt.NDArray[np.bool_],
        budget: float,
    ) -> Allocation:
        """Of the pages at all places of these layers, layer by layer; a page is as important as to all who hold it."""
        importance = np.empty(len(places))
        ends = np.searchsorted(places.layer, layers, side="right").tolist()
        for layer, start, end in zip(layers, [0, *ends], ends, strict=False):
            of_layer = self.importance.forecast(layer)
            importance[start:end] = of_layer[places.sequence[start:end], places.index[start:end]]
        if not self._is_plain:
            importance, places = distinct.sums(importance), places[distinct.first]
        pages = Pages(
            places.layer,
            places.sequence,
            places.index,
            places.side,
            formats,
            importance,
            pinned,
            self.errors,
        )
        return allocate_formats(pages, self._page_bytes, round(budget), ladder=self.ladder, policy=self.policy)

    def _measure(self, layer: int, pages: Places, tokens: _Tokens | None = None) -> None:
        """The errors of a layer's formats, on the first of these that is in 16 bits. Once, since the host must wait."""
        if not np.isnan(self.errors[layer]).any():
            return
        queries = self._queries[layer]
        if tokens is not None and tokens.queries is not None:
            queries = tokens.queries + queries
        for side in Side:
            if not np.isnan(self.errors[layer, side]).any():  # given from elsewhere
                continue
            found = np.flatnonzero((pages.side == side) & (self._formats(pages) == self.full_format))
            if not len(found):
                continue
            sequence, index = int(pages.sequence[found[0]]), int(pages.index[found[0]])
            x = self._page_values(layer, side, sequence, index, tokens)
            self.errors = self.errors.copy()  # what fails behind it puts the others back
            self.errors[layer, side, :-1] = format_errors(x, side, self.ladder[:-1], queries, self.key_order)
            self.errors[layer, side, -1] = 0

    def _page_values(
        self, layer: int, side: Side, sequence: int, index: int, tokens: _Tokens | None
    ) -> npt.NDArray[np.float32]:
        """[heads, 64, head_dim], of a page of 16 bits that is complete with ``tokens``."""
        entry, first = int(self.entries[layer, side, sequence, index]), index * PAGE_TOKENS
        values = np.zeros((self.num_kv_heads, PAGE_TOKENS, self.head_dim), np.float32)
        if entry != NO_PAGE:
            layout = PageLayout(side, self.full_format, self.head_dim, self.key_order)
            values[:] = dequantize_blocks(self.pools.blocks(entry).cpu().numpy(), layout)
        if tokens is not None and sequence in tokens.sequences:
            row = tokens.sequences.index(sequence)
            given, start = (tokens.k, tokens.v)[side][row], int(self.table.lengths[layer, sequence])
            if not isinstance(tokens.counts, int):
                given = given[:, given.shape[1] - tokens.counts[row] :]
            begin, end = max(first, start), min(first + PAGE_TOKENS, start + given.shape[1])
            if begin < end:
                values[:, begin - first : end - first] = given[:, begin - start : end - start].float().cpu().numpy()
        return values

    def _formats(self, places: Places) -> npt.NDArray[np.uint8]:
        """The formats of pages that are there, and of those to come."""
        entries = self.entries[places.where]
        return np.where(entries == NO_PAGE, self.full_format, entries & ENTRY_FORMAT_MASK).astype(np.uint8)

    # What there is ---------------------------------------------------------------------------------------------------

    def length(self, layer: int, sequence: int) -> int:
        """Tokens, as the host knows them.

        Raises:
            CacheInputError: a wrong layer or sequence.
        """
        (sequence,) = self._checked_sequences(layer, [sequence])
        return int(self.table.lengths[layer, sequence])

    def longest_pages(self, layer: int, tokens: int) -> int:
        """Of the longest sequence with so many more tokens; in a CUDA graph's capture, of the longest possible."""
        if self._is_captured():
            return self.table.pages
        return ceil_div(int(self.table.lengths[layer].max()) + tokens, PAGE_TOKENS)

    def layer(self, layer: int) -> BucketedCacheLayer:
        """A layer's pages by kind.

        Raises:
            CacheInputError: a wrong layer.
        """
        self._check_place(layer, [])
        return BucketedCacheLayer(self, layer)

    def precision_map(self, layer: int) -> npt.NDArray[np.int8]:
        """[2, max_sequences, pages of the table]: the number of each page's :class:`PageFormat`, or -1 of no page.

        The number is no width: ``PageFormat(number).element_bits`` is.

        Raises:
            CacheInputError: a wrong layer.
        """
        self._check_place(layer, [])
        entries = self.entries[layer]
        return np.where(entries == NO_PAGE, -1, entries & ENTRY_FORMAT_MASK).astype(np.int8)

    @property
    def elements(self) -> int:
        """How many numbers are held: those of K and V, of all layers and sequences."""
        return len(Side) * int(self.table.lengths.sum(dtype=np.int64)) * self.num_kv_heads * self.head_dim

    def average_bits(self) -> float:
        """Bits of pages in use per element of K and V held: scales, and what is empty of last pages, counted; 0.0 of
        an empty cache."""
        elements = self.elements
        return 8 * self.pools.bytes_in_use / elements if elements else 0.0

    def estimate_memory_mb(self) -> float:
        """Device memory in MB (10^6 bytes): the slabs that are allocated there, the tables, and summaries of pages."""
        tables = (self.page_table, self.lengths, self.mass, self.observed_steps, self.status)
        on_device = self.pools.bytes_allocated - self.pools.host_bytes + self.summaries.size_bytes
        return (on_device + sum(table.nbytes for table in tables)) / 1e6

    def check(self) -> None:
        """Wait for the device.

        Raises:
            PageEntryError: kernels met entries that are none: something has written to the page table.
            CacheInputError: :meth:`plan` was called without a replay of its graph, or the other way round.
        """
        self._compare_lengths()
        if (found := left_out(self.status)) is not None:
            self.status.zero_()
            raise PageEntryError(f"{found[0]} tokens or pages were left out, the first of them at {found[1]}")


_NO_CHANGES = _Changes([], [])


class _Reclaimer:
    """Asks a cache's holders for memory. It does not hold the cache, whose pools hold it."""

    def __init__(self, holders: list[ReferenceType[PageHolder]]) -> None:
        self._holders = holders

    def __call__(self, missing: Mapping[Kind, int], missing_bytes: int) -> bool:
        living = (holder for known in self._holders if (holder := known()) is not None)
        return any(holder.reclaim(missing, missing_bytes) for holder in living)


def _flat(entries: Ints | Sequence[int]) -> Ints:
    return np.asarray(entries, np.int64).reshape(-1)


def _integer(name: str, value: int, least: int | None = None) -> int:
    """
    Raises:
        CacheInputError: it is none, or less than the least.
    """
    try:
        number = int(operator.index(value))  # of True, too, which to NumPy is a mask
    except TypeError:
        raise CacheInputError(f"{name} is {value!r}; an integer is wanted") from None
    if least is not None and number < least:
        raise CacheInputError(f"{name} is {number}; it must be at least {least}")
    return number


def _checked_order(key_order: Sequence[int] | None) -> tuple[int, ...]:
    """
    Raises:
        CacheInputError: it is no sequence of integers.
    """
    if key_order is None:
        return ()
    if not isinstance(key_order, Sequence):
        raise CacheInputError(f"key_order is {key_order!r}; a sequence of groups of 16 dimensions is wanted")
    return tuple(_integer("a group of key_order", group) for group in key_order)


def _joined(changes: Sequence[_Changes]) -> _Changes:
    """The changes of several layers; the outcome is the first that is not HELD."""
    outcomes = [change.outcome for change in changes if change.outcome != Outcome.HELD]
    return _Changes(
        [place for change in changes for place in change.places],
        [page_format for change in changes for page_format in change.formats],
        outcomes[0] if outcomes else Outcome.HELD,
    )
