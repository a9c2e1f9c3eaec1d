"""What vLLM's loader brings of a layer's coded tensors, and what a rank takes of them.

vLLM finds parameters by their names and calls their ``weight_loader`` with a tensor and the number of a shard ("q",
"k", "v", 0, 1, …, none). Coded tensors have lengths of their own: the layer gets empty parameters of the file's names,
whose loader keeps what it is given. That is a view of the file in memory, of which nothing has been read yet. A rank
reads what it needs: headers, and the tiles of its own rows or columns.
"""

from __future__ import annotations

import copy
import ctypes
import logging
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from kvpack.encode.coded_tensor import CodedTensor
from kvpack.errors import ModelMismatchError, NotSupportedError
from kvpack.format.blob import Blob, check_tile_bytes
from kvpack.format.container import BLOB_SUFFIX, COLUMN_SCALE_SUFFIX, NUMBER_DTYPES, ROW_OFFSET_SUFFIX, SCALE_SUFFIX
from kvpack.format.header import HEADER_BYTES, BlobHeader
from kvpack.format.layout import GROUP_LANES, TILE_ROWS, ElementKind, align
from kvpack.format.tile_crc import check_tiles
from kvpack.runtime.weights.device_blob import check_scales, check_vectors
from kvpack.runtime.weights.load import TORCH_DTYPES, coded_on_device

# Below vLLM's own logger: its format and its level are those of vLLM.
_logger = logging.getLogger(f"vllm.{__name__}")
_told: set[tuple[int, int, int]] = set()

# The name of a shard's numbers → safetensors' name of its type.
_DTYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
_KINDS = {ElementKind.BF16: "BF16", ElementKind.FP16: "F16", ElementKind.FP32: "F32"}

_PART_TYPES = {BLOB_SUFFIX: torch.uint8} | {suffix: TORCH_DTYPES[name] for suffix, name in NUMBER_DTYPES.items()}

Shard = Any  # "q", "k", "v", an int, a tuple of ints, or None


@dataclass(frozen=True)
class Part:
    """A rank's part of a coded tensor, as it is multiplied.

    Attributes:
        coded: whole groups of 32 rows that have the part's, of each matrix.
        first, rows: which of its rows are the part's.
    """

    coded: CodedTensor
    first: int
    rows: int

    @property
    def is_whole(self) -> bool:
        return self.rows == self.coded.header.rows

    def matrix(self, number: int) -> Part:
        """One of several matrices."""
        coded = self.coded.matrices(number, number + 1)
        return replace(self, coded=replace(coded, shape=coded.shape[-2:]))


@dataclass
class Arrivals:
    """Of a layer: shard → suffix of the file's name → tensor, as they have come.

    Args:
        name: of the layer, for messages.
        dtype: of the layer's numbers.
    """

    name: str
    dtype: torch.dtype
    tensors: dict[Shard, dict[str, torch.Tensor]] = field(default_factory=dict)

    def expect(self, layer: nn.Module, stem: str, loader: Any) -> None:
        """Give a layer the empty parameters by which vLLM's loader finds it.

        Args:
            stem: the weight's name in the layer; loader: called as (suffix, tensor, whatever vLLM says of it).
        """
        for suffix, dtype in _PART_TYPES.items():

            def keep(param: Any, loaded_weight: torch.Tensor, *said: Any, _suffix: str = suffix, **more: Any) -> Any:
                return loader(_suffix, loaded_weight, *said, **more)

            parameter = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
            parameter.weight_loader = keep  # type: ignore[attr-defined]
            layer.register_parameter(stem + suffix, parameter)

    def forget(self, layer: nn.Module, stem: str) -> None:
        """Take away what :meth:`expect` gave."""
        for suffix in _PART_TYPES:
            delattr(layer, stem + suffix)
        self.tensors.clear()

    def keep(self, suffix: str, tensor: torch.Tensor, shard: Shard = None) -> None:
        """Called by a parameter of :meth:`expect`."""
        own = self.tensors.setdefault(shard, {})
        if suffix in own:
            raise ModelMismatchError(f"{self.name}: the checkpoint has {shard or 'its weight'} ({suffix}) twice")
        own[suffix] = tensor.detach()

    def shard(self, shard: Shard) -> ArrivedTensor:
        """What has come of a shard.

        Raises:
            ModelMismatchError: nothing has, or no blob.
        """
        own = self.tensors.get(shard, {})
        if BLOB_SUFFIX not in own:
            raise ModelMismatchError(
                f"{self.name}: vLLM has brought no coded weight{'' if shard is None else f' of shard {shard!r}'}: the "
                "checkpoint lacks it, or vLLM's class of this model takes weights under other names"
            )
        return ArrivedTensor(self.name, own, self.dtype)


