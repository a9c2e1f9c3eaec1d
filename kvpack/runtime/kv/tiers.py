"""Where evicted blocks go, and come back from: host memory, then files.

What host memory has no room for, the least recently used first, goes to the disk tier together with the blocks before
it, as one file, or is dropped. Blocks that come back stay in host memory, so to evict them again costs nothing. A
block that has pages in 16 bits beside quantized ones is kept as quantized.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from kvpack.encode.threads import ThreadPool
from kvpack.errors import CacheFullError, CacheInputError
from kvpack.format.pages import ENTRY_FORMAT_MASK, PAGE_TOKENS
from kvpack.format.snapshot import RUN_PAGES, Fingerprint
from kvpack.runtime.kv.cache import KVCache
from kvpack.runtime.kv.disk_tier import DiskTier
from kvpack.runtime.kv.host_tier import BlockBytes, HostTier
from kvpack.runtime.kv.manager_metrics import TierMetrics
from kvpack.runtime.kv.page_holders import Kind
from kvpack.runtime.kv.prefix_hash import Tokens, token_pages
from kvpack.runtime.kv.prefix_store import Block, EvictionReason, Ints, Match, PrefixStore

# Where a file could not be written, no other is tried for so long: who evicts would code blocks for nothing each time.
_REST_S = 1.0
_NO_DATA = torch.empty(0, dtype=torch.uint8, device="cpu")


class Tiers:
    """Host memory and a directory behind a cache: a :class:`~kvpack.runtime.kv.prefix_store.LowerTier`.

    All but :attr:`disk` is guarded by the store's lock.

    Args:
        cache: whose pages they are.
        host_bytes: of host memory.
        directory: of files; None: there is no disk tier.
        disk_bytes: the most that they take; None: no limit.
        lock: the store's.
        fingerprint, report, codes_on_device: as of :class:`~kvpack.runtime.kv.disk_tier.DiskTier`.

    Raises:
        CacheInputError: no host memory, or fewer bytes than none; the directory cannot be made, read or written to.
        CacheFullError: the host does not provide it.
    """

    def __init__(
        self,
        cache: KVCache,
        host_bytes: int,
        directory: str | os.PathLike[str] | None = None,
        disk_bytes: int | None = None,
        *,
        lock: threading.RLock,
        fingerprint: Fingerprint | None = None,
        report: Callable[[Path, Exception], None] | None = None,
        codes_on_device: bool = False,
    ) -> None:
        if host_bytes <= 0:
            raise CacheInputError(
                f"host_bytes is {host_bytes}; it must be above 0: blocks are gathered there before they go to disk"
            )
        if disk_bytes is not None and (directory is None or disk_bytes < 0):
            raise CacheInputError(f"disk_bytes is {disk_bytes}; it needs disk=, a directory, and must be at least 0")
        self.disk = None
        if directory is not None:
            self.disk = DiskTier(
                cache, directory, disk_bytes, fingerprint, report=report, codes_on_device=codes_on_device
            )
        self.host = HostTier(cache, host_bytes)
        self._cache, self._lock = cache, lock
        self._host_hits = self._disk_hits = self._fetched_bytes = self._taken = self._dropped = self._refused = 0
        self._resting_until_s = 0.0
        self._reader = ThreadPool(1, "kvpack-tiers")

    # Down ------------------------------------------------------------------------------------------------------------

    def take(self, blocks: Sequence[Block], reason: EvictionReason) -> None:
        """As of :class:`~kvpack.runtime.kv.prefix_store.LowerTier`."""
        self.host.copies.settle()
        for block in blocks:
            self._take(block, may_hold=reason != "memory")

    def release_copied(self) -> Counter[Kind]:
        """As of :class:`~kvpack.runtime.kv.prefix_store.LowerTier`."""
        return self.host.copies.release_copied()

    def _take(self, block: Block, *, may_hold: bool) -> None:
        assert block.parent is not None
        entries = block.entries if block.quantized is None else block.quantized
        formats = (entries & ENTRY_FORMAT_MASK).astype(np.uint8)
        if (known := self.host.get(block.hash)) is not None:
            if self.host.is_held(block.hash) or (known.formats == formats).all():
                self.host.touch(block.hash)
                return
            self.host.drop(block.hash)
        size = int(sum(map(self._cache.pools.bytes_of, entries.reshape(-1).tolist())))
        parent = block.parent.hash or None
        taken = BlockBytes(block.hash, parent, block.depth, block.tokens, formats, _NO_DATA, block.importance)
        if self._make_room(size) and self.host.put(taken, entries, may_hold=may_hold):
            self._taken += 1
        elif not self._is_on_disk(taken):
            self._dropped += 1

    def _make_room(self, size_bytes: int) -> bool:
        """Whether host memory has a gap of so many bytes; blocks go to disk, or are dropped, until it has."""
        if size_bytes > self.host.capacity_bytes:
            return False
        while not self.host.has_room(size_bytes):
            if (oldest := next(self.host.oldest(), None)) is None:
                return False
            if not self._is_on_disk(oldest) and (self.is_resting or not self._write(oldest)):
                self._dropped += 1
            self.host.drop(oldest.hash)
        return True

    def _is_on_disk(self, block: BlockBytes) -> bool:
        return self.disk is not None and self.disk.has(block)

    def _write(self, last: BlockBytes) -> bool:
        """Write a block and those before it that are in host memory alone. False: it is in no file."""
        if self.disk is None:
            return False
        run = [self.host.ready(last.hash)]
        while len(run) < RUN_PAGES and run[0].parent is not None:
            parent = self.host.get(run[0].parent)
            if parent is None or self._is_on_disk(parent):
                break
            run.insert(0, self.host.ready(parent.hash))
        is_written = self.disk.write(run)
        if not is_written:
            self._resting_until_s = time.monotonic() + _REST_S
        return is_written

    def put(self, blocks: Sequence[BlockBytes]) -> int:
        """Blocks that were in no cache, into host memory; takes the store's lock by itself. Those that are there become
        the most recently used ones.

        Args:
            blocks: each behind the one before it; ``data`` on any device.

        Returns:
            How many are in host memory now: fewer where others that are being read leave no room or, if there is no
            disk tier, those before them.
        """
        kept = 0
        with self._beginning_stays(blocks) as held:
            for block in blocks:
                with self._lock:
                    is_useless = held is not None and block.parent is not None and block.parent not in self.host
                    if block.hash in self.host:
                        self.host.touch(block.hash)
                    elif is_useless or not self._put_bytes(block):
                        self._dropped += 1
                        continue
                    else:
                        self._taken += 1
                    kept += 1
                    if held is not None:
                        self.host.hold(block.hash, 1)
                        held.append(block.hash)
        return kept

    @contextmanager
    def _beginning_stays(self, blocks: Sequence[BlockBytes]) -> Iterator[list[bytes] | None]:
        """Where there is no disk tier, blocks that are put push out none of those that they stand on: what has gone is
        nowhere then, and what stands on it is of no use.

        Yields:
            Blocks that stay, for more of them; None: they need not.
        """
        if self.disk is not None or not blocks:
            yield None
            return
        held: list[bytes] = []
        with self._lock:
            one = blocks[0].parent
            while one is not None and (block := self.host.get(one)) is not None:
                self.host.hold(one, 1)
                held.append(one)
                one = block.parent
            held.reverse()
        try:
            yield held
        finally:
            with self._lock:
                for one in reversed(held):  # the last one is to go first
                    self.host.hold(one, -1)
                    self.host.touch(one)

    @property
    def is_resting(self) -> bool:
        """Whether a file could not be written less than a second ago: the next one would not be either."""
        return time.monotonic() < self._resting_until_s

    def flush(self) -> int:
        """Write all blocks of host memory that are in no file, until one cannot be written; takes the store's lock by
        itself.

        Returns:
            How many of its blocks are in no file then: none, but for a full disk, or no disk tier.
        """
        with self._lock:
            deepest_first = sorted(self.host.all(), key=lambda block: -block.depth)
        for block in deepest_first:
            with self._lock:  # others may go on between two files
                if block.hash in self.host and not self._is_on_disk(block) and not self._write(block):
                    break
        with self._lock:
            return sum(not self._is_on_disk(block) for block in self.host.all())

    def close(self) -> None:
        """Wait for what is read and copied."""
        self._reader.close()
        with self._lock:
            self.host.copies.release_copied()

    # Up --------------------------------------------------------------------------------------------------------------

    def fetch(self, store: PrefixStore, match: Match, tokens: Tokens, *, session: str | None = None) -> Match:
        """What is missing behind a match comes back into new pages of the cache, as far as tiers have it.

        On CUDA the host does not wait for the copies; what is enqueued next comes behind them.

        Args:
            tokens: of the prompt that the match is of.
            session: as of :meth:`~kvpack.runtime.kv.prefix_store.PrefixStore.bring_back`.

        Returns:
            The match and the blocks behind it that are cached now.

        Raises:
            CacheInputError: the midst of a CUDA graph's capture. Nothing has changed.
        """
        pages = token_pages(tokens)[match.pages : match.pages + len(match.missing)]
        room = None if store.capacity_bytes is None else store.capacity_bytes - sum(b.size_bytes for b in match.blocks)
        with store.lock:
            self.host.copies.settle()
            found = self._found(match.missing, pages, room)
            if not found:
                return match
            with self._reading(found), store.guarded(match):
                entries = self._new_pages(found, match.pages)
                found = found[: entries.shape[-1]]
                if not found:
                    return match
                try:
                    self.host.copies.to_pages([block.data for block in found], entries)
                except BaseException:
                    self._cache.release(entries)
                    raise
                ids = np.frombuffer(b"".join(block.tokens for block in found), "<i4")
                longer = store.bring_back(match, ids, entries, session=session)  # whose they are from now on
            self._count(found, longer)
            return longer

    @contextmanager
    def reading(self, hashes: Sequence[bytes], pages: Sequence[bytes]) -> Iterator[list[BlockBytes]]:
        """Blocks of a chain, from the first one on as far as tiers have them, for who puts them into no cache.

        They stay where they are until the context ends. Takes the store's lock by itself.

        Args:
            pages: the tokens that the blocks have to be of.
        """
        held: list[bytes] = []
        found: list[BlockBytes] = []
        try:
            with self._lock:
                found = self._found(hashes, pages, None)
                in_host = [self.host.get(block.hash) is block for block in found]
                # All of these first: what is put beside them must not take their place.
                for block in (block for block, is_there in zip(found, in_host, strict=True) if is_there):
                    self.host.ready(block.hash)
                    self.host.hold(block.hash, 1)
                    held.append(block.hash)
                for place in [place for place, is_there in enumerate(in_host) if not is_there]:
                    block = found[place]
                    if block.hash not in self.host and self._put_bytes(block):  # to be decoded no other time
                        found[place] = self.host.ready(block.hash)
                        self.host.hold(block.hash, 1)
                        held.append(block.hash)
                self._host_hits += sum(in_host)
                self._disk_hits += len(found) - sum(in_host)
                self._fetched_bytes += sum(block.data.numel() for block in found)
            yield found
        finally:
            with self._lock:
                for one in held:
                    self.host.hold(one, -1)
            self.touch(hashes[: len(found)])

    def touch(self, hashes: Sequence[bytes]) -> None:
        """Blocks of a chain have been used; takes the store's lock by itself."""
        # The last block first: it is to go before those that it stands on.
        with self._lock:
            for one in reversed(hashes):
                self.host.touch(one)
        if self.disk is not None:
            self.disk.touch(list(reversed(hashes)))

    def prefetch(self, store: PrefixStore, match: Match, tokens: Tokens) -> Future[int]:
        """Begin to read what files have behind a match into host memory; files are read without the store's lock.

        Returns:
            Will have how many of the prompt's tokens are in the cache or in host memory.
        """
        pages = token_pages(tokens)[match.pages : match.pages + len(match.missing)]
        return self._reader.executor.submit(self._prefetched, store, match, pages)

    def _prefetched(self, store: PrefixStore, match: Match, pages: Sequence[bytes]) -> int:
        held: list[bytes] = []  # or the last ones of a long chain would push out the first ones
        try:
            while (place := len(held)) < len(pages):
                with store.lock:
                    if (known := self.host.get(match.missing[place])) is not None and known.tokens == pages[place]:
                        self.host.hold(known.hash, 1)
                        held.append(known.hash)
                        continue
                if self.disk is None or not (read := self.disk.read(match.missing[place:], pages[place:])):
                    break
                with store.lock:
                    for block in read:
                        if block.hash not in self.host and not self._put_bytes(block):
                            return (match.pages + len(held)) * PAGE_TOKENS
                        self.host.hold(block.hash, 1)
                        held.append(block.hash)
            return (match.pages + len(held)) * PAGE_TOKENS
        finally:
            with store.lock:
                for one in reversed(held):
                    self.host.hold(one, -1)
                    self.host.touch(one)

    def _put_bytes(self, block: BlockBytes) -> bool:
        return self._make_room(block.data.numel()) and self.host.put_bytes(block)

    def _found(self, hashes: Sequence[bytes], pages: Sequence[bytes], room: int | None) -> list[BlockBytes]:
        """Blocks of a chain, from the first one on, of at most so many bytes."""
        found: list[BlockBytes] = []
        size_bytes = 0
        while (place := len(found)) < len(hashes):
            in_host = self.host.get(hashes[place])
            if in_host is not None and in_host.tokens == pages[place]:
                read = [in_host]
            elif self.disk is None or not (read := self.disk.read(hashes[place:], pages[place:])):
                break
            for block in read:
                size_bytes += block.data.numel()
                if room is not None and size_bytes > room:
                    return found
                found.append(block)
        return found

    @contextmanager
    def _reading(self, blocks: Sequence[BlockBytes]) -> Iterator[None]:
        """Blocks of host memory stay where they are: memory for new pages may come from evicting others."""
        held = [block.hash for block in blocks if self.host.get(block.hash) is block]
        for one in held:
            self.host.hold(one, 1)
        try:
            yield
        finally:
            for one in held:
                self.host.hold(one, -1)

    def _new_pages(self, blocks: Sequence[BlockBytes], first_page: int) -> Ints:
        """Pages for blocks, for fewer of them where memory ends."""
        formats = np.stack([block.formats for block in blocks], -1)
        count = len(blocks)
        while count:
            try:
                return self._cache.new_pages(formats[..., :count], first_page=first_page)
            except CacheFullError:
                self._refused += count - count // 2
                count //= 2
        return np.empty((*formats.shape[:2], 0), np.int64)

    def _count(self, found: Sequence[BlockBytes], longer: Match) -> None:
        in_host = [self.host.get(block.hash) is block for block in found]
        self._host_hits += sum(in_host)
        self._disk_hits += len(found) - sum(in_host)
        self._fetched_bytes += sum(block.data.numel() for block in found)
        # The last block first: it is to go before those that it stands on.
        for block in reversed(found):
            self.host.touch(block.hash)
        if self.disk is not None:
            self.disk.touch([block.hash for block in reversed(found)])
        importance = {block.hash: block.importance for block in found}
        for of_store in longer.blocks[-len(found) :]:
            if of_store.importance is None:
                of_store.importance = importance.get(of_store.hash)

    # What there is ---------------------------------------------------------------------------------------------------

    def metrics(self) -> TierMetrics:
        """All that is counted, at this moment."""
        disk = self.disk
        return TierMetrics(
            host_hit_pages=self._host_hits,
            disk_hit_pages=self._disk_hits,
            host_blocks=len(self.host),
            host_bytes=self.host.used_bytes,
            host_capacity_bytes=self.host.capacity_bytes,
            disk_blocks=0 if disk is None else len(disk),
            disk_bytes=0 if disk is None else disk.used_bytes,
            disk_capacity_bytes=None if disk is None else disk.capacity_bytes,
            fetched_bytes=self._fetched_bytes,
            taken_blocks=self._taken,
            dropped_blocks=self._dropped,
            refused_pages=self._refused,
            written_files=0 if disk is None else disk.written_files,
            failed_writes=0 if disk is None else disk.failed_writes,
            damaged_files=0 if disk is None else disk.damaged_files,
            foreign_files=0 if disk is None else disk.foreign_files,
        )
