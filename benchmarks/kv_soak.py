"""A KV cache in use for a long time: does its memory stay the same?

    python benchmarks/kv_soak.py --operations 1000000 --threads 8 --json benchmarks/results/DATE-kv-soak.json
    python benchmarks/kv_soak.py --manager adaptive --operations 1000000 --threads 8

Threads take turns (a cache has no lock of its own) to append, fork, cut, put in order, free, copy, hold, release, adopt
and load sequences at random, under a limit of bytes that is met often. Every thousand operations of a thread the pages
in use are counted anew from the page table and from what is held; in the end all is given back. Memory is measured at
each tenth of the operations: all that grows with use has grown at the first. Resident memory has what the allocator
keeps free as well, and that grows a little whenever more is in use at one moment than ever before; what is in use is
counted apart.

With ``--manager`` they are operations of a ``KVManager`` of this policy, with room for far fewer prefixes than are
asked for, in the cache and in host memory behind it: requests start, go on by a token, fork, are cut, put in order and
finished, under the names of sessions and tenants; prefixes are held, some pinned, attached, released and evicted. Each
time that pages are counted, values of sequences are compared with what their tokens say.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import random
import resource
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_common import device_record, provenance, write_result

from kvpack import CacheFullError, KVCache, PageFormat
from kvpack.format.pages import Side
from kvpack.runtime.kv.eviction import POLICIES
from kvpack.runtime.kv.manager import KVManager
from kvpack.runtime.kv.page_pools import PagePools
from kvpack.runtime.kv.page_table import Ints
from kvpack.runtime.kv.prefix_store import Prefix

SEQUENCES, MAX_TOKENS, MOST_HELD = 8, 64 * 12, 12
WEIGHTS = {
    "append": 50,
    "fork": 10,
    "truncate": 8,
    "select": 4,
    "free": 8,
    "copy": 0.3,
    "retain": 7,
    "release": 6,
    "adopt": 5,
    "load": 3,
}
# Decoding comes most often, as it does where models run; what ends sequences balances what begins them.
MANAGER_WEIGHTS = {
    "start": 22,
    "decode": 40,
    "finish": 24,
    "fork": 4,
    "crop": 4,
    "hold": 4,
    "release": 4,
    "attach": 3,
    "reorder": 0.5,
    "evict": 0.02,
}


class Soak:
    """One cache, what is held of it, and operations at random."""

    def __init__(self, device: str, seed: int) -> None:
        page_bytes = PagePools(1, 16, "cpu", max_bytes=0).page_bytes
        self.cache = KVCache(
            1,
            1,
            16,
            MAX_TOKENS,
            max_sequences=SEQUENCES,
            device=device,
            formats=PageFormat.INT4,
            max_bytes=90 * sum(page_bytes(side, PageFormat.FP16) for side in (0, 1)),  # type: ignore[arg-type]
            slab_bytes=1,
        )
        self.random = random.Random(seed)
        self.held: list[Ints] = []
        self.counts: Counter[str] = Counter()
        self.full = 0
        self.tokens = torch.randn(SEQUENCES, 1, 200, 16).half().to(self.cache.device)
        self.lock = threading.Lock()

    def step(self) -> None:
        """One operation, as one of the threads."""
        with self.lock:
            (name,) = self.random.choices(list(WEIGHTS), list(WEIGHTS.values()))
            try:
                getattr(self, name)()
            except CacheFullError:
                self.full += 1
            self.counts[name] += 1

    def a_sequence(self) -> int:
        return self.random.randrange(SEQUENCES)

    def append(self) -> None:
        rows = self.random.sample(range(SEQUENCES), self.random.choice([1, 1, 2, 4]))
        count = self.random.choice([1, 1, 1, 17, 64, 200])
        self.cache.append(0, *[self.tokens[: len(rows), :, :count]] * 2, rows)

    def fork(self) -> None:
        source, target = self.random.sample(range(SEQUENCES), 2)
        if self.random.random() < 0.8:
            self.cache.free(target)
        self.cache.fork(source, target if self.cache.length(0, target) == 0 else None)

    def truncate(self) -> None:
        sequence = self.a_sequence()
        self.cache.truncate(sequence, self.random.randint(0, self.cache.length(0, sequence)))

    def select(self) -> None:
        self.cache.select_sequences(self.random.choices(range(SEQUENCES), k=self.random.randint(4, SEQUENCES)))

    def free(self) -> None:
        self.cache.free(self.a_sequence())

    def copy(self) -> None:
        copied, sequence = self.cache.copy(), self.a_sequence()
        assert torch.equal(copied.read(0, sequence)[0], self.cache.read(0, sequence)[0])

    def retain(self) -> None:
        sequence = self.a_sequence()
        if len(self.held) < MOST_HELD:
            entries = self.cache.page_entries(sequence, 0, self.cache.length(0, sequence) // 64)
            self.cache.retain(entries)
            self.held.append(entries)

    def release(self) -> None:
        if self.held:
            self.cache.release(self.held.pop(self.random.randrange(len(self.held))))

    def adopt(self) -> None:
        sequence = self.a_sequence()
        if self.held:
            entries = self.random.choice(self.held)
            self.cache.free(sequence)
            self.cache.adopt(sequence, entries, 64 * entries.shape[2])

    def load(self) -> None:
        source, target = self.random.sample(range(SEQUENCES), 2)
        self.cache.free(target)
        tokens = self.cache.length(0, source)
        old = self.cache.entries[:, :, source, : -(-tokens // 64)].copy()
        made = self.cache.new_pages((old & 15).astype(np.uint8))
        for page, block in zip(self.cache.read_pages(made), self.cache.read_pages(old), strict=True):
            page.copy_(block)
        self.cache.adopt(target, made, tokens)
        self.cache.release(made)

    def give_back(self) -> None:
        """Nothing is in use."""
        for sequence in range(SEQUENCES):
            self.cache.free(sequence)
        while self.held:
            self.release()

    def found(self) -> dict[str, Any]:
        """What else came of it."""
        return {}

    def check(self) -> None:
        """Pages in use are those of the table and those that are held, and each counts its references."""
        pools = self.cache.pools
        in_table = set(self.cache.entries[self.cache.entries >= 0].tolist())
        held = Counter(entry for entries in self.held for entry in entries.reshape(-1).tolist())
        for entry in in_table | held.keys():
            info = pools.info(entry)
            assert (info.references, info.held) == ((entry in in_table) + held[entry], held[entry])
        assert pools.bytes_in_use == sum(pools.bytes_of(entry) for entry in in_table | held.keys())
        assert self.cache.held_bytes == sum(pools.bytes_of(entry) for entry in held.keys() - in_table)
        self.cache.check()


def resident_bytes() -> int:
    """Of this process, now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


