"""The memory of a paged KV cache: a pool for each side and format, so that kernels find pages of one kind side by side.

A pool hands out pages of one size from slabs. It grows by a slab when it has no free page left; slabs are never moved
nor given back while the pools live. Where memory has ended, and someone can be asked for it
(:attr:`PagePools.reclaim`), a slab without a page in use is cut anew, into pages of another kind. A freed page is the
next to be handed out: on CUDA that is right only behind what still reads it, so all that uses the pages must be
enqueued on one stream.

A page is known by its *entry*, what page tables hold: where it begins, with its format in the low bits. On CUDA that is
an address. On the CPU it counts bytes from :attr:`PagePools.pages`, a tensor over as much address space as the pools
can ever need, of which the system provides what has been written to. No page begins at 0, so 0 is no entry.
"""

from __future__ import annotations

import mmap
import os
from array import array
from bisect import bisect_right, insort
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from kvpack.errors import CacheFullError, PageEntryError
from kvpack.format.pages import PageFormat, PageLayout, Side
from kvpack.runtime.device.upload import pinned_memory

SLAB_BYTES = 4 << 20
_LEAST_SLAB_PAGES = 8
# Where the first slab begins on the CPU.
_ARENA_START = 64


class PageOwner(NamedTuple):
    """Where a page belongs: its layer, and which page (0, 1, …) of a sequence it is.

    Which sequences hold it is the page table's to say: those that begin with the same tokens can hold the same page at
    the same place, and count as one of the ``references`` of :class:`PageInfo`.
    """

    layer: int
    page: int


@dataclass(frozen=True)
class PageInfo:
    """What the pools know of a page in use.

    Attributes:
        references: how many hold it: the page table, as one, and others.
        held: how many of them are others (:mod:`kvpack.runtime.kv.page_holders`).
    """

    side: Side
    format: PageFormat
    owner: PageOwner
    references: int
    held: int = 0

    @property
    def is_in_table(self) -> bool:
        return self.references > self.held


@dataclass(frozen=True)
class PageArrays:
    """:class:`PageInfo` of several pages, arrays of as many: i64; and the bytes of each."""

    side: npt.NDArray[np.int64]
    format: npt.NDArray[np.int64]
    layer: npt.NDArray[np.int64]
    page: npt.NDArray[np.int64]
    references: npt.NDArray[np.int64]
    held: npt.NDArray[np.int64]
    bytes: npt.NDArray[np.int64]

    @property
    def is_in_table(self) -> npt.NDArray[np.bool_]:
        return self.references > self.held


class _Slab:
    """Pages of one kind in one piece of memory. Of pages not in use, ``references`` and ``held`` are 0."""

    def __init__(self, memory: torch.Tensor, base: int, layout: PageLayout, num_kv_heads: int) -> None:
        self.memory, self.base, self.layout = memory, base, layout
        self.first = base | int(layout.format)  # the first page's entry
        self.block_bytes = layout.block_bytes
        self.page_bytes = num_kv_heads * self.block_bytes
        self.page_count = memory.numel() // self.page_bytes
        # One number is set at a time, for which NumPy's arrays are slow.
        self.layers, self.pages = (array("i", [-1]) * self.page_count for _ in range(2))
        self.references, self.held = (array("i", [0]) * self.page_count for _ in range(2))
        self.in_use = 0
        # The same memory, for many at a time.
        self.many_layers, self.many_pages, self.many_references, self.many_held = (
            np.frombuffer(numbers, np.int32) for numbers in (self.layers, self.pages, self.references, self.held)
        )

    def entries(self) -> range:
        return range(self.first, self.first + self.page_count * self.page_bytes, self.page_bytes)


# A slab, which of some entries it has, and which of its pages these are.
_Located = tuple[_Slab, npt.NDArray[np.int64], npt.NDArray[np.int64]]


