"""The manager over real caches: what is shared has the bits of what is not, and what fails changes nothing."""

from __future__ import annotations

import math
import random
import re
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from pool_dump import cache_state

from kvpack.errors import CacheFullError, CacheInputError
from kvpack.format.pages import PageFormat, Side
from kvpack.format.snapshot import Fingerprint

torch = pytest.importorskip("torch")

from kvpack.runtime.kv.cache import KVCache  # noqa: E402
from kvpack.runtime.kv.manager import KVManager, Started  # noqa: E402
from kvpack.runtime.kv.manager_metrics import PrefixCounters  # noqa: E402
from kvpack.runtime.kv.prefix_store import Block  # noqa: E402

LAYERS, HEADS, HEAD_DIM, VOCABULARY, MAX_TOKENS = 2, 2, 16, 64, 64 * 16
FULL_BYTES = HEADS * HEAD_DIM * 64 * 2
INT4 = PageFormat.INT4
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]

_rng = np.random.default_rng(0)
_OF_TOKEN = _rng.normal(0, 1, (LAYERS, 3, VOCABULARY, HEADS, HEAD_DIM))
_OF_PLACE = _rng.normal(0, 1, (LAYERS, 3, MAX_TOKENS, HEADS, HEAD_DIM))


def qkv(layer: int, tokens: Any, first: int) -> Any:
    """[3, heads, tokens, head_dim] in fp16: what a model would compute of these tokens at these places."""
    values = _OF_TOKEN[layer][:, tokens] + _OF_PLACE[layer][:, first : first + len(tokens)]
    return torch.from_numpy(values).half().transpose(1, 2)


def append(cache: KVCache, rows: dict[int, Any]) -> list[Any]:
    """Tokens behind each sequence's last ones, equally many; attention's outputs of each layer."""
    outputs = []
    for layer in range(LAYERS):
        found = [qkv(layer, tokens, cache.length(layer, sequence)) for sequence, tokens in rows.items()]
        q, k, v = torch.stack(found, 1).to(cache.device)
        outputs.append(cache.attend(layer, q, k, v, list(rows)))
    return outputs


def make_cache(**options: Any) -> KVCache:
    defaults: dict[str, Any] = {"max_sequences": 4, "device": "cpu", "slab_bytes": 1}
    return KVCache(LAYERS, HEADS, HEAD_DIM, MAX_TOKENS, **(defaults | options))


def make(prefix_bytes: int | None = None, *, policy: str = "lru", **options: Any) -> KVManager:
    return KVManager(make_cache(**options), "tiny", prefix_bytes=prefix_bytes, policy=policy)


def run(manager: KVManager, tokens: Any, **options: Any) -> int:
    """A request from start to finish; how many of its tokens were there."""
    started = manager.start(tokens, **options)
    append(manager.cache, {started.sequence: tokens[started.tokens :]})
    manager.finish(started.sequence)
    return started.tokens


def prompt(seed: int, count: int = 200) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCABULARY, count).tolist()


def dump(manager: KVManager) -> Any:
    """All that callers can notice of a manager, counters of queries apart."""
    store = manager.store
    return (
        cache_state(manager.cache),
        {one.hash: [getattr(one, name) for name in NOTICED] for one in store._blocks.values()},
        {
            one.hash: (one.entries.tolist(), None if one.quantized is None else one.quantized.tolist())
            for one in store._blocks.values()
        },
        store.used_bytes,
        {sequence: block.hash for sequence, block in store._standing.items()},
        {sequence: (one.tokens, one.root, one.session, one.fresh_pages) for sequence, one in manager._requests.items()},
        list(manager._free),
        [sorted(one.hash for one in queue._place) for queue in store.policy.queues],
        dict(store.counters.evictions),
    )


NOTICED = [name for name in Block.__slots__ if name not in ("parent", "entries", "quantized", "importance")]


@pytest.mark.parametrize("device", DEVICES)
def test_64_sequences_over_one_prompt_are_64_separate_caches(device: str) -> None:
    """One copy of the prompt's pages, and outputs that are equal bit for bit, also beyond the recent window."""
    sequences, system, own = 64, prompt(1, 256), 96
    manager = make(max_sequences=sequences, formats=INT4, device=device)
    cache = manager.cache
    first = manager.start([*system, 0])
    append(cache, {first.sequence: system})
    manager.cache_prefix(first.sequence, pin=True)
    manager.finish(first.sequence)
    small = sum(cache.pools.page_bytes(side, INT4) for side in Side) * LAYERS
    one_copy = 2 * small + 2 * 2 * LAYERS * FULL_BYTES  # the first page and the last are in 16 bits
    assert cache.pools.bytes_in_use == cache.held_bytes == one_copy
    started = [manager.start([*system, number % VOCABULARY]) for number in range(sequences)]
    assert {(one.tokens, one.is_exact) for one in started} == {(256, True)}
    assert cache.pools.bytes_in_use == one_copy
    separate = make_cache(max_sequences=sequences, formats=INT4, device=device)
    for sequence in range(sequences):
        append(separate, {sequence: system})
    for begin in range(0, own, 8):
        rows = {s: [(s * 7 + begin + i) % VOCABULARY for i in range(8)] for s in range(sequences)}
        ours = append(cache, {started[s].sequence: tokens for s, tokens in rows.items()})
        theirs = append(separate, rows)
        assert all(torch.equal(x, y) for x, y in zip(ours, theirs, strict=True))
        manager.append_tokens([one.sequence for one in started], [tokens[0] for tokens in rows.values()])
    # 352 tokens: 5.5 pages. The fourth is in 16 bits for who starts anew, and quantized once for all that have gone on.
    shared = one_copy + small
    assert cache.pools.bytes_in_use == shared + sequences * 2 * 2 * LAYERS * FULL_BYTES
    assert separate.pools.bytes_in_use == sequences * (3 * small + 3 * 2 * LAYERS * FULL_BYTES)
    for one in started:
        manager.finish(one.sequence, keep=False)
    assert cache.pools.bytes_in_use == cache.held_bytes == one_copy


