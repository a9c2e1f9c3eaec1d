"""The container: a safetensors file that holds blobs (docs/FORMAT.md §9).

Reading is done here and not by the safetensors package for three reasons: any dtype, a named error for each rule, and
10,000 tensors in well under a second. The tests open files with that package too. Files are read and not mapped: a
mapped file that is cut by another process kills its reader with SIGBUS, a read says how much there was.
"""

from __future__ import annotations

import json
import math
import os
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import CancelledError
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Protocol, Self

import numpy as np

from kvpack.errors import (
    ContainerMetadataError,
    FileChangedError,
    LimitError,
    NotAContainerError,
    ScaleError,
    TensorCrcError,
    TensorTableError,
)
from kvpack.format.closing import Closing
from kvpack.format.file_kinds import HEAD_BYTES, describe
from kvpack.format.header import HEADER_BYTES, BlobHeader
from kvpack.format.json_limits import RepeatedKeyError, load_json
from kvpack.format.open_files import OpenFile
from kvpack.format.temporary_files import create_file, hidden_name, remove_abandoned

CONTAINER_VERSION = "1"
VERSION_KEY = "kvpack_version"
TENSORS_KEY = "kvpack_tensors"
CRC_KEY = "kvpack_crc32"
# Of an entry of TENSORS_KEY: its noise over the variance, where that is not about the power.
PARALLEL_KEY = "tensor_parallel"
VARIANCE_NOISE_KEY = "noise_variance_db"
EXPECTED_KL_KEY = "expected_kl"
FEEDBACK_DEVICE_KEY = "feedback_device"
BLOB_SUFFIX = "_kvpack"
SCALE_SUFFIX = "_kvpack_scale"
COLUMN_SCALE_SUFFIX = "_kvpack_column_scale"
ROW_OFFSET_SUFFIX = "_kvpack_row_offset"
# Of what stands beside a blob and turns its integers into numbers (FORMAT.md §8), with its dtype.
NUMBER_DTYPES = {SCALE_SUFFIX: "F32", COLUMN_SCALE_SUFFIX: "F16", ROW_OFFSET_SUFFIX: "F32"}
PART_SUFFIXES = (BLOB_SUFFIX, *NUMBER_DTYPES)
MAX_HEADER_BYTES = 100_000_000
MAX_TENSORS = 1 << 18  # in one file; a reader's own limit (FORMAT.md §10)
_DATA_ALIGNMENT_BYTES = 64
_COPY_BYTES = 1 << 20  # memory of that size is used again, and in the cache yet when it is
_ENDINGS = ("data", "tmp")
MAX_DIMENSIONS = 64  # NumPy's
_MAX_EMPTY_EXTENT = 1 << 58  # NumPy's is 2^63 bytes, zeros left out

DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip


def shown_numbers(suffix: str) -> str:
    """What a message calls one of the numbers beside a blob: ``column scale``."""
    return suffix.removeprefix("_kvpack_").replace("_", " ")


def first_illegal(suffix: str, numbers: np.ndarray[Any, Any]) -> int | None:
    """Index of the first of the numbers beside a blob that FORMAT.md §8 calls illegal; None if all are legal.

    Finite and no denormals, all of them: scales at least 0, scales of columns above 0, offsets of any sign.
    """
    magnitudes = np.abs(numbers) if suffix == ROW_OFFSET_SUFFIX else numbers
    legal = (magnitudes >= np.finfo(numbers.dtype).tiny) & np.isfinite(numbers)
    if suffix != COLUMN_SCALE_SUFFIX:
        legal |= numbers == 0
    return None if legal.all() else int(np.argmin(legal))


@dataclass(frozen=True, slots=True)
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


def _parse_header(text: bytes) -> Any:
    try:
        return load_json(text)
    except RepeatedKeyError as error:
        raise TensorTableError(f"the JSON header: {error}") from None
    except LimitError as error:
        raise LimitError(f"the header: {error}") from None
    except ValueError as error:
        raise NotAContainerError(f"the header is not valid JSON: {error}") from None


