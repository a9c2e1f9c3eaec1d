"""Is kvpack as fast as before a change? Reports of ``kvpack bench`` from before and after it, row by row.

    kvpack bench attention --quick --report before-1.json     # and so on, in turns, on one GPU
    python benchmarks/compare_reports.py --before before-*.json --after after-*.json --json DATE-same-speed.json

Of each row the fastest of the reports of a side counts. ``spread`` is how far the reports of before differ from each
other in that row: what differs by no more than that is no difference.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from bench_common import print_table, provenance, write_result

_SHOWN = ("shape", "layout", "to", "m", "context", "tokens", "sequences", "budget", "blocks", "name")


def rows_of(report: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """A report's rows that have a time, each with its section's name."""
    for section, rows in report.items():
        if isinstance(rows, list):
            for row in rows:
                if isinstance(row, dict) and row.get("us"):
                    yield section, row


def compare(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Times of a bench's rows, fastest of each side, in µs.

    Raises:
        ValueError: the reports do not have the same rows.
    """
    sides = [[list(rows_of(report)) for report in reports] for reports in (before, after)]
    found = []
    for same in zip(*(rows for side in sides for rows in side), strict=True):
        keys = {(section, *(str(row.get(key)) for key in _SHOWN)) for section, row in same}
        if len(keys) != 1:
            raise ValueError(f"the reports have different rows: {sorted(keys)}")
        times = [float(row["us"]) for _, row in same]
        old, new = times[: len(before)], times[len(before) :]
        section, row = same[0]
        shown = {key: row[key] for key in _SHOWN if row.get(key) is not None}
        spread = max(old) / min(old) - 1
        found.append(
            {"section": section, **shown, "before_us": min(old), "after_us": min(new), "spread": spread}
            | {"ratio": min(new) / min(old)}
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, nargs="+", required=True)
    parser.add_argument("--after", type=Path, nargs="+", required=True)
    parser.add_argument("--limit", type=float, default=0.03, help="print rows that differ by more")
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    arguments = parser.parse_args()
    sides = [[json.loads(path.read_text()) for path in paths] for paths in (arguments.before, arguments.after)]
    rows = compare(*sides)
    ratios = [row["ratio"] for row in rows]
    print(f"{len(rows)} rows: median {median(ratios):.4f}, from {min(ratios):.4f} to {max(ratios):.4f}")
    beyond = [row for row in rows if abs(row["ratio"] - 1) > arguments.limit]
    headings = ["section", "row", "before, µs", "after, µs", "ratio", "spread before"]
    table = [
        [
            row["section"],
            ", ".join(str(row[key]) for key in _SHOWN if key in row),
            f"{row['before_us']:.2f}",
            f"{row['after_us']:.2f}",
            f"{row['ratio']:.3f}",
            f"{row['spread']:.3f}",
        ]
        for row in beyond
    ]
    print_table(headings, table, f"Beyond {arguments.limit:.0%}")
    if arguments.json is not None:
        reports = [{key: side[0].get(key) for key in ("commit", "device", "versions")} for side in sides]
        result = {**provenance({}), "limit": arguments.limit, "before": reports[0], "after": reports[1], "rows": rows}
        write_result(arguments.json, result)


if __name__ == "__main__":
    main()
