"""Attention to some pages: those that matter most to a query, told by the ranges of their keys, much as Quest does it.

The pages of a sequence that are chosen make a shorter page table, in ascending order, which attention takes as any
other: positions are in the keys already. The first page, where attention sinks lie, and the last two are always chosen.
Of pages in host memory the chosen ones are brought to the device (:mod:`kvpack.runtime.kv.page_slots`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from kvpack.errors import CacheInputError
from kvpack.format.layout import ceil_div
from kvpack.format.pages import PAGE_TOKENS, WARP_LANES, Side
from kvpack.runtime.device import kernels
from kvpack.runtime.device.devices import ACTIVATIONS
from kvpack.runtime.device.kernels import Kernel
from kvpack.runtime.kv.cache import KVView
from kvpack.runtime.kv.page_kernels import page_defines

_FIRST_PAGES, _LAST_PAGES = 1, 2
LEAST_PAGES = _FIRST_PAGES + _LAST_PAGES
# How far from the middle of a page's keys a score is told, of half their width. At 1 no key has a greater score; but
# none is so far out in all channels, and on real models such bounds choose worse pages.
WIDTH = 0.5
_SCORE_WARPS, _SCORE_BLOCKS, _PAGES_OF_WARP = 8, 3, 4
_MOST_HEADS = 4


@dataclass(frozen=True)
class Retrieved:
    """Attributes:
    view: the chosen pages, as attention sees them: lengths count their tokens alone.
    indices: i64 [batch, pages], which pages of their sequences they are, ascending; behind a sequence's end any others.
    all_pages: how many the longest sequence has.
    """

    view: KVView
    indices: torch.Tensor
    all_pages: int

    def by_index(self, mass: torch.Tensor) -> torch.Tensor:
        """[batch, …, pages] of the view, 0 where it has none → [batch, …, all pages]."""
        chosen = mass[..., : self.indices.shape[1]]
        where = self.indices.clamp(max=self.all_pages - 1).view(len(mass), *(1,) * (mass.dim() - 2), -1)
        found = mass.new_zeros((*mass.shape[:-1], self.all_pages))
        return found.scatter_add_(-1, where.expand_as(chosen), chosen)


def retrieve(
    q: torch.Tensor, view: KVView, lengths: list[int], pages: int, scale: float, softcap: float | None = None
) -> Retrieved | None:
    """The ``pages`` pages of each sequence that matter most to its newest token, or None where none has more.

    Args:
        q: [batch, query heads, head_dim].
        lengths: the view's, as the host knows them: nothing here waits for the device.

    Raises:
        CacheInputError: a CUDA graph is being captured; more pages than the device has slots for.
        CacheFullError: the device has no memory for summaries or slots.
    """
    cache, layer = view.cache, view.layer
    if q.is_cuda and torch.cuda.is_current_stream_capturing():
        raise CacheInputError(
            f"pages={pages} cannot be captured in a CUDA graph: the host tells which pages are to be summarized"
        )
    counts = [ceil_div(length, PAGE_TOKENS) for length in lengths]
    if (most := max(counts, default=0)) <= pages:
        return None
    # The last page, which may be incomplete, is chosen anyway.
    ranges = cache.summaries.of(
        layer, view.sequences, [max(0, count - 1) for count in counts], cache.entries[layer, Side.K]
    )
    on_host = torch.tensor([view.sequences, counts], dtype=torch.int64, device="cpu")
    rows, held = on_host.to(q.device, non_blocking=True).unbind()
    scores = range_scores(q, ranges, rows, most - 1, scale)
    chosen = chosen_pages(page_scores(scores, held - 1, softcap), held, pages)
    table = view.page_table.gather(2, chosen.expand(len(Side), -1, -1))
    if cache.slots is not None:
        table = cache.slots.fetch(layer, rows, chosen, table)
    less = (PAGE_TOKENS * (held - pages).clamp(min=0)).to(view.lengths.dtype)
    return Retrieved(replace(view, page_table=table, lengths=view.lengths - less), chosen, most)


def scores_kernel(head_dim: int, dtype: torch.dtype, heads: int) -> Kernel:
    """What keys of pages can score, of ``heads`` query heads of a KV head at once."""
    defines = page_defines(head_dim) | {
        "KVPACK_ACTIVATION": ACTIVATIONS[dtype],
        "KVPACK_HEADS": heads,
        "KVPACK_PAGES_OF_WARP": _PAGES_OF_WARP,
        "KVPACK_MAX_WARPS": _SCORE_WARPS,
        "KVPACK_BLOCKS_PER_SM": _SCORE_BLOCKS,
    }
    return Kernel.of("kv/page_scores.cu", "page_scores", defines=defines)


def range_scores(q: torch.Tensor, ranges: torch.Tensor, rows: torch.Tensor, pages: int, scale: float) -> torch.Tensor:
    """scale · (q · middle + :data:`WIDTH` · |q| · half) of each page's keys: fp32 [batch, query heads, pages].

    Args:
        q: [batch, query heads, head_dim].
        ranges: fp16 [sequences, at least ``pages``, KV heads, head_dim, 2], as of
            :class:`~kvpack.runtime.kv.page_summaries.PageSummaries`.
        rows: i64 [batch], of ranges.
        pages: how many.
    """
    find = _scores_by_kernel if q.device.type == "cuda" else _scores_on_cpu
    return find(q, ranges, rows, pages, scale)


def _scores_by_kernel(
    q: torch.Tensor, ranges: torch.Tensor, rows: torch.Tensor, pages: int, scale: float
) -> torch.Tensor:
    batch, heads, head_dim = q.shape
    kv_heads = ranges.shape[2]
    q = q if q.stride(-1) == 1 else q.contiguous()
    out = torch.empty((batch, heads, pages), dtype=torch.float32, device=q.device)
    group = heads // kv_heads
    at_once = min(group, _MOST_HEADS)
    kernels.launch(
        scores_kernel(head_dim, q.dtype, at_once),
        (ceil_div(pages, _SCORE_WARPS * _PAGES_OF_WARP), kv_heads * ceil_div(group, at_once), batch),
        _SCORE_WARPS * WARP_LANES,
        (
            q,
            *map(np.uint64, q.stride()[:2]),
            ranges,
            rows,
            out,
            np.uint32(ranges.shape[1]),
            np.uint32(kv_heads),
            np.uint32(group),
            np.uint32(pages),
            np.float32(scale),
            np.float32(WIDTH),
        ),
        device=q.device,
    )
    return out


def _scores_on_cpu(q: torch.Tensor, ranges: torch.Tensor, rows: torch.Tensor, pages: int, scale: float) -> torch.Tensor:
    grouped = scale * q.float().unflatten(1, (ranges.shape[2], -1))
    middle, half = ranges[rows, :pages].float().unbind(-1)
    found = torch.einsum("bhgd,bphd->bhgp", grouped, middle)
    found += WIDTH * torch.einsum("bhgd,bphd->bhgp", grouped.abs(), half)
    return found.flatten(1, 2)


def page_scores(scores: torch.Tensor, counts: torch.Tensor, softcap: float | None = None) -> torch.Tensor:
    """How much pages can matter to a query: logarithms, fp32 [batch, pages].

    A softmax over pages says how much of its attention a head may give to each, and heads count alike: not those more
    whose scores are large.

    Args:
        scores: [batch, query heads, pages], of :func:`range_scores`.
        counts: [batch], how many of the pages are there.
    """
    # Pages with what is no number are chosen, so that it shows as it does without a choice.
    scores = scores.nan_to_num(nan=torch.finfo(scores.dtype).max)
    if softcap is not None:
        scores = (scores / softcap).tanh() * softcap
    behind = torch.arange(scores.shape[-1], device=scores.device) >= counts[:, None]
    return scores.masked_fill(behind[:, None], -torch.inf).log_softmax(-1).logsumexp(1)


def chosen_pages(scores: torch.Tensor, counts: torch.Tensor, pages: int) -> torch.Tensor:
    """i64 [batch, pages], ascending: of each row's pages, all but the last of which have scores, the first, the last
    two, and the best of the others. Of a row that has fewer, all of them, and others behind them.

    Args:
        scores: [batch, at least ``pages`` − 1].
        counts: [batch].

    >>> import torch
    >>> chosen_pages(torch.tensor([[0.0, 3, 1, 2, 0]]), torch.tensor([6]), 4).tolist()
    [[0, 1, 4, 5]]
    """
    scores = torch.nn.functional.pad(scores, (0, 1))
    place, counts = torch.arange(scores.shape[-1], device=scores.device), counts[:, None]
    always = (place < _FIRST_PAGES) | (place >= counts - _LAST_PAGES)
    scores = scores.nan_to_num(nan=-torch.finfo(scores.dtype).max, neginf=-torch.finfo(scores.dtype).max)
    scores = scores.masked_fill(always, torch.inf).masked_fill(place >= counts, -torch.inf)
    return scores.topk(pages, sorted=False).indices.sort().values
