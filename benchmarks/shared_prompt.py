"""Many sequences over one system prompt: how many copies of it are there, and are the outputs those of separate caches?

    python benchmarks/shared_prompt.py --json benchmarks/results/DATE-shared-prompt.json

The prompt is attended to once. Then each sequence is a fork of it, or gets its pages from someone who holds them
(`adopt`), and goes on by itself, one behind the other, until all of the prompt has left its recent window. Bytes are
those of the allocator. A separate cache is given the prompt's keys and values anew and goes on with the same.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from bench_common import device_record, provenance, write_result

from kvpack import KVCache, PageFormat, attention_with_kv_cache
from kvpack.format.pages import PAGE_TOKENS, Side
from kvpack.runtime.kv.page_table import NO_PAGE

LAYERS, HEADS, HEAD_DIM = 2, 2, 16


def heads(tokens: int, seed: int, device: torch.device) -> list[torch.Tensor]:
    """q, k, v of one sequence and layer."""
    generator = torch.Generator().manual_seed(seed)
    shape = (3, 1, HEADS, tokens, HEAD_DIM)
    return list(torch.randn(shape, generator=generator).half().to(device))


def go_on(cache: KVCache, sequence: int, seed: int, steps: list[int]) -> list[torch.Tensor]:
    """What attention gives to a sequence's own tokens, so many a step."""
    return [
        attention_with_kv_cache(
            *heads(tokens, (seed * 1000 + number) * LAYERS + layer, cache.device),
            cache,
            layer=layer,
            sequences=[sequence],
        )[0]
        for number, tokens in enumerate(steps)
        for layer in range(LAYERS)
    ]


def make_cache(sequences: int, tokens: int, device: str) -> KVCache:
    return KVCache(
        LAYERS, HEADS, HEAD_DIM, tokens, max_sequences=sequences, device=device, formats=PageFormat.INT4, slab_bytes=1
    )


def share(sequences: int, prompt_tokens: int, steps: list[int], *, adopt: bool, device: str = "cpu") -> dict[str, Any]:
    """Bytes, and in how many steps and layers outputs differ from those of separate caches.

    Args:
        prompt_tokens: a multiple of 64 with ``adopt``, since only full pages can be held.
        steps: how many tokens of its own each sequence has, step by step.
        adopt: rather than fork.
    """
    most = prompt_tokens + sum(steps)
    cache = make_cache(sequences, most, device)
    for layer in range(LAYERS):
        _, k, v = heads(prompt_tokens, layer, cache.device)
        cache.append(layer, k, v, [0])
    one_copy = cache.pools.bytes_in_use
    pages = prompt_tokens // PAGE_TOKENS
    entries = cache.page_entries(0, 0, pages)
    if adopt:
        cache.retain(entries)
        cache.free(0)
        for sequence in range(sequences):
            cache.adopt(sequence, entries, prompt_tokens)
    else:
        for sequence in range(1, sequences):
            assert cache.fork(0) == sequence
    with_all = cache.pools.bytes_in_use
    outputs = [go_on(cache, sequence, 1 + sequence, steps) for sequence in range(sequences)]
    of_prompt = cache.entries[:, :, :, :pages]
    prompt_pages = {int(entry) for entry in of_prompt.reshape(-1) if entry != NO_PAGE}
    prompt_bytes = sum(cache.pools.bytes_of(entry) for entry in prompt_pages)
    if adopt:
        cache.release(entries)
    differ, separate_bytes = 0, 0
    for sequence, found in enumerate(outputs):
        alone = make_cache(1, most, device)
        for layer in range(LAYERS):
            _, k, v = heads(prompt_tokens, layer, alone.device)
            alone.append(layer, k, v)
        expected = go_on(alone, 0, 1 + sequence, steps)
        differ += sum(not torch.equal(x, y) for x, y in zip(found, expected, strict=True))
        separate_bytes += alone.pools.bytes_in_use
        for layer in range(LAYERS):
            for side in Side:
                differ += not torch.equal(cache.read(layer, sequence)[side], alone.read(layer, 0)[side])
    cache.check()
    return {
        "way": "adopt" if adopt else "fork",
        "sequences": sequences,
        "prompt_tokens": prompt_tokens,
        "own_tokens": sum(steps),
        "bytes_of_one_copy": one_copy,
        "bytes_of_all_sequences_at_first": with_all,
        "prompt_pages_at_the_end": len(prompt_pages),
        "prompt_bytes_at_the_end": prompt_bytes,
        "bytes_at_the_end": cache.pools.bytes_in_use,
        "bytes_of_separate_caches_at_the_end": separate_bytes,
        "outputs": sequences * LAYERS * len(steps),
        "differ": differ,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=4096)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = []
    for adopt in (False, True):
        steps = [1, 1, 1, 60, 1, 64, 1]
        row = share(arguments.sequences, arguments.prompt_tokens, steps, adopt=adopt, device=arguments.device)
        rows.append(row)
        print(
            f"{row['way']}: {row['sequences']} sequences over {row['prompt_tokens']} tokens: one copy "
            f"{row['bytes_of_one_copy']} bytes, all {row['bytes_of_all_sequences_at_first']}; behind "
            f"{row['own_tokens']} tokens of each {row['bytes_at_the_end']}, of which the prompt "
            f"{row['prompt_bytes_at_the_end']} in {row['prompt_pages_at_the_end']} pages (separate caches "
            f"{row['bytes_of_separate_caches_at_the_end']}); {row['differ']} of {row['outputs']} outputs differ",
            flush=True,
        )
    if arguments.json is not None:
        device = device_record(torch.device(arguments.device))
        write_result(arguments.json, {**provenance({}, ("torch",)), "device": device, "rows": rows})


if __name__ == "__main__":
    main()
