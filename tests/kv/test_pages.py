"""Layout of KV pages and the CPU quantizers that specify it."""

from __future__ import annotations

import hashlib

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpack.encode.page_coder import FLOAT_TYPES, REFITTED, dequantize_blocks, quantize_blocks, tree_sum
from kvpack.errors import PageError
from kvpack.format.pages import (
    PageFormat,
    PageLayout,
    Side,
    half_split_order,
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
@pytest.mark.parametrize("bits", [8, 5, 4, 3, 2])
def test_places_as_the_document_has_them(side: Side, bits: int) -> None:
    """An independent reading of the layout, element by element."""
    codes = np.random.default_rng(1).integers(0, 1 << bits, (64, 80)).astype(np.uint8)
    payload = pack_codes(codes, side, bits)
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
                if bits in (3, 5):
                    places = [(word, bit + k) for k in range(bits)]
                    if i == 15:
                        places = [(k, 15 + 16 * half) for k in range(bits)]
                    together = bits - 1  # words of a lane that lie side by side; then the last of each lane
                    at = [lane * together + w if w < together else 32 * together + lane for w, _ in places]
                    found = sum(
                        word_bits(payload[group], 0, w, b, 1) << k
                        for k, (w, (_, b)) in enumerate(zip(at, places, strict=True))
                    )
                else:
                    per_lane, per_load = bits, min(4, bits)
                    at = word // per_load * 32 * per_load + lane * per_load + word % per_load
                    assert at < 32 * per_lane
                    found = word_bits(payload[group], 0, at, bit, bits)
                assert found == codes[token, 16 * group + dim]


@pytest.mark.parametrize("key_order", [(), (2, 0, 4, 3, 1)])
@pytest.mark.parametrize("page_format", PageFormat)
def test_keys_lie_in_their_order(page_format: PageFormat, key_order: tuple[int, ...]) -> None:
    """Each group of K, read from where the document says that it lies, at the width that it says."""
    layout = PageLayout(Side.K, page_format, 80, key_order)
    blocks = np.random.default_rng(2).integers(0, 256, layout.block_bytes).astype(np.uint8)
    parts, at = split_block(blocks, layout), 0
    for place, group in enumerate(key_order or (4, 1, 2, 3, 0)):  # means of d % 40: 31.5, 23.5, 19.5, 15.5, 7.5
        widths = {PageFormat.INT4: (5, 3), PageFormat.INT3: (4, 2), PageFormat.INT2: (3, 2)}.get(page_format)
        bits = page_format.element_bits if widths is None else widths[place >= 3]
        header = 64 if page_format.is_quantized else 0
        dims = slice(16 * group, 16 * group + 16)
        payload = blocks[at + header : at + header + 128 * bits]
        assert np.array_equal(unpack_codes(payload[None], Side.K, bits), parts.codes[:, dims])
        if header:
            numbers = blocks[at : at + 64].view(np.float16).reshape(2, 16)
            places = [2 * c + 8 * h + e for c in range(4) for h in range(2) for e in range(2)]
            for found, stored in zip((parts.scales, parts.centers), numbers, strict=True):
                assert np.array_equal(found[dims][places], stored, equal_nan=True)
        at += header + 128 * bits
    assert at == layout.block_bytes


def test_orders_that_are_refused() -> None:
    for order in ((0, 1, 2), (0, 1, 2, 2), (1, 2, 3, 4)):
        with pytest.raises(PageError, match="key_order is"):
            PageLayout(Side.K, PageFormat.INT4, 64, order)


def test_slow_dimensions_come_first() -> None:
    assert half_split_order(64) == (1, 3, 0, 2)
    assert half_split_order(128) == (3, 7, 2, 6, 1, 5, 0, 4)
    assert half_split_order(16) == (0,)
    assert [PageLayout(Side.K, PageFormat.INT4, 16 * n).wide_groups for n in range(1, 9)] == [1, 2, 2, 2, 3, 4, 4, 4]


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("side", Side)
@pytest.mark.parametrize("page_format", PageFormat)
def test_blocks_come_apart_and_together(side: Side, page_format: PageFormat, head_dim: int) -> None:
    layout = PageLayout(side, page_format, head_dim)
    blocks = np.random.default_rng(2).integers(0, 256, (3, layout.block_bytes)).astype(np.uint8)
    assert join_block(split_block(blocks, layout), layout).tobytes() == blocks.tobytes()
    assert layout.block_bytes % 16 == 0
    assert all(layout.group_start(place) % 16 == 0 for place in range(layout.groups))


def test_sixteen_bits_are_kept() -> None:
    for page_format, dtype in FLOAT_TYPES.items():
        bits = np.random.default_rng(3).integers(0, 1 << 16, (2, 64, 64)).astype(np.uint16)
        for side in Side:
            layout = PageLayout(side, page_format, 64)
            blocks = quantize_blocks(bits.view(dtype), layout)
            assert np.array_equal(split_block(blocks, layout).codes, bits)


def bits_of_dims(layout: PageLayout) -> np.ndarray:
    bits = np.empty(layout.head_dim, int)
    for place, group in enumerate(layout.group_order):
        bits[16 * group : 16 * group + 16] = layout.bits_of(place)
    return bits


@pytest.mark.parametrize("side", Side)
@pytest.mark.parametrize("page_format", QUANTIZED)
def test_error_is_at_most_what_the_scale_allows(side: Side, page_format: PageFormat) -> None:
    """Half a step of integers, for each value: nothing is clipped. Scales that are chosen anew may differ a bit."""
    layout = PageLayout(side, page_format, 96)
    x = values((2, 64, 96)).astype(np.float32)
    blocks = quantize_blocks(x, layout)
    parts, found = split_block(blocks, layout), dequantize_blocks(blocks, layout)
    axis = -2 if side == Side.K else -1
    scale = np.expand_dims(parts.scales.astype(np.float32), axis)
    error = np.abs(found - x)
    if page_format.is_integer:
        refitted = side == Side.V and page_format in REFITTED
        most = 0.8 if refitted else 0.5
        assert (error <= most * scale + 5e-4 * np.abs(scale) * (1 << bits_of_dims(layout))).all()
        reach = x.max(axis, keepdims=True) - x.min(axis, keepdims=True)
        assert refitted or (scale <= 1.01 * reach / ((1 << bits_of_dims(layout)) - 1)).all()
        assert (scale >= 0.99 * reach / (1 << bits_of_dims(layout))).all()
    else:
        center = np.expand_dims(parts.centers.astype(np.float32), axis) if layout.has_centers else 0
        part = 2.0 ** (-4 if page_format == PageFormat.FP8_E4M3 else -3)
        assert (error <= np.abs(x - center) * part + 4e-3 * scale).all()


@pytest.mark.parametrize("side", Side)
@pytest.mark.parametrize("page_format", [PageFormat.INT3, PageFormat.INT2])
def test_no_level_is_wasted(side: Side, page_format: PageFormat) -> None:
    layout = PageLayout(side, page_format, 64)
    codes = split_block(quantize_blocks(values((1, 64, 64)), layout), layout).codes
    for bits in set(bits_of_dims(layout).tolist()):
        counts = np.bincount(codes[..., bits_of_dims(layout) == bits].reshape(-1), minlength=1 << bits)
        assert len(counts) == 1 << bits
        assert (counts > 0.01 * counts.sum()).all()


@pytest.mark.parametrize("page_format", [PageFormat.INT3, PageFormat.INT2])
def test_values_are_not_shortened(page_format: PageFormat) -> None:
    """What is found of a token is as long as the token, in its own direction, and has its mean."""
    layout = PageLayout(Side.V, page_format, 96)
    x = np.random.default_rng(0).uniform(-1, 2, (4, 64, 96)).astype(np.float32).astype(np.float64)
    found = dequantize_blocks(quantize_blocks(x.astype(np.float32), layout), layout) - x.mean(-1, keepdims=True)
    around = x - x.mean(-1, keepdims=True)
    assert np.abs((found * around).sum(-1) / np.square(around).sum(-1) - 1).max() < 2e-3
    assert np.abs(found.mean(-1)).max() < 2e-3 * np.abs(x).max()


@pytest.mark.parametrize("page_format", [PageFormat.INT3, PageFormat.INT2])
def test_values_beside_an_outlier(page_format: PageFormat) -> None:
    """Most of such a token is rounded to one level: longer steps would spoil what is left of it, and the outlier."""
    layout = PageLayout(Side.V, page_format, 128)
    x = np.random.default_rng(0).normal(0, 1, (64, 128)).astype(np.float32)
    x[:, 7] = 20
    found = dequantize_blocks(quantize_blocks(x, layout), layout)
    assert np.abs(found[:, 7] - 20).max() <= (3 if page_format == PageFormat.INT3 else 5)
    assert np.delete(found - x, 7, 1).std() <= (0.95 if page_format == PageFormat.INT3 else 1.3)


def test_centers_that_fp16_does_not_hold_are_not_fitted() -> None:
    layout = PageLayout(Side.V, PageFormat.INT2, 64)
    x = (66000 + 4000 * np.random.default_rng(0).normal(0, 1, (64, 64))).astype(np.float32)
    found = dequantize_blocks(quantize_blocks(x, layout), layout)
    assert np.abs(found - x).max() <= 0.6 * (x.max() - 65504)


@pytest.mark.parametrize(
    ("side", "page_format", "bits", "margin"),
    [
        (Side.K, PageFormat.INT4, 5, 0),
        (Side.K, PageFormat.INT4, 3, 0.5),
        (Side.K, PageFormat.INT3, 4, 0.5),
        (Side.K, PageFormat.INT2, 2, 0.75),
        (Side.V, PageFormat.INT4, 4, 0),
    ],
)
def test_levels_reach_to_the_margin(side: Side, page_format: PageFormat, bits: int, margin: float) -> None:
    layout = PageLayout(side, page_format, 64)
    x = np.random.default_rng(0).normal(0, 1, (64, 64)).astype(np.float32)
    scale = split_block(quantize_blocks(x, layout), layout).scales.astype(np.float32)
    axis = 0 if side == Side.K else 1
    of_width = bits_of_dims(layout) == bits if side == Side.K else slice(None)
    reach = (x.max(axis) - x.min(axis))[of_width]
    np.testing.assert_allclose(scale[of_width], reach / ((1 << bits) - 1 + margin), rtol=2e-3)


@pytest.mark.parametrize("page_format", [PageFormat.INT4, PageFormat.INT3, PageFormat.INT2])
def test_extremes_and_zeros_of_values_are_kept(page_format: PageFormat) -> None:
    """A token's least and largest element, and zeros beside them, to a twentieth of what a step could lose."""
    layout = PageLayout(Side.V, page_format, 64)
    x = np.zeros((64, 64), np.float32)
    x[np.arange(64), np.arange(64)] = np.linspace(0.5, 50, 64)
    found = dequantize_blocks(quantize_blocks(x, layout), layout)
    assert np.abs(found - x).max(-1).max() <= 0.0205 * 50
    assert (np.abs(found - x).max(-1) <= 0.0205 * x.max(-1)).all()


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


@pytest.mark.parametrize("page_format", [PageFormat.INT8, PageFormat.INT4, PageFormat.INT3, PageFormat.INT2])
def test_a_center_beyond_fp16(page_format: PageFormat) -> None:
    """Two neighbours of bf16 that fp16 cannot hold: a step of bf16 is the most that is lost."""
    x = np.random.default_rng(0).normal(0, 1, (64, 64)).astype(np.float32)
    x[:, 3] = 98304 + 512 * np.random.default_rng(1).integers(0, 2, 64)
    for sign in (1, -1):
        layout = PageLayout(Side.K, page_format, 64)
        assert np.abs(dequantize_blocks(quantize_blocks(sign * x, layout), layout) - sign * x)[:, 3].max() <= 512


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


# Of blocks of `golden_values`. Pages are in memory only, so these may change, but with the page coder alone.
GOLDEN = {
    ("K", "INT8"): "2c14dbd0a9b8b285",
    ("K", "INT4"): "a0265fe48182b451",
    ("K", "INT3"): "12b0e77521cd900d",
    ("K", "INT2"): "0896973adbc82172",
    ("K", "FP8_E4M3"): "4ace3f857ef812d9",
    ("K", "FP8_E5M2"): "0721ab7e8eff7ca1",
    ("V", "INT8"): "98da49eba025db8f",
    ("V", "INT4"): "8a329af239493ac3",
    ("V", "INT3"): "68c786d197a95981",
    ("V", "INT2"): "ba7e45f4f2ab966e",
    ("V", "FP8_E4M3"): "c206650b9dc04303",
    ("V", "FP8_E5M2"): "b752284ff89a5b27",
}


def golden_values(side: Side) -> np.ndarray:
    """[64, 80]: exact arithmetic alone, so that they are the same everywhere."""
    token, dim = np.mgrid[:64, :80]
    x = ((token * 37 + dim * 101 + int(side) * 13) % 256 - 128) / 32 * np.exp2(dim % 5 - 2) + (dim % 7 - 3)
    return x.astype(np.float16)


@pytest.mark.parametrize("side", Side)
@pytest.mark.parametrize("page_format", QUANTIZED)
def test_golden_bytes(side: Side, page_format: PageFormat) -> None:
    blocks = quantize_blocks(golden_values(side), PageLayout(side, page_format, 80))
    assert hashlib.sha256(blocks.tobytes()).hexdigest()[:16] == GOLDEN[side.name, page_format.name]


def test_keys_with_a_large_bias() -> None:
    """Qwen's: what 8 bits lose depends on how far a dimension's values lie apart, not on where they lie."""
    x = np.random.default_rng(0).normal(0, 1, (64, 64)).astype(np.float32)
    bias = np.where(np.arange(64) % 8 == 0, 300.0, 0.0).astype(np.float32)
    for page_format, most in ((PageFormat.INT8, 0.13), (PageFormat.FP8_E4M3, 0.2)):
        layout = PageLayout(Side.K, page_format, 64)
        held = (x + bias).astype(np.float16).astype(np.float32)
        assert np.abs(dequantize_blocks(quantize_blocks(held, layout), layout) - held).max() < most


@pytest.mark.parametrize("page_format", [PageFormat.INT8, PageFormat.INT4, PageFormat.INT3, PageFormat.INT2])
def test_values_away_from_zero(page_format: PageFormat) -> None:
    """A token's range is that of its elements: 0.6 wide around 10, not 10 wide."""
    x = (10 + 0.1 * np.random.default_rng(0).normal(0, 1, (64, 64))).astype(np.float16).astype(np.float32)
    layout = PageLayout(Side.V, page_format, 64)
    reach = float((x.max(-1) - x.min(-1)).max())
    error = np.abs(dequantize_blocks(quantize_blocks(x, layout), layout) - x).max()
    assert error <= 0.8 * reach / ((1 << page_format.element_bits) - 1) + 4e-3
