"""Quantizers of whole matrices: what the CPU's must satisfy, and kernels that must give its bytes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kvpack.bench import matrix_quantizer_reference as reference
from kvpack.bench.matrix_quantizer_reference import (
    FORMATS,
    LIMITS,
    Axis,
    MatrixAxisError,
    MatrixFormatError,
    MatrixShapeError,
    MatrixTypeError,
    MatrixVariantError,
    QuantizedMatrix,
    check_sizes,
    dequantize_matrix,
    matrix_codes,
    parse_format,
    quantize_matrix,
    row_bytes,
)
from kvpack.format.pages import PageFormat

NARROW = (PageFormat.INT4, PageFormat.INT3, PageFormat.INT2)
FP8 = {PageFormat.FP8_E4M3: ml_dtypes.float8_e4m3fn, PageFormat.FP8_E5M2: ml_dtypes.float8_e5m2}
DTYPES = (np.float16, ml_dtypes.bfloat16, np.float32)


def unpacked(quantized: QuantizedMatrix) -> np.ndarray:
    """Codes [T, 8 · octets], read as the docstring has them: an octet is one little-endian number."""
    bits = quantized.format.element_bits
    octets = quantized.codes.reshape(len(quantized.codes), -1, bits)
    numbers = [[int.from_bytes(octet.tobytes(), "little") for octet in row] for row in octets]
    return np.array([[n >> bits * i & (1 << bits) - 1 for n in row for i in range(8)] for row in numbers], np.uint8)


def spread(quantized: QuantizedMatrix) -> np.ndarray:
    """The scale of each element, as far as it broadcasts."""
    return quantized.scales[:, None] if quantized.axis == Axis.TOKEN else quantized.scales[None]


def assert_same_values(found: np.ndarray, expected: np.ndarray) -> None:
    """NaN in the same places: of a conversion it has other bits here and there."""
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found.astype(np.float32), expected.astype(np.float32))


def strange(rows: int, columns: int, dtype: Any, seed: int = 0) -> np.ndarray:
    """Channels and tokens of all sizes, zeros, infinities and NaN."""
    rng = np.random.default_rng(seed)
    x = rng.normal(0, 1, (rows, columns)).astype(np.float32)
    x *= np.exp2(rng.integers(-20, 10, (rows, 1))).astype(np.float32)
    x[:, columns // 2] = 0
    x[rows // 2] = 0
    x[0, 0], x[-1, -1] = np.inf, np.nan
    x[:, 1 % columns] *= np.float32(1e-9)
    if np.dtype(dtype) != np.float16:
        x[:, 3 % columns] = rng.choice(np.array([-1e-40, 1e-40, 2e-38, 0], np.float32), rows)
        x[:, 4 % columns] = rng.choice(np.array([-3e38, 3e38, 1e38, 1e-30], np.float32), rows)
    with np.errstate(over="ignore"):
        return x.astype(dtype)


matrices = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 9), st.integers(1, 19)),
    elements=st.floats(-(2.0**100), 2.0**100, width=32) | st.floats(-4, 4, width=32),
)


@given(matrices, st.sampled_from(FORMATS), st.sampled_from(Axis))
def test_errors_are_within_half_a_step(x: np.ndarray, page_format: PageFormat, axis: Axis) -> None:
    quantized = quantize_matrix(x, page_format, axis)
    s = np.broadcast_to(spread(quantized), x.shape).astype(np.float64)
    error = np.abs(dequantize_matrix(quantized).astype(np.float64) - x)
    bound = s / 2
    if page_format in FP8:
        fraction, least = (3, 2.0**-9) if page_format == PageFormat.FP8_E4M3 else (2, 2.0**-16)
        bound = np.maximum(np.abs(x) * 2.0 ** -(fraction + 1), s * least / 2)
    # 1/s and its product with x are rounded.
    assert (error <= bound * (1 + 1e-4))[s > 0].all()
    assert (np.abs(x)[s == 0] < 2.0**-100 * LIMITS[page_format]).all()
    assert (error == np.abs(x))[s == 0].all()


@given(hnp.arrays(np.uint8, st.tuples(st.integers(1, 5), st.integers(1, 27))), st.sampled_from(NARROW))
def test_packing_is_undone(codes: np.ndarray, page_format: PageFormat) -> None:
    """Values that lie on the levels come back as their codes, wherever they are packed."""
    half = 1 << (page_format.element_bits - 1)
    codes = codes % (2 * half)
    if page_format == PageFormat.INT4:
        codes = np.maximum(codes, 1)
    levels = codes.astype(np.float32) - np.float32(half if page_format == PageFormat.INT4 else half - 0.5)
    ones = np.ones(codes.shape[1], np.float32)
    packed = matrix_codes(levels, ones, page_format, Axis.CHANNEL)
    quantized = QuantizedMatrix(packed, ones, page_format, Axis.CHANNEL, codes.shape[1])
    assert packed.shape == (len(codes), row_bytes(codes.shape[1], page_format))
    assert np.array_equal(unpacked(quantized)[:, : codes.shape[1]], codes)
    assert (unpacked(quantized)[:, codes.shape[1] :] == half).all()
    assert np.array_equal(dequantize_matrix(quantized), levels)


@pytest.mark.parametrize("axis", Axis)
@pytest.mark.parametrize("page_format", FORMATS)
def test_every_level_is_used(page_format: PageFormat, axis: Axis) -> None:
    x = np.random.default_rng(1).uniform(-1, 1, (512, 512)).astype(np.float16)
    used = np.unique(unpacked(quantize_matrix(x, page_format, axis)))
    wasted = {PageFormat.INT8: {128}, PageFormat.INT4: {0}, PageFormat.INT3: set(), PageFormat.INT2: set()}
    if page_format not in FP8:
        assert set(range(1 << page_format.element_bits)) - set(used.tolist()) == wasted[page_format]


@pytest.mark.parametrize("page_format", FP8)
def test_fp8_rounds_as_ml_dtypes_do(page_format: PageFormat) -> None:
    rng = np.random.default_rng(2)
    x = (rng.choice([-1, 1], 200_000) * np.exp2(rng.uniform(-22, 8.8, 200_000))).astype(np.float32)
    x = np.concatenate([x, np.arange(256, dtype=np.uint8).view(FP8[page_format]).astype(np.float32)])
    x = x[np.isfinite(x) & (np.abs(x) <= LIMITS[page_format])][None]
    codes = matrix_codes(x, np.ones(1, np.float32), page_format, Axis.TOKEN)[:, : x.shape[1]]
    assert np.array_equal(codes, x.astype(FP8[page_format]).view(np.uint8))


def test_scales_that_are_too_small_or_too_large() -> None:
    least = np.float32(2.0**-100)
    x = np.array([[127 * least, 126 * least, 1e-45, -0.0, 3e38]], np.float32)
    quantized = quantize_matrix(x, 8)
    assert quantized.scales.tolist() == [least, 0, 0, 0, np.float32(3e38) / np.float32(127)]
    assert quantized.codes[0, :5].tolist() == [127, 0, 0, 0, 127]
    clamped = quantize_matrix(np.array([[3e38], [-3e38], [1e38], [1e37]], np.float32), 2)
    assert clamped.scales.tolist() == [2.0**126]
    assert unpacked(clamped)[:, 0].tolist() == [3, 0, 3, 2]


@pytest.mark.parametrize("axis", Axis)
@pytest.mark.parametrize("page_format", FORMATS)
def test_what_is_not_finite_is_nan_and_stays_alone(page_format: PageFormat, axis: Axis) -> None:
    x = np.random.default_rng(3).normal(0, 1, (6, 10)).astype(np.float16)
    x[2, 3], x[4, 7] = np.inf, np.nan
    quantized = quantize_matrix(x, page_format, axis)
    lost = {2, 4} if axis == Axis.TOKEN else {3, 7}
    assert set(np.flatnonzero(np.isnan(quantized.scales)).tolist()) == lost
    assert set(quantized.scales.view(np.uint32)[sorted(lost)].tolist()) == {0x7FC00000}
    values = dequantize_matrix(quantized)
    assert np.array_equal(np.isnan(values), np.broadcast_to(np.isnan(spread(quantized)), x.shape))
    codes = unpacked(quantized)[:, :10]
    zero_code = 1 << (page_format.element_bits - 1) if page_format in NARROW else 0
    assert (codes[np.isnan(values)] == zero_code).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_and_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch, dtype: Any) -> None:
    x = strange(50, 33, dtype)
    whole = [quantize_matrix(x, page_format, axis) for page_format in FORMATS for axis in Axis]
    monkeypatch.setattr(reference, "_CHUNK_ELEMENTS", 100)
    with ThreadPoolExecutor(3) as executor:
        for one in whole:
            again = quantize_matrix(x, one.format, one.axis, executor)
            assert np.array_equal(again.codes, one.codes)
            assert np.array_equal(again.scales.view(np.uint32), one.scales.view(np.uint32))
            assert_same_values(dequantize_matrix(again, dtype, executor), dequantize_matrix(one, dtype))


def test_what_is_refused() -> None:
    x = np.ones((4, 5), np.float16)
    for wrong in (1, 16, "int5", "fp16", PageFormat.BF16):
        with pytest.raises(MatrixFormatError, match="neither a width"):
            quantize_matrix(x, wrong)
    with pytest.raises(MatrixTypeError, match="float64"):
        quantize_matrix(x.astype(np.float64), 8)
    with pytest.raises(MatrixAxisError, match="'row'"):
        quantize_matrix(x, 8, "row")
    for shape in ((4,), (2, 3, 4), (0, 4), (4, 0)):
        with pytest.raises(MatrixShapeError):
            quantize_matrix(np.ones(shape, np.float16), 8)
    quantized = quantize_matrix(x, 8)
    with pytest.raises(MatrixTypeError, match="int8"):
        dequantize_matrix(quantized, np.int8)
    with pytest.raises(MatrixShapeError, match="13 columns"):
        check_sizes(quantized.codes.shape, quantized.scales.shape, PageFormat.INT8, Axis.CHANNEL, 13)
    assert [parse_format(bits) for bits in (8, 4, 3, 2)] == list(FORMATS[:4])


# --- kernels -------------------------------------------------------------------

torch = pytest.importorskip("torch")

import emulator  # noqa: E402
from emulated_device import emulated_launch  # noqa: E402

from kvpack.bench import matrix_quantizer as runtime  # noqa: E402
from kvpack.bench.matrix_quantizer import Variant  # noqa: E402
from kvpack.runtime.device import kernels  # noqa: E402

TORCH_DTYPES = {np.float16: torch.float16, ml_dtypes.bfloat16: torch.bfloat16, np.float32: torch.float32}
# Nothing a multiple of anything; rows of octets; rows of four octets, in several chunks; several strips of columns.
SHAPES = ((37, 21), (70, 72), (300, 32), (3, 2100))


def same_bytes(x: np.ndarray, device: str, page_format: PageFormat, axis: Axis, variant: Variant) -> None:
    """Scales, codes and values of the kernels are those of the CPU."""
    expected = quantize_matrix(x, page_format, axis)
    dtype = TORCH_DTYPES[x.dtype.type]
    matrix = runtime.as_tensor(x).to(device)
    scales, codes = runtime.scales_and_codes(matrix, page_format, axis, variant)
    assert np.array_equal(scales.cpu().numpy().view(np.uint32), expected.scales.view(np.uint32))
    assert np.array_equal(codes.cpu().numpy(), expected.codes)
    values = runtime.matrix_values(codes, scales, page_format, axis, x.shape[1], dtype, variant)
    assert_same_values(runtime.as_array(values.cpu()), dequantize_matrix(expected, x.dtype))


def emulated_cases() -> Iterator[tuple[Variant, Axis, PageFormat, Any]]:
    """All variants, axes and formats; the types in turn, so that each variant and format meets each."""
    for number, (page_format, axis, variant) in enumerate(itertools.product(FORMATS, Axis, Variant)):
        yield variant, axis, page_format, DTYPES[(number // 4 + variant) % 3]


@pytest.mark.skipif(emulator.compiler() is None, reason="no C++ compiler")
@pytest.mark.parametrize("page_format", FORMATS)
@pytest.mark.parametrize("variant", Variant)
def test_emulated_bytes(monkeypatch: pytest.MonkeyPatch, variant: Variant, page_format: PageFormat) -> None:
    monkeypatch.setattr(kernels, "launch", emulated_launch)
    for _, axis, _, dtype in (case for case in emulated_cases() if case[0] == variant and case[2] == page_format):
        for rows, columns in SHAPES:
            same_bytes(strange(rows, columns, dtype), "cpu", page_format, axis, variant)


@pytest.mark.skipif(emulator.compiler() is None, reason="no C++ compiler")
def test_columns_of_many_blocks_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    def shuffled(*arguments: Any, **options: Any) -> None:
        emulated_launch(*arguments, **options, shuffle_seed=7)

    monkeypatch.setattr(kernels, "launch", shuffled)
    x = strange(400, 21, np.float16)
    for variant in (Variant.TILED, Variant.COARSENED, Variant.VECTORIZED):
        same_bytes(x, "cpu", PageFormat.INT8, Axis.CHANNEL, variant)


def test_every_format_and_variant_is_emulated_with_each_axis_and_type() -> None:
    cases = list(emulated_cases())
    assert len(cases) == len(FORMATS) * len(Variant) * len(Axis)
    assert {(case[0], case[3]) for case in cases} == set(itertools.product(Variant, DTYPES))
    assert {(case[2], case[3]) for case in cases} == set(itertools.product(FORMATS, DTYPES))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axis", Axis)
def test_tensors_of_the_cpu_take_the_reference(axis: Axis, dtype: Any) -> None:
    x = strange(20, 13, dtype)
    quantized = runtime.quantize_matrix(runtime.as_tensor(x).T.contiguous().T, "int3", axis)
    expected = quantize_matrix(x, 3, axis)
    assert np.array_equal(quantized.codes.numpy(), expected.codes)
    assert quantized.nbytes == expected.codes.nbytes + expected.scales.nbytes
    values = runtime.dequantize_matrix(quantized)
    assert values.dtype == TORCH_DTYPES[dtype]
    assert_same_values(runtime.as_array(values), dequantize_matrix(expected, dtype))
    assert runtime.dequantize_matrix(quantized, torch.float32).dtype == torch.float32


def test_what_the_launcher_refuses() -> None:
    x = torch.ones(4, 8)
    with pytest.raises(MatrixVariantError, match=r"'fast' is not one of naive, tiled, coarsened, vectorized"):
        runtime.quantize_matrix(x, 8, variant="fast")
    with pytest.raises(MatrixTypeError, match="float64"):
        runtime.quantize_matrix(x.double(), 8)
    with pytest.raises(MatrixShapeError, match="4×8×1"):
        runtime.quantize_matrix(x[..., None], 8)
    with pytest.raises(MatrixFormatError):
        runtime.quantize_matrix(x, 7)
    with pytest.raises(MatrixAxisError):
        runtime.quantize_matrix(x, 8, "head")
    quantized = runtime.quantize_matrix(x, 8)
    with pytest.raises(MatrixTypeError, match="int32"):
        runtime.dequantize_matrix(quantized, torch.int32)
    with pytest.raises(MatrixShapeError):
        runtime.dequantize_matrix(runtime.QuantizedMatrix(quantized.codes[:, :4], *list(vars(quantized).values())[1:]))


# --- on a GPU ------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page_format", FORMATS)
@pytest.mark.parametrize("variant", Variant)
def test_bytes_on_a_gpu(variant: Variant, page_format: PageFormat, dtype: Any) -> None:
    for axis in Axis:
        for rows, columns in (*SHAPES, (5000, 128), (3001, 8200)):
            same_bytes(strange(rows, columns, dtype), "cuda", page_format, axis, variant)


@pytest.mark.gpu
@pytest.mark.parametrize("axis", Axis)
def test_a_gpu_takes_any_strides_and_rows_of_codes(axis: Axis) -> None:
    x = strange(257, 96, np.float16)
    base = torch.zeros(258 * 96 + 1, dtype=torch.float16, device="cuda")
    view = base[1 : 1 + 257 * 96].view(257, 96)  # not from a multiple of 16 bytes
    view.copy_(runtime.as_tensor(x))
    for matrix in (view, view.T.contiguous().T):
        quantized = runtime.quantize_matrix(matrix, 3, axis)
        expected = quantize_matrix(x, 3, axis)
        assert np.array_equal(quantized.codes.cpu().numpy(), expected.codes)
        assert_same_values(
            runtime.as_array(runtime.dequantize_matrix(quantized).cpu()), dequantize_matrix(expected, np.float16)
        )


@pytest.mark.gpu
def test_a_graph_quantizes_again() -> None:
    x = torch.randn(4096, 256, device="cuda", dtype=torch.float16)
    runtime.quantize_matrix(x, 4)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        quantized = runtime.quantize_matrix(x, 4)
        values = runtime.dequantize_matrix(quantized)
    for seed in range(3):
        x.normal_(generator=torch.Generator("cuda").manual_seed(seed))
        graph.replay()
        expected = quantize_matrix(x.cpu().numpy(), 4)
        assert np.array_equal(quantized.codes.cpu().numpy(), expected.codes)
        assert_same_values(values.cpu().numpy(), dequantize_matrix(expected, np.float16))
