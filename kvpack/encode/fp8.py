"""Checkpoints of fp8 weights with scales: found by their names and shapes, and seen as the bf16 weights they stand for.

DeepSeek's ``weight_scale_inv`` has a number for each block of 128×128 weights; ``weight_scale`` has one for the tensor
or one for each row. Both are multiplied by. By default fp8 numbers are coded exactly and their scales kept. If weights
are to be quantized, what is quantized must be the weights: the scales are multiplied in and dropped, the tensors become
bf16, and config.json no longer says that the model is quantized.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import numpy.typing as npt

from kvpack.encode.dtypes import NUMPY_DTYPES, as_float32
from kvpack.encode.listing import listed
from kvpack.encode.model_config import QUANTIZATION_KEY, read_config
from kvpack.encode.model_tree import ModelTree, WeightFile, folder_prefix
from kvpack.format.container import Container, StoredTensor
from kvpack.format.layout import TILE_ROWS, ceil_div

FP8_DTYPES = frozenset({"F8_E4M3", "F8_E5M2"})
_SCALE_DTYPES = frozenset({"F32", "F16", "BF16"})
_SCALE_SUFFIXES = ("_scale_inv", "_scale")
# Scales of activations, which nothing needs once the weights are plain numbers.
_ACTIVATION_SUFFIXES = ("input_scale", "activation_scale", "input_scale_inv")
_DEFAULT_BLOCK = (128, 128)


class Fp8Weight(NamedTuple):
    """An fp8 tensor and its scales, each with the container that it is in, and the scales' name in the tree."""

    container: Container
    tensor: StoredTensor
    scale_container: Container
    scale: StoredTensor
    scale_name: str


@dataclass(frozen=True)
class Fp8Weights:
    """What there is of fp8 weights in one set of weights, by names in the tree.

    Attributes:
        weights: fp8 tensors that have scales.
        activation_scales: of the modules that ``weights`` are of.
        without_scale: fp8 tensors for which no scales were found.
        block: rows and columns that share a scale.
        config_folder: the folder whose config.json says that they are quantized, if one does.
    """

    weights: dict[str, Fp8Weight] = field(default_factory=dict)
    activation_scales: frozenset[str] = frozenset()
    without_scale: tuple[str, ...] = ()
    block: tuple[int, int] = _DEFAULT_BLOCK
    config_folder: Path | None = None

    @property
    def dropped(self) -> frozenset[str]:
        """Scales that a dequantized model does not have."""
        return self.activation_scales | {weight.scale_name for weight in self.weights.values()}

    def notes(self, *, asked: bool) -> list[str]:
        """What is said of them in the report; ``asked``: to dequantize them."""
        lines = []
        one = len(self.weights) == 1
        counted = f"fp8: {_counted(self.weights)}"
        if asked and self.weights:
            config = "" if self.config_folder is None else ", quantization_config removed from config.json"
            lines.append(
                f"{counted} multiplied by {'its' if one else 'their'} scales and coded as bf16; "
                f"{_counted(self.dropped)} of scales dropped{config}"
            )
        elif self.weights:
            lines.append(
                f"{counted} coded exactly, {'its' if one else 'their'} scales kept; "
                f"--bits codes the weights {'it stands' if one else 'they stand'} for at a rate"
            )
        if asked and self.without_scale:
            lines.append(f"fp8 without scales of a known shape, coded exactly: {listed(self.without_scale, 4)}")
        return lines


def _counted(tensors: Collection[str]) -> str:
    return f"{len(tensors)} {'tensor' if len(tensors) == 1 else 'tensors'}"


def find_fp8(tree: ModelTree) -> dict[str, Fp8Weights]:
    """fp8 tensors and their scales for each set of weights, by its prefix, in whichever of its files these are."""
    sets: dict[str, list[WeightFile]] = {}
    for file in tree.weight_files:
        sets.setdefault(file.set_prefix, []).append(file)
    return {prefix: _find_in_set(tree, prefix, files) for prefix, files in sets.items()}


def _find_in_set(tree: ModelTree, prefix: str, files: list[WeightFile]) -> Fp8Weights:
    tensors = {
        file.names[own]: (file.container, tensor)
        for file in files
        for own, tensor in file.container.tensors.items()
        if own in file.names  # no blobs
    }
    if not any(tensor.dtype in FP8_DTYPES for _, tensor in tensors.values()):
        return Fp8Weights()
    folder = files[0].folder
    config = read_config(tree.path / folder) if tree.path.is_dir() else {}
    quantization = config.get(QUANTIZATION_KEY)
    block = quantization.get("weight_block_size") if isinstance(quantization, dict) else None
    found = _DEFAULT_BLOCK
    if isinstance(block, list) and len(block) == 2 and all(isinstance(n, int) and n > 0 for n in block):
        found = (block[0], block[1])
    weights: dict[str, Fp8Weight] = {}
    lonely = []
    for name, (container, tensor) in tensors.items():
        if tensor.dtype not in FP8_DTYPES:
            continue
        scales = [name + suffix for suffix in _SCALE_SUFFIXES if name + suffix in tensors]
        fitting = [scale for scale in scales if _scale_kind(tensor, tensors[scale][1], found) is not None]
        if fitting:
            weights[name] = Fp8Weight(container, tensor, *tensors[fitting[0]], fitting[0])
        else:
            lonely.append(name)
    modules = {name.rpartition(".")[0] for name in weights}
    activations = frozenset(
        name for name in tensors for module, _, last in [name.rpartition(".")]
        if last in _ACTIVATION_SUFFIXES and module in modules
    )  # fmt: skip
    says_so = bool(weights) and prefix == folder_prefix(folder) and dequantized_config(config) != config
    return Fp8Weights(weights, activations, tuple(sorted(lonely)), found, folder if says_so else None)


