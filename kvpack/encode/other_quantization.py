"""Tensors that are part of another quantization: scales, zero points, tables of packed weights. They are never rounded.

Which tensors these are is told by their siblings: a module that holds packed integers, or 8-bit floats, holds what they
are decoded with. Some names are nobody else's, and count alone, as the packed tensor may be in a file that is not here.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

from kvpack.encode.dtypes import LOSSLESS_KINDS
from kvpack.encode.tensor_kinds import words
from kvpack.format.container import StoredTensor

_FLOATS = frozenset({"F64", "F32", "F16", "BF16", "C64"})
# Positions, counters and masks: beside any layer.
_NO_PAYLOAD = _FLOATS | {"BOOL", "I64", "U64"}
_WORDS = frozenset(
    {"scale", "scales", "zero", "zeros", "zp", "biases", "absmax", "scb", "codebook", "codebooks", "centroids",
     "tables", "quant", "suh", "svh", "perm", "invperm"}
)  # fmt: skip
# What packed weights are called; what lies beside them is their quantization's, whatever its name (QuIP#'s SU and SV,
# the smooth_factor of SVDQuant). Integers under another name may be a table of positions.
_PACKED = re.compile(r"q?_?weight(_packed|_qdata)?|W_q|codes|Qidxs|q?indices|trellis|B|dense_weights")
_BESIDE = re.compile(r"weight|bias|\w*_bias|lora_\w+")
_OWN_NAMES = re.compile(
    r"(\w+_)?(weight|input|output|activation|act|k|v|q)_(global_)?scale(s|_inv|_2|_ub)?"
    r"|\w*(weight|proj)_scale(s|_inv|_2)|(weight|input|output)_zero_point|qzeros|qscales|g_idx|(nested_)?absmax"
    r"|(nested_)?quant_map|SCB|bitsandbytes__\w+"
)


def quantization_parts(tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> dict[str, str]:
    """What of a model's tensors belongs to another quantization, with that quantization's name.

    Packed weights of 8-bit types are not among them: they are coded exactly anyway.

    Args:
        tensors: all of the model, of all its files.
        config: what config.json says; {} if there is none.
    """
    payloads: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in tensors.items():
        holder, _, leaf = name.rpartition(".")
        is_packed = tensor.dtype not in _FLOATS and _PACKED.fullmatch(leaf)
        if (is_packed or tensor.dtype not in _NO_PAYLOAD) and not _is_auxiliary(leaf):
            payloads.setdefault(holder, {})[leaf] = tensor
            payloads.setdefault(name, {})[""] = tensor  # bitsandbytes: weight.absmax
    declared = _declared(config)
    parts = {}
    for name in tensors:
        holder, _, leaf = name.rpartition(".")
        outer, _, inner = holder.rpartition(".")
        beside = payloads.get(holder, {})
        if leaf in beside:
            continue
        if _OWN_NAMES.fullmatch(leaf) or (
            beside and (_is_auxiliary(leaf) or _is_beside_packed(leaf, tensors[name], beside))
        ):
            parts[name] = declared or _name_of(holder, leaf, beside, tensors)
        elif outer in payloads and _is_auxiliary(inner):  # VPTQ: centroids.weight
            parts[name] = declared or _name_of(outer, inner, payloads[outer], tensors)
    # Packed weights that kvpack does not code count as parts, too, so that the report tells of all that was kept.
    labels = {name.rpartition(".")[0]: method for name, method in parts.items()}
    for holder, own in payloads.items():
        for tensor in own.values():
            if holder in labels and tensor.dtype not in LOSSLESS_KINDS:
                parts[tensor.name] = labels[holder]
    return parts


@functools.lru_cache(4096)
def _is_auxiliary(leaf: str) -> bool:
    return not _WORDS.isdisjoint(words(leaf)) or _OWN_NAMES.fullmatch(leaf) is not None


def _is_beside_packed(leaf: str, tensor: StoredTensor, beside: Mapping[str, StoredTensor]) -> bool:
    if len(tensor.shape) < 2 or tensor.dtype not in _FLOATS or _BESIDE.fullmatch(leaf):
        return leaf == "s" and "B" in beside
    return any(_PACKED.fullmatch(name) and len(packed.shape) > 1 for name, packed in beside.items())


def _declared(config: Mapping[str, Any]) -> str | None:
    """The quantization that config.json names."""
    for key in ("quantization_config", "compression_config", "quantization"):
        value = config.get(key)
        if isinstance(value, Mapping):
            method = value.get("quant_method", "mlx" if key == "quantization" else None)
            if isinstance(method, str) and method:
                return method
    inner = config.get("text_config")
    return _declared(inner) if isinstance(inner, Mapping) else None


def _name_of(holder: str, leaf: str, beside: Mapping[str, StoredTensor], tensors: Mapping[str, StoredTensor]) -> str:
    """The usual name of a quantization by its tensors' names."""

    def has(*names: str) -> bool:
        return all(f"{holder}.{name}".removeprefix(".") in tensors for name in names)

    if "qweight" in beside:
        scales = tensors.get(f"{holder}.scales".removeprefix("."))
        packs_columns = scales is not None and scales.shape[-1] != beside["qweight"].shape[-1]
        return "awq" if packs_columns and not has("g_idx") else "gptq"
    if "weight_packed" in beside:
        return "compressed-tensors"
    if has("scales", "biases") and "weight" in beside:
        return "mlx"
    if any(name.endswith("_blocks") for name in beside):
        return "mxfp4"
    if has("weight_scale_2"):
        return "nvfp4"
    if "W_q" in beside:
        return "hqq"
    if leaf == "SCB" or "absmax" in leaf or "quant_map" in leaf or leaf.startswith("bitsandbytes__"):
        return "bitsandbytes"
    if "codes" in beside:
        return "aqlm"
    if any(tensor.dtype.startswith("F8_") for tensor in beside.values()) or leaf.endswith("scale_inv"):
        return "fp8"
    if any(tensor.dtype == "I8" for tensor in beside.values()):
        return "int8"
    return "unnamed"
