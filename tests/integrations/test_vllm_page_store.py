"""Pages of vLLM's cache saved and loaded, without vLLM: the same bits come back, and whatever is wrong is a miss."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from paged_prompts import (  # noqa: E402
    BF16,
    BLOCKS,
    HEAD_DIM,
    HEADS,
    LAYERS,
    blocks_for,
    compute,
    fingerprint,
    gathered,
    load,
    make_paged,
    make_store,
    page_range,
    page_values,
    save,
)

from kvpack.encode.page_coder import dequantize_blocks, quantize_blocks  # noqa: E402
from kvpack.errors import CacheInputError, InputError  # noqa: E402
from kvpack.format.pages import PageFormat, PageLayout, Side  # noqa: E402
from kvpack.integrations.vllm import kv_options, kv_page_codec, kv_page_store  # noqa: E402
from kvpack.integrations.vllm.cpu_block_order import block_places  # noqa: E402
from kvpack.integrations.vllm.kv_page_codec import PageCodec, PagedLayers  # noqa: E402
from kvpack.integrations.vllm.kv_plan import Changes, Load, PageRange  # noqa: E402
from kvpack.runtime.kv import block_table, disk_tier, tiers  # noqa: E402
from kvpack.runtime.kv.cache import KVCache  # noqa: E402

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
INT4, INT8 = PageFormat.INT4, PageFormat.INT8


def files(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.kvpack.safetensors"))


def save_all(store: Any, paged: PagedLayers, starts: range) -> None:
    for start in starts:
        save(store, paged, range(start, start + 200))


# The codec ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("dtype", "k", "v"),
    [
        (torch.bfloat16, BF16, BF16),
        (torch.float16, PageFormat.FP16, PageFormat.FP16),
        (torch.bfloat16, INT8, INT4),
        (torch.float16, PageFormat.FP8_E4M3, PageFormat.INT2),
        (torch.bfloat16, PageFormat.INT3, BF16),
    ],
)
@pytest.mark.parametrize(("heads", "head_dim"), [(3, 48), (1, 128)])
def test_pages_are_those_of_the_page_coder(
    device: str, dtype: Any, k: PageFormat, v: PageFormat, heads: int, head_dim: int
) -> None:
    """Layer by layer, K before V; the first page in 16 bits beside others."""
    layers, count = 2, 3
    full = BF16 if dtype == torch.bfloat16 else PageFormat.FP16
    cache = KVCache(layers, heads, head_dim, 64, dtype=dtype, device=device, formats=[(k, v)] * layers, sinks=1)
    values = torch.randn(layers, 64 * count, heads, 2 * head_dim, generator=torch.Generator().manual_seed(3)).to(dtype)
    formats = np.repeat(np.array([(k, v)] * layers, np.uint8)[:, :, None], count, -1)
    formats[:, :, 0] = full
    codec = PageCodec(cache)
    pages = codec.encode(values.to(device), formats)
    back = codec.decode(pages, formats, torch.device(device)).cpu()
    assert len(pages) == count
    for place, page in enumerate(pages):
        expected, decoded = [], []
        for layer in range(layers):
            for side in Side:
                layout = PageLayout(side, PageFormat(formats[layer, side, place]), head_dim)
                of_side = values[layer, 64 * place : 64 * (place + 1), :, side * head_dim : (side + 1) * head_dim]
                numbers = of_side.transpose(0, 1).contiguous()
                if layout.format == BF16:
                    import ml_dtypes

                    given = numbers.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
                else:
                    given = numbers.numpy() if dtype == torch.float16 else numbers.float().numpy()
                blocks = quantize_blocks(given, layout)
                expected.append(blocks.tobytes())
                decoded.append(torch.from_numpy(dequantize_blocks(blocks, layout)).to(dtype).transpose(0, 1))
        assert page.cpu().numpy().tobytes() == b"".join(expected)
        of_page = torch.stack([torch.cat(decoded[2 * layer : 2 * layer + 2], -1) for layer in range(layers)])
        assert torch.equal(back[:, 64 * place : 64 * (place + 1)], of_page)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("block_tokens", "splits"), [(16, 1), (48, 1), (48, 3), (128, 1), (128, 8)])
def test_tokens_are_where_the_block_table_says(device: str, block_tokens: int, splits: int) -> None:
    paged = make_paged(block_tokens, splits=splits, device=device)
    kernel_tokens = block_tokens // splits
    blocks, count = blocks_for(paged, 384, 5), 384 // kernel_tokens * kernel_tokens
    values = torch.randn(LAYERS, count, HEADS, 2 * HEAD_DIM).bfloat16().to(device)
    paged.put(values, blocks, 0, count)
    assert torch.equal(gathered(paged, blocks, 7, 293), values[:, 7:293])
    # As vLLM's attention finds them: by block and place, or by kernel block and place.
    token = 211
    kernel_block = blocks[token // block_tokens] * splits + token % block_tokens // kernel_tokens
    assert torch.equal(paged.layers[1][kernel_block, :, token % kernel_tokens], values[1, token])
    assert sum(int((layer != 0).any(-1).sum()) for layer in paged.layers) == LAYERS * count * HEADS
    paged.put(-values[:, kernel_tokens : 2 * kernel_tokens], blocks, kernel_tokens, 2 * kernel_tokens)
    found = gathered(paged, blocks, 0, count)
    assert torch.equal(found[:, kernel_tokens : 2 * kernel_tokens], -values[:, kernel_tokens : 2 * kernel_tokens])
    assert torch.equal(found[:, 2 * kernel_tokens :], values[:, 2 * kernel_tokens :])


def transposing_write(k: Any, v: Any, k_cache: Any, v_cache: Any, slots: Any) -> None:
    """As vLLM's for x86 without AMX: keys by dimension."""
    k_cache[0].view(k.shape[1], k.shape[2], -1)[..., slots] = k.permute(1, 2, 0)
    v_cache[0][:, slots] = v.transpose(0, 1)


