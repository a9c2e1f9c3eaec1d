"""Keys and values that follow from a page's name, in a cache as vLLM has it: what comes back can be judged."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvpack.format.pages import PAGE_TOKENS, PageFormat
from kvpack.integrations.vllm.kv_identity import rank_fingerprint, text_digest
from kvpack.integrations.vllm.kv_page_codec import PagedLayers
from kvpack.integrations.vllm.kv_page_store import PageStore
from kvpack.integrations.vllm.kv_plan import Load, PageRange
from kvpack.runtime.kv.prefix_hash import chained, root_hash, token_pages

LAYERS, HEADS, HEAD_DIM, BLOCKS = 3, 2, 32, 64
BF16 = PageFormat.BF16


def make_paged(
    block_tokens: int = 16, *, splits: int = 1, device: str = "cpu", blocks: int = BLOCKS, places: Any = None
) -> PagedLayers:
    """A cache of zeros, whose blocks consist of so many kernel blocks."""
    shape = (blocks * splits, HEADS, block_tokens // splits, 2 * HEAD_DIM)
    return PagedLayers(
        [torch.zeros(shape, dtype=torch.bfloat16, device=device) for _ in range(LAYERS)], block_tokens, places
    )


def fingerprint(model: str = "tiny", rank: int = 0) -> Any:
    return rank_fingerprint({"hidden": 8}, text_digest(model), dtype="bfloat16", world={"tensor": 1}, rank=rank)


def make_store(paged: PagedLayers, directory: Path | None = None, **options: Any) -> PageStore:
    given = {"host_bytes": 1 << 20, "step_tokens": 1024, "queue_bytes": 1 << 24, "fingerprint": fingerprint()} | options
    return PageStore(paged, given.pop("formats", (BF16, BF16)), directory=directory, **given)


def page_values(page_hash: bytes, device: str | torch.device = "cpu") -> torch.Tensor:
    """[layers, 64, heads, 2·head_dim]."""
    random = np.random.default_rng(int.from_bytes(page_hash[:8], "little"))
    values = random.standard_normal((LAYERS, PAGE_TOKENS, HEADS, 2 * HEAD_DIM), np.float32)
    return torch.from_numpy(values).bfloat16().to(device)


def page_range(tokens: Sequence[int], block_ids: Sequence[int], *, first: int = 0, model: str = "tiny") -> PageRange:
    pages = token_pages(list(tokens))
    hashes = chained(root_hash({"model": model}), pages)
    parent = hashes[first - 1] if first else None
    return PageRange(first, parent, tuple(hashes[first:]), tuple(pages[first:]), tuple(block_ids))


def blocks_for(paged: PagedLayers, tokens: int, seed: int) -> list[int]:
    """A block table in no order."""
    count = -(-tokens // paged.block_tokens)
    blocks = paged.layers[0].shape[0] * paged.kernel_tokens // paged.block_tokens
    return np.random.default_rng(seed).permutation(blocks)[:count].tolist()


def compute(paged: PagedLayers, pages: PageRange) -> None:
    """Stands for a model."""
    values = torch.cat([page_values(one, paged.device) for one in pages.hashes], 1)
    missing = -values.shape[1] % paged.block_tokens
    values = torch.cat([values, values.new_zeros(LAYERS, missing, HEADS, 2 * HEAD_DIM)], 1)
    paged.put(values, pages.block_ids, 0, values.shape[1])


def gathered(paged: PagedLayers, block_ids: Sequence[int], first: int, end: int) -> torch.Tensor:
    return paged.tokens_of(paged.copy_out(block_ids, first, end), first, end)


def save(store: PageStore, paged: PagedLayers, tokens: Sequence[int], seed: int = 0) -> PageRange:
    """A prompt is computed, and saved; waits until it is."""
    pages = page_range(tokens, blocks_for(paged, len(tokens), seed))
    compute(paged, pages)
    store.save(pages)
    store.drain()
    return pages


def load(store: PageStore, paged: PagedLayers, tokens: Sequence[int], *, first: int = 0, seed: int = 1) -> int:
    """A prompt's full pages are loaded from a token on; how many tokens have come, which are compared."""
    pages = page_range(tokens, blocks_for(paged, len(tokens), seed), first=first // PAGE_TOKENS)
    end = len(tokens) // PAGE_TOKENS * PAGE_TOKENS // paged.block_tokens * paged.block_tokens
    for layer in paged.layers:
        layer.zero_()
    store.load(Load("request", first, end, pages))
    store.drain()
    ((name, failed),) = store.take_loaded()
    assert name == "request"
    reached = end if not failed else pages.block_ids.index(failed[0]) * paged.block_tokens
    assert failed == list(pages.block_ids[-(-reached // paged.block_tokens) : -(-end // paged.block_tokens)])
    expected = torch.cat([page_values(one, paged.device) for one in pages.hashes], 1)
    begin = first // PAGE_TOKENS * PAGE_TOKENS
    found = gathered(paged, pages.block_ids, 0, len(tokens))
    assert torch.equal(found[:, first:reached], expected[:, first - begin : reached - begin])
    assert not found[:, :first].any(), "what is before the tokens that were asked for is touched"
    assert not found[:, reached:].any(), "what is behind the tokens that have come is touched"
    return reached - first
