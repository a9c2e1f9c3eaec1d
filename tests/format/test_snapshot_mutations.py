"""Mutation fuzzing of snapshots: whatever happens to a file, a KvpackError comes out, or exactly the pages of before.

Files whose CRCs are mended may also hold other pages, as many as they claim. Of a damaged run nothing comes out.

``KVPACK_SNAPSHOT_MUTANTS=20000`` does more of the same.
"""

from __future__ import annotations

import json
import os
import random
import struct
import tempfile
import tracemalloc
import zlib
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import blob_surgery as surgery
import numpy as np
import pytest
from snapshot_samples import SamplePages, make_header, mixed_formats
from test_mutations import mutate as mutate_blob

from kvpack.encode.snapshot_coder import decode_runs, verify_snapshot
from kvpack.errors import DamagedRunError, KvpackError
from kvpack.format.snapshot import SNAPSHOT_CRC_KEY, SNAPSHOT_KEY, SnapshotFile, snapshot_crc32

MUTANTS = int(os.environ.get("KVPACK_SNAPSHOT_MUTANTS", "560"))
# Pages of the base have 25,000 bytes. What a reader takes for them, and for Python's own objects, is far below that.
MOST_MEMORY = 4 << 20
VALUES = (
    0,
    1,
    -1,
    2,
    3,
    63,
    64,
    65,
    4095,
    4096,
    1 << 20,
    1 << 24,
    1 << 31,
    1 << 63,
    0.5,
    1e300,
    None,
    True,
    "x",
    [],
    {},
)

Content = list[tuple[Any, ...]]


@cache
def base() -> bytes:
    """Two runs, all formats, some arrays."""
    header = make_header(64 * 4 + 9, 2, 1, 16, run_pages=3, first_page=2)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        SamplePages(header, mixed_formats(header)).write(
            path,
            positions=np.arange(header.tokens, dtype=np.int32),
            importance=rng.random((2, 2, 5)).astype(np.float32),
        )
        return path.read_bytes()


def content(path: Path) -> Content:
    """All that a snapshot says."""
    found: Content = []
    with SnapshotFile(path) as file:
        found.append((file.header.to_json(),))
        for name in ("tokens", "positions", "page_formats", "importance"):
            array = file.array(name)
            found.append((name, None if array is None else array.tobytes()))
        for run, decoded in decode_runs(file, range(file.header.runs)):
            for pages, blocks in decoded:
                assert blocks.shape == pages.block_shape
                found.append((run, pages.side, pages.format, blocks.tobytes()))
    return found


def split(data: bytes) -> tuple[dict[str, Any], bytearray]:
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), bytearray(data[8 + size :])


def joined(header: dict[str, Any], data: bytes) -> bytes:
    text = json.dumps(header, separators=(",", ":")).encode()
    return struct.pack("<Q", len(text)) + text + data


def flip(rng: random.Random, data: bytes) -> bytes:
    mutant = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        mutant[rng.randrange(len(mutant))] ^= 1 << rng.randrange(8)
    return bytes(mutant)


def flip_header(rng: random.Random, data: bytes) -> bytes:
    (size,) = struct.unpack("<Q", data[:8])
    mutant = bytearray(data)
    at = rng.randrange(8 + size)
    mutant[at] = rng.choice((mutant[at] ^ 1 << rng.randrange(8), rng.randrange(256), ord("9")))
    return bytes(mutant)


def cut(rng: random.Random, data: bytes) -> bytes:
    at = rng.randrange(len(data))
    size = rng.choice((1, 4, 64, len(data)))
    return data[:at] + rng.choice((b"", rng.randbytes(size % 1000))) + data[at + size :]


def change_table(rng: random.Random, data: bytes) -> bytes:
    """The list of tensors."""
    header, body = split(data)
    names = [name for name in header if name != "__metadata__"]
    a, b = rng.sample(names, 2)
    match rng.randrange(5):
        case 0:
            header[a], header[b] = header[b], header[a]
        case 1:
            header[a + rng.choice("x0.")] = header.pop(a)
        case 2:
            del header[a]
        case 3:
            header[a]["dtype"] = rng.choice(("U8", "I8", "I32", "U32", "F32", "F64", "BOOL"))
        case _:
            header[a][rng.choice(("shape", "data_offsets"))] = [rng.choice(VALUES) for _ in range(rng.randrange(3))]
    return joined(header, body)


