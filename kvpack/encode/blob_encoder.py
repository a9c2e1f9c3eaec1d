"""Elements → blob, on the CPU (docs/FORMAT.md §§2–7).

The bytes depend on the elements and the options alone, never on threads: every decision is taken from integer
histograms, and tiles are put together in order.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kvpack.encode.frequencies import coded_bits, entropy_bits
from kvpack.encode.planes import pack_bits
from kvpack.encode.quantize import DELTA_OFFSET
from kvpack.encode.rans import EncoderTable, encoder_table
from kvpack.encode.table_clusters import cluster_tables
from kvpack.encode.tensor_parallel import dividing_tile_cols
from kvpack.encode.threads import map_ordered
from kvpack.encode.tile_coder import count_symbols, encode_planes, encode_rans_tile
from kvpack.format.blob import (
    TILE_METADATA,
    lane_table_bytes,
    pack_front,
    raw_mode_bytes,
    raw_plane_bytes,
)
from kvpack.format.header import BlobHeader, TileGeometry
from kvpack.format.layout import (
    ALIGNMENT_BYTES,
    CHUNK_COLS,
    GROUP_LANES,
    MAX_TILE_COLS,
    NUM_SYMBOLS,
    OUTLIER_BYTES,
    OUTLIER_ROW_SHIFT,
    TILE_ROWS,
    Layout,
    Predictor,
    Quantizer,
    TileMode,
    align,
    ceil_div,
    outlier_delta_bits,
    outlier_delta_max,
)
from kvpack.format.tables import Frequencies, pack_tables
from kvpack.format.tile_parts import TileBytes

Elements = npt.NDArray[Any]  # unsigned [rows, cols]

# Columns of a tile where a matrix has as many groups of lanes as keep an H200 busy, and where it has fewer.
_TILE_COLS, _SHORT_TILE_COLS = 512, 256
_FLOAT_TILE_COLS = 1024, 512
_BUSY_GROUPS = 3072
# In a smaller matrix the bits that short tiles cost weigh more than the time that they save, except in `fast`.
_LARGE_ELEMENTS = 1 << 22

NO_TABLE = EncoderTable(*(np.zeros(NUM_SYMBOLS, np.uint64) for _ in range(3)))


class Strip(NamedTuple):
    """One tile row of one matrix: up to 256 rows, all columns.

    ``outliers`` u32 [count, 3] holds (row in the strip, column, delta + 2^14) sorted by row, then column.
    """

    elements: Elements
    outliers: npt.NDArray[np.uint32] | None = None


# Gives strip number i (matrix, then tile row) each time it is asked; called from several threads.
StripSource = Callable[[int], Strip]


@dataclass(frozen=True)
class EncodedBlob:
    """The bytes in two parts (a join would double the memory of the largest tensor), and what was measured."""

    front: bytes
    payload: bytearray | memoryview
    entropy_bits_per_element: float
    outlier_count: int

    @property
    def size_bytes(self) -> int:
        return len(self.front) + len(self.payload)

    @property
    def data(self) -> bytes:
        """The blob in one piece."""
        return self.front + self.payload


def even_tile_cols(rows: int, cols: int, layout: Layout, column_parts: int = 1) -> int:
    """Columns of the tiles that a matrix gets: long ones where that costs no speed, all of (nearly) equal length.

    A lane costs 32 bits and more, whatever its length: 0.125 bit a weight at 256 columns, 0.02 at 2048. A GPU needs
    some thousand groups of lanes to be busy, so that only large matrices can afford long ones. The one integer a symbol
    of ``compact`` is for size, and gets the longest. Where the columns will be split into ``column_parts``, tiles end
    at the borders (:mod:`kvpack.encode.tensor_parallel` says whether that can be).

    >>> from kvpack.format.layout import ElementKind, integer_layout
    >>> balanced = integer_layout("balanced", ElementKind.SIGNED, 5)
    >>> [even_tile_cols(rows, cols, balanced) for rows, cols in ((384, 384), (512, 1408), (4096, 4096), (28672, 4096))]
    [384, 480, 256, 512]
    """
    cols //= column_parts
    if layout.codes_per_symbol == 1 and layout.element_kind.is_integer:
        most = MAX_TILE_COLS
    else:
        most, least = _FLOAT_TILE_COLS
        if layout.element_kind.is_integer:
            is_large = layout.codes_per_symbol == 8 or rows * cols * column_parts >= _LARGE_ELEMENTS
            most, least = _TILE_COLS, _SHORT_TILE_COLS if is_large else _TILE_COLS
        if ceil_div(rows, GROUP_LANES) * ceil_div(cols, most) < _BUSY_GROUPS:
            most = least
    if column_parts > 1:
        dividing = dividing_tile_cols(cols, most)
        assert dividing is not None, "the columns cannot be split so"
        return dividing
    parts = ceil_div(cols, most)
    return align(ceil_div(cols, parts), CHUNK_COLS)


def max_tile_bytes(header: BlobHeader, geometry: TileGeometry) -> int:
    """Upper bound of a tile's bytes in mode rans, outliers aside."""
    lanes = geometry.lanes
    words = 2 * lanes * geometry.steps
    planes = raw_plane_bytes(geometry, header.layout.raw_bits)
    return align(lane_table_bytes(geometry, header.length_bytes) + words, ALIGNMENT_BYTES) + planes


