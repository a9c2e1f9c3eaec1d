"""The tree of cached prefixes, on pages that are nothing but numbers (fake_pages)."""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import Any

import numpy as np
import pytest
from fake_pages import BYTES, FULL, LAYERS, SMALL, FakePages
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvpack.errors import CacheFullError, CacheInputError
from kvpack.format.pages import Side
from kvpack.runtime.kv import prefix_hash, prefix_store
from kvpack.runtime.kv.eviction import POLICIES
from kvpack.runtime.kv.prefix_hash import page_hashes, root_hash
from kvpack.runtime.kv.prefix_store import Block, Prefix, PrefixStore

BLOCK_BYTES = LAYERS * 2 * BYTES[SMALL]
ROOT = root_hash({"model": "tiny"})


def tokens_of(*pages: int) -> np.ndarray:
    """A page of tokens for each number."""
    return (np.repeat(np.array(pages, np.int64), 64) * 64 + np.tile(np.arange(64), len(pages))).astype(np.int64)


def make(**options: Any) -> tuple[FakePages, PrefixStore]:
    pages = FakePages()
    return pages, PrefixStore(pages, ROOT, **options)


def run(pages: FakePages, store: PrefixStore, prompt: list[int], sequence: int = 0, **options: Any) -> int:
    """A request from its lookup to its end; how many of its pages were found."""
    match = store.match(tokens_of(*prompt))
    attached = store.attach_prefix(sequence, match, session=options.get("session"))
    assert attached == match.tokens
    pages.write(sequence, len(prompt))
    store.keep(sequence, tokens_of(*prompt), **options)
    del pages.sequences[sequence]
    return match.pages


def dump(pages: FakePages, store: PrefixStore) -> Any:
    """All that can be noticed of a store."""
    return (
        [
            [block.hash, block.entries.tolist(), None if block.quantized is None else block.quantized.tolist()]
            + [getattr(block, name) for name in Block.__slots__ if name not in ("parent", "entries", "quantized")]
            for block in store._blocks.values()
        ],
        store.used_bytes,
        sorted(store._block_of),
        {sequence: block.hash for sequence, block in store._standing.items()},
        {entry: count for entry, count in pages.held.items() if count},
        [sorted(block.hash for block in queue._place) for queue in store.policy.queues],
        dict(store.counters.evictions),
    )


# Hashes --------------------------------------------------------------------------------------------------------------


def test_hashes_are_chained_sha256() -> None:
    tokens = np.arange(130) - 5
    first = hashlib.sha256(ROOT + tokens[:64].astype("<i4").tobytes()).digest()
    second = hashlib.sha256(first + tokens[64:128].astype("<i4").tobytes()).digest()
    assert [row.tobytes() for row in page_hashes(ROOT, tokens)] == [first, second]
    assert page_hashes(ROOT, tokens[64:], first)[0].tobytes() == second
    assert page_hashes(ROOT, tokens[:63]).shape == (0, 32)
    assert page_hashes(ROOT, []).shape == (0, 32)
    assert (page_hashes(ROOT, tokens.tolist()) == page_hashes(ROOT, tokens.astype(np.int16))).all()


def test_roots_differ_by_each_name_and_value_and_not_by_order() -> None:
    key = {"model": "m", "adapter": None, "formats": [["INT4", "INT4"]], "salt": ""}
    changed = [key | {"model": "n"}, key | {"adapter": "a"}, key | {"formats": [["INT4", "INT3"]]}, key | {"salt": "t"}]
    assert len({root_hash(one) for one in [key, *changed]}) == 5
    assert root_hash(dict(reversed(key.items()))) == root_hash(key)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([0.5], "float64"),
        ([[1]], r"\[1, 1\]"),
        ([1 << 31], "from 2147483648 to 2147483648"),
        ([-(1 << 31) - 1], "32 bits"),
    ],
)
def test_tokens_must_be_integers_of_32_bits(tokens: Any, message: str) -> None:
    with pytest.raises(CacheInputError, match=message):
        page_hashes(ROOT, tokens)