class _Pool:
    def __init__(self, layout: PageLayout, page_bytes: int, slab_bytes: int) -> None:
        self.layout, self.page_bytes = layout, page_bytes
        self.most_slab_pages = max(_LEAST_SLAB_PAGES, slab_bytes // page_bytes)
        self.slabs: list[_Slab] = []
        self.free: list[int] = []  # entries; the last is the next
        self.in_use = 0

    def growth(self, missing: int, *, sparing: bool) -> list[int]:
        """Pages of the slabs that bring so many pages: at least as many as there are, so that slabs of a small cache
        are small and those of a large one few. `sparing`: no more than are missing."""
        slabs: list[int] = []
        held = sum(slab.page_count for slab in self.slabs)
        while missing > 0:
            wanted = missing if sparing else max(_LEAST_SLAB_PAGES, held, missing)
            slabs.append(min(wanted, self.most_slab_pages))
            held += slabs[-1]
            missing -= slabs[-1]
        return slabs


class PagePools:
    """Pages of a KV cache on one device, for one number of heads and one head dimension.

    Args:
        num_kv_heads, head_dim, key_order: of a page (:class:`~kvpack.format.pages.PageLayout`).
        device: where the pages lie.
        max_bytes: of all slabs. On the CPU, without it, as much as the machine has.
        slab_bytes: by how much a pool grows at most; by 8 pages, if they are larger. At first it grows by 8 pages,
            then by as many as it has; by what is asked for alone where ``max_bytes`` leaves no more.
        on_host: whether quantized pages lie in host memory. On CUDA it is pinned, and their entries are addresses that
            kernels read and write, over the bus. On the CPU there is no difference.

    Attributes:
        pages: what entries count from: u8, on the CPU alone; None on CUDA.
        reclaim: asked once when memory has ended, with how many pages of each kind have to become free, and their
            bytes; what it says is whether they have. None: nobody is asked.

    Raises:
        PageError: a head_dim or an order that pages cannot have.
        CacheFullError: the system does not provide the address space.
    """

    def __init__(
        self,
        num_kv_heads: int,
        head_dim: int,
        device: torch.device | str,
        *,
        max_bytes: int | None = None,
        slab_bytes: int = SLAB_BYTES,
        key_order: tuple[int, ...] = (),
        on_host: bool = False,
    ) -> None:
        self.num_kv_heads, self.head_dim, self.device = num_kv_heads, head_dim, torch.device(device)
        self._on_host = on_host
        self._pools = {
            (side, page_format): _Pool(layout, num_kv_heads * layout.block_bytes, slab_bytes)
            for side in Side
            for page_format in PageFormat
            for layout in [PageLayout(side, page_format, head_dim, key_order)]
        }
        self.pages: torch.Tensor | None = None
        self._arena_end = _ARENA_START
        if self.device.type == "cpu":
            if max_bytes is None:
                max_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") - _ARENA_START
            self.pages = _address_space(_ARENA_START + max_bytes)
        self.max_bytes = max_bytes
        self.reclaim: Callable[[Mapping[tuple[Side, PageFormat], int], int], bool] | None = None
        self._bytes_allocated = self._bytes_in_use = self._host_bytes = 0
        # All slabs, by where they begin.
        self._bases: list[int] = []
        self._slab_at: dict[int, _Slab] = {}

    @property
    def bytes_allocated(self) -> int:
        """Of all slabs."""
        return self._bytes_allocated

    @property
    def host_bytes(self) -> int:
        """Of those slabs that lie in host memory."""
        return self._host_bytes

    def is_on_host(self, page_format: PageFormat) -> bool:
        """Whether pages of a format lie in host memory."""
        return self._on_host and page_format.is_quantized

    @property
    def bytes_in_use(self) -> int:
        """Of the pages that have been handed out."""
        return self._bytes_in_use

    def page_bytes(self, side: Side, page_format: PageFormat) -> int:
        """One page, of all heads."""
        return self._pools[side, page_format].page_bytes

    def pages_in_use(self, side: Side, page_format: PageFormat) -> int:
        return self._pools[side, page_format].in_use

    def reserve(self, counts: Mapping[tuple[Side, PageFormat], int]) -> None:
        """Grow until so many pages can be allocated, of all pools that are named: all of it or nothing.

        Raises:
            CacheFullError: the slabs would take more than ``max_bytes``, or than the device has. Nothing has changed.
        """
        if not (missing := self._missing(counts)):
            return
        try:
            self._grow(counts)
        except CacheFullError:
            if self.reclaim is None:
                raise
            if not self._cut_anew(counts):
                if not self.reclaim(*self._lacking(missing)):
                    raise
                self._cut_anew(counts)
            self._grow(counts)

    def _lacking(self, missing: dict[tuple[Side, PageFormat], int]) -> tuple[dict[tuple[Side, PageFormat], int], int]:
        """Of missing pages, those that ``max_bytes`` leaves no room for, and their bytes."""
        left = 0 if self.max_bytes is None else self.max_bytes - self._bytes_allocated
        lacking, lacking_bytes = {}, 0
        for kind, count in missing.items():
            page_bytes = self._pools[kind].page_bytes
            has_room = min(count, left // page_bytes)
            left -= has_room * page_bytes
            if count > has_room:
                lacking[kind] = count - has_room
                lacking_bytes += lacking[kind] * page_bytes
        return lacking, lacking_bytes

    def _missing(self, counts: Mapping[tuple[Side, PageFormat], int]) -> dict[tuple[Side, PageFormat], int]:
        """How many pages more than are free these are, of kinds that have too few."""
        return {
            kind: count - len(free) for kind, count in counts.items() if count > len(free := self._pools[kind].free)
        }

    def _cut_anew(self, counts: Mapping[tuple[Side, PageFormat], int]) -> bool:
        """Cut slabs without a page in use into missing pages. False, and nothing has changed, where that is too few."""
        missing, spare = self._missing(counts), []
        for kind, pool in self._pools.items():
            can_go = len(pool.free) - counts.get(kind, 0)
            for slab in pool.slabs:
                if not slab.in_use and slab.page_count <= can_go:
                    can_go -= slab.page_count
                    spare.append(slab)
        spare.sort(key=lambda slab: slab.memory.numel())
        cut: list[tuple[_Slab, _Pool]] = []
        for kind in sorted(missing, key=lambda kind: -self._pools[kind].page_bytes):
            pool, on_host = self._pools[kind], self.is_on_host(kind[1])
            fitting = [slab for slab in spare if self.is_on_host(slab.layout.format) == on_host]
            while missing[kind] > 0 and fitting and fitting[-1].memory.numel() >= pool.page_bytes:
                slab = fitting.pop()
                spare.remove(slab)
                cut.append((slab, pool))
                missing[kind] -= slab.memory.numel() // pool.page_bytes
        if self._lacking({kind: count for kind, count in missing.items() if count > 0})[0]:
            return False
        for slab, pool in cut:
            before = self._pools[slab.layout.side, slab.layout.format]
            before.slabs.remove(slab)
            gone = slab.entries()
            before.free = [entry for entry in before.free if entry not in gone]
            made = self._slab_at[slab.base] = _Slab(slab.memory, slab.base, pool.layout, self.num_kv_heads)
            pool.slabs.append(made)
            pool.free[:0] = reversed(made.entries())
        return True

    def _grow(self, counts: Mapping[tuple[Side, PageFormat], int]) -> None:
        """
        Raises:
            CacheFullError: as of :meth:`reserve`.
        """
        missing = [(self._pools[kind], count) for kind, count in self._missing(counts).items()]
        for sparing in (False, True):
            grown = [(pool, pages) for pool, count in missing for pages in pool.growth(count, sparing=sparing)]
            needed = sum(pages * pool.page_bytes for pool, pages in grown)
            if self.max_bytes is None or self._bytes_allocated + needed <= self.max_bytes:
                break
        else:
            raise CacheFullError(
                f"{sum(counts.values())} pages need {needed} bytes in new slabs; {self._bytes_allocated} of at most "
                f"{self.max_bytes} bytes are allocated"
            )
        arena_end = self._arena_end
        try:
            slabs = [self._new_slab(pool, pages) for pool, pages in grown]
        except torch.OutOfMemoryError as error:
            self._arena_end = arena_end
            raise CacheFullError(
                f"{self.device} has no memory for {needed} bytes in new slabs, beside the {self._bytes_allocated} "
                f"that are allocated: {error}"
            ) from None
        for slab in slabs:
            pool = self._pools[slab.layout.side, slab.layout.format]
            pool.slabs.append(slab)
            # In front of the free pages, so that slabs in use are filled first.
            pool.free[:0] = reversed(slab.entries())
            insort(self._bases, slab.base)
            self._slab_at[slab.base] = slab
        self._bytes_allocated += needed
        self._host_bytes += sum(pages * pool.page_bytes for pool, pages in grown if self.is_on_host(pool.layout.format))

    def _new_slab(self, pool: _Pool, pages: int) -> _Slab:
        size_bytes = pages * pool.page_bytes
        if self.pages is None and self.is_on_host(pool.layout.format):
            try:
                memory = pinned_memory(size_bytes, self.device)
            except RuntimeError as error:  # of CUDA, whatever its name is
                raise CacheFullError(f"the host has no memory for {size_bytes} pinned bytes: {error}") from None
            return _Slab(memory, memory.data_ptr(), pool.layout, self.num_kv_heads)
        return _Slab(*self._device_memory(size_bytes), pool.layout, self.num_kv_heads)

    def _device_memory(self, size_bytes: int) -> tuple[torch.Tensor, int]:
        """Zeros, and what entries of pages there count from."""
        if self.pages is None:
            memory = torch.zeros(size_bytes, dtype=torch.uint8, device=self.device)
            return memory, memory.data_ptr()
        base = self._arena_end
        self._arena_end += size_bytes
        return self.pages[base : self._arena_end], base

    def new_memory(self, size_bytes: int) -> tuple[torch.Tensor, int]:
        """Device memory for copies of pages, u8, which counts as slabs do, and what their entries count from.

        Args:
            size_bytes: a multiple of 16.

        Raises:
            CacheFullError: as of :meth:`reserve`.
        """
        if self.max_bytes is not None and self._bytes_allocated + size_bytes > self.max_bytes:
            raise CacheFullError(
                f"{size_bytes} bytes are needed for copies of pages; {self._bytes_allocated} of at most "
                f"{self.max_bytes} bytes are allocated"
            )
        try:
            made = self._device_memory(size_bytes)
        except torch.OutOfMemoryError as error:
            raise CacheFullError(f"{self.device} has no memory for {size_bytes} bytes: {error}") from None
        self._bytes_allocated += size_bytes
        return made

    def allocate(self, side: Side, page_format: PageFormat, owner: PageOwner, *, is_held: bool = False) -> int:
        """A page's entry. What the page holds is what it held before; zeros if it has never been used, but of pages in
        host memory, which may hold anything.

        Args:
            is_held: by someone other than the page table.

        Raises:
            CacheFullError: as :meth:`reserve`.
        """
        pool = self._pools[side, page_format]
        if not pool.free:
            self.reserve({(side, page_format): 1})
        entry = pool.free.pop()
        slab, number = self._find(entry)
        slab.references[number], slab.held[number] = 1, int(is_held)
        slab.layers[number], slab.pages[number] = owner
        slab.in_use += 1
        pool.in_use += 1
        self._bytes_in_use += pool.page_bytes
        return entry

    def allocate_held(
        self, side: Side, page_format: PageFormat, layers: npt.NDArray[np.intp], pages: npt.NDArray[np.intp]
    ) -> npt.NDArray[np.int64]:
        """:meth:`allocate` of many pages of one kind, held by someone other than the page table, i64 [n].

        Args:
            layers, pages: [n], whose each is.
        """
        pool, count = self._pools[side, page_format], len(layers)
        if count > len(pool.free):
            self.reserve({(side, page_format): count})
        entries = np.array(pool.free[: -count - 1 : -1], np.int64)
        del pool.free[len(pool.free) - count :]
        for slab, members, numbers in self._by_slab(entries):
            slab.many_references[numbers] = slab.many_held[numbers] = 1
            slab.many_layers[numbers], slab.many_pages[numbers] = layers[members], pages[members]
            slab.in_use += len(members)
        pool.in_use += count
        self._bytes_in_use += count * pool.page_bytes
        return entries

    def free(self, entry: int) -> int:
        """One fewer holds the page; behind the last one's work on the stream, it may be handed out again.

        Returns:
            The bytes that are no longer in use: the page's, or 0 where others hold it.

        Raises:
            PageEntryError: no page in use: freed before, or never handed out by these pools.
        """
        return self._drop(entry, *self._in_use(entry))

    def hold(self, entries: npt.NDArray[np.int64]) -> None:
        """One more holds each of these pages, [n], other than the page table.

        Raises:
            PageEntryError: no page in use. Nothing has changed.
        """
        for slab, _, numbers in list(self._located(entries)):
            np.add.at(slab.many_references, numbers, 1)
            np.add.at(slab.many_held, numbers, 1)

    def release(self, entry: int) -> int:
        """:meth:`free`, of one who has taken the page with :meth:`hold`.

        Raises:
            PageEntryError: no page in use, or nobody but the page table holds it.
        """
        slab, number = self._in_use(entry)
        if not slab.held[number]:
            raise PageEntryError(f"{entry:#x} is released and was not retained: the page table alone holds the page")
        slab.held[number] -= 1
        return self._drop(entry, slab, number)

    def drop_holds(self, entries: npt.NDArray[np.int64], counts: npt.NDArray[np.int64]) -> None:
        """:meth:`release` these pages, [n], each named once, so many times each: others hold them still.

        Raises:
            PageEntryError: no page in use. Nothing has changed.
        """
        for slab, members, numbers in list(self._located(entries)):
            slab.many_references[numbers] -= counts[members]
            slab.many_held[numbers] -= counts[members]

    def is_held(self, entry: int) -> bool:
        """Whether someone other than the page table holds a page; False of one that is not in use."""
        slab, number = self._find(entry)
        return slab.held[number] > 0

    def enter(self, entries: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """The page table holds these pages, [n], each named once, too. Returns of which it did not before.

        Raises:
            PageEntryError: no page in use. Nothing has changed.
        """
        is_new = np.zeros(len(entries), np.bool_)
        for slab, members, numbers in list(self._located(entries)):
            is_new[members] = slab.many_references[numbers] == slab.many_held[numbers]
            slab.many_references[numbers] += is_new[members]
        return is_new

    def _drop(self, entry: int, slab: _Slab, number: int) -> int:
        slab.references[number] -= 1
        if slab.references[number] == 0:
            pool = self._pools[slab.layout.side, slab.layout.format]
            slab.layers[number] = slab.pages[number] = -1
            pool.free.append(entry)
            slab.in_use -= 1
            pool.in_use -= 1
            self._bytes_in_use -= pool.page_bytes
            return pool.page_bytes
        return 0

    def info(self, entry: int) -> PageInfo:
        """What is known of a page in use.

        Raises:
            PageEntryError: no page in use.
        """
        slab, number = self._in_use(entry)
        owner = PageOwner(slab.layers[number], slab.pages[number])
        return PageInfo(slab.layout.side, slab.layout.format, owner, slab.references[number], slab.held[number])

    def infos(self, entries: npt.NDArray[np.int64]) -> PageArrays:
        """:meth:`info` of many pages, [n].

        Raises:
            PageEntryError: one is no page in use.
        """
        found = np.empty((7, len(entries)), np.int64)
        for slab, members, numbers in self._located(entries):
            found[0, members], found[1, members] = slab.layout.side, slab.layout.format
            found[2, members], found[3, members] = slab.many_layers[numbers], slab.many_pages[numbers]
            found[4, members], found[5, members] = slab.many_references[numbers], slab.many_held[numbers]
            found[6, members] = slab.page_bytes
        return PageArrays(*found)

    def bytes_of(self, entry: int) -> int:
        """Of a page in use.

        Raises:
            PageEntryError: no page in use.
        """
        return self._in_use(entry)[0].page_bytes

    def slab(self, entry: int) -> tuple[int, int, int]:
        """The memory that a page lies in: where it begins, how many pages it is cut into, and its bytes.

        Raises:
            PageEntryError: the entry of no page.
        """
        slab, _ = self._find(entry)
        return slab.base, slab.page_count, slab.memory.numel()

    def blocks(self, entry: int) -> torch.Tensor:
        """u8 [heads, block_bytes], a view of a page in use.

        Raises:
            PageEntryError: no page in use.
        """
        slab, number = self._in_use(entry)
        first = number * slab.page_bytes
        return slab.memory[first : first + slab.page_bytes].view(self.num_kv_heads, slab.block_bytes)

    def pages_by_slab(
        self, entries: npt.NDArray[np.int64]
    ) -> Iterator[tuple[PageLayout, npt.NDArray[np.int64], torch.Tensor, npt.NDArray[np.int64]]]:
        """Pages in use, those of a slab together: their layout, which of the entries they are, all pages of the slab,
        u8 [pages, heads, block_bytes], a view, and the numbers of these pages in it.

        Raises:
            PageEntryError: one is no page in use.
        """
        for slab, members, numbers in self._located(entries):
            memory = slab.memory[: slab.page_count * slab.page_bytes]
            yield slab.layout, members, memory.view(-1, self.num_kv_heads, slab.block_bytes), numbers

    def _find(self, entry: int) -> tuple[_Slab, int]:
        """The slab and the page in it."""
        place = bisect_right(self._bases, entry) - 1
        if place >= 0:
            slab = self._slab_at[self._bases[place]]
            number, rest = divmod(entry - slab.first, slab.page_bytes)
            if not rest and 0 <= number < slab.page_count:
                return slab, number
        raise PageEntryError(f"{entry:#x} is the entry of no page of these pools")

    def _located(self, entries: npt.NDArray[np.int64]) -> Iterator[_Located]:
        """Slabs, which of the entries each has, and which of its pages these are.

        Raises:
            PageEntryError: one is no page in use.
        """
        for slab, members, numbers in self._by_slab(entries):
            in_use = slab.many_references[numbers] > 0
            if not in_use.all():
                self._in_use(int(entries[members[~in_use]][0]))
            yield slab, members, numbers

    def _by_slab(self, entries: npt.NDArray[np.int64]) -> Iterator[_Located]:
        """:meth:`_located` of pages, in use or not. Raises PageEntryError."""
        places = np.searchsorted(np.array(self._bases, np.int64), entries, side="right") - 1
        order = np.argsort(places, kind="stable")
        for members in np.split(order, np.flatnonzero(np.diff(places[order])) + 1):
            if not len(members):
                return
            of_slab = entries[members]
            slab, _ = self._find(int(of_slab[0]))
            numbers, rest = np.divmod(of_slab - slab.first, slab.page_bytes)
            is_page = (rest == 0) & (numbers >= 0) & (numbers < slab.page_count)
            if not is_page.all():
                self._find(int(of_slab[~is_page][0]))
            yield slab, members, numbers

    def _in_use(self, entry: int) -> tuple[_Slab, int]:
        slab, number = self._find(entry)
        if not slab.references[number]:
            kind = f"{slab.layout.side.name} in {slab.layout.format.name}"
            raise PageEntryError(f"{entry:#x}, a page of {kind}, is not in use: it has been freed, or not handed out")
        return slab, number


def _address_space(size_bytes: int) -> torch.Tensor:
    """Zeros that take no memory before they are written to."""
    try:
        return torch.frombuffer(mmap.mmap(-1, size_bytes, access=mmap.ACCESS_COPY), dtype=torch.uint8)
    except OSError as error:
        raise CacheFullError(
            f"the system does not provide {size_bytes} bytes of address space ({error}): pass a smaller max_bytes"
        ) from None
