"""Which step, layout and thresholds give a tensor the rate that was asked for (``--bits R``).

A histogram of the weights in 8,192 fine bins stands in for the tensor: from it the integer histogram of any step
follows in microseconds, and from that the rate (entropy of the codes, raw bits, outliers, every fixed overhead)
and the squared error. The step found so is then corrected by passes over the real weights that count real symbols.

Rate-distortion-optimised rounding: with an order-0 coder the choice between k and k+1 depends on their code lengths
alone, so optimal rounding is a threshold for each k (entropy-constrained scalar quantization: Chou, Lookabaugh
and Gray 1989; Sullivan 1996). λ is in squared steps a bit; 2·ln 2/12 = 0.1155 is the slope of the rate-distortion
curve at high rate.

Two kinds of tensor are no Gaussian around zero and are planned otherwise. In narrow ones lanes cost more than entropy
coding gains: tiles in mode raw, of a fixed width, are planned for too. Of few distinct values, or values far from zero,
the rate is no smooth function of the step: a ladder of steps is tried, and layouts of more codes.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kvpack.encode.frequencies import entropy_bits
from kvpack.encode.quantize import NEAREST, NUM_THRESHOLDS, Rounding
from kvpack.encode.rate_sums import place_bins, rate_thresholds
from kvpack.format.header import HEADER_BYTES, TILE_METADATA_BYTES, BlobHeader
from kvpack.format.layout import (
    CHUNK_COLS,
    LAYOUT_NAMES,
    OUTLIER_BYTES,
    TRELLIS_MAX_ELEMENT_BITS,
    ElementKind,
    Layout,
    Quantizer,
    integer_layout,
    integer_layouts,
)

LAMBDA = 0.1155
FINE_BINS = 8192
FINE_BINS_PER_RMS = 256
# An entropy-coded Gaussian of this many bits has about rms/step = 2^(bits − 2.05).
_GAUSSIAN_BITS = 2.05
_TYPICAL_TABLE_BYTES = 150
# Of a trellis (FORMAT.md §4.1): where its grids lie between neighbouring elements, how much less noise it leaves than
# rounding to one of them, and up to which rate its elements are wide enough. It has no zero: at low rates the weights
# near it are noisier than if they were rounded, which columns of small weights and large inputs mind unless errors are
# fed back.
_GRID_OFFSETS = (0.25, 0.75)
_TRELLIS_NOISE = 10**-0.08
_TRELLIS_UP_TO_BITS = 5.25
_TRELLIS_WITHOUT_FEEDBACK_FROM_BITS = 2.25
# Lanes that cost more bits a weight than this may lose to tiles in mode raw.
_RAW_MAY_WIN_AT = 0.2
# Squared mean over variance from which on a tensor counts as far from zero.
_OFFSET_MATTERS_AT = 0.25
# By how much coarser steps are tried where a layout's range is too narrow for finer ones.
_COARSER = 2.0 ** (1 / 16)
# Steps tried where the rate is no smooth function of them: from four deviations downwards, 16 an octave.
_LADDER_OCTAVES = (2.0, -8.5)
_LADDER_STEPS_PER_OCTAVE = 16
# A tensor of no more elements is mostly overhead: it is planned in milliseconds, by fewer steps.
SMALL_ELEMENTS = 4096
_SMALL_STEPS_PER_OCTAVE = 4
# Bits that the entropy of few distinct values may be above a rate.
_VALUES_NEARLY_FIT = 0.25
# A rate that a layout leaves so much of is not what limits it; noises of this ratio are equal.
_RATE_IS_SLACK_AT = 0.05
_EQUAL_NOISE = 1.01
# Bits a weight of raw planes of lanes without a row from which another layout is tried.
_IDLE_PLANES_MATTER_AT = 0.05
# Folded codes above two raw bits lose 0.08 bit, at 3 bits a weight 13 % more KL; above this rate speed counts for more.
_FOLDED_LOSES_UP_TO_BITS = 3.2
_FOLDED_LOSES_AT = 4  # bits of an element
# How far, in octaves, steps stay above the one by which the largest value has the largest magnitude.
_ABOVE_LIMIT = 0.001


# Those of :class:`FineHistogram` that are no arrays, nor found from the others.
_NUMBERS_OF_HISTOGRAMS = ("rms", "largest", "mean", "grid_step", "width", "uneven")


def _packed_array(array: npt.NDArray[Any]) -> str:
    return base64.b64encode(zlib.compress(array.tobytes(), 1)).decode()


def _unpacked_array(text: str, dtype: type[np.generic]) -> npt.NDArray[Any]:
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype)


@dataclass(frozen=True)
class FineHistogram:
    """The weights of a tensor in bins of rms/256 around 0 (i64 [8192]); ``largest`` is max |w|.

    Attributes:
        mean: of the values that ``rms`` is of.
        values: f64, sorted: the distinct values, where they are few; ``counts`` then counts these.
        grid_step: f32: the step of which all ``values`` are exact multiples of −128 … 127; 0.0 if there is none.
        width: of the bins; None: rms/256.
        uneven: many values are equal. If many are 0, ``rms`` and ``mean`` are those of the others.
        ladders: those that :func:`plan_ladder` has made: other rates need the same ones.
    """

    counts: npt.NDArray[np.int64]
    rms: float
    largest: float
    mean: float = 0.0
    values: npt.NDArray[np.float64] | None = None
    grid_step: float = 0.0
    width: float | None = None
    uneven: bool = False
    ladders: dict[tuple[tuple[Layout, Overhead], ...], list[RatePlan]] = field(
        default_factory=dict, repr=False, compare=False
    )

    def packed(self) -> dict[str, Any]:
        """All of it as JSON has it; :meth:`unpacked` is the inverse, to the bit."""
        return {
            "counts": _packed_array(self.counts),
            "values": None if self.values is None else _packed_array(self.values),
            **{name: getattr(self, name) for name in _NUMBERS_OF_HISTOGRAMS},
        }

    @classmethod
    def unpacked(cls, value: Mapping[str, Any]) -> FineHistogram:
        """From what :meth:`packed` gave."""
        values = value["values"]
        return cls(
            counts=_unpacked_array(value["counts"], np.int64),
            values=None if values is None else _unpacked_array(values, np.float64),
            **{name: value[name] for name in _NUMBERS_OF_HISTOGRAMS},
        )

    @cached_property
    def size(self) -> int:
        """How many weights there are."""
        return int(self.counts.sum())

    @cached_property
    def occupied(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
        """Centres and counts of the bins that are not empty: of a Gaussian's most are."""
        there = self.counts > 0
        return self.centres[there], self.counts[there]

    @property
    def is_small(self) -> bool:
        """Whether it is of so few weights that planning must not cost more than they do."""
        return self.size <= SMALL_ELEMENTS

    @property
    def deviation(self) -> float:
        """The standard deviation if the mean matters, else the rms."""
        variance = self.rms**2 - self.mean**2
        if self.mean**2 <= _OFFSET_MATTERS_AT * variance:
            return self.rms
        return float(np.sqrt(max(variance, (self.rms * 2.0**-20) ** 2)))

    @property
    def is_smooth(self) -> bool:
        """Whether there is enough of it, and finer steps cost more bits and give less noise, all the way."""
        return not self.is_small and self.values is None and self.deviation == self.rms and not self.uneven

    def tells_values_apart(self, bits: float) -> bool:
        """Whether values are so few that about this rate has room for which of them each weight is."""
        return self.values is not None and entropy_bits(self.counts) <= bits + _VALUES_NEARLY_FIT

    @property
    def bin_width(self) -> float:
        return self.rms / FINE_BINS_PER_RMS if self.width is None else self.width

    @property
    def centres(self) -> npt.NDArray[np.float64]:
        """The bins' centres in units of the weights."""
        if self.values is not None:
            return self.values
        middle = len(self.counts) // 2
        bins = np.arange(len(self.counts), dtype=np.float64)
        return (bins - middle + 0.5) * (self.rms / FINE_BINS_PER_RMS)


