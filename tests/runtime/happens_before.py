"""A race detector for code that orders work by CUDA streams and events, where there is no CUDA.

Streams and events are replaced by vector clocks: work on a stream happens after what that stream did before and waited
for, and after what the enqueuing thread has synchronized with. Tensors compute on the CPU, at once and rightly;
what is checked is that for each two accesses to watched memory, one of them a write, one is ordered before the other.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from kvpack.runtime.device import upload
from kvpack.runtime.weights import offload
from kvpack.runtime.weights.device_blob import DeviceBlob

Clock = dict[int, int]


def merge(into: Clock, other: Clock) -> None:
    for stream, time in other.items():
        into[stream] = max(into.get(stream, 0), time)


class Race(AssertionError):
    """Two accesses without an order."""


@dataclass
class Memory:
    name: str
    size: int
    write: tuple[int, Clock] | None = None
    reads: list[tuple[int, Clock]] = field(default_factory=list)
    streams: set[int] = field(default_factory=set)
    recorded: set[int] = field(default_factory=set)


class Detector:
    """The device: its streams, watched memory, and the races that were found."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.threads = threading.local()
        self.streams = 0
        self.memories: dict[int, Memory] = {}
        self.watched: list[Memory] = []
        self.races: list[str] = []
        self.default = FakeStream(self)

    @property
    def current(self) -> FakeStream:
        return getattr(self.threads, "current", self.default)

    @property
    def known(self) -> Clock:
        """What this thread has waited for."""
        if not hasattr(self.threads, "known"):
            self.threads.known = {}
        return self.threads.known

    @contextmanager
    def use(self, stream: FakeStream | None) -> Iterator[None]:
        before = self.current
        self.threads.current = stream or before
        try:
            yield
        finally:
            self.threads.current = before

    def watch(self, tensor: torch.Tensor, name: str) -> None:
        """Check accesses to the tensor's memory, for as long as this tensor lives."""
        at, memory = tensor.untyped_storage().data_ptr(), Memory(name, tensor.untyped_storage().nbytes())
        self.memories[at] = memory
        self.watched.append(memory)
        weakref.finalize(tensor, self._forget, at, memory)

    def _forget(self, at: int, memory: Memory) -> None:
        with self.lock:
            if self.memories.get(at) is memory:
                del self.memories[at]

    def memory(self, tensor: torch.Tensor) -> Memory | None:
        return self.memories.get(tensor.untyped_storage().data_ptr())

    def _order(self, what: str, memory: Memory, earlier: tuple[int, Clock], now: Clock) -> None:
        stream, clock = earlier
        if now.get(stream, 0) < clock[stream]:
            self.races.append(f"{memory.name}: {what}")

    def access(self, tensor: torch.Tensor, *, write: bool) -> None:
        """Work on the current stream."""
        memory = self.memory(tensor)
        if memory is None:
            return
        with self.lock:
            stream, clock = self.current.work()
            memory.streams.add(stream)
            if memory.write is not None:
                self._order("written twice" if write else "read before it was written", memory, memory.write, clock)
            if write:
                for read in memory.reads:
                    self._order("overwritten before it was read", memory, read, clock)
                memory.write, memory.reads = (stream, clock), []
            else:
                memory.reads.append((stream, clock))

    def host_writes(self, address: int) -> None:
        """The host itself writes to watched memory: all that reads it must be known to be done."""
        with self.lock:
            for at, memory in self.memories.items():
                if at <= address < at + memory.size:
                    for read in memory.reads:
                        self._order("overwritten by the host before it was copied", memory, read, self.known)
                    memory.reads = []


class FakeStream:
    def __init__(self, detector: Detector) -> None:
        self.detector = detector
        detector.streams += 1
        self.cuda_stream = detector.streams
        self.clock: Clock = {}

    def work(self) -> tuple[int, Clock]:
        merge(self.clock, self.detector.known)
        self.clock[self.cuda_stream] = self.clock.get(self.cuda_stream, 0) + 1
        return self.cuda_stream, dict(self.clock)

    def wait_event(self, event: FakeEvent) -> None:
        with self.detector.lock:
            merge(self.clock, event.clock)

    def wait_stream(self, other: FakeStream) -> None:
        with self.detector.lock:
            merge(self.clock, other.clock)

    def record_event(self, event: FakeEvent | None = None) -> FakeEvent:
        event = event or FakeEvent(self.detector)
        event.record(self)
        return event

    def synchronize(self) -> None:
        with self.detector.lock:
            merge(self.detector.known, self.clock)


