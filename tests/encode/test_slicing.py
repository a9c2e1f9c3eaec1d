"""Slices and stacks of blobs: the numbers are those of the whole, whatever the modes, tables, outliers and shapes."""

from __future__ import annotations

import itertools
from typing import Any

import independent_decoder
import numpy as np
import numpy.typing as npt
import pytest
import sample_blobs as samples
from hypothesis import given, settings
from hypothesis import strategies as st
from test_round_trip import DISTRIBUTIONS, FLOAT_LAYOUTS, NAMED_LAYOUTS, OTHER_LAYOUTS, TRELLIS_LAYOUTS, draw_elements

from kvpack.encode import slicing
from kvpack.encode.blob_decoder import decode_integers
from kvpack.encode.blob_encoder import encode_elements
from kvpack.encode.slicing import slice_columns, slice_matrices, slice_rows, stack_rows
from kvpack.errors import GeometryError, PayloadCrcError, TableError
from kvpack.format.blob import Blob
from kvpack.format.layout import ElementKind, Layout, Predictor, Quantizer, TileMode, integer_layout
from kvpack.runtime.codec.group_table import group_table

Numbers = npt.NDArray[Any]
FIVE_BITS = integer_layout("balanced", ElementKind.SIGNED, 5)


def numbers_of(data: bytes) -> Numbers:
    """Decoded with every check, by two decoders; and a GPU's index of it can be made."""
    group_table(Blob(data))
    ours = decode_integers(Blob(data))
    np.testing.assert_array_equal(ours, independent_decoder.decode_blob(data))
    return ours


def cut(draw: st.DrawFn, size: int, unit: int) -> tuple[int, int]:
    """A legal slice of ``size`` rows or columns."""
    borders = sorted({*range(0, size, unit), size})
    first, stop = sorted(draw(st.lists(st.integers(0, len(borders) - 1), min_size=2, max_size=2, unique=True)))
    return borders[first], borders[stop]


@st.composite
def blobs(draw: st.DrawFn) -> tuple[bytes, Numbers]:
    """A blob of any layout, with tiles of several modes, and its numbers."""
    layout = draw(st.sampled_from(NAMED_LAYOUTS + TRELLIS_LAYOUTS + FLOAT_LAYOUTS + OTHER_LAYOUTS))
    rows = draw(st.one_of(st.integers(1, 600), st.sampled_from([1, 32, 33, 256, 288, 512, 545])))
    cols, tile_cols = draw(st.integers(1, 150)), 32 * draw(st.integers(1, 3))
    distribution = draw(st.sampled_from(DISTRIBUTIONS))
    elements = draw_elements(distribution, (draw(st.integers(1, 2)), rows, cols), layout.element_bits, tile_cols, rows)
    integer = layout.element_kind.is_integer and layout.quantizer == Quantizer.SCALAR
    predictor = draw(st.sampled_from(Predictor)) if integer else Predictor.NONE
    if layout.element_kind != ElementKind.SIGNED:
        data = encode_elements(elements, layout, tile_cols=tile_cols, predictor=predictor)
    else:
        places = draw(st.sets(st.tuples(st.integers(0, rows - 1), st.integers(0, cols - 1)), max_size=12))
        outliers = [(0, row, col, draw(st.sampled_from([-4096, -7, 1, 4095]))) for row, col in sorted(places)]
        data = samples.encode_with_outliers(elements, outliers, layout, tile_cols=tile_cols, predictor=predictor)
    return data, decode_integers(Blob(data))


