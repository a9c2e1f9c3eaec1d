"""A calibration run's results as a moments file: what was found of a model's tensors, by the checkpoint's names."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kvpack.encode.moments import F32, SAMPLES, MomentsWriter, sampled_crc32
from kvpack.encode.reader import Reader
from kvpack.integrations.module_tree import parameter_kinds
from kvpack.integrations.transformers.calibration_work import WorkDirectory
from kvpack.integrations.transformers_names import transformers_names
from kvpack.runtime.weights.checkpoint_names import CheckpointNames
from kvpack.runtime.weights.load import kept_shape

# Kinds of tensors that a forward pass multiplies with.
_MULTIPLIED = ("linear", "transposed linear", "output layer")


@dataclass(frozen=True)
class Checkpoint:
    """Where a checkpoint's tensors go in a model, and their shapes."""

    names: CheckpointNames
    shapes: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, model: Any, shapes: Mapping[str, tuple[int, ...]]) -> Checkpoint:
        """Those of :func:`checkpoint_shapes` in the directory's model of transformers."""
        names = transformers_names(model, shapes)
        assert names is not None, "a model of transformers"
        return cls(names, shapes)


@dataclass(frozen=True)
class Written:
    """What a moments file has; as the attributes of that name in ``CalibrationReport``."""

    size_bytes: int
    tensors: int
    matrices: int
    untouched: int
    left_out: dict[str, str]


