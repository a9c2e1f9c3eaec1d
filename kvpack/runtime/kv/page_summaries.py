"""Between which values the keys of a page lie, by channel: from what the page stores.

A quantized page of K has a scale and a center for each channel, so that the least and the greatest value of its levels
are known without a look at its codes: 64 bytes of a group of 16 channels. Pages of 16 bits are read in whole.

:class:`PageSummaries` keeps them beside the pages, on the device: four bytes a channel. A page is summarized once, when
it is first asked for, wherever it lies.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from kvpack.encode.page_coder import FP8_MAX
from kvpack.errors import CacheFullError
from kvpack.format.layout import ceil_div
from kvpack.format.pages import (
    GROUP_DIMS,
    PAGE_TOKENS,
    SCALE_BYTES,
    WARP_LANES,
    PageFormat,
    PageLayout,
    Side,
    scale_index,
)
from kvpack.runtime.device import kernels
from kvpack.runtime.device.kernels import Kernel
from kvpack.runtime.kv.page_kernels import page_defines
from kvpack.runtime.kv.page_pools import PagePools
from kvpack.runtime.kv.page_table import NO_PAGE, Ints

_SUMMARIZE_WARPS, _SUMMARIZE_BLOCKS = 4, 8
# Room for summaries doubles, and grows by so many pages at most: it is copied when it grows.
_MORE_PAGES = 4096
_16_BITS = {PageFormat.FP16: torch.float16, PageFormat.BF16: torch.bfloat16}


def key_ranges(pools: PagePools, entries: npt.NDArray[np.int64]) -> tuple[torch.Tensor, torch.Tensor]:
    """The middle and half of the width of the range in which a page's keys lie, of each channel.

    Args:
        entries: i64 [n], full pages of K, at least one.

    Returns:
        fp32 [n, KV heads, head_dim] each, on the pages' device. What is no number in a page is none here.

    Raises:
        PageEntryError: one is no page in use.
    """
    found: tuple[torch.Tensor, ...] = ()
    for layout, members, pages, numbers in pools.pages_by_slab(entries):
        numbers_there, to = (torch.from_numpy(x).to(pages.device) for x in (numbers, members))
        of_kind = (_of_full_width if layout.format in _16_BITS else _of_levels)(layout, pages, numbers_there)
        if not found:
            shape = (len(entries), pages.shape[1], layout.head_dim)
            found = tuple(torch.empty(shape, dtype=torch.float32, device=pages.device) for _ in range(2))
        places = _places_of_channels(layout).to(pages.device)
        for target, values in zip(found, of_kind, strict=True):
            target[to] = values[..., places]
    middle, half = found
    return middle, half


def _places_of_channels(layout: PageLayout) -> torch.Tensor:
    """Where each channel's numbers lie among those of a block, group by group in their order."""
    lying = GROUP_DIMS * np.array(layout.group_order)[:, None] + scale_index(Side.K)
    return torch.from_numpy(np.argsort(lying.reshape(-1)))