@pytest.mark.parametrize("block_tokens", [16, 128])
def test_an_order_of_the_processor_s_own(block_tokens: int, tmp_path: Path) -> None:
    """Pages of half a block are right although others' tokens lie between theirs, and come later."""
    places = block_places(transposing_write, torch.bfloat16, block_tokens, HEAD_DIM)
    paged = make_paged(block_tokens, places=places)
    store = make_store(paged, tmp_path)
    tokens = list(range(320))
    pages = page_range(tokens, blocks_for(paged, 320, 0))
    compute(paged, pages)
    for first in range(5):
        later = gathered(paged, pages.block_ids, 0, 320)
        later[:, 64 * (first + 1) :] = 0  # what is not computed yet
        full = torch.cat([later, later.new_zeros(LAYERS, -320 % block_tokens, HEADS, 2 * HEAD_DIM)], 1)
        paged.put(full, pages.block_ids, 0, full.shape[1])
        store.save(page_range(tokens[: 64 * (first + 1)], pages.block_ids, first=first))
        compute(paged, pages)
    store.drain()
    assert load(store, paged, tokens) == 320 // block_tokens * block_tokens
    blocks = blocks_for(paged, 320, 1)
    token, head = 65, 1
    flat = paged.layers[2][blocks[token // block_tokens], head].flatten()
    value = page_values(page_range(tokens, ()).hashes[1])[2, 1, head]
    place = token % block_tokens
    assert torch.equal(flat[: block_tokens * HEAD_DIM].view(HEAD_DIM, -1)[:, place], value[:HEAD_DIM])
    assert torch.equal(flat[block_tokens * HEAD_DIM :].view(-1, HEAD_DIM)[place], value[HEAD_DIM:])
    store.close()


def test_an_order_that_is_none_is_refused() -> None:
    def rounds(k: Any, v: Any, k_cache: Any, v_cache: Any, slots: Any) -> None:
        transposing_write(k, v, k_cache, v_cache, slots)
        k_cache.clamp_(max=3)

    def forgets(k: Any, v: Any, k_cache: Any, v_cache: Any, slots: Any) -> None:
        transposing_write(k, v, k_cache, v_cache, slots)
        v_cache[..., 0] = 0

    for write in (rounds, forgets):
        with pytest.raises(InputError, match="not understood"):
            block_places(write, torch.bfloat16, 64, 32)


def test_layers_that_are_no_keys_and_values_are_refused() -> None:
    one = torch.zeros(4, 2, 16, 64)
    with pytest.raises(CacheInputError, match="different kinds"):
        PagedLayers([one, torch.zeros(4, 2, 16, 32)], 16)
    with pytest.raises(CacheInputError, match="no K and V"):
        PagedLayers([one], 24)


# The store ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("block_tokens", [16, 48, 128])
def test_what_is_saved_comes_back_in_other_blocks(device: str, block_tokens: int, tmp_path: Path) -> None:
    paged = make_paged(block_tokens, device=device)
    store = make_store(paged, tmp_path)
    tokens = list(range(333))
    pages = save(store, paged, tokens)
    assert store.take_changes() == Changes(come=set(pages.hashes))
    assert store.hashes() == set(pages.hashes)
    whole = 320 // block_tokens * block_tokens
    assert load(store, paged, tokens) == whole
    assert load(store, paged, tokens, first=block_tokens) == whole - block_tokens
    counts = store.take_counts()
    assert counts["saved_pages"] == 5
    assert counts["written_files"] == 1
    assert counts["loaded_tokens"] == 2 * whole - block_tokens
    assert not store.take_counts()
    # Another start.
    store.close()
    assert len(files(tmp_path)) == 1
    other = make_store(paged, tmp_path)
    assert other.hashes() == set(pages.hashes)
    assert load(other, paged, tokens) == whole
    other.close()


def test_quantized_pages_come_back_as_the_page_coder_has_them(tmp_path: Path) -> None:
    """The first page is in 16 bits."""
    paged = make_paged()
    for start in range(2):
        store = make_store(paged, tmp_path, formats=(INT8, INT4))
        tokens = list(range(128))
        pages = page_range(tokens, blocks_for(paged, 128, 0))
        if start == 0:
            compute(paged, pages)
            store.save(pages)
        else:
            from kvpack.integrations.vllm.kv_plan import Load

            store.load(Load("r", 0, 128, page_range(tokens, blocks_for(paged, 128, 9))))
        store.close()
    found = gathered(paged, blocks_for(paged, 128, 9), 0, 128)
    assert torch.equal(found[:, :64], page_values(pages.hashes[0]))
    k, v = page_values(pages.hashes[1]).permute(0, 2, 1, 3).float().split(HEAD_DIM, -1)
    for place, side, values, page_format in ((0, Side.K, k, INT8), (HEAD_DIM, Side.V, v, INT4)):
        layout = PageLayout(side, page_format, HEAD_DIM)
        expected = torch.from_numpy(dequantize_blocks(quantize_blocks(values.numpy(), layout), layout)).bfloat16()
        assert torch.equal(found[:, 64:, :, place : place + HEAD_DIM], expected.transpose(1, 2))


def test_pages_of_a_longer_prompt_are_saved_behind_those_that_are_there(tmp_path: Path) -> None:
    paged = make_paged()
    store = make_store(paged, tmp_path)
    tokens = list(range(400))
    save(store, paged, tokens[:200])
    save(store, paged, tokens[:200])
    assert store.take_counts()["saved_pages"] == 3
    save(store, paged, tokens)
    assert store.take_counts()["saved_pages"] == 3
    assert load(store, paged, tokens) == 384
    store.close()


def test_another_model_s_pages_are_left_alone_and_named(tmp_path: Path) -> None:
    """All that a look at the directory finds, at once: there may be thousands."""
    paged = make_paged()
    store = make_store(paged, tmp_path)
    tokens = list(range(200))
    for first in range(3):
        save(store, paged, tokens[first:])
        store.drain()
    store.close()
    count = len(files(tmp_path))
    assert count > 1
    said: list[list[tuple[Path, Exception]]] = []
    damaged: list[Path] = []
    for options in ({"fingerprint": fingerprint("other")}, {"fingerprint": fingerprint(rank=1)}):
        options |= {"report": lambda path, _error: damaged.append(path), "report_foreign": said.append}
        other = make_store(paged, tmp_path, **options)
        assert other.hashes() == set()
        assert load(other, paged, tokens) == 0
        assert other.take_counts()["foreign_files"] == count
        other.close()
    assert [sorted(path for path, _ in found) for found in said] == [files(tmp_path)] * 2
    assert all("of another model" in str(error) for found in said for _, error in found)
    assert "weights: " in str(said[0][0][1])
    assert damaged == []
    same = make_store(paged, tmp_path)
    assert load(same, paged, tokens) == 192
    same.close()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("block_tokens", "splits"), [(16, 1), (48, 3), (128, 1)])
@pytest.mark.parametrize(
    ("k", "v"),
    [(BF16, BF16), (INT8, INT4), (PageFormat.INT3, PageFormat.INT2), (PageFormat.FP8_E4M3, PageFormat.FP8_E5M2)],
)
def test_by_the_block_table_as_by_gathering(
    device: str, block_tokens: int, splits: int, k: PageFormat, v: PageFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU does, which the CPU can do as well: the same pages, and the same tokens where they are loaded."""
    monkeypatch.setattr(kv_page_codec, "runs_kernels", lambda _device: True)
    by_table = make_paged(block_tokens, splits=splits, device=device)
    monkeypatch.setattr(kv_page_codec, "runs_kernels", lambda _device: False)
    by_gathering = make_paged(block_tokens, splits=splits)
    assert by_table.blocks is not None
    assert by_gathering.blocks is None
    found: list[tuple[list[bytes], torch.Tensor]] = []
    for paged in (by_table, by_gathering):
        store = make_store(paged, formats=(k, v))
        tokens = range(64 * 7 + 20)
        pages = page_range(tokens, blocks_for(paged, len(tokens), 0))
        compute(paged, pages)
        before = [layer.clone() for layer in paged.layers]
        # In two parts, of which the second one begins in the midst of a block.
        store.save(PageRange(0, None, pages.hashes[:3], pages.tokens[:3], pages.block_ids))
        store.save(PageRange(3, pages.hashes[2], pages.hashes[3:], pages.tokens[3:], pages.block_ids))
        store.drain()
        assert all(torch.equal(layer, was) for layer, was in zip(paged.layers, before, strict=True))
        kept = [store._tiers.host.ready(one).data.numpy().tobytes() for one in pages.hashes]
        end = 64 * 7 // block_tokens * block_tokens
        moved = page_range(tokens, blocks_for(paged, len(tokens), 1))
        for layer in paged.layers:
            layer.fill_(-3.5)
        store.load(Load("request", block_tokens, end, moved))
        store.drain()
        assert store.take_loaded() == [("request", [])]
        found.append((kept, torch.stack([layer.cpu() for layer in paged.layers])))
        assert store._waiting_bytes == 0
        store.close()
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])
    kernel_tokens = (found[0][1] == -3.5).all(-1).sum().item()
    loaded = LAYERS * HEADS * (end - block_tokens)
    assert kernel_tokens == LAYERS * HEADS * BLOCKS * block_tokens - loaded, "no other token is touched"


@pytest.mark.parametrize(("block_tokens", "splits"), [(16, 1), (48, 3)])
def test_ids_of_blocks_are_checked_once(block_tokens: int, splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the engine's thread, in each step that fills a page."""
    monkeypatch.setattr(kv_page_codec, "runs_kernels", lambda _device: True)
    paged = make_paged(block_tokens, splits=splits)
    checked: list[int] = []

    def counted(block_ids: Any, *numbers: Any) -> Any:
        checked.append(len(block_ids))
        return check(block_ids, *numbers)

    check = block_table.checked_blocks
    for module in (block_table, kv_page_codec):
        monkeypatch.setattr(module, "checked_blocks", counted)
    rows = paged.rows([7, 5, 9, 2], block_tokens + 3, block_tokens * 3)
    kernel_blocks = [block * splits + part for block in (5, 9) for part in range(splits)]
    assert (rows.ids.tolist(), rows.skipped, rows.tokens) == (kernel_blocks, 3, block_tokens * 2 - 3)
    assert checked == [4]


@pytest.mark.parametrize("device", DEVICES)
def test_a_block_table_that_is_wrong_is_a_failure_of_its_own(device: str, tmp_path: Path) -> None:
    paged = make_paged(device=device)
    said: list[str] = []
    store = make_store(paged, tmp_path, on_failure=lambda what, error: said.append(f"{what}: {error}"))
    pages = save(store, paged, list(range(200)))
    wrong = replace(pages, block_ids=(*pages.block_ids[:8], BLOCKS, *pages.block_ids[9:]))
    before = [layer.clone() for layer in paged.layers]
    store.load(Load("request", 0, 192, wrong))
    store.drain()
    assert store.take_loaded() == [("request", list(wrong.block_ids[:12]))]
    assert all(torch.equal(layer, was) for layer, was in zip(paged.layers, before, strict=True))
    store.save(page_range(range(1000, 1200), wrong.block_ids))
    store.drain()
    assert said == [f"{what}: {said[0].partition(': ')[2]}" for what in ("load", "save")]
    assert f"the cache has {BLOCKS} blocks" in said[0]
    assert store._waiting_bytes == 0
    store.close()


def test_pages_of_other_formats_are_not_found(tmp_path: Path) -> None:
    """Their names do not differ here, as they do in an engine."""
    paged = make_paged()
    store = make_store(paged, tmp_path, formats=(INT8, INT8))
    save(store, paged, list(range(200)))
    store.close()
    other = make_store(paged, tmp_path)
    assert load(other, paged, list(range(200))) == 0
    assert other.take_counts()["foreign_files"] == 1
    other.close()


@pytest.mark.parametrize("place", [0.3, 0.6, 0.95])
def test_a_damaged_file_is_a_miss(place: float, tmp_path: Path) -> None:
    paged = make_paged()
    store = make_store(paged, tmp_path)
    tokens = list(range(400))
    save(store, paged, tokens[:192])
    pages = save(store, paged, tokens)
    store.close()
    assert len(files(tmp_path)) == 2
    second = max(files(tmp_path), key=lambda path: path.stat().st_mtime_ns)
    data = bytearray(second.read_bytes())
    data[int(place * len(data))] ^= 0x10
    second.write_bytes(data)
    said: list[Path] = []
    other = make_store(paged, tmp_path, report=lambda path, _error: said.append(path))
    known = other.hashes()
    reached = load(other, paged, tokens)
    assert reached == 192
    counts = other.take_counts()
    assert counts["damaged_files"] == 1
    assert counts["failed_tokens"] == 192
    assert said == [second]
    assert other.take_changes().gone == known - set(pages.hashes[:3])
    # What is computed anew is saved anew, in the place of the damaged file.
    save(other, paged, tokens)
    other.close()
    last = make_store(paged, tmp_path)
    assert load(last, paged, tokens) == 384
    assert "damaged_files" not in last.take_counts()
    last.close()


def test_a_cut_file_and_one_that_is_gone_are_misses(tmp_path: Path) -> None:
    paged = make_paged()
    store = make_store(paged, tmp_path, host_bytes=1)
    store.close()
    store = make_store(paged, tmp_path)
    tokens = list(range(200))
    save(store, paged, tokens)
    store.close()
    (file,) = files(tmp_path)
    cut = make_store(paged, tmp_path)
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size - 7)
    assert load(cut, paged, tokens) == 0
    cut.close()
    file.unlink()
    gone = make_store(paged, tmp_path)
    assert load(gone, paged, tokens) == 0
    gone.close()


def test_a_full_disk_is_warned_of_once_and_gone_on_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paged = make_paged()
    store = make_store(paged, tmp_path)
    write, tried = disk_tier.write_snapshot, []

    def full(*_arguments: Any) -> int:
        tried.append(1)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(disk_tier, "write_snapshot", full)
    monkeypatch.setattr(tiers, "_REST_S", 1e6)
    with pytest.warns(RuntimeWarning, match="No space left") as warned:
        save_all(store, paged, range(0, 4000, 1000))
    assert len(warned) == 1
    assert len(tried) == 1, "who cannot write rests for a second"
    assert store.take_counts()["failed_writes"] == 1
    assert load(store, paged, range(200)) == 192, "host memory has them"
    monkeypatch.setattr(disk_tier, "write_snapshot", write)
    monkeypatch.setattr(store._tiers, "_resting_until_s", 0.0)
    save(store, paged, range(5000, 5200))
    store.close()
    other = make_store(paged, tmp_path)
    for start in (*range(0, 4000, 1000), 5000):
        assert load(other, paged, range(start, start + 200)) == 192
    other.close()


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="mounting a small file system needs root")
def test_a_file_system_that_is_really_full(tmp_path: Path) -> None:
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=200k", "none", str(tmp_path)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted: {mounted.stderr.decode()}")
    try:
        paged = make_paged()
        store = make_store(paged, tmp_path)
        with pytest.warns(RuntimeWarning, match="No space left") as warned:
            save_all(store, paged, range(0, 8000, 1000))
        assert len(warned) == 1
        store.close()
        assert not [path for path in tmp_path.iterdir() if path.name.endswith((".tmp", ".data"))]
        other = make_store(paged, tmp_path)
        found = [load(other, paged, range(start, start + 200)) for start in range(0, 8000, 1000)]
        assert 0 < sum(found) < 8 * 192
        assert "damaged_files" not in other.take_counts()
        other.close()
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=False)


