"""The trellis: its integers by hand, paths against a search of all, what it gains, and what compress makes of it."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import make_golden
import numpy as np
import numpy.typing as npt
import pytest
import sample_blobs as samples
from safetensors.numpy import save_file
from test_feedback import inputs, moment, write_moments

import kvpack
from kvpack.encode.blob_decoder import ParsedBlob, decode_integers
from kvpack.encode.blob_encoder import encode_elements, pack_outliers
from kvpack.encode.calibration import FEEDBACK_RATE_WEIGHT
from kvpack.encode.coded_tensor import CodedTensor
from kvpack.encode.feedback import Feedback, feedback_of, quantize_with_feedback
from kvpack.encode.quantize import DELTA_OFFSET, NEAREST, Rounding
from kvpack.encode.rate import plan_for_step
from kvpack.encode.report import describe
from kvpack.encode.retiling import retile
from kvpack.encode.row_decoder import decode_rows
from kvpack.encode.slicing import slice_columns, slice_rows, stack_rows
from kvpack.encode.tensor_encoder import (
    EncodedTensor,
    Matrices,
    NotEncodableError,
    encode_at_bits,
    encode_plan,
    measure,
    try_plan,
)
from kvpack.encode.trellis import put_integers, unsigned_integers
from kvpack.encode.trellis_quantizer import quantize_with_trellis
from kvpack.errors import GeometryError, InputError, LayoutError
from kvpack.format.blob import Blob
from kvpack.format.layout import ElementKind, Layout, Predictor, Quantizer, integer_layout, integer_layouts

F32 = np.float32
Array = npt.NDArray[Any]
SIGNED, TRELLIS = ElementKind.SIGNED, Quantizer.TRELLIS
FOUR_BITS = integer_layouts("balanced", SIGNED, 4, TRELLIS)[0]


def values_of(quantized: Any, element_bits: int) -> Array:
    """What a strip's elements and outliers stand for, in steps, f64."""
    quarters = unsigned_integers(quantized.elements).astype(np.int64) - (1 << (element_bits + 1))
    for row, col, delta in quantized.outliers.astype(np.int64):
        quarters[row, col] += delta - DELTA_OFFSET
    return quarters / 4


def entropy(elements: Array) -> float:
    parts = np.bincount(elements.ravel()) / elements.size
    return float(-sum(part * np.log2(part) for part in parts if part))


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 31, 5), (1, 33, 64), (3, 300, 7)])
@pytest.mark.parametrize("bits", [2, 4, 6])
def test_integers(shape: tuple[int, int, int], bits: int) -> None:
    elements = np.random.default_rng(bits).integers(0, 1 << bits, shape).astype(np.uint8)
    expected = make_golden.trellis_integers(elements, bits)
    found = put_integers(elements.copy(), bits)
    np.testing.assert_array_equal(found, expected)
    assert (np.abs(found.astype(int)) < 1 << (bits + 1)).all()
    np.testing.assert_array_equal(unsigned_integers(elements[0]), expected[0] + (1 << (bits + 1)))


def test_the_example_of_the_format() -> None:
    elements = np.array([4, 3, 6, 5, 4, 1], np.uint8).reshape(1, 6, 1)
    assert put_integers(elements, 3).ravel().tolist() == [1, -3, 11, 5, 1, -11]


@pytest.mark.parametrize("rate_weight", [0.0, 0.1])
def test_no_other_path_costs_less(rate_weight: float) -> None:
    """Two bits, five rows: all 4^5 columns of elements."""
    rng = np.random.default_rng(0)
    weights = rng.uniform(-1.9, 1.9, (5, 40)).astype(F32)
    bits = np.array([3.5, 1.25, 1, 3], F32)
    found = quantize_with_trellis(weights, np.ones(5, F32), 2, Rounding(NEAREST.thresholds, F32(1), rate_weight, bits))
    assert not len(found.outliers)
    every = np.array(list(itertools.product(range(4), repeat=5)), np.uint8).T  # [rows, 1024]
    values = (unsigned_integers(every).astype(int) - 8) / 4
    costs = np.square(weights[:, :, None] - values[:, None]).sum(0) + rate_weight * bits[every].sum(0)
    own = np.square(weights - values_of(found, 2)).sum(0) + rate_weight * bits[found.elements].sum(0)
    np.testing.assert_allclose(own, costs.min(1), rtol=1e-5)


