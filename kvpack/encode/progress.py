"""How ``compress`` and ``decompress`` tell how far they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """Called as work goes on: ``total`` once with all bytes to read, ``advance`` with bytes done, ``tensor`` with
    names."""

    total: Callable[[int], None] = lambda _: None
    advance: Callable[[int], None] = lambda _: None
    tensor: Callable[[str], None] = lambda _: None
