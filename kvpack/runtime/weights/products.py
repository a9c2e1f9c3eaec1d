"""Launches of the weight kernels: which shape of launch suits a tensor and a device.

All functions take tensors of one device, allocate results with torch and launch on its current stream; nothing here
waits for the device. The rANS words of a tile are decoded from shared memory, so what a launch fits into it decides how
many warps share a multiprocessor.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import Any, TypeVar

import numpy as np
import torch

from kvpack.errors import DeviceError
from kvpack.format.header import BlobHeader
from kvpack.format.layout import (
    ALIGNMENT_BYTES,
    CHUNK_COLS,
    GROUP_LANES,
    ElementKind,
    Layout,
    Quantizer,
    align,
    ceil_div,
)
from kvpack.runtime.device import kernels, semaphores
from kvpack.runtime.device.devices import ACTIVATIONS, Limits
from kvpack.runtime.device.kernels import Kernel
from kvpack.runtime.weights.launch_costs import device_costs
from kvpack.runtime.weights.launch_model import (
    BLOCKS_PER_SM,
    ProductFit,
    Terms,
    fit_decode,
    fit_gemm,
    fit_gemv,
    gemv_launches,
)

# Registers bound the warps of a block: 64, 72, 80, 96, 128, 168 a thread with 16, 14, 12, 10, 8, 6 of them. Raw
# planes are loaded two chunks ahead, so that many raw bits, outliers or wide results leave fewer. How many registers
# the same source takes differs between GPUs; with these none spills (tests/runtime/test_compile.py).
_MANY_RAW_BITS = 5
# By compute capability's major number: for narrow results, those of four codes a symbol, wide ones, the widest.
_DECODE_WARPS = {9: (16, 16, 12, 10), 10: (8, 8, 6, 6)}
_OTHER_DECODE_WARPS = (12, 8, 8, 8)
# The same where there are row offsets or column scales.
_VECTOR_DECODE_WARPS = 4
# For 8, 16, 32 and 64 vectors; on sm_100 and newer, and before.
_NEWER = 100
_GEMM_WARPS = {1: (10, 14), 2: (8, 10), 4: (6, 8), 8: (4, 4)}
# Of grouped products, which have more to keep; before sm_100 those of 8 vectors and few bits have 12.
_GROUPED_GEMM_WARPS = {1: (8, 10), 2: (6, 8), 4: (4, 6)}
TOKEN_TILES, GROUPED_TOKEN_TILES = tuple(_GEMM_WARPS), tuple(_GROUPED_GEMM_WARPS)
MAX_FUSED_TOKENS = 8 * TOKEN_TILES[-1]
PARTIALS_BYTES = 64 << 20

# Of blocks that decode single rows: two of the widest tiles, of 14 KiB a warp, fit the 48 KiB that every GPU has.
_ROWS_WARPS = 2

OUTPUTS = {torch.float16: 3, torch.bfloat16: 4, torch.float32: 5}
OUTPUT_NOTHING, OUTPUT_I8, OUTPUT_I16, OUTPUT_NUMBERS = 0, 1, 2, 6
FLOAT_TYPES = tuple(ACTIVATIONS)
LOSSLESS_TYPES = {
    ElementKind.BF16: torch.bfloat16,
    ElementKind.FP16: torch.float16,
    ElementKind.FP32: torch.float32,
    ElementKind.FP8_E4M3: torch.float8_e4m3fn,
    ElementKind.FP8_E5M2: torch.float8_e5m2,
}
# The type of what a blob holds, outliers aside; bit patterns of 16 and 32 bits are signed, as torch prefers.
NUMBER_TYPES = {
    ElementKind.UNSIGNED: torch.uint8,
    ElementKind.SIGNED: torch.int8,
    ElementKind.BF16: torch.int16,
    ElementKind.FP16: torch.int16,
    ElementKind.FP32: torch.int32,
    ElementKind.FP8_E4M3: torch.uint8,
    ElementKind.FP8_E5M2: torch.uint8,
}

Launch = TypeVar("Launch")


@dataclass(frozen=True)
class Coded:
    """What kernels need of a coded tensor: a header's numbers, and where things lie.

    Attributes:
        blob: u8, the blob and the slack behind it.
        groups: i32 [groups, 4], see :mod:`kvpack.runtime.codec.group_table`.
        tables: i32 [num_tables, 4096], see :func:`kvpack.encode.rans.decoder_table`.
        scales: f32 [0], [1] or [matrices · rows].
        row_offsets: f32 [matrices · rows], or None.
        column_scales: f32 [matrices · cols], or None.
        status: i32 [2]: lanes that ended wrongly, and where (see ``report_damage`` in ``cuda/codec/tile.cuh``).
        found: launches by what they are for, of all tensors that these are the same for: no tensors are in it. To find
            one again takes the host longer than the GPU needs for a token.
    """

    header: BlobHeader
    max_group_words: int
    predicted: bool
    has_outliers: bool
    blob: torch.Tensor
    groups: torch.Tensor
    tables: torch.Tensor
    scales: torch.Tensor
    status: torch.Tensor
    row_offsets: torch.Tensor | None = None
    column_scales: torch.Tensor | None = None
    found: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def layout(self) -> Layout:
        return self.header.layout

    @cached_property
    def row_groups(self) -> int:
        return ceil_div(self.header.rows, GROUP_LANES)

    @cached_property
    def word_buffer_bytes(self) -> int:
        """What a group's words take in shared memory."""
        return word_buffer_bytes(self.header, self.max_group_words)

    @cached_property
    def scale_stride(self) -> np.uint32:
        return np.uint32(len(self.scales) > 1)

    @cached_property
    def table_launches(self) -> tuple[tuple[int, torch.Tensor | None], ...]:
        """One launch for each table; one without if no tile has words."""
        count = self.tables.shape[0]
        if count <= 1:
            return ((0, self.tables if count else None),)
        return tuple(enumerate(self.tables))

    def launch(self, key: Hashable, made_for: object, make: Callable[[], Launch]) -> Launch:
        """A launch from ``found``, made anew where it was made for another thing."""
        key = (key, self.row_offsets is None, self.column_scales is None)
        known = self.found.get(key)
        if known is None or known[0] is not made_for:
            known = self.found[key] = made_for, make()
        return known[1]  # type: ignore[no-any-return]


