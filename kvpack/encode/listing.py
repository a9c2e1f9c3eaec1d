"""Names as messages list them."""

from __future__ import annotations

from collections.abc import Sequence


def listed(names: Sequence[str], most: int, more: str = "more") -> str:
    """The first names, and how many ``more`` there are.

    >>> listed(["a", "b", "c", "d"], 2)
    'a, b and 2 more'
    >>> listed(["a", "b"], 2)
    'a, b'
    """
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} {more}" if rest > 0 else "")
