"""Text of a causal language model's own: tokens drawn from what it says, at temperature 1.

A window begins with the token that stands before texts, or, where the model has none, with any one. Every second window
of a chat model begins as its template begins a conversation, up to where the user speaks. So the model writes both
sides. An end token is a token like others: what a model writes behind it comes next.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers

from kvpack.integrations.transformers.cache import cache_keyword
from kvpack.integrations.transformers.evaluation import tokens_before_text
from kvpack.integrations.transformers.text_generation import opened_chat

# Windows that are written side by side.
ROWS = 32
# Probabilities are taken to fp64 so many at a time.
_CHUNK_BYTES = 1 << 25


def uniform(count: int, *names: object) -> torch.Tensor:
    """Random numbers that names give, the same on each machine: fp64 [count] in 0 … 1."""
    digest = hashlib.sha256(" ".join(map(str, names)).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    return torch.rand(count, dtype=torch.float64, generator=generator)


def draw(logits: torch.Tensor, at: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens by their probabilities.

    Args:
        logits: [rows, vocabulary].
        at: fp64 [rows] in 0 … 1: where in the distribution.

    Returns:
        i64 [rows] tokens, and fp64 [rows, vocabulary] probabilities.
    """
    share = logits.double().softmax(-1)
    summed = share.cumsum(-1)
    tokens = torch.searchsorted(summed, at[:, None].to(logits.device) * summed[:, -1:])
    return tokens[:, 0].clamp_(max=logits.shape[-1] - 1), share


def label_gradient(logits: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """d loss / d logits of loss = Σ −log p(label), with labels that are drawn from the logits' own distribution.

    Args:
        logits: [rows, vocabulary].
        at: fp64 [rows] in 0 … 1.

    Returns:
        [rows, vocabulary], in the logits' type.
    """
    gradient = torch.empty_like(logits)
    step = max(1, _CHUNK_BYTES // (8 * logits.shape[-1]))
    for begin in range(0, len(logits), step):
        part = slice(begin, begin + step)
        labels, share = draw(logits[part], at[part])
        share.scatter_add_(-1, labels[:, None], torch.full_like(share[:, :1], -1.0))
        gradient[part] = share.to(gradient.dtype)
    return gradient


def starts(tokenizer: Any, config: Any) -> list[list[int]]:
    """How windows begin, in turn; none: with any token."""
    found = tokens_before_text(tokenizer)
    for of_model in (tokenizer.bos_token_id, config.get_text_config().bos_token_id):
        if not found and isinstance(of_model, int):
            found = [of_model]
    chat = opened_chat(tokenizer)
    opened = [] if chat is None else tokenizer(chat, add_special_tokens=False).input_ids
    return [start for start in (found, opened) if start]


def any_tokens(model: Any, tokens: int) -> torch.Tensor:
    """Two windows of tokens of no meaning, i64 [2, tokens]."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    return (uniform(2 * tokens, "any") * vocabulary).long().view(2, tokens)


@torch.no_grad()
def write_windows(
    model: Any, begins: Sequence[Sequence[int]], tokens: int, seed: str, on_tokens: Callable[[int], None]
) -> torch.Tensor:
    """Windows side by side, i64 [windows, tokens].

    Args:
        model: whole, on its device.
        begins: the first tokens of each window; all that are empty begin with any one.
        on_tokens: told how many have been written.
    """
    rows, vocabulary = len(begins), model.get_input_embeddings().weight.shape[0]
    ids = torch.empty((rows, tokens), dtype=torch.int64)
    cache = transformers.DynamicCache(config=model.config)
    keyword = cache_keyword(model)
    drawn = (uniform(rows, "first", seed) * vocabulary).long()
    for position in range(tokens):
        for row, begin in enumerate(begins):
            ids[row, position] = begin[position] if position < len(begin) else drawn[row]
        on_tokens(rows)
        if position + 1 < tokens:
            given = {"input_ids": ids[:, position : position + 1].to(model.device), keyword: cache, "use_cache": True}
            logits = model(**given).logits[:, -1]
            drawn = draw(logits, uniform(rows, "next", seed, position))[0].cpu()
    return ids
