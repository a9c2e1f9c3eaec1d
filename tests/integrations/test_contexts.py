"""Contexts of transformers' models: saved, loaded, gone on from with the same tokens, and refused by other models."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from integrations.generation import greedy, logits  # noqa: E402
from integrations.models import ARCHITECTURES, VOCABULARY  # noqa: E402

import kvpack  # noqa: E402
from kvpack import KVCache, KVPackCache  # noqa: E402
from kvpack.errors import (  # noqa: E402
    CacheFullError,
    CacheInputError,
    DamagedRunError,
    FingerprintMismatchError,
    InputError,
    ModelMismatchError,
    NotSupportedError,
    SnapshotHeaderError,
)
from kvpack.integrations.transformers.causal_models import (  # noqa: E402
    expected_dtype,
    load_causal_model,
    load_config,
)
from kvpack.integrations.transformers.contexts import check_configuration, model_fingerprint  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:KVPackCache. the model is in torch.float32:UserWarning"),
    pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning"),  # of peft
]


def llama(**options: Any) -> Any:
    model = ARCHITECTURES["llama"].model(**options)
    model.set_attn_implementation("kvpack")
    return model


@pytest.fixture(scope="module")
def model() -> Any:
    return llama()


def prompt(tokens: int, seed: int = 1, rows: int = 1) -> Any:
    return torch.randint(3, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def pages(cache: Any, row: int = 0) -> list[bytes]:
    count = -(-cache.kv.length(0, row) // 64)
    return [page.numpy().tobytes() for page in cache.kv.read_pages(cache.kv.entries[:, :, row, :count])]


@pytest.mark.parametrize("options", [{}, {"formats": "INT4"}, {"formats": "INT2"}, {"budget": 0.4}])
def test_the_same_tokens_from_a_file(tmp_path: Path, model: Any, options: dict[str, Any]) -> None:
    ids = prompt(300)
    cache = KVPackCache(model.config, **options)
    logits(model, ids[:, :-1], cache)
    cache.save(tmp_path / "context", model, ids)
    loaded = KVPackCache.load(tmp_path / "context", model)
    assert pages(loaded) == pages(cache)
    assert loaded.ids.tolist() == ids[:, :-1].tolist()
    assert repr(loaded).startswith("KVPackCache(299 columns; KVCache(2 layers, 2 heads of 32")
    want = greedy(model, ids, cache, 64)
    assert greedy(model, ids, loaded, 64).tolist() == want.tolist()
    assert pages(loaded) == pages(cache)


def test_a_model_that_was_saved_and_loaded_is_the_same(tmp_path: Path, model: Any) -> None:
    model.save_pretrained(tmp_path / "model")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="sdpa")
    assert model_fingerprint(again) == model_fingerprint(model)


@pytest.mark.parametrize("name", ["llama tied", "mistral", "qwen3", "qwen3 moe", "gemma2", "gemma3", "phi3", "gpt oss"])
def test_a_configuration_tells_what_the_loaded_model_does(tmp_path: Path, name: str) -> None:
    """So no context is refused before a model is loaded that would be taken after it; coded models included."""
    folder = ARCHITECTURES[name].save(tmp_path / "model", torch.bfloat16)
    kvpack.compress(folder, tmp_path / "coded")
    for directory, dtype in ((folder, "auto"), (folder, "float16"), (tmp_path / "coded", "auto")):
        fingerprint = model_fingerprint(load_causal_model(directory, device="cpu", dtype=dtype))
        config = load_config(directory)
        found = expected_dtype(config, dtype)
        assert str(found) == f"torch.{fingerprint.dtype}"
        check_configuration(SimpleNamespace(fingerprint=fingerprint), config, found)
        with pytest.raises(FingerprintMismatchError, match="not known, its weights were not loaded"):
            check_configuration(SimpleNamespace(fingerprint=fingerprint), config, torch.float64)


def _with_adapter(rank: int, scale: float = 1.0) -> Any:
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(llama(), peft.LoraConfig(r=rank, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora" in name:
                parameter.fill_(0.01 * scale)
    return adapted


def test_each_other_model_is_refused_by_what_differs(tmp_path: Path, model: Any) -> None:
    ids = prompt(70)
    cache = KVPackCache(model.config)
    logits(model, ids, cache)
    cache.save(tmp_path / "context", model, ids)

    tuned = llama()
    with torch.no_grad():
        tuned.model.layers[1].self_attn.k_proj.weight.add_(1e-4)
    others = {
        "weights": tuned,
        "dtype weights": llama().half(),
        "config rope.rope_theta": llama(rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
        "config": llama(rms_norm_eps=1e-5),
        "adapter": _with_adapter(4),
    }
    ours = model_fingerprint(model)
    for expected, other in others.items():
        other.set_attn_implementation("kvpack")
        theirs = model_fingerprint(other)
        with pytest.raises(FingerprintMismatchError) as refused:
            KVPackCache.load(tmp_path / "context", other)
        found = {line.partition(":")[0] for line in refused.value.differences}
        assert found == {"model", *expected.split()}
        assert ours.model in str(refused.value)
        assert theirs.model in str(refused.value)


def test_adapters_are_told_apart() -> None:
    base = model_fingerprint(llama())
    one = _with_adapter(4)
    assert model_fingerprint(one).weights == base.weights
    found = {base.adapter, model_fingerprint(one).adapter, model_fingerprint(_with_adapter(4, scale=2)).adapter}
    found.add(model_fingerprint(_with_adapter(8)).adapter)
    assert len(found) == 4
    with one.disable_adapter():
        assert model_fingerprint(one) == base
    assert model_fingerprint(one) == model_fingerprint(_with_adapter(4))


def test_rows_of_a_batch(tmp_path: Path, model: Any) -> None:
    """Rows of a padded batch are saved without pads, and come back alone or together."""
    ids = prompt(200, rows=3)
    mask = torch.ones_like(ids)
    for row, pads in enumerate((0, 130, 20)):
        mask[row, :pads] = 0
    cache = KVPackCache(model.config, formats="INT4")
    want = greedy(model, ids, cache, 20, attention_mask=mask)
    files = [tmp_path / str(row) for row in range(3)]
    for row, file in enumerate(files):
        cache.save(file, model, want, row=row)
    single = KVPackCache.load(files[1], model)
    assert single.ids.tolist() == [want[1, 130:219].tolist()]
    assert pages(single) == pages(cache, 1)
    together = KVPackCache.load(files, model, max_sequences=4)
    assert [pages(together, row) for row in range(3)] == [pages(cache, row) for row in range(3)]
    whole = torch.cat([mask, torch.ones(3, 20, dtype=mask.dtype)], 1)
    got = greedy(model, want, together, 12, attention_mask=whole)
    assert got.tolist() == greedy(model, want, cache, 12, attention_mask=whole).tolist()


def test_one_file_for_several_rows_is_held_once(tmp_path: Path, model: Any) -> None:
    ids = prompt(256)
    cache = KVPackCache(model.config, formats="INT4")
    logits(model, ids, cache)
    cache.save(tmp_path / "context", model, ids)
    rows = KVPackCache.load([tmp_path / "context"] * 3, model)
    assert rows.kv.pools.bytes_in_use == cache.kv.pools.bytes_in_use
    turns = prompt(5, rows=3, seed=4)
    got = greedy(model, torch.cat([ids.expand(3, -1), turns], 1), rows, 16)
    for row in range(3):
        alone = KVPackCache.load(tmp_path / "context", model)
        assert greedy(model, torch.cat([ids, turns[row : row + 1]], 1), alone, 16).tolist() == [got[row].tolist()]


def test_a_prefix_of_a_file(tmp_path: Path, model: Any) -> None:
    ids = prompt(200)
    cache = KVPackCache(model.config)
    logits(model, ids, cache)
    cache.save(tmp_path / "context", model, ids)
    loaded = KVPackCache.load(tmp_path / "context", model, tokens=150)
    assert loaded.ids.tolist() == ids[:, :150].tolist()
    fresh = KVPackCache(model.config)
    assert greedy(model, ids[:, :170], loaded, 16).tolist() == greedy(model, ids[:, :170], fresh, 16).tolist()


def test_damage(tmp_path: Path, model: Any) -> None:
    ids = prompt(70)
    cache = KVPackCache(model.config)
    logits(model, ids, cache)
    cache.save(tmp_path / "context", model, ids)
    damaged = bytearray((tmp_path / "context").read_bytes())
    damaged[-200] ^= 1
    (tmp_path / "context").write_bytes(damaged)
    with pytest.raises(DamagedRunError, match=r"run 0 \(tokens 0–69\)"):
        KVPackCache.load(tmp_path / "context", model)
    with pytest.warns(UserWarning, match="0 of 70 tokens were loaded"):
        left = KVPackCache.load(tmp_path / "context", model, on_corrupt="drop_from_here")
    assert greedy(model, ids, left, 8).tolist() == greedy(model, ids, KVPackCache(model.config), 8).tolist()


def _fed(model: Any) -> list[int]:
    """How many columns each forward pass gets, as it comes."""
    found: list[int] = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: found.append((kwargs.get("input_ids") if not args else args[0]).shape[1]),
        with_kwargs=True,
    )
    return found


def test_turns_of_a_conversation_are_not_read_again(tmp_path: Path) -> None:
    model = llama()
    fed = _fed(model)
    cache = KVPackCache(model.config)
    turns = [prompt(100, seed=seed) for seed in range(3)]
    ids, held = turns[0], None
    for number, turn in enumerate(turns[1:]):
        kept = cache.reuse(ids, held)
        assert kept == (0 if number == 0 else ids.shape[1] - 100 - 1)
        fed.clear()
        held = greedy(model, ids, cache, 16)
        assert fed == [ids.shape[1] - kept] + [1] * 15
        assert held.tolist() == greedy(model, ids, KVPackCache(model.config), 16).tolist()
        ids = torch.cat([held, turn], 1)
    cache.save(tmp_path / "context", model, held)
    # Another branch: what is common is kept, down to the token; then nothing is.
    other = torch.cat([held[:, :150], prompt(20, seed=9)], 1)
    loaded = KVPackCache.load(tmp_path / "context", model)
    assert loaded.reuse(other) in (150, 151)  # by chance the next token is the same
    assert greedy(model, other, loaded, 16).tolist() == greedy(model, other, KVPackCache(model.config), 16).tolist()
    assert loaded.reuse(other) == 169
    assert loaded.reuse(prompt(40, seed=10)) == 0
    assert loaded.get_seq_length() == 0


def test_reuse_keeps_nothing_that_it_was_not_told(model: Any) -> None:
    ids = prompt(50)
    cache = KVPackCache(model.config)
    greedy(model, ids, cache, 10)
    longer = torch.cat([ids, prompt(5, seed=2)], 1)
    assert cache.ids.tolist() == [[-1] * 59]
    assert cache.reuse(longer) == 0  # nobody said what the cache holds
    cache.reset()
    assert cache.reuse(ids) == 0
    got = greedy(model, ids, cache, 10)
    assert cache.ids.tolist() == [ids[0].tolist() + [-1] * 9]
    assert cache.reuse(got) == 50  # what was generated was not told either
    cache.crop(-10)
    assert cache.reuse(ids) == 40
    with pytest.raises(CacheInputError, match="ids have 2 rows, and the cache holds 1"):
        cache.reuse(ids.expand(2, -1))
    # What is not known is not the same as what is not known.
    greedy(model, ids, cache, 10)
    assert cache.ids[0, -9:].tolist() == [-1] * 9
    assert cache.reuse(torch.cat([ids, torch.full((1, 12), -1)], 1)) == 50


def test_a_cut_that_finds_no_memory_forgets_all_rows(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not some of them: the others would go on behind tokens that are cut."""
    ids = prompt(300, rows=3)
    cache = KVPackCache(model.config, formats="INT4")
    logits(model, ids, cache)
    other = torch.cat([ids[:, :100], prompt(40, seed=7, rows=3)], 1)
    truncate = KVCache.truncate

    def fails_at_row_1(kv: KVCache, sequence: int, tokens: int) -> None:
        if sequence == 1:
            raise CacheFullError("no memory")
        truncate(kv, sequence, tokens)

    with monkeypatch.context() as patched:
        patched.setattr(KVCache, "truncate", fails_at_row_1)
        assert cache.reuse(other, held=ids) == 0
    assert cache.get_seq_length() == 0
    fresh = KVPackCache(model.config, formats="INT4")
    assert torch.equal(logits(model, other, cache), logits(model, other, fresh))
    with monkeypatch.context() as patched:
        patched.setattr(KVCache, "truncate", fails_at_row_1)
        with pytest.raises(CacheFullError):
            cache.crop(-50)
    assert not cache.kv.table.lengths.any()
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize("token", [1 << 31, -(1 << 31) - 1, (1 << 32) + 5])
def test_ids_beyond_32_bits_are_no_ids(model: Any, token: int) -> None:
    cache = KVPackCache(model.config)
    with pytest.raises(CacheInputError, match="must be integers of 32 bits"):
        cache.reuse(torch.tensor([[5, token]]))
    assert cache.reuse([[5, 6], [7, 8]]) == 0


