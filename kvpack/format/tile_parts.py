"""Tiles put together from parts of others (docs/FORMAT.md §7): bytes are moved, and nothing is decoded.

A part is some groups of 32 rows. Whatever the mode, a group's bytes are its own: states, lengths, words and planes
stand group by group, and 32 rows of K elements of n bits are 4·K·n whole bytes. So parts of one mode, predictor, table
and constant symbol make a tile; others have no tile in common.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvpack.format.blob import GROUPS_PER_TILE, Blob, Tile, check_tile_bytes
from kvpack.format.layout import ALIGNMENT_BYTES, GROUP_LANES, OUTLIER_BYTES, OUTLIER_ROW_SHIFT, TileMode, align


class TileBytes(NamedTuple):
    """A tile: its metadata in the order of ``TILE_METADATA``, ``data_offset`` left 0, and its bytes."""

    metadata: tuple[int, ...]
    data: memoryview


@dataclass(frozen=True)
class TilePart:
    """Rows ``first`` … ``stop`` − 1 of a tile: ``first`` is a multiple of 32, and ``stop`` is one or the tile's end.

    ``outliers`` u32 are those of the part, their rows counted from its first; ``table_index`` is the new blob's.
    """

    tile: Tile
    first: int
    stop: int
    table_index: int
    outliers: npt.NDArray[np.uint32]

    @classmethod
    def of(cls, blob: Blob, index: int, first: int, stop: int, table_index: int) -> TilePart:
        """Rows of tile ``index``, checked.

        Raises:
            BlobError: the tile breaks a rule.
        """
        tile = blob.tile(index)
        meta = blob.tiles[index]
        at = int(meta["data_offset"]) + int(meta["outlier_offset"])
        data = blob.payload[at : at + OUTLIER_BYTES * int(meta["outlier_count"])]
        outliers = np.frombuffer(data, "<u4")
        rows = outliers >> OUTLIER_ROW_SHIFT
        inside = outliers[(rows >= first) & (rows < stop)]
        return cls(tile, first, stop, table_index, inside - np.uint32(first << OUTLIER_ROW_SHIFT))

    @property
    def rows(self) -> int:
        return self.stop - self.first

    @property
    def kind(self) -> tuple[int, ...]:
        """What all parts of a tile have in common."""
        return self.tile.mode, self.tile.predictor, self.table_index, self.tile.constant_symbol

    @property
    def _groups(self) -> slice:
        return slice(self.first // GROUP_LANES, align(self.stop, GROUP_LANES) // GROUP_LANES)

    @property
    def lanes(self) -> slice:
        return slice(self._groups.start * GROUP_LANES, self._groups.stop * GROUP_LANES)

    @property
    def words(self) -> npt.NDArray[np.uint16]:
        ends = np.concatenate(([0], np.cumsum(self.tile.lengths)))
        return self.tile.words[ends[self.lanes.start] : ends[self.lanes.stop]]

    def raw(self, element_bits: int) -> npt.NDArray[np.uint8]:
        """Raw planes, or the elements in mode raw."""
        if self.tile.mode == TileMode.RAW:
            group_bytes = GROUP_LANES // 8 * self.tile.geometry.cols * element_bits
        else:
            group_bytes = len(self.tile.raw) // self.tile.geometry.groups
        return self.tile.raw[self._groups.start * group_bytes : self._groups.stop * group_bytes]


def copied_tile(blob: Blob, index: int, table_index: int) -> TileBytes:
    """A whole tile as it is.

    Raises:
        PayloadCrcError, PaddingError: it is damaged.
    """
    meta = blob.tiles[index]
    check_tile_bytes(blob.payload, meta, f"tile {index}")
    begin, size, raw_offset, mode, predictor, _, *rest = meta.item()
    metadata = 0, size, raw_offset, mode, predictor, table_index, *rest
    return TileBytes(metadata, blob.payload[begin : begin + size])


def joined_outliers(parts: Sequence[TilePart]) -> npt.NDArray[np.uint32]:
    """The outliers of a tile made of ``parts``, one below the other."""
    first, joined = 0, []
    for part in parts:
        joined.append(part.outliers + np.uint32(first << OUTLIER_ROW_SHIFT))
        first += part.rows
    return np.concatenate(joined)


def joined_tile(parts: Sequence[TilePart], element_bits: int, length_bytes: int) -> TileBytes | None:
    """The tile made of ``parts``, one below the other; None if they have no tile in common.

    Args:
        parts: at most 256 rows together, of tiles of equally many columns; all but the last of whole groups.
        element_bits, length_bytes: of the blobs, all the same.
    """
    if len({part.kind for part in parts}) > 1:
        return None
    tile = parts[0].tile
    raw = np.concatenate([part.raw(element_bits) for part in parts])
    front = b""
    if tile.mode == TileMode.RANS:
        lengths = np.concatenate([part.tile.lengths[part.lanes] for part in parts])
        ends = np.cumsum(lengths)
        offsets = np.full(GROUPS_PER_TILE, ends[-1])
        offsets[: len(lengths) // GROUP_LANES] = np.concatenate(([0], ends[GROUP_LANES - 1 : -1 : GROUP_LANES]))
        pieces = [offsets.astype("<u4").tobytes()]
        pieces += [part.tile.states[part.lanes].astype("<u4").tobytes() for part in parts]
        pieces += [lengths.astype(f"<u{length_bytes}").tobytes()]
        pieces += [part.words.astype("<u2").tobytes() for part in parts]
        front = b"".join(pieces)
    elif tile.mode == TileMode.CONSTANT:
        front = bytes([tile.constant_symbol])
    raw_offset = align(len(front), ALIGNMENT_BYTES)
    outlier_offset = align(raw_offset + len(raw), OUTLIER_BYTES)
    outliers = joined_outliers(parts)
    data = np.zeros(outlier_offset + outliers.nbytes, np.uint8)
    data[: len(front)] = np.frombuffer(front, np.uint8)
    data[raw_offset : raw_offset + len(raw)] = raw
    data[outlier_offset:] = outliers.astype("<u4").view(np.uint8)
    view = memoryview(data.data)
    metadata = (
        0,
        len(data),
        raw_offset,
        int(tile.mode),
        int(tile.predictor),
        parts[0].table_index,
        len(outliers),
        outlier_offset,
        zlib.crc32(view),
    )
    return TileBytes(metadata, view)
