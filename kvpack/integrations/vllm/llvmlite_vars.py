"""Lets vLLM's workers for CPUs start where numba is loaded.

Such a worker asks each object in each module for ``vars()`` when it starts. llvmlite has one that answers with a
function of its library, which is no dictionary. A second engine of a process meets what the first one loaded.
"""

from __future__ import annotations


def give_vars() -> None:
    """Have llvmlite's library answer ``vars()`` with an empty dictionary; a second call does nothing."""
    from llvmlite.binding import ffi

    functions = getattr(type(ffi.lib), "_fntab", None) and ffi.lib._fntab
    if isinstance(functions, dict) and not isinstance(functions.get("__dict__"), dict):
        functions["__dict__"] = {}
