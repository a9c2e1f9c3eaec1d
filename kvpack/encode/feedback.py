"""Quantizing with feedback: the error of a column is made up for by the columns that are quantized after it.

With H = E[x·xᵀ] of a layer's inputs, a row's error e costs e·H·eᵀ at the layer's output. For H = L·Lᵀ that is
Σ_j (e_j·L_jj + Σ_{i>j} e_i·L_ij)²: columns are quantized from the last to the first, each towards
w_j + Σ_{i>j} e_i·L_ij/L_jj, so that what is left of a column is its own rounding times L_jj alone (optimal brain
surgeon: Hassibi and Stork 1993; GPTQ: Frantar and others 2022; this form: LDLQ of QuIP, Chee and others 2023). The
kinds of integers, the step and the file are those of plain rounding.

The columns with the largest H_jj are quantized first, so that these have the most others to make up for them. The
choice between integers minimises err²·L_jj² + λ·step²·bits, with λ in units of the mean L_jj²: columns that matter
little take the cheap integers.

All sums are made in one order and in IEEE single precision (the factor's in double), so that the same moments give the
same integers on every machine and number of threads.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from kvpack.encode.jit import kernel
from kvpack.encode.quantize import DELTA_OFFSET, Quantized, Rounding
from kvpack.encode.threads import map_ordered
from kvpack.format.layout import MAX_TILE_COLS, OUTLIER_BYTES, outlier_delta_max

F32 = np.float32
# What is added to the diagonal, as part of its mean: moments of few tokens are no better known than that.
DAMPING = 0.01
# Columns whose corrections are summed side by side, so that errors pass through the cache once for all of them.
_BLOCK_COLS = 16
# Cholesky: columns of a panel, rows of a thread, and columns of a panel's rows that stay in a cache.
_PANEL, _BLOCK_ROWS, _TILE_COLS = 128, 256, 256
# Up to so many columns sharing out the work takes longer than the work.
_ALONE_COLS = 768
# Magnitudes that an outlier can have in tiles of any width; a weight of more is in tiles that have its own.
MOST_STEPS = outlier_delta_max(MAX_TILE_COLS)
# What an outlier takes beside its element.
CLAMP_BITS = 8 * OUTLIER_BYTES


class Feedback(NamedTuple):
    """How the columns of a matrix make up for one another's errors.

    Attributes:
        order: i64 [K], the columns in the order of quantizing.
        coefficients: f32 [K, K], strictly lower: what the error of the u-th column adds to the t-th, by that order.
        variances: f32 [K], L_jj² of the t-th column over their mean.
        mean_variance: that mean.
    """

    order: npt.NDArray[np.int64]
    coefficients: npt.NDArray[np.float32]
    variances: npt.NDArray[np.float32]
    mean_variance: float

    @property
    def size_bytes(self) -> int:
        """What it takes of memory, nearly: coefficients in a file take none that others could not have."""
        return 0 if isinstance(self.coefficients, np.memmap) else self.coefficients.nbytes


class MatrixFeedback(Protocol):
    """A :class:`Feedback`, or the same on a device: whoever quantizes knows its own."""

    @property
    def mean_variance(self) -> float:
        """The mean of L_jj²."""

    @property
    def size_bytes(self) -> int:
        """What it takes of memory, nearly."""


class TensorFeedback(Protocol):
    """What quantizing a tensor with feedback needs of its inputs and outputs."""

    def of_matrix(self, matrix: int) -> MatrixFeedback:
        """How the columns of one of its matrices make up for one another's errors."""

    def row_weights(self, matrix: int) -> npt.NDArray[np.float64] | None:
        """Nats that Σ_j err_j²·(L_jj² over their mean) = 1 costs in each row, f64 [rows]; None where nobody knows."""


@kernel
def _factor_diagonal(a, begin, end):  # type: ignore[no-untyped-def]
    """L of a block on the diagonal of f64 ``a``, from which all columns before it are taken out; False if it has none.

    Like all loops here it makes no sum of its own: each product is taken from an element by itself, in the order of the
    columns, so that neither vector units nor threads change a number.
    """
    for j in range(begin, end):
        if not a[j, j] > 0.0:
            return False
        root = np.sqrt(a[j, j])
        a[j, j] = root
        for i in range(j + 1, end):
            a[i, j] /= root
        for i in range(j + 1, end):
            factor = a[i, j]
            for k in range(j + 1, i + 1):
                a[i, k] -= factor * a[k, j]
    return True


@kernel
def _solve_rows(a, begin, end, first, last, transposed):  # type: ignore[no-untyped-def]
    """Columns ``begin … end`` of L in rows below the block on the diagonal, and in ``transposed`` f64 [columns, K]."""
    size = end - begin
    block = np.empty((size, size))
    for j in range(size):
        for k in range(j, size):
            block[j, k] = a[begin + k, begin + j]
    for i in range(first, last):
        row = a[i, begin:end]
        for j in range(size):
            row[j] /= block[j, j]
            factor, other = row[j], block[j]
            for k in range(j + 1, size):
                row[k] -= factor * other[k]
        for j in range(size):
            transposed[j, i] = row[j]


