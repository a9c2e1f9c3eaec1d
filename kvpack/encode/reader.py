"""``kvpack.open``: read tensors of a compressed file or model directory (docs/FORMAT.md §9)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  (registers bfloat16 and fp8 names with NumPy)
import numpy as np
import numpy.typing as npt

from kvpack.encode.blob_decoder import decode_integers
from kvpack.encode.coded_tensor import CodedTensor
from kvpack.encode.dtypes import FLOAT_NAMES, LOSSLESS_KINDS, LOSSY_DTYPES, NARROW_DTYPES, NUMPY_DTYPES
from kvpack.encode.model_tree import ModelTree
from kvpack.encode.threads import ThreadPool
from kvpack.errors import ContainerMetadataError, ScaleError
from kvpack.format.blob import Blob
from kvpack.format.closing import Closing
from kvpack.format.container import (
    BLOB_SUFFIX,
    COLUMN_SCALE_SUFFIX,
    EXPECTED_KL_KEY,
    NUMBER_DTYPES,
    PARALLEL_KEY,
    ROW_OFFSET_SUFFIX,
    SCALE_SUFFIX,
    VARIANCE_NOISE_KEY,
    Container,
)
from kvpack.format.header import BlobHeader
from kvpack.format.layout import ElementKind

METHODS = ("lossless", "uniform", "trellis", "int8-row")


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a coded tensor without decoding it.

    ``noise_db`` is over the variance where the file says so, else over the power, as ``power_noise_db`` always is; None
    where nothing was lost. ``tensor_parallel`` is into how many parts the writer made sure that it can be cut, 1 if it
    says nothing. ``num_scales`` is 0 for exact codings, else 1 or one for each row. ``expected_kl``: nats a token that
    its noise costs, by the writer's calibration; None without one.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    method: str
    layout: str
    bits_per_weight: float
    entropy_bits: float | None
    noise_db: float | None
    power_noise_db: float | None
    outliers: int
    blob_bytes: int
    tensor_parallel: int
    header: BlobHeader
    num_scales: int
    has_column_scales: bool
    has_row_offsets: bool
    expected_kl: float | None = None


class NumbersBeside(NamedTuple):
    """What stands beside a blob of integers: w = (scale · q + row offset) · column scale (docs/FORMAT.md §8).

    ``scales`` f32 [1] or [matrices · rows]; ``column_scales`` f16 [matrices · cols]; ``row_offsets`` f32
    [matrices · rows]; each None if there are none.
    """

    scales: npt.NDArray[np.float32] | None
    column_scales: npt.NDArray[np.float16] | None = None
    row_offsets: npt.NDArray[np.float32] | None = None


class Reader(Closing):
    """Tensors of a safetensors file, or of a model directory, by their original names.

    Those of the directory's own model have plain names. Before the others comes where they are: ``unet/`` and the name
    for the model of a subfolder, ``model.fp16.safetensors/`` for another set of weights in a folder (docs/FORMAT.md
    §9.4 says which is which). ``main_keys`` leaves such other sets out.

    Opening reads the files' headers; tensors are decoded when asked for. May be used by several threads,
    and by processes forked from the one that opened it.

    Example::

        with kvpack.open("model.kvpack.safetensors") as reader:
            for name in reader.keys():
                weights = reader.dequantize(name, "float32")

    Args:
        path: a .safetensors file, a model directory, or an index in one, for the set of weights that it names.
        threads: cores to decode with; all by default.
        max_elements: refuse to decode tensors of more elements (default: max(2^28, 256 × blob bytes)).
        components: False opens a directory's own model alone: no subfolders, no other sets of weights.
        without: a folder in the directory that is no part of it.
        tree: the model, opened already; the reader closes it.
        verify: compare what is asked for with the CRCs that the file gives, kept tensors and scales once each.

    Raises:
        InputError: a directory without a safetensors file.
        FormatError: a file, or a directory's index or config.json, breaks a rule of FORMAT.md.
        OSError: a file cannot be read.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        threads: int | None = None,
        max_elements: int | None = None,
        components: bool = True,
        without: Path | None = None,
        tree: ModelTree | None = None,
        verify: bool = True,
    ) -> None:
        self.verify = verify
        self._intact: set[str] = set()
        self.path = Path(path)
        self.max_elements = max_elements
        self.containers: list[Container] = []
        self._pool = ThreadPool(threads)
        self._where: dict[str, Container] = {}
        self._infos: dict[str, TensorInfo] = {}
        try:
            self.tree = ModelTree(self.path, components=components, without=without) if tree is None else tree
            for file in self.tree.weight_files:
                file.container.rename(file.names)
                self.containers.append(file.container)
                self._where |= dict.fromkeys(file.names.values(), file.container)
        except BaseException:
            self.close()
            raise

    @property
    def _executor(self) -> ThreadPoolExecutor:
        return self._pool.executor

    def keys(self) -> list[str]:
        """Names of all tensors, as in the original model."""
        return sorted(self._where)

    def main_keys(self) -> list[str]:
        """Names of the tensors of each folder's model: without other sets of weights and copies that do not count."""
        return sorted(
            file.set_prefix + own
            for file in self.tree.weight_files
            if file.reason is None
            for own, name in file.names.items()
            if name == file.set_prefix + own
        )

    def other_sets(self) -> list[str]:
        """What ``main_keys`` leaves out, by the prefix of its tensors' names without the last slash."""
        main = set(self.main_keys())
        own = {n: o for file in self.tree.weight_files for o, n in file.names.items()}
        return sorted({name.removesuffix(f"/{own[name]}") for name in self._where if name not in main})

    def __contains__(self, name: object) -> bool:
        return name in self._where

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self._where)

    def container(self, name: str) -> Container:
        """The file that holds a tensor. Raises KeyError for a name that is not there."""
        try:
            return self._where[name]
        except KeyError:
            raise KeyError(f"{self.path} has no tensor {name!r}") from None

    def dtype(self, name: str) -> str:
        """The original dtype of a tensor, as safetensors names it."""
        container = self.container(name)
        return str(container.coded[name]["dtype"]) if name in container.coded else container.tensors[name].dtype

    def info(self, name: str) -> TensorInfo | None:
        """Shape, method, bits and noise of a coded tensor; None for one that is kept as it is."""
        container = self.container(name)
        entry = container.coded.get(name)
        if entry is None:
            return None
        if name not in self._infos:
            self._infos[name] = self._read_info(name, container, entry)
        return self._infos[name]

    def _read_info(self, name: str, container: Container, entry: dict[str, Any]) -> TensorInfo:
        try:
            header = container.blob_header(name)
            self._check_shape(name, entry, header)
        except ValueError as error:
            error.args = (f"{container.path}, tensor {name!r}: {error}",)
            raise
        stored = container.tensors[name + BLOB_SUFFIX].size_bytes
        beside = {suffix: container.tensors.get(name + suffix) for suffix in NUMBER_DTYPES}
        total = stored + sum(numbers.size_bytes for numbers in beside.values() if numbers)

        def number(key: str, largest: float) -> float | None:
            """What the writer measured; None for what nobody can have measured."""
            value = entry.get(key)
            if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= largest:
                return float(value)
            return None

        return TensorInfo(
            name=name,
            shape=tuple(entry["shape"]),
            dtype=entry["dtype"],
            method=entry["method"] if entry.get("method") in METHODS else "unknown",
            layout=header.layout.name,
            bits_per_weight=8 * total / header.num_elements,
            entropy_bits=number("entropy_bits", 64),
            noise_db=number(VARIANCE_NOISE_KEY if VARIANCE_NOISE_KEY in entry else "noise_db", 1000),
            power_noise_db=number("noise_db", 1000),
            outliers=int(number("outliers", header.num_elements) or 0),
            blob_bytes=stored,
            tensor_parallel=int(number(PARALLEL_KEY, 1 << 16) or 1),
            header=header,
            num_scales=0 if (scales := beside[SCALE_SUFFIX]) is None else scales.shape[0],
            has_column_scales=beside[COLUMN_SCALE_SUFFIX] is not None,
            has_row_offsets=beside[ROW_OFFSET_SUFFIX] is not None,
            expected_kl=number(EXPECTED_KL_KEY, 1000),
        )

    def blob(self, name: str) -> Blob:
        """The parsed blob of a coded tensor. Raises KeyError for one that is kept as it is."""
        container = self.container(name)
        if name not in container.coded:
            raise KeyError(f"tensor {name!r} is not coded")
        try:
            for suffix in NUMBER_DTYPES:
                self._check_crc(container, name + suffix)
            blob = Blob(container.data(name + BLOB_SUFFIX))
            self._check_shape(name, container.coded[name], blob.header)
            self._numbers_beside(name, container, blob.header)
            if container.coded[name]["dtype"] in NARROW_DTYPES and blob.tiles["outlier_count"].any():
                raise ContainerMetadataError("outliers in a tensor that is not quantized")
        except ValueError as error:
            error.args = (f"{container.path}, tensor {name!r}: {error}",)
            raise
        return blob

    def coded(self, name: str) -> CodedTensor:
        """A coded tensor with all that stands beside its blob, to be cut into parts for several devices, or stacked.

        Raises:
            KeyError: it is kept as it is.
            FormatError: blob or scales break a rule.
        """
        blob, container = self.blob(name), self.container(name)
        entry = container.coded[name]
        beside = self._numbers_beside(name, container, blob.header)
        shape = tuple(entry["shape"])
        return CodedTensor(
            blob.buffer, beside.scales, str(entry["dtype"]), shape, beside.column_scales, beside.row_offsets
        )

    @staticmethod
    def _check_shape(name: str, entry: dict[str, Any], header: BlobHeader) -> None:
        shape = entry["shape"]
        matrix = (header.cols, header.rows) if header.transposed else (header.rows, header.cols)
        leading = 1
        for size in shape[:-2]:
            leading *= size
        trailing = 1
        for size in shape[1:]:
            trailing *= size
        stacked = len(shape) >= 2 and (header.matrices, *matrix) == (leading, *shape[-2:])
        flat = len(shape) > 2 and (header.matrices, *matrix) == (1, shape[0], trailing)
        if not stacked and not flat:
            raise ContainerMetadataError(
                f"tensor {name!r}: shape {shape} in the metadata, {header.matrices} × {matrix[0]} × {matrix[1]} "
                "in the blob"
            )
        kind, dtype = header.layout.element_kind, entry["dtype"]
        if kind.is_integer:
            quantized = dtype in LOSSY_DTYPES and kind == ElementKind.SIGNED
            fits = quantized or (LOSSLESS_KINDS.get(dtype) == kind and header.layout.element_bits == 8)
        else:
            fits = LOSSLESS_KINDS.get(dtype) == kind
        if not fits:
            raise ContainerMetadataError(f"tensor {name!r}: dtype {dtype} with {kind.name} elements")

    @staticmethod
    def _numbers_beside(name: str, container: Container, header: BlobHeader) -> NumbersBeside:
        """Scales, column scales and row offsets of a coded tensor, if there are as many as the header wants."""
        found = NumbersBeside(container.scales(name), container.column_scales(name), container.row_offsets(name))
        quantized = container.coded[name]["dtype"] not in ("I8", "U8")
        needed = header.layout.element_kind.is_integer and quantized
        if needed != (found.scales is not None):
            raise ScaleError(f"tensor {name!r}: scales are {'missing' if needed else 'not expected'}")
        rows, cols = header.matrices * header.rows, header.matrices * header.cols
        for shown, numbers, legal in (
            ("scales", found.scales, (1, rows)),
            ("column scales", found.column_scales, (cols,)),
            ("row offsets", found.row_offsets, (rows,)),
        ):
            if numbers is None:
                continue
            if not needed:
                raise ScaleError(f"tensor {name!r}: {shown} are not expected")
            if len(numbers) not in legal:
                shape = f"{header.matrices} × {header.rows} rows"
                if shown == "column scales":
                    shape = f"{header.matrices} × {header.cols} columns"
                raise ScaleError(f"tensor {name!r}: {len(numbers)} {shown} for {shape}")
        return found

    def _check_crc(self, container: Container, stored: str, data: memoryview | None = None) -> None:
        if self.verify and stored not in self._intact:
            container.check_crc32(stored, data)
            self._intact.add(stored)

    def _to_shape(self, name: str, array: npt.NDArray[Any], header: BlobHeader) -> npt.NDArray[Any]:
        """[matrices, rows, cols] → the original shape."""
        if header.transposed:
            array = array.swapaxes(1, 2)
        return array.reshape(self.container(name).coded[name]["shape"])

    def _integers(self, name: str, blob: Blob) -> npt.NDArray[Any]:
        try:
            return decode_integers(blob, executor=self._executor, max_elements=self.max_elements)
        except ValueError as error:
            error.args = (f"{self.container(name).path}, tensor {name!r}: {error}",)
            raise

    def stored(self, name: str) -> npt.NDArray[Any]:
        """A kept tensor as it is stored: read-only, in memory of its own.

        Raises:
            TensorCrcError: it is damaged.
        """
        container = self.container(name)
        tensor = container.tensors[name]
        dtype = NUMPY_DTYPES.get(tensor.dtype)
        if dtype is None:
            raise TypeError(f"tensor {name!r}: NumPy has no type for {tensor.dtype}")
        data = container.data(name)
        self._check_crc(container, name, data)
        return np.frombuffer(data, dtype).reshape(tensor.shape)

    def decode(self, name: str) -> npt.NDArray[Any]:
        """The stored numbers, exactly: integers of a quantized tensor, bit patterns of a lossless float one.

        Returns:
            The original shape; i8 or i16 for quantized tensors (outliers included), u8/u16/u32 bit patterns for
            lossless floats, i8/u8 for lossless integers. A tensor kept as it is comes back as stored.
        """
        container = self.container(name)
        if name not in container.coded:
            return self.stored(name)
        blob = self.blob(name)
        return self._to_shape(name, self._integers(name, blob), blob.header)

    def dequantize(self, name: str, dtype: str = "float32") -> npt.NDArray[Any]:
        """Any tensor as numbers of a float dtype, in its original shape.

        Args:
            dtype: ``float32``, ``float16``, ``bfloat16``, ``float64``, or ``original`` for the tensor's own.
        """
        container = self.container(name)
        entry = container.coded.get(name)
        own = container.tensors[name].dtype if entry is None else str(entry["dtype"])
        if dtype != "original" and dtype not in FLOAT_NAMES:
            raise ValueError(f"dtype is {dtype!r}; there are {', '.join(FLOAT_NAMES)} and original")
        target = NUMPY_DTYPES.get(own if dtype == "original" else FLOAT_NAMES[dtype])
        if target is None:
            raise TypeError(f"tensor {name!r}: NumPy has no type for {own}")
        if entry is None:
            with np.errstate(over="ignore", invalid="ignore"):
                return self.stored(name).astype(target, copy=False)
        blob = self.blob(name)
        integers = self._integers(name, blob)
        beside = self._numbers_beside(name, container, blob.header)
        if beside.scales is None:
            values = integers
            if not blob.header.layout.element_kind.is_integer:
                values = integers.view(NUMPY_DTYPES[own])
        else:
            header = blob.header
            by_row = np.broadcast_to(beside.scales, header.matrices * header.rows)
            values = integers.astype(np.float32)
            with np.errstate(over="ignore", invalid="ignore"):
                values *= by_row.reshape(header.matrices, header.rows, 1)
                if beside.row_offsets is not None:
                    values += beside.row_offsets.reshape(header.matrices, header.rows, 1)
                if beside.column_scales is not None:
                    values *= beside.column_scales.astype(np.float32).reshape(header.matrices, 1, header.cols)
        with np.errstate(over="ignore", invalid="ignore"):  # fp32 → fp16 may overflow to inf, as IEEE says
            values = values.astype(target, copy=False)
        return self._to_shape(name, values, blob.header)

    def close(self) -> None:
        """Close the files. Arrays handed out stay valid."""
        self._pool.close()
        for container in self.containers:
            container.close()
