"""Take blobs apart, break one thing, and put them together with correct CRCs.

The offsets are typed here from docs/FORMAT.md §§3 and 6, not taken from the package under test.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, field

HEADER_BYTES = 64
TILE_BYTES = 32

HEADER_FIELDS = {
    "magic": (0, "<I"),
    "version": (4, "<H"),
    "flags": (6, "<H"),
    "rows": (8, "<Q"),
    "cols": (16, "<Q"),
    "tile_rows": (24, "<H"),
    "tile_cols": (26, "<H"),
    "num_tiles_row": (28, "<I"),
    "num_tiles_col": (32, "<I"),
    "element_bits": (36, "<B"),
    "code_bits": (37, "<B"),
    "codes_per_symbol": (38, "<B"),
    "raw_bits": (39, "<B"),
    "probability_bits": (40, "<B"),
    "element_kind": (41, "<B"),
    "quantizer": (42, "<B"),
    "table_encoding": (43, "<B"),
    "num_tables": (44, "<H"),
    "table_bytes": (46, "<H"),
    "payload_bytes": (48, "<Q"),
    "matrices": (56, "<I"),
    "header_crc32": (60, "<I"),
}
TILE_FIELDS = {
    "data_offset": (0, "<Q"),
    "data_size": (8, "<I"),
    "raw_offset": (12, "<I"),
    "mode": (16, "<B"),
    "predictor": (17, "<B"),
    "table_index": (18, "<H"),
    "outlier_count": (20, "<I"),
    "outlier_offset": (24, "<I"),
    "payload_crc32": (28, "<I"),
}


def padding(size: int, multiple: int = 16) -> int:
    return -size % multiple


def get(blob: bytes | bytearray, name: str) -> int:
    """A header field."""
    offset, code = HEADER_FIELDS[name]
    return int(struct.unpack_from(code, blob, offset)[0])


def put(blob: bytearray, name: str, value: int) -> None:
    """Overwrite a header field; no CRC is mended."""
    offset, code = HEADER_FIELDS[name]
    struct.pack_into(code, blob, offset, value)


def num_tiles(blob: bytes | bytearray) -> int:
    return get(blob, "matrices") * get(blob, "num_tiles_row") * get(blob, "num_tiles_col")


def metadata_offset(blob: bytes | bytearray) -> int:
    return HEADER_BYTES + get(blob, "table_bytes")


def payload_offset(blob: bytes | bytearray) -> int:
    """P of FORMAT.md §2, as the header says (it may lie behind the end of a broken blob)."""
    return metadata_offset(blob) + TILE_BYTES * num_tiles(blob)


def tile_get(blob: bytes | bytearray, tile: int, name: str) -> int:
    offset, code = TILE_FIELDS[name]
    return int(struct.unpack_from(code, blob, metadata_offset(blob) + TILE_BYTES * tile + offset)[0])


def tile_put(blob: bytearray, tile: int, name: str, value: int) -> None:
    offset, code = TILE_FIELDS[name]
    struct.pack_into(code, blob, metadata_offset(blob) + TILE_BYTES * tile + offset, value)


def mend_header_crc(blob: bytearray) -> None:
    """Make ``header_crc32`` right; does nothing if the sections do not fit the blob."""
    end = payload_offset(blob)
    if end <= len(blob):
        crc = zlib.crc32(memoryview(blob)[HEADER_BYTES:end], zlib.crc32(blob[:60]))
        put(blob, "header_crc32", crc)


def mend_crcs(blob: bytearray) -> None:
    """Make every CRC right that has bytes to be computed from; cheap also for absurd headers."""
    if len(blob) < HEADER_BYTES or payload_offset(blob) > len(blob):
        return
    start = payload_offset(blob)
    for tile in range(num_tiles(blob)):
        first = start + tile_get(blob, tile, "data_offset")
        end = first + tile_get(blob, tile, "data_size")
        if end <= len(blob):
            tile_put(blob, tile, "payload_crc32", zlib.crc32(memoryview(blob)[first:end]))
    mend_header_crc(blob)


def patched(blob: bytes, tile: int | None = None, **fields: int) -> bytes:
    """A copy with fields of the header (or of a tile's metadata) overwritten, header CRC right."""
    copy = bytearray(blob)
    for name, value in fields.items():
        if tile is None:
            put(copy, name, value)
        else:
            tile_put(copy, tile, name, value)
    if tile is not None or "header_crc32" not in fields:
        mend_header_crc(copy)
    return bytes(copy)


@dataclass
class Parts:
    """A blob in pieces. ``tiles`` are their bytes without the zero padding behind them."""

    header: bytearray
    tables: bytearray
    metadata: list[dict[str, int]]
    tiles: list[bytearray]
    gaps: list[bytes] = field(default_factory=list)

    def join(self) -> bytes:
        """Put together: offsets, sizes and CRCs follow from the pieces, all else stays as it is."""
        payload = bytearray()
        metadata = bytearray()
        for index, (meta, data) in enumerate(zip(self.metadata, self.tiles, strict=True)):
            entry = dict(meta, data_offset=len(payload), data_size=len(data))
            entry["payload_crc32"] = zlib.crc32(data)
            payload += data
            gap = bytes(padding(len(data)))
            payload += self.gaps[index] if self.gaps else gap
            record = bytearray(TILE_BYTES)
            for name, (offset, code) in TILE_FIELDS.items():
                struct.pack_into(code, record, offset, entry[name])
            metadata += record
        blob = bytearray(self.header)
        put(blob, "table_bytes", len(self.tables))
        put(blob, "payload_bytes", len(payload))
        blob += self.tables + metadata + payload
        mend_header_crc(blob)
        return bytes(blob)


def split(blob: bytes) -> Parts:
    """The pieces of a valid blob."""
    first = metadata_offset(blob)
    start = payload_offset(blob)
    metadata = [{name: tile_get(blob, tile, name) for name in TILE_FIELDS} for tile in range(num_tiles(blob))]
    tiles = [bytearray(blob[start + m["data_offset"] :][: m["data_size"]]) for m in metadata]
    return Parts(bytearray(blob[:64]), bytearray(blob[64:first]), metadata, tiles)


def pack_exp_golomb(values: list[int]) -> bytes:
    """Codes of FORMAT.md §5.1, one table, padded to whole bytes."""
    bits = ""
    for value in values:
        m = value + 1
        k = m.bit_length() - 1
        bits += "0" * k + "1" + format(m - (1 << k), f"0{k}b")[::-1] * (k > 0)
    bits += "0" * padding(len(bits), 8)
    return bytes(int(bits[i : i + 8][::-1], 2) for i in range(0, len(bits), 8))


def with_plain_tables(blob: bytes, frequencies: list[list[int]]) -> bytes:
    """The same blob with tables in encoding 0; ``frequencies`` are 256 numbers a table."""
    parts = split(blob)
    put(parts.header, "table_encoding", 0)
    parts.tables = bytearray()
    for table in frequencies:
        parts.tables += struct.pack("<256H", *table)
    return parts.join()


def with_packed_tables(blob: bytes, frequencies: list[list[int]]) -> bytes:
    """The same blob with its tables written in encoding 1; ``frequencies`` are the alphabet's."""
    parts = split(blob)
    put(parts.header, "table_encoding", 1)
    section = b"".join(pack_exp_golomb(table) for table in frequencies)
    parts.tables = bytearray(section + bytes(padding(len(section))))
    return parts.join()


@dataclass
class RansTile:
    """A tile of mode rans in pieces (FORMAT.md §7.1)."""

    states: list[int]
    words: list[list[int]]  # of each lane
    length_bytes: int
    rest: bytes  # raw planes, and what follows them up to data_size

    @classmethod
    def parse(cls, data: bytes | bytearray, raw_offset: int, lanes: int, length_bytes: int) -> RansTile:
        states = list(struct.unpack_from(f"<{lanes}I", data, 32))
        code = {1: "B", 2: "H"}[length_bytes]
        lengths = struct.unpack_from(f"<{lanes}{code}", data, 32 + 4 * lanes)
        at = 32 + lanes * (4 + length_bytes)
        words = []
        for length in lengths:
            words.append(list(struct.unpack_from(f"<{length}H", data, at)))
            at += 2 * length
        return cls(states, words, length_bytes, bytes(data[raw_offset:]))

    def build(self) -> tuple[bytearray, int]:
        """The tile's bytes and its raw_offset; group offsets and lengths follow from the words."""
        lengths = [len(words) for words in self.words]
        total = sum(lengths)
        groups = [sum(lengths[: 32 * g]) if 32 * g < len(lengths) else total for g in range(8)]
        code = {1: "B", 2: "H"}[self.length_bytes]
        data = bytearray(struct.pack("<8I", *groups))
        data += struct.pack(f"<{len(lengths)}I", *self.states)
        data += struct.pack(f"<{len(lengths)}{code}", *lengths)
        for words in self.words:
            data += struct.pack(f"<{len(words)}H", *words)
        data += bytes(padding(len(data)))
        return data + self.rest, len(data)