@dataclass(frozen=True)
class Estimate:
    """What a step leads to: bits a weight, everything counted, and the squared error; predicted: the relative one."""

    bits: float
    noise: float

    @property
    def noise_at_equal_bits(self) -> float:
        """To compare noise at rates that are close to each other: a bit is worth 6 dB."""
        return float(self.noise * 4.0**self.bits)


class Overhead(NamedTuple):
    """Bits a weight of a blob that its contents do not change, with tiles in mode rans and in mode raw."""

    rans: float
    raw: float
    max_steps: int
    """The largest magnitude, in steps, that is sure to be one that an outlier of such tiles can have."""
    padding: float = 0.0
    """Padding columns, as a part of the columns: in mode rans they are coded like these."""
    edge: float = 0.0
    """The part of the weights that lies in tile rows with idle lanes: lanes that have raw planes, but no row."""
    edge_planes: float = 0.0
    """Bits a weight of these planes, for the weights of the edge: in mode rans alone, and each tile row has a mode."""

    @property
    def idle_planes(self) -> float:
        """Bits a weight of idle lanes' planes, over all weights."""
        return self.edge * self.edge_planes


def fixed_bits_per_weight(header: BlobHeader) -> Overhead:
    """Overhead of a blob: states, lengths, metadata, header, table, scale."""
    last = header.tile_geometry(header.num_tiles - 1)
    lane_bits = 32 + 8 * header.length_bytes - 8  # the last word of a lane is half full on average
    lanes = header.matrices * header.rows * header.num_tiles_col
    tile_bits = 8 * (TILE_METADATA_BYTES + 32 + 8)
    total = lanes * lane_bits + header.num_tiles * tile_bits
    total += 8 * (HEADER_BYTES + _TYPICAL_TABLE_BYTES + 4)
    raw_bits = header.num_tiles * 8 * (TILE_METADATA_BYTES + 8) + 8 * (HEADER_BYTES + 4)
    padding = (CHUNK_COLS * last.chunks - last.cols) / header.cols
    idle = (last.lanes - last.rows) / last.rows
    return Overhead(
        total / header.num_elements + padding * header.layout.raw_bits,
        raw_bits / header.num_elements,
        header.max_outlier_steps,
        padding,
        last.rows / header.rows if idle else 0.0,
        (1 + padding) * idle * header.layout.raw_bits,
    )


