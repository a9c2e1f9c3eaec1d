"""Weights of every distribution: more bits are never worse, fewer never larger, and noise is what it is said to be.

Real models: KVPACK_TEST_MODELS names files or directories, separated by ``:``.
"""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

import kvpack
from kvpack.encode import rate as rates
from kvpack.encode.distinct import distinct_values, grid_step
from kvpack.encode.nearest import EncodeOptions, encode_nearest
from kvpack.encode.tensor_encoder import (
    CPU_CODER,
    NEAR_LOSSLESS_DB,
    EncodedTensor,
    Matrices,
    NotEncodableError,
    encode_near_lossless,
)
from kvpack.format.blob import Blob
from kvpack.format.layout import outlier_delta_max

RATES = (1.5, 2.0, 2.5, 3.0, 3.5, 4.25, 5.0, 6.0, 7.5)
# What the same step takes and gives again: sizes are found to 0.004 bits, scales to 2^-12.
SAME_DB = 0.05
OPTIONS = EncodeOptions("auto", None, None, CPU_CODER)
NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
ROWS, COLS = 192, 256
Array = npt.NDArray[Any]


def encode(weights: Array, quality: float | str) -> EncodedTensor | None:
    """None: kept."""
    try:
        return encode_nearest(Matrices(weights), NAMES[weights.dtype.name], quality, None, OPTIONS)
    except NotEncodableError:
        return None


def decoded(weights: Array, quality: float | str, folder: Path) -> tuple[kvpack.TensorReport, Array]:
    save_file({"a.weight": weights}, folder / "m.safetensors")
    options: dict[str, Any] = {"preset": quality} if isinstance(quality, str) else {"bits": quality}
    report = kvpack.compress(folder / "m.safetensors", folder / "o.safetensors", force=True, **options)
    assert kvpack.verify(folder / "o.safetensors", folder / "m.safetensors").mismatches == {}
    with kvpack.open(folder / "o.safetensors") as reader:
        return report.tensors[0], reader.dequantize("a.weight").astype(np.float64)


def check_monotone(weights: Array) -> None:
    sizes, noises = [], []
    for rate in RATES:
        found = encode(weights, rate)
        sizes.append(weights.nbytes if found is None else found.size_bytes)
        noises.append(-np.inf if found is None or found.noise_db is None else found.noise_db)
    assert (np.diff(sizes) >= -0.004 / 8 * weights.size).all(), sizes
    louder = [(a, b) for a, b in pairwise(noises) if b > a + SAME_DB]
    assert not louder, noises
    exact = encode(weights, 32.0)
    assert exact is None or exact.size_bytes >= sizes[-1]


def distributions() -> dict[str, Array]:
    rng = np.random.default_rng(0)
    shape = (ROWS, COLS)
    normal = rng.normal(size=shape)
    column, row = np.arange(COLS) == 5, (np.arange(ROWS) == 7)[:, None]
    one = (np.arange(ROWS * COLS) == 777).reshape(shape)
    return {
        "normal": normal, "Student-t, 3": rng.standard_t(3, shape), "Cauchy": rng.standard_cauchy(shape),
        "Laplace": rng.laplace(size=shape), "lognormal": rng.lognormal(0, 2, shape),
        "uniform": rng.uniform(-1, 1, shape),
        "0 … 1": rng.uniform(0, 1, shape), "+ 0.5": normal + 0.5, "+ 1": normal + 1, "+ 5": normal + 5,
        "+ 20": normal + 20, "+ 1000": normal + 1000, "integers −22 … −15": rng.integers(-22, -14, shape),
        "integers 100 … 300": rng.integers(100, 300, shape), "ternary": rng.integers(-1, 2, shape) * 0.037,
        "16 values": rng.choice(rng.normal(size=16), shape), "5 % not zero": normal * (rng.random(shape) < 0.05),
        "1 % not zero": normal * (rng.random(shape) < 0.01),
        "constant columns": np.where(np.arange(COLS) % 7, normal, 3.3),
        "constant rows": np.where(np.arange(ROWS)[:, None] % 7, normal, 3.3),
        "all rows constant": np.broadcast_to(rng.normal(size=(ROWS, 1)), shape),
        "means of rows": rng.normal(size=(ROWS, 1)) + 0.001 * normal,
        "means of columns": rng.normal(size=(1, COLS)) + 0.001 * normal,
        "column × 100": normal * np.where(column, 100, 1), "column × 1000": normal * np.where(column, 1000, 1),
        "row × 100": normal * np.where(row, 100, 1), "one of 10^6": np.where(one, 1e6, normal * 0.02),
        "tiny": normal * 1e-40, "huge": normal * 1e30, "all equal": np.full(shape, 0.37), "zeros": np.zeros(shape),
        "32 columns": rng.normal(size=(1536, 32)), "48 columns": rng.normal(size=(1024, 48)),
        "8 columns": rng.normal(size=(2048, 8)), "3 rows": rng.normal(size=(3, 4096)),
        "one row": rng.normal(size=(1, 5000)), "convolution": rng.normal(size=(258, 1, 256)),
        "small": rng.normal(size=(64, 64)),
    }  # fmt: skip


