"""Pages of random keys and values for tests of attention, and what attention to them should give."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import torch

from kvpack.encode.page_coder import dequantize_blocks, quantize_blocks
from kvpack.format.pages import ENTRY_FORMAT_MASK, PAGE_TOKENS, PageFormat, PageLayout, Side
from kvpack.runtime.kv.page_kernels import PAGE_FORMATS

Spoiled = tuple[Side, int, int, int, float]  # side, sequence, token, dimension, value
NUMPY_TYPES = {torch.float16: np.dtype(np.float16), torch.bfloat16: np.dtype(ml_dtypes.bfloat16)}


@dataclass
class Paged:
    """``pages`` u8, ``table`` i64 [2, sequences, max_pages] and ``lengths`` i32 as kernels take them; ``values`` fp64
    [sequence][side] → [heads, length, head_dim], dequantized."""

    pages: torch.Tensor
    table: torch.Tensor
    lengths: torch.Tensor
    values: list[tuple[np.ndarray, np.ndarray]]

    def to(self, device: str) -> Paged:
        """Entries become addresses."""
        pages = self.pages.to(device)
        table = torch.where(self.table >= 0, self.table + pages.data_ptr(), self.table)
        return Paged(pages, table.to(device), self.lengths.to(device), self.values)


def paged_values(
    lengths: Sequence[int],
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    formats: Sequence[tuple[PageFormat, PageFormat]],
    *,
    seed: int = 0,
    size: float = 1.0,
    spoiled: Sequence[Spoiled] = (),
) -> Paged:
    """Pages in a random order, whose formats of K and V alternate; the last, partial page of a sequence has 16 bits.

    What lies behind a sequence's end in its last page is large, so that it shows if it is used. `spoiled` elements
    are of all heads, and may lie there too.
    """
    rng = np.random.default_rng(seed)
    numpy_type = NUMPY_TYPES[dtype]
    max_pages = max(1, max(-(-length // PAGE_TOKENS) for length in lengths)) + 1
    places = [(s, page, side) for s, n in enumerate(lengths) for page in range(-(-n // PAGE_TOKENS)) for side in Side]
    blocks: list[np.ndarray] = [np.zeros(0, np.uint8)] * len(places)
    values: list[list[list[np.ndarray]]] = [[[], []] for _ in lengths]
    table = np.full((2, len(lengths), max_pages), -1, np.int64)
    for number, (sequence, page, side) in enumerate(places):
        page_format = formats[(page + sequence) % len(formats)][side]
        filled = min(PAGE_TOKENS, lengths[sequence] - page * PAGE_TOKENS)
        if filled < PAGE_TOKENS or not page_format.is_quantized:
            page_format = PAGE_FORMATS[dtype]
        layout = PageLayout(side, page_format, head_dim)
        x = size * rng.normal(0, 1, (num_kv_heads, PAGE_TOKENS, head_dim)) * np.exp(rng.normal(0, 0.5, head_dim))
        x += rng.normal(0, 0.5, head_dim) * (side == Side.K)
        x[:, filled:] = 1000
        x = x.astype(np.float16).astype(numpy_type)
        for of_side, of_sequence, token, dim, value in spoiled:
            if (of_side, of_sequence, token // PAGE_TOKENS) == (side, sequence, page):
                x[:, token % PAGE_TOKENS, dim] = value
        blocks[number] = quantize_blocks(x, layout)
        values[sequence][side].append(dequantize_blocks(blocks[number], layout)[:, :filled].astype(np.float64))
    pages = np.zeros(0, np.uint8)
    at = 0
    pieces = []
    for number in rng.permutation(len(places)):
        sequence, page, side = places[number]
        page_format = formats[(page + sequence) % len(formats)][side]
        filled = min(PAGE_TOKENS, lengths[sequence] - page * PAGE_TOKENS)
        if filled < PAGE_TOKENS or not page_format.is_quantized:
            page_format = PAGE_FORMATS[dtype]
        table[side, sequence, page] = at | page_format
        pieces.append(blocks[number].reshape(-1))
        at += pieces[-1].size
    pages = np.concatenate([*pieces, np.zeros(16, np.uint8)])
    none = np.zeros((num_kv_heads, 0, head_dim))
    joined = [tuple(np.concatenate([none, *side], axis=1) for side in of_sequence) for of_sequence in values]
    return Paged(
        torch.from_numpy(pages),
        torch.from_numpy(table),
        torch.tensor(lengths, dtype=torch.int32),
        joined,  # type: ignore[arg-type]
    )


def by_kv_head(rows: np.ndarray, matrices: np.ndarray) -> np.ndarray:
    """[heads, tokens, n] @ [KV heads, n, m] for query heads that share KV heads: one product for each KV head."""
    heads, tokens, _ = rows.shape
    return (rows.reshape(len(matrices), -1, rows.shape[2]) @ matrices).reshape(heads, tokens, -1)


def probabilities(
    queries: np.ndarray,
    keys: np.ndarray,
    scale: float,
    window: int = 0,
    sinks: int = 0,
    causal: bool = True,
    softcap: float | None = None,
    sink_logits: torch.Tensor | None = None,
) -> np.ndarray:
    """fp64 [heads, tokens, length] by the definition: of the window, where it is not 0, and the sinks.

    Args:
        queries: fp64 [heads, tokens, head_dim], of a sequence's last tokens.
        keys: fp64 [KV heads, length, head_dim].
        sink_logits: [heads]; their probabilities are not in the result.
    """
    tokens = queries.shape[1]
    length = keys.shape[1]
    limit = (length - tokens + 1 + np.arange(tokens) if causal else np.full(tokens, length))[:, None]
    places = np.arange(length)
    seen = places < limit
    if window:
        seen &= (places >= limit - window) | (places < sinks)
    scores = by_kv_head(queries, keys.swapaxes(1, 2)) * scale
    if softcap is not None:
        scores = softcap * np.tanh(scores / softcap)
    p = np.where(seen, scores, -np.inf)
    if sink_logits is not None:
        logits = sink_logits.double().cpu().numpy()[:, None, None]
        p = np.concatenate([p, np.broadcast_to(logits, (*p.shape[:2], 1))], -1)
    p = np.exp(p - p.max(-1, keepdims=True))
    return np.asarray(p / p.sum(-1, keepdims=True))[..., :length]


def probabilities_of_sequences(
    q: torch.Tensor, paged: Paged, scale: float, causal: bool = True, **options: Any
) -> Iterator[tuple[int, np.ndarray]]:
    """Those of each sequence that has something to attend to."""
    tokens = q.shape[2]
    for sequence, (keys, _) in enumerate(paged.values):
        if keys.shape[1] >= (tokens if causal else 1):
            queries = q[sequence].double().cpu().numpy()
            yield sequence, probabilities(queries, keys, scale, causal=causal, **options)


def expected_attention(q: torch.Tensor, paged: Paged, scale: float, **options: Any) -> np.ndarray:
    """fp64 [sequences, heads, tokens, head_dim] by the definition; ``options`` are those of :func:`probabilities`."""
    out = np.zeros(tuple(q.shape))
    for sequence, p in probabilities_of_sequences(q, paged, scale, **options):
        values = paged.values[sequence][Side.V]
        out[sequence] = by_kv_head(p, values)
    return out


def expected_mass(
    q: torch.Tensor, paged: Paged, scale: float, weights: torch.Tensor | None = None, **options: Any
) -> np.ndarray:
    """fp64 [sequences, max_pages]: mean over query tokens of Σ of heads, weight · probability of a page's tokens."""
    heads, tokens = q.shape[1], q.shape[2]
    of_heads = np.full(heads, 1 / heads) if weights is None else weights.double().cpu().numpy()
    mass = np.zeros(tuple(paged.table.shape[1:]))
    for sequence, p in probabilities_of_sequences(q, paged, scale, **options):
        of_pages = np.add.reduceat(p, np.arange(0, p.shape[-1], PAGE_TOKENS), axis=-1)
        mass[sequence, : of_pages.shape[-1]] = np.einsum("h,htp->p", of_heads, of_pages) / tokens
    return mass