def test_multi_turn_prompts_have_the_bits_of_one_cache() -> None:
    """Each turn goes on where the one before it ended, with the pages that it left: as if it had never ended."""
    manager, alone = make(formats=INT4), make_cache(formats=INT4)
    tokens = prompt(2, 192)
    found = []
    for turn in range(4):
        started = manager.start(tokens, session="a")
        found.append((started.tokens, started.is_exact))
        ours = append(manager.cache, {started.sequence: tokens[started.tokens :]})
        theirs = append(alone, {0: tokens[alone.length(0, 0) :]})
        for x, y in zip(ours, theirs, strict=True):
            assert torch.equal(x[:, :, -64:], y[:, :, -64:])
        manager.finish(started.sequence)
        tokens = tokens + prompt(10 + turn, 128)
    assert found == [(0, True), (192, True), (320, True), (448, True)]


def test_a_token_is_left_to_compute() -> None:
    manager = make()
    run(manager, prompt(2, 192))
    assert manager.match(prompt(2, 192)).tokens == 192
    assert manager.start(prompt(2, 192)).tokens == 128
    assert manager.attach_prefix(manager.match(prompt(2, 192))).tokens == 192
    assert manager.start([]).tokens == 0


def test_prefix_that_is_not_exact_says_so() -> None:
    manager = make(formats=INT4)
    tokens = prompt(3, 320)
    run(manager, tokens)
    # The window of 256 tokens was quantized when the sequence went on to 320.
    other = manager.start([*tokens[:256], 1])
    assert other == Started(other.sequence, 256, is_exact=False)
    k, _ = manager.cache.read(0, other.sequence)
    exact = qkv(0, tokens[:256], 0)[1]
    assert torch.equal(k[:, :64], exact[:, :64])
    assert 0 < (k - exact).abs().max() < 0.5


def test_a_match_that_is_attached_later_says_what_has_become_of_it() -> None:
    manager, tokens = make(formats=INT4), prompt(3, 256)
    run(manager, tokens)
    match = manager.match(tokens)
    assert (match.tokens, match.is_exact) == (256, True)
    other = manager.start([*tokens, 1])
    append(manager.cache, {other.sequence: prompt(4, 64)})  # quantizes the newest page, for the store too
    found = manager.attach_prefix(match)
    assert found == Started(found.sequence, 256, is_exact=False)
    # What was evicted meanwhile are no tokens of the sequence.
    for sequence in (other.sequence, found.sequence):
        manager.finish(sequence, keep=False)
    manager.store.evict(1)
    found = manager.attach_prefix(match)
    assert found.tokens == 192
    others = prompt(5, 64)
    append(manager.cache, {found.sequence: others})
    for token in others:
        manager.append_tokens([found.sequence], [token])
    assert manager.finish(found.sequence) == 256
    assert manager.match(tokens).tokens == 192
    assert manager.match([*tokens[:192], *others]).tokens == 256


def test_under_a_budget_nothing_but_an_empty_match_is_exact() -> None:
    manager = make(budget=0.5)
    tokens = prompt(4, 320)
    first = manager.start(tokens)
    assert first.is_exact
    append(manager.cache, {first.sequence: tokens})
    manager.cache.observe(0, torch.rand(1, 1, 5), [first.sequence])
    manager.finish(first.sequence)
    again = manager.start([*tokens, 1])
    assert (again.tokens, again.is_exact) == (320, False)
    importance = manager.cache.importance_of(again.sequence)
    assert importance.weight[0].all()
    assert not importance.weight[1].any()


def test_what_two_have_computed_is_as_recent_as_the_second() -> None:
    manager = make()
    tokens = prompt(1, 64)
    one, two = manager.start(tokens), manager.start(tokens)
    append(manager.cache, {one.sequence: tokens, two.sequence: tokens})
    manager.finish(one.sequence)
    run(manager, prompt(2, 64))
    manager.finish(two.sequence)
    manager.store.evict(1)
    assert (manager.match(tokens).pages, manager.match(prompt(2, 64)).pages) == (1, 0)


