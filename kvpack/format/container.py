"""The container: a safetensors file that holds blobs (docs/FORMAT.md §9).

Reading is done here and not by the safetensors package for three reasons: zero-copy views of any dtype, a named
error for each rule, and 10,000 tensors in well under a second. The tests open files with that package too.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import secrets
import shutil
import struct
import weakref
import zlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np

from kvpack.errors import (
    ContainerMetadataError,
    LimitError,
    NotAContainerError,
    ScaleError,
    TensorCrcError,
    TensorTableError,
)
from kvpack.format.header import HEADER_BYTES, BlobHeader

CONTAINER_VERSION = "1"
VERSION_KEY = "kvpack_version"
TENSORS_KEY = "kvpack_tensors"
CRC_KEY = "kvpack_crc32"
# Of an entry of TENSORS_KEY: its noise over the variance, where that is not about the power.
VARIANCE_NOISE_KEY = "noise_variance_db"
BLOB_SUFFIX = "_kvpack"
SCALE_SUFFIX = "_kvpack_scale"
MAX_HEADER_BYTES = 100_000_000
_DATA_ALIGNMENT_BYTES = 64
_COPY_BYTES = 1 << 24
MAX_DIMENSIONS = 64  # NumPy's
_MAX_EMPTY_EXTENT = 1 << 58  # NumPy's is 2^63 bytes, zeros left out

DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as the safetensors header lists it; offsets are from the data's start."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def size_bytes(self) -> int:
        return self.end - self.begin


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _is_shape(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_count, value))


class _RepeatedKeyError(ValueError):
    pass


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _RepeatedKeyError(f"{twice!r} is there twice")
    for key, value in pairs:  # a lone surrogate, as "\ud800", is not text: encode() refuses it
        key.encode()
        if isinstance(value, str):
            value.encode()
    return found


def _parse_header(text: bytes) -> Any:
    try:
        return json.loads(text.decode(), object_pairs_hook=_unique_keys)
    except _RepeatedKeyError as error:
        raise TensorTableError(f"the JSON header: {error}") from None
    except (ValueError, RecursionError) as error:
        raise NotAContainerError(f"the header is not valid JSON: {error}") from None


def _parse_tensor(name: str, entry: object) -> StoredTensor:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise TensorTableError(f"tensor {name!r}: needs exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise TensorTableError(f"tensor {name!r}: unknown dtype {dtype!r}")
    if not _is_shape(shape):
        raise TensorTableError(f"tensor {name!r}: shape {shape!r}")
    if len(shape) > MAX_DIMENSIONS:  # which also bounds the product below
        raise LimitError(f"tensor {name!r} has {len(shape)} dimensions, more than the {MAX_DIMENSIONS} of an array")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise TensorTableError(f"tensor {name!r}: data_offsets {offsets!r}")
    begin, end = offsets
    bits = DTYPE_BITS[dtype]
    for size in shape:
        bits *= size  # Python integers do not overflow
    if bits != 8 * (end - begin):
        raise TensorTableError(f"tensor {name!r}: {dtype} {shape} does not fill the bytes {begin} to {end}")
    if not bits and math.prod(size or 1 for size in shape) >= _MAX_EMPTY_EXTENT:
        raise LimitError(f"tensor {name!r}: {shape} is empty, but more than an array can have")
    return StoredTensor(name, dtype, tuple(shape), begin, end)


class OpenFile:
    """A file that stays open until the last reference to it is gone, whatever its path leads to meanwhile.

    Attributes:
        path: under which it was opened; for messages.
        descriptor: to be read at given offsets alone, since the position is shared.

    Raises:
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:  # which refuses folders
            self.descriptor = os.dup(file.fileno())
        weakref.finalize(self, os.close, self.descriptor)


