"""Prefixes whose pages stay when their sequences end: a tree of blocks, found by the hashes of their tokens.

A *block* is 64 tokens' pages in all layers, K and V. It hangs below the block of the 64 tokens before it, so prompts
that begin alike share what they have in common::

    root ── system prompt ── system prompt ─┬─ question A ── answer A ── question C
                                            └─ question B ── answer B

The store holds pages (:mod:`kvpack.runtime.kv.page_holders`), it never reads them. What it takes is counted in bytes
of all its blocks, and limited; leaves go first, in the order of an :mod:`~kvpack.runtime.kv.eviction` policy. Two
kinds of block never go, nor does any before them: those that are pinned, and those that a running sequence stands on.

**Exact ends.** A cache keeps the newest pages in 16 bits and quantizes them later, in place, once nobody needs them
so. A prefix that goes on to be held (:meth:`PrefixStore.cache_prefix` returns it, :meth:`PrefixStore.release_prefix`
gives it back) keeps its newest pages in 16 bits beside the quantized ones that later tokens see, so that who attaches
at its end finds what a fresh prefill would have left, bit for bit. At any other length the newest pages may be
quantized ones: right, but not the same bits (:attr:`Match.is_exact`).

One lock (:attr:`PrefixStore.lock`) guards the tree. Cache and store belong together: who uses the cache from several
threads must hold the lock while it does, since a cache that runs out of memory calls :meth:`PrefixStore.reclaim`.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from kvpack.errors import CacheFullError, CacheInputError
from kvpack.format.pages import PAGE_TOKENS
from kvpack.runtime.kv.allocator import PageImportance
from kvpack.runtime.kv.eviction import DEFAULT_POLICY, EvictionPolicy, policy_of
from kvpack.runtime.kv.manager_metrics import PrefixCounters
from kvpack.runtime.kv.page_holders import Kind
from kvpack.runtime.kv.prefix_hash import Tokens, chained, next_hash, token_pages

Ints = npt.NDArray[np.int64]
EvictionReason = Literal["capacity", "memory", "asked"]


class Pages(Protocol):
    """Where the pages lie: what the store asks of a cache. Entries are i64, one a page."""

    def page_entries(self, sequence: int, first: int, end: int) -> Ints:
        """[layers, 2, end − first] of a sequence's full pages."""

    def retain(self, entries: Ints) -> None:
        """One more holds each; all or nothing."""

    def release(self, entries: Ints) -> int:
        """One fewer holds each; the bytes that came free."""

    def adopt(self, sequence: int, entries: Ints, tokens: int, importance: PageImportance | None) -> None:
        """An empty sequence has these pages, [layers, 2, pages], too."""

    def importance_of(self, sequence: int) -> PageImportance | None:
        """What is known of the attention that a sequence's pages receive; None where nobody asks for it."""

    def page_bytes(self, entries: Ints) -> Ints:
        """Of each, in the shape of the entries."""

    def is_full(self, entries: Ints) -> npt.NDArray[np.bool_]:
        """Whether each is of 16 bits and may become less."""

    def is_only_held(self, entry: int) -> bool:
        """Whether the page comes free when its one holder releases it."""

    def kind(self, entry: int) -> Kind:
        """A page's side and format."""

    def kind_bytes(self, kind: Kind) -> int:
        """Of one page."""

    def slab(self, entry: int) -> tuple[int, int, int]:
        """The memory a page lies in: its name, how many pages it has, and its bytes."""


class LowerTier(Protocol):
    """Where blocks go that are evicted: slower memory, from which :meth:`PrefixStore.bring_back` has them again."""

    def take(self, blocks: Sequence[Block], reason: EvictionReason) -> None:
        """These blocks are evicted, leaves first, and their pages released when this returns: what shall be kept of
        them is to be copied by then, or retained, which nothing may be where memory is the reason. Called with the
        store's lock held. Must not raise."""

    def release_copied(self) -> Counter[Kind]:
        """Wait for what is retained to be copied, and release it. Returns how many pages of each kind have come free.
        Called with the store's lock held."""


