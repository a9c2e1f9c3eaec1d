"""Quantizers and rate control against a NumPy twin, and what becomes of each unusual tensor, in numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import save_file

import kvpack
from kvpack.encode.compress import CompressReport, TensorReport
from kvpack.encode.quantize import DELTA_OFFSET, NEAREST, NUM_THRESHOLDS, Rounding, quantize, quantize_strip
from kvpack.encode.tensor_encoder import EncodedTensor, Matrices, encode_at_bits
from kvpack.errors import ContainerMetadataError
from kvpack.format.layout import outlier_delta_max

F32 = np.float32
Weights = npt.NDArray[np.float32]


def student_t(shape: tuple[int, ...], seed: int, spread: float = 0.02) -> Weights:
    """Weights as trained layers have them: Student-t with 6 degrees of freedom, rows of unlike spread."""
    rng = np.random.default_rng(seed)
    rows = rng.uniform(0.7, 1.4, (*shape[:-1], 1))
    return (rng.standard_t(6, shape) * rows * spread).astype(np.float32)


def noise_db(weights: npt.NDArray[Any], decoded: npt.NDArray[Any]) -> float:
    w = np.asarray(weights, np.float64)
    return float(10 * np.log10(np.sum((w - np.asarray(decoded, np.float64)) ** 2) / np.sum(w * w)))


# The kernel


def twin(
    weights: Weights, steps: Weights, thresholds: Weights, clamp: np.float32, half: int
) -> tuple[npt.NDArray[np.uint8], list[tuple[int, int, int]], int, int]:
    """quantize_strip from its description, whole arrays at a time: (elements, outliers, dot, energy)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        v = np.where(steps[:, None] == 0, F32(0), weights / steps[:, None])
    assert v.dtype == np.float32
    magnitude = np.abs(v)
    whole = np.floor(magnitude)
    fraction = magnitude - whole
    index = np.minimum(whole, len(thresholds) - 1).astype(int)
    rounded = whole + (fraction >= thresholds[index])
    q = np.copysign(rounded, v).astype(np.int64)
    edge = np.clip(q, -half, half - 1)
    outside = q != edge
    clamped = outside & (magnitude - np.abs(edge).astype(np.float32) < clamp)
    q[clamped] = edge[clamped]
    places = np.argwhere(outside & ~clamped)
    outliers = [(int(r), int(c), int(q[r, c] - edge[r, c])) for r, c in places]
    fixed = np.trunc(v * F32(4096)).astype(np.int64)
    return (edge + half).astype(np.uint8), outliers, int((fixed * q).sum()), int((q * q).sum())


def compare_with_twin(weights: Weights, steps: Weights, rounding: Rounding, bits: int) -> int:
    """Both give the same; returns the number of outliers."""
    elements, outliers, dot, energy = twin(weights, steps, rounding.thresholds, rounding.clamp, 1 << (bits - 1))
    found = quantize(weights, steps, bits, rounding)
    np.testing.assert_array_equal(found.elements, elements)
    assert [(int(r), int(c), int(d) - DELTA_OFFSET) for r, c, d in found.outliers] == outliers
    assert (found.dot, found.energy) == (dot, energy)
    return len(outliers)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("seed", range(6))
def test_kernel_equals_twin(bits: int, seed: int) -> None:
    rng = np.random.default_rng(1000 * bits + seed)
    weights = student_t((61, 333), seed, 1.0)
    weights[rng.random(weights.shape) < 0.01] *= F32(40)
    weights[rng.random(weights.shape) < 0.01] = F32(0)
    weights[3] = F32(-0.0)
    steps = rng.uniform(0.06, 1.5, 61).astype(np.float32)
    steps[7] = 0
    thresholds = rng.uniform(0.3, 0.95, NUM_THRESHOLDS).astype(np.float32)
    for rounding in (NEAREST, Rounding(thresholds, F32(rng.uniform(0.5, 3)))):
        assert np.abs(weights[steps > 0] / steps[steps > 0, None]).max() < outlier_delta_max(512)
        outliers = compare_with_twin(weights, steps, rounding, bits)
        assert outliers > 100 if bits < 7 else outliers > 0


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_kernel_at_its_thresholds(bits: int) -> None:
    """Fractions exactly at a threshold, one ulp below, and one above, of both signs, for every magnitude."""
    rng = np.random.default_rng(bits)
    # Multiples of 2^-8, so that k + threshold is exact for every k.
    thresholds = (rng.integers(77, 243, NUM_THRESHOLDS) / 256).astype(np.float32)
    k = np.arange(200)
    at = (k + thresholds[np.minimum(k, NUM_THRESHOLDS - 1)]).astype(np.float32)
    row = np.concatenate([at, np.nextafter(at, F32(0)), np.nextafter(at, F32(np.inf)), k.astype(np.float32)])
    weights = np.stack([row, -row, row * F32(0.25), row * F32(-8)])
    steps = np.array([1, 1, 0.25, 8], np.float32)
    rounding = Rounding(thresholds, F32(1.5))
    compare_with_twin(weights, steps, rounding, bits)
    # And said outright, for what the element holds without clamping or outliers.
    high = (1 << (bits - 1)) - 1
    found = quantize(weights, steps, bits, rounding).elements.astype(int) - (high + 1)
    inside = k < high
    for row_index, sign in ((0, 1), (1, -1), (2, 1), (3, -1)):
        exact, below, above, whole = found[row_index].reshape(4, 200)[:, inside] * sign
        np.testing.assert_array_equal(exact, k[inside] + 1)
        np.testing.assert_array_equal(below, k[inside])
        np.testing.assert_array_equal(above, k[inside] + 1)
        np.testing.assert_array_equal(whole, k[inside])