class Container:
    """A safetensors file, mapped into memory and checked; works for files without blobs too.

    Attributes:
        file: what is mapped, for who reads it otherwise. Kept open by the container and by all who hold it.
        data_begin: where in the file the tensors' data begin.
        tensors: all stored tensors by name, in the order of their offsets.
        metadata: the strings of ``__metadata__``.
        coded: the entries of ``kvpack_tensors`` (empty if the file has none).
        crc32: what ``kvpack_crc32`` gives for stored tensors that are not blobs (empty if the file has none).

    Raises:
        ContainerError: the file breaks a rule of FORMAT.md §9.
        OSError: it cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.file = OpenFile(self.path)
        size = os.fstat(self.file.descriptor).st_size
        if size < 8:
            raise NotAContainerError(f"{self.path}: {size} bytes are too few for a safetensors file")
        self._map = mmap.mmap(self.file.descriptor, 0, access=mmap.ACCESS_READ)
        self._view = memoryview(self._map)
        try:
            self._parse(size)
        except ValueError as error:  # every FormatError is one
            self.close()
            error.args = (f"{self.path}: {error}",)
            raise

    def _parse(self, size: int) -> None:
        (header_bytes,) = struct.unpack_from("<Q", self._view)
        if header_bytes > MAX_HEADER_BYTES or 8 + header_bytes > size:
            if bytes(self._view[:2]) in (b"PK", b"\x80\x02"):
                raise NotAContainerError("a PyTorch pickle, not a safetensors file: convert it with safetensors first")
            raise NotAContainerError(f"not a safetensors file: a header of {header_bytes} bytes in a file of {size}")
        header = _parse_header(bytes(self._view[8 : 8 + header_bytes]))
        if not isinstance(header, dict):
            raise NotAContainerError("the header is not a JSON object")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise TensorTableError("__metadata__ is not a map of strings")
        self.metadata: dict[str, str] = metadata
        tensors = sorted(
            (_parse_tensor(name, entry) for name, entry in header.items()),
            key=lambda tensor: (tensor.begin, tensor.end),
        )
        self.data_begin = 8 + header_bytes
        self._data = self._view[self.data_begin :]
        at = 0
        for tensor in tensors:
            if tensor.begin != at:
                raise TensorTableError(f"tensor {tensor.name!r} begins at {tensor.begin}, expected {at}")
            at = tensor.end
        if at != len(self._data):
            raise TensorTableError(f"the tensors end at {at}, the data at {len(self._data)}")
        self.tensors = {tensor.name: tensor for tensor in tensors}
        self.coded = self._parse_coded()
        self.crc32 = self._parse_crc32()

    def _parse_coded(self) -> dict[str, dict[str, Any]]:
        version, text = self.metadata.get(VERSION_KEY), self.metadata.get(TENSORS_KEY)
        parts = {name for name in self.tensors if name.endswith((BLOB_SUFFIX, SCALE_SUFFIX))}
        if version is None and text is None:
            if parts:
                raise ContainerMetadataError(
                    f"{min(parts)!r} is a name of a coded tensor, but there is no {VERSION_KEY} in __metadata__: no "
                    "file of kvpack's, but a model's state, as save_pretrained writes it after replace_linears. Use "
                    "the compressed file itself; or load that into a model with replace_linears, and then this with "
                    "load_state_dict"
                )
            return {}
        if version != CONTAINER_VERSION:
            raise ContainerMetadataError(f"{VERSION_KEY} is {version!r}, this reader knows {CONTAINER_VERSION!r}")
        try:
            coded = json.loads(text or "", object_pairs_hook=_unique_keys)
        except (ValueError, RecursionError) as error:
            raise ContainerMetadataError(f"{TENSORS_KEY} is not valid JSON: {error}") from None
        if not isinstance(coded, dict):
            raise ContainerMetadataError(f"{TENSORS_KEY} is not a JSON object")
        for name, entry in coded.items():
            if (
                not isinstance(entry, dict)
                or not isinstance(entry.get("dtype"), str)
                or entry["dtype"] not in DTYPE_BITS
                or not _is_shape(entry.get("shape"))
                or len(entry["shape"]) > MAX_DIMENSIONS
            ):
                raise ContainerMetadataError(f"{TENSORS_KEY}: the entry of {name!r} is malformed")
            blob = self.tensors.get(name + BLOB_SUFFIX)
            if blob is None or blob.dtype != "U8" or len(blob.shape) != 1:
                raise ContainerMetadataError(f"tensor {name!r} has an entry, but no blob of type U8")
            if name in self.tensors:
                raise ContainerMetadataError(f"tensor {name!r} is stored both coded and as it is")
            scale = self.tensors.get(name + SCALE_SUFFIX)
            if scale is not None and (scale.dtype != "F32" or len(scale.shape) != 1):
                raise ScaleError(f"the scales of {name!r} are {scale.dtype} {list(scale.shape)}")
        extra = parts - {name + suffix for name in coded for suffix in (BLOB_SUFFIX, SCALE_SUFFIX)}
        if extra:
            raise ContainerMetadataError(f"{min(extra)!r} has no entry in {TENSORS_KEY}")
        return coded

    def _parse_crc32(self) -> dict[str, int]:
        text = self.metadata.get(CRC_KEY)
        if text is None or VERSION_KEY not in self.metadata:  # absent, or an ordinary file's own affair
            return {}
        try:
            given = json.loads(text, object_pairs_hook=_unique_keys)
        except (ValueError, RecursionError) as error:
            raise ContainerMetadataError(f"{CRC_KEY} is not valid JSON: {error}") from None
        if not isinstance(given, dict):
            raise ContainerMetadataError(f"{CRC_KEY} is not a JSON object")
        for name, crc in given.items():
            if name not in self.tensors or name.removesuffix(BLOB_SUFFIX) in self.coded:
                raise ContainerMetadataError(f"{CRC_KEY}: {name!r} is no stored tensor, or a blob, which has its own")
            if not _is_count(crc) or crc >= 1 << 32:
                raise ContainerMetadataError(f"{CRC_KEY}: the CRC of {name!r} is {crc!r}")
        return given

    def original_names(self) -> list[str]:
        """Names of the original tensors: coded ones without their suffix, others as they are."""
        parts = {name + suffix for name in self.coded for suffix in (BLOB_SUFFIX, SCALE_SUFFIX)}
        return sorted([*self.coded, *(name for name in self.tensors if name not in parts)])

    def data(self, name: str) -> memoryview:
        """The bytes of a stored tensor, not copied."""
        tensor = self.tensors[name]
        return self._data[tensor.begin : tensor.end]

    def check_crc32(self, name: str) -> bool:
        """Compare the bytes of a stored tensor that is not a blob with their CRC; False if the file gives none.

        Raises:
            TensorCrcError: they are damaged.
        """
        given = self.crc32.get(name)
        if given is None:
            return False
        computed = zlib.crc32(self.data(name))
        if computed != given:
            raise TensorCrcError(f"{self.path}, tensor {name!r}: {CRC_KEY} is 0x{given:08X}, computed 0x{computed:08X}")
        return True

    def blob_header(self, name: str) -> BlobHeader:
        """The header alone of a coded tensor's blob, unverified by its CRC."""
        return BlobHeader.parse(self.data(name + BLOB_SUFFIX)[:HEADER_BYTES])

    def scales(self, name: str) -> np.ndarray[Any, np.dtype[np.float32]] | None:
        """The scales of a coded tensor, f32 [1] or [matrices · rows], or None."""
        if name + SCALE_SUFFIX not in self.tensors:
            return None
        scales = np.frombuffer(self.data(name + SCALE_SUFFIX), "<f4").astype(np.float32)
        tiny = np.finfo(np.float32).tiny
        bad = ~((scales == 0) | ((scales >= tiny) & np.isfinite(scales)))
        if bad.any():
            raise ScaleError(f"{self.path}: scale {int(np.argmax(bad))} of {name!r} is {scales[bad][0]}")
        return scales

    def close(self) -> None:
        """Unmap the file and let go of it, as soon as no array refers to the one, and nobody holds the other."""
        vars(self).pop("file", None)
        for view in (getattr(self, "_data", None), self._view):
            if view is not None:
                view.release()
        try:
            self._map.close()
        except BufferError:  # an array still refers to the map; it is unmapped with the last one
            return

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class ContainerWriter:
    """Writes a safetensors file tensor by tensor, with memory for one of them, and puts it in place at once.

    Data goes to a spool file beside the target (its offsets are part of the header, which comes first); ``finish``
    writes the header, appends the spool, flushes to disk and renames. Leaving the ``with`` block otherwise removes
    all traces.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        # A process killed before may have had this number too: containers begin theirs at 1.
        unique = f".{self.path.name}.{os.getpid()}-{secrets.token_hex(4)}"
        self._spool_path = self.path.with_name(f"{unique}.data")
        self._final_path = self.path.with_name(f"{unique}.tmp")
        self._spool: BinaryIO = self._spool_path.open("xb")
        self._tensors: dict[str, dict[str, Any]] = {}
        self._at = 0

    def add(self, name: str, dtype: str, shape: Iterable[int], data: Iterable[memoryview | bytes]) -> None:
        """Append a tensor whose bytes come in pieces."""
        begin = self._at
        for piece in data:
            self._spool.write(piece)
            self._at += len(piece)
        self._tensors[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [begin, self._at],
        }

    def finish(self, metadata: Mapping[str, str]) -> int:
        """Put the file in place; returns its size in bytes."""
        self._spool.close()
        header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        text = json.dumps(header | self._tensors, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-(8 + len(text)) % _DATA_ALIGNMENT_BYTES)
        with self._final_path.open("xb") as final, self._spool_path.open("rb") as spool:
            final.write(struct.pack("<Q", len(text)))
            final.write(text)
            shutil.copyfileobj(spool, final, _COPY_BYTES)
            final.flush()
            os.fsync(final.fileno())
            size = final.tell()
        self._final_path.replace(self.path)
        return size

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with suppress(OSError):  # what is left in the buffer cannot be written to a full disk either
            self._spool.close()
        self._spool_path.unlink(missing_ok=True)
        self._final_path.unlink(missing_ok=True)
