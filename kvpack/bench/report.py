"""The report of ``kvpack bench linear``: what is asked for, what is aimed at, and tables of it. Needs no torch.

A report is one JSON object (``schema`` 1)::

    what, schema, complete, stopped, note, command     complete is false if time ran out: ``stopped`` says where
    kvpack, date, commit, cpu, cores, versions, …      kvpack.bench.provenance.environment
    device        name, driver, capability, multiprocessors, memory_bytes, l2_bytes, cuda
    options       shapes [{name, rows, cols}], ms, layouts, tile_cols, samples, quick
    seconds       {stage: seconds}
    copy          [{bytes, us, gb_per_s}]              bytes read plus bytes written
    tensors       coded weights: shape, layout, tile_cols, bits_per_weight, blob_bytes, device_bytes, encode_ms,
                  bit_exact, dequantize_max_error, error_with_massive_activations, best
    linear        products: shape, m, name (fp16, int8, int4, humming-int4, …-int5, …-int8, kvpack), layout,
                  tile_cols, bits_per_weight, best, note, + a measurement
    decode        decoding alone: shape, layout, tile_cols, to (int8, fp16), moved_bytes, elements_per_s, bound_us,
                  fraction_of_bound, + a measurement
    streams       five layers: work (decode, linear, staged), m, layout, serial and parallel (measurements), speedup,
                  fused_us
    codecs        other entropy coders: name, source, bits_per_element, elements_per_s, encode_elements_per_s, error
    encode        layers coded: where (cpu, cuda), threads, layout, ms, elements_per_s, error
    targets, specification    what was aimed at: what, measured, unit, direction, target, met, then, then_met
    plots         {name: file}

A *measurement* is ``us`` (median of a call), ``us_low`` and ``us_high`` (10 % and 90 %), ``samples``, ``launches`` (a
graph), ``timing`` (graph, or eager where that is impossible), ``relative_error`` against float64, and ``error`` where
it failed. Ratios are left to the reader of the figures, here :func:`tables`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from kvpack.format.layout import CHUNK_COLS, MAX_TILE_COLS

SCHEMA = 1
Report = dict[str, Any]
Row = dict[str, Any]

NOTE = (
    "Weights are Gaussian integers of 5 bits with sigma 3.9 (4.0 bits of entropy): for speed only, "
    "they say nothing about the ratio on a model."
)


class Shape(NamedTuple):
    """A weight matrix; rows are outputs, columns inputs."""

    name: str
    rows: int
    cols: int

    @property
    def label(self) -> str:
        return f"{self.rows}×{self.cols}"


SHAPES = (
    Shape("qkv", 6144, 4096),
    Shape("o", 4096, 4096),
    Shape("gate_up", 28672, 4096),
    Shape("down", 4096, 14336),
    Shape("wide", 2048, 5632),
    Shape("tall", 5632, 2048),
)
# The layers of Llama-3.1-8B, for which there are targets, and the layer of the specification.
LLAMA_SHAPES = frozenset({"6144×4096", "4096×4096", "28672×4096", "4096×14336"})
SPECIFICATION_SHAPE = Shape("wide", 2048, 5632)
MS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048, 4096)
LAYOUTS = ("balanced", "fast")
TILE_COLS = (128, 256, 512, 1024, MAX_TILE_COLS)
# Names of Humming's products, by bits of a weight.
HUMMING = {4: "humming-int4", 5: "humming-int5", 8: "humming-int8"}
QUICK_SHAPES = ("o", "wide")
QUICK_MS = (1, 8, 2048)
QUICK_TILE_COLS = (256, 512)
MAX_M = 65536
_MAX_SIDE = 1 << 20


@dataclass(frozen=True)
class LinearBenchOptions:
    """What ``kvpack bench linear`` measures."""

    shapes: tuple[Shape, ...] = SHAPES
    ms: tuple[int, ...] = MS
    layouts: tuple[str, ...] = LAYOUTS
    tile_cols: tuple[int, ...] = TILE_COLS
    samples: int = 15
    sample_ms: float = 1.0
    case_ms: float = 400.0
    rotate_bytes: int = 400_000_000  # of weights in turn: several times an L2 cache
    peers: bool = True
    quick: bool = False
    time_limit_s: float | None = None

    def as_dict(self) -> Row:
        return {
            "shapes": [shape._asdict() for shape in self.shapes],
            "ms": list(self.ms),
            "layouts": list(self.layouts),
            "tile_cols": list(self.tile_cols),
            "samples": self.samples,
            "rotate_bytes": self.rotate_bytes,
            "quick": self.quick,
            "time_limit_s": self.time_limit_s,
        }


def _integers(text: str, low: int, high: int) -> tuple[int, ...]:
    numbers = []
    for part in text.split(","):
        if not part.strip().isdecimal() or not low <= int(part) <= high:
            raise ValueError(f"{part.strip()!r} is not a number from {low} to {high}")
        numbers.append(int(part))
    return tuple(dict.fromkeys(numbers))


def _shape(text: str) -> Shape:
    named = {shape.name: shape for shape in SHAPES}
    if text in named:
        return named[text]
    rows, separator, cols = text.replace("×", "x").partition("x")
    if not (separator and rows.isdecimal() and cols.isdecimal()):
        raise ValueError(f"{text!r} is neither ROWSxCOLS nor one of {', '.join(named)}")
    if not (1 <= int(rows) <= _MAX_SIDE and 1 <= int(cols) <= _MAX_SIDE):
        raise ValueError(f"{text!r}: rows and columns are 1 to {_MAX_SIDE}")
    return Shape(text, int(rows), int(cols))


def parse_options(
    *,
    shapes: str | None = None,
    ms: str | None = None,
    layouts: str | None = None,
    tile_cols: str | None = None,
    quick: bool = False,
    time_limit_s: float | None = None,
) -> LinearBenchOptions:
    """Options from comma-separated lists; what is left out has the default of a full or a quick run.

    >>> parse_options(shapes="o,2048x5632", ms="1,16").ms
    (1, 16)

    Raises:
        ValueError: a name or number that there is not.
    """
    all_shapes = QUICK_SHAPES if quick else tuple(shape.name for shape in SHAPES)
    chosen = tuple(_shape(part.strip()) for part in (",".join(all_shapes) if shapes is None else shapes).split(","))
    named = tuple(part.strip() for part in (",".join(LAYOUTS) if layouts is None else layouts).split(","))
    for layout in named:
        if layout not in LAYOUTS:
            raise ValueError(f"{layout!r} is not one of {', '.join(LAYOUTS)}")
    columns: tuple[int, ...] = QUICK_TILE_COLS if quick else TILE_COLS
    if tile_cols is not None:
        columns = _integers(tile_cols, CHUNK_COLS, MAX_TILE_COLS)
        for number in columns:
            if number % CHUNK_COLS:
                raise ValueError(f"{number} is not a multiple of {CHUNK_COLS}")
    numbers = (QUICK_MS if quick else MS) if ms is None else _integers(ms, 1, MAX_M)
    if quick:
        return LinearBenchOptions(
            chosen, numbers, named, columns, 9, 0.5, 100.0, 200_000_000, quick=True, time_limit_s=time_limit_s
        )
    return LinearBenchOptions(chosen, numbers, named, columns, time_limit_s=time_limit_s)


# --- finding rows ------------------------------------------------------------


def find_linear(report: Report, shape: str, m: int, name: str, layout: str | None = None) -> Row | None:
    """The measured product; for kvpack that with the chosen tile columns. None if it failed or was not measured."""
    for row in report.get("linear", ()):
        if (row["shape"], row["m"], row["name"], row["layout"]) == (shape, m, name, layout) and row["best"]:
            return row if row["us"] is not None else None
    return None


def ratio(report: Report, shape: str, m: int, layout: str | None, name: str = "kvpack", over: str = "fp16") -> Any:
    """How many times faster than ``over`` at equal shape and M; None if either is missing."""
    mine, other = find_linear(report, shape, m, name, layout), find_linear(report, shape, m, over)
    return other["us"] / mine["us"] if mine and other else None


def choose_best(rows: Sequence[Row], max_bits: float) -> Row | None:
    """The fastest product among several tile columns: among those of at most ``max_bits``, if there are any."""
    timed = [row for row in rows if row["us"] is not None]
    within = [row for row in timed if row["bits_per_weight"] <= max_bits]
    return min(within or timed, key=lambda row: row["us"], default=None)


# --- targets -----------------------------------------------------------------

MAX_BITS = {"balanced": 4.25, "fast": 4.45}
# Times as fast as FP16 with one vector.
BATCH_1_TARGETS = {
    "balanced": {"6144×4096": 1.2, "4096×4096": 1.25, "28672×4096": 1.35, "4096×14336": 1.3},
    "fast": {"6144×4096": 1.3, "4096×4096": 1.45, "28672×4096": 1.95, "4096×14336": 1.7},
}
# The same for `fast` with several: on the largest shape, first and then; on the slowest one.
LARGEST_SHAPE = "28672×4096"
BATCH_TARGETS = {
    8: (1.35, 1.6, 1.0),
    16: (1.2, 1.5, 0.9),
    32: (1.05, 1.3, 0.8),
    64: (0.9, 1.2, 0.7),
    128: (0.9, 1.0, 0.65),
    512: (0.8, 0.95, 0.7),
}


def target_row(
    what: str, measured: float | None, unit: str, target: float | None, then: float | None = None, *, most: bool = False
) -> Row:
    """What is aimed at, first and then, beside what was measured."""

    def met(goal: float | None) -> bool | None:
        if goal is None or measured is None:
            return None
        return measured <= goal if most else measured >= goal

    return {
        "what": what,
        "measured": measured,
        "unit": unit,
        "direction": "at most" if most else "at least",
        "target": target,
        "met": met(target),
        "then": then,
        "then_met": met(then),
    }


def _shapes_of(report: Report) -> list[str]:
    return list(dict.fromkeys(row["shape"] for row in report.get("linear", ())))


def _slowest(rows: Sequence[Row], key: str) -> float | None:
    """The smallest value, or None if one of them is missing."""
    values = [row[key] for row in rows]
    return min(values) if values and None not in values else None


def evaluate_targets(report: Report) -> list[Row]:
    """Each target with what was measured. What was not measured is neither met nor missed (None)."""
    layouts = report["options"]["layouts"]
    shapes = [shape for shape in _shapes_of(report) if shape in LLAMA_SHAPES]
    rows = []
    for layout in layouts:
        for shape in shapes:
            speed, goal = ratio(report, shape, 1, layout), BATCH_1_TARGETS[layout][shape]
            rows.append(target_row(f"{layout} {shape}, M = 1, against FP16 cuBLAS", speed, "×", goal))
            row = find_linear(report, shape, 1, "kvpack", layout)
            bits = row["bits_per_weight"] if row else None
            rows.append(target_row(f"{layout} {shape}, size", bits, "bits a weight", MAX_BITS[layout], most=True))
            if layout == "fast":
                speed = ratio(report, shape, 1, layout, over="int4")
                rows.append(target_row(f"{layout} {shape}, M = 1, against torch INT4", speed, "×", None, 1.0))
                if HUMMING[4] in _humming(report):
                    speed = ratio(report, shape, 1, layout, over=HUMMING[4])
                    rows.append(target_row(f"{layout} {shape}, M = 1, against Humming INT4", speed, "×", None, 1.0))
    for m, (first, then, worst) in BATCH_TARGETS.items():
        if "fast" in layouts and m in report["options"]["ms"]:
            speeds = {shape: ratio(report, shape, m, "fast") for shape in shapes}
            if LARGEST_SHAPE in speeds:
                what = f"fast {LARGEST_SHAPE}, M = {m}, against FP16 cuBLAS"
                rows.append(target_row(what, speeds[LARGEST_SHAPE], "×", first, then))
            known = [speed for speed in speeds.values() if speed is not None]
            slowest_speed = min(known) if known and len(known) == len(speeds) else None
            rows.append(target_row(f"fast, slowest shape, M = {m}, against FP16 cuBLAS", slowest_speed, "×", worst))
    for layout in layouts:
        for shape in shapes:
            if 2048 in report["options"]["ms"]:
                speed = ratio(report, shape, 2048, layout)
                rows.append(target_row(f"{layout} {shape}, prefill M = 2048", speed, "×", 0.88, 0.95))
    for layout in layouts:
        of_layout = [row for row in report.get("decode", ()) if row["layout"] == layout and row["shape"] in shapes]
        to_int8 = [row for row in of_layout if row["to"] == "int8"]
        to_fp16 = [row for row in of_layout if row["to"] == "fp16"]
        rate = _slowest(to_int8, "elements_per_s")
        slowest = "slowest shape"
        rows.append(
            target_row(f"{layout}, decode to int8, {slowest}", rate and rate / 1e12, "10¹² elements/s", 1.3, 2.0)
        )
        share = _slowest(to_fp16, "fraction_of_bound")
        rows.append(target_row(f"{layout}, decode to fp16, {slowest}", share, "of the byte bound", 0.65, 0.85))
    for row in report.get("streams", ()):
        if row["work"] == "staged":
            what = f"five layers {SPECIFICATION_SHAPE.label} ({row['layout']}), staged on streams against in turn"
            rows.append(target_row(what, row["speedup"], "×", 1.3, 1.7))
    for row in report.get("encode", ()):
        rate = row["elements_per_s"]
        if row["where"] == "cuda":
            what = f"GPU encode, {row['layout']} {row['shape']}"
            rows.append(target_row(what, rate and rate / 1e9, "10⁹ elements/s", 50, 250))
        elif row["threads"] == 1:
            what = f"CPU encode, {row['layout']}, one core"
            rows.append(target_row(what, rate and rate / 1e6, "10⁶ weights/s", 250, 350))
    return rows


def evaluate_specification(report: Report) -> list[Row]:
    """The figures that the first specification of the project asked for, on its 2048×5632 layer."""
    rows = []
    label = SPECIFICATION_SHAPE.label
    for layout in report["options"]["layouts"]:
        tensors = [
            t for t in report.get("tensors", ()) if (t["shape"], t["layout"], t["best"]) == (label, layout, True)
        ]
        if not tensors:
            continue
        tensor = tensors[0]
        elements = SPECIFICATION_SHAPE.rows * SPECIFICATION_SHAPE.cols
        rows.append(target_row(f"{layout}: ratio over INT8", 8 / tensor["bits_per_weight"], "×", 1.4))
        share = 100 * tensor["device_bytes"] / elements
        rows.append(target_row(f"{layout}: device memory over FP16", share / 2, "%", 30, most=True))
        rows.append(target_row(f"{layout}: device memory over INT8", share, "%", None, most=True))
        exact = None if tensor["bit_exact"] is None else float(tensor["bit_exact"])
        rows.append(target_row(f"{layout}: decoded bit for bit", exact, "1 = yes", 1))
        worst = tensor["dequantize_max_error"]
        rows.append(target_row(f"{layout}: dequantization error", worst, "absolute", 1e-4, most=True))
        for row in report.get("encode", ()):
            if row["layout"] == layout and row["where"] == "cpu" and row["threads"] != 1 and row["shape"] == label:
                what = f"{layout}: encode, CPU, {row['threads']} threads"
                rows.append(target_row(what, row["ms"], "ms", 50, most=True))
        for row in report.get("decode", ()):
            if (row["shape"], row["layout"]) == (label, layout):
                ms = row["us"] and row["us"] / 1e3
                rows.append(target_row(f"{layout}: decode to {row['to']}", ms, "ms", 1.0, most=True))
        for row in report.get("streams", ()):
            if row["layout"] == layout and row["work"] == "decode":
                us = row["parallel"]["us"]
                rows.append(target_row(f"{layout}: five layers on streams", us and us / 1e3, "ms", 1.5, most=True))
    return rows


# --- tables ------------------------------------------------------------------


class Table(NamedTuple):
    title: str
    headings: list[str]
    rows: list[list[str]]


def number(value: float | None, digits: int = 2, suffix: str = "") -> str:
    """A cell of a table; a dash for what was not measured."""
    return "–" if value is None else f"{value:.{digits}f}{suffix}"


def microseconds(row: Row | None) -> str:
    """The time of a measurement; with a star where no graph was captured."""
    if row is None:
        return "–"
    star = "" if row["timing"] == "graph" else "*"
    return number(row["us"], 1 if row["us"] < 1000 else 0) + star


def _humming(report: Report) -> list[str]:
    """Humming's products that were measured."""
    found = {row["name"] for row in report.get("linear", ()) if row["us"] is not None}
    return [name for name in HUMMING.values() if name in found]


