"""Keys and values that real models are known to have, and books-27m and SmolLM2 have not (``kv_quantizers.py``).

bias          keys with a bias of norm 921 in slowly rotating dimensions, as of Qwen2.5-7B
beyond-fp16   bf16 keys of which a dimension lies at 98304, beyond fp16's range
one-element   values of which one element is 1 in each token, and all others 0
around-10     keys and values around 10 with a deviation of 0.1
channel       values of which a channel lies at 20, others around 0 with a deviation of 1
aligned       two keys along the query, one twice as large: attention is all on that one
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from kv_quantizer_schemes import Recording

TOKENS, HEAD_DIM, KV_HEADS, HEADS, QUERIES = 1024, 128, 2, 4, 64
_ROPE_BASE = 1e6


def _rotated(x: torch.Tensor, first: int = 0) -> torch.Tensor:
    """[…, tokens, head_dim] at positions from ``first`` on."""
    positions = torch.arange(first, first + x.shape[-2], dtype=torch.float64)
    angle = positions[:, None] * _ROPE_BASE ** (-torch.arange(0, HEAD_DIM, 2, dtype=torch.float64) / HEAD_DIM)
    a, b = x.double().chunk(2, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


class _Gaussian:
    """Keys, values and queries without any trait; cases put theirs in."""

    def __init__(self) -> None:
        self.random = torch.Generator().manual_seed(0)
        self.k, self.v = self.normal(KV_HEADS, TOKENS), self.normal(KV_HEADS, TOKENS)
        self.q = self.normal(HEADS, QUERIES)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, HEAD_DIM, generator=self.random, dtype=torch.float64)

    def signs(self, *shape: int) -> torch.Tensor:
        return torch.randint(0, 2, shape, generator=self.random) * 2.0 - 1


def _bias(one: _Gaussian) -> None:
    bias = torch.zeros(HEAD_DIM, dtype=torch.float64)
    bias[[60, 61, 62, 63, 124, 125, 126, 127]] = torch.tensor([-1.0, 1, -1, 1, -0.7, -0.7, 0.7, 0.7]).double()
    one.k = _rotated(2 * one.k + bias * (921 / bias.norm()))
    one.q = _rotated(one.q, TOKENS)


def _beyond_fp16(one: _Gaussian) -> None:
    one.k[..., 3] = 98304 + 256 * (1 + one.signs(KV_HEADS, TOKENS))


def _one_element(one: _Gaussian) -> None:
    one.v[:] = 0
    one.v[..., 5] = 1


def _around_10(one: _Gaussian) -> None:
    one.k, one.v = 10 + 0.1 * one.k, 10 + 0.1 * one.v


def _channel(one: _Gaussian) -> None:
    one.v[..., 7] = 20 + 0.5 * one.v[..., 7]


def _aligned(one: _Gaussian) -> None:
    signs = one.signs(HEAD_DIM)
    one.k.clamp_(-2, 2)
    one.k[:, 100], one.k[:, 110] = 3.2 * signs, 1.6 * signs
    one.v[:] = 0
    one.v[:, 100], one.v[:, 110] = 1, -1
    one.q = signs + 0.1 * one.q


_CASES: dict[str, tuple[Callable[[_Gaussian], None], torch.dtype]] = {
    "bias": (_bias, torch.float16),
    "beyond-fp16": (_beyond_fp16, torch.bfloat16),
    "one-element": (_one_element, torch.float16),
    "around-10": (_around_10, torch.float16),
    "channel": (_channel, torch.float16),
    "aligned": (_aligned, torch.float16),
}


def constructed() -> dict[str, Recording]:
    """One layer each, by name; keys and values rounded to 16 bits. Queries bring no tokens of their own."""
    found = {}
    for name, (put_in, dtype) in _CASES.items():
        one = _Gaussian()
        put_in(one)
        none = torch.empty(1, KV_HEADS, 0, HEAD_DIM, dtype=one.q.dtype)
        k, v, q = one.k.to(dtype)[None], one.v.to(dtype)[None], one.q[None]
        found[name] = Recording(k, v, q, none, none, 1 / math.sqrt(HEAD_DIM))
    return found
