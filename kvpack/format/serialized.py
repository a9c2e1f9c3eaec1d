"""The safetensors file that tensors would make, for readers of files: its bytes are made when they are read."""

from __future__ import annotations

import json
import math
import struct
import threading
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from kvpack.errors import InputError
from kvpack.format.container import DTYPE_BITS

# How the safetensors library sorts what it writes; then by name.
_DTYPE_ORDER = (
    "U64", "I64", "F64", "C64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16",
    "F8_E5M2FNUZ", "F8_E4M3FNUZ", "F8_E8M0", "F8_E4M3", "F8_E5M2", "I8", "U8", "F4", "BOOL",
)  # fmt: skip


@dataclass(frozen=True)
class TensorSource:
    """A tensor that lies somewhere else than in a safetensors file.

    Attributes:
        dtype: as safetensors calls it.
        shape: as safetensors counts it: single numbers, of F4 too.
        read: gives all its bytes, row-major, each time that it is called.
    """

    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], memoryview]

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8


class SerializedTensors:
    """What the safetensors library's ``save_file`` would write, byte for byte; a Container reads it as a file.

    The bytes of the tensor that was read last are kept, so that strips of one tensor cost one copy from a GPU.

    Attributes:
        path: which the file would have; for messages and for the name of the output.
        size_bytes: of the whole file.

    Raises:
        InputError: a name is no text, or ``__metadata__``.
    """

    def __init__(self, path: Path, tensors: Mapping[str, TensorSource], metadata: Mapping[str, str]) -> None:
        self.path = path
        for name in tensors:
            if not isinstance(name, str) or name == "__metadata__" or not _is_unicode(name):
                raise InputError(f"{path}: {name!r} cannot be a tensor's name in a safetensors file")
        order = sorted(tensors, key=lambda name: (_DTYPE_ORDER.index(tensors[name].dtype), name))
        header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
        begins, at = [], 0
        for name in order:
            tensor = tensors[name]
            begins.append(at)
            header[name] = {
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "data_offsets": [at, at := at + tensor.size_bytes],
            }
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self._front = struct.pack("<Q", len(text)) + text
        self._sources = [tensors[name] for name in order]
        self._begins = [len(self._front) + begin for begin in begins]
        self.size_bytes = len(self._front) + at
        self._lock = threading.Lock()
        self._held: tuple[int, memoryview] | None = None

    def _data(self, number: int) -> memoryview:
        with self._lock:
            if self._held is None or self._held[0] != number:
                self._held = None  # not two of them at once
                self._held = number, self._sources[number].read()
            return self._held[1]

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill ``view``, writable bytes, from ``offset`` on. May be used by several threads."""
        done = min(len(view), max(0, len(self._front) - offset))
        view[:done] = self._front[offset : offset + done]
        while done < len(view):
            at = offset + done
            number = bisect_right(self._begins, at) - 1
            begin = at - self._begins[number]
            part = self._data(number)[begin : begin + len(view) - done]
            view[done : done + len(part)] = part
            done += len(part)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
