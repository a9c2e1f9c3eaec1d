"""Snapshots on the CPU: pages of runs ⇄ blobs, and files of them (docs/FORMAT.md §9.6)."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvpack.encode.blob_decoder import decode_elements, decode_tile, element_dtype
from kvpack.encode.blob_encoder import encode_elements
from kvpack.encode.page_runs import part_elements, put_part
from kvpack.encode.rans import decoder_table
from kvpack.errors import DamagedRunError, FormatError, GeometryError, LimitError, SnapshotHeaderError
from kvpack.format.blob import Blob
from kvpack.format.container import CONTAINER_VERSION, CRC_KEY, MAX_TENSORS, TENSORS_KEY, VERSION_KEY, ContainerWriter
from kvpack.format.header import BlobHeader
from kvpack.format.layout import CHUNK_COLS, GROUP_LANES, MAX_TILE_COLS, ElementKind, Layout, align, ceil_div
from kvpack.format.snapshot import (
    SNAPSHOT_CRC_KEY,
    SNAPSHOT_KEY,
    RunPages,
    RunPart,
    SnapshotFile,
    SnapshotHeader,
    array_rules,
    check_page_formats,
    check_values,
    snapshot_crc32,
)
from kvpack.format.snapshot_summary import snapshot_sizes

Blocks = npt.NDArray[np.uint8]
# Gives the blocks of pages, u8 [pages, heads, block_bytes].
BlocksOf = Callable[[RunPages], Blocks]
_DTYPE_NAMES = {"uint8": "U8", "int32": "I32", "float32": "F32", "float64": "F64"}

# Codes of a symbol and bits of a code, by the kind and the bits of elements: the smallest measured on recorded KV that
# takes at most half a step an element (docs/DESIGN-NOTES.md).
_LAYOUTS = {
    (ElementKind.UNSIGNED, 2): (2, 4),
    (ElementKind.UNSIGNED, 3): (3, 2),
    (ElementKind.UNSIGNED, 4): (4, 2),
    (ElementKind.UNSIGNED, 5): (4, 2),
    (ElementKind.UNSIGNED, 8): (8, 1),
    (ElementKind.FP16, 16): (7, 1),
    (ElementKind.BF16, 16): (8, 1),
    (ElementKind.FP8_E4M3, 8): (4, 2),
    (ElementKind.FP8_E5M2, 8): (5, 1),
}
_NUMBER_CODE_BITS = 8
# A blob may have fewer elements than these behind its part's: a matrix of 32 of the longest lanes (FORMAT.md §9.6).
MAX_SURPLUS = GROUP_LANES * MAX_TILE_COLS
# A group of lanes for each matrix, so that every 32 lanes can have a table of their own, wherever that divides.
_MATRIX_ROWS = GROUP_LANES
# Elements of a lane, least and most: long ones cost less, short ones let more of them have a table of their own.
_CODE_LANES = 1024, MAX_TILE_COLS
_NUMBER_LANES = 512, 1024
_LANE_BITS = 48


def blob_header(part: RunPart) -> BlobHeader:
    """How a writer lays out the elements of a part: a GPU's takes the same, so that bytes are equal."""
    code_bits, codes = _LAYOUTS[part.kind, part.element_bits]
    layout = Layout(part.kind, part.element_bits, code_bits if part.is_codes else _NUMBER_CODE_BITS, codes)
    low, high = _CODE_LANES if part.is_codes else _NUMBER_LANES
    elements = part.elements
    if elements <= _MATRIX_ROWS * low:  # a lane for each row would be shorter
        cols = align(ceil_div(elements, ceil_div(elements, low)), CHUNK_COLS)
        return BlobHeader(layout, ceil_div(elements, cols), cols, cols)

    def cost_bits(cols: int) -> int:
        size = _MATRIX_ROWS * cols
        matrices = ceil_div(elements, size)
        return (matrices * size - elements) * part.element_bits + matrices * _MATRIX_ROWS * _LANE_BITS

    cols = min(range(high, low - 1, -CHUNK_COLS), key=cost_bits)
    return BlobHeader(layout, _MATRIX_ROWS, cols, cols, matrices=ceil_div(elements, _MATRIX_ROWS * cols))


def encode_part(blocks: Blocks, part: RunPart, executor: ThreadPoolExecutor | None = None) -> bytes:
    """The blob of one part of pages' blocks u8 [pages, heads, block_bytes]."""
    header = blob_header(part)
    elements = part_elements(blocks, part, executor)
    if surplus := header.num_elements - part.elements:
        elements = np.concatenate([elements, np.full(surplus, elements[-1])])
    shaped = elements.reshape(header.matrices, header.rows, header.cols)
    return encode_elements(shaped, header.layout, tile_cols=header.tile_cols, executor=executor)


