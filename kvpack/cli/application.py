"""The command line: parse, call, print. Data goes to stdout, everything else to stderr.

Exit codes: 0 ok, 1 failed, 2 usage, 3 corrupt file, 4 mismatch, 5 no device or something not installed, 130
interrupted. Heavy modules are imported inside the commands.
"""

from __future__ import annotations

import io
import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum, StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from kvpack._version import __version__
from kvpack.encode.rates import DEFAULT_BITS, MAX_BITS, MIN_BITS

if TYPE_CHECKING:
    from kvpack.encode.pipeline import Progress


class ExitCode(IntEnum):
    """What the process's exit status means."""

    OK = 0
    FAILED = 1
    USAGE = 2
    CORRUPT = 3
    MISMATCH = 4
    NO_DEVICE = 5
    INTERRUPTED = 130


_SHOWN_MISMATCHES = 20


class LayoutOption(StrEnum):
    """Names for --layout."""

    AUTO = "auto"
    COMPACT = "compact"
    BALANCED = "balanced"
    FAST = "fast"


class PresetOption(StrEnum):
    """Names for --preset."""

    NEAR_LOSSLESS = "near-lossless"
    LOSSLESS = "lossless"


class DeviceOption(StrEnum):
    """Names for --device."""

    CPU = "cpu"
    CUDA = "cuda"


class AllocationOption(StrEnum):
    """Names for --allocation."""

    TENSOR = "tensor"
    MODEL = "model"


class DtypeOption(StrEnum):
    """Names for --dtype."""

    ORIGINAL = "original"
    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


_UNFOLDED_COLUMNS = 10_000

