"""Layout of KV pages and the CPU quantizers that specify it."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpack.encode.page_coder import FLOAT_TYPES, dequantize_blocks, quantize_blocks, tree_sum
from kvpack.errors import PageError
from kvpack.format.pages import (
    PageFormat,
    PageLayout,
    Side,
    join_block,
    pack_codes,
    split_block,
    unpack_codes,
)

HEAD_DIMS = (64, 80, 96, 128, 256)
QUANTIZED = [page_format for page_format in PageFormat if page_format.is_quantized]


def values(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Channels of different size, some with an offset, as keys have them."""
    rng = np.random.default_rng(seed)
    size = np.exp(rng.normal(0, 1, shape[-1]))
    return (rng.normal(0, 1, shape) * size + rng.normal(0, 2, shape[-1])).astype(np.float16)


def word_bits(blocks: np.ndarray, first_byte: int, word: int, bit: int, count: int) -> int:
    found = int.from_bytes(blocks[first_byte + 4 * word : first_byte + 4 * word + 4].tobytes(), "little")
    return found >> bit & ((1 << count) - 1)


@pytest.mark.parametrize("side", Side)
@pytest.mark.parametrize("page_format", QUANTIZED)
def test_places_as_the_document_has_them(side: Side, page_format: PageFormat) -> None:
    """An independent reading of the layout, element by element."""
    layout = PageLayout(side, page_format, 80)
    bits = page_format.element_bits
    codes = np.random.default_rng(1).integers(0, 1 << bits, (64, 80)).astype(np.uint8)
    payload = pack_codes(codes, layout)
    for group in range(5):
        for token in range(64):
            for dim in range(16):
                s = token // 16
                row, column = (token % 16, dim) if side == Side.K else (dim, token % 16)
                g, c = row % 8, column % 8 // 2
                r, half = row // 8 + 2 * (column // 8), column % 2
                lane, i = 4 * g + c, 4 * s + r
                word, bit = {8: (i // 2, 16 * (i % 2) + 8 * half), 4: (i // 4, 4 * (i % 4) + 16 * half)}.get(
                    bits, (i // (16 // bits), bits * (i % (16 // bits)) + 16 * half)
                )
                if bits == 3:
                    places = [(i // 5, 3 * (i % 5) + 16 * half + k) for k in range(3)]
                    if i == 15:
                        places = [(k, 15 + 16 * half) for k in range(3)]
                    found = sum(
                        word_bits(payload[group], 0, 32 * w + lane, b, 1) << k for k, (w, b) in enumerate(places)
                    )
                else:
                    per_lane, per_load = bits, min(4, bits)
                    at = word // per_load * 32 * per_load + lane * per_load + word % per_load
                    assert at < 32 * per_lane
                    found = word_bits(payload[group], 0, at, bit, bits)
                assert found == codes[token, 16 * group + dim]


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("side", Side)
@pytest.mark.parametrize("page_format", PageFormat)
def test_blocks_come_apart_and_together(side: Side, page_format: PageFormat, head_dim: int) -> None:
    layout = PageLayout(side, page_format, head_dim)
    blocks = np.random.default_rng(2).integers(0, 256, (3, layout.block_bytes)).astype(np.uint8)
    parts = split_block(blocks, layout)
    codes = unpack_codes(parts.payload, layout)
    assert pack_codes(codes, layout).tobytes() == parts.payload.tobytes()
    assert join_block(parts, layout).tobytes() == blocks.tobytes()
    assert layout.block_bytes % 16 == layout.group_bytes % 16 == 0


def test_sixteen_bits_are_kept() -> None:
    for page_format, dtype in FLOAT_TYPES.items():
        bits = np.random.default_rng(3).integers(0, 1 << 16, (2, 64, 64)).astype(np.uint16)
        for side in Side:
            layout = PageLayout(side, page_format, 64)
            blocks = quantize_blocks(bits.view(dtype), layout)
            assert unpack_codes(split_block(blocks, layout).payload, layout).tobytes() == bits.tobytes()


@pytest.mark.parametrize("side", Side)
@pytest.mark.parametrize("page_format", QUANTIZED)
def test_error_is_at_most_what_the_scale_allows(side: Side, page_format: PageFormat) -> None:
    layout = PageLayout(side, page_format, 96)
    x = values((2, 64, 96)).astype(np.float32)
    blocks = quantize_blocks(x, layout)
    parts, found = split_block(blocks, layout), dequantize_blocks(blocks, layout)
    scale = np.expand_dims(parts.scales.astype(np.float32), -2 if side == Side.K else -1)
    error = np.abs(found - x)
    if page_format.is_integer:
        clipped = page_format == PageFormat.INT2 or (side == Side.V and page_format == PageFormat.INT3)
        inside = np.ones_like(error, bool)
        if clipped:
            codes = unpack_codes(parts.payload, layout)
            inside = (codes > 0) & (codes < (1 << page_format.element_bits) - 1)
        bound = 0.5 * scale + 4e-3 * np.abs(scale) * (1 << page_format.element_bits)
        assert (error <= bound)[inside].all()
    else:
        assert (error <= np.abs(x) * (2.0 ** (-4 if page_format == PageFormat.FP8_E4M3 else -3)) + 4e-3 * scale).all()


@pytest.mark.parametrize(
    ("side", "page_format", "levels"),
    [
        (Side.K, PageFormat.INT2, 4),
        (Side.V, PageFormat.INT2, 4),
        (Side.K, PageFormat.INT3, 8),
        (Side.V, PageFormat.INT3, 8),
    ],
)
def test_no_level_is_wasted(side: Side, page_format: PageFormat, levels: int) -> None:
    layout = PageLayout(side, page_format, 64)
    blocks = quantize_blocks(values((1, 64, 64)), layout)
    counts = np.bincount(unpack_codes(split_block(blocks, layout).payload, layout).reshape(-1), minlength=levels)
    assert (counts > 0.01 * counts.sum()).all()


def test_values_that_scales_cannot_hold() -> None:
    for side in Side:
        for page_format in QUANTIZED:
            layout = PageLayout(side, page_format, 64)
            x = np.zeros((64, 64), np.float32)
            assert not dequantize_blocks(quantize_blocks(x, layout), layout).any()
            x[:] = 1e-9
            assert np.abs(dequantize_blocks(quantize_blocks(x, layout), layout)).max() < 1e-7
            x = np.ones((64, 64), np.float32)
            x[3, 5] = np.inf
            found = dequantize_blocks(quantize_blocks(x, layout), layout)
            broken = found[:, 5] if side == Side.K else found[3]
            assert np.isnan(broken).all()
            assert np.isnan(found).sum() == 64
            x[3, 5] = 3e38
            assert np.isfinite(dequantize_blocks(quantize_blocks(x, layout), layout)).all()


def test_shapes_and_types_that_are_refused() -> None:
    with pytest.raises(PageError, match="head_dim is 100"):
        PageLayout(Side.K, PageFormat.INT4, 100)
    layout = PageLayout(Side.K, PageFormat.FP16, 64)
    with pytest.raises(PageError, match=r"shape \(63, 64\)"):
        quantize_blocks(np.zeros((63, 64), np.float16), layout)
    with pytest.raises(PageError, match="values are float32"):
        quantize_blocks(np.zeros((64, 64), np.float32), layout)
    with pytest.raises(PageError, match="blocks have 100 bytes"):
        dequantize_blocks(np.zeros(100, np.uint8), layout)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 300), st.integers(0, 2**32 - 1))
def test_sums_are_trees(count: int, seed: int) -> None:
    x = np.random.default_rng(seed).normal(0, 1, (3, count)).astype(np.float32)
    found = tree_sum(x, -1)
    np.testing.assert_allclose(found[:, 0], x.astype(np.float64).sum(-1), rtol=0, atol=1e-4)
    padded = [list(row) + [np.float32(0)] * ((1 << (count - 1).bit_length()) - count) for row in x]
    for row, total in zip(padded, found[:, 0], strict=True):
        while len(row) > 1:
            row = [a + b for a, b in zip(row[: len(row) // 2], row[len(row) // 2 :], strict=True)]
        assert row[0] == total


def test_bf16_is_taken() -> None:
    layout = PageLayout(Side.V, PageFormat.INT8, 64)
    x = values((64, 64)).astype(ml_dtypes.bfloat16)
    assert quantize_blocks(x, layout).tobytes() == quantize_blocks(x.astype(np.float32), layout).tobytes()
