"""Each rule of docs/FORMAT.md §§2–7: valid blobs in which exactly that rule is broken.

The CRCs of every broken blob are right (unless the CRC is the rule): nothing hides the fault.
"""

from __future__ import annotations

import itertools
import struct
import tracemalloc
import zlib
from functools import cache

import blob_surgery as surgery
import independent_decoder
import numpy as np
import pytest
import sample_blobs as samples
from blob_surgery import Parts, RansTile, patched, split

from kvpack import errors
from kvpack.encode.blob_decoder import decode_elements, decode_integers
from kvpack.encode.blob_encoder import encode_elements
from kvpack.errors import (
    FormatError,
    GeometryError,
    HeaderCrcError,
    LaneError,
    LaneStateError,
    LayoutError,
    LimitError,
    MagicError,
    OutlierError,
    PaddingError,
    PayloadCrcError,
    ReservedError,
    TableError,
    TileBoundsError,
    TileModeError,
    TruncatedError,
    VersionError,
)
from kvpack.format.blob import Blob
from kvpack.format.layout import ElementKind, Layout, Predictor, TileMode, float_layouts, integer_layout


@cache
def base(name: str) -> bytes:
    return samples.BASES[name]()


def assert_refused(blob: bytes, error: type[FormatError]) -> None:
    """``blob`` must be refused with exactly this class, at the latest when it is decoded."""
    with pytest.raises(FormatError) as info:
        decode_integers(Blob(blob))
    assert info.type is error, f"{info.type.__name__}: {info.value}"


@pytest.mark.parametrize("name", samples.BASES)
def test_bases_are_valid_and_surgery_changes_nothing_by_itself(name: str) -> None:
    decode_integers(Blob(base(name)))
    assert split(base(name)).join() == base(name)
    mended = bytearray(base(name))
    surgery.mend_crcs(mended)
    assert mended == base(name)


def test_error_classes_are_blob_errors() -> None:
    for name in ("Truncated", "Magic", "Table", "Lane", "LaneState", "Outlier", "HeaderCrc"):
        assert issubclass(getattr(errors, f"{name}Error"), errors.BlobError)
    assert issubclass(LimitError, FormatError)
    assert not issubclass(LimitError, errors.BlobError)


# §2, a blob as a whole


@pytest.mark.parametrize("size", [0, 1, 63])
def test_shorter_than_a_header(size: int) -> None:
    assert_refused(base("rans")[:size], TruncatedError)


@pytest.mark.parametrize("cut", [1, 16, 6336 - 64])
def test_truncated(cut: int) -> None:
    assert_refused(base("rans")[:-cut], TruncatedError)


@pytest.mark.parametrize("extra", [b"\0", bytes(16), b"\x01"])
def test_bytes_behind_the_blob(extra: bytes) -> None:
    assert_refused(base("rans") + extra, TruncatedError)


@pytest.mark.parametrize("name", ["raw", "rans", "mixed"])
def test_payload_bytes_beyond_the_tiles(name: str) -> None:
    size = surgery.get(base(name), "payload_bytes")
    assert_refused(patched(base(name), payload_bytes=size + 16) + bytes(16), TileBoundsError)


def test_payload_bytes_below_the_tiles() -> None:
    size = surgery.get(base("rans"), "payload_bytes")
    assert_refused(patched(base("rans")[:-16], payload_bytes=size - 16), TileBoundsError)


# §3, header


@pytest.mark.parametrize("magic", [0, 0x52414E54, 0x534E4152, 0xFFFFFFFF])
def test_magic(magic: int) -> None:
    assert_refused(patched(base("rans"), magic=magic), MagicError)


@pytest.mark.parametrize("version", [0, 2, 256, 65535])
def test_version(version: int) -> None:
    assert_refused(patched(base("rans"), version=version), VersionError)


@pytest.mark.parametrize("bit", [1, *range(3, 16)])
def test_reserved_flags(bit: int) -> None:
    assert_refused(patched(base("rans"), flags=1 << bit), ReservedError)


def test_flag_transposed_is_legal() -> None:
    assert Blob(patched(base("rans"), flags=1)).header.transposed
    assert Blob(patched(base("folded"), flags=5)).header.transposed


def test_the_flag_of_folded_codes_decides_what_codes_mean() -> None:
    blob = base("longest")  # two bits a code: legal with and without
    folded, plain = (decode_integers(Blob(patched(blob, flags=flags))) for flags in (4, 0))
    assert not np.array_equal(folded, plain)
    assert_refused(patched(base("folded"), flags=0), LayoutError)  # a code of one bit


@pytest.mark.parametrize("name", ["rows", "cols", "matrices"])
def test_no_elements(name: str) -> None:
    tiles = {"rows": "num_tiles_row", "cols": "num_tiles_col"}.get(name)
    empty = {name: 0} | ({tiles: 0} if tiles else {})
    parts = split(base("rans"))
    parts.metadata, parts.tiles = [], []
    blob = bytearray(parts.join())
    for key, value in empty.items():
        surgery.put(blob, key, value)
    surgery.mend_header_crc(blob)
    assert_refused(bytes(blob), GeometryError)


@pytest.mark.parametrize("tile_rows", [0, 32, 255, 257, 512, 65535])
def test_tile_rows(tile_rows: int) -> None:
    assert_refused(patched(base("rans"), tile_rows=tile_rows), GeometryError)


# 350 columns are one tile in each of these widths, so that the number of tiles stays right.
@pytest.mark.parametrize("tile_cols", [351, 353, 368, 511, 2047, 2049, 2080, 4096, 65504, 65535])
def test_tile_cols(tile_cols: int) -> None:
    assert_refused(patched(base("rans"), tile_cols=tile_cols), GeometryError)


