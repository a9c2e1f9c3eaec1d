"""Tables of what ``kv_quantizers.py`` has found. Needs no torch, as ``render_docs.py`` does not."""

from __future__ import annotations

import itertools
import math
import re
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from kv_quality_report import CLEAR

from kvpack.bench.report import Row, Table, number

PEER = "KIVI-like"
# Below, no verdict is given: chance alone exceeds two standard errors, which are themselves estimated from the windows,
# in 30 % of comparisons of 2 windows, in 10 % of 6, in 9 % of 8, and in 5 % of very many (Student's t).
LEAST_WINDOWS = 8


class Ratio(NamedTuple):
    """Of two means over the same windows; ``better`` counts windows where the first is less.

    The verdict on fewer than :data:`LEAST_WINDOWS` is their number.
    """

    value: float
    standard_error: float | None
    better: int
    windows: int

    @property
    def verdict(self) -> str:
        if self.standard_error is None:
            return "one window"
        if self.value == 1:
            return "equal"
        if self.windows < LEAST_WINDOWS:
            return f"{self.windows} windows"
        if abs(1 - self.value) < CLEAR * self.standard_error:
            return "no difference"
        return "wins" if self.value < 1 else "loses"


def mean(values: Sequence[float]) -> float:
    return statistics.fmean(values)