# What finds nothing --------------------------------------------------------------------------------------------------


def test_other_adapters_and_tenants_find_nothing() -> None:
    manager = make()
    tokens = prompt(5)
    assert run(manager, tokens) == 0
    for other in ({"adapter": "a"}, {"salt": "s"}, {"adapter": "a", "salt": "s"}, {"adapter": "s"}):
        assert manager.match(tokens, **other).pages == 0
        assert run(manager, tokens, **other) == 0
        assert run(manager, tokens, **other) == 192
    assert run(manager, tokens) == 192
    assert len(manager.store) == 5 * 3


@pytest.mark.parametrize(
    "options",
    [
        {"formats": PageFormat.INT3},
        {"formats": None},
        {"formats": [(INT4, INT4), (INT4, PageFormat.INT3)]},
        {"formats": None, "budget": 0.5},
        {"formats": None, "budget": 0.5, "policy": "uniform"},
        {"dtype": torch.bfloat16},
        {"recent_tokens": 128},
        {"sinks": 0},
        {"head_dim": 32},
        {"key_order": (0, 1), "head_dim": 32},
    ],
    ids=str,
)
def test_roots_of_other_caches_differ(options: dict[str, Any]) -> None:
    def root(model: Any = "m", **options: Any) -> bytes:
        head_dim = options.pop("head_dim", 16)
        cache = KVCache(LAYERS, HEADS, head_dim, 640, device="cpu", **({"formats": INT4} | options))
        return KVManager(cache, model).store.root

    assert root(**options) != root()
    if "key_order" in options:
        assert root(**options) != root(head_dim=32)
    assert root() == root()


def test_roots_of_other_models_differ() -> None:
    digest = "0" * 64
    fingerprints = [
        Fingerprint(digest, digest, digest, {}, "float16"),
        Fingerprint("1" + digest[1:], digest, digest, {}, "float16"),
        Fingerprint(digest, digest, digest, {}, "float16", digest),
    ]
    managers = [KVManager(make_cache(), model) for model in [*fingerprints, digest, "x"]]
    managers.append(KVManager(make_cache(), "x", adapter="a"))
    assert len({manager.store.root for manager in managers}) == 5  # the first and the fourth name one model
    assert managers[0].store.root == managers[3].store.root


# What fails ----------------------------------------------------------------------------------------------------------


def test_no_free_sequence_changes_nothing() -> None:
    manager = make(max_sequences=2)
    run(manager, prompt(6))
    for _ in range(2):
        one = manager.start(prompt(6))
    before = dump(manager)
    for action in (
        lambda: manager.start(prompt(6)),
        lambda: manager.attach_prefix(manager.match(prompt(6))),
        lambda: manager.fork(one.sequence),
    ):
        with pytest.raises(CacheFullError, match="all 2 sequences are in use"):
            action()
        assert dump(manager) == before


def test_a_manager_that_is_closed_leaves_an_empty_cache() -> None:
    cache, tokens = make_cache(formats=INT4), prompt(3, 300)
    with KVManager(cache, "tiny", host_bytes=1 << 20) as manager:
        one = manager.start(tokens)
        append(cache, {one.sequence: tokens})
        prefix = manager.cache_prefix(one.sequence, pin=True)
        run(manager, prompt(4, 200))
        manager.fork(one.sequence)
        assert cache.held_bytes > 0
    assert cache.pools.bytes_in_use == cache.held_bytes == manager.store.used_bytes == 0
    assert not cache.table.lengths.any()
    manager.release_prefix(prefix)
    assert cache.pools.bytes_in_use == 0
    manager.close()
    other = KVManager(cache, "tiny")
    assert [run(other, tokens), run(other, tokens)] == [0, 256]


@pytest.mark.parametrize("salt", [0, None, b"", False])
def test_a_salt_is_a_text(salt: Any) -> None:
    """A tenant of number 0 is not the one that has none."""
    manager = make()
    for call in (manager.start, manager.match):
        with pytest.raises(CacheInputError, match="a text is wanted"):
            call(prompt(3, 70), salt=salt)
    assert not manager._requests


def test_exhausted_memory_changes_nothing_and_pinned_stays() -> None:
    """Eleven pages' room: three pinned, one in use, and what prefixes have left gives way until there is no more."""
    page = 2 * LAYERS * FULL_BYTES
    manager = make(max_bytes=11 * page)
    first = manager.start(prompt(7, 193))
    append(manager.cache, {first.sequence: prompt(7, 192)})
    pinned = manager.cache_prefix(first.sequence, pin=True)
    manager.finish(first.sequence)
    for seed in range(20, 30):
        run(manager, prompt(seed, 128))
    assert manager.cache.pools.bytes_in_use <= 11 * page
    assert manager.match(prompt(7, 192)).tokens == 192
    assert manager.metrics().evictions["memory"] > 10
    running = manager.start(prompt(8, 64 * 9 + 1))
    append(manager.cache, {running.sequence: prompt(8, 64 * 8)})
    assert len(manager.store) == 3
    before = dump(manager)
    with pytest.raises(CacheFullError):
        append(manager.cache, {running.sequence: prompt(9, 64)})
    assert dump(manager) == before
    manager.release_prefix(pinned)
    append(manager.cache, {running.sequence: prompt(9, 64)})
    assert len(manager.store) == 2
    assert torch.equal(manager.cache.read(1, running.sequence)[0][:, :512], qkv(1, prompt(8, 512), 0)[1])


