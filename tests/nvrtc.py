"""Compiles kernels for a GPU that need not be there, and reads what they use."""

from __future__ import annotations

import re
from dataclasses import dataclass

from kvpack.runtime.kernels import Kernel


@dataclass(frozen=True)
class Resources:
    """What ptxas says of a kernel."""

    registers: int
    spill_bytes: int
    stack_bytes: int
    shared_bytes: int


def compile_for(kernel: Kernel, compute_capability: int) -> Resources:
    """Compile for ``sm_<compute_capability>``; an ``AssertionError`` with the compiler's words if that fails."""
    from cupy_backends.cuda.libs import nvrtc

    options = (*kernel.options(), f"-arch=sm_{compute_capability}", "--ptxas-options=-v")
    program = nvrtc.createProgram(kernel.text(), kernel.source, (), ())
    try:
        try:
            nvrtc.compileProgram(program, options)
        except nvrtc.NVRTCError as error:
            raise AssertionError(f"{kernel} for sm_{compute_capability}: {nvrtc.getProgramLog(program)}") from error
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