def _of_levels(layout: PageLayout, pages: torch.Tensor, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[n, heads, head_dim], in the order in which groups and their scales lie."""
    middles, halves = [], []
    for places, bits in layout.parts:
        groups = pages[..., layout.group_start(places.start) : layout.group_start(places.stop)]
        groups = groups.unflatten(-1, (places.stop - places.start, -1))
        headers = groups[..., : layout.group_header_bytes][numbers].view(torch.float16).float()
        scale, center = headers.split(layout.group_header_bytes // (2 * SCALE_BYTES), -1)
        if layout.format.is_integer:  # codes from 0 to 2^bits − 1 stand for so much less 2^(bits − 1)
            center, half = center - scale / 2, scale.abs() * ((2**bits - 1) / 2)
        else:
            half = scale.abs() * FP8_MAX
        middles.append(center.flatten(-2))
        halves.append(half.flatten(-2))
    return torch.cat(middles, -1), torch.cat(halves, -1)


def _of_full_width(layout: PageLayout, pages: torch.Tensor, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same, from elements."""
    elements = pages[numbers].view(_16_BITS[layout.format])
    # Of a group: slice, g, c, upper half of the columns, upper half of the rows, element of the pair.
    by_place = elements.unflatten(-1, (layout.groups, PAGE_TOKENS // 16, 8, 4, 2, 2, 2))
    least, greatest = (reduced(by_place, dim=(-6, -5, -2)).float() for reduced in (torch.amin, torch.amax))
    return ((least + greatest) / 2).flatten(-4), ((greatest - least) / 2).flatten(-4)


def summarize_kernel(head_dim: int, key_order: tuple[int, ...] = ()) -> Kernel:
    """Ranges of keys, as a :class:`PageSummaries` holds them."""
    defines = page_defines(head_dim, key_order) | {
        "KVPACK_FP8_MAX": FP8_MAX,
        "KVPACK_MAX_WARPS": _SUMMARIZE_WARPS,
        "KVPACK_BLOCKS_PER_SM": _SUMMARIZE_BLOCKS,
    }
    return Kernel.of("kv/page_summarize.cu", "page_summarize", defines=defines)


def summarize_by_kernel(pools: PagePools, jobs: torch.Tensor, ranges: torch.Tensor, key_order: tuple[int, ...]) -> None:
    """``jobs``: i64 [n, 2], entries of full pages of K, and which of the pages of ``ranges`` each is."""
    kernels.launch(
        summarize_kernel(pools.head_dim, key_order),
        ceil_div(len(jobs) * pools.num_kv_heads, _SUMMARIZE_WARPS),
        _SUMMARIZE_WARPS * WARP_LANES,
        (pools.pages, jobs, ranges, np.uint32(len(jobs)), np.uint32(pools.num_kv_heads)),
        device=pools.device,
    )


class PageSummaries:
    """The ranges of the keys of full pages, by layer, sequence and page, in fp16: what fp16 cannot hold is as near as
    it can, and what is no number in a page makes its channel none.

    Args:
        pools: where the pages lie.
        layers, sequences: how many there are.
        key_order: of the pages.
    """

    def __init__(self, pools: PagePools, layers: int, sequences: int, key_order: tuple[int, ...]) -> None:
        self._pools, self._sequences, self._key_order = pools, sequences, key_order
        self._ranges: list[torch.Tensor | None] = [None] * layers
        # Of which pages they are: entries, [sequences, pages].
        self._known: list[Ints] = [np.empty((sequences, 0), np.int64)] * layers

    @property
    def size_bytes(self) -> int:
        return sum(ranges.nbytes for ranges in self._ranges if ranges is not None)

    def of(self, layer: int, sequences: Sequence[int], counts: Sequence[int], entries: Ints) -> torch.Tensor:
        """Ranges of the first pages of some sequences, which stay until the next call for this layer.

        Args:
            counts: how many pages of each are asked for, all of them full.
            entries: i64 [sequences, pages], the layer's of K.

        Returns:
            fp16 [all sequences, pages, KV heads, head_dim, 2], middle and half of the width. Of other sequences, and
            behind a sequence's count, they may be anything.

        Raises:
            CacheFullError: the device has no memory for them. Nothing has changed.
        """
        ranges = self._with_room(layer, max(counts, default=0))
        known = self._known[layer]
        missing: list[tuple[int, int]] = []
        for sequence, count in zip(sequences, counts, strict=True):
            stale = (known[sequence, :count] != entries[sequence, :count]).nonzero()[0]
            missing += [(sequence, page) for page in stale.tolist()]
        if missing:
            at = tuple(np.array(missing, np.int64).T)
            places = at[0] * known.shape[1] + at[1]
            self._summarize(ranges, entries[at], places)
            known[at] = entries[at]
        return ranges

    def _summarize(self, ranges: torch.Tensor, entries: Ints, places: Ints) -> None:
        if self._pools.device.type == "cuda":
            jobs = torch.from_numpy(np.stack([entries, places], 1)).to(ranges.device, non_blocking=True)
            summarize_by_kernel(self._pools, jobs, ranges, self._key_order)
            return
        found = torch.stack(key_ranges(self._pools, entries), -1)
        most = torch.finfo(torch.float16).max
        found = torch.where(found.isfinite().all(-1, keepdim=True), found.clamp(-most, most), torch.nan)
        ranges.flatten(0, 1)[torch.from_numpy(places)] = found.half()

    def _with_room(self, layer: int, pages: int) -> torch.Tensor:
        ranges, known = self._ranges[layer], self._known[layer]
        if ranges is not None and known.shape[1] >= pages:
            return ranges
        room = max(pages, min(2 * known.shape[1], known.shape[1] + _MORE_PAGES))
        shape = (self._sequences, room, self._pools.num_kv_heads, self._pools.head_dim, 2)
        try:
            with torch.inference_mode(False):
                grown = torch.empty(shape, dtype=torch.float16, device=self._pools.device)
        except torch.OutOfMemoryError as error:
            raise CacheFullError(f"{self._pools.device} has no memory for summaries of {room} pages: {error}") from None
        if ranges is not None:
            grown[:, : known.shape[1]].copy_(ranges)
        self._ranges[layer] = grown
        self._known[layer] = np.pad(known, ((0, 0), (0, room - known.shape[1])), constant_values=NO_PAGE)
        return grown

    def forget(self, sequence: int, first: int = 0) -> None:
        """A sequence's pages from one on have gone, or are others: entries may come again for other pages."""
        for known in self._known:
            known[sequence, first:] = NO_PAGE

    def keep_layers(self, count: int) -> None:
        """Know the first layers alone."""
        self._ranges, self._known = self._ranges[:count], self._known[:count]
