"""The coder against constriction (an independent ANS coder), and tables against brute force.

constriction codes with 24-bit probabilities; ``Categorical((f << 12) − 1, perfect=False)``, not normalised, is
exactly our 12-bit table, because its builder adds 1 to each scaled probability. Symbols of frequency 0
have to be left out. Its coder keeps a u64 state and u32 words.
"""

from __future__ import annotations

import heapq
import itertools
import math
from typing import Any

import constriction
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpack.encode.blob_encoder import encode_elements
from kvpack.encode.frequencies import (
    _exchange_to_optimum,
    coded_bits,
    entropy_bits,
    normalise_frequencies,
)
from kvpack.encode.rans import decode_lanes, decoder_table, encode_lanes, encoder_table
from kvpack.format.blob import Blob
from kvpack.format.layout import ElementKind, TileMode, integer_layout
from kvpack.format.tables import pack_tables, parse_tables

Counts = npt.NDArray[np.int64]


def oracle_model(frequencies: npt.NDArray[Any]) -> tuple[Any, npt.NDArray[np.int32]]:
    """constriction's model of a table, and our symbols → its symbols (those that occur, renumbered)."""
    present = np.flatnonzero(frequencies)
    renumbered = np.full(256, -1, np.int32)
    renumbered[present] = np.arange(len(present), dtype=np.int32)
    scaled = frequencies[present].astype(np.float64) * 4096 - 1
    return constriction.stream.model.Categorical(scaled, perfect=False), renumbered


def oracle_words(symbols: npt.NDArray[Any], frequencies: npt.NDArray[Any]) -> npt.NDArray[np.uint32]:
    model, renumbered = oracle_model(frequencies)
    coder = constriction.stream.stack.AnsCoder()
    coder.encode_reverse(renumbered[symbols], model)
    return coder.get_compressed()


def random_counts(rng: np.random.Generator, alphabet: int) -> Counts:
    """A histogram with at least two symbols: flat, peaked, sparse or with single occurrences."""
    while True:
        p = rng.dirichlet(np.full(alphabet, rng.choice((0.01, 0.1, 1.0, 30.0))))
        counts = rng.multinomial(int(rng.choice((20, 1000, 100_000))), p)
        counts = np.concatenate([counts, np.zeros(256 - alphabet, np.int64)])
        if np.count_nonzero(counts) > 1:
            return counts


def random_table(seed: int) -> npt.NDArray[np.uint16]:
    rng = np.random.default_rng(seed)
    return normalise_frequencies(random_counts(rng, int(rng.choice((2, 3, 16, 64, 256)))))


@pytest.mark.parametrize(
    ("layout_name", "sigma", "tile_cols"),
    [("compact", sigma, 512) for sigma in (0.5, 2.0, 10.0, 60.0)]
    + [("compact", 2.0, 1024), ("balanced", 20.0, 512), ("balanced", 50.0, 1024), ("fast", 50.0, 512)],
)
def test_payload_against_constriction(layout_name: str, sigma: float, tile_cols: int) -> None:
    """A million elements of 8 bits in lanes: 0.3 % of their symbols and 32 bits a lane is all that may be lost."""
    rng = np.random.default_rng(int(sigma * 10))
    elements = (np.clip(np.rint(rng.normal(0, sigma, (1024, 1024))), -128, 127) + 128).astype(np.uint8)
    layout = integer_layout(layout_name, ElementKind.SIGNED, 8)
    blob = Blob(encode_elements(elements, layout, tile_cols=tile_cols))
    shifts = layout.code_bits * np.arange(layout.codes_per_symbol)
    ours = lanes = theirs = 0
    for index in range(blob.header.num_tiles):
        tile = blob.tile(index)
        assert tile.mode == TileMode.RANS
        g = tile.geometry
        window = elements[g.first_row : g.first_row + g.rows, g.first_col : g.first_col + g.cols]
        symbols = (layout.codes(window).reshape(-1, layout.codes_per_symbol) << shifts).sum(axis=1).astype(np.uint8)
        ours += 16 * len(tile.words) + 32 * len(tile.states)
        lanes += len(tile.states)
        theirs += 32 * len(oracle_words(symbols, blob.tables[tile.table_index]))
    assert lanes == 1024 * 1024 // tile_cols
    assert theirs < ours <= 1.003 * theirs + 32 * lanes
    # 16 bits of a lane's state are L's: without those both coders say the same.
    assert ours - 24 * lanes == pytest.approx(theirs, rel=0.003, abs=8 * lanes)


