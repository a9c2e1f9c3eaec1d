"""Checkpoints of fp8 weights with scales: found by their names and shapes, and seen as the bf16 weights they stand for.

DeepSeek's ``weight_scale_inv`` has a number for each block of 128×128 weights; ``weight_scale`` has one for the tensor
or one for each row. Both are multiplied by. By default fp8 numbers are coded exactly and their scales kept. If weights
are to be quantized, what is quantized must be the weights: the scales are multiplied in and dropped, the tensors become
bf16, and config.json no longer says that the model is quantized.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from kvpack.encode.dtypes import NUMPY_DTYPES, as_float32
from kvpack.format.container import Container, StoredTensor
from kvpack.format.layout import ceil_div

FP8_DTYPES = frozenset({"F8_E4M3", "F8_E5M2"})
_SCALE_DTYPES = frozenset({"F32", "F16", "BF16"})
_SCALE_SUFFIXES = ("_scale_inv", "_scale")
# Scales of activations, which nothing needs once the weights are plain numbers.
_ACTIVATION_SUFFIXES = ("input_scale", "activation_scale", "input_scale_inv")
_DEFAULT_BLOCK = (128, 128)


@dataclass(frozen=True)
class Fp8Weights:
    """What there is of fp8 weights in a model.

    Attributes:
        weights: fp8 tensor → its scales' container and name.
        activation_scales: of the modules that ``weights`` are of.
        without_scale: fp8 tensors for which no scales were found.
        block: rows and columns that share a scale.
    """

    weights: dict[str, tuple[Container, StoredTensor]] = field(default_factory=dict)
    activation_scales: frozenset[str] = frozenset()
    without_scale: tuple[str, ...] = ()
    block: tuple[int, int] = _DEFAULT_BLOCK

    @property
    def dropped(self) -> frozenset[str]:
        """Scales that a dequantized model does not have."""
        return self.activation_scales | {scale.name for _, scale in self.weights.values()}

    def notes(self, *, asked: bool) -> list[str]:
        """What is said of them in the report; ``asked``: to dequantize them."""
        lines = []
        if asked and self.weights:
            lines.append(
                f"fp8: {len(self.weights)} tensors multiplied by their scales and coded as bf16; "
                f"{len(self.dropped)} tensors of scales dropped, quantization_config removed from config.json"
            )
        elif self.weights:
            lines.append(
                f"fp8: {len(self.weights)} tensors coded exactly, their scales kept; "
                "--bits codes the weights they stand for at a rate"
            )
        if asked and self.without_scale:
            shown = ", ".join(self.without_scale[:4])
            more = f" and {len(self.without_scale) - 4} more" if len(self.without_scale) > 4 else ""
            lines.append(f"fp8 without scales of a known shape, coded exactly: {shown}{more}")
        return lines


def find_fp8(containers: Iterable[Container], config: Mapping[str, Any]) -> Fp8Weights:
    """fp8 tensors and their scales, wherever in the model these are; ``config`` is config.json's."""
    containers = list(containers)
    tensors = {name: (container, tensor) for container in containers for name, tensor in container.tensors.items()}
    quantization = config.get("quantization_config")
    block = quantization.get("weight_block_size") if isinstance(quantization, dict) else None
    found = _DEFAULT_BLOCK
    if isinstance(block, list) and len(block) == 2 and all(isinstance(n, int) and n > 0 for n in block):
        found = (block[0], block[1])
    weights: dict[str, tuple[Container, StoredTensor]] = {}
    lonely = []
    for name, (_, tensor) in tensors.items():
        if tensor.dtype not in FP8_DTYPES:
            continue
        scales = (tensors[name + suffix] for suffix in _SCALE_SUFFIXES if name + suffix in tensors)
        fitting = [pair for pair in scales if _scale_kind(tensor, pair[1], found) is not None]
        if fitting:
            weights[name] = fitting[0]
        else:
            lonely.append(name)
    modules = {name.rpartition(".")[0] for name in weights}
    activations = frozenset(
        name for name in tensors for module, _, last in [name.rpartition(".")]
        if last in _ACTIVATION_SUFFIXES and module in modules
    )  # fmt: skip
    return Fp8Weights(weights, activations, tuple(sorted(lonely)), found)