def humming_label(name: str) -> str:
    """What tables and charts call a product of Humming."""
    return f"Humming {name.rpartition('-')[2].upper()} g128"


def _batch_1(report: Report) -> Table:
    layouts = report["options"]["layouts"]
    headings = ["out × in", "FP16 cuBLAS, µs", "INT8 (Triton), µs", "INT4 g128 (torch), µs"]
    humming = _humming(report)
    headings += [f"{humming_label(name)}, µs" for name in humming]
    for layout in layouts:
        headings += [f"{layout}, µs", "bits", "× FP16", "× INT4"]
    rows = []
    for shape in _shapes_of(report):
        names = ("fp16", "int8", "int4", *humming)
        cells = [shape, *(microseconds(find_linear(report, shape, 1, name)) for name in names)]
        for layout in layouts:
            row = find_linear(report, shape, 1, "kvpack", layout)
            cells += [microseconds(row), number(row["bits_per_weight"] if row else None)]
            cells += [number(ratio(report, shape, 1, layout, over=over)) for over in ("fp16", "int4")]
        rows.append(cells)
    return Table("Product with one activation vector", headings, rows)


def _batches(report: Report) -> Table:
    layouts = report["options"]["layouts"]
    humming = _humming(report)
    headings = ["out × in", "M", "FP16 cuBLAS, µs", "INT4, × FP16"]
    headings += [f"{humming_label(name)}, × FP16" for name in humming]
    headings += [f"{layout}, × FP16" for layout in layouts]
    headings += [f"{layout}, µs" for layout in layouts]
    rows = []
    for shape in _shapes_of(report):
        for m in report["options"]["ms"]:
            if not any((row["shape"], row["m"]) == (shape, m) for row in report["linear"]):
                continue
            cells = [shape, str(m), microseconds(find_linear(report, shape, m, "fp16"))]
            cells += [number(ratio(report, shape, m, None, name=name)) for name in ("int4", *humming)]
            cells += [number(ratio(report, shape, m, layout)) for layout in layouts]
            cells += [microseconds(find_linear(report, shape, m, "kvpack", layout)) for layout in layouts]
            rows.append(cells)
    return Table("Product by number of activation vectors", headings, rows)


