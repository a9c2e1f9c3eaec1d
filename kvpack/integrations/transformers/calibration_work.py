"""The work directory of a calibration run: what is finished of it, so that a run that was ended goes on from there.

It lies beside the output, hidden, and is locked while a run uses it. A file in it has another name until it is whole.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from kvpack.errors import InputError
from kvpack.format.closing import Closing

_RUN = "run.json"
_UNFINISHED = ".part"


def work_path(output: Path) -> Path:
    """Where the work directory of an output is."""
    return output.with_name(f".{output.name}.work")


class WindowFile(Closing):
    """One tensor for each window of a text, in a file: the system keeps of it in memory what it has room for.

    Args:
        shape: of a window's tensor.
        dtype: of all.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self._shape, self._dtype = shape, dtype
        self._window_bytes = math.prod(shape) * dtype.itemsize
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def read(self, window: int) -> torch.Tensor:
        """The window's tensor, on the host."""
        found = torch.empty(self._shape, dtype=self._dtype)
        view = found.view(-1).view(torch.uint8).numpy().data
        done = 0
        while done < len(view):
            count = os.preadv(self._file, [view[done:]], window * self._window_bytes + done)
            if not count:
                raise OSError(f"a file of the work directory ends in window {window}: was it cut?")
            done += count
        return found

    def write(self, window: int, values: torch.Tensor) -> None:
        """Keep the window's tensor."""
        flat = values.detach().to("cpu", self._dtype).contiguous().view(-1).view(torch.uint8)
        view = flat.numpy().data
        done = 0
        while done < len(view):
            done += os.pwrite(self._file, view[done:], window * self._window_bytes + done)

    def close(self) -> None:
        """Let go of the file."""
        if self._file >= 0:
            os.close(self._file)
        self._file = -1


class WorkDirectory(Closing):
    """Finished parts of a run.

    Attributes:
        path: of the directory.
        resumed: whether another run of the same inputs has left something.

    Args:
        output: the file that the run is to make; the directory lies beside it.
        run: what the run's results depend on, as JSON values. What another run has left is removed.

    Raises:
        InputError: another process makes the same output.
        OSError: the directory cannot be made.
    """

    def __init__(self, output: Path, run: Mapping[str, Any]) -> None:
        self.path = work_path(output)
        self.path.mkdir(exist_ok=True)
        self._lock = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise InputError(f"another process makes {output}: wait for it, or choose another output with -o") from None
        text = json.dumps(dict(run), sort_keys=True)
        known = self.path / _RUN
        self.resumed = known.is_file() and known.read_text(encoding="utf-8") == text
        if self.resumed:
            return
        for entry in self.path.iterdir():
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        unfinished = self.path / (_RUN + _UNFINISHED)
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(known)

    def has(self, name: str) -> bool:
        """Whether a part is finished."""
        return (self.path / name).is_file()

    def windows(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> WindowFile:
        """A finished file of windows, or a new one, to be finished by :meth:`finish`."""
        path = self.path / name
        if not path.is_file():
            path = self.path / (name + _UNFINISHED)
            path.unlink(missing_ok=True)
        return WindowFile(path, shape, dtype)

    def finish(self, name: str) -> None:
        """Give a file its name: it is whole."""
        if (self.path / (name + _UNFINISHED)).exists():
            self._name(name)

    def save(self, name: str, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
        """Keep tensors, and strings with them."""
        unfinished = self.path / (name + _UNFINISHED)
        # An empty file of tensors is none.
        save_file({"": torch.zeros(0), **tensors}, unfinished, dict(metadata or {}))
        self._name(name)

    def _name(self, name: str) -> None:
        unfinished = self.path / (name + _UNFINISHED)
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())  # a machine may be taken away, too
        unfinished.replace(self.path / name)

    def open(self, name: str) -> Any:
        """A finished file of tensors, as ``safetensors.safe_open`` gives it: they are read when they are asked for."""
        return safe_open(self.path / name, "pt")

    def remove(self, name: str) -> None:
        """Let go of a part."""
        (self.path / name).unlink(missing_ok=True)

    def close(self) -> None:
        """Leave what is finished for a run that goes on."""
        if self._lock < 0:
            return
        if not any(entry.name != _RUN and not entry.name.endswith(_UNFINISHED) for entry in self.path.iterdir()):
            shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)
        self._lock = -1

    def delete(self) -> None:
        """Remove the directory: its output is made."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)
        self._lock = -1
