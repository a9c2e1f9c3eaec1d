"""The decode attention kernel: on the emulator, and on a GPU."""

from __future__ import annotations

import functools
import math

import emulator
import pytest

torch = pytest.importorskip("torch")

from emulated_device import emulated_launch  # noqa: E402
from paged_values import Paged, attention_error, expected_attention, paged_values  # noqa: E402

from kvpack.format.pages import PageFormat  # noqa: E402
from kvpack.runtime import attention_kernels, kernels, page_kernels  # noqa: E402

FP16, BF16, INT8, INT4, INT3, INT2, E4M3, E5M2 = PageFormat
ALL = [(page_format, page_format) for page_format in (FP16, INT8, INT4, INT3, INT2, E4M3, E5M2)]
MIXED = [(INT4, INT2), (INT8, INT3)]
# lengths, query heads, KV heads, head_dim, dtype, formats of K and V, query tokens, blocks, window, sinks
CASES = {
    **{a.name: ([128], 4, 1, 64, torch.float16, [(a, b)], 1, 3, 0, 0) for a, b in ALL},
    "all formats": ([200], 8, 2, 64, torch.float16, ALL, 1, 5, 0, 0),
    "lengths of a batch": ([1, 63, 64, 65, 0, 333], 14, 2, 80, torch.bfloat16, [*MIXED, (BF16, BF16)], 1, 4, 0, 0),
    "32 heads to one": ([130, 70], 32, 1, 128, torch.float16, [(INT4, INT4)], 1, 7, 0, 0),
    "one to one": ([130, 70], 3, 3, 64, torch.float16, [(INT3, INT8)], 1, 7, 0, 0),
    "several tokens": ([300, 129, 4], 8, 4, 64, torch.float16, MIXED, 5, 4, 0, 0),
    "window and sinks": ([700], 8, 4, 64, torch.float16, MIXED, 3, 4, 150, 4),
    "wide": ([300], 2, 1, 256, torch.bfloat16, MIXED, 1, 4, 0, 0),
    "a block a page": ([300], 2, 1, 96, torch.bfloat16, MIXED, 1, 1000, 0, 0),
}


def attend(name: str, device: str) -> tuple[torch.Tensor, Paged, torch.Tensor]:
    """(result, what was attended to, queries)"""
    lengths, heads, kv_heads, head_dim, dtype, formats, tokens, blocks, window, sinks = CASES[name]
    paged = paged_values(lengths, kv_heads, head_dim, dtype, formats)
    q = torch.randn(len(lengths), heads, tokens, head_dim, generator=torch.Generator().manual_seed(0)).to(dtype)
    there = paged.to(device) if device == "cuda" else paged
    own = page_kernels.PAGE_FORMATS[dtype]
    out = attention_kernels.decode(
        q.to(device),
        None if device == "cuda" else there.pages,
        there.table,
        there.lengths,
        kv_heads,
        {own, *(k for k, _ in formats)},
        {own, *(v for _, v in formats)},
        scale=1 / math.sqrt(head_dim),
        blocks=blocks,
        window=window,
        sinks=sinks,
    )
    return out, paged, q


def error_of(name: str, out: torch.Tensor, paged: Paged, q: torch.Tensor) -> float:
    head_dim, window, sinks = CASES[name][3], CASES[name][8], CASES[name][9]
    return attention_error(out, expected_attention(q, paged, 1 / math.sqrt(head_dim), window, sinks))


@pytest.mark.skipif(emulator.compiler() is None, reason="no C++ compiler for the emulator")
@pytest.mark.parametrize("name", CASES)
def test_decode(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "launch", emulated_launch)
    out, paged, q = attend(name, "cpu")
    assert error_of(name, out, paged, q) < 1e-3


@pytest.mark.skipif(emulator.compiler() is None, reason="no C++ compiler for the emulator")
def test_order_of_blocks_does_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for seed in range(3):
        monkeypatch.setattr(kernels, "launch", functools.partial(emulated_launch, shuffle_seed=seed))
        results.append(attend("all formats", "cpu")[0])
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_cuda_decode(name: str) -> None:
    out, paged, q = attend(name, "cuda")
    assert error_of(name, out, paged, q) < 1e-3
    assert torch.equal(out, attend(name, "cuda")[0])
