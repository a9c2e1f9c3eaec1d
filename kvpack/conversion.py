"""Inputs that are no safetensors files, as ones: checkpoints of torch, GGUF files, and tensors in memory.

A checkpoint and tensors in memory are read where they are. Directories, and the models of GGUF files, are written as
safetensors into a hidden directory beside the output first, which goes away at the end.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from kvpack.encode.array_sources import array_source
from kvpack.encode.model_directory import write_json
from kvpack.encode.model_tree import SUFFIX, list_files
from kvpack.errors import DirectoryIndexError, InputError, NotAContainerError, NotInstalledError
from kvpack.format.container import Container, ContainerWriter
from kvpack.format.file_kinds import HEAD_BYTES, describe, is_gguf, is_pickle
from kvpack.format.serialized import SerializedTensors, TensorSource
from kvpack.format.temporary_files import hidden_directory

if TYPE_CHECKING:
    from kvpack.runtime.weights.checkpoints import Checkpoint

# Stands for the path of what has none.
IN_MEMORY = Path("<tensors in memory>")

# What transformers, diffusers and PEFT call a model's tensors; a trainer's own pickles have other names.
_MODEL_FILE = re.compile(r"^(pytorch_model|diffusion_pytorch_model|adapter_model)((?:-\d+-of-\d+)?(?:\.\w+)?)\.bin$")
_MODEL_INDEX = re.compile(r"^(pytorch_model|diffusion_pytorch_model)\.bin(\.index(?:\.\w+)?\.json)$")
_METADATA = {"format": "pt"}


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(HEAD_BYTES)


def _safetensors_name(kind: str, rest: str) -> str:
    """``pytorch_model`` → ``model``, as the two are called by transformers; others keep their names."""
    return f"{'model' if kind == 'pytorch_model' else kind}{rest}"


def is_checkpoint(source: Path) -> bool:
    """Whether a file is a pickle of torch's that does not pretend to be something else."""
    return source.is_file() and source.suffix.lower() != ".safetensors" and is_pickle(_head(source))


def is_gguf_file(source: Path) -> bool:
    """Whether a file is one of llama.cpp's, by name and contents."""
    return source.is_file() and source.suffix.lower() == ".gguf" and is_gguf(_head(source))


def has_checkpoints_alone(source: Path, target: Path) -> bool:
    """Whether a directory, an output in it aside, holds a model's checkpoints of torch, and no safetensors file."""
    if not source.is_dir():
        return False
    names = [file.name for file in list_files(source, without=target).files]
    return any(map(_MODEL_FILE.match, names)) and not any(name.endswith(SUFFIX) for name in names)


def _read_checkpoint(path: Path) -> Checkpoint:
    try:
        from kvpack.runtime.weights.checkpoints import read_checkpoint
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise NotInstalledError(
            f"{path} is a PyTorch checkpoint, and to read it takes torch, which is not installed: pip install "
            "'kvpack[torch]', or take the model's safetensors files"
        ) from None
    return read_checkpoint(path)


def serialized_checkpoint(path: Path) -> tuple[SerializedTensors, list[str]]:
    """A checkpoint of torch as the safetensors file that its tensors make, and what must be said of it.

    Raises:
        NotInstalledError: torch is not there.
        NotAContainerError, InputError: it is none, or as of ``read_checkpoint``.
    """
    head = _head(path)
    if not is_pickle(head):
        kind = describe(head, path.stat().st_size)
        raise NotAContainerError(f"{path}: not a PyTorch pickle" + ("" if kind is None else f" but {kind}"))
    checkpoint = _read_checkpoint(path)
    return SerializedTensors(path, checkpoint.sources(), _METADATA), checkpoint.notes


def serialized_mapping(tensors: Mapping[str, Any]) -> tuple[SerializedTensors, list[str]]:
    """Tensors of torch and arrays of NumPy, by name, as the safetensors file that they make.

    Raises:
        InputError: a value is neither, or has no form in a safetensors file.
    """
    if not tensors:
        raise InputError("the mapping holds no tensors")
    found: dict[str, TensorSource] = {}
    of_torch: dict[str, Any] = {}
    for name, value in tensors.items():
        if isinstance(value, np.ndarray):
            found[name] = array_source(name, value)
        elif any(
            kind.__module__.partition(".")[0] == "torch" and kind.__name__ == "Tensor" for kind in type(value).__mro__
        ):
            of_torch[name] = value
        else:
            raise InputError(
                f"{name!r} is a {type(value).__name__}, and neither a tensor of torch nor an array of NumPy"
            )
    notes: list[str] = []
    if of_torch:
        from kvpack.runtime.weights.checkpoints import Checkpoint

        checkpoint = Checkpoint(of_torch)
        found |= checkpoint.sources()
        notes = checkpoint.ties()
    return SerializedTensors(IN_MEMORY, found, {}), notes


