"""Frequencies from counts: what the compiled search gives is what a plain one gives, ties included."""

from __future__ import annotations

import math

import numpy as np
import pytest

from kvpack.encode.frequencies import normalise_frequencies


def plain_frequencies(counts: list[int]) -> list[int]:
    """Units one by one to the symbol that gains most or from the one that loses least, the first of equals."""
    present = [symbol for symbol, count in enumerate(counts) if count]
    total = sum(counts)
    f = [min(max(math.floor(count / total * 4096), 1), 4095) if count else 0 for count in counts]

    def gain(symbol: int) -> float:
        return counts[symbol] * math.log((f[symbol] + 1.0) / f[symbol]) if f[symbol] < 4095 else -2.0

    def loss(symbol: int) -> float:
        return counts[symbol] * math.log(f[symbol] / (f[symbol] - 1.0)) if f[symbol] > 1 else math.inf

    while True:
        missing = 4096 - sum(f)
        gainer, loser = max(present, key=gain), min(present, key=loss)
        if missing == 0 and (gainer == loser or gain(gainer) <= loss(loser) * (1 + 1e-12)):
            return f
        f[gainer] += missing >= 0
        f[loser] -= missing <= 0


@pytest.mark.parametrize("kind", range(5))
def test_same_as_plain_search(kind: int) -> None:
    rng = np.random.default_rng(kind)
    for symbols in (2, 3, 15, 16, 17, 100, 255, 256):
        counts = np.zeros(256, np.int64)
        counts[np.sort(rng.choice(256, symbols, replace=False))] = (
            np.ones(symbols),
            rng.integers(1, 5, symbols),
            2 ** rng.integers(0, 20, symbols),
            rng.exponential(1, symbols) ** 4 * 1000 + 1,
            np.where(np.arange(symbols) == symbols // 2, 10**9, 1),
        )[kind]
        assert normalise_frequencies(counts).tolist() == plain_frequencies(counts.tolist())
