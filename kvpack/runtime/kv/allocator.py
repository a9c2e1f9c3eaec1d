"""Which page of a KV cache gets how many bits, so that all of them fit a budget (docs/KV.md).

Pages begin in 16 bits, are quantized once, and can only lose bits afterwards: to a page of 16 bits every width is open,
to a quantized one its own and those below. Each page begins at the lowest width, and upgrades are bought in the order
of what they are worth: importance · drop in squared error / bytes. Of a page's widths only those on the convex hull of
(bytes, error) are ever bought, since then that order is as good as any solution up to one upgrade, and sorting replaces
a heap.

Pages of one layer, side and format have the same hull, times the importance of each: hulls are looked for by class, and
pages multiply.

NumPy alone: a quarter of a million pages take some hundredths of a second.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from kvpack.errors import AllocationError
from kvpack.format.pages import PageFormat

Policy = Literal["uniform", "importance", "per-layer", "position"]
POLICIES: tuple[Policy, ...] = get_args(Policy)

# Ascending: what a page of 16 bits may become, and itself.
LADDER = (PageFormat.INT2, PageFormat.INT3, PageFormat.INT4, PageFormat.INT8, PageFormat.FP16)

_FORECAST_EXPONENT = 0.7
# Between pages that no one attends to, the drop in error decides.
_LEAST_IMPORTANCE = 1e-30

_Ints = npt.NDArray[np.int64]
_Floats = npt.NDArray[np.float64]


class Outcome(Enum):
    """Whether the budget is held."""

    HELD = "the pages fit the budget"
    LOWEST_EXCEEDS = "with all open pages at the lowest width, the pages exceed the budget"
    PINNED_EXCEED = "pinned pages alone exceed the budget"


@dataclass(frozen=True)
class Pages:
    """A row for each page, arrays of n in any order; and what the widths of layers and sides spoil.

    Attributes:
        layer, sequence, index: where it is; index counts a sequence's pages from its beginning.
        side: 0 for K, 1 for V.
        format: :class:`PageFormat` now, one of the ladder.
        importance: of the page's tokens, ≥ 0, in any unit.
        pinned: stays as it is.
        errors: [layers, 2 sides, widths], expected squared error of each width of the ladder, in any unit common to
            all; NaN may stand where no page is open.
    """

    layer: npt.NDArray[np.integer]
    sequence: npt.NDArray[np.integer]
    index: npt.NDArray[np.integer]
    side: npt.NDArray[np.integer]
    format: npt.NDArray[np.integer]
    importance: npt.NDArray[np.floating]
    pinned: npt.NDArray[np.bool_]
    errors: npt.NDArray[np.floating]

    def __len__(self) -> int:
        return len(self.format)


@dataclass(frozen=True)
class Allocation:
    """``formats`` u8 [n], a :class:`PageFormat` for each page, and the bytes of all of them."""

    formats: npt.NDArray[np.uint8]
    bytes: int
    budget_bytes: int
    outcome: Outcome


def allocate_formats(
    pages: Pages,
    page_bytes: _Ints,
    budget_bytes: int,
    *,
    ladder: Sequence[PageFormat] = LADDER,
    policy: Policy = "importance",
    hysteresis: float = 0.1,
) -> Allocation:
    """The widths that keep most of what matters within a budget.

    ==============  ================================================================================================
    ``uniform``     one width for all open pages, the largest that fits
    ``importance``  a width for each page, by importance · drop in error / bytes
    ``per-layer``   a width for each layer and side, by the sums of that over their pages
    ``position``    a width for each page; importance falls with a page's distance from its sequence's last
    ==============  ================================================================================================

    A page that is narrower already stays so. By page, what is left of the budget is less than a page of 16 bits, unless
    every page has its largest open width; the other policies choose for many pages at once, and may leave more.

    Args:
        pages: all that count against the budget, pinned ones as well.
        page_bytes: i64 [2 sides, widths of the ladder].
        budget_bytes: for all pages.
        ladder: ascending; the last is of 16 bits.
        hysteresis: what a quantized page has is worth this share more than what a page of 16 bits would get, since it
            cannot be had back: a changing importance must change by more before it costs a page its bits.

    Raises:
        AllocationError: shapes that differ, a format that is not of the ladder, an importance or error that is negative
            or not finite, an unknown policy, bytes that do not ascend.
    """
    _check(pages, page_bytes, ladder, policy, hysteresis)
    widths = len(ladder)
    rung_of = np.full(max(PageFormat) + 1, -1)
    rung_of[list(ladder)] = np.arange(widths)
    rung = rung_of[pages.format]
    if len(pages) and rung.min() < 0:
        at = int(np.flatnonzero(rung < 0)[0])
        raise AllocationError(
            f"page {at} has format {PageFormat(int(pages.format[at])).name}; the ladder is {[f.name for f in ladder]}"
        )
    pinned = np.flatnonzero(pages.pinned)
    pinned_bytes = int(page_bytes[pages.side[pinned], rung[pinned]].sum())

    # A class's pages have the same upgrades: the open ones of a layer, side and rung. What pinned ones have comes last.
    top = rung.copy()
    top[pinned] = widths
    kind = (pages.layer * np.intp(2) + pages.side) * (widths + 1) + top
    classes = _Classes(np.bincount(kind, minlength=2 * len(pages.errors) * (widths + 1)), pages.errors, hysteresis)
    of_open = classes.errors[classes.present]
    if not (np.isfinite(of_open) & (of_open >= 0)).all():
        raise AllocationError("errors has values of open pages that are negative or not finite")

    lowest_bytes = pinned_bytes + int(classes.count[classes.present] @ page_bytes[classes.side[classes.present], 0])
    if lowest_bytes > budget_bytes:
        result = np.zeros(len(pages), np.int64)
        outcome = Outcome.PINNED_EXCEED if pinned_bytes > budget_bytes else Outcome.LOWEST_EXCEEDS
    else:
        left = budget_bytes - lowest_bytes
        if policy in ("uniform", "per-layer"):
            weight = np.bincount(kind, _importance(pages, policy), len(classes.count)).astype(np.float64)
            result = _climb_together(classes, page_bytes, weight, left, is_one=policy == "uniform")[kind]
        else:
            hulls = _hulls(page_bytes[classes.side], classes.errors, classes.highest)
            result = _climb(hulls, kind, _importance(pages, policy), left)
        outcome = Outcome.HELD
    result[pinned] = rung[pinned]
    formats = np.array(ladder, np.uint8)[result]
    used = np.bincount(pages.side * widths + result, minlength=page_bytes.size) @ page_bytes.reshape(-1)
    return Allocation(formats, int(used), budget_bytes, outcome)


class _Classes:
    """Pages that have the same upgrades, a row for each [layer, side, rung], and for what is pinned behind the rungs.

    Attributes:
        count: of pages.
        group: layer · 2 + side.
        side: 0 for K, 1 for V.
        highest: the rung, 0 where there are no open pages.
        errors: [classes, widths], with the hysteresis.
        present: rows that have open pages.
    """

    def __init__(self, count: _Ints, errors: npt.NDArray[np.floating], hysteresis: float) -> None:
        widths = errors.shape[2]
        self.count = count
        self.group, rung = np.divmod(np.arange(len(count)), widths + 1)
        self.side = self.group % 2
        self.present = np.flatnonzero((count > 0) & (rung < widths))
        self.highest = np.zeros(len(count), np.int64)
        self.highest[self.present] = rung[self.present]
        margin = np.where(rung < widths - 1, 1 + hysteresis, 1.0)
        self.errors: _Floats = errors.astype(np.float64).reshape(-1, widths)[self.group] * margin[:, None]


@dataclass(frozen=True)
class _Hulls:
    """The upgrades of each row along its hull; what there is not has a price of 0.

    Attributes:
        count: [rows], of upgrades.
        worth: [rows, steps], of a byte; it never rises along a row.
        price: [rows, steps], bytes.
        reached: [rows, steps + 1], the rung after so many upgrades.
    """

    count: _Ints
    worth: _Floats
    price: _Ints
    reached: _Ints


def _hulls(cost: _Ints, error: _Floats, highest: _Ints) -> _Hulls:
    """Of rows of [rows, widths], from rung 0 to ``highest``."""
    rows, widths = cost.shape
    steps = max(widths - 1, 0)
    count = np.zeros(rows, np.int64)
    worth = np.zeros((rows, steps))
    price = np.zeros((rows, steps), np.int64)
    reached = np.zeros((rows, steps + 1), np.int64)
    at, above = np.zeros(rows, np.int64), np.full(rows, np.inf)
    climbing = np.flatnonzero(highest > 0)
    for step in range(steps):
        here = at[climbing]
        more = cost[climbing] - cost[climbing, here][:, None]
        drop = error[climbing, here][:, None] - error[climbing]
        rungs = np.arange(widths)
        allowed = (rungs > here[:, None]) & (rungs <= highest[climbing, None])
        slope = np.divide(drop, more, out=np.full(drop.shape, -np.inf), where=allowed)
        best = slope.argmax(axis=1)
        value = np.take_along_axis(slope, best[:, None], 1)[:, 0]
        useful = value >= 0
        climbing, best, value = climbing[useful], best[useful], value[useful]
        # Rounding must not put an upgrade before the one it builds on.
        value = np.minimum(value, above[climbing])
        worth[climbing, step], reached[climbing, step + 1] = value, best
        price[climbing, step] = cost[climbing, best] - cost[climbing, at[climbing]]
        count[climbing] += 1
        at[climbing], above[climbing] = best, value
        climbing = climbing[best < highest[climbing]]
    return _Hulls(count, worth, price, reached)


def _climb_together(classes: _Classes, page_bytes: _Ints, weight: _Floats, left: int, *, is_one: bool) -> _Ints:
    """The rung of each class, where the pages of a layer and side, or all of them, have one width if they can.

    Args:
        weight: [classes], the sums of their pages' importance.
    """
    present = classes.present
    highest = classes.highest[present]
    # What each width costs and spoils; above a page's own it is the same as there.
    reachable = np.minimum(np.arange(page_bytes.shape[1]), highest[:, None])
    cost = page_bytes[classes.side[present, None], reachable] * classes.count[present, None]
    error = classes.errors[present[:, None], reachable] * weight[present, None]
    ids, member = np.unique(np.zeros_like(present) if is_one else classes.group[present], return_inverse=True)
    top = np.zeros(len(ids), np.int64)
    costs, errors = np.zeros((len(ids), cost.shape[1]), np.int64), np.zeros((len(ids), cost.shape[1]))
    np.maximum.at(top, member, highest)
    np.add.at(costs, member, cost)
    np.add.at(errors, member, error)
    if is_one:
        errors = -costs.astype(np.float64)  # a byte is worth a byte: rung by rung, as far as they fit
    climbed = _climb(_hulls(costs, errors, top), np.arange(len(ids)), np.ones(len(ids)), left)
    result = np.zeros(len(classes.count), np.int64)
    result[present] = np.minimum(climbed[member], highest)
    return result


def _climb(hulls: _Hulls, row: _Ints, weight: _Floats, left: int) -> _Ints:
    """The rungs of n, bought for ``left`` bytes above rung 0.

    Args:
        row: [n], of the hulls.
        weight: [n], how much worth of that row counts.
    """
    steps = hulls.price.shape[1]
    price = hulls.price.reshape(-1)
    # One that costs too much ends its row.
    least = np.maximum.accumulate(hulls.price, axis=1).reshape(-1)
    bought = np.zeros(len(row), np.int64)
    who, what, worth = _upgrades(hulls, row, weight)
    if least.max(initial=0) > left:
        who, what, worth = _chosen(least[what] <= left, who, what, worth)
    while len(who):
        # Sorting all would take most of the time: sign, exponent and four bits of the mantissa tell what is bought or
        # not, but for those that share them with the last one.
        key = worth.view(np.int64) >> 48
        bytes_from = np.cumsum(np.bincount(key, price[what])[::-1])[::-1]
        cut = int(np.count_nonzero(bytes_from > left)) - 1
        taken = key > cut
        left -= int(bytes_from[cut + 1]) if cut + 1 < len(bytes_from) else 0
        last = np.flatnonzero(key == cut)
        # Ties in the order of pages, and of a page's upgrades.
        last = last[np.lexsort((what[last] % steps, who[last], -worth[last]))]
        spent = np.cumsum(price[what[last]])
        fitting = int(np.searchsorted(spent, left, side="right"))
        taken[last[:fitting]] = True
        left -= int(spent[fitting - 1]) if fitting else 0
        bought += np.bincount(who[np.flatnonzero(taken)], minlength=len(row))
        # Cheaper ones of other rows may still fit. Each turn buys at least one, and the first that does not fit is out
        # of the next, so that turns are no more than there are prices.
        who, what, worth = _chosen(~taken & (least[what] <= left), who, what, worth)
    return hulls.reached.reshape(-1)[row * (steps + 1) + bought]


def _upgrades(hulls: _Hulls, row: _Ints, weight: _Floats) -> tuple[_Ints, _Ints, _Floats]:
    """All upgrades of n: whose, which of the hulls' [rows · steps], what a byte is worth."""
    steps = hulls.price.shape[1]
    who = np.flatnonzero(hulls.count[row])
    rows, weight = row[who], weight[who]
    parts = []
    for step in range(int(hulls.count.max(initial=0))):
        if step:
            who, rows, weight = _chosen(hulls.count[rows] > step, who, rows, weight)
        parts.append((who, rows * steps + step, hulls.worth[:, step][rows] * weight))
    if not parts:
        return who, who, np.zeros(0)
    whose, which, worth = zip(*parts, strict=True)
    return np.concatenate(whose), np.concatenate(which), np.concatenate(worth)


