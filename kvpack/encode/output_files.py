"""Where ``compress`` and ``decompress`` may write, and what an output file of theirs holds."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from kvpack.encode.model_directory import write_json
from kvpack.encode.model_tree import (
    DIFFUSERS_STEM,
    SUFFIX,
    TRANSFORMERS_STEM,
    Index,
    ModelTree,
    is_index_name,
    list_files,
)
from kvpack.errors import InputError

_COPY_BYTES = 1 << 24


def check_target(source: Path, target: Path, *, force: bool, exists: bool = True) -> None:
    """Check that ``source``, if it ``exists`` outside of memory, can be read, and ``target`` written.

    Raises:
        InputError: there is no source, or the target is there already, is of another kind, or holds what must stay.
    """
    if exists and not source.exists():
        hint = ""
        if not source.is_absolute() and len(source.parts) == 2 and not source.parent.exists():  # owner/name
            hint = f"; a model of the Hugging Face Hub is fetched first: hf download {source} --local-dir {source.name}"
        raise InputError(f"{source} does not exist{hint}")
    if is_index_name(source.name) and source.is_file():
        raise InputError(f"{source} is an index: give the folder that it is in")
    if target.exists():
        if target.resolve() == source.resolve():
            raise InputError(f"the output {target} is the input")
        if not (target.is_dir() or target.is_file()):
            raise InputError(f"{target} is neither a file nor a directory")
        empty = target.is_dir() and not any(target.iterdir())
        if not force and not empty:
            raise InputError(f"{target} exists already; --force (force=True) replaces it")
        if target.is_dir() != source.is_dir():
            raise InputError(f"{target} is {'a directory' if target.is_dir() else 'a file'}")
        if target.is_dir() and not empty and not _holds_weights(target):
            raise InputError(f"{target} holds no .safetensors file: it is not replaced, since it may hold other things")
        if target.is_dir() and source.resolve().is_relative_to(target.resolve()):
            raise InputError(f"the output {target} contains the input")
        if target.is_dir() and Path.cwd().is_relative_to(target.resolve()):
            raise InputError(f"the output {target} is, or contains, the working directory: -o names another one")
    if not target.resolve().parent.is_dir():
        raise InputError(f"the directory {target.parent} does not exist")


def _holds_weights(folder: Path) -> bool:
    return any(file.name.endswith(SUFFIX) for file in list_files(folder).files)


@dataclass
class Shard:
    """What one output file holds, for the index and config.json.

    Attributes:
        path: relative to the directory.
        stored: stored tensor → original tensor, names as in the file.
        stored_bytes: of each stored tensor.
        blob_bytes: coded tensor, named as in the file → length of its blob.
    """

    path: Path
    stored: dict[str, str] = field(default_factory=dict)
    stored_bytes: dict[str, int] = field(default_factory=dict)
    blob_bytes: dict[str, int] = field(default_factory=dict)

    def add(self, stored: str, original: str, size_bytes: int) -> None:
        """Note a stored tensor."""
        self.stored[stored] = original
        self.stored_bytes[stored] = size_bytes


def _weight_map(shards: Iterable[Shard], file_of: dict[str, str]) -> tuple[dict[str, str], int]:
    """Stored tensor → file, and the bytes of all; of copies in several files the one of ``file_of`` counts."""
    weight_map, size = {}, 0
    for shard in shards:
        for stored, original in shard.stored.items():
            if file_of.get(original, shard.path.name) == shard.path.name:
                weight_map[stored] = shard.path.name
                size += shard.stored_bytes[stored]
    return weight_map, size


def added_indexes(tree: ModelTree) -> list[Index]:
    """An index for each folder's model of several files that has none, nor a single file that loaders take."""
    found = []
    for folder in tree.folders:
        names = [file.path.name for file in tree.files_of(folder) if file.reason is None]
        is_single = any(f"{stem}{SUFFIX}" in names for stem in (TRANSFORMERS_STEM, DIFFUSERS_STEM))
        if len(names) > 1 and not is_single and not any(index.path.parent == folder for index in tree.indexes):
            stem = DIFFUSERS_STEM if all(name.startswith(DIFFUSERS_STEM) for name in names) else TRANSFORMERS_STEM
            path = folder / f"{stem}.safetensors.index.json"
            found.append(Index(path, {"metadata": {"total_size": 0}}, dict.fromkeys(names, "")))
    return found


def write_indexes(directory: Path, tree: ModelTree, shards: list[Shard], added: Iterable[Index]) -> None:
    """The indexes of ``tree`` for the same files with other contents, and ``added`` ones."""
    for index in tree.indexes:
        names = set(index.weight_map.values())
        beside = [s for s in shards if s.path.parent == index.path.parent and s.path.name in names]
        write_json(directory / index.path, index.rewritten(*_weight_map(beside, tree.counted_files(index))))
    for index in added:
        own = [s for s in shards if s.path.parent == index.path.parent and s.path.name in index.weight_map]
        write_json(directory / index.path, index.rewritten(*_weight_map(own, {})))


class Crc32:
    """Passes pieces on; ``value`` is the CRC-32 of all that went through, so of the very bytes that are written."""

    def __init__(self, data: Iterable[memoryview]) -> None:
        self.value = 0
        self._data = data

    def __iter__(self) -> Iterator[memoryview]:
        for piece in self._data:
            self.value = zlib.crc32(piece, self.value)
            yield piece


def pieces(data: memoryview) -> Iterator[memoryview]:
    """The bytes in parts of at most 16 MiB, for who writes them one after another."""
    for first in range(0, len(data), _COPY_BYTES):
        yield data[first : first + _COPY_BYTES]
