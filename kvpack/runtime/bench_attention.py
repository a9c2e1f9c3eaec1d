"""``kvpack bench attention``: decode attention to pages on a GPU against torch's SDPA on fp16, in one run.

The results of two heads are compared with fp64 attention to the dequantized pages before anything is timed, and again
afterwards; all others must have been written. How it is timed is said in :mod:`kvpack.runtime.bench_timing`, what comes
out in :mod:`kvpack.runtime.bench_attention_report`.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from kvpack.format.layout import ceil_div
from kvpack.format.pages import PAGE_TOKENS, PageFormat, Side
from kvpack.runtime import attention_kernels, bench_run, tickets
from kvpack.runtime.bench_attention_report import (
    GRID_FORMAT,
    NOTE,
    SCHEMA,
    UNIFORM,
    AttentionBenchOptions,
    Case,
    evaluate_targets,
    mixed,
)
from kvpack.runtime.bench_pages import (
    MIXED_FORMATS,
    PageCache,
    expected_attention,
    mixture,
    page_importance,
    pair_bytes,
    random_cache,
    share_of,
)
from kvpack.runtime.bench_report import Report, Row, finite
from kvpack.runtime.bench_run import BenchRun, Publish
from kvpack.runtime.bench_timing import Timed, Work, copy_bandwidth, measure

DEVICE = "cuda"  # torch's current one; tests put the CPU here
SECTIONS = ("copy", "decode", "grids", "skipped", "targets")
COPY_BYTES = 1 << 32
MAX_COPIES = 1024
TOLERANCE = 1e-3
PEER_TOLERANCE = 5e-3  # theirs is not what is tested here
Error = Callable[[torch.Tensor], float]
BACKENDS = {"sdpa_flash": SDPBackend.FLASH_ATTENTION, "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION}


@dataclass
class Plan:
    """A way to hold K and V: pages of ``formats`` [sequences, pages], or without any the tensors that SDPA takes."""

    name: str
    bytes: int
    formats: npt.NDArray[np.uint8] | None = None
    budget: float | None = None

    def copies(self, rotate_bytes: int) -> int:
        """How many copies are worked on in turn: one, where it is so large that caches hold little of it."""
        return max(1, min(MAX_COPIES, math.ceil(rotate_bytes / self.bytes)))


def free_bytes() -> int:
    """What can be allocated now."""
    return torch.cuda.mem_get_info()[0]


def multiprocessors() -> int:
    return torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count


def attention_error(expected: torch.Tensor, places: Sequence[tuple[int, int]]) -> Error:
    """Largest error beyond half a unit in the last place of fp16, over max(1, largest value); infinite if any output
    is NaN.

    Args:
        expected: fp64 [places, query heads of a KV head, head_dim].
        places: (sequence, KV head) of each.
    """
    queries = expected.shape[1]
    largest = max(1.0, expected.abs().max().item())
    half_unit = expected.abs().clamp(min=2.0**-14).log2().floor().exp2() * 2.0**-11

    def error(out: torch.Tensor) -> float:
        found = torch.stack([out[sequence, head * queries : (head + 1) * queries, 0] for sequence, head in places])
        beyond = (found.double() - expected).abs() - half_unit
        # 0 times what was not written, or is infinite, is NaN.
        value = (beyond.max().clamp(min=0) / largest + 0 * out.sum(dtype=torch.float32)).item()
        return value if math.isfinite(value) else math.inf

    return error


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
        """Measure everything; what time or the device did not allow is missing from the report."""
        with self._running():
            with self._stage("copy"):
                self.report["copy"] = [copy_bandwidth(COPY_BYTES)]
            for case in self.options.cases:
                with self._stage(case.label):
                    self._case(case)
                gc.collect()
                torch.cuda.empty_cache()
        return self.report

    # --- a case ----------------------------------------------------------------

    def _case(self, case: Case) -> None:
        """Everything of one case, timed in turns."""
        plans = self._plans(case)
        rotate = self.options.rotate_bytes
        needed = sum(plan.bytes * plan.copies(rotate) for plan in plans)
        limit = min(self.options.memory_bytes, int(0.9 * free_bytes()))
        if needed > limit:
            self.report["skipped"].append(case._asdict() | {"bytes": needed, "limit_bytes": limit})
            return
        tickets.prepare(torch.device(DEVICE))  # for launches in graphs; those of earlier cases are gone
        q = torch.randn(case.sequences, case.heads, 1, case.head_dim, device=DEVICE, generator=self.generator).half()
        works: list[Work] = []
        rows: list[tuple[str, Row]] = []  # where a work's measurement goes
        for plan in plans:
            count = plan.copies(rotate)
            row = case._asdict() | {"name": plan.name, "budget": plan.budget, "bytes": plan.bytes, "copies": count}
            if plan.formats is None:
                works += self._sdpa(case, q, count)
                rows += [("decode", row | {"name": name, "blocks": None, "shares": None}) for name in BACKENDS]
                continue
            chosen = self._blocks(case)
            tried = self._grids(chosen) if plan.name == GRID_FORMAT else [chosen]
            works += self._pages(case, q, plan.formats, count, tried)
            shares = share_of(plan.formats, sorted({PageFormat(number) for number in np.unique(plan.formats)}))
            rows.append(("decode", row | {"blocks": chosen, "shares": shares}))
            if plan.name == GRID_FORMAT:
                rows += [("grids", case._asdict() | {"blocks": blocks, "chosen": False}) for blocks in tried[1:]]
        options = self.options
        timed = measure(works, samples=options.samples, sample_ms=options.sample_ms, case_ms=options.case_ms)
        for (where, row), found in zip(rows, timed, strict=True):
            self.report[where].append(row | self._measurement(row, found))
            if where == "decode" and row["name"] == GRID_FORMAT:
                grid = case._asdict() | {"blocks": row["blocks"], "chosen": True}
                self.report["grids"].append(grid | found.as_dict())

    def _measurement(self, row: Row, timed: Timed) -> Row:
        if "bytes" not in row:
            return timed.as_dict()
        bound_us = row["bytes"] / self.report["copy"][-1]["gb_per_s"] / 1e3
        fraction = bound_us / timed.us if timed.us else None
        return {"bound_us": bound_us, "fraction_of_bound": fraction} | timed.as_dict()

    def _plans(self, case: Case) -> list[Plan]:
        shape = case.sequences, case.context // PAGE_TOKENS
        plans = [Plan("sdpa", case.fp16_bytes)]
        for name in UNIFORM:
            page_format = PageFormat[name.upper()]
            size = math.prod(shape) * case.kv_heads * pair_bytes(page_format, case.head_dim)
            plans.append(Plan(name, size, np.full(shape, page_format, np.uint8)))
        importance = page_importance(math.prod(shape))  # one order of pages for all budgets
        for budget in self.options.budgets:
            formats = mixture(importance, budget, case.head_dim).reshape(shape)
            pages = {page_format: int((formats == page_format).sum()) for page_format in MIXED_FORMATS}
            size = case.kv_heads * sum(pages[one] * pair_bytes(one, case.head_dim) for one in pages)
            plans.append(Plan(mixed(budget), size, formats, budget))
        return plans

    def _blocks(self, case: Case) -> int:
        """What a cache would choose."""
        shape = attention_kernels.decode_shape(case.head_dim, torch.float16)
        tiles = ceil_div(case.heads // case.kv_heads, attention_kernels.COLUMNS)
        pages = case.context // PAGE_TOKENS
        return attention_kernels.decode_blocks(
            case.sequences, case.kv_heads, tiles, pages, multiprocessors(), blocks_per_sm=shape.blocks_per_sm
        )

    def _grids(self, chosen: int) -> list[int]:
        """The chosen number of blocks, and others that are to show whether it is a good one."""
        return [chosen, *sorted({max(1, chosen // 2), chosen * 3 // 4, chosen * 3 // 2, chosen * 2} - {0, chosen})]

    def _deviations(self, case: Case) -> dict[Side, float]:
        """Such that scores deviate by about 1 and outputs by about 1: then what is left out shows."""
        return {Side.K: 1.0, Side.V: math.sqrt(case.context / math.e)}

    def _error(self, case: Case, q: torch.Tensor, values: Callable[[Side, int, int], torch.Tensor]) -> Error:
        """Against the first head of the first sequence, and the last one of the last."""
        places = list(dict.fromkeys([(0, 0), (case.sequences - 1, case.kv_heads - 1)]))
        group, scale = case.heads // case.kv_heads, 1 / math.sqrt(case.head_dim)
        expected = [
            expected_attention(
                q[sequence, head * group : (head + 1) * group, 0],
                values(Side.K, sequence, head),
                values(Side.V, sequence, head),
                scale,
            )
            for sequence, head in places
        ]
        return attention_error(torch.stack(expected), places)

    def _sdpa(self, case: Case, q: torch.Tensor, count: int) -> list[Work]:
        shape = case.sequences, case.kv_heads, case.context, case.head_dim
        pair = {
            side: torch.empty(shape, dtype=torch.float16, device=DEVICE).normal_(0, size, generator=self.generator)
            for side, size in self._deviations(case).items()
        }
        copies = [pair, *({side: one.clone() for side, one in pair.items()} for _ in range(count - 1))]
        error = self._error(case, q, lambda side, sequence, head: pair[side][sequence, head])

        def attend(backend: SDPBackend, copy: dict[Side, torch.Tensor]) -> torch.Tensor:
            with sdpa_kernel(backend):
                return torch.nn.functional.scaled_dot_product_attention(
                    q, copy[Side.K], copy[Side.V], enable_gqa=case.heads != case.kv_heads
                )

        return [
            Work([partial(attend, backend, copy) for copy in copies], error, PEER_TOLERANCE)
            for backend in BACKENDS.values()
        ]

    def _pages(
        self, case: Case, q: torch.Tensor, formats: npt.NDArray[np.uint8], count: int, grids: Sequence[int]
    ) -> list[Work]:
        """The kernel on copies of the same pages, with each of several numbers of blocks."""
        cache = random_cache(formats, case.kv_heads, case.head_dim, self._deviations(case), self.generator)
        copies = [cache, *(cache.copy() for _ in range(count - 1))]
        # A cache keeps its newest tokens in 16 bits, so that every kernel reads those too.
        read = cache.formats | {PageFormat.FP16}
        if len(cache.formats) > 1:  # a mixture of few pages may lack a format; all of them have one kernel
            read |= set(MIXED_FORMATS)
        lengths = torch.full((case.sequences,), case.context, dtype=torch.int32, device=DEVICE)
        error = self._error(case, q, cache.values)

        def attend(copy: PageCache, blocks: int) -> torch.Tensor:
            return attention_kernels.decode(
                q,
                copy.pages,
                copy.table,
                lengths,
                case.kv_heads,
                read,
                read,
                scale=1 / math.sqrt(case.head_dim),
                blocks=blocks,
            )

        return [Work([partial(attend, copy, blocks) for copy in copies], error, TOLERANCE) for blocks in grids]


def bench_attention(
    options: AttentionBenchOptions,
    publish: Publish | None = None,
    say: Callable[[str], None] = lambda stage: None,
) -> Report:
    """Measure, and return the report (``kvpack.runtime.bench_attention_report`` says what is in it).

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
