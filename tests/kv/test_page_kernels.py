"""The kernels that write, quantize and read pages: their bytes are those of the page coder.

They run on the emulator everywhere, and on a GPU where there is one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from emulated_device import emulated_launch  # noqa: E402
from kernel_runs import DEVICES, KernelRuns  # noqa: E402

from kvpack.encode.page_coder import FLOAT_TYPES, dequantize_blocks, quantize_blocks  # noqa: E402
from kvpack.errors import PageError  # noqa: E402
from kvpack.format.pages import PAGE_TOKENS, PageFormat, PageLayout, Side, split_block  # noqa: E402
from kvpack.runtime.device import kernels  # noqa: E402
from kvpack.runtime.kv import page_kernels  # noqa: E402
from kvpack.runtime.kv.page_kernels import left_out, new_status, quantize_pages, read_tokens, write_tokens  # noqa: E402

QUANTIZED = [page_format for page_format in PageFormat if page_format.is_quantized]
SIXTEEN_BITS = [PageFormat.FP16, PageFormat.BF16]
TORCH_TYPES = {page_format: dtype for dtype, page_format in page_kernels.PAGE_FORMATS.items()}
POISON = 0xA5
NO_PAGE = -1


class Runner(KernelRuns):
    """Runs a function of `page_kernels` twice: by the CPU's code, and by kernels."""

    def __call__(
        self, function: Callable[..., Any], *arguments: Any, pages: torch.Tensor, **options: torch.Tensor
    ) -> tuple[torch.Tensor, tuple[int, int] | None, Any]:
        """(all of `pages` afterwards, what was left out, the result), which are found to be the same in both ways."""
        expected_pages, expected_status = pages.clone(), new_status("cpu")
        self.by_kernels = False
        expected = function(*arguments, status=expected_status, pages_base=expected_pages, **options)
        self.by_kernels = True
        moved = [value.to(self.device) if isinstance(value, torch.Tensor) else value for value in arguments]
        found_pages, status = pages.to(self.device, copy=True), new_status(self.device)
        options = {name: value.to(self.device) for name, value in options.items()}
        found = function(*moved, status=status, pages_base=found_pages, **options)
        assert torch.equal(status.cpu(), expected_status)
        differ = (found_pages.cpu() != expected_pages).nonzero()
        assert not len(differ), f"{len(differ)} bytes differ, the first at {differ[0].item()}"
        if expected is not None:
            found = found.cpu()
            nans = expected.isnan()
            assert torch.equal(found.isnan(), nans)
            assert torch.equal(found[~nans], expected[~nans])
        return expected_pages, left_out(expected_status), expected


