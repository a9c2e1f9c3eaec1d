"""Caches whose quantized pages lie in host memory, with slots on the device for those that are attended to."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import emulator
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from emulated_device import emulated_launch  # noqa: E402

from kvpack import CacheFullError, CacheInputError, KVCache, PageFormat  # noqa: E402
from kvpack.format.pages import ENTRY_FORMAT_MASK, PAGE_TOKENS, Side  # noqa: E402
from kvpack.runtime.device import kernels  # noqa: E402
from kvpack.runtime.kv import page_slots  # noqa: E402
from kvpack.runtime.kv.manager import KVManager  # noqa: E402
from kvpack.runtime.kv.page_slots import PageSlots  # noqa: E402

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
KV_HEADS, HEADS, HEAD_DIM = 2, 4, 32
SIZE = (2, KV_HEADS, HEAD_DIM, 4096)
MIXED = [(PageFormat.INT4, PageFormat.INT3), (PageFormat.INT8, PageFormat.FP16)]


def tokens_of(cache: KVCache, rows: int, count: int, seed: int) -> tuple[Any, Any, Any]:
    """q, k and v."""
    x = torch.randn(rows, HEADS + 2 * KV_HEADS, count, HEAD_DIM, generator=torch.Generator().manual_seed(seed))
    q, k, v = x.to(cache.device, cache.dtype).split([HEADS, KV_HEADS, KV_HEADS], 1)
    return q, k, v


def pair(device: str, **options: Any) -> list[KVCache]:
    """Of the same options, with all pages on the device and with eight slots."""
    options = {"formats": PageFormat.INT4, "max_sequences": 3} | options
    return [KVCache(*SIZE, device=device, device_pages=pages, **options) for pages in (None, 8)]


def step(caches: list[KVCache], rows: list[int], count: int, seed: int, pages: int | None = 6) -> list[Any]:
    """In all layers; the outputs of each cache."""
    return [
        torch.stack(
            [c.attend(layer, *tokens_of(c, len(rows), count, seed + layer), rows, pages=pages) for layer in (0, 1)]
        )
        for c in caches
    ]


def assert_same(caches: list[KVCache], rows: list[int], count: int, seed: int, pages: int | None = 6) -> None:
    expected, found = step(caches, rows, count, seed, pages)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", [{}, {"formats": MIXED}, {"formats": None, "budget": 0.4}], ids=str)
def test_the_same_results_as_with_all_pages_on_the_device(options: dict[str, Any], device: str) -> None:
    caches = pair(device, **options)
    for row, count in enumerate((900, 100, 1500)):
        assert_same(caches, [row], count, 10 * row)
    for seed in range(100, 170, 2):  # pages fill and leave the window meanwhile
        assert_same(caches, [0, 1, 2], 1, seed)
        assert_same(caches, [2, 0], 1, seed + 1)
    assert_same(caches, [0, 2], 1, 7, pages=None)
    assert_same(caches, [0, 1, 2], 70, 8)
    if "budget" in options:
        assert caches[0].reallocate() == caches[1].reallocate()
        assert_same(caches, [0, 1, 2], 1, 9)
    slots = caches[1].slots
    assert slots is not None
    there, missing = slots.counts.sum(0).tolist()
    assert missing > 0
    assert slots.hit_rate() == there / (there + missing)
    for x, y in zip(caches[0].read(1, 2), caches[1].read(1, 2), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("device", DEVICES)
def test_pages_that_become_others(device: str) -> None:
    """The same entries come again for other pages: neither slots nor summaries may be of the former ones."""
    caches = pair(device)
    assert_same(caches, [0], 1200, 1)
    assert_same(caches, [1], 800, 2)
    assert_same(caches, [0, 1], 1, 3)
    for seed, tokens in ((10, 600), (20, 130), (30, 64)):
        for cache in caches:
            cache.truncate(0, tokens)
        assert_same(caches, [0], 1201 - tokens, seed)
        assert_same(caches, [0, 1], 1, seed + 5)
    for cache in caches:
        cache.fork(0, 2)
    assert_same(caches, [2, 0], 1, 40)
    for cache in caches:
        cache.select_sequences([1, 1, 0])
    assert_same(caches, [0, 1, 2], 1, 41)
    for cache in caches:
        cache.free(0)
    assert_same(caches, [0], 1000, 42)
    assert_same(caches, [0, 1, 2], 1, 43)
    for cache in caches:
        pages = cache.page_entries(2, 0, 12)
        cache.retain(pages)
        cache.free(2)
        cache.adopt(2, pages, 12 * PAGE_TOKENS)
        cache.release(pages)
    assert_same(caches, [0, 1, 2], 1, 44)


@pytest.mark.parametrize("device", DEVICES)
def test_copies_and_files_hold_the_same(device: str, tmp_path: Path) -> None:
    caches = pair(device, max_sequences=1)
    assert_same(caches, [0], 1000, 1)
    copies = [cache.copy() for cache in caches]
    assert copies[1].slots is not None
    assert copies[1].slots.slots == 8
    assert_same(copies, [0], 1, 2)
    caches[1].save(tmp_path / "host")
    loaded = KVCache.load(tmp_path / "host", device=device)
    for layer in (0, 1):
        for x, y in zip(caches[0].read(layer, 0), loaded.read(layer, 0), strict=True):
            assert torch.equal(x, y)


@pytest.mark.gpu
def test_quantized_pages_take_host_memory() -> None:
    free = KVCache(*SIZE, device="cuda", formats=PageFormat.INT4, device_pages=8)
    k, v = tokens_of(free, 1, 4000, 0)[1:]
    free.append(0, k, v)
    entries = free.entries[0, Side.K, 0, :62]
    on_host = [free.pools.blocks(int(entry)).device.type == "cpu" for entry in entries]
    assert on_host == [False] + [True] * 60 + [False]
    assert all(free.pools.blocks(int(entry)).is_pinned() for entry in entries[1:61])
    assert free.pools.host_bytes > 0.5 * free.pools.bytes_in_use
    assert free.estimate_memory_mb() < (free.pools.bytes_allocated - free.pools.host_bytes) / 1e6 + 1


class Reference:
    """Slots of one sequence, as a ring; pages that are used now stay."""

    def __init__(self, slots: int) -> None:
        self.ring: list[int | None] = [None] * slots
        self.hand = 0

    def fetch(self, pages: list[int]) -> int:
        """How many were not there."""
        missing = [page for page in pages if page not in self.ring]
        for page in missing:
            while self.ring[self.hand] in pages:
                self.hand = (self.hand + 1) % len(self.ring)
            self.ring[self.hand] = page
            self.hand = (self.hand + 1) % len(self.ring)
        return len(missing)


def quantized_entries(cache: KVCache, pages: int) -> torch.Tensor:
    """i64 [2, 1, pages]"""
    return torch.from_numpy(cache.entries[0, :, :1, 1 : pages + 1].copy())


@pytest.mark.parametrize("assign", ["cpu", "kernel"])
def test_slots_that_were_filled_longest_ago_are_taken(assign: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if assign == "kernel":
        if emulator.compiler() is None:
            pytest.skip("no C++ compiler for the emulator")
        monkeypatch.setattr(kernels, "launch", emulated_launch)
        monkeypatch.setattr(page_slots, "_assign_on_cpu", page_slots._assign_by_kernel)
    cache = KVCache(
        1, KV_HEADS, HEAD_DIM, 4096, device="cpu", formats=PageFormat.INT4, device_pages=7, max_bytes=1 << 21
    )
    cache.append(0, *tokens_of(cache, 1, 22 * PAGE_TOKENS, 0)[1:])
    slots, reference, entries = cache.slots, Reference(7), quantized_entries(cache, 20)
    assert slots is not None
    random = np.random.default_rng(5)
    row, missed = torch.tensor([0]), 0
    for _ in range(12 if assign == "kernel" else 60):
        chosen = np.sort(random.choice(20, int(random.integers(1, 8)), replace=False))
        found = slots.fetch(0, row, torch.from_numpy(chosen)[None] + 1, entries[..., chosen].contiguous())
        missed += reference.fetch(chosen.tolist())
        assert len(set(found.flatten().tolist())) == 2 * len(chosen)
        for side in Side:
            for entry, copied in zip(entries[side, 0, chosen].tolist(), found[side, 0].tolist(), strict=True):
                size = cache.pools.page_bytes(side, PageFormat.INT4)
                begins = [x & ~ENTRY_FORMAT_MASK for x in (entry, copied)]
                assert copied & ENTRY_FORMAT_MASK == PageFormat.INT4
                assert begins[0] != begins[1]
                source, target = (cache.pools.pages[begin : begin + size] for begin in begins)
                assert torch.equal(source, target)
    assert int(slots.counts[0, 1]) == missed
    assert int(slots.counts.sum()) > missed > 7


@pytest.mark.skipif(emulator.compiler() is None, reason="no C++ compiler for the emulator")
def test_the_kernels_do_as_the_cpu_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several rows, with pages of 16 bits among them, and pages that come again after they were forgotten."""
    caches = [
        KVCache(*SIZE, max_sequences=3, device="cpu", formats=MIXED, device_pages=9, max_bytes=1 << 22)
        for _ in range(2)
    ]
    states = []
    for cache, by_kernel in zip(caches, (False, True), strict=True):
        for row in range(3):
            cache.append(1, *tokens_of(cache, 1, 1100, row)[1:], [row])
        random, found = np.random.default_rng(2), []
        slots = cache.slots
        assert slots is not None
        with monkeypatch.context() as patched:
            if by_kernel:
                patched.setattr(kernels, "launch", emulated_launch)
                patched.setattr(page_slots, "_assign_on_cpu", page_slots._assign_by_kernel)
                patched.setattr(page_slots, "_copy_on_cpu", copied_by_kernel)
            for rows in ([0, 1, 2], [2, 0], [1], [0, 1, 2], [0, 2]):
                chosen = torch.from_numpy(np.sort([random.choice(18, 9, replace=False) for _ in rows]))
                table = torch.from_numpy(cache.entries[1][:, rows])
                entries = table.gather(2, chosen.expand(2, -1, -1))
                found.append(slots.fetch(1, torch.tensor(rows), chosen, entries))
                slots.forget(0, 9)
        of_layer = slots._layers[1]
        assert of_layer is not None
        states.append([*found, of_layer.pages, of_layer.held, of_layer.hands, slots.counts, of_layer.memory])
    for expected, made in zip(*states, strict=True):
        assert torch.equal(expected, made)


