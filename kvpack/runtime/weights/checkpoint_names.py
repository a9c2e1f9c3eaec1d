"""Which tensors of a file become which tensors of a model.

Where a model's names are those of the file, :func:`same_names` says it all. Libraries rename and merge tensors between
their files and their models: what knows such a library adds a function to :data:`SOURCES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn


@dataclass
class Conversion:
    """Several tensors of a file that become one or several of a model, or one that is changed on its way.

    Attributes:
        what: what is done, for messages.
        sources: tensors of the file.
        shapes: tensor of the model → the shape that it gets.
        convert: numbers of the sources, by name → those of the model, by name.
        experts: of a stack of matrices, one an expert: the tensors of the file whose rows, one below the other, are
            an expert's matrix. None of any other tensor.
    """

    what: str
    sources: list[str]
    shapes: dict[str, tuple[int, ...]]
    convert: Callable[[Mapping[str, torch.Tensor]], dict[str, torch.Tensor]]
    experts: list[list[str]] | None = None


@dataclass
class CheckpointNames:
    """Where each tensor of a file goes.

    Attributes:
        direct: tensor of the model → of the file.
        conversions: what becomes something else.
        computed: tensors of the file that the model computes, or that its class says are of no account.
        heads: tensors of the file that belong to a head, where the model is the body alone.
        unexpected: the rest of the file.
        unties: whether tensors that are tied in the model get one each where the file has both and they differ.
        fp32: tensors of the model that are loaded in fp32 though the model is narrower.
    """

    direct: dict[str, str] = field(default_factory=dict)
    conversions: list[Conversion] = field(default_factory=list)
    computed: list[str] = field(default_factory=list)
    heads: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    unties: bool = False
    fp32: set[str] = field(default_factory=set)


# (model, tensor of the file → its shape) → where they go, or None if the model is none of that library's.
NamesSource = Callable[[nn.Module, Mapping[str, Sequence[int]]], CheckpointNames | None]
SOURCES: list[NamesSource] = []


def same_names(model: nn.Module, file_names: Sequence[str]) -> CheckpointNames:
    """Tensors of the file go where the model has their names; buffers that are not persistent among them."""
    known = {
        f"{name}.{key}" if name else key
        for name, module in model.named_modules(remove_duplicate=False)
        for tensors in (module._parameters, module._buffers)
        for key, tensor in tensors.items()
        if tensor is not None
    }
    return CheckpointNames(
        direct={name: name for name in file_names if name in known},
        unexpected=[name for name in file_names if name not in known],
    )


def names_for(model: nn.Module, shapes: Mapping[str, Sequence[int]]) -> CheckpointNames:
    """Where the tensors of a file go in a model.

    Args:
        shapes: tensor of the file → its shape.

    Raises:
        ModelMismatchError: the model's library cannot make its tensors from these.
    """
    for source in SOURCES:
        names = source(model, shapes)
        if names is not None:
            return names
    return same_names(model, list(shapes))
