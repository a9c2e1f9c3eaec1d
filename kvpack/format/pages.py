"""Pages of a KV cache: 64 tokens of keys or values, and where in them each element lies (docs/KV.md).

A page holds K or V of :data:`PAGE_TOKENS` tokens for all KV heads of a layer, a *block* for each head. A block is what
a warp multiplies, in the order in which the operands of ``mma.m16n8k16`` take it: what a lane loads is its own, so
that nothing is moved between lanes. It consists of head_dim / 16 *groups* of 16 dimensions × 64 tokens, with scales and
centers in front::

    K block   group 0: [16 scales][16 centers][payload]  group 1: …
    V block   [64 scales][64 centers, not of fp8]  group 0: [payload]  group 1: …

Groups of K lie in the order of ``key_order``: those whose dimensions need the most bits first. The first ones
(:attr:`PageLayout.wide_groups`) are wide: at widths 4, 3 and 2 they have 5, 4 and 3 bits, the others 3, 2 and 2. Groups
of V lie in the order of their dimensions.

Rows of a group are tokens for K and dimensions for V; columns the other. Of the 16 × 16 elements of a slice s (16
tokens), lane 4·g + c holds eight, as four pairs r; a pair lies in one register, its first element in the lower half::

    row     g + 8·(r & 1)                        tokens for K: 16·s + row;   dimensions for V: 16·group + row
    column  2·c + 8·(r >> 1), and the next one   dimensions for K: 16·group + column;   tokens for V: 16·s + column

So a lane has 16 pairs i = 4·s + r of a group. Their codes, of the lower and the upper half of a word of 32 bits alike::

    16 bits  word i            the pair
    8        word i / 2        bytes 0, 1 (i even) or 2, 3 (i odd): first, second
    5        word i / 3        bits 5·(i % 3) … of each half; of pair 15: bit k in bit 15 of word k's halves
    4        word i / 4        bits 4·(i % 4) … of each half
    3        word i / 5        bits 3·(i % 5) … of each half; of pair 15: bit k in bit 15 of word k's halves
    2        word i / 8        bits 2·(i % 8) … of each half

Words lie in memory as lanes load them (:data:`LOADS`): up to four words of a lane side by side, then the next lane's;
of 5 bits the first four and then the last, of 3 bits the first two and then the last.

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
from kvpack.format.layout import ceil_div

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
        """Bits of a code; of K's integers a name for their two widths (:meth:`PageLayout.bits_of`)."""
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


# Bits of K's wide groups and of its others.
_KEY_BITS = {PageFormat.INT4: (5, 3), PageFormat.INT3: (4, 2), PageFormat.INT2: (3, 2)}
MAX_GROUPS = MAX_HEAD_DIM // GROUP_DIMS


