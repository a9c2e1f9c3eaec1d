"""Which page of a KV cache gets how many bits, so that all of them fit a budget (docs/KV.md).

Pages begin in 16 bits, are quantized once, and can only lose bits afterwards: to a page of 16 bits every width is open,
to a quantized one its own and those below. Each page begins at the lowest width, and upgrades are bought in the order
of what they are worth: importance · drop in squared error / bytes. Of a page's widths only those on the convex hull of
(bytes, error) are ever bought, since then that order is as good as any solution up to one upgrade, and sorting replaces
a heap.

NumPy alone: a quarter of a million pages take a fraction of a second.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Literal, get_args

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
    """A row for each page; arrays of n, in any order.

    Attributes:
        layer, sequence, index: where it is; index counts a sequence's pages from its beginning.
        side: 0 for K, 1 for V.
        format: :class:`PageFormat` now, one of the ladder.
        importance: of the page's tokens, ≥ 0, in any unit.
        error: [n, widths], expected squared error of each width of the ladder, in any unit common to all.
        pinned: stays as it is.
    """

    layer: npt.NDArray[np.integer]
    sequence: npt.NDArray[np.integer]
    index: npt.NDArray[np.integer]
    side: npt.NDArray[np.integer]
    format: npt.NDArray[np.integer]
    importance: npt.NDArray[np.floating]
    error: npt.NDArray[np.floating]
    pinned: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.format)


@dataclass(frozen=True)
class Allocation:
    """``formats`` u8 [n], a :class:`PageFormat` for each page, and the bytes of all of them."""

    formats: npt.NDArray[np.uint8]
    bytes: int
    budget_bytes: int
    outcome: Outcome


def allocate_widths(
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
    rung_of = np.full(max(PageFormat) + 1, -1)
    rung_of[list(ladder)] = np.arange(len(ladder))
    rung = rung_of[pages.format]
    if (rung < 0).any():
        at = int(np.flatnonzero(rung < 0)[0])
        raise AllocationError(
            f"page {at} has format {PageFormat(int(pages.format[at])).name}; the ladder is {[f.name for f in ladder]}"
        )
    result = rung.copy()
    pinned_bytes = int(page_bytes[pages.side[pages.pinned], rung[pages.pinned]].sum())
    is_open = ~pages.pinned
    side, highest = pages.side[is_open], rung[is_open]

    # What each width costs and spoils; above a page's own it is the same as there.
    reachable = np.minimum(np.arange(len(ladder)), highest[:, None])
    cost = page_bytes[side[:, None], reachable]
    weight = np.where(highest < len(ladder) - 1, 1 + hysteresis, 1.0) * _importance(pages, policy)[is_open]
    error = np.take_along_axis(_error(pages, policy)[is_open], reachable, axis=1) * weight[:, None]
    if policy == "uniform":
        error = -cost.astype(np.float64)  # a byte is worth a byte: rung by rung, as far as they fit

    lowest_bytes = pinned_bytes + int(cost[:, 0].sum())
    if lowest_bytes > budget_bytes:
        result[is_open] = 0
        outcome = Outcome.PINNED_EXCEED if pinned_bytes > budget_bytes else Outcome.LOWEST_EXCEEDS
    else:
        group = _groups(pages, policy)
        if group is None:
            result[is_open] = _climb(cost, error, highest, budget_bytes - lowest_bytes)
        else:
            ids, member = np.unique(group[is_open], return_inverse=True)
            top = np.zeros(len(ids), highest.dtype)
            np.maximum.at(top, member, highest)
            costs = _sums(cost, member, len(ids)).astype(np.int64)  # exact: bytes are far below 2^53
            climbed = _climb(costs, _sums(error, member, len(ids)), top, budget_bytes - lowest_bytes)
            result[is_open] = np.minimum(climbed[member], highest)
        outcome = Outcome.HELD
    formats = np.array(ladder, np.uint8)[result]
    return Allocation(formats, int(page_bytes[pages.side, result].sum()), budget_bytes, outcome)


def _sums(columns: npt.NDArray[np.generic], group: npt.NDArray[np.intp], groups: int) -> _Floats:
    """[rows, columns] → [groups, columns]"""
    return np.stack([np.bincount(group, column, groups) for column in columns.T], axis=1)


def _climb(cost: _Ints, error: _Floats, highest: _Ints, left: int) -> _Ints:
    """The rung of each row of [rows, widths], bought for ``left`` bytes above rung 0; never above ``highest``."""
    rows, widths = cost.shape
    steps = max(widths - 1, 0)
    # The upgrades of each row along its hull: how much a byte is worth, bytes, the rung that is reached.
    worth = np.full((rows, steps), -np.inf)
    price = np.zeros((rows, steps), np.int64)
    reached = np.zeros((rows, steps), np.int64)
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
        worth[climbing, step], reached[climbing, step] = value, best
        price[climbing, step] = cost[climbing, best] - cost[climbing, at[climbing]]
        at[climbing], above[climbing] = best, value
        climbing = climbing[best < highest[climbing]]
    # Ties keep the order of a row's upgrades.
    pending = np.argsort(-worth.reshape(-1), kind="stable")
    pending = pending[np.isfinite(worth.reshape(-1)[pending])]
    taken = np.zeros(rows * steps, bool)
    while pending.size:
        # One that costs too much ends its row; cheaper ones of other rows may still fit. Each turn buys at least one,
        # and from the second on less than one upgrade's bytes are left, so that turns are few.
        blocked = np.logical_or.accumulate(price > left, axis=1).reshape(-1)
        pending = pending[~blocked[pending]]
        spent = np.cumsum(price.reshape(-1)[pending])
        fits = int(np.searchsorted(spent, left, side="right"))
        taken[pending[:fits]] = True
        left -= int(spent[fits - 1]) if fits else 0
        pending = pending[fits:]
    count = taken.reshape(rows, steps).sum(axis=1)
    result = np.zeros(rows, np.int64)
    bought = np.flatnonzero(count)
    result[bought] = reached[bought, count[bought] - 1]
    return result


def _check(pages: Pages, page_bytes: _Ints, ladder: Sequence[PageFormat], policy: Policy, hysteresis: float) -> None:
    n = len(pages)
    for name in ("layer", "sequence", "index", "side", "format", "importance", "pinned"):
        if (shape := getattr(pages, name).shape) != (n,):
            raise AllocationError(f"{name} has shape {shape}; there are {n} pages")
    if pages.error.shape != (n, len(ladder)):
        raise AllocationError(f"error has shape {pages.error.shape}; {n} pages have {len(ladder)} widths")
    if page_bytes.shape != (2, len(ladder)) or (np.diff(page_bytes, axis=1) <= 0).any():
        raise AllocationError(f"page_bytes {page_bytes.tolist()} must ascend along {len(ladder)} widths, for 2 sides")
    for name in ("importance", "error"):
        values = getattr(pages, name)
        if not (np.isfinite(values) & (values >= 0)).all():
            raise AllocationError(f"{name} has values that are negative or not finite")
    if policy not in POLICIES:
        raise AllocationError(f"policy is {policy!r}; there are {', '.join(POLICIES)}")
    if not 0 <= hysteresis < np.inf:
        raise AllocationError(f"hysteresis is {hysteresis}; it is a share, 0 or more")


def _importance(pages: Pages, policy: Policy) -> _Floats:
    if policy == "position" and len(pages):
        newest = np.zeros(int(pages.sequence.max()) + 1, np.int64)
        np.maximum.at(newest, pages.sequence, pages.index)
        return np.asarray(1.0 / (1 + newest[pages.sequence] - pages.index))
    return np.maximum(pages.importance.astype(np.float64), _LEAST_IMPORTANCE)


def _error(pages: Pages, policy: Policy) -> _Floats:
    """By position, that of a layer and side: pages differ by where they are alone."""
    error = pages.error.astype(np.float64)
    if policy != "position" or not len(pages):
        return error
    ids, member = np.unique(pages.layer.astype(np.int64) * 2 + pages.side, return_inverse=True)
    return np.asarray((_sums(error, member, len(ids)) / np.bincount(member)[:, None])[member])


def _groups(pages: Pages, policy: Policy) -> _Ints | None:
    """Which pages must have the same width; None if none must."""
    if policy == "uniform":
        return np.zeros(len(pages), np.int64)
    if policy == "per-layer":
        return pages.layer.astype(np.int64) * 2 + pages.side
    return None


class ImportanceEMA:
    """A decayed average of the attention that each page receives: a page that is looked at no more becomes unimportant.

    Pages that have been there for a few steps only are not taken for unimportant: the average is over the steps that a
    page has seen.

    Args:
        layers, sequences, pages: the shape of what is averaged; ``pages`` is the most that a sequence can have.
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

    def grow(self, pages: int) -> None:
        """A sequence can have so many pages now; those to come have not been seen."""
        more = ((0, 0), (0, 0), (0, pages - self._average.shape[2]))
        self._average, self._weight = np.pad(self._average, more), np.pad(self._weight, more)

    def forget(self, sequence: int) -> None:
        """The sequence's pages are no more."""
        self._average[:, sequence] = 0
        self._weight[:, sequence] = 0

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
