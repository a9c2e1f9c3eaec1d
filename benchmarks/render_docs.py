"""Put the figures of benchmarks/results into README.md and the pages below docs.

    python benchmarks/render_docs.py            # rewrite the tables between the <!-- figures:NAME --> marks
    python benchmarks/render_docs.py --check    # exit 1 if a document does not show its results

No number in those tables is typed by hand. The check also fails if a table of ``FIGURES`` is in no document, or if a
result file is behind no table.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable
from functools import wraps
from pathlib import Path
from typing import Any

import generation_report
import kv_quality_report
import kv_quantizers_report

from kvpack.bench import attention_report as bench_attention_report
from kvpack.bench import kv_quant_report as bench_kv_quant_report
from kvpack.bench import report as bench_report
from kvpack.bench import snapshot_report as bench_snapshot_report
from kvpack.bench.report import Table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
_BLOCK = re.compile(r"(<!-- figures:([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)

Row = dict[str, Any]


_READ: set[str] = set()  # names of the result files that were read


class NoResult(Exception):
    """A benchmark has no result file; the message names it."""


def newest(name: str) -> dict[str, Any]:
    """The newest result of a benchmark; their names begin with a date."""
    found = sorted(RESULTS.glob(f"*-{name}.json"))
    if not found:
        raise NoResult(f"benchmarks/results has no `{name}` yet.")
    _READ.add(found[-1].name)
    result: dict[str, Any] = json.loads(found[-1].read_text())
    return result


def if_measured(render: Callable[[], str]) -> Callable[[], str]:
    """Nothing until there is a result."""

    @wraps(render)
    def rendered() -> str:
        try:
            return render()
        except NoResult:
            return ""

    return rendered


def table(headings: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}".replace("-", "−")


def _shown_kl(row: dict[str, Any]) -> str:
    return f"{_number(row['kl'], 4)} ± {row['kl_standard_error']:.4f}"


def origin(result: dict[str, Any]) -> str:
    device = result.get("device", "cpu")
    model = f"; model on {device}" if device != "cpu" else ""
    commit = (result.get("commit") or "unknown")[:10]
    machine = f"{result['cpu']}, {result['cores']} cores{model}"
    return f"\n`{result['command']}` · {result['date']} · {machine} · commit {commit}\n"


# Until then the preset of that name was INT8 with a scale for each row.
_NEAR_LOSSLESS_SINCE = "2026-11-29"


def setting_name(result: dict[str, Any], setting: str) -> str:
    """What a setting that was measured is called now."""
    if str(result["date"]) < _NEAR_LOSSLESS_SINCE:
        setting = setting.replace("near-lossless", "int8-row")
    return setting


def minilm_rates(short: bool) -> str:
    result = newest("minilm-rate")
    rows = []
    for row in result["rates"]:
        gap = row.get("entropack_noise_db")
        if short and row["setting"] not in (
            "near-lossless",
            "bits 5.7",
            "bits 4.25",
            "bits 3",
            "int4-g128",
            "int3-g128",
        ):
            continue
        name = setting_name(result, row["setting"]).replace("bits ", "`--bits ")
        name += "`" if name.startswith("`") else ""
        cells = [name, _number(row["bits"], 3), _number(row["noise_db"], 2)]
        if not short:
            cells += [_number(row.get("entropy_bits"), 3), _number(gap, 2)]
            cells += [_number(None if gap is None else row["noise_db"] - gap, 2), str(row.get("outliers", "–"))]
        rows.append(cells)
    headings = ["setting", "bits a weight", "noise, dB"]
    if not short:
        headings += ["entropy", "EntroPack 0.1.5, dB", "difference", "outliers"]
    return table(headings, rows) + ("" if short else origin(result))


def minilm_layouts() -> str:
    result = newest("minilm-rate")
    rows = [
        [
            str(row["element_bits"]),
            row["layout"],
            _number(row["bound"], 3),
            _number(row["split_bound"], 3),
            _number(row["bits"], 3),
            _number(row["overhead"], 3),
            _number(100 * (row["bits"] - row["overhead"] - row["bound"]) / row["bound"], 2),
        ]
        for row in result["layouts"]
    ]
    headings = ["element bits", "layout", "entropy bound", "bound of the split", "achieved", "lanes, tables, metadata"]
    return table([*headings, "rest over the bound, %"], rows) + origin(result)


def minilm_ideas() -> str:
    result = newest("minilm-rate")
    rows = [
        [
            _number(row["target_bits"], 3),
            "on" if row["rate_weight"] else "off",
            _number(row["noise_db_scale_is_step"], 2),
            _number(row["noise_db_least_squares"], 2),
        ]
        for row in result["ideas"]
    ]
    text = table(["bits", "rounding for rate", "noise, scale = step", "noise, least-squares scale"], rows)
    rows = [[r["allocation"], _number(r["bits"], 3), _number(r["noise_db"], 2)] for r in result["allocations"]]
    text += "\n" + table(["allocation", "bits", "noise (mean of ratios), dB"], rows)
    rows = [[str(r["tile_cols"]), _number(r["bits"], 3), _number(r["noise_db"], 2)] for r in result["tiles"]]
    return text + "\n" + table(["columns of a tile", "bits", "noise, dB"], rows) + origin(result)


def books(short: bool, name: str = "books-quality") -> str:
    result = newest(name)
    rows = []
    for row in result["rows"]:
        if short and row["setting"] not in ("tensor:3.5", "tensor:4.25", "tensor:5", "near-lossless", "int4-g128"):
            continue
        name = (
            setting_name(result, row["setting"])
            .replace("tensor:", "`--bits ")
            .replace("model:", "`--allocation model --bits ")
            .replace(":", " --layout ")
        )
        name += "`" if name.startswith("`") else ""
        cells = [name, _number(row["bits"], 3), f"{row['kl']:.4f}", _number(100 * row["same_top"], 1)]
        cells.append(_number(row["perplexity"], 2))
        if not short:
            cells.append(_number(row["noise_db"], 2))
        rows.append(cells)
    headings = ["setting", "bits a weight", "KL to the original", "same top token, %", "perplexity"]
    text = table(headings if short else [*headings, "noise, dB"], rows)
    text += f"\nThe original's perplexity is {result['original_perplexity']:.2f}"
    whole = result["perplexity_windows"] == (result["tokens_in_text"] - 1) // result["window_tokens"]
    text += f" ({result['perplexity_windows']} windows of {result['window_tokens']} tokens"
    text += ": the whole text)." if whole else ")."
    return text + "\n" + ("" if short else origin(result))


def books_default() -> str:
    texts = []
    for name in ("books-quality-default", "books-quality-default-32-windows"):
        result = newest(name)
        rows = [
            [
                row["setting"].replace("tensor:", "`--bits ").replace("model:", "`--allocation model --bits ") + "`",
                str(result["kl_windows"]),
                f"{row['kl']:.4f}",
                f"{row['kl_standard_error']:.4f}",
            ]
            for row in result["rows"]
        ]
        texts.append(table(["setting", "windows", "KL to the original", "± s.e."], rows) + origin(result))
    return "\n".join(texts)


def codec() -> str:
    result = newest("bench-codec")
    rows = [
        [
            row["layout"],
            str(row["threads"]),
            _number(row["bits_per_weight"], 3),
            _number(row["encode_ms"], 1),
            _number(row["encode_mweights_per_s"], 0),
            _number(row["decode_ms"], 1),
            _number(row["decode_mweights_per_s"], 0),
        ]
        for row in result["rows"]
    ]
    headings = ["layout", "threads", "bits", "encode, ms", "M weights/s", "decode, ms", "M weights/s"]
    return table(headings, rows) + f"\n`kvpack bench codec --json` · {result['cpu']}\n"


def memory() -> str:
    result = newest("memory")
    rows = [
        [
            _number(row["gigabytes"], 2),
            _number(row["seconds"], 1),
            _number(row["seconds"] / row["gigabytes"], 2),
            _number(row["peak_anonymous_mb"], 0),
        ]
        for row in result["sizes"]
    ]
    headings = ["bf16 model, GB", "seconds", "s per GB", "peak anonymous memory, MB"]
    return table(headings, rows) + origin(result)


def processes() -> str:
    result = newest("memory")
    rows = [[r["process"], _number(r["first_s"], 2), _number(r.get("best_s"), 2)] for r in result["processes"]]
    return table(["process", "first run, s", "best of the others, s"], rows) + origin(result)


def gpu_origin(result: dict[str, Any]) -> str:
    """Where a result of a GPU comes from: command, date, device and versions."""
    device = result["device"]
    versions = {name: version for name, version in result["versions"].items() if version}
    shown = ", ".join(
        f"{name} {versions[name]}" for name in ("torch", "cupy-cuda13x", "cupy-cuda12x", "triton") if name in versions
    )
    commit = (result.get("commit") or "unknown")[:10]
    unfinished = "" if result.get("complete", True) else f" · not complete: {result['stopped']}"
    return (
        f"\n`{result['command']}` · {result['date']} · {device['name']}, driver {device['driver']}, CUDA "
        f"{device['cuda']}, {shown} · {result['cpu']}, {result['cores']} cores · commit {commit}{unfinished}\n"
    )


def printed(benchmark: str, tables_of: Callable[[dict[str, Any]], dict[str, Table]], *names: str) -> Callable[[], str]:
    """Tables of a benchmark, as it prints them."""

    def render() -> str:
        result = newest(benchmark)
        found = tables_of(result)
        shown = [found[name] for name in names if name in found]
        if not shown:
            raise NoResult(f"`{benchmark}` did not measure this.")
        return "\n".join(table(one.headings, one.rows) for one in shown) + gpu_origin(result)

    return render


def linear(*names: str) -> Callable[[], str]:
    return printed("bench-linear", bench_report.tables, *names)


def _range(values: Iterable[float | None]) -> str:
    measured = [value for value in values if value is not None]
    if not measured:
        return "–"
    low, high = (_number(edge, 2) for edge in (min(measured), max(measured)))
    return low if low == high else f"{low}–{high}"


def linear_summary() -> str:
    """Slowest to fastest of all shapes, for groups of M."""
    result = newest("bench-linear")
    shapes = list(dict.fromkeys(row["shape"] for row in result["linear"]))
    rows = []
    for low, high in ((1, 1), (2, 8), (16, 32), (64, 512), (2048, 4096)):
        numbers = [m for m in result["options"]["ms"] if low <= m <= high]
        cells = [str(low) if low == high else f"{low}–{high}"]
        for layout, name in (("balanced", "kvpack"), ("fast", "kvpack"), (None, "int8"), (None, "int4")):
            cells.append(_range(bench_report.ratio(result, s, m, layout, name=name) for s in shapes for m in numbers))
        rows.append(cells)
    headings = [
        "vectors, M",
        "`balanced`",
        "`fast`",
        "INT8 (Triton)",
        "INT4 g128 (torch)",
    ]
    text = table(headings, rows)
    for layout in ("balanced", "fast"):
        bits = [row["bits_per_weight"] for row in result["tensors"] if row["layout"] == layout and row["best"]]
        text += f"\n`{layout}` takes {_range(bits)} bits a weight here."
    return text + "\n" + gpu_origin(result)


def attention_summary() -> str:
    result = newest("bench-attention")
    names = ("fp16", "int8", "int4", "int2", bench_attention_report.mixed(0.3))
    rows = []
    for case in bench_attention_report.cases_of(result):
        if case.context in (2048, 16384, 131072):
            best = bench_attention_report.best_sdpa(result, case)
            cells = [str(case.sequences), f"{case.heads}:{case.kv_heads}, {case.head_dim}", str(case.context)]
            cells.append(_number(best["us"] if best else None, 1))
            cells += [_number(bench_attention_report.speed(result, case, name), 2) for name in names]
            rows.append(cells)
    headings = ["sequences", "heads, head_dim", "tokens", "best SDPA, µs", "16 bits", "INT8", "INT4", "INT2"]
    return table([*headings, "budget 0.3"], rows) + gpu_origin(result)


def prefill_summary() -> str:
    result = newest("bench-attention")
    rows = []
    for case in sorted({(r["context"], r["tokens"], r["head_dim"]) for r in result["prefill"]}):
        found = [r for r in result["prefill"] if (r["context"], r["tokens"], r["head_dim"]) == case and r["causal"]]
        best = min(r["us"] for r in found if r["name"].startswith("sdpa"))
        cells = [str(case[2]), str(case[1]), str(case[0] - case[1]), _number(best, 1)]
        rows.append([*cells, _range(best / r["us"] for r in found if not r["name"].startswith("sdpa"))])
    headings = ["head_dim", "new tokens", "cached tokens", "best SDPA, µs", "pages, × SDPA"]
    return table(headings, rows) + gpu_origin(result)


def launch_costs() -> str:
    result = newest("launch-costs")
    names = list(next(iter(result["costs"].values())))
    rows = []
    for eights, costs in result["costs"].items():
        slower = []
        for case in result["cases"]:
            if str(case["eights"]) == eights:
                times = case["launches"]
                chosen = min(times, key=lambda one: sum(t * costs[n] for t, n in zip(one["terms"], names, strict=True)))
                slower.append(100 * (chosen["us"] / min(one["us"] for one in times) - 1))
        cells = [eights, *(_number(costs[name], 3) for name in names)]
        rows.append([*cells, _number(sum(slower) / len(slower), 1), _number(max(slower), 1)])
    headings = ["eights of vectors", *names, "slower than the best, mean, %", "at worst, %"]
    launches = sum(len(case["launches"]) for case in result["cases"])
    text = table(headings, rows) + f"\n{launches} timings of {len(result['cases'])} cases.\n"
    return text + gpu_origin(result)


def kv_quant(*names: str) -> Callable[[], str]:
    return printed("bench-kv-quant", bench_kv_quant_report.tables, *names)


def attention(*names: str) -> Callable[[], str]:
    return printed("bench-attention", bench_attention_report.tables, *names)


def snapshot(*names: str) -> Callable[[], str]:
    return printed("bench-snapshot", bench_snapshot_report.tables, *names)


def kv_quality(*names: str) -> Callable[[], str]:
    return printed("kv-quality", kv_quality_report.tables, *names)


def kv_quality_verdicts() -> str:
    return kv_quality_report.verdicts(newest("kv-quality")) + "\n"


def kv_quantizers(run: str) -> Callable[[], str]:
    """All tables of a run of ``kv_quantizers.py``, and what they come to."""

    def render() -> str:
        result = newest(f"kv-quantizers-{run}")
        found = kv_quantizers_report.tables(result).values()
        texts = [table(one.headings, one.rows) for one in found]
        if result["texts"]:
            settings = f"{result['context']} cached tokens, {result['texts'][0]['windows']} windows of each text; "
            settings += f"the first page of kvpack's {kv_quantizers_report.first_page(result)}."
            texts += [f"{settings}\n", f"{kv_quantizers_report.verdicts(result)}\n"]
        device = result["device"]["name"]
        return "\n".join(texts) + origin({**result, "device": "cpu" if device == "CPU" else device})

    return render


# Runs of ``kv_quantizers.py``, and how a table names them.
_QUANTIZER_RUNS = {
    "books": "books-27m",
    "smollm2-2k-same": "SmolLM2",
    "smollm2-2k": "SmolLM2",
    "smollm2-8k": "SmolLM2",
}


def kv_quantizers_summary() -> str:
    """KL of each width beside KIVI-like groups of 64 and 32, and TurboQuant-like vectors."""
    lines = []
    for run, model in _QUANTIZER_RUNS.items():
        result = newest(f"kv-quantizers-{run}")
        first = {"same": "own format", "fp16": "16 bits", "cache": "as in a cache"}.get(
            result["first_page"], result["first_page"].upper()
        )
        for text in result["texts"]:
            rows = {row["name"]: row for row in text["rows"]}
            for bits in (8, 4, 3, 2):
                names = (f"int{bits}", f"kivi{bits}g64", f"kivi{bits}g32", f"turbo{bits}")
                cells = [
                    f"{rows[name]['bits']:.2f}: {1e3 * statistics.fmean(rows[name]['kl']):.3g}" if name in rows else "–"
                    for name in names
                ]
                lines.append([f"{model}, {result['context']}, {text['name']}", first, f"INT{bits}", *cells])
    peers = ["kvpack", "KIVI-like, groups of 64", "groups of 32", "TurboQuant-like"]
    return table(["model, tokens, text", "first page", "pages", *peers], lines)


def long_prompt() -> str:
    result = newest("long-prompt")
    gigabytes = [f"{result[name] / 1e9:.2f}" for name in ("fp16_bytes", "page_bytes", "slab_bytes", "peak_bytes")]
    headings = ["tokens", "fp16, GB", "pages, GB", "slabs, GB", "all at most, GB", "s"]
    return table(headings, [[f"{result['tokens']}", *gigabytes, f"{result['seconds']:.1f}"]]) + gpu_origin(result)


@if_measured
def prefill() -> str:
    result = newest("prefill")
    rows = []
    for row in result["rows"]:
        cells = [f"{row['tokens']:,}", row["cache"]]
        if row["left_out"]:
            cells += [f"no {row['left_out']} left", *["–"] * 4]
        else:
            gigabytes = [_number(row[name] / 1e9, 2) for name in ("peak_bytes", "cache_bytes")]
            cells += [_number(row["seconds"], 2), _number(row["tokens_per_s"], 0), *gigabytes]
            cells += [str(row["chunk_tokens"])]
        rows.append(cells)
    headings = ["tokens", "cache", "s", "tokens/s", "all at most, GB", "cache, GB", "tokens a pass"]
    return table(headings, rows) + gpu_origin(result)


@if_measured
def context_files() -> str:
    result = newest("context-files-8k")
    rows = []
    for row in result["rows"]:
        assert row["same_pages"]
        seconds = [_number(row[name], 3) for name in ("prefill_s", "save_s", "load_s")]
        megabytes = [_number(row[name] / 1e6, 2) for name in ("file_bytes", "page_bytes", "fp16_bytes")]
        rows.append([f"{row['tokens']:,}", row["format"], *seconds, *megabytes, f"{row['same_tokens']} of 64"])
    headings = ["tokens", "pages", "prefill, s", "save, s", "load, s", "file, MB", "pages in memory, MB", "fp16, MB"]
    return table([*headings, "same greedy tokens"], rows) + origin(result)


@if_measured
def vllm_connector() -> str:
    result = newest("vllm-connector")
    rows = []
    for row in result["rows"]:
        seconds = [_number(one, 2) for one in (row["first_token_s"], *row["first_token_s_by_turn"])]
        computed = row["prompt_tokens"] - row["own_hit_tokens"] - row["loaded_tokens"]
        tokens = [f"{count:,}" for count in (row["own_hit_tokens"], row["loaded_tokens"], computed)]
        megabytes = [_number(row[name] / 1e6, 1) for name in ("saved_bytes", "file_bytes")]
        same = f"{row['same_answers']} of {result['requests']}"
        rows.append([row["mode"], *seconds, *tokens, *megabytes, same])
    turns = [f"turn {turn + 1}" for turn in range(result["workload"]["turns"])]
    headings = ["engine", "first token, s", *turns, "tokens from vLLM's cache", "loaded", "computed", "pages saved, MB"]
    return table([*headings, "files, MB", "same first tokens"], rows) + origin(result)


@if_measured
def vllm_blocks() -> str:
    result = newest("vllm-blocks")
    rows = [
        [
            row["format"],
            name,
            *(_number(row[way][time], 2) for time in ("engine_ms", "copy_ms", "save_ms", "load_ms")),
            *(_number(result["value_bytes"] / row[way][time] / 1e6, 0) for time in ("copy_ms", "save_ms", "load_ms")),
        ]
        for row in result["rows"]
        for way, name in (("gathered", "gathered"), ("by_table", "by the block table"))
    ]
    times = ["engine, ms", "copy, ms", "save, ms", "load, ms"]
    return table(["pages", "tokens", *times, "copy, GB/s", "save, GB/s", "load, GB/s"], rows) + gpu_origin(result)


def vllm_gpu(name: str) -> Callable[[], str]:
    @if_measured
    def render() -> str:
        result = newest(name)
        counts, rows = counts_of(result), []
        for row in result["rows"]:
            way = re.sub("fast|balanced", r"`\g<0>`", row["name"]).replace("int4", "INT4, groups of 128")
            if "error" in row:
                rows.append([way, f"failed: {row['error']}", *[""] * (2 + len(counts))])
                continue
            kernel = row["kernel"].replace("LinearKernel", "").capitalize() if row["kernel"] else None
            rows.append(
                [
                    f"{way} ({kernel})" if kernel else way,
                    _number(row["start_s"], 0),
                    _number(row["weights_bytes"] / 1e9, 2),
                    _number(row["first_token_s"] * 1e3, 0),
                    *(f"{rate:,.0f}" for rate in row["tokens_a_second"].values()),
                ]
            )
        headings = ["", "start, s", "weights, GB", "first token of 2,048, ms"]
        return table([*headings, *counts], rows) + gpu_origin(result)

    return render


def counts_of(result: dict[str, Any]) -> list[str]:
    rates: dict[str, float] = next((row["tokens_a_second"] for row in result["rows"] if "error" not in row), {})
    return [f"tokens a second, {count} at once" for count in rates]


@if_measured
def vllm_serving() -> str:
    result = newest("vllm-serving")
    rows = [
        [
            row["name"],
            _number(row["start_seconds"], 1),
            _number(row["memory_bytes"] / 1e6, 0),
            *(_number(rate, 1) for rate in row["tokens_a_second"].values()),
        ]
        for row in result["rows"]
    ]
    counts = [f"tokens a second, {count} at once" for count in result["rows"][0]["tokens_a_second"]]
    return table(["", "start, s", "memory, MB", *counts], rows) + origin(result)


@if_measured
def manager_soak() -> str:
    """Memory at each tenth of the operations."""
    result = newest("kv-soak-manager")
    tenth = result["operations"] // 10
    columns = (
        result["resident_bytes_by_tenth"],
        result["heap_bytes_in_use_by_tenth"],
        result["python_blocks_by_tenth"],
    )
    rows = [
        [f"{number * tenth:,}", f"{resident / 1e6:.1f}", f"{heap / 1e6:.3f}", f"{blocks:,}"]
        for number, (resident, heap, blocks) in enumerate(zip(*columns, strict=True), 1)
    ]
    made = ", ".join(f"{count:,} × {name}" for name, count in result["by_name"].items())
    text = table(["operations", "resident, MB", "heap in use, MB", "Python blocks"], rows)
    text += f"\n{made}; {result['refused']:,} were refused (`CacheFullError`). "
    text += (
        f"{100 * result['hit_rate']:.1f} % of the pages asked for were there, {result['pages_from_host_memory']:,} of "
    )
    text += f"them in host memory. {result['compared_tokens']:,} tokens were compared.\n"
    return text + origin({**result, "device": "cpu"})


def offloaded_context() -> str:
    result = newest("offloaded-context")
    rows = [
        [
            f"{row['tokens']:,}",
            f"{row['pages']:,} ({100 * row['share']:.3g} %)",
            " / ".join(f"{100 * found:.0f}" for found in row["recall"].values()),
            " / ".join(f"{found:.2f}" for found in row["error"].values()),
            f"{row['step_ms']:.1f}",
            f"{row['full_from_host_ms']:,.0f}",
            f"{row['full_on_device_ms']:.1f}",
            f"{100 * row['hit_rate']:.1f}",
            f"{row['device_mb'] / 1e3:.2f}",
            f"{row['summaries_mb'] / 1e3:.2f}",
            f"{row['host_mb'] / 1e3:.2f}",
        ]
        for row in result["rows"]
    ]
    kinds = " / ".join(result["rows"][0]["recall"])
    headings = ["tokens", "pages", f"found, % ({kinds})", "error", "ms a token", "all pages from host memory, ms"]
    headings += ["all on the device, ms", "hits, %", "device, GB", "of it summaries", "host, GB"]
    return table(headings, rows) + gpu_origin(result)


def cache_agreement(model: str) -> str:
    result = newest(f"cache-agreement-{model}")
    rows = []
    for row in result["rows"]:
        cells = [row["cache"], _number(row["bits"], 2), _number(row["perplexity"]["value"], 2)]
        for name, scale, digits in (("kl", 1, 5), ("same_top_token", 100, 2)):
            mean = row[name]
            cells.append(
                "–"
                if mean is None
                else f"{scale * mean['value']:.{digits}f} ± {scale * mean['standard_error']:.{digits}f}"
            )
        rows.append(cells)
    headings = ["cache", "bits of an element", "perplexity", "KL, nats", "same top token, %"]
    return table(headings, rows) + origin(result)


def kv_planning() -> str:
    before, now = newest("kv-planning-before"), newest("kv-planning")
    rows = []
    for old, new in zip(before["rows"], now["rows"], strict=True):
        assert [old[key] for key in ("sequences", "tokens", "budget")] == [
            new[key] for key in ("sequences", "tokens", "budget")
        ]
        what = "INT4" if new["budget"] is None else f"budget {new['budget']:g}"
        times = [
            _number(row[key], 1) for row in (old, new) for key in ("append_us", "reallocate_us", "longest_append_us")
        ]
        rows.append([f"{new['sequences']} × {new['tokens']}", what, *times])
    headings = ["sequences × tokens", "formats"]
    headings += [f"{name} {when}" for when in ("before", "now") for name in ("append", "reallocate", "longest append")]
    return table(headings, rows) + "\nBefore:\n\n" + origin(before) + "\nNow:\n\n" + origin(now)


def prefix_hits(key: str) -> Callable[[], str]:
    """Of pages of prompts, those that each policy finds, or what it evicts, by capacity."""

    def render() -> str:
        result = newest("prefix-workload")
        rows: dict[str, dict[int, Row]] = {}
        for row in result["rows"]:
            rows.setdefault(row["policy"], {})[row["capacity_percent"]] = row
        capacities = sorted(rows["oracle"])
        lines = []
        for policy, found in rows.items():
            if key == "hits":
                cells = [_number(100 * found[capacity]["hit_rate"], 2) for capacity in capacities]
                shares = [found[c]["hit_pages"] / rows["oracle"][c]["hit_pages"] for c in capacities]
                lines.append([policy, *cells, f"{_number(100 * min(shares), 1)}"])
            else:
                lines.append([policy, *(str(round(found[capacity]["evictions"])) for capacity in capacities)])
        headings = ["policy", *(f"{capacity} %" for capacity in capacities)]
        headings += ["least share of the oracle's hits, %"] if key == "hits" else []
        return table(headings, lines) + origin(result)

    return render


def prefix_workload() -> str:
    """What was asked, by seed."""
    headings = ["seed", "requests", "hours", "full pages of prompts", "distinct pages", "found with room for all, %"]
    lines = [
        [
            str(seed),
            str(one["requests"]),
            _number(one["hours"], 1),
            str(one["prompt_pages"]),
            str(one["distinct_pages"]),
            _number(100 * one["most_hits"], 2),
        ]
        for seed, one in enumerate(newest("prefix-workload")["workloads"])
    ]
    return table(headings, lines)


def prefix_host() -> str:
    """Microseconds of the host."""
    result = newest("prefix-workload")
    host = result["host"]
    lines = [
        ["`append_tokens`, a sequence and step", _number(host["append_tokens_us"], 2)],
        ["appends of all layers, a sequence and step: separate sequences", _number(host["append_alone_us"], 1)],
        ["the same: sequences that share the prompt", _number(host["append_shared_us"], 1)],
        ["`start`, a request: the whole prompt found", _number(host["start_us"], 0)],
        ["`finish`, a request", _number(host["finish_us"], 0)],
    ]
    return table(["what", "µs"], lines) + origin(result)


def same_speed() -> str:
    lines, results = [], []
    for bench in ("linear", "attention"):
        results.append(newest(f"same-speed-{bench}"))
        for section in dict.fromkeys(row["section"] for row in results[-1]["rows"]):
            ratios = sorted(row["ratio"] for row in results[-1]["rows"] if row["section"] == section)
            beyond = sum(abs(ratio - 1) > results[-1]["limit"] for ratio in ratios)
            cells = [_number(ratio, 3) for ratio in (ratios[len(ratios) // 2], ratios[0], ratios[-1])]
            lines.append([bench, section, str(len(ratios)), *cells, str(beyond)])
    headings = ["bench", "section", "rows", "median of after / before", "lowest", "highest", "rows beyond 3 %"]
    return table(headings, lines) + "".join(map(origin, results))


def pages_speed() -> str:
    """What pages with two widths of keys cost in time, by section, format and tokens."""
    result = newest("pages-speed-attention")
    lines = [
        [row["section"], row["name"], str(row["context"]), str(row["tokens"])]
        + [_number(row[key], digits) for key, digits in (("before_us", 1), ("after_us", 1), ("ratio", 3))]
        for row in result["rows"]
        if row["section"] in ("decode", "prefill")
    ]
    headings = ["kernel", "pages", "tokens", "of them new", "before, µs", "after, µs", "after / before"]
    return table(headings, lines) + origin(result)


def load_checks() -> str:
    result = newest("load-checks")
    rows = []
    for name, key in (("CRCs checked, as by default", "verified_seconds"), ("`verify=False`", "unverified_seconds")):
        seconds = statistics.median(result[key])
        rows.append([name, _number(1e3 * seconds, 0), _number(result["size_bytes"] / seconds / 1e9, 2)])
    return table(["load", "ms, median", "GB/s"], rows) + gpu_origin(result)


def generate_summary() -> str:
    result = newest("books-generate")
    rows = [
        [
            setting_name(result, row["setting"]),
            _number(row["linear_megabytes"], 1),
            _number(row["tokens_per_s"], 0),
            _number(ratio, 2),
        ]
        for row in result["rows"]
        if "dequantized" not in row["setting"] and (ratio := row["ratio_to_dense"])
    ]
    headings = ["weights", "linear layers, MB on the GPU", "tokens/s", "× dense bf16"]
    return table(headings, rows) + gpu_origin(result)


def books_generate() -> str:
    result = newest("books-generate")
    rows = [
        [
            setting_name(result, row["setting"]),
            _number(row["bits_per_weight"], 3),
            _number(row["linear_megabytes"], 1),
            _number(row["tokens_per_s"], 0),
            _number(row["ratio_to_dense"], 2),
            f"{row['logit_error']:.1e}",
            _number(row["same_top_percent"], 2),
        ]
        for row in result["rows"]
    ]
    headings = ["weights", "bits", "linear layers, MB on the GPU", "tokens/s", "× dense bf16"]
    headings += ["logits: relative error", "same top token, %"]
    text = table(headings, rows)
    text += f"\nOne sequence, {result['steps']} tokens after a context of {result['context']}, one CUDA graph a token. "
    text += "The error is against the dequantized weights of the same file in fp32.\n"
    return text + gpu_origin(result)


def generation(name: str) -> Callable[[], str]:
    """A table of the large model, and one of the small ones: two runs, of which one may be missing."""

    def render() -> str:
        texts = []
        for models in ("large", "small"):
            try:
                texts.append(printed(f"generation-{models}", generation_report.tables, name)())
            except NoResult as missing:
                texts.append(f"{missing}\n")
        return "\n".join(texts)

    return render


_EQUAL_QUALITY_SHAPE = "28672×4096"


def _equal_quality_times() -> dict[tuple[Any, ...], float]:
    """µs with one vector on the largest shape, by a kernel's name or the layout of kvpack's integers; {} if unknown."""
    try:
        rows = newest("equal-quality-times")["rows"]
    except NoResult:
        return {}
    return {
        (row["name"], *_integers_key(row["integers"])): row["us"]
        for row in rows
        if (row["shape"], row["tokens"]) == (_EQUAL_QUALITY_SHAPE, 1) and row["us"] is not None
    }


def _integers_key(integers: dict[str, Any] | None) -> tuple[Any, ...]:
    return () if integers is None else tuple(value for name, value in integers.items() if name != "sigma")


def equal_quality(model: str) -> Callable[[], str]:
    """Peers' bits and distance, and kvpack's bits at the same distance; with times of both where there are any."""

    def shown() -> str:
        result = newest(f"equal-quality-{model}")
        us = _equal_quality_times()
        layouts = list(result["points"])
        rows = []
        for row in result["rows"]:
            if row["distance"] is None:
                rows.append([row["peer"], "–", row["error"], *["–"] * len(layouts)])
                continue
            cells = [
                row["peer"],
                _timed(_number(row["bits"], 3), us.get((result.get("kernels", {}).get(row["peer"]),))),
            ]
            cells.append(f"{row['distance']:#.3g}")
            for layout in layouts:
                found = row["kvpack"][layout]
                bits = found["bits"]
                outside = "> 7.5" if row["distance"] < result["points"][layout][-1]["distance"] else "< 2.5"
                key = ("kvpack", *_integers_key(found["integers"]))
                cells.append(outside if bits is None else _timed(_number(bits, 3), us.get(key)))
            rows.append(cells)
        headings = ["peer", "bits a weight", result["metric"], *(f"bits of `{name}` at that" for name in layouts)]
        text = table(headings, rows)
        ranges = []
        for layout in layouts:
            found = [(row["bits"], row["kvpack"][layout]["bits"]) for row in result["rows"] if row["kvpack"]]
            more = [100 * (bits / peer - 1) for peer, bits in found if bits is not None]
            low, high = (f"{share:+.0f}".replace("-", "−") if round(share) else "0" for share in (min(more), max(more)))
            ranges.append(f"`{layout}` {low} to {high} %")
        text += f"\nBits at the same distance, against the peers within reach: {', '.join(ranges)}.\n"
        text += f"\n{result['tensors']} tensors, {result['windows']} pieces of {result['window_tokens']} tokens."
        if us:
            text += f" In brackets: µs of a product with one vector, {_EQUAL_QUALITY_SHAPE}."
        return text + "\n" + origin(result)

    return shown


def _timed(bits: str, us: float | None) -> str:
    return bits if us is None else f"{bits} ({_number(us, 1)})"


def equal_quality_times() -> str:
    result = newest("equal-quality-times")
    shapes = list(dict.fromkeys(row["shape"] for row in result["rows"]))
    lines: dict[tuple[Any, ...], dict[tuple[str, int], Row]] = {}
    for row in result["rows"]:
        key = (row["name"], *_integers_key(row["integers"]))
        lines.setdefault(key, {})[row["shape"], row["tokens"]] = row
    rows = []
    for key, found in lines.items():
        one = next(iter(found.values()))
        name = key[0]
        if one["integers"] is not None:
            bits, code, codes, folded = key[1:]
            name = f"kvpack, {bits} bits, {codes} {'folded ' if folded else ''}codes of {code}"
        for tokens in sorted({tokens for _, tokens in found}):
            cells = [found.get((shape, tokens), {}).get("us") for shape in shapes]
            of_bits = [found[shape, tokens]["bits_per_weight"] for shape in shapes if (shape, tokens) in found]
            rows.append([name, _range(of_bits), str(tokens), *(_number(us, 1) for us in cells)])
    headings = ["weights", "bits a weight", "M", *(f"{shape}, µs" for shape in shapes)]
    return table(headings, rows) + gpu_origin(result)


def llama_shape() -> str:
    """Tokens a second by batch, and how many times as fast as dense weights."""
    result = newest("llama-shape")
    names = list(dict.fromkeys(row["weights"] for row in result["rows"]))
    rows = []
    for name in names:
        of_name = [row for row in result["rows"] if row["weights"] == name]
        cells = [name, _number(of_name[0]["bits_per_weight"], 2), _number(of_name[0]["linear_bytes"] / 1e9, 2)]
        for row in of_name:
            if row["us"] is None:
                cells.append(row["error"])
                continue
            ratio = "" if row["weights"] == names[0] else f" ({_number(row['ratio_to_dense'], 2)}×)"
            cells.append(f"{_number(row['tokens_per_s'], 0)}{ratio}")
        rows.append(cells)
    batches = dict.fromkeys(row["batch"] for row in result["rows"])
    headings = ["linear layers", "bits a weight", "GB", *(f"tokens/s, batch {batch}" for batch in batches)]
    text = table(headings, rows)
    text += f"\n{result['shape']['name']}, {result['layers']} layers, random weights, context {result['context']}, "
    text += f"{result['dtype']}, one CUDA graph a token; in brackets: times as fast as {names[0]}.\n"
    return text + gpu_origin(result)


def grouped() -> str:
    """Products of a mixture of experts in one launch, beside a loop of products and dense bf16."""
    result = newest("grouped")
    rows = []
    for row in result["rows"]:
        us = {name: timed["us"] for name, timed in row["times"].items()}
        one = us["grouped fp16"]
        rows.append(
            [
                f"{row['rows']}×{row['cols']}",
                row["layout"],
                _number(row["bits"], 2),
                str(row["tokens"]),
                str(row["active_experts"]),
                _number(one, 1),
                _number(us["loop fp16"] / one, 2),
                _number(us["dense grouped bf16"] / us["grouped bf16"], 2),
                _number(us["dense loop bf16"] / us["grouped bf16"], 2),
            ]
        )
    headings = [
        "an expert",
        "layout",
        "bits",
        "tokens",
        "experts hit",
        "µs",
        "× loop",
        "× grouped bf16",
        "× loop of bf16",
    ]
    text = table(headings, rows) + f"\n{result['top_k']} of {result['experts']} experts a token.\n"
    return text + gpu_origin(result)


def runtime_load() -> str:
    result = newest("runtime-streams")
    rows = [
        [r["what"], _number(r["megabytes"], 1), _number(r["seconds"], 3), _number(r["gb_per_s"], 2), r["error"] or ""]
        for r in result["loading"]
    ]
    return table(["what", "MB", "seconds", "GB/s", "remark"], rows) + gpu_origin(result)


def runtime_memory() -> str:
    result = newest("runtime-streams")
    rows = [
        [
            row["layout"],
            _number(row["bits_per_weight"], 3),
            _number(row["allocated_megabytes"], 1),
            _number(row["percent_of_fp16"], 1),
            _number(row["percent_of_int8"], 1),
            _number(row["peak_megabytes_in_products"], 1),
        ]
        for row in result["memory"]
    ]
    headings = ["layout", "bits", "allocated, MB", "% of FP16", "% of INT8", "most in products beyond that, MB"]
    return table(headings, rows) + gpu_origin(result)


def runtime_streaming() -> str:
    result = newest("runtime-streams")
    rows = [
        [row["what"], _number(row["ms"], 2), _number(row["megabytes"], 1), row["error"] or ""]
        for row in result["streaming"]
    ]
    return table(["model pass", "ms", "weights on the GPU, MB", "remark"], rows) + gpu_origin(result)


def runtime_five() -> str:
    result = newest("runtime-streams")
    rows = [
        [
            row["layout"],
            str(row["m"]),
            _number(row.get("in_turn_us"), 1),
            _number(row.get("at_once_us"), 1),
            _number(row.get("speedup"), 2),
            row["error"] or "",
        ]
        for row in result["five"]
    ]
    headings = ["layout", "M", "one after another, µs", "`run_concurrently`, µs", "×", "remark"]
    return table(headings, rows) + gpu_origin(result)


def runtime_encode() -> str:
    result = newest("runtime-streams")
    rows = [
        [
            row["shape"],
            row["layout"],
            row["where"],
            _number(row["ms"], 2),
            _number(row["gelements_per_s"], 2),
            row["error"] or "",
        ]
        for row in result["encode"]
    ]
    return table(["out × in", "layout", "where", "ms", "10⁹ elements/s", "remark"], rows) + gpu_origin(result)


def tensor_kinds() -> str:
    result = newest("tensor-kinds")
    columns = [column for column in result["rows"][0] if column != "group"]
    total = {"group": "all", **{column: sum(row[column] for row in result["rows"]) for column in columns}}
    rows = [[str(row[column]) for column in ("group", *columns)] for row in [*result["rows"], total]]
    text = table(["transformers " + result["transformers"], *columns], rows)
    return text + origin(result)


def _with_error(mean: dict[str, Any] | None, digits: int, times: int = 1) -> str:
    """A mean of ``kvpack eval`` and its standard error."""
    if mean is None:
        return "–"
    error = mean["standard_error"]
    return _number(times * mean["value"], digits) + ("" if error is None else f" ± {times * error:.{digits}f}")


def model_quality(name: str) -> Callable[[], str]:
    """A result of ``kvpack eval --against``."""

    def shown() -> str:
        result = newest(name)
        rows = []
        for model in (result["original"], *result["models"]):
            size = model["size"]
            for quality, read in (
                (model["full"], ""),
                (model["stepwise"], f", KV in {_number(model['kv_bits'], 2)} bits"),
            ):
                if quality is not None:
                    rows.append(
                        [
                            f"{Path(model['model']).name}{read}",
                            _number(size["bytes"] / 1e6, 1),
                            _number(size["coded_bits_per_weight"], 3),
                            _number(size["bits_per_weight"], 2),
                            _with_error(quality["kl"], 5),
                            _with_error(quality["same_top_token"], 1, 100),
                            _with_error(quality["loss_increase"], 4),
                            _with_error(quality["perplexity"], 2),
                        ]
                    )
        headings = ["model", "MB", "bits a coded weight", "bits a weight, whole file", "KL, nats a token"]
        headings += ["same top token, %", "loss increase, nats a token", "perplexity"]
        text = table(headings, rows)
        text += f"\n{result['windows']} of {result['windows_available']} windows of {result['context']} tokens, "
        text += (
            f"{result['scored_tokens']} tokens scored, computed in {result['models'][0]['dtype']}; ± is the standard "
        )
        text += "error over windows.\n"
        return text + origin(result)

    return shown


def calibrated(name: str) -> Callable[[], str]:
    """A result of benchmarks/calibrated_quality.py."""

    def shown() -> str:
        result = newest(f"calibrated-{name}")
        many = len(result["moments"]) > 1
        rows = [
            [
                f"{row['asked']:g}" if "GPTQ" not in row["method"] else "–",
                row["method"],
                *([row["moments"] or "–"] * many),
                _number(row["bits"], 3),
                _shown_kl(row),
                _number(100 * row["same_top"], 1),
                _number(row["output_bytes"] / 1e6, 2) if "output_bytes" in row else "–",
            ]
            for row in result["rows"]
        ]
        headings = ["`--bits`", "steps", *(["moments"] * many), "bits a weight", "KL, nats a token"]
        text = table([*headings, "same top token, %", "whole file, MB"], rows)
        read = "; ".join(
            f"{label}: {made['tokens']:,} tokens of {made['text'] or 'its own'} in windows of {made['window_tokens']}"
            for label, made in result["moments"].items()
        )
        windows = f"the first {result['windows']} windows of {result['window_tokens']} tokens"
        text += f"\n{result['linears']} tensors; {windows}. Moments: {read}.\n"
        return text + origin(result)

    return shown


def calibrated_peers(name: str) -> Callable[[], str]:
    """A result of benchmarks/calibrated_peers.py, beside kvpack's rows of the same windows, by bits."""

    def shown() -> str:
        result = newest(f"calibrated-peers-{name}")
        own = newest(f"calibrated-{name}")
        if any(result[key] != own[key] for key in ("windows", "window_tokens", "linears")):
            raise NoResult(f"calibrated-peers-{name} is of other windows than calibrated-{name}")
        rows = [(row["peer"], row["with_data"], row.get("tokens"), row) for row in result["rows"]]
        rows += [
            ("**kvpack**", row["method"] == "sensitivity", None, row)
            for row in own["rows"]
            if row["method"] in ("sensitivity", "without moments") and row["moments"] in (None, "text")
        ]
        shown_rows = [
            [
                peer,
                "–" if not with_data else "yes" if tokens is None else f"{tokens:,} tokens",
                _number(row["bits"], 3),
                _shown_kl(row),
                _number(100 * row["same_top"], 1),
            ]
            for peer, with_data, tokens, row in sorted(rows, key=lambda entry: (-entry[3]["bits"], entry[3]["kl"]))
        ]
        text = table(["quantizer", "data", "bits a weight", "KL, nats a token", "same top token, %"], shown_rows)
        windows = f"the first {result['windows']} windows of {result['window_tokens']} tokens"
        text += f"\n{result['linears']} tensors; {windows}. Data: {result['moments']['tokens']:,} tokens of "
        text += f"{result['moments']['text']}, where no other number stands.\n"
        return text + origin(result)

    return shown