def test_clamping_and_outliers_by_hand() -> None:
    """4 bits hold −8 … 7; a clamp of 1.25 steps lets 8.2 stay 7 and makes an outlier of 8.3."""
    weights = np.array([[7.4, 7.6, 8.2, 8.3, -8.4, -9.2, -9.3, 16383, -16383, 0.5]], np.float32)
    found = quantize(weights, np.ones(1, np.float32), 4, Rounding(NEAREST.thresholds, F32(1.25)))
    assert (found.elements.astype(int) - 8).tolist() == [[7, 7, 7, 7, -8, -8, -8, 7, -8, 1]]
    assert [(int(c), int(d) - DELTA_OFFSET) for _, c, d in found.outliers] == [(3, 1), (6, -1), (7, 16376), (8, -16375)]
    assert found.energy == 7**2 * 3 + 8**2 + 2 * 8**2 + 9**2 + 2 * 16383**2 + 1


def test_more_outliers_than_the_first_buffer_holds() -> None:
    weights = np.full((40, 50), 100, np.float32)
    weights[::2] *= -1
    found = quantize(weights, np.ones(40, np.float32), 2, NEAREST)
    assert len(found.outliers) == 2000
    np.testing.assert_array_equal(found.outliers[:, 0], np.repeat(np.arange(40), 50))
    np.testing.assert_array_equal(found.outliers[:, 1], np.tile(np.arange(50), 40))
    np.testing.assert_array_equal(
        found.outliers[:, 2].astype(int) - DELTA_OFFSET, np.where(np.arange(2000) // 50 % 2, 100 - 1, -100 + 2)
    )


def test_nearest_rounds_halves_away_from_zero() -> None:
    weights = np.array([[0.5, -0.5, 1.5, -1.5, 2.5, 0.49999997, -0.49999997]], np.float32)
    elements = np.empty(weights.shape, np.uint8)
    quantize_strip(weights, np.ones(1, np.float32), NEAREST.thresholds, NEAREST.clamp, 8, elements)
    assert (elements.astype(int) - 8).tolist() == [[1, -1, 2, -2, 3, 0, 0]]


# Rate control


def bits_per_weight(encoded: EncodedTensor, weights: Weights) -> float:
    return 8 * encoded.size_bytes / weights.size


@pytest.mark.parametrize("rate", [1.5, 1.75, 2.0, 2.6, 3.3, 4.0, 4.9, 5.5, 6.4, 7.5])
@pytest.mark.parametrize("freedom", [4, 30])
def test_the_rate_is_reached_and_never_exceeded(rate: float, freedom: int) -> None:
    rng = np.random.default_rng(int(rate * 100) + freedom)
    weights = (rng.standard_t(freedom, (768, 1024)) * 0.03).astype(np.float32)
    encoded = encode_at_bits(Matrices(weights), rate)
    assert rate - 0.05 <= bits_per_weight(encoded, weights) <= rate
    assert encoded.noise_db is not None
    # An entropy-coded uniform quantizer loses 0.25 bit to the Gaussian's rate-distortion bound, Student-t less.
    assert encoded.noise_db < -6.02 * (rate - 0.25 - 0.25)


@pytest.mark.parametrize("layout", ["compact", "balanced", "fast"])
@pytest.mark.parametrize("rate", [1.9, 3.4, 4.9, 6.8])
@pytest.mark.parametrize("tile_cols", [None, 128])
def test_the_rate_in_each_layout(layout: str, rate: float, tile_cols: int | None) -> None:
    weights = student_t((512, 640), int(rate * 10))
    encoded = encode_at_bits(Matrices(weights), rate, layout_name=layout, tile_cols=tile_cols)
    assert rate - 0.05 <= bits_per_weight(encoded, weights) <= rate
    # 2 bits are the same layout by two names.
    assert encoded.layout.name == layout or encoded.layout.element_bits <= 3


def test_more_bits_are_less_noise() -> None:
    weights = student_t((512, 512), 5)
    noise = [encode_at_bits(Matrices(weights), rate).noise_db for rate in (2, 3, 4, 5, 6, 7)]
    steps = np.diff([n for n in noise if n is not None])
    assert len(steps) == 5
    assert ((steps < -5.2) & (steps > -6.8)).all(), noise


def test_rounding_for_the_rate_pays() -> None:
    """Rate-distortion-optimised thresholds are worth noise at the same size, most at low rates."""
    weights = student_t((512, 768), 6)
    for rate, gain in ((2.0, 0.05), (3.0, 0.02)):
        plain = Matrices(weights)
        plain.rate_weight = 0
        nearest = encode_at_bits(plain, rate).noise_db
        optimised = encode_at_bits(Matrices(weights), rate).noise_db
        assert nearest is not None
        assert optimised is not None
        assert optimised < nearest - gain


# Whole files: what goes in comes out


class Packed:
    """Tensors compressed to a file and read back."""

    def __init__(self, folder: Path, tensors: dict[str, npt.NDArray[Any]], **options: Any) -> None:
        self.tensors = tensors
        source, output = folder / "in.safetensors", folder / "out.safetensors"
        save_file(tensors, source)
        self.report: CompressReport = kvpack.compress(source, output, kvpack.QuantConfig(**options), force=True)
        with kvpack.open(output) as reader:
            assert set(reader) == set(tensors)
            self.info = {name: reader.info(name) for name in reader}
            self.decoded = {name: reader.decode(name) for name in reader}
            self.values = {name: reader.dequantize(name) for name in reader}
            self.originals = {name: reader.dequantize(name, "original") for name in reader}
            self.scales = {name: reader.container(name).scales(name) for name in reader}
        assert kvpack.verify(output, source).mismatches == {}
        self.output = output

    def __getitem__(self, name: str) -> TensorReport:
        return next(tensor for tensor in self.report.tensors if tensor.name == name)

    def assert_kept(self, name: str, reason: str) -> None:
        """Stored as it was, bit for bit, for that reason."""
        assert (self[name].method, self[name].reason) == ("keep", reason)
        assert self.info[name] is None
        self.assert_exact(name)

    def assert_lossless(self, name: str, reason: str) -> None:
        """Coded exactly, for that reason, in fewer bytes than it had."""
        assert (self[name].method, self[name].reason) == ("lossless", reason)
        assert self[name].bytes < self.tensors[name].nbytes
        self.assert_exact(name)

    def assert_exact(self, name: str) -> None:
        stored, original = self.originals[name], self.tensors[name]
        assert (stored.dtype, stored.shape) == (original.dtype, original.shape)
        assert stored.tobytes() == original.tobytes()

    def assert_recorded_noise(self, name: str) -> float:
        """The noise in the report and in the file is that of the decoded numbers; returned in dB."""
        info = self.info[name]
        assert info is not None
        noise = noise_db(self.tensors[name], self.values[name])
        assert info.noise_db == self[name].noise_db == pytest.approx(noise, abs=1e-4)
        return noise


Pack = Callable[..., Packed]


@pytest.fixture
def pack(tmp_path: Path) -> Pack:
    return lambda tensors, **options: Packed(tmp_path, tensors, **options)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_noise_is_that_of_the_decoded_numbers(pack: Pack, dtype: Any) -> None:
    weights = student_t((300, 700), 11).astype(dtype)
    packed = pack({"a.weight": weights}, bits=4)
    noise = packed.assert_recorded_noise("a.weight")
    assert -24 < noise < -20
    scales = packed.scales["a.weight"]
    assert scales is not None
    assert scales.shape == (1,)
    # w = fp32(scale) × fp32(q), rounded once.
    product = packed.decoded["a.weight"].astype(np.float32) * scales[0]
    np.testing.assert_array_equal(packed.values["a.weight"], product)
    assert packed.originals["a.weight"].tobytes() == product.astype(dtype).tobytes()
    assert packed["a.weight"].bits_per_weight == pytest.approx(8 * packed["a.weight"].bytes / weights.size, abs=1e-6)
    assert packed["a.weight"].outliers == np.count_nonzero(
        (packed.decoded["a.weight"] >= 2 ** (packed.info["a.weight"].header.layout.element_bits - 1))
        | (packed.decoded["a.weight"] < -(2 ** (packed.info["a.weight"].header.layout.element_bits - 1)))
    )


def test_the_scale_minimises_the_error(pack: Pack) -> None:
    """It is the least-squares scale of the integers, up to sums in units of 2^-12 steps."""
    weights = student_t((256, 512), 12)
    packed = pack({"a.weight": weights}, bits=3)
    q = packed.decoded["a.weight"].astype(np.float64)
    best = float((q * weights).sum() / (q * q).sum())
    scales = packed.scales["a.weight"]
    assert scales is not None
    assert float(scales[0]) == pytest.approx(best, rel=3e-4)


def test_int8_rows(pack: Pack) -> None:
    """scale = fp32(max |w|) / 127 for each row; q = w/scale to nearest, so that every error is at most half a step."""
    weights = student_t((300, 500), 13)
    weights[17] = 0
    weights[18] = -0.0
    weights[19] *= 1e-20
    weights[20] = 0
    weights[20, 7] = -3
    packed = pack({"a.weight": weights}, preset="int8-row")
    scales, q = packed.scales["a.weight"], packed.decoded["a.weight"].astype(np.int64)
    expected = np.abs(weights).max(axis=1) / np.float32(127)
    np.testing.assert_array_equal(scales, expected)
    assert expected.dtype == np.float32
    with np.errstate(invalid="ignore"):
        v = np.nan_to_num(weights / expected[:, None])
    np.testing.assert_array_equal(q, np.trunc(v + np.copysign(F32(0.5), v)))
    assert np.abs(q).max() == 127
    np.testing.assert_array_equal(np.abs(q).max(axis=1), np.where(expected > 0, 127, 0))
    error = np.abs(weights.astype(np.float64) - packed.values["a.weight"])
    assert (error <= 0.5 * expected[:, None] * (1 + 1e-6)).all()
    assert not np.signbit(packed.values["a.weight"][17:19]).any()
    assert packed.values["a.weight"][20].tolist() == [0.0] * 7 + [-3.0] + [0.0] * 492
    assert packed.assert_recorded_noise("a.weight") < -38
    assert packed["a.weight"].method == "int8-row"
    assert packed["a.weight"].outliers == 0


def test_int8_rows_of_denormal_scale_are_not_zeroed(pack: Pack) -> None:
    """A scale must not be denormal: where a row would need one, the tensor is coded exactly."""
    weights = student_t((64, 512), 14)
    weights[5] = np.linspace(-1e-37, 1e-37, 512)  # scale 8e-40
    packed = pack({"a.weight": weights}, preset="int8-row")
    packed.assert_lossless("a.weight", "1 rows have values near the end of the fp32 range")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite(pack: Pack, value: float) -> None:
    """Coded exactly where they would be lost."""
    weights = student_t((128, 160), 15)
    weights[3, 5] = value
    weights[127, 159] = value
    for options in (
        {"bits": 4}, {"preset": "near-lossless"}, {"preset": "int8-row"}, {"bits": 4, "allocation": "model"}
    ):  # fmt: skip
        pack({"a.weight": weights}, **options).assert_lossless("a.weight", "2 values are NaN or infinite")
    packed = pack({"a.weight": weights}, preset="lossless")
    assert packed["a.weight"].method == "lossless"
    packed.assert_exact("a.weight")


def test_payloads_of_nans_survive(pack: Pack) -> None:
    """Signalling ones too, in every float type, along with signed zeros and denormals."""
    rng = np.random.default_rng(16)
    tensors: dict[str, npt.NDArray[Any]] = {}
    for dtype, bits in ((np.float32, np.uint32), (np.float16, np.uint16), (ml_dtypes.bfloat16, np.uint16)):
        patterns = student_t((64, 96), 16).astype(dtype).view(bits)
        places = rng.random(patterns.shape) < 0.05
        noise = rng.integers(0, np.iinfo(bits).max, patterns.shape, bits, endpoint=True)
        exponent = {np.float32: 0x7F800000, np.float16: 0x7C00, ml_dtypes.bfloat16: 0x7F80}[dtype]
        odd = np.where(rng.random(patterns.shape) < 0.5, noise | exponent, noise & ~bits(exponent))
        tensors[np.dtype(dtype).name] = np.where(places, odd, patterns).astype(bits).view(dtype)
        assert np.isnan(tensors[np.dtype(dtype).name].astype(np.float32)).sum() > 50
    packed = pack(tensors, preset="lossless")
    for name in tensors:
        assert packed[name].method == "lossless"
        packed.assert_exact(name)


@pytest.mark.parametrize("options", [{"bits": 4}, {"preset": "near-lossless"}, {"bits": 4, "allocation": "model"}])
def test_zero_rows(pack: Pack, options: dict[str, Any]) -> None:
    weights = student_t((300, 256), 17)
    weights[[0, 100, 255, 256, 299]] = 0
    packed = pack({"a.weight": weights, "b.weight": weights[::-1].copy()}, **options)
    assert packed["a.weight"].method != "keep"
    for row in (0, 100, 255, 256, 299):
        assert not packed.values["a.weight"][row].any()
    assert packed.assert_recorded_noise("a.weight") < -19.8  # 0.1 less than with codes of 4 bits, 2 a symbol


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 4},
        {"preset": "near-lossless"},
        {"preset": "int8-row"},
        {"preset": "lossless"},
        {"bits": 4, "allocation": "model"},
    ],
)
def test_tensors_of_zeros(pack: Pack, options: dict[str, Any]) -> None:
    zeros = np.zeros((300, 1000), np.float32)
    packed = pack({"a.weight": zeros, "b.weight": student_t((64, 64), 18)}, **options)
    packed.assert_exact("a.weight")
    assert packed["a.weight"].noise_db is None
    assert packed["a.weight"].method == {"int8-row": "int8-row", "lossless": "lossless"}.get(
        options.get("preset", ""), "uniform"
    )
    # Constant tiles: only scales, and what the layout stores raw for 320 lanes of 1,024 columns, take space.
    raw_bits = packed.info["a.weight"].header.layout.raw_bits  # type: ignore[union-attr]
    assert packed["a.weight"].bits_per_weight < 0.06 + raw_bits * 320 * 1024 / 300_000
    scales = packed.scales["a.weight"]
    if scales is not None:
        assert not scales.any()