app = typer.Typer(
    name="kvpack",
    help="Small LLM weights: entropy-coded safetensors, exact or at the rate you choose.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
bench_app = typer.Typer(
    help="Measure speed on this machine.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(bench_app, name="bench")

Source = Annotated[Path, typer.Argument(metavar="IN", help="A .safetensors file or a model directory.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, also on failure.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing output; other files are never deleted.")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads; all cores by default.")]
TimeLimit = Annotated[
    float | None, typer.Option("--time-limit-s", min=1, help="Stop after so long and report what there is.")
]
ReportFile = Annotated[
    Path | None, typer.Option("--report", metavar="FILE", help="Write the JSON report here after each step.")
]


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"kvpack {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    pass


def _failure(code: int, kind: str, message: str) -> dict[str, Any]:
    """What --json prints instead of a report."""
    return {"ok": False, "error": kind, "message": message, "exit_code": int(code)}


def _fail(code: ExitCode, kind: str, message: str, as_json: bool) -> NoReturn:
    if as_json:
        print(json.dumps(_failure(code, kind, message)))
    else:
        print(f"kvpack: {message}", file=sys.stderr)
    raise typer.Exit(int(code))


@contextmanager
def _errors(as_json: bool) -> Iterator[None]:
    """Known failures become one sentence (or one JSON object) and an exit code; others stay tracebacks."""
    from kvpack.errors import DeviceError, FormatError, InputError, NotInstalledError

    try:
        yield
    except InputError as error:
        _fail(ExitCode.USAGE, type(error).__name__, str(error), as_json)
    except (DeviceError, NotInstalledError) as error:
        _fail(ExitCode.NO_DEVICE, type(error).__name__, str(error), as_json)
    except FormatError as error:
        _fail(ExitCode.CORRUPT, type(error).__name__, str(error), as_json)
    except typer.BadParameter as error:
        if not as_json:
            raise
        _fail(ExitCode.USAGE, "InputError", error.message, as_json)
    except OSError as error:
        if isinstance(error, FileNotFoundError) and error.filename:
            _fail(ExitCode.USAGE, "InputError", f"{error.filename} does not exist", as_json)
        where = f": {error.filename}" if error.filename else ""
        _fail(ExitCode.FAILED, type(error).__name__, f"{error.strerror or error}{where}", as_json)
    except KeyboardInterrupt:
        _fail(ExitCode.INTERRUPTED, "KeyboardInterrupt", "interrupted; no output was left behind", as_json)


@contextmanager
def _progress(title: str) -> Iterator[Progress]:
    """A bar on stderr with rate and time left; nothing where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.progress import Progress as Bar

    from kvpack.encode.compiling import on_compile
    from kvpack.encode.pipeline import Progress

    console = Console(stderr=True)
    told = False

    def tell() -> None:
        nonlocal told
        if not told:
            told = True
            console.print("compiling the CPU kernels (the first time they are used on this machine) …", style="dim")

    with (
        on_compile(tell),
        Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[tensor]}", style="dim", markup=False),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        ) as bar,
    ):
        task = bar.add_task(title, total=None, tensor="")
        yield Progress(
            total=lambda size: bar.update(task, total=size),
            advance=lambda size: bar.advance(task, size),
            tensor=lambda name: bar.update(task, tensor=name),
        )


def _size(size_bytes: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if size_bytes < 1000 or unit == "GB":
            return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.2f} {unit}"
        size_bytes /= 1000
    raise AssertionError


def _number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _parse_tensor_bits(values: list[str] | None) -> dict[str, float]:
    rates = {}
    for value in values or []:
        pattern, separator, bits = value.rpartition("=")
        try:
            rates[pattern] = float(bits)
        except ValueError:
            separator = ""
        if not separator or not pattern:
            raise typer.BadParameter(f"{value!r} is not REGEX=BITS", param_hint="--tensor-bits")
    return rates


def _require_matplotlib() -> None:
    """For --plot: before the work, not behind it."""
    from kvpack.errors import NotInstalledError

    try:
        import kvpack.bench.plot  # noqa: F401
    except ImportError as error:
        raise NotInstalledError(f"--plot needs matplotlib ({error}): pip install 'kvpack[plot]'") from None


@app.command()
def compress(
    source: Source,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="OUT", help="Default: NAME.kvpack.safetensors or NAME-kvpack."),
    ] = None,
    bits: Annotated[
        float | None,
        typer.Option(
            "--bits", help=f"Bits a weight, {MIN_BITS} to {MAX_BITS}, every overhead counted. Default: {DEFAULT_BITS}."
        ),
    ] = None,
    preset: Annotated[PresetOption | None, typer.Option("--preset", help="Instead of a rate.")] = None,
    layout: Annotated[LayoutOption, typer.Option("--layout", help="How weights become symbols.")] = (LayoutOption.AUTO),
    tile_cols: Annotated[
        int | None,
        typer.Option("--tile-cols", help="Columns of a tile: a multiple of 32 up to 512."),
    ] = None,
    allocation: Annotated[
        AllocationOption,
        typer.Option("--allocation", help="The rate for each tensor, or one step for the model."),
    ] = AllocationOption.TENSOR,
    include: Annotated[str | None, typer.Option("--include", metavar="REGEX", help="Code these names too.")] = None,
    exclude: Annotated[
        str | None, typer.Option("--exclude", metavar="REGEX", help="Keep these names as they are.")
    ] = None,
    tensor_bits: Annotated[
        list[str] | None,
        typer.Option("--tensor-bits", metavar="REGEX=BITS", help="A rate of their own; repeatable."),
    ] = None,
    threads: Threads = None,
    device: Annotated[
        DeviceOption, typer.Option("--device", help="Where weights are coded; the output is the same.")
    ] = DeviceOption.CPU,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Report, but write nothing.")] = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Compress a .safetensors file or a model directory.

    Embeddings, output layers, norms, biases and small tensors are kept as they are (the report lists them).
    """
    with _errors(as_json):
        from kvpack.compression import compress as run

        rates = _parse_tensor_bits(tensor_bits)
        with _progress("compress") as progress:
            report = run(
                source,
                output,
                bits=bits,
                preset=preset,
                layout=layout,
                tile_cols=tile_cols,
                allocation=allocation,
                include=include,
                exclude=exclude,
                tensor_bits=rates,
                threads=threads,
                dry_run=dry_run,
                force=force,
                progress=progress,
                device=device.value,
            )
    if as_json:
        print(json.dumps(report.as_dict(), allow_nan=False))
        return
    console = _console()
    _print_tensors([vars(tensor) for tensor in report.tensors], kept_singly=False)
    kept: dict[str, list[str]] = {}
    for tensor in report.tensors:
        if tensor.method == "keep":
            kept.setdefault(str(tensor.reason), []).append(tensor.name)
    for reason, names in kept.items():
        shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        console.print(f"kept ({reason}): {shown}", markup=False, highlight=False)
    coded = ""
    if report.bits_per_weight is not None:
        coded = f"; coded tensors {report.bits_per_weight:.3f} bits a weight"
        coded += f", noise {_number(report.noise_db)} dB" if report.noise_db is not None else ", exact"
    console.print(
        f"{_size(report.input_bytes)} → {_size(report.output_bytes)}, {report.ratio:.2f} times smaller"
        f"{coded}; {report.seconds:.1f} s",
        highlight=False,
    )
    console.print(
        "dry run: nothing was written" if report.output is None else f"wrote {report.output}",
        markup=False,
        highlight=False,
    )


def _console() -> Any:
    """Standard output; lines are not folded where it is a file or a pipe."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=_UNFOLDED_COLUMNS)


def _printable(text: str) -> str:
    """Names come from files: no control character reaches the terminal."""
    return "".join(character if character.isprintable() else "\ufffd" for character in text)


def _print_tensors(tensors: list[dict[str, Any]], *, kept_singly: bool) -> None:
    """A table in plain text: rich takes seven seconds for 10,000 rows."""
    rows = [("tensor", "shape", "dtype", "method", "layout", "bits", "entropy", "noise dB", "outliers")]
    rows += [
        (
            _printable(tensor["name"]),
            "×".join(map(str, tensor["shape"])),
            tensor["dtype"],
            tensor["method"],
            tensor["layout"] or "–",
            _number(tensor["bits_per_weight"], 3),
            _number(tensor["entropy_bits"], 3),
            _number(tensor["noise_db"]),
            str(tensor["outliers"]),
        )
        for tensor in tensors
        if kept_singly or tensor["method"] != "keep"
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        left = [cell.ljust(width) for cell, width in zip(row[:5], widths[:5], strict=True)]
        right = [cell.rjust(width) for cell, width in zip(row[5:], widths[5:], strict=True)]
        lines.append("  ".join([*left, *right]).rstrip())
    print("\n".join(lines) + "\n")


@app.command()
def decompress(
    source: Source,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="OUT", help="Where to write.")],
    dtype: Annotated[
        DtypeOption, typer.Option("--dtype", help="Float type of the coded tensors.")
    ] = DtypeOption.ORIGINAL,
    threads: Threads = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write ordinary safetensors back."""
    with _errors(as_json):
        from kvpack.encode.pipeline import decompress as run

        with _progress("decompress") as progress:
            report = run(source, output, dtype=dtype, threads=threads, force=force, progress=progress)
    if as_json:
        print(json.dumps(report.as_dict()))
        return
    print(
        f"{report.tensors} tensors, {_size(report.input_bytes)} → {_size(report.output_bytes)} "
        f"in {report.seconds:.1f} s\nwrote {report.output}"
    )


@app.command()
def inspect(
    source: Source,
    tensor: Annotated[str | None, typer.Option("--tensor", metavar="NAME", help="Only this tensor.")] = None,
    as_json: Json = False,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", metavar="PNG", help="Draw bits and noise of each tensor."),
    ] = None,
) -> None:
    """List what a file holds: shape, method, layout, bits, entropy, noise, outliers.

    Reads headers alone: `kvpack verify` is what checks contents.
    """
    with _errors(as_json):
        from kvpack.encode.report import describe

        if plot is not None:
            _require_matplotlib()
        report = describe(source, tensor)
        if plot is not None:
            from kvpack.bench.plot import plot_tensors
            from kvpack.errors import InputError

            if not report["coded"]:
                raise InputError("no tensor is coded, so there is nothing to draw")
            plot_tensors(report["tensors"], plot, title=source.name)
    if as_json:
        print(json.dumps(report, allow_nan=False))
        return
    console = _console()
    _print_tensors(report["tensors"], kept_singly=True)
    console.print(
        f"{len(report['tensors'])} tensors, {report['coded']} coded, {_size(report['output_bytes'])}; coded tensors "
        f"{_number(report['bits_per_weight'], 3)} bits a weight, noise {_number(report['noise_db'])} dB",
        highlight=False,
    )
    if plot is not None:
        print(f"drew {plot}", file=sys.stderr)


@app.command()
def verify(
    source: Source,
    against: Annotated[
        Path | None,
        typer.Option("--against", metavar="ORIGINAL", help="Compare with the original file or directory."),
    ] = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Check structure, every CRC and every lane; with --against also the contents.

    Says how many bytes carry no checksum, as kept tensors do in files of early versions and in ordinary ones.
    """
    with _errors(as_json):
        from kvpack.encode.verify import verify as run

        with _progress("verify") as progress:
            progress.total(_data_bytes(source))
            result = run(source, against, threads=threads, progress=progress.advance)
    if as_json:
        print(json.dumps({"ok": not result.mismatches, **vars(result)}))
    else:
        for name, difference in list(result.mismatches.items())[:_SHOWN_MISMATCHES]:
            print(f"kvpack: {_printable(name)}: {difference}", file=sys.stderr)
        if len(result.mismatches) > _SHOWN_MISMATCHES:
            print(f"kvpack: {len(result.mismatches)} tensors differ in all", file=sys.stderr)
        if not result.coded:
            print("kvpack: nothing in it is coded: this is an ordinary safetensors file", file=sys.stderr)
        compared = ", compared with the original" if result.compared else ""
        unchecked = ""
        if result.bytes_without_checksum:
            unchecked = f"; {_size(result.bytes_without_checksum)} carry no checksum"
            unchecked += "" if result.compared else ": only --against finds damage there"
        verdict = "MISMATCH" if result.mismatches else "ok"
        print(
            f"{verdict}: {result.tensors} tensors, {result.coded} coded, {result.tiles} tiles, "
            f"{result.elements} weights decoded{compared}{unchecked}"
        )
    if result.mismatches:
        raise typer.Exit(int(ExitCode.MISMATCH))


def _data_bytes(source: Path) -> int:
    from kvpack.encode.reader import shard_paths

    return sum(path.stat().st_size for path in shard_paths(source))


@bench_app.command("codec")
def bench_codec(
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Speed of the CPU coder: encode and decode, one core and all."""
    with _errors(as_json):
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
    _console().print(table)


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
        typer.Option("--tile-cols", metavar="LIST", help="Tile columns to choose from; default 128,256,512."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A few shapes, less than a minute.")] = False,
    time_limit_s: TimeLimit = None,
    report_path: ReportFile = None,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="PNG", help="Draw speed against FP16.")] = None,
    as_json: Json = False,
) -> None:
    """Speed of products with coded weights on a GPU, against FP16, INT8 and INT4; every result is checked first."""
    with _errors(as_json):
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
    with _errors(as_json):
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
    with _errors(as_json):
        from kvpack.bench.attention_report import parse_options, tables, wrong_results

        with _usage():
            options = parse_options(
                models=models, sequences=sequences, contexts=contexts, quick=quick, time_limit_s=time_limit_s
            )
        report = _run_bench("attention", options, report_path, "plot_attention", plot, as_json)
    _show_bench(report, tables(report), wrong_results(report), as_json)


@contextmanager
def _needs_device(as_json: bool) -> Iterator[None]:
    """Without torch, CuPy or a GPU the exit code says that there is no device."""
    from kvpack.errors import DeviceError

    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "cupy"):
            raise
        message = f"no device: {error.name} is not installed: pip install 'kvpack[cuda13]' or 'kvpack[cuda12]'"
        _fail(ExitCode.NO_DEVICE, "DeviceError", message, as_json)
    except DeviceError as error:
        _fail(ExitCode.NO_DEVICE, "DeviceError", str(error), as_json)


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
        _require_matplotlib()
    with _needs_device(as_json):
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

    console = _console()
    device = report["device"]
    print(f"{device['name']}, driver {device['driver']}, CUDA {device['cuda']}\n{report['note']}")
    for one in found:
        table = Table(title=one.title, box=box.SIMPLE_HEAD)
        for heading in one.headings:
            table.add_column(heading, justify="right")
        for row in one.rows:
            table.add_row(*row)
        console.print(table)
    seconds = report["seconds"].get("total", 0.0)
    print(f"{seconds:.0f} s" + ("" if report["complete"] else f"; not complete: {report['stopped']}"))


def _terminate(number: int, frame: object) -> NoReturn:
    """SIGTERM ends the program as Ctrl-C does, so that temporary files go."""
    raise KeyboardInterrupt


def main() -> None:
    """Entry point of the ``kvpack`` script."""
    signal.signal(signal.SIGTERM, _terminate)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # an ASCII terminal is no reason to fail
    if "--json" not in sys.argv:
        app(prog_name="kvpack")
        return
    # With --json, whatever goes wrong is an object too.
    usage_error: Any = typer.BadParameter.__bases__[0]  # click's, of which typer carries a copy
    try:
        code = app(prog_name="kvpack", standalone_mode=False)
    except usage_error as error:
        print(json.dumps(_failure(ExitCode.USAGE, "UsageError", error.format_message())))
        code = ExitCode.USAGE
    except Exception as error:
        print(json.dumps(_failure(ExitCode.FAILED, type(error).__name__, str(error))))
        raise
    sys.exit(int(code or 0))