def change_own_header(rng: random.Random, data: bytes) -> bytes:
    """What the snapshot says of itself, with a right CRC."""
    header, body = split(data)
    fields = json.loads(header["__metadata__"][SNAPSHOT_KEY])
    for _ in range(rng.choice((1, 1, 2, 3))):
        name = rng.choice(sorted(fields))
        if rng.randrange(8) == 0:
            fields.pop(name)
        else:
            fields[name] = rng.choice(VALUES)
    text = json.dumps(fields)
    header["__metadata__"] |= {SNAPSHOT_KEY: text, SNAPSHOT_CRC_KEY: snapshot_crc32(text)}
    return joined(header, body)


def mended(header: dict[str, Any], data: bytes, name: str) -> bytes:
    """With a right CRC of a tensor."""
    begin, end = header[name]["data_offsets"]
    crc32 = json.loads(header["__metadata__"]["kvpack_crc32"])
    crc32[name] = zlib.crc32(data[begin:end])
    header["__metadata__"]["kvpack_crc32"] = json.dumps(crc32)
    return joined(header, data)


def change_page_formats(rng: random.Random, data: bytes) -> bytes:
    header, body = split(data)
    begin, end = header["page_formats"]["data_offsets"]
    for _ in range(rng.choice((1, 2))):
        body[rng.randrange(begin, end)] = rng.choice((*range(8), 8, 255))
    return mended(header, bytes(body), "page_formats")


def change_blob(rng: random.Random, data: bytes) -> bytes:
    """A blob, with right CRCs all around, and the other tensors where they belong."""
    header, body = split(data)
    name = rng.choice([name for name in header if name.startswith("run.")])
    begin, end = header[name]["data_offsets"]
    blob = bytearray(body[begin:end])
    mutate_blob(rng, blob)
    if rng.randrange(3):
        surgery.mend_crcs(blob)
    change = len(blob) - (end - begin)
    for other, tensor in header.items():
        if other != "__metadata__":
            tensor["data_offsets"] = [at + change * (at >= end) for at in tensor["data_offsets"]]
    header[name] |= {"shape": [len(blob)], "data_offsets": [begin, begin + len(blob)]}
    return mended(header, bytes(body[:begin] + blob + body[end:]), name)


# Each with whether other pages than those of before may come out: if CRCs are mended, or blobs stand in each other's
# place, which verifying tells.
KINDS: dict[str, tuple[Callable[[random.Random, bytes], bytes], bool]] = {
    "flip": (flip, False),
    "flip header": (flip_header, False),
    "cut": (cut, False),
    "table": (change_table, True),
    "own header": (change_own_header, True),
    "page formats": (change_page_formats, True),
    "blob": (change_blob, True),
}


def fuzz(folder: Path, count: int, seed: int = 0) -> Counter[str]:
    """What became of mutants, by kind and result."""
    path = folder / "mutant.safetensors"
    path.write_bytes(base())
    expected = content(path)
    rng = random.Random(seed)
    results: Counter[str] = Counter()
    for number in range(count):
        kind = list(KINDS)[number % len(KINDS)]
        change, may_differ = KINDS[kind]
        data = change(rng, base())
        path.write_bytes(data)
        watch_memory = number % 5 == 0  # which takes most of the time
        if watch_memory:
            tracemalloc.start()
        try:
            found = content(path)
        except KvpackError as error:
            results[f"{kind}: {type(error).__name__}"] += 1
            if isinstance(error, DamagedRunError):
                assert verify_snapshot(path).damage is not None
        else:
            same = found == expected
            assert same or may_differ, f"{kind}: mutant {number} of seed {seed} holds other pages"
            if kind == "table" and not same:
                assert verify_snapshot(path).damage is not None
            results[f"{kind}: {'the same' if same else 'decoded'}"] += 1
        if watch_memory:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak < MOST_MEMORY + 8 * len(data), f"{kind}: mutant {number} took {peak} bytes"
    return results


def test_mutants_are_refused_by_name_or_are_the_same(tmp_path: Path) -> None:
    results = fuzz(tmp_path, MUTANTS)
    assert results.total() == MUTANTS
    kinds = Counter(result.partition(":")[0] for result in results.elements())
    assert min(kinds.values()) >= MUTANTS // len(KINDS)
    # Nearly all must be refused; blobs with mended CRCs may decode.
    for kind in ("flip", "cut", "table"):
        assert results[f"{kind}: the same"] <= kinds[kind] // 10
    assert results["blob: DamagedRunError"] > kinds["blob"] // 3
    assert results["own header: SnapshotHeaderError"] > kinds["own header"] // 2


@pytest.mark.parametrize("first", [0, 50])
def test_truncated_files_are_refused(tmp_path: Path, first: int) -> None:
    path = tmp_path / "x.safetensors"
    for size in range(first, len(base()), 97):
        path.write_bytes(base()[:size])
        with pytest.raises(KvpackError):
            SnapshotFile(path)
