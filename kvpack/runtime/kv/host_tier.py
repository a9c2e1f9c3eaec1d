"""Evicted blocks of prefixes in host memory: their pages' bytes as they are, in an arena of bounded size.

On CUDA the arena is pinned, and pages are copied on a stream of its own, each block by one transfer. A page is released
only behind its copy, which is waited for when memory ends (:meth:`PageCopies.release_copied`).
"""

from __future__ import annotations

from bisect import insort
from collections import Counter, OrderedDict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from kvpack.errors import CacheFullError
from kvpack.runtime.device.upload import pinned_memory, side_stream
from kvpack.runtime.kv.cache import KVCache
from kvpack.runtime.kv.page_holders import Kind
from kvpack.runtime.kv.page_table import Ints

if TYPE_CHECKING:
    from torch.cuda import Event

_ALIGNMENT_BYTES = 64


@dataclass(frozen=True, eq=False)
class BlockBytes:
    """A block outside of a cache.

    Attributes:
        hash, parent, depth, tokens: as of :class:`~kvpack.runtime.kv.prefix_store.Block`; ``parent`` is a hash,
            None of a first block.
        formats: u8 [layers, 2], of its pages.
        data: u8 [bytes] on the host, the pages one after another: layer by layer, K before V.
        importance: fp32 [layers] twice, or None.
    """

    hash: bytes
    parent: bytes | None
    depth: int
    tokens: bytes
    formats: npt.NDArray[np.uint8]
    data: torch.Tensor
    importance: tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]] | None = None


