"""KVPackCache and the attention "kvpack" in transformers' models, against the default cache with ``sdpa``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from integrations.generation import greedy, logits
from integrations.models import ARCHITECTURES, VOCABULARY, WITH_KV_CACHE
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from kvpack import KVPackCache

pytestmark = pytest.mark.filterwarnings("ignore:KVPackCache. the model is in torch.float32:UserWarning")

SUPPORTED = [name for name in WITH_KV_CACHE if name not in ("gemma2", "gpt oss", "deepseek v3")]


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
    rounded = (states.half().float() for states in (q, k, v))
    return sdpa_attention_forward(module, *rounded, mask, **options)[0].half().float(), None


transformers.AttentionInterface.register("sdpa through fp16", _through_fp16)
transformers.AttentionMaskInterface.register("sdpa through fp16", sdpa_mask)


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
    base, model = model_of(name, "sdpa through fp16"), model_of(name)
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


def test_functions_of_others_do_not_take_the_name() -> None:
    def mine() -> None: ...

    for interface in (transformers.AttentionInterface, transformers.AttentionMaskInterface):
        known = interface._global_mapping["kvpack"]
        with pytest.warns(UserWarning, match="'kvpack' is kvpack's own attention"):
            interface.register("kvpack", mine)
        assert interface._global_mapping["kvpack"] is known
        interface.register("kvpack tests", mine)
        assert interface._global_mapping.pop("kvpack tests") is mine
