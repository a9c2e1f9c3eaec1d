"""Which cached block goes first: policies over the leaves of a :class:`~kvpack.runtime.kv.prefix_store.PrefixStore`.

A block is worth nothing without all those before it, so only leaves go, whatever the policy: a prefix is given up
from its tail, and there is never a hole in it. A leaf that is pinned, or that a running sequence stands on, is not
offered at all, which keeps everything before it too. A policy therefore only orders leaves. It keeps them in one or
several queues, and looks at the heads::

    lru           the one not used for longest
    lfu           the one used least often, older before younger; use counts age, or what was popular once would stay
    priority      by priority first: named prefixes and what several sessions share, before all else; then as lru
    hybrid        least recently and least often used in one number: each use counts half as much every half_life_s
    adaptive      ARC: leaves used once, and more often, in two queues; what comes back soon after it was evicted says
                  which of the two is too short
    conversation  the one least likely to come back soon, by what conversations of its kind have done so far

Which is best for what: docs/KV-MANAGER.md.
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar

from kvpack.errors import CacheInputError

if TYPE_CHECKING:
    from kvpack.runtime.kv.prefix_store import Block

Rank = tuple[float, ...]


class LeafQueue:
    """Leaves, the least rank first; of equal ranks, the one that came first. A leaf's rank stays while it is here."""

    def __init__(self) -> None:
        self._heap: list[tuple[Rank, int, Block]] = []
        self._place: dict[Block, int] = {}  # number of the entry that counts; others of the heap are stale
        self._pushed = 0

    def __len__(self) -> int:
        return len(self._place)

    def push(self, block: Block, rank: Rank) -> None:
        self._pushed += 1
        self._place[block] = self._pushed
        heapq.heappush(self._heap, (rank, self._pushed, block))
        if len(self._heap) > 2 * len(self._place) + 64:
            self._heap = [entry for entry in self._heap if self._place.get(entry[2]) == entry[1]]
            heapq.heapify(self._heap)

    def discard(self, block: Block) -> bool:
        """Whether it was here."""
        return self._place.pop(block, None) is not None

    def head(self) -> Block | None:
        while self._heap:
            _, number, block = self._heap[0]
            if self._place.get(block) == number:
                return block
            heapq.heappop(self._heap)
        return None


class EvictionPolicy:
    """Orders leaves. The store says what happens; times are seconds of its clock.

    A policy with one queue has :meth:`rank` alone. Others say with :meth:`queue_of` where a leaf belongs and choose
    among the heads in :meth:`head`.
    """

    name: ClassVar[str]
    queue_count: ClassVar[int] = 1

    def __init__(self) -> None:
        self.queues = [LeafQueue() for _ in range(self.queue_count)]

    def rank(self, block: Block) -> Rank:
        """Least goes first. It is asked when the block becomes a leaf, and whenever it is offered again."""
        raise NotImplementedError

    def queue_of(self, block: Block) -> int:
        return 0

    def head(self, now_s: float) -> Block | None:
        """The next to go; it stays."""
        return self.queues[0].head()

    def came(self, block: Block, now_s: float) -> None:
        """A block is cached: for the first time, or anew after it was evicted."""

    def used(self, block: Block, now_s: float) -> None:
        """A block is found again. ``block.last_use_s`` still says when it was used before."""

    def gone(self, block: Block, now_s: float) -> None:
        """A block is evicted."""

    def left(self, block: Block) -> None:
        """A block's session has gone on at another branch, before the block."""

    def offer(self, block: Block) -> None:
        """A block can be evicted now."""
        self.queues[self.queue_of(block)].push(block, self.rank(block))

    def withdraw(self, block: Block) -> None:
        """A block can no longer be evicted."""
        for queue in self.queues:
            if queue.discard(block):
                return


class Lru(EvictionPolicy):
    """The one not used for longest."""

    name = "lru"

    def rank(self, block: Block) -> Rank:
        return (block.last_use,)


class Lfu(EvictionPolicy):
    """The one used least often; a use count begins where the last evicted one ended (LFU with dynamic aging)."""

    name = "lfu"

    def __init__(self) -> None:
        super().__init__()
        self._age = 0.0

    def came(self, block: Block, now_s: float) -> None:
        block.score = self._age + 1

    def used(self, block: Block, now_s: float) -> None:
        block.score = max(block.score, self._age) + 1

    def gone(self, block: Block, now_s: float) -> None:
        self._age = max(self._age, block.score)

    def rank(self, block: Block) -> Rank:
        return (block.score, block.last_use)


