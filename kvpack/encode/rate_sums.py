"""What a step makes of a histogram of weights, bin by bin: the compiled loop of :mod:`.rate`."""

from __future__ import annotations

import numpy as np
from numba import njit

from kvpack.encode.jit import kernel
from kvpack.encode.quantize import NUM_THRESHOLDS

# Tensors of one model may be so far apart that a common step means nothing to one.
_MAX_INTEGER = float(1 << 40)


@njit(nogil=True, inline="always")
def _rounded(centre, step, thresholds):  # type: ignore[no-untyped-def]
    v = min(abs(centre) / step, _MAX_INTEGER)
    k = np.int64(v)
    k += np.int64(v - k >= thresholds[min(k, NUM_THRESHOLDS - 1)])
    return -k if centre < 0 else k


@kernel
def place_bins(centres, counts, step, thresholds, on_grid, offset, clamp, half, code_of, codes):  # type: ignore[no-untyped-def]
    """Quantize bins by ``step`` to integers, clipped to −``half`` … ``half`` − 1 if they are no outliers.

    An integer q stands for (q + ``offset``)·step. With ``on_grid`` the nearest one is taken, as a trellis of which this
    is a grid does on average; else ``thresholds`` f32 [129] round.

    Args:
        centres, counts: f64 and i64 [bins].
        clamp: f32: see :class:`.quantize.Rounding`.
        code_of: the code of each element, integers [2 · half].
        codes: i64 [codes]: how often each code is there is added to it.

    Returns:
        Σ count · squared error (f64), and how many weights are outliers.
    """
    noise, outliers = 0.0, np.int64(0)
    for i in range(centres.shape[0]):
        centre, count = centres[i], counts[i]
        if on_grid:
            q = np.int64(np.rint(min(max(centre / step, -_MAX_INTEGER), _MAX_INTEGER) - offset))
        else:
            q = _rounded(centre, step, thresholds)
        clipped = min(max(q, -half), half - 1)
        codes[code_of[clipped + half]] += count
        if q != clipped and abs(centre) / step - abs(clipped + offset) >= clamp:
            outliers += count
            clipped = q
        error = centre - step * (clipped + offset)
        noise += count * (error * error)
    return noise, outliers
