"""Generated text: the same tokens as transformers' own, streamed, counted, and timed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tiny_text_model import POSITIONS, TEMPLATE, write_model, write_tokenizer  # noqa: E402

from kvpack.errors import InputError  # noqa: E402
from kvpack.integrations.transformers.cache import cache_keyword  # noqa: E402
from kvpack.integrations.transformers.cache_options import CacheOptions  # noqa: E402
from kvpack.integrations.transformers.causal_models import load_causal_model, load_tokenizer  # noqa: E402
from kvpack.integrations.transformers.text_generation import chat_prompt, generate_text  # noqa: E402

PROMPTS = ("the old house", "rain", "a young light walked into the night and then")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def loaded(directory: Path) -> tuple[Any, Any]:
    return load_causal_model(directory), load_tokenizer(directory)


def greedy(model: Any, ids: list[int], count: int) -> list[int]:
    """Without a cache, and without ``generate``."""
    row = list(ids)
    for _ in range(count):
        with torch.no_grad():
            row.append(int(model(torch.tensor([row]), use_cache=False).logits[0, -1].argmax()))
        if row[-1] == 1:
            break
    return row[len(ids) :]


def test_greedy_tokens_single_and_batch(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    expected = [greedy(model, tokenizer(prompt).input_ids, 20) for prompt in PROMPTS]
    texts = tuple(tokenizer.decode(row, skip_special_tokens=True) for row in expected)
    batch = generate_text(model, tokenizer, PROMPTS, max_new_tokens=20)
    assert batch.texts == texts
    assert batch.new_tokens == sum(map(len, expected))
    assert batch.prompt_tokens == sum(len(tokenizer(prompt).input_ids) for prompt in PROMPTS)
    pieces: list[str] = []
    single = generate_text(model, tokenizer, PROMPTS[:1], max_new_tokens=20, on_text=pieces.append)
    assert single.texts == texts[:1]
    assert "".join(pieces) == texts[0]
    assert len(pieces) > 1  # transformers before 5.24 hands on whole words
    assert not single.interrupted


def test_what_it_took(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    found = generate_text(model, tokenizer, PROMPTS[:1], max_new_tokens=12)
    assert found.prefill_seconds is not None
    assert found.tokens_per_second is not None
    assert found.prefill_seconds > 0
    assert found.tokens_per_second > 0
    # The last token is never put into the cache: 2 layers, K and V, 2 heads of 16, fp32.
    tokens = found.prompt_tokens + found.new_tokens - 1
    assert found.kv_bytes == tokens * 2 * 2 * 2 * 16 * 4
    assert found.kv_bytes_16_bit == found.kv_bytes // 2
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert (found.weights.weights, found.weights.bytes, found.weights.dense_bytes) == (
        parameters,
        4 * parameters,
        4 * parameters,
    )
    assert found.peak_memory_bytes > 4 * parameters
    assert generate_text(model, tokenizer, PROMPTS[:1], max_new_tokens=1).tokens_per_second is None


def test_through_pages(directory: Path) -> None:
    """16-bit pages give the default cache's tokens; what pages of 4 bits take is told."""
    tokenizer = load_tokenizer(directory)
    model = load_causal_model(directory, attention="kvpack")
    expected = generate_text(model, tokenizer, PROMPTS, max_new_tokens=20)
    found = generate_text(model, tokenizer, PROMPTS, max_new_tokens=20, cache=CacheOptions(16).new(model))
    assert found.texts == expected.texts
    long = ["the old house was under rain and " * 30]
    cache = CacheOptions(4).new(model)
    found = generate_text(model, tokenizer, long, max_new_tokens=30, cache=cache)
    tokens = found.prompt_tokens + found.new_tokens - 1
    assert found.kv_bytes_16_bit == tokens * 2 * 2 * 2 * 16 * 2
    assert cache.kv is not None
    assert found.kv_bytes == cache.kv.pools.bytes_in_use < 0.9 * found.kv_bytes_16_bit


