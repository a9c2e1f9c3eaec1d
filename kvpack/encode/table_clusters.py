"""Which tiles share a frequency table (docs/FORMAT.md §5.1: up to 16 tables a tensor).

Tiles are grouped by k-means in code length (each tile goes to the table that codes it shortest, each table is
the optimum for its tiles), doubling the number of tables as long as the bits saved exceed the tables' own.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvpack.encode.frequencies import coded_bits, normalise_frequencies
from kvpack.format.layout import FREQUENCY_SUM, MAX_TABLES, NUM_SYMBOLS
from kvpack.format.tables import Frequencies, packed_table_bytes

_ROUNDS = 4
# More tables must save at least this share of the bits: a GPU reloads its look-up table for each of them.
_WORTH_WHILE = 0.002
CONSTANT = -1  # instead of a table's index: all symbols of the tile are equal


def _fit(counts: npt.NDArray[np.int64], assignment: npt.NDArray[np.int64], tables: int) -> list[Frequencies]:
    """The optimal table of each cluster, for clusters that have tiles."""
    return [
        normalise_frequencies(counts[assignment == index].sum(axis=0))
        for index in range(tables)
        if (assignment == index).any()
    ]


def _costs(counts: npt.NDArray[np.int64], tables: list[Frequencies]) -> npt.NDArray[np.float64]:
    """Bits of each tile with each table, [tiles, tables]; inf where a symbol is missing from the table."""
    frequencies = np.stack(tables).astype(np.float64)
    absent = frequencies == 0
    lengths = np.log2(FREQUENCY_SUM) - np.log2(np.where(absent, 1, frequencies))
    costs = counts @ lengths.T
    costs[(counts @ absent.T.astype(np.int64)) > 0] = np.inf
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
    coded = np.flatnonzero((tile_counts > 0).sum(axis=1) > 1)
    if not len(coded):
        return [], assignment
    counts = tile_counts[coded]
    best = np.zeros(len(coded), np.int64)
    tables = _fit(counts, best, 1)
    best_bits = coded_bits(counts, tables[0]) + _table_bits(tables)
    # Start from tiles ordered by how long the common table codes them: the main way in which tiles differ.
    total = counts.sum(axis=1)
    order = np.argsort(_costs(counts, tables)[:, 0] / total, kind="stable")
    number = 2
    while number <= min(MAX_TABLES, len(coded)):
        trial = np.empty(len(coded), np.int64)
        trial[order] = np.arange(len(coded)) * number // len(coded)
        for _ in range(_ROUNDS):
            trial_tables = _fit(counts, trial, number)
            trial = np.argmin(_costs(counts, trial_tables), axis=1)
        trial_tables = _fit(counts, trial, number)
        # An emptied cluster shifts the later ones' indices.
        trial = np.unique(trial, return_inverse=True)[1]
        costs = _costs(counts, trial_tables)[np.arange(len(coded)), trial]
        bits = float(costs.sum()) + _table_bits(trial_tables)
        if bits > best_bits * (1 - _WORTH_WHILE):
            break
        tables, best, best_bits = trial_tables, trial, bits
        number *= 2
    assignment[coded] = best
    return tables, assignment
