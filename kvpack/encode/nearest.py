"""A tensor as it was asked for, or the nearest coding that is possible, with the reason.

What a rate cannot reach (narrow and tiny tensors, whose overhead is more than that) gets the lowest rate that can be
reached; what cannot be quantized at all (NaNs, values far from zero or too far from one another) is coded exactly. So a
lower rate never makes a file larger.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from kvpack.encode.rate import FineHistogram, RatePlan, fixed_bits_per_weight
from kvpack.encode.rates import MAX_BITS, MIN_BITS
from kvpack.encode.tensor_encoder import (
    Coder,
    EncodedTensor,
    Matrices,
    NotEncodableError,
    encode_at_bits,
    encode_int8_rows,
    encode_lossless,
    encode_near_lossless,
    encode_plan,
)
from kvpack.format.layout import ElementKind, integer_layout

# Rates that are tried in turn where the one asked for is out of reach. They do not depend on that one, so that of two
# such rates the lower one never gives more bytes.
_RATES = tuple(np.arange(MIN_BITS, MAX_BITS + 0.01, 0.25).tolist())

# Exact coding stores 8 bits of each weight raw, and cannot take less.
_LEAST_EXACT_BITS = 8.0

# A tensor's histogram, and what to do with it if the whole model has one step.
CommonPlan = tuple[FineHistogram, RatePlan]


class EncodeOptions(NamedTuple):
    """What all methods of encoding a tensor take."""

    layout_name: str
    tile_cols: int | None
    executor: ThreadPoolExecutor | None
    coder: Coder


def encode_nearest(
    weights: Matrices, dtype: str, quality: float | str, plan: CommonPlan | None, options: EncodeOptions
) -> EncodedTensor:
    """Quantize a tensor, or do what comes nearest to it.

    Args:
        quality: bits a weight, or a preset's name. Above 7.5 bits: exactly if that fits, else at 7.5.
        plan: the common step, if the model has one; it wins over ``quality``.

    Raises:
        NotEncodableError: only keeping the tensor as it is is left.
    """
    if isinstance(quality, float) and quality > MAX_BITS and plan is None:
        exact = _lossless(weights, dtype, options)
        if 8 * exact.size_bytes <= quality * weights.size:
            return exact
        quality = MAX_BITS
    found: EncodedTensor | None = None
    refused: str | None = None
    try:
        found = _as_asked(weights, quality, plan, options)
        if 8 * found.size_bytes <= _LEAST_EXACT_BITS * weights.size:
            return found
    except NotEncodableError as error:
        refused = str(error)
        if isinstance(quality, float) and plan is None:
            found = _lowest_rate(weights, quality, options)
    exact = _lossless(weights, dtype, options)
    nearest = exact if found is None or exact.size_bytes <= found.size_bytes else found
    reason = refused or "exact coding takes no more"
    if nearest.size_bytes >= weights.size * weights.dtype.itemsize:
        raise NotEncodableError(reason)
    return nearest if nearest is found and refused is None else replace(nearest, reason=reason)


def _as_asked(
    weights: Matrices, quality: float | str, plan: CommonPlan | None, options: EncodeOptions
) -> EncodedTensor:
    keywords = options._asdict()
    if plan is not None:
        del keywords["layout_name"]  # it is part of the plan
        return encode_plan(weights, *plan, **keywords)
    if isinstance(quality, float):
        return encode_at_bits(weights, quality, **keywords)
    if quality == "int8-row":
        return encode_int8_rows(weights, **keywords)
    return encode_near_lossless(weights, **keywords)


def _lossless(weights: Matrices, dtype: str, options: EncodeOptions) -> EncodedTensor:
    return encode_lossless(weights, dtype, options.tile_cols, "auto", options.executor, options.coder)


def _lowest_rate(weights: Matrices, bits: float, options: EncodeOptions) -> EncodedTensor | None:
    """The coding at the lowest rate that has the noise ``bits`` should have; None if there is none."""
    layout = integer_layout("balanced", ElementKind.SIGNED, 2)
    least = 1 + fixed_bits_per_weight(weights.header(layout, options.tile_cols)).raw
    best = _worthy(weights, MAX_BITS, bits, options)
    if best is None:
        try:
            return encode_near_lossless(weights, **options._asdict())
        except NotEncodableError:
            return None
    # Bisection asks the same rates whatever ``bits`` is, and what is quiet enough for more bits is so for fewer: for
    # these it never ends higher.
    rates = [rate for rate in _RATES if rate > least][:-1]
    low, high = 0, len(rates)
    while low < high:
        middle = (low + high) // 2
        found = _worthy(weights, rates[middle], bits, options)
        if found is None:
            low = middle + 1
        else:
            best, high = found, middle
    return best


def _worthy(weights: Matrices, rate: float, bits: float, options: EncodeOptions) -> EncodedTensor | None:
    """The coding at ``rate``, if its noise is what one of ``bits`` should have."""
    try:
        return encode_at_bits(weights, rate, worth_bits=bits, **options._asdict())
    except NotEncodableError:
        return None