def test_pinned_prefix_beyond_the_capacity_changes_nothing() -> None:
    page = 2 * LAYERS * FULL_BYTES
    manager = make(4 * page)
    run(manager, prompt(7, 192))
    one = manager.start(prompt(8, 321))
    append(manager.cache, {one.sequence: prompt(8, 320)})
    before = dump(manager)
    with pytest.raises(CacheFullError, match=f"needs {5 * page} bytes more"):
        manager.cache_prefix(one.sequence, pin=True)
    assert dump(manager) == before
    assert manager.cache_prefix(one.sequence).tokens == 256


@pytest.mark.parametrize("pin", [True, False])
def test_quantized_pages_beside_a_held_prefix_count(pin: bool) -> None:
    """Whoever goes on behind the end of a held prefix has that end quantized: a second copy, which takes room."""
    manager, tokens = make(formats=INT4), prompt(3, 256)
    one = manager.start(tokens)
    append(manager.cache, {one.sequence: tokens[:128]})
    manager.cache_prefix(one.sequence, pin=True)
    append(manager.cache, {one.sequence: tokens[128:]})
    beside = sum(manager.cache.pools.bytes_of(entry) for entry in manager.cache.entries[:, :, one.sequence, 1].flat)
    behind = sum(manager.cache.pools.bytes_of(entry) for entry in manager.cache.entries[:, :, one.sequence, 2:4].flat)
    manager.store.capacity_bytes = manager.store.used_bytes + (behind if pin else beside - 1)
    before = dump(manager)
    if pin:
        with pytest.raises(CacheFullError, match=f"needs {behind + beside} bytes more"):
            manager.cache_prefix(one.sequence, pin=True)
        assert dump(manager) == before
        manager.store.capacity_bytes += beside
        assert manager.cache_prefix(one.sequence, pin=True).tokens == 256
    else:
        assert manager.finish(one.sequence) == 128
        assert manager.match(tokens).tokens == 128
    assert manager.store.used_bytes <= manager.store.capacity_bytes
    assert manager.store.used_bytes == sum(block.size_bytes for block in manager.store._blocks.values())


def test_quantized_pages_of_prefixes_make_room_for_new_ones() -> None:
    """Pages of four bits are evicted until whole slabs are empty, which pages of 16 bits then get."""
    manager = make(formats=INT4, max_bytes=30 * FULL_BYTES, max_sequences=2, slab_bytes=1)
    for seed in range(30):
        tokens = prompt(seed, 64 * 6)
        assert run(manager, tokens) == 0
        assert manager.cache.pools.bytes_allocated <= 30 * FULL_BYTES
    assert manager.metrics().evictions["memory"] > 60
    assert manager.match(tokens).pages == 6
    with pytest.raises(CacheFullError):
        run(manager, prompt(31, 64 * 16))
    manager.finish(0, keep=False)
    assert manager.cache.pools.bytes_in_use == manager.cache.held_bytes == manager.store.used_bytes


