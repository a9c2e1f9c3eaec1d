"""``kvpack bench attention``: attention to pages on a GPU against torch's SDPA on fp16, in one run.

Results of two heads, for some tokens, are compared with fp64 attention to the dequantized pages before anything is
timed, and again afterwards; all others must have been written. How it is timed is said in
:mod:`kvpack.bench.timing`, what comes out in :mod:`kvpack.bench.attention_report`.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from kvpack.bench import run as bench_run
from kvpack.bench.attention_report import (
    FEW_TOKENS,
    FEW_TOKENS_FORMAT,
    GRID_FORMAT,
    NOTE,
    OBSERVED_FORMATS,
    PREFILL_BUDGETS,
    PREFILL_FORMATS,
    SCHEMA,
    UNIFORM,
    AttentionBenchOptions,
    Case,
    evaluate_targets,
    mixed,
)
from kvpack.bench.pages import (
    MIXED_FORMATS,
    PageCache,
    expected_attention,
    mixture,
    page_importance,
    pair_bytes,
    random_cache,
    share_of,
)
from kvpack.bench.report import Report, Row, finite
from kvpack.bench.run import BenchRun, Publish
from kvpack.bench.timing import Timed, Work, copy_bandwidth, measure
from kvpack.format.layout import ceil_div
from kvpack.format.pages import PAGE_TOKENS, PageFormat, Side
from kvpack.runtime.device import semaphores
from kvpack.runtime.kv import attention_kernels

DEVICE = "cuda"  # torch's current one; tests put the CPU here
SECTIONS = ("copy", "prefill", "few_tokens", "observed", "decode", "grids", "skipped", "targets")
COPY_BYTES = 1 << 32
MAX_COPIES = 1024
TOLERANCE = 1e-3
PEER_TOLERANCE = 5e-3  # theirs is not what is tested here
CHECKED_TOKENS = 8  # at most, of a chunk of query tokens
Error = Callable[[torch.Tensor], float]
BACKENDS = {"sdpa_flash": SDPBackend.FLASH_ATTENTION, "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION}


@dataclass
class Plan:
    """A way to hold K and V: pages of ``formats`` [sequences, pages], or without any the tensors that SDPA takes.

    The name is that of a format, or there is a budget for a mixture of several.
    """

    name: str
    bytes: int
    formats: npt.NDArray[np.uint8] | None = None
    budget: float | None = None

    def copies(self, rotate_bytes: int) -> int:
        """How many copies are worked on in turn: one, where it is so large that caches hold little of it."""
        return max(1, min(MAX_COPIES, math.ceil(rotate_bytes / self.bytes)))

    @property
    def read(self) -> set[PageFormat]:
        """What a kernel must be able to read: all formats of a mixture, few pages of which may lack some, and 16 bits,
        since a cache has its newest tokens in those."""
        named = {PageFormat[self.name.upper()]} if self.budget is None else set(MIXED_FORMATS)
        return named | {PageFormat.FP16}

    @property
    def shares(self) -> dict[str, float]:
        assert self.formats is not None
        return share_of(self.formats, sorted(PageFormat(number) for number in np.unique(self.formats)))


def free_bytes() -> int:
    """What can be allocated now."""
    return torch.cuda.mem_get_info()[0]


def multiprocessors() -> int:
    return torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count


def visited_tiles(case: Case, columns: int, causal: bool) -> int:
    """How many pages the blocks of the prefill kernel visit, all together.

    Args:
        columns: of a block, each a query token and a head of one KV head's, token after token.
    """
    group = case.heads // case.kv_heads
    tiles = 0
    for first in range(0, group * case.tokens, columns):
        last_token = (min(first + columns, group * case.tokens) - 1) // group
        tiles += ceil_div(case.context - (case.tokens - 1 - last_token if causal else 0), PAGE_TOKENS)
    return case.sequences * case.kv_heads * tiles


def sdpa_mask(case: Case, name: str) -> tuple[str | None, dict[str, Any]]:
    """What tells SDPA which tokens are seen: its name, and SDPA's arguments."""
    if case.tokens == 1:
        return None, {}
    if case.tokens == case.context:
        return "is_causal", {"is_causal": True}
    if name == "sdpa_flash":
        return "causal_lower_right", {"attn_mask": causal_lower_right(case.tokens, case.context)}
    # torch has causal_lower_right for flash attention alone, and for cuDNN would make such a mask in each call.
    unseen = torch.full((case.tokens, case.context), -math.inf, dtype=torch.float16, device=DEVICE)
    return "additive mask", {"attn_mask": unseen.triu(case.context - case.tokens + 1)}


