"""Weights → elements → blob on a GPU: the same bytes as :mod:`kvpack.encode` makes.

Everything that coding does for each element runs on the device: histograms, lanes, raw planes, CRCs, and the moving
together of tiles. The host chooses the tables and writes the front. So it waits twice: for the sum of the histograms,
and for the tiles' metadata. What it does meanwhile, and few allocations, copies and launches, matter for tensors of a
few million elements, whose kernels take less time than it does.

::

    encode_count   symbols of each tile, their sum, and the least that     → host: tables
                   they can take with any tables
    encode_lanes   lanes → words, in scratch memory                        ┐
    encode_place   mode, size and place of each tile                       │ a slab of tiles at a time, if the
    encode_pack    lane tables, words, planes or raw elements, outliers    ┘ scratch would be too large
    crc32          over the tiles as they lie                              → host: the front

Most tensors have one table. Where the sum and the bound do not prove it, the device goes on with that one table all the
same, while the host chooses from all histograms as the CPU does; if more are worth while, the lanes are coded again.
Only where some tile has one symbol alone, the device waits for that choice.

Quantizing (``encode_quantize``) runs on the device too, with integer sums; with feedback other sums are made there than
on the CPU, and other integers come of it (:mod:`.feedback`). What ``kvpack.encode`` sums in floating
point stays with the CPU, since the bytes depend on the order of such sums: the moments that a step is chosen by, and
the noise that is reported. So do the fine histogram, the rows' largest magnitudes, and steps near the end of fp32's
range, where kernels (compiled to flush denormal numbers) would round otherwise.

Launches go through a parameter, so that tests run the same steps with the kernels compiled for the CPU.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kvpack.encode.blob_encoder import (
    EncodedBlob,
    Strip,
    StripSource,
    element_entropy_bits,
    even_tile_cols,
    pack_outliers,
)
from kvpack.encode.feedback import TensorFeedback
from kvpack.encode.jit import kernel
from kvpack.encode.quantize import DELTA_OFFSET, FIXED_POINT, NUM_THRESHOLDS, Rounding
from kvpack.encode.table_clusters import CONSTANT, CommonTable, cluster_coded, cluster_tables
from kvpack.encode.tensor_encoder import CPU_CODER, Coder, Matrices, QuantizedCounts, QuantizedStrips
from kvpack.encode.threads import map_ordered
from kvpack.errors import DeviceError
from kvpack.format.blob import TILE_METADATA, pack_front
from kvpack.format.header import HEADER_BYTES, TILE_METADATA_BYTES, BlobHeader
from kvpack.format.layout import (
    ALIGNMENT_BYTES,
    FREQUENCY_SUM,
    GROUP_LANES,
    MAX_TABLES,
    NUM_SYMBOLS,
    OUTLIER_BYTES,
    PROBABILITY_BITS,
    TILE_ROWS,
    ElementKind,
    Layout,
    Predictor,
    Quantizer,
    TableEncoding,
    TileMode,
    align,
    ceil_div,
)
from kvpack.format.tables import Frequencies
from kvpack.runtime.codec.feedback import DeviceFeedback, device_feedback, quantize_with_feedback
from kvpack.runtime.device.kernels import Kernel, launch, require_device
from kvpack.runtime.device.streams import forked

Launch = Callable[..., None]  # kernels.launch, or one that runs kernels elsewhere

SCRATCH_BYTES = 1 << 30
_CRC_THREADS = 256
_CRC_POLYNOMIAL = 0xEDB88320
_PLACE_THREADS = 1024
_QUANTIZE_THREADS = 256
_QUANTIZE_BLOCKS = 4096
# Steps from here on are so far from denormal numbers that flushing these changes no element.
_SMALLEST_STEP = 2.0**-100
_WORD_BITS = 16
# Up to so many bytes the driver takes a copy itself, and nobody waits.
_STAGED_BYTES = 1 << 16
# Words are stored four at a time.
_LANE_WORDS_MULTIPLE = 4
# cuda/codec/encode_tiles.cuh
_PLAN_RAW, _PLAN_CONSTANT = -1, -2
# cuda/codec/encode_count.cu: u64 of a summary
_SUMMARY_SIZE = NUM_SYMBOLS + 2
_UNITS_PER_BIT = 256


@cache
def _kernel(operation: str, layout: Layout | None, defines: tuple[tuple[str, int], ...] = ()) -> Kernel:
    """The kernel of the source file of its name, which knows of elements, not of what these stand for."""
    if layout is not None:
        layout = replace(layout, quantizer=Quantizer.SCALAR)
    return Kernel.of(f"codec/{operation}.cu", operation, layout, dict(defines))


_PLACE = _kernel("encode_place", None, (("KVPACK_PLACE_THREADS", _PLACE_THREADS),))
_CRC = _kernel("crc32", None, (("KVPACK_CRC_THREADS", _CRC_THREADS), ("KVPACK_CRC_POLYNOMIAL", _CRC_POLYNOMIAL)))


def _quantize_kernel(kind: ElementKind) -> Kernel:
    """The one for weights of float kind ``kind``."""
    numbers = {
        "KVPACK_WEIGHT_KIND": int(kind),
        "KVPACK_NUM_THRESHOLDS": NUM_THRESHOLDS,
        "KVPACK_FIXED_POINT": FIXED_POINT,
        "KVPACK_DELTA_OFFSET": DELTA_OFFSET,
        "KVPACK_QUANTIZE_THREADS": _QUANTIZE_THREADS,
    }
    return _kernel("encode_quantize", None, tuple(numbers.items()))


_BIT_PATTERNS = {8: torch.uint8, 16: torch.int16, 32: torch.int32}
_U32 = np.uint32


@kernel
def _set_entries(tables, entries):  # type: ignore[no-untyped-def]
    for index in range(tables.shape[0]):
        start = 0
        for symbol in range(NUM_SYMBOLS):
            frequency = tables[index, symbol]
            if frequency == 0:
                continue
            reciprocal, shift, round_down, offset = (1 << 32) - 1, -1, 0, start
            power = 1
            while power <= frequency:
                power, shift = 2 * power, shift + 1
            if frequency == 1:
                offset += FREQUENCY_SUM - 1
            elif 2 * frequency == power:
                reciprocal = 1 << 31
                shift -= 1
            else:
                power = 1 << 32 + shift
                reciprocal = power // frequency
                if (frequency - power % frequency) * frequency > power >> 20:
                    round_down = 1
                else:
                    reciprocal += 1
            entries[index, symbol, 0] = reciprocal
            entries[index, symbol, 1] = frequency << (32 - PROBABILITY_BITS) | offset << 7 | round_down << 4 | shift
            start += frequency


def encoder_entries(tables: list[Frequencies]) -> npt.NDArray[np.uint32]:
    """What ``encode_lanes`` looks up, u32 [tables, 256, 2]: a reciprocal, and frequency, start and shift packed.

    The quotient x div f for x < f·2²⁰ is (x + d)·r >> s, with r < 2³² so that only the product's upper half is needed.
    Let k = floor(log2 f) and s = 32 + k.

    - Rounded up, r = ceil(2^s / f) = (2^s + e) / f, d = 0: exact if x·e < 2^s, so if e·f·2²⁰ ≤ 2^s.
    - Rounded down, r = floor(2^s / f) = (2^s − e') / f, d = 1: exact if (x + 1)·e' ≤ 2^s, so if e'·f·2²⁰ ≤ 2^s.

    As e + e' = f, the smaller is at most f/2, and f²·2¹⁹ < 2^(2k + 2 + 19) ≤ 2^(32 + k) for k ≤ 11: one of them always
    is exact. Powers of two, where r would be 2³², take r = 2³¹ and s = 31 + k; f = 1 takes r = 2³² − 1, which gives
    x − 1, and a start that is 4095 larger makes up for it: x + start + 4095 + (x − 1)·4095 = 4096·x + start.
    """
    entries = np.zeros((len(tables), NUM_SYMBOLS, 2), np.uint32)
    _set_entries(np.stack(tables).astype(np.int64), entries)
    return entries


def _times_x(value: int) -> int:
    """value · x mod P; bits are reflected: bit 31 is the coefficient of x⁰."""
    return value >> 1 ^ (_CRC_POLYNOMIAL if value & 1 else 0)


def _multiply(a: int, b: int) -> int:
    """a · b mod P."""
    product = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            product ^= b
        b = _times_x(b)
    return product


@cache
def crc_tables() -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint32]]:
    """For ``crc32``: u32 [4, 256], byte k of a state · x^(128·T); u32 [8T + 1], the powers x^(32·(i − 4T))."""
    words = 4 * _CRC_THREADS
    powers = np.zeros(2 * words + 1, np.uint32)
    up = down = 1 << 31
    powers[words] = up
    for i in range(1, words + 1):
        for _ in range(32):
            up = _times_x(up)
            # The inverse: what _times_x made odd or even shows in the highest bit, which only P sets.
            down = (down ^ _CRC_POLYNOMIAL) << 1 | 1 if down >> 31 else down << 1
        powers[words + i], powers[words - i] = up, down
    step = np.zeros((4, 256), np.uint32)
    for byte in range(4):
        for bit in range(8):
            step[byte, 1 << bit] = _multiply(1 << (8 * byte + bit), up)
        for value in range(1, 256):
            lowest = value & -value
            step[byte, value] = step[byte, value ^ lowest] ^ step[byte, lowest]
    return step, powers


@dataclass(frozen=True)
class DeviceEncoding:
    """A blob in a device's memory.

    ``blob`` u8 [blob_bytes] is a part of a larger buffer (16-byte aligned, sized before the tiles' sizes were known);
    ``front`` are its first bytes, for the host. ``stage_seconds`` if they were asked for.
    """

    header: BlobHeader
    blob: torch.Tensor
    front: bytes
    entropy_bits_per_element: float
    outlier_count: int
    stage_seconds: dict[str, float] = field(default_factory=dict)

    @property
    def payload(self) -> torch.Tensor:
        """u8: the blob without its front."""
        return self.blob[len(self.front) :]


class _Stages:
    """Wall-clock times of stages, the device's work included; without effect unless asked for."""

    def __init__(self, device: torch.device, wanted: bool) -> None:
        self.seconds: dict[str, float] = {}
        self._device, self._wanted = device, wanted
        self._began = self._now() if wanted else 0.0

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def done(self, name: str) -> None:
        """The work since the last call was stage ``name``."""
        if self._wanted:
            now = self._now()
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self._began
            self._began = now


def _parts(
    make: Callable[..., torch.Tensor], device: torch.device, *sizes: int
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """One tensor of i32, and the parts of it that have these sizes."""
    whole = make(sum(sizes), dtype=torch.int32, device=device)
    return whole, whole.split(sizes)


class _Copy:
    """A tensor's copy in page-locked memory (from torch's cache of such), under way while the device works on."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._host, self._done = tensor, None
        if tensor.device.type != "cpu":
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._done = torch.cuda.current_stream(tensor.device).record_event()

    def wait(self) -> npt.NDArray[Any]:
        if self._done is not None:
            self._done.synchronize()
        return self._host.numpy()


def _from_device(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """A copy in the host's memory; waits for the device."""
    return _Copy(tensor).wait()


def _to_device(array: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """A copy on the device, as i32."""
    values = torch.from_numpy(array.view(np.int32).reshape(-1))
    if device.type == "cpu":
        return values.clone()
    if array.nbytes > _STAGED_BYTES:
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


@dataclass(frozen=True)
class _Job:
    """The elements of one blob on a device, and how to launch kernels on them."""

    elements: torch.Tensor  # [matrices, rows, cols], contiguous, of the bits' width
    header: BlobHeader
    predictor: Predictor
    launcher: Launch

    @property
    def device(self) -> torch.device:
        return self.elements.device

    def launch(self, operation: str | Kernel, grid: int, block: int, *arguments: Any) -> None:
        """Launch a kernel, or the one of that name for this layout."""
        kernel = _kernel(operation, self.header.layout) if isinstance(operation, str) else operation
        self.launcher(kernel, grid, block, arguments, device=self.device)

    def shape(self) -> tuple[np.uint32, np.uint32, np.uint32]:
        """What most kernels take first, behind the elements."""
        return _U32(self.header.rows), _U32(self.header.cols), _U32(self.header.tile_cols)

    def launch_count(self, predictor: Predictor, summary: torch.Tensor | None) -> torch.Tensor:
        """Symbol histograms, i32 [num_tiles, 256]; their summary is added to ``summary``."""
        tiles = self.header.num_tiles
        counts = torch.empty((tiles, NUM_SYMBOLS), dtype=torch.int32, device=self.device)
        self.launch(
            "encode_count", tiles, TILE_ROWS, self.elements, *self.shape(), _U32(0), _U32(predictor), counts, summary
        )
        return counts

    def count(self, predictor: Predictor) -> npt.NDArray[np.int64]:
        """Symbol histograms, i64 [num_tiles, 256]."""
        return _from_device(self.launch_count(predictor, None)).astype(np.int64)


def _plan(job: _Job, tile_counts: npt.NDArray[np.int64], assignment: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
    """For each tile the index of its table, or which constant it is, or that it is raw (``encode_tiles.cuh``)."""
    plan = assignment.astype(np.int32)
    single = np.flatnonzero(assignment == CONSTANT)
    if len(single):
        if job.predictor == Predictor.PREVIOUS:
            # Mode constant has no predictor, and equal differences (a ramp) are not equal elements.
            tile_counts = job.count(Predictor.NONE)
        counts = tile_counts[single]
        constant = np.count_nonzero(counts, axis=1) == 1
        plan[single] = np.where(constant, _PLAN_CONSTANT - np.argmax(counts, axis=1), _PLAN_RAW)
    return plan


def _payload_limit(header: BlobHeader, outliers: int) -> int:
    """The most that a payload takes: no tile takes more than in mode raw."""
    total = 0
    for rows, down in ((TILE_ROWS, header.rows // TILE_ROWS), (header.rows % TILE_ROWS, 1)):
        for cols, across in ((header.tile_cols, header.cols // header.tile_cols), (header.cols % header.tile_cols, 1)):
            size = align(ceil_div(rows * cols * header.layout.element_bits, 8), ALIGNMENT_BYTES)
            total += down * across * header.matrices * size
    return total + OUTLIER_BYTES * outliers + (ALIGNMENT_BYTES * header.num_tiles if outliers else 0)


@kernel
def _pack_table(table, alphabet_size, packed):  # type: ignore[no-untyped-def]
    """Write ``table`` to ``packed`` as FORMAT.md §5.1 says; returns how many bytes it takes."""
    bits = filled = size = 0
    for symbol in range(alphabet_size):
        value = table[symbol] + 1
        power = width = 1
        while 2 * power <= value:
            power, width = 2 * power, width + 2
        # As many zeros as the value has bits below its highest, a one, those bits: lowest first.
        bits |= (power | (value - power) * power * 2) << filled
        filled += width
        while filled >= 8:
            packed[size] = bits & 0xFF
            bits >>= 8
            filled -= 8
            size += 1
    if filled:
        packed[size] = bits
        size += 1
    return size


def pack_table(table: Frequencies, alphabet_size: int) -> bytes:
    """The packed table; compiled, as the device would wait for :func:`kvpack.format.tables.pack_tables`."""
    packed = np.empty(4 * NUM_SYMBOLS, np.uint8)
    return packed[: _pack_table(table.astype(np.int64), alphabet_size, packed)].tobytes()


def _finish_front(
    header: BlobHeader, tables: list[Frequencies], packed: list[bytes], tiles: npt.NDArray[np.void], payload_bytes: int
) -> bytes:
    """As :func:`kvpack.encode.blob_encoder.finish_front`, with the tables packed already."""
    rans = tiles["mode"] == TileMode.RANS
    used = np.flatnonzero(np.bincount(tiles["table_index"][rans])).tolist()
    if len(used) < len(tables):
        tiles = tiles.copy()
        tiles["table_index"][rans] = np.searchsorted(used, tiles["table_index"][rans])
    encoding, section = TableEncoding.PACKED, b"".join(packed[index] for index in used)
    section += bytes(align(len(section), ALIGNMENT_BYTES) - len(section))
    if len(section) >= 2 * NUM_SYMBOLS * len(used):
        encoding, section = TableEncoding.PLAIN, b"".join(tables[index].astype("<u2").tobytes() for index in used)
    return pack_front(replace(header, table_encoding=encoding, num_tables=len(used)), section, tiles, payload_bytes)


def _encode(
    job: _Job,
    tile_counts: npt.NDArray[np.int64] | None,
    outliers: torch.Tensor | None,
    outlier_first: npt.NDArray[np.uint32] | None,
    scratch_bytes: int,
    stages: _Stages,
    *,
    guess: bool = True,
) -> Generator[None, None, DeviceEncoding]:
    """Encode a job's elements; yields before the host waits for the device, so that it may see to another blob.

    Args:
        guess: code with one table while the host finds out whether more are worth while.
    """
    header, device = job.header, job.device
    tiles = header.num_tiles
    zeros, (summary, first_end, second_end, no_plan, no_outliers) = _parts(
        torch.zeros, device, 2 * _SUMMARY_SIZE, 2, 2, tiles, tiles + 1
    )
    counts = sums = None
    if tile_counts is None:
        counts = job.launch_count(job.predictor, summary)
        sums = _Copy(summary)

    # In the meantime: memory for what comes next.
    steps = header.tile_cols // header.layout.codes_per_symbol
    lane_words = align(ceil_div(steps * PROBABILITY_BITS, _WORD_BITS) + 1, _LANE_WORDS_MULTIPLE)
    threads = align(min(header.rows, TILE_ROWS), GROUP_LANES)  # of a block that takes a tile
    slab = min(tiles, max(1, scratch_bytes // (2 * threads * lane_words)))
    lanes = slab * threads
    _, (words, states, lengths, tile_words, metadata) = _parts(
        torch.empty, device, lanes * lane_words // 2, lanes, lanes, tiles, tiles * TILE_METADATA_BYTES // 4
    )
    # Only the tiles tell how many tables are used: the front is put in front of the payload when it is known.
    front_room = align(HEADER_BYTES + 2 * NUM_SYMBOLS * MAX_TABLES + TILE_METADATA_BYTES * tiles, ALIGNMENT_BYTES)
    outlier_count = 0 if outlier_first is None else int(outlier_first[-1])
    limit = _payload_limit(header, outlier_count)
    buffer = torch.empty(front_room + limit, dtype=torch.uint8, device=device)
    payload = buffer[front_room:]
    outlier_first_at = no_outliers if outlier_first is None else _to_device(outlier_first, device)
    outliers_at = zeros if outliers is None else outliers  # zeros are never read
    previous, length_bytes = _U32(job.predictor), _U32(header.length_bytes)
    stages.done("count")

    def code(tables: list[Frequencies], plan: npt.NDArray[np.int32] | None, end: torch.Tensor) -> _Copy:
        """Launch all that makes the payload; returns the metadata. Without a plan, all tiles take the first table."""
        plan_at = no_plan if plan is None else _to_device(plan, device)
        entries_at = _to_device(encoder_entries(tables), device) if tables else zeros  # never read then
        stages.done("tables")
        for first in range(0, tiles, slab):
            count = min(slab, tiles - first)
            job.launch(
                "encode_lanes", count, threads, job.elements, *job.shape(), _U32(first), previous, plan_at,
                entries_at, _U32(lane_words), words, states, lengths, tile_words,
            )  # fmt: skip
            stages.done("lanes")
            job.launch(
                _PLACE, 1, _PLACE_THREADS, *job.shape(), _U32(first), _U32(count), previous, length_bytes,
                _U32(header.layout.element_bits), _U32(header.layout.raw_bits), plan_at, tile_words, outlier_first_at,
                metadata, end,
            )  # fmt: skip
            stages.done("place")
            job.launch(
                "encode_pack", count, threads, job.elements, *job.shape(), _U32(first), previous, length_bytes,
                plan_at, _U32(lane_words), words, states, lengths, outlier_first_at, outliers_at, metadata, payload,
            )  # fmt: skip
            stages.done("pack")
        launch_crc32(payload, metadata.view(-1, TILE_METADATA_BYTES // 4), job.launcher)
        copy = _Copy(metadata)
        stages.done("crc")
        return copy

    tables: list[Frequencies] = []
    placed = None
    if counts is not None and sums is not None:
        yield
        summed = sums.wait().view(np.int64)
        total, (least_units, constant_tiles) = summed[:NUM_SYMBOLS], summed[NUM_SYMBOLS:].tolist()
        if constant_tiles:
            tile_counts = _from_device(counts).astype(np.int64)
        else:
            common = CommonTable.of(total, header.layout)
            tables, least_bits = [common.table], least_units / _UNITS_PER_BIT
            settled = common.suffices(least_bits)
            copy = None if settled else _Copy(counts)
            if settled or guess:
                placed = code(tables, None, first_end)
            if copy is not None:
                yield
                tables, assignment = cluster_coded(copy.wait(), common, least_bits)
                if len(tables) > 1:
                    placed = code(tables, assignment.astype(np.int32), second_end)
                elif placed is None:
                    placed = code(tables, None, first_end)
    if placed is None:
        assert tile_counts is not None
        total = tile_counts.sum(axis=0)
        tables, assignment = cluster_tables(tile_counts, header.layout)
        placed = code(tables, _plan(job, tile_counts, assignment), first_end)

    packed = [pack_table(table, header.layout.alphabet_size) for table in tables]
    entropy = element_entropy_bits(header.layout, total[None])
    yield
    written = placed.wait().view(TILE_METADATA)
    last = written[-1]
    payload_bytes = align(int(last["data_offset"]) + int(last["data_size"]), ALIGNMENT_BYTES)
    front = _finish_front(header, tables, packed, written, payload_bytes)
    begin = front_room - len(front)
    buffer[begin:front_room].copy_(torch.from_numpy(np.frombuffer(bytearray(front), np.uint8)), non_blocking=True)
    stages.done("front")
    return DeviceEncoding(
        header=BlobHeader.parse(memoryview(front)),
        blob=buffer[begin : front_room + payload_bytes],
        front=front,
        entropy_bits_per_element=entropy,
        outlier_count=outlier_count,
        stage_seconds=stages.seconds,
    )


def _at_once(steps: Generator[None, None, DeviceEncoding]) -> DeviceEncoding:
    """What :func:`_encode` returns, waited for where it has to be."""
    while True:
        try:
            next(steps)
        except StopIteration as done:
            encoding: DeviceEncoding = done.value
            return encoding


def encode_beside_each_other(
    blobs: Sequence[tuple[torch.Tensor, BlobHeader]], *, launcher: Launch = launch
) -> list[memoryview]:
    """Encode several blobs, of which each alone would leave most of a GPU idle: the bytes of each, in host memory.

    Those of snapshots often have several tables, and the device has other work while the host chooses them, so that
    nothing is coded by a guess.

    Args:
        blobs: elements on one device, [num_elements] as of :func:`encode_on_device`, and their shape and layout; the
            header's tables are not looked at.
    """
    device = blobs[0][0].device
    coded: list[_Copy | None] = [None] * len(blobs)
    with forked(device, len(blobs)) as streams:
        waiting = {}
        for index, (elements, header) in enumerate(blobs):
            job = _Job(elements.view(header.matrices, header.rows, header.cols), header, Predictor.NONE, launcher)
            waiting[index] = _encode(job, None, None, None, SCRATCH_BYTES, _Stages(device, wanted=False), guess=False)
        while waiting:
            for index in list(waiting):
                with torch.cuda.stream(streams[index]):
                    try:
                        next(waiting[index])
                    except StopIteration as done:
                        coded[index] = _Copy(done.value.blob)
                        del waiting[index]
    return [copy.wait().data for copy in coded if copy is not None]


def launch_crc32(payload: torch.Tensor, metadata: torch.Tensor, launcher: Launch) -> None:
    """Write the CRCs of tiles to their metadata, i32 [tiles, 8] (FORMAT.md §6); offsets count from ``payload``."""
    step, powers = _crc_tables_on(payload.device)
    arguments = payload, _U32(0), step, powers, metadata
    launcher(_CRC, len(metadata), _CRC_THREADS, arguments, device=payload.device)


@cache
def _crc_tables_on(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    step, powers = crc_tables()
    if device.type == "cpu":
        return _to_device(step, device), _to_device(powers, device)
    # They are kept for launches on any stream, which do not wait for the one that asked first.
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        tables = _to_device(step, device), _to_device(powers, device)
    stream.synchronize()
    return tables


def encode_on_device(
    elements: torch.Tensor,
    layout: Layout,
    *,
    tile_cols: int | None = None,
    transposed: bool = False,
    predictor: Predictor = Predictor.NONE,
    scratch_bytes: int = SCRATCH_BYTES,
    time_stages: bool = False,
    launcher: Launch = launch,
) -> DeviceEncoding:
    """Encode unsigned elements [rows, cols] or [matrices, rows, cols] into a blob on their device.

    The counterpart of :func:`kvpack.encode.blob_encoder.encode_elements`, and the same bytes.

    Args:
        elements: u8 for elements of up to 8 bits, i16 (or u16) and i32 (u32) bit patterns for those of 16 and 32 bits;
            values of more than ``layout.element_bits`` bits are not looked for.
        scratch_bytes: how much the words may take before they are moved together.
        time_stages: fill ``stage_seconds``; costs a wait for the device at each stage.

    Raises:
        ValueError: no elements, a wrong dtype, or a predictor for a float kind.
    """
    if elements.ndim == 2:
        elements = elements[None]
    if elements.ndim != 3 or not elements.numel():
        raise ValueError(f"elements have shape {tuple(elements.shape)}; [matrices, rows, cols] is needed")
    expected = _BIT_PATTERNS[max(8, layout.element_bits)]
    if elements.dtype.is_floating_point or elements.element_size() != expected.itemsize:
        raise ValueError(f"elements are {elements.dtype}; {layout.element_bits} bits need {expected}")
    _check_predictor(layout, predictor)
    header = BlobHeader(
        layout=layout,
        rows=elements.shape[1],
        cols=elements.shape[2],
        tile_cols=tile_cols or even_tile_cols(elements.shape[1], elements.shape[2], layout),
        matrices=elements.shape[0],
        transposed=transposed,
    )
    stages = _Stages(elements.device, time_stages)
    job = _Job(elements.contiguous(), header, predictor, launcher)
    return _at_once(_encode(job, None, None, None, scratch_bytes, stages))


def _check_predictor(layout: Layout, predictor: Predictor) -> None:
    if predictor != Predictor.NONE and not layout.element_kind.is_integer:
        raise ValueError(f"{layout.element_kind.name} elements have no predictor")


def _sort_outliers(header: BlobHeader, strips: list[npt.NDArray[np.uint32] | None]) -> tuple[Any, Any]:
    """The outliers of all strips by tile, packed as FORMAT.md §7.5 says, and where each tile's begin (u32 [tiles + 1]).

    Within a tile they stay sorted by row and column.
    """
    per_tile = np.zeros(header.num_tiles + 1, np.int64)
    packed = [np.empty(0, np.uint32)]
    for index, outliers in enumerate(strips):
        if outliers is None or not len(outliers):
            continue
        row, col, delta = outliers.T.astype(np.uint32)
        tile_col, in_tile = np.divmod(col, _U32(header.tile_cols))
        order = np.argsort(tile_col, kind="stable")
        entry = pack_outliers(row, in_tile, delta, header.tile_cols)
        packed.append(entry[order])
        first = index * header.num_tiles_col + 1
        per_tile[first : first + header.num_tiles_col] = np.bincount(tile_col, minlength=header.num_tiles_col)
    return np.concatenate(packed), np.cumsum(per_tile).astype(np.uint32)


_WEIGHT_KINDS = {"float32": ElementKind.FP32, "float16": ElementKind.FP16, "bfloat16": ElementKind.BF16}


class _DeviceStrips(QuantizedStrips):
    """Strips that are quantized on a device, all at once; elements come back when the first strip is asked for."""

    def __init__(
        self,
        coder: _DeviceCoder,
        weights: Matrices,
        steps: npt.NDArray[np.float32],
        layout: Layout,
        rounding: Rounding,
    ) -> None:
        super().__init__(weights, steps, layout, rounding)
        self._coder = coder
        self._lock = threading.Lock()
        self._elements: torch.Tensor | None = None
        self._host: npt.NDArray[np.uint8] | None = None
        self._outliers = np.empty((0, 3), np.uint32)  # (row of all, column, delta + 2^14), sorted
        self._sums = (0, 0)

    def _on_device(self) -> torch.Tensor:
        if self._elements is None:
            self._elements = self._quantize()
        return self._elements

    def _quantize(self) -> torch.Tensor:
        weights, device = self.weights, self._coder.device
        if weights.feedback is not None:
            return self._quantize_with_feedback(weights.feedback)
        rows, cols = weights.matrices * weights.rows, weights.cols
        values = self._coder.weights_on_device(weights)
        elements = torch.empty((weights.matrices, weights.rows, cols), dtype=torch.uint8, device=device)
        steps = _to_device(np.ascontiguousarray(self.own_steps), device)
        thresholds = _to_device(self.rounding.thresholds, device)
        kernel = _quantize_kernel(_WEIGHT_KINDS[weights.dtype.name])
        capacity = weights.size // 64 + 1024
        while True:
            outliers = torch.empty(capacity, dtype=torch.int64, device=device)
            sums = torch.zeros(3, dtype=torch.int64, device=device)
            self._coder.launcher(
                kernel,
                min(_QUANTIZE_BLOCKS, ceil_div(rows, _QUANTIZE_THREADS // GROUP_LANES)),
                _QUANTIZE_THREADS,
                (
                    values, _U32(rows), _U32(cols), steps, _U32(len(self.own_steps) > 1), thresholds,
                    np.float32(self.rounding.clamp), np.int32(1 << (self.layout.element_bits - 1)), elements, outliers,
                    _U32(capacity), sums,
                ),
                device=device,
            )  # fmt: skip
            dot, energy, count = _from_device(sums).tolist()
            if count <= capacity:
                break
            capacity = count
        self._sums = dot, energy
        places = _from_device(outliers[:count].sort().values)
        row, col = np.divmod(places >> 16, cols)
        self._outliers = np.stack((row, col, places & 0xFFFF), axis=1).astype(np.uint32)
        return elements

    def _quantize_with_feedback(self, feedback: TensorFeedback) -> torch.Tensor:
        """Matrix by matrix; vectors are taken out of the weights as :meth:`.tensor_encoder.Matrices.values` does."""
        weights, device = self.weights, self._coder.device
        bits = self._coder.weights_on_device(weights)
        elements = torch.empty(bits.shape, dtype=torch.uint8, device=device)
        steps = torch.tensor(self.steps, dtype=torch.float32, device=device).view(weights.matrices, weights.rows)
        outliers = []
        for matrix in range(weights.matrices):
            first = matrix * weights.tile_rows
            values = bits[matrix].view(getattr(torch, weights.dtype.name)).float()
            if weights.column_scales is not None:
                values /= torch.tensor(weights.strip_column_scales(first), dtype=torch.float32, device=device)
            if weights.row_offsets is not None:
                own = weights.row_offsets[matrix * weights.rows :][: weights.rows]
                values -= torch.tensor(own, dtype=torch.float32, device=device)[:, None]
            of_matrix = feedback.of_matrix(matrix)
            assert isinstance(of_matrix, DeviceFeedback)  # of the coder that these strips are of
            fed_back = quantize_with_feedback(
                values, steps[matrix], self.layout.element_bits, self.rounding, of_matrix, self._coder.launcher
            )
            elements[matrix] = fed_back.elements
            from_place = np.array([matrix * weights.rows, 0, DELTA_OFFSET])
            outliers.append((_from_device(fed_back.outliers) + from_place).astype(np.uint32))
            row_errors = _from_device(fed_back.row_errors)
            for tile_row in range(weights.tile_rows):
                self._row_errors[first + tile_row] = row_errors[tile_row * TILE_ROWS : (tile_row + 1) * TILE_ROWS]
        self._outliers = np.concatenate(outliers)
        return elements

    def strip(self, index: int) -> Strip:
        with self._lock:
            if self._host is None:
                self._host = _from_device(self._on_device())
        rows = self.weights.strip_rows(index)
        first, last = np.searchsorted(self._outliers[:, 0], (rows.start, rows.stop))
        outliers = self._outliers[first:last] - np.array([rows.start, 0, 0], np.uint32)
        return Strip(self._host.reshape(-1, self.weights.cols)[rows], outliers)

    def count(self, header: BlobHeader, executor: ThreadPoolExecutor | None) -> QuantizedCounts:
        job = _Job(self._on_device(), header, Predictor.NONE, self._coder.launcher)
        return QuantizedCounts(job.count(Predictor.NONE), len(self._outliers), *self._sums)


class _DeviceCoder:
    """A coder whose data lie on a device; what strips' sources make there, or hold, is sent once for each source."""

    def __init__(self, device: torch.device, launcher: Launch) -> None:
        self.device, self.launcher = device, launcher
        self._sent: tuple[weakref.ref[Any], torch.Tensor, Any, Any] | None = None
        self._weights: tuple[weakref.ref[Matrices], torch.Tensor] | None = None

    def weights_on_device(self, weights: Matrices) -> torch.Tensor:
        """The weights' bits, [matrices, rows, cols]; those of the last tensor are kept."""
        if self._weights is not None and self._weights[0]() is weights:
            return self._weights[1]
        self._weights = None
        array = weights.array
        stored = array.swapaxes(1, 2) if weights.transposed else array
        host = torch.empty(
            stored.shape,
            dtype=_BIT_PATTERNS[8 * stored.dtype.itemsize],
            device="cpu",
            pin_memory=self.device.type == "cuda",
        )
        np.copyto(host.numpy(), stored.view(host.numpy().dtype))
        values = host.to(self.device, non_blocking=True)
        if weights.transposed:
            values = values.transpose(1, 2).contiguous()
        self._weights = weakref.ref(weights), values
        return values

    def quantize(
        self, weights: Matrices, steps: npt.NDArray[np.float32], layout: Layout, rounding: Rounding
    ) -> QuantizedStrips:
        """As :class:`kvpack.encode.tensor_encoder.QuantizedStrips`."""
        positive = steps[steps != 0]
        far_from_denormal = (np.isfinite(positive) & (positive >= _SMALLEST_STEP)).all()
        # The kernel that rounds each weight for itself takes weights as they are stored.
        if weights.feedback is None and (weights.vector_bytes or not far_from_denormal):
            return QuantizedStrips(weights, steps, layout, rounding)
        return _DeviceStrips(self, weights, steps, layout, rounding)

    def _send(
        self, header: BlobHeader, source: StripSource, executor: ThreadPoolExecutor | None
    ) -> tuple[torch.Tensor, Any, Any]:
        """Elements [matrices, rows, cols], packed outliers, and where each tile's begin."""
        if self._sent is not None and self._sent[0]() is source:
            return self._sent[1:]
        self._sent = None  # frees the last source's elements before there are new ones
        shape = header.matrices, header.rows, header.cols
        dtype = _BIT_PATTERNS[max(8, header.layout.element_bits)]
        host = torch.empty(shape, dtype=dtype, device="cpu", pin_memory=self.device.type == "cuda")
        array = host.numpy()

        def work(index: int) -> npt.NDArray[np.uint32] | None:
            matrix, tile_row = divmod(index, header.num_tiles_row)
            strip = source(index)
            first = tile_row * TILE_ROWS
            array[matrix, first : first + TILE_ROWS] = strip.elements.view(array.dtype)
            return strip.outliers

        strips = list(map_ordered(work, range(header.matrices * header.num_tiles_row), executor))
        packed, first = _sort_outliers(header, strips)
        elements = host if self.device.type == "cpu" else host.to(self.device, non_blocking=True)
        outliers = _to_device(packed, self.device) if len(packed) else None
        self._sent = weakref.ref(source), elements, outliers, first
        return elements, outliers, first

    def count_tiles(
        self,
        header: BlobHeader,
        source: StripSource,
        predictor: Predictor = Predictor.NONE,
        executor: ThreadPoolExecutor | None = None,
    ) -> npt.NDArray[np.int64]:
        """As :func:`kvpack.encode.blob_encoder.count_tiles`."""
        elements, _, _ = self._send(header, source, executor)
        return _Job(elements, header, predictor, self.launcher).count(predictor)

    def encode_strips(
        self,
        header: BlobHeader,
        source: StripSource,
        *,
        predictor: Predictor = Predictor.NONE,
        tile_counts: npt.NDArray[np.int64] | None = None,
        executor: ThreadPoolExecutor | None = None,
    ) -> EncodedBlob:
        """As :func:`kvpack.encode.blob_encoder.encode_strips`."""
        _check_predictor(header.layout, predictor)
        elements, outliers, first = self._send(header, source, executor)
        job = _Job(elements, header, predictor, self.launcher)
        stages = _Stages(self.device, wanted=False)
        encoding = _at_once(_encode(job, tile_counts, outliers, first, SCRATCH_BYTES, stages))
        self._sent = None
        return EncodedBlob(
            front=encoding.front,
            payload=_from_device(encoding.payload).data,
            entropy_bits_per_element=encoding.entropy_bits_per_element,
            outlier_count=encoding.outlier_count,
        )


def device_coder(device: torch.device | str, launcher: Launch = launch) -> Coder:
    """A coder for :func:`kvpack.encode.compress.compress` that works on ``device``.

    Raises:
        DeviceError: there is no such device, or something that kernels need is not installed.
    """
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise DeviceError(f"no device {device!r}: {error}") from None
    if launcher is launch:
        require_device(device)
        # With its index, or the threads that encode would take what is current to them.
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    coder = _DeviceCoder(device, launcher)
    if device.type == "cuda":
        keep_bytes = torch.cuda.mem_get_info(device)[0] // 2
        made_by = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    else:
        keep_bytes, made_by = CPU_CODER.keep_bytes, str(device)
    return Coder(
        coder.quantize,
        coder.count_tiles,
        coder.encode_strips,
        lambda second_moment, executor: device_feedback(second_moment, device),
        keep_bytes,
        made_by,
        tensors_at_once=1,  # of which it has the weights and the elements
    )
