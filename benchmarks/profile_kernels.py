"""One launch of each weight kernel, for a profiler that waits for ``cudaProfilerStart``.

    ncu --profile-from-start off --clock-control none --set full -o kernels python benchmarks/profile_kernels.py
    ncu -i kernels.ncu-rep --page details                      # what limits
    ncu -i kernels.ncu-rep --page source --csv                 # where, instruction by instruction

Each launch is preceded by one on another copy of the weights, so that kernels are compiled and clocks are up, but the
weights that are looked at are not in the L2 cache. The weights are those of ``kvpack bench linear``.
"""

from __future__ import annotations

import argparse

import torch

from kvpack.bench.linear import SOURCES, copies_of
from kvpack.encode.blob_encoder import encode_elements
from kvpack.format.layout import ElementKind, integer_layout
from kvpack.runtime.weights.device_blob import DeviceBlob

SWEEP_BYTES = 1 << 28


def coded(rows: int, cols: int, layout: str, tile_cols: int) -> DeviceBlob:
    """Gaussian integers, coded."""
    bits, sigma = SOURCES[layout]
    generator = torch.Generator().manual_seed(0)
    half = 1 << (bits - 1)
    elements = (torch.randn(rows, cols, generator=generator) * sigma + half).round_().clamp_(0, 2 * half - 1)
    data = encode_elements(
        elements.to(torch.uint8).numpy(), integer_layout(layout, ElementKind.SIGNED, bits), tile_cols=tile_cols
    )
    scales = torch.full((rows,), 0.02 / sigma).numpy()
    return DeviceBlob.from_bytes(data, scales, torch.float16, (rows, cols), "cuda")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="4096x4096,28672x4096", help="ROWSxCOLS, …")
    parser.add_argument("--layouts", default="balanced,fast")
    parser.add_argument("--tile-cols", type=int, default=256)
    parser.add_argument(
        "--works", default="1,8,16,int8,fp16", help="numbers of activation vectors; int8 and fp16 decode"
    )
    options = parser.parse_args()
    sweep = torch.empty(SWEEP_BYTES, dtype=torch.uint8, device="cuda")
    for shape in options.shapes.split(","):
        rows, cols = map(int, shape.split("x"))
        for layout in options.layouts.split(","):
            first, second = copies_of(coded(rows, cols, layout, options.tile_cols), 2)
            for work in options.works.split(","):
                x = torch.randn(int(work) if work.isdecimal() else 1, cols, device="cuda").half()

                def run(blob: DeviceBlob, work: str = work, x: torch.Tensor = x) -> torch.Tensor:
                    if work == "int8":
                        return blob.integers()
                    return blob.dequantize(torch.float16) if work == "fp16" else blob.linear(x)

                run(first)
                sweep.fill_(1)
                torch.cuda.synchronize()
                torch.cuda.cudart().cudaProfilerStart()
                torch.cuda.nvtx.range_push(f"{shape} {layout} {work}")
                run(second)
                torch.cuda.nvtx.range_pop()
                torch.cuda.synchronize()
                torch.cuda.cudart().cudaProfilerStop()
                print(shape, layout, work, flush=True)


if __name__ == "__main__":
    main()