def word_buffer_bytes(header: BlobHeader, max_group_words: int) -> int:
    """A group's words from the multiple of 16 bytes before them, and what a damaged lane may read behind them."""
    steps = header.tile_cols // header.layout.codes_per_symbol
    words = align(ALIGNMENT_BYTES - 2 + 2 * max_group_words, ALIGNMENT_BYTES)
    return words + align(2 * (steps + 1), ALIGNMENT_BYTES)


def check_fits(header: BlobHeader, max_group_words: int, limits: Limits) -> None:
    """Whether a device can decode a tensor, and multiply one vector with it.

    Raises:
        DeviceError: not even one warp's share of a tile fits the shared memory of a block.
    """
    buffer_bytes, architecture = word_buffer_bytes(header, max_group_words), limits.architecture
    widest = GROUP_LANES * CHUNK_COLS * 4
    fits = fit_decode(buffer_bytes, limits, 1, widest, 1) is not None
    if fits and can_multiply(header.layout):
        # The first launch that fits is found at once; the best one takes milliseconds, and many blobs are loaded.
        fits = any(True for _ in gemv_launches(header, buffer_bytes, limits, gemv_warps(header.layout, architecture)))
    if not fits:
        available = limits.block_bytes(1)
        raise DeviceError(
            f"tiles of {header.tile_cols} columns with up to {buffer_bytes >> 10} KiB of words for {GROUP_LANES} rows "
            f"do not fit this GPU, which gives a block {available >> 10} KiB of shared memory: compress the tensor "
            f"with --tile-cols {max(CHUNK_COLS, header.tile_cols // 2 // CHUNK_COLS * CHUNK_COLS)} or less"
        )


