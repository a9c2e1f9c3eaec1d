"""Ranges of keys by page, and attention to the pages that are chosen by them."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import emulator
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from emulated_device import emulated_launch  # noqa: E402

from kvpack import CacheInputError, KVCache, PageFormat  # noqa: E402
from kvpack.format.pages import PAGE_TOKENS, Side  # noqa: E402
from kvpack.runtime.device import kernels  # noqa: E402
from kvpack.runtime.kv import attention, retrieval  # noqa: E402
from kvpack.runtime.kv.page_summaries import key_ranges, summarize_by_kernel  # noqa: E402
from kvpack.runtime.kv.retrieval import WIDTH, chosen_pages, retrieve  # noqa: E402

FORMATS = [None, *(page_format for page_format in PageFormat if page_format.is_quantized)]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
KV_HEADS, HEADS, HEAD_DIM = 2, 4, 32


def filled(
    tokens: list[int], page_format: PageFormat | None = PageFormat.INT4, device: str = "cpu", **options: Any
) -> KVCache:
    """Each row has so many tokens; keys are not centered, so that middles of ranges matter."""
    options = {"formats": page_format} | options
    cache = KVCache(1, KV_HEADS, HEAD_DIM, 4096, max_sequences=len(tokens), device=device, **options)
    random = torch.Generator().manual_seed(7)
    for row, count in enumerate(tokens):
        k, v = torch.randn(2, 1, KV_HEADS, count, HEAD_DIM, generator=random)
        k = 2 * k + torch.linspace(-3, 3, HEAD_DIM)
        cache.append(0, *(x.to(device, cache.dtype) for x in (k, v)), [row])
    return cache


def queries(batch: int, cache: KVCache, seed: int = 0) -> tuple[Any, Any, Any]:
    """q, k and v of a token."""
    x = torch.randn(batch, HEADS + 2 * KV_HEADS, 1, HEAD_DIM, generator=torch.Generator().manual_seed(seed))
    q, k, v = x.to(cache.device, cache.dtype).split([HEADS, KV_HEADS, KV_HEADS], 1)
    return q, k, v


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("page_format", FORMATS, ids=str)
def test_ranges_hold_all_keys_of_a_page(page_format: PageFormat | None, dtype: Any, device: str) -> None:
    order = (1, 0)  # not the one that caches have by themselves
    cache = filled([6 * PAGE_TOKENS + 5], page_format, device, dtype=dtype, key_order=order)
    entries = cache.entries[0, Side.K, 0, :6]
    k, _ = cache.read(0, 0, torch.float32)
    by_page = k[:, : 6 * PAGE_TOKENS].unflatten(1, (6, PAGE_TOKENS)).transpose(0, 1)  # [pages, heads, tokens, head_dim]
    shuffled = np.array([4, 1, 5, 0, 3, 2])
    middle, half = key_ranges(cache.pools, entries[shuffled])
    away = (by_page[shuffled] - middle[:, :, None]).abs()
    slack = 1e-5 * (1 + middle.abs() + half)[:, :, None]
    assert (away <= half[:, :, None] + slack).all()
    # No wider than what is there calls for: levels go from the least to the greatest value, or nearly so.
    least, greatest = by_page[shuffled].amin(2), by_page[shuffled].amax(2)
    width = 2 * half / (greatest - least)
    assert width.max() < (1.001 if page_format is None else 1.8)


EMULATED = pytest.mark.skipif(emulator.compiler() is None, reason="no C++ compiler for the emulator")


@EMULATED
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("page_format", FORMATS, ids=str)
def test_the_kernel_summarizes_as_the_cpu_does(
    page_format: PageFormat | None, dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "launch", emulated_launch)
    cache = filled([5 * PAGE_TOKENS], page_format, dtype=dtype, key_order=(1, 0), max_bytes=1 << 20, recent_tokens=0)
    ranges = cache.summaries.of(0, [0], [5], cache.entries[0, Side.K])
    found = torch.full((1, 7, *ranges.shape[2:]), 7.0, dtype=torch.float16)
    places = [6, 0, 3, 1, 4]
    jobs = torch.tensor(list(zip(cache.entries[0, Side.K, 0, :5].tolist(), places, strict=True)))
    summarize_by_kernel(cache.pools, jobs, found, cache.key_order)
    assert torch.equal(found[0, places], ranges[0, :5])
    assert (found[0, [2, 5]] == 7).all()


@EMULATED
def test_ranges_that_fp16_cannot_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "launch", emulated_launch)
    cache = KVCache(1, 1, 16, 256, device="cpu", dtype=torch.bfloat16, max_bytes=1 << 20)
    k = torch.randn(1, 1, 192, 16).bfloat16()
    k[0, 0, 70, 3], k[0, 0, 100, 4], k[0, 0, 130, 5] = 1e5, math.nan, math.inf
    cache.append(0, k, k)
    ranges = cache.summaries.of(0, [0], [3], cache.entries[0, Side.K])
    assert ranges.isnan().any(-1).nonzero().tolist() == [[0, 1, 0, 4], [0, 2, 0, 5]]
    assert ranges[0, 1, 0, 3].tolist() == pytest.approx([5e4, 5e4], rel=2e-3)
    found = torch.empty_like(ranges)
    summarize_by_kernel(
        cache.pools, torch.tensor([[e, i] for i, e in enumerate(cache.entries[0, 0, 0, :3].tolist())]), found, ()
    )
    assert torch.equal(found.nan_to_num(nan=7.0), ranges[:, :3].nan_to_num(nan=7.0))


@EMULATED
@pytest.mark.parametrize(("kv_heads", "group", "head_dim"), [(2, 2, 32), (3, 6, 80), (1, 1, 16)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_kernel_scores_as_the_cpu_does(
    kv_heads: int, group: int, head_dim: int, dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "launch", emulated_launch)
    random = torch.Generator().manual_seed(3)
    ranges = torch.randn(4, 70, kv_heads, head_dim, 2, generator=random).half()
    q = torch.randn(2, 1, kv_heads * group, head_dim, generator=random).to(dtype).expand(2, 3, -1, -1)[:, 1]
    rows = torch.tensor([3, 1])
    expected = retrieval._scores_on_cpu(q, ranges, rows, 67, 0.3)
    found = retrieval._scores_by_kernel(q, ranges, rows, 67, 0.3)
    assert (found - expected).abs().max() < 1e-4
    assert found.shape == (2, kv_heads * group, 67)


@pytest.mark.parametrize("device", DEVICES)
def test_enough_pages_are_full_attention_bit_for_bit(device: str) -> None:
    cache = filled([700, 64, 130], device=device)
    x = queries(3, cache)
    options: dict[str, Any] = {"update_cache": False}
    expected = cache.attend(0, *x, **options)
    for pages in (11, 12, 1000):
        assert torch.equal(cache.attend(0, *x, pages=pages, **options), expected)
    assert not torch.equal(cache.attend(0, *x, pages=10, **options), expected)


def test_the_page_that_matters_least_is_left_out() -> None:
    cache = filled([700])
    view = next_view(cache, [0])
    q = queries(1, cache)[0][:, :, 0]
    found = retrieve(q, view, [700], 10, 0.2)
    assert found is not None
    middle, half = key_ranges(cache.pools, cache.entries[0, Side.K, 0, :10])
    grouped = q[0].float().unflatten(0, (KV_HEADS, -1))
    by_head = torch.einsum("hgd,phd->hgp", grouped, middle) + WIDTH * torch.einsum("hgd,phd->hgp", grouped.abs(), half)
    scores = (0.2 * by_head).softmax(-1).sum((0, 1))
    least = 1 + int(scores[1:9].argmin())
    assert found.indices.tolist() == [[page for page in range(11) if page != least]]
    assert torch.equal(found.view.page_table, view.page_table[:, :, found.indices[0]])
    assert found.view.lengths.tolist() == [700 - PAGE_TOKENS]
    assert retrieve(q, view, [700], 11, 0.2) is None
    chosen = chosen_pages(torch.zeros(2, 10), torch.tensor([11, 4]), 11)
    assert chosen.tolist() == [list(range(11))] * 2
    scores = torch.tensor([[9.0, 1, math.nan, 3, -math.inf, 2, 0, 9]])
    assert chosen_pages(scores, torch.tensor([9]), 5).tolist() == [[0, 3, 5, 7, 8]]


def next_view(cache: KVCache, rows: list[int]) -> Any:
    none = torch.empty(len(rows), KV_HEADS, 0, HEAD_DIM, dtype=cache.dtype, device=cache.device)
    with cache.writing(0, none, none, rows) as view:
        return view


def expected_output(cache: KVCache, row: int, q: Any, k: Any, v: Any, pages: list[int], **options: Any) -> Any:
    """[heads, head_dim] in fp64, of the tokens of these pages and one more, and what share each page has, by head."""
    held = [
        torch.cat([x, new[row].float()], 1).double()
        for x, new in zip(cache.read(0, row, torch.float32), (k, v), strict=False)
    ]
    tokens = held[0].shape[1]
    seen = torch.isin(torch.arange(tokens) // PAGE_TOKENS, torch.tensor(pages))
    keys, values = (x.repeat_interleave(HEADS // KV_HEADS, 0) for x in held)
    scores = torch.einsum("hd,htd->ht", q[row, :, 0].double(), keys) / math.sqrt(HEAD_DIM)
    if "softcap" in options:
        scores = (scores / options["softcap"]).tanh() * options["softcap"]
    p = scores.masked_fill(~seen, -math.inf).softmax(-1)
    by_page = torch.nn.functional.pad(p, (0, -tokens % PAGE_TOKENS)).unflatten(-1, (-1, PAGE_TOKENS)).sum(-1)
    return torch.einsum("ht,htd->hd", p, values), by_page


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}], ids=str)
@pytest.mark.parametrize("page_format", [None, PageFormat.INT4], ids=str)
def test_attention_to_chosen_pages_and_its_masses(page_format: PageFormat | None, options: dict[str, float]) -> None:
    lengths = [831, 64, 448, 130]  # the first token of a page, of a sequence that has all, of one that has too many
    cache = filled(lengths, page_format)
    q, k, v = queries(4, cache)
    view = next_view(cache, [0, 1, 2, 3])
    found = retrieve(q[:, :, 0], view, [length + 1 for length in lengths], 5, HEAD_DIM**-0.5, options.get("softcap"))
    assert found is not None
    expected = []
    for row, length in enumerate(lengths):
        count = length // PAGE_TOKENS + 1
        pages = found.indices[row, : min(5, count)].tolist()
        assert pages == sorted(set(pages))
        assert {0, count - 1} <= set(pages)
        expected.append(expected_output(cache, row, q, k, v, pages, **options))
    out = cache.attend(0, q, k, v, pages=5, observe=True, **options)
    for row, (wanted, share) in enumerate(expected):
        assert (out[row, :, 0] - wanted).abs().max() < 2e-3
        mass = cache.mass[0, row, : share.shape[1]] / cache.mass[0, row].sum()
        assert torch.allclose(mass.double(), share.mean(0), atol=1e-6)
    assert cache.mass[0, 0].count_nonzero() == 5
    assert cache.length(0, 0) == 832


@pytest.mark.skipif(emulator.compiler() is None, reason="no C++ compiler for the emulator")
@pytest.mark.parametrize("rows", [[0, 1, 2], [2, 0]], ids=str)
def test_the_kernel_attends_to_the_same_pages(rows: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    caches = [filled([511, 64, 330], max_bytes=4 << 20) for _ in range(2)]
    x = queries(len(rows), caches[0])
    options: dict[str, Any] = {"pages": 4, "observe": True}
    expected = caches[0].attend(0, *x, rows, **options)
    monkeypatch.setattr(kernels, "launch", emulated_launch)
    monkeypatch.setattr(attention, "_attend_on_cpu", attention._attend_by_kernel)
    monkeypatch.setattr(attention, "device_limits", lambda _: SimpleNamespace(multiprocessors=4))
    found = caches[1].attend(0, *x, rows, **options)
    assert (found - expected).abs().max() < 2e-3
    shares = [cache.mass[0].double() / cache.mass[0, rows].sum(1).min() for cache in caches]
    assert torch.allclose(*shares, atol=2e-4)
    assert caches[0].mass[0, 0].count_nonzero() == 4
    assert torch.equal(caches[0].observed_steps, caches[1].observed_steps)


@pytest.mark.parametrize("page_format", [None, PageFormat.INT4, PageFormat.INT2], ids=str)
def test_needles_are_found(page_format: PageFormat | None) -> None:
    """Of one key a page that a head's queries point to; each of two KV heads has its own."""
    tokens, needles = 64 * 64, (1000, 3001)
    random = torch.Generator().manual_seed(1)
    k, v = torch.randn(2, 1, KV_HEADS, tokens, HEAD_DIM, generator=random)
    q = torch.randn(1, HEADS, 1, HEAD_DIM, generator=random)
    for head, token in enumerate(needles):
        k[0, head, token] = 5 * q[0, 2 * head, 0]
        q[0, 2 * head + 1] = q[0, 2 * head]
    cache = KVCache(1, KV_HEADS, HEAD_DIM, tokens, device="cpu", formats=page_format)
    cache.append(0, k.half(), v.half())
    full = cache.attend(0, q.half())
    few = cache.attend(0, q.half(), pages=5)
    assert (few - full).abs().max() < 0.02
    found = retrieve(q[:, :, 0], next_view(cache, [0]), [tokens], 5, HEAD_DIM**-0.5)
    assert found is not None
    assert {token // PAGE_TOKENS for token in needles} <= set(found.indices[0].tolist())


def test_pages_that_hold_what_is_no_number_are_chosen() -> None:
    k, v = torch.randn(2, 1, KV_HEADS, 1024, HEAD_DIM).half()
    k[0, 1, 300, 3] = math.nan
    cache = KVCache(1, KV_HEADS, HEAD_DIM, 1024, device="cpu")
    cache.append(0, k, v)
    q = torch.randn(1, HEADS, 1, HEAD_DIM).half()
    assert cache.attend(0, q, pages=4).isnan().any()
    assert cache.attend(0, q).isnan().any()


def test_rows_with_more_tokens_attend_to_all_pages() -> None:
    cache = filled([700, 700])
    q, k, v = (torch.cat([x, x.flip(-1)], 2) for x in queries(2, cache))
    options: dict[str, Any] = {"update_cache": False, "tokens": [2, 1]}
    full, few = (cache.attend(0, q, k, v, pages=pages, **options) for pages in (None, 4))
    assert torch.equal(full[0], few[0])
    assert not torch.equal(full[1], few[1])
    alone = cache.attend(0, *(x[1:, :, 1:] for x in (q, k, v)), [1], update_cache=False, pages=4)
    assert torch.equal(alone[0, :, 0], few[1, :, 1])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pages": 2}, "at least 3"),
        ({"pages": True}, "at least 3"),
        ({"pages": 2.5}, "an integer is wanted"),
        ({"pages": 4, "window": 128}, "either pages or a window"),
    ],
    ids=str,
)
def test_what_cannot_be_chosen_is_said(options: dict[str, Any], words: str) -> None:
    cache = filled([300])
    with pytest.raises(CacheInputError, match=words):
        cache.attend(0, *queries(1, cache), **options)
    assert cache.length(0, 0) == 300
