"""Files that are read for long, of which a model may have hundreds, with few descriptors."""

from __future__ import annotations

import os
import threading
import weakref
from collections import OrderedDict
from pathlib import Path

from kvpack.errors import FileChangedError

# Systems mostly allow a process 256 or 1024 open files, and others want some as well.
MAX_DESCRIPTORS = 64


class _Handle:
    """A file's descriptor, as long as it has one, and by what the file is known when it is opened again."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:  # which refuses folders
            self.descriptor: int | None = os.dup(file.fileno())
            state = os.fstat(file.fileno())
        self.path = os.path.abspath(path)
        self.identity = state.st_dev, state.st_ino
        self.size_bytes, self.modified = state.st_size, state.st_mtime_ns
        self.users = 0


class _Handles:
    """Those of the process that have a descriptor, in the order of their last use."""

    def __init__(self) -> None:
        self._open: OrderedDict[_Handle, None] = OrderedDict()
        self.renew_lock()
        os.register_at_fork(after_in_child=self.renew_lock)

    def renew_lock(self) -> None:
        """Another thread may have held it when this process was forked off."""
        # Again by the same thread, where a collection of garbage in between closes a file.
        self._lock = threading.RLock()

    def open(self, path: Path) -> _Handle:
        with self._lock:
            self._make_room()
            handle = _Handle(path)
            self._open[handle] = None
            return handle

    def take(self, handle: _Handle) -> int:
        """The descriptor, to be kept open until it is given back. Raises FileChangedError, OSError."""
        with self._lock:
            if handle.descriptor is None:
                self._make_room()
                handle.descriptor = _reopen(handle)
                self._open[handle] = None
            self._open.move_to_end(handle)
            handle.users += 1
            return handle.descriptor

    def give_back(self, handle: _Handle) -> None:
        with self._lock:
            handle.users -= 1

    def close(self, handle: _Handle) -> None:
        with self._lock:
            self._close(handle)

    def _close(self, handle: _Handle) -> None:
        self._open.pop(handle, None)
        if handle.descriptor is not None:
            os.close(handle.descriptor)
            handle.descriptor = None

    def _make_room(self) -> None:
        idle = (handle for handle in list(self._open) if not handle.users)
        while len(self._open) >= MAX_DESCRIPTORS and (oldest := next(idle, None)) is not None:
            self._close(oldest)


def _reopen(handle: _Handle) -> int:
    descriptor = os.open(handle.path, os.O_RDONLY | os.O_CLOEXEC)
    state = os.fstat(descriptor)
    if (state.st_dev, state.st_ino) != handle.identity:
        os.close(descriptor)
        raise FileChangedError(
            f"{handle.path} was replaced by another file while the model was read: try again when nothing writes it"
        )
    return descriptor


_handles = _Handles()


class OpenFile:
    """A file to be read until the last reference to it is gone.

    It stays open, whatever its path leads to meanwhile, while the process has at most 64 of them. Of more, those that
    were not read for the longest time are closed, and opened again when they are read.

    Attributes:
        path: under which it was opened; for messages.
        size_bytes: when it was opened.

    Raises:
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle = _handles.open(path)
        self.size_bytes = self._handle.size_bytes
        weakref.finalize(self, _handles.close, self._handle)

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill ``view``, writable bytes, from ``offset`` on. May be used by several threads.

        Raises:
            FileChangedError: the file ended before, was written to since it was opened, or was replaced by another
                one when it had to be opened again.
            OSError: it cannot be read.
        """
        done = 0
        descriptor = _handles.take(self._handle)
        try:
            while done < len(view):
                count = os.preadv(descriptor, [view[done:]], offset + done)
                if count == 0:
                    break
                done += count
            state = os.fstat(descriptor)  # after the read, so that no change before its end goes unseen
        finally:
            _handles.give_back(self._handle)
        same = (state.st_size, state.st_mtime_ns) == (self.size_bytes, self._handle.modified)
        if done < len(view) or not same:
            what = "ended" if done < len(view) else "changed"
            found = f"{state.st_size} bytes now, {self.size_bytes} when it was opened"
            raise FileChangedError(
                f"{self.path} {what} while it was read ({found}): was it overwritten? Try again when nothing writes it"
            )