def _peers(report: Report) -> Table:
    """Why products of others are missing."""
    rows = [
        [row["name"], row["shape"], str(row["m"]), row["error"] or "not measured"]
        for row in report.get("linear", ())
        if row["us"] is None and row["name"] != "kvpack"
    ]
    return Table("Products of others that are missing", ["name", "out × in", "from M", "reason"], rows)


def _tiles(report: Report) -> Table:
    rows = []
    for row in report.get("linear", ()):
        if row["name"] == "kvpack" and row["m"] == 1:
            base = find_linear(report, row["shape"], 1, "fp16")
            speed = base["us"] / row["us"] if base and row["us"] else None
            cells = [row["shape"], row["layout"], str(row["tile_cols"]), number(row["bits_per_weight"], 3)]
            failed = row["us"] is None
            cells += ["failed" if failed else microseconds(row), number(speed), "yes" if row["best"] else ""]
            rows.append(cells)
    headings = ["out × in", "layout", "tile columns", "bits a weight", "µs", "× FP16", "chosen"]
    return Table("Columns of a tile, M = 1", headings, rows)


def _decode(report: Report) -> Table:
    rows = []
    for row in report.get("decode", ()):
        rate = row["elements_per_s"]
        share = row["fraction_of_bound"]
        rows.append(
            [
                row["shape"],
                row["layout"],
                row["to"],
                microseconds(row) if row["us"] is not None else "failed",
                number(rate and rate / 1e12),
                number(row["bound_us"], 1),
                number(None if share is None else 100 * share, 0),
            ]
        )
    headings = ["out × in", "layout", "to", "µs", "10¹² elements/s", "byte bound, µs", "% of the bound"]
    return Table("Decoding alone", headings, rows)


