"""A long context whose quantized pages lie in host memory: what it takes, how long a token takes, and what is found.

    python benchmarks/offloaded_context.py --json benchmarks/results/DATE-offloaded-context.json
    python benchmarks/offloaded_context.py --tokens 8192 --layers 4 --device cpu

Attention alone, of a model's shape (Llama-3.1-8B's by default: 32 layers, 32 query heads, 8 KV heads of 128). Keys and
values are constructed, layer by layer: each layer is a context of its own, whose right answer is known, as those of
``long_context.py``. All heads ask for one token, which has 0.9 of their attention to all tokens:

    needle     layers 0, 2, …: all other tokens are of topics that last for about 100 tokens each
    multi-key  layers 1, 3, …: the same, but there are 64 tokens of the needle's kind, scattered over the context

Each decoding step brings a token to every layer. Its queries are the last step's, turned a bit (``--drift``, the share
of a query's random part that is new). How much neighbouring queries differ, and with it how many pages a step copies,
is an assumption here, not a finding.

``recall`` is the share of layers in which the needle's page is chosen, ``error`` the mean distance of outputs from
those of attention to all pages, relative to their norm. Times are of all layers: the sum of a step with attention to
some pages; of one with attention to all pages, read from host memory; and of one to all pages on the device (of one
layer, times the number of layers).
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from bench_common import device_record, print_table, provenance, synchronize, write_result

from kvpack import KVCache, PageFormat
from kvpack.format.pages import PAGE_TOKENS, half_split_order
from kvpack.runtime.kv.retrieval import LEAST_PAGES

CASES = ("needle", "multi-key")
_RANK, _TOPIC_TOKENS, _NOISE, _ROPE_BASE, _NEEDLE_SHARE, _NEEDLES = 24, 100, 0.3, 1e6, 0.9, 64
_CHUNK_TOKENS = 1 << 16
_WARM_STEPS = 3


class Context:
    """Keys, values and queries of one layer, in chunks.

    Attributes:
        needle: the token that all heads ask for.
        q: fp32 [query heads, head_dim], of the size that gives each head's needle its share; known behind
            :meth:`chunks`.
    """

    def __init__(self, options: argparse.Namespace, case: str, tokens: int, seed: int, device: torch.device) -> None:
        self.options, self.tokens, self.device = options, tokens, device
        self.random = torch.Generator(device).manual_seed(seed)
        needles = _NEEDLES if case == "multi-key" else 1
        between = torch.randperm(tokens - 4 * PAGE_TOKENS, generator=self.random, device=device)
        self.at = (between[:needles] + PAGE_TOKENS).sort().values
        asked = int(torch.randint(needles, (1,), generator=self.random, device=device))
        self.needle = int(self.at[asked])
        kv_heads, head_dim = options.kv_heads, options.head_dim
        slow = torch.zeros(head_dim, device=device)
        slow.view(-1, 16)[list(half_split_order(head_dim)[: max(1, head_dim // 64)])] = 1
        self.directions = self.normal(kv_heads, _RANK, head_dim) * slow / math.sqrt(_RANK)
        self.topics = self.normal(kv_heads, tokens // _TOPIC_TOKENS + 1, _RANK)
        self.ends = torch.randint(self.topics.shape[1], (tokens,), generator=self.random, device=device).sort().values
        self.mean = self.normal(kv_heads, 1, head_dim)
        self.about = self.normal(kv_heads, needles, head_dim) * slow
        asks = self.about[:, asked].repeat_interleave(options.heads // kv_heads, 0)
        self.fixed, self.spread = asks, 0.5 * asks.std()
        self.drifting = self.first_drifting = self.normal(options.heads, head_dim)
        self.sizes = torch.ones(options.heads, 1, device=device)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.random, device=self.device)

    def rotated(self, x: torch.Tensor, first: int) -> torch.Tensor:
        """[…, tokens, head_dim] by RoPE."""
        dims = torch.arange(0, x.shape[-1], 2, device=self.device, dtype=torch.float64) / x.shape[-1]
        positions = torch.arange(first, first + x.shape[-2], device=self.device, dtype=torch.float64)
        angle = positions[:, None] * _ROPE_BASE**-dims
        cos, sin = angle.cos().float(), angle.sin().float()
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    @property
    def q(self) -> torch.Tensor:
        return self.sizes * self.rotated((self.fixed + self.spread * self.drifting)[:, None], self.tokens - 1)[:, 0]

    def drift(self) -> None:
        """To the next step's queries."""
        share = self.options.drift
        new = self.normal(*self.drifting.shape)
        self.drifting = math.sqrt(1 - share) * self.drifting + math.sqrt(share) * new

    def chunks(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """k and v, fp16 [1, KV heads, tokens, head_dim]."""
        options, scores = self.options, []
        by_kv_head = self.q.unflatten(0, (options.kv_heads, -1)) / math.sqrt(options.head_dim)
        for first in range(0, self.tokens, _CHUNK_TOKENS):
            end = min(first + _CHUNK_TOKENS, self.tokens)
            k = self.topics[:, self.ends[first:end]] @ self.directions + self.mean
            k += _NOISE * self.normal(options.kv_heads, end - first, options.head_dim)
            here = ((self.at >= first) & (self.at < end)).nonzero()[:, 0]
            k[:, self.at[here] - first] = self.mean + self.about[:, here]
            k = self.rotated(k, first)
            scores.append(torch.einsum("hgd,htd->hgt", by_kv_head, k).flatten(0, 1))
            yield k.half()[None], self.normal(1, options.kv_heads, end - first, options.head_dim).half()
        self._set_sizes(torch.cat(scores, 1))

    def _set_sizes(self, scores: torch.Tensor) -> None:
        """``scores``: [query heads, tokens], of queries as they are."""
        of_needle = scores[:, self.needle].clone()
        scores[:, self.needle] = -math.inf
        least, most = torch.zeros_like(of_needle), torch.full_like(of_needle, 1e3)
        for _ in range(30):
            size = (least + most) / 2
            ahead = size * of_needle - (size[:, None] * scores).logsumexp(1)
            is_enough = ahead >= math.log(_NEEDLE_SHARE / (1 - _NEEDLE_SHARE))
            least, most = torch.where(is_enough, least, size), torch.where(is_enough, size, most)
        self.sizes = self.sizes * most[:, None]


def seconds(call: Any, device: torch.device) -> float:
    synchronize(device)
    begin = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - begin


@torch.no_grad()
def measure(options: argparse.Namespace, tokens: int, device: torch.device) -> list[dict[str, Any]]:
    pages = math.ceil(tokens / PAGE_TOKENS)
    counts = [max(LEAST_PAGES + 1, round(share * pages)) for share in options.shares]
    shape = options.kv_heads, options.head_dim, tokens + 1024
    page_format = PageFormat[options.format.upper()]
    cache = KVCache(
        options.layers,
        *shape,
        device=device,
        formats=page_format,
        device_pages=round(options.slots * max(counts)),
        slab_bytes=1 << 26,
    )
    on_device = KVCache(1, *shape, device=device, formats=page_format)
    slots = cache.slots
    assert slots is not None
    contexts = [Context(options, CASES[layer % 2], tokens, 1000 + layer, device) for layer in range(options.layers)]

    def fill() -> None:
        for layer, context in enumerate(contexts):
            for k, v in context.chunks():
                cache.append(layer, k, v)
                if layer == 0:
                    on_device.append(0, k, v)

    fill_s = seconds(fill, device)

    def step(count: int | None, layers: range, held: KVCache = cache, **more: Any) -> list[torch.Tensor]:
        """A token more in some layers."""
        found = []
        for layer in layers:
            context = contexts[layer]
            k, v = torch.randn(2, 1, options.kv_heads, 1, options.head_dim, device=device, dtype=torch.float16)
            q = context.q[None, :, None].half()
            found.append(held.attend(layer, q, k, v, pages=count, **more))
        return found

    everything = range(options.layers)
    alone: dict[str, Any] = {"update_cache": False}
    step(None, everything, **alone)
    torch.manual_seed(0)
    full: list[torch.Tensor] = []
    full_ms = 1e3 * seconds(lambda: full.extend(step(None, everything, **alone)), device)
    step(None, range(1), on_device, **alone)
    times = [seconds(lambda: step(None, range(1), on_device, **alone), device) for _ in range(5)]
    full_on_device_ms = 1e3 * options.layers * statistics.median(times)
    rows = []
    for share, count in zip(options.shares, counts, strict=True):
        torch.manual_seed(0)
        found = step(count, everything, **alone)
        errors = [float((x - y).float().norm() / y.float().norm()) for x, y in zip(found, full, strict=True)]
        before = cache.mass.clone()
        step(count, everything, observe=True)
        looked_at = (cache.mass - before)[:, 0].cpu()
        is_found = [bool(looked_at[n, context.needle // PAGE_TOKENS] > 0) for n, context in enumerate(contexts)]
        recall = {case: statistics.mean(map(float, is_found[i :: len(CASES)])) for i, case in enumerate(CASES)}
        error = {case: statistics.mean(errors[i :: len(CASES)]) for i, case in enumerate(CASES)}
        steps = []
        for n in range(options.steps + _WARM_STEPS):
            for context in contexts:
                context.drift()
            if n == _WARM_STEPS:
                slots.counts.zero_()
            steps.append(seconds(functools.partial(step, count, everything), device))
        rows.append(
            {
                "tokens": tokens,
                "pages": count,
                "share": share,
                "device_pages": slots.slots,
                "recall": recall,
                "error": error,
                "step_ms": 1e3 * statistics.median(steps[_WARM_STEPS:]),
                "slowest_step_ms": 1e3 * max(steps[_WARM_STEPS:]),
                "hit_rate": slots.hit_rate(),
                "copied_pages": int(slots.counts[:, 1].sum()) / options.steps / options.layers,
                "full_from_host_ms": full_ms,
                "full_on_device_ms": full_on_device_ms,
                "device_mb": cache.estimate_memory_mb(),
                "summaries_mb": cache.summaries.size_bytes / 1e6,
                "host_mb": cache.pools.host_bytes / 1e6,
                "fill_s": fill_s,
            }
        )
        for context in contexts:  # what others are judged by
            context.drifting = context.first_drifting
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    headings = (
        "tokens",
        "pages",
        "recall",
        "error",
        "ms a token",
        "all: host",
        "all: device",
        "hits",
        "device MB",
        "host MB",
    )
    print_table(
        headings,
        [
            (
                row["tokens"],
                f"{row['pages']} ({100 * row['share']:.3g} %)",
                " / ".join(f"{100 * row['recall'][case]:.0f} %" for case in CASES),
                " / ".join(f"{row['error'][case]:.2f}" for case in CASES),
                f"{row['step_ms']:.1f}",
                f"{row['full_from_host_ms']:.0f}",
                f"{row['full_on_device_ms']:.0f}",
                f"{100 * row['hit_rate']:.1f} %",
                f"{row['device_mb']:.0f}",
                f"{row['host_mb']:.0f}",
            )
            for row in rows
        ],
        "recall and error: " + " / ".join(CASES),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[131_072, 500_000, 1_000_000])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.01, 0.05, 0.1], help="of all pages, attended to")
    parser.add_argument("--slots", type=float, default=1.5, help="pages on the device, over the most that are chosen")
    parser.add_argument("--drift", type=float, default=0.1)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--format", default="INT4")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device, rows = torch.device(options.device), []
    for tokens in options.tokens:
        rows += measure(options, tokens, device)
        print(f"{tokens} tokens: {rows[-1]['fill_s']:.1f} s to fill", file=sys.stderr, flush=True)
        show(rows)
    if options.json is not None:
        shape = {
            name: getattr(options, name) for name in ("layers", "heads", "kv_heads", "head_dim", "format", "drift")
        }
        write_result(
            options.json,
            {
                **provenance({}, ("torch", "cupy-cuda13x", "cupy-cuda12x")),
                "device": device_record(device),
                **shape,
                "rows": rows,
            },
        )


if __name__ == "__main__":
    main()
