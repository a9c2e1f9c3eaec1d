"""Compiles kernels for a GPU that need not be there, and reads what they use."""

from __future__ import annotations

import re
from dataclasses import dataclass

from kvpack.runtime.device.kernels import Kernel

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


def compile_for(kernel: Kernel, compute_capability: int) -> Resources:
    """Compile as a launch on ``sm_<compute_capability>`` would.

    Raises:
        AssertionError: it fails; with the compiler's words.
    """
    from cupy._core.core import assemble_cupy_compiler_options
    from cupy_backends.cuda.libs import nvrtc

    options = (
        *assemble_cupy_compiler_options(kernel.options()),
        *_CUPY_OPTIONS,
        f"-arch=sm_{compute_capability}",
        "--ptxas-options=-v",
    )
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
