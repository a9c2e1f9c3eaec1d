"""The report of ``kvpack bench attention``: what is asked for, what is aimed at, and tables of it. Needs no torch.

A report is one JSON object (``schema`` 2) with the fields of every benchmark (what, schema, complete, stopped, note,
command, kvpack.bench.provenance.environment, device, options, seconds, copy: see
:mod:`kvpack.bench.report`) and::

    prefill     a chunk of query tokens to cached pages and to itself: sequences, heads, kv_heads, head_dim, context
                (with the chunk), tokens (of the chunk); name (sdpa_flash, sdpa_cudnn; formats; mixed_BUDGET), budget,
                shares {format: share of the pages}, bytes (of K and V, everything counted), copies (worked on in turn),
                causal (or every token sees all), mask (what told SDPA so), tiles (visited), flop, tflop_per_s,
                + a measurement
    few_tokens  both kernels on few query tokens: sequences, …, tokens, name (decode, prefill), blocks (decode's grid),
                bytes, copies, + a measurement
    observed    decode that adds up how much of the attention each page has, and that does not: sequences, …, tokens,
                name (a format), observed, blocks, bytes, copies, + a measurement
    decode      one query token to pages: sequences, …, tokens, name, budget, shares, bytes, blocks, copies, bound_us,
                fraction_of_bound, + a measurement
    grids       INT4 pages with other grids: sequences, …, tokens, blocks, chosen, + a measurement
    skipped     cases that did not fit: sequences, …, tokens, bytes, limit_bytes
    targets     what was aimed at: what, measured, unit, direction, target, met, then, then_met

Schema 1 had decode, grids, skipped and targets only, and no ``tokens``.

``flop`` are four for each dimension of a head and each pair of a query token and a token that it sees. A *tile* is the
columns (query tokens times heads) of a block of the prefill kernel times a page of which it sees something.

``bound_us`` is the byte roofline: the bytes of all pages, each read once, at the bandwidth of a device copy in the same
run, where bytes read and bytes written both count. A kernel that only reads may be a little faster than that.
``relative_error`` is that of tests/kv/paged_values.py: the largest error of the tokens and heads looked at, beyond half
a unit of fp16, over max(1, largest value) of each, against fp64 attention to the dequantized pages.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from kvpack.bench.report import Report, Row, Table, copy_table, goals_table, microseconds, number, target_row
from kvpack.format.pages import PAGE_TOKENS

SCHEMA = 2
NOTE = (
    "Attention of fp16 queries to fp16 K/V (SDPA) or pages of K and V; decode: one query token for each sequence, "
    "prefill: a chunk of them, causal. Codes of pages are random: for speed, they say nothing about errors of "
    "quantization. 100 % of the roofline: every page is read once, at the bandwidth of a device copy, which counts "
    "what it reads and what it writes."
)
UNIFORM = ("fp16", "int8", "int4", "int3", "int2", "fp8_e4m3")
PEERS = ("sdpa_flash", "sdpa_cudnn")
BUDGETS = (0.2, 0.3, 0.4, 0.5)
MIXED_NAMES = ("int8", "int4", "int3", "int2")
GRID_FORMAT = "int4"


class Case(NamedTuple):
    """Sequences of equal length, to which their last tokens attend."""

    sequences: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int  # tokens of a sequence
    tokens: int = 1  # of them, those that attend

    @property
    def model(self) -> str:
        """All but the tokens."""
        return f"B{self.sequences} {self.heads}:{self.kv_heads} D{self.head_dim}"

    @property
    def label(self) -> str:
        return f"{self.model} S{self.context}" + (f" T{self.tokens}" if self.tokens > 1 else "")

    @property
    def fp16_bytes(self) -> int:
        return 4 * self.sequences * self.kv_heads * self.head_dim * self.context

    @property
    def query_bytes(self) -> int:
        """Bytes of the queries and of the output."""
        return 2 * self.sequences * self.heads * self.head_dim * self.tokens

    def flop(self, causal: bool = True) -> int:
        """Operations of both products, for the pairs that are seen."""
        pairs = self.tokens * self.context - causal * self.tokens * (self.tokens - 1) // 2
        return 4 * pairs * self.head_dim * self.heads * self.sequences


MODELS = ((32, 8, 128), (8, 8, 64))
SEQUENCES = (1, 16)
CONTEXTS = tuple(1024 << i for i in range(8))
QUICK_CONTEXTS = (2048, 16384)
QUICK_BUDGETS = (0.2, 0.4)
# Whole prompts, and a chunk behind cached tokens.
PREFILL_CASES = (
    Case(1, 32, 8, 128, 2048, 2048),
    Case(1, 32, 8, 128, 16384, 1024),
    Case(4, 8, 8, 64, 2048, 2048),
    Case(1, 32, 8, 128, 8192, 8192),
)
QUICK_PREFILL_CASES = PREFILL_CASES[:2]
PREFILL_FORMATS = ("fp16", "int8", "int4")
PREFILL_BUDGETS = (0.3,)
FEW_TOKENS = (1, 2, 4, 8, 16, 32, 64)
FEW_TOKENS_FORMAT = "int8"
FEW_TOKENS_CASES = (Case(1, 32, 8, 128, 4096), Case(16, 32, 8, 128, 4096))
OBSERVED_FORMATS = ("int8", "int4")
OBSERVED_CASES = tuple(Case(sequences, 32, 8, 128, context) for context in (1024, 4096, 16384) for sequences in (1, 16))
_MAX_CONTEXT = 1 << 22
_MAX_SEQUENCES = 1024
_MAX_HEADS = 1024


def mixed(budget: float) -> str:
    """The name of a mixture."""
    return f"mixed_{budget:g}"


@dataclass(frozen=True)
class AttentionBenchOptions:
    """What ``kvpack bench attention`` measures. Models, sequences, contexts and budgets are decode's."""

    models: tuple[tuple[int, int, int], ...] = MODELS
    sequences: tuple[int, ...] = SEQUENCES
    contexts: tuple[int, ...] = CONTEXTS
    budgets: tuple[float, ...] = BUDGETS
    prefill: tuple[Case, ...] = PREFILL_CASES
    few_tokens: tuple[Case, ...] = FEW_TOKENS_CASES
    observed: tuple[Case, ...] = OBSERVED_CASES
    samples: int = 11
    sample_ms: float = 0.5
    case_ms: float = 400.0
    rotate_bytes: int = 200_000_000  # of pages in turn: several times an L2 cache
    memory_bytes: int = 60_000_000_000  # of all pages of a case together
    quick: bool = False
    time_limit_s: float | None = None

    @property
    def cases(self) -> list[Case]:
        """Short contexts first, so that a time limit leaves all models."""
        return [
            Case(sequences, *model, context)
            for context in self.contexts
            for model in self.models
            for sequences in self.sequences
        ]

    def as_dict(self) -> Row:
        return {
            "models": [list(model) for model in self.models],
            "sequences": list(self.sequences),
            "contexts": list(self.contexts),
            "formats": list(UNIFORM),
            "budgets": list(self.budgets),
            "prefill": [case._asdict() for case in self.prefill],
            "few_tokens": [case._asdict() for case in self.few_tokens],
            "observed": [case._asdict() for case in self.observed],
            "samples": self.samples,
            "rotate_bytes": self.rotate_bytes,
            "memory_bytes": self.memory_bytes,
            "quick": self.quick,
            "time_limit_s": self.time_limit_s,
        }


