"""Frequency tables: plain and packed (docs/FORMAT.md §5.1)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import numpy.typing as npt

from kvpack.errors import PaddingError, TableError
from kvpack.format.layout import (
    ALIGNMENT_BYTES,
    FREQUENCY_SUM,
    NUM_SYMBOLS,
    PROBABILITY_BITS,
    TableEncoding,
    align,
    ceil_div,
)

_MAX_CODE_BITS = 2 * PROBABILITY_BITS + 1
_CODE_MASK = (1 << _MAX_CODE_BITS) - 1
# Most frequencies have no longer codes: a look-up takes half of the time that their bits take.
_SHORT_CODE_BITS = 13
_SHORT_CODE_MASK = (1 << _SHORT_CODE_BITS) - 1

Frequencies = npt.NDArray[np.uint16]  # [256], sum 4096


def _pack_table(frequencies: Frequencies, alphabet_size: int) -> bytes:
    # One integer, whose bit i is the table's: in half of the time that a list of bits takes.
    bits = at = 0
    for value in frequencies[:alphabet_size].tolist():
        m = value + 1
        k = m.bit_length() - 1
        bits |= (1 << k | (m - (1 << k)) << (k + 1)) << at
        at += 2 * k + 1
    return bits.to_bytes(ceil_div(at, 8), "little")


def pack_tables(tables: Sequence[Frequencies], alphabet_size: int) -> tuple[TableEncoding, bytes]:
    """The table section in whichever encoding is shorter, padded to 16 bytes."""
    plain = b"".join(table.astype("<u2").tobytes() for table in tables)
    packed = b"".join(_pack_table(table, alphabet_size) for table in tables)
    packed += bytes(align(len(packed), ALIGNMENT_BYTES) - len(packed))
    if len(packed) < len(plain):
        return TableEncoding.PACKED, packed
    return TableEncoding.PLAIN, plain


@cache
def _short_codes() -> list[int]:
    """What the next bits begin with: 32 · frequency + bits of its code; 0 where the code is longer."""
    codes = [0] * (1 << _SHORT_CODE_BITS)
    for m in range(1, 1 << (_SHORT_CODE_BITS + 1) // 2):
        k = m.bit_length() - 1
        code = (m - (1 << k)) << (k + 1) | 1 << k
        step = 1 << (2 * k + 1)
        codes[code::step] = [m - 1 << 5 | 2 * k + 1] * len(range(code, len(codes), step))
    return codes


def _parse_packed(section: memoryview, num_tables: int, alphabet_size: int) -> list[Frequencies]:
    tables: list[Frequencies] = []
    short_codes = _short_codes()
    begin, longest = 0, ceil_div(alphabet_size * _MAX_CODE_BITS, 8)
    for index in range(num_tables):
        # One integer, whose bit i is the table's: shifts find codes in a tenth of the time that lists of bits take.
        window = section[begin : begin + longest]
        bits, num_bits, at = int.from_bytes(window, "little"), 8 * len(window), 0
        table: list[int] = []
        for symbol in range(alphabet_size):
            rest = bits >> at & _CODE_MASK
            if short := short_codes[rest & _SHORT_CODE_MASK]:
                table.append(short >> 5)
                at += short & 31
                continue
            k = (rest & -rest).bit_length() - 1
            if not 0 < k <= PROBABILITY_BITS:
                if not bits >> at:
                    raise TableError(f"table {index} runs past the table section")
                raise TableError(f"table {index}, symbol {symbol}: more than {PROBABILITY_BITS} leading zeros")
            at += 2 * k + 1
            table.append((1 << k) + (rest >> (k + 1) & ((1 << k) - 1)) - 1)
        if at > num_bits:
            raise TableError(f"table {index} runs past the table section")
        end = align(at, 8)
        if bits >> at & ((1 << (end - at)) - 1):
            raise PaddingError(f"the bits behind table {index} are not zero")
        begin += end // 8
        tables.append(np.array(table + [0] * (NUM_SYMBOLS - alphabet_size), np.uint16))
    if align(begin, ALIGNMENT_BYTES) != len(section) or any(section[begin:]):
        raise PaddingError("the bytes behind the last table are not zero, or too many")
    return tables


def parse_tables(
    section: memoryview, num_tables: int, encoding: TableEncoding, alphabet_size: int
) -> list[Frequencies]:
    """Read and check ``num_tables`` tables of 256 frequencies each.

    Raises:
        TableError: a sum other than 4096, a frequency of 4096, a symbol outside the alphabet, a code that
            runs past the section.
        PaddingError: padding that is not zero.
    """
    if encoding == TableEncoding.PLAIN:
        plain = np.frombuffer(section, "<u2").astype(np.uint16).reshape(num_tables, NUM_SYMBOLS)
        tables = list(plain)
    else:
        tables = _parse_packed(section, num_tables, alphabet_size)
    for index, table in enumerate(tables):
        total = int(table.sum(dtype=np.int64))
        if total != FREQUENCY_SUM:
            raise TableError(f"the frequencies of table {index} sum to {total}, not {FREQUENCY_SUM}")
        if int(table.max()) >= FREQUENCY_SUM:
            raise TableError(f"table {index} has a frequency of {FREQUENCY_SUM}")
        if table[alphabet_size:].any():
            raise TableError(f"table {index} has symbols above {alphabet_size - 1}")
    return tables