def test_both_tiers_are_bounded_and_what_they_have_is_right(tmp_path: Path) -> None:
    paged = make_paged()
    page_bytes = LAYERS * 2 * HEADS * 64 * HEAD_DIM * 2
    store = make_store(paged, tmp_path, host_bytes=7 * page_bytes, disk_bytes=12 * page_bytes)
    starts = range(0, 20_000, 1000)
    for start in starts:
        save(store, paged, range(start, start + 200))
        assert store.sizes()["host_bytes"] <= 7 * page_bytes
        assert sum(path.stat().st_size for path in files(tmp_path)) <= 12 * page_bytes
    found = {start: load(store, paged, range(start, start + 200)) for start in starts}
    assert set(found.values()) <= {0, 64, 128, 192}
    assert [found[start] for start in starts[-3:]] == [192] * 3, "the latest ones are there"
    assert found[0] == 0, "the first ones have gone"
    known = store.hashes()
    assert 12 <= len(known) <= 19
    store.close()


def test_of_a_prompt_without_room_the_beginning_stays() -> None:
    """There is no disk: pages without those before them would be of no use."""
    paged = make_paged(blocks=128)
    page_bytes = LAYERS * 2 * HEADS * 64 * HEAD_DIM * 2
    store = make_store(paged, host_bytes=12 * page_bytes)
    for start in (0, 5000):
        tokens = range(start, start + 64 * 30)
        save(store, paged, tokens)
        assert load(store, paged, tokens) == 64 * 12
        counts = store.take_counts()
        assert (counts["saved_pages"], counts["dropped_pages"]) == (12, 18)
        assert counts["saved_bytes"] == 12 * page_bytes
    short = range(9000, 9000 + 64 * 3)
    save(store, paged, short)
    assert load(store, paged, short) == 64 * 3
    assert load(store, paged, tokens) == 64 * 9, "the last ones have gone"
    store.close()


