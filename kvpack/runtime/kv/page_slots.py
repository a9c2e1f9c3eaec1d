"""Pages of host memory that are on the device too: for each layer and sequence some that were attended to lately.

Kernels find which of the wanted pages are in slots, give the others the slots that were filled longest ago, but for
those that are used now, and copy them over the bus. The host takes no part in it, and waits for nothing. Neighbouring
tokens look at mostly the same pages, so that few are copied in a step.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kvpack.errors import CacheInputError
from kvpack.format.layout import ceil_div
from kvpack.format.pages import ENTRY_FORMAT_MASK, WARP_LANES, PageFormat, Side
from kvpack.runtime.device import kernels
from kvpack.runtime.device.kernels import Kernel
from kvpack.runtime.kv.page_kernels import page_defines
from kvpack.runtime.kv.page_pools import PagePools
from kvpack.runtime.kv.page_table import NO_PAGE

_SLOT_WARPS, _FETCH_WARPS, _FETCH_BLOCKS = 16, 8, 4
# A thread of page_fetch has four units of 16 bytes under way.
_FETCH_BYTES = 4 * 16 * WARP_LANES * _FETCH_WARPS
# Blocks for a page at most: a bus has fewer bytes under way than memory.
_FETCH_PARTS = 4
_QUANTIZED = [page_format for page_format in PageFormat if page_format.is_quantized]
# What shared memory of a block without asking has room for: four words for a slot that is chosen.
MOST_SLOTS = 3000
_MOST_JOBS = 65535  # of a grid


def slots_kernel() -> Kernel:
    """Which slots hold the pages that are attended to."""
    defines = page_defines(64) | {"KVPACK_MAX_WARPS": _SLOT_WARPS, "KVPACK_BLOCKS_PER_SM": 1}
    return Kernel.of("kv/page_slots.cu", "page_slots", defines=defines)


def fetch_kernel(head_dim: int) -> Kernel:
    """Pages copied as they are."""
    defines = page_defines(head_dim) | {"KVPACK_MAX_WARPS": _FETCH_WARPS, "KVPACK_BLOCKS_PER_SM": _FETCH_BLOCKS}
    return Kernel.of("kv/page_fetch.cu", "page_fetch", defines=defines)


@dataclass(frozen=True)
class _LayerSlots:
    """Slots of a layer's sequences: their memory and where it begins; which page each has, i32 [sequences, slots], or
    -1; the page's entries, i64 [sequences, slots, 2]; and each sequence's slot that was filled longest ago, i32."""

    memory: torch.Tensor
    base: int
    pages: torch.Tensor
    held: torch.Tensor
    hands: torch.Tensor


class PageSlots:
    """So many pages of each layer and sequence on the device; memory for them comes with a layer's first ones.

    Args:
        pools: where the pages lie.
        layers, sequences: how many there are.
        slots: how many pages of a layer and sequence are held.
        formats: of K and of V, which pages can come to have; slots are as large as the largest quantized one.

    Attributes:
        counts: i64 [sequences, 2] on the device: wanted pages that were in slots, and those that were not, of all
            layers since the beginning. Pages of 16 bits, which lie on the device anyway, do not count.

    Raises:
        CacheInputError: more slots than there can be.
    """

    def __init__(
        self, pools: PagePools, layers: int, sequences: int, slots: int, formats: Sequence[Iterable[PageFormat]]
    ) -> None:
        if slots > MOST_SLOTS:
            raise CacheInputError(f"device_pages is {slots}; at most {MOST_SLOTS} are possible")
        self.slots = slots
        self._pools, self._sequences = pools, sequences
        self._side_bytes = tuple(
            max((pools.page_bytes(side, f) for f in of_side if f.is_quantized), default=0)
            for side, of_side in zip(Side, formats, strict=True)
        )
        self._layers: list[_LayerSlots | None] = [None] * layers
        with torch.inference_mode(False):
            self.counts = torch.zeros((sequences, 2), dtype=torch.int64, device=pools.device)

    def hit_rate(self) -> float:
        """The share of wanted pages that were in slots; waits for the device. NaN if none was wanted."""
        there, missing = self.counts.sum(0).tolist()
        return there / (there + missing) if there + missing else float("nan")

    def fetch(self, layer: int, sequences: torch.Tensor, chosen: torch.Tensor, entries: torch.Tensor) -> torch.Tensor:
        """Have pages in slots.

        Args:
            sequences: i64 [batch], of the cache.
            chosen: i64 [batch, pages], which pages of their sequences these are, ascending; at most as many as slots.
            entries: i64 [2, batch, pages], contiguous, or -1 of no page.

        Returns:
            i64 [2, batch, pages]: entries in slots; of pages in 16 bits, and of none, those that were given.

        Raises:
            CacheInputError: more pages than slots.
            CacheFullError: there is no memory for the layer's slots.
        """
        if chosen.shape[1] > self.slots:
            raise CacheInputError(
                f"pages={chosen.shape[1]} cannot be on the device at once, with device_pages={self.slots}"
            )
        of_layer = self._of_layer(layer)
        targets = torch.empty_like(entries)
        jobs = torch.empty((*chosen.shape, len(Side), 2), dtype=torch.int64, device=chosen.device)
        assign = _assign_on_cpu if chosen.device.type == "cpu" else _assign_by_kernel
        assign(of_layer, sequences, chosen, entries, self.counts, targets, jobs, self._side_bytes)
        self._copy(jobs.flatten(0, 1))
        return targets

    def _of_layer(self, layer: int) -> _LayerSlots:
        if (found := self._layers[layer]) is not None:
            return found
        shape, device = (self._sequences, self.slots), self._pools.device
        memory, base = self._pools.new_memory(self._sequences * self.slots * sum(self._side_bytes))
        with torch.inference_mode(False):
            made = _LayerSlots(
                memory,
                base,
                torch.full(shape, -1, dtype=torch.int32, device=device),
                torch.full((*shape, 2), NO_PAGE, dtype=torch.int64, device=device),
                torch.zeros(self._sequences, dtype=torch.int32, device=device),
            )
        self._layers[layer] = made
        return made

    def staged(self, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """All pages of a table, i64 [2, batch, pages], on the device for a while: many queries read each of them often.

        Returns:
            A table of the copies, and what holds their memory.
        """
        side_bytes, on_host = self._side_bytes, _is_quantized(table)
        count = table[0].numel()
        memory = torch.empty(count * sum(side_bytes), dtype=torch.uint8, device=table.device)
        places = memory.data_ptr() + sum(side_bytes) * torch.arange(count, device=table.device).view(table[0].shape)
        copies = torch.stack([places, places + side_bytes[0]]) | (table & ENTRY_FORMAT_MASK)
        jobs = torch.stack([torch.where(on_host, table, NO_PAGE), copies], -1)  # [2, batch, pages, 2]
        self._copy(jobs.flatten(1, 2).transpose(0, 1).contiguous())
        return torch.where(on_host, copies, table), memory

    def _copy(self, jobs: torch.Tensor) -> None:
        """``jobs``: i64 [n, 2 sides, 2], entries of a source, or -1, and of a target."""
        pools = self._pools
        if jobs.device.type == "cpu":
            _copy_on_cpu(jobs, pools)
            return
        for first in range(0, len(jobs), _MOST_JOBS):
            part = jobs[first : first + _MOST_JOBS]
            kernels.launch(
                fetch_kernel(pools.head_dim),
                (min(_FETCH_PARTS, ceil_div(max(self._side_bytes), _FETCH_BYTES)), len(part), len(Side)),
                _FETCH_WARPS * WARP_LANES,
                (pools.pages, part, np.uint32(pools.num_kv_heads)),
                device=jobs.device,
            )

    def forget(self, sequence: int, first: int = 0) -> None:
        """A sequence's pages from one on have gone, or are others: entries may come again for other pages."""
        for found in self._layers:
            if found is not None:
                of_sequence = found.pages[sequence]
                of_sequence.masked_fill_(of_sequence >= first, -1)

    def keep_layers(self, count: int) -> None:
        """Have slots for the first layers alone."""
        self._layers = self._layers[:count]


