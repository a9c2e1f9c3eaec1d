"""Prompts in several forward passes: the same pages and tokens, whatever ends or fails in between."""

from __future__ import annotations

import itertools
import json
import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from integrations.generation import greedy, logits  # noqa: E402
from integrations.models import ARCHITECTURES, VOCABULARY  # noqa: E402

from kvpack import KVPackCache  # noqa: E402
from kvpack.errors import CacheFullError, CacheInputError  # noqa: E402
from kvpack.integrations.transformers import prefill as prefilling  # noqa: E402
from kvpack.integrations.transformers.decode_graph import DecodeGraph  # noqa: E402
from kvpack.integrations.transformers.prefill import Prefilled, prefill  # noqa: E402
from kvpack.runtime.kv import cache as kv_cache  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:KVPackCache. the model is in torch.float32:UserWarning")

# Instead of 2,048, so that short prompts have several.
CELL = 256
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def short_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvpack.integrations.transformers import cache as of_transformers

    for module in (kv_cache, of_transformers, prefilling):
        monkeypatch.setattr(module, "CELL_TOKENS", CELL)


@pytest.fixture(scope="module")
def model() -> Any:
    made = ARCHITECTURES["llama"].model(max_position_embeddings=4096)
    made.set_attn_implementation("kvpack")
    return made


def prompt(tokens: int, seed: int = 1, rows: int = 1) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def formats(cache: KVPackCache, row: int = 0) -> list[Any]:
    return [cache.kv.precision_map(layer)[:, row].tolist() for layer in range(cache.kv.num_layers)]


def values(cache: KVPackCache, row: int = 0) -> torch.Tensor:
    """[layers, 2, heads, tokens, head_dim], fp32."""
    kv = cache.kv
    return torch.stack([torch.stack(kv.read(layer, row, torch.float32)) for layer in range(kv.num_layers)])


@pytest.mark.parametrize("options", [{}, {"formats": "INT4"}, {"formats": "INT2"}], ids=str)
def test_the_size_of_passes_changes_nothing(model: Any, options: dict[str, Any]) -> None:
    """Formats of all pages and greedy tokens are equal; values but for the rounding of sums over other shapes."""
    ids = prompt(900)
    found = []
    for chunk in (CELL, 100, 128, 300, 7):
        cache = KVPackCache(model.config, **options)
        assert prefill(model, ids, cache, chunk_tokens=chunk) == Prefilled(0, 899, min(chunk, CELL))
        assert cache.get_seq_length() == 899
        tokens = greedy(model, ids, cache, 40)
        found.append((tokens.tolist(), formats(cache), values(cache)))
    for tokens, kinds, kept in found[1:]:
        assert (tokens, kinds) == found[0][:2]
        # A value in the midst of two steps of its page may go either way.
        assert ((kept - found[0][2]).abs() > 2e-2).float().mean() < 2e-3
    cache = KVPackCache(model.config, **options)
    assert greedy(model, ids, cache, 40).tolist() == found[0][0]
    assert formats(cache) == found[0][1]


def test_under_a_budget_too(model: Any) -> None:
    """Passes of 7 tokens are too short for what is observed of the last ones of a cell; longer ones are not."""
    ids, found = prompt(900), []
    for chunk in (CELL, 100, 128, 64):
        cache = KVPackCache(model.config, budget=0.4)
        prefill(model, ids, cache, chunk_tokens=chunk)
        tokens = greedy(model, ids, cache, 40)
        found.append((tokens.tolist(), formats(cache)))
    assert found == found[:1] * 4


def test_passes_do_not_go_over_the_end_of_a_cell_and_the_shorter_one_comes_first(model: Any) -> None:
    done: list[tuple[int, int]] = []
    cache = KVPackCache(model.config)
    prefill(model, prompt(600), cache, chunk_tokens=100, progress=lambda *counts: done.append(counts))
    assert done == [(end, 599) for end in (56, 156, 256, 312, 412, 512, 599)]


