"""Prompts that come in several calls: what tokens see, and all pages, are those of one call."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from kvpack.errors import CacheFullError, CacheInputError  # noqa: E402
from kvpack.format.pages import PageFormat  # noqa: E402
from kvpack.runtime.kv.attention import attention_with_kv_cache  # noqa: E402
from kvpack.runtime.kv.cache import KVCache  # noqa: E402
from kvpack.runtime.kv.steps import CELL_TOKENS  # noqa: E402

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16
OPTIONS = [{}, {"formats": PageFormat.INT4}, {"formats": PageFormat.INT2, "sinks": 0, "recent_tokens": 100}]
Qkv = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def make_cache(device: str, **options: Any) -> KVCache:
    defaults = {"num_layers": 1, "max_tokens": 8192, "slab_bytes": 1}
    return KVCache(num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, device=device, **(defaults | options))


def random_qkv(cache: KVCache, rows: int, tokens: int, seed: int = 0) -> Qkv:
    generator = torch.Generator().manual_seed(seed)
    heads = (HEADS, KV_HEADS, KV_HEADS)
    made = (torch.randn((rows, count, tokens, HEAD_DIM), generator=generator) for count in heads)
    q, k, v = (x.to(cache.dtype).to(cache.device) for x in made)
    return q, k, v


def part(x: Qkv, first: int, end: int) -> Qkv:
    q, k, v = (tensor[:, :, first:end] for tensor in x)
    return q, k, v


def pages(cache: KVCache, sequence: int = 0, layer: int = 0) -> list[bytes]:
    entries = cache.entries[layer, :, sequence]
    return [page.cpu().numpy().tobytes() for page in cache.read_pages(entries[entries != -1])]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", [*OPTIONS, {"budget": 0.4}], ids=str)
@pytest.mark.parametrize("step", [128, 300, 2048, 5000])
def test_pieces_of_any_size_leave_the_same_pages(step: int, options: dict[str, Any], device: str) -> None:
    """And the same results, but for rounding: sums over other tiles of queries."""
    whole, pieces = make_cache(device, **options), make_cache(device, **options)
    x, observe = random_qkv(whole, 1, 5000), "budget" in options
    expected, _ = attention_with_kv_cache(*x, whole, observe=observe)
    found = []
    # The shorter piece first, so that what is observed of the last tokens is in one piece.
    ends = [0, *range(4999 - 4999 // step * step or step, 5000, step), 5000]
    for first, end in itertools.pairwise(ends):
        options = {"partial": end < 5000, "observe": observe}
        found.append(attention_with_kv_cache(*part(x, first, end), pieces, **options)[0])
        assert pieces.length(0, 0) == end
    assert (torch.cat(found, 2).float() - expected.float()).abs().max() < (3e-4 if device == "cpu" else 2e-3)
    assert pages(pieces) == pages(whole)
    assert not pieces.table.waiting.any()
    pieces.check()


def test_what_waits_is_in_16_bits_until_a_token_behind_its_cell() -> None:
    cache = make_cache("cpu", formats=PageFormat.INT4)
    formats = [PageFormat.FP16] * (CELL_TOKENS // 64)
    x = random_qkv(cache, 1, 2200)
    attention_with_kv_cache(*part(x, 0, 1000), cache, partial=True)
    attention_with_kv_cache(*part(x, 1000, 2048), cache, partial=True)
    assert cache.precision_map(0)[:, 0, :32].tolist() == [formats] * 2
    assert cache.table.waiting.tolist() == [[2048]]
    attention_with_kv_cache(*part(x, 2048, 2100), cache, partial=True)
    assert cache.table.waiting.tolist() == [[52]]
    # The sinks' page and the newest one of the cell stay.
    settled = [PageFormat.FP16, *[PageFormat.INT4] * 30, PageFormat.FP16]
    assert cache.precision_map(0)[:, 0, :32].tolist() == [settled] * 2
    attention_with_kv_cache(*part(x, 2100, 2200), cache, partial=True)
    cache.settle()
    assert cache.precision_map(0)[:, 0, 30:36].tolist() == [[PageFormat.INT4] * 3 + [PageFormat.FP16] * 2 + [-1]] * 2
    assert not cache.table.waiting.any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_rows_of_a_padded_batch_have_what_they_have_alone(options: dict[str, Any], device: str) -> None:
    """Their cells end in different columns."""
    tokens, columns = [4500, 2048, 1, 2200], 4500
    cache, alone = (make_cache(device, max_sequences=4, **options) for _ in range(2))
    x = random_qkv(cache, 4, columns)
    for row, count in enumerate(tokens):
        for tensor in x:
            tensor[row, :, : columns - count] = math.nan
    found = []
    for first, end in ((0, 700), (700, 2300), (2300, 4499), (4499, 4500)):
        counts = [max(0, min(count - (columns - end), end - first)) for count in tokens]
        of_part = part(x, first, end)
        found.append(attention_with_kv_cache(*of_part, cache, tokens=counts, partial=end < columns)[0])
    out = torch.cat(found, 2)
    for row, count in enumerate(tokens):
        of_row = tuple(tensor[row : row + 1, :, columns - count :] for tensor in x)
        expected, _ = attention_with_kv_cache(*of_row, alone, sequences=[row])
        assert (out[row, :, columns - count :].float() - expected[0].float()).abs().max() < 2e-3
        assert pages(cache, row) == pages(alone, row)
    assert cache.lengths.tolist() == [tokens]


def test_a_graphs_step_ends_a_prompt() -> None:
    """It is planned for before the device appends its token, so what waits is quantized then."""
    cache = make_cache("cpu", num_layers=2, formats=PageFormat.INT4)
    x = random_qkv(cache, 1, 1000)
    for layer in range(2):
        attention_with_kv_cache(*x, cache, layer=layer, partial=True)
    cache.plan(1)
    assert cache.table.lengths.tolist() == [[1001]] * 2
    assert not cache.table.waiting.any()
    for layer in range(2):
        found = cache.precision_map(layer)[:, 0, :16].tolist()
        assert found == [[PageFormat.FP16, *[PageFormat.INT4] * 13, *[PageFormat.FP16] * 2]] * 2


def test_sequences_take_what_waits_with_them() -> None:
    """Forked, copied, cut and reordered in the midst of a prompt, they go on as if nothing had been."""
    cache = make_cache("cpu", max_sequences=3, num_layers=2, formats=PageFormat.INT4)
    x = random_qkv(cache, 1, 3000)
    for layer in range(2):
        attention_with_kv_cache(*part(x, 0, 2500), cache, layer=layer, sequences=[0], partial=True)
    cache.fork(0, 2)
    cache.select_sequences([2, 0, 2])
    assert cache.table.waiting.tolist() == [[452, 452, 452]] * 2
    cache.truncate(1, 2400)
    assert cache.table.waiting.tolist() == [[452, 352, 452]] * 2
    made = cache.copy()
    for layer in range(2):
        for found, sequence, first in ((cache, 1, 2400), (cache, 0, 2500), (made, 2, 2500)):
            attention_with_kv_cache(*part(x, first, 3000), found, layer=layer, sequences=[sequence])
    whole = make_cache("cpu", num_layers=2, formats=PageFormat.INT4)
    for layer in range(2):
        attention_with_kv_cache(*x, whole, layer=layer)
        assert pages(cache, 0, layer) == pages(cache, 1, layer) == pages(made, 2, layer) == pages(whole, 0, layer)
    cache.free(2)
    assert cache.table.waiting.tolist() == [[0, 0, 0]] * 2
    cache.free(0)
    cache.free(1)
    assert cache.pools.bytes_in_use == 0


def test_a_step_that_has_failed_half_way_is_taken_back() -> None:
    cache, whole = (make_cache("cpu", num_layers=2, formats=PageFormat.INT2) for _ in range(2))
    x = random_qkv(cache, 1, 2500)
    for layer in range(2):
        attention_with_kv_cache(*part(x, 0, 2048), cache, layer=layer, partial=True)
        attention_with_kv_cache(*x, whole, layer=layer)
    attention_with_kv_cache(*part(x, 2048, 2148), cache, layer=0, partial=True)
    with pytest.raises(CacheInputError, match="sequence 0 has 2048 tokens; 2049 of them"):
        cache.truncate(0, 2049, takes_back=True)
    cache.truncate(0, 2048, takes_back=True)
    assert cache.lengths.tolist() == cache.table.lengths.tolist() == [[2048], [2048]]
    for layer in range(2):
        attention_with_kv_cache(*part(x, 2048, 2500), cache, layer=layer)
        assert pages(cache, 0, layer) == pages(whole, 0, layer)


def test_no_room_for_a_part() -> None:
    """What has come stays, and what waits can be settled."""
    least = make_cache("cpu", formats=PageFormat.INT2)
    x = random_qkv(least, 1, 2000)
    attention_with_kv_cache(*part(x, 0, 1000), least, partial=True)
    cache = make_cache("cpu", formats=PageFormat.INT2, max_bytes=3 * least.pools.bytes_allocated // 2)
    attention_with_kv_cache(*part(x, 0, 1000), cache, partial=True)
    before = pages(cache)
    with pytest.raises(CacheFullError):
        attention_with_kv_cache(*part(x, 1000, 2000), cache, partial=True)
    assert pages(cache) == before
    assert cache.table.waiting.tolist() == [[1000]]
    cache.settle()
    assert cache.pools.bytes_in_use < least.pools.bytes_in_use / 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"partial": 1}, "partial is 1; True or False"),
        ({"partial": True, "chunk_tokens": 64}, "leave chunk_tokens and causal out"),
        ({"partial": True, "causal": False}, "leave chunk_tokens and causal out"),
    ],
)
def test_wrong_calls(options: dict[str, Any], message: str) -> None:
    cache = make_cache("cpu")
    with pytest.raises(CacheInputError, match=message):
        attention_with_kv_cache(*random_qkv(cache, 1, 10), cache, **options)
