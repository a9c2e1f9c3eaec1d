"""A compression in parts: what several processes, on one machine or on many, have in common while they make one output.

Beside the output ``NAME`` lies ``NAME.parts``::

    job.json               what all parts must agree on; compared whenever a part begins
    steps.json             steps that the whole model shares, once somebody has found them
    findings/STAGE/…       what the search for these found of the tensors of each file, by whoever did it
    model/                 finished files of weights, each put there at once; in the end all files, and it is renamed
    records/FILE.json      what each finished file is, with its CRC-32; written behind the file
    making/12345678/       files that one process is writing; those of a killed one stay until the end
    joining/12345678/      small files of one process that puts the output together

There are no locks, which file systems of several machines may lack: everything is put in place by a rename, and whoever
makes a file anew makes the same bytes. So a part may be run twice, at once or after it was killed.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvpack.encode.listing import listed
from kvpack.encode.model_directory import json_text
from kvpack.encode.moments import sampled_crc32
from kvpack.errors import DamagedPartError, InputError, PartsMismatchError
from kvpack.format.container import Container
from kvpack.format.temporary_files import hidden_name

_VERSION = 1
_READ_BYTES = 1 << 24
# Of so many tensors of a file samples are compared: each process looks at all files, perhaps over a network.
_SAMPLED_TENSORS = 16
# How many names a message lists.
_SHOWN = 3


def check_shards(shards: tuple[int, int]) -> None:
    """Raises InputError: not a part, from 1, of a number of parts."""
    is_pair = isinstance(shards, tuple) and len(shards) == 2 and all(type(number) is int for number in shards)
    if not is_pair or not 1 <= shards[0] <= shards[1]:
        raise InputError(f"shards {shards!r}: a part and the number of all parts are needed, as 1/4 to 4/4")


def divide(sizes: Sequence[int], parts: int) -> list[list[int]]:
    """Numbers of ``sizes`` in ``parts`` lists of sums as even as may be, some of them empty if there are not so many.

    The largest first, each where there is least so far: no sum is above 4/3 of the least possible (Graham 1969).

    >>> divide([5, 4, 3, 3, 3], 2)
    [[0, 3], [1, 2, 4]]
    """
    found: list[list[int]] = [[] for _ in range(parts)]
    sums = [0] * parts
    for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        least = min(range(parts), key=lambda part: (sums[part], len(found[part])))
        found[least].append(number)
        sums[least] += sizes[number]
    return [sorted(numbers) for numbers in found]


def container_crc32(container: Container) -> str:
    """What tells a file from another one of the same tensors: its header and samples of some tensors, eight digits."""
    header = [container.metadata, [(t.name, t.dtype, t.shape) for t in container.tensors.values()]]
    found = zlib.crc32(json.dumps(header, sort_keys=True).encode())
    names = list(container.tensors)
    for place in dict.fromkeys(len(names) * sample // _SAMPLED_TENSORS for sample in range(_SAMPLED_TENSORS)):
        if names:
            found = zlib.crc32(sampled_crc32(container, names[place]).encode(), found)
    return f"{found:08x}"


def file_crc32(path: Path) -> str:
    """The CRC-32 of a whole file, eight digits. Raises OSError."""
    found = 0
    with path.open("rb") as file:
        while piece := file.read(_READ_BYTES):
            found = zlib.crc32(piece, found)
    return f"{found:08x}"


def _sealed(value: Mapping[str, Any]) -> str:
    """JSON text that says its own CRC-32."""
    text = json.dumps(value, sort_keys=True)
    return json_text({"crc32": f"{zlib.crc32(text.encode()):08x}", "value": value})


def _unsealed(path: Path) -> dict[str, Any] | None:
    """What :func:`_sealed` was given; None: there is none, or it is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        value = found["value"]
        is_whole = found["crc32"] == f"{zlib.crc32(json.dumps(value, sort_keys=True).encode()):08x}"
    except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return value if is_whole and isinstance(value, dict) else None