def calibrated_encoder(name: str) -> Callable[[], str]:
    """A result of benchmarks/calibrated_encoder.py, by bits."""

    def shown() -> str:
        result = newest(f"calibrated-encoder-{name}")
        rows = [
            [
                f"**{row['quantizer']}**" if row["quantizer"].startswith("kvpack") else row["quantizer"],
                "yes" if row["with_data"] else "–",
                _number(row["bits"], 3),
                _number(100 * row["error"], 3),
                _number(100 * row["worst_error"], 2),
                _number(row["distance"], 5),
            ]
            for row in sorted(result["rows"], key=lambda row: (-round(row["bits"], 2), row["error"]))
        ]
        headings = ["quantizer", "data", "bits a weight", "error of outputs, %", "worst layer's, %", result["metric"]]
        text = table(headings, rows)
        text += f"\n{result['linears']} tensors; the first {result['windows']} windows of {result['window_tokens']} "
        text += f"tokens of {result['text']}. Data: {result['tokens']:,} tokens of its last quarter.\n"
        return text + origin(result)

    return shown


def calibration_tokens(name: str) -> Callable[[], str]:
    """A result of benchmarks/calibration_tokens.py: tokens and labels, on the text that moments are of."""

    def shown() -> str:
        result = newest(f"calibration-tokens-{name}")
        rates = sorted({row["asked"] for row in result["rows"]}, reverse=True)
        found: dict[tuple[int, int], dict[float, str]] = {}
        for row in result["rows"]:
            if row["evaluated_on"] == result["text"] and row["calibrated_on"] in (None, result["text"]):
                of_run = found.setdefault((row["tokens"], row["seed"]), {})
                of_run[row["asked"]] = _shown_kl(row)
        rows = [
            [f"{tokens:,}" if tokens else "none", str(seed) if tokens else "–", *(of_run[rate] for rate in rates)]
            for (tokens, seed), of_run in sorted(found.items())
        ]
        text = table(["tokens", "seed of labels", *(f"KL at {rate:g} bits" for rate in rates)], rows)
        text += f"\nThe first {result['windows']} windows of {result['window_tokens']} tokens of {result['text']}; "
        text += "moments of its last quarter.\n"
        return text + origin(result)

    return shown


