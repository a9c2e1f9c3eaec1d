"""Tensors of few distinct values: integers, ternary weights, codebooks.

Where a step divides them all, nothing is lost.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

# The elements of a quantized tensor have at most 8 bits.
MAX_DISTINCT = 256
LOWEST, HIGHEST = -128, 127
# So many values of a tensor tell whether it is worth while to look at all.
_SAMPLE = 2048
# Two multiples of a step differ by a whole number of them, up to rounding to bf16.
_TOLERANCE = 2.0**-10

Values = npt.NDArray[np.float32]


def distinct_values(strips: Iterable[Values]) -> tuple[Values, npt.NDArray[np.int64]] | None:
    """The sorted distinct values of f32 ``strips`` and how often each occurs; None if there are more than 256."""
    found: Values = np.empty(0, np.float32)
    counts: npt.NDArray[np.int64] = np.empty(0, np.int64)
    for strip in strips:
        if not len(found) and len(np.unique(strip.reshape(-1)[:_SAMPLE])) > MAX_DISTINCT:
            return None
        values, times = np.unique(strip, return_counts=True)
        if len(values) > MAX_DISTINCT:
            return None
        found, place = np.unique(np.concatenate([found, values]), return_inverse=True)
        counts = np.bincount(place, np.concatenate([counts, times]), minlength=len(found)).astype(np.int64)
        if len(found) > MAX_DISTINCT:
            return None
    return found, counts


def grid_step(values: Values) -> float:
    """The largest f32 step whose products with integers of −128 … 127 are ``values``, bit for bit; 0.0 without one.

    ``values`` are f32, sorted, finite. Negative zeros count as zeros.
    """
    magnitudes = np.unique(np.abs(values.astype(np.float64)))
    magnitudes = magnitudes[magnitudes > 0]
    if not len(magnitudes):
        return 0.0
    # Euclid's algorithm, with remainders that rounding leaves taken for 0.
    divisor = float(magnitudes[0])
    for magnitude in magnitudes[1:]:
        a, b = float(magnitude), divisor
        while b > _TOLERANCE * divisor:
            a, b = b, abs(a - round(a / b) * b)
        divisor = a
        if magnitudes[-1] > -LOWEST * divisor * (1 + _TOLERANCE):
            return 0.0
    multiples = np.rint(values / divisor)
    if multiples.min() < LOWEST or multiples.max() > HIGHEST:
        return 0.0
    # The largest multiple tells the step best.
    at = int(np.argmax(np.abs(multiples)))
    step = np.float32(np.float64(values[at]) / multiples[at])
    for candidate in (step, np.nextafter(step, np.float32(0)), np.nextafter(step, np.float32(np.inf))):
        if candidate >= np.finfo(np.float32).tiny:
            products = candidate * multiples.astype(np.float32)
            if np.array_equal(products, values):
                return float(candidate)
    return 0.0
