"""Products with the matrices of a stack, on the emulator: each row against its own matrix, whatever the ids are."""

from __future__ import annotations

import emulator
import numpy as np
import pytest
import sample_blobs as samples

torch = pytest.importorskip("torch")

from emulated_device import LIMITS, coded_tensor, emulated_launch  # noqa: E402

from kvpack.encode.blob_decoder import decode_integers  # noqa: E402
from kvpack.encode.blob_encoder import encode_elements  # noqa: E402
from kvpack.format.blob import Blob  # noqa: E402
from kvpack.format.layout import ElementKind, integer_layout  # noqa: E402
from kvpack.runtime.device import kernels  # noqa: E402
from kvpack.runtime.weights import grouped  # noqa: E402
from kvpack.runtime.weights.grouped import Stack, blob_matrices  # noqa: E402

pytestmark = pytest.mark.skipif(emulator.compiler() is None, reason="no C++ compiler for the emulator")


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "launch", emulated_launch)


def stacked(
    experts: int, rows: int, cols: int, name: str = "fast", bits: int = 5, *, tile_cols: int = 64
) -> tuple[bytes, np.ndarray]:
    """A blob of several matrices, and scales by row."""
    elements = samples.gaussian_elements((experts, rows, cols), bits, 0.6 * (1 << bits) / 8, experts)
    scales = np.random.default_rng(rows).uniform(0.5, 1.5, experts * rows).astype(np.float32) / 64
    return encode_elements(elements, integer_layout(name, ElementKind.SIGNED, bits), tile_cols=tile_cols), scales


def stack_of(data: bytes, scales: np.ndarray) -> Stack:
    coded = coded_tensor(data, scales)
    return Stack(coded, torch.from_numpy(blob_matrices(coded)), len(coded.tables))


def dense(data: bytes, scales: np.ndarray) -> np.ndarray:
    integers = decode_integers(Blob(data))
    by_row = np.broadcast_to(scales, integers.shape[0] * integers.shape[1]).reshape(*integers.shape[:2], 1)
    return integers.astype(np.float64) * by_row


def expected(weights: np.ndarray, x: torch.Tensor, ids: torch.Tensor) -> np.ndarray:
    """Of each pair, the row times the matrix; zeros where there is none."""
    tokens, flat = x.double().numpy(), ids.flatten().tolist()
    each = len(flat) // len(tokens)
    out = np.zeros((len(flat), weights.shape[1]))
    for pair, expert in enumerate(flat):
        if 0 <= expert < len(weights):
            out[pair] = weights[expert] @ tokens[pair // each]
    return out


def check(
    stack: Stack, weights: np.ndarray, ids: torch.Tensor, *, dtype: torch.dtype = torch.float16, each: bool = False
) -> torch.Tensor:
    rng = np.random.default_rng(ids.numel())
    rows = ids.numel() if each else len(ids)
    x = torch.from_numpy(rng.normal(0, 1, (rows, weights.shape[2]))).to(dtype)
    wanted = expected(weights, x, ids)
    got = grouped.multiply(stack, x, ids, LIMITS)
    assert got.dtype == dtype
    for row, right, expert in zip(got.double().numpy(), wanted, ids.flatten().tolist(), strict=True):
        if not 0 <= expert < len(weights):
            assert not row.any()
            continue
        assert np.linalg.norm(row - right) / np.linalg.norm(right) < (1e-3 if dtype != torch.bfloat16 else 4e-3)
    assert torch.equal(got, grouped.multiply(stack, x, ids, LIMITS))
    return got


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("ids", [[[3, 0]], [[1, 1]], [[-1, 2]], [[4, 1 << 32]]], ids=str)
def test_one_token(ids: list[list[int]], dtype: torch.dtype) -> None:
    data, scales = stacked(4, 70, 200)
    stack = stack_of(data, scales)
    check(stack, dense(data, scales), torch.tensor(ids), dtype=dtype)
    assert stack.first.status.tolist() == [0, 0]


ROUTINGS = {
    "by chance": lambda rng: rng.integers(0, 5, (12, 2)),
    "all to one": lambda _: np.full((12, 2), 3),
    "all to two": lambda _: np.broadcast_to([4, 0], (12, 2)),
    "none": lambda _: np.full((12, 2), 5),
    "some to none": lambda rng: rng.integers(-2, 7, (12, 2)),
    "far out of range": lambda rng: rng.choice([1, 1 << 31, 1 << 32, -(1 << 63), (1 << 63) - 1], (12, 2)),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_few_tokens(routing: str, dtype: torch.dtype) -> None:
    data, scales = stacked(5, 70, 200)
    stack = stack_of(data, scales)
    ids = torch.from_numpy(np.ascontiguousarray(ROUTINGS[routing](np.random.default_rng(0))).astype(np.int64))
    check(stack, dense(data, scales), ids, dtype=dtype)
    assert stack.first.status.tolist() == [0, 0]