@pytest.fixture(params=DEVICES)
def run(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Runner:
    return Runner(request.param, monkeypatch)


# Quantizing ----------------------------------------------------------------------------------------------------------


def odd_values(shape: tuple[int, ...], dtype: np.dtype, seed: int) -> np.ndarray:
    """[…, 64, head_dim]: channels of different size and offset; in some rows and columns what is hard to quantize."""
    rng = np.random.default_rng(seed)
    size = np.exp(rng.normal(0, 1.5, shape[-1]))
    x = (rng.normal(0, 1, shape) * size + rng.normal(0, 2, shape[-1])).astype(np.float32)
    columns = iter(rng.permutation(shape[-1]))
    rows = iter(rng.permutation(PAGE_TOKENS))

    def both(make: Callable[[tuple[int, ...]], Any]) -> None:
        column, row = next(columns), next(rows)
        x[..., :, column] = make(x[..., :, column].shape)
        x[..., row, :] = make(x[..., row, :].shape)

    big = 1e38 if dtype == ml_dtypes.bfloat16 else 6e4
    both(np.zeros)
    both(lambda shape: np.full(shape, -0.0))
    both(lambda shape: np.full(shape, 1.75))
    both(lambda shape: np.full(shape, -3e-8))
    both(lambda shape: rng.choice([-3e-8, 0, -0.0, 3e-8], shape))  # where scales are denormal or 0
    both(lambda shape: rng.choice([-2e-20, 1e-20], shape))  # squares are denormal
    both(lambda shape: rng.choice([-1e-39, 0, 1e-39], shape))  # denormal in bf16, 0 in fp16
    both(lambda shape: rng.choice([-2e-38, 700, 1.5e-38], shape))  # quotients are denormal
    both(lambda shape: rng.choice([-big, big, big / 3], shape))
    both(lambda shape: rng.choice([-0.5, 0.5, 1.5, 2.5, 7.5, -127, 127], shape))  # ties
    both(lambda shape: rng.normal(0, 1, shape) * np.exp2(rng.uniform(-30, 0, shape)))  # fp8's denormals
    x[..., 5, next(columns)] = np.inf
    x[..., 6, next(columns)] = -np.inf
    x[..., next(rows), 7] = np.nan
    with np.errstate(over="ignore"):
        return x.astype(dtype)


def pages_of(blocks: np.ndarray, page_format: PageFormat, *, gap: int = 48) -> tuple[np.ndarray, list[int]]:
    """Blocks [pages, heads, block_bytes] in memory, apart from each other, and their entries."""
    size = blocks[0].size
    memory = np.full((len(blocks), size + gap), POISON, np.uint8)
    memory[:, :size] = blocks.reshape(len(blocks), size)
    return memory.reshape(-1), [i * (size + gap) | int(page_format) for i in range(len(blocks))]


def check_quantize(
    run: Runner, values: np.ndarray, side: Side, source: PageFormat, target: PageFormat, head_dim: int
) -> None:
    """`values` [pages, heads, 64, head_dim], of the type that pages of `source` are made from."""
    from_layout, to_layout = PageLayout(side, source, head_dim), PageLayout(side, target, head_dim)
    blocks = quantize_blocks(values, from_layout)
    expected = quantize_blocks(dequantize_blocks(blocks, from_layout), to_layout)
    sources, from_entries = pages_of(blocks, source)
    targets, to_entries = pages_of(np.full(expected.shape, POISON, np.uint8), target)
    jobs = torch.tensor([(a, b + len(sources)) for a, b in zip(from_entries, to_entries, strict=True)])
    pages = torch.from_numpy(np.concatenate([sources, targets]))
    heads = values.shape[1]
    after, missing, _ = run(quantize_pages, jobs, side, source, target, head_dim, heads, pages=pages)
    assert missing is None
    assert np.array_equal(after.numpy()[: len(sources)], sources)
    assert np.array_equal(after.numpy()[len(sources) :], pages_of(expected, target)[0])


@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("source", SIXTEEN_BITS)
@pytest.mark.parametrize("target", QUANTIZED)
@pytest.mark.parametrize("side", Side)
def test_quantize(run: Runner, side: Side, target: PageFormat, source: PageFormat, head_dim: int) -> None:
    check_quantize(run, odd_values((2, 2, 64, head_dim), FLOAT_TYPES[source], head_dim), side, source, target, head_dim)


@pytest.mark.parametrize("head_dim", [96, 256])
@pytest.mark.parametrize("target", [PageFormat.INT8, PageFormat.INT2])
@pytest.mark.parametrize("side", Side)
def test_quantize_other_head_dims(run: Runner, side: Side, target: PageFormat, head_dim: int) -> None:
    values = odd_values((1, 1, 64, head_dim), np.dtype(np.float16), head_dim)
    check_quantize(run, values, side, PageFormat.FP16, target, head_dim)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (PageFormat.INT8, PageFormat.INT4),
        (PageFormat.INT4, PageFormat.INT3),
        (PageFormat.INT3, PageFormat.INT2),
        (PageFormat.INT8, PageFormat.INT2),
        (PageFormat.INT2, PageFormat.INT2),
        (PageFormat.FP8_E4M3, PageFormat.INT4),
        (PageFormat.FP8_E5M2, PageFormat.INT3),
        (PageFormat.INT4, PageFormat.FP8_E4M3),
    ],
)
@pytest.mark.parametrize("side", Side)
def test_quantize_again(run: Runner, side: Side, source: PageFormat, target: PageFormat) -> None:
    head_dim = 80
    values = odd_values((2, 1, 64, head_dim), np.dtype(ml_dtypes.bfloat16), 1)
    check_quantize(run, values, side, source, target, head_dim)


