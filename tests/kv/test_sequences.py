"""Sequences cut, selected and shared: against a model in which each sequence holds pages of its own."""

from __future__ import annotations

import copy
import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from paged_values import by_kv_head, probabilities
from pool_dump import cache_state

from kvpack.encode.page_coder import FLOAT_TYPES, dequantize_blocks, quantize_blocks
from kvpack.errors import CacheFullError, CacheInputError
from kvpack.format.pages import PageFormat, PageLayout, Side

torch = pytest.importorskip("torch")

from kvpack.runtime.kv import page_table  # noqa: E402
from kvpack.runtime.kv.attention import attention_with_kv_cache  # noqa: E402
from kvpack.runtime.kv.cache import KVCache  # noqa: E402
from kvpack.runtime.kv.page_pools import PageInfo, PageOwner  # noqa: E402

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
LAYERS, HEADS, HEAD_DIM, SEQUENCES, MAX_TOKENS = 2, 2, 16, 4, 64 * 24
FULL = HEADS * HEAD_DIM * 64 * 2
INT4 = PageFormat.INT4


def make_cache(device: str = "cpu", **options: Any) -> KVCache:
    defaults = {"max_sequences": SEQUENCES, "device": device, "slab_bytes": 1}
    return KVCache(LAYERS, HEADS, HEAD_DIM, MAX_TOKENS, **(defaults | options))


def random_heads(cache: KVCache, batch: int, count: int, seed: int) -> tuple[Any, Any, Any]:
    """q, k, v with as many heads."""
    rng = np.random.default_rng(seed)
    size = np.exp(rng.normal(0, 1, (3, 1, HEADS, 1, HEAD_DIM)))
    q, k, v = torch.from_numpy(rng.normal(0, 1, (3, batch, HEADS, count, HEAD_DIM)) * size).to(cache.dtype)
    return q.to(cache.device), k.to(cache.device), v.to(cache.device)


def bits(tensor: Any) -> np.ndarray:
    numpy_type = FLOAT_TYPES[PageFormat.FP16 if tensor.dtype == torch.float16 else PageFormat.BF16]
    return tensor.cpu().contiguous().view(torch.int16).numpy().view(numpy_type)


@dataclass
class Page:
    """What a page holds: values [heads, tokens, head_dim], of 16 bits or dequantized."""

    format: PageFormat
    values: np.ndarray

    def quantize(self, side: Side, target: PageFormat) -> None:
        """From what it holds."""
        layout = PageLayout(side, target, HEAD_DIM)
        self.values = dequantize_blocks(quantize_blocks(self.values, layout), layout)
        self.format = target


Column = list[Page]  # of a layer, side and sequence


def check_pages(cache: KVCache) -> None:
    """Tables agree, pages in use are those of the tables, and who shares one does so at the same place."""
    assert (cache.page_table.cpu().numpy() == cache.entries).all()
    assert (cache.lengths.cpu().numpy() == cache.table.lengths).all()
    where: dict[int, set[tuple[int, int, int]]] = {}
    used = [0] * cache.num_layers
    for (layer, side, sequence, index), entry in np.ndenumerate(cache.entries):
        assert (entry != -1) == (64 * index < cache.table.lengths[layer, sequence])
        if entry != -1:
            where.setdefault(int(entry), set()).add((layer, side, index))
    in_use: Counter[tuple[Side, PageFormat]] = Counter()
    for entry, places in where.items():
        ((layer, side, index),) = places
        kind = Side(side), PageFormat(entry & 15)
        assert cache.pools.info(entry) == PageInfo(*kind, PageOwner(layer, index), 1)
        in_use[kind] += 1
        used[layer] += cache.pools.page_bytes(*kind)
    for side in Side:
        for page_format in PageFormat:
            assert cache.pools.pages_in_use(side, page_format) == in_use[side, page_format]
    assert cache._used_bytes == used
    assert cache.pools.bytes_in_use == sum(used)
    if cache._is_plain:
        assert len(where) == int((cache.entries != -1).sum())
    cache.check()


