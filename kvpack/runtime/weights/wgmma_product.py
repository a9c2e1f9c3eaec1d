"""Products of 33 to 256 vectors on sm_90: warps that decode beside warps that multiply.

The kernel is ``cuda/weights/gemm_wgmma.cu``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
import torch

from kvpack.format.layout import CHUNK_COLS, FREQUENCY_SUM, GROUP_LANES, Layout, Quantizer, ceil_div
from kvpack.runtime.device import kernels, semaphores
from kvpack.runtime.device.devices import ACTIVATIONS, Limits
from kvpack.runtime.device.kernels import Kernel
from kvpack.runtime.weights.products import Coded, can_multiply, with_row_offsets

ARCHITECTURE = 90
_BLOCK_GROUPS = 4  # of 32 rows
_BLOCK_ROWS = _BLOCK_GROUPS * GROUP_LANES
_WARPGROUP_THREADS = 128
_CONSUMERS = 2
# Of a chunk's weights and of its activations. A stage of weights is free when its chunk is multiplied; activations are
# asked for as many chunks ahead as they have stages more.
_STAGES, _ACTIVATION_STAGES = 2, 4
_ARRANGE_THREADS = 256
# With more vectors than that, a matrix that leaves a multiprocessor fewer weights is expanded faster than it is
# multiplied (DESIGN-NOTES, 2026-11-30).
_FEW_VECTORS, _MANY_WEIGHTS = 128, 1 << 18


@dataclass(frozen=True)
class _Block:
    """A block: warpgroups that decode, at most; registers of their threads; vectors of one wgmma."""

    producers: int
    registers: int
    product_tokens: int


# By the number of vectors, padded; many raw bits, and grids of a trellis, take more registers. So no kernel spills.
_BLOCKS = {64: _Block(5, 64, 64), 128: _Block(3, 72, 128), 256: _Block(2, 72, 128)}
_BLOCKS_OF_MANY_RAW_BITS = {64: _Block(4, 80, 64), 128: _Block(2, 128, 128), 256: _Block(2, 96, 128)}
_MANY_RAW_BITS = 5
MIN_TOKENS, MAX_TOKENS = 33, max(_BLOCKS)  # fewer are faster without it


def block_of(layout: Layout, tokens: int) -> _Block:
    """The block for ``tokens`` vectors, padded."""
    many = layout.raw_bits >= (_MANY_RAW_BITS - 1 if layout.codes_per_symbol == 4 else _MANY_RAW_BITS)
    many |= layout.quantizer == Quantizer.TRELLIS
    return (_BLOCKS_OF_MANY_RAW_BITS if many else _BLOCKS)[tokens]


@dataclass(frozen=True)
class WgmmaFit:
    """A launch: vectors, warpgroups that decode, word buffers of a warp, blocks, shared memory of a block."""

    tokens: int
    producers: int
    buffers: int
    blocks: int
    shared_bytes: int


@lru_cache(maxsize=4096)
def fit_wgmma(layout: Layout, tokens: int, units: int, word_buffer_bytes: int, limits: Limits) -> WgmmaFit | None:
    """The launch for ``tokens`` vectors; None if no block holds it."""
    padded = next(n for n in _BLOCKS if tokens <= n)
    for producers in range(block_of(layout, padded).producers, 0, -1):
        for buffers in (2, 1):
            shared = producers * (_STAGES * _BLOCK_ROWS + _ACTIVATION_STAGES * padded) * 2 * CHUNK_COLS
            shared += 4 * FREQUENCY_SUM + producers * _BLOCK_GROUPS * buffers * word_buffer_bytes
            shared += 8 * producers * (2 * _STAGES + _ACTIVATION_STAGES) + 4 * _CONSUMERS
            if shared <= limits.block_bytes(1):
                return WgmmaFit(padded, producers, buffers, min(units, limits.multiprocessors), shared)
    return None


def fit_for(coded: Coded, tokens: int, dtype: torch.dtype, limits: Limits) -> WgmmaFit | None:
    """The launch of a product by this kernel; None where another path has to be taken.

    That is on other GPUs, for floats, for blobs with predictors or several tables, for fp32 activations, which would
    become fp16, and where expansion is faster.
    """
    if limits.architecture != ARCHITECTURE or not MIN_TOKENS <= tokens <= MAX_TOKENS or not can_multiply(coded.layout):
        return None
    if dtype == torch.float32:
        return None
    if len(coded.tables) > 1 or coded.predicted:
        return None
    if tokens > _FEW_VECTORS and coded.header.num_elements < _MANY_WEIGHTS * limits.multiprocessors:
        return None
    units = ceil_div(coded.header.rows, _BLOCK_ROWS) * coded.header.num_tiles_col
    return fit_wgmma(coded.layout, tokens, units, coded.word_buffer_bytes, limits)


@cache
def wgmma_kernel(layout: Layout, activation: torch.dtype, fit: WgmmaFit, *, outliers: bool) -> Kernel:
    """The kernel that decodes and multiplies."""
    block = block_of(layout, fit.tokens)
    defines = {
        "KVPACK_ACTIVATION": ACTIVATIONS[activation],
        "KVPACK_BUFFERS": fit.buffers,
        "KVPACK_BLOCK_GROUPS": _BLOCK_GROUPS,
        "KVPACK_CONSUMERS": _CONSUMERS,
        "KVPACK_STAGES": _STAGES,
        "KVPACK_ACTIVATION_STAGES": _ACTIVATION_STAGES,
        "KVPACK_TOKENS": fit.tokens,
        "KVPACK_PRODUCT_TOKENS": block.product_tokens,
        "KVPACK_PRODUCERS": fit.producers,
        "KVPACK_PRODUCER_REGISTERS": block.registers,
        "KVPACK_OUTLIERS": int(outliers),
    }
    return Kernel.of("weights/gemm_wgmma.cu", "gemm_wgmma", layout, defines, "sm_90a")


@cache
def arrange_kernel(
    layout: Layout, activation: torch.dtype, tokens: int, *, column_scales: bool, split_slots: bool = False
) -> Kernel:
    """The kernel that puts activations into the order in which wgmma takes them; ``split_slots``: ``mma.sync``."""
    defines = {
        "KVPACK_ACTIVATION": ACTIVATIONS[activation],
        "KVPACK_COLUMN_SCALES": int(column_scales),
        "KVPACK_TOKENS": tokens,
        "KVPACK_ARRANGE_THREADS": _ARRANGE_THREADS,
        "KVPACK_SPLIT_SLOTS": int(split_slots),
    }
    return Kernel.of("weights/arrange_activations.cu", "arrange_activations", layout, defines)


def arrange(
    coded: Coded, x: torch.Tensor, padded: int, *, split_slots: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Activations [tokens, cols] as they are multiplied, times column scales, padded with zeros to ``padded`` tokens.

    Returns:
        fp16 [chunks, 4, padded, 8] and what they have to be multiplied by, fp32 [padded]; None where that is 1.
    """
    header = coded.header
    chunks = header.num_tiles_col * header.tile_cols // CHUNK_COLS
    arranged = torch.empty((chunks, 4, padded, 8), dtype=torch.float16, device=x.device)
    has_column_scales = coded.column_scales is not None
    has_token_scales = x.dtype != torch.float16 or has_column_scales
    token_scales = torch.empty(padded, dtype=torch.float32, device=x.device) if has_token_scales else None
    kernels.launch(
        arrange_kernel(coded.layout, x.dtype, padded, column_scales=has_column_scales, split_slots=split_slots),
        (padded, ceil_div(chunks, _ARRANGE_THREADS)),
        _ARRANGE_THREADS,
        (
            x,
            coded.column_scales,
            arranged,
            token_scales,
            np.uint32(len(x)),
            np.uint32(header.cols),
            np.uint32(chunks),
        ),
        device=x.device,
    )
    return arranged, token_scales


