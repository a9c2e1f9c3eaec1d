"""``attention_with_kv_cache``: on the CPU, and on a GPU."""

from __future__ import annotations

import copy
import functools
import gc
import itertools
import math
import pickle
import re
from types import SimpleNamespace
from typing import Any

import emulator
import numpy as np
import pytest
from paged_values import attention_error, by_kv_head, probabilities
from pool_dump import cache_state

from kvpack.encode.page_coder import dequantize_blocks, quantize_blocks
from kvpack.errors import CacheFullError, CacheInputError, PageError
from kvpack.format.pages import PageFormat, PageLayout, Side

torch = pytest.importorskip("torch")

from emulated_device import emulated_launch  # noqa: E402
from torch._dynamo.testing import CompileCounterWithBackend  # noqa: E402

from kvpack.runtime.device import kernels  # noqa: E402
from kvpack.runtime.kv import attention  # noqa: E402
from kvpack.runtime.kv.attention import attention_with_kv_cache  # noqa: E402
from kvpack.runtime.kv.cache import MASS_UNIT, KVCache  # noqa: E402

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
FP16, BF16, INT8, INT4, INT3, INT2, E4M3, E5M2 = PageFormat
KV_HEADS = {1: 3, 2: 2, 4: 2, 7: 2, 8: 1, 32: 1}


def make_cache(device: str, num_kv_heads: int = 2, head_dim: int = 64, **options: Any) -> KVCache:
    defaults = {"num_layers": 1, "max_tokens": 2048, "max_sequences": 1, "slab_bytes": 1}
    return KVCache(num_kv_heads=num_kv_heads, head_dim=head_dim, device=device, **(defaults | options))


