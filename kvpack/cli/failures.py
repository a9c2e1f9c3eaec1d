"""How commands fail: one sentence on stderr, or one JSON object on stdout, and an exit code."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import Any, NoReturn

import typer

from kvpack.cli.printing import printable


class ExitCode(IntEnum):
    """What the process's exit status means."""

    OK = 0
    FAILED = 1
    USAGE = 2
    CORRUPT = 3
    MISMATCH = 4
    NO_DEVICE = 5
    INTERRUPTED = 130


def failure(code: int, kind: str, message: str) -> dict[str, Any]:
    """What --json prints instead of a report."""
    return {"ok": False, "error": kind, "message": message, "exit_code": int(code)}


def fail(code: ExitCode, kind: str, message: str, as_json: bool) -> NoReturn:
    """Say what went wrong, and end the command."""
    if as_json:
        print(json.dumps(failure(code, kind, message)))
    else:
        lines = map(printable, message.split("\n"))  # they can have what a file says of itself
        print("kvpack: " + "\n".join(lines), file=sys.stderr)
    raise typer.Exit(int(code))


# What to do where the system refuses something. Nothing is left of an output that failed.
_ADVICE = {
    errno.EMFILE: "; a higher limit of open files helps: ulimit -n",
    errno.ENFILE: "; all programs of this machine together have too many files open",
    errno.ENOSPC: "; free some space: while a file is written it takes twice its size. Nothing was left behind",
    errno.EDQUOT: "; your quota is used up: while a file is written it takes twice its size. Nothing was left behind",
    errno.EROFS: "; -o names an output on a file system that can be written to",
    errno.EACCES: "; check the permissions of the file and its folders, or choose another output with -o",
    errno.EPERM: "; check the permissions of the file and its folders, or choose another output with -o",
    errno.EIO: "; the disk or the network behind it failed",
}


@contextmanager
def exit_codes(as_json: bool) -> Iterator[None]:
    """Known failures become one sentence (or one JSON object) and an exit code; others stay tracebacks."""
    from kvpack.errors import (
        CacheFullError,
        CacheInputError,
        DeviceError,
        FormatError,
        InputError,
        ModelMismatchError,
        NotInstalledError,
        NotSupportedError,
    )

    try:
        yield
    except (InputError, ModelMismatchError, CacheInputError, NotSupportedError) as error:
        fail(ExitCode.USAGE, type(error).__name__, str(error), as_json)
    except (DeviceError, NotInstalledError) as error:
        fail(ExitCode.NO_DEVICE, type(error).__name__, str(error), as_json)
    except FormatError as error:
        fail(ExitCode.CORRUPT, type(error).__name__, str(error), as_json)
    except CacheFullError as error:
        fail(ExitCode.FAILED, type(error).__name__, str(error), as_json)
    except typer.BadParameter as error:
        if not as_json:
            raise
        fail(ExitCode.USAGE, "InputError", error.message, as_json)
    except OSError as error:
        if isinstance(error, FileNotFoundError) and error.filename:
            fail(ExitCode.USAGE, "InputError", f"{os.fsdecode(error.filename)} does not exist", as_json)
        where = f": {os.fsdecode(error.filename)}" if isinstance(error.filename, str | bytes) else ""
        advice = _ADVICE.get(error.errno or 0, "")
        fail(ExitCode.FAILED, type(error).__name__, f"{error.strerror or error}{where}{advice}", as_json)
    except MemoryError as error:
        what = f"not enough memory ({error})" if str(error) else "not enough memory"
        advice = "; fewer --threads need less, and so does a model in more and smaller shards"
        fail(ExitCode.FAILED, "MemoryError", what + advice, as_json)
    except RuntimeError as error:
        if "start new thread" not in str(error):
            raise
        advice = "; fewer --threads may do, or a higher limit of processes (ulimit -u) or memory"
        fail(ExitCode.FAILED, "RuntimeError", f"no thread can be started{advice}", as_json)
    except KeyboardInterrupt:
        fail(ExitCode.INTERRUPTED, "KeyboardInterrupt", "interrupted; nothing half-written was left behind", as_json)


@contextmanager
def needs_device(as_json: bool) -> Iterator[None]:
    """Without torch, CuPy or a GPU the exit code says that there is no device."""
    from kvpack.errors import DeviceError

    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "cupy"):
            raise
        message = f"no device: {error.name} is not installed: pip install 'kvpack[cuda13]' or 'kvpack[cuda12]'"
        fail(ExitCode.NO_DEVICE, "DeviceError", message, as_json)
    except DeviceError as error:
        fail(ExitCode.NO_DEVICE, "DeviceError", str(error), as_json)


def require_matplotlib() -> None:
    """For --plot: before the work, not behind it.

    Raises:
        NotInstalledError: matplotlib is not installed.
    """
    from kvpack.errors import NotInstalledError

    try:
        import kvpack.bench.plot  # noqa: F401
    except ImportError as error:
        raise NotInstalledError(f"--plot needs matplotlib ({error}): pip install 'kvpack[plot]'") from None


def require_transformers(command: str) -> None:
    """For commands that run models, before torch is loaded.

    Raises:
        NotInstalledError: torch, transformers or accelerate is not installed.
    """
    from importlib.util import find_spec

    from kvpack.errors import NotInstalledError

    missing = [name for name in ("torch", "transformers", "accelerate") if find_spec(name) is None]
    if missing:
        raise NotInstalledError(f"{command} needs {' and '.join(missing)}: pip install 'kvpack[transformers]'")
    # Read when torch is loaded. Its threads spin while they wait, and keep those that decode from the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
