"""How much of multi-turn prompts each eviction policy finds again, beside an oracle that knows what comes.

    python benchmarks/prefix_workload.py --json benchmarks/results/DATE-prefix-workload.json --plot hits.png

The prompts are synthesised: sessions of a chat service come at random (Poisson), each begins with one of some system
prompts (Zipf), and has turns of a question and an answer. Some turns call tools, several times in a row, each of which
is a request of its own a few seconds later; some questions are asked anew from an earlier turn, which makes a branch;
some sessions return after a long pause. Lengths and pauses are lognormal. A request's prompt is all of its
conversation so far; its pages, answer included, are cached when it ends. No model runs, no tensors are made: stores
hold pages that are nothing but numbers.

Hit rate: pages of prompts that were found, of all full pages of prompts. Capacities are in percent of the distinct
pages of the whole workload. The oracle (Belady) drops, among the leaves, new ones included, the page whose next use is
farthest: no policy can find more.

Host times are those of :class:`kvpack.runtime.kv.manager.KVManager` over a cache of 28 layers whose tokens are not
written: page tables, free lists and the tree alone, in one thread. 64 sequences share a system prompt and are out of
step with each other, so that pages leave the recent window all the time.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from bench_common import provenance, write_result

from kvpack.runtime.kv.eviction import POLICIES, EvictionPolicy
from kvpack.runtime.kv.prefix_hash import page_hashes, root_hash
from kvpack.runtime.kv.prefix_store import PrefixStore

PAGE_TOKENS = 64
CAPACITIES_PERCENT = (10, 20, 30, 40, 60, 80)
ROOT = root_hash({"workload": "synthesised"})


@dataclass(frozen=True)
class Request:
    """A prompt and what was answered.

    Attributes:
        at_s: when it came.
        session: whose it is.
        tokens: i32, the whole conversation with the answer.
        prompt_tokens: how many of them are the prompt.
    """

    at_s: float
    session: str
    tokens: np.ndarray
    prompt_tokens: int


@dataclass(frozen=True)
class Workload:
    """What a service is asked. Lengths and pauses: median and sigma of a lognormal.

    Attributes:
        sessions, sessions_per_s: how many there are, and how often one begins.
        system_prompts, zipf, system_tokens: how many, how unequal, and how long.
        single_share, turns: how many sessions ask one question, and the mean number of questions of others (geometric).
        question_tokens, answer_tokens, tool_tokens: lengths.
        tool_share, tool_calls: how many turns call tools, and the mean number of calls (geometric).
        branch_share: how many questions are asked anew from an earlier turn.
        think_s, tool_s, pause_s, pause_share: between answer and question, for a tool, and of those who return later.
    """

    sessions: int = 400
    sessions_per_s: float = 0.25
    system_prompts: int = 40
    zipf: float = 1.1
    system_tokens: tuple[float, float] = (1500, 0.6)
    single_share: float = 0.4
    turns: float = 6
    question_tokens: tuple[float, float] = (120, 1.0)
    answer_tokens: tuple[float, float] = (250, 0.7)
    tool_tokens: tuple[float, float] = (400, 0.9)
    tool_share: float = 0.3
    tool_calls: float = 2.5
    branch_share: float = 0.1
    think_s: tuple[float, float] = (40, 1.0)
    tool_s: tuple[float, float] = (3, 0.8)
    pause_s: tuple[float, float] = (1800, 0.8)
    pause_share: float = 0.08

    def requests(self, seed: int) -> list[Request]:
        """In order of time."""
        rng = np.random.default_rng(seed)
        vocabulary = 32_000

        def tokens(length: tuple[float, float]) -> np.ndarray:
            count = max(1, int(rng.lognormal(np.log(length[0]), length[1])))
            return rng.integers(0, vocabulary, min(count, 16_384), dtype=np.int32)

        systems = [tokens(self.system_tokens) for _ in range(self.system_prompts)]
        popularity = np.arange(1, self.system_prompts + 1) ** -self.zipf
        popularity /= popularity.sum()
        found = []
        begin_s = 0.0
        for number in range(self.sessions):
            begin_s += rng.exponential(1 / self.sessions_per_s)
            at_s, session = begin_s, f"session {number}"
            conversation = systems[rng.choice(self.system_prompts, p=popularity)]
            ends = [len(conversation)]  # of turns, in the conversation
            turns = 1 if rng.random() < self.single_share else 1 + int(rng.geometric(1 / (self.turns - 1)))
            for turn in range(turns):
                if turn:
                    pause = self.pause_s if rng.random() < self.pause_share else self.think_s
                    at_s += rng.lognormal(np.log(pause[0]), pause[1])
                    if rng.random() < self.branch_share:
                        del ends[int(rng.integers(1, len(ends))) :]
                        conversation = conversation[: ends[-1]]
                calls = int(rng.geometric(1 / self.tool_calls)) if rng.random() < self.tool_share else 0
                asked = tokens(self.question_tokens)
                for _ in range(calls + 1):
                    prompt = np.concatenate([conversation, asked])
                    conversation = np.concatenate([prompt, tokens(self.answer_tokens)])
                    found.append(Request(at_s, session, conversation, len(prompt)))
                    at_s += rng.lognormal(np.log(self.tool_s[0]), self.tool_s[1])
                    asked = tokens(self.tool_tokens)
                ends.append(len(conversation))
        return sorted(found, key=lambda request: request.at_s)


class NumberedPages:
    """Pages that are nothing but numbers, one a block, of one byte each. A sequence is 0: the request that runs."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._entries = np.empty((1, 1, 0), np.int64)

    def begin(self) -> None:
        self._entries = self._entries[..., :0]

    def page_entries(self, sequence: int, first: int, end: int) -> np.ndarray:
        missing = end - self._entries.shape[-1]
        new = np.fromiter(itertools.islice(self._numbers, max(0, missing)), np.int64).reshape(1, 1, -1)
        self._entries = np.concatenate([self._entries, new], axis=-1)
        return self._entries[..., first:end].copy()

    def retain(self, entries: np.ndarray) -> None:
        pass

    def release(self, entries: np.ndarray) -> int:
        return entries.size

    def adopt(self, sequence: int, entries: np.ndarray, tokens: int, importance: object) -> None:
        self._entries = entries

    def importance_of(self, sequence: int) -> None:
        pass

    def page_bytes(self, entries: np.ndarray) -> np.ndarray:
        return np.ones_like(entries)

    def is_full(self, entries: np.ndarray) -> np.ndarray:
        return np.zeros(entries.shape, np.bool_)

    def is_only_held(self, entry: int) -> bool:
        return True

    def kind(self, entry: int) -> Any:
        raise NotImplementedError

    def kind_bytes(self, kind: Any) -> int:
        raise NotImplementedError

    def slab(self, entry: int) -> tuple[int, int, int]:
        raise NotImplementedError