def count_strip(
    strip: Strip, layout: Layout, tile_cols: int, predictor: Predictor = Predictor.NONE
) -> npt.NDArray[np.int64]:
    """Symbol histograms of a strip's tiles, i64 [tiles, 256]."""
    cols = strip.elements.shape[1]
    counts = np.zeros((ceil_div(cols, tile_cols), NUM_SYMBOLS), np.int64)
    for tile in range(counts.shape[0]):
        window = strip.elements[:, tile * tile_cols : (tile + 1) * tile_cols]
        count_symbols(window, layout.parameters, predictor == Predictor.PREVIOUS, counts[tile])
    return counts


def count_tiles(
    header: BlobHeader,
    source: StripSource,
    predictor: Predictor = Predictor.NONE,
    executor: ThreadPoolExecutor | None = None,
) -> npt.NDArray[np.int64]:
    """Symbol histograms of all tiles, i64 [num_tiles, 256]."""

    def work(index: int) -> npt.NDArray[np.int64]:
        return count_strip(source(index), header.layout, header.tile_cols, predictor)

    strips = range(header.matrices * header.num_tiles_row)
    return np.concatenate(list(map_ordered(work, strips, executor)))


def estimate_blob_bytes(header: BlobHeader, tile_counts: npt.NDArray[np.int64], outlier_count: int) -> float:
    """Expected size of a blob from its tiles' histograms, without coding it (within about 0.1 %).

    A lane of B bits takes B/16 − 1/2 words on average: its initial state carries 24 bits, of which 16 are L's.
    """
    tables, assignment = cluster_tables(tile_counts, header.layout)
    section = len(pack_tables(tables, header.layout.alphabet_size)[1]) if tables else 0
    total = float(header.payload_offset + OUTLIER_BYTES * outlier_count)
    uses_tables = False
    per_matrix = header.num_tiles // header.matrices
    for tile in range(per_matrix):
        geometry = header.tile_geometry(tile)
        raw = raw_mode_bytes(geometry, header.layout.element_bits)
        planes = raw_plane_bytes(geometry, header.layout.raw_bits)
        lane_tables = lane_table_bytes(geometry, header.length_bytes)
        for matrix in range(header.matrices):
            index = matrix * per_matrix + tile
            counts = tile_counts[index]
            if assignment[index] < 0:
                total += min(raw, ALIGNMENT_BYTES + planes)
                continue
            words = max(0.0, coded_bits(counts, tables[assignment[index]]) / 16 - geometry.rows / 2)
            coded = lane_tables + 2 * words + planes + ALIGNMENT_BYTES / 2
            uses_tables |= coded < raw
            total += min(raw, coded)
    return total + section * uses_tables


def pack_outliers(
    row: npt.NDArray[np.uint32], col: npt.NDArray[np.uint32], delta: npt.NDArray[np.uint32], tile_cols: int
) -> npt.NDArray[np.uint32]:
    """Outliers as FORMAT.md §7.5 says, from row and column in the tile and delta + 2^14, u32 [count] each.

    Raises:
        ValueError: a delta that tiles of this width have no room for; who quantizes sees to that.
    """
    delta_bits = outlier_delta_bits(tile_cols)
    most = outlier_delta_max(tile_cols)
    if (np.abs(2 * (delta.astype(np.int64) - DELTA_OFFSET) + 1) > 2 * most + 1).any():  # -1 - most to most
        raise ValueError(f"an outlier is more than {most} beyond the range")
    low = (delta - np.uint32(DELTA_OFFSET)) & np.uint32((1 << delta_bits) - 1)
    return np.asarray(row << OUTLIER_ROW_SHIFT | col << delta_bits | low, np.uint32)