@pytest.mark.parametrize("value", [1.0, -0.3, 1e-20, 1e20])
def test_constant_tensors(pack: Pack, value: float) -> None:
    weights = np.full((128, 300), value, np.float32)
    packed = pack({"a.weight": weights}, bits=4)
    packed.assert_exact("a.weight")
    assert packed["a.weight"].bits_per_weight < 0.05
    packed = pack({"a.weight": weights}, preset="near-lossless")
    packed.assert_exact("a.weight")
    assert packed["a.weight"].bits_per_weight < 0.05
    packed = pack({"a.weight": weights}, preset="int8-row")
    np.testing.assert_allclose(packed.values["a.weight"], weights, rtol=2e-7)
    assert np.abs(packed.decoded["a.weight"]).min() == 127
    packed = pack({"a.weight": weights}, preset="lossless")
    packed.assert_exact("a.weight")


@pytest.mark.parametrize("values", [(1e6, -3e5), (1, -1), (0, 1), (1, 2, 3), (-0.02, 0, 0.02)])
@pytest.mark.parametrize("rate", [1.6, 3, 4.9, 6, 7.5])
def test_tensors_of_a_few_values(pack: Pack, values: tuple[float, ...], rate: float) -> None:
    """Multiples of one step: exact, in little more than their entropy, whatever the rate above it."""
    weights = np.random.default_rng(10).choice(np.array(values, np.float32), (256, 384))
    packed = pack({"a.weight": weights}, bits=rate)
    assert packed["a.weight"].method == "uniform"
    if rate == 1.6 and values == (1, 2, 3):  # log2(3) bits and the lanes exceed 1.6: the values come nearer
        assert packed["a.weight"].bits_per_weight <= 1.6
        assert packed["a.weight"].noise_db is not None
        assert packed["a.weight"].noise_db < -4
        return
    packed.assert_exact("a.weight")
    assert packed["a.weight"].noise_db is None
    # At 1.6 bits log2(3) and the lanes are out of reach: the lowest rate above it that is not.
    assert packed["a.weight"].bits_per_weight < math.log2(len(values)) + 0.25
    assert (packed["a.weight"].reason is None) == (rate > 1.6 or len(values) == 2)