def test_tile_cols_zero() -> None:
    assert_refused(patched(base("rans"), tile_cols=0), GeometryError)


@pytest.mark.parametrize("name", ["num_tiles_row", "num_tiles_col"])
@pytest.mark.parametrize("value", [0, 2, 2**32 - 1])
def test_tile_counts(name: str, value: int) -> None:
    parts = split(base("raw"))
    if value == 2:  # a second tile is there, so that only the count contradicts rows and cols
        parts.metadata.append(dict(parts.metadata[0]))
        parts.tiles.append(parts.tiles[0])
    blob = bytearray(parts.join())
    surgery.put(blob, name, value)
    surgery.mend_header_crc(blob)
    assert_refused(bytes(blob), GeometryError)


@pytest.mark.parametrize("bits", [0, 8, 11, 13, 16, 255])
def test_probability_bits(bits: int) -> None:
    assert_refused(patched(base("rans"), probability_bits=bits), ReservedError)


@pytest.mark.parametrize("kind", [7, 8, 128, 255])
def test_unknown_element_kind(kind: int) -> None:
    assert_refused(patched(base("rans"), element_kind=kind), ReservedError)


@pytest.mark.parametrize("quantizer", [1, 2, 255])
def test_quantizer(quantizer: int) -> None:
    assert_refused(patched(base("rans"), quantizer=quantizer), ReservedError)


@pytest.mark.parametrize("encoding", [2, 3, 255])
def test_unknown_table_encoding(encoding: int) -> None:
    assert_refused(patched(base("rans"), table_encoding=encoding), ReservedError)


def test_more_than_16_tables() -> None:
    table = samples.frequencies(base("rans"))[0]
    sixteen = surgery.with_plain_tables(base("rans"), [table] * 16)
    assert len(Blob(patched(sixteen, num_tables=16)).tables) == 16
    seventeen = surgery.with_plain_tables(base("rans"), [table] * 17)
    assert_refused(patched(seventeen, num_tables=17), GeometryError)


def test_table_bytes_without_tables() -> None:
    parts = split(base("raw"))
    parts.tables = bytearray(16)
    assert_refused(parts.join(), GeometryError)


@pytest.mark.parametrize("encoding", [0, 1])
def test_tables_without_table_bytes(encoding: int) -> None:
    assert_refused(patched(base("raw"), num_tables=1, table_encoding=encoding), GeometryError)


def test_table_bytes_unaligned() -> None:
    parts = split(base("rans"))
    parts.tables += bytes(8)
    assert_refused(parts.join(), GeometryError)


@pytest.mark.parametrize("change", [-16, 16, 512])
def test_plain_tables_of_another_size(change: int) -> None:
    parts = split(base("plain"))
    parts.tables = (parts.tables + bytes(512))[: 512 + change]
    assert_refused(parts.join(), GeometryError)


@pytest.mark.parametrize("name", ["raw", "rans"])
def test_payload_bytes_unaligned(name: str) -> None:
    size = surgery.get(base(name), "payload_bytes")
    assert_refused(patched(base(name), payload_bytes=size + 4) + bytes(4), GeometryError)


FRONT = 64 + 80 + 32  # of the rans blob


@pytest.mark.parametrize("at", [*range(60, FRONT, 7), FRONT - 1])
def test_header_crc_covers_header_tables_and_metadata(at: int) -> None:
    blob = bytearray(base("rans"))
    blob[at] ^= 0x10
    assert_refused(bytes(blob), HeaderCrcError)


def test_header_crc_covers_legal_header_values() -> None:
    """Bits of the header that no other rule would refuse."""
    blob = bytearray(base("rans"))
    surgery.put(blob, "flags", 1)
    assert_refused(bytes(blob), HeaderCrcError)


def test_header_crc_is_the_crc_of_zlib() -> None:
    assert zlib.crc32(b"123456789") == 0xCBF43926
    blob = base("rans")
    assert surgery.get(blob, "header_crc32") == zlib.crc32(blob[:60] + blob[64:FRONT])


def test_order_of_checks() -> None:
    """Magic, version, the other fields, the length, and the CRC last."""
    blob = bytearray(base("rans"))
    blob[60] ^= 1
    assert_refused(bytes(blob), HeaderCrcError)
    surgery.put(blob, "quantizer", 1)
    assert_refused(bytes(blob), ReservedError)
    surgery.put(blob, "version", 2)
    assert_refused(bytes(blob), VersionError)
    surgery.put(blob, "magic", 0)
    assert_refused(bytes(blob), MagicError)
    assert_refused(base("rans")[:-16][:60] + b"\0\0\0\0" + base("rans")[64:-16], TruncatedError)


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"matrices": 2**32 - 1}, TruncatedError),
        ({"payload_bytes": 2**64 - 16}, TruncatedError),
        # 2^64 wraps to what is there, both for P + payload_bytes and for the tiles' metadata.
        ({"payload_bytes": 2**64 - 64 - 80 - 32}, TruncatedError),
        ({"matrices": 2**31, "rows": 2**39, "num_tiles_row": 2**31}, TruncatedError),
        ({"rows": 2**64 - 1, "num_tiles_row": 0}, GeometryError),
        ({"cols": 2**64 - 1, "num_tiles_col": 1}, GeometryError),
        (
            {
                "rows": 2**39,
                "cols": 2**40,
                "tile_cols": 512,
                "num_tiles_row": 2**31,
                "num_tiles_col": 2**31,
                "matrices": 2**31,
            },
            TruncatedError,
        ),
    ],
)
def test_absurd_sizes_are_refused_before_anything_is_allocated(
    fields: dict[str, int], error: type[FormatError]
) -> None:
    blob = bytearray(base("rans"))
    for name, value in fields.items():
        surgery.put(blob, name, value)
    tracemalloc.start()
    try:
        assert_refused(bytes(blob), error)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1 << 18


