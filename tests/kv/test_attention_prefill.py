"""Attention of many query tokens to pages: on the emulator, and on a GPU where there is one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import emulator  # noqa: E402
from emulated_device import emulated_launch  # noqa: E402
from paged_values import (  # noqa: E402
    Paged,
    Spoiled,
    attention_error,
    check_what_is_hidden,
    expected_attention,
    paged_values,
)

from kvpack.errors import PageError  # noqa: E402
from kvpack.format.pages import PageFormat as F  # noqa: E402
from kvpack.format.pages import Side  # noqa: E402
from kvpack.runtime.device import kernels, semaphores  # noqa: E402
from kvpack.runtime.kv import attention_kernels  # noqa: E402
from kvpack.runtime.kv.page_kernels import PAGE_FORMATS  # noqa: E402

HALF, BFLOAT = torch.float16, torch.bfloat16
QUANTIZED = tuple(f for f in F if f.is_quantized)
EVERY = tuple((f, f) for f in QUANTIZED)
MOST_ERROR = 1e-3
Formats = Sequence[tuple[F, F]]


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    if emulator.compiler() is None:
        pytest.skip("no C++ compiler")
    empty = torch.empty

    def poisoned(*args: object, **options: object) -> torch.Tensor:
        made = empty(*args, **options)  # type: ignore[call-overload]
        return made.fill_(math.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr(kernels, "launch", emulated_launch)
    return monkeypatch


def queries(sequences: int, heads: int, tokens: int, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
    """Queries of sizes from 1/8 to 8, since each column is divided by a power of two of its own."""
    rng = np.random.default_rng(1)
    q = rng.normal(0, 1, (sequences, heads, tokens, head_dim)) * 2.0 ** rng.integers(-3, 2, (1, heads, tokens, 1))
    return torch.from_numpy(q).to(dtype)


def compiled_formats(dtype: torch.dtype, formats: Formats, side: Side) -> set[F]:
    return {PAGE_FORMATS[dtype], *(pair[side] for pair in formats if pair[side].is_quantized)}


def prefill(q: torch.Tensor, paged: Paged, num_kv_heads: int, formats: Formats, **options: Any) -> torch.Tensor:
    return attention_kernels.prefill(
        q,
        None if q.is_cuda else paged.pages,
        paged.table,
        paged.lengths,
        num_kv_heads,
        compiled_formats(q.dtype, formats, Side.K),
        compiled_formats(q.dtype, formats, Side.V),
        scale=1 / math.sqrt(q.shape[-1]),
        **{name: value.to(q.device) if isinstance(value, torch.Tensor) else value for name, value in options.items()},
    )


def check(
    lengths: Sequence[int],
    heads: tuple[int, int],
    tokens: int,
    head_dim: int = 64,
    dtype: torch.dtype = HALF,
    formats: Formats = EVERY,
    device: str = "cpu",
    seed: int = 0,
    **options: Any,
) -> torch.Tensor:
    paged = paged_values(lengths, heads[1], head_dim, dtype, formats, seed=seed)
    q = queries(len(lengths), heads[0], tokens, head_dim, dtype)
    placed = paged if device == "cpu" else paged.to(device)
    out = prefill(q.to(device), placed, heads[1], formats, **options)
    expected = expected_attention(q, paged, 1 / math.sqrt(head_dim), **options)
    assert out.isfinite().all()
    assert attention_error(out, expected) < MOST_ERROR
    return out


@pytest.mark.parametrize("dtype", [HALF, BFLOAT])
@pytest.mark.parametrize("page_format", [None, *QUANTIZED], ids=lambda f: f.name if f else "16 bits")
def test_formats(emulated: object, page_format: F | None, dtype: torch.dtype) -> None:
    page_format = page_format or PAGE_FORMATS[dtype]
    check([192], (2, 1), 70, dtype=dtype, formats=[(page_format, page_format)])


@pytest.mark.parametrize("ratio", [1, 4, 7, 8, 32])
def test_head_ratios(emulated: object, ratio: int) -> None:
    check([64 * 7 + 3], (2 * ratio, 2), 256 // ratio + 1)


def test_lengths(emulated: object) -> None:
    """Each sequence of a batch has its own; those shorter than the queries give zeros."""
    lengths = [1, 63, 64, 65, 0, 333, 128]
    for tokens in (1, 64):
        out = check(lengths, (4, 2), tokens)
        for sequence, length in enumerate(lengths):
            assert (length < tokens) == (not out[sequence].any())


@pytest.mark.parametrize("dtype", [HALF, BFLOAT])
@pytest.mark.parametrize("head_dim", [16, 80, 96, 128, 256])
def test_head_dims(emulated: object, head_dim: int, dtype: torch.dtype) -> None:
    formats = [(F.INT4, F.INT2), (F.INT8, F.INT8), (F.INT3, F.FP8_E4M3), (PAGE_FORMATS[dtype], F.INT4)]
    check([64 * 5 + 30], (2, 1), 60, head_dim, dtype, formats)


@pytest.mark.parametrize(("window", "sinks"), [(1, 0), (64, 0), (100, 0), (100, 4), (100, 70), (150, 64), (5000, 4)])
def test_window(emulated: object, window: int, sinks: int) -> None:
    check([600, 120], (4, 2), 60, window=window, sinks=sinks)


# A cap that changes scores, and a logit of each head: some take nearly all, some little.
SOFTCAP = 2.0
VARIANTS = [("softcap",), ("sink_logits",), ("softcap", "sink_logits")]


def variant_options(names: tuple[str, ...], heads: int) -> dict[str, Any]:
    logits = torch.linspace(-2, 10, heads)
    logits[-1] = -math.inf
    values = {"softcap": SOFTCAP, "sink_logits": logits}
    return {name: values[name] for name in names}


@pytest.mark.parametrize("names", VARIANTS, ids="-".join)
def test_softcap_and_sink_logits(emulated: object, names: tuple[str, ...]) -> None:
    """Several tiles, sequences shorter than the queries, heads that share a KV head."""
    out = check([333, 65, 7], (6, 2), 60, **variant_options(names, 6))
    assert not out[2].any()
    without = check([333, 65, 7], (6, 2), 60)
    assert (out - without).abs().max() > 0.1


@pytest.mark.parametrize(("head_dim", "dtype"), [(16, BFLOAT), (256, HALF), (128, BFLOAT)])
def test_softcap_and_sink_logits_of_head_dims(emulated: object, head_dim: int, dtype: torch.dtype) -> None:
    options = variant_options(("softcap", "sink_logits"), 4) | {"window": 100, "sinks": 4}
    check([64 * 3 + 30], (4, 2), 60, head_dim, dtype, [(F.INT4, F.INT2), (PAGE_FORMATS[dtype], F.INT8)], **options)


def test_sink_logits_of_minus_infinity_are_none(emulated: object) -> None:
    """Bit for bit; and one that is larger than all scores takes all."""
    expected = check([333, 65, 7], (6, 2), 60)
    found = check([333, 65, 7], (6, 2), 60, sink_logits=torch.full((6,), -math.inf))
    assert torch.equal(found, expected)
    assert not check([333, 65, 7], (6, 2), 60, sink_logits=torch.full((6,), 1e4)).any()


def check_not_causal(dtype: torch.dtype, device: str) -> None:
    """Contexts of several tiles, whose queries see the last pages too, of fewer tokens than queries, and of none."""
    lengths, tokens = [64 * 5 + 30, 128, 7, 0], 150
    out = check(lengths, (4, 2), tokens, dtype=dtype, device=device, causal=False)
    for sequence, length in enumerate(lengths):
        assert (length == 0) == (not out[sequence].any())


@pytest.mark.parametrize("dtype", [HALF, BFLOAT])
def test_not_causal(emulated: object, dtype: torch.dtype) -> None:
    check_not_causal(dtype, "cpu")


def test_a_window_has_no_end_without_causal(emulated: object) -> None:
    with pytest.raises(PageError, match="causal=False"):
        check([128], (2, 1), 60, window=100, causal=False)


def test_pages_outside_the_window_are_not_read(emulated: object) -> None:
    paged = paged_values([640], 1, 64, HALF, EVERY)
    q = queries(1, 2, 50, 64, HALF)
    options = {"window": 100, "sinks": 4}
    # The first query attends to tokens 491 … 590, the last one to 540 … 639.
    paged.table[:, :, 1:7] = -1
    expected = expected_attention(q, paged, 1 / 8, **options)
    assert attention_error(prefill(q, paged, 1, EVERY, **options), expected) < MOST_ERROR


@pytest.mark.parametrize("dtype", [HALF, BFLOAT])
@pytest.mark.parametrize(("size", "query_size"), [(1e-3, 500), (100, 1 / 64)])
def test_sizes(emulated: object, dtype: torch.dtype, size: float, query_size: float) -> None:
    paged = paged_values([200], 1, 64, dtype, EVERY, size=size)
    q = queries(1, 4, 30, 64, dtype) * query_size
    assert attention_error(prefill(q, paged, 1, EVERY), expected_attention(q, paged, 1 / 8)) < MOST_ERROR


@pytest.mark.parametrize("dtype", [HALF, BFLOAT])
def test_scores_in_the_hundreds(emulated: object, dtype: torch.dtype) -> None:
    """One token has all of a query's attention. In 16 bits: rounded scales times queries would show."""
    paged = paged_values([200], 1, 64, dtype, [(PAGE_FORMATS[dtype],) * 2])
    q = queries(1, 4, 30, 64, dtype) * 100
    assert attention_error(prefill(q, paged, 1, []), expected_attention(q, paged, 1 / 8)) < MOST_ERROR


