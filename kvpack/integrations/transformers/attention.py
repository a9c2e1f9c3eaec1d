"""The attention function and the mask function that transformers knows as "kvpack".

For a :class:`~kvpack.integrations.transformers.cache.KVPackCache` attention reads pages in place. For any other cache,
or none, it is what ``sdpa`` is, and ``eager`` where a model wants a soft cap or sinks, which ``sdpa`` does not have.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from kvpack.errors import CacheInputError
from kvpack.integrations.transformers.cache import (
    ColumnCount,
    KVPackLayer,
    Mask,
    in_pages_dtype,
    take_announced_mask,
)
from kvpack.runtime.kv.attention import attention_with_kv_cache
from kvpack.runtime.kv.cache import KVCache

# What attention functions of models are given, that kvpack's attention does not do.
_REFUSED = ("position_bias", "indices", "head_mask")
# A window that a compiler cannot look for in the mask function: the attention function is told.
_SOME_WINDOW = -1


class _Seen(NamedTuple):
    """What a mask says, on the host; the tensor that goes through the model carries it as the attribute kvpack_seen.

    Attributes:
        tokens: [rows, new columns]: which ones are tokens; None: all.
        window: tokens that each one sees, itself included; None: all.
    """

    tokens: Mask | None
    window: int | None


class _Carrier(torch.Tensor):
    """An empty mask with what was seen. accelerate sends it to each layer's device; an empty one may lie anywhere."""

    kvpack_seen: _Seen

    def to(self, *args: Any, **kwargs: Any) -> _Carrier:  # type: ignore[override]
        return self