def _parse_metadata(key: str, text: str) -> dict[str, Any]:
    """An object of ``__metadata__``, which is the JSON text of one."""
    try:
        value = load_json(text.encode())
    except LimitError as error:
        raise LimitError(f"{key}: {error}") from None
    except ValueError as error:
        raise ContainerMetadataError(f"{key} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ContainerMetadataError(f"{key} is not a JSON object")
    return value


def _parse_tensor(name: str, entry: object) -> StoredTensor:
    if not isinstance(entry, dict) or not entry.keys() >= {"dtype", "shape", "data_offsets"}:
        raise TensorTableError(f"tensor {name!r}: needs dtype, shape and data_offsets")
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


class Readable(Protocol):
    """A file, or what can be read like one: :class:`OpenFile`, :class:`SerializedTensors`."""

    path: Path
    size_bytes: int

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill ``view`` from ``offset`` on."""


class Container(Closing):
    """A safetensors file, opened and its header checked; works for files without blobs too.

    Attributes:
        file: what is read, for who reads it otherwise. Kept open by the container and by all who hold it.
        data_begin: where in the file the tensors' data begin.
        tensors: all stored tensors by name, in the order of their offsets.
        metadata: the strings of ``__metadata__``.
        coded: the entries of ``kvpack_tensors`` (empty if the file has none).
        crc32: what ``kvpack_crc32`` gives for stored tensors that are not blobs (empty if the file has none).

    Args:
        path: of the file, to be opened.
        file: instead, what was opened already; ``path`` is its name alone.
        describe: says what a file is that is no safetensors file, as :func:`kvpack.format.file_kinds.describe`.

    Raises:
        ContainerError: the file breaks a rule of FORMAT.md §9.
        OSError: it cannot be read.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        file: Readable | None = None,
        *,
        describe: Callable[[bytes, int], str | None] = describe,
    ) -> None:
        self.path = Path(path)
        self._describe = describe
        self.file: Readable = OpenFile(self.path) if file is None else file
        size = self.file.size_bytes
        if size < 8:
            kind = self._kind("; it is ")
            raise NotAContainerError(f"{self.path}: {size} bytes are too few for a safetensors file{kind}")
        try:
            self._parse(size)
        except FileChangedError:  # which names the file
            self.close()
            raise
        except NotAContainerError as error:
            found = self._kind("not a safetensors file but ") or str(error)
            self.close()
            raise NotAContainerError(f"{self.path}: {found}") from None
        except ValueError as error:  # every FormatError is one
            self.close()
            error.args = (f"{self.path}: {error}",)
            raise

    def _kind(self, introduction: str) -> str:
        """What the file is by its first bytes, if these tell."""
        size = self.file.size_bytes
        kind = self._describe(bytes(self._read(0, min(size, HEAD_BYTES))), size)
        return "" if kind is None else introduction + kind

    def _parse(self, size: int) -> None:
        beginning = self._read(0, 8)
        (header_bytes,) = struct.unpack("<Q", beginning)
        if header_bytes > MAX_HEADER_BYTES or 8 + header_bytes > size:
            raise NotAContainerError(f"not a safetensors file: a header of {header_bytes} bytes in a file of {size}")
        header = _parse_header(bytes(self._read(8, header_bytes)))
        if not isinstance(header, dict):
            raise NotAContainerError("the header is not a JSON object")
        metadata = header.pop("__metadata__", None)
        if metadata is None:  # null is no metadata, as the safetensors library has it
            metadata = {}
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise TensorTableError("__metadata__ is not a map of strings")
        self.metadata: dict[str, str] = metadata
        if len(header) > MAX_TENSORS:
            raise LimitError(f"{len(header)} tensors in one file: this reader takes {MAX_TENSORS}")
        tensors = sorted(
            (_parse_tensor(name, entry) for name, entry in header.items()),
            key=lambda tensor: (tensor.begin, tensor.end),
        )
        self.data_begin = 8 + header_bytes
        data_bytes = size - self.data_begin
        at = 0
        for tensor in tensors:
            if tensor.begin != at:
                raise TensorTableError(f"tensor {tensor.name!r} begins at {tensor.begin}, expected {at}")
            at = tensor.end
        if at != data_bytes:
            raise TensorTableError(f"the tensors end at {at}, the data at {data_bytes}")
        self.tensors = {tensor.name: tensor for tensor in tensors}
        self.coded = self._parse_coded()
        self.crc32 = self._parse_crc32()

    def _parse_coded(self) -> dict[str, dict[str, Any]]:
        version, text = self.metadata.get(VERSION_KEY), self.metadata.get(TENSORS_KEY)
        parts = {name for name in self.tensors if name.endswith(PART_SUFFIXES)}
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
        coded = _parse_metadata(TENSORS_KEY, text or "")
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
            for suffix, dtype in NUMBER_DTYPES.items():
                numbers = self.tensors.get(name + suffix)
                if numbers is not None and (numbers.dtype != dtype or len(numbers.shape) != 1):
                    shown = f"{numbers.dtype} {list(numbers.shape)}"
                    raise ScaleError(f"the {shown_numbers(suffix)}s of {name!r} are {shown}")
        extra = parts - {name + suffix for name in coded for suffix in PART_SUFFIXES}
        if extra:
            raise ContainerMetadataError(f"{min(extra)!r} has no entry in {TENSORS_KEY}")
        return coded

    def _parse_crc32(self) -> dict[str, int]:
        text = self.metadata.get(CRC_KEY)
        if text is None or VERSION_KEY not in self.metadata:  # absent, or an ordinary file's own affair
            return {}
        given = _parse_metadata(CRC_KEY, text)
        for name, crc in given.items():
            if name not in self.tensors or name.removesuffix(BLOB_SUFFIX) in self.coded:
                raise ContainerMetadataError(f"{CRC_KEY}: {name!r} is no stored tensor, or a blob, which has its own")
            if not _is_count(crc) or crc >= 1 << 32:
                raise ContainerMetadataError(f"{CRC_KEY}: the CRC of {name!r} is {crc!r}")
        return given

    def original_names(self) -> list[str]:
        """Names of the original tensors: coded ones without their suffix, others as they are."""
        parts = {name + suffix for name in self.coded for suffix in PART_SUFFIXES}
        return sorted([*self.coded, *(name for name in self.tensors if name not in parts)])

    def rename(self, names: Mapping[str, str]) -> None:
        """Let the original tensors have other names, as those of a file in a directory of many; the file stays.

        Args:
            names: each original name → its other one.
        """
        new = dict(names)
        for name in self.coded:
            for suffix in PART_SUFFIXES:
                new[name + suffix] = names[name] + suffix
        self.tensors = {new[name]: replace(tensor, name=new[name]) for name, tensor in self.tensors.items()}
        self.coded = {new[name]: entry for name, entry in self.coded.items()}
        self.crc32 = {new[name]: crc for name, crc in self.crc32.items()}

    def _read(self, offset: int, size_bytes: int) -> memoryview:
        if "file" not in vars(self):
            raise ValueError(f"{self.path} is closed")
        buffer = np.empty(size_bytes, np.uint8)
        self.file.read_into(buffer.data, offset)
        return buffer.data.toreadonly()

    def read(self, name: str, begin: int, end: int) -> memoryview:
        """The bytes ``begin … end`` of a stored tensor, read-only, in memory of their own.

        Raises:
            FileChangedError: the file was cut or written to since it was opened.
        """
        return self._read(self.data_begin + self.tensors[name].begin + begin, end - begin)

    def data(self, name: str) -> memoryview:
        """All bytes of a stored tensor, as :meth:`read` gives them."""
        return self.read(name, 0, self.tensors[name].size_bytes)

    def pieces(self, name: str) -> Iterator[memoryview]:
        """The bytes of a stored tensor in parts of at most 1 MiB, so that they are never in memory as a whole."""
        size = self.tensors[name].size_bytes
        for begin in range(0, size, _COPY_BYTES):
            yield self.read(name, begin, min(begin + _COPY_BYTES, size))

    def check_crc32(self, name: str, data: memoryview | None = None) -> bool:
        """Compare the bytes of a stored tensor that is not a blob with their CRC; False if the file gives none.

        Args:
            data: its bytes, if they have been read already.

        Raises:
            TensorCrcError: they are damaged.
        """
        if name not in self.crc32:
            return False
        computed = 0
        for piece in self.pieces(name) if data is None else (data,):
            computed = zlib.crc32(piece, computed)
        self.compare_crc32(name, computed)
        return True

    def compare_crc32(self, name: str, computed: int) -> None:
        """For who reads a stored tensor anyway: its CRC against the one that the file gives, if it does.

        Raises:
            TensorCrcError: they differ.
        """
        given = self.crc32.get(name, computed)
        if computed != given:
            raise TensorCrcError(f"{self.path}, tensor {name!r}: {CRC_KEY} is 0x{given:08X}, computed 0x{computed:08X}")

    def blob_header(self, name: str) -> BlobHeader:
        """The header alone of a coded tensor's blob, unverified by its CRC."""
        return BlobHeader.parse(
            self.read(name + BLOB_SUFFIX, 0, min(HEADER_BYTES, self.tensors[name + BLOB_SUFFIX].size_bytes))
        )

    def scales(self, name: str) -> np.ndarray[Any, np.dtype[np.float32]] | None:
        """The scales of a coded tensor, f32 [1] or [matrices · rows], or None."""
        if name + SCALE_SUFFIX not in self.tensors:
            return None
        scales = np.frombuffer(self.data(name + SCALE_SUFFIX), "<f4").astype(np.float32)
        self._check_numbers(name, SCALE_SUFFIX, scales)
        return scales

    def column_scales(self, name: str) -> np.ndarray[Any, np.dtype[np.float16]] | None:
        """The column scales of a coded tensor, f16 [matrices · cols], or None."""
        if name + COLUMN_SCALE_SUFFIX not in self.tensors:
            return None
        scales = np.frombuffer(self.data(name + COLUMN_SCALE_SUFFIX), "<f2").astype(np.float16)
        self._check_numbers(name, COLUMN_SCALE_SUFFIX, scales)
        return scales

    def row_offsets(self, name: str) -> np.ndarray[Any, np.dtype[np.float32]] | None:
        """The row offsets of a coded tensor, f32 [matrices · rows], or None."""
        if name + ROW_OFFSET_SUFFIX not in self.tensors:
            return None
        offsets = np.frombuffer(self.data(name + ROW_OFFSET_SUFFIX), "<f4").astype(np.float32)
        self._check_numbers(name, ROW_OFFSET_SUFFIX, offsets)
        return offsets

    def _check_numbers(self, name: str, suffix: str, numbers: np.ndarray[Any, Any]) -> None:
        at = first_illegal(suffix, numbers)
        if at is not None:
            raise ScaleError(f"{self.path}: {shown_numbers(suffix)} {at} of {name!r} is {numbers[at]}")

    def close(self) -> None:
        """Let go of the file; it is closed as soon as nobody else holds it. What was read stays."""
        vars(self).pop("file", None)


