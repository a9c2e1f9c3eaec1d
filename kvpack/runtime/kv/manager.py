"""A KV cache for many requests: prompts find what is cached of them, and what requests leave behind stays findable.

:class:`KVManager` hands out the sequences of a :class:`~kvpack.KVCache`. A request starts with its prompt, has the
pages
of the longest prefix that is cached, computes the rest as always, and leaves its own pages behind when it ends::

    started = manager.start(prompt)                  # started.tokens of them are there already
    …                                                # the model appends the others to started.sequence
    manager.append_tokens([started.sequence], [token])
    manager.finish(started.sequence)

**Threads.** One lock, :attr:`KVManager.lock`, guards manager, store and cache. The manager takes it by itself. Who uses
the cache directly (appends, attends) while others may use it must hold it, since the cache is not made for several
threads, and evicts prefixes when its memory ends.

**Memory.** Prefixes take at most ``prefix_bytes``. When the cache's own memory ends (``max_bytes``), it asks for pages
that prefixes alone have: as many of the kinds that are missing, or whole slabs. What cannot be had is an error, and
everything is as it was before.
"""

from __future__ import annotations

import os
import threading
import time
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from kvpack.errors import CacheFullError, CacheInputError
from kvpack.format.closing import Closing
from kvpack.format.pages import ENTRY_FORMAT_MASK, PAGE_TOKENS, PageFormat, Side
from kvpack.format.snapshot import Fingerprint
from kvpack.runtime.kv.allocator import PageImportance
from kvpack.runtime.kv.cache import KVCache
from kvpack.runtime.kv.eviction import DEFAULT_POLICY, EvictionPolicy
from kvpack.runtime.kv.manager_metrics import ManagerMetrics
from kvpack.runtime.kv.page_holders import Kind
from kvpack.runtime.kv.prefix_hash import Tokens, root_hash, token_bytes
from kvpack.runtime.kv.prefix_store import Ints, Match, Prefix, PrefixStore
from kvpack.runtime.kv.tiers import Tiers


@dataclass(frozen=True)
class Started:
    """A request's sequence.

    Attributes:
        sequence: of the cache.
        tokens: how many of the prompt's first ones it has already; always fewer than the prompt has, since a model
        must be
            given one to say what comes next.
        is_exact: whether its newest pages are in 16 bits, as a fresh prefill of as many tokens would leave them; its
            bits are the same then if those who computed them had what that prefill has.
    """

    sequence: int
    tokens: int
    is_exact: bool


class _Request:
    """A running sequence.

    Attributes:
        tokens: ids, as far as the manager has been told.
        root: what hashes of its pages stand on.
        session: whose conversation it is.
        fresh_pages: how many of its pages were never written anew from quantized values.
    """

    __slots__ = ("fresh_pages", "root", "session", "tokens")

    def __init__(self, tokens: array[int], root: bytes, session: str | None, fresh_pages: int = 1 << 30) -> None:
        self.tokens, self.root, self.session, self.fresh_pages = tokens, root, session, fresh_pages

    def copy(self) -> _Request:
        return _Request(self.tokens[:], self.root, self.session, self.fresh_pages)


class _CachePages:
    """A cache as a store of prefixes sees it."""

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache
        sizes = [[cache.pools.page_bytes(side, page_format) for page_format in PageFormat] for side in Side]
        self._bytes = np.array(sizes, np.int64)
        self.page_entries, self.retain, self.release = cache.page_entries, cache.retain, cache.release
        self.adopt, self.slab = cache.adopt, cache.pools.slab

    def importance_of(self, sequence: int) -> PageImportance | None:
        return None if self._cache.budget is None else self._cache.importance_of(sequence)

    def page_bytes(self, entries: Ints) -> Ints:
        # Sides are in the second dimension of pages by layer; of others, K and V are asked one by one.
        formats = entries & ENTRY_FORMAT_MASK
        if entries.ndim >= 2:
            sides = np.arange(len(Side)).reshape(-1, *[1] * (entries.ndim - 2))
            return np.asarray(self._bytes[np.broadcast_to(sides, entries.shape), formats])
        return np.array([self._cache.pools.bytes_of(int(entry)) for entry in entries], np.int64)

    def is_full(self, entries: Ints) -> npt.NDArray[np.bool_]:
        return np.asarray(entries & ENTRY_FORMAT_MASK == int(self._cache.full_format))

    def is_only_held(self, entry: int) -> bool:
        return self._cache.pools.info(entry).references == 1

    def kind(self, entry: int) -> Kind:
        info = self._cache.pools.info(entry)
        return info.side, info.format

    def kind_bytes(self, kind: Kind) -> int:
        return self._cache.pools.page_bytes(*kind)