class _Placed(NamedTuple):
    """What a step makes of the weights: how often each code is there, their squared error, and how many are outliers,
    the last two as a part of the weights."""

    codes: npt.NDArray[np.float64]
    noise: float
    outliers: float


@cache
def _code_of_elements(layout: Layout) -> npt.NDArray[np.int64]:
    """The code of q = −half … half − 1, whose elements are 0 … 2·half − 1."""
    return np.asarray(layout.codes(np.arange(1 << layout.element_bits)), np.int64)


def _placed(fine: FineHistogram, step: float, layout: Layout, rounding: Rounding) -> _Placed:
    centres, counts = fine.occupied
    half = 1 << (layout.element_bits - 1)
    on_grid = layout.quantizer == Quantizer.TRELLIS
    offsets = _GRID_OFFSETS if on_grid else (0.0,)
    codes, noise, outliers = np.zeros(1 << layout.code_bits), 0.0, 0.0
    for offset in offsets:
        found = np.zeros(len(codes), np.int64)
        squares, number = place_bins(
            centres,
            counts,
            step,
            rounding.thresholds,
            on_grid,
            offset,
            rounding.clamp,
            half,
            _code_of_elements(layout),
            found,
        )
        codes += found / len(offsets)
        noise += squares / len(offsets) / fine.size
        outliers += number / len(offsets) / fine.size
    return _Placed(codes, noise, outliers)


