"""Which layouts are worth having: size against speed of products, over layouts, widths of tiles and numbers of vectors.

    python benchmarks/layout_frontier.py --json benchmarks/results/DATE-layout-frontier.json

Weights are Gaussian integers of 5 bits and about 4.0 bits of entropy: for speed alone. Each case is timed with the
launches that the launch model likes best, in CUDA graphs over rotated weights, and the fastest counts: what is compared
is layouts, not how well launches are chosen for them. FP16 is cuBLAS on the same shape, in the same run.
"""

from __future__ import annotations

import argparse
import itertools
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_common import print_table, provenance, write_result
from books_generate import device_record

from kvpack.bench import peers
from kvpack.bench.linear import copies_of, rotated
from kvpack.bench.timing import Work, measure, relative_error
from kvpack.bench.tune import compile_ahead, kernel_of, launches_of, worth_timing
from kvpack.encode.blob_encoder import encode_elements
from kvpack.format.layout import ElementKind, Layout
from kvpack.runtime.device.devices import device_limits
from kvpack.runtime.weights import ops, products
from kvpack.runtime.weights.device_blob import DeviceBlob
from kvpack.runtime.weights.launch_costs import device_costs

SHAPES = "6144x4096,4096x4096,28672x4096,4096x14336"
# code bits × codes a symbol; f: folded
LAYOUTS = "5x1,4x2,2x4,f3x2,f2x4,f1x8"
BITS, SIGMA = 5, 3.9
ROTATE_BYTES = 256 << 20


def layout_of(name: str) -> Layout:
    folded = name.startswith("f")
    code_bits, codes = map(int, name.removeprefix("f").split("x"))
    return Layout(ElementKind.SIGNED, BITS, code_bits, codes, folded)


def coded(elements: np.ndarray[Any, Any], layout: Layout, tile_cols: int, executor: ThreadPoolExecutor) -> DeviceBlob:
    data = encode_elements(elements, layout, tile_cols=tile_cols, executor=executor)
    rows, cols = elements.shape
    scales = np.full(rows, 0.02 / SIGMA, np.float32)
    return DeviceBlob.from_bytes(memoryview(data), scales, torch.float16, (rows, cols), "cuda")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=SHAPES, help="ROWSxCOLS, …")
    parser.add_argument("--layouts", default=LAYOUTS)
    parser.add_argument("--tile-cols", default="256,512,1024,2048")
    parser.add_argument("--tokens", default="1,8,32")
    parser.add_argument("--launches", type=int, default=6, help="timed of each case")
    parser.add_argument("--json", type=Path, help="write the result here")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    limits = device_limits(torch.device("cuda"))
    costs = device_costs(limits).costs
    executor, cases = ThreadPoolExecutor(), []
    tokens_of = list(map(int, options.tokens.split(",")))
    generator = torch.Generator(device="cuda").manual_seed(0)
    for shape in options.shapes.split(","):
        rows, cols = map(int, shape.split("x"))
        half = 1 << (BITS - 1)
        normal = torch.randn(rows, cols, device="cuda", generator=generator) * SIGMA
        integers = normal.round_().clamp_(-half, half - 1)
        elements = (integers + half).to(torch.uint8).cpu().numpy()
        part = np.bincount(elements.ravel(), minlength=2 * half) / elements.size
        entropy = float(-(part[part > 0] * np.log2(part[part > 0])).sum())
        weights = integers.half() * (0.02 / SIGMA)
        dense = peers.dense(weights, rotated(weights.nbytes, ROTATE_BYTES))
        blobs = {
            (name, width): coded(elements, layout_of(name), width, executor)
            for name, width in itertools.product(options.layouts.split(","), map(int, options.tile_cols.split(",")))
            if width <= cols
        }
        for tokens in tokens_of:
            liked = costs[products.token_tiles(tokens) if tokens > 1 else 0]
            x = torch.randn(tokens, cols, device="cuda", generator=generator).half()
            error = relative_error(x.double() @ weights.double().T)
            plain = [partial(dense.apply, w, x) for w in dense.copies]
            works, of_work = [Work(plain, error, 1e-3)], [("fp16", 0)]
            wanted = set()
            for key, blob in blobs.items():
                copies = [ops._coded(*b._arguments()) for b in copies_of(blob, rotated(blob.nbytes, ROTATE_BYTES))]
                launches = launches_of(copies[0], tokens, limits)
                for number in worth_timing(launches, liked, options.launches):
                    fit = launches[number][1]
                    wanted.add(kernel_of(copies[0], tokens, fit, limits))
                    runs = [partial(products.multiply, w, x, None, limits, fit) for w in copies]
                    works.append(Work(runs, error, 1e-3))
                    of_work.append(key)
            compile_ahead(wanted)
            timed = measure(works, samples=7, sample_ms=0.5, case_ms=1500)
            best: dict[tuple[str, int], float] = {}
            for key, one in zip(of_work, timed, strict=True):
                if one.us is None:
                    print(shape, tokens, key, one.error)
                else:
                    best[key] = min(one.us, best.get(key, one.us))
            for (name, width), us in best.items():
                bits = None if name == "fp16" else 8 * blobs[name, width].blob_bytes / elements.size
                cases.append(
                    {
                        "shape": shape, "tokens": tokens, "layout": name, "tile_cols": width, "us": us,
                        "bits_over_entropy": None if bits is None else bits - entropy,
                        "of_fp16": best["fp16", 0] / us,
                    }
                )  # fmt: skip
            del works
    shapes = options.shapes.split(",")
    head = ["layout", "tile_cols", "tokens", "bits over entropy", *shapes]
    table = []
    for name, width, tokens in itertools.product(
        ["fp16", *options.layouts.split(",")], [0, *map(int, options.tile_cols.split(","))], tokens_of
    ):
        of_kind = [c for c in cases if (c["layout"], c["tile_cols"], c["tokens"]) == (name, width, tokens)]
        if of_kind:
            by_shape = {c["shape"]: f"{c['us']:.1f} ({c['of_fp16']:.2f})" for c in of_kind}
            over = [c["bits_over_entropy"] for c in of_kind if c["bits_over_entropy"] is not None]
            table.append(
                [
                    name,
                    width,
                    tokens,
                    f"{max(over):.3f}" if over else "",
                    *(by_shape.get(shape, "") for shape in shapes),
                ]
            )
    print_table(head, table, "µs (times FP16's speed)")
    if options.json:
        result = {
            "benchmark": "layout-frontier",
            "device": device_record(torch.device("cuda")),
            **provenance({}, ["torch"]),
        }
        write_result(options.json, {**result, "cases": cases})


if __name__ == "__main__":
    main()