def bomb() -> bytes:
    """128 MiB of elements in 24,640 bytes: 2^27 / 2^17 constant tiles."""
    parts = split(encode_elements(np.full((256, 512), 9, np.uint8), Layout(*COMPACT_8)))
    parts.metadata = parts.metadata * 512
    parts.tiles = parts.tiles * 512
    surgery.put(parts.header, "matrices", 512)
    return parts.join()


COMPACT_8 = (ElementKind.UNSIGNED, 8, 8, 1)


def test_decoding_bomb_meets_the_callers_limit() -> None:
    blob = Blob(bomb())
    elements = 512 * 256 * 512
    assert blob.header.num_elements == elements
    tracemalloc.start()
    try:
        with pytest.raises(LimitError):
            decode_elements(blob, max_elements=elements - 1)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1 << 16


def test_decoding_bomb_meets_the_default_limit() -> None:
    """max(2^28, 256 × bytes) elements are allowed: 2048 tiles are, 2049 are not."""
    parts = split(encode_elements(np.full((256, 512), 9, np.uint8), Layout(*COMPACT_8)))
    parts.metadata = parts.metadata * 2049
    parts.tiles = parts.tiles * 2049
    surgery.put(parts.header, "matrices", 2049)
    blob = Blob(parts.join())
    assert 256 * len(blob.buffer) < 2**28 < blob.header.num_elements == 2049 * 2**17
    tracemalloc.start()
    try:
        with pytest.raises(LimitError):
            decode_elements(blob)
        assert tracemalloc.get_traced_memory()[1] < 1 << 16
    finally:
        tracemalloc.stop()


def test_a_limit_that_is_met_exactly() -> None:
    blob = Blob(base("rans"))
    assert decode_elements(blob, max_elements=40 * 350).shape == (1, 40, 350)
    with pytest.raises(LimitError):
        decode_elements(blob, max_elements=40 * 350 - 1)


# §§3–4, layouts


def layout_fields(kind: int, n: int, c: int, g: int) -> dict[str, int]:
    return {
        "element_kind": kind,
        "element_bits": n,
        "code_bits": c,
        "codes_per_symbol": g,
        "raw_bits": max(0, n - c),
    }


ILLEGAL_LAYOUTS = [
    *[(kind, n, min(n, 4), 1) for kind in (0, 1) for n in (0, 1, 9, 10, 16, 32, 255)],
    *[(kind, n, 5, 1) for kind in (2, 3) for n in (8, 15, 17, 32)],
    *[(4, n, 8, 1) for n in (8, 16, 31, 33)],
    *[(kind, n, 4, 1) for kind in (5, 6) for n in (7, 9, 16)],
    *[(0, 8, c, 1) for c in (0, 1, 9, 16, 255)],
    (0, 4, 5, 1),
    (0, 2, 3, 1),
    (2, 16, 9, 1),
    (2, 16, 1, 1),
    (5, 8, 9, 1),
    *[(0, 4, 2, g) for g in (0, 3, 5, 8, 255)],
    *[(0, 8, c, 2) for c in (5, 6, 8)],
    *[(0, 8, c, 4) for c in (3, 4)],
    *[(2, 16, 4, 2), (3, 16, 2, 4), (3, 16, 3, 2), (2, 16, 2, 2)],
    *[(4, 32, c, 1) for c in (2, 7)],  # b = 30 and 25
]


@pytest.mark.parametrize(("kind", "n", "c", "g"), ILLEGAL_LAYOUTS)
def test_illegal_layout(kind: int, n: int, c: int, g: int) -> None:
    assert_refused(patched(base("raw"), **layout_fields(kind, n, c, g)), LayoutError)


@pytest.mark.parametrize("raw_bits", [0, 2, 5, 255])
def test_raw_bits_are_element_bits_minus_code_bits(raw_bits: int) -> None:
    assert_refused(patched(base("rans"), raw_bits=raw_bits), LayoutError)


def legal(kind: int, n: int, c: int, g: int, folded: bool) -> bool:
    """§§3–4 once more, written from the table."""
    bits = {0: range(2, 9), 1: range(2, 9), 2: [16], 3: [16], 4: [32], 5: [8], 6: [8]}[kind]
    code_bits = range(1, n) if folded else range(2, min(8, n) + 1)
    if n not in bits or c not in code_bits or (folded and kind != 1):
        return False
    return g in (1, 2, 4, 8) and g * c <= 8 and n - c <= 24 and (g == 1 or n <= 8)


def test_layouts_are_refused_exactly_where_the_tables_say() -> None:
    checked = 0
    for kind, n, c, g, folded in itertools.product(range(7), range(34), range(10), range(10), (False, True)):
        try:
            Layout(ElementKind(kind), n, c, g, folded)
            accepted = True
        except LayoutError:
            accepted = False
        assert accepted == legal(kind, n, c, g, folded), (kind, n, c, g, folded)
        checked += accepted
    plain = 2 * sum((n - 1) + (min(n, 4) - 1) + 1 for n in range(2, 9)) + 7 + 7 + 1 + 22
    assert checked == plain + sum((n - 1) + min(n - 1, 4) + min(n - 1, 2) + 1 for n in range(2, 9))


ILLEGAL_FOLDED = [
    *[(kind, 8, 2, 4) for kind in (0, 5, 6)],
    *[(2, 16, 4, 1), (3, 16, 4, 1), (4, 32, 8, 1)],
    *[(1, n, n, 1) for n in (2, 4, 8)],  # no raw bit to be folded by
    *[(1, 8, c, g) for c, g in ((0, 1), (1, 3), (1, 16), (2, 8), (3, 4), (5, 2))],
]


