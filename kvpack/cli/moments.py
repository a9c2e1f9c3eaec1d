"""``kvpack moments``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvpack.cli.failures import exit_codes, require_transformers
from kvpack.cli.options import ComputeDevice, ComputeDtype, ComputeDtypeOption, Force, Json
from kvpack.cli.printing import counted, printable, progress_bar, shown_names, shown_size

if TYPE_CHECKING:
    from kvpack.integrations.transformers.calibration import CalibrationReport


def moments(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A model directory that is not compressed.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="OUT", help="The moments file to write.")],
    text: Annotated[
        Path | None,
        typer.Option(
            "--text",
            metavar="FILE",
            help="What the model reads: text in UTF-8, .jsonl with a text a line, or token ids in .npy, .safetensors, "
            ".json.",
        ),
    ] = None,
    own: Annotated[
        bool, typer.Option("--self-samples", help="Instead of a text, what the model itself writes at temperature 1.")
    ] = False,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="How many tokens are read.")] = 131_072,
    window: Annotated[
        int | None,
        typer.Option("--window", min=2, help="Tokens of a window. Default: 2048, or what the model has positions for."),
    ] = None,
    begin: Annotated[float, typer.Option("--from", metavar="F", help="Begin at this fraction of the text.")] = 0.0,
    end: Annotated[float, typer.Option("--to", metavar="F", help="End at this fraction of the text.")] = 1.0,
    seed: Annotated[int, typer.Option("--seed", help="Of labels and texts that are drawn.")] = 0,
    sensitivities: Annotated[
        bool,
        typer.Option("--sensitivities/--no-sensitivities", help="Find how much the model minds errors at outputs."),
    ] = True,
    device: ComputeDevice = "auto",
    dtype: ComputeDtype = ComputeDtypeOption.AUTO,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Have a model read a text, and write the moments of what its linears get.

    They say which errors of weights a model minds least. The run goes layer
    after layer, so that the layer in hand alone is on the device. One that was
    ended goes on where it was when the same command is given again: what is
    finished lies in a hidden directory beside the output meanwhile.
    """
    with exit_codes(as_json):
        require_transformers("kvpack moments")
        from kvpack.errors import InputError

        if own == (text is not None):
            raise InputError("either --text or --self-samples is given, one of them")
        if own and (begin, end) != (0.0, 1.0):
            raise InputError("--from and --to are parts of a --text; with --self-samples there is none")
        from kvpack.integrations.transformers.calibration_inputs import check_moments_run

        check_moments_run(model, text, output, (begin, end), force=force)
        from kvpack.integrations.transformers.calibration import calibrate

        with progress_bar("moments", unit="tokens through layers") as progress, _told_what_is_finished(output):
            report = calibrate(
                model,
                text,
                output,
                tokens=tokens,
                window=window,
                part=(begin, end),
                seed=seed,
                sensitivities=sensitivities,
                device=device,
                dtype=dtype.value,
                force=force,
                progress=progress,
            )
    if as_json:
        from kvpack.bench.provenance import environment, kvpack_command

        made = {"command": kvpack_command(), **environment(("torch", "transformers"))}
        print(json.dumps({**report.as_dict(), **made}, allow_nan=False))
        return
    _print(report)


@contextmanager
def _told_what_is_finished(output: Path) -> Iterator[None]:
    from kvpack.integrations.transformers.calibration_work import work_path

    try:
        yield
    except KeyboardInterrupt:
        if work_path(output).is_dir():
            where = printable(str(work_path(output)))
            print(f"kvpack: what is finished lies in {where}: the same command goes on from there", file=sys.stderr)
        raise


def _print(report: CalibrationReport) -> None:
    if report.resumed:
        print("went on from what an earlier run had left", file=sys.stderr)
    print(
        f"{counted(report.tensors, 'tensor')}, {report.matrices} second moments; {report.tokens} tokens in "
        f"{counted(report.windows, 'window')} of {report.window_tokens}, in {report.dtype}"
    )
    if report.note:
        print(report.note)
    if report.whole_model is not None:
        print(f"the whole model was on {report.device}: {printable(report.whole_model)}")
    if report.untouched:
        print(f"{report.untouched} of them are of experts that met no token: a longer text would reach more")
    reasons: dict[str, list[str]] = {}
    for name, reason in report.left_out.items():
        reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        print(f"without moments ({printable(reason)}): {shown_names(names)}")
    print(f"wrote {printable(report.output)}, {shown_size(report.output_bytes)}; {report.seconds:.1f} s")