def _chosen(mask: npt.NDArray[np.bool_], *columns: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], ...]:
    """Columns where the mask holds; by number, which takes a tenth of the time that a mask takes."""
    at = np.flatnonzero(mask)
    return tuple(column[at] for column in columns)


def _check(pages: Pages, page_bytes: _Ints, ladder: Sequence[PageFormat], policy: Policy, hysteresis: float) -> None:
    n = len(pages)
    for name in ("layer", "sequence", "index", "side", "format", "importance", "pinned"):
        if (shape := getattr(pages, name).shape) != (n,):
            raise AllocationError(f"{name} has shape {shape}; there are {n} pages")
    layers = len(pages.errors)
    if pages.errors.shape != (layers, 2, len(ladder)):
        raise AllocationError(f"errors has shape {pages.errors.shape}; expected (layers, 2, {len(ladder)})")
    for name, most in (("layer", layers), ("side", 2)):
        values = getattr(pages, name)
        if n and not 0 <= values.min() <= values.max() < most:
            raise AllocationError(f"{name} has values from {values.min()} to {values.max()}; there are {most}")
    if page_bytes.shape != (2, len(ladder)) or (np.diff(page_bytes, axis=1) <= 0).any():
        raise AllocationError(f"page_bytes {page_bytes.tolist()} must ascend along {len(ladder)} widths, for 2 sides")
    if n and not (pages.importance.min() >= 0 and pages.importance.max() < np.inf):
        raise AllocationError("importance has values that are negative or not finite")
    if (pages.errors < 0).any() or np.isinf(pages.errors).any():
        raise AllocationError("errors has values that are negative or not finite")
    if policy not in POLICIES:
        raise AllocationError(f"policy is {policy!r}; there are {', '.join(POLICIES)}")
    if not 0 <= hysteresis < np.inf:
        raise AllocationError(f"hysteresis is {hysteresis}; it is a share, 0 or more")


