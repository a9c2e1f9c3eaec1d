"""Attention to some pages: those that matter most to a query, told by the ranges of their keys, as Quest does it.

The pages of a sequence that are chosen make a shorter page table, in ascending order, which attention takes as any
other: positions are in the keys already. The first page, where attention sinks lie, and the last two are always chosen.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from kvpack.errors import CacheInputError
from kvpack.format.layout import ceil_div
from kvpack.format.pages import PAGE_TOKENS, Side
from kvpack.runtime.kv.cache import KVView
from kvpack.runtime.kv.page_summaries import key_ranges
from kvpack.runtime.kv.page_table import NO_PAGE

_FIRST_PAGES, _LAST_PAGES = 1, 2
LEAST_PAGES = _FIRST_PAGES + _LAST_PAGES


@dataclass(frozen=True)
class Retrieved:
    """Attributes:
    view: the chosen pages, as attention sees them: lengths count their tokens alone.
    indices: i64 [batch, pages], which pages of their sequences they are; 0 behind a sequence's end.
    all_pages: how many the longest sequence has.
    """

    view: KVView
    indices: torch.Tensor
    all_pages: int

    def by_index(self, mass: torch.Tensor) -> torch.Tensor:
        """[batch, …, pages] of the view, 0 where it has none → [batch, …, all pages]."""
        chosen = mass[..., : self.indices.shape[1]]
        where = self.indices.view(len(mass), *(1,) * (mass.dim() - 2), -1).expand_as(chosen)
        found = mass.new_zeros((*mass.shape[:-1], self.all_pages))
        return found.scatter_add_(-1, where, chosen)


def retrieve(
    q: torch.Tensor, view: KVView, lengths: list[int], pages: int, scale: float, softcap: float | None = None
) -> Retrieved | None:
    """The ``pages`` pages of each sequence that matter most to its newest token, or None where none has more.

    Args:
        q: [batch, query heads, head_dim].
        lengths: the view's, as the host knows them: nothing here waits for the device.

    Raises:
        CacheInputError: a CUDA graph is being captured.
    """
    cache, layer = view.cache, view.layer
    if q.is_cuda and torch.cuda.is_current_stream_capturing():
        raise CacheInputError(
            f"pages={pages} cannot be captured in a CUDA graph: the host tells where the keys of each page lie"
        )
    counts = [ceil_div(length, PAGE_TOKENS) for length in lengths]
    if max(counts, default=0) <= pages:
        return None
    chosen = torch.zeros((len(counts), pages), dtype=torch.int64, device=q.device)
    for row, (sequence, count) in enumerate(zip(view.sequences, counts, strict=True)):
        if count <= pages:
            chosen[row, :count] = torch.arange(count, device=q.device)
            continue
        # The last page, which may be incomplete, is chosen anyway.
        scores = page_scores(
            q[row], *key_ranges(cache.pools, cache.entries[layer, Side.K, sequence, : count - 1]), scale, softcap
        )
        chosen[row] = chosen_pages(scores, count, pages)
    kept = [min(count, pages) for count in counts]
    table = view.page_table.gather(2, chosen.expand(len(Side), -1, -1))
    present = torch.arange(pages, device=q.device) < torch.tensor(kept, dtype=torch.int64, device=q.device)[:, None]
    less = torch.tensor(
        [count - few for count, few in zip(counts, kept, strict=True)], dtype=torch.int64, device=q.device
    )
    shorter = replace(
        view,
        page_table=table.masked_fill(~present, NO_PAGE).contiguous(),
        lengths=view.lengths - (PAGE_TOKENS * less).to(view.lengths.dtype),
    )
    return Retrieved(shorter, chosen, max(counts))


def page_scores(
    q: torch.Tensor, middle: torch.Tensor, half: torch.Tensor, scale: float, softcap: float | None = None
) -> torch.Tensor:
    """How much pages can matter to a query: logarithms, fp32 [pages].

    No key of a page has a score above q · middle + |q| · half. A softmax over pages of that bound says how much of its
    attention a head may give to each, and heads count alike: not those more whose scores are large.

    Args:
        q: [query heads, head_dim].
        middle, half: fp32 [pages, KV heads, head_dim], as :func:`key_ranges` gives them.
    """
    grouped = q.float().unflatten(0, (middle.shape[1], -1))
    bound = torch.einsum("hgd,phd->hgp", grouped, middle) + torch.einsum("hgd,phd->hgp", grouped.abs(), half)
    # Pages with what is no number are chosen, so that it shows as it does without a choice.
    bound = (bound * scale).nan_to_num(nan=torch.finfo(bound.dtype).max)
    if softcap is not None:
        bound = (bound / softcap).tanh() * softcap
    return bound.log_softmax(-1).flatten(0, 1).logsumexp(0)


def chosen_pages(scores: torch.Tensor, count: int, pages: int) -> torch.Tensor:
    """i64 [pages], ascending: of ``count`` pages, all but the last of which have scores, the first, the last two, and
    the best of the others.

    >>> import torch
    >>> chosen_pages(torch.tensor([0.0, 3, 1, 2, 0]), 6, 4).tolist()
    [0, 1, 4, 5]
    """
    between = scores[_FIRST_PAGES : count - _LAST_PAGES].topk(pages - LEAST_PAGES).indices + _FIRST_PAGES
    last = torch.arange(count - _LAST_PAGES, count, device=scores.device)
    return torch.cat([torch.arange(_FIRST_PAGES, device=scores.device), between.sort().values, last])