@pytest.mark.parametrize("factor", [20, 60, 150])
def test_outliers_are_stored_to_half_a_step(pack: Pack, factor: float) -> None:
    weights = student_t((256, 512), 19)
    rms = float(np.sqrt(np.mean(weights.astype(np.float64) ** 2)))
    places = ((0, 0), (1, 511), (100, 200), (255, 511))
    for row, col in places:
        weights[row, col] = factor * rms * (1 if row % 2 else -1)
    packed = pack({"a.weight": weights}, bits=4)
    scales = packed.scales["a.weight"]
    assert scales is not None
    for row, col in places:
        # The step and the least-squares scale differ by a few parts in a thousand.
        error = abs(float(packed.values["a.weight"][row, col]) - float(weights[row, col]))
        assert error < 0.5 * scales[0] + 0.02 * abs(weights[row, col])
    assert packed["a.weight"].outliers >= 4
    assert packed.decoded["a.weight"].dtype == np.int16
    packed.assert_recorded_noise("a.weight")
    assert 3.95 <= packed["a.weight"].bits_per_weight <= 4


def test_values_too_far_apart_for_a_step(pack: Pack) -> None:
    """A magnitude has 14 bits: a value of 10^6 needs coarser steps than the others can do with."""
    weights = student_t((256, 512), 20)
    weights[9, 9] = 1e6
    for options in ({"bits": 4}, {"bits": 4, "allocation": "model"}):
        packed = pack({"a.weight": weights}, **options)
        assert str(packed["a.weight"].reason).startswith("the largest value (1e+06) is more than 16383 steps of ")
        packed.assert_lossless("a.weight", str(packed["a.weight"].reason))
    packed = pack({"a.weight": weights}, preset="near-lossless")
    packed.assert_lossless("a.weight", "no step that holds all values reaches -41.5 dB of the variance")
    packed = pack({"a.weight": weights}, preset="int8-row")
    assert packed["a.weight"].method == "int8-row"  # rows do not suffer from one another
    assert packed.values["a.weight"][9, 9] == np.float32(1e6 / 127) * np.float32(127)
    others = np.delete(np.arange(256), 9)
    assert noise_db(weights[others], packed.values["a.weight"][others]) < -38
    packed = pack({"a.weight": weights}, preset="lossless")
    assert packed["a.weight"].method == "lossless"
    packed.assert_exact("a.weight")


