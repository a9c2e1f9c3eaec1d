"""A blob (one coded tensor): parse, validate, and hand out the parts of its tiles (docs/FORMAT.md §§2–7).

Nothing here decodes; see ``kvpack.encode.blob_decoder``. Parsing costs memory in proportion to the bytes
that are there, never to the sizes that they claim.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from kvpack.errors import (
    HeaderCrcError,
    LaneError,
    OutlierError,
    PaddingError,
    PayloadCrcError,
    TileBoundsError,
    TileModeError,
    TruncatedError,
)
from kvpack.format.header import (
    HEADER_BYTES,
    HEADER_CRC_OFFSET,
    TILE_METADATA_BYTES,
    BlobHeader,
    TileGeometry,
)
from kvpack.format.layout import (
    ALIGNMENT_BYTES,
    CHUNK_COLS,
    GROUP_LANES,
    OUTLIER_BYTES,
    OUTLIER_ROW_SHIFT,
    STATE_LOW,
    TILE_ROWS,
    ElementKind,
    Predictor,
    Quantizer,
    TileMode,
    align,
    outlier_delta_bits,
)
from kvpack.format.tables import Frequencies, parse_tables

GROUPS_PER_TILE = TILE_ROWS // GROUP_LANES
GROUP_OFFSETS_BYTES = 4 * GROUPS_PER_TILE

TILE_METADATA = np.dtype(
    [
        ("data_offset", "<u8"),
        ("data_size", "<u4"),
        ("raw_offset", "<u4"),
        ("mode", "u1"),
        ("predictor", "u1"),
        ("table_index", "<u2"),
        ("outlier_count", "<u4"),
        ("outlier_offset", "<u4"),
        ("payload_crc32", "<u4"),
    ]
)
assert TILE_METADATA.itemsize == TILE_METADATA_BYTES


@dataclass(frozen=True)
class Outliers:
    """Outliers of a tile: ``rows``, ``cols`` (in the tile) and ``deltas``, each int32 [count]."""

    rows: npt.NDArray[np.int32]
    cols: npt.NDArray[np.int32]
    deltas: npt.NDArray[np.int32]


_NO_OUTLIERS = Outliers(*(np.empty(0, np.int32) for _ in range(3)))


@dataclass(frozen=True)
class Tile:
    """One validated tile; arrays are views into the blob wherever alignment allows.

    ``states`` u32 [lanes], ``lengths`` i64 [lanes] and ``words`` u16 are those of mode rans (empty otherwise);
    ``constant_symbol`` that of mode constant; ``raw`` are the bytes of the raw planes, or of the elements in
    mode raw.
    """

    index: int
    geometry: TileGeometry
    mode: TileMode
    predictor: Predictor
    table_index: int
    states: npt.NDArray[np.uint32]
    lengths: npt.NDArray[np.int64]
    words: npt.NDArray[np.uint16]
    constant_symbol: int
    raw: npt.NDArray[np.uint8]
    outliers: Outliers


def raw_plane_bytes(geometry: TileGeometry, raw_bits: int) -> int:
    """Size of the raw planes of a tile: 4·raw_bits bytes a lane and chunk (FORMAT.md §7.4)."""
    return geometry.lanes * geometry.chunks * CHUNK_COLS // 8 * raw_bits


def raw_mode_bytes(geometry: TileGeometry, element_bits: int) -> int:
    """Size of a tile's elements in mode raw (FORMAT.md §7.2)."""
    return (geometry.rows * geometry.cols * element_bits + 7) // 8


def lane_table_bytes(geometry: TileGeometry, length_bytes: int) -> int:
    """Bytes in front of a tile's words: group offsets, states, lengths (FORMAT.md §7.1)."""
    return GROUP_OFFSETS_BYTES + geometry.lanes * (4 + length_bytes)


