"""Attention of new tokens to a paged KV cache of mixed precision, in one call (docs/KV.md).

>>> import torch
>>> from kvpack import KVCache, PageFormat, attention_with_kv_cache
>>> cache = KVCache(num_layers=1, num_kv_heads=2, head_dim=64, max_tokens=1024, device="cpu", formats=PageFormat.INT4)
>>> prompt, token = torch.randn(1, 12, 300, 64).half(), torch.randn(1, 12, 1, 64).half()
>>> for x in (prompt, token):  # eight query heads, two of keys and of values
...     out, cache = attention_with_kv_cache(x[:, :8], x[:, 8:10], x[:, 10:], cache)
>>> out.shape, cache.length(layer=0, sequence=0)
(torch.Size([1, 8, 1, 64]), 301)

On CUDA the kernels of :mod:`kvpack.runtime.kv.attention_kernels` read pages in place: one that splits pages over all
multiprocessors for few query tokens, one that shares pages among many. On the CPU keys and values are dequantized to
fp32 and given to torch: the same results, slowly.

``torch.compile`` sees one operator, ``torch.ops.kvpack.attention_with_kv_cache``, which names the cache by a number and
runs as it does without. CUDA graphs: see :meth:`KVCache.plan`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from kvpack.errors import CacheInputError
from kvpack.format.layout import ceil_div
from kvpack.format.pages import PAGE_TOKENS, Side
from kvpack.runtime.device.devices import device_limits
from kvpack.runtime.kv import attention_kernels
from kvpack.runtime.kv.attention_kernels import COLUMNS, Observed
from kvpack.runtime.kv.cache import KVCache, KVView, cache_of
from kvpack.runtime.kv.distortion import Queries
from kvpack.runtime.kv.page_kernels import read_tokens
from kvpack.runtime.kv.ragged import Counts, checked_counts, in_columns, rows_by_count
from kvpack.runtime.kv.retrieval import LEAST_PAGES, Retrieved, retrieve

# A cache that is made here ends where lengths do; its tables grow by need.
_MAX_TOKENS = 1 << 30
# Columns are query heads of a KV head times tokens. Pages are split over the GPU for up to the first number of them, or
# the second where they would not occupy half of it otherwise (`kvpack bench attention`, "few tokens").
_DECODE_COLUMNS, _MOST_DECODE_COLUMNS = 4 * COLUMNS, 32 * COLUMNS
# Of the last tokens, which show which pages are looked at.
_OBSERVING_COLUMNS = 2 * COLUMNS
# That are held at once on the CPU, where torch has no kernel that does without: 64 MiB.
_CPU_SCORES = 1 << 24


def attention_with_kv_cache(
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    past_key_value: KVCache | None = None,
    update_cache: bool = True,
    causal: bool = True,
    *,
    layer: int | None = None,
    sequences: Sequence[int] | None = None,
    tokens: Sequence[int] | None = None,
    cached_tokens: int | Sequence[int] | None = None,
    scale: float | None = None,
    window: int | None = None,
    sinks: int = 0,
    softcap: float | None = None,
    sink_logits: torch.Tensor | None = None,
    observe: bool = False,
    head_importance: torch.Tensor | None = None,
    chunk_tokens: int | None = None,
    partial: bool = False,
    pages: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[torch.Tensor, KVCache]:
    """softmax(q · Kᵀ · scale) · V, where K and V are what the cache holds of each sequence and, behind it, k and v.

    New tokens are written to the cache in 16 bits and attended to in 16 bits, older ones in what their pages have.
    Pages that leave the recent window are quantized afterwards. A long prompt is taken in chunks, each of which attends
    to the ones before it as the cache then holds them. They end where a row's tokens in the cache are a multiple of
    2,048, so that a prompt may come in several calls that are ``partial``, but for the last one, with the same pages.

    Args:
        q: [batch, query heads, tokens, head_dim], fp16 or bf16, positions already applied.
        k, v: [batch, KV heads, tokens, head_dim], of q's dtype and device. Query heads are a multiple of KV heads; the
            first ones belong to the first. None, or no tokens: q is of the last tokens that the cache holds, or with
            ``causal=False`` of any others.
        past_key_value: whose tokens come before these. None makes one with a single layer, in 16 bits, that
            grows by need.
        update_cache: whether the cache keeps the new tokens. Without, no chunks.
        causal: whether a token sees none of those behind it. Without, all of a call's tokens are written before the
            first is attended to: no chunks.
        layer: of the cache; None if it has one only.
        sequences: which ones of the cache the batch is, each once; None is 0, 1, ….
        tokens: how many each row brings, where they differ, as in prompts that are padded on the left: of row i the
            last ``tokens[i]`` of q, k and v, 0 or more. The others reach nothing; their results are zeros. None: all.
        cached_tokens: how many tokens the cache holds of all sequences, or of each: it is refused if that is not so, as
            when a prompt comes a second time. None: whatever it holds.
        scale: from 10^-6 to 10^6; None is 1 / √head_dim.
        window: how many tokens each one sees, itself included; None is all.
        sinks: how many of a sequence's first tokens are seen beyond the window.
        softcap: from 10^-6 to 1000: scores, times ``scale``, become softcap · tanh(score / softcap), as in Gemma 2.
            None: they stay as they are.
        sink_logits: [query heads], of any float type, on q's device: each head's softmax has one more score, this one,
            whose value is zero (in gpt-oss, a sink). It has nothing to do with ``sinks``. None is as −∞.
        observe: whether the attention that pages receive is added to the cache's ``mass``, of the last few tokens of
            each chunk: what :meth:`KVCache.reallocate` divides bits by.
        head_importance: [query heads], how much each counts in that, compared with those of other layers as well. What
            is negative or no number counts as 0.
        chunk_tokens: chunks of so many columns of this call instead. A chunk's pages are in 16 bits until it is done:
            fewer take less memory, and see more of the prompt quantized.
        partial: whether more of the prompt follows in another call: pages wait for it in 16 bits until their cell of
            2,048 tokens has ended (:meth:`KVCache.writing`). Not with ``chunk_tokens``, nor in CUDA graphs.
        pages: at least 3: a row that brings one token attends to so many pages of 64 tokens: the first, the last two,
            and those that the ranges of their keys say matter most to it (docs/KV.md, "Long contexts"). Rows that bring
            more attend to all. ``observe`` counts the others as not looked at. None: all pages. Not with ``window``,
            nor in CUDA graphs.
        progress: called behind each chunk with how many tokens are done and how many there are. What it raises ends
            the call between two chunks; the cache holds the chunks that are done.

    Returns:
        The result, like q, and the cache.

    Raises:
        CacheInputError: shapes, dtypes, devices, a layer, sequences or their tokens that do not fit; a gradient is
            wanted.
        CacheFullError: a sequence would exceed ``max_tokens``, or pages ``max_bytes`` or the device's memory.

    With either, the cache is as it was before the chunk that failed. That is the first one, but for ``max_bytes`` and
    the device's memory. Where they end a step in the middle of a model's layers, free the sequences before going on:
    some layers have its tokens.
    """
    _require_tensor("q", q)
    if past_key_value is None:
        if not isinstance(k, torch.Tensor):
            raise CacheInputError("k and v are missing, and so is past_key_value: there is nothing to attend to")
        past_key_value = _new_cache(q, k)
    if not isinstance(past_key_value, KVCache):
        raise CacheInputError(
            f"past_key_value is a {type(past_key_value).__name__}; make a kvpack.KVCache(num_layers, num_kv_heads, …)"
        )
    cache = past_key_value
    if layer is None:
        if cache.num_layers > 1:
            raise CacheInputError(f"the cache has {cache.num_layers} layers: say which one with layer=…")
        layer = 0
    out = cache.attend(
        layer,
        q,
        k,
        v,
        sequences,
        tokens=tokens,
        cached_tokens=cached_tokens,
        update_cache=update_cache,
        causal=causal,
        scale=scale,
        window=window,
        sinks=sinks,
        softcap=softcap,
        sink_logits=sink_logits,
        observe=observe,
        head_importance=head_importance,
        chunk_tokens=chunk_tokens,
        partial=partial,
        pages=pages,
        progress=progress,
    )
    return out, cache


def attend(
    cache: KVCache,
    layer: int,
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    sequences: Sequence[int] | None = None,
    *,
    tokens: Sequence[int] | None = None,
    cached_tokens: int | Sequence[int] | None = None,
    update_cache: bool = True,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    sinks: int = 0,
    softcap: float | None = None,
    sink_logits: torch.Tensor | None = None,
    observe: bool = False,
    head_importance: torch.Tensor | None = None,
    chunk_tokens: int | None = None,
    partial: bool = False,
    pages: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> torch.Tensor:
    """:meth:`KVCache.attend`; the arguments are those of :func:`attention_with_kv_cache`.

    Raises:
        CacheInputError, CacheFullError
    """
    _require_tensor("q", q)
    batch = q.shape[0] if q.dim() else 0
    if k is None and v is None:
        k = v = q.new_empty((batch, cache.num_kv_heads, 0, cache.head_dim))
    if not isinstance(k, torch.Tensor) or not isinstance(v, torch.Tensor):
        raise CacheInputError(
            f"k is a {type(k).__name__} and v a {type(v).__name__}; tensors are wanted, or None for both"
        )
    if isinstance(cached_tokens, int):
        cached_tokens = [cached_tokens] * batch
    call = _Call(
        layer,
        None if sequences is None else _plain("a sequence", sequences),
        None if tokens is None else _plain("tokens", tokens),
        None if cached_tokens is None else _plain("cached_tokens", cached_tokens),
        1 / math.sqrt(cache.head_dim) if scale is None else scale,
        window,
        sinks,
        softcap,
        causal,
        update_cache,
        observe,
        chunk_tokens,
        partial,
        pages,
    )
    _check(q, k, v, cache, call)
    _check_sink_logits(sink_logits, q)
    if torch.compiler.is_compiling():
        if progress is not None:
            raise CacheInputError("torch.compile cannot call progress")
        out: torch.Tensor = torch.ops.kvpack.attention_with_kv_cache(
            q,
            k,
            v,
            sink_logits,
            head_importance,
            cache.calls,
            cache.number,
            call.layer,
            call.sequences,
            call.tokens,
            call.cached_tokens,
            call.scale,
            call.window,
            call.sinks,
            call.softcap,
            call.causal,
            call.update_cache,
            call.observe,
            call.chunk_tokens,
            call.partial,
            call.pages,
        )
        return out
    return _attend_in_chunks(q, k, v, cache, call, sink_logits, head_importance, progress)


@dataclass(frozen=True)
class _Call:
    layer: int
    sequences: tuple[int, ...] | None
    tokens: tuple[int, ...] | None
    cached_tokens: tuple[int, ...] | None
    scale: float
    window: int | None
    sinks: int
    softcap: float | None
    causal: bool
    update_cache: bool
    observe: bool
    chunk_tokens: int | None
    partial: bool
    pages: int | None


def _require_tensor(name: str, value: object) -> None:
    if not isinstance(value, torch.Tensor):
        raise CacheInputError(f"{name} is a {type(value).__name__}; a tensor is wanted")


def _plain(name: str, numbers: Sequence[int]) -> tuple[int, ...]:
    try:
        # int() of a number that a compiler has made dynamic would make it fixed.
        plain = tuple(number if isinstance(number, int) else int(number) for number in numbers)
    except (TypeError, ValueError):
        raise CacheInputError(f"{name} is not an integer in {numbers!r}; a sequence of integers is wanted") from None
    for number, given in zip(plain, numbers, strict=True):
        if number != given:
            raise CacheInputError(f"{name} is {given!r}; an integer is wanted")
    return plain


@torch.compiler.disable
def _new_cache(q: torch.Tensor, k: torch.Tensor) -> KVCache:
    if k.dim() != 4:
        raise CacheInputError(f"k has shape {list(k.shape)}; [batch, KV heads, tokens, head_dim] is wanted")
    batch, num_kv_heads, _, head_dim = k.shape
    return KVCache(1, num_kv_heads, head_dim, _MAX_TOKENS, max_sequences=batch, dtype=q.dtype, device=q.device)


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cache: KVCache, call: _Call) -> None:
    """What the cache itself does not check."""
    if q.dim() != 4 or q.shape[-1] != cache.head_dim:
        raise CacheInputError(
            f"q has shape {list(q.shape)}; this cache takes [batch, query heads, tokens, head_dim {cache.head_dim}]"
        )
    heads = q.shape[1]
    if heads == 0 or heads % cache.num_kv_heads != 0:
        raise CacheInputError(f"{heads} query heads are no multiple of {cache.num_kv_heads} KV heads")
    if k.dim() == 4 and (q.shape[0] != k.shape[0] or k.shape[2] not in (0, q.shape[2])):
        raise CacheInputError(
            f"q has shape {list(q.shape)} and k {list(k.shape)}; [batch, heads, tokens, head_dim] with the same batch "
            "and tokens is wanted, or a k and v of no tokens"
        )
    if q.dtype != cache.dtype or q.device != cache.device:
        raise CacheInputError(
            f"q is {q.dtype} on {q.device}; this cache is {cache.dtype} on {cache.device} (KVCache(dtype=…, device=…))"
        )
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise CacheInputError("attention to a cache has no gradient: call it under torch.no_grad()")
    # Beyond, kernels could not tell what is not to be seen.
    if not isinstance(call.scale, (float, int)) or not 1e-6 <= call.scale <= 1e6:
        raise CacheInputError(f"scale is {call.scale!r}; it must be between 1e-6 and 1e6")
    # The error of a capped score grows with the cap: beyond 1000 it would show in the result.
    capped = isinstance(call.softcap, (float, int)) and not isinstance(call.softcap, bool)
    if call.softcap is not None and not (capped and 1e-6 <= call.softcap <= 1e3):
        raise CacheInputError(f"softcap is {call.softcap!r}; it must be between 1e-6 and 1000, or None")
    flags = ("causal", "update_cache", "observe", "partial")
    for name, flag in ((name, getattr(call, name)) for name in flags):
        if not isinstance(flag, bool):
            raise CacheInputError(f"{name} is {flag!r}; True or False is wanted (a layer is given as layer=…)")
    counts = (
        ("layer", call.layer),
        ("window", call.window),
        ("sinks", call.sinks),
        ("chunk_tokens", call.chunk_tokens),
        ("pages", call.pages),
    )
    for name, count in counts:
        if (count is not None or name == "layer") and not isinstance(count, int):
            raise CacheInputError(f"{name} is {count!r}; an integer is wanted")
    if call.window is not None and call.window < 1:
        raise CacheInputError(f"window is {call.window}; it is at least 1, or None")
    if call.sinks < 0:
        raise CacheInputError(f"sinks is {call.sinks}; it must not be negative")
    if call.window is not None and not call.causal:
        raise CacheInputError("a window ends at each token, so attention with one is causal")
    if call.observe and not call.update_cache:
        raise CacheInputError("attention to tokens that are not kept cannot be observed")
    if call.chunk_tokens is not None and call.chunk_tokens < 1:
        raise CacheInputError(f"chunk_tokens is {call.chunk_tokens}; it must be at least 1")
    if call.partial and (call.chunk_tokens is not None or not call.causal):
        raise CacheInputError("partial calls are causal, and cut by themselves: leave chunk_tokens and causal out")
    if call.pages is not None and (isinstance(call.pages, bool) or call.pages < LEAST_PAGES):
        raise CacheInputError(f"pages is {call.pages!r}; it must be at least {LEAST_PAGES} (first, last two), or None")
    if call.pages is not None and call.window is not None:
        raise CacheInputError("pages chooses among all that a token sees: give either pages or a window")


def _check_sink_logits(sink_logits: torch.Tensor | None, q: torch.Tensor) -> None:
    if sink_logits is None:
        return
    _require_tensor("sink_logits", sink_logits)
    if sink_logits.shape != (q.shape[1],) or sink_logits.device != q.device or not sink_logits.is_floating_point():
        raise CacheInputError(
            f"sink_logits is {sink_logits.dtype} {list(sink_logits.shape)} on {sink_logits.device}; q has {q.shape[1]} "
            f"heads on {q.device}: a floating-point tensor of as many is wanted there"
        )
    if torch.is_grad_enabled() and sink_logits.requires_grad:
        raise CacheInputError("attention to a cache has no gradient: call it under torch.no_grad()")


@torch.compiler.disable
def _attend_in_chunks(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cache: KVCache,
    call: _Call,
    sink_logits: torch.Tensor | None,
    head_importance: torch.Tensor | None,
    progress: Callable[[int, int], None] | None,
) -> torch.Tensor:
    if head_importance is not None:
        head_importance = _checked_importance(head_importance, q)
    if sink_logits is not None:
        sink_logits = sink_logits.detach().float().contiguous()
    tokens, observe = q.shape[2], call.observe
    counts = checked_counts(call.tokens, len(q), tokens)
    alone = k.numel() == 0 and q.numel() > 0
    if alone or call.cached_tokens is not None:
        ids = cache.checked_input(call.layer, k, v, call.sequences)
        _check_held(cache, call, ids, counts, alone=alone)
    if q.numel() == 0:
        cache.append(call.layer, k, v, call.sequences)
        return torch.empty_like(q)
    whole = alone or not call.causal or not call.update_cache
    if whole or tokens == 1:
        ends = [tokens]
    elif call.chunk_tokens is not None:
        ends = [*range(call.chunk_tokens, tokens, call.chunk_tokens), tokens]
    else:
        # Where cells end, and not by free memory: what a token sees of other chunks is quantized.
        ids = cache.checked_input(call.layer, k, v, call.sequences)
        ends = cache.cell_ends(call.layer, ids, counts, tokens)
        if call.partial and call.observe:
            call = replace(call, observe=cache.ends_cell(call.layer, ids, counts))
    if len(ends) == 1:
        out = _attend_once(q, k, v, cache, call, counts, sink_logits, head_importance)
        if progress is not None:
            progress(tokens, tokens)
        return out
    # The first chunk must not be written if there is no room for the last.
    cache.check_room(call.layer, cache.checked_input(call.layer, k, v, call.sequences), counts)
    out = torch.empty_like(q)
    # Others than the last one end a cell.
    of_others = call if call.chunk_tokens is not None else replace(call, partial=True, observe=observe)
    for first, end in itertools.pairwise([0, *ends]):
        part = slice(first, end)
        of_part = in_columns(counts, tokens, first, end)
        of_call = call if end == tokens else of_others
        out[:, :, part] = _attend_once(
            q[:, :, part], k[:, :, part], v[:, :, part], cache, of_call, of_part, sink_logits, head_importance
        )
        if progress is not None:
            progress(end, tokens)
    return out


def _check_held(cache: KVCache, call: _Call, ids: list[int], counts: Counts, *, alone: bool) -> None:
    """Whether the cache holds what the caller says, and what queries alone need."""
    if call.cached_tokens is not None and len(call.cached_tokens) != len(ids):
        raise CacheInputError(f"cached_tokens has {len(call.cached_tokens)} numbers for a batch of {len(ids)}")
    for row, sequence in enumerate(ids):
        count = counts if isinstance(counts, int) else counts[row]
        least = count if call.causal else min(count, 1)
        held, where = cache.length(call.layer, sequence), f"layer {call.layer}, sequence {sequence}"
        if call.cached_tokens is not None and held != call.cached_tokens[row]:
            raise CacheInputError(
                f"{where}: the cache holds {held} tokens, where cached_tokens says {call.cached_tokens[row]}; give it "
                "what comes behind them alone, or free() the sequence first"
            )
        if alone and held < least:
            raise CacheInputError(
                f"{where}: queries alone are of the last tokens in the cache, which holds {held}; at least {least} are "
                "wanted"
            )


def _checked_importance(head_importance: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    if not isinstance(head_importance, torch.Tensor):
        raise CacheInputError(f"head_importance is a {type(head_importance).__name__}; a tensor is wanted")
    if head_importance.shape != (q.shape[1],) or head_importance.device != q.device:
        raise CacheInputError(
            f"head_importance has shape {list(head_importance.shape)} on {head_importance.device}; q has {q.shape[1]} "
            f"heads on {q.device}"
        )
    return head_importance.detach().float().nan_to_num(0, 0, 0).clamp(min=0)


def _attend_once(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cache: KVCache,
    call: _Call,
    counts: Counts,
    sink_logits: torch.Tensor | None,
    head_importance: torch.Tensor | None,
) -> torch.Tensor:
    q = q.detach() if q.stride(-1) == 1 else q.detach().contiguous()
    columns, tokens, groups = q.shape[2], None, {}
    parts = {columns: q}
    if counts != columns:
        cache.require_equal_in_graphs(counts)  # before rows are picked, which a capture does not allow
        tokens = [counts] * len(q) if isinstance(counts, int) else counts
        # Rows that bring as many tokens are attended to together.
        groups = rows_by_count(tokens)
        parts = {count: _rows_of(q, rows)[:, :, columns - count :] for count, rows in groups.items()}
    noted = None
    if call.update_cache and k.numel() > 0 and cache.wants_queries(call.layer):
        for part in parts.values():
            noted = Queries.of(part, cache.num_kv_heads, call.scale) + noted
    written = tokens if k.numel() else None  # queries alone bring no keys
    kept, partial = call.update_cache, call.partial
    with cache.writing(
        call.layer, k, v, call.sequences, queries=noted, keep=kept, tokens=written, partial=partial
    ) as view:
        if tokens is None:
            return _attend_to(q, k, view, call, sink_logits, head_importance)
        out = torch.zeros_like(q)
        for count, rows in groups.items():
            of_rows = replace(call, sequences=tuple(view.sequences[row] for row in rows), tokens=None)
            part = _attend_to(parts[count], k, _view_of_rows(view, rows), of_rows, sink_logits, head_importance)
            if len(rows) == len(q):
                out[:, :, columns - count :] = part
            else:
                out[_on_device(rows, q.device), :, columns - count :] = part
        return out


def _rows_of(tensor: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """Some of a batch; a view where they lie side by side."""
    if rows[-1] - rows[0] == len(rows) - 1:
        return tensor[rows[0] : rows[-1] + 1]
    return tensor[_on_device(rows, tensor.device)]


def _on_device(rows: list[int], device: torch.device) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int64, device="cpu").to(device, non_blocking=True)


def _view_of_rows(view: KVView, rows: list[int]) -> KVView:
    table = _rows_of(view.page_table.transpose(0, 1), rows).transpose(0, 1).contiguous()
    sequences = tuple(view.sequences[row] for row in rows)
    return KVView(view.cache, view.layer, sequences, table, _rows_of(view.lengths, rows))


def _attend_to(
    q: torch.Tensor,
    k: torch.Tensor,
    view: KVView,
    call: _Call,
    sink_logits: torch.Tensor | None,
    head_importance: torch.Tensor | None,
) -> torch.Tensor:
    retrieved = None
    if call.pages is not None and q.shape[2] == 1:
        # The host's lengths follow when the step is done.
        lengths = [view.cache.length(call.layer, row) + (k.numel() > 0) for row in view.sequences]
        retrieved = retrieve(q[:, :, 0], view, lengths, call.pages, call.scale, call.softcap)
    attend_by = _attend_by_kernel if view.cache.device.type == "cuda" else _attend_on_cpu
    return attend_by(q, view, call, sink_logits, head_importance, retrieved)


def _attend_by_kernel(
    q: torch.Tensor,
    view: KVView,
    call: _Call,
    sink_logits: torch.Tensor | None,
    head_importance: torch.Tensor | None,
    retrieved: Retrieved | None,
) -> torch.Tensor:
    cache = view.cache
    view = view if retrieved is None else retrieved.view
    pages: dict[str, Any] = {
        "pages": cache.pools.pages,
        "table": view.page_table,
        "lengths": view.lengths,
        "num_kv_heads": cache.num_kv_heads,
        "k_formats": cache.possible_formats(call.layer, Side.K),
        "v_formats": cache.possible_formats(call.layer, Side.V),
        "scale": call.scale,
        # To a kernel, 0 is no window. It adds to places in 32 bits: all that can be seen is enough.
        "window": 0 if call.window is None or call.window >= cache.max_tokens else call.window,
        "sinks": min(call.sinks, cache.max_tokens),
        "causal": call.causal,
        "softcap": call.softcap,
        "sink_logits": sink_logits,
        "key_order": cache.key_order,
    }
    longest_pages = cache.longest_pages(call.layer, q.shape[2]) if retrieved is None else view.page_table.shape[2]
    whole = call.observe and retrieved is None and cache.is_everything(view.sequences)
    observed = _new_observed(q, longest_pages, cache, call, head_importance, whole=whole) if call.observe else None
    observing = q[:, :, -_observing_tokens(q, cache) :]
    all_observe = observing.shape[2] == q.shape[2]
    if _is_split(q, cache):
        blocks = _decode_blocks(q, longest_pages, cache, call)
        out = attention_kernels.decode(q, **pages, blocks=blocks, observed=observed if all_observe else None)
    else:
        if cache.slots is not None:
            table = view.page_table[..., :longest_pages].contiguous()
            pages["table"], _staged = cache.slots.staged(table)  # held until the kernels are enqueued
        out = attention_kernels.prefill(q, **pages)
        all_observe = False
    if observed is not None and not all_observe:
        blocks = _decode_blocks(observing, longest_pages, cache, call)
        attention_kernels.decode(observing, **pages, blocks=blocks, observed=observed)
    if observed is not None and not whole:
        mass = observed.mass if retrieved is None else retrieved.by_index(observed.mass)
        cache.add_observed(call.layer, mass, observed.steps, call.sequences)
    return out


def _is_split(q: torch.Tensor, cache: KVCache) -> bool:
    """Whether pages are split over the GPU, instead of queries."""
    batch, heads, tokens, head_dim = q.shape
    columns = heads // cache.num_kv_heads * tokens
    if tokens == 1 or columns <= _DECODE_COLUMNS:
        return True
    blocks = ceil_div(columns, attention_kernels.prefill_shape(head_dim).columns) * cache.num_kv_heads * batch
    return columns <= _MOST_DECODE_COLUMNS and 2 * blocks <= device_limits(q.device).multiprocessors


def _observing_tokens(q: torch.Tensor, cache: KVCache) -> int:
    return max(1, _OBSERVING_COLUMNS * cache.num_kv_heads // q.shape[1])


def _new_observed(
    q: torch.Tensor,
    longest_pages: int,
    cache: KVCache,
    call: _Call,
    head_importance: torch.Tensor | None,
    *,
    whole: bool,
) -> Observed:
    """Where the kernel adds: to the cache itself, if the batch is the ``whole`` of it."""
    weights = None if head_importance is None else head_importance / q.shape[1]
    if whole:
        return Observed(cache.mass[call.layer], cache.observed_steps[call.layer], weights, longest_pages)
    mass = torch.zeros((len(q), cache.mass.shape[2]), dtype=torch.int64, device=q.device)
    return Observed(mass, torch.zeros(len(q), dtype=torch.int32, device=q.device), weights, longest_pages)


def _decode_blocks(q: torch.Tensor, pages: int, cache: KVCache, call: _Call) -> int:
    """For the longest sequence; in a CUDA graph, which may be replayed with longer ones, for the longest possible."""
    if call.window is not None:
        pages = min(pages, ceil_div(call.sinks, PAGE_TOKENS) + ceil_div(call.window + q.shape[2], PAGE_TOKENS) + 1)
    columns = q.shape[1] // cache.num_kv_heads * q.shape[2]
    return attention_kernels.decode_blocks(
        len(q),
        cache.num_kv_heads,
        ceil_div(columns, COLUMNS),
        pages,
        device_limits(q.device).multiprocessors,
        blocks_per_sm=attention_kernels.decode_blocks_per_sm(cache.head_dim),
    )


def _attend_on_cpu(
    q: torch.Tensor,
    view: KVView,
    call: _Call,
    sink_logits: torch.Tensor | None,
    head_importance: torch.Tensor | None,
    retrieved: Retrieved | None,
) -> torch.Tensor:
    """Sequences of about the same length together: none is padded to twice its length or more."""
    view = view if retrieved is None else retrieved.view
    lengths: dict[int, list[int]] = {}
    for row, length in enumerate(view.lengths.tolist()):
        lengths.setdefault(length.bit_length(), []).append(row)
    out, few = torch.empty_like(q), _observing_tokens(q, view.cache)
    shape = (*q.shape[:2], view.page_table.shape[2])
    mass = torch.zeros(shape, dtype=torch.float32, device=q.device) if call.observe else None
    with torch.autocast("cpu", enabled=False):
        for rows in lengths.values():
            of_rows = torch.tensor(rows, dtype=torch.int64, device=q.device)
            q32 = q[of_rows].float()
            k, v, seen = _dequantized(view, of_rows, q.shape[2], call)
            if mass is not None:
                found = _observed_mass(q32[:, :, -few:], k, seen[:, -few:], call, sink_logits)
                mass[of_rows, :, : found.shape[2]] = found
            out[of_rows] = _masked_attention(q32, k, v, seen, call, sink_logits).to(q.dtype)
    if mass is not None:
        mass = mass if retrieved is None else retrieved.by_index(mass)
        view.cache.observe(call.layer, mass, call.sequences, head_importance)
    return out


def _dequantized(
    view: KVView, rows: torch.Tensor, tokens: int, call: _Call
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of some of a view's sequences: k and v, fp32 [rows, KV heads, places, head_dim], and what each of the last
    tokens sees, [rows, tokens, places]."""
    cache, lengths = view.cache, view.lengths[rows]
    longest = int(lengths.max())
    k, v = (
        read_tokens(
            view.page_table[side, rows],
            side,
            torch.zeros_like(lengths),
            lengths,
            longest,
            cache.head_dim,
            cache.num_kv_heads,
            torch.float32,
            cache.status,
            cache.pools.pages,
            cache.key_order,
        )
        for side in Side
    )
    place = torch.arange(longest, device="cpu")
    # [rows, tokens]: how many tokens each one sees.
    behind = (
        torch.arange(1 - tokens, 1, device="cpu")
        if call.causal
        else torch.zeros(tokens, dtype=torch.int64, device="cpu")
    )
    limit = lengths[:, None] + behind
    seen = place < limit[..., None]
    if call.window is not None:
        seen &= (place + call.window >= limit[..., None]) | (place < call.sinks)
    return k, v, seen


