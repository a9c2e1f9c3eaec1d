"""Elements ⇄ symbols and raw planes (docs/FORMAT.md §§4, 5.3, 7.2, 7.4), on the CPU.

Elements of up to 8 bits (*narrow*) are handled four at a time in a u32, in the order that the raw planes prescribe:
*slot* k (0 … 7) of a chunk is the u32 whose byte t is column 4g·(k div g) + g·t + k mod g. Elements of 16 and 32 bits
(*wide*: the lossless floats) have one code a symbol and whole bytes among their raw bits.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from kvpack.encode.jit import kernel
from kvpack.format.layout import CHUNK_COLS, GROUP_LANES

U32 = np.uint32
_BYTES = U32(0x01010101)
_EVEN, _HALF = U32(0x00FF00FF), U32(0xFFFF)
SLOTS = 8


@njit(nogil=True, inline="always")
def _slot_column(slot, codes_per_symbol):  # type: ignore[no-untyped-def]
    """Column of byte 0 of a slot; byte t lies codes_per_symbol · t columns further on."""
    quad, code = divmod(slot, codes_per_symbol)
    return 4 * codes_per_symbol * quad + code


@kernel
def pad_row(elements, row, half, previous, line):  # type: ignore[no-untyped-def]
    """Copy a row into ``line``, repeat its last element, and take differences if ``previous``.

    ``half`` is 2^(n−1), and the differences are modulo 2n·half (FORMAT.md §5.3).
    """
    cols = elements.shape[1]
    for col in range(cols):
        line[col] = elements[row, col]
    for col in range(cols, line.shape[0]):
        line[col] = elements[row, cols - 1]
    if previous:
        mask = 2 * half - 1
        for col in range(line.shape[0] - 1, 0, -1):
            line[col] = (np.int64(line[col]) - np.int64(line[col - 1]) + half) & mask


@kernel
def fold_row(line, code_bits, raw_bits):  # type: ignore[no-untyped-def]
    """Fold the codes of a padded row of unsigned elements in place (FORMAT.md §4).

    With the sign bit turned, an element is two's complement; its code is xor-ed with the highest raw bit, everywhere.
    """
    kind = line.dtype.type
    turned, top, codes = (
        kind(1 << (code_bits + raw_bits - 1)),
        kind(raw_bits - 1),
        kind((1 << code_bits) - 1 << raw_bits),
    )
    for col in range(line.shape[0]):
        u = line[col] ^ turned
        line[col] = u ^ (codes & (kind(0) - ((u >> top) & kind(1))))


@kernel
def pack_symbols(line, code_bits, codes_per_symbol, raw_bits, symbols):  # type: ignore[no-untyped-def]
    """Pack the codes of a padded row into u8 ``symbols`` [steps]."""
    c, b = np.uint8(code_bits), np.uint8(raw_bits)
    if codes_per_symbol == 1:
        for step in range(symbols.shape[0]):
            symbols[step] = line[step] >> b
    elif codes_per_symbol == 2:
        for step in range(symbols.shape[0]):
            low, high = line[2 * step] >> b, line[2 * step + 1] >> b
            symbols[step] = np.uint8(low) | (np.uint8(high) << c)
    elif codes_per_symbol == 8:
        for step in range(symbols.shape[0]):
            s = np.uint8(line[8 * step] >> b)
            for code in range(1, 8):
                s |= np.uint8(line[8 * step + code] >> b) << np.uint8(code)  # eight codes to a byte have one bit
            symbols[step] = s
    else:
        for step in range(symbols.shape[0]):
            s = np.uint8(line[4 * step] >> b) | (np.uint8(line[4 * step + 1] >> b) << c)
            s |= np.uint8(line[4 * step + 2] >> b) << (c + c)
            symbols[step] = s | (np.uint8(line[4 * step + 3] >> b) << (c + c + c))


@njit(nogil=True, inline="always")
def _gather(line, base, g, slots):  # type: ignore[no-untyped-def]
    """The low bytes of a chunk's columns, in the order of the slots."""
    for slot in range(SLOTS):
        col = base + _slot_column(slot, g)
        u = U32(line[col]) & U32(0xFF)
        u |= (U32(line[col + g]) & U32(0xFF)) << U32(8)
        u |= (U32(line[col + 2 * g]) & U32(0xFF)) << U32(16)
        slots[slot] = u | ((U32(line[col + 3 * g]) & U32(0xFF)) << U32(24))


