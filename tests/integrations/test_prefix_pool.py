"""Prompts that share what they begin with: the tokens of each alone, and nothing that is there is read again."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from integrations.generation import greedy  # noqa: E402
from integrations.models import ARCHITECTURES, VOCABULARY  # noqa: E402

from kvpack import KVPackCache  # noqa: E402
from kvpack.errors import CacheFullError, CacheInputError  # noqa: E402
from kvpack.integrations.transformers.prefill import prefill  # noqa: E402
from kvpack.integrations.transformers.prefix_pool import PrefixPool  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:KVPackCache. the model is in torch.float32:UserWarning"),
    pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning"),  # of peft
]

OPTIONS = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def llama() -> Any:
    made = ARCHITECTURES["llama"].model(max_position_embeddings=4096)
    made.set_attn_implementation("kvpack")
    return made


@pytest.fixture(scope="module")
def model() -> Any:
    return llama()


def prompt(tokens: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(seed))


@contextmanager
def read_tokens(model: Any) -> Iterator[list[int]]:
    """How many tokens each forward pass reads."""
    found: list[int] = []
    hook = model.get_input_embeddings().register_forward_pre_hook(lambda _, given: found.append(given[0].numel()))
    try:
        yield found
    finally:
        hook.remove()


def alone(model: Any, ids: torch.Tensor, new_tokens: int, **options: Any) -> list[list[int]]:
    cache = KVPackCache(model.config, **options)
    prefill(model, ids, cache)
    return greedy(model, ids, cache, new_tokens).tolist()


def test_prompts_branches_and_turns(model: Any) -> None:
    """Pages of 16 bits are always those of a fresh prefill."""
    pool, document = PrefixPool(model), prompt(300)
    first, second, third = (torch.cat([document, prompt(20 + 7 * n, seed=n + 2)], 1) for n in range(3))
    # What is there: nothing; the document's full pages; those of the second prompt.
    for ids, reused in ((first, 0), (second, 256), (second, 320), (third, 256)):
        assert pool.match(ids[:, :-1]) == reused
        with read_tokens(model) as read:
            found = pool.generate(ids, max_new_tokens=30, **OPTIONS)
        assert sum(read) == ids.shape[1] - reused + 29
        assert found.tolist() == alone(model, ids, 30)
    # The next turn of a conversation has the answer, too.
    turn = torch.cat([found, prompt(40, seed=9)], 1)
    with read_tokens(model) as read:
        found = pool.generate(turn, max_new_tokens=10, **OPTIONS)
    assert sum(read) == turn.shape[1] - 320 + 9
    assert found.tolist() == alone(model, turn, 10)
    metrics = pool.manager.metrics()
    assert (metrics.queries, metrics.hit_queries, metrics.running_sequences) == (9, 7, 0)
    assert pool.manager.cache.lengths.sum() == 0


@pytest.mark.parametrize("options", [{"formats": "INT8"}, {"formats": "INT4"}, {"budget": 0.5}], ids=str)
def test_quantized_pages(model: Any, options: dict[str, Any]) -> None:
    pool, document, kept = PrefixPool(model, **options), prompt(300), None
    for seed, reused in ((2, 0), (3, 256)):
        ids = torch.cat([document, prompt(30, seed=seed)], 1)
        cache = pool.start(ids)
        assert (cache.started.tokens, cache.started.is_exact) == (reused, not reused)
        prefill(model, ids, cache)
        found = greedy(model, ids, cache, 30)
        if not reused:
            assert found.tolist() == alone(model, ids, 30, **options)
        pages = pool.manager.cache.entries[:, :, cache.started.sequence, :4].copy()
        assert pool.finish(cache, found) == 320
        # Pages that were found are those that the first prompt left.
        if reused:
            assert (pages == kept).all()
        kept = pages


def test_an_exact_match_has_the_tokens_of_a_fresh_prefill(model: Any) -> None:
    """While somebody holds a prefix of whole cells, its newest page is there in 16 bits."""
    pool, document = PrefixPool(model, formats="INT4"), prompt(2048)
    more = torch.cat([document, prompt(1)], 1)
    holder = pool.start(more)
    prefill(model, more, holder)
    held = pool.manager.cache_prefix(holder.started.sequence)
    for seed in (2, 3):
        ids = torch.cat([document, prompt(30, seed=seed)], 1)
        cache = pool.start(ids)
        assert (cache.started.tokens, cache.started.is_exact) == (2048, True)
        with read_tokens(model) as read:
            prefill(model, ids, cache)
            found = greedy(model, ids, cache, 20)
        assert sum(read) == 30 + 19
        assert found.tolist() == alone(model, ids, 20, formats="INT4")
        pool.finish(cache, found)
    pool.manager.release_prefix(held)
    pool.finish(holder, more)


def test_host_memory_files_and_another_pool(model: Any, tmp_path: Path) -> None:
    tiers = {"host_bytes": 1 << 22, "disk": tmp_path, "formats": "INT4"}
    pool, ids = PrefixPool(model, **tiers), prompt(400)
    expected = pool.generate(ids, max_new_tokens=20, **OPTIONS).tolist()
    pool.manager.store.evict()
    assert pool.match(ids) == 0  # the cache itself has nothing
    with read_tokens(model) as read:
        assert pool.generate(ids, max_new_tokens=20, **OPTIONS).tolist() == expected
    assert sum(read) == 400 - 384 + 19
    pool.manager.store.evict()
    pool.manager.tiers.flush()
    # Of the same model; another finds nothing.
    other = llama()
    with torch.no_grad():
        other.model.layers[1].self_attn.k_proj.weight.add_(1e-4)
    for of_pool, tokens in ((llama(), 16), (other, 400)):
        with read_tokens(of_pool) as read:
            PrefixPool(of_pool, **tiers).generate(ids, max_new_tokens=20, **OPTIONS)
        assert sum(read) == tokens + 19


def test_salts_and_adapters(model: Any) -> None:
    peft = pytest.importorskip("peft")
    pool, ids = PrefixPool(model), prompt(200)
    pool.generate(ids, max_new_tokens=2, salt="of one tenant", **OPTIONS)
    assert (pool.match(ids), pool.match(ids, salt="of one tenant")) == (0, 192)
    adapted = peft.get_peft_model(llama(), peft.LoraConfig(r=4, target_modules=["k_proj"]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora" in name:
                parameter.fill_(0.01)
    pool = PrefixPool(adapted)
    pool.generate(ids, max_new_tokens=2, **OPTIONS)
    assert pool.match(ids) == 192
    with adapted.disable_adapter():
        assert pool.match(ids) == 0


def test_what_fails_leaves_the_pool_as_it_was(model: Any) -> None:
    pool, ids = PrefixPool(model, max_sequences=1), prompt(200)

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pool.generate(ids, chunk_tokens=100, progress=stop, max_new_tokens=2)
    assert pool.match(ids) == 64  # 99 tokens were read
    hook = model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    try:
        with pytest.raises(ZeroDivisionError):
            pool.generate(prompt(150, seed=2), max_new_tokens=2, **OPTIONS)
    finally:
        hook.remove()
    assert pool.manager.metrics().running_sequences == 0
    assert pool.generate(ids, max_new_tokens=10, **OPTIONS).tolist() == alone(model, ids, 10)


def test_an_answer_that_cannot_be_kept_gives_its_sequence_back(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The manager knows the answer's tokens then, and the prompt's are not all."""
    pool, ids = PrefixPool(model, max_sequences=1), prompt(200)
    finish = pool.manager.finish

    def without_memory(sequence: int, *, keep: bool = True, **options: Any) -> int:
        if keep:
            raise CacheFullError("no memory to quantize what waits")
        return finish(sequence, keep=keep, **options)

    with monkeypatch.context() as patch:
        patch.setattr(pool.manager, "finish", without_memory)
        with pytest.raises(CacheFullError, match="no memory to quantize what waits"):
            pool.generate(ids, max_new_tokens=5, **OPTIONS)
    assert pool.manager.metrics().running_sequences == 0
    assert pool.generate(ids, max_new_tokens=5, **OPTIONS).tolist() == alone(model, ids, 5)


