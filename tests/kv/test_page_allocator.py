"""Who gets how many bits: against exhaustive search, and what every choice must keep."""

from __future__ import annotations

import itertools
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpack.errors import AllocationError
from kvpack.format.pages import PageFormat, PageLayout, Side
from kvpack.runtime.kv.allocator import LADDER, POLICIES, ImportanceEMA, Outcome, Pages, Policy, allocate_formats

HEADS, HEAD_DIM = 2, 64
PAGE_BYTES = np.array(
    [[HEADS * PageLayout(side, page_format, HEAD_DIM).block_bytes for page_format in LADDER] for side in Side]
)
FULL = int(PAGE_BYTES[0, -1])
RUNG = {page_format: rung for rung, page_format in enumerate(LADDER)}
# Errors of widths 2, 3, 4, 8 and 16, relative to the values' mean square.
TYPICAL_ERROR = np.array([0.3, 0.07, 0.014, 6e-5, 0])


def make_pages(n: int, seed: int = 0, *, fresh: bool = False, layers: int = 3, sequences: int = 2) -> Pages:
    """Pages of several layers and sequences, in no order; the first of each sequence is pinned."""
    rng = np.random.default_rng(seed)
    per_place = -(-n // (2 * layers * sequences))
    place = rng.permutation(2 * layers * sequences * per_place)[:n]
    index, place = place % per_place, place // per_place
    formats = np.where(index == 0, int(PageFormat.FP16), rng.choice([int(f) for f in LADDER], n))
    return Pages(
        layer=place // 2 % layers,
        sequence=place // 2 // layers,
        index=index,
        side=place % 2,
        format=np.full(n, int(PageFormat.FP16)) if fresh else formats,
        importance=rng.exponential(1, n) ** 2 * (rng.random(n) < 0.8),
        pinned=index == 0,
        errors=TYPICAL_ERROR * rng.lognormal(0, 0.5, (layers, 2, 1)),
    )


def rungs(formats: np.ndarray) -> np.ndarray:
    return np.array([RUNG[PageFormat(int(page_format))] for page_format in formats], int)


def size(pages: Pages, formats: np.ndarray) -> int:
    return int(PAGE_BYTES[pages.side, rungs(formats)].sum())


def least_and_most(pages: Pages) -> tuple[int, int]:
    lowest = np.where(pages.pinned, pages.format, int(LADDER[0]))
    return size(pages, lowest), size(pages, pages.format)


@settings(max_examples=150)
@given(st.integers(0, 80), st.integers(0, 1000), st.sampled_from(POLICIES), st.floats(0, 1.1), st.booleans())
def test_what_every_choice_keeps(n: int, seed: int, policy: Policy, fraction: float, fresh: bool) -> None:
    pages = make_pages(n, seed, fresh=fresh)
    least, most = least_and_most(pages)
    budget = int(fraction * n * FULL)
    found = allocate_formats(pages, PAGE_BYTES, budget, policy=policy)
    assert found.bytes == size(pages, found.formats)
    assert (found.formats == pages.format)[pages.pinned].all()
    assert (rungs(found.formats) <= rungs(pages.format)).all()
    assert found.budget_bytes == budget
    pinned = size(pages, pages.format) - int(PAGE_BYTES[pages.side, rungs(pages.format)][~pages.pinned].sum())
    if budget < least:
        assert found.outcome == (Outcome.PINNED_EXCEED if budget < pinned else Outcome.LOWEST_EXCEEDS)
        assert found.bytes == least
    else:
        assert found.outcome == Outcome.HELD
        assert found.bytes <= budget
    if budget >= most:
        assert (found.formats == pages.format).all()
    elif policy in ("importance", "position") and budget >= least:
        assert budget - found.bytes < max(FULL, 0.01 * budget)


@settings(max_examples=40)
@given(st.integers(1, 6), st.integers(0, 1000), st.floats(0.15, 0.9), st.booleans())
def test_within_one_upgrade_of_exhaustive_search(n: int, seed: int, fraction: float, fresh: bool) -> None:
    pages = make_pages(n, seed, fresh=fresh, layers=1, sequences=1)
    pages = replace(pages, pinned=np.zeros(n, bool))
    budget = int(fraction * n * FULL)
    found = allocate_formats(pages, PAGE_BYTES, budget, hysteresis=0)
    if found.outcome != Outcome.HELD:
        return
    loss = pages.errors[pages.layer, pages.side] * pages.importance[:, None]
    rows = np.arange(n)
    best = min(
        loss[rows, choice].sum()
        for choice in itertools.product(*(range(top + 1) for top in rungs(pages.format)))
        if PAGE_BYTES[pages.side, choice].sum() <= budget
    )
    largest_upgrade = (loss[:, 0] - loss[rows, rungs(pages.format)]).max()
    lost = loss[rows, rungs(found.formats)].sum()
    assert best - 1e-12 <= lost <= best + largest_upgrade + 1e-12


def test_bits_go_where_they_are_worth_most() -> None:
    pages = replace(make_pages(400, fresh=True), errors=np.tile(TYPICAL_ERROR, (3, 2, 1)))
    found = allocate_formats(pages, PAGE_BYTES, int(0.3 * 400 * FULL))
    for side in Side:
        chosen = ~pages.pinned & (pages.side == side)
        order = np.argsort(pages.importance[chosen], kind="stable")
        # Ascending importance, ascending width, but for a last upgrade that did not fit.
        assert (np.diff(rungs(found.formats[chosen])[order]) < 0).sum() <= 1


def test_uniform_is_one_width_and_per_layer_one_of_a_layer_and_side() -> None:
    pages = make_pages(300, fresh=True)
    uniform = allocate_formats(pages, PAGE_BYTES, int(0.4 * 300 * FULL), policy="uniform")
    assert set(uniform.formats[~pages.pinned]) == {PageFormat.INT4}
    layered = allocate_formats(pages, PAGE_BYTES, int(0.4 * 300 * FULL), policy="per-layer")
    widths = {
        (layer, side): set(layered.formats[~pages.pinned & (pages.layer == layer) & (pages.side == side)])
        for layer in range(3)
        for side in Side
    }
    assert all(len(found) == 1 for found in widths.values())
    assert len(set.union(*widths.values())) > 1


def test_by_position_older_pages_have_fewer_bits() -> None:
    pages = make_pages(300, fresh=True)
    found = allocate_formats(pages, PAGE_BYTES, int(0.3 * 300 * FULL), policy="position")
    steps_back = 0
    for layer, sequence, side in itertools.product(range(3), range(2), Side):
        chosen = ~pages.pinned & (pages.layer == layer) & (pages.sequence == sequence) & (pages.side == side)
        order = np.argsort(pages.index[chosen])
        steps_back += int((np.diff(rungs(found.formats[chosen])[order]) < 0).sum())
    assert steps_back <= 1  # the last upgrade may have been one that still fitted
    assert len(set(found.formats[~pages.pinned])) > 1


@settings(max_examples=50)
@given(st.integers(0, 1000), st.floats(0.2, 0.5))
def test_a_wavering_importance_costs_no_bits(seed: int, fraction: float) -> None:
    """Once chosen, widths stay while importance moves by less than the margin and the budget is the same."""
    rng = np.random.default_rng(seed)
    pages = make_pages(120, seed, fresh=True)
    budget = int(fraction * 120 * FULL)
    found = allocate_formats(pages, PAGE_BYTES, budget)
    for _ in range(5):
        moved = pages.importance * rng.uniform(0.95, 1.05, 120)
        again = allocate_formats(replace(pages, format=found.formats, importance=moved), PAGE_BYTES, budget)
        assert (again.formats == found.formats)[pages.format != found.formats].all()
        found = again


def test_a_quantized_page_yields_only_to_what_is_worth_the_margin() -> None:
    """Two pages, bytes for one at 8 bits: the quantized one has it, until the other matters enough."""
    one = make_pages(2, fresh=True)
    both = replace(
        one,
        format=np.array([PageFormat.INT8, PageFormat.FP16]),
        side=np.zeros(2, int),
        pinned=np.zeros(2, bool),
        errors=np.tile(TYPICAL_ERROR, (3, 2, 1)),
    )
    budget = int(PAGE_BYTES[0, 3] + PAGE_BYTES[0, 2])
    for importance, expected in ((1.05, PageFormat.INT8), (1.15, PageFormat.INT4)):
        pages = replace(both, importance=np.array([1.0, importance]))
        assert allocate_formats(pages, PAGE_BYTES, budget, hysteresis=0.1).formats[0] == expected


def test_nothing_is_given_up_that_still_fits() -> None:
    """A fresh page's next upgrade is worth more, but does not fit: a quantized page keeps what it has."""
    pages = replace(
        make_pages(2, fresh=True),
        format=np.array([PageFormat.INT8, PageFormat.FP16]),
        side=np.zeros(2, int),
        pinned=np.zeros(2, bool),
        importance=np.array([1.0, 1e6]),
        errors=np.tile(TYPICAL_ERROR, (3, 2, 1)),
    )
    assert allocate_formats(pages, PAGE_BYTES, int(2 * PAGE_BYTES[0, 3])).formats.tolist() == [PageFormat.INT8] * 2


def test_of_equal_pages_the_first_get_more() -> None:
    """For all that are worth the same the order is known, be they many or few."""
    for n in (10, 5000):
        pages = replace(
            make_pages(n, fresh=True),
            side=np.zeros(n, int),
            pinned=np.zeros(n, bool),
            importance=np.ones(n),
            errors=np.tile(TYPICAL_ERROR, (3, 2, 1)),
        )
        raised = n // 3
        budget = int(PAGE_BYTES[0, 1] * n + (PAGE_BYTES[0, 2] - PAGE_BYTES[0, 1]) * raised)
        found = allocate_formats(pages, PAGE_BYTES, budget)
        assert rungs(found.formats).tolist() == [2] * raised + [1] * (n - raised)
        assert found.bytes == budget


def test_errors_may_be_unknown_where_no_page_is_open() -> None:
    pages = make_pages(60)
    of_first = pages.layer == 0
    pages = replace(pages, pinned=pages.pinned | of_first, errors=pages.errors.copy())
    known = {policy: allocate_formats(pages, PAGE_BYTES, int(0.6 * 60 * FULL), policy=policy) for policy in POLICIES}
    pages.errors[0] = np.nan
    for policy, expected in known.items():
        found = allocate_formats(pages, PAGE_BYTES, int(0.6 * 60 * FULL), policy=policy)
        assert (found.formats == expected.formats).all()
        assert found.outcome == Outcome.HELD


def test_no_pages() -> None:
    for policy in POLICIES:
        assert allocate_formats(make_pages(0), PAGE_BYTES, 0, policy=policy).outcome == Outcome.HELD


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"importance": np.full(4, np.nan)}, "importance has values that are negative or not finite"),
        ({"errors": -np.ones((3, 2, 5))}, "errors has values"),
        ({"errors": np.ones((3, 2, 3))}, r"errors has shape \(3, 2, 3\)"),
        ({"errors": np.ones((1, 2, 5)), "layer": np.arange(4)}, "layer has values from 0 to 3; there are 1"),
        ({"errors": np.full((3, 2, 5), np.nan), "pinned": np.zeros(4, bool)}, "errors has values of open pages"),
        ({"side": np.zeros(3, int)}, r"side has shape \(3,\); there are 4 pages"),
        ({"format": np.full(4, PageFormat.FP8_E4M3)}, "page 0 has format FP8_E4M3"),
    ],
)
def test_columns_that_contradict(change: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(AllocationError, match=message):
        allocate_formats(replace(make_pages(4), **change), PAGE_BYTES, FULL)


def test_options_that_are_none() -> None:
    pages = make_pages(4)
    with pytest.raises(AllocationError, match="policy is 'best'"):
        allocate_formats(pages, PAGE_BYTES, FULL, policy="best")  # type: ignore[arg-type]
    with pytest.raises(AllocationError, match=r"hysteresis is -0\.1"):
        allocate_formats(pages, PAGE_BYTES, FULL, hysteresis=-0.1)
    with pytest.raises(AllocationError, match="must ascend"):
        allocate_formats(pages, PAGE_BYTES[:, ::-1].copy(), FULL)


def test_a_quarter_of_a_million_pages() -> None:
    pages = make_pages(32 * 16 * 256 * 2, fresh=True, layers=32, sequences=16)
    begun = time.perf_counter()
    found = allocate_formats(pages, PAGE_BYTES, int(0.3 * len(pages) * FULL))
    assert time.perf_counter() - begun < 5  # a tenth of that on an idle machine
    assert 0 <= found.budget_bytes - found.bytes < FULL


def test_importance_decays_and_is_fair_to_new_pages() -> None:
    ema = ImportanceEMA(1, 2, 3, decay=0.9)
    assert (ema.values(0) == 1).all()
    for _ in range(100):
        ema.update(0, np.array([[0.7, 0.3, 0.0], [0.0, 0.0, 0.0]]), np.array([2, 0]))
    assert np.allclose(ema.values(0)[0], [0.7, 0.3, 0.5])  # the third has not been seen
    ema.update(0, np.array([[0.2, 0.2, 0.6], [0.0, 0.0, 0.0]]), np.array([3, 0]))
    assert np.allclose(ema.values(0)[0], [0.65, 0.29, 0.6], atol=1e-4)
    for _ in range(100):
        ema.update(0, np.array([[0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]), np.array([3, 0]))
    assert np.allclose(ema.values(0)[0], [0, 0, 1], atol=1e-4)
    ema.forget(0)
    assert (ema.values(0) == 1).all()


def test_several_steps_at_once_are_those_steps() -> None:
    one, many = ImportanceEMA(1, 1, 2), ImportanceEMA(1, 1, 2)
    for ema in (one, many):
        ema.update(0, np.array([[0.5, 0.5]]), np.array([2]))
    for _ in range(7):
        one.update(0, np.array([[0.1, 0.9]]), np.array([2]))
    many.update(0, np.array([[0.1, 0.9]]), np.array([2]), steps=7)
    assert np.allclose(one.values(0), many.values(0))


def test_importance_that_cannot_be() -> None:
    with pytest.raises(AllocationError, match="decay is 1"):
        ImportanceEMA(1, 1, 1, decay=1)
    ema = ImportanceEMA(1, 1, 2)
    with pytest.raises(AllocationError, match="mass has shape"):
        ema.update(0, np.zeros((1, 3)), np.array([2]))
    with pytest.raises(AllocationError, match="not finite"):
        ema.update(0, np.array([[np.nan, 0]]), np.array([2]))
    assert (ema.values(0) == 1).all()


def test_forecast_is_closer_to_the_mean() -> None:
    ema = ImportanceEMA(2, 1, 4)
    assert ema.forecast(0).tolist() == [[1, 1, 1, 1]]
    ema.update(0, np.array([[0.9, 0.1, 0.0, 5.0]]), np.array([3]))
    mean = 1 / 3  # the fourth page is not there: it counts as one of that
    expected = [mean * (0.9 / mean) ** 0.7, mean * (0.1 / mean) ** 0.7, 0, mean]
    assert ema.forecast(0)[0] == pytest.approx(expected)
    ema.update(1, np.zeros((1, 4)), np.array([4]))
    assert ema.forecast(1).tolist() == [[0, 0, 0, 0]]