def _masked_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seen: torch.Tensor,
    call: _Call,
    sink_logits: torch.Tensor | None,
) -> torch.Tensor:
    """fp32 attention in which what a query does not see cannot reach it, not even what is no number.

    q [batch, heads, tokens, head_dim], k and v [batch, KV heads, places, head_dim], seen [batch, tokens, places].
    """
    # [batch, KV heads, places]; a mask is added to scores, so that those that overflow are as bad.
    most = float(q.abs().nan_to_num(0, 0, 0).amax()) * q.shape[-1] * max(call.scale, 1.0)
    finite = (k.abs().amax(-1) * most).isfinite() & v.isfinite().all(-1)
    finite_k, finite_v = (x.masked_fill(~finite[..., None], 0) for x in (k, v))
    plain = call.softcap is None and sink_logits is None
    if plain:
        out = torch.nn.functional.scaled_dot_product_attention(
            q,
            finite_k,
            finite_v,
            attn_mask=seen[:, None],
            scale=call.scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
    else:
        out = _weighted_values(q, finite_k, finite_v, seen, call, sink_logits)
    if finite.all():
        return out
    # 0 · NaN is NaN, and so is inf − inf: who sees such a place is computed from what it sees alone.
    group = q.shape[1] // k.shape[1]
    for row, head, token in (seen[:, None] & ~finite[:, :, None]).any(-1).nonzero().tolist():
        at, heads = seen[row, token], slice(head * group, (head + 1) * group)
        of_heads, seen_k, seen_v = q[row, heads, token], k[row, head, at], v[row, head, at]
        if plain:
            out[row, heads, token] = torch.nn.functional.scaled_dot_product_attention(
                of_heads, seen_k, seen_v, scale=call.scale
            )
        else:
            of_group = None if sink_logits is None else sink_logits[heads]
            found = _weighted_values(
                of_heads[None, :, None], seen_k[None, None], seen_v[None, None], at[at][None, None], call, of_group
            )
            out[row, heads, token] = found[0, :, 0]
    return out


def _weighted_values(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seen: torch.Tensor,
    call: _Call,
    sink_logits: torch.Tensor | None,
) -> torch.Tensor:
    """Attention with what torch's has not: :func:`_probabilities` times v, some tokens at a time."""
    out = torch.empty_like(q)
    step = max(1, _CPU_SCORES // (q.shape[0] * q.shape[1] * k.shape[2]))
    for first in range(0, q.shape[2], step):
        part = slice(first, first + step)
        p = _probabilities(q[:, :, part], k, seen[:, part], call, sink_logits)
        out[:, :, part] = torch.einsum("bhgtp,bhpd->bhgtd", p.unflatten(1, (k.shape[1], -1)), v).flatten(1, 2)
    return out


def _probabilities(
    q: torch.Tensor, k: torch.Tensor, seen: torch.Tensor, call: _Call, sink_logits: torch.Tensor | None
) -> torch.Tensor:
    """[batch, heads, tokens, places], of q [batch, heads, tokens, head_dim], k [batch, KV heads, places, head_dim] and
    seen [batch, tokens, places]. What is not seen has 0."""
    grouped = q.unflatten(1, (k.shape[1], -1))
    scores = torch.einsum("bhgtd,bhpd->bhgtp", grouped, k).flatten(1, 2) * call.scale
    if call.softcap is not None:
        scores = (scores / call.softcap).tanh() * call.softcap
    scores = scores.masked_fill(~seen[:, None], -math.inf)
    if sink_logits is not None:
        scores = torch.cat([scores, sink_logits[:, None, None].expand(*scores.shape[:3], 1)], -1)
    # The softmax of a row that sees nothing is NaN.
    return scores.softmax(-1)[..., : k.shape[2]].masked_fill(~seen[:, None], 0)


def _observed_mass(
    q: torch.Tensor, k: torch.Tensor, seen: torch.Tensor, call: _Call, sink_logits: torch.Tensor | None
) -> torch.Tensor:
    """[batch, heads, pages], the mean over tokens of what :func:`_probabilities` gives."""
    p = _probabilities(q, k, seen, call, sink_logits)
    rest = -p.shape[-1] % PAGE_TOKENS
    by_page = torch.nn.functional.pad(p, (0, rest)).unflatten(-1, (-1, PAGE_TOKENS)).sum(-1)
    return by_page.mean(2)


def _operator(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sink_logits: torch.Tensor | None,
    head_importance: torch.Tensor | None,
    calls: torch.Tensor,
    cache: int,
    layer: int,
    sequences: list[int] | None,
    tokens: list[int] | None,
    cached_tokens: list[int] | None,
    scale: float,
    window: int | None,
    sinks: int,
    softcap: float | None,
    causal: bool,
    update_cache: bool,
    observe: bool,
    chunk_tokens: int | None,
    partial: bool,
    pages: int | None,
) -> torch.Tensor:
    named = None if sequences is None else tuple(sequences)
    counts = None if tokens is None else tuple(tokens)
    cached = None if cached_tokens is None else tuple(cached_tokens)
    cuts = chunk_tokens, partial
    call = _Call(
        layer, named, counts, cached, scale, window, sinks, softcap, causal, update_cache, observe, *cuts, pages
    )
    _check(q, k, v, cache_of(cache), call)
    _check_sink_logits(sink_logits, q)
    return _attend_in_chunks(q, k, v, cache_of(cache), call, sink_logits, head_importance, None).contiguous()


_LIBRARY = torch.library.Library("kvpack", "FRAGMENT")
# The cache is found by its number. That the operator changes it is told by `calls`: declared as changed are neither
# lengths nor tables, of which a compiler might hand over copies, to be copied back afterwards.
_LIBRARY.define(
    "attention_with_kv_cache(Tensor q, Tensor k, Tensor v, Tensor? sink_logits, Tensor? head_importance, "
    "Tensor(a!) calls, SymInt cache, SymInt layer, SymInt[]? sequences, SymInt[]? tokens, SymInt[]? cached_tokens, "
    "float scale, int? window, int sinks, float? softcap, bool causal, bool update_cache, bool observe, "
    "int? chunk_tokens, bool partial, int? pages) -> Tensor",
    tags=(torch.Tag.cudagraph_unsafe,),
)
_LIBRARY.impl("attention_with_kv_cache", _operator, "CompositeExplicitAutograd")


@torch.library.register_fake("kvpack::attention_with_kv_cache", lib=_LIBRARY)
def _(q: torch.Tensor, *_: object) -> torch.Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)
