"""``kvpack bench``: measure speed on this machine."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from kvpack.cli.failures import ExitCode, exit_codes, needs_device, require_matplotlib
from kvpack.cli.options import Json, Threads
from kvpack.cli.printing import data_console

bench_app = typer.Typer(
    help="Measure speed on this machine.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

TimeLimit = Annotated[
    float | None, typer.Option("--time-limit-s", min=1, help="Stop after so long and report what there is.")
]
ReportFile = Annotated[
    Path | None, typer.Option("--report", metavar="FILE", help="Write the JSON report here after each step.")
]


@bench_app.command("codec")
def bench_codec(
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Speed of the CPU coder: encode and decode, one core and all."""
    with exit_codes(as_json):
        from kvpack.bench.codec import bench_codec as run

        report = run(threads)
    if as_json:
        print(json.dumps({"ok": True, **report}))
        return
    from rich import box
    from rich.table import Table

    table = Table(
        title=f"2048 × 5632 INT8 (Gaussian, σ = 30: for speed only) on {report['cpu']}",
        box=box.SIMPLE_HEAD,
    )
    for heading in (
        "layout",
        "bits",
        "threads",
        "encode ms",
        "M weights/s",
        "decode ms",
        "M weights/s",
    ):
        table.add_column(heading, justify="right")
    for row in report["rows"]:
        table.add_row(
            row["layout"],
            f"{row['bits_per_weight']:.3f}",
            str(row["threads"]),
            f"{row['encode_ms']:.1f}",
            f"{row['encode_mweights_per_s']:.0f}",
            f"{row['decode_ms']:.1f}",
            f"{row['decode_mweights_per_s']:.0f}",
        )
    data_console().print(table)


@bench_app.command("linear")
def bench_linear(
    shapes: Annotated[
        str | None,
        typer.Option("--shapes", metavar="LIST", help="OUTxIN or names: qkv,o,gate_up,down,wide,tall. Default: all."),
    ] = None,
    m: Annotated[str | None, typer.Option("--m", metavar="LIST", help="Numbers of activation vectors.")] = None,
    layouts: Annotated[str | None, typer.Option("--layouts", metavar="LIST", help="balanced,fast")] = None,
    tile_cols: Annotated[
        str | None,
        typer.Option("--tile-cols", metavar="LIST", help="Tile columns to choose from; default 128,256,512,1024,2048."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A few shapes, less than a minute.")] = False,
    time_limit_s: TimeLimit = None,
    report_path: ReportFile = None,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="PNG", help="Draw speed against FP16.")] = None,
    as_json: Json = False,
) -> None:
    """Speed of products with coded weights on a GPU, against FP16, INT8 and INT4; every result is checked first."""
    with exit_codes(as_json):
        from kvpack.bench.report import parse_options, tables, wrong_results

        with _usage():
            options = parse_options(
                shapes=shapes, ms=m, layouts=layouts, tile_cols=tile_cols, quick=quick, time_limit_s=time_limit_s
            )
        report = _run_bench("linear", options, report_path, "plot_linear", plot, as_json)
    _show_bench(report, tables(report), wrong_results(report), as_json)


@bench_app.command("kv-quant")
def bench_kv_quant(
    sizes: Annotated[
        str | None,
        typer.Option("--sizes", metavar="LIST", help="TxD, several by commas. Default: the ten classic ones."),
    ] = None,
    kv: Annotated[
        Path | None,
        typer.Option(
            "--kv", metavar="NPZ", help="Arrays K [..., T, D] of a model, for the errors; else of random data."
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Two sizes, less than a minute.")] = False,
    time_limit_s: TimeLimit = None,
    report_path: ReportFile = None,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="PNG", help="Draw speed against a copy's.")] = None,
    as_json: Json = False,
) -> None:
    """Speed of quantizing whole matrices on a GPU, in four variants, against the CPU; all bytes are checked first."""
    with exit_codes(as_json):
        from kvpack.bench.kv_quant_report import parse_options, tables, wrong_results

        with _usage():
            options = parse_options(
                sizes=sizes, quick=quick, kv=None if kv is None else str(kv), time_limit_s=time_limit_s
            )
        report = _run_bench("kv_quant", options, report_path, "plot_kv_quant", plot, as_json)
    _show_bench(report, tables(report), wrong_results(report), as_json)


