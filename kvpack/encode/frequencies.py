"""Frequencies from counts: the integers that minimise the coded size (docs/FORMAT.md §5.1).

Minimises −Σ countₛ·log2(freqₛ) with Σ freqₛ = 4096 and 1 ≤ freqₛ ≤ 4095 where countₛ > 0. The objective is convex and
separable, so a solution that no exchange of one unit improves is optimal; naive rounding with a floor of one
cost 0.075 bit a symbol at σ = 8 (256 symbols), see docs/DESIGN-NOTES.md.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit

from kvpack.encode.jit import kernel
from kvpack.format.layout import FREQUENCY_SUM, NUM_SYMBOLS
from kvpack.format.tables import Frequencies


@njit(nogil=True, inline="always")
def _set_gain_and_loss(counts, frequencies, total, present, i, gains, losses):  # type: ignore[no-untyped-def]
    """For symbol ``present[i]``; a gain of −2, or an infinite loss, where there is no unit more to give or take."""
    count, f = counts[present[i]], frequencies[present[i]]
    gains[i] = count * np.log((f + 1.0) / f) if f < total - 1 else -2.0
    losses[i] = count * np.log(f / (f - 1.0)) if f > 1 else np.inf


@kernel
def _exchange_to_optimum(counts, frequencies, total):  # type: ignore[no-untyped-def]
    """Adjust ``frequencies`` to the sum 4096, then exchange units until none pays.

    ``total`` symbols occur. The gain of one more unit is count·log((f+1)/f), the loss of one less count·log(f/(f−1)).
    """
    missing = total
    for symbol in range(counts.shape[0]):
        missing -= frequencies[symbol]
    present = np.flatnonzero(counts)
    # An exchange changes two of these: logarithms are not taken anew for all.
    gains = np.empty(present.shape[0])
    losses = np.empty(present.shape[0])
    for i in range(present.shape[0]):
        _set_gain_and_loss(counts, frequencies, total, present, i, gains, losses)
    while True:
        best_gain, best_loss = -1.0, np.inf
        gainer, loser = -1, -1
        if missing >= 0:
            for i in range(present.shape[0]):
                if gains[i] > best_gain:
                    best_gain, gainer = gains[i], i
        if missing <= 0:
            for i in range(present.shape[0]):
                if losses[i] < best_loss:
                    best_loss, loser = losses[i], i
        if missing == 0:
            pays = loser >= 0 and gainer >= 0 and gainer != loser and best_gain > best_loss * (1 + 1e-12)
            if not pays:
                return
        if missing >= 0:
            frequencies[present[gainer]] += 1
            _set_gain_and_loss(counts, frequencies, total, present, gainer, gains, losses)
        if missing <= 0:
            frequencies[present[loser]] -= 1
            _set_gain_and_loss(counts, frequencies, total, present, loser, gains, losses)
        missing -= np.sign(missing)


def normalise_frequencies(counts: npt.NDArray[np.int64]) -> Frequencies:
    """The optimal table for ``counts`` [256], of which at least two are positive.

    >>> normalise_frequencies(np.array([3, 1] + [0] * 254))[:2].tolist()
    [3072, 1024]
    """
    present = counts > 0
    if int(present.sum()) < 2:
        raise ValueError("a table needs at least two symbols that occur; such tiles are constant")
    share = counts / counts.sum() * FREQUENCY_SUM
    frequencies = np.where(present, np.clip(np.floor(share), 1, FREQUENCY_SUM - 1), 0).astype(np.int64)
    _exchange_to_optimum(counts.astype(np.int64), frequencies, FREQUENCY_SUM)
    return frequencies.astype(np.uint16)


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
