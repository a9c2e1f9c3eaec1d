"""One tile: elements ⇄ the bytes of FORMAT.md §7. The compiled loops; see blob_encoder and blob_decoder."""

from __future__ import annotations

import numpy as np
from numba import njit

from kvpack.encode.jit import kernel
from kvpack.encode.planes import (
    SLOTS,
    fold_row,
    join_narrow,
    join_wide,
    pack_planes,
    pack_symbols,
    pad_row,
    undo_predictor,
)
from kvpack.encode.rans import decode_lanes, encode_lanes
from kvpack.format.blob import GROUP_OFFSETS_BYTES, GROUPS_PER_TILE
from kvpack.format.layout import ALIGNMENT_BYTES, CHUNK_COLS, GROUP_LANES, STATE_LOW

_ALIGNMENT_WORDS = ALIGNMENT_BYTES // 2
_STATE_LOW = np.uint32(STATE_LOW)


@kernel
def count_symbols(elements, layout, previous, histogram):  # type: ignore[no-untyped-def]
    """Add a tile's symbols, padding columns included, to ``histogram`` i64 [256].

    ``layout`` is ``Layout.parameters``, here and below; ``previous`` selects predictor 1.
    """
    code_bits, g, raw_bits, folded = layout
    rows, cols = elements.shape
    padded = (cols + CHUNK_COLS - 1) // CHUNK_COLS * CHUNK_COLS
    line = np.empty(padded, elements.dtype)
    symbols = np.empty(padded // g, np.uint8)
    half = 1 << (code_bits + raw_bits - 1)
    # Four counters, so that equal neighbours do not wait for each other's store.
    counts = np.zeros((4, 256), np.int64)
    for row in range(rows):
        pad_row(elements, row, half, previous, line)
        if folded:
            fold_row(line, code_bits, raw_bits)
        pack_symbols(line, code_bits, g, raw_bits, symbols)
        for step in range(0, symbols.shape[0], 4):
            counts[0, symbols[step]] += 1
            counts[1, symbols[step + 1]] += 1
            counts[2, symbols[step + 2]] += 1
            counts[3, symbols[step + 3]] += 1
    for symbol in range(256):
        for counter in range(4):
            histogram[symbol] += counts[counter, symbol]


@kernel
def encode_rans_tile(elements, layout, previous, table, u8_lengths, out):  # type: ignore[no-untyped-def]
    """Write a tile in mode rans to ``out`` = (u8, u16, u32 views of one zeroed buffer).

    Returns (raw_offset, end of the raw planes), both in bytes. The buffer must hold the largest tile of its
    geometry (``blob_encoder.max_tile_bytes``).
    """
    out8, out16, out32 = out
    code_bits, g, raw_bits, folded = layout
    rows, cols = elements.shape
    groups = (rows + GROUP_LANES - 1) // GROUP_LANES
    lanes = groups * GROUP_LANES
    chunks = (cols + CHUNK_COLS - 1) // CHUNK_COLS
    steps = chunks * CHUNK_COLS // g
    half = 1 << (code_bits + raw_bits - 1)

    lengths_at = GROUP_OFFSETS_BYTES + 4 * lanes
    words_at = (lengths_at + lanes * (1 if u8_lengths else 2)) // 2
    at = words_at
    line = np.empty(chunks * CHUNK_COLS, elements.dtype)
    symbols = np.empty((GROUP_LANES, steps), np.uint8)
    slots = np.empty(SLOTS, np.uint32)
    words = np.empty((GROUP_LANES, steps + 1), np.uint16)
    states = np.empty(GROUP_LANES, np.uint32)
    lengths = np.empty(GROUP_LANES, np.int64)
    planes = np.zeros((groups, chunks, GROUP_LANES * raw_bits), np.uint32)
    for group in range(groups):
        first = group * GROUP_LANES
        valid = min(GROUP_LANES, rows - first)
        coded = (valid + 3) // 4 * 4  # encode_lanes takes four at a time; the surplus is dropped below
        for lane in range(coded):
            if lane < valid:
                pad_row(elements, first + lane, half, previous, line)
                if folded:
                    fold_row(line, code_bits, raw_bits)
                pack_symbols(line, code_bits, g, raw_bits, symbols[lane])
                if raw_bits:
                    pack_planes(line, g, raw_bits, lane, slots, planes[group])
            else:
                symbols[lane] = symbols[valid - 1]
        encode_lanes(symbols[:coded], table, words, states, lengths)
        out32[group] = at - words_at
        for lane in range(GROUP_LANES):
            count = lengths[lane] if lane < valid else 0
            out32[GROUP_OFFSETS_BYTES // 4 + first + lane] = states[lane] if lane < valid else _STATE_LOW
            if u8_lengths:
                out8[lengths_at + first + lane] = count
            else:
                out16[lengths_at // 2 + first + lane] = count
            out16[at : at + count] = words[lane, steps + 1 - count :]
            at += count
    for group in range(groups, GROUPS_PER_TILE):
        out32[group] = at - words_at
    raw_at = (at + _ALIGNMENT_WORDS - 1) // _ALIGNMENT_WORDS * ALIGNMENT_BYTES
    flat = planes.reshape(-1)
    out32[raw_at // 4 : raw_at // 4 + flat.shape[0]] = flat
    return raw_at, raw_at + 4 * flat.shape[0]


@kernel
def encode_planes(elements, layout, out32):  # type: ignore[no-untyped-def]
    """Write only the raw planes of a tile (mode constant, predictor 0) to ``out32``."""
    _, g, raw_bits, _ = layout
    rows, cols = elements.shape
    chunks = (cols + CHUNK_COLS - 1) // CHUNK_COLS
    groups = (rows + GROUP_LANES - 1) // GROUP_LANES
    line = np.empty(chunks * CHUNK_COLS, elements.dtype)
    planes = np.zeros((groups, chunks, GROUP_LANES * raw_bits), np.uint32)
    slots = np.empty(SLOTS, np.uint32)
    for row in range(rows):
        pad_row(elements, row, 0, False, line)
        pack_planes(line, g, raw_bits, row % GROUP_LANES, slots, planes[row // GROUP_LANES])
    flat = planes.reshape(-1)
    out32[: flat.shape[0]] = flat


@njit(nogil=True, inline="always")
def _join(symbols, planes, lane, layout, slots, line):  # type: ignore[no-untyped-def]
    if line.itemsize == 1:
        join_narrow(symbols, planes, lane, layout, slots, line)
    else:
        join_wide(symbols, planes, lane, layout[2], slots, line)


@kernel
def decode_rans_tile(  # type: ignore[no-untyped-def]
    states, lengths, words, planes, table, layout, previous, line, out
):
    """Decode a tile in mode rans into ``out`` (u8, u16 or u32 [R, K]); returns the first bad lane or −1.

    ``words`` as in :func:`decode_lanes`; ``planes`` u32 [groups, chunks, 32·raw_bits]; ``line`` is scratch of whole
    chunks, u8 for elements of up to 8 bits and u32 for wider ones.
    """
    code_bits, g, raw_bits, _ = layout
    rows, cols = out.shape
    half = 1 << (code_bits + raw_bits - 1)
    symbols = np.empty((GROUP_LANES, line.shape[0] // g), np.uint8)
    slots = np.empty(SLOTS, np.uint32)
    first_words = np.zeros(lengths.shape[0] + 1, np.int64)
    for lane in range(lengths.shape[0]):
        first_words[lane + 1] = first_words[lane] + lengths[lane]
    bad = -1
    for group in range(planes.shape[0]):
        first = group * GROUP_LANES
        valid = min(GROUP_LANES, rows - first)
        coded = (valid + 3) // 4 * 4
        wrong = decode_lanes(states[first : first + coded], first_words[first:], words, table, symbols[:coded])
        # A surplus lane has no words and cannot end where it must: only valid lanes count.
        if bad < 0 and 0 <= wrong < valid:
            bad = first + wrong
        for lane in range(valid):
            _join(symbols[lane], planes[group], lane, layout, slots, line)
            if previous:
                undo_predictor(half, line)
            row = out[first + lane]
            for col in range(cols):  # compiled to wide copies, unlike an assignment of slices
                row[col] = line[col]
    return bad


@kernel
def decode_constant_tile(symbol, planes, layout, line, out):  # type: ignore[no-untyped-def]
    """Decode a tile in mode constant; arguments as in :func:`decode_rans_tile`."""
    symbols = np.full(line.shape[0] // layout[1], symbol, np.uint8)
    slots = np.empty(SLOTS, np.uint32)
    for row in range(out.shape[0]):
        group = row // GROUP_LANES
        _join(symbols, planes[group], row - group * GROUP_LANES, layout, slots, line)
        out[row] = line[: out.shape[1]]
