"""What a step makes of a histogram, against the same done to whole arrays."""

from __future__ import annotations

import numpy as np
import pytest

from kvpack.encode.quantize import NEAREST, NUM_THRESHOLDS, Rounding
from kvpack.encode.rate import LAMBDA, estimate, fixed_bits_per_weight, plan_at_step
from kvpack.encode.rate_sums import place_bins, rate_thresholds
from kvpack.encode.tensor_encoder import Matrices, measure, plan_at_common_step
from kvpack.format.layout import ElementKind, Layout, Quantizer, integer_layouts

LAYOUTS = [
    *(Layout(ElementKind.SIGNED, bits, bits, 1) for bits in (2, 3, 8)),
    *integer_layouts("balanced", ElementKind.SIGNED, 4),
    *integer_layouts("fast", ElementKind.SIGNED, 5),
]


def centres_and_counts(bins: int = 3001) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(bins)
    centres = np.sort(rng.standard_t(2, bins))
    centres[bins // 2] = 0.0
    return centres, rng.integers(0, 1000, bins)


@pytest.mark.parametrize("step", [1e-14, 0.01, 0.3, 50.0])
@pytest.mark.parametrize("offset", [None, 0.25, 0.75])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_bins(layout: Layout, offset: float | None, step: float) -> None:
    centres, counts = centres_and_counts()
    half = 1 << (layout.element_bits - 1)
    thresholds = np.linspace(0.35, 0.9, len(NEAREST.thresholds)).astype(np.float32)
    clamp = np.float32(1.25)
    code_of = layout.codes(np.arange(2 * half))
    codes = np.ones(1 << layout.code_bits, np.int64)  # what is there is added to
    noise, outliers = place_bins(
        centres, counts, step, thresholds, offset is not None, offset or 0.0, clamp, half, code_of, codes
    )

    if offset is None:
        v = np.minimum(np.abs(centres) / step, 2.0**40)
        k = v.astype(np.int64)
        k += v - k >= thresholds[np.minimum(k, len(thresholds) - 1)]
        q = np.where(centres < 0, -k, k)
    else:
        q = np.rint(np.clip(centres / step, -(2.0**40), 2.0**40) - offset).astype(np.int64)
    clipped = np.clip(q, -half, half - 1)
    is_outlier = (q != clipped) & (np.abs(centres) / step - np.abs(clipped + (offset or 0.0)) >= clamp)
    error = centres - step * (np.where(is_outlier, q, clipped) + (offset or 0.0))
    np.testing.assert_array_equal(codes - 1, np.bincount(code_of[clipped + half], counts, minlength=len(codes)))
    assert outliers == counts[is_outlier].sum()
    np.testing.assert_allclose(noise, counts @ (error * error), rtol=1e-12)


@pytest.mark.parametrize("step", [0.01, 0.3, 50.0])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_thresholds(layout: Layout, step: float) -> None:
    centres, counts = centres_and_counts()
    half = 1 << (layout.element_bits - 1)
    code_of = layout.codes(np.arange(2 * half))
    codes = np.empty(1 << layout.code_bits, np.int64)
    thresholds, bits = np.full(NUM_THRESHOLDS, np.nan, np.float32), np.full(NUM_THRESHOLDS + 1, np.nan, np.float32)
    rate_thresholds(centres, counts, step, half, code_of, codes, LAMBDA, thresholds, bits)

    expected, magnitude = NEAREST.thresholds, np.empty(0)
    for _ in range(2):
        k = (np.abs(centres) / step).astype(np.int64)
        k += np.abs(centres) / step - k >= expected[np.minimum(k, len(expected) - 1)]
        of_bins = code_of[np.clip(np.where(centres < 0, -k, k), -half, half - 1) + half]
        found = np.bincount(of_bins, counts, minlength=len(codes)) + 0.5
        lengths = -np.log2(found / found.sum())[code_of]
        magnitude = lengths[half:]
        magnitude[1:] = (magnitude[1:] + lengths[1:half][::-1]) / 2
        expected = np.full(len(expected), 0.5, np.float32)
        expected[: half - 1] = np.clip(0.5 + LAMBDA / 2 * np.diff(magnitude), 0.3, 0.95)
    # Not to the bit: numpy's log2 is another one where it has vectors for it, as of AVX-512, and may differ by an ulp.
    np.testing.assert_allclose(thresholds, expected, rtol=1e-6)
    np.testing.assert_allclose(bits[:half], magnitude, rtol=1e-6)
    assert (bits[half:] == bits[:half].max()).all()


@pytest.mark.parametrize("quantizer", list(Quantizer))
def test_empty_bins_count_for_nothing(quantizer: Quantizer) -> None:
    """A plan is the same to the bit whether or not they are left out."""
    weights = Matrices((np.random.default_rng(1).standard_normal((512, 512)) * 0.02).astype(np.float32))
    fine = measure(weights)
    centres, counts = fine.occupied
    assert 1000 < len(centres) < len(fine.counts) // 2
    assert fine.size == counts.sum() == weights.size
    layout = integer_layouts("balanced", ElementKind.SIGNED, 4, quantizer)[0]
    header = weights.header(layout, None)
    overhead = fixed_bits_per_weight(header)
    plan = plan_at_step(fine, 0.006, layout, overhead, LAMBDA)
    fine.__dict__["occupied"] = fine.centres, fine.counts
    again = plan_at_step(fine, 0.006, layout, overhead, LAMBDA)
    assert again.predicted == plan.predicted
    np.testing.assert_array_equal(again.rounding.thresholds, plan.rounding.thresholds)
    np.testing.assert_array_equal(again.rounding.bits, plan.rounding.bits)


def test_a_common_step_leaves_histograms_as_small_as_they_were() -> None:
    """All of a model are kept, for a step that all tensors share is found by trying many."""
    weights = Matrices((np.random.default_rng(1).standard_normal((128, 512)) * 0.02).astype(np.float32))
    fine = measure(weights)
    before = sum(value.nbytes for value in vars(fine).values() if isinstance(value, np.ndarray))
    plan = plan_at_common_step(weights, fine, 0.006, "auto", None)
    held = [array for value in vars(fine).values() for array in (value if isinstance(value, tuple) else (value,))]
    assert sum(array.nbytes for array in held if isinstance(array, np.ndarray)) == before == 8192 * 8
    assert plan_at_common_step(weights, fine, 0.006, "auto", None).predicted == plan.predicted


def test_an_estimate_of_weights_that_a_step_divides() -> None:
    """Sixteen values of which two are beyond the range: by hand."""
    layout = Layout(ElementKind.SIGNED, 3, 3, 1)
    weights = Matrices(np.tile(np.array([-9, -4, -3, -2, -1, 0, 1, 2, 3, 3, 0, 0, 1, 1, -1, 20], np.float32), (64, 8)))
    fine = measure(weights)
    assert fine.values is not None
    overhead = fixed_bits_per_weight(weights.header(layout, None))
    found = estimate(fine, 1.0, layout, overhead, Rounding(NEAREST.thresholds, np.float32(0.5)))
    assert found.noise == 0.0
    parts = np.array([2, 1, 1, 2, 3, 3, 1, 3]) / 16  # −4 and 3 have an outlier each
    entropy = -(parts @ np.log2(parts))
    expected = min(entropy + overhead.rans, 3 + overhead.raw) + 32 * 2 / 16
    assert found.bits == pytest.approx(expected, rel=1e-9)
