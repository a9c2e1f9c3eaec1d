"""Pages of a KV cache: 64 tokens of keys or values, and where in them each element lies (docs/KV.md).

A page holds K or V of :data:`PAGE_TOKENS` tokens for all KV heads of a layer, a *block* for each head. A block is what
a warp multiplies, in the order in which the operands of ``mma.m16n8k16`` take it: what a lane loads is its own, so
that nothing is moved between lanes. It consists of head_dim / 16 *groups* of 16 dimensions × 64 tokens, with scales in
front::

    K block   group 0: [16 scales][16 centers, widths 4, 3, 2][payload]  group 1: …
    V block   [64 scales]  group 0: [payload]  group 1: …

Rows of a group are tokens for K and dimensions for V; columns the other. Of the 16 × 16 elements of a slice s (16
tokens), lane 4·g + c holds eight, as four pairs r; a pair lies in one register, its first element in the lower half::

    row     g + 8·(r & 1)                        tokens for K: 16·s + row;   dimensions for V: 16·group + row
    column  2·c + 8·(r >> 1), and the next one   dimensions for K: 16·group + column;   tokens for V: 16·s + column

So a lane has 16 pairs i = 4·s + r of a group. Their codes, of the lower and the upper half of a word of 32 bits alike::

    16 bits  word i            the pair
    8        word i / 2        bytes 0, 1 (i even) or 2, 3 (i odd): first, second
    4        word i / 4        bits 4·(i % 4) … of each half
    3        word i / 5        bits 3·(i % 5) … of each half; of pair 15: bit k in bit 15 of word k's halves
    2        word i / 8        bits 2·(i % 8) … of each half

Words lie in memory as lanes load them: up to four words of a lane side by side (``words_per_load``), then the next
lane's; 3-bit words one after another.

Scales and centers are fp16. Of K they belong to dimensions, 2·c, 2·c + 1, 2·c + 8, 2·c + 9 of each c in turn; of V to
tokens, 16·s + 8·h + g at place 8·g + 2·s + h.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from functools import cache

import numpy as np
import numpy.typing as npt

from kvpack.errors import PageError

PAGE_TOKENS = 64
GROUP_DIMS = 16
MAX_HEAD_DIM = 256
WARP_LANES = 32
PAIRS = 16  # of a lane and group
SCALE_BYTES = 2


class Side(IntEnum):
    """Keys or values."""

    K = 0
    V = 1


class PageFormat(IntEnum):
    """What a page holds. The number stands in the low bits of a page table's entry."""

    FP16 = 0
    BF16 = 1
    INT8 = 2
    INT4 = 3
    INT3 = 4
    INT2 = 5
    FP8_E4M3 = 6
    FP8_E5M2 = 7

    @property
    def element_bits(self) -> int:
        return _ELEMENT_BITS[self]

    @property
    def is_integer(self) -> bool:
        return PageFormat.INT8 <= self <= PageFormat.INT2

    @property
    def is_quantized(self) -> bool:
        return self >= PageFormat.INT8


_ELEMENT_BITS = (16, 16, 8, 4, 3, 2, 8, 8)
# Entries of page tables: where a page begins, a multiple of 16, and its format in the low bits.
ENTRY_FORMAT_BITS = 4
ENTRY_FORMAT_MASK = (1 << ENTRY_FORMAT_BITS) - 1
INTEGER_FORMATS = {8: PageFormat.INT8, 4: PageFormat.INT4, 3: PageFormat.INT3, 2: PageFormat.INT2}