def count_encoded(store: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """To which the number of pages is added, whenever some are encoded."""
    encode, counts = store._codec.encode, list[int]()

    def counted(values: Any, formats: Any) -> Any:
        counts.append(formats.shape[-1])
        return encode(values, formats)

    monkeypatch.setattr(store._codec, "encode", counted)
    return counts


@pytest.mark.parametrize(("formats", "room_bytes"), [((BF16, BF16), 0), ((INT8, INT4), 63), ((INT8, INT4), -1)])
def test_what_will_have_no_room_is_not_encoded(
    formats: tuple[PageFormat, PageFormat], room_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor copied, each time that its prompt comes."""
    paged = make_paged(blocks=128)
    first, later = (
        sum(LAYERS * HEADS * PageLayout(side, one, HEAD_DIM).block_bytes for side, one in zip(Side, both, strict=True))
        for both in ((BF16, BF16), formats)
    )
    assert (first % 64, later % 64) == (0, 0)
    store = make_store(paged, host_bytes=first + 11 * later + room_bytes, formats=formats)
    kept = 11 if room_bytes < 0 else 12
    encoded = count_encoded(store, monkeypatch)
    pages = page_range(range(64 * 30), blocks_for(paged, 64 * 30, 0))
    compute(paged, pages)
    for begin, end in ((0, 5), (5, 21), (21, 30)):  # as vLLM computes a long prompt
        store.save(kv_page_store._part(pages, begin, end))
    store.drain()
    for saved in (kept, 0):
        assert sum(encoded) == kept
        counts = store.take_counts()
        assert (counts.get("saved_pages", 0), counts["dropped_pages"]) == (saved, 30 - kept)
        assert store.hashes() == set(pages.hashes[:kept])
        store.save(pages)
        store.drain()
    encoded.clear()
    save(store, paged, range(9000, 9000 + 64 * 9))
    assert pages.hashes[4] not in store.hashes()
    store.save(kv_page_store._part(pages, 5, 7))  # of an answer that is being written still
    store.drain()
    assert sum(encoded) == 9
    assert store.take_counts()["dropped_pages"] == 30 - kept + 2
    assert store._waiting_bytes == 0
    store.close()


def test_where_not_even_the_first_page_has_room() -> None:
    paged = make_paged()
    store = make_store(paged, host_bytes=LAYERS * 2 * HEADS * 64 * HEAD_DIM * 2 - 1)
    save(store, paged, range(200))
    assert store.take_counts() == {"dropped_pages": 3}
    store.close()


def test_pages_are_known_before_they_wait_no_longer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While files are written the same prompt comes again, or more of it."""
    paged = make_paged()
    store = make_store(paged, tmp_path)
    encoded, flush = count_encoded(store, monkeypatch), store._tiers.flush
    pages = page_range(range(320), blocks_for(paged, 320, 0))
    compute(paged, pages)

    def during_flush() -> int:
        store.save(pages)
        return flush()

    monkeypatch.setattr(store._tiers, "flush", during_flush)
    store.save(kv_page_store._part(pages, 0, 3))
    store.drain()
    store.drain()
    assert sum(encoded) == 5
    assert store.hashes() == set(pages.hashes)
    store.close()


@pytest.mark.parametrize("block_tokens", [16, 48, 128])
@pytest.mark.parametrize("has_disk", [False, True])
def test_a_long_prompt_is_loaded_piece_by_piece(
    block_tokens: int, has_disk: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that memory for a few pages is enough, and what is there counts though a later piece is damaged."""
    monkeypatch.setattr(kv_page_store, "_LOAD_PAGES", 3)
    paged = make_paged(block_tokens, blocks=128)
    store = make_store(paged, tmp_path if has_disk else None, host_bytes=1 << 22)
    tokens = range(64 * 25)
    pages = save(store, paged, tokens)
    decode, counts = store._codec.decode, list[int]()

    def counted(data: Any, *others: Any) -> Any:
        counts.append(len(data))
        if len(counts) == fails_at:
            raise RuntimeError("out of memory")
        return decode(data, *others)

    monkeypatch.setattr(store._codec, "decode", counted)
    fails_at, whole = 0, 64 * 25 // block_tokens * block_tokens
    assert load(store, paged, tokens) == whole
    assert sum(counts) == -(-whole // 64)
    assert max(counts) == counts[0] == {16: 3, 48: 3, 128: 4}[block_tokens]
    counts.clear()
    assert load(store, paged, tokens, first=9 * block_tokens) == whole - 9 * block_tokens
    counts.clear()
    fails_at = 3
    assert load(store, paged, tokens) == 2 * 64 * counts[0]
    assert [block.hash for block in store._tiers.host.all()] == list(reversed(pages.hashes)), "the first are the latest"
    store.close()


def test_the_least_recently_loaded_goes_first(tmp_path: Path) -> None:
    paged = make_paged()
    page_bytes = LAYERS * 2 * HEADS * 64 * HEAD_DIM * 2
    store = make_store(paged, tmp_path, host_bytes=3 * page_bytes, disk_bytes=10 * page_bytes)
    save(store, paged, range(200))
    for start in range(1000, 8000, 1000):
        save(store, paged, range(start, start + 200))
        assert load(store, paged, range(200)) == 192
    assert load(store, paged, range(1000, 1200)) == 0
    store.close()


def test_what_has_no_room_in_the_queue_is_dropped(tmp_path: Path) -> None:
    paged = make_paged()
    page_bytes = LAYERS * 64 * HEADS * 2 * HEAD_DIM * 2
    store = make_store(paged, tmp_path, queue_bytes=4 * page_bytes)
    store._lock.acquire()  # the saver does not come on
    stuck = [page_range(range(start, start + 200), blocks_for(paged, 200, start)) for start in (0, 1000, 2000)]
    for pages in stuck:
        compute(paged, pages)
        store.save(pages)
    store._lock.release()
    store.drain()
    counts = store.take_counts()
    assert (counts["saved_pages"], counts["dropped_pages"]) == (3, 6)
    store.save(stuck[1])
    store.drain()
    assert store.take_counts()["saved_pages"] == 3
    store.close()


def test_what_is_known_cannot_be_told_and_pages_wait_no_longer(tmp_path: Path) -> None:
    failures = []
    paged = make_paged()
    store = make_store(paged, tmp_path, on_failure=lambda what, error: failures.append((what, str(error))))
    pages = page_range(range(200), blocks_for(paged, 200, 0))
    compute(paged, pages)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store._tiers.disk, "hashes", MagicMock(side_effect=[MemoryError("no room"), set()]))
        store.save(pages)
        store.drain()
    assert (store._waiting_bytes, store._waiting_jobs, store._waiting) == (0, 0, set())
    assert failures == [("save", "no room")]
    assert store.take_counts()["failed_saves"] == 1
    assert load(store, paged, range(200)) == 192
    store.close()


def test_of_a_long_prompt_the_queue_takes_the_beginning(tmp_path: Path) -> None:
    paged = make_paged(blocks=128)
    page_bytes = LAYERS * 64 * HEADS * 2 * HEAD_DIM * 2
    store = make_store(paged, tmp_path, queue_bytes=20 * page_bytes, host_bytes=1 << 22)
    tokens = range(64 * 30)
    for kept in (16, 30):
        pages = page_range(tokens, blocks_for(paged, len(tokens), 0))
        compute(paged, pages)
        with store._lock:  # the saver does not come on
            store.save(pages)
            assert store._waiting_bytes <= 20 * page_bytes
        store.drain()
        assert store.hashes() == set(pages.hashes[:kept])
    counts = store.take_counts()
    assert (counts["saved_pages"], counts["dropped_pages"]) == (30, 14)
    assert store._waiting_bytes == 0
    assert load(store, paged, tokens) == 64 * 30
    store.close()


def test_the_queue_has_room_for_two_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an 8B Llama's shape, 128 KiB a token; of other models it follows."""
    gib, options = 1 << 30, {"queue_bytes": None, "host_bytes": 1}

    def made(*, layers: int = 32, **others: Any) -> Any:
        paged = PagedLayers([torch.zeros(4, 8, 16, 256, dtype=torch.bfloat16) for _ in range(layers)], 16)
        store = make_store(paged, **(options | others))
        store.close()
        return store

    def queue_bytes(**others: Any) -> int:
        return int(made(**others).queue_bytes)

    assert made(step_tokens=8192).step_bytes == gib
    assert queue_bytes(step_tokens=8192) == queue_bytes(step_tokens=8192, free_bytes=8 * gib) == 2 * gib
    assert queue_bytes(step_tokens=8191, layers=16) == gib
    assert queue_bytes(step_tokens=8192, free_bytes=6 * gib) == 3 * gib // 2
    assert queue_bytes(step_tokens=8192, free_bytes=0) == queue_bytes(step_tokens=512) == gib // 4
    assert queue_bytes(step_tokens=8192, free_bytes=0, queue_bytes=1) == 1, "what is said counts"
    assert queue_bytes(step_tokens=8192, free_bytes=8 * gib, outside_bytes=gib) == gib, "the rest is for activations"
    assert queue_bytes(step_tokens=8192, free_bytes=6 * gib, outside_bytes=4 * gib) == 3 * gib // 2
    assert queue_bytes(step_tokens=8192, free_bytes=8 * gib, outside_bytes=0) == gib // 4
    # On a GPU there is room for the quantized ones beside them.
    monkeypatch.setattr(kv_page_codec, "runs_kernels", lambda _device: True)
    int8 = made(step_tokens=8192, formats=(INT8, INT8))
    page_bytes = sum(32 * 8 * PageLayout(side, one, 128).block_bytes for side in Side for one in (BF16, INT8))
    assert 0 <= int8.step_bytes - 128 * page_bytes <= 16 * 4096
    assert int8.queue_bytes == 2 * int8.step_bytes


@pytest.mark.parametrize("by_kernels", [False, True])
def test_two_steps_wait_and_nothing_is_dropped(by_kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_options, "_LEAST_QUEUE_BYTES", 1)
    monkeypatch.setattr(kv_page_codec, "runs_kernels", lambda _device: by_kernels)
    paged = make_paged(blocks=256)
    store = make_store(paged, step_tokens=64 * 20, queue_bytes=None, host_bytes=1 << 22, formats=(INT8, INT4))
    prompts = [page_range(range(start, start + 64 * 20), blocks_for(paged, 64 * 20, 0)) for start in (0, 5000)]
    with store._lock:  # the saver does not come on
        for pages in prompts:
            compute(paged, pages)
            store.save(pages)
    store.drain()
    counts = store.take_counts()
    assert (counts["saved_pages"], counts.get("dropped_pages", 0)) == (40, 0)
    store.close()


def test_keys_and_values_are_those_of_the_moment_of_saving(tmp_path: Path) -> None:
    """vLLM's blocks may be another request's before a thread looks at them."""
    paged = make_paged()
    store = make_store(paged, tmp_path)
    store._lock.acquire()
    try:
        pages = page_range(range(200), blocks_for(paged, 200, 0))
        compute(paged, pages)
        store.save(pages)
        for layer in paged.layers:
            layer.fill_(7)
    finally:
        store._lock.release()
    store.drain()
    assert load(store, paged, range(200)) == 192
    store.close()


def test_two_engines_share_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_page_store, "_SCAN_INTERVAL_S", 0.0)
    paged = make_paged()
    one, two = make_store(paged, tmp_path), make_store(paged, tmp_path)
    pages = save(one, paged, range(200))
    two.look_around()
    two.drain()
    assert two.take_changes().come == set(pages.hashes)
    assert load(two, paged, range(200)) == 192
    # One of them removes a file that the other still thinks of.
    for path in files(tmp_path):
        path.unlink()
    three = make_store(paged, tmp_path)
    assert load(three, paged, range(200)) == 0
    for store in (one, two, three):
        store.close()


def test_one_look_at_the_directory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that takes longer than the time between two: those that were behind it would keep pages from being saved."""
    monkeypatch.setattr(kv_page_store, "_SCAN_INTERVAL_S", 0.0)
    store = make_store(make_paged(), tmp_path)
    scans, goes_on = [], threading.Event()

    def slow() -> None:
        scans.append(len(scans))
        assert goes_on.wait(60)

    monkeypatch.setattr(store._tiers.disk, "scan", slow)
    for _ in range(20):
        store.look_around()
    goes_on.set()
    store.drain()
    assert scans == [0]
    store.look_around()
    store.drain()
    assert scans == [0, 1]
    store.close()


def test_an_error_of_a_thread_is_counted_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paged = make_paged()
    said: list[str] = []
    store = make_store(paged, tmp_path, on_failure=lambda what, error: said.append(f"{what}: {error}"))
    save(store, paged, range(200))

    def fails(*_arguments: Any) -> None:
        raise error

    # vLLM waits for an answer, whatever is wrong.
    error: Exception = AssertionError("out of order")
    monkeypatch.setattr(store._codec, "decode", fails)
    assert load(store, paged, range(200)) == 0
    monkeypatch.setattr(store._codec, "encode", fails)
    save(store, paged, range(2000, 2200))
    assert said == ["load: out of order", "save: out of order"]
    assert set(store.take_counts()) >= {"failed_loads", "failed_saves"}
    said.clear()
    error = RuntimeError("out of memory")
    assert load(store, paged, range(200)) == 0
    monkeypatch.setattr(store._codec, "encode", fails)
    save(store, paged, range(1000, 1200))
    counts = store.take_counts()
    assert (counts["failed_loads"], counts["failed_saves"]) == (1, 1)
    assert said == ["load: out of memory", "save: out of memory"]
    monkeypatch.undo()
    assert load(store, paged, range(200)) == 192
    store.close()


# Kills ----------------------------------------------------------------------------------------------------------------

KILLED = """
import os, random, signal, sys, time
from pathlib import Path
sys.path[:0] = sys.argv[3:]
import torch
torch.set_num_threads(1)
from paged_prompts import compute, blocks_for, load, make_paged, make_store, page_range, save
directory, kills = Path(sys.argv[1]), int(sys.argv[2])
warm = make_store(make_paged(), directory / "warm")
save(warm, make_paged(), range(200))  # compiles
warm.close()
directory = directory / "pages"
random.seed(1)
promised = set()  # prompts of which a child has said that they are in files
complete = 0
for kill in range(kills):
    read, write = os.pipe()
    if not (child := os.fork()):
        paged = make_paged()
        store = make_store(paged, directory)
        for number in range(1000):
            start = 1_000_000 * kill + 300 * number
            save(store, paged, range(start, start + 64 * (1 + number % 4)))
            os.write(write, f"{start}\\n".encode())
        os._exit(0)
    os.close(write)
    said, wanted = b"", random.randint(1, 4)  # saves that are complete, and then some time
    while said.count(b"\\n") < wanted:
        said += os.read(read, 1 << 16)
    time.sleep(random.random() * 0.1)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while data := os.read(read, 1 << 16):
        said += data
    os.close(read)
    lines = said.decode().splitlines()
    promised |= {int(line) for line in lines}
    complete += len(lines)
    left = [path.name for path in directory.glob(".*") if path.suffix in (".tmp", ".data")]
    assert len(left) <= 3, left
    if kill % 10 == 9 or kill == kills - 1:
        paged = make_paged()
        store = make_store(paged, directory, host_bytes=1 << 16)
        for start in sorted(promised):
            number = start % 1_000_000 // 300
            tokens = 64 * (1 + number % 4)
            assert load(store, paged, range(start, start + tokens)) == tokens, start
        counts = store.take_counts()
        assert not {"damaged_files", "foreign_files", "failed_tokens"} & counts.keys(), counts
        store.close()
        promised = set(random.sample(sorted(promised), min(20, len(promised))))
print(complete, len(list(directory.glob("*.kvpack.safetensors"))))
"""


def test_a_process_that_is_killed_while_it_saves_leaves_whole_files(tmp_path: Path) -> None:
    """KVPACK_KILLS says how often; the bits of all that was said to be saved are compared."""
    kills = int(os.environ.get("KVPACK_KILLS", "6"))
    here = Path(__file__).parent
    folders = [str(here), str(here.parents[1])]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), str(kills), *folders], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    complete, count = map(int, done.stdout.split()[-2:])
    assert complete > 0
    assert count >= complete
