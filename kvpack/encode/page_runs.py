"""Pages of a run ⇄ the elements of its parts (docs/FORMAT.md §9.6).

A part's elements are one sequence: layer by layer, in it head by head, in it dimension by dimension in the order in
which the page has them, and of a dimension the tokens of all of the layer's pages here, one after another. So what is
alike stands together: the numbers of a channel in the course of time.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from kvpack.encode.jit import kernel
from kvpack.encode.threads import map_ordered
from kvpack.format.layout import ElementKind
from kvpack.format.pages import (
    GROUP_DIMS,
    LOADS,
    PAGE_TOKENS,
    PAIRS,
    SCALE_BYTES,
    WARP_LANES,
    Side,
    code_shifts,
    element_index,
    scale_index,
)
from kvpack.format.snapshot import RunPart

Elements = npt.NDArray[Any]
Blocks = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int32]


@cache
def code_places(side: Side, bits: int) -> tuple[Ints, Ints]:
    """Word of a group's payload and bit in it of each code [dimension, token], i32 [16, 64] both.

    Codes whose bits lie in several words (the last pair of a lane, at 5 and 3 bits) have −1 − the lane for a word: bit
    k is then in the lane's word k.
    """
    token, dim = element_index(side)  # [lane, pair, half]
    lane, pair, half = np.meshgrid(range(WARP_LANES), range(PAIRS), range(2), indexing="ij")
    shifts = code_shifts(bits)
    held = len(shifts)  # pairs of a word
    split = pair >= PAIRS // held * held
    words = lane_words(bits)[lane, np.where(split, 0, pair // held)]
    word, shift = np.empty((2, GROUP_DIMS, PAGE_TOKENS), np.int32)
    word[dim, token] = np.where(split, -1 - lane, words)
    shift[dim, token] = np.where(split, 15 + 16 * half, shifts[pair % held, half])
    return word, shift


@cache
def lane_words(bits: int) -> Ints:
    """Where each lane's words lie in a group's payload: i32 [32, bits]."""
    places, first = [], 0
    for load in LOADS[bits]:
        places.append(first + load * np.arange(WARP_LANES)[:, None] + np.arange(load))
        first += load * WARP_LANES
    return np.concatenate(places, axis=1).astype(np.int32)


@kernel
def _unpack_codes(words, first, step, word, shift, own, bits, rotated, out, base, stride):  # type: ignore[no-untyped-def]
    """Codes of pages' groups → ``out``.

    Args:
        words: u32 [pages, heads, words of a block].
        first, step: word of the first group's payload, and words from one group to the next.
        word, shift, own: :func:`code_places`, :func:`lane_words`.
        bits, rotated: of a code; rotated by one to the left (floats).
        out, base, stride: where dimension d of page i, head h begins: base[i] + (h · dimensions + d) · stride[i].
    """
    mask = np.uint32((1 << bits) - 1)
    heads = words.shape[1]
    groups = out.shape[0] // (words.shape[0] * heads * GROUP_DIMS * PAGE_TOKENS)
    for page in range(words.shape[0]):
        for head in range(heads):
            block = words[page, head]
            for group in range(groups):
                payload = first + group * step
                for dim in range(GROUP_DIMS):
                    at = base[page] + ((head * groups + group) * GROUP_DIMS + dim) * stride[page]
                    for token in range(PAGE_TOKENS):
                        place = word[dim, token]
                        if place >= 0:
                            code = (block[payload + place] >> np.uint32(shift[dim, token])) & mask
                        else:
                            code = np.uint32(0)
                            for bit in range(bits):
                                found = block[payload + own[-1 - place, bit]] >> np.uint32(shift[dim, token])
                                code |= (found & np.uint32(1)) << np.uint32(bit)
                        if rotated:
                            code = ((code << np.uint32(1)) | (code >> np.uint32(bits - 1))) & mask
                        out[at + token] = code


@kernel
def _pack_codes(out, base, stride, first, step, word, shift, own, bits, rotated, words):  # type: ignore[no-untyped-def]
    """The inverse of :func:`_unpack_codes`, into ``words`` whose payloads are zero."""
    mask = np.uint32((1 << bits) - 1)
    heads = words.shape[1]
    groups = out.shape[0] // (words.shape[0] * heads * GROUP_DIMS * PAGE_TOKENS)
    for page in range(words.shape[0]):
        for head in range(heads):
            block = words[page, head]
            for group in range(groups):
                payload = first + group * step
                for dim in range(GROUP_DIMS):
                    at = base[page] + ((head * groups + group) * GROUP_DIMS + dim) * stride[page]
                    for token in range(PAGE_TOKENS):
                        code = np.uint32(out[at + token])
                        if rotated:
                            code = ((code >> np.uint32(1)) | (code << np.uint32(bits - 1))) & mask
                        place = word[dim, token]
                        if place >= 0:
                            block[payload + place] |= code << np.uint32(shift[dim, token])
                        else:
                            for bit in range(bits):
                                found = (code >> np.uint32(bit)) & np.uint32(1)
                                block[payload + own[-1 - place, bit]] |= found << np.uint32(shift[dim, token])


def _bases(part: RunPart) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(base, stride) of each page for the kernels: i64 [pages] both. Of scales the same in pages, not tokens."""
    counts = part.pages.layer_pages
    heads = part.pages.header.kv_heads
    starts = np.cumsum(counts) - counts
    unit = PAGE_TOKENS if part.is_codes or part.pages.side == Side.V else 1
    stride = np.repeat(counts * unit, counts)
    before = np.repeat(starts, counts) * heads * part.page_elements
    in_layer = np.arange(len(part.pages)) - np.repeat(starts, counts)
    return before + in_layer * unit, stride