def _write(file: SerializedTensors, target: Path) -> None:
    with Container(file.path, file) as container, ContainerWriter(target) as writer:
        for tensor in container.tensors.values():
            writer.add(tensor.name, tensor.dtype, tensor.shape, container.pieces(tensor.name))
        writer.finish(container.metadata)


def _rewrite_index(path: Path, target: Path) -> set[str]:
    """The index of checkpoints as one of safetensors files; returns the checkpoints that it names.

    Raises:
        DirectoryIndexError: it is malformed, or names a checkpoint that is not there.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        named = set(content["weight_map"].values())
        renamed = {name: match for name in named if (match := _MODEL_FILE.match(name))}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DirectoryIndexError(f"{path}: not a valid index ({error!r})") from None
    for name in sorted(named):
        if name not in renamed or not (path.parent / name).is_file():
            raise DirectoryIndexError(f"{path}: names {name!r}, which does not exist, or is no name of a checkpoint")
    new_names = {name: f"{_safetensors_name(*match.groups())}.safetensors" for name, match in renamed.items()}
    content["weight_map"] = {tensor: new_names[name] for tensor, name in content["weight_map"].items()}
    write_json(target, content)
    return named


def _refuse(error: OSError) -> NoReturn:
    """A folder that cannot be read is not passed over."""
    raise error


def _stage_checkpoints(source: Path, target: Path, directory: Path) -> list[str]:
    """A model directory with safetensors files in place of its checkpoints; all other files are links."""
    notes = []
    no_part = {target.resolve(), directory.resolve()}
    for folder, names, files in os.walk(source, followlinks=True, onerror=_refuse):
        here = Path(folder)
        there = directory / here.relative_to(source)
        there.mkdir(exist_ok=True)
        folders = []
        for name in sorted(names):
            real = (here / name).resolve()
            if real in no_part:
                continue
            if real in (here.resolve(), *here.resolve().parents):
                notes.append(f"{here / name}: left out, a link to a folder that contains it")
            elif name.startswith("."):  # to be named among what is left out
                (there / name).symlink_to(real)
            else:
                folders.append(name)
        names[:] = folders
        for name in sorted(files):
            if match := _MODEL_FILE.match(name):
                written = there / f"{_safetensors_name(*match.groups())}.safetensors"
                file, said = serialized_checkpoint(here / name)
                _write(file, written)
                notes += [*said, f"{here / name}: read with torch, and coded as {written.relative_to(directory)}"]
            elif match := _MODEL_INDEX.match(name):
                kind, rest = match.groups()
                _rewrite_index(here / name, there / f"{_safetensors_name(kind, '')}.safetensors{rest}")
            else:
                (there / name).symlink_to((here / name).resolve())
    return notes


@contextmanager
def staged(source: Path, target: Path) -> Iterator[tuple[Path, list[str]]]:
    """A directory of safetensors beside ``target`` in place of ``source``, and what must be said of it.

    Raises:
        InputError, FormatError, NotInstalledError: ``source`` cannot be read.
    """
    with _beside(target) as directory:
        if source.is_dir():
            notes = _stage_checkpoints(source, target, directory)
        else:
            from kvpack.integrations.gguf import write_model_directory

            notes = write_model_directory(source, directory)
        yield directory, notes


def _beside(target: Path) -> AbstractContextManager[Path]:
    """A hidden directory beside ``target``. Raises InputError where there is none that it would be in."""
    parent = Path(os.path.abspath(target)).parent
    if not parent.is_dir():
        raise InputError(f"the directory {parent} does not exist")
    return hidden_directory(target)


@contextmanager
def as_safetensors(source: Path, beside: Path) -> Iterator[Path]:
    """What ``compress`` reads in place of ``source``, to compare with: itself if it holds safetensors.

    Checkpoints of torch and GGUF files are written as safetensors into a hidden directory beside ``beside``.

    Raises:
        InputError, FormatError, NotInstalledError: as of :func:`staged`.
    """
    if is_checkpoint(source):
        file, _ = serialized_checkpoint(source)
        with _beside(beside) as directory:
            _write(file, directory / f"{source.stem}{SUFFIX}")
            yield directory / f"{source.stem}{SUFFIX}"
    elif has_checkpoints_alone(source, beside) or is_gguf_file(source):
        with staged(source, beside) as (directory, _):
            yield directory
    else:
        yield source
