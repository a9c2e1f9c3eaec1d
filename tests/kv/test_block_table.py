"""Tokens in blocks that a table names: kernels find and fill the same rows as gathering does, and touch no others.

They run on the emulator everywhere, and on a GPU where there is one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from emulated_device import emulated_launch  # noqa: E402
from kernel_runs import DEVICES, KernelRuns  # noqa: E402

from kvpack.errors import CacheInputError, PageError  # noqa: E402
from kvpack.format.pages import PAGE_TOKENS, PageFormat, PageLayout, Side  # noqa: E402
from kvpack.runtime.device.kernels import Kernel  # noqa: E402
from kvpack.runtime.kv import page_kernels  # noqa: E402
from kvpack.runtime.kv.block_table import BlockCache, BlockRows  # noqa: E402
from kvpack.runtime.kv.page_kernels import (  # noqa: E402
    left_out,
    new_status,
    quantize_pages,
    read_to_blocks,
    read_tokens,
    write_from_blocks,
    write_tokens,
)

LAYERS, BLOCKS = 3, 24
FULL = page_kernels.PAGE_FORMATS
# Dimensions of a layer's tensor, or of all layers' (L), in the order of memory: 2 is K or V, B a block, N a token of
# it, H a head, D a dimension.
LAYOUTS = ("2BNHD", "B2NHD", "2BHND", "BHN2D", "BNH2D", "BLNH2D", "BHLN2D")


def to_the_end(value: Any) -> Any:
    """All of a tensor's memory from its first element on: the emulator takes arrays in one piece, layers lie behind."""
    if not isinstance(value, torch.Tensor):
        return value
    elements = value.untyped_storage().nbytes() // value.element_size() - value.storage_offset()
    return value.as_strided((elements,), (1,))


def launch(kernel: Kernel, grid: Any, block: Any, arguments: Sequence[Any], **others: Any) -> None:
    emulated_launch(kernel, grid, block, [to_the_end(value) for value in arguments], **others)


@pytest.fixture(params=DEVICES)
def runs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> KernelRuns:
    return KernelRuns(request.param, monkeypatch, launch)


