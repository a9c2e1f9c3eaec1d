"""One tensor → blob and scales: how each method turns strips of weights into elements, and what it measures."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kvpack.encode.blob_decoder import rotate_left
from kvpack.encode.blob_encoder import (
    EncodedBlob,
    Strip,
    count_strip,
    count_tiles,
    encode_strips,
    estimate_blob_bytes,
    even_tile_cols,
)
from kvpack.encode.distinct import distinct_values, grid_step
from kvpack.encode.dtypes import BIT_PATTERNS, LOSSLESS_KINDS, as_float32
from kvpack.encode.feedback import Feedback, MatrixFeedback, TensorFeedback, feedback_of, quantize_with_feedback
from kvpack.encode.quantize import (
    FIXED_POINT,
    NEAREST,
    Quantized,
    Rounding,
    count_values,
    quantize,
    row_absmax,
    strip_moments,
    strip_noise,
)
from kvpack.encode.rate import (
    FINE_BINS,
    FINE_BINS_PER_RMS,
    LAMBDA,
    Estimate,
    FineHistogram,
    RatePlan,
    candidate_layouts,
    estimated_bits,
    fixed_bits_per_weight,
    layouts_at,
    layouts_for_idle_lanes,
    layouts_that_lose_less,
    plan_at_step,
    plan_for_bits,
    plan_for_noise,
    plan_for_step,
    plan_ladder,
    quantizers_at,
    raw_layouts,
)
from kvpack.encode.tensor_parallel import dividing_tile_cols
from kvpack.encode.threads import map_ordered
from kvpack.encode.trellis import unsigned_integers
from kvpack.encode.trellis_quantizer import quantize_with_trellis
from kvpack.errors import ScaleError
from kvpack.format.container import COLUMN_SCALE_SUFFIX, ROW_OFFSET_SUFFIX, first_illegal, shown_numbers
from kvpack.format.header import BlobHeader
from kvpack.format.layout import (
    FLOAT_ELEMENT_BITS,
    GROUP_LANES,
    OUTLIER_LEAST_COL_BITS,
    TILE_ROWS,
    TRELLIS_EXTRA_BITS,
    TRELLIS_MAX_ELEMENT_BITS,
    ElementKind,
    Layout,
    Quantizer,
    ceil_div,
    float_layouts,
    integer_layout,
    integer_layouts,
)

_TINY = float(np.finfo(np.float32).tiny)
# A layout of half the look-ups decodes 1.4 times as fast, and is taken where it costs at most this share of bytes more.
QUICKER_COSTS_AT_MOST = 0.01
# How far below the rate a tensor may land, and how often the step is corrected.
_RATE_TOLERANCE_BITS = 0.004
_MAX_CORRECTIONS = 6
# How far a histogram's prediction may be above what a tensor takes, and how many predictions may be wrong.
_PREDICTION_IS_OFF_BY_BITS = 0.1
_MAX_TRIED = 24
# Rows that plans of a trellis and of rounding are tried on: at least so many groups of 32, and so many weights.
_SAMPLED_GROUPS = 2
_SAMPLED_WEIGHTS = 1 << 15
_MAX_TRIALS = 3
_TRIAL_IS_OFF_BY_BITS = 0.05
# Elements that are kept between passes rather than quantized again.
_KEEP_ELEMENTS = 1 << 26
_TRIM_AT_RMS = 16
_TRIMMING_ROUNDS = 8
# What is more than this part of a tensor's values that are not zero is no outlier.
_TRIM_TO_AT_LEAST = 0.97
_MOSTLY_NOT_ZERO = 0.9
# Part of the values in one fine bin from which on the histogram is not smooth.
_SPIKE_AT = 0.05
# From this part of the most steps on the largest value may be what keeps the step from being finer.
_AT_THE_LIMIT = 0.99
# Means of fewer numbers than this say nothing; a variance below this part of the power is rounding.
_MEANS_OF_AT_LEAST = 8
_CONSTANT = 1e-13
# Noise, over the variance, of the near-lossless preset: what makes weights as large as INT8 rows did.
NEAR_LOSSLESS_DB = -41.5
# How much noisier than planned, and than a plain quantizer at the rate, a tensor may come out.
_NOISE_TOLERANCE_DB = 0.5
_PLAIN_TOLERANCE_DB = 4.5
_MEANS_TOLERANCE_DB = 12.0


class NotEncodableError(Exception):
    """The tensor is better not quantized; the message says why."""


class RateOutOfReachError(NotEncodableError):
    """The tensor's overhead leaves too little of the rate; a higher one may do."""


@dataclass(frozen=True)
class EncodedTensor:
    """A blob, what stands beside it (see :class:`.reader.NumbersBeside`; nothing if lossless), and what was measured.

    ``noise_db`` is over Σ w²; ``variance_noise_db`` over the variance, None where no mean matters (see
    :class:`Moments`), ``centred_noise_db`` over that around the tensor's mean. ``reason`` says why it is not coded as
    was asked for. ``expected_kl``: nats a token that its noise costs to second order, where sensitivities say so.
    ``feedback_device``: see :class:`Coder`; None without feedback, too.
    """

    blob: EncodedBlob
    scales: npt.NDArray[np.float32] | None
    method: str
    layout: Layout
    noise_db: float | None
    variance_noise_db: float | None = None
    centred_noise_db: float | None = None
    reason: str | None = None
    column_scales: npt.NDArray[np.float16] | None = None
    row_offsets: npt.NDArray[np.float32] | None = None
    expected_kl: float | None = None
    feedback_device: str | None = None

    @property
    def size_bytes(self) -> int:
        beside = (self.scales, self.column_scales, self.row_offsets)
        return self.blob.size_bytes + sum(numbers.nbytes for numbers in beside if numbers is not None)


def _is_stack(shape: tuple[int, ...]) -> bool:
    """Whether a tensor of 3 or more dimensions is a matrix for each of the leading ones.

    Every matrix has tiles of its own, of 256 rows and some hundred columns: matrices of few rows, or of few
    columns, are mostly overhead (a patch embedding [768, 3, 32, 32], a convolution [258, 1, 256]).
    """
    if len(shape) <= 2 or shape[-1] < 32:
        return False
    return shape[-2] >= 32 if len(shape) == 3 else min(shape[-2:]) >= 64