@pytest.mark.parametrize(("kind", "n", "c", "g"), ILLEGAL_FOLDED)
def test_illegal_folded_layout(kind: int, n: int, c: int, g: int) -> None:
    blob = patched(base("raw"), flags=4, **layout_fields(kind, n, c, g))
    assert_refused(blob, LayoutError)
    with pytest.raises(ValueError, match="illegal"):
        independent_decoder.decode_blob(blob)


@pytest.mark.parametrize("n", range(2, 9))
def test_folded_codes_as_the_page_defines_them(n: int) -> None:
    """Bit by bit, and what the page says of them: 0 where q fits the raw bits, the same for q and −1 − q."""
    for c in range(1, n):
        codes = Layout(ElementKind.SIGNED, n, c, 1, folded=True).codes(np.arange(1 << n)).tolist()
        b, half = n - c, 1 << (n - 1)
        for u, code in enumerate(codes):
            v = u ^ half
            assert [code >> i & 1 for i in range(c)] == [(v >> (b + i) ^ v >> (b - 1)) & 1 for i in range(c)]
            assert (code == 0) == (-(1 << (b - 1)) <= u - half < 1 << (b - 1))
            assert code == codes[(1 << n) - 1 - u]
    if n == 4:
        example = np.array([[5, -6, 1, -2] * 40] * 256, np.int8)
        layout = integer_layout("balanced", ElementKind.SIGNED, 4)
        blob = Blob(encode_elements((example + 8).astype(np.uint8), layout))
        assert blob.tile(0).mode == TileMode.CONSTANT
        assert blob.tile(0).constant_symbol == 0x05
        # Columns 0 … 3 are the lowest byte of four slots: in the plane of two bits, raw parts 01, 10, 01, 10.
        assert blob.tile(0).raw[0] == 0b10_01_10_01


# §5.1, tables


def with_tables(name: str, tables: list[list[int]], encoding: int) -> bytes:
    alphabet = Blob(base(name)).header.layout.alphabet_size
    if encoding == 0:
        return surgery.with_plain_tables(base(name), tables)
    return surgery.with_packed_tables(base(name), [table[:alphabet] for table in tables])


@pytest.mark.parametrize("encoding", [0, 1])
@pytest.mark.parametrize("change", [-1, 1, -100, 2000])
def test_table_sum(encoding: int, change: int) -> None:
    table = samples.frequencies(base("rans"))[0]
    table[int(np.argmax(table))] += change
    assert_refused(with_tables("rans", [table], encoding), TableError)


def test_table_sum_that_is_right_modulo_2_to_the_16() -> None:
    table = [0] * 256
    table[0], table[1] = 65535, 4097
    assert sum(table) % 65536 == 4096
    assert_refused(with_tables("rans", [table], 0), TableError)


def test_table_of_zeros() -> None:
    assert_refused(with_tables("rans", [[0] * 256], 0), TableError)


@pytest.mark.parametrize("encoding", [0, 1])
def test_frequency_of_4096(encoding: int) -> None:
    table = [0] * 256
    table[136] = 4096
    assert_refused(with_tables("rans", [table], encoding), TableError)


@pytest.mark.parametrize("encoding", [0, 1])
def test_frequency_of_4095_is_legal(encoding: int) -> None:
    table = [0] * 256
    table[136], table[3] = 4095, 1
    tables = Blob(with_tables("rans", [table], encoding)).tables
    assert [t.tolist() for t in tables] == [table]


@pytest.mark.parametrize("symbol", [16, 100, 255])
def test_symbols_outside_the_alphabet(symbol: int) -> None:
    """wide-rans has 4-bit symbols. A packed table cannot express others."""
    table = samples.frequencies(base("wide-rans"))[0]
    table[int(np.argmax(table))] -= 1
    table[symbol] = 1
    assert_refused(with_tables("wide-rans", [table], 0), TableError)


def test_second_table_is_checked_too() -> None:
    table = samples.frequencies(base("rans"))[0]
    bad = list(table)
    bad[int(np.argmax(bad))] -= 1
    blob = with_tables("rans", [table, bad], 0)
    assert_refused(patched(blob, num_tables=2), TableError)


def packed_section(bits: str, size: int | None = None) -> bytearray:
    bits += "0" * surgery.padding(len(bits), 8)
    section = bytes(int(bits[i : i + 8][::-1], 2) for i in range(0, len(bits), 8))
    return bytearray(section + bytes(surgery.padding(len(section))))[:size]


def with_section(name: str, section: bytearray) -> bytes:
    parts = split(base(name))
    parts.tables = section
    return parts.join()


def code(value: int) -> str:
    """FORMAT.md §5.1's Exp-Golomb code, as text."""
    m = value + 1
    k = m.bit_length() - 1
    return "0" * k + "1" + "".join(str(m >> i & 1) for i in range(k))


def test_examples_of_the_packed_code() -> None:
    examples = {0: "1", 1: "010", 2: "011", 3: "00100", 6: "00111", 7: "0001000"}
    assert {value: code(value) for value in examples} == examples


# wide-rans has 16 symbols: 13 zeros and three others make a table, of 54 bits.
THREE_SYMBOLS = code(4000) + code(3) + code(93) + "1" * 13


def test_packed_table_by_hand() -> None:
    table = Blob(with_section("wide-rans", packed_section(THREE_SYMBOLS))).tables[0]
    assert table[:4].tolist() == [4000, 3, 93, 0]
    assert int(table.sum()) == 4096


def test_packed_code_of_13_zeros() -> None:
    """k = 13 is illegal although its value would be refused as well."""
    bits = "0" * 13 + "1" + "0" * 13 + "1" * 15
    assert_refused(with_section("wide-rans", packed_section(bits)), TableError)


