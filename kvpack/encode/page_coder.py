"""Quantizers of KV pages, and back: the executable specification of what GPUs write, byte for byte (docs/KV.md §3).

All arithmetic is IEEE fp32, each operation rounded to nearest even, sums taken as a tree: element i and element
i + n / 2 first, n the power of two from the count up. With b bits, s the scale rounded to fp16, and k = code − 2^(b−1):

    K, 4, 3, 2 bits   c + s·k, a dimension's values between their least and their largest; at 2 bits within 1.5
                      standard deviations of their mean
    K, 8 bits         s·k, largest magnitude / 127
    V, 8 bits         s·k, a token's largest magnitude / 127
    V, 4, 3, 2 bits   s·(k + ½), largest magnitude / 7.5, / 3.5, / 1.5; of at most 2.2 (3 bits), 1.5 (2 bits) root mean
                      squares
    fp8               s·x, largest magnitude / 448 (of e5m2, which reaches further, too: scales stay normal fp16)

A scale that fp16 rounds to 0 makes zeros; one that is too large for fp16 is 65504, and values are clamped; values that
are not finite make the scale NaN, so that what is computed with them is NaN too. bf16 values below 2^-126 count as 0.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import numpy.typing as npt

from kvpack.errors import PageError
from kvpack.format.pages import (
    PAGE_TOKENS,
    BlockParts,
    PageFormat,
    PageLayout,
    Side,
    join_block,
    pack_codes,
    split_block,
    unpack_codes,
)

F32 = np.float32
FP16_MAX = F32(65504)
# In tenths of root mean squares, since kernels are given integers.
CLIP_TENTHS = {(Side.K, PageFormat.INT2): 15, (Side.V, PageFormat.INT2): 15, (Side.V, PageFormat.INT3): 22}
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


def _clip(side: Side, page_format: PageFormat) -> np.float32 | None:
    tenths = CLIP_TENTHS.get((side, page_format))
    return None if tenths is None else F32(tenths) / F32(10)


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
        payload = pack_codes(values.view(np.uint16), layout)
        return join_block(BlockParts(payload, none, none), layout)
    x = values.astype(F32)
    x = np.where(np.abs(x) < np.finfo(F32).tiny, F32(0), x)
    axis = _scale_axis(layout)
    with np.errstate(invalid="ignore", over="ignore"):
        usable = np.isfinite(x).all(axis, keepdims=True)
        x = np.where(usable, x, F32(0))
        if layout.has_centers:
            codes, scale, center = _around_centers(x, layout.format, axis)
        elif layout.format.is_integer:
            codes, scale = _around_zero(x, layout, axis)
            center = None
        else:
            largest = np.abs(x).max(axis, keepdims=True)
            scale = _fp16(largest / F32(FP8_MAX))
            rounded = np.clip(x * _inverse(scale), -FP8_MAX, FP8_MAX).astype(FP8_TYPES[layout.format])
            codes, center = rounded.view(np.uint8), None
    scale = np.where(usable, scale, F32(np.nan))
    parts = BlockParts(
        pack_codes(codes, layout),
        scale.squeeze(axis).astype(np.float16),
        none if center is None else center.squeeze(axis).astype(np.float16),
    )
    return join_block(parts, layout)


def _around_centers(x: _Floats, page_format: PageFormat, axis: int) -> tuple[npt.NDArray[np.uint8], _Floats, _Floats]:
    """(codes, scales, centers)"""
    half = F32(1 << (page_format.element_bits - 1))
    low, high = x.min(axis, keepdims=True), x.max(axis, keepdims=True)
    clip = _clip(Side.K, page_format)
    if clip is not None:
        count = F32(x.shape[axis])
        mean = tree_sum(x, axis) / count
        around = x - mean
        reach = clip * np.sqrt(tree_sum(around * around, axis) / count)
        low, high = np.fmax(low, mean - reach), np.fmin(high, mean + reach)  # sums that overflow clip nothing
    scale = _fp16((high - low) / (2 * half - 1))
    center = _fp16(low + half * scale)
    k = np.clip(np.rint((x - center) * _inverse(scale)), -half, half - 1)
    return (k + half).astype(np.uint8), scale, center


def _around_zero(x: _Floats, layout: PageLayout, axis: int) -> tuple[npt.NDArray[np.uint8], _Floats]:
    """(codes, scales)"""
    half = F32(1 << (layout.format.element_bits - 1))
    largest = np.abs(x).max(axis, keepdims=True)
    if not layout.is_mid_rise:
        scale = _fp16(largest / (half - 1))
        k = np.clip(np.rint(x * _inverse(scale)), 1 - half, half - 1)
        return (k + half).astype(np.uint8), scale
    clip = _clip(Side.V, layout.format)
    if clip is not None:
        largest = np.minimum(largest, clip * np.sqrt(tree_sum(x * x, axis) / F32(x.shape[axis])))
    scale = _fp16(largest / (half - F32(0.5)))
    k = np.clip(np.floor(x * _inverse(scale)), -half, half - 1)
    return (k + half).astype(np.uint8), scale


def dequantize_blocks(blocks: npt.NDArray[np.uint8], layout: PageLayout) -> _Floats:
    """Blocks u8 [..., block_bytes] → values fp32 [..., 64, head_dim].

    Raises:
        PageError: blocks of another size.
    """
    if blocks.shape[-1] != layout.block_bytes:
        raise PageError(f"blocks have {blocks.shape[-1]} bytes; those of {layout} have {layout.block_bytes}")
    parts = split_block(blocks, layout)
    codes = unpack_codes(parts.payload, layout)
    if not layout.format.is_quantized:
        return np.asarray(codes.view(FLOAT_TYPES[layout.format]).astype(F32))
    axis = _scale_axis(layout)
    scale = np.expand_dims(parts.scales.astype(F32), axis)
    if not layout.format.is_integer:
        return np.asarray(codes.astype(np.uint8).view(FP8_TYPES[layout.format]).astype(F32) * scale)
    half = F32(1 << (layout.format.element_bits - 1))
    k = codes.astype(F32) - half
    if layout.has_centers:
        return np.asarray(np.expand_dims(parts.centers.astype(F32), axis) + scale * k)
    if layout.is_mid_rise:
        k += F32(0.5)
    return np.asarray(scale * k)
