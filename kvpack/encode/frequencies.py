"""Frequencies from counts: the integers that minimise the coded size (docs/FORMAT.md §5.1).

Minimises −Σ countₛ·log2(freqₛ) with Σ freqₛ = 4096 and 1 ≤ freqₛ ≤ 4095 where countₛ > 0. The objective is convex and
separable, so a solution that no exchange of one unit improves is optimal; naive rounding with a floor of one
cost 0.075 bit a symbol at σ = 8 (256 symbols), see docs/DESIGN-NOTES.md.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from numba import njit

from kvpack.encode.jit import kernel
from kvpack.format.layout import FREQUENCY_SUM, NUM_SYMBOLS
from kvpack.format.tables import Frequencies

# log((f+1)/f) for each frequency f: what a unit more gains, and what it then would lose.
_UNIT_LOGS = np.array([0.0, *(math.log((f + 1.0) / f) for f in range(1, FREQUENCY_SUM))])
# Gains and losses are kept in rows of so many, with the best of each row.
_ROW = 16


@njit(nogil=True, inline="always")
def _set_gain_and_loss(counts, frequencies, total, present, i, gains, losses):  # type: ignore[no-untyped-def]
    """For symbol ``present[i]``; a gain of −2, or an infinite loss, where there is no unit more to give or take.

    ``losses`` are stored negated, so that of either the largest is best.
    """
    count, f = counts[present[i]], frequencies[present[i]]
    gains[i] = count * _UNIT_LOGS[f] if f < total - 1 else -2.0
    losses[i] = -(count * _UNIT_LOGS[f - 1]) if f > 1 else -np.inf


@njit(nogil=True, inline="always")
def _set_best_of_row(values, row, best):  # type: ignore[no-untyped-def]
    largest = values[row * _ROW]
    for i in range(row * _ROW + 1, (row + 1) * _ROW):
        largest = max(largest, values[i])
    best[row] = largest


@njit(nogil=True, inline="always")
def _first_of_the_best(values, best, above):  # type: ignore[no-untyped-def]
    """The first index of the largest of ``values``, if that is above ``above``; else −1."""
    found = -1
    for row in range(best.shape[0]):
        if best[row] > above:
            above, found = best[row], row * _ROW
    if found >= 0:
        while values[found] != above:
            found += 1
    return found


@kernel
def _exchange_to_optimum(counts, frequencies, total):  # type: ignore[no-untyped-def]
    """Adjust ``frequencies`` to the sum 4096, then exchange units until none pays.

    ``total`` symbols occur. The gain of one more unit is count·log((f+1)/f), the loss of one less count·log(f/(f−1)).
    """
    missing = total
    for symbol in range(counts.shape[0]):
        missing -= frequencies[symbol]
    present = np.flatnonzero(counts)
    # An exchange changes two of these: logarithms are not taken anew for all, nor all compared.
    rows = (present.shape[0] + _ROW - 1) // _ROW
    gains, losses = np.full(rows * _ROW, -np.inf), np.full(rows * _ROW, -np.inf)
    best_gains, best_losses = np.empty(rows), np.empty(rows)
    for i in range(present.shape[0]):
        _set_gain_and_loss(counts, frequencies, total, present, i, gains, losses)
    for row in range(rows):
        _set_best_of_row(gains, row, best_gains)
        _set_best_of_row(losses, row, best_losses)
    while True:
        gainer, loser = -1, -1
        if missing >= 0:
            gainer = _first_of_the_best(gains, best_gains, -1.0)
        if missing <= 0:
            loser = _first_of_the_best(losses, best_losses, -np.inf)
        if missing == 0:
            pays = loser >= 0 and gainer >= 0 and gainer != loser and gains[gainer] > -losses[loser] * (1 + 1e-12)
            if not pays:
                return
        for i, change in ((gainer, 1), (loser, -1)):
            if i >= 0:
                frequencies[present[i]] += change
                _set_gain_and_loss(counts, frequencies, total, present, i, gains, losses)
                _set_best_of_row(gains, i // _ROW, best_gains)
                _set_best_of_row(losses, i // _ROW, best_losses)
        missing -= np.sign(missing)


@kernel
def _rounded_shares(counts):  # type: ignore[no-untyped-def]
    """Each count's share of 4096, rounded down but to at least 1 where there is a count."""
    frequencies = np.zeros_like(counts)
    total = counts.sum()
    for symbol in range(counts.shape[0]):
        if counts[symbol] > 0:
            share = np.floor(counts[symbol] / total * FREQUENCY_SUM)
            frequencies[symbol] = min(max(np.int64(share), 1), FREQUENCY_SUM - 1)
    return frequencies


@kernel
def normalise_all(counts):  # type: ignore[no-untyped-def]
    """:func:`normalise_frequencies` of each row of ``counts`` i64 [tables, 256], as i64."""
    tables = np.empty_like(counts)
    for index in range(counts.shape[0]):
        frequencies = _rounded_shares(counts[index])
        _exchange_to_optimum(counts[index], frequencies, FREQUENCY_SUM)
        tables[index] = frequencies
    return tables


def normalise_frequencies(counts: npt.NDArray[np.int64]) -> Frequencies:
    """The optimal table for ``counts`` [256], of which at least two are positive.

    >>> normalise_frequencies(np.array([3, 1] + [0] * 254))[:2].tolist()
    [3072, 1024]
    """
    if np.count_nonzero(counts) < 2:
        raise ValueError("a table needs at least two symbols that occur; such tiles are constant")
    return np.asarray(normalise_all(counts.astype(np.int64)[None])[0], np.uint16)


def coded_bits(counts: npt.NDArray[np.int64], frequencies: Frequencies) -> float:
    """Bits that the counted symbols take with this table, lane states aside; inf if one cannot be coded.

    ``counts`` is [256] or [tiles, 256] (summed).
    """
    total = counts.reshape(-1, NUM_SYMBOLS).sum(axis=0)
    used = total > 0
    if (frequencies[used] == 0).any():
        return float("inf")
    return float(total[used] @ (np.log2(FREQUENCY_SUM) - np.log2(frequencies[used].astype(np.float64))))


def entropy_bits(counts: npt.NDArray[np.int64]) -> float:
    """Shannon entropy of a histogram, in bits a symbol."""
    positive = counts[counts > 0].astype(np.float64)
    if positive.size == 0:
        return 0.0
    p = positive / positive.sum()
    return float(-(p @ np.log2(p)))
