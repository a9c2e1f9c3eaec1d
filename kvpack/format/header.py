"""The 64-byte header of a blob (docs/FORMAT.md §3)."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from kvpack.errors import (
    GeometryError,
    LayoutError,
    MagicError,
    ReservedError,
    TruncatedError,
    VersionError,
)
from kvpack.format.layout import (
    ALIGNMENT_BYTES,
    CHUNK_COLS,
    FLAG_FOLDED,
    FLAG_TRANSPOSED,
    GROUP_LANES,
    KNOWN_FLAGS,
    MAGIC,
    MAX_STEPS_U8_LENGTHS,
    MAX_TABLES,
    MAX_TILE_COLS,
    NUM_SYMBOLS,
    PROBABILITY_BITS,
    TILE_ROWS,
    TRELLIS_REACH_STEPS,
    VERSION,
    ElementKind,
    Layout,
    Quantizer,
    TableEncoding,
    align,
    ceil_div,
    outlier_delta_max,
)

HEADER_BYTES = 64
TILE_METADATA_BYTES = 32

# magic version flags | rows cols | tile_rows tile_cols num_tiles_row num_tiles_col |
# element_bits code_bits codes_per_symbol raw_bits probability_bits element_kind quantizer table_encoding |
# num_tables table_bytes payload_bytes matrices header_crc32
_STRUCT = struct.Struct("<IHHQQHHII8BHHQII")
HEADER_CRC_OFFSET = HEADER_BYTES - 4


@dataclass(frozen=True)
class TileGeometry:
    """Where a tile lies in its matrix, and what follows from it (FORMAT.md §7).

    ``rows``/``cols`` are the valid ones; ``lanes``, ``chunks`` and ``steps`` include the padding.
    """

    matrix: int
    first_row: int
    first_col: int
    rows: int
    cols: int
    codes_per_symbol: int

    @property
    def lanes(self) -> int:
        return align(self.rows, GROUP_LANES)

    @property
    def groups(self) -> int:
        return self.lanes // GROUP_LANES

    @property
    def chunks(self) -> int:
        return ceil_div(self.cols, CHUNK_COLS)

    @property
    def steps(self) -> int:
        return self.chunks * CHUNK_COLS // self.codes_per_symbol


@dataclass(frozen=True)
class BlobHeader:
    """Fields of the header that are not derived from others. ``rows`` and ``cols`` are those of one matrix."""

    layout: Layout
    rows: int
    cols: int
    tile_cols: int
    matrices: int = 1
    transposed: bool = False
    table_encoding: TableEncoding = TableEncoding.PLAIN
    num_tables: int = 0
    table_bytes: int = 0
    payload_bytes: int = 0
    header_crc32: int = 0

    @property
    def num_tiles_row(self) -> int:
        return ceil_div(self.rows, TILE_ROWS)

    @property
    def num_tiles_col(self) -> int:
        return ceil_div(self.cols, self.tile_cols)

    @property
    def num_tiles(self) -> int:
        return self.matrices * self.num_tiles_row * self.num_tiles_col

    @property
    def matrix_elements(self) -> int:
        return self.rows * self.cols

    @property
    def num_elements(self) -> int:
        return self.matrices * self.matrix_elements

    @property
    def payload_offset(self) -> int:
        return HEADER_BYTES + self.table_bytes + TILE_METADATA_BYTES * self.num_tiles

    @property
    def blob_bytes(self) -> int:
        return self.payload_offset + self.payload_bytes

    @property
    def length_bytes(self) -> int:
        """Bytes of one lane length: 1 if no lane of this blob can have more than 255 words, else 2."""
        return 1 if self.tile_cols // self.layout.codes_per_symbol <= MAX_STEPS_U8_LENGTHS else 2

    @property
    def max_outlier_steps(self) -> int:
        """The largest magnitude, in steps between neighbouring elements, that is sure to be one an outlier can have."""
        extra_bits = self.layout.integer_bits - self.layout.element_bits
        beside = 0 if self.layout.quantizer == Quantizer.SCALAR else TRELLIS_REACH_STEPS
        return (outlier_delta_max(self.tile_cols) >> extra_bits) - beside

    def tile_geometry(self, tile: int) -> TileGeometry:
        """Geometry of tile number ``tile`` (matrix, then tile row, then tile column)."""
        matrix, in_matrix = divmod(tile, self.num_tiles_row * self.num_tiles_col)
        tile_row, tile_col = divmod(in_matrix, self.num_tiles_col)
        first_row, first_col = tile_row * TILE_ROWS, tile_col * self.tile_cols
        return TileGeometry(
            matrix,
            first_row,
            first_col,
            min(TILE_ROWS, self.rows - first_row),
            min(self.tile_cols, self.cols - first_col),
            self.layout.codes_per_symbol,
        )

    def pack(self) -> bytes:
        """The 64 bytes, with ``header_crc32`` as it stands."""
        layout = self.layout
        return _STRUCT.pack(
            MAGIC,
            VERSION,
            FLAG_TRANSPOSED * self.transposed | FLAG_FOLDED * layout.folded,
            self.rows,
            self.cols,
            TILE_ROWS,
            self.tile_cols,
            self.num_tiles_row,
            self.num_tiles_col,
            layout.element_bits,
            layout.code_bits,
            layout.codes_per_symbol,
            layout.raw_bits,
            PROBABILITY_BITS,
            layout.element_kind,
            layout.quantizer,
            self.table_encoding,
            self.num_tables,
            self.table_bytes,
            self.payload_bytes,
            self.matrices,
            self.header_crc32,
        )

    @classmethod
    def parse(cls, buffer: memoryview) -> BlobHeader:
        """Read and check the header at the start of ``buffer``; the CRC and the tables are the blob's to check.

        Raises:
            TruncatedError, MagicError, VersionError, ReservedError, GeometryError, LayoutError
        """
        if len(buffer) < HEADER_BYTES:
            raise TruncatedError(f"a blob has at least {HEADER_BYTES} bytes, this one {len(buffer)}")
        (
            magic,
            version,
            flags,
            rows,
            cols,
            tile_rows,
            tile_cols,
            num_tiles_row,
            num_tiles_col,
            element_bits,
            code_bits,
            codes_per_symbol,
            raw_bits,
            probability_bits,
            element_kind,
            quantizer,
            table_encoding,
            num_tables,
            table_bytes,
            payload_bytes,
            matrices,
            header_crc32,
        ) = _STRUCT.unpack_from(buffer)
        if magic != MAGIC:
            raise MagicError(f"magic is 0x{magic:08X}, a blob begins with 0x{MAGIC:08X}")
        if version != VERSION:
            raise VersionError(f"version is {version}, this reader knows version {VERSION}")
        if flags & ~KNOWN_FLAGS:
            raise ReservedError(f"flags are 0x{flags:04X}, known are 0x{KNOWN_FLAGS:04X}")
        if quantizer not in Quantizer.__members__.values():
            raise ReservedError(f"quantizer is {quantizer}, this reader knows 0 (scalar) and 1 (trellis)")
        if table_encoding not in (TableEncoding.PLAIN, TableEncoding.PACKED):
            raise ReservedError(f"table_encoding is {table_encoding}, known are 0 and 1")
        if probability_bits != PROBABILITY_BITS:
            raise ReservedError(f"probability_bits is {probability_bits}, legal is {PROBABILITY_BITS}")
        if element_kind not in ElementKind.__members__.values():
            raise ReservedError(f"element_kind is {element_kind}, known are 0 to {max(ElementKind)}")
        folded = bool(flags & FLAG_FOLDED)
        if quantizer == Quantizer.TRELLIS and not folded:
            raise ReservedError("quantizer is 1 (trellis), which blobs with folded codes alone have")
        kind = ElementKind(element_kind)
        layout = Layout(kind, element_bits, code_bits, codes_per_symbol, folded, Quantizer(quantizer))
        if raw_bits != layout.raw_bits:
            raise LayoutError(f"raw_bits is {raw_bits}, but element_bits − code_bits is {layout.raw_bits}")
        for name, value in (("rows", rows), ("cols", cols), ("matrices", matrices)):
            if value < 1:
                raise GeometryError(f"{name} is {value}, at least 1 is legal")
        if tile_rows != TILE_ROWS:
            raise GeometryError(f"tile_rows is {tile_rows}, legal is {TILE_ROWS}")
        if tile_cols % CHUNK_COLS or not CHUNK_COLS <= tile_cols <= MAX_TILE_COLS:
            raise GeometryError(f"tile_cols is {tile_cols}, legal are multiples of {CHUNK_COLS} up to {MAX_TILE_COLS}")
        if num_tables > MAX_TABLES:
            raise GeometryError(f"num_tables is {num_tables}, at most {MAX_TABLES} are legal")
        if table_bytes % ALIGNMENT_BYTES or (table_bytes == 0) != (num_tables == 0):
            raise GeometryError(f"table_bytes is {table_bytes} with {num_tables} tables")
        if table_encoding == TableEncoding.PLAIN and table_bytes != num_tables * 2 * NUM_SYMBOLS:
            raise GeometryError(f"table_bytes is {table_bytes} with {num_tables} plain tables")
        if payload_bytes % ALIGNMENT_BYTES:
            raise GeometryError(f"payload_bytes is {payload_bytes}, no multiple of {ALIGNMENT_BYTES}")
        header = cls(
            layout=layout,
            rows=rows,
            cols=cols,
            tile_cols=tile_cols,
            matrices=matrices,
            transposed=bool(flags & FLAG_TRANSPOSED),
            table_encoding=TableEncoding(table_encoding),
            num_tables=num_tables,
            table_bytes=table_bytes,
            payload_bytes=payload_bytes,
            header_crc32=header_crc32,
        )
        for name, value, expected in (
            ("num_tiles_row", num_tiles_row, header.num_tiles_row),
            ("num_tiles_col", num_tiles_col, header.num_tiles_col),
        ):
            if value != expected:
                raise GeometryError(f"{name} is {value}, {rows} × {cols} elements need {expected}")
        return header