def check_tile_bytes(payload: memoryview, tile: np.void, where: str) -> None:
    """A tile's bytes against their CRC, and the zeros behind them, without a look at what they mean.

    Args:
        payload: of a blob whose front part is intact.
        tile: its metadata, an entry of :attr:`Blob.tiles`.
        where: how messages name it.

    Raises:
        PayloadCrcError, PaddingError
    """
    begin, size, *_, given = tile.item()
    crc = zlib.crc32(payload[begin : begin + size])
    if crc != given:
        raise PayloadCrcError(f"{where}: payload_crc32 is 0x{given:08X}, computed 0x{crc:08X}")
    _check_padding(payload, begin + size, where)


def _check_padding(payload: memoryview, end: int, where: str) -> None:
    if any(payload[end : align(end, ALIGNMENT_BYTES)]):
        raise PaddingError(f"{where}: the bytes behind the tile are not zero")


class Blob:
    """A parsed blob. The buffer is kept, not copied.

    Args:
        buffer: exactly the blob's bytes, at any alignment.

    Raises:
        BlobError: the header, a table or the tile metadata break a rule (see ``kvpack.errors``).
    """

    def __init__(self, buffer: memoryview | bytes) -> None:
        self.buffer = memoryview(buffer).cast("B").toreadonly()
        self.header = BlobHeader.parse(self.buffer)
        header = self.header
        if header.blob_bytes != len(self.buffer):
            raise TruncatedError(f"the header announces {header.blob_bytes} bytes, the blob has {len(self.buffer)}")
        front = self.buffer[: header.payload_offset]
        crc = zlib.crc32(front[HEADER_BYTES:], zlib.crc32(front[:HEADER_CRC_OFFSET]))
        if crc != header.header_crc32:
            raise HeaderCrcError(f"header_crc32 is 0x{header.header_crc32:08X}, computed 0x{crc:08X}")
        tables_end = HEADER_BYTES + header.table_bytes
        self.tables: list[Frequencies] = parse_tables(
            front[HEADER_BYTES:tables_end],
            header.num_tables,
            header.table_encoding,
            header.layout.alphabet_size,
        )
        self.tiles = np.frombuffer(front[tables_end:], TILE_METADATA)
        self._check_tiles()

    @cached_property
    def payload(self) -> memoryview:
        return self.buffer[self.header.payload_offset :]

    def _check_tiles(self) -> None:
        tiles, header = self.tiles, self.header

        def refuse(error: type[Exception], bad: npt.NDArray[np.bool_], what: str) -> None:
            if bad.any():
                tile = int(np.argmax(bad))
                raise error(f"tile {tile}: {what} ({dict(zip(TILE_METADATA.fields or (), tiles[tile], strict=True))})")

        rans = tiles["mode"] == TileMode.RANS
        refuse(TileModeError, tiles["mode"] > max(TileMode), "unknown mode")
        refuse(TileModeError, tiles["predictor"] > max(Predictor), "unknown predictor")
        may_predict = rans & header.layout.element_kind.is_integer
        refuse(
            TileModeError,
            (tiles["predictor"] != Predictor.NONE) & ~may_predict,
            "a predictor outside mode rans or for a float kind",
        )
        if header.layout.quantizer == Quantizer.TRELLIS:
            refuse(TileModeError, tiles["predictor"] != Predictor.NONE, "a predictor in a blob with a trellis")
        tables = np.where(rans, header.num_tables, 1)
        refuse(TileModeError, tiles["table_index"] >= tables, "table_index names no table")
        if header.layout.element_kind != ElementKind.SIGNED:
            refuse(OutlierError, tiles["outlier_count"] > 0, "outliers in a tensor that is not signed")

        # From the sizes alone, which are u32: so many tiles as fit into memory do not sum up to 2^64.
        sizes = (tiles["data_size"].astype(np.uint64) + (ALIGNMENT_BYTES - 1)) // ALIGNMENT_BYTES * ALIGNMENT_BYTES
        ends = np.cumsum(sizes)
        prescribed = ends - sizes
        bad = tiles["data_offset"] != prescribed
        if bad.any():
            tile = int(np.argmax(bad))
            raise TileBoundsError(
                f"tile {tile}: data_offset is {tiles['data_offset'][tile]}, prescribed is {prescribed[tile]}"
            )
        if ends[-1] != header.payload_bytes:
            raise TileBoundsError(f"the tiles end at {ends[-1]}, payload_bytes is {header.payload_bytes}")

    def tile(self, index: int, *, check_crc: bool = True) -> Tile:
        """Validate tile ``index`` and return its parts.

        Raises:
            PayloadCrcError, TileBoundsError, PaddingError, LaneError, OutlierError, TileModeError
        """
        meta = self.tiles[index]
        geometry = self.header.tile_geometry(index)
        layout = self.header.layout
        offset, size = int(meta["data_offset"]), int(meta["data_size"])
        where = f"tile {index}"
        data = np.frombuffer(self.payload[offset : offset + size], np.uint8)
        if check_crc:
            check_tile_bytes(self.payload, meta, where)
        else:
            _check_padding(self.payload, offset + size, where)

        mode = TileMode(int(meta["mode"]))
        states = np.empty(0, np.uint32)
        lengths = np.empty(0, np.int64)
        words = np.empty(0, np.uint16)
        constant_symbol = 0
        if mode == TileMode.RANS:
            states, lengths, words, raw_offset = self._lanes(where, data, geometry)
            raw_bytes = raw_plane_bytes(geometry, layout.raw_bits)
        elif mode == TileMode.CONSTANT:
            raw_offset = ALIGNMENT_BYTES
            raw_bytes = raw_plane_bytes(geometry, layout.raw_bits)
            self._need(where, data, ALIGNMENT_BYTES)
            constant_symbol = int(data[0])
            if constant_symbol >= layout.alphabet_size:
                raise TileModeError(
                    f"{where}: constant symbol {constant_symbol}, the layout has {layout.alphabet_size}"
                )
            if data[1:ALIGNMENT_BYTES].any():
                raise PaddingError(f"{where}: bytes 1 to 15 of a constant tile are not zero")
        else:
            raw_offset = 0
            raw_bytes = raw_mode_bytes(geometry, layout.element_bits)
        if int(meta["raw_offset"]) != raw_offset:
            raise TileBoundsError(f"{where}: raw_offset is {int(meta['raw_offset'])}, prescribed is {raw_offset}")
        raw_end = raw_offset + raw_bytes
        outlier_offset = align(raw_end, OUTLIER_BYTES)
        count = int(meta["outlier_count"])
        if int(meta["outlier_offset"]) != outlier_offset:
            raise TileBoundsError(
                f"{where}: outlier_offset is {int(meta['outlier_offset'])}, prescribed is {outlier_offset}"
            )
        if size != outlier_offset + OUTLIER_BYTES * count:
            raise TileBoundsError(
                f"{where}: data_size is {size}, prescribed is {outlier_offset + OUTLIER_BYTES * count}"
            )
        if data[raw_end:outlier_offset].any():
            raise PaddingError(f"{where}: the bytes before the outliers are not zero")
        if mode == TileMode.RAW:
            spare_bits = raw_bytes * 8 - geometry.rows * geometry.cols * layout.element_bits
            if spare_bits and int(data[raw_end - 1]) >> (8 - spare_bits):
                raise PaddingError(f"{where}: the bits behind the last element are not zero")
        return Tile(
            index=index,
            geometry=geometry,
            mode=mode,
            predictor=Predictor(int(meta["predictor"])),
            table_index=int(meta["table_index"]),
            states=states,
            lengths=lengths,
            words=words,
            constant_symbol=constant_symbol,
            raw=data[raw_offset:raw_end],
            outliers=_parse_outliers(where, data[outlier_offset:], geometry, self.header.tile_cols),
        )

    @staticmethod
    def _need(where: str, data: npt.NDArray[np.uint8], size: int) -> None:
        if len(data) < size:
            raise TileBoundsError(f"{where}: data_size is {len(data)}, at least {size} are needed")

    def _lanes(
        self, where: str, data: npt.NDArray[np.uint8], geometry: TileGeometry
    ) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64], npt.NDArray[np.uint16], int]:
        """States, lengths and words of a rans tile, and where its raw planes must begin."""
        lanes, rows = geometry.lanes, geometry.rows
        length_bytes = self.header.length_bytes
        words_offset = lane_table_bytes(geometry, length_bytes)
        self._need(where, data, words_offset)
        group_offsets = data[:GROUP_OFFSETS_BYTES].view("<u4")
        states_end = GROUP_OFFSETS_BYTES + 4 * lanes
        states = data[GROUP_OFFSETS_BYTES:states_end].view("<u4")
        lengths = data[states_end:words_offset].view(f"<u{length_bytes}").astype(np.int64)
        if (states < STATE_LOW).any():
            lane = int(np.argmax(states < STATE_LOW))
            raise LaneError(f"{where}, lane {lane}: initial state {int(states[lane])} is below {STATE_LOW}")
        if (states[rows:] != STATE_LOW).any() or lengths[rows:].any():
            raise LaneError(f"{where}: a padding lane has words, or a state other than {STATE_LOW}")
        if (lengths > geometry.steps).any():
            lane = int(np.argmax(lengths))
            raise LaneError(f"{where}, lane {lane}: {lengths[lane]} words for {geometry.steps} steps")
        ends = np.cumsum(lengths)
        total = int(ends[-1])
        expected = np.full(GROUPS_PER_TILE, total)
        expected[: geometry.groups] = np.concatenate(([0], ends[GROUP_LANES - 1 : -1 : GROUP_LANES]))
        if (group_offsets != expected).any():
            raise LaneError(f"{where}: group_offset does not match the lanes' lengths")
        words_end = words_offset + 2 * total
        raw_offset = align(words_end, ALIGNMENT_BYTES)
        self._need(where, data, raw_offset)
        if data[words_end:raw_offset].any():
            raise PaddingError(f"{where}: the bytes behind the words are not zero")
        return states, lengths, data[words_offset:words_end].view("<u2"), raw_offset


