"""kvpack's pages as a serde of LMCache's second tier, named ``kvpack``: import this module to register it.

    {"type": "fs", "base_path": "/kv", "serde": {"type": "kvpack", "head_dim": 128, "pages": "INT4"}}

LMCache knows no entry points for serdes, so that its server has to import this: ``python -m kvpack.integrations.lmcache
server …`` is ``lmcache server …`` with it. docs/LMCACHE.md has the options.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Mapping

import torch
from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey
from lmcache.v1.distributed.serde import (
    AsyncSerdeProcessor,
    Deserializer,
    SerdeProcessor,
    Serializer,
    register_serde_factory,
)
from lmcache.v1.memory_management import MemoryObj

from kvpack.errors import InputError
from kvpack.format.pages import PageFormat
from kvpack.integrations.kv_chunks import ChunkCoder

NAME = "kvpack"
_OPTIONS = ("head_dim", "pages", "max_workers")


class PageSerde(Serializer, Deserializer):
    """Chunks of KV ⇄ pages. May be used by several threads.

    Tensors on a GPU go through host memory, which LMCache's first tier is in anyway; a warning says so once.
    """

    def __init__(self, coder: ChunkCoder) -> None:
        self.coder = coder
        self._told = threading.Lock()  # held from the warning on

    def estimate_serialized_size(self, layout_desc: MemoryLayoutDesc) -> int:
        """The very size, in bytes: what is coded never takes more, or less. Raises InputError."""
        return self.coder.size_bytes(layout_desc.shapes)

    def serialize(self, src: MemoryObj, dst: MemoryObj, key: ObjectKey) -> int:
        """Code tensors of KV; returns the bytes that ``dst`` has of it. Raises InputError."""
        tensors = [self._in_host_memory(tensor) for tensor in _tensors_of(src)]
        out = _bytes_of(dst)
        if out.device.type == "cpu":
            return self.coder.encode(tensors, out)
        coded = torch.empty(self.coder.size_bytes([tensor.shape for tensor in tensors]), dtype=torch.uint8)
        size = self.coder.encode(tensors, coded)
        out[:size].copy_(coded)
        return size

    def deserialize(self, src: MemoryObj, dst: MemoryObj, key: ObjectKey) -> None:
        """Decode into tensors of KV.

        Raises:
            ChunkError: the bytes are damaged, or were coded with other options; ``dst`` is unchanged.
            InputError: the tensors are none that a chunk has.
        """
        tensors = _tensors_of(dst)
        decoded = [t if t.device.type == "cpu" else torch.empty_like(t, device="cpu") for t in tensors]
        self.coder.decode(self._in_host_memory(_bytes_of(src)), decoded)
        for tensor, values in zip(tensors, decoded, strict=True):
            if values is not tensor:
                tensor.copy_(values)

    def _in_host_memory(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device.type != "cpu" and self._told.acquire(blocking=False):
            warnings.warn(f"kvpack's serde codes what lies on {tensor.device} in host memory", stacklevel=2)
        return tensor.cpu()


def _tensors_of(obj: MemoryObj) -> list[torch.Tensor]:
    """One for each group of layers of like shape. Raises InputError."""
    tensors = [obj.get_tensor(index) for index in range(len(obj.get_shapes()))]
    found = [tensor for tensor in tensors if tensor is not None]
    if len(found) < len(tensors):
        raise InputError("an object of LMCache has no tensor: it was freed")
    return found


def _bytes_of(obj: MemoryObj) -> torch.Tensor:
    """A buffer's bytes. Raises InputError."""
    if obj.tensor is None:
        raise InputError("a buffer of LMCache has no tensor: it was freed")
    return obj.tensor.view(torch.uint8).flatten()


def _formats(pages: object) -> tuple[PageFormat, PageFormat]:
    """Of keys and values. Raises InputError."""
    names = [pages, pages] if isinstance(pages, str) else pages
    known = PageFormat.__members__
    if not isinstance(names, list) or len(names) != 2 or not all(isinstance(n, str) and n in known for n in names):
        raise InputError(
            f"pages {pages!r}: a format, or a list of two, of keys and of values; there are {', '.join(known)}"
        )
    return PageFormat[names[0]], PageFormat[names[1]]


def _number(options: Mapping[str, object], name: str, otherwise: int | None) -> int:
    """Raises InputError."""
    value = options.get(name, otherwise)
    if type(value) is not int or value < 1:
        raise InputError(f"{name} {value!r}: a number of 1 or more is needed")
    return value


def create_serde(options: Mapping[str, object]) -> SerdeProcessor:
    """What LMCache calls with the ``serde`` of its configuration, less ``type``.

    Args:
        options: ``head_dim`` of the model, which is needed; ``pages``, ``"INT8"`` by default: a name of
            :class:`~kvpack.format.pages.PageFormat`, or a list of two, of keys and of values; ``max_workers``, how many
            threads code, 1 by default.

    Raises:
        InputError: an option that there is not, or a value that it cannot have.
        PageError: pages have no such head_dim.
    """
    if unknown := [name for name in options if name not in _OPTIONS]:
        raise InputError(
            f"serde {NAME!r} has no option {', '.join(map(repr, unknown))}: there are {', '.join(_OPTIONS)}"
        )
    keys, values = _formats(options.get("pages", "INT8"))
    serde = PageSerde(ChunkCoder(_number(options, "head_dim", None), keys, values))
    return AsyncSerdeProcessor(serde, serde, max_workers=_number(options, "max_workers", 1))


register_serde_factory(NAME, create_serde)

if __name__ == "__main__":
    from lmcache.cli.main import main

    main()