@cache
def half_split_order(head_dim: int) -> tuple[int, ...]:
    """Groups of dimensions, those first that RoPE turns slowest: where it turns dimension d together with
    d + head_dim / 2, as in Llama, Qwen, Mistral and Gemma. Slow dimensions say most of what a token is about.

    >>> half_split_order(128)
    (3, 7, 2, 6, 1, 5, 0, 4)
    """
    half = head_dim // 2
    speed = [sum(d % half for d in range(GROUP_DIMS * g, GROUP_DIMS * (g + 1))) for g in range(head_dim // GROUP_DIMS)]
    return tuple(sorted(range(len(speed)), key=lambda group: (-speed[group], group)))


@dataclass(frozen=True)
class PageLayout:
    """Sizes of the pages of one side, format and head dimension.

    Attributes:
        key_order: the groups of K in the order in which they lie; empty: :func:`half_split_order`.

    Raises:
        PageError: head_dim is not a multiple of 16, or above 256; an order that does not have each group once.

    >>> PageLayout(Side.K, PageFormat.INT4, 128).block_bytes
    4608
    """

    side: Side
    format: PageFormat
    head_dim: int
    key_order: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.head_dim % GROUP_DIMS or not 0 < self.head_dim <= MAX_HEAD_DIM:
            raise PageError(f"head_dim is {self.head_dim}; pages hold multiples of {GROUP_DIMS} up to {MAX_HEAD_DIM}")
        if self.key_order and sorted(self.key_order) != list(range(self.groups)):
            raise PageError(f"key_order is {self.key_order}; each of the groups 0 to {self.groups - 1} is wanted once")

    @property
    def groups(self) -> int:
        """Groups of a block."""
        return self.head_dim // GROUP_DIMS

    @property
    def group_order(self) -> tuple[int, ...]:
        """The groups of dimensions in the order in which they lie."""
        if self.side == Side.V:
            return tuple(range(self.groups))
        return self.key_order or half_split_order(self.head_dim)

    @property
    def wide_groups(self) -> int:
        """How many of K's groups, the first ones, have the larger width: half of them, and an even number if there is
        an even number of groups, so that two groups at a time are alike."""
        half = ceil_div(self.groups, 2)
        return half if self.groups % 2 else half + half % 2

    @property
    def has_centers(self) -> bool:
        """Whether a column's values lie around a center of their own, not around 0."""
        return self.format.is_quantized and (self.side == Side.K or self.format.is_integer)

    def bits_of(self, place: int) -> int:
        """Bits of an element of the group at a place."""
        if self.side == Side.V or self.format not in _KEY_BITS:
            return self.format.element_bits
        return _KEY_BITS[self.format][place >= self.wide_groups]

    @property
    def parts(self) -> list[tuple[slice, int]]:
        """Places of groups of one width, and that width."""
        wide = self.wide_groups
        if self.bits_of(0) == self.bits_of(self.groups - 1):
            return [(slice(0, self.groups), self.bits_of(0))]
        return [(slice(0, wide), self.bits_of(0)), (slice(wide, self.groups), self.bits_of(wide))]

    @property
    def group_header_bytes(self) -> int:
        """Scales and centers in front of each group."""
        if self.side == Side.V or not self.format.is_quantized:
            return 0
        return GROUP_DIMS * SCALE_BYTES * 2

    @property
    def block_header_bytes(self) -> int:
        """Scales and centers in front of a block."""
        if self.side == Side.K or not self.format.is_quantized:
            return 0
        return PAGE_TOKENS * SCALE_BYTES * (1 + self.has_centers)

    def group_bytes(self, place: int) -> int:
        """Of the group at a place, its scales and centers with it."""
        return self.group_header_bytes + payload_bytes(self.bits_of(place))

    def group_start(self, place: int) -> int:
        """Where the group at a place, or the block's end, lies in a block."""
        return self.block_header_bytes + sum(self.group_bytes(before) for before in range(place))

    def places_bytes(self, first: int, count: int) -> int:
        """Of so many groups from a place on, or as many as there are; the block's header with the first one."""
        begin = self.group_start(first) if first else 0
        return self.group_start(min(first + count, self.groups)) - begin

    @property
    def block_bytes(self) -> int:
        """One head's part of a page."""
        return self.group_start(self.groups)

    @property
    def bits_per_element(self) -> float:
        """Everything counted."""
        return 8 * self.block_bytes / (PAGE_TOKENS * self.head_dim)


def payload_bytes(bits: int) -> int:
    """Codes of a group."""
    return GROUP_DIMS * PAGE_TOKENS * bits // 8


# How many of the ``bits`` words that a lane has of a group it loads at once.
LOADS = {16: (4, 4, 4, 4), 8: (4, 4), 5: (4, 1), 4: (4,), 3: (2, 1), 2: (2,)}


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


def pack_codes(codes: npt.NDArray[np.unsignedinteger], side: Side, bits: int) -> npt.NDArray[np.uint8]:
    """Codes [..., 64 tokens, 16·groups] of ``bits`` bits → payloads u8 [..., groups, payload bytes]."""
    token, dim = element_index(side)
    grouped = codes.reshape(*codes.shape[:-1], -1, GROUP_DIMS)
    pairs = np.moveaxis(grouped, -2, -3)[..., token, dim].astype(np.uint32)  # [..., groups, lane, pair, half]
    lead = pairs.shape[:-3]
    shifts = code_shifts(bits)
    whole = PAIRS // len(shifts) * len(shifts)
    shifted = pairs[..., :whole, :].reshape(*lead, WARP_LANES, -1, shifts.size) << shifts.reshape(-1)
    words = np.bitwise_or.reduce(shifted, axis=-1)
    if whole < PAIRS:  # of 5 and 3 bits: the last pair lies in what the others leave of their words, a bit in each
        first, second = pairs[..., -1, :1], pairs[..., -1, 1:]
        bit = np.arange(bits, dtype=np.uint32)
        words |= (first >> bit & 1) << 15 | (second >> bit & 1) << 31
    words = words.reshape(*lead, WARP_LANES, bits)
    ends = np.cumsum(LOADS[bits])[:-1]
    loads = [load.reshape(*lead, -1) for load in np.split(words, ends, axis=-1)]
    return np.ascontiguousarray(np.concatenate(loads, axis=-1), dtype="<u4").view(np.uint8)


def unpack_codes(payload: npt.NDArray[np.uint8], side: Side, bits: int) -> npt.NDArray[np.uint16]:
    """The inverse of :func:`pack_codes`: u16 [..., 64, 16·groups]."""
    lead = payload.shape[:-1]
    words = np.ascontiguousarray(payload).view("<u4")
    loads = np.split(words, WARP_LANES * np.cumsum(LOADS[bits])[:-1], axis=-1)
    words = np.concatenate([load.reshape(*lead, WARP_LANES, -1) for load in loads], axis=-1)
    shifts = code_shifts(bits)
    pairs = (words[..., None, None] >> shifts & ((1 << bits) - 1)).reshape(*lead, WARP_LANES, -1, 2)
    if pairs.shape[-2] < PAIRS:
        halves = words[..., None] >> np.array([15, 31], np.uint32) & 1
        last = np.bitwise_or.reduce(halves << np.arange(bits, dtype=np.uint32)[:, None], axis=-2)
        pairs = np.concatenate([pairs, last[..., None, :]], axis=-2)
    flat = pairs.reshape(*lead, -1).astype(np.uint16)
    groups = flat.take(element_places(side), axis=-1).reshape(*lead, PAGE_TOKENS, GROUP_DIMS)
    return np.moveaxis(groups, -3, -2).reshape(*lead[:-1], PAGE_TOKENS, -1)


@dataclass(frozen=True)
class BlockParts:
    """A block taken apart: ``codes`` u8 (u16 of 16 bits) [..., 64, head_dim]; ``scales`` and ``centers`` fp16 of
    dimensions (K, [..., head_dim]) or tokens (V, [..., 64]); empty where there are none."""

    codes: npt.NDArray[np.unsignedinteger]
    scales: npt.NDArray[np.float16]
    centers: npt.NDArray[np.float16]


def _dims_as_they_lie(layout: PageLayout) -> npt.NDArray[np.intp]:
    """The dimensions of a block's groups, in their order."""
    order = np.array(layout.group_order)
    return (GROUP_DIMS * order[:, None] + np.arange(GROUP_DIMS)).reshape(-1)


def join_block(parts: BlockParts, layout: PageLayout) -> npt.NDArray[np.uint8]:
    """Parts → blocks u8 [..., block_bytes]."""
    lead, dims, order = parts.codes.shape[:-2], _dims_as_they_lie(layout), scale_index(layout.side)
    codes = parts.codes[..., dims]
    numbers = [found for found in (parts.scales, parts.centers) if found.shape[-1]]
    pieces = []
    if layout.side == Side.V:
        pieces += [np.ascontiguousarray(found[..., order]).view(np.uint8) for found in numbers]
    for places, bits in layout.parts:
        of_part = slice(GROUP_DIMS * places.start, GROUP_DIMS * places.stop)
        payload = pack_codes(codes[..., of_part], layout.side, bits)
        headers = [
            np.ascontiguousarray(found[..., dims[of_part]].reshape(*lead, -1, GROUP_DIMS)[..., order]).view(np.uint8)
            for found in numbers
            if layout.side == Side.K
        ]
        pieces.append(np.concatenate([*headers, payload], axis=-1).reshape(*lead, -1))
    return np.concatenate(pieces, axis=-1)


def split_block(blocks: npt.NDArray[np.uint8], layout: PageLayout) -> BlockParts:
    """Blocks u8 [..., block_bytes] → parts."""
    lead, dims, order = blocks.shape[:-1], _dims_as_they_lie(layout), scale_index(layout.side)
    count = layout.format.is_quantized * (1 + layout.has_centers)  # scales, and centers
    of_k, of_v = (layout.head_dim, 0) if layout.side == Side.K else (0, PAGE_TOKENS)
    numbers = [np.empty((*lead, (of_k + of_v) * (i < count)), np.float16) for i in range(2)]
    codes = np.empty((*lead, PAGE_TOKENS, layout.head_dim), np.uint16)

    def halves(stored: npt.NDArray[np.uint8]) -> npt.NDArray[np.float16]:
        return np.ascontiguousarray(stored).view(np.float16)

    if layout.side == Side.V:
        for i in range(count):
            stored = blocks[..., of_v * SCALE_BYTES * i : of_v * SCALE_BYTES * (i + 1)]
            numbers[i][..., order] = halves(stored)
    for places, bits in layout.parts:
        first, end = layout.group_start(places.start), layout.group_start(places.stop)
        groups = blocks[..., first:end].reshape(*lead, places.stop - places.start, -1)
        of_part = dims[GROUP_DIMS * places.start : GROUP_DIMS * places.stop]
        codes[..., of_part] = unpack_codes(groups[..., layout.group_header_bytes :], layout.side, bits)
        for i in range(count if layout.side == Side.K else 0):
            stored = groups[..., GROUP_DIMS * SCALE_BYTES * i : GROUP_DIMS * SCALE_BYTES * (i + 1)]
            numbers[i][..., of_part.reshape(-1, GROUP_DIMS)[:, order]] = halves(stored)
    return BlockParts(codes, numbers[0], numbers[1])
