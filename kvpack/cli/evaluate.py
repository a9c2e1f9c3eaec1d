"""``kvpack eval``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvpack.cli.failures import exit_codes, require_matplotlib, require_transformers
from kvpack.cli.options import CacheBits, CacheBudget, ComputeDevice, ComputeDtype, ComputeDtypeOption, Json
from kvpack.cli.printing import data_console, printable, progress_bar, shown_number, shown_size

if TYPE_CHECKING:
    from kvpack.integrations.transformers.evaluation import Mean, ModelReport, Quality, Report


def evaluate(
    models: Annotated[list[Path], typer.Argument(metavar="MODEL…", help="Model directories, coded or ordinary.")],
    text: Annotated[Path, typer.Option("--text", metavar="FILE", help="What the models read, in UTF-8.")],
    against: Annotated[
        Path | None,
        typer.Option("--against", metavar="ORIGINAL", help="The model directory that the others are compared with."),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            "--context", min=2, help="Tokens of a window. Default: 512, or what the models have positions for."
        ),
    ] = None,
    windows: Annotated[
        int, typer.Option("--windows", min=1, help="How many windows are read, at equal distances over the text.")
    ] = 16,
    kv_bits: CacheBits = None,
    kv_budget: CacheBudget = None,
    device: ComputeDevice = "auto",
    dtype: ComputeDtype = ComputeDtypeOption.AUTO,
    as_json: Json = False,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="PNG", help="Draw the models: size, and KL or perplexity.")
    ] = None,
) -> None:
    """Measure models on a text: perplexity; with --against also KL and same top tokens.

    The text is cut into windows that do not overlap; the first token of each
    is not scored. Standard errors are those of the windows' means. With
    --against, the original's logits are kept in a temporary file meanwhile.
    With --kv-bits or --kv-budget each model reads the windows a second time, a
    token a step, through such a cache: a full forward reads no cache.
    """
    with exit_codes(as_json):
        if plot is not None:
            require_matplotlib()
        from kvpack.integrations.transformers.cache_options import CacheOptions

        cache = None if kv_bits is None and kv_budget is None else CacheOptions(kv_bits, kv_budget)
        require_transformers("kvpack eval")
        from kvpack.integrations.transformers.evaluation import evaluate as run

        with progress_bar("eval", unit="tokens") as progress:
            report = run(
                models,
                text,
                against=against,
                context=context,
                windows=windows,
                cache=cache,
                device=device,
                dtype=dtype.value,
                progress=progress,
            )
        if plot is not None:
            from kvpack.bench.plot import plot_models

            plot_models(report.as_dict(), plot)
    if as_json:
        from kvpack.bench.provenance import environment, kvpack_command

        made = {"command": kvpack_command(), **environment(("torch", "transformers"))}
        print(json.dumps({**report.as_dict(), **made}, allow_nan=False))
    else:
        _print(report)
    if plot is not None:
        print(f"drew {plot}", file=sys.stderr)


def _shown(mean: Mean | None, digits: int) -> str:
    if mean is None:
        return "–"
    error = "" if mean.standard_error is None else f" ± {mean.standard_error:.{digits}f}"
    return f"{mean.value:.{digits}f}{error}"


def _print(report: Report) -> None:
    from rich import box
    from rich.table import Table

    compared = report.original is not None
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("model", overflow="fold")
    headings = ["size", "bits a weight", "perplexity"]
    headings += ["loss increase", "KL", "same top token"] if compared else []
    for heading in headings:
        table.add_column(heading, justify="right")

    def row(name: str, model: ModelReport, quality: Quality, read: str = "") -> None:
        cells = [
            printable(name) + read,
            "–" if model.size.bytes is None else shown_size(model.size.bytes),
            shown_number(model.size.bits_per_weight),
            _shown(quality.perplexity, 3),
        ]
        if compared:
            cells += [_shown(quality.loss_increase, 4), _shown(quality.kl, 5), _shown(quality.same_top_token, 4)]
        table.add_row(*cells)

    originals = [] if report.original is None else [report.original]
    names = _names([Path(model.model) for model in (*originals, *report.models)])
    for original in originals:
        of_original, *names = names
        row(f"{of_original} (original)" if of_original in names else of_original, original, original.full)
    for name, model in zip(names, report.models, strict=True):
        row(name, model, model.full)
        if model.stepwise is not None:
            row(name, model, model.stepwise, f", KV in {shown_number(model.kv_bits)} bits")
    console: Any = data_console()
    console.print(table)
    # Of one window there is none.
    errors = "; ± is the standard error over windows" if report.windows > 1 else ""
    nats = "; loss and KL(original ‖ model) in nats a token" if compared else ""
    console.print(
        f"{report.windows} of {report.windows_available} windows of {report.context} tokens, {report.scored_tokens} "
        f"scored, in {report.models[0].dtype}{errors}{nats}",
        highlight=False,
    )


def _names(directories: list[Path]) -> list[str]:
    """Of directories, without the folders that they lie in unless two have one name."""
    names = [directory.name for directory in directories]
    if len(set(names)) == len(set(directories)):
        return names
    return [str(directory) for directory in directories]
