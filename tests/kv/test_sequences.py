"""Sequences cut, selected and shared: against a model in which each sequence holds pages of its own."""

from __future__ import annotations

import copy
import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import emulator
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from paged_values import by_kv_head, probabilities
from pool_dump import cache_state

from kvpack.encode.page_coder import FLOAT_TYPES, dequantize_blocks, quantize_blocks
from kvpack.errors import CacheFullError, CacheInputError, PageEntryError
from kvpack.format.pages import PageFormat, PageLayout, Side

torch = pytest.importorskip("torch")

import kv_soak  # noqa: E402
import shared_prompt  # noqa: E402
from emulated_device import emulated_launch  # noqa: E402

from kvpack.runtime.device import kernels  # noqa: E402
from kvpack.runtime.kv import cache as cache_module  # noqa: E402
from kvpack.runtime.kv import page_kernels, page_table, shared_pages  # noqa: E402
from kvpack.runtime.kv.attention import attention_with_kv_cache  # noqa: E402
from kvpack.runtime.kv.budget import Room, room  # noqa: E402
from kvpack.runtime.kv.cache import MASS_UNIT, KVCache  # noqa: E402
from kvpack.runtime.kv.page_pools import PageInfo, PageOwner  # noqa: E402
from kvpack.runtime.kv.shared_pages import DistinctPages  # noqa: E402

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


def room_by_all_pages(cache: KVCache, layer: int, lengths: Any, settled: Any) -> Room:
    """What a cache says by what it has counted, by a look at all places."""
    places = cache.table.all_places(range(layer, layer + 1), lengths)
    pinned = cache.window.pinned(places, settled)
    distinct = DistinctPages.of(cache.entries[places.where], pinned)
    whole = room(lengths, settled, cache.window, cache.table.max_pages, cache._full_bytes)
    again = len(places) - len(distinct.first)
    pinned_again = int(pinned.sum()) - int(distinct.pinned.sum())
    return Room(whole.all - again * cache._full_bytes, whole.pinned - pinned_again * cache._full_bytes, whole.coming)


def check_pages(cache: KVCache, held: Counter[int] | None = None) -> None:
    """Tables agree, pages in use are those of the tables and of ``held``, how often others hold each, and who shares
    one does so at the same place."""
    held = Counter() if held is None else +held
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
        info = PageInfo(*kind, PageOwner(layer, index), 1 + held[entry], held[entry])
        assert cache.pools.info(entry) == info
        in_use[kind] += 1
        used[layer] += cache.pools.page_bytes(*kind)
    held_bytes = 0
    for entry in held.keys() - where.keys():
        info = cache.pools.info(entry)
        assert (info.references, info.held) == (held[entry], held[entry])
        in_use[info.side, info.format] += 1
        held_bytes += cache.pools.page_bytes(info.side, info.format)
    for side in Side:
        for page_format in PageFormat:
            assert cache.pools.pages_in_use(side, page_format) == in_use[side, page_format]
    assert cache._used_bytes == used
    assert cache._used_pages == [sum(place[0] == layer for (place,) in where.values()) for layer in range(len(used))]
    for layer, (lengths, settled) in enumerate(zip(cache.table.lengths, cache.table.settled, strict=True)):
        assert cache._room(layer, lengths, settled) == room_by_all_pages(cache, layer, lengths, settled)
    assert cache.held_bytes == held_bytes
    assert cache.pools.bytes_in_use == sum(used) + held_bytes
    if cache._is_plain:
        assert len(where) == int((cache.entries != -1).sum())
    for layer, owning in enumerate(cache._owning):
        for sequence in owning:
            index, rest = divmod(int(cache.table.lengths[layer, sequence]), 64)
            for side in Side if rest else ():
                entry = cache.entries[layer, side, sequence, index]
                assert int((cache.entries[layer, side, :, index] == entry).sum()) == 1
                assert not held[int(entry)]
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


class Kept:
    """Pages that somebody holds: they stay as they are, or lose bits as the sequences' do."""

    def __init__(self, cache: KVCache, entries: np.ndarray, columns: list[Column], *, follows: bool) -> None:
        self.cache, self.entries, self.columns, self._follows = cache, entries, columns, follows

    def follows(self, entry: int) -> bool:
        return self._follows and entry in self.entries

    def replaced(self, changes: Any) -> None:
        assert self._follows
        columns = iter(self.columns)
        for of_layer in self.entries:
            for side in Side:
                column = next(columns)
                for index, entry in enumerate(of_layer[side].tolist()):
                    if entry in changes:
                        of_layer[side, index] = changes[entry]
                        column[index].quantize(side, PageFormat(changes[entry] & 15))

    def reclaim(self, missing: Any, missing_bytes: int) -> bool:
        """All that it has, if that is what is asked for."""
        found: Counter[Any] = Counter()
        for entry in self.entries.reshape(-1).tolist():
            info = self.cache.pools.info(entry)
            found[info.side, info.format] += info.references == 1
        if not self._follows or any(found[kind] < count for kind, count in missing.items()):
            return False
        self.cache.release(self.entries)
        self.entries, self.columns = self.entries[..., :0], [[] for _ in self.columns]
        return True


