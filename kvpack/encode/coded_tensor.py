"""A coded tensor in memory, blob and scales: what of it a device of several takes, and several as one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

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

    @property
    def header(self) -> BlobHeader:
        return BlobHeader.parse(memoryview(self.blob))

    def _with(self, blob: bytes, scales: npt.NDArray[np.float32] | None) -> CodedTensor:
        header, before = BlobHeader.parse(memoryview(blob)), self.header
        leading = self.shape[:-2]
        if (math.prod(leading), *self.shape[-2:]) != (before.matrices, *_matrix_shape(before)):
            leading = ()  # one matrix of the first dimension × the others
        elif header.matrices != before.matrices:
            leading = (header.matrices,)
        return CodedTensor(blob, scales, self.dtype, (*leading, *_matrix_shape(header)))

    def outputs(self, first: int, stop: int) -> CodedTensor:
        """Outputs ``first`` … ``stop`` − 1 (of each matrix), with their scales: multiples of 32, or the end.

        Raises:
            GeometryError: other borders, with the nearest that are legal.
            BlobError: the blob is damaged.
        """
        header, scales = self.header, self.scales
        blob = slice_rows(self.blob, first, stop)
        if scales is not None and len(scales) > 1:
            scales = scales.reshape(header.matrices, header.rows)[:, first:stop].ravel()
        return self._with(blob, scales)

    def inputs(self, first: int, stop: int) -> CodedTensor:
        """Inputs ``first`` … ``stop`` − 1: multiples of the blob's ``tile_cols``, or the end. All scales stay.

        Raises:
            GeometryError: other borders, with the nearest that are legal.
            BlobError: the blob is damaged.
        """
        return self._with(slice_columns(self.blob, first, stop), self.scales)

    def matrices(self, first: int, stop: int) -> CodedTensor:
        """Matrices ``first`` … ``stop`` − 1 of a tensor of 3 or more dimensions, as experts of a device.

        Raises:
            GeometryError: there are no such matrices.
            BlobError: the blob is damaged.
        """
        header, scales = self.header, self.scales
        blob = slice_matrices(self.blob, first, stop)
        if scales is not None and len(scales) > 1:
            scales = scales[first * header.rows : stop * header.rows]
        return self._with(blob, scales)

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
        if not 0 <= number < parts or size % parts:
            raise GeometryError(f"part {number} of {parts}: {size} {split} are no multiple, or there is no such part")
        first = size // parts * number
        if split == "outputs":
            return self.outputs(first, first + size // parts)
        return self.inputs(first, first + size // parts)

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
        one. A product's numbers are those of the single ones, bit for bit on the CPU.

        Raises:
            GeometryError: blobs that cannot be stacked (:func:`kvpack.encode.slicing.stack_rows`), or unlike dtypes.
            TableError: more than 16 tables together.
            BlobError: a blob is damaged.
        """
        blob = stack_rows([tensor.blob for tensor in tensors])
        dtypes = {tensor.dtype for tensor in tensors}
        if len(dtypes) > 1 or len({tensor.scales is None for tensor in tensors}) > 1:
            raise GeometryError(
                f"tensors cannot be stacked: dtypes {', '.join(sorted(dtypes))}, or only some have scales"
            )
        scales = None
        given = [tensor.scales for tensor in tensors if tensor.scales is not None]
        if given:
            single = given[0]
            if len(single) == 1 and all(np.array_equal(one, single) for one in given):
                scales = single
            else:
                shapes = [(tensor.header.matrices, tensor.header.rows) for tensor in tensors]
                by_row = [
                    np.broadcast_to(one.reshape(-1, 1) if len(one) == 1 else one.reshape(shape), shape)
                    for one, shape in zip(given, shapes, strict=True)
                ]
                scales = np.concatenate(by_row, axis=1).ravel()
        return tensors[0]._with(blob, scales)
