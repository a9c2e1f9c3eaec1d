"""The report of ``kvpack bench snapshot``, and tables of it. Needs no torch.

A report is one JSON object (``schema`` 1) with the fields of every benchmark (what, schema, note, command,
kvpack.bench.provenance.environment, device, options, seconds: see :mod:`kvpack.bench.report`) and::

    tokens, formats, budget, elements  of the context whose pages are measured
    source     "file", or "constructed": then no sizes are told, since they would say nothing
    threads    of the CPU's coder
    rows       name, bytes, of_fp16, of_pages, encode_gb_per_s, decode_gb_per_s: on the CPU; or name, reason
    shape      of the cache on the GPU: layers, kv_heads, head_dim, tokens, elements, page_bytes, fp16_bytes,
               file_bytes; None without a GPU
    speed      name, seconds (None: not measured), elements_per_s, gb_per_s: of that cache
    prefill    tokens, layer_s, prefill_s, load_s; file_bytes, break_even_gb_per_s, pages_break_even_gb_per_s and
               fp16_break_even_gb_per_s (None: nothing is fast enough, or the pages are constructed)

GB/s are 10^9 bytes of pages in memory a second, whatever their files take. From a source of more than
``break_even_gb_per_s`` a context is there sooner than by a prefill: bytes of the file / (prefill − load of a warm
file), as if reading did not overlap with decoding. Pages and fp16 as they are have nothing to decode: bytes / prefill.
"""

from __future__ import annotations

from kvpack.bench.report import Report, Row, Table, number

SCHEMA = 1
NOTE = (
    "GB/s are of pages in memory. A prefill is that of one layer of an 8B Llama's shape in bf16 (random weights), "
    "times its 32 layers; embedding and head are left out."
)
CONSTRUCTED = " Pages are constructed: for speed, so no sizes are told."


def break_even_gb_per_s(size_bytes: float, prefill_s: float, load_s: float) -> float | None:
    """From which bandwidth of its source on a file is loaded sooner than its tokens are read by the model.

    Args:
        load_s: what a load takes beyond getting the bytes.

    >>> break_even_gb_per_s(4e9, prefill_s=3.0, load_s=1.0)
    2.0
    """
    return size_bytes / (prefill_s - load_s) / 1e9 if prefill_s > load_s else None


def prefill_row(tokens: int, layer_s: float, layers: int, shape: Row, load_s: float, *, is_real: bool) -> Row:
    """A row of ``prefill``: what a context of so many tokens takes, by what the measured one took a token."""
    share = tokens / shape["tokens"]
    prefill_s = layers * layer_s

    def break_even(name: str, beyond_s: float) -> float | None:
        return break_even_gb_per_s(share * shape[name], prefill_s, beyond_s) if is_real else None

    return {
        "tokens": tokens,
        "layer_s": layer_s,
        "prefill_s": prefill_s,
        "load_s": share * load_s,
        "file_bytes": share * shape["file_bytes"] if is_real else None,
        "break_even_gb_per_s": break_even("file_bytes", share * load_s),
        "pages_break_even_gb_per_s": break_even("page_bytes", 0.0),
        "fp16_break_even_gb_per_s": break_even("fp16_bytes", 0.0),
    }


def tables(report: Report) -> dict[str, Table]:
    """By name; those for which nothing was measured are left out."""
    found = {"bytes": _bytes(report), "speed": _speed(report), "prefill": _prefill(report)}
    return {name: one for name, one in found.items() if one.rows}


def _bytes(report: Report) -> Table:
    headings = ["", "bytes", "of fp16", "of pages", "encode GB/s", "decode GB/s"]
    rows = []
    for row in report["rows"]:
        if "reason" in row:
            rows.append([row["name"], row["reason"], *["–"] * 4])
            continue
        size = "–" if row["bytes"] is None else f"{row['bytes']:,}"
        ratios = [number(row[key], 3) for key in ("of_fp16", "of_pages", "encode_gb_per_s", "decode_gb_per_s")]
        rows.append([row["name"], size, *ratios])
    threads = f"{report['threads']} threads" if report["threads"] != 1 else "1 thread"
    return Table(f"{report['tokens']} tokens on the CPU, {threads}", headings, rows)


def _speed(report: Report) -> Table:
    rows = [
        [
            row["name"],
            number(row["seconds"], 3),
            number(None if row["elements_per_s"] is None else row["elements_per_s"] / 1e9, 2),
            number(row["gb_per_s"], 2),
        ]
        for row in report["speed"]
    ]
    shape = report["shape"]
    title = (
        ""
        if shape is None
        else (
            f"{shape['tokens']} tokens, {shape['layers']} layers, {shape['kv_heads']} KV heads of {shape['head_dim']}: "
            f"{shape['page_bytes'] / 1e9:.2f} GB of pages"
        )
    )
    return Table(title, ["", "s", "10⁹ elements/s", "GB/s"], rows)


def _prefill(report: Report) -> Table:
    headings = ["tokens", "prefill, s", "load, s", "times as fast", "file, GB", "break-even GB/s", "pages", "fp16"]
    rows = [
        [
            str(row["tokens"]),
            number(row["prefill_s"], 2),
            number(row["load_s"], 3),
            number(row["prefill_s"] / row["load_s"], 1),
            number(None if row["file_bytes"] is None else row["file_bytes"] / 1e9, 2),
            number(row["break_even_gb_per_s"], 3),
            number(row["pages_break_even_gb_per_s"], 3),
            number(row["fp16_break_even_gb_per_s"], 3),
        ]
        for row in report["prefill"]
    ]
    return Table("loading a warm file against a prefill of an 8B Llama's shape", headings, rows)
