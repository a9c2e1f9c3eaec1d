"""The weight kernels on the emulator, bit for bit against the CPU decoder."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import emulator
import numpy as np
import pytest
import sample_blobs as samples

torch = pytest.importorskip("torch")

from emulated_device import LIMITS, coded_tensor, emulated_launch  # noqa: E402
from happens_before import Detector, FakeStream, detecting  # noqa: E402

from kvpack.encode.blob_decoder import decode_integers, rotate_left  # noqa: E402
from kvpack.encode.blob_encoder import encode_elements  # noqa: E402
from kvpack.errors import DeviceError  # noqa: E402
from kvpack.format.blob import Blob  # noqa: E402
from kvpack.format.header import BlobHeader  # noqa: E402
from kvpack.format.layout import (  # noqa: E402
    TILE_ROWS,
    ElementKind,
    ceil_div,
    float_layouts,
    integer_layout,
)
from kvpack.runtime.device import kernels, semaphores  # noqa: E402
from kvpack.runtime.device.devices import Limits  # noqa: E402
from kvpack.runtime.weights import expansion, products  # noqa: E402
from kvpack.runtime.weights.launch_model import fit_gemm, fit_gemv, gemm_launches, gemv_launches  # noqa: E402

_DATA = Path(__file__).parents[1] / "data"
GOLDEN = sorted(path for folder in ("v1", "v1-trellis") for path in (_DATA / folder).glob("*.blob"))

pytestmark = pytest.mark.skipif(emulator.compiler() is None, reason="no C++ compiler for the emulator")


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "launch", emulated_launch)


def poisoned(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Memory that no kernel would write by chance."""
    return torch.full((int(np.prod(shape)) * dtype.itemsize,), 0xA5, dtype=torch.uint8).view(dtype).reshape(shape)


def decoded_numbers(data: bytes) -> np.ndarray:
    coded = coded_tensor(data)
    dtype = torch.int16 if coded.has_outliers else products.NUMBER_TYPES[coded.layout.element_kind]
    header = coded.header
    out = poisoned((header.matrices, header.rows, header.cols), dtype)
    products.decode(coded, products.number_output(coded), out, LIMITS)
    assert coded.status.tolist() == [0, 0]
    return out.numpy()


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden_blobs(path: Path) -> None:
    data = path.read_bytes()
    expected = decode_integers(Blob(data))
    got = decoded_numbers(data)
    assert got.tobytes() == expected.tobytes()


def quantized(
    rows: int, cols: int, name: str, bits: int, *, tile_cols: int = 64, seed: int = 0
) -> tuple[bytes, np.ndarray]:
    """A blob of signed elements, and scales by row."""
    return samples.quantized_blob(rows, cols, integer_layout(name, ElementKind.SIGNED, bits), tile_cols, seed)


def blob_of_several_tables() -> bytes:
    """Tiles of every mode; rans ones with different tables."""
    elements = samples.mixed_elements()[1:].copy()
    elements[:, :256, :32] = samples.gaussian_elements((1, 256, 32), 6, 3.0, 4)
    return encode_elements(elements, integer_layout("compact", ElementKind.SIGNED, 6), tile_cols=32)


def dense(data: bytes, scales: np.ndarray) -> np.ndarray:
    """The dequantized matrices, fp32, as FORMAT.md §8 says."""
    integers = decode_integers(Blob(data))
    by_row = np.broadcast_to(scales, integers.shape[0] * integers.shape[1]).reshape(*integers.shape[:2], 1)
    return integers.astype(np.float32) * by_row


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("mode", ["rans", "raw", "constant"])
def test_dequantize_with_outliers(mode: str, dtype: torch.dtype) -> None:
    data, scales = samples.blob_with_outliers(mode)
    coded = coded_tensor(data, scales)
    out = poisoned((1, coded.header.rows, coded.header.cols), dtype)
    products.decode(coded, products.OUTPUTS[dtype], out, LIMITS)
    assert torch.equal(out, torch.from_numpy(dense(data, scales)).to(dtype))


@pytest.mark.parametrize(
    ("name", "bits"), [("balanced", 8), ("balanced", 5), ("fast", 5), ("compact", 4), ("balanced", 3)]
)
@pytest.mark.parametrize("cols", [136, 131])
def test_dequantize(name: str, bits: int, cols: int) -> None:
    data, scales = quantized(100, cols, name, bits)
    coded = coded_tensor(data, scales)
    for dtype in (torch.float16, torch.bfloat16):
        out = poisoned((1, 100, cols), dtype)
        products.decode(coded, products.OUTPUTS[dtype], out, LIMITS)
        assert torch.equal(out, torch.from_numpy(dense(data, scales)).to(dtype))


