"""``benchmarks/kv_quality.py`` with a tiny random Llama on the CPU, and its measures by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import kv_quality  # noqa: E402
import kv_quality_report  # noqa: E402
import render_docs  # noqa: E402

from kvpack.format.pages import PageFormat, Side  # noqa: E402
from kvpack.runtime.kv.cache import KVCache  # noqa: E402

# With the sinks' page and the recent window, two of four pages are quantized in the end.
TOKENS, SEQUENCES, HEAD_DIM, KV_HEADS = 256, 2, 16, 1
NAMES = ["fp16", "int8", "int3", "int2", "importance@int3"]


def parsed(name: str) -> Any:
    return kv_quality.parse_configuration(name, TOKENS, KV_HEADS, HEAD_DIM)


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    """Weights are large enough that attention matters: with those of initialization, all tokens are equally likely."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=TOKENS,
        initializer_range=0.3,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    tokens = torch.randint(0, config.vocab_size, (SEQUENCES, TOKENS + 1))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # products are tiny, and threads that wait for one another make them slow
    try:
        *_, last = kv_quality.measure(model, tokens, [parsed(name) for name in NAMES])
    finally:
        torch.set_num_threads(threads)
    return last


def rows(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in result["rows"]}


def test_reference_is_the_model(result: dict[str, Any]) -> None:
    assert 0 < result["difference_from_transformers"] < kv_quality.MOST_DIFFERENCE


def test_reference_against_itself(result: dict[str, Any]) -> None:
    again = rows(result)["fp16"]
    assert (again["kl"], again["loss"], again["same_top"]) == (0, 0, 1)
    assert again["perplexity"] == rows(result)["reference"]["perplexity"]
    assert again["end_bits"] == 16


def test_fewer_bits_are_worse(result: dict[str, Any]) -> None:
    found = rows(result)
    assert list(found) == ["reference", *NAMES]
    assert 0 < found["int8"]["kl"] < found["int3"]["kl"] < found["int2"]["kl"]
    assert found["int2"]["same_top"] < 1
    assert found["int8"]["page_bytes"] > found["int2"]["page_bytes"]
    assert all(row["mean_bits"] > row["end_bits"] for row in found.values())


def test_mixtures_at_equal_bytes(result: dict[str, Any]) -> None:
    (row,) = result["equal_bytes"]
    mine, other = (rows(result)[row[key]] for key in ("name", "against"))
    assert (mine["name"], other["name"]) == ("importance@int3", "int3")
    assert 0.9 < row["bytes_ratio"] <= 1
    assert 0.9 < row["mean_bits_ratio"] <= 1
    assert row["kl_gain"] == pytest.approx(other["kl"] - mine["kl"])
    assert row["log_likelihood_gain"] == pytest.approx(other["loss"] - mine["loss"])