class Block:
    """64 tokens of a prefix, in all layers.

    Attributes:
        hash, parent, depth: its name, the block before it, and how many blocks end with it; the root has depth 0.
        tokens: 64 i32, little-endian.
        entries: i64 [layers, 2], the pages that who attaches at this block gets.
        quantized: i64 [layers, 2] or None: those that who attaches further on gets, where they are others.
        size_bytes: of all its pages.
        children, pins, users: blocks behind it, prefixes that pin it, running sequences that stand on it. With none of
            the three it can be evicted.
        exact_ends: held prefixes in whose recent window it lies.
        priority, session, is_shared, turn: the highest that was given; the last session that used it; whether several
            sessions did; how many requests its conversation had when it came.
        importance: fp32 [layers] twice, or None: what is known of the attention to it, as of
            :class:`~kvpack.runtime.kv.allocator.PageImportance`.
        use_count, last_use, born_s, last_use_s: requests that went through it; their number, and seconds.
        score, kind: the eviction policy's own.
    """

    __slots__ = (
        "born_s",
        "children",
        "depth",
        "entries",
        "exact_ends",
        "hash",
        "importance",
        "is_shared",
        "kind",
        "last_use",
        "last_use_s",
        "newest_child",
        "parent",
        "pins",
        "priority",
        "quantized",
        "score",
        "session",
        "size_bytes",
        "tokens",
        "turn",
        "use_count",
        "users",
    )

    def __init__(self, block_hash: bytes, parent: Block | None, tokens: bytes, entries: Ints, size_bytes: int) -> None:
        self.hash, self.parent, self.tokens = block_hash, parent, tokens
        self.entries, self.size_bytes = entries, size_bytes
        self.quantized: Ints | None = None
        self.importance: tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]] | None = None
        self.depth: int = 0 if parent is None else parent.depth + 1
        self.children = self.pins = self.users = self.exact_ends = self.use_count = self.last_use = 0
        self.priority, self.turn = 0, 0
        self.newest_child: Block | None = None
        self.session: str | None = None
        self.is_shared = False
        self.born_s = self.last_use_s = self.score = 0.0
        self.kind = 0

    @property
    def can_go(self) -> bool:
        return not (self.children or self.pins or self.users) and self.parent is not None

    def pages(self) -> Ints:
        """All entries that it holds, i64 [n]."""
        own = self.entries.reshape(-1)
        if self.quantized is None:
            return own
        others = self.quantized.reshape(-1)
        return np.concatenate([own, others[others != own]])


# A block, a sequence's pages of it, i64 [layers, 2], and which of them are quantized where the block's are not.
_Quantized = tuple[Block, Ints, npt.NDArray[np.bool_]]


@dataclass(frozen=True)
class Match:
    """What the store has of a prompt.

    Attributes:
        blocks: the prompt's first ones, as far as there are any.
        is_exact: whether who attaches here has pages of 16 bits where a fresh prefill of as many tokens would leave
            them: in the recent window.
        missing: hashes of the prompt's full pages behind them.
        root: what the first page's hash stands on.
    """

    blocks: tuple[Block, ...]
    is_exact: bool
    missing: tuple[bytes, ...]
    root: bytes

    @property
    def pages(self) -> int:
        return len(self.blocks)

    @property
    def tokens(self) -> int:
        return len(self.blocks) * PAGE_TOKENS


@dataclass(eq=False)
class Prefix:
    """A prefix that is held: from :meth:`PrefixStore.cache_prefix` until :meth:`PrefixStore.release_prefix`.

    Attributes:
        block: its last one, or None of a prefix of no full page.
        is_pinned: it is not evicted.
        is_released: it is no longer held.
    """

    block: Block | None
    is_pinned: bool
    is_released: bool = False

    @property
    def tokens(self) -> int:
        """How many are cached."""
        return 0 if self.block is None else self.block.depth * PAGE_TOKENS


