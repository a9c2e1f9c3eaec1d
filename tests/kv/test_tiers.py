"""Blocks that are evicted to host memory and disk come back bit for bit; what is wrong there is a miss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_manager import DEVICES, append, make_cache, prompt

from kvpack.format.pages import PageFormat

torch = pytest.importorskip("torch")

from kvpack.runtime.kv.manager import KVManager  # noqa: E402

INT4 = PageFormat.INT4
SMALL = 3328  # of a block in INT4
MIB = 1 << 20


def make(*, host_bytes: int = MIB, prefix_bytes: int | None = None, model: str = "tiny", **options: Any) -> KVManager:
    tiers = {key: options.pop(key) for key in ("disk", "disk_bytes") if key in options}
    cache = make_cache(**({"formats": INT4} | options))
    return KVManager(cache, model, prefix_bytes=prefix_bytes, policy="lru", host_bytes=host_bytes, **tiers)


def run(manager: KVManager, tokens: Any) -> tuple[int, Any, Any]:
    """A request: how many tokens were there, the pages of its sequence, and its last token's outputs."""
    started = manager.start(tokens)
    append(manager.cache, {started.sequence: tokens[started.tokens : -1]})
    outputs = append(manager.cache, {started.sequence: tokens[-1:]})
    pages = pages_of(manager, started.sequence)
    manager.finish(started.sequence)
    return started.tokens, pages, outputs


def pages_of(manager: KVManager, sequence: int) -> list[bytes]:
    cache = manager.cache
    entries = cache.page_entries(sequence, 0, cache.length(0, sequence) // 64)
    return [page.cpu().numpy().tobytes() for page in cache.read_pages(entries)]


def tiers(manager: KVManager) -> Any:
    found = manager.metrics().tiers
    assert found is not None
    return found


def no_leaks(manager: KVManager) -> bool:
    """All pages in use are those of the store, once running requests have ended."""
    held = {entry for block in manager.store._blocks.values() for entry in block.pages().tolist()}
    in_use = sum(manager.cache.pools.bytes_of(entry) for entry in held)
    return manager.cache.pools.bytes_in_use == in_use and all(
        manager.cache.pools.info(entry).references == 1 for entry in held
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("formats", [INT4, PageFormat.FP16, None], ids=["INT4", "FP16", "budget"])
def test_evicted_blocks_come_back_bit_for_bit(device: str, formats: PageFormat | None) -> None:
    options = {"formats": formats} if formats is not None else {"formats": None, "budget": 0.3}
    manager, kept = make(device=device, **options), make(device=device, host_bytes=0, **options)
    tokens = prompt(1, 500)
    for one in (manager, kept):
        run(one, tokens)
    manager.store.evict()
    assert (len(manager.store), len(manager.tiers.host)) == (0, 7)
    longer = [*tokens[:480], *prompt(2, 30)]
    found, pages, outputs = run(manager, longer)
    expected = run(kept, longer)
    assert found == expected[0] == 448
    assert pages == expected[1]
    assert all(torch.equal(x, y) for x, y in zip(outputs, expected[2], strict=True))
    assert (tiers(manager).host_hit_pages, tiers(manager).disk_hit_pages) == (7, 0)
    assert manager.tiers.host.get(manager.store.match(tokens).blocks[0].hash) is not None
    assert no_leaks(manager)


@pytest.mark.parametrize("device", DEVICES)
def test_what_has_no_room_in_host_memory_comes_back_from_files(device: str, tmp_path: Path) -> None:
    manager = make(host_bytes=40 << 10, disk=tmp_path, device=device)
    tokens = prompt(3, 900)
    _, pages, outputs = run(manager, tokens)
    manager.store.evict()
    manager.tiers.flush()
    found = tiers(manager)
    assert found.taken_blocks == 14
    assert found.dropped_blocks == 0
    assert found.host_bytes <= 40 << 10
    assert found.disk_blocks == 14
    assert 1 < found.written_files < 8
    hit, again, same = run(manager, tokens)
    assert (hit, again) == (896, pages)
    assert all(torch.equal(x, y) for x, y in zip(outputs, same, strict=True))
    found = tiers(manager)
    assert found.host_hit_pages + found.disk_hit_pages == 14
    assert found.disk_hit_pages > 3
    # Another process, later.
    other = make(disk=tmp_path, device=device)
    assert tiers(other).disk_blocks == 14
    assert run(other, tokens)[:2] == (896, pages)
    assert tiers(other).disk_hit_pages == 14
    assert no_leaks(manager)
    assert no_leaks(other)