@kernel
def _update_rows(a, begin, end, first, last, transposed):  # type: ignore[no-untyped-def]
    """Take the products of columns ``begin … end`` out of what is right of them in some rows."""
    fours = (end - begin) // 4 * 4
    for left in range(end, last, _TILE_COLS):
        for i in range(max(first, left), last):
            right = min(left + _TILE_COLS, i + 1)
            row, target = a[i, begin:end], a[i, left:right]
            for j in range(0, fours, 4):
                f0, f1, f2, f3 = row[j], row[j + 1], row[j + 2], row[j + 3]
                o0, o1 = transposed[j, left:right], transposed[j + 1, left:right]
                o2, o3 = transposed[j + 2, left:right], transposed[j + 3, left:right]
                for k in range(right - left):
                    target[k] = (((target[k] - f0 * o0[k]) - f1 * o1[k]) - f2 * o2[k]) - f3 * o3[k]
            for j in range(fours, end - begin):
                f0, o0 = row[j], transposed[j, left:right]
                for k in range(right - left):
                    target[k] -= f0 * o0[k]


def _cholesky(a: npt.NDArray[np.float64], executor: ThreadPoolExecutor | None = None) -> bool:
    """L of a symmetric ``a`` [K, K] in its lower triangle; False if it is not positive definite.

    Panels of columns; rows below them are independent of one another, and shared out to threads.
    """
    size = len(a)
    transposed = np.empty((min(_PANEL, size), size))
    for begin in range(0, size, _PANEL):
        end = min(begin + _PANEL, size)
        if not _factor_diagonal(a, begin, end):
            return False
        blocks = range(end, size, _BLOCK_ROWS)
        for kernel_of_rows in (_solve_rows, _update_rows):

            def work(first: int, kernel_of_rows: Callable[..., None] = kernel_of_rows) -> None:
                kernel_of_rows(a, begin, end, first, min(first + _BLOCK_ROWS, size), transposed)  # noqa: B023

            deque(map_ordered(work, blocks, executor if len(blocks) > 1 else None), maxlen=0)
    return True


def order_of(second_moment: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.int64], float]:
    """The columns in the order of quantizing, i64 [K], the largest H_jj first; and the mean of these."""
    diagonal = np.diag(second_moment).astype(np.float64)
    return np.argsort(-diagonal, kind="stable"), float(diagonal.mean())


def feedback_of(
    second_moment: npt.NDArray[np.float32], damping: float = DAMPING, executor: ThreadPoolExecutor | None = None
) -> Feedback:
    """The feedback for inputs with this second moment.

    It takes 4·K² bytes, and 12·K² while it is made, beside the moment.

    Args:
        second_moment: f32 [K, K], E[x·xᵀ].
        damping: part of the mean of its diagonal that is added to that.
        executor: threads to share the work; what comes of it does not depend on them.

    Raises:
        ValueError: it is not positive definite.
    """
    order, mean = order_of(second_moment)
    size = len(order)
    if mean <= 0:
        return Feedback(order, np.zeros((size, size), np.float32), np.ones(size, np.float32), 0.0)
    if size <= _ALONE_COLS:
        executor = None
    # From the last to the first of the columns of L: these are the first to the last in ``order``.
    last_first = order[::-1]
    factor = np.empty((size, size))
    strips = [slice(first, min(first + _BLOCK_ROWS, size)) for first in range(0, size, _BLOCK_ROWS)]

    def permute(rows: slice) -> None:
        factor[rows] = second_moment[last_first[rows]][:, last_first]

    def symmetrise(rows: slice) -> None:
        """The lower triangle; the upper one is left as it is for other rows."""
        factor[rows, : rows.start] += factor[: rows.start, rows].T
        factor[rows, : rows.start] /= 2
        factor[rows, rows] = (factor[rows, rows] + factor[rows, rows].T) / 2

    def divide(rows: slice) -> None:
        coefficients[rows, : rows.stop] = (
            np.tril(reversed_factor[rows, : rows.stop], rows.start - 1) / roots[rows, None]
        )

    deque(map_ordered(permute, strips, executor), maxlen=0)
    deque(map_ordered(symmetrise, strips, executor), maxlen=0)
    factor[np.diag_indices(size)] += damping * mean
    if not _cholesky(factor, executor):
        raise ValueError("a second moment is not positive definite")
    reversed_factor = factor[::-1, ::-1].T
    roots = np.diag(reversed_factor)
    coefficients = np.zeros((size, size), np.float32)
    deque(map_ordered(divide, strips, executor), maxlen=0)
    variances = np.square(roots)
    mean = float(variances.mean())
    return Feedback(order, coefficients, (variances / mean).astype(np.float32), mean)