class Matrices:
    """A tensor of 2 or more dimensions seen as [matrices, rows, cols], outputs × inputs, in strips of 256 rows.

    3 and more dimensions: as many matrices as the leading dimensions give (stacked experts), or one matrix of the first
    dimension × the rest (convolutions), see :func:`_is_stack`.
    """

    # Into how many parts the columns will be split: tiles end at their borders.
    column_parts = 1
    # The layout that all have with which it will be stacked.
    layout: Layout | None = None
    # Rows of all that it will be stacked with, if it is: all have the same tiles.
    stacked_rows: int | None = None
    # How the columns of each matrix make up for one another's errors; None: each weight is rounded for itself.
    feedback: TensorFeedback | None = None
    # Squared steps that a bit is worth.
    rate_weight = LAMBDA
    # How its weights are quantized at a rate, where they are many and spread evenly enough.
    quantizer = Quantizer.SCALAR

    def __init__(self, array: npt.NDArray[Any], *, transposed: bool = False) -> None:
        self._set_geometry(array.shape, array.dtype, transposed=transposed)
        stored = (self.matrices, self.cols, self.rows) if transposed else (self.matrices, self.rows, self.cols)
        self._array = array.reshape(stored).swapaxes(1, 2) if transposed else array.reshape(stored)

    def _set_geometry(self, shape: tuple[int, ...], dtype: npt.DTypeLike, *, transposed: bool) -> None:
        if _is_stack(shape):
            self.matrices, (rows, cols) = math.prod(shape[:-2]), shape[-2:]
        else:
            self.matrices, rows, cols = 1, shape[0], math.prod(shape[1:])
        self.transposed = transposed
        self.rows, self.cols = (cols, rows) if transposed else (rows, cols)
        self.dtype = np.dtype(dtype)
        self.tile_rows = ceil_div(self.rows, TILE_ROWS)
        self.num_strips = self.matrices * self.tile_rows
        # Filled by the first measure(): every rate that is tried begins with it.
        self.measured: FineHistogram | None = None
        self.column_scales: npt.NDArray[np.float16] | None = None
        self.row_offsets: npt.NDArray[np.float32] | None = None
        self.row_factors: npt.NDArray[np.float32] | None = None

    def set_vectors(
        self,
        column_scales: npt.NDArray[np.float16] | None = None,
        row_offsets: npt.NDArray[np.float32] | None = None,
        row_factors: npt.NDArray[np.float32] | None = None,
    ) -> None:
        """Quantize w / column scale − row offset, so that decoding gives w again (FORMAT.md §8).

        With row factors a row's step is its factor times one step of all rows, and each row has a scale. They are for
        rates that are asked for; INT8 rows have scales of their own.

        Rates are those of what is quantized, noise is that of w. Exact coding takes w as it is.

        Args:
            column_scales: f16 [matrices · cols], of the inputs.
            row_offsets: f32 [matrices · rows], of the outputs.
            row_factors: f32 [matrices · rows], of the outputs, above zero: the larger, the coarser.

        Raises:
            ScaleError: another number of them, or one that §8 calls illegal, or a factor that is not above zero.
        """
        for suffix, numbers, count in (
            (COLUMN_SCALE_SUFFIX, column_scales, self.matrices * self.cols),
            (ROW_OFFSET_SUFFIX, row_offsets, self.matrices * self.rows),
        ):
            if numbers is None:
                continue
            shown = shown_numbers(suffix)
            dtype = np.float16 if suffix == COLUMN_SCALE_SUFFIX else np.float32
            if numbers.shape != (count,) or numbers.dtype != dtype:
                raise ScaleError(
                    f"the {shown}s are {numbers.dtype} {list(numbers.shape)}; needed are {np.dtype(dtype)} [{count}]"
                )
            at = first_illegal(suffix, numbers)
            if at is not None:
                raise ScaleError(f"{shown} {at} is {numbers[at]}")
        if row_factors is not None:
            count = self.matrices * self.rows
            if row_factors.shape != (count,) or row_factors.dtype != np.float32:
                raise ScaleError(
                    f"the row factors are {row_factors.dtype} {list(row_factors.shape)}; needed are float32 [{count}]"
                )
            if not (np.isfinite(row_factors) & (row_factors >= _TINY)).all():
                at = int(np.argmin(np.isfinite(row_factors) & (row_factors >= _TINY)))
                raise ScaleError(f"row factor {at} is {row_factors[at]}")
        self.measured = None
        self.column_scales, self.row_offsets, self.row_factors = column_scales, row_offsets, row_factors

    @property
    def array(self) -> npt.NDArray[Any]:
        """[matrices, rows, cols]."""
        return self._array

    @property
    def size(self) -> int:
        return self.matrices * self.rows * self.cols

    def strip(self, index: int) -> npt.NDArray[Any]:
        matrix, tile_row = divmod(index, self.tile_rows)
        return self._array[matrix, tile_row * TILE_ROWS : (tile_row + 1) * TILE_ROWS]

    @property
    def vector_bytes(self) -> int:
        """What column scales and row offsets take."""
        return sum(numbers.nbytes for numbers in (self.column_scales, self.row_offsets) if numbers is not None)

    @property
    def bits_beside(self) -> float:
        """Bits a weight of what stands beside the blob, but for one scale: vectors, and the scales of further rows."""
        scales = 0 if self.row_factors is None else self.row_factors.nbytes - 4
        return 8 * (self.vector_bytes + scales) / self.size

    def values(self, index: int) -> npt.NDArray[np.float32]:
        """What is divided by steps of a strip, [up to 256, cols]: the strip, or what makes it with the vectors."""
        values = as_float32(self.strip(index))
        with np.errstate(over="ignore"):  # what becomes infinite is not quantized: _moments finds it
            if self.column_scales is not None:
                values = values / self.strip_column_scales(index)
            if self.row_offsets is not None:
                values = values - self.row_offsets[self.strip_rows(index), None]
        return values

    def one_step_values(self, index: int) -> npt.NDArray[np.float32]:
        """The same as one step of all rows divides it: without their factors."""
        values = self.values(index)
        if self.row_factors is not None:
            with np.errstate(over="ignore"):
                values = values / self.row_factors[self.strip_rows(index), None]
        return values

    def row_steps(self, step: float) -> npt.NDArray[np.float32]:
        """The steps of all rows, f32 [1] or [matrices · rows], of that one step.

        Raises:
            NotEncodableError: a row's is beyond the normal range of fp32.
        """
        steps = np.full(1, step, np.float32)
        if self.row_factors is None:
            return steps
        with np.errstate(over="ignore", under="ignore"):
            steps = steps * self.row_factors
        if not (np.isfinite(steps) & (steps >= 4 * _TINY)).all():  # scales are a little smaller
            raise NotEncodableError(f"a step of {step:.3g} times a row's factor is beyond the fp32 range")
        return steps

    def strip_column_scales(self, index: int) -> npt.NDArray[np.float32]:
        """Those of a strip's matrix, [cols]; ones if there are none."""
        if self.column_scales is None:
            return np.ones(self.cols, np.float32)
        matrix = index // self.tile_rows
        return self.column_scales[matrix * self.cols : (matrix + 1) * self.cols].astype(np.float32)

    def strip_row_offsets(self, index: int) -> npt.NDArray[np.float32]:
        """Those of a strip's rows; −0, which changes no sum, if there are none."""
        rows = self.strip_rows(index)
        if self.row_offsets is None:
            return np.full(rows.stop - rows.start, -0.0, np.float32)
        return self.row_offsets[rows]

    def strip_rows(self, index: int) -> slice:
        """The strip's rows among all matrices · rows."""
        matrix, tile_row = divmod(index, self.tile_rows)
        first = matrix * self.rows + tile_row * TILE_ROWS
        return slice(first, first + min(TILE_ROWS, self.rows - tile_row * TILE_ROWS))

    def choice(self, layouts: Sequence[Layout]) -> list[Layout]:
        """Those of ``layouts``, which are of one kind, that it may have: all, or the one that is prescribed."""
        own = self.layout
        return list(layouts) if own is None or own.element_kind != layouts[0].element_kind else [own]

    def header(self, layout: Layout, tile_cols: int | None) -> BlobHeader:
        return BlobHeader(
            layout=layout,
            rows=self.rows,
            cols=self.cols,
            tile_cols=tile_cols or even_tile_cols(self.stacked_rows or self.rows, self.cols, layout, self.column_parts),
            matrices=self.matrices,
            transposed=self.transposed,
        )


