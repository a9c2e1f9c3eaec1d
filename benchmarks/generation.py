"""Generation end to end: memory, prefill and decoding of models in bf16, coded by kvpack, and in 4 bits by others.

    python benchmarks/generation.py --json benchmarks/results/DATE-generation.json --books "$KVPACK_BOOKS_MODEL"
    python benchmarks/generation.py --quick --time-limit 120
    python benchmarks/generation.py --models tiny --device cpu          # tries out the script

Models are those of transformers: books-27m by its path, and the shapes of Llama-3.1-8B and Qwen3-0.6B with random
weights, of which memory and speed are known but no quality. Of the shapes, one linear layer of each size is coded, and
the others hold copies of it at addresses of their own. The head, embeddings and norms stay in bf16 in all of them.

A cache is filled with random keys and values, so that long contexts need no prefill; prefill is measured by itself, of
one sequence. Decoding is timed step by step through :class:`kvpack.integrations.transformers.decode_graph.DecodeGraph`:
one CUDA graph a token for kvpack's pages and for transformers' StaticCache. To that ``static`` attends as transformers
does, by SDPA with a mask. ``flash`` is SDPA without a mask to exactly the context, which lets it use its fastest
kernel: the best that bf16 can have, with a length that the graph fixes. QuantizedCache (``hqq``, ``quanto``) and
DynamicCache cannot be captured and run without a graph. Ways that are compared run in turns, and medians are taken.
What does not work is a row with its error. The result is written after each part.

The ways are named WEIGHTS/CACHE: ``4.25:fast/int4`` is a rate and layout of kvpack's with INT4 pages, ``bf16/static``
is dense with a StaticCache.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bench_common import device_record, environment_path, print_table, provenance, synchronize, write_result
from generation_models import DTYPE, SHAPES, SmallLayersCompiled, built, dense_model
from torch import nn

from kvpack.bench.report import finite
from kvpack.bench.run import BenchRun
from kvpack.bench.timing import copy_bandwidth, synchronize_or_stop

SECTIONS = ("copy", "weights", "decode", "prefill", "profile")
PACKAGES = ("torch", "transformers", "cupy-cuda13x", "cupy-cuda12x", "triton", "bitsandbytes", "torchao", "hqq")
PACKAGES += ("optimum-quanto",)
PAGES: dict[str, dict[str, Any]] = {
    "16-bit": {},
    "int8": {"formats": "INT8"},
    "int4": {"formats": "INT4"},
    "budget-0.3": {"budget": 0.3},
}
STATIC = ("static", "flash")
FLASH = "sdpa_without_mask"
FILL_TOKENS = 2048
MOST_INT4_TOKENS = 4096
STEPS, ROUNDS, EAGER_STEPS = 16, 5, 4
PLANNED_STEPS = 70  # in which each sequence fills a page
MARGIN_TOKENS = 512  # behind a context, for all steps that are timed
STATIC_MARGIN_TOKENS = 64  # which goes back to the context in each round
SHARED_FROM_BYTES = 6e9  # caches of more are used by all ways in turn
FIRST = ("bf16/static", "bf16/flash", "4.25:fast/int4", "4.25:balanced/int4")


@dataclass(frozen=True)
class Case:
    """Sequences of so many tokens, and the ways to decode them."""

    batch: int
    context: int
    ways: tuple[str, ...] = FIRST


@dataclass(frozen=True)
class Plan:
    """What is measured of a model. ``weights`` beyond those of the cases are built for prefill alone."""

    cases: tuple[Case, ...]
    prefill: tuple[int, ...]
    fused: bool = False


_FOUR_BITS = ("bnb-nf4/flash", "torchao-int4/flash", "tinygemm-int4/flash")
_PAGES = ("bf16/16-bit", "4.25:fast/16-bit", "4.25:fast/int8", "4.25:fast/budget-0.3")
_EAGER = ("bf16/dynamic", "4.25:fast/dynamic", "bf16/hqq", "bf16/quanto")
PLANS = {
    "llama-3.1-8b": Plan(
        (
            Case(1, 512, (*FIRST, "4.85:fast/int4", *_PAGES, *_FOUR_BITS, *_EAGER)),
            Case(1, 4096, (*FIRST, "4.85:fast/int4", "4.25:fast/budget-0.3", *_FOUR_BITS, *_EAGER[2:])),
            Case(8, 512, (*FIRST, *_FOUR_BITS)),
            Case(32, 512, (*FIRST, "4.85:fast/int4", *_FOUR_BITS)),
            Case(1, 32768, (*FIRST, *_PAGES, *_FOUR_BITS)),
            Case(8, 4096, (*FIRST, *_PAGES, *_FOUR_BITS)),
            Case(32, 4096, (*FIRST, "bf16/int4", "4.25:fast/int8")),
            Case(8, 32768, (*FIRST, "bf16/16-bit")),
            Case(32, 32768),
        ),
        (512, 4096, 32768),
        fused=True,
    ),
    "qwen3-0.6b": Plan(
        (Case(1, 512), Case(32, 512), Case(1, 4096), Case(1, 32768), Case(32, 4096)), (512, 4096), fused=True
    ),
    "books-27m": Plan((Case(1, 512, (*FIRST, "bf16/dynamic")), Case(32, 512)), (512,)),
    "tiny": Plan(
        (
            Case(1, 100, (*FIRST, *_PAGES, *_FOUR_BITS, *_EAGER)),
            Case(3, 200, (*FIRST, "4.25:fast/budget-0.3")),
        ),
        (100,),
    ),
}
QUICK = Plan((Case(1, 512, (*FIRST, *_FOUR_BITS)), Case(8, 512, FIRST)), (512,), fused=True)
QUICK_LAYERS = 4


class Decoder:
    """One way of decoding, ready to step. ``rewind`` is called before each round."""

    is_graph = False

    def __init__(self, step: Callable[[], object], memory: Callable[[], dict[str, int]]) -> None:
        self.step, self.memory = step, memory
        self.rewind: Callable[[], object] = lambda: None
        self.plan: Callable[[], object] | None = None


def register_flash() -> None:
    """SDPA to the first tokens of a cache, as many as ``attend.tokens`` says: without a mask it is at its fastest."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(FLASH, attend)
    AttentionMaskInterface.register(FLASH, lambda *_, **__: None)


