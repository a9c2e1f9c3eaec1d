"""The decode attention kernel: on the emulator, and on a GPU."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import emulator
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from emulated_device import emulated_launch  # noqa: E402
from paged_values import (  # noqa: E402
    Paged,
    Spoiled,
    attention_error,
    check_what_is_hidden,
    expected_attention,
    expected_mass,
    paged_values,
)

from kvpack.errors import PageError  # noqa: E402
from kvpack.format.pages import PageFormat, Side  # noqa: E402
from kvpack.runtime.device import kernels  # noqa: E402
from kvpack.runtime.kv import attention_kernels, page_kernels  # noqa: E402
from kvpack.runtime.kv.attention_kernels import MASS_FRACTION_BITS, Observed  # noqa: E402

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
    "tokens of two pages": ([66, 130], 4, 2, 64, torch.float16, MIXED, 5, 5, 0, 0),
    "window and sinks": ([700], 8, 4, 64, torch.float16, MIXED, 3, 4, 150, 4),
    "three pairs of columns": ([700, 130], 10, 2, 48, torch.float16, MIXED, 1, 40, 0, 0),
    "one group": ([1500], 6, 1, 16, torch.bfloat16, [(INT8, INT8)], 1, 24, 0, 0),
    "seven groups": ([2000], 3, 1, 112, torch.float16, [(INT8, INT4)], 1, 32, 0, 0),
    "eleven groups": ([400, 900], 10, 2, 176, torch.float16, MIXED, 1, 25, 0, 0),
    "many parts": ([64 * 40], 8, 1, 64, torch.float16, [(INT4, INT4)], 1, 40, 0, 0),
    "many parts of four heads": ([64 * 40], 4, 1, 16, torch.float16, [(INT4, INT4)], 1, 40, 0, 0),
    "many parts of one": ([64 * 70], 1, 1, 128, torch.float16, [(INT8, INT8)], 1, 70, 0, 0),
    "wide": ([300], 2, 1, 256, torch.bfloat16, MIXED, 1, 4, 0, 0),
    "a block a page": ([300], 2, 1, 96, torch.bfloat16, MIXED, 1, 1000, 0, 0),
    "many pages": ([64 * 600], 2, 1, 16, torch.float16, [(FP16, FP16)], 1, 3, 0, 0),
}
# A cap that changes scores, whose deviation is above 1, and a logit of each head: some take nearly all, some little.
SOFTCAP = 2.0
VARIANTS = [("softcap",), ("sink_logits",), ("softcap", "sink_logits")]
# For the emulator: parts of one, two and four pairs of columns are put together there, and blocks that are alone.
VARIANT_CASES = [
    ("all formats", ("softcap", "sink_logits")),
    ("lengths of a batch", ("softcap", "sink_logits")),
    ("window and sinks", ("softcap", "sink_logits")),
    ("three pairs of columns", ("sink_logits",)),
    ("many parts of four heads", ("sink_logits",)),
    ("many parts of one", ("sink_logits",)),
    ("wide", ("softcap",)),
]
NOT_CAUSAL = ("all formats", "lengths of a batch", "several tokens", "tokens of two pages", "a block a page")
# Errors of a page's mass. Queries times K's scales are rounded to fp16, which is 4e-5 of a mass here. With pages of
# 16 bits fp32 remains; and the sum over pages is that of the weights whatever the scores are.
MASS_ERROR, FP32_MASS_ERROR = 1e-4, 5e-7
OF_16_BITS = {
    f"{name}, 16 bits": (*case[:5], [(page_kernels.PAGE_FORMATS[case[4]],) * 2], *case[6:])
    for name, case in CASES.items()
    if name not in PageFormat.__members__
}
MASS_CASES = CASES | OF_16_BITS
EMULATED = pytest.mark.skipif(emulator.compiler() is None, reason="no C++ compiler for the emulator")


def variant_options(name: str, names: tuple[str, ...]) -> dict[str, Any]:
    logits = torch.linspace(10, -2, MASS_CASES[name][1])
    logits[1:2] = -math.inf
    values = {"softcap": SOFTCAP, "sink_logits": logits}
    return {option: values[option] for option in names}


def attend(
    name: str, device: str, *, causal: bool = True, observed: Observed | None = None, **variant: Any
) -> tuple[torch.Tensor, Paged, torch.Tensor]:
    """(result, what was attended to, queries)"""
    lengths, heads, kv_heads, head_dim, dtype, formats, tokens, blocks, window, sinks = MASS_CASES[name]
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
        causal=causal,
        observed=observed,
        **{option: value.to(device) if isinstance(value, torch.Tensor) else value for option, value in variant.items()},
    )
    return out, paged, q


def definition(name: str, **options: Any) -> dict[str, Any]:
    """What the definitions take of a case."""
    case = MASS_CASES[name]
    return {"scale": 1 / math.sqrt(case[3]), "window": case[8], "sinks": case[9]} | options


def error_of(name: str, out: torch.Tensor, paged: Paged, q: torch.Tensor, **options: Any) -> float:
    return attention_error(out, expected_attention(q, paged, **definition(name, **options)))


def observers(name: str, device: str, weights: torch.Tensor | None = None) -> Observed:
    """Rows that lie apart, with room behind the table's pages that is to stay as it is."""
    lengths = MASS_CASES[name][0]
    sequences, pages = len(lengths), -(-max(lengths) // 64) + 2
    mass = torch.zeros((sequences, pages + 5), dtype=torch.int64, device=device)[:, :pages]
    steps = torch.zeros(sequences, dtype=torch.int32, device=device)
    return Observed(mass, steps, None if weights is None else weights.to(device))


def check_observed(
    name: str, device: str, *, causal: bool = True, weights: torch.Tensor | None = None, **variant: Any
) -> None:
    """Two launches: masses of both, and results as without."""
    observed = observers(name, device, weights)
    out, paged, q = attend(name, device, causal=causal, observed=observed, **variant)
    assert torch.equal(out, attend(name, device, causal=causal, **variant)[0])
    once = observed.mass.cpu().clone()
    expected = expected_mass(q, paged, **definition(name, causal=causal, weights=weights, **variant))
    found = once.double().numpy() / 2**MASS_FRACTION_BITS
    assert not found[:, expected.shape[1] :].any()
    found = found[:, : expected.shape[1]]
    assert not found[expected == 0].any()
    total = 1.0 if weights is None else float(weights.double().sum())
    quantized = any(page_format.is_quantized for pair in MASS_CASES[name][5] for page_format in pair)
    assert np.abs(found - expected).max() < total * (MASS_ERROR if quantized else FP32_MASS_ERROR)
    attended = expected.sum(1) > 0
    if "sink_logits" in variant:
        assert expected.sum(1).max() < 0.9 * total
    else:
        assert np.abs(found.sum(1) - total * attended).max() < total * FP32_MASS_ERROR
    assert observed.steps.tolist() == attended.astype(int).tolist()

    attend(name, device, causal=causal, observed=observed, **variant)
    assert torch.equal(observed.mass.cpu(), 2 * once)
    assert observed.steps.tolist() == (2 * attended).tolist()


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """What is read before it is written shows."""
    empty = torch.empty

    def poisoned(*arguments: Any, **options: Any) -> torch.Tensor:
        return empty(*arguments, **options).fill_(math.nan)

    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr(kernels, "launch", emulated_launch)
    return monkeypatch


@EMULATED
@pytest.mark.parametrize("name", CASES)
def test_decode(name: str, emulated: object) -> None:
    out, paged, q = attend(name, "cpu")
    assert error_of(name, out, paged, q) < 1e-3


@EMULATED
@pytest.mark.parametrize("name", NOT_CAUSAL)
def test_not_causal(name: str, emulated: object) -> None:
    out, paged, q = attend(name, "cpu", causal=False)
    assert error_of(name, out, paged, q, causal=False) < 1e-3
    if CASES[name][6] > 1:
        assert error_of(name, out, paged, q) > 1e-2


def check_variant(name: str, names: tuple[str, ...], device: str) -> None:
    """And that the definition is another one than without."""
    variant = variant_options(name, names)
    out, paged, q = attend(name, device, **variant)
    assert error_of(name, out, paged, q, **variant) < 1e-3
    assert error_of(name, out, paged, q) > 1e-2


@EMULATED
@pytest.mark.parametrize(("name", "names"), VARIANT_CASES, ids=str)
def test_softcap_and_sink_logits(name: str, names: tuple[str, ...], emulated: object) -> None:
    check_variant(name, names, "cpu")


@EMULATED
def test_masses_with_softcap_and_sink_logits(emulated: object) -> None:
    name = "three pairs of columns"
    check_observed(name, "cpu", **variant_options(name, ("softcap", "sink_logits")))


@EMULATED
@pytest.mark.parametrize("name", ["three pairs of columns", "many parts of four heads"])
def test_sink_logits_of_minus_infinity_are_none(name: str, emulated: object) -> None:
    """Bit for bit; and one that is larger than all scores takes all."""
    expected, _, _ = attend(name, "cpu")
    heads = CASES[name][1]
    assert torch.equal(attend(name, "cpu", sink_logits=torch.full((heads,), -math.inf))[0], expected)
    assert not attend(name, "cpu", sink_logits=torch.full((heads,), 1e4))[0].any()


@EMULATED
def test_a_large_softcap_is_none(emulated: object) -> None:
    """Of 1000: scores change by less than their rounding does."""
    expected, _, _ = attend("wide", "cpu")
    found, _, _ = attend("wide", "cpu", softcap=1000.0)
    torch.testing.assert_close(found, expected, rtol=2 * torch.finfo(torch.bfloat16).eps, atol=5e-4)


def test_a_window_has_no_end_without_causal(emulated: object) -> None:
    with pytest.raises(PageError, match="causal=False"):
        attend("window and sinks", "cpu", causal=False)


@EMULATED
@pytest.mark.parametrize("name", MASS_CASES)
def test_masses(name: str, emulated: object) -> None:
    check_observed(name, "cpu")


@EMULATED
def test_masses_not_causal(emulated: object) -> None:
    check_observed("tokens of two pages", "cpu", causal=False)


def some_weights(name: str) -> torch.Tensor:
    """The first of several heads of a KV head weighs nothing, the second one a lot."""
    weights = torch.linspace(0.05, 0.4, CASES[name][1])
    weights[0], weights[1] = 0, 3
    return weights


@EMULATED
@pytest.mark.parametrize("name", ["all formats", "32 heads to one", "several tokens"])
def test_weights_of_heads(name: str, emulated: object) -> None:
    check_observed(name, "cpu", weights=some_weights(name))


@EMULATED
def test_a_head_without_weight_does_not_show(emulated: object) -> None:
    weights = torch.zeros(CASES["several tokens"][1])
    observed = observers("several tokens", "cpu", weights)
    attend("several tokens", "cpu", observed=observed)
    assert not observed.mass.any()
    assert observed.steps.tolist() == [1, 1, 0]


# Sequence, token, dimension: in sequences of 200, 192 and 70 tokens, where windows begin, of the last ones, and behind
# the ends.
SPOILED_PLACES = [
    *(
        (0, 4, 1),
        (0, 60, 2),
        (0, 62, 17),
        (0, 64, 3),
        (0, 100, 18),
        (0, 198, 40),
        (0, 199, 63),
        (0, 200, 5),
        (0, 255, 6),
    ),
    *((1, 60, 1), (1, 90, 3), (2, 70, 7), (2, 127, 8)),
]
HIDDEN_CASES: list[tuple[int, dict[str, int]]] = [
    (1, {}),
    (1, {"window": 70}),
    (5, {"window": 134}),  # of the first page, only the first of the queries see something
    (5, {"window": 100, "sinks": 4}),
    (5, {"causal": False}),
]


def check_hidden(
    side: Side,
    value: float,
    dtype: torch.dtype,
    formats: tuple[PageFormat, PageFormat],
    device: str,
    tokens: int,
    spoiled_places: Sequence[tuple[int, int, int]] = SPOILED_PLACES,
    variant: dict[str, Any] | None = None,
    **options: int,
) -> None:
    def make(spoiled: Sequence[Spoiled]) -> Paged:
        paged = paged_values([200, 192, 70], 2, 64, dtype, [formats], spoiled=spoiled)
        return paged.to(device) if device == "cuda" else paged

    q = torch.randn(3, 8, tokens, 64, generator=torch.Generator().manual_seed(0)).to(dtype).to(device)

    def attend(paged: Paged) -> torch.Tensor:
        return attention_kernels.decode(
            q,
            None if device == "cuda" else paged.pages,
            paged.table,
            paged.lengths,
            2,
            *({page_kernels.PAGE_FORMATS[dtype], page_format} for page_format in formats),
            scale=1 / 8,
            blocks=5,
            **(variant or {}),
            **options,
        )

    places = [(side, *place, value) for place in spoiled_places]
    if side == Side.V:
        places += [(side, 0, 195, 7, math.inf), (side, 0, 194, 7, -math.inf)]
    check_what_is_hidden(make, attend, places, tokens, **options)


@EMULATED
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("tokens", "options"), HIDDEN_CASES, ids=str)
@pytest.mark.parametrize("side", Side)
def test_what_is_hidden_does_not_show(
    side: Side, tokens: int, options: dict[str, int], value: float, dtype: torch.dtype, emulated: object
) -> None:
    check_hidden(side, value, dtype, (page_kernels.PAGE_FORMATS[dtype],) * 2, "cpu", tokens, **options)