class QuantizedCounts(NamedTuple):
    """Symbol histograms i64 [num_tiles, 256], number of outliers, Σ dot, Σ energy of all strips (see Quantized)."""

    tiles: npt.NDArray[np.int64]
    outliers: int
    dot: int
    energy: int


class QuantizedStrips:
    """Strips quantized once and kept if the tensor is small enough, or again each time they are asked for."""

    def __init__(
        self,
        weights: Matrices,
        steps: npt.NDArray[np.float32],
        layout: Layout,
        rounding: Rounding,
    ) -> None:
        self.weights, self.rounding, self.layout = weights, rounding, layout
        self.own_steps = steps  # f32 [1] or [matrices · rows]
        self.steps = np.broadcast_to(steps, weights.matrices * weights.rows)
        self._kept: dict[int, Quantized] = {}
        self._row_errors: dict[int, npt.NDArray[np.float64]] = {}  # with feedback: strip -> see Quantized

    def expected_kl(self) -> float | None:
        """Nats a token that the errors of all strips, quantized before, cost to second order; None if nobody knows."""
        weights, found = self.weights, []
        if weights.feedback is None:
            return None
        for matrix in range(weights.matrices):
            row_weights = weights.feedback.row_weights(matrix)
            if row_weights is None:
                return None
            for tile_row in range(weights.tile_rows):
                index = matrix * weights.tile_rows + tile_row
                errors, steps = self._row_errors[index], self.steps[weights.strip_rows(index)]
                own = row_weights[tile_row * TILE_ROWS : tile_row * TILE_ROWS + len(errors)]
                found.append(float(np.sum(own * errors * np.square(steps, dtype=np.float64))))
        return math.fsum(found)

    def quantized_rows(self, index: int, rows: slice = slice(None)) -> Quantized:
        """A strip, or some of its groups of 32 rows."""
        values = np.ascontiguousarray(self.weights.values(index)[rows])
        steps = np.ascontiguousarray(self.steps[self.weights.strip_rows(index)][rows])
        feedback, element_bits = self.weights.feedback, self.layout.element_bits
        matrix = None if feedback is None else feedback.of_matrix(index // self.weights.tile_rows)
        assert matrix is None or isinstance(matrix, Feedback)  # of the coder that these strips are of
        if self.layout.quantizer == Quantizer.TRELLIS:
            return quantize_with_trellis(values, steps, element_bits, self.rounding, matrix)
        if matrix is None:
            return quantize(values, steps, element_bits, self.rounding)
        return quantize_with_feedback(values, steps, element_bits, self.rounding, matrix)

    def _quantized(self, index: int) -> Quantized:
        if index in self._kept:
            return self._kept[index]
        quantized = self.quantized_rows(index)
        if quantized.row_errors is not None:
            self._row_errors[index] = quantized.row_errors
        if self.weights.size <= _KEEP_ELEMENTS:
            self._kept[index] = quantized
        return quantized

    def strip(self, index: int) -> Strip:
        quantized = self._quantized(index)
        return Strip(quantized.elements, quantized.outliers)

    def count(self, header: BlobHeader, executor: ThreadPoolExecutor | None) -> QuantizedCounts:
        """Quantize all strips and count their symbols."""

        def work(index: int) -> tuple[npt.NDArray[np.int64], int, int, int]:
            strip = self._quantized(index)
            counts = count_strip(Strip(strip.elements), header.layout, header.tile_cols)
            return counts, len(strip.outliers), strip.dot, strip.energy

        strips = range(self.weights.num_strips)
        counts, outliers, dots, energies = zip(*map_ordered(work, strips, executor), strict=True)
        return QuantizedCounts(np.concatenate(counts), sum(outliers), sum(dots), sum(energies))


class Coder(NamedTuple):
    """Who quantizes strips, counts symbols and codes tiles: the CPU's, or others that give the same bytes.

    With feedback they give the same bytes on the same device alone. ``feedback_of`` makes of a second moment, f32
    [K, K], and of threads that share the work (``executor=``) what ``quantize`` takes for a matrix; ``keep_bytes`` is
    how much of that may be kept. ``feedback_device`` says what made it; None: the CPU, where it is the same everywhere.
    ``tensors_at_once`` may be coded by as many threads.
    """

    quantize: Callable[..., QuantizedStrips] = QuantizedStrips
    count_tiles: Callable[..., npt.NDArray[np.int64]] = count_tiles
    encode_strips: Callable[..., EncodedBlob] = encode_strips
    feedback_of: Callable[..., MatrixFeedback] = feedback_of
    keep_bytes: int = 1 << 30
    feedback_device: str | None = None
    tensors_at_once: int = 4

    def with_trellis(self) -> Coder:
        """The same, but that the CPU quantizes: no other has the trellis."""
        own = {name: getattr(self, name) for name in ("count_tiles", "encode_strips", "tensors_at_once")}
        return Coder()._replace(**own)


CPU_CODER = Coder()


def encode_lossless(
    weights: Matrices,
    dtype: str,
    tile_cols: int | None = None,
    layout_name: str = "auto",
    executor: ThreadPoolExecutor | None = None,
    coder: Coder = CPU_CODER,
) -> EncodedTensor:
    """Code the tensor's bits as they are; ``layout_name`` matters for I8 and U8 alone."""
    kind = LOSSLESS_KINDS[dtype]
    if kind.is_integer:
        layouts = integer_layouts("balanced" if layout_name == "auto" else layout_name, kind, 8)
    else:
        layouts = float_layouts(kind)

    def source(index: int) -> Strip:
        strip = np.ascontiguousarray(weights.strip(index))
        bits = strip.view(BIT_PATTERNS[strip.dtype.itemsize])
        if kind == ElementKind.SIGNED:
            return Strip(bits ^ np.uint8(128))
        if kind == ElementKind.UNSIGNED:
            return Strip(bits)
        return Strip(rotate_left(bits, FLOAT_ELEMENT_BITS[kind]))

    def estimate(layout: Layout) -> tuple[float, npt.NDArray[np.int64]]:
        header = weights.header(layout, tile_cols)
        counts = coder.count_tiles(header, source, executor=executor)
        return estimate_blob_bytes(header, counts, 0), counts

    candidates = [(*estimate(layout), layout) for layout in weights.choice(layouts)]
    size_bytes, counts, layout = min(candidates, key=lambda candidate: candidate[0])
    if kind.is_integer:
        most = size_bytes * (1 + QUICKER_COSTS_AT_MOST)
        _, counts, layout = next(candidate for candidate in candidates if candidate[0] <= most)
    blob = coder.encode_strips(weights.header(layout, tile_cols), source, tile_counts=counts, executor=executor)
    return EncodedTensor(blob, None, "lossless", layout, None)


@dataclass(frozen=True)
class Moments:
    """Sums over a tensor, in f64, that say what its noise is to be compared with.

    ``power`` is Σ w²; the others are Σ (w − mean)², with the mean of the tensor, of each row, or of each column.
    """

    power: float
    centred: float
    within_rows: float
    within_columns: float

    @property
    def reference(self) -> float:
        """What noise is measured against: the power, or less where a mean makes up much of it.

        The variance if the mean is at least 1 % of the power; the variance within rows, or within columns, if that
        is less than half. (By chance alone the means of K numbers have 1/K of their power.) What varies by less than
        rounding is constant, and no reference.
        """
        candidates = [self.power]
        candidates += [self.centred] * (self.centred <= 0.99 * self.power)
        candidates += [value for value in (self.within_rows, self.within_columns) if value < 0.5 * self.power]
        return min(value for value in candidates if value > _CONSTANT * self.power or value is self.power)


def _moments_of(weights: Matrices, power: float, row_energy: float, column_sums: npt.NDArray[np.float64]) -> Moments:
    """``column_sums`` are f64 [strips, cols]."""
    by_matrix = column_sums.reshape(weights.matrices, weights.tile_rows, weights.cols).sum(axis=1)
    enough_rows = weights.rows >= _MEANS_OF_AT_LEAST
    enough_cols = weights.cols >= _MEANS_OF_AT_LEAST
    return Moments(
        power=power,
        centred=power - float(column_sums.sum()) ** 2 / weights.size,
        within_rows=power - row_energy / weights.cols if enough_cols else power,
        within_columns=power - float(np.square(by_matrix).sum()) / weights.rows if enough_rows else power,
    )


def _encode_quantized(
    weights: Matrices,
    header: BlobHeader,
    counts: npt.NDArray[np.int64],
    quantized: QuantizedStrips,
    scales: npt.NDArray[np.float32],
    method: str,
    executor: ThreadPoolExecutor | None,
    coder: Coder,
) -> EncodedTensor:
    """The last pass: encode the elements and measure the noise of what they decode to.

    Raises:
        NotEncodableError: a finite weight would decode to infinity.
    """
    half = 1 << (header.layout.integer_bits - 1)
    sums: list[tuple[float, float]] = [(0.0, 0.0)] * weights.num_strips
    row_energies = [0.0] * weights.num_strips
    column_sums = np.zeros((weights.num_strips, weights.cols))
    largest = np.zeros(weights.num_strips, np.float32)
    by_row = np.broadcast_to(scales, weights.matrices * weights.rows)
    is_trellis = header.layout.quantizer == Quantizer.TRELLIS

    def source(index: int) -> Strip:
        strip = quantized.strip(index)
        *pair, row_energies[index], largest[index] = strip_noise(
            as_float32(weights.strip(index)),
            unsigned_integers(strip.elements) if is_trellis else strip.elements,
            half,
            np.ascontiguousarray(by_row[weights.strip_rows(index)]),
            weights.strip_row_offsets(index),
            weights.strip_column_scales(index),
            strip.outliers,
            column_sums[index],
        )
        sums[index] = pair[0], pair[1]
        return Strip(strip.elements, strip.outliers)

    blob = coder.encode_strips(header, source, tile_counts=counts, executor=executor)
    with np.errstate(over="ignore"):
        as_stored = largest.astype(weights.dtype)  # fp16 ends at 65504
    if not (all(math.isfinite(noise) for noise, _ in sums) and np.isfinite(as_stored).all()):
        name = str(as_stored.dtype).replace("bfloat", "bf").replace("float", "fp")
        raise NotEncodableError(f"values near the end of the {name} range: some would decode to infinity")
    against_power = noise_db(sums)
    against_variance = centred = None
    power = math.fsum(signal for _, signal in sums)
    if against_power is not None:
        moments = _moments_of(weights, power, math.fsum(row_energies), column_sums)
        if moments.reference < power:
            against_variance = against_power + 10 * math.log10(power / moments.reference)
            centred = against_power + 10 * math.log10(power / max(moments.centred, moments.reference))
    return EncodedTensor(
        blob,
        scales,
        method,
        header.layout,
        against_power,
        against_variance,
        centred,
        column_scales=weights.column_scales,
        row_offsets=weights.row_offsets,
        expected_kl=quantized.expected_kl(),
        feedback_device=None if weights.feedback is None else coder.feedback_device,
    )


def noise_db(sums: list[tuple[float, float]]) -> float | None:
    """10·log10(Σ noise / Σ signal) of (noise, signal) pairs, None where that is not finite."""
    noise, signal = (math.fsum(values) for values in zip(*sums, strict=True))
    if not (noise > 0 and signal > 0 and math.isfinite(noise) and math.isfinite(signal)):
        return None
    return 10 * math.log10(noise / signal)


@dataclass(frozen=True)
class _Counted:
    """A pass over a tensor: its strips, histograms, outliers, and the least-squares scales over the steps."""

    strips: QuantizedStrips
    counts: npt.NDArray[np.int64]
    outliers: int
    scale_per_step: float
    size_bytes: float


def _count_quantized(
    header: BlobHeader,
    strips: QuantizedStrips,
    executor: ThreadPoolExecutor | None,
) -> _Counted:
    counts = strips.count(header, executor)
    # The scale that minimises Σ (w/step − s·q)², from integer sums: the centroid idea at no cost to a decoder.
    scale_per_step = counts.dot / FIXED_POINT / counts.energy if counts.energy else 1.0
    size = estimate_blob_bytes(header, counts.tiles, counts.outliers)
    size += strips.own_steps.nbytes + strips.weights.vector_bytes
    return _Counted(strips, counts.tiles, counts.outliers, scale_per_step, size)


class _Spread(NamedTuple):
    """rms, mean and number of the values within a limit, number of those not zero; the largest magnitude of all."""

    rms: float
    mean: float
    within: int
    nonzero: int
    largest: float


def _moments(weights: Matrices, limit: float, executor: ThreadPoolExecutor | None) -> _Spread:
    """The spread of the values within ``limit``.

    Raises:
        NotEncodableError: values that are not finite.
    """

    def work(index: int) -> tuple[float, float, int, int, float, int]:
        return strip_moments(weights.one_step_values(index), np.float32(limit))  # type: ignore[no-any-return]

    energies, totals, within, nonzero, largest, strange = zip(
        *map_ordered(work, range(weights.num_strips), executor), strict=True
    )
    if sum(strange):
        raise NotEncodableError(f"{sum(strange)} values are NaN or infinite")
    number = max(1, sum(within))
    rms = math.sqrt(math.fsum(energies) / number)
    return _Spread(rms, math.fsum(totals) / number, number, sum(nonzero), float(max(largest)))


def measure(weights: Matrices, executor: ThreadPoolExecutor | None = None) -> FineHistogram:
    """The fine histogram of a float tensor, made once: see :func:`_measure`."""
    if weights.measured is None:
        weights.measured = _measure(weights, executor)
    return weights.measured


def _measure(weights: Matrices, executor: ThreadPoolExecutor | None) -> FineHistogram:
    """The fine histogram of a float tensor, in units of its rms without values beyond 16 times that.

    (A single huge value would otherwise set the unit, and every other weight would be rounded to zero.)

    Raises:
        NotEncodableError: values that are not finite, or too small for a step.
    """
    everything = spread = _moments(weights, math.inf, executor)
    largest = everything.largest
    for _ in range(_TRIMMING_ROUNDS):
        if largest <= _TRIM_AT_RMS * spread.rms:
            break
        trimmed = _moments(weights, _TRIM_AT_RMS * spread.rms, executor)
        if trimmed.rms > 0.99 * spread.rms or trimmed.nonzero < _TRIM_TO_AT_LEAST * everything.nonzero:
            break
        spread = trimmed
    rms, mean = spread.rms, spread.mean
    sparse = 0 < spread.nonzero < _MOSTLY_NOT_ZERO * spread.within
    if sparse:
        # Zeros cost next to nothing: a sparse tensor's unit is that of its other values.
        rms *= math.sqrt(spread.within / spread.nonzero)
        mean *= spread.within / spread.nonzero
    if rms == 0:
        return FineHistogram(np.zeros(FINE_BINS, np.int64), 0.0, 0.0)
    if rms < _TINY * 2**24:
        raise NotEncodableError(f"values near the end of the fp32 range (rms {rms:.3g})")
    few = distinct_values(weights.one_step_values(index) for index in range(weights.num_strips))
    if few is not None:
        values, counts = few
        return FineHistogram(counts, rms, largest, mean, values.astype(np.float64), grid_step(values), 0.0)
    per_width = np.float32(FINE_BINS_PER_RMS / rms)

    def count(index: int) -> npt.NDArray[np.int64]:
        histogram = np.zeros(FINE_BINS, np.int64)
        count_values(weights.one_step_values(index), per_width, histogram)
        return histogram

    counts = np.zeros(FINE_BINS, np.int64)
    for histogram in map_ordered(count, range(weights.num_strips), executor):
        counts += histogram
    # A value that is there thousands of times is off by its place between two steps, not by their mean error.
    spiked = max(counts[: FINE_BINS // 2 - 1].max(), counts[FINE_BINS // 2 + 1 :].max()) > _SPIKE_AT * weights.size
    return FineHistogram(counts, rms, largest, mean, uneven=sparse or bool(spiked))


def _check_reach(header: BlobHeader, fine: FineHistogram, plan: RatePlan) -> None:
    most = header.max_outlier_steps
    if fine.largest / plan.step > most:
        raise NotEncodableError(f"the largest value ({fine.largest:.3g}) is more than {most} steps of {plan.step:.3g}")


def _run_plan(
    weights: Matrices,
    fine: FineHistogram,
    plan: RatePlan,
    tile_cols: int | None,
    executor: ThreadPoolExecutor | None,
    coder: Coder,
) -> _Counted:
    header = weights.header(plan.layout, tile_cols)
    _check_reach(header, fine, plan)
    strips = coder.quantize(weights, weights.row_steps(plan.step), plan.layout, plan.rounding)
    return _count_quantized(header, strips, executor)


def _sampled_groups(weights: Matrices) -> list[tuple[int, slice]]:
    """Groups of 32 rows, each by its strip and its rows there, evenly spread; all of a small tensor."""
    per_strip = ceil_div(TILE_ROWS, GROUP_LANES)
    last = ceil_div(weights.rows - (weights.tile_rows - 1) * TILE_ROWS, GROUP_LANES)
    per_matrix = (weights.tile_rows - 1) * per_strip + last
    groups = weights.matrices * per_matrix
    count = min(groups, max(_SAMPLED_GROUPS, ceil_div(_SAMPLED_WEIGHTS, GROUP_LANES * weights.cols)))
    found = []
    for sample in range(count):
        matrix, group = divmod((2 * sample + 1) * groups // (2 * count), per_matrix)
        tile_row, own = divmod(group, per_strip)
        rows = slice(own * GROUP_LANES, (own + 1) * GROUP_LANES)
        found.append((matrix * weights.tile_rows + tile_row, rows))
    return found


def try_plan(
    weights: Matrices, fine: FineHistogram, plan: RatePlan, tile_cols: int | None, executor: ThreadPoolExecutor | None
) -> Estimate:
    """What a plan takes and leaves, by a sample of the rows: infinities where a value is too far from the others.

    What a trellis leaves depends on its paths, and what feedback adds on the inputs: histograms know neither. Noise is
    in a unit of the tensor; with feedback it is that at the outputs.
    """
    layout = plan.layout
    header = weights.header(layout, tile_cols)
    try:
        _check_reach(header, fine, plan)
        steps_of_all = weights.row_steps(plan.step)
    except NotEncodableError:
        return Estimate(math.inf, math.inf)
    strips = QuantizedStrips(weights, steps_of_all, layout, plan.rounding)
    groups = _sampled_groups(weights)
    found = list(map_ordered(lambda group: strips.quantized_rows(*group), groups, executor))
    elements = np.concatenate([own.elements.reshape(-1) for own in found])
    codes = np.bincount(layout.codes(elements), minlength=1 << layout.code_bits)
    outliers = sum(len(own.outliers) for own in found) / len(elements)
    bits = estimated_bits(codes, outliers, layout, fixed_bits_per_weight(header))
    # In steps, and rows count alike, whatever they weigh: the few that weigh most would decide, by chance.
    noise = 0.0
    for (index, rows), own in zip(groups, found, strict=True):
        if own.row_errors is not None:
            noise += float(own.row_errors.sum())
            continue
        steps = strips.steps[weights.strip_rows(index)][rows].astype(np.float64)
        noise += float(np.square(weights.values(index)[rows] / steps[:, None]).sum())
    energy = sum(own.energy for own in found)
    if energy:  # that was the power: the least-squares scale leaves so much less
        integer_parts = 1 << (TRELLIS_EXTRA_BITS if layout.quantizer == Quantizer.TRELLIS else 0)
        dot = sum(own.dot for own in found) / FIXED_POINT / integer_parts
        noise -= dot * dot / energy
    return Estimate(bits, noise * plan.step**2)


def _finish(
    weights: Matrices,
    fine: FineHistogram,
    plan: RatePlan,
    counted: _Counted,
    tile_cols: int | None,
    executor: ThreadPoolExecutor | None,
    coder: Coder,
) -> EncodedTensor:
    header = weights.header(plan.layout, tile_cols)
    # Multiples of the grid's step are exact with that scale alone.
    scale_per_step = 1.0 if plan.step == fine.grid_step else counted.scale_per_step
    steps = counted.strips.own_steps.astype(np.float64) * scale_per_step
    method = "uniform"
    if plan.layout.quantizer == Quantizer.TRELLIS:
        steps, method = steps / (1 << TRELLIS_EXTRA_BITS), "trellis"
    scales = steps.astype(np.float32)
    return _encode_quantized(weights, header, counted.counts, counted.strips, scales, method, executor, coder)


def _check_noise(
    weights: Matrices,
    fine: FineHistogram,
    plan: RatePlan,
    encoded: EncodedTensor,
    bits: float,
    tile_cols: int | None,
) -> None:
    """Check that ``bits`` bits a weight went into weights, not into means, outliers or overhead.

    Raises:
        NotEncodableError: into means, or into outliers: a step that holds these is too coarse for the others.
        RateOutOfReachError: into overhead.
    """
    if encoded.noise_db is None:
        return
    spread_db = _spread_db(weights, plan, encoded)
    _check_offset(fine, encoded, bits, spread_db)
    achieved = 8 * encoded.size_bytes / weights.size
    too_noisy = encoded.noise_db - spread_db > _most_noise_db(bits)
    too_coarse = too_noisy or _planned_db(plan) > _most_noise_db(min(bits, achieved))
    most = weights.header(plan.layout, tile_cols).max_outlier_steps
    if too_coarse and fine.largest >= _AT_THE_LIMIT * most * plan.step:
        raise NotEncodableError(
            f"the largest value ({fine.largest:.3g}) is more than {most} steps of any that suits the others "
            f"(rms {fine.rms:.3g})"
        )
    if too_noisy:
        raise RateOutOfReachError(f"overhead leaves too little of {bits} bits a weight")


def _spread_db(weights: Matrices, plan: RatePlan, encoded: EncodedTensor) -> float:
    """By how much row factors or feedback make a tensor noisier than the plan knows: on purpose.

    With feedback errors are small at the outputs, and the larger in weights.
    """
    if (weights.row_factors is None and weights.feedback is None) or encoded.noise_db is None:
        return 0.0
    return max(0.0, encoded.noise_db - _planned_db(plan))


def _planned_db(plan: RatePlan) -> float:
    return 10 * math.log10(max(plan.predicted.noise, _TINY))


def _check_offset(fine: FineHistogram, encoded: EncodedTensor, bits: float, spread_db: float) -> None:
    """Check that the means of the tensor, its rows or its columns have not eaten the rate.

    An entropy-coded uniform quantizer around the mean has 1.53 − 6.02·bits dB, and ``spread_db`` more where rows have
    unlike steps, or errors are fed back. Rows and columns whose means are far apart may cost two bits.

    Raises:
        NotEncodableError: they have.
    """
    plain_db = 1.53 - 6.02 * (bits - 0.2)
    for noise, tolerance_db in (
        (encoded.centred_noise_db, _PLAIN_TOLERANCE_DB),
        (encoded.variance_noise_db, _MEANS_TOLERANCE_DB),
    ):
        if noise is not None and noise - spread_db > min(-1.0, plain_db + tolerance_db):
            raise NotEncodableError(
                f"far from zero for their spread (mean {fine.mean:.3g}, deviation {fine.deviation:.3g}): "
                f"noise would be {noise:.1f} dB of the variance"
            )


def _encode_zeros(
    weights: Matrices, tile_cols: int | None, executor: ThreadPoolExecutor | None, coder: Coder
) -> EncodedTensor:
    layout = integer_layout("balanced", ElementKind.SIGNED, 2)  # of which nothing is raw
    strips = coder.quantize(weights, np.zeros(1, np.float32), layout, NEAREST)
    header = weights.header(layout, tile_cols)
    counted = _count_quantized(header, strips, executor)
    scales = np.zeros(1, np.float32)
    return _encode_quantized(weights, header, counted.counts, strips, scales, "uniform", executor, coder)


def _most_noise_db(bits: float) -> float:
    """Noise above which a rate is too low for a tensor: it goes into lanes and tiles rather than into weights.

    A Gaussian, the worst case, has 1.53 − 6.02·bits dB; narrow tensors may fall behind by 1.5 bits.
    """
    return min(-1.0, 1.53 - 6.02 * (bits - 1.5))


def encode_at_bits(
    weights: Matrices,
    bits: float,
    *,
    worth_bits: float | None = None,
    layout_name: str = "auto",
    tile_cols: int | None = None,
    executor: ThreadPoolExecutor | None = None,
    coder: Coder = CPU_CODER,
) -> EncodedTensor:
    """Quantize with one step so that the tensor takes at most ``bits`` bits a weight, everything counted.

    Args:
        worth_bits: the rate of which the noise must be worthy; ``bits`` by default.

    Raises:
        NotEncodableError: see :func:`measure`, or the values are too far from zero, or from one another.
        RateOutOfReachError: the rate is not far above what the tensor's overhead takes.
    """
    worth_bits = worth_bits or bits
    fine = measure(weights, executor)
    if fine.rms == 0:
        return _encode_zeros(weights, tile_cols, executor, coder)
    if fine.tells_values_apart(worth_bits):
        # What was quantized before is coded nearly as it is; errors fed back would put weights between its values.
        weights.feedback, weights.rate_weight = None, LAMBDA
    blob_bits = bits - weights.bits_beside
    quantizers = quantizers_at(weights.quantizer, blob_bits, fed_back=weights.feedback is not None)
    if not fine.is_smooth:
        layouts = weights.choice(candidate_layouts(layout_name, blob_bits, fine))
        headers = {layout: weights.header(layout, tile_cols) for layout in layouts}
        return _encode_from_ladder(weights, fine, bits, worth_bits, headers, tile_cols, executor, coder)
    of_quantizer = [
        _headers_of(weights, fine, blob_bits, layout_name, quantizer, tile_cols) for quantizer in quantizers
    ]
    target_bits = bits - _RATE_TOLERANCE_BITS / 2
    aim = target_bits - weights.bits_beside
    headers = of_quantizer[0]
    if len(of_quantizer) > 1:
        headers = min(of_quantizer, key=lambda own: _noise_at_bits(weights, fine, aim, own, tile_cols, executor))
    layouts = list(headers)
    best: tuple[RatePlan, _Counted] | None = None
    below = above = None  # (aim, bits over the target) of the nearest trials
    for attempt in range(_MAX_CORRECTIONS):
        plan = plan_for_bits(fine, aim, layouts, headers, weights.rate_weight)
        counted = _run_plan(weights, fine, plan, tile_cols, executor, coder)
        achieved = 8 * counted.size_bytes / weights.size
        if achieved <= bits and (best is None or counted.size_bytes > best[1].size_bytes):
            best = plan, counted
        excess = achieved - target_bits
        if abs(excess) <= _RATE_TOLERANCE_BITS / 2:
            break
        if attempt == 0 and abs(excess) > _PREDICTION_IS_OFF_BY_BITS:
            aim -= excess  # what neighbours share makes symbols shorter, of whichever layout: choose once more
            continue
        layouts = [plan.layout]
        below, above = ((aim, excess), above) if excess < 0 else (below, (aim, excess))
        if below is None or above is None:
            # The histogram's prediction is off by nearly the same amount at a neighbouring step.
            aim -= excess
        else:
            share = below[1] / (below[1] - above[1])
            aim = below[0] + min(0.9, max(0.1, share)) * (above[0] - below[0])
    for attempt in range(_MAX_CORRECTIONS):
        if best is not None:
            encoded = _finish(weights, fine, *best, tile_cols, executor, coder)
            excess = 8 * encoded.size_bytes / weights.size - bits
            if excess <= 0:
                _check_noise(weights, fine, best[0], encoded, worth_bits, tile_cols)
                return encoded
        else:
            excess = 0.02
        # The exact size is above the estimate, or no estimate was low enough: aim lower, by more each time.
        aim -= 2 * excess + attempt * _RATE_TOLERANCE_BITS / 2
        plan = plan_for_bits(fine, aim, layouts, headers, weights.rate_weight)
        best = plan, _run_plan(weights, fine, plan, tile_cols, executor, coder)
    raise RateOutOfReachError(f"{bits} bits a weight are not reached: the tensor's overhead is too large")


def _headers_of(
    weights: Matrices, fine: FineHistogram, bits: float, layout_name: str, quantizer: Quantizer, tile_cols: int | None
) -> dict[Layout, BlobHeader]:
    """The layouts of a quantizer that a smooth tensor may have at a rate, with their headers."""

    def headers_of(layouts: Sequence[Layout]) -> dict[Layout, BlobHeader]:
        return {layout: weights.header(layout, tile_cols) for layout in weights.choice(layouts)}

    headers = headers_of(candidate_layouts(layout_name, bits, fine, quantizer))
    layouts = list(headers)
    others = [
        *layouts_for_idle_lanes(headers),
        *raw_layouts(layouts, bits, headers),
        *layouts_that_lose_less(fine, bits, layouts, headers),
    ]
    return headers_of(list(dict.fromkeys(layouts + others)))


def _noise_at_bits(
    weights: Matrices,
    fine: FineHistogram,
    bits: float,
    headers: dict[Layout, BlobHeader],
    tile_cols: int | None,
    executor: ThreadPoolExecutor | None,
) -> float:
    """What a quantizer's plan for a rate leaves at it, by a sample of the rows: see :func:`try_plan`."""
    aim = bits
    for trial in range(_MAX_TRIALS):
        plan = plan_for_bits(fine, aim, list(headers), headers, weights.rate_weight)
        tried = try_plan(weights, fine, plan, tile_cols, executor)
        excess = tried.bits - bits
        if abs(excess) <= _TRIAL_IS_OFF_BY_BITS or math.isinf(excess) or trial == _MAX_TRIALS - 1:
            break
        aim -= excess
    # Bits that no plan makes use of gain nothing.
    return replace(tried, bits=max(tried.bits, bits - _TRIAL_IS_OFF_BY_BITS)).noise_at_equal_bits


def _encode_from_ladder(
    weights: Matrices,
    fine: FineHistogram,
    bits: float,
    worth_bits: float,
    headers: dict[Layout, BlobHeader],
    tile_cols: int | None,
    executor: ThreadPoolExecutor | None,
    coder: Coder,
) -> EncodedTensor:
    """:func:`encode_at_bits` where the rate is no smooth function of the step: the quietest plan that fits it."""
    tried = 0
    excess = weights.bits_beside - _PREDICTION_IS_OFF_BY_BITS
    plans = plan_ladder(fine, headers, headers)
    if weights.feedback is not None:
        plans = _from_about_the_rate(weights, plans, bits, tile_cols, fine, executor, coder)
        excess = -math.inf  # it has been counted
    for plan in plans:
        if plan.predicted.bits + excess > bits:
            continue
        counted = _run_plan(weights, fine, plan, tile_cols, executor, coder)
        if 8 * counted.size_bytes <= (bits + _RATE_TOLERANCE_BITS) * weights.size:
            encoded = _finish(weights, fine, plan, counted, tile_cols, executor, coder)
            if 8 * encoded.size_bytes <= bits * weights.size:
                _check_noise(weights, fine, plan, encoded, worth_bits, tile_cols)
                return encoded
        if weights.feedback is None:
            # What a prediction is off by is nearly the same for the next plan.
            excess = 0.9 * (8 * counted.size_bytes / weights.size - plan.predicted.bits)
        tried += 1
        if tried == _MAX_TRIED:
            break
    raise RateOutOfReachError(f"{bits} bits a weight are not reached: the tensor's overhead is too large")


def _from_about_the_rate(
    weights: Matrices,
    plans: list[RatePlan],
    bits: float,
    tile_cols: int | None,
    fine: FineHistogram,
    executor: ThreadPoolExecutor | None,
    coder: Coder,
) -> list[RatePlan]:
    """A plan for each step of a ladder, from about the first one that fits a rate on.

    With feedback weights are rounded towards values that lie between the few that they have themselves. So what their
    histogram predicts is too low by up to a bit, by more for some steps than for others; what counts of symbols say
    falls with the step.
    """
    of_step: dict[float, list[RatePlan]] = {}
    for plan in plans:
        of_step.setdefault(plan.step, []).append(plan)

    def cost(plan: RatePlan) -> float:
        return plan.predicted.noise + LAMBDA * (plan.step / fine.rms) ** 2 * plan.predicted.bits

    def fits(plan: RatePlan) -> bool:
        counted = _run_plan(weights, fine, plan, tile_cols, executor, coder)
        return 8 * counted.size_bytes <= (bits + _RATE_TOLERANCE_BITS) * weights.size

    by_step = [min(of_step[step], key=cost) for step in sorted(of_step)]
    return by_step[bisect.bisect_left(by_step, True, key=fits) :]


def _eight_bit_layouts(layout_name: str) -> list[Layout]:
    """What integers of 8 bits, whose step is given, may be stored as: quickest first."""
    names = ("fast", "balanced") if layout_name == "auto" else (layout_name,)
    return [layout for name in names for layout in integer_layouts(name, ElementKind.SIGNED, 8)]


def encode_near_lossless(
    weights: Matrices,
    *,
    layout_name: str = "auto",
    tile_cols: int | None = None,
    executor: ThreadPoolExecutor | None = None,
    coder: Coder = CPU_CODER,
) -> EncodedTensor:
    """Quantize with one step so that the noise is NEAR_LOSSLESS_DB of the variance, whatever rate that takes.

    The variance is that of the values within 16 times its root: a column a hundred times larger than the others, whose
    values are outliers, does not make these coarser.

    Raises:
        NotEncodableError: see :func:`measure`, or values too far from one another, or from zero, for such a step.
    """
    fine = measure(weights, executor)
    if fine.rms == 0:
        return _encode_zeros(weights, tile_cols, executor, coder)
    try:
        return _encode_near_lossless(weights, fine, layout_name, tile_cols, executor, coder)
    except NotEncodableError:
        # Outliers of shorter tiles reach further.
        shorter: int | None = 1 << OUTLIER_LEAST_COL_BITS
        if weights.column_parts > 1:
            shorter = dividing_tile_cols(weights.cols // weights.column_parts, 1 << OUTLIER_LEAST_COL_BITS)
        if shorter is None or tile_cols is not None or weights.cols <= shorter:
            raise
        return _encode_near_lossless(weights, fine, layout_name, shorter, executor, coder)


def _encode_near_lossless(
    weights: Matrices,
    fine: FineHistogram,
    layout_name: str,
    tile_cols: int | None,
    executor: ThreadPoolExecutor | None,
    coder: Coder,
) -> EncodedTensor:
    possible = _eight_bit_layouts(layout_name) if fine.is_smooth else candidate_layouts(layout_name, 8.0, fine)
    layouts = weights.choice(possible)
    headers = {layout: weights.header(layout, tile_cols) for layout in layouts}
    aim_db = NEAR_LOSSLESS_DB
    for _ in range(_MAX_CORRECTIONS):
        plan = plan_for_noise(fine, 10 ** (aim_db / 10), layouts, headers)
        if fine.is_smooth:
            most = plan.predicted.bits * (1 + QUICKER_COSTS_AT_MOST)
            quicker = (
                plan_at_step(fine, plan.step, layout, fixed_bits_per_weight(headers[layout]), LAMBDA)
                for layout in layouts[: layouts.index(plan.layout)]
                if fine.largest <= headers[layout].max_outlier_steps * plan.step
            )
            plan = next((trial for trial in quicker if trial.predicted.bits <= most), plan)
        counted = _run_plan(weights, fine, plan, tile_cols, executor, coder)
        encoded = _finish(weights, fine, plan, counted, tile_cols, executor, coder)
        noise = encoded.noise_db if encoded.variance_noise_db is None else encoded.variance_noise_db
        if noise is None or noise <= NEAR_LOSSLESS_DB + _NOISE_TOLERANCE_DB:
            # Where the largest value sets the step, the others' noise is beyond what all of them have on average.
            most_steps = headers[plan.layout].max_outlier_steps
            if fine.largest < _AT_THE_LIMIT * most_steps * plan.step:
                return encoded
            if 10 * math.log10(plan.predicted.noise) <= aim_db + _NOISE_TOLERANCE_DB:
                return encoded
            break
        aim_db -= noise - NEAR_LOSSLESS_DB
    raise NotEncodableError(f"no step that holds all values reaches {NEAR_LOSSLESS_DB} dB of the variance")


def plan_at_common_step(
    weights: Matrices, fine: FineHistogram, step: float, layout_name: str, tile_cols: int | None
) -> RatePlan:
    """How to store this tensor if the whole model has one step."""
    name = "balanced" if layout_name == "auto" else layout_name

    def best(layouts: list[Layout]) -> RatePlan:
        headers = {layout: weights.header(layout, tile_cols) for layout in layouts}
        return plan_for_step(fine, step, layouts, headers, weights.rate_weight)

    scalar = [layout for n in range(2, 9) for layout in layouts_at(name, n, 0.0)]
    if weights.quantizer == Quantizer.SCALAR or not fine.is_smooth:
        return best(scalar)
    widths = range(2, TRELLIS_MAX_ELEMENT_BITS + 1)
    trellis = [layout for n in widths for layout in layouts_at(name, n, 0.0, weights.quantizer)]
    plan = best(trellis + [layout for layout in scalar if layout.element_bits > TRELLIS_MAX_ELEMENT_BITS])
    quantizers = quantizers_at(weights.quantizer, plan.predicted.bits, fed_back=weights.feedback is not None)
    return plan if Quantizer.TRELLIS in quantizers else best(trellis + scalar)


def plan_in_layout(
    weights: Matrices, fine: FineHistogram, step: float, layout: Layout, tile_cols: int | None
) -> RatePlan:
    """What :func:`plan_at_common_step` gave, from the step and the layout that it has."""
    return plan_for_step(fine, step, [layout], {layout: weights.header(layout, tile_cols)}, weights.rate_weight)


def planned_bytes(
    weights: Matrices,
    fine: FineHistogram,
    plan: RatePlan,
    tile_cols: int | None,
    executor: ThreadPoolExecutor | None,
    coder: Coder = CPU_CODER,
) -> float:
    """What a plan takes, from a count of the real symbols (blob and scale)."""
    return _run_plan(weights, fine, plan, tile_cols, executor, coder).size_bytes


def encode_plan(
    weights: Matrices,
    fine: FineHistogram,
    plan: RatePlan,
    *,
    tile_cols: int | None = None,
    executor: ThreadPoolExecutor | None = None,
    coder: Coder = CPU_CODER,
) -> EncodedTensor:
    """Quantize and code as planned.

    Raises:
        NotEncodableError: the step is so small that a value exceeds what an outlier can hold.
    """
    counted = _run_plan(weights, fine, plan, tile_cols, executor, coder)
    encoded = _finish(weights, fine, plan, counted, tile_cols, executor, coder)
    _check_offset(fine, encoded, 8 * encoded.size_bytes / weights.size, _spread_db(weights, plan, encoded))
    return encoded


def encode_int8_rows(
    weights: Matrices,
    *,
    layout_name: str = "auto",
    tile_cols: int | None = None,
    executor: ThreadPoolExecutor | None = None,
    coder: Coder = CPU_CODER,
) -> EncodedTensor:
    """INT8 with a scale of max |w|/127 for each row. Rows of zeros get scale 0.

    Raises:
        NotEncodableError: values that are not finite, or a row whose scale would be denormal.
    """
    absmax = np.empty(weights.matrices * weights.rows, np.float32)

    def work(index: int) -> None:
        row_absmax(weights.values(index), absmax[weights.strip_rows(index)])

    for _ in map_ordered(work, range(weights.num_strips), executor):
        pass
    _moments(weights, math.inf, executor)
    scales: npt.NDArray[np.float32] = np.divide(absmax, np.float32(127), dtype=np.float32)
    tiny = int(np.count_nonzero((absmax > 0) & (scales < _TINY)))
    if tiny:
        raise NotEncodableError(f"{tiny} rows have values near the end of the fp32 range")
    layouts = weights.choice(_eight_bit_layouts(layout_name))
    strips = coder.quantize(weights, scales, layouts[0], NEAREST)
    headers = [weights.header(layout, tile_cols) for layout in layouts]
    trials = [(header, _count_quantized(header, strips, executor)) for header in headers]
    most = min(trial.size_bytes for _, trial in trials) * (1 + QUICKER_COSTS_AT_MOST)
    header, counted = next(pair for pair in trials if pair[1].size_bytes <= most)
    return _encode_quantized(weights, header, counted.counts, strips, scales, "int8-row", executor, coder)
