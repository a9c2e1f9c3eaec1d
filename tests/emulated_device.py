"""Coded tensors and launches on the emulator of `emulator.py`: the runtime's own code, with its launches redirected."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import emulator
import numpy as np
import torch

from kvpack.encode.rans import decoder_table
from kvpack.format.blob import Blob
from kvpack.format.layout import Predictor
from kvpack.runtime.codec.group_table import group_table, max_group_words
from kvpack.runtime.device import kernels
from kvpack.runtime.device.devices import Limits
from kvpack.runtime.device.kernels import Kernel
from kvpack.runtime.weights.device_blob import SLACK_BYTES
from kvpack.runtime.weights.products import Coded

# Few multiprocessors, so that small tensors meet runs of several tiles and rows that several blocks share.
LIMITS = Limits(architecture=90, multiprocessors=2, shared_bytes=228 * 1024, shared_block_bytes=227 * 1024)


def emulated_launch(
    kernel: Kernel,
    grid: int | tuple[int, ...],
    block: int | tuple[int, ...],
    arguments: Sequence[torch.Tensor | np.generic | None],
    *,
    device: torch.device,
    shared_bytes: int = 0,
    shuffle_seed: int | None = None,
) -> None:
    """`kernels.launch` for tensors of the CPU; with a seed blocks and threads run in a random order."""
    values: list[Any] = []
    for value in arguments:
        if isinstance(value, torch.Tensor):
            if value.numel() == 0:
                values.append(None)
                continue
            kept = value.view(torch.int16) if value.dtype == torch.bfloat16 else value
            if kept.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
                kept = kept.view(torch.uint8)
            # A view whose rows lie apart is copied from its first to its last element.
            extent = 1 + sum((size - 1) * stride for size, stride in zip(kept.shape, kept.stride(), strict=True))
            values.append(kept.detach().as_strided((extent,), (1,)).numpy())
        else:
            values.append(value)
    defines = kernels.format_defines() | dict(kernel.defines)
    emulator.run(
        kernel.source,
        kernel.function,
        grid,
        block,
        values,
        shared_bytes=shared_bytes,
        defines=defines,
        shuffle_seed=shuffle_seed,
    )


def coded_tensor(
    data: bytes,
    scales: np.ndarray | None = None,
    row_offsets: np.ndarray | None = None,
    column_scales: np.ndarray | None = None,
) -> Coded:
    """A blob as kernels see it, on the CPU."""
    blob = Blob(data)
    buffer = np.zeros(len(data) + SLACK_BYTES, np.uint8)
    buffer[: len(data)] = np.frombuffer(data, np.uint8)
    groups = group_table(blob)
    tables = np.zeros((0, 4096), np.uint32)
    if blob.tables:
        tables = np.stack([decoder_table(table) for table in blob.tables])
    return Coded(
        header=blob.header,
        max_group_words=max_group_words(groups),
        predicted=bool((blob.tiles["predictor"] == Predictor.PREVIOUS).any()),
        has_outliers=bool(blob.tiles["outlier_count"].any()),
        blob=torch.from_numpy(buffer),
        groups=torch.from_numpy(groups.view(np.int32)),
        tables=torch.from_numpy(tables.view(np.int32)),
        scales=torch.from_numpy(np.zeros(0, np.float32) if scales is None else scales.astype(np.float32)),
        status=torch.zeros(2, dtype=torch.int32),
        row_offsets=None if row_offsets is None else torch.from_numpy(row_offsets.astype(np.float32)),
        column_scales=None if column_scales is None else torch.from_numpy(column_scales.astype(np.float32)),
    )