@dataclass(frozen=True)
class PageLayout:
    """Sizes of the pages of one side, format and head dimension.

    Raises:
        PageError: head_dim is not a multiple of 16, or above 256.

    >>> PageLayout(Side.K, PageFormat.INT4, 128).block_bytes
    4608
    """

    side: Side
    format: PageFormat
    head_dim: int

    def __post_init__(self) -> None:
        if self.head_dim % GROUP_DIMS or not 0 < self.head_dim <= MAX_HEAD_DIM:
            raise PageError(f"head_dim is {self.head_dim}; pages hold multiples of {GROUP_DIMS} up to {MAX_HEAD_DIM}")

    @property
    def groups(self) -> int:
        """Groups of a block."""
        return self.head_dim // GROUP_DIMS

    @property
    def has_centers(self) -> bool:
        """Whether a dimension's values lie around a center of their own, not around 0."""
        return self.side == Side.K and self.format in (PageFormat.INT4, PageFormat.INT3, PageFormat.INT2)

    @property
    def is_mid_rise(self) -> bool:
        """Whether levels lie at odd multiples of half a scale, so that narrow codes waste none of them."""
        return self.side == Side.V and self.format in (PageFormat.INT4, PageFormat.INT3, PageFormat.INT2)

    @property
    def group_header_bytes(self) -> int:
        """Scales and centers in front of each group."""
        if self.side == Side.V or not self.format.is_quantized:
            return 0
        return GROUP_DIMS * SCALE_BYTES * (1 + self.has_centers)

    @property
    def block_header_bytes(self) -> int:
        """Scales in front of a block."""
        return PAGE_TOKENS * SCALE_BYTES if self.side == Side.V and self.format.is_quantized else 0

    @property
    def payload_bytes(self) -> int:
        """Codes of a group."""
        return GROUP_DIMS * PAGE_TOKENS * self.format.element_bits // 8

    @property
    def group_bytes(self) -> int:
        return self.group_header_bytes + self.payload_bytes

    @property
    def block_bytes(self) -> int:
        """One head's part of a page."""
        return self.block_header_bytes + self.groups * self.group_bytes

    @property
    def words_per_lane(self) -> int:
        """Words of 32 bits that a lane has of a group."""
        return self.format.element_bits

    @property
    def words_per_load(self) -> int:
        return 1 if self.format == PageFormat.INT3 else min(4, self.words_per_lane)

    @property
    def bits_per_element(self) -> float:
        """Everything counted."""
        return 8 * self.block_bytes / (PAGE_TOKENS * self.head_dim)


def _element_places() -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """(row in a slice + 16·slice or row, …): for K token and dimension of [lane, pair, element] in a group."""
    lane, pair, element = np.ogrid[:WARP_LANES, :PAIRS, :2]
    g, c, s, r = lane // 4, lane % 4, pair // 4, pair % 4
    row, column = g + 8 * (r & 1), 2 * c + 8 * (r >> 1) + element
    return row + 16 * s + 0 * column, column + 0 * row


@cache
def element_index(side: Side) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """(token, dimension in the group) of each element [lane, pair, half] of a group; both [32, 16, 2]."""
    row_of_slice, column = _element_places()
    slices = row_of_slice // 16 * 16
    if side == Side.K:
        return row_of_slice, column
    return slices + column, row_of_slice % 16


@cache
def element_places(side: Side) -> npt.NDArray[np.intp]:
    """The inverse: where the elements [token, dimension] of a group lie in the order of lanes, pairs and halves."""
    token, dim = element_index(side)
    return np.argsort((token * GROUP_DIMS + dim).reshape(-1))


@cache
def scale_index(side: Side) -> npt.NDArray[np.int_]:
    """The dimension of a group's (K, [16]) or the token of a block's (V, [64]) scales, in their order."""
    if side == Side.K:
        c, i = np.mgrid[:4, :4]
        places = 2 * c + 8 * (i >> 1) + (i & 1)
    else:
        g, s, h = np.mgrid[:8, :4, :2]
        places = 16 * s + 8 * h + g
    return np.asarray(places).reshape(-1)