def test_outliers_are_quarters_of_a_step() -> None:
    weights = np.random.default_rng(1).normal(0, 1, (70, 40)).astype(F32)
    weights[0, 0], weights[31, 3], weights[32, 5], weights[69, 39] = 900.3, -77.7, 12.1, -8.6
    found = quantize_with_trellis(weights, np.full(70, 0.5, F32), 3, Rounding(NEAREST.thresholds, F32(1)))
    places = {(row, col) for row, col, _ in found.outliers.tolist()}
    assert {(0, 0), (31, 3), (32, 5), (69, 39)} <= places
    errors = weights / 0.5 - values_of(found, 3)
    assert max(abs(errors[place]) for place in places) <= 1 / 8 + 1e-4
    assert np.abs(errors).max() <= 1


def test_less_noise_at_equal_entropy_than_rounding() -> None:
    """0.8 dB: a sixth. The last group is of 13 rows."""
    weights = np.random.default_rng(2).normal(0, 1, (205, 512)).astype(F32)
    step = F32(0.5)
    found = quantize_with_trellis(weights, np.full(205, step, F32), 5, NEAREST)
    rounded = np.rint(weights / step)
    noise = np.square(weights - step * values_of(found, 5)).mean()
    assert noise < 0.845 * np.square(weights - step * rounded).mean()
    assert entropy(found.elements) == pytest.approx(entropy((rounded + 16).astype(int)), abs=0.01)
    # The least-squares scale: what errors that know nothing of the weights leave.
    assert found.dot / 4096 / found.energy == pytest.approx(1 / (1 + noise), abs=0.005)


def test_with_feedback_both_gain() -> None:
    k = 96
    feedback = feedback_of(moment(inputs(4000, k)))
    second = moment(inputs(4000, k)).astype(np.float64)
    weights = np.random.default_rng(3).normal(0, 1, (256, k)).astype(F32)
    steps = np.full(256, 0.5, F32)

    def cost(errors: Array) -> float:
        return float(np.einsum("ri,ij,rj->", errors, second, errors))

    plain = quantize_with_trellis(weights, steps, 6, NEAREST)
    both = quantize_with_trellis(weights, steps, 6, NEAREST, feedback)
    rounded = quantize_with_feedback(weights, steps, 6, NEAREST, feedback)
    errors = weights - 0.5 * values_of(both, 6)
    of_rounded = weights - 0.5 * (rounded.elements.astype(int) - 32)
    assert not len(rounded.outliers)
    assert cost(errors) < 0.85 * cost(of_rounded)
    assert cost(errors) < 0.5 * cost(weights - 0.5 * values_of(plain, 6))
    # What it says of itself is that, and the damping.
    damped = cost(errors) + 0.01 * np.diag(second).mean() * np.square(errors).sum()
    assert both.row_errors is not None
    assert both.row_errors.sum() * 0.25 * feedback.mean_variance == pytest.approx(damped, rel=1e-3)


def test_encode_at_bits() -> None:
    weights = Matrices(np.random.default_rng(4).normal(0, 0.02, (512, 700)).astype(F32))
    scalar = {bits: encode_at_bits(weights, bits) for bits in (2.0, 2.5, 4.0, 6.0)}
    weights.quantizer = TRELLIS
    for bits, other in scalar.items():
        coded = encode_at_bits(weights, bits)
        assert bits - 0.02 < 8 * coded.size_bytes / weights.size <= bits
        if not 2.25 <= bits <= 5.25:  # it has no zero; elements of six bits would be too narrow
            assert coded.method == "uniform"
            continue
        assert (coded.method, coded.layout.quantizer) == ("trellis", TRELLIS)
        assert coded.noise_db is not None
        assert other.noise_db is not None
        assert coded.noise_db < other.noise_db - (0.35 if bits < 3 else 0.7)
        integers = decode_integers(Blob(coded.blob.data)).astype(F32)[0]
        assert coded.scales is not None
        noise = np.square(weights.array[0] - integers * coded.scales).sum() / np.square(weights.array).sum()
        assert 10 * np.log10(noise) == pytest.approx(coded.noise_db, abs=1e-3)


