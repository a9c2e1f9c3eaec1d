"""Blocks that are evicted to host memory and disk come back bit for bit; what is wrong there is a miss."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pool_dump import cache_state
from test_manager import DEVICES, append, dump, make_cache, parsed, prompt

from kvpack.errors import CacheFullError, CacheInputError
from kvpack.format.pages import PageFormat

torch = pytest.importorskip("torch")

from kvpack.runtime.kv.host_tier import Arena  # noqa: E402
from kvpack.runtime.kv.manager import KVManager  # noqa: E402

INT4 = PageFormat.INT4
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
    """All pages in use are those of the store, once running requests have ended, and copies to host memory."""
    if manager.tiers is not None:
        manager.tiers.release_copied()
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


def test_a_block_that_has_lost_bits_since_comes_back_as_it_was_last(tmp_path: Path) -> None:
    """The last block of a turn is evicted in 16 bits; the next turn quantizes it."""
    kept, manager = make(host_bytes=0), make(disk=tmp_path)
    turns = [prompt(3, 257), prompt(3, 257) + prompt(4, 128), prompt(3, 257) + prompt(4, 300)]
    expected = [run(kept, turn) for turn in turns]
    for turn, (hit, pages, outputs) in zip(turns, expected, strict=True):
        found = run(manager, turn)
        assert found[:2] == (hit, pages)
        assert all(torch.equal(x, y) for x, y in zip(found[2], outputs, strict=True))
        manager.store.evict()
        assert manager.tiers.flush() == 0
        for block in manager.tiers.host.all():
            manager.tiers.host.drop(block.hash)
    assert [turn[0] for turn in expected] == [0, 256, 384]
    assert tiers(manager).written_files == 3
    # As it was last for who comes later, too, whatever the order in which it sees the files.
    other = make(disk=tmp_path)
    for found in other.tiers.disk._index.values():
        found.reverse()
    for one in (make(disk=tmp_path), other, kept):
        assert run(one, turns[2])[1] == expected[2][1]
        assert no_leaks(one)


def test_a_file_of_one_block_has_the_hash_of_its_tokens(tmp_path: Path) -> None:
    source, tokens = make(disk=tmp_path), prompt(5, 200)
    run(source, tokens)
    source.store.evict()
    *_, block = sorted(source.tiers.host.all(), key=lambda block: block.depth)
    others = np.array(prompt(6, 64), "<i4").tobytes()
    assert source.tiers.disk.write([replace(block, tokens=others)])
    source.tiers.host.drop(block.hash)
    assert source.tiers.disk.read([block.hash], [others]) == []
    assert tiers(source).damaged_files == 1


def test_pages_that_the_cache_cannot_have_are_a_miss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the hashes of pages that it can have, which no other cache gives to its own."""
    key = KVManager._root_key
    monkeypatch.setattr(KVManager, "_root_key", lambda *of: {k: v for k, v in key(*of).items() if k != "formats"})
    source, tokens = make(disk=tmp_path, formats=PageFormat.INT8), prompt(5, 300)
    run(source, tokens)
    source.store.evict()
    assert source.tiers.flush() == 0
    manager = make(disk=tmp_path)
    assert run(manager, tokens)[:2] == (0, run(make(host_bytes=0), tokens)[1])
    assert (tiers(manager).foreign_files, tiers(manager).damaged_files) == (1, 0)


def test_flush_is_guarded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = make(disk=tmp_path)
    run(manager, prompt(3, 300))
    manager.store.evict()
    found: list[bool] = []
    write = manager.tiers.disk.write

    def watched(blocks: Any) -> bool:
        other = threading.Thread(target=lambda: found.append(manager.lock.acquire(blocking=False)))
        other.start()
        other.join()
        return write(blocks)

    monkeypatch.setattr(manager.tiers.disk, "write", watched)
    assert manager.tiers.flush() == 0
    assert found == [False]


