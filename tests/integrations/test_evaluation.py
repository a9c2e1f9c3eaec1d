"""Perplexity, KL and same top tokens: equal to what is computed by hand, in fp64, without the code under test."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tiny_text_model import POSITIONS, VOCABULARY, text, write_model, write_novel, write_tokenizer  # noqa: E402

from kvpack.encode.progress import Progress  # noqa: E402
from kvpack.errors import InputError  # noqa: E402
from kvpack.integrations.transformers import evaluation  # noqa: E402
from kvpack.integrations.transformers.cache_options import CacheOptions  # noqa: E402
from kvpack.integrations.transformers.evaluation import (  # noqa: E402
    Logits,
    Mean,
    ReferenceLogits,
    TextWindows,
    evaluate,
    full_forward,
    measure,
    step_by_step,
    text_windows,
)

CONTEXT, WINDOWS = 32, 5


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("original"))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory, original: Path) -> Path:
    """The original with some noise on each weight."""
    directory = tmp_path_factory.mktemp("other")
    model = transformers.AutoModelForCausalLM.from_pretrained(original)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * parameter.std() * 0.1)
    model.save_pretrained(directory)
    write_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def novel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_novel(tmp_path_factory.mktemp("text"))


def log_probabilities(directory: Path, ids: Any) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(directory).double().eval()
    with torch.no_grad():
        return torch.log_softmax(model(ids).logits, -1)


def by_hand(values: Any) -> tuple[float, float]:
    """Mean of all, and standard error of the rows' means."""
    rows = [float(row.mean()) for row in values]
    mean = sum(rows) / len(rows)
    return mean, math.sqrt(sum((row - mean) ** 2 for row in rows) / (len(rows) - 1) / len(rows))


