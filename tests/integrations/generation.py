"""What tests of caches share."""

from __future__ import annotations

from typing import Any

import torch
from packaging.version import Version
from transformers import __version__

# By what name forward and generate take a cache.
CACHE_ARGUMENT = "cache" if Version(__version__) >= Version("5.24") else "past_key_values"


def greedy(model: Any, ids: torch.Tensor, cache: Any = None, new_tokens: int = 16, **options: Any) -> torch.Tensor:
    """The prompt's tokens and ``new_tokens`` behind them, the most probable ones; [rows, tokens]."""
    given = {} if cache is None else {CACHE_ARGUMENT: cache}
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": new_tokens} | options
    found: torch.Tensor = model.generate(ids, **given, **options)
    return found


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor, cache: Any = None, **options: Any) -> torch.Tensor:
    """[rows, tokens, vocabulary], fp32."""
    given = {} if cache is None else {CACHE_ARGUMENT: cache, "use_cache": True}
    found: torch.Tensor = model(input_ids=ids, **given, **options).logits.float()
    return found