class ContainerWriter:
    """Writes a safetensors file tensor by tensor, with memory for one of them, and puts it in place at once.

    Data goes to a spool file beside the target (its offsets are part of the header, which comes first); ``finish``
    writes the header, appends the spool, flushes to disk and renames. Leaving the ``with`` block otherwise removes
    all traces, and a process that is killed leaves ``.NAME.12345678.data`` and ``.tmp``, which the next writer of the
    same file removes.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        remove_abandoned(self.path, *_ENDINGS)
        self._spool_path, self._final_path = (
            self.path.with_name(hidden_name(self.path.name, ending)) for ending in _ENDINGS
        )
        self._spool: BinaryIO = create_file(self._spool_path)
        self._tensors: dict[str, dict[str, Any]] = {}
        self._at = 0
        self._given_up = False

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
        """Put the file in place; returns its size in bytes.

        Raises:
            CancelledError: another thread called :meth:`give_up`.
        """
        self._spool.flush()  # and not closed: its lock says that it is in use
        header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        text = json.dumps(header | self._tensors, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-(8 + len(text)) % _DATA_ALIGNMENT_BYTES)
        with create_file(self._final_path) as final, self._spool_path.open("rb") as spool:
            final.write(struct.pack("<Q", len(text)))
            final.write(text)
            while piece := spool.read(_COPY_BYTES):
                self._check_not_given_up()
                final.write(piece)
            final.flush()
            self._check_not_given_up()
            os.fsync(final.fileno())
            self._final_path.replace(self.path)  # while it is locked
            return final.tell()

    def give_up(self) -> None:
        """Let :meth:`finish`, which another thread is at, end soon: nobody wants the file any more."""
        self._given_up = True

    def _check_not_given_up(self) -> None:
        if self._given_up:
            raise CancelledError(f"{self.path} was given up")

    def close(self) -> None:
        """Remove what is not in place."""
        with suppress(OSError):  # what is left in the buffer cannot be written to a full disk either
            self._spool.close()
        self._spool_path.unlink(missing_ok=True)
        self._final_path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
