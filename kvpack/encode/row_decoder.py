"""Some rows of a blob's only matrix, on the CPU: groups of 32 lanes that have one of them are decoded, no others."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from kvpack.encode.blob_decoder import ParsedBlob, decode_integers, decode_tile
from kvpack.encode.threads import map_ordered
from kvpack.encode.trellis import put_integers
from kvpack.format.blob import Tile
from kvpack.format.layout import GROUP_LANES, TILE_ROWS, ElementKind, Quantizer, TileMode, ceil_div

# From this part of all groups on, decoding whole tiles, many at a time, takes no longer.
_WHOLE_FROM = 0.25


def group_of_tile(tile: Tile, group: int, element_bits: int, raw_bits: int) -> Tile:
    """A group of 32 lanes as a tile of its own, without outliers; of a tile whose bytes have been checked."""
    geometry = tile.geometry
    first = group * GROUP_LANES
    rows = min(GROUP_LANES, geometry.rows - first)
    own = replace(geometry, first_row=geometry.first_row + first, rows=rows)
    if tile.mode == TileMode.RAW:
        row_bits = geometry.cols * element_bits  # 32 of them end at a whole byte
        raw = tile.raw[first * row_bits // 8 : ceil_div((first + rows) * row_bits, 8)]
        return replace(tile, geometry=own, raw=raw)
    plane_bytes = 4 * GROUP_LANES * raw_bits * geometry.chunks
    part = replace(tile, geometry=own, raw=tile.raw[group * plane_bytes : (group + 1) * plane_bytes])
    if tile.mode == TileMode.CONSTANT:
        return part
    lanes = slice(first, first + GROUP_LANES)
    begin, count = int(tile.lengths[:first].sum()), int(tile.lengths[lanes].sum())
    return replace(
        part, states=tile.states[lanes], lengths=tile.lengths[lanes], words=tile.words[begin : begin + count]
    )


def decode_rows(
    blob: ParsedBlob, rows: npt.NDArray[np.int64], executor: ThreadPoolExecutor | None = None
) -> npt.NDArray[np.int16]:
    """The integers of some rows, outliers added: i16 [rows asked for, cols].

    Args:
        blob: of one matrix of the signed kind.
        rows: sorted, each once, all of them there.

    Raises:
        BlobError: a tile that is needed is corrupt.
    """
    header = blob.header
    layout = header.layout
    assert header.matrices == 1
    assert layout.element_kind == ElementKind.SIGNED
    groups, first_of_group = np.unique(rows // GROUP_LANES, return_index=True)
    if len(groups) >= _WHOLE_FROM * ceil_div(header.rows, GROUP_LANES):
        return np.asarray(decode_integers(blob, executor=executor)[0][rows], np.int16)
    out = np.empty((len(rows), header.cols), np.int16)
    ends = [*first_of_group[1:].tolist(), len(rows)]

    def work(number: int) -> None:
        places = slice(int(first_of_group[number]), ends[number])
        tile_row, group = divmod(int(groups[number]), TILE_ROWS // GROUP_LANES)
        in_tile = rows[places] - tile_row * TILE_ROWS
        for tile_col in range(header.num_tiles_col):
            tile = blob.tile(tile_row * header.num_tiles_col + tile_col)
            part = group_of_tile(tile, group, layout.element_bits, layout.raw_bits)
            elements = np.empty((part.geometry.rows, part.geometry.cols), np.uint8)
            decode_tile(blob, part, blob.decoder_tables, elements)
            if layout.quantizer == Quantizer.TRELLIS:
                of_group = put_integers(elements[None], layout.element_bits)[0]
            else:
                of_group = elements - np.int16(1 << (layout.element_bits - 1))
            integers = of_group[in_tile - group * GROUP_LANES].astype(np.int16)
            outliers = tile.outliers
            for row, line in zip(in_tile.tolist(), integers, strict=True):
                begin, end = np.searchsorted(outliers.rows, (row, row + 1))
                line[outliers.cols[begin:end]] += outliers.deltas[begin:end].astype(np.int16)
            first_col = part.geometry.first_col
            out[places, first_col : first_col + part.geometry.cols] = integers

    for _ in map_ordered(work, range(len(groups)), executor if len(groups) > 1 else None):
        pass
    return out
