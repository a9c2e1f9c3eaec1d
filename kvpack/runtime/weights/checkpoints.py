"""Checkpoints of torch, in memory and in files, as tensors to be compressed."""

from __future__ import annotations

import errno
import pickle
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from kvpack.errors import InputError, NotAContainerError
from kvpack.format.serialized import TensorSource
from kvpack.runtime.weights.load import TORCH_DTYPES

_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
# Under which names training tools put a model's tensors beside their own state.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
# How many names a message lists.
_SHOWN = 5


def _listed(names: list[str]) -> str:
    rest = len(names) - _SHOWN
    return ", ".join(map(repr, names[:_SHOWN])) + (f" and {rest} more" if rest > 0 else "")


def tensor_source(name: str, tensor: torch.Tensor) -> TensorSource:
    """A tensor of any device and strides, not copied until it is read.

    Raises:
        InputError: it has no plain numbers (sparse, quantized, meta, distributed, …), or of a dtype that safetensors
            lacks.
    """
    what = None
    if is_lazy(tensor):
        what = "is not initialized yet"
    elif _is_wrapper(tensor):
        what = f"is a {type(tensor).__name__}, which is no plain tensor: gather or dequantize it first"
    elif tensor.layout != torch.strided or tensor.is_nested:
        what = f"is {'nested' if tensor.is_nested else tensor.layout}, not dense: make it dense first"
    elif tensor.is_meta:
        what = "is on the meta device, and has no values"
    elif tensor.is_quantized:
        what = f"is quantized by torch ({tensor.dtype}): dequantize it first"
    elif tensor.dtype not in _NAMES:
        what = f"is {tensor.dtype}, for which safetensors has no type"
    if what is not None:
        raise InputError(f"tensor {name!r} {what}")
    tensor = tensor.detach()
    shape = tuple(tensor.shape)
    if tensor.dtype == torch.float4_e2m1fn_x2:
        if not shape:
            raise InputError(f"tensor {name!r} is one pair of F4 without a dimension: safetensors has no shape for it")
        shape = (*shape[:-1], 2 * shape[-1])

    def read() -> memoryview:
        # Types of one byte as bytes at once: torch copies not all of them.
        dense = tensor.view(torch.uint8) if tensor.itemsize == 1 else tensor.resolve_conj().resolve_neg()
        return dense.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data

    return TensorSource(_NAMES[tensor.dtype], shape, read)


def _is_wrapper(tensor: object) -> bool:
    """DTensor, torchao's quantized tensors and others that hold tensors and are none."""
    return bool(is_traceable_wrapper_subclass(tensor))


@dataclass
class Checkpoint:
    """Tensors of a file, by name, and what a user must be told of it."""

    tensors: dict[str, torch.Tensor]
    notes: list[str] = field(default_factory=list)

    def sources(self) -> dict[str, TensorSource]:
        """All of them as :func:`tensor_source` gives them."""
        return {name: tensor_source(name, tensor) for name, tensor in self.tensors.items()}

    def ties(self) -> list[str]:
        """A note on names of one and the same tensor: each gets its values, as in any safetensors file."""
        first: dict[tuple[Any, ...], str] = {}
        again = []
        for name, tensor in self.tensors.items():
            if tensor.layout == torch.strided and not is_lazy(tensor) and not tensor.is_meta and tensor.numel():
                place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
                if first.setdefault(place, name) != name:
                    again.append(name)
        return [f"the same tensors as others, and stored again: {_listed(again)}"] if again else []


def read_checkpoint(path: Path) -> Checkpoint:
    """A ``.bin``, ``.pt`` or ``.pth`` file of ``torch.save``, by torch's loader that runs no code.

    Tensors are mapped and not read, if the file is of torch 1.6 or later. A model's tensors beside a trainer's state
    (``state_dict``, ``model``, …) are taken out of it; whatever is no tensor is left out, and named in a note.

    Raises:
        NotAContainerError: torch cannot read the file.
        InputError: it holds other objects than tensors and plain values, or no tensors, or several models.
    """
    with path.open("rb") as file:
        zipped = file.read(2) == b"PK"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on TorchScript, which is refused below
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        # What torch makes of an archive that ends within its first blocks.
        raise NotAContainerError(f"{path}: a PyTorch pickle that torch cannot read: it is cut short") from None
    except pickle.UnpicklingError as error:
        reason = str(error).strip().splitlines()
        detail = next((line.strip() for line in reason if "GLOBAL" in line or "Unsupported" in line), reason[0])
        raise InputError(
            f"{path}: torch's loader of plain weights refuses it ({detail}). What else it holds could run code; if you "
            "trust the file, load it yourself, and give kvpack.compress the mapping of names to tensors"
        ) from None
    except RuntimeError as error:
        if "TorchScript" in str(error):
            raise InputError(
                f"{path} is a TorchScript archive, which holds a program: save the model's state_dict instead, or give "
                "kvpack.compress torch.jit.load(...).state_dict()"
            ) from None
        raise NotAContainerError(f"{path}: a PyTorch pickle that torch cannot read: {_first_line(error)}") from None
    except (EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise NotAContainerError(
            f"{path}: a PyTorch pickle that torch cannot read: {str(error).splitlines()[0]}"
        ) from None
    checkpoint = _take_tensors(content, str(path))
    checkpoint.notes += checkpoint.ties()
    return checkpoint


def _take_tensors(content: object, where: str) -> Checkpoint:
    if isinstance(content, torch.Tensor):
        raise InputError(f"{where} holds one tensor without a name: give kvpack.compress a mapping of names to tensors")
    if not isinstance(content, Mapping):
        raise InputError(f"{where} holds a {type(content).__name__}, not a mapping of names to tensors")
    tensors = {name: value for name, value in content.items() if isinstance(value, torch.Tensor)}
    others = [name for name in content if name not in tensors]
    inner = [name for name in others if _has_tensors(content[name])]
    wrapped = [name for name in inner if name in _WRAPPERS]
    if len(wrapped) == 1 and not tensors:
        left_out = [str(name) for name in others if name != wrapped[0]]
        checkpoint = _take_tensors(content[wrapped[0]], f"{where}, {wrapped[0]!r}")
        checkpoint.notes.insert(
            0,
            f"{where}: the tensors are those of {wrapped[0]!r}"
            + (f"; {_listed(left_out)} left out: a trainer's state, or another copy" if left_out else ""),
        )
        return checkpoint
    if inner:
        raise InputError(
            f"{where} holds mappings of tensors in {_listed([str(name) for name in inner])}"
            + (", and tensors beside them" if tensors else "")
            + ": which of them are the model is for you to say. Load it with torch, and give kvpack.compress the one "
            "mapping of names to tensors"
        )
    if not tensors:
        raise InputError(f"{where} holds no tensors")
    notes = []
    if others:
        notes.append(f"{where}: {_listed([str(name) for name in others])} left out: no tensors")
    return Checkpoint(tensors, notes)


def _has_tensors(value: object) -> bool:
    return isinstance(value, Mapping) and any(
        isinstance(inner, torch.Tensor) or _has_tensors(inner) for inner in value.values()
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