@given(blobs(), st.data())
@settings(max_examples=60, deadline=None)
def test_a_slice_has_the_numbers_of_the_whole(blob: tuple[bytes, Numbers], data: st.DataObject) -> None:
    whole, numbers = blob
    header = Blob(whole).header
    first, stop = data.draw(st.composite(cut)(header.rows, 32))
    rows = slice_rows(whole, first, stop)
    np.testing.assert_array_equal(numbers_of(rows), numbers[:, first:stop])
    left, right = data.draw(st.composite(cut)(header.cols, header.tile_cols))
    columns = slice_columns(whole, left, right)
    np.testing.assert_array_equal(numbers_of(columns), numbers[:, :, left:right])
    both = slice_rows(columns, first, stop)
    assert both == slice_columns(rows, left, right) or Blob(both).header.num_tables > 1
    last = slice_matrices(both, header.matrices - 1, header.matrices)
    np.testing.assert_array_equal(numbers_of(last), numbers[-1:, first:stop, left:right])
    own = range(header.matrices - 1, header.matrices)
    np.testing.assert_array_equal(decode_integers(Blob(whole), matrices=own), numbers[-1:])


@given(blobs(), st.data())
@settings(max_examples=40, deadline=None)
def test_slices_stacked_are_the_whole(blob: tuple[bytes, Numbers], data: st.DataObject) -> None:
    whole, numbers = blob
    rows = Blob(whole).header.rows
    borders = sorted({0, rows, *(32 * data.draw(st.integers(0, rows // 32)) for _ in range(3))})
    parts = [slice_rows(whole, *pair) for pair in itertools.pairwise(borders)]
    stacked = stack_rows(parts)
    np.testing.assert_array_equal(numbers_of(stacked), numbers)
    if Blob(whole).header.num_tables < 2 and len(set(Blob(whole).tiles["mode"])) == 1:
        assert len(stacked) == len(whole)


@pytest.mark.parametrize("step", [0, -1])
def test_no_distance(step: int) -> None:
    whole = encode_elements(samples.gaussian_elements((4, 32, 64), 5, 2.0, 1), FIVE_BITS, tile_cols=64)
    with pytest.raises(GeometryError, match="1 is the least"):
        slice_matrices(whole, 0, 4, step)


@pytest.mark.parametrize("matrices", [range(0, 4, 2), range(3, 6), range(-1, 2), range(3, 1)])
def test_matrices_that_a_blob_does_not_have(matrices: range) -> None:
    whole = encode_elements(samples.gaussian_elements((4, 32, 64), 5, 2.0, 1), FIVE_BITS, tile_cols=64)
    with pytest.raises(GeometryError, match="of a blob of 4 matrices"):
        decode_integers(Blob(whole), matrices=matrices)


def test_matrices_at_a_distance() -> None:
    elements = samples.gaussian_elements((7, 300, 70), 5, 2.0, 1)
    whole = encode_elements(elements, FIVE_BITS, tile_cols=64)
    for own in (range(1, 7, 2), range(0, 7, 3), range(2, 5)):
        part = slice_matrices(whole, own.start, own.stop, own.step)
        np.testing.assert_array_equal(numbers_of(part), decode_integers(Blob(whole))[own.start : own.stop : own.step])


def moved_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a test fail that decodes a word."""

    def refuse(*_arguments: object) -> None:
        raise AssertionError("a tile was decoded")

    monkeypatch.setattr(slicing, "_code_again", refuse)


def test_ordinary_tensors_are_cut_without_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    moved_tiles(monkeypatch)
    elements = samples.gaussian_elements((600, 192), 5, 2.0, 1)
    whole = encode_elements(elements, FIVE_BITS, tile_cols=64)
    assert Blob(whole).header.num_tables == 1
    part = slice_rows(whole, 96, 600)
    assert numbers_of(part).shape == (1, 504, 192)
    assert (Blob(part).tiles["mode"] == TileMode.RANS).all()
    # A table, and what 96 of the lanes and a tile row's metadata take, is all that a slice can cost.
    assert len(part) < len(whole) * 504 / 600 + 300
    assert slice_rows(whole, 0, 600) == whole == stack_rows([whole])


def test_raw_tiles_are_cut_at_whole_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    moved_tiles(monkeypatch)
    elements = np.random.default_rng(2).integers(0, 8, (301, 37)).astype(np.uint8)
    whole = encode_elements(elements, integer_layout("compact", ElementKind.SIGNED, 3))
    assert (Blob(whole).tiles["mode"] == TileMode.RAW).all()
    np.testing.assert_array_equal(numbers_of(slice_rows(whole, 224, 301))[0], elements[224:].astype(np.int8) - 4)


def test_outliers_move_with_their_rows() -> None:
    outliers = [(0, 31, 3, 9), (0, 32, 1, -9), (0, 255, 0, 100), (0, 256, 63, 4095), (0, 299, 2, -4096)]
    elements = samples.gaussian_elements((1, 300, 70), 5, 2.0, 3)
    whole = samples.encode_with_outliers(elements, outliers, FIVE_BITS, tile_cols=64)
    part = slice_rows(whole, 32, 300)
    assert int(Blob(part).tiles["outlier_count"].sum()) == 4
    assert Blob(part).tile(0).outliers.rows.tolist() == [0, 223, 224]
    np.testing.assert_array_equal(numbers_of(part)[0], decode_integers(Blob(whole))[0, 32:])


def two_kinds(first: Numbers, second: Numbers, layout: Layout) -> bytes:
    """A blob of two tile rows of unlike histograms."""
    return encode_elements(np.concatenate((first, second)), layout, tile_cols=first.shape[1])


UNSIGNED_SIX = integer_layout("compact", ElementKind.UNSIGNED, 6)
FLAT = np.full((256, 64), 44, np.uint8)
OTHER_FLAT = np.full((256, 64), 20, np.uint8)
NARROW = samples.gaussian_elements((256, 64), 6, 0.8, 4)
WIDE = samples.gaussian_elements((256, 64), 6, 9.0, 5)
EVEN = np.random.default_rng(6).integers(0, 64, (256, 64)).astype(np.uint8)


@pytest.mark.parametrize(
    ("above", "below", "mode"),
    [
        (NARROW, WIDE, TileMode.RANS),  # two tables, of which the wide one codes both
        (FLAT, OTHER_FLAT, TileMode.RAW),  # two symbols, and no table at all
        (FLAT, NARROW, TileMode.RAW),  # a symbol that the table does not have
        (np.full_like(FLAT, 32), WIDE, TileMode.RANS),  # one that it has
        (WIDE, EVEN, TileMode.RAW),
        (FLAT, EVEN, TileMode.RAW),
    ],
)
def test_groups_of_two_kinds_meet_in_a_tile(above: Numbers, below: Numbers, mode: TileMode) -> None:
    whole = two_kinds(above, below, UNSIGNED_SIX)
    part = slice_rows(whole, 64, 320)
    assert Blob(part).tiles["mode"].tolist() == [mode]
    np.testing.assert_array_equal(numbers_of(part)[0], np.concatenate((above[64:], below[:64])))
    # Tables that no tile is left for are dropped.
    assert Blob(slice_rows(whole, 0, 256)).header.num_tables == int(Blob(whole).tiles["mode"][0] == TileMode.RANS)


def test_a_table_without_a_symbol_codes_no_tile_that_has_it() -> None:
    """A wrong tile would be the smaller one."""
    whole = two_kinds(NARROW, FLAT, UNSIGNED_SIX)
    assert Blob(whole).tables[0][44] == 0
    part = slice_rows(whole, 32, 288)
    assert Blob(part).tiles["mode"].tolist() == [TileMode.RAW]
    np.testing.assert_array_equal(numbers_of(part)[0], np.concatenate((NARROW[32:], FLAT[:32])))


def test_borders_are_refused_with_those_that_are_legal() -> None:
    whole = encode_elements(samples.gaussian_elements((300, 200), 5, 2.0, 1), FIVE_BITS, tile_cols=96)
    with pytest.raises(GeometryError, match=r"rows 16 to 300 of 300: 16 is no border.*of 32 .*0 and 32"):
        slice_rows(whole, 16, 300)
    with pytest.raises(GeometryError, match=r"columns 0 to 100 of 200: 100 is no border.*of 96 .*96 and 192"):
        slice_columns(whole, 0, 100)
    for first, stop in ((-32, 32), (32, 32), (64, 32), (0, 320)):
        with pytest.raises(GeometryError, match="empty slice, or one beyond the end"):
            slice_rows(whole, first, stop)
    with pytest.raises(GeometryError, match="matrices 0 to 2 of 1"):
        slice_matrices(whole, 0, 2)


def test_damage_gets_no_new_checksum() -> None:
    whole = bytearray(encode_elements(samples.gaussian_elements((300, 64), 5, 2.0, 1), FIVE_BITS, tile_cols=64))
    whole[-40] ^= 1
    for first in (0, 32):
        with pytest.raises(PayloadCrcError):
            slice_rows(bytes(whole), first, 300)
    assert slice_rows(bytes(whole), 0, 256)


def test_stacks_of_unlike_blobs_are_refused() -> None:
    elements = samples.gaussian_elements((64, 96), 5, 2.0, 1)
    one = encode_elements(elements, FIVE_BITS, tile_cols=96)
    for other, what in (
        (encode_elements(elements, FIVE_BITS, tile_cols=64), "tile_cols is 64, that of blob 0 96"),
        (encode_elements(elements[:, :64], FIVE_BITS, tile_cols=96), "cols is 64, that of blob 0 96"),
        (
            encode_elements(elements, integer_layout("fast", ElementKind.SIGNED, 5), tile_cols=96),
            r"layout is signed elements of 5 bits \(8 × 1 bits a symbol, folded\), that of",
        ),
        (encode_elements(np.stack((elements, elements)), FIVE_BITS, tile_cols=96), "matrices is 2"),
        (encode_elements(elements, FIVE_BITS, tile_cols=96, transposed=True), "transposed is True"),
    ):
        with pytest.raises(GeometryError, match=f"blob 1 cannot be stacked: its {what}"):
            stack_rows([one, other])
    with pytest.raises(GeometryError, match="blob 0 cannot be stacked: it has 40 rows"):
        stack_rows([encode_elements(elements[:40], FIVE_BITS, tile_cols=96), one])
    with pytest.raises(GeometryError, match="no blobs"):
        stack_rows([])


@pytest.mark.parametrize(("flat", "mode"), [(FLAT, TileMode.CONSTANT), (EVEN, TileMode.RAW)])
def test_tiles_without_words_name_no_table_of_a_stack(flat: Numbers, mode: TileMode) -> None:
    """Where a blob's first table is another one's second: FORMAT.md §6 wants 0, and readers refuse what is not."""
    below = two_kinds(WIDE, flat, UNSIGNED_SIX)
    whole = Blob(stack_rows([encode_elements(NARROW, UNSIGNED_SIX, tile_cols=64), below]))
    assert whole.tiles["mode"].tolist() == [TileMode.RANS, TileMode.RANS, mode]
    assert whole.tiles["table_index"].tolist() == [0, 1, 0]
    np.testing.assert_array_equal(numbers_of(bytes(whole.buffer))[0], np.concatenate((NARROW, WIDE, flat)))


def test_a_stack_has_up_to_sixteen_tables() -> None:
    def blob(sigma: float) -> bytes:
        return encode_elements(samples.gaussian_elements((32, 64), 6, sigma, 1), UNSIGNED_SIX, tile_cols=64)

    sixteen = [blob(1 + 0.1 * number) for number in range(16)]
    assert Blob(stack_rows(sixteen)).header.num_tables <= 16
    with pytest.raises(TableError, match="17 blobs have 17 tables together"):
        stack_rows([*sixteen, blob(3.0)])
    assert Blob(stack_rows([sixteen[3]] * 20)).header.num_tables == 1
