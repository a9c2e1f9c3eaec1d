"""The cache against a model of it: every token, every page's bytes, whose pages they are, and what they may take."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from pool_dump import cache_state as state

from kvpack.encode.page_coder import FLOAT_TYPES, dequantize_blocks, quantize_blocks
from kvpack.errors import CacheFullError, CacheInputError, PageEntryError
from kvpack.format.pages import PageFormat, PageLayout, Side

torch = pytest.importorskip("torch")

from kvpack.runtime.kv import page_table  # noqa: E402
from kvpack.runtime.kv.allocator import POLICIES, Outcome, Policy  # noqa: E402
from kvpack.runtime.kv.cache import KVCache  # noqa: E402
from kvpack.runtime.kv.page_pools import PageInfo, PageOwner  # noqa: E402

LAYERS, HEADS, HEAD_DIM, SEQUENCES, MAX_TOKENS = 2, 2, 16, 3, 64 * 20
INT4, INT8 = PageFormat.INT4, PageFormat.INT8
FULL = HEADS * HEAD_DIM * 64 * 2
Place = tuple[int, int, int, int]  # layer, side, sequence, index


def make_cache(device: str = "cpu", **options: Any) -> KVCache:
    # Slabs of 8 pages.
    defaults = {"max_sequences": SEQUENCES, "device": device, "slab_bytes": 1}
    return KVCache(LAYERS, HEADS, HEAD_DIM, MAX_TOKENS, **(defaults | options))


def random_tokens(cache: KVCache, batch: int, count: int, seed: int) -> tuple[Any, Any]:
    """Keys and values whose tokens and channels differ in size, as those of models do."""
    rng = np.random.default_rng(seed)
    size = np.exp(rng.normal(0, 1, (2, 1, HEADS, 1, HEAD_DIM)))
    both = torch.from_numpy(rng.normal(0, 1, (2, batch, HEADS, count, HEAD_DIM)) * size)
    k, v = both.to(cache.dtype).to(cache.device)
    return k, v


def bits(tensor: Any) -> np.ndarray:
    """Values as NumPy has them, bit for bit."""
    numpy_type = FLOAT_TYPES[PageFormat.FP16 if tensor.dtype == torch.float16 else PageFormat.BF16]
    return tensor.cpu().contiguous().view(torch.int16).numpy().view(numpy_type)


def open_end(cache: KVCache, tokens: int) -> int:
    return max(0, (tokens - cache.recent_tokens) // 64)


def is_pinned(cache: KVCache, tokens: int, index: int) -> bool:
    return index < -(-cache.sinks // 64) or index >= open_end(cache, tokens)


def layer_bytes(cache: KVCache, layer: int) -> dict[str, float]:
    """What the pages take, what they may take, and what they would take with all that is open at 2 bits."""
    used = full = pinned = least = 0
    for (side, sequence, index), page_format in np.ndenumerate(cache.precision_map(layer)):
        if page_format < 0:
            continue
        size = cache.pools.page_bytes(Side(side), PageFormat(page_format))
        full += FULL
        used += size
        if is_pinned(cache, cache.length(layer, sequence), index):
            pinned += size
            least += size
        else:
            least += cache.pools.page_bytes(Side(side), PageFormat.INT2)
    share = float(cache.shares[layer])
    return {"used": used, "may": max(share * full, pinned + 0.9 * share * (full - pinned)), "least": least}


class CacheMachine(RuleBasedStateMachine):
    device = "cpu"

    @initialize(
        bits_of=st.sampled_from(
            [
                *[0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.7, 1.0],
                *[None, PageFormat.INT8, PageFormat.FP8_E4M3],
                [(PageFormat.INT8, PageFormat.INT4), (PageFormat.INT3, PageFormat.INT2)],
            ]
        ),
        policy=st.sampled_from(POLICIES),
        recent_tokens=st.sampled_from([0, 64, 100]),
        sinks=st.sampled_from([0, 4, 65]),
        dtype=st.sampled_from([torch.float16, torch.bfloat16]),
        limited=st.sampled_from([False, False, False, True]),
        count=st.sampled_from([0, 63, 64, 500, 700]),
    )
    def begin(
        self, bits_of: Any, policy: Policy, recent_tokens: int, sinks: int, dtype: Any, limited: bool, count: int
    ) -> None:
        self.limited = limited
        page_table._FIRST_PAGES = 2  # so that tables grow
        self.cache = make_cache(
            self.device,
            budget=bits_of if isinstance(bits_of, float) else None,
            formats=None if isinstance(bits_of, float) else bits_of,
            policy=policy,
            recent_tokens=recent_tokens,
            sinks=sinks,
            dtype=dtype,
            max_bytes=120 * FULL if limited else 1 << 24,
        )
        self.tokens = {
            (layer, side, sequence): np.empty((HEADS, 0, HEAD_DIM), FLOAT_TYPES[self.cache.full_format])
            for layer in range(LAYERS)
            for side in Side
            for sequence in range(SEQUENCES)
        }
        # What each complete page must hold.
        self.pages: dict[Place, tuple[PageFormat, np.ndarray]] = {}
        if count:
            self.append([0, 1], [0, 1, 2], count, 0)

    def full_page(self, place: Place) -> np.ndarray:
        *where, index = place
        layout = PageLayout(Side(place[1]), self.cache.full_format, HEAD_DIM)
        return quantize_blocks(self.tokens[tuple(where)][:, 64 * index : 64 * index + 64], layout)

    def follow(self) -> None:
        """Take over new formats, each of which must be allowed, and compare what the pages hold."""
        found: dict[Place, PageFormat] = {}
        for layer in range(LAYERS):
            for (side, sequence, index), page_format in np.ndenumerate(self.cache.precision_map(layer)):
                if page_format >= 0:
                    found[layer, side, sequence, index] = PageFormat(page_format)
        pages: dict[Place, tuple[PageFormat, np.ndarray]] = {}
        for place, page_format in found.items():
            layer, side, sequence, index = place
            tokens = self.tokens[layer, side, sequence]
            if tokens.shape[1] < 64 * (index + 1):
                assert page_format == self.cache.full_format
                continue
            held_format, held = self.pages.get(place, (self.cache.full_format, None))
            held = self.full_page(place) if held is None else held
            if page_format != held_format:
                assert page_format.element_bits < held_format.element_bits
                assert not is_pinned(self.cache, tokens.shape[1], index)
                values = dequantize_blocks(held, PageLayout(Side(side), held_format, HEAD_DIM))
                held = quantize_blocks(values, PageLayout(Side(side), page_format, HEAD_DIM))
            if page_format != held_format or place not in self.pages:
                entry = int(self.cache.entries[place])
                assert self.cache.pools.blocks(entry).cpu().numpy().tobytes() == held.tobytes()
            pages[place] = page_format, held
        self.pages = pages

    @rule(count=st.sampled_from([1, 60, 64, 100, 200]), seed=st.integers(0, 99))
    def append_to_all(self, count: int, seed: int) -> None:
        self.append([0, 1], [0, 1, 2], count, seed)

    @rule(count=st.sampled_from([64, 100, 200]), seed=st.integers(0, 99))
    def append_and_reallocate(self, count: int, seed: int) -> None:
        self.append([0, 1], [0, 1, 2], count, seed)
        self.observe(seed % 2, seed)
        self.reallocate()

    @rule(
        layers=st.sampled_from([[0, 1], [0, 1], [0, 1], [1]]),
        sequences=st.sampled_from([[0, 1], [2], [2, 0]]),
        count=st.sampled_from([1, 3, 60, 64, 100, 200]),
        seed=st.integers(0, 99),
    )
    def append_to_some(self, layers: list[int], sequences: list[int], count: int, seed: int) -> None:
        self.append(layers, sequences, count, seed)

    @rule(counts=st.lists(st.sampled_from([0, 1, 3, 64, 130]), min_size=3, max_size=3), seed=st.integers(0, 99))
    def append_different_numbers(self, counts: list[int], seed: int) -> None:
        self.append([0, 1], [1, 2, 0], max(counts), seed, counts)

    def append(
        self, layers: list[int], sequences: list[int], count: int, seed: int, counts: list[int] | None = None
    ) -> None:
        of_rows = counts or [count] * len(sequences)
        for layer in layers:
            k, v = random_tokens(self.cache, len(sequences), count, seed + layer)
            before = state(self.cache)
            try:
                self.cache.append(layer, k, v, sequences, tokens=counts)
            except CacheFullError:
                assert state(self.cache) == before
                longest = max(self.cache.length(layer, s) + n for s, n in zip(sequences, of_rows, strict=True))
                assert longest > MAX_TOKENS or self.limited
                return
            for side, given in zip(Side, (k, v), strict=True):
                for sequence, new, of_row in zip(sequences, bits(given), of_rows, strict=True):
                    place = layer, side, sequence
                    self.tokens[place] = np.concatenate([self.tokens[place], new[:, count - of_row :]], axis=1)
            self.follow()

    @rule(sequence=st.integers(0, SEQUENCES - 1))
    def free(self, sequence: int) -> None:
        self.cache.free(sequence)
        for place in self.tokens:
            if place[2] == sequence:
                self.tokens[place] = self.tokens[place][:, :0]
        self.pages = {place: page for place, page in self.pages.items() if place[2] != sequence}
        self.follow()

    def observe(self, layer: int, seed: int) -> None:
        pages = self.cache.mass.shape[2]
        mass = np.random.default_rng(seed).dirichlet(np.full(pages, 0.1), (SEQUENCES, 4))
        self.cache.observe(layer, torch.from_numpy(mass).to(self.cache.device))

    def reallocate(self) -> None:
        before = state(self.cache)
        try:
            outcome = self.cache.reallocate()
        except CacheInputError:
            assert (self.cache.table.lengths != self.cache.table.lengths[0]).any()
            assert state(self.cache) == before
            return
        except CacheFullError:
            assert self.limited
            after = state(self.cache)
            after["mass"] = before["mass"]  # what was observed has been taken in
            assert after == before
            return
        assert not self.cache.mass.any()
        assert self.cache.shares.mean() <= (self.cache.budget or 1) + 1e-9
        sizes = [layer_bytes(self.cache, layer) for layer in range(LAYERS)]
        assert outcome == Outcome.HELD or any(size["used"] == size["least"] for size in sizes)
        self.follow()

    @rule(
        bad=st.sampled_from(
            [
                {"dtype": torch.float32},
                {"shape": (1, HEADS, 1, 32)},
                {"shape": (1, HEADS + 1, 1, HEAD_DIM)},
                {"shape": (2, HEADS, 1, HEAD_DIM)},
                {"sequences": [SEQUENCES]},
                {"sequences": [-1]},
                {"shape": (2, HEADS, 1, HEAD_DIM), "sequences": [1, 1]},
                {"layer": LAYERS},
                {"layer": -1},
                {"shape": (1, HEADS, MAX_TOKENS + 1, HEAD_DIM)},
            ]
        )
    )
    def refuse(self, bad: dict[str, Any]) -> None:
        before = state(self.cache)
        k = torch.ones(
            bad.get("shape", (1, HEADS, 1, HEAD_DIM)),
            dtype=bad.get("dtype", self.cache.dtype),
            device=self.cache.device,
        )
        with pytest.raises((CacheInputError, CacheFullError)):
            self.cache.append(bad.get("layer", 0), k, k, bad.get("sequences", [0]))
        assert state(self.cache) == before

    @invariant()
    def tables_agree(self) -> None:
        cache = self.cache
        assert (cache.page_table.cpu().numpy() == cache.entries).all()
        lengths = [[self.tokens[layer, 0, s].shape[1] for s in range(SEQUENCES)] for layer in range(LAYERS)]
        assert cache.table.lengths.tolist() == lengths == cache.lengths.tolist()
        cache.check()

    @invariant()
    def every_page_is_of_one_place(self) -> None:
        cache = self.cache
        held = cache.entries[cache.entries >= 0]
        assert len(np.unique(held)) == len(held)
        counts: dict[tuple[Side, PageFormat], int] = {}
        for layer in range(LAYERS):
            formats = cache.precision_map(layer)
            for (side, sequence, index), page_format in np.ndenumerate(formats):
                tokens = self.tokens[layer, side, sequence].shape[1]
                assert (page_format >= 0) == (64 * index < tokens)
                if page_format >= 0:
                    kind = Side(side), PageFormat(page_format)
                    counts[kind] = counts.get(kind, 0) + 1
                    info = cache.pools.info(int(cache.entries[layer, side, sequence, index]))
                    assert info == PageInfo(*kind, PageOwner(layer, index), 1)
                    if is_pinned(cache, tokens, index):
                        assert page_format == cache.full_format
        for side in Side:
            for page_format in PageFormat:
                assert cache.pools.pages_in_use(side, page_format) == counts.get((side, page_format), 0)
        size = sum(count * cache.pools.page_bytes(*kind) for kind, count in counts.items())
        assert cache.pools.bytes_in_use == size
        tables = cache.entries.nbytes + 8 * cache.table.lengths.size + 8 * cache.mass.numel() + 8
        assert cache.estimate_memory_mb() == (cache.pools.bytes_allocated + tables) / 1e6
        elements = 2 * HEADS * HEAD_DIM * int(cache.table.lengths.sum())
        assert cache.average_bits() == (8 * size / elements if elements else 0)

    @precondition(lambda self: self.cache.budget is not None and not self.limited)
    @invariant()
    def budget_is_held(self) -> None:
        for layer in range(LAYERS):
            size = layer_bytes(self.cache, layer)
            assert size["used"] <= max(size["may"] + 1, size["least"])

    @invariant()
    def used_bytes_are_those_of_the_pages(self) -> None:
        for layer in range(LAYERS):
            held = self.cache.entries[layer, self.cache.entries[layer] >= 0]
            kinds = [self.cache.pools.info(int(entry)) for entry in held]
            size = sum(self.cache.pools.page_bytes(info.side, info.format) for info in kinds)
            assert self.cache._used_bytes[layer] == size

    @rule(layer=st.integers(0, LAYERS - 1), count=st.sampled_from([1, 63, 64, 130]), fails=st.booleans())
    def take_back(self, layer: int, count: int, fails: bool) -> None:
        """Tokens that are not kept, and those inside of which something is raised."""
        before = state(self.cache)
        k, v = random_tokens(self.cache, SEQUENCES, count, 0)
        try:
            with self.cache.writing(layer, k, v, keep=fails):
                if fails:
                    raise RuntimeError("attention failed")
        except CacheFullError:
            pass
        except RuntimeError:
            assert fails
        after = state(self.cache)
        for name in ("entries", "page_table", "lengths"):
            assert after[name] == before[name]

    @precondition(lambda self: self.cache.budget is None)
    @invariant()
    def formats_are_those_given(self) -> None:
        for layer in range(LAYERS):
            formats = self.cache.precision_map(layer)
            for (side, sequence, index), page_format in np.ndenumerate(formats):
                tokens = self.tokens[layer, side, sequence].shape[1]
                if page_format >= 0 and not is_pinned(self.cache, tokens, index):
                    assert page_format == self.cache._open_formats[layer, side]

    @invariant()
    def buckets_are_the_pages(self) -> None:
        cache = self.cache
        for layer in range(LAYERS):
            for sequence in range(SEQUENCES):
                found = np.full((2, cache.entries.shape[3]), -1)
                for bucket in cache.layer(layer).buckets(sequence):
                    found[bucket.side, bucket.indices] = bucket.format
                    for entry, blocks in zip(bucket.entries.tolist(), bucket.blocks, strict=True):
                        assert blocks.data_ptr() == cache.pools.blocks(entry).data_ptr()
                assert (found == cache.precision_map(layer)[:, sequence]).all()

    def teardown(self) -> None:
        page_table._FIRST_PAGES = 64
        if not hasattr(self, "cache"):
            return
        cache = self.cache
        for layer in range(LAYERS):
            for sequence in range(SEQUENCES):
                for side, found in zip(Side, cache.read(layer, sequence), strict=True):
                    expected = self.tokens[layer, side, sequence].astype(np.float32)
                    for place, (page_format, held) in self.pages.items():
                        if place[:3] == (layer, side, sequence):
                            index = place[3]
                            expected[:, 64 * index : 64 * index + 64] = dequantize_blocks(
                                held, PageLayout(side, page_format, HEAD_DIM)
                            )
                    assert torch.equal(found.cpu(), torch.from_numpy(expected).to(cache.dtype))
        for sequence in range(SEQUENCES):
            cache.free(sequence)
        assert cache.pools.bytes_in_use == 0
        assert (cache.entries == -1).all()


TestCache = CacheMachine.TestCase
TestCache.settings = settings(max_examples=40, stateful_step_count=20)


class GpuCacheMachine(CacheMachine):
    device = "cuda"


TestCacheOnGpu = pytest.mark.gpu(GpuCacheMachine.TestCase)
TestCacheOnGpu.settings = settings(max_examples=8, stateful_step_count=15)


def fill(cache: KVCache, count: int, step: int, seed: int = 0) -> None:
    for first in range(0, count, step):
        for layer in range(cache.num_layers):
            cache.append(layer, *random_tokens(cache, cache.max_sequences, min(step, count - first), seed + first))


@pytest.mark.parametrize("name", ["recent_tokens", "sinks"])
@pytest.mark.parametrize("tokens", [(1 << 31) - 1, 1 << 31, 1 << 60, 10**30])
def test_more_recent_tokens_or_sinks_than_there_can_be(name: str, tokens: int) -> None:
    """All pages stay in 16 bits, and a budget counts them as if the window were as long as a sequence."""
    for options in ({"formats": PageFormat.INT4}, {"budget": 0.4}):
        caches = [KVCache(1, 2, 16, 4096, device="cpu", **{name: most}, **options) for most in (4096, tokens)]
        for cache in caches:
            for _ in range(6):
                cache.append(0, *torch.randn(2, 1, 2, 100, 16).half())
            cache.reallocate()
        assert caches[1].precision_map(0)[:, 0, :10].tolist() == [[int(PageFormat.FP16)] * 10] * 2
        lengths, settled = caches[1].table.lengths[0], caches[1].table.settled[0]
        assert caches[1]._room(0, lengths, settled) == caches[0]._room(0, lengths, settled)


@pytest.mark.parametrize("step", [32, MAX_TOKENS])
@pytest.mark.parametrize("budget", [0.3, 0.5, 0.7])
def test_budget_is_used(budget: float, step: int) -> None:
    """Token by token or at once: what open pages may have, they have, up to a page a sequence and layer."""
    cache = make_cache(budget=budget)
    fill(cache, MAX_TOKENS, step)
    for layer in range(LAYERS):
        size = layer_bytes(cache, layer)
        assert size["may"] - size["used"] <= max(FULL, 0.01 * size["may"])
    assert cache.reallocate() == Outcome.HELD


@pytest.mark.parametrize("recent_tokens", [0, 64, 100])
@pytest.mark.parametrize("budget", [0.4, 0.6])
def test_budget_is_held_at_every_token(budget: float, recent_tokens: int) -> None:
    """Also while pages fill, of which none leaves the recent window, and when another sequence begins."""
    cache = KVCache(
        1, HEADS, HEAD_DIM, 64 * 50, device="cpu", max_sequences=2, budget=budget, recent_tokens=recent_tokens, sinks=0
    )
    for sequence in range(2):
        k, v = random_tokens(cache, 1, 16, sequence)
        for _ in range(64 * 50 // 16):
            cache.append(0, k, v, [sequence])
            size = layer_bytes(cache, 0)
            assert size["used"] <= size["may"] + 1
    assert size["may"] == pytest.approx(budget * 2 * 2 * 50 * FULL)


def test_what_is_looked_at_keeps_its_bits() -> None:
    """Pages that are attended to, and layers whose heads count, have more bits."""
    cache = make_cache(budget=0.3, max_sequences=1)
    fill(cache, 64, 64)
    heads = torch.tensor([1.0, 0.0])
    for _ in range(11):
        for layer in range(LAYERS):
            mass = torch.zeros(1, 2, 12)
            mass[0, 0, :12:3] = 0.2
            mass[0, 1] = 1  # a head that does not count
            for _ in range(20):
                cache.observe(layer, mass, head_importance=heads if layer == 0 else 0.01 * heads)
        cache.reallocate()
        fill(cache, 64, 64)
    first, second = (
        np.vectorize(lambda f: PageFormat(f).element_bits)(cache.precision_map(layer)[:, 0, 1:11]) for layer in (0, 1)
    )
    looked_at = np.arange(1, 11) % 3 == 0
    assert first[:, looked_at].mean() > first[:, ~looked_at].mean() + 1
    assert first.mean() > second.mean()
    assert cache.shares[0] > cache.shares[1]
    assert cache.shares.mean() <= 0.3 + 1e-9


def test_kernels_that_fail_leave_the_cache_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = make_cache(formats=PageFormat.INT4, recent_tokens=100)
    fill(cache, 130, 130)
    before = state(cache)

    def fail(*_: Any) -> None:
        raise RuntimeError("no compiler")

    for name in ("write_tokens", "quantize_pages"):
        with monkeypatch.context() as patch:
            patch.setattr(f"kvpack.runtime.kv.cache.{name}", fail)
            with pytest.raises(RuntimeError, match="no compiler"):
                cache.append(0, *random_tokens(cache, SEQUENCES, 126, 5))
        after = state(cache)
        assert after["entries"] == before["entries"] == after["page_table"]
        assert after["lengths"] == before["lengths"]
        assert after["pools"]["bytes"][1] == before["pools"]["bytes"][1]
    k_before, _ = cache.read(0, 1)
    cache.append(0, *random_tokens(cache, SEQUENCES, 126, 5))
    assert torch.equal(cache.read(0, 1)[0][:, 128:130], k_before[:, 128:130])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0.0}, r"budget is 0\.0; it is a fraction, more than 0 and at most 1"),
        ({"budget": 1.5}, r"budget is 1\.5"),
        ({"budget": float("nan")}, "budget is nan"),
        ({"budget": 0.5, "formats": PageFormat.INT4}, "either a budget or formats"),
        ({"policy": "best"}, "policy is 'best'; there are uniform, importance, per-layer, position"),
        ({"dtype": torch.float32}, r"dtype is torch\.float32"),
        ({"formats": [(PageFormat.INT4, PageFormat.INT4)]}, "a pair .of K, of V. for each of 2 layers is wanted"),
        ({"formats": [(PageFormat.INT4, PageFormat.INT4)] * 3}, "^formats are a list of 3; .* of 2 layers is wanted$"),
        ({"formats": 4}, r"formats are 4; a PageFormat for all, or a pair"),
        ({"formats": "INT4"}, r"formats are 'INT4'"),
        ({"formats": [PageFormat.INT4, PageFormat.INT8]}, r"for a layer; a PageFormat for all, or a pair"),
        ({"formats": PageFormat.BF16}, r"pages of torch\.float16 cannot become BF16"),
        ({"recent_tokens": -1}, "recent_tokens is -1"),
        ({"key_order": 3}, "key_order is 3; a sequence of groups of 16 dimensions is wanted"),
        ({"key_order": "0"}, "a group of key_order is '0'; an integer is wanted"),
        ({"key_order": {0}}, "key_order is .0.; a sequence of groups"),
        ({"key_order": [0.0]}, "a group of key_order is 0.0; an integer is wanted"),
        ({"max_sequences": 0}, "max_sequences is 0"),
    ],
)
def test_options_that_are_none(options: dict[str, Any], message: str) -> None:
    with pytest.raises(CacheInputError, match=message):
        make_cache(**options)


def test_messages_state_the_values() -> None:
    cache = make_cache(max_bytes=1 << 16)
    k, v = random_tokens(cache, 3, 1, 0)
    with pytest.raises(CacheInputError, match=r"k has shape \[3, 2, 1, 16\] and v \[3, 2, 1, 8\]; this cache takes"):
        cache.append(0, k, v[..., :8])
    with pytest.raises(CacheInputError, match=r"v is torch\.bfloat16 on cpu; this cache is torch\.float16 on cpu"):
        cache.append(0, k, v.bfloat16())
    with pytest.raises(CacheInputError, match="2 sequences are named for a batch of 3"):
        cache.append(0, k, v, [0, 1])
    with pytest.raises(CacheInputError, match=r"sequences are \[0, 1, 3\]; the cache has max_sequences=3"):
        cache.append(0, k, v, [0, 1, 3])
    with pytest.raises(CacheInputError, match="layer is 2; there are 2"):
        cache.read(2, 0)
    with pytest.raises(CacheFullError, match="sequence 0: 1281 tokens behind 0 are more than the 1280 of max_tokens"):
        cache.append(0, *random_tokens(cache, 3, 1281, 0))
    with pytest.raises(CacheFullError, match=r"pages need \d+ bytes in new slabs; 0 of at most 65536 bytes"):
        cache.append(0, *random_tokens(cache, 3, 768, 0))
    with pytest.raises(CacheInputError, match=r"mass has shape \[1, 2, 21\]; 1 sequences have at most 20 pages"):
        cache.observe(0, torch.zeros(1, 2, 21))
    with pytest.raises(CacheInputError, match=r"head_importance has shape \[3\]; mass has 2 heads"):
        cache.observe(0, torch.zeros(1, 2, 12), head_importance=torch.ones(3))


def test_the_last_tokens_fit_and_no_more() -> None:
    """Also where they are in the middle of a page."""
    cache = KVCache(1, HEADS, HEAD_DIM, 200, device="cpu")
    cache.append(0, *random_tokens(cache, 1, 195, 0))
    cache.append(0, *random_tokens(cache, 1, 5, 0))
    with pytest.raises(CacheFullError, match="1 tokens behind 200"):
        cache.append(0, *random_tokens(cache, 1, 1, 0))
    other = KVCache(1, HEADS, HEAD_DIM, 200, device="cpu")
    other.append(0, *random_tokens(other, 1, 195, 0))
    with pytest.raises(CacheFullError, match="6 tokens behind 195"):
        other.append(0, *random_tokens(other, 1, 6, 0))
    for bad in ([0, 0], torch.tensor([0, 0]), [True, False]):
        with pytest.raises(CacheInputError, match="sequences are"):
            other.append(0, *random_tokens(other, 2, 1, 0), bad)
    with pytest.raises(CacheInputError, match="max_tokens is 1073741825; it must be at most 1073741824"):
        KVCache(1, HEADS, HEAD_DIM, (1 << 30) + 1, device="cpu")


def test_what_is_freed_is_forgotten() -> None:
    cache = make_cache(budget=0.3)
    fill(cache, 200, 200)
    cache.observe(0, torch.rand(3, 2, 4))
    cache.free(1)
    assert cache.observed_steps[0].tolist() == [1, 0, 1]
    assert not cache.mass[0, 1].any()
    assert cache.mass[0, 2].any()


def test_a_table_that_was_written_to_is_noticed() -> None:
    cache = make_cache()
    fill(cache, 1, 1)
    cache.page_table[:] = -1
    cache.append(0, *random_tokens(cache, 3, 1, 0))
    with pytest.raises(PageEntryError, match="6 tokens or pages were left out, the first of them at 0"):
        cache.check()
    cache.check()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_thousand_steps_take_no_more_than_pages(device: str) -> None:
    steps = 1000 if device == "cuda" else 200
    cache = KVCache(2, HEADS, HEAD_DIM, 64 + steps, max_sequences=2, device=device, budget=0.3)
    fill(cache, 64, 64)
    k, v = random_tokens(cache, 2, 1, 0)
    mass = torch.rand(2, 4, cache.mass.shape[2], device=cache.device)

    def allocated() -> int:
        return torch.cuda.memory_allocated() if device == "cuda" else cache.pools.bytes_allocated

    gc.collect()  # what other tests have left is not to go meanwhile
    others = allocated() - cache.pools.bytes_allocated
    for step in range(steps):
        for layer in range(2):
            cache.append(layer, k, v)
            cache.observe(layer, mass)
        if step % 64 == 0:
            cache.reallocate()
    assert 0 <= allocated() - cache.pools.bytes_allocated - others < 1 << 16
    assert cache.length(1, 1) == 64 + steps
    cache.check()


@pytest.mark.parametrize(
    ("what", "call", "keep"), [("_upload", 1, True), ("set", 1, True), ("set", 2, True), ("_upload", 1, False)]
)
def test_copies_that_fail_leave_both_tables_as_they_were(
    what: str, call: int, keep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """New pages come and others are quantized; whichever copy to the device fails, host and device stay alike."""
    cache = make_cache(formats=PageFormat.INT4, recent_tokens=64)
    fill(cache, 128, 128)
    before = state(cache)
    owner: Any = cache if what == "_upload" else cache.table
    done, calls = getattr(owner, what), 0

    def fail(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise torch.OutOfMemoryError("no memory for a copy")
        return done(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(owner, what, fail)
        writing = cache.writing(0, *random_tokens(cache, SEQUENCES, 70, 5), keep=keep)
        with pytest.raises(torch.OutOfMemoryError), writing:
            pass
    after = state(cache)
    assert after["entries"] == before["entries"] == after["page_table"]
    assert after["lengths"] == before["lengths"]
    assert cache.pools.bytes_in_use == sum(cache._used_bytes)
    cache.append(0, *random_tokens(cache, SEQUENCES, 70, 5))
    cache.check()


def test_tables_grow_by_need() -> None:
    """A cache for a million tokens begins with tables of 64 pages a sequence; what they hold survives their growth."""
    cache = KVCache(1, HEADS, HEAD_DIM, 1 << 20, device="cpu", max_sequences=2, budget=0.4)
    assert cache.page_table.shape == (1, 2, 2, 64)
    k, v = random_tokens(cache, 2, 64 * 64, 0)
    cache.append(0, k, v)
    assert cache.page_table.shape[3] == 64
    cache.observe(0, torch.ones(2, 1, 64))
    kept, mass = cache.entries.copy(), cache.mass.clone()
    cache.append(0, k[:, :, :1], v[:, :, :1])
    assert cache.page_table.shape[3] == cache.mass.shape[2] == 128
    assert (cache.entries[..., 1:62] == kept[..., 1:62]).all()
    assert torch.equal(cache.mass[..., :64], mass)
    assert not cache.mass[..., 64:].any()
    assert (cache.page_table.numpy() == cache.entries).all()
    assert cache.length(0, 1) == 64 * 64 + 1
    cache.reallocate()
    cache.check()


@pytest.mark.parametrize(
    "options", [{"budget": 0.3}, {"formats": [(INT4, INT8), (INT8, INT4)]}], ids=["budget", "formats"]
)
def test_a_cache_that_keeps_its_first_layers_is_one_of_so_many(options: dict[str, Any]) -> None:
    """Also when tables grow, and when bytes are divided anew."""
    formats = options.get("formats")
    more = {"formats": [*formats, (INT4, INT4)]} if formats else options
    caches = [
        KVCache(layers, HEADS, HEAD_DIM, 64 * 100, device="cpu", max_sequences=SEQUENCES, slab_bytes=1, **given)
        for layers, given in ((2, options), (3, more))
    ]
    for layer in range(2):
        for cache in caches:
            cache.append(layer, *random_tokens(cache, SEQUENCES, 500, layer))
    with pytest.raises(CacheInputError, match="1 of 3 layers cannot be kept alone: others hold tokens"):
        caches[1].keep_layers(1)
    for count in (0, 4):
        with pytest.raises(CacheInputError, match=f"{count} layers cannot be kept; there are 3"):
            caches[1].keep_layers(count)
    caches[1].keep_layers(2)
    states = []
    for cache in caches:
        found = states.append([]) or states[-1]
        cache.observe(1, torch.full((SEQUENCES, 2, 8), 0.1).cumsum(-1))
        found += [str(cache), cache.estimate_memory_mb(), cache.average_bits(), cache.reallocate(), state(cache)]
        fill(cache, 90, 30)
        cache.truncate(0, 400)
        cache.select_sequences([1, 0, 0])
        found.append(state(cache))
        for layer in range(2):
            cache.append(layer, *random_tokens(cache, 1, 64 * 80, layer), [1])
        assert cache.average_bits() < 9
        found += [cache.reallocate(), state(cache), cache.elements]
        cache.free(1)
        cache.plan(1)
        found.append(cache.table.lengths.tolist())
        with pytest.raises(CacheInputError, match="layer is 2; there are 2"):
            cache.length(2, 0)
    assert states[0] == states[1]
    assert states[0][-2] == 2 * 2 * (590 + 400 + 64 * 80 + 400) * HEADS * HEAD_DIM


def test_tables_that_graphs_hold_do_not_grow() -> None:
    cache = KVCache(1, HEADS, HEAD_DIM, 1 << 20, device="cpu")
    cache.reserve_tokens(70 * 64)
    assert cache.page_table.shape[3] == 128
    cache._is_in_graphs = True
    cache.append(0, *random_tokens(cache, 1, 128 * 64, 0))
    before = state(cache)
    with pytest.raises(CacheFullError, match=r"reserve_tokens\(\) before the first capture"):
        cache.append(0, *random_tokens(cache, 1, 1, 0))
    assert state(cache) == before
    with pytest.raises(CacheInputError, match="max_tokens is 1048576"):
        cache.reserve_tokens((1 << 20) + 1)


def test_a_plan_without_its_graph_is_noticed() -> None:
    """Whatever comes next outside of a graph; freeing the sequences mends it."""
    cache = make_cache()
    fill(cache, 70, 70)
    cache.plan(2, [0, 1])
    k, v = random_tokens(cache, SEQUENCES, 1, 0)
    for use in (
        lambda: cache.append(0, k, v),
        lambda: cache.read(0, 0),
        cache.reallocate,
        cache.check,
    ):
        with pytest.raises(CacheInputError, match=r"sequences \[0, 1\] are up to 2 tokens behind on the device"):
            use()
    cache.free(0)
    cache.free(1)
    cache.append(0, k, v)
    assert [cache.length(0, s) for s in range(3)] == [1, 1, 71]
    cache.check()


@pytest.mark.parametrize("keep", [True, False])
def test_what_is_raised_inside_takes_tokens_back(keep: bool) -> None:
    cache = make_cache(budget=0.3)
    fill(cache, 130, 130)
    before = state(cache)
    k, v = random_tokens(cache, SEQUENCES, 126, 5)

    def fail() -> None:
        with cache.writing(0, k, v, keep=keep) as view:
            assert view.lengths.tolist() == [256] * SEQUENCES
            raise RuntimeError("attention failed")

    with pytest.raises(RuntimeError, match="attention failed"):
        fail()
    after = state(cache)
    assert after["entries"] == before["entries"] == after["page_table"]
    assert after["lengths"] == before["lengths"]
    with cache.writing(0, k, v, keep=keep):
        pass
    assert cache.length(0, 0) == (256 if keep else 130)


@pytest.mark.gpu
def test_batches_that_were_used_before_can_be_captured() -> None:
    """Not the last one alone."""
    cache = make_cache("cuda")
    batches = [[0], [1], [2, 0]]
    tokens = [random_tokens(cache, len(batch), 1, 0) for batch in batches]
    for batch, (k, v) in zip(batches, tokens, strict=True):
        cache.append(0, k, v, batch)
        cache.append(1, k, v, batch)
    torch.cuda.synchronize()
    for batch, (k, v) in zip(batches, tokens, strict=True):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            cache.append(0, k, v, batch)
            cache.append(1, k, v, batch)
        before = [cache.length(0, s) for s in batch]
        cache.plan(1, batch)
        graph.replay()
        assert cache.lengths[0, batch].tolist() == [length + 1 for length in before]
    cache.check()


@pytest.mark.gpu
@pytest.mark.parametrize("what", ["free", "plan", "reallocate", "try"])
def test_what_the_host_decides_is_not_captured(what: str) -> None:
    cache = make_cache("cuda", budget=0.5)
    fill(cache, 70, 70)
    k, v = random_tokens(cache, SEQUENCES, 1, 0)
    torch.cuda.synchronize()
    before = state(cache)
    graph = torch.cuda.CUDAGraph()
    decisions: dict[str, Any] = {
        "free": lambda: cache.free(0),
        "plan": cache.plan,
        "reallocate": cache.reallocate,
        "try": lambda: cache.writing(0, k, v, keep=False).__enter__(),
    }
    with torch.cuda.graph(graph):
        k.add_(0)  # an empty graph is a warning
        with pytest.raises(CacheInputError, match="capture"):
            decisions[what]()
    assert state(cache) == before


def test_nothing_else_while_tokens_are_written() -> None:
    cache = make_cache(formats=PageFormat.INT4)
    fill(cache, 64, 64)
    k, v = random_tokens(cache, SEQUENCES, 64, 0)
    with cache.writing(0, k, v):
        for use in (
            lambda: cache.append(1, k, v),
            lambda: cache.free(0),
            cache.plan,
            cache.reallocate,
            lambda: cache.reserve_tokens(1),
        ):
            with pytest.raises(CacheInputError, match="is being written to"):
                use()
    cache.append(1, k, v)
    cache.check()


@pytest.mark.parametrize("wrong", [1.5, "0", None])
def test_numbers_that_are_none(wrong: Any) -> None:
    cache = make_cache()
    fill(cache, 64, 64)
    before = state(cache)
    for use in (lambda: cache.free(wrong), lambda: cache.plan(wrong), lambda: cache.plan(1, [wrong])):
        with pytest.raises(CacheInputError, match="an integer is wanted"):
            use()
    assert state(cache) == before


def test_a_plan_that_fails_has_measured_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = make_cache(budget=0.3, recent_tokens=64)
    fill(cache, 191, 191)
    before = state(cache)
    assert np.isnan(cache.errors).all()

    def fail(_: object) -> None:
        raise CacheFullError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(cache.pools, "reserve", fail)
        with pytest.raises(CacheFullError, match="no memory"):
            cache.plan(1)
    assert state(cache) == before
    cache.plan(1)
    assert not np.isnan(cache.errors).any()
