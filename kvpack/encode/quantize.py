"""Uniform scalar quantization in fixed arithmetic: the same integers on every machine and number of threads.

w is divided by the step in IEEE single precision (round to nearest even, nothing fused, nothing flushed); the
magnitude is truncated, and rounded up if its fraction reaches a threshold that depends on the truncated magnitude
alone. With all thresholds ½ that is rounding to nearest; rate-distortion optimisation moves them (see rate.py).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvpack.encode.jit import kernel

F32 = np.float32
# Magnitudes from here on share the last threshold.
NUM_THRESHOLDS = 129
_HALVES = np.full(NUM_THRESHOLDS, 0.5, np.float32)
# w/step is summed in units of 2^-12, so that sums are integers and their order does not matter.
FIXED_POINT = 4096
# What is added to outliers' deltas so that they are unsigned, whatever the tiles: half the range of the widest ones.
DELTA_OFFSET = 1 << 14


class Rounding(NamedTuple):
    """``thresholds`` f32 [129]; ``clamp``: steps beyond the range that a value may lie without being an outlier.

    What they come from: ``rate_weight``, squared steps that a bit is worth, and ``bits`` f32 [130], what each
    magnitude's code takes. Rounding with feedback weighs them anew for each column.
    """

    thresholds: npt.NDArray[np.float32]
    clamp: np.float32
    rate_weight: float = 0.0
    bits: npt.NDArray[np.float32] = np.zeros(NUM_THRESHOLDS + 1, np.float32)


NEAREST = Rounding(_HALVES, F32(0.5))


class Quantized(NamedTuple):
    """A strip's elements and what was counted on the way.

    ``elements`` u8 [R, K]; ``outliers`` u32 [count, 3] (row, column, delta + 2^14); ``dot`` is Σ round(4096·w/step)·q
    and ``energy`` Σ q², over all elements, outliers included. ``row_errors`` f64 [R], with feedback alone: squared
    errors at the outputs, see :mod:`.feedback`.
    """

    elements: npt.NDArray[np.uint8]
    outliers: npt.NDArray[np.uint32]
    dot: int
    energy: int
    row_errors: npt.NDArray[np.float64] | None = None


@kernel
def quantize_strip(weights, steps, thresholds, clamp, half, elements):  # type: ignore[no-untyped-def]
    """Quantize f32 ``weights`` [R, K] by ``steps`` f32 [R] to signed elements around ``half`` = 2^(n−1).

    A step of 0 gives 0. Magnitudes must not exceed outlier_delta_max steps (the caller's to check). Returns
    (outliers, dot, energy), see :class:`Quantized`.
    """
    outliers = np.empty((64, 3), np.uint32)
    count = 0
    dot, energy = np.int64(0), np.int64(0)
    last = thresholds.shape[0] - 1
    low, high = -half, half - 1
    for row in range(weights.shape[0]):
        step = steps[row]
        if step == F32(0):
            elements[row] = half
            continue
        row_dot, row_energy = np.int64(0), np.int64(0)
        for col in range(weights.shape[1]):
            v = weights[row, col] / step
            a = abs(v)
            k = np.int32(a)
            q = k + np.int32(a - F32(k) >= thresholds[min(k, last)])
            if v < F32(0):
                q = -q
            if q > high or q < low:
                edge = high if q > 0 else low
                if a - F32(abs(edge)) < clamp:
                    q = edge
                else:
                    if count == outliers.shape[0]:
                        grown = np.empty((2 * count, 3), np.uint32)
                        grown[:count] = outliers
                        outliers = grown
                    outliers[count, 0] = row
                    outliers[count, 1] = col
                    outliers[count, 2] = q - edge + DELTA_OFFSET
                    count += 1
                elements[row, col] = edge + half
            else:
                elements[row, col] = q + half
            row_dot += np.int64(v * F32(FIXED_POINT)) * q
            row_energy += np.int64(q) * q
        dot += row_dot
        energy += row_energy
    return outliers[:count].copy(), dot, energy


@kernel
def strip_moments(weights, limit):  # type: ignore[no-untyped-def]
    """Sums over the values of f32 ``weights`` [R, K] with |w| ≤ ``limit``, and what there is of others.

    Returns (Σ w², Σ w in f64, number within, number within that are not zero, max |w| of all, number not finite).
    """
    energy, total, within, zeros, largest, strange = 0.0, 0.0, 0, 0, F32(0), 0
    for row in range(weights.shape[0]):
        for col in range(weights.shape[1]):
            w = weights[row, col]
            a = abs(w)
            if a < F32(np.inf):
                largest = max(largest, a)
                if a <= limit:
                    within += 1
                    energy += np.float64(w) * np.float64(w)
                    total += np.float64(w)
                    zeros += a == F32(0)
            else:
                strange += 1
    return energy, total, within, within - zeros, largest, strange


@kernel
def row_absmax(weights, out):  # type: ignore[no-untyped-def]
    """max |w| of each row of f32 ``weights`` [R, K]."""
    for row in range(weights.shape[0]):
        largest = F32(0)
        for col in range(weights.shape[1]):
            largest = max(largest, abs(weights[row, col]))
        out[row] = largest


@kernel
def count_values(weights, per_width, histogram):  # type: ignore[no-untyped-def]
    """Histogram of w·per_width (f32), in bins of width 1 around 0; values outside fall into the first and last bin."""
    middle = histogram.shape[0] // 2
    last = F32(middle - 1)
    first = F32(-middle)
    for row in range(weights.shape[0]):
        for col in range(weights.shape[1]):
            v = np.floor(weights[row, col] * per_width)
            histogram[np.int32(min(max(v, first), last)) + middle] += 1


@kernel
def strip_noise(weights, elements, half, scales, row_offsets, column_scales, outliers, column_sums):  # type: ignore[no-untyped-def]
    """(Σ (w − ŵ)², Σ w², Σ (Σ of a row)²) in f64 and max |ŵ|, with ŵ as FORMAT.md §8 says.

    Sums of columns are added to ``column_sums`` f64 [K].
    """
    noise, signal, row_energy, largest = 0.0, 0.0, 0.0, F32(0)
    next_outlier = 0
    for row in range(weights.shape[0]):
        scale = scales[row]
        row_sum = 0.0
        for col in range(weights.shape[1]):
            q = np.int32(elements[row, col]) - half
            if (
                next_outlier < outliers.shape[0]
                and outliers[next_outlier, 0] == row
                and outliers[next_outlier, 1] == col
            ):
                q += np.int32(outliers[next_outlier, 2]) - DELTA_OFFSET
                next_outlier += 1
            w = weights[row, col]
            decoded = (scale * F32(q) + row_offsets[row]) * column_scales[col]
            largest = max(largest, abs(decoded))
            error = np.float64(w) - np.float64(decoded)
            noise += error * error
            signal += np.float64(w) * np.float64(w)
            row_sum += np.float64(w)
            column_sums[col] += np.float64(w)
        row_energy += row_sum * row_sum
    return noise, signal, row_energy, largest


def quantize(
    weights: npt.NDArray[np.float32],
    steps: npt.NDArray[np.float32],
    element_bits: int,
    rounding: Rounding = NEAREST,
) -> Quantized:
    """Quantize a strip: f32 ``weights`` [R, K], ``steps`` f32 [R], to ``element_bits`` bits."""
    elements = np.empty(weights.shape, np.uint8)
    outliers, dot, energy = quantize_strip(
        weights, steps, rounding.thresholds, rounding.clamp, 1 << (element_bits - 1), elements
    )
    return Quantized(elements, outliers, int(dot), int(energy))