def _integers(text: str, low: int, high: int) -> tuple[int, ...]:
    numbers = []
    for part in text.split(","):
        digits = part.strip().lower()
        factor = 1024 if digits.endswith("k") else 1
        digits = digits.removesuffix("k")
        if not digits.isdecimal() or not low <= factor * int(digits) <= high:
            raise ValueError(f"{part.strip()!r} is not a number from {low} to {high}")
        numbers.append(factor * int(digits))
    return tuple(dict.fromkeys(numbers))


def _model(text: str) -> tuple[int, int, int]:
    heads, _, rest = text.replace("×", "x").partition(":")
    kv_heads, _, head_dim = rest.partition("x")
    if not (heads.isdecimal() and kv_heads.isdecimal() and head_dim.isdecimal()):
        raise ValueError(f"{text!r} is not HEADS:KV_HEADSxHEAD_DIM")
    model = int(heads), int(kv_heads), int(head_dim)
    if not (1 <= model[1] <= model[0] <= _MAX_HEADS) or model[0] % model[1]:
        raise ValueError(f"{text!r}: query heads are a multiple of the KV heads, at most {_MAX_HEADS}")
    if model[2] not in (64, 80, 96, 112, 128):  # what flash attention and the pages both take
        raise ValueError(f"{text!r}: the head dimension is 64, 80, 96, 112 or 128")
    return model