def test_what_cannot_be_saved(tmp_path: Path, model: Any) -> None:
    cache = KVPackCache(model.config)
    ids = prompt(50)
    with pytest.raises(CacheInputError, match="the cache is empty"):
        cache.save(tmp_path / "context", model, ids)
    logits(model, ids, cache)
    with pytest.raises(CacheInputError, match="ids have 49 columns, and the cache holds 50"):
        cache.save(tmp_path / "context", model, ids[:, :49])
    with pytest.raises(CacheInputError, match="row 1 is to be saved; the cache holds 1"):
        cache.save(tmp_path / "context", model, ids, row=1)
    assert not list(tmp_path.iterdir())
    assert cache.kv is not None
    cache.kv.save(tmp_path / "of no model")
    with pytest.raises(ModelMismatchError, match="does not say what model"):
        KVPackCache.load(tmp_path / "of no model", model)


def test_ids_that_are_not_the_caches_are_refused(tmp_path: Path, model: Any) -> None:
    ids = prompt(50)
    cache = KVPackCache(model.config)
    cache.reuse(ids)
    logits(model, ids, cache)
    others = ids.clone()
    others[0, 17] = (ids[0, 17] + 1) % VOCABULARY
    with pytest.raises(CacheInputError, match=f"token {int(others[0, 17])} in row 0, column 17, where the cache holds"):
        cache.save(tmp_path / "context", model, others)
    assert not list(tmp_path.iterdir())
    assert cache.ids.tolist() == ids.tolist()
    # A token that was told and not fed may be another one later.
    cache.save(tmp_path / "context", model, torch.cat([ids, ids[:, :1]], 1))
    logits(model, ids[:, 1:2], cache)
    cache.save(tmp_path / "context", model, torch.cat([ids, ids[:, 1:2]], 1))
    assert cache.ids[0, 50] == ids[0, 1]