@pytest.mark.parametrize("seed", range(20))
def test_one_long_lane_against_constriction(seed: int) -> None:
    """200,000 symbols of one lane: our coder and constriction's within 0.05 % and a state."""
    rng = np.random.default_rng(seed)
    table = random_table(seed)
    symbols = rng.choice(256, 200_000, p=table / 4096).astype(np.uint8)
    lanes = np.repeat(symbols[None], 4, axis=0)
    words = np.empty((4, symbols.size + 1), np.uint16)
    states = np.empty(4, np.uint32)
    lengths = np.empty(4, np.int64)
    encode_lanes(lanes, encoder_table(table), words, states, lengths)
    assert lengths.tolist() == [lengths[0]] * 4
    bits = 16 * int(lengths[0]) + math.log2(int(states[0])) - 16
    exact = coded_bits(np.bincount(symbols, minlength=256), table)
    assert bits == pytest.approx(exact, rel=5e-5, abs=2)
    theirs = 32 * len(oracle_words(symbols, table))
    assert abs(16 * int(lengths[0]) + 32 - theirs) < 0.0005 * theirs + 64

    first_words = np.array([0, *np.cumsum(lengths)], np.int64)
    stream = np.concatenate(
        [words[0, -int(lengths[0]) :] if lengths[0] else words[0, :0]] * 4
        + [np.full(symbols.size + 1, 0xABCD, np.uint16)]
    )
    decoded = np.empty_like(lanes)
    assert decode_lanes(states, first_words, stream, decoder_table(table), decoded) == -1
    np.testing.assert_array_equal(decoded, lanes)


@pytest.mark.parametrize("seed", range(60))
def test_probabilities_are_exactly_constrictions(seed: int) -> None:
    """constriction's stream decodes with *our* look-up table: 24-bit slots, of which we take the top 12 bits.

    Every symbol occurs, so every start and every frequency is used; state and words must come out even.
    """
    rng = np.random.default_rng(seed)
    table = random_table(1000 + seed)
    present = np.flatnonzero(table)
    symbols = rng.permutation(np.concatenate([np.repeat(present, 3), rng.choice(present, 500)]))
    words = oracle_words(symbols, table).tolist()
    lookup = decoder_table(table).tolist()
    state = words.pop()
    if words:
        state = state << 32 | words.pop()
    decoded = []
    for _ in range(symbols.size):
        slot = state & 0xFFFFFF
        entry = lookup[slot >> 12]
        symbol, within, frequency = entry & 0xFF, entry >> 8 & 0xFFF, entry >> 20
        assert frequency == int(table[symbol])
        state = (frequency << 12) * (state >> 24) + (within << 12 | slot & 0xFFF)
        if state < 1 << 32 and words:
            state = state << 32 | words.pop()
        decoded.append(symbol)
    assert decoded == symbols.tolist()
    assert (state, words) == (0, [])


@pytest.mark.parametrize("seed", range(20))
def test_our_slots_decode_with_constrictions_model(seed: int) -> None:
    """Each of the 4096 slots, given to constriction as the low bits of a state, is our symbol."""
    table = random_table(2000 + seed)
    model, renumbered = oracle_model(table)
    symbols = decoder_table(table) & 0xFF
    for slot in range(0, 4096, 7):
        for low in (0, 0xFFF):
            # Any word is a legal stream: the lowest 24 bits choose the first symbol.
            coder = constriction.stream.stack.AnsCoder(np.array([slot << 12 | low, 1], np.uint32), seal=False)
            assert coder.decode(model) == renumbered[symbols[slot]]


def test_decoder_table_as_drawn() -> None:
    table = np.zeros(256, np.uint16)
    table[[3, 7, 255]] = 1000, 3000, 96
    lookup = decoder_table(table)
    assert int(lookup[0]) == 1000 << 20 | 0 << 8 | 3
    assert int(lookup[999]) == 1000 << 20 | 999 << 8 | 3
    assert int(lookup[1000]) == 3000 << 20 | 0 << 8 | 7
    assert int(lookup[4095]) == 96 << 20 | 95 << 8 | 255