def parse_options(
    *,
    models: str | None = None,
    sequences: str | None = None,
    contexts: str | None = None,
    quick: bool = False,
    time_limit_s: float | None = None,
) -> AttentionBenchOptions:
    """Options from comma-separated lists; what is left out has the default of a full or a quick run.

    The cases of the other sections are fixed: those of the chosen models.

    >>> parse_options(models="32:8x128", contexts="1k,4096").contexts
    (1024, 4096)

    Raises:
        ValueError: something that there is not.
    """
    chosen = MODELS if models is None else tuple(dict.fromkeys(_model(part.strip()) for part in models.split(",")))
    batches = SEQUENCES if sequences is None else _integers(sequences, 1, _MAX_SEQUENCES)
    lengths: tuple[int, ...] = QUICK_CONTEXTS if quick else CONTEXTS
    if contexts is not None:
        lengths = _integers(contexts, PAGE_TOKENS, _MAX_CONTEXT)
        for length in lengths:
            if length % PAGE_TOKENS:
                raise ValueError(f"context {length} is not a multiple of {PAGE_TOKENS}, the tokens of a page")
    prefill, few_tokens, observed = (
        tuple(case for case in cases if (case.heads, case.kv_heads, case.head_dim) in chosen)
        for cases in (QUICK_PREFILL_CASES if quick else PREFILL_CASES, FEW_TOKENS_CASES, OBSERVED_CASES)
    )
    whole = AttentionBenchOptions(
        chosen, batches, lengths, BUDGETS, prefill, few_tokens, observed, time_limit_s=time_limit_s
    )
    if quick:
        return replace(whole, budgets=QUICK_BUDGETS, samples=7, sample_ms=0.3, case_ms=100.0, quick=True)
    return whole


# --- finding rows ------------------------------------------------------------


def case_of(row: Row) -> Case:
    return Case(*(row[name] for name in Case._fields if name in row))


def cases_of(report: Report, section: str = "decode") -> list[Case]:
    """The cases that were measured, those of a model together."""
    found = dict.fromkeys(case_of(row) for row in report.get(section, ()))
    models = list(dict.fromkeys(case.model for case in found))
    return sorted(found, key=lambda case: (models.index(case.model), case.context, case.tokens))


def find(report: Report, case: Case, name: str, section: str = "decode", **fields: Any) -> Row | None:
    """A measurement with these fields; None if it failed or was not made."""
    for row in report.get(section, ()):
        if row["name"] == name and case_of(row) == case and all(row[key] == value for key, value in fields.items()):
            return row if row["us"] is not None else None
    return None


def best_sdpa(report: Report, case: Case, section: str = "decode") -> Row | None:
    """The faster one of torch's kernels."""
    found = [row for name in PEERS if (row := find(report, case, name, section)) is not None]
    return min(found, key=lambda row: row["us"], default=None)


def speed(report: Report, case: Case, name: str, section: str = "decode", **fields: Any) -> float | None:
    """How many times faster than the best SDPA."""
    mine, other = find(report, case, name, section, **fields), best_sdpa(report, case, section)
    return other["us"] / mine["us"] if mine and other else None


def causal_overhead(report: Report, case: Case, name: str) -> float | None:
    """Prefill's time for a visited tile, causal over not causal."""
    causal, whole = (find(report, case, name, "prefill", causal=causal) for causal in (True, False))
    return causal["us"] / causal["tiles"] / (whole["us"] / whole["tiles"]) if causal and whole else None


def observed_overhead(report: Report, case: Case, name: str) -> float | None:
    """Decode's time with the sums of each page over that without."""
    observed, plain = (find(report, case, name, "observed", observed=observed) for observed in (True, False))
    return observed["us"] / plain["us"] if observed and plain else None


class Gain(NamedTuple):
    """A mixture against uniform INT8 pages."""

    speed: float  # INT8 time over the mixture's
    bytes: float  # INT8 bytes over the mixture's

    @property
    def share(self) -> float:
        """How much of what the bytes promise is reached."""
        return self.speed / self.bytes