def test_memory_that_ends_evicts_enough_or_nothing() -> None:
    """Whether enough can be evicted is known before: of pages of all kinds, in slabs of which some pages are free."""
    failed = 0
    for seed in (15, 23, 39):
        rng = random.Random(seed)
        formats = rng.choice([INT4, PageFormat.INT2, None])
        max_bytes, slab_bytes = rng.randint(16, 60) * FULL_BYTES, rng.choice([1, 4 * FULL_BYTES, 20 * FULL_BYTES])
        policy = rng.choice(["lru", "conversation"])
        options: dict[str, Any] = {"max_sequences": 4, "device": "cpu", "formats": formats}
        cache = KVCache(1, HEADS, HEAD_DIM, MAX_TOKENS, max_bytes=max_bytes, slab_bytes=slab_bytes, **options)
        manager = KVManager(cache, "tiny", policy=policy)
        for _ in range(60):
            running = list(manager._requests)
            if len(running) < 4 and rng.random() < 0.5:
                tokens = [token for _ in range(rng.randint(1, 5)) for token in [rng.randrange(3)] * 64]
                started = manager.start(tokens)
                sequence, new = started.sequence, tokens[started.tokens :]
            elif running:
                sequence = rng.choice(running)
                if rng.random() < 0.4:
                    manager.finish(sequence)
                    continue
                new = [rng.randrange(9)] * rng.choice([1, 64, 128])
                manager.append_tokens([sequence] * len(new), new)
            else:
                continue
            if cache.length(0, sequence) + len(new) > MAX_TOKENS - 64:
                manager.finish(sequence)
                continue
            before = dump(manager)
            try:
                cache.append(0, *qkv(0, new, cache.length(0, sequence))[1:, None], [sequence])
            except CacheFullError:
                failed += 1
                # Slabs may have been cut anew, of which nothing is to be noticed.
                assert dump(manager)[1:] == before[1:]
                manager.finish(sequence, keep=False)
    assert failed > 5


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda m: m.append_tokens([0, 3], [1, 2]), "sequence 3 is not started"),
        (lambda m: m.append_tokens([0, 1], [1]), "2 sequences and 1 tokens"),
        (lambda m: m.append_tokens([0, 1], [1, 1 << 40]), "tokens are"),
        (lambda m: m.append_tokens([0, 1], [1, 0.5]), "tokens are"),
        (lambda m: m.finish(3), "not started"),
        (lambda m: m.fork(3), "not started"),
        (lambda m: m.crop(0, 1000), "cannot be kept"),
        (lambda m: m.reorder([0, 3]), "not started"),
        (lambda m: m.cache_prefix([1]), "not started"),
        (lambda m: m.start([0.5]), "integers"),
    ],
)
def test_wrong_input_changes_nothing(action: Any, message: str) -> None:
    manager = make()
    for seed in (1, 2):
        one = manager.start(prompt(seed))
        append(manager.cache, {one.sequence: prompt(seed)})
    before = dump(manager)
    with pytest.raises(CacheInputError, match=message):
        action(manager)
    assert dump(manager) == before


def test_cache_with_tokens_is_refused() -> None:
    cache = make_cache()
    append(cache, {0: [1]})
    with pytest.raises(CacheInputError, match="the cache has tokens"):
        KVManager(cache, "tiny")
    with pytest.raises(CacheInputError, match="eviction policy is 'fifo'"):
        make(policy="fifo")


# Sequences -----------------------------------------------------------------------------------------------------------


def test_page_that_was_cut_out_of_a_quantized_one_is_not_cached() -> None:
    """A fresh prefill would have other bits in it, and behind it."""
    manager = make(formats=INT4)
    tokens = prompt(11, 320)
    one = manager.start(tokens)
    append(manager.cache, {one.sequence: tokens})
    manager.crop(one.sequence, 150)
    append(manager.cache, {one.sequence: tokens[150:]})
    manager.append_tokens([one.sequence] * 170, tokens[150:])
    assert manager.finish(one.sequence) == 128
    # Cut in the recent window, a page stays what it was.
    one = manager.start(tokens)
    append(manager.cache, {one.sequence: tokens[one.tokens :]})
    manager.crop(one.sequence, 300)
    append(manager.cache, {one.sequence: tokens[300:]})
    manager.append_tokens([one.sequence] * 20, tokens[300:])
    assert manager.finish(one.sequence) == 320


def test_forks_and_beams_are_followed() -> None:
    manager = make()
    tokens = prompt(12, 128)
    one = manager.start(tokens)
    append(manager.cache, {one.sequence: tokens})
    manager.cache_prefix(one.sequence)
    two = manager.fork(one.sequence)
    append(manager.cache, {one.sequence: [1], two: [2]})
    manager.append_tokens([one.sequence, two], [1, 2])
    manager.reorder([two, two, one.sequence])
    assert [list(manager._requests[sequence].tokens[-1:]) for sequence in range(3)] == [[2], [2], [1]]
    assert manager.store.evict() == 0
    for sequence in range(3):
        rest = prompt(13 + sequence, 63)
        append(manager.cache, {sequence: rest})
        manager.append_tokens([sequence] * 63, rest)
        manager.finish(sequence)
    assert manager.match([*tokens, 2, *prompt(14, 63)]).tokens == 192
    assert manager.match([*tokens, 1, *prompt(15, 63)]).tokens == 192
    assert manager.store.evict() == 5 * 2 * LAYERS * FULL_BYTES
    assert manager.cache.pools.bytes_in_use == 0


# Metrics -------------------------------------------------------------------------------------------------------------

_SAMPLE = re.compile(r'^(kvpack_[a-z_]+)(?:\{([a-z]+)="([^"]+)"\})? (-?[0-9.e+-]+)$')


def parsed(text: str) -> dict[str, Any]:
    """Prometheus' text format: each sample behind a HELP and a TYPE of its family."""
    samples: dict[str, Any] = {}
    family = kind = ""
    assert text.endswith("\n")
    for line in text[:-1].split("\n"):
        if line.startswith("# HELP "):
            family = line.split()[2]
            assert len(line.split()) > 3
        elif line.startswith("# TYPE "):
            _, _, name, kind = line.split()
            assert name == family
            assert kind in ("gauge", "counter", "histogram")
            assert (kind == "counter") == family.endswith("_total")
        else:
            match = _SAMPLE.match(line)
            assert match, line
            name, label, value, number = match.groups()
            of_histogram = kind == "histogram" and name.removeprefix(family) in ("_bucket", "_sum", "_count")
            assert name == family or of_histogram
            key = name if label is None else f"{name}:{value}"
            assert key not in samples
            samples[key] = float(number)
    return samples


