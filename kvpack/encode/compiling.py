"""Tell the user when kernels are being compiled: the first run on a machine, some ten seconds in all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from numba.core import event


class _Listener(event.Listener):
    def __init__(self, callback: Callable[[], None]) -> None:
        self._callback = callback

    def on_start(self, event: object) -> None:
        self._callback()

    def on_end(self, event: object) -> None:
        pass


@contextmanager
def on_compile(callback: Callable[[], None]) -> Iterator[None]:
    """Call ``callback`` whenever numba compiles a function rather than loading it from its cache."""
    with event.install_listener("numba:compile", _Listener(callback)):
        yield