class ArrivedTensor:
    """One coded tensor, of which nothing but the header has been read."""

    def __init__(self, name: str, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
        self.name, self._dtype = name, dtype
        self._bytes = _host_bytes(tensors[BLOB_SUFFIX])
        numbers = [tensors.get(suffix) for suffix in (SCALE_SUFFIX, COLUMN_SCALE_SUFFIX, ROW_OFFSET_SUFFIX)]
        read_ahead(self._bytes[:HEADER_BYTES])
        with self._named():
            header = BlobHeader.parse(self._bytes[:HEADER_BYTES])
            read_ahead(self._bytes[: header.payload_offset])
            self.blob = Blob(self._bytes)
            self.header = header
            self._own = range(header.matrices)
            self._scales, self._column_scales, self._row_offsets = (
                None if tensor is None else tensor.cpu().numpy() for tensor in numbers
            )
            check_scales(np.empty(0, np.float32) if self._scales is None else self._scales, header)
            check_vectors(self._column_scales, self._row_offsets, header)
        kind = header.layout.element_kind
        if kind not in _KINDS and kind != ElementKind.SIGNED:
            raise ModelMismatchError(
                f"{name}: the original's weights are quantized themselves ({kind.name}); kvpack decompress gives them "
                "back, for vLLM to load with their own method"
            )

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Errors say which layer they are about."""
        try:
            yield
        except ValueError as error:
            error.args = (f"{self.name}: {error}",)
            raise

    def _coded(self) -> CodedTensor:
        header, own = self.header, self._own
        shape = (header.cols, header.rows) if header.transposed else (header.rows, header.cols)
        coded = CodedTensor(
            self._bytes,
            self._scales,
            _KINDS.get(header.layout.element_kind, _DTYPES[self._dtype]),
            shape if header.matrices == 1 else (header.matrices, *shape),
            self._column_scales,
            self._row_offsets,
        )
        return coded if len(own) == header.matrices else coded.matrices(own.start, own.stop, own.step)

    def matrices(self, own: range) -> ArrivedTensor:
        """Some of its matrices, as experts of a rank: of the others nothing is read."""
        found = copy.copy(self)
        found._own = own
        return found

    def check_shape(self, outputs: int, inputs: int, matrices: int = 1) -> None:
        """Compare the shape of all of it with what the model has.

        Raises:
            NotSupportedError: matrices of inputs × outputs that are coded as if they were outputs × inputs.
            ModelMismatchError: another shape.
        """
        header = self.header
        found, wanted = (header.matrices, header.rows, header.cols), (matrices, outputs, inputs)
        if found == wanted:
            return
        if matrices > 1 and found == (matrices, inputs, outputs):
            raise NotSupportedError(
                f"{self.name}: {matrices} matrices of {inputs} inputs × {outputs} outputs; vLLM can have coded experts "
                "of one tensor as outputs × inputs alone; kvpack decompress gives the plain model back"
            )
        shown = [f"{many} × " if many > 1 else "" for many in (header.matrices, matrices)]
        raise ModelMismatchError(
            f"{self.name}: {shown[0]}{header.rows} outputs × {header.cols} inputs in the checkpoint, "
            f"{shown[1]}{outputs} × {inputs} in the model"
        )

    def whole(self) -> CodedTensor:
        """All of it, read and compared with its CRCs."""
        self._check(0, self.header.num_tiles_row, 0, self.header.num_tiles_col)
        return self._coded()

    def outputs(self, first: int, stop: int) -> Part:
        """Rows ``first`` … ``stop`` − 1, of which at most 31 on either side are read beyond.

        Raises:
            ModelMismatchError: there are no such rows.
            BlobError: what is read of it is damaged.
        """
        rows = self.header.rows
        if not 0 <= first < stop <= rows:
            raise ModelMismatchError(f"{self.name}: rows {first} to {stop} of {rows} are asked for")
        if first == 0 and stop == rows:
            return Part(self.whole(), 0, rows)
        begin, end = first // GROUP_LANES * GROUP_LANES, min(align(stop, GROUP_LANES), rows)
        self._check(begin // TILE_ROWS, -(-end // TILE_ROWS), 0, self.header.num_tiles_col)
        return Part(self._coded().outputs(begin, end), first - begin, stop - first)

    def inputs(self, number: int, parts: int) -> Part:
        """Part ``number`` of so many equal ones of the columns.

        Where tiles do not end at the borders, all of the tensor is read, decoded and coded again: the same numbers.

        Raises:
            GeometryError: no tiles end there.
            BlobError: what is read of it is damaged.
        """
        header = self.header
        if parts == 1:
            return Part(self.whole(), 0, header.rows)
        size = header.cols // parts
        if header.cols % parts == 0 and size % header.tile_cols == 0:
            first = size * number
            self._check(0, header.num_tiles_row, first // header.tile_cols, (first + size) // header.tile_cols)
            coded = self._coded()
        else:
            self._tell_of_coding_again(parts)
            with self._named():
                coded = self.whole().for_parts(parts)
        return Part(coded.part("inputs", number, parts), 0, header.rows)

    def _tell_of_coding_again(self, parts: int) -> None:
        """Once for tensors of one shape."""
        header = self.header
        kind = header.cols, header.tile_cols, parts
        if kind not in _told:
            _told.add(kind)
            _logger.warning(
                "kvpack: tiles of %d columns do not divide %d parts of %d inputs: such tensors are read whole and "
                "coded again, losslessly, by each rank; `kvpack compress --tensor-parallel %d` makes tiles that do",
                header.tile_cols,
                parts,
                header.cols,
                parts,
            )

    def _check(self, first_row: int, stop_row: int, first_col: int, stop_col: int) -> None:
        """Read tiles and compare them with their CRCs; numbers of tile rows and columns."""
        payload = self.blob.payload
        for begin, count in self._runs(first_row, stop_row, first_col, stop_col):
            tiles = self.blob.tiles[begin : begin + count]
            start, stop = int(tiles[0]["data_offset"]), int(tiles[-1]["data_offset"]) + int(tiles[-1]["data_size"])
            read_ahead(payload[start:stop])
        with self._named():
            for begin, count in self._runs(first_row, stop_row, first_col, stop_col):
                if count == 1:
                    check_tile_bytes(payload, self.blob.tiles[begin], f"tile {begin}")
                else:
                    check_tiles(payload, self.blob.tiles[begin : begin + count], begin)

    def _runs(self, first_row: int, stop_row: int, first_col: int, stop_col: int) -> Iterator[tuple[int, int]]:
        """Tiles that lie one behind another: (the first, how many)."""
        width = self.header.num_tiles_col
        for matrix in self._own:
            base = matrix * self.header.num_tiles_row * width
            if (first_col, stop_col) == (0, width):
                yield base + first_row * width, (stop_row - first_row) * width
                continue
            for row in range(first_row, stop_row):
                yield base + row * width + first_col, stop_col - first_col


def stacked(parts: list[Part]) -> list[Part]:
    """Parts one above the other as one, where that can be: they are multiplied in one launch."""
    if len(parts) == 1 or not all(part.is_whole for part in parts):
        return parts
    try:
        coded = CodedTensor.stack([part.coded for part in parts])
    except ValueError:
        return parts
    return [Part(coded, 0, coded.header.rows)]


def dense(part: Part, dtype: torch.dtype) -> torch.Tensor:
    """The numbers of a part of one matrix, [rows, columns], decoded on the CPU."""
    numbers = coded_on_device(part.coded, "cpu").dequantize(dtype)
    if part.coded.header.transposed:
        numbers = numbers.transpose(-1, -2)
    return numbers[part.first : part.first + part.rows]


def _host_bytes(tensor: torch.Tensor) -> memoryview:
    numbers = tensor.cpu().contiguous().view(torch.uint8).numpy()
    return memoryview(numbers.data).toreadonly()


_MADV_RANDOM, _MADV_WILLNEED = 1, 3
_libc = ctypes.CDLL(None, use_errno=True)


def _advise(data: memoryview, advice: int) -> None:
    """Tell the kernel about memory that may be a file's; for other memory, as some loaders bring it, it is nothing."""
    address = np.frombuffer(data, np.uint8).ctypes.data
    begin = address // mmap.PAGESIZE * mmap.PAGESIZE
    length = align(address + len(data), mmap.PAGESIZE) - begin
    _libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(length), advice)


def read_as_asked(data: memoryview) -> None:
    """Read no more of a file than is looked at."""
    _advise(data, _MADV_RANDOM)


def read_ahead(data: memoryview) -> None:
    """Bring bytes of a file into memory, all at once."""
    if len(data):
        _advise(data, _MADV_WILLNEED)
