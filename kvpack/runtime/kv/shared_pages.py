"""Pages that several sequences hold, because one has become what another was (:meth:`KVCache.select_sequences`).

Which sequences hold a page is said by the page table alone: a page that is shared has the same entry in several of
them, always in the same layer, side and index. So a selection is a permutation of the table, and nobody counts
references that would have to be changed page by page. Functions over arrays of entries.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvpack.format.pages import ENTRY_FORMAT_MASK
from kvpack.runtime.kv.page_table import NO_PAGE, Ints

_Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class DistinctPages:
    """Pages, each once however many sequences hold it.

    Attributes:
        first: i64 [pages], which of the places stands for each, in the order of places.
        member: i64 [places], which page each place has.
        pinned: bool [pages], whether a sequence pins it that holds it.
    """

    first: Ints
    member: Ints
    pinned: _Bools

    @classmethod
    def of(cls, entries: Ints, pinned: _Bools) -> DistinctPages:
        """Of places with these entries, [places]; where there is none yet, a page will come for that place alone."""
        to_come = -1 - np.arange(len(entries))
        _, first, member = np.unique(
            np.where(entries == NO_PAGE, to_come, entries), return_index=True, return_inverse=True
        )
        order = np.argsort(first)
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))
        member = rank[member.reshape(-1)]
        return cls(first[order], member, np.bincount(member, pinned, len(first)) > 0)

    def sums(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """[pages], over the places of each, of values [places]."""
        return np.bincount(self.member, values, len(self.first)).astype(np.float64)


def repeats(entries: Ints) -> int:
    """How many places of these name a page that one before them has named."""
    held = np.sort(entries[entries != NO_PAGE])
    return int(np.count_nonzero(held[1:] == held[:-1]))


def held_by_others(entries: Ints, sequence: int) -> _Bools:
    """[layers, 2, pages], whether a page of a sequence is held by others; entries are [layers, 2, sequences, pages]."""
    of_sequence = entries[:, :, sequence]
    others = np.delete(entries, sequence, axis=2) == of_sequence[:, :, None]
    return np.asarray(others.any(axis=2) & (of_sequence != NO_PAGE))


def pages_lost(entries: Ints, dropped: list[int], kept: list[int]) -> list[tuple[int, int]]:
    """(layer, entry) of the pages that some sequences hold and those which are kept do not, each once."""
    found = entries[:, :, dropped]
    lost = found != NO_PAGE
    for sequence in kept:
        lost &= found != entries[:, :, sequence, None]
    layers, *_ = np.nonzero(lost)
    # A page is of one layer.
    _, first = np.unique(found[lost], return_index=True)
    return list(zip(layers[first].tolist(), found[lost][first].tolist(), strict=True))


def is_any_shared(entries: Ints) -> bool:
    """Whether a page is held by more than one sequence, of entries [layers, 2, sequences, pages]."""
    held = np.sort(entries, axis=2)
    return bool(((held[:, :, 1:] == held[:, :, :-1]) & (held[:, :, 1:] != NO_PAGE)).any())


def is_quantized(entries: Ints, full_format: int) -> _Bools:
    """Whether there is a page that is not of 16 bits."""
    return np.asarray((entries != NO_PAGE) & (entries & ENTRY_FORMAT_MASK != full_format))


def places_to_copy(
    entries: Ints, writers: Sequence[tuple[int, int]], held: Container[int] = ()
) -> list[tuple[int, int, int]]:
    """(side, sequence, index) of the pages that must be copied before sequences write to them.

    Of a page that all holders write to, one of them keeps it.

    Args:
        entries: i64 [2, sequences, pages], of a layer.
        writers: (sequence, index) of the pages that are written to.
        held: entries of pages that someone else holds, too.
    """
    copied = []
    for side in range(len(entries)):
        writing: dict[tuple[int, int], list[int]] = {}
        for sequence, index in writers:
            writing.setdefault((index, int(entries[side, sequence, index])), []).append(sequence)
        for (index, entry), sequences in writing.items():
            holders = int(np.count_nonzero(entries[side, :, index] == entry))
            first = 1 if holders == len(sequences) and entry not in held else 0
            copied += [(side, sequence, index) for sequence in sequences[first:]]
    return copied