class FakeEvent:
    def __init__(self, detector: Detector) -> None:
        self.detector = detector
        self.clock: Clock = {}

    def record(self, stream: FakeStream | None = None) -> None:
        with self.detector.lock:
            self.clock = dict((stream or self.detector.current).work()[1])

    def query(self) -> bool:
        """As slow as can be: nothing is done before somebody waits for it."""
        return False

    def synchronize(self) -> None:
        with self.detector.lock:
            merge(self.detector.known, self.clock)


@contextmanager
def detecting(monkeypatch: pytest.MonkeyPatch) -> Iterator[Detector]:
    """Uploader and LayerStream believe that the CPU has streams. Races that are left at the end are errors."""
    found = Detector()
    tensor_copy, tensor_zero, linear, read = (
        torch.Tensor.copy_,
        torch.Tensor.zero_,
        DeviceBlob.linear,
        upload.read_exactly,
    )

    def copy_(self: Any, source: Any, non_blocking: bool = False) -> Any:
        found.access(source, write=False)
        found.access(self, write=True)
        return tensor_copy(self, source)

    def zero_(self: Any) -> Any:
        found.access(self, write=True)
        return tensor_zero(self)

    def multiply(self: Any, x: Any, bias: Any = None) -> Any:
        found.access(self.blob, write=False)
        return linear(self, x, bias)

    def read_exactly(file: Any, view: Any, offset: int) -> None:
        array = torch.frombuffer(view, dtype=torch.uint8)
        found.host_writes(array.untyped_storage().data_ptr())
        read(file, view, offset)

    def pinned_memory(size: int, _device: Any) -> Any:
        memory = torch.empty(size, dtype=torch.uint8)
        found.watch(memory, "a pinned buffer")
        return memory

    def record_stream(self: Any, stream: Any) -> None:
        memory = found.memory(self)
        if memory is not None:
            memory.recorded.add(stream.cuda_stream)

    make_slots = offload.LayerStream._make_slots

    def watched_slots(self: Any, count: int) -> Any:
        slots = make_slots(self, count)
        for number, slot in enumerate(slots):
            found.watch(slot.buffer, f"slot {number}")
            found.access(slot.buffer, write=True)  # the zeros, on the stream that allocated it
            memory = found.memory(slot.buffer)
            assert memory is not None
            memory.recorded |= slot.streams | {found.current.cuda_stream}
            assert self._copy_stream is not None
            self._copy_stream.wait_stream(found.current)
        return slots

    for module in (upload, offload):
        monkeypatch.setattr(module, "side_stream", lambda _device: FakeStream(found))
    monkeypatch.setattr(upload, "pinned_memory", pinned_memory)
    monkeypatch.setattr(upload, "read_exactly", read_exactly)
    monkeypatch.setattr(offload, "_register", lambda _host, _device: None)
    monkeypatch.setattr(offload, "_unregister", lambda _hosts, _device: None)
    monkeypatch.setattr(offload.LayerStream, "_make_slots", watched_slots)
    monkeypatch.setattr(torch.cuda, "stream", found.use)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device=None: found.current)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _device=None: None)
    monkeypatch.setattr(torch.cuda, "device", lambda _device: nullcontext())
    monkeypatch.setattr(torch.cuda, "Event", lambda **_: FakeEvent(found))
    monkeypatch.setattr(torch.Tensor, "copy_", copy_)
    monkeypatch.setattr(torch.Tensor, "zero_", zero_)
    monkeypatch.setattr(torch.Tensor, "record_stream", record_stream)
    monkeypatch.setattr(DeviceBlob, "linear", multiply)
    yield found
    for memory in found.watched:
        if memory.name.startswith("slot") and not memory.streams <= memory.recorded:
            found.races.append(f"{memory.name}: the allocator does not know of all its streams")
    if found.races:
        raise Race("; ".join(sorted(set(found.races))))
