"""File → device memory: threads read chunks into pinned buffers while earlier chunks are in flight.

A page fault of a mapped file costs a thread switch for 4 KiB, and the driver stages copies from pageable memory in
one thread; ``preadv`` into pinned buffers by several threads is what reaches the rate of the bus. Chunks follow the
file, not the tensors, so that a thousand small tensors cost one read. On the CPU the threads read into the tensors'
own memory.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from kvpack.encode.threads import ThreadPool, default_threads
from kvpack.errors import StreamingError
from kvpack.format.closing import Closing
from kvpack.format.container import Readable

CHUNK_BYTES = 8 << 20
# Read through gaps up to this size: cheaper than another read.
GAP_BYTES = 1 << 16
MAX_THREADS = 16
# A thread fills one buffer while another is in flight.
BUFFERS_PER_THREAD = 2


@dataclass(frozen=True)
class Piece:
    """``len(target)`` bytes of a file from ``offset`` on, and where they go: u8, 1-D, contiguous, on the device."""

    file: Readable
    offset: int
    target: torch.Tensor

    @property
    def end(self) -> int:
        return self.offset + len(self.target)


@dataclass
class Chunk:
    """A range of a file, read at once. Parts: number of a piece, and begin and end of what it takes, in the file."""

    file: Readable
    offset: int
    size: int = 0
    parts: list[tuple[int, int, int]] = field(default_factory=list)


def split_pieces(pieces: Sequence[Piece], chunk_bytes: int, gap_bytes: int) -> list[Chunk]:
    """Pieces → chunks of at most ``chunk_bytes``, in the order of the files' bytes."""
    chunks: list[Chunk] = []

    def place(number: int) -> tuple[str, int, int]:
        """Two files may have been opened under one path, one after the other."""
        file = pieces[number].file
        return str(file.path), id(file), pieces[number].offset

    for number in sorted(range(len(pieces)), key=place):
        piece = pieces[number]
        at = piece.offset
        while at < piece.end:
            chunk = chunks[-1] if chunks else None
            if (
                chunk is None
                or chunk.file is not piece.file
                or at - (chunk.offset + chunk.size) > gap_bytes
                or not chunk.offset <= at < chunk.offset + chunk_bytes
            ):
                chunk = Chunk(piece.file, at)
                chunks.append(chunk)
            end = min(piece.end, chunk.offset + chunk_bytes)
            chunk.parts.append((number, at, end))
            chunk.size = max(chunk.size, end - chunk.offset)  # two pieces may share bytes
            at = end
    return chunks


def read_exactly(file: Readable, view: memoryview, offset: int) -> None:
    """Fill ``view`` from a file. Raises FileChangedError, an OSError, if it ends before or was written to."""
    file.read_into(view, offset)


class Upload:
    """Pieces under way. ``ready`` (CUDA) is recorded behind the last copy, before :meth:`wait` returns."""

    def __init__(
        self,
        pieces: Sequence[Piece],
        chunks: Sequence[Chunk],
        stream: torch.cuda.Stream | None,
        begin: Callable[[], None] | None,
    ) -> None:
        self.pieces = pieces
        self.stream = stream
        self.ready = torch.cuda.Event() if stream is not None else None
        self._begin = begin
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._process = os.getpid()
        self._chunks_left = len(chunks)
        self._parts_left = [0] * len(pieces)
        for chunk in chunks:
            for number, _, _ in chunk.parts:
                self._parts_left[number] += 1
        if not chunks:
            self.begin()
            self._record()

    def begin(self) -> None:
        """Once, before the first byte is written to a target; on the copy stream if there is one."""
        with self._changed:
            if self._begin is not None:
                self._begin()
                self._begin = None

    def _record(self) -> None:
        if self.ready is not None:
            self.ready.record(self.stream)

    def done(self, chunk: Chunk, error: BaseException | None) -> None:
        """Nobody works at a chunk any more: its bytes are there, or their copies enqueued, unless it failed."""
        with self._changed:
            self._error = self._error or error
            if self._error is None:
                for number, _, _ in chunk.parts:
                    self._parts_left[number] -= 1
            self._chunks_left -= 1
            if not self._chunks_left and self._error is None:
                self._record()
            self._changed.notify_all()

    def cancel(self) -> None:
        """Leave out what has not been begun."""
        with self._changed:
            if self._chunks_left:
                self._error = self._error or RuntimeError("the uploader was closed")

    @property
    def failed(self) -> bool:
        return self._error is not None

    @property
    def finished(self) -> bool:
        """No thread will touch the targets again."""
        return not self._chunks_left

    def _refuse_another_process(self) -> None:
        if not self.finished and self._process != os.getpid():
            raise StreamingError(
                "this upload was under way when the process was forked, and goes on in the parent alone"
            )

    def wait_piece(self, number: int) -> None:
        """Until a piece has been read: what reads the file after this finds it in the page cache."""
        self._refuse_another_process()
        with self._changed:
            self._changed.wait_for(lambda: self.finished or not self._parts_left[number])
        if self._parts_left[number]:
            self.wait()

    def wait(self) -> None:
        """Until all is read, and the copies are enqueued; the device may still be copying.

        Raises:
            StreamingError: another process, of which this is a fork, began it.
            OSError: a file cannot be read. Nothing may be assumed of the targets then, but that no thread writes to
                them any more.
        """
        self._refuse_another_process()
        with self._changed:
            self._changed.wait_for(lambda: self.finished)
        if self._error is not None:
            raise self._error


