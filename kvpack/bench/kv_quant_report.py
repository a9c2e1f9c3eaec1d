"""The report of ``kvpack bench kv-quant``: what is asked for, and tables of it. Needs no torch.

A report is one JSON object (``schema`` 1) with the fields of every benchmark (what, schema, complete, stopped, note,
command, kvpack.bench.provenance.environment, device, options, seconds, copy: see
:mod:`kvpack.bench.report`) and::

    processor  the reference on all cores: rows, columns, format, axis, threads, measured_rows, quantize_ms,
               dequantize_ms. Of matrices with more than ``measured_rows`` rows those are measured, and the times are
               multiplied
    matrices   rows, columns, format, axis, variant, quantize and dequantize (measurements), total_ms,
               quantize_fraction and dequantize_fraction of the copy's bandwidth, quantize_moved_fraction,
               quantize_speedup and dequantize_speedup over the CPU
    quality    source, matrices, rows, columns, format, axis, l2, relative_l2, max_abs, attention

Fractions count the fewest bytes that could be moved: the matrix once, codes and scales once. Quantizing reads the
matrix twice, for scales and for codes, except by token and vectorized; what the second reading does not find in the L2
cache lowers the fraction. From fp16 to 8 bits that leaves 60 % of what a copy reaches. ``quantize_moved_fraction``
counts both readings.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kvpack.bench.report import Report, Row, Table, copy_table, number

SCHEMA = 1
VARIANTS = ("naive", "tiled", "coarsened", "vectorized")
NOTE = (
    "Matrices are fp16 and normally distributed: for speed. Quantizing is scales and codes together. Fractions count "
    "the matrix once, although it is read twice, for scales and for codes (by token and vectorized: once)."
)
RANDOM_SOURCE = "random normal: says nothing about a model"


class Size(NamedTuple):
    """A matrix of so many tokens and channels."""

    rows: int
    columns: int

    @property
    def label(self) -> str:
        return f"{self.rows}×{self.columns}"


class Case(NamedTuple):
    """A size to be quantized in one way."""

    size: Size
    format: str
    axis: str


# The sizes of the classic comparison.
SIZES = (
    Size(1024, 64),
    Size(2048, 128),
    Size(16384, 256),
    Size(65536, 256),
    Size(131072, 256),
    Size(131072, 1024),
    Size(131072, 2048),
    Size(131072, 4096),
    Size(131072, 8192),
    Size(262144, 128),
)
QUICK_SIZES = (Size(2048, 128), Size(131072, 1024))
# The size at which the other formats and the other axis are measured as well.
FORMATS_SIZE = Size(131072, 1024)
OTHER_WAYS = (
    ("int4", "channel"),
    ("int3", "channel"),
    ("int2", "channel"),
    ("fp8_e4m3", "channel"),
    ("fp8_e5m2", "channel"),
    ("int8", "token"),
    ("int4", "token"),
)
_MAX_ROWS, _MAX_COLUMNS, _MAX_ELEMENTS = 1 << 24, 1 << 16, 1 << 31


@dataclass(frozen=True)
class KvQuantOptions:
    """What ``kvpack bench kv-quant`` measures."""

    sizes: tuple[Size, ...] = SIZES
    samples: int = 15
    sample_ms: float = 1.0
    case_ms: float = 400.0
    kv: str | None = None
    time_limit_s: float | None = None

    def cases(self, size: Size) -> Iterator[Case]:
        """Eight bits by channel, and at one size the other ways."""
        yield Case(size, "int8", "channel")
        if size == FORMATS_SIZE:
            for page_format, axis in OTHER_WAYS:
                yield Case(size, page_format, axis)

    def as_dict(self) -> Row:
        return {
            "sizes": [list(size) for size in self.sizes],
            "samples": self.samples,
            "kv": self.kv,
            "time_limit_s": self.time_limit_s,
        }


def parse_options(
    *, sizes: str | None = None, quick: bool = False, kv: str | None = None, time_limit_s: float | None = None
) -> KvQuantOptions:
    """Options from a comma-separated list of TxD; what is left out has the default of a full or a quick run.

    >>> parse_options(sizes="1024x64,300x20").sizes[1].label
    '300×20'

    Raises:
        ValueError: a size that there is not.
    """
    chosen: tuple[Size, ...] = QUICK_SIZES if quick else SIZES
    if sizes is not None:
        chosen = tuple(dict.fromkeys(_size(part.strip()) for part in sizes.split(",")))
    if quick:
        return KvQuantOptions(chosen, samples=9, sample_ms=0.5, case_ms=100.0, kv=kv, time_limit_s=time_limit_s)
    return KvQuantOptions(chosen, kv=kv, time_limit_s=time_limit_s)


def _size(text: str) -> Size:
    rows, separator, columns = text.replace("×", "x").partition("x")
    if not (separator and rows.isdecimal() and columns.isdecimal()):
        raise ValueError(f"{text!r} is not TxD")
    size = Size(int(rows), int(columns))
    if not (1 <= size.rows <= _MAX_ROWS and 1 <= size.columns <= _MAX_COLUMNS):
        raise ValueError(f"{text!r}: T is 1 to {_MAX_ROWS}, D 1 to {_MAX_COLUMNS}")
    if size.rows * size.columns > _MAX_ELEMENTS:
        raise ValueError(f"{text!r} has more than {_MAX_ELEMENTS} elements")
    return size


def find_cpu(report: Report, case: Case) -> Row | None:
    """What the CPU took for a case."""
    for row in report["processor"]:
        if (row["rows"], row["columns"], row["format"], row["axis"]) == (*case.size, case.format, case.axis):
            return row
    return None


def _case(row: Row) -> Case:
    return Case(Size(row["rows"], row["columns"]), row["format"], row["axis"])


# --- tables ------------------------------------------------------------------

_HEADINGS = [
    "variant",
    "quantize, ms",
    "% of copy",
    "% with both readings",
    "dequantize, ms",
    "% of copy",
    "total, ms",
    "quantize, × CPU",
    "dequantize, × CPU",
]


def _milliseconds(row: Row) -> str:
    return number(row["us"] and row["us"] / 1e3, 4)


def _cells(row: Row) -> list[str]:
    return [
        row["variant"],
        _milliseconds(row["quantize"]),
        number(row["quantize_fraction"] and 100 * row["quantize_fraction"], 0),
        number(row["quantize_moved_fraction"] and 100 * row["quantize_moved_fraction"], 0),
        _milliseconds(row["dequantize"]),
        number(row["dequantize_fraction"] and 100 * row["dequantize_fraction"], 0),
        number(row["total_ms"], 4),
        number(row["quantize_speedup"], 0),
        number(row["dequantize_speedup"], 0),
    ]


def _classic(report: Report) -> Table:
    rows = [row for row in report["matrices"] if (row["format"], row["axis"]) == ("int8", "channel")]
    cells = [[_case(row).size.label, *_cells(row)] for row in rows]
    return Table("INT8, a scale for each channel", ["T × D", *_HEADINGS], cells)


def _formats(report: Report) -> Table:
    rows = [row for row in report["matrices"] if _case(row).size == FORMATS_SIZE]
    cells = [[row["format"], row["axis"], *_cells(row)] for row in rows]
    return Table(f"Formats and axes, {FORMATS_SIZE.label}", ["format", "scales by", *_HEADINGS], cells)


def _cpu(report: Report) -> Table:
    cells = [
        [
            _case(row).size.label,
            row["format"],
            row["axis"],
            str(row["threads"]),
            number(row["quantize_ms"]),
            number(row["dequantize_ms"]),
            "" if row["measured_rows"] == row["rows"] else f"{row['measured_rows']} rows measured, times in proportion",
        ]
        for row in report["processor"]
    ]
    headings = ["T × D", "format", "scales by", "threads", "quantize, ms", "dequantize, ms", "remark"]
    return Table("The CPU, scales and codes on all threads", headings, cells)


def _quality(report: Report) -> Table:
    cells = [
        [
            row["source"],
            f"{row['matrices']} of {_case(row).size.label}" if row["matrices"] > 1 else _case(row).size.label,
            row["format"],
            row["axis"],
            number(row["l2"], 3),
            number(100 * row["relative_l2"], 3),
            number(row["max_abs"], 5),
            number(row["attention"], 5),
        ]
        for row in report["quality"]
    ]
    headings = ["matrix", "T × D", "format", "scales by", "L2 error", "% of the norm", "largest error"]
    return Table("Errors", [*headings, "mean |Q·K − Q·K̃|"], cells)


def tables(report: Report) -> dict[str, Table]:
    """The report's tables by name; those without rows are left out."""
    found = {
        "classic": _classic(report),
        "formats": _formats(report),
        "cpu": _cpu(report),
        "quality": _quality(report),
        "copy": copy_table(report),
    }
    return {name: table for name, table in found.items() if table.rows}


def wrong_results(report: Report) -> list[str]:
    """Kernels that failed, or whose bytes are not those of the CPU."""
    return [
        f"{_case(row).size.label}, {row['format']} by {row['axis']}, {row['variant']}, {work}: {row[work]['error']}"
        for row in report["matrices"]
        for work in ("quantize", "dequantize")
        if row[work]["us"] is None
    ]


def fractions(report: Report, variant: str, work: str) -> Sequence[tuple[Size, float]]:
    """(size, fraction of the copy's bandwidth) of one variant at INT8 by channel, where it was measured."""
    return [
        (_case(row).size, row[f"{work}_fraction"])
        for row in report["matrices"]
        if (row["format"], row["axis"], row["variant"]) == ("int8", "channel", variant)
        and row[f"{work}_fraction"] is not None
    ]