def test_decode_some_rows() -> None:
    data, scales = quantized(300, 200, "balanced", 5)
    coded = coded_tensor(data, scales)
    expected = torch.from_numpy(dense(data, scales)).to(torch.float16)[0]
    for first, end in ((0, 256), (256, 300), (64, 96)):
        out = poisoned((end - first, 200), torch.float16)
        products.decode(coded, products.OUTPUTS[torch.float16], out, LIMITS, (first, end))
        assert torch.equal(out, expected[first:end])


def check_product(
    data: bytes,
    scales: np.ndarray,
    tokens: int,
    dtype: torch.dtype,
    *,
    bias: bool = False,
    tolerance: float = 1e-3,
    vectors: tuple[np.ndarray | None, np.ndarray | None] = (None, None),
) -> None:
    """``vectors``: row offsets and column scales."""
    coded = coded_tensor(data, scales, *vectors)
    weights = dense_with(data, scales, *vectors)[0].astype(np.float64)
    rng = np.random.default_rng(tokens)
    x = torch.from_numpy(rng.normal(0, 1, (tokens, weights.shape[1]))).to(dtype)
    b = torch.from_numpy(rng.normal(0, 1, len(weights))).to(dtype) if bias else None
    expected = x.double().numpy() @ weights.T + (0 if b is None else b.double().numpy())
    first = products.multiply(coded, x, b, LIMITS)
    assert coded.status.tolist() == [0, 0]
    error = np.linalg.norm(first.double().numpy() - expected) / np.linalg.norm(expected)
    # A result of bf16 has 8 bits itself.
    assert error < (tolerance if dtype != torch.bfloat16 else 3e-3)
    again = products.multiply(coded, x, b, LIMITS)
    assert torch.equal(first, again)


PRODUCTS = [
    ("balanced", 8, 1), ("balanced", 8, 5), ("balanced", 5, 1), ("balanced", 5, 16), ("fast", 5, 1), ("fast", 5, 9),
    ("compact", 4, 1), ("compact", 4, 8), ("balanced", 3, 1), ("balanced", 3, 20), ("balanced", 2, 1),
    ("fast", 8, 1), ("fast", 8, 2),
]  # fmt: skip


@pytest.mark.parametrize(("name", "bits", "tokens"), PRODUCTS)
def test_product(name: str, bits: int, tokens: int) -> None:
    data, scales = quantized(150, 333, name, bits)
    check_product(data, scales, tokens, torch.float16)


@pytest.mark.parametrize("tokens", [1, 5])
def test_product_by_any_launch(tokens: int) -> None:
    """Panels, teams, members and runs of every proportion: among them narrower last panels, and long runs of teams."""
    data, scales = quantized(300, 430, "balanced", 5)
    coded = coded_tensor(data, scales)
    shape = (coded.header, coded.word_buffer_bytes, LIMITS, 8)
    launches = [fit for _, fit in (gemv_launches(*shape) if tokens == 1 else gemm_launches(*shape, 1))]
    together = [fit for fit in launches if fit.members > 1]
    narrower = [fit for fit in together if fit.panels > 1 and fit.last_members < fit.members]
    long = [fit for fit in together if fit.run_quotient > 1]
    longer_than_teams = [fit for fit in long if fit.run_quotient > fit.members]
    rng = np.random.default_rng(0)
    tried = [
        kind[i] for kind in (launches, together, narrower, long, longer_than_teams) for i in rng.choice(len(kind), 5)
    ]
    x = torch.from_numpy(rng.normal(0, 1, (tokens, 430))).to(torch.float16)
    expected = x.double().numpy() @ dense(data, scales)[0].astype(np.float64).T
    for fit in tried:
        got = products.multiply(coded, x, None, LIMITS, fit).double().numpy()
        assert np.linalg.norm(got - expected) / np.linalg.norm(expected) < 1e-3, fit