class KVManager(Closing):
    """Sequences and prefixes of one cache and one model.

    Args:
        cache: which nobody else gives sequences of; all of them must be empty.
        model: what names the model whose keys and values these are: a fingerprint, or any text that no other model has.
        adapter: likewise of an adapter (LoRA) that is always in use.
        policy: of eviction, by name (:data:`~kvpack.runtime.kv.eviction.POLICIES`), or one of your own.
        prefix_bytes: the most that prefixes take, those of running sequences counted too; None: as long as there is
        memory.
        host_bytes: of host memory (pinned, on CUDA) that evicted blocks go to; 0: they are gone.
        disk: directory of files that they go to from there (:mod:`kvpack.runtime.kv.disk_tier`), and are found in by
            managers that come later, or run beside this one, of the same model and kind of cache.
        disk_bytes: the most that its files take; None: no limit.
        window_s, clock: as of :class:`~kvpack.runtime.kv.prefix_store.PrefixStore`.

    Attributes:
        cache: the cache.
        store: its prefixes.
        tiers: slower memory behind them, or None.

    Raises:
        CacheInputError: the cache has tokens, or device_pages; no such policy; fewer bytes than none; a disk without
            host memory, or a directory that cannot be made, read or written to.
        CacheFullError: the host does not provide ``host_bytes``.

    >>> import torch
    >>> from kvpack import KVCache
    >>> from kvpack.runtime.kv.manager import KVManager
    >>> manager = KVManager(KVCache(1, 2, 16, 1024, max_sequences=4, device="cpu"), "my model")
    >>> prompt = list(range(200))
    >>> first = manager.start(prompt)
    >>> manager.cache.append(0, *torch.randn(2, 1, 2, 200, 16).half(), [first.sequence])
    >>> manager.finish(first.sequence)
    192
    >>> manager.start([*prompt[:150], 7])
    Started(sequence=0, tokens=128, is_exact=True)
    """

    def __init__(
        self,
        cache: KVCache,
        model: Fingerprint | str,
        *,
        adapter: str | None = None,
        policy: str | EvictionPolicy = DEFAULT_POLICY,
        prefix_bytes: int | None = None,
        host_bytes: int = 0,
        disk: str | os.PathLike[str] | None = None,
        disk_bytes: int | None = None,
        window_s: float = 600.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if cache.table.lengths.any():
            raise CacheInputError(
                "the cache has tokens: a manager gives out all of its sequences, so they must be empty"
            )
        if cache.slots is not None:
            raise CacheInputError(
                "the cache has device_pages: prefixes are kept of caches whose pages all lie on the device"
            )
        self.cache = cache
        self._clock = clock
        self._key = self._root_key(model, adapter)
        self.store = PrefixStore(
            _CachePages(cache),
            root_hash(self._key | {"salt": ""}),
            capacity_bytes=prefix_bytes,
            policy=policy,
            recent_tokens=cache.recent_tokens,
            window_s=window_s,
            clock=clock,
        )
        self.tiers: Tiers | None = None
        if host_bytes or disk is not None:
            fingerprint = model if isinstance(model, Fingerprint) else None
            self.tiers = Tiers(cache, host_bytes, disk, disk_bytes, lock=self.store.lock, fingerprint=fingerprint)
            self.store.lower = self.tiers
        cache.add_holder(self.store)
        self._requests: dict[int, _Request] = {}
        self._free = list(reversed(range(cache.max_sequences)))

    @property
    def lock(self) -> threading.RLock:
        """To be held while the cache is used directly, where several threads do."""
        return self.store.lock

    def _root_key(self, model: Fingerprint | str, adapter: str | None) -> dict[str, Any]:
        """All that pages depend on but tokens, as JSON values."""
        cache = self.cache
        return {
            "model": model.model if isinstance(model, Fingerprint) else model,
            "adapter": [model.adapter if isinstance(model, Fingerprint) else None, adapter],
            "shape": [cache.num_layers, cache.num_kv_heads, cache.head_dim],
            "dtype": str(cache.dtype),
            "formats": [
                sorted(map(int, cache.possible_formats(i, side))) for i in range(cache.num_layers) for side in Side
            ],
            "budget": None if cache.budget is None else [float(cache.budget), cache.policy],
            "recent_tokens": cache.recent_tokens,
            "sinks": cache.sinks,
            "key_order": list(cache.key_order),
        }

    def _root(self, adapter: str | None, salt: str) -> bytes | None:
        """
        Raises:
            CacheInputError: a salt that is no text: 0 is falsy, and would be none.
        """
        if not isinstance(salt, str):
            raise CacheInputError(f"salt is {salt!r}; a text is wanted")
        if adapter is None and not salt:
            return None
        return root_hash(self._key | {"adapter": [*self._key["adapter"], adapter], "salt": salt})

    # Requests --------------------------------------------------------------------------------------------------------

    def start(
        self, tokens: Tokens, *, session: str | None = None, adapter: str | None = None, salt: str = ""
    ) -> Started:
        """A request gets an empty sequence, with the pages of its prompt that are cached.

        Args:
            tokens: ids of the prompt.
            session: whose conversation it is, for policies that ask.
            adapter: that this request uses beside the manager's: prefixes of another are none.
            salt: of a tenant: who has another finds nothing of his, nor can tell from times what he has asked.

        Raises:
            CacheFullError: no sequence is free; no room in the page tables. Nothing has changed.
            CacheInputError: ids that are no integers of 32 bits.
        """
        ids = array("i", token_bytes(tokens))
        with self.lock:
            root = self._root(adapter, salt)
            self._require_free()
            match = self.store.match(ids, most_tokens=len(ids) - 1, root=root)
            if self.tiers is not None and match.missing:
                match = self.tiers.fetch(self.store, match, ids, session=session)
            return self._attached(match, ids, session)

    def prefetch(self, tokens: Tokens, *, adapter: str | None = None, salt: str = "") -> Future[int]:
        """Begin to read what files have of a prompt into host memory, while other requests go on: :meth:`start` then
        finds it there.

        Returns:
            Will have how many of its tokens are in the cache or in host memory.

        Raises:
            CacheInputError: the manager has no tiers; ids that are no integers of 32 bits.
        """
        if self.tiers is None:
            raise CacheInputError("the manager has no tiers to read from: make it with host_bytes= and disk=")
        match = self.store.find(tokens, root=self._root(adapter, salt))
        return self.tiers.prefetch(self.store, match, tokens)

    def _attached(self, match: Match, ids: array[int], session: str | None) -> Started:
        self._require_free()
        sequence = self._free[-1]
        attached = self.store.attach_prefix(sequence, match, session=session)
        self._free.pop()
        self._requests[sequence] = _Request(ids, match.root, session)
        return Started(sequence, attached, self._exact(match).is_exact)

    def _require_free(self) -> None:
        """
        Raises:
            CacheFullError: all sequences are in use.
        """
        if not self._free:
            raise CacheFullError(
                f"all {self.cache.max_sequences} sequences are in use: finish() one, or make a cache of more of them"
            )

    def append_tokens(self, sequences: Sequence[int], tokens: Sequence[int]) -> None:
        """Say which tokens a decoding step has appended, one to each of these sequences.

        Raises:
            CacheInputError: a sequence that is not started; a token that is no integer of 32 bits. Nothing has changed.
        """
        with self.lock:
            known = [self._request(sequence).tokens for sequence in sequences]
            try:
                new = array("i", tokens)
            except (TypeError, OverflowError) as error:
                raise CacheInputError(f"tokens are {tokens!r}: {error}") from None
            if len(new) != len(known):
                raise CacheInputError(f"{len(known)} sequences and {len(new)} tokens are given; each gets one")
            for of_sequence, token in zip(known, new, strict=True):
                of_sequence.append(token)

    def tokens(self, sequence: int) -> list[int]:
        """What the manager has been told that a running sequence holds, or will hold.

        Raises:
            CacheInputError: a sequence that is not started.
        """
        with self.lock:
            return self._request(sequence).tokens.tolist()

    def finish(self, sequence: int, *, keep: bool = True, priority: int = 0) -> int:
        """A request has ended: its sequence is free, and its full pages stay as long as the policy wants.

        Only what the manager knows the tokens of is kept.

        Args:
            keep: without, its pages are forgotten, but for those that prefixes have.
            priority: as of :meth:`cache_prefix`.

        Returns:
            How many of its tokens are cached now.

        Raises:
            CacheInputError: a sequence that is not started; its tokens are not those that it was given; layers have
                different numbers of its tokens, in the midst of a step.
            CacheFullError: what waits in 16 bits for more of a prompt cannot be quantized for want of memory.
        """
        with self.lock:
            request, cached = self._request(sequence), 0
            if keep:
                ids = self._cacheable(sequence, request)
                cached = self.store.keep(sequence, ids, priority=priority, session=request.session, root=request.root)
            else:
                self.store.leave(sequence)
            self.cache.free(sequence)
            del self._requests[sequence]
            self._free.append(sequence)
            return cached

    def fork(self, sequence: int) -> int:
        """A free sequence becomes what this one is, and shares its pages.

        Returns:
            The new one.

        Raises:
            CacheFullError: no sequence is free.
            CacheInputError: as of :meth:`KVCache.fork`; a sequence that is not started.
        """
        with self.lock:
            request = self._request(sequence)
            self._require_free()
            target = self._free[-1]
            self.cache.fork(sequence, target)
            self._free.pop()
            self.store.move({target: sequence})
            self._requests[target] = request.copy()
            return target

    def crop(self, sequence: int, tokens: int) -> None:
        """Keep the first tokens of a sequence: :meth:`KVCache.truncate`.

        Raises:
            CacheInputError, CacheFullError: as of :meth:`KVCache.truncate`; a sequence that is not started.
        """
        with self.lock:
            request = self._request(sequence)
            page = tokens // PAGE_TOKENS
            is_cut = tokens % PAGE_TOKENS and self._is_quantized(sequence, page)
            self.cache.truncate(sequence, tokens)
            del request.tokens[tokens:]
            self.store.crop(sequence, tokens)
            if is_cut:
                # Its tokens have the values that the quantized page had, which a fresh prefill would not leave.
                request.fresh_pages = min(request.fresh_pages, page)

    def reorder(self, rows: Sequence[int]) -> None:
        """Sequence i becomes what sequence ``rows[i]`` was, those behind the last of them end:
        :meth:`KVCache.select_sequences`, as a beam search does.

        Raises:
            CacheInputError: as of :meth:`KVCache.select_sequences`; a sequence that is not started.
        """
        with self.lock:
            requests = [self._request(row) for row in rows]
            self.cache.select_sequences(rows)
            self.store.move(dict(enumerate(rows)))
            for sequence in set(self._requests) - set(range(len(rows))):
                self.store.leave(sequence)
            self._requests = {sequence: request.copy() for sequence, request in enumerate(requests)}
            self._free = [one for one in reversed(range(self.cache.max_sequences)) if one not in self._requests]

    def _is_quantized(self, sequence: int, page: int) -> bool:
        if page * PAGE_TOKENS >= self.cache.length(0, sequence):
            return False
        entries = self.cache.entries[:, :, sequence, page]
        return bool((entries & ENTRY_FORMAT_MASK != int(self.cache.full_format)).any())

    def _request(self, sequence: int) -> _Request:
        """
        Raises:
            CacheInputError: it is not started.
        """
        try:
            return self._requests[sequence]
        except (KeyError, TypeError):
            raise CacheInputError(
                f"sequence {sequence!r} is not started; those that are: {sorted(self._requests)}"
            ) from None

    def _cacheable(self, sequence: int, request: _Request) -> array[int]:
        """Its tokens, as far as they are known, in the cache, and in pages that are fresh. What waits for more of a
        prompt is quantized.

        Raises:
            CacheFullError: there is no memory for that.
        """
        self.cache.settle([sequence])
        in_cache = int(self.cache.table.lengths[:, sequence].min())
        return request.tokens[: min(in_cache, request.fresh_pages * PAGE_TOKENS)]

    # Prefixes --------------------------------------------------------------------------------------------------------

    def match(self, tokens: Tokens, *, adapter: str | None = None, salt: str = "") -> Match:
        """The longest prefix of these tokens that is cached, in full pages.

        Raises:
            CacheInputError: ids that are no integers of 32 bits.
        """
        with self.lock:
            return self._exact(self.store.match(tokens, root=self._root(adapter, salt)))

    def cache_prefix(self, sequence: int, *, pin: bool = False, priority: int = 1) -> Prefix:
        """Keep the full pages that a running sequence has now, such as those of a system prompt, and hold them.

        Its newest pages stay in 16 bits until :meth:`release_prefix`, so that who starts with this very prompt finds
        what a fresh prefill would leave, bit for bit.

        Args:
            pin: not to be evicted before it is released, and kept whole or not at all.
            priority: of its blocks, with the policy ``priority``.

        Raises:
            CacheFullError: a pinned prefix does not fit. Nothing has changed.
            CacheInputError: as of :meth:`finish`.
        """
        with self.lock:
            request = self._request(sequence)
            ids = self._cacheable(sequence, request)
            return self.store.cache_prefix(
                sequence, ids, pin=pin, priority=priority, session=request.session, root=request.root
            )

    def attach_prefix(self, match: Match, *, session: str | None = None) -> Started:
        """A free sequence gets the pages of a match, all of them: to go on, a model needs a token more.

        What was evicted since the match is left out, with all behind it.

        Raises:
            CacheFullError: as of :meth:`start`.
        """
        with self.lock:
            match = self.store.renewed(match)  # blocks may have been evicted since, and pages quantized
            return self._attached(match, array("i", b"".join(block.tokens for block in match.blocks)), session)

    def release_prefix(self, prefix: Prefix) -> None:
        """A prefix is no longer held: it may be evicted, and its newest pages need not stay in 16 bits.

        Raises:
            CacheInputError: it has been released before.
        """
        self.store.release_prefix(prefix)

    def _exact(self, match: Match) -> Match:
        """Under a budget, which bits pages get depends on what else was in the cache."""
        return match if self.cache.budget is None else replace(match, is_exact=match.is_exact and not match.blocks)

    def close(self) -> None:
        """Give back all pages: requests end, and prefixes are forgotten, pinned ones too; nothing goes to tiers.

        The cache is empty then, and another manager may have it. Without this, pages stay for as long as the cache.
        """
        with self.lock:
            for sequence in list(self._requests):
                self.finish(sequence, keep=False)
            self.store.clear()
        if self.tiers is not None:
            self.tiers.close()

    # What there is ---------------------------------------------------------------------------------------------------

    def metrics(self) -> ManagerMetrics:
        """All that is counted, at this moment."""
        with self.lock:
            counters, now_s, pools = self.store.counters, self._clock(), self.cache.pools
            return ManagerMetrics(
                prefix_bytes=self.store.used_bytes,
                prefix_capacity_bytes=self.store.capacity_bytes,
                held_bytes=self.cache.held_bytes,
                page_bytes=pools.bytes_in_use,
                slab_bytes=pools.bytes_allocated,
                blocks=len(self.store),
                running_sequences=len(self._requests),
                max_sequences=self.cache.max_sequences,
                queries=counters.queries,
                hit_queries=counters.hit_queries,
                queried_pages=counters.queried_pages,
                hit_pages=counters.hit_pages,
                queried_tokens=counters.queried_tokens,
                hit_tokens=counters.hit_pages * PAGE_TOKENS,
                cached_blocks=counters.blocks_cached,
                evictions=dict(counters.evictions),
                lifetimes=counters.lifetimes.read(),
                idle_times=counters.idle_times.read(),
                reuse_gaps=counters.reuse_gaps.read(),
                window_s=counters.window_s,
                working_set_pages=counters.working_set_pages(now_s),
                thrashed_pages=counters.thrashed_pages,
                thrashing=counters.thrashing(now_s),
                tiers=None if self.tiers is None else self.tiers.metrics(),
            )