def run_policy(requests: list[Request], policy: str | EvictionPolicy, capacity_pages: int) -> dict[str, Any]:
    """Hits and evictions of one policy."""
    now_s = 0.0
    pages = NumberedPages()
    store = PrefixStore(pages, ROOT, capacity_bytes=capacity_pages, policy=policy, clock=lambda: now_s)
    start = time.perf_counter()
    for request in requests:
        now_s = request.at_s
        pages.begin()
        match = store.match(request.tokens[: request.prompt_tokens])
        store.attach_prefix(0, match, session=request.session)
        store.keep(0, request.tokens, session=request.session)
    counters = store.counters
    return {
        "hit_rate": counters.hit_pages / counters.queried_pages,
        "hit_pages": counters.hit_pages,
        "evictions": sum(counters.evictions.values()),
        "thrashed_pages": counters.thrashed_pages,
        "us_per_request": (time.perf_counter() - start) / len(requests) * 1e6,
    }


@dataclass(order=True)
class _Cached:
    rank: tuple[int, int]  # farthest next use first; of equal ones, the deepest
    page: bytes = field(compare=False)


def run_oracle(hashes: list[tuple[list[bytes], int]], capacity_pages: int) -> dict[str, Any]:
    """Belady's choice: pages of each request and how many are the prompt's. Written without the store, as a check of
    it.

    A page's next use is never before that of the page in front of it, so what is dropped is always a leaf.
    """
    never = len(hashes)
    uses: dict[bytes, list[int]] = {}
    for number, (pages, prompt_pages) in enumerate(hashes):
        for page in pages[:prompt_pages]:
            uses.setdefault(page, []).append(number)
    for at in uses.values():
        at.reverse()
    cached: dict[bytes, tuple[int, int]] = {}
    heap: list[_Cached] = []
    hit_pages = evictions = asked = 0
    for number, (pages, prompt_pages) in enumerate(hashes):
        asked += prompt_pages
        for page in pages[:prompt_pages]:
            if page not in cached:
                break
            hit_pages += 1
        for depth, page in enumerate(pages):
            at = uses.get(page, [])
            while at and at[-1] <= number:
                at.pop()
            rank = (-(at[-1] if at else never), -depth)
            if cached.get(page) != rank:
                cached[page] = rank
                heapq.heappush(heap, _Cached(rank, page))
        while len(cached) > capacity_pages:
            first = heapq.heappop(heap)
            if cached.get(first.page) == first.rank:
                del cached[first.page]
                evictions += 1
    return {"hit_rate": hit_pages / asked, "hit_pages": hit_pages, "evictions": evictions}


