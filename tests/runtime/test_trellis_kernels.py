"""Blobs of a trellis (FORMAT.md §4.1) in every kernel that reads weights: on the emulator, and on a GPU."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import emulator
import numpy as np
import pytest
import sample_blobs as samples

torch = pytest.importorskip("torch")

from emulated_device import LIMITS, coded_tensor, emulated_launch  # noqa: E402
from many_vectors import activations, check_product, dequantized, limits_of  # noqa: E402

from kvpack.encode.blob_decoder import decode_integers  # noqa: E402
from kvpack.encode.blob_encoder import encode_elements  # noqa: E402
from kvpack.format.blob import Blob  # noqa: E402
from kvpack.format.layout import (  # noqa: E402
    ElementKind,
    Layout,
    Quantizer,
    TileMode,
    ceil_div,
    integer_layouts,
)
from kvpack.runtime.device import kernels  # noqa: E402
from kvpack.runtime.weights import grouped, mma_product, ops, products, wgmma_product  # noqa: E402
from kvpack.runtime.weights.device_blob import DeviceBlob  # noqa: E402
from kvpack.runtime.weights.grouped import Stack, blob_matrices  # noqa: E402
from kvpack.runtime.weights.linear import RansLinear  # noqa: E402

HALF = torch.float16
NAMED = tuple(
    dict.fromkeys(
        layout
        for bits in range(2, 7)
        for name in ("balanced", "fast", "compact")
        for layout in integer_layouts(name, ElementKind.SIGNED, bits, Quantizer.TRELLIS)
    )
)
FOUR_BITS = integer_layouts("balanced", ElementKind.SIGNED, 4, Quantizer.TRELLIS)[0]
needs_emulator = pytest.mark.skipif(emulator.compiler() is None, reason="no C++ compiler for the emulator")


def layout_id(layout: Layout) -> str:
    return f"{layout.element_bits}-{layout.code_bits}x{layout.codes_per_symbol}"


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "launch", emulated_launch)


def modes_blob() -> bytes:
    """[1, 70, 200] in tiles of 64 columns: rans, raw, constant, rans, with outliers at borders of all of them."""
    elements = samples.gaussian_elements((1, 70, 200), 4, 0.8, 1)
    rng = np.random.default_rng(2)
    elements[:, :, 64:128] = rng.integers(0, 16, (70, 64))
    elements[:, :, 128:192] = 6 + rng.integers(0, 4, (70, 64))  # of code 0
    places = [(0, 0), (0, 63), (31, 64), (31, 127), (32, 128), (32, 191), (33, 199), (69, 199)]
    outliers = [(0, row, col, 37 * i - 150) for i, (row, col) in enumerate(places)]
    data = samples.encode_with_outliers(elements, outliers, FOUR_BITS, tile_cols=64)
    assert set(Blob(data).tiles["mode"].tolist()) == set(TileMode)
    return data


def check_products(data: bytes, scales: np.ndarray, few: Sequence[int], many: int) -> None:
    """By gemv, gemm, and the kernels for many vectors."""
    coded, weights = coded_tensor(data, scales), dequantized(data, scales)
    header = coded.header
    for tokens in few:
        x = activations(tokens, header.cols, HALF)
        check_product(products.multiply(coded, x, None, LIMITS), coded, weights, x, None)
    x = activations(many, header.cols, HALF)
    fit = mma_product.fit_of(coded, many, limits_of(2), ((4, 1),))
    assert fit is not None
    check_product(mma_product.multiply(coded, x, None, fit), coded, weights, x, None)
    units = ceil_div(header.rows, 128) * header.num_tiles_col
    wide = wgmma_product.fit_wgmma(header.layout, many, units, coded.word_buffer_bytes, limits_of(2))
    assert wide is not None
    check_product(wgmma_product.multiply(coded, x, None, wide), coded, weights, x, None)


@needs_emulator
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("layout", NAMED, ids=layout_id)
def test_products_of_each_layout(layout: Layout) -> None:
    """With rows and columns short of a group and a chunk."""
    check_products(*samples.quantized_blob(140, 100, layout, 64), few=(1, 5), many=40)


@needs_emulator
@pytest.mark.parametrize("shuffle_seed", [None, 1])
def test_products_of_each_mode(monkeypatch: pytest.MonkeyPatch, shuffle_seed: int | None) -> None:
    monkeypatch.setattr(kernels, "launch", functools.partial(emulated_launch, shuffle_seed=shuffle_seed))
    check_products(modes_blob(), np.full(1, 0.02, np.float32), few=(1, 9), many=48)


@needs_emulator
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_expansion_and_rows_to_the_bit(dtype: torch.dtype) -> None:
    scales = np.random.default_rng(3).uniform(0.5, 1.5, 70).astype(np.float32)
    data = modes_blob()
    coded = coded_tensor(data, scales)
    expected = torch.from_numpy(decode_integers(Blob(data))[0].astype(np.float32) * scales[:, None]).to(dtype)
    out = torch.full((1, 70, 200), torch.nan, dtype=dtype)
    products.decode(coded, products.OUTPUTS[dtype], out, LIMITS)
    assert torch.equal(out[0], expected)
    ids = [69, 0, 31, 32, 33, 64, 31, 1]
    rows = torch.full((len(ids), 200), torch.nan, dtype=dtype)
    products.decode_rows(coded, torch.tensor(ids), rows)
    assert torch.equal(rows, expected[ids])
    assert coded.status.tolist() == [0, 0]


@needs_emulator
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("layout", NAMED, ids=layout_id)
def test_rows_of_each_layout(layout: Layout) -> None:
    data, scales = samples.quantized_blob(100, 131, layout, 64)
    coded = coded_tensor(data, scales)
    ids = [99, 0, 31, 32, 63, 64]
    rows = torch.full((len(ids), 131), torch.nan, dtype=torch.float32)
    products.decode_rows(coded, torch.tensor(ids), rows)
    np.testing.assert_array_equal(rows.numpy(), dequantized(data, scales)[ids].astype(np.float32))


def expert_blob(experts: int, rows: int, cols: int) -> tuple[bytes, np.ndarray]:
    """A blob of several matrices, and scales by row."""
    elements = samples.gaussian_elements((experts, rows, cols), 4, 1.0, experts)
    scales = np.random.default_rng(experts).uniform(0.5, 1.5, experts * rows).astype(np.float32) / 64
    return encode_elements(elements, FOUR_BITS, tile_cols=64), scales


def of_experts(data: bytes, scales: np.ndarray, x: torch.Tensor, ids: torch.Tensor) -> np.ndarray:
    """Each token times the matrices that its ids name, f64 [tokens, ids, rows]; zeros where there is none."""
    integers = decode_integers(Blob(data)).astype(np.float64)
    weights = integers * scales.reshape(len(integers), -1, 1)
    rows = [[weights[i] @ token if 0 <= i < len(weights) else 0 * weights[0, :, 0] for i in own]
            for token, own in zip(x.double().numpy(), ids.tolist(), strict=True)]  # fmt: skip
    return np.array(rows)


@needs_emulator
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("ids", [[[3, 0]], [[0, 2], [2, 3], [-1, 1], [2, 0], [2, 3], [3, 0], [2, 9], [1, 2], [2, 2]]])
def test_grouped_products(ids: list[list[int]]) -> None:
    """Of one token by gemv, of several by gemm; rows and columns short of a group and a chunk."""
    data, scales = expert_blob(4, 94, 150)
    coded = coded_tensor(data, scales)
    stack = Stack(coded, torch.from_numpy(blob_matrices(coded)), len(coded.tables))
    x, asked = activations(len(ids), 150, HALF), torch.tensor(ids)
    wanted = of_experts(data, scales, x, asked).reshape(-1, 94)
    got = grouped.multiply(stack, x, asked, LIMITS).double().numpy()
    assert (np.linalg.norm(got - wanted, axis=1) <= 1e-3 * np.linalg.norm(wanted, axis=1)).all()
    assert coded.status.tolist() == [0, 0]


def test_grouped_products_on_the_cpu() -> None:
    data, scales = expert_blob(5, 94, 150)
    blob = DeviceBlob.from_bytes(data, scales, torch.float32, (5, 94, 150), "cpu")
    x, ids = activations(3, 150, torch.float32), torch.tensor([[4, 0], [4, 4], [1, 2]])
    np.testing.assert_allclose(blob.grouped_linear(x, ids), of_experts(data, scales, x, ids), rtol=1e-4, atol=1e-5)


def test_a_layer_on_the_cpu() -> None:
    """And what goes with a coded tensor to torch's operators says that it is one of a trellis."""
    data, scales = samples.quantized_blob(70, 96, FOUR_BITS, 96)
    blob = DeviceBlob.from_bytes(data, scales, torch.float32, (70, 96), "cpu")
    assert ops._header(tuple(blob.geometry)).layout == FOUR_BITS
    weights = torch.from_numpy(dequantized(data, scales)).float()
    x = activations(3, 96, torch.float32)
    torch.testing.assert_close(RansLinear(blob)(x), x @ weights.T, rtol=1e-5, atol=1e-5)
    assert torch.equal(blob.dequantize(torch.float32), weights)
    assert torch.equal(blob.rows(torch.tensor([69, 2]), torch.float32), weights[[69, 2]])