@kernel
def _nearest(value, rate, bits, half, clamp_bits):  # type: ignore[no-untyped-def]
    """The integer with the least (value − q)² + rate·bits of f32 ``value``."""
    magnitude = abs(value)
    most = half if value < F32(0) else half - 1
    above = np.int32(magnitude) + 1
    if above > most:
        edge = magnitude - F32(most)
        if edge > F32(0) and edge * edge > rate * clamp_bits:
            q = np.int32(magnitude + F32(0.5))
            return -q if value < F32(0) else q
        above = most
    error = magnitude - F32(above)
    best = error * error + rate * bits[above]
    chosen = above
    q = above - 1
    while q >= 0:
        error = magnitude - F32(q)
        squared = error * error
        if error > F32(0) and squared >= best:
            break
        cost = squared + rate * bits[q]
        if cost < best:
            best, chosen = cost, q
        q -= 1
    return -chosen if value < F32(0) else chosen


@kernel
def add_feedback(coefficients, errors, begin, count, targets):  # type: ignore[no-untyped-def]
    """Add what the errors of columns before ``begin`` f32 [K, R], a multiple of 4, ask of the next ``count`` columns to
    their ``targets`` f32 [count, R]."""
    rows = targets.shape[1]
    for u in range(0, begin, 4):
        e0, e1, e2, e3 = errors[u], errors[u + 1], errors[u + 2], errors[u + 3]
        for t in range(count):
            c = coefficients[begin + t]
            c0, c1, c2, c3 = c[u], c[u + 1], c[u + 2], c[u + 3]
            target = targets[t]
            for row in range(rows):
                target[row] += (c0 * e0[row] + c1 * e1[row]) + (c2 * e2[row] + c3 * e3[row])


@kernel
def add_feedback_of_block(coefficients, errors, begin, at, target):  # type: ignore[no-untyped-def]
    """The same of columns ``begin … at`` to the target f32 [R] of column ``at``."""
    for u in range(begin, at):
        c0, e0 = coefficients[at, u], errors[u]
        for row in range(len(target)):
            target[row] += c0 * e0[row]


@kernel
def _quantize(values, coefficients, variances, rate_weight, bits, clamp_bits, half, most, integers, errors, row_errors):  # type: ignore[no-untyped-def]
    """Quantize f32 ``values`` [K, R] (in steps, columns in order) to i32 ``integers`` [K, R].

    Σ err²·L_jj², over the mean of these, is added to ``row_errors`` f64 [R].
    """
    columns, rows = values.shape
    targets = np.empty((_BLOCK_COLS, rows), np.float32)
    for begin in range(0, columns, _BLOCK_COLS):
        count = min(_BLOCK_COLS, columns - begin)
        targets[:count] = values[begin : begin + count]
        add_feedback(coefficients, errors, begin, count, targets)
        for t in range(count):
            target, at = targets[t], begin + t
            add_feedback_of_block(coefficients, errors, begin, at, target)
            rate = rate_weight / variances[at]
            for row in range(rows):
                limit = max(most, abs(values[at, row]))
                value = min(max(target[row], -limit), limit)
                q = _nearest(value, rate, bits, half, clamp_bits)
                integers[at, row] = q
                errors[at, row] = values[at, row] - F32(q)
                error = np.float64(target[row] - F32(q))
                row_errors[row] += error * error * np.float64(variances[at])


def quantize_with_feedback(
    weights: npt.NDArray[np.float32],
    steps: npt.NDArray[np.float32],
    element_bits: int,
    rounding: Rounding,
    feedback: Feedback,
) -> Quantized:
    """Quantize a strip: f32 ``weights`` [R, K], ``steps`` f32 [R], to ``element_bits`` bits.

    Its sums for a least-squares scale are 0, which leaves the step: what rounding leaves has been made up for.
    """
    rows, cols = weights.shape
    inverse = np.divide(F32(1), steps, out=np.zeros_like(steps), where=steps > 0)
    values = np.ascontiguousarray((weights * inverse[:, None]).T[feedback.order])
    integers = np.empty((cols, rows), np.int32)
    errors = np.empty((cols, rows), np.float32)
    row_errors = np.zeros(rows)
    half = 1 << (element_bits - 1)
    _quantize(
        values,
        feedback.coefficients,
        feedback.variances,
        np.float32(rounding.rate_weight),
        rounding.bits,
        np.float32(CLAMP_BITS),
        half,
        F32(MOST_STEPS),
        integers,
        errors,
        row_errors,
    )
    by_column = np.empty((rows, cols), np.int32)
    by_column[:, feedback.order] = integers.T
    edges = np.clip(by_column, -half, half - 1)
    beyond = by_column - edges
    places = np.nonzero(beyond)
    outliers = np.column_stack((*places, beyond[places] + DELTA_OFFSET)).astype(np.uint32)
    return Quantized((edges + half).astype(np.uint8), outliers, 0, 0, row_errors)