def hashed(requests: list[Request]) -> list[tuple[list[bytes], int]]:
    return [
        ([page.tobytes() for page in page_hashes(ROOT, request.tokens)], request.prompt_tokens // PAGE_TOKENS)
        for request in requests
    ]


def measure(workload: Workload, seeds: int, policies: list[str]) -> dict[str, Any]:
    """Means over workloads of several seeds."""
    rows: dict[tuple[str, int], list[dict[str, Any]]] = {}
    about: list[dict[str, Any]] = []
    for seed in range(seeds):
        requests = workload.requests(seed)
        hashes = hashed(requests)
        distinct = len({page for pages, _ in hashes for page in pages})
        asked = sum(pages for _, pages in hashes)
        seen: set[bytes] = set()
        first = 0
        for pages, prompt_pages in hashes:
            first += sum(page not in seen for page in pages[:prompt_pages])
            seen.update(pages)
        about.append(
            {
                "requests": len(requests),
                "prompt_pages": asked,
                "distinct_pages": distinct,
                "hours": requests[-1].at_s / 3600,
                "most_hits": 1 - first / asked,
            }
        )
        for percent in CAPACITIES_PERCENT:
            capacity = distinct * percent // 100
            rows.setdefault(("oracle", percent), []).append(run_oracle(hashes, capacity))
            for policy in policies:
                rows.setdefault((policy, percent), []).append(run_policy(requests, policy, capacity))
    mean = [
        {"policy": name, "capacity_percent": percent}
        | {key: float(np.mean([row[key] for row in found])) for key in found[0]}
        for (name, percent), found in rows.items()
    ]
    return {"workloads": about, "rows": mean}


def host_times(sequences: int = 64, prompt_tokens: int = 4096, layers: int = 28, steps: int = 64) -> dict[str, Any]:
    """Microseconds of the host, medians: of a step of decoding a sequence, and of a request's start and finish."""
    import torch

    from kvpack import KVCache, PageFormat
    from kvpack.runtime.kv import cache as cache_module
    from kvpack.runtime.kv.manager import KVManager

    def nothing(*_: Any, **__: Any) -> None:
        pass

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    kept = cache_module.write_tokens, cache_module.quantize_pages
    cache_module.write_tokens = cache_module.quantize_pages = nothing  # type: ignore[assignment]
    try:
        options: dict[str, Any] = {"max_sequences": sequences + 1, "device": "cpu", "formats": PageFormat.INT4}
        room = prompt_tokens + 64 + steps + 64
        prompt = list(range(prompt_tokens))
        some = torch.zeros(1, 1, prompt_tokens, 16, dtype=torch.float16)
        one = torch.zeros(sequences, 1, 1, 16, dtype=torch.float16)

        def step_us(cache: KVCache, rows: list[int], manager: KVManager | None) -> tuple[float, float]:
            """A sequence's part of the time of all layers' appends, and of the manager's bookkeeping."""
            for number, row in enumerate(rows):  # out of step
                ahead = some[:, :, : 1 + number % 64]
                for layer in range(layers):
                    cache.append(layer, ahead, ahead, [row])
                if manager is not None:
                    manager.append_tokens([row] * ahead.shape[2], [0] * ahead.shape[2])
            appending, bookkeeping = [], []
            for step in range(steps):
                start = time.perf_counter()
                for layer in range(layers):
                    cache.append(layer, one, one, rows)
                appended = time.perf_counter()
                if manager is not None:
                    manager.append_tokens(rows, [step] * len(rows))
                appending.append((appended - start) / len(rows) * 1e6)
                bookkeeping.append((time.perf_counter() - appended) / len(rows) * 1e6)
            return float(np.median(appending)), float(np.median(bookkeeping))

        alone = KVCache(layers, 1, 16, room, **options)
        for row in range(sequences):
            for layer in range(layers):
                alone.append(layer, some, some, [row])
        alone_us, _ = step_us(alone, list(range(sequences)), None)
        manager = KVManager(KVCache(layers, 1, 16, room, **options), "numbers")
        first = manager.start(prompt)
        for layer in range(layers):
            manager.cache.append(layer, some, some, [first.sequence])
        manager.cache_prefix(first.sequence, pin=True)
        manager.finish(first.sequence)
        starts, finishes, rows = [], [], []
        for number in range(sequences):
            start = time.perf_counter()
            rows.append(manager.start([*prompt, number]).sequence)
            starts.append((time.perf_counter() - start) * 1e6)
        shared_us, bookkeeping_us = step_us(manager.cache, rows, manager)
        for row in rows:
            start = time.perf_counter()
            manager.finish(row)
            finishes.append((time.perf_counter() - start) * 1e6)
    finally:
        cache_module.write_tokens, cache_module.quantize_pages = kept
        torch.set_num_threads(threads)
    return {
        "sequences": sequences,
        "prompt_tokens": prompt_tokens,
        "layers": layers,
        "append_alone_us": alone_us,
        "append_shared_us": shared_us,
        "append_tokens_us": bookkeeping_us,
        "start_us": float(np.median(starts)),
        "finish_us": float(np.median(finishes)),
    }


def plot(result: dict[str, Any], path: Path) -> None:
    """Hit rates over capacities."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys(row["policy"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["policy"] == name]
        style = {"color": "black", "linestyle": "--"} if name == "oracle" else {"marker": "o", "markersize": 3}
        axes.plot(
            [row["capacity_percent"] for row in rows], [100 * row["hit_rate"] for row in rows], label=name, **style
        )
    axes.set_xlabel("capacity, % of all distinct pages")
    axes.set_ylabel("pages of prompts found, %")
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, default=Workload.sessions)
    parser.add_argument("--seeds", type=int, default=2, help="workloads; figures are means over them")
    parser.add_argument("--policies", nargs="+", choices=list(POLICIES), default=list(POLICIES))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    workload = Workload(sessions=arguments.sessions)
    result = provenance({}) | {"benchmark": "prefix-workload", "workload": asdict(workload), "seeds": arguments.seeds}
    result |= measure(workload, arguments.seeds, arguments.policies)
    result["host"] = host_times()
    print(result["host"])
    for row in result["rows"]:
        print(f"{row['policy']:>13} {row['capacity_percent']:>3} %: {100 * row['hit_rate']:.2f} % found")
    if arguments.json:
        write_result(arguments.json, result)
    if arguments.plot:
        plot(result, arguments.plot)


if __name__ == "__main__":
    main()