def test_metrics() -> None:
    page = 2 * LAYERS * FULL_BYTES
    now = [100.0]
    manager = KVManager(make_cache(), "tiny", policy="lru", prefix_bytes=4 * page, window_s=50, clock=lambda: now[0])
    run(manager, prompt(1, 200))
    now[0] += 10
    run(manager, prompt(1, 200))
    now[0] += 20
    run(manager, prompt(2, 130))  # two pages, for which one goes
    now[0] += 5
    manager.start(prompt(1, 200))
    found = manager.metrics()
    assert (found.queries, found.hit_queries, found.queried_tokens, found.hit_tokens) == (4, 2, 730, 5 * 64)
    assert (found.queried_pages, found.hit_pages, found.cached_blocks) == (3 + 3 + 2 + 3, 3 + 2, 5)
    assert found.hit_rate == 5 / 11
    assert found.evictions == {"capacity": 1}
    assert (found.lifetimes.sum_s, found.idle_times.sum_s, found.reuse_gaps.sum_s) == (30, 20, 3 * 10 + 2 * 25)
    assert (found.lifetimes.count, found.idle_times.count, found.reuse_gaps.count) == (1, 1, 5)
    assert (found.thrashed_pages, found.thrashing, found.is_thrashing) == (1, 1 / 11, False)
    assert (found.working_set_pages, found.blocks, found.prefix_bytes) == (5, 4, 4 * page)
    assert (found.held_bytes, found.page_bytes, found.running_sequences) == (2 * page, 4 * page, 1)
    assert found.slab_bytes == manager.cache.pools.bytes_allocated
    samples = parsed(found.prometheus())
    assert samples["kvpack_prefix_hit_tokens_total"] == 320
    assert samples["kvpack_prefix_evictions_total:capacity"] == 1
    assert samples["kvpack_prefix_capacity_bytes"] == 4 * page
    gaps = "kvpack_prefix_block_reuse_gap_seconds"
    assert [samples[f"{gaps}_bucket:{bound}"] for bound in ("5.0", "15.0", "60.0", "+Inf")] == [0, 3, 5, 5]
    assert samples[f"{gaps}_sum"] == 80
    now[0] += 51
    later = manager.metrics()
    assert (later.working_set_pages, later.thrashing, later.thrashed_pages) == (0, 0.0, 1)
    assert "capacity_bytes" not in make().metrics().prometheus()


def test_thrashing_is_noticed() -> None:
    page = 2 * LAYERS * FULL_BYTES
    manager = make(3 * page)
    for _ in range(4):
        for seed in (1, 2):
            run(manager, prompt(seed, 130))
    assert not manager.metrics().is_thrashing or manager.metrics().thrashed_pages > 0
    for _ in range(4):
        for seed in (1, 2, 3):
            run(manager, prompt(seed, 130))
    assert manager.metrics().is_thrashing
    assert manager.metrics().hit_rate < 0.5


def test_any_number_of_queries_is_counted_in_the_same_memory() -> None:
    """Many within ten minutes, of which each asks for three pages and half miss one that was evicted."""
    counters, lost = PrefixCounters(600.0), b"lost"
    for number in range(200_000):
        now_s = number * 600 / 200_000
        if number % 1000 == 0:
            counters.evicted(lost, "capacity", 1.0, 1.0, now_s)
        counters.queried(200, 3, 2, [lost] if number % 2 else [], now_s)
    assert len(counters._queries) <= 1025
    assert counters.queries == 200_000
    assert counters.thrashing(600.0) == pytest.approx(1 / 6)
    counters.queried(200, 3, 3, [], 900.0)
    assert counters._asked == pytest.approx(300_000, rel=0.002)
    assert counters.thrashing(900.0) == pytest.approx(1 / 6, rel=0.002)
    counters.queried(200, 2, 2, [], 1501.0)
    assert (counters._asked, counters.thrashing(1501.0)) == (2, 0.0)


# Time and threads ----------------------------------------------------------------------------------------------------


def test_a_step_of_a_batch_of_64_costs_the_host_little() -> None:
    manager = make(max_sequences=64)
    sequences = [manager.start(prompt(one)).sequence for one in range(64)]
    tokens = list(range(64))
    best = math.inf
    for _ in range(20):
        start = time.perf_counter()
        manager.append_tokens(sequences, tokens)
        best = min(best, (time.perf_counter() - start) / 64)
    assert best < 50e-6


