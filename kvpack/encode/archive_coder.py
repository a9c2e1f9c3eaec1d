"""Archives: snapshots made smaller for cold storage, at the price of noise that is stated (docs/FORMAT.md §9.7).

Keys are turned back to position 0 where RoPE is known, since they vary slowly there. What varies around the mean of
each channel is rotated so that its components are independent (PCA), where there are enough tokens to pay for the
rotations, and quantized with one step for each head. What most components hold is then 0 or nearly so, which is what
entropy coding is for. An archive is a file of coded tensors; :func:`restore_snapshot` makes a snapshot of it again.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvpack.encode.blob_encoder import EncodedBlob, Strip, count_tiles, encode_strips, estimate_blob_bytes
from kvpack.encode.page_coder import FLOAT_TYPES, dequantize_blocks, quantize_blocks
from kvpack.encode.quantize import DELTA_OFFSET
from kvpack.encode.reader import Reader
from kvpack.encode.snapshot_coder import Blocks, decode_runs, encode_run, write_snapshot
from kvpack.errors import InputError, NotASnapshotError, SnapshotHeaderError
from kvpack.format.container import CONTAINER_VERSION, CRC_KEY, TENSORS_KEY, VERSION_KEY, Container, ContainerWriter
from kvpack.format.header import BlobHeader
from kvpack.format.json_limits import load_json
from kvpack.format.layout import GROUP_LANES, MAX_TILE_COLS, ElementKind, Layout, align, ceil_div, outlier_delta_max
from kvpack.format.pages import PAGE_TOKENS, Side
from kvpack.format.snapshot import (
    ARCHIVE_KEY,
    PAGE_FORMAT_OF_DTYPE,
    RunPages,
    SnapshotFile,
    SnapshotHeader,
    array_rules,
    check_elements,
    check_page_formats,
    check_values,
    run_pages,
    snapshot_crc32,
)

ARCHIVE_CRC_KEY = "kvpack_archive_crc32"
ARCHIVE_VERSION = 1
# The first tokens, which most queries look at, keep their 16 bits. The last ones, which the next query looks at most,
# have a finer step: 2 bits more a number are little for so few.
EXACT_TOKENS = 4
RECENT_TOKENS = 64
RECENT_FINER = 4
# Rotations of D × D numbers of 16 bits save 0.2 to 0.3 bit a number: they pay from so many tokens a dimension on.
_PCA_TOKENS = 64
# A magnitude is rounded up from here on: to nearest would be 0.5, but zeros cost the least bits.
_ROUND_UP_FROM = 0.6
# Bits of an integer, of a code, and codes of a symbol; what lies beyond is an outlier.
_LAYOUTS = [Layout(ElementKind.SIGNED, n, n, g) for n, g in ((2, 4), (3, 2), (4, 2), (5, 1), (6, 1), (8, 1))]

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class ArchiveReport:
    """What an archive takes and costs.

    Attributes:
        file_bytes: all counted.
        fp16_bytes: of the same numbers in 16 bits.
        key_noise, value_noise: RMS of what keys and values are off by, over the RMS of what they vary by around their
            channels' means. Scores of queries that look in all directions alike are off by the same share.
    """

    file_bytes: int
    fp16_bytes: int
    key_noise: float
    value_noise: float


def _values(file: SnapshotFile, executor: ThreadPoolExecutor | None) -> list[Floats]:
    """Keys and values f32 [layers, heads, tokens, head_dim]."""
    header = file.header
    shape = header.layers, header.kv_heads, header.pages * PAGE_TOKENS, header.head_dim
    found = [np.empty(shape, np.float32) for _ in Side]
    for _, run in decode_runs(file, range(header.runs), executor=executor):
        for pages, blocks in run:
            numbers = dequantize_blocks(blocks, pages.layout)
            for layer, index, page in zip(pages.layers, pages.indices, numbers, strict=True):
                found[pages.side][layer, :, index * PAGE_TOKENS : (index + 1) * PAGE_TOKENS] = page
    return [side[:, :, : header.tokens] for side in found]


def turned(keys: Floats, positions: npt.NDArray[np.int64], frequencies: Sequence[float], sign: int) -> Floats:
    """Keys [..., tokens, head_dim] turned by ``sign`` × position × frequency: dimension d with d + (their number), of
    the first 2 × (their number)."""
    half = len(frequencies)
    angles = positions[:, None] * np.asarray(frequencies, np.float64)
    cos, sin = np.cos(angles).astype(np.float32), (sign * np.sin(angles)).astype(np.float32)
    a, b = keys[..., :half], keys[..., half : 2 * half]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin, keys[..., 2 * half :]], axis=-1)


def _rotations(around: Floats) -> npt.NDArray[np.float16]:
    """The directions in which each head's [layers, heads, tokens, D] vary, most first: [layers, heads, D, D]."""
    _, vectors = np.linalg.eigh(np.einsum("lhtd,lhte->lhde", around, around, optimize=True).astype(np.float64))
    return np.ascontiguousarray(vectors[..., ::-1]).astype(np.float16)