@pytest.mark.parametrize("values", ["zeros", "few", "narrow"])
def test_what_is_not_for_it_is_rounded(values: str) -> None:
    rng = np.random.default_rng(5)
    array = {
        "zeros": np.zeros((64, 256), F32),
        "few": rng.integers(-1, 2, (64, 256)).astype(F32),
        "narrow": rng.normal(0, 1, (40, 90)).astype(F32),
    }[values]
    weights = Matrices(array)
    weights.quantizer = TRELLIS
    assert encode_at_bits(weights, 6.0 if values == "narrow" else 3.0).method == "uniform"


def test_parts_have_the_integers_of_the_whole() -> None:
    elements = samples.gaussian_elements((1, 330, 210), 4, 1.2, 6)
    outliers = [(0, 5, 5, 99), (0, 64, 130, -7), (0, 329, 209, 1)]
    whole = samples.encode_with_outliers(elements, outliers, FOUR_BITS, tile_cols=64)
    integers = decode_integers(Blob(whole))
    np.testing.assert_array_equal(
        integers, samples.with_deltas(make_golden.trellis_integers(elements, 4).astype(np.int32), outliers)
    )
    for first, stop in ((0, 32), (64, 256), (32, 330), (288, 330)):
        np.testing.assert_array_equal(decode_integers(Blob(slice_rows(whole, first, stop))), integers[:, first:stop])
    np.testing.assert_array_equal(decode_integers(Blob(slice_columns(whole, 64, 192))), integers[:, :, 64:192])
    again = stack_rows([slice_rows(whole, 96, 330), slice_rows(whole, 0, 96)][::-1])
    np.testing.assert_array_equal(decode_integers(Blob(again)), integers)
    np.testing.assert_array_equal(decode_integers(Blob(retile(Blob(whole), 96))), integers)
    for rows in ([0], [31, 32, 33, 329], list(range(0, 330, 3))):
        np.testing.assert_array_equal(decode_rows(ParsedBlob(whole), np.array(rows)), integers[0, rows])
    scalar = encode_elements(elements, integer_layout("balanced", SIGNED, 4), tile_cols=64)
    with pytest.raises(GeometryError, match="of a trellis"):
        stack_rows([slice_rows(whole, 0, 320), slice_rows(scalar, 0, 320)])
    part = CodedTensor(slice_columns(whole, 0, 192), np.ones(1, F32), "F32", (330, 192)).for_parts(2)
    assert (part.header.layout, part.header.tile_cols) == (FOUR_BITS, 96)
    np.testing.assert_array_equal(decode_integers(Blob(part.blob)), integers[:, :, :192])


def test_layouts_that_there_are_not() -> None:
    with pytest.raises(LayoutError, match="folded"):
        Layout(SIGNED, 4, 2, 4, False, TRELLIS)
    with pytest.raises(LayoutError, match="2 to 6"):
        Layout(SIGNED, 7, 2, 4, True, TRELLIS)
    with pytest.raises(ValueError, match="no predictor"):
        encode_elements(np.zeros((1, 1), np.uint8), FOUR_BITS, predictor=Predictor.PREVIOUS)
    assert [layout.name for layout in integer_layouts("balanced", SIGNED, 4, TRELLIS)] == ["balanced"] * 2


@pytest.mark.parametrize("by_sensitivity", [False, True])
def test_compress(tmp_path: Path, by_sensitivity: bool) -> None:
    rng = np.random.default_rng(7)
    k = 96
    tensors = {f"layers.{i}.{name}.weight": rng.normal(0, 0.05, (160, k)).astype(F32) for i in (0, 1) for name in "ab"}
    save_file(tensors, tmp_path / "model.safetensors")
    options: dict[str, Any] = {}
    if by_sensitivity:
        options["moments"] = write_moments(tmp_path / "m", dict.fromkeys(tensors, (160, k)))
    noise = {}
    for quantizer in ("scalar", "trellis"):
        config = kvpack.QuantConfig(bits=4, quantizer=quantizer)
        assert kvpack.QuantConfig.from_json(config.to_json()) == config
        target = tmp_path / f"{quantizer}.safetensors"
        report = kvpack.compress(tmp_path / "model.safetensors", target, config, **options)
        noise[quantizer] = report.noise_db
        assert {tensor.method for tensor in report.tensors} == {"trellis" if quantizer == "trellis" else "uniform"}
        assert not kvpack.verify(target, against=tmp_path / "model.safetensors").mismatches
        described = describe(target)["tensors"]
        assert {(t["method"], t["quantizer"], t["layout"]) for t in described} == {
            ("trellis" if quantizer == "trellis" else "uniform", quantizer, "balanced")
        }
    if not by_sensitivity:
        assert noise["trellis"] < noise["scalar"] - 0.5


