"""Rows of a call that bring different numbers of tokens: what each would have alone, and nothing of the padding."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import emulator
import numpy as np
import pytest
from pool_dump import cache_state

from kvpack.errors import CacheFullError, CacheInputError
from kvpack.format.pages import PageFormat

torch = pytest.importorskip("torch")

from emulated_device import emulated_launch  # noqa: E402

from kvpack.runtime.device import kernels  # noqa: E402
from kvpack.runtime.kv import attention, page_kernels  # noqa: E402
from kvpack.runtime.kv.attention import attention_with_kv_cache  # noqa: E402
from kvpack.runtime.kv.cache import KVCache  # noqa: E402

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16
Qkv = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def make_cache(device: str, **options: Any) -> KVCache:
    defaults = {"num_layers": 1, "max_tokens": 2048, "max_sequences": 3, "slab_bytes": 1}
    return KVCache(num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, device=device, **(defaults | options))


def padded(cache: KVCache, tokens: list[int], columns: int, seed: int = 0) -> Qkv:
    """q, k and v that are no numbers in the columns which are not tokens."""
    rng = np.random.default_rng(seed)
    made = []
    for heads in (HEADS, KV_HEADS, KV_HEADS):
        x = rng.normal(0, 1, (len(tokens), heads, columns, HEAD_DIM))
        for row, count in enumerate(tokens):
            x[row, :, : columns - count] = math.nan
        made.append(torch.from_numpy(x).to(cache.dtype).to(cache.device))
    return made[0], made[1], made[2]


def of_row(x: Qkv, row: int, count: int) -> Qkv:
    q, k, v = (tensor[row : row + 1, :, tensor.shape[2] - count :] for tensor in x)
    return q, k, v


# How many tokens each row brings, of how many columns: prompts, steps, a row that waits, more than a page, none at all.
CALLS = [([3, 0, 200], 200), ([1, 1, 1], 1), ([0, 1, 1], 1), ([70, 64, 5], 70), ([5, 5, 5], 9), ([0, 0, 0], 2)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "options", [{}, {"formats": PageFormat.INT4}, {"formats": PageFormat.INT2, "sinks": 0}], ids=str
)
@pytest.mark.parametrize("masks", [{}, {"window": 40, "sinks": 4}, {"causal": False}], ids=str)
def test_rows_have_what_they_would_have_alone(masks: dict[str, Any], options: dict[str, Any], device: str) -> None:
    cache, alone = make_cache(device, **options), make_cache(device, **options)
    for seed, (tokens, columns) in enumerate(CALLS):
        x = padded(cache, tokens, columns, seed)
        out, _ = attention_with_kv_cache(*x, cache, tokens=tokens, **masks)
        for row, count in enumerate(tokens):
            assert not out[row, :, : columns - count].any()
            if count:
                expected, _ = attention_with_kv_cache(*of_row(x, row, count), alone, sequences=[row], **masks)
                found = out[row, :, columns - count :]
                assert (found.float() - expected[0].float()).abs().max() < (1e-6 if device == "cpu" else 2e-3)
            for found, expected in zip(cache.read(0, row), alone.read(0, row), strict=True):
                assert torch.equal(found, expected)
    assert cache.lengths.tolist() == cache.table.lengths.tolist() == [[79, 71, 212]]
    assert cache.entries.shape == alone.entries.shape
    assert (cache.precision_map(0) == alone.precision_map(0)).all()
    cache.check()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("chunk_tokens", [50, 64, 199])
def test_chunks_of_padded_prompts(chunk_tokens: int, device: str) -> None:
    """Columns are counted, so that a chunk may be padding alone."""
    tokens, columns = [200, 30, 120], 200
    cache, alone = make_cache(device), make_cache(device)
    x = padded(cache, tokens, columns)
    done: list[tuple[int, int]] = []
    out, _ = attention_with_kv_cache(
        *x, cache, tokens=tokens, chunk_tokens=chunk_tokens, progress=lambda *parts: done.append(parts)
    )
    for row, count in enumerate(tokens):
        expected, _ = attention_with_kv_cache(*of_row(x, row, count), alone, sequences=[row])
        assert (out[row, :, columns - count :].float() - expected[0].float()).abs().max() < 2e-3
        assert not out[row, :, : columns - count].any()
        for found, wanted in zip(cache.read(0, row), alone.read(0, row), strict=True):
            assert torch.equal(found, wanted)
    assert done == [(min(end, columns), columns) for end in range(chunk_tokens, columns + chunk_tokens, chunk_tokens)]
    cache.check()


@pytest.mark.parametrize("device", DEVICES)
def test_padding_is_not_observed_and_does_not_count_as_queries(device: str) -> None:
    """Masses, and what keys are measured with, are those of rows by themselves."""
    tokens = [200, 3, 130]
    cache, alone = (make_cache(device, budget=0.4) for _ in range(2))
    x = padded(cache, tokens, 200)
    attention_with_kv_cache(*x, cache, tokens=tokens, observe=True)
    for row, count in enumerate(tokens):
        attention_with_kv_cache(*of_row(x, row, count), alone, sequences=[row], observe=True)
    assert (cache.mass - alone.mass).abs().max() <= 1 << 12  # of 2^32
    assert cache.observed_steps.tolist() == alone.observed_steps.tolist() == [[1, 1, 1]]
    q = torch.cat([x[0][row, :, 200 - count :] for row, count in enumerate(tokens)], dim=1)
    expected = (q.float() / math.sqrt(HEAD_DIM)).square().unflatten(0, (KV_HEADS, -1)).sum((1, 2))
    queries = cache._queries[0]
    assert queries is not None
    assert queries.count == 2 * sum(tokens)
    assert torch.allclose(queries.squares, expected, rtol=1e-5)
    assert np.isfinite(cache.errors[0]).all()


@pytest.mark.parametrize("device", DEVICES)
def test_padded_tokens_that_are_not_kept(device: str) -> None:
    cache = make_cache(device, formats=PageFormat.INT4)
    attention_with_kv_cache(*padded(cache, [150, 1, 62], 150), cache, tokens=[150, 1, 62])
    tokens, kept = [3, 70, 0], make_cache(device, formats=PageFormat.INT4)
    attention_with_kv_cache(*padded(kept, [150, 1, 62], 150), kept, tokens=[150, 1, 62])
    x = padded(cache, tokens, 70, 1)
    before = cache_state(cache)
    found, _ = attention_with_kv_cache(*x, cache, tokens=tokens, update_cache=False)
    expected, _ = attention_with_kv_cache(*x, kept, tokens=tokens)
    assert torch.equal(found, expected)
    after = cache_state(cache)
    for name in ("entries", "page_table", "lengths"):
        assert after[name] == before[name]
    # Nothing is left behind the sequences' ends that is no number.
    with torch.inference_mode():
        again, _ = attention_with_kv_cache(*padded(cache, [1, 1, 1], 1, 2), cache)
    assert again.isfinite().all()
    cache.check()


@pytest.mark.parametrize("device", DEVICES)
def test_queries_alone_of_different_numbers(device: str) -> None:
    cache = make_cache(device)
    q, k, v = padded(cache, [40, 7, 90], 90)
    expected, _ = attention_with_kv_cache(q, k, v, cache, tokens=[40, 7, 90])
    found, _ = attention_with_kv_cache(q[:, :, 80:], None, None, cache, tokens=[10, 7, 0])
    assert (found[0].float() - expected[0, :, 80:].float()).abs().max() < 2e-3
    assert (found[1].float() - expected[1, :, 80:].float()).abs().max() < 2e-3
    assert not found[2].any()
    with pytest.raises(CacheInputError, match="sequence 1: queries alone are of the last tokens in the cache"):
        attention_with_kv_cache(q[:, :, 80:], None, None, cache, tokens=[10, 8, 0])


def test_a_budget_is_kept_and_measured_on_tokens_alone() -> None:
    cache = make_cache("cpu", budget=0.3, max_tokens=8192)
    x = padded(cache, [3000, 20, 700], 3000)
    attention_with_kv_cache(*x, cache, tokens=[3000, 20, 700], chunk_tokens=3000)
    assert np.isfinite(cache.errors).all()
    assert (cache.errors[0, :, :-1] > 0).all()
    read = cache.read(0, 2)
    for found, given in zip(read, x[1:], strict=True):
        assert torch.equal(found[:, :64], given[2, :, 2300:2364])  # the sinks' page
        assert torch.equal(found[:, 640:], given[2, :, 2940:])


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([1, 2], "tokens has 2 numbers for a batch of 3"),
        ([1, 2, 6], r"tokens is \[1, 2, 6\]; each is of the 5 that k, v and q have"),
        ([1, -1, 2], r"tokens is \[1, -1, 2\]"),
        ([1, 1.5, 2], "tokens is 1.5; an integer is wanted"),
    ],
)
def test_numbers_that_are_refused(tokens: Any, message: str) -> None:
    cache = make_cache("cpu")
    attention_with_kv_cache(*padded(cache, [5, 5, 5], 5), cache)
    before = cache_state(cache)
    with pytest.raises(CacheInputError, match=message):
        attention_with_kv_cache(*padded(cache, [5, 5, 5], 5), cache, tokens=tokens)
    if 1.5 in tokens:
        message = "an integer for each row is wanted"
    with pytest.raises(CacheInputError, match=message):
        cache.append(0, *padded(cache, [5, 5, 5], 5)[1:], tokens=tokens)
    assert cache_state(cache) == before


def test_what_fails_leaves_the_cache_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = make_cache("cpu", max_tokens=220, formats=PageFormat.INT4)
    attention_with_kv_cache(*padded(cache, [200, 63, 1], 200), cache, tokens=[200, 63, 1])
    before = cache_state(cache)
    with pytest.raises(CacheFullError, match="sequence 0: 21 tokens behind 200 are more than the 220"):
        attention_with_kv_cache(*padded(cache, [21, 0, 30], 30), cache, tokens=[21, 0, 30])
    assert cache_state(cache) == before
    attention_with_kv_cache(*padded(cache, [20, 0, 30], 30), cache, tokens=[20, 0, 30], update_cache=False)

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no compiler")

    with monkeypatch.context() as patch:
        patch.setattr(attention, "_attend_on_cpu", fail)
        with pytest.raises(RuntimeError, match="no compiler"):
            attention_with_kv_cache(*padded(cache, [20, 0, 80], 90), cache, tokens=[20, 0, 80])
    for name in ("entries", "page_table", "lengths"):
        assert cache_state(cache)[name] == before[name]
    cache.check()


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is:DeprecationWarning")
def test_compiled() -> None:
    torch._dynamo.reset()
    caches = [make_cache("cpu", formats=PageFormat.INT4) for _ in range(2)]

    def attend(cache: KVCache, x: Qkv, tokens: list[int]) -> torch.Tensor:
        return attention_with_kv_cache(*x, cache, tokens=tokens)[0] + 1

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for seed, (tokens, columns) in enumerate(CALLS[:4]):
        x = padded(caches[0], tokens, columns, seed)
        assert torch.equal(compiled(caches[0], x, tokens), attend(caches[1], x, tokens))
    assert cache_state(caches[0])["pages"] == cache_state(caches[1])["pages"]


@pytest.mark.skipif(emulator.compiler() is None, reason="no C++ compiler for the emulator")
def test_kernels_give_what_the_cpu_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens written and attended to by the kernels, without a GPU."""
    caches = [make_cache("cpu", max_bytes=4 << 20) for _ in range(2)]
    for seed, (tokens, columns) in enumerate(CALLS):
        x = padded(caches[0], tokens, columns, seed)
        expected, _ = attention_with_kv_cache(*x, caches[0], tokens=tokens, observe=True)
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "launch", emulated_launch)
            patch.setattr(page_kernels, "_runs_kernels", lambda _: True)
            patch.setattr(attention, "_attend_on_cpu", attention._attend_by_kernel)
            patch.setattr(attention, "device_limits", lambda _: SimpleNamespace(multiprocessors=4))
            found, _ = attention_with_kv_cache(*x, caches[1], tokens=tokens, observe=True)
        assert (found.double() - expected.double()).abs().max() < 2e-3
        assert cache_state(caches[0])["pages"] == cache_state(caches[1])["pages"]
    assert (caches[0].mass - caches[1].mass).abs().max() < 1 << 20  # of 2^32
    assert torch.equal(caches[0].observed_steps, caches[1].observed_steps)
    caches[1].check()