def calibration_texts() -> str:
    """What a result of benchmarks/calibration_tokens.py says of two texts."""
    result = newest("calibration-tokens-books")
    texts = list(dict.fromkeys(row["evaluated_on"] for row in result["rows"]))
    of_texts = {row["tokens"] for row in result["rows"] if row["calibrated_on"] == texts[-1]}
    rows = []
    for asked in sorted({row["asked"] for row in result["rows"]}, reverse=True):
        for calibrated_on in (None, *texts):
            kl = {
                row["evaluated_on"]: _shown_kl(row)
                for row in result["rows"]
                if (row["asked"], row["calibrated_on"], row["seed"]) == (asked, calibrated_on, 0)
                and row["tokens"] in of_texts | {0}
            }
            rows.append([f"{asked:g}", calibrated_on or "nothing", *(kl[text] for text in texts)])
    text = table(["`--bits`", "calibrated on", *(f"KL on {text}" for text in texts)], rows)
    tokens = ", ".join(f"{number:,}" for number in sorted(of_texts))
    text += f"\n{tokens} tokens of the last quarter; the first {result['windows']} windows of "
    return text + f"{result['window_tokens']} tokens of each.\n" + origin(result)


def calibrated_cost() -> str:
    result = newest("calibrated-cost")
    shape, moments, coded = result["shape"], result["moments"], result["compress"]
    rows = [
        [
            name,
            _number(part["seconds"], 1),
            _number(part["seconds_a_layer"], 1),
            _number(part["extrapolated_seconds"], 0),
            _number(part["peak_device_bytes"] / 1e9, 1),
            _number(part["peak_resident_bytes_so_far"] / 1e9, 1),
        ]
        for name, part in (
            (f"moments of {moments['tokens']:,} tokens", moments),
            (f"compression, {_number(coded['bits_per_weight'], 3)} bits", coded),
        )
    ]
    headings = [
        "step",
        f"{shape['layers_made']} layers, s",
        "a layer more, s",
        f"{shape['layers']} layers, s",
        "GPU memory, GB",
        "host memory, GB",
    ]
    text = (
        table(headings, rows)
        + f"\nTogether {_number(result['extrapolated_minutes'], 1)} minutes for {shape['layers']} layers.\n"
    )
    return text + gpu_origin(result)


