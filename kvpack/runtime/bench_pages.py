"""Pages of random bits for benchmarks: made on the device, and dequantized there with torch.

Codes are random, scales and centers are drawn around a constant. Such pages take as long as those of a model, and say
nothing about errors of quantization.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from kvpack.format.pages import (
    ENTRY_FORMAT_BITS,
    GROUP_DIMS,
    PAGE_TOKENS,
    PAIRS,
    SCALE_BYTES,
    WARP_LANES,
    PageFormat,
    PageLayout,
    Side,
    element_index,
    scale_index,
)

# Spread of importance among pages: the standard deviation of its logarithm.
IMPORTANCE_SIGMA = 2.0
MIXED_FORMATS = (PageFormat.INT2, PageFormat.INT3, PageFormat.INT4, PageFormat.INT8)
_FP8_TYPES = {PageFormat.FP8_E4M3: torch.float8_e4m3fn, PageFormat.FP8_E5M2: torch.float8_e5m2}
# Of fp8 codes all but the highest bit of the exponent: neither infinities nor NaN, and less than 2.
_FP8_FINITE = 0xBF
_FP8_DEVIATION = 0.6


def pair_bytes(page_format: PageFormat, head_dim: int) -> int:
    """A head's part of a page of K and of one of V, everything counted."""
    return sum(PageLayout(side, page_format, head_dim).block_bytes for side in Side)


def page_importance(pages: int, seed: int = 0) -> npt.NDArray[np.float64]:
    """Importance of each page, a few far above the rest, in no order."""
    return np.random.default_rng(seed).lognormal(0.0, IMPORTANCE_SIGMA, pages)


def mixture(importance: npt.NDArray[np.float64], budget: float, head_dim: int) -> npt.NDArray[np.uint8]:
    """Formats (:data:`MIXED_FORMATS`) of pages, within ``budget`` times the bytes that fp16 takes.

    Every page starts with the fewest bits. Steps up are taken by what they gain, importance · drop of the error, a
    byte, until the next one would be beyond the budget; so what is left of it is less than one page's step. A page has
    the same format for K and V.

    Raises:
        ValueError: the budget is below what the fewest bits take.
    """
    sizes = np.array([pair_bytes(page_format, head_dim) for page_format in MIXED_FORMATS])
    errors = np.array([4.0**-page_format.element_bits for page_format in MIXED_FORMATS])
    steps = np.diff(sizes)
    left = budget * len(importance) * pair_bytes(PageFormat.FP16, head_dim) - len(importance) * sizes[0]
    if left < 0:
        raise ValueError(f"pages of 2 bits take more than {budget} of fp16 at head_dim {head_dim}")
    # The gain a byte falls from step to step, so that the best ones are each page's first ones.
    gains = -np.diff(errors)[:, None] / steps[:, None] * importance
    order = np.argsort(-gains, axis=None, kind="stable")
    spent = np.cumsum(np.repeat(steps, len(importance))[order])
    taken = order[: np.searchsorted(spent, left, side="right")]
    raised = np.bincount(taken % len(importance), minlength=len(importance))
    return np.array(MIXED_FORMATS, np.uint8)[raised]