def is_pinned(cache: KVCache, tokens: int, index: int) -> bool:
    return index < -(-cache.sinks // 64) or index >= max(0, (tokens - cache.recent_tokens) // 64)


def layer_bytes(cache: KVCache, layer: int) -> tuple[int, float, int]:
    """What the pages take, may take, and would with all that is open at 2 bits; each once."""
    pages: dict[int, bool] = {}
    for (_, sequence, index), entry in np.ndenumerate(cache.entries[layer]):
        if entry != -1:
            pinned = is_pinned(cache, cache.length(layer, sequence), index)
            pages[int(entry)] = pages.get(int(entry), False) or pinned
    used = least = 0
    for entry, pinned in pages.items():
        info = cache.pools.info(entry)
        used += cache.pools.page_bytes(info.side, info.format)
        least += cache.pools.page_bytes(info.side, info.format if pinned else PageFormat.INT2)
    share, pinned_bytes = float(cache.shares[layer]), sum(pages.values()) * FULL
    all_bytes = len(pages) * FULL
    return used, max(share * all_bytes, pinned_bytes + 0.9 * share * (all_bytes - pinned_bytes)), least


class SequencesMachine(RuleBasedStateMachine):
    device = "cpu"

    @initialize(
        bits_of=st.sampled_from(
            [0.2, 0.3, 0.45, 0.7, None, PageFormat.INT8, PageFormat.INT4, PageFormat.FP8_E4M3]
            + [[(PageFormat.INT8, PageFormat.INT3)] * LAYERS, [(PageFormat.FP16, PageFormat.INT2)] * LAYERS]
        ),
        policy=st.sampled_from(["importance", "uniform", "position"]),
        recent_tokens=st.sampled_from([0, 64, 100]),
        sinks=st.sampled_from([0, 4, 65]),
        limited=st.sampled_from([False, False, False, True]),
        count=st.sampled_from([0, 63, 64, 500, 700]),
    )
    def begin(self, bits_of: Any, policy: Any, recent_tokens: int, sinks: int, limited: bool, count: int) -> None:
        page_table._FIRST_PAGES = 2  # so that tables grow
        self.limited = limited
        self.cache = make_cache(
            self.device,
            budget=bits_of if isinstance(bits_of, float) else None,
            formats=None if isinstance(bits_of, float) else bits_of,
            policy=policy,
            recent_tokens=recent_tokens,
            sinks=sinks,
            max_bytes=100 * FULL if limited else 1 << 24,
        )
        self.columns: dict[tuple[int, int, int], Column] = {
            (layer, side, sequence): [] for layer in range(LAYERS) for side in Side for sequence in range(SEQUENCES)
        }
        self.lengths = [0] * SEQUENCES
        if count:
            self.append([0], [count], 0, observe=False)
            self.select([0, 0, 0, 0])

    def append_to_model(self, layer: int, sequence: int, new: tuple[np.ndarray, np.ndarray]) -> None:
        for side in Side:
            column, values = self.columns[layer, side, sequence], new[side]
            while values.shape[1]:
                if not column or column[-1].values.shape[1] == 64:
                    column.append(Page(self.cache.full_format, values[:, :0]))
                left = 64 - column[-1].values.shape[1]
                column[-1].values = np.concatenate([column[-1].values, values[:, :left]], axis=1)
                values = values[:, left:]

    def follow(self) -> None:
        """Pages that have another format: without a budget those that have left the window, and no others."""
        cache = self.cache
        for layer in range(LAYERS):
            formats = cache.precision_map(layer)
            for side in Side:
                for sequence in range(SEQUENCES):
                    tokens = cache.length(layer, sequence)
                    for index, page in enumerate(self.columns[layer, side, sequence]):
                        pinned, found = is_pinned(cache, tokens, index), PageFormat(int(formats[side, sequence, index]))
                        if cache.budget is None and not pinned and page.format == cache.full_format:
                            wanted = PageFormat(int(cache._open_formats[layer, side]))
                            assert found == wanted
                        elif found != page.format:
                            assert cache.budget is not None
                            assert not pinned
                            assert found.element_bits < page.format.element_bits
                        if found != page.format:
                            page.quantize(side, found)

    @rule(
        sequences=st.permutations(range(SEQUENCES)),
        count=st.integers(1, SEQUENCES),
        tokens=st.lists(st.sampled_from([0, 1, 1, 3, 63, 64, 130]), min_size=SEQUENCES, max_size=SEQUENCES),
        seed=st.integers(0, 99),
        observe=st.booleans(),
    )
    def append_to_some(self, sequences: list[int], count: int, tokens: list[int], seed: int, observe: bool) -> None:
        self.append(sequences[:count], tokens[:count], seed, observe=observe)

    @rule(tokens=st.sampled_from([1, 1, 2, 64, 70]), seed=st.integers(0, 99))
    def append_to_all(self, tokens: int, seed: int) -> None:
        self.append(list(range(SEQUENCES)), [tokens] * SEQUENCES, seed, observe=False)

    def append(self, sequences: list[int], tokens: list[int], seed: int, *, observe: bool) -> None:
        cache, columns = self.cache, max(tokens)
        if any(self.lengths[s] + n > MAX_TOKENS for s, n in zip(sequences, tokens, strict=True)):
            return
        for layer in range(LAYERS):
            q, k, v = random_heads(cache, len(sequences), columns, seed + layer)
            try:
                if observe:
                    out, _ = attention_with_kv_cache(
                        q, k, v, cache, layer=layer, sequences=sequences, tokens=tokens, observe=True
                    )
                else:
                    cache.append(layer, k, v, sequences, tokens=tokens)
            except CacheFullError:
                assert self.limited
                self.follow()
                if layer:  # the layers in front of it have the tokens
                    self.free_all(sequences)
                return
            for row, (sequence, count) in enumerate(zip(sequences, tokens, strict=True)):
                self.append_to_model(layer, sequence, tuple(bits(x)[row][:, columns - count :] for x in (k, v)))  # type: ignore[arg-type]
                if observe and count:
                    keys, values = (
                        np.concatenate([page.values for page in self.columns[layer, side, sequence]], 1).astype(float)
                        for side in Side
                    )
                    of_row = q[row, :, columns - count :].double().cpu().numpy()
                    p = probabilities(of_row, keys, 1 / math.sqrt(HEAD_DIM))
                    expected = by_kv_head(p, values)
                    error = np.abs(out[row, :, columns - count :].double().cpu().numpy() - expected).max()
                    assert error < 2e-3 * max(1.0, np.abs(expected).max())
            self.follow()
        for sequence, count in zip(sequences, tokens, strict=True):
            self.lengths[sequence] += count

    def free_all(self, sequences: list[int]) -> None:
        for sequence in sequences:
            self.free(sequence)

    @rule(sequence=st.integers(0, SEQUENCES - 1))
    def free(self, sequence: int) -> None:
        self.cache.free(sequence)
        self.lengths[sequence] = 0
        for layer in range(LAYERS):
            for side in Side:
                self.columns[layer, side, sequence] = []
        self.follow()

    @rule(
        rows=st.one_of(
            st.permutations(range(SEQUENCES)), st.lists(st.integers(0, SEQUENCES - 1), max_size=SEQUENCES)
        )
    )
    def select(self, rows: list[int]) -> None:
        self.cache.select_sequences(rows)
        self.lengths = [self.lengths[row] for row in rows] + [0] * (SEQUENCES - len(rows))
        self.columns = {
            (layer, side, sequence): copy.deepcopy(self.columns[layer, side, rows[sequence]])
            if sequence < len(rows)
            else []
            for layer, side, sequence in self.columns
        }
        self.follow()

    @rule(sequence=st.integers(0, SEQUENCES - 1), back=st.sampled_from([0, 1, 5, 63, 64, 65, 200, 500]))
    def truncate(self, sequence: int, back: int) -> None:
        tokens = max(0, self.lengths[sequence] - back)
        before = cache_state(self.cache)
        try:
            self.cache.truncate(sequence, tokens)
        except CacheFullError:
            assert self.limited
            before["pools"] = cache_state(self.cache)["pools"]
            assert cache_state(self.cache) == before
            return
        self.lengths[sequence] = tokens
        for layer in range(LAYERS):
            for side in Side:
                column = self.columns[layer, side, sequence]
                del column[-(-tokens // 64) :]
                if back and tokens % 64:
                    kept = column[-1].values[:, : tokens % 64].astype(np.float32)
                    values = bits(torch.from_numpy(kept).to(self.cache.dtype))
                    column[-1] = Page(self.cache.full_format, values)
        self.follow()

    @precondition(lambda self: self.cache.budget is not None)
    @rule(seed=st.integers(0, 99))
    def reallocate(self, seed: int) -> None:
        mass = np.random.default_rng(seed).dirichlet(np.full(self.cache.mass.shape[2], 0.1), (SEQUENCES, 2))
        self.cache.observe(seed % 2, torch.from_numpy(mass).to(self.cache.device))
        try:
            self.cache.reallocate()
        except CacheFullError:
            assert self.limited
        self.follow()

    @rule(layer=st.integers(0, LAYERS - 1), count=st.sampled_from([1, 63, 130]), fails=st.booleans())
    def take_back(self, layer: int, count: int, fails: bool) -> None:
        """Tokens that are not kept, and those inside of which something is raised: who shares a page sees neither."""
        _, k, v = random_heads(self.cache, SEQUENCES, count, 0)
        try:
            with self.cache.writing(layer, k * math.nan, v * math.nan, keep=fails):
                if fails:
                    raise RuntimeError("attention failed")
        except (CacheFullError, RuntimeError):
            pass
        self.follow()

    @invariant()
    def pages_are_those_of_the_tables(self) -> None:
        check_pages(self.cache)

    @invariant()
    def values_are_those_of_the_model(self) -> None:
        cache = self.cache
        assert cache.table.lengths.tolist() == [self.lengths] * LAYERS
        for (layer, side, sequence), column in self.columns.items():
            found = cache.read(layer, sequence)[side].cpu()
            values = [page.values.astype(np.float32) for page in column]
            none = np.zeros((HEADS, 0, HEAD_DIM), np.float32)
            expected = torch.from_numpy(np.concatenate([none, *values], 1)).to(cache.dtype)
            assert torch.equal(found, expected), (layer, side, sequence)

    @invariant()
    def nothing_is_behind_the_ends(self) -> None:
        """What a kernel meets there has probability 0, and must be a number."""
        cache = self.cache
        for (layer, side, sequence), column in self.columns.items():
            if column and column[-1].values.shape[1] < 64:
                blocks = cache.pools.blocks(int(cache.entries[layer, side, sequence, len(column) - 1])).cpu().numpy()
                held = dequantize_blocks(blocks, PageLayout(side, cache.full_format, HEAD_DIM))
                assert not held[:, column[-1].values.shape[1] :].any()

    @precondition(lambda self: self.cache.budget is not None and not self.limited)
    @invariant()
    def budget_is_held(self) -> None:
        for layer in range(LAYERS):
            used, may, least = layer_bytes(self.cache, layer)
            unplanned = self.cache._is_unplanned[layer]
            assert used <= max(may + 1, least) or unplanned

    def teardown(self) -> None:
        page_table._FIRST_PAGES = 64
        if hasattr(self, "cache"):
            for sequence in range(SEQUENCES):
                self.cache.free(sequence)
            assert self.cache.pools.bytes_in_use == 0
            assert self.cache._is_plain


TestSequences = SequencesMachine.TestCase
TestSequences.settings = settings(max_examples=40, stateful_step_count=20, deadline=None)


class GpuSequencesMachine(SequencesMachine):
    device = "cuda"


TestSequencesOnGpu = pytest.mark.gpu(GpuSequencesMachine.TestCase)
TestSequencesOnGpu.settings = settings(max_examples=8, stateful_step_count=15, deadline=None)