def test_the_two_steps_of_the_worked_example() -> None:
    """FORMAT.md §11, as one lane of two steps: it ends elsewhere than in L, so it is compared by symbols."""
    table = np.zeros(256, np.uint16)
    table[:2] = 3072, 1024
    lookup = decoder_table(table)
    x = 0x00012C00
    entry = int(lookup[x & 0xFFF])
    assert entry & 0xFF == 1
    x = (entry >> 20) * (x >> 12) + (entry >> 8 & 0xFFF)
    assert x == 18432 < 1 << 16
    x = x << 16 | 0x1234
    assert x == 0x48001234
    entry = int(lookup[x & 0xFFF])
    assert entry & 0xFF == 0
    assert (entry >> 20) * (x >> 12) + (entry >> 8 & 0xFFF) == 0x36000E34


def test_reciprocals_divide_exactly() -> None:
    """x div f by multiplication, for every frequency and the states at which it could round wrongly."""
    for frequency in range(1, 4096):
        table = np.zeros(256, np.uint16)
        table[0], table[1] = frequency, 4096 - frequency
        reciprocal = int(encoder_table(table).reciprocal[0])
        top = (frequency << 20) - 1
        for x in (0, 1, frequency - 1, frequency, 1 << 16, top, top - 1, top - frequency + 1):
            assert x * reciprocal < 1 << 64
            assert x * reciprocal >> 44 == x // frequency
        # The last value below each of some multiples is where an error would show.
        for multiple in (2, 3, 65537, 1 << 19, (1 << 20) - 1, 1 << 20):
            x = multiple * frequency - 1
            assert x * reciprocal >> 44 == multiple - 1


# Frequencies


def cost(counts: Counts, frequencies: npt.NDArray[Any], total: int) -> float:
    used = counts > 0
    return float(counts[used] @ -np.log2(frequencies[used].astype(np.float64) / total))


def best_by_brute_force(counts: Counts, total: int) -> float:
    """The least cost over all ways to share ``total`` among the symbols that occur, each 1 … total − 1."""
    present = counts[counts > 0]
    best = math.inf
    for cuts in itertools.combinations(range(1, total), len(present) - 1):
        parts = np.diff((0, *cuts, total))
        best = min(best, float(present @ (math.log2(total) - np.log2(parts))))
    return best


@given(
    st.lists(st.one_of(st.integers(0, 30), st.integers(0, 10**6)), min_size=2, max_size=5).filter(
        lambda counts: np.count_nonzero(counts) > 1
    ),
    st.integers(6, 14),
    st.randoms(use_true_random=False),
)
@settings(max_examples=300)
def test_exchange_finds_the_optimum_from_any_start(counts: list[int], total: int, rng: Any) -> None:
    array = np.array(counts, np.int64)
    start = np.array([rng.randint(1, total - 1) if count else 0 for count in counts], np.int64)
    frequencies = start.copy()
    _exchange_to_optimum(array, frequencies, total)
    assert frequencies.sum() == total
    assert ((frequencies > 0) == (array > 0)).all()
    assert frequencies.max() < total
    assert cost(array, frequencies, total) == pytest.approx(best_by_brute_force(array, total), rel=1e-9)


def greedy_frequencies(counts: Counts) -> Counts:
    """One unit at a time to whoever gains most: optimal for a separable concave objective, and slow."""
    frequencies = (counts > 0).astype(np.int64)
    heap = [(-int(c) * math.log(2.0), int(s)) for s, c in enumerate(counts) if c]
    heapq.heapify(heap)
    for _ in range(4096 - int(frequencies.sum())):
        _, symbol = heapq.heappop(heap)
        frequencies[symbol] += 1
        f = int(frequencies[symbol])
        heapq.heappush(heap, (-int(counts[symbol]) * math.log1p(1 / f), symbol))
    return frequencies


def naive_frequencies(counts: Counts) -> Counts:
    """Rounding with a floor of 1, the difference put on the most frequent symbol."""
    frequencies = np.rint(counts / counts.sum() * 4096).astype(np.int64)
    frequencies[(counts > 0) & (frequencies == 0)] = 1
    frequencies[np.argmax(frequencies)] += 4096 - frequencies.sum()
    return frequencies


