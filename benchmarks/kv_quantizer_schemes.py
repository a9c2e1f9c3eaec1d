"""Ways to quantize recorded keys and values: kvpack's pages, and what they are compared with (``kv_quantizers.py``).

All leave the newest :data:`RECENT_TOKENS` tokens in 16 bits, as ``KVCache`` does. Their bits count everything: these
tokens, the first page, scales, zero points and norms. Names:

    int4, fp8_e4m3, …    kvpack's pages of one format; int4/int2: K in one, V in another. The first page has a format
                         of its own: by default that which it has in a ``KVCache``.
    POLICY@BUDGET        ``KVCache(budget=…, policy=…)``, which reads the prompt in chunks of 256 tokens, observes its
                         attention and divides the bytes anew behind each. What a budget gives depends on that: a
                         prompt in one chunk is observed once, and its pages leave the window all at once.
    kivi4g64             after KIVI (arXiv 2402.02750), on keys with positions applied: 4-bit integers between the least
                         and the largest of a group, K per channel in groups of 64 tokens, V per token in groups of 64
                         dimensions (of the largest divisor of head_dim that divides 64), fp16 scale and zero point of
                         each group
    turbo4               after TurboQuant (arXiv 2504.19874), its variant for squared error: each token's vector is
                         rotated (random signs, then Hadamard), its norm kept in fp16, its elements rounded to the 4-bit
                         Lloyd-Max levels of a Gaussian. Where head_dim is no power of two, the largest power of two
                         that divides it is rotated at a time.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, Protocol

import torch

from kvpack.encode.page_coder import dequantize_blocks, quantize_blocks
from kvpack.format.pages import PAGE_TOKENS, PageFormat, PageLayout, Side
from kvpack.runtime.kv.allocator import POLICIES, Policy
from kvpack.runtime.kv.attention import attention_with_kv_cache
from kvpack.runtime.kv.cache import KVCache

FirstPage = PageFormat | Literal["cache"] | None

RECENT_TOKENS = 64
# Of a prompt, that are read at once.
CHUNK_TOKENS = 256
FP16_MAX = 65504.0
WIDTHS = (8, 4, 3, 2)
PAGES = ("int8", "int4", "int3", "int2", "fp8_e4m3", "fp8_e5m2")
DEFAULT_SCHEMES = (
    *PAGES,
    *(f"kivi{bits}g{group}" for group in (64, 32) for bits in WIDTHS),
    *(f"turbo{bits}" for bits in WIDTHS),
)


@dataclass(frozen=True)
class Recording:
    """What a model has cached of a window, and the queries that come next.

    Attributes:
        k, v: [layers, kv_heads, tokens, head_dim], fp16 of models; tokens are a multiple of 64, and 192 or more.
        q: [layers, heads, queries, head_dim], fp32 or fp64, exact.
        new_k, new_v: [layers, kv_heads, new, head_dim] of q's dtype, exact: what the queries bring themselves, one
            token each, or none.
        scale: of scores.
        prompt_q: fp16 [layers, heads, tokens, head_dim], where a scheme wants it.
        key_order: of kvpack's pages, as ``KVCache`` takes it: that of the model.
    """

    k: torch.Tensor
    v: torch.Tensor
    q: torch.Tensor
    new_k: torch.Tensor
    new_v: torch.Tensor
    scale: float
    prompt_q: torch.Tensor | None = None
    key_order: tuple[int, ...] = ()


@dataclass(frozen=True)
class Quantized:
    """Values [layers, kv_heads, tokens, head_dim] after quantization, of q's dtype, and the bits of an element."""

    k: torch.Tensor
    v: torch.Tensor
    bits: float


class Scheme(Protocol):
    """A way to quantize.

    Attributes:
        name: as asked for.
        family: of what is one line in a picture.
        wants_prompt_queries: whether a recording must have ``prompt_q``.
    """

    name: str
    family: str
    wants_prompt_queries: bool

    def apply(self, recording: Recording) -> Quantized: ...


@dataclass(frozen=True)
class Coder:
    """One side's values [kv_heads, tokens, head_dim] fp32, tokens in whole pages, to what they become, with the
    recording's ``key_order``; and the bits an element takes, which depend on head_dim."""

    apply: Callable[[torch.Tensor, tuple[int, ...]], torch.Tensor]
    bits: Callable[[int], float]


