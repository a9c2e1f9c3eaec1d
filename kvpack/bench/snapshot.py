"""``kvpack bench snapshot``, which ``kvpack kv bench`` is too: what a saved context takes beside fp16, pages as they
are, and general compressors; how fast it is coded, and what a load saves of a prefill."""

from __future__ import annotations

import importlib
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from kvpack.bench.provenance import environment, kvpack_command
from kvpack.bench.report import Report, Row
from kvpack.bench.snapshot_report import CONSTRUCTED, NOTE, SCHEMA
from kvpack.encode.snapshot_coder import Blocks, decode_run, encode_run
from kvpack.encode.threads import default_threads
from kvpack.errors import NotInstalledError
from kvpack.format.snapshot import RunPages, SnapshotFile

_ROUNDS = 5
_LEAST_SECONDS = 1.0
# zstd 19 takes half a minute for so many.
_SLOW_BYTES = 64 << 20
_PACKAGES = ("torch", "cupy-cuda13x", "cupy-cuda12x", "lz4", "zstandard")
# Of the pages that are constructed where no file is given.
_LAYERS, _TOKENS = 2, 4096
# (name, compress, decompress)
Compressor = tuple[str, Callable[[bytes], bytes], Callable[[bytes], bytes]]


def _compressors(size_bytes: int) -> Iterator[Compressor | tuple[str, str]]:
    yield "zlib 1", lambda data: zlib.compress(data, 1), zlib.decompress
    try:
        lz4 = importlib.import_module("lz4.frame")
        yield "lz4", lz4.compress, lz4.decompress
    except ModuleNotFoundError:
        yield "lz4", "not installed: pip install lz4"
    try:
        zstd = importlib.import_module("zstandard")
        for level in (3, 19):
            if level > 3 and size_bytes > _SLOW_BYTES:
                yield f"zstd {level}", f"left out: more than {_SLOW_BYTES >> 20} MiB of pages"
                continue
            yield f"zstd {level}", zstd.ZstdCompressor(level=level).compress, zstd.ZstdDecompressor().decompress
    except ModuleNotFoundError:
        yield "zstd", "not installed: pip install zstandard"


def _seconds(work: Callable[[], object]) -> tuple[float, Any]:
    """The least of several runs, since other load on the machine only ever adds; and the last result."""
    best, spent, runs, result = float("inf"), 0.0, 0, None
    while runs < 1 or (runs < _ROUNDS and spent < _LEAST_SECONDS * _ROUNDS):
        began = time.perf_counter()
        result = work()
        taken = time.perf_counter() - began
        best, spent, runs = min(best, taken), spent + taken, runs + 1
    return best, result


def bench_snapshot(
    path: Path | None = None,
    *,
    tokens: int = 32768,
    threads: int | None = None,
    say: Callable[[str], None] = lambda stage: None,
) -> Report:
    """Measure a context, and where torch has a GPU a cache of an 8B Llama's shape with its pages.

    Args:
        path: of the context. None: pages are constructed, and no sizes are told.
        tokens: of the cache on the GPU, a multiple of 64.
        threads: of kvpack's coder; all cores by default. Compressors run on one.
        say: called with the name of each stage as it begins.

    Returns:
        As :mod:`kvpack.bench.snapshot_report` says.

    Raises:
        SnapshotError, ContainerError: it is no context, or damaged.
        NotInstalledError: no context, and no torch to construct pages with.
        AssertionError: what was decoded is not what had been encoded.
    """
    began = time.monotonic()
    report: Report = {
        "what": "bench-snapshot",
        "schema": SCHEMA,
        "note": NOTE + CONSTRUCTED * (path is None),
        "command": kvpack_command(),
        **environment(_PACKAGES),
        "device": {"name": "CPU", "driver": None, "cuda": None},
        "options": {"tokens": tokens, "threads": threads},
        "source": "constructed" if path is None else "file",
        "shape": None,
        "speed": [],
        "prefill": [],
    }
    with tempfile.TemporaryDirectory(prefix="kvpack-") as folder:
        source = _constructed(Path(folder) / "constructed") if path is None else path
        say("the CPU's coder")
        report |= compare(source, threads, is_real=path is not None)
        if _has_gpu():
            from kvpack.bench.run import device_report
            from kvpack.bench.snapshot_speed import measure_speed

            report["device"] = device_report()
            report |= measure_speed(
                source, Path(folder), tokens=tokens, threads=threads, is_real=path is not None, say=say
            )
    return report | {"seconds": {"total": round(time.monotonic() - began, 2)}, "complete": True, "stopped": None}


def _has_gpu() -> bool:
    if find_spec("torch") is None or find_spec("cupy") is None:
        return False
    import torch

    return torch.cuda.is_available()


def _constructed(path: Path) -> Path:
    if find_spec("torch") is None:
        raise NotInstalledError("without a context pages are constructed, which needs torch: name a FILE")
    import torch

    from kvpack.bench.snapshot_speed import constructed_cache

    constructed_cache(_LAYERS, _TOKENS, torch.device("cpu")).save(path)
    return path


def compare(path: Path, threads: int | None = None, *, is_real: bool = True) -> Report:
    """Sizes and the CPU's speeds; decoded pages are encoded again, and must give the file's blobs.

    Args:
        is_real: whether pages are of a model. If not, no sizes are told, and nothing is compared.

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

        rows: list[Row] = [row("fp16", fp16_bytes), row("pages", page_bytes)] if is_real else []
        rows.append(row("kvpack", file.container.file.size_bytes, _seconds(encode)[0], _seconds(decode)[0]))
    if is_real:
        data = b"".join(np.ascontiguousarray(blocks).tobytes() for run in decoded for _, blocks in run)
        for found in _compressors(len(data)):
            if len(found) == 2:
                rows.append({"name": found[0], "reason": found[1]})
                continue
            name, compress, decompress = found
            encode_s, small = _seconds(partial(compress, data))
            rows.append(row(name, len(small), encode_s, _seconds(partial(decompress, small))[0]))
    else:
        rows[0] |= {"bytes": None, "of_fp16": None, "of_pages": None}
    return {
        "tokens": header.tokens,
        "formats": header.formats,
        "budget": header.budget,
        "threads": count,
        "elements": fp16_bytes // 2,
        "rows": rows,
    }