def _codecs(report: Report) -> Table:
    rows = []
    for row in report.get("codecs", ()):
        decode, encode = row.get("elements_per_s"), row.get("encode_elements_per_s")
        cells = [row["name"], row["source"], number(row.get("bits_per_element"), 3)]
        cells += [number(decode and decode / 1e9, 0), number(encode and encode / 1e9, 0), row.get("error") or ""]
        rows.append(cells)
    headings = ["coder", "source", "bits", "decode, 10⁹ elements/s", "encode, 10⁹ elements/s", "remark"]
    return Table("Other entropy coders", headings, rows)


def _streams(report: Report) -> Table:
    names = {
        "decode": "decode to fp16",
        "linear": "product, kvpack's own path",
        "staged": "decode to fp16, then cuBLAS",
    }
    rows = []
    for row in report.get("streams", ()):
        cells = [names[row["work"]], row["layout"], "–" if row["m"] is None else str(row["m"])]
        cells += [number(row[kind]["us"], 1) for kind in ("serial", "parallel")]
        rows.append([*cells, number(row["speedup"])])
    title = f"Five layers of {SPECIFICATION_SHAPE.label}"
    return Table(title, ["work", "layout", "M", "one after another, µs", "on streams, µs", "×"], rows)


def _encode(report: Report) -> Table:
    rows = []
    for row in report.get("encode", ()):
        where = f"CPU, {row['threads']} threads" if row["where"] == "cpu" else "GPU"
        rate = row["elements_per_s"]
        cells = [row["shape"], row["layout"], where, number(row["ms"], 2)]
        rows.append([*cells, number(rate and rate / 1e9), row["error"] or ""])
    headings = ["out × in", "layout", "where", "ms", "10⁹ elements/s", "remark"]
    return Table("Encoding: integers in, finished blob out", headings, rows)