def gain(report: Report, case: Case, budget: float) -> Gain | None:
    mine, other = find(report, case, mixed(budget)), find(report, case, "int8")
    return Gain(other["us"] / mine["us"], other["bytes"] / mine["bytes"]) if mine and other else None


# --- targets -----------------------------------------------------------------

LARGE = Case(16, 32, 8, 128, 16384)
SMALL = Case(16, 8, 8, 64, 2048)
MIXED_CONTEXTS = (1024, 16384)  # from, to
PREFILL_NAMES = (*PREFILL_FORMATS, *map(mixed, PREFILL_BUDGETS))


def _worst(found: Mapping[str, float | None], choose: Callable[..., str]) -> tuple[str, float | None]:
    """What has the largest or smallest value, and that; nothing, if one is missing."""
    known = {what: value for what, value in found.items() if value is not None}
    if not known or len(known) < len(found):
        return "not all measured", None
    what = choose(known, key=known.__getitem__)
    return f"worst: {what}", known[what]


def evaluate_targets(report: Report) -> list[Row]:
    """Each target with what was measured. What was not measured is neither met nor missed (None)."""
    rows = []
    measured = cases_of(report)
    if LARGE in measured:
        for name, first, then in (("int8", 1.6, 1.8), ("fp8_e4m3", 1.6, 1.8), ("int4", 2.5, 3.3)):
            faster = speed(report, LARGE, name)
            rows.append(target_row(f"{name}, {LARGE.label}, against the best SDPA", faster, "×", first, then))
        row = find(report, LARGE, "int4")
        share = 100 * row["fraction_of_bound"] if row else None
        rows.append(target_row(f"int4, {LARGE.label}, of the byte roofline", share, "%", 68, 90))
    low, high = MIXED_CONTEXTS
    for sequences in dict.fromkeys(case.sequences for case in measured):
        gains = {
            f"{budget:g} of fp16, {case.label}": gain(report, case, budget)
            for case in measured
            if case.sequences == sequences and low <= case.context <= high
            for budget in report["options"]["budgets"]
        }
        if gains:
            where = f"8/4/3/2, B{sequences}, contexts to {high}"
            worst, least = _worst({what: one and one.speed for what, one in gains.items()}, min)
            rows.append(target_row(f"{where}: against int8; {worst}", least, "×", 0.97))
            worst, least = _worst({what: one and one.share for what, one in gains.items()}, min)
            rows.append(target_row(f"{where}: of what bytes promise; {worst}", least, "share", None, 0.8))
    if SMALL in measured:
        for name, goal in (("int8", None), ("fp8_e4m3", None), ("int4", 6.0)):
            row = find(report, SMALL, name)
            us = row["us"] if row else None
            rows.append(target_row(f"{name}, {SMALL.label}", us, "µs", 10.0, goal, most=True))
    for case in cases_of(report, "prefill"):
        overheads = {name: causal_overhead(report, case, name) for name in PREFILL_NAMES}
        worst, most = _worst(overheads, max)
        what = f"prefill, {case.label}: causal over not causal, a visited tile; {worst}"
        rows.append(target_row(what, most, "×", 1.05, most=True))
    observed = cases_of(report, "observed")
    for sequences in dict.fromkeys(case.sequences for case in observed):
        overheads = {
            f"{name}, {case.label}": observed_overhead(report, case, name)
            for case in observed
            if case.sequences == sequences
            for name in OBSERVED_FORMATS
        }
        worst, most = _worst(overheads, max)
        what = f"decode, B{sequences}: observed over not observed; {worst}"
        rows.append(target_row(what, most, "×", 1.03, most=True))
    return rows


# --- tables ------------------------------------------------------------------

_CASE_HEADINGS = ["B", "heads", "D", "context"]


_CHUNK_HEADINGS = [*_CASE_HEADINGS, "query tokens"]


def _case_cells(case: Case) -> list[str]:
    return [str(case.sequences), f"{case.heads}:{case.kv_heads}", str(case.head_dim), str(case.context)]


def _chunk_cells(case: Case) -> list[str]:
    return [*_case_cells(case), str(case.tokens)]


def _names(report: Report) -> list[str]:
    return [*UNIFORM, *(mixed(budget) for budget in report["options"]["budgets"])]


def _heading(name: str) -> str:
    return name.replace("mixed_", "8/4/3/2 at ")