def test_a_capture_is_refused_before_rows_are_picked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Picking copies places to the device, which fails in a capture and leaves torch's random numbers broken."""

    def pick(*_: object) -> None:
        raise AssertionError("rows are picked")

    cache = make_cache("cpu")
    x = padded(cache, [1, 1, 1], 3)
    monkeypatch.setattr(KVCache, "_is_captured", lambda _: True)
    monkeypatch.setattr(attention, "_rows_of", pick)
    with pytest.raises(CacheInputError, match="a CUDA graph repeats a call in which all rows bring as many"):
        attention_with_kv_cache(*x, cache, tokens=[1, 0, 1])


@pytest.mark.gpu
def test_a_graph_takes_equal_numbers_alone() -> None:
    cache = make_cache("cuda")
    x = padded(cache, [1, 1, 1], 3)
    attention_with_kv_cache(*x, cache, tokens=[1, 1, 1])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = attention_with_kv_cache(*x, cache, tokens=[1, 1, 1])
        with pytest.raises(CacheInputError, match="a CUDA graph repeats a call in which all rows bring as many"):
            attention_with_kv_cache(*x, cache, tokens=[1, 0, 1])
    cache.plan()
    graph.replay()
    assert not out[:, :, :2].any()
    assert out[:, :, 2].isfinite().all()
    assert cache.lengths.tolist() == [[2, 2, 2]]