def test_a_preset_has_no_trellis() -> None:
    with pytest.raises(InputError, match="it takes a rate"):
        kvpack.QuantConfig(preset="int8-row", quantizer="trellis")
    with pytest.raises(InputError, match="there are scalar, trellis"):
        kvpack.QuantConfig(quantizer="vector")


@pytest.mark.parametrize("value", [4092.9, -4092.9])
def test_outliers_at_the_limit_keep_their_sign(value: float) -> None:
    """Of two bits, elements lie on both sides of zero, and an outlier may begin at either."""
    rng = np.random.default_rng(0)
    weights = (rng.choice([-1, 1], (512, 512)) * 1.45 + rng.normal(0, 0.2, (512, 512))).astype(F32)
    weights[(np.arange(100) * 5 + 3) % 512, 4 * np.arange(100)] = value
    matrices = Matrices(weights)
    matrices.quantizer = Quantizer.TRELLIS
    fine = measure(matrices, None)
    layout = integer_layouts("compact", SIGNED, 2, TRELLIS)[0]
    plan = plan_for_step(fine, 1.0, [layout], {layout: matrices.header(layout, None)})
    encoded = encode_plan(matrices, fine, plan)
    decoded = decode_integers(Blob(encoded.blob.data))[0] * encoded.scales[0]
    assert np.abs(decoded - weights).max() < 2
    weights[0, 0] = 4094.9
    farther = Matrices(weights)
    with pytest.raises(NotEncodableError, match="more than 4093 steps"):
        encode_plan(farther, measure(farther, None), plan)


def test_a_delta_without_room_is_no_other_one() -> None:
    place = np.zeros(1, np.uint32)
    assert pack_outliers(place, place, np.array([0], np.uint32), 512) == [1 << 14]  # -16384
    for delta in (16384, -16385):
        with pytest.raises(ValueError, match="more than 16383 beyond"):
            pack_outliers(place, place, np.array([delta + DELTA_OFFSET]).astype(np.uint32), 512)


@pytest.mark.parametrize("shape", [(33, 512), (65, 2048)])
def test_rounding_where_idle_lanes_or_far_outliers_make_it_better(shape: tuple[int, int]) -> None:
    def encoded(weights: Array, quantizer: Quantizer) -> EncodedTensor:
        matrices = Matrices(weights)
        matrices.quantizer = quantizer
        return encode_at_bits(matrices, 4.0)

    weights = np.random.default_rng(1).normal(0, 0.05, shape).astype(F32)
    own = encoded(weights, Quantizer.TRELLIS)
    assert own.method == "uniform"
    assert own.noise_db is not None
    assert own.noise_db == encoded(weights, Quantizer.SCALAR).noise_db
    large = np.random.default_rng(1).normal(0, 0.05, (512, 512)).astype(F32)
    assert encoded(large, Quantizer.TRELLIS).method == "trellis"
    large[3, 3] = -200
    assert encoded(large, Quantizer.TRELLIS).method == "uniform"


def shaped(values: str, shape: tuple[int, int]) -> Array:
    rng = np.random.default_rng(0)
    if values == "uniform":
        return rng.uniform(-1, 1, shape).astype(F32)
    if values == "two clusters":
        return (rng.choice([-1, 1], shape) + rng.normal(0, 0.2, shape)).astype(F32)
    return (rng.choice([-1, 1], shape) * rng.exponential(1, shape) ** 1.5).astype(F32)


class OneMoment:
    """Feedback of one second moment, whatever the matrix."""

    def __init__(self, k: int) -> None:
        self.moment = moment(inputs(4000, k))
        self.factor = feedback_of(self.moment)

    def of_matrix(self, matrix: int) -> Feedback:
        return self.factor

    def row_weights(self, matrix: int) -> None:
        return None