def _verdict(met: bool | None, goal: float | None) -> str:
    if goal is None:
        return "–"
    return "not measured" if met is None else ("yes" if met else "no")


def _compact(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def goals_table(title: str, rows: Sequence[Row], *, then: bool) -> Table:
    """Rows of :func:`target_row`; with the second aim if there is one."""
    cells = []
    for row in rows:
        sign = "≤" if row["direction"] == "at most" else "≥"
        line = [row["what"], _compact(row["measured"]), row["unit"]]
        for goal, met in (("target", "met"), ("then", "then_met")) if then else (("target", "met"),):
            line += ["–" if row[goal] is None else f"{sign} {_compact(row[goal])}", _verdict(row[met], row[goal])]
        cells.append(line)
    headings = ["what", "measured", "unit", "target", "met"]
    return Table(title, [*headings, "then", "met"] if then else headings, cells)


def copy_table(report: Report) -> Table:
    rows = [[f"{row['bytes'] / 1e9:.2f}", f"{row['us']:.0f}", f"{row['gb_per_s']:.0f}"] for row in report["copy"]]
    return Table("Device copy", ["GB copied", "µs", "GB/s, read plus written"], rows)


def tables(report: Report) -> dict[str, Table]:
    """The report's tables by name; those without rows are left out."""
    found = {
        "batch-1": _batch_1(report),
        "batches": _batches(report),
        "peers": _peers(report),
        "tiles": _tiles(report),
        "decode": _decode(report),
        "codecs": _codecs(report),
        "streams": _streams(report),
        "encode": _encode(report),
        "copy": copy_table(report),
        "targets": goals_table("Targets", report["targets"], then=True),
        "specification": goals_table("The specification's figures", report["specification"], then=False),
    }
    return {name: table for name, table in found.items() if table.rows}


def wrong_results(report: Report) -> list[str]:
    """What kvpack itself got wrong: products and decodes that failed, and tensors that did not come back exactly."""

    def lines() -> Iterator[str]:
        for tensor in report["tensors"]:
            if tensor["bit_exact"] is False or tensor["error"]:
                why = tensor["error"] or "the decoded integers are not those that were coded"
                yield f"{tensor['layout']} {tensor['shape']}, {tensor['tile_cols']} columns: {why}"
        for row in report["linear"]:
            if row["name"] == "kvpack" and row["us"] is None:
                yield f"product, {row['layout']} {row['shape']}, M = {row['m']}: {row['error']}"
        for row in report["decode"]:
            if row["us"] is None:
                yield f"decode to {row['to']}, {row['layout']} {row['shape']}: {row['error']}"

    return list(lines())


def write_report(path: Path, report: Report) -> None:
    """Write a report in one piece, so that a stopped program leaves a whole one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(finite(report), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def finite(value: Any) -> Any:
    """The same with None for numbers that JSON has no way to write."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value
