"""Quantizers of a whole matrix on the GPU, in four variants that give the same bytes; on the CPU the reference.

:mod:`kvpack.bench.matrix_quantizer_reference` says what scales and codes are and how they lie,
``cuda/bench/matrix.cuh`` what the variants are. Quantizing is two launches, scales and codes; vectorized and by token
it is one.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, TypeVar

import ml_dtypes
import numpy as np
import torch

from kvpack.bench import matrix_quantizer_reference as reference
from kvpack.bench.matrix_quantizer_reference import (
    FP8_FORMATS,
    LIMITS,
    MAX_SCALE,
    MIN_SCALE,
    OCTET,
    Axis,
    MatrixTypeError,
    MatrixVariantError,
    check_shape,
    check_sizes,
    parse_axis,
    parse_format,
    row_bytes,
)
from kvpack.encode.threads import default_threads
from kvpack.format.layout import GROUP_LANES, ceil_div
from kvpack.format.pages import PageFormat
from kvpack.runtime.device import kernels
from kvpack.runtime.device.devices import ACTIVATIONS
from kvpack.runtime.device.kernels import Kernel


class Variant(IntEnum):
    """How the work is dealt to threads; see ``cuda/bench/matrix.cuh``."""

    NAIVE = 0
    TILED = 1
    COARSENED = 2
    VECTORIZED = 3


# The fastest of `kvpack bench kv-quant`.
DEFAULT_VARIANT = Variant.VECTORIZED

_THREADS = 256
_BLOCKS_PER_SM = 4
_COLUMN_THREADS = 32
_TILE_ROWS, _TILE_COLS = 32, 64
_COARSENING = 16
# Enough for a few blocks on each multiprocessor of a large GPU; more, and columns are met by more atomic operations.
_CHUNKED_BLOCKS = 1024
_VECTOR_BYTES = 16

T = TypeVar("T")


@dataclass(frozen=True)
class QuantizedMatrix:
    """A matrix [T, D] as codes and scales.

    Attributes:
        codes: u8 [T, row_bytes(D)]. With a ``columns`` that is a multiple of 8, ``codes.view(torch.int8)`` are the
            integers at 8 bits, ``codes.view(torch.float8_e4m3fn)`` and ``…e5m2`` the numbers of fp8.
        scales: f32 [D], or [T] by token.
        columns: D.
        dtype: of the matrix, and of what it is dequantized to by default.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    format: PageFormat
    axis: Axis
    columns: int
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.nbytes + self.scales.nbytes


def parse_variant(wanted: str | None) -> Variant:
    """
    Raises:
        MatrixVariantError: there is none of that name.
    """
    if wanted is None:
        return DEFAULT_VARIANT
    if wanted.upper() not in Variant.__members__:
        raise MatrixVariantError(f"{wanted!r} is not one of {', '.join(variant.name.lower() for variant in Variant)}")
    return Variant[wanted.upper()]


def _check_type(dtype: torch.dtype) -> None:
    if dtype not in ACTIVATIONS:
        raise MatrixTypeError(f"the matrix is {dtype}; torch.float16, bfloat16 or float32 is wanted")


def _batch(dtype: torch.dtype, page_format: PageFormat | None) -> int:
    """Rows of which a thread of a vectorized kernel has an octet under way; None for scales."""
    # Rounding to fp8 takes registers: four rows at once would spill.
    return 2 if dtype == torch.float32 or page_format in FP8_FORMATS else 4


def _kernel(operation: str, dtype: torch.dtype, page_format: PageFormat | None, axis: Axis, variant: Variant) -> Kernel:
    defines = {
        "KVPACK_ACTIVATION": ACTIVATIONS[dtype],
        "KVPACK_MATRIX_BY_TOKEN": int(axis == Axis.TOKEN),
        "KVPACK_VARIANT": int(variant),
        **{f"KVPACK_VARIANT_{each.name}": int(each) for each in Variant},
        "KVPACK_MAX_WARPS": _THREADS // GROUP_LANES,
        "KVPACK_BLOCKS_PER_SM": _BLOCKS_PER_SM,
        "KVPACK_MATRIX_COARSENING": _COARSENING,
        "KVPACK_MATRIX_BATCH": _batch(dtype, page_format),
        "KVPACK_MIN_SCALE_BITS": int(MIN_SCALE.view(np.uint32)),
        "KVPACK_MAX_SCALE_BITS": int(MAX_SCALE.view(np.uint32)),
    }
    if page_format is not None:
        defines["KVPACK_MATRIX_FORMAT"] = int(page_format)
    return Kernel.of(f"bench/{operation}.cu", operation, None, defines)


def scales_kernel(dtype: torch.dtype, axis: Axis, variant: Variant) -> Kernel:
    """Scales of columns or rows; the same for all formats."""
    return _kernel("matrix_scales", dtype, None, axis, variant)


def quantize_kernel(dtype: torch.dtype, page_format: PageFormat, axis: Axis, variant: Variant) -> Kernel:
    """Codes of a matrix whose scales are known."""
    return _kernel("matrix_quantize", dtype, page_format, axis, variant)