class ManagerSoak:
    """A manager and what its callers do, at random; each thread has the sequences to itself that it works at.

    Prompts are one of six beginnings, one of 40 middles and one of three ends. Values are what their token says, and a
    little more: so a sequence that got pages of other tokens is found out.
    """

    prefix_bytes, host_bytes = 180_000, 60_000

    def __init__(self, policy: str, device: str, seed: int) -> None:
        page_bytes = PagePools(1, 16, "cpu", max_bytes=0).page_bytes(Side.K, PageFormat.FP16)
        self.cache = KVCache(
            1,
            1,
            16,
            MAX_TOKENS,
            max_sequences=2 * SEQUENCES,
            device=device,
            formats=PageFormat.INT4,
            max_bytes=120 * page_bytes,
            slab_bytes=1,
        )
        self.manager = KVManager(
            self.cache, model="soak", prefix_bytes=self.prefix_bytes, host_bytes=self.host_bytes, policy=policy
        )
        self.random = random.Random(seed)
        self.idle: list[int] = []  # started, and no thread works at them
        self.busy = 0
        self.held: list[Prefix] = []
        self.compared_tokens = 0
        self.counts: Counter[str] = Counter()
        self.full = 0
        self.noise = (torch.rand(1, 1, MAX_TOKENS, 16) * 0.1).half().to(self.cache.device)
        self.lock = self.manager.lock

    def step(self) -> None:
        """One operation, as one of the threads."""
        with self.lock:
            (name,) = self.random.choices(list(MANAGER_WEIGHTS), list(MANAGER_WEIGHTS.values()))
            mine = []
            if name in ("decode", "finish", "fork", "crop", "hold"):
                if self.idle:
                    mine.append(self.idle.pop(self.random.randrange(len(self.idle))))
                else:
                    name = "start"
            self.counts[name] += 1
            self.busy += 1
        try:
            mine = getattr(self, name)(*mine)
        except CacheFullError:
            with self.lock:
                self.full += 1
        finally:
            with self.lock:
                self.busy -= 1
                self.idle += mine

    def choose(self, *arguments: int) -> int:
        with self.lock:
            return self.random.randrange(*arguments)

    def prompt(self) -> list[int]:
        parts = (
            (self.choose(6), 130),
            (self.choose(40), (20, 64, 130)[self.choose(3)]),
            (self.choose(3), self.choose(1, 70)),
        )
        return [token for token, count in parts for _ in range(count)]

    def compute(self, sequence: int, tokens: list[int]) -> None:
        """Keys and values of these tokens."""
        with self.lock:
            ids = torch.tensor(tokens, device=self.cache.device).half()[:, None]
            new = self.noise[:, :, : len(tokens)] + ids / 4
            self.cache.append(0, new, new, [sequence])

    def start(self) -> list[int]:
        prompt = self.prompt()
        session = f"new {self.choose(10**9)}" if self.choose(2) else f"known {self.choose(20)}"
        salt = "tenant" if self.choose(10) == 0 else ""
        started = self.manager.start(prompt, session=session, salt=salt)
        try:
            self.compute(started.sequence, prompt[started.tokens :])
        except CacheFullError:
            self.manager.finish(started.sequence, keep=bool(self.choose(2)))
            raise
        return [started.sequence]

    def decode(self, sequence: int) -> list[int]:
        token = self.choose(40)
        with suppress(CacheFullError):
            self.compute(sequence, [token])
            self.manager.append_tokens([sequence], [token])
        return [sequence]

    def finish(self, sequence: int) -> list[int]:
        self.manager.finish(sequence, keep=self.choose(20) > 0, priority=self.choose(3))
        return []

    def fork(self, sequence: int) -> list[int]:
        made = [sequence]
        with suppress(CacheFullError):
            made.append(self.manager.fork(sequence))
        return made

    def crop(self, sequence: int) -> list[int]:
        with suppress(CacheFullError):
            self.manager.crop(sequence, self.choose(self.cache.length(0, sequence) + 1))
        return [sequence]

    def hold(self, sequence: int) -> list[int]:
        with self.lock, suppress(CacheFullError):
            if len(self.held) < MOST_HELD:
                self.held.append(self.manager.cache_prefix(sequence, pin=self.random.random() < 0.3))
        return [sequence]

    def release(self) -> list[int]:
        with self.lock:
            prefix = self.held.pop(self.choose(len(self.held))) if self.held else None
        if prefix is not None:
            self.manager.release_prefix(prefix)
        return []

    def attach(self) -> list[int]:
        return [self.manager.attach_prefix(self.manager.match(self.prompt())).sequence]

    def reorder(self) -> list[int]:
        """As a beam search does; while another thread works at a sequence, nothing."""
        with self.lock:
            if self.busy == 1 and self.idle:
                rows = self.random.choices(self.idle, k=self.random.randint(1, len(self.idle)))
                self.manager.reorder(rows)
                self.idle = list(range(len(rows)))
        return []

    def evict(self) -> list[int]:
        self.manager.store.evict()
        return []

    def found(self) -> dict[str, Any]:
        """What else came of it."""
        metrics = self.manager.metrics()
        assert metrics.tiers is not None
        return {
            "policy": self.manager.store.policy.name,
            "hit_rate": round(metrics.hit_rate, 4),
            "evictions": metrics.evictions,
            "pages_from_host_memory": metrics.tiers.host_hit_pages,
            "compared_tokens": self.compared_tokens,
        }

    def check(self) -> None:
        """What prefixes take is within their limit, or running sequences stand on it; and sequences have the values of
        their tokens."""
        self.cache.check()
        metrics = self.manager.metrics()
        assert metrics.prefix_bytes <= self.prefix_bytes or metrics.running_sequences
        assert metrics.running_sequences >= len(self.idle)
        for sequence in self.idle:
            tokens = self.manager.tokens(sequence)
            values = self.cache.read(0, sequence, torch.float32)[1][0].mean(1)
            assert len(values) == len(tokens)
            self.compared_tokens += len(tokens)
            assert (values - torch.tensor(tokens, device=values.device) / 4 - 0.05).abs().lt(0.1).all()

    def give_back(self) -> None:
        """Nothing runs, and all prefixes go."""
        for sequence in self.idle:
            self.manager.finish(sequence, keep=False)
        for prefix in self.held:
            self.manager.release_prefix(prefix)
        self.manager.store.evict()


