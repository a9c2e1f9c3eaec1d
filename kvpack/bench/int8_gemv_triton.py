"""A plain INT8 matrix-vector product at memory speed, in Triton: the peer that ``kvpack bench linear`` compares with.

torch's own weight-only INT8 product is far from the memory's speed, so that beating it would show nothing. Not used
for anything but measuring, which is why Triton is loaded inside :func:`compile_gemv` alone.

    y[r] = scale[r] · Σ_k w[r, k] · x[k]        w i8 [rows, cols], x and y fp16, scale f32 [rows]

A program takes ``block_rows`` whole rows, so that nothing is split and nothing needs zeroing; a thread loads 16 weights
at a time (16 bytes) and keeps fp32 sums until the end. The conversion instruction of the hardware runs at a fraction of
the rate of the others, hence the variant ``packed``: one byte permutation makes the float 2^23 + 128 + w, exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import torch


class GemvConfig(NamedTuple):
    """How the rows are cut; which is fastest depends on the shape, so several are tried."""

    block_rows: int
    block_cols: int
    warps: int
    packed: bool


CONFIGS = (
    GemvConfig(4, 512, 4, True),
    GemvConfig(4, 1024, 4, True),
    GemvConfig(8, 512, 4, True),
    GemvConfig(4, 2048, 4, True),
    GemvConfig(2, 2048, 4, True),
    GemvConfig(1, 4096, 4, True),
    GemvConfig(8, 1024, 8, True),
    GemvConfig(16, 512, 8, True),
    GemvConfig(4, 512, 4, False),
    GemvConfig(4, 1024, 4, False),
)

# Four int8 in one register → four floats. 0x4B000000 is 2^23; 0x4B000080 is 2^23 + 128.
_CONVERT = """
{
  .reg .b32 u;
  xor.b32 u, $4, 0x80808080;
  prmt.b32 $0, u, 0x4B000000, 0x7540;
  prmt.b32 $1, u, 0x4B000000, 0x7541;
  prmt.b32 $2, u, 0x4B000000, 0x7542;
  prmt.b32 $3, u, 0x4B000000, 0x7543;
  sub.f32 $0, $0, 0f4B000080;
  sub.f32 $1, $1, 0f4B000080;
  sub.f32 $2, $2, 0f4B000080;
  sub.f32 $3, $3, 0f4B000080;
}
"""

# triton.language, which Triton looks up by this name among the kernel's globals; set by compile_gemv.
tl: Any = None
CONVERT: Any = None


def _gemv(  # type: ignore[no-untyped-def]
    weights,
    x,
    scales,
    y,
    rows,
    cols,
    block_rows: tl.constexpr,
    block_cols: tl.constexpr,
    even: tl.constexpr,
    packed: tl.constexpr,
):
    row = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    column = tl.arange(0, block_cols)
    inside = row < rows
    total = tl.zeros((block_rows, block_cols), tl.float32)
    start = weights + row.to(tl.int64)[:, None] * cols + column[None, :]
    for first in range(0, cols, block_cols):
        if even:
            w = tl.load(start + first, eviction_policy="evict_first")
            v = tl.load(x + first + column)
        else:
            fits = first + column < cols
            w = tl.load(start + first, mask=inside[:, None] & fits[None, :], other=0, eviction_policy="evict_first")
            v = tl.load(x + first + column, mask=fits, other=0.0)
        if packed:
            number = tl.inline_asm_elementwise(CONVERT, "=f,=f,=f,=f,r", [w], tl.float32, True, 4)
        else:
            number = w.to(tl.float32)
        total += number * v.to(tl.float32)[None, :]
    result = tl.sum(total, axis=1) * tl.load(scales + row, mask=inside, other=0.0)
    tl.store(y + row, result.to(tl.float16), mask=inside)


Gemv = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, GemvConfig], torch.Tensor]


def compile_gemv() -> Gemv:
    """The product as a function of weights i8 [rows, cols], x fp16 [1, cols], scales f32 [rows] and a configuration.

    It returns fp16 [1, rows], runs on torch's current stream and can be captured in a graph.

    Raises:
        ImportError: Triton is not installed.
    """
    global tl, CONVERT
    triton = import_module("triton")
    tl = import_module("triton.language")
    CONVERT = tl.constexpr(_CONVERT)
    kernel = triton.jit(_gemv)

    def gemv(weights: torch.Tensor, x: torch.Tensor, scales: torch.Tensor, config: GemvConfig) -> torch.Tensor:
        rows, cols = weights.shape
        if x.shape != (1, cols) or x.dtype != torch.float16 or weights.dtype != torch.int8:
            raise ValueError(f"weights {weights.dtype} {tuple(weights.shape)}, x {x.dtype} {tuple(x.shape)}")
        y = torch.empty(1, rows, dtype=torch.float16, device=x.device)
        kernel[(-(-rows // config.block_rows),)](
            weights,
            x,
            scales,
            y,
            rows,
            cols,
            block_rows=config.block_rows,
            block_cols=config.block_cols,
            even=rows % config.block_rows == 0 and cols % config.block_cols == 0,
            packed=config.packed,
            num_warps=config.warps,
        )
        return y

    return gemv