@EMULATED
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("v_format", [f for f in PageFormat if f.is_quantized])
@pytest.mark.parametrize(("tokens", "options"), HIDDEN_CASES, ids=str)
def test_what_is_hidden_in_a_quantized_page_does_not_show(
    tokens: int, options: dict[str, int], v_format: PageFormat, dtype: torch.dtype, emulated: object
) -> None:
    check_hidden(Side.V, math.nan, dtype, (INT4, v_format), "cpu", tokens, **options)


@EMULATED
@pytest.mark.parametrize("k_format", [f for f in PageFormat if f.is_quantized])
def test_quantized_keys_that_are_hidden_do_not_show(k_format: PageFormat, emulated: object) -> None:
    """The first page of the first sequence is seen by two of its five queries, that of the second by all."""
    places = [(0, 4, 1), (0, 62, 17), (1, 60, 3)]
    formats = k_format, INT4
    check_hidden(Side.K, math.nan, torch.float16, formats, "cpu", 5, spoiled_places=places, window=134)


@EMULATED
@pytest.mark.parametrize(("tokens", "options"), HIDDEN_CASES, ids=str)
@pytest.mark.parametrize("side", Side)
def test_what_is_hidden_does_not_show_with_softcap_and_sink_logits(
    side: Side, tokens: int, options: dict[str, int], emulated: object
) -> None:
    variant = {"softcap": SOFTCAP, "sink_logits": torch.linspace(-1, 3, 8)}
    check_hidden(side, math.nan, torch.float16, (FP16, FP16), "cpu", tokens, variant=variant, **options)


