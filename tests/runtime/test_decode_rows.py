"""Rows of coded matrices, as embeddings look them up: the kernel on the emulator, to the bit of the CPU decoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import emulator
import numpy as np
import pytest
import sample_blobs as samples

torch = pytest.importorskip("torch")

from emulated_device import coded_tensor, emulated_launch  # noqa: E402

from kvpack.encode.blob_decoder import decode_integers  # noqa: E402
from kvpack.encode.blob_encoder import encode_elements  # noqa: E402
from kvpack.errors import InputError  # noqa: E402
from kvpack.format.blob import Blob  # noqa: E402
from kvpack.format.layout import ElementKind, Predictor, TileMode, integer_layout  # noqa: E402
from kvpack.runtime.device import kernels  # noqa: E402
from kvpack.runtime.weights import products  # noqa: E402
from kvpack.runtime.weights.device_blob import DeviceBlob  # noqa: E402

needs_emulator = pytest.mark.skipif(emulator.compiler() is None, reason="no C++ compiler for the emulator")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def vectors_of(rows: int, cols: int, *, offsets: bool, columns: bool) -> tuple[Any, Any, Any]:
    """Scales of rows, row offsets, column scales."""
    rng = np.random.default_rng(9)
    return (
        rng.lognormal(0, 1, rows).astype(np.float32),
        rng.normal(0, 1, rows).astype(np.float32) if offsets else None,
        rng.lognormal(0, 1, cols).astype(np.float16) if columns else None,
    )


def dense(data: bytes, scales: np.ndarray, row_offsets: Any = None, column_scales: Any = None) -> torch.Tensor:
    """The dequantized matrix, fp32, as FORMAT.md §8 says."""
    values = decode_integers(Blob(data))[0].astype(np.float32)
    values = values * np.broadcast_to(scales, len(values))[:, None]
    if row_offsets is not None:
        values = values + row_offsets[:, None]
    if column_scales is not None:
        values = values * column_scales.astype(np.float32)
    return torch.from_numpy(values)


def on_emulator(data: bytes, ids: Sequence[int], dtype: torch.dtype, *vectors: Any) -> tuple[torch.Tensor, list[int]]:
    """The rows, and what the kernel says of damage."""
    coded = coded_tensor(data, *vectors)
    out = torch.full((len(ids), coded.header.cols), torch.nan, dtype=dtype)
    products.decode_rows(coded, torch.tensor(ids), out)
    return out, coded.status.tolist()


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "launch", emulated_launch)


@needs_emulator
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(
    ("name", "bits"),
    [("balanced", 8), ("balanced", 5), ("balanced", 3), ("balanced", 2), ("fast", 5), ("fast", 2), ("compact", 4)],
)
def test_layouts(name: str, bits: int) -> None:
    """Rows of several groups and tiles, the last ones of padded tiles among them, one twice, and in any order."""
    data, scales = samples.quantized_blob(300, 131, integer_layout(name, ElementKind.SIGNED, bits), 64, 0)
    assert len(scales) == 300
    ids = [299, 0, 31, 32, 255, 256, 31, 77]
    for dtype in DTYPES:
        rows, damage = on_emulator(data, ids, dtype, scales)
        assert torch.equal(rows, dense(data, scales)[ids].to(dtype))
        assert damage == [0, 0]


@needs_emulator
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("mode", ["rans", "raw", "constant"])
def test_outliers(mode: str) -> None:
    data, scales = samples.blob_with_outliers(mode)
    ids = list(range(70))
    rows, _ = on_emulator(data, ids, torch.float32, scales)
    assert torch.equal(rows, dense(data, scales))


@needs_emulator
@pytest.mark.usefixtures("emulated")
def test_modes_and_tables() -> None:
    """Tiles of every mode; rans ones with different tables."""
    elements = samples.mixed_elements()[1:].copy()
    elements[:, :256, :32] = samples.gaussian_elements((1, 256, 32), 6, 3.0, 4)
    data = encode_elements(elements, integer_layout("compact", ElementKind.SIGNED, 6), tile_cols=32)
    blob = Blob(data)
    assert set(blob.tiles["mode"].tolist()) == set(map(int, TileMode))
    assert len(blob.tables) > 1
    scales = np.full(1, 0.5, np.float32)
    ids = list(range(0, blob.header.rows, 7))
    rows, _ = on_emulator(data, ids, torch.float32, scales)
    assert torch.equal(rows, dense(data, scales)[ids])


@needs_emulator
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(("name", "bits"), [("balanced", 6), ("fast", 6), ("compact", 8)])
def test_predictor(name: str, bits: int) -> None:
    half = 1 << (bits - 1)
    steps = np.rint(np.random.default_rng(3).normal(0, half / 4, (1, 64, 350))).astype(np.int64)
    elements = (steps.cumsum(2) % (2 * half)).astype(np.uint8)
    layout = integer_layout(name, ElementKind.SIGNED, bits)
    data = encode_elements(elements, layout, tile_cols=192, predictor=Predictor.PREVIOUS)
    assert Blob(data).tiles["predictor"].all()
    scales = np.full(1, 0.5, np.float32)
    rows, _ = on_emulator(data, list(range(64)), torch.float32, scales)
    assert torch.equal(rows, dense(data, scales))


@needs_emulator
@pytest.mark.usefixtures("emulated")
def test_longest_tiles() -> None:
    data = samples.longest_blob()
    rows, cols = Blob(data).header.rows, Blob(data).header.cols
    scales = np.full(1, 0.25, np.float32)
    found, _ = on_emulator(data, [0, rows - 1], torch.bfloat16, scales)
    assert found.shape == (2, cols)
    assert torch.equal(found, dense(data, scales)[[0, rows - 1]].bfloat16())


@needs_emulator
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(("offsets", "columns"), [(True, False), (False, True), (True, True)])
def test_vectors(offsets: bool, columns: bool) -> None:
    data, _ = samples.quantized_blob(40, 100, integer_layout("balanced", ElementKind.SIGNED, 5), 64, 0)
    vectors = vectors_of(40, 100, offsets=offsets, columns=columns)
    ids = [39, 3, 0]
    for dtype in DTYPES:
        rows, _ = on_emulator(data, ids, dtype, *vectors)
        assert torch.equal(rows, dense(data, *vectors)[ids].to(dtype))


@needs_emulator
@pytest.mark.usefixtures("emulated")
def test_ids_that_name_no_row_are_zeros() -> None:
    data, scales = samples.quantized_blob(40, 100, integer_layout("balanced", ElementKind.SIGNED, 5), 64, 0)
    rows, damage = on_emulator(data, [-1, 40, 1 << 40, 7], torch.float32, scales)
    assert not rows[:3].any()
    assert torch.equal(rows[3], dense(data, scales)[7])
    assert damage == [0, 0]


@needs_emulator
@pytest.mark.usefixtures("emulated")
def test_damage_is_reported() -> None:
    """Lengths and words that are not a lane's lead out of nothing, and are told of."""
    data, scales = samples.quantized_blob(64, 500, integer_layout("balanced", ElementKind.SIGNED, 5), 512, 0)
    header = Blob(data).header
    assert Blob(data).tiles["mode"].tolist() == [TileMode.RANS]
    lengths = header.payload_offset + 32 + 4 * 64
    words = header.payload_offset + 32 + 64 * 5
    for place, value in ((lengths + 3, 255), (lengths + 3, 0), (words + 20, data[words + 20] ^ 0x55)):
        coded = coded_tensor(data, scales)
        coded.blob[place] = value
        out = torch.empty((8, 500), dtype=torch.float32)
        products.decode_rows(coded, torch.arange(8), out)
        assert coded.status[0] > 0