def quantize_rows_kernel(dtype: torch.dtype, page_format: PageFormat) -> Kernel:
    """Scales and codes at once: vectorized, by token."""
    return _kernel("matrix_quantize_rows", dtype, page_format, Axis.TOKEN, Variant.VECTORIZED)


def dequantize_kernel(dtype: torch.dtype, page_format: PageFormat, axis: Axis, variant: Variant) -> Kernel:
    """Codes and scales to a matrix of ``dtype``."""
    return _kernel("matrix_dequantize", dtype, page_format, axis, variant)


def _chunked(rows: int, strips: int, unit: int) -> tuple[int, int]:
    """(chunks of rows, rows of a chunk, a multiple of ``unit``), so that all strips together have enough blocks."""
    chunk_rows = unit * ceil_div(rows, unit * max(1, _CHUNKED_BLOCKS // strips))
    return ceil_div(rows, chunk_rows), chunk_rows


def _code_grid(
    rows: int, columns: int, items: int, dtype: torch.dtype, page_format: PageFormat, variant: Variant
) -> tuple[tuple[int, int], int]:
    """The grid of a kernel that reads or writes codes, and the rows of a chunk.

    ``items``: what a row has of what naive and coarsened kernels have a thread for, elements or bytes of codes.
    """
    if variant == Variant.VECTORIZED:
        octets = ceil_div(columns, OCTET)
        strips = ceil_div(octets, _THREADS)
        chunks, chunk_rows = _chunked(rows, strips, _batch(dtype, page_format) * max(1, _THREADS // octets))
        return (chunks, strips), chunk_rows
    if variant == Variant.TILED:
        return (ceil_div(rows, _TILE_ROWS), ceil_div(columns, _TILE_COLS)), 0
    rows_of_block = _THREADS // _COLUMN_THREADS * (_COARSENING if variant == Variant.COARSENED else 1)
    return (ceil_div(rows, rows_of_block), ceil_div(items, _COLUMN_THREADS)), 0


def _is_aligned(matrix: torch.Tensor) -> bool:
    """Whether a matrix can be read and written by vectors."""
    return matrix.shape[1] % OCTET == 0 and matrix.data_ptr() % _VECTOR_BYTES == 0


def matrix_scales(x: torch.Tensor, page_format: PageFormat, axis: Axis, variant: Variant) -> torch.Tensor:
    """Scales of the columns or rows of a contiguous matrix on a GPU; of rows not vectorized."""
    rows, columns = x.shape
    by_token = axis == Axis.TOKEN
    octets = ceil_div(columns, OCTET)
    strip_columns = {Variant.TILED: _TILE_COLS, Variant.COARSENED: _THREADS, Variant.VECTORIZED: OCTET * _THREADS}
    grid: tuple[int, int]
    chunk_rows = 0
    counters = None
    if variant == Variant.NAIVE:
        grid = (ceil_div(rows if by_token else columns, _THREADS), 1)
    elif by_token:
        grid = (ceil_div(rows, _TILE_ROWS if variant == Variant.TILED else _THREADS // GROUP_LANES), 1)
    else:
        strips = ceil_div(columns, strip_columns[variant])
        unit = _batch(x.dtype, None) * max(1, _THREADS // octets) if variant == Variant.VECTORIZED else _TILE_ROWS
        chunks, chunk_rows = _chunked(rows, strips, unit)
        grid = (chunks, strips)
        counters = torch.zeros(columns + strips, dtype=torch.int32, device=x.device)
    scales = torch.empty(rows if by_token else columns, dtype=torch.float32, device=x.device)
    kernels.launch(
        scales_kernel(x.dtype, axis, variant),
        grid,
        _THREADS,
        (
            x,
            np.uint32(rows),
            np.uint32(columns),
            np.uint32(chunk_rows),
            np.uint32(_is_aligned(x)),
            np.float32(LIMITS[page_format]),
            None if counters is None else counters[:columns],
            None if counters is None else counters[columns:],
            scales,
        ),
        device=x.device,
    )
    return scales


def matrix_codes(
    x: torch.Tensor, scales: torch.Tensor, page_format: PageFormat, axis: Axis, variant: Variant
) -> torch.Tensor:
    """Codes of a contiguous matrix on a GPU whose scales are known; by token not vectorized."""
    rows, columns = x.shape
    width = row_bytes(columns, page_format)
    codes = torch.empty((rows, width), dtype=torch.uint8, device=x.device)
    grid, chunk_rows = _code_grid(rows, columns, width, x.dtype, page_format, variant)
    kernels.launch(
        quantize_kernel(x.dtype, page_format, axis, variant),
        grid,
        _THREADS,
        (
            x,
            np.uint32(rows),
            np.uint32(columns),
            np.uint32(chunk_rows),
            np.uint32(_is_aligned(x)),
            scales,
            codes,
        ),
        device=x.device,
    )
    return codes


def scales_and_codes(
    x: torch.Tensor, page_format: PageFormat, axis: Axis, variant: Variant
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both, of a contiguous matrix on a GPU."""
    if axis == Axis.CHANNEL or variant != Variant.VECTORIZED:
        scales = matrix_scales(x, page_format, axis, variant)
        return scales, matrix_codes(x, scales, page_format, axis, variant)
    rows, columns = x.shape
    scales = torch.empty(rows, dtype=torch.float32, device=x.device)
    codes = torch.empty((rows, row_bytes(columns, page_format)), dtype=torch.uint8, device=x.device)
    octets = ceil_div(columns, OCTET)
    lanes = min(GROUP_LANES, 1 << (octets - 1).bit_length())
    kernels.launch(
        quantize_rows_kernel(x.dtype, page_format),
        ceil_div(rows, _THREADS // lanes),
        _THREADS,
        (
            x,
            np.uint32(rows),
            np.uint32(columns),
            np.uint32(_is_aligned(x)),
            np.uint32(lanes),
            np.float32(LIMITS[page_format]),
            scales,
            codes,
        ),
        device=x.device,
    )
    return scales, codes


def quantize_matrix(
    x: torch.Tensor, bits: int | str | PageFormat, axis: str = Axis.CHANNEL, variant: str | None = None
) -> QuantizedMatrix:
    """Quantize a matrix [T, D] with a scale for each channel (column) or token (row).

    The bytes are the same on the CPU and on every GPU, whatever the variant.

    Args:
        x: fp16, bf16 or fp32.
        bits: 8, 4, 3 or 2, or a format's name: ``"int8"``, ``"fp8_e4m3"``, …
        variant: ``naive``, ``tiled``, ``coarsened`` or ``vectorized``; None for the fastest. The CPU has one way.

    Raises:
        MatrixError: a type, shape, format, axis or variant that there is not (a subclass says which).
        DeviceError: the matrix lies neither on the CPU nor on a GPU that kernels run on.
    """
    page_format, wanted, chosen = parse_format(bits), parse_axis(axis), parse_variant(variant)
    _check_type(x.dtype)
    check_shape(tuple(x.shape))
    matrix = x.detach().contiguous()
    if x.device.type == "cpu":
        done = _on_threads(lambda executor: reference.quantize_matrix(as_array(matrix), page_format, wanted, executor))
        codes, scales = torch.from_numpy(done.codes), torch.from_numpy(done.scales)
    else:
        kernels.require_device(x.device)
        scales, codes = scales_and_codes(matrix, page_format, wanted, chosen)
    return QuantizedMatrix(codes, scales, page_format, wanted, x.shape[1], x.dtype)


def dequantize_matrix(
    quantized: QuantizedMatrix, dtype: torch.dtype | None = None, variant: str | None = None
) -> torch.Tensor:
    """The values [T, D], computed in fp32 and rounded to ``dtype`` (by default the type that was quantized).

    Raises:
        MatrixError: a type or variant that there is not; codes and scales that do not belong together.
        DeviceError: as for :func:`quantize_matrix`.
    """
    chosen = parse_variant(variant)
    wanted = quantized.dtype if dtype is None else dtype
    _check_type(wanted)
    codes, scales = quantized.codes.contiguous(), quantized.scales.contiguous()
    columns, page_format, axis = quantized.columns, quantized.format, quantized.axis
    check_sizes(tuple(codes.shape), tuple(scales.shape), page_format, axis, columns)
    if codes.device.type == "cpu":
        host = reference.QuantizedMatrix(codes.numpy(), scales.numpy(), page_format, axis, columns)
        return as_tensor(_on_threads(lambda executor: reference.dequantize_matrix(host, _NUMPY[wanted], executor)))
    kernels.require_device(codes.device)
    return matrix_values(codes, scales, page_format, axis, columns, wanted, chosen)


def matrix_values(
    codes: torch.Tensor,
    scales: torch.Tensor,
    page_format: PageFormat,
    axis: Axis,
    columns: int,
    dtype: torch.dtype,
    variant: Variant,
) -> torch.Tensor:
    """Values of contiguous codes on a GPU."""
    rows = len(codes)
    out = torch.empty((rows, columns), dtype=dtype, device=codes.device)
    grid, chunk_rows = _code_grid(rows, columns, columns, dtype, page_format, variant)
    kernels.launch(
        dequantize_kernel(dtype, page_format, axis, variant),
        grid,
        _THREADS,
        (
            codes,
            np.uint32(rows),
            np.uint32(columns),
            np.uint32(chunk_rows),
            np.uint32(_is_aligned(out)),
            scales,
            out,
        ),
        device=codes.device,
    )
    return out


# --- the CPU -------------------------------------------------------------------

_NUMPY = {torch.float16: np.float16, torch.bfloat16: ml_dtypes.bfloat16, torch.float32: np.float32}


def as_array(matrix: torch.Tensor) -> Any:
    """The same memory for NumPy, which has no bf16 of its own."""
    if matrix.dtype == torch.bfloat16:
        return matrix.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return matrix.numpy()


def as_tensor(array: Any) -> torch.Tensor:
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _on_threads(work: Callable[[ThreadPoolExecutor], T]) -> T:
    with ThreadPoolExecutor(default_threads()) as executor:
        return work(executor)