def attention_error(expected: torch.Tensor, places: Sequence[tuple[int, int, int]]) -> Error:
    """Largest error beyond half a unit in the last place of fp16, over max(1, largest value of the place); infinite if
    any output is NaN.

    A place has its own largest value because the first tokens of a prompt, which see few others, have larger ones.

    Args:
        expected: fp64 [places, query heads of a KV head, head_dim].
        places: (sequence, KV head, query token) of each.
    """
    queries = expected.shape[1]
    largest = expected.abs().amax(dim=(1, 2), keepdim=True).clamp(min=1)
    half_unit = expected.abs().clamp(min=2.0**-14).log2().floor().exp2() * 2.0**-11

    def error(out: torch.Tensor) -> float:
        found = torch.stack([out[s, head * queries : (head + 1) * queries, token] for s, head, token in places])
        beyond = ((found.double() - expected).abs() - half_unit) / largest
        # 0 times what was not written, or is infinite, is NaN.
        value = (beyond.max().clamp(min=0) + 0 * out.sum(dtype=torch.float32)).item()
        return value if math.isfinite(value) else math.inf

    return error


def _error_if_observed(error: Error, sums: attention_kernels.Observed, out: torch.Tensor) -> float:
    """Infinite if a page has nothing: what was not added up would cost nothing."""
    return error(out) if sums.mass.all() and sums.steps.all() else math.inf