def _parse_outliers(where: str, data: npt.NDArray[np.uint8], geometry: TileGeometry, tile_cols: int) -> Outliers:
    """Outliers from their u32s (FORMAT.md §7.5): row, column, delta from the highest bits to the lowest."""
    if not len(data):
        return _NO_OUTLIERS
    entries = data.view("<u4")
    delta_bits = outlier_delta_bits(tile_cols)
    positions = entries >> delta_bits
    if (positions[1:] <= positions[:-1]).any():
        raise OutlierError(f"{where}: outliers are not sorted strictly by row and column")
    rows = (entries >> OUTLIER_ROW_SHIFT).astype(np.int32)
    cols = (positions & ((1 << (OUTLIER_ROW_SHIFT - delta_bits)) - 1)).astype(np.int32)
    deltas = (entries << (32 - delta_bits)).view(np.int32) >> (32 - delta_bits)
    if (rows >= geometry.rows).any() or (cols >= geometry.cols).any():
        raise OutlierError(f"{where}: an outlier lies outside {geometry.rows} × {geometry.cols}")
    if (deltas == 0).any():
        raise OutlierError(f"{where}: an outlier of 0")
    return Outliers(rows, cols, deltas)


def pack_front(header: BlobHeader, table_section: bytes, tiles: npt.NDArray[np.void], payload_bytes: int) -> bytes:
    """All of a blob but its payload, with ``payload_bytes``, ``table_bytes`` and ``header_crc32`` filled in."""
    header = replace(header, table_bytes=len(table_section), payload_bytes=payload_bytes)
    metadata = tiles.tobytes()
    crc = zlib.crc32(metadata, zlib.crc32(table_section, zlib.crc32(header.pack()[:HEADER_CRC_OFFSET])))
    return replace(header, header_crc32=crc).pack() + table_section + metadata