def _scale_kind(weight: StoredTensor, scale: StoredTensor, block: tuple[int, int]) -> str | None:
    """``one``, ``matrices``, ``rows`` or ``blocks``; None for a shape that means nothing here."""
    if scale.dtype not in _SCALE_DTYPES or len(weight.shape) < 2:
        return None
    *leading, rows, cols = weight.shape
    if math.prod(scale.shape) == 1:
        return "one"
    if scale.shape in ((*leading, rows, 1), (*leading, rows)):
        return "rows"
    if scale.shape == (*leading, ceil_div(rows, block[0]), ceil_div(cols, block[1])):
        return "blocks"
    if leading and scale.shape in (tuple(leading), (*leading, 1, 1)):
        return "matrices"
    return None


def dequantized(
    weight: npt.NDArray[Any], scale: npt.NDArray[np.float32], kind: str, block: tuple[int, int]
) -> npt.NDArray[Any]:
    """fp8 ``weight`` [..., rows, cols] times its scales in f32, rounded once to bf16."""
    rows, cols = weight.shape[-2:]
    flat = weight.reshape(-1, rows, cols)
    result = np.empty(flat.shape, ml_dtypes.bfloat16)
    if kind == "blocks":
        scale = scale.reshape(len(flat), *scale.shape[-2:])
    elif kind == "rows":
        scale = scale.reshape(len(flat), rows, 1)
    else:
        scale = np.broadcast_to(scale.reshape(-1, 1, 1), (len(flat), 1, 1))
    for matrix in range(len(flat)):
        for row in range(0, rows, block[0]):
            part = flat[matrix, row : row + block[0]].astype(np.float32)
            if kind == "blocks":
                part *= np.repeat(scale[matrix, row // block[0]], block[1])[:cols]
            elif kind == "rows":
                part *= scale[matrix, row : row + block[0]]
            else:
                part *= scale[matrix]
            result[matrix, row : row + block[0]] = part.astype(ml_dtypes.bfloat16)
    return result.reshape(weight.shape)


def dequantized_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json without the quantization that the weights no longer have."""
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    for key in ("torch_dtype", "dtype"):
        if "float8" in str(plain.get(key, "")):
            plain[key] = "bfloat16"
    return plain


class DequantizedContainer(Container):
    """A container as if its fp8 weights were stored in bf16, without scales. Data are computed when asked for."""

    def __init__(self, container: Container, fp8: Fp8Weights) -> None:
        vars(self).update(vars(container))
        self._container, self._fp8 = container, fp8
        self.tensors = {
            name: replace(tensor, dtype="BF16", end=tensor.begin + 2 * tensor.size_bytes)
            if name in fp8.weights
            else tensor
            for name, tensor in container.tensors.items()
            if name not in fp8.dropped
        }

    def original_names(self) -> list[str]:
        """Names of all tensors that are left."""
        return [name for name in self._container.original_names() if name in self.tensors]

    def data(self, name: str) -> memoryview:
        """A tensor's bytes; those of a weight are made anew each time."""
        if name not in self._fp8.weights:
            return self._container.data(name)
        tensor = self._container.tensors[name]
        where, stored = self._fp8.weights[name]
        weight = np.frombuffer(self._container.data(name), NUMPY_DTYPES[tensor.dtype]).reshape(tensor.shape)
        scale = as_float32(np.frombuffer(where.data(stored.name), NUMPY_DTYPES[stored.dtype]))
        kind = _scale_kind(tensor, stored, self._fp8.block)
        assert kind is not None
        values = dequantized(weight, scale.reshape(stored.shape), kind, self._fp8.block)
        return values.view(np.uint8).reshape(-1).data

    def close(self) -> None:
        """Close the container."""
        self._container.close()