class SequencesMachine(RuleBasedStateMachine):
    device = "cpu"

    @initialize(
        bits_of=st.sampled_from(
            [
                *[0.25, 0.3, 0.45, 0.7, None, PageFormat.INT8, PageFormat.INT4, PageFormat.FP8_E4M3],
                *[[(PageFormat.INT8, PageFormat.INT3)] * LAYERS, [(PageFormat.FP16, PageFormat.INT2)] * LAYERS],
            ]
        ),
        policy=st.sampled_from(["importance", "uniform", "position"]),
        recent_tokens=st.sampled_from([0, 64, 100]),
        sinks=st.sampled_from([0, 4, 65]),
        limited=st.sampled_from([False, False, False, True]),
        count=st.sampled_from([0, 63, 64, 500, 700]),
    )
    def begin(self, bits_of: Any, policy: Any, recent_tokens: int, sinks: int, limited: bool, count: int) -> None:
        page_table._FIRST_PAGES = 2  # so that tables grow
        self.limited, self.is_unplanned = limited, False
        self.kept: list[Kept] = []
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
        self.is_unplanned &= not columns

    @rule(
        rows=st.lists(st.integers(0, 1), min_size=SEQUENCES, max_size=SEQUENCES),
        tokens=st.lists(st.sampled_from([0, 1, 64, 70]), min_size=SEQUENCES, max_size=SEQUENCES),
        seed=st.integers(0, 99),
    )
    def select_and_diverge(self, rows: list[int], tokens: list[int], seed: int) -> None:
        self.select(rows)
        self.append(list(range(SEQUENCES)), tokens, seed, observe=False)

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
        rows=st.one_of(st.permutations(range(SEQUENCES)), st.lists(st.integers(0, SEQUENCES - 1), max_size=SEQUENCES))
    )
    def select(self, rows: list[int]) -> None:
        self.cache.select_sequences(rows)
        self.is_unplanned = True  # more sequences will have pages that come; the next step looks
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

    def of_sequence(self, sequence: int, pages: int | None = None) -> list[Column]:
        """Of a sequence's first pages, layer by layer, K before V."""
        return [copy.deepcopy(self.columns[layer, side, sequence][:pages]) for layer in range(LAYERS) for side in Side]

    def put_sequence(self, sequence: int, columns: list[Column], tokens: int) -> None:
        places = [(layer, side, sequence) for layer in range(LAYERS) for side in Side]
        self.columns.update(zip(places, copy.deepcopy(columns), strict=True))
        self.lengths[sequence] = tokens
        self.is_unplanned = True
        self.follow()

    @rule(source=st.integers(0, SEQUENCES - 1), into=st.one_of(st.none(), st.integers(0, SEQUENCES - 1)))
    def fork(self, source: int, into: int | None) -> None:
        target = into
        if target not in (None, source):
            self.free(target)
        if target is None and all(n for i, n in enumerate(self.lengths) if i != source):
            with pytest.raises(CacheFullError, match="all 4 sequences are in use"):
                self.cache.fork(source)
            return
        if target == source:
            with pytest.raises(CacheInputError, match="which is the source itself"):
                self.cache.fork(source, target)
            return
        found = self.cache.fork(source, target)
        assert target in (None, found)
        self.put_sequence(found, self.of_sequence(source), self.lengths[source])

    @rule(rows=st.one_of(st.none(), st.lists(st.integers(0, SEQUENCES - 1), max_size=SEQUENCES)), stays=st.booleans())
    def copy_cache(self, rows: list[int] | None, stays: bool) -> None:
        """And go on with it. A copy has no holders."""
        try:
            made = self.cache.copy(rows)
        except CacheFullError:
            assert self.limited  # there, pages have come to lie in other slabs than these would take
            return
        if stays:
            check_pages(made)
            return
        self.kept.clear()
        self.cache, rows = made, list(range(SEQUENCES)) if rows is None else rows
        self.lengths = [self.lengths[row] for row in rows] + [0] * (SEQUENCES - len(rows))
        self.columns = {
            (layer, side, sequence): copy.deepcopy(self.columns[layer, side, rows[sequence]])
            if sequence < len(rows)
            else []
            for layer, side, sequence in self.columns
        }
        self.is_unplanned = True
        self.follow()

    @rule(
        sequence=st.integers(0, SEQUENCES - 1),
        first=st.sampled_from([0, 0, 0, 1, 3]),
        less=st.integers(0, 2),
        follows=st.booleans(),
    )
    def retain(self, sequence: int, first: int, less: int, follows: bool) -> None:
        end = max(first, self.lengths[sequence] // 64 - less)
        if len(self.kept) > 3 or end > self.lengths[sequence] // 64:
            return
        entries = self.cache.page_entries(sequence, first, end)
        self.cache.retain(entries)
        columns = [column[first:] for column in self.of_sequence(sequence, end)]
        self.kept.append(Kept(self.cache, entries, columns, follows=follows))
        self.cache.add_holder(self.kept[-1])

    @precondition(lambda self: self.kept)
    @rule(which=st.integers(0, 3))
    def release(self, which: int) -> None:
        kept = self.kept.pop(which % len(self.kept))
        before = self.cache.pools.bytes_in_use
        assert self.cache.release(kept.entries) == before - self.cache.pools.bytes_in_use

    @precondition(lambda self: self.kept)
    @rule(which=st.integers(0, 3), sequence=st.integers(0, SEQUENCES - 1), less=st.integers(0, 2))
    def adopt(self, which: int, sequence: int, less: int) -> None:
        kept = self.kept[which % len(self.kept)]
        pages = max(0, kept.entries.shape[2] - less)
        self.free(sequence)
        entries = kept.entries[..., :pages]
        if pages and self.cache.pools.info(int(entries[0, 0, 0])).owner.page:
            with pytest.raises(PageEntryError, match="it cannot be page 0 of layer 0, K"):
                self.cache.adopt(sequence, entries, 64 * pages)
            return
        self.cache.adopt(sequence, entries, 64 * pages)
        self.put_sequence(sequence, [column[:pages] for column in kept.columns], 64 * pages)

    @rule(source=st.integers(0, SEQUENCES - 1), into=st.integers(0, SEQUENCES - 1), is_held=st.booleans())
    def load(self, source: int, into: int, is_held: bool) -> None:
        """Pages that are filled from elsewhere: here, with what another sequence's are. Who has filled them may still
        hold them when they are written to."""
        if into == source:
            return
        self.free(into)
        tokens = self.lengths[source]
        of_source = self.cache.entries[:, :, source, : -(-tokens // 64)].copy()
        try:
            made = self.cache.new_pages((of_source & 15).astype(np.uint8))
        except CacheFullError:
            assert self.limited
            return
        for to, block in zip(self.cache.read_pages(made), self.cache.read_pages(of_source), strict=True):
            to.copy_(block)
        self.cache.adopt(into, made, tokens, self.cache.importance_of(source))
        columns = self.of_sequence(source)
        if is_held and len(self.kept) < 4:
            self.kept.append(Kept(self.cache, made, columns, follows=False))
        else:
            self.cache.release(made)
        self.put_sequence(into, columns, tokens)

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
        self.is_unplanned = True  # pages have been copied
        try:
            with self.cache.writing(layer, k * math.nan, v * math.nan, keep=fails):
                if fails:
                    raise RuntimeError("attention failed")
        except (CacheFullError, RuntimeError):
            pass
        self.follow()

    @invariant()
    def pages_are_those_of_the_tables(self) -> None:
        held = Counter(entry for kept in self.kept for entry in kept.entries.reshape(-1).tolist())
        check_pages(self.cache, held)

    @invariant()
    def kept_pages_are_those_of_the_model(self) -> None:
        for kept in self.kept:
            columns = iter(kept.columns)
            for of_layer in kept.entries:
                for side in Side:
                    for entry, page in zip(of_layer[side].tolist(), next(columns), strict=True):
                        assert entry & 15 == page.format
                        layout = PageLayout(side, page.format, HEAD_DIM)
                        held = dequantize_blocks(self.cache.pools.blocks(entry).cpu().numpy(), layout)
                        assert np.array_equal(held[:, : page.values.shape[1]], page.values.astype(held.dtype))

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
            assert used <= max(may + 1, least) or self.is_unplanned

    def teardown(self) -> None:
        page_table._FIRST_PAGES = 64
        if hasattr(self, "cache"):
            for sequence in range(SEQUENCES):
                self.cache.free(sequence)
            while self.kept:
                self.release(0)
            assert self.cache.pools.bytes_in_use == 0
            assert not self.cache._twins
            assert not self.cache._twin_of
            assert self.cache._is_plain


TestSequences = SequencesMachine.TestCase
TestSequences.settings = settings(max_examples=40, stateful_step_count=20, deadline=None)


class GpuSequencesMachine(SequencesMachine):
    device = "cuda"


TestSequencesOnGpu = pytest.mark.gpu(GpuSequencesMachine.TestCase)
TestSequencesOnGpu.settings = settings(max_examples=8, stateful_step_count=15, deadline=None)


# Single cases -------------------------------------------------------------------------------------------------------


def filled(count: int, device: str = "cpu", *, copies: int = 1, seed: int = 0, **options: Any) -> KVCache:
    """A cache whose first sequence, and ``copies`` - 1 others that are the same, have so many tokens."""
    cache = make_cache(device, **options)
    for layer in range(LAYERS):
        cache.append(layer, *random_heads(cache, 1, count, seed + layer)[1:])
    if copies > 1:
        cache.select_sequences([0] * copies)
    return cache


def append_all(
    cache: KVCache, sequences: list[int], count: int, seed: int = 0, tokens: list[int] | None = None
) -> None:
    for layer in range(LAYERS):
        cache.append(layer, *random_heads(cache, len(sequences), count, seed + layer)[1:], sequences, tokens=tokens)


def everything(cache: KVCache, sequence: int) -> list[Any]:
    return [x for layer in range(LAYERS) for x in cache.read(layer, sequence)]


def same(found: list[Any], expected: list[Any]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tokens", [0, 1, 64, 100, 128, 600, 640, 699, 700])
@pytest.mark.parametrize("copies", [1, 3])
def test_what_is_kept_has_the_values_that_it_had(copies: int, tokens: int, device: str) -> None:
    cache = filled(700, device, copies=copies, formats=INT4)
    before = everything(cache, 0)
    cache.truncate(0, tokens)
    assert same(everything(cache, 0), [x[:, :tokens] for x in before])
    if copies > 1:
        assert same(everything(cache, 1), before)
    check_pages(cache)
    if 0 < tokens < 700 and tokens % 64:
        assert (cache.precision_map(0)[:, 0, tokens // 64] == PageFormat.FP16).all()
    append_all(cache, [0], 70, 5)
    gone = 64 * max(0, (tokens - 64) // 64)  # what had left the window then; others have now
    assert same([x[:, :gone] for x in everything(cache, 0)], [x[:, :gone] for x in before])
    check_pages(cache)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("copies", [1, 2])
def test_what_is_cut_reaches_no_later_result(copies: int, device: str) -> None:
    """A NaN behind the end is multiplied with a probability of 0."""
    cache = make_cache(device, formats=INT4)
    for layer in range(LAYERS):
        _, k, v = random_heads(cache, 1, 200, layer)
        k[:, :, 150:] = v[:, :, 150:] = math.nan
        cache.append(layer, k, v)
    if copies > 1:
        cache.select_sequences([0, 0])
    cache.truncate(0, 150)
    for layer in range(LAYERS):
        x = random_heads(cache, 1, 3, 7 + layer)
        assert attention_with_kv_cache(*x, cache, layer=layer)[0].isfinite().all()
    if copies > 1:
        assert all(x[:, 150:].isnan().all() for x in everything(cache, 1))
    check_pages(cache)


@pytest.mark.parametrize("options", [{"formats": INT4}, {"budget": 0.4}], ids=str)
def test_pages_do_not_leave_the_window_twice(options: dict[str, Any]) -> None:
    """Quantized pages that a cut has brought back into the window keep their bytes, and count as what they are."""
    cache = filled(700, sinks=0, recent_tokens=100, **options)
    cache.truncate(0, 580)
    narrow = cache.entries[:, :, 0, 7].copy()
    assert (cache.precision_map(0)[:, 0, 7] != PageFormat.FP16).any()
    append_all(cache, [0], 64, 3)
    if cache.budget is None:
        assert (cache.entries[:, :, 0, 7] == narrow).all()
    for layer in range(LAYERS):
        used, may, least = layer_bytes(cache, layer)
        assert cache.budget is None or used <= max(may + 1, least)
    check_pages(cache)


def test_a_cut_without_memory_changes_nothing() -> None:
    cache = filled(700, formats=INT4)
    cache.pools.max_bytes = cache.pools.bytes_allocated
    while cache.pools._pools[Side.V, PageFormat.FP16].free:
        cache.pools.allocate(Side.V, PageFormat.FP16, PageOwner(0, 0))
    before = cache_state(cache)
    with pytest.raises(CacheFullError, match="pages need"):
        cache.truncate(0, 100)
    assert cache_state(cache) == before
    cache.truncate(0, 640 + 10)  # a page that is in 16 bits already


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda cache: cache.truncate(0, 301), "sequence 0 has 300 tokens; 301 of them cannot be kept"),
        (lambda cache: cache.truncate(0, -1), "-1 of them cannot be kept"),
        (lambda cache: cache.truncate(0, 1.5), "tokens is 1.5; an integer is wanted"),
        (lambda cache: cache.truncate(SEQUENCES, 1), r"sequences are \[4\]"),
        (lambda cache: cache.truncate(1, 1), r"truncate\(\) in the midst of a step: sequence 1 has"),
        (lambda cache: cache.select_sequences([1, 0]), r"select_sequences\(\) in the midst of a step"),
        (lambda cache: cache.select_sequences([0] * 5), "5 sequences are selected; the cache has 4"),
        (lambda cache: cache.select_sequences([4]), r"sequences are \[4\]; the cache has max_sequences=4"),
        (lambda cache: cache.select_sequences([-1]), r"sequences are \[-1\]"),
        (lambda cache: cache.select_sequences(["0"]), "a sequence is '0'; an integer is wanted"),
    ],
)
def test_calls_that_are_refused(call: Any, message: str) -> None:
    cache = filled(300, budget=0.5)
    cache.append(0, *random_heads(cache, 1, 2, 0)[1:], [1])  # a step that the other layer has not taken
    before = cache_state(cache)
    with pytest.raises(CacheInputError, match=message):
        call(cache)
    assert cache_state(cache) == before
    with cache.writing(1, *random_heads(cache, 1, 2, 0)[1:], [1]):
        for change in (lambda: cache.truncate(0, 1), lambda: cache.select_sequences([0, 0])):
            with pytest.raises(CacheInputError, match="the cache is being written to"):
                change()


@pytest.mark.parametrize("device", DEVICES)
def test_pages_are_copied_when_they_are_written_to(device: str) -> None:
    """And not before; of those who write to one page, the last one keeps it."""
    cache = filled(300, device)
    alone = cache.pools.bytes_in_use
    cache.select_sequences([0, 0, 0, 0])
    assert cache.pools.bytes_in_use == alone
    append_all(cache, [1], 1)
    assert cache.pools.bytes_in_use == alone + LAYERS * 2 * FULL
    append_all(cache, [0, 2, 3], 1, 1)
    assert cache.pools.bytes_in_use == alone + LAYERS * 2 * 3 * FULL
    expected = everything(filled(300, device), 0)
    for sequence in range(4):
        assert same([x[:, :300] for x in everything(cache, sequence)], expected)
    assert len({everything(cache, sequence)[0][0, 300, 0].item() for sequence in range(4)}) == 4
    check_pages(cache)
    cache.select_sequences([2])
    assert cache.pools.bytes_in_use == alone
    assert cache.table.lengths.tolist() == [[301, 0, 0, 0]] * LAYERS
    check_pages(cache)


def test_who_brings_no_tokens_copies_later() -> None:
    cache = filled(70, copies=3)
    three = [0, 1, 2]
    append_all(cache, three, 1, 0, tokens=[1, 0, 0])
    append_all(cache, three, 1, 5, tokens=[1, 1, 1])
    found = [everything(cache, sequence)[0][0, -1, 0].item() for sequence in three]
    assert len(set(found)) == 3
    check_pages(cache)


def count_jobs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    made, quantize = [], cache_module.quantize_pages

    def counted(jobs: Any, *arguments: Any) -> None:
        made.append(len(jobs))
        quantize(jobs, *arguments)

    monkeypatch.setattr(cache_module, "quantize_pages", counted)
    return made


def test_a_shared_page_is_quantized_once(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = filled(320, copies=4, formats=INT4)
    made = count_jobs(monkeypatch)
    append_all(cache, [0, 1, 2, 3], 64)
    assert made == [1] * LAYERS * 2
    assert (cache.entries[:, :, :, 4] == cache.entries[:, :, :1, 4]).all()
    assert (cache.precision_map(0)[:, :, 4] == INT4).all()
    check_pages(cache)


@pytest.mark.parametrize("options", [{"formats": INT4}, {"budget": 0.3}], ids=str)
def test_windows_that_differ(options: dict[str, Any]) -> None:
    """What is in the window of some stays theirs in 16 bits; the others share a quantized one."""
    cache = filled(700, copies=4, **options)
    before = everything(cache, 0)
    append_all(cache, [0, 1], 64)
    window = slice(576, 640)
    assert same([x[:, window] for x in everything(cache, 2)], [x[:, window] for x in before])
    if cache.budget is None:
        assert not same([x[:, window] for x in everything(cache, 0)], [x[:, window] for x in before])
    assert (cache.entries[:, :, 0, 9] == cache.entries[:, :, 1, 9]).all()
    assert (cache.entries[:, :, 2, 9] == cache.entries[:, :, 3, 9]).all()
    check_pages(cache)
    cache.free(0)
    cache.free(2)
    check_pages(cache)
    assert same([x[:, window] for x in everything(cache, 3)], [x[:, window] for x in before])


def test_a_budget_counts_shared_pages_once() -> None:
    """Four sequences that share all but their last pages have the bits of about one."""
    cache = filled(1200, budget=0.3, recent_tokens=64)
    alone = [layer_bytes(cache, layer) for layer in range(LAYERS)]
    cache.select_sequences([0, 0, 0, 0])
    assert [layer_bytes(cache, layer) for layer in range(LAYERS)] == alone
    append_all(cache, [0, 1, 2, 3], 70)
    mass = torch.zeros(4, 1, cache.mass.shape[2])
    mass[:, :, 5] = 0.9
    mass[:, :, 1:5] = 0.01
    for _ in range(3):
        for layer in range(LAYERS):
            cache.observe(layer, mass)
        outcome = cache.reallocate()
        for layer in range(LAYERS):
            used, may, least = layer_bytes(cache, layer)
            assert used <= max(may + 1, least)
            assert used == cache._used_bytes[layer]
            formats = cache.precision_map(layer)
            assert (formats[:, :, 1:17] == formats[:, :1, 1:17]).all()
    assert outcome is not None
    check_pages(cache)


@pytest.mark.parametrize("budget", [0.3, 0.5, 0.7])
def test_a_budget_is_held_when_pages_come_and_go_by_selection(budget: float) -> None:
    """Copies of open pages take bytes; sequences that are dropped leave less for those that stay."""
    cache = filled(1500, budget=budget)
    cache.select_sequences([0, 0, 0, 0])
    append_all(cache, [0, 1, 2, 3], 1)
    check_budget(cache)
    cache = filled(1500, budget=budget)
    append_all(cache, [1], 1500, 1)
    append_all(cache, [2], 300, 1)
    for rows in ([0, 2], [0]):
        cache.select_sequences(rows)
        check_budget(cache)
    check_pages(cache)


def check_budget(cache: KVCache) -> None:
    for layer in range(LAYERS):
        used, may, least = layer_bytes(cache, layer)
        assert used <= max(may + 1, least)


def test_what_was_observed_goes_with_the_sequences() -> None:
    cache = filled(300, copies=3, budget=0.5)
    mass = torch.arange(1, 4).reshape(3, 1, 1) * torch.ones(3, 2, 5)
    for layer in range(LAYERS):
        cache.observe(layer, mass, [0, 1, 2])
    cache.reallocate()
    for layer in range(LAYERS):
        cache.observe(layer, 10 * mass[1:], [1, 2])
    cache.select_sequences([2, 2, 1])
    assert cache.observed_steps.tolist() == [[1, 1, 1, 0]] * LAYERS
    assert (cache.mass[0, :, 0].double() * MASS_UNIT).round().tolist() == [30, 30, 20, 0]
    assert cache.importance.values(0)[:3, 0].tolist() == pytest.approx([3, 3, 2])
    cache.truncate(1, 130)
    assert cache.mass[0, 1, 2] > 0
    assert not cache.mass[0, 1, 3:].any()


def test_planned_steps_copy_what_they_write_to() -> None:
    cache = filled(300, copies=4, formats=INT4)
    cache.plan()
    for layer in range(LAYERS):
        for side in Side:
            assert len(set(cache.entries[layer, side, :, 4].tolist())) == 4
    cache.table.device_lengths += 1  # what the graph does
    check_pages(cache)


@pytest.mark.skipif(emulator.compiler() is None, reason="no C++ compiler for the emulator")
@pytest.mark.parametrize("options", [{"formats": INT4}, {"budget": 0.4}], ids=str)
def test_kernels_give_what_the_cpu_does(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def steps() -> dict[str, Any]:
        cache = filled(300, copies=3, max_bytes=4 << 20, **options)
        append_all(cache, [0, 1, 2], 3, 1)
        cache.truncate(1, 150)
        cache.select_sequences([1, 2, 1, 0])
        append_all(cache, [0, 1, 2, 3], 70, 2, tokens=[70, 1, 0, 65])
        check_pages(cache)
        return cache_state(cache)

    expected = steps()
    monkeypatch.setattr(kernels, "launch", emulated_launch)
    monkeypatch.setattr(page_kernels, "_runs_kernels", lambda _: True)
    assert steps() == expected


@pytest.mark.gpu
def test_graphs_between_selections() -> None:
    """A graph writes where the tables say at its replay: :meth:`plan` has copied what is shared."""
    graphed, eager = (filled(300, "cuda", copies=4, formats=INT4) for _ in range(2))
    static = [random_heads(graphed, 4, 1, layer) for layer in range(LAYERS)]

    def step(cache: KVCache) -> list[torch.Tensor]:
        return [attention_with_kv_cache(*x, cache, layer=layer)[0] for layer, x in enumerate(static)]

    step(graphed), step(eager)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = step(graphed)
        for change in (lambda: graphed.truncate(0, 1), lambda: graphed.select_sequences([0, 0])):
            with pytest.raises(CacheInputError, match="cannot be captured in a CUDA graph"):
                change()

    def count_quantized() -> int:
        return sum(int((graphed.precision_map(layer) == INT4).sum()) for layer in range(LAYERS))

    compared = 0
    for number in range(140):
        for layer, x in enumerate(static):
            for tensor, new in zip(x, random_heads(graphed, 4, 1, 10 * number + layer), strict=True):
                tensor.copy_(new)
        rows = np.random.default_rng(number).integers(0, 4, 4).tolist()
        for cache in (graphed, eager):
            cache.select_sequences(rows)
        quantized = count_quantized()
        graphed.plan()
        graph.replay()
        for found, expected in zip(outs, step(eager), strict=True):
            # plan() quantizes what leaves the window before the step, an eager step behind it.
            if count_quantized() == quantized:
                assert (found.float() - expected.float()).abs().max() < 2e-3
                compared += 1
    assert compared == LAYERS * (140 - 2)
    for cache in (graphed, eager):
        check_pages(cache)
    for sequence in range(4):
        assert same(everything(graphed, sequence), everything(eager, sequence))


# Sequences as values, and pages that others hold --------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_a_fork_leaves_all_others_as_they_were(device: str) -> None:
    cache = filled(300, device, formats=INT4)
    append_all(cache, [2], 70, 1)
    others, in_use = everything(cache, 2), cache.pools.bytes_in_use
    assert cache.fork(0) == 1
    assert cache.fork(1, 3) == 3
    assert cache.pools.bytes_in_use == in_use
    for sequence in (1, 3):
        assert same(everything(cache, sequence), everything(cache, 0))
    check_pages(cache)
    append_all(cache, [1, 3], 3, 5)
    cache.free(0)
    assert same(everything(cache, 2), others)
    assert same([x[:, :300] for x in everything(cache, 3)], everything(filled(300, device, formats=INT4), 0))
    assert not same(everything(cache, 1), everything(cache, 3))
    check_pages(cache)


def test_what_was_observed_goes_with_a_fork() -> None:
    cache = filled(300, budget=0.5)
    for layer in range(LAYERS):
        cache.observe(layer, 3 * torch.ones(1, 2, 5), [0])
    cache.reallocate()
    cache.observe(0, torch.ones(1, 2, 5), [0])
    cache.fork(0, 2)
    assert cache.observed_steps.tolist() == [[1, 0, 1, 0], [0] * 4]
    assert torch.equal(cache.mass[:, 2], cache.mass[:, 0])
    assert cache.importance.values(1)[2, :5].tolist() == [3] * 5


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda cache: cache.fork(4), CacheInputError, r"sequences are \[4\]; the cache has max_sequences=4"),
        (lambda cache: cache.fork(0, 0), CacheInputError, r"fork\(\) to sequence 0, which is the source itself"),
        (lambda cache: cache.fork(0, 1), CacheInputError, r"fork\(\) to sequence 1, which has tokens"),
        (lambda cache: cache.fork(1), CacheInputError, r"fork\(\) in the midst of a step: sequence 1 has"),
        (lambda cache: [cache.fork(0) for _ in range(3)], CacheFullError, "all 4 sequences are in use"),
        (lambda cache: cache.copy([4]), CacheInputError, r"sequences are \[4\]"),
        (lambda cache: cache.copy([0] * 5), CacheInputError, "5 sequences are copied; the cache has 4"),
        (lambda cache: cache.page_entries(0, 0, 5), CacheInputError, "sequence 0 has 4 full pages; 0 to 5 are asked"),
        (lambda cache: cache.page_entries(1, 0, 1), CacheInputError, "sequence 1 has 0 full pages"),
        (lambda cache: cache.retain(cache.entries[0, 0, 0, 4]), PageEntryError, "page 4 of sequence 0 is not full"),
        (lambda cache: cache.retain([cache.entries[0, 0, 0, 0], 5]), PageEntryError, "0x5 is the entry of no page"),
        (lambda cache: cache.release(cache.entries[0, 0, 0, 0]), PageEntryError, "released 1 times; it is retained 0"),
        (lambda cache: cache.new_pages(np.zeros((2, 1, 3), np.uint8)), CacheInputError, r"\[2, 2, pages\] is wanted"),
        (
            lambda cache: cache.new_pages(np.full((2, 2, 3), PageFormat.BF16, np.uint8)),
            CacheInputError,
            "layer 0, K: pages of format 1 cannot be in this cache, which has FP16, INT8, INT4, INT3, INT2 there",
        ),
        (lambda cache: cache.new_pages(np.zeros((2, 2, 25), np.uint8)), CacheInputError, "max_tokens is 1536"),
        (lambda cache: cache.adopt(0, cache.page_entries(0, 0, 1), 64), CacheInputError, "sequence 0 has tokens"),
        (
            lambda cache: cache.adopt(2, cache.page_entries(0, 0, 1), 65),
            CacheInputError,
            r"65 tokens have i64 \[2, 2, 2\]",
        ),
        (lambda cache: cache.adopt(2, cache.page_entries(0, 1, 2), 64), PageEntryError, "is page 1 of layer 0, K"),
        (lambda cache: cache.adopt(2, cache.entries[:, :, 0, :5], 300), PageEntryError, "must be in 16 bits and the"),
    ],
)
def test_calls_on_values_and_pages_that_are_refused(call: Any, error: Any, message: str) -> None:
    cache = filled(300, budget=0.5)
    cache.append(0, *random_heads(cache, 1, 2, 0)[1:], [1])  # a step that the other layer has not taken
    before = cache_state(cache)
    with pytest.raises(error, match=message):
        call(cache)
    for sequence in (2, 3):
        cache.free(sequence)
    assert cache_state(cache) == before


@pytest.mark.parametrize("none", [np.empty((2, 2, 0), np.int64), np.array([]), []], ids=["i64", "f64", "list"])
def test_no_pages_at_all_are_held_and_given_back(none: Any) -> None:
    cache = filled(300, formats=INT4)
    cache.append(0, *random_heads(cache, 1, 2, 0)[1:], [1])  # in the midst of a step, too
    before = cache_state(cache)
    cache.retain(none)
    assert cache.release(none) == 0
    assert cache.read_pages(none) == []
    assert cache_state(cache) == before


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bits_of", [*[f for f in PageFormat if f.is_quantized], 0.3], ids=str)
def test_copies_of_copies_are_equal(bits_of: Any, device: str) -> None:
    """Read and append drift."""
    options = {"budget": bits_of} if isinstance(bits_of, float) else {"formats": bits_of}
    cache = filled(700, device, copies=2, recent_tokens=0, sinks=0, **options)
    append_all(cache, [1, 2], 30, 1)
    for layer in range(LAYERS):
        cache.observe(layer, torch.ones(2, 2, 11).to(cache.device), [0, 1])
    copied = cache
    for _ in range(8):
        copied = copied.copy()
    check_pages(copied)
    found, expected = cache_state(copied), cache_state(cache)
    for key in ("lengths", "mass", "shares", "used_bytes", "errors", "queries", "pages"):
        assert found[key] == expected[key], key
    assert copied.pools.bytes_in_use == cache.pools.bytes_in_use
    for layer in range(LAYERS):
        assert (copied.importance.values(layer) == cache.importance.values(layer)).all()
    before = everything(cache, 1)
    append_all(copied, [0, 1, 2], 200, 2)
    assert same(everything(cache, 1), before)
    append_all(cache, [0, 1, 2], 200, 2)
    for sequence in range(3):
        assert same(everything(copied, sequence), everything(cache, sequence))
    some = cache.copy([2, 0, 0])
    for sequence, source in enumerate([2, 0, 0]):
        assert same(everything(some, sequence), everything(cache, source))
    assert some.length(0, 3) == 0
    check_pages(some)


@pytest.mark.parametrize("device", DEVICES)
def test_pages_outlive_their_sequence(device: str) -> None:
    cache = filled(300, device, formats=INT4)
    before, entries = everything(cache, 0), cache.page_entries(0, 0, 4)
    cache.retain(entries)
    held = Counter(entries.reshape(-1).tolist())
    check_pages(cache, held)
    cache.free(0)
    check_pages(cache, held)
    append_all(cache, [1], 400, 9)  # takes what is free
    cache.adopt(0, entries, 256)
    cache.adopt(2, entries[:, :, :2], 128)
    check_pages(cache, held)
    assert not cache._is_plain
    assert same(everything(cache, 0), [x[:, :256] for x in before])
    assert same(everything(cache, 2), [x[:, :128] for x in before])
    append_all(cache, [0], 3, 4)
    cache.truncate(0, 200)
    assert cache.release(entries) == 2 * LAYERS * FULL  # the page that was cut, of which there is a copy
    check_pages(cache)
    assert same(everything(cache, 0), [x[:, :200] for x in before])


@pytest.mark.parametrize("device", DEVICES)
def test_pages_that_are_filled_by_others(device: str) -> None:
    """As a file is loaded: the last page is incomplete, and nobody's before it is written to."""
    source = filled(300, device, formats=INT4)
    cache = make_cache(device, formats=INT4)
    of_source = source.entries[:, :, 0, :5]
    made = cache.new_pages((of_source & 15).astype(np.uint8))
    assert cache.held_bytes == cache.pools.bytes_in_use == source.pools.bytes_in_use
    check_pages(cache, Counter(made.reshape(-1).tolist()))
    for target, block in zip(cache.read_pages(made), source.read_pages(of_source), strict=True):
        target.copy_(block)
    cache.adopt(3, made, 300, source.importance_of(0))
    assert same(everything(cache, 3), everything(source, 0))
    append_all(cache, [3], 1, 5)  # while the caller holds the last page, too
    held = Counter(made.reshape(-1).tolist())
    check_pages(cache, held)
    assert cache.release(made) == LAYERS * 2 * FULL
    append_all(cache, [3], 99, 6)
    append_all(source, [0], 1, 5)
    append_all(source, [0], 99, 6)
    assert same(everything(cache, 3), everything(source, 0))
    check_pages(cache)
    cache.free(3)
    assert cache.pools.bytes_in_use == 0


class Store:
    """Holds pages, follows those that it may, and gives up what it is asked for."""

    def __init__(self, cache: KVCache, entries: np.ndarray, kept: np.ndarray) -> None:
        self.cache, self.entries, self.kept = cache, entries.copy(), set(kept.reshape(-1).tolist())
        self.asked: list[tuple[Any, int]] = []
        cache.retain(entries)
        cache.add_holder(self)

    def follows(self, entry: int) -> bool:
        return entry in self.entries and entry not in self.kept

    def replaced(self, changes: Any) -> None:
        for source, target in changes.items():
            self.entries[self.entries == source] = target

    def reclaim(self, missing: Any, missing_bytes: int) -> bool:
        self.asked.append((dict(missing), missing_bytes))
        self.cache.release(self.entries)
        self.entries = self.entries[..., :0]
        return True


def test_holders_follow_pages_to_fewer_bits() -> None:
    """And keep those that must stay as they are."""
    cache = filled(300, copies=2, formats=INT4, recent_tokens=128)
    before = everything(cache, 0)
    entries = cache.page_entries(0, 0, 4)
    store = Store(cache, entries, entries[:, :, 3])
    append_all(cache, [0], 100, 1)
    assert (store.entries == entries).all()  # one of the two sequences has them as they were
    append_all(cache, [1], 100, 1)
    assert (store.entries[:, :, [0, 3]] == entries[:, :, [0, 3]]).all()
    assert (store.entries[:, :, 2] == cache.entries[:, :, 1, 2]).all()
    assert (store.entries[:, :, 2] & 15 == INT4).all()
    check_pages(cache, Counter(store.entries.reshape(-1).tolist()))
    cache.adopt(2, store.entries, 256)
    assert same([x[:, 192:256] for x in everything(cache, 2)], [x[:, 192:256] for x in before])
    cache.select_sequences([])
    assert cache.held_bytes == cache.pools.bytes_in_use
    cache.release(store.entries)
    assert cache.pools.bytes_in_use == 0


def test_a_budget_reaches_holders() -> None:
    """What loses bits in the sequence loses them in the store: there is one page of each."""
    cache = filled(1000, budget=0.7)
    store = Store(cache, cache.page_entries(0, 0, 10), cache.entries[:0])
    wide = store.entries.copy()
    append_all(cache, [0], 500, 1)
    mass = torch.full((1, 2, cache.mass.shape[2]), 0.001)
    mass[:, :, 12:20] = 1.0
    for layer in range(LAYERS):
        cache.observe(layer, mass)
    cache.reallocate()
    assert (store.entries != wide).any()
    assert (store.entries == cache.page_entries(0, 0, 10)).all()
    assert cache.held_bytes == 0
    check_pages(cache, Counter(store.entries.reshape(-1).tolist()))


def test_holders_are_asked_when_memory_ends() -> None:
    cache = filled(300, max_bytes=40 * FULL)
    store = Store(cache, cache.page_entries(0, 0, 4), cache.entries[:0])
    cache.free(0)
    append_all(cache, [1], 64 * 9, 1)
    # 40 pages are less than the 2 · 8 that are held and the 2 · 2 · 9 that come.
    assert store.asked == [({(Side.K, PageFormat.FP16): 3, (Side.V, PageFormat.FP16): 9}, 12 * FULL)]
    assert cache.held_bytes == 0
    check_pages(cache)
    before = cache_state(cache)
    with pytest.raises(CacheFullError):
        append_all(cache, [2], 64 * 9, 1)
    assert len(store.asked) == 2
    assert cache_state(cache) == before
    del store  # it is no longer asked
    with pytest.raises(CacheFullError):
        append_all(cache, [2], 64 * 9, 1)


def test_who_writes_to_his_own_pages_is_not_looked_for_among_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a step in which pages come, too; until a sequence has other pages."""
    cache = filled(300, copies=3, formats=INT4)
    asked: list[list[int]] = []

    def places(entries: Any, writers: list[tuple[int, int]], held: Any = ()) -> list[tuple[int, int, int]]:
        asked.append([sequence for sequence, _ in writers])
        return shared_pages.places_to_copy(entries, writers, held)

    monkeypatch.setattr(cache_module, "places_to_copy", places)

    def asked_for(sequences: list[int], count: int, tokens: list[int] | None = None) -> list[list[int]]:
        asked.clear()
        append_all(cache, sequences, count, len(asked), tokens)
        check_pages(cache)
        return asked

    assert asked_for([0, 2], 1, [1, 0]) == [[0]] * LAYERS
    assert asked_for([0, 1, 2], 1) == [[1, 2]] * LAYERS
    for count in (60, 64, 3):  # pages come, and leave the window
        assert asked_for([0, 1, 2], count) == []
    cache.truncate(1, 400)
    assert asked_for([0, 1, 2], 1) == [[1]] * LAYERS
    assert cache.fork(2) == 3
    assert asked_for([0, 1], 1) == []
    assert asked_for([2, 3], 1) == [[2, 3]] * LAYERS
    cache.select_sequences([3, 2, 1, 0])
    assert asked_for([0, 3], 1) == [[0, 3]] * LAYERS
    cache.free(1)
    entries = cache.page_entries(0, 0, 4)
    cache.retain(entries)
    cache.adopt(1, entries, 256)
    cache.release(entries)
    assert asked_for([0, 3], 1) == []
    assert asked_for([0, 1], 1) == [[]] * LAYERS  # a page comes
    assert asked_for([0, 1], 1) == []


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("adopt", [False, True])
def test_many_sequences_over_one_prompt(adopt: bool, device: str) -> None:
    """There is one copy of the prompt, also when sequences leave its last pages behind one after the other; each gets
    what a cache of its own gives, bit for bit."""
    found = shared_prompt.share(12, 320, [1, 64, 63], adopt=adopt, device=device)
    assert found["differ"] == 0
    assert found["bytes_of_all_sequences_at_first"] == found["bytes_of_one_copy"]
    prompt_bytes = found["prompt_bytes_at_the_end"]
    assert found["prompt_pages_at_the_end"] == shared_prompt.LAYERS * 2 * 5
    assert found["bytes_at_the_end"] == found["bytes_of_separate_caches_at_the_end"] - 11 * prompt_bytes


def test_a_soak_gives_all_back() -> None:
    found = kv_soak.soak(2400, 8, every=10)
    assert found["operations"] == 2400
    assert found["in_use_bytes_when_all_is_freed"] == 0
    assert found["refused"] > 0
    assert found["allocated_bytes_by_tenth"][-1] <= 90 * 2 * 2048
    assert found["by_name"].keys() == kv_soak.WEIGHTS.keys()


@pytest.mark.parametrize("policy", ["adaptive", "conversation"])
def test_a_soak_of_a_manager_gives_all_back(policy: str) -> None:
    found = kv_soak.soak(2400, 8, policy=policy, every=10)
    assert found["operations"] == 2400
    assert found["in_use_bytes_when_all_is_freed"] == 0
    assert found["refused"] > 0
    assert found["by_name"].keys() >= kv_soak.MANAGER_WEIGHTS.keys() - {"evict", "reorder"}
    assert found["compared_tokens"] > 10_000


def test_slabs_are_cut_anew_when_memory_ends() -> None:
    """What narrow pages have given up serves wide ones, and the other way round; where it is too little, nothing is."""
    cache = make_cache(formats=INT4, max_bytes=64 * FULL, recent_tokens=64)
    for times in range(3):
        append_all(cache, [0], 64 * 12, times)
        append_all(cache, [1], 64, times)
        check_pages(cache)
        cache.free(0)
        made = cache.new_pages(np.full((LAYERS, 2, 20), INT4, np.uint8))
        assert cache.pools.bytes_allocated <= 64 * FULL
        before = cache_state(cache)
        with pytest.raises(CacheFullError):
            append_all(cache, [2, 3], 64 * 12, times)
        assert cache_state(cache) == before
        cache.release(made)
        cache.free(1)
    assert cache.pools.bytes_in_use == 0


def test_a_page_that_is_cut_and_filled_anew_is_quantized_anew() -> None:
    """It stays where it is, and what it was quantized to for another sequence is not what it holds now."""
    cache = filled(320, copies=2, formats=INT4)
    append_all(cache, [0], 64, 1)  # leaves the fifth page behind, which sequence 1 has in 16 bits
    cache.truncate(1, 290)
    append_all(cache, [1], 100, 2)
    assert (cache.entries[:, :, 0, 4] != cache.entries[:, :, 1, 4]).all()
    alone = filled(320, formats=INT4)
    alone.truncate(0, 290)
    append_all(alone, [0], 100, 2)
    assert same(everything(cache, 1), everything(alone, 0))
    check_pages(cache)


@pytest.mark.parametrize("is_held", [False, True])
def test_what_a_page_has_been_quantized_to_is_shared_later(is_held: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By sequences that leave it one after another, from each other or from who holds it in 16 bits."""
    cache = filled(320, copies=1 if is_held else 3, formats=INT4)
    entries = cache.page_entries(0, 0, 5)
    if is_held:
        cache.retain(entries)
        for sequence in (1, 2):
            cache.adopt(sequence, entries, 320)
    held = Counter(entries.reshape(-1).tolist()) if is_held else None
    made = count_jobs(monkeypatch)
    for sequence in range(3):
        append_all(cache, [sequence], 64, sequence)
        check_pages(cache, held)
    assert made == [1] * LAYERS * 2
    assert (cache.entries[:, :, :3, 4] == cache.entries[:, :, :1, 4]).all()
    values = everything(cache, 2)
    cache.free(0)
    cache.free(1)
    append_all(cache, [3], 700, 3)  # takes what is free
    assert same(everything(cache, 2), values)
    check_pages(cache, held)
    cache.free(2)
    cache.free(3)
    assert cache.held_bytes == cache.pools.bytes_in_use
    if is_held:
        cache.release(entries)
    assert not cache._twins
    assert not cache._twin_of


def test_pages_held_alone_are_quantized_once_for_those_who_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody shares a page when they are adopted: the table has none of them."""
    cache = filled(320, formats=INT4, recent_tokens=320, sinks=0)
    entries = cache.page_entries(0, 0, 5)
    cache.retain(entries)
    cache.free(0)
    held = Counter(entries.reshape(-1).tolist())
    cache.adopt(0, entries, 320)
    append_all(cache, [0], 320, 1)
    cache.adopt(1, entries, 320)
    made = count_jobs(monkeypatch)
    append_all(cache, [1], 320, 2)
    assert made == []
    check_pages(cache, held)
    values = everything(cache, 1)
    cache.free(0)
    append_all(cache, [2], 700, 3)
    assert same(everything(cache, 1), values)
    check_pages(cache, held)


def test_adopted_pages_do_not_leave_the_window_twice() -> None:
    """A prefix that is shorter than what it was cut from has quantized pages among its newest."""
    cache = filled(700, formats=INT4, recent_tokens=100)
    entries = cache.page_entries(0, 0, 8)
    cache.retain(entries)
    cache.free(0)
    cache.adopt(1, entries, 512)
    cache.release(entries)
    values = everything(cache, 1)
    append_all(cache, [1], 200, 1)
    assert (cache.page_entries(1, 0, 8) == entries).all()
    assert same([x[:, :512] for x in everything(cache, 1)], values)
    check_pages(cache)
