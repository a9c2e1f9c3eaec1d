"""Compiles kernels for a GPU that need not be there, and reads what they use."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import re
import tempfile
import time
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from kvpack.runtime.device.kernels import Kernel, source_hash

# What CuPy appends to the options of a launch.
_CUPY_OPTIONS = ("-ftz=true", "--device-as-default-execution-space")


@dataclass(frozen=True)
class Resources:
    """What ptxas says of a kernel."""

    registers: int
    spill_bytes: int
    stack_bytes: int
    shared_bytes: int


def missing() -> str | None:
    """Why nothing can be compiled here; None if it can."""
    try:
        from cupy_backends.cuda.libs import nvrtc

        nvrtc.getVersion()
    except Exception as error:  # CuPy's own class where NVRTC is absent
        return f"no CuPy with NVRTC: {error}"
    return None


@cache
def _known() -> Path:
    """A folder with what ptxas said of kernels: the same text, options and compiler give the same again."""
    folder = Path(tempfile.gettempdir()) / f"kvpack-nvrtc-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to another user")
    for path in folder.iterdir():
        with contextlib.suppress(OSError):  # another process deletes it
            if path.stat().st_mtime < time.time() - 7 * 86400:
                path.unlink()
    return folder


@cache
def _compiler() -> list[str]:
    """Versions of all that has a part in compiling."""
    found = [f"{d.name} {d.version}" for d in importlib.metadata.distributions() if d.name.startswith(("nvidia", "cu"))]
    return sorted(found)


def compile_for(kernel: Kernel, compute_capability: int) -> Resources:
    """What ptxas says of a kernel that a launch on ``sm_<compute_capability>`` would compile.

    Raises:
        AssertionError: it fails; with the compiler's words.
    """
    from cupy._core.core import assemble_cupy_compiler_options
    from cupy_backends.cuda.libs import nvrtc

    options = (
        *assemble_cupy_compiler_options(kernel.options()),
        *_CUPY_OPTIONS,
        *(() if kernel.architecture else (f"-arch=sm_{compute_capability}",)),
        "--ptxas-options=-v",
    )
    text = kernel.text()
    # Where sources lie is no matter; what all of them hold is.
    wherever = [option for option in options if not option.startswith("-I")]
    asked = json.dumps([text, source_hash(), kernel.function, wherever, _compiler(), nvrtc.getVersion()])
    known = _known() / hashlib.sha256(asked.encode()).hexdigest()
    with contextlib.suppress(FileNotFoundError):
        found = Resources(**json.loads(known.read_text()))
        os.utime(known)
        return found
    resources = _compile(kernel, text, options)
    with tempfile.NamedTemporaryFile("w", dir=known.parent, delete=False) as file:
        json.dump(asdict(resources), file)
    os.replace(file.name, known)
    return resources


def _compile(kernel: Kernel, text: str, options: tuple[str, ...]) -> Resources:
    from cupy_backends.cuda.libs import nvrtc

    program = nvrtc.createProgram(text, kernel.source, (), ())
    try:
        try:
            nvrtc.compileProgram(program, options)
        except nvrtc.NVRTCError as error:
            raise AssertionError(f"{kernel}, {options}: {nvrtc.getProgramLog(program)}") from error
        log = nvrtc.getProgramLog(program)
    finally:
        nvrtc.destroyProgram(program)
    log = log[log.index(f"'{kernel.function}'") :]

    def number(pattern: str) -> int:
        found = re.search(pattern, log)
        return int(found[1]) if found else 0

    return Resources(
        number(r"Used (\d+) registers"),
        number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
        number(r"(\d+) bytes stack frame"),
        number(r"(\d+) bytes smem"),
    )
