"""Files and directories that become an output when they are complete, and what a killed process left of them.

Whoever makes one holds a lock on it (``flock``), which ends with the process however that ends. So one that matches the
pattern and can be locked belongs to nobody, and the next writer of the same output removes it.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

_NO_SURPRISES = os.O_NOFOLLOW | os.O_NONBLOCK  # no link, no wait for a FIFO's writer
_TOKEN_BYTES = 4
_TOKEN = f"[0-9a-f]{{{2 * _TOKEN_BYTES}}}"


def hidden_name(name: str, ending: str) -> str:
    """``.NAME.12345678.ENDING``, another one each time. Process ids are no help: containers begin theirs at 1."""
    return f".{name}.{secrets.token_hex(_TOKEN_BYTES)}.{ending}"


def _lock(descriptor: int, *, wait: bool) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:  # held by another process, or a file system without locks
        return False
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


def create_file(path: Path) -> BinaryIO:
    """A new file, locked as long as it is open. Raises OSError, FileExistsError among them."""
    while True:
        file = path.open("xb")
        _lock(file.fileno(), wait=True)
        if _is_at(file.fileno(), path):  # and not taken for an abandoned one before it was locked
            return file
        file.close()


def check_writable(path: Path, ending: str) -> None:
    """Whether a file can be made at a path, told by making a hidden one beside it. Raises OSError."""
    probe = path.with_name(hidden_name(path.name, ending))
    create_file(probe).close()
    probe.unlink()


def create_directory(path: Path) -> int:
    """A new directory; returns the descriptor whose lock ends when it is closed. Raises OSError."""
    while True:
        path.mkdir(parents=True)
        descriptor = os.open(path, os.O_RDONLY)
        _lock(descriptor, wait=True)
        if _is_at(descriptor, path):
            return descriptor
        os.close(descriptor)


def remove_abandoned(target: Path, *endings: str) -> list[Path]:
    """Remove what killed processes left of outputs at ``target``; returns what was removed.

    Only plain files and directories with a name of :func:`hidden_name`, beside ``target``, that no process has locked.
    """
    pattern = re.compile(rf"\.{re.escape(target.name)}\.{_TOKEN}\.({'|'.join(endings)})")
    removed = []
    with suppress(OSError):
        for path in sorted(path for path in target.parent.iterdir() if pattern.fullmatch(path.name)):
            with suppress(OSError):
                descriptor = os.open(path, os.O_RDONLY | _NO_SURPRISES)
                try:
                    if _lock(descriptor, wait=False) and _is_at(descriptor, path):
                        shutil.rmtree(path) if path.is_dir() else path.unlink()
                        removed.append(path)
                finally:
                    os.close(descriptor)
    return removed


@contextmanager
def hidden_directory(target: Path) -> Iterator[Path]:
    """A directory beside ``target``, gone at the end, or, if the process is killed, with the next one; or renamed.

    Raises:
        OSError: it cannot be made.
    """
    target = Path(os.path.abspath(target))  # "." has no name
    remove_abandoned(target, "tmp")
    path = target.with_name(hidden_name(target.name, "tmp"))
    lock = create_directory(path)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)