def test_figures_are_those_computed_by_hand(original: Path, other: Path, novel: Path) -> None:
    report = evaluate([other], novel, against=original, context=CONTEXT, windows=WINDOWS)
    ids = torch.tensor(transformers.AutoTokenizer.from_pretrained(original)(novel.read_text(), verbose=False).input_ids)
    available = len(ids) // CONTEXT
    assert (report.windows, report.windows_available, report.begins_with) == (WINDOWS, available, ())
    chosen = torch.stack([ids.view(-1)[i * CONTEXT :][:CONTEXT] for i in (available * w // 5 for w in range(5))])
    assert report.scored_tokens == WINDOWS * (CONTEXT - 1)
    q, p = (log_probabilities(path, chosen)[:, :-1] for path in (other, original))
    following = chosen[:, 1:, None]
    losses = -q.gather(-1, following)[..., 0], -p.gather(-1, following)[..., 0]
    quality = report.models[0].full
    for found, values in (
        (quality.loss, losses[0]),
        (quality.kl, (p.exp() * (p - q)).sum(-1)),
        (quality.same_top_token, (p.argmax(-1) == q.argmax(-1)).double()),
        (quality.loss_increase, losses[0] - losses[1]),
    ):
        mean, error = by_hand(values)
        assert found is not None
        assert found.value == pytest.approx(mean, rel=1e-5, abs=1e-7)
        assert found.standard_error == pytest.approx(error, rel=1e-4, abs=1e-7)
    mean, error = by_hand(losses[0])
    assert quality.perplexity.value == pytest.approx(math.exp(mean), rel=1e-6)
    assert quality.perplexity.standard_error == pytest.approx(math.exp(mean) * error, rel=1e-5)
    assert quality.kl is not None
    assert 0.01 < quality.kl.value < 1  # the noise is neither nothing nor everything
    assert report.original is not None
    assert report.original.full.loss.value == pytest.approx(by_hand(losses[1])[0], rel=1e-6)


def test_a_model_against_itself(original: Path, novel: Path) -> None:
    report = evaluate([original], novel, against=original, context=CONTEXT, windows=2)
    quality = report.models[0].full
    assert (quality.kl, quality.same_top_token, quality.loss_increase) == (Mean(0, 0), Mean(1, 0), Mean(0, 0))
    assert report == evaluate([original], novel, against=original, context=CONTEXT, windows=2)  # deterministic


def test_one_window_has_no_standard_error(original: Path, novel: Path) -> None:
    quality = evaluate([original], novel, context=CONTEXT, windows=1).models[0].full
    assert quality.perplexity.standard_error is quality.loss.standard_error is None
    assert quality.kl is None


def test_the_token_before_a_text_stands_before_each_window(tmp_path: Path, original: Path, novel: Path) -> None:
    directory = write_model(tmp_path / "model")
    write_tokenizer(directory, begins=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    windows = text_windows(tokenizer, novel.read_text(), context=CONTEXT, windows=3)
    assert windows.begins_with == (0,)
    assert windows.ids[:, 0].tolist() == [0, 0, 0]
    assert windows.scored == CONTEXT - 1  # all of the text's own tokens
    plain = tokenizer(novel.read_text(), add_special_tokens=False, verbose=False).input_ids
    assert windows.ids[0, 1:].tolist() == plain[: CONTEXT - 1]
    assert windows.available == len(plain) // (CONTEXT - 1)
    found = evaluate([directory], novel, context=CONTEXT, windows=3).models[0].full
    p = log_probabilities(directory, windows.ids)[:, :-1]
    loss = -p.gather(-1, windows.ids[:, 1:, None])[..., 0]
    assert found.loss.value == pytest.approx(float(loss.mean()), rel=1e-6)
    with pytest.raises(InputError, match="another way to cut a text"):
        evaluate([directory], novel, against=original, context=CONTEXT)


class _OtherTokensAfterTheFirst:
    """As SentencePiece's old tokenizers: what follows a special token is cut without a space before it."""

    all_special_ids = (0, 1)

    def __call__(self, text: str, add_special_tokens: bool = True, **_: Any) -> Any:
        ids = [ord(letter) for letter in text]
        return transformers.BatchEncoding({"input_ids": [0, *ids] if add_special_tokens else [7, *ids[1:]]})


def test_prefix_of_a_tokenizer_that_cuts_differently_behind_it() -> None:
    windows = text_windows(_OtherTokensAfterTheFirst(), "abcdefgh", context=5, windows=2)
    assert windows.begins_with == (0,)
    assert windows.ids.tolist() == [[0, 7, *b"bcd"], [0, *b"efgh"]]


def test_step_by_step_is_the_full_forward(original: Path, novel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through a cache that loses nothing; in two batches of windows."""
    monkeypatch.setattr(evaluation, "_ROWS", 3)
    model = transformers.AutoModelForCausalLM.from_pretrained(original).eval()
    windows = text_windows(
        transformers.AutoTokenizer.from_pretrained(original), novel.read_text(), context=CONTEXT, windows=WINDOWS
    )
    with ReferenceLogits(windows) as reference:
        full = measure(reference.keep(full_forward(model, windows)), windows)
        steps = measure(step_by_step(model, windows, lambda: transformers.DynamicCache()), windows, reference)
    assert steps.kl is not None
    assert steps.same_top_token is not None
    assert steps.kl.value < 1e-8
    assert steps.same_top_token.value == 1
    assert steps.loss.value == pytest.approx(full.loss.value, rel=1e-6)
    assert steps.loss.standard_error == pytest.approx(full.loss.standard_error, rel=1e-5)


def test_step_by_step_through_pages(original: Path, other: Path, novel: Path) -> None:
    """16-bit pages are the full forward but for fp16; pages of 2 bits are further away than those of 8.

    The first page and the recent ones stay in 16 bits: of 224 tokens 64 or more are in pages that do not.
    """
    options: dict[str, Any] = {"against": original, "context": 224, "windows": 2}
    lossless = evaluate([original, other], novel, cache=CacheOptions(16), **options)
    assert lossless.original is not None
    assert lossless.original.stepwise is None  # it is the reference, and read in full
    found = {16: lossless.models[0]}
    for bits in (8, 2):
        found[bits] = evaluate([original], novel, cache=CacheOptions(bits), **options).models[0]
        assert found[bits].full == found[16].full
    kl = {bits: model.stepwise.kl.value for bits, model in found.items()}  # type: ignore[union-attr]
    assert kl[16] < 1e-5
    assert kl[16] < kl[8] < kl[2]
    assert kl[2] > 5e-5
    full, steps = lossless.models[1].full, lossless.models[1].stepwise
    assert full.kl is not None
    assert steps is not None
    assert steps.kl is not None
    assert steps.kl.value == pytest.approx(full.kl.value, rel=1e-2)
    assert steps.perplexity.value == pytest.approx(full.perplexity.value, rel=1e-3)
    held = [model.kv_bits for model in found.values()]
    assert held[0] == pytest.approx(16 * 256 / 223, rel=1e-3)  # four whole pages hold 223 tokens
    assert held == sorted(held, key=lambda bits: -(bits or 0))


def test_a_budget_is_an_option_too(original: Path, novel: Path) -> None:
    report = evaluate([original], novel, context=224, windows=1, cache=CacheOptions(budget=0.6))
    assert report.models[0].stepwise is not None
    assert report.models[0].kv_bits is not None
    assert report.models[0].kv_bits < 0.9 * 16 * 256 / 223  # what 16 bits take of four pages for 223 tokens
    for wrong in ({}, {"bits": 4, "budget": 0.5}, {"bits": 5}, {"budget": 2.0}):
        with pytest.raises(InputError, match="--kv-"):
            CacheOptions(**wrong)


def test_chunks_do_not_change_figures(original: Path, novel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = evaluate([original], novel, against=original, context=CONTEXT, windows=2)
    monkeypatch.setattr(evaluation, "_CHUNK_BYTES", 8 * VOCABULARY * 7)  # 7 tokens of 31
    chunked = evaluate([original], novel, against=original, context=CONTEXT, windows=2)
    assert chunked.models[0].full.loss.value == pytest.approx(whole.models[0].full.loss.value, rel=1e-12)


def test_improbable_tokens_do_not_spoil_kl() -> None:
    """p = 0 contributes nothing, whatever the other model says."""
    windows = TextWindows(torch.zeros((1, 2), dtype=torch.int64), 1, 2, ())
    reference = torch.tensor([[[0.0, 1.0, -math.inf]]])
    with ReferenceLogits(windows) as kept:
        list(kept.keep([Logits(slice(0, 1), slice(0, 1), reference)]))
        found = measure([Logits(slice(0, 1), slice(0, 1), torch.tensor([[[0.0, 0.5, -math.inf]]]))], windows, kept)
    p, q = torch.tensor([0.0, 1.0]).double().log_softmax(0), torch.tensor([0.0, 0.5]).double().log_softmax(0)
    assert found.kl is not None
    assert found.kl.value == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-6)


def test_progress_counts_every_token(original: Path, other: Path, novel: Path) -> None:
    totals: list[int] = []
    done: list[int] = []
    progress = Progress(total=totals.append, advance=done.append)
    cache = CacheOptions(8)
    evaluate([other], novel, against=original, context=CONTEXT, windows=3, cache=cache, progress=progress)
    assert totals == [3 * 3 * CONTEXT]
    assert sum(done) == totals[0]


def test_what_is_refused(tmp_path: Path, original: Path, novel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = tmp_path / "short.txt"
    short.write_text("the river", encoding="utf-8")
    with pytest.raises(InputError, match=r"fewer than one window of 32: a longer text is needed"):
        evaluate([original], short, context=CONTEXT)
    with pytest.raises(InputError, match=rf"has positions for {POSITIONS} tokens"):
        evaluate([original], novel, context=POSITIONS + 1)
    assert evaluate([original], novel, windows=1).context == POSITIONS
    latin = tmp_path / "latin.txt"
    latin.write_bytes("é".encode("latin-1") * 100)
    with pytest.raises(InputError, match="not UTF-8"):
        evaluate([original], latin)
    stranger = write_model(tmp_path / "stranger")
    write_tokenizer(stranger, learned=text().swapcase())
    with pytest.raises(InputError, match="another vocabulary"):
        evaluate([stranger], novel, against=original)
    larger = write_model(tmp_path / "larger", vocabulary=VOCABULARY + 8)
    with pytest.raises(InputError, match=rf"logits of {VOCABULARY + 8} tokens, the original of {VOCABULARY}"):
        evaluate([larger], novel, against=original, windows=1)
    monkeypatch.setattr(evaluation.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(InputError, match=r"has 0.00 GB free: fewer --windows"):
        evaluate([original], novel, against=original)


def test_logits_that_are_not_finite(tmp_path: Path, novel: Path) -> None:
    directory = write_model(tmp_path / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    model.model.norm.weight.data.fill_(math.inf)
    model.save_pretrained(directory)
    with pytest.raises(InputError, match="window 0 are not finite"):
        evaluate([directory], novel, windows=1)