def dequantize_tree(tree: ModelTree, sets: Mapping[str, Fp8Weights]) -> None:
    """Let the fp8 weights of some sets be seen as the bf16 weights that they stand for, without their scales."""
    for file in tree.weight_files:
        fp8 = sets.get(file.set_prefix)
        if fp8 is not None and fp8.weights:
            file.container = DequantizedContainer(file, fp8)
    tree.forget_missing()


def _scale_kind(weight: StoredTensor, scale: StoredTensor, block: tuple[int, int]) -> str | None:
    """``one``, ``matrices``, ``rows`` or ``blocks``; None for a shape that means nothing here."""
    if scale.dtype not in _SCALE_DTYPES or len(weight.shape) < 2 or weight.size_bytes == 0:
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


class _Scales:
    """The scales of a weight of ``shape`` [..., rows, cols], for any of its rows."""

    def __init__(
        self, shape: tuple[int, ...], scale: npt.NDArray[np.float32], kind: str, block: tuple[int, int]
    ) -> None:
        self.rows, self.cols = shape[-2:]
        self.kind, self.block = kind, block
        columns = ceil_div(self.cols, block[1]) if kind == "blocks" else 1
        self.scale = scale.reshape(-1, columns)

    def dequantized(self, weight: npt.NDArray[Any], first: int) -> npt.NDArray[Any]:
        """fp8 ``weight`` [n, cols], the rows from ``first`` on, times scales in f32, rounded once to bf16."""
        result = np.empty(weight.shape, ml_dtypes.bfloat16)
        for begin in range(0, len(weight), TILE_ROWS):
            part = weight[begin : begin + TILE_ROWS].astype(np.float32)
            matrix, row = np.divmod(np.arange(first + begin, first + begin + len(part)), self.rows)
            if self.kind == "blocks":
                block_row = matrix * ceil_div(self.rows, self.block[0]) + row // self.block[0]
                part *= np.repeat(self.scale[block_row], self.block[1], axis=1)[:, : self.cols]
            elif self.kind == "rows":
                part *= self.scale[matrix * self.rows + row]
            elif self.kind == "matrices":
                part *= self.scale[matrix]
            else:
                part *= self.scale
            result[begin : begin + TILE_ROWS] = part.astype(ml_dtypes.bfloat16)
        return result


def dequantized_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json without the quantization that the weights no longer have."""
    plain = {key: value for key, value in config.items() if key != QUANTIZATION_KEY}
    for key in ("torch_dtype", "dtype"):
        if "float8" in str(plain.get(key, "")):
            plain[key] = "bfloat16"
    return plain


class DequantizedContainer(Container):
    """A tree's file as if its fp8 weights were stored in bf16, without scales.

    What is read of a weight is computed each time, from the rows that it lies in: memory never holds more of them.
    """

    def __init__(self, file: WeightFile, fp8: Fp8Weights) -> None:
        vars(self).update(vars(file.container))
        self._container, self._block = file.container, fp8.block
        self._weights = {own: fp8.weights[name] for own, name in file.names.items() if name in fp8.weights}
        self.tensors = {
            own: replace(tensor, dtype="BF16", end=tensor.begin + 2 * tensor.size_bytes)
            if own in self._weights
            else tensor
            for own, tensor in file.container.tensors.items()
            if file.names.get(own) not in fp8.dropped
        }

    def rename(self, names: Mapping[str, str]) -> None:
        """See :meth:`Container.rename`."""
        super().rename(names)
        self._weights = {names[own]: weight for own, weight in self._weights.items()}

    def read(self, name: str, begin: int, end: int) -> memoryview:
        """Bytes of a tensor; those of a weight are made anew each time."""
        if name not in self._weights:
            return super().read(name, begin, end)
        weight = self._weights[name]
        cols = weight.tensor.shape[-1]
        first, last = begin // 2 // cols, ceil_div(ceil_div(end, 2), cols)
        numbers = np.frombuffer(
            weight.container.read(weight.tensor.name, first * cols, last * cols), NUMPY_DTYPES[weight.tensor.dtype]
        )
        values = self._scales(weight).dequantized(numbers.reshape(-1, cols), first)
        offset = 2 * first * cols
        return values.view(np.uint8).reshape(-1)[begin - offset : end - offset].data.toreadonly()

    def _scales(self, weight: Fp8Weight) -> _Scales:
        stored = np.frombuffer(weight.scale_container.data(weight.scale.name), NUMPY_DTYPES[weight.scale.dtype])
        kind = _scale_kind(weight.tensor, weight.scale, self._block)
        assert kind is not None
        return _Scales(weight.tensor.shape, as_float32(stored), kind, self._block)

    def close(self) -> None:
        """Close the file."""
        self._container.close()
        super().close()
