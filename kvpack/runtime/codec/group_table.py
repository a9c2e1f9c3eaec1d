"""The runtime's index of a blob: where each group of each tile lies (the layout is drawn in ``cuda/codec/tile.cuh``).

A kernel trusts it: what could lead a warp out of the blob is checked here, once, vectorized over all tiles; lane
lengths and words are not (a kernel clamps the former, reads a bounded number of the latter and checks final states).
Nor is what leads nowhere, as padding: :func:`check_unread` sees to that where the CPU's decoder would.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from kvpack.encode.jit import kernel
from kvpack.errors import GeometryError, LaneError, OutlierError, PaddingError, TileBoundsError, TileModeError
from kvpack.format.blob import (
    GROUP_OFFSETS_BYTES,
    GROUPS_PER_TILE,
    Blob,
)
from kvpack.format.header import BlobHeader
from kvpack.format.layout import (
    ALIGNMENT_BYTES,
    CHUNK_COLS,
    GROUP_LANES,
    OUTLIER_BYTES,
    OUTLIER_ROW_SHIFT,
    STATE_LOW,
    TILE_ROWS,
    Layout,
    TileMode,
    ceil_div,
    outlier_delta_bits,
)

_INDEX_BITS = 19  # of a word or an outlier
_COUNT_BITS = 16  # of a group's words; as many has raw_offset / 16
_OUTLIER_COUNT_LOW_BITS = 13  # a group has up to 2^16 outliers: 4 more bits lie elsewhere
_OFFSET_BYTES = np.arange(GROUP_OFFSETS_BYTES)

Index = npt.NDArray[np.int64]


def row_groups(header: BlobHeader) -> int:
    """Groups of 32 rows in a matrix."""
    return ceil_div(header.rows, GROUP_LANES)


def _align(values: Index, multiple: int) -> Index:
    return -(-values // multiple) * multiple


def _refuse(error: type[Exception], bad: npt.NDArray[np.bool_], what: str) -> None:
    if bad.any():
        raise error(f"tile {int(np.argmax(bad))}: {what}")


class _Geometry:
    """What follows for all tiles from a header's numbers alone, i64 [num_tiles]; layers of one shape share it.

    Attributes:
        rows, cols: of the tile; groups, lanes: in it; steps: of a lane.
        words_at: where a rans tile's words begin.
        planes, packed: bytes of its raw planes, and of its elements in mode raw.
        beyond: bool [num_tiles, 9]: the group lies behind the tile's last.
        numbers: rows, cols, groups, steps, words_at, planes and packed beside each other, [num_tiles, 7].
    """

    def __init__(self, layout: Layout, rows: int, cols: int, tile_cols: int, matrices: int) -> None:
        header = BlobHeader(layout, rows, cols, tile_cols, matrices)
        tile_row, tile_col = np.divmod(
            np.arange(header.num_tiles, dtype=np.int64) % (header.num_tiles_row * header.num_tiles_col),
            header.num_tiles_col,
        )
        self.rows = np.minimum(rows - tile_row * TILE_ROWS, TILE_ROWS)
        self.cols = np.minimum(cols - tile_col * tile_cols, tile_cols)
        self.groups = -(-self.rows // GROUP_LANES)
        self.lanes = self.groups * GROUP_LANES
        chunks = -(-self.cols // CHUNK_COLS)
        self.steps = chunks * CHUNK_COLS // layout.codes_per_symbol
        self.words_at = GROUP_OFFSETS_BYTES + self.lanes * (4 + header.length_bytes)
        self.planes = self.lanes * chunks * (CHUNK_COLS // 8 * layout.raw_bits)
        self.packed = -(-(self.rows * self.cols * layout.element_bits) // 8)
        self.beyond = np.arange(GROUPS_PER_TILE + 1) >= self.groups[:, None]
        numbers = self.rows, self.cols, self.groups, self.steps, self.words_at, self.planes, self.packed
        self.numbers = np.stack(numbers, axis=1)


_geometry = lru_cache(maxsize=8)(_Geometry)


def _check_offsets(blob: Blob, geometry: _Geometry, totals: Index) -> None:
    """raw_offset, outlier_offset and data_size of all tiles against what FORMAT.md §§7.1–7.5 prescribe."""
    tiles, mode = blob.tiles, blob.tiles["mode"]
    raw_offset = _align(geometry.words_at + 2 * totals, ALIGNMENT_BYTES)
    raw_offset[mode == TileMode.CONSTANT] = ALIGNMENT_BYTES
    raw_offset[mode == TileMode.RAW] = 0
    end = np.where(mode == TileMode.RAW, geometry.packed, raw_offset + geometry.planes)
    outlier_offset = _align(end, OUTLIER_BYTES)
    size = outlier_offset + OUTLIER_BYTES * tiles["outlier_count"].astype(np.int64)
    _refuse(TileBoundsError, tiles["raw_offset"] != raw_offset, "raw_offset is not what is prescribed")
    _refuse(TileBoundsError, tiles["outlier_offset"] != outlier_offset, "outlier_offset is not what is prescribed")
    _refuse(TileBoundsError, tiles["data_size"] != size, "data_size is not what is prescribed")


def _group_offsets(blob: Blob, geometry: _Geometry) -> tuple[Index, Index]:
    """First words [num_tiles, 9] of all groups (the last column: of no group), and their numbers [num_tiles, 8]."""
    header, tiles = blob.header, blob.tiles
    firsts = np.zeros((header.num_tiles, GROUPS_PER_TILE + 1), np.int64)
    is_rans = tiles["mode"] == TileMode.RANS
    rans = np.flatnonzero(is_rans)
    if not len(rans):
        return firsts, firsts[:, 1:]
    _refuse(TileBoundsError, is_rans & (tiles["data_size"] < geometry.words_at), "too short for its lane tables")
    payload = np.frombuffer(blob.payload, np.uint8)
    at = tiles["data_offset"][rans].astype(np.int64)
    firsts[rans, :GROUPS_PER_TILE] = payload[at[:, None] + _OFFSET_BYTES].view("<u4")
    # The number of all words follows from raw_offset, to within the padding, and is the offset behind the last group;
    # a full tile has none, so that its last group's length is found from its lanes.
    totals = firsts[rans, GROUPS_PER_TILE - 1]
    full = np.flatnonzero(geometry.groups[rans] == GROUPS_PER_TILE)
    if len(full):
        last_bytes = GROUP_LANES * header.length_bytes
        lengths_at = at[full] + (geometry.words_at[rans[full]] - last_bytes)
        last = payload[lengths_at[:, None] + np.arange(last_bytes)]
        totals[full] += last.view(f"<u{header.length_bytes}").sum(axis=1, dtype=np.int64)
    firsts[rans, GROUPS_PER_TILE] = totals
    words = np.diff(firsts, axis=1)
    wrong = np.any(words < 0, axis=1) | (firsts[:, 0] != 0)
    wrong |= (geometry.beyond & (firsts != firsts[:, -1:])).any(axis=1)
    _refuse(LaneError, wrong, "group_offset does not match the lanes' lengths")
    _refuse(LaneError, np.any(words >= 1 << _COUNT_BITS, axis=1), "more words than 12 bits a step")
    return firsts, words


def _outlier_ranges(blob: Blob, geometry: _Geometry) -> tuple[Index, Index]:
    """First outlier and number of outliers of all groups, [num_tiles, 8] each."""
    num_tiles = blob.header.num_tiles
    first = np.zeros((num_tiles, GROUPS_PER_TILE), np.int64)
    count = np.zeros((num_tiles, GROUPS_PER_TILE), np.int64)
    counts = blob.tiles["outlier_count"].astype(np.int64)
    having = np.flatnonzero(counts)
    if not len(having):
        return first, count
    tile_of = np.repeat(having, counts[having])
    in_tile = np.arange(len(tile_of)) - np.repeat(np.cumsum(counts[having]) - counts[having], counts[having])
    at = blob.tiles["data_offset"].astype(np.int64)[tile_of] + blob.tiles["outlier_offset"][tile_of]
    at += OUTLIER_BYTES * in_tile
    payload = np.frombuffer(blob.payload, np.uint8)
    entries = payload[at[:, None] + np.arange(OUTLIER_BYTES)].view("<u4")[:, 0].astype(np.int64)
    delta_bits = outlier_delta_bits(blob.header.tile_cols)
    place = entries >> delta_bits
    row, col = entries >> OUTLIER_ROW_SHIFT, place & ((1 << (OUTLIER_ROW_SHIFT - delta_bits)) - 1)
    wrong = np.zeros(num_tiles, np.bool_)
    wrong[tile_of[(row >= geometry.rows[tile_of]) | (col >= geometry.cols[tile_of])]] = True
    _refuse(OutlierError, wrong, "an outlier lies outside the tile")
    same = tile_of[1:] == tile_of[:-1]
    wrong[tile_of[1:][same & (place[1:] <= place[:-1])]] = True
    _refuse(OutlierError, wrong, "outliers are not sorted strictly by row and column")
    wrong[tile_of[entries & ((1 << delta_bits) - 1) == 0]] = True
    _refuse(OutlierError, wrong, "an outlier of 0")
    np.add.at(count, (tile_of, row // GROUP_LANES), 1)
    first[:, 1:] = np.cumsum(count, axis=1)[:, :-1]
    first[count == 0] = 0
    return first, count


def group_table(blob: Blob) -> npt.NDArray[np.uint32]:
    """The group table of a blob, u32 [matrices · row groups · tile columns, 4], in that order.

    Raises:
        BlobError: the payload breaks a rule that would lead a kernel out of it, or the blob exceeds what 32 bits of
            16-byte units address (64 GiB).
    """
    header, tiles = blob.header, blob.tiles
    if header.blob_bytes >= ALIGNMENT_BYTES << 32:
        raise GeometryError(f"a blob of {header.blob_bytes} bytes; the runtime addresses up to {ALIGNMENT_BYTES << 32}")
    geometry = _of(blob)
    firsts, num_words = _group_offsets(blob, geometry)
    _check_offsets(blob, geometry, firsts[:, -1])
    first_outlier, num_outliers = _outlier_ranges(blob, geometry)

    first_word = firsts[:, :-1] + (geometry.words_at // 2)[:, None]
    first_word[tiles["mode"] != TileMode.RANS] = 0
    raw_unit = tiles["raw_offset"].astype(np.int64) // ALIGNMENT_BYTES
    too_many = (first_word.max(axis=1) >= 1 << _INDEX_BITS) | (raw_unit >= 1 << _COUNT_BITS)
    _refuse(LaneError, too_many, "more words than 12 bits a step")
    entries = np.empty((header.num_tiles, GROUPS_PER_TILE, 4), np.int64)
    entries[:, :, 0] = ((header.payload_offset + tiles["data_offset"].astype(np.int64)) // ALIGNMENT_BYTES)[:, None]
    flags = tiles["mode"].astype(np.int64) | tiles["predictor"].astype(np.int64) << 2
    flags |= tiles["table_index"].astype(np.int64) << 3
    high, low = np.divmod(num_outliers, 1 << _OUTLIER_COUNT_LOW_BITS)
    entries[:, :, 1] = first_word | (flags[:, None] | high << 7) << _INDEX_BITS
    entries[:, :, 2] = num_words | raw_unit[:, None] << _COUNT_BITS
    entries[:, :, 3] = first_outlier | low << _INDEX_BITS

    # Tiles come by matrix, tile row, tile column; groups by matrix, row group, tile column.
    by_tile = entries.reshape(header.matrices, header.num_tiles_row, header.num_tiles_col, GROUPS_PER_TILE, 4)
    by_row = by_tile.swapaxes(2, 3).reshape(header.matrices, -1, header.num_tiles_col, 4)
    return np.ascontiguousarray(by_row[:, : row_groups(header)].reshape(-1, 4), np.uint32)


def _of(blob: Blob) -> _Geometry:
    header = blob.header
    return _geometry(header.layout, header.rows, header.cols, header.tile_cols, header.matrices)


_UNREAD: tuple[tuple[type[Exception], str], ...] = (
    (PaddingError, "the bytes behind the tile are not zero"),
    (PaddingError, "the bytes before the outliers are not zero"),
    (PaddingError, "the bytes behind the words are not zero"),
    (PaddingError, "bytes 1 to 15 of a constant tile are not zero"),
    (PaddingError, "the bits behind the last element are not zero"),
    (TileModeError, "a constant symbol that the layout does not have"),
    (LaneError, f"an initial state below {STATE_LOW}"),
    (LaneError, f"a padding lane has words, or a state other than {STATE_LOW}"),
    (LaneError, "a lane with more words than steps"),
    (LaneError, "group_offset does not match the lanes' lengths"),
)
_RANS, _CONSTANT, _RAW = int(TileMode.RANS), int(TileMode.CONSTANT), int(TileMode.RAW)


@kernel
def _is_zero(payload, begin, end):  # type: ignore[no-untyped-def]
    found = 0
    for i in range(begin, end):
        found |= payload[i]
    return found == 0


@kernel
def _number(payload, at, size):  # type: ignore[no-untyped-def]
    """The little-endian number of ``size`` bytes."""
    value = np.int64(0)
    for i in range(size):
        value |= np.int64(payload[at + i]) << 8 * i
    return value


@kernel
def _find_unread(payload, tiles, geometry, element_bits, alphabet_size, length_bytes, bad):  # type: ignore[no-untyped-def]
    """Fill bool ``bad`` [len(_UNREAD), num_tiles], of i64 ``tiles`` [num_tiles, 5] and ``geometry`` [num_tiles, 7]."""
    for tile in range(len(tiles)):
        mode, at, size, raw_offset, outlier_offset = tiles[tile]
        rows, cols, groups, steps, words_at, planes, packed = geometry[tile]
        end = packed if mode == _RAW else raw_offset + planes
        bad[0, tile] = not _is_zero(payload, at + size, at - (-size // ALIGNMENT_BYTES * ALIGNMENT_BYTES))
        bad[1, tile] = not _is_zero(payload, at + end, at + outlier_offset)
        if mode == _RAW:
            spare = 8 * packed - rows * cols * element_bits
            bad[4, tile] = (payload[at + packed - 1] & (0xFF00 >> spare) & 0xFF) != 0
        elif mode == _CONSTANT:
            bad[3, tile] = not _is_zero(payload, at + 1, at + ALIGNMENT_BYTES)
            bad[5, tile] = payload[at] >= alphabet_size
        elif mode == _RANS:
            states_at = at + GROUP_OFFSETS_BYTES
            lengths_at = states_at + 4 * GROUP_LANES * groups
            words = of_group = 0
            for lane in range(GROUP_LANES * groups):
                state = _number(payload, states_at + 4 * lane, 4)
                length = _number(payload, lengths_at + length_bytes * lane, length_bytes)
                bad[6, tile] |= state < STATE_LOW
                bad[7, tile] |= lane >= rows and (state != STATE_LOW or length != 0)
                bad[8, tile] |= length > steps
                of_group += length
                if lane % GROUP_LANES == GROUP_LANES - 1:
                    words += of_group
                    group = lane // GROUP_LANES + 1
                    if group < GROUPS_PER_TILE:  # behind the last one is no offset
                        offset = _number(payload, at + 4 * group, 4)
                        bad[9, tile] |= words != offset
                        words = offset
                    of_group = 0
            bad[2, tile] = not _is_zero(payload, at + words_at + 2 * words, at + raw_offset)


def check_unread(blob: Blob) -> None:
    """What no kernel reads, or takes as it is, against FORMAT.md §§7.1–7.5, of a blob that has a group table: zeros
    between the parts of a tile and behind it, states and lengths of lanes, constant symbols.

    Raises:
        PaddingError, LaneError, TileModeError
    """
    header, geometry = blob.header, _of(blob)
    names = "mode", "data_offset", "data_size", "raw_offset", "outlier_offset"
    tiles = np.stack([blob.tiles[name].astype(np.int64) for name in names], axis=1)
    bad = np.zeros((len(_UNREAD), header.num_tiles), np.bool_)
    payload = np.frombuffer(blob.payload, np.uint8)
    _find_unread(
        payload,
        tiles,
        geometry.numbers,
        header.layout.element_bits,
        header.layout.alphabet_size,
        header.length_bytes,
        bad,
    )
    for found, (error, what) in zip(bad, _UNREAD, strict=True):
        _refuse(error, found, what)


def max_group_words(table: npt.NDArray[np.uint32]) -> int:
    """The most words that a group has."""
    return int((table[:, 2] & ((1 << _COUNT_BITS) - 1)).max(initial=0))