def test_8_threads_end_as_one() -> None:
    """Requests of eight tenants and one that all share: what is cached, counted and left is what one thread leaves."""
    threads, requests = 8, 25

    def work(manager: KVManager, tenant: int) -> int:
        rng = random.Random(tenant)
        hits = 0
        for number in range(requests):
            own = [rng.randrange(3), rng.randrange(3)]
            salt = "" if number % 4 == 0 else str(tenant)
            tokens = [token for page in own for token in [page] * 64] + [tenant]
            one = manager.start(tokens, salt=salt, session=str(tenant))
            hits += one.tokens if salt else 0
            with manager.lock:
                append(manager.cache, {one.sequence: tokens[one.tokens :]})
                k, _ = manager.cache.read(1, one.sequence)
            assert torch.equal(k, qkv(1, tokens, 0)[1])
            other = manager.fork(one.sequence) if number % 5 == 0 else None
            if other is not None:
                manager.crop(other, 100)
                manager.finish(other)
            manager.finish(one.sequence)
            manager.metrics()
        return hits

    def outcome(manager: KVManager) -> Any:
        store = manager.store
        blocks = {
            one.hash: (one.depth, one.children, one.pins, one.users, one.use_count) for one in store._blocks.values()
        }
        found = manager.metrics()
        return (
            blocks,
            store.used_bytes,
            found.queries,
            found.queried_pages,
            found.hit_pages,
            found.cached_blocks,
            manager.cache.pools.bytes_in_use,
            manager.cache.held_bytes,
            sorted(manager._free),
        )

    alone, together = make(max_sequences=2 * threads), make(max_sequences=2 * threads)
    expected = [work(alone, tenant) for tenant in range(threads)]
    found: dict[int, int] = {}
    failed: list[BaseException] = []

    def thread(tenant: int) -> None:
        try:
            found[tenant] = work(together, tenant)
        except BaseException as error:  # told below
            failed.append(error)

    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        running = [threading.Thread(target=thread, args=(tenant,)) for tenant in range(threads)]
        for one in running:
            one.start()
        for one in running:
            one.join()
    finally:
        sys.setswitchinterval(switch)
    assert not failed
    assert [found[tenant] for tenant in range(threads)] == expected
    first, second = outcome(alone), outcome(together)
    # Two requests for what neither finds compute it both: pages that are found depend on who comes first, no more.
    assert {key: value[:4] for key, value in first[0].items()} == {key: value[:4] for key, value in second[0].items()}
    assert first[1:4] == second[1:4]
    assert first[5:] == second[5:]
    assert abs(first[4] - second[4]) <= 2 * threads


# Against a model -----------------------------------------------------------------------------------------------------

PAGE = 2 * LAYERS * FULL_BYTES
PROMPTS = st.lists(st.integers(0, 1), min_size=1, max_size=5)