def encode_run(
    run: Sequence[RunPages], blocks_of: BlocksOf, executor: ThreadPoolExecutor | None = None
) -> Iterator[tuple[str, bytes]]:
    """The blobs of a run, with the names of their tensors; memory for the pages of one side and format at a time.

    Args:
        run: what :func:`kvpack.format.snapshot.run_pages` gives.
        blocks_of: asked once for each of them.
    """
    for pages in run:
        blocks = blocks_of(pages)
        for part in pages.parts:
            yield part.name, encode_part(blocks, part, executor)


def parse_part(data: memoryview, part: RunPart) -> Blob:
    """The blob of a part, parsed; its header and tables are checked, and that it holds what the part needs.

    Raises:
        BlobError: it is damaged, or not of this part.
    """
    blob = Blob(data)
    header, layout = blob.header, blob.header.layout
    if (layout.element_kind, layout.element_bits) != (part.kind, part.element_bits) or header.transposed:
        found = f"{layout.element_kind.name} of {layout.element_bits} bits{', transposed' * header.transposed}"
        raise GeometryError(f"the blob holds {found}; {part.kind.name} of {part.element_bits} bits are needed")
    surplus = header.num_elements - part.elements
    if not 0 <= surplus < MAX_SURPLUS:
        raise GeometryError(f"the blob holds {header.num_elements} elements, the pages {part.elements}")
    return blob


def _put_blob(blob: Blob, part: RunPart, blocks: Blocks, executor: ThreadPoolExecutor | None) -> None:
    # How many there are is settled: SnapshotFile has compared the pages with the file's bytes, and parse_part the blob.
    elements = decode_elements(blob, executor=executor, max_elements=blob.header.num_elements).reshape(-1)
    if (elements[part.elements :] != elements[part.elements - 1]).any():
        raise GeometryError("the elements behind the last page's do not repeat its last one")
    put_part(elements[: part.elements], part, blocks, executor)


def decode_part(data: memoryview, part: RunPart, blocks: Blocks, executor: ThreadPoolExecutor | None = None) -> None:
    """Fill one part into ``blocks`` u8 [pages, heads, block_bytes], where its bytes are zero, from its blob.

    Raises:
        BlobError: the blob is damaged, or not of this part.
    """
    _put_blob(parse_part(data, part), part, blocks, executor)


def _damaged_layer(data: memoryview, part: RunPart) -> int | None:
    """The first layer whose pages a damaged tile of a blob holds; None if that cannot be told."""
    try:
        blob = parse_part(data, part)
    except FormatError:
        return None
    header, tables = blob.header, [decoder_table(table) for table in blob.tables]
    ends = np.cumsum(part.pages.layer_pages) * part.pages.header.kv_heads * part.page_elements
    for tile in range(header.num_tiles):
        g = header.tile_geometry(tile)
        try:
            out = np.empty((g.rows, g.cols), element_dtype(header.layout.element_bits))
            decode_tile(blob, blob.tile(tile), tables, out)
        except FormatError:
            first = (g.matrix * header.rows + g.first_row) * header.cols + g.first_col
            place = int(np.searchsorted(ends, min(first, part.elements - 1), "right"))
            return int(np.unique(part.pages.layers)[place])
    return None


@contextmanager
def _naming_damage(file: SnapshotFile, run: int, part: RunPart) -> Iterator[None]:
    """What breaks a rule of a blob, or has another CRC, is a damaged run."""
    try:
        yield
    except FormatError as error:
        tokens, pages = file.header.token_range(run), part.pages
        raise DamagedRunError(
            run,
            tokens.start,
            tokens.stop,
            f"{part.part}: {file.container.path}: {error}",
            _damaged_layer(file.blob(part), part),
            pages.side.name,
            pages.format.name,
        ) from error


def decode_run(
    file: SnapshotFile, run: int, executor: ThreadPoolExecutor | None = None
) -> list[tuple[RunPages, Blocks]]:
    """The pages of a run and their blocks, u8 [pages, heads, block_bytes]; all or nothing.

    Raises:
        DamagedRunError: the message names run, tokens, layers, side and format.
        FileChangedError: the file was cut or written to since it was opened.
    """
    done = []
    for pages in file.pages_of_run(run):
        parsed = []
        for part in pages.parts:
            data = file.blob(part)
            with _naming_damage(file, run, part):
                parsed.append(parse_part(data, part))
        # Now the bytes have said that there are so many pages.
        blocks = np.zeros(pages.block_shape, np.uint8)
        for part, blob in zip(pages.parts, parsed, strict=True):
            with _naming_damage(file, run, part):
                _put_blob(blob, part, blocks, executor)
        done.append((pages, blocks))
    return done


