"""Launches of the weight kernels: which shape of launch suits a tensor and a device.

All functions take tensors of one device, allocate results with torch and launch on its current stream; nothing here
waits for the device. The rANS words of a tile are decoded from shared memory, so what a launch fits into it decides how
many warps share a multiprocessor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch

from kvpack.format.header import BlobHeader
from kvpack.format.layout import (
    ALIGNMENT_BYTES,
    CHUNK_COLS,
    FREQUENCY_SUM,
    GROUP_LANES,
    ElementKind,
    Layout,
    align,
    ceil_div,
)
from kvpack.runtime import kernels
from kvpack.runtime.kernels import Kernel

_TABLE_BYTES = 4 * FREQUENCY_SUM
# What the driver keeps of a multiprocessor's shared memory for each block.
_RESERVED_BYTES = 1024
_BLOCKS_PER_SM = 2
# Activations may take this much of a block's shared memory; longer runs are split.
_MAX_ACTIVATION_BYTES = 32 * 1024
_GEMV_CHUNK_BYTES = 2 * CHUNK_COLS + 8
_FRAGMENT_BYTES = 16 * GROUP_LANES
_PASSING_BYTES = 2 * 32 * GROUP_LANES
# A second buffer for words hides the start of a tile; worth this much of the warps.
_DOUBLE_BUFFER_GAIN = 1.15

GEMV_WARPS = DECODE_WARPS = 16
# Registers bound the warps: 80, 96 and 128 a thread for 8, 16 and 32 tokens.
GEMM_WARPS = {1: 12, 2: 10, 4: 8}
MAX_FUSED_TOKENS = 32

ACTIVATIONS = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
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
# Of what a blob holds, outliers aside; bit patterns of 16 and 32 bits are signed, as torch prefers.
NUMBER_TYPES = {
    ElementKind.UNSIGNED: torch.uint8,
    ElementKind.SIGNED: torch.int8,
    ElementKind.BF16: torch.int16,
    ElementKind.FP16: torch.int16,
    ElementKind.FP32: torch.int32,
    ElementKind.FP8_E4M3: torch.uint8,
    ElementKind.FP8_E5M2: torch.uint8,
}


@dataclass(frozen=True)
class Limits:
    """What a device gives: multiprocessors, and shared memory of one and of a block."""

    multiprocessors: int
    shared_bytes: int
    shared_block_bytes: int


@cache
def device_limits(device: torch.device) -> Limits:
    """Limits of a CUDA device."""
    found: Any = torch.cuda.get_device_properties(device)  # torch's stubs do not know all of it
    return Limits(
        found.multi_processor_count, found.shared_memory_per_multiprocessor, found.shared_memory_per_block_optin
    )


@dataclass(frozen=True)
class Coded:
    """What kernels need of a coded tensor: a header's numbers, and where things lie.

    Attributes:
        blob: u8, the blob and the slack behind it.
        groups: i32 [groups, 4], see :mod:`kvpack.runtime.group_table`.
        tables: i32 [num_tables, 4096], see :func:`kvpack.encode.rans.decoder_table`.
        scales: f32 [0], [1] or [matrices · rows].
        status: i32 [2]: lanes that ended wrongly, and where (see ``report_damage`` in ``cuda/tile.cuh``).
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

    @property
    def layout(self) -> Layout:
        return self.header.layout

    @cached_property
    def row_groups(self) -> int:
        return ceil_div(self.header.rows, GROUP_LANES)

    @cached_property
    def word_buffer_bytes(self) -> int:
        """A group's words from the multiple of 16 bytes before them, and what a damaged lane may read behind them."""
        steps = self.header.tile_cols // self.layout.codes_per_symbol
        words = align(ALIGNMENT_BYTES - 2 + 2 * self.max_group_words, ALIGNMENT_BYTES)
        return words + align(2 * (steps + 1), ALIGNMENT_BYTES)

    @property
    def scale_stride(self) -> int:
        return int(len(self.scales) > 1)

    def table_launches(self) -> Iterator[tuple[int, torch.Tensor | None]]:
        """One launch for each table; one without if no tile has words."""
        if not len(self.tables):
            yield 0, None
        yield from enumerate(self.tables)