@njit(nogil=True, inline="always")
def _scatter(slots, base, g, out):  # type: ignore[no-untyped-def]
    """The inverse of :func:`_gather` for u8 ``out``."""
    for slot in range(SLOTS):
        col = base + _slot_column(slot, g)
        u = slots[slot]
        out[col] = np.uint8(u)
        out[col + g] = np.uint8(u >> U32(8))
        out[col + 2 * g] = np.uint8(u >> U32(16))
        out[col + 3 * g] = np.uint8(u >> U32(24))


@njit(nogil=True, inline="always")
def _scatter_quads(slots, base, g, out32):  # type: ignore[no-untyped-def]
    """The same for g = 4 or 8 and ``out`` seen as u32: four slots are turned like a matrix of 4 × 4 bytes."""
    for first in range(0, SLOTS, 4):
        a, b, c, d = slots[first], slots[first + 1], slots[first + 2], slots[first + 3]
        low_0, low_1 = (a & _EVEN) | ((b & _EVEN) << U32(8)), ((a >> U32(8)) & _EVEN) | (b & ~_EVEN)
        high_0, high_1 = (c & _EVEN) | ((d & _EVEN) << U32(8)), ((c >> U32(8)) & _EVEN) | (d & ~_EVEN)
        at = (base + _slot_column(first, g)) // 4
        out32[at] = (low_0 & _HALF) | (high_0 << U32(16))
        out32[at + g // 4] = (low_1 & _HALF) | (high_1 << U32(16))
        out32[at + 2 * (g // 4)] = (low_0 >> U32(16)) | (high_0 & ~_HALF)
        out32[at + 3 * (g // 4)] = (low_1 >> U32(16)) | (high_1 & ~_HALF)


@njit(nogil=True, inline="always")
def _store_plane(slots, shift, width, lane, planes):  # type: ignore[no-untyped-def]
    """Bits shift … shift + width − 1 of all slots → the ``width`` u32 of this lane."""
    mask = _BYTES * U32((1 << width) - 1)
    for word in range(width):
        u = U32(0)
        for place in range(8 // width):
            part = (slots[word * (8 // width) + place] >> U32(shift)) & mask
            u |= part << U32(place * width)
        planes[lane * width + word] = u


@njit(nogil=True, inline="always")
def _load_plane(planes, shift, width, lane, slots):  # type: ignore[no-untyped-def]
    """The inverse of :func:`_store_plane`, or-ed into ``slots``."""
    mask = _BYTES * U32((1 << width) - 1)
    for word in range(width):
        u = planes[lane * width + word]
        for place in range(8 // width):
            part = (u >> U32(place * width)) & mask
            slots[word * (8 // width) + place] |= part << U32(shift)


# In the functions below g and the plane widths are branched on, not passed on: as constants they let the compiler
# unroll the loops above, which makes a tile 1.6 to 2 times as fast.


@kernel
def pack_planes(line, codes_per_symbol, raw_bits, lane, slots, planes):  # type: ignore[no-untyped-def]
    """Write a padded row's raw bits into its group's planes.

    ``planes`` u32 [chunks, 32·raw_bits]: the group's part of FORMAT.md §7.4; ``lane`` is the lane in the group;
    ``slots`` u32 [8] is scratch.
    """
    narrow_bits = raw_bits & 7
    for chunk in range(planes.shape[0]):
        base = chunk * CHUNK_COLS
        at = 0  # the plane's first u32 in this chunk
        for shift in range(raw_bits - 8, -1, -8):  # whole bytes: wide elements only, so g is 1
            for slot in range(SLOTS):
                u = U32(0)
                for t in range(4):
                    u |= (U32(line[base + 4 * slot + t] >> shift) & U32(0xFF)) << U32(8 * t)
                planes[chunk, at + (slot // 4) * 4 * GROUP_LANES + lane * 4 + slot % 4] = u
            at += 8 * GROUP_LANES
        if codes_per_symbol == 1:
            _gather(line, base, 1, slots)
        elif codes_per_symbol == 2:
            _gather(line, base, 2, slots)
        elif codes_per_symbol == 8:
            _gather(line, base, 8, slots)
        else:
            _gather(line, base, 4, slots)
        if narrow_bits & 4:
            _store_plane(slots, narrow_bits & 3, 4, lane, planes[chunk, at:])
            at += 4 * GROUP_LANES
        if narrow_bits & 2:
            _store_plane(slots, narrow_bits & 1, 2, lane, planes[chunk, at:])
            at += 2 * GROUP_LANES
        if narrow_bits & 1:
            _store_plane(slots, 0, 1, lane, planes[chunk, at:])


@njit(nogil=True, inline="always")
def _load_narrow_planes(planes, narrow_bits, lane, slots, above):  # type: ignore[no-untyped-def]
    """All planes of fewer than 8 bits of one lane and chunk, into ``slots``, with ``above`` in the bits above them."""
    at = 0
    for slot in range(SLOTS):
        slots[slot] = above
    if narrow_bits & 4:
        _load_plane(planes, narrow_bits & 3, 4, lane, slots)
        at += 4 * GROUP_LANES
    if narrow_bits & 2:
        _load_plane(planes[at:], narrow_bits & 1, 2, lane, slots)
        at += 2 * GROUP_LANES
    if narrow_bits & 1:
        _load_plane(planes[at:], 0, 1, lane, slots)


@njit(nogil=True, inline="always")
def _four_symbols(symbols, step):  # type: ignore[no-untyped-def]
    """Four symbols in the bytes of a u32."""
    low = U32(symbols[step]) | (U32(symbols[step + 1]) << U32(8))
    return low | (U32(symbols[step + 2]) << U32(16)) | (U32(symbols[step + 3]) << U32(24))


@njit(nogil=True, inline="always")
def _join_codes(symbols, first, code_bits, g, raw_bits, slots):  # type: ignore[no-untyped-def]
    """Put the codes of a chunk (symbols from ``first``) above the raw bits in ``slots``."""
    code_mask = _BYTES * U32((1 << code_bits) - 1)
    for quad in range(SLOTS // g):
        four = _four_symbols(symbols, first + 4 * quad)
        for code in range(g):
            slots[g * quad + code] |= ((four >> U32(code_bits * code)) & code_mask) << U32(raw_bits)


@njit(nogil=True, inline="always")
def _join_folded(symbols, first, code_bits, g, raw_bits, slots):  # type: ignore[no-untyped-def]
    """The same for folded codes (the inverse of :func:`fold_row`) in ``slots`` that have a sign bit of 1 above."""
    ones = U32((1 << code_bits) - 1)
    code_mask = _BYTES * ones
    for quad in range(SLOTS // g):
        four = _four_symbols(symbols, first + 4 * quad)
        for code in range(g):
            u = slots[g * quad + code]
            folded = (u >> U32(raw_bits - 1)) & _BYTES
            if code_bits > 1:
                folded *= ones  # no product of a byte leaves it
            codes = (four >> U32(code_bits * code)) & code_mask
            slots[g * quad + code] = u ^ ((codes ^ folded) << U32(raw_bits))


@kernel
def join_narrow(symbols, planes, lane, layout, slots, out):  # type: ignore[no-untyped-def]
    """Put the elements of one lane together: u8 ``symbols`` [steps], the group's ``planes`` → u8 ``out``.

    ``layout`` is ``Layout.parameters``; ``slots`` u32 [8] is scratch; ``out`` has whole chunks.
    """
    code_bits, g, raw_bits, folded = layout
    out32 = out.view(np.uint32)
    sign = _BYTES * U32(1 << (code_bits + raw_bits - 1)) if folded else U32(0)
    for chunk in range(out.shape[0] // CHUNK_COLS):
        base = chunk * CHUNK_COLS
        _load_narrow_planes(planes[chunk], raw_bits, lane, slots, sign)
        if g == 8:
            _join_folded(symbols, base // 8, 1, 8, raw_bits, slots)
            _scatter_quads(slots, base, 8, out32)
        elif g == 4:
            if not folded:
                _join_codes(symbols, base // 4, 2, 4, raw_bits, slots)
            elif code_bits == 2:
                _join_folded(symbols, base // 4, 2, 4, raw_bits, slots)
            else:
                _join_folded(symbols, base // 4, 1, 4, raw_bits, slots)
            _scatter_quads(slots, base, 4, out32)
        elif g == 2:
            if folded:
                _join_folded(symbols, base // 2, code_bits, 2, raw_bits, slots)
            elif code_bits == 4:
                _join_codes(symbols, base // 2, 4, 2, raw_bits, slots)
            else:
                _join_codes(symbols, base // 2, code_bits, 2, raw_bits, slots)
            _scatter(slots, base, 2, out)
        else:
            if folded:
                _join_folded(symbols, base, code_bits, 1, raw_bits, slots)
            else:
                _join_codes(symbols, base, code_bits, 1, raw_bits, slots)
            for slot in range(SLOTS):
                out32[base // 4 + slot] = slots[slot]


@kernel
def join_wide(symbols, planes, lane, raw_bits, slots, out):  # type: ignore[no-untyped-def]
    """The same for elements of 16 or 32 bits (one code a symbol): ``out`` u32, whole chunks."""
    narrow_bits = raw_bits & 7
    for chunk in range(out.shape[0] // CHUNK_COLS):
        base = chunk * CHUNK_COLS
        at = 32 * (raw_bits - narrow_bits)
        _load_narrow_planes(planes[chunk, at:], narrow_bits, lane, slots, U32(0))
        for slot in range(SLOTS):
            for t in range(4):
                col = base + 4 * slot + t
                low = (slots[slot] >> U32(8 * t)) & U32(0xFF)
                out[col] = (U32(symbols[col]) << U32(raw_bits)) | low
        at = 0
        for shift in range(raw_bits - 8, -1, -8):
            for slot in range(SLOTS):
                u = planes[chunk, at + (slot // 4) * 4 * GROUP_LANES + lane * 4 + slot % 4]
                for t in range(4):
                    out[base + 4 * slot + t] |= ((u >> U32(8 * t)) & U32(0xFF)) << U32(shift)
            at += 8 * GROUP_LANES


@kernel
def undo_predictor(half, line):  # type: ignore[no-untyped-def]
    """uᵢ = (dᵢ + uᵢ₋₁ − 2^(n−1)) mod 2ⁿ along a lane, in place."""
    mask = 2 * half - 1
    for col in range(1, line.shape[0]):
        line[col] = (np.int64(line[col]) + np.int64(line[col - 1]) - half) & mask


@kernel
def pack_bits(elements, bits, out):  # type: ignore[no-untyped-def]
    """Mode raw: all elements [R, K] one after another, ``bits`` each, lowest bit first, into u8 ``out``."""
    buffer, held, at = np.uint64(0), np.uint64(0), 0
    step = np.uint64(bits)
    for row in range(elements.shape[0]):
        for col in range(elements.shape[1]):
            buffer |= np.uint64(elements[row, col]) << held
            held += step
            while held >= np.uint64(8):
                out[at] = np.uint8(buffer)
                buffer >>= np.uint64(8)
                held -= np.uint64(8)
                at += 1
    if held:
        out[at] = np.uint8(buffer)


@kernel
def unpack_bits(data, bits, out):  # type: ignore[no-untyped-def]
    """The inverse of :func:`pack_bits` into ``out`` [R, K]."""
    buffer, held, at = np.uint64(0), np.uint64(0), 0
    step = np.uint64(bits)
    mask = (np.uint64(1) << step) - np.uint64(1)
    for row in range(out.shape[0]):
        for col in range(out.shape[1]):
            while held < step:
                buffer |= np.uint64(data[at]) << held
                held += np.uint64(8)
                at += 1
            out[row, col] = buffer & mask
            buffer >>= step
            held -= step