def estimated_bits(codes: npt.NDArray[Any], outliers: float, layout: Layout, overhead: Overhead) -> float:
    """Bits a weight, everything counted.

    Args:
        codes: how often each code of ``layout`` is there, [2^code_bits].
        outliers: their part of the weights.
    """
    rans = entropy_bits(codes) * (1 + overhead.padding) + layout.raw_bits + overhead.rans
    raw = layout.element_bits + overhead.raw
    bits = (1 - overhead.edge) * min(rans, raw) + overhead.edge * min(rans + overhead.edge_planes, raw)
    return bits + 8 * OUTLIER_BYTES * outliers


def estimate(fine: FineHistogram, step: float, layout: Layout, overhead: Overhead, rounding: Rounding) -> Estimate:
    """Rate and noise of a step, from the fine histogram."""
    placed = _placed(fine, step, layout, rounding)
    noise = placed.noise
    if layout.quantizer == Quantizer.TRELLIS:
        noise *= _TRELLIS_NOISE
    # Inside a bin the weights are spread evenly.
    noise += fine.bin_width**2 / 12
    bits = estimated_bits(placed.codes, placed.outliers, layout, overhead)
    return Estimate(float(bits), noise / fine.rms**2)


def rounding_for(fine: FineHistogram, step: float, layout: Layout, rate_weight: float = LAMBDA) -> Rounding:
    """Thresholds that minimise error² + λ·bits for the code lengths that this step leads to."""
    if rate_weight == 0:
        return NEAREST
    by_rate = (8 * OUTLIER_BYTES * rate_weight) ** 0.5
    if layout.quantizer == Quantizer.TRELLIS:
        codes = _placed(fine, step, layout, NEAREST).codes
        lengths = -np.log2((codes + 0.5) / (codes.sum() + 0.5 * len(codes)))
        bits = lengths[_code_of_elements(layout)].astype(np.float32)
        return Rounding(NEAREST.thresholds, np.float32(max(1.0, by_rate)), rate_weight, bits)
    thresholds, bits = np.empty(NUM_THRESHOLDS, np.float32), np.empty(NUM_THRESHOLDS + 1, np.float32)
    rate_thresholds(
        *fine.occupied,
        step,
        1 << (layout.element_bits - 1),
        _code_of_elements(layout),
        np.empty(1 << layout.code_bits, np.int64),
        rate_weight,
        thresholds,
        bits,
    )
    return Rounding(thresholds, np.float32(max(0.5, by_rate)), rate_weight, bits)


@dataclass(frozen=True)
class RatePlan:
    """A step and how to round and store with it."""

    step: float
    layout: Layout
    rounding: Rounding
    predicted: Estimate


def plan_at_step(fine: FineHistogram, step: float, layout: Layout, overhead: Overhead, rate_weight: float) -> RatePlan:
    """The plan of one given step."""
    rounding = rounding_for(fine, step, layout, rate_weight)
    plan = RatePlan(step, layout, rounding, estimate(fine, step, layout, overhead, rounding))
    if overhead.rans + overhead.idle_planes - overhead.raw < _RAW_MAY_WIN_AT or rounding is NEAREST:
        return plan
    # In tiles of a fixed width all codes cost the same, and only outliers have a price.
    nearest = Rounding(NEAREST.thresholds, rounding.clamp)
    raw = RatePlan(step, layout, nearest, estimate(fine, step, layout, overhead, nearest))
    return raw if raw.predicted.bits <= plan.predicted.bits else plan


def _least_exponent(fine: FineHistogram, overhead: Overhead) -> float:
    """log2 of the least step by which the largest value is one that an outlier can have."""
    return float(np.log2(fine.largest / overhead.max_steps) + _ABOVE_LIMIT)


