"""Prompts of a transformers model that find what earlier ones have left: one cache for many ``generate`` calls.

::

    pool = PrefixPool(model, formats="INT4", prefix_bytes=2 << 30)
    for question in questions:
        answer = pool.generate(torch.cat([document, question], 1), max_new_tokens=100)  # reads the document once

A pool has one :class:`~kvpack.KVCache`. A :class:`~kvpack.runtime.kv.manager.KVManager` gives out its sequences and
keeps its pages: prefixes and branches of all prompts, evicted to host memory and files if there are such tiers
(docs/KV-MANAGER.md). Each prompt has a :class:`PooledCache`, which is a KVPackCache of one row in that cache.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch

from kvpack.errors import CacheInputError, KvpackError
from kvpack.integrations.transformers.cache import KVPackCache, NamedFormats, cache_keyword
from kvpack.integrations.transformers.contexts import (
    TokenIds,
    active_adapter,
    device_of_model,
    model_fingerprint,
    token_rows,
)
from kvpack.integrations.transformers.prefill import prefill
from kvpack.runtime.kv.allocator import Policy
from kvpack.runtime.kv.cache import OpenFormats
from kvpack.runtime.kv.eviction import DEFAULT_POLICY, EvictionPolicy
from kvpack.runtime.kv.manager import KVManager, Started


class PooledCache(KVPackCache):
    """A prompt's cache, of :meth:`PrefixPool.start`, until :meth:`PrefixPool.finish`.

    It has one row, and can neither be cropped, as assisted decoding does, nor reset: its pages are known by the tokens.

    Attributes:
        started: which sequence it is, how many of the prompt's tokens it had from the beginning, and whether their
            pages are those of a fresh prefill of as many, bit for bit.
    """

    started: Started

    @property
    def room_for_rows(self) -> int:
        return 1

    def reset(self) -> None:
        if self.get_seq_length():
            self._refuse("reset()")

    def crop_columns(self, count: int) -> None:
        self._refuse(f"forgetting {count} tokens")

    def select_rows(self, rows: Sequence[int]) -> None:
        if list(rows) != [0]:
            self._refuse(f"a batch of rows {list(rows)}")

    def _refuse(self, what: str) -> NoReturn:
        raise CacheInputError(
            f"{what}: a cache of a PrefixPool is one prompt and what follows it; finish() it, and start() another"
        )


class PrefixPool:
    """Keys and values of one model's prompts, which share what they begin with.

    Args:
        model: of transformers, on one device, with ``attn_implementation="kvpack"``.
        max_tokens: of a sequence; None: 16 million.
        max_sequences: how many prompts are between :meth:`start` and :meth:`finish` at a time.
        prefix_bytes, eviction, host_bytes, disk, disk_bytes: as ``prefix_bytes``, ``policy``, … of
            :class:`~kvpack.runtime.kv.manager.KVManager`.
        formats, budget, recent_tokens, sinks, dtype, policy, max_bytes, key_order: as of :class:`KVPackCache`.

    Pages are found by the model's fingerprint, as :meth:`KVPackCache.load` compares it, and by the LoRA adapter that is
    in use when a prompt starts. Weights that change otherwise need another pool.

    Attributes:
        model: the model.
        manager: who keeps the pages: metrics, pinned prefixes, tiers.

    Raises:
        CacheInputError: another attention implementation; options as of :class:`KVPackCache` and
            :class:`~kvpack.runtime.kv.manager.KVManager`; a configuration that does not name its KV heads.
        NotSupportedError: a model on several devices.

    >>> import torch, transformers
    >>> from kvpack.integrations.transformers.prefix_pool import PrefixPool
    >>> config = transformers.LlamaConfig(vocab_size=99, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
    ...     num_attention_heads=4, num_key_value_heads=2)
    >>> model = transformers.LlamaForCausalLM(config).half().eval()
    >>> model.set_attn_implementation("kvpack")
    >>> pool, document = PrefixPool(model, formats="INT4"), torch.arange(200)[None] % 90 + 3
    >>> for question in ([[7, 8]], [[9, 5, 4]]):
    ...     prompt = torch.cat([document, torch.tensor(question)], 1)
    ...     print(pool.match(prompt), pool.generate(prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False).shape)
    0 torch.Size([1, 206])
    192 torch.Size([1, 207])
    """

    def __init__(
        self,
        model: Any,
        *,
        max_tokens: int | None = None,
        max_sequences: int = 8,
        prefix_bytes: int | None = None,
        eviction: str | EvictionPolicy = DEFAULT_POLICY,
        host_bytes: int = 0,
        disk: str | os.PathLike[str] | None = None,
        disk_bytes: int | None = None,
        formats: OpenFormats | NamedFormats | None = None,
        budget: float | None = None,
        recent_tokens: int = 64,
        sinks: int = 4,
        dtype: torch.dtype | None = None,
        policy: Policy | None = None,
        max_bytes: int | None = None,
        key_order: Sequence[int] | None = None,
    ) -> None:
        self._options: dict[str, Any] = {
            "formats": formats,
            "budget": budget,
            "recent_tokens": recent_tokens,
            "sinks": sinks,
            "max_tokens": max_tokens,
            "max_sequences": max_sequences,
            "dtype": dtype,
            "policy": policy,
            "max_bytes": max_bytes,
            "key_order": key_order,
        }
        self.model = model
        cache = KVPackCache(model.config, **self._options)
        if cache.is_read_elsewhere():
            raise CacheInputError(
                "a PrefixPool needs attn_implementation='kvpack': call model.set_attn_implementation('kvpack')"
            )
        self.manager = KVManager(
            cache.empty_kv(model.dtype, device_of_model(model)),
            model_fingerprint(model),
            prefix_bytes=prefix_bytes,
            policy=eviction,
            host_bytes=host_bytes,
            disk=disk,
            disk_bytes=disk_bytes,
        )
        self._running: list[PooledCache] = []

    def match(self, ids: TokenIds, *, salt: str = "") -> int:
        """How many first tokens of a prompt the cache itself has; tiers are not looked at."""
        return self.manager.match(self._row(ids), adapter=active_adapter(self.model), salt=salt).tokens

    def start(self, ids: TokenIds, *, session: str | None = None, salt: str = "") -> PooledCache:
        """A cache for one prompt, with what is there of it: full pages of 64 tokens, and never the last token.

        Args:
            ids: [1, tokens], or [tokens]: without pads.
            session, salt: as of :meth:`KVManager.start`.

        Raises:
            CacheInputError: several rows, or none.
            CacheFullError: all ``max_sequences`` are in use.
        """
        row = self._row(ids)
        made = PooledCache(self.model.config, **self._options)
        made.started = self.manager.start(row, session=session, adapter=active_adapter(self.model), salt=salt)
        made.sequences = [made.started.sequence]
        made.hold(self.manager.cache, [token_rows(row)[0, : made.started.tokens]])
        self._running.append(made)
        return made

    def finish(self, cache: PooledCache, ids: TokenIds, *, keep: bool = True) -> int:
        """A prompt has ended: its pages stay, as long as there is room, for those that begin alike.

        Args:
            cache: of :meth:`start`; it is of no use afterwards.
            ids: [1, tokens], or [tokens]: the prompt and what followed it, as ``generate`` returns it.
            keep: without, its pages are forgotten, but for those that others have.

        Returns:
            How many of its tokens can be found now.

        Raises:
            CacheInputError: a cache that is not of this pool, or finished; other ids than it was started with.
            CacheFullError: what waits in 16 bits cannot be quantized for want of memory.
        """
        if not any(cache is one for one in self._running):
            raise CacheInputError("the cache is none that this pool has started, or it is finished")
        sequence, row = cache.started.sequence, self._row(ids)
        known = self.manager.tokens(sequence)
        if row[: len(known)] != known:
            raise CacheInputError(f"ids do not begin with the {len(known)} tokens that the cache was started with")
        more = row[len(known) :]
        self.manager.append_tokens([sequence] * len(more), more)
        return self._give_back(cache, keep=keep)

    def generate(
        self,
        ids: torch.Tensor,
        *,
        session: str | None = None,
        salt: str = "",
        chunk_tokens: int | None = None,
        progress: Callable[[int, int], None] | None = None,
        **options: Any,
    ) -> Any:
        """``model.generate`` with a cache of :meth:`start`; what has been read and generated stays.

        Args:
            ids: i64 [1, tokens], without pads.
            session, salt: as of :meth:`start`.
            chunk_tokens, progress: as of :func:`~.prefill.prefill`, which reads the prompt.
            options: of ``model.generate``.

        Returns:
            What ``model.generate`` does.

        Raises:
            CacheInputError: pads; several rows, of prompts, beams or samples; what crops a cache.
            CacheFullError: all ``max_sequences`` are in use, or there is no room for more tokens.
        """
        mask = options.get("attention_mask")
        if mask is not None and not mask.all():
            raise CacheInputError("attention_mask has pads: a PrefixPool takes one prompt at a time, without any")
        cache = self.start(ids, session=session, salt=salt)
        try:
            prefill(self.model, ids, cache, chunk_tokens=chunk_tokens, progress=progress)
            found = self.model.generate(ids, **{cache_keyword(self.model): cache}, **options)
            self.finish(cache, getattr(found, "sequences", found))
        except BaseException:
            if cache.sequences:
                self._end(cache)
            raise
        return found

    def _end(self, cache: PooledCache) -> None:
        """After an error: what was read of the tokens that the manager knows stays, if all layers have it."""
        try:
            self._give_back(cache, keep=True)
        except KvpackError:
            self._give_back(cache, keep=False)

    def _give_back(self, cache: PooledCache, *, keep: bool) -> int:
        found = self.manager.finish(cache.started.sequence, keep=keep)
        self._running = [one for one in self._running if one is not cache]
        cache.sequences = []
        return found

    def _row(self, ids: TokenIds) -> list[int]:
        rows = token_rows(ids)
        if len(rows) != 1 or not rows.size:
            raise CacheInputError(f"ids have shape {list(rows.shape)}; a PrefixPool takes one prompt at a time")
        found: list[int] = rows[0].tolist()
        return found
