"""Products of 2 to 256 vectors on sm_90: warps that decode beside warps that multiply (``cuda/weights/gemm_wgmma.cu``)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch

from kvpack.format.layout import CHUNK_COLS, FREQUENCY_SUM, GROUP_LANES, Layout, ceil_div
from kvpack.runtime.device import kernels, semaphores
from kvpack.runtime.device.devices import Limits
from kvpack.runtime.device.kernels import Kernel

if TYPE_CHECKING:
    from kvpack.runtime.weights.products import Coded

ARCHITECTURE = 90
TOKENS = (64, 128, 256)
_BLOCK_GROUPS = 4  # of 32 rows
_BLOCK_ROWS = _BLOCK_GROUPS * GROUP_LANES
_STAGES = 2
_CONSUMERS = 2
_ARRANGE_THREADS = 256


@dataclass(frozen=True)
class _Shape:
    """Of a block for some number of vectors: producers at most, registers of their threads, chunks that activations are
    asked for ahead, vectors of a product, and whether each consumer has half of the rows."""

    producers: int
    registers: int
    ahead: int
    product_tokens: int
    halves: bool


_SHAPES = {64: _Shape(5, 56, 2, 64, False), 128: _Shape(4, 64, 1, 64, True), 256: _Shape(2, 72, 2, 128, True)}


@dataclass(frozen=True)
class WgmmaFit:
    """A launch: vectors, warpgroups that decode, word buffers of a warp, blocks, shared memory of a block."""

    tokens: int
    producers: int
    buffers: int
    blocks: int
    shared_bytes: int


@lru_cache(maxsize=4096)
def fit_wgmma(tokens: int, units: int, word_buffer_bytes: int, limits: Limits) -> WgmmaFit | None:
    """The launch for ``tokens`` vectors; None if no block holds it."""
    padded = next(n for n in TOKENS if tokens <= n)
    shape = _SHAPES[padded]
    for producers in range(shape.producers, 0, -1):
        for buffers in (2, 1):
            shared = producers * _STAGES * 2 * _BLOCK_ROWS * CHUNK_COLS
            shared += producers * (_STAGES + shape.ahead) * 2 * padded * CHUNK_COLS
            shared += 4 * FREQUENCY_SUM + producers * _BLOCK_GROUPS * buffers * word_buffer_bytes
            shared += 8 * producers * (3 * _STAGES + shape.ahead) + 8 * _CONSUMERS
            if shared <= limits.block_bytes(1):
                return WgmmaFit(padded, producers, buffers, min(units, limits.multiprocessors), shared)
    return None


def wgmma_kernel(layout: Layout, activation: int, fit: WgmmaFit, *, outliers: bool) -> Kernel:
    """The kernel that decodes and multiplies."""
    defines = {
        "KVPACK_ACTIVATION": activation,
        "KVPACK_BUFFERS": fit.buffers,
        "KVPACK_TOKENS": fit.tokens,
        "KVPACK_PRODUCERS": fit.producers,
        "KVPACK_PRODUCER_REGISTERS": _SHAPES[fit.tokens].registers,
        "KVPACK_CHUNKS_AHEAD": _SHAPES[fit.tokens].ahead,
        "KVPACK_PRODUCT_TOKENS": _SHAPES[fit.tokens].product_tokens,
        "KVPACK_SHARED_ROWS": int(_SHAPES[fit.tokens].halves),
        "KVPACK_OUTLIERS": int(outliers),
    }
    return Kernel.of("weights/gemm_wgmma.cu", "gemm_wgmma", layout, defines, "sm_90a")


def arrange_kernel(layout: Layout, activation: int, tokens: int) -> Kernel:
    """The kernel that puts activations into the order in which they are multiplied."""
    defines = {
        "KVPACK_ACTIVATION": activation,
        "KVPACK_TOKENS": tokens,
        "KVPACK_ARRANGE_THREADS": _ARRANGE_THREADS,
    }
    return Kernel.of("weights/arrange_activations.cu", "arrange_activations", layout, defines)


def fit_for(coded: Coded, tokens: int, limits: Limits) -> WgmmaFit | None:
    """The launch of a product by this kernel; None where it cannot be."""
    if limits.architecture != ARCHITECTURE or not 2 <= tokens <= TOKENS[-1]:
        return None
    if len(coded.tables) > 1 or coded.predicted:
        return None
    units = ceil_div(coded.header.rows, _BLOCK_ROWS) * coded.header.num_tiles_col
    return fit_wgmma(tokens, units, coded.word_buffer_bytes, limits)


def multiply(coded: Coded, x: torch.Tensor, bias: torch.Tensor | None, activation: int, fit: WgmmaFit) -> torch.Tensor:
    """x · Wᵀ (+ bias); x contiguous [tokens, cols].

    Returns:
        [tokens, rows] of x's type. The same bits at each run of the same launch.
    """
    header, tokens, device = coded.header, x.shape[0], x.device
    out = torch.empty((tokens, header.rows), dtype=x.dtype, device=device)
    chunks = header.num_tiles_col * header.tile_cols // CHUNK_COLS
    arranged = torch.empty((chunks, 4, fit.tokens, 8), dtype=torch.float16, device=device)
    token_scales = torch.empty(fit.tokens, dtype=torch.float32, device=device)
    kernels.launch(
        arrange_kernel(coded.layout, activation, fit.tokens),
        (fit.tokens, max(1, ceil_div(4 * chunks, 4 * _ARRANGE_THREADS))),
        _ARRANGE_THREADS,
        (x, arranged, token_scales, np.uint32(tokens), np.uint32(header.cols), np.uint32(chunks)),
        device=device,
    )
    row_blocks = ceil_div(header.rows, _BLOCK_ROWS)
    quotient, remainder = divmod(row_blocks * header.num_tiles_col, fit.blocks)
    partials = torch.empty(2 * fit.blocks * _BLOCK_ROWS * fit.tokens, dtype=torch.float32, device=device)
    kernels.launch(
        wgmma_kernel(coded.layout, activation, fit, outliers=coded.has_outliers),
        fit.blocks,
        (_CONSUMERS + fit.producers) * _BLOCK_ROWS,
        (
            arranged,
            token_scales,
            coded.blob,
            coded.groups,
            coded.tables[0] if len(coded.tables) else None,
            coded.scales,
            np.uint32(coded.scale_stride),
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
