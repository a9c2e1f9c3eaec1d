"""Blob → elements, on the CPU: the executable specification of docs/FORMAT.md.

Every decode checks what can be checked: CRCs, lane tables, and that each lane ends in state L.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from kvpack.encode.planes import unpack_bits
from kvpack.encode.rans import decoder_table
from kvpack.encode.threads import map_ordered
from kvpack.encode.tile_coder import decode_constant_tile, decode_rans_tile
from kvpack.encode.trellis import put_integers
from kvpack.errors import GeometryError, LaneStateError, LimitError
from kvpack.format.blob import Blob, Tile
from kvpack.format.container import BLOB_SUFFIX, Container
from kvpack.format.header import BlobHeader
from kvpack.format.layout import (
    CHUNK_COLS,
    GROUP_LANES,
    ElementKind,
    Predictor,
    Quantizer,
    TileMode,
)

ELEMENT_DTYPES: dict[int, type[np.unsignedinteger[Any]]] = {
    8: np.uint8,
    16: np.uint16,
    32: np.uint32,
}

# A reader's own limit (FORMAT.md §10): a constant tile expands 48 bytes, its metadata counted, to 524,288 elements.
FREE_ELEMENTS = 1 << 28
ELEMENTS_PER_BLOB_BYTE = 256


def element_limit(blob_bytes: int) -> int:
    """How many elements blobs of that size may have, a tensor's or a file's, if the reader is not told otherwise."""
    return max(FREE_ELEMENTS, ELEMENTS_PER_BLOB_BYTE * blob_bytes)


def check_expansion(container: Container, max_elements: int | None) -> None:
    """Refuse to decode all of a file if that is more than ``max_elements``, by default max(2^28, 256 × blob bytes).

    Tensors that keep the limit each may be many. Shapes tell before anything is decoded.

    Raises:
        LimitError
    """
    elements = sum(math.prod(entry["shape"]) for entry in container.coded.values())
    blob_bytes = sum(container.tensors[name + BLOB_SUFFIX].size_bytes for name in container.coded)
    limit = element_limit(blob_bytes) if max_elements is None else max_elements
    if elements > limit:
        raise LimitError(
            f"{container.path}: {elements} elements in {blob_bytes} bytes of blobs exceed the limit of {limit}; "
            "pass max_elements to allow more"
        )


def element_dtype(element_bits: int) -> type[np.unsignedinteger[Any]]:
    """The NumPy type that holds elements of that many bits."""
    return ELEMENT_DTYPES[max(8, element_bits)]


def check_element_limit(blob: Blob, max_elements: int | None) -> None:
    """Refuse to allocate more than ``max_elements``, by default max(2^28, 256 × blob bytes).

    Raises:
        LimitError
    """
    limit = element_limit(len(blob.buffer)) if max_elements is None else max_elements
    if blob.header.num_elements > limit:
        raise LimitError(
            f"{blob.header.num_elements} elements in {len(blob.buffer)} bytes exceed the limit of {limit}; "
            "pass max_elements to allow more"
        )


class ParsedBlob(Blob):
    """A blob that is decoded many times: its tables are made, and its tiles checked and parsed, once.

    The bytes must stay what they are. Of a change behind the first decoding only what lanes end in tells.
    """

    def __init__(self, buffer: memoryview | bytes) -> None:
        super().__init__(buffer)
        self.decoder_tables = [decoder_table(table) for table in self.tables]
        self._tiles: dict[int, Tile] = {}

    def tile(self, index: int, *, check_crc: bool = True) -> Tile:
        """As :meth:`Blob.tile`, which is asked once."""
        found = self._tiles.get(index)
        if found is None:
            found = self._tiles[index] = super().tile(index, check_crc=check_crc)
        return found


def _decoder_tables(blob: Blob) -> list[npt.NDArray[np.uint32]]:
    return blob.decoder_tables if isinstance(blob, ParsedBlob) else [decoder_table(table) for table in blob.tables]


def _aligned(data: npt.NDArray[np.uint8], dtype: str) -> npt.NDArray[Any]:
    """A read-only aligned view (or copy): numba compiles once for each combination of those flags."""
    array = np.require(data.view(dtype), requirements=["C", "A"])
    array.flags.writeable = False
    return array


def decode_tile(blob: Blob, tile: Tile, tables: list[npt.NDArray[np.uint32]], out: npt.NDArray[Any]) -> None:
    """Decode one tile into ``out`` [rows, cols of the tile], unsigned elements, outliers not added.

    Raises:
        LaneStateError: a lane does not end in state L at its last word.
    """
    layout = blob.header.layout
    geometry = tile.geometry
    if tile.mode == TileMode.RAW:
        unpack_bits(tile.raw, layout.element_bits, out)
        return
    planes = _aligned(tile.raw, "<u4").reshape(geometry.groups, geometry.chunks, GROUP_LANES * layout.raw_bits)
    line = np.empty(geometry.chunks * CHUNK_COLS, np.uint8 if layout.element_bits <= 8 else np.uint32)
    if tile.mode == TileMode.CONSTANT:
        decode_constant_tile(np.uint8(tile.constant_symbol), planes, layout.parameters, line, out)
        return
    words = np.zeros(len(tile.words) + geometry.steps + 1, np.uint16)
    words[: len(tile.words)] = tile.words
    bad = decode_rans_tile(
        tile.states.astype(np.uint32),
        tile.lengths,
        words,
        planes,
        tables[tile.table_index],
        layout.parameters,
        tile.predictor == Predictor.PREVIOUS,
        line,
        out,
    )
    if bad >= 0:
        raise LaneStateError(f"tile {tile.index}, lane {bad}: does not end in the initial state")


def decode_elements(
    blob: Blob,
    *,
    executor: ThreadPoolExecutor | None = None,
    max_elements: int | None = None,
    out: npt.NDArray[Any] | None = None,
    matrices: range | None = None,
) -> npt.NDArray[Any]:
    """All elements of a blob: unsigned [matrices, rows, cols], of the smallest NumPy type that holds them.

    Args:
        out: an array of that shape and type to decode into (fresh memory costs a third of the time).
        matrices: some that lie one behind another; all by default. Of others nothing is looked at.

    Raises:
        GeometryError: there are no such matrices.
        LimitError: more elements than ``max_elements`` (see :func:`check_element_limit`).
        BlobError: the payload is corrupt; the message names the tile.
    """
    check_element_limit(blob, max_elements)
    header = blob.header
    chosen = range(header.matrices) if matrices is None else matrices
    if chosen.step != 1 or not 0 <= chosen.start <= chosen.stop <= header.matrices:
        raise GeometryError(f"{chosen} of a blob of {header.matrices} matrices")
    shape = (len(chosen), header.rows, header.cols)
    dtype = element_dtype(header.layout.element_bits)
    if out is None:
        out = np.empty(shape, dtype)
    elif out.shape != shape or out.dtype != dtype:
        raise ValueError(f"out is {out.dtype} {out.shape}, the blob needs {np.dtype(dtype)} {shape}")
    target = out
    tables = _decoder_tables(blob)

    def work(index: int) -> None:
        tile = blob.tile(index)
        g = tile.geometry
        rows, cols = slice(g.first_row, g.first_row + g.rows), slice(g.first_col, g.first_col + g.cols)
        decode_tile(blob, tile, tables, target[g.matrix - chosen.start, rows, cols])

    for _ in map_ordered(work, _tiles_of(header, chosen), executor):
        pass
    return target


def _tiles_of(header: BlobHeader, matrices: range) -> range:
    count = header.num_tiles_row * header.num_tiles_col
    return range(matrices.start * count, matrices.stop * count)


def _add_outliers(blob: Blob, integers: npt.NDArray[np.int16], tiles: Iterable[int], first_matrix: int) -> None:
    """Add tiles' outliers to ``integers`` i16 [matrices, rows, cols] in place.

    CRCs are not checked again: the elements have been decoded before.
    """
    for index in tiles:
        tile = blob.tile(index, check_crc=False)
        g, outliers = tile.geometry, tile.outliers
        places = g.matrix - first_matrix, g.first_row + outliers.rows, g.first_col + outliers.cols
        integers[places] += outliers.deltas.astype(np.int16)


def decode_integers(
    blob: Blob,
    *,
    executor: ThreadPoolExecutor | None = None,
    max_elements: int | None = None,
    matrices: range | None = None,
) -> npt.NDArray[Any]:
    """The numbers that a blob of an integer kind holds, outliers added, or the bit patterns of a float kind.

    Args:
        matrices: some that lie one behind another; all by default.

    Returns:
        [matrices, rows, cols]: i8 (i16 if there are outliers) for signed, u8 for unsigned elements; u8, u16 or
        u32 bit patterns for the lossless float kinds.
    """
    layout = blob.header.layout
    elements = decode_elements(blob, executor=executor, max_elements=max_elements, matrices=matrices)
    if layout.element_kind == ElementKind.UNSIGNED:
        return elements
    if layout.element_kind == ElementKind.SIGNED:
        if layout.quantizer == Quantizer.TRELLIS:
            signed: npt.NDArray[Any] = put_integers(elements, layout.element_bits, executor)
        else:
            half = 1 << (layout.element_bits - 1)
            np.subtract(elements, elements.dtype.type(half), out=elements)
            signed = elements.view(np.int8)
        chosen = range(blob.header.matrices) if matrices is None else matrices
        tiles = _tiles_of(blob.header, chosen)
        with_outliers = tiles.start + np.flatnonzero(blob.tiles["outlier_count"][tiles.start : tiles.stop])
        if not len(with_outliers):
            return signed
        integers = signed.astype(np.int16)
        _add_outliers(blob, integers, with_outliers.tolist(), chosen.start)
        return integers
    return rotate_right(elements, layout.element_bits)


def rotate_left(bits: npt.NDArray[Any], width: int) -> npt.NDArray[Any]:
    """Bit patterns of floats → elements (FORMAT.md §4)."""
    kind = bits.dtype.type
    return np.asarray((bits << kind(1)) | (bits >> kind(width - 1)))


def rotate_right(elements: npt.NDArray[Any], width: int) -> npt.NDArray[Any]:
    """Elements → bit patterns of floats (FORMAT.md §4)."""
    kind = elements.dtype.type
    return np.asarray((elements >> kind(1)) | (elements << kind(width - 1)))


def verify_tiles(blob: Blob, executor: ThreadPoolExecutor | None = None) -> Iterable[int]:
    """Decode every tile to nowhere, with all checks; yields the elements of each tile as it is done."""
    tables = _decoder_tables(blob)
    dtype = element_dtype(blob.header.layout.element_bits)

    def work(index: int) -> int:
        tile = blob.tile(index)
        out = np.empty((tile.geometry.rows, tile.geometry.cols), dtype)
        decode_tile(blob, tile, tables, out)
        return out.size

    return map_ordered(work, range(blob.header.num_tiles), executor)