def test_memory_that_ends_while_a_file_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import kvpack.runtime.kv.run_coder as run_coder

    def encode_run(*_: Any, **__: Any) -> Any:
        raise MemoryError

    manager = make(disk=tmp_path, host_bytes=20 << 10)
    monkeypatch.setattr(run_coder, "encode_run", encode_run)
    run(manager, prompt(3, 900))
    manager.store.evict()
    found = tiers(manager)
    assert found.dropped_blocks > found.failed_writes > 0
    # What fails in the midst of a copy takes no room.
    used = manager.tiers.host.used_bytes
    monkeypatch.setattr(manager.tiers.host.copies, "to_host", encode_run)
    block = manager.tiers.host.all()[0]
    manager.tiers.host.drop(block.hash)
    room = manager.tiers.host.used_bytes
    assert room < used
    started = manager.start(prompt(4, 70))
    append(manager.cache, {started.sequence: prompt(4, 70)})
    with pytest.raises(MemoryError):
        manager.tiers.host.put(block, manager.cache.entries[:, :, started.sequence, 0], may_hold=True)
    assert manager.tiers.host.used_bytes == room


def test_files_that_are_not_whole_or_not_ours_are_misses(tmp_path: Path) -> None:
    tokens = prompt(4, 500)
    source = make(disk=tmp_path / "whole")
    _, pages, _ = run(source, tokens)
    source.store.evict()
    assert source.tiers.flush() == 0
    (file,) = (tmp_path / "whole").glob("[!.]*")
    whole = file.read_bytes()
    strange = make(disk=tmp_path / "strange", formats=PageFormat.FP16)
    run(strange, tokens)
    strange.store.evict()
    strange.tiers.flush()
    (other_formats,) = (tmp_path / "strange").glob("[!.]*")

    def flipped(at: int) -> bytes:
        return whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :]

    length = len(whole)
    damages: dict[str, bytes] = {
        "empty": b"",
        "text": b"not a file of tensors",
        "cut": whole[: length // 2],
        "cut by one": whole[:-1],
        "huge header": b"\xff" * 8 + whole[8:],
        "other formats": other_formats.read_bytes(),
    } | {f"flipped at {at}": flipped(at) for at in [5, 300, *range(length // 3, length, length // 7)]}
    for number, (name, data) in enumerate(damages.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / file.name).write_bytes(data)
        manager = make(disk=folder)
        assert run(manager, tokens)[1:2] == (pages,), name
        found = tiers(manager)
        assert found.disk_hit_pages in ((0,) if "flipped" not in name else (0, 7)), name
        if not found.disk_hit_pages:
            assert found.damaged_files + found.foreign_files + found.disk_blocks > 0, name
        # It is not looked at again, and gives way to a whole one.
        run(manager, tokens)
        assert tiers(manager).damaged_files <= 1, name
        manager.store.evict()
        assert manager.tiers.flush() == 0
        again = make(disk=folder)
        assert run(again, tokens)[:2] == (448, pages), name
    # Of two files with the same blocks one is enough.
    folder = tmp_path / "twice"
    folder.mkdir()
    for name, data in ((file.name, whole), ("f" * 64 + file.name[64:], whole), ("e" * 64 + file.name[64:], whole)):
        (folder / name).write_bytes(data)
    manager = make(disk=folder)
    (folder / ("f" * 64 + file.name[64:])).write_bytes(flipped(length // 2))
    (folder / ("e" * 64 + file.name[64:])).unlink()
    assert tiers(manager).disk_blocks == 7
    assert run(manager, tokens)[:2] == (448, pages)
    assert tiers(manager).damaged_files <= 1
    # Another process has written fewer blocks up to the same one, under the same name.
    folder = tmp_path / "shorter"
    manager = make(disk=folder)
    (folder / file.name).write_bytes(whole)
    manager.tiers.disk.scan()
    blocks = sorted(source.tiers.host.all(), key=lambda block: block.depth)
    assert make(disk=folder).tiers.disk.write(blocks[3:])
    assert run(manager, tokens)[:2] == (0, pages)
    assert tiers(manager).damaged_files == 0
    # Another name, and what are no files at all.
    folder = tmp_path / "names"
    folder.mkdir()
    (folder / file.name.replace(file.name[:8], "00000000")).write_bytes(whole)
    (folder / ("1" * 64 + file.name[64:])).symlink_to(file)
    os.mkfifo(folder / ("2" * 64 + file.name[64:]))
    (folder / ("3" * 64 + file.name[64:])).mkdir()
    (folder / "notes.txt").write_text("keep")
    manager = make(disk=folder, disk_bytes=1)
    assert tiers(manager).damaged_files == 3
    assert run(manager, tokens)[:2] == (448, pages)
    manager.store.evict()
    assert manager.tiers.flush() == 0  # the blocks are in the file of the other name
    assert (folder / "notes.txt").exists()


def test_a_page_whose_tokens_are_others_is_a_miss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if its hash is the same, in host memory and in a file."""
    import kvpack.runtime.kv.prefix_hash as hashing

    source = make(disk=tmp_path)
    run(source, prompt(5, 200))
    source.store.evict()
    source.tiers.flush()
    known = source.tiers.host.all()
    forged = {block.tokens: block.hash for block in known}
    others = prompt(6, 200)
    real = hashing.next_hash

    def next_hash(parent: bytes, tokens: bytes) -> bytes:
        place = others_pages.index(tokens) if tokens in others_pages else None
        return real(parent, tokens) if place is None else known_in_order[place]

    others_pages = hashing.token_pages(others)
    known_in_order = [block.hash for block in sorted(known, key=lambda block: block.depth)]
    assert len(forged) == 3
    for module in ("prefix_hash", "prefix_store"):
        monkeypatch.setattr(f"kvpack.runtime.kv.{module}.next_hash", next_hash)
    for manager in (source, make(disk=tmp_path)):
        assert run(manager, others)[0] == 0
        assert (tiers(manager).host_hit_pages, tiers(manager).disk_hit_pages) == (0, 0)


def test_limits_hold_and_pages_are_right(tmp_path: Path) -> None:
    """Prompts that share their beginnings, more than all tiers have room for."""
    limits = {"host_bytes": 30 << 10, "disk_bytes": 90 << 10}
    manager = make(prefix_bytes=60 << 10, disk=tmp_path, **limits)
    plain = make(host_bytes=0)
    system = prompt(7, 192)
    prompts = [[*system, *prompt(100 + number, 64 * (1 + number % 3) + 9)] for number in range(12)]
    expected = [run(plain, tokens)[1] for tokens in prompts]
    order = np.random.default_rng(8).integers(0, len(prompts), 60).tolist()
    for number in order:
        assert run(manager, prompts[number])[1] == expected[number]
        found = tiers(manager)
        assert found.host_bytes <= limits["host_bytes"]
        files = [file.stat().st_size for file in tmp_path.glob("[!.]*")]
        assert found.disk_bytes == sum(files) <= limits["disk_bytes"]
        assert manager.metrics().prefix_bytes <= 60 << 10
    assert found.host_hit_pages > 0
    assert found.disk_hit_pages > 0
    assert no_leaks(manager)
    samples = parsed(manager.metrics().prometheus())
    assert samples["kvpack_tier_disk_hit_pages_total"] == found.disk_hit_pages
    assert samples["kvpack_tier_damaged_files_total"] == 0
    assert not [one for one in tmp_path.iterdir() if one.name.endswith((".data", ".tmp"))]
    assert "kvpack_tier" not in plain.metrics().prometheus()


def test_a_fetch_that_fails_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    manager = make()
    tokens = prompt(9, 500)
    _, pages, _ = run(manager, tokens)
    for _ in range(4):
        manager.store.evict(1)
    before = cache_state(manager.cache)["pools"]["bytes"], len(manager.store), dump(manager)[1:]
    real, calls = torch._foreach_copy_, 0

    def failing(*args: Any, **options: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise RuntimeError("half-way")
        real(*args, **options)

    monkeypatch.setattr(torch, "_foreach_copy_", failing)
    with pytest.raises(RuntimeError, match="half-way"):
        manager.start(tokens)
    assert (cache_state(manager.cache)["pools"]["bytes"], len(manager.store), dump(manager)[1:]) == before
    assert no_leaks(manager)
    assert not any(manager.tiers.host.is_held(block.hash) for block in manager.tiers.host.all())
    monkeypatch.undo()
    assert run(manager, tokens)[:2] == (448, pages)


def test_an_interrupt_while_blocks_come_back_frees_no_page_of_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is brought back is the store's before it makes room for it, which may write files."""
    manager, tokens, others = make(), prompt(9, 500), prompt(10, 500)
    _, pages, _ = run(manager, tokens)
    manager.store.evict()
    run(manager, others)
    started = manager.start(others)  # which stays
    manager.store.capacity_bytes = manager.store.used_bytes + 1

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(manager.tiers, "take", interrupted)
        with pytest.raises(KeyboardInterrupt):
            manager.start(tokens)
    manager.finish(started.sequence, keep=False)
    for block in manager.store._blocks.values():
        assert all(manager.cache.pools.info(entry).held == 1 for entry in block.pages().tolist())
    assert no_leaks(manager)
    manager.store.capacity_bytes = None
    assert run(manager, tokens)[:2] == (448, pages)


def test_where_memory_ends_the_first_blocks_come_back() -> None:
    manager = make()
    tokens = prompt(10, 500)
    _, pages, _ = run(manager, tokens)
    manager.store.evict()
    manager.cache.pools.max_bytes = manager.cache.pools.bytes_allocated
    blocker = manager.start(prompt(11, 500))
    append(manager.cache, {blocker.sequence: prompt(11, 500)})
    started = manager.start(tokens)
    assert started.tokens in (0, 64, 192)
    assert tiers(manager).refused_pages > 0
    manager.finish(started.sequence, keep=False)
    manager.finish(blocker.sequence, keep=False)
    assert run(manager, tokens)[:2] == (448, pages)
    assert no_leaks(manager)


@pytest.mark.parametrize("device", DEVICES)
def test_what_goes_because_memory_has_ended_comes_back(device: str, tmp_path: Path) -> None:
    """Then pages are handed out again at once, to tokens that overwrite them."""
    manager = make(disk=tmp_path, host_bytes=60 << 10, device=device, max_bytes=180 << 10)
    plain = make(host_bytes=0, device=device)
    prompts = [prompt(30 + number, 450) for number in range(4)]
    expected = [run(plain, tokens)[1] for tokens in prompts]
    for number in (0, 1, 2, 3, 0, 3, 1, 2, 0):
        assert run(manager, prompts[number])[1] == expected[number]
    assert manager.metrics().evictions.keys() == {"memory"}
    assert tiers(manager).host_hit_pages > 0
    assert tiers(manager).disk_hit_pages > 0
    assert manager.cache.pools.bytes_allocated <= 180 << 10
    assert no_leaks(manager)


@pytest.mark.gpu
def test_copies_need_no_memory_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("none")

    manager = make(device="cuda")
    tokens = prompt(18, 500)
    _, pages, _ = run(manager, tokens)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "cat", full)
        manager.store.evict()
    fill = manager.tiers.host.copies._put

    def failing(sources: Any, entries: Any) -> None:
        if sources[0].device.type == "cuda":
            full()
        fill(sources, entries)

    monkeypatch.setattr(manager.tiers.host.copies, "_put", failing)
    assert run(manager, tokens)[:2] == (448, pages)


def test_a_directory_that_is_gone_is_a_miss(tmp_path: Path) -> None:
    manager = make(disk=tmp_path / "gone", host_bytes=20 << 10)
    tokens = prompt(19, 500)
    _, pages, _ = run(manager, tokens)
    manager.store.evict()
    shutil.rmtree(tmp_path / "gone")
    found, again, _ = run(manager, tokens)
    assert (found < 448, again) == (True, pages)
    manager.store.evict()
    assert tiers(manager).failed_writes > 0
    assert (tiers(manager).disk_bytes, tiers(manager).damaged_files) == (0, 0)


@pytest.mark.parametrize("where", ["a file", "in a file", "/proc/kvpack", "/proc"])
def test_a_directory_that_cannot_be_written_is_refused(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").write_text("mine")
    disk = {"a file": tmp_path / "file", "in a file": tmp_path / "file" / "x"}.get(where, Path(where))
    if where.startswith("/proc") and not os.path.isdir("/proc"):
        pytest.skip("no /proc")
    with pytest.raises(CacheInputError, match=f"disk='{disk}' cannot be used"):
        make(disk=disk)
    assert make(disk=tmp_path / "made").tiers.disk.directory.is_dir()
    assert os.listdir(tmp_path / "made") == []


def test_the_first_file_that_cannot_be_written_is_warned_of(tmp_path: Path) -> None:
    manager = make(disk=tmp_path / "gone", host_bytes=20 << 10)
    shutil.rmtree(tmp_path / "gone")
    run(manager, prompt(12, 700))
    with pytest.warns(RuntimeWarning, match=r"could not be written to .*gone") as seen:
        manager.store.evict()
    assert len(seen) == 1
    failed = tiers(manager).failed_writes
    assert manager.tiers.flush() > 0
    assert tiers(manager).failed_writes > failed


def test_a_file_that_cannot_be_written_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = make(disk=tmp_path, host_bytes=20 << 10)

    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kvpack.runtime.kv.disk_tier.write_snapshot", full)
    run(manager, prompt(12, 700))
    manager.store.evict()
    found = tiers(manager)
    assert found.failed_writes > 0
    assert found.dropped_blocks == 10 - found.host_blocks > 0
    # Not for each block that has no room: that would be coded, with those before it, for nothing.
    assert found.failed_writes < found.dropped_blocks
    monkeypatch.setattr("kvpack.runtime.kv.tiers._REST_S", -1.0)
    manager.tiers._resting_until_s = 0.0  # later
    run(manager, prompt(13, 700))
    manager.store.evict()
    assert tiers(manager).failed_writes > found.failed_writes + 5
    monkeypatch.undo()
    assert manager.tiers.flush() == 0


def test_files_that_were_used_stay_longer_than_others(tmp_path: Path) -> None:
    prompts = [prompt(seed, 200) for seed in range(3)]
    for used in (0, 1):
        folder = tmp_path / str(used)
        manager = make(disk=folder)
        pages = []
        for tokens in prompts[:2]:
            pages.append(run(manager, tokens)[1])
            manager.store.evict()
            assert manager.tiers.flush() == 0
        size = sum(file.stat().st_size for file in folder.glob("[!.]*"))
        later = make(disk=folder, disk_bytes=size * 7 // 5)
        assert run(later, prompts[used])[:2] == (192, pages[used])
        run(later, prompts[2])
        later.store.evict()
        assert later.tiers.flush() == 0
        found = make(disk=folder)
        assert [found.tiers.fetch(found.store, found.match(tokens), tokens).tokens for tokens in prompts] == [
            192 if number in (used, 2) else 0 for number in range(3)
        ]


def test_prefetched_blocks_wait_in_host_memory(tmp_path: Path) -> None:
    source = make(disk=tmp_path)
    tokens = prompt(16, 500)
    _, pages, _ = run(source, tokens)
    source.store.evict()
    source.tiers.flush()
    manager = make(disk=tmp_path)
    assert manager.prefetch(tokens).result(30) == 448
    assert (tiers(manager).disk_hit_pages, tiers(manager).host_blocks) == (0, 7)
    assert manager.prefetch(tokens).result(30) == 448
    next(tmp_path.glob("[!.]*")).unlink()
    assert run(manager, tokens)[:2] == (448, pages)
    assert (tiers(manager).host_hit_pages, tiers(manager).disk_hit_pages) == (7, 0)
    assert manager.prefetch(prompt(17, 500)).result(30) == 0
    # As many as there is room for: the first ones.
    small = make(disk=tmp_path, host_bytes=40 << 10)
    manager.store.evict()
    for name in list(manager.tiers.disk._files):
        manager.tiers.disk._forget(name)
    assert manager.tiers.flush() == 0
    small.tiers.disk.scan()
    assert 0 < small.prefetch(tokens).result(30) < 448
    assert small.tiers.host.get(small.store.find(tokens).missing[0]) is not None
    assert not any(small.tiers.host.is_held(block.hash) for block in small.tiers.host.all())
    for one in (manager, small):
        assert len(list(one.tiers.host.oldest())) == len(one.tiers.host) > 0  # each can go
    assert run(small, tokens)[:2] == (448, pages)
    with pytest.raises(CacheInputError, match="has no tiers"):
        make(host_bytes=0).prefetch(tokens)


def test_others_find_nothing(tmp_path: Path) -> None:
    source = make(disk=tmp_path)
    tokens = prompt(13, 300)
    source.finish(source.start(tokens, salt="a").sequence)
    started = source.start(tokens, salt="a")
    append(source.cache, {started.sequence: tokens})
    source.finish(started.sequence)
    source.store.evict()
    source.tiers.flush()
    assert [source.start(tokens, salt=salt).tokens for salt in ("", "b", "a")] == [0, 0, 256]
    assert make(disk=tmp_path, model="other").start(tokens, salt="a").tokens == 0
    assert make(disk=tmp_path).start(tokens, salt="a").tokens == 256


def test_pages_are_held_until_they_are_copied() -> None:
    """With events as CUDA has them: the cache gets the pages back when its memory ends, not before the copy is done."""

    class Copied:
        is_done = False

        def query(self) -> bool:
            return self.is_done

        def synchronize(self) -> None:
            self.is_done = True

    manager = make()
    run(manager, prompt(14, 300))
    copies, cache = manager.tiers.host.copies, manager.cache
    entries = np.concatenate([block.pages() for block in manager.store._blocks.values()])
    event = Copied()
    cache.retain(entries)
    copies._pending.append((event, entries))
    manager.store.evict()
    copies.settle()
    assert cache.held_bytes == cache.pools.bytes_in_use > 0
    kinds = {(cache.pools.info(entry).side, cache.pools.info(entry).format): 0 for entry in entries.tolist()}
    for entry in entries.tolist():
        kinds[cache.pools.info(entry).side, cache.pools.info(entry).format] += 1
    run(manager, prompt(15, 200))
    assert len(manager.store) == 3
    # What is evicted already is enough.
    assert manager.store.reclaim(kinds, 0)
    assert event.is_done
    assert len(manager.store) == 3
    assert no_leaks(manager)
    # Of a page more than that, one is evicted, not as many as are missing in all.
    manager.store.evict(1)
    event = Copied()
    entries = np.concatenate([block.pages() for block in manager.store._blocks.values()])
    kinds = Counter((cache.pools.info(entry).side, cache.pools.info(entry).format) for entry in entries.tolist())
    cache.retain(entries)
    copies._pending.append((event, entries))
    manager.store.evict()
    run(manager, prompt(16, 700))
    more = {kind: count + 1 for kind, count in kinds.items()}
    assert len(manager.store) == 10
    assert manager.store.reclaim(more, 0)
    assert len(manager.store) == 8
    assert no_leaks(manager)
    assert not manager.store.reclaim(dict.fromkeys(kinds, 1000), 0)
    assert len(manager.store) == 8


def test_arena() -> None:
    random, arena, size = np.random.default_rng(15), Arena(4096), 4096
    taken: dict[int, int] = {}
    owner = np.full(size, -1)
    for step in range(2000):
        if taken and random.random() < 0.5:
            begin = int(random.choice(list(taken)))
            assert (owner[begin : begin + taken[begin]] == begin).all()
            owner[begin : begin + taken[begin]] = -1
            arena.free(begin, taken.pop(begin))
        else:
            wanted = int(random.integers(1, 700))
            had_room = arena.has_room(wanted)
            begin = arena.allocate(wanted)
            assert (begin is not None) == had_room
            if begin is not None:
                assert begin % 64 == 0
                assert begin + wanted <= size
                assert (owner[begin : begin + wanted] == -1).all(), step
                owner[begin : begin + wanted] = begin
                taken[begin] = wanted
        assert arena.used_bytes == sum(-(-one // 64) * 64 for one in taken.values())
    for begin, count in taken.items():
        arena.free(begin, count)
    assert arena._free == [(0, size)]


def test_more_host_memory_than_there_is() -> None:
    with pytest.raises(CacheFullError, match="no memory for host_bytes=1152921504606846976"):
        make(host_bytes=1 << 60)


def test_options_are_checked(tmp_path: Path) -> None:
    with pytest.raises(CacheInputError, match="host_bytes is 0; it must be above 0"):
        make(host_bytes=0, disk=tmp_path)
    with pytest.raises(CacheInputError, match="disk_bytes is 5; it needs disk="):
        make(disk_bytes=5)


def exercise(folder: str, seed: int, seconds: float) -> tuple[int, int, int]:
    """Requests that all find their pages right; how many, and pages that came from files of whom ever; damage."""
    plain, random = make(host_bytes=0), np.random.default_rng(seed)
    prompts = [[*prompt(7, 192), *prompt(200 + number, 64 * (1 + number % 3) + 9)] for number in range(6)]
    expected = [run(plain, tokens)[1] for tokens in prompts]
    manager = make(prefix_bytes=40 << 10, host_bytes=30 << 10, disk=folder, disk_bytes=120 << 10)
    requests, until = 0, time.monotonic() + seconds
    while time.monotonic() < until or requests < 4:
        number = int(random.integers(0, len(prompts)))
        assert run(manager, prompts[number])[1] == expected[number]
        assert tiers(manager).disk_bytes <= 120 << 10
        requests += 1
    found = tiers(manager)
    return requests, found.disk_hit_pages, found.damaged_files


def test_two_processes_on_one_directory(tmp_path: Path) -> None:
    here = str(Path(__file__).parent)
    script = (
        f"import sys; sys.path.insert(0, {here!r})\n"
        "from test_tiers import exercise\n"
        f"print('begins', flush=True); print(*exercise({str(tmp_path)!r}, 1, 3.0))"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "begins\n"
        ours = exercise(str(tmp_path), 2, 3.0)
        theirs = tuple(map(int, other.stdout.readline().split()))
    assert other.returncode == 0
    for requests, from_files, damaged in (ours, theirs):
        assert requests > 3
        assert from_files > 0
        assert damaged == 0


def test_what_is_evicted_during_a_fetch_does_not_overwrite_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when memory for the pages that come back is made by evicting others."""
    manager = make(host_bytes=60 << 10)
    first, second = prompt(20, 450), prompt(21, 450)
    _, pages, _ = run(manager, first)
    manager.store.evict()
    run(manager, second)
    real = manager.cache.new_pages

    def evicting(*args: Any, **options: Any) -> Any:
        manager.store.evict()
        return real(*args, **options)

    monkeypatch.setattr(manager.cache, "new_pages", evicting)
    found, again, _ = run(manager, first)
    assert (found > 0, again) == (True, pages)
