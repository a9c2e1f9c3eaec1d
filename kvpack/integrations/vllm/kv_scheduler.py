"""Which pages of a request's tokens can be loaded, and which have to be saved: the scheduler's side of the connector.

A page is there if *all* ranks say that they have theirs: each has its own heads (or layers), and a page that one of
them has lost is of no use to the others. What ranks say may be out of date, so a load may fail; then vLLM computes.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvpack.format.layout import ceil_div
from kvpack.format.pages import PAGE_TOKENS
from kvpack.integrations.vllm.kv_identity import adapter_identity
from kvpack.integrations.vllm.kv_plan import Changes, Load, PageRange, StepPlan
from kvpack.runtime.kv.prefix_hash import chained, root_hash, token_pages


@dataclass
class _Request:
    """A request that is under way.

    Attributes:
        root: what its first page's hash stands on; None: its pages are not kept.
        hashes, tokens: of its full pages, as far as they have been asked for.
        offered: how many of them have been given to be saved.
        computed_tokens: where vLLM's own prefix ended when it was looked up last.
        is_counted: whether that lookup is.
        loaded_after: how often it had been preempted when it was loaded last; None: it never was.
    """

    request: Any
    root: bytes | None
    hashes: list[bytes] = field(default_factory=list)
    tokens: list[bytes] = field(default_factory=list)
    offered: int = 0
    computed_tokens: int = 0
    is_counted: bool = False
    loaded_after: int | None = None

    def know(self, pages: int) -> None:
        """Have the hashes of so many pages."""
        if (known := len(self.hashes)) < pages:
            assert self.root is not None
            tokens = self._token_pages(known, pages)
            self.hashes += chained(self.hashes[-1] if self.hashes else self.root, tokens)
            self.tokens += tokens

    def know_again(self, first: int, end: int) -> None:
        """:meth:`know`, where a request whose prompt comes piece by piece may have other tokens from a page on."""
        if self.tokens[first:end] != self._token_pages(first, end)[: len(self.tokens) - first]:
            del self.hashes[first:], self.tokens[first:]
        self.know(end)

    def _token_pages(self, first: int, end: int) -> list[bytes]:
        return token_pages(list(self.request.all_token_ids[first * PAGE_TOKENS : end * PAGE_TOKENS]))

    def range(self, first: int, end: int, block_ids: Sequence[int]) -> PageRange:
        return PageRange(
            first,
            self.hashes[first - 1] if first else None,
            tuple(self.hashes[first:end]),
            tuple(self.tokens[first:end]),
            tuple(block_ids),
        )


class PageScheduler:
    """
    Args:
        key: what the pages of all requests depend on, as JSON values.
        ranks: how many there are.
        block_tokens: of a block of vLLM's cache.
        loads, saves: whether anything is loaded, and saved.
        min_load_tokens: fewer are computed.
    """

    def __init__(
        self,
        key: Mapping[str, Any],
        *,
        ranks: int,
        block_tokens: int,
        loads: bool = True,
        saves: bool = True,
        min_load_tokens: int = 1,
    ) -> None:
        self._key, self._block_tokens = dict(key), block_tokens
        self._loads, self._saves, self._min_load_tokens = loads, saves, min_load_tokens
        self._all_ranks = (1 << ranks) - 1
        # Of each page a bit for each rank that has it.
        self._ranks_of: dict[bytes, int] = {}
        self._requests: dict[str, _Request] = {}
        self._adapters: dict[int, list[Any]] = {}
        self._planned: list[Load] = []
        self._counts: Counter[str] = Counter()

    # What ranks have -------------------------------------------------------------------------------------------------

    def update(self, rank: int, changes: Changes) -> None:
        """Pages have come to a rank, or gone from it."""
        bit = 1 << rank
        for one in changes.come:
            self._ranks_of[one] = self._ranks_of.get(one, 0) | bit
        for one in changes.gone:
            if left := self._ranks_of.get(one, 0) & ~bit:
                self._ranks_of[one] = left
            else:
                self._ranks_of.pop(one, None)

    def has(self, page_hash: bytes) -> bool:
        """Whether all ranks have a page."""
        return self._ranks_of.get(page_hash) == self._all_ranks

    # Requests --------------------------------------------------------------------------------------------------------

    def _root(self, request: Any) -> bytes | None:
        """What a request's first page's hash stands on; None: its pages are not kept.

        Tokens do not say what images and embeddings are.
        """
        if request.mm_features or request.prompt_embeds is not None:
            return None
        adapter, salt = request.lora_request, request.cache_salt or ""
        told = None if adapter is None else self._adapter(adapter)
        if adapter is not None and told is None:
            return None
        return root_hash(self._key | {"adapter": told, "salt": salt})

    def _adapter(self, adapter: Any) -> list[Any] | None:
        """What tells an adapter from others; None: that cannot be said.

        Where its files are others than when it was met first, vLLM may have those of then or, if it has dropped it in
        between, those of now. With ``load_inplace`` it reads them anew.
        """
        told = adapter_identity(adapter.lora_name, adapter.lora_path)
        if told is not None and (adapter.lora_int_id not in self._adapters or adapter.load_inplace):
            self._adapters[adapter.lora_int_id] = told
        return told if told == self._adapters.get(adapter.lora_int_id) else None

    def lookup(self, request: Any, computed_tokens: int) -> int:
        """How many tokens behind those that are computed can be loaded: whole blocks of vLLM's.

        Args:
            request: of vLLM.
            computed_tokens: of whole blocks.
        """
        known = self._requests.get(request.request_id)
        if known is None or known.request is not request:
            known = self._requests[request.request_id] = _Request(request, self._root(request))
            self._counts["passed_over_requests"] += known.root is None
        known.offered, known.computed_tokens, known.is_counted = 0, computed_tokens, False
        if known.root is None or known.loaded_after == request.num_preemptions:
            return 0  # not kept; or the last load brought nothing, and the next one might not either, and so on
        # vLLM has to compute a token, since its logits are needed, and has whole blocks before it.
        most = (request.num_tokens - 1) // self._block_tokens * self._block_tokens
        if not self._loads or most <= computed_tokens:
            return 0
        known.know(min(ceil_div(most, PAGE_TOKENS), request.num_tokens // PAGE_TOKENS))
        found = computed_tokens // PAGE_TOKENS
        while found < len(known.hashes) and self.has(known.hashes[found]):
            found += 1
        end = min(found * PAGE_TOKENS // self._block_tokens * self._block_tokens, most)
        return end - computed_tokens if end - computed_tokens >= self._min_load_tokens else 0

    def allocated(self, request: Any, block_ids: Sequence[int], external_tokens: int) -> None:
        """A request has got blocks. So many tokens, behind those that were computed at its lookup, are to be loaded."""
        known = self._requests.get(request.request_id)
        if known is None or known.root is None:
            return
        first, end = known.computed_tokens, known.computed_tokens + external_tokens
        if not known.is_counted:
            known.is_counted = True
            self._counts["queried_tokens"] += request.num_tokens - first
            self._counts["hit_tokens"] += external_tokens
        if external_tokens:
            known.loaded_after = request.num_preemptions
            pages = known.range(first // PAGE_TOKENS, ceil_div(end, PAGE_TOKENS), block_ids)
            self._planned.append(Load(request.request_id, first, end, pages))

    def plan_step(self, scheduled: Mapping[str, int], block_ids_of: Callable[[str], Sequence[int]]) -> StepPlan:
        """What workers are to do in a step.

        Args:
            scheduled: how many tokens of each request are computed in it.
            block_ids_of: a request's block table.
        """
        loads, self._planned = self._planned, []
        plan = StepPlan(loads, computes=bool(scheduled))
        for request_id, tokens in scheduled.items():
            known = self._requests.get(request_id)
            if known is None or known.root is None or not self._saves:
                continue
            request = known.request
            # Tokens that are computed, and of which it is known what they are.
            reached = min(request.num_computed_tokens + tokens, request.num_tokens) // PAGE_TOKENS
            first = known.offered
            if reached <= first:
                continue
            known.know_again(first, reached)
            known.offered = reached
            while first < reached and self.has(known.hashes[first]):
                first += 1
            if first < reached:
                plan.saves.append(known.range(first, reached, block_ids_of(request_id)))
        return plan

    def reset(self) -> None:
        """The weights are others from now on: nothing that was computed until now is found any more, nor is anything of
        requests that are under way kept. Files stay, for an engine that has the weights of before."""
        self._key["reset"] = secrets.token_hex(16)
        self._requests.clear()
        self._planned.clear()

    def finished(self, request_id: str) -> None:
        """A request is no more."""
        self._requests.pop(request_id, None)

    def take_counts(self) -> dict[str, int]:
        """What has been counted since the last call, without what is zero."""
        counts, self._counts = self._counts, Counter()
        return {name: count for name, count in counts.items() if count}