@bench_app.command("attention")
def bench_attention(
    models: Annotated[
        str | None,
        typer.Option(
            "--models",
            metavar="LIST",
            help="HEADS:KV_HEADSxHEAD_DIM. Default: 32:8x128,8:8x64. The fixed cases of other models are left out.",
        ),
    ] = None,
    sequences: Annotated[
        str | None, typer.Option("--sequences", metavar="LIST", help="Decode: sequences of a batch. Default: 1,16.")
    ] = None,
    contexts: Annotated[
        str | None,
        typer.Option("--contexts", metavar="LIST", help="Decode: tokens of a sequence. Default: 1k, 2k, … 128k."),
    ] = None,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Decode at two contexts and budgets, two cases of prefill; less than a minute."),
    ] = False,
    time_limit_s: TimeLimit = None,
    report_path: ReportFile = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="PNG", help="Draw decode's speed against FP16.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Speed of attention to pages of all formats and mixtures on a GPU, against FP16; results are checked.

    Decode at all models, sequences and contexts; fixed cases of prefill, of both kernels on few query tokens, and of
    decode that adds up how much of the attention each page has.
    """
    with exit_codes(as_json):
        from kvpack.bench.attention_report import parse_options, tables, wrong_results

        with _usage():
            options = parse_options(
                models=models, sequences=sequences, contexts=contexts, quick=quick, time_limit_s=time_limit_s
            )
        report = _run_bench("attention", options, report_path, "plot_attention", plot, as_json)
    _show_bench(report, tables(report), wrong_results(report), as_json)


@bench_app.command("snapshot")
def bench_snapshot(
    context: Annotated[
        Path | None,
        typer.Argument(metavar="[FILE]", help="A context; without, pages are constructed and no sizes are told."),
    ] = None,
    tokens: Annotated[
        int, typer.Option("--tokens", min=4096, help="Of the cache on the GPU, whose pages repeat the file's.")
    ] = 32768,
    threads: Threads = None,
    report_path: Annotated[
        Path | None, typer.Option("--report", metavar="FILE", help="Write the JSON report here.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="PNG", help="Draw sizes, and loads against prefills.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Sizes of a context beside fp16, pages as they are, LZ4 and zstd; how fast it is coded, saved and loaded.

    On a GPU the pages are repeated in a cache of an 8B Llama's shape, which is saved, loaded, and compared with a
    prefill: from which bandwidth on is it better to load? Without a GPU the CPU's coder alone is measured.
    """
    with exit_codes(as_json):
        if plot is not None:
            require_matplotlib()
        if tokens % 64:
            raise typer.BadParameter(f"{tokens} is no multiple of 64, the tokens of a page", param_hint="--tokens")
        from kvpack.bench import snapshot
        from kvpack.bench.report import write_report
        from kvpack.bench.snapshot_report import tables

        report = snapshot.bench_snapshot(
            context, tokens=tokens, threads=threads, say=lambda stage: print(f"kvpack: {stage} …", file=sys.stderr)
        )
        if report_path is not None:
            write_report(report_path, report)
        if plot is not None:
            from kvpack.bench.plot import plot_snapshot

            plot_snapshot(report, plot)
    _show_bench(report, tables(report), [], as_json)


@contextmanager
def _usage() -> Iterator[None]:
    """Around the parsing of options."""
    try:
        yield
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _run_bench(
    name: str, options: Any, report_path: Path | None, plot_name: str, plot: Path | None, as_json: bool
) -> dict[str, Any]:
    """The report of the benchmark ``kvpack.bench.<name>``, written and drawn as asked for."""
    import importlib

    from kvpack.bench.report import write_report

    if plot is not None:
        require_matplotlib()
    with needs_device(as_json):
        report: dict[str, Any] = getattr(importlib.import_module(f"kvpack.bench.{name}"), f"bench_{name}")(
            options,
            publish=None if report_path is None else lambda so_far: write_report(report_path, so_far),
            say=lambda stage: print(f"kvpack: {stage} …", file=sys.stderr),
        )
    if plot is not None:
        from kvpack.bench import plot as plots

        getattr(plots, plot_name)(report, plot)
    return report


def _show_bench(report: dict[str, Any], found: dict[str, Any], wrong: list[str], as_json: bool) -> None:
    if as_json:
        print(json.dumps({"ok": not wrong, **report}, allow_nan=False))
    else:
        _print_bench(report, list(found.values()))
        for line in wrong:
            print(f"kvpack: {line}", file=sys.stderr)
    if wrong:
        raise typer.Exit(int(ExitCode.MISMATCH))


def _print_bench(report: dict[str, Any], found: list[Any]) -> None:
    from rich import box
    from rich.table import Table

    console = data_console()
    device = report["device"]
    gpu = f", driver {device['driver']}, CUDA {device['cuda']}" if device["cuda"] else ""
    print(f"{device['name']}{gpu}\n{report['note']}")
    for one in found:
        table = Table(title=one.title, box=box.SIMPLE_HEAD)
        for heading in one.headings:
            table.add_column(heading, justify="right")
        for row in one.rows:
            table.add_row(*row)
        console.print(table)
    seconds = report["seconds"].get("total", 0.0)
    print(f"{seconds:.0f} s" + ("" if report["complete"] else f"; not complete: {report['stopped']}"))