@pytest.mark.gpu
@pytest.mark.parametrize("layout", NAMED, ids=layout_id)
def test_on_a_gpu(layout: Layout) -> None:
    """All products, expansion and rows, with the launches that the runtime chooses."""
    data, scales = samples.quantized_blob(700, 1100, layout, 256)
    blob = DeviceBlob.from_bytes(data, scales, HALF, (700, 1100), "cuda")
    weights = torch.from_numpy(dequantized(data, scales)).to("cuda")
    assert torch.equal(blob.dequantize(torch.float32), weights.float())
    assert torch.equal(blob.rows(torch.arange(0, 700, 37, device="cuda"), torch.float32), weights[::37].float())
    for tokens in (1, 2, 9, 32, 64, 100, 200, 600):
        x = activations(tokens, 1100, HALF).cuda()
        y = RansLinear(blob)(x)
        expected = x.double() @ weights.double().T
        assert (y.double() - expected).norm() < 1e-3 * expected.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 9, 64])
def test_grouped_products_on_a_gpu(tokens: int) -> None:
    data, scales = expert_blob(6, 700, 1100)
    blob = DeviceBlob.from_bytes(data, scales, HALF, (6, 700, 1100), "cuda")
    x = activations(tokens, 1100, HALF)
    ids = torch.from_numpy(np.random.default_rng(tokens).integers(0, 6, (tokens, 2)))
    wanted = of_experts(data, scales, x, ids)
    got = blob.grouped_linear(x.cuda(), ids.cuda()).double().cpu().numpy()
    assert np.linalg.norm(got - wanted) < 1e-3 * np.linalg.norm(wanted)


@pytest.mark.gpu
def test_modes_on_a_gpu() -> None:
    data = modes_blob()
    blob = DeviceBlob.from_bytes(data, np.full(1, 0.02, np.float32), HALF, (70, 200), "cuda")
    weights = torch.from_numpy(decode_integers(Blob(data))[0]).double().cuda() * float(np.float32(0.02))
    torch.testing.assert_close(blob.dequantize(torch.float32).double(), weights, rtol=1e-6, atol=0)
    for tokens in (1, 9, 48, 128):
        x = activations(tokens, 200, HALF).cuda()
        expected = x.double() @ weights.T
        assert (RansLinear(blob)(x).double() - expected).norm() < 1e-3 * expected.norm()
