"""How many blocks, warps and word buffers a launch of the weight kernels has: what should take the least time.

The words of a tile are decoded from shared memory, so that what fits into it decides how many warps share a
multiprocessor. A launch is chosen by an estimate of its time, a sum of :class:`Terms`; what each costs depends on the
device (:mod:`kvpack.runtime.weights.launch_costs`). Where a caller names no costs, those of an H100 count.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from kvpack.format.header import BlobHeader
from kvpack.format.layout import ALIGNMENT_BYTES, CHUNK_COLS, FREQUENCY_SUM, GROUP_LANES, align, ceil_div
from kvpack.runtime.device.devices import Limits

_TABLE_BYTES = 4 * FREQUENCY_SUM
BLOCKS_PER_SM = 2
_GEMV_CHUNK_BYTES = 2 * CHUNK_COLS + 16
_FRAGMENT_BYTES = 16 * GROUP_LANES
_PASSING_BYTES = 2 * 32 * GROUP_LANES
# What a warp begins its next unit with: an entry of the group table, states and lengths of lanes.
_NEXT_UNIT_BYTES = 16 + 4 * GROUP_LANES + 2 * GROUP_LANES
# What a grouped product keeps of its matrix; others could do without.
_ENDS_BYTES = 64
# Hardware has this many barriers for teams, besides that of the whole block.
_MAX_TEAMS = 15
# A launch has no more blocks in its second dimension.
_MAX_BLOCKS_Y = 65535
# A second buffer for words hides the start of a tile; worth this much of the warps.
_DOUBLE_BUFFER_GAIN = 1.15
# What a unit costs besides its chunks, in chunks.
_UNIT_COST = 1.5
_REMEMBERED = 4096


@dataclass(frozen=True)
class Fit:
    """How many warps a block has, how many blocks there are, and how many word buffers a warp has."""

    warps: int
    buffers: int
    grid: int
    shared_bytes: int


@dataclass(frozen=True)
class ProductFit:
    """A product's launch, see ``cuda/weights/schedule.cuh``.

    Attributes:
        panels: how many panels the tile columns form; blocks: thread blocks of each.
        panel_width, member_width: tile columns of a panel, and of a member of a team.
        members, last_members: of a team in a panel, and in the last one.
        teams: of a block.
        run_quotient, run_remainder: row groups dealt to the teams of a panel, divided by their number.
        resident: blocks that share a multiprocessor.
        buffers: word buffers of a warp.
    """

    panels: int
    blocks: int
    panel_width: int
    member_width: int
    members: int
    last_members: int
    teams: int
    run_quotient: int
    run_remainder: int
    resident: int
    buffers: int
    shared_bytes: int


def _fits(limits: Limits, max_warps: int) -> Iterator[tuple[int, int, int, int]]:
    """(warps, blocks, buffers, bytes a block may have) of all launches to think of, those preferred first."""
    options = []
    for blocks in range(BLOCKS_PER_SM, 0, -1):
        available = limits.block_bytes(blocks)
        options += [(warps, blocks, buffers, available) for buffers in (2, 1) for warps in range(max_warps, 0, -1)]
    return iter(sorted(options, key=lambda o: -o[0] * o[1] * (_DOUBLE_BUFFER_GAIN if o[2] == 2 else 1)))


@lru_cache(maxsize=_REMEMBERED)
def fit_decode(word_buffer_bytes: int, limits: Limits, tasks: int, staging_bytes: int, max_warps: int) -> Fit | None:
    """The launch of a decode kernel over ``tasks`` groups, with ``staging_bytes`` for each warp; None if none fits."""
    for warps, blocks, buffers, available in _fits(limits, max_warps):
        shared = _TABLE_BYTES + warps * (staging_bytes + buffers * word_buffer_bytes)
        if shared <= available:
            return Fit(warps, buffers, min(ceil_div(tasks, warps), blocks * limits.multiprocessors), shared)
    return None


class Terms(NamedTuple):
    """What makes up the time of a product's launch; or what a unit of each takes, in µs.

    Attributes:
        heaviest: chunks that the busiest multiprocessor decodes.
        longest: those of the busiest warp: lanes decode step after step, so that a warp does not get faster alone.
        unbuffered: the same, where a warp has one word buffer.
        activations: chunks of activations that a warp prepares.
        rounds: row groups of a team, besides the first.
        members: 1 if members put their sums together; panels: 1 if panels do, and parts: how many.
    """

    heaviest: float
    longest: float
    unbuffered: float
    activations: float
    rounds: float
    members: float
    panels: float
    parts: float


# On an H100 SXM, by eights of vectors; 0 for one vector. Found as benchmarks/launch_costs.py does, and rounded; several
# sums of costs come equally near to the times, and choose equally good launches.
COSTS = {
    0: Terms(0.031, 0.42, 0.13, 0.19, 1.4, 1.4, 3.1, 0.14),
    1: Terms(0.035, 0.48, 0.06, 0.60, 4.3, 0.6, 3.5, 0.25),
    2: Terms(0.034, 0.50, 0.02, 0.70, 6.4, 1.0, 0.5, 0.41),
    4: Terms(0.034, 0.50, 0.02, 1.20, 9.0, 1.5, 0.5, 0.80),
    8: Terms(0.034, 0.50, 0.02, 2.40, 16.0, 3.0, 0.5, 1.60),  # not measured: what grows with the sums, twice
}


@dataclass(frozen=True)
class _Memory:
    """Shared memory in bytes: of a block, a warp, a word buffer, the activations of a chunk, the sums of a warp."""

    block: int
    warp: int
    word_buffer: int
    chunk: int
    sum: int


@lru_cache(maxsize=1 << 16)  # alike for tensors that differ in their words alone
def _heaviest_multiprocessor(multiprocessors: int, panels: int, blocks: int, teams: int, row_groups: int) -> int:
    """Row groups of a panel that the busiest multiprocessor has, if blocks are dealt to them in turn."""
    quotient, remainder = divmod(row_groups, blocks * teams)
    of_block = teams * quotient + np.maximum(0, remainder - np.arange(blocks) + blocks - 1) // blocks
    dealt = np.zeros(align(panels * blocks, multiprocessors), np.int64)
    dealt[: panels * blocks] = np.tile(of_block, panels)
    return int(dealt.reshape(-1, multiprocessors).sum(0).max())


def _product_launches(
    shape: tuple[int, int, int],
    limits: Limits,
    max_warps: tuple[int, int],
    max_panels: int,
    memory: _Memory,
    slots: int,
) -> Iterator[tuple[Terms, ProductFit]]:
    """All launches that fit, and what their time is made of.

    ``shape``: tile columns, groups of rows, chunks of a tile column. ``max_warps``: of a block whose warps have one
    word buffer, or two, if two blocks share a multiprocessor; of one alone twice as many. ``slots``: matrices that are
    multiplied side by side.
    """
    tile_columns, row_groups, tile_chunks = shape
    unit_chunks = tile_chunks + _UNIT_COST
    for resident, buffers in itertools.product(range(1, BLOCKS_PER_SM + 1), (1, 2)):
        available = limits.block_bytes(resident)
        block_warps = max_warps[buffers - 1] * BLOCKS_PER_SM // resident
        for panel_width, member_width in _widths(tile_columns, block_warps):
            panels, members = ceil_div(tile_columns, panel_width), ceil_div(panel_width, member_width)
            if panels > max_panels:
                continue
            max_teams = min(block_warps // members, row_groups, _MAX_TEAMS if members > 1 else block_warps)
            for teams in range(1, max_teams + 1):
                at_once = resident * limits.multiprocessors
                blocks = max(1, min(at_once // (panels * slots), ceil_div(row_groups, teams)))
                # Blocks that do not fit beside the others begin when these end.
                waves = ceil_div(panels * slots * blocks, at_once)
                quotient, remainder = divmod(row_groups, blocks * teams)
                run, warps, panel_chunks = quotient + (remainder > 0), teams * members, panel_width * tile_chunks
                shared_bytes = memory.block + panel_chunks * memory.chunk + ALIGNMENT_BYTES
                shared_bytes += warps * (memory.warp + buffers * memory.word_buffer)
                shared_bytes += (members > 1) * warps * min(run, 2) * memory.sum
                if shared_bytes > available:
                    continue  # more teams have shorter runs, which need less for sums
                heaviest = _heaviest_multiprocessor(limits.multiprocessors, panels * slots, blocks, teams, row_groups)
                terms = Terms(
                    heaviest=heaviest * panel_width * unit_chunks,
                    longest=waves * run * member_width * unit_chunks,
                    unbuffered=waves * run * member_width * unit_chunks * (buffers == 1),
                    activations=waves * ceil_div(panel_chunks, warps),
                    rounds=waves * run - 1,
                    members=members > 1,
                    panels=panels > 1,
                    parts=panels * (panels > 1),
                )
                last_members = ceil_div(tile_columns - (panels - 1) * panel_width, member_width)
                panel = (panels, blocks, panel_width, member_width, members, last_members, teams)
                yield terms, ProductFit(*panel, quotient, remainder, resident, buffers, shared_bytes)


def gemv_launches(
    header: BlobHeader,
    word_buffer_bytes: int,
    limits: Limits,
    max_warps: int,
    max_panels: int = _MAX_BLOCKS_Y,
    slots: int = 1,
) -> Iterator[tuple[Terms, ProductFit]]:
    """All launches of the kernel for one vector, and what their time is made of.

    ``slots``: of a grouped product (``cuda/weights/grouped.cuh``), those that have work.
    """
    memory = _Memory(
        block=_TABLE_BYTES + _ENDS_BYTES,
        warp=0,
        word_buffer=word_buffer_bytes,
        chunk=_GEMV_CHUNK_BYTES,
        sum=4 * GROUP_LANES,
    )
    return _product_launches(_shape(header), limits, (max_warps, max_warps), max_panels, memory, slots)


def gemm_launches(
    header: BlobHeader,
    word_buffer_bytes: int,
    limits: Limits,
    max_warps: int,
    token_tiles: int,
    max_panels: int = _MAX_BLOCKS_Y,
    slots: int = 1,
    buffered_max_warps: int | None = None,
) -> Iterator[tuple[Terms, ProductFit]]:
    """The same of the kernel for a few vectors. ``buffered_max_warps``: with two word buffers, if these are fewer."""
    tokens = 8 * token_tiles
    memory = _Memory(
        block=_TABLE_BYTES + 12 * tokens + _ENDS_BYTES,
        warp=_PASSING_BYTES + _NEXT_UNIT_BYTES,
        word_buffer=word_buffer_bytes,
        chunk=token_tiles * _FRAGMENT_BYTES,
        sum=4 * tokens * GROUP_LANES,
    )
    return _product_launches(
        _shape(header), limits, (max_warps, buffered_max_warps or max_warps), max_panels, memory, slots
    )


def estimated_us(terms: Terms, costs: Terms) -> float:
    """What a launch should take, without what all launches have in common."""
    return sum(map(operator.mul, terms, costs))


def _best(launches: Iterable[tuple[Terms, ProductFit]], costs: Terms) -> ProductFit | None:
    found = min(launches, key=lambda launch: estimated_us(launch[0], costs), default=None)
    return None if found is None else found[1]


def _shape(header: BlobHeader) -> tuple[int, int, int]:
    return header.num_tiles_col, ceil_div(header.rows, GROUP_LANES), header.tile_cols // CHUNK_COLS


@lru_cache(maxsize=_REMEMBERED)
def fit_gemv(
    header: BlobHeader,
    word_buffer_bytes: int,
    limits: Limits,
    max_warps: int,
    max_panels: int = _MAX_BLOCKS_Y,
    slots: int = 1,
    costs: Terms = COSTS[0],
) -> ProductFit | None:
    """The launch of the kernel for one vector that should take the least time; None if none fits."""
    return _best(gemv_launches(header, word_buffer_bytes, limits, max_warps, max_panels, slots), costs)


@lru_cache(maxsize=_REMEMBERED)
def fit_gemm(
    header: BlobHeader,
    word_buffer_bytes: int,
    limits: Limits,
    max_warps: int,
    token_tiles: int,
    max_panels: int = _MAX_BLOCKS_Y,
    slots: int = 1,
    costs: Terms | None = None,
    buffered_max_warps: int | None = None,
) -> ProductFit | None:
    """The launch of the kernel for a few vectors that should take the least time; None if none fits."""
    launches = gemm_launches(
        header, word_buffer_bytes, limits, max_warps, token_tiles, max_panels, slots, buffered_max_warps
    )
    return _best(launches, costs or COSTS[token_tiles])


def _widths(tile_columns: int, warps: int) -> Iterator[tuple[int, int]]:
    """(tile columns of a panel, of a member) of all ways to split, without those that leave members idle."""
    for panel_width in sorted({ceil_div(tile_columns, panels) for panels in range(1, tile_columns + 1)}):
        for member_width in sorted(
            {ceil_div(panel_width, members) for members in range(1, min(panel_width, warps) + 1)}
        ):
            yield panel_width, member_width
