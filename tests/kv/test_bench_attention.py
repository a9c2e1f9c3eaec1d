"""``kvpack bench attention`` where there is no GPU: pages, budgets, grids, options, tables, the picture, and a run."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import emulator
import numpy as np
import pytest
from typer.testing import CliRunner

torch = pytest.importorskip("torch")

import paged_values  # noqa: E402
from emulated_device import emulated_launch  # noqa: E402
from test_bench_linear import fake_measure, render_docs  # noqa: E402

from kvpack.bench import attention as bench_attention  # noqa: E402
from kvpack.bench import attention_report as bench_attention_report  # noqa: E402
from kvpack.bench import pages as bench_pages  # noqa: E402
from kvpack.bench import run as bench_run  # noqa: E402
from kvpack.bench.attention_report import (  # noqa: E402
    BUDGETS,
    CONTEXTS,
    FEW_TOKENS,
    FEW_TOKENS_CASES,
    LARGE,
    MIXED_NAMES,
    MODELS,
    OBSERVED_CASES,
    OBSERVED_FORMATS,
    PEERS,
    PREFILL_CASES,
    PREFILL_NAMES,
    QUICK_CONTEXTS,
    SMALL,
    UNIFORM,
    Case,
    best_sdpa,
    cases_of,
    causal_overhead,
    evaluate_targets,
    find,
    gain,
    mixed,
    observed_overhead,
    parse_options,
    speed,
    tables,
    wrong_results,
)
from kvpack.bench.pages import MIXED_FORMATS, PageCache, mixture, page_importance, pair_bytes, random_cache  # noqa: E402
from kvpack.bench.report import write_report  # noqa: E402
from kvpack.cli import ExitCode, app  # noqa: E402
from kvpack.encode.page_coder import dequantize_blocks  # noqa: E402
from kvpack.format.pages import PageFormat, PageLayout, Side  # noqa: E402
from kvpack.runtime.kv.attention_kernels import decode_blocks, prefill_shape  # noqa: E402

TOP_KEYS = {
    "what", "schema", "complete", "stopped", "note", "command", "kvpack", "date", "commit",
    "package_changed_since_commit", "cpu", "cores", "load_at_start", "python", "versions", "device", "options",
    "seconds", "copy", "prefill", "few_tokens", "observed", "decode", "grids", "skipped", "targets",
}  # fmt: skip
DEVICE = {"name": "a GPU", "driver": "1", "cuda": "13.0"}
LATENCY_US = 2.0
FORMATS = [page_format for page_format in PageFormat if page_format != PageFormat.BF16]


def generator() -> Any:
    return torch.Generator().manual_seed(0)


# --- mixtures ------------------------------------------------------------------


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("pages", [16, 77, 4096])
def test_budgets_are_met_within_a_page(pages: int, head_dim: int) -> None:
    importance = page_importance(pages)
    whole = pages * pair_bytes(PageFormat.FP16, head_dim)
    largest_step = pair_bytes(PageFormat.INT8, head_dim) - pair_bytes(PageFormat.INT4, head_dim)
    for budget in BUDGETS:
        formats = mixture(importance, budget, head_dim)
        spent = sum(pair_bytes(PageFormat(number), head_dim) for number in formats)
        assert 0 <= budget * whole - spent < largest_step
    formats = mixture(importance, 0.3, head_dim)
    if pages == 4096:
        assert set(formats.tolist()) == set(MIXED_FORMATS)


def test_pages_keep_their_order_at_all_budgets() -> None:
    importance = page_importance(500)
    assert np.array_equal(importance, page_importance(500))
    assert not np.array_equal(importance, np.sort(importance))
    bits = {
        budget: np.array([PageFormat(number).element_bits for number in mixture(importance, budget, 128)])
        for budget in BUDGETS
    }
    for found in bits.values():
        assert (np.diff(found[np.argsort(importance)]) >= 0).all()
    for smaller, larger in pairwise(BUDGETS):
        assert (bits[smaller] <= bits[larger]).all()


def test_a_budget_below_two_bits_is_refused_and_a_large_one_leaves_eight() -> None:
    with pytest.raises(ValueError, match="2 bits"):
        mixture(page_importance(10), 0.1, 64)
    assert (mixture(page_importance(10), 1.0, 64) == PageFormat.INT8).all()


# --- random pages ----------------------------------------------------------------


@pytest.mark.parametrize("side", Side)
@pytest.mark.parametrize("page_format", FORMATS)
def test_random_blocks_mean_what_the_page_coder_says(page_format: PageFormat, side: Side) -> None:
    for head_dim in (64, 80):
        layout = PageLayout(side, page_format, head_dim)
        blocks = torch.zeros(20, layout.block_bytes, dtype=torch.uint8)
        bench_pages.fill_blocks(blocks, layout, 3.0, generator())
        expected = dequantize_blocks(blocks.numpy(), layout)
        entries = torch.arange(20) * layout.block_bytes + int(page_format)
        cache = bench_pages.PageCache(blocks.view(-1), entries.expand(2, 1, -1).contiguous(), 1, head_dim)
        assert np.array_equal(cache.values(side, 0, 0).view(20, 64, head_dim).numpy(), expected)
        assert 1.5 < expected.std() < 5
        assert np.abs(expected).max() < 30


def test_a_cache_has_every_page_once() -> None:
    formats = mixture(page_importance(24), 0.3, 64).reshape(2, 12)
    cache = random_cache(formats, 3, 64, {Side.K: 1.0, Side.V: 2.0}, generator())
    table = cache.table.numpy()
    assert np.array_equal(table & 15, np.stack([formats, formats]))
    sizes = {
        (side, number): 3 * PageLayout(side, PageFormat(number), 64).block_bytes
        for side in Side
        for number in np.unique(formats)
    }
    pages = sorted(
        (int(entry) & ~15, sizes[side, int(entry) & 15]) for side in Side for entry in table[side].reshape(-1)
    )
    ends = np.cumsum([size for _, size in pages])
    assert [at for at, _ in pages] == [0, *ends[:-1]]
    assert ends[-1] == len(cache.pages)
    assert not np.array_equal(np.sort(table[0], axis=None), table[0].reshape(-1))

    layout = PageLayout(Side.K, PageFormat(formats[1, 5]), 64)
    first = (table[Side.K, 1, 5] & ~15) + 2 * layout.block_bytes
    block = cache.pages[first : first + layout.block_bytes].numpy()
    found = cache.values(Side.K, 1, 2)[5 * 64 : 6 * 64].numpy()
    assert np.array_equal(found, dequantize_blocks(block, layout))
    twin = cache.copy()
    assert torch.equal(twin.pages, cache.pages)
    assert twin.pages.data_ptr() != cache.pages.data_ptr()
    assert twin.table.data_ptr() != cache.table.data_ptr()


def test_the_error_is_that_of_the_tests() -> None:
    expected = torch.randn(2, 4, 64, dtype=torch.float64, generator=generator()) * 3
    out = torch.zeros(3, 8, 1, 64, dtype=torch.float16)
    out[0, :4, 0], out[2, 4:, 0] = expected[0].half(), expected[1].half()
    error = bench_attention.attention_error(expected, [(0, 0, 0), (2, 1, 0)])
    assert 0 <= error(out) < 3e-4
    out[2, 5, 0, 3] += 0.1
    found = paged_values.attention_error(out[2, 4:, 0], expected[1].numpy())
    assert error(out) == pytest.approx(found, rel=1e-6)
    # A place of large values does not excuse others.
    expected[0], out[0] = 100 * expected[0], 100 * out[0]
    error = bench_attention.attention_error(expected, [(0, 0, 0), (2, 1, 0)])
    assert error(out) == pytest.approx(found, rel=1e-6)
    out[1, 0, 0, 0] = math.nan  # of a head that is not looked at: poison that is still there
    assert error(out) == math.inf


# --- what prefill visits and computes ------------------------------------------------

CHUNK = Case(2, 4, 2, 64, 192, 128)


def test_visited_tiles_of_a_chunk() -> None:
    """48 tokens a block: those of the three see 112, 160 and 192 tokens."""
    assert bench_attention.visited_tiles(CHUNK, 96, causal=True) == 2 * 2 * (2 + 3 + 3)
    assert bench_attention.visited_tiles(CHUNK, 96, causal=False) == 2 * 2 * (3 + 3 + 3)


@pytest.mark.parametrize("case", [*PREFILL_CASES[:2], CHUNK, Case(1, 14, 2, 80, 448, 448), Case(3, 8, 8, 64, 256, 5)])
def test_visited_tiles_are_those_of_which_a_block_sees_something(case: Case) -> None:
    columns = prefill_shape(case.head_dim).columns
    group = case.heads // case.kv_heads
    for causal in (True, False):
        visited = set()
        for column in range(group * case.tokens):
            position = case.context - case.tokens + column // group
            seen = position + 1 if causal else case.context
            visited |= {(column // columns, page) for page in range(-(-seen // 64))}
        assert bench_attention.visited_tiles(case, columns, causal) == case.sequences * case.kv_heads * len(visited)


def test_work_is_counted_by_what_each_token_sees() -> None:
    seen = [CHUNK.context - CHUNK.tokens + 1 + token for token in range(CHUNK.tokens)]
    assert CHUNK.flop() == 2 * 4 * 4 * 64 * sum(seen)
    assert CHUNK.flop(causal=False) == 2 * 4 * 4 * 64 * 128 * 192
    assert PREFILL_CASES[0].flop() == 4 * 128 * 32 * 2048 * 2049 // 2


@pytest.mark.parametrize("case", [CHUNK, CHUNK._replace(tokens=192), CHUNK._replace(tokens=1)])
def test_peers_are_told_what_is_seen(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_attention, "DEVICE", "cpu")
    attention = torch.nn.functional.scaled_dot_product_attention
    q = torch.randn(1, 1, case.tokens, 64, generator=generator()).half()
    k, v = torch.randn(2, 1, 1, case.context, 64, generator=generator()).half()
    masks = []
    for name in PEERS:
        mask, options = bench_attention.sdpa_mask(case, name)
        masks.append(mask)
        with bench_attention.sdpa_kernel(bench_attention.SDPBackend.MATH):
            found = attention(q, k, v, **options)
        for token in {0, case.tokens // 2, case.tokens - 1}:
            seen = case.context - case.tokens + token + 1
            expected = bench_pages.expected_attention(q[0, 0, token : token + 1], k[0, 0, :seen], v[0, 0, :seen], 1 / 8)
            torch.testing.assert_close(found[0, 0, token].double(), expected[0], rtol=2e-3, atol=2e-3)
    expected_masks = {1: [None, None], 128: ["causal_lower_right", "additive mask"], 192: ["is_causal"] * 2}
    assert masks == expected_masks[case.tokens]


# --- blocks of the grid ------------------------------------------------------------

SMS = 132


@pytest.mark.parametrize(
    ("sequences", "pages", "low", "high"),
    [(16, 256, 512, 512), (16, 32, 384, 512), (1, 256, 200, 264), (1, 2048, 250, 280)],
)
def test_as_many_blocks_as_were_fastest_on_an_h100(sequences: int, pages: int, low: int, high: int) -> None:
    assert low <= decode_blocks(sequences, 8, 1, pages, SMS) <= high


def test_blocks_are_resident_even_and_have_pages() -> None:
    for sequences in (1, 2, 3, 7, 16, 64, 600):
        for kv_heads in (1, 2, 8):
            for tiles in (1, 4):
                for pages in (0, 1, 5, 16, 100, 3000):
                    for multiprocessors in (10, 78, SMS):
                        for per_sm in (3, 4):
                            shape = sequences, kv_heads, tiles, pages, multiprocessors
                            blocks = decode_blocks(*shape, blocks_per_sm=per_sm)
                            segments = sequences * kv_heads * tiles
                            assert 1 <= blocks <= multiprocessors * per_sm
                            assert blocks <= segments * max(1, -(-pages // 4))
                            lost = 1 - (blocks // segments * segments) / blocks
                            assert lost == 0 or lost > 0.1 or blocks < segments
    assert decode_blocks(300, 1, 1, 100, SMS) == 4 * SMS  # 300 would leave too many idle
    assert decode_blocks(1, 1, 1, 2048, SMS) < SMS  # the sums of one segment are added up by one block


# --- options -----------------------------------------------------------------------


def test_options_have_the_defaults_of_a_full_and_of_a_quick_run() -> None:
    full, quick = parse_options(), parse_options(quick=True)
    assert (full.models, full.sequences, full.contexts, full.budgets) == (MODELS, (1, 16), CONTEXTS, BUDGETS)
    assert (CONTEXTS[0], CONTEXTS[-1], len(full.cases)) == (1024, 131072, 32)
    assert quick.contexts == QUICK_CONTEXTS
    assert {LARGE, SMALL} <= set(quick.cases) <= set(full.cases)
    assert full.as_dict().keys() == quick.as_dict().keys()
    assert (full.prefill, full.few_tokens, full.observed) == (PREFILL_CASES, FEW_TOKENS_CASES, OBSERVED_CASES)
    assert quick.prefill == PREFILL_CASES[:2]
    assert PREFILL_CASES[1].label == "B1 32:8 D128 S16384 T1024"
    assert full.as_dict()["prefill"][1]["tokens"] == 1024
    mine = parse_options(models="14:2×80", sequences="3", contexts="64,1k,1024")
    assert mine.cases == [Case(3, 14, 2, 80, 64), Case(3, 14, 2, 80, 1024)]
    assert (mine.prefill, mine.few_tokens, mine.observed) == ((), (), ())
    narrow = parse_options(models="8:8x64")
    assert (narrow.prefill, narrow.observed) == ((Case(4, 8, 8, 64, 2048, 2048),), ())
    assert mine.cases[0].label == "B3 14:2 D80 S64"
    assert full.cases[0].fp16_bytes == 1024 * 8 * 128 * 4


@pytest.mark.parametrize(
    "wrong",
    [{"models": "32x128"}, {"models": "7:2x64"}, {"models": "8:8x72"}, {"sequences": "0"}, {"contexts": "100"}],
)
def test_wrong_options_are_named(wrong: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong.values()))):
        parse_options(**wrong)


# --- reports -------------------------------------------------------------------------


def measurement(us: float | None) -> dict[str, Any]:
    error = None if us else "WrongResult: 1"
    return {
        "us": us, "us_low": us, "us_high": us, "samples": 9, "launches": 3, "timing": "graph", "relative_error": 1e-4,
        "error": error,
    }  # fmt: skip


def synthetic_report() -> dict[str, Any]:
    """All cases: times in proportion to the bytes and 2 µs, SDPA's at 3 TB/s. Prefill: 400 TFLOP/s by SDPA, 100 causal
    by pages; a tile takes 1.04 times as long as without the limit, 1.06 times at INT4. Observed: 1 % more, INT4 4 %."""
    options = parse_options()
    report: dict[str, Any] = {
        "what": "bench-attention", "schema": 2, "complete": True, "stopped": None, "note": "", "command": "kvpack",
        "kvpack": "0", "date": "today", "commit": "abc", "package_changed_since_commit": False, "cpu": "a CPU",
        "cores": 1, "load_at_start": 0, "python": "3", "versions": {"torch": "2"}, "device": DEVICE,
        "options": options.as_dict(), "seconds": {"total": 1.0}, "decode": [], "grids": [], "skipped": [],
        "prefill": [], "few_tokens": [], "observed": [],
        "copy": [{"bytes": 4e9, "us": 2666.0, "gb_per_s": 3000.0}],
    }  # fmt: skip
    bits = {name: PageFormat[name.upper()].element_bits for name in UNIFORM}
    for case in options.cases:
        if case.context == 131072 and case.sequences == 16:
            report["skipped"].append(case._asdict() | {"bytes": 7e10, "limit_bytes": 6e10})
            continue
        sizes = dict.fromkeys(PEERS, case.fp16_bytes)
        sizes |= {name: case.fp16_bytes * bits[name] // 16 for name in UNIFORM}
        sizes |= {mixed(budget): int(case.fp16_bytes * budget) for budget in BUDGETS}
        for name, size in sizes.items():
            bound = size / 3e6
            us = bound + (0 if name == "sdpa_cudnn" else LATENCY_US)
            report["decode"].append(
                case._asdict()
                | {"name": name, "budget": None, "bytes": size, "copies": 2, "blocks": 512, "bound_us": bound}
                | {"shares": dict.fromkeys(MIXED_NAMES, 0.25), "fraction_of_bound": bound / us}
                | measurement(us)
            )
        report["grids"] += [
            case._asdict() | {"blocks": blocks, "chosen": blocks == 512} | measurement(10.0) for blocks in (512, 256)
        ]
    for case in options.prefill:
        for name in (*PEERS, *PREFILL_NAMES):
            for causal in (True,) if name in PEERS else (True, False):
                us = case.flop() / (400e6 if name == "sdpa_cudnn" else 100e6)
                tiles = 1000 if causal else 1500
                us *= 1 if causal else 1.5 / (1.06 if name == "int4" else 1.04)
                report["prefill"].append(
                    case._asdict()
                    | {"name": name, "budget": None, "bytes": case.fp16_bytes, "copies": 2, "shares": None}
                    | {"causal": causal, "mask": "is_causal" if name in PEERS else None, "tiles": tiles}
                    | {"flop": case.flop(causal), "tflop_per_s": case.flop(causal) / us / 1e6}
                    | measurement(us)
                )
    for case in options.few_tokens:
        for tokens in FEW_TOKENS:
            for name, us in (("decode", 4.0 * tokens), ("prefill", 40.0)):
                row = case._replace(tokens=tokens)._asdict() | {"name": name, "blocks": 512, "bytes": 1, "copies": 2}
                report["few_tokens"].append(row | measurement(us))
    for case in options.observed:
        for name in OBSERVED_FORMATS:
            for observed in (False, True):
                us = 50 * (1 if not observed else 1.04 if name == "int4" else 1.01)
                row = case._asdict() | {"name": name, "observed": observed, "blocks": 512, "bytes": 1, "copies": 2}
                report["observed"].append(row | measurement(us))
    report["targets"] = evaluate_targets(report)
    return report


def check_tables(report: dict[str, Any]) -> dict[str, Any]:
    found = tables(report)
    for table in found.values():
        assert all(len(row) == len(table.headings) for row in table.rows), table.title
        assert all(isinstance(cell, str) for row in table.rows for cell in row), table.title
    return found


def test_ratios() -> None:
    report = synthetic_report()
    fp16_us = LARGE.fp16_bytes / 3e6
    best = best_sdpa(report, LARGE)
    assert best is not None
    assert best["name"] == "sdpa_cudnn"
    assert speed(report, LARGE, "int4") == pytest.approx(fp16_us / (fp16_us / 4 + LATENCY_US))
    found = gain(report, LARGE, 0.2)
    assert found is not None
    assert found.bytes == pytest.approx(2.5, rel=1e-6)
    assert found.share == pytest.approx((fp16_us / 2 + LATENCY_US) / (fp16_us / 5 + LATENCY_US) / 2.5, rel=1e-6)
    find(report, LARGE, "int8").update(us=None)  # type: ignore[union-attr]
    assert gain(report, LARGE, 0.2) is None
    assert speed(report, LARGE, "int8") is None
    assert speed(report, Case(1, 1, 1, 64, 64), "int8") is None


def test_targets_are_computed_from_the_rows() -> None:
    report = synthetic_report()
    found = {row["what"]: row for row in evaluate_targets(report)}
    assert len(found) == len(report["targets"])
    large = found["int4, B16 32:8 D128 S16384, against the best SDPA"]
    assert (large["target"], large["met"], large["then"], large["then_met"]) == (2.5, True, 3.3, True)
    assert found["int4, B16 32:8 D128 S16384, of the byte roofline"]["met"] is True
    small = found["int4, B16 8:8 D64 S2048"]
    assert (small["direction"], small["target"], small["met"], small["then"], small["then_met"]) == (
        "at most", 10.0, True, 6.0, False,
    )  # fmt: skip
    assert found["int8, B16 8:8 D64 S2048"]["then"] is None
    mixtures = [row for what, row in found.items() if what.startswith("8/4/3/2")]
    assert [row["what"].split(":")[0] for row in mixtures] == [
        f"8/4/3/2, B{sequences}, contexts to 16384" for sequences in (1, 16) for _ in range(2)
    ]
    least, share = mixtures[:2]
    assert least["what"].endswith("against int8; worst: 0.5 of fp16, B1 32:8 D128 S1024")
    assert (least["measured"], least["target"], least["met"]) == (pytest.approx(1.0), 0.97, True)
    assert share["what"].endswith("of what bytes promise; worst: 0.2 of fp16, B1 8:8 D64 S1024")
    fp16_us = Case(1, 8, 8, 64, 1024).fp16_bytes / 3e6
    promised = (fp16_us / 2 + LATENCY_US) / (fp16_us / 5 + LATENCY_US) / 2.5
    assert share["measured"] == pytest.approx(promised, rel=1e-4)
    assert (share["target"], share["then"], share["then_met"]) == (None, 0.8, False)

    slow = find(report, Case(16, 8, 8, 64, 4096), mixed(0.3))
    assert slow is not None
    slow["us"] *= 2
    worst = [row for row in evaluate_targets(report) if "B16" in row["what"] and "against int8;" in row["what"]]
    assert [row["what"].split("; ")[1] for row in worst] == ["worst: 0.3 of fp16, B16 8:8 D64 S4096"]
    assert worst[0]["met"] is False
    find(report, Case(1, 8, 8, 64, 4096), mixed(0.2)).update(us=None, error="wrong")  # type: ignore[union-attr]
    again = {row["what"]: row for row in evaluate_targets(report)}
    assert again["8/4/3/2, B1, contexts to 16384: of what bytes promise; not all measured"]["measured"] is None
    assert evaluate_targets(report | {"decode": [], "prefill": [], "observed": []}) == []


def test_targets_of_prefill_and_of_observed_decode() -> None:
    report = synthetic_report()
    chunk, small = PREFILL_CASES[1], OBSERVED_CASES[0]
    assert causal_overhead(report, chunk, "int8") == pytest.approx(1.04)
    assert speed(report, chunk, "int8", "prefill", causal=True) == pytest.approx(0.25)
    assert observed_overhead(report, small, "int8") == pytest.approx(1.01)
    found = {row["what"]: row for row in report["targets"]}
    causal = found[f"prefill, {chunk.label}: causal over not causal, a visited tile; worst: int4"]
    assert (causal["measured"], causal["target"], causal["direction"], causal["met"]) == (
        pytest.approx(1.06), 1.05, "at most", False,
    )  # fmt: skip
    observed = [row for what, row in found.items() if "observed" in what]
    assert [row["what"].split(":")[0] for row in observed] == ["decode, B1", "decode, B16"]
    assert observed[0]["what"].endswith(f"worst: int4, {small.label}")
    assert (observed[0]["measured"], observed[0]["target"], observed[0]["met"]) == (pytest.approx(1.04), 1.03, False)

    find(report, chunk, "fp16", "prefill", causal=False).update(us=None)  # type: ignore[union-attr]
    assert causal_overhead(report, chunk, "fp16") is None
    [missing] = [row for row in evaluate_targets(report) if f"{chunk.label}: causal" in row["what"]]
    assert (missing["measured"], missing["met"]) == (None, None)


def test_tables_pictures_and_documents(tmp_path: Path) -> None:
    report = synthetic_report()
    found = check_tables(report)
    assert list(found) == [
        "prefill", "causal", "few-tokens", "observed", "times", "speeds", "rates", "bytes", "mixtures", "shares",
        "grids", "skipped", "copy", "targets",
    ]  # fmt: skip
    assert len(found["times"].rows) == len(cases_of(report)) == 30
    assert [row[3] for row in found["times"].rows[:3]] == ["1024", "2048", "4096"]
    assert found["grids"].rows[0][-1] == "256: 10.0"
    assert len(found["shares"].rows) == 2 * len(BUDGETS)
    assert len(found["prefill"].rows) == len(PREFILL_CASES) * 6
    chunk = ["1", "32:8", "128", "16384", "1024"]
    us = PREFILL_CASES[1].flop() / 100e6
    assert [*chunk, "int4", f"{us:.0f}", "100", "0.25", ""] in found["prefill"].rows
    assert [*chunk, "sdpa_cudnn", f"{us / 4:.1f}", "400", "–", "is_causal"] in found["prefill"].rows
    in_ns = f"{us:.2f}", f"{us / 1.06:.2f}"
    times = f"{us:.0f}", f"{us * 1.5 / 1.06:.0f}"
    assert [*chunk, "int4", times[0], "1000", in_ns[0], times[1], "1500", in_ns[1], "1.060"] in found["causal"].rows
    assert found["few-tokens"].rows[3] == ["1", "32:8", "128", "4096", "8", "32.0", "40.0", "0.80"]
    assert found["few-tokens"].rows[4][-3:] == ["64.0", "40.0", "1.60"]
    assert found["observed"].rows[1] == ["1", "32:8", "128", "1024", "int4", "50.0", "52.0", "4.0"]
    assert wrong_results(report) == []

    write_report(tmp_path / "2026-11-25-bench-attention.json", report)
    module = render_docs()
    module.RESULTS = tmp_path
    names = [name for name in module.FIGURES if name.startswith("attention-")]
    assert len(names) == 13
    for name in names:
        assert "a GPU" in module.figures(name)
    module.RESULTS = tmp_path / "none"
    assert all("`bench-attention`" in module.figures(name) for name in names)

    for row in report["decode"][:40]:
        row.update(us=None, error="failed", timing=None)
    report["grids"][0].update(us=None, error="failed")
    check_tables(report)
    failed = sum(row["name"] not in PEERS for row in report["decode"][:40])
    assert len(wrong_results(report)) == failed + 1
    for section in ("prefill", "few_tokens", "observed"):
        report[section][-1].update(us=None, error="failed", timing=None)
    check_tables(report)
    assert len(wrong_results(report)) == failed + 4
    check_tables(report | {"decode": [], "grids": []})

    plot = pytest.importorskip("kvpack.bench.plot")
    plot.plot_attention(report, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="nothing to draw"):
        plot.plot_attention(report | {"decode": []}, tmp_path / "none.png")


def test_a_report_of_decode_alone_has_decode_tables_alone(tmp_path: Path) -> None:
    """Schema 1: without the other sections, and without the number of query tokens."""
    report = synthetic_report()
    later = check_tables(report)
    for section in ("prefill", "few_tokens", "observed"):
        del report[section]
    for section in ("decode", "grids", "skipped"):
        for row in report[section]:
            del row["tokens"]
    found = check_tables(report)
    assert list(found) == list(later)[4:]
    assert all(found[name] == later[name] for name in found)
    write_report(tmp_path / "2026-11-25-bench-attention.json", report)
    module = render_docs()
    module.RESULTS = tmp_path
    assert module.figures("attention-prefill") == "`bench-attention` did not measure this.\n"


# --- a run with stand-ins for the device ---------------------------------------------


def attend_with_torch(
    q: Any,
    pages: Any,
    table: Any,
    lengths: Any,
    num_kv_heads: int,
    k_formats: Any,
    v_formats: Any,
    *,
    scale: float,
    causal: bool = True,
    observed: Any = None,
    blocks: int = 0,
) -> Any:
    assert set((table & 15).unique().tolist()) <= {int(number) for number in k_formats} & {int(n) for n in v_formats}
    cache = PageCache(pages, table, num_kv_heads, q.shape[-1])
    group = q.shape[1] // num_kv_heads
    out = torch.empty_like(q)
    for sequence, length in enumerate(lengths.tolist()):
        unseen = torch.ones(q.shape[2], length, dtype=torch.bool).triu(length - q.shape[2] + 1)
        for head in range(num_kv_heads):
            of_head = slice(head * group, (head + 1) * group)
            k, v = (cache.values(side, sequence, head).double() for side in Side)
            scores = q[sequence, of_head].double() @ k.T * scale
            p = torch.softmax(scores.masked_fill(unseen, -math.inf) if causal else scores, dim=-1)
            out[sequence, of_head] = (p @ v).half()
            if observed is not None:
                observed.mass[sequence] += (p.sum((0, 1)).view(-1, 64).sum(1) * (1 << 32)).long()
    if observed is not None:
        observed.steps.add_(1)
    return out


@dataclass(frozen=True)
class Observed:
    mass: Any
    steps: Any


SMALL_CASES = {
    "QUICK_PREFILL_CASES": (Case(1, 4, 2, 64, 128, 128), CHUNK),
    "PREFILL_CASES": (),
    "FEW_TOKENS_CASES": (Case(1, 4, 2, 64, 128),),
    "OBSERVED_CASES": (Case(2, 4, 2, 64, 128),),
}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # many small tensors: threads that wait for each other take most of the time
    backend = bench_attention.SDPBackend.MATH
    monkeypatch.setattr(bench_attention, "DEVICE", "cpu")
    monkeypatch.setattr(bench_attention, "measure", fake_measure)
    monkeypatch.setattr(bench_attention, "BACKENDS", dict.fromkeys(PEERS, backend))
    monkeypatch.setattr(bench_attention, "MAX_COPIES", 2)
    monkeypatch.setattr(bench_attention, "free_bytes", lambda: 1 << 40)
    monkeypatch.setattr(bench_attention, "multiprocessors", lambda: 3)
    monkeypatch.setattr(bench_attention.semaphores, "prepare", lambda device: None)
    monkeypatch.setattr(bench_run, "device_report", lambda: DEVICE)
    monkeypatch.setattr(bench_run, "require_cuda", lambda command: None)
    monkeypatch.setattr(
        bench_attention, "copy_bandwidth", lambda size: {"bytes": float(size), "us": 1.0, "gb_per_s": 4000.0}
    )
    monkeypatch.setattr(bench_attention.attention_kernels, "decode", attend_with_torch)
    monkeypatch.setattr(bench_attention.attention_kernels, "prefill", attend_with_torch)
    monkeypatch.setattr(bench_attention.attention_kernels, "Observed", Observed, raising=False)
    for name, cases in SMALL_CASES.items():
        monkeypatch.setattr(bench_attention_report, name, cases)
    yield bench_attention
    torch.set_num_threads(threads)


def small(**options: Any) -> Any:
    return parse_options(models="4:2x64", sequences="1,3", contexts="128,576", quick=True, **options)


def smallest() -> Any:
    """For what is not about decode: one case of it."""
    return parse_options(models="4:2x64", sequences="1", contexts="128", quick=True)


def test_a_run_measures_everything_and_reports_as_it_goes(bench: Any) -> None:
    seen: list[str] = []
    stages: list[str] = []
    report = bench.bench_attention(small(), lambda so_far: seen.append(json.dumps(so_far)), stages.append)
    assert report.keys() == TOP_KEYS
    assert (report["complete"], report["stopped"], wrong_results(report)) == (True, None, [])
    assert stages == [
        "copy",
        "prefill, B1 4:2 D64 S128 T128",
        "prefill, B2 4:2 D64 S192 T128",
        "few query tokens, B1 4:2 D64 S128",
        "observed, B2 4:2 D64 S128",
        *(f"decode, B{sequences} 4:2 D64 S{context}" for context in (128, 576) for sequences in (1, 3)),
    ]
    assert len(seen) > 5
    names = [*PEERS, *UNIFORM, mixed(0.2), mixed(0.4)]
    assert [row["name"] for row in report["decode"]] == 4 * names
    last = Case(3, 4, 2, 64, 576)
    for name in names:
        row = find(report, last, name)
        assert row is not None, name
        assert row["relative_error"] <= 1e-3
        assert row["bound_us"] == pytest.approx(row["bytes"] / 4e6)
        assert row["fraction_of_bound"] == pytest.approx(row["bound_us"] / row["us"])
        assert row["copies"] == 2
    mixture_row, whole = find(report, last, mixed(0.4)), find(report, last, "fp16")
    assert mixture_row is not None
    assert whole is not None
    assert 0.35 < mixture_row["bytes"] / whole["bytes"] <= 0.4
    assert sum(mixture_row["shares"].values()) == pytest.approx(1)
    assert whole["bytes"] == last.fp16_bytes
    assert sum(row["chosen"] for row in report["grids"]) == 4
    assert all(row["blocks"] >= 1 for row in report["grids"])
    check_tables(report)


def test_a_run_measures_prefill_few_tokens_and_observed_decode(bench: Any) -> None:
    report = bench.bench_attention(smallest())
    whole, chunk = SMALL_CASES["QUICK_PREFILL_CASES"]
    expected = [(name, True) for name in PEERS] + [(name, causal) for name in PREFILL_NAMES for causal in (True, False)]
    assert [(row["name"], row["causal"]) for row in report["prefill"]] == 2 * expected
    for row in report["prefill"]:
        assert row["relative_error"] <= 1e-3
        assert row["tflop_per_s"] == pytest.approx(row["flop"] / row["us"] / 1e6)
    # A chunk's own pages are in 16 bits, and so is a whole prompt.
    assert find(report, whole, "int4", "prefill")["shares"] == {"fp16": 1.0}  # type: ignore[index]
    of_chunk = find(report, chunk, "int4", "prefill", causal=False)
    assert of_chunk is not None
    assert of_chunk["shares"] == {"fp16": pytest.approx(2 / 3), "int4": pytest.approx(1 / 3)}
    assert (of_chunk["tiles"], of_chunk["flop"]) == (36, CHUNK.flop(causal=False))
    assert of_chunk["bytes"] == 2 * 2 * (pair_bytes(PageFormat.INT4, 64) + 2 * pair_bytes(PageFormat.FP16, 64))
    masks = [find(report, chunk, name, "prefill")["mask"] for name in PEERS]  # type: ignore[index]
    assert masks == ["causal_lower_right", "additive mask"]

    few = [(row["tokens"], row["name"]) for row in report["few_tokens"]]
    assert few == [(tokens, name) for tokens in FEW_TOKENS for name in ("decode", "prefill")]
    assert all(row["relative_error"] <= 1e-3 for row in report["few_tokens"])
    # More columns are more segments, which need more blocks.
    assert report["few_tokens"][-2]["blocks"] > report["few_tokens"][0]["blocks"]
    found = [(row["name"], row["observed"]) for row in report["observed"]]
    assert found == [(name, observed) for name in OBSERVED_FORMATS for observed in (False, True)]
    assert all(row["relative_error"] <= 1e-3 for row in report["observed"])
    check_tables(report)


def test_a_kernel_without_the_causal_limit_is_not_timed(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def blind(*arguments: Any, causal: bool = True, **options: Any) -> Any:
        return attend_with_torch(*arguments, causal=False, **options)

    monkeypatch.setattr(bench.attention_kernels, "prefill", blind)
    report = bench.bench_attention(smallest())
    for row in report["prefill"]:
        assert (row["us"] is None) == (row["causal"] and row["name"] not in PEERS)
    for row in report["few_tokens"]:
        assert (row["us"] is None) == (row["name"] == "prefill" and row["tokens"] > 1)
    assert len(wrong_results(report)) == 2 * len(PREFILL_NAMES) + len(FEW_TOKENS) - 1


def test_sums_that_nobody_adds_are_not_timed(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def idle(*arguments: Any, observed: Any = None, **options: Any) -> Any:
        return attend_with_torch(*arguments, **options)

    monkeypatch.setattr(bench.attention_kernels, "decode", idle)
    report = bench.bench_attention(smallest())
    assert all((row["us"] is None) == row["observed"] for row in report["observed"])
    assert len(wrong_results(report)) == len(OBSERVED_FORMATS)


@pytest.mark.skipif(emulator.compiler() is None, reason="no C++ compiler for the emulator")
def test_the_kernel_is_right_with_these_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_attention.attention_kernels.kernels, "launch", emulated_launch)
    monkeypatch.setattr(bench_attention, "DEVICE", "cpu")
    monkeypatch.setattr(bench_run, "device_report", lambda: DEVICE)
    run = bench_attention.AttentionBench(parse_options(), None, lambda stage: None)
    monkeypatch.setattr(bench_attention, "MAX_COPIES", 1)
    kernels = bench_attention.attention_kernels
    for case, kernel, options in (
        (Case(2, 4, 2, 64, 192), kernels.decode, {"blocks": 1}),
        (Case(2, 4, 2, 64, 192), kernels.decode, {"blocks": 5}),
        (CHUNK, kernels.prefill, {}),
        (CHUNK._replace(tokens=64), kernels.prefill, {}),
    ):
        q = run._queries(case)
        for plan in run._plans(case, ["int8", "fp8_e4m3", "int2"], [0.3]):
            [cache] = run._pages(case, plan)
            error = run._error(case, q, cache.values)
            assert 0 < error(run._call(kernel, case, q, plan, cache, **options)()) < bench_attention.TOLERANCE


def test_wrong_results_are_not_timed(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def doubled(*arguments: Any, **options: Any) -> Any:
        return 2 * attend_with_torch(*arguments, **options)

    monkeypatch.setattr(bench.attention_kernels, "decode", doubled)
    report = bench.bench_attention(parse_options(models="4:2x64", sequences="1", contexts="128"))
    mine = [row for row in report["decode"] if row["name"] not in PEERS]
    assert mine
    assert all(row["us"] is None and "WrongResult" in row["error"] for row in mine)
    others = [row for row in report["few_tokens"] if row["name"] == "decode"] + report["observed"]
    assert others
    assert all(row["us"] is None for row in others)
    assert len(wrong_results(report)) == len(mine) + len(others) + len(report["grids"])
    check_tables(report)


def test_what_does_not_fit_is_left_out_and_named(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "free_bytes", lambda: 3_000_000)
    report = bench.bench_attention(small())
    assert report["complete"] is True
    assert report["skipped"]
    assert {(row["context"], row["tokens"]) for row in report["skipped"]} == {(192, 128), (576, 1)}
    assert all(row["bytes"] > row["limit_bytes"] == 2_700_000 for row in report["skipped"])
    assert check_tables(report)["skipped"].rows


def test_a_time_limit_leaves_what_there_is(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10**6, 10))
    monkeypatch.setattr(bench_run.time, "monotonic", lambda: next(clock))
    report = bench.bench_attention(small(time_limit_s=160))
    assert (report["complete"], bool(report["decode"])) == (False, True)
    assert "time limit" in report["stopped"]


# --- the command ---------------------------------------------------------------------


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["bench", "attention", *arguments])


def test_the_command_prints_writes_and_draws(bench: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    files = tmp_path / "report.json", tmp_path / "plot.png"
    arguments = ("--models", "4:2x64", "--sequences", "2", "--contexts", "128", "--quick")
    plain = run(*arguments, "--report", str(files[0]), "--plot", str(files[1]))
    assert plain.exit_code == ExitCode.OK, plain.output
    assert "Decode attention, µs" in plain.stdout
    assert all(file.stat().st_size for file in files)
    assert json.loads(run(*arguments, "--json").stdout)["ok"] is True
