"""Products of 65 to 128 vectors on GPUs without ``wgmma``, and with blobs that ``wgmma_product`` does not take.

The kernel is ``cuda/weights/gemm_mma.cu``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
import torch

from kvpack.format.layout import CHUNK_COLS, FREQUENCY_SUM, GROUP_LANES, Layout, ceil_div
from kvpack.runtime.device import kernels, semaphores
from kvpack.runtime.device.devices import ACTIVATIONS, Limits
from kvpack.runtime.device.kernels import Kernel
from kvpack.runtime.weights import wgmma_product
from kvpack.runtime.weights.products import Coded, can_multiply, with_row_offsets

_TEAMS = 2
_STAGES = 2
# Of a warp: two group table entries, states and lengths, what it notes of rounds and tables.
_ENTRY_BYTES, _START_BYTES, _NOTES_BYTES = 2 * 16, 6 * GROUP_LANES, 16
# Groups of a block, and how many blocks share a multiprocessor, the best first: 256 rows take activations once for
# twice as many weights.
_BLOCKS = ((8, 1), (4, 2), (4, 1))
# Vectors of a block.
_BLOCK_TOKENS = 128
# Fewer are faster by gemm, more by expansion and cuBLAS: on an H200 (DESIGN-NOTES, 2026-11-30), the only GPU at hand.
MIN_TOKENS, MAX_TOKENS = 65, _BLOCK_TOKENS


@dataclass(frozen=True)
class MmaFit:
    """A launch.

    Attributes:
        tokens: vectors of a block.
        groups: groups of 32 rows of a block; it has two warps for each.
        resident: blocks that share a multiprocessor.
        blocks: runs of units, each of which as many blocks decode as there are blocks of vectors.
        staged_bytes: of an element in shared memory.
        several_tables: whether each team has a table of its own.
    """

    tokens: int
    groups: int
    resident: int
    blocks: int
    staged_bytes: int
    several_tables: bool
    shared_bytes: int

    @property
    def rows(self) -> int:
        return self.groups * GROUP_LANES

    @property
    def warps(self) -> int:
        return _TEAMS * self.groups


def shared_bytes(
    layout: Layout, tokens: int, groups: int, staged_bytes: int, several_tables: bool, word_buffer_bytes: int
) -> int:
    """Shared memory of a block."""
    planes = GROUP_LANES * CHUNK_COLS // 8 * layout.raw_bits
    tables = 4 * FREQUENCY_SUM * (_TEAMS if several_tables else 1)
    staged = _STAGES * _TEAMS * CHUNK_COLS * (staged_bytes * groups * GROUP_LANES + 2 * tokens)
    return tables + staged + _TEAMS * groups * (_ENTRY_BYTES + _START_BYTES + _NOTES_BYTES + planes + word_buffer_bytes)


@lru_cache(maxsize=4096)
def fit_mma(
    layout: Layout,
    tokens: int,
    rows: int,
    tile_columns: int,
    word_buffer_bytes: int,
    limits: Limits,
    *,
    outliers: bool,
    several_tables: bool,
    blocks: tuple[tuple[int, int], ...],
) -> MmaFit | None:
    """The launch for ``tokens`` vectors, of the first of ``blocks`` that fits; None if none does."""
    staged_bytes = 2 if outliers else 1  # elements with outliers do not fit into bytes
    for groups, resident in blocks:
        shared = shared_bytes(layout, _BLOCK_TOKENS, groups, staged_bytes, several_tables, word_buffer_bytes)
        if shared <= limits.block_bytes(resident):
            units = ceil_div(rows, groups * GROUP_LANES) * ceil_div(tile_columns, _TEAMS)
            runs = max(1, limits.multiprocessors * resident // ceil_div(tokens, _BLOCK_TOKENS))
            return MmaFit(_BLOCK_TOKENS, groups, resident, min(units, runs), staged_bytes, several_tables, shared)
    return None


def block_kinds(*, outliers: bool, predicted: bool, several_tables: bool) -> tuple[tuple[int, int], ...]:
    """The kinds of blocks that have registers enough: one alone where two of these come together."""
    return _BLOCKS if outliers + predicted + several_tables <= 1 else _BLOCKS[-1:]


def fit_of(
    coded: Coded, tokens: int, limits: Limits, blocks: tuple[tuple[int, int], ...] | None = None
) -> MmaFit | None:
    """The launch by this kernel, whether or not another path is faster; None if no block fits shared memory."""
    several_tables = len(coded.tables) > 1
    if blocks is None:
        kinds = {"outliers": coded.has_outliers, "predicted": coded.predicted, "several_tables": several_tables}
        blocks = block_kinds(**kinds)
    return fit_mma(
        coded.layout,
        tokens,
        coded.header.rows,
        coded.header.num_tiles_col,
        coded.word_buffer_bytes,
        limits,
        outliers=coded.has_outliers,
        several_tables=several_tables,
        blocks=blocks,
    )


def fit_for(coded: Coded, tokens: int, dtype: torch.dtype, limits: Limits) -> MmaFit | None:
    """The launch of a product by this kernel; None where another path has to be taken.

    That is for floats, for fp32 activations, which would become fp16, where expansion is faster, and on sm_90 for blobs
    that the kernel there takes or leaves to expansion.
    """
    if not MIN_TOKENS <= tokens <= MAX_TOKENS or dtype == torch.float32 or not can_multiply(coded.layout):
        return None
    if limits.architecture == wgmma_product.ARCHITECTURE and len(coded.tables) <= 1 and not coded.predicted:
        return None
    return fit_of(coded, tokens, limits)


@cache
def mma_kernel(
    layout: Layout, activation: torch.dtype, fit: MmaFit, *, outliers: bool = False, predicted: bool = False
) -> Kernel:
    """The kernel that decodes and multiplies."""
    defines = {
        "KVPACK_ACTIVATION": ACTIVATIONS[activation],
        "KVPACK_TOKENS": fit.tokens,
        "KVPACK_GROUPS": fit.groups,
        "KVPACK_BLOCKS_PER_SM": fit.resident,
        "KVPACK_STAGED_BYTES": fit.staged_bytes,
        "KVPACK_SEVERAL_TABLES": int(fit.several_tables),
        "KVPACK_OUTLIERS": int(outliers),
        "KVPACK_PREDICTED": int(predicted),
    }
    return Kernel.of("weights/gemm_mma.cu", "gemm_mma", layout, defines)


def multiply(coded: Coded, x: torch.Tensor, bias: torch.Tensor | None, fit: MmaFit) -> torch.Tensor:
    """x · Wᵀ (+ bias).

    Args:
        x: contiguous [tokens, cols], as many tokens as the launch is for, fp16, bf16 or fp32.
        bias: [rows] of x's type.

    Returns:
        [tokens, rows] of x's type. The same bits at each run of the same launch.
    """
    if coded.row_offsets is not None:
        return with_row_offsets(coded, x, bias, lambda plain, wide: multiply(plain, wide, None, fit))
    header, tokens, device = coded.header, x.shape[0], x.device
    out = torch.empty((tokens, header.rows), dtype=x.dtype, device=device)
    token_blocks = ceil_div(tokens, fit.tokens)
    arranged, token_scales = wgmma_product.arrange(coded, x, fit.tokens * token_blocks, split_slots=True)
    row_blocks, pairs = ceil_div(header.rows, fit.rows), ceil_div(header.num_tiles_col, _TEAMS)
    quotient, remainder = divmod(row_blocks * pairs, fit.blocks)
    sums = 2 * fit.blocks * token_blocks * fit.rows * fit.tokens
    kernels.launch(
        mma_kernel(coded.layout, x.dtype, fit, outliers=coded.has_outliers, predicted=coded.predicted),
        (fit.blocks, token_blocks),
        fit.warps * GROUP_LANES,
        (
            arranged,
            token_scales,
            coded.blob,
            coded.groups,
            coded.tables if len(coded.tables) else None,
            coded.scales,
            coded.scale_stride,
            bias,
            out,
            torch.empty(sums, dtype=torch.float32, device=device),
            semaphores.take(fit.warps * row_blocks * token_blocks, device),
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
            np.uint32(fit.tokens * token_blocks),
            np.uint32(ceil_div(header.cols, CHUNK_COLS)),
            np.uint32(header.tile_cols // CHUNK_COLS),
            np.uint32(pairs),
            np.uint32(coded.row_groups),
        ),
        device=device,
        shared_bytes=fit.shared_bytes,
    )
    return out