def check_what_is_hidden(
    make: Callable[[Sequence[Spoiled]], Paged],
    attend: Callable[[Paged], torch.Tensor],
    spoiled: Sequence[Spoiled],
    tokens: int,
    window: int = 0,
    sinks: int = 0,
    causal: bool = True,
    infinite: bool = False,
) -> None:
    """Spoiled values reach the queries that see them, and change no bit of the others' results.

    Of V in 16 bits, that is one dimension of a result; in a quantized page, the token. Of K in a quantized page it is
    all of the page. NaN is what shows of K: q · inf can be -inf, of which p is 0. `infinite`: what sees inf is inf;
    otherwise it may be NaN.
    """
    without, paged = make(()), make(spoiled)
    expected, found = attend(without).float().cpu(), attend(paged).float().cpu()
    reached = torch.zeros(expected.shape, dtype=torch.bool)
    maybe = torch.zeros(expected.shape, dtype=torch.bool)
    sums = torch.zeros(expected.shape)
    for side, sequence, token, dim, value in spoiled:
        length = int(without.lengths[sequence])
        limit = length - tokens + 1 + torch.arange(tokens) if causal else torch.full((tokens,), length)
        page_format = PageFormat(int(without.table[side, sequence, token // PAGE_TOKENS]) & ENTRY_FORMAT_MASK)
        # Tokens of a quantized page share the scales of K.
        first = token // PAGE_TOKENS * PAGE_TOKENS
        share = side == Side.K and page_format.is_quantized
        alike = torch.arange(first, first + PAGE_TOKENS) if share else torch.tensor([token])
        sees = alike < limit[:, None]
        if window:
            sees &= (alike >= limit[:, None] - window) | (alike < sinks)
        seen = sees.any(1)
        dims = slice(dim, dim + 1) if side == Side.V and not page_format.is_quantized else slice(None)
        if side == Side.K and not math.isnan(value):
            maybe[sequence, :, seen] = True
            continue
        reached[sequence, :, seen, dims] = True
        sums[sequence, :, seen, dims] += math.nan if page_format.is_quantized else value
    assert torch.equal(found[~reached & ~maybe], expected[~reached & ~maybe])
    assert expected.isfinite().all()
    assert not found[reached].isfinite().any()
    assert found[sums.isnan()].isnan().all()
    if infinite:
        assert torch.equal(found[sums.isinf()], sums[sums.isinf()])


def attention_error(found: torch.Tensor, expected: np.ndarray) -> float:
    """Largest error, beyond half a unit in the last place of the output's type, over max(1, largest value)."""
    binade = np.exp2(np.floor(np.log2(np.maximum(np.abs(expected), 2.0**-14))))
    half_unit = binade * torch.finfo(found.dtype).eps / 2
    error = np.abs(found.double().cpu().numpy() - expected) - half_unit
    return float(error.max() / max(1.0, np.abs(expected).max()))