def test_queries_of_zeros_average(emulated: object) -> None:
    paged = paged_values([100], 1, 64, HALF, EVERY)
    q = torch.zeros(1, 1, 40, 64, dtype=HALF)
    found = prefill(q, paged, 1, EVERY)
    assert attention_error(found, expected_attention(q, paged, 1 / 8)) < MOST_ERROR


@pytest.mark.parametrize("dtype", [HALF, BFLOAT])
def test_equals_decode(emulated: object, dtype: torch.dtype) -> None:
    lengths, formats = [333, 65, 7, 200], [(F.INT8, F.INT4), (F.INT3, F.INT2), (PAGE_FORMATS[dtype],) * 2]
    paged = paged_values(lengths, 2, 80, dtype, formats)
    for tokens in (1, 5):
        q = queries(len(lengths), 14, tokens, 80, dtype)
        for options in ({}, {"window": 70, "sinks": 4}):
            decoded = attention_kernels.decode(
                q,
                paged.pages,
                paged.table,
                paged.lengths,
                2,
                compiled_formats(dtype, formats, Side.K),
                compiled_formats(dtype, formats, Side.V),
                scale=1 / math.sqrt(80),
                blocks=5,
                **options,
            )
            found = prefill(q, paged, 2, formats, **options)
            torch.testing.assert_close(found, decoded, rtol=2 * torch.finfo(dtype).eps, atol=2e-4)


