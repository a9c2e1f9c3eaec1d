"""Blobs that lie on a device → their elements, many at a time: what :mod:`kvpack.encode.blob_decoder` gives.

A snapshot is read in hundreds of blobs of a few layouts (FORMAT.md §9.6). All blobs of a layout take one launch,
whatever their tables are: the host deals their groups to blocks by table. CRCs are computed on the device, over what
has arrived there. Nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kvpack.format.blob import GROUPS_PER_TILE, Blob
from kvpack.format.header import TILE_METADATA_BYTES
from kvpack.format.layout import (
    ALIGNMENT_BYTES,
    GROUP_LANES,
    NUM_SYMBOLS,
    PROBABILITY_BITS,
    TILE_ROWS,
    Layout,
    Predictor,
    TileMode,
    align,
)
from kvpack.format.tables import Frequencies
from kvpack.runtime.codec.encoder import launch_crc32
from kvpack.runtime.codec.group_table import check_unread, group_table, row_groups
from kvpack.runtime.device import kernels
from kvpack.runtime.device.kernels import Kernel
from kvpack.runtime.device.streams import forked

# Zeros behind the last blob: an element of a raw tile is read with up to 7 bytes behind it, words 16 bytes at a time.
SLACK_BYTES = 32
_WARPS, _BLOCKS_PER_SM = 8, 3
# cuda/codec/decode_elements.cu: what a lane has of shared memory.
_RING_BYTES, _ROW_STRIDE_BYTES = 128, 80
_SHARED_BYTES = (4 << PROBABILITY_BITS) + 4 * NUM_SYMBOLS + _WARPS * GROUP_LANES * (_RING_BYTES + _ROW_STRIDE_BYTES)
_STREAMS = 4
_NO_TABLE = 0xFFFFFFFF  # cuda/codec/decode_elements.cu
# cuda/codec/tile.cuh: where an entry of the group table has its mode and its table.
_MODE_SHIFT, _TABLE_SHIFT = 19, 22

Units = npt.NDArray[np.uint32]


@dataclass(frozen=True)
class PlacedBlob:
    """A blob, parsed, and where its bytes begin in device memory: a multiple of 16."""

    blob: Blob
    offset: int


@dataclass(frozen=True)
class Decoded:
    """What :func:`decode_blobs` has enqueued.

    Attributes:
        elements: of each blob, u8, or the bit patterns of 16 bits as i16: [num_elements], in the order of
            matrix, row and column. What damaged blobs have there is not defined.
        damage: i64 scalar on the device: how many lanes did not end as they must, and tiles have another CRC.
    """

    elements: list[torch.Tensor]
    damage: torch.Tensor


def decode_kernel(layout: Layout, *, predicted: bool) -> Kernel:
    """Elements of groups of one layout."""
    defines = {
        "KVPACK_PREDICTED": int(predicted),
        "KVPACK_MAX_WARPS": _WARPS,
        "KVPACK_BLOCKS_PER_SM": _BLOCKS_PER_SM,
    }
    return Kernel.of("codec/decode_elements.cu", "decode_elements", layout, defines)


def _units(placed: PlacedBlob, first_element: int, first_table: int) -> tuple[Units, npt.NDArray[np.int64]]:
    """The units of a blob, u32 [groups, 8], and the table of each: as ``cuda/codec/decode_elements.cu`` draws them."""
    header = placed.blob.header
    entries = group_table(placed.blob)
    groups, columns = row_groups(header), header.num_tiles_col
    matrix, rest = np.divmod(np.arange(len(entries), dtype=np.int64), groups * columns)
    row_group, column = np.divmod(rest, columns)
    tile_rows = np.minimum(header.rows - row_group // GROUPS_PER_TILE * TILE_ROWS, TILE_ROWS)
    tile_cols = np.minimum(header.cols - column * header.tile_cols, header.tile_cols)
    first = (matrix * header.rows + row_group * GROUP_LANES) * header.cols + column * header.tile_cols + first_element
    units = np.empty((len(entries), 8), np.uint32)
    units[:, :4] = entries
    units[:, 0] += np.uint32(placed.offset // ALIGNMENT_BYTES)
    units[:, 4:6] = first.astype("<u8").view(np.uint32).reshape(-1, 2)
    units[:, 6] = header.cols
    units[:, 7] = tile_rows | row_group % GROUPS_PER_TILE << 9 | tile_cols << 12 | header.length_bytes << 24
    table = (entries[:, 1] >> _TABLE_SHIFT & 15).astype(np.int64) + first_table
    table[entries[:, 1] >> _MODE_SHIFT & 3 != TileMode.RANS] = _NO_TABLE
    return units, table


def _blocks(tables: npt.NDArray[np.int64]) -> Units:
    """u32 [blocks, 4], of units that are sorted by their tables: table, first unit, the one behind the last."""
    firsts = np.flatnonzero(np.diff(tables, prepend=-1))
    ends = np.append(firsts[1:], len(tables))
    counts = -(-(ends - firsts) // _WARPS)
    own = np.repeat(np.arange(len(firsts)), counts)
    place = np.arange(len(own)) - np.repeat(np.cumsum(counts) - counts, counts)
    begin = firsts[own] + _WARPS * place
    blocks = np.zeros((len(own), 4), np.uint32)
    blocks[:, 0], blocks[:, 1], blocks[:, 2] = tables[begin], begin, np.minimum(begin + _WARPS, ends[own])
    return blocks


def _sent(array: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """A copy on the device, as i32."""
    values = torch.from_numpy(np.ascontiguousarray(array).view(np.int32).reshape(-1))
    return values.clone() if device.type == "cpu" else values.pin_memory().to(device, non_blocking=True)


_ELEMENT_TYPES = {8: torch.uint8, 16: torch.int16}


def decode_blobs(blobs: Sequence[PlacedBlob], data: torch.Tensor) -> Decoded:
    """Decode blobs that lie in ``data``, on its device.

    Args:
        data: u8, with the blobs' bytes, and :data:`SLACK_BYTES` more behind the last.

    Raises:
        BlobError: a payload breaks a rule that would lead a kernel out of it, or that no kernel looks at. Other damage
            is found by the device.
    """
    device = data.device
    found: list[torch.Tensor] = [torch.empty(0, dtype=torch.uint8, device=device)] * len(blobs)
    kinds: dict[tuple[Layout, bool], list[int]] = {}
    for number, placed in enumerate(blobs):
        predicted = bool((placed.blob.tiles["predictor"] != Predictor.NONE).any())
        kinds.setdefault((placed.blob.header.layout, predicted), []).append(number)
    launches = []
    for (layout, predicted), numbers in kinds.items():
        prepared = _Launch.of(layout, predicted, [blobs[number] for number in numbers], data)
        for number, elements in zip(numbers, prepared.elements, strict=True):
            found[number] = elements
        launches.append(prepared)
    expected = _tile_metadata(blobs, device)
    computed = expected.clone()
    # A lane takes long, however few there are: launches of few blocks go beside those of many.
    jobs: list[Callable[[], None]] = [each.run for each in sorted(launches, key=lambda each: each.blocks)]
    _beside_each_other([*jobs, lambda: launch_crc32(data, computed, kernels.launch)], device)
    for placed in blobs:  # while the device is at work
        check_unread(placed.blob)
    damage = (computed != expected).sum()
    for each in launches:
        damage += each.status[0]
    return Decoded(found, damage)


def _beside_each_other(jobs: Sequence[Callable[[], None]], device: torch.device) -> None:
    """Run what enqueues work so that the device may do it all at once; what comes next waits for it."""
    with forked(device, min(_STREAMS, len(jobs))) as streams:
        for job, stream in zip(jobs, cycle(streams)):
            with torch.cuda.stream(stream):
                job()


@dataclass(frozen=True)
class _Launch:
    """One launch for all blobs of a layout: its kernel and arguments, and what it fills."""

    kernel: Kernel
    blocks: int
    arguments: tuple[torch.Tensor, ...]
    elements: list[torch.Tensor]
    status: torch.Tensor

    @classmethod
    def of(cls, layout: Layout, predicted: bool, blobs: Sequence[PlacedBlob], data: torch.Tensor) -> _Launch:
        device = data.device
        sizes = [placed.blob.header.num_elements for placed in blobs]
        ends = np.cumsum([align(size, ALIGNMENT_BYTES) for size in sizes]).tolist()
        out = torch.empty(ends[-1], dtype=_ELEMENT_TYPES[max(8, layout.element_bits)], device=device)
        units, tables, elements = [], [], []
        frequencies: list[Frequencies] = []
        for placed, size, end in zip(blobs, sizes, ends, strict=True):
            begin = end - align(size, ALIGNMENT_BYTES)
            elements.append(out[begin : begin + size])
            of_blob, own = _units(placed, begin, len(frequencies))
            units.append(of_blob)
            tables.append(own)
            frequencies += placed.blob.tables
        table = np.concatenate(tables)
        order = np.argsort(table, kind="stable")
        blocks = _blocks(table[order])
        known = np.stack(frequencies or [np.zeros(NUM_SYMBOLS, np.uint16)]).astype("<u2")
        status = torch.zeros(2, dtype=torch.int32, device=device)
        sent = (_sent(array, device) for array in (np.concatenate(units)[order], blocks, known))
        kernel = decode_kernel(layout, predicted=predicted)
        return cls(kernel, len(blocks), (data, *sent, out, status), elements, status)

    def run(self) -> None:
        kernels.launch(
            self.kernel,
            self.blocks,
            _WARPS * GROUP_LANES,
            self.arguments,
            device=self.status.device,
            shared_bytes=_SHARED_BYTES,
        )


def _tile_metadata(blobs: Sequence[PlacedBlob], device: torch.device) -> torch.Tensor:
    """The metadata of all tiles, i32 [tiles, 8]; their offsets count from where the blobs' do."""
    all_tiles = []
    for placed in blobs:
        tiles = placed.blob.tiles.copy()
        tiles["data_offset"] += placed.offset + placed.blob.header.payload_offset
        all_tiles.append(tiles)
    return _sent(np.concatenate(all_tiles), device).view(-1, TILE_METADATA_BYTES // 4)