def copied_by_kernel(jobs: torch.Tensor, pools: Any) -> None:
    kernels.launch(
        page_slots.fetch_kernel(pools.head_dim),
        (2, len(jobs), 2),
        page_slots._FETCH_WARPS * 32,
        (pools.pages, jobs, np.uint32(pools.num_kv_heads)),
        device=jobs.device,
    )


def test_what_cannot_be_held_is_said() -> None:
    for device_pages in (0, -1, 2.5, page_slots.MOST_SLOTS + 1):
        with pytest.raises(CacheInputError, match="device_pages"):
            KVCache(*SIZE, device="cpu", formats=PageFormat.INT4, device_pages=device_pages)  # type: ignore[arg-type]
    with pytest.raises(CacheInputError, match="without formats or a budget"):
        KVCache(*SIZE, device="cpu", device_pages=8)
    cache = pair("cpu")[1]
    with pytest.raises(CacheInputError, match="device_pages"):
        KVManager(cache, "a model")
    step([cache], [0], 1000, 0)
    with pytest.raises(CacheInputError, match="pages=9 cannot be on the device at once, with device_pages=8"):
        step([cache], [0], 1, 1, pages=9)
    assert cache.length(0, 0) == 1000
    full = KVCache(*SIZE, device="cpu", formats=PageFormat.INT4, device_pages=2900, max_bytes=4 << 20)
    step([full], [0], 1000, 0)
    with pytest.raises(CacheFullError, match="copies of pages"):
        step([full], [0], 1, 1)
    assert full.length(0, 0) == 1000
    assert math.isnan(PageSlots(full.pools, 1, 1, 8, full._possible_formats[0]).hit_rate())