def test_the_ends_of_the_fp32_range(pack: Pack) -> None:
    """All denormal, or so large that a decoded value would overflow: exact. Some denormals among others: zeros."""
    rng = np.random.default_rng(21)
    tiny = (rng.normal(size=(64, 128)) * 1e-40).astype(np.float32)
    assert np.count_nonzero(tiny) > 8000
    assert np.abs(tiny).max() < np.finfo(np.float32).tiny
    huge = (rng.uniform(0.2, 1, (64, 128)) * np.finfo(np.float32).max).astype(np.float32)
    huge[::2] *= -1
    mixed = student_t((64, 128), 21)
    mixed[:, ::2] = tiny[:, ::2]
    refused = set()
    for options in (
        {"bits": 2}, {"bits": 3}, {"bits": 5}, {"bits": 7}, {"preset": "near-lossless"}, {"preset": "int8-row"}
    ):  # fmt: skip
        packed = pack({"tiny": tiny, "huge": huge, "mixed": mixed}, **options)
        assert np.isfinite(packed.values["huge"]).all()
        if options.get("preset") == "int8-row":  # no value of a row is decoded to more than its largest
            assert packed["huge"].method == "int8-row"
        assert packed["tiny"].method == "lossless"
        for name in ("tiny", "huge"):
            if packed[name].method == "lossless":
                refused.add(name)
                assert "end of the fp32 range" in str(packed[name].reason)
                packed.assert_exact(name)
        assert packed["mixed"].method in ("uniform", "int8-row")
        assert not packed.values["mixed"][:, ::2].any()
        assert np.count_nonzero(packed.values["mixed"][:, 1::2]) > 2000
    assert refused == {"tiny", "huge"}
    # One step for the whole model: all its bits go where all its energy is.
    packed = pack({"huge": huge / F32(16), "mixed": mixed, "tiny": tiny}, bits=3, allocation="model")
    assert noise_db(huge / F32(16), packed.values["huge"]) < -20
    assert not packed.values["mixed"].any()
    packed.assert_exact("tiny")
    packed = pack({"tiny": tiny, "huge": huge, "mixed": mixed}, preset="lossless")
    for name in ("tiny", "huge", "mixed"):
        packed.assert_exact(name)


@pytest.mark.parametrize("exponent", [-98, -60, 0, 60, 115])
def test_spreads_of_every_magnitude(pack: Pack, exponent: int) -> None:
    """A power of two changes nothing but the scale."""
    weights = student_t((128, 256), 22, 1.0)
    packed = pack({"a.weight": weights, "b.weight": np.ldexp(weights, exponent)}, bits=4)
    assert packed["b.weight"].method == "uniform"
    scales = [packed.scales[name] for name in ("a.weight", "b.weight")]
    assert scales[0] is not None
    assert scales[1] is not None
    assert packed["b.weight"].noise_db == pytest.approx(packed["a.weight"].noise_db, abs=0.05)
    assert math.log2(float(scales[1][0]) / float(scales[0][0])) == pytest.approx(exponent, abs=0.02)