def _is_quantized(entries: torch.Tensor) -> torch.Tensor:
    formats = entries & ENTRY_FORMAT_MASK
    return (formats >= int(PageFormat.INT8)) & (formats < len(PageFormat))


def _assign_by_kernel(
    of_layer: _LayerSlots,
    sequences: torch.Tensor,
    chosen: torch.Tensor,
    entries: torch.Tensor,
    counts: torch.Tensor,
    targets: torch.Tensor,
    jobs: torch.Tensor,
    side_bytes: tuple[int, ...],
) -> None:
    batch, pages = chosen.shape
    slots = of_layer.pages.shape[1]
    kernels.launch(
        slots_kernel(),
        batch,
        _SLOT_WARPS * WARP_LANES,
        (
            chosen,
            entries,
            sequences,
            of_layer.pages,
            of_layer.held,
            of_layer.hands,
            counts,
            targets,
            jobs,
            np.uint64(of_layer.base),
            np.uint32(pages),
            np.uint32(slots),
            np.uint32(side_bytes[0]),
            np.uint32(sum(side_bytes)),
            np.uint32(sum(1 << page_format for page_format in _QUANTIZED)),
        ),
        device=chosen.device,
        shared_bytes=4 * (3 * pages + slots + _SLOT_WARPS),
    )