def test_results_are_rendered(result: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [name for name in render_docs.FIGURES if name.startswith("kv-quality")]
    monkeypatch.setattr(render_docs, "RESULTS", tmp_path)
    assert all("has no `kv-quality` yet" in render_docs.figures(name) for name in names)
    about = {
        "command": "python benchmarks/kv_quality.py", "date": "2026-11-26", "cpu": "a CPU", "cores": 2, "versions": {},
        "device": {"name": "CPU", "driver": None, "cuda": None}, "sequences": SEQUENCES, "tokens": TOKENS,
    }  # fmt: skip
    (tmp_path / "2026-11-26-kv-quality.json").write_text(json.dumps(about | result, allow_nan=False))
    text = {name: render_docs.figures(name) for name in names}
    assert "| importance@int3 |" in text["kv-quality-configurations"]
    assert "| importance@int3 | int3 |" in text["kv-quality-equal-bytes"]
    assert text["kv-quality-verdicts"].startswith("Of 1 mixtures")
    plot = pytest.importorskip("kvpack.bench.plot")
    plot.plot_kv_quality(about | result, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="nothing to draw"):
        plot.plot_kv_quality(about | {"rows": result["rows"][:2]}, tmp_path / "none.png")


def test_measures_by_hand() -> None:
    reference = torch.tensor([[0.0, math.log(3)], [0.0, 0.0]])  # probabilities 1/4, 3/4 and 1/2, 1/2
    logits = torch.tensor([[1.0, 1.0], [math.log(4), 0.0]])  # 1/2, 1/2 and 4/5, 1/5
    found = kv_quality.measures(reference, logits, torch.tensor([1, 0]))
    assert found.log_likelihood.tolist() == pytest.approx([math.log(1 / 2), math.log(4 / 5)])
    by_hand = [1 / 4 * math.log(1 / 2) + 3 / 4 * math.log(3 / 2), 1 / 2 * math.log(5 / 8) + 1 / 2 * math.log(5 / 2)]
    assert found.kl.tolist() == pytest.approx(by_hand)
    same = kv_quality.measures(reference, reference, torch.tensor([1, 0]))
    assert (same.kl.tolist(), same.same_top.tolist()) == ([0, 0], [1, 1])
    # Perplexity of what was seen: (1/2 · 4/5)^(-1/2).
    run = kv_quality.Run(torch.empty(0), 16.0, 16.0, 1, 1.0, 1.0)
    wide = kv_quality.Measures(*(x.repeat(1, 64) for x in (found.log_likelihood[None], found.kl[None], found.kl[None])))
    row = kv_quality.result_row(parsed("fp16"), run, wide, wide)
    assert row["perplexity"] == pytest.approx(math.sqrt(1 / (1 / 2 * 4 / 5)))


def test_standard_errors_are_of_blocks() -> None:
    # Four blocks of 64 with means 1, 2, 3, 4: what varies within a block is not taken for independent.
    values = torch.arange(1, 5.0).repeat_interleave(64).view(2, 128).double()
    values[:, ::2] += 10
    values[:, 1::2] -= 10
    assert kv_quality.standard_error(values) == pytest.approx(math.sqrt(5 / 3) / 2)
    assert kv_quality.standard_error(values[:1, :64]) is None
    assert [kv_quality_report.verdict(x, 1.0) for x in (2.5, 1.0, -2.5)] == ["wins", "no difference", "loses"]
    assert [kv_quality_report.verdict(x, e) for x, e in ((2.5, None), (0.0, 0.0))] == ["–", "equal"]


@pytest.mark.parametrize("tokens", [256, 2048])
@pytest.mark.parametrize("name", ["int4", "int3", "int2"])
def test_equal_budgets_allow_equal_bytes(name: str, tokens: int) -> None:
    """By the pages that a budgeted cache has in the end."""
    chosen = kv_quality.parse_configuration(f"importance@{name}", tokens, 1, 16)
    used = {}
    for key, options in (("one", {"formats": PageFormat[name.upper()]}), ("mixed", {"budget": chosen.budget})):
        cache = KVCache(1, 1, 16, tokens, device="cpu", **options)
        generator = torch.Generator().manual_seed(0)
        for _ in range(tokens // 64):
            x = torch.randn((1, 1, 64, 16), generator=generator).to(cache.dtype)
            cache.append(0, x, x)
        used[key] = cache.pools.bytes_in_use
    page = cache.pools.page_bytes(Side.K, cache.full_format)
    assert used["one"] - page < used["mixed"] <= used["one"]
    # At the bytes of the lowest width there is nothing to mix.
    assert name != "int2" or used["mixed"] == used["one"]


def test_names() -> None:
    assert parsed("k4v2").against == "int3"
    assert parsed("k4v3").against is None
    assert parsed("position@0.25").budget == 0.25
    assert parsed("importance@int3").against == "int3"
    default = kv_quality.DEFAULT_CONFIGURATIONS
    assert [one.name for one in kv_quality.with_formats_first(list(map(parsed, default)))] == default
    some = kv_quality.with_formats_first([parsed("k2v4"), parsed("int3"), parsed("k2v4")])
    assert [one.name for one in some] == ["int3", "k2v4"]
    for name in ("int5", "random@0.3", "importance@2", "importance@int5", "uniform@"):
        with pytest.raises(ValueError, match=r"no format|no policy"):
            parsed(name)
    with pytest.raises(ValueError, match="too few"):
        kv_quality.parse_configuration("importance@int3", 64, 1, 16)


def test_runs_are_told_where_stderr_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with kv_quality.progress(2, 64) as begin:
        for name in ("reference", "int8"):
            begin(name)(64)
    out, err = capsys.readouterr()
    assert out == ""
    assert [line.split(", after")[0] for line in err.splitlines()] == ["reference: run 1 of 2", "int8: run 2 of 2"]