def test_packed_code_of_40_zeros() -> None:
    assert_refused(with_section("wide-rans", packed_section("0" * 40 + "1" * 20)), TableError)


def test_packed_table_without_its_last_codes() -> None:
    assert_refused(with_section("wide-rans", packed_section("1" * 15)), TableError)


def test_packed_code_cut_by_the_end_of_the_section() -> None:
    """15 codes and the zeros and the 1 of the last fill 120 of 128 bits; 12 bits are to follow."""
    bits = code(511) * 4 + code(1) * 10 + code(0) + "0" * 12 + "1"
    assert len(bits) == 120
    section = packed_section(bits + "1" * 8)
    assert len(section) == 16
    assert_refused(with_section("wide-rans", section), TableError)


def test_packed_section_of_zeros() -> None:
    assert_refused(with_section("wide-rans", bytearray(16)), TableError)


def test_packed_bits_between_tables() -> None:
    bits = THREE_SYMBOLS
    second = bits + "00" + bits
    fine = patched(with_section("wide-rans", packed_section(second)), num_tables=2)
    assert len(Blob(fine).tables) == 2
    for hidden in ("01", "10"):
        blob = with_section("wide-rans", packed_section(bits + hidden + bits))
        assert_refused(patched(blob, num_tables=2), PaddingError)


@pytest.mark.parametrize("hidden", ["1", "01", "00000001"])
def test_packed_bits_behind_the_last_table(hidden: str) -> None:
    assert_refused(with_section("wide-rans", packed_section(THREE_SYMBOLS + hidden)), PaddingError)


@pytest.mark.parametrize("byte", [-1, -2])
def test_packed_bytes_behind_the_last_table(byte: int) -> None:
    section = packed_section(THREE_SYMBOLS)
    section[byte] = 0x40
    assert_refused(with_section("wide-rans", section), PaddingError)


def test_packed_section_longer_than_needed() -> None:
    section = packed_section(THREE_SYMBOLS)
    assert_refused(with_section("wide-rans", section + bytes(16)), PaddingError)


# §5.2, the coder


def rans_pieces(name: str = "rans") -> tuple[Parts, RansTile]:
    blob = Blob(base(name))
    parts = split(base(name))
    lanes = blob.header.tile_geometry(0).lanes
    tile = RansTile.parse(parts.tiles[0], parts.metadata[0]["raw_offset"], lanes, blob.header.length_bytes)
    return parts, tile


def rejoin(parts: Parts, tile: RansTile) -> bytes:
    """Put the tile back; everything that follows from its size is made right."""
    behind_raw = parts.metadata[0]["outlier_offset"] - parts.metadata[0]["raw_offset"]
    parts.tiles[0], raw_offset = tile.build()
    parts.metadata[0]["raw_offset"] = raw_offset
    parts.metadata[0]["outlier_offset"] = raw_offset + behind_raw
    return parts.join()


RANS_BASES = ["rans", "wide-rans", "outliers", "plain", "predicted", "bf16"]


@pytest.mark.parametrize("name", RANS_BASES)
def test_rejoining_a_rans_tile_changes_nothing(name: str) -> None:
    assert rejoin(*rans_pieces(name)) == base(name)


@pytest.mark.parametrize("name", RANS_BASES)
@pytest.mark.parametrize("lane", [0, 1, 2, 3, 31, 32])
def test_a_changed_word(name: str, lane: int) -> None:
    parts, tile = rans_pieces(name)
    tile.words[lane][0] ^= 0x0100
    assert_refused(rejoin(parts, tile), LaneStateError)


@pytest.mark.parametrize("lane", [0, 33, 39])
def test_a_changed_last_word(lane: int) -> None:
    parts, tile = rans_pieces()
    tile.words[lane][-1] ^= 1
    assert_refused(rejoin(parts, tile), LaneStateError)


@pytest.mark.parametrize("lane", [0, 33, 39])
def test_a_changed_initial_state(lane: int) -> None:
    parts, tile = rans_pieces()
    tile.states[lane] ^= 1
    assert_refused(rejoin(parts, tile), LaneStateError)


@pytest.mark.parametrize("lane", [0, 1, 2, 3, 31, 32, 39])
def test_a_word_that_is_not_read(lane: int) -> None:
    parts, tile = rans_pieces()
    tile.words[lane].append(0)
    assert_refused(rejoin(parts, tile), LaneStateError)


def test_a_word_taken_from_the_next_lane() -> None:
    """Lane 5 reads its own words, one of which now counts as lane 6's."""
    parts, tile = rans_pieces()
    tile.words[6].insert(0, tile.words[5].pop())
    assert_refused(rejoin(parts, tile), LaneStateError)


def test_a_word_given_to_the_lane_before() -> None:
    parts, tile = rans_pieces()
    tile.words[5].append(tile.words[6].pop(0))
    assert_refused(rejoin(parts, tile), LaneStateError)


def test_a_last_lane_that_reads_behind_all_words() -> None:
    parts, tile = rans_pieces("wide-rans")
    assert tile.words[32]
    tile.words[32] = []
    assert_refused(rejoin(parts, tile), LaneStateError)


# §§5.3 and 6, tile metadata


@pytest.mark.parametrize("mode", [3, 4, 128, 255])
def test_unknown_mode(mode: int) -> None:
    assert_refused(patched(base("raw"), tile=0, mode=mode), TileModeError)


@pytest.mark.parametrize("predictor", [2, 3, 255])
def test_unknown_predictor(predictor: int) -> None:
    assert_refused(patched(base("rans"), tile=0, predictor=predictor), TileModeError)


@pytest.mark.parametrize("name", ["raw", "constant", "narrow-constant"])
def test_predictor_outside_mode_rans(name: str) -> None:
    assert_refused(patched(base(name), tile=0, predictor=1), TileModeError)