def decode_runs(
    file: SnapshotFile,
    runs: Iterable[int],
    *,
    executor: ThreadPoolExecutor | None = None,
) -> Iterator[tuple[int, list[tuple[RunPages, Blocks]]]]:
    """:func:`decode_run` of one run after another.

    Raises:
        DamagedRunError, FileChangedError
    """
    for run in runs:
        yield run, decode_run(file, run, executor)


def _stored_array(name: str, array: npt.NDArray[Any], header: SnapshotHeader) -> tuple[str, bytes]:
    rules = array_rules(header)
    if name not in rules:
        raise SnapshotHeaderError(f"array {name!r} is no part of a snapshot; there are {', '.join(rules)}")
    dtype = _DTYPE_NAMES.get(array.dtype.name, array.dtype.name)
    rule = rules[name]
    if not rule.fits(dtype, array.shape):
        raise SnapshotHeaderError(
            f"array {name!r} is {dtype} {list(array.shape)}; {rule.dtype} {list(rule.shape)} is needed"
        )
    check_values(name, array)
    return dtype, np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes()


def write_snapshot(
    path: str | os.PathLike[str],
    header: SnapshotHeader,
    arrays: Mapping[str, npt.NDArray[Any]],
    runs: Iterable[Iterable[tuple[str, bytes | memoryview]]],
) -> int:
    """Write a snapshot, and put it in place at once; whatever fails leaves what was there before.

    Args:
        arrays: the tensors that are not blobs, by name (``kvpack.format.snapshot.array_rules``).
        runs: what :func:`encode_run` gives for each run, in order.

    Returns:
        The bytes of the file.

    Raises:
        SnapshotHeaderError: an array is missing, has another dtype or shape than the header says, or numbers that it
            must not have.
        OSError: the file cannot be written.
    """
    stored = {name: _stored_array(name, array, header) for name, array in arrays.items()}
    if missing := [name for name, rule in array_rules(header).items() if rule.needed and name not in stored]:
        raise SnapshotHeaderError(f"array {missing[0]!r} is missing")
    check_page_formats(header, arrays["page_formats"])
    text = header.to_json()
    crc32 = {}
    with ContainerWriter(path) as writer:
        for name, (dtype, data) in sorted(stored.items(), key=lambda item: -arrays[item[0]].itemsize):
            writer.add(name, dtype, arrays[name].shape, [data])
            crc32[name] = zlib.crc32(data)
        for run in runs:
            for name, blob in run:
                writer.add(name, "U8", (len(blob),), [blob])
                crc32[name] = zlib.crc32(blob)
        if len(crc32) > MAX_TENSORS:
            raise LimitError(f"{len(crc32)} tensors are more than the {MAX_TENSORS} that a reader takes")
        return writer.finish(
            {
                VERSION_KEY: CONTAINER_VERSION,
                TENSORS_KEY: "{}",
                CRC_KEY: json.dumps(crc32, separators=(",", ":")),
                SNAPSHOT_KEY: text,
                SNAPSHOT_CRC_KEY: snapshot_crc32(text),
            }
        )


@dataclass(frozen=True)
class SnapshotReport:
    """What :func:`verify_snapshot` found.

    Attributes:
        intact_pages: page indices from the first one on before the first damaged run.
        damage: what the first damaged run has, or None.
    """

    header: SnapshotHeader
    file_bytes: int
    page_bytes: int
    fp16_bytes: int
    intact_pages: int
    damage: DamagedRunError | None


def verify_snapshot(
    path: str | os.PathLike[str],
    *,
    progress: Callable[[int, int], None] | None = None,
    executor: ThreadPoolExecutor | None = None,
) -> SnapshotReport:
    """Decode all of a snapshot to nowhere, with every check, up to the first damaged run.

    Args:
        progress: called with (runs that are done, all runs).

    Raises:
        SnapshotError, ContainerError: the file cannot be opened, or a tensor that is no blob is damaged.
    """
    with SnapshotFile(path) as file:
        header = file.header
        for name in array_rules(header):
            file.array(name)
        damage, intact = None, header.pages
        for run in range(header.runs):
            try:
                decode_run(file, run, executor)
                _check_crc32(file, run)
            except DamagedRunError as error:
                damage, intact = error, header.page_range(run).start
                break
            if progress is not None:
                progress(run + 1, header.runs)
        return SnapshotReport(header, *snapshot_sizes(file), intact, damage)


def _check_crc32(file: SnapshotFile, run: int) -> None:
    """The CRCs that the container has of blobs: for who knows containers alone."""
    for part in (part for pages in file.pages_of_run(run) for part in pages.parts):
        data = file.blob(part)
        with _naming_damage(file, run, part):
            file.container.check_crc32(part.name, data)