@pytest.mark.parametrize("options", [{"formats": "INT4"}, {"budget": 0.4}], ids=str)
def test_ended_and_gone_on(model: Any, options: dict[str, Any]) -> None:
    ids, whole, cache = prompt(700), KVPackCache(model.config, **options), KVPackCache(model.config, **options)
    prefill(model, ids, whole, chunk_tokens=100)

    class Enough(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done > 300:
            raise Enough

    with pytest.raises(Enough):
        prefill(model, ids, cache, chunk_tokens=100, progress=stop)
    assert cache.get_seq_length() == 312
    assert cache.kv.lengths.tolist() == [[312]] * 2
    assert cache.ids[0].tolist() == ids[0, :312].tolist()
    assert prefill(model, ids, cache, chunk_tokens=100) == Prefilled(312, 387, 100)
    assert greedy(model, ids, cache, 20).tolist() == greedy(model, ids, whole, 20).tolist()
    assert torch.equal(values(cache), values(whole))


def test_another_prompt_keeps_what_is_common(model: Any) -> None:
    ids, cache = prompt(500), KVPackCache(model.config)
    prefill(model, ids, cache)
    other = torch.cat([ids[:, :300], prompt(100, seed=2)], 1)
    assert prefill(model, other, cache).reused == 300
    assert greedy(model, other, cache, 10).tolist() == greedy(model, other, KVPackCache(model.config), 10).tolist()


@pytest.mark.parametrize("failing", [0, 1])
def test_a_pass_that_fails_half_way_is_taken_back(model: Any, failing: int) -> None:
    """In either layer, in the first pass, in the midst of a cell and behind one: the next call goes on."""
    ids, whole = prompt(600), KVPackCache(model.config, formats="INT2")
    prefill(model, ids, whole, chunk_tokens=100)
    mlp = model.model.layers[failing].mlp
    for number in range(7):
        cache, calls = KVPackCache(model.config, formats="INT2"), itertools.count()

        def fail(*_: Any, calls: Any = calls, number: int = number) -> None:
            if next(calls) == number:
                raise RuntimeError("no luck")

        hook = mlp.register_forward_pre_hook(fail)
        try:
            with pytest.raises(RuntimeError, match="no luck"):
                prefill(model, ids, cache, chunk_tokens=100)
            done = [0, 56, 156, 256, 312, 412, 512][number]
            assert cache.get_seq_length() == done
            assert prefill(model, ids, cache, chunk_tokens=100).reused == done
        finally:
            hook.remove()
        assert torch.equal(values(cache), values(whole))


def test_a_pass_that_runs_out_of_memory_is_done_again_with_half(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, whole, cache = (
        prompt(600),
        KVPackCache(model.config, formats="INT4"),
        KVPackCache(model.config, formats="INT4"),
    )
    prefill(model, ids, whole)

    def scarce(_module: Any, arguments: tuple[torch.Tensor, ...]) -> None:
        if arguments[0].shape[1] > 80:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    hook = model.model.layers[1].mlp.register_forward_pre_hook(scarce)
    done: list[int] = []
    try:
        assert prefill(model, ids, cache, progress=lambda count, _: done.append(count)) == Prefilled(0, 599, 64)
    finally:
        hook.remove()
    assert done == [64, 128, 192, 256, 320, 384, 448, 512, 535, 599]
    assert formats(cache) == formats(whole)


def test_free_memory_chooses_the_size_of_passes(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefilling, "_MOST_TOKENS", 2048)
    device, of_token = torch.device("cpu"), prefilling.activation_bytes(model)
    assert of_token == 4 * (16 * 64 + 4 * 128)
    cases = {None: 2048, 1 << 40: 2048, 4 * 1024 * (of_token + 500): 1024, 4 * 1023 * (of_token + 500): 512, 0: 64}
    for free, tokens in cases.items():
        monkeypatch.setattr(prefilling, "free_bytes", lambda _, free=free: free)
        assert prefilling._fitting_tokens(model, 1, 100, device) == tokens
    monkeypatch.setattr(prefilling, "free_bytes", lambda _: 4 * 1024 * (of_token + 500))
    assert prefilling._fitting_tokens(model, 2, 100, device) == 512


@pytest.mark.parametrize("options", [{}, {"formats": "INT4"}], ids=str)
def test_rows_with_pads(model: Any, options: dict[str, Any]) -> None:
    """Each row has the tokens that it has alone."""
    ids, lengths = prompt(600, rows=3), [600, 301, 256]
    mask = torch.ones_like(ids)
    for row, count in enumerate(lengths):
        mask[row, : 600 - count] = 0
    cache = KVPackCache(model.config, **options)
    prefill(model, ids, cache, attention_mask=mask, chunk_tokens=100)
    assert cache.kv.lengths.tolist() == [[599, 300, 255]] * 2
    found = greedy(model, ids, cache, 20, attention_mask=mask)
    for row, count in enumerate(lengths):
        alone = KVPackCache(model.config, **options)
        expected = greedy(model, ids[row : row + 1, 600 - count :], alone, 20)
        assert found[row, 600:].tolist() == expected[0, count:].tolist()
        assert formats(cache, row)[0][0][:8] == formats(alone)[0][0][:8]


def test_a_decode_graph_goes_on(model: Any) -> None:
    ids, cache = prompt(300), KVPackCache(model.config, formats="INT4")
    prefill(model, ids, cache)
    decoder = DecodeGraph(model, cache, max_tokens=400)
    decoder.start(ids[:, -1], torch.tensor([299]))
    found = [int(decoder.step()) for _ in range(10)]
    assert found == greedy(model, ids, KVPackCache(model.config, formats="INT4"), 10)[0, 300:].tolist()


def test_a_context_that_is_saved_in_the_midst_is_quantized(model: Any, tmp_path: Path) -> None:
    ids, cache, whole = (
        prompt(300),
        KVPackCache(model.config, formats="INT4"),
        KVPackCache(model.config, formats="INT4"),
    )
    prefill(model, ids, cache, chunk_tokens=100)
    logits(model, ids[:, :-1], whole)
    cache.save(tmp_path / "context", model, ids)
    assert formats(KVPackCache.load(tmp_path / "context", model)) == formats(whole)


@pytest.mark.skipif(not hasattr(signal, "raise_signal"), reason="signals")
def test_an_interrupt_waits_for_the_pass(model: Any) -> None:
    ids, cache = prompt(600), KVPackCache(model.config)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    hook = model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: os.kill(os.getpid(), signal.SIGINT))
    try:
        with pytest.raises(KeyboardInterrupt):
            prefill(model, ids, cache, chunk_tokens=100)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        hook.remove()
        signal.signal(signal.SIGINT, before)
    assert cache.get_seq_length() == 56
    assert prefill(model, ids, cache).reused == 56


def test_wrong_calls(model: Any) -> None:
    ids, cache = prompt(100), KVPackCache(model.config)
    with pytest.raises(CacheInputError, match="fills a KVPackCache"):
        prefill(model, ids, transformers.DynamicCache())
    with pytest.raises(CacheInputError, match="chunk_tokens is 0"):
        prefill(model, ids, cache, chunk_tokens=0)
    with pytest.raises(CacheInputError, match="no token to read"):
        prefill(model, ids[:, :0], cache)
    with pytest.raises(CacheInputError, match="attention_mask has shape"):
        prefill(model, ids, cache, attention_mask=torch.ones(1, 99))
    mask = torch.ones_like(ids)
    mask[0, 0] = 0
    with pytest.raises(CacheInputError, match="one row at a time, or use formats"):
        prefill(model, ids, KVPackCache(model.config, budget=0.4), attention_mask=mask)
    full = KVPackCache(model.config, max_tokens=90)
    with pytest.raises(CacheFullError):
        prefill(model, ids, full, chunk_tokens=50)
    assert full.get_seq_length() == 49
    assert prefill(model, ids[:, :1], cache) == Prefilled(0, 0, 0)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"formats": "INT4"}, {"budget": 0.4}], ids=str)
