"""How much memory does a long prompt take in a quantized KV cache, and how long does attention to it take?

    python benchmarks/long_prompt.py --json benchmarks/results/DATE-long-prompt.json
    python benchmarks/long_prompt.py --tokens 4096 --layers 2 --device cpu

Attention alone, of a model's shape (Qwen3-0.6B's by default: 28 layers, 16 query heads, 8 KV heads of 128): the prompt
comes in chunks, each goes through all layers with ``attention_with_kv_cache``. Queries, keys and values are random,
which says nothing of quality; memory and time do not depend on them. The last token's result of the first and the last
layer is compared with fp64 attention to what the cache holds.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from bench_common import device_record, print_table, provenance, synchronize, write_result

from kvpack import KVCache, PageFormat, attention_with_kv_cache
from kvpack.bench.attention import attention_error
from kvpack.bench.pages import expected_attention

MOST_ERROR = 1e-3


def error_of(out: torch.Tensor, q: torch.Tensor, cache: KVCache, layer: int) -> float:
    """The error of one token [1, heads, 1, head_dim], as `kvpack bench attention` measures errors."""
    k, v = cache.read(layer, 0, torch.float32)
    by_head = q[0, :, 0].unflatten(0, (cache.num_kv_heads, -1))
    scale = 1 / math.sqrt(cache.head_dim)
    expected = [expected_attention(*of_head, scale) for of_head in zip(by_head, k, v, strict=True)]
    return attention_error(torch.stack(expected), [(0, head, 0) for head in range(cache.num_kv_heads)])(out)


@torch.no_grad()
def measure(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    cache = KVCache(
        options.layers,
        options.kv_heads,
        options.head_dim,
        options.tokens + 1,
        device=device,
        formats=PageFormat[options.format.upper()],
    )
    generator = torch.Generator(device).manual_seed(0)

    def random(heads: int, tokens: int) -> torch.Tensor:
        shape = 1, heads, tokens, options.head_dim
        return torch.randn(shape, device=device, dtype=torch.float16, generator=generator)

    def attend(layer: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        q = random(options.heads, tokens)
        k, v = random(options.kv_heads, tokens), random(options.kv_heads, tokens)
        return attention_with_kv_cache(q, k, v, cache, layer=layer)[0], q

    for layer in range(options.layers):
        attend(layer, min(options.chunk, options.tokens))  # compiles
    cache.free(0)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    synchronize(device)
    start = time.perf_counter()
    for first in range(0, options.tokens, options.chunk):
        for layer in range(options.layers):
            attend(layer, min(options.chunk, options.tokens - first))
        if sys.stderr.isatty():
            print(f"\r{min(first + options.chunk, options.tokens)} of {options.tokens} tokens", end="", file=sys.stderr)
    synchronize(device)
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    held = cache.pools.bytes_in_use
    # Quantized pages are read as they are now, so one more token is what the check is about.
    errors = {}
    for layer in range(options.layers):
        out, q = attend(layer, 1)
        if layer in (0, options.layers - 1):
            errors[layer] = error_of(out, q, cache, layer)
    cache.check()
    return {
        "shape": {name: getattr(options, name) for name in ("layers", "heads", "kv_heads", "head_dim")},
        "tokens": options.tokens,
        "chunk_tokens": options.chunk,
        "format": options.format,
        "fp16_bytes": 4 * options.layers * options.kv_heads * options.head_dim * options.tokens,
        "page_bytes": held,
        "slab_bytes": cache.pools.bytes_allocated,
        "peak_bytes": peak,
        "seconds": seconds,
        "tokens_per_s": options.tokens / seconds,
        "largest_error": max(errors.values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--format", default="int2", choices=["fp16", "int8", "int4", "int3", "int2"])
    parser.add_argument("--chunk", type=int, default=2048)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA device (--device cpu with few --tokens and --layers takes minutes)")
    result = {
        "what": "long-prompt",
        **provenance({}, ("torch", "cupy-cuda13x", "cupy-cuda12x")),
        "device": device_record(device),
        **measure(options, device),
    }
    if result["largest_error"] > MOST_ERROR:
        sys.exit(f"results are wrong by {result['largest_error']:.1e}")
    if options.json:
        write_result(options.json, result)
    names = ("fp16_bytes", "page_bytes", "slab_bytes", "peak_bytes")
    unit, unit_bytes = ("GB", 1e9) if min(result[name] or 1e9 for name in names) >= 1e8 else ("MB", 1e6)
    print_table(
        ["tokens", *(name.replace("_bytes", f", {unit}") for name in names), "s", "tokens/s"],
        [
            [
                options.tokens,
                *(None if result[name] is None else f"{result[name] / unit_bytes:.2f}" for name in names),
                f"{result['seconds']:.1f}",
                f"{result['tokens_per_s']:.0f}",
            ]
        ],
        f"{options.format}: {options.layers} layers, {options.heads}:{options.kv_heads} heads of {options.head_dim}",
    )


if __name__ == "__main__":
    main()
