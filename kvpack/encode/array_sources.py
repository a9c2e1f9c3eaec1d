"""Arrays of NumPy as tensors to be compressed."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kvpack.encode.dtypes import NUMPY_DTYPES
from kvpack.errors import InputError
from kvpack.format.serialized import TensorSource

_NAMES = {dtype: name for name, dtype in NUMPY_DTYPES.items()}


def array_source(name: str, array: npt.NDArray[Any]) -> TensorSource:
    """An array of any strides and byte order, not copied until it is read.

    Raises:
        InputError: safetensors has no such dtype.
    """
    dtype = array.dtype.newbyteorder("<")
    if dtype not in _NAMES:
        raise InputError(f"tensor {name!r}: safetensors has no type for an array of {array.dtype}")

    def read() -> memoryview:
        return np.ascontiguousarray(array, dtype).reshape(-1).view(np.uint8).data

    return TensorSource(_NAMES[dtype], array.shape, read)