def _importance(pages: Pages, policy: Policy) -> _Floats:
    if policy == "position" and len(pages):
        newest = np.zeros(int(pages.sequence.max()) + 1, np.int64)
        np.maximum.at(newest, pages.sequence, pages.index)
        return np.asarray(1.0 / (1 + newest[pages.sequence] - pages.index))
    return np.maximum(pages.importance, _LEAST_IMPORTANCE, dtype=np.float64)


@dataclass(frozen=True)
class PageImportance:
    """What is known of the attention that a sequence's pages receive (:class:`ImportanceEMA`).

    Attributes:
        average, weight: fp32 [layers, pages]: the decayed sum of attention masses, and that of ones.
    """

    average: npt.NDArray[np.float32]
    weight: npt.NDArray[np.float32]


class ImportanceEMA:
    """A decayed average of the attention that each page receives: a page that is looked at no more becomes unimportant.

    Pages that have been there for a few steps only are not taken for unimportant: the average is over the steps that a
    page has seen.

    Args:
        layers, sequences, pages: the shape of what is averaged; ``pages`` is the most that a sequence has for now.
        decay: of what was known, per step, 0 … 1.

    Raises:
        AllocationError: a decay out of range.
    """

    def __init__(self, layers: int, sequences: int, pages: int, *, decay: float = 0.98) -> None:
        if not 0 <= decay < 1:
            raise AllocationError(f"decay is {decay}; it must be at least 0 and less than 1")
        self.decay = decay
        self._average = np.zeros((layers, sequences, pages))
        self._weight = np.zeros((layers, sequences, pages))  # 1 − decay^steps

    def update(
        self,
        layer: int,
        mass: npt.NDArray[np.floating],
        pages: npt.NDArray[np.integer],
        *,
        steps: int | npt.NDArray[np.integer] = 1,
    ) -> None:
        """Take in the mean attention mass of ``steps`` decoding steps.

        Args:
            mass: [sequences, pages], of all query heads, each weighted by its importance.
            pages: [sequences], how many pages each has; others do not change.
            steps: of all sequences, or [sequences]; one of none does not change.

        Raises:
            AllocationError: another shape, or masses that are negative or not finite. Nothing has changed.
        """
        _, *shape = self._average.shape
        if mass.shape != tuple(shape):
            raise AllocationError(f"mass has shape {mass.shape}; expected {tuple(shape)}")
        present = np.arange(shape[1]) < np.asarray(pages)[:, None]
        seen = mass[present]
        if not (np.isfinite(seen) & (seen >= 0)).all():
            raise AllocationError("mass has values that are negative or not finite")
        kept = np.broadcast_to(self.decay ** np.reshape(steps, (-1, 1)), present.shape)[present]
        self._average[layer][present] = kept * self._average[layer][present] + (1 - kept) * seen
        self._weight[layer][present] = kept * self._weight[layer][present] + (1 - kept)

    def grown(self, pages: int) -> ImportanceEMA:
        """The same for sequences of up to ``pages`` pages; those to come have not been seen."""
        layers, sequences, now = self._average.shape
        found = ImportanceEMA(layers, sequences, pages, decay=self.decay)
        found._average[:, :, :now], found._weight[:, :, :now] = self._average, self._weight
        return found

    def selected(self, rows: list[int]) -> ImportanceEMA:
        """A copy whose first sequences are these; the others have not been seen."""
        found = ImportanceEMA(*self._average.shape, decay=self.decay)
        found._average[:, : len(rows)], found._weight[:, : len(rows)] = self._average[:, rows], self._weight[:, rows]
        return found

    def keep_layers(self, count: int) -> None:
        """Know of the first layers alone."""
        self._average, self._weight = self._average[:count], self._weight[:count]

    def forget(self, sequence: int, first: int = 0) -> None:
        """The sequence's pages from the ``first`` on are no more."""
        self._average[:, sequence, first:] = 0
        self._weight[:, sequence, first:] = 0

    def select(self, changed: list[int], sources: list[int]) -> None:
        """Of each of the sequences that are ``changed``, what was known of its source."""
        self._average[:, changed] = self._average[:, sources]
        self._weight[:, changed] = self._weight[:, sources]

    def of(self, sequence: int, pages: int) -> PageImportance:
        """Of a sequence's first pages."""
        average, weight = (x[:, sequence, :pages].astype(np.float32) for x in (self._average, self._weight))
        return PageImportance(average, weight)

    def put(self, sequence: int, known: PageImportance, first: int = 0) -> None:
        """Know this of a sequence's pages from the ``first`` on, and nothing of those behind them."""
        end = first + known.average.shape[1]
        self.forget(sequence, first)
        self._average[:, sequence, first:end], self._weight[:, sequence, first:end] = known.average, known.weight

    def values(self, layer: int) -> _Floats:
        """[sequences, pages]; pages that have not been seen count as the mean of those of the layer that have."""
        seen = self._weight[layer] > 0
        known = np.divide(self._average[layer], self._weight[layer], out=np.zeros(seen.shape), where=seen)
        return np.where(seen, known, known[seen].mean() if seen.any() else 1.0)

    def forecast(self, layer: int) -> _Floats:
        """[sequences, pages]: as :meth:`values`, closer to their mean.

        What has been looked at much will be looked at less, and the other way round. mean · (value / mean)^0.7 of each
        layer has given the lowest KL divergence of exponents 0.5, 0.7 and 1 (docs/DESIGN-NOTES.md).
        """
        values = self.values(layer)
        seen = self._weight[layer] > 0
        mean = values[seen].mean() if seen.any() else 0.0
        return np.asarray(mean * (values / mean) ** _FORECAST_EXPONENT) if mean > 0 else values
