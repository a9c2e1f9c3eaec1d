"""A tensor of a file as matrices whose strips are read when they are asked for: memory holds a few of them."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import numpy.typing as npt

from kvpack.encode.dtypes import NUMPY_DTYPES
from kvpack.encode.tensor_encoder import Matrices
from kvpack.format.container import Container, StoredTensor
from kvpack.format.layout import TILE_ROWS


class StoredMatrices(Matrices):
    """:class:`Matrices` of a stored tensor, of a dtype that NumPy has.

    Rows lie together in the file, so that a strip is one read. Strips of a transposed tensor are columns there: it is
    read as a whole for each pass over its strips. May be used by several threads.
    """

    def __init__(self, container: Container, tensor: StoredTensor, *, transposed: bool = False) -> None:
        self._container, self._tensor = container, tensor
        self._set_geometry(tensor.shape, NUMPY_DTYPES[tensor.dtype], transposed=transposed)
        self._row_bytes = self.cols * self.dtype.itemsize
        self._reading = threading.Lock()
        self._pass: npt.NDArray[Any] | None = None

    @property
    def array(self) -> npt.NDArray[Any]:
        """[matrices, rows, cols], read anew each time."""
        stored = np.frombuffer(self._container.data(self._tensor.name), self.dtype)
        if self.transposed:
            return stored.reshape(self.matrices, self.cols, self.rows).swapaxes(1, 2)
        return stored.reshape(self.matrices, self.rows, self.cols)

    def strip(self, index: int) -> npt.NDArray[Any]:
        """Rows of a matrix, [up to 256, cols]. Raises FileChangedError."""
        matrix, tile_row = divmod(index, self.tile_rows)
        if self.transposed:
            return self._whole(index)[matrix, tile_row * TILE_ROWS : (tile_row + 1) * TILE_ROWS]
        rows = self.strip_rows(index)
        data = self._container.read(self._tensor.name, rows.start * self._row_bytes, rows.stop * self._row_bytes)
        return np.frombuffer(data, self.dtype).reshape(-1, self.cols)

    def _whole(self, index: int) -> npt.NDArray[Any]:
        """The array, held from a pass's first strip to its last one."""
        with self._reading:
            array = self.array if self._pass is None else self._pass
            self._pass = None if index == self.num_strips - 1 else array
            return array