def _times(report: Report) -> Table:
    rows = []
    for case in cases_of(report):
        peers = [microseconds(find(report, case, name)) for name in PEERS]
        mine = [microseconds(find(report, case, name)) for name in _names(report)]
        rows.append([*_case_cells(case), *peers, *mine])
    headings = [*_CASE_HEADINGS, "flash", "cuDNN", *map(_heading, _names(report))]
    return Table("Decode attention, µs", headings, rows)


def _speeds(report: Report) -> Table:
    rows = []
    for case in cases_of(report):
        best = best_sdpa(report, case)
        cells = [microseconds(best), *(number(speed(report, case, name)) for name in _names(report))]
        rows.append([*_case_cells(case), *cells])
    headings = [*_CASE_HEADINGS, "best SDPA, µs", *map(_heading, _names(report))]
    return Table("Times as fast as the best SDPA on fp16", headings, rows)


def _rates(report: Report) -> Table:
    def cell(row: Row | None) -> str:
        if row is None:
            return "–"
        return f"{row['bytes'] / row['us'] / 1e6:.2f} ({100 * row['fraction_of_bound']:.0f} %)"

    rows = [
        [*_case_cells(case), *(cell(one) for one in [best_sdpa(report, case), *found])]
        for case in cases_of(report)
        if (found := [find(report, case, name) for name in _names(report)])
    ]
    headings = [*_CASE_HEADINGS, "best SDPA", *map(_heading, _names(report))]
    return Table("TB/s of pages read (% of the byte roofline)", headings, rows)


def _bytes(report: Report) -> Table:
    rows = []
    for case in cases_of(report):
        found = [find(report, case, name) for name in _names(report)]
        rows.append([*_case_cells(case), *(number(row["bytes"] / 1e6 if row else None, 1) for row in found)])
    return Table("MB of pages", [*_CASE_HEADINGS, *map(_heading, _names(report))], rows)


def _mixtures(report: Report) -> Table:
    rows = []
    for case in cases_of(report):
        cells = [microseconds(find(report, case, "int8"))]
        for budget in report["options"]["budgets"]:
            found = gain(report, case, budget)
            cells.append(microseconds(find(report, case, mixed(budget))))
            cells.append(
                "–" if found is None else f"{found.speed:.2f} of {found.bytes:.2f} ({100 * found.share:.0f} %)"
            )
        rows.append([*_case_cells(case), *cells])
    headings = [*_CASE_HEADINGS, "int8, µs"]
    for budget in report["options"]["budgets"]:
        headings += [f"{budget:g} of fp16, µs", "× int8 of int8 bytes / bytes"]
    return Table("Mixtures of 8, 4, 3 and 2 bits against INT8", headings, rows)


def _shares(report: Report) -> Table:
    """What mixtures consist of, at the largest case of each head dimension: elsewhere pages are too few to differ."""
    rows = []
    cases = cases_of(report)
    for head_dim in dict.fromkeys(case.head_dim for case in cases):
        case = max((case for case in cases if case.head_dim == head_dim), key=lambda case: case.fp16_bytes)
        for budget in report["options"]["budgets"]:
            row = find(report, case, mixed(budget))
            if row is not None:
                shares = [number(100 * row["shares"].get(name, 0.0), 1) for name in MIXED_NAMES]
                spent = number(100 * row["bytes"] / case.fp16_bytes, 2)
                rows.append([str(head_dim), f"{budget:g}", *shares, spent])
    headings = ["D", "budget", *(f"{name}, % of pages" for name in MIXED_NAMES), "% of fp16 bytes"]
    return Table("What mixtures consist of", headings, rows)


def _grids(report: Report) -> Table:
    rows = []
    for case in cases_of(report):
        found = [row for row in report["grids"] if case_of(row) == case and row["us"] is not None]
        chosen = [row for row in found if row["chosen"]]
        others = [f"{row['blocks']}: {microseconds(row)}" for row in found if not row["chosen"]]
        if chosen:
            cells = [str(chosen[0]["blocks"]), microseconds(chosen[0]), ", ".join(others)]
            rows.append([*_case_cells(case), *cells])
    return Table("Blocks of the grid, INT4", [*_CASE_HEADINGS, "chosen", "µs", "others: µs"], rows)


