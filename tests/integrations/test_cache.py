"""KVPackCache and the attention "kvpack" in transformers' models, against the default cache with ``sdpa``."""

from __future__ import annotations

import gc
import sys
import warnings
import weakref
from typing import Any

import pytest
import torch
import transformers
from integrations.generation import CACHE_ARGUMENT, greedy, logits
from integrations.models import ARCHITECTURES, VOCABULARY, WITH_KV_CACHE, Architecture
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from kvpack import KVPackCache, PageFormat
from kvpack.errors import CacheFullError, CacheInputError, PageError
from kvpack.integrations.transformers.cache import take_announced_mask

pytestmark = pytest.mark.filterwarnings("ignore:KVPackCache. the model is in torch.float32:UserWarning")

SUPPORTED = [name for name in WITH_KV_CACHE if name != "deepseek v3"]


def model_of(name: str, attention: str = "kvpack", dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    model = ARCHITECTURES[name].model(dtype, **options)
    model.set_attn_implementation(attention)
    return model


def prompts(rows: int = 3, tokens: int = 40, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and a mask, padded on the left by 0, 13, 26, … tokens."""
    ids = torch.randint(3, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, : 13 * row] = 0
    return ids * mask, mask


def _through_fp16(module: Any, q: Any, k: Any, v: Any, mask: Any, **options: Any) -> Any:
    """Rounded where kvpack rounds, so that near ties between tokens, or experts, decide as there."""
    rounded = [states.half().float() for states in (q, k, v)]
    if options.get("softcap") is not None or options.get("s_aux") is not None:
        attend = sys.modules[type(module).__module__].eager_attention_forward
        least = torch.finfo(torch.float32).min
        mask = torch.zeros(mask.shape).masked_fill(~mask, least)
    else:
        attend = sdpa_attention_forward
    return attend(module, *rounded, mask, **options)[0].half().float(), None


def _never_left_out(*sizes: Any, **options: Any) -> Any:
    return sdpa_mask(*sizes, **(options | {"allow_is_causal_skip": False}))


transformers.AttentionInterface.register("through fp16", _through_fp16)
transformers.AttentionMaskInterface.register("through fp16", _never_left_out)


def reference(name: str) -> Any:
    """Soft caps and sinks are no part of ``sdpa``."""
    return model_of(name, "eager" if name in ("gemma2", "gpt oss") else "sdpa")


@pytest.mark.parametrize("name", SUPPORTED)
def test_logits_of_sixteen_bit_pages_are_those_of_sdpa(name: str) -> None:
    ids, mask = prompts()
    want = logits(reference(name), ids, attention_mask=mask)[mask.bool()]
    model = model_of(name)
    cache = KVPackCache(model.config)
    parts = [logits(model, ids[:, :25], cache, attention_mask=mask[:, :25])]
    for i in range(25, 40):
        options = {"attention_mask": mask[:, : i + 1], "position_ids": torch.tensor([[i]])}
        parts.append(logits(model, ids[:, i : i + 1], cache, **options))
    got = torch.cat(parts, 1)[mask.bool()]
    assert (got - want).abs().max() < 1e-3 * want.abs().max()


@pytest.mark.parametrize("name", SUPPORTED)
def test_greedy_tokens_are_those_of_the_default_cache(name: str) -> None:
    ids, mask = prompts()
    base, model = model_of(name, "through fp16"), model_of(name)
    single = ids[:1]
    cache = KVPackCache(model.config)
    assert greedy(model, single, cache, 64).tolist() == greedy(base, single, new_tokens=64).tolist()
    assert cache.get_seq_length() == 40 + 63
    padded = KVPackCache(model.config)
    got = greedy(model, ids, padded, attention_mask=mask, new_tokens=64)
    assert got.tolist() == greedy(base, ids, attention_mask=mask, new_tokens=64).tolist()
    assert [padded.kv.length(1, row) for row in range(3)] == [103, 90, 77]  # pads are not stored


@pytest.mark.parametrize("name", ["llama", "gpt oss", "gemma2"])
@pytest.mark.parametrize("cache", ["none", "dynamic", "static"])
def test_with_another_cache_it_is_sdpa_or_eager(name: str, cache: str) -> None:
    ids, mask = prompts()
    base, model = reference(name), model_of(name)

    def made(config: Any) -> Any:
        if cache == "static":
            return transformers.StaticCache(config=config, max_cache_len=64)
        return transformers.DynamicCache(config=config) if cache == "dynamic" else None

    want = logits(base, ids, made(base.config), attention_mask=mask)[mask.bool()]
    got = logits(model, ids, made(model.config), attention_mask=mask)[mask.bool()]
    assert (got - want).abs().max() < 1e-5 * want.abs().max()


def test_soft_caps_of_an_encoder_see_what_comes_behind() -> None:
    part = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    part |= {"num_key_value_heads": 2, "head_dim": 16, "query_pre_attn_scalar": 1, "initializer_range": 0.3}
    halves = {name: {"vocab_size": VOCABULARY, **part} for name in ("encoder", "decoder")}
    torch.manual_seed(0)
    model = transformers.T5GemmaForConditionalGeneration(transformers.T5GemmaConfig(**halves, vocab_size=VOCABULARY))
    ids, mask = prompts()
    found = []
    for attention in ("eager", "kvpack"):
        model.eval().set_attn_implementation(attention)
        options = {"decoder_input_ids": ids[:, :9], "use_cache": False}
        padded = logits(model, ids, attention_mask=mask, **options)
        found.append(torch.cat([logits(model, ids, **options), padded]))
    assert (found[0] - found[1]).abs().max() < 1e-4 * found[0].abs().max()


def test_functions_of_others_do_not_take_the_name() -> None:
    def mine() -> None: ...

    for interface in (transformers.AttentionInterface, transformers.AttentionMaskInterface):
        known = interface._global_mapping["kvpack"]
        with pytest.warns(UserWarning, match="'kvpack' is kvpack's own attention"):
            interface.register("kvpack", mine)
        assert interface._global_mapping["kvpack"] is known
        interface.register("kvpack tests", mine)
        assert interface._global_mapping.pop("kvpack tests") is mine


def test_holes_and_padding_on_the_right_are_not_stored() -> None:
    ids, mask = prompts()
    mask[0, 5:9] = mask[1, -6:] = mask[2, 30:33] = 0
    options = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    want = logits(model_of("llama", "through fp16"), ids, **options)
    model = model_of("llama")
    cache = KVPackCache(model.config)
    got = logits(model, ids, cache, **options)
    assert (got - want)[mask.bool()].abs().max() < 1e-4 * want.abs().max()
    assert [cache.kv.length(0, row) for row in range(3)] == mask.sum(1).tolist()
    # Windows count tokens.
    windowed, row = model_of("mistral"), {name: x[:1] for name, x in options.items()}
    alone = logits(model_of("mistral", "through fp16"), ids[:1, mask[0].bool()])
    in_row = logits(windowed, ids[:1], KVPackCache(windowed.config), **row)[:, mask[0].bool()]
    assert (in_row - alone).abs().max() < 1e-4 * alone.abs().max()
    # What has come cannot be masked afterwards, nor seen.
    later = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], 1)
    later[0, 5] = 1
    with pytest.raises(CacheInputError, match=r"row 0, column 5 of attention_mask is 1"):
        logits(model, ids[:, :1], cache, attention_mask=later)
    with pytest.raises(CacheInputError, match=r"\[3, 1\]; \[rows, 41\] is wanted"):
        logits(model, ids[:, :1], cache, attention_mask=later[:, :1])


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_a_cache_goes_on_where_a_text_ended(name: str) -> None:
    ids, mask = prompts()
    base, model = model_of(name, "through fp16"), model_of(name)
    cache = KVPackCache(model.config)
    begun = greedy(model, ids, cache, 12, attention_mask=mask)
    whole = torch.cat([mask, torch.ones(3, 12, dtype=torch.long)], 1)
    want = greedy(base, ids, new_tokens=24, attention_mask=mask).tolist()
    assert greedy(model, begun, cache, 12, attention_mask=whole).tolist() == want
    cache.reset()
    assert cache.get_seq_length() == 0
    assert greedy(model, ids, cache, 24, attention_mask=mask).tolist() == want
    cache.reset()
    assert greedy(model, ids[:1], cache, 24).tolist() == greedy(base, ids[:1], new_tokens=24).tolist()
    with pytest.raises(CacheInputError, match="a batch of 3 rows has come, and the cache holds 63 columns of 1 rows"):
        logits(model, ids, cache)


def test_a_step_that_does_not_fit_changes_nothing() -> None:
    ids, mask = prompts()
    model = model_of("llama")
    cache = KVPackCache(model.config, max_tokens=42)
    logits(model, ids, cache, attention_mask=mask)
    longer = torch.cat([mask, torch.ones(3, 5, dtype=torch.long)], 1)
    with pytest.raises(CacheFullError, match="5 tokens behind 40 are more than the 42 of max_tokens"):
        logits(model, ids[:, :5], cache, attention_mask=longer)
    assert cache.get_seq_length() == 40
    got = logits(model, ids[:, :1], cache, attention_mask=longer[:, :41])
    other = KVPackCache(model.config)
    logits(model, ids, other, attention_mask=mask)
    assert torch.equal(got, logits(model, ids[:, :1], other, attention_mask=longer[:, :41]))


def test_a_pass_that_failed_half_way_is_not_gone_on_with(monkeypatch: pytest.MonkeyPatch) -> None:
    ids, _ = prompts()
    model = model_of("llama")
    cache = KVPackCache(model.config)
    want = logits(model, ids, cache)
    with monkeypatch.context() as patched:
        patched.setattr(model.model.layers[1], "forward", lambda *args, **options: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            logits(model, ids[:, :1], cache)
    with pytest.raises(CacheInputError, match=r"a forward pass has failed half-way.*reset\(\) the cache"):
        logits(model, ids[:, :1], cache)
    cache.reset()
    assert torch.equal(logits(model, ids, cache), want)


@pytest.mark.parametrize("attention", ["kvpack", "sdpa"])
def test_a_cache_of_fewer_layers(attention: str) -> None:
    ids, _ = prompts()
    model, other = model_of("llama", attention, num_hidden_layers=4), model_of("llama", attention)
    cache = KVPackCache(other.config)
    of_model = {"kvpack": "4", "sdpa": "at least 3"}[attention]  # which sdpa does not tell
    wrong = rf"made with has 2 layers, and the model has {of_model}: .*KVPackCache\(model.config"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "KVPackCache: attn_implementation is 'sdpa'")
        for call in (logits, greedy):
            cache.reset()
            with pytest.raises(CacheInputError, match=wrong):
                call(model, ids, cache)
        cache.reset()
        assert torch.equal(logits(other, ids, cache), logits(other, ids, KVPackCache(other.config)))


def test_a_cache_of_more_layers(recwarn: pytest.WarningsRecorder) -> None:
    ids, _ = prompts()
    model, config = model_of("llama"), ARCHITECTURES["llama"].config(num_hidden_layers=4)
    config._attn_implementation = "kvpack"
    cache = KVPackCache(config)
    with pytest.raises(CacheInputError, match="made with has 4 layers, and the model has 2: "):
        logits(model, ids, cache)
    assert cache.get_seq_length() == 0
    # sdpa does not say how many there are: this is known when the first layer comes again.
    model.set_attn_implementation("sdpa")
    config._attn_implementation = "sdpa"
    elsewhere = KVPackCache(config)
    logits(model, ids, elsewhere)
    with pytest.raises(CacheInputError, match=r"keys have come for 2 layers, and the config .* made with has 4: it is"):
        logits(model, ids[:, :1], elsewhere)


@pytest.mark.parametrize("options", [{"num_key_value_heads": 4}, {"head_dim": 16}])
@pytest.mark.parametrize("attention", ["kvpack", "sdpa"])
def test_a_cache_of_other_heads(attention: str, options: dict[str, int]) -> None:
    ids, _ = prompts()
    model, other = model_of("llama", attention), model_of("llama", attention, **options)
    cache = KVPackCache(other.config)
    heads, head_dim = options.get("num_key_value_heads", 2), options.get("head_dim", 32)
    wrong = f"keys have 2 heads of 32, and the config that KVPackCache was made with has {heads} of {head_dim}: "
    with pytest.raises(CacheInputError, match=wrong):
        logits(model, ids, cache)
    assert cache.kv is None


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_steps_attend_to_some_pages(name: str) -> None:
    """All of them where there are no more, and the same ones wherever they lie; windows stay what they are."""
    ids, mask = prompts(rows=2, tokens=500)
    model = model_of(name)
    found = {}
    for pages, device_pages in ((None, None), (9, None), (4, None), (4, 4), (4, 6)):
        cache = KVPackCache(model.config, formats="INT4", pages=pages, device_pages=device_pages)
        logits(model, ids[:, :499], cache, attention_mask=mask[:, :499])
        found[pages, device_pages] = logits(model, ids[:, 499:], cache, attention_mask=mask)
    assert torch.equal(found[9, None], found[None, None])
    assert not torch.equal(found[4, None], found[None, None])
    assert torch.equal(found[4, 4], found[4, None])
    assert torch.equal(found[4, 6], found[4, None])


def test_text_is_generated_with_pages_in_host_memory() -> None:
    ids, mask = prompts(rows=2, tokens=300)
    model = model_of("llama")
    caches = [KVPackCache(model.config, formats="INT4", pages=4, device_pages=pages) for pages in (None, 5)]
    texts = [greedy(model, ids, cache, 70, attention_mask=mask) for cache in caches]
    assert torch.equal(*texts)
    assert caches[1].kv.slots.hit_rate() > 0


def test_formats_by_name_in_pairs() -> None:
    ids, _ = prompts(rows=1, tokens=200)
    model = model_of("llama")
    wanted = [(PageFormat.INT8, PageFormat.INT4), (PageFormat.INT4, PageFormat.INT2)]
    found = []
    for formats in (wanted, [("INT8", "int4"), (PageFormat.INT4, "INT2")]):
        cache = KVPackCache(model.config, formats=formats)
        found.append(logits(model, ids, cache))
        maps = [cache.kv.precision_map(layer)[side, 0, 1] for layer in range(2) for side in range(2)]
        assert maps == [page_format for pair in wanted for page_format in pair]
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"formats": [("INT8", "INT5")] * 2}, "formats has 'INT5'; there are FP16, "),
        ({"formats": [("INT8", "INT4")] * 30}, "^formats are a list of 30; .* for each of 2 layers is wanted$"),
        ({"max_sequences": 0}, "max_sequences is 0; it must be at least 1"),
        ({"max_sequences": -1}, "max_sequences is -1; it must be at least 1"),
        ({"policy": "position"}, "policy is 'position' without a budget"),
        ({"policy": "importance", "formats": "INT4"}, "policy is 'importance' without a budget"),
        ({"pages": 2}, "pages is 2; it must be an integer of at least 3"),
        ({"pages": True}, "pages is True"),
        ({"formats": "INT4", "device_pages": 8}, "device_pages is 8 with pages=None"),
        ({"formats": "INT4", "device_pages": 8, "pages": 9}, "device_pages is 8 with pages=9"),
        ({"device_pages": 8, "pages": 8}, "device_pages is 8 without formats or a budget"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as found:
        KVPackCache(ARCHITECTURES["llama"].config(), **options)
    assert isinstance(found.value, CacheInputError)


def test_probabilities_are_refused() -> None:
    ids, _ = prompts()
    model = model_of("llama")
    with pytest.raises(CacheInputError, match="output_attentions: kvpack's attention keeps no probabilities"):
        greedy(model, ids, KVPackCache(model.config), output_attentions=True, return_dict_in_generate=True)


def test_a_prompt_in_chunks() -> None:
    ids, mask = prompts()
    base, model = model_of("gemma3", "through fp16"), model_of("gemma3")
    options = {"attention_mask": mask, "prefill_chunk_size": 7}  # the first chunks have rows of pads alone
    assert greedy(model, ids, KVPackCache(model.config), **options).tolist() == greedy(base, ids, **options).tolist()


def test_other_attention_reads_the_cache_with_one_warning() -> None:
    ids, mask = prompts()
    base = model_of("mistral", "sdpa")
    cache = KVPackCache(base.config)
    with pytest.warns(UserWarning, match="attn_implementation is 'sdpa', so all pages are dequantized") as warned:
        got = greedy(base, ids, cache, attention_mask=mask)
    assert sum("dequantized" in str(one.message) for one in warned) == 1
    assert got.tolist() == greedy(base, ids, attention_mask=mask).tolist()
    assert cache.kv.length(0, 2) == 55  # pads are stored: no mask is known


def test_the_short_form() -> None:
    ids, _ = prompts(rows=1, tokens=200)
    model = model_of("llama")
    sixteen = greedy(model, ids, KVPackCache(model.config), 8)
    options: dict[str, Any] = {"new_tokens": 8, "return_dict_in_generate": True}
    found = greedy(model, ids, cache_implementation="kvpack", **options)
    assert found.sequences.tolist() == sixteen.tolist()
    assert isinstance(found[CACHE_ARGUMENT], KVPackCache)
    int4 = greedy(model, ids, cache_implementation="kvpack-int4", **options)
    assert int4[CACHE_ARGUMENT].average_bits() < found[CACHE_ARGUMENT].average_bits()
    assert set(int4[CACHE_ARGUMENT].kv.precision_map(0).ravel()) == {-1, PageFormat.FP16, PageFormat.INT4}
    config = {"formats": "int8", "recent_tokens": 0, "sinks": 0}
    int8 = greedy(model, ids, cache_implementation="kvpack", cache_config=config, **options)
    assert set(int8[CACHE_ARGUMENT].kv.precision_map(1).ravel()) == {-1, PageFormat.FP16, PageFormat.INT8}
    for impossible in ({"formats": "INT5"}, {"budget": 2.0}, {"width": 4}):
        with pytest.raises(CacheInputError):
            greedy(model, ids, cache_implementation="kvpack", cache_config=impossible)
    with pytest.raises(ValueError, match="kvpack-int5"):
        greedy(model, ids, cache_implementation="kvpack-int5")
    with pytest.raises(CacheInputError, match="use_cache is False"):
        greedy(model, ids, KVPackCache(model.config), use_cache=False)


def test_a_budget_is_divided_while_text_is_generated(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.randint(3, VOCABULARY, (1, 700), generator=torch.Generator().manual_seed(2))
    model = model_of("llama", max_position_embeddings=2048)
    cache = KVPackCache(model.config, budget=0.3)
    calls = []
    text = greedy(model, ids, cache, 1)
    reallocate = cache.kv.reallocate
    monkeypatch.setattr(cache.kv, "reallocate", lambda: calls.append((cache.kv.length(0, 0), reallocate())))
    greedy(model, text, cache, 70)
    assert [length for length, _ in calls] == [730, 762]  # every 32 forward passes
    assert len(set(cache.kv.precision_map(0).ravel())) > 2
    assert cache.average_bits() < 8


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("mamba", "mamba has no attention layers"),
        ("t5", "t5 is an encoder-decoder model"),
        ("whisper", "whisper is an encoder-decoder model"),
        ("deepseek v3", "deepseek_v3 has multi-head latent attention"),
    ],
)
def test_what_the_cache_is_not_for(name: str, reason: str) -> None:
    with pytest.raises(CacheInputError, match=reason):
        KVPackCache(ARCHITECTURES[name].config())


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"layer_types": ["full_attention", "chunked_attention"]}, "has layers of type chunked_attention"),
        ({"layer_types": ["linear_attention", "full_attention"]}, "has layers of type linear_attention"),
        ({"num_kv_shared_layers": 1}, "share keys and values with others"),
        ({"cross_attention_layers": [1]}, "layers that attend to an image"),
    ],
)
def test_layers_that_the_cache_is_not_for(options: dict[str, Any], reason: str) -> None:
    config = ARCHITECTURES["llama"].config()
    for name, value in options.items():
        setattr(config, name, value)
    with pytest.raises(CacheInputError, match=reason):
        KVPackCache(config)


def test_sizes_that_pages_do_not_have() -> None:
    ids, _ = prompts()
    model = model_of("llama", head_dim=24)
    with pytest.raises(CacheInputError, match="head_dim is 24; kvpack's pages need a multiple of 16"):
        logits(model, ids, KVPackCache(model.config))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_keys_that_fp16_cannot_hold(device: str) -> None:
    ids = prompts()[0].to(device)
    model = model_of("qwen2").to(device)
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.bias.fill_(1e5)
    with pytest.raises(CacheInputError, match=r"fp16 pages end at 65,504: KVPackCache\(dtype=torch.bfloat16\)"):
        logits(model, ids, KVPackCache(model.config))
    found = logits(model, ids, KVPackCache(model.config, dtype=torch.bfloat16))
    assert found.isfinite().all()


# Of 64 dimensions 32 turn: i with i + 16, and 2i with 2i + 1.
PARTLY_ROTATED = {"Phi": (2, 3, 0, 1), "Glm": (2, 3, 1, 0)}


@pytest.mark.parametrize("name", PARTLY_ROTATED)
def test_keys_lie_in_the_order_of_the_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"hidden_size": 128, "head_dim": 64, "intermediate_size": 64, "num_hidden_layers": 2, "pad_token_id": 0}
    options = sizes | {"vocab_size": VOCABULARY, "num_attention_heads": 2, "num_key_value_heads": 2}
    architecture = Architecture(f"{name}Config", f"{name}ForCausalLM", options)
    base, model = architecture.model(), architecture.model()
    base.set_attn_implementation("through fp16")
    model.set_attn_implementation("kvpack")
    ids, mask = prompts(tokens=100)
    cache = KVPackCache(model.config)
    got = greedy(model, ids, cache, 32, attention_mask=mask)
    assert got.tolist() == greedy(base, ids, new_tokens=32, attention_mask=mask).tolist()
    assert cache.kv.key_order == PARTLY_ROTATED[name]
    own = KVPackCache(model.config, key_order=[3, 2, 1, 0])
    whole = logits(model, ids, own)
    assert own.kv.key_order == (3, 2, 1, 0)
    # Of 16-bit pages the order does not show, of others half of the groups have more bits.
    assert torch.equal(logits(model, ids, KVPackCache(model.config)), whole)
    small = KVPackCache(model.config, formats="INT4", recent_tokens=0, sinks=0)
    logits(model, ids, small)
    error = small.kv.read(0, 0)[0][:, :64].float() - own.kv.read(0, 0)[0][:, :64].float()
    by_group = error.square().reshape(-1, 4, 16).mean((0, 2))[list(PARTLY_ROTATED[name])]
    assert 4 * by_group[:2].max() < by_group[2:].min()
    places = [torch.device("cpu", 0), torch.device("cpu", 1)]
    monkeypatch.setattr("kvpack.integrations.transformers.cache._device_of", lambda layer, states: places[layer])
    split = KVPackCache(model.config)
    logits(model, ids, split)
    assert [kv.key_order for kv in split.kvs] == 2 * [PARTLY_ROTATED[name]]


def test_orders_of_keys_that_are_refused() -> None:
    model = model_of("llama")  # head_dim is 32
    for order, error in (("10", CacheInputError), ([0.0, 1.0], CacheInputError), ([0, 0], PageError)):
        with pytest.raises(error, match="key_order is "):
            KVPackCache(model.config, key_order=order)
    with pytest.raises(PageError, match="each of the groups 0 to 15 is wanted once"):
        KVPackCache(model.config, key_order=range(17))
    with pytest.raises(PageError, match="each of the groups 0 to 1 is wanted once"):
        logits(model, prompts()[0], KVPackCache(model.config, key_order=[0, 1, 2]))


@pytest.mark.filterwarnings("default:KVPackCache. the model is in")
def test_pages_of_a_model_in_fp32() -> None:
    ids, _ = prompts()
    model = model_of("llama")
    cache = KVPackCache(model.config)
    with pytest.warns(UserWarning, match=r"the model is in torch.float32, pages are in torch.float16"):
        logits(model, ids, cache)
    assert cache.kv.dtype == torch.float16
    cache = KVPackCache(model.config, dtype=torch.bfloat16)
    logits(model, ids, cache)
    assert cache.kv.dtype == torch.bfloat16


def test_a_model_that_changes_values_behind_the_cache() -> None:
    config = transformers.DiffLlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.DiffLlamaForCausalLM(config).eval()
    model.set_attn_implementation("kvpack")
    with pytest.raises(CacheInputError, match="layer 0: the model changes values between cache and attention"):
        logits(model, prompts()[0], KVPackCache(model.config))


def test_a_mask_that_is_not_causal() -> None:
    model = model_of("gemma3")
    ids, _ = prompts()
    masks = transformers.masking_utils.create_causal_mask
    cache = KVPackCache(model.config)
    embedded = {"inputs_embeds": torch.zeros(3, 40, 64), "attention_mask": None, CACHE_ARGUMENT: cache}
    sees_all = {"or_mask_function": lambda batch, head, query, key: query >= 0}
    with pytest.raises(CacheInputError, match="this model's mask is not causal"):
        masks(model.config, **embedded, **sees_all)
    with pytest.raises(CacheInputError, match=r"attention_mask has shape \[3, 1, 40, 40\]"):
        logits(model, ids, cache, attention_mask=torch.ones(3, 1, 40, 40, dtype=torch.bool))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_compiled_model(name: str, backend: str) -> None:
    ids, _ = prompts(rows=2)
    model = model_of(name, dtype=torch.bfloat16)
    compiled = torch.compile(model, backend=backend, fullgraph=True)

    def steps(function: Any) -> torch.Tensor:
        cache, found, new = KVPackCache(model.config), [], ids
        cache.early_initialization(2, 2, 32, torch.bfloat16, torch.device("cpu"))
        for _ in range(4):
            found.append(logits(function, new, cache)[:, -1])
            new = found[-1].argmax(-1, keepdim=True)
        return torch.stack(found)

    torch.compiler.reset()
    assert torch.equal(steps(compiled), steps(model))


def test_a_compiled_model_takes_no_pads() -> None:
    ids, mask = prompts()
    model = model_of("llama", dtype=torch.bfloat16)
    torch.compiler.reset()
    with pytest.raises(CacheInputError, match=r"under torch.compile a KVPackCache takes no attention_mask"):
        logits(torch.compile(model, backend="eager"), ids, KVPackCache(model.config), attention_mask=mask)
    # What the cache has announced to its mask is not left for that of another.
    assert not take_announced_mask()


def test_a_compiled_mask_that_is_not_causal(monkeypatch: pytest.MonkeyPatch) -> None:
    ids, _ = prompts(rows=2)
    model = model_of("llama", dtype=torch.bfloat16)
    masks = transformers.masking_utils.create_causal_mask

    def sees_all(**options: Any) -> Any:
        return masks(**options, or_mask_function=lambda batch, head, query, key: query >= 0)

    monkeypatch.setattr("transformers.models.llama.modeling_llama.create_causal_mask", sees_all)
    torch.compiler.reset()
    with pytest.raises(CacheInputError, match="not causal"):
        logits(torch.compile(model, backend="eager"), ids, KVPackCache(model.config))
    cache = KVPackCache(model.config)
    cache.early_initialization(2, 2, 32, torch.bfloat16, torch.device("cpu"))
    with pytest.raises((CacheInputError, torch._dynamo.exc.Unsupported), match="not causal"):
        logits(torch.compile(model, backend="eager", fullgraph=True), ids, cache)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_beams(name: str) -> None:
    ids, mask = prompts(tokens=70)
    base, model = model_of(name, "through fp16"), model_of(name)
    options = {"attention_mask": mask, "num_beams": 3}
    cache = KVPackCache(model.config)
    assert greedy(model, ids, cache, **options).tolist() == greedy(base, ids, **options).tolist()
    assert [cache.kv.length(0, row) for row in range(9)] == 3 * [85] + 3 * [72] + 3 * [59]


@pytest.mark.parametrize("formats", ["FP16", "INT4"])
def test_drafts_that_are_taken_back(formats: str) -> None:
    ids = torch.arange(3, 23).repeat(1, 11)[:, :210]
    model = model_of("llama")
    alone = greedy(model, ids, KVPackCache(model.config, formats=formats), 24).tolist()
    cache = KVPackCache(model.config, formats=formats)
    assert greedy(model, ids, cache, 24, prompt_lookup_num_tokens=5).tolist() == alone
    assert cache.get_seq_length() == cache.kv.length(1, 0) == 233
    assistant = ARCHITECTURES["llama"].model(seed=3)
    cache = KVPackCache(model.config, formats=formats)
    assert greedy(model, ids, cache, 24, assistant_model=assistant).tolist() == alone
    with pytest.raises(CacheInputError, match="minus the number of tokens"):
        cache.crop(3)


def test_rows_are_cropped_and_chosen_by_their_tokens() -> None:
    ids, mask = prompts()
    mask[1, -2:] = 0
    options = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    model = model_of("llama")
    cache = KVPackCache(model.config, max_sequences=4)
    logits(model, ids, cache, **options)
    cache.crop(-3)
    assert [cache.kv.length(0, row) for row in range(3)] == [37, 24, 11]
    cache.batch_select_indices(torch.tensor([2, 0]))
    cache.batch_repeat_interleave(2)
    assert [cache.kv.length(1, row) for row in range(4)] == [11, 11, 37, 37]
    chosen = [2, 2, 0, 0]
    tail = {name: x[chosen, 37:39] if name == "position_ids" else x[chosen, :39] for name, x in options.items()}
    got = logits(model, ids[chosen, 37:39], cache, **tail)
    want = logits(model_of("llama", "through fp16"), ids, **options)[chosen, 37:39]
    assert (got - want).abs().max() < 1e-4 * want.abs().max()
    with pytest.raises(CacheInputError, match=r"8 rows are wanted.*KVPackCache\(max_sequences=8\)"):
        cache.batch_repeat_interleave(2)


@pytest.mark.parametrize("use", ["generate", "forward"])
def test_a_cache_that_is_no_more_gives_its_memory_back_at_once(use: str) -> None:
    """Not with some later garbage collection: a GPU's memory does not make one come."""
    model, ids = model_of("llama"), prompts(1)[0]
    gc.collect()
    gc.disable()
    try:
        cache = KVPackCache(model.config, formats="INT4")
        if use == "generate":
            model.generate(ids, max_new_tokens=3, do_sample=False, **{CACHE_ARGUMENT: cache})
        else:
            logits(model, ids, cache)
        pages = [weakref.ref(kv) for kv in cache.kvs]
        assert pages
        del cache
        assert [kv() for kv in pages] == [None] * len(pages)
    finally:
        gc.enable()