def max_fused_tokens(activation: torch.dtype) -> int:
    """How many vectors a fused kernel is the way for; of fp32 ones half as many, see :func:`halves_of`."""
    return MAX_FUSED_TOKENS if activation != torch.float32 else MAX_FUSED_TOKENS // 2


def gemv_warps(layout: Layout, architecture: int, *, grouped: bool = False) -> int:
    """At most how many warps a block for one vector has, if two share a multiprocessor."""
    if architecture >= _NEWER:
        return 10
    if layout.quantizer == Quantizer.TRELLIS:  # grids take a register
        scalar = gemv_warps(replace(layout, quantizer=Quantizer.SCALAR), architecture, grouped=grouped)
        return min(12 if grouped else 14, scalar)
    if layout.codes_per_symbol == 8 and layout.raw_bits % 4 == 3:  # planes of two bits and of one
        return (12 if grouped else 14) if layout.raw_bits == 3 else 10
    if layout.raw_bits > _MANY_RAW_BITS:
        return 12
    return 16 if layout.raw_bits < _MANY_RAW_BITS - 1 else 14


def gemm_warps(layout: Layout, token_tiles: int, architecture: int, buffers: int = 1, *, grouped: bool = False) -> int:
    """The same for a few vectors; a second buffer of words takes registers, too."""
    if grouped:
        if token_tiles == 1 and architecture < _NEWER and layout.element_bits <= _MANY_RAW_BITS:
            return 12
        return _GROUPED_GEMM_WARPS[token_tiles][architecture < _NEWER]
    if token_tiles == 1 and architecture < _NEWER and layout.raw_bits > _MANY_RAW_BITS:
        return 10
    if (architecture, token_tiles, buffers, layout.codes_per_symbol, layout.raw_bits) == (90, 2, 1, 8, 4):
        return 14
    return _GEMM_WARPS[token_tiles][architecture < _NEWER]


