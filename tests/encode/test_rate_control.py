"""Rates that are asked for are met from below, in every layout, also where tiles are of unlike widths."""

from __future__ import annotations

import numpy as np
import pytest

from kvpack.encode.rate import candidate_layouts, plan_for_step
from kvpack.encode.tensor_encoder import Matrices, encode_at_bits, measure, plan_at_common_step
from kvpack.format.layout import ElementKind, Layout

FOURS = Layout(ElementKind.SIGNED, 4, 4, 2)


def weights(kind: str) -> np.ndarray:
    """[512, 1408]: tiles of 256 columns leave a last one of 128; or with rows of unlike spread."""
    rng = np.random.default_rng(3)
    if kind == "Student-t, 4":
        return rng.standard_t(4, (512, 1408)).astype(np.float32)
    spread = np.exp(rng.normal(0, 0.4, (512, 1))) if kind == "rows" else 1.0
    return (rng.normal(0, 0.02, (512, 1408)) * spread).astype(np.float32)


@pytest.mark.parametrize("kind", ["normal", "Student-t, 4", "rows"])
@pytest.mark.parametrize("layout", ["compact", "balanced", "fast"])
def test_rates_are_met(layout: str, kind: str) -> None:
    matrices = Matrices(weights(kind))
    noises = []
    for bits in (2, 2.5, 3, 3.25, 3.5, 4, 4.25, 5, 6, 7):
        encoded = encode_at_bits(matrices, bits, layout_name=layout)
        achieved = 8 * encoded.size_bytes / matrices.size
        assert bits - 0.015 <= achieved <= bits
        assert encoded.layout.name == layout
        noises.append(encoded.noise_db)
    assert noises == sorted(noises, reverse=True)
    # What a bit is worth, over 5 bits: little less than the 6.02 dB of theory.
    assert noises[-1] - noises[0] < -28


# An entropy-coded Gaussian has 1.53 − 6.02·bits dB: what layouts and lanes add is 0.1, 0.15 and 0.4 bits.
@pytest.mark.parametrize(
    ("layout", "bits", "most_db"),
    [
        ("compact", 4.25, -23.3),
        ("balanced", 4.25, -22.8),
        ("fast", 4.25, -20.3),
        ("balanced", 3, -15.6),
        ("fast", 5, -25.7),
    ],
)
def test_noise_at_a_rate(layout: str, bits: float, most_db: float) -> None:
    encoded = encode_at_bits(Matrices(weights("normal")), bits, layout_name=layout)
    assert encoded.noise_db is not None
    assert encoded.noise_db < most_db


def test_unfolded_codes_at_low_rates_alone() -> None:
    """Where they save 0.08 bit of three; from there on half the look-ups count for more."""
    for name in ("auto", "balanced"):
        assert FOURS in candidate_layouts(name, 3.0)
        assert FOURS in candidate_layouts(name, 3.2)
        assert FOURS not in candidate_layouts(name, 3.25)
    for bits in (3.25, 4.25, 7):
        assert all(layout.folded for layout in candidate_layouts("balanced", bits) if layout.element_bits >= 4)
    assert all(layout.folded for bits in (2, 3, 4, 5, 7) for layout in candidate_layouts("fast", bits))
    matrices = Matrices(weights("normal"))
    assert encode_at_bits(matrices, 3).layout == FOURS
    assert encode_at_bits(matrices, 3.5).layout == Layout(ElementKind.SIGNED, 4, 2, 4, folded=True)
    fine = measure(matrices)
    for step, layouts in ((0.8, {FOURS}), (0.3, {Layout(ElementKind.SIGNED, 5, 2, 4, folded=True)})):
        plan = plan_at_common_step(matrices, fine, step * fine.rms, "auto", None)
        assert plan.layout in layouts
        headers = {layout: matrices.header(layout, None) for layout in (plan.layout,)}
        assert plan_for_step(fine, step * fine.rms, [plan.layout], headers).step == plan.step