def test_predictor_with_a_trellis() -> None:
    """Grids are the parities of elements, which a predictor's sums would give after them alone."""
    assert Blob(base("trellis")).tiles["mode"][0] == TileMode.RANS
    assert_refused(patched(base("trellis"), tile=0, predictor=1), TileModeError)


def test_predictor_for_floats() -> None:
    assert_refused(patched(base("bf16"), tile=0, predictor=1), TileModeError)


@pytest.mark.parametrize("index", [1, 15, 65535])
def test_table_index_that_is_not_there(index: int) -> None:
    assert_refused(patched(base("rans"), tile=0, table_index=index), TileModeError)


def test_table_index_without_tables() -> None:
    """A rans tile in a blob of no tables; nothing else is read of it."""
    parts = split(base("rans"))
    parts.tables = bytearray()
    surgery.put(parts.header, "num_tables", 0)
    assert_refused(parts.join(), TileModeError)


@pytest.mark.parametrize("tile", [6, 10, 11])  # constant, raw, raw
def test_table_index_outside_mode_rans(tile: int) -> None:
    assert surgery.tile_get(base("mixed"), tile, "mode") != 0
    assert_refused(patched(base("mixed"), tile=tile, table_index=1), TileModeError)


def test_first_tile_not_at_the_payloads_start() -> None:
    assert_refused(patched(base("rans"), tile=0, data_offset=16), TileBoundsError)


@pytest.mark.parametrize("change", [-16, -1, 1, 16, 2**63])
def test_gap_or_overlap_between_tiles(change: int) -> None:
    offset = surgery.tile_get(base("mixed"), 4, "data_offset")
    assert_refused(patched(base("mixed"), tile=4, data_offset=offset + change), TileBoundsError)


def test_a_gap_of_zeros_between_tiles() -> None:
    """Sixteen zero bytes that all offsets agree on."""
    parts = split(base("mixed"))
    parts.gaps = [bytes(surgery.padding(len(data))) for data in parts.tiles]
    assert parts.join() == base("mixed")
    parts.gaps[3] += bytes(16)
    assert_refused(parts.join(), TileBoundsError)


def test_tiles_out_of_order() -> None:
    blob = bytearray(base("mixed"))
    first = surgery.metadata_offset(blob)
    records = [blob[first + 32 * i : first + 32 * i + 32] for i in range(12)]
    records[3], records[4] = records[4], records[3]
    blob[first : first + 32 * 12] = b"".join(records)
    surgery.mend_crcs(blob)
    assert_refused(bytes(blob), TileBoundsError)


def test_offset_plus_size_that_wraps() -> None:
    """2^64 − 16 + 16 is 0 in 64 bits: the second tile would begin where the first does."""
    blob = patched(base("mixed"), tile=0, data_offset=2**64 - 16)
    assert_refused(patched(blob, tile=0, data_size=16), TileBoundsError)


@pytest.mark.parametrize("name", ["rans", "raw", "constant", "outliers"])
@pytest.mark.parametrize("extra", [1, 4, 16])
def test_data_size_larger_than_the_content(name: str, extra: int) -> None:
    parts = split(base(name))
    parts.tiles[0] += bytes(extra)
    assert_refused(parts.join(), TileBoundsError)


@pytest.mark.parametrize("name", ["rans", "raw", "constant", "narrow-constant", "outliers"])
@pytest.mark.parametrize("cut", [1, 4, 16])
def test_data_size_smaller_than_the_content(name: str, cut: int) -> None:
    parts = split(base(name))
    del parts.tiles[0][-cut:]
    assert_refused(parts.join(), TileBoundsError)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        *[(name, size) for name in ("rans", "constant") for size in (0, 1, 15, 31, 351)],
        *[(name, size) for name in ("raw", "narrow-constant") for size in (0, 1, 15)],
    ],
)
def test_tile_smaller_than_its_fixed_part(name: str, size: int) -> None:
    parts = split(base(name))
    del parts.tiles[0][size:]
    assert_refused(parts.join(), TileBoundsError)


def test_words_beyond_the_tile() -> None:
    """The lanes' lengths add up and lead out of the tile."""
    parts, tile = rans_pieces()
    data, _ = tile.build()
    parts.tiles[0] = data[: 352 + 2 * sum(map(len, tile.words)) - 2]
    assert_refused(parts.join(), TileBoundsError)


@pytest.mark.parametrize("name", ["rans", "raw", "constant", "wide-rans", "outliers"])
@pytest.mark.parametrize("field", ["raw_offset", "outlier_offset"])
@pytest.mark.parametrize("change", [-16, -4, 4, 16, 2**31])
def test_prescribed_offsets(name: str, field: str, change: int) -> None:
    value = (surgery.tile_get(base(name), 0, field) + change) % 2**32
    assert_refused(patched(base(name), tile=0, **{field: value}), TileBoundsError)


@pytest.mark.parametrize("count", [3, 5, 2**30, 2**32 - 1])
def test_outlier_count_against_data_size(count: int) -> None:
    """2^30 outliers of 4 bytes are 0 bytes modulo 2^32."""
    assert_refused(patched(base("outliers"), tile=0, outlier_count=count), TileBoundsError)


@pytest.mark.parametrize("name", ["rans", "raw", "constant", "mixed"])
@pytest.mark.parametrize("place", [0.0, 0.3, 0.9999])
def test_payload_crc(name: str, place: float) -> None:
    blob = bytearray(base(name))
    size = surgery.tile_get(blob, 0, "data_size")
    blob[surgery.payload_offset(blob) + int(place * size)] ^= 0x80
    assert_refused(bytes(blob), PayloadCrcError)


