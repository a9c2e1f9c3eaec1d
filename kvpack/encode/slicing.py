"""Parts of blobs, and blobs one above the other, for tensor parallelism: new blobs of the same numbers.

Borders are where lanes begin: multiples of 32 for rows, of ``tile_cols`` for columns. A tile has up to 256 rows, so
that groups of 32 rows meet in new tiles. They are moved as bytes (:mod:`kvpack.format.tile_parts`), no word is decoded.

In the few tiles where groups of several modes, predictors or tables meet this cannot be: a tile has one of each. Such a
tile is decoded and coded again, with those tables of the blob that have all its symbols, in whichever mode is smallest;
no table is added, since a GPU makes a launch for each. Most tensors have one table and mode, and no such tile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from kvpack.encode.blob_decoder import ParsedBlob, decode_tile, element_dtype
from kvpack.encode.blob_encoder import NO_TABLE, encode_tile, join_tiles
from kvpack.encode.frequencies import coded_bits
from kvpack.encode.rans import encoder_table
from kvpack.encode.table_clusters import CONSTANT
from kvpack.encode.tile_coder import count_symbols
from kvpack.errors import GeometryError, TableError
from kvpack.format.blob import Blob
from kvpack.format.header import BlobHeader, TileGeometry
from kvpack.format.layout import GROUP_LANES, MAX_TABLES, NUM_SYMBOLS, TILE_ROWS, Layout, Predictor, Quantizer, TileMode
from kvpack.format.tables import Frequencies
from kvpack.format.tile_parts import TileBytes, TilePart, copied_tile, joined_outliers, joined_tile


@dataclass(frozen=True)
class _Span:
    """Where rows of the new blob come from: ``rows`` of them from ``first_row`` on, in each matrix."""

    blob: ParsedBlob
    table_of: Sequence[int]  # new index of each table
    rows: int
    first_row: int = 0
    first_matrix: int = 0
    matrix_step: int = 1
    first_tile_col: int = 0

    def table_index(self, tile: int) -> int:
        """0 outside mode rans, as the format has it, whatever became of table 0."""
        meta = self.blob.tiles[tile]
        return self.table_of[int(meta["table_index"])] if meta["mode"] == TileMode.RANS else 0

    def places(self, geometry: TileGeometry, tile_col: int, first: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(tile, first row, stop row in it) of the span's rows ``first`` … ``stop`` − 1."""
        header = self.blob.header
        row, end = self.first_row + first, self.first_row + stop
        while row < end:
            tile_row, in_tile = divmod(row, TILE_ROWS)
            last = min(end - tile_row * TILE_ROWS, TILE_ROWS)
            matrix = self.first_matrix + self.matrix_step * geometry.matrix
            tile = (matrix * header.num_tiles_row + tile_row) * header.num_tiles_col + self.first_tile_col + tile_col
            yield tile, in_tile, last
            row = tile_row * TILE_ROWS + last


def _code_again(
    header: BlobHeader,
    geometry: TileGeometry,
    parts: Sequence[TilePart],
    blobs: Sequence[ParsedBlob],
    tables: list[Frequencies],
) -> TileBytes:
    """The tile made of parts that have no tile in common, in the smallest of the ways that there are."""
    layout = header.layout
    elements = np.empty((geometry.rows, geometry.cols), element_dtype(layout.element_bits))
    row = 0
    for part, blob in zip(parts, blobs, strict=True):
        whole = np.empty((part.tile.geometry.rows, geometry.cols), elements.dtype)
        decode_tile(blob, part.tile, blob.decoder_tables, whole)
        elements[row : row + part.rows] = whole[part.first : part.stop]
        row += part.rows
    outliers = joined_outliers(parts)
    ways = []
    for predictor in {part.tile.predictor for part in parts}:
        counts = np.zeros(NUM_SYMBOLS, np.int64)
        count_symbols(elements, layout.parameters, predictor == Predictor.PREVIOUS, counts)
        index, table = CONSTANT, NO_TABLE
        if np.count_nonzero(counts) > 1:
            having = [i for i, frequencies in enumerate(tables) if not counts[frequencies == 0].any()]
            if having:
                index = min(having, key=lambda i: coded_bits(counts, tables[i]))
                table = encoder_table(tables[index])
        ways.append(encode_tile(header, geometry, elements, outliers, counts, index, table, Predictor(predictor)))
    return min(ways, key=lambda way: len(way.data))


def _tile(header: BlobHeader, spans: Sequence[_Span], tables: list[Frequencies], number: int) -> TileBytes:
    """Tile ``number`` of the blob to be."""
    geometry = header.tile_geometry(number)
    tile_col, begin = number % header.num_tiles_col, 0
    places = []
    for span in spans:
        first = max(0, geometry.first_row - begin)
        stop = min(span.rows, geometry.first_row + geometry.rows - begin)
        places += [(span, *place) for place in span.places(geometry, tile_col, first, stop)]
        begin += span.rows
    span, index, first, stop = places[0]
    if len(places) == 1 and stop - first == span.blob.header.tile_geometry(index).rows:
        return copied_tile(span.blob, index, span.table_index(index))
    parts = [TilePart.of(s.blob, tile, a, b, s.table_index(tile)) for s, tile, a, b in places]
    joined = joined_tile(parts, header.layout.element_bits, header.length_bytes)
    return joined or _code_again(header, geometry, parts, [place[0].blob for place in places], tables)


def _assemble(header: BlobHeader, spans: Sequence[_Span], tables: list[Frequencies]) -> bytes:
    """The blob with ``header``'s geometry whose rows are those of ``spans``, one below the other."""
    coded = (_tile(header, spans, tables, number) for number in range(header.num_tiles))
    return join_tiles(header, tables, coded, math.nan).data