@pytest.mark.parametrize("name", distributions())
def test_more_bits_are_never_worse_and_fewer_never_larger(name: str) -> None:
    with np.errstate(under="ignore", over="ignore"):
        check_monotone(distributions()[name].astype(np.float32).astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize("name", ["normal", "+ 20", "integers −22 … −15", "column × 1000", "1 % not zero"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_more_bits_in_other_dtypes(name: str, dtype: Any) -> None:
    check_monotone(distributions()[name].astype(dtype))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_subnormal_numbers(dtype: Any) -> None:
    """Every number is below the dtype's smallest normal one: fp16's are plain numbers in fp32, bf16's are not."""
    smallest = float(ml_dtypes.finfo(dtype).tiny)
    weights = (np.random.default_rng(1).normal(size=(ROWS, COLS)) * smallest / 8).astype(dtype)
    assert np.count_nonzero(weights) > 0.9 * weights.size
    check_monotone(weights)
    found = encode(weights, 4.25)
    assert found is not None
    assert found.method == ("lossless" if dtype is ml_dtypes.bfloat16 else "uniform")


@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    freedom=st.sampled_from([2.0, 4.0, 30.0]),
    mean=st.floats(-30, 30),
    spread_db=st.floats(-600, 600),
    zeros=st.sampled_from([0.0, 0.0, 0.5, 0.97]),
    cols=st.sampled_from([24, 64, 200, 512]),
)
def test_any_mixture(seed: int, freedom: float, mean: float, spread_db: float, zeros: float, cols: int) -> None:
    rng = np.random.default_rng(seed)
    weights = (rng.standard_t(freedom, (max(16, 32768 // cols), cols)) + mean) * 10 ** (spread_db / 20)
    weights[rng.random(weights.shape) < zeros] = 0
    check_monotone(weights.astype(np.float32))


@pytest.mark.parametrize("quality", [4.25, "near-lossless"])
@pytest.mark.parametrize("name", [n for n in distributions() if n not in ("tiny", "all rows constant")])
def test_noise_is_over_the_variance_where_a_mean_matters(name: str, quality: float | str, tmp_path: Path) -> None:
    """The reported noise is never far below that over the variance, of the tensor and within rows and columns."""
    weights = distributions()[name].astype(np.float32)
    report, values = decoded(weights, quality, tmp_path)
    error = ((values - weights.astype(np.float64)) ** 2).sum()
    if report.noise_db is None:
        assert error == 0
        return
    w = weights.astype(np.float64).reshape(len(weights), -1)
    variances = [((w - w.mean()) ** 2).sum()]
    if min(w.shape) >= 8:
        variances += [((w - w.mean(axis, keepdims=True)) ** 2).sum() for axis in (0, 1)]
    honest = 10 * np.log10(error / min(variances))
    # A variance above half of the power is not what noise is compared with.
    assert honest - 3.1 < report.noise_db <= honest + 0.001
    assert report.noise_db < -0.99


def test_one_value_far_from_zero_in_a_file(tmp_path: Path) -> None:
    """Its noise is recorded twice, and ``verify`` and the reader agree with the report."""
    weights = (np.random.default_rng(3).normal(size=(256, 256)) + 5).astype(np.float32)
    report, values = decoded(weights, 4.25, tmp_path)
    noise = 10 * np.log10(((values - weights) ** 2).sum() / ((weights - weights.astype(np.float64).mean()) ** 2).sum())
    # The variance within rows is a little less than that of the tensor.
    assert report.noise_db == pytest.approx(noise, abs=0.03)
    assert report.noise_db < -22
    with kvpack.open(tmp_path / "o.safetensors") as reader:
        info = reader.info("a.weight")
        assert info is not None
        assert info.noise_db == report.noise_db
        assert info.power_noise_db == pytest.approx(noise - 10 * np.log10(26), abs=0.05)


# near-lossless


@pytest.mark.parametrize("name", ["normal", "Student-t, 3", "Laplace", "uniform", "+ 0.5", "constant columns", "huge"])
def test_near_lossless_has_its_noise(name: str, tmp_path: Path) -> None:
    report, _ = decoded(distributions()[name].astype(np.float32), "near-lossless", tmp_path)
    assert report.method == "uniform"
    assert report.noise_db is not None
    assert NEAR_LOSSLESS_DB - 1 < report.noise_db < NEAR_LOSSLESS_DB + 0.5
    assert report.bits_per_weight < 7.8


@pytest.mark.parametrize("factor", [20, 100, 1000])
def test_one_large_column_does_not_make_the_others_coarse(factor: float, tmp_path: Path) -> None:
    weights = np.random.default_rng(4).normal(size=(512, 512)).astype(np.float32)
    weights[:, 9] *= factor
    others = np.arange(512) != 9
    for preset in ("near-lossless", "int8-row"):
        report, values = decoded(weights, preset, tmp_path)
        error = (values - weights)[:, others]
        noise = 10 * np.log10((error**2).sum() / (weights[:, others].astype(np.float64) ** 2).sum() + 1e-30)
        if preset == "int8-row":
            assert noise > (-30 if factor == 20 else -15)
        else:
            assert noise < -41
            # An outlier has 14 bits of magnitude in tiles of 512 columns: beyond that exact coding is left.
            assert report.method == ("uniform" if factor < 1000 else "lossless")


def test_near_lossless_takes_shorter_tiles_where_outliers_must_reach_further() -> None:
    """One tile of 1024 columns holds 8,191 steps; the value has some 12,000."""
    weights = np.random.default_rng(4).normal(size=(256, 1024)).astype(np.float32)
    weights[3, 900] = 350
    encoded = encode_near_lossless(Matrices(weights), layout_name="compact")
    blob = Blob(encoded.blob.data)
    assert blob.header.tile_cols == 512
    assert encoded.noise_db is not None
    assert encoded.noise_db < NEAR_LOSSLESS_DB
    assert blob.tile(1).outliers.deltas.max() > outlier_delta_max(1024)
    weights[3, 900] = 150
    assert Blob(encode_near_lossless(Matrices(weights), layout_name="compact").blob.data).header.tile_cols == 1024


def test_tiny_values_are_not_zeroed(tmp_path: Path) -> None:
    weights = (np.random.default_rng(5).normal(size=(256, 512)) * 1e-40).astype(np.float32)
    for quality in (2.0, 7.5, "near-lossless", "int8-row"):
        report, values = decoded(weights, quality, tmp_path)
        assert report.method == "lossless"
        assert "near the end of the fp32 range" in str(report.reason)
        np.testing.assert_array_equal(values, weights)


# Rates beyond those that quantize


def test_rates_up_to_lossless(tmp_path: Path) -> None:
    """Above 7.5 bits: exact where that fits, else 7.5; never refused."""
    weights = np.random.default_rng(6).normal(size=(256, 512)).astype(ml_dtypes.bfloat16)
    methods = {rate: decoded(weights, rate, tmp_path)[0] for rate in (7.5, 8.0, 10.0, 11.0, 16.0, 32.0)}
    assert [report.method for report in methods.values()] == ["uniform"] * 3 + ["lossless"] * 3
    assert all(7.4 < methods[rate].bits_per_weight <= 7.5 for rate in (7.5, 8.0, 10.0))
    save_file({"a.weight": weights, "b.weight": weights}, tmp_path / "m.safetensors")
    report = kvpack.compress(tmp_path / "m.safetensors", bits=3, tensor_bits={"a": "lossless"})
    assert [tensor.method for tensor in report.tensors] == ["lossless", "uniform"]


# Few values


def test_grids_are_found_and_only_grids() -> None:
    rng = np.random.default_rng(7)
    for step in (1.0, 0.037, 1 / 3, 1e-20, 3e20):
        for low, high in ((-22, -14), (-128, 128), (0, 2), (100, 128), (-1, 2)):
            multiples = rng.integers(low, high, 4096)
            values = np.unique(np.float32(step) * multiples.astype(np.float32))
            found = np.float32(grid_step(values))
            assert found > 0
            np.testing.assert_array_equal(found * np.rint(values / found), values)
    assert grid_step(np.unique(rng.normal(size=40).astype(np.float32))) == 0
    assert grid_step(np.array([1, 129], np.float32)) == 0
    assert grid_step(np.zeros(1, np.float32)) == 0
    assert grid_step(np.array([1e-44, 2e-44], np.float32)) == 0  # no scale is denormal
    assert distinct_values([rng.normal(size=(20, 20)).astype(np.float32)]) is None
    strips = [np.array([[3, 1, 1]], np.float32), np.array([[2, 1, 3]], np.float32)]
    values, counts = distinct_values(strips) or pytest.fail("three values are few")
    assert (values.tolist(), counts.tolist()) == ([1, 2, 3], [3, 1, 2])


# Small tensors


@pytest.mark.parametrize("shape", [(16, 16), (2, 8), (64, 16), (32, 32)])
def test_small_tensors_are_planned_by_few_steps(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """However many rates are tried: 16 × 16 weights took 11,000 plans, and seconds, where each made its own."""
    plans: list[object] = []
    planned = rates.plan_at_step
    monkeypatch.setattr(rates, "plan_at_step", lambda *arguments: plans.append(arguments) or planned(*arguments))
    rng = np.random.default_rng(8)
    for values in (rng.normal(size=shape), 1 + 0.001 * rng.normal(size=shape), rng.integers(-22, -14, shape)):
        for quality in (2.0, 4.85, 7.5, "near-lossless"):
            plans.clear()
            encode(values.astype(np.float32), quality)
            assert len(plans) <= 301  # 42 steps, and the grid's, of each of 7 widths


# Real models


def test_real_models_take_fewer_bytes_at_lower_rates(tmp_path: Path) -> None:
    models = [Path(path) for path in os.environ.get("KVPACK_TEST_MODELS", "").split(":") if path]
    if not models:
        pytest.skip("KVPACK_TEST_MODELS names no model")
    for model in models:
        qualities: list[dict[str, Any]] = [{"bits": rate} for rate in RATES]
        qualities += [{"preset": "near-lossless"}, {"preset": "lossless"}]
        reports = [kvpack.compress(model, tmp_path / "out", dry_run=True, **options) for options in qualities]
        sizes = [report.output_bytes for report in reports]
        assert [*sizes[:-2], sizes[-1]] == sorted([*sizes[:-2], sizes[-1]]), (model, sizes)
        # near-lossless is a noise, which some tensors have at less than 7.5 bits and narrow ones at more.
        assert sizes[-4] < sizes[-2] < sizes[-1], (model, sizes)
        noises = [report.noise_db for report in reports[:-2]]
        assert all(b < a for a, b in pairwise(noises)), (model, noises)  # type: ignore[operator]
