"""Quantizing with feedback on a GPU: what :mod:`kvpack.encode.feedback` does, of the same quality, not bit for bit.

The factor is cuSOLVER's, in double precision. A block of columns is quantized by a kernel (``encode_feedback``), a
thread for each row; what the errors of all columns before it ask for is one product of matrices in single precision.
Sums are made in another order than the CPU's, by libraries whose order is that of a GPU's model and a CUDA version: on
these the same moments give the same integers.

Memory for K columns: 24·K² bytes while a factor is made, 4·K² for each that is kept, and 20 bytes for each of
``CHUNK_ELEMENTS`` weights that are quantized at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from kvpack.encode.feedback import CLAMP_BITS, DAMPING, MOST_STEPS, order_of
from kvpack.encode.quantize import NUM_THRESHOLDS, Rounding
from kvpack.errors import DeviceError
from kvpack.format.layout import ceil_div
from kvpack.runtime.device.kernels import Kernel

# Rows are quantized so many at a time that these are their weights, or a row.
CHUNK_ELEMENTS = 1 << 27
_COLUMNS = 32
_THREADS = 64

KERNEL = Kernel.of(
    "codec/encode_feedback.cu",
    "encode_feedback",
    None,
    {
        "KVPACK_NUM_THRESHOLDS": NUM_THRESHOLDS,
        "KVPACK_FEEDBACK_COLUMNS": _COLUMNS,
        "KVPACK_FEEDBACK_THREADS": _THREADS,
    },
)


class DeviceFeedback(NamedTuple):
    """:class:`kvpack.encode.feedback.Feedback` on a device; ``places`` i64 [K] is the inverse of ``order``."""

    order: torch.Tensor
    places: torch.Tensor
    coefficients: torch.Tensor
    variances: torch.Tensor
    mean_variance: float

    @property
    def size_bytes(self) -> int:
        """What it takes of the device's memory, nearly."""
        return self.coefficients.nbytes


class FedBack(NamedTuple):
    """A matrix's integers, on the device.

    ``elements`` u8 [R, K]; ``outliers`` i64 [count, 3] (row, column, what an integer is beyond the range), sorted;
    ``row_errors`` f64 [R]: see :class:`kvpack.encode.quantize.Quantized`.
    """

    elements: torch.Tensor
    outliers: torch.Tensor
    row_errors: torch.Tensor