def attend(
    module: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: None, scaling: float, **_: Any
) -> tuple[torch.Tensor, None]:
    """For transformers: [batch, tokens, heads, head_dim]."""
    few = slice(attend.tokens)  # type: ignore[attr-defined]
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k[:, :, few], v[:, :, few], scale=scaling, enable_gqa=True
    )
    return out.transpose(1, 2).contiguous(), None


def random_states(config: Any, batch: int, tokens: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [batch, KV heads, tokens, head_dim]."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = (2, batch, config.num_key_value_heads, tokens, head_dim)
    k, v = torch.randn(shape, dtype=DTYPE, device=device)
    return k, v


def cache_bytes_of_16_bits(config: Any, case: Case) -> int:
    k, _ = random_states(config, 1, 1, torch.device("meta"))
    return 2 * 2 * k.numel() * config.num_hidden_layers * case.batch * (case.context + MARGIN_TOKENS)


def filled_pages(model: nn.Module, pages: str, case: Case, device: torch.device) -> Any:
    """A KVPackCache of random tokens."""
    from kvpack import KVPackCache

    config = model.config
    cache = KVPackCache(config, max_sequences=case.batch, **PAGES[pages])
    k, v = random_states(config, case.batch, min(FILL_TOKENS, case.context), device)
    cache.early_initialization(case.batch, k.shape[1], k.shape[3], DTYPE, device)
    for first in range(0, case.context, FILL_TOKENS):
        few = slice(min(FILL_TOKENS, case.context - first))
        for layer in cache.layers:
            cache.kv.append(layer.index, k[:, :, few], v[:, :, few], range(case.batch))
            layer.columns = first + few.stop
    return cache


def filled_cache(model: nn.Module, kind: str, case: Case, device: torch.device) -> Any:
    """A cache of transformers, of random tokens."""
    from transformers import DynamicCache, QuantizedCache, StaticCache

    config = model.config
    if kind in STATIC:
        cache = StaticCache(config, max_cache_len=case.context + STATIC_MARGIN_TOKENS)
    elif kind == "dynamic":
        cache = DynamicCache(config=config)
    else:
        cache = QuantizedCache(kind, config, nbits=4)
    k, v = random_states(config, case.batch, case.context, device)
    for layer in range(config.num_hidden_layers):
        cache.update(k, v, layer)
    return cache


def tensor_bytes(cache: Any) -> int:
    """All tensors that the layers of a cache of transformers hold, those within others' quantized tensors included."""
    seen: dict[int, int] = {}

    def look(value: Any, depth: int) -> None:
        if isinstance(value, torch.Tensor):
            names = getattr(value, "__tensor_flatten__", None)
            if names is not None and type(value) is not torch.Tensor:
                for name in names()[0]:
                    look(getattr(value, name), depth)
            else:
                seen[value.data_ptr()] = value.nbytes
        elif depth and isinstance(value, dict):
            for item in value.values():
                look(item, depth - 1)
        elif depth and isinstance(value, list | tuple):
            for item in value:
                look(item, depth - 1)

    for layer in cache.layers:
        look(vars(layer), 4)
    return sum(seen.values())


class GenerationBench(BenchRun):
    """One run over several models."""

    def __init__(self, report: dict[str, Any], options: argparse.Namespace) -> None:
        self.options, self.device = options, torch.device(options.device)
        path = options.json

        def publish(found: dict[str, Any]) -> None:
            if path is not None:
                write_result(path, found, quiet=True)

        def say(stage: str) -> None:
            print(f"{time.monotonic() - self.began:6.1f} s  {stage}", file=sys.stderr, flush=True)

        super().__init__(report, options.time_limit, publish, say)
        self.on_gpu = self.device.type == "cuda"
        self.models: dict[str, nn.Module] = {}

    def run(self) -> None:
        with self._running():
            if self.on_gpu:
                with self._stage("copy"):
                    self.report["copy"] = [copy_bandwidth(1 << 32)]
                self._empty()
            for name in self.options.models.split(","):
                self._model(name)

    def _empty(self) -> None:
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()

    @contextmanager
    def _tried(self, section: str, row: dict[str, Any]) -> Iterator[None]:
        """Around a measurement: its row, with its error if it fails. What ends the device ends the run."""
        try:
            yield
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0][:300]}"
            print(f"          {' '.join(str(v) for v in list(row.values())[:5])}: {row['error']}", file=sys.stderr)
            if self.on_gpu:
                synchronize_or_stop()
        self.report[section].append(row)

    def _model(self, name: str) -> None:
        options = self.options
        directory = options.books if name == "books-27m" else None
        if name == "books-27m" and directory is None:
            print("books-27m needs --books", file=sys.stderr)
            return
        plan = QUICK if options.quick and name in SHAPES and name != "tiny" else PLANS[name]
        layers = options.layers or (QUICK_LAYERS if options.quick and name == "llama-3.1-8b" else None)
        self.models, self.alike, self.name = {}, directory is None, name
        with self._stage(f"{name}: build"):
            dense = dense_model(name, directory, layers, self.device)
        self.layers = dense.config.num_hidden_layers
        self.first_case = plan.cases[0]
        ways = list(dict.fromkeys(way for case in plan.cases for way in case.ways))
        if options.ways:
            ways = [way for way in ways if way in options.ways.split(",")]
        for weights in dict.fromkeys(way.partition("/")[0] for way in ways):
            with self._stage(f"{name}: {weights}"):
                row: dict[str, Any] = {"model": name, "layers": self.layers, "weights": weights, "error": None}
                with self._tried("weights", row):
                    self.models[weights], found = built(dense, weights, alike=self.alike)
                    row |= found
                self._empty()
        del dense
        # The first two cases are what most are about; prefill comes before the long ones.
        for number, case in enumerate(plan.cases):
            with self._stage(f"{name}: {case.batch} × {case.context}"):
                self._case(case, [way for way in case.ways if way in ways])
            if number == 1 or number == len(plan.cases) - 1 == 0:
                self._prefills(plan)
            if number == 0 and plan.fused and self.on_gpu:
                with self._stage(f"{name}: small layers compiled"):
                    self._case(case, [way for way in FIRST[1:3] if way in ways], fused=True)
        self.models = {}
        self._empty()

    # --- decoding ------------------------------------------------------------

    def _case(self, case: Case, ways: list[str], *, fused: bool = False) -> None:
        self._empty()  # caches of the case before are in cycles
        rows, decoders = [], []
        shared: dict[str, Any] = {}
        is_large = 2 * cache_bytes_of_16_bits(next(iter(self.models.values())).config, case) > SHARED_FROM_BYTES
        around = SmallLayersCompiled(list(self.models.values())) if fused else contextlib.nullcontext()
        with around:
            for way in ways:
                weights, _, kind = way.partition("/")
                if weights not in self.models:
                    continue
                model = self.models[weights]
                row: dict[str, Any] = {"model": self.name, "layers": self.layers, "weights": weights, "cache": kind}
                row |= {"batch": case.batch, "context": case.context, "small_layers_compiled": fused, "error": None}
                with self._tried("decode", row):
                    self._require_memory(model.config, kind, case, shared)
                    before = self._allocated()
                    name = STATIC[0] if kind in STATIC else kind
                    if name not in shared or not is_large:
                        make = filled_pages if kind in PAGES else filled_cache
                        shared[name] = make(model, kind, case, self.device)
                    self._empty()
                    held = self._allocated()
                    decoder = self._decoder(model, kind, case, shared[name])
                    row["graph"] = decoder.is_graph
                    row |= decoder.memory()
                    if self.on_gpu:
                        row["cache_measured_bytes"] = held - before
                        row["peak_beyond_bytes"] = torch.cuda.max_memory_allocated() - held
                    rows.append(row)
                    decoders.append(decoder)
            self._time(rows, decoders, case)
            if not fused:
                self._profile(rows, decoders, case)
        decoders.clear()
        shared.clear()
        self._empty()

    def _allocated(self) -> int:
        if not self.on_gpu:
            return 0
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    def _require_memory(self, config: Any, kind: str, case: Case, shared: dict[str, Any]) -> None:
        size = cache_bytes_of_16_bits(config, case) * {"int8": 0.56, "int4": 0.32, "budget-0.3": 0.45}.get(kind, 1.0)
        if self.on_gpu and (STATIC[0] if kind in STATIC else kind) not in shared:
            free, _ = torch.cuda.mem_get_info()
            free += torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
            if size > 0.92 * free:
                raise MemoryError(f"{size / 1e9:.0f} GB are needed for the cache, {free / 1e9:.0f} GB are free")

    def _decoder(self, model: nn.Module, kind: str, case: Case, cache: Any) -> Decoder:
        """Ready to be timed: compiled, captured, all sizes known."""
        from kvpack.integrations.transformers.decode_graph import DecodeGraph

        is_pages = kind in PAGES
        attention = "kvpack" if is_pages else FLASH if kind == "flash" else "sdpa"
        attend.tokens = case.context + 1  # type: ignore[attr-defined]
        model.set_attn_implementation(attention)
        tokens = torch.arange(case.batch, device=self.device) % 100 + 5
        positions = torch.full_like(tokens, case.context)
        if not is_pages and kind not in STATIC:
            return self._eager(model, cache, tokens[:, None], case)
        graph = DecodeGraph(model, cache, max_tokens=case.context + MARGIN_TOKENS)
        graph.start(tokens, positions)
        for _ in range(3):
            graph.step()
        if not graph.logits.isfinite().all():
            raise ArithmeticError("logits are not finite")

        def restart() -> None:
            model.set_attn_implementation(attention)  # of what runs without a graph
            graph.start(tokens, positions)

        if not is_pages:
            decoder = Decoder(graph.step, lambda: {"cache_bytes": tensor_bytes(cache)})
            layers = cache.layers

            def rewind() -> None:
                for layer in layers:
                    layer.cumulative_length.fill_(case.context)
                restart()

            decoder.rewind = rewind
        else:
            if kind.startswith("budget"):
                graph.reallocate()

            def memory() -> dict[str, int]:
                return {"cache_bytes": int(1e6 * cache.memory_mb()), "page_bytes": cache.kv.pools.bytes_in_use}

            decoder = Decoder(graph.step, memory)
            decoder.rewind = restart
            decoder.plan = cache.plan_step
        decoder.is_graph = graph.is_captured
        return decoder

    def _eager(self, model: nn.Module, cache: Any, tokens: torch.Tensor, case: Case) -> Decoder:
        from kvpack.integrations.transformers.cache import cache_keyword

        name = cache_keyword(model)
        ids = tokens

        @torch.no_grad()
        def step() -> None:
            nonlocal ids
            ids = model(input_ids=ids, use_cache=True, **{name: cache}).logits[:, -1:].argmax(-1)

        step()
        decoder = Decoder(step, lambda: {"cache_bytes": tensor_bytes(cache)})
        decoder.rewind = lambda: model.set_attn_implementation("sdpa")
        return decoder

    def _time(self, rows: list[dict[str, Any]], decoders: list[Decoder], case: Case) -> None:
        seconds: list[list[float]] = [[] for _ in decoders]
        hosts: list[list[float]] = [[] for _ in decoders]
        rounds = 2 if self.options.quick or not self.on_gpu else ROUNDS
        for number in range(rounds):
            order = range(len(decoders))
            for index in order if number % 2 == 0 else reversed(order):
                decoder = decoders[index]
                steps = STEPS if decoder.is_graph else EAGER_STEPS
                try:
                    decoder.rewind()
                    decoder.step()
                    synchronize(self.device)
                    began = time.perf_counter()
                    for _ in range(steps):
                        decoder.step()
                    hosts[index].append((time.perf_counter() - began) / steps)
                    synchronize(self.device)
                    seconds[index].append((time.perf_counter() - began) / steps)
                except Exception as error:
                    rows[index]["error"] = f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"
                    if self.on_gpu:
                        synchronize_or_stop()
        for row, found, host in zip(rows, seconds, hosts, strict=True):
            if found:
                median = statistics.median(found)
                row["step_ms"], row["spread"] = 1e3 * median, (max(found) - min(found)) / median
                # Pages are quantized every 64 steps, which a median may not see.
                row["mean_step_ms"] = 1e3 * statistics.mean(found)
                row["tokens_per_s"] = case.batch / median
                row["enqueue_ms"] = 1e3 * statistics.median(host)
                how = "" if row["graph"] else "  without a graph"
                how += "  small layers compiled" if row["small_layers_compiled"] else ""
                line = f"          {row['weights']:>14} {row['cache']:<10} {row['step_ms']:8.3f} ms{how}"
                print(line, file=sys.stderr, flush=True)

    def _profile(self, rows: list[dict[str, Any]], decoders: list[Decoder], case: Case) -> None:
        """Kernels of one step, of the first three ways in the first context; and what the host does beforehand."""
        for row, decoder in list(zip(rows, decoders, strict=True)):
            way = f"{row['weights']}/{row['cache']}"
            if decoder.plan is not None and decoder.is_graph:
                steps = PLANNED_STEPS if case is self.first_case else 8
                planned = self._planned_us(decoder, steps)
                row["plan_us"], row["plan_most_us"] = statistics.median(planned), max(planned)
            if not self.on_gpu or not decoder.is_graph or case.context != 512 or way not in FIRST:
                continue
            profile: dict[str, Any] = {key: row[key] for key in ("model", "weights", "cache", "batch", "context")}
            profile["error"] = None
            with self._tried("profile", profile):
                profile |= kernels_of(decoder.step, self.device)

    def _planned_us(self, decoder: Decoder, steps: int) -> list[float]:
        """What the host takes before each of so many replays."""
        found: list[float] = []
        plan = decoder.plan
        assert plan is not None

        def timed() -> None:
            began = time.perf_counter()
            plan()
            found.append(1e6 * (time.perf_counter() - began))

        owner = plan.__self__  # type: ignore[attr-defined]
        owner.plan_step = timed
        try:
            for _ in range(steps):
                decoder.step()
        finally:
            del owner.plan_step
        return found

    # --- prefill -------------------------------------------------------------

    def _prefills(self, plan: Plan) -> None:
        for context in plan.prefill:
            with self._stage(f"{self.name}: prefill {context}"):
                for weights, model in self.models.items():
                    is_kvpack = ":" in weights
                    row: dict[str, Any] = {"model": self.name, "layers": self.layers, "weights": weights}
                    row |= {"context": context, "cache": "int4" if is_kvpack else "dynamic", "error": None}
                    with self._tried("prefill", row):
                        if "int4" in weights and context > MOST_INT4_TOKENS:
                            raise NotImplementedError(
                                "left out: torch's INT4 product is for few vectors, and takes long"
                            )
                        row |= self._prefill(model, context, is_kvpack=is_kvpack)
                    self._empty()

    def _prefill(self, model: nn.Module, context: int, *, is_kvpack: bool) -> dict[str, Any]:

        from transformers import DynamicCache

        from kvpack import KVPackCache
        from kvpack.integrations.transformers.cache import cache_keyword

        name = cache_keyword(model)
        model.set_attn_implementation("kvpack" if is_kvpack else "sdpa")
        ids = torch.arange(context, device=self.device)[None] % 97 + 3
        found, peak = [], 0
        for number in range(3 if context < FILL_TOKENS * 8 else 2):
            cache = KVPackCache(model.config, formats="INT4") if is_kvpack else DynamicCache(config=model.config)
            held = self._allocated()
            synchronize(self.device)
            began = time.perf_counter()
            with torch.no_grad():
                out = model(input_ids=ids, use_cache=True, logits_to_keep=1, **{name: cache})
            synchronize(self.device)
            if number:  # the first compiles
                found.append(time.perf_counter() - began)
            if self.on_gpu:
                peak = torch.cuda.max_memory_allocated() - held
            if not out.logits.isfinite().all():
                raise ArithmeticError("logits are not finite")
            del cache, out
        seconds = statistics.median(found)
        return {"seconds": seconds, "tokens_per_s": context / seconds, "peak_beyond_bytes": peak}


