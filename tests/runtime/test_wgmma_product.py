"""Products of 33 to 256 vectors by warps that decode beside warps that multiply: on the emulator, and on a GPU."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import sample_blobs as samples

torch = pytest.importorskip("torch")

from emulated_device import coded_tensor, emulated_launch  # noqa: E402
from many_vectors import (  # noqa: E402
    TOLERANCES,
    activations,
    check_product,
    dequantized,
    emulated,  # noqa: F401
    limits_of,
)

from kvpack.format.blob import Blob  # noqa: E402
from kvpack.format.layout import ElementKind, TileMode, ceil_div, integer_layout  # noqa: E402
from kvpack.runtime.device import kernels  # noqa: E402
from kvpack.runtime.device.devices import device_limits  # noqa: E402
from kvpack.runtime.weights import ops, wgmma_product  # noqa: E402
from kvpack.runtime.weights.device_blob import DeviceBlob  # noqa: E402
from kvpack.runtime.weights.products import Coded  # noqa: E402

HALF = torch.float16
FAST = integer_layout("fast", ElementKind.SIGNED, 5)


def fit_on(coded: Coded, tokens: int, multiprocessors: int) -> wgmma_product.WgmmaFit:
    """The launch, also where another path would be faster."""
    header = coded.header
    units = ceil_div(header.rows, 128) * header.num_tiles_col
    fit = wgmma_product.fit_wgmma(header.layout, tokens, units, coded.word_buffer_bytes, limits_of(multiprocessors))
    assert fit is not None
    return fit


def check(
    coded: Coded, weights: np.ndarray, x: torch.Tensor, multiprocessors: int, bias: torch.Tensor | None = None
) -> Any:
    """The product, after a look at it; `weights` are dequantized, float64."""
    y = wgmma_product.multiply(coded, x, bias, fit_on(coded, len(x), multiprocessors))
    check_product(y, coded, weights, x, bias)
    return y


# Rows short of a block, tiles short of a chunk, blocks with units of one, two and three blocks of rows, a block alone.
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(("tokens", "dtype"), [(33, torch.float16), (100, torch.bfloat16), (256, torch.float32)])
@pytest.mark.parametrize(
    ("rows", "cols", "tile_cols", "blocks"), [(300, 420, 96, 2), (129, 70, 32, 5), (40, 33, 64, 1)]
)
def test_shapes(
    monkeypatch: pytest.MonkeyPatch, rows: int, cols: int, tile_cols: int, blocks: int, tokens: int, dtype: torch.dtype
) -> None:
    data, scales = samples.quantized_blob(rows, cols, FAST, tile_cols)
    coded, x = coded_tensor(data, scales), activations(tokens, cols, dtype)
    bias = torch.linspace(-3, 3, rows).to(dtype)
    first = check(coded, dequantized(data, scales), x, blocks, bias)
    for seed in (1, 2):  # threads in random order: the same bits
        monkeypatch.setattr(kernels, "launch", functools.partial(emulated_launch, shuffle_seed=seed))
        assert torch.equal(check(coded, dequantized(data, scales), x, blocks, bias), first)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("name", ["fast", "balanced", "compact"])
@pytest.mark.parametrize("bits", [3, 5, 8])
def test_layouts(name: str, bits: int) -> None:
    data, scales = samples.quantized_blob(140, 100, integer_layout(name, ElementKind.SIGNED, bits), 64)
    check(coded_tensor(data, scales), dequantized(data, scales), activations(48, 100, torch.float16), 2)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("tokens", [64, 128, 256])
@pytest.mark.parametrize("mode", ["rans", "raw", "constant"])
def test_outliers(mode: str, tokens: int) -> None:
    data, scales = samples.blob_with_outliers(mode)
    check(coded_tensor(data, scales), dequantized(data, scales), activations(tokens, 150, torch.float16), 3)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_column_scales_and_row_offsets(dtype: torch.dtype) -> None:
    data, scales = samples.quantized_blob(150, 100, FAST, 64)
    rng = np.random.default_rng(5)
    columns = rng.uniform(0.01, 100, 100).astype(np.float16).astype(np.float32)
    offsets = rng.normal(0, 0.05, 150).astype(np.float32)
    weights = dequantized(data, scales)
    x = activations(40, 100, dtype)
    check(coded_tensor(data, scales, None, columns), weights * columns, x, 2)
    check(coded_tensor(data, scales, offsets, columns), (weights + offsets[:, None]) * columns, x, 2)


@pytest.mark.usefixtures("emulated")
def test_smallest_activations() -> None:
    """Near 2^-110: no sum becomes denormal, which kernels flush to zero."""
    data, scales = samples.quantized_blob(64, 96, FAST, 64)
    x = torch.from_numpy(np.random.default_rng(1).normal(0, 2.0**-110, (40, 96))).to(torch.bfloat16)
    check(coded_tensor(data, scales), dequantized(data, scales), x, 2)


@pytest.mark.usefixtures("emulated")
def test_damage_is_reported() -> None:
    data, scales = samples.quantized_blob(512, 512, FAST, 256)
    coded = coded_tensor(data, scales)
    header = coded.header
    blob = Blob(data)
    tile = blob.tiles[header.num_tiles_col]  # row 256 on
    assert tile["mode"] == TileMode.RANS
    state = header.payload_offset + int(tile["data_offset"]) + 32
    coded.blob[state] ^= 1
    fit = wgmma_product.fit_for(coded, 40, HALF, limits_of(1))
    assert fit is not None
    wgmma_product.multiply(coded, activations(40, 512, torch.float16), None, fit)
    count, where = coded.status.tolist()
    assert count >= 1
    assert ~where & 0xFFFFFFFF == 256 // 32 * header.num_tiles_col


def test_where_another_path_is_taken() -> None:
    data, scales = samples.quantized_blob(300, 128, FAST, 64)
    coded = coded_tensor(data, scales)
    one = limits_of(1)
    assert wgmma_product.fit_for(coded, 64, HALF, one) is not None
    assert wgmma_product.fit_for(coded, 64, HALF, replace(one, architecture=80)) is None
    assert wgmma_product.fit_for(coded, 64, HALF, replace(one, architecture=100)) is None
    assert wgmma_product.fit_for(coded, 64, torch.float32, one) is None
    assert wgmma_product.fit_for(coded, 257, HALF, one) is None
    assert wgmma_product.fit_for(coded, 129, HALF, one) is None  # few weights for a multiprocessor
    assert wgmma_product.fit_for(replace(coded, predicted=True), 64, HALF, one) is None
    assert wgmma_product.fit_for(replace(coded, tables=coded.tables.repeat(2, 1)), 64, HALF, one) is None


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rows", "cols"), [(5000, 2048), (513, 4100), (28672, 1024)])
def test_on_a_gpu(rows: int, cols: int, dtype: torch.dtype) -> None:
    """Through the operator, at every number of vectors that has a block of its own; the same bits twice."""
    limits = device_limits(torch.device("cuda"))
    if limits.architecture != wgmma_product.ARCHITECTURE:
        pytest.skip("the kernel is sm_90's alone")
    data, scales = samples.quantized_blob(rows, cols, FAST, 256)
    blob = DeviceBlob.from_bytes(data, scales, torch.float16, (rows, cols), "cuda")
    weights = torch.from_numpy(dequantized(data, scales)).cuda()
    coded = ops._coded(*blob._arguments())
    for tokens in (33, 64, 65, 128, 200, 256):
        x = activations(tokens, cols, dtype).cuda()
        y = wgmma_product.multiply(coded, x, None, fit_on(coded, tokens, limits.multiprocessors))
        expected = x.double() @ weights.T
        assert ((y.double() - expected).norm(dim=1) / expected.norm(dim=1)).max() < TOLERANCES[dtype]
        assert torch.equal(blob.linear(x), blob.linear(x))
    blob.check()