@dataclass(frozen=True)
class Fit:
    """How many warps a block has, how many blocks a multiprocessor holds, and word buffers for each warp."""

    warps: int
    blocks: int
    buffers: int
    grid: int
    shared_bytes: int


def _fits(limits: Limits, max_warps: int) -> Iterator[tuple[int, int, int, int]]:
    """(warps, blocks, buffers, bytes a block may have) of all launches to think of."""
    for blocks in range(_BLOCKS_PER_SM, 0, -1):
        available = min(limits.shared_bytes // blocks - _RESERVED_BYTES, limits.shared_block_bytes)
        for buffers in (2, 1):
            for warps in range(max_warps, 0, -1):
                yield warps, blocks, buffers, available


def fit_decode(coded: Coded, limits: Limits, tasks: int, staging_bytes: int) -> Fit:
    """The launch of a decode kernel over ``tasks`` groups."""
    best, best_score = None, 0.0
    for warps, blocks, buffers, available in _fits(limits, DECODE_WARPS):
        shared = _TABLE_BYTES + warps * (staging_bytes + buffers * coded.word_buffer_bytes)
        score = warps * blocks * (_DOUBLE_BUFFER_GAIN if buffers == 2 else 1)
        if shared <= available and score > best_score:
            grid = min(ceil_div(tasks, warps), blocks * limits.multiprocessors)
            best, best_score = Fit(warps, blocks, buffers, grid, shared), score
    assert best is not None  # one warp with one buffer of 33 KiB fits every GPU since sm_80
    return best


def fit_gemv(coded: Coded, limits: Limits) -> Fit:
    """The launch of the kernel for one vector: units are groups in a tile column."""
    tile_columns = coded.header.num_tiles_col
    tile_bytes = coded.header.tile_cols // CHUNK_COLS * _GEMV_CHUNK_BYTES
    units = coded.row_groups * tile_columns
    best, best_score = None, 0.0
    for warps, blocks, buffers, available in _fits(limits, GEMV_WARPS):
        resident = min(units, blocks * limits.multiprocessors)
        longest = max(1, _MAX_ACTIVATION_BYTES // (tile_bytes + 4 * GROUP_LANES))
        if tile_columns * tile_bytes <= _MAX_ACTIVATION_BYTES // 2:  # a long run keeps no more than all activations
            longest = max(longest, _MAX_ACTIVATION_BYTES // 2 // (4 * GROUP_LANES))
        grid = max(resident, ceil_div(units, longest))
        run = ceil_div(units, grid)
        shared = align(_TABLE_BYTES + 4 * GROUP_LANES * run + min(run, tile_columns) * tile_bytes, ALIGNMENT_BYTES)
        shared += warps * buffers * coded.word_buffer_bytes
        score = warps * blocks * (_DOUBLE_BUFFER_GAIN if buffers == 2 else 1)
        if shared <= available and score > best_score:
            best, best_score = Fit(warps, blocks, buffers, grid, shared), score
    assert best is not None
    return best


def fit_gemm(coded: Coded, limits: Limits, token_tiles: int) -> Fit:
    """The launch of the kernel for a few vectors: units are blocks of rows, a group for each warp, in a tile column."""
    tile_columns = coded.header.num_tiles_col
    tile_bytes = coded.header.tile_cols // CHUNK_COLS * token_tiles * _FRAGMENT_BYTES
    best, best_score = None, 0.0
    for warps, blocks, buffers, available in _fits(limits, GEMM_WARPS[token_tiles]):
        units = ceil_div(coded.row_groups, warps) * tile_columns
        resident = min(units, blocks * limits.multiprocessors)
        longest = max(1, _MAX_ACTIVATION_BYTES // tile_bytes)
        if longest >= tile_columns:
            longest = units
        grid = max(resident, ceil_div(units, longest))
        kept = min(ceil_div(units, grid), tile_columns)
        shared = _TABLE_BYTES + 4 * 8 * token_tiles + kept * tile_bytes
        shared += warps * (_PASSING_BYTES + buffers * coded.word_buffer_bytes)
        score = warps * blocks * (_DOUBLE_BUFFER_GAIN if buffers == 2 else 1)
        if shared <= available and score > best_score:
            best, best_score = Fit(warps, blocks, buffers, grid, shared), score
    assert best is not None
    return best


def _max_parts(fit: Fit, units: int, tile_columns: int) -> int:
    """At most how many blocks the units of one block of rows are dealt to."""
    shortest = units // fit.grid
    return min(fit.grid, ceil_div(tile_columns - 1, shortest) + 1)


# Tickets count arrivals at a row group (cuda/schedule.cuh). They are 0 between launches, so that one allocation serves
# all launches of a stream. A launch in a graph gets tickets of its own: the graph may be replayed beside anything.
_stream_tickets: dict[tuple[int, int], torch.Tensor] = {}
_graph_tickets: dict[int, list[torch.Tensor]] = {}
_GRAPH_TICKETS = 1 << 20


def prepare_graph_tickets(device: torch.device) -> None:
    """Have tickets ready for launches that will be captured; what a capture does not find it zeroes itself."""
    index = torch.cuda.current_device() if device.index is None else device.index
    arena = _graph_tickets.setdefault(index, [])
    if not arena or len(arena[-1]) < _GRAPH_TICKETS // 2:
        arena.append(torch.zeros(_GRAPH_TICKETS, dtype=torch.int32, device=device))


def _tickets(count: int, device: torch.device) -> torch.Tensor:
    if device.type != "cuda":
        return torch.zeros(count, dtype=torch.int32)
    stream = torch.cuda.current_stream(device)
    index = stream.device_index
    if torch.cuda.is_current_stream_capturing():
        arena = _graph_tickets.get(index)
        if not arena or len(arena[-1]) < count:
            return torch.zeros(count, dtype=torch.int32, device=device)
        taken, arena[-1] = arena[-1][:count], arena[-1][count:]
        return taken
    found = _stream_tickets.get((index, stream.cuda_stream))
    if found is None or len(found) < count:
        found = torch.zeros(max(count, 4096), dtype=torch.int32, device=device)
        _stream_tickets[index, stream.cuda_stream] = found
    return found


def gemv_kernel(layout: Layout, activation: torch.dtype, buffers: int) -> Kernel:
    """One vector times a coded matrix."""
    defines = {
        "KVPACK_ACTIVATION": ACTIVATIONS[activation],
        "KVPACK_BUFFERS": buffers,
        "KVPACK_MAX_WARPS": GEMV_WARPS,
        "KVPACK_BLOCKS_PER_SM": _BLOCKS_PER_SM,
    }
    return Kernel.of("gemv.cu", "gemv", layout, defines)


def gemm_kernel(layout: Layout, activation: torch.dtype, buffers: int, token_tiles: int) -> Kernel:
    """A few vectors times a coded matrix, on tensor cores; ``token_tiles`` times 8 of them at most."""
    defines = {
        "KVPACK_ACTIVATION": ACTIVATIONS[activation],
        "KVPACK_BUFFERS": buffers,
        "KVPACK_MAX_WARPS": GEMM_WARPS[token_tiles],
        "KVPACK_BLOCKS_PER_SM": _BLOCKS_PER_SM,
        "KVPACK_TOKEN_TILES": token_tiles,
    }
    return Kernel.of("gemm.cu", "gemm", layout, defines)


def decode_kernel(layout: Layout, output: int, buffers: int, *, outliers: bool, predicted: bool) -> Kernel:
    """A coded tensor expanded; ``output`` as in ``cuda/decode.cu``."""
    defines = {
        "KVPACK_OUTPUT": output,
        "KVPACK_BUFFERS": buffers,
        "KVPACK_MAX_WARPS": DECODE_WARPS,
        "KVPACK_BLOCKS_PER_SM": _BLOCKS_PER_SM,
        "KVPACK_OUTLIERS": int(outliers),
        "KVPACK_PREDICTED": int(predicted),
    }
    return Kernel.of("decode.cu", "decode", layout, defines)


def multiply(coded: Coded, x: torch.Tensor, bias: torch.Tensor | None, limits: Limits) -> torch.Tensor:
    """x · Wᵀ (+ bias) by a fused kernel.

    Args:
        x: contiguous [tokens, cols], tokens at most 32, fp16, bf16 or fp32.
        bias: [rows] of x's type.

    Returns:
        [tokens, rows] of x's type. The same bits at each run.
    """
    header, tokens = coded.header, x.shape[0]
    out = torch.empty((tokens, header.rows), dtype=x.dtype, device=x.device)
    if tokens == 1:
        fit, units = fit_gemv(coded, limits), coded.row_groups * header.num_tiles_col
        kernel = gemv_kernel(coded.layout, x.dtype, fit.buffers)
        last: tuple[Any, ...] = ()
    else:
        token_tiles = next(n for n in GEMM_WARPS if tokens <= 8 * n)
        fit = fit_gemm(coded, limits, token_tiles)
        units = ceil_div(coded.row_groups, fit.warps) * header.num_tiles_col
        kernel = gemm_kernel(coded.layout, x.dtype, fit.buffers, token_tiles)
        last = (np.uint32(tokens),)
    num_tables = max(1, len(coded.tables))
    parts = _max_parts(fit, units, header.num_tiles_col) * num_tables
    partials = tickets = None
    if parts > 1:
        partials = torch.empty(parts * tokens * coded.row_groups * GROUP_LANES, dtype=torch.float32, device=x.device)
        tickets = _tickets(coded.row_groups, x.device)
    for index, table in coded.table_launches():
        kernels.launch(
            kernel,
            fit.grid,
            fit.warps * GROUP_LANES,
            (
                x,
                coded.blob,
                coded.groups,
                table,
                coded.scales,
                np.uint32(coded.scale_stride),
                bias,
                out,
                partials,
                tickets,
                coded.status,
                np.uint32(header.rows),
                np.uint32(header.cols),
                np.uint32(header.tile_cols),
                np.uint32(header.length_bytes),
                np.uint32(coded.word_buffer_bytes),
                np.uint32(index),
                np.uint32(num_tables),
                *last,
            ),
            device=x.device,
            shared_bytes=fit.shared_bytes,
        )
    return out


def decode(
    coded: Coded,
    output: int,
    out: torch.Tensor | None,
    limits: Limits,
    rows: tuple[int, int] | None = None,
) -> None:
    """Expand rows ``rows`` (from, to; of all matrices one after another; all by default) into ``out``.

    ``rows`` begins at a multiple of 32 and ends at one, or at the last row; with several matrices it is all. ``out``
    is contiguous, [rows, cols] of the type that ``output`` says; None with OUTPUT_NOTHING.
    """
    header = coded.header
    first_row, end_row = rows or (0, header.matrices * header.rows)
    tile_columns = header.num_tiles_col
    first, end = 0, len(coded.groups)
    if rows is not None:
        first = first_row // GROUP_LANES * tile_columns
        end = ceil_div(end_row, GROUP_LANES) * tile_columns
    output_bytes = 0 if out is None else out.element_size()
    fit = fit_decode(coded, limits, end - first, GROUP_LANES * CHUNK_COLS * max(1, output_bytes))
    kernel = decode_kernel(coded.layout, output, fit.buffers, outliers=coded.has_outliers, predicted=coded.predicted)
    device = coded.blob.device
    for index, table in coded.table_launches():
        kernels.launch(
            kernel,
            fit.grid,
            fit.warps * GROUP_LANES,
            (
                coded.blob,
                coded.groups,
                table,
                coded.scales,
                np.uint32(coded.scale_stride),
                out,
                coded.status,
                np.uint64(first_row),
                np.uint32(header.rows),
                np.uint32(header.cols),
                np.uint32(header.tile_cols),
                np.uint32(first),
                np.uint32(end),
                np.uint32(header.length_bytes),
                np.uint32(coded.word_buffer_bytes),
                np.uint32(index),
            ),
            device=device,
            shared_bytes=fit.shared_bytes,
        )


def can_multiply(layout: Layout) -> bool:
    """Whether the fused kernels take a layout: integers; floats are expanded first."""
    return layout.element_kind in (ElementKind.SIGNED, ElementKind.UNSIGNED)


def number_output(coded: Coded) -> int:
    """The output of a decode kernel that holds what the blob holds, see ``cuda/decode.cu``."""
    if coded.layout.element_kind != ElementKind.SIGNED:
        return OUTPUT_NUMBERS
    return OUTPUT_I16 if coded.has_outliers else OUTPUT_I8
