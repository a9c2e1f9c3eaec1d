"""``kvpack kv bench``: what a saved context takes beside fp16, pages as they are, and general compressors; and how fast
the CPU codes it."""

from __future__ import annotations

import importlib
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from kvpack.bench.provenance import environment
from kvpack.encode.snapshot_coder import Blocks, decode_run, encode_run
from kvpack.encode.threads import default_threads
from kvpack.format.snapshot import RunPages, SnapshotFile

_ROUNDS = 5
_LEAST_SECONDS = 1.0
Row = dict[str, Any]
# (name, compress, decompress)
Compressor = tuple[str, Callable[[bytes], bytes], Callable[[bytes], bytes]]


def _compressors() -> Iterator[Compressor | tuple[str, str]]:
    yield "zlib 1", lambda data: zlib.compress(data, 1), zlib.decompress
    try:
        lz4 = importlib.import_module("lz4.frame")
        yield "lz4", lz4.compress, lz4.decompress
    except ModuleNotFoundError:
        yield "lz4", "not installed: pip install lz4"
    try:
        zstd = importlib.import_module("zstandard")
        for level in (3, 19):
            yield f"zstd {level}", zstd.ZstdCompressor(level=level).compress, zstd.ZstdDecompressor().decompress
    except ModuleNotFoundError:
        yield "zstd", "not installed: pip install zstandard"


def _seconds(work: Callable[[], object]) -> float:
    """The least of several runs: other load on the machine only ever adds."""
    best, spent, runs = float("inf"), 0.0, 0
    while runs < 1 or (runs < _ROUNDS and spent < _LEAST_SECONDS * _ROUNDS):
        began = time.perf_counter()
        work()
        taken = time.perf_counter() - began
        best, spent, runs = min(best, taken), spent + taken, runs + 1
    return best


def bench_snapshot(path: str | Path, threads: int | None = None) -> dict[str, Any]:
    """Sizes and speeds of a context; decoded pages are encoded again, and must give the file's blobs.

    Args:
        threads: of kvpack's coder; all cores by default. Compressors run on one.

    Returns:
        ``rows``: ``name``, ``bytes``, ``of_fp16``, ``of_pages``, ``encode_gb_per_s`` and ``decode_gb_per_s``, in 10^9
        bytes of pages a second; or ``name`` and ``reason``.

    Raises:
        SnapshotError, ContainerError: it is no snapshot, or damaged.
    """
    count = threads or default_threads()
    with SnapshotFile(path) as file, ThreadPoolExecutor(count) as executor:
        header, page_bytes, fp16_bytes = file.header, file.page_bytes, file.header.fp16_bytes
        decoded = [decode_run(file, run, executor) for run in range(header.runs)]
        held = {id(pages): blocks for run in decoded for pages, blocks in run}

        def blocks_of(pages: RunPages) -> Blocks:
            return held[id(pages)]

        def encode() -> int:
            runs = (encode_run([pages for pages, _ in run], blocks_of, executor) for run in decoded)
            return sum(len(blob) for run in runs for _, blob in run)

        def decode() -> None:
            for run in range(header.runs):
                decode_run(file, run, executor)

        coded_bytes = sum(
            file.container.tensors[part.name].size_bytes for run in decoded for pages, _ in run for part in pages.parts
        )
        if encode() != coded_bytes:
            raise AssertionError("pages that are encoded again take other bytes than in the file")

        def row(name: str, size_bytes: int, encode_s: float | None = None, decode_s: float | None = None) -> Row:
            return {
                "name": name,
                "bytes": size_bytes,
                "of_fp16": size_bytes / fp16_bytes,
                "of_pages": size_bytes / page_bytes,
                "encode_gb_per_s": None if encode_s is None else page_bytes / encode_s / 1e9,
                "decode_gb_per_s": None if decode_s is None else page_bytes / decode_s / 1e9,
            }

        rows: list[Row] = [row("fp16", fp16_bytes), row("pages", page_bytes)]
        rows.append(row("kvpack", file.container.file.size_bytes, _seconds(encode), _seconds(decode)))
    data = b"".join(np.ascontiguousarray(blocks).tobytes() for run in decoded for _, blocks in run)
    for found in _compressors():
        if len(found) == 2:
            rows.append({"name": found[0], "reason": found[1]})
            continue
        name, compress, decompress = found
        small = compress(data)
        rows.append(row(name, len(small), _seconds(partial(compress, data)), _seconds(partial(decompress, small))))
    return {
        "tokens": header.tokens,
        "formats": header.formats,
        "budget": header.budget,
        "threads": count,
        "elements": fp16_bytes // 2,
        "rows": rows,
        "environment": environment(("lz4", "zstandard")),
    }