def _solve(fine: FineHistogram, bits: float, layout: Layout, overhead: Overhead, rate_weight: float) -> RatePlan:
    """The smallest step whose predicted rate does not exceed ``bits`` (bisection on its logarithm), or a coarser one
    if that leaves less noise: where a range is too narrow for finer steps, these take hardly more bits, and clip more.
    """
    low = np.log2(fine.rms) - (bits - _GAUSSIAN_BITS) - 2.5
    high = low + 7.0
    low = max(low, _least_exponent(fine, overhead))
    high = max(high, low)

    def plan_at(step: float) -> RatePlan:
        return plan_at_step(fine, step, layout, overhead, rate_weight)

    plan = _bisect(plan_at, high, low, 13, lambda plan: plan.predicted.bits <= bits)
    while (coarser := plan_at(plan.step * _COARSER)).predicted.noise * _EQUAL_NOISE < plan.predicted.noise:
        if coarser.predicted.bits > bits:
            break
        plan = coarser
    return plan


def _bisect(
    plan_at: Callable[[float], RatePlan], good: float, wanted: float, times: int, is_good: Callable[[RatePlan], bool]
) -> RatePlan:
    """The good plan whose step is nearest to 2^wanted, between that and 2^good, whose plan is taken as good."""
    plan = plan_at(float(2.0**good))
    for _ in range(times):
        middle = (good + wanted) / 2
        trial = plan_at(float(2.0**middle))
        if is_good(trial):
            good, plan = middle, trial
        else:
            wanted = middle
    return plan


def step_at_bits(fine: FineHistogram, bits: float) -> float:
    """About the step at which a tensor with this spread takes ``bits`` bits a weight."""
    return float(fine.rms * 2.0 ** (_GAUSSIAN_BITS - bits))


def plan_ladder(fine: FineHistogram, layouts: Iterable[Layout], header_of: dict[Layout, BlobHeader]) -> list[RatePlan]:
    """Plans of every step of a ladder that holds all values, and of the grid's, the least noise first.

    What they are does not depend on a rate, so that a higher one always has all the plans of a lower one.
    """
    key = tuple((layout, fixed_bits_per_weight(header_of[layout])) for layout in layouts)
    if key not in fine.ladders:
        fine.ladders[key] = _ladder(fine, key)
    return fine.ladders[key]


def _ladder(fine: FineHistogram, layouts: Iterable[tuple[Layout, Overhead]]) -> list[RatePlan]:
    first, last = _LADDER_OCTAVES
    steps_per_octave = _SMALL_STEPS_PER_OCTAVE if fine.is_small else _LADDER_STEPS_PER_OCTAVE
    exponents = np.arange(first, last, -1 / steps_per_octave)
    steps = [float(np.float32(fine.deviation * 2.0**exponent)) for exponent in exponents]
    layouts = list(layouts)
    pairs = [
        (layout, overhead, step)
        for layout, overhead in layouts
        for step in steps
        if fine.largest <= overhead.max_steps * step
    ]
    # If none can hold the largest value, quantizing says so.
    pairs = pairs or [(layout, overhead, steps[0]) for layout, overhead in layouts]
    if fine.grid_step > 0:
        pairs = [(layout, overhead, fine.grid_step) for layout, overhead in layouts] + pairs
    plans = [plan_at_step(fine, step, layout, overhead, 0.0) for layout, overhead, step in pairs]
    return sorted(plans, key=lambda plan: (plan.predicted.noise, plan.predicted.bits))


def quantizers_at(asked: Quantizer, bits: float, *, fed_back: bool) -> tuple[Quantizer, ...]:
    """The quantizers to choose from at a rate.

    A trellis is not better for all matrices: it has raw planes where lanes are idle, reaches a quarter as far, and puts
    no weight between two of its values at zero, or at whatever the weights crowd about.
    """
    if asked == Quantizer.SCALAR or bits > _TRELLIS_UP_TO_BITS:
        return (Quantizer.SCALAR,)
    if bits < _TRELLIS_WITHOUT_FEEDBACK_FROM_BITS and not fed_back:
        return (Quantizer.SCALAR,)
    return (Quantizer.TRELLIS, Quantizer.SCALAR)