@pytest.mark.parametrize("tokens", [1, 12])
def test_order_of_blocks_does_not_show(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    """The same bits whichever panel comes last, from semaphores that each launch leaves at 0."""
    data, scales = quantized(150, 700, "balanced", 5)
    coded = coded_tensor(data, scales)
    shape = (coded.header, coded.word_buffer_bytes, LIMITS, 4)
    launches = gemv_launches(*shape) if tokens == 1 else gemm_launches(*shape, 2)
    fit = next(fit for _, fit in launches if fit.panels > 4 and fit.members > 1)
    x = torch.from_numpy(np.random.default_rng(0).normal(0, 1, (tokens, 700))).to(torch.float16)
    arrivals = torch.zeros(64, dtype=torch.int32)
    monkeypatch.setattr(semaphores, "take", lambda count, device: arrivals)
    results = []
    for seed in range(4):
        monkeypatch.setattr(kernels, "launch", functools.partial(emulated_launch, shuffle_seed=seed))
        results.append(products.multiply(coded, x, None, LIMITS, fit))
        assert not arrivals.any()
    assert all(torch.equal(result, results[0]) for result in results)


def test_tables_share_no_semaphores(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product of several tables may be broken off, or meet another thread's, between its launches."""
    data = blob_of_several_tables()
    coded = coded_tensor(data, np.full(1, 0.1, np.float32))
    assert len(coded.tables) > 1
    monkeypatch.setattr(semaphores, "take", lambda count, device: pytest.fail("shared semaphores"))
    products.multiply(coded, torch.ones(1, coded.header.cols, dtype=torch.float16), None, LIMITS)


@pytest.mark.parametrize(("architecture", "multiprocessors"), [(86, 10), (87, 8), (89, 24), (90, 132), (120, 170)])
def test_every_gpu_has_a_launch(architecture: int, multiprocessors: int) -> None:
    """Also where a wide matrix has more panels than blocks are resident."""
    shared_bytes = 228 << 10 if architecture == 90 else 100 << 10
    limits = Limits(architecture, multiprocessors, shared_bytes, shared_bytes - 1024)
    layout = integer_layout("balanced", ElementKind.SIGNED, 8)
    for cols, tile_cols in itertools.product((128, 4096, 28672), (32, 256, 512)):
        header = BlobHeader(layout=layout, matrices=1, rows=4096, cols=cols, tile_cols=tile_cols)
        for word_buffer_bytes in (1024, 17 << 10):
            shape = (header, word_buffer_bytes, limits)
            fits = [fit_gemv(*shape, products.gemv_warps(layout, architecture))]
            # Activations of 64 vectors may be too many for a small GPU: two launches multiply them.
            fits += [fit_gemm(*shape, products.gemm_warps(layout, n, architecture), n) for n in (1, 2, 4)]
            many = fit_gemm(*shape, products.gemm_warps(layout, 8, architecture), 8)
            assert many is not None or shared_bytes < 228 << 10
            for fit in (*fits, *([many] if many else [])):
                assert fit.members * fit.teams <= 32
                assert fit.members == 1 or fit.teams <= 15  # barriers
                assert fit.shared_bytes <= limits.shared_block_bytes
                assert fit.blocks * fit.teams * fit.run_quotient + fit.run_remainder == 128
                assert (fit.panels - 1) * fit.panel_width < header.num_tiles_col <= fit.panels * fit.panel_width


SMALL = Limits(89, 24, 100 << 10, 99 << 10)


@pytest.mark.parametrize(("bits", "tokens", "parts"), [(5, 20, [8, 8, 4]), (5, 7, [7]), (8, 3, [1, 1, 1]), (8, 1, [1])])
def test_long_tiles_on_a_small_gpu(monkeypatch: pytest.MonkeyPatch, bits: int, tokens: int, parts: list[int]) -> None:
    """2048 columns leave no room for the activations of all vectors beside the words: they come a few at a time."""
    elements = samples.gaussian_elements((1, 40, 2048), bits, 2 ** (bits - 3), bits)
    data = encode_elements(elements, integer_layout("compact", ElementKind.SIGNED, bits))
    assert Blob(data).header.tile_cols == 2048
    scales = np.full(1, 2.0**-bits, np.float32)
    coded, weights = coded_tensor(data, scales), dense(data, scales)[0].astype(np.float64)
    products.check_fits(coded.header, coded.max_group_words, SMALL)
    x = torch.from_numpy(np.random.default_rng(bits).normal(0, 1, (tokens, 2048))).to(torch.float16)
    bias = torch.arange(40, dtype=torch.float16)
    launched, launch = [], kernels.launch

    def note(kernel: Any, grid: Any, block: Any, arguments: Any, **options: Any) -> None:
        assert options["shared_bytes"] <= SMALL.shared_block_bytes
        launched.append(arguments[0].shape[0])
        launch(kernel, grid, block, arguments, **options)

    monkeypatch.setattr(kernels, "launch", note)
    got = products.multiply(coded, x, bias, SMALL).double().numpy()
    assert launched == parts
    expected = x.double().numpy() @ weights.T + bias.double().numpy()
    assert np.linalg.norm(got - expected) / np.linalg.norm(expected) < 1e-3


@pytest.mark.parametrize("name", ["compact", "balanced"])
def test_tiles_that_no_block_can_hold_are_refused(name: str) -> None:
    """Twelve bits a step, as many as there can be, in tiles of 2048 columns."""
    layout = integer_layout(name, ElementKind.SIGNED, 8)
    header = BlobHeader(layout=layout, rows=4096, cols=4096, tile_cols=2048)
    steps = 2048 // layout.codes_per_symbol
    words = 32 * steps * 12 // 16
    products.check_fits(header, words, LIMITS)
    if name == "balanced":
        products.check_fits(header, words, SMALL)
        return
    with pytest.raises(DeviceError, match=r"2048 columns .* 100 KiB of words .* 99 KiB of shared .* --tile-cols 1024"):
        products.check_fits(header, words, SMALL)
    coded = replace(coded_tensor(*quantized(40, 96, "compact", 8)), header=header, max_group_words=words)
    for tokens in (1, 2, 32, 64):
        with pytest.raises(DeviceError, match="--tile-cols 1024"):
            products.multiply(coded, torch.ones(tokens, 4096, dtype=torch.float16), None, SMALL)
    with pytest.raises(DeviceError, match="--tile-cols 1024"):
        products.decode(coded, products.OUTPUTS[torch.float16], None, SMALL)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tokens", [1, 3, 50])
def test_product_types_and_bias(tokens: int, dtype: torch.dtype) -> None:
    data, scales = quantized(1000, 96, "balanced", 5, tile_cols=32)
    check_product(data, scales[:1], tokens, dtype, bias=True)


@pytest.mark.parametrize("tokens", [1, 3])
def test_largest_activations(tokens: int) -> None:
    """Near the largest of bf16, where 1/x is a denormal, which the approximate reciprocal flushes to zero.

    Sums are of integers, before scales: the large activation meets 1 and 0, so that none overflows.
    """
    elements = samples.gaussian_elements((1, 64, 64), 5, 3, 1)
    elements[:, :, 3] = 16 + np.arange(64) % 2
    data = encode_elements(elements, integer_layout("balanced", ElementKind.SIGNED, 5), tile_cols=32)
    scales = np.full(1, 1 / 64, np.float32)
    coded, weights = coded_tensor(data, scales), dense(data, scales)[0].astype(np.float64)
    x = torch.from_numpy(np.random.default_rng(1).normal(0, 1, (tokens, 64))).to(torch.bfloat16)
    for power in (125, 126, 127):
        x[:, 3] = 1.9 * 2.0**power
        expected = x.double().numpy() @ weights.T
        got = products.multiply(coded, x, None, LIMITS).double().numpy()
        assert np.linalg.norm(got - expected) / np.linalg.norm(expected) < 3e-3


@pytest.mark.parametrize("tokens", [1, 3, 50])
def test_smallest_activations(tokens: int) -> None:
    """Near 2^-110: no partial sum becomes denormal, which kernels flush to zero."""
    data, scales = quantized(64, 96, "balanced", 5, tile_cols=32)
    coded, weights = coded_tensor(data, scales), dense(data, scales)[0].astype(np.float64)
    x = torch.from_numpy(np.random.default_rng(1).normal(0, 2.0**-110, (tokens, 96))).to(torch.bfloat16)
    expected = x.double().numpy() @ weights.T
    got = products.multiply(coded, x, None, LIMITS).double().numpy()
    assert np.linalg.norm(got - expected) / np.linalg.norm(expected) < 3e-3


def test_partial_sums_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    data, scales = quantized(150, 700, "balanced", 5)
    coded = coded_tensor(data, scales)
    panels = []
    monkeypatch.setattr(kernels, "launch", lambda kernel, grid, *args, **options: panels.append(grid[1]))
    x = torch.ones(2, 700, dtype=torch.float16)
    for limit, bound in ((64 << 20, 11), (3 * 4 * 8 * 160, 3), (0, 1)):
        monkeypatch.setattr(products, "PARTIALS_BYTES", limit)
        assert products.max_panels(coded, 8) == bound
        products.multiply(coded, x, None, LIMITS)
        assert panels.pop() <= bound
    header = BlobHeader(layout=coded.layout, matrices=1, rows=32, cols=1 << 22, tile_cols=32)
    assert fit_gemv(header, 1024, Limits(90, 132, 228 << 10, 227 << 10), 8).panels <= 65535


# Row offsets and column scales


def vectors_of(data: bytes, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Column scales from 2^-8 to 2^8 that fp16 holds, and offsets as large as the numbers; f32 both."""
    header, rng = Blob(data).header, np.random.default_rng(seed)
    columns = np.exp2(rng.uniform(-8, 8, header.matrices * header.cols)).astype(np.float16).astype(np.float32)
    return columns, rng.normal(0, 4, header.matrices * header.rows).astype(np.float32)


def dense_with(data: bytes, scales: np.ndarray, offsets: np.ndarray | None, columns: np.ndarray | None) -> np.ndarray:
    weights = dense(data, scales)
    matrices, rows, cols = weights.shape
    if offsets is not None:
        weights = weights + offsets.reshape(matrices, rows, 1)
    return weights if columns is None else weights * columns.reshape(matrices, 1, cols)


WHICH = [(True, False), (False, True), (True, True)]


@pytest.mark.parametrize(("has_columns", "has_offsets"), WHICH)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("mode", ["rans", "raw", "constant"])
def test_dequantize_with_vectors(mode: str, dtype: torch.dtype, has_columns: bool, has_offsets: bool) -> None:
    """Each operation rounded once, outliers too: the same bits as the reader's."""
    data, scales = samples.blob_with_outliers(mode)
    columns, offsets = vectors_of(data, 5)
    given = offsets if has_offsets else None, columns if has_columns else None
    coded = coded_tensor(data, scales, *given)
    out = poisoned((1, coded.header.rows, coded.header.cols), dtype)
    products.decode(coded, products.OUTPUTS[dtype], out, LIMITS)
    assert torch.equal(out, torch.from_numpy(dense_with(data, scales, *given)).to(dtype))


@pytest.mark.parametrize("name", ["balanced", "fast", "compact"])
def test_dequantize_stacks_and_padding_with_vectors(name: str) -> None:
    """Two matrices of 131 columns, the last of which are padding of a chunk; results that are denormal."""
    elements = samples.gaussian_elements((2, 40, 131), 5, 4.0, 6)
    data = encode_elements(elements, integer_layout(name, ElementKind.SIGNED, 5), tile_cols=96)
    scales = np.full(80, 2.0**-122, np.float32)
    columns, offsets = vectors_of(data, 7)
    offsets *= np.float32(2.0**-122)
    coded = coded_tensor(data, scales, offsets, columns)
    expected = dense_with(data, scales, offsets, columns)
    assert ((expected != 0) & (np.abs(expected) < np.finfo(np.float32).tiny)).any()
    out = poisoned((2, 40, 131), torch.float32)
    products.decode(coded, products.OUTPUTS[torch.float32], out, LIMITS)
    assert np.array_equal(out.numpy().view(np.int32), expected.view(np.int32))


@pytest.mark.parametrize(("has_columns", "has_offsets"), WHICH)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tokens", [1, 11, 40])
def test_product_with_vectors(tokens: int, dtype: torch.dtype, has_columns: bool, has_offsets: bool) -> None:
    data, scales = samples.blob_with_outliers("rans")
    columns, offsets = vectors_of(data, 8)
    given = offsets if has_offsets else None, columns if has_columns else None
    check_product(data, scales, tokens, dtype, bias=True, vectors=given)


@pytest.mark.parametrize(("has_columns", "has_offsets"), [(False, False), *WHICH])
@pytest.mark.parametrize("tokens", [2, 9, 32])
def test_fp32_vectors_are_as_exact_as_fp32(tokens: int, has_columns: bool, has_offsets: bool) -> None:
    """With column scales, too, times which halves of activations are no numbers of fp16."""
    data, scales = quantized(64, 333, "balanced", 5)
    rng = np.random.default_rng(tokens)
    columns = rng.lognormal(0, 1, 333).astype(np.float16).astype(np.float32) if has_columns else None
    offsets = rng.normal(0, 1, 64).astype(np.float32) if has_offsets else None
    x, bias = (torch.from_numpy(rng.normal(0, 1, shape).astype(np.float32)) for shape in ((tokens, 333), (64,)))
    weights = dense(data, scales)[0].astype(np.float64)
    weights = (weights if offsets is None else weights + offsets[:, None]) * (1 if columns is None else columns)
    expected = x.double().numpy() @ weights.T + bias.double().numpy()
    got = products.multiply_fp32(coded_tensor(data, scales, offsets, columns), x, bias, LIMITS).double().numpy()
    assert np.linalg.norm(got - expected) < 1e-6 * np.linalg.norm(expected)


@pytest.mark.parametrize(("name", "bits", "tokens"), [("fast", 5, 9), ("compact", 4, 8), ("balanced", 8, 20)])
def test_product_of_layouts_with_column_scales(name: str, bits: int, tokens: int) -> None:
    """Of 333 columns, 13 are in the last chunk."""
    data, scales = quantized(70, 333, name, bits)
    check_product(data, scales, tokens, torch.float16, vectors=(None, vectors_of(data, 9)[0]))


def test_activations_times_column_scales_beyond_fp16() -> None:
    """Products of fp16 numbers lie beyond its range at both ends; a token's power of two brings them back."""
    data, scales = quantized(64, 128, "balanced", 5)
    for factor in (2.0**15, 2.0**-14):
        columns = np.full(128, factor, np.float32)
        for tokens, size in ((1, 16384.0), (3, 16384.0), (1, 2.0**-12), (3, 2.0**-12)):
            coded = coded_tensor(data, scales * np.float32(1 / factor / size), None, columns)
            x = torch.from_numpy(np.random.default_rng(1).normal(0, 1, (tokens, 128)) * size).to(torch.float16)
            expected = x.double().numpy() / size @ dense(data, scales)[0].T.astype(np.float64)
            got = products.multiply(coded, x, None, LIMITS).double().numpy()
            assert np.linalg.norm(got - expected) < 1e-3 * np.linalg.norm(expected)


def test_row_offsets_that_cancel_the_product() -> None:
    """Results a thousandth of both terms: they are added in fp32."""
    data, scales = quantized(64, 128, "balanced", 5)
    weights = dense(data, scales)[0].astype(np.float64)
    x = torch.ones(2, 128, dtype=torch.float16)
    offsets = (-weights.mean(1) * 0.999).astype(np.float32)
    got = products.multiply(coded_tensor(data, scales, offsets), x, None, LIMITS).double().numpy()
    expected = np.broadcast_to((weights + offsets[:, None]).sum(1), (2, 64))
    large = np.abs(weights.sum(1)) > np.abs(weights.sum(1)).mean()
    assert np.abs(got / expected - 1)[:, large].max() < 0.02


@pytest.mark.parametrize("mode", ["rans", "raw", "constant"])
@pytest.mark.parametrize("tokens", [1, 11, 64])
def test_product_with_outliers(mode: str, tokens: int) -> None:
    data, scales = samples.blob_with_outliers(mode)
    check_product(data, scales, tokens, torch.float16)


def test_groups_of_more_outliers_than_the_low_bits_count() -> None:
    """A group's entry has its outliers' number in two fields, of 13 and 4 bits (``group_table``)."""
    elements = samples.gaussian_elements((1, 32, 320), 5, 3, 1)
    every = np.ndindex(32, 320)
    outliers = [(0, row, col, 37 * (row + 1) - col or 1) for row, col in every if (row + col) % 9]
    assert 1 << 13 < len(outliers) < elements.size
    data = samples.encode_with_outliers(
        elements, outliers, integer_layout("balanced", ElementKind.SIGNED, 5), tile_cols=320
    )
    assert np.array_equal(decoded_numbers(data), decode_integers(Blob(data)))
    check_product(data, np.full(1, 0.37, np.float32), 1, torch.float16)


@pytest.mark.parametrize("tokens", [1, 5, 0])
@pytest.mark.parametrize("what", ["columns", "order"])
def test_outliers_that_change_after_the_check(what: str, tokens: int) -> None:
    """As in a file that changes under a stream: results are wrong, and nothing out of bounds is touched."""
    data, scales = samples.blob_with_outliers("rans")
    coded, blob = coded_tensor(data, scales), Blob(data)
    for tile in blob.tiles:
        at = blob.header.payload_offset + int(tile["data_offset"]) + int(tile["outlier_offset"])
        outliers = coded.blob.numpy()[at : at + 4 * int(tile["outlier_count"])].view("<u4")
        if what == "columns":
            outliers |= 0x1FF << 15
        elif len(outliers) > 1:
            row = outliers[0] >> 24 << 24
            outliers[:2] = row | 60 << 15 | 5, row | 1 << 15 | 5
    if tokens == 0:
        out = poisoned((1, 70, 150), torch.float16)
        products.decode(coded, products.OUTPUTS[torch.float16], out, LIMITS)
    else:
        x = torch.ones(tokens, 150, dtype=torch.float16)
        got = products.multiply(coded, x, None, LIMITS)
        assert got.shape == (tokens, 70)
        assert got.isfinite().all()


@pytest.mark.parametrize("tokens", [1, 7])
def test_product_of_mixed_tiles(tokens: int) -> None:
    data = blob_of_several_tables()
    assert Blob(data).header.num_tables > 1
    assert len(set(Blob(data).tiles["mode"].tolist())) == 3
    check_product(data, np.full(1, 0.1, np.float32), tokens, torch.float16)


@pytest.mark.parametrize("tokens", [1, 4])
def test_product_with_predictor(tokens: int) -> None:
    rng = np.random.default_rng(3)
    steps = np.rint(rng.normal(0, 12, (1, 64, 200))).astype(int)  # of which folded codes are mostly 0, not all
    elements = ((np.cumsum(steps, axis=2) + 128) % 256).astype(np.uint8)
    layout = integer_layout("balanced", ElementKind.SIGNED, 8)
    data = encode_elements(elements, layout, tile_cols=96, predictor=samples.Predictor.PREVIOUS)
    assert Blob(data).tiles["predictor"].any()
    check_product(data, np.full(1, 0.1, np.float32), tokens, torch.float16)


@pytest.mark.parametrize("tokens", [1, 2])
def test_massive_activations(tokens: int) -> None:
    """Two activations 1,000 times the rest must not drown it: their columns' weights are 0."""
    elements = samples.gaussian_elements((1, 32, 14336), 8, 20, 5)
    elements[:, :, [100, 11500]] = 128
    data = encode_elements(elements, integer_layout("balanced", ElementKind.SIGNED, 8), tile_cols=128)
    scales = np.full(1, 1 / 64, np.float32)
    coded, weights = coded_tensor(data, scales), dense(data, scales)[0].astype(np.float64)
    x = torch.from_numpy(np.random.default_rng(1).normal(0, 1, (tokens, 14336))).to(torch.float16)
    x[:, [100, 11500]] = 1000
    expected = x.double().numpy() @ weights.T
    got = products.multiply(coded, x, None, LIMITS).double().numpy()
    assert np.linalg.norm(got - expected) / np.linalg.norm(expected) < 1e-3


# Products of many vectors ---------------------------------------------------------------------------------------------


@pytest.fixture
def detector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Detector]:
    with detecting(monkeypatch) as found:
        sides: dict[FakeStream, FakeStream] = {}
        monkeypatch.setattr(expansion, "_side_stream", lambda main: sides.setdefault(main, FakeStream(found)))
        yield found


class Expansion:
    """What a product of many vectors does: staging buffers, the rows decoded into them, and on which streams."""

    def __init__(self, detector: Detector, monkeypatch: pytest.MonkeyPatch, staging_bytes: int) -> None:
        self.buffers: list[int] = []
        self.steps: list[tuple[str, int, int, FakeStream]] = []  # what, buffer, rows, on which stream
        self.decoded: list[tuple[int, int]] = []
        self.detector = detector
        empty, decode = torch.empty, products.decode

        def watched_empty(*arguments: Any, **options: Any) -> torch.Tensor:
            tensor = empty(*arguments, **options)
            detector.watch(tensor, "a buffer")
            detector.access(tensor, write=True)  # whoever had this memory before wrote to it on this stream
            self.buffers.append(tensor.nbytes)
            return tensor

        def watched_decode(coded: Any, output: int, out: torch.Tensor, limits: Limits, rows: tuple[int, int]) -> None:
            detector.access(out, write=True)
            self.steps.append(("decode", out.untyped_storage().data_ptr(), len(out), detector.current))
            self.decoded.append(rows)
            out.fill_(float("nan"))
            decode(coded, output, out, limits, rows)

        def watched(multiply: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
            def call(*operands: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
                weights = operands[-1]
                detector.access(weights, write=False)
                detector.access(out, write=True)
                self.steps.append(
                    ("multiply", weights.untyped_storage().data_ptr(), weights.shape[1], detector.current)
                )
                return multiply(*operands, out=out)

            return call

        monkeypatch.setattr(expansion, "STAGING_BYTES", staging_bytes)
        monkeypatch.setattr(torch, "empty", watched_empty)
        monkeypatch.setattr(products, "decode", watched_decode)
        monkeypatch.setattr(torch, "mm", watched(torch.mm))
        monkeypatch.setattr(torch, "addmm", watched(torch.addmm))


def expanded_operands(kind: ElementKind, rows: int, cols: int) -> tuple[Any, torch.Tensor]:
    """A coded matrix, quantized or of bf16, and its numbers in fp32."""
    if kind == ElementKind.SIGNED:
        data, scales = quantized(rows, cols, "balanced", 5)
        return coded_tensor(data, scales), torch.from_numpy(dense(data, scales)[0])
    values = torch.from_numpy(np.random.default_rng(4).normal(0, 0.05, (rows, cols))).to(torch.bfloat16)
    elements = rotate_left(values.view(torch.int16).numpy().view(np.uint16), 16)
    return coded_tensor(encode_elements(elements, float_layouts(kind)[0], tile_cols=64)), values.float()


@pytest.mark.parametrize("kind", [ElementKind.SIGNED, ElementKind.BF16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("rows", "parts"), [(256, 1), (512, 1), (513, 3), (1100, 5)])
def test_expanded_products(
    detector: Detector,
    monkeypatch: pytest.MonkeyPatch,
    kind: ElementKind,
    dtype: torch.dtype,
    bias: bool,
    rows: int,
    parts: int,
) -> None:
    """A large matrix goes through two buffers, the next part being decoded on a side stream; numbers are the same."""
    cols = 40
    coded, weights = expanded_operands(kind, rows, cols)
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(33, cols, generator=generator).to(dtype)
    b = torch.randn(rows, generator=generator).to(dtype) if bias else None
    staged = dtype if kind == ElementKind.SIGNED else torch.bfloat16
    expected = x.double() @ weights.to(staged).to(dtype).double().T + (0 if b is None else b.double())

    seen = Expansion(detector, monkeypatch, TILE_ROWS * cols * staged.itemsize)
    got = expansion.multiply(coded, x, b, LIMITS)
    assert got.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), expected, rtol=4 * eps, atol=8 * eps)
    assert coded.status.tolist() == [0, 0]

    step = rows if parts == 1 else TILE_ROWS  # what both buffers hold is expanded at once
    assert parts == ceil_div(rows, step)
    assert seen.decoded == [(first, min(first + step, rows)) for first in range(0, rows, step)]
    sizes = [end - first for first, end in seen.decoded]
    buffers = [33 * rows * dtype.itemsize] + [step * cols * staged.itemsize] * min(parts, 2)
    assert seen.buffers == buffers
    decodes, multiplications = ([step[1:] for step in seen.steps if step[0] == what] for what in ("decode", "multiply"))
    assert [size for _, size, _ in decodes] == [size for _, size, _ in multiplications] == sizes
    assert len({buffer for buffer, _, _ in decodes}) == min(parts, 2)
    assert [buffer for buffer, _, _ in decodes] == [decodes[index % 2][0] for index in range(parts)]
    assert {stream for _, _, stream in multiplications} == {detector.default}
    if parts == 1:
        assert decodes[0][2] is detector.default
        return
    assert len({stream for _, _, stream in decodes}) == 1
    assert decodes[0][2] is not detector.default
    # Part n + 1 is enqueued before the product with part n, so that they can run side by side.
    order = [what for what, *_ in seen.steps]
    assert order == ["decode", *["decode", "multiply"] * (parts - 1), "multiply"]
    assert not detector.races
    # Whoever uses the result, or gets the buffers' memory, on this stream is behind all of it.
    known = detector.default.clock
    assert all(known.get(stream, 0) >= time for stream, time in decodes[0][2].clock.items())


@pytest.mark.parametrize(
    ("method", "race"),
    [
        ("wait_event", {"overwritten before it was read", "read before it was written"}),
        ("wait_stream", {"written twice"}),
    ],
)
def test_expanded_products_need_each_wait(
    detector: Detector, monkeypatch: pytest.MonkeyPatch, method: str, race: set[str]
) -> None:
    coded, _ = expanded_operands(ElementKind.SIGNED, 1100, 40)
    Expansion(detector, monkeypatch, TILE_ROWS * 40 * 4)
    x = torch.randn(33, 40)
    expansion.multiply(coded, x, None, LIMITS)
    assert not detector.races
    monkeypatch.setattr(FakeStream, method, lambda _self, _other: None)
    expansion.multiply(coded, x, None, LIMITS)
    assert {found.partition(": ")[2] for found in detector.races} == race
    detector.races.clear()


def test_failed_expansion_is_waited_for(detector: Detector, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has been enqueued must not outlive the buffers: their memory is handed out on this stream."""
    coded, _ = expanded_operands(ElementKind.SIGNED, 1100, 40)
    seen = Expansion(detector, monkeypatch, TILE_ROWS * 40 * 4)

    def fail(*_operands: Any, **_options: Any) -> None:
        raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr(torch, "mm", fail)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        expansion.multiply(coded, torch.randn(33, 40), None, LIMITS)
    side = seen.steps[-1][3]
    assert side is not detector.default
    assert detector.default.clock[side.cuda_stream] == side.clock[side.cuda_stream]


@pytest.mark.parametrize(
    ("rows", "cols", "element_bytes", "step"),
    [
        (4100, 4096, 2, 4352),  # 32 MiB: at once
        (32768, 4096, 2, 32768),  # 256 MiB: as well, as two buffers would take as much
        (33024, 4096, 2, 11008),  # three parts of a size, not two full ones and a rest
        (512, 1 << 20, 4, TILE_ROWS),  # a tile's rows, however large
    ],
)
def test_parts_of_expanded_products(rows: int, cols: int, element_bytes: int, step: int) -> None:
    assert expansion.part_rows(rows, cols, element_bytes) == step
    assert step % TILE_ROWS == 0
    buffers = 2 if step < rows else 1
    assert step == TILE_ROWS or buffers * min(step, rows) * cols * element_bytes <= 2 * expansion.STAGING_BYTES