def _numbers(blocks: Blocks, part: RunPart) -> list[tuple[npt.NDArray[np.uint16], slice]]:
    """Views of the scales or centers of each group (K), or of the block (V): u16 [pages, heads, 16 or 64], and which of
    a page's they are."""
    layout = part.pages.layout
    skip = part.part == "centers"
    halves = blocks.view("<u2")
    if part.pages.side == Side.V:
        first = PAGE_TOKENS * skip
        return [(halves[..., first : first + PAGE_TOKENS], slice(0, PAGE_TOKENS))]
    starts = [layout.group_start(place) // SCALE_BYTES + GROUP_DIMS * skip for place in range(layout.groups)]
    return [
        (halves[..., first : first + GROUP_DIMS], slice(GROUP_DIMS * place, GROUP_DIMS * (place + 1)))
        for place, first in enumerate(starts)
    ]


def ordered(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.uint16]:
    """Bit patterns of fp16 → integers in the order of the numbers."""
    return np.where(bits & 0x8000, ~bits, bits | np.uint16(0x8000))


def unordered(integers: npt.NDArray[np.uint16]) -> npt.NDArray[np.uint16]:
    """The inverse of :func:`ordered`."""
    return np.where(integers & 0x8000, integers & np.uint16(0x7FFF), ~integers)


def _by_layer(part: RunPart) -> list[tuple[slice, slice]]:
    """(pages, elements) of each layer."""
    counts = part.pages.layer_pages
    ends = np.cumsum(counts)
    size = part.pages.header.kv_heads * part.page_elements
    return [
        (slice(int(e - n), int(e)), slice(int(e - n) * size, int(e) * size)) for e, n in zip(ends, counts, strict=True)
    ]


def _number_elements(blocks: Blocks, part: RunPart) -> npt.NDArray[np.uint16]:
    heads, order = part.pages.header.kv_heads, scale_index(part.pages.side)
    out = np.empty(part.elements, np.uint16)
    for pages, elements in _by_layer(part):
        found = np.empty((pages.stop - pages.start, heads, part.page_elements), np.uint16)
        for view, of_page in _numbers(blocks[pages], part):
            found[..., of_page][..., order] = view
        by_time = (1, 2, 0) if part.pages.side == Side.K else (1, 0, 2)
        out[elements] = ordered(found).transpose(by_time).reshape(-1)
    if part.part == "scales":
        out[1:] -= out[:-1].copy()
        out += np.uint16(0x8000)
    return out


def _put_numbers(elements: npt.NDArray[np.uint16], part: RunPart, blocks: Blocks) -> None:
    heads, order = part.pages.header.kv_heads, scale_index(part.pages.side)
    if part.part == "scales":
        elements = np.cumsum(elements - np.uint16(0x8000), dtype=np.uint16)
    for pages, of_layer in _by_layer(part):
        count = pages.stop - pages.start
        shape = (heads, part.page_elements, count) if part.pages.side == Side.K else (heads, count, part.page_elements)
        back = (2, 0, 1) if part.pages.side == Side.K else (1, 0, 2)
        found = unordered(elements[of_layer]).reshape(shape).transpose(back)
        for view, of_page in _numbers(blocks[pages], part):
            view[...] = found[..., of_page][..., order]


def _code_arguments(part: RunPart) -> tuple[Any, ...]:
    layout, bits = part.pages.layout, part.element_bits
    place = part.places.start
    first = (layout.group_start(place) + layout.group_header_bytes) // 4
    word, shift = code_places(part.pages.side, bits)
    rotated = part.kind != ElementKind.UNSIGNED
    return first, layout.group_bytes(place) // 4, word, shift, lane_words(bits), bits, rotated


def _check_blocks(blocks: Blocks, part: RunPart) -> None:
    if blocks.shape != part.pages.block_shape or blocks.dtype != np.uint8 or not blocks.flags.c_contiguous:
        raise ValueError(f"blocks are {blocks.dtype} {blocks.shape}; contiguous uint8 {part.pages.block_shape} needed")


def part_elements(blocks: Blocks, part: RunPart, executor: ThreadPoolExecutor | None = None) -> Elements:
    """Blocks of the pages u8 [pages, heads, block_bytes] → the part's elements, u8 or (16 bits) u16 [part.elements].

    Raises:
        ValueError: blocks of another shape or dtype.
    """
    _check_blocks(blocks, part)
    if not part.is_codes:
        return _number_elements(blocks, part)
    out = np.empty(part.elements, np.uint16 if part.element_bits == 16 else np.uint8)
    base, stride = _bases(part)
    arguments = _code_arguments(part)
    words = blocks.view("<u4")

    def work(layer: tuple[slice, slice]) -> None:
        pages, elements = layer
        _unpack_codes(words[pages], *arguments, out[elements], base[pages] - elements.start, stride[pages])

    for _ in map_ordered(work, _by_layer(part), executor):
        pass
    return out


def put_part(elements: Elements, part: RunPart, blocks: Blocks, executor: ThreadPoolExecutor | None = None) -> None:
    """The inverse of :func:`part_elements`: fill the part into ``blocks``, where its bytes must be zero before.

    Raises:
        ValueError: blocks of another shape or dtype.
    """
    _check_blocks(blocks, part)
    if not part.is_codes:
        _put_numbers(elements, part, blocks)
        return
    base, stride = _bases(part)
    arguments = _code_arguments(part)
    words = blocks.view("<u4")

    def work(layer: tuple[slice, slice]) -> None:
        pages, of_layer = layer
        _pack_codes(elements[of_layer], base[pages] - of_layer.start, stride[pages], *arguments, words[pages])

    for _ in map_ordered(work, _by_layer(part), executor):
        pass