def test_root_must_be_json() -> None:
    with pytest.raises(CacheInputError, match="must be JSON"):
        root_hash({"model": object()})
    with pytest.raises(CacheInputError, match="must be JSON"):
        root_hash({"model": float("nan")})


# Finding -------------------------------------------------------------------------------------------------------------


def test_longest_prefix_is_found_and_shared() -> None:
    pages, store = make()
    assert run(pages, store, [1, 2, 3]) == 0
    assert run(pages, store, [1, 2, 4, 5]) == 2
    assert run(pages, store, [1, 2, 4, 5, 6]) == 4
    assert run(pages, store, [2, 1]) == 0
    assert len(store) == 3 + 2 + 1 + 2
    assert store.used_bytes == len(store) * BLOCK_BYTES
    assert store.match(tokens_of(1, 2, 4, 9)[:-1]).tokens == 3 * 64  # 9 is not full
    match = store.match(tokens_of(1, 2, 9, 4))
    assert (match.pages, len(match.missing)) == (2, 2)
    assert store.match(tokens_of(1, 2, 4), most_tokens=191).pages == 2
    assert store.match([]).pages == 0
    uses = {int(np.frombuffer(block.tokens, "<i4")[0]) // 64: block.use_count for block in store._blocks.values()}
    assert [uses[page] for page in (3, 4, 5, 6)] == [1, 2, 2, 1]  # a request counts once


@pytest.mark.parametrize("change", ["model", "adapter", "formats", "salt"])
def test_other_roots_find_nothing(change: str) -> None:
    key = {"model": "m", "adapter": None, "formats": "INT4", "salt": ""}
    pages = FakePages()
    store = PrefixStore(pages, root_hash(key))
    run(pages, store, [1, 2])
    other = PrefixStore(pages, root_hash(key | {change: "x"}))
    other._blocks, other._root.children = store._blocks, 1  # one table, as a tier is for several stores
    assert store.match(tokens_of(1, 2)).pages == 2
    assert other.match(tokens_of(1, 2)).pages == 0


def test_equal_hash_of_other_tokens_is_a_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    def weak(parent: bytes, tokens: bytes) -> bytes:
        return hashlib.sha256(parent + tokens[:4]).digest()  # of the first token alone

    monkeypatch.setattr(prefix_hash, "next_hash", weak)
    monkeypatch.setattr(prefix_store, "next_hash", weak)
    pages, store = make()
    run(pages, store, [1, 2])
    other = tokens_of(1, 2)
    other[70] += 1
    assert page_hashes(ROOT, other).tolist() == page_hashes(ROOT, tokens_of(1, 2)).tolist()
    assert store.match(other).pages == 1
    # It is not cached in the place of what is there either, nor can it be pinned.
    pages.write(1, 2)
    before = dump(pages, store)
    with pytest.raises(CacheFullError, match="cannot be kept whole"):
        store.cache_prefix(1, other, pin=True)
    assert dump(pages, store) == before
    assert store.keep(1, other) == 64
    assert store.match(tokens_of(1, 2)).pages == 2


def test_what_a_sequence_has_is_not_cached_under_two_names() -> None:
    pages, store = make()
    pages.write(0, 2)
    store.cache_prefix(0, tokens_of(1, 2))
    before = dump(pages, store)
    with pytest.raises(CacheInputError, match="cached as those of other tokens"):
        store.cache_prefix(0, tokens_of(1, 3))
    assert dump(pages, store) == before


def test_match_that_was_evicted_meanwhile_is_cut() -> None:
    pages, store = make()
    run(pages, store, [1, 2, 3])
    match = store.match(tokens_of(1, 2, 3))
    store.evict(1)
    assert store.attach_prefix(0, match) == 128
    pages.sequences.clear()
    store.leave(0)
    store.evict()
    assert store.attach_prefix(0, match) == 0
    assert 0 not in pages.sequences


# Staying and going ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
def test_capacity_is_kept_to_from_the_tail(policy: str) -> None:
    pages, store = make(policy=policy, capacity_bytes=5 * BLOCK_BYTES + 7)
    run(pages, store, [1, 2, 3, 4])
    run(pages, store, [5, 6, 7])
    assert len(store) == 5
    assert store.used_bytes == 5 * BLOCK_BYTES
    found = [store.match(tokens_of(*prompt)).pages for prompt in ([1, 2, 3, 4], [5, 6, 7])]
    assert sum(found) == 5
    assert sum(pages.held.values()) == 5 * LAYERS * 2


@pytest.mark.parametrize("policy", POLICIES)
def test_pinned_and_running_stay_whatever_comes(policy: str) -> None:
    pages, store = make(policy=policy, capacity_bytes=8 * BLOCK_BYTES)
    pages.write(0, 3)
    pinned = store.cache_prefix(0, tokens_of(1, 2, 3), pin=True)
    store.leave(0)
    del pages.sequences[0]
    run(pages, store, [4, 5])
    store.attach_prefix(1, store.match(tokens_of(4, 5)))
    for number in range(100, 160, 3):
        run(pages, store, [number, number + 1, number + 2], sequence=2)
    assert store.match(tokens_of(1, 2, 3)).pages == 3
    assert store.match(tokens_of(4, 5)).pages == 2
    assert store.evict() == 3 * BLOCK_BYTES
    assert len(store) == 5
    store.release_prefix(pinned)
    store.leave(1)
    assert store.evict() == 5 * BLOCK_BYTES
    with pytest.raises(CacheInputError, match="released before"):
        store.release_prefix(pinned)


@pytest.mark.parametrize("policy", POLICIES)
def test_pinned_prefix_that_does_not_fit_changes_nothing(policy: str) -> None:
    pages, store = make(policy=policy, capacity_bytes=6 * BLOCK_BYTES)
    pages.write(0, 3)
    store.cache_prefix(0, tokens_of(1, 2, 3), pin=True)
    run(pages, store, [1, 2, 7], sequence=1)
    run(pages, store, [8, 9], sequence=1)
    pages.write(1, 5)
    before = dump(pages, store)
    with pytest.raises(CacheFullError, match=f"needs {5 * BLOCK_BYTES} bytes more; {6 * BLOCK_BYTES} of"):
        store.cache_prefix(1, tokens_of(20, 21, 22, 23, 24), pin=True)
    assert dump(pages, store) == before
    prefix = store.cache_prefix(1, tokens_of(20, 21, 22), pin=True)
    assert prefix.tokens == 192
    assert len(store) == 6


def test_prefix_of_a_running_sequence_is_cut_where_room_ends() -> None:
    pages, store = make(capacity_bytes=4 * BLOCK_BYTES)
    pages.write(0, 2)
    store.cache_prefix(0, tokens_of(1, 2), pin=True)
    pages.write(1, 9)
    prefix = store.cache_prefix(1, tokens_of(1, *range(10, 18)))
    assert prefix.tokens == 3 * 64
    assert store.used_bytes == 4 * BLOCK_BYTES
    nothing = store.cache_prefix(2, tokens_of(9)[:63]) if pages.write(2, 0) is None else None
    assert nothing is not None
    assert nothing.tokens == 0
    store.release_prefix(nothing)


def test_reclaim_frees_what_is_missing_or_nothing() -> None:
    pages, store = make()
    run(pages, store, [1, 2, 3])
    pages.write(0, 2, FULL)
    store.keep(0, tokens_of(4, 5))
    del pages.sequences[0]
    before = dump(pages, store)
    assert not store.reclaim({(Side.K, SMALL): 11}, 10**6)  # there are six, and four can be made of a slab of V
    assert dump(pages, store) == before
    assert store.reclaim({(Side.K, SMALL): 2, (Side.V, SMALL): 1}, 10**6)
    assert [store.match(tokens_of(*prompt)).pages for prompt in ([1, 2, 3], [4, 5])] == [2, 2]
    assert store.counters.evictions == {"memory": 1}
    # Pages that a sequence has come free with nobody's help.
    store.attach_prefix(1, store.match(tokens_of(1, 2)))
    store.leave(1)
    before = dump(pages, store)
    assert not store.reclaim({(Side.K, SMALL): 1}, 10**6)
    assert dump(pages, store) == before


def test_reclaim_of_whole_slabs() -> None:
    """Pages of another kind help when they empty a slab, of which pages of the wanted kind can be made."""
    pages, store = make()
    run(pages, store, [1, 2, 3, 4])  # eight pages of K and of V, four to a slab: of each a page of 16 bits can be made
    before = dump(pages, store)
    assert not store.reclaim({(Side.K, FULL): 3, (Side.V, FULL): 2}, 5 * BYTES[FULL])
    assert dump(pages, store) == before
    assert store.reclaim({(Side.K, FULL): 1, (Side.V, FULL): 1}, 2 * BYTES[FULL])
    assert len(store) == 2
    assert store.reclaim({(Side.K, SMALL): 1, (Side.V, FULL): 1}, BYTES[SMALL] + BYTES[FULL])
    assert len(store) == 0


# Exact ends ----------------------------------------------------------------------------------------------------------


def write_with_window(pages: FakePages, sequence: int, count: int) -> None:
    """A sequence whose last page is in 16 bits."""
    pages.write(sequence, count - 1)
    pages.write(sequence, count, FULL)


def test_held_prefix_keeps_its_newest_page_beside_the_quantized_one() -> None:
    pages, store = make(recent_tokens=64)
    write_with_window(pages, 0, 3)
    prefix = store.cache_prefix(0, tokens_of(1, 2, 3))
    exact = pages.sequences[0].copy()
    tail = exact[..., 2].reshape(-1).tolist()
    assert not any(store.follows(entry) for entry in tail)
    assert all(store.follows(entry) for entry in exact[..., :2].reshape(-1).tolist())
    assert not store.follows(12345)
    # The sequence goes on, and its third page is quantized for it alone.
    quantized = pages.new(1)
    pages.sequences[0] = np.concatenate([exact[..., :2], quantized], axis=-1)
    pages.write(0, 4, FULL)
    assert store.keep(0, tokens_of(1, 2, 3, 4)) == 256
    del pages.sequences[0]
    assert store.used_bytes == 3 * BLOCK_BYTES + 2 * LAYERS * 2 * BYTES[FULL]
    match = store.match(tokens_of(1, 2, 3))
    assert match.is_exact
    store.attach_prefix(1, match)
    assert (pages.sequences[1] == exact).all()
    longer = store.match(tokens_of(1, 2, 3, 4))
    assert longer.is_exact
    store.attach_prefix(2, longer)
    assert (pages.sequences[2][..., 2:3] == quantized).all()
    assert not store.match(tokens_of(1, 2)).is_exact
    # Nobody holds it any more: the quantized page is enough.
    store.release_prefix(prefix)
    assert store.used_bytes == 3 * BLOCK_BYTES + LAYERS * 2 * BYTES[FULL]
    assert not store.match(tokens_of(1, 2, 3)).is_exact
    assert not any(store.follows(entry) for entry in tail)
    for sequence in (1, 2):
        store.leave(sequence)
    store.evict()
    assert not +pages.held


def test_followed_pages_are_replaced() -> None:
    pages, store = make(recent_tokens=64)
    write_with_window(pages, 0, 2)
    store.keep(0, tokens_of(1, 2))
    tail = pages.sequences[0][..., 1]
    new = pages.new(1)[..., 0]
    changes = dict(zip(tail.reshape(-1).tolist(), new.reshape(-1).tolist(), strict=True))
    assert all(store.follows(entry) for entry in changes)
    pages.held.subtract(changes.keys())
    pages.held.update(changes.values())
    pages.sequences[0][..., 1] = new
    store.replaced(changes)
    assert store.used_bytes == 2 * BLOCK_BYTES
    del pages.sequences[0]
    store.attach_prefix(1, store.match(tokens_of(1, 2)))
    assert (pages.sequences[1][..., 1] == new).all()
    store.leave(1)
    store.evict()
    assert not +pages.held


def test_sequences_that_change_places() -> None:
    pages, store = make()
    for sequence, number in ((0, 1), (1, 2)):
        pages.write(sequence, 1)
        store.cache_prefix(sequence, tokens_of(number))
    store.move({0: 1, 1: 5})
    assert {sequence: block.tokens for sequence, block in store._standing.items()} == {
        0: tokens_of(2).astype("<i4").tobytes()
    }
    assert [block.users for block in store._blocks.values()] == [0, 1]


# A lower tier --------------------------------------------------------------------------------------------------------


class Shelf:
    """Keeps of evicted blocks what names them, and of pages no more than their number."""

    def __init__(self, pages: FakePages) -> None:
        self.pages = pages
        self.blocks: dict[bytes, int] = {}

    def take(self, blocks: Any, reason: str) -> None:
        assert reason == "capacity"
        for block in blocks:
            assert all(self.pages.held[entry] == 1 for entry in block.pages().tolist())
            self.blocks[block.hash] = block.entries.size

    def release_copied(self) -> Counter[Any]:
        return Counter()


def test_evicted_blocks_go_down_and_come_back() -> None:
    pages, store = make(capacity_bytes=4 * BLOCK_BYTES)
    store.lower = shelf = Shelf(pages)
    run(pages, store, [1, 2, 3, 4])
    run(pages, store, [5, 6, 7])
    match = store.match(tokens_of(1, 2, 3, 4, 9))
    assert match.pages == 1
    found = [one in shelf.blocks for one in match.missing]
    assert found == [True, True, True, False]
    entries = pages.new(3)
    pages.retain(entries)
    longer = store.bring_back(match, tokens_of(2, 3, 4), entries)
    assert (longer.pages, longer.missing) == (4, match.missing[3:])
    assert store.used_bytes == 4 * BLOCK_BYTES
    assert store.attach_prefix(1, longer) == 256
    assert (pages.sequences[1][..., 1:] == entries).all()
    assert +pages.held == Counter(entry for block in store._blocks.values() for entry in block.pages().tolist())


def test_what_interrupts_the_way_down_leaves_a_tree() -> None:
    pages, store = make()
    run(pages, store, [1, 2, 3])
    run(pages, store, [1, 4])

    class Interrupted(Shelf):
        def take(self, blocks: Any, reason: str) -> None:
            raise KeyboardInterrupt

    store.lower = Interrupted(pages)
    for left in (3, 2, 1, 0):
        with pytest.raises(KeyboardInterrupt):
            store.evict(1)
        assert len(store) == left
        assert store.used_bytes == left * BLOCK_BYTES
        assert +pages.held == Counter(entry for block in store._blocks.values() for entry in block.pages().tolist())
        below = Counter(block.parent for block in store._blocks.values())
        assert all(block.children == below[block] for block in store._blocks.values())
    assert store.evict() == 0


def test_a_priority_that_is_none_holds_nothing() -> None:
    pages, store = make(policy="priority")
    run(pages, store, [1, 2])
    pages.write(0, 3)
    before = dump(pages, store)
    with pytest.raises(CacheInputError, match="priority is 'high'; an integer is wanted"):
        store.cache_prefix(0, tokens_of(1, 2, 3), priority="high")  # type: ignore[arg-type]
    assert dump(pages, store) == before


def test_bringing_back_what_others_brought_or_what_has_no_room() -> None:
    pages, store = make(capacity_bytes=4 * BLOCK_BYTES)
    match = store.match(tokens_of(1, 2, 3))
    run(pages, store, [1, 2])  # meanwhile
    entries = pages.new(3)
    pages.retain(entries)
    with pytest.raises(CacheInputError, match="not those missing"):
        store.bring_back(match, tokens_of(1, 3, 2), entries)
    longer = store.bring_back(match, tokens_of(1, 2, 3), entries)
    assert longer.pages == 3
    assert [pages.held[entry] for entry in entries[0, 0].tolist()] == [0, 0, 1]
    pages.write(0, 3)
    store.cache_prefix(0, tokens_of(20, 21, 22), pin=True)
    match = store.match(tokens_of(1, 2, 3))
    assert match.pages == 1
    entries = pages.new(2)
    pages.retain(entries)
    assert store.bring_back(match, tokens_of(2, 3), entries).missing == match.missing
    assert not any(pages.held[entry] for entry in entries.reshape(-1).tolist())
    # What the match stands on is gone.
    store.evict()
    entries = pages.new(2)
    pages.retain(entries)
    assert store.bring_back(match, tokens_of(2, 3), entries) is match
    assert store.attach_prefix(9, match) == 0
    assert not any(pages.held[entry] for entry in entries.reshape(-1).tolist())


# Against a model -----------------------------------------------------------------------------------------------------

PROMPTS = st.lists(st.integers(0, 2), min_size=1, max_size=5)
CAPACITY = 7


class StoreMachine(RuleBasedStateMachine):
    """A store of each policy against a dictionary: {pages of a prefix: (entries, last use)}.

    With lru the model says what goes; with the others it asks that what went was a leaf that could go.
    """

    @initialize(policy=st.sampled_from(list(POLICIES)))
    def begin(self, policy: str) -> None:
        self.time = 0.0
        self.pages = FakePages()
        self.store = PrefixStore(
            self.pages, ROOT, capacity_bytes=CAPACITY * BLOCK_BYTES, policy=policy, clock=lambda: self.time
        )
        self.policy = policy
        self.cached: dict[tuple[int, ...], list[int]] = {}
        self.used: dict[tuple[int, ...], int] = {}
        self.running: dict[int, tuple[tuple[int, ...], tuple[int, ...]]] = {}  # its pages, and where it stands
        self.held: list[tuple[Prefix, tuple[int, ...], bool]] = []
        self.uses = 0
        self.next_sequence = 0

    def touch(self, path: tuple[int, ...], first: int = 0) -> None:
        self.uses += 1
        for end in range(first + 1, len(path) + 1):
            self.used[path[:end]] = self.uses

    def must_stay(self, path: tuple[int, ...]) -> bool:
        ends = [standing for _, standing in self.running.values()] + [end for _, end, pin in self.held if pin]
        return any(end[: len(path)] == path for end in ends)

    def leaves(self) -> list[tuple[int, ...]]:
        inner = {path[:-1] for path in self.cached}
        return [path for path in self.cached if path not in inner and not self.must_stay(path)]

    def follow(self) -> None:
        """The model drops what the store has dropped, which must be leaves, one after another."""
        names = {block_path(block) for block in self.store._blocks.values()}
        gone = set(self.cached) - names
        assert names <= set(self.cached)
        while gone:
            leaves = set(self.leaves()) & gone
            assert leaves, "what could not go has gone"
            if self.policy == "lru":
                oldest = min(self.leaves(), key=lambda path: self.used[path])
                assert self.used[oldest] == min(self.used[path] for path in leaves)
            for path in list(leaves)[:1] if self.policy != "lru" else [min(leaves, key=lambda p: self.used[p])]:
                del self.cached[path]
                gone.discard(path)

    @rule(prompt=PROMPTS)
    def start(self, prompt: list[int]) -> None:
        path = tuple(prompt)
        found = 0
        while found < len(path) and path[: found + 1] in self.cached:
            found += 1
        self.time += 1
        match = self.store.match(tokens_of(*prompt))
        assert match.pages == found
        sequence = self.next_sequence
        self.next_sequence += 1
        assert self.store.attach_prefix(sequence, match) == found * 64
        if found:
            self.touch(path[:found])
            expected = np.array([self.cached[path[: end + 1]] for end in range(found)])
            assert (expected == self.pages.sequences[sequence].reshape(LAYERS * 2, -1).T).all()
        self.pages.write(sequence, len(path))
        self.running[sequence] = path, path[:found]

    def cache(self, sequence: int, how: str) -> Any:
        path, standing = self.running[sequence]
        self.time += 1
        entries = self.pages.sequences[sequence].reshape(LAYERS * 2, -1).T.tolist()
        known = 0
        while known < len(path) and path[: known + 1] in self.cached:
            known += 1
        missing = len(path) - known
        if how == "pin":
            stays = {one for one in self.cached if self.must_stay(one)} | {path[:end] for end in range(1, known + 1)}
            inner = [one for one in self.cached if any(two[: len(one)] == one for two in stays)]
            if len(inner) + missing > CAPACITY:
                before = dump(self.pages, self.store)
                with pytest.raises(CacheFullError):
                    self.store.cache_prefix(sequence, tokens_of(*path), pin=True)
                assert dump(self.pages, self.store) == before
                return None
        result = (
            self.store.keep(sequence, tokens_of(*path))
            if how == "keep"
            else self.store.cache_prefix(sequence, tokens_of(*path), pin=how == "pin")
        )
        self.touch(path, len(standing))
        for end in range(known, len(path)):
            self.cached[path[: end + 1]] = entries[end]
        return result

    @precondition(lambda self: self.running)
    @rule(data=st.data(), pin=st.booleans())
    def hold(self, data: Any, pin: bool) -> None:
        sequence = data.draw(st.sampled_from(sorted(self.running)))
        prefix = self.cache(sequence, "pin" if pin else "hold")
        if prefix is None:
            return
        path, _ = self.running[sequence]
        stands = path[: prefix.tokens // 64]
        if pin:
            assert stands == path
        for end in range(len(path), len(stands), -1):
            # What did not fit: nothing else could go then.
            self.cached.pop(path[:end], None)
        self.running[sequence] = path, stands
        self.held.append((prefix, stands, pin))
        self.follow()

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def end(self, data: Any) -> None:
        sequence = data.draw(st.sampled_from(sorted(self.running)))
        self.cache(sequence, "keep")
        del self.running[sequence], self.pages.sequences[sequence]
        self.follow()

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: Any) -> None:
        prefix, *_ = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.store.release_prefix(prefix)

    @rule(blocks=st.integers(1, 3))
    def evict(self, blocks: int) -> None:
        before = len(self.cached)
        self.store.evict(blocks * BLOCK_BYTES)
        self.follow()
        assert before - len(self.cached) == blocks or not self.leaves()

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "store"):
            return
        assert {
            block_path(block): block.entries.reshape(-1).tolist() for block in self.store._blocks.values()
        } == self.cached
        assert self.store.used_bytes == len(self.cached) * BLOCK_BYTES <= CAPACITY * BLOCK_BYTES
        assert +self.pages.held == Counter(entry for entries in self.cached.values() for entry in entries)
        assert {block for queue in self.store.policy.queues for block in queue._place} == {
            block for block in self.store._blocks.values() if block.can_go
        }
        assert {block_path(block) for block in self.store._blocks.values() if block.can_go} == set(self.leaves())


def block_path(block: Block) -> tuple[int, ...]:
    path: list[int] = []
    at: Block | None = block
    while at is not None and at.parent is not None:
        path.append(int(np.frombuffer(at.tokens, "<i4")[0]) // 64)
        at = at.parent
    return tuple(reversed(path))


TestStore = StoreMachine.TestCase
TestStore.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