def _tile_outliers(strip: Strip, first_col: int, cols: int, tile_cols: int) -> npt.NDArray[np.uint32]:
    """The strip's outliers in a tile of ``cols`` columns, packed."""
    if strip.outliers is None or not len(strip.outliers):
        return np.empty(0, np.uint32)
    inside = (strip.outliers[:, 1] >= first_col) & (strip.outliers[:, 1] < first_col + cols)
    row, col, delta = strip.outliers[inside].T
    return pack_outliers(row, col - np.uint32(first_col), delta, tile_cols)


def encode_tile(
    header: BlobHeader,
    geometry: TileGeometry,
    elements: Elements,
    outliers: npt.NDArray[np.uint32],
    counts: npt.NDArray[np.int64],
    table_index: int,
    table: EncoderTable,
    predictor: Predictor,
) -> TileBytes:
    """One tile in whichever mode is smallest."""
    layout = header.layout
    raw_bytes = raw_mode_bytes(geometry, layout.element_bits)
    buffer = np.zeros(
        align(max(max_tile_bytes(header, geometry), raw_bytes) + ALIGNMENT_BYTES, ALIGNMENT_BYTES) + outliers.nbytes,
        np.uint8,
    )
    if table_index < 0:
        mode, raw_offset = TileMode.CONSTANT, ALIGNMENT_BYTES
        if predictor == Predictor.PREVIOUS:
            # Mode constant has no predictor, and equal differences (a ramp) are not equal elements.
            counts = np.zeros(NUM_SYMBOLS, np.int64)
            count_symbols(elements, layout.parameters, False, counts)
        constant = np.count_nonzero(counts) == 1
        end = raw_offset + raw_plane_bytes(geometry, layout.raw_bits) if constant else raw_bytes
        if end < raw_bytes:
            buffer[0] = np.argmax(counts)
            encode_planes(elements, layout.parameters, buffer[raw_offset:].view(np.uint32))
    else:
        mode = TileMode.RANS
        raw_offset, end = encode_rans_tile(
            elements,
            layout.parameters,
            predictor == Predictor.PREVIOUS,
            table,
            header.length_bytes == 1,
            (buffer, buffer.view(np.uint16), buffer.view(np.uint32)),
        )
    if end >= raw_bytes:
        mode, raw_offset, end = TileMode.RAW, 0, raw_bytes
        buffer[:] = 0
        pack_bits(elements, layout.element_bits, buffer)
    outlier_offset = align(end, OUTLIER_BYTES)
    size = outlier_offset + outliers.nbytes
    buffer[outlier_offset:size] = outliers.astype("<u4").view(np.uint8)
    data = memoryview(buffer.data)[:size]
    rans = mode == TileMode.RANS
    return TileBytes(
        (
            0,
            size,
            raw_offset,
            mode,
            predictor if rans else Predictor.NONE,
            table_index if rans else 0,
            len(outliers),
            outlier_offset,
            zlib.crc32(data),
        ),
        data,
    )


def encode_strips(
    header: BlobHeader,
    source: StripSource,
    *,
    predictor: Predictor = Predictor.NONE,
    tile_counts: npt.NDArray[np.int64] | None = None,
    executor: ThreadPoolExecutor | None = None,
) -> EncodedBlob:
    """Encode a tensor strip by strip; its sizes and layout are ``header``'s.

    ``tile_counts`` [num_tiles, 256] are the histograms of exactly these elements, if they are known already. Memory:
    the blob, and a few strips for each thread.

    Raises:
        ValueError: a predictor for a float kind, or for a trellis.
    """
    if predictor != Predictor.NONE and not header.layout.element_kind.is_integer:
        raise ValueError(f"{header.layout.element_kind.name} elements have no predictor")
    if predictor != Predictor.NONE and header.layout.quantizer == Quantizer.TRELLIS:
        raise ValueError("elements of a trellis have no predictor")
    strips = range(header.matrices * header.num_tiles_row)
    if tile_counts is None:
        tile_counts = count_tiles(header, source, predictor, executor)
    tables, assignment = cluster_tables(tile_counts, header.layout)
    encoder_tables = [encoder_table(table) for table in tables]

    def encode(index: int) -> list[TileBytes]:
        strip = source(index)
        done = []
        for column in range(header.num_tiles_col):
            tile = index * header.num_tiles_col + column
            geometry = header.tile_geometry(tile)
            first = geometry.first_col
            table_index = int(assignment[tile])
            done.append(
                encode_tile(
                    header,
                    geometry,
                    strip.elements[:, first : first + geometry.cols],
                    _tile_outliers(strip, first, geometry.cols, header.tile_cols),
                    tile_counts[tile],
                    table_index,
                    encoder_tables[table_index] if table_index >= 0 else NO_TABLE,
                    predictor,
                )
            )
        return done

    coded = chain.from_iterable(map_ordered(encode, strips, executor))
    return join_tiles(header, tables, coded, element_entropy_bits(header.layout, tile_counts))


