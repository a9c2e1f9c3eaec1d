"""What tests of the kernels for many vectors share: activations, weights as they should be, and a look at a product."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import emulator
import numpy as np
import pytest
import torch
from emulated_device import LIMITS, emulated_launch

from kvpack.encode.blob_decoder import decode_integers
from kvpack.format.blob import Blob
from kvpack.runtime.device import kernels
from kvpack.runtime.device.devices import Limits
from kvpack.runtime.weights.products import Coded

TOLERANCES = {torch.float16: 1e-3, torch.bfloat16: 6e-3, torch.float32: 1e-3}


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches on the emulator, in memory that is full of what no sum contains."""
    if emulator.compiler() is None:
        pytest.skip("no C++ compiler for the emulator")
    monkeypatch.setattr(kernels, "launch", emulated_launch)
    empty = torch.empty

    def poisoned(*args: Any, **options: Any) -> Any:
        out = empty(*args, **options)
        return out.fill_(torch.nan) if out.is_floating_point() else out

    monkeypatch.setattr(torch, "empty", poisoned)


def limits_of(multiprocessors: int, **others: int) -> Limits:
    return replace(LIMITS, multiprocessors=multiprocessors, **others)


def activations(tokens: int, cols: int, dtype: torch.dtype) -> torch.Tensor:
    """Of ordinary size, but for a massive one here and there."""
    x = np.random.default_rng(tokens).normal(0, 1, (tokens, cols))
    x[::3, cols // 2] *= 1000
    return torch.from_numpy(x).to(dtype)


def dequantized(data: bytes, scales: np.ndarray) -> np.ndarray:
    integers = decode_integers(Blob(data))[0].astype(np.float64)
    return integers * np.broadcast_to(scales, len(integers))[:, None]


def check_product(
    y: torch.Tensor, coded: Coded, weights: np.ndarray, x: torch.Tensor, bias: torch.Tensor | None = None
) -> None:
    """`weights` are dequantized, float64."""
    expected = x.double().numpy() @ weights.T
    if bias is not None:
        expected = expected + bias.double().numpy()
    errors = np.linalg.norm(y.double().numpy() - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert errors.max() < TOLERANCES[x.dtype]
    assert coded.status.tolist() == [0, 0]