@pytest.mark.parametrize(
    ("values", "bits", "fed_back"),
    [
        ("uniform", 3.0, False),  # a range of eight steps is all there is
        ("uniform", 3.0, True),
        ("long tails", 3.5, False),
        ("long tails", 2.0, True),
        ("long tails", 3.5, True),
        ("two clusters", 2.0, True),
        ("two clusters", 3.5, False),
    ],
)
def test_no_more_noise_than_rounding_at_equal_bits(values: str, bits: float, fed_back: bool) -> None:
    array = shaped(values, (256, 512))
    feedback = OneMoment(512)
    metric = feedback.moment.astype(np.float64) if fed_back else np.eye(512)

    def noise_db(quantizer: Quantizer) -> float:
        weights = Matrices(array)
        weights.quantizer = quantizer
        if fed_back:
            weights.feedback, weights.rate_weight = feedback, FEEDBACK_RATE_WEIGHT
        coded = encode_at_bits(weights, bits)
        assert coded.scales is not None
        errors = array - decode_integers(Blob(coded.blob.data))[0] * coded.scales[0]
        found = float(np.einsum("ri,ij,rj->", errors, metric, errors))
        return 10 * float(np.log10(found)) + 6.02 * 8 * coded.size_bytes / weights.size

    assert noise_db(TRELLIS) < noise_db(Quantizer.SCALAR) + 0.02


class OneRowMatters(OneMoment):
    """The same, where one of the rows that plans are tried on weighs more than all others."""

    def row_weights(self, matrix: int) -> Array:  # type: ignore[override]
        return np.where(np.arange(1024) == 260, 1e6, 1.0)


def test_what_plans_leave_is_not_told_by_the_rows_that_weigh_most() -> None:
    """Plans are tried on few rows: errors of the one that weighs most are chance, and would decide."""
    weights = Matrices(np.random.default_rng(3).normal(0, 1, (1024, 512)).astype(F32))
    found = {}
    for feedback in (OneMoment(512), OneRowMatters(512)):
        weights.feedback, weights.rate_weight = feedback, FEEDBACK_RATE_WEIGHT
        fine = measure(weights)
        plan = plan_for_step(fine, 0.5, [FOUR_BITS], {FOUR_BITS: weights.header(FOUR_BITS, None)})
        found[type(feedback)] = try_plan(weights, fine, plan, None, None)
    assert found[OneMoment] == found[OneRowMatters]


@pytest.mark.parametrize("by_sensitivity", [False, True])
def test_of_steps_in_common_too_each_tensor_is_quantized_as_suits_it(tmp_path: Path, by_sensitivity: bool) -> None:
    shape = (256, 512)
    tensors = {"layers.0.a.weight": shaped("long tails", shape) / F32(2.5)}
    tensors["layers.0.b.weight"] = np.random.default_rng(1).normal(0, 1, shape).astype(F32)
    save_file(tensors, tmp_path / "model.safetensors")
    options: dict[str, Any] = {"allocation": "model"}
    if by_sensitivity:
        options = {"moments": write_moments(tmp_path / "m", dict.fromkeys(tensors, shape))}
    report = kvpack.compress(
        tmp_path / "model.safetensors", tmp_path / "out.safetensors", bits=3.0, quantizer="trellis", **options
    )
    assert [tensor.method for tensor in report.tensors] == ["uniform", "trellis"]
    assert report.bits_per_weight <= 3.0


@pytest.mark.parametrize("bits", [4.25, 2.0])
def test_common_steps_stay_below_the_rate(tmp_path: Path, bits: float) -> None:
    rng = np.random.default_rng(0)
    tensors = {
        f"layers.{i}.{name}.weight": rng.normal(0, 0.05 * (i + 1), (200, 96)).astype(F32)
        for i in range(2)
        for name in "ab"
    }
    tensors["layers.0.c.weight"] = (rng.standard_t(3, (300, 640)) * 0.02).astype(F32)
    save_file(tensors, tmp_path / "model.safetensors")
    report = kvpack.compress(
        tmp_path / "model.safetensors", tmp_path / "out.safetensors", bits=bits, quantizer="trellis", allocation="model"
    )
    assert bits - 0.03 < report.bits_per_weight <= bits