def _parsed(blob: Blob | bytes | memoryview) -> ParsedBlob:
    """Whose tiles, which two new ones may need, are checked once."""
    return ParsedBlob(blob.buffer if isinstance(blob, Blob) else blob)


def _shown(layout: Layout) -> str:
    codes = f"{layout.codes_per_symbol} × {layout.code_bits} bits a symbol"
    folded = ", folded" if layout.folded else ""
    trellis = ", of a trellis" if layout.quantizer == Quantizer.TRELLIS else ""
    return f"{layout.element_kind.name.lower()} elements of {layout.element_bits} bits ({codes}{folded}{trellis})"


def _check_range(what: str, first: int, stop: int, size: int, unit: int, why: str) -> None:
    if not 0 <= first < stop <= size:
        raise GeometryError(f"{what} {first} to {stop} of {size}: an empty slice, or one beyond the end")
    for border in (first, stop):
        if border % unit and border != size:
            below = border // unit * unit
            raise GeometryError(
                f"{what} {first} to {stop} of {size}: {border} is no border; {why} at multiples of {unit} "
                f"(the nearest are {below} and {min(below + unit, size)}), and at the end"
            )


def slice_rows(blob: Blob | bytes | memoryview, first: int, stop: int) -> bytes:
    """Rows ``first`` … ``stop`` − 1 (of each matrix) as a blob: decoded, they are the same numbers.

    Args:
        blob: u8 bytes, or parsed.
        first, stop: multiples of 32; ``stop`` may also be the number of rows.

    Raises:
        GeometryError: other borders, with the nearest that are legal.
        BlobError: the blob is damaged.

    Example::

        half = slice_rows(blob, 0, 2048)  # scales: scales[:2048], if there is one for each row
    """
    source = _parsed(blob)
    header = source.header
    _check_range("rows", first, stop, header.rows, GROUP_LANES, "rows are cut")
    span = _Span(source, range(len(source.tables)), stop - first, first)
    return _assemble(replace(header, rows=stop - first), [span], source.tables)


def slice_columns(blob: Blob | bytes | memoryview, first: int, stop: int) -> bytes:
    """Columns ``first`` … ``stop`` − 1 as a blob. Scales of rows stay as they are.

    Args:
        blob: u8 bytes, or parsed.
        first, stop: multiples of the blob's ``tile_cols``; ``stop`` may also be the number of columns. ``kvpack
            compress --tensor-parallel N`` chooses tiles of which N equal parts are made.

    Raises:
        GeometryError: other borders, with the nearest that are legal.
        BlobError: the blob is damaged.
    """
    source = _parsed(blob)
    header = source.header
    _check_range("columns", first, stop, header.cols, header.tile_cols, "columns of this blob are cut")
    span = _Span(source, range(len(source.tables)), header.rows, first_tile_col=first // header.tile_cols)
    return _assemble(replace(header, cols=stop - first), [span], source.tables)


def slice_matrices(blob: Blob | bytes | memoryview, first: int, stop: int, step: int = 1) -> bytes:
    """Matrices ``first`` … ``stop`` − 1 of a blob of several, or each ``step``-th of them, as experts of a rank.

    Raises:
        GeometryError: there are no such matrices.
        BlobError: the blob is damaged.
    """
    source = _parsed(blob)
    header = source.header
    _check_range("matrices", first, stop, header.matrices, 1, "matrices are cut")
    if step < 1:
        raise GeometryError(f"each {step}-th matrix: 1 is the least")
    span = _Span(source, range(len(source.tables)), header.rows, first_matrix=first, matrix_step=step)
    return _assemble(replace(header, matrices=len(range(first, stop, step))), [span], source.tables)


def stack_rows(blobs: Sequence[Blob | bytes | memoryview]) -> bytes:
    """Blobs one above the other (in each matrix) as one: q, k and v, or gate and up, in one product.

    Equal tables are kept once; a GPU makes a launch for each table, so that blobs which :func:`share_tables` has coded
    are multiplied in one. Scales are one for each row then (:func:`stacked_scales`).

    Args:
        blobs: of one layout, and equally many columns, matrices and columns of a tile; all but the last with a multiple
            of 32 rows.

    Raises:
        GeometryError: they do not fit on each other, and why.
        TableError: they have more than 16 tables together.
        BlobError: a blob is damaged.
    """
    if not blobs:
        raise GeometryError("no blobs to stack")
    sources = [_parsed(blob) for blob in blobs]
    one = sources[0].header
    for number, source in enumerate(sources):
        header = source.header
        for what in ("layout", "cols", "tile_cols", "matrices", "transposed"):
            ours, theirs = getattr(one, what), getattr(header, what)
            if ours != theirs:
                if isinstance(ours, Layout):
                    ours, theirs = (_shown(layout) for layout in (ours, theirs))
                raise GeometryError(f"blob {number} cannot be stacked: its {what} is {theirs}, that of blob 0 {ours}")
        if header.rows % GROUP_LANES and number < len(sources) - 1:
            raise GeometryError(
                f"blob {number} cannot be stacked: it has {header.rows} rows, all but the last need a multiple of "
                f"{GROUP_LANES}"
            )
    tables: list[Frequencies] = []
    index_of: dict[bytes, int] = {}
    spans = []
    for source in sources:
        table_of = []
        for table in source.tables:
            index = index_of.setdefault(table.tobytes(), len(tables))
            if index == len(tables):
                tables.append(table)
            table_of.append(index)
        spans.append(_Span(source, table_of, source.header.rows))
    if len(tables) > MAX_TABLES:
        raise TableError(f"{len(sources)} blobs have {len(tables)} tables together, a blob has at most {MAX_TABLES}")
    return _assemble(replace(one, rows=sum(span.rows for span in spans)), spans, tables)