@dataclass(frozen=True)
class SideBySide:
    """K and V each by a coder; the first page by others, of ``first_formats``, if they are given."""

    name: str
    family: str
    coders: tuple[Coder, Coder]
    first: tuple[Coder, Coder] | None = None
    first_formats: tuple[PageFormat, ...] = ()
    wants_prompt_queries = False

    def apply(self, recording: Recording) -> Quantized:
        layers, _, tokens, head_dim = recording.k.shape
        recent = tokens - RECENT_TOKENS
        spans = [(0, recent, self.coders)]
        if self.first is not None:
            spans = [(0, PAGE_TOKENS, self.first), (PAGE_TOKENS, recent, self.coders)]
        bits = 2.0 * 16 * RECENT_TOKENS
        found = []
        for side, values in zip(Side, (recording.k, recording.v), strict=True):
            out = values.to(recording.q.dtype, copy=True)
            for begin, end, coders in spans:
                bits += (end - begin) * coders[side].bits(head_dim)
                for layer in range(layers):
                    of_layer = values[layer, :, begin:end].float()
                    out[layer, :, begin:end] = coders[side].apply(of_layer, recording.key_order)
            found.append(out)
        return Quantized(*found, bits / (2 * tokens))


@dataclass(frozen=True)
class Budgeted:
    """A KVCache under a budget, on the CPU."""

    name: str
    budget: float
    policy: Policy
    wants_prompt_queries = True

    @property
    def family(self) -> str:
        return f"a budget, {self.policy}"

    def apply(self, recording: Recording) -> Quantized:
        if recording.prompt_q is None:
            raise ValueError(f"{self.name} needs the queries of the prompt")
        layers, kv_heads, tokens, head_dim = recording.k.shape
        cache = KVCache(
            layers,
            kv_heads,
            head_dim,
            tokens,
            device="cpu",
            budget=self.budget,
            policy=self.policy,
            recent_tokens=RECENT_TOKENS,
            key_order=recording.key_order,
        )
        for begin in range(0, tokens, CHUNK_TOKENS):
            for layer in range(layers):
                q, k, v = (
                    x[layer, None, :, begin : begin + CHUNK_TOKENS].cpu()
                    for x in (recording.prompt_q, recording.k, recording.v)
                )
                attention_with_kv_cache(q, k, v, cache, layer=layer, scale=recording.scale, observe=True)
            cache.reallocate()
        cache.check()
        read = [cache.read(layer, 0, torch.float32) for layer in range(layers)]
        k, v = (torch.stack([pair[side] for pair in read]).to(recording.q) for side in Side)
        return Quantized(k, v, cache.average_bits())


def page_coder(side: Side, page_format: PageFormat) -> Coder:
    """kvpack's own, through its executable specification; 16 bits leave values as they are."""
    if not page_format.is_quantized:
        return Coder(lambda x, _: x, lambda head_dim: 16.0)

    def apply(x: torch.Tensor, key_order: tuple[int, ...]) -> torch.Tensor:
        layout = PageLayout(side, page_format, x.shape[-1], key_order)
        pages = x.unflatten(-2, (-1, PAGE_TOKENS)).cpu().numpy()
        return torch.from_numpy(dequantize_blocks(quantize_blocks(pages, layout), layout)).flatten(-3, -2).to(x)

    return Coder(apply, lambda head_dim: PageLayout(side, page_format, head_dim).bits_per_element)


def _fp16(x: torch.Tensor) -> torch.Tensor:
    return x.clamp(-FP16_MAX, FP16_MAX).half().float()


def between_extremes(x: torch.Tensor, dim: int, bits: int) -> torch.Tensor:
    """Integers between the least and the largest along ``dim``; scale and zero point in fp16."""
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    scale, zero = _fp16((high - low) / (2**bits - 1)), _fp16(low)
    codes = ((x - zero) / torch.where(scale > 0, scale, 1)).round().clamp(0, 2**bits - 1)
    return zero + scale * codes


def kivi_coder(side: Side, bits: int, group: int) -> Coder:
    if side == Side.K:

        def apply(x: torch.Tensor, _: tuple[int, ...]) -> torch.Tensor:
            return between_extremes(x.unflatten(-2, (-1, group)), -2, bits).flatten(-3, -2)

        return Coder(apply, lambda head_dim: bits + 32 / group)

    def apply_to_tokens(x: torch.Tensor, _: tuple[int, ...]) -> torch.Tensor:
        return between_extremes(x.unflatten(-1, (-1, math.gcd(group, x.shape[-1]))), -1, bits).flatten(-2, -1)

    return Coder(apply_to_tokens, lambda head_dim: bits + 32 / math.gcd(group, head_dim))


@cache
def gaussian_levels(bits: int) -> torch.Tensor:
    """Lloyd-Max levels of N(0, 1), fp64 [2^bits], ascending: each is the mean of what is rounded to it."""
    # Where the density of the best levels goes as their number grows: quantiles of three times the variance.
    quantiles = (torch.arange(2**bits, dtype=torch.float64) + 0.5) / 2**bits
    levels = math.sqrt(3) * torch.special.ndtri(quantiles)
    edge = torch.tensor([torch.inf], dtype=torch.float64)
    for _ in range(20_000):
        borders = torch.cat([-edge, (levels[1:] + levels[:-1]) / 2, edge])
        density = torch.exp(-borders.square() / 2) / math.sqrt(2 * math.pi)
        # From the left half's side, where differences of probabilities keep their digits.
        probability = torch.special.ndtr(-borders.abs())
        inside = torch.where(
            borders[1:] <= 0,
            probability[1:] - probability[:-1],
            torch.where(borders[:-1] >= 0, probability[:-1] - probability[1:], 1 - probability[:-1] - probability[1:]),
        )
        better = (density[:-1] - density[1:]) / inside
        change = float((better - levels).abs().max())
        levels = better
        if change < 1e-9:
            break
    return levels


