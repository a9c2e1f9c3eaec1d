"""``benchmarks/kv_quantizers.py`` with a tiny random Llama on the CPU, and its schemes and measures by hand."""

from __future__ import annotations

import importlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import bench_common  # noqa: E402
import kv_constructed  # noqa: E402
import kv_quantizer_schemes as schemes  # noqa: E402
import kv_quantizers  # noqa: E402
import kv_quantizers_report as report  # noqa: E402
import render_docs  # noqa: E402
from tiny_text_model import write_model, write_novel  # noqa: E402
from transformers.models.gptj import modeling_gptj  # noqa: E402

from kvpack.format.pages import PageFormat, PageLayout, Side  # noqa: E402
from kvpack.integrations.transformers import rotary  # noqa: E402
from kvpack.runtime.kv.attention import attention_with_kv_cache  # noqa: E402
from kvpack.runtime.kv.cache import KVCache  # noqa: E402

CONTEXT, WINDOWS, HEAD_DIM, KV_HEADS, LAYERS = 320, 2, 16, 1, 2
NAMES = ["fp16", "int8", "int4", "int2", "int4/int2", "kivi8g64", "kivi4g64", "kivi2g32", "turbo4", "turbo2"]


class _Characters:
    """A tokenizer of one token a character."""

    def __call__(self, text: str, **_: Any) -> Any:
        return transformers.BatchEncoding({"input_ids": torch.tensor([[ord(c) % 97 for c in text]])})


@pytest.fixture(scope="module")
def model() -> Any:
    """Weights are large enough that attention matters: with those of initialization, all tokens are equally likely."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=1024,
        initializer_range=0.3,
    )
    return transformers.LlamaForCausalLM(config).eval()


def a_text(characters: int) -> kv_quantizers.Text:
    codes = torch.randint(0, 97, (characters,), generator=torch.Generator().manual_seed(1))
    return kv_quantizers.Text("random", "".join(map(chr, codes.tolist())))


@pytest.fixture(scope="module")
def text(model: Any) -> dict[str, Any]:
    parsed = schemes.parse_schemes([*NAMES, "importance@0.35"], None)
    texts = [a_text(1000)]
    *_, last = kv_quantizers.measure(model, _Characters(), texts, parsed, windows=WINDOWS, context=CONTEXT)
    return last[0]


def by_name(text: dict[str, Any]) -> dict[str, Any]:
    return {row["name"]: row for row in text["rows"]}


def random_recording(*, tokens: int = CONTEXT, head_dim: int = HEAD_DIM, heads: int = 2) -> schemes.Recording:
    torch.manual_seed(2)
    k, v = torch.randn(2, LAYERS, KV_HEADS, tokens, head_dim).half()
    new_k, new_v = torch.randn(2, LAYERS, KV_HEADS, 64, head_dim)
    q = torch.randn(LAYERS, heads, 64, head_dim)
    return schemes.Recording(k, v, q, new_k, new_v, head_dim**-0.5)


def test_fewer_bits_are_worse(text: dict[str, Any]) -> None:
    found = by_name(text)
    assert {len(row[key]) for row in found.values() for key in ("kl", "same_top", "error")} == {WINDOWS}
    assert (found["fp16"]["kl"], found["fp16"]["error"], found["fp16"]["same_top"]) == ([0, 0], [0, 0], [1, 1])
    for measure in ("kl", "error"):
        for chain in (("int8", "int4", "int2"), ("kivi8g64", "kivi4g64", "kivi2g32"), ("turbo4", "turbo2")):
            means = [report.mean(found[name][measure]) for name in chain]
            assert means[0] > 0
            assert means == sorted(means), (measure, chain)
    assert report.mean(found["int4"]["kl"]) < report.mean(found["int4/int2"]["kl"])
    assert report.mean(found["int2"]["same_top"]) < 1


def test_bits_count_everything(text: dict[str, Any]) -> None:
    found = by_name(text)

    def with_recent(bits: float) -> float:
        return ((CONTEXT - 64) * bits + 64 * 16) / CONTEXT

    assert found["fp16"]["bits"] == 16
    assert found["kivi4g64"]["bits"] == pytest.approx(with_recent((4.5 + 4 + 32 / HEAD_DIM) / 2))
    assert found["turbo4"]["bits"] == pytest.approx(with_recent(4 + 16 / HEAD_DIM))
    k, v = (PageLayout(side, PageFormat.INT4, HEAD_DIM).bits_per_element for side in Side)
    assert found["int4"]["bits"] == pytest.approx(with_recent((k + v) / 2))
    (wide,) = schemes.parse_schemes(["int4"], PageFormat.FP16)
    assert wide.apply(random_recording()).bits == pytest.approx(((CONTEXT - 128) * (k + v) / 2 + 128 * 16) / CONTEXT)


def test_recordings_are_what_the_model_computes(model: Any) -> None:
    """Keys and values of the cache, queries that give the model's own attention, and a reference that is the model."""
    kv_quantizers.prepare(model)
    ids = torch.randint(0, 97, (CONTEXT + 64,), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        recording, reference = kv_quantizers.record(model, ids, prompt_queries=True)
        model.set_attn_implementation("eager")
        outputs: list[Any] = []
        hooks = [
            layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args: outputs.append(args[0][0]))
            for layer in model.model.layers
        ]
        logits = model(ids[None], use_cache=False).logits[0]
        for hook in hooks:
            hook.remove()
    assert recording.k.shape == recording.v.shape == (LAYERS, KV_HEADS, CONTEXT, HEAD_DIM)
    assert (recording.k.dtype, recording.q.dtype) == (torch.float16, torch.float32)
    dense = logits[-64:].double().log_softmax(-1)
    assert float((reference.exp() * (reference - dense)).sum(-1).abs().max()) < 1e-4
    assert recording.prompt_q is not None
    # Layer by layer: the new tokens' attention, and the prompt's.
    for layer in range(LAYERS):
        k = torch.cat([recording.k[layer].float(), recording.new_k[layer]], 1)
        v = torch.cat([recording.v[layer].float(), recording.new_v[layer]], 1)
        q = torch.cat([recording.prompt_q[layer].float(), recording.q[layer]], 1)
        mine = torch.nn.functional.scaled_dot_product_attention(
            q[None], k[None], v[None], is_causal=True, enable_gqa=True, scale=recording.scale
        )[0]
        exact = outputs[layer].unflatten(-1, (2, HEAD_DIM)).transpose(0, 1)
        assert float((mine - exact).norm() / exact.norm()) < 5e-3


