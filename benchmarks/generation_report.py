"""Tables and charts of what ``generation.py`` has found. Tables need no torch, as ``render_docs.py`` does not.

python benchmarks/generation_report.py benchmarks/results/DATE-generation-large.json docs/images/generation-large.png
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kvpack.bench.report import Row, Table, number

CODED = ("4.25:fast", "4.25:balanced")
# What is compared in the summary: the best that bf16 reaches, and kvpack's layouts with INT4 pages.
_DENSE = "bf16"
_STATIC = ("static", "flash")
_PAGES = "int4"
_MOST_KERNELS = 8


def _cases(rows: Iterable[Row]) -> list[tuple[str, int, int]]:
    return list(dict.fromkeys((row["model"], row["batch"], row["context"]) for row in rows))


def _find(report: dict[str, Any], case: tuple[str, int, int], weights: str, cache: str) -> Row | None:
    """A decoding that was measured, small layers not compiled."""
    for row in report["decode"]:
        of_case = (row["model"], row["batch"], row["context"]) == case
        if of_case and (row["weights"], row["cache"]) == (weights, cache) and not row["small_layers_compiled"]:
            return row if row.get("step_ms") else None
    return None


def best_dense(report: dict[str, Any], case: tuple[str, int, int]) -> Row | None:
    """bf16 with the faster of the two ways to attend to a StaticCache."""
    found = [row for cache in _STATIC if (row := _find(report, case, _DENSE, cache)) is not None]
    return min(found, key=lambda row: row["step_ms"], default=None)


def _weight_bytes(report: dict[str, Any], model: str, weights: str) -> int:
    for row in report["weights"]:
        if (row["model"], row["weights"]) == (model, weights) and row["error"] is None:
            return int(row["linear_bytes"] + row["other_bytes"])
    return 0


def _gigabytes(value: float | None) -> str:
    return "–" if not value else f"{value / 1e9:.2f}"


def _summary(report: dict[str, Any]) -> Table:
    rows = []
    for case in _cases(report["decode"]):
        model, batch, context = case
        dense = best_dense(report, case)
        cells = [model, str(batch), str(context), "–" if dense is None else f"{dense['step_ms']:.2f}"]
        for weights in CODED:
            found = _find(report, case, weights, _PAGES)
            cells.append("–" if found is None else f"{found['step_ms']:.2f}")
            ratio = None if found is None or dense is None else dense["step_ms"] / found["step_ms"]
            cells.append(number(ratio, 2))
        cache = _find(report, case, _DENSE, _STATIC[0]) or dense
        pages = _find(report, case, CODED[0], _PAGES)
        total = None if cache is None else _weight_bytes(report, model, _DENSE) + cache["cache_bytes"]
        coded = None if pages is None else _weight_bytes(report, model, CODED[0]) + pages["cache_bytes"]
        rows.append([*cells, _gigabytes(total), _gigabytes(coded)])
    headings = ["model", "sequences", "tokens", "bf16, ms a step", "`fast`, ms", "×", "`balanced`, ms", "×"]
    return Table("Decoding", [*headings, "bf16, GB", "`fast`, GB"], rows)


def _decode(report: dict[str, Any]) -> Table:
    rows = []
    for row in report["decode"]:
        case = (row["model"], row["batch"], row["context"])
        dense = best_dense(report, case)
        measured = row.get("step_ms")
        how = "graph" if row.get("graph") else "no graph"
        how += ", small layers compiled" if row["small_layers_compiled"] else ""
        cells = [case[0], str(case[1]), str(case[2]), row["weights"], row["cache"], how]
        if measured is None:
            rows.append([*cells, row["error"] or "–", "–", "–", "–", "–", "–"])
            continue
        cells += [f"{measured:.2f}", f"{row['tokens_per_s']:.0f}"]
        cells += [number(None if dense is None else dense["step_ms"] / measured, 2), number(100 * row["spread"], 1)]
        plans = [row.get("plan_us"), row.get("plan_most_us")]
        shown = "–" if None in plans else " / ".join(f"{plan:.0f}" for plan in plans)
        rows.append([*cells, shown, _gigabytes(row["cache_bytes"])])
    headings = ["model", "sequences", "tokens", "weights", "cache", "", "ms a step", "tokens/s", "× best bf16"]
    return Table("All ways of decoding", [*headings, "spread, %", "plan, median / most, µs", "cache, GB"], rows)


def _weights(report: dict[str, Any]) -> Table:
    rows = []
    for row in report["weights"]:
        cells = [row["model"], row["weights"]]
        if row["error"] is not None:
            rows.append([*cells, row["error"], "–", "–"])
            continue
        cells += [f"{row['bits_per_weight']:.2f}", _gigabytes(row["linear_bytes"])]
        rows.append([*cells, _gigabytes(row["linear_bytes"] + row["other_bytes"])])
    return Table("Weights", ["model", "weights", "bits", "linear layers, GB", "with embeddings and head, GB"], rows)


def _prefill(report: dict[str, Any]) -> Table:
    rows = []
    for row in report["prefill"]:
        cells = [row["model"], str(row["context"]), row["weights"], row["cache"]]
        if row["error"] is not None:
            rows.append([*cells, row["error"], "–", "–"])
            continue
        peak = row.get("peak_beyond_bytes")
        rows.append([*cells, f"{row['tokens_per_s']:.0f}", f"{1e3 * row['seconds']:.0f}", _gigabytes(peak)])
    headings = ["model", "tokens", "weights", "cache", "tokens/s", "ms", "most memory beyond weights, GB"]
    return Table("Prefill", headings, rows)


def _least_us(report: dict[str, Any], profile: Row) -> str:
    """Reading layers, head and cache once, at the speed of a copy."""
    case = (profile["model"], profile["batch"], profile["context"])
    decoded = _find(report, case, profile["weights"], profile["cache"])
    for row in report["weights"]:
        if (row["model"], row["weights"]) == (profile["model"], profile["weights"]) and decoded is not None:
            read = row["linear_bytes"] + row["head_bytes"] + decoded.get("page_bytes", decoded["cache_bytes"])
            return f"{1e-3 * read / report['copy'][0]['gb_per_s']:.0f}"
    return "–"


def _launches(report: dict[str, Any]) -> Table:
    rows = []
    for row in report["profile"]:
        cells = [row["model"], f"{row['weights']}/{row['cache']}", str(row["batch"])]
        if row["error"] is not None:
            rows.append([*cells, row["error"], "–", "–", "–", "–"])
            continue
        most = ", ".join(
            f"{kernel['name'].split('<')[0].split('(')[0][-40:]} {kernel['launches']:.0f} × in {kernel['us']:.0f} µs"
            for kernel in row["kernels"][:_MOST_KERNELS]
        )
        cells += [f"{row['launches']:.0f}", f"{row['kernels_us']:.0f}", f"{row['step_us']:.0f}"]
        rows.append([*cells, _least_us(report, row), most])
    headings = ["model", "way", "sequences", "launches a step", "µs in kernels", "µs a step, under the profiler"]
    return Table("Launches", [*headings, "least, µs", "most of it"], rows)


def tables(report: dict[str, Any]) -> dict[str, Table]:
    """Empty ones are left out."""
    found = {
        "summary": _summary(report),
        "decode": _decode(report),
        "weights": _weights(report),
        "prefill": _prefill(report),
        "launches": _launches(report),
    }
    return {name: table for name, table in found.items() if table.rows}


def plot(report: dict[str, Any], path: Path) -> None:
    """Milliseconds a step over contexts, and memory: a column of panels for each number of sequences.

    Raises:
        ValueError: nothing was measured of a model with several contexts.
    """
    from matplotlib.figure import Figure

    measured = [row for row in report["decode"] if row.get("step_ms") and not row["small_layers_compiled"]]
    if not measured:
        raise ValueError("nothing was decoded, so there is nothing to draw")
    model = measured[0]["model"]
    rows = [row for row in measured if row["model"] == model]
    batches = sorted({row["batch"] for row in rows})
    series = (
        ("bf16, SDPA as transformers has it", _DENSE, "static", "v--"),
        ("bf16, SDPA without a mask", _DENSE, "flash", "v-"),
        ("nf4, bitsandbytes", "bnb-nf4", "flash", "^-"),
        ("INT4, torchao", "torchao-int4", "flash", "s-"),
        ("kvpack balanced, 4.25 bits, INT4 pages", CODED[1], _PAGES, "o-"),
        ("kvpack fast, 4.25 bits, INT4 pages", CODED[0], _PAGES, "o-"),
    )
    figure = Figure(figsize=(4.2 * len(batches), 6.4), layout="constrained")
    panels = figure.subplots(2, len(batches), squeeze=False, sharex=True)
    for column, batch in enumerate(batches):
        for label, weights, cache, style in series:
            found = sorted(
                (row["context"], row["step_ms"], _weight_bytes(report, model, weights) + row["cache_bytes"])
                for row in rows
                if (row["batch"], row["weights"], row["cache"]) == (batch, weights, cache)
            )
            places = [place for place, _, _ in found]
            panels[0][column].plot(places, [ms for _, ms, _ in found], style, ms=4, label=label)
            panels[1][column].plot(places, [size / 1e9 for _, _, size in found], style, ms=4, label=label)
        panels[0][column].set_title(f"{batch} sequence{'s' * (batch > 1)}", fontsize=10)
        panels[1][column].set_xlabel("tokens of a sequence", fontsize=9)
        for panel in (panels[0][column], panels[1][column]):
            panel.set_xscale("log", base=2)
            panel.xaxis.set_major_formatter("{x:.0f}")
            panel.set_ylim(bottom=0)
            panel.grid(True, alpha=0.3)
    panels[0][0].set_ylabel("ms a step", fontsize=9)
    panels[1][0].set_ylabel("weights and cache, GB", fontsize=9)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
    figure.suptitle(f"{report['device']['name']}: decoding with {model}'s shape, one CUDA graph a step", fontsize=11)
    figure.savefig(path, dpi=120, format="png")


if __name__ == "__main__":
    plot(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
