"""Dependent quantization: of the integers that a trellis allows (FORMAT.md §4.1), those with the least error and bits.

The union of both grids is as fine as half a step, and an element takes the bits of one whole step: a path through the
four states of each column and group of 32 rows, found by the Viterbi algorithm, leaves 0.8 dB less noise than rounding
(trellis-coded quantization: Marcellin and Fischer 1990; in video coding: Schwarz and others 2019).

A path runs down a column, feedback (see feedback.py) runs along a row: the errors that a column is to make up for are
known before its path is searched, in whatever order the columns come. So both gain what each gains alone.

Costs are summed in one order in IEEE single precision: the same weights give the same elements on every machine.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvpack.encode.feedback import CLAMP_BITS, Feedback, add_feedback, add_feedback_of_block
from kvpack.encode.jit import kernel
from kvpack.encode.quantize import DELTA_OFFSET, FIXED_POINT, Quantized, Rounding
from kvpack.encode.trellis import unsigned_integers
from kvpack.format.layout import (
    GROUP_LANES,
    MAX_TILE_COLS,
    TRELLIS_EXTRA_BITS,
    TRELLIS_REACH_STEPS,
    ceil_div,
    outlier_delta_max,
)

F32 = np.float32
# Steps that an outlier can lie beyond the range in tiles of any width.
_MOST_STEPS = (outlier_delta_max(MAX_TILE_COLS) >> TRELLIS_EXTRA_BITS) - TRELLIS_REACH_STEPS
_BLOCK_COLS = 16
_UNREACHED = F32(1e30)


@kernel
def _cost(value, parity, rate, bits, half, outlier_at):  # type: ignore[no-untyped-def]
    """The cheapest k of a parity towards f32 ``value``, which the grid's offset has been taken from, and its cost."""
    low, high = -half + parity, half - 2 + parity
    k = 2 * np.int32(np.floor((value - F32(parity)) * F32(0.5) + F32(0.5))) + parity
    nearest = min(max(k, low), high)
    error = value - F32(nearest)
    cost = min(error * error, outlier_at) + rate * bits[nearest + half]
    # The next one towards zero has the shorter code.
    other = min(max(nearest - 2 if nearest > 0 else nearest + 2, low), high)
    error = value - F32(other)
    other_cost = min(error * error, outlier_at) + rate * bits[other + half]
    if other_cost < cost:
        return other, other_cost
    return nearest, cost


@kernel
def _search(targets, weights, rate, bits, half, outlier_at, ks, choices, costs, found):  # type: ignore[no-untyped-def]
    """The best paths of a column: k of f32 ``targets`` [32, groups] (in steps) to i32 ``found`` [2, 32, groups] and,
    behind them, their grids.

    ``weights`` f32 [32, groups]: 1, and 0 for rows that there are not. ``ks`` i8 [32, groups, 4], ``choices`` u8 [32,
    groups], ``costs`` f32 [groups, 4] are scratch. A state s leads, by the parity p of k, to state 2·(p xor s mod 2) +
    s div 2; the grid is s div 2.
    """
    rows, groups = targets.shape
    costs[:] = _UNREACHED
    costs[:, 0] = F32(0)
    for row in range(rows):
        for group in range(groups):
            target, weight, own = targets[row, group], weights[row, group], ks[row, group]
            k0, even_0 = _cost(target - F32(0.25), 0, rate, bits, half, outlier_at)
            k1, odd_0 = _cost(target - F32(0.25), 1, rate, bits, half, outlier_at)
            k2, even_1 = _cost(target - F32(0.75), 0, rate, bits, half, outlier_at)
            k3, odd_1 = _cost(target - F32(0.75), 1, rate, bits, half, outlier_at)
            own[0], own[1], own[2], own[3] = k0, k1, k2, k3
            even_0, odd_0, even_1, odd_1 = even_0 * weight, odd_0 * weight, even_1 * weight, odd_1 * weight
            cost = costs[group]
            c0, c1, c2, c3 = cost[0], cost[1], cost[2], cost[3]
            a0, b0, a2, b2 = c0 + even_0, c1 + odd_0, c0 + odd_0, c1 + even_0
            a1, b1, a3, b3 = c2 + even_1, c3 + odd_1, c2 + odd_1, c3 + even_1
            cost[0], cost[1], cost[2], cost[3] = min(a0, b0), min(a1, b1), min(a2, b2), min(a3, b3)
            choices[row, group] = (b0 < a0) | (b1 < a1) << 1 | (b2 < a2) << 2 | (b3 < a3) << 3
    for group in range(groups):
        state = np.argmin(costs[group])
        for row in range(rows - 1, -1, -1):
            choice = choices[row, group] >> state & 1
            grid, parity = state & 1, choice ^ state >> 1
            found[0, row, group] = ks[row, group, 2 * grid + parity]
            found[1, row, group] = grid
            state = 2 * grid + choice