def test_the_error_of_attention_by_hand() -> None:
    recording = random_recording()
    k, v = recording.k.float(), recording.v.float()
    assert kv_quantizers.attention_error(recording, schemes.Quantized(k, v, 16)) == 0
    # All values doubled, those of the new tokens as well: outputs double, and the error is 1; layers count alike.
    doubled = schemes.Recording(recording.k, v * 0, recording.q, recording.new_k, recording.new_v * 0, recording.scale)
    doubled.v[0, :, 5] = doubled.v[1, :, 5] = 1
    both = torch.stack([2 * doubled.v[0], 4 * doubled.v[1]])
    assert kv_quantizers.attention_error(doubled, schemes.Quantized(k, both, 16)) == pytest.approx(
        (1 + 3) / 2, rel=1e-5
    )
    # What comes behind a query is not seen: the last new token's value reaches the last query alone.
    late = recording.new_v * 0
    late[:, :, -1] = 1
    seen = schemes.Recording(recording.k, v * 0, recording.q, recording.new_k, late, recording.scale)
    flat = torch.zeros_like(k)
    k_all = torch.cat([flat, recording.new_k], 2)
    weight = [(recording.scale * q[:, -1:] @ keys.mT).softmax(-1) for q, keys in zip(recording.q, k_all, strict=True)]
    exact = [
        (recording.scale * q[:, -1:] @ torch.cat([keys.float(), new], 1).mT).softmax(-1)
        for q, keys, new in zip(recording.q, recording.k, recording.new_k, strict=True)
    ]
    expected = [float((a[..., -1] - b[..., -1]).norm() / b[..., -1].norm()) for a, b in zip(weight, exact, strict=True)]
    found = kv_quantizers.attention_error(seen, schemes.Quantized(flat, v * 0, 16))
    assert found == pytest.approx(sum(expected) / LAYERS, rel=1e-4)


