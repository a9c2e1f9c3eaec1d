"""Coded tensors on a real device, against the CPU: every golden blob, products of every size, damaged blobs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sample_blobs as samples

torch = pytest.importorskip("torch")

from kvpack.encode.blob_decoder import decode_integers, rotate_left  # noqa: E402
from kvpack.encode.blob_encoder import encode_elements  # noqa: E402
from kvpack.errors import BlobError, LaneStateError  # noqa: E402
from kvpack.format.blob import TILE_METADATA, Blob  # noqa: E402
from kvpack.format.layout import ElementKind, TileMode, float_layouts, integer_layout  # noqa: E402
from kvpack.runtime.weights import expansion, grouped, products  # noqa: E402
from kvpack.runtime.weights.device_blob import SLACK_BYTES, DeviceBlob  # noqa: E402
from kvpack.runtime.weights.products import MAX_FUSED_TOKENS  # noqa: E402

GOLDEN = sorted((Path(__file__).parents[1] / "data" / "v1").glob("*.blob"))

pytestmark = pytest.mark.gpu


def on_device(data: bytes, scales: np.ndarray | None = None, dtype: torch.dtype = torch.float16) -> DeviceBlob:
    header = Blob(data).header
    shape = (header.matrices, header.rows, header.cols) if header.matrices > 1 else (header.rows, header.cols)
    return DeviceBlob.from_bytes(data, scales, dtype, shape, "cuda")


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden_blobs(path: Path) -> None:
    data = path.read_bytes()
    coded = on_device(data)
    coded.check_lanes()
    assert coded.integers().cpu().numpy().tobytes() == decode_integers(Blob(data)).tobytes()
    coded.check()


LAYOUTS = (
    [("balanced", n) for n in range(2, 9)] + [("fast", n) for n in (3, 5, 8)] + [("compact", n) for n in (2, 4, 8)]
)


@pytest.mark.parametrize("tile_cols", [64, 256, 512])
@pytest.mark.parametrize(("name", "bits"), LAYOUTS)
def test_products(name: str, bits: int, tile_cols: int) -> None:
    rows, cols = 1111, 1003
    elements = samples.gaussian_elements((1, rows, cols), bits, 0.6 * (1 << bits) / 8, bits)
    scales = np.random.default_rng(0).uniform(0.5, 1.5, rows).astype(np.float32) / 64
    data = encode_elements(elements, integer_layout(name, ElementKind.SIGNED, bits), tile_cols=tile_cols)
    coded = on_device(data, scales)
    weights = torch.from_numpy(
        (elements[0].astype(np.float64) - (1 << bits - 1)) * scales[:, None].astype(np.float64)
    ).cuda()
    exact = torch.from_numpy((elements[0].astype(np.float32) - (1 << bits - 1)) * scales[:, None]).cuda()
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert torch.equal(coded.dequantize(dtype), exact.to(dtype))
        for tokens in (1, 2, 8, 13, 16, 27, 32, 33, 64, 200):
            x = torch.randn(tokens, cols, device="cuda").to(dtype)
            bias = torch.randn(rows, device="cuda").to(dtype)
            fused = tokens <= MAX_FUSED_TOKENS
            # What many tokens meet is expanded to the activations' type first: a dense layer's weights, rounded once.
            expected = x.double() @ (weights if fused else exact.to(dtype).double()).T + bias.double()
            got = coded.linear(x, bias)
            error = ((got.double() - expected).norm() / expected.norm()).item()
            # One fp32 vector is rounded to 16 bits of the largest of each chunk.
            of_fp32 = 5e-5 if tokens == 1 else 1e-5
            tolerance = {torch.bfloat16: 3e-3, torch.float16: 1e-3, torch.float32: of_fp32}[dtype]
            assert error < tolerance, (dtype, tokens)
            if fused:
                assert torch.equal(got, coded.linear(x, bias))
    coded.check()


@pytest.mark.parametrize("lossless", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("slow", ["nothing", "decoding", "products"])
def test_products_with_two_buffers(
    monkeypatch: pytest.MonkeyPatch, slow: str, dtype: torch.dtype, lossless: bool
) -> None:
    """Whichever stream is the slower one; with graphs too, and beside each other on several streams."""
    # Torch hands 32 streams out in turn: one that another test has left current could come as a side stream.
    torch.cuda.set_stream(torch.cuda.default_stream())
    rows, cols, tokens = 3000, 256, 300
    if lossless:
        values = (torch.randn(rows, cols) * 0.05).to(torch.bfloat16)
        elements = rotate_left(values.view(torch.int16).numpy().view(np.uint16), 16)
        data, scales = encode_elements(elements, float_layouts(ElementKind.BF16)[0], tile_cols=256), None
    else:
        elements = samples.gaussian_elements((1, rows, cols), 5, 2.4, 5)
        scales = np.random.default_rng(0).uniform(0.5, 1.5, rows).astype(np.float32) / 64
        data = encode_elements(elements, integer_layout("balanced", ElementKind.SIGNED, 5), tile_cols=256)
    coded = on_device(data, scales, torch.bfloat16)
    staged = torch.bfloat16 if lossless else dtype
    weights = coded.dequantize(staged).to(dtype).double()
    x, bias = torch.randn(tokens, cols, device="cuda").to(dtype), torch.randn(rows, device="cuda").to(dtype)
    expected = x.double() @ weights.T + bias.double()

    on: list[tuple[int, int]] = []  # a decode's stream, and its buffer
    decode = products.decode

    def slow_decode(coded: Any, output: int, out: torch.Tensor, *rest: Any) -> None:
        on.append((torch.cuda.current_stream().cuda_stream, out.untyped_storage().data_ptr()))
        if slow == "decoding":
            torch.cuda._sleep(200_000)
        out.fill_(float("nan"))  # a product that does not wait meets these
        decode(coded, output, out, *rest)

    addmm = torch.addmm

    def slow_addmm(*operands: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        if slow == "products":
            torch.cuda._sleep(200_000)
        return addmm(*operands, out=out)

    monkeypatch.setattr(products, "decode", slow_decode)
    monkeypatch.setattr(torch, "addmm", slow_addmm)
    monkeypatch.setattr(expansion, "STAGING_BYTES", 256 * cols * staged.itemsize)

    def right(got: torch.Tensor) -> bool:
        return ((got.double() - expected).norm() / expected.norm()).item() < (3e-3 if dtype != torch.float32 else 1e-5)

    main = torch.cuda.current_stream().cuda_stream
    for _ in range(3):
        on.clear()
        assert right(coded.linear(x, bias))
        assert len(on) == 12
        assert len({stream for stream, _ in on}) == 1
        assert on[0][0] != main
        assert len({buffer for _, buffer in on}) == 2

    streams = [torch.cuda.Stream() for _ in range(3)]
    results = []
    torch.cuda.synchronize()
    on.clear()
    for stream in streams:
        with torch.cuda.stream(stream):
            results.append(coded.linear(x, bias))
    torch.cuda.synchronize()
    assert all(map(right, results))
    # Each has a side stream; torch hands out 32 and then begins anew, so that two of the three may be one.
    assert len({stream for stream, _ in on}) >= 2
    assert main not in {stream for stream, _ in on}

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = coded.linear(x, bias)
    for _ in range(3):
        y.fill_(float("nan"))
        graph.replay()
        assert right(y)
    coded.check()


def mutants(count: int) -> list[tuple[bytes, bytes]]:
    """(payload damaged, original): bytes of payloads overwritten, CRCs left as they were (the runtime reads none)."""
    rng = np.random.default_rng(7)
    originals = [path.read_bytes() for path in GOLDEN]
    found = []
    for number in range(count):
        original = originals[number % len(originals)]
        start = Blob(original).header.payload_offset
        data = bytearray(original)
        for _ in range(1 + number % 4):
            at = int(rng.integers(start, len(data)))
            data[at] = int(rng.integers(0, 256))
        found.append((bytes(data), original))
    return found


def test_damaged_payloads() -> None:
    """Nothing is read or written out of bounds (run under compute-sanitizer), and damage to words is seen."""
    refused = seen = 0
    for data, _ in mutants(260):
        try:
            coded = on_device(data, None)
        except BlobError:
            refused += 1
            continue
        coded.integers()
        try:
            coded.check_lanes()
        except LaneStateError:
            seen += 1
    assert refused > 5
    assert seen > 50


def test_damaged_products() -> None:
    elements = samples.gaussian_elements((1, 300, 600), 5, 3, 1)
    data = encode_elements(elements, integer_layout("balanced", ElementKind.SIGNED, 5), tile_cols=96)
    tiles = np.frombuffer(data[Blob(data).header.payload_offset - 32 * Blob(data).header.num_tiles :], TILE_METADATA, 1)
    assert tiles[0]["mode"] == TileMode.RANS
    rng = np.random.default_rng(3)
    start = Blob(data).header.payload_offset
    seen = 0
    for _ in range(40):
        damaged = bytearray(data)
        # In the lanes' states, lengths and words; what changes in raw planes only a CRC tells.
        at = start + 32 + int(rng.integers(0, tiles[0]["raw_offset"] - 32 - 40))
        damaged[at : at + 40] = rng.integers(0, 256, 40).astype(np.uint8).tobytes()
        try:
            coded = on_device(bytes(damaged), np.ones(1, np.float32))
        except BlobError:
            continue  # offsets are checked before anything is launched
        for tokens in (1, 8):
            coded.linear(torch.ones(tokens, 600, device="cuda", dtype=torch.float16))
        with pytest.raises(LaneStateError, match="lanes did not end"):
            coded.check()
        seen += 1
    assert seen >= 20


@pytest.mark.parametrize("tokens", [1, 8, 64])
def test_graph_replay_sees_new_input(tokens: int) -> None:
    elements = samples.gaussian_elements((1, 512, 1024), 8, 20, 1)
    data = encode_elements(elements, integer_layout("balanced", ElementKind.SIGNED, 8), tile_cols=128)
    coded = on_device(data, np.full(1, 1 / 64, np.float32))
    x = torch.randn(tokens, 1024, device="cuda", dtype=torch.float16)
    coded.linear(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = coded.linear(x)
    for seed in range(3):
        torch.manual_seed(seed)
        x.copy_(torch.randn_like(x))
        y.fill_(float("nan"))
        graph.replay()
        assert torch.equal(y, coded.linear(x))


def test_slack_is_enough() -> None:
    assert SLACK_BYTES >= 2 * 2049


def grouped_error(weights: torch.Tensor, x: torch.Tensor, ids: torch.Tensor, got: torch.Tensor) -> float:
    """``weights`` [experts, …]; rows whose id is no expert's must be 0."""
    known = ids.where((ids >= 0) & (ids < len(weights)), -1).flatten()
    expected = torch.zeros(ids.numel(), weights.shape[1], dtype=torch.float64, device="cuda")
    for expert in range(len(weights)):
        pairs = torch.nonzero(known == expert)[:, 0]
        expected[pairs] = x[pairs // ids.shape[1]].double() @ weights[expert].T
    flat = got.reshape(expected.shape)
    assert not flat[known < 0].any()
    return float((flat.double() - expected).norm() / expected.norm().clamp(min=1e-30))


@pytest.mark.parametrize("tile_cols", [128, 512])
@pytest.mark.parametrize(("name", "bits"), [("fast", 5), ("balanced", 5), ("balanced", 8), ("compact", 4), ("fast", 8)])
@pytest.mark.parametrize("expands", [False, True])
def test_grouped_products(monkeypatch: pytest.MonkeyPatch, expands: bool, name: str, bits: int, tile_cols: int) -> None:
    """Of all numbers of tokens, and of one graph for other ids; many rows as for large matrices, too."""
    monkeypatch.setattr(grouped, "_ROWS_BY_WEIGHTS", 0.0 if expands else grouped._ROWS_BY_WEIGHTS)
    experts, rows, cols = 16, 500, 1003
    elements = samples.gaussian_elements((experts, rows, cols), bits, 0.9 * (1 << bits) / 8, bits)
    scales = np.random.default_rng(0).uniform(0.5, 1.5, experts * rows).astype(np.float32) / 64
    data = encode_elements(elements, integer_layout(name, ElementKind.SIGNED, bits), tile_cols=tile_cols)
    coded = on_device(data, scales)
    weights = coded.integers().double() * torch.from_numpy(scales).cuda().double().reshape(experts, rows, 1)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        # Many rows meet a matrix rounded to their type; one of fp32 is rounded to 16 bits of the largest of each chunk.
        tolerance = {torch.bfloat16: 5e-3, torch.float16: 1e-3, torch.float32: 5e-5}[dtype]
        few = () if expands else ((1, 1), (1, 8), (2, 2), (5, 4), (16, 8), (64, 8), (64, 2))
        for tokens, top_k in (*few, (700, 4)):
            x = torch.randn(tokens, cols, device="cuda").to(dtype)
            ids = torch.randint(-1, experts + 2, (tokens, top_k), device="cuda")
            ids[0, 0] = 3
            got = coded.grouped_linear(x, ids)
            assert got.shape == (tokens, top_k, rows)
            assert grouped_error(weights, x, ids, got) < tolerance, (dtype, tokens)
            assert torch.equal(got, coded.grouped_linear(x, ids))
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = coded.grouped_linear(x, ids)
            for _ in range(2):
                ids.copy_(torch.randint(-1, experts + 2, ids.shape, device="cuda"))
                ids[-1, -1] = 5
                graph.replay()
                assert grouped_error(weights, x, ids, out) < tolerance, (dtype, tokens, "graph")
    coded.check()
