"""A coded tensor in a device's memory: what kernels compute on, and the CPU path with the same results."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch

from kvpack.encode.rans import decoder_table
from kvpack.errors import LaneStateError, ScaleError
from kvpack.format.blob import Blob
from kvpack.format.container import (
    COLUMN_SCALE_SUFFIX,
    ROW_OFFSET_SUFFIX,
    SCALE_SUFFIX,
    first_illegal,
    shown_numbers,
)
from kvpack.format.header import BlobHeader
from kvpack.format.layout import ElementKind, Predictor
from kvpack.runtime.codec.group_table import group_table, max_group_words
from kvpack.runtime.device import semaphores
from kvpack.runtime.device.devices import device_limits
from kvpack.runtime.device.kernels import require_device
from kvpack.runtime.weights import grouped, ops, products
from kvpack.runtime.weights.products import FLOAT_TYPES, LOSSLESS_TYPES

# A lane of a damaged blob reads at most a word a step (2048) and one ahead, a raw element at most 8 bytes behind its
# tile.
SLACK_BYTES = 4608


def check_scales(scales: npt.NDArray[np.float32], header: BlobHeader) -> None:
    """Raises ScaleError unless there are as many scales as FORMAT.md §8 says, all of them legal."""
    quantized = header.layout.element_kind == ElementKind.SIGNED
    if len(scales) not in ((0, 1, header.matrices * header.rows) if quantized else (0,)):
        raise ScaleError(f"{len(scales)} scales for {header.matrices} × {header.rows} rows")
    _check_legal(SCALE_SUFFIX, scales)


def check_vectors(
    column_scales: npt.NDArray[np.float16] | None, row_offsets: npt.NDArray[np.float32] | None, header: BlobHeader
) -> None:
    """Raises ScaleError unless they are of the types and as many as FORMAT.md §8 says, all of them legal."""
    quantized = header.layout.element_kind == ElementKind.SIGNED
    for suffix, numbers, dtype, count in (
        (COLUMN_SCALE_SUFFIX, column_scales, np.float16, header.matrices * header.cols),
        (ROW_OFFSET_SUFFIX, row_offsets, np.float32, header.matrices * header.rows),
    ):
        if numbers is None:
            continue
        if not quantized or numbers.dtype != dtype or numbers.shape != (count,):
            raise ScaleError(
                f"{shown_numbers(suffix)}s are {numbers.dtype} {list(numbers.shape)} for {header.matrices} × "
                f"{header.rows} × {header.cols} {header.layout.element_kind.name} elements"
            )
        _check_legal(suffix, numbers)


def _check_legal(suffix: str, numbers: npt.NDArray[Any]) -> None:
    at = first_illegal(suffix, numbers)
    if at is not None:
        raise ScaleError(f"{shown_numbers(suffix)} {at} is {numbers[at]}")


class DeviceBlob:
    """One coded tensor on a device.

    Attributes:
        header: of the blob.
        dtype: of the original tensor; shape: its shape.
        blob: u8 [blob_bytes + slack]: the blob as FORMAT.md §2 has it, then zeros.
        scales: f32 [0], [1] or [matrices · rows].
        column_scales: f16 [matrices · cols], or None.
        row_offsets: f32 [matrices · rows], or None.
        groups, tables, status: what kernels look up (:class:`kvpack.runtime.weights.products.Coded`); empty on the CPU.
        geometry: all numbers that an operator needs, see :mod:`kvpack.runtime.weights.ops`.
    """

    def __init__(
        self,
        blob: torch.Tensor,
        scales: torch.Tensor,
        dtype: torch.dtype,
        shape: tuple[int, ...],
        host: memoryview,
        column_scales: torch.Tensor | None = None,
        row_offsets: torch.Tensor | None = None,
    ) -> None:
        device = blob.device
        parsed = Blob(host)
        self.header = parsed.header
        self.dtype, self.shape = dtype, tuple(shape)
        self.blob = blob
        self.blob_bytes = len(host)
        if len(blob) < self.blob_bytes + SLACK_BYTES:
            raise ValueError(
                f"a buffer of {len(blob)} bytes for a blob of {self.blob_bytes} and {SLACK_BYTES} of slack"
            )
        if math.prod(self.shape) != self.header.num_elements:
            raise ValueError(f"shape {self.shape} for {self.header.num_elements} elements")
        check_scales(scales.numpy(force=True), self.header)
        # Each call of torch gives the GIL up, for which a loader's threads wait: there are no more of them than needed.
        self.scales = scales if scales.device == device else scales.to(device)
        self.column_scales = None if column_scales is None else column_scales.to(device)
        self.row_offsets = None if row_offsets is None else row_offsets.to(device)
        columns, offsets = (None if v is None else v.numpy(force=True) for v in (column_scales, row_offsets))
        check_vectors(columns, offsets, self.header)
        if not len(scales) and not (column_scales is row_offsets is None):
            raise ScaleError("column scales or row offsets, and no scales")
        self._numbers = self.scales
        if column_scales is not None or row_offsets is not None:
            vectors = (self.scales, self.row_offsets, self.column_scales)
            self._numbers = torch.cat([vector.to(torch.float32) for vector in vectors if vector is not None])
        words = 0
        self.groups = torch.empty((0, 4), dtype=torch.int32, device=device)
        self.tables = torch.empty((0, 4096), dtype=torch.int32, device=device)
        if device.type == "cuda":
            require_device(device)
            semaphores.prepare(device)
            groups = group_table(parsed)
            words = max_group_words(groups)
            products.check_fits(self.header, words, device_limits(device))
            self.groups = torch.from_numpy(groups.view(np.int32)).to(device)
            if parsed.tables:
                tables = np.stack([decoder_table(table) for table in parsed.tables])
                self.tables = torch.from_numpy(tables.view(np.int32)).to(device)
        self.status = torch.zeros(2, dtype=torch.int32, device=device)
        self.has_outliers = bool(parsed.tiles["outlier_count"].any())
        predicted = bool((parsed.tiles["predictor"] == Predictor.PREVIOUS).any())
        self._matrices: torch.Tensor | None = None
        self.geometry = ops.pack_geometry(
            self.header,
            self.blob_bytes,
            words,
            predicted,
            self.has_outliers,
            self.row_offsets is not None,
            self.column_scales is not None,
        )

    @classmethod
    def from_bytes(
        cls,
        data: memoryview | bytes,
        scales: npt.NDArray[np.float32] | None,
        dtype: torch.dtype,
        shape: tuple[int, ...],
        device: torch.device | str,
        *,
        column_scales: npt.NDArray[np.float16] | None = None,
        row_offsets: npt.NDArray[np.float32] | None = None,
    ) -> Self:
        """Copy a blob to a device.

        Raises:
            BlobError, ScaleError: the blob or its scales break a rule of FORMAT.md.
            DeviceError: the device cannot be used, or its shared memory is too small for the blob's tiles.
        """
        view = memoryview(data).cast("B")
        host = np.zeros(len(view) + SLACK_BYTES, np.uint8)
        host[: len(view)] = np.frombuffer(view, np.uint8)
        numbers = np.empty(0, np.float32) if scales is None else np.array(scales, np.float32)
        target = torch.device(device)
        if target.type == "cuda":
            require_device(target)
        return cls(
            torch.from_numpy(host).to(target),
            torch.from_numpy(numbers),
            dtype,
            shape,
            host.data[: len(view)],
            *(None if vector is None else torch.from_numpy(vector.copy()) for vector in (column_scales, row_offsets)),
        )

    @classmethod
    def from_buffer(
        cls,
        blob: torch.Tensor,
        scales: torch.Tensor,
        dtype: torch.dtype,
        shape: tuple[int, ...],
        *,
        host: memoryview | None = None,
        column_scales: torch.Tensor | None = None,
        row_offsets: torch.Tensor | None = None,
    ) -> Self:
        """Take over a buffer that holds a blob and :data:`SLACK_BYTES` of zeros.

        Args:
            host: the same bytes in the host's memory, if they are at hand (else they are copied back once).
        """
        if host is None:
            host = blob[:-SLACK_BYTES].cpu().numpy().data
        return cls(blob, scales, dtype, shape, host, column_scales, row_offsets)

    @property
    def device(self) -> torch.device:
        return self.blob.device

    @property
    def nbytes(self) -> int:
        """All bytes on the device: blob, slack, scales and what kernels look up."""
        parts = {id(part): part for part in (self.blob, self._numbers, self.groups, self.tables, self.status)}
        parts |= {id(part): part for part in (self.scales, self.column_scales, self.row_offsets) if part is not None}
        return sum(part.numel() * part.element_size() for part in parts.values())

    @property
    def number_bytes(self) -> int:
        """What stands beside the blob in a file: scales, column scales, row offsets."""
        return sum(
            part.numel() * part.element_size()
            for part in (self.scales, self.column_scales, self.row_offsets)
            if part is not None
        )

    def __repr__(self) -> str:
        bits = 8 * (self.blob_bytes + self.number_bytes) / self.header.num_elements
        layout = self.header.layout
        return (
            f"DeviceBlob({list(self.shape)}, {str(self.dtype).removeprefix('torch.')}, {layout.name} "
            f"{layout.element_bits}-bit, {bits:.3f} bits a weight, device='{self.device}')"
        )

    def to(self, device: torch.device | str) -> DeviceBlob:
        """The same tensor on another device; self if it is there already."""
        target = torch.device(device)
        if target.type == "cuda":
            target = torch.device("cuda", torch.cuda.current_device() if target.index is None else target.index)
        if target == self.device:
            return self
        host = self.blob[: self.blob_bytes].cpu().numpy().data
        return DeviceBlob(
            self.blob.to(target), self.scales, self.dtype, self.shape, host, self.column_scales, self.row_offsets
        )

    def _arguments(self) -> tuple[Any, ...]:
        return self.blob, self.groups, self.tables, self._numbers, self.status, self.geometry

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x · Wᵀ (+ bias), W = the dequantized matrix, outputs × inputs.

        Args:
            x: [..., inputs], fp16, bf16 or fp32.
            bias: [outputs] of x's type.

        Returns:
            [..., outputs] of x's type.
        """
        return torch.ops.kvpack.linear(x, *self._arguments(), bias)  # type: ignore[no-any-return]

    def product(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """As :meth:`linear`, for what is an operator itself: torch is not asked again, and there are no gradients."""
        multiply: Callable[..., torch.Tensor] = ops.linear_cuda if self.device.type == "cuda" else ops.linear_cpu
        return multiply(x, *self._arguments(), bias)

    def grouped_linear(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Products of rows with some of the blob's matrices, as of a mixture of experts: in one launch on CUDA.

        Which matrices are asked for is not looked at by the host: the call can be captured in a CUDA graph. (Where ids
        choose large matrices more than 64 times on average, and outside of a capture, it is.) No gradients.

        Args:
            x: [tokens, inputs], or [tokens, top_k, inputs] with a row for each id; fp16, bf16 or fp32.
            ids: i64 [tokens, top_k]: the number of a matrix.

        Returns:
            [tokens, top_k, outputs] of x's type: row · Wᵀ of the matrix that each id names. On CUDA, rows whose id
            names none are 0.

        Raises:
            InputError: shapes or types are others; on the CPU, an id that names no matrix.
        """
        if self._matrices is None:
            coded = ops._coded(*self._arguments())
            self._matrices = torch.from_numpy(grouped.blob_matrices(coded)).to(self.device)
        arguments = (*self._arguments(), self._matrices, len(self.tables))
        return torch.ops.kvpack.grouped_linear(x, ids, *arguments)  # type: ignore[no-any-return]

    def rows(self, ids: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Some rows of a quantized matrix, as an embedding looks them up: only what they need is decoded.

        The host does not look at the ids on CUDA: the call can be captured in a CUDA graph. No gradients.

        Args:
            ids: i64 or i32 [...], numbers of rows.
            dtype: fp16, bf16 or fp32 (default: the original's).

        Returns:
            [..., columns]. On CUDA, rows of ids that name none are 0.

        Raises:
            InputError: ids of another type or device; on the CPU, an id that names no row.
            TypeError: a tensor that is not quantized, or another dtype.
        """
        return torch.ops.kvpack.rows(ids, *self._arguments(), dtype or self.dtype)  # type: ignore[no-any-return]

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The tensor as numbers, in its original shape.

        Args:
            dtype: of a quantized tensor: fp16, bf16 or fp32 (default: the original's). Lossless tensors are
                converted from their own.
        """
        wanted = self.dtype if dtype is None else dtype
        if len(self.scales):
            if wanted not in FLOAT_TYPES:
                wanted = torch.float32
            values: torch.Tensor = torch.ops.kvpack.dequantize(*self._arguments(), wanted)
            wanted = self.dtype if dtype is None else dtype
        else:
            values = torch.ops.kvpack.numbers(*self._arguments())
            if not self.header.layout.element_kind.is_integer:
                values = values.view(LOSSLESS_TYPES[self.header.layout.element_kind])
        values = values.to(wanted)
        if self.header.transposed:
            values = values.swapaxes(1, 2)
        return values.reshape(self.shape)

    def integers(self) -> torch.Tensor:
        """What the blob holds, [matrices, rows, cols]: i8 (i16 with outliers), u8, or bit patterns of floats.

        Bit patterns of 16 and 32 bits come as i16 and i32: torch does little with unsigned ones.
        """
        return torch.ops.kvpack.numbers(*self._arguments())  # type: ignore[no-any-return]

    def check_lanes(self) -> None:
        """Decode every lane to nowhere and wait for the result.

        Raises:
            LaneStateError: a lane does not end in its initial state.
        """
        if self.device.type == "cpu":
            self.integers()
            return
        torch.ops.kvpack.check_lanes(*self._arguments())
        self.check()

    def check(self) -> None:
        """Ask whether any kernel so far met a corrupt lane; waits for the device.

        Raises:
            LaneStateError
        """
        count, where = self.status.tolist()
        if count:
            index = ~where & 0xFFFFFFFF
            tile_column = index % self.header.num_tiles_col
            raise LaneStateError(
                f"{count & 0xFFFFFFFF} lanes did not end in the initial state, the first in row group "
                f"{index // self.header.num_tiles_col}, tile column {tile_column}: the blob is corrupt, or was "
                "overwritten"
            )
