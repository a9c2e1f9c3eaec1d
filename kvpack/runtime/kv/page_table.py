"""The page table: which page holds which tokens, on the host and, the same, on the device. It grows by need.

Both sides change together: what can fail (memory, copies) comes before the first change of either.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from kvpack.errors import CacheFullError
from kvpack.format.pages import PAGE_TOKENS, Side

# Stands in page tables where there is no page.
NO_PAGE = -1
_FIRST_PAGES = 64

Ints = npt.NDArray[np.int64]
# One page's layer, side, sequence and index.
Place = tuple[int, int, int, int]


@dataclass(frozen=True)
class Places:
    """Pages by where they are, arrays of n."""

    layer: Ints
    side: Ints
    sequence: Ints
    index: Ints

    @classmethod
    def of(cls, places: list[Place]) -> Places:
        return cls(*np.array(places, np.int64).reshape(-1, 4).T)

    def each(self) -> list[Place]:
        return list(zip(*(part.tolist() for part in self.where), strict=True))

    def __len__(self) -> int:
        return len(self.layer)

    def __getitem__(self, chosen: npt.NDArray[np.generic]) -> Places:
        return Places(self.layer[chosen], self.side[chosen], self.sequence[chosen], self.index[chosen])

    @property
    def where(self) -> tuple[Ints, Ints, Ints, Ints]:
        """Indices into page tables."""
        return self.layer, self.side, self.sequence, self.index


class PageTable:
    """Entries and lengths of all sequences in all layers.

    Args:
        layers, sequences: how many there are.
        max_pages: how many pages a sequence can have in a layer; the table begins with room for 64 and doubles.
        device: where the kernels' copy lies.

    Attributes:
        entries: i64 [layers, 2, sequences, pages] on the host, or :data:`NO_PAGE`.
        device_entries: the same on the device. Its address changes when the table grows.
        lengths: i32 [layers, sequences] on the host: tokens.
        waiting: i32 [layers, sequences] on the host: how many of the last tokens do not count for the recent window
            yet, as those of a prompt whose cell has not ended (:mod:`kvpack.runtime.kv.steps`).
        device_lengths: the same on the device. Its address stays.
        layer_entries, layer_lengths: the device's, by layer.
    """

    def __init__(self, layers: int, sequences: int, max_pages: int, device: torch.device) -> None:
        self.max_pages, self.device = max_pages, device
        self.entries: Ints = np.full((layers, len(Side), sequences, min(max_pages, _FIRST_PAGES)), NO_PAGE, np.int64)
        self._host_flat = self.entries.reshape(-1)
        self.lengths: npt.NDArray[np.int32] = np.zeros((layers, sequences), np.int32)
        self.waiting: npt.NDArray[np.int32] = np.zeros((layers, sequences), np.int32)
        with torch.inference_mode(False):  # tensors are changed outside of it, too
            self.device_lengths = torch.zeros((layers, sequences), dtype=torch.int32, device=device)
            self._set_device_entries(torch.from_numpy(self.entries).to(device, copy=True))
        self.layer_lengths = self.device_lengths.unbind()

    def _set_device_entries(self, entries: torch.Tensor) -> None:
        # Indexing a tensor takes as long as a launch.
        self.device_entries, self.layer_entries, self._flat = entries, entries.unbind(), entries.view(-1)

    def entry(self, at: int) -> int:
        """The entry at a place that :meth:`flat` has given, on the host."""
        return int(self._host_flat[at])

    @property
    def pages(self) -> int:
        """How many pages of a sequence the table has room for."""
        return self.entries.shape[3]

    def grown_pages(self, pages: int) -> int:
        """The size to which :meth:`grow` brings a table that is to have room for ``pages``."""
        return min(self.max_pages, max(pages, 2 * self.pages))

    def grow(self, pages: int) -> None:
        """Have room for ``pages`` pages of each sequence.

        Raises:
            CacheFullError: the host or the device has no memory for it. Nothing has changed.
        """
        grown = widened(torch.from_numpy(self.entries), pages, NO_PAGE).numpy()
        self._set_device_entries(widened(self.device_entries, pages, NO_PAGE))
        self.entries, self._host_flat = grown, grown.reshape(-1)

    def keep_layers(self, count: int) -> None:
        """Have the first layers alone. Nothing is copied: their entries and lengths stay where they are."""
        self.entries, self.lengths, self.waiting = self.entries[:count], self.lengths[:count], self.waiting[:count]
        self._host_flat = self.entries.reshape(-1)
        self.device_lengths = self.device_lengths[:count]
        self.layer_lengths = self.device_lengths.unbind()
        self._set_device_entries(self.device_entries[:count])

    @property
    def settled(self) -> npt.NDArray[np.int32]:
        """i32 [layers, sequences]: the tokens that count for the recent window."""
        return self.lengths - self.waiting

    def flat(self, place: Place) -> int:
        """Where a place is in the table seen as one row."""
        layer, side, sequence, index = place
        _, sides, sequences, pages = self.entries.shape
        return ((layer * sides + side) * sequences + sequence) * pages + index

    def set(self, at: list[int], entries: list[int], device_at: torch.Tensor, device_entries: torch.Tensor) -> None:
        """Put entries at places as :meth:`flat` gives them; both are on the device already."""
        if at:
            self._flat.index_copy_(0, device_at, device_entries)
            for place, entry in zip(at, entries, strict=True):  # most often two, for which NumPy takes longer
                self._host_flat[place] = entry

    def clear(self, at: list[int], device_at: torch.Tensor) -> None:
        """Put :data:`NO_PAGE` at places."""
        if at:
            self._flat.index_fill_(0, device_at, NO_PAGE)
            self._host_flat[at] = NO_PAGE

    def cut_sequence(self, sequence: int, tokens: int) -> None:
        """A sequence has the first of its tokens, and no pages behind them."""
        pages = -(-tokens // PAGE_TOKENS)
        self.device_entries[:, :, sequence, pages:].fill_(NO_PAGE)
        self.device_lengths[:, sequence].fill_(tokens)
        self.entries[:, :, sequence, pages:] = NO_PAGE
        self.waiting[:, sequence] = np.maximum(self.waiting[:, sequence] + tokens - self.lengths[:, sequence], 0)
        self.lengths[:, sequence] = tokens

    def select(
        self, changed: list[int], sources: list[int], device_changed: torch.Tensor, chosen: torch.Tensor
    ) -> None:
        """Each of the sequences that are ``changed`` has the pages and tokens of its source.

        Args:
            device_changed, chosen: i64, ``changed`` and ``sources`` on the device.
        """
        pages = max(1, -(-int(self.lengths.max()) // PAGE_TOKENS))
        table = self.device_entries[..., :pages]
        entries, lengths = table.index_select(2, chosen), self.device_lengths.index_select(1, chosen)
        table.index_copy_(2, device_changed, entries)
        self.device_lengths.index_copy_(1, device_changed, lengths)
        self.entries[:, :, changed, :pages] = self.entries[:, :, sources, :pages]
        self.lengths[:, changed] = self.lengths[:, sources]
        self.waiting[:, changed] = self.waiting[:, sources]

    def put_pages(self, sequence: int, entries: Ints, device_entries: torch.Tensor, first: int, tokens: int) -> None:
        """A sequence has these pages, i64 [layers, 2, pages] on the host and on the device, from the ``first`` on, and
        so many tokens in all."""
        end = first + entries.shape[2]
        self.device_entries[:, :, sequence, first:end] = device_entries
        self.device_lengths[:, sequence].fill_(tokens)
        self.entries[:, :, sequence, first:end] = entries
        self.lengths[:, sequence] = tokens

    def put_copies(self, rows: list[int], other: PageTable, entries: Ints) -> None:
        """The first sequences of an empty table have these pages, i64 [layers, 2, rows, pages], and the tokens that
        ``rows`` of another table have."""
        count, pages = len(rows), entries.shape[3]
        self.device_entries[:, :, :count, :pages] = torch.from_numpy(entries).to(self.device)
        self.device_lengths[:, :count] = other.device_lengths[:, rows].to(self.device)
        self.entries[:, :, :count, :pages] = entries
        self.lengths[:, :count] = other.lengths[:, rows]
        self.waiting[:, :count] = other.waiting[:, rows]

    def all_places(self, layers: range, lengths: npt.NDArray[np.int32]) -> Places:
        """All pages of sequences of these lengths, [sequences], in layers that all have them; layer by layer."""
        present = np.arange(self.pages) < -(-lengths // PAGE_TOKENS)[:, None]
        shape = (len(layers), len(Side), *present.shape)
        layer, side, sequence, index = np.nonzero(np.broadcast_to(present, shape))
        return Places(layer + layers.start, side, sequence, index)


def widened(values: torch.Tensor, pages: int, fill: int) -> torch.Tensor:
    """A copy whose last dimension is ``pages`` long, with ``fill`` behind what was there.

    Raises:
        CacheFullError: there is no memory for it.
    """
    try:
        with torch.inference_mode(False):
            grown = torch.full((*values.shape[:-1], pages), fill, dtype=values.dtype, device=values.device)
    except RuntimeError as error:
        # On the CPU torch says so in words alone.
        if not isinstance(error, torch.OutOfMemoryError) and "allocate" not in str(error):
            raise
        raise CacheFullError(
            f"{values.device} has no memory for a page table of {pages} pages a sequence: {error}"
        ) from None
    grown[..., : values.shape[-1]].copy_(values)
    return grown