def _prefill(report: Report) -> Table:
    rows = []
    for case in cases_of(report, "prefill"):
        for row in report["prefill"]:
            if case_of(row) == case and row["causal"]:
                name = row["name"]
                measured = find(report, case, name, "prefill", causal=True)
                cells = [_heading(name), microseconds(measured), number(row["tflop_per_s"], 0)]
                cells.append("–" if name in PEERS else number(speed(report, case, name, "prefill", causal=True)))
                remark = ": ".join(one for one in (row["mask"], row["error"]) if one)
                rows.append([*_chunk_cells(case), *cells, remark])
    headings = [*_CHUNK_HEADINGS, "pages or SDPA", "µs", "TFLOP/s", "× best SDPA", "remark"]
    return Table("Prefill attention, causal", headings, rows)


def _causal(report: Report) -> Table:
    rows = []
    for case in cases_of(report, "prefill"):
        for name in PREFILL_NAMES:
            cells = [_heading(name)]
            for causal in (True, False):
                row = find(report, case, name, "prefill", causal=causal)
                cells += [microseconds(row), str(row["tiles"]) if row else "–"]
                cells.append(number(1e3 * row["us"] / row["tiles"] if row else None))
            rows.append([*_chunk_cells(case), *cells, number(causal_overhead(report, case, name), 3)])
    headings = [*_CHUNK_HEADINGS, "pages", "causal, µs", "tiles", "ns a tile", "every token sees all, µs", "tiles"]
    return Table("Prefill's time for a visited tile", [*headings, "ns a tile", "causal over that"], rows)


def _few_tokens(report: Report) -> Table:
    rows = []
    for case in cases_of(report, "few_tokens"):
        decode, prefill = (find(report, case, name, "few_tokens") for name in ("decode", "prefill"))
        ratio = decode["us"] / prefill["us"] if decode and prefill else None
        rows.append([*_chunk_cells(case), microseconds(decode), microseconds(prefill), number(ratio)])
    headings = [*_CHUNK_HEADINGS, "decode kernel, µs", "prefill kernel, µs", "decode over prefill"]
    return Table(f"Few query tokens by both kernels, {FEW_TOKENS_FORMAT}", headings, rows)


def _observed(report: Report) -> Table:
    rows = []
    for case in cases_of(report, "observed"):
        for name in OBSERVED_FORMATS:
            found = [find(report, case, name, "observed", observed=observed) for observed in (False, True)]
            overhead = observed_overhead(report, case, name)
            percent = number(None if overhead is None else 100 * (overhead - 1), 1)
            rows.append([*_case_cells(case), name, *map(microseconds, found), percent])
    headings = [*_CASE_HEADINGS, "pages", "not observed, µs", "observed, µs", "overhead, %"]
    return Table("Decode that adds up how much of the attention each page has", headings, rows)


def _skipped(report: Report) -> Table:
    rows = [
        [*_chunk_cells(case_of(row)), number(row["bytes"] / 1e9, 1), number(row["limit_bytes"] / 1e9, 1)]
        for row in report["skipped"]
    ]
    return Table("Left out: too large", [*_CHUNK_HEADINGS, "GB", "GB at most"], rows)


def tables(report: Report) -> dict[str, Table]:
    """The report's tables by name; those without rows are left out."""
    found = {
        "prefill": _prefill(report),
        "causal": _causal(report),
        "few-tokens": _few_tokens(report),
        "observed": _observed(report),
        "times": _times(report),
        "speeds": _speeds(report),
        "rates": _rates(report),
        "bytes": _bytes(report),
        "mixtures": _mixtures(report),
        "shares": _shares(report),
        "grids": _grids(report),
        "skipped": _skipped(report),
        "copy": copy_table(report),
        "targets": goals_table("Targets", report["targets"], then=True),
    }
    return {name: table for name, table in found.items() if table.rows}


def wrong_results(report: Report) -> list[str]:
    """Launches of kvpack's that failed, or were wrong."""
    lines = [
        f"{section}, {case_of(row).label}, {row['name']}: {row['error']}"
        for section in ("prefill", "few_tokens", "observed", "decode")
        for row in report[section]
        if row["us"] is None and row["name"] not in PEERS
    ]
    lines += [
        f"{case_of(row).label}, {row['blocks']} blocks: {row['error']}" for row in report["grids"] if row["us"] is None
    ]
    return lines
