"""Blocks of the disk tier coded on a GPU: the files of the CPU's coder, on the emulator and on a GPU."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import emulator
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from emulated_device import emulated_launch  # noqa: E402

from kvpack import KVCache, PageFormat  # noqa: E402
from kvpack.errors import DamagedRunError, DeviceError  # noqa: E402
from kvpack.format.pages import Side  # noqa: E402
from kvpack.format.snapshot import SnapshotFile  # noqa: E402
from kvpack.runtime.codec import encoder  # noqa: E402
from kvpack.runtime.device import kernels  # noqa: E402
from kvpack.runtime.kv import run_coder, snapshot_device  # noqa: E402
from kvpack.runtime.kv.host_tier import BlockBytes  # noqa: E402
from kvpack.runtime.kv.prefix_hash import chained, root_hash, token_pages  # noqa: E402
from kvpack.runtime.kv.tiers import Tiers  # noqa: E402

LAYERS, HEADS, DIM = 2, 2, 32
BF16, INT8, INT4 = PageFormat.BF16, PageFormat.INT8, PageFormat.INT4


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cpu":
        if emulator.compiler() is None:
            pytest.skip("no C++ compiler for the emulator")
        monkeypatch.setattr(kernels, "launch", emulated_launch)
        encode = encoder.encode_beside_each_other
        emulated = lambda *args, **options: encode(*args, launcher=emulated_launch, **options)  # noqa: E731
        monkeypatch.setattr(snapshot_device, "encode_beside_each_other", emulated)
    return str(request.param)


def make_tiers(directory: Path, device: str, *, codes_on_device: bool) -> Tiers:
    cache = KVCache(
        LAYERS, HEADS, DIM, 64, dtype=torch.bfloat16, device=device, formats=[(INT8, INT4)] * LAYERS, max_bytes=0
    )
    return Tiers(cache, 1 << 20, directory, lock=threading.RLock(), codes_on_device=codes_on_device)


def make_blocks(tiers: Tiers, count: int) -> list[BlockBytes]:
    """Pages of small numbers; the first ones in 16 bits."""
    pages = token_pages(list(range(64 * count)))
    hashes = chained(root_hash({}), pages)
    found = []
    for place, (one, tokens) in enumerate(zip(hashes, pages, strict=True)):
        formats = np.array([(INT8, INT4) if place else (BF16, BF16)] * LAYERS, np.uint8)
        sizes = [
            tiers._cache.pools.page_bytes(side, PageFormat(f))
            for row in formats
            for side, f in zip(Side, row, strict=True)
        ]
        random = np.random.default_rng(place)
        data = torch.from_numpy(random.integers(0, 60, sum(sizes), np.uint8))
        found.append(BlockBytes(one, hashes[place - 1] if place else None, place + 1, tokens, formats, data))
    return found


def files(directory: Path) -> dict[str, dict[str, bytes]]:
    """The tensors of each file: their headers have a time in them."""
    found = {}
    for path in directory.glob("*.safetensors"):
        with SnapshotFile(path) as file:
            found[path.name] = {name: bytes(file.container.data(name)) for name in file.container.tensors}
    return found


@pytest.mark.parametrize("count", [1, 5, 33])
def test_files_are_the_cpu_s_and_blocks_come_back(device: str, count: int, tmp_path: Path) -> None:
    by_device = make_tiers(tmp_path / "device", device, codes_on_device=True)
    by_cpu = make_tiers(tmp_path / "cpu", "cpu", codes_on_device=False)
    blocks = make_blocks(by_cpu, count)
    for tiers in (by_device, by_cpu):
        assert tiers.put(blocks) == count
        assert tiers.flush() == 0
    assert files(tmp_path / "device") == files(tmp_path / "cpu")
    hashes, pages = [block.hash for block in blocks], [block.tokens for block in blocks]
    for directory in ("device", "cpu"):
        again = make_tiers(tmp_path / directory, device, codes_on_device=True)
        for _ in range(2):  # from files, and from host memory
            with again.reading(hashes, pages) as found:
                assert [block.hash for block in found] == hashes
                assert all(torch.equal(a.data.cpu(), b.data) for a, b in zip(found, blocks, strict=True))
        counts = again.metrics()
        assert (counts.disk_hit_pages, counts.host_hit_pages) == (count, count)


def test_damage_is_found(device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiers = make_tiers(tmp_path, device, codes_on_device=True)
    blocks = make_blocks(tiers, 5)
    tiers.put(blocks)
    tiers.flush()
    (path,) = tmp_path.glob("*.safetensors")
    with SnapshotFile(path) as file, monkeypatch.context() as patched:
        patched.setattr(run_coder, "load_runs", lambda _file, runs, *_rest: list(runs))
        with pytest.raises(DeviceError, match="where the CPU finds none"):
            tiers.disk._coder.decode(file)
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    with SnapshotFile(path) as file, pytest.raises(DamagedRunError):
        make_tiers(tmp_path, device, codes_on_device=False).disk._coder.decode(file)
    other = make_tiers(tmp_path, device, codes_on_device=True)
    with other.reading([block.hash for block in blocks], [block.tokens for block in blocks]) as found:
        assert found == []
    assert other.metrics().damaged_files == 1


def test_blocks_that_are_being_read_stay_where_they_are(tmp_path: Path) -> None:
    """Others that come meanwhile find no room; nothing is written over."""
    tiers = make_tiers(tmp_path, "cpu", codes_on_device=False)
    blocks: list[Any] = make_blocks(tiers, 12)
    size = sum(block.data.numel() for block in blocks[:4]) + 4 * 64
    cache = tiers._cache
    small = Tiers(cache, size, tmp_path, lock=threading.RLock())
    small.put(blocks[:4])
    hashes, pages = [block.hash for block in blocks], [block.tokens for block in blocks]
    with small.reading(hashes[:4], pages[:4]) as found:
        assert len(found) == 4
        assert small.put(blocks[4:]) < 8
        assert all(torch.equal(a.data, b.data) for a, b in zip(found, blocks, strict=False))
    assert small.put(blocks[4:8]) == 4
    # Those that have gone to files come back beside those that are there.
    small.flush()
    with small.reading(hashes[:8], pages[:8]) as found:
        assert len(found) == 8
        assert all(torch.equal(a.data, b.data) for a, b in zip(found, blocks, strict=False))
