"""What the parts of a fused product's launch cost on a GPU: ``COSTS`` of the launch model, from timings.

    python benchmarks/launch_costs.py --json benchmarks/results/DATE-launch-costs.json

For each shape, layout, width of tiles and number of vectors it times the launches that ``fit`` likes best and some that
differ from them, in CUDA graphs over rotated weights, and finds the costs (not negative) whose sums of ``Terms``
come nearest to the times, relative to them. Printed beside them: how much slower the launches are that ``fit`` would
choose than the best that was timed, with the costs in the source and with those found.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_common import F32, print_table, provenance, write_result
from books_generate import device_record
from profile_kernels import coded

from kvpack.bench.linear import copies_of
from kvpack.bench.timing import Work, measure
from kvpack.runtime.device.devices import device_limits
from kvpack.runtime.weights import launch_model, ops, products
from kvpack.runtime.weights.launch_model import ProductFit, Terms

SHAPES = "4096x4096,28672x4096,4096x14336,2048x5632"
COPIES = 6
LAUNCHES = 14  # timed of each case
ALIKE = 4  # of the best, so many may have the same panels and members as a better one


def estimate(terms: Terms, costs: Terms) -> float:
    return float(np.dot(terms, costs))


def launches_of(coded_weights: products.Coded, tokens: int) -> tuple[int, list[tuple[Terms, ProductFit]]]:
    """Eights of vectors, and launches worth timing."""
    limits = device_limits(coded_weights.blob.device)
    shape = (coded_weights.header, coded_weights.word_buffer_bytes, limits)
    if tokens == 1:
        eights = 0
        found = list(launch_model.gemv_launches(*shape, products.gemv_warps(coded_weights.layout, limits.architecture)))
    else:
        eights = next(n for n in products.TOKEN_TILES if tokens <= 8 * n)
        warps = products.gemm_warps(coded_weights.layout, eights, limits.architecture)
        found = list(launch_model.gemm_launches(*shape, warps, eights))
    found.sort(key=lambda launch: estimate(launch[0], launch_model.COSTS[eights]))
    picked: list[tuple[Terms, ProductFit]] = []
    seen: set[tuple[int, ...]] = set()
    for terms, launch in found:
        kind = (launch.panels, launch.member_width, launch.resident)
        if kind not in seen or len(picked) < ALIKE:
            picked.append((terms, launch))
        seen.add(kind)
    return eights, picked[:LAUNCHES]


def least_squares(terms: F32, times: F32) -> Terms:
    """Costs ≥ 0 of least relative error, with a constant beside them; columns that want to be negative are dropped."""
    weighted = np.column_stack([np.ones(len(times)), terms]) / times[:, None]
    used = list(range(weighted.shape[1]))
    while True:
        solution = np.linalg.lstsq(weighted[:, used], np.ones(len(times)), rcond=None)[0]
        if (solution >= 0).all():
            break
        del used[int(solution.argmin())]
    costs = np.zeros(weighted.shape[1])
    costs[used] = solution
    return Terms(*costs[1:].tolist())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=SHAPES, help="ROWSxCOLS, …")
    parser.add_argument("--layouts", default="balanced,fast")
    parser.add_argument("--tile-cols", default="128,256")
    parser.add_argument("--tokens", default="1,8,16,32")
    parser.add_argument("--json", type=Path, help="write the result here")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    cases: list[dict[str, Any]] = []
    shapes = [tuple(map(int, shape.split("x"))) for shape in options.shapes.split(",")]
    tile_cols = list(map(int, options.tile_cols.split(",")))
    for (rows, cols), layout, width in itertools.product(shapes, options.layouts.split(","), tile_cols):
        copies = [ops._coded(*b._arguments()) for b in copies_of(coded(rows, cols, layout, width), COPIES)]
        limits = device_limits(copies[0].blob.device)
        for tokens in map(int, options.tokens.split(",")):
            x = torch.randn(tokens, cols, device="cuda").half()
            eights, launches = launches_of(copies[0], tokens)
            expected = products.multiply(copies[0], x, None, limits).float()

            def error(y: torch.Tensor, expected: torch.Tensor = expected) -> float:
                return float((y.float() - expected).abs().max() / expected.abs().max())

            def calls(f: ProductFit, x: torch.Tensor = x, copies: Any = copies, limits: Any = limits) -> list[Any]:
                return [lambda w=w: products.multiply(w, x, None, limits, f) for w in copies]

            works = [Work(calls(f), error, 2e-3) for _, f in launches]
            timed = measure(works, samples=5, sample_ms=1.0, case_ms=60)
            case = {
                "rows": rows,
                "cols": cols,
                "layout": layout,
                "tile_cols": width,
                "tokens": tokens,
                "eights": eights,
            }
            times = [
                {"us": t.us, "terms": [float(v) for v in terms], "launch": vars(f)}
                for (terms, f), t in zip(launches, timed, strict=True)
                if t.us is not None
            ]
            cases.append({**case, "launches": times})
    table, costs = [], {}
    for eights in sorted({case["eights"] for case in cases}):
        of_kind = [case for case in cases if case["eights"] == eights]
        terms = np.array([launch["terms"] for case in of_kind for launch in case["launches"]])
        times = np.array([launch["us"] for case in of_kind for launch in case["launches"]])
        found = costs[eights] = least_squares(terms, times)

        def regret(by: Terms, of_kind: list[dict[str, Any]] = of_kind) -> float:
            ratios = []
            for case in of_kind:
                chosen = min(case["launches"], key=lambda launch: estimate(Terms(*launch["terms"]), by))
                ratios.append(chosen["us"] / min(launch["us"] for launch in case["launches"]))
            return float(np.mean(ratios)) - 1

        table.append(
            [
                eights,
                *(f"{cost:.3f}" for cost in found),
                f"{regret(launch_model.COSTS[eights]):.1%}",
                f"{regret(found):.1%}",
            ]
        )
    print_table(["eights", *Terms._fields, "slower by COSTS", "by these"], table, "Costs, µs")
    if options.json:
        result = {
            "benchmark": "launch-costs",
            "device": device_record(torch.device("cuda")),
            **provenance({}, ["torch"]),
        }
        write_result(options.json, {**result, "costs": {k: v._asdict() for k, v in costs.items()}, "cases": cases})


if __name__ == "__main__":
    main()
