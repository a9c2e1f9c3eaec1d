"""How long the host plans a step of a KV cache: page tables, allocation of bits, free lists; no GPU is needed.

    python benchmarks/kv_planning.py --json benchmarks/results/DATE-kv-planning.json
    python benchmarks/kv_planning.py --shared  # sequences that are forks of one, and have gone on from there

Sequences of one length have one token appended a step, layer by layer, as in decoding. What a GPU would do (tokens
written, pages quantized) is left out; all else is what :meth:`kvpack.KVCache.append` does. Sequences are out of step
with each other, so that pages leave the recent window all the time. Times are means over steps and layers, in
microseconds; beside them the longest step of a layer. With a budget, ``reallocate`` runs every 64 steps and is counted
apart and in the sum.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from bench_common import provenance, write_result

import kvpack
from kvpack.runtime.kv import cache as cache_module

_HEADS, _HEAD_DIM = 1, 16
_REALLOCATE_STEPS = 64


def _nothing(*_: Any, **__: Any) -> None:
    pass


def measure(
    sequences: int, tokens: int, layers: int, steps: int, budget: float | None, *, shared: bool = False
) -> dict[str, Any]:
    """Times of one cache, in microseconds a layer and step.

    Args:
        shared: all but some hundred tokens of each sequence are in pages that all share.
    """
    options: dict[str, Any] = {"budget": budget} if budget is not None else {"formats": kvpack.PageFormat.INT4}
    cache = kvpack.KVCache(
        layers,
        _HEADS,
        _HEAD_DIM,
        tokens + steps + 448,
        max_sequences=sequences,
        device="cpu",
        **options,
    )
    generator = torch.Generator().manual_seed(0)

    def append(sequence: int, count: int) -> None:
        for layer in range(layers):
            k = torch.randn(1, _HEADS, count, _HEAD_DIM, generator=generator).half()
            cache.append(layer, k, k, [sequence])

    if shared:
        append(0, tokens)
        for _ in range(1, sequences):
            cache.fork(0)
    for sequence in range(sequences):
        append(sequence, (256 if shared else tokens) + 64 * sequence // sequences)
    if budget is not None:
        for layer in range(layers):
            cache.observe(layer, torch.rand(sequences, 1, tokens // 64, generator=generator))
        cache.reallocate()
    k = torch.randn(sequences, _HEADS, 1, _HEAD_DIM, generator=generator).half()
    kept = cache_module.write_tokens, cache_module.quantize_pages
    cache_module.write_tokens = cache_module.quantize_pages = _nothing  # type: ignore[assignment]
    try:
        spent, longest, reallocating, times = 0.0, 0.0, 0.0, 0
        for step in range(steps):
            for layer in range(layers):
                start = time.thread_time()
                cache.append(layer, k, k)
                took = time.thread_time() - start
                spent, longest = spent + took, max(longest, took)
            if budget is not None and step % _REALLOCATE_STEPS == _REALLOCATE_STEPS - 1:
                start = time.thread_time()
                cache.reallocate()
                reallocating, times = reallocating + time.thread_time() - start, times + 1
    finally:
        cache_module.write_tokens, cache_module.quantize_pages = kept
    layer_steps = steps * layers
    return {
        "sequences": sequences,
        "tokens": tokens,
        "layers": layers,
        "steps": steps,
        "budget": budget,
        "append_us": 1e6 * spent / layer_steps,
        "longest_append_us": 1e6 * longest,
        "reallocate_us": 1e6 * reallocating / layer_steps,
        "reallocate_ms_a_call": 1e3 * reallocating / times if times else None,
        "sum_us": 1e6 * (spent + reallocating) / layer_steps,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--steps", type=int, default=256)
    parser.add_argument("--shared", action="store_true", help="sequences that are forks of one")
    parser.add_argument("--json", type=Path, help="write the results here as well")
    arguments = parser.parse_args()
    rows = []
    for sequences, tokens in ((16, 16384), (64, 4096)):
        for budget in (None, 0.3):
            row = measure(sequences, tokens, arguments.layers, arguments.steps, budget, shared=arguments.shared)
            rows.append(row)
            name = "int4" if budget is None else f"budget {budget}"
            print(
                f"{sequences} × {tokens}, {name}: append {row['append_us']:.1f} µs a layer and step (longest "
                f"{row['longest_append_us']:.0f}), reallocate {row['reallocate_us']:.1f}, sum {row['sum_us']:.1f}",
                flush=True,
            )
    if arguments.json is not None:
        write_result(arguments.json, {**provenance({}, ("torch",)), "rows": rows})


if __name__ == "__main__":
    main()