def test_a_file_that_is_no_context_is_not_replaced(tmp_path: Path, model: Any) -> None:
    cache, ids, notes = KVPackCache(model.config), prompt(50), tmp_path / "notes.txt"
    logits(model, ids, cache)
    notes.write_text("mine")
    with pytest.raises(InputError, match="is there, and no context: it is not replaced"):
        cache.save(notes, model, ids)
    with pytest.raises(InputError, match="is a directory: name a file in it"):
        cache.save(tmp_path, model, ids)
    assert notes.read_text() == "mine"


def test_ids_that_the_model_does_not_have(tmp_path: Path, model: Any) -> None:
    cache = KVPackCache(model.config)
    logits(model, prompt(10), cache)
    cache.save(tmp_path / "context", model, [VOCABULARY] * 10)
    with pytest.raises(SnapshotHeaderError, match="token id 160 is none of the model's 160"):
        KVPackCache.load(tmp_path / "context", model)


def test_models_on_several_devices_are_refused(tmp_path: Path, model: Any) -> None:
    cache = KVPackCache(model.config)
    logits(model, prompt(10), cache)
    split = llama()
    split.model.layers[1].to("meta")
    with pytest.raises(NotSupportedError, match=r"several devices \(cpu, meta\)"):
        cache.save(tmp_path / "context", split, prompt(10))
    with pytest.raises(CacheInputError, match=r"weights of .*layers\.1.* are not in memory"):
        model_fingerprint(split)
    cache.save(tmp_path / "context", model, prompt(10))
    with pytest.raises(NotSupportedError, match="several devices"):
        KVPackCache.load(tmp_path / "context", split)


REAL = {"KVPACK_BOOKS_MODEL": 700, "KVPACK_SMOLLM2_MODEL": 500}


@pytest.mark.model
@pytest.mark.parametrize("variable", REAL)
def test_real_models_go_on_with_the_same_tokens(tmp_path: Path, variable: str) -> None:
    path, text = os.environ.get(variable), os.environ.get("KVPACK_BOOKS_TEXT")
    if not path or not text:
        pytest.skip(f"{variable} and KVPACK_BOOKS_TEXT are not set")
    real = transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="kvpack").eval()
    novel = Path(text).read_text(encoding="utf-8")[20_000:]
    ids = transformers.AutoTokenizer.from_pretrained(path)(novel[:8000], return_tensors="pt").input_ids
    ids = ids[:, : REAL[variable]]
    cache = KVPackCache(real.config, formats="INT4")
    logits(real, ids[:, :-1], cache)
    cache.save(tmp_path / "context", real, ids)
    loaded = KVPackCache.load(tmp_path / "context", real)
    assert pages(loaded) == pages(cache)
    assert greedy(real, ids, loaded, 64).tolist() == greedy(real, ids, cache, 64).tolist()
