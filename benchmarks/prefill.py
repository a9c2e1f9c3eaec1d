"""How long does a whole model take to read a long prompt in pieces, and how much memory?

    python benchmarks/prefill.py --json benchmarks/results/DATE-prefill.json
    python benchmarks/prefill.py --small --device cpu  # tries it out

A model of Qwen3-0.6B's shape (28 layers, hidden 1,024, 16 query heads, 8 KV heads of 128, intermediate 3,072) with
random weights in bf16, which say nothing of quality; time and memory do not depend on them. ``prefill`` reads all but
the last token, in passes as free memory allows, and a pass of its own the last one, as ``generate`` does. Beside it
transformers' ``DynamicCache`` with ``sdpa``, in one pass over the whole prompt, as ``generate`` has it.

What would take longer than is left of ``--seconds``, by the square of its tokens, is left out, and so is what runs out
of memory: the table says so. Each is read once, behind a prompt of the least size that compiles.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from bench_common import device_record, print_table, provenance, synchronize, write_result

from kvpack import KVPackCache
from kvpack.errors import CacheFullError
from kvpack.integrations.transformers.cache import cache_keyword
from kvpack.integrations.transformers.prefill import prefill

SHAPE = {
    "vocab_size": 151_936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
SMALL = SHAPE | {"vocab_size": 1000, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
DYNAMIC = "DynamicCache, sdpa"
CACHES: dict[str, dict[str, Any]] = {
    "INT2": {"formats": "INT2"},
    "INT4": {"formats": "INT4"},
    "16 bits": {},
    DYNAMIC: {},
}


@torch.no_grad()
def measure(model: Any, cache_name: str, tokens: int, device: torch.device) -> dict[str, Any]:
    """
    Raises:
        CacheFullError, torch.OutOfMemoryError: it does not fit.
    """
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(model.config.vocab_size, (1, tokens), generator=generator).to(device)
    is_dynamic = cache_name == DYNAMIC
    model.set_attn_implementation("sdpa" if is_dynamic else "kvpack")
    if is_dynamic:
        cache: Any = transformers.DynamicCache(config=model.config)
    else:
        cache = KVPackCache(model.config, **CACHES[cache_name])
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    synchronize(device)
    start, chunk = time.perf_counter(), tokens
    if not is_dynamic:
        chunk = prefill(model, ids, cache).chunk_tokens
    given = {cache_keyword(model): cache}
    logits = model(input_ids=ids[:, cache.get_seq_length() :], use_cache=True, logits_to_keep=1, **given).logits
    is_finite = bool(logits.isfinite().all())
    synchronize(device)
    seconds = time.perf_counter() - start
    if not is_finite:
        sys.exit(f"{cache_name}, {tokens} tokens: logits are no numbers")
    if is_dynamic:
        held = slabs = sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
    else:
        cache.kv.check()
        held, slabs = cache.kv.pools.bytes_in_use, cache.kv.pools.bytes_allocated
    return {
        "seconds": seconds,
        "tokens_per_s": tokens / seconds,
        "peak_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
        "cache_bytes": held,
        "slab_bytes": slabs,
        "chunk_tokens": chunk,
        "left_out": None,
    }


def measure_all(model: Any, options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    begun, rows = time.perf_counter(), []
    last: dict[str, tuple[int, float]] = {}
    for tokens in options.tokens:
        for name in options.caches:
            of_case: dict[str, Any] = {"cache": name, "tokens": tokens}
            left = options.seconds - (time.perf_counter() - begun)
            before, took = last.get(name, (tokens, 0.0))
            if took * (tokens / before) ** 2 > left:
                rows.append({**of_case, "left_out": "time" if took < float("inf") else "memory"})
                continue
            try:
                if name not in last:
                    compiling = time.perf_counter()
                    measure(model, name, tokens, device)
                    begun += time.perf_counter() - compiling
                found = measure(model, name, tokens, device)
            except (torch.OutOfMemoryError, CacheFullError):
                rows.append({**of_case, "left_out": "memory"})
                last[name] = tokens, float("inf")
                gc.collect()
                continue
            last[name] = tokens, found["seconds"]
            rows.append(of_case | found)
            print(f"{tokens} tokens, {name}: {found['seconds']:.2f} s", file=sys.stderr)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=lambda text: [int(one) for one in text.split(",")])
    parser.add_argument("--caches", type=lambda text: text.split(","), default=list(CACHES), help=", ".join(CACHES))
    parser.add_argument("--small", action="store_true", help="2 layers of 128")
    parser.add_argument("--seconds", type=float, default=150, help="for all, but loading and compiling")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if others := set(options.caches) - set(CACHES):
        parser.error(f"--caches has {', '.join(sorted(others))}; there are {', '.join(CACHES)}")
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA device (--small --device cpu tries it out)")
    if options.tokens is None:
        options.tokens = [200, 2500] if options.small else [1000, 10_000, 50_000, 100_000, 200_000]
    shape = SMALL if options.small else SHAPE
    config = transformers.Qwen3Config(
        **shape, max_position_embeddings=max(options.tokens) + 1, tie_word_embeddings=True, dtype=torch.bfloat16
    )
    with torch.device(device):
        model = transformers.Qwen3ForCausalLM(config).to(torch.bfloat16).eval()
    result = {
        "what": "prefill",
        **provenance({}, ("torch", "transformers", "cupy-cuda13x", "cupy-cuda12x")),
        "device": device_record(device),
        "shape": shape,
        "rows": measure_all(model, options, device),
    }
    if options.json:
        write_result(options.json, result)
    unit, unit_bytes = ("MB", 1e6) if options.small else ("GB", 1e9)
    names = ("peak_bytes", "cache_bytes", "slab_bytes")
    table = []
    for row in result["rows"]:
        cells: list[object] = [row["tokens"], row["cache"]]
        if row["left_out"]:
            cells += [f"no {row['left_out']} left", *[None] * (len(names) + 2)]
        else:
            cells += [f"{row['seconds']:.2f}", f"{row['tokens_per_s']:.0f}"]
            cells += [None if row[name] is None else f"{row[name] / unit_bytes:.2f}" for name in names]
            cells += [row["chunk_tokens"]]
        table.append(cells)
    headings = [
        "tokens",
        "cache",
        "s",
        "tokens/s",
        f"peak, {unit}",
        f"cache, {unit}",
        f"slabs, {unit}",
        "tokens a pass",
    ]
    print_table(headings, table)


if __name__ == "__main__":
    main()
