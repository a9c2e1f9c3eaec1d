"""Which tiles share a frequency table (docs/FORMAT.md §5.1: up to 16 tables a tensor).

Tiles are grouped by k-means in code length (each tile goes to the table that codes it shortest, each table is
the optimum for its tiles), doubling the number of tables as long as the bits saved exceed the tables' own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvpack.encode.frequencies import normalise_all, normalise_frequencies
from kvpack.encode.jit import kernel
from kvpack.format.layout import FREQUENCY_SUM, MAX_TABLES, NUM_SYMBOLS, Layout
from kvpack.format.tables import Frequencies

Counts = npt.NDArray[np.int64]

_ROUNDS = 4
# Bounds are compared with a margin far above the error of sums in floating point.
_MARGIN = 1e-9
# More tables must save at least this share of all bits, the raw ones among them: a GPU makes a launch for each of them.
_WORTH_WHILE = 0.002
# Bits of a symbol of each frequency.
_LENGTHS = np.log2(FREQUENCY_SUM) - np.log2(np.maximum(np.arange(FREQUENCY_SUM), 1))
_LENGTHS[0] = 1e100
# Bits of a frequency in a packed table (docs/FORMAT.md §5.1).
_CODE_BITS = np.array([2 * (f + 1).bit_length() - 1 for f in range(FREQUENCY_SUM)])
CONSTANT = -1  # instead of a table's index: all symbols of the tile are equal


@kernel
def _divergences(counts, totals, frequencies, sums):  # type: ignore[no-untyped-def]
    """Add to each of ``sums`` f64 [256] an upper bound of what its symbol adds to Σ n·D(tile ‖ table), in nats.

    ``counts`` i64 [tiles, 256] with sums ``totals`` n. With e = n·f/4096 expected and δ = count/e − 1 the share is
    e·((1 + δ)·ln(1 + δ) − δ): never above e·δ², nor above e·(δ²/2 − δ³/6 + δ⁴/3), which are quicker than logarithms
    (the first as ln(1 + δ) ≤ δ; the second is the series with all of its further terms taken as δ⁴/(k·(k − 1)), k > 3).
    """
    inverses = np.zeros(counts.shape[1])
    for symbol in range(counts.shape[1]):
        if frequencies[symbol]:
            inverses[symbol] = FREQUENCY_SUM / frequencies[symbol]
    for tile in range(counts.shape[0]):
        row, share = counts[tile], totals[tile] / FREQUENCY_SUM
        inverse = 1.0 / totals[tile]
        for symbol in range(counts.shape[1]):
            delta = row[symbol] * inverse * inverses[symbol] - 1.0
            series = 1.0 / 2 + delta * (delta * (1.0 / 3) - 1.0 / 6)
            sums[symbol] += share * frequencies[symbol] * delta * delta * min(1.0, series)


@kernel
def _cluster_counts(counts, assignment, sums):  # type: ignore[no-untyped-def]
    """Add the histograms ``counts`` i64 [tiles, 256] to the rows of ``sums`` i64 that ``assignment`` says."""
    for tile in range(counts.shape[0]):
        row = sums[assignment[tile]]
        for symbol in range(counts.shape[1]):
            row[symbol] += counts[tile, symbol]


def _fit(counts: npt.NDArray[np.signedinteger[Any]], assignment: npt.NDArray[np.int64], tables: int) -> Counts:
    """The optimal table of each cluster, for clusters that have tiles: i64 [tables, 256]."""
    sums = np.zeros((tables, NUM_SYMBOLS), np.int64)
    _cluster_counts(counts, assignment, sums)
    return np.asarray(normalise_all(sums[sums.any(axis=1)]))


def _costs(counts: npt.NDArray[np.float64], tables: Counts) -> npt.NDArray[np.float64]:
    """Bits of each tile with each table, [tiles, tables]; beyond all bounds where a symbol is missing from the table.

    ``counts`` as f64: integers are multiplied by a loop, floats by BLAS (sooner if both are contiguous).
    """
    return np.asarray(counts @ np.ascontiguousarray(_LENGTHS[tables].T))


def _table_bits(tables: npt.NDArray[np.integer[Any]]) -> int:
    """Size in bits of packed tables, each in whole bytes; ``tables`` are integers [tables, 256]."""
    return 8 * int(((_CODE_BITS[tables].sum(axis=1) + 7) // 8).sum())


def _least_bits(counts: Counts, totals: Counts, table: Frequencies, bits: float) -> float:
    """A lower bound of the tiles' bits with any tables, given their ``bits`` with ``table``: n·H each."""
    sums = np.zeros(NUM_SYMBOLS)
    _divergences(counts, totals, table, sums)
    return (bits - float(sums.sum()) / math.log(2)) * (1 - _MARGIN)