def test_payload_crc_field() -> None:
    crc = surgery.tile_get(base("raw"), 0, "payload_crc32")
    assert crc == zlib.crc32(split(base("raw")).tiles[0])
    assert_refused(patched(base("raw"), tile=0, payload_crc32=crc ^ 1), PayloadCrcError)


def test_bytes_between_tiles() -> None:
    blob = bytearray(base("mixed"))
    start = surgery.payload_offset(blob)
    broken = 0
    for tile in range(12):
        end = surgery.tile_get(blob, tile, "data_offset") + surgery.tile_get(blob, tile, "data_size")
        for at in range(end, end + surgery.padding(end)):
            blob[start + at] = 1
            assert_refused(bytes(blob), PaddingError)
            blob[start + at] = 0
            broken += 1
    assert broken > 0


# §7.1, mode rans


@pytest.mark.parametrize("group", range(8))
@pytest.mark.parametrize("change", [-1, 1])
def test_group_offsets(group: int, change: int) -> None:
    """Groups 2 to 7 do not exist in this tile and must hold the number of all words."""
    parts, _ = rans_pieces()
    (value,) = struct.unpack_from("<I", parts.tiles[0], 4 * group)
    struct.pack_into("<I", parts.tiles[0], 4 * group, (value + change) % 2**32)
    assert_refused(parts.join(), LaneError)


@pytest.mark.parametrize("state", [0, 1, 4096, 65535])
@pytest.mark.parametrize("lane", [0, 39])
def test_initial_state_below_l(state: int, lane: int) -> None:
    parts, tile = rans_pieces()
    tile.states[lane] = state
    assert_refused(rejoin(parts, tile), LaneError)


@pytest.mark.parametrize("state", [0, 65535, 65537, 2**32 - 1])
@pytest.mark.parametrize("lane", [40, 63])
def test_state_of_a_padding_lane(state: int, lane: int) -> None:
    parts, tile = rans_pieces()
    assert tile.states[lane] == 65536
    tile.states[lane] = state
    assert_refused(rejoin(parts, tile), LaneError)


@pytest.mark.parametrize("lane", [40, 63])
def test_words_of_a_padding_lane(lane: int) -> None:
    parts, tile = rans_pieces()
    tile.words[lane] = [0]
    assert_refused(rejoin(parts, tile), LaneError)


@pytest.mark.parametrize(("name", "steps"), [("rans", 176), ("wide-rans", 352)])
def test_more_words_than_steps(name: str, steps: int) -> None:
    parts, tile = rans_pieces(name)
    tile.words[3] += [0] * (steps + 1 - len(tile.words[3]))
    assert_refused(rejoin(parts, tile), LaneError)
    parts, tile = rans_pieces(name)
    tile.words[3] += [0] * (steps - len(tile.words[3]))
    assert_refused(rejoin(parts, tile), LaneStateError)


def test_lengths_are_u16_above_340_steps_of_the_widest_tile() -> None:
    """``tile_cols`` decides, not the tile's own width."""
    for cols, tile_cols, length_bytes in ((100, 352, 2), (100, 320, 1), (330, 352, 2)):
        elements = samples.gaussian_elements((64, cols), 4, 0.6, 11)
        layout = integer_layout("compact", ElementKind.UNSIGNED, 4)
        blob = Blob(encode_elements(elements, layout, tile_cols=tile_cols))
        assert blob.header.length_bytes == length_bytes
        lengths = blob.tile(0).lengths
        at = 32 + 4 * 64
        data = bytes(blob.payload[at : at + 64 * length_bytes])
        stored = np.frombuffer(data, {1: "<u1", 2: "<u2"}[length_bytes])
        assert stored.tolist() == lengths.tolist()
        assert int(lengths.sum()) > 64


def test_bytes_behind_the_words() -> None:
    parts, tile = rans_pieces()
    _, raw_offset = tile.build()
    end = 352 + 2 * sum(map(len, tile.words))
    assert end < raw_offset
    for at in (end, raw_offset - 1):
        parts, _ = rans_pieces()
        parts.tiles[0][at] = 1
        assert_refused(parts.join(), PaddingError)


def test_padding_lanes_have_zero_planes() -> None:
    """What a writer must do (§7.4): the planes of lanes 40 to 63 hold nothing."""
    _, tile = rans_pieces()
    planes = np.frombuffer(tile.rest, "<u4").reshape(2, 11, 32)  # groups, chunks, lanes (b = 1)
    assert planes[0].all(axis=0).any()
    assert planes[1, :, :8].any()
    assert not planes[1, :, 8:].any()


# §7.2, mode raw


def test_raw_spare_bits() -> None:
    """35 elements of 3 bits are 105 bits: bits 1 to 7 of the last byte are spare."""
    for bit in range(1, 8):
        parts = split(base("raw"))
        parts.tiles[0][13] |= 1 << bit
        assert_refused(parts.join(), PaddingError)
    parts = split(base("raw"))
    parts.tiles[0][13] ^= 1
    decode_integers(Blob(parts.join()))


@pytest.mark.parametrize("at", [14, 15])
def test_bytes_before_the_outliers(at: int) -> None:
    parts = split(base("raw"))
    assert parts.metadata[0]["outlier_offset"] == 16
    parts.tiles[0][at] = 1
    assert_refused(parts.join(), PaddingError)


# §7.3, mode constant


@pytest.mark.parametrize("symbol", [64, 65, 128, 255])
def test_constant_symbol_outside_the_alphabet(symbol: int) -> None:
    parts = split(base("narrow-constant"))
    parts.tiles[0][0] = symbol
    assert_refused(parts.join(), TileModeError)


def test_constant_symbol_63_is_legal() -> None:
    parts = split(base("narrow-constant"))
    parts.tiles[0][0] = 63
    assert (decode_integers(Blob(parts.join())) == 7).all()


