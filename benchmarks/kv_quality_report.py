"""Tables of what ``kv_quality.py`` has found. Needs no torch, as ``render_docs.py`` does not."""

from __future__ import annotations

from collections import Counter
from typing import Any

from kvpack.bench.report import Row, Table, number

# Beyond so many standard errors a difference is called one.
CLEAR = 2.0


def verdict(difference: float, standard_error: float | None) -> str:
    """What a difference says; it is positive where the mixture is better."""
    if not standard_error:
        return "equal" if difference == 0 else "–"
    errors = difference / standard_error
    return "no difference" if abs(errors) < CLEAR else ("wins" if errors > 0 else "loses")


def _in_errors(difference: float, standard_error: float | None) -> str:
    return f"{difference / standard_error:+.1f}" if standard_error else "–"


def _milli(value: float | None, sign: str = "") -> str:
    return "–" if value is None else format(1000 * value, f"{sign}.3f")


def _configurations(result: dict[str, Any]) -> Table:
    def cells(row: Row) -> list[str]:
        return [
            row["name"],
            number(row["mean_bits"]),
            number(row["end_bits"]),
            number(row["page_bytes"] / 1e6, 3),
            number(row["perplexity"], 3),
            _milli(row["loss"], "+"),
            _milli(row["loss_standard_error"]),
            _milli(row["kl"]),
            _milli(row["kl_standard_error"]),
            number(100 * row["same_top"]),
            number(row["tokens_per_s"], 0),
        ]

    headings = ["pages", "bits, mean", "bits at the end", "MB at the end", "perplexity", "loss, mnat", "± s.e."]
    headings += ["KL, mnat", "± s.e.", "same top token, %", "tokens/s"]
    return Table("Quality by configuration", headings, [cells(row) for row in result["rows"]])


def _equal_bytes(result: dict[str, Any]) -> Table:
    rows = []
    for row in result["equal_bytes"]:
        cells = [row["name"], row["against"], number(100 * row["bytes_ratio"]), number(100 * row["mean_bits_ratio"])]
        for measure in ("kl", "log_likelihood"):
            gain, error = row[f"{measure}_gain"], row[f"{measure}_standard_error"]
            cells += [_milli(gain, "+"), _milli(error), _in_errors(gain, error), verdict(gain, error)]
        rows.append(cells)
    headings = [
        "mixture",
        "against",
        "its bytes at the end, %",
        "its mean bits, %",
        "KL saved, mnat",
        "± s.e.",
        "in s.e.",
        "by KL",
    ]
    headings += ["log-likelihood gained, mnat", "± s.e.", "in s.e.", "by log-likelihood"]
    return Table("Mixtures against one width at equal bytes", headings, rows)


def verdicts(result: dict[str, Any]) -> str:
    """How often mixtures win and lose, in a sentence."""
    rows = result["equal_bytes"]
    parts = []
    for measure, name in (("kl", "KL"), ("log_likelihood", "log-likelihood")):
        found = Counter(verdict(row[f"{measure}_gain"], row[f"{measure}_standard_error"]) for row in rows)
        parts.append(f"{found['wins']} win and {found['loses']} lose by {name}")
    return f"Of {len(rows)} mixtures at equal bytes, {' and '.join(parts)}, by {CLEAR:g} standard errors or more."


def tables(result: dict[str, Any]) -> dict[str, Table]:
    """By name; those without rows are left out."""
    found = {"configurations": _configurations(result), "equal-bytes": _equal_bytes(result)}
    return {name: table for name, table in found.items() if table.rows}