def kernels_of(step: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """Kernels of a step: how many, how long, by name; and the step's own time, gaps included."""
    steps = 3
    step()
    synchronize(device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            step()
        synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    counts: Counter[str] = Counter()
    times: Counter[str] = Counter()
    spans = []
    for event in events:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            counts[event["name"][:80]] += 1
            times[event["name"][:80]] += event["dur"]
            spans.append((event["ts"], event["ts"] + event["dur"]))
    if not spans:
        raise RuntimeError("the profiler has seen no kernels")
    whole = max(end for _, end in spans) - min(start for start, _ in spans)
    by_name = [
        {"name": name, "launches": counts[name] / steps, "us": time_us / steps}
        for name, time_us in times.most_common(24)
    ]
    return {
        "launches": sum(counts.values()) / steps,
        "kernels_us": sum(times.values()) / steps,
        "step_us": whole / steps,
        "kernels": by_name,
    }


def show(report: dict[str, Any]) -> None:
    """Everything as tables on stdout."""

    def number(row: dict[str, Any], key: str, digits: int, unit: float = 1) -> str | None:
        return None if row.get(key) is None else f"{row[key] / unit:.{digits}f}"

    def cells(row: dict[str, Any], *columns: str | tuple[Any, ...]) -> list[Any]:
        shown = [number(row, *column) if isinstance(column, tuple) else row.get(column) for column in columns]
        return [*shown, (row["error"] or "")[:60]]

    what: tuple[Any, ...] = ("model", "weights", ("bits_per_weight", 3), ("linear_bytes", 0, 1e6), ("build_seconds", 1))
    headings = ["model", "weights", "bits", "MB", "built in s", "error"]
    print_table(headings, [cells(row, *what) for row in report["weights"]], "Linear layers")
    what = ("model", "batch", "context", "weights", "cache", "graph", "small_layers_compiled", ("step_ms", 3))
    what += (("tokens_per_s", 0), ("spread", 3), ("plan_us", 0), ("cache_bytes", 1, 1e6), ("peak_beyond_bytes", 0, 1e6))
    headings = ["model", "rows", "context", "weights", "cache", "graph", "compiled", "ms", "tokens/s", "spread"]
    headings += ["plan µs", "cache MB", "beyond MB", "error"]
    print_table(headings, [cells(row, *what) for row in report["decode"]], "Decoding")
    what = ("model", "context", "weights", "cache", ("tokens_per_s", 0), ("peak_beyond_bytes", 0, 1e6))
    headings = ["model", "tokens", "weights", "cache", "tokens/s", "beyond MB", "error"]
    print_table(headings, [cells(row, *what) for row in report["prefill"]], "Prefill")
    for row in report["profile"]:
        print(f"\n{row['model']} {row['weights']}/{row['cache']} {row['batch']} × {row['context']}", row["error"] or "")
        if row["error"] is None:
            print(f"{row['launches']:.0f} launches, {row['kernels_us']:.0f} of {row['step_us']:.0f} µs in kernels")
            for kernel in row["kernels"][:12]:
                print(f"  {kernel['us']:8.1f} µs {kernel['launches']:6.0f} ×  {kernel['name']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="llama-3.1-8b,qwen3-0.6b,books-27m", help="in order; tiny is for tests")
    parser.add_argument("--books", type=Path, default=environment_path("KVPACK_BOOKS_MODEL"), help="books-27m")
    parser.add_argument("--ways", help="only these, of those that a model is measured in (WEIGHTS/CACHE, …)")
    parser.add_argument("--layers", type=int, help="fewer layers of the shapes")
    parser.add_argument("--quick", action="store_true", help=f"two cases, and {QUICK_LAYERS} layers of the large model")
    parser.add_argument("--time-limit", type=float, help="seconds, after which no further part begins")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA device (--models tiny --device cpu tries out the script)")
    torch.set_grad_enabled(False)
    register_flash()
    report = {
        "what": "generation",
        **provenance({"KVPACK_BOOKS_MODEL": options.books}, PACKAGES),
        "device": device_record(device),
        "quick": options.quick,
        "steps": STEPS,
        "rounds": ROUNDS,
        **{section: [] for section in SECTIONS},
    }
    bench = GenerationBench(report, options)
    try:
        bench.run()
    finally:
        show(finite(bench.report))


if __name__ == "__main__":
    main()