def test_on_a_gpu(options: dict[str, Any]) -> None:
    """Passes of any size, and steps of a CUDA graph behind them, for one prompt after the other."""
    made = ARCHITECTURES["llama"].model(max_position_embeddings=4096).cuda().half()
    made.set_attn_implementation("kvpack")
    ids, found = prompt(900).cuda(), []
    for chunk in (None, 128, 64):
        cache = KVPackCache(made.config, **options)
        assert prefill(made, ids, cache, chunk_tokens=chunk).read == 899
        kinds = formats(cache)
        cache.kv.check()
        found.append((greedy(made, ids, cache, 20)[0, 900:].tolist(), kinds))
    assert [kinds for _, kinds in found] == [found[0][1]] * 3
    cache = KVPackCache(made.config, **options)
    decoder = DecodeGraph(made, cache, max_tokens=1200)
    for _ in range(2):
        cache.reset()
        prefill(made, ids, cache)
        decoder.start(ids[:, -1], torch.tensor([899]))
        tokens = [int(decoder.step()) for _ in range(20)]
        assert sum(a == b for a, b in zip(tokens, found[0][0], strict=True)) >= 15
    assert decoder.is_captured


def test_the_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it writes is what the documents show; without a result they show nothing."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import render_docs

    monkeypatch.setattr(render_docs, "RESULTS", tmp_path)
    assert render_docs.figures("prefill") == ""
    path = tmp_path / "2026-11-30-prefill.json"
    arguments = ["--small", "--device", "cpu", "--tokens", "70,300", "--caches", "INT2", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", ["prefill.py", *arguments])
    runpy.run_path(str(BENCHMARKS / "prefill.py"), run_name="__main__")
    result = json.loads(path.read_text())
    rows = result["rows"]
    assert [(row["tokens"], row["chunk_tokens"]) for row in rows] == [(70, 69), (300, CELL)]
    rows[1]["peak_bytes"] = 2_000_000_000  # as on a GPU
    rows[0] = {"tokens": 70, "cache": "INT2", "left_out": "memory"}
    path.write_text(json.dumps(result))
    shown = render_docs.figures("prefill")
    assert "| 70 | INT2 | no memory left | – |" in shown
    assert f"| 300 | INT2 | {rows[1]['seconds']:.2f} |" in shown


REAL = os.environ.get("KVPACK_BOOKS_MODEL")


@pytest.mark.skipif(REAL is None, reason="KVPACK_BOOKS_MODEL is not set")
@pytest.mark.parametrize("options", [{}, {"formats": "INT4"}, {"formats": "INT2"}], ids=str)
def test_books(options: dict[str, Any]) -> None:
    made = transformers.AutoModelForCausalLM.from_pretrained(REAL, attn_implementation="kvpack").eval()
    ids, found = prompt(700), []
    for chunk in (CELL, 128, 100):
        cache = KVPackCache(made.config, **options)
        prefill(made, ids, cache, chunk_tokens=chunk)
        found.append((greedy(made, ids, cache, 20).tolist(), formats(cache)))
    cache = KVPackCache(made.config, **options)
    found.append((greedy(made, ids, cache, 20).tolist(), formats(cache)))
    assert found == found[:1] * 4