class ManagerMachine(RuleBasedStateMachine):
    """A manager of real pages against dictionaries: {sequence: tokens}, and the prefixes that were ever kept.

    Values follow from tokens and places, so each page that a sequence reads says whether it is the right one.
    """

    device = "cpu"

    @initialize(
        formats=st.sampled_from([None, INT4]),
        policy=st.sampled_from(["lru", "adaptive", "priority"]),
        prefix_pages=st.sampled_from([None, 6]),
        memory_pages=st.sampled_from([14, 60]),
    )
    def begin(self, formats: Any, policy: str, prefix_pages: int | None, memory_pages: int) -> None:
        self.manager = make(
            None if prefix_pages is None else prefix_pages * PAGE,
            policy=policy,
            formats=formats,
            max_bytes=memory_pages * PAGE,
            device=self.device,
        )
        self.exact = formats is None
        self.tokens: dict[int, list[int]] = {}
        self.kept: set[tuple[int, ...]] = set()
        self.prefixes: list[tuple[Any, list[int], bool]] = []

    def attempt(self, action: Any) -> Any:
        """The result, or None where it fails and nothing has changed."""
        before = dump(self.manager)
        try:
            return action()
        except CacheFullError:
            assert dump(self.manager) == before
            return None

    @rule(pages=PROMPTS, keep=st.booleans())
    def request(self, pages: list[int], keep: bool) -> None:
        """All of one, for which a sequence is made free."""
        if len(self.tokens) == 4:
            self.end(next(iter(self.tokens)), keep)
        before = set(self.tokens)
        self.start(pages, 0)
        for sequence in set(self.tokens) - before:
            self.end(sequence, True)

    @rule(pages=PROMPTS, more=st.sampled_from([0, 1, 30]))
    def start(self, pages: list[int], more: int) -> None:
        tokens = [token for page in pages for token in [page, *range(1, 64)]][: 64 * len(pages) - more]
        one = self.attempt(lambda: self.manager.start(tokens))
        if one is None:
            return
        assert one.tokens % 64 == 0
        assert one.tokens < len(tokens)
        assert one.tokens == 0 or tuple(tokens[: one.tokens]) in self.kept
        longest = max((n for n in range(0, len(tokens), 64) if tuple(tokens[:n]) in self.kept), default=0)
        if not self.manager.metrics().evictions:
            assert one.tokens == longest
        self.tokens[one.sequence] = tokens[: one.tokens]
        self.append(one.sequence, tokens[one.tokens :])

    def append(self, sequence: int, tokens: list[int]) -> None:
        """A sequence for which a layer has no room is given up, as a server would."""
        try:
            append(self.manager.cache, {sequence: tokens})
        except CacheFullError:
            self.manager.finish(sequence, keep=False)
            del self.tokens[sequence]
        else:
            self.tokens[sequence] = self.tokens[sequence] + tokens

    def one(self, data: Any) -> int:
        return data.draw(st.sampled_from(sorted(self.tokens)))

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), token=st.integers(0, 3), count=st.sampled_from([1, 5, 64]))
    def decode(self, data: Any, token: int, count: int) -> None:
        sequence = self.one(data)
        if len(self.tokens[sequence]) + count > MAX_TOKENS:
            return
        # What the prompt did not have yet, the manager is told of now.
        known = len(self.manager._requests[sequence].tokens)
        tokens = (self.manager._requests[sequence].tokens.tolist() + [token] * count)[len(self.tokens[sequence]) :]
        self.manager.append_tokens([sequence] * count, [token] * count)
        assert known + count == len(self.manager._requests[sequence].tokens)
        self.append(sequence, tokens)

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def fork(self, data: Any) -> None:
        sequence = self.one(data)
        target = self.attempt(lambda: self.manager.fork(sequence))
        if target is not None:
            self.tokens[target] = list(self.tokens[sequence])

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def crop(self, data: Any) -> None:
        sequence = self.one(data)
        tokens = data.draw(st.integers(1, len(self.tokens[sequence])))
        if self.attempt(lambda: self.manager.crop(sequence, tokens) or True):
            self.tokens[sequence] = self.tokens[sequence][:tokens]

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), keep=st.booleans())
    def finish(self, data: Any, keep: bool) -> None:
        self.end(self.one(data), keep)

    def end(self, sequence: int, keep: bool) -> None:
        tokens = self.tokens.pop(sequence)
        cached = self.manager.finish(sequence, keep=keep)
        assert cached <= len(tokens)
        if keep:
            self.know(tokens)

    def know(self, tokens: list[int]) -> None:
        self.kept |= {tuple(tokens[:end]) for end in range(64, len(tokens) + 1, 64)}

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), pin=st.booleans())
    def hold(self, data: Any, pin: bool) -> None:
        sequence = self.one(data)
        prefix = self.attempt(lambda: self.manager.cache_prefix(sequence, pin=pin))
        if prefix is not None:
            tokens = self.tokens[sequence]
            self.know(tokens)
            self.prefixes.append((prefix, tokens[: prefix.tokens], pin))

    @precondition(lambda self: self.prefixes)
    @rule(data=st.data())
    def release(self, data: Any) -> None:
        prefix, *_ = self.prefixes.pop(data.draw(st.integers(0, len(self.prefixes) - 1)))
        self.manager.release_prefix(prefix)

    @rule()
    def evict(self) -> None:
        self.manager.store.evict(PAGE)

    @invariant()
    def holds(self) -> None:
        if not hasattr(self, "manager"):
            return
        manager, cache = self.manager, self.manager.cache
        assert sorted(manager._requests) == sorted(self.tokens)
        for sequence, tokens in self.tokens.items():
            for layer in range(LAYERS):
                for side, values in enumerate(cache.read(layer, sequence)):
                    found = values.cpu()
                    expected = qkv(layer, tokens, 0)[1 + side]
                    if self.exact:
                        assert torch.equal(found, expected)
                    else:
                        assert found.shape == expected.shape
                        assert (found - expected).abs().mean() < 0.25
        store = manager.store
        held = Counter(entry for block in store._blocks.values() for entry in block.pages().tolist())
        assert set(held.values()) <= {1}
        in_table = set(cache.entries[cache.entries >= 0].tolist())
        for entry in held | Counter(in_table):
            info = cache.pools.info(entry)
            assert (info.held, info.is_in_table) == (held[entry], entry in in_table)
        sizes = {entry: cache.pools.bytes_of(entry) for entry in held}
        assert store.used_bytes == sum(sizes.values())
        assert cache.held_bytes == sum(size for entry, size in sizes.items() if entry not in in_table)
        assert cache.pools.bytes_in_use == sum(cache._used_bytes) + cache.held_bytes
        assert store.capacity_bytes is None or store.used_bytes <= store.capacity_bytes
        for _, tokens, is_pinned in self.prefixes:
            if is_pinned:
                assert manager.match(tokens).tokens == len(tokens)
        if self.exact or not self.prefixes:
            assert cache.status.tolist()[0] == 0


class CudaManagerMachine(ManagerMachine):
    device = "cuda"


TestManager = ManagerMachine.TestCase
TestManagerOnCuda = pytest.mark.gpu(CudaManagerMachine.TestCase)
TestManager.settings = TestManagerOnCuda.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)


def test_example_of_the_document(capsys: pytest.CaptureFixture[str]) -> None:
    document = (Path(__file__).parents[2] / "docs" / "KV-MANAGER.md").read_text()
    exec(document.split("```python\n")[1].split("```")[0], {})
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["0", "256", "256", str(8 / 12)]
