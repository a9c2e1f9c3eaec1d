"""``kvpack kv``: saved contexts, looked at, checked and converted."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from kvpack.cli.bench import bench_snapshot
from kvpack.cli.failures import ExitCode, exit_codes
from kvpack.cli.options import Force, Json, Threads
from kvpack.cli.printing import counted, print_aligned, printable, progress_bar, shown_names, shown_number, shown_size

kv_app = typer.Typer(
    name="kv",
    help="Saved contexts: KV caches in files.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_LINE = 120
# Errors of what was never a context.
_OTHER_KINDS = ("NotAContainerError", "NotASnapshotError")
kv_app.command("bench")(bench_snapshot)
Context = Annotated[Path, typer.Argument(metavar="FILE", help="A context, as kvpack generate --save-context has it.")]
ContextOrDirectory = Annotated[Path, typer.Argument(metavar="PATH", help="A context, or a directory of some.")]


@kv_app.command()
def inspect(context: ContextOrDirectory, as_json: Json = False) -> None:
    """Say what a context is of: model, tokens, pages by format, sizes. Reads headers alone.

    Of a directory, a line for each context in it, and on stderr one for each that is damaged, and for other files.
    """
    with exit_codes(as_json):
        from kvpack.format.snapshot_summary import describe_snapshot

        report = _describe_all(context) if context.is_dir() else describe_snapshot(context)
    if as_json:
        print(json.dumps({"ok": True, **report}, allow_nan=False))
    elif context.is_dir():
        _print_all(report)
    else:
        _print(report)


def _describe_all(directory: Path) -> dict[str, Any]:
    """What each context directly in a directory is of; and why other files are none."""
    from kvpack.errors import FormatError
    from kvpack.format.snapshot_summary import describe_snapshot

    contexts, others = [], []
    for path in sorted(directory.iterdir()):
        if not path.is_file():  # what else there is, as a pipe, might not let go
            continue
        try:
            contexts.append({"file": path.name, **describe_snapshot(path)})
        except (FormatError, OSError) as error:
            others.append({"file": path.name, "reason": f"{type(error).__name__}: {error}"})
    return {"contexts": contexts, "others": others}


def _print_all(report: dict[str, Any]) -> None:
    rows = [("context", "model", "pages", "first token", "tokens", "size", "of fp16")]
    rows += [
        (
            printable(of["file"]),
            "not known" if of["fingerprint"] is None else of["fingerprint"]["model"][:16],
            ", ".join(dict.fromkeys(kind.split()[1] for kind in of["pages"])),
            str(of["first_page"] * of["page_tokens"]),
            str(of["tokens"]),
            shown_size(of["file_bytes"]),
            shown_number(of["file_bytes"] / of["fp16_bytes"], 3),
        )
        for of in report["contexts"]
    ]
    if report["contexts"]:
        print_aligned(rows, left=3)
    size = shown_size(sum(of["file_bytes"] for of in report["contexts"]))
    print(f"{counted(len(report['contexts']), 'context')}, {size}")
    # Files of other kinds are many in most directories; --json has the reason of each.
    kinds = [other for other in report["others"] if other["reason"].split(":")[0] in _OTHER_KINDS]
    told = report["others"]
    if len(kinds) > 1:
        told = [other for other in told if other not in kinds]
        names = shown_names([other["file"] for other in kinds])
        print(f"kvpack: {len(kinds)} other files are none: {names}", file=sys.stderr)
    for other in told:
        line = f"kvpack: {printable(other['file'])} is none: {printable(other['reason'])}"
        print(line if len(line) <= _LINE else line[: _LINE - 1] + "…", file=sys.stderr)


def _print(report: dict[str, Any]) -> None:
    of = report["fingerprint"]
    first = report["first_page"] * report["page_tokens"]
    tokens = f"tokens {first} to {first + report['tokens'] - 1}" if first else counted(report["tokens"], "token")
    model = "not known" if of is None else f"{of['model'][:16]}… ({of['dtype']})"
    layers, heads = counted(report["layers"], "layer"), counted(report["kv_heads"], "KV head")
    shape = f"{layers}, {heads} of {report['head_dim']}"
    lines = [
        f"{tokens}; {shape}, {report['dtype']}",
        f"model {printable(model)}",
    ]
    for kind, count in report["pages"].items():
        lines.append(f"{counted(count, 'page'):>13} of {kind}: {shown_size(report['coded_bytes'][kind])}")
    file, pages, fp16 = report["file_bytes"], report["page_bytes"], report["fp16_bytes"]
    lines.append(
        f"file {shown_size(file)}; {file / pages:.3f} of the pages in memory ({shown_size(pages)}), "
        f"{file / fp16:.3f} of fp16 ({shown_size(fp16)})"
    )
    print("\n".join(lines))


@kv_app.command()
def verify(context: Context, threads: Threads = None, as_json: Json = False) -> None:
    """Decode all pages of a context, with every check."""
    verify_context(context, threads, as_json)


def verify_context(context: Path, threads: int | None, as_json: bool) -> None:
    """What ``kvpack kv verify`` does, and ``kvpack verify`` of a context."""
    with exit_codes(as_json):
        from concurrent.futures import ThreadPoolExecutor

        from kvpack.encode.snapshot_coder import verify_snapshot
        from kvpack.encode.threads import default_threads

        with (
            progress_bar("verify", "runs") as progress,
            ThreadPoolExecutor(threads or default_threads()) as executor,
        ):

            def show(done: int, runs: int) -> None:
                progress.total(runs)
                progress.advance(1)

            report = verify_snapshot(context, progress=show, executor=executor)
        intact = min(report.intact_pages * 64, report.header.tokens)
    damage = None if report.damage is None else str(report.damage)
    if as_json:
        sizes = {"file_bytes": report.file_bytes, "page_bytes": report.page_bytes, "fp16_bytes": report.fp16_bytes}
        found = {"tokens": report.header.tokens, "intact_tokens": intact, **sizes, "damage": damage}
        print(json.dumps({"ok": damage is None, **found}))
    elif damage is None:
        tokens, runs = counted(report.header.tokens, "token"), counted(report.header.runs, "run")
        print(f"ok: {tokens} in {runs}, {shown_size(report.file_bytes)}")
    else:
        print(f"kvpack: {printable(damage)}", file=sys.stderr)
        verdict = f"DAMAGED: the first {intact} of {counted(report.header.tokens, 'token')} are intact"
        print(verdict + ("; kvpack generate --drop-damaged goes on behind them" if intact else ""))
    if damage is not None:
        raise typer.Exit(int(ExitCode.CORRUPT))


@kv_app.command()
def convert(
    context: Context,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="OUT", help="The file to write.")],
    kv_bits: Annotated[
        int | None, typer.Option("--kv-bits", metavar="8|4|3|2", help="Pages of so many bits, fewer than they have.")
    ] = None,
    archive: Annotated[
        bool, typer.Option("--archive", help="For cold storage: much smaller, with noise that is said.")
    ] = False,
    noise: Annotated[
        float | None, typer.Option("--noise", metavar="F", help="Of an archive's numbers, relative. Default: 0.3.")
    ] = None,
    force: Force = False,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Give pages fewer bits, or make an archive; of an archive, make a context again. All three lose something.

    Pages of the first and the newest tokens keep 16 bits, as in a cache of that many bits.
    """
    with exit_codes(as_json):
        if noise is not None and not archive:
            raise typer.BadParameter("--noise is for --archive", param_hint="--noise")
        from concurrent.futures import ThreadPoolExecutor

        from kvpack.encode.threads import default_threads

        _check_output(context, output, force=force)
        with ThreadPoolExecutor(threads or default_threads()) as executor:
            report = _convert(context, output, kv_bits, archive, 0.3 if noise is None else noise, executor)
    if as_json:
        print(json.dumps({"ok": True, **report}))
        return
    noisy = (
        ""
        if report["noise"] is None
        else f"; noise of keys {report['noise'][0]:.3f}, of values {report['noise'][1]:.3f}"
    )
    print(
        f"{report['kind']}: {shown_size(report['input_bytes'])} became {shown_size(report['output_bytes'])}, "
        f"{report['of_fp16']:.3f} of fp16{noisy}"
    )


