"""``kvpack inspect`` and ``kvpack verify``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from kvpack.cli.failures import ExitCode, exit_codes, require_matplotlib
from kvpack.cli.kv import verify_context
from kvpack.cli.options import Json, Source, Threads
from kvpack.cli.printing import (
    counted,
    data_console,
    print_tensors,
    printable,
    progress_bar,
    shown_names,
    shown_number,
    shown_size,
)

_SHOWN_MISMATCHES = 20


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
    with exit_codes(as_json):
        from kvpack.encode.report import describe

        if plot is not None:
            require_matplotlib()
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
    console = data_console()
    print_tensors(report["tensors"], kept_singly=True)
    for parts in sorted({t["tensor_parallel"] for t in report["tensors"] if t.get("tensor_parallel", 1) > 1}):
        others = [t["name"] for t in report["tensors"] if t.get("tensor_parallel", parts) != parts]
        but = f" but {shown_names(others)}" if others else ""
        line = f"tensor parallel: all coded tensors{but} can be cut into {parts} parts"
        console.print(line, markup=False, highlight=False)
    for file in report["files"] if tensor is None else []:
        if file["reason"] is not None:
            line = f"{printable(file['path'])}: {file['reason']}; its tensors are {printable(file['prefix'])}…"
            console.print(line, markup=False, highlight=False)
    console.print(
        f"{counted(len(report['tensors']), 'tensor')}, {report['coded']} coded, {shown_size(report['output_bytes'])}; "
        f"coded tensors {shown_number(report['bits_per_weight'], 3)} bits a weight, "
        f"noise {shown_number(report['noise_db'])} dB",
        highlight=False,
    )
    if tensor is None and _is_context(source):
        print("kvpack: this is a context: `kvpack kv inspect` says what it is of", file=sys.stderr)
    if plot is not None:
        print(f"drew {plot}", file=sys.stderr)


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

    Says how many bytes carry no checksum, as kept tensors do in files of early versions and in ordinary ones. Of a
    context it does what `kvpack kv verify` does.
    """
    with exit_codes(as_json):
        if _is_context(source):
            if against is not None:
                raise typer.BadParameter(f"{source} is a context; --against is for weights", param_hint="--against")
            verify_context(source, threads, as_json)
            return
        from kvpack.compression import verify as run

        with progress_bar("verify") as progress:
            progress.total(_data_bytes(source))
            result = run(source, against, threads=threads, progress=progress.advance)
    if as_json:
        print(json.dumps({"ok": not result.mismatches, **vars(result)}))
    else:
        for name, difference in list(result.mismatches.items())[:_SHOWN_MISMATCHES]:
            print(f"kvpack: {printable(name)}: {difference}", file=sys.stderr)
        if len(result.mismatches) > _SHOWN_MISMATCHES:
            print(f"kvpack: {len(result.mismatches)} tensors and files differ in all", file=sys.stderr)
        if not result.coded:
            print("kvpack: nothing in it is coded: this is an ordinary safetensors file", file=sys.stderr)
        for reason in dict.fromkeys(result.left_out.values()):
            names = [name for name, why in result.left_out.items() if why == reason]
            print(f"kvpack: not in it: {shown_names(names)} ({printable(reason)})", file=sys.stderr)
        if result.extra_files:
            print(f"kvpack: not in the original: {shown_names(result.extra_files)}", file=sys.stderr)
        compared = ", compared with the original" if result.compared else ""
        compared += f", {counted(result.files, 'file')} too" if result.files else ""
        unchecked = ""
        if result.bytes_without_checksum:
            unchecked = f"; {shown_size(result.bytes_without_checksum)} carry no checksum"
            unchecked += "" if result.compared else ": only --against finds damage there"
        verdict = "MISMATCH" if result.mismatches else "ok"
        print(
            f"{verdict}: {counted(result.tensors, 'tensor')}, {result.coded} coded, {counted(result.tiles, 'tile')}, "
            f"{counted(result.elements, 'weight')} decoded{compared}{unchecked}"
        )
    if result.mismatches:
        raise typer.Exit(int(ExitCode.MISMATCH))


def _is_context(source: Path) -> bool:
    from kvpack.format.snapshot_summary import says_snapshot

    return source.is_file() and says_snapshot(source)


def _data_bytes(source: Path) -> int:
    from kvpack.encode.model_tree import SUFFIX, list_files

    if not source.is_dir():
        return source.stat().st_size
    return sum((source / file).stat().st_size for file in list_files(source).files if file.name.endswith(SUFFIX))