def random_qkv(
    cache: KVCache, heads: int, tokens: int, *, batch: int | None = None, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random q, k and v whose channels differ in size; keys are not centered."""
    rng = np.random.default_rng(seed)
    batch = cache.max_sequences if batch is None else batch
    q = rng.normal(0, 1, (batch, heads, tokens, cache.head_dim))
    k, v = rng.normal(0, 1, (2, batch, cache.num_kv_heads, tokens, cache.head_dim))
    k = k * np.exp(rng.normal(0, 0.5, cache.head_dim)) + rng.normal(0, 0.5, cache.head_dim)
    return tuple(torch.from_numpy(x).to(cache.dtype).to(cache.device) for x in (q, k, v))  # type: ignore[return-value]


def held(cache: KVCache, layer: int, sequence: int) -> list[np.ndarray]:
    return [x.double().cpu().numpy() for x in cache.read(layer, sequence, torch.float32)]


def defined(
    q: torch.Tensor, k: np.ndarray, v: np.ndarray, *, window: int | None = None, **options: Any
) -> tuple[np.ndarray, np.ndarray]:
    """fp64 results [heads, tokens, head_dim] and probabilities [heads, tokens, places], of one sequence."""
    p = probabilities(q.double().cpu().numpy(), k, 1 / math.sqrt(q.shape[-1]), window or 0, **options)
    return by_kv_head(p, v), p


def attend_and_compare(
    cache: KVCache, heads: int, tokens: int, seed: int, *, sequences: list[int] | None = None, **options: Any
) -> float:
    """The largest error of a call, against what the cache held before it and the new tokens."""
    ids = list(range(cache.max_sequences)) if sequences is None else sequences
    before = [held(cache, 0, sequence) for sequence in ids]
    q, k, v = random_qkv(cache, heads, tokens, batch=len(ids), seed=seed)
    out, same = attention_with_kv_cache(q, k, v, cache, layer=0, sequences=sequences, **options)
    assert same is cache
    names = ("causal", "window", "sinks", "softcap", "sink_logits")
    masks = {name: value for name, value in options.items() if name in names}
    errors = []
    for row, (old_k, old_v) in enumerate(before):
        new_k, new_v = (x[row].double().cpu().numpy() for x in (k, v))
        expected, _ = defined(q[row], np.concatenate([old_k, new_k], 1), np.concatenate([old_v, new_v], 1), **masks)
        errors.append(attention_error(out[row], expected))
    return max(errors)


LENGTHS = [1, 63, 64, 65, 193]
FORMATS = {
    **{page_format.name: page_format for page_format in (FP16, INT8, INT4, INT3, INT2, E4M3, E5M2)},
    "INT8 and INT2": [(INT8, INT2)],
    "INT3 and INT4": [(INT3, INT4)],
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("formats", FORMATS)
@pytest.mark.parametrize("ratio", KV_HEADS)
def test_prompts_then_steps(ratio: int, formats: str, device: str) -> None:
    """Sequences of different lengths begin one after another and go on together."""
    heads = ratio * KV_HEADS[ratio]
    cache = make_cache(device, KV_HEADS[ratio], max_sequences=len(LENGTHS), formats=FORMATS[formats], sinks=0)
    errors = [attend_and_compare(cache, heads, n, i, sequences=[i]) for i, n in enumerate(LENGTHS)]
    errors += [attend_and_compare(cache, heads, tokens, 10 + tokens) for tokens in (1, 1, 3, 65, 1)]
    assert max(errors) < 1e-3
    assert [cache.length(0, i) for i in range(len(LENGTHS))] == [n + 71 for n in LENGTHS]
    quantized = cache.precision_map(0)[:, 4, :3]
    wanted = FORMATS[formats]
    assert quantized.tolist() == [[f] * 3 for f in (wanted if isinstance(wanted, PageFormat) else 0, 0)[:1] * 2] or (
        isinstance(wanted, list) and quantized.tolist() == [[f] * 3 for f in wanted[0]]
    )
    cache.check()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_dimensions_and_types(head_dim: int, dtype: torch.dtype, device: str) -> None:
    cache = make_cache(device, 2, head_dim, dtype=dtype, budget=0.35)
    assert max(attend_and_compare(cache, 4, tokens, tokens) for tokens in (250, 1, 200, 1, 1)) < 1e-3
    assert len(np.unique(cache.precision_map(0)[:, 0, 1:6])) > 1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("ratio", [1, 4])
@pytest.mark.parametrize(
    "options",
    [
        *(
            {"window": 1},
            {"window": 64, "sinks": 4},
            {"window": 100, "sinks": 70},
            {"window": 1 << 40},
            {"causal": False},
        ),
        {"window": 3, "sinks": 1 << 40},
    ],
    ids=str,
)
def test_masks(options: dict[str, Any], ratio: int, device: str) -> None:
    cache = make_cache(device, formats=INT8)
    errors = [attend_and_compare(cache, 2 * ratio, tokens, tokens, **options) for tokens in (1, 330, 1, 4, 100)]
    assert max(errors) < 1e-3


# A cap that changes scores, whose deviation is above 1; one logit that takes nearly all of a head's attention.
SOFTCAP = 2.0
SINK_LOGITS = [7.0, -math.inf, 12.0, 6.5, 8.0, 7.0, 9.0, 7.5]
VARIANTS = [("softcap",), ("sink_logits",), ("softcap", "sink_logits")]


def variant_options(names: tuple[str, ...], heads: int, device: str) -> dict[str, Any]:
    values = {"softcap": SOFTCAP, "sink_logits": torch.tensor(SINK_LOGITS[:heads], device=device)}
    return {name: values[name] for name in names}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("masks", [{}, {"window": 100, "sinks": 4}, {"causal": False}], ids=str)
@pytest.mark.parametrize("names", VARIANTS, ids="-".join)
def test_softcap_and_sink_logits(names: tuple[str, ...], masks: dict[str, Any], device: str) -> None:
    """Sequences of different lengths, steps and prompts, pages of 16 and of 8 bits; and they do change the result."""
    options = masks | variant_options(names, 8, device)
    cache = make_cache(device, max_sequences=len(LENGTHS), formats=INT8)
    errors = [attend_and_compare(cache, 8, n, i, sequences=[i], **options) for i, n in enumerate(LENGTHS)]
    errors += [attend_and_compare(cache, 8, tokens, 10 + tokens, **options) for tokens in (1, 3, 130, 1)]
    assert max(errors) < 1e-3
    x = random_qkv(cache, 8, 1)
    found, without = (attention_with_kv_cache(*x, cache, update_cache=False, **o)[0] for o in (options, masks))
    changed = (found.float() - without.float()).abs().amax((0, 2, 3)) > 0.01
    assert changed.tolist() == ([True] * 8 if "softcap" in names else [a > -math.inf for a in SINK_LOGITS])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [16, 80, 256])
def test_softcap_and_sink_logits_of_dimensions_and_types(head_dim: int, dtype: torch.dtype, device: str) -> None:
    cache = make_cache(device, 2, head_dim, dtype=dtype, budget=0.5)
    logits = torch.tensor(SINK_LOGITS[:4], device=device)
    for options in ({"softcap": 50.0}, {"softcap": 1000.0, "sink_logits": logits.to(dtype)}, {"sink_logits": logits}):
        errors = [attend_and_compare(cache, 4, tokens, tokens, **options) for tokens in (200, 1, 90, 1)]
        assert max(errors) < 1e-3


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tokens", [1, 130])
def test_a_sink_logit_of_minus_infinity_is_none(tokens: int, device: str) -> None:
    cache = make_cache(device, formats=INT4)
    attention_with_kv_cache(*random_qkv(cache, 4, 300), cache)
    x = random_qkv(cache, 4, tokens)
    expected, _ = attention_with_kv_cache(*x, cache, update_cache=False)
    logits = torch.full((4,), -math.inf, device=device)
    found, _ = attention_with_kv_cache(*x, cache, update_cache=False, sink_logits=logits)
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_sink_logits_of_rows_with_fewer_tokens(device: str) -> None:
    """Columns that are no tokens are zeros; the others are what they are alone."""
    cache = make_cache(device, max_sequences=3, formats=INT8)
    options = variant_options(("softcap", "sink_logits"), 4, device)
    x = random_qkv(cache, 4, 5)
    out, _ = attention_with_kv_cache(*x, cache, tokens=[0, 3, 5], **options)
    for row, count in enumerate([0, 3, 5]):
        assert not out[row, :, : 5 - count].any()
        if count:
            q, k, v = (t[row, :, 5 - count :] for t in x)
            expected, _ = defined(q, *(t.double().cpu().numpy() for t in (k, v)), **options)
            assert attention_error(out[row, :, 5 - count :], expected) < 1e-3


def test_a_row_that_sees_nothing_is_zeros() -> None:
    cache = make_cache("cpu")
    x = [t.float() for t in random_qkv(cache, 4, 6)]
    seen = torch.ones(1, 6, 6, dtype=torch.bool).tril()
    seen[0, 0] = False
    for logit in (0.0, -math.inf):
        call = SimpleNamespace(scale=0.125, softcap=SOFTCAP)
        out = attention._masked_attention(*x, seen, call, torch.full((4,), logit))
        assert not out[:, :, 0].any()
        assert out[:, :, 1:].isfinite().all()


def test_scores_are_computed_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU: which tokens are taken together does not show."""
    cache, options = make_cache("cpu"), variant_options(("softcap", "sink_logits"), 4, "cpu")
    x = random_qkv(cache, 4, 100)
    expected, _ = attention_with_kv_cache(*x, cache, update_cache=False, **options)
    monkeypatch.setattr(attention, "_CPU_SCORES", 7 * 4 * 100)
    found, _ = attention_with_kv_cache(*x, cache, update_cache=False, **options)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("device", DEVICES)
def test_a_long_prompt_is_taken_in_chunks(device: str) -> None:
    whole, pieces = (make_cache(device, budget=0.3, max_tokens=4096) for _ in range(2))
    q, k, v = random_qkv(whole, 4, 700)
    done: list[tuple[int, int]] = []
    out, _ = attention_with_kv_cache(q, k, v, whole, chunk_tokens=256, progress=lambda *counts: done.append(counts))
    parts = [slice(0, 256), slice(256, 512), slice(512, 700)]
    expected = [attention_with_kv_cache(q[:, :, p], k[:, :, p], v[:, :, p], pieces)[0] for p in parts]
    assert torch.equal(out, torch.cat(expected, dim=2))
    assert done == [(256, 700), (512, 700), (700, 700)]
    assert torch.equal(whole.read(0, 0)[0], pieces.read(0, 0)[0])
    # By itself: two thousand tokens at a time.
    cache = make_cache(device, max_tokens=4096)
    seen: list[int] = []

    def stop(count: int, of: int) -> None:
        seen.append(count)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attention_with_kv_cache(*random_qkv(cache, 2, 2500), cache, progress=stop)
    assert seen == [2048]
    assert cache.length(0, 0) == 2048


@pytest.mark.parametrize("device", DEVICES)
def test_free_memory_does_not_show_in_results(device: str) -> None:
    """A chunk that does not fit is refused, rather than that a smaller one gives other numbers."""
    chunk_bytes = 2 * 2048 * 2 * 64 * 2  # K and V of 2,048 tokens, 2 heads of 64, in 16 bits
    roomy, tight = (make_cache(device, formats=INT2, max_tokens=4096, max_bytes=m) for m in (None, 2 * chunk_bytes))
    q, k, v = random_qkv(roomy, 4, 2100)
    found = [attention_with_kv_cache(q, k, v, cache)[0] for cache in (roomy, tight)]
    assert torch.equal(found[0], found[1])
    scarce = make_cache(device, formats=INT2, max_tokens=4096, max_bytes=chunk_bytes // 2)
    with pytest.raises(CacheFullError, match="new slabs"):
        attention_with_kv_cache(q, k, v, scarce)
    assert scarce.length(0, 0) == 0
    assert attention_with_kv_cache(q, k, v, scarce, chunk_tokens=256)[0].isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tokens", [1, 3, 130])
def test_queries_alone(tokens: int, device: str) -> None:
    cache = make_cache(device, max_sequences=3)
    for sequence, length in enumerate((300, 131, 0)):
        _, k, v = random_qkv(cache, 4, length, batch=1, seed=sequence)
        cache.append(0, k, v, [sequence])
    before = cache_state(cache)
    q, k, v = random_qkv(cache, 4, tokens, batch=2, seed=9)
    for options in ({}, {"causal": False}, {"window": 70, "sinks": 4}):
        out, _ = attention_with_kv_cache(q, None, None, cache, sequences=[1, 0], **options)
        nothing = k[:, :, :0]
        same, _ = attention_with_kv_cache(q, nothing, nothing, cache, sequences=[1, 0], **options)
        assert torch.equal(out, same)
        for row, sequence in enumerate((1, 0)):
            expected, _ = defined(q[row], *held(cache, 0, sequence), **options)
            assert attention_error(out[row], expected) < 1e-3
    assert cache_state(cache) == before
    with pytest.raises(
        CacheInputError, match="sequence 2: queries alone are of the last tokens in the cache, which holds 0"
    ):
        attention_with_kv_cache(q[:1], None, None, cache, sequences=[2], causal=False)
    with pytest.raises(CacheInputError, match="holds 131; at least 132 are wanted"):
        attention_with_kv_cache(random_qkv(cache, 4, 132, batch=1)[0], None, None, cache, sequences=[1])
    with pytest.raises(CacheInputError, match="there is nothing to attend to"):
        attention_with_kv_cache(q, None, None)
    with pytest.raises(CacheInputError, match="k is a Tensor and v a NoneType"):
        attention_with_kv_cache(q, k, None, cache)


@pytest.mark.parametrize("device", DEVICES)
def test_queries_alone_wait_for_planned_tokens(device: str) -> None:
    cache = make_cache(device)
    q, k, v = random_qkv(cache, 4, 20)
    attention_with_kv_cache(q, k, v, cache)
    cache.plan()
    with pytest.raises(CacheInputError, match="tokens that no graph has appended"):
        attention_with_kv_cache(q, None, None, cache)


@pytest.mark.parametrize("device", DEVICES)
def test_a_prompt_that_comes_a_second_time_is_refused(device: str) -> None:
    cache = make_cache(device, max_sequences=2)
    q, k, v = random_qkv(cache, 4, 20)
    attention_with_kv_cache(q, k, v, cache, cached_tokens=0)
    before = cache_state(cache)
    for wrong, message in (
        (0, "sequence 0: the cache holds 20 tokens, where cached_tokens says 0"),
        ([20, 19], "sequence 1: the cache holds 20 tokens, where cached_tokens says 19"),
        ([20], "cached_tokens has 1 numbers for a batch of 2"),
        ([20, 20.5], "cached_tokens is 20.5"),
        ("ab", "cached_tokens is not an integer in 'ab'"),
    ):
        with pytest.raises(CacheInputError, match=re.escape(message)):
            attention_with_kv_cache(q, k, v, cache, cached_tokens=wrong)
        assert cache_state(cache) == before
    with pytest.raises(CacheInputError, match="where cached_tokens says 0"):
        attention_with_kv_cache(q[:, :, :0], k[:, :, :0], v[:, :, :0], cache, cached_tokens=0)
    attention_with_kv_cache(q, k, v, cache, cached_tokens=[20, 20])
    assert cache.length(0, 1) == 40


def test_short_sequences_are_not_padded_to_the_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU: what is dequantized for a batch is at most twice what it holds."""
    cache = make_cache("cpu", max_sequences=16, max_tokens=4096)
    _, k, v = random_qkv(cache, 4, 3000, batch=1)
    cache.append(0, k, v, [5])
    read, places = attention.read_tokens, []

    def counted(*arguments: Any) -> torch.Tensor:
        out: torch.Tensor = read(*arguments)
        places.append(out.shape[0] * out.shape[2])
        return out

    monkeypatch.setattr(attention, "read_tokens", counted)
    assert attend_and_compare(cache, 4, 1, 3, observe=True) < 1e-3
    assert sum(places) < 2 * 2 * (3001 + 15)
    assert cache.observed_steps[0].tolist() == [1] * 16


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tokens", [1, 40, 200])
def test_tokens_that_are_not_kept(tokens: int, device: str) -> None:
    """The result is the same, and the cache is as it was, also where the tokens were no numbers."""
    cache, other = (make_cache(device, max_sequences=2, budget=0.4) for _ in range(2))
    for each in (cache, other):
        attention_with_kv_cache(*random_qkv(each, 4, 300), each)
        attention_with_kv_cache(*random_qkv(each, 4, 25, batch=1), each, sequences=[1])
    before = cache_state(cache)
    q, k, v = random_qkv(cache, 4, tokens, seed=7)
    out, _ = attention_with_kv_cache(q, k, v, cache, update_cache=False)
    kept, _ = attention_with_kv_cache(q, k, v, other)
    assert torch.equal(out, kept)
    attention_with_kv_cache(q, k * math.inf, v * math.nan, cache, update_cache=False)
    after = cache_state(cache)
    assert after.pop("pools")["bytes"][1] == before.pop("pools")["bytes"][1]  # slabs may have been added
    assert after == before
    assert attend_and_compare(cache, 4, 1, 3) < 1e-3


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize(("heads", "tokens", "sequences"), [(2, 1, None), (8, 3, None), (4, 90, None), (4, 2, [2, 0])])
def test_attention_is_observed(
    heads: int, tokens: int, sequences: list[int] | None, window: int | None, device: str
) -> None:
    cache = make_cache(device, max_sequences=3, formats=INT4)
    for sequence, count in enumerate([200, 64, 131]):
        attention_with_kv_cache(*random_qkv(cache, heads, count, batch=1), cache, sequences=[sequence])
    ids = [0, 1, 2] if sequences is None else sequences
    importance = torch.arange(heads, device=device) / 2
    expected = np.zeros((3, cache.mass.shape[2]))
    before = [held(cache, 0, sequence)[0] for sequence in ids]
    q, k, v = random_qkv(cache, heads, tokens, batch=len(ids), seed=3)
    plain, _ = attention_with_kv_cache(q, k, v, cache, sequences=sequences, window=window, update_cache=False)
    out, _ = attention_with_kv_cache(
        q, k, v, cache, sequences=sequences, window=window, observe=True, head_importance=importance
    )
    assert torch.equal(out, plain)
    few = min(tokens, max(1, 16 * 2 // heads))  # of a prompt, the last ones are looked at
    for row, (sequence, old) in enumerate(zip(ids, before, strict=True)):
        keys = np.concatenate([old, k[row].double().cpu().numpy()], 1)
        _, p = defined(q[row], keys, np.zeros_like(keys), window=window)
        by_place = (p[:, -few:] * importance.cpu().numpy()[:, None, None]).sum(0).mean(0) / heads
        for page in range(-(-len(by_place) // 64)):
            expected[sequence, page] = by_place[64 * page : 64 * page + 64].sum()
    found = cache.mass[0].cpu().numpy() * MASS_UNIT
    assert np.abs(found - expected).max() < 2e-4 * max(1, importance.mean().item())  # scores of INT4 are rounded
    assert cache.observed_steps[0].tolist() == [int(sequence in ids) for sequence in range(3)]
    cache.reallocate()
    weights = cache.importance.values(0)
    assert weights[ids[0], 0] == pytest.approx(expected[ids[0], 0], abs=1e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tokens", [1, 60])
def test_observed_attention_leaves_out_what_a_sink_has(tokens: int, device: str) -> None:
    """Masses are probabilities with the sink in the denominator, of capped scores."""
    cache, options = make_cache(device, formats=INT8), variant_options(("softcap", "sink_logits"), 8, device)
    attention_with_kv_cache(*random_qkv(cache, 8, 200), cache)
    old_k, _ = held(cache, 0, 0)
    q, k, v = random_qkv(cache, 8, tokens, seed=1)
    attention_with_kv_cache(q, k, v, cache, observe=True, **options)
    keys = np.concatenate([old_k, k[0].double().cpu().numpy()], 1)
    _, p = defined(q[0], keys, np.zeros_like(keys), **options)
    by_place = p[:, -4:].mean((0, 1))
    expected = [by_place[first : first + 64].sum() for first in range(0, len(by_place), 64)]
    found = cache.mass[0, 0, : len(expected)].cpu().numpy() * MASS_UNIT
    assert sum(expected) < 0.9
    assert np.abs(found - expected).max() < 2e-4


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_attended_to_keeps_its_bits(device: str) -> None:
    """Queries that look at one page of many, step after step: that page is wider afterwards."""
    cache = make_cache(device, 1, max_tokens=2048, budget=0.3)
    direction = torch.zeros(64, device=device).half()
    direction[0] = 8
    q, k, v = random_qkv(cache, 1, 64)
    for page in range(20):
        keys = k.clone()
        keys[..., 0] = 0
        if page == 5:
            keys += direction
        queries = torch.zeros_like(q) + direction
        for token in range(64):
            part = slice(token, token + 1)
            attention_with_kv_cache(queries[:, :, part], keys[:, :, part], v[:, :, part], cache, observe=True)
        cache.reallocate()
    element_bits = np.vectorize(lambda f: PageFormat(f).element_bits)(cache.precision_map(0)[:, 0, 1:18]).sum(0)
    assert element_bits[4] > np.median(element_bits) + 2


@pytest.mark.parametrize("device", DEVICES)
def test_keys_count_as_their_scores_do(device: str) -> None:
    """Queries that are ten times as long: keys have more bits at the expense of values. Errors against fp64."""
    found = []
    for size in (0.1, 1.0):
        cache = make_cache(device, budget=0.3)
        q, k, v = random_qkv(cache, 4, 512)
        attention_with_kv_cache(size * q, k, v, cache)
        element_bits = np.vectorize(lambda f: PageFormat(f).element_bits)(cache.precision_map(0)[:, 0, 1:7])
        found.append(element_bits.mean(1))
        energy = np.square(size * q.double().cpu().numpy() / 8).reshape(2, 2, 512, 64).mean((1, 2))
        page = k[0, :, 64:128].float().cpu().numpy()
        for rung, page_format in enumerate((INT2, INT3, INT4, INT8)):
            layout = PageLayout(Side.K, page_format, 64)
            noise = np.square(dequantize_blocks(quantize_blocks(page, layout), layout) - page.astype(np.float64))
            assert cache.errors[0, 0, rung] == pytest.approx((noise.mean(1) * energy).sum(-1).mean(), rel=1e-3)
    assert found[1][0] > found[0][0] + 0.9
    assert found[1][1] < found[0][1] - 0.9


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("options", "steps", "steps_on_gpu"),
    # A prompt of 100 tokens and 130 steps: pages begin at 128 and 192 tokens. At 192, page 1 leaves the recent window
    # of 64 tokens and is quantized; page 0 is pinned. One run is long: under a budget, formats change again and again.
    [({"formats": FP16}, 130, 130), ({"formats": INT4}, 130, 130), ({"budget": 0.3}, 260, 1000)],
    ids=str,
)
def test_many_steps(options: dict[str, Any], steps: int, steps_on_gpu: int, device: str) -> None:
    """No memory but that of pages, and errors that do not grow."""
    steps = steps_on_gpu if device == "cuda" else steps
    cache = make_cache(device, num_layers=2, max_sequences=2, **options)
    q, k, v = random_qkv(cache, 4, 100)
    for layer in range(2):
        attention_with_kv_cache(q, k, v, cache, layer=layer)

    def others() -> int:
        allocated = torch.cuda.memory_allocated() if device == "cuda" else cache.pools.bytes_allocated
        return allocated - cache.pools.bytes_allocated

    before, errors = None, []
    for step in range(steps):
        if step % 100 == 99:
            errors.append(attend_and_compare(cache, 4, 1, step, observe=True))
        else:
            attention_with_kv_cache(*random_qkv(cache, 4, 1, seed=step), cache, layer=0, observe=True)
        attention_with_kv_cache(*random_qkv(cache, 4, 1, seed=-step % 1000), cache, layer=1, observe=True)
        if step % 64 == 0:
            cache.reallocate()
        before = others() if before is None else before
    assert 0 <= others() - before < 1 << 16
    assert max(errors) < 1e-3
    assert cache.length(1, 1) == 100 + steps
    cache.check()


# Graphs --------------------------------------------------------------------------------------------------------------


def two_layers(cache: KVCache, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
    first, _ = attention_with_kv_cache(q, k, v, cache, layer=0, **options)
    group = q.shape[1] // k.shape[1]
    second, _ = attention_with_kv_cache(first + q, k + first[:, ::group], v, cache, layer=1, **options)
    return second


@pytest.mark.parametrize("options", [{"formats": INT4}, {"budget": 0.3}], ids=str)
def test_planned_steps_are_those_of_append(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """What a graph would repeat, without a graph: the host's part first, then the device's."""
    eager, planned = (make_cache("cpu", num_layers=2, max_sequences=2, **options) for _ in range(2))
    eager.errors[:] = planned.errors[:] = [0.4, 0.1, 0.03, 1e-4, 0]
    differ = []
    for step in range(260):
        planned.plan(1)
        for layer in range(2):
            x = random_qkv(eager, 4, 1, seed=2 * step + layer)
            expected, _ = attention_with_kv_cache(*x, eager, layer=layer)
            with monkeypatch.context() as patch:
                patch.setattr(KVCache, "_is_captured", lambda _: True)
                found, _ = attention_with_kv_cache(*x, planned, layer=layer)
            if not torch.equal(found, expected):
                differ.append((step, layer))
        assert planned.length(0, 0) == int(planned.lengths[0, 0]) == step + 1
    # Where pages leave the window, they do so before the step and not behind it.
    assert {step for step, _ in differ} <= {191, 255}
    assert cache_state(planned)["pages"] == cache_state(eager)["pages"]


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{"formats": FP16}, {"formats": INT4}, {"budget": 0.3}], ids=str)
@pytest.mark.parametrize("names", [(), ("softcap", "sink_logits")], ids="-".join)
@pytest.mark.parametrize("sequences", [None, [2, 0]])
def test_cuda_graph(sequences: list[int] | None, names: tuple[str, ...], options: dict[str, Any]) -> None:
    """300 replays: bit for bit the results, pages and masses of a cache that gets the same calls without a graph."""
    graphed, eager = (make_cache("cuda", num_layers=2, max_sequences=3, **options) for _ in range(2))
    batch = 3 if sequences is None else len(sequences)
    variant = variant_options(names, 4, "cuda")
    if names:
        variant["sink_logits"] = variant["sink_logits"].bfloat16()  # is converted in the graph
    attend = functools.partial(two_layers, sequences=sequences, observe=True, **variant)
    for cache in (graphed, eager):
        two_layers(cache, *random_qkv(cache, 4, 150))
        attend(cache, *random_qkv(cache, 4, 1, batch=batch))  # compiles
    static = random_qkv(graphed, 4, 1, batch=batch)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(graphed, *static)
    for step in range(300):
        x = random_qkv(eager, 4, 1, batch=batch, seed=step)
        for to, new in zip(static, x, strict=True):
            to.copy_(new)
        graphed.plan(1, sequences)
        graph.replay()
        # The eager one decides when the graph's does: before the step.
        eager.plan(1, sequences)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(KVCache, "_is_captured", lambda _: True)
            expected = attend(eager, *x)
        assert torch.equal(out, expected)
        if step % 64 == 63:
            graphed.reallocate()
            eager.reallocate()
    assert cache_state(graphed)["pages"] == cache_state(eager)["pages"]
    assert torch.equal(graphed.mass, eager.mass)
    graphed.check()


@pytest.mark.parametrize("device", DEVICES)
def test_plan_refuses(device: str) -> None:
    cache = make_cache(device, num_layers=2, max_tokens=200, formats=INT4, recent_tokens=64)
    attention_with_kv_cache(*random_qkv(cache, 2, 190), cache, layer=0)
    before = cache_state(cache)
    with pytest.raises(CacheInputError, match="in the midst of a step"):
        cache.plan()
    attention_with_kv_cache(*random_qkv(cache, 2, 190), cache, layer=1)
    after = cache_state(cache)
    with pytest.raises(CacheFullError, match="11 tokens behind 190 are more than the 200 of max_tokens"):
        cache.plan(11)
    with pytest.raises(CacheInputError, match="65 tokens cannot be planned for; at most recent_tokens, 64"):
        cache.plan(65)
    assert cache_state(cache) == after != before


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is:DeprecationWarning")  # of Inductor's imports
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")  # its first try, which launches nothing
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor", pytest.param("cudagraphs", marks=pytest.mark.gpu)])
def test_compiled(backend: str, device: str) -> None:
    """torch.compile, in one graph; the same bits as without, and a second cache is not taken for the first."""
    if device == "cpu" and backend != "aot_eager":
        pytest.skip("what is not kvpack's takes Inductor half a minute on the CPU; aot_eager shows the same")
    options = {"mode": "reduce-overhead"} if backend == "cudagraphs" else {"backend": backend}
    torch._dynamo.reset()
    compiled = torch.compile(two_layers, fullgraph=True, dynamic=False, **options)
    for count in (130, 70):
        caches = [make_cache(device, num_layers=2, formats=INT4) for _ in range(2)]
        for tokens in (count, 1, 1, 1, 64, 1):
            for seed in range(2):
                x = random_qkv(caches[0], 4, tokens, seed=seed)
                assert torch.equal(compiled(caches[0], *x), two_layers(caches[1], *x))
        assert cache_state(caches[0])["pages"] == cache_state(caches[1])["pages"]
        assert caches[0].length(1, 0) == caches[0].lengths[1, 0].item() == 2 * (count + 68)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is:DeprecationWarning")
@pytest.mark.parametrize("device", DEVICES)
def test_compiled_with_softcap_and_sink_logits(device: str) -> None:
    torch._dynamo.reset()
    options = variant_options(("softcap", "sink_logits"), 4, device)
    compiled = torch.compile(functools.partial(two_layers, **options), fullgraph=True, backend="aot_eager")
    caches = [make_cache(device, num_layers=2, formats=INT4) for _ in range(2)]
    for tokens in (130, 1, 1):
        x = random_qkv(caches[0], 4, tokens, seed=tokens)
        expected = two_layers(caches[1], *x, **options)
        assert torch.equal(compiled(caches[0], *x), expected)
    assert not torch.equal(two_layers(make_cache(device, num_layers=2), *x), expected)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is:DeprecationWarning")
@pytest.mark.parametrize("dynamic", [None, False])
def test_compiled_for_many_caches_and_layers(dynamic: bool | None) -> None:
    """A cache a request, and each layer's attention compiled by itself: neither is a recompilation each time."""
    torch._dynamo.reset()

    def attend(cache: KVCache, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attention_with_kv_cache(q, k, v, cache, layer=layer)[0]

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for _ in range(12 if dynamic is None else 4):
        cache = make_cache("cpu", num_layers=4)
        for layer in range(4 if dynamic is None else 1):
            x = random_qkv(cache, 4, 3, seed=layer)
            assert torch.equal(compiled(cache, layer, *x), attend(make_cache("cpu", num_layers=4), layer, *x))
        assert [cache.length(layer, 0) for layer in range(4)] == ([3] * 4 if dynamic is None else [3, 0, 0, 0])


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is:DeprecationWarning")
@pytest.mark.parametrize("as_list", [False, True])
def test_compiled_steps_that_name_the_cached_tokens(as_list: bool) -> None:
    """Another number at each step is not a recompilation each time; queries alone are compiled as well."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    cache = make_cache("cpu")

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cached: int | list[int]) -> list[torch.Tensor]:
        out, _ = attention_with_kv_cache(q, k, v, cache, cached_tokens=cached)
        return [out, attention_with_kv_cache(q, None, None, cache)[0]]

    compiled = torch.compile(attend, fullgraph=True, backend=counter)
    x = random_qkv(cache, 4, 1)
    for step in range(12):
        out, again = compiled(*x, [step] if as_list else step)
        assert torch.equal(out, again)
    assert cache.length(0, 0) == 12
    assert counter.frame_count <= 3
    with pytest.raises(CacheInputError, match="the cache holds 12 tokens, where cached_tokens says 11"):
        compiled(*x, [11] if as_list else 11)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is:DeprecationWarning")
def test_compiled_for_many_batches() -> None:
    """Other sequences at each step are not a recompilation each time."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    cache = make_cache("cpu", max_sequences=4)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sequences: list[int]) -> torch.Tensor:
        return attention_with_kv_cache(q, k, v, cache, sequences=sequences)[0]

    compiled = torch.compile(attend, fullgraph=True, backend=counter)
    x = random_qkv(cache, 4, 1, batch=2)
    for batch in itertools.permutations(range(4), 2):
        compiled(*x, list(batch))
    assert cache.lengths.tolist() == [[6] * 4]
    assert counter.frame_count <= 4


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is:DeprecationWarning")
def test_compiled_calls_whose_result_is_dropped() -> None:
    """They change the cache, in their order."""
    torch._dynamo.reset()

    def fill(cache: KVCache, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        attention_with_kv_cache(q, k, v, cache)
        attention_with_kv_cache(q, k, v, cache)
        return q + 1

    cache = make_cache("cpu")
    torch.compile(fill, fullgraph=True, backend="aot_eager")(cache, *random_qkv(cache, 4, 3))
    assert cache.length(0, 0) == 6


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is:DeprecationWarning")
def test_compiled_with_graph_breaks() -> None:
    """What cannot be in a graph is said, or done without one."""
    torch._dynamo.reset()
    cache = make_cache("cpu")
    x = random_qkv(cache, 4, 3)
    compiled = torch.compile(attention_with_kv_cache, backend="aot_eager")
    out, made = compiled(*x)
    assert torch.equal(out, attention_with_kv_cache(*x)[0])
    assert made.length(0, 0) == 3
    with pytest.raises(CacheInputError, match="3 query heads are no multiple of 2"):
        compiled(x[0][:, :3], x[1], x[2], cache)
    assert torch.equal(compiled(*x, cache)[0], out)
    # A cache without a budget reserves as much as the machine has. Dynamo holds it in a cycle, and who has two of them
    # cannot be forked.
    del made, compiled
    torch._dynamo.reset()
    gc.collect()


# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 3}, "3 query heads are no multiple of 2 KV heads"),
        (
            {"q": lambda q: q[0]},
            r"q has shape \[4, 5, 64\]; this cache takes \[batch, query heads, tokens, head_dim 64",
        ),
        ({"q": lambda q: q[..., :0]}, r"q has shape \[1, 4, 5, 0\]"),
        ({"k": lambda k: k[0, 0]}, r"k has shape \[5, 64\]"),
        ({"k": lambda k: k.float().requires_grad_().half()}, "no gradient: call it under"),
        ({"v": lambda v: v.float().requires_grad_().half()}, "no gradient: call it under"),
        ({"q": lambda q: q[..., :32]}, r"q has shape \[1, 4, 5, 32\]"),
        ({"q": lambda q: q[:, :, :3]}, r"q has shape \[1, 4, 3, 64\] and k \[1, 2, 5, 64\]"),
        ({"q": lambda q: q.bfloat16()}, r"q is torch\.bfloat16 on (cpu|cuda:0); this cache is torch\.float16"),
        ({"q": lambda q: q.to("meta")}, r"q is torch\.float16 on meta; this cache is torch\.float16 on"),
        ({"k": lambda k: k.float()}, r"k is torch\.float32 on"),
        ({"v": lambda v: v[..., :4, :]}, r"k has shape \[1, 2, 5, 64\] and v \[1, 2, 4, 64\]"),
        ({"q": lambda q: q.float().requires_grad_().half()}, "no gradient: call it under"),
        ({"layer": 1}, "layer is 1; there are 1"),
        ({"layer": -1}, "layer is -1; there are 1"),
        ({"layer": 0.0}, "layer is 0.0; an integer is wanted"),
        ({"sequences": [1]}, r"sequences are \[1\]; the cache has max_sequences=1"),
        ({"sequences": []}, "0 sequences are named for a batch of 1"),
        *(
            ({"scale": x}, f"scale is {x}; it must be between".replace("+", "."))
            for x in (math.nan, 0.0, -0.125, 1e39, 1e-10)
        ),
        ({"update_cache": 1}, r"update_cache is 1; True or False is wanted \(a layer is given as layer="),
        ({"observe": True, "update_cache": False}, "tokens that are not kept cannot be observed"),
        ({"window": 4.5}, "window is 4.5; an integer is wanted"),
        ({"window": 0}, "window is 0; it is at least 1, or None"),
        ({"sinks": -1}, "sinks is -1"),
        ({"window": 5, "causal": False}, "a window ends at each token"),
        ({"window": 5000, "causal": False}, "a window ends at each token"),
        ({"chunk_tokens": 0}, "chunk_tokens is 0"),
        ({"head_importance": torch.ones(3)}, r"head_importance has shape \[3\] on cpu; q has 4 heads on"),
        *(
            ({"softcap": x}, f"softcap is {x!r}; it must be between 1e-6 and 1000, or None")
            for x in (0, -50.0, math.nan, math.inf, 1e4, True, "50")
        ),
        ({"sink_logits": torch.zeros(3)}, r"sink_logits is torch\.float32 \[3\] on cpu; q has 4 heads on"),
        ({"sink_logits": torch.zeros(4, 1)}, r"sink_logits is torch\.float32 \[4, 1\] on cpu"),
        ({"sink_logits": torch.zeros(4, dtype=torch.int32)}, r"sink_logits is torch\.int32 \[4\]"),
        ({"sink_logits": torch.zeros(4, device="meta")}, r"sink_logits is torch\.float32 \[4\] on meta; q has 4 heads"),
        ({"sink_logits": [0.0] * 4}, "sink_logits is a list; a tensor is wanted"),
        ({"past_key_value": ((), ())}, "past_key_value is a tuple"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refused(change: dict[str, Any], message: str, device: str) -> None:
    """With a message that has the values, and the cache left as it was."""
    cache = make_cache(device, budget=0.5)
    attention_with_kv_cache(*random_qkv(cache, 4, 70), cache)
    before = cache_state(cache)
    given = dict(zip("qkv", random_qkv(cache, change.get("heads", 4), 5), strict=True))
    given = {name: change[name](x) if name in change else x for name, x in given.items()}
    options = {name: value for name, value in change.items() if name not in (*"qkv", "heads")}
    with pytest.raises(CacheInputError, match=message):
        attention_with_kv_cache(**given, **({"past_key_value": cache} | options))
    assert cache_state(cache) == before


@pytest.mark.parametrize("device", DEVICES)
def test_overflow_leaves_the_cache_as_it_was(device: str) -> None:
    cache = make_cache(device, max_tokens=200)
    attention_with_kv_cache(*random_qkv(cache, 4, 190), cache)
    before = cache_state(cache)
    for keeps in (True, False):
        with pytest.raises(CacheFullError, match="11 tokens behind 190 are more than the 200 of max_tokens"):
            attention_with_kv_cache(*random_qkv(cache, 4, 11), cache, update_cache=keeps)
    assert cache_state(cache) == before
    limited = make_cache(device, max_bytes=2 * 8 * 2 * 64 * 64 * 2)  # a slab of K and one of V
    with pytest.raises(CacheFullError, match="pages need"):
        attention_with_kv_cache(*random_qkv(limited, 4, 600), limited, chunk_tokens=600)
    assert limited.length(0, 0) == 0
    assert limited.pools.bytes_in_use == 0


@pytest.mark.parametrize("device", DEVICES)
def test_a_call_is_checked_as_a_whole(device: str) -> None:
    """Not chunk by chunk: with the first one, its tokens would be in the cache."""
    cache = make_cache(device, max_tokens=600, budget=0.3)
    before = cache_state(cache)
    q, k, v = random_qkv(cache, 4, 700)
    with pytest.raises(CacheFullError, match="700 tokens behind 0 are more than the 600"):
        attention_with_kv_cache(q, k, v, cache, chunk_tokens=256)
    with pytest.raises(CacheInputError, match=r"k has shape \[1, 2, 512, 64\] and v \[1, 2, 700, 64\]"):
        attention_with_kv_cache(q[:, :, :512], k[:, :, :512], v, cache, chunk_tokens=256)
    assert cache_state(cache) == before


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", [{"budget": 0.3}, {"formats": INT4}], ids=str)
def test_kernels_that_fail_leave_no_trace(
    options: dict[str, Any], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither tokens that are no numbers, nor what their queries would have told of formats."""
    cache, other = (make_cache(device, max_tokens=1024, **options) for _ in range(2))
    for each in (cache, other):
        attention_with_kv_cache(*random_qkv(each, 4, 100), each)
    before = cache_state(cache)
    q, k, v = random_qkv(cache, 4, 200, seed=5)

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no compiler")

    for name in ("quantize_pages", "write_tokens"):
        with monkeypatch.context() as patch:
            patch.setattr(f"kvpack.runtime.kv.cache.{name}", fail)
            with pytest.raises(RuntimeError, match="no compiler"):
                attention_with_kv_cache(10 * q, k * math.nan, v * math.inf, cache)
        after = cache_state(cache)
        assert after.pop("pools")["bytes"][1] == before["pools"]["bytes"][1]
        assert after == {name: value for name, value in before.items() if name != "pools"}
    outs = [attention_with_kv_cache(q, k, v, each)[0] for each in (cache, other)]
    assert torch.equal(*outs)
    assert (cache.precision_map(0) == other.precision_map(0)).all()


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_no_number_spoils_no_importance(device: str) -> None:
    cache = make_cache(device, max_sequences=2, budget=0.3)
    q, k, v = random_qkv(cache, 4, 200)
    q[0, 0, -1, 0] = math.nan
    importance = torch.tensor([1, math.inf, -3, math.nan], device=device)
    attention_with_kv_cache(q, k, v, cache, observe=True)
    attention_with_kv_cache(*random_qkv(cache, 4, 1), cache, observe=True, head_importance=importance)
    assert (cache.mass >= 0).all()
    cache.reallocate()
    assert np.isfinite(cache.importance.values(0)).all()
    assert cache.importance.values(0)[1, :3].min() > 0


@pytest.mark.skipif(emulator.compiler() is None, reason="no C++ compiler for the emulator")
@pytest.mark.parametrize(
    ("tokens", "sequences", "names"),
    [
        *((tokens, s, ()) for tokens, s in ((1, None), (1, [2, 0]), (5, None), (40, [1]), (130, None))),
        (5, None, ("softcap", "sink_logits")),
        (130, None, ("softcap", "sink_logits")),
    ],
)
def test_kernels_give_what_the_cpu_does(
    tokens: int, sequences: list[int] | None, names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which kernel is launched with how many blocks, and what is observed, without a GPU."""
    caches = [make_cache("cpu", max_sequences=3, budget=0.4, max_bytes=4 << 20) for _ in range(2)]
    for cache in caches:
        for sequence, count in enumerate([300, 64, 131]):
            x = random_qkv(cache, 4, count, batch=1, seed=sequence)
            attention_with_kv_cache(*x, cache, sequences=[sequence])
    x = random_qkv(caches[0], 4, tokens, batch=3 if sequences is None else len(sequences), seed=9)
    options = {"sequences": sequences, "observe": True, "window": 150, "sinks": 4, **variant_options(names, 4, "cpu")}
    expected, _ = attention_with_kv_cache(*x, caches[0], **options)
    monkeypatch.setattr(kernels, "launch", emulated_launch)
    monkeypatch.setattr(attention, "_attend_on_cpu", attention._attend_by_kernel)
    monkeypatch.setattr(attention, "device_limits", lambda _: SimpleNamespace(multiprocessors=4))
    found, _ = attention_with_kv_cache(*x, caches[1], **options)
    assert (found.double() - expected.double()).abs().max() < 2e-3 * max(1, expected.abs().max().item())
    masses = [cache.mass.double() * MASS_UNIT for cache in caches]
    assert (masses[0] - masses[1]).abs().max() < 2e-4
    assert torch.equal(caches[0].observed_steps, caches[1].observed_steps)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("page_format", [FP16, INT4, INT3, INT2])
def test_keys_in_an_order_of_their_own(page_format: PageFormat, device: str) -> None:
    """Pages are those of the layout, and attention is to what they hold."""
    order = [2, 0, 4, 3, 1]
    options: dict[str, Any] = {"head_dim": 80, "formats": page_format, "recent_tokens": 0, "sinks": 0}
    cache, default = make_cache(device, key_order=order, **options), make_cache(device, **options)
    assert cache.key_order == tuple(order)
    q, k, v = random_qkv(cache, 4, 150)
    for one in (cache, default):
        attention_with_kv_cache(q, k, v, one)
    layout = PageLayout(Side.K, page_format, 80, tuple(order))
    whole = k[0, :, :128].cpu().numpy().reshape(2, 2, 64, 80)
    want = dequantize_blocks(quantize_blocks(whole, layout), layout).reshape(2, 128, 80)
    assert np.array_equal(held(cache, 0, 0)[0][:, :128], want)
    assert np.array_equal(held(default, 0, 0)[0][:, :128], want) == (page_format == FP16)
    assert attend_and_compare(cache, 4, 1, seed=1) < 1e-3
    assert attend_and_compare(cache, 4, 5, seed=2) < 1e-3


@pytest.mark.skipif(emulator.compiler() is None, reason="no C++ compiler for the emulator")
@pytest.mark.parametrize("tokens", [1, 130])
def test_kernels_read_keys_in_an_order_of_their_own(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"formats": INT4, "recent_tokens": 0, "sinks": 0, "max_bytes": 4 << 20}
    cache = make_cache("cpu", head_dim=80, key_order=(2, 0, 4, 3, 1), **options)
    attention_with_kv_cache(*random_qkv(cache, 4, 200), cache)
    monkeypatch.setattr(kernels, "launch", emulated_launch)
    monkeypatch.setattr(attention, "_attend_on_cpu", attention._attend_by_kernel)
    monkeypatch.setattr(attention, "device_limits", lambda _: SimpleNamespace(multiprocessors=4))
    assert attend_and_compare(cache, 4, tokens, seed=1) < 2e-3


def test_orders_of_keys_that_are_none() -> None:
    for order in ([0, 1, 2], [0, 1, 2, 2], [1, 2, 3, 4], [-1, 0, 1, 2], [0, 1, 2, 3, 4]):
        with pytest.raises(PageError, match=r"key_order is .*; each of the groups 0 to 3 is wanted once"):
            make_cache("cpu", key_order=order)


def test_a_cache_cannot_be_copied() -> None:
    """A copy's pages would be the original's."""
    for duplicate in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="a KVCache cannot be copied or pickled"):
            duplicate(make_cache("cpu"))


def test_a_cache_made_in_inference_mode_serves_outside() -> None:
    with torch.inference_mode():
        cache = make_cache("cpu", budget=0.3)
        attention_with_kv_cache(*random_qkv(cache, 4, 200), cache, observe=True)
    assert attend_and_compare(cache, 4, 70, 1, observe=True) < 1e-3
    cache.reallocate()


def test_it_says_what_it_is() -> None:
    cache = make_cache("cpu", num_layers=2, max_sequences=2, formats=INT4)
    with pytest.raises(CacheInputError, match="the cache has 2 layers: say which one with layer="):
        attention_with_kv_cache(*random_qkv(cache, 4, 1), cache)
    attention_with_kv_cache(*random_qkv(cache, 4, 256), cache, layer=0)
    assert re.fullmatch(
        r"KVCache\(2 layers, 2 heads of 64, torch.float16 on cpu; tokens 256, 256 of 2048 each; 10.25 bits, pages "
        r"0.17 MB in 0.34 MB\)",
        repr(cache),
    ), repr(cache)
    few = make_cache("cpu", num_layers=1, max_sequences=2)
    attention_with_kv_cache(*random_qkv(few, 4, 16), few)
    whole = "64.00 bits, pages 0.07 MB in 0.26 MB; pages are allocated whole: 128 tokens, of which 32 are stored)"
    assert repr(few).endswith(whole), repr(few)


@pytest.mark.parametrize("device", DEVICES)
def test_without_a_cache_one_is_made(device: str) -> None:
    q, k, v = random_qkv(make_cache(device), 4, 70, batch=3)
    out, cache = attention_with_kv_cache(q, k, v)
    assert (cache.max_sequences, cache.num_layers, cache.length(0, 2)) == (3, 1, 70)
    expected, _ = defined(q[2], *(x[2].double().cpu().numpy() for x in (k, v)))
    assert attention_error(out[2], expected) < 1e-3
    out, _ = attention_with_kv_cache(q[:, :, :0], k[:, :, :0], v[:, :, :0], cache)
    assert out.shape == (3, 4, 0, 64)
    assert cache.length(0, 2) == 70


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("names", [(), *VARIANTS], ids="-".join)
@pytest.mark.parametrize("side", ["k", "v"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_a_mask_hides_reaches_no_result(bad: float, side: str, names: tuple[str, ...], device: str) -> None:
    """Tokens before it have the results of a call without it; it and those behind it show that it is there."""
    options = variant_options(names, 4, device)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 12, 64, generator=generator).half().to(device) for heads in (4, 2, 2))
    expected, _ = attention_with_kv_cache(q, k, v, make_cache(device, num_layers=1), **options)
    with_bad = {"k": k.clone(), "v": v.clone()}
    with_bad[side][0, 0, 5, 3] = bad
    found, _ = attention_with_kv_cache(q, with_bad["k"], with_bad["v"], make_cache(device, num_layers=1), **options)
    assert torch.equal(found[:, :, :5], expected[:, :, :5])
    assert torch.equal(found[:, 2:], expected[:, 2:])  # heads of the other KV head
    if side == "v":
        assert not found[:, :2, 5:, 3].isfinite().any()
    elif math.isnan(bad):
        assert found[:, :2, 5:].isnan().all()


@pytest.mark.parametrize("device", DEVICES)
def test_what_has_left_a_window_reaches_no_result(device: str) -> None:
    found = []
    for bad in (False, True):
        generator = torch.Generator().manual_seed(0)
        cache, results = make_cache(device, num_layers=1), []
        for token in range(40):
            q, k, v = (torch.randn(1, heads, 1, 64, generator=generator).half().to(device) for heads in (4, 2, 2))
            if bad and token == 10:
                v[..., 0] = math.nan
            results.append(attention_with_kv_cache(q, k, v, cache, window=8)[0])
        found.append(torch.cat(results, 2))
    assert torch.equal(found[0][:, :, :10], found[1][:, :, :10])
    assert found[1][:, :, 10:18, 0].isnan().all()
    assert torch.equal(found[0][:, :, 18:], found[1][:, :, 18:])


def test_a_huge_key_behind_the_mask_reaches_no_result() -> None:
    """Its score is infinite in fp32, so that a mask that is added would make NaN of it."""
    q, k, v = torch.full((1, 2, 4, 64), 10.0), torch.ones(1, 2, 4, 64), torch.randn(1, 2, 4, 64)
    q, k, v = q.bfloat16(), k.bfloat16(), v.bfloat16()
    expected, _ = attention_with_kv_cache(q, k, v, make_cache("cpu", dtype=torch.bfloat16))
    k[:, :, 3] = 1e38
    found, _ = attention_with_kv_cache(q, k, v, make_cache("cpu", dtype=torch.bfloat16))
    assert torch.equal(found[:, :, :3], expected[:, :, :3])
