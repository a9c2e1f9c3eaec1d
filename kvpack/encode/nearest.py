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

from kvpack.encode.rate import FineHistogram, RatePlan
from kvpack.encode.rates import LOSSLESS, MAX_BITS, MIN_BITS
from kvpack.encode.tensor_encoder import (
    Coder,
    EncodedTensor,
    Matrices,
    NotEncodableError,
    RateOutOfReachError,
    encode_at_bits,
    encode_int8_rows,
    encode_lossless,
    encode_near_lossless,
    encode_plan,
)

# Rates that are tried in turn where the one asked for is out of reach. They do not depend on that one, so that of two
# such rates the lower one never gives more bytes.
_RATES = tuple(np.arange(MIN_BITS, MAX_BITS + 0.01, 0.25).tolist())

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
    keywords = options._asdict()
    if isinstance(quality, float) and quality > MAX_BITS and plan is None:
        exact = _lossless(weights, dtype, options)
        if 8 * exact.size_bytes <= quality * weights.size:
            return exact
        quality = MAX_BITS
    try:
        if plan is not None:
            return encode_plan(
                weights, *plan, tile_cols=options.tile_cols, executor=options.executor, coder=options.coder
            )
        if isinstance(quality, float):
            return encode_at_bits(weights, quality, **keywords)
        return encode_int8_rows(weights, **keywords) if quality == "int8-row" else encode_near_lossless(weights, **keywords)
    except RateOutOfReachError as error:
        assert isinstance(quality, float)
        found = _lowest_rate(weights, quality, options)
        reason = str(error)
    except NotEncodableError as error:
        found = None
        reason = str(error)
    exact = _lossless(weights, dtype, options)
    if found is None or exact.size_bytes <= found.size_bytes:
        found = exact
    if found.size_bytes >= weights.array.nbytes:
        raise NotEncodableError(reason)
    return replace(found, reason=reason)


def _lossless(weights: Matrices, dtype: str, options: EncodeOptions) -> EncodedTensor:
    return encode_lossless(weights, dtype, options.tile_cols, "auto", options.executor, options.coder)


def _lowest_rate(weights: Matrices, bits: float, options: EncodeOptions) -> EncodedTensor | None:
    """The coding at the lowest rate above ``bits`` that the tensor can have; None if there is none."""
    for rate in _RATES:
        if rate > bits:
            try:
                return encode_at_bits(weights, rate, **options._asdict())
            except RateOutOfReachError:
                continue
            except NotEncodableError:
                return None
    try:
        return encode_near_lossless(weights, **options._asdict())
    except NotEncodableError:
        return None