def side_stream(device: torch.device) -> torch.cuda.Stream | None:
    """A new stream of a CUDA device; None for the CPU."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


def pinned_memory(size: int, device: torch.device) -> torch.Tensor:
    """u8 [size] from which copies to ``device`` need not wait."""
    with torch.cuda.device(device):  # or pinning would make a context on device 0
        return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)


def sent(array: npt.NDArray[np.int32] | npt.NDArray[np.int64], device: torch.device) -> torch.Tensor:
    """A copy on a device, for which nothing waits; on the CPU the array itself, if it is contiguous."""
    values = torch.from_numpy(np.ascontiguousarray(array))
    return values if device.type == "cpu" else values.pin_memory().to(device, non_blocking=True)


class _Pinned:
    def __init__(self, size: int, device: torch.device) -> None:
        self.buffer = pinned_memory(size, device)
        self.view = self.buffer.numpy().data
        self.copied = torch.cuda.Event(blocking=True)  # a thread that waits leaves its core to one that reads


class Uploader(Closing):
    """Threads, pinned buffers and a stream that bring files' bytes to one device, until closed.

    Targets belong to the caller: they must stay alive, and unread, until the upload is ready. Uploads are begun in the
    order in which they are submitted.

    Args:
        device: where the targets lie.
        threads: that read; by default one per core, at most 16.
        stream: to copy on; by default one of its own.
        progress: called by these threads with the number of bytes of each chunk that is done.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        threads: int | None = None,
        chunk_bytes: int = CHUNK_BYTES,
        stream: torch.cuda.Stream | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        self.device = device
        self.stream = side_stream(device) if stream is None else stream
        self._chunk_bytes = chunk_bytes
        self._threads = threads or min(MAX_THREADS, max(2, default_threads()))
        self._progress = progress
        self._uploads: list[Upload] = []
        self._free: queue.SimpleQueue[_Pinned] = queue.SimpleQueue()
        self._buffers = 0
        self._lock = threading.Lock()
        self._pools = ThreadPool(self._threads, "kvpack-upload")

    @property
    def _pool(self) -> ThreadPoolExecutor:
        return self._pools.executor

    def after_current_work(self) -> Callable[[], None] | None:
        """For ``begin``: wait for the current stream as it is now. Fresh memory is what its last work may have left."""
        stream = self.stream
        if stream is None:
            return None
        event = torch.cuda.current_stream(self.device).record_event()
        return lambda: stream.wait_event(event)

    def submit(self, pieces: Iterable[Piece], *, begin: Callable[[], None] | None = None) -> Upload:
        """Start bringing pieces to the device; returns at once.

        Memory of the targets must be safe to write to from the copy stream: whatever used it before must have ended,
        or ``begin`` (which runs with the copy stream as the current one) makes that stream wait for it.
        """
        listed = list(pieces)
        chunks = split_pieces(listed, self._chunk_bytes, 0 if self.stream is None else GAP_BYTES)
        with torch.cuda.stream(self.stream):  # a context of nothing if there is none
            upload = Upload(listed, chunks, self.stream, begin)
        self._uploads = [*(u for u in self._uploads if not u.finished), upload]
        for chunk in chunks:
            self._pool.submit(self._work, upload, chunk)
        return upload

    def _work(self, upload: Upload, chunk: Chunk) -> None:
        failure: BaseException | None = None
        try:
            if not upload.failed:
                # A mode of this thread alone: without it, torch refuses to write to targets that were made in it.
                with torch.inference_mode():
                    if self.stream is None:
                        self._read(upload, chunk)
                    else:
                        self._read_and_copy(upload, chunk, self.stream)
                if self._progress is not None:
                    self._progress(sum(end - begin for _, begin, end in chunk.parts))
        except BaseException as error:  # whoever waits for the upload raises it
            failure = error
        upload.done(chunk, failure)

    def _read(self, upload: Upload, chunk: Chunk) -> None:
        upload.begin()
        for number, begin, end in chunk.parts:
            piece = upload.pieces[number]
            part = piece.target[begin - piece.offset : end - piece.offset]
            read_exactly(chunk.file, part.numpy().data, begin)

    def _read_and_copy(self, upload: Upload, chunk: Chunk, stream: torch.cuda.Stream) -> None:
        pinned = self._take_buffer()
        try:
            pinned.copied.synchronize()
            read_exactly(chunk.file, pinned.view[: chunk.size], chunk.offset)
            with torch.cuda.stream(stream):
                upload.begin()
                for number, begin, end in chunk.parts:
                    piece = upload.pieces[number]
                    part = pinned.buffer[begin - chunk.offset : end - chunk.offset]
                    piece.target[begin - piece.offset : end - piece.offset].copy_(part, non_blocking=True)
                pinned.copied.record(stream)
        finally:
            self._free.put(pinned)

    def _take_buffer(self) -> _Pinned:
        """One whose copy is done, else a new one while there are few, else the one whose copy was enqueued first.

        To pin memory takes longer than to copy it.
        """
        found: _Pinned | None = None
        with suppress(queue.Empty):
            found = self._free.get_nowait()
        if found is not None and found.copied.query():
            return found
        with self._lock:
            new = self._buffers < BUFFERS_PER_THREAD * self._threads
            self._buffers += new
        if not new:
            return found or self._free.get()
        if found is not None:
            self._free.put(found)
        return _Pinned(self._chunk_bytes, self.device)

    def close(self) -> None:
        """Give up what has not been read, wait for what is in flight, and let go of buffers and pieces."""
        for upload in self._uploads:
            upload.cancel()
        self._pool.shutdown(wait=True)
        if self.stream is not None:
            self.stream.synchronize()
        self._uploads.clear()
