"""How every kernel is compiled: without the GIL, and cached on disk where there is a place for that."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from numba import njit
from numba.core.caching import FunctionCache
from numba.core.compiler_lock import global_compiler_lock

_told = False


def _tell(reason: object) -> None:
    """Once: kernels are compiled again by each process, which takes some ten seconds."""
    global _told
    if not _told:
        _told = True
        warnings.warn(
            f"compiled CPU kernels cannot be cached ({reason}): each process compiles them anew. NUMBA_CACHE_DIR names "
            "another directory for them",
            RuntimeWarning,
            stacklevel=2,
        )


class _KernelCache(FunctionCache):
    """numba's cache, without which a kernel works as well: no failure of it is the caller's."""

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)  # type: ignore[no-untyped-call]
        except Exception as error:  # an unreadable directory, or whatever unpickling makes of a damaged file
            _tell(error)
            with suppress(OSError):
                self.flush()  # type: ignore[no-untyped-call]
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)  # type: ignore[no-untyped-call]
        except Exception as error:  # full, read-only, gone, out of descriptors
            _tell(error)


def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """``njit(nogil=True)``, cached on disk where that is possible; a warning says so where it is not."""
    compiled: Any = njit(nogil=True)(function)
    try:
        compiled._cache = _KernelCache(function)  # type: ignore[no-untyped-call]  # what njit(cache=True) does, with numba's own class
    except (RuntimeError, OSError) as error:  # numba: no locator available for the file
        _tell(error)
    return compiled  # type: ignore[no-any-return]


# A fork while another thread compiles would leave the child with a lock that nobody opens. So a fork waits for the
# compiler, as it waits for Python's import lock and its allocator.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=global_compiler_lock.acquire,
        after_in_parent=global_compiler_lock.release,
        after_in_child=global_compiler_lock.release,
    )
