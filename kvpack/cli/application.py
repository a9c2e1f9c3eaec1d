"""The ``kvpack`` program: its commands put together, and the entry point.

Data goes to stdout, everything else to stderr. Exit codes: 0 ok, 1 failed, 2 usage, 3 corrupt file, 4 mismatch,
5 no device or something not installed, 130 interrupted. Heavy modules are imported inside the commands.
"""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import warnings
from typing import Annotated, Any, NoReturn, TextIO

import typer

from kvpack._version import __version__
from kvpack.cli.bench import bench_app
from kvpack.cli.compress import compress, decompress
from kvpack.cli.evaluate import evaluate
from kvpack.cli.failures import ExitCode, failure
from kvpack.cli.generate import generate
from kvpack.cli.inspect import inspect, verify
from kvpack.cli.kv import kv_app
from kvpack.cli.moments import moments
from kvpack.cli.tune import tune

app = typer.Typer(
    name="kvpack",
    help="Small LLM weights, exact or at the rate you choose; and contexts: KV caches in few bits, saved and loaded.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (compress, decompress, inspect, verify):
    app.command()(command)
app.command()(generate)
app.command("eval")(evaluate)
app.command()(moments)
app.command()(tune)
app.add_typer(kv_app, name="kv")
app.add_typer(bench_app, name="bench")


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


def _terminate(number: int, frame: object) -> NoReturn:
    """SIGTERM ends the program as Ctrl-C does, so that temporary files go."""
    raise KeyboardInterrupt


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """One line, as errors have, without the place in the code."""
    print(f"kvpack: {message}", file=sys.stderr)


def main() -> None:
    """Entry point of the ``kvpack`` script."""
    try:
        try:
            _run()
        finally:
            if isinstance(sys.stdout, io.TextIOWrapper):  # which is None where it was closed
                sys.stdout.flush()
    except OSError as error:
        if error.filename is not None:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is left to be printed has nowhere to go
        if not isinstance(error, BrokenPipeError):
            print(f"kvpack: the report could not be printed: {error.strerror or error}", file=sys.stderr)
        sys.exit(int(ExitCode.FAILED))


def _run() -> None:
    warnings.showwarning = _show_warning
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
        print(json.dumps(failure(ExitCode.USAGE, "UsageError", error.format_message())))
        code = ExitCode.USAGE
    except Exception as error:
        print(json.dumps(failure(ExitCode.FAILED, type(error).__name__, str(error))))
        raise
    sys.exit(int(code or 0))
