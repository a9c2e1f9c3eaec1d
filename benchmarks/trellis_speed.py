"""What a trellis costs a product on a GPU: coded matrices of random elements, with and without, of the same layouts.

    python benchmarks/trellis_speed.py --json benchmarks/results/DATE-trellis-speed.json

Microseconds of a product, the best of several CUDA graphs' launches; the elements are the same, so that words, planes
and bytes are. What differs is what an element stands for (FORMAT.md §4.1).
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_common import device_record, provenance, write_result

from kvpack.encode.blob_encoder import encode_elements
from kvpack.format.layout import ElementKind, Quantizer, integer_layouts
from kvpack.runtime.weights.device_blob import DeviceBlob
from kvpack.runtime.weights.linear import RansLinear

SHAPES = ((4096, 4096), (28672, 4096), (4096, 14336))


def microseconds(layer: RansLinear, x: torch.Tensor, repeats: int = 14) -> float:
    """The best of some launches of a graph that has the product eight times."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            layer(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(8):
            layer(x)
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * begin.elapsed_time(end) / 8)
    return min(times)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--m", type=int, nargs="+", default=[1, 2, 8, 16, 32, 64, 128, 256])
    parser.add_argument("--bits", type=int, nargs="+", default=[5], help="of elements")
    parser.add_argument("--tile-cols", type=int, default=512)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    rng = np.random.default_rng(0)
    for (outputs, inputs), bits in ((shape, bits) for shape in SHAPES for bits in arguments.bits):
        half = 1 << (bits - 1)
        sigma = 0.29 * half
        elements = (np.clip(np.rint(rng.normal(0, sigma, (1, outputs, inputs))), -half, half - 1) + half).astype(
            np.uint8
        )
        for name in ("fast", "balanced"):
            layout = integer_layouts(name, ElementKind.SIGNED, bits, Quantizer.TRELLIS)[0]
            layers = {}
            for quantizer in Quantizer:
                data = encode_elements(elements, replace(layout, quantizer=quantizer), tile_cols=arguments.tile_cols)
                scales = np.full(1, 1e-3, np.float32)
                blob = DeviceBlob.from_bytes(data, scales, torch.float16, (outputs, inputs), "cuda")
                layers[quantizer.name.lower()] = RansLinear(blob)
            for m in arguments.m:
                x = torch.randn(m, inputs, dtype=torch.float16, device="cuda")
                row: dict[str, Any] = {
                    "outputs": outputs,
                    "inputs": inputs,
                    "layout": name,
                    "element_bits": bits,
                    "m": m,
                }
                row |= {quantizer: microseconds(layer, x) for quantizer, layer in layers.items()}
                rows.append(row)
                said = f"{outputs}×{inputs} {name} {bits} bits, M = {m}"
                print(f"{said}: {row['scalar']:.1f} → {row['trellis']:.1f} µs", file=sys.stderr)
            del layers
    if arguments.json is not None:
        made = provenance({}, ("torch", "cupy-cuda13x", "cupy-cuda12x"))
        device = device_record(torch.device("cuda"))
        write_result(arguments.json, {"benchmark": "trellis-speed", "rows": rows, "device": device, **made})
    return 0


if __name__ == "__main__":
    sys.exit(main())
