"""A long prompt into a cache, in pieces that fit into memory, before ``generate`` is called.

::

    cache = KVPackCache(model.config, formats="INT4")
    prefill(model, ids, cache, progress=lambda done, total: print(f"{done} of {total}"))
    model.generate(ids, cache=cache)  # reads the last token alone

A forward pass over all of a prompt of 200,000 tokens has activations of 200,000 tokens. Here it takes some hundred
tokens at a time, as many as free memory allows, which changes the time and not the result: pages are quantized where
cells of 2,048 tokens end (:mod:`kvpack.runtime.kv.steps`), and no pass goes over the end of one.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch

from kvpack.errors import CacheInputError, KvpackError
from kvpack.integrations.transformers.cache import KVPackCache, cache_keyword, forward_parameters
from kvpack.integrations.transformers.contexts import TokenIds, token_rows
from kvpack.runtime.device.devices import free_bytes
from kvpack.runtime.kv.steps import CELL_TOKENS

# Fewer have the launches of many for the work of few; more would go over the end of a cell.
_LEAST_TOKENS, _MOST_TOKENS = 64, CELL_TOKENS
# Of free memory, that activations may take: pages grow beside them, and allocators split blocks.
_SHARE_OF_FREE = 0.25
# Of the hidden and the intermediate size, how many are held at once for a token: residuals, norms in fp32, an MLP.
_HIDDEN_TENSORS, _INTERMEDIATE_TENSORS = 16, 4


class Prefilled(NamedTuple):
    """What :func:`prefill` has done.

    Attributes:
        reused: columns that the cache held already.
        read: columns that the model has read; with those reused all but the prompt's last one.
        chunk_tokens: the most columns of a forward pass; 0 if there was none.
    """

    reused: int
    read: int
    chunk_tokens: int


@torch.no_grad()
def prefill(
    model: Any,
    ids: TokenIds,
    cache: KVPackCache,
    *,
    attention_mask: torch.Tensor | None = None,
    chunk_tokens: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Prefilled:
    """Have a model read a prompt up to its last token, which ``generate`` reads, since its logits are needed.

    What the cache holds of the prompt is kept (:meth:`KVPackCache.reuse`), so that a second call goes on where a first
    one was ended.

    Args:
        model: causal, with ``attn_implementation="kvpack"``.
        ids: [rows, columns], or [columns] of a single row, as ``generate`` takes it.
        attention_mask: [rows, columns], 0 where they are pads. None: there are none.
        chunk_tokens: of a forward pass, at most. None: 2,048, or fewer where memory for activations is short, chosen
            anew before each pass; one that runs out of a GPU's memory is done again with half as many. The result is
            the same, but for rounding: sums over other shapes.
        progress: called behind each pass with how many columns are done, and how many there are to do. What it raises
            ends the call. The cache then holds whole passes, ``cache.get_seq_length()`` columns, and is right.

    Returns:
        How much was read.

    Raises:
        CacheInputError: no KVPackCache that the model's attention reads; wrong ids, mask or chunk_tokens; pads under a
            budget, which is divided by what attention looks at in passes; pads, for a model without ``position_ids``.
        CacheFullError: no room for more tokens; the cache holds those before.
        KeyboardInterrupt: Ctrl-C, behind the pass that is running; at once, when it comes twice.

    >>> import torch, transformers
    >>> from kvpack import KVPackCache
    >>> from kvpack.integrations.transformers.prefill import prefill
    >>> config = transformers.LlamaConfig(vocab_size=99, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
    ...     num_attention_heads=4, num_key_value_heads=2)
    >>> model = transformers.LlamaForCausalLM(config).half().eval()
    >>> model.set_attn_implementation("kvpack")
    >>> cache, ids = KVPackCache(model.config, formats="INT4"), torch.arange(3, 90)[None]
    >>> prefill(model, ids, cache, chunk_tokens=50, progress=print)
    36 86
    86 86
    Prefilled(reused=0, read=86, chunk_tokens=50)
    """
    if not isinstance(cache, KVPackCache) or cache.is_read_elsewhere():
        raise CacheInputError(
            "prefill() fills a KVPackCache that the model's attention reads: make one with KVPackCache(model.config, "
            "…), and call model.set_attn_implementation('kvpack')"
        )
    if chunk_tokens is not None and (not isinstance(chunk_tokens, int) or chunk_tokens < 1):
        raise CacheInputError(f"chunk_tokens is {chunk_tokens!r}; it must be at least 1, or None")
    rows = torch.from_numpy(token_rows(ids)).long()
    if not rows.numel():
        raise CacheInputError(f"ids have shape {list(rows.shape)}: there is no token to read")
    options = _padding(model, cache, rows, attention_mask)
    keyword, total = cache_keyword(model), rows.shape[1] - 1
    kept = {"logits_to_keep": 1} if "logits_to_keep" in forward_parameters(model) else {}
    device = model.get_input_embeddings().weight.device
    rows = rows.to(device)
    reused = done = cache.reuse(rows)
    most = chunk_tokens or _MOST_TOKENS
    longest = 0
    with cache.partial_prompt(), _interrupts_between_passes() as raise_interrupt:
        while done < total:
            tokens = most if chunk_tokens is not None else min(most, _fitting_tokens(model, len(rows), total, device))
            end = _pass_end(done, total, tokens)
            given = {name: value[:, done:end] for name, value in options.items()}
            if "attention_mask" in options:
                given["attention_mask"] = options["attention_mask"][:, :end]
            try:
                model(input_ids=rows[:, done:end], use_cache=True, **{keyword: cache}, **kept, **given)
            except BaseException as error:
                # A second failure must not hide the first.
                with suppress(KvpackError):
                    cache.take_back(done)
                if not isinstance(error, torch.OutOfMemoryError) or end - done <= _LEAST_TOKENS:
                    raise
                most = max((end - done) // 2, _LEAST_TOKENS)
                torch.cuda.empty_cache()
                continue
            longest, done = max(longest, end - done), end
            raise_interrupt()
            if progress is not None:
                progress(done, total)
    return Prefilled(reused, total - reused, longest)


def _padding(
    model: Any, cache: KVPackCache, rows: torch.Tensor, attention_mask: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """What a model is given beside ids where there are pads: nothing without.

    Raises:
        CacheInputError
    """
    if attention_mask is None:
        return {}
    if attention_mask.shape != rows.shape:
        raise CacheInputError(f"attention_mask has shape {list(attention_mask.shape)}, ids {list(rows.shape)}")
    mask = attention_mask.long()
    if bool(mask.all()):
        return {}
    if cache.observes:
        raise CacheInputError(
            "ids have pads, and the cache a budget, which is divided by what attention looks at in passes: prefill one "
            "row at a time, or use formats"
        )
    if "position_ids" not in forward_parameters(model):
        raise CacheInputError(
            f"ids have pads, and {type(model).__name__} takes no position_ids: prefill one row at a time"
        )
    return {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


def _pass_end(done: int, total: int, tokens: int) -> int:
    """Where the next pass ends: within a cell, whose shorter piece comes first, so that its last tokens are in one."""
    left = min(total, (done // CELL_TOKENS + 1) * CELL_TOKENS) - done
    return done + (left % tokens or min(left, tokens))


def _fitting_tokens(model: Any, rows: int, columns: int, device: torch.device) -> int:
    """How many columns a pass can have, as free memory says: a power of two."""
    free = free_bytes(device)
    if free is None:
        return _MOST_TOKENS
    of_column = rows * activation_bytes(model)
    if device.type == "cpu":
        of_column += 5 * rows * columns  # attention there has a mask
    tokens = _MOST_TOKENS
    while tokens > _LEAST_TOKENS and tokens * of_column > _SHARE_OF_FREE * free:
        tokens //= 2
    return tokens


def activation_bytes(model: Any) -> int:
    """About what a model needs for a token of a forward pass, of which the logits of the last token alone are kept."""
    config = model.config.get_text_config(decoder=True)
    hidden = int(getattr(config, "hidden_size", 0) or getattr(config, "n_embd", 0))
    sizes = [getattr(config, name, None) for name in ("intermediate_size", "n_inner", "ffn_dim")]
    of_expert, experts = getattr(config, "moe_intermediate_size", None), getattr(config, "num_experts_per_tok", None)
    if isinstance(of_expert, int) and isinstance(experts, int):
        sizes.append(of_expert * experts)
    intermediate = max((size for size in sizes if isinstance(size, int)), default=4 * hidden)
    width = torch.empty(0, dtype=model.dtype).element_size()
    return width * (_HIDDEN_TENSORS * hidden + _INTERMEDIATE_TENSORS * intermediate)


@contextmanager
def _interrupts_between_passes() -> Iterator[Callable[[], None]]:
    """Ctrl-C ends a pass that is running at its end, where the function that this gives is called. A second one ends it
    at once. Where somebody else handles signals, or in another thread, nothing is changed."""
    is_ours = threading.current_thread() is threading.main_thread()
    if not is_ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield lambda: None
        return
    has_come = False

    def note(number: int, frame: Any) -> None:
        nonlocal has_come
        if has_come:
            signal.default_int_handler(number, frame)
        has_come = True

    def raise_interrupt() -> None:
        if has_come:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, note)
    try:
        yield raise_interrupt
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