def test_shapes_that_are_not_coded(pack: Pack) -> None:
    rng = np.random.default_rng(23)
    tensors = {
        "scalar": np.array(1.5, np.float32),
        "vector": rng.normal(size=5000).astype(np.float32),
        "nothing": np.zeros((0, 64), np.float32),
        "no columns": np.zeros((64, 0), np.float16),
        "small": rng.normal(size=(16, 255)).astype(np.float32),
    }
    packed = pack(tensors, bits=4)
    for name, reason in {
        "scalar": "0-D",
        "vector": "1-D",
        "nothing": "empty",
        "no columns": "empty",
        "small": "small (4080 elements)",
    }.items():
        packed.assert_kept(name, reason)
    packed = pack(tensors, bits=4, include="small|vector|nothing")
    packed.assert_kept("vector", "1-D")
    packed.assert_kept("nothing", "empty")
    assert packed["small"].method == "uniform"
    assert packed.assert_recorded_noise("small") < -10


def test_other_dtypes(pack: Pack) -> None:
    rng = np.random.default_rng(24)
    tensors = {
        "i64": rng.integers(-5, 5, (100, 100)),
        "u16": rng.integers(0, 9, (100, 100), np.uint16),
        "bool": rng.random((100, 100)) < 0.01,
        "f64": rng.normal(size=(100, 100)),
    }
    packed = pack(tensors, bits=4, include=".")
    for name, dtype in {"i64": "I64", "u16": "U16", "bool": "BOOL", "f64": "F64"}.items():
        packed.assert_kept(name, f"dtype {dtype}")
    assert packed.report.bits_per_weight is None
    assert packed.report.noise_db is None


@pytest.mark.parametrize("options", [{"bits": 4}, {"preset": "near-lossless"}, {"preset": "lossless"}])
def test_narrow_dtypes_are_recoded_exactly(pack: Pack, options: dict[str, Any]) -> None:
    rng = np.random.default_rng(25)
    normal = rng.normal(size=(200, 300))
    tensors = {
        "i8": np.clip(np.rint(normal * 12), -128, 127).astype(np.int8),
        "u8": np.clip(np.rint(normal * 12 + 128), 0, 255).astype(np.uint8),
        "e4m3": normal.astype(ml_dtypes.float8_e4m3fn),
        "e5m2": normal.astype(ml_dtypes.float8_e5m2),
    }
    tensors["i8"][0, :2] = -128, 127
    tensors["u8"][0, :2] = 0, 255
    tensors["e4m3"].view(np.uint8)[0, :4] = 0x7F, 0xFF, 0x80, 0x7E
    tensors["e5m2"].view(np.uint8)[0, :4] = 0x7C, 0xFC, 0x80, 0x7D
    packed = pack(tensors, **options)
    for name, most in {"i8": 6.9, "u8": 6.9, "e4m3": 7.8, "e5m2": 7.5}.items():
        assert packed[name].method == "lossless"
        assert packed[name].bits_per_weight < most
        assert packed[name].noise_db is None
        packed.assert_exact(name)
    np.testing.assert_array_equal(packed.decoded["i8"], tensors["i8"])
    np.testing.assert_array_equal(packed.decoded["e4m3"], tensors["e4m3"].view(np.uint8))


def test_what_does_not_get_smaller_is_kept(pack: Pack) -> None:
    rng = np.random.default_rng(26)
    tensors = {
        "u8": rng.integers(0, 256, (200, 300), np.uint8),
        "f32": rng.integers(0, 2**32, (200, 300), np.uint32).view(np.float32),
    }
    packed = pack(tensors, preset="lossless")
    for name in tensors:
        packed.assert_kept(name, "coding does not make it smaller")
    assert packed.report.output_bytes < packed.report.input_bytes + 200


@pytest.mark.parametrize("shape", [(4096, 2), (4096, 4), (2048, 8), (1024, 16), (1, 5000), (3, 2000)])
@pytest.mark.parametrize("rate", [1.5, 3.0, 4.9, 7.0])
def test_narrow_tensors_are_not_destroyed(pack: Pack, shape: tuple[int, int], rate: float) -> None:
    """Each lane takes 40 bits: where a rate leaves too little for the weights, they get the lowest that does not."""
    packed = pack({"a.weight": student_t(shape, 27)}, bits=rate)
    bits = packed["a.weight"].bits_per_weight
    assert packed["a.weight"].method == "uniform"
    assert packed.assert_recorded_noise("a.weight") < min(-1, 10.6 - 6.02 * rate)
    if packed["a.weight"].reason is not None:
        assert "overhead" in str(packed["a.weight"].reason)
        assert bits <= (9 if rate == 7 else rate + 1.6)
    else:
        assert bits <= rate


@pytest.mark.parametrize(("cols", "most_db"), [(8, -19.0), (16, -19.8), (32, -20.0), (48, -20.0), (64, -20.0)])
def test_narrow_tensors_have_the_noise_of_plain_integers(pack: Pack, cols: int, most_db: float) -> None:
    """Tiles of a fixed width, whose lanes cost nothing: 16 levels of a Gaussian have −20.2 dB."""
    weights = np.random.default_rng(27).normal(size=(4096, cols)).astype(np.float32)
    packed = pack({"a.weight": weights}, bits=4.25)
    assert packed.assert_recorded_noise("a.weight") < most_db
    assert 4.15 < packed["a.weight"].bits_per_weight <= 4.25


