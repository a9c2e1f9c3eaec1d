"""``kvpack kv``: saved contexts, looked at, checked and converted."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from kvpack.cli.failures import ExitCode, exit_codes
from kvpack.cli.options import Json, Threads
from kvpack.cli.printing import printable, progress_bar, shown_size

kv_app = typer.Typer(
    name="kv",
    help="Saved contexts: KV caches in files.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Context = Annotated[Path, typer.Argument(metavar="FILE", help="A context, as kvpack generate --save-context has it.")]


@kv_app.command()
def inspect(context: Context, as_json: Json = False) -> None:
    """Say what a context is of: model, tokens, pages by format, sizes. Reads headers alone."""
    with exit_codes(as_json):
        from kvpack.encode.snapshot_coder import describe_snapshot

        report = describe_snapshot(context)
    if as_json:
        print(json.dumps({"ok": True, **report}, allow_nan=False))
        return
    _print(report)


def _print(report: dict[str, Any]) -> None:
    of = report["fingerprint"]
    first = report["first_page"] * report["page_tokens"]
    tokens = f"tokens {first} to {first + report['tokens'] - 1}" if first else f"{report['tokens']} tokens"
    model = "not known" if of is None else f"{of['model'][:16]}… ({of['dtype']})"
    shape = f"{report['layers']} layers, {report['kv_heads']} KV heads of {report['head_dim']}"
    lines = [
        f"{tokens}; {shape}, {report['dtype']}",
        f"model {printable(model)}",
    ]
    for kind, count in report["pages"].items():
        lines.append(f"{count:7d} pages of {kind}: {shown_size(report['coded_bytes'][kind])}")
    file, pages, fp16 = report["file_bytes"], report["page_bytes"], report["fp16_bytes"]
    lines.append(
        f"file {shown_size(file)}; {file / pages:.3f} of the pages in memory ({shown_size(pages)}), "
        f"{file / fp16:.3f} of fp16 ({shown_size(fp16)})"
    )
    print("\n".join(lines))


@kv_app.command()
def verify(context: Context, threads: Threads = None, as_json: Json = False) -> None:
    """Decode all pages of a context, with every check."""
    with exit_codes(as_json):
        from concurrent.futures import ThreadPoolExecutor

        from kvpack.encode.snapshot_coder import verify_snapshot
        from kvpack.encode.threads import default_threads

        with (
            progress_bar("verify", "cases") as progress,
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
        print(f"ok: {report.header.tokens} tokens in {report.header.runs} runs, {shown_size(report.file_bytes)}")
    else:
        print(f"kvpack: {printable(damage)}", file=sys.stderr)
        print(f"DAMAGED: the first {intact} of {report.header.tokens} tokens are intact")
    if damage is not None:
        raise typer.Exit(int(ExitCode.CORRUPT))