def join_tiles(
    header: BlobHeader, tables: list[Frequencies], coded: Iterable[TileBytes], entropy_bits_per_element: float
) -> EncodedBlob:
    """The blob of tiles in their order; their ``table_index`` is in ``tables``, of which unused ones are dropped."""
    tiles = np.zeros(header.num_tiles, TILE_METADATA)
    payload = bytearray()
    for tile, (metadata, data) in enumerate(coded):
        tiles[tile] = metadata
        tiles[tile]["data_offset"] = len(payload)
        payload += data
        payload += bytes(align(len(payload), ALIGNMENT_BYTES) - len(payload))
    return EncodedBlob(
        front=finish_front(header, tables, tiles, len(payload)),
        payload=payload,
        entropy_bits_per_element=entropy_bits_per_element,
        outlier_count=int(tiles["outlier_count"].sum()),
    )


def finish_front(
    header: BlobHeader, tables: list[Frequencies], tiles: npt.NDArray[np.void], payload_bytes: int
) -> bytes:
    """The front of a blob whose tiles are coded: ``tiles`` (TILE_METADATA) with ``table_index`` in ``tables``.

    Tiles that ended up in mode raw may have left a table unused: such tables are dropped, and ``tiles`` renumbered.
    """
    rans = tiles["mode"] == TileMode.RANS
    used = sorted(set(tiles["table_index"][rans].tolist()))
    for position, index in enumerate(used):
        tiles["table_index"][rans & (tiles["table_index"] == index)] = position
    encoding, section = pack_tables([tables[index] for index in used], header.layout.alphabet_size)
    header = replace(header, table_encoding=encoding, num_tables=len(used))
    return pack_front(header, section, tiles, payload_bytes)


def element_entropy_bits(layout: Layout, tile_counts: npt.NDArray[np.int64]) -> float:
    """Entropy of the elements of a blob, in bits: that of its symbols, and the raw bits."""
    return entropy_bits(tile_counts.sum(axis=0)) / layout.codes_per_symbol + layout.raw_bits


def array_strips(elements: Elements, header: BlobHeader) -> StripSource:
    """Strips of elements [matrices, rows, cols] that lie in memory."""

    def source(index: int) -> Strip:
        matrix, tile_row = divmod(index, header.num_tiles_row)
        return Strip(elements[matrix, tile_row * TILE_ROWS : (tile_row + 1) * TILE_ROWS])

    return source


def encode_elements(
    elements: Elements,
    layout: Layout,
    *,
    tile_cols: int | None = None,
    transposed: bool = False,
    predictor: Predictor = Predictor.NONE,
    executor: ThreadPoolExecutor | None = None,
) -> bytes:
    """Encode unsigned elements [rows, cols] or [matrices, rows, cols] into a blob.

    >>> from kvpack.format.layout import ElementKind, integer_layout
    >>> data = encode_elements(
    ...     np.array([[7, 8, 8, 9]], np.uint8), integer_layout("balanced", ElementKind.SIGNED, 4)
    ... )
    >>> len(data), data[96:98].hex()
    (112, '8798')

    Raises:
        ValueError: no elements, a wrong dtype, or elements of more than ``layout.element_bits`` bits.
    """
    if elements.ndim == 2:
        elements = elements[None]
    if elements.ndim != 3 or not elements.size:
        raise ValueError(f"elements have shape {elements.shape}; [matrices, rows, cols] is needed")
    expected = np.dtype({8: np.uint8, 16: np.uint16, 32: np.uint32}[max(8, layout.element_bits)])
    if elements.dtype != expected:
        raise ValueError(f"elements are {elements.dtype}; {layout.element_bits} bits need {expected}")
    if int(elements.max()) >> layout.element_bits:
        raise ValueError(f"an element of {int(elements.max())} exceeds {layout.element_bits} bits")
    header = BlobHeader(
        layout=layout,
        rows=elements.shape[1],
        cols=elements.shape[2],
        tile_cols=tile_cols or even_tile_cols(elements.shape[1], elements.shape[2], layout),
        matrices=elements.shape[0],
        transposed=transposed,
    )
    source = array_strips(elements, header)
    return encode_strips(header, source, predictor=predictor, executor=executor).data
