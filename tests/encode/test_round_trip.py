"""Elements → blob → elements: exact for every layout, shape and histogram, small, and the same with threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import sample_blobs as samples
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpack.encode.blob_decoder import (
    decode_elements,
    decode_integers,
    element_dtype,
    rotate_left,
    rotate_right,
    verify_tiles,
)
from kvpack.encode.blob_encoder import encode_elements
from kvpack.format.blob import Blob
from kvpack.format.layout import (
    ElementKind,
    Layout,
    Predictor,
    Quantizer,
    TileMode,
    float_layouts,
    integer_layout,
    outlier_delta_max,
)

Elements = npt.NDArray[Any]

NAMED_LAYOUTS = [
    integer_layout(name, kind, bits)
    for kind in (ElementKind.SIGNED, ElementKind.UNSIGNED)
    for bits in range(2, 9)
    for name in samples.LAYOUT_NAMES
]
TRELLIS_LAYOUTS = [
    Layout(ElementKind.SIGNED, n, c, g, True, Quantizer.TRELLIS)
    for n in range(2, 7)
    for c in range(1, n)
    for g in (1, 2, 4, 8)
    if g * c <= 8
]
FLOAT_LAYOUTS = [layout for kind in samples.FLOAT_KINDS for layout in float_layouts(kind)]
# What a reader must also take (FORMAT.md §§3–4): any n, c, g.
OTHER_LAYOUTS = [
    Layout(ElementKind.UNSIGNED, n, c, g) for n in range(2, 9) for c in range(2, n + 1) for g in (1, 2, 4) if g * c <= 8
]
OTHER_LAYOUTS += [
    Layout(ElementKind.SIGNED, n, c, g, folded=True)
    for n in range(2, 9)
    for c in range(1, n)
    for g in (1, 2, 4, 8)
    if g * c <= 8
]
OTHER_LAYOUTS += [
    Layout(ElementKind(kind), n, c, 1)
    for kind, n in ((2, 16), (3, 16), (4, 32), (6, 8))
    for c in range(max(2, n - 24), 9)
]

DISTRIBUTIONS = (
    "constant",
    "gaussian",
    "uniform",
    "two values",
    "constant tiles",
    "heavy tails",
    "ramps",
    "walk",
)


def draw_elements(distribution: str, shape: tuple[int, int, int], bits: int, tile_cols: int, seed: int) -> Elements:
    """Elements [matrices, rows, cols] of ``bits`` bits with that kind of histogram."""
    rng = np.random.default_rng(seed)
    top = (1 << bits) - 1
    half = 1 << (bits - 1)
    sigma = float(rng.uniform(0.2, 0.3 * half))
    match distribution:
        case "constant":
            values = np.full(shape, rng.integers(0, top + 1))
        case "gaussian":
            values = np.rint(rng.normal(half, sigma, shape))
        case "uniform":
            values = rng.integers(0, top + 1, shape)
        case "two values":
            low, high = rng.integers(0, top + 1, 2)
            values = np.where(rng.random(shape) < rng.choice((0.001, 0.1, 0.5)), low, high)
        case "constant tiles":
            values = np.rint(rng.normal(half, sigma, shape))
            for matrix in range(shape[0]):
                for row in range(0, shape[1], 256):
                    for col in range(0, shape[2], tile_cols):
                        if rng.random() < 0.6:
                            window = np.s_[matrix, row : row + 256, col : col + tile_cols]
                            values[window] = rng.integers(0, top + 1)
        case "heavy tails":
            values = half + np.rint(rng.standard_t(1.2, shape) * sigma / 4)
        case "ramps":
            steps = rng.integers(0, 4) * np.arange(shape[2]) // rng.integers(1, 9)
            values = (half + rng.integers(0, 3) + steps + np.zeros(shape)) % (top + 1)
        case _:
            values = half + np.cumsum(rng.integers(-1, 2, shape), axis=2)
            values %= top + 1
    return np.clip(values, 0, top).astype(element_dtype(bits))


@st.composite
def tensors(draw: st.DrawFn, layouts: list[Layout]) -> tuple[Elements, Layout, int]:
    """Elements, their layout and a number of tile columns."""
    layout = draw(st.sampled_from(layouts))
    rows = draw(st.one_of(st.integers(1, 300), st.sampled_from([1, 31, 32, 33, 255, 256, 257])))
    cols = draw(st.one_of(st.integers(1, 700), st.sampled_from([1, 31, 32, 33, 511, 512, 513, 2049])))
    matrices = draw(st.integers(1, 3))
    tile_cols = 32 * draw(st.one_of(st.integers(1, 16), st.sampled_from([21, 22, 32, 64])))
    distribution = draw(st.sampled_from(DISTRIBUTIONS))
    seed = draw(st.integers(0, 2**32 - 1))
    elements = draw_elements(distribution, (matrices, rows, cols), layout.element_bits, tile_cols, seed)
    return elements, layout, tile_cols


def assert_small(data: bytes) -> None:
    """The never-larger bound, tile by tile and for the blob.

    A tile takes at most its elements' n·R·K bits, rounded up to 16 bytes with its padding. Beside the tiles
    there are 64 bytes of header, 32 of metadata a tile, and tables: at most 512 bytes each, at most one for
    each tile, at most 16.
    """
    blob = Blob(data)
    header = blob.header
    tiles = 0
    for index, tile in enumerate(blob.tiles):
        geometry = header.tile_geometry(index)
        raw = -(-geometry.rows * geometry.cols * header.layout.element_bits // 8)
        assert int(tile["data_size"]) <= -(-raw // 4) * 4
        tiles += -(-raw // 16) * 16
    assert header.num_tables <= min(16, np.count_nonzero(blob.tiles["mode"] == TileMode.RANS))
    assert header.table_bytes <= 512 * header.num_tables
    assert len(data) <= 64 + header.table_bytes + 32 * header.num_tiles + tiles
    elements = header.num_elements * header.layout.element_bits / 8
    assert len(data) <= elements + 64 + (32 + 16) * header.num_tiles + 512 * header.num_tables


def round_trip(elements: Elements, layout: Layout, tile_cols: int, predictor: Predictor) -> bytes:
    data = encode_elements(elements, layout, tile_cols=tile_cols, predictor=predictor)
    decoded = decode_elements(Blob(data))
    assert decoded.dtype == elements.dtype
    np.testing.assert_array_equal(decoded, elements)
    assert_small(data)
    return data


@settings(max_examples=300)
@given(tensors(NAMED_LAYOUTS), st.sampled_from(Predictor))
def test_integers(tensor: tuple[Elements, Layout, int], predictor: Predictor) -> None:
    round_trip(*tensor, predictor)


@settings(max_examples=80)
@given(tensors(FLOAT_LAYOUTS))
def test_floats(tensor: tuple[Elements, Layout, int]) -> None:
    round_trip(*tensor, Predictor.NONE)


@settings(max_examples=150)
@given(tensors(OTHER_LAYOUTS))
def test_layouts_without_a_name(tensor: tuple[Elements, Layout, int]) -> None:
    predictor = Predictor(int(tensor[1].element_kind.is_integer))
    round_trip(*tensor, predictor)


@pytest.mark.parametrize("layout", NAMED_LAYOUTS + FLOAT_LAYOUTS + OTHER_LAYOUTS)
@pytest.mark.parametrize("predictor", Predictor)
def test_every_layout_in_mode_rans(layout: Layout, predictor: Predictor) -> None:
    """One tile that pays, so that symbols, planes and (for integers) differences are all coded."""
    if predictor and not layout.element_kind.is_integer:
        return
    rng = np.random.default_rng(layout.element_bits)
    shape = (256, 500)
    code = rng.integers(0, 1 << layout.code_bits, shape)
    code[rng.random(shape) > 0.03] = 1
    raw = rng.integers(0, 1 << layout.raw_bits, code.shape)
    if predictor:
        raw = raw % max(1, (1 << layout.raw_bits) // 2)  # differences fall into few codes
    if layout.folded:  # as the code 0 of most elements would be spread over all codes by their highest raw bits
        top = raw >> (layout.raw_bits - 1)
        code ^= top * ((1 << layout.code_bits) - 1) ^ 1 << (layout.code_bits - 1)
    elements = (code << layout.raw_bits | raw).astype(element_dtype(layout.element_bits))
    assert np.bincount(layout.codes(elements).ravel())[1] > 0.9 * elements.size
    data = round_trip(elements[None], layout, 512, predictor)
    tiles = Blob(data).tiles
    assert tiles["mode"].tolist() == [TileMode.RANS]
    assert tiles["predictor"].tolist() == [predictor]


@settings(max_examples=25)
@given(tensors(NAMED_LAYOUTS + FLOAT_LAYOUTS), st.booleans())
def test_threads_do_not_change_the_bytes(tensor: tuple[Elements, Layout, int], predict: bool) -> None:
    elements, layout, tile_cols = tensor
    predictor = Predictor(int(predict and layout.element_kind.is_integer))
    alone = encode_elements(elements, layout, tile_cols=tile_cols, predictor=predictor)
    for workers in (1, 2, 4):
        with ThreadPoolExecutor(workers) as executor:
            data = encode_elements(elements, layout, tile_cols=tile_cols, predictor=predictor, executor=executor)
            assert data == alone
            decoded = decode_elements(Blob(data), executor=executor)
            assert sum(verify_tiles(Blob(data), executor)) == elements.size
        np.testing.assert_array_equal(decoded, elements)


@settings(max_examples=25)
@given(tensors(NAMED_LAYOUTS + FLOAT_LAYOUTS), st.sampled_from([1, 2, 3, 5, 7, 8, 15]))
def test_any_alignment(tensor: tuple[Elements, Layout, int], offset: int) -> None:
    elements, layout, tile_cols = tensor
    data = encode_elements(elements, layout, tile_cols=tile_cols)
    shifted = np.zeros(offset + len(data) + 64, np.uint8)
    first = -shifted.ctypes.data % 16 + offset
    shifted[first : first + len(data)] = np.frombuffer(data, np.uint8)
    view = memoryview(shifted)[first : first + len(data)]
    assert np.frombuffer(view, np.uint8).ctypes.data % 16 == offset
    np.testing.assert_array_equal(decode_elements(Blob(view)), elements)


@pytest.mark.parametrize("cols", [32, 70])
@pytest.mark.parametrize("step", [1, 3, -2])
def test_a_ramp_with_predictor(cols: int, step: int) -> None:
    """All differences of a tile are equal, its elements are not: mode constant would lose them."""
    ramp = (128 + step + step * np.arange(cols)) % 256
    elements = np.repeat(ramp[None], 40, axis=0).astype(np.uint8)[None]
    for name in samples.LAYOUT_NAMES:
        layout = integer_layout(name, ElementKind.UNSIGNED, 8)
        for tile_cols in (32, 96):
            round_trip(elements, layout, tile_cols, Predictor.PREVIOUS)


def test_a_constant_tile_with_predictor_is_stored_as_one() -> None:
    elements = np.full((1, 256, 512), 128, np.uint8)
    data = round_trip(elements, integer_layout("compact", ElementKind.UNSIGNED, 8), 512, Predictor.PREVIOUS)
    assert len(data) == 64 + 32 + 16
    assert Blob(data).tiles[["mode", "predictor"]].tolist() == [(TileMode.CONSTANT, 0)]


@pytest.mark.parametrize("kind", samples.FLOAT_KINDS)
def test_every_bit_pattern(kind: ElementKind) -> None:
    """NaN payloads, infinities, signed zeros: all 2^8 or 2^16 patterns, and of fp32 the special ones."""
    bits = {8: np.uint8, 16: np.uint16, 32: np.uint32}
    width = float_layouts(kind)[0].element_bits
    if width == 32:
        high = np.repeat(np.arange(65536, dtype=np.uint32) << 16, 3)
        patterns = high | np.tile(np.array([0, 1, 0xFFFF], np.uint32), 65536)
        patterns = patterns.reshape(384, 512)
    else:
        patterns = np.arange(1 << width, dtype=np.uint64).astype(bits[width]).reshape(-1, 128)
    elements = rotate_left(patterns, width)
    assert sorted(elements.ravel().tolist()) == sorted(set(elements.ravel().tolist()))
    np.testing.assert_array_equal(rotate_right(elements, width), patterns)
    for layout in float_layouts(kind):
        blob = Blob(encode_elements(elements, layout))
        np.testing.assert_array_equal(decode_integers(blob)[0], patterns)
    # The exponent is on top and the sign at the bottom.
    one = {ElementKind.BF16: 0x3F80, ElementKind.FP16: 0x3C00, ElementKind.FP32: 0x3F800000}
    if kind in one:
        minus = np.array([one[kind] | 1 << (width - 1)], bits[width])
        assert int(rotate_left(minus, width)[0]) == 2 * one[kind] + 1


@pytest.mark.parametrize("bits", range(2, 9))
def test_signed_integers(bits: int) -> None:
    elements = np.arange(1 << bits, dtype=np.uint8)[None]
    for name in samples.LAYOUT_NAMES:
        signed = Blob(encode_elements(elements, integer_layout(name, ElementKind.SIGNED, bits)))
        unsigned = Blob(encode_elements(elements, integer_layout(name, ElementKind.UNSIGNED, bits)))
        half = 1 << (bits - 1)
        assert decode_integers(signed)[0, 0].tolist() == list(range(-half, half))
        assert decode_integers(unsigned)[0, 0].tolist() == list(range(2 * half))


@settings(max_examples=40)
@given(
    st.integers(1, 300),
    st.integers(1, 700),
    st.integers(1, 2),
    st.integers(0, 400),
    st.sampled_from(Predictor),
    st.sampled_from([layout for layout in NAMED_LAYOUTS if layout.element_kind]),
    st.integers(0, 2**32 - 1),
)
def test_outliers(
    rows: int,
    cols: int,
    matrices: int,
    count: int,
    predictor: Predictor,
    layout: Layout,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    shape = (matrices, rows, cols)
    half = 1 << (layout.element_bits - 1)
    elements = draw_elements("gaussian", shape, layout.element_bits, 512, seed)
    places = np.sort(rng.permutation(elements.size)[:count])
    tile_cols = int(rng.choice([*range(1, 17), 33, 64])) * 32
    most = outlier_delta_max(tile_cols)
    deltas = rng.integers(-most - 1, most + 1, len(places))
    deltas[deltas == 0] = most
    positions = np.stack(np.unravel_index(places, shape), axis=1)
    expected = elements.astype(np.int32) - half
    expected.ravel()[places] += deltas
    data = samples.encode_with_outliers(
        elements,
        [(*position, int(delta)) for position, delta in zip(positions.tolist(), deltas, strict=True)],
        layout,
        tile_cols=tile_cols,
        predictor=predictor,
    )
    blob = Blob(data)
    integers = decode_integers(blob)
    assert integers.dtype == (np.int16 if len(places) else np.int8)
    np.testing.assert_array_equal(integers, expected)
    assert int(blob.tiles["outlier_count"].sum()) == len(places)


@pytest.mark.parametrize("name", ["compact", "balanced", "fast"])
@pytest.mark.parametrize("bits", [4, 6, 8])
def test_blobs_are_as_small_as_their_entropy(name: str, bits: int) -> None:
    """Lanes hold what their tables say, tables cost 0.5 % (of the codes) at most, and the rest is prescribed."""
    layout = integer_layout(name, ElementKind.SIGNED, bits)
    # As much as codes are worth coding of: folded ones are 0 near the middle.
    sigma = 2 ** (bits - 3) if layout.folded else 2 ** (bits - 4)
    elements = samples.gaussian_elements((1024, 1024), bits, sigma, bits)
    data = encode_elements(elements, layout, tile_cols=512)
    blob = Blob(data)
    codes = layout.codes(elements).astype(np.int64).reshape(1024, -1, layout.codes_per_symbol)
    symbols = (codes << layout.code_bits * np.arange(layout.codes_per_symbol)).sum(axis=2)
    coded = exact = 0.0
    words = 0
    for index in range(8):
        tile = blob.tile(index)
        assert tile.mode == TileMode.RANS
        row, col = tile.geometry.first_row, tile.geometry.first_col // layout.codes_per_symbol
        frequencies = blob.tables[tile.table_index].astype(np.float64) / 4096
        exact -= np.log2(frequencies[symbols[row : row + 256, col : col + tile.geometry.steps]]).sum()
        # A lane starts from L, which holds 16 bits of nothing.
        coded += 16 * len(tile.words) + np.log2(tile.states / 65536).sum()
        words += len(tile.words)
    # A lane of few bits has as many roundings as one of many: hundredths of a bit.
    assert coded == pytest.approx(exact, rel=1e-4, abs=0.03 * 2048)
    p = np.bincount(symbols.ravel()) / symbols.size
    # With eight codes a symbol most of the 256 symbols are rarer than the least frequency, 1/4096.
    of_tables = 0.0075 if layout.codes_per_symbol == 8 else 0.005
    assert coded < (1 + of_tables) * symbols.size * -(p[p > 0] @ np.log2(p[p > 0]))
    fixed = 64 + blob.header.table_bytes + 8 * (32 + 32) + 8 * 256 * (4 + blob.header.length_bytes)
    fixed += layout.raw_bits * elements.size // 8 + 2 * words
    assert fixed <= len(data) < fixed + 8 * 16


def test_decoding_into_an_array() -> None:
    elements = samples.mixed_elements()
    blob = Blob(samples.mixed_blob())
    out = np.full(elements.shape, 255, np.uint8)
    assert decode_elements(blob, out=out) is out
    np.testing.assert_array_equal(out, elements)
    wider = np.full((2, 300, 160), 255, np.uint8)
    decode_elements(blob, out=wider[:, :, 5:155])
    np.testing.assert_array_equal(wider[:, :, 5:155], elements)
    assert (wider[:, :, :5] == 255).all()
    assert (wider[:, :, 155:] == 255).all()
    for wrong in (np.empty((2, 300, 151), np.uint8), np.empty((2, 300, 150), np.int8)):
        with pytest.raises(ValueError, match="the blob needs"):
            decode_elements(blob, out=wrong)