def test_an_end_token_ends_a_row(tmp_path: Path, loaded: tuple[Any, Any]) -> None:
    """What follows it in a batch is padding, and is not counted."""
    model, tokenizer = loaded
    rows = [greedy(model, tokenizer(prompt).input_ids, 12) for prompt in PROMPTS]
    end = next(token for token in rows[0][1:6] if token not in rows[2])
    before = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = [1, end]
    try:
        found = generate_text(model, tokenizer, (PROMPTS[0], PROMPTS[2]), max_new_tokens=12)
    finally:
        model.generation_config.eos_token_id = before
    first = rows[0][: rows[0].index(end) + 1]
    assert found.new_tokens == len(first) + len(rows[2])
    assert found.texts[0] == tokenizer.decode(first, skip_special_tokens=True)


def test_sampling_follows_the_seed(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded

    def draw(seed: int, temperature: float = 1.5, top_p: float = 1.0) -> str:
        options = {"seed": seed, "temperature": temperature, "top_p": top_p}
        return generate_text(model, tokenizer, PROMPTS[:1], max_new_tokens=12, **options).texts[0]

    assert draw(1) == draw(1)
    assert len({draw(seed) for seed in range(4)}) > 1
    assert draw(1, top_p=1e-6) == draw(0, temperature=0)  # one token alone is left


def test_interrupted(loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = loaded
    steps = 0

    def hook(*_: object) -> None:
        nonlocal steps
        steps += 1
        if steps == 5:
            raise KeyboardInterrupt

    handle = model.register_forward_pre_hook(hook)
    pieces: list[str] = []
    try:
        found = generate_text(model, tokenizer, PROMPTS[:1], max_new_tokens=20, on_text=pieces.append)
    finally:
        handle.remove()
    assert found.interrupted
    assert found.new_tokens == 4
    assert "".join(pieces) == found.texts[0]


def test_chat(tmp_path: Path, loaded: tuple[Any, Any]) -> None:
    _, plain = loaded
    with pytest.raises(InputError, match="no chat template"):
        chat_prompt(plain, "rain")
    write_tokenizer(tmp_path, template=TEMPLATE)
    tokenizer = load_tokenizer(write_config(tmp_path))
    assert chat_prompt(tokenizer, "rain") == "[user] rain\n[assistant] "
    assert chat_prompt(tokenizer, "rain", "be old") == "[system] be old\n[user] rain\n[assistant] "
    with pytest.raises(InputError, match="does not take these messages: no system"):
        chat_prompt(tokenizer, "rain", "no")


def write_config(directory: Path) -> Path:
    transformers.LlamaConfig().save_pretrained(directory)
    return directory


def test_a_chat_prompt_gets_no_second_first_token(tmp_path: Path, loaded: tuple[Any, Any]) -> None:
    model, _ = loaded
    write_tokenizer(tmp_path, begins=True)
    tokenizer = load_tokenizer(write_config(tmp_path))
    ordinary = generate_text(model, tokenizer, ["rain"], max_new_tokens=1)
    chat = generate_text(model, tokenizer, ["rain"], is_chat=True, max_new_tokens=1)
    assert ordinary.prompt_tokens == chat.prompt_tokens + 1


def test_what_is_refused(tmp_path: Path, loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    with pytest.raises(InputError, match=rf"more than the {POSITIONS} positions"):
        generate_text(model, tokenizer, ["rain"], max_new_tokens=POSITIONS)
    with pytest.raises(InputError, match="it is empty"):
        generate_text(model, tokenizer, ["rain", ""])
    with pytest.raises(InputError, match="temperature is -1"):
        generate_text(model, tokenizer, ["rain"], temperature=-1)
    with pytest.raises(InputError, match="is no directory; a model of the Hub becomes one with: hf download org/name"):
        load_causal_model(Path("org/name"))
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputError, match=r"kvpack compress .*model\.gguf -o DIRECTORY"):
        load_causal_model(tmp_path / "model.gguf")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="name the directory that holds it"):
        load_causal_model(tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"has no config\.json"):
        load_causal_model(tmp_path)
    write_config(tmp_path)
    with pytest.raises(InputError, match="cannot load its tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(InputError, match="device 'tpu' cannot be used"):
        load_causal_model(tmp_path, device="tpu")
    with pytest.raises(InputError, match="dtype 'int8' is not one of"):
        load_causal_model(tmp_path, dtype="int8")


def test_draws_are_from_all_tokens(loaded: tuple[Any, Any]) -> None:
    """Unless top_p says otherwise; transformers alone would take the 50 most probable ones."""
    model, tokenizer = loaded
    rows = len(tokenizer)
    result = generate_text(model, tokenizer, ["rain"] * rows, max_new_tokens=1, temperature=1e4)
    assert len(set(result.texts)) > rows / 2 > 60


@pytest.fixture
def short_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 64 tokens, so that the tiny model has positions for several."""
    from kvpack.integrations.transformers import cache, prefill, text_generation
    from kvpack.runtime.kv import cache as kv_cache

    for module in (cache, prefill, text_generation, kv_cache):
        monkeypatch.setattr(module, "CELL_TOKENS", 64)


@pytest.mark.usefixtures("short_cells")
@pytest.mark.parametrize("options", [CacheOptions(4), CacheOptions(budget=0.4)], ids=str)
def test_a_long_prompt_is_read_in_passes(directory: Path, options: CacheOptions) -> None:
    model, tokenizer = load_causal_model(directory, attention="kvpack"), load_tokenizer(directory)
    prompt = " ".join(PROMPTS * 11)
    tokens = len(tokenizer(prompt).input_ids)
    assert tokens > 130
    done: list[tuple[int, int]] = []
    given = {"max_new_tokens": 12, "cache": options.new(model), "progress": lambda *counts: done.append(counts)}
    found = generate_text(model, tokenizer, [prompt], **given)
    assert done == [(min(end, tokens - 1), tokens - 1) for end in range(64, tokens + 63, 64)]
    assert found.prompt_tokens == tokens
    if options.bits is not None:
        cache, ids = options.new(model), tokenizer(prompt, return_tensors="pt").input_ids
        expected = model.generate(ids, max_new_tokens=12, do_sample=False, **{cache_keyword(model): cache})[0, tokens:]
        assert found.texts == (tokenizer.decode(expected, skip_special_tokens=True),)

    def stop(*_: int) -> None:
        raise KeyboardInterrupt

    ended = generate_text(model, tokenizer, [prompt], max_new_tokens=12, cache=options.new(model), progress=stop)
    assert ended.interrupted
    assert ended.texts == ("",)
    assert (ended.new_tokens, ended.prefill_seconds) == (0, None)


def test_what_several_prompts_begin_with_is_read_once(directory: Path) -> None:
    model, tokenizer = load_causal_model(directory, attention="kvpack"), load_tokenizer(directory)
    prompts = [" ".join(PROMPTS * 5) + end for end in (" the old", "", " rain and light")]
    ids = [tokenizer(prompt).input_ids for prompt in prompts]
    passes: list[int] = []
    hook = model.model.embed_tokens.register_forward_pre_hook(lambda _, given: passes.append(given[0].numel()))
    cache = CacheOptions(4).new(model, len(prompts))
    found = generate_text(model, tokenizer, prompts, max_new_tokens=12, cache=cache)
    hook.remove()
    assert found.shared_tokens == min(map(len, ids)) - 1 >= 64
    assert passes[:2] == [found.shared_tokens, 3 * (max(map(len, ids)) - found.shared_tokens)]
    assert found.prompt_tokens == sum(map(len, ids))
    for prompt, text in zip(prompts, found.texts, strict=True):
        alone = generate_text(model, tokenizer, [prompt], max_new_tokens=12, cache=CacheOptions(4).new(model))
        assert alone.texts == (text,)
        assert alone.shared_tokens == 0
    # Without room, formats or anything in common each row has its own.
    for cache, some in (
        (CacheOptions(4).new(model), prompts),
        (CacheOptions(budget=0.4).new(model, 3), prompts),
        (CacheOptions(4).new(model, 3), [*prompts[:2], "rain"]),
    ):
        assert generate_text(model, tokenizer, some, max_new_tokens=2, cache=cache).shared_tokens == 0