def trellis_speed() -> str:
    result = newest("trellis-speed")
    batches = sorted({row["m"] for row in result["rows"]})
    found: dict[tuple[str, ...], dict[int, dict[str, Any]]] = {}
    for row in result["rows"]:
        matrix = f"{row['outputs']}×{row['inputs']}", row["layout"], str(row["element_bits"])
        found.setdefault(matrix, {})[row["m"]] = row
    rows = []
    for matrix, of in found.items():
        pairs = [(of[m]["scalar"], of[m]["trellis"]) for m in batches]
        rows.append([*matrix, *(f"{_number(a, 1)} → {_number(b, 1)} (× {_number(b / a, 2)})" for a, b in pairs)])
    vectors = [f"{m} vector{'s' * (m > 1)}, µs" for m in batches]
    return table(["matrix", "layout", "bits of elements", *vectors], rows) + gpu_origin(result)


FIGURES: dict[str, Callable[[], str]] = {
    "trellis-speed": trellis_speed,
    "calibrated-cost": calibrated_cost,
    "minilm-short": lambda: minilm_rates(short=True),
    "minilm-rates": lambda: minilm_rates(short=False),
    "minilm-layouts": minilm_layouts,
    "minilm-ideas": minilm_ideas,
    "books-short": lambda: books(short=True),
    "books": lambda: books(short=False),
    "books-layouts": lambda: books(short=False, name="books-layouts"),
    "books-default": books_default,
    "tensor-kinds": tensor_kinds,
    "codec": codec,
    "memory": memory,
    "offloaded-context": offloaded_context,
    "context-files-8k": context_files,
    "manager-soak": manager_soak,
    "vllm-blocks": vllm_blocks,
    "vllm-connector": vllm_connector,
    "vllm-gpu": vllm_gpu("vllm-gpu"),
    "vllm-gpu-experts": vllm_gpu("vllm-gpu-experts"),
    "vllm-gpu-32-cores": vllm_gpu("vllm-gpu-32-cores"),
    "vllm-gpu-packed": vllm_gpu("vllm-gpu-packed"),
    "vllm-gpu-experts-4-layers": vllm_gpu("vllm-gpu-experts-4-layers"),
    "vllm-serving": vllm_serving,
    "processes": processes,
    "linear-summary": linear_summary,
    "launch-costs": launch_costs,
    "linear-batch-1": linear("batch-1"),
    "linear-batches": linear("batches"),
    "linear-tiles": linear("tiles"),
    "linear-decode": linear("decode", "copy"),
    "linear-codecs": linear("codecs"),
    "linear-streams": linear("streams"),
    "linear-encode": linear("encode"),
    "linear-targets": linear("targets"),
    "linear-specification": linear("specification"),
    "kv-quant-classic": kv_quant("classic", "cpu"),
    "kv-quant-formats": kv_quant("formats"),
    "kv-quant-quality": kv_quant("quality"),
    "attention-summary": attention_summary,
    "prefill-summary": prefill_summary,
    "attention-prefill": attention("prefill"),
    "attention-causal": attention("causal"),
    "attention-few-tokens": attention("few-tokens"),
    "attention-observed": attention("observed"),
    "attention-times": attention("times"),
    "attention-speeds": attention("speeds", "copy"),
    "attention-rates": attention("rates"),
    "attention-bytes": attention("bytes"),
    "attention-mixtures": attention("mixtures"),
    "attention-shares": attention("shares"),
    "attention-grids": attention("grids"),
    "attention-targets": attention("targets"),
    "snapshot-bytes": snapshot("bytes"),
    "snapshot-speed": snapshot("speed"),
    "snapshot-prefill": snapshot("prefill"),
    "kv-quality-configurations": kv_quality("configurations"),
    "kv-quality-equal-bytes": kv_quality("equal-bytes"),
    "kv-quality-verdicts": kv_quality_verdicts,
    "kv-quantizers-books": kv_quantizers("books"),
    "kv-quantizers-books-first16": kv_quantizers("books-first16"),
    "kv-quantizers-budgets": kv_quantizers("budgets"),
    "kv-quantizers-summary": kv_quantizers_summary,
    "kv-quantizers-smollm2-2k": kv_quantizers("smollm2-2k"),
    "kv-quantizers-smollm2-2k-same": kv_quantizers("smollm2-2k-same"),
    "kv-quantizers-smollm2-8k": kv_quantizers("smollm2-8k"),
    "kv-quantizers-constructed": kv_quantizers("constructed"),
    "kv-planning": kv_planning,
    "prefix-workload": prefix_workload,
    "prefix-hits": prefix_hits("hits"),
    "prefix-evictions": prefix_hits("evictions"),
    "prefix-host": prefix_host,
    "cache-agreement": lambda: cache_agreement("books"),
    "cache-agreement-smollm2": lambda: cache_agreement("smollm2"),
    "same-speed": same_speed,
    "pages-speed": pages_speed,
    "load-checks": load_checks,
    "long-prompt": long_prompt,
    "prefill": prefill,
    "generate-summary": generate_summary,
    "books-generate": books_generate,
    "generation-summary": generation("summary"),
    "generation-decode": generation("decode"),
    "generation-weights": generation("weights"),
    "generation-prefill": generation("prefill"),
    "generation-launches": generation("launches"),
    "llama-shape": llama_shape,
    "grouped": grouped,
    "calibrated-books": calibrated("books"),
    "calibrated-books-trellis": calibrated("books-trellis"),
    "calibrated-smollm2": calibrated("smollm2"),
    "calibrated-smollm2-trellis": calibrated("smollm2-trellis"),
    "calibrated-smollm2-tables": calibrated("smollm2-tables"),
    "calibrated-peers-books": calibrated_peers("books"),
    "calibrated-peers-smollm2": calibrated_peers("smollm2"),
    "calibrated-encoder-minilm": calibrated_encoder("minilm"),
    "calibration-tokens-books": calibration_tokens("books"),
    "calibration-tokens-smollm2": calibration_tokens("smollm2"),
    "calibration-texts": calibration_texts,
    "equal-quality-books": equal_quality("books"),
    "equal-quality-minilm": equal_quality("minilm"),
    "equal-quality-smollm2": equal_quality("smollm2"),
    "equal-quality-times": equal_quality_times,
    "runtime-load": runtime_load,
    "runtime-memory": runtime_memory,
    "runtime-streaming": runtime_streaming,
    "runtime-five": runtime_five,
    "runtime-encode": runtime_encode,
    "smollm2-quality": model_quality("smollm2-quality"),
}


def figures(name: str) -> str:
    """What stands between the marks of ``name``; a sentence where the benchmark has not been run."""
    try:
        return FIGURES[name]()
    except NoResult as missing:
        return f"{missing}\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = []
    shown: set[str] = set()
    for document in DOCUMENTS:
        before = document.read_text()
        shown.update(match[2] for match in _BLOCK.finditer(before))
        after = _BLOCK.sub(lambda match: match[1] + figures(match[2]) + match[3], before)
        if before != after:
            stale.append(str(document.relative_to(ROOT)))
            if not check:
                document.write_text(after)
    print(("stale: " if check else "rewrote: ") + (", ".join(stale) or "nothing"), file=sys.stderr)
    hidden = sorted(set(FIGURES) - shown) + sorted({path.name for path in RESULTS.glob("*.json")} - _READ)
    if hidden:
        print("in no document: " + ", ".join(hidden), file=sys.stderr)
    return int(bool(hidden) or (check and bool(stale)))


if __name__ == "__main__":
    sys.exit(main())
