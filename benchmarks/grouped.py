"""Products of a mixture of experts: all in one launch, against a loop of products and against bf16.

    python benchmarks/grouped.py --json benchmarks/results/DATE-grouped.json

The experts are matrices of one coded blob. Each of M tokens has --top-k different ones, drawn by chance. Timed are CUDA
graphs; call after call asks for other experts, so that no weights lie in the L2 cache (where there are few tokens: many
ask for all). Experts repeat with a period of --distinct, so that all calls have the same result, which is checked
against float64.

What the others are spared: the loop of products is given the chosen experts, and its rows of x side by side; so is the
loop over dense matrices; torch's grouped product is given the sorted rows and their offsets.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_common import device_record, print_table, provenance, write_result

from kvpack.bench.linear import SOURCES, WEIGHT_DEVIATION
from kvpack.bench.timing import Work, measure, relative_error
from kvpack.encode.blob_encoder import encode_elements
from kvpack.format.layout import ElementKind, integer_layout
from kvpack.runtime.weights.device_blob import DeviceBlob

TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 1e-2}


def coded_experts(
    experts: int, distinct: int, shape: tuple[int, int], layout: str, tile_cols: int | None
) -> DeviceBlob:
    """[experts, rows, cols] of Gaussian integers; expert e is expert e mod ``distinct``."""
    bits, sigma = SOURCES[layout]
    rng = np.random.default_rng(0)
    half = 1 << (bits - 1)
    normal = rng.standard_normal((distinct, *shape), np.float32)
    elements = np.clip(np.rint(normal * sigma) + half, 0, 2 * half - 1).astype(np.uint8)
    scales = (rng.uniform(0.5, 1.5, (distinct, shape[0])) * (WEIGHT_DEVIATION / sigma)).astype(np.float32)
    times = experts // distinct
    with ThreadPoolExecutor(os.cpu_count()) as executor:
        data = encode_elements(
            np.tile(elements, (times, 1, 1)),
            integer_layout(layout, ElementKind.SIGNED, bits),
            tile_cols=tile_cols,
            executor=executor,
        )
    return DeviceBlob.from_bytes(data, np.tile(scales, (times, 1)).ravel(), torch.float16, (experts, *shape), "cuda")


def matrix_product(blob: DeviceBlob, expert: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """An ordinary product with one matrix of the blob."""
    header = blob.header
    count, rows = len(blob.groups) // header.matrices, header.rows
    groups = blob.groups[expert * count : (expert + 1) * count]
    scales = blob.scales[expert * rows : (expert + 1) * rows]
    geometry = list(blob.geometry)
    geometry[7] = 1
    arguments = (blob.blob, groups, blob.tables, scales, blob.status, geometry, None)
    return lambda x: torch.ops.kvpack.linear(x, *arguments)  # type: ignore[no-any-return]


def routed(tokens: int, top_k: int, experts: int) -> torch.Tensor:
    rng = np.random.default_rng(tokens)
    return torch.from_numpy(np.stack([rng.choice(experts, top_k, replace=False) for _ in range(tokens)]))


class Case:
    """One shape and number of tokens: works that all compute the same, and what they should give."""

    def __init__(self, blob: DeviceBlob, dense: torch.Tensor, tokens: int, top_k: int, distinct: int) -> None:
        experts = blob.header.matrices
        self.blob, self.dense, self.experts = blob, dense, experts
        ids = routed(tokens, top_k, experts)
        # Of each call: the same matrices elsewhere, so that their weights are not in the L2 cache.
        self.ids = [(ids + distinct * turn) % experts for turn in range(experts // distinct)]
        self.x = torch.randn(tokens, blob.header.cols, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
        weights = [
            (blob.integers()[e].double() * blob.scales.view(experts, -1, 1)[e].double()) for e in range(distinct)
        ]
        rounded = self.x.half().double()
        self.exact = torch.stack(
            [
                torch.stack([weights[e % distinct] @ rounded[token] for e in row])
                for token, row in enumerate(ids.tolist())
            ]
        )
        self.active = ids.unique().numel()

    def grouped(self, dtype: torch.dtype) -> Work:
        x, moved = self.x.half().to(dtype), [ids.cuda() for ids in self.ids]
        calls = [lambda ids=ids: self.blob.grouped_linear(x, ids) for ids in moved]
        return Work(calls, relative_error(self.exact), TOLERANCE[dtype])

    def _loop(self, dtype: torch.dtype, product: Callable[[int], Callable[[torch.Tensor], torch.Tensor]]) -> Work:
        """A product for each active expert; the results of each are compared with its own part."""
        x, calls, parts = self.x.half().to(dtype), [], []
        for ids in self.ids:
            todo = []
            for expert in ids.unique().tolist():
                token, rank = torch.nonzero(ids == expert, as_tuple=True)
                todo.append((product(expert), x[token.cuda()].contiguous()))
                if ids is self.ids[0]:
                    parts.append(self.exact[token.cuda(), rank.cuda()])
            calls.append(lambda todo=todo: tuple(multiply(rows) for multiply, rows in todo))

        def error(out: torch.Tensor) -> float:
            return min(relative_error(part)(out) for part in parts if part.shape == out.shape)

        return Work(calls, error, TOLERANCE[dtype])

    def loop(self, dtype: torch.dtype) -> Work:
        return self._loop(dtype, lambda expert: matrix_product(self.blob, expert))

    def dense_loop(self) -> Work:
        def product(expert: int) -> Callable[[torch.Tensor], torch.Tensor]:
            weights = self.dense[expert]
            return lambda rows: torch.nn.functional.linear(rows, weights)

        return self._loop(torch.bfloat16, product)

    def dense_grouped(self) -> Work:
        grouped = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm
        x, prepared = self.x.half().bfloat16(), []
        orders = []
        for ids in self.ids:
            order = ids.flatten().argsort(stable=True)
            counts = torch.bincount(ids.flatten(), minlength=self.experts)
            orders.append(order.cuda())
            prepared.append((x[order.cuda() // ids.shape[1]], counts.cumsum(0).to(torch.int32).cuda()))
        # Other calls sort the same pairs otherwise, where experts wrap around.
        exacts = [self.exact.flatten(0, 1)[order] for order in orders]
        weights = self.dense.transpose(-2, -1)
        calls = [lambda rows=rows, ends=ends: grouped(rows, weights, offs=ends) for rows, ends in prepared]
        return Work(calls, lambda out: min(relative_error(exact)(out) for exact in exacts), TOLERANCE[torch.bfloat16])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="2048x4096,4096x2048", help="ROWSxCOLS of an expert, …")
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--distinct", type=int, default=8, help="experts before they repeat; divides --experts")
    parser.add_argument("--layouts", default="fast,balanced")
    parser.add_argument("--tile-cols", type=int, help="by default the encoder's choice")
    parser.add_argument("--tokens", default="1,2,4,16,64")
    parser.add_argument("--samples", type=int, default=15)
    parser.add_argument("--json", type=Path, help="write the result here")
    options = parser.parse_args()
    if options.experts % options.distinct or not 1 <= options.top_k <= options.experts:
        parser.error("--distinct must divide --experts, and --top-k be at most as many")
    torch.set_grad_enabled(False)
    rows: list[dict[str, Any]] = []
    for shape in options.shapes.split(","):
        outputs, inputs = map(int, shape.split("x"))
        for layout in options.layouts.split(","):
            blob = coded_experts(options.experts, options.distinct, (outputs, inputs), layout, options.tile_cols)
            dense = blob.dequantize(torch.bfloat16)
            bits = 8 * (blob.blob_bytes + 4 * len(blob.scales)) / blob.header.num_elements
            for tokens in map(int, options.tokens.split(",")):
                case = Case(blob, dense, tokens, options.top_k, options.distinct)
                works = {
                    "grouped fp16": case.grouped(torch.float16),
                    "grouped bf16": case.grouped(torch.bfloat16),
                    "loop fp16": case.loop(torch.float16),
                    "dense loop bf16": case.dense_loop(),
                    "dense grouped bf16": case.dense_grouped(),
                }
                timed = measure(list(works.values()), samples=options.samples, sample_ms=2.0, case_ms=1500)
                blob.check()
                times = {name: t.as_dict() for name, t in zip(works, timed, strict=True)}
                case_row = {
                    "rows": outputs, "cols": inputs, "layout": layout, "tile_cols": blob.header.tile_cols, "bits": bits,
                    "tokens": tokens, "active_experts": case.active, "times": times,
                }  # fmt: skip
                rows.append(case_row)
                us = {name: t.us for name, t in zip(works, timed, strict=True)}
                for name, t in zip(works, timed, strict=True):
                    if t.error:
                        print(f"{shape} {layout} M={tokens} {name}: {t.error}", flush=True)
                print(shape, layout, tokens, {k: None if v is None else round(v, 1) for k, v in us.items()}, flush=True)
            del dense, blob
            torch.cuda.empty_cache()

    def us(row: dict[str, Any], name: str) -> float:
        found = row["times"][name]["us"]
        return math.nan if found is None else float(found)

    print_table(
        [
            "shape",
            "layout",
            "bits",
            "M",
            "experts",
            "grouped µs",
            "loop",
            "× loop",
            "bf16 grouped",
            "× it",
            "bf16 loop",
        ],
        [
            [
                f"{r['rows']}x{r['cols']}",
                f"{r['layout']} ({r['tile_cols']})",
                f"{r['bits']:.2f}",
                r["tokens"],
                r["active_experts"],
                f"{us(r, 'grouped fp16'):.1f}",
                f"{us(r, 'loop fp16'):.1f}",
                f"{us(r, 'loop fp16') / us(r, 'grouped fp16'):.2f}",
                f"{us(r, 'dense grouped bf16'):.1f}",
                f"{us(r, 'dense grouped bf16') / us(r, 'grouped fp16'):.2f}",
                f"{us(r, 'dense loop bf16'):.1f}",
            ]
            for r in rows
        ],
        f"{options.top_k} of {options.experts} experts",
    )
    if options.json:
        result = {
            "benchmark": "grouped",
            "device": device_record(torch.device("cuda")),
            **provenance({}, ["torch"]),
            "experts": options.experts,
            "top_k": options.top_k,
            "rows": rows,
        }
        write_result(options.json, result)


if __name__ == "__main__":
    main()