@contextmanager
def _single_precision() -> Iterator[None]:
    """Products of fp32 matrices in fp32, whatever the program has chosen for its own."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def device_feedback(
    second_moment: npt.NDArray[np.float32], device: torch.device, damping: float = DAMPING
) -> DeviceFeedback:
    """The feedback for inputs with this second moment, f32 [K, K]: as :func:`kvpack.encode.feedback.feedback_of`.

    Raises:
        ValueError: it is not positive definite.
        DeviceError: the device's memory is too small.
    """
    try:
        return _device_feedback(second_moment, device, damping)
    except torch.OutOfMemoryError:
        size = len(second_moment)
        raise DeviceError(
            f"{device} has no memory for feedback between {size} inputs, which takes {24e-9 * size**2:.1f} GB of it "
            "while it is made: use device='cpu', or a device with more that is free"
        ) from None


def _device_feedback(second_moment: npt.NDArray[np.float32], device: torch.device, damping: float) -> DeviceFeedback:
    order, mean = order_of(second_moment)
    size = len(order)
    order_there = torch.from_numpy(order).to(device)
    places = torch.empty_like(order_there).scatter_(0, order_there, torch.arange(size, device=device))
    if mean <= 0:
        nothing = torch.zeros((size, size), dtype=torch.float32, device=device)
        return DeviceFeedback(order_there, places, nothing, torch.ones(size, dtype=torch.float32, device=device), 0.0)
    host = torch.empty((size, size), dtype=torch.float32, device="cpu", pin_memory=device.type == "cuda")
    np.copyto(host.numpy(), second_moment)
    moment = host.to(device)
    # From the last to the first of the columns of L: these are the first to the last in ``order``.
    last_first = order_there.flip(0)
    moment = moment.index_select(0, last_first).index_select(1, last_first)
    factor = moment.double()
    factor += moment.T
    del moment
    factor *= 0.5
    factor.diagonal().add_(damping * mean)
    factor, info = torch.linalg.cholesky_ex(factor)
    roots = factor.diagonal().flip(0)
    if int(info) or not bool(roots.isfinite().all()):
        raise ValueError("a second moment is not positive definite")
    coefficients = factor.flip(0, 1).T
    del factor
    coefficients.tril_(-1).div_(roots[:, None])
    variances = roots.square()
    mean_variance = float(variances.mean())
    return DeviceFeedback(
        order_there,
        places,
        coefficients.to(torch.float32, memory_format=torch.contiguous_format),
        (variances / mean_variance).float(),
        mean_variance,
    )


def quantize_with_feedback(
    weights: torch.Tensor,
    steps: torch.Tensor,
    element_bits: int,
    rounding: Rounding,
    feedback: DeviceFeedback,
    launcher: Callable[..., None],
) -> FedBack:
    """Quantize f32 ``weights`` [R, K] by ``steps`` f32 [R] to ``element_bits`` bits; a step of 0 gives 0."""
    rows, cols = weights.shape
    device, half = weights.device, 1 << (element_bits - 1)
    inverse = torch.where(steps > 0, 1 / steps, 0)
    bits = torch.from_numpy(rounding.bits.astype(np.float32)).to(device)
    elements = torch.empty((rows, cols), dtype=torch.uint8, device=device)
    row_errors = torch.zeros(rows, dtype=torch.float64, device=device)
    outliers = []
    chunk = max(1, CHUNK_ELEMENTS // cols)
    for first in range(0, rows, chunk):
        part = slice(first, min(first + chunk, rows))
        values = (weights[part] * inverse[part, None]).T.index_select(0, feedback.order)
        integers = _integers(values, half, rounding, bits, feedback, row_errors[part], launcher)
        del values
        by_column = integers.T.index_select(1, feedback.places)
        del integers
        edges = by_column.clamp(-half, half - 1)
        torch.add(edges, half, out=elements[part])
        beyond = by_column.sub_(edges)
        places = beyond.nonzero()
        deltas = beyond[places[:, 0], places[:, 1]].long()
        outliers.append(torch.column_stack((places[:, 0] + first, places[:, 1], deltas)))
    return FedBack(elements, torch.cat(outliers), row_errors)


def _integers(
    values: torch.Tensor,
    half: int,
    rounding: Rounding,
    bits: torch.Tensor,
    feedback: DeviceFeedback,
    row_errors: torch.Tensor,
    launcher: Callable[..., None],
) -> torch.Tensor:
    """i32 [K, R] of f32 ``values`` [K, R], in steps and in order; adds to ``row_errors`` f64 [R]."""
    cols, rows = values.shape
    integers = torch.empty((cols, rows), dtype=torch.int32, device=values.device)
    errors = torch.empty_like(values)
    corrections = torch.empty((_COLUMNS, rows), dtype=torch.float32, device=values.device)
    with _single_precision():
        for begin in range(0, cols, _COLUMNS):
            end = min(begin + _COLUMNS, cols)
            given = None
            if begin:
                given = corrections[: end - begin]
                torch.mm(feedback.coefficients[begin:end, :begin], errors[:begin], out=given)
            launcher(
                KERNEL,
                ceil_div(rows, _THREADS),
                _THREADS,
                (
                    values[begin:end], given, feedback.coefficients[begin:end, begin:end], np.uint32(cols),
                    feedback.variances[begin:end], np.uint32(end - begin), np.uint32(rows),
                    np.float32(rounding.rate_weight), bits, np.float32(CLAMP_BITS), np.int32(half),
                    np.float32(MOST_STEPS), integers[begin:end], errors[begin:end], row_errors,
                ),
                device=values.device,
            )  # fmt: skip
    return integers