# Sequence, token, dimension: in sequences of 200 and 192 tokens, and behind the end of the first.
SPOILED_PLACES = [
    (0, 20, 1),
    (0, 60, 2),
    (0, 100, 3),
    (0, 130, 18),
    (0, 199, 40),
    (0, 200, 5),
    (0, 230, 63),
    (1, 130, 3),
]


def check_hidden(
    side: Side,
    value: float,
    dtype: torch.dtype,
    formats: Formats,
    device: str,
    tokens: int,
    variant: dict[str, Any] | None = None,
    **options: int,
) -> None:
    def make(spoiled: Sequence[Spoiled]) -> Paged:
        paged = paged_values([200, 192], 2, 64, dtype, formats, spoiled=spoiled)
        return paged if device == "cpu" else paged.to(device)

    q = (queries(2, 4, tokens, 64, dtype) / 8).to(device)
    # Each place alone is of one dimension; two meet in dimension 7.
    places = [(side, *place, value) for place in SPOILED_PLACES]
    if side == Side.V:
        places += [(side, 0, 140, 7, math.inf), (side, 0, 150, 7, -math.inf)]
    # The two halves of a p that bf16 is split into may differ in sign: times inf, they add up to NaN.
    infinite = dtype == HALF
    check_what_is_hidden(
        make,
        lambda paged: prefill(q, paged, 2, formats, **options, **(variant or {})),
        places,
        tokens,
        infinite=infinite,
        **options,
    )