class PrefixStore:
    """Prefixes of one cache, model and tenant.

    Args:
        pages: the cache.
        root: :func:`~kvpack.runtime.kv.prefix_hash.root_hash` of all that pages depend on but tokens.
        capacity_bytes: of all blocks; None: no limit of its own. It is never exceeded.
        policy: one of :data:`~kvpack.runtime.kv.eviction.POLICIES`, or a policy.
        recent_tokens: of the cache, whose newest ones stay in 16 bits.
        window_s: the working set is what was used in so many seconds; what is evicted and asked for again within them
            is thrashing.
        clock: seconds.

    Attributes:
        lock: guards the tree.
        lower: told of what is evicted, or None.
        counters: of all that happens.
        used_bytes: of all blocks.

    Raises:
        CacheInputError: no such policy; a capacity below 0.
    """

    def __init__(
        self,
        pages: Pages,
        root: bytes,
        *,
        capacity_bytes: int | None = None,
        policy: str | EvictionPolicy = DEFAULT_POLICY,
        recent_tokens: int = 0,
        window_s: float = 600.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if capacity_bytes is not None and capacity_bytes < 0:
            raise CacheInputError(f"capacity_bytes is {capacity_bytes}; it must be at least 0")
        self.lock = threading.RLock()
        self.capacity_bytes = capacity_bytes
        self.policy = policy_of(policy)
        self.lower: LowerTier | None = None
        self.counters = PrefixCounters(window_s)
        self.used_bytes = 0
        self._pages, self._clock = pages, clock
        self._window_pages = -(-recent_tokens // PAGE_TOKENS)
        self.root = root
        # In front of the first blocks of all roots; their hashes differ.
        self._root = Block(b"", None, b"", np.empty(0, np.int64), 0)
        self._blocks: dict[bytes, Block] = {}
        self._block_of: dict[int, Block] = {}  # by entry
        self._standing: dict[int, Block] = {}  # by sequence
        self._uses = 0

    def __len__(self) -> int:
        """Blocks."""
        return len(self._blocks)

    # Looking up ------------------------------------------------------------------------------------------------------

    def match(self, tokens: Tokens, *, most_tokens: int | None = None, root: bytes | None = None) -> Match:
        """The longest prefix of these tokens that is cached, in full pages. Counts as a query; nothing is attached.

        A page of an equal hash but other tokens is none.

        Args:
            most_tokens: no longer than this.
            root: another than the store's: prefixes of another adapter, or another tenant.

        Raises:
            CacheInputError: ids that are no integers of 32 bits.
        """
        pages = token_pages(tokens)
        if most_tokens is not None:
            pages = pages[: max(0, most_tokens) // PAGE_TOKENS]
        with self.lock:
            found = self._found(pages, root)
            self.counters.queried(len(tokens), len(pages), found.pages, found.missing, self._clock())
            return found

    def find(self, tokens: Tokens, *, root: bytes | None = None) -> Match:
        """:meth:`match`, not counted as a query.

        Raises:
            CacheInputError: ids that are no integers of 32 bits.
        """
        pages = token_pages(tokens)
        with self.lock:
            return self._found(pages, root)

    def _found(self, pages: Sequence[bytes], root: bytes | None) -> Match:
        root = self.root if root is None else root
        blocks, missing = self._path(pages, root)
        return Match(tuple(blocks), self._is_exact(blocks), tuple(missing), root)

    def renewed(self, match: Match) -> Match:
        """What is cached yet of a match that is of before, and whether that is exact now."""
        with self.lock:
            stay: list[Block] = []
            for block in match.blocks:
                if self._blocks.get(block.hash) is not block:
                    break
                stay.append(block)
            gone = tuple(block.hash for block in match.blocks[len(stay) :])
            return Match(tuple(stay), self._is_exact(stay), gone + match.missing, match.root)

    def _path(self, pages: Sequence[bytes], root: bytes) -> tuple[list[Block], list[bytes]]:
        """The blocks of a prompt's pages as far as they are cached, and the hashes of the pages behind them."""
        last_hash, parent, found = root, self._root, list[Block]()
        for page in pages:
            block = self._blocks.get(next_hash(last_hash, page))
            if block is None or block.tokens != page or block.parent is not parent:
                break
            found.append(block)
            parent, last_hash = block, block.hash
        return found, chained(last_hash, pages[len(found) :])

    def _is_exact(self, blocks: Sequence[Block]) -> bool:
        newest = blocks[max(0, len(blocks) - self._window_pages) :]
        return all(bool(self._pages.is_full(block.entries).all()) for block in newest)

    # Attaching -------------------------------------------------------------------------------------------------------

    def attach_prefix(self, sequence: int, match: Match, *, session: str | None = None) -> int:
        """An empty sequence has the pages of a match, as its own. Until :meth:`leave` they are not evicted.

        What was evicted since the match is left out, with all behind it.

        Returns:
            How many tokens the sequence has.

        Raises:
            CacheInputError: as :meth:`KVCache.adopt`: the sequence is not empty, or there is none.
            CacheFullError: no room in the page tables. Nothing has changed.
        """
        with self.lock:
            blocks = self.renewed(match).blocks
            if not blocks:
                self._stand(sequence, None)
                return 0
            self._adopt(sequence, blocks)
            self._stand(sequence, blocks[-1])
            self._touch(blocks, session)
            return len(blocks) * PAGE_TOKENS

    def _adopt(self, sequence: int, blocks: Sequence[Block]) -> None:
        out_of_window = len(blocks) - self._window_pages
        entries = [
            block.quantized if block.quantized is not None and place < out_of_window else block.entries
            for place, block in enumerate(blocks)
        ]
        known = [block.importance for block in blocks if block.importance is not None]
        importance = None
        if len(known) == len(blocks):
            importance = PageImportance(*(np.stack(one, axis=-1) for one in zip(*known, strict=True)))
        self._pages.adopt(sequence, np.stack(entries, axis=-1), len(blocks) * PAGE_TOKENS, importance)

    def leave(self, sequence: int) -> None:
        """A sequence has ended, or stands on nothing any more."""
        with self.lock:
            self._stand(sequence, None)

    def _stand(self, sequence: int, block: Block | None) -> None:
        if block is not None:
            self._change(block, "users", 1)
        if (before := self._standing.pop(sequence, None)) is not None:
            self._change(before, "users", -1)
        if block is not None:
            self._standing[sequence] = block

    def move(self, sequences: Mapping[int, int]) -> None:
        """Sequences stand where others stood, {sequence: whose place it takes}; those not named stay."""
        with self.lock:
            before = dict(self._standing)
            for sequence, source in sequences.items():
                self._stand(sequence, before.get(source))

    def crop(self, sequence: int, tokens: int) -> None:
        """A sequence has the first of its tokens alone, and stands on what it has of its prefix yet."""
        with self.lock:
            block = self._standing.get(sequence)
            while block is not None and block.depth * PAGE_TOKENS > tokens:
                block = None if block.parent is self._root else block.parent
            self._stand(sequence, block)

    def _touch(self, blocks: Sequence[Block], session: str | None) -> None:
        """A request went through these."""
        self._uses += 1
        now_s = self._clock()
        turn = 1 if not blocks or blocks[-1].is_shared else blocks[-1].turn + 1
        for block in blocks:
            block.turn = turn
            if session is not None and block.session not in (None, session):
                block.is_shared = True
            block.session = session if session is not None else block.session
            if block.parent is not None:
                block.parent.newest_child = block
            self.policy.used(block, now_s)
            self.counters.reused(now_s - block.last_use_s)
            block.use_count += 1
            block.last_use, block.last_use_s = self._uses, now_s
        self.counters.seen([block.hash for block in blocks], now_s)

    # Caching ---------------------------------------------------------------------------------------------------------

    def cache_prefix(
        self,
        sequence: int,
        tokens: Tokens,
        *,
        pin: bool = False,
        priority: int = 0,
        session: str | None = None,
        root: bytes | None = None,
    ) -> Prefix:
        """Keep the full pages of a sequence's first tokens, which the sequence goes on using, and hold them.

        Until :meth:`release_prefix` the prefix has its newest pages in 16 bits (see the module). Where there is no room
        for all of it, its first pages are kept; :attr:`Prefix.tokens` says how many.

        Args:
            tokens: ids of the sequence's first tokens.
            pin: not to be evicted before it is released, and kept whole or not at all.
            priority: of all its blocks, if they do not have a higher one; counts with the policy ``priority``.
            session: whose conversation it is.
            root: as of :meth:`match`.

        Raises:
            CacheInputError: the sequence has fewer tokens; its pages are cached as those of other tokens.
            CacheFullError: a pinned prefix does not fit. Nothing has changed.
        """
        with self.lock:
            blocks = self._cache(sequence, tokens, root, priority, session, whole=pin)
            self._stand(sequence, blocks[-1] if blocks else None)
            self._trim()
            while self.capacity_bytes is not None and self.used_bytes > self.capacity_bytes and blocks:
                # What is left is pinned or in use, by others up to here.
                newest = blocks[-1]
                if newest.children or newest.pins or newest.users > 1:
                    break
                blocks.pop()
                self._stand(sequence, blocks[-1] if blocks else None)
                self._trim()
            last = blocks[-1] if blocks else None
            for block in blocks[max(0, len(blocks) - self._window_pages) :]:
                block.exact_ends += 1
            if last is not None and pin:
                self._change(last, "pins", 1)
            return Prefix(last, pin)

    def keep(
        self,
        sequence: int,
        tokens: Tokens,
        *,
        priority: int = 0,
        session: str | None = None,
        root: bytes | None = None,
    ) -> int:
        """Keep the full pages of a sequence that is about to end, as long as the policy wants, and hold nothing.

        Returns:
            How many tokens are cached.

        Raises:
            CacheInputError: as :meth:`cache_prefix`.
        """
        with self.lock:
            blocks = self._cache(sequence, tokens, root, priority, session, whole=False)
            self._stand(sequence, None)
            self._trim()
            kept = sum(self._blocks.get(block.hash) is block for block in blocks)
            return kept * PAGE_TOKENS

    def release_prefix(self, prefix: Prefix) -> None:
        """A prefix is no longer held: it may be evicted, and its newest pages need not stay in 16 bits.

        Raises:
            CacheInputError: it has been released before.
        """
        with self.lock:
            if prefix.is_released:
                raise CacheInputError("the prefix has been released before")
            prefix.is_released = True
            if (block := prefix.block) is None:
                return
            if prefix.is_pinned:
                self._change(block, "pins", -1)
            for _ in range(self._window_pages):
                if block is None or block is self._root:
                    break
                block.exact_ends -= 1
                is_cached = self._blocks.get(block.hash) is block
                if is_cached and block.exact_ends == 0 and block.quantized is not None:
                    self._take_quantized(block)
                block = block.parent

    def _cache(
        self,
        sequence: int,
        tokens: Tokens,
        root: bytes | None,
        priority: int,
        session: str | None,
        *,
        whole: bool,
    ) -> list[Block]:
        """The blocks of a sequence's first tokens: those that were cached and new ones, which nothing guards yet.

        Raises:
            CacheInputError, CacheFullError: as :meth:`cache_prefix`.
        """
        if not isinstance(priority, int | np.integer):
            raise CacheInputError(f"priority is {priority!r}; an integer is wanted")
        pages = token_pages(tokens)
        known, hashes = self._path(pages, self.root if root is None else root)
        entries = self._pages.page_entries(sequence, 0, len(pages))
        # A page whose hash is that of other tokens is not cached, nor is what is behind it.
        free = next((place for place, one in enumerate(hashes) if one in self._blocks), len(hashes))
        hashes, new = hashes[:free], entries[..., len(known) : len(known) + free]
        for entry in new.reshape(-1).tolist():
            if entry in self._block_of:
                raise CacheInputError(
                    f"sequence {sequence}: its pages are cached as those of other tokens; are these the tokens it has?"
                )
        if whole and len(known) + len(hashes) < len(pages):
            raise CacheFullError("a page has the hash of other tokens: the prefix cannot be kept whole")
        importance = self._pages.importance_of(sequence)
        last = known[-1] if known else self._root
        learned = self._unknown_quantized(known, entries)
        try:
            self._require_room(self._bytes_to_guard(learned, new if whole else None), last)
        except CacheFullError:
            if whole:
                raise
            # What is behind them was computed over these pages: without, it cannot be kept either.
            learned, hashes, new = [], [], new[..., :0]
        if new.size:
            self._pages.retain(new)
        standing = self._standing.get(sequence)
        attached = known.index(standing) + 1 if standing in known else 0  # these were counted then
        with self._guarded(last):  # what is used while it is queued would keep its place in the queue
            self._touch(known[attached:], session)
            for block in known:
                block.priority = max(block.priority, priority)
            self._learn_quantized(learned)
            blocks = known + self._insert(last, pages[len(known) :], hashes, new, priority, session)
        if importance is not None:
            for block in blocks:
                page = block.depth - 1
                block.importance = importance.average[:, page].copy(), importance.weight[:, page].copy()
        return blocks

    def _insert(
        self,
        last: Block,
        pages: Sequence[bytes],
        hashes: Sequence[bytes],
        entries: Ints,
        priority: int,
        session: str | None,
    ) -> list[Block]:
        """New blocks behind another, of pages that are retained already."""
        now_s = self._clock()
        turn = 1 if last is self._root or last.is_shared else last.turn
        sizes: list[int] = self._pages.page_bytes(entries).sum(axis=(0, 1)).tolist()
        blocks = []
        for place, (block_hash, page, size_bytes) in enumerate(zip(hashes, pages, sizes, strict=False)):
            block = Block(block_hash, last, page, np.ascontiguousarray(entries[..., place]), size_bytes)
            block.priority, block.session, block.turn = priority, session, turn
            block.use_count, block.last_use, block.born_s, block.last_use_s = 1, self._uses, now_s, now_s
            self._put(block, now_s)
            blocks.append(block)
            last = block
        self.counters.came(len(hashes))
        self.counters.seen(hashes, now_s)
        return blocks

    def bring_back(self, match: Match, tokens: Tokens, entries: Ints, *, session: str | None = None) -> Match:
        """Pages behind a match that come from elsewhere are cached, as far as the capacity allows.

        Args:
            tokens: of these pages, 64 each: what the prompt has behind the match.
            entries: i64 [layers, 2, pages], full pages that the caller has retained, or made with
                :meth:`KVCache.new_pages`; his references are the store's from now on.

        Returns:
            The match and the blocks behind it that are cached now.

        Raises:
            CacheInputError: other tokens than the prompt had. The references stay the caller's.
        """
        pages = token_pages(tokens)
        with self.lock:
            last = match.blocks[-1] if match.blocks else self._root
            hashes = chained(last.hash if match.blocks else match.root, pages)
            if tuple(hashes) != match.missing[: len(hashes)] or len(hashes) != entries.shape[-1]:
                raise CacheInputError(f"{len(hashes)} pages of tokens and {entries.shape[-1]} pages: not those missing")
            self._uses += 1
            blocks = list(match.blocks)
            if last is not self._root and self._blocks.get(last.hash) is not last:
                # What they stand on has been evicted meanwhile.
                self._pages.release(entries)
                return match
            for place, block_hash in enumerate(hashes):
                new = entries[..., place : place + 1]
                if (block := self._blocks.get(block_hash)) is None:
                    (block,) = self._insert(last, pages[place : place + 1], [block_hash], new, 0, session)
                else:  # somebody else was faster
                    self._pages.release(new)
                if block.tokens != pages[place]:
                    self._pages.release(entries[..., place + 1 :])
                    break
                blocks.append(block)
                last = block
            with self._guarded(last):
                self._trim()
            self._trim()
            return self.renewed(Match(tuple(blocks), False, match.missing[len(blocks) - match.pages :], match.root))

    @contextmanager
    def guarded(self, match: Match) -> Iterator[None]:
        """The blocks of a match are not evicted."""
        with self.lock, self._guarded(match.blocks[-1] if match.blocks else self._root):
            yield

    @contextmanager
    def _guarded(self, last: Block) -> Iterator[None]:
        """A block and those before it are not evicted."""
        self._change(last, "users", 1)
        try:
            yield
        finally:
            self._change(last, "users", -1)

    def _unknown_quantized(self, blocks: Sequence[Block], entries: Ints) -> list[_Quantized]:
        """What blocks of 16 bits shall have beside them: pages of a sequence that goes beyond them."""
        if not blocks:
            return []
        of_blocks = np.stack([block.entries for block in blocks], axis=-1)
        other = self._pages.is_full(of_blocks) & ~self._pages.is_full(entries[..., : len(blocks)])
        places = np.flatnonzero(other.any(axis=(0, 1))).tolist()
        return [
            (blocks[place], entries[..., place], other[..., place])
            for place in places
            if blocks[place].quantized is None
        ]

    def _bytes_to_guard(self, learned: Sequence[_Quantized], pinned: Ints | None) -> int:
        """Of pages that come and cannot be evicted again: those that are to be pinned, and those that stand beside the
        16 bits of held prefixes."""
        beside = sum(
            int(self._pages.page_bytes(entries[differs]).sum())
            for block, entries, differs in learned
            if block.exact_ends
        )
        return beside + (0 if pinned is None else int(self._pages.page_bytes(pinned).sum()))

    def _learn_quantized(self, learned: Sequence[_Quantized]) -> None:
        """All that go beyond these blocks share a sequence's quantized pages of them."""
        for block, entries, differs in learned:
            self._pages.retain(entries[differs])
            block.quantized = np.where(differs, entries, block.entries)
            self._count_pages(block)
            if not block.exact_ends:
                self._take_quantized(block)

    def _take_quantized(self, block: Block) -> None:
        """A block's pages in 16 bits go where there are quantized ones."""
        assert block.quantized is not None
        gone = block.entries[block.entries != block.quantized]
        block.entries, block.quantized = block.quantized, None
        for entry in gone.tolist():
            del self._block_of[entry]
        self._count_pages(block)
        self._pages.release(gone)

    def _count_pages(self, block: Block) -> None:
        """A block has other pages than before."""
        pages = block.pages()
        size_bytes = int(self._pages.page_bytes(pages).sum())
        self.used_bytes += size_bytes - block.size_bytes
        block.size_bytes = size_bytes
        for entry in pages.tolist():
            self._block_of[entry] = block

    # The tree --------------------------------------------------------------------------------------------------------

    def _put(self, block: Block, now_s: float) -> None:
        parent = block.parent
        assert parent is not None
        if parent.children and block.session is None:
            # Without the names of sessions, a branch is the only sign of two.
            above: Block | None = parent
            while above is not None and not above.is_shared:
                above.is_shared = True
                above = above.parent
        self._leave_behind(parent.newest_child, block)
        parent.newest_child = block
        self._change(parent, "children", 1)
        self._blocks[block.hash] = block
        self.used_bytes += block.size_bytes
        for entry in block.entries.reshape(-1).tolist():
            self._block_of[entry] = block
        self.policy.came(block, now_s)
        self.policy.offer(block)

    def _leave_behind(self, branch: Block | None, block: Block) -> None:
        """A session goes on with a block beside a branch of its own, which it left then."""
        if branch is None or block.session is None or branch.session != block.session or branch.is_shared:
            return
        while branch is not None and not branch.is_shared:
            self.policy.left(branch)
            branch = branch.newest_child

    def _change(self, block: Block, what: Literal["children", "pins", "users"], by: int) -> None:
        """A reason to stay comes or goes."""
        could_go = block.can_go
        setattr(block, what, getattr(block, what) + by)
        if could_go != block.can_go and self._blocks.get(block.hash) is block:
            (self.policy.withdraw if could_go else self.policy.offer)(block)

    # Evicting --------------------------------------------------------------------------------------------------------

    def _planned(self, is_enough: Callable[[Block], bool]) -> list[Block] | None:
        """Blocks in the order in which they shall go, which are taken out of the tree but not given up yet.

        Args:
            is_enough: whether with this one enough will have gone.

        Returns:
            None if all that can go is not enough. Then nothing has changed.
        """
        now_s = self._clock()
        plan: list[Block] = []
        while (block := self.policy.head(now_s)) is not None:
            self.policy.withdraw(block)
            plan.append(block)
            assert block.parent is not None
            self._change(block.parent, "children", -1)
            if is_enough(block):
                return plan
        for block in reversed(plan):
            assert block.parent is not None
            self._change(block.parent, "children", 1)
            self.policy.offer(block)
        return None

    def _give_up(self, plan: Sequence[Block], reason: EvictionReason) -> None:
        now_s = self._clock()
        try:
            if self.lower is not None:
                self.lower.take(plan, reason)
        finally:  # what interrupts that, as Ctrl-C while it writes, leaves a tree without them
            for block in plan:
                self._forget(block, reason, now_s)

    def _forget(self, block: Block, reason: EvictionReason, now_s: float) -> None:
        pages = block.pages()
        del self._blocks[block.hash]
        if block.parent is not None and block.parent.newest_child is block:
            block.parent.newest_child = None
        for entry in pages.tolist():
            del self._block_of[entry]
        self.used_bytes -= block.size_bytes
        self.policy.gone(block, now_s)
        self.counters.evicted(block.hash, reason, now_s - block.born_s, now_s - block.last_use_s, now_s)
        self._pages.release(pages)

    def _require_room(self, size_bytes: int, last: Block) -> None:
        """Evict what so many bytes need, but not this block.

        Raises:
            CacheFullError: all that can go is not enough. Nothing has changed.
        """
        if self.capacity_bytes is None or self.used_bytes + size_bytes <= self.capacity_bytes:
            return
        left = self.used_bytes + size_bytes - self.capacity_bytes

        def is_enough(block: Block) -> bool:
            nonlocal left
            left -= block.size_bytes
            return left <= 0

        with self._guarded(last):
            plan = self._planned(is_enough)
        if plan is None:
            raise CacheFullError(
                f"a pinned prefix needs {size_bytes} bytes more; {self.used_bytes} of {self.capacity_bytes} are taken, "
                f"and without pinned prefixes and those of running sequences {left} bytes would still be missing"
            )
        self._give_up(plan, "capacity")

    def _trim(self) -> None:
        """Evict until the capacity is kept to, or nothing can go."""
        while self.capacity_bytes is not None and self.used_bytes > self.capacity_bytes:
            if (plan := self._planned(lambda _: True)) is None:
                return
            self._give_up(plan, "capacity")

    def evict(self, size_bytes: int | None = None) -> int:
        """Evict blocks of at least so many bytes, in the order of the policy; without, all that can go.

        Returns:
            The bytes of their pages; those that sequences have are freed when these end.
        """
        with self.lock:
            before = self.used_bytes
            while size_bytes is None or before - self.used_bytes < size_bytes:
                if (plan := self._planned(lambda _: True)) is None:
                    break
                self._give_up(plan, "asked")
            return before - self.used_bytes

    def clear(self) -> None:
        """Release all pages, pinned prefixes and what running sequences stand on included; nothing goes down."""
        with self.lock:
            for block in self._blocks.values():
                self.policy.withdraw(block)
            self._pages.release(np.array(list(self._block_of), np.int64))
            self._blocks.clear()
            self._block_of.clear()
            self._standing.clear()
            self._root.children, self._root.newest_child, self.used_bytes = 0, None, 0

    # What the cache asks of a holder ---------------------------------------------------------------------------------

    def follows(self, entry: int) -> bool:
        """As of :class:`~kvpack.runtime.kv.page_holders.PageHolder`: yes, but for the newest pages of held prefixes."""
        block = self._block_of.get(entry)
        if block is None:
            return False
        return not (block.exact_ends and bool(self._pages.is_full(np.array([entry]))[0]))

    def replaced(self, changes: Mapping[int, int]) -> None:
        """As of :class:`~kvpack.runtime.kv.page_holders.PageHolder`."""
        blocks = {entry: self._block_of.pop(entry) for entry in changes}
        for entry, block in blocks.items():
            block.entries[block.entries == entry] = changes[entry]
            if block.quantized is not None:
                block.quantized[block.quantized == entry] = changes[entry]
        for block in set(blocks.values()):
            self._count_pages(block)

    def reclaim(self, missing: Mapping[Kind, int], missing_bytes: int) -> bool:
        """As of :class:`~kvpack.runtime.kv.page_holders.PageHolder`: evict as little as the policy's order allows."""
        with self.lock:
            left, slabs, spare_bytes = Counter(missing), Counter[int](), list[int]()
            if self.lower is not None:
                left -= self.lower.release_copied()  # those are evicted already
                if not left:
                    return True

            def is_enough(block: Block) -> bool:
                for entry in block.pages().tolist():
                    if not self._pages.is_only_held(entry):
                        continue
                    kind = self._pages.kind(entry)
                    slab, page_count, slab_bytes = self._pages.slab(entry)
                    slabs[slab] += 1
                    if kind in left:
                        left[kind] -= 1
                    elif slabs[slab] == page_count:
                        # Had pages of it been free, some of them might be wanted as they are.
                        spare_bytes.append(slab_bytes)
                return self._is_room(left, spare_bytes)

            plan = self._planned(is_enough)
            if plan is None:
                return False
            self._give_up(plan, "memory")
            return True

    def _is_room(self, missing: Mapping[Kind, int], spare_bytes: Sequence[int]) -> bool:
        """Whether empty slabs of these bytes can be cut into so many pages of each kind, as the pools do it."""
        spare = sorted(spare_bytes)
        sizes = {kind: self._pages.kind_bytes(kind) for kind in missing}
        for kind in sorted(missing, key=lambda kind: -sizes[kind]):
            count = missing[kind]
            while count > 0 and spare and spare[-1] >= sizes[kind]:
                count -= spare.pop() // sizes[kind]
            if count > 0:
                return False
        return True