def _differences(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """In what two jobs differ, as a message says it: options by name and value, and names of files."""
    found = []
    for key in dict.fromkeys([*mine, *theirs]):
        ours, other = mine.get(key), theirs.get(key)
        if ours == other:
            continue
        if isinstance(ours, dict) and isinstance(other, dict):
            names = [name for name in dict.fromkeys([*ours, *other]) if ours.get(name) != other.get(name)]
            found += _differences(ours, other) if key == "options" else [f"{key}: {listed(names, _SHOWN)}"]
        else:
            here, there = ("given" if isinstance(value, dict) else repr(value) for value in (ours, other))
            found.append(f"{key} is {here} here, {there} there")
    return found


@dataclass
class PartReport:
    """What one part of a compression did.

    Attributes:
        number, of: which part, from 1, of how many.
        files: weight files that are the part's, relative to the directory.
        found: those that an earlier run had made; all of them where the output was complete before.
        missing: weight files that nobody has finished yet.
        missing_parts: which of the ``of`` parts these belong to.
        joined: whether the output is complete and in its place.
        was_there: whether it was so before this part began.
    """

    number: int
    of: int
    files: list[str]
    found: list[str]
    missing: list[str]
    missing_parts: list[int]
    joined: bool
    was_there: bool = False


class Parts:
    """``NAME.parts``, which many processes may have open at once.

    Args:
        target: the output.
        job: what parts must agree on, as JSON has it.

    Attributes:
        was_there: whether the output was in its place before, so that no part of it is to be made: there is no
            ``NAME.parts`` then.

    Raises:
        PartsMismatchError: other parts were made with other options, of another source, or by another kvpack.
        OSError: the directory cannot be made or read.
    """

    was_there = False

    def __init__(self, target: Path, job: Mapping[str, Any]) -> None:
        self.target = Path(os.path.abspath(target))
        self.directory = parts_directory(self.target)
        self.model, self._records = self.directory / "model", self.directory / "records"
        self._making, self._joining = self.directory / "making", self.directory / "joining"
        self._findings = self.directory / "findings"
        self.job: dict[str, Any] = json.loads(json.dumps({"version": _VERSION, **job}))
        if _is_output(self.target) and (self.model.is_dir() or not self.directory.is_dir()):
            self.was_there = True
            return
        is_new = not self.directory.is_dir() and self._create()
        if is_new and _is_output(self.target):  # which others put together since
            self.remove()
            self.was_there = True
            return
        theirs = _unsealed(self.directory / "job.json")
        if theirs is None:
            if not self.directory.exists():  # others have put the output together since
                self.was_there = True
                return
            raise DamagedPartError(
                f"{self.directory / 'job.json'} is missing or damaged: what was made for which options is not known; "
                f"remove {self.directory} and run all parts again"
            )
        self._check_job(theirs, f"{self.directory} was begun")

    def _create(self) -> bool:
        """Make the directory with all that is always in it; whether nobody else did so meanwhile."""
        new = self.directory.with_name(hidden_name(self.target.name, "tmp"))
        new.mkdir()
        try:
            for folder in (self.model, self._records, self._making, self._joining, self._findings):
                (new / folder.name).mkdir()
            (new / "job.json").write_text(_sealed(self.job), encoding="utf-8")
            new.rename(self.directory)
        except FileExistsError:
            return False
        except OSError:
            if self.directory.is_dir():  # ENOTEMPTY
                return False
            raise
        else:
            return True
        finally:
            shutil.rmtree(new, ignore_errors=True)

    def _check_job(self, theirs: Mapping[str, Any], what: str) -> None:
        if differences := _differences(self.job, theirs):
            raise PartsMismatchError(
                f"{what} otherwise: {'; '.join(differences)}. All parts of an output need the same source, options and "
                f"kvpack: run this one as the others, or remove {self.directory} and run all again"
            )

    @property
    def is_joined(self) -> bool:
        """Whether the output has been put in its place."""
        return not self.model.is_dir() and _is_output(self.target)

    def read_steps(self) -> dict[str, Any] | None:
        """Steps, and layouts, by tensor that somebody has found for the whole model; None: nobody yet."""
        return _unsealed(self.directory / "steps.json")

    def write_steps(self, steps: Mapping[str, Any]) -> None:
        """Keep them for other parts, and for the next run of this one."""
        self._write(self.directory / "steps.json", steps)

    def read_finding(self, stage: str, path: Path) -> dict[str, Any] | None:
        """What a stage of the search for steps has found of a file's tensors; None: nobody has looked yet."""
        return _unsealed(_json_of(self._findings / stage / path))

    def write_finding(self, stage: str, path: Path, found: Mapping[str, Any]) -> None:
        """Let all parts know it."""
        _make_folders(self._findings, stage / path.parent)
        self._write(_json_of(self._findings / stage / path), found)

    def record_of(self, path: Path) -> dict[str, Any] | None:
        """What is known of a finished file of weights; None: nothing, or by no record that is whole."""
        record = _unsealed(self._record_path(path))
        return record if record is not None and {"job", "part", "bytes", "crc32"} <= record.keys() else None

    def finished(self, path: Path) -> dict[str, Any] | None:
        """The record of a file of weights that has the bytes with which it was written, which are read; else None.

        Raises:
            PartsMismatchError: it is of another job.
            OSError: it cannot be read.
        """
        record = self.record_of(path)
        if record is None:
            return None
        file = self.model / path
        self._check_job(record["job"], f"{file} (part {_shown(record['part'])}) was made")
        try:
            is_whole = file.stat().st_size == record["bytes"] and file_crc32(file) == record["crc32"]
        except FileNotFoundError:
            return None
        return record if is_whole else None

    @contextmanager
    def making(self, path: Path) -> Iterator[Path]:
        """Where to write a file of weights; at the end it is in ``model``, and known once it has its record."""
        self._record_path(path).unlink(missing_ok=True)
        folder = self._making / secrets.token_hex(4)
        folder.mkdir()
        try:
            _make_folders(folder, path.parent)
            yield folder / path
            _make_folders(self.model, path.parent)
            (folder / path).replace(self.model / path)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def write_record(self, path: Path, part: tuple[int, int], about: Mapping[str, Any]) -> dict[str, Any]:
        """Say of a file of weights that it is finished, and ``about`` it what reports and other files need.

        Returns:
            The record.
        """
        file = self.model / path
        record = {"job": self.job, "part": list(part), "bytes": file.stat().st_size, "crc32": file_crc32(file), **about}
        _make_folders(self._records, path.parent)
        self._write(self._record_path(path), record)
        return record

    def check_whole(self, path: Path) -> None:
        """Check a finished file before the output is put together.

        Raises:
            DamagedPartError: it is damaged; says which part makes it anew.
            PartsMismatchError: it is of another job.
            FileNotFoundError: another process has put the output together.
        """
        if self.finished(path) is not None:
            return
        if self.is_joined:
            raise FileNotFoundError(f"{self.model} is in its place")
        record = self.record_of(path)
        by = "its part" if record is None else f"part {_shown(record['part'])}"
        raise DamagedPartError(
            f"{self.model / path} is not as it was written: run {by} again, which makes this file anew"
        )

    @contextmanager
    def joining(self) -> Iterator[Path]:
        """A folder for the files beside the weights, which :meth:`put_in_place` takes; of this process alone."""
        folder = self._joining / secrets.token_hex(4)
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def put_in_place(self, folder: Path, weight_files: Sequence[Path]) -> None:
        """Let the weights and what ``folder`` holds be the output. Of several processes one does.

        Raises:
            InputError: there are files that are no part of the output.
            FileNotFoundError: another process has done it: :attr:`is_joined` tells.
        """
        added = [file.relative_to(folder) for file in sorted(folder.rglob("*")) if file.is_file()]
        for file in added:
            _make_folders(self.model, file.parent)
            (folder / file).replace(self.model / file)
        expected = {*weight_files, *added}
        files = [file.relative_to(self.model) for file in sorted(self.model.rglob("*")) if file.is_file()]
        if strange := [str(file) for file in files if file not in expected]:
            raise InputError(
                f"{self.model} holds what is no part of the output: {listed(strange, _SHOWN)}; move it away"
            )
        self.model.rename(self.target)

    def remove(self) -> None:
        """Take ``NAME.parts`` away, whoever else does so at the same time."""
        hidden = self.directory.with_name(hidden_name(self.target.name, "tmp"))
        try:
            self.directory.rename(hidden)
        except FileNotFoundError:
            return
        shutil.rmtree(hidden, ignore_errors=True)

    def _record_path(self, path: Path) -> Path:
        return _json_of(self._records / path)

    def _write(self, path: Path, value: Mapping[str, Any]) -> None:
        """Put a JSON file in place at once."""
        new = path.with_name(hidden_name(path.name, "tmp"))
        try:
            new.write_text(_sealed(value), encoding="utf-8")
            new.replace(path)
        finally:
            new.unlink(missing_ok=True)


def _json_of(path: Path) -> Path:
    """Where something about a file stands."""
    return path.with_name(f"{path.name}.json")


def parts_directory(target: Path) -> Path:
    """Where the parts of an output lie."""
    return target.with_name(f"{target.name}.parts")


def _is_output(target: Path) -> bool:
    """Whether something is there that parts would have to replace."""
    return target.exists() and not (target.is_dir() and not any(target.iterdir()))


def _make_folders(base: Path, relative: Path) -> None:
    """Folders below ``base``, which itself is never made: it may be gone because the output is complete."""
    for folder in reversed([relative, *relative.parents][:-1]):
        (base / folder).mkdir(exist_ok=True)


def _shown(part: object) -> str:
    """``[2, 8]`` as ``2/8``."""
    return "/".join(map(str, part)) if isinstance(part, list) else str(part)