class AttentionBench(BenchRun):
    """One run; :meth:`run` returns its report."""

    def __init__(self, options: AttentionBenchOptions, publish: Publish | None, say: Callable[[str], None]) -> None:
        self.options = options
        self.generator = torch.Generator(device=DEVICE)
        self.generator.manual_seed(0)
        report = bench_run.new_report("bench-attention", SCHEMA, NOTE, options.as_dict(), SECTIONS)
        super().__init__(report, options.time_limit_s, publish, say)

    def _evaluate(self) -> None:
        self.report["targets"] = evaluate_targets(self.report)

    def run(self) -> Report:
        """Measure everything; what time or the device did not allow is missing from the report.

        Long contexts of decode are last, and the first to be missing.
        """
        options = self.options
        sections: tuple[tuple[str, Sequence[Case], Callable[[Case], None]], ...] = (
            ("prefill", options.prefill, self._prefill),
            ("few query tokens", options.few_tokens, self._few_tokens),
            ("observed", options.observed, self._observed),
            ("decode", options.cases, self._decode),
        )
        with self._running():
            with self._stage("copy"):
                self.report["copy"] = [copy_bandwidth(COPY_BYTES)]
            for name, cases, measure_case in sections:
                for case in cases:
                    with self._stage(f"{name}, {case.label}"):
                        measure_case(case)
                    gc.collect()
                    torch.cuda.empty_cache()
        return self.report

    # --- sections --------------------------------------------------------------

    def _prefill(self, case: Case) -> None:
        """A chunk of query tokens; by the kernel also with every token seeing all, which shows what the causal limit
        costs."""
        plans = [Plan("sdpa", case.fp16_bytes), *self._plans(case, PREFILL_FORMATS, PREFILL_BUDGETS)]
        if not self._fits(case, plans, results=2):
            return
        q = self._queries(case)
        columns = attention_kernels.prefill_shape(case.head_dim).columns
        works: list[Work] = []
        rows: list[Row] = []
        for plan in plans:
            row = self._row(case, plan) | {"budget": plan.budget, "causal": True, "mask": None, "tiles": None}
            if plan.formats is None:
                for name, mask, work in self._sdpa(case, q, row["copies"]):
                    works.append(work)
                    rows.append(row | {"name": name, "shares": None, "mask": mask})
                continue
            copies = self._pages(case, plan)
            for causal in (True, False):
                error = self._error(case, q, copies[0].values, causal)
                calls = [self._call(attention_kernels.prefill, case, q, plan, copy, causal=causal) for copy in copies]
                works.append(Work(calls, error, TOLERANCE))
                tiles = visited_tiles(case, columns, causal)
                rows.append(row | {"shares": plan.shares, "causal": causal, "tiles": tiles})
        for row, found in zip(rows, self._measure(works), strict=True):
            flop = case.flop(row["causal"])
            rate = {"flop": flop, "tflop_per_s": flop / found.us / 1e6 if found.us else None}
            self.report["prefill"].append(row | rate | found.as_dict())

    def _few_tokens(self, case: Case) -> None:
        """Both kernels, to find out up to how many query tokens decode is the faster one."""
        chunks = [case._replace(tokens=tokens) for tokens in FEW_TOKENS]
        [plan] = self._plans(case, [FEW_TOKENS_FORMAT], [])
        if not self._fits(chunks[-1], [plan], results=2 * len(chunks)):
            return
        copies = self._pages(case, plan)
        works: list[Work] = []
        rows: list[Row] = []
        for chunk in chunks:
            q, blocks = self._queries(chunk), self._blocks(chunk)
            error = self._error(chunk, q, copies[0].values)
            for name, kernel, options in (
                ("decode", attention_kernels.decode, {"blocks": blocks}),
                ("prefill", attention_kernels.prefill, {}),
            ):
                calls = [self._call(kernel, chunk, q, plan, copy, **options) for copy in copies]
                works.append(Work(calls, error, TOLERANCE))
                rows.append(self._row(chunk, plan) | {"name": name, "blocks": options.get("blocks")})
        for row, found in zip(rows, self._measure(works), strict=True):
            self.report["few_tokens"].append(row | found.as_dict())

    def _observed(self, case: Case) -> None:
        """Decode that adds up how much of the attention each page has, and that does not."""
        plans = self._plans(case, OBSERVED_FORMATS, [])
        if not self._fits(case, plans, results=2):
            return
        q, blocks = self._queries(case), self._blocks(case)
        works: list[Work] = []
        rows: list[Row] = []
        for plan in plans:
            copies = self._pages(case, plan)
            error = self._error(case, q, copies[0].values)
            sums = [
                attention_kernels.Observed(
                    torch.zeros(copy.table.shape[1:], dtype=torch.int64, device=DEVICE),
                    torch.zeros(case.sequences, dtype=torch.int32, device=DEVICE),
                )
                for copy in copies
            ]

            error_observed = partial(_error_if_observed, error, sums[0])
            decode = attention_kernels.decode
            calls = [self._call(decode, case, q, plan, copy, blocks=blocks) for copy in copies]
            calls_observed = [
                self._call(decode, case, q, plan, copy, blocks=blocks, observed=one)
                for copy, one in zip(copies, sums, strict=True)
            ]
            works += [Work(calls, error, TOLERANCE), Work(calls_observed, error_observed, TOLERANCE)]
            rows += [self._row(case, plan) | {"blocks": blocks, "observed": observed} for observed in (False, True)]
        for row, found in zip(rows, self._measure(works), strict=True):
            self.report["observed"].append(row | found.as_dict())

    def _decode(self, case: Case) -> None:
        """One query token, by the formats and mixtures, and INT4 pages with several grids."""
        plans = [Plan("sdpa", case.fp16_bytes), *self._plans(case, UNIFORM, self.options.budgets)]
        if not self._fits(case, plans, results=1):
            return
        q = self._queries(case)
        works: list[Work] = []
        rows: list[tuple[str, Row]] = []  # where a work's measurement goes
        for plan in plans:
            row = self._row(case, plan) | {"budget": plan.budget}
            if plan.formats is None:
                for name, _, work in self._sdpa(case, q, row["copies"]):
                    works.append(work)
                    rows.append(("decode", row | {"name": name, "blocks": None, "shares": None}))
                continue
            chosen = self._blocks(case)
            tried = self._grids(chosen) if plan.name == GRID_FORMAT else [chosen]
            copies = self._pages(case, plan)
            error = self._error(case, q, copies[0].values)
            for blocks in tried:
                calls = [self._call(attention_kernels.decode, case, q, plan, copy, blocks=blocks) for copy in copies]
                works.append(Work(calls, error, TOLERANCE))
            rows.append(("decode", row | {"blocks": chosen, "shares": plan.shares}))
            rows += [("grids", case._asdict() | {"blocks": blocks, "chosen": False}) for blocks in tried[1:]]
        for (where, row), found in zip(rows, self._measure(works), strict=True):
            self.report[where].append(row | (self._bound(row, found) if where == "decode" else {}) | found.as_dict())
            if where == "decode" and row["name"] == GRID_FORMAT:
                grid = case._asdict() | {"blocks": row["blocks"], "chosen": True}
                self.report["grids"].append(grid | found.as_dict())

    # --- what sections share ---------------------------------------------------

    def _measure(self, works: list[Work]) -> list[Timed]:
        options = self.options
        return measure(works, samples=options.samples, sample_ms=options.sample_ms, case_ms=options.case_ms)

    def _row(self, case: Case, plan: Plan) -> Row:
        copies = plan.copies(self.options.rotate_bytes)
        return case._asdict() | {"name": plan.name, "bytes": plan.bytes, "copies": copies}

    def _bound(self, row: Row, timed: Timed) -> Row:
        bound_us = row["bytes"] / self.report["copy"][-1]["gb_per_s"] / 1e3
        return {"bound_us": bound_us, "fraction_of_bound": bound_us / timed.us if timed.us else None}

    def _fits(self, case: Case, plans: Sequence[Plan], *, results: int) -> bool:
        """Whether the copies of all plans have room, with so many results of each; what has not is in the report."""
        rotate = self.options.rotate_bytes
        needed = sum((plan.bytes + results * case.query_bytes) * plan.copies(rotate) for plan in plans)
        limit = min(self.options.memory_bytes, int(0.9 * free_bytes()))
        if needed > limit:
            self.report["skipped"].append(case._asdict() | {"bytes": needed, "limit_bytes": limit})
            return False
        semaphores.prepare(torch.device(DEVICE))  # for launches in graphs; those of earlier cases are gone
        return True

    def _queries(self, case: Case) -> torch.Tensor:
        shape = case.sequences, case.heads, case.tokens, case.head_dim
        return torch.randn(shape, device=DEVICE, generator=self.generator).half()

    def _plans(self, case: Case, uniform: Sequence[str], budgets: Sequence[float]) -> list[Plan]:
        """Pages of each format, then mixtures; those that query tokens have to themselves have 16 bits, as in a cache,
        where they are quantized later."""
        own = np.full((case.sequences, case.tokens // PAGE_TOKENS), PageFormat.FP16, np.uint8)
        shape = case.sequences, case.context // PAGE_TOKENS - own.shape[1]

        def plan(name: str, cached: npt.NDArray[np.uint8], budget: float | None = None) -> Plan:
            formats = np.concatenate([cached, own], axis=1)
            sizes = (int((formats == one).sum()) * pair_bytes(one, case.head_dim) for one in PageFormat)
            return Plan(name, case.kv_heads * sum(sizes), formats, budget)

        importance = page_importance(math.prod(shape))  # one order of pages for all budgets
        return [
            *(plan(name, np.full(shape, PageFormat[name.upper()], np.uint8)) for name in uniform),
            *(plan(mixed(one), mixture(importance, one, case.head_dim).reshape(shape), one) for one in budgets),
        ]

    def _blocks(self, case: Case) -> int:
        """What a cache would choose."""
        tiles = ceil_div(case.heads // case.kv_heads * case.tokens, attention_kernels.COLUMNS)
        pages = case.context // PAGE_TOKENS
        return attention_kernels.decode_blocks(
            case.sequences,
            case.kv_heads,
            tiles,
            pages,
            multiprocessors(),
            blocks_per_sm=attention_kernels.decode_blocks_per_sm(case.head_dim),
        )

    def _grids(self, chosen: int) -> list[int]:
        """The chosen number of blocks, and others that are to show whether it is a good one."""
        return [chosen, *sorted({max(1, chosen // 2), chosen * 3 // 4, chosen * 3 // 2, chosen * 2} - {0, chosen})]

    def _deviations(self, case: Case) -> dict[Side, float]:
        """Such that scores deviate by about 1 and outputs by about 1: then what is left out shows."""
        return {Side.K: 1.0, Side.V: math.sqrt(case.context / math.e)}

    def _error(
        self, case: Case, q: torch.Tensor, values: Callable[[Side, int, int], torch.Tensor], causal: bool = True
    ) -> Error:
        """Against the first head of the first sequence and the last one of the last, at some query tokens, among them
        the first and the last one."""
        group, scale = case.heads // case.kv_heads, 1 / math.sqrt(case.head_dim)
        tokens = sorted({i * (case.tokens - 1) // (CHECKED_TOKENS - 1) for i in range(CHECKED_TOKENS)})
        places = []
        expected = []
        for sequence, head in dict.fromkeys([(0, 0), (case.sequences - 1, case.kv_heads - 1)]):
            k, v = (values(side, sequence, head).double() for side in Side)
            for token in tokens:
                seen = case.context - (case.tokens - 1 - token if causal else 0)
                of_place = q[sequence, head * group : (head + 1) * group, token]
                places.append((sequence, head, token))
                expected.append(expected_attention(of_place, k[:seen], v[:seen], scale))
        return attention_error(torch.stack(expected), places)

    def _sdpa(self, case: Case, q: torch.Tensor, count: int) -> Iterator[tuple[str, str | None, Work]]:
        """Each backend's name, what tells it which tokens are seen, and its work."""
        shape = case.sequences, case.kv_heads, case.context, case.head_dim
        pair = {
            side: torch.empty(shape, dtype=torch.float16, device=DEVICE).normal_(0, size, generator=self.generator)
            for side, size in self._deviations(case).items()
        }
        copies = [pair, *({side: one.clone() for side, one in pair.items()} for _ in range(count - 1))]
        error = self._error(case, q, lambda side, sequence, head: pair[side][sequence, head])

        def attend(backend: SDPBackend, options: dict[str, Any], copy: dict[Side, torch.Tensor]) -> torch.Tensor:
            with sdpa_kernel(backend):
                return torch.nn.functional.scaled_dot_product_attention(
                    q, copy[Side.K], copy[Side.V], enable_gqa=case.heads != case.kv_heads, **options
                )

        for name, backend in BACKENDS.items():
            mask, options = sdpa_mask(case, name)
            calls = [partial(attend, backend, options, copy) for copy in copies]
            yield name, mask, Work(calls, error, PEER_TOLERANCE)

    def _pages(self, case: Case, plan: Plan) -> list[PageCache]:
        """Copies of the same pages."""
        assert plan.formats is not None
        cache = random_cache(plan.formats, case.kv_heads, case.head_dim, self._deviations(case), self.generator)
        return [cache, *(cache.copy() for _ in range(plan.copies(self.options.rotate_bytes) - 1))]

    def _call(
        self,
        kernel: Callable[..., torch.Tensor],
        case: Case,
        q: torch.Tensor,
        plan: Plan,
        cache: PageCache,
        **options: Any,
    ) -> Callable[[], torch.Tensor]:
        """One of the kernels on pages."""
        lengths = torch.full((case.sequences,), case.context, dtype=torch.int32, device=DEVICE)
        read = plan.read
        scale = 1 / math.sqrt(case.head_dim)
        return partial(kernel, q, cache.pages, cache.table, lengths, case.kv_heads, read, read, scale=scale, **options)


def bench_attention(
    options: AttentionBenchOptions,
    publish: Publish | None = None,
    say: Callable[[str], None] = lambda stage: None,
) -> Report:
    """Measure, and return the report (``kvpack.bench.attention_report`` says what is in it).

    Args:
        publish: called with the report so far after each step.
        say: called with the name of each stage as it begins.

    Raises:
        DeviceError: there is no CUDA device, or no CuPy.
    """
    bench_run.require_cuda("kvpack bench attention")
    with torch.no_grad():
        report: Report = finite(AttentionBench(options, publish, say).run())
        return report
