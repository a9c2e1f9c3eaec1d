"""What a step makes of a histogram of weights, bin by bin: the compiled loops of :mod:`.rate`."""

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


@kernel
def rate_thresholds(centres, counts, step, half, code_of, codes, rate_weight, thresholds, bits):  # type: ignore[no-untyped-def]
    """Where to round up so that error² + ``rate_weight`` · bits is least, for the code lengths that ``step`` leads to.

    Lengths are those of rounding to nearest first, and then those of the thresholds that came of them. Arguments are
    those of :func:`place_bins`; ``codes`` is overwritten. Nothing is returned: what makes an array of numba's one of
    Python's runs handlers of signals, so that Ctrl-C would end in a SystemError.

    Args:
        thresholds: f32 [129], and bits: of each magnitude's code, f32 [130]; both are written.
    """
    thresholds[:] = np.float32(0.5)
    magnitude = np.empty(half)
    for _ in range(2):
        codes[:] = 0
        place_bins(centres, counts, step, thresholds, False, 0.0, np.float32(0.5), half, code_of, codes)
        total = codes.sum() + 0.5 * codes.shape[0]
        longest = 0.0
        for k in range(half):
            magnitude[k] = -np.log2((codes[code_of[half + k]] + 0.5) / total)
            if k > 0:
                magnitude[k] = (magnitude[k] - np.log2((codes[code_of[half - k]] + 0.5) / total)) / 2
            longest = max(longest, magnitude[k])
        bits[:] = longest
        thresholds[:] = 0.5
        for k in range(half):
            bits[k] = magnitude[k]
            if k > 0:
                change = magnitude[k] - magnitude[k - 1]
                thresholds[k - 1] = min(max(0.5 + rate_weight / 2 * change, 0.3), 0.95)
