"""Small valid blobs of every mode, layout and predictor: where tests start from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from blob_surgery import with_plain_tables

from kvpack.encode.blob_decoder import rotate_left
from kvpack.encode.blob_encoder import Strip, encode_elements, encode_strips
from kvpack.encode.quantize import DELTA_OFFSET
from kvpack.format.blob import Blob
from kvpack.format.header import BlobHeader
from kvpack.format.layout import (
    FLOAT_ELEMENT_BITS,
    ElementKind,
    Layout,
    Predictor,
    Quantizer,
    float_layouts,
    integer_layout,
    integer_layouts,
)

SIGNED, UNSIGNED = ElementKind.SIGNED, ElementKind.UNSIGNED
LAYOUT_NAMES = ("compact", "balanced", "fast")
FLOAT_KINDS = tuple(FLOAT_ELEMENT_BITS)

Elements = npt.NDArray[Any]


def gaussian_elements(shape: Sequence[int], bits: int, sigma: float, seed: int) -> Elements:
    """Elements with a Gaussian histogram around 2^(bits−1)."""
    q = np.rint(np.random.default_rng(seed).normal(0, sigma, shape))
    half = 1 << (bits - 1)
    return (np.clip(q, -half, half - 1) + half).astype(np.uint8)


def float_patterns(kind: ElementKind, shape: Sequence[int], seed: int) -> Elements:
    """Bit patterns of Gaussian weights, with NaNs, infinities, zeros and denormals among them."""
    rng = np.random.default_rng(seed)
    values = rng.normal(0, 0.05, shape).astype(np.float32)
    bits = FLOAT_ELEMENT_BITS[kind]
    match kind:
        case ElementKind.FP32:
            patterns = values.view(np.uint32)
        case ElementKind.BF16:
            patterns = (values.view(np.uint32) >> 16).astype(np.uint16)
        case ElementKind.FP16:
            patterns = values.astype(np.float16).view(np.uint16)
        case ElementKind.FP8_E5M2:
            patterns = (values.astype(np.float16).view(np.uint16) >> 8).astype(np.uint8)
        case _:
            # Sign, then the top of fp16's exponent rebased to 4 bits, then 3 bits of mantissa.
            half = np.abs(values * 16).astype(np.float16).view(np.uint16) >> 7
            patterns = np.clip(half.astype(np.int32) - 64, 0, 126).astype(np.uint8)
            patterns |= (values < 0).astype(np.uint8) << 7
    special = rng.random(shape) < 0.002
    noise = rng.integers(0, 1 << bits, shape, np.uint64).astype(patterns.dtype)
    return np.where(special, noise, patterns)


def float_elements(kind: ElementKind, shape: Sequence[int], seed: int) -> Elements:
    return rotate_left(float_patterns(kind, shape, seed), FLOAT_ELEMENT_BITS[kind])


def encode_with_outliers(
    elements: Elements,
    outliers: Sequence[tuple[int, int, int, int]],
    layout: Layout,
    *,
    tile_cols: int,
    predictor: Predictor = Predictor.NONE,
    transposed: bool = False,
) -> bytes:
    """Encode [matrices, rows, cols] and outliers (matrix, row, column, delta), sorted."""
    header = BlobHeader(
        layout=layout,
        rows=elements.shape[1],
        cols=elements.shape[2],
        tile_cols=tile_cols,
        matrices=elements.shape[0],
        transposed=transposed,
    )

    def source(index: int) -> Strip:
        matrix, tile_row = divmod(index, header.num_tiles_row)
        first = 256 * tile_row
        mine = [
            (row - first, col, delta + DELTA_OFFSET)
            for m, row, col, delta in outliers
            if m == matrix and first <= row < first + 256
        ]
        table = np.array(mine, np.uint32).reshape(-1, 3)
        return Strip(elements[matrix, first : first + 256], table)

    return encode_strips(header, source, predictor=predictor).data


def with_deltas(
    integers: npt.NDArray[np.int32], outliers: Sequence[tuple[int, int, int, int]]
) -> npt.NDArray[np.int32]:
    """``integers`` [matrices, rows, cols] plus the deltas of outliers (matrix, row, column, delta)."""
    for matrix, row, col, delta in outliers:
        integers[matrix, row, col] += delta
    return integers


def frequencies(blob: bytes) -> list[list[int]]:
    return [table.tolist() for table in Blob(blob).tables]


def rans_blob() -> bytes:
    """One tile: 40 × 350, signed 5 bits, c = 4, g = 2, b = 1: 64 lanes, 176 steps."""
    return encode_elements(
        gaussian_elements((40, 350), 5, 1.5, 1),
        Layout(SIGNED, 5, 4, 2),
        tile_cols=352,
    )


def folded_blob() -> bytes:
    """One tile: 40 × 350, signed 5 bits, folded codes (c = 1, g = 8, b = 4): 64 lanes, 44 steps."""
    return encode_elements(gaussian_elements((40, 350), 5, 2.5, 32), integer_layout("fast", SIGNED, 5), tile_cols=352)


def trellis_blob() -> bytes:
    """One tile: 40 × 350, signed 4 bits of a trellis (c = 2, g = 4, b = 2), with outliers: 64 lanes, 88 steps."""
    layout = integer_layouts("balanced", SIGNED, 4, Quantizer.TRELLIS)[0]
    outliers = [(0, 0, 5, 300), (0, 31, 0, -16384), (0, 39, 349, 16383)]
    return encode_with_outliers(gaussian_elements((1, 40, 350), 4, 0.8, 34), outliers, layout, tile_cols=352)


def longest_blob() -> bytes:
    """Two tiles of up to 2048 columns, balanced, with outliers in the last columns of the first one."""
    outliers = [(0, 0, 511, 1), (0, 0, 512, -4096), (0, 3, 2047, 4095), (0, 32, 1024, 77), (0, 32, 2048, -9)]
    elements = gaussian_elements((1, 64, 2100), 5, 2.5, 33)
    return encode_with_outliers(elements, outliers, integer_layout("balanced", SIGNED, 5), tile_cols=2048)


def wide_rans_blob() -> bytes:
    """One tile: 33 × 352, unsigned 4 bits, compact: u16 lengths, no raw planes."""
    return encode_elements(
        gaussian_elements((33, 352), 4, 0.7, 2),
        integer_layout("compact", UNSIGNED, 4),
        tile_cols=352,
    )


def raw_blob() -> bytes:
    """One tile: 5 × 7, signed 3 bits, uniform: 14 bytes (7 bits spare), 2 of padding."""
    elements = np.random.default_rng(3).integers(0, 8, (5, 7)).astype(np.uint8)
    return encode_elements(elements, integer_layout("compact", SIGNED, 3))


def constant_blob() -> bytes:
    """One tile: 40 × 350, signed 6 bits, c = 4, g = 2, b = 2, equal codes."""
    elements = 20 + np.random.default_rng(4).integers(0, 4, (40, 350)).astype(np.uint8)
    return encode_elements(elements, Layout(SIGNED, 6, 4, 2), tile_cols=352)


def narrow_constant_blob() -> bytes:
    """One tile: 40 × 350, unsigned 3 bits, balanced (g·c = 6: 64 symbols), all elements 5."""
    return encode_elements(np.full((40, 350), 5, np.uint8), integer_layout("balanced", UNSIGNED, 3))


def outlier_blob() -> bytes:
    """The tile of ``rans_blob`` with four outliers."""
    return encode_with_outliers(
        gaussian_elements((1, 40, 350), 5, 1.5, 1),
        [(0, 0, 5, 300), (0, 0, 9, -16384), (0, 7, 0, 16383), (0, 39, 349, -17)],
        Layout(SIGNED, 5, 4, 2),
        tile_cols=352,
    )


def quantized_blob(
    rows: int, cols: int, layout: Layout, tile_cols: int, seed: int = 0
) -> tuple[bytes, npt.NDArray[np.float32]]:
    """A blob of signed elements, and scales by row."""
    bits = layout.element_bits
    elements = gaussian_elements((1, rows, cols), bits, 0.6 * (1 << bits) / 8, seed)
    scales = np.random.default_rng(seed).uniform(0.5, 1.5, rows).astype(np.float32) / 64
    return encode_elements(elements, layout, tile_cols=tile_cols), scales


def blob_with_outliers(mode: str) -> tuple[bytes, npt.NDArray[np.float32]]:
    """[1, 70, 150] of 5 bits in tiles of a mode, and a scale: outliers at edges, several in a row, alone in a chunk."""
    elements = gaussian_elements((1, 70, 150), 5, 3, 1)
    if mode == "constant":
        elements[:] = 16
    elif mode == "raw":
        elements = np.random.default_rng(2).integers(0, 32, elements.shape).astype(np.uint8)
    places = [(0, 0), (0, 1), (0, 149), (31, 63), (31, 64), (32, 0), (33, 5), (33, 7), (33, 40), (69, 149)]
    outliers = [(0, row, col, 37 * i - 300) for i, (row, col) in enumerate(places)]
    layout = integer_layout("balanced", ElementKind.SIGNED, 5)
    data = encode_with_outliers(elements, outliers, layout, tile_cols=64)
    return data, np.full(1, 0.37, np.float32)


def mixed_elements() -> Elements:
    """[2, 300, 150] of 6 bits: each tile of 64 columns of another kind."""
    rng = np.random.default_rng(5)
    elements = gaussian_elements((2, 300, 150), 6, 1.0, 6)
    elements[0, :256, 64:128] = gaussian_elements((256, 64), 6, 9.0, 7)
    elements[1, :256, :64] = 44
    elements[1, 256:, 64:] = rng.integers(0, 64, (44, 86))
    elements[1, :256, 64:128] = np.where(rng.random((256, 64)) < 0.1, 1, 62)
    return elements


def mixed_blob() -> bytes:
    """12 tiles of all modes, several tables."""
    return encode_elements(mixed_elements(), integer_layout("compact", UNSIGNED, 6), tile_cols=64)


def mixed_tiles_blob() -> bytes:
    """The first matrix of ``mixed_elements`` with some of the second one's tiles: all modes, several tables."""
    elements = mixed_elements()
    elements[0, :256, :64] = elements[1, :256, :64]
    elements[0, 256:] = elements[1, 256:]
    return encode_elements(elements[0], integer_layout("compact", UNSIGNED, 6), tile_cols=64)