def candidate_layouts(
    layout_name: str, bits: float, fine: FineHistogram | None = None, quantizer: Quantizer = Quantizer.SCALAR
) -> list[Layout]:
    """Layouts worth trying for a rate: element_bits around what a Gaussian's range of ±3.5 rms needs.

    If ``fine`` is not smooth: every width, and ``compact`` beside ``balanced``: far from zero the high bits of an
    element say little, and its low bits are not evenly spread.
    """
    needed = int(np.ceil(bits - _GAUSSIAN_BITS + np.log2(7.0)))
    names: tuple[str, ...] = ("balanced",) if layout_name == "auto" else (layout_name,)
    if any(name not in LAYOUT_NAMES for name in names):
        raise ValueError(f"unknown layout {layout_name!r}")
    # With `fast` widths are a bit apart from a code that says nothing: a range that is short of the tails may pay.
    shifts = range(-2 if layout_name == "fast" else -1, 2)
    widths = sorted({min(8, max(2, needed + shift)) for shift in shifts})
    if fine is not None and not fine.is_smooth:
        names = ("balanced", "compact") if layout_name == "auto" and not fine.is_small else names
        widths = list(range(2, 9))
        return [integer_layout(name, ElementKind.SIGNED, n) for name in names for n in widths]  # the same at every rate
    if quantizer == Quantizer.TRELLIS:
        widths = sorted({min(TRELLIS_MAX_ELEMENT_BITS, n) for n in widths})
    return [layout for name in names for n in widths for layout in layouts_at(name, n, bits, quantizer)]


def layouts_at(
    layout_name: str, element_bits: int, bits: float, quantizer: Quantizer = Quantizer.SCALAR
) -> tuple[Layout, ...]:
    """The layouts of a name that may be chosen at a rate: the usual one, and at low rates the ones that lose less."""
    layouts = integer_layouts(layout_name, ElementKind.SIGNED, element_bits, quantizer)
    return layouts if bits <= _FOLDED_LOSES_UP_TO_BITS and element_bits == _FOLDED_LOSES_AT else layouts[:1]


def _is_allowed(plan: RatePlan) -> bool:
    layout = plan.layout
    return layout in layouts_at(layout.name, layout.element_bits, plan.predicted.bits, layout.quantizer)


def layouts_for_idle_lanes(header_of: dict[Layout, BlobHeader]) -> list[Layout]:
    """The other layouts of a name, which have fewer raw planes, for those whose idle lanes' planes cost much."""
    return [
        other
        for layout, header in header_of.items()
        if fixed_bits_per_weight(header).idle_planes >= _IDLE_PLANES_MATTER_AT
        for other in integer_layouts(layout.name, layout.element_kind, layout.element_bits, layout.quantizer)[1:]
    ]


def layouts_that_lose_less(
    fine: FineHistogram, bits: float, layouts: list[Layout], header_of: dict[Layout, BlobHeader]
) -> list[Layout]:
    """The layouts that are usual at low rates alone, if there they leave less noise than ``layouts`` at ``bits``.

    Tails as heavy as a Cauchy distribution's have so many outliers that a folded code loses more than half a bit.
    """
    if bits <= _FOLDED_LOSES_UP_TO_BITS:
        return []
    other_headers = {
        other: replace(header_of[layout], layout=other)
        for layout in layouts
        for other in layouts_at(layout.name, layout.element_bits, _FOLDED_LOSES_UP_TO_BITS, layout.quantizer)[1:]
    }
    if not other_headers:
        return []
    others = list(other_headers)
    usual = plan_for_bits(fine, bits, layouts, header_of).predicted.noise
    quieter = plan_for_bits(fine, _FOLDED_LOSES_UP_TO_BITS, others, other_headers).predicted.noise < usual
    return others if quieter else []


