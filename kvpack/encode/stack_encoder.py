"""Layers that will be multiplied as one (q, k, v; gate, up): the same layout, and common tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace

from kvpack.encode.shared_tables import share_tables
from kvpack.encode.tensor_encoder import EncodedTensor, NotEncodableError
from kvpack.format.header import BlobHeader
from kvpack.format.layout import GROUP_LANES, Layout

_CORRECTIONS = 8
_MARGIN_BITS = 0.001
# How much noisier a layer may become for a stack: about 0.1 bit.
_NOISIER_DB = 0.6

# Codes the tensor of a name at a rate that is so many bits lower, in a layout if one is prescribed.
Encode = Callable[[str, float, Layout | None], EncodedTensor]


def encode_stack(
    elements: Mapping[str, int], encode: Encode, bits: float | None, executor: ThreadPoolExecutor | None
) -> tuple[dict[str, EncodedTensor], str | None]:
    """Tensors with one layout and common tables.

    Each keeps its rate: one that common tables make too large is quantized again, at a lower one.

    Args:
        elements: name → number of weights, from top to bottom.
        bits: the rate, of all of them; None if they have none.

    Returns:
        The tensors, and why they are coded as if alone, which is None if they are not. Those that cannot be coded are
        missing.
    """
    alone: dict[str, EncodedTensor] = {}
    for name in elements:
        with suppress(NotEncodableError):  # it is asked for again by who keeps it, and says why
            alone[name] = encode(name, 0.0, None)
    if len(alone) < len(elements):
        return alone, "some are kept as they are"
    encoded = min(
        (_in_layout(layout, alone, encode) for layout in _layouts(alone)), key=lambda t: _noisier_db(alone, t)
    )
    less_bits = dict.fromkeys(elements, 0.0)
    for _ in range(_CORRECTIONS):
        reason = _reason_not_to_stack(alone, encoded)
        if reason is not None:
            return alone, reason
        blobs = share_tables([encoded[name].blob for name in elements], executor)
        shared = {name: replace(encoded[name], blob=blob) for name, blob in zip(elements, blobs, strict=True)}
        excess = {name: 8 * shared[name].size_bytes / elements[name] - (bits or math.inf) for name in elements}
        too_large = [n for n in elements if excess[n] > 0 and 8 * alone[n].size_bytes <= (bits or 0) * elements[n]]
        if not too_large:
            return shared, None
        for name in too_large:
            less_bits[name] += excess[name] + _MARGIN_BITS
            try:
                encoded[name] = encode(name, less_bits[name], encoded[name].layout)
            except NotEncodableError:
                break
    return alone, "common tables take more than the rate"


def _layouts(tensors: Mapping[str, EncodedTensor]) -> list[Layout]:
    return list(dict.fromkeys(tensor.layout for tensor in tensors.values()))


def _in_layout(layout: Layout, alone: Mapping[str, EncodedTensor], encode: Encode) -> dict[str, EncodedTensor]:
    """All tensors in one layout; as they are alone where that cannot be."""
    tensors = dict(alone)
    for name, tensor in alone.items():
        if tensor.layout != layout:
            with suppress(NotEncodableError):
                tensors[name] = encode(name, 0.0, layout)
    return tensors


def _noisier_db(alone: Mapping[str, EncodedTensor], tensors: Mapping[str, EncodedTensor]) -> float:
    """By how much tensors are noisier than alone, all together; each counts the same, however small it is."""
    if len(_layouts(tensors)) > 1:
        return math.inf
    return sum(max(0.0, _more_db(alone[name], tensor)) for name, tensor in tensors.items())


def _more_db(before: EncodedTensor, after: EncodedTensor) -> float:
    if after.noise_db is None:
        return 0.0
    return math.inf if before.noise_db is None else after.noise_db - before.noise_db


def _reason_not_to_stack(alone: Mapping[str, EncodedTensor], encoded: Mapping[str, EncodedTensor]) -> str | None:
    headers = [BlobHeader.parse(memoryview(tensor.blob.front)) for tensor in encoded.values()]
    if len({header.layout for header in headers}) > 1:
        return "their layouts differ"
    if len({header.tile_cols for header in headers}) > 1:
        return "their tiles differ"
    if any(header.rows % GROUP_LANES for header in headers[:-1]):
        return f"all but the last need a multiple of {GROUP_LANES} rows"
    if any(_more_db(alone[name], tensor) > _NOISIER_DB for name, tensor in encoded.items()):
        return "some would be much noisier in a common layout"
    return None
