"""Where ``compress`` and ``decompress`` may write, and what an output file of theirs holds."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from kvpack.encode.model_directory import write_index
from kvpack.encode.reader import shard_paths
from kvpack.errors import InputError

_COPY_BYTES = 1 << 24


def check_target(source: Path, target: Path, *, force: bool, exists: bool = True) -> None:
    """Check that ``source``, if it ``exists`` outside of memory, can be read, and ``target`` written.

    Raises:
        InputError: there is no source, or the target is there already, is of another kind, or holds what must stay.
    """
    if exists and not source.exists():
        raise InputError(f"{source} does not exist")
    shard_paths(source)  # raises where there are none
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
        if target.is_dir() and not empty and not any(target.glob("*.safetensors")):
            raise InputError(f"{target} holds no .safetensors file: it is not replaced, since it may hold other things")
        if target.is_dir() and source.resolve().is_relative_to(target.resolve()):
            raise InputError(f"the output {target} contains the input")
        if target.is_dir() and Path.cwd().is_relative_to(target.resolve()):
            raise InputError(f"the output {target} is, or contains, the working directory: -o names another one")
    if not target.resolve().parent.is_dir():
        raise InputError(f"the directory {target.parent} does not exist")


@dataclass
class Shard:
    """What one output file holds, for the index and config.json."""

    name: str
    stored_names: list[str]
    stored_bytes: int
    blob_bytes: dict[str, int]


def write_shard_index(directory: Path, shards: list[Shard]) -> None:
    """The index of a directory of such files."""
    weight_map = {name: shard.name for shard in shards for name in shard.stored_names}
    write_index(directory, weight_map, sum(shard.stored_bytes for shard in shards))


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
