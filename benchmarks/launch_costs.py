"""What the parts of a fused product's launch cost on a GPU: all timings behind ``kvpack tune``, and what it finds.

    python benchmarks/launch_costs.py --json benchmarks/results/DATE-launch-costs.json

The costs are found as ``kvpack tune`` finds them (``kvpack/bench/tune.py``) and kept in the result only. Printed beside
them: how much slower the launches are that the shipped costs would choose than the best that was timed, and those that
the costs found choose.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

import torch
from bench_common import device_record, print_table, provenance, write_result

from kvpack.bench import tune
from kvpack.runtime.device.devices import device_limits, resolve_device
from kvpack.runtime.weights.launch_costs import shipped_costs
from kvpack.runtime.weights.launch_model import Terms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(f"{r}x{c}" for r, c in tune.SHAPES), help="ROWSxCOLS, …")
    parser.add_argument("--layouts", default=",".join(tune.LAYOUTS))
    parser.add_argument("--tile-cols", default="auto", help="auto: as compress chooses them")
    parser.add_argument("--tokens", default=",".join(map(str, tune.TOKENS)))
    parser.add_argument("--time-limit-s", type=float, default=600.0)
    parser.add_argument("--json", type=Path, help="write the result here")
    options = parser.parse_args()
    device = resolve_device("cuda")
    shapes = [tuple(map(int, shape.split("x"))) for shape in options.shapes.split(",")]
    widths = [None if width == "auto" else int(width) for width in options.tile_cols.split(",")]
    cases = [
        tune.Case(rows, cols, layout, tokens, width)
        for layout, (rows, cols), width, tokens in itertools.product(
            options.layouts.split(","), shapes, widths, map(int, options.tokens.split(","))
        )
    ]
    limits = device_limits(device)
    shipped = shipped_costs(limits)
    with torch.no_grad():
        timer = tune.DeviceTimer(device)
        timer.compile(cases)
        found = tune.tune(
            cases,
            timer.launches,
            timer.time,
            shipped.costs,
            time_limit_s=options.time_limit_s,
            advance=lambda name: print(name, file=sys.stderr),
        )
    for name, error in timer.errors.items():
        print(f"{name}: {error}", file=sys.stderr)
    table = [
        [
            eights,
            *(f"{cost:.3f}" for cost in found.costs[eights]),
            *(f"{slower:.1%}" for slower in found.regrets.get(eights, ())),
        ]
        for eights in found.costs
        if eights in found.regrets
    ]
    print_table(["eights", *Terms._fields, "slower by shipped costs", "by these"], table, "Costs, µs")
    if options.json:
        result = {
            "benchmark": "launch-costs",
            "device": device_record(device),
            **provenance({}, ["torch", "cupy-cuda13x", "cupy-cuda12x"]),
            "complete": found.complete,
            "seconds": found.seconds,
            "shipped": shipped.origin,
            "costs": {eights: terms._asdict() for eights, terms in found.costs.items() if eights in found.regrets},
            "slower_than_best": {
                eights: {"shipped": before, "found": after} for eights, (before, after) in found.regrets.items()
            },
        }
        timed = [
            {
                **timings.case._asdict(),
                "eights": timings.case.eights,
                "launches": [
                    {"us": us, "terms": timings.terms[number].tolist(), "launch": vars(timings.launches[number][1])}
                    for number, us in sorted(timings.us.items())
                ],
            }
            for timings in found.timings
        ]
        write_result(options.json, {**result, "cases": timed})


if __name__ == "__main__":
    main()
