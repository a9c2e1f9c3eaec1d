"""Devices: which one is meant, what it gives and has free, and by which numbers kernels know types of activations."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from kvpack.errors import DeviceError
from kvpack.runtime.device.kernels import require_device

# What the driver keeps of a multiprocessor's shared memory for each block.
_RESERVED_BYTES = 1024
# As in cuda/common/activations.cuh.
ACTIVATIONS = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}


def resolve_device(device: torch.device | str | None) -> torch.device:
    """The device that is meant, with its index: CUDA if torch has it, else the CPU, where None is given.

    Raises:
        DeviceError: it cannot be used; the message says what to install.
    """
    try:
        chosen = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device is None else device)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise DeviceError(f"{device!r} is no device ({reason}): use 'cuda', 'cuda:1' or 'cpu'") from None
    if chosen.type == "cpu":
        return torch.device("cpu")
    if chosen.type != "cuda":
        raise DeviceError(f"kvpack runs on CUDA devices and on the CPU, not on {chosen.type!r}: use device='cpu'")
    require_device(chosen)
    return torch.device("cuda", torch.cuda.current_device() if chosen.index is None else chosen.index)


@dataclass(frozen=True)
class Limits:
    """What a device gives: multiprocessors, and shared memory of one and of a block.

    Attributes:
        architecture: its compute capability, as 90 for 9.0.
        name: as CUDA has it, as ``"NVIDIA H100 80GB HBM3"``.
    """

    architecture: int
    multiprocessors: int
    shared_bytes: int
    shared_block_bytes: int
    name: str = ""

    def block_bytes(self, resident: int) -> int:
        """Shared memory that a block may have, if ``resident`` of them share a multiprocessor."""
        return min(self.shared_bytes // resident - _RESERVED_BYTES, self.shared_block_bytes)


@cache
def device_limits(device: torch.device) -> Limits:
    """Limits of a CUDA device."""
    found: Any = torch.cuda.get_device_properties(device)  # torch's stubs do not know all of it
    return Limits(
        10 * found.major + found.minor,
        found.multi_processor_count,
        found.shared_memory_per_multiprocessor,
        found.shared_memory_per_block_optin,
        found.name,
    )


def free_bytes(device: torch.device) -> int | None:
    """Of a device, what torch holds unused counted; None where it is not known."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