@cache
def code_shifts(bits: int) -> npt.NDArray[np.uint32]:
    """Where the codes of a word's pairs begin, in bits: [pair, half]."""
    step, half = (16, 8) if bits == 8 else (bits, 16)
    return np.array([[pair * step, pair * step + half] for pair in range(16 // bits)], np.uint32)


def pack_codes(codes: npt.NDArray[np.unsignedinteger], layout: PageLayout) -> npt.NDArray[np.uint8]:
    """Codes [..., 64 tokens, head_dim] of ``element_bits`` bits → payloads u8 [..., groups, payload_bytes]."""
    token, dim = element_index(layout.side)
    grouped = codes.reshape(*codes.shape[:-1], layout.groups, GROUP_DIMS)
    pairs = np.moveaxis(grouped, -2, -3)[..., token, dim].astype(np.uint32)  # [..., groups, lane, pair, half]
    bits, lead = layout.format.element_bits, pairs.shape[:-3]
    shifts = code_shifts(bits)
    whole = PAIRS // len(shifts) * len(shifts)
    shifted = pairs[..., :whole, :].reshape(*lead, WARP_LANES, -1, shifts.size) << shifts.reshape(-1)
    words = np.bitwise_or.reduce(shifted, axis=-1)
    if whole < PAIRS:  # of 3 bits: the last pair lies in what the others leave of their words, a bit in each
        first, second = pairs[..., -1, :1], pairs[..., -1, 1:]
        bit = np.arange(bits, dtype=np.uint32)
        words |= (first >> bit & 1) << 15 | (second >> bit & 1) << 31
    loads = words.reshape(*lead, WARP_LANES, -1, layout.words_per_load)
    ordered = np.ascontiguousarray(np.swapaxes(loads, -3, -2), dtype="<u4")
    return ordered.reshape(*lead, -1).view(np.uint8)


def unpack_codes(payload: npt.NDArray[np.uint8], layout: PageLayout) -> npt.NDArray[np.uint16]:
    """The inverse of :func:`pack_codes`: u16 [..., 64, head_dim]."""
    bits, lead = layout.format.element_bits, payload.shape[:-1]
    words = np.ascontiguousarray(payload).view("<u4")
    loads = words.reshape(*lead, -1, WARP_LANES, layout.words_per_load)
    words = np.swapaxes(loads, -3, -2).reshape(*lead, WARP_LANES, -1)
    shifts = code_shifts(bits)
    pairs = (words[..., None, None] >> shifts & ((1 << bits) - 1)).reshape(*lead, WARP_LANES, -1, 2)
    if pairs.shape[-2] < PAIRS:
        halves = words[..., None] >> np.array([15, 31], np.uint32) & 1
        last = np.bitwise_or.reduce(halves << np.arange(bits, dtype=np.uint32)[:, None], axis=-2)
        pairs = np.concatenate([pairs, last[..., None, :]], axis=-2)
    flat = pairs.reshape(*lead, -1).astype(np.uint16)
    groups = flat.take(element_places(layout.side), axis=-1).reshape(*lead, PAGE_TOKENS, GROUP_DIMS)
    return np.moveaxis(groups, -3, -2).reshape(*lead[:-1], PAGE_TOKENS, layout.head_dim)


@dataclass(frozen=True)
class BlockParts:
    """A block taken apart: ``payload`` u8 [..., groups, payload_bytes]; ``scales`` and ``centers`` fp16 in the order of
    dimensions (K, [..., head_dim]) or tokens (V, [..., 64]); empty where there are none."""

    payload: npt.NDArray[np.uint8]
    scales: npt.NDArray[np.float16]
    centers: npt.NDArray[np.float16]


def join_block(parts: BlockParts, layout: PageLayout) -> npt.NDArray[np.uint8]:
    """Parts → blocks u8 [..., block_bytes]."""
    lead = parts.payload.shape[:-2]
    order = scale_index(layout.side)
    if layout.side == Side.V:
        flat = parts.payload.reshape(*lead, -1)
        if not layout.format.is_quantized:
            return np.ascontiguousarray(flat)
        scales = np.ascontiguousarray(parts.scales[..., order]).view(np.uint8)
        return np.concatenate([scales, flat], axis=-1)
    pieces = [
        np.ascontiguousarray(found.reshape(*lead, layout.groups, GROUP_DIMS)[..., order]).view(np.uint8)
        for found in (parts.scales, parts.centers)
        if found.shape[-1]
    ]
    return np.concatenate([*pieces, parts.payload], axis=-1).reshape(*lead, -1)


def split_block(blocks: npt.NDArray[np.uint8], layout: PageLayout) -> BlockParts:
    """Blocks u8 [..., block_bytes] → parts."""
    lead = blocks.shape[:-1]
    head, none = layout.block_header_bytes, np.empty((*lead, 0), np.float16)
    groups = blocks[..., head:].reshape(*lead, layout.groups, layout.group_bytes)
    payload = groups[..., layout.group_header_bytes :]
    if not layout.format.is_quantized:
        return BlockParts(payload, none, none)
    order = scale_index(layout.side)
    if layout.side == Side.V:
        stored = np.ascontiguousarray(blocks[..., :head]).view(np.float16)
        scales = np.empty_like(stored)
        scales[..., order] = stored
        return BlockParts(payload, scales, none)
    found = []
    for first in range(0, layout.group_header_bytes, GROUP_DIMS * SCALE_BYTES):
        stored = np.ascontiguousarray(groups[..., first : first + GROUP_DIMS * SCALE_BYTES]).view(np.float16)
        ordered = np.empty_like(stored)
        ordered[..., order] = stored
        found.append(ordered.reshape(*lead, -1))
    return BlockParts(payload, found[0], found[1] if len(found) > 1 else none)