HIDDEN_CASES: list[tuple[int, dict[str, int]]] = [
    (150, {}),
    (30, {"window": 70, "sinks": 10}),
    (100, {"window": 40}),
    (30, {"causal": False}),
]


@pytest.mark.parametrize("dtype", [HALF, BFLOAT])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("tokens", "options"), HIDDEN_CASES, ids=str)
@pytest.mark.parametrize("side", Side)
def test_what_is_hidden_does_not_show(
    emulated: object, side: Side, tokens: int, options: dict[str, int], value: float, dtype: torch.dtype
) -> None:
    check_hidden(side, value, dtype, [(PAGE_FORMATS[dtype],) * 2], "cpu", tokens, **options)


@pytest.mark.parametrize("dtype", [HALF, BFLOAT])
@pytest.mark.parametrize("v_format", QUANTIZED)
@pytest.mark.parametrize(("tokens", "options"), HIDDEN_CASES, ids=str)
def test_what_is_hidden_in_a_quantized_page_does_not_show(
    emulated: object, tokens: int, options: dict[str, int], v_format: F, dtype: torch.dtype
) -> None:
    check_hidden(Side.V, math.nan, dtype, [(F.INT4, v_format)], "cpu", tokens, **options)


@pytest.mark.parametrize(("tokens", "options"), HIDDEN_CASES, ids=str)
@pytest.mark.parametrize("side", Side)
def test_what_is_hidden_does_not_show_with_softcap_and_sink_logits(
    emulated: object, side: Side, tokens: int, options: dict[str, int]
) -> None:
    variant = {"softcap": SOFTCAP, "sink_logits": torch.linspace(-1, 3, 4)}
    check_hidden(side, math.nan, HALF, [(F.FP16, F.FP16)], "cpu", tokens, variant, **options)


def test_order_of_blocks_and_threads(emulated: pytest.MonkeyPatch) -> None:
    paged = paged_values([64 * 8 + 5, 100], 2, 64, HALF, EVERY)
    q = queries(2, 4, 90, 64, HALF)
    results = []
    for seed in (None, 1, 2):
        emulated.setattr(kernels, "launch", partial(emulated_launch, shuffle_seed=seed))
        results.append(prefill(q, paged, 2, EVERY))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_queries_that_are_not_aligned(emulated: object) -> None:
    paged = paged_values([100], 1, 64, HALF, EVERY)
    q = queries(1, 2, 40, 64, HALF)
    odd = torch.zeros(1, 2, 40, 65, dtype=HALF)[..., 1:]
    odd.copy_(q)
    assert odd.stride(2) % 2
    assert torch.equal(prefill(odd, paged, 1, EVERY), prefill(q, paged, 1, EVERY))


def test_shared_memory() -> None:
    """A block needs no opt-in at any head dimension."""
    assert max(attention_kernels.prefill_shape(head_dim).shared_bytes for head_dim in range(16, 257, 16)) <= 48 << 10


