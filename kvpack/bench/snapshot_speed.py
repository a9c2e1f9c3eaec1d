"""``kvpack bench snapshot`` on a GPU: a cache of an 8B Llama's shape saved and loaded, against a prefill.

The cache has 32 layers, and of KV heads as many as make 1,024 numbers of keys a token. Its pages are those of a context
that a model has read, again and again, so that their numbers take what those of a model take. Nothing is looked at in
them, so loading is checked by comparing all bytes, and a prefill is one layer with random weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from kvpack.bench.report import Row
from kvpack.bench.snapshot_report import prefill_row
from kvpack.format.pages import ENTRY_FORMAT_MASK, PAGE_TOKENS, PageFormat, Side
from kvpack.format.snapshot import SnapshotFile
from kvpack.runtime.kv.cache import KVCache
from kvpack.runtime.kv.snapshot import cache_for, load_cache, load_snapshot, save_snapshot

# Of Llama-3.1-8B.
LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE = 32, 4096, 32, 8, 128, 14336
ROPE_THETA = 500_000.0
PREFILL_TOKENS = (8192, 32768, 131072)
# Of the products with weights; attention sees the whole prompt at once.
CHUNK_TOKENS = 8192
_LOAD = "load from a warm file"
_ROUNDS = 3
_LIMIT_S = 12.0


def least_seconds(work: Callable[[], object], device: torch.device) -> float:
    """Of some runs, until the device is done: other load on the machine only ever adds."""
    best, spent = float("inf"), 0.0
    for _ in range(_ROUNDS):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken = time.perf_counter() - began
        best, spent = min(best, taken), spent + taken
        if spent > _LIMIT_S:
            break
    return best


# The cache ------------------------------------------------------------------------------------------------------------


def constructed_cache(layers: int, tokens: int, device: torch.device, *, heads: int = KV_HEADS) -> KVCache:
    """Pages of 4 bits of normal numbers around a mean of each channel: nobody's keys and values."""
    cache = KVCache(layers, heads, HEAD_DIM, tokens, formats=PageFormat.INT4, device=device)
    generator = torch.Generator(device=device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    for _ in range(0, tokens, CHUNK_TOKENS):
        for layer in range(layers):
            shape = 1, heads, min(CHUNK_TOKENS, tokens - cache.length(layer, 0)), HEAD_DIM
            keys = normal(*shape) + 3 * normal(1, heads, 1, HEAD_DIM)
            cache.append(layer, keys.half(), normal(*shape).half())
    return cache


def page_order(tokens: int, recent_tokens: int, pages: int) -> list[int]:
    """Which of the full pages of a context each of ``pages`` pages repeats: its first one first, the newest last."""
    have = tokens // PAGE_TOKENS
    settled = min(have, max(1, (tokens - recent_tokens) // PAGE_TOKENS))
    newest = list(range(settled, have))[: pages - 1]
    inner = list(range(1, settled)) or [0]
    return [0, *islice(cycle(inner), pages - 1 - len(newest)), *newest]


def tiled_cache(source: KVCache, file: SnapshotFile, tokens: int, *, layers: int = LAYERS) -> KVCache:
    """A cache of ``layers`` layers whose pages repeat those of ``source``, which has the file's: its layers, its heads
    and its full pages, in turn.

    Args:
        tokens: a multiple of 64.
    """
    header, device = file.header, source.device
    heads = max(1, KV_HEADS * HEAD_DIM // header.head_dim)
    formats = header.formats
    like = replace(
        header,
        layers=layers,
        kv_heads=heads,
        tokens=tokens,
        first_page=0,
        formats=None if formats is None else tuple(formats[layer % header.layers] for layer in range(layers)),
    )
    cache = cache_for(like, max_tokens=tokens, device=device)
    order = page_order(header.tokens, header.recent_tokens, tokens // PAGE_TOKENS)
    entries = source.entries[:, :, 0, order][np.arange(layers) % header.layers]
    made = cache.new_pages((entries & ENTRY_FORMAT_MASK).astype(np.uint8))
    of_head = torch.arange(heads, device=device) % header.kv_heads
    for layer in range(layers):
        for side in Side:
            found, places = np.unique(entries[layer, side], return_inverse=True)
            blocks = [block.index_select(0, of_head) for block in source.read_pages(found)]
            torch._foreach_copy_(cache.read_pages(made[layer, side]), [blocks[place] for place in places])
    cache.adopt(0, made, tokens)
    cache.release(made)
    return cache


def same_pages(one: KVCache, other: KVCache) -> bool:
    """Whether sequence 0 of two caches has the same bytes, page by page."""
    pages = one.length(0, 0) // PAGE_TOKENS
    for layer in range(one.num_layers):
        found = [cache.read_pages(cache.entries[layer, :, 0, :pages]) for cache in (one, other)]
        if not all(torch.equal(a, b) for a, b in zip(*found, strict=True)):
            return False
    return True


def coder_seconds(cache: KVCache, path: Path) -> tuple[float | None, float | None]:
    """Seconds in which kernels of the GPU's coder run when all pages of sequence 0 are encoded, and when those of the
    file that they were saved to are decoded, splitting pages and putting them together included; None without a GPU.

    What the host does meanwhile, files and the bus do not count: they are in the times of whole saves and loads.
    """
    if cache.device.type != "cuda":
        return None, None
    encode_s = _busy_seconds(lambda: save_snapshot(cache, path))
    loaded = load_cache(path, device=cache.device)
    loaded.free(0)  # the memory of its pages stays
    return encode_s, _busy_seconds(lambda: load_snapshot(loaded, path))


def _busy_seconds(work: Callable[[], object]) -> float:
    """Seconds in which at least one kernel runs while something is done. Copies and fills are none."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as profiler:  # without, torch warns
        work()
        torch.cuda.synchronize()
    ranges = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type.name == "CUDA" and not event.name.startswith(("Memcpy", "Memset"))
    )
    busy, reached = 0.0, 0.0
    for begin, end in ranges:
        busy += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return busy / 1e6


# Prefill --------------------------------------------------------------------------------------------------------------


class LlamaLayer:
    """One layer of a Llama of the 8B shape: bf16, random weights, plain torch."""

    def __init__(self, device: torch.device, scale: int = 1) -> None:
        """
        Args:
            scale: by what its widths are divided, for tests.
        """
        self.device = device
        self.heads, self.kv_heads, self.hidden = HEADS // scale, KV_HEADS // scale, HIDDEN // scale
        self.intermediate = INTERMEDIATE // scale
        kv = self.kv_heads * HEAD_DIM
        self.qkv, self.o = self._weight(self.hidden + 2 * kv, self.hidden), self._weight(self.hidden, self.hidden)
        self.gate_up = self._weight(2 * self.intermediate, self.hidden)
        self.down = self._weight(self.hidden, self.intermediate)
        self.norm = torch.ones(self.hidden, dtype=torch.bfloat16, device=device)
        self.frequencies = ROPE_THETA ** (-torch.arange(HEAD_DIM // 2, device=device) / (HEAD_DIM // 2))

    def _weight(self, rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, device=self.device, dtype=torch.bfloat16) * columns**-0.5

    def _turned(self, x: torch.Tensor, first: int) -> torch.Tensor:
        """[tokens, heads, head_dim] by their positions, which begin with ``first``."""
        positions = torch.arange(first, first + len(x), device=self.device)
        angles = (positions[:, None] * self.frequencies)[:, None]
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    def _normed(self, x: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(x, (self.hidden,), self.norm)

    def prefill(self, x: torch.Tensor) -> torch.Tensor:
        """Hidden states bf16 [tokens, hidden] behind the layer, of those before it."""
        kv, chunks = self.kv_heads, range(0, len(x), CHUNK_TOKENS)
        heads = torch.empty(len(x), self.heads + 2 * kv, HEAD_DIM, dtype=x.dtype, device=self.device)
        for first in chunks:
            part = functional.linear(self._normed(x[first : first + CHUNK_TOKENS]), self.qkv)
            part = part.view(len(part), -1, HEAD_DIM)
            end = first + len(part)
            heads[first:end, : self.heads + kv] = self._turned(part[:, : self.heads + kv], first)
            heads[first:end, self.heads + kv :] = part[:, self.heads + kv :]
        q, k, v = (part.transpose(0, 1)[None] for part in heads.split([self.heads, kv, kv], dim=1))
        seen = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        seen = seen[0].transpose(0, 1).reshape(len(x), self.hidden)
        out = torch.empty_like(x)
        for first in chunks:
            rows = slice(first, first + CHUNK_TOKENS)
            after = x[rows] + functional.linear(seen[rows], self.o)
            gate, up = functional.linear(self._normed(after), self.gate_up).chunk(2, dim=-1)
            out[rows] = after + functional.linear(functional.silu(gate) * up, self.down)
        return out


@torch.no_grad()
def layer_seconds(layer: LlamaLayer, tokens: int) -> float | None:
    """Of one layer's prefill; None where the device has no memory for it."""
    try:
        x = torch.randn(tokens, layer.hidden, device=layer.device, dtype=torch.bfloat16)
        layer.prefill(x)  # chooses kernels
        return least_seconds(lambda: layer.prefill(x), layer.device)
    except torch.OutOfMemoryError:
        return None


# All of it ------------------------------------------------------------------------------------------------------------


def measure_speed(
    source: Path,
    folder: Path,
    *,
    tokens: int,
    threads: int | None,
    is_real: bool,
    say: Callable[[str], None],
    device: torch.device | None = None,
    layers: int = LAYERS,
    prefill_tokens: tuple[int, ...] = PREFILL_TOKENS,
    layer: LlamaLayer | None = None,
) -> Row:
    """``shape``, ``speed`` and ``prefill`` of the report.

    Args:
        source: a context whose pages are repeated.
        folder: where the file is written that is loaded.
        tokens: of the cache, a multiple of 64.
        threads: of the CPU where it codes; all cores by default.
        is_real: whether the source's pages are of a model.
        device: torch's current GPU, if not given; the others are for tests, too.

    Raises:
        AssertionError: pages are not the same when they have been saved and loaded.
        CacheFullError, OSError, SnapshotError
    """
    device = torch.device("cuda", torch.cuda.current_device()) if device is None else device
    shape, seconds = _files(source, folder / "context", tokens, threads, device, layers, say)
    speed: list[Row] = [
        {
            "name": name,
            "seconds": taken,
            "elements_per_s": None if taken is None else shape["elements"] / taken,
            "gb_per_s": None if taken is None else shape["page_bytes"] / taken / 1e9,
        }
        for name, taken in seconds.items()
    ]
    load_s = seconds[_LOAD]
    assert load_s is not None
    layer = LlamaLayer(device) if layer is None else layer
    prefill = []
    for count in prefill_tokens:
        say(f"prefill of {count} tokens")
        layer_s = layer_seconds(layer, count)
        if layer_s is not None:
            prefill.append(prefill_row(count, layer_s, LAYERS, shape, load_s, is_real=is_real))
    return {"shape": shape, "speed": speed, "prefill": prefill}


def _files(
    source: Path,
    path: Path,
    tokens: int,
    threads: int | None,
    device: torch.device,
    layers: int,
    say: Callable[[str], None],
) -> tuple[Row, dict[str, float | None]]:
    """``shape`` of the report, and seconds by name. No page is left on the device."""
    say("pages")
    with SnapshotFile(source) as file:
        cache = tiled_cache(load_cache(source, device=device, threads=threads), file, tokens, layers=layers)
    say("save")
    save_s = least_seconds(lambda: save_snapshot(cache, path, threads=threads), device)
    say("load")
    if not same_pages(load_cache(path, device=device, threads=threads), cache):
        raise AssertionError("pages are not the same when they have been saved and loaded")
    load_s = least_seconds(lambda: load_cache(path, device=device, threads=threads), device)
    encode_s, decode_s = coder_seconds(cache, path)
    with SnapshotFile(path) as file:
        page_bytes = file.page_bytes
    elements = len(Side) * layers * cache.num_kv_heads * cache.head_dim * tokens
    shape: Row = {
        "layers": layers,
        "kv_heads": cache.num_kv_heads,
        "head_dim": cache.head_dim,
        "tokens": tokens,
        "elements": elements,
        "page_bytes": page_bytes,
        "fp16_bytes": 2 * elements,
        "file_bytes": path.stat().st_size,
    }
    return shape, {
        "encode on the GPU": encode_s,
        "decode on the GPU": decode_s,
        "save": save_s,
        _LOAD: load_s,
        "read the warm file": _read_seconds(path, device),
    }


def _read_seconds(path: Path, device: torch.device) -> float:
    buffer = memoryview(bytearray(path.stat().st_size))

    def read() -> None:
        done = 0
        with path.open("rb", buffering=0) as stream:
            while count := stream.readinto(buffer[done:]):  # at most 2 GiB a call
                done += count

    return least_seconds(read, device)