def raw_layouts(layouts: list[Layout], bits: float, header_of: dict[Layout, BlobHeader]) -> list[Layout]:
    """Layouts of the widths that fit ``bits`` in mode raw, if lanes cost so much that it may be worth while."""
    layout = layouts[-1]
    overhead = fixed_bits_per_weight(header_of[layout])
    if overhead.rans + overhead.idle_planes - overhead.raw < _RAW_MAY_WIN_AT:
        return []
    most = TRELLIS_MAX_ELEMENT_BITS if layout.quantizer == Quantizer.TRELLIS else 8
    widest = min(most, int(bits - overhead.raw))
    name = layout.name if layout.name in LAYOUT_NAMES else "balanced"
    widths = range(max(2, widest - 1), widest + 1)
    return [integer_layouts(name, ElementKind.SIGNED, n, layout.quantizer)[0] for n in widths]


def plan_for_bits(
    fine: FineHistogram,
    bits: float,
    layouts: list[Layout],
    header_of: dict[Layout, BlobHeader],
    rate_weight: float = LAMBDA,
) -> RatePlan:
    """The plan with the least predicted noise at ``bits`` bits a weight, for a tensor whose histogram is smooth."""
    plans = [_solve(fine, bits, layout, fixed_bits_per_weight(header_of[layout]), rate_weight) for layout in layouts]
    # A layout that cannot go as low as asked for stays above the rate.
    feasible = [plan for plan in plans if plan.predicted.bits <= bits]
    if not feasible:
        return min(plans, key=lambda plan: plan.predicted.bits)
    best = min(feasible, key=lambda plan: plan.predicted.noise)
    if min(plan.predicted.bits for plan in feasible) < bits - _RATE_IS_SLACK_AT:
        # A value that is the largest by far sets the step, whatever the rate: more bits would buy nothing.
        equal = [plan for plan in feasible if plan.predicted.noise <= best.predicted.noise * _EQUAL_NOISE]
        return min(equal, key=lambda plan: plan.predicted.bits)
    return best


def plan_for_noise(
    fine: FineHistogram, noise: float, layouts: list[Layout], header_of: dict[Layout, BlobHeader]
) -> RatePlan:
    """The plan of the least predicted bits whose predicted noise, over the variance, is at most ``noise``."""
    limit = noise * (fine.deviation / fine.rms) ** 2
    if not fine.is_smooth:
        plans = plan_ladder(fine, layouts, header_of)
        quiet = [plan for plan in plans if plan.predicted.noise <= limit] or plans[:1]
        return min(quiet, key=lambda plan: plan.predicted.bits)
    quietest = np.log2(fine.rms * np.sqrt(12 * limit)) - 1.0
    high = quietest + 2.0

    def plan_of(layout: Layout) -> RatePlan:
        overhead = fixed_bits_per_weight(header_of[layout])
        return _bisect(
            lambda step: plan_at_step(fine, step, layout, overhead, LAMBDA),
            max(quietest, _least_exponent(fine, overhead)),
            high,
            12,
            lambda plan: plan.predicted.noise <= limit,
        )

    plans = [plan_of(layout) for layout in layouts]
    # A value that is the largest by far sets the step, and that of layouts with longer tiles is coarser.
    least = min(plan.predicted.noise for plan in plans)
    most = limit if least <= limit else least * _EQUAL_NOISE
    return min((plan for plan in plans if plan.predicted.noise <= most), key=lambda plan: plan.predicted.bits)


def plan_for_step(
    fine: FineHistogram,
    step: float,
    layouts: list[Layout],
    header_of: dict[Layout, BlobHeader],
    rate_weight: float = LAMBDA,
) -> RatePlan:
    """The plan for a given step (one step for a whole model): the layout with the least rate plus error.

    ``layouts`` are tried with every element width, since a common step suits tensors of unlike spread.
    """
    plans = [
        plan_at_step(fine, step, layout, fixed_bits_per_weight(header_of[layout]), rate_weight) for layout in layouts
    ]
    vars(fine).pop("occupied", None)  # soon found again, and common steps keep the histograms of a whole model
    plans = [plan for plan in plans if _is_allowed(plan)]
    unit = (step / fine.rms) ** 2 * LAMBDA  # relative squared error that a bit is worth at this step
    return min(plans, key=lambda plan: plan.predicted.noise + unit * plan.predicted.bits)
