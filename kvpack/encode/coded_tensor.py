"""A coded tensor in memory, blob and scales: what of it a device of several takes, and several as one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from kvpack.encode.blob_encoder import even_tile_cols
from kvpack.encode.retiling import retile
from kvpack.encode.slicing import slice_columns, slice_matrices, slice_rows, stack_rows
from kvpack.encode.tensor_parallel import Split, reason_not_to_split
from kvpack.errors import GeometryError
from kvpack.format.blob import Blob
from kvpack.format.header import BlobHeader


def _matrix_shape(header: BlobHeader) -> tuple[int, int]:
    return (header.cols, header.rows) if header.transposed else (header.rows, header.cols)


@dataclass(frozen=True)
class CodedTensor:
    """A coded tensor: what :meth:`kvpack.Reader.coded` gives, and its parts.

    Attributes:
        blob: the bytes of docs/FORMAT.md §2.
        scales: f32 [1] or [matrices · outputs]; None for lossless tensors.
        dtype: of the numbers, as safetensors names it.
        shape: of the tensor.
        column_scales: f16 [matrices · inputs], or None; row_offsets: f32 [matrices · outputs], or None.

    Example::

        with kvpack.open("model.kvpack.safetensors") as reader:
            q, k, v = (reader.coded(f"{layer}.{name}_proj.weight").part("outputs", rank, 8) for name in "qkv")
            down = reader.coded(f"{mlp}.down_proj.weight").part("inputs", rank, 8)
        qkv = CodedTensor.stack([q, k, v])
        layer = RansLinear(DeviceBlob.from_bytes(qkv.blob, qkv.scales, torch.bfloat16, qkv.shape, "cuda"))
    """

    blob: bytes | memoryview
    scales: npt.NDArray[np.float32] | None
    dtype: str
    shape: tuple[int, ...]
    column_scales: npt.NDArray[np.float16] | None = None
    row_offsets: npt.NDArray[np.float32] | None = None

    @property
    def header(self) -> BlobHeader:
        return BlobHeader.parse(memoryview(self.blob))

    def _with(self, blob: bytes, **vectors: Any) -> CodedTensor:
        header, before = BlobHeader.parse(memoryview(blob)), self.header
        leading = self.shape[:-2]
        if (math.prod(leading), *self.shape[-2:]) != (before.matrices, *_matrix_shape(before)):
            leading = ()  # one matrix of the first dimension × the others
        elif header.matrices != before.matrices:
            leading = (header.matrices,)
        return replace(self, blob=blob, shape=(*leading, *_matrix_shape(header)), **vectors)

    def _cut(self, vector: npt.NDArray[Any] | None, size: int, matrices: slice, part: slice) -> Any:
        """Some of a vector [matrices · size]; all of one that is a single number, or none."""
        if vector is None or len(vector) == 1:
            return vector
        return vector.reshape(-1, size)[matrices, part].ravel()

    def outputs(self, first: int, stop: int) -> CodedTensor:
        """Outputs ``first`` … ``stop`` − 1 (of each matrix), with their scales: multiples of 32, or the end.

        Raises:
            GeometryError: other borders, with the nearest that are legal.
            BlobError: the blob is damaged.
        """
        blob, rows, part = slice_rows(self.blob, first, stop), self.header.rows, slice(first, stop)
        return self._with(
            blob,
            scales=self._cut(self.scales, rows, slice(None), part),
            row_offsets=self._cut(self.row_offsets, rows, slice(None), part),
        )

    def inputs(self, first: int, stop: int) -> CodedTensor:
        """Inputs ``first`` … ``stop`` − 1, with their scales: multiples of the blob's ``tile_cols``, or the end.

        Row offsets stay in each part; it adds them times the sum of its own activations.

        Raises:
            GeometryError: other borders, with the nearest that are legal.
            BlobError: the blob is damaged.
        """
        blob, cols = slice_columns(self.blob, first, stop), self.header.cols
        return self._with(blob, column_scales=self._cut(self.column_scales, cols, slice(None), slice(first, stop)))

    def matrices(self, first: int, stop: int, step: int = 1) -> CodedTensor:
        """Matrices ``first`` … ``stop`` − 1 of a tensor of 3 or more dimensions, as experts of a device.

        Args:
            step: from one to the next: experts may be dealt to devices in turn.

        Raises:
            GeometryError: there are no such matrices.
            BlobError: the blob is damaged.
        """
        blob, header, part = slice_matrices(self.blob, first, stop, step), self.header, slice(first, stop, step)
        return self._with(
            blob,
            scales=self._cut(self.scales, header.rows, part, slice(None)),
            row_offsets=self._cut(self.row_offsets, header.rows, part, slice(None)),
            column_scales=self._cut(self.column_scales, header.cols, part, slice(None)),
        )

    def part(self, split: Literal["outputs", "inputs"], number: int, parts: int) -> CodedTensor:
        """Part ``number`` (0 … ``parts`` − 1) of so many equal ones.

        Raises:
            GeometryError: the outputs or inputs are no multiple of ``parts``, or the borders are not legal; ``kvpack
                compress --tensor-parallel N`` makes those of inputs so, :meth:`for_parts` at any time.
            BlobError: the blob is damaged.
        """
        if split not in ("outputs", "inputs"):
            raise ValueError(f"split {split!r}: there are outputs and inputs")
        size = self.header.rows if split == "outputs" else self.header.cols
        if not 0 <= number < parts:
            raise GeometryError(f"part {number} of {parts}: there is no such part, they are numbered from 0")
        if size % parts:
            raise GeometryError(f"part {number} of {parts}: {size} {split} are no multiple of {parts}")
        first = size // parts * number
        if split == "outputs":
            return self.outputs(first, first + size // parts)
        try:
            return self.inputs(first, first + size // parts)
        except GeometryError as error:
            if reason_not_to_split(Split.INPUTS, self.header.rows, size, None, parts) is not None:
                raise
            fitting = f"for_parts({parts}) and `kvpack compress --tensor-parallel {parts}` make tiles that fit"
            raise GeometryError(f"{error}; {fitting}") from None

    def for_parts(self, parts: int) -> CodedTensor:
        """The same numbers in tiles that end where ``parts`` parts of the inputs do; itself if they do.

        For files that were made without ``--tensor-parallel``: the tensor is decoded, and coded again.

        Raises:
            GeometryError: no such tiles are possible, and why.
            BlobError: the blob is damaged.
        """
        header = self.header
        reason = reason_not_to_split(Split.INPUTS, header.rows, header.cols, None, parts)
        if reason is not None:
            raise GeometryError(f"{parts} parts of the inputs: {reason}")
        if header.cols // parts % header.tile_cols == 0:
            return self
        tile_cols = even_tile_cols(header.rows, header.cols, header.layout, parts)
        return replace(self, blob=retile(Blob(self.blob), tile_cols))

    @classmethod
    def stack(cls, tensors: Sequence[CodedTensor]) -> CodedTensor:
        """Tensors one above the other (in each matrix), as layers whose outputs are computed at once.

        Outputs come in the order of the tensors. There is a scale for each of them, unless all have the same single
        one; column scales must be the same. A product's numbers are those of the single ones, bit for bit on the CPU.

        Raises:
            GeometryError: blobs that cannot be stacked (:func:`kvpack.encode.slicing.stack_rows`), unlike dtypes, or
                unlike column scales.
            TableError: more than 16 tables together.
            BlobError: a blob is damaged.
        """
        blob = stack_rows([tensor.blob for tensor in tensors])
        one = tensors[0]
        for number, tensor in enumerate(tensors):
            if tensor.dtype != one.dtype or (tensor.scales is None) != (one.scales is None):
                raise GeometryError(
                    f"tensor {number} cannot be stacked: its dtype is {tensor.dtype}, that of tensor 0 {one.dtype}, or "
                    "only one of them has scales"
                )
            if not _equal(tensor.column_scales, one.column_scales):
                raise GeometryError(f"tensor {number} cannot be stacked: its column scales are not those of tensor 0")
        single = all(tensor.scales is None or len(tensor.scales) == 1 for tensor in tensors)
        alike = single and all(_equal(tensor.scales, one.scales) for tensor in tensors)
        return one._with(
            blob,
            scales=one.scales if alike else _stacked([(t.header, t.scales) for t in tensors]),
            row_offsets=None
            if all(tensor.row_offsets is None for tensor in tensors)
            else _stacked([(t.header, t.row_offsets) for t in tensors]),
        )


def _equal(one: npt.NDArray[Any] | None, other: npt.NDArray[Any] | None) -> bool:
    return one is other if one is None or other is None else np.array_equal(one, other)


def _stacked(vectors: Sequence[tuple[BlobHeader, npt.NDArray[np.float32] | None]]) -> npt.NDArray[np.float32]:
    """A number for each row of the stack, from vectors of each row, of one number, or of none: zeros."""
    by_row = []
    for header, vector in vectors:
        shape = header.matrices, header.rows
        numbers = np.zeros(1, np.float32) if vector is None else vector
        by_row.append(np.broadcast_to(numbers, shape) if len(numbers) == 1 else numbers.reshape(shape))
    return np.concatenate(by_row, axis=1).ravel()
