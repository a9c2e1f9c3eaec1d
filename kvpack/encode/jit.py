"""How every kernel is compiled: without the GIL, and cached on disk where there is a place for that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit


def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """``njit(nogil=True, cache=True)``, or without the cache where neither package nor home can be written to."""
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:  # numba: no locator available for the file
        return njit(nogil=True)(function)
