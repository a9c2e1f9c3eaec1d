"""safetensors dtype names ⇄ NumPy types and element kinds; strips of any float type as f32."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from kvpack.encode.jit import kernel
from kvpack.format.layout import ElementKind

NUMPY_DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype("<u1"),
    "I8": np.dtype("<i1"),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "C64": np.dtype("<c8"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
}

# What dequantize() and decompress may be asked for.
FLOAT_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}

LOSSLESS_KINDS = {
    "BF16": ElementKind.BF16,
    "F16": ElementKind.FP16,
    "F32": ElementKind.FP32,
    "F8_E4M3": ElementKind.FP8_E4M3,
    "F8_E5M2": ElementKind.FP8_E5M2,
    "I8": ElementKind.SIGNED,
    "U8": ElementKind.UNSIGNED,
}
# Quantized already: coded losslessly whatever the rate.
NARROW_DTYPES = frozenset({"F8_E4M3", "F8_E5M2", "I8", "U8"})
LOSSY_DTYPES = frozenset({"F32", "F16", "BF16"})

BIT_PATTERNS: dict[int, type[np.unsignedinteger[Any]]] = {1: np.uint8, 2: np.uint16, 4: np.uint32}


@kernel
def _widen(bits, wide):  # type: ignore[no-untyped-def]
    """bf16 ``bits`` u16 [count] as the bits of f32, to ``wide`` u32."""
    for i in range(bits.shape[0]):
        wide[i] = np.uint32(bits[i]) << np.uint32(16)


def as_float32(strip: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """A strip of F32, F16 or BF16 as contiguous f32, exactly."""
    if strip.dtype == ml_dtypes.bfloat16:
        wide = np.empty(strip.shape, np.uint32)
        _widen(np.ascontiguousarray(strip).view(np.uint16).reshape(-1), wide.reshape(-1))
        return wide.view(np.float32)
    return np.ascontiguousarray(strip, np.float32)
