"""Rows of a batch that bring different numbers of tokens: of T columns, the last ones of each row count (left padding).

How many is an int where all rows bring as many, else a list with one number a row.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

from kvpack.errors import CacheInputError

Counts = int | list[int]


def checked_counts(tokens: Sequence[int] | None, batch: int, columns: int) -> Counts:
    """How many of its last columns are each row's tokens; None: all are.

    Raises:
        CacheInputError: no number for each row, or one that is negative or more than there are columns.
    """
    if tokens is None:
        return columns
    try:
        counts = [operator.index(count) for count in tokens]
    except TypeError:
        raise CacheInputError(f"tokens is {tokens!r}; an integer for each row is wanted") from None
    if len(counts) != batch:
        raise CacheInputError(f"tokens has {len(counts)} numbers for a batch of {batch}")
    if counts and not 0 <= min(counts) <= max(counts) <= columns:
        raise CacheInputError(f"tokens is {counts}; each is of the {columns} that k, v and q have, and not negative")
    if not counts or counts.count(counts[0]) == len(counts):
        return counts[0] if counts else columns
    return counts


def most(counts: Counts) -> int:
    """Of a row."""
    return counts if isinstance(counts, int) else max(counts)


def in_columns(counts: Counts, columns: int, first: int, end: int) -> Counts:
    """How many of the columns from ``first`` to ``end`` are each row's tokens: the last ones of these, too."""
    if isinstance(counts, int):
        return max(0, min(counts - (columns - end), end - first))
    return [max(0, min(count - (columns - end), end - first)) for count in counts]


def rows_by_count(counts: list[int]) -> dict[int, list[int]]:
    """The rows that bring as many tokens, but for those that bring none."""
    found: dict[int, list[int]] = {}
    for row, count in enumerate(counts):
        if count:
            found.setdefault(count, []).append(row)
    return found
