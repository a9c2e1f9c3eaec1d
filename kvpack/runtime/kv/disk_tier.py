"""Blocks of prefixes in a directory: snapshots (FORMAT.md §9.6) of up to 32 blocks.

Each is named by its last block's hash and formats. A block that was evicted in 16 bits, and again when its pages had
been quantized, is in two files, of which the one with fewer bytes counts.

Files are written whole or not at all, and never changed, so several processes may use one directory. They are known by
their headers and the hashes of their pages; pages are decoded when they are asked for. Whatever is wrong with a file is
a miss, and counted: it is not looked at again before it changes.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import stat
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kvpack.encode.snapshot_coder import write_snapshot
from kvpack.errors import CacheInputError, FileChangedError, KvpackError, SnapshotHeaderError
from kvpack.format.pages import PAGE_TOKENS, PageFormat, Side
from kvpack.format.snapshot import RUN_PAGES, Fingerprint, SnapshotFile, SnapshotHeader
from kvpack.format.temporary_files import check_writable, remove_abandoned
from kvpack.runtime.kv.cache import KVCache
from kvpack.runtime.kv.host_tier import BlockBytes
from kvpack.runtime.kv.prefix_hash import HASH_BYTES, chained, token_pages
from kvpack.runtime.kv.run_coder import BlockSizes, RunCoder
from kvpack.runtime.kv.snapshot import check_cache, snapshot_header

ENDING = ".kvpack.safetensors"
_NAME = re.compile(rf"[0-9a-f]{{{2 * HASH_BYTES}}}{re.escape(ENDING)}")
_ABANDONED = re.compile(rf"\.({_NAME.pattern})\.[0-9a-f]+\.(?:data|tmp)")
_LOCK_NAME = ".kvpack-tier.lock"
# A directory that others write to is read anew at most so often.
_SCAN_INTERVAL_S = 1.0
# What a file has beside its tensors: so much, and so much for each of them.
_HEADER_BYTES, _TENSOR_BYTES = 4096, 192


@dataclass(frozen=True)
class _File:
    """A file as it was seen: ``state`` says whether it is still the same; without ``hashes`` it is of no use.
    ``formats`` of each block: u8 [layers, 2], as bytes."""

    name: str
    state: tuple[int, int, int]
    hashes: tuple[bytes, ...] = ()
    formats: tuple[bytes, ...] = ()


class DiskTier:
    """Blocks in a directory.

    Args:
        cache: whose pages they are.
        directory: made if it is not there.
        capacity_bytes: of all files of such names in it, whoever wrote them; None: no limit. A file that is being
            written comes on top.
        fingerprint: of the model, for the files' headers. Files that say another one are foreign.
        codes_on_device: the cache's device, a GPU, codes and decodes.
        report: called with each damaged or foreign file and what is wrong with it, by whichever thread meets it.

    Attributes:
        damaged_files, foreign_files: that were met since the start: those that cannot be read, and snapshots that are
            no blocks, or of another shape of cache or another model.
        written_files: that have been written.
        failed_writes: files that could not be written. The first one is a ``RuntimeWarning``, too.

    Raises:
        CacheInputError: the directory cannot be made, read or written to.
    """

    def __init__(
        self,
        cache: KVCache,
        directory: str | os.PathLike[str],
        capacity_bytes: int | None = None,
        fingerprint: Fingerprint | None = None,
        *,
        report: Callable[[Path, Exception], None] | None = None,
        codes_on_device: bool = False,
    ) -> None:
        self.directory = Path(directory)
        self.capacity_bytes = capacity_bytes
        self.damaged_files = self.foreign_files = self.written_files = self.failed_writes = 0
        self._cache, self._fingerprint, self._report = cache, fingerprint, report
        self._sizes = BlockSizes(cache.pools)
        self._coder = RunCoder(self._sizes, cache.device if codes_on_device else None)
        self._lock = threading.RLock()
        self._files: dict[str, _File] = {}
        # Files that have a block, and which of theirs it is: writers that do not know of each other write some twice.
        self._index: dict[bytes, list[tuple[_File, int]]] = {}
        self._scanned_s = -_SCAN_INTERVAL_S
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            for name in {found[1] for one in os.listdir(self.directory) if (found := _ABANDONED.fullmatch(one))}:
                remove_abandoned(self.directory / name, "data", "tmp")
            # Under the name of a file, so that what is left of it where the process is killed goes with the others.
            check_writable(self.directory / ("0" * (2 * HASH_BYTES) + ENDING), "tmp")
            self.scan()
        except OSError as error:
            raise CacheInputError(
                f"disk={os.fspath(directory)!r} cannot be used ({error.strerror or error}): name a directory that can "
                "be read and written to, or one that can be made"
            ) from None

    # What there is ---------------------------------------------------------------------------------------------------

    def has(self, block: BlockBytes) -> bool:
        """Whether a block is here, in these formats, as far as is known: others may have removed it."""
        with self._lock:
            formats = block.formats.tobytes()
            return any(file.formats[place] == formats for file, place in self._index.get(block.hash, ()))

    def _found(self, block_hash: bytes) -> tuple[_File, int] | None:
        """The file that has a block in the fewest bytes, the last that was met of those, and which of its blocks it is.

        Blocks only lose bits, so the fewest bytes are the latest.
        """

        def size_bytes(found: tuple[_File, int]) -> int:
            file, place = found
            return int(
                self._sizes.of_pages(np.frombuffer(file.formats[place], np.uint8).reshape(-1, len(Side), 1)).sum()
            )

        files = self._index.get(block_hash)
        return None if files is None else min(reversed(files), key=size_bytes)

    def __len__(self) -> int:
        """Blocks."""
        return len(self._index)

    def hashes(self) -> set[bytes]:
        """Of all blocks that are here, as far as is known."""
        with self._lock:
            return set(self._index)

    @property
    def used_bytes(self) -> int:
        """Of the files in the directory now; 0 if it is gone."""
        with suppress(OSError):
            return sum(size for _, _, size in self._ages())
        return 0

    def scan(self) -> None:
        """Learn of files that have come, changed or gone, by their headers."""
        with self._lock:
            self._scanned_s = time.monotonic()
            present = set()
            for name, state in self._listed():
                present.add(name)
                known = self._files.get(name)
                if known is None or known.state != state:
                    self._forget(name)
                    self._add(name, state)
            for name in self._files.keys() - present:
                self._forget(name)

    def _listed(self) -> Iterator[tuple[str, tuple[int, int, int]]]:
        with os.scandir(self.directory) as found:
            for one in found:
                if _NAME.fullmatch(one.name):
                    with suppress(FileNotFoundError):
                        yield one.name, _state(one.stat(follow_symlinks=False))

    def _add(self, name: str, state: tuple[int, int, int]) -> None:
        file = _File(name, state)
        try:
            file = self._seen(name, state)
        except FileNotFoundError:
            return
        except FileChangedError:
            return  # the next scan sees what it has become
        except (KvpackError, OSError) as error:
            self._count_bad(name, error)
        self._files[name] = file
        for place, one in enumerate(file.hashes):
            self._index.setdefault(one, []).append((file, place))

    def _seen(self, name: str, state: tuple[int, int, int]) -> _File:
        path = self.directory / name
        with _opened(path) as opened:
            self._check(opened.header)
            found, formats = opened.array("page_hashes"), opened.page_formats
        if found is None:
            raise CacheInputError(f"{path} has no hashes of pages: it is no part of a tier")
        of_blocks = (formats[:, :, place].tobytes() for place in range(len(found)))
        return _File(name, state, tuple(row.tobytes() for row in found), tuple(of_blocks))

    def _check(self, header: SnapshotHeader) -> None:
        """
        Raises:
            CacheInputError: it is no file of blocks of this cache.
        """
        check_cache(self._cache, header)
        ours, theirs = self._fingerprint, header.fingerprint
        if ours is not None and theirs is not None and theirs.model != ours.model:
            raise CacheInputError(f"the blocks are of another model: {'; '.join(theirs.differences(ours))}")
        if header.runs != 1 or header.tokens % PAGE_TOKENS or (header.parent is None) != (header.first_page == 0):
            raise CacheInputError("the snapshot is no run of full pages, or does not say what is before them")

    def _forget(self, name: str) -> None:
        file = self._files.pop(name, None)
        for one in () if file is None else file.hashes:
            others = [found for found in self._index.pop(one, []) if found[0] is not file]
            if others:
                self._index[one] = others

    def _count_bad(self, name: str, error: KvpackError | OSError) -> None:
        if isinstance(error, CacheInputError):
            self.foreign_files += 1
        else:
            self.damaged_files += 1
        if self._report is not None:
            self._report(self.directory / name, error)

    def _mark_bad(self, file: _File) -> None:
        """A file is of no use until it changes."""
        with self._lock:
            if self._files.get(file.name) is file:
                self._forget(file.name)
                self._files[file.name] = _File(file.name, file.state)

    # Reading ---------------------------------------------------------------------------------------------------------

    def read(self, hashes: Sequence[bytes], pages: Sequence[bytes]) -> list[BlockBytes]:
        """Of a chain of blocks its first ones, as far as one file has them; often none.

        Args:
            pages: the tokens that the blocks have to be of.
        """
        with self._lock:
            if hashes[0] not in self._index and time.monotonic() - self._scanned_s >= _SCAN_INTERVAL_S:
                with suppress(OSError):
                    self.scan()
        while True:
            with self._lock:
                if (found := self._found(hashes[0])) is None:
                    return []
                file, first = found
                count = self._run_length(file, first, hashes)
            if (blocks := self._read(file, range(first, first + count), pages)) is not None:
                return blocks

    def _run_length(self, file: _File, first: int, hashes: Sequence[bytes]) -> int:
        """How many of the blocks a file has from its block ``first`` on, as they were last."""
        for count, ours in enumerate(hashes):
            place = first + count
            if place == len(file.hashes) or file.hashes[place] != ours:
                return count
            latest, at = self._found(ours) or (file, place)
            if latest.formats[at] != file.formats[place]:
                return count
        return len(hashes)

    def _read(self, file: _File, places: range, pages: Sequence[bytes]) -> list[BlockBytes] | None:
        """As of :meth:`read`, these blocks of a file; None: it is of no use, and forgotten."""
        try:
            with _opened(self.directory / file.name) as opened:
                return self._decoded(opened, file, places, pages)
        except (FileNotFoundError, FileChangedError):  # another process was here
            with self._lock:
                self._forget(file.name)
        except (KvpackError, OSError) as error:
            self._count_bad(file.name, error)
            self._mark_bad(file)
        return None

    def _decoded(self, opened: SnapshotFile, file: _File, places: range, pages: Sequence[bytes]) -> list[BlockBytes]:
        """
        Raises:
            CacheInputError, KvpackError, OSError: the file is of no use.
        """
        header = opened.header
        self._check(header)
        hashes = opened.array("page_hashes")
        if hashes is None or tuple(row.tobytes() for row in hashes) != file.hashes:
            # Its last block names a file: another process may have written more, or fewer, of those before it.
            raise FileChangedError(f"{opened.container.path} has other blocks than when it was seen")
        parent = None if header.parent is None else bytes.fromhex(header.parent)
        of_file = token_pages(opened.tokens())
        # The hash of a first block stands on a root, which the one who asks for it knows.
        expected = chained(parent, of_file) if parent else [file.hashes[0], *chained(file.hashes[0], of_file[1:])]
        if tuple(expected) != file.hashes:
            raise SnapshotHeaderError(f"{opened.container.path}: its hashes are not those of its tokens")
        if of_file[places.start : places.stop] != list(pages[: len(places)]):
            return []
        formats = opened.page_formats
        self._check_formats(formats[:, :, places.start : places.stop])
        importance = opened.array("importance")
        blocks = self._coder.decode(opened)
        return [
            BlockBytes(
                hash=file.hashes[place],
                parent=file.hashes[place - 1] if place else parent,
                depth=header.first_page + place + 1,
                tokens=of_file[place],
                formats=formats[:, :, place].copy(),
                data=blocks[place],
                importance=None if importance is None else (importance[0, :, place], importance[1, :, place]),
            )
            for place in places
        ]

    def _check_formats(self, formats: npt.NDArray[np.uint8]) -> None:
        """
        Raises:
            CacheInputError: the cache cannot have such pages.
        """
        for layer, of_layer in enumerate(formats):
            for side in Side:
                if not {PageFormat(one) for one in of_layer[side]} <= self._cache.possible_formats(layer, side):
                    raise CacheInputError(f"layer {layer}, {side.name}: pages of formats that the cache cannot have")

    def touch(self, hashes: Iterable[bytes]) -> None:
        """The files of these blocks have been used, those named later more recently."""
        with self._lock:
            files = dict.fromkeys(found[0].name for one in hashes if (found := self._found(one)) is not None)
        for name in files:
            with suppress(OSError):
                path = self.directory / name
                # Not the time of change, by which readers see that a file is still what they opened.
                os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))

    # Writing ---------------------------------------------------------------------------------------------------------

    def write(self, blocks: Sequence[BlockBytes]) -> bool:
        """Write up to 32 blocks, each behind the one before it, as one file; older files go for it. Never raises.

        Returns:
            Whether they are in the directory now.
        """
        try:
            return self._write(blocks)
        except (KvpackError, OSError, MemoryError) as error:
            self.failed_writes += 1
            if self.failed_writes == 1:
                with suppress(Warning):  # where warnings are errors: who evicts must not be stopped midway
                    warnings.warn(
                        f"a file of blocks could not be written to {self.directory} ({error!r}): such blocks are "
                        "dropped, and computed anew; failed_writes of the tiers' metrics counts on",
                        RuntimeWarning,
                        stacklevel=2,
                    )
            return False

    def _write(self, blocks: Sequence[BlockBytes]) -> bool:
        """
        Raises:
            KvpackError, OSError: the file is not written.
        """
        assert 0 < len(blocks) <= RUN_PAGES
        header = snapshot_header(
            self._cache,
            tokens=PAGE_TOKENS * len(blocks),
            first_page=blocks[0].depth - 1,
            fingerprint=self._fingerprint,
            parent=None if blocks[0].parent is None else blocks[0].parent.hex(),
            chain=blocks[-1].hash.hex(),
        )
        formats = np.stack([block.formats for block in blocks], -1)
        arrays: dict[str, npt.NDArray[np.generic]] = {
            "tokens": np.frombuffer(b"".join(block.tokens for block in blocks), "<i4").astype(np.int32),
            "page_formats": formats,
            "page_hashes": np.frombuffer(b"".join(block.hash for block in blocks), np.uint8).reshape(-1, HASH_BYTES),
        }
        if all(block.importance is not None for block in blocks):
            known = [np.stack(block.importance) for block in blocks if block.importance is not None]
            arrays["importance"] = np.stack(known, -1)
        coded = self._coder.encode(header, formats, [block.data for block in blocks])
        tensor_bytes = sum(len(blob) for _, blob in coded) + sum(array.nbytes for array in arrays.values())
        needed = tensor_bytes + _HEADER_BYTES + _TENSOR_BYTES * (len(coded) + len(arrays)) + len(header.to_json())
        name = hashlib.sha256(blocks[-1].hash + formats[:, :, -1].tobytes()).hexdigest() + ENDING
        with self._directory_locked():
            if not self._make_room(needed, name):
                return False
            write_snapshot(self.directory / name, header, arrays, [coded])
            self.written_files += 1
        with self._lock:
            self._forget(name)
            with suppress(FileNotFoundError):  # another process may have removed it already
                self._add(name, _state((self.directory / name).lstat()))
        return True

    @contextmanager
    def _directory_locked(self) -> Iterator[None]:
        """No other process that respects the lock writes or removes files: so the limit is kept to together."""
        descriptor = os.open(self.directory / _LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            with suppress(OSError):  # a file system without locks: files are safe, the limit is each one's own
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _ages(self) -> list[tuple[int, str, int]]:
        """Last use, name and bytes of each file, the least recently used first."""
        found = []
        with os.scandir(self.directory) as listed:
            for one in listed:
                if _NAME.fullmatch(one.name):
                    with suppress(FileNotFoundError):
                        state = one.stat(follow_symlinks=False)
                        if stat.S_ISREG(state.st_mode):
                            found.append((max(state.st_atime_ns, state.st_mtime_ns), one.name, state.st_size))
        return sorted(found)

    def _make_room(self, size_bytes: int, name: str) -> bool:
        """Remove files until so many bytes fit beside the rest but ``name``, which is about to be replaced."""
        if self.capacity_bytes is None:
            return True
        if size_bytes > self.capacity_bytes:
            return False
        ages = [age for age in self._ages() if age[1] != name]
        used = sum(size for _, _, size in ages)
        for _, oldest, size in ages:
            if used + size_bytes <= self.capacity_bytes:
                break
            (self.directory / oldest).unlink(missing_ok=True)
            with self._lock:
                self._forget(oldest)
            used -= size
        return True


@contextmanager
def _opened(path: Path) -> Iterator[SnapshotFile]:
    """
    Raises:
        KvpackError, OSError: as of SnapshotFile; SnapshotHeaderError: a link, a pipe, or whatever else is no file.
    """
    if not stat.S_ISREG(path.lstat().st_mode):
        raise SnapshotHeaderError(f"{path} is no plain file")
    with SnapshotFile(path) as file:
        yield file


def _state(found: os.stat_result) -> tuple[int, int, int]:
    return found.st_mtime_ns, found.st_size, found.st_ino