def test_what_is_refused(model: Any) -> None:
    pool, ids = PrefixPool(model, max_sequences=1), prompt(100)
    cache = pool.start(ids)
    with pytest.raises(CacheFullError, match="all 1 sequences are in use"):
        pool.start(ids)
    prefill(model, ids, cache)
    for call in (cache.reset, lambda: cache.crop(-3), lambda: cache.reorder_cache(torch.tensor([0, 0]))):
        with pytest.raises(CacheInputError, match="a cache of a PrefixPool is one prompt"):
            call()
    with pytest.raises(CacheInputError, match="ids do not begin with the 100 tokens"):
        pool.finish(cache, prompt(100, seed=2))
    pool.finish(cache, ids)
    with pytest.raises(CacheInputError, match="none that this pool has started"):
        pool.finish(cache, ids)
    for wrong, message in ((ids.repeat(2, 1), "one prompt at a time"), (ids[:, :0], "one prompt at a time")):
        with pytest.raises(CacheInputError, match=message):
            pool.generate(wrong, max_new_tokens=2)
    mask = torch.ones_like(ids)
    mask[0, 0] = 0
    with pytest.raises(CacheInputError, match="attention_mask has pads"):
        pool.generate(ids, attention_mask=mask)
    for options in ({"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}):
        with pytest.raises(CacheInputError, match="a batch of 2 rows has come"):
            pool.generate(ids, max_new_tokens=2, **(OPTIONS | options))
    assert pool.manager.metrics().running_sequences == 0
    other = ARCHITECTURES["llama"].model()
    with pytest.raises(CacheInputError, match="needs attn_implementation='kvpack'"):
        PrefixPool(other)


def test_books() -> None:
    path = os.environ.get("KVPACK_BOOKS_MODEL")
    if path is None:
        pytest.skip("KVPACK_BOOKS_MODEL is not set")
    made = transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="kvpack").eval()
    pool, document, reused = PrefixPool(made), prompt(700), 0
    for number in range(3):
        ids = torch.cat([document, prompt(30, seed=number + 2)], 1)
        reused += pool.match(ids[:, :-1])
        assert pool.generate(ids, max_new_tokens=16, **OPTIONS).tolist() == alone(made, ids, 16)
    assert reused == 2 * 640
