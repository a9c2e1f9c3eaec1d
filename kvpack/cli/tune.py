"""``kvpack tune``: measure what launches cost on this GPU, and keep it for later processes."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer

from kvpack.cli.failures import exit_codes
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
    with exit_codes(as_json):
        report = _tune(device, time_limit_s, dry_run)
    if as_json:
        print(json.dumps({"ok": True, **report}, allow_nan=False))
    else:
        _show(report)


def _tune(device_name: str, time_limit_s: float, dry_run: bool) -> dict[str, Any]:
    from kvpack.errors import DeviceError

    try:
        import torch

        from kvpack.bench import tune as tuning
        from kvpack.runtime.device.devices import device_limits, resolve_device
        from kvpack.runtime.weights import launch_costs
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "cupy"):
            raise
        raise DeviceError(
            f"no device: {error.name} is not installed: pip install 'kvpack[cuda13]' or 'kvpack[cuda12]'"
        ) from None
    device = resolve_device(device_name)
    if device.type != "cuda":
        raise DeviceError(f"launches are a GPU's: {device_name!r} has none to tune; use --device cuda")
    limits = device_limits(device)
    cases = tuning.plan()
    now = launch_costs.device_costs(limits)
    report: dict[str, Any] = {
        "device": limits.name,
        "file": str(launch_costs.costs_file(limits)),
        "dry_run": dry_run,
        "in_use": now.origin,
        "note": now.note,
    }
    if dry_run:
        return report | {"cases": len(cases), "costs": _shown(now.costs)}
    with torch.no_grad(), torch.cuda.device(device), progress_bar("tuning launches", unit="cases") as progress:
        progress.total(tuning.rounds() * len(cases))

        def advance(name: str) -> None:
            progress.tensor(name)
            progress.advance(1)

        timer = tuning.DeviceTimer(device)
        shipped = launch_costs.shipped_costs(limits).costs
        found = tuning.tune(cases, timer.launches, timer.time, shipped, time_limit_s=time_limit_s, advance=advance)
    regrets = {str(eights): {"before": before, "after": after} for eights, (before, after) in found.regrets.items()}
    measured = {
        "seconds": round(found.seconds, 1),
        "launches_timed": found.launches,
        "cases_timed": len(found.timings),
        "slower_than_best": regrets,
    }
    report |= {**measured, "cases": len(cases), "complete": found.complete, "errors": timer.errors}
    if not found.regrets:
        raise DeviceError(
            f"nothing could be tuned in {time_limit_s:g} s ({len(found.timings)} of {len(cases)} products were timed"
            f"{'; ' + next(iter(timer.errors.values())) if timer.errors else ''}): a higher --time-limit-s may do"
        )
    path = launch_costs.write_tuned(limits, launch_costs.made_for(limits), found.costs, measured)
    return report | {
        "file": str(path),
        "in_use": launch_costs.device_costs(limits).origin,
        "costs": _shown(found.costs),
    }


def _shown(costs: Any) -> dict[str, dict[str, float]]:
    return {str(eights): terms._asdict() for eights, terms in costs.items()}


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