@dataclass
class PageCache:
    """Pages of a batch of sequences of equal length.

    Args:
        pages: u8 on the device.
        table: i64 [2, sequences, pages], entries with offsets into ``pages`` in them.
        formats: those of the pages, the same for K and V.
        num_kv_heads, head_dim: of each page.
    """

    pages: torch.Tensor
    table: torch.Tensor
    formats: frozenset[PageFormat]
    num_kv_heads: int
    head_dim: int

    def copy(self) -> PageCache:
        """The same at other addresses."""
        return PageCache(self.pages.clone(), self.table.clone(), self.formats, self.num_kv_heads, self.head_dim)

    def values(self, side: Side, sequence: int, head: int) -> torch.Tensor:
        """fp32 [tokens, head_dim] of a head, dequantized."""
        entries = self.table[side, sequence]
        formats = entries & ((1 << ENTRY_FORMAT_BITS) - 1)
        found = torch.empty(len(entries), PAGE_TOKENS, self.head_dim, device=entries.device)
        words = self.pages.view(torch.int32)
        for page_format in formats.unique().tolist():
            layout = PageLayout(side, PageFormat(page_format), self.head_dim)
            which = (formats == page_format).nonzero()[:, 0]
            first = (entries[which] - page_format + head * layout.block_bytes) // 4
            places = first[:, None] + torch.arange(layout.block_bytes // 4, device=entries.device)
            found[which] = dequantize_blocks(words[places].view(torch.uint8), layout)
        return found.reshape(-1, self.head_dim)


def random_cache(
    formats: npt.NDArray[np.uint8],
    num_kv_heads: int,
    head_dim: int,
    deviations: Mapping[Side, float],
    generator: torch.Generator,
) -> PageCache:
    """Random pages of the given formats [sequences, pages], in random places, with values of these deviations."""
    device = generator.device
    places = np.random.default_rng(0)
    found = [PageFormat(number) for number in np.unique(formats)]
    total = sum(
        int((formats == page_format).sum()) * num_kv_heads * pair_bytes(page_format, head_dim) for page_format in found
    )
    pages = torch.empty(total, dtype=torch.uint8, device=device)
    table = np.empty((2, *formats.shape), np.int64)
    at = 0
    for side in Side:
        for page_format in found:
            layout = PageLayout(side, page_format, head_dim)
            which = formats == page_format
            count, page_bytes = int(which.sum()), num_kv_heads * layout.block_bytes
            table[side][which] = at + places.permutation(count) * page_bytes + int(page_format)
            blocks = pages[at : at + count * page_bytes].view(-1, layout.block_bytes)
            fill_blocks(blocks, layout, deviations[side], generator)
            at += count * page_bytes
    return PageCache(pages, torch.from_numpy(table).to(device), frozenset(found), num_kv_heads, head_dim)


def fill_blocks(blocks: torch.Tensor, layout: PageLayout, deviation: float, generator: torch.Generator) -> None:
    """Random values of about this deviation into blocks u8 [n, block_bytes]."""
    count = len(blocks)
    if not layout.format.is_quantized:
        blocks.view(torch.float16).normal_(0.0, deviation, generator=generator)
        return
    blocks.view(torch.int32).random_(-(1 << 31), 1 << 31, generator=generator)
    code_deviation = (1 << layout.format.element_bits) / math.sqrt(12)
    if not layout.format.is_integer:
        blocks &= _FP8_FINITE
        code_deviation = _FP8_DEVIATION

    def scales(number: int) -> torch.Tensor:
        spread = 0.5 + torch.rand(count, number, device=blocks.device, generator=generator)
        return (deviation / code_deviation * spread).half().view(torch.uint8)

    if layout.side == Side.V:
        blocks[:, : layout.block_header_bytes] = scales(PAGE_TOKENS)
        return
    groups = blocks.view(count, layout.groups, layout.group_bytes)
    groups[..., : GROUP_DIMS * SCALE_BYTES] = scales(layout.head_dim).view(count, layout.groups, -1)
    if layout.has_centers:
        centers = deviation / 2 * torch.randn(count, layout.head_dim, device=blocks.device, generator=generator)
        stored = centers.half().view(torch.uint8).view(count, layout.groups, -1)
        groups[..., GROUP_DIMS * SCALE_BYTES : layout.group_header_bytes] = stored


def _pairs(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Words i32 [..., lane, words of a lane] → codes [..., lane, pair, half]."""
    halves = torch.stack([words, words >> 16], dim=-1) & 0xFFFF
    per_word = 16 // bits
    found = [halves[..., pair // per_word, :] >> bits * (pair % per_word) for pair in range(PAIRS - (bits == 3))]
    if bits == 3:
        tops = halves[..., :3, :] >> 15
        found.append(tops[..., 0, :] | tops[..., 1, :] << 1 | tops[..., 2, :] << 2)
    return torch.stack(found, dim=-2) & ((1 << bits) - 1)


def unpack_codes(payload: torch.Tensor, layout: PageLayout) -> torch.Tensor:
    """Payloads u8 [n, groups, payload_bytes] → codes i32 [n, 64 tokens, head_dim]."""
    count, bits = len(payload), layout.format.element_bits
    loads = payload.contiguous().view(torch.int32).view(count, layout.groups, -1, WARP_LANES, layout.words_per_load)
    words = loads.transpose(2, 3).reshape(count, layout.groups, WARP_LANES, -1)
    if bits == 8:  # bytes of a word are of two pairs
        bytes_ = torch.stack([words >> 8 * place & 0xFF for place in range(4)], dim=-1)
        pairs = bytes_.view(count, layout.groups, WARP_LANES, PAIRS, 2)
    else:
        pairs = _pairs(words, bits)
    token, dim = (torch.from_numpy(index).to(payload.device) for index in element_index(layout.side))
    groups = torch.empty(count, PAGE_TOKENS, layout.groups, GROUP_DIMS, dtype=torch.int32, device=payload.device)
    groups[:, token, :, dim] = pairs.permute(2, 3, 4, 0, 1)
    return groups.view(count, PAGE_TOKENS, layout.head_dim)


def dequantize_blocks(blocks: torch.Tensor, layout: PageLayout) -> torch.Tensor:
    """Blocks u8 [n, block_bytes] → fp32 [n, 64 tokens, head_dim], as :mod:`kvpack.encode.page_coder` says."""
    count, head = len(blocks), layout.block_header_bytes
    groups = blocks[:, head:].reshape(count, layout.groups, layout.group_bytes)
    codes = unpack_codes(groups[..., layout.group_header_bytes :], layout)
    if not layout.format.is_quantized:
        return codes.to(torch.int16).view(torch.float16).float()
    order = torch.from_numpy(scale_index(layout.side)).to(blocks.device)

    def in_order(stored: torch.Tensor) -> torch.Tensor:
        found = torch.empty(stored.shape[:-1] + order.shape, device=blocks.device)
        found[..., order] = stored.contiguous().view(torch.float16).float()
        return found

    header = GROUP_DIMS * SCALE_BYTES
    if layout.side == Side.V:
        scales = in_order(blocks[:, :head])[:, :, None]
    else:
        scales = in_order(groups[..., :header]).view(count, 1, layout.head_dim)
    if not layout.format.is_integer:
        return codes.to(torch.uint8).view(_FP8_TYPES[layout.format]).float() * scales
    k = codes.float() - (1 << layout.format.element_bits - 1)
    if layout.has_centers:
        return in_order(groups[..., header : 2 * header]).view(count, 1, layout.head_dim) + scales * k
    return scales * (k + 0.5 if layout.is_mid_rise else k)


def expected_attention(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
    """fp64 [queries, head_dim]: softmax(q · Kᵀ) · V over all tokens of a head."""
    scores = q.double() @ keys.double().T * scale
    return torch.softmax(scores, dim=-1) @ values.double()


def share_of(formats: npt.NDArray[np.uint8], of: Sequence[PageFormat]) -> dict[str, float]:
    """What share of the pages each format has."""
    return {page_format.name.lower(): float((formats == page_format).mean()) for page_format in of}