def checkpoint_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a directory's model, by their names there.

    Raises:
        InputError: it has no safetensors file.
        FormatError: one is damaged.
    """
    with Reader(directory, components=False) as reader:
        return {name: kept_shape(reader.container(name).tensors[name]) for name in reader.main_keys()}


def _samples(directory: Path, names: Sequence[str]) -> dict[str, str]:
    with Reader(directory, components=False) as reader:
        return {name: sampled_crc32(reader.container(name), name) for name in names}


def write_moments(
    output: Path,
    directory: Path,
    model: Any,
    work: WorkDirectory,
    stages: Sequence[str],
    checkpoint: Checkpoint,
    ids: torch.Tensor,
    made: Mapping[str, Any],
) -> Written:
    """Put the moments file together from what the stages have left.

    Args:
        directory: of the checkpoint.
        ids: i64 [windows, tokens] that were read.
        made: what the file is made of; shapes and samples, and what has no moments, come to it here.
    """
    files = [_StageFile(work, stage) for stage in stages]
    found: dict[str, _StageFile] = {}
    gradients: dict[str, _StageFile] = {}
    for file in files:
        for name in file.owners:
            if not file.stage.startswith("backward"):
                found[name] = file
            if file.has_sensitivity(name):
                gradients[name] = file
    places = _places(checkpoint, model, {name: file.owners[name] for name, file in found.items()})
    inputs = {place.name: places.key(place) for place in places.found}
    written: set[str] = set()
    untouched = matrices = 0
    with MomentsWriter(output) as writer:
        for place in places.found:
            key = inputs[place.name]
            if key in written:
                continue
            written.add(key)
            owner = found[place.tensor].owners[place.tensor]
            file = found[owner]
            tokens = file.tokens(owner)
            size = file.inputs(owner)
            chosen = list(range(len(tokens))) if place.matrix is None else [place.matrix]
            several = place.matrix is None and len(place.shape) == 3
            shape = (len(chosen), size, size) if several else (size, size)
            of_key = tokens[chosen]
            writer.add_second_moment(key, shape, file.second_moments(owner, chosen), of_key)
            untouched += int((of_key == 0).sum())
            matrices += len(of_key)
        for place in places.found:
            if place.tensor in gradients:
                values = gradients[place.tensor].sensitivity(place.tensor)
                writer.add_sensitivity(place.name, values if place.matrix is None else place.rows_of(values))
        for name, of_file in _tables(checkpoint, model):
            for file in files:
                if (matrix := file.gradient_moment(name)) is not None:
                    writer.add_gradient_moment(of_file, matrix)
        vocabulary = model.get_input_embeddings().weight.shape[0]
        counts = np.bincount(ids.numpy().reshape(-1), minlength=vocabulary).astype(np.int64)
        shapes = {place.name: list(place.shape) for place in places.found}
        of_tensors = {"shapes": shapes, SAMPLES: _samples(directory, list(shapes)), "left_out": places.left_out}
        size_bytes = writer.finish(inputs, counts, {**made, **of_tensors})
    return Written(size_bytes, len(inputs), matrices, untouched, places.left_out)


# How many tokens of the whole layer an expert's moments are given, for each of its inputs (docs/DESIGN-NOTES.md).
_LENT_TOKENS = 0.5


class _StageFile:
    """What a stage has left; tensors are read when they are asked for.

    Attributes:
        owners: tensor of the model → the one whose inputs it shares, or itself.
    """

    def __init__(self, work: WorkDirectory, stage: str) -> None:
        self.stage = stage
        self._file = work.open(stage)
        self._keys = set(self._file.keys())
        self.owners: dict[str, str] = json.loads(self._file.metadata()["owners"])
        self._of_all: tuple[str, npt.NDArray[np.float64]] | None = None

    def tokens(self, name: str) -> Any:
        """i64 [matrices]."""
        return self._file.get_tensor(f"tokens/{name}").numpy()

    def inputs(self, name: str) -> int:
        """K."""
        some = next(key for key in sorted(self._keys) if key.startswith(f"second_moment/{name}/"))
        return int(self._file.get_slice(some).get_shape()[0])

    def second_moments(self, name: str, matrices: Sequence[int]) -> Iterator[F32]:
        """f32 [K, K] each; zeros of a matrix that met no token.

        Those of an expert are shrunk towards the mean over all tokens of all experts of the layer, as if it had met
        K/2 of these as well: of few tokens, feedback would believe what chance has left.
        """
        tokens, size = self.tokens(name), self.inputs(name)
        experts = self._experts(name)
        lent = _LENT_TOKENS * size if len(experts) > 1 else 0.0
        for matrix in matrices:
            key = experts.get(matrix)
            if key is None:
                yield np.zeros((size, size), np.float32)
                continue
            found: F32 = self._file.get_tensor(key).numpy()
            if lent:
                total = tokens[matrix] * found + lent * self._of_all_experts(name)
                found = (total / (tokens[matrix] + lent)).astype(np.float32)
            yield found

    def _experts(self, name: str) -> dict[int, str]:
        """Matrices that met a token, and their second moments."""
        keys = ((matrix, f"second_moment/{name}/{matrix}") for matrix in range(len(self.tokens(name))))
        return {matrix: key for matrix, key in keys if key in self._keys}

    def _of_all_experts(self, name: str) -> npt.NDArray[np.float64]:
        """The mean over all tokens of all matrices, f64 [K, K]; that of the last tensor asked for is kept."""
        if self._of_all is None or self._of_all[0] != name:
            tokens, mean = self.tokens(name), np.zeros((self.inputs(name),) * 2)
            for matrix, key in self._experts(name).items():
                mean += tokens[matrix] / tokens.sum() * self._file.get_tensor(key).numpy()
            self._of_all = name, mean
        return self._of_all[1]

    def has_sensitivity(self, name: str) -> bool:
        return f"sensitivity/{name}" in self._keys

    def sensitivity(self, name: str) -> F32:
        """f32 [rows], or [matrices, rows]."""
        found: F32 = self._file.get_tensor(f"sensitivity/{name}").numpy()
        return found

    def gradient_moment(self, name: str) -> F32 | None:
        """f32 [K, K], of the stage that has found it."""
        key = f"gradient_moment/{name}"
        return self._file.get_tensor(key).numpy() if key in self._keys else None


@dataclass(frozen=True)
class _Place:
    """A tensor of the checkpoint, and where it is in one of the model.

    Attributes:
        name, shape: of the tensor of the checkpoint.
        tensor: of the model.
        matrix: which of the model's tensor it is, or rows of; None: it is all of it.
        first_row: of that matrix.
    """

    name: str
    shape: tuple[int, ...]
    tensor: str
    matrix: int | None = None
    first_row: int = 0

    def rows_of(self, values: F32) -> F32:
        """Its own of [matrices, rows]."""
        return values[self.matrix, self.first_row : self.first_row + self.shape[0]]


@dataclass
class _Places:
    """Tensors of the checkpoint that have moments.

    Attributes:
        owners: tensor of the model → the one whose inputs it shares, or itself.
        left_out: tensor of the model → why it has none.
    """

    owners: Mapping[str, str]
    found: list[_Place] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    _keys: dict[tuple[str, int | None], str] = field(default_factory=dict)

    def key(self, place: _Place) -> str:
        """Of the inputs of a tensor: the name of the first one that has them."""
        return self._keys.setdefault((self.owners[place.tensor], place.matrix), place.name)


def _tables(checkpoint: Checkpoint, model: Any) -> Iterator[tuple[str, str]]:
    """The table in which the model looks tokens up, by its name in the model, and its names in the checkpoint."""
    table = model.get_input_embeddings().weight
    aliases = [name for name, tensor in model.named_parameters(remove_duplicate=False) if tensor is table]
    direct = checkpoint.names.direct
    for of_file in dict.fromkeys(direct[alias] for alias in aliases if alias in direct):
        yield aliases[0], of_file


def _places(checkpoint: Checkpoint, model: Any, owners: Mapping[str, str]) -> _Places:
    names, shapes = checkpoint.names, checkpoint.shapes
    parameters = dict(model.named_parameters(remove_duplicate=False))
    aliases: dict[int, list[str]] = {}
    for name, tensor in parameters.items():
        aliases.setdefault(id(tensor), []).append(name)
    conversions = {target: conversion for conversion in names.conversions for target in conversion.shapes}
    places = _Places(owners)
    for name in owners:
        direct = [names.direct[alias] for alias in aliases[id(parameters[name])] if alias in names.direct]
        conversion = conversions.get(name)
        if direct:
            places.found += [_Place(of_file, shapes[of_file], name) for of_file in dict.fromkeys(direct)]
        elif conversion is not None and conversion.experts is not None:
            for matrix, parts in enumerate(conversion.experts):
                first_row = 0
                for part in parts:
                    places.found.append(_Place(part, shapes[part], name, matrix, first_row))
                    first_row += shapes[part][0]
        else:
            places.left_out[name] = "not in the checkpoint" if conversion is None else conversion.what
    seen = {id(parameters[name]) for name in owners}
    for name, kind in parameter_kinds(model).items():
        if kind in _MULTIPLIED and id(parameters[name]) not in seen:
            places.left_out[name] = "no product with it was seen"
    return places