def decode_warps(
    layout: Layout, output: int, architecture: int, *, outliers: bool, predicted: bool, vectors: bool = False
) -> int:
    """At most how many warps a block that decodes has."""
    many, fp32 = layout.raw_bits >= _MANY_RAW_BITS, output == OUTPUTS[torch.float32]
    narrow, of_four, wide, widest = _DECODE_WARPS.get(architecture // 10, _OTHER_DECODE_WARPS)
    if output == OUTPUT_NOTHING:
        return narrow
    eight = layout.codes_per_symbol == 8  # eight slots are kept until their columns are complete
    if vectors:
        return _VECTOR_DECODE_WARPS
    if many or fp32 or outliers or predicted:
        return widest if eight or (fp32 and many) else wide
    spills = layout.codes_per_symbol == 2 and layout.raw_bits == _MANY_RAW_BITS - 1 and output in OUTPUTS.values()
    if layout.quantizer == Quantizer.TRELLIS:
        return widest if eight else wide
    if eight or spills:
        return wide
    return of_four if layout.codes_per_symbol > 2 else narrow


@cache
def gemv_kernel(
    layout: Layout,
    activation: torch.dtype,
    buffers: int,
    resident: int,
    architecture: int,
    *,
    grouped: bool = False,
    column_scales: bool = False,
) -> Kernel:
    """One vector times a coded matrix; ``buffers``, ``resident`` as in :class:`.launch_model.ProductFit`.

    ``grouped``: vectors times matrices of a stack, see ``cuda/weights/grouped.cuh``.
    """
    defines = {
        "KVPACK_ACTIVATION": ACTIVATIONS[activation],
        "KVPACK_GROUPED": int(grouped),
        "KVPACK_BUFFERS": buffers,
        "KVPACK_MAX_WARPS": gemv_warps(layout, architecture, grouped=grouped) * BLOCKS_PER_SM // resident,
        "KVPACK_BLOCKS_PER_SM": resident,
        "KVPACK_COLUMN_SCALES": int(column_scales),
    }
    return Kernel.of("weights/gemv.cu", "gemv", layout, defines)


@cache
def gemm_kernel(
    layout: Layout,
    activation: torch.dtype,
    buffers: int,
    resident: int,
    token_tiles: int,
    architecture: int,
    *,
    grouped: bool = False,
    column_scales: bool = False,
) -> Kernel:
    """A few vectors times a coded matrix, on tensor cores; ``token_tiles`` times 8 of them at most."""
    defines = {
        "KVPACK_ACTIVATION": ACTIVATIONS[activation],
        "KVPACK_GROUPED": int(grouped),
        "KVPACK_BUFFERS": buffers,
        "KVPACK_MAX_WARPS": gemm_warps(layout, token_tiles, architecture, buffers, grouped=grouped)
        * BLOCKS_PER_SM
        // resident,
        "KVPACK_BLOCKS_PER_SM": resident,
        "KVPACK_COLUMN_SCALES": int(column_scales),
        "KVPACK_TOKEN_TILES": token_tiles,
    }
    return Kernel.of("weights/gemm.cu", "gemm", layout, defines)


@cache
def decode_kernel(
    layout: Layout,
    output: int,
    buffers: int,
    architecture: int,
    *,
    outliers: bool,
    predicted: bool,
    row_offsets: bool = False,
    column_scales: bool = False,
) -> Kernel:
    """A coded tensor expanded; ``output`` as in ``cuda/weights/decode.cu``."""
    defines = {
        "KVPACK_OUTPUT": output,
        "KVPACK_BUFFERS": buffers,
        "KVPACK_MAX_WARPS": decode_warps(
            layout,
            output,
            architecture,
            outliers=outliers,
            predicted=predicted,
            vectors=row_offsets or column_scales,
        ),
        "KVPACK_BLOCKS_PER_SM": BLOCKS_PER_SM,
        "KVPACK_OUTLIERS": int(outliers),
        "KVPACK_ROW_OFFSETS": int(row_offsets),
        "KVPACK_COLUMN_SCALES": int(column_scales),
        "KVPACK_PREDICTED": int(predicted),
    }
    return Kernel.of("weights/decode.cu", "decode", layout, defines)


def max_panels(coded: Coded, sums: int, matrices: int = 1, tables: int | None = None) -> int:
    """Panels whose partial sums, ``sums`` for a row, stay within :data:`PARTIALS_BYTES`; one is always possible.

    ``tables``: of the matrix that has the most, if that is not this one.
    """
    launches = max(1, len(coded.tables) if tables is None else tables)
    of_panel = 4 * sums * coded.row_groups * GROUP_LANES * launches * matrices
    return max(1, min(PARTIALS_BYTES // of_panel, coded.header.num_tiles_col))


def fit_product(coded: Coded, tokens: int, limits: Limits) -> ProductFit | None:
    """The launch for up to 64 vectors that should be the fastest; None if so many do not fit shared memory."""
    costs = device_costs(limits)  # others, once they have been measured
    return coded.launch(tokens, costs, lambda: _fit_product(coded, tokens, limits, costs.costs))


def _fit_product(coded: Coded, tokens: int, limits: Limits, costs: Mapping[int, Terms]) -> ProductFit | None:
    shape = (coded.header, coded.word_buffer_bytes, limits)
    if tokens == 1:
        warps = gemv_warps(coded.layout, limits.architecture)
        found = fit_gemv(*shape, warps, max_panels(coded, 1), costs=costs[0])
        return found or fit_gemv(*shape, warps, costs=costs[0])
    eights = token_tiles(tokens)
    warps, buffered = (gemm_warps(coded.layout, eights, limits.architecture, buffers) for buffers in (1, 2))
    panels = max_panels(coded, 8 * eights)
    return fit_gemm(*shape, warps, eights, panels, costs=costs[eights], buffered_max_warps=buffered)


def token_tiles(tokens: int) -> int:
    """How many eights of vectors the kernel for ``tokens`` of them, at most 64, works on."""
    return next(n for n in TOKEN_TILES if tokens <= 8 * n)


def with_row_offsets(
    coded: Coded, x: torch.Tensor, bias: torch.Tensor | None, product: Callable[[Coded, torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """A product with row offsets: ``product`` without them, in fp32, and what they add.

    They add a sum over all activations to each row. Kernels have these in parts, whose sums meet only where rows end;
    so it is a rank-one term after the product. In fp32, since it may cancel most of the product.
    """
    assert coded.row_offsets is not None
    wide = x.to(torch.float32)
    scaled = wide if coded.column_scales is None else wide * coded.column_scales
    sums = product(replace(coded, row_offsets=None), wide)
    sums.addr_(scaled.sum(1), coded.row_offsets)
    return (sums if bias is None else sums.add_(bias)).to(x.dtype)


def halves_of(x: torch.Tensor) -> torch.Tensor:
    """fp32 [tokens, cols] as the sum of two that fp16 holds, one behind the other: [2 · tokens, cols].

    The kernels for several vectors round to fp16, 11 bits, after a power of two for each vector. The first have the
    upper 11 bits of each activation, the second what is left, of which 11 more remain.
    """
    upper = (x.view(torch.int32) & ~0x1FFF).view(torch.float32)
    return torch.cat([upper, (x - upper).masked_fill_(x.isinf(), 0.0)])


def multiply_fp32(coded: Coded, x: torch.Tensor, bias: torch.Tensor | None, limits: Limits) -> torch.Tensor:
    """As :func:`multiply` for at most 32 fp32 vectors, as exact as fp32 (one vector has 16 bits of its largest)."""
    if len(x) == 1:
        return multiply(coded, x, bias, limits)
    if coded.column_scales is not None:  # before halves are taken: times a scale they would be no fp16 numbers
        x = x * coded.column_scales
        coded = replace(coded, column_scales=None)
    upper, lower = multiply(coded, halves_of(x), None, limits).chunk(2)
    out = upper + lower
    return out if bias is None else out.add_(bias)


def multiply(
    coded: Coded, x: torch.Tensor, bias: torch.Tensor | None, limits: Limits, fit: ProductFit | None = None
) -> torch.Tensor:
    """x · Wᵀ (+ bias) by a fused kernel; in several launches where shared memory is too small for all vectors at once.

    Args:
        x: contiguous [tokens, cols], tokens at most 64, fp16, bf16 or fp32 (of which several are rounded to fp16).
        bias: [rows] of x's type.
        fit: the launch, instead of the one that should be the fastest.

    Returns:
        [tokens, rows] of x's type. The same bits at each run of the same launch.
    """
    if coded.row_offsets is not None:
        return with_row_offsets(coded, x, bias, lambda plain, wide: multiply(plain, wide, None, limits, fit))
    out = torch.empty((x.shape[0], coded.header.rows), dtype=x.dtype, device=x.device)
    fit = fit or fit_product(coded, x.shape[0], limits)
    if fit is not None:
        _multiply(coded, x, bias, fit, limits, out)
        return out
    check_fits(coded.header, coded.max_group_words, limits)
    fewer = (32, 16, 8, 1)
    at_once = next(tokens for tokens in fewer if tokens < len(x) and fit_product(coded, tokens, limits))
    for first in range(0, len(x), at_once):
        part = slice(first, first + at_once)
        fit = fit_product(coded, len(x[part]), limits)
        assert fit is not None  # no more vectors than fit
        _multiply(coded, x[part], bias, fit, limits, out[part])
    return out


def _multiply(
    coded: Coded,
    x: torch.Tensor,
    bias: torch.Tensor | None,
    fit: ProductFit,
    limits: Limits,
    out: torch.Tensor,
) -> None:
    """One product into ``out``, a launch for each table."""
    tokens = x.shape[0]
    kernel, sums, numbers, last = coded.launch(
        (tokens, x.dtype), fit, lambda: _product_launch(coded, tokens, x.dtype, fit, limits)
    )
    launches = coded.table_launches
    parts = fit.panels * len(launches)
    partials = arrivals = None
    if parts > 1:
        partials = torch.empty(parts * sums * coded.row_groups * GROUP_LANES, dtype=torch.float32, device=x.device)
        # Semaphores are not 0 between the launches of several tables; shared ones would mislead another product.
        if len(launches) > 1:
            arrivals = torch.zeros(coded.row_groups, dtype=torch.int32, device=x.device)
        else:
            arrivals = semaphores.take(coded.row_groups, x.device)
    for index, table in launches:
        kernels.launch(
            kernel,
            (fit.blocks, fit.panels),
            (GROUP_LANES, fit.members, fit.teams),
            (
                *product_arguments(coded, numbers, x, table, bias, out, partials, arrivals),
                np.uint32(index),
                np.uint32(len(launches)),
                *last,
            ),
            device=x.device,
            shared_bytes=fit.shared_bytes,
        )


def _product_launch(
    coded: Coded, tokens: int, activation: torch.dtype, fit: ProductFit, limits: Limits
) -> tuple[Kernel, int, tuple[np.uint32, ...], tuple[np.uint32, ...]]:
    """The kernel, how many sums it has for each row, numbers, and its last arguments."""
    options = (coded.layout, activation, fit.buffers, fit.resident)
    scaled, numbers = coded.column_scales is not None, product_numbers(coded, fit)
    if tokens == 1:
        return gemv_kernel(*options, limits.architecture, column_scales=scaled), 1, numbers, ()
    eights = token_tiles(tokens)
    kernel = gemm_kernel(*options, eights, limits.architecture, column_scales=scaled)
    return kernel, 8 * eights, numbers, (np.uint32(tokens),)


def product_arguments(
    coded: Coded,
    numbers: tuple[np.uint32, ...],
    x: torch.Tensor,
    table: torch.Tensor | None,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    partials: torch.Tensor | None,
    arrivals: torch.Tensor | None,
) -> tuple[torch.Tensor | np.generic | None, ...]:
    """What all kernels of products are given, before what is one table's and one kernel's own.

    ``numbers``: see :func:`product_numbers`.
    """
    return (
        x,
        coded.blob,
        coded.groups,
        table,
        coded.scales,
        coded.scale_stride,
        coded.column_scales,
        bias,
        out,
        partials,
        arrivals,
        coded.status,
        *numbers,
    )


def product_numbers(coded: Coded, fit: ProductFit) -> tuple[np.uint32, ...]:
    """The shape of a coded tensor, and of a launch."""
    header = coded.header
    numbers = (
        header.rows,
        header.cols,
        header.tile_cols,
        header.num_tiles_col,
        fit.panel_width,
        fit.member_width,
        fit.last_members,
        fit.run_quotient,
        fit.run_remainder,
        header.length_bytes,
        coded.word_buffer_bytes,
    )
    return tuple(map(np.uint32, numbers))


def decode(
    coded: Coded,
    output: int,
    out: torch.Tensor | None,
    limits: Limits,
    rows: tuple[int, int] | None = None,
) -> None:
    """Expand rows ``rows`` (from, to; of all matrices one after another; all by default) into ``out``.

    ``rows`` begins at a multiple of 32 of its matrix, and ends at one, or at its last row. ``out`` is contiguous,
    [rows, cols] of the type that ``output`` says; None with OUTPUT_NOTHING.
    """
    output_bytes = 0 if out is None else out.element_size()
    kernel, grid, threads, shared_bytes, numbers = coded.launch(
        (output, rows), limits, lambda: _decode_launch(coded, output, output_bytes, limits, rows)
    )
    before = (coded.scales, coded.scale_stride, coded.row_offsets, coded.column_scales, out, coded.status)
    for index, table in coded.table_launches:
        kernels.launch(
            kernel,
            grid,
            threads,
            (coded.blob, coded.groups, table, *before, *numbers, np.uint32(index)),
            device=coded.blob.device,
            shared_bytes=shared_bytes,
        )


def _decode_launch(
    coded: Coded, output: int, output_bytes: int, limits: Limits, rows: tuple[int, int] | None
) -> tuple[Kernel, int, int, int, tuple[np.generic, ...]]:
    """Kernel, grid, threads, bytes of shared memory, and the numbers that say which rows."""
    header = coded.header
    tile_columns = header.num_tiles_col
    first_row, first, end = 0, 0, len(coded.groups)
    if rows is not None:
        first_row = rows[0]
        first = _row_group(coded, first_row) * tile_columns
        end = (_row_group(coded, rows[1] - 1) + 1) * tile_columns
    staging_bytes = GROUP_LANES * CHUNK_COLS * max(1, output_bytes)
    vectors = {"row_offsets": coded.row_offsets is not None, "column_scales": coded.column_scales is not None}
    if output not in OUTPUTS.values():
        vectors = dict.fromkeys(vectors, False)
    kinds = {"outliers": coded.has_outliers, "predicted": coded.predicted}
    max_warps = decode_warps(coded.layout, output, limits.architecture, **kinds, vectors=any(vectors.values()))
    fit = fit_decode(coded.word_buffer_bytes, limits, end - first, staging_bytes, max_warps)
    if fit is None:
        check_fits(header, coded.max_group_words, limits)
    assert fit is not None  # no more than what has just been checked
    kernel = decode_kernel(
        coded.layout,
        output,
        fit.buffers,
        limits.architecture,
        **kinds,
        **vectors,
    )
    numbers = (
        np.uint64(first_row),
        np.uint32(header.rows),
        np.uint32(header.cols),
        np.uint32(header.tile_cols),
        np.uint32(coded.row_groups),
        np.uint32(tile_columns),
        np.uint32(first),
        np.uint32(end),
        np.uint32(header.length_bytes),
        np.uint32(coded.word_buffer_bytes),
    )
    return kernel, fit.grid, fit.warps * GROUP_LANES, fit.shared_bytes, numbers


@cache
def rows_kernel(layout: Layout, output: int) -> Kernel:
    """Some rows of a coded matrix; ``output`` is one of :data:`OUTPUTS`."""
    defines = {"KVPACK_OUTPUT": output, "KVPACK_MAX_WARPS": _ROWS_WARPS, "KVPACK_BLOCKS_PER_SM": BLOCKS_PER_SM}
    return Kernel.of("weights/decode_rows.cu", "decode_rows", layout, defines)


def decode_rows(coded: Coded, ids: torch.Tensor, out: torch.Tensor) -> None:
    """Decode rows of a quantized matrix into ``out``, contiguous [ids, cols] of a type of :data:`OUTPUTS`.

    Args:
        ids: contiguous i64 [ids]; rows of those that name none become zeros.
    """
    header = coded.header
    steps = header.tile_cols // header.layout.codes_per_symbol
    kernels.launch(
        rows_kernel(coded.layout, OUTPUTS[out.dtype]),
        ceil_div(len(ids) * header.num_tiles_col, _ROWS_WARPS),
        _ROWS_WARPS * GROUP_LANES,
        (
            coded.blob,
            coded.groups,
            coded.tables if len(coded.tables) else None,
            coded.scales,
            coded.scale_stride,
            coded.row_offsets,
            coded.column_scales,
            ids,
            out,
            coded.status,
            np.uint32(len(ids)),
            np.uint32(header.rows),
            np.uint32(header.cols),
            np.uint32(header.tile_cols),
            np.uint32(header.num_tiles_col),
            np.uint32(header.length_bytes),
        ),
        device=coded.blob.device,
        shared_bytes=_ROWS_WARPS * (4 * header.tile_cols + 3 * steps),
    )


def _row_group(coded: Coded, row: int) -> int:
    """The group of a row of all matrices one after another, among those of all."""
    matrix, row = divmod(row, coded.header.rows)
    return matrix * coded.row_groups + row // GROUP_LANES


def can_multiply(layout: Layout) -> bool:
    """Whether the fused kernels take a layout: integers; floats are expanded first."""
    return layout.element_kind in (ElementKind.SIGNED, ElementKind.UNSIGNED)


def number_output(coded: Coded) -> int:
    """The output of a decode kernel that holds what the blob holds, see ``cuda/weights/decode.cu``."""
    if coded.layout.element_kind != ElementKind.SIGNED:
        return OUTPUT_NUMBERS
    return OUTPUT_I16 if coded.has_outliers else OUTPUT_I8
