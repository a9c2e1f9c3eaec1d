"""Pages of runs come back from the elements of their parts, and from blobs, bit for bit."""

from __future__ import annotations

import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import numpy as np
import pytest
from snapshot_samples import SamplePages, make_header, mixed_formats

from kvpack.encode.blob_decoder import rotate_left
from kvpack.encode.blob_encoder import encode_elements
from kvpack.encode.page_runs import ordered, part_elements, put_part, unordered
from kvpack.encode.snapshot_coder import blob_header, decode_part, encode_part
from kvpack.errors import GeometryError
from kvpack.format.layout import ElementKind
from kvpack.format.pages import PageFormat, Side, split_block
from kvpack.format.snapshot import RunPages, RunPart, run_pages

KINDS = list(product(Side, PageFormat))


def uneven_pages(side: Side, page_format: PageFormat, head_dim: int, counts: tuple[int, ...] = (3, 0, 2)) -> RunPages:
    """Pages of layers that have ``counts`` of them."""
    dtype = "BF16" if page_format == PageFormat.BF16 else "F16"
    header = make_header(64 * max(counts), len(counts), 2, head_dim, dtype=dtype, run_pages=max(counts))
    other = PageFormat.INT8 if page_format != PageFormat.INT8 else PageFormat.INT2
    formats = np.full((len(counts), 2, max(counts)), other, np.uint8)
    for layer, count in enumerate(counts):
        formats[layer, side, max(counts) - count :] = page_format
    return next(p for p in run_pages(header, formats, 0) if (p.side, p.format) == (side, page_format))


def blocks_of(pages: RunPages, *, random_bytes: bool = True) -> np.ndarray:
    return SamplePages(pages.header, np.empty(0, np.uint8), random_bytes=random_bytes).blocks(pages)


def expected_elements(blocks: np.ndarray, part: RunPart) -> np.ndarray:
    """By FORMAT.md's words: layer, head, dimension as it lies, page, token."""
    layout = part.pages.layout
    dims = np.concatenate([np.arange(16 * g, 16 * g + 16) for g in layout.group_order[part.places]])
    found = []
    for layer in np.unique(part.pages.layers):
        parts = split_block(blocks[part.pages.layers == layer], layout)
        if part.is_codes:
            codes = parts.codes[..., dims].transpose(1, 3, 0, 2).reshape(-1)
            if part.kind != ElementKind.UNSIGNED:
                codes = rotate_left(codes.astype(np.uint16 if part.element_bits == 16 else np.uint8), part.element_bits)
            found.append(codes)
            continue
        numbers = (parts.scales if part.part == "scales" else parts.centers).view(np.uint16)
        numbers = numbers[..., dims].transpose(1, 2, 0) if part.pages.side == Side.K else numbers.transpose(1, 0, 2)
        found.append(np.where(numbers >= 0x8000, numbers ^ 0xFFFF, numbers | 0x8000).reshape(-1))
    elements = np.concatenate(found)
    if part.part == "scales":
        elements = (np.diff(elements.astype(np.int64), prepend=0) + 0x8000) % 0x10000
    return elements


@pytest.mark.parametrize("head_dim", [16, 64, 96, 128])
@pytest.mark.parametrize(("side", "page_format"), KINDS)
def test_elements_are_those_that_the_format_says(side: Side, page_format: PageFormat, head_dim: int) -> None:
    pages = uneven_pages(side, page_format, head_dim)
    blocks = blocks_of(pages)
    back = np.zeros_like(blocks)
    sizes = 0
    for part in pages.parts:
        elements = part_elements(blocks, part)
        assert elements.shape == (part.elements,)
        np.testing.assert_array_equal(elements, expected_elements(blocks, part))
        assert int(elements.max()) >> part.element_bits == 0
        put_part(elements, part, back)
        sizes += part.elements * part.element_bits
    assert sizes == 8 * blocks.size  # the parts are all of a page, nothing twice
    np.testing.assert_array_equal(back, blocks)


