"""Runs kernels of `cuda/` on the CPU, unchanged, with the C++ headers in `emulation/`.

A source is compiled by the C++ compiler of the machine into a program of one kernel; each launch is a process of its
own, so that a crash is an error here. What a launch checks, beside its results:

- shared memory: every access of a wrapper of `ptx.cuh` is within bounds, aligned, and not to bytes that a
  `copy_async_16` is still writing; at a block's start all bytes are 0xFF; plain accesses run into a guard page behind
  the dynamic part;
- global memory: every access of a wrapper, `__ldg` or atomic is within the arrays passed and aligned; plain accesses
  run into guard pages (at most 15 bytes behind an array's end; stores before it are found when the grid has ended);
  arrays that NumPy says are not writable cannot be written;
- warps and barriers: a mask that lacks the caller, threads that wait for each other in vain;
- where the compiler has its sanitizer: indices of arrays of known size, shifts by 32 and more, plain accesses that are
  not aligned, floats that do not fit into an integer.

Not emulated: the order of the sums of a tensor core, the contraction of `a * b + c` (each operation rounds), the bits
of NaN results of arithmetic, approximate functions (they are exact), blocks that run at the same time.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

TESTS = Path(__file__).parent
EMULATION = TESTS / "emulation"
CUDA = TESTS.parent / "cuda"

_FLAGS = (
    "-std=c++17",
    "-O1",
    "-w",
    "-fno-strict-aliasing",
    "-fwrapv",
    "-ffp-contract=off",
    "-fno-exceptions",
)
# Used where the compiler has them.
_OPTIONAL_FLAGS = (
    (
        "-fsanitize=bounds,shift-exponent,alignment,float-cast-overflow,integer-divide-by-zero",
        "-fno-sanitize-recover=all",
        "-static-libubsan",
    ),
    ("-ftrivial-auto-var-init=pattern",),
)
_EXIT_FAILED = 3
_MAGIC = 0x3130424F4A55454B


class EmulationError(Exception):
    """A kernel did what a GPU would not allow, or did not end; the message says where and what."""


class CompilationError(Exception):
    """The C++ compiler refused a kernel; the message is the compiler's."""


@cache
def compiler() -> str | None:
    """The C++ compiler: $CXX, or the first of g++, c++ and clang++ that is there; None without one."""
    chosen = os.environ.get("CXX")
    if chosen:
        return shutil.which(chosen)
    return next((path for name in ("g++", "c++", "clang++") if (path := shutil.which(name))), None)


def _cache_folder() -> Path:
    folder = Path(tempfile.gettempdir()) / f"kvpack-emulator-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to another user")
    return folder


@cache
def _remove_old_programs() -> None:
    """Deletes what has not been used for a week."""
    for path in _cache_folder().iterdir():
        with contextlib.suppress(OSError):  # a folder, or another process deletes it
            if path.stat().st_mtime < time.time() - 7 * 86400:
                path.unlink()


@cache
def _flags(program: str) -> tuple[str, ...]:
    """All flags that this compiler accepts."""
    flags = list(_FLAGS)
    for optional in _OPTIONAL_FLAGS:
        with tempfile.TemporaryDirectory() as folder:
            command = [program, *_FLAGS, *optional, "-x", "c++", "-", "-o", f"{folder}/program"]
            if subprocess.run(command, input=b"int main() {}", capture_output=True, check=False).returncode == 0:
                flags += optional
    return tuple(flags)


@cache
def _compiler_version(program: str) -> bytes:
    return subprocess.run([program, "--version"], capture_output=True, check=True).stdout


def _sources(path: Path) -> list[Path]:
    """`path` and the files that it includes, by name, from its own folder, `cuda/` and `emulation/`."""
    found: list[Path] = []
    left = [path]
    while left:
        path = left.pop()
        if path in found:
            continue
        found.append(path)
        for name in re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE):
            left += [folder / name for folder in (path.parent, CUDA, EMULATION) if (folder / name).is_file()]
    return found


def build(source: str | Path, function: str, defines: Mapping[str, int | str]) -> Path:
    """Compiles one kernel, or finds it in the cache; returns the program.

    Raises CompilationError if the compiler refuses it, FileNotFoundError if there is no source or no compiler.
    """
    program = compiler()
    if program is None:
        raise FileNotFoundError("no C++ compiler: install g++ or set CXX")
    path = (CUDA / source).resolve()  # an absolute path stays itself
    flags = [*_flags(program), "-DKVPACK_EMULATED", *(f"-D{name}={value}" for name, value in sorted(defines.items()))]
    text = f'#include "emulated_ptx.h"\nnamespace {{\n#include "{path}"\n}}\nKVPACK_EMULATED_MAIN({function})\n'
    # Folders are left out: the same text gives the same program wherever it lies.
    digest = hashlib.sha256(repr((function, flags, program)).encode() + _compiler_version(program))
    for file in [*sorted(EMULATION.iterdir()), *_sources(path)]:
        digest.update(f"\0{file.name}\0".encode() + file.read_bytes())
    built = _cache_folder() / digest.hexdigest()[:32]
    if built.exists():
        built.touch()
        return built
    _remove_old_programs()
    with tempfile.TemporaryDirectory(dir=built.parent) as folder:
        made = Path(folder) / "program"
        command = [
            program,
            *flags,
            f"-I{EMULATION}",
            f"-I{path.parent}",
            f"-I{CUDA}",
            "-x",
            "c++",
            "-",
            "-o",
            str(made),
        ]
        result = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            raise CompilationError(f"{source}: {function}\n{result.stderr}")
        made.rename(built)  # atomic: several processes may build the same
    return built


