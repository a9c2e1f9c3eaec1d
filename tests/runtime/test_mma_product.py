"""Products of many vectors with ldmatrix and mma.sync: on the emulator, and on a GPU."""

from __future__ import annotations

import functools
from dataclasses import replace

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
from kvpack.format.layout import ElementKind, TileMode, integer_layout  # noqa: E402
from kvpack.runtime.device import kernels  # noqa: E402
from kvpack.runtime.device.devices import device_limits  # noqa: E402
from kvpack.runtime.weights import mma_product, ops  # noqa: E402
from kvpack.runtime.weights.device_blob import DeviceBlob  # noqa: E402
from kvpack.runtime.weights.products import Coded  # noqa: E402

HALF = torch.float16
FAST = integer_layout("fast", ElementKind.SIGNED, 5)
BLOCKS = mma_product._BLOCKS


def check(
    coded: Coded,
    weights: np.ndarray,
    x: torch.Tensor,
    multiprocessors: int,
    bias: torch.Tensor | None = None,
    blocks: tuple[int, int] = (4, 1),
) -> torch.Tensor:
    """The product, after a look at it; `weights` are dequantized, float64."""
    fit = mma_product.fit_of(coded, len(x), limits_of(multiprocessors), (blocks,))
    assert fit is not None
    y = mma_product.multiply(coded, x, bias, fit)
    check_product(y, coded, weights, x, bias)
    return y


# Rows short of a block, tiles short of a chunk, an odd number of tile columns, blocks with units of one, two and three
# blocks of rows, a block alone; several blocks of vectors.
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(("tokens", "dtype"), [(33, torch.float16), (100, torch.bfloat16), (150, torch.float32)])
@pytest.mark.parametrize(
    ("rows", "cols", "tile_cols", "blocks", "multiprocessors"),
    [(300, 420, 96, (4, 1), 4), (300, 420, 64, (8, 1), 3), (129, 70, 32, (4, 2), 5), (40, 33, 64, (4, 1), 1)],
)
def test_shapes(
    monkeypatch: pytest.MonkeyPatch,
    rows: int,
    cols: int,
    tile_cols: int,
    blocks: tuple[int, int],
    multiprocessors: int,
    tokens: int,
    dtype: torch.dtype,
) -> None:
    data, scales = samples.quantized_blob(rows, cols, FAST, tile_cols)
    coded, x = coded_tensor(data, scales), activations(tokens, cols, dtype)
    bias = torch.linspace(-3, 3, rows).to(dtype)
    weights = dequantized(data, scales)
    first = check(coded, weights, x, multiprocessors, bias, blocks)
    # Threads in random order: the same bits.
    monkeypatch.setattr(kernels, "launch", functools.partial(emulated_launch, shuffle_seed=1))
    assert torch.equal(check(coded, weights, x, multiprocessors, bias, blocks), first)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("name", ["fast", "balanced", "compact"])
@pytest.mark.parametrize("bits", [2, 5, 8])
def test_layouts(name: str, bits: int) -> None:
    data, scales = samples.quantized_blob(140, 100, integer_layout(name, ElementKind.SIGNED, bits), 64)
    check(coded_tensor(data, scales), dequantized(data, scales), activations(48, 100, HALF), 2)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(("tokens", "blocks"), [(64, (4, 1)), (128, (8, 1))])
@pytest.mark.parametrize("mode", ["rans", "raw", "constant"])
def test_outliers(mode: str, tokens: int, blocks: tuple[int, int]) -> None:
    data, scales = samples.blob_with_outliers(mode)
    check(coded_tensor(data, scales), dequantized(data, scales), activations(tokens, 150, HALF), 3, None, blocks)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("shuffle_seed", [None, 1])