class _Mallinfo2(ctypes.Structure):
    """What glibc's mallinfo2() returns: ten counts, of which the fifth are bytes mapped one by one, the eighth bytes in
    use of all else."""

    _fields_ = [(f"count_{number}", ctypes.c_size_t) for number in range(1, 11)]


def heap_bytes_in_use() -> int | None:
    """What has been taken of the C library's heap and not given back, of all threads; None without glibc 2.33."""
    try:
        mallinfo2 = ctypes.CDLL(None).mallinfo2
    except AttributeError:
        return None
    mallinfo2.restype = _Mallinfo2
    found = mallinfo2()
    return int(found.count_5 + found.count_8)


def soak(
    operations: int,
    threads: int,
    *,
    policy: str | None = None,
    device: str = "cpu",
    seed: int = 0,
    every: int = 1000,
    is_shown: bool = False,
) -> dict[str, Any]:
    """So many operations, shared by threads, and what has become of the memory.

    Args:
        policy: of a manager, whose operations they are; None: of a cache.
        every: so often in each thread all is checked.
    """
    state = Soak(device, seed) if policy is None else ManagerSoak(policy, device, seed)
    failures: list[BaseException] = []
    begin = threading.Barrier(threads)

    def work(count: int) -> None:
        try:
            begin.wait()
            for number in range(count):
                state.step()
                if number % every == every - 1:
                    with state.lock:
                        state.check()
        except BaseException as error:
            failures.append(error)
            raise

    def run(count: int) -> None:
        running = [threading.Thread(target=work, args=(count // threads,)) for _ in range(threads)]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
        if failures:
            raise failures[0]

    start, resident, allocated, heap, blocks = time.perf_counter(), [], [], [], []
    for tenth in range(1, 11):
        run(operations // 10)
        resident.append(resident_bytes())
        allocated.append(state.cache.pools.bytes_allocated)
        gc.collect()
        heap.append(heap_bytes_in_use())
        blocks.append(sys.getallocatedblocks())
        if is_shown:
            spent = time.perf_counter() - start
            done = sum(state.counts.values())
            in_use = "" if heap[-1] is None else f", {heap[-1] / 1e6:.3f} MB of the heap in use"
            print(
                f"{tenth}/10: {done} operations in {spent:.0f} s, {resident[-1] / 1e6:.1f} MB resident{in_use}, "
                f"{blocks[-1]} Python blocks",
                flush=True,
            )
    spent = time.perf_counter() - start
    state.check()
    state.give_back()
    assert state.cache.pools.bytes_in_use == 0
    return {
        "operations": sum(state.counts.values()),
        "threads": threads,
        "seconds": round(spent, 1),
        "operations_per_second": round(sum(state.counts.values()) / spent),
        "by_name": dict(state.counts),
        "refused": state.full,
        **state.found(),
        "resident_bytes_by_tenth": resident,
        "heap_bytes_in_use_by_tenth": heap,
        "python_blocks_by_tenth": blocks,
        "allocated_bytes_by_tenth": allocated,
        "in_use_bytes_when_all_is_freed": state.cache.pools.bytes_in_use,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operations", type=int, default=1_000_000)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--manager", metavar="POLICY", choices=sorted(POLICIES), help="operations of a KVManager")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = soak(
        arguments.operations,
        arguments.threads,
        policy=arguments.manager,
        device=arguments.device,
        seed=arguments.seed,
        is_shown=True,
    )
    print(
        f"{found['operations']} operations by {found['threads']} threads in {found['seconds']} s: "
        f"{found['operations_per_second']} a second, {found['refused']} refused (CacheFullError); resident "
        f"{found['resident_bytes_by_tenth'][0] / 1e6:.1f} MB at a tenth, "
        f"{found['resident_bytes_by_tenth'][-1] / 1e6:.1f} at the end"
    )
    if arguments.json is not None:
        device = device_record(torch.device(arguments.device))
        write_result(arguments.json, {**provenance({}, ("torch",)), "device": device, **found})


if __name__ == "__main__":
    main()
