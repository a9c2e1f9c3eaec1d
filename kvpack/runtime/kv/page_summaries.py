"""Between which values the keys of a page lie, by channel: from what the page stores.

A quantized page of K has a scale and a center for each channel, so that the least and the greatest value of its levels
are known without a look at its codes: 64 bytes of a group of 16 channels. Pages of 16 bits are read in whole.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from kvpack.encode.page_coder import FP8_MAX
from kvpack.format.pages import GROUP_DIMS, PAGE_TOKENS, SCALE_BYTES, PageFormat, PageLayout, Side, scale_index
from kvpack.runtime.kv.page_pools import PagePools

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