class Arena:
    """Ranges of one piece of memory, first fit.

    >>> arena = Arena(256)
    >>> arena.allocate(100), arena.allocate(64), arena.allocate(65)
    (0, 128, None)
    >>> arena.free(0, 100)
    >>> arena.allocate(65)
    0
    """

    def __init__(self, size_bytes: int) -> None:
        end = size_bytes // _ALIGNMENT_BYTES * _ALIGNMENT_BYTES
        self._free = [(0, end)] if end else []  # (begin, end), in order, never adjacent
        self.used_bytes = 0

    def allocate(self, size_bytes: int) -> int | None:
        """Where a range begins, a multiple of 64; None: no gap is wide enough."""
        size = self.rounded(size_bytes)
        for place, (begin, end) in enumerate(self._free):
            if end - begin >= size:
                self._free[place : place + 1] = [(begin + size, end)] if end - begin > size else []
                self.used_bytes += size
                return begin
        return None

    def has_room(self, size_bytes: int) -> bool:
        size = self.rounded(size_bytes)
        return any(end - begin >= size for begin, end in self._free)

    def free(self, begin: int, size_bytes: int) -> None:
        """Give back a range that has been allocated with this size."""
        size = self.rounded(size_bytes)
        insort(self._free, (begin, begin + size))
        self.used_bytes -= size
        place = self._free.index((begin, begin + size))
        if place + 1 < len(self._free) and self._free[place][1] == self._free[place + 1][0]:
            self._free[place : place + 2] = [(self._free[place][0], self._free[place + 1][1])]
        if place and self._free[place - 1][1] == self._free[place][0]:
            self._free[place - 1 : place + 1] = [(self._free[place - 1][0], self._free[place][1])]

    @staticmethod
    def rounded(size_bytes: int) -> int:
        """What a range of so many bytes takes."""
        return -(-size_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


class PageCopies:
    """Copies between a cache's pages and host memory: on CUDA on a stream of its own, else at once.

    It holds the pages whose copies are under way.
    """

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache
        self._stream = side_stream(cache.device)
        self._pending: deque[tuple[Event, Ints]] = deque()

    def to_host(self, entries: Ints, target: torch.Tensor, *, may_hold: bool) -> Event | None:
        """Copy pages, one after another, to pinned memory u8 [bytes].

        Args:
            may_hold: whether the pages may be held until they are copied; else what the cache does next waits.

        Returns:
            Recorded behind the copy; None: it is done.
        """
        pages = [page.view(-1) for page in self._cache.read_pages(entries)]
        if self._stream is None:
            torch.cat(pages, out=target)
            return None
        current = torch.cuda.current_stream(self._cache.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            try:
                target.copy_(torch.cat(pages), non_blocking=True)
            except torch.OutOfMemoryError:  # one transfer a page needs none
                torch._foreach_copy_(list(target.split([len(page) for page in pages])), pages, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record(self._stream)
        if may_hold:
            self._cache.retain(entries)
            self._pending.append((copied, entries.reshape(-1).copy()))
        else:
            current.wait_event(copied)
        return copied

    def to_pages(self, sources: Sequence[torch.Tensor], entries: Ints) -> None:
        """Fill pages, i64 [layers, 2, blocks], from the bytes of as many blocks. What is enqueued next comes behind."""
        if self._stream is None:
            self._put(sources, entries)
            return
        current = torch.cuda.current_stream(self._cache.device)
        self._stream.wait_stream(current)  # what had the pages before
        try:
            with torch.cuda.stream(self._stream):
                try:
                    self._put([one.to(self._cache.device, non_blocking=True) for one in sources], entries)
                except torch.OutOfMemoryError:
                    self._put(sources, entries)
        finally:
            current.wait_stream(self._stream)

    def _put(self, sources: Sequence[torch.Tensor], entries: Ints) -> None:
        for place, source in enumerate(sources):
            pages = [page.view(-1) for page in self._cache.read_pages(entries[..., place])]
            torch._foreach_copy_(pages, list(source.split([len(page) for page in pages])), non_blocking=True)

    def wait_for_reads(self) -> None:
        """Wait until all host memory that copies read from, or write to, can be written to."""
        if self._stream is not None:
            self._stream.synchronize()

    def settle(self) -> None:
        """Release the pages that have been copied."""
        while self._pending and self._pending[0][0].query():
            self._cache.release(self._pending.popleft()[1])

    def release_copied(self) -> Counter[Kind]:
        """Wait for all copies, and release their pages. Returns how many of each kind have come free."""
        freed: Counter[Kind] = Counter()
        while self._pending:
            copied, entries = self._pending.popleft()
            copied.synchronize()
            for entry in entries.tolist():
                info = self._cache.pools.info(entry)
                freed[info.side, info.format] += self._cache.release(np.array([entry])) > 0
        return freed


class _Kept:
    """A block in the arena. ``readers``: it must stay where it is. ``copied``: recorded when its bytes are there."""

    __slots__ = ("begin", "block", "copied", "readers")

    def __init__(self, block: BlockBytes, begin: int, copied: Event | None) -> None:
        self.block, self.begin, self.copied, self.readers = block, begin, copied, 0

    def ready(self) -> BlockBytes:
        """The block, once its bytes are there for the host to read."""
        if self.copied is not None:
            self.copied.synchronize()
            self.copied = None
        return self.block


class HostTier:
    """Blocks in host memory, the least recently used first.

    The caller guards it with a lock.

    Args:
        cache: whose pages they are.
        capacity_bytes: of the arena, which is allocated here.

    Raises:
        CacheFullError: the host does not provide it.
    """

    def __init__(self, cache: KVCache, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.copies = PageCopies(cache)
        self._cache = cache
        try:
            self._memory = (
                pinned_memory(capacity_bytes, cache.device)
                if cache.device.type == "cuda"
                else torch.empty(capacity_bytes, dtype=torch.uint8, device="cpu")
            )
        except RuntimeError as error:
            raise CacheFullError(f"the host has no memory for host_bytes={capacity_bytes}: {error}") from None
        self._arena = Arena(capacity_bytes)
        self._kept: OrderedDict[bytes, _Kept] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def __contains__(self, block_hash: bytes) -> bool:
        return block_hash in self._kept

    @property
    def used_bytes(self) -> int:
        """Of all blocks, each rounded up to 64."""
        return self._arena.used_bytes

    def has_room(self, size_bytes: int) -> bool:
        """Whether there is a gap of so many bytes."""
        return self._arena.has_room(size_bytes)

    def longest_chain(self, first_bytes: int, next_bytes: int) -> int:
        """How many blocks of one chain have room, if the first takes so many bytes, and each behind it so many."""
        room = self.capacity_bytes // _ALIGNMENT_BYTES * _ALIGNMENT_BYTES - Arena.rounded(first_bytes)
        return 0 if room < 0 else 1 + room // Arena.rounded(next_bytes)

    def all(self) -> list[BlockBytes]:
        """All blocks, as of :meth:`get`."""
        return [kept.block for kept in self._kept.values()]

    def get(self, block_hash: bytes) -> BlockBytes | None:
        """A block whose bytes are there for copies to the device, or will be when these are reached."""
        kept = self._kept.get(block_hash)
        return None if kept is None else kept.block

    def ready(self, block_hash: bytes) -> BlockBytes:
        """A block whose bytes are there."""
        return self._kept[block_hash].ready()

    def put(self, block: BlockBytes, entries: Ints, *, may_hold: bool) -> bool:
        """Copy a block's pages (``block.data`` says nothing yet). False: no gap is wide enough."""
        size = int(sum(map(self._cache.pools.bytes_of, entries.reshape(-1).tolist())))
        if (begin := self._arena.allocate(size)) is None:
            return False
        data = self._memory[begin : begin + size]
        try:
            copied = self.copies.to_host(entries, data, may_hold=may_hold)
        except BaseException:
            self._arena.free(begin, size)
            raise
        self._keep(block, data, begin, copied)
        return True

    def put_bytes(self, block: BlockBytes) -> bool:
        """Copy a block's bytes. False: no gap is wide enough."""
        size = block.data.numel()
        if (begin := self._arena.allocate(size)) is None:
            return False
        self.copies.wait_for_reads()
        data = self._memory[begin : begin + size]
        data.copy_(block.data)
        self._keep(block, data, begin, None)
        return True

    def _keep(self, block: BlockBytes, data: torch.Tensor, begin: int, copied: Event | None) -> None:
        kept = BlockBytes(block.hash, block.parent, block.depth, block.tokens, block.formats, data, block.importance)
        self._kept[block.hash] = _Kept(kept, begin, copied)

    def touch(self, block_hash: bytes) -> None:
        """It is the most recently used one."""
        if block_hash in self._kept:
            self._kept.move_to_end(block_hash)

    def oldest(self) -> Iterator[BlockBytes]:
        """Blocks that may go, as of :meth:`get`, the least recently used first."""
        return (kept.block for kept in self._kept.values() if not kept.readers)

    def hold(self, block_hash: bytes, by: int) -> None:
        """A block must stay where it is for one more (1), or one fewer (−1)."""
        self._kept[block_hash].readers += by

    def is_held(self, block_hash: bytes) -> bool:
        return self._kept[block_hash].readers > 0

    def drop(self, block_hash: bytes) -> None:
        """Forget a block."""
        kept = self._kept.pop(block_hash)
        self._arena.free(kept.begin, kept.block.data.numel())