@EMULATED
def test_quantized_keys_that_are_hidden_do_not_show_with_softcap(emulated: object) -> None:
    places = [(0, 4, 1), (0, 62, 17), (1, 60, 3)]
    options = {"spoiled_places": places, "variant": {"softcap": SOFTCAP}, "window": 134}
    check_hidden(Side.K, math.nan, torch.float16, (INT4, INT4), "cpu", 5, **options)


@EMULATED
def test_order_of_blocks_does_not_show(emulated: pytest.MonkeyPatch) -> None:
    results, observations = [], []
    for seed in range(3):
        emulated.setattr(kernels, "launch", functools.partial(emulated_launch, shuffle_seed=seed))
        observations.append(observers("all formats", "cpu"))
        results.append(attend("all formats", "cpu", observed=observations[-1])[0])
    assert all(torch.equal(result, results[0]) for result in results)
    assert all(torch.equal(observed.mass, observations[0].mass) for observed in observations)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_cuda_decode(name: str) -> None:
    out, paged, q = attend(name, "cuda")
    assert error_of(name, out, paged, q) < 1e-3
    assert torch.equal(out, attend(name, "cuda")[0])


@pytest.mark.gpu
@pytest.mark.parametrize("name", NOT_CAUSAL)
def test_cuda_not_causal(name: str) -> None:
    out, paged, q = attend(name, "cuda", causal=False)
    assert error_of(name, out, paged, q, causal=False) < 1e-3


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read before it is written shows, on a GPU."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *arguments, **options: empty(*arguments, **options).fill_(math.nan))