@dataclass(frozen=True)
class CommonTable:
    """The best single table for all tiles of which none is constant.

    ``coded_bits`` are the tiles' with it, ``bits`` its own as well; ``raw_bits`` those that no table changes.
    """

    table: Frequencies
    coded_bits: float
    bits: float
    raw_bits: int

    @classmethod
    def of(cls, total: Counts, layout: Layout) -> CommonTable:
        """``total`` [256] is the sum of the tiles' histograms."""
        table = normalise_frequencies(total)
        used = total > 0
        bits = float(total[used] @ _LENGTHS[table[used]])
        raw_bits = layout.raw_bits * layout.codes_per_symbol * int(total.sum())
        return cls(table, bits, bits + _table_bits(table[None]), raw_bits)

    def to_beat(self, bits: float) -> float:
        """What more tables must stay within to be worth while, where fewer take ``bits``."""
        return bits - _WORTH_WHILE * (bits + self.raw_bits)

    def suffices(self, least_bits: float) -> bool:
        """Whether more tables are not worth while, if the tiles take at least ``least_bits`` with any."""
        return least_bits * (1 - _MARGIN) > self.to_beat(self.bits)


def cluster_tables(
    tile_counts: Counts,
    layout: Layout,
) -> tuple[list[Frequencies], Counts]:
    """Tables for tiles with histograms ``tile_counts`` [tiles, 256].

    Returns:
        The tables, and for each tile the index of its table, or −1 if all its symbols are equal.
    """
    assignment = np.full(len(tile_counts), CONSTANT, np.int64)
    totals = tile_counts.sum(axis=1)
    coded = np.flatnonzero(tile_counts.max(axis=1) < totals)
    if not len(coded):
        return [], assignment
    counts = tile_counts
    if len(coded) < len(tile_counts):
        counts, totals = tile_counts[coded], totals[coded]
    common = CommonTable.of(counts.sum(axis=0), layout)
    least_bits = _least_bits(counts, totals, common.table, common.coded_bits)
    tables, assignment[coded] = cluster_coded(counts, common, least_bits)
    return tables, assignment


def cluster_coded(
    counts: npt.NDArray[np.signedinteger[Any]], common: CommonTable, least_bits: float
) -> tuple[list[Frequencies], Counts]:
    """:func:`cluster_tables` of tiles of which none is constant, given their :class:`CommonTable`.

    No tables code them in fewer than ``least_bits``: a higher bound saves time, and changes nothing.
    """
    tables, best, best_bits = [common.table], np.zeros(len(counts), np.int64), common.bits
    # Many tensors' tiles are so alike that this settles it.
    if common.suffices(least_bits):
        return tables, best
    as_floats = counts.astype(np.float64)
    # Start from tiles ordered by how long the common table codes them: the main way in which tiles differ.
    totals = as_floats @ np.ones(NUM_SYMBOLS)
    order = np.argsort(_costs(as_floats, np.stack(tables))[:, 0] / totals, kind="stable")
    number = 2
    while number <= min(MAX_TABLES, len(counts)) and least_bits <= common.to_beat(best_bits):
        trial = np.empty(len(counts), np.int64)
        trial[order] = np.arange(len(counts)) * number // len(counts)
        for _ in range(_ROUNDS):
            before = trial
            trial = np.argmin(_costs(as_floats, _fit(counts, before, number)), axis=1)
            if np.array_equal(trial, before):  # all further rounds give the same
                break
        trial_tables = _fit(counts, trial, number)
        if len(trial_tables) < number:  # an emptied cluster shifts the later ones' indices
            trial = np.unique(trial, return_inverse=True)[1]
        costs = _costs(as_floats, trial_tables)[np.arange(len(counts)), trial]
        bits = float(costs.sum()) + _table_bits(trial_tables)
        if bits > common.to_beat(best_bits):
            break
        tables, best, best_bits = list(trial_tables.astype(np.uint16)), trial, bits
        number *= 2
    return tables, best
