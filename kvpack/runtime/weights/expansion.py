"""Products with many tokens: rows are expanded into a staging buffer and multiplied by cuBLAS.

A matrix that fits into both buffers is expanded at once: decoding and cuBLAS's kernels both want a whole
multiprocessor's shared memory, so that they hardly run beside each other, and parts cost more than their overlap gains
(docs/PERFORMANCE.md), the host's time above all. Larger ones take two buffers: while the product with one is under way,
the next rows are expanded on a side stream. The expanded weights never take more than the two buffers.
"""

from __future__ import annotations

from functools import cache

import torch

from kvpack.format.layout import TILE_ROWS, align, ceil_div
from kvpack.runtime.device.devices import Limits
from kvpack.runtime.weights import products
from kvpack.runtime.weights.products import LOSSLESS_TYPES, OUTPUTS, Coded

STAGING_BYTES = 128 << 20  # of one buffer


@cache
def _side_stream(main: torch.cuda.Stream) -> torch.cuda.Stream:
    """One for each stream that products are on, so that a capture of one leaves the others alone."""
    return torch.cuda.Stream(main.device)


def part_rows(rows: int, cols: int, element_bytes: int) -> int:
    """Rows that are expanded at a time: all, or parts of one size, a multiple of a tile's rows."""
    if rows * cols * element_bytes <= 2 * STAGING_BYTES:
        return align(rows, TILE_ROWS)
    parts = ceil_div(rows * cols * element_bytes, STAGING_BYTES)
    fitting = STAGING_BYTES // (cols * element_bytes) // TILE_ROWS * TILE_ROWS
    return max(TILE_ROWS, min(fitting, align(ceil_div(rows, parts), TILE_ROWS)))


def _expand(coded: Coded, rows: tuple[int, int], out: torch.Tensor, limits: Limits) -> None:
    quantized = len(coded.scales) > 0
    output = OUTPUTS[out.dtype] if quantized else products.OUTPUT_NUMBERS
    products.decode(coded, output, out, limits, rows)


def _multiply_dense(x: torch.Tensor, weights: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    if weights.dtype != x.dtype:
        weights = weights.to(x.dtype)
    if bias is None:
        torch.mm(x, weights.T, out=out)
    else:
        torch.addmm(bias, x, weights.T, out=out)


def multiply(
    coded: Coded, x: torch.Tensor, bias: torch.Tensor | None, limits: Limits, *, matrix: int = 0
) -> torch.Tensor:
    """x · Wᵀ (+ bias) for x [tokens, cols] of any number of tokens; returns [tokens, rows] of x's type.

    ``matrix``: which of a blob's W is.
    """
    header = coded.header
    rows, cols = header.rows, header.cols
    dtype = x.dtype if len(coded.scales) else LOSSLESS_TYPES[header.layout.element_kind]
    out = torch.empty((x.shape[0], rows), dtype=x.dtype, device=x.device)
    step = part_rows(rows, cols, dtype.itemsize)
    if step >= rows:  # by few calls of torch: outside of a CUDA graph the GPU may wait for the host
        weights = torch.empty((rows, cols), dtype=dtype, device=x.device)
        _expand(coded, (matrix * rows, (matrix + 1) * rows), weights, limits)
        _multiply_dense(x, weights, bias, out)
        return out
    parts = [(first, min(first + step, rows)) for first in range(0, rows, step)]
    buffers = [torch.empty((step, cols), dtype=dtype, device=x.device) for _ in range(2)]

    def expand(index: int) -> None:
        first, end = parts[index]
        before = matrix * rows
        _expand(coded, (before + first, before + end), buffers[index % 2][: end - first], limits)

    def multiply_part(index: int) -> None:
        first, end = parts[index]
        weights = buffers[index % 2][: end - first]
        _multiply_dense(x, weights, None if bias is None else bias[first:end], out[:, first:end])

    main = torch.cuda.current_stream(x.device)
    side = _side_stream(main)
    expanded = [torch.cuda.Event() for _ in parts]
    multiplied = [torch.cuda.Event() for _ in parts]

    def expand_aside(index: int) -> None:
        with torch.cuda.stream(side):
            if index >= 2:
                side.wait_event(multiplied[index - 2])
            expand(index)
            expanded[index].record(side)

    side.wait_stream(main)  # the buffers' memory, and the coded weights, may still be in use there
    try:
        expand_aside(0)
        for index in range(len(parts)):
            if index + 1 < len(parts):
                expand_aside(index + 1)
            main.wait_event(expanded[index])
            multiply_part(index)
            multiplied[index].record(main)
    finally:
        main.wait_stream(side)  # also what has failed must not outlive the buffers
    return out