@pytest.mark.parametrize("name", ["mixed", "predicted", "two tables"])
def test_tables_modes_and_predictors(monkeypatch: pytest.MonkeyPatch, name: str, shuffle_seed: int | None) -> None:
    """Tiles of all modes, with several tables and with a predictor, of unsigned elements."""
    monkeypatch.setattr(kernels, "launch", functools.partial(emulated_launch, shuffle_seed=shuffle_seed))
    of = {"mixed": samples.mixed_tiles_blob, "predicted": samples.predicted_blob, "two tables": samples.two_tables_blob}
    data, scales = of[name](), np.full(1, 0.01, np.float32)
    coded = coded_tensor(data, scales)
    assert coded.predicted == (name == "predicted")
    assert (len(coded.tables) > 1) == (name != "predicted")
    weights = dequantized(data, scales)
    for blocks in ((4, 1), (8, 1)):
        check(coded, weights, activations(40, coded.header.cols, HALF), 2, None, blocks)


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
@pytest.mark.parametrize("tokens", [40, 200])
def test_damage_is_reported_once(tokens: int) -> None:
    data, scales = samples.quantized_blob(512, 512, FAST, 256)
    coded = coded_tensor(data, scales)
    header = coded.header
    blob = Blob(data)
    tile = blob.tiles[header.num_tiles_col]  # row 256 on
    assert tile["mode"] == TileMode.RANS
    state = header.payload_offset + int(tile["data_offset"]) + 32
    coded.blob[state] ^= 1
    fit = mma_product.fit_of(coded, tokens, limits_of(1))
    assert fit is not None
    mma_product.multiply(coded, activations(tokens, 512, HALF), None, fit)
    count, where = coded.status.tolist()
    assert count == 1
    assert ~where & 0xFFFFFFFF == 256 // 32 * header.num_tiles_col


def test_where_another_path_is_taken() -> None:
    data, scales = samples.quantized_blob(300, 128, FAST, 64)
    coded = coded_tensor(data, scales)
    one = limits_of(1, architecture=89)
    assert mma_product.fit_for(coded, 65, HALF, one) is not None
    assert mma_product.fit_for(coded, 64, HALF, one) is None
    assert mma_product.fit_for(coded, 65, torch.float32, one) is None
    assert mma_product.fit_for(coded, 129, HALF, one) is None
    # wgmma_product's, on sm_90.
    on_sm_90 = limits_of(1)
    assert mma_product.fit_for(coded, 65, HALF, on_sm_90) is None
    assert mma_product.fit_for(replace(coded, predicted=True), 65, HALF, on_sm_90) is not None
    assert mma_product.fit_for(replace(coded, tables=coded.tables.repeat(2, 1)), 65, HALF, on_sm_90) is not None


def test_blocks_fit_shared_memory() -> None:
    """The first kind of block that fits: of 256 rows, two of 128 rows on a multiprocessor, one alone, none."""
    words = 1 << 11
    shape = (4096, 16, words)
    kinds = []
    for kib in (164, 100, 90, 60):
        limits = limits_of(4, shared_bytes=kib << 10, shared_block_bytes=(kib - 1) << 10)
        fit = mma_product.fit_mma(FAST, 128, *shape, limits, outliers=False, several_tables=False, blocks=BLOCKS)
        kinds.append(fit and (fit.groups, fit.resident))
        assert fit is None or fit.resident * (fit.shared_bytes + 1024) <= kib << 10
    assert kinds == [(8, 1), (4, 1), (4, 1), None]


def test_blocks_that_have_registers_enough() -> None:
    """What comes together takes a block of its own multiprocessor (tests/runtime/test_compile.py compiles them)."""
    only = {"outliers": False, "predicted": False, "several_tables": False}
    assert mma_product.block_kinds(**only) == BLOCKS
    assert mma_product.block_kinds(**only | {"outliers": True}) == BLOCKS
    assert mma_product.block_kinds(**only | {"outliers": True, "predicted": True}) == ((4, 1),)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rows", "cols"), [(5000, 2048), (513, 4100), (28672, 1024)])
def test_on_a_gpu(rows: int, cols: int, dtype: torch.dtype) -> None:
    """By each kind of block; the same bits twice."""
    limits = device_limits(torch.device("cuda"))
    data, scales = samples.quantized_blob(rows, cols, FAST, 256)
    blob = DeviceBlob.from_bytes(data, scales, HALF, (rows, cols), "cuda")
    weights = torch.from_numpy(dequantized(data, scales)).cuda()
    coded = ops._coded(*blob._arguments())
    for tokens in (33, 64, 65, 128, 200, 512):
        x = activations(tokens, cols, dtype).cuda()
        expected = x.double() @ weights.T
        for blocks in BLOCKS:
            fit = mma_product.fit_of(coded, tokens, limits, (blocks,))
            if fit is None:
                continue
            y = mma_product.multiply(coded, x, None, fit)
            assert ((y.double() - expected).norm(dim=1) / expected.norm(dim=1)).max() < TOLERANCES[dtype]
            assert torch.equal(mma_product.multiply(coded, x, None, fit), y)
    blob.check()