def test_a_tensor_of_16_columns(pack: Pack) -> None:
    packed = pack({"mixer.in_proj.weight": student_t((1536, 16), 28)})
    assert packed["mixer.in_proj.weight"].method == "uniform"
    assert packed.assert_recorded_noise("mixer.in_proj.weight") < -18
    assert packed["mixer.in_proj.weight"].bits_per_weight <= 4.85


@pytest.mark.parametrize(
    "options", [{"bits": 4}, {"preset": "near-lossless"}, {"preset": "int8-row"}, {"preset": "lossless"}]
)
def test_experts_and_convolutions(pack: Pack, options: dict[str, Any]) -> None:
    """Three dimensions: a matrix for each of the first. Four: one matrix of the first × the others."""
    experts = student_t((5, 64, 160), 28) * np.array([1, 2, 4, 8, 0], np.float32)[:, None, None]
    convolution = student_t((64, 48, 3, 3), 29)
    stacked = student_t((2, 3, 64, 128), 30)
    packed = pack({"experts": experts, "conv": convolution, "stacked": stacked}, **options)
    for name, matrices, rows, cols in (("experts", 5, 64, 160), ("conv", 1, 64, 432), ("stacked", 6, 64, 128)):
        info = packed.info[name]
        assert info is not None
        assert (info.header.matrices, info.header.rows, info.header.cols) == (matrices, rows, cols)
        if "lossless" in options.values():
            packed.assert_exact(name)
        else:
            assert packed.assert_recorded_noise(name) < -18
        if "int8-row" in options.values():
            absmax = np.abs(packed.tensors[name].reshape(matrices * rows, cols)).max(axis=1)
            np.testing.assert_array_equal(packed.scales[name], absmax / np.float32(127))
    assert not packed.values["experts"][4].any()
    # Each element is at its own place: a rolled or transposed tensor would be noise.
    if "bits" in options:
        assert noise_db(convolution, np.roll(packed.values["conv"], 1, axis=3)) > 0


def test_tied_and_repeated_tensors(pack: Pack) -> None:
    weights = student_t((128, 256), 31)
    packed = pack({"a.weight": weights, "z.weight": weights.copy()}, bits=4.5)
    from kvpack.format.container import Container

    with Container(packed.output) as container:
        blobs = [bytes(container.data(f"{name}.weight_kvpack")) for name in "az"]
        scales = [bytes(container.data(f"{name}.weight_kvpack_scale")) for name in "az"]
    assert blobs[0] == blobs[1]
    assert scales[0] == scales[1]
    np.testing.assert_array_equal(packed.values["a.weight"], packed.values["z.weight"])


@pytest.mark.parametrize(
    "options", [{"bits": 4}, {"preset": "near-lossless"}, {"preset": "int8-row"}, {"preset": "lossless"}]
)
def test_conv1d_is_stored_transposed(pack: Pack, options: dict[str, Any]) -> None:
    """GPT-2's inputs × outputs, recognised by its bias: rows of the blob, and scales, are outputs."""
    weights = student_t((96, 288), 32)
    weights *= np.linspace(0.1, 3, 288, dtype=np.float32)
    square = student_t((96, 96), 33)
    tensors = {
        "h.0.attn.c_attn.weight": weights,
        "h.0.attn.c_attn.bias": np.zeros(288, np.float32),
        "h.0.attn.c_proj.weight": square,
        "h.0.mlp.up.weight": weights,
    }
    packed = pack(tensors, **options)
    for name, transposed, rows in (
        ("h.0.attn.c_attn.weight", True, 288),
        ("h.0.attn.c_proj.weight", True, 96),
        ("h.0.mlp.up.weight", False, 96),
    ):
        info = packed.info[name]
        assert info is not None
        assert (info.header.transposed, info.header.rows) == (transposed, rows)
        if "lossless" in options.values():
            packed.assert_exact(name)
        else:
            packed.assert_recorded_noise(name)
        if "int8-row" in options.values():
            absmax = np.abs(tensors[name]).max(axis=0 if transposed else 1)
            np.testing.assert_array_equal(packed.scales[name], absmax / np.float32(127))
    if "int8-row" in options.values():  # a scale for each output suits outputs of unlike spread
        assert packed["h.0.attn.c_attn.weight"].noise_db < packed["h.0.mlp.up.weight"].noise_db - 3
    assert not any(info.header.transposed for info in pack({"h.c_fc.weight": weights}, bits=4).info.values() if info)


def test_names_that_are_kept(pack: Pack) -> None:
    names = {
        "model.embed_tokens.weight": "embedding",
        "lm_head.weight": "embedding",
        "wte.weight": "embedding",
        "model.layers.0.input_layernorm.weight": "norm",
        "ln_f.weight": "norm",
        "model.layers.0.mlp.up_proj.weight": None,
    }
    tensors = {name: student_t((64, 128), number) for number, name in enumerate(names)}
    packed = pack(tensors, bits=4)
    for name, reason in names.items():
        if reason:
            packed.assert_kept(name, reason)
        else:
            assert packed[name].method == "uniform"
    packed = pack(tensors, preset="lossless")
    assert {packed[name].method for name in names} == {"lossless"}
    packed = pack(tensors, bits=4, include="lm_head|norm", exclude="layers", tensor_bits={"wte": 6.0, "w": 7.0})
    assert {name: packed[name].method for name in names} == {
        "model.embed_tokens.weight": "uniform",  # a rate of its own codes it: the name has a w in it
        "lm_head.weight": "uniform",
        "wte.weight": "uniform",
        "model.layers.0.input_layernorm.weight": "keep",
        "ln_f.weight": "uniform",
        "model.layers.0.mlp.up_proj.weight": "keep",
    }
    for name in ("wte.weight", "ln_f.weight"):  # the last match counts
        assert 6.9 <= packed[name].bits_per_weight <= 7.0


