"""Decoding from one CUDA graph a token gives the tokens that ``generate`` gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from generation import CACHE_ARGUMENT

from kvpack import KVPackCache
from kvpack.errors import CacheFullError, CacheInputError, DeviceError
from kvpack.integrations.transformers.decode_graph import DecodeGraph
from kvpack.runtime.kv.cache import KVCache

NEW, COLUMNS = 90, 70  # pages fill, and leave the window, in prompt and steps
CACHES: dict[str, dict[str, Any]] = {"16 bits": {}, "INT4": {"formats": "INT4"}, "a budget": {"budget": 0.4}}


def make_model(device: str = "cpu", **options: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **{
            "vocab_size": 99,
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "attn_implementation": "kvpack",
            "pad_token_id": 0,
            "eos_token_id": None,
            "initializer_range": 0.4,  # so that tokens differ
            **options,
        }
    )
    model = transformers.LlamaForCausalLM(config).to(device, torch.float16).eval()
    model.set_attn_implementation(config._attn_implementation)
    return model


def make_batch(device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Three rows of different lengths, padded on the left."""
    generator = torch.Generator().manual_seed(1)
    ids, mask = torch.randint(1, 99, (3, COLUMNS), generator=generator), torch.ones(3, COLUMNS, dtype=torch.int64)
    mask[0, :20] = mask[2, :60] = 0
    return (ids * mask).to(device), mask.to(device)


def generated(model: Any, cache: Any, ids: torch.Tensor, mask: torch.Tensor, **options: Any) -> torch.Tensor:
    options = {"max_new_tokens": NEW, "do_sample": False, CACHE_ARGUMENT: cache, **options}
    found: torch.Tensor = model.generate(ids, attention_mask=mask, **options)
    return found


class Replayed:
    """Stands in for a CUDA graph: repeats what a captured step does on the device, and nothing of the host."""

    def __init__(self, decoder: DecodeGraph, monkeypatch: pytest.MonkeyPatch) -> None:
        self.decoder, self.monkeypatch = decoder, monkeypatch

    def replay(self) -> None:
        with self.decoder.cache.captured_step(), self.monkeypatch.context() as patched:
            patched.setattr(KVCache, "_is_captured", lambda cache: True)
            self.decoder._forward()


@pytest.mark.parametrize("options", CACHES.values(), ids=CACHES)
def test_tokens_are_those_of_generate(options: dict[str, Any]) -> None:
    model, (ids, mask) = make_model(), make_batch()
    expected = generated(model, KVPackCache(model.config, **options), ids, mask)
    decoder = DecodeGraph(model, KVPackCache(model.config, **options), max_tokens=COLUMNS + NEW)
    assert len(expected[:, COLUMNS:].unique()) > 10
    assert torch.equal(decoder.generate(ids, mask, max_new_tokens=NEW), expected)
    decoder.cache.reset()
    row = slice(1, 2)
    with pytest.raises(CacheInputError, match="1 rows, where the graph has 3"):
        decoder.generate(ids[row], max_new_tokens=3)