@pytest.mark.parametrize("at", range(1, 16))
def test_bytes_1_to_15_of_a_constant_tile(at: int) -> None:
    parts = split(base("constant"))
    parts.tiles[0][at] = 1
    assert_refused(parts.join(), PaddingError)


# §7.5, outliers


def outlier(row: int, col: int, delta: int) -> int:
    return row << 24 | col << 15 | delta & 0x7FFF


GOOD = [(0, 5, 300), (0, 9, -16384), (7, 0, 16383), (39, 349, -17)]


def with_outliers(entries: list[tuple[int, int, int]], name: str = "outliers") -> bytes:
    parts = split(base(name))
    offset = parts.metadata[0]["outlier_offset"]
    del parts.tiles[0][offset:]
    parts.tiles[0] += struct.pack(f"<{len(entries)}I", *[outlier(*entry) for entry in entries])
    parts.metadata[0]["outlier_count"] = len(entries)
    return parts.join()


def test_outliers_as_stored() -> None:
    assert with_outliers(GOOD) == base("outliers")
    difference = decode_integers(Blob(base("outliers"))).astype(int) - decode_integers(Blob(base("rans")))
    assert {(r, c): int(difference[0, r, c]) for _, r, c in np.argwhere(difference)} == {
        (r, c): delta for r, c, delta in GOOD
    }


BAD_OUTLIERS = {
    "columns descend": [(0, 9, 1), (0, 5, 1)],
    "rows descend": [(7, 0, 1), (0, 5, 1)],
    "twice the same": [(0, 5, 1), (0, 5, 1)],
    "twice the same place": [(0, 5, 1), (0, 5, 2)],
    "the last two swapped": [(0, 5, 1), (7, 1, 1), (7, 0, 1)],
    "first row behind the tile": [(40, 0, 1)],
    "a padding lane": [(63, 0, 1)],
    "row 255": [(0, 0, 1), (255, 0, 1)],
    "first column behind the tile": [(0, 350, 1)],
    "column 511": [(3, 511, 1)],
    "delta 0": [(0, 5, 0)],
    "delta 0 among others": [(0, 5, 1), (0, 6, 0), (0, 7, 1)],
}


@pytest.mark.parametrize("entries", BAD_OUTLIERS.values(), ids=BAD_OUTLIERS.keys())
def test_bad_outliers(entries: list[tuple[int, int, int]]) -> None:
    assert_refused(with_outliers(entries), OutlierError)


@pytest.mark.parametrize("name", ["raw", "constant"])
def test_outliers_in_other_modes(name: str) -> None:
    """Legal, and checked alike."""
    plain = decode_integers(Blob(base(name))).astype(int)
    blob = with_outliers([(1, 2, -16384), (4, 6, 16383)], name)
    difference = decode_integers(Blob(blob)) - plain
    assert difference[0, 1, 2] == -16384
    assert difference[0, 4, 6] == 16383
    assert np.count_nonzero(difference) == 2
    assert_refused(with_outliers([(4, 6, 1), (1, 2, 1)], name), OutlierError)
    assert_refused(with_outliers([(40, 6, 1)], name), OutlierError)


@pytest.mark.parametrize("name", ["wide-rans", "narrow-constant", "bf16"])
def test_outliers_of_a_kind_that_is_not_signed(name: str) -> None:
    assert_refused(with_outliers([(0, 0, 1)], name), OutlierError)


# §11, the worked example


def test_worked_example() -> None:
    header = bytes.fromhex(
        "534E4152 0100 0400 0100000000000000 0400000000000000 0001 2000"
        "01000000 01000000 04 02 04 02 0C 01 00 00 0000 0000"
        "1000000000000000 01000000"
    )
    payload = bytes.fromhex("87980000") + bytes(12)
    tile = bytes.fromhex("0000000000000000 04000000 00000000 01 00 0000 00000000 04000000")
    tile += bytes.fromhex("D6B8CAA2")
    blob = header + bytes.fromhex("B572E3E8") + tile + payload
    assert zlib.crc32(payload[:4]) == 0xA2CAB8D6
    assert zlib.crc32(header + tile) == 0xE8E372B5
    elements = np.array([[7, 8, 8, 9]], np.uint8)
    assert encode_elements(elements, integer_layout("balanced", ElementKind.SIGNED, 4)) == blob
    assert decode_integers(Blob(blob)).tolist() == [[[-1, 0, 0, 1]]]


# Rules for writers


@pytest.mark.parametrize("kind", samples.FLOAT_KINDS)
def test_writer_refuses_a_predictor_for_floats(kind: ElementKind) -> None:
    layout = Blob(samples.float_blob(kind)).header.layout
    elements = samples.float_elements(kind, (3, 40), 1)
    with pytest.raises(ValueError, match="predictor"):
        encode_elements(elements, layout, predictor=Predictor.PREVIOUS)


@pytest.mark.parametrize(
    ("elements", "message"),
    [
        (np.zeros((0, 4), np.uint8), "shape"),
        (np.zeros((4, 0), np.uint8), "shape"),
        (np.zeros(4, np.uint8), "shape"),
        (np.zeros((1, 1, 1, 1), np.uint8), "shape"),
        (np.zeros((2, 2), np.int8), "uint8"),
        (np.zeros((2, 2), np.uint16), "uint8"),
        (np.full((2, 2), 16, np.uint8), "exceeds"),
    ],
)
def test_writer_refuses(elements: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode_elements(elements, integer_layout("balanced", ElementKind.SIGNED, 4))


def test_names_of_layouts() -> None:
    with pytest.raises(ValueError, match="unknown layout"):
        integer_layout("dense", ElementKind.SIGNED, 4)
    with pytest.raises(ValueError, match="no float kind"):
        float_layouts(ElementKind.SIGNED)
