"""Quantizers of KV pages, and back: the executable specification of what GPUs write, byte for byte (docs/KV.md §3).

All arithmetic is IEEE fp32, each operation rounded to nearest even, sums taken as a tree: element i and element
i + n / 2 first, n the power of two from the count up. A *column* is what shares a scale s and a center c, both fp16: a
dimension of K over the page's tokens, a token of V over its dimensions.

    integers of b bits  c + s·k, k = code − 2^(b−1), between the column's least and largest value
    fp8                 c + s·x, largest distance from c / 448 (of e5m2, which reaches further, too: scales stay normal
                        fp16); c is the column's mean (K) or 0 (V)

Levels of integers lie (largest − least) / (2^b − 1 + a) apart, so that the least and the largest value lie a / 2 of
that outside of the outer levels (:data:`MARGIN_EIGHTHS`). Nothing is off by more than half a step: what is clipped is
what attention looks for. The center is rounded first, and the scale is what reaches the column's ends from there;
with a = 0, if fp16 does not hold the center. V at 3 and 2 bits then gets the scale and the center that make codes as
long as what they stand for (:func:`_refitted`).

A scale that fp16 rounds to 0 makes centers. One that is too large for fp16 is 65504, and values are clamped. Values
that are not finite make the scale NaN, so that what is computed with them is NaN too. bf16 values below 2^-126 count
as 0.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import numpy.typing as npt

from kvpack.errors import PageError
from kvpack.format.pages import (
    GROUP_DIMS,
    PAGE_TOKENS,
    BlockParts,
    PageFormat,
    PageLayout,
    Side,
    join_block,
    split_block,
)

F32 = np.float32
FP16_MAX = F32(65504)
# a, in eighths since kernels are given integers, by bits of a code. Chosen by KL (docs/DESIGN-NOTES.md, 2026-11-29).
MARGIN_EIGHTHS = {Side.K: {2: 6, 3: 4, 4: 4, 5: 0, 8: 0}, Side.V: {2: 4, 3: 4, 4: 0, 8: 0}}
# Formats of V whose scales and centers are chosen anew, once codes are known.
REFITTED = (PageFormat.INT3, PageFormat.INT2)
FP8_TYPES = {PageFormat.FP8_E4M3: ml_dtypes.float8_e4m3fn, PageFormat.FP8_E5M2: ml_dtypes.float8_e5m2}
FP8_MAX = 448
FLOAT_TYPES = {PageFormat.FP16: np.dtype(np.float16), PageFormat.BF16: np.dtype(ml_dtypes.bfloat16)}

_Floats = npt.NDArray[np.float32]


def tree_sum(values: _Floats, axis: int) -> _Floats:
    """Σ along ``axis``, which is kept with size 1: halves are added until one is left."""
    moved = np.moveaxis(values, axis, -1)
    n = 1 << (moved.shape[-1] - 1).bit_length()
    padded = np.zeros((*moved.shape[:-1], n), F32)
    padded[..., : moved.shape[-1]] = moved
    while n > 1:
        n //= 2
        padded = padded[..., :n] + padded[..., n:]
    return np.moveaxis(padded, -1, axis)


def _fp16(values: _Floats) -> _Floats:
    """Rounded to fp16, saturating; NaN stays."""
    return np.clip(values, -FP16_MAX, FP16_MAX).astype(np.float16).astype(F32)


def _inverse(scale: _Floats) -> _Floats:
    return np.divide(F32(1), scale, out=np.zeros_like(scale), where=scale != 0)


def _scale_axis(layout: PageLayout) -> int:
    """The axis of [..., token, dimension] that a scale runs along."""
    return -2 if layout.side == Side.K else -1


def quantize_blocks(values: npt.NDArray[np.generic], layout: PageLayout) -> npt.NDArray[np.uint8]:
    """Values [..., 64 tokens, head_dim] of fp16, bf16 or fp32 → blocks u8 [..., block_bytes].

    Pages of 16 bits take values of their own type, bit for bit.

    Raises:
        PageError: another shape or, for 16 bits, another type.
    """
    if values.shape[-2:] != (PAGE_TOKENS, layout.head_dim):
        raise PageError(f"values have shape {values.shape}; a page holds [..., {PAGE_TOKENS}, {layout.head_dim}]")
    none = np.empty((*values.shape[:-2], 0), np.float16)
    if not layout.format.is_quantized:
        if values.dtype != FLOAT_TYPES[layout.format]:
            raise PageError(f"values are {values.dtype}; a page of {layout.format.name} holds that type")
        return join_block(BlockParts(values.view(np.uint16), none, none), layout)
    x = values.astype(F32)
    x = np.where(np.abs(x) < np.finfo(F32).tiny, F32(0), x)
    axis = _scale_axis(layout)
    with np.errstate(invalid="ignore", over="ignore"):
        usable = np.isfinite(x).all(axis, keepdims=True)
        x = np.where(usable, x, F32(0))
        if layout.format.is_integer:
            codes, scale, center = _between_ends(x, layout)
        else:
            codes, scale, center = _as_floats(x, layout)
    scale = np.where(usable, scale, F32(np.nan))
    parts = BlockParts(
        codes,
        scale.squeeze(axis).astype(np.float16),
        center.squeeze(axis).astype(np.float16) if layout.has_centers else none,
    )
    return join_block(parts, layout)


def _bits_of_dims(layout: PageLayout) -> _Floats:
    """Bits of an integer of each dimension."""
    bits = np.empty((layout.groups, GROUP_DIMS), F32)
    for place, group in enumerate(layout.group_order):
        bits[group] = layout.bits_of(place)
    return bits.reshape(-1)


def _as_floats(x: _Floats, layout: PageLayout) -> tuple[npt.NDArray[np.uint8], _Floats, _Floats]:
    """(codes, scales, centers) of fp8."""
    axis = _scale_axis(layout)
    center = np.zeros_like(x[..., :1, :] if axis == -2 else x[..., :1])
    if layout.has_centers:
        mean = tree_sum(x, axis) / F32(x.shape[axis])
        center = _fp16(np.where(np.isfinite(mean), mean, F32(0)))
    around = x - center
    scale = _fp16(np.abs(around).max(axis, keepdims=True) / F32(FP8_MAX))
    rounded = np.clip(around * _inverse(scale), -FP8_MAX, FP8_MAX).astype(FP8_TYPES[layout.format])
    return rounded.view(np.uint8), scale, center


def _between_ends(x: _Floats, layout: PageLayout) -> tuple[npt.NDArray[np.uint8], _Floats, _Floats]:
    """(codes, scales, centers) of integers."""
    axis = _scale_axis(layout)
    bits = _bits_of_dims(layout) if layout.side == Side.K else np.array([layout.format.element_bits])
    half = np.exp2(bits - 1).astype(F32)
    margin = np.array([MARGIN_EIGHTHS[layout.side][int(b)] for b in bits], F32) / F32(16)  # at each end
    low, high = x.min(axis, keepdims=True), x.max(axis, keepdims=True)
    step = (high - low) / (2 * half - 1 + 2 * margin)
    exact = low + (half + margin) * step
    center = _fp16(exact)
    # From a center that fp16 cuts, ends are all that can be met.
    margin = np.where(np.abs(exact) > FP16_MAX, F32(0), margin)
    scale = _fp16(np.maximum((high - center) / (half - 1 + margin), (center - low) / (half + margin)))
    k = np.clip(np.rint((x - center) * _inverse(scale)), -half, half - 1)
    if layout.side == Side.V and layout.format in REFITTED:
        scale, center = _refitted(x, k, scale, center)
    return (k + half).astype(np.uint8), scale, center


def _refitted(x: _Floats, k: _Floats, scale: _Floats, center: _Floats) -> tuple[_Floats, _Floats]:
    """(scales, centers) with which levels ``k`` are as long as values, in the direction of these, around the same mean.

    What is rounded to the middle of a cell falls short of the values on average, and attention adds that up. Where
    that would take more than a quarter of the scale, as beside an outlier, most of a token is rounded to one level, and
    longer steps would spoil the rest.
    """
    count = F32(x.shape[-1])
    mean = tree_sum(x, -1) / count
    around = x - mean
    square, along = (tree_sum(around * of_each, -1) / count for of_each in (around, k))
    fitted = np.divide(square, along, out=np.full_like(along, np.inf), where=along > 0)
    exact = mean - _fp16(fitted) * (tree_sum(k, -1) / count)
    holds = (fitted <= F32(1.25) * scale) & (np.abs(exact) <= FP16_MAX)
    return np.where(holds, _fp16(fitted), scale), np.where(holds, _fp16(exact), center)


def dequantize_blocks(blocks: npt.NDArray[np.uint8], layout: PageLayout) -> _Floats:
    """Blocks u8 [..., block_bytes] → values fp32 [..., 64, head_dim].

    Raises:
        PageError: blocks of another size.
    """
    if blocks.shape[-1] != layout.block_bytes:
        raise PageError(f"blocks have {blocks.shape[-1]} bytes; those of {layout} have {layout.block_bytes}")
    parts = split_block(blocks, layout)
    if not layout.format.is_quantized:
        return np.asarray(parts.codes.astype(np.uint16).view(FLOAT_TYPES[layout.format]).astype(F32))
    axis = _scale_axis(layout)
    scale = np.expand_dims(parts.scales.astype(F32), axis)
    if layout.format.is_integer:
        scaled = scale * (parts.codes.astype(F32) - np.exp2(_bits_of_dims(layout) - 1).astype(F32))
    else:
        scaled = scale * parts.codes.astype(np.uint8).view(FP8_TYPES[layout.format]).astype(F32)
    return np.asarray(np.expand_dims(parts.centers.astype(F32), axis) + scaled if layout.has_centers else scaled)
