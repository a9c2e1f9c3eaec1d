"""Pages of a snapshot between a file and a GPU's memory: coded bytes cross the bus, and the GPU codes and decodes.

Loading takes several runs at a time, as many as :data:`BATCH_BYTES` of elements are: threads read the file into pinned
memory while the GPU works at what was read before. Nothing waits for the GPU until all is enqueued. Saving gives the
bytes that :func:`kvpack.encode.snapshot_coder.encode_run` gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import cycle

import numpy as np
import torch

from kvpack.encode.snapshot_coder import blob_header, parse_part
from kvpack.encode.threads import default_threads, map_ordered
from kvpack.errors import FormatError
from kvpack.format.layout import ALIGNMENT_BYTES, align
from kvpack.format.pages import PAGE_TOKENS
from kvpack.format.snapshot import RunPages, RunPart, SnapshotFile
from kvpack.runtime.codec.decoder import SLACK_BYTES, PlacedBlob, decode_blobs
from kvpack.runtime.codec.encoder import encode_beside_each_other
from kvpack.runtime.device.streams import forked
from kvpack.runtime.kv.page_elements import code_dtype, join_pages, split_pages
from kvpack.runtime.kv.page_table import Ints

# Elements that are decoded at a time; the pages and the coded bytes come on top.
BATCH_BYTES = 512 << 20
_READ_BYTES = 8 << 20
# Sides and formats of runs that are encoded before they are asked for.
_AHEAD = 2


def runs_kernels(device: torch.device) -> bool:
    """Whether pages on a device are coded there."""
    return device.type == "cuda"


def _element_bytes(part: RunPart) -> int:
    return part.elements * (2 if part.element_bits == 16 else 1)


@dataclass
class _Run:
    """A run, and where the bytes of its blobs go in a batch's memory."""

    run: int
    pages: list[RunPages]
    places: list[tuple[RunPart, int, int]]  # (part, offset, bytes)


def _batches(file: SnapshotFile, runs: Sequence[int]) -> Iterator[tuple[list[_Run], int]]:
    """(runs, bytes of their blobs with what lies between)."""
    batch: list[_Run] = []
    coded = elements = 0
    for number in runs:
        pages = file.pages_of_run(number)
        parts = [part for of_format in pages for part in of_format.parts]
        size = sum(map(_element_bytes, parts))
        if batch and elements + size > BATCH_BYTES:
            yield batch, coded
            batch, coded, elements = [], 0, 0
        run = _Run(number, pages, [])
        for part in parts:
            blob_bytes = file.container.tensors[part.name].size_bytes
            run.places.append((part, coded, blob_bytes))
            coded += align(blob_bytes, ALIGNMENT_BYTES)
        batch.append(run)
        elements += size
    if batch:
        yield batch, coded


class _Batch:
    """Blobs of some runs on their way: read into host memory by threads, then parsed by whom it is asked."""

    def __init__(
        self, file: SnapshotFile, runs: list[_Run], size: int, device: torch.device, executor: ThreadPoolExecutor
    ) -> None:
        self.runs = runs
        pinned = device.type == "cuda"
        self.host = torch.empty(size + SLACK_BYTES, dtype=torch.uint8, device="cpu", pin_memory=pinned)
        self.view = self.host.numpy().data
        self._read: list[Future[None]] = []
        container = file.container

        for run in runs:
            for part, at, blob_bytes in run.places:
                begin = container.data_begin + container.tensors[part.name].begin
                for first in range(0, blob_bytes, _READ_BYTES):
                    view = self.view[at + first : at + min(first + _READ_BYTES, blob_bytes)]
                    self._read.append(executor.submit(container.file.read_into, view, begin + first))

    def wait(self) -> None:
        """Until all is read, or nothing is being read any more.

        Raises:
            FileChangedError, OSError
        """
        errors = [error for future in self._read if (error := future.exception()) is not None]
        if errors:
            raise errors[0]