def _quantized(around: Floats, steps: Floats) -> npt.NDArray[np.int32]:
    """[layers, heads, tokens, D] with steps [layers, heads] → integers in the order of lanes, [rows, tokens]."""
    scaled = around / steps[..., None, None]
    magnitudes = np.floor(np.abs(scaled) + np.float32(1 - _ROUND_UP_FROM))
    signed = np.copysign(magnitudes, scaled).astype(np.int32)
    return np.ascontiguousarray(signed.swapaxes(2, 3)).reshape(-1, around.shape[2])


def _segments(name: str, tokens: int) -> list[tuple[str, slice, int]]:
    """(tensor, tokens, by what the step is divided) of what is behind the exact tokens."""
    early = max(0, tokens - RECENT_TOKENS)
    found = [(f"{name}.early", slice(0, early), 1), (f"{name}.recent", slice(early, tokens), RECENT_FINER)]
    return [segment for segment in found if segment[1].stop > segment[1].start]


def _encode(integers: npt.NDArray[np.int32], executor: ThreadPoolExecutor | None) -> tuple[EncodedBlob, BlobHeader]:
    """The smallest blob of integers [rows, tokens] as matrices of 32 rows."""
    rows, tokens = integers.shape
    tile_cols = align(ceil_div(tokens, ceil_div(tokens, MAX_TILE_COLS)), GROUP_LANES)
    matrix_rows = math.gcd(rows, GROUP_LANES)
    best: tuple[float, BlobHeader] | None = None

    def source(header: BlobHeader) -> Any:
        half = 1 << (header.layout.element_bits - 1)

        def strip(index: int) -> Strip:
            q = integers[index * matrix_rows : (index + 1) * matrix_rows]
            inside = np.clip(q, -half, half - 1)
            row, col = np.nonzero(q != inside)
            outliers = np.stack([row, col, (q - inside)[row, col] + DELTA_OFFSET], axis=1).astype(np.uint32)
            return Strip((inside + half).astype(np.uint8), outliers)

        return strip

    for layout in _LAYOUTS:
        half = 1 << (layout.element_bits - 1)
        beyond = (integers < -half) | (integers >= half)
        header = BlobHeader(layout, matrix_rows, tokens, tile_cols, matrices=rows // matrix_rows)
        counts = count_tiles(header, source(header), executor=executor)
        size = estimate_blob_bytes(header, counts, int(beyond.sum()))
        if best is None or size < best[0]:
            best = size, header
    assert best is not None
    return encode_strips(best[1], source(best[1]), executor=executor), best[1]


def _stored(name: str, array: npt.NDArray[Any]) -> tuple[str, str, tuple[int, ...], bytes]:
    dtype = {"uint8": "U8", "int32": "I32", "float16": "F16", "float32": "F32", "float64": "F64", "uint16": "U16"}
    little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    return name, dtype[array.dtype.name], array.shape, little.tobytes()


def archive_snapshot(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    noise: float = 0.3,
    rope_frequencies: Sequence[float] | None = None,
    executor: ThreadPoolExecutor | None = None,
) -> ArchiveReport:
    """Write an archive of a snapshot; the snapshot stays as it is. All numbers are in memory in fp32 meanwhile.

    Args:
        noise: how large a step is, over √12 of what a head varies by: about the noise that keys and values get, as long
            as it is well below 1.
        rope_frequencies: by how much of a radian a position turns each pair (d, d + half) of dimensions, if keys are
            turned so; None: keys are taken as they are, which takes some 0.25 bit a number more.

    Raises:
        InputError: a noise that is not above 0 and at most 2, or frequencies that do not fit; numbers that are not
            finite or beyond what integers of the format hold.
        SnapshotError, ContainerError: the snapshot cannot be read.
    """
    if not 0.01 <= noise <= 2:
        raise InputError(f"noise is {noise}; it must be from 0.01 to 2")
    with SnapshotFile(source) as file:
        header = file.header
        frequencies = None if rope_frequencies is None else [float(f) for f in rope_frequencies]
        if frequencies is not None and not (
            0 < len(frequencies) <= header.head_dim // 2 and np.isfinite(frequencies).all()
        ):
            raise InputError(
                f"{len(frequencies)} rope_frequencies; 1 to {header.head_dim // 2} finite ones fit head_dim"
            )
        arrays = {name: found for name in array_rules(header) if (found := file.array(name)) is not None}
        sides = _values(file, executor)
    if not all(np.isfinite(side).all() for side in sides):
        raise InputError(f"{os.fspath(source)}: numbers that are not finite cannot be archived")
    exact = min(EXACT_TOKENS, header.tokens)
    tensors = [_stored(name, array) for name, array in arrays.items()]
    blobs: list[tuple[str, bytes]] = []
    entries: dict[str, Any] = {}
    noises = []
    for side, values in zip(Side, sides, strict=True):
        name = side.name
        first = values[:, :, :exact].astype(FLOAT_TYPES[PAGE_FORMAT_OF_DTYPE[header.dtype]]).view(np.uint16)
        tensors.append(_stored(f"{name}.first", first))
        if header.tokens == exact:
            noises.append(0.0)
            continue
        rest = values[:, :, exact:]
        if side == Side.K and frequencies is not None:
            rest = turned(rest, _positions(header, arrays)[exact:], frequencies, -1)
        means = rest.mean(axis=2)
        around = rest - means[:, :, None]
        varies = np.sqrt(np.mean(np.square(around), axis=(2, 3)))
        steps = np.maximum(varies * np.float32(noise * math.sqrt(12)), np.float32(2.0**-100))
        # A rotation makes nothing longer than all of a token's numbers together.
        far = RECENT_FINER * float((np.sqrt(np.square(around).sum(axis=3)).max(axis=2) / steps).max())
        if far > outlier_delta_max(MAX_TILE_COLS):
            raise InputError(f"noise {noise} is too little: a token of {name} is {far:.0f} steps from the mean")
        if rest.shape[2] >= _PCA_TOKENS * header.head_dim:
            rotations = _rotations(around)
            tensors.append(_stored(f"{name}.rotations", rotations))
            around = np.einsum("lhtd,lhde->lhte", around, rotations.astype(np.float32), optimize=True)
        tensors.append(_stored(f"{name}.means", means.astype(np.float32)))
        off = 0.0
        for part, tokens, finer in _segments(name, rest.shape[2]):
            integers = _quantized(around[:, :, tokens], steps / np.float32(finer))
            lanes = integers.reshape(*steps.shape, header.head_dim, -1).swapaxes(2, 3)
            off += float(
                np.square(lanes * (steps / finer)[..., None, None] - around[:, :, tokens]).sum(dtype=np.float64)
            )
            blob, blob_of = _encode(integers, executor)
            blobs.append((f"{part}_kvpack", blob.data))
            row_steps = np.repeat((steps / np.float32(finer)).reshape(-1), header.head_dim)
            tensors.append(_stored(f"{part}_kvpack_scale", row_steps))
            of_blob = [blob_of.matrices, blob_of.rows, blob_of.cols]
            entries[part] = {"shape": of_blob, "dtype": "F32", "method": "uniform"}
        noises.append(math.sqrt(off / max(around.size * float(np.mean(np.square(varies))), 1e-30)))
    text = json.dumps(
        {
            "version": ARCHIVE_VERSION,
            "snapshot": json.loads(header.to_json()),
            "exact_tokens": exact,
            "rope_frequencies": frequencies,
            "noise": noise,
            "key_noise": noises[Side.K],
            "value_noise": noises[Side.V],
        },
        separators=(",", ":"),
    )
    with ContainerWriter(target) as writer:
        for stored, dtype, shape, data in sorted(tensors, key=lambda tensor: tensor[1][1:], reverse=True):
            writer.add(stored, dtype, shape, [data])
        for stored, data in blobs:
            writer.add(stored, "U8", (len(data),), [data])
        size = writer.finish(
            {
                VERSION_KEY: CONTAINER_VERSION,
                TENSORS_KEY: json.dumps(entries),
                CRC_KEY: json.dumps({stored: zlib.crc32(data) for stored, _, _, data in tensors}),
                ARCHIVE_KEY: text,
                ARCHIVE_CRC_KEY: snapshot_crc32(text),
            }
        )
    return ArchiveReport(size, header.fp16_bytes, noises[Side.K], noises[Side.V])


def _positions(header: SnapshotHeader, arrays: dict[str, npt.NDArray[Any]]) -> npt.NDArray[np.int64]:
    if "positions" in arrays:
        return arrays["positions"].astype(np.int64)
    return np.arange(header.tokens) + PAGE_TOKENS * header.first_page


@dataclass(frozen=True)
class Archive:
    """What an archive says of itself.

    Attributes:
        snapshot: the header of the snapshot that it was made of.
        exact_tokens: how many of the first tokens have their 16 bits.
        rope_frequencies: by which keys have been turned back, or None.
        noise, key_noise, value_noise: what was asked for, and what came of it (:class:`ArchiveReport`).
    """

    snapshot: SnapshotHeader
    exact_tokens: int
    rope_frequencies: tuple[float, ...] | None
    noise: float
    key_noise: float
    value_noise: float


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and abs(value) < 1e6  # type: ignore[arg-type]


def read_archive_header(path: str | os.PathLike[str]) -> Archive:
    """What an archive is of, without its numbers.

    Raises:
        NotASnapshotError: no archive.
        SnapshotHeaderError, ContainerError: it is damaged.
        LimitError: it says that it has more numbers than a file of its size may have.
    """
    with Container(path) as container:
        file_bytes = container.file.size_bytes
        text = container.metadata.get(ARCHIVE_KEY)
        given = container.metadata.get(ARCHIVE_CRC_KEY)
    if text is None:
        raise NotASnapshotError(f"{os.fspath(path)}: no {ARCHIVE_KEY} in __metadata__: no archive of a KV cache")
    if given != snapshot_crc32(text):
        raise SnapshotHeaderError(
            f"{os.fspath(path)}: {ARCHIVE_CRC_KEY} is {given!r}, computed {snapshot_crc32(text)!r}"
        )
    try:
        fields = load_json(text.encode())
    except ValueError as error:
        raise SnapshotHeaderError(f"{os.fspath(path)}: {ARCHIVE_KEY} is not valid JSON: {error}") from None
    if not isinstance(fields, dict) or fields.get("version") != ARCHIVE_VERSION:
        raise SnapshotHeaderError(f"{os.fspath(path)}: {ARCHIVE_KEY} has no version that this reader knows")
    snapshot = SnapshotHeader.parse(json.dumps(fields.get("snapshot")))
    check_elements(snapshot, file_bytes)
    exact, frequencies = fields.get("exact_tokens"), fields.get("rope_frequencies")
    numbers: list[Any] = [fields.get(key) for key in ("noise", "key_noise", "value_noise")]
    if (
        type(exact) is not int
        or not 0 <= exact <= snapshot.tokens
        or not all(map(_is_number, numbers))
        or not (
            frequencies is None
            or (
                isinstance(frequencies, list)
                and 0 < len(frequencies) <= snapshot.head_dim // 2
                and all(map(_is_number, frequencies))
            )
        )
    ):
        raise SnapshotHeaderError(f"{os.fspath(path)}: {ARCHIVE_KEY} has an illegal value")
    return Archive(snapshot, exact, None if frequencies is None else tuple(frequencies), *numbers)


def _side_values(reader: Reader, archive: Archive, side: Side, positions: npt.NDArray[np.int64]) -> Floats:
    """Keys or values f32 [layers, heads, tokens, head_dim]."""
    header, exact = archive.snapshot, archive.exact_tokens
    outer = header.layers, header.kv_heads
    dim, rest = header.head_dim, header.tokens - exact

    def stored(name: str, dtype: str, *shape: int) -> npt.NDArray[Any]:
        if name not in reader or reader.dtype(name) != dtype:
            raise SnapshotHeaderError(f"{reader.path}: tensor {name!r} is missing, or not {dtype}")
        found = reader.dequantize(name) if reader.info(name) is not None else reader.stored(name)
        if math.prod(found.shape) != math.prod(shape):
            raise SnapshotHeaderError(f"{reader.path}: tensor {name!r} is {list(found.shape)}, of {list(shape)}")
        return found.reshape(shape)

    bits = stored(f"{side.name}.first", "U16", *outer, exact, dim)
    first = bits.view(FLOAT_TYPES[PAGE_FORMAT_OF_DTYPE[header.dtype]]).astype(np.float32)
    if not rest:
        return _finite(np.asarray(first), reader, side)
    segments = [
        stored(part, "F32", *outer, dim, tokens.stop - tokens.start).swapaxes(2, 3)
        for part, tokens, _ in _segments(side.name, rest)
    ]
    values: Floats = np.concatenate(segments, axis=2)
    if f"{side.name}.rotations" in reader:
        rotations = stored(f"{side.name}.rotations", "F16", *outer, dim, dim).astype(np.float32)
        values = np.einsum("lhte,lhde->lhtd", values, rotations, optimize=True)
    values = values + stored(f"{side.name}.means", "F32", *outer, dim)[:, :, None]
    if side == Side.K and archive.rope_frequencies is not None:
        values = turned(values, positions[exact:], archive.rope_frequencies, 1)
    return _finite(np.concatenate([first, values], axis=2, dtype=np.float32), reader, side)


def _finite(values: Floats, reader: Reader, side: Side) -> Floats:
    """
    Raises:
        SnapshotHeaderError: there are others, which no archive is made of.
    """
    if not np.isfinite(values).all():
        raise SnapshotHeaderError(f"{reader.path}: numbers of {side.name} are not finite")
    return values


def restore_snapshot(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    executor: ThreadPoolExecutor | None = None,
) -> int:
    """Write a snapshot of what an archive holds, with pages of the formats that it was made of; returns its bytes.

    Its pages are not those of before, but of numbers that are off by the archive's noise.

    Raises:
        NotASnapshotError, SnapshotHeaderError, ContainerError, BlobError: no archive, or damaged.
    """
    archive = read_archive_header(source)
    header = archive.snapshot
    with Reader(source) as reader:
        arrays = {}
        for name, rule in array_rules(header).items():
            if name in reader:
                arrays[name] = reader.stored(name)
                if not rule.fits(reader.dtype(name), arrays[name].shape):
                    raise SnapshotHeaderError(f"{os.fspath(source)}: tensor {name!r} is {list(arrays[name].shape)}")
                check_values(name, arrays[name])
            elif rule.needed:
                raise SnapshotHeaderError(f"{os.fspath(source)}: tensor {name!r} is missing")
        check_page_formats(header, arrays["page_formats"])
        positions = _positions(header, arrays)
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused
            sides = [_side_values(reader, archive, side, positions) for side in Side]
    largest = np.float32(65504) if header.dtype == "F16" else np.finfo(np.float32).max

    def blocks(pages: RunPages) -> Blocks:
        made = []
        for layer, index in zip(pages.layers.tolist(), pages.indices.tolist(), strict=True):
            found = sides[pages.side][layer, :, index * PAGE_TOKENS : (index + 1) * PAGE_TOKENS]
            page = np.zeros((header.kv_heads, PAGE_TOKENS, header.head_dim), np.float32)
            page[:, : found.shape[1]] = np.clip(found, -largest, largest)
            made.append(page.astype(FLOAT_TYPES.get(pages.format, np.dtype(np.float32))))
        return np.ascontiguousarray(quantize_blocks(np.stack(made), pages.layout))

    def runs() -> Iterator[Iterator[tuple[str, bytes]]]:
        for run in range(header.runs):
            yield encode_run(run_pages(header, arrays["page_formats"], run), blocks, executor)

    return write_snapshot(target, header, arrays, runs())
