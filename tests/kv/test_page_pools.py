"""Pools of pages: whatever is allocated and freed, in whatever order, they know what is whose."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule
from pool_dump import dump

from kvpack.errors import CacheFullError, PageEntryError
from kvpack.format.pages import ENTRY_FORMAT_BITS, PageFormat, PageLayout, Side

torch = pytest.importorskip("torch")

from kvpack.runtime.kv.page_pools import PageInfo, PageOwner, PagePools  # noqa: E402

HEADS, HEAD_DIM = 2, 32
OWNER = PageOwner(0, 0)
KINDS = [(side, page_format) for side in Side for page_format in PageFormat]
FORMAT_MASK = (1 << ENTRY_FORMAT_BITS) - 1


def small_pools(device: str = "cpu", **options: Any) -> PagePools:
    return PagePools(HEADS, HEAD_DIM, device, **{"max_bytes": 1 << 20, "slab_bytes": 1 << 10, **options})


class Pools(RuleBasedStateMachine):
    """Against a dictionary of what has been handed out."""

    entries: Bundle[int] = Bundle("entries")
    freed: Bundle[int] = Bundle("freed")

    @initialize()
    def begin(self) -> None:
        self.pools = small_pools(max_bytes=500_000)
        self.held: dict[int, PageInfo] = {}
        self.most_allocated = 0
        self.slabs: dict[Any, list[int]] = {}

    @rule(target=entries, kind=st.sampled_from(KINDS), place=st.tuples(*[st.integers(0, 9)] * 2))
    def allocate(self, kind: tuple[Side, PageFormat], place: tuple[int, int]) -> int:
        before = dump(self.pools)
        try:
            entry = self.pools.allocate(*kind, PageOwner(*place))
        except CacheFullError:
            assert dump(self.pools) == before
            return 0
        assert entry not in self.held
        self.held[entry] = PageInfo(*kind, PageOwner(*place), 1)
        return entry

    @rule(counts=st.dictionaries(st.sampled_from(KINDS), st.integers(0, 40)))
    def reserve(self, counts: dict[tuple[Side, PageFormat], int]) -> None:
        before = dump(self.pools)
        try:
            self.pools.reserve(counts)
        except CacheFullError:
            assert dump(self.pools) == before
            return
        assert all(len(self.pools._pools[kind].free) >= count for kind, count in counts.items())

    @rule(target=freed, entry=consumes(entries))
    def free(self, entry: int) -> int:
        if entry in self.held:
            info = self.held.pop(entry)
            assert self.pools.free(entry) == self.pools.page_bytes(info.side, info.format)
        return entry

    @rule(entry=freed)
    def free_again(self, entry: int) -> None:
        if entry in self.held:  # it has been handed out again
            return
        before = dump(self.pools)
        with pytest.raises(PageEntryError):
            self.pools.free(entry)
        assert dump(self.pools) == before

    @rule(entry=st.integers(-(1 << 20), 1 << 20))
    def foreign(self, entry: int) -> None:
        if entry not in self.held:
            with pytest.raises(PageEntryError):
                self.pools.free(entry)

    @invariant()
    def known(self) -> None:
        for entry, info in self.held.items():
            assert self.pools.info(entry) == info
            assert entry & FORMAT_MASK == info.format

    @invariant()
    def bytes_add_up(self) -> None:
        pools = self.pools
        sizes = {entry: pools.page_bytes(info.side, info.format) for entry, info in self.held.items()}
        assert pools.bytes_in_use == sum(sizes.values())
        for kind in KINDS:
            assert pools.pages_in_use(*kind) == sum((info.side, info.format) == kind for info in self.held.values())
        assert pools.bytes_allocated == sum(slab.memory.nbytes for slab in pools._slab_at.values())
        assert pools.bytes_in_use <= pools.bytes_allocated <= 500_000
        spans = sorted((entry & ~FORMAT_MASK, size) for entry, size in sizes.items())
        assert all(first + size <= then for (first, size), (then, _) in pairwise(spans))

    @invariant()
    def slabs_stay(self) -> None:
        for kind, pool in self.pools._pools.items():
            found = [slab.memory.data_ptr() for slab in pool.slabs]
            assert found[: len(self.slabs.get(kind, []))] == self.slabs.get(kind, [])
            self.slabs[kind] = found


TestPools = Pools.TestCase
TestPools.settings = settings(max_examples=40, stateful_step_count=40)


class PoolsThatAsk(Pools):
    """Nobody gives them memory, but they cut empty slabs anew before they say that there is none."""

    @initialize()
    def begin(self) -> None:
        super().begin()
        self.pools.reclaim = lambda missing, missing_bytes: False
        self.memory: set[tuple[int, int]] = set()

    @invariant()
    def slabs_stay(self) -> None:
        """Their memory does."""
        found = [
            (slab.memory.data_ptr(), slab.memory.nbytes) for pool in self.pools._pools.values() for slab in pool.slabs
        ]
        assert len(set(found)) == len(found) == len(self.pools._bases)
        assert self.memory <= set(found)
        self.memory = set(found)

    @invariant()
    def free_pages_are_those_that_nobody_has(self) -> None:
        for pool in self.pools._pools.values():
            pages = {entry for slab in pool.slabs for entry in slab.entries()}
            assert len(pool.free) == len(set(pool.free))
            assert set(pool.free) == pages - self.held.keys()
            assert [slab.in_use for slab in pool.slabs] == [
                sum(entry in self.held for entry in slab.entries()) for slab in pool.slabs
            ]


TestPoolsThatAsk = PoolsThatAsk.TestCase
TestPoolsThatAsk.settings = settings(max_examples=40, stateful_step_count=40)


def test_free_pages_that_are_asked_for_stay() -> None:
    """Slabs of a kind that is asked for in the same call are not cut into another."""
    pools = small_pools(max_bytes=150_000)
    pools.reclaim = lambda missing, missing_bytes: False
    narrow, wide = (Side.K, PageFormat.INT4), (Side.V, PageFormat.FP16)
    pools.reserve({narrow: 40})
    room = (150_000 - pools.bytes_allocated) // pools.page_bytes(*wide)
    before = dump(pools)
    with pytest.raises(CacheFullError):
        pools.reserve({narrow: 40, wide: room + 1})
    assert dump(pools) == before
    pools.reserve({narrow: 32, wide: room + 1})
    assert len(pools._pools[narrow].free) >= 32
    assert len(pools._pools[wide].free) >= room + 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_blocks_are_the_pages_own(kind: tuple[Side, PageFormat], device: str) -> None:
    """Each page of whichever slab has bytes of its own, at its entry, and keeps them."""
    pools, layout = small_pools(device), PageLayout(*kind, HEAD_DIM)
    entries = [pools.allocate(*kind, OWNER) for _ in range(20)]
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (20, HEADS, layout.block_bytes)).astype(np.uint8)
    for number in rng.permutation(20):
        pools.blocks(entries[number]).copy_(torch.from_numpy(blocks[number]))
    for entry, expected in zip(entries, blocks, strict=True):
        found = pools.blocks(entry)
        assert np.array_equal(found.cpu().numpy(), expected)
        first = 0 if pools.pages is None else pools.pages.data_ptr()
        assert found.data_ptr() == first + (entry & ~15)


def test_the_last_freed_is_the_next() -> None:
    pools = small_pools()
    first, second, third = (pools.allocate(Side.K, PageFormat.INT4, OWNER) for _ in range(3))
    pools.free(first)
    pools.free(third)
    assert pools.allocate(Side.K, PageFormat.INT4, OWNER) == third
    assert pools.allocate(Side.K, PageFormat.INT4, OWNER) == first
    assert second not in (first, third)


def test_no_page_begins_at_0_and_new_ones_are_zeros() -> None:
    pools = small_pools()
    entries = [pools.allocate(side, PageFormat.FP16, OWNER) for side in Side]
    assert all(entry > FORMAT_MASK for entry in entries)
    assert pools.pages is not None
    for entry in entries:
        at, size = entry & ~FORMAT_MASK, pools.page_bytes(Side.K, PageFormat.FP16)
        assert pools.blocks(entry).data_ptr() == pools.pages[at:].data_ptr()
        assert not pools.pages[at : at + size].any()


def test_limit_names_the_bytes() -> None:
    pools = small_pools(max_bytes=100_000)
    before = dump(pools)
    with pytest.raises(CacheFullError, match=r"40 pages need 327680 bytes in new slabs; 0 of at most 100000"):
        pools.reserve({(Side.K, PageFormat.INT2): 0, (Side.V, PageFormat.FP16): 40})
    assert dump(pools) == before


def test_a_machine_without_the_address_space() -> None:
    with pytest.raises(CacheFullError, match="pass a smaller max_bytes"):
        small_pools(max_bytes=1 << 60)


@pytest.mark.gpu
def test_a_device_without_the_memory() -> None:
    pools = small_pools("cuda", max_bytes=None, slab_bytes=1 << 44)
    before = dump(pools)
    with pytest.raises(CacheFullError, match="cuda has no memory for"):
        pools.reserve({(Side.K, PageFormat.FP16): 1 << 31})
    assert dump(pools) == before