@cache
def rotation(head_dim: int) -> torch.Tensor:
    """Random signs, then Hadamard: orthogonal, fp32 [head_dim, head_dim], to multiply rows by from the right."""
    block = head_dim & -head_dim
    hadamard = torch.ones(1, 1)
    while len(hadamard) < block:
        hadamard = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), hadamard)
    signs = torch.randint(0, 2, (head_dim,), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    return signs[:, None] * torch.block_diag(*[hadamard / math.sqrt(block)] * (head_dim // block))


def turbo_coder(bits: int) -> Coder:
    levels = gaussian_levels(bits).float()
    borders = (levels[1:] + levels[:-1]) / 2

    def apply(x: torch.Tensor, _: tuple[int, ...]) -> torch.Tensor:
        turn = rotation(x.shape[-1]).to(x)
        norm = _fp16(x.norm(dim=-1, keepdim=True))
        unit = torch.where(norm > 0, x / norm, 0) @ turn * math.sqrt(x.shape[-1])
        nearest = levels.to(x)[torch.bucketize(unit, borders.to(x))]
        return norm / math.sqrt(x.shape[-1]) * (nearest @ turn.T)

    return Coder(apply, lambda head_dim: bits + 16 / head_dim)


def page_format(name: str) -> PageFormat:
    """
    Raises:
        ValueError: no format of pages has that name.
    """
    if name != "fp16" and name not in PAGES:
        raise ValueError(f"{name!r} is no format of pages; there are fp16, {', '.join(PAGES)}")
    return PageFormat[name.upper()]


def first_page_of_cache(formats: tuple[PageFormat, PageFormat]) -> tuple[PageFormat, PageFormat]:
    """What the first page has in a ``KVCache`` of these formats of K and V, when it has left the recent window."""
    cache = KVCache(1, 1, 64, 3 * PAGE_TOKENS, device="cpu", formats=[formats], recent_tokens=RECENT_TOKENS)
    tokens = torch.zeros((1, 1, 3 * PAGE_TOKENS, 64), dtype=cache.dtype)
    cache.append(0, tokens, tokens)
    k, v = (PageFormat(int(cache.precision_map(0)[side, 0, 0])) for side in Side)
    return k, v


def parse_scheme(name: str, first_page: FirstPage) -> Scheme:
    """
    Args:
        first_page: what kvpack's pages have for the first 64 tokens; "cache": as in a ``KVCache``; None: the same as
            all others.

    Raises:
        ValueError: a name that means nothing.
    """
    if found := re.fullmatch(r"kivi([2348])g(8|16|32|64)", name):
        bits, group = int(found[1]), int(found[2])
        return SideBySide(
            name, f"KIVI-like, groups of {group}", (kivi_coder(Side.K, bits, group), kivi_coder(Side.V, bits, group))
        )
    if found := re.fullmatch(r"turbo([2348])", name):
        return SideBySide(name, "TurboQuant-like", (turbo_coder(int(found[1])),) * 2)
    policy, at, budget = name.partition("@")
    if at:
        if policy not in POLICIES or not re.fullmatch(r"0?\.\d+|1", budget):
            raise ValueError(f"{name!r} is no POLICY@BUDGET, as importance@0.3; policies are {', '.join(POLICIES)}")
        return Budgeted(name, float(budget), policy)
    k, slash, v = name.partition("/")
    formats = page_format(k), page_format(v if slash else k)
    if formats[0] == formats[1]:
        family = "pages, fp8" if name.startswith("fp8") else "pages"
    else:
        family = "pages, K and V of two formats"
    coders = page_coder(Side.K, formats[0]), page_coder(Side.V, formats[1])
    if first_page is None:
        return SideBySide(name, family, coders)
    first = first_page_of_cache(formats) if first_page == "cache" else (first_page, first_page)
    return SideBySide(name, family, coders, (page_coder(Side.K, first[0]), page_coder(Side.V, first[1])), first)


def parse_schemes(names: Sequence[str], first_page: FirstPage) -> list[Scheme]:
    """Each once; ``default`` stands for :data:`DEFAULT_SCHEMES`.

    Raises:
        ValueError: a name that means nothing.
    """
    all_names = [one for name in names for one in (DEFAULT_SCHEMES if name == "default" else (name,))]
    return [parse_scheme(name, first_page) for name in dict.fromkeys(all_names)]