def mask_for_kvpack(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """transformers' mask function: for a KVPackCache nothing, or what :class:`_Seen` says; else a mask for ``sdpa``.

    Raises:
        CacheInputError: for a KVPackCache, a mask that is not causal, or forbids what the cache holds.
    """
    columns = kwargs.get("kv_length")
    # Also where a compiler has given up between cache and mask: what was announced must not wait for another cache's.
    announced = take_announced_mask()
    if announced and (torch.compiler.is_compiling() or kwargs.get("attention_mask") is not None):
        return _traced_mask(kwargs)
    if not isinstance(columns, ColumnCount):
        return sdpa_mask(*args, **kwargs)
    window = _window(kwargs.get("mask_function", causal_mask_function))
    mask, new = kwargs.get("attention_mask"), int(kwargs["q_length"])
    tokens = None
    if mask is not None:
        if mask.dim() != 2 or mask.shape[1] != columns:
            raise CacheInputError(
                f"attention_mask has shape {list(mask.shape)}; [rows, {int(columns)}] is wanted, of the tokens before "
                f"({columns - new}) and of the new ones"
            )
        on_host = mask.cpu().numpy().astype(np.bool_)
        columns.cache.check_columns(on_host, columns - new)
        tokens = on_host[:, columns - new :]
        tokens = None if tokens.all() else tokens
    if tokens is None and window is None:
        return None
    carrier = torch.empty(0, dtype=torch.bool, device=kwargs.get("device", "cpu")).as_subclass(_Carrier)
    carrier.kvpack_seen = _Seen(tokens, window)
    return carrier


def _traced_mask(kwargs: dict[str, Any]) -> torch.Tensor | None:
    """In what a compiler traces, nothing can be known of a mask's values."""
    if kwargs.get("attention_mask") is not None:
        raise CacheInputError(
            "under torch.compile a KVPackCache takes no attention_mask: leave it out if nothing is padded"
        )
    if kwargs.get("mask_function", causal_mask_function) is causal_mask_function:
        return None
    carrier = torch.empty(0, dtype=torch.bool, device=kwargs.get("device", "cpu"))
    carrier.kvpack_seen = _Seen(None, _SOME_WINDOW)  # type: ignore[attr-defined]
    return carrier


def _window(mask_function: Callable[..., Any]) -> int | None:
    """Of a mask function that is causal, with a sliding window or without; None without.

    Raises:
        CacheInputError: it is something else.
    """
    if mask_function is causal_mask_function:
        return None
    parts = _closure(mask_function).get("mask_functions", ())
    if len(parts) == 2 and causal_mask_function in parts:
        (other,) = (part for part in parts if part is not causal_mask_function)
        window = _closure(other).get("sliding_window")
        if getattr(other, "__qualname__", "").startswith("sliding_window_overlay.") and isinstance(window, int):
            return window
    raise CacheInputError(
        f"this model's mask is not causal, with or without a sliding window ({mask_function.__qualname__}); kvpack's "
        "attention has no other: use another cache"
    )


def _closure(function: Callable[..., Any]) -> dict[str, Any]:
    cells = getattr(function, "__closure__", None) or ()
    return dict(zip(function.__code__.co_freevars, (cell.cell_contents for cell in cells), strict=True))


def attention_for_kvpack(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """transformers' attention function.

    Args:
        query: [rows, query heads, tokens, head_dim]; key, value: [rows, KV heads, …, head_dim].
        attention_mask: as of :func:`mask_for_kvpack`.

    Returns:
        [rows, tokens, query heads, head_dim], like query; and None, in place of probabilities.

    Raises:
        CacheInputError: for a KVPackCache, attention that kvpack does not do.
    """
    layer = kwargs.pop("kvpack_layer", None) or getattr(key, "kvpack_layer", None)
    seen = getattr(attention_mask, "kvpack_seen", None)
    if layer is None:
        if seen is not None:
            raise CacheInputError(
                f"{type(module).__name__} hides from its attention function what the cache has returned; KVPackCache "
                "does not work with this model: use another cache"
            )
        options = {"scaling": scaling, "dropout": dropout, "sliding_window": sliding_window, "is_causal": is_causal}
        return _attention_elsewhere(module, query, key, value, attention_mask, options | kwargs)
    layer.take_pending(key, value)
    if layer.index == 0:
        layer.cache.check_layers(getattr(module, "config", None))
    for name in _REFUSED:
        if kwargs.get(name) is not None:
            raise CacheInputError(f"{type(module).__name__} asks for {name}, which kvpack's attention does not have")
    if not _is_causal(module, is_causal):
        raise CacheInputError(f"{type(module).__name__} is not causal; kvpack's attention to a cache is")
    if kwargs.get("output_attentions"):
        raise CacheInputError(
            "output_attentions: kvpack's attention keeps no probabilities; attn_implementation='eager' does, with any "
            "other cache"
        )
    if dropout:
        raise CacheInputError("kvpack's attention to a cache has no dropout: call model.eval()")
    if attention_mask is not None and seen is None:
        raise CacheInputError(
            f"attention_mask has shape {list(attention_mask.shape)}; with KVPackCache give the model a mask of shape "
            "[rows, columns], or none"
        )
    tokens, window = (None, sliding_window) if seen is None else seen
    if window == _SOME_WINDOW:
        if sliding_window is None:
            raise CacheInputError(
                f"{type(module).__name__} has no window, and its mask is not causal alone, which torch.compile cannot "
                "look into: call the model without it, or use another cache"
            )
        window = sliding_window
    if window != sliding_window and (sliding_window is not None or torch.compiler.is_compiling()):
        raise CacheInputError(
            f"{type(module).__name__} asks for a window of {sliding_window} tokens, its mask for one of {window}"
        )
    scores = {"scale": scaling, "softcap": kwargs.get("softcap"), "sink_logits": kwargs.get("s_aux")}
    out = _attend(layer, query, key, value, tokens, {"window": window, **scores})
    return out.transpose(1, 2).contiguous(), None


def _is_causal(module: torch.nn.Module, given: bool | None) -> bool:
    return bool(getattr(module, "is_causal", True) if given is None else given)


def _attend(
    layer: KVPackLayer,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    tokens: Mask | None,
    options: dict[str, Any],
) -> torch.Tensor:
    cache, kv = layer.cache, layer.kv
    assert kv is not None
    before, new = layer.columns, query.shape[2]
    is_first = layer.index == 0 and not torch.compiler.is_compiling()
    if is_first:
        cache.begin_step(len(query), before)
    q, k, v = (in_pages_dtype(kv, states, is_prompt=before == 0) for states in (query, key, value))
    of_cache: dict[str, Any] = {
        "sequences": cache.sequences,
        "observe": cache.observes,
        "partial": cache.is_partial,
        "pages": cache.pages if options["window"] is None else None,
    }
    options = {"layer": layer.kv_layer, **of_cache, **options}
    if tokens is None:
        out, _ = attention_with_kv_cache(q, k, v, kv, **options)
    else:
        out = _attend_to_tokens(kv, q, k, v, tokens, options)
    # Not before: what fails in the first layer has changed nothing.
    if is_first:
        cache.add_columns(before, new, tokens)
    layer.columns = before + new
    return out.to(query.dtype)


def _attend_to_tokens(
    kv: KVCache, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tokens: Mask, options: dict[str, Any]
) -> torch.Tensor:
    """Zeros where there are no tokens."""
    counts = tokens.sum(axis=1).tolist()
    # Each row's tokens behind its pads, as they are with padding on the left.
    order = np.argsort(tokens, axis=1, kind="stable")
    if (order == np.arange(tokens.shape[1])).all():
        return attention_with_kv_cache(q, k, v, kv, tokens=counts, **options)[0]
    columns = torch.from_numpy(order).to(q.device)[:, None, :, None]
    q, k, v = (states.gather(2, columns.expand_as(states)) for states in (q, k, v))
    found, _ = attention_with_kv_cache(q, k, v, kv, tokens=counts, **options)
    return torch.zeros_like(found).scatter_(2, columns.expand_as(found), found)


def _attention_elsewhere(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    options: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """For any other cache, or none; the mask is one for ``sdpa``."""
    if options.get("softcap") is None and options.get("s_aux") is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if eager is None:
        raise CacheInputError(
            f"{type(module).__name__} asks for a soft cap or sinks, and its module has no eager attention: use another "
            "attn_implementation"
        )
    is_causal = _is_causal(module, options["is_causal"])
    mask = _added_to_scores(attention_mask, query, key, is_causal=is_causal)
    return eager(module, query, key, value, mask, **options)


def _added_to_scores(
    mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor, *, is_causal: bool
) -> torch.Tensor | None:
    """A mask for ``sdpa`` as one for ``eager``, to which None is no mask at all."""
    new, columns = query.shape[2], key.shape[2]
    if mask is None:
        if new == 1 or not is_causal:
            return None
        mask = torch.ones((new, columns), dtype=torch.bool, device=query.device).tril()[None, None]
    if mask.dtype != torch.bool:
        return mask
    least = torch.finfo(query.dtype).min
    return torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill(~mask, least)
