"""The order in which vLLM's attention for CPUs keeps a block's keys and values: another for each kind of processor.

Keys lie as its products want them (transposed, in pairs, …). That is not written down anywhere, so the order is seen by
what vLLM's own operator makes of numbers that say which token and which dimension they are of.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from kvpack.errors import InputError

# (key, value, cache of K, cache of V, slots): vLLM's operator.
Write = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]
_DIGIT = 16  # two digits of tokens and dimensions, each exact in bf16


def vllm_write(dtype: torch.dtype, block_tokens: int, head_dim: int) -> Write:
    """vLLM's operator that writes tokens to a cache, as it is for such blocks on this processor."""
    from vllm import _custom_ops
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    isa = _get_attn_isa(dtype, block_tokens, head_dim)
    return lambda *arguments: _custom_ops.cpu_attn_reshape_and_cache(*arguments, isa)


def block_places(write: Write, dtype: torch.dtype, block_tokens: int, head_dim: int) -> torch.Tensor:
    """Where among the elements of a block's head each of a token's is: i64 [block_tokens, 2·head_dim], K before V.

    Raises:
        InputError: elements are not kept as they are, each at a place of its own.
    """
    token = torch.arange(block_tokens)[:, None].expand(-1, head_dim)
    dim = torch.arange(head_dim)[None].expand(block_tokens, -1)
    places = torch.empty((block_tokens, 2, head_dim), dtype=torch.int64)
    for side in range(2):
        # Digits are counted from 1; what is zero afterwards is of the other side.
        found = [
            _written(write, (digit + 1).to(dtype), side, block_tokens, head_dim).long() - 1
            for digit in (token // _DIGIT, token % _DIGIT, dim // _DIGIT, dim % _DIGIT)
        ]
        at = torch.nonzero(found[0] >= 0).flatten()
        token_at, dim_at = (_DIGIT * found[i][at] + found[i + 1][at] for i in (0, 2))
        if len(at) != block_tokens * head_dim or not (token_at >= 0).all() or not (token_at < block_tokens).all():
            raise InputError(_refusal(block_tokens, head_dim))
        places[token_at, side, dim_at] = at
    places = places.flatten(1)
    if not torch.equal(places.flatten().sort().values, torch.arange(2 * block_tokens * head_dim)):
        raise InputError(_refusal(block_tokens, head_dim))
    return places


def _written(write: Write, numbers: torch.Tensor, side: int, block_tokens: int, head_dim: int) -> torch.Tensor:
    """All elements of a block, of one head, to which these numbers were written as K (0) or V (1)."""
    cache = torch.zeros((1, 1, 2 * block_tokens, head_dim), dtype=numbers.dtype)
    given = [torch.zeros_like(numbers), torch.zeros_like(numbers)]
    given[side] = numbers
    k, v = (one[:, None].contiguous() for one in given)
    k_cache, v_cache = cache.chunk(2, dim=2)
    write(k, v, k_cache, v_cache, torch.arange(block_tokens))
    return cache.flatten()


def _refusal(block_tokens: int, head_dim: int) -> str:
    return (
        f"vLLM's attention keeps blocks of {block_tokens} tokens of {head_dim} dimensions in an order that is not "
        "understood: KVPackConnector cannot take single tokens out of them"
    )