def load_runs(
    file: SnapshotFile,
    runs: Sequence[int],
    device: torch.device,
    entries_of: Callable[[RunPages], Ints],
    pages_base: torch.Tensor | None,
    *,
    progress: Callable[[int], None] | None = None,
) -> list[int]:
    """Decode runs of a file into pages on a device.

    Args:
        entries_of: i64 [pages]: where each goes; 0 for one that is left out.
        pages_base: what entries count from; None: they are addresses.
        progress: called with a run's tokens when it has been enqueued.

    Returns:
        Runs of which one is damaged, so that nothing is defined of what their pages and those of later ones hold; none
        if all is well.

    Raises:
        FileChangedError, OSError: the file cannot be read, or has changed.
    """
    enqueued: list[tuple[list[int], torch.Tensor]] = []
    refused: list[int] = []
    with ThreadPoolExecutor(default_threads(), thread_name_prefix="kvpack") as executor:
        batches = _batches(file, runs)

        def begin() -> _Batch | None:
            found = next(batches, None)
            return None if found is None else _Batch(file, *found, device, executor)

        # One batch's pages are put together while the next one is decoded.
        with forked(device, 2) as streams:
            turns = cycle(streams)
            batch = begin()
            while batch is not None:
                following = begin()
                batch.wait()
                numbers = [run.run for run in batch.runs]
                try:
                    with torch.cuda.stream(next(turns)):
                        damage = _decode_batch(batch, file, device, entries_of, pages_base)
                except FormatError:
                    refused = numbers
                    break
                if progress is not None:
                    for number in numbers:
                        progress(len(file.header.token_range(number)))
                enqueued.append((numbers, damage))
                batch = following
    for numbers, damage in enqueued:
        if damage.item():
            return numbers
    return refused


def _decode_batch(
    batch: _Batch,
    file: SnapshotFile,
    device: torch.device,
    entries_of: Callable[[RunPages], Ints],
    pages_base: torch.Tensor | None,
) -> torch.Tensor:
    """Enqueue all that makes pages of a batch; returns a count of damage on the device. Raises FormatError."""
    header = file.header
    kept_of_last = header.tokens % PAGE_TOKENS or PAGE_TOKENS
    blobs = [
        PlacedBlob(parse_part(batch.view[at : at + size], part), at)
        for run in batch.runs
        for part, at, size in run.places
    ]
    decoded = decode_blobs(blobs, batch.host.to(device, non_blocking=True))
    elements, damage = iter(decoded.elements), decoded.damage
    for pages in (pages for run in batch.runs for pages in run.pages):
        parts = {part.part: next(elements) for part in pages.parts}
        for part in pages.parts:
            found = parts[part.part]
            if len(found) > part.elements:  # they must repeat the last one
                damage = damage + (found[part.elements :] != found[part.elements - 1]).sum()
        kept = np.where(pages.indices == header.pages - 1, kept_of_last, PAGE_TOKENS)
        join_pages(pages, parts, entries_of(pages), device, kept=kept, pages_base=pages_base)
    return damage


def encode_runs(
    runs: Iterable[Sequence[RunPages]],
    device: torch.device,
    entries_of: Callable[[RunPages], Ints],
    pages_base: torch.Tensor | None,
) -> Iterator[list[tuple[str, memoryview]]]:
    """:func:`kvpack.encode.snapshot_coder.encode_run` of pages on a device: the same bytes.

    A thread encodes while what it has encoded is written. More of them are slower: they wait for each other's Python.

    Args:
        runs: what :func:`kvpack.format.snapshot.run_pages` gives for each.
        entries_of: i64 [pages]: where each is.
        pages_base: as of :func:`load_runs`.

    Yields:
        The blobs of one side and format of a run, with the names of their tensors.
    """
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    if stream is not None:
        stream.wait_stream(torch.cuda.current_stream(device))

    def work(pages: RunPages) -> list[tuple[str, memoryview]]:
        with torch.cuda.stream(stream):  # no stream: as it is
            return _encoded(pages, device, entries_of(pages), pages_base)

    with ThreadPoolExecutor(1, thread_name_prefix="kvpack") as executor:
        yield from map_ordered(work, (pages for run in runs for pages in run), executor, ahead=_AHEAD)


def _encoded(
    pages: RunPages, device: torch.device, entries: Ints, pages_base: torch.Tensor | None
) -> list[tuple[str, memoryview]]:
    headers = {part.part: blob_header(part) for part in pages.parts}
    parts = {}
    for part in pages.parts:
        dtype = code_dtype(pages.format) if part.is_codes else torch.int16
        parts[part.part] = torch.empty(headers[part.part].num_elements, dtype=dtype, device=device)
    split_pages(pages, entries, parts, device, pages_base=pages_base)
    for part in pages.parts:
        elements = parts[part.part]
        elements[part.elements :] = elements[part.elements - 1].clone()
    coded = encode_beside_each_other([(parts[part.part], headers[part.part]) for part in pages.parts])
    return [(part.name, blob) for part, blob in zip(pages.parts, coded, strict=True)]
