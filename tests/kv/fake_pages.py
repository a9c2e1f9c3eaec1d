"""Pages that are nothing but numbers, for a store of prefixes without a cache: who holds them, and of what kind they
are."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from kvpack.errors import PageEntryError
from kvpack.format.pages import PageFormat, Side

LAYERS = 2
SLAB_PAGES = 4
# An entry is 16 · number + format, as a real one.
FULL, SMALL = PageFormat.FP16, PageFormat.INT4
BYTES = {FULL: 64, SMALL: 16}


class FakePages:
    """Sequences are written with :meth:`write`; then they are as those of a cache."""

    def __init__(self) -> None:
        self.numbers = 0
        self.sequences: dict[int, np.ndarray] = {}  # entries [layers, 2, pages]
        self.held: Counter[int] = Counter()
        self.free: list[int] = []

    def new(self, pages: int, page_format: PageFormat = SMALL) -> np.ndarray:
        count = LAYERS * 2 * pages
        entries = (np.arange(self.numbers + 1, self.numbers + 1 + count) << 4) | int(page_format)
        self.numbers += count
        # Layers and sides of a page have consecutive numbers.
        return entries.reshape(pages, LAYERS, 2).transpose(1, 2, 0)

    def write(self, sequence: int, pages: int, page_format: PageFormat = SMALL) -> None:
        """A sequence has this many pages; those that it has stay."""
        before = self.sequences.get(sequence, np.empty((LAYERS, 2, 0), np.int64))
        self.sequences[sequence] = np.concatenate([before, self.new(pages - before.shape[-1], page_format)], axis=-1)

    def in_table(self, entry: int) -> bool:
        return any((entries == entry).any() for entries in self.sequences.values())

    # As :class:`kvpack.runtime.kv.prefix_store.Pages`.

    def page_entries(self, sequence: int, first: int, end: int) -> np.ndarray:
        entries = self.sequences[sequence]
        assert end <= entries.shape[-1]
        return entries[..., first:end].copy()

    def retain(self, entries: np.ndarray) -> None:
        self.held.update(entries.reshape(-1).tolist())

    def release(self, entries: np.ndarray) -> int:
        freed = 0
        for entry in entries.reshape(-1).tolist():
            if not self.held[entry]:
                raise PageEntryError(f"{entry} is not held")
            self.held[entry] -= 1
            if not self.held[entry] and not self.in_table(entry):
                freed += BYTES[PageFormat(entry & 15)]
        return freed

    def adopt(self, sequence: int, entries: np.ndarray, tokens: int, importance: object) -> None:
        assert sequence not in self.sequences
        assert entries.shape == (LAYERS, 2, tokens // 64)
        assert all(self.held[entry] for entry in entries.reshape(-1).tolist())
        self.sequences[sequence] = entries.copy()

    def importance_of(self, sequence: int) -> None:
        pass

    def page_bytes(self, entries: np.ndarray) -> np.ndarray:
        return np.where(entries & 15 == FULL, BYTES[FULL], BYTES[SMALL])

    def is_full(self, entries: np.ndarray) -> Any:
        return entries & 15 == FULL

    def is_only_held(self, entry: int) -> bool:
        return self.held[entry] == 1 and not self.in_table(entry)

    def kind(self, entry: int) -> tuple[Side, PageFormat]:
        return Side(((entry >> 4) - 1) % 2), PageFormat(entry & 15)

    def kind_bytes(self, kind: tuple[Side, PageFormat]) -> int:
        return BYTES[kind[1]]

    def slab(self, entry: int) -> tuple[int, int, int]:
        side, page_format = self.kind(entry)
        slab = ((entry >> 4) - 1) // 2 // SLAB_PAGES
        return slab << 8 | side << 4 | page_format, SLAB_PAGES, SLAB_PAGES * BYTES[page_format]