class Priority(EvictionPolicy):
    """By priority, then what several sessions share, then the one not used for longest."""

    name = "priority"

    def rank(self, block: Block) -> Rank:
        return (block.priority, block.is_shared, block.last_use)


class Hybrid(EvictionPolicy):
    """Recency and frequency in one number (LRFU): the sum over uses of ½^(age / half-life).

    Args:
        half_life_s: seconds; towards 0 this is lru, towards infinity lfu.
    """

    name = "hybrid"

    def __init__(self, half_life_s: float = 30.0) -> None:
        super().__init__()
        if not half_life_s > 0:
            raise CacheInputError(f"half_life_s is {half_life_s!r}; seconds, more than 0, are wanted")
        self._half_life_s = half_life_s

    def came(self, block: Block, now_s: float) -> None:
        block.score = now_s / self._half_life_s

    def used(self, block: Block, now_s: float) -> None:
        # All sums shrink alike, so log2(sum) + now / half-life stays as it is between uses, and so does the order.
        now = now_s / self._half_life_s
        block.score = now + math.log2(1 + 2.0 ** (block.score - now))

    def rank(self, block: Block) -> Rank:
        return (block.score, block.last_use)


class Adaptive(EvictionPolicy):
    """ARC over leaves: blocks used once, and those used more often, each least recently used first.

    The first kind may have ``target`` blocks. A block that comes anew soon after it was evicted says that its kind
    had too
    few: the target follows. Of each kind, as many evicted blocks are remembered as there are cached ones.
    """

    name = "adaptive"
    queue_count = 2

    def __init__(self) -> None:
        super().__init__()
        self._counts = [0, 0]  # of cached blocks
        self._ghosts: tuple[OrderedDict[bytes, None], OrderedDict[bytes, None]] = (OrderedDict(), OrderedDict())
        self.target = 0.0

    def came(self, block: Block, now_s: float) -> None:
        once, often = self._ghosts
        kind = 0
        if block.hash in once:
            self.target = min(float(sum(self._counts) + 1), self.target + max(1.0, len(often) / len(once)))
            del once[block.hash]
            kind = 1
        elif block.hash in often:
            self.target = max(0.0, self.target - max(1.0, len(once) / len(often)))
            del often[block.hash]
            kind = 1
        block.kind = kind
        self._counts[kind] += 1

    def used(self, block: Block, now_s: float) -> None:
        if block.kind == 0:
            block.kind = 1
            self._counts[0] -= 1
            self._counts[1] += 1

    def gone(self, block: Block, now_s: float) -> None:
        self._counts[block.kind] -= 1
        ghosts = self._ghosts[block.kind]
        ghosts[block.hash] = None
        while len(ghosts) > sum(self._counts) + 1:
            ghosts.popitem(last=False)

    def queue_of(self, block: Block) -> int:
        return block.kind

    def rank(self, block: Block) -> Rank:
        return (block.last_use,)

    def head(self, now_s: float) -> Block | None:
        first = 0 if self._counts[0] > self.target else 1
        return self.queues[first].head() or self.queues[1 - first].head()