@pytest.mark.parametrize(
    ("counts", "head_dim"), [((1,), 16), ((1,), 256), ((2, 1), 256), ((33, 5), 16), ((7, 0, 31), 16)]
)
@pytest.mark.parametrize(("side", "page_format"), KINDS)
def test_blobs_hold_the_pages(side: Side, page_format: PageFormat, counts: tuple[int, ...], head_dim: int) -> None:
    pages = uneven_pages(side, page_format, head_dim, counts)
    for random_bytes in (True, False):
        blocks = blocks_of(pages, random_bytes=random_bytes)
        back = np.zeros_like(blocks)
        for part in pages.parts:
            decode_part(memoryview(encode_part(blocks, part)), part, back)
        np.testing.assert_array_equal(back, blocks)


def test_blobs_do_not_depend_on_threads() -> None:
    header = make_header(64 * 40, 3, 2, 64)
    pages = SamplePages(header, mixed_formats(header))
    alone = [list(run) for run in pages.encoded()]
    with ThreadPoolExecutor(4) as executor:
        together = [list(run) for run in pages.encoded(executor)]
    assert alone == together
    assert len({name for run in alone for name, _ in run}) == sum(map(len, alone))


def test_every_number_of_16_bits_keeps_its_order() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    integers = ordered(bits)
    np.testing.assert_array_equal(unordered(integers), bits)
    numbers = bits.view(np.float16).astype(np.float32)
    by_integer = numbers[np.argsort(integers)]
    finite = by_integer[np.isfinite(by_integer)]
    assert (np.diff(finite) >= 0).all()


@pytest.mark.parametrize(("side", "page_format"), KINDS)
def test_lanes_are_long(side: Side, page_format: PageFormat) -> None:
    """Whatever the pages of a layer: a short lane would cost half a bit a number."""
    for counts in ((1,), (30,) * 8, (32, 31, 17, 1)):
        pages = uneven_pages(side, page_format, 64, counts)
        for part in pages.parts:
            header = blob_header(part)
            surplus = header.num_elements - part.elements
            assert 0 <= surplus < header.rows * header.cols
            if part.is_codes:
                assert header.cols >= min(1024, part.elements)
                assert surplus <= max(part.elements // 50, 1024)


def test_blocks_of_another_shape_are_refused() -> None:
    pages = uneven_pages(Side.K, PageFormat.INT4, 64)
    blocks = blocks_of(pages)
    for wrong in (blocks[:-1], blocks[..., :-16], blocks.astype(np.uint16), blocks[:, ::-1]):
        with pytest.raises(ValueError, match="blocks are"):
            part_elements(wrong, pages.parts[0])
        with pytest.raises(ValueError, match="blocks are"):
            put_part(np.zeros(pages.parts[0].elements, np.uint8), pages.parts[0], wrong)


def test_elements_behind_the_last_page_are_looked_at() -> None:
    """They repeat the last one: nothing can be hidden there."""
    pages = uneven_pages(Side.V, PageFormat.INT8, 64, (13, 9))
    blocks = blocks_of(pages)
    part = next(part for part in pages.parts if blob_header(part).num_elements > part.elements)
    header = blob_header(part)
    elements = part_elements(blocks, part)
    surplus = np.full(header.num_elements - part.elements, elements[-1])
    shape = header.matrices, header.rows, header.cols
    whole = encode_elements(np.concatenate([elements, surplus]).reshape(shape), header.layout)
    decode_part(memoryview(whole), part, np.zeros_like(blocks))
    surplus[-1] ^= 1
    other = encode_elements(np.concatenate([elements, surplus]).reshape(shape), header.layout)
    with pytest.raises(GeometryError, match="do not repeat"):
        decode_part(memoryview(other), part, np.zeros_like(blocks))
    # A constant tile of a few bytes is half a million elements: how many there are is looked at before they are made.
    for count in (part.elements - 64, part.elements + 65536):
        rows = np.full((1, count // 64, 64), elements[-1])
        with pytest.raises(GeometryError, match="elements, the pages"):
            decode_part(memoryview(encode_elements(rows, header.layout)), part, np.zeros_like(blocks))


def test_a_blob_cannot_ask_for_much_memory() -> None:
    pages = uneven_pages(Side.V, PageFormat.INT8, 64, (1,))
    part = pages.parts[0]
    bomb = encode_elements(np.zeros((1, 256, 2048 * 128), np.uint8), blob_header(part).layout, tile_cols=2048)
    assert len(bomb) < 10_000
    tracemalloc.start()
    with pytest.raises(GeometryError, match="elements, the pages"):
        decode_part(memoryview(bomb), part, np.zeros(pages.block_shape, np.uint8))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 18
