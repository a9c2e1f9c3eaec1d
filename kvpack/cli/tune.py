"""``kvpack tune``: measure what launches cost on this GPU, and keep it for later processes."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer

from kvpack.cli.failures import exit_codes, needs_device
from kvpack.cli.options import Json
from kvpack.cli.printing import data_console, progress_bar, shown_number


def tune(
    device: Annotated[str, typer.Option("--device", help="cuda or cuda:N.")] = "cuda",
    time_limit_s: Annotated[
        float, typer.Option("--time-limit-s", min=1, help="Begin nothing new after so long, and keep what there is.")
    ] = 60.0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say by which costs launches are chosen now; measure and write nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Measure what the parts of a product's launch cost on this GPU, so that the fastest launches are chosen.

    Takes about a minute, and is worth it once a device and version. Without it, launches are chosen by costs that come
    with kvpack. KVPACK_LAUNCH_COSTS=shipped leaves measured costs out of use.
    """
    with exit_codes(as_json), needs_device(as_json):
        from kvpack.bench.tune import tune_device

        with progress_bar("tuning launches", unit="cases") as progress:
            report = tune_device(device, time_limit_s=time_limit_s, dry_run=dry_run, progress=progress)
    if as_json:
        print(json.dumps({"ok": True, **report}, allow_nan=False))
    else:
        _show(report)


def _show(report: dict[str, Any]) -> None:
    from rich import box
    from rich.table import Table

    print(f"{report['device']}: launches are chosen by costs that are {report['in_use']}")
    if report["note"] and report["dry_run"]:
        print(report["note"])
    table = Table(title="costs, µs", box=box.SIMPLE_HEAD)
    names = list(next(iter(report["costs"].values())))
    for heading in ("vectors, at most", *names):
        table.add_column(heading, justify="right")
    for eights, terms in report["costs"].items():
        table.add_row(str(8 * int(eights) or 1), *(shown_number(terms[name], 3) for name in names))
    data_console().print(table)
    if report["dry_run"]:
        print(f"`kvpack tune` would time {report['cases']} products and write {report['file']}")
        return
    for eights, slower in report["slower_than_best"].items():
        print(
            f"up to {8 * int(eights) or 1} vectors: chosen launches were {slower['before']:.1%} slower than the best "
            f"timed, now {slower['after']:.1%}"
        )
    for name, error in report["errors"].items():
        print(f"kvpack: {name}: {error}", file=sys.stderr)
    if not report["complete"]:
        print("kvpack: time did not suffice for all: --time-limit-s gives more", file=sys.stderr)
    print(
        f"{report['launches_timed']} launches of {report['cases_timed']} products in {report['seconds']:.0f} s, "
        f"kept in {report['file']}"
    )