def plain_blob() -> bytes:
    """``rans_blob`` with a plain table."""
    blob = rans_blob()
    return with_plain_tables(blob, frequencies(blob))


def predicted_blob() -> bytes:
    """One tile, predictor 1: random walks of 8 bits, balanced."""
    rng = np.random.default_rng(8)
    walk = np.cumsum(rng.integers(-1, 2, (40, 350)), axis=1) + 128
    return encode_elements(
        walk.astype(np.uint8),
        integer_layout("balanced", UNSIGNED, 8),
        tile_cols=352,
        predictor=Predictor.PREVIOUS,
    )


def float_blob(kind: ElementKind = ElementKind.BF16, choice: int = 0) -> bytes:
    """One tile of 40 × 350 floats."""
    return encode_elements(float_elements(kind, (40, 350), 9), float_layouts(kind)[choice], tile_cols=352)


BASES = {
    "rans": rans_blob,
    "folded": folded_blob,
    "trellis": trellis_blob,
    "longest": longest_blob,
    "wide-rans": wide_rans_blob,
    "raw": raw_blob,
    "constant": constant_blob,
    "narrow-constant": narrow_constant_blob,
    "outliers": outlier_blob,
    "mixed": mixed_blob,
    "plain": plain_blob,
    "predicted": predicted_blob,
    "bf16": float_blob,
}


def two_tables_elements() -> Elements:
    """Four tiles of 24 × 96: two narrow histograms, two wide ones."""
    elements = gaussian_elements((24, 384), 6, 0.6, 31)
    elements[:, 192:] = gaussian_elements((24, 192), 6, 5.0, 32)
    return elements


def two_tables_blob() -> bytes:
    """Unsigned 6 bits, compact, two tables."""
    return encode_elements(two_tables_elements(), integer_layout("compact", UNSIGNED, 6), tile_cols=96)