def _check_output(context: Path, output: Path, *, force: bool) -> None:
    """
    Raises:
        InputError: ``output`` is the input, is there and not to be replaced, or is neither a context nor an archive.
    """
    from kvpack.encode.archive_coder import read_archive_header
    from kvpack.errors import FormatError, InputError, NotASnapshotError
    from kvpack.format.snapshot import SnapshotFile

    if not output.exists():
        return
    if context.exists() and output.samefile(context):
        raise InputError(f"{output} is the input, whose pages would be lost: name another output")
    if not force:
        raise InputError(f"{output} is there; --force replaces it")
    try:
        try:
            SnapshotFile(output).close()
        except NotASnapshotError:
            read_archive_header(output)
    except (FormatError, OSError):
        text = f"{output} is there, and neither a context nor an archive: it is not replaced; name another file"
        raise InputError(text) from None


def _convert(
    context: Path, output: Path, kv_bits: int | None, archive: bool, noise: float, executor: Any
) -> dict[str, Any]:
    """
    Raises:
        InputError: no way to convert is named, or several are; FormatError, OSError
    """
    from kvpack.encode.archive_coder import archive_snapshot, read_archive_header, restore_snapshot
    from kvpack.errors import InputError, NotASnapshotError
    from kvpack.format.snapshot import SnapshotFile

    try:
        with SnapshotFile(context) as file:
            header, input_bytes = file.header, file.container.file.size_bytes
    except NotASnapshotError:
        archived = read_archive_header(context)  # says so if it is no archive either
        if kv_bits is not None or archive:
            raise InputError(f"{context} is an archive: it becomes a context of the bits that it was made of") from None
        header, input_bytes, kind = archived.snapshot, context.stat().st_size, "a context from an archive"
        noises: list[float] | None = [archived.key_noise, archived.value_noise]
        output_bytes = restore_snapshot(context, output, executor=executor)
    else:
        if (kv_bits is None) == (not archive):
            raise InputError("either --kv-bits or --archive is needed")
        if archive:
            rope = None if header.fingerprint is None else _frequencies(header.fingerprint.rope, header.head_dim)
            if rope is None:
                print("kvpack: how keys are turned is not known: they are archived as they are", file=sys.stderr)
            made = archive_snapshot(context, output, noise=noise, rope_frequencies=rope, executor=executor)
            kind, output_bytes, noises = "an archive", made.file_bytes, [made.key_noise, made.value_noise]
        else:
            from kvpack.format.pages import PageFormat
            from kvpack.runtime.kv.snapshot_convert import convert_snapshot

            if kv_bits not in (8, 4, 3, 2):
                raise InputError(f"--kv-bits is {kv_bits}; pages become ones of 8, 4, 3 or 2 bits")
            kind, noises = f"pages of {kv_bits} bits", None
            output_bytes = convert_snapshot(context, output, PageFormat[f"INT{kv_bits}"], executor)
    sizes = {"input_bytes": input_bytes, "output_bytes": output_bytes, "of_fp16": output_bytes / header.fp16_bytes}
    return {"kind": kind, "tokens": header.tokens, **sizes, "noise": noises}


def _frequencies(rope: Any, head_dim: int) -> list[float] | None:
    """How fast each pair of dimensions turns, where that follows from a base alone."""
    base, share = rope.get("rope_theta"), rope.get("partial_rotary_factor", 1)
    are_numbers = isinstance(base, int | float) and isinstance(share, int | float)
    if rope.get("rope_type", "default") != "default" or not are_numbers or not 0 < base < 1e30 or not 0 < share <= 1:
        return None
    turned = int(head_dim * share)
    return [float(base) ** (-2 * pair / turned) for pair in range(turned // 2)] or None