@pytest.mark.gpu
@pytest.mark.parametrize("names", VARIANTS, ids="-".join)
@pytest.mark.parametrize("name", MASS_CASES)
def test_cuda_softcap_and_sink_logits(name: str, names: tuple[str, ...], poisoned: None) -> None:
    variant = variant_options(name, names)
    out, paged, q = attend(name, "cuda", **variant)
    assert error_of(name, out, paged, q, **variant) < 1e-3
    assert torch.equal(out, attend(name, "cuda", **variant)[0])


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["all formats", "lengths of a batch", "three pairs of columns", "many parts of one"])
def test_cuda_masses_with_softcap_and_sink_logits(name: str) -> None:
    check_observed(name, "cuda", **variant_options(name, ("softcap", "sink_logits")))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "options"), HIDDEN_CASES, ids=str)
def test_cuda_what_is_hidden_does_not_show_with_softcap_and_sink_logits(
    tokens: int, options: dict[str, int], dtype: torch.dtype
) -> None:
    variant = {"softcap": SOFTCAP, "sink_logits": torch.linspace(-1, 3, 8, device="cuda")}
    for side in Side:
        check_hidden(
            side, math.nan, dtype, (page_kernels.PAGE_FORMATS[dtype],) * 2, "cuda", tokens, variant=variant, **options
        )
    for v_format in [f for f in PageFormat if f.is_quantized]:
        check_hidden(Side.V, math.nan, dtype, (INT4, v_format), "cuda", tokens, variant=variant, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("name", MASS_CASES)
def test_cuda_masses(name: str) -> None:
    check_observed(name, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["all formats", "32 heads to one", "several tokens"])
def test_cuda_weights_of_heads(name: str) -> None:
    check_observed(name, "cuda", weights=some_weights(name))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("tokens", "options"), HIDDEN_CASES, ids=str)
def test_cuda_what_is_hidden_does_not_show(
    tokens: int, options: dict[str, int], value: float, dtype: torch.dtype
) -> None:
    for side in Side:
        check_hidden(side, value, dtype, (page_kernels.PAGE_FORMATS[dtype],) * 2, "cuda", tokens, **options)
    for v_format in [f for f in PageFormat if f.is_quantized]:
        check_hidden(Side.V, value, dtype, (INT4, v_format), "cuda", tokens, **options)


@pytest.mark.gpu
def test_cuda_masses_not_causal() -> None:
    check_observed("tokens of two pages", "cuda", causal=False)
