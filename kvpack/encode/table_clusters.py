"""Which tiles share a frequency table (docs/FORMAT.md §5.1: up to 16 tables a tensor).

Tiles are grouped by k-means in code length (each tile goes to the table that codes it shortest, each table is
the optimum for its tiles), doubling the number of tables as long as the bits saved exceed the tables' own.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvpack.encode.frequencies import coded_bits, normalise_frequencies
from kvpack.encode.jit import kernel
from kvpack.format.layout import FREQUENCY_SUM, MAX_TABLES, NUM_SYMBOLS
from kvpack.format.tables import Frequencies, packed_table_bytes

_ROUNDS = 4
# More tables must save at least this share of the bits: a GPU reloads its look-up table for each of them.
_WORTH_WHILE = 0.002
CONSTANT = -1  # instead of a table's index: all symbols of the tile are equal


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


def cluster_tables(
    tile_counts: npt.NDArray[np.int64],
) -> tuple[list[Frequencies], npt.NDArray[np.int64]]:
    """Tables for tiles with histograms ``tile_counts`` [tiles, 256].

    Returns:
        The tables, and for each tile the index of its table, or −1 if all its symbols are equal.
    """
    assignment = np.full(len(tile_counts), CONSTANT, np.int64)
    coded = np.flatnonzero(np.count_nonzero(tile_counts, axis=1) > 1)
    if not len(coded):
        return [], assignment
    counts = tile_counts if len(coded) == len(tile_counts) else tile_counts[coded]
    as_floats = counts.astype(np.float64)
    used = counts.sum(axis=0) > 0
    best = np.zeros(len(coded), np.int64)
    tables = _fit(counts, best, 1)
    best_bits = coded_bits(counts, tables[0]) + _table_bits(tables)
    # Start from tiles ordered by how long the common table codes them: the main way in which tiles differ.
    total = counts.sum(axis=1)
    order = np.argsort(_costs(as_floats, used, tables)[:, 0] / total, kind="stable")
    number = 2
    while number <= min(MAX_TABLES, len(coded)):
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
