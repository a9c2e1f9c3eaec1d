"""Functions of `page_kernels` by kernels, on a GPU or the emulator, or by the CPU's code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import emulator
import pytest
from emulated_device import emulated_launch

from kvpack.runtime.device import kernels
from kvpack.runtime.kv import page_kernels

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


class KernelRuns:
    """
    Args:
        device: the CPU has the emulator; without a compiler for that the test is skipped.
        launch: of kernels there.

    Attributes:
        by_kernels: whether those run that are called next; a GPU's always do.
    """

    def __init__(
        self, device: str, monkeypatch: pytest.MonkeyPatch, launch: Callable[..., Any] = emulated_launch
    ) -> None:
        self.device, self.by_kernels = device, True
        if device == "cpu":
            if emulator.compiler() is None:
                pytest.skip("no C++ compiler for the emulator")
            monkeypatch.setattr(kernels, "launch", launch)
            monkeypatch.setattr(page_kernels, "_runs_kernels", lambda _device: self.by_kernels)