def multiply(coded: Coded, x: torch.Tensor, bias: torch.Tensor | None, fit: WgmmaFit) -> torch.Tensor:
    """x · Wᵀ (+ bias).

    Args:
        x: contiguous [tokens, cols], tokens at most those of the launch, fp16, bf16 or fp32.
        bias: [rows] of x's type.

    Returns:
        [tokens, rows] of x's type. The same bits at each run of the same launch.
    """
    if coded.row_offsets is not None:
        return with_row_offsets(coded, x, bias, lambda plain, wide: multiply(plain, wide, None, fit))
    header, tokens, device = coded.header, x.shape[0], x.device
    out = torch.empty((tokens, header.rows), dtype=x.dtype, device=device)
    arranged, token_scales = arrange(coded, x, fit.tokens)
    row_blocks = ceil_div(header.rows, _BLOCK_ROWS)
    quotient, remainder = divmod(row_blocks * header.num_tiles_col, fit.blocks)
    partials = torch.empty(2 * fit.blocks * _BLOCK_ROWS * fit.tokens, dtype=torch.float32, device=device)
    kernels.launch(
        wgmma_kernel(coded.layout, x.dtype, fit, outliers=coded.has_outliers),
        fit.blocks,
        (_CONSUMERS + fit.producers) * _WARPGROUP_THREADS,
        (
            arranged,
            token_scales,
            coded.blob,
            coded.groups,
            coded.tables[0] if len(coded.tables) else None,
            coded.scales,
            coded.scale_stride,
            bias,
            out,
            partials,
            semaphores.take(_CONSUMERS * row_blocks, device),
            coded.status,
            np.uint32(header.rows),
            np.uint32(header.cols),
            np.uint32(header.tile_cols),
            np.uint32(header.num_tiles_col),
            np.uint32(quotient),
            np.uint32(remainder),
            np.uint32(header.length_bytes),
            np.uint32(coded.word_buffer_bytes),
            np.uint32(tokens),
        ),
        device=device,
        shared_bytes=fit.shared_bytes,
    )
    return out