@pytest.mark.parametrize("target", [PageFormat.FP8_E4M3, PageFormat.FP8_E5M2])
def test_fp8_rounding(run: Runner, target: PageFormat) -> None:
    """All fp16 values up to the largest that is scaled by 1, so that codes are theirs, rounded."""
    limit = 448
    bits = np.arange(0x7C00, dtype=np.uint16).view(np.float16)
    bits = bits[bits < limit]
    bits = np.resize(bits, (len(bits) + 63) // 63 * 63).reshape(-1, 63)  # a row of each column is the largest
    count = -len(bits) % 64
    bits = np.concatenate([bits, bits[:count]])
    tokens = np.concatenate([np.full((len(bits), 1), limit, np.float16), bits * np.float16(-1)], axis=1)
    values = tokens.reshape(-1, 64, 64)[:, None]
    check_quantize(run, values, Side.V, PageFormat.FP16, target, 64)
    check_quantize(run, np.ascontiguousarray(np.swapaxes(-values, -1, -2)), Side.K, PageFormat.FP16, target, 64)


@pytest.mark.parametrize("side", Side)
def test_quantize_leaves_out_what_has_another_format(run: Runner, side: Side) -> None:
    head_dim, source, target = 64, PageFormat.FP16, PageFormat.INT4
    layout = PageLayout(side, source, head_dim)
    blocks = quantize_blocks(odd_values((1, 3, 64, head_dim), np.dtype(np.float16), 3), layout)
    memory, (entry,) = pages_of(blocks, source)
    to = len(memory) | target
    jobs = torch.tensor([(entry, to), (entry, NO_PAGE), (entry + 1, to), (NO_PAGE, NO_PAGE), (entry, to + 1)])
    pages = torch.from_numpy(np.concatenate([memory, np.full_like(memory, POISON)]))
    _, missing, _ = run(quantize_pages, jobs, side, source, target, head_dim, 3, pages=pages)
    assert missing == (4, 1)


# Writing -------------------------------------------------------------------------------------------------------------


class Cache:
    """Pages of 16 bits for some sequences, over memory that holds NaN."""

    def __init__(
        self, batch: int, max_pages: int, heads: int, head_dim: int, page_format: PageFormat, seed: int = 0
    ) -> None:
        self.heads, self.head_dim, self.format = heads, head_dim, page_format
        size = heads * PageLayout(Side.K, page_format, head_dim).block_bytes + 16
        count = 2 * batch * max_pages
        self.pages = torch.full((count * size,), 0xFF, dtype=torch.uint8)
        places = torch.from_numpy(np.random.default_rng(seed).permutation(count)) * size
        self.table = places.reshape(2, batch, max_pages) | int(page_format)

    def tokens(self, batch: int, count: int, seed: int) -> torch.Tensor:
        """[batch, heads, count, head_dim], as a projection gives them: heads inside tokens."""
        bits = np.random.default_rng(seed).integers(0, 1 << 16, (batch, count, self.heads, self.head_dim))
        values = torch.from_numpy(bits.astype(np.uint16).view(np.int16)).view(TORCH_TYPES[self.format])
        return values.transpose(1, 2)

    def held(self, side: Side, sequence: int, page: int) -> np.ndarray:
        """u16 [heads, 64, head_dim]"""
        layout = PageLayout(side, self.format, self.head_dim)
        first = int(self.table[side, sequence, page]) & ~15
        blocks = self.pages.numpy()[first : first + self.heads * layout.block_bytes].reshape(self.heads, -1)
        return split_block(blocks, layout).codes.astype(np.uint16)


@pytest.mark.parametrize(
    ("head_dim", "page_format"),
    [(64, PageFormat.FP16), (80, PageFormat.BF16), (128, PageFormat.FP16), (256, PageFormat.BF16)],
)
def test_write(run: Runner, head_dim: int, page_format: PageFormat) -> None:
    """Prefill of different lengths, then one token and some at a time: pages hold the tokens, and zeros behind them."""
    batch, heads, max_pages = 3, 2, 4
    cache = Cache(batch, max_pages, heads, head_dim, page_format)
    positions = torch.tensor([0, 0, 0], dtype=torch.int32)
    written: list[list[torch.Tensor]] = [[], []]
    for step, count in enumerate((63, 1, 1, 70, 3)):
        k, v = cache.tokens(batch, count, 2 * step), cache.tokens(batch, count, 2 * step + 1)
        cache.pages, missing, _ = run(write_tokens, k, v, cache.table, positions, pages=cache.pages)
        assert missing is None
        written[0].append(k)
        written[1].append(v)
        positions += count
    length = int(positions[0])
    for side in Side:
        tokens = torch.cat(written[side], 2).view(torch.int16).numpy().view(np.uint16)
        for b in range(batch):
            held = np.concatenate([cache.held(side, b, page) for page in range(-(-length // PAGE_TOKENS))], 1)
            assert np.array_equal(held[:, :length], tokens[b])
            assert not held[:, length:].any()


def test_write_where_each_sequence_is(run: Runner) -> None:
    cache = Cache(5, 3, 2, 64, PageFormat.FP16)
    cache.pages.copy_(torch.from_numpy(np.random.default_rng(0).integers(0, 256, len(cache.pages)).astype(np.uint8)))
    positions = torch.tensor([0, 1, 63, 64, 100], dtype=torch.int32)
    for count in (1, 5, 66):
        k, v = cache.tokens(5, count, 0), cache.tokens(5, count, 1)
        cache.pages, missing, _ = run(write_tokens, k, v, cache.table, positions, pages=cache.pages)
        assert missing is None


def test_write_the_last_of_each_row(run: Runner) -> None:
    """Different numbers of tokens: none of the others is written nor missed, even where there is no page for them."""
    cache = Cache(5, 2, 2, 64, PageFormat.FP16)
    cache.pages.copy_(torch.from_numpy(np.random.default_rng(0).integers(0, 256, len(cache.pages)).astype(np.uint8)))
    cache.table[:, 0] = NO_PAGE
    positions = torch.tensor([0, 62, 64, 128, -1], dtype=torch.int32)
    counts = torch.tensor([0, 3, 40, 0, 1], dtype=torch.int32)
    k, v = cache.tokens(5, 40, 1), cache.tokens(5, 40, 2)
    held = {(side, b, page): cache.held(side, b, page) for side in Side for b in (1, 2, 3) for page in range(2)}
    cache.pages, missing, _ = run(write_tokens, k, v, cache.table, positions, pages=cache.pages, counts=counts)
    assert missing == (2, 4)
    for side, given in zip(Side, (k, v), strict=True):
        tokens = given.contiguous().view(torch.int16).numpy().view(np.uint16)
        held[side, 1, 0][:, 62:] = tokens[1, :, 37:39]
        held[side, 1, 1][:] = 0
        held[side, 1, 1][:, :1] = tokens[1, :, 39:]
        held[side, 2, 1][:] = 0
        held[side, 2, 1][:, :40] = tokens[2]
    for place, expected in held.items():
        assert np.array_equal(cache.held(*place), expected)


def test_write_rows_that_are_not_aligned(run: Runner) -> None:
    cache = Cache(2, 1, 2, 64, PageFormat.BF16)
    wide = cache.tokens(2, 10, 0).new_zeros(2, 2, 10, 67)
    wide[:] = torch.randn(2, 2, 10, 67)
    zeros = torch.zeros(2, dtype=torch.int32)
    run(write_tokens, wide[..., 3:], wide[..., :64], cache.table, zeros, pages=cache.pages)
    across = wide[..., :64].transpose(2, 3).contiguous().transpose(2, 3)
    run(write_tokens, across, across, cache.table, zeros, pages=cache.pages)


def test_write_counts_what_has_no_page(run: Runner) -> None:
    cache = Cache(4, 2, 2, 64, PageFormat.FP16)
    positions = torch.tensor([0, 100, -1, 120], dtype=torch.int32)
    table = cache.table.clone()
    table[Side.V, 3, 1] = NO_PAGE
    table[Side.K, 3, 1] += 1  # BF16
    k = cache.tokens(4, 70, 0)
    # Sequence 1 has 42 tokens behind its last page. Sequence 2 has no place for any. Sequence 3 has 8 tokens without a
    # page and 62 behind.
    _, missing, _ = run(write_tokens, k, k, table, positions, pages=cache.pages)
    assert missing == (2 * 42 + 2 * 70 + 2 * 70, 1)


def test_order_of_threads_does_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Runner("cpu", monkeypatch)
    cache = Cache(2, 2, 1, 64, PageFormat.FP16)
    k = cache.tokens(2, 70, 0)
    values = odd_values((1, 2, 64, 64), np.dtype(np.float16), 0)
    for seed in range(2):
        monkeypatch.setattr(kernels, "launch", functools.partial(emulated_launch, shuffle_seed=seed))
        run(write_tokens, k, k, cache.table, torch.tensor([0, 20], dtype=torch.int32), pages=cache.pages)
        check_quantize(run, values, Side.V, PageFormat.FP16, PageFormat.INT3, 64)


# Reading -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("head_dim", [64, 80, 256])
@pytest.mark.parametrize("side", Side)
def test_read(run: Runner, side: Side, head_dim: int, dtype: torch.dtype) -> None:
    """Pages of all formats, from the middle of one to the middle of another."""
    heads = 2
    memory, entries = np.zeros(0, np.uint8), []
    for page_format in PageFormat:
        values = odd_values((1, heads, 64, head_dim), FLOAT_TYPES.get(page_format, np.dtype(np.float16)), page_format)
        found, (entry,) = pages_of(quantize_blocks(values, PageLayout(side, page_format, head_dim)), page_format)
        entries.append(entry + len(memory))
        memory = np.concatenate([memory, found])
    table = torch.tensor([entries[:4], entries[4:], [*entries[2:4], NO_PAGE, entries[0]]])
    starts, ends = (torch.tensor(places, dtype=torch.int32) for places in ([40, 0, 70], [190, 256, 150]))
    pages = torch.from_numpy(memory)
    _, missing, out = run(read_tokens, table, side, starts, ends, 150, head_dim, heads, dtype, pages=pages)
    assert missing == (22, 2)
    assert not out[2, :, 58:].any()
    first = dequantize_blocks(
        memory[: heads * 128 * head_dim].reshape(heads, -1), PageLayout(side, PageFormat.FP16, head_dim)
    )
    expected = torch.from_numpy(first[:, 40:]).to(dtype)
    assert torch.equal(out[0, :, :24].nan_to_num(), expected.nan_to_num())


def test_read_behind_the_end(run: Runner) -> None:
    cache = Cache(3, 1, 1, 64, PageFormat.FP16)
    starts, ends = (torch.tensor(places, dtype=torch.int32) for places in ([60, 64, 10], [70, 60, 10]))
    arguments = (cache.table[0], Side.K, starts, ends, 5, 64, 1, torch.float32)
    _, missing, out = run(read_tokens, *arguments, pages=cache.pages)
    assert missing == (1, 0)  # token 64
    assert out[0, :, :4].isnan().all()
    assert not out[0, :, 4:].any()
    assert not out[1:].any()


# Arguments -----------------------------------------------------------------------------------------------------------


def test_nothing_to_do(run: Runner) -> None:
    cache = Cache(2, 1, 1, 64, PageFormat.FP16)
    zeros = torch.zeros(2, dtype=torch.int32)
    k = cache.tokens(2, 0, 0)
    run(write_tokens, k, k, cache.table, zeros, pages=cache.pages)
    jobs = torch.zeros((0, 2), dtype=torch.int64)
    run(quantize_pages, jobs, Side.K, PageFormat.FP16, PageFormat.INT8, 64, 1, pages=cache.pages)
    _, _, out = run(read_tokens, cache.table[0], Side.K, zeros, zeros, 0, 64, 1, torch.float16, pages=cache.pages)
    assert out.shape == (2, 1, 0, 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(2, 1, 3, 64)}, "float32"),
        ({"k": torch.zeros(2, 1, 3, 64, dtype=torch.bfloat16)}, "bfloat16"),
        ({"k": torch.zeros(2, 1, 4, 64, dtype=torch.float16)}, r"\(2, 1, 4, 64\)"),
        ({"table": torch.zeros(2, 3, 1, dtype=torch.int64)}, r"\(2, 3, 1\)"),
        ({"table": torch.zeros(2, 2, 1, dtype=torch.int32)}, "int32"),
        ({"positions": torch.zeros(3, dtype=torch.int32)}, r"\(3,\)"),
        ({"status": torch.zeros(2, dtype=torch.int64)}, "int64"),
        ({"pages_base": torch.zeros(8, dtype=torch.float16)}, "float16"),
        ({"pages_base": None}, "pages_base"),
    ],
)
def test_write_refuses(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "k": torch.zeros(2, 1, 3, 64, dtype=torch.float16),
        "v": torch.zeros(2, 1, 3, 64, dtype=torch.float16),
        "table": torch.zeros(2, 2, 1, dtype=torch.int64),
        "positions": torch.zeros(2, dtype=torch.int32),
        "status": new_status("cpu"),
        "pages_base": torch.zeros(8192, dtype=torch.uint8),
    }
    with pytest.raises(PageError, match=message):
        write_tokens(**arguments | change)


def test_head_dims_that_are_refused() -> None:
    k = torch.zeros(1, 1, 1, 72, dtype=torch.float16)
    table, zeros = torch.zeros(2, 1, 1, dtype=torch.int64), torch.zeros(1, dtype=torch.int32)
    pages, status = torch.zeros(16384, dtype=torch.uint8), new_status("cpu")
    with pytest.raises(PageError, match="72"):
        write_tokens(k, k, table, zeros, status, pages)
    with pytest.raises(PageError, match="272"):
        read_tokens(table[0], Side.K, zeros, zeros, 1, 272, 1, torch.float16, status, pages)
    jobs = torch.zeros((1, 2), dtype=torch.int64)
    with pytest.raises(PageError, match="FP16"):
        quantize_pages(jobs, Side.K, PageFormat.FP16, PageFormat.FP16, 64, 1, status, pages)
    jobs += torch.tensor([12288, PageFormat.INT8])
    with pytest.raises(PageError, match="begins at byte 12288"):
        quantize_pages(jobs, Side.K, PageFormat.FP16, PageFormat.INT8, 64, 1, status, pages)


# On a GPU alone ------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_entries_as_addresses_in_a_graph() -> None:
    cache = Cache(2, 3, 2, 128, PageFormat.FP16)
    tokens = cache.tokens(2, 130, 0)
    zeros = torch.zeros(2, dtype=torch.int32)
    expected = cache.pages.clone()
    write_tokens(tokens, tokens, cache.table, zeros, new_status("cpu"), expected)
    pages, k = cache.pages.cuda(), tokens.cuda()
    table, positions, status = (cache.table + pages.data_ptr()).cuda(), zeros.cuda(), new_status("cuda")
    write_tokens(k, k, table, positions, status)
    assert torch.equal(pages.cpu(), expected)
    pages.copy_(cache.pages)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        write_tokens(k, k, table, positions, status)
    graph.replay()
    assert torch.equal(pages.cpu(), expected)
    table.zero_()
    write_tokens(k, k, table, positions, status)
    assert left_out(status) == (2 * 2 * 130, 0)
