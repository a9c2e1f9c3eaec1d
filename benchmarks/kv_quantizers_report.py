"""Tables of what ``kv_quantizers.py`` has found. Needs no torch, as ``render_docs.py`` does not."""

from __future__ import annotations

import math
import re
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from kv_quality_report import CLEAR

from kvpack.bench.report import Row, Table, number

PEER = "KIVI-like"


class Ratio(NamedTuple):
    """Of two means over the same windows; ``better`` counts windows where the first is less."""

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


def is_peer(row: Row) -> bool:
    return str(row["family"]).startswith(PEER)


def is_own(row: Row) -> bool:
    return str(row["family"]).startswith(("pages", "a budget"))


def comparisons(rows: list[Row]) -> list[tuple[Row, Row, str]]:
    """(kvpack's, the peer's, why that one), for all of kvpack's rows: the peer of the same width in groups of 64, and
    the peer of least KL that takes no more bits."""
    by_name = {row["name"]: row for row in rows}
    found = []
    for row in rows:
        if not is_own(row):
            continue
        width = re.fullmatch(r"int(\d)", row["name"])
        same = by_name.get(f"kivi{width[1]}g64") if width else None
        if same is not None:
            found.append((row, same, "same width"))
        smaller = [other for other in rows if is_peer(other) and other["bits"] <= row["bits"]]
        if smaller:
            found.append((row, min(smaller, key=lambda other: mean(other["kl"])), "best of no more bits"))
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
    return Table("Quality by scheme", headings, rows)


def _compared(result: dict[str, Any]) -> list[tuple[str, Row, Row, str, Ratio]]:
    found = []
    for text in result["texts"]:
        for row, other, why in comparisons(text["rows"]):
            ratio = paired_ratio(row["kl"], other["kl"])
            if ratio is not None:
                found.append((text["name"], row, other, why, ratio))
    return found


def _comparisons(result: dict[str, Any]) -> Table:
    headings = [
        "text",
        "pages",
        "bits",
        "against",
        "",
        "its bits",
        "KL, × of its",
        "± s.e.",
        "better in windows",
        "by KL",
    ]
    rows = []
    for text, row, other, why, ratio in _compared(result):
        cells = [text, row["name"], number(row["bits"], 3), other["name"], why, number(other["bits"], 3)]
        cells += [number(ratio.value, 3), number(ratio.standard_error, 3), f"{ratio.better} of {ratio.windows}"]
        rows.append([*cells, ratio.verdict])
    return Table("Pages against KIVI-like schemes", headings, rows)


def _constructed(result: dict[str, Any]) -> Table:
    cases = result["constructed"]
    if not cases:
        return Table("", [], [])
    rows = []
    for i, row in enumerate(cases[0]["rows"]):
        cells = [row["name"], number(row["bits"], 3)]
        rows.append([*cells, *(number(case["rows"][i]["error"], 4) for case in cases)])
    return Table(
        "Error of attention on constructed keys and values", ["scheme", "bits", *(c["name"] for c in cases)], rows
    )


def verdicts(result: dict[str, Any]) -> str:
    """How often kvpack's pages win and lose, in a sentence for each kind of comparison."""
    compared = _compared(result)
    parts = []
    for why, whom in (
        ("best of no more bits", "the best KIVI-like scheme of no more bits"),
        ("same width", "KIVI-like groups of 64 at the same width"),
    ):
        found = Counter(ratio.verdict for *_, kind, ratio in compared if kind == why)
        if found:
            parts.append(
                f"Against {whom}, {found['wins']} of {found.total()} win and {found['loses']} lose by KL, by {CLEAR:g} "
                "standard errors or more."
            )
    return " ".join(parts)


def tables(result: dict[str, Any]) -> dict[str, Table]:
    """By name; those without rows are left out."""
    found = {"quality": _quality(result), "comparisons": _comparisons(result), "constructed": _constructed(result)}
    return {name: table for name, table in found.items() if table.rows}