@st.composite
def histograms(draw: st.DrawFn) -> Counts:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return random_counts(rng, draw(st.sampled_from([2, 3, 5, 16, 64, 100, 256])))


@settings(max_examples=150)
@given(histograms())
def test_normalised_frequencies_are_optimal(counts: Counts) -> None:
    frequencies = normalise_frequencies(counts).astype(np.int64)
    assert frequencies.dtype == np.int64
    assert frequencies.sum() == 4096
    assert ((frequencies > 0) == (counts > 0)).all()
    assert frequencies.max() <= 4095
    mine = cost(counts, frequencies, 4096)
    assert mine == pytest.approx(cost(counts, greedy_frequencies(counts), 4096), rel=1e-9)
    naive = naive_frequencies(counts)
    if naive.min() >= 0 and (naive[counts > 0] > 0).all():
        assert mine <= cost(counts, naive, 4096) * (1 + 1e-12) + 1e-9
    assert mine == pytest.approx(coded_bits(counts, frequencies.astype(np.uint16)), rel=1e-12)
    assert mine >= entropy_bits(counts) * counts.sum() * (1 - 1e-12)


@given(st.integers(1, 10**9), st.integers(1, 10**9))
def test_two_symbols(a: int, b: int) -> None:
    """All 4095 tables of two symbols, tried."""
    counts = np.zeros(256, np.int64)
    counts[[5, 200]] = a, b
    f = np.arange(1, 4096)
    costs = a * (12 - np.log2(f)) + b * (12 - np.log2(4096 - f))
    frequencies = normalise_frequencies(counts)
    assert cost(counts, frequencies, 4096) == pytest.approx(float(costs.min()), rel=1e-9)
    assert frequencies[5] + frequencies[200] == 4096


def test_known_tables() -> None:
    counts = np.zeros(256, np.int64)
    counts[:2] = 10**9, 1
    assert normalise_frequencies(counts)[:2].tolist() == [4095, 1]
    assert normalise_frequencies(np.ones(256, np.int64)).tolist() == [16] * 256
    counts[:4] = 4, 2, 1, 1
    assert normalise_frequencies(counts)[:4].tolist() == [2048, 1024, 512, 512]


@pytest.mark.parametrize("occurring", [0, 1])
def test_a_table_needs_two_symbols(occurring: int) -> None:
    counts = np.zeros(256, np.int64)
    counts[:occurring] = 7
    with pytest.raises(ValueError, match="two symbols"):
        normalise_frequencies(counts)


def test_rounding_with_a_floor_of_one_costs_what_the_notes_say() -> None:
    """σ = 8 and all 256 symbols present: naive rounding loses 0.05 bit a symbol or more against the optimum."""
    p = np.exp(-0.5 * ((np.arange(256) - 128) / 8.0) ** 2)
    counts = np.maximum(np.rint(p / p.sum() * 10**6), 1).astype(np.int64)
    naive = cost(counts, naive_frequencies(counts), 4096) / counts.sum()
    mine = cost(counts, normalise_frequencies(counts), 4096) / counts.sum()
    assert mine - entropy_bits(counts) > 0
    assert naive - mine > 0.05


@settings(max_examples=60)
@given(st.lists(st.tuples(histograms()), min_size=1, max_size=16), st.just(256))
def test_tables_survive_packing(drawn: list[tuple[Counts]], alphabet: int) -> None:
    tables = [normalise_frequencies(counts) for (counts,) in drawn]
    encoding, section = pack_tables(tables, alphabet)
    assert len(section) % 16 == 0
    # 2·floor(log2(f + 1)) + 1 bits a symbol, each table in whole bytes; or 2 bytes a symbol.
    packed = sum(-(-sum(2 * (f + 1).bit_length() - 1 for f in table[:alphabet].tolist()) // 8) for table in tables)
    assert len(section) == min(-(-packed // 16) * 16, 2 * 256 * len(tables))
    parsed = parse_tables(memoryview(section), len(tables), encoding, alphabet)
    assert [t.tolist() for t in parsed] == [t.tolist() for t in tables]