def _assign_on_cpu(
    of_layer: _LayerSlots,
    sequences: torch.Tensor,
    chosen: torch.Tensor,
    entries: torch.Tensor,
    counts: torch.Tensor,
    targets: torch.Tensor,
    jobs: torch.Tensor,
    side_bytes: tuple[int, ...],
) -> None:
    slots = of_layer.pages.shape[1]
    on_host = _is_quantized(entries)
    for row, sequence in enumerate(sequences.tolist()):
        pages, held = (x[sequence].numpy() for x in (of_layer.pages, of_layer.held))
        wanted = [tuple(pair) for pair in entries[:, row].t().tolist()]
        there = {
            (page, tuple(pair)): slot
            for slot, (page, pair) in enumerate(zip(pages.tolist(), held.tolist(), strict=True))
        }
        slot_of = [there.get(key, -1) for key in zip(chosen[row].tolist(), wanted, strict=True)]
        hand = int(of_layer.hands[sequence])
        free = [slot for i in range(slots) if (slot := (hand + i) % slots) not in slot_of]
        for j, (slot, pair) in enumerate(zip(slot_of, wanted, strict=True)):
            quantized = on_host[:, row, j].tolist()
            is_new = any(quantized) and slot < 0
            if is_new:
                slot = free.pop(0)
                pages[slot], held[slot] = int(chosen[row, j]), pair
                of_layer.hands[sequence] = (slot + 1) % slots
            if any(quantized):
                counts[sequence, int(is_new)] += 1
            place = of_layer.base + (sequence * slots + slot) * sum(side_bytes)
            for side, entry in enumerate(pair):
                begin = place + side * side_bytes[0]
                target = begin | entry & ENTRY_FORMAT_MASK if quantized[side] else entry
                targets[side, row, j] = target
                jobs[row, j, side, 0] = entry if is_new and quantized[side] else NO_PAGE
                jobs[row, j, side, 1] = target


def _copy_on_cpu(jobs: torch.Tensor, pools: PagePools) -> None:
    assert pools.pages is not None
    for of_sides in jobs.tolist():
        for side, (source, target) in zip(Side, of_sides, strict=True):
            if source != NO_PAGE:
                size = pools.page_bytes(side, PageFormat(source & ENTRY_FORMAT_MASK))
                begin, to = source & ~ENTRY_FORMAT_MASK, target & ~ENTRY_FORMAT_MASK
                pools.pages[to : to + size].copy_(pools.pages[begin : begin + size])