@kernel
def _quantize(  # type: ignore[no-untyped-def]
    values, coefficients, variances, weights, rate_weight, bits, half, found, errors, row_errors
):
    """Quantize f32 ``values`` [K, 32, groups] (in steps, columns in order) to i32 ``found`` [K, 2, 32, groups]: k, and
    what lies beyond it in quarters of a step, outliers' δ.

    Σ err²·L_jj², over the mean of these, is added to ``row_errors`` f64 [32, groups].
    """
    columns, rows, groups = values.shape
    flat = values.reshape(columns, rows * groups)
    flat_errors = errors.reshape(columns, rows * groups)
    targets = np.empty((_BLOCK_COLS, rows * groups), np.float32)
    outlier_bits, most = F32(CLAMP_BITS), F32(_MOST_STEPS)
    ks = np.empty((rows, groups, 4), np.int8)
    choices = np.empty((rows, groups), np.uint8)
    costs = np.empty((groups, 4), np.float32)
    for begin in range(0, columns, _BLOCK_COLS):
        count = min(_BLOCK_COLS, columns - begin)
        targets[:count] = flat[begin : begin + count]
        if coefficients.shape[0]:
            add_feedback(coefficients, flat_errors, begin, count, targets)
        for t in range(count):
            at = begin + t
            own = targets[t]
            if coefficients.shape[0]:
                add_feedback_of_block(coefficients, flat_errors, begin, at, own)
            for row in range(rows * groups):
                limit = max(most, abs(flat[at, row]))
                own[row] = min(max(own[row], -limit), limit)
            rate = rate_weight / variances[at]
            # In range an error is at most a step: the integers of a parity are two steps apart.
            outlier_at = max(rate * outlier_bits, F32(1))
            target = own.reshape(rows, groups)
            _search(target, weights, rate, bits, half, outlier_at, ks, choices, costs, found[at])
            for row in range(rows):
                for group in range(groups):
                    k, grid = found[at, 0, row, group], found[at, 1, row, group]
                    quarters = 4 * k + 2 * grid + 1
                    error = target[row, group] - F32(quarters) * F32(0.25)
                    delta = np.int32(0)
                    if error * error > outlier_at:
                        delta = np.int32(np.rint(error * F32(4)))
                    found[at, 1, row, group] = delta
                    value = F32(quarters + delta) * F32(0.25)
                    errors[at, row, group] = values[at, row, group] - value
                    error = np.float64(target[row, group] - value)
                    row_errors[row, group] += error * error * np.float64(variances[at])


def quantize_with_trellis(
    weights: npt.NDArray[np.float32],
    steps: npt.NDArray[np.float32],
    element_bits: int,
    rounding: Rounding,
    feedback: Feedback | None = None,
) -> Quantized:
    """Quantize a strip: f32 ``weights`` [R, K], ``steps`` f32 [R], to elements of ``element_bits`` bits.

    ``rounding.bits``: what each element's code takes, f32 [2^n] or more. Outliers' deltas are quarters of a step. With
    feedback there are no sums for a least-squares scale, and errors of rows.
    """
    rows, cols = weights.shape
    groups = ceil_div(rows, GROUP_LANES)
    inverse = np.divide(F32(1), steps, out=np.zeros_like(steps), where=steps > 0)

    def by_group(numbers: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """[R, …] → [32, groups, …], zeros behind the last row."""
        padded = np.zeros((groups * GROUP_LANES, *numbers.shape[1:]), numbers.dtype)
        padded[:rows] = numbers
        return padded.reshape(groups, GROUP_LANES, *numbers.shape[1:]).swapaxes(0, 1)

    order = np.arange(cols) if feedback is None else feedback.order
    scaled = weights * inverse[:, None]
    values = np.ascontiguousarray(by_group(scaled).transpose(2, 0, 1)[order])
    found = np.empty((cols, 2, GROUP_LANES, groups), np.int32)
    row_errors = np.zeros((GROUP_LANES, groups))
    half = 1 << (element_bits - 1)
    _quantize(
        values,
        np.empty((0, 0), np.float32) if feedback is None else feedback.coefficients,
        np.ones(cols, np.float32) if feedback is None else feedback.variances,
        np.ascontiguousarray(by_group(np.ones(rows, np.float32))),
        F32(rounding.rate_weight),
        rounding.bits,
        half,
        found,
        np.empty(values.shape, np.float32),
        row_errors,
    )
    by_column = np.empty((2, rows, cols), np.int32)
    by_column[:, :, order] = found.transpose(1, 3, 2, 0).reshape(2, groups * GROUP_LANES, cols)[:, :rows]
    elements = (by_column[0] + half).astype(np.uint8)
    places = np.nonzero(by_column[1])
    outliers = np.column_stack((*places, by_column[1][places] + DELTA_OFFSET)).astype(np.uint32)
    if feedback is not None:
        return Quantized(elements, outliers, 0, 0, row_errors.T.reshape(-1)[:rows])
    return Quantized(elements, outliers, *_scale_sums(scaled, elements, element_bits, by_column[1]))


def _scale_sums(
    scaled: npt.NDArray[np.float32],
    elements: npt.NDArray[np.uint8],
    element_bits: int,
    deltas: npt.NDArray[np.int32],
) -> tuple[int, int]:
    """``dot`` and ``energy`` (see :class:`.quantize.Quantized`) of the integers, which are quarters of a step."""
    integers = unsigned_integers(elements).astype(np.int64) - (1 << (element_bits + 1)) + deltas
    fixed = (scaled * F32(FIXED_POINT)).astype(np.int64)
    return int(4 * np.sum(fixed * integers)), int(np.sum(integers * integers))
