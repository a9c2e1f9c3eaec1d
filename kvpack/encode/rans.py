"""The rANS coder of docs/FORMAT.md §5 on the CPU: u32 states, u16 words, 12-bit probabilities.

Three surprises, in the manner of Giesen's ryg_rans: encoding runs backwards over the symbols; words come out in
the reverse of the order in which they are read; and lanes are independent, so that four of them are coded side by
side only to keep the processor busy, not because the format asks for it.

The division x div f of the encoder is a multiplication: with r = ceil(2^44 / f) = (2^44 + e) / f, 0 ≤ e < f, the error
x·e / (f·2^44) stays below 1/f as x < 2^32 and e < 2^12, and x·r stays below 2^64 because x < f·2^20 after a
refill and e·f < 2^24. Reference: Duda, arXiv:1311.2540; Giesen, arXiv:1402.3392.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

from kvpack.encode.jit import kernel
from kvpack.format.layout import FREQUENCY_SUM, NUM_SYMBOLS, PROBABILITY_BITS, STATE_LOW
from kvpack.format.tables import Frequencies

_RECIPROCAL_BITS = 44

U64 = np.uint64
U32 = np.uint32
_LOW = U64(STATE_LOW)
_LOW32 = U32(STATE_LOW)
_SUM = U64(FREQUENCY_SUM)
_REFILL_SHIFT = U64(32 - PROBABILITY_BITS)
_RECIPROCAL_SHIFT = U64(_RECIPROCAL_BITS)
_SLOT_MASK = U32(FREQUENCY_SUM - 1)
_PROBABILITY_BITS = U32(PROBABILITY_BITS)


class EncoderTable(NamedTuple):
    """What the encoder looks up for a symbol; u64 [256] each, frequencies 0 for symbols that cannot occur."""

    reciprocal: npt.NDArray[np.uint64]
    frequency: npt.NDArray[np.uint64]
    start: npt.NDArray[np.uint64]


def encoder_table(frequencies: Frequencies) -> EncoderTable:
    """Reciprocals, frequencies and starts of a table."""
    frequency = frequencies.astype(np.uint64)
    start = np.cumsum(frequency) - frequency
    divisor = np.maximum(frequency, 1)
    reciprocal = ((1 << _RECIPROCAL_BITS) + divisor - 1) // divisor
    return EncoderTable(reciprocal, frequency, start)


def decoder_table(frequencies: Frequencies) -> npt.NDArray[np.uint32]:
    """The 4096-entry look-up table of a decoder.

    ::

        bit   31 .. 20      19 .. 8          7 .. 0
              frequency     slot − start     symbol

    A frequency has 12 bits, hence 4096 (a single symbol) cannot be expressed; such tiles are constant.
    """
    symbols = np.repeat(np.arange(NUM_SYMBOLS, dtype=np.uint32), frequencies)
    starts = np.cumsum(frequencies, dtype=np.uint32) - frequencies
    slots = np.arange(FREQUENCY_SUM, dtype=np.uint32)
    table = frequencies[symbols].astype(np.uint32) << 20
    table |= (slots - starts[symbols].astype(np.uint32)) << 8
    table |= symbols
    return np.asarray(table, np.uint32)


@njit(nogil=True, inline="always")
def _put(x, symbol, table, words, lane, at):  # type: ignore[no-untyped-def]
    """Encode one symbol: the new state and where the lane's next word goes (words fill backwards)."""
    frequency = table.frequency[symbol]
    refill = U64(x >= (frequency << _REFILL_SHIFT))
    words[lane, at - 1] = np.uint16(x)  # overwritten unless at moves
    at -= np.int64(refill)
    x >>= refill << U64(4)
    quotient = (x * table.reciprocal[symbol]) >> _RECIPROCAL_SHIFT
    return x + table.start[symbol] + quotient * (_SUM - frequency), at


@kernel
def encode_lanes(symbols, table, words, states, lengths):  # type: ignore[no-untyped-def]
    """Encode u8 ``symbols`` [lanes, steps]; lanes is a multiple of 4.

    Lane l's words end up in ``words[l, -lengths[l]:]`` (u16 [lanes, > steps]) in reading order, its initial
    state in ``states[l]``. One column more than there are steps is needed: the word that is not emitted is
    written too.
    """
    lanes, steps = symbols.shape
    end = words.shape[1]
    for lane in range(0, lanes, 4):
        x0 = x1 = x2 = x3 = _LOW
        at0 = at1 = at2 = at3 = end
        for step in range(steps - 1, -1, -1):
            x0, at0 = _put(x0, symbols[lane, step], table, words, lane, at0)
            x1, at1 = _put(x1, symbols[lane + 1, step], table, words, lane + 1, at1)
            x2, at2 = _put(x2, symbols[lane + 2, step], table, words, lane + 2, at2)
            x3, at3 = _put(x3, symbols[lane + 3, step], table, words, lane + 3, at3)
        states[lane], states[lane + 1], states[lane + 2], states[lane + 3] = x0, x1, x2, x3
        lengths[lane], lengths[lane + 1] = end - at0, end - at1
        lengths[lane + 2], lengths[lane + 3] = end - at2, end - at3


@njit(nogil=True, inline="always")
def _get(x, at, table, words):  # type: ignore[no-untyped-def]
    """Decode one symbol: the new state, the index of the next word, the symbol."""
    entry = table[x & _SLOT_MASK]
    x = (entry >> U32(20)) * (x >> _PROBABILITY_BITS) + ((entry >> U32(8)) & _SLOT_MASK)
    # Arithmetic instead of a choice: as a choice it may become a branch, which is mispredicted every third time.
    refill = U32(x < _LOW32)
    word = U32(words[at]) & (U32(0) - refill)
    return (U32(x) << (refill << U32(4))) | word, at + np.int64(refill), np.uint8(entry)


@kernel
def decode_lanes(states, first_words, words, table, symbols):  # type: ignore[no-untyped-def]
    """Decode into u8 ``symbols`` [lanes, steps]; returns the first lane that ends wrongly, or −1.

    Lane l's words are ``words[first_words[l] : first_words[l + 1]]``. ``words`` u16 must hold at least steps + 1 more
    behind the last one, of any value: a step reads at most one word and one is looked at ahead. lanes is a
    multiple of 4.
    """
    lanes, steps = symbols.shape
    bad = -1
    for lane in range(0, lanes, 4):
        x0, x1, x2, x3 = states[lane], states[lane + 1], states[lane + 2], states[lane + 3]
        at0, at1 = first_words[lane], first_words[lane + 1]
        at2, at3 = first_words[lane + 2], first_words[lane + 3]
        for step in range(steps):
            x0, at0, symbols[lane, step] = _get(x0, at0, table, words)
            x1, at1, symbols[lane + 1, step] = _get(x1, at1, table, words)
            x2, at2, symbols[lane + 2, step] = _get(x2, at2, table, words)
            x3, at3, symbols[lane + 3, step] = _get(x3, at3, table, words)
        # The ends are read here and not kept above: four more live registers halve the speed of the loop.
        if bad < 0:
            if x0 != _LOW32 or at0 != first_words[lane + 1]:
                bad = lane
            elif x1 != _LOW32 or at1 != first_words[lane + 2]:
                bad = lane + 1
            elif x2 != _LOW32 or at2 != first_words[lane + 3]:
                bad = lane + 2
            elif x3 != _LOW32 or at3 != first_words[lane + 4]:
                bad = lane + 3
    return bad
