"""Keys and values in vLLM's blocks to pages and back: kernels that take the block table, and gathering. Needs no vLLM.

    python benchmarks/vllm_blocks.py --json benchmarks/results/DATE-vllm-blocks.json
    python benchmarks/vllm_blocks.py --tokens 256 --layers 2 --rounds 2 --device cpu

A cache of Llama-3.1-8B's shape (32 layers, 8 KV heads of 128) in bf16, in blocks of 16 tokens that lie one after
another in memory, each token's heads together; a prompt's blocks are in no order. *Copy* is what the engine's thread
enqueues in the step that fills pages, before vLLM may overwrite its blocks: ``copy_ms`` until the device is done,
``engine_ms`` until the thread goes on. *Save* is all from blocks to the bytes of pages, *load* all from bytes of pages
on the device to blocks. Each is the median of some rounds, in which both ways take turns; pages and blocks of both ways
are compared first. Rates are of keys and values.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_common import device_record, print_table, provenance, synchronize, write_result

from kvpack import KVCache, PageFormat
from kvpack.format.pages import PAGE_TOKENS
from kvpack.integrations.vllm.kv_page_codec import PageCodec, PagedLayers
from kvpack.runtime.kv.block_table import BlockCache

_WARM_ROUNDS = 3
WAYS = ("gathered", "by_table")
TIMES = ("engine_ms", "copy_ms", "save_ms", "load_ms")


class Copies:
    """Both ways of one page format.

    Args:
        paged: vLLM's cache.
        ids: a prompt's blocks.
        page_format: of K and V.
    """

    def __init__(self, paged: PagedLayers, ids: list[int], tokens: int, page_format: PageFormat) -> None:
        layers = len(paged.layers)
        cache = KVCache(layers, paged.heads, paged.head_dim, PAGE_TOKENS, dtype=paged.dtype, device=paged.device)
        self.paged, self.ids, self.tokens, self.codec = paged, ids, tokens, PageCodec(cache)
        self.formats = np.full((layers, 2, tokens // PAGE_TOKENS), page_format, np.uint8)
        # On a CPU, too, to try this script.
        width = paged.head_dim
        paged.blocks = BlockCache(
            [one[..., :width] for one in paged.layers], [one[..., width:] for one in paged.layers]
        )

    def copy(self, way: str) -> Any:
        if way == "by_table":
            return self.codec.copy(self.paged.rows(self.ids, 0, self.tokens), self.formats)
        return self.paged.copy_out(self.ids, 0, self.tokens)

    def save(self, way: str) -> list[torch.Tensor]:
        if way == "by_table":
            return self.codec.quantized(self.copy(way))
        return self.codec.encode(self.paged.tokens_of(self.copy(way), 0, self.tokens), self.formats)

    def load(self, way: str, pages: list[torch.Tensor]) -> None:
        if way == "by_table":
            self.codec.put(pages, self.formats, 0, self.paged.rows(self.ids, 0, self.tokens))
        else:
            values = self.codec.decode(pages, self.formats, self.paged.device)
            self.paged.put(values, self.ids, 0, self.tokens)

    def check(self) -> None:
        """Pages and blocks of both ways are the same."""
        pages, others = (self.save(way) for way in WAYS)
        assert all(map(torch.equal, pages, others)), "pages differ"
        found = []
        for way in WAYS:
            for layer in self.paged.layers:
                layer.fill_(-1)
            self.load(way, pages)
            found.append([layer.clone() for layer in self.paged.layers])
        assert all(map(torch.equal, *found)), "blocks differ"


def milliseconds(call: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """(until the call is back, until the device is done)."""
    synchronize(device)
    began = time.perf_counter()
    call()
    back = time.perf_counter()
    synchronize(device)
    return 1e3 * (back - began), 1e3 * (time.perf_counter() - began)


def measure(copies: Copies, rounds: int) -> dict[str, dict[str, float]]:
    """Medians, of each way."""
    device = copies.paged.device
    pages = copies.save(WAYS[1])
    times: dict[str, dict[str, list[float]]] = {way: {name: [] for name in TIMES} for way in WAYS}
    for number in range(_WARM_ROUNDS + rounds):
        for way in WAYS:
            engine_ms, copy_ms = milliseconds(functools.partial(copies.copy, way), device)
            _, save_ms = milliseconds(functools.partial(copies.save, way), device)
            _, load_ms = milliseconds(functools.partial(copies.load, way, pages), device)
            if number >= _WARM_ROUNDS:
                for name, ms in zip(TIMES, (engine_ms, copy_ms, save_ms, load_ms), strict=True):
                    times[way][name].append(ms)
    return {way: {name: statistics.median(all_of) for name, all_of in found.items()} for way, found in times.items()}


def show(rows: list[dict[str, Any]], value_bytes: int) -> None:
    shown = [
        [
            row["format"],
            way,
            *(f"{ms:.3f}" for ms in row[way].values()),
            *(f"{value_bytes / row[way][name] / 1e6:.0f}" for name in TIMES[1:]),
        ]
        for row in rows
        for way in WAYS
    ]
    times = ["engine, ms", "copy, ms", "save, ms", "load, ms"]
    print_table(["pages", "way", *times, "copy, GB/s", "save, GB/s", "load, GB/s"], shown)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096, help="a multiple of 64 and of --block-tokens")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--block-tokens", type=int, default=16)
    parser.add_argument("--formats", nargs="+", default=["BF16", "INT8", "INT4", "INT2"])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.tokens % PAGE_TOKENS or options.tokens % options.block_tokens:
        parser.error(f"--tokens {options.tokens} is no multiple of {PAGE_TOKENS} and of --block-tokens")
    device = torch.device(options.device)
    blocks = 4 * options.tokens // options.block_tokens
    shape = (options.layers, blocks, options.block_tokens, options.kv_heads, 2 * options.head_dim)
    memory = torch.empty(shape, dtype=torch.bfloat16, device=device)
    ids = np.random.default_rng(0).permutation(blocks)[: options.tokens // options.block_tokens].tolist()
    paged = PagedLayers(list(memory.transpose(2, 3)), options.block_tokens)
    value_bytes = options.layers * options.tokens * options.kv_heads * 2 * options.head_dim * 2
    rows = []
    for name in options.formats:
        memory.normal_(generator=torch.Generator(device).manual_seed(0))
        copies = Copies(paged, ids, options.tokens, PageFormat[name])
        copies.check()
        rows.append({"format": name} | measure(copies, options.rounds))
    show(rows, value_bytes)
    if options.json is not None:
        names = ("tokens", "layers", "kv_heads", "head_dim", "block_tokens", "rounds")
        record = provenance({}, ("torch", "cupy-cuda13x", "cupy-cuda12x")) | {"device": device_record(device)}
        record |= {name: getattr(options, name) for name in names} | {"value_bytes": value_bytes, "rows": rows}
        write_result(options.json, record)


if __name__ == "__main__":
    main()