class Memory:
    """A cache of random bits in a given layout, on the CPU and the same on another device.

    Attributes:
        whole: all of its memory.
        sides: [2, layers, blocks, heads, block_tokens, head_dim], views of it.
    """

    def __init__(
        self, layout: str, block_tokens: int, heads: int, head_dim: int, dtype: torch.dtype, device: str, seed: int = 0
    ) -> None:
        sizes = {"2": 2, "L": LAYERS, "B": BLOCKS, "N": block_tokens, "H": heads, "D": head_dim}
        order = layout if "L" in layout else "L" + layout
        count = int(np.prod([sizes[name] for name in order]))
        bits = np.random.default_rng(seed).integers(0, 1 << 16, count).astype(np.uint16).view(np.int16)
        self.whole = torch.from_numpy(bits).view(dtype).to(device)
        self.sides = self.whole.view([sizes[name] for name in order]).permute([order.index(name) for name in "2LBHND"])
        self.cache = BlockCache(list(self.sides[0]), list(self.sides[1]))

    def rows(self, side: Side, ids: Sequence[int], first: int, tokens: int) -> torch.Tensor:
        """[layers, heads, tokens, head_dim], one token after the other."""
        size = self.sides.shape[4]
        one_by_one = [self.sides[side, :, ids[t // size], :, t % size] for t in range(first, first + tokens)]
        return torch.stack(one_by_one, 2)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.int16).cpu(), b.view(torch.int16).cpu())


def random_table(blocks: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).permutation(BLOCKS)[:blocks].tolist()


def page_entries(layers: int, pages: int, heads: int, head_dim: int, formats: Sequence[PageFormat]) -> tuple[Any, int]:
    """i64 [layers, 2, pages] of formats in turn, one page behind another, and how many bytes they take."""
    entries, end = np.empty((layers, len(Side), pages), np.int64), 64
    for place, (layer, side, page) in enumerate(np.ndindex(*entries.shape)):
        page_format = formats[place % len(formats)]
        entries[layer, side, page] = end | page_format
        end += heads * PageLayout(Side(side), page_format, head_dim).block_bytes
    return torch.from_numpy(entries), end


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("block_tokens", "first", "tokens", "head_dim", "dtype"),
    [
        (16, 0, 128, 64, torch.bfloat16),
        (16, 37, 100, 128, torch.float16),
        (48, 64, 192, 80, torch.bfloat16),
        (128, 64, 64, 64, torch.float16),
        (7, 3, 65, 64, torch.bfloat16),
    ],
)
def test_pages_of_tokens_in_blocks(
    runs: KernelRuns, layout: str, block_tokens: int, first: int, tokens: int, head_dim: int, dtype: torch.dtype
) -> None:
    heads = 2
    memory = Memory(layout, block_tokens, heads, head_dim, dtype, runs.device)
    before = memory.whole.clone()
    ids = random_table(-(-(first + tokens) // block_tokens), 1)
    entries, size = page_entries(LAYERS, -(-tokens // PAGE_TOKENS), heads, head_dim, [FULL[dtype]])
    table = entries.transpose(0, 1).contiguous()
    k, v = (memory.rows(side, ids, first, tokens).cpu() for side in Side)
    expected, zeros = torch.full((size,), 0xA5, dtype=torch.uint8), torch.zeros(LAYERS, dtype=torch.int32)
    runs.by_kernels = False
    write_tokens(k, v, table, zeros, new_status("cpu"), expected)
    for by_kernels in (False, True):
        runs.by_kernels = by_kernels
        found, status = torch.full_like(expected, 0xA5, device=runs.device), new_status(runs.device)
        write_from_blocks(memory.cache.rows(ids, first, tokens), table.to(runs.device), status, found)
        assert left_out(status) is None
        assert torch.equal(found.cpu(), expected)
    assert same_bits(memory.whole, before)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("block_tokens", "first", "tokens", "skipped", "head_dim", "dtype"),
    [
        (16, 0, 128, 0, 64, torch.bfloat16),
        (16, 16, 48, 16, 128, torch.float16),
        (48, 5, 150, 21, 80, torch.bfloat16),
        (128, 128, 128, 0, 64, torch.float16),
        (7, 3, 65, 40, 64, torch.bfloat16),
    ],
)
def test_tokens_of_pages_into_blocks(
    runs: KernelRuns,
    layout: str,
    block_tokens: int,
    first: int,
    tokens: int,
    skipped: int,
    head_dim: int,
    dtype: torch.dtype,
) -> None:
    """Of pages of all formats. All other bits of the cache stay as they are."""
    heads, pages = 2, -(-(skipped + tokens) // PAGE_TOKENS)
    memory = Memory(layout, block_tokens, heads, head_dim, dtype, runs.device)
    ids = random_table(-(-(first + tokens) // block_tokens), 2)
    entries, bytes_of_all = quantized_pages(runs, pages, heads, head_dim, dtype)
    expected = Memory(layout, block_tokens, heads, head_dim, dtype, "cpu")
    runs.by_kernels = False
    starts = torch.full((LAYERS,), skipped, dtype=torch.int32)
    for side in Side:
        table = entries[:, side].contiguous()
        shape = (starts, starts + tokens, tokens, head_dim, heads, dtype)
        values = read_tokens(table, side, *shape, new_status("cpu"), bytes_of_all)
        for place in range(tokens):
            token = first + place
            block, at = ids[token // block_tokens], token % block_tokens
            expected.sides[side, :, block, :, at] = values[:, :, place]
    assert not same_bits(memory.whole, expected.whole)
    for by_kernels in (False, True):
        runs.by_kernels = by_kernels
        memory = Memory(layout, block_tokens, heads, head_dim, dtype, runs.device)
        status, there = new_status(runs.device), bytes_of_all.to(runs.device)
        for side in Side:
            table = entries[:, side].contiguous().to(runs.device)
            read_to_blocks(memory.cache.rows(ids, first, tokens), table, side, skipped, status, there)
        assert left_out(status) is None
        assert same_bits(memory.whole, expected.whole)


def quantized_pages(
    runs: KernelRuns, pages: int, heads: int, head_dim: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Entries [layers, 2, pages] of pages of all formats in turn, and the memory that they lie in."""
    formats = [one for one in PageFormat if one.is_quantized or one == FULL[dtype]]
    entries, size = page_entries(LAYERS, pages, heads, head_dim, formats)
    behind, behind_size = page_entries(LAYERS, pages, heads, head_dim, [FULL[dtype]])
    full = torch.where(entries & 15 == FULL[dtype], entries, behind + size)
    memory = torch.zeros(size + behind_size, dtype=torch.uint8)
    generator = torch.Generator().manual_seed(head_dim)
    k, v = (torch.randn(LAYERS, heads, 64 * pages, head_dim, generator=generator).to(dtype) for _ in Side)
    runs.by_kernels = False
    table, zeros = full.transpose(0, 1).contiguous(), torch.zeros(LAYERS, dtype=torch.int32)
    write_tokens(k, v, table, zeros, new_status("cpu"), memory)
    for side in Side:
        for target in formats:
            chosen = entries[:, side] & 15 == target
            if target.is_quantized and chosen.any():
                jobs = torch.stack([full[:, side][chosen], entries[:, side][chosen]], -1)
                quantize_pages(jobs, side, FULL[dtype], target, head_dim, heads, new_status("cpu"), memory)
    return entries, memory[:size].clone()


@pytest.mark.gpu
def test_layers_that_were_allocated_one_by_one() -> None:
    """In any order of addresses, and with memory between them that stays as it is."""
    generator = torch.Generator(device="cuda").manual_seed(0)
    layers = [torch.randn(BLOCKS, 2, 16, 2 * 64, generator=generator, device="cuda").half() for _ in range(LAYERS)]
    layers = [layers[2], layers[0], layers[1]]
    cache = BlockCache([one[..., :64] for one in layers], [one[..., 64:] for one in layers])
    rows = cache.rows(random_table(8, 3), 0, 128)
    entries, size = page_entries(LAYERS, 2, 2, 64, [PageFormat.FP16])
    pages, status = torch.zeros(size, dtype=torch.uint8, device="cuda"), new_status("cuda")
    table = entries.transpose(0, 1).contiguous().cuda()
    write_from_blocks(rows, table, status, pages)
    expected = torch.zeros_like(pages)
    k, v = map(rows.gathered, Side)
    write_tokens(k, v, table, torch.zeros(LAYERS, dtype=torch.int32, device="cuda"), status, expected)
    assert torch.equal(pages, expected)
    assert pages.any()
    moved = cache.rows(random_table(8, 4), 0, 128)
    before = [one.clone() for one in layers]
    for side in Side:
        read_to_blocks(moved, table[side], side, 0, status, pages)
        assert torch.equal(moved.gathered(side), (k, v)[side])
    assert left_out(status) is None
    others = [block for block in range(BLOCKS) if block not in moved.ids.tolist()]
    assert all(torch.equal(one[others], was[others]) for one, was in zip(layers, before, strict=True))


# What is refused -----------------------------------------------------------------------------------------------------


def small_cache(dtype: torch.dtype = torch.float16) -> BlockCache:
    layers = torch.zeros(LAYERS, 2, BLOCKS, 1, 16, 64, dtype=dtype)
    return BlockCache(list(layers[:, 0]), list(layers[:, 1]))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([0, 1, 2, 3, BLOCKS], f"blocks 1 to {BLOCKS}; the cache has {BLOCKS} blocks"),
        ([0, 1, -1, 3, 4], "blocks -1 to 4"),
        ([0, 1, 2, 3], "of 4 blocks; 5 are wanted"),
        ([0, 1, 2, 1, 4], "a block twice"),
    ],
)
def test_a_wrong_table_is_refused_before_anything_is_launched(ids: list[int], message: str) -> None:
    with pytest.raises(CacheInputError, match=message):
        small_cache().rows(ids, 16, 64)


@pytest.mark.parametrize(("first", "tokens"), [(-16, 64), (-1, 0), (0, -1), (20, -2)])
def test_negative_numbers_of_tokens_are_refused(first: int, tokens: int) -> None:
    with pytest.raises(CacheInputError, match=f"{tokens} tokens from token {first} on"):
        small_cache().rows([3, 1, 2, 0], first, tokens)


def test_what_comes_before_the_tokens_may_be_anything() -> None:
    rows = small_cache().rows([-1, 5, 2, 3, 4], 16, 64)
    assert (rows.ids.tolist(), rows.skipped, rows.tokens) == ([5, 2, 3, 4], 0, 64)


def test_caches_that_are_refused() -> None:
    one = torch.zeros(4, 2, 16, 64, dtype=torch.float16)
    with pytest.raises(CacheInputError, match="float8_e4m3fn"):
        BlockCache([one.to(torch.float8_e4m3fn)], [one.to(torch.float8_e4m3fn)])
    with pytest.raises(CacheInputError, match="different kinds"):
        BlockCache([one, one], [one, one.bfloat16()])
    other = torch.zeros(2, 4, 2, 16, 64, dtype=torch.float16)
    with pytest.raises(CacheInputError, match="bytes behind keys"):
        BlockCache([other[0], other[0]], [other[1], other[0]])
    with pytest.raises(CacheInputError, match="in one piece"):
        BlockCache([one.transpose(2, 3)], [one.transpose(2, 3)])
    wide = torch.zeros(4, 2, 16, 68, dtype=torch.float16)
    for part in (wide[..., :64], wide[..., 4:]):
        with pytest.raises(CacheInputError, match="multiples of 16 bytes"):
            BlockCache([part], [part])


def test_pages_that_do_not_fit_the_tokens_are_refused() -> None:
    rows: BlockRows = small_cache().rows([3, 1, 2, 0], 0, 64)
    pages, status = torch.zeros(64, dtype=torch.uint8), new_status("cpu")
    with pytest.raises(PageError, match=r"\(2, 3, 2\)"):
        write_from_blocks(rows, torch.zeros(2, LAYERS, 2, dtype=torch.int64), status, pages)
    for first in (-1, 1):
        with pytest.raises(PageError, match=f"tokens {first} …"):
            read_to_blocks(rows, torch.zeros(LAYERS, 1, dtype=torch.int64), Side.K, first, status, pages)