def _three(sizes: int | tuple[int, ...]) -> tuple[int, int, int]:
    given = (sizes,) if isinstance(sizes, int) else tuple(sizes)
    x, y, z = (*given, 1, 1)[:3]
    return int(x), int(y), int(z)


def _phase(array: np.ndarray) -> int:
    """The address modulo 16, where it means something: a view of an array lies where it lies in that array."""
    base: Any = array
    while isinstance(base.base, np.ndarray):
        base = base.base
    return int(array.ctypes.data - base.ctypes.data) % 16


def _merge(arrays: Mapping[int, np.ndarray]) -> tuple[list[dict[str, Any]], dict[int, tuple[int, int]]]:
    """The ranges of memory that the arrays cover, where arrays that overlap share one.

    Returns the ranges, and for each argument its range and its offset there.
    """
    ranges: list[dict[str, Any]] = []
    places: dict[int, tuple[int, int]] = {}
    for i, array in sorted(arrays.items(), key=lambda item: (item[1].ctypes.data, -item[1].nbytes)):
        if not array.flags.c_contiguous:
            raise ValueError(f"argument {i} is not contiguous")
        start, end = array.ctypes.data, array.ctypes.data + array.nbytes
        last = ranges[-1] if ranges else None
        if last is not None and start < last["end"] and start < end:
            last["end"] = max(last["end"], end)
            last["writable"] |= array.flags.writeable
            last["argument"] = min(last["argument"], i)
        else:
            ranges.append(
                {"start": start, "end": end, "writable": array.flags.writeable, "argument": i, "phase": _phase(array)}
            )
        places[i] = (len(ranges) - 1, start - ranges[-1]["start"])
    return ranges, places


def _pack_argument(i: int, value: Any, places: Mapping[int, tuple[int, int]]) -> bytes:
    if value is None:
        return struct.pack("<IIQ", ord("n"), 0, 0)
    if isinstance(value, np.ndarray):
        return struct.pack("<IIQ", ord("p"), *places[i])
    for kind, scalar in (("i", np.int32), ("u", np.uint32), ("q", np.uint64), ("f", np.float32)):
        if isinstance(value, scalar):
            return struct.pack("<II", ord(kind), 0) + value.tobytes().ljust(8, b"\0")
    raise TypeError(
        f"argument {i} is {type(value).__name__}: an array, None, int32, uint32, uint64 or float32 is wanted"
    )


def run(
    source: str | Path,
    function: str,
    grid: int | tuple[int, ...],
    block: int | tuple[int, ...],
    args: Sequence[Any],
    *,
    shared_bytes: int = 0,
    defines: Mapping[str, int | str],
    shuffle_seed: int | None = None,
    timeout: float = 300,
) -> None:
    """Compiles and runs a kernel; the arrays have its results afterwards.

    source: a file of `cuda/`, or an absolute path
    args: for pointers: contiguous NumPy arrays (overlapping ones share memory; those that are not writable are
        read-only for the kernel) or None; np.int32, np.uint32, np.uint64, np.float32 for scalars of that type
    shared_bytes: dynamic shared memory
    defines: the -D options
    shuffle_seed: if given, blocks run in a random order, and so do the threads of a block between barriers
    timeout: seconds

    Raises EmulationError (arrays unchanged), CompilationError, ValueError (an array that is not contiguous), TypeError
    (an argument of another type), FileNotFoundError.
    """
    program = build(source, function, defines)
    ranges, places = _merge({i: value for i, value in enumerate(args) if isinstance(value, np.ndarray)})
    arguments = b"".join(_pack_argument(i, value, places) for i, value in enumerate(args))
    shuffled = shuffle_seed is not None
    header = struct.pack(
        "<Q8IQII",
        _MAGIC,
        *_three(grid),
        *_three(block),
        shared_bytes,
        shuffled,
        shuffle_seed or 0,
        len(ranges),
        len(args),
    )
    offset = len(header) + 32 * len(ranges) + len(arguments)
    table = b""
    for item in ranges:
        size = item["end"] - item["start"]
        item["offset"] = offset
        item["bytes"] = (ctypes.c_char * size).from_address(item["start"])
        table += struct.pack("<QQIIQ", size, offset, item["phase"], item["writable"], item["argument"])
        offset += size
    with tempfile.NamedTemporaryFile(prefix="kvpack-job-") as job:
        job.write(header + table + arguments)
        for item in ranges:
            job.write(item["bytes"])
        job.flush()
        output, errors, code = _execute([str(program), job.name], timeout)
        sys.stdout.write(output)
        if code != 0:
            what = errors.strip() or f"ended with code {code}"
            raise EmulationError(f"{source}: {function}: {what}")
        for item in ranges:
            if item["writable"]:
                job.seek(item["offset"])
                job.readinto(item["bytes"])


def _execute(command: list[str], timeout: float) -> tuple[str, str, int]:
    """Standard output, standard error and the exit code; a program that runs too long says where it is."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            output, errors = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.terminate()
            try:
                output, errors = process.communicate(timeout=5)
            except subprocess.TimeoutExpired:
                process.kill()
                output, errors = process.communicate()
            return output, f"did not end within {timeout} s; {errors}", process.returncode or _EXIT_FAILED
        return output, errors, process.returncode