def test_a_rate_of_its_own_under_lossless(pack: Pack) -> None:
    tensors = {"a.weight": student_t((256, 256), 34), "b.weight": student_t((256, 256), 35)}
    packed = pack(tensors, preset="lossless", tensor_bits={"^b": 3.0})
    packed.assert_exact("a.weight")
    assert packed["b.weight"].method == "uniform"
    assert 2.95 <= packed["b.weight"].bits_per_weight <= 3.0


# Allocation


def test_allocation_by_tensor_and_by_model(pack: Pack) -> None:
    """One step for all: the same total, less noise where spreads differ; the rate for each: each at the rate."""
    spreads = {"a.weight": 0.01, "b.weight": 0.03, "c.weight": 0.08}
    tensors = {name: student_t((384, 512), 40 + i, spread) for i, (name, spread) in enumerate(spreads.items())}
    by_tensor = pack(tensors, bits=4)
    for name in tensors:
        assert 3.95 <= by_tensor[name].bits_per_weight <= 4
        by_tensor.assert_recorded_noise(name)
    by_model = pack(tensors, bits=4, allocation="model")
    scales = [float(by_model.scales[name][0]) for name in tensors]  # type: ignore[index]
    assert max(scales) / min(scales) < 1.05
    assert 3.95 <= by_model.report.bits_per_weight <= 4  # type: ignore[operator]
    bits = [by_model[name].bits_per_weight for name in tensors]
    # log2(0.03/0.01) and log2(0.08/0.03): as many bits as the spread is wider.
    assert bits[1] - bits[0] == pytest.approx(math.log2(3), abs=0.25)
    assert bits[2] - bits[1] == pytest.approx(math.log2(8 / 3), abs=0.25)

    def total_noise(packed: Packed) -> float:
        pairs = [(packed.tensors[name].astype(np.float64), packed.values[name]) for name in tensors]
        noise = sum(float(((w - v) ** 2).sum()) for w, v in pairs)
        return 10 * math.log10(noise / sum(float((w * w).sum()) for w, _ in pairs))

    assert total_noise(by_model) < total_noise(by_tensor) - 3
    for packed in (by_tensor, by_model):
        sizes = [w.size for w in tensors.values()]
        ratios = [10 ** (packed[name].noise_db / 10) for name in tensors]  # type: ignore[operator]
        mean = 10 * math.log10(np.average(ratios, weights=sizes))
        assert packed.report.noise_db == pytest.approx(mean, abs=1e-3)


def test_allocation_by_model_with_rates_of_their_own(pack: Pack) -> None:
    tensors = {f"{name}.weight": student_t((256, 512), 50 + i, 0.02) for i, name in enumerate("abcd")}
    tensors["d.weight"][0, 0] = np.nan
    packed = pack(tensors, bits=3, allocation="model", tensor_bits={"^a": 6.0}, exclude="^b")
    assert 5.95 <= packed["a.weight"].bits_per_weight <= 6
    assert packed["b.weight"].method == "keep"
    assert 2.95 <= packed["c.weight"].bits_per_weight <= 3.01
    packed.assert_lossless("d.weight", "1 values are NaN or infinite")


def test_metadata_says_what_was_measured(pack: Pack) -> None:
    packed = pack({"a.weight": student_t((256, 300), 60)}, bits=5)
    from kvpack.format.container import Container

    with Container(packed.output) as container:
        entry = json.loads(container.metadata["kvpack_tensors"])["a.weight"]
    report = packed["a.weight"]
    assert entry == {
        "shape": [256, 300],
        "dtype": "F32",
        "method": "uniform",
        "layout": report.layout,
        "bits_per_weight": report.bits_per_weight,
        "entropy_bits": report.entropy_bits,
        "noise_db": report.noise_db,
        "outliers": report.outliers,
    }
    # The bits a weight are its entropy and a small overhead.
    assert report.entropy_bits is not None
    assert 0 < report.bits_per_weight - report.entropy_bits < 0.5
    q = packed.decoded["a.weight"]
    info = packed.info["a.weight"]
    assert info is not None
    layout = info.header.layout
    half, raw = 1 << (layout.element_bits - 1), layout.raw_bits
    counts = np.bincount(layout.codes(np.clip(q, -half, half - 1).astype(int) + half).ravel())
    p = counts[counts > 0] / counts.sum()
    assert report.entropy_bits == pytest.approx(raw - float((p * np.log2(p)).sum()), abs=0.02)


def test_compressing_twice_is_refused(tmp_path: Path) -> None:
    from kvpack.errors import InputError

    source = tmp_path / "in.safetensors"
    save_file({"a.weight": student_t((64, 128), 61)}, source)
    kvpack.compress(source, tmp_path / "out.safetensors")
    with pytest.raises(InputError, match="is compressed already"):
        kvpack.compress(tmp_path / "out.safetensors", tmp_path / "again.safetensors")
    save_file({"a_kvpack": np.zeros(3, np.uint8)}, source)
    with pytest.raises(ContainerMetadataError, match="is a name of a coded tensor"):
        kvpack.compress(source, tmp_path / "third.safetensors")
    assert not (tmp_path / "third.safetensors").exists()