@pytest.mark.parametrize("options", CACHES.values(), ids=CACHES)
def test_what_a_graph_repeats_and_what_is_planned_make_a_step(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, (ids, mask) = make_model(), make_batch()
    caches = [KVPackCache(model.config, **options) for _ in range(2)]
    decoder = DecodeGraph(model, caches[0], max_tokens=COLUMNS + NEW)
    expected = decoder.generate(ids, mask, max_new_tokens=NEW)
    decoder = DecodeGraph(model, caches[1], max_tokens=COLUMNS + NEW)
    found = [decoder.prompt(ids, mask).clone(), decoder.step().clone()]
    decoder._graph = Replayed(decoder, monkeypatch)  # type: ignore[assignment]
    found += [decoder.step().clone() for _ in range(NEW - 2)]
    assert torch.equal(torch.stack(found, 1), expected[:, COLUMNS:])
    assert caches[0].get_seq_length() == caches[1].get_seq_length() == COLUMNS + NEW - 1
    maps = [[cache.kv.precision_map(layer).tolist() for layer in range(2)] for cache in caches]
    assert maps[0] == maps[1]
    caches[1].kv.check()  # the device holds what the host counts
    # And the cache knows which columns are tokens, for who goes on without a graph.
    columns = torch.cat([mask, torch.ones(3, NEW - 1)], dim=1).bool().numpy()
    caches[1].check_columns(columns, COLUMNS + NEW - 1)


@pytest.mark.parametrize("padded", [False, True])
def test_static_caches_are_decoded_too(padded: bool) -> None:
    model, (ids, mask) = make_model(attn_implementation="sdpa"), make_batch()
    mask = mask if padded else torch.ones_like(mask)

    def cache() -> transformers.StaticCache:
        return transformers.StaticCache(model.config, max_cache_len=COLUMNS + NEW)

    expected = generated(model, cache(), ids, mask)
    assert torch.equal(DecodeGraph(model, cache()).generate(ids, mask, max_new_tokens=NEW), expected)


def test_rows_end_as_those_of_generate_do() -> None:
    model, (ids, mask) = make_model(), make_batch()
    new = generated(model, KVPackCache(model.config), ids, mask)[:, COLUMNS:]
    end = int(new[1, 9])
    expected = generated(model, KVPackCache(model.config), ids, mask, eos_token_id=end, pad_token_id=0)
    decoder = DecodeGraph(model, KVPackCache(model.config), max_tokens=COLUMNS + NEW)
    found = decoder.generate(ids, mask, max_new_tokens=NEW, eos_token_id=end, pad_token_id=0)
    assert torch.equal(found, expected)
    assert (found[1, COLUMNS + 10 :] == 0).all()
    ends = [end, int(new[0, 5])]  # chat models have several
    expected = generated(model, KVPackCache(model.config), ids, mask, eos_token_id=ends, pad_token_id=0)
    decoder.cache.reset()
    found = decoder.generate(ids, mask, max_new_tokens=NEW, eos_token_id=ends, pad_token_id=0)
    assert torch.equal(found, expected)
    assert (found[0, COLUMNS + 6 :] == 0).all()


def test_who_samples_puts_tokens_in() -> None:
    model, (ids, mask) = make_model(), make_batch()
    decoders = [DecodeGraph(model, KVPackCache(model.config), max_tokens=COLUMNS + 9) for _ in range(2)]
    for decoder, token in zip(decoders, (3, 7), strict=True):
        decoder.prompt(ids, mask)
        decoder.tokens.fill_(token)
        decoder.step()
    first, second = (decoder.logits for decoder in decoders)
    assert first is not None
    assert second is not None
    assert first.shape == (3, 99)
    assert not torch.allclose(first, second)
    assert decoders[0].positions.tolist() == [51, 71, 11]


def test_a_cache_that_holds_tokens_is_gone_on_with() -> None:
    model, (ids, mask) = make_model(), make_batch()
    expected = DecodeGraph(model, KVPackCache(model.config), max_tokens=COLUMNS + NEW).generate(
        ids, mask, max_new_tokens=20
    )
    cache = KVPackCache(model.config)
    generated(model, cache, ids, mask, max_new_tokens=10)
    decoder = DecodeGraph(model, cache, max_tokens=COLUMNS + NEW)
    decoder.start(expected[:, COLUMNS + 9], mask.sum(1) + 9)
    found = torch.stack([decoder.step().clone() for _ in range(10)], 1)
    assert torch.equal(found, expected[:, COLUMNS + 10 :])
    with pytest.raises(CacheInputError, match="holds tokens already"):
        decoder.prompt(ids, mask)


def test_a_capture_that_fails_leaves_the_cache_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (ids, mask) = make_model(), make_batch()
    cache = KVPackCache(model.config)
    decoder = DecodeGraph(model, cache, max_tokens=COLUMNS + NEW)
    decoder.prompt(ids, mask)

    def fail(*args: Any) -> None:
        raise RuntimeError

    with monkeypatch.context() as patched:  # between the cache and attention
        patched.setattr("kvpack.integrations.transformers.cache.KVPackLayer.take_pending", fail)
        with pytest.raises(RuntimeError), cache.captured_step():
            decoder._forward()
    assert cache.get_seq_length() == COLUMNS
    decoder.step()
    assert [cache.kv.length(1, row) for row in range(3)] == [51, 71, 11]


def test_what_does_not_fit_is_refused() -> None:
    model, (ids, mask) = make_model(), make_batch()
    cache = KVPackCache(model.config)
    with pytest.raises(CacheInputError, match="the cache has pages=8"):
        DecodeGraph(model, KVPackCache(model.config, pages=8), max_tokens=71)
    with pytest.raises(CacheInputError, match="max_tokens is missing"):
        DecodeGraph(model, cache)
    with pytest.raises(CacheInputError, match="DynamicCache grows at each step"):
        DecodeGraph(model, transformers.DynamicCache(config=model.config), max_tokens=9)
    decoder = DecodeGraph(model, cache, max_tokens=COLUMNS + 1)
    with pytest.raises(CacheInputError, match="prompt\\(\\) or start\\(\\) first"):
        decoder.step()
    with pytest.raises(CacheInputError, match="padded on the left"):
        decoder.prompt(ids, mask.flip(1))
    with pytest.raises(CacheFullError, match="72 tokens behind 0 are more than max_tokens, 71"):
        decoder.generate(ids, mask, max_new_tokens=3)
    decoder.generate(ids, mask, max_new_tokens=2)
    with pytest.raises(CacheFullError, match="1 tokens behind 71"):
        decoder.step()
    decoder.cache.reset()
    with pytest.raises(CacheInputError, match="the cache holds 0 columns, and 71 behind the last step"):
        decoder.step()
    with pytest.raises(CacheInputError, match="max_new_tokens is 0"):
        decoder.generate(ids, mask, max_new_tokens=0)
    model.set_attn_implementation("sdpa")
    with pytest.raises(CacheInputError, match="attn_implementation='kvpack' alone"):
        DecodeGraph(model, cache, max_tokens=99)
    windowed = transformers.MistralConfig(num_hidden_layers=2, sliding_window=16)
    with pytest.raises(CacheInputError, match="sliding windows on the host"):
        DecodeGraph(model, transformers.StaticCache(windowed, max_cache_len=64))


# On a GPU -------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("options", CACHES.values(), ids=CACHES)
def test_a_graph_gives_the_tokens_of_steps_without_one(options: dict[str, Any]) -> None:
    model, (ids, mask) = make_model("cuda"), make_batch("cuda")
    eager = DecodeGraph(model, KVPackCache(model.config, **options), max_tokens=COLUMNS + NEW)
    expected = [eager.prompt(ids, mask).clone()]
    while len(expected) < NEW:
        eager._has_run = False  # no capture
        expected.append(eager.step().clone())
    decoder = DecodeGraph(model, KVPackCache(model.config, **options), max_tokens=COLUMNS + NEW)
    for _ in range(2):  # the second prompt replays the graph of the first
        found = decoder.generate(ids, mask, max_new_tokens=NEW)
        assert decoder.is_captured
        assert not eager.is_captured
        assert torch.equal(found[:, COLUMNS:], torch.stack(expected, 1))
        decoder.cache.kv.check()
        decoder.cache.reset()


@pytest.mark.gpu
def test_a_graph_of_a_static_cache() -> None:
    model, (ids, mask) = make_model("cuda", attn_implementation="sdpa"), make_batch("cuda")

    def cache() -> transformers.StaticCache:
        return transformers.StaticCache(model.config, max_cache_len=COLUMNS + NEW)

    eager = DecodeGraph(model, cache())
    expected = [eager.prompt(ids, mask).clone()]
    while len(expected) < NEW:
        eager._has_run = False
        expected.append(eager.step().clone())
    decoder = DecodeGraph(model, cache())
    found = decoder.generate(ids, mask, max_new_tokens=NEW)
    assert decoder.is_captured
    assert torch.equal(found[:, COLUMNS:], torch.stack(expected, 1))


@pytest.mark.gpu
def test_a_budget_is_divided_anew_between_steps() -> None:
    model, (ids, mask) = make_model("cuda"), make_batch("cuda")
    decoder = DecodeGraph(model, KVPackCache(model.config, budget=0.4), max_tokens=1024)
    decoder.prompt(ids, mask)
    for step in range(500):
        decoder.step()
        if step % 50 == 49:
            decoder.reallocate()
    cache = decoder.cache.kv
    cache.check()
    assert decoder.positions.tolist() == [550, 570, 510]
    assert cache.length(1, 1) == 570
    full = (cache.entries[0] != -1).sum() * 2 * 64 * 16 * 2  # pages · KV heads · tokens · head_dim · bytes
    assert cache.pools.bytes_in_use < 0.7 * 2 * full


@pytest.mark.gpu
def test_a_model_that_waits_for_the_device_is_refused() -> None:
    model, (ids, mask) = make_model("cuda"), make_batch("cuda")
    decoder = DecodeGraph(model, KVPackCache(model.config), max_tokens=COLUMNS + 9)
    decoder.prompt(ids, mask)
    decoder.step()
    torch.cuda.manual_seed(5)
    expected = torch.rand(7, device="cuda")
    torch.cuda.manual_seed(5)
    handle = model.lm_head.register_forward_hook(lambda module, inputs, out: out * out.max().item())
    with pytest.raises(DeviceError, match="LlamaForCausalLM cannot be captured"):
        decoder.step()
    handle.remove()
    assert decoder.cache.get_seq_length() == COLUMNS + 1
    assert torch.equal(torch.rand(7, device="cuda"), expected)  # random numbers still come, and the same ones
