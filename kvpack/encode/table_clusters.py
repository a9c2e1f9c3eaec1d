"""Which tiles share a frequency table (docs/FORMAT.md §5.1: up to 16 tables a tensor).

Tiles are grouped by k-means in code length (each tile goes to the table that codes it shortest, each table is
the optimum for its tiles), doubling the number of tables as long as the bits saved exceed the tables' own.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from kvpack.encode.frequencies import coded_bits, normalise_frequencies
from kvpack.encode.jit import kernel
from kvpack.format.layout import FREQUENCY_SUM, MAX_TABLES, NUM_SYMBOLS
from kvpack.format.tables import Frequencies, packed_table_bytes

_ROUNDS = 4
# Bounds are compared with a margin far above the error of sums in floating point.
_MARGIN = 1e-9
# More tables must save at least this share of the bits: a GPU reloads its look-up table for each of them.
_WORTH_WHILE = 0.002
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


def _fit(counts: npt.NDArray[np.int64], assignment: npt.NDArray[np.int64], tables: int) -> list[Frequencies]:
    """The optimal table of each cluster, for clusters that have tiles."""
    sums = np.zeros((tables, NUM_SYMBOLS), np.int64)
    _cluster_counts(counts, assignment, sums)
    return [normalise_frequencies(total) for total in sums if total.any()]


def _costs(
    counts: npt.NDArray[np.float64], used: npt.NDArray[np.bool_], tables: list[Frequencies]
) -> npt.NDArray[np.float64]:
    """Bits of each tile with each table, [tiles, tables]; inf where a symbol is missing from the table.

    ``counts`` as f64: integers are multiplied by a loop, floats by BLAS. ``used`` [256]: symbols that any tile has.
    """
    frequencies = np.stack(tables).astype(np.float64)
    absent = frequencies == 0
    lengths = np.log2(FREQUENCY_SUM) - np.log2(np.where(absent, 1, frequencies))
    costs = counts @ lengths.T
    if (absent & used).any():
        costs[(counts @ absent.T.astype(np.float64)) > 0] = np.inf
    return np.asarray(costs)


def _table_bits(tables: list[Frequencies]) -> int:
    return sum(8 * packed_table_bytes(table, NUM_SYMBOLS) for table in tables)


def _least_bits(counts: npt.NDArray[np.int64], totals: npt.NDArray[np.int64], table: Frequencies, bits: float) -> float:
    """A lower bound of the tiles' bits with any tables, given their ``bits`` with ``table``: n·H each."""
    sums = np.zeros(NUM_SYMBOLS)
    _divergences(counts, totals, table, sums)
    return (bits - float(sums.sum()) / math.log(2)) * (1 - _MARGIN)


def cluster_tables(
    tile_counts: npt.NDArray[np.int64],
) -> tuple[list[Frequencies], npt.NDArray[np.int64]]:
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
    total = counts.sum(axis=0)
    tables, best = [normalise_frequencies(total)], np.zeros(len(coded), np.int64)
    bits = coded_bits(total, tables[0])
    # Most tensors' tiles are so alike that this settles it.
    least_bits = _least_bits(counts, totals, tables[0], bits)
    best_bits = bits + _table_bits(tables)
    assignment[coded] = best
    if least_bits > best_bits * (1 - _WORTH_WHILE):
        return tables, assignment
    as_floats = counts.astype(np.float64)
    used = total > 0
    # Start from tiles ordered by how long the common table codes them: the main way in which tiles differ.
    order = np.argsort(_costs(as_floats, used, tables)[:, 0] / totals, kind="stable")
    number = 2
    while number <= min(MAX_TABLES, len(coded)) and least_bits <= best_bits * (1 - _WORTH_WHILE):
        trial = np.empty(len(coded), np.int64)
        trial[order] = np.arange(len(coded)) * number // len(coded)
        for _ in range(_ROUNDS):
            before = trial
            trial_tables = _fit(counts, before, number)
            trial = np.argmin(_costs(as_floats, used, trial_tables), axis=1)
            if np.array_equal(trial, before):  # all further rounds give the same
                break
        trial_tables = _fit(counts, trial, number)
        # An emptied cluster shifts the later ones' indices.
        trial = np.unique(trial, return_inverse=True)[1]
        costs = _costs(as_floats, used, trial_tables)[np.arange(len(coded)), trial]
        bits = float(costs.sum()) + _table_bits(trial_tables)
        if bits > best_bits * (1 - _WORTH_WHILE):
            break
        tables, best, best_bits = trial_tables, trial, bits
        number *= 2
    assignment[coded] = best
    return tables, assignment