def device_blob(device: str, dtype: torch.dtype) -> tuple[DeviceBlob, torch.Tensor]:
    data, _ = samples.quantized_blob(700, 576, integer_layout("balanced", ElementKind.SIGNED, 5), 288, 0)
    vectors = vectors_of(700, 576, offsets=True, columns=True)
    scales, offsets, columns = vectors
    blob = DeviceBlob.from_bytes(data, scales, dtype, (700, 576), device, column_scales=columns, row_offsets=offsets)
    return blob, dense(data, *vectors).to(dtype)


def check_operator(device: str) -> None:
    for dtype in DTYPES:
        blob, expected = device_blob(device, dtype)
        for kind in (torch.int64, torch.int32):
            ids = torch.tensor([[699, 0, 5], [5, 31, 32]], dtype=kind)
            found = blob.rows(ids.to(device))
            assert found.dtype == dtype
            assert torch.equal(found.cpu(), expected[ids.long()])
        assert blob.rows(torch.empty((3, 0), dtype=torch.int64, device=device)).shape == (3, 0, 576)
        assert torch.equal(blob.rows(torch.arange(700, device=device)).cpu(), expected)
    with pytest.raises(InputError, match="i64 or i32"):
        blob.rows(torch.zeros(3, device=device))
    with pytest.raises(TypeError, match="float64"):
        blob.rows(torch.zeros(3, dtype=torch.int64, device=device), torch.float64)


def test_operator() -> None:
    check_operator("cpu")


def test_compiled_operator_knows_its_shape() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    blob, _ = device_blob("cpu", torch.bfloat16)
    with FakeTensorMode(allow_non_fake_inputs=True):
        found = blob.rows(torch.empty((2, 5), dtype=torch.int64), torch.float16)
        assert (found.shape, found.dtype) == ((2, 5, 576), torch.float16)


@pytest.mark.gpu
def test_operator_on_the_device() -> None:
    check_operator("cuda")


@pytest.mark.gpu
def test_in_a_graph() -> None:
    """Other ids at each replay; those that name no row give zeros; nothing waits for the host."""
    blob, expected = device_blob("cuda", torch.float16)
    ids = torch.zeros(4, dtype=torch.int64, device="cuda")
    blob.rows(ids)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = blob.rows(ids)
    for chosen in ([0, 1, 2, 3], [699, 5, -1, 700]):
        ids.copy_(torch.tensor(chosen))
        graph.replay()
        torch.cuda.synchronize()
        for row, number in zip(out.cpu(), chosen, strict=True):
            assert torch.equal(row, expected[number] if 0 <= number < 700 else torch.zeros_like(row))
    blob.check()