def standard_error(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def paired_ratio(mine: Sequence[float], other: Sequence[float]) -> Ratio | None:
    """mean(mine) / mean(other), windows paired; its standard error to first order. None where ``other`` is all 0."""
    if not any(other):
        return None
    value = mean(mine) / mean(other)
    rest = standard_error([a - value * b for a, b in zip(mine, other, strict=True)])
    better = sum(a < b for a, b in zip(mine, other, strict=True))
    return Ratio(value, None if rest is None else rest / mean(other), better, len(mine))


class Comparison(NamedTuple):
    """kvpack's row, and the KL of what it is compared with in each window; ``bits`` are the other's."""

    row: Row
    why: str
    against: str
    bits: float
    kl: list[float]


SAME_WIDTH, SAME_BUDGET = "same width", "same budget"
EQUAL_BITS, NO_MORE_BITS = "equal bits, interpolated", "best of no more bits"
# Schemes that take so many bits less say nothing.
_CLOSE_BITS = 1.0


def is_peer(row: Row) -> bool:
    return str(row["family"]).startswith(PEER)


def is_own(row: Row) -> bool:
    return str(row["family"]).startswith(("pages", "a budget"))


def takes_no_more(one: Row, other: Row) -> bool:
    """In no window: a budget's bits vary, and KL is compared window by window."""
    return all(bits <= most for bits, most in zip(one["window_bits"], other["window_bits"], strict=True))


def at_equal_bits(bits: float, peers: Sequence[Row]) -> tuple[str, list[float]] | None:
    """What schemes of one family would have at some bits: log KL is taken as linear in bits between two of them, in
    each window. Their names, and KL; None outside of what they take."""
    ordered = sorted(peers, key=lambda row: float(row["bits"]))
    for low, high in itertools.pairwise(ordered):
        if low["bits"] <= bits < high["bits"]:
            share = (bits - low["bits"]) / (high["bits"] - low["bits"])
            kl = [a ** (1 - share) * b**share for a, b in zip(low["kl"], high["kl"], strict=True)]
            return f"{low['name']}, {high['name']}", kl
    return None


def comparisons(rows: list[Row]) -> list[Comparison]:
    """Of each of kvpack's rows, where both are measured: KIVI-like groups of 64 at the same width, and at equal bits;
    the KIVI-like scheme of least KL that takes no more bits, and not much less; for a budget, the uniform one."""
    by_name = {row["name"]: row for row in rows}
    found = []
    for row in rows:
        if not is_own(row):
            continue
        named = []
        if width := re.fullmatch(r"int(\d)", row["name"]):
            named.append((SAME_WIDTH, f"kivi{width[1]}g64"))
        policy, at, budget = row["name"].partition("@")
        if at and policy != "uniform":
            named.append((SAME_BUDGET, f"uniform@{budget}"))
        for why, name in named:
            if other := by_name.get(name):
                found.append(Comparison(row, why, name, other["bits"], other["kl"]))
        between = at_equal_bits(row["bits"], [one for one in rows if one["family"] == f"{PEER}, groups of 64"])
        if between is not None:
            found.append(Comparison(row, EQUAL_BITS, between[0], row["bits"], between[1]))
        close = [one for one in rows if is_peer(one) and takes_no_more(one, row)]
        close = [one for one in close if row["bits"] - one["bits"] <= _CLOSE_BITS]
        if close:
            best = min(close, key=lambda one: mean(one["kl"]))
            found.append(Comparison(row, NO_MORE_BITS, best["name"], best["bits"], best["kl"]))
    return found


def _milli(value: float | None) -> str:
    return number(None if value is None else 1000 * value, 3)


def _quality(result: dict[str, Any]) -> Table:
    headings = ["text", "scheme", "bits", "KL, mnat", "± s.e.", "same top token, %", "error of attention", "± s.e."]
    rows = []
    for text in result["texts"]:
        for row in sorted(text["rows"], key=lambda one: -one["bits"]):
            cells = [text["name"], row["name"], number(row["bits"], 3), _milli(mean(row["kl"]))]
            cells += [_milli(standard_error(row["kl"])), number(100 * mean(row["same_top"]))]
            rows.append([*cells, number(mean(row["error"]), 4), number(standard_error(row["error"]), 4)])
    return Table(f"Quality by scheme, first page of kvpack's {first_page(result)}", headings, rows)


def _compared(result: dict[str, Any]) -> list[tuple[str, Comparison, Ratio]]:
    found = []
    for text in result["texts"]:
        for one in comparisons(text["rows"]):
            ratio = paired_ratio(one.row["kl"], one.kl)
            if ratio is not None:
                found.append((text["name"], one, ratio))
    return found


def _comparisons(result: dict[str, Any]) -> Table:
    headings = ["text", "pages", "bits", "", "against", "its bits"]
    headings += ["KL, × of its", "± s.e.", "better in windows", "by KL"]
    rows = []
    for text, one, ratio in _compared(result):
        cells = [text, one.row["name"], number(one.row["bits"], 3), one.why, one.against, number(one.bits, 3)]
        cells += [number(ratio.value, 3), number(ratio.standard_error, 3), f"{ratio.better} of {ratio.windows}"]
        rows.append([*cells, ratio.verdict])
    return Table("Pages against KIVI-like schemes, and budgets against uniform ones", headings, rows)


def _constructed(result: dict[str, Any]) -> Table:
    cases = result["constructed"]
    if not cases:
        return Table("", [], [])
    rows = []
    for i, row in enumerate(cases[0]["rows"]):
        cells = [row["name"], number(row["bits"], 3)]
        rows.append([*cells, *(number(case["rows"][i]["error"], 4) for case in cases)])
    title = f"Error of attention on constructed keys and values, first page of kvpack's {first_page(result)}"
    return Table(title, ["scheme", "bits", *(c["name"] for c in cases)], rows)


def verdicts(result: dict[str, Any]) -> str:
    """How often kvpack's pages win and lose, in a sentence for each kind of comparison."""
    compared = _compared(result)
    parts = []
    for why, whom in (
        (SAME_WIDTH, "KIVI-like groups of 64 at the same width"),
        (EQUAL_BITS, "KIVI-like groups of 64 at equal bits"),
        (NO_MORE_BITS, "the best KIVI-like scheme of no more bits"),
        (SAME_BUDGET, "uniform widths under the same budget"),
    ):
        found = Counter(
            ratio.verdict for _, one, ratio in compared if one.why == why and ratio.windows >= LEAST_WINDOWS
        )
        if found:
            parts.append(
                f"Against {whom}, {found['wins']} of {found.total()} win and {found['loses']} lose by KL, by {CLEAR:g} "
                "standard errors or more."
            )
    if few := {ratio.windows for _, _, ratio in compared if ratio.windows < LEAST_WINDOWS}:
        parts.append(
            f"Of {' or '.join(map(str, sorted(few)))} windows no verdict is given, {LEAST_WINDOWS} are needed: the "
            "standard error is estimated from the windows too, and chance alone exceeds two of it in 30 % of "
            "comparisons of 2 windows, in 9 % of 8."
        )
    return " ".join(parts)


def first_page(result: dict[str, Any]) -> str:
    """What the first page of kvpack's had; a budget's cache has it as a cache has, whatever was asked for."""
    pages = [row for text in result["texts"] for row in text["rows"] if is_own(row) and "@" not in row["name"]]
    pages += [row for case in result["constructed"] for row in case["rows"] if is_own(row)]
    asked = result["first_page"] if pages else "cache"
    if asked == "cache":
        formats = result.get("first_page_formats", [])
        return "as in a cache" + (f" ({', '.join(formats)})" if pages and formats else "")
    return "in the format of the others" if asked == "same" else f"in {asked.upper()}"


def tables(result: dict[str, Any]) -> dict[str, Table]:
    """By name; those without rows are left out."""
    found = {"quality": _quality(result), "comparisons": _comparisons(result), "constructed": _constructed(result)}
    return {name: table for name, table in found.items() if table.rows}