def test_pages_are_those_of_the_cache() -> None:
    recording = random_recording()
    (scheme,) = schemes.parse_schemes(["int3/int4"], PageFormat.FP16)
    found = scheme.apply(recording)
    pair = (PageFormat.INT3, PageFormat.INT4)
    cache = KVCache(LAYERS, KV_HEADS, HEAD_DIM, CONTEXT, device="cpu", formats=[pair] * LAYERS)
    for layer in range(LAYERS):
        cache.append(layer, recording.k[layer, None], recording.v[layer, None])
        k, v = cache.read(layer, 0, torch.float32)
        # The first page is the cache's own affair.
        assert torch.equal(found.k[layer, :, 64:], k[:, 64:])
        assert torch.equal(found.v[layer, :, 64:], v[:, 64:])
        assert torch.equal(found.k[layer, :, :64], recording.k[layer, :, :64].float())
    (eight,) = schemes.parse_schemes(["int2"], PageFormat.INT8)
    (all_two,) = schemes.parse_schemes(["int2"], None)
    first, all_first = (
        float((one.apply(recording).k - recording.k)[:, :, :64].abs().max()) for one in (eight, all_two)
    )
    assert 0 < first < 0.05 < all_first


def test_wide_dimensions_are_those_of_the_model() -> None:
    """A model that turns neighbours keeps other dimensions best than a Llama."""
    torch.manual_seed(0)
    config = transformers.GPTJConfig(vocab_size=97, n_embd=128, n_layer=1, n_head=2, n_positions=512, rotary_dim=32)
    model = transformers.GPTJForCausalLM(config).eval()
    order = rotary.key_order(config, 64)
    assert order
    kv_quantizers.prepare(model)
    ids = torch.randint(0, 97, (CONTEXT + 64,), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        if not hasattr(modeling_gptj, "ALL_ATTENTION_FUNCTIONS"):
            with pytest.raises(SystemExit, match="queries cannot be recorded"):
                kv_quantizers.record(model, ids, prompt_queries=True)
            pytest.skip(f"GPT-J of transformers {transformers.__version__} has attention of its own")
        recording, _ = kv_quantizers.record(model, ids, prompt_queries=True)
    found, budgeted = (scheme.apply(recording) for scheme in schemes.parse_schemes(["int3", "importance@0.3"], None))
    for name, one, options in (("int3", found, {"formats": PageFormat.INT3}), ("budget", budgeted, {"budget": 0.3})):
        k = {}
        for key_order in (order, None):
            cache = KVCache(1, 2, 64, CONTEXT, device="cpu", key_order=key_order, **options)
            assert recording.prompt_q is not None
            for begin in range(0, CONTEXT, schemes.CHUNK_TOKENS):
                new = slice(begin, begin + schemes.CHUNK_TOKENS)
                qkv = (x[0, None, :, new] for x in (recording.prompt_q, recording.k, recording.v))
                attention_with_kv_cache(*qkv, cache, layer=0, scale=recording.scale, observe=True)
                cache.reallocate()
            k[key_order] = cache.read(0, 0, torch.float32)[0][:, 64:]
        assert torch.equal(one.k[0, :, 64:], k[order]), name
        assert not torch.equal(k[order], k[None]), name


def test_a_budget_is_the_cache_that_has_observed_the_prompt(text: dict[str, Any], model: Any) -> None:
    kv_quantizers.prepare(model)
    tokens = 896  # of fewer, most pages are pinned
    ids = torch.randint(0, 97, (tokens + 64,), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        recording, _ = kv_quantizers.record(model, ids, prompt_queries=True)
        (scheme,) = schemes.parse_schemes(["importance@0.35"], None)
        found = scheme.apply(recording)
    assert recording.prompt_q is not None

    def read(*, observe: bool, reallocate: bool) -> tuple[Any, float]:
        cache = KVCache(LAYERS, KV_HEADS, HEAD_DIM, tokens, device="cpu", budget=0.35)
        for begin in range(0, tokens, 256):
            part = slice(begin, begin + 256)
            for layer in range(LAYERS):
                q, k, v = (x[layer, None, :, part] for x in (recording.prompt_q, recording.k, recording.v))
                attention_with_kv_cache(q, k, v, cache, layer=layer, scale=recording.scale, observe=observe)
            if reallocate:
                cache.reallocate()
        return torch.stack([cache.read(layer, 0, torch.float32)[0] for layer in range(LAYERS)]), cache.average_bits()

    k, bits = read(observe=True, reallocate=True)
    assert torch.equal(found.k, k)
    assert found.bits == bits < 16
    for observe, reallocate in ((False, True), (True, False)):
        assert not torch.equal(found.k, read(observe=observe, reallocate=reallocate)[0])
    row = by_name(text)["importance@0.35"]
    assert row["family"] == "a budget, importance"
    assert report.mean(row["kl"]) > 0
    with pytest.raises(ValueError, match="queries of the prompt"):
        scheme.apply(random_recording())


def test_between_extremes_by_hand() -> None:
    x = torch.tensor([[0.0, 1.0, 2.2, 3.0], [5.0, 5.0, 5.0, 5.0]])
    assert torch.equal(schemes.between_extremes(x, -1, 2), torch.tensor([[0.0, 1.0, 2.0, 3.0], [5.0] * 4]))
    tokens = torch.arange(128.0)[None, :, None].expand(1, 128, 16)
    k = schemes.kivi_coder(Side.K, 2, 64).apply(tokens, ())
    assert sorted(set(k[0, :, 3].tolist())) == [0, 21, 42, 63, 64, 85, 106, 127]  # four levels a group of 64 tokens
    assert torch.equal(schemes.kivi_coder(Side.V, 2, 64).apply(tokens, ()), tokens)  # a token's values are all the same


def test_levels_are_those_of_lloyd_and_max() -> None:
    """Max, Quantizing for minimum distortion (1960), table I: levels and mean squared errors."""
    assert schemes.gaussian_levels(2).tolist() == pytest.approx([-1.5104, -0.4528, 0.4528, 1.5104], abs=1e-4)
    assert schemes.gaussian_levels(3)[-1] == pytest.approx(2.1520, abs=1e-4)
    x = torch.randn(1, 20_000, 64, generator=torch.Generator().manual_seed(0))
    for bits, error in ((2, 0.1175), (3, 0.03454), (4, 0.009497)):
        found = schemes.turbo_coder(bits).apply(x, ())
        assert float((found - x).square().mean() / x.square().mean()) == pytest.approx(error, rel=0.04)


@pytest.mark.parametrize("head_dim", [64, 80, 96])
def test_rotations_are_orthogonal_and_spread(head_dim: int) -> None:
    turn = schemes.rotation(head_dim)
    assert torch.allclose(turn @ turn.T, torch.eye(head_dim), atol=1e-5)
    one = torch.zeros(head_dim)
    one[3] = 1
    assert float((one @ turn).abs().max()) == pytest.approx((head_dim & -head_dim) ** -0.5)


def test_constructed_cases_have_their_traits() -> None:
    found = kv_constructed.constructed()
    assert float(found["bias"].k.float().mean(-2).norm(dim=-1).max()) > 800
    assert float(found["beyond-fp16"].k.float().max()) > 65504
    assert float((found["around-10"].v.float() - 10).std()) == pytest.approx(0.1, rel=0.1)
    rows = {
        case["name"]: {row["name"]: row["error"] for row in case["rows"]}
        for case in kv_quantizers.measure_constructed(
            schemes.parse_schemes(["fp16", "kivi8g64", "kivi2g64", "turbo8", "importance@0.3"], None)
        )
    }
    assert list(rows) == list(found)
    assert all(list(errors) == ["fp16", "kivi8g64", "kivi2g64", "turbo8"] for errors in rows.values())
    assert all(errors["fp16"] == 0 for errors in rows.values())
    assert rows["bias"]["kivi8g64"] < 0.05 < rows["bias"]["kivi2g64"]
    assert rows["beyond-fp16"]["kivi8g64"] > 1  # a zero point in fp16
    assert rows["aligned"]["kivi2g64"] < 0.05
    aligned = found["aligned"]
    scores = aligned.scale * aligned.q[0, :2] @ aligned.k[0, 0].double().T
    assert float((scores.softmax(-1) @ aligned.v[0, 0].double()).min()) > 0.99


def test_paired_ratios() -> None:
    ratio = report.paired_ratio([1.0, 2.0, 3.0], [2.0, 4.0, 6.0])
    assert ratio is not None
    assert (ratio.value, ratio.standard_error, ratio.better, ratio.verdict) == (0.5, 0, 3, "3 windows")
    ratio = report.paired_ratio([1.0, 3.0], [2.0, 2.0])
    assert ratio is not None
    assert ratio.standard_error == pytest.approx(math.sqrt(2) / math.sqrt(2) / 2)
    assert ratio.verdict == "equal"
    few = (([1.0, 3.2], "2 windows"), ([3.0, 3.1] * 3, "6 windows"), ([1.0], "one window"))
    enough = (([1.0, 3.2] * 4, "no difference"), ([3.0, 3.1] * 4, "loses"), ([1.0, 1.1] * 4, "wins"))
    for mine, verdict in (*few, *enough):
        found = report.paired_ratio(mine, [2.0] * len(mine))
        assert found is not None
        assert found.verdict == verdict
    assert report.paired_ratio([1.0], [0.0]) is None


def row(name: str, family: str, bits: float, kl: list[float]) -> dict[str, Any]:
    found = {"name": name, "family": family, "bits": bits, "window_bits": [bits] * len(kl), "kl": kl}
    return {**found, "same_top": [1.0] * len(kl), "error": [0.1] * len(kl)}


def test_what_pages_are_compared_with() -> None:
    rows = [
        row("int4", "pages", 4.9, [1.0, 1.0]),
        row("int3/int2", "pages, K and V of two formats", 3.5, [3.0, 3.0]),
        row("importance@0.3", "a budget, importance", 4.3, [1.0, 1.0]),
        row("uniform@0.3", "a budget, uniform", 4.2, [1.0, 3.0]),
        row("kivi4g64", "KIVI-like, groups of 64", 4.8, [2.0, 2.0]),
        row("kivi8g64", "KIVI-like, groups of 64", 8.8, [0.0002, 0.0002]),
        row("kivi4g32", "KIVI-like, groups of 32", 5.4, [0.5, 0.5]),
        row("kivi3g32", "KIVI-like, groups of 32", 4.4, [1.5, 1.5]),
        row("turbo4", "TurboQuant-like", 4.6, [0.1, 0.1]),
    ]
    found = [(one.row["name"], one.why, one.against) for one in report.comparisons(rows)]
    # kivi4g32 takes more bits; kivi3g32 is better than kivi4g64 here; nothing KIVI-like takes as few as the others.
    assert found == [
        ("int4", report.SAME_WIDTH, "kivi4g64"),
        ("int4", report.EQUAL_BITS, "kivi4g64, kivi8g64"),
        ("int4", report.NO_MORE_BITS, "kivi3g32"),
        ("importance@0.3", report.SAME_BUDGET, "uniform@0.3"),
    ]
    # A fortieth of four decades.
    assert report.comparisons(rows)[1].kl == pytest.approx([2 * 10 ** (-4 / 40)] * 2)
    rows.append(row("int8", "pages", 8.5, [0.001, 0.001]))  # kivi4g32 takes three bits less: no comparison
    assert [one.why for one in report.comparisons(rows) if one.row["name"] == "int8"] == [
        report.SAME_WIDTH,
        report.EQUAL_BITS,
    ]


def test_the_best_of_no_more_bits_takes_no_more_in_any_window() -> None:
    budget = row("importance@0.3", "a budget, importance", 4.5, [1.0, 1.0]) | {"window_bits": [4.3, 4.7]}
    others = [
        row("kivi3g32", "KIVI-like, groups of 32", 4.4, [0.5, 0.5]),
        row("kivi3g64", "KIVI-like, groups of 64", 3.9, [2, 2]),
    ]
    found = [one.against for one in report.comparisons([budget, *others]) if one.why == report.NO_MORE_BITS]
    assert found == ["kivi3g64"]


def result_of(windows: int) -> dict[str, Any]:
    rows = [
        row("int4", "pages", 4.9, [1.0, 1.1] * (windows // 2)),
        row("kivi4g64", "KIVI-like, groups of 64", 4.8, [2.0, 2.2] * (windows // 2)),
    ]
    return {"first_page": "cache", "texts": [{"name": "novel", "rows": rows}], "constructed": []}


def test_few_windows_have_no_verdict() -> None:
    assert report.verdicts(result_of(8)) == (
        "Against KIVI-like groups of 64 at the same width, 1 of 1 win and 0 lose by KL, by 2 standard errors or more. "
        "Against the best KIVI-like scheme of no more bits, 1 of 1 win and 0 lose by KL, by 2 standard errors or more."
    )
    few = report.verdicts(result_of(6))
    assert few.startswith("Of 6 windows no verdict is given, 8 are needed: ")
    assert "win" not in few.replace("windows", "")
    assert {cells[-1] for cells in report.tables(result_of(6))["comparisons"].rows} == {"6 windows"}


def test_the_first_page_is_that_of_a_cache_and_named() -> None:
    recording = random_recording()
    for name in ("int3/int4", "int8", "fp8_e4m3", "int2"):
        (scheme,) = schemes.parse_schemes([name], "cache")
        assert isinstance(scheme, schemes.SideBySide)
        found = scheme.apply(recording)
        pair = PageFormat[name.split("/")[0].upper()], PageFormat[name.split("/")[-1].upper()]
        cache = KVCache(LAYERS, KV_HEADS, HEAD_DIM, CONTEXT, device="cpu", formats=[pair] * LAYERS)
        for layer in range(LAYERS):
            cache.append(layer, recording.k[layer, None], recording.v[layer, None])
            k, v = cache.read(layer, 0, torch.float32)
            assert torch.equal(found.k[layer], k), name
            assert torch.equal(found.v[layer], v), name
        assert found.bits == pytest.approx(cache.average_bits()), name
        assert [int(cache.precision_map(0)[side, 0, 0]) for side in Side] == list(scheme.first_formats)
    result = result_of(8)
    named = {"cache": "as in a cache (FP16)", "same": "in the format of the others", "int8": "in INT8"}
    for asked, shown in named.items():
        title = report.tables(result | {"first_page": asked, "first_page_formats": ["FP16"]})["quality"].title
        assert title == f"Quality by scheme, first page of kvpack's {shown}"
    result["texts"][0]["rows"][0] |= {"name": "importance@0.3", "family": "a budget, importance"}
    assert report.first_page(result | {"first_page": "int8"}) == "as in a cache"


def test_wrong_names_are_refused() -> None:
    for wrong in ("int5", "kivi5g64", "turbo9", "greedy@0.3", "importance@3", "int4/", "int4/none"):
        with pytest.raises(ValueError, match=f"'{wrong.split('/')[-1]}' is no "):
            schemes.parse_scheme(wrong, None)
    both = schemes.parse_schemes(["default", "int4", "int4/int3"], None)
    assert [one.name for one in both] == [*schemes.DEFAULT_SCHEMES, "int4/int3"]


def test_texts(tmp_path: Path) -> None:
    python = kv_quantizers.read_text("python")
    assert "Abstract Base Classes (ABCs) according to PEP 3119." in python.content  # abc.py, of the first
    assert "def main" in python.content
    file = tmp_path / "a=b.txt"
    file.write_text("prose")
    assert kv_quantizers.read_text(f"novel={file}") == kv_quantizers.Text("novel", "prose")
    with pytest.raises(ValueError, match="NAME=FILE"):
        kv_quantizers.read_text("novel")
    *_, last = kv_quantizers.windows_of(_Characters(), kv_quantizers.Text("t", "ab" * 50), 2, 50)
    assert last.shape == (50,)
    with pytest.raises(SystemExit, match="2 windows of 51 tokens do not fit"):
        list(kv_quantizers.windows_of(_Characters(), kv_quantizers.Text("t", "ab" * 50), 2, 51))


def test_models_that_attend_otherwise_are_refused() -> None:
    config = transformers.MistralConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, sliding_window=64, max_position_embeddings=512,
    )  # fmt: skip
    model = transformers.MistralForCausalLM(config).eval()
    kv_quantizers.prepare(model)
    with pytest.raises(SystemExit, match="sliding_window"):
        kv_quantizers.record(model, torch.arange(96).repeat(4), prompt_queries=False)


def test_commands_name_files_not_places(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "novel.txt"
    monkeypatch.setattr(sys, "argv", ["kv_quantizers.py", str(tmp_path), f"--text=books={file}", "--text", f"a={file}"])
    shown = bench_common.command_line({"MODEL": tmp_path})
    assert shown == "python benchmarks/kv_quantizers.py $MODEL --text=books=novel.txt --text a=novel.txt"


def test_results_are_rendered(text: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [name for name in render_docs.FIGURES if name.startswith("kv-quantizers")]
    monkeypatch.setattr(render_docs, "RESULTS", tmp_path)
    assert "has no `kv-quantizers-books` yet" in render_docs.figures("kv-quantizers-summary")
    names.remove("kv-quantizers-summary")
    assert all(f"has no `{name}` yet" in render_docs.figures(name) for name in names)
    result = {
        "command": "python benchmarks/kv_quantizers.py", "date": "2026-11-26", "cpu": "a CPU", "cores": 2,
        "versions": {}, "device": {"name": "CPU", "driver": None, "cuda": None}, "model": "tiny", "context": CONTEXT,
        "first_page": "int8", "texts": [text], "constructed": [],
    }  # fmt: skip
    (tmp_path / "2026-11-26-kv-quantizers-books.json").write_text(json.dumps(result, allow_nan=False))
    shown = render_docs.figures("kv-quantizers-books")
    assert "| random | int4 |" in shown
    assert "| same width | kivi4g64 |" in shown
    assert "320 cached tokens, 2 windows of each text" in shown
    assert "the first page of kvpack's in INT8." in shown
    assert "Of 2 windows no verdict is given, 8 are needed: " in shown
    monkeypatch.setattr(render_docs, "_QUANTIZER_RUNS", {"books": "tiny"})
    row = next(found for found in text["rows"] if found["name"] == "int4")
    summary = render_docs.figures("kv-quantizers-summary")
    assert (
        f"| tiny, 320, random | INT8 | INT4 | {row['bits']:.2f}: {1e3 * sum(row['kl']) / len(row['kl']):.3g} |"
        in summary
    )
    plot = pytest.importorskip("kvpack.bench.plot")
    plot.plot_kv_quantizers(result, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="nothing to draw"):
        plot.plot_kv_quantizers(result | {"texts": []}, tmp_path / "none.png")


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["kv_quantizers.py", *arguments])
    kv_quantizers.main()


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    directory, novel, path = write_model(tmp_path / "tiny"), write_novel(tmp_path), tmp_path / "found.json"
    inputs = [str(directory), "--text", f"novel={novel}", "--constructed", "--schemes", "int4,int2,kivi4g64"]
    run(monkeypatch, *inputs, "--context", "192", "--windows", "2", "--first-page", "same", "--json", str(path))
    out, err = capsys.readouterr()
    assert "| novel | int4 " in out
    assert "| aligned |" in out
    assert "Quality by scheme, first page of kvpack's in the format of the others" in out
    assert "Of 2 windows no verdict is given, 8 are needed: " in out
    assert "novel: window 2 of 2, " in err
    result = json.loads(path.read_text())
    assert [case["name"] for case in result["constructed"]] == list(kv_constructed.constructed())
    assert (result["complete"], result["model"], result["context"], result["first_page"]) == (True, "tiny", 192, "same")
    assert [row["name"] for row in result["texts"][0]["rows"]] == ["int4", "int2", "kivi4g64"]
    assert "$MODEL --text novel=novel.txt" in result["command"]
    assert str(tmp_path) not in path.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "or --constructed"),
        (["model"], "--text for it to read"),
        (["--text", "python", "--constructed"], "--text for it to read"),
        (["--constructed", "--schemes", "int5"], "'int5' is no format of pages"),
        (["--constructed", "--plot", "a.png"], "--plot draws KL"),
        (["model", "--text", "python", "--context", "100"], "a multiple of 64"),
        (["model", "--text", "novel"], "NAME=FILE"),
        (["no/model", "--text", "python"], "no/model is no directory"),
        (["MODEL", "--text", "a=missing.txt"], "missing.txt"),
        (["MODEL", "--text", "a=TEXT", "--windows", "1000"], "a: 1000 windows of 2048 tokens do not fit"),
    ],
)
def test_wrong_usage(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Before any model is loaded."""
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    names = {"MODEL": str(write_model(tmp_path / "tiny")), "a=TEXT": f"a={write_novel(tmp_path)}"}
    with pytest.raises(SystemExit) as found:
        run(monkeypatch, *(names.get(argument, argument) for argument in arguments))
    assert found.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("script", ["kv_quantizers", "kv_quality", "cache_agreement", "page_noise"])
@pytest.mark.parametrize("missing", ["model", "text"])
def test_missing_inputs_end_a_script_at_once(
    script: str, missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers would look for the name on the Hub, and try again."""
    for loader in (transformers.AutoModelForCausalLM, transformers.AutoTokenizer):
        monkeypatch.setattr(loader, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    model, novel = write_model(tmp_path / "tiny"), write_novel(tmp_path)
    named = (tmp_path / "none", novel) if missing == "model" else (model, tmp_path / "none")
    text = ("--text", f"novel={named[1]}") if script == "kv_quantizers" else (str(named[1]),)
    arguments = [script, str(named[0]), *text, *(("--device", "cpu") if script == "kv_quality" else ())]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as found:
        importlib.import_module(script).main()
    assert found.value.code == 2
    assert str(tmp_path / "none") in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("script", ["kv_quantizers", "kv_quality"])
def test_a_chart_that_cannot_be_drawn_is_refused_before_the_work(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for loader in (transformers.AutoModelForCausalLM, transformers.AutoTokenizer):
        monkeypatch.setattr(loader, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    monkeypatch.setitem(sys.modules, "kvpack.bench.plot", None)
    model, novel = write_model(tmp_path / "tiny"), write_novel(tmp_path)
    text = ("--text", f"novel={novel}") if script == "kv_quantizers" else (str(novel),)
    monkeypatch.setattr(sys, "argv", [script, str(model), *text, "--device", "cpu", "--plot", "a.png"])
    with pytest.raises(SystemExit) as found:
        importlib.import_module(script).main()
    assert found.value.code == 2
    assert "--plot needs matplotlib" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"), [(("--tokens", "100"), "a multiple of 64 is wanted"), ((), "fewer than --tokens 6400")]
)
def test_page_noise_of_too_few_tokens(
    options: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    inputs = [str(write_model(tmp_path / "tiny")), str(write_novel(tmp_path))]
    monkeypatch.setattr(sys, "argv", ["page_noise", *inputs, *(options or ("--tokens", "6400"))])
    with pytest.raises(SystemExit) as found:
        importlib.import_module("page_noise").main()
    assert found.value.code == 2
    assert message in capsys.readouterr().err


def test_help_prints_defaults(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(monkeypatch, "--help")
    shown = " ".join(capsys.readouterr().out.split())
    for default in ("of each text; default: 4", "as the others; default: cache", "default: 1984", "default: cpu"):
        assert default in shown