class Conversation(EvictionPolicy):
    """The leaf least likely to be used soon, judged by what became of leaves of its kind that were idle as long.

    A kind is: of which turn of its conversation a block is (1, 2, 3, 4 and later), or shared by several sessions, or
    left behind by its session, which went on at another branch. For each kind a life table over octaves of idle time
    is kept: how many blocks came through, and how many were used again in it. Counts of old fade.
    """

    name = "conversation"
    _TURNS, _OCTAVES, _FADE_AFTER, _LEARN_AFTER = 4, 24, 200_000, 1000
    _SHARED, _LEFT = 0, _TURNS + 1
    queue_count = _TURNS + 2

    def __init__(self) -> None:
        super().__init__()
        # How idle times ended, by kind and octave: in a use, or in an eviction.
        self._used = [[0.0] * self._OCTAVES for _ in range(self.queue_count)]
        self._gone = [[0.0] * self._OCTAVES for _ in range(self.queue_count)]
        self._ended = 0
        self._worths: list[list[float]] = []
        self._worths_at = 0
        # Evicted blocks: kind and last use.
        self._ghosts: OrderedDict[bytes, tuple[int, float]] = OrderedDict()
        self._cached = 0

    def came(self, block: Block, now_s: float) -> None:
        self._cached += 1
        if (ghost := self._ghosts.pop(block.hash, None)) is not None:
            kind, last_use_s = ghost
            octave = self._octave(now_s - last_use_s)
            self._used[kind][octave] += 1
        block.kind = self._kind(block)

    def used(self, block: Block, now_s: float) -> None:
        self._used[block.kind][self._octave(now_s - block.last_use_s)] += 1
        self._count()
        block.kind = self._kind(block)

    def gone(self, block: Block, now_s: float) -> None:
        self._cached -= 1
        self._gone[block.kind][self._octave(now_s - block.last_use_s)] += 1
        self._count()
        self._ghosts[block.hash] = (block.kind, block.last_use_s)
        while len(self._ghosts) > self._cached + 1:
            self._ghosts.popitem(last=False)

    def left(self, block: Block) -> None:
        if block.kind != self._LEFT:
            queue = self.queues[block.kind]
            block.kind = self._LEFT
            if queue.discard(block):
                self.offer(block)

    def _count(self) -> None:
        self._ended += 1
        if self._ended % self._FADE_AFTER == 0:
            for table in (self._used, self._gone):
                table[:] = [[count / 2 for count in row] for row in table]

    @staticmethod
    def _octave(idle_s: float) -> int:
        return min(Conversation._OCTAVES - 1, max(0, math.frexp(idle_s * 4)[1])) if idle_s > 0 else 0

    def _kind(self, block: Block) -> int:
        if block.is_shared:
            return self._SHARED
        return min(block.turn, self._TURNS)

    def _worth(self, kind: int, idle_s: float) -> float:
        """Uses to expect of a block that has been idle so long, for each second that it is kept."""
        if self._ended - self._worths_at > min(self._LEARN_AFTER, self._worths_at // 4) or not self._worths:
            self._worths_at = self._ended
            self._worths = [self._life_table(k) for k in range(self.queue_count)]
        return self._worths[kind][self._octave(idle_s)]

    def _life_table(self, kind: int) -> list[float]:
        """By octave: the most uses a second if a block is kept from there on, as long as it is worth it (its Gittins
        index). What comes at once alone would not do: nobody asks again within the first second."""
        seconds, through = [0.0] * self._OCTAVES, 0.0
        for octave in reversed(range(self._OCTAVES)):
            ended = self._used[kind][octave] + self._gone[kind][octave]
            # Who ends in an octave was there for half of it. One block stands for what is not known.
            seconds[octave] = (through + ended / 2 + 1) * 2.0 ** (octave - 3)
            through += ended
        worths = []
        for first in range(self._OCTAVES):
            uses, kept_s, best = 0.0, 0.0, 0.0
            for octave in range(first, self._OCTAVES):
                uses += self._used[kind][octave]
                kept_s += seconds[octave]
                best = max(best, uses / kept_s)
            worths.append(best)
        return worths

    def queue_of(self, block: Block) -> int:
        return block.kind

    def rank(self, block: Block) -> Rank:
        return (block.last_use,)

    def head(self, now_s: float) -> Block | None:
        best, least = None, (math.inf, 0)
        for kind, queue in enumerate(self.queues):
            if (block := queue.head()) is not None:
                worth = self._worth(kind, now_s - block.last_use_s), block.last_use
                if worth < least:
                    best, least = block, worth
        return best


POLICIES: Mapping[str, type[EvictionPolicy]] = MappingProxyType(
    {policy.name: policy for policy in (Lru, Lfu, Priority, Hybrid, Adaptive, Conversation)}
)

# It finds most at nearly all capacities (docs/results/prefix-cache.md).
DEFAULT_POLICY = Conversation.name


def policy_of(policy: str | EvictionPolicy) -> EvictionPolicy:
    """One of :data:`POLICIES` by name, or the one that is given.

    Raises:
        CacheInputError: there is none of that name.
    """
    if isinstance(policy, EvictionPolicy):
        return policy
    if policy not in POLICIES:
        raise CacheInputError(f"eviction policy is {policy!r}; there are {', '.join(POLICIES)}")
    return POLICIES[policy]()
