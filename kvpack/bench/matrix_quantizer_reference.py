"""Symmetric quantizers of a whole matrix, a scale for each column or row: what GPUs must give, byte for byte.

The matrix is T × D (tokens × channels), fp16, bf16 or fp32. A scale belongs to a *channel* (a column) or to a *token*
(a row); m is the largest magnitude that it covers. All arithmetic is IEEE fp32, each
operation rounded to nearest even::

    width        scale s = m / …    code of x, with p = x · (1/s)                    value
    8            127                round(p), as int8                                s · q
    4            7                  round(p) + 8                                     s · (code − 8)
    3            3.5                floor(p + 4), within 0 … 7                       s · (code − 3½)
    2            1.5                floor(p + 2), within 0 … 3                       s · (code − 1½)
    fp8 e4m3     448                p as e4m3, to nearest even                       s · code
    fp8 e5m2     57344              p as e5m2, to nearest even                       s · code

A grid through zero has an odd number of levels, and at 2 bits would leave one of four unused, at 3 bits one of eight:
there the levels lie at half steps. x is multiplied by 1/s, not divided by s: both are IEEE operations, and one of
them is cheap on a GPU.

- A scale below 2^-100, 0 among them, is 0. Its codes mean 0 where a code does: 0 (8 bits, fp8), 8, 4, 2; so are the
  codes under a scale that is not a number. What lies above the limit is far enough from denormal numbers that it makes
  no difference whether a processor flushes them.
- A scale above 2^126, of which 1/s would be denormal, is 2^126, and values are clamped (fp32 and bf16, 3 and 2 bits).
- A value that is not finite makes its scale NaN (0x7FC00000), so that what is dequantized is NaN.

Codes lie row by row. A row is padded to a multiple of eight codes with those that mean 0; eight codes ("an octet") are
as many bytes as a code has bits. Code i of an octet::

    8, fp8       byte i
    4, 3, 2      bits b·i … b·i + b − 1 of the octet's bytes read as one little-endian number: at 4 bits two codes a
                 byte, the first in the lower half; at 3 bits eight codes in three bytes
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from kvpack.encode.dtypes import as_float32
from kvpack.encode.jit import kernel
from kvpack.encode.threads import map_ordered
from kvpack.format.pages import INTEGER_FORMATS, PageFormat

F32, U32 = np.float32, np.uint32
MIN_SCALE, MAX_SCALE = F32(2.0**-100), F32(2.0**126)
FORMATS = tuple(page_format for page_format in PageFormat if page_format.is_quantized)
FP8_FORMATS = tuple(page_format for page_format in FORMATS if not page_format.is_integer)
# The largest magnitude is so many scales.
LIMITS: dict[PageFormat, float] = {
    PageFormat.INT8: 127.0,
    PageFormat.INT4: 7.0,
    PageFormat.INT3: 3.5,
    PageFormat.INT2: 1.5,
    PageFormat.FP8_E4M3: 448.0,
    PageFormat.FP8_E5M2: 57344.0,
}
FLOAT_DTYPES = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32))
OCTET = 8
_FP8_TYPES = {PageFormat.FP8_E4M3: ml_dtypes.float8_e4m3fn, PageFormat.FP8_E5M2: ml_dtypes.float8_e5m2}
# Bits of the fraction, bias of the exponent.
_FP8_FIELDS = {PageFormat.FP8_E4M3: (3, 7), PageFormat.FP8_E5M2: (2, 15)}
_CHUNK_ELEMENTS = 1 << 17  # of a thread at a time: fp32 values and codes stay in its cache
_INFINITY_BITS = U32(0x7F800000)
# Added and taken away again, it rounds a number below 2^22 to an integer, to nearest even.
_ROUNDER = F32(1.5 * 2**23)


class MatrixError(ValueError):
    """A matrix cannot be quantized as was asked."""


class MatrixTypeError(MatrixError):
    """Its elements are not fp16, bf16 or fp32."""


class MatrixShapeError(MatrixError):
    """It has not two dimensions, or no elements; or codes and scales do not belong together."""


class MatrixFormatError(MatrixError):
    """No such width or format."""


class MatrixAxisError(MatrixError):
    """A scale belongs to a channel or to a token."""


class MatrixVariantError(MatrixError):
    """There is no kernel of that name."""


class Axis(StrEnum):
    """What a scale belongs to."""

    CHANNEL = "channel"
    TOKEN = "token"


@dataclass(frozen=True)
class QuantizedMatrix:
    """``codes`` u8 [T, row_bytes(D)], ``scales`` f32 [D] or [T]."""

    codes: npt.NDArray[np.uint8]
    scales: npt.NDArray[np.float32]
    format: PageFormat
    axis: Axis
    columns: int


def parse_format(wanted: int | str | PageFormat) -> PageFormat:
    """A width (8, 4, 3, 2), or a format by name.

    >>> parse_format("fp8_e4m3").name
    'FP8_E4M3'

    Raises:
        MatrixFormatError: there is none.
    """
    if isinstance(wanted, PageFormat):
        found: PageFormat | None = wanted
    elif isinstance(wanted, str):
        found = PageFormat.__members__.get(wanted.upper())
    else:
        found = INTEGER_FORMATS.get(wanted)
    if found not in FORMATS:
        names = ", ".join(page_format.name.lower() for page_format in FORMATS)
        raise MatrixFormatError(f"{wanted!r} is neither a width (8, 4, 3, 2) nor one of {names}")
    return found


def parse_axis(wanted: str) -> Axis:
    """
    Raises:
        MatrixAxisError: it is neither.
    """
    if wanted not in tuple(Axis):
        raise MatrixAxisError(f"{wanted!r} is neither 'channel' nor 'token'")
    return Axis(wanted)


def row_bytes(columns: int, page_format: PageFormat) -> int:
    """Bytes of a row's codes."""
    return -(-columns // OCTET) * page_format.element_bits


def check_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """
    Raises:
        MatrixShapeError: it is not T × D with both at least 1.
    """
    if len(shape) != 2 or 0 in shape:
        raise MatrixShapeError(
            f"the matrix is {'×'.join(map(str, shape)) or 'a number'}; T×D is wanted, none of them 0"
        )
    return shape[0], shape[1]


def scales_of(largest: npt.NDArray[np.float32], page_format: PageFormat) -> npt.NDArray[np.float32]:
    """Scales of the largest magnitudes, which may be infinite or NaN."""
    with np.errstate(invalid="ignore"):
        scale = largest / F32(LIMITS[page_format])
        scale = np.where(scale < MIN_SCALE, F32(0), np.minimum(scale, MAX_SCALE))
    return np.where(largest < F32(np.inf), scale, F32(np.nan))


def inverse_scales(scales: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """1 / s; 0 for scales that are 0 or NaN."""
    return np.divide(F32(1), scales, out=np.zeros_like(scales), where=scales > 0)


@kernel
def _column_maxima(magnitudes, out):  # type: ignore[no-untyped-def]
    """Raise ``out`` u32 [D] to the largest of ``magnitudes`` u32 [rows, D]: bits of floats, their sign cleared."""
    for row in range(magnitudes.shape[0]):
        for col in range(magnitudes.shape[1]):
            out[col] = max(out[col], magnitudes[row, col] & U32(0x7FFFFFFF))


@kernel
def _row_maxima(magnitudes, out):  # type: ignore[no-untyped-def]
    """The same for each row."""
    for row in range(magnitudes.shape[0]):
        largest = U32(0)
        for col in range(magnitudes.shape[1]):
            largest = max(largest, magnitudes[row, col] & U32(0x7FFFFFFF))
        out[row] = largest


@kernel
def _multiply(x, inverse, by_row, out):  # type: ignore[no-untyped-def]
    """p = x · (1/s), 0 where 1/s is."""
    for row in range(x.shape[0]):
        if by_row:
            r = inverse[row]
            for col in range(x.shape[1]):
                out[row, col] = x[row, col] * r if r != F32(0) else F32(0)
        else:
            for col in range(x.shape[1]):
                out[row, col] = x[row, col] * inverse[col] if inverse[col] != F32(0) else F32(0)


@kernel
def _int8_codes(p, out):  # type: ignore[no-untyped-def]
    for row in range(p.shape[0]):
        for col in range(p.shape[1]):
            out[row, col] = np.uint8(np.int8((p[row, col] + _ROUNDER) - _ROUNDER))


@kernel
def _narrow_codes(p, half, mid_rise, bits, out):  # type: ignore[no-untyped-def]
    """Codes of 4, 3 or 2 bits, packed."""
    zero = np.uint8(half)
    codes = np.full(-(-p.shape[1] // OCTET) * OCTET, zero, np.uint8)
    top = F32(2 * half) - F32(0.5)
    for row in range(p.shape[0]):
        for col in range(p.shape[1]):
            if mid_rise:
                codes[col] = np.uint8(min(max(p[row, col] + F32(half), F32(0)), top))
            else:
                codes[col] = np.uint8((p[row, col] + _ROUNDER) - _ROUNDER + F32(half))
        for octet in range(codes.shape[0] // OCTET):
            word = U32(0)
            for i in range(OCTET):
                word |= U32(codes[OCTET * octet + i]) << U32(bits * i)
            for i in range(bits):
                out[row, bits * octet + i] = np.uint8(word >> U32(8 * i) & U32(255))


@kernel
def _fp8_codes(p, fraction, bias, out):  # type: ignore[no-untyped-def]
    """fp8 of fp32 within its range, to nearest even. Below the least normal number steps are equal: a sum rounds."""
    drop = U32(23 - fraction)
    rounder = np.full(1, 2.0 ** (24 - bias - fraction), np.float32)
    rounder_bits = rounder.view(np.uint32)[0]
    least_normal = U32((128 - bias) << 23)
    rebias = U32((127 - bias) << fraction)
    sums = np.empty(p.shape[1], np.float32)
    sum_bits = sums.view(np.uint32)
    bits = p.view(np.uint32)
    for row in range(p.shape[0]):
        for col in range(p.shape[1]):
            sums[col] = abs(p[row, col]) + rounder[0]
        for col in range(p.shape[1]):
            sign = bits[row, col] >> U32(31)
            a = bits[row, col] & U32(0x7FFFFFFF)
            half_below = (U32(1) << (drop - U32(1))) - U32(1)
            normal = ((a + half_below + (a >> drop & U32(1))) >> drop) - rebias
            code = sum_bits[col] - rounder_bits if a < least_normal else normal
            out[row, col] = np.uint8(code | sign << U32(7))


@kernel
def _narrow_values(codes, scales, by_row, bits, center, out):  # type: ignore[no-untyped-def]
    """s · (code − center)."""
    mask = U32((1 << bits) - 1)
    for row in range(out.shape[0]):
        for octet in range(codes.shape[1] // bits):
            word = U32(0)
            for i in range(bits):
                word |= U32(codes[row, bits * octet + i]) << U32(8 * i)
            for i in range(min(OCTET, out.shape[1] - OCTET * octet)):
                col = OCTET * octet + i
                level = F32(word >> U32(bits * i) & mask) - center
                out[row, col] = scales[row if by_row else col] * level


@kernel
def _int8_values(codes, scales, by_row, out):  # type: ignore[no-untyped-def]
    for row in range(out.shape[0]):
        if by_row:
            s = scales[row]
            for col in range(out.shape[1]):
                out[row, col] = s * F32(codes[row, col])
        else:
            for col in range(out.shape[1]):
                out[row, col] = scales[col] * F32(codes[row, col])


@kernel
def _fp8_values(codes, levels, scales, by_row, out):  # type: ignore[no-untyped-def]
    for row in range(out.shape[0]):
        for col in range(out.shape[1]):
            out[row, col] = scales[row if by_row else col] * levels[codes[row, col]]


@cache
def _fp8_levels(page_format: PageFormat) -> npt.NDArray[np.float32]:
    codes = np.arange(256, dtype=np.uint8)
    return np.asarray(codes.view(_FP8_TYPES[page_format]), F32)


def _chunks(rows: int, columns: int) -> Iterator[slice]:
    step = max(1, _CHUNK_ELEMENTS // columns)
    return (slice(first, min(first + step, rows)) for first in range(0, rows, step))


def matrix_scales(
    x: npt.NDArray[Any], page_format: PageFormat, axis: Axis, executor: ThreadPoolExecutor | None = None
) -> npt.NDArray[np.float32]:
    """Scales of the columns or rows of a matrix."""

    def maxima(rows: slice) -> npt.NDArray[np.uint32]:
        bits = as_float32(x[rows]).view(np.uint32)
        out = np.zeros(x.shape[1] if axis == Axis.CHANNEL else len(bits), np.uint32)
        (_column_maxima if axis == Axis.CHANNEL else _row_maxima)(bits, out)
        return out

    parts = list(map_ordered(maxima, _chunks(*x.shape), executor))
    largest = np.max(parts, axis=0) if axis == Axis.CHANNEL else np.concatenate(parts)
    return scales_of(largest.view(np.float32), page_format)


def matrix_codes(
    x: npt.NDArray[Any],
    scales: npt.NDArray[np.float32],
    page_format: PageFormat,
    axis: Axis,
    executor: ThreadPoolExecutor | None = None,
) -> npt.NDArray[np.uint8]:
    """Codes of a matrix whose scales are known."""
    bits = page_format.element_bits
    inverse = inverse_scales(scales)
    by_row = axis == Axis.TOKEN
    codes = np.zeros((len(x), row_bytes(x.shape[1], page_format)), np.uint8)

    def code(rows: slice) -> None:
        values = as_float32(x[rows])
        p = np.empty_like(values)
        _multiply(values, inverse[rows] if by_row else inverse, by_row, p)
        if page_format == PageFormat.INT8:
            _int8_codes(p, codes[rows])
        elif page_format in FP8_FORMATS:
            _fp8_codes(p, *_FP8_FIELDS[page_format], codes[rows])
        else:
            _narrow_codes(p, 1 << (bits - 1), page_format != PageFormat.INT4, bits, codes[rows])

    for _ in map_ordered(code, _chunks(*x.shape), executor):
        pass
    return codes


def quantize_matrix(
    x: npt.NDArray[Any],
    bits: int | str | PageFormat,
    axis: str = Axis.CHANNEL,
    executor: ThreadPoolExecutor | None = None,
) -> QuantizedMatrix:
    """Scales and codes of a matrix, on the threads of ``executor`` or on this one.

    Raises:
        MatrixError: its type or shape, the format or the axis is none of those above.
    """
    page_format, wanted = parse_format(bits), parse_axis(axis)
    if x.dtype not in FLOAT_DTYPES:
        raise MatrixTypeError(f"the matrix is {x.dtype}; float16, bfloat16 or float32 is wanted")
    check_shape(x.shape)
    scales = matrix_scales(x, page_format, wanted, executor)
    return QuantizedMatrix(
        matrix_codes(x, scales, page_format, wanted, executor), scales, page_format, wanted, x.shape[1]
    )


def dequantize_matrix(
    quantized: QuantizedMatrix, dtype: npt.DTypeLike = np.float32, executor: ThreadPoolExecutor | None = None
) -> npt.NDArray[Any]:
    """The values, computed in fp32 and rounded to ``dtype``.

    Raises:
        MatrixTypeError: dtype is not one of the three.
        MatrixShapeError: codes or scales have another size than a matrix of so many columns.
    """
    page_format, scales, columns = quantized.format, quantized.scales, quantized.columns
    codes, by_row = quantized.codes, quantized.axis == Axis.TOKEN
    if np.dtype(dtype) not in FLOAT_DTYPES:
        raise MatrixTypeError(f"{np.dtype(dtype)} is wanted; float16, bfloat16 and float32 are possible")
    check_sizes(codes.shape, scales.shape, page_format, quantized.axis, columns)
    out = np.empty((len(codes), columns), dtype)

    def value(rows: slice) -> None:
        values = np.empty((rows.stop - rows.start, columns), np.float32)
        mine = scales[rows] if by_row else scales
        if page_format == PageFormat.INT8:
            _int8_values(codes[rows].view(np.int8), mine, by_row, values)
        elif page_format in FP8_FORMATS:
            _fp8_values(codes[rows], _fp8_levels(page_format), mine, by_row, values)
        else:
            bits = page_format.element_bits
            half = 1 << (bits - 1)
            center = F32(half if page_format == PageFormat.INT4 else half - 0.5)
            _narrow_values(codes[rows], mine, by_row, bits, center, values)
        out[rows] = values

    for _ in map_ordered(value, _chunks(len(codes), columns), executor):
        pass
    return out


def check_sizes(
    codes: tuple[int, ...], scales: tuple[int, ...], page_format: PageFormat, axis: Axis, columns: int
) -> None:
    """
    Raises:
        MatrixShapeError: they do not belong to a matrix of so many columns.
    """
    rows = codes[0] if codes else 0
    wanted = (rows, row_bytes(columns, page_format)), (columns if axis == Axis.CHANNEL else rows,)
    if columns < 1 or rows < 1 or (codes, scales) != wanted:
        raise MatrixShapeError(
            f"codes {list(codes)} and scales {list(scales)}; {columns} columns of {page_format.name} with a scale for "
            f"each {axis} have {list(wanted[0])} and {list(wanted[1])}"
        )