# On a GPU ------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [HALF, BFLOAT])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_head_dims_on_a_gpu(head_dim: int, dtype: torch.dtype) -> None:
    check([1500, 777, 65, 64, 63, 1, 0], (8, 2), 60, head_dim, dtype, device="cuda")
    check([64 * 20], (4, 1), 100, head_dim, dtype, [(PAGE_FORMATS[dtype],) * 2], device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("ratio", [1, 4, 7, 8, 32])
def test_head_ratios_on_a_gpu(ratio: int) -> None:
    check([700, 1300], (2 * ratio, 2), 512 // ratio + 1, 128, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize(("window", "sinks"), [(1, 0), (64, 0), (100, 4), (150, 64), (1000, 4)])
def test_window_on_a_gpu(window: int, sinks: int) -> None:
    check([1600, 320], (4, 2), 130, 128, BFLOAT, device="cuda", window=window, sinks=sinks)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not written shows, on a GPU."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *arguments, **options: empty(*arguments, **options).fill_(math.nan))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [HALF, BFLOAT])
@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("names", VARIANTS, ids="-".join)
def test_softcap_and_sink_logits_on_a_gpu(
    names: tuple[str, ...], head_dim: int, dtype: torch.dtype, poisoned: None
) -> None:
    """Pages of all quantized formats and of 16 bits, ragged lengths, with and without windows and causal limits."""
    variant = variant_options(names, 8)
    lengths = [1500, 777, 65, 64, 63, 1, 0]
    for options in ({}, {"window": 100, "sinks": 4}, {"window": 1000}, {"causal": False}):
        # q · scale, rounded to fp16, is alike for a page's tokens: at head_dim 16 that moves some draws by 0.0013.
        check(lengths, (8, 2), 60, head_dim, dtype, device="cuda", seed=1, **variant, **options)
        check(
            [64 * 20], (8, 1), 100, head_dim, dtype, [(PAGE_FORMATS[dtype],) * 2], device="cuda", **variant, **options
        )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [HALF, BFLOAT])
@pytest.mark.parametrize(("tokens", "options"), HIDDEN_CASES, ids=str)
def test_what_is_hidden_does_not_show_with_softcap_and_sink_logits_on_a_gpu(
    tokens: int, options: dict[str, int], dtype: torch.dtype
) -> None:
    variant = {"softcap": SOFTCAP, "sink_logits": torch.linspace(-1, 3, 4)}
    for side in Side:
        check_hidden(side, math.nan, dtype, [(PAGE_FORMATS[dtype],) * 2], "cuda", tokens, variant, **options)
    for v_format in QUANTIZED:
        check_hidden(Side.V, math.nan, dtype, [(F.INT4, v_format)], "cuda", tokens, variant, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [HALF, BFLOAT])
def test_not_causal_on_a_gpu(dtype: torch.dtype) -> None:
    check_not_causal(dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [HALF, BFLOAT])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("tokens", "options"), HIDDEN_CASES, ids=str)
def test_what_is_hidden_does_not_show_on_a_gpu(
    tokens: int, options: dict[str, int], value: float, dtype: torch.dtype
) -> None:
    for side in Side:
        check_hidden(side, value, dtype, [(PAGE_FORMATS[dtype],) * 2], "cuda", tokens, **options)
    for v_format in QUANTIZED:
        check_hidden(Side.V, value, dtype, [(F.INT4, v_format)], "cuda", tokens, **options)


@pytest.mark.gpu
def test_same_results_each_time_and_as_decode_on_a_gpu() -> None:
    paged = paged_values([3000, 1111], 4, 128, HALF, EVERY).to("cuda")
    q = queries(2, 16, 512, 128, HALF).cuda()
    first = prefill(q, paged, 4, EVERY)
    for _ in range(5):
        assert torch.equal(prefill(q, paged, 4, EVERY), first)
    semaphores.prepare(q.device)
    last = q[:, :, -4:]
    formats = [compiled_formats(HALF, EVERY, side) for side in Side]
    decoded = attention_kernels.decode(
        last, None, paged.table, paged.lengths, 4, *formats, scale=1 / math.sqrt(128), blocks=200
    )
    torch.testing.assert_close(first[:, :, -4:], decoded, rtol=2 * torch.finfo(HALF).eps, atol=2e-4)
