"""Pages of random bits for benchmarks, made on the device.

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
    PAGE_TOKENS,
    SCALE_BYTES,
    PageFormat,
    PageLayout,
    Side,
)
from kvpack.runtime.kv.page_kernels import new_status, read_tokens

# Spread of importance among pages: the standard deviation of its logarithm.
IMPORTANCE_SIGMA = 2.0
MIXED_FORMATS = (PageFormat.INT2, PageFormat.INT3, PageFormat.INT4, PageFormat.INT8)
# Keeps all bits of an fp8 code but the highest of the exponent: no infinities, no NaN, and values below 2.
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
        num_kv_heads, head_dim: of each page.
    """

    pages: torch.Tensor
    table: torch.Tensor
    num_kv_heads: int
    head_dim: int

    def copy(self) -> PageCache:
        """The same at other addresses."""
        return PageCache(self.pages.clone(), self.table.clone(), self.num_kv_heads, self.head_dim)

    def values(self, side: Side, sequence: int, head: int) -> torch.Tensor:
        """fp32 [tokens, head_dim] of a head, dequantized."""
        table = self.table[side, sequence : sequence + 1]
        tokens = table.shape[1] * PAGE_TOKENS
        starts = torch.zeros(1, dtype=torch.int32, device=table.device)
        status = new_status(table.device)
        size = self.head_dim, self.num_kv_heads
        found = read_tokens(table, side, starts, starts + tokens, tokens, *size, torch.float32, status, self.pages)
        return found[0, head]


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
    return PageCache(pages, torch.from_numpy(table).to(device), num_kv_heads, head_dim)


def fill_blocks(blocks: torch.Tensor, layout: PageLayout, deviation: float, generator: torch.Generator) -> None:
    """Random values of about this deviation into blocks u8 [n, block_bytes]."""
    if not layout.format.is_quantized:
        blocks.view(torch.float16).normal_(0.0, deviation, generator=generator)
        return
    blocks.view(torch.int32).random_(-(1 << 31), 1 << 31, generator=generator)
    if not layout.format.is_integer:
        blocks &= _FP8_FINITE

    def put_header(at: torch.Tensor, bits: int) -> None:
        """Scales, and centers, of blocks or groups, into u8 [..., bytes of all]."""
        code_deviation = (1 << bits) / math.sqrt(12) if layout.format.is_integer else _FP8_DEVIATION
        shape = (*at.shape[:-1], at.shape[-1] // (SCALE_BYTES * (1 + layout.has_centers)))
        spread = 0.5 + torch.rand(shape, device=blocks.device, generator=generator)
        numbers = [deviation / code_deviation * spread]
        if layout.has_centers:
            numbers.append(deviation / 2 * torch.randn(shape, device=blocks.device, generator=generator))
        at[:] = torch.cat([of_all.half().view(torch.uint8) for of_all in numbers], -1)

    if layout.side == Side.V:
        put_header(blocks[:, : layout.block_header_bytes], layout.format.element_bits)
        return
    for places, bits in layout.parts:
        part = blocks[:, layout.group_start(places.start) : layout.group_start(places.stop)]
        groups = part.unflatten(1, (places.stop - places.start, -1))
        put_header(groups[..., : layout.group_header_bytes], bits)


def expected_attention(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
    """fp64 [queries, head_dim]: softmax(q · Kᵀ) · V over all tokens of a head."""
    scores = q.double() @ keys.double().T * scale
    return torch.softmax(scores, dim=-1) @ values.double()


def share_of(formats: npt.NDArray[np.uint8], of: Sequence[PageFormat]) -> dict[str, float]:
    """What share of the pages each format has."""
    return {page_format.name.lower(): float((formats == page_format).mean()) for page_format in of}
