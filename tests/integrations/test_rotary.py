"""Which groups of 16 dimensions of keys come first, by model: worked out by hand, and measured on keys."""

from __future__ import annotations

import sys
import types
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from integrations.generation import CACHE_ARGUMENT
from integrations.models import ARCHITECTURES, VOCABULARY, Architecture

from kvpack.integrations.transformers.rotary import key_order

# Tiny models whose keys have 64 dimensions, and their order.
_SIZES = {"vocab_size": VOCABULARY, "hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 1}
_SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0}
_EXPERTS = {"num_experts_per_tok": 1, "moe_intermediate_size": 16, "n_routed_experts": 2, "n_shared_experts": 1}
TINY: dict[str, tuple[Architecture, tuple[int, ...]]] = {
    # i and i + 32 turn together: 0 to 15, 32 to 47 are fast.
    "llama": (Architecture("LlamaConfig", "LlamaForCausalLM", _SIZES), ()),
    # 32 turn, i with i + 16: groups 0 and 1 are alike.
    "phi": (Architecture("PhiConfig", "PhiForCausalLM", _SIZES), (2, 3, 0, 1)),
    "glm4_moe": (
        Architecture(
            "Glm4MoeConfig", "Glm4MoeForCausalLM", _SIZES | _EXPERTS | {"partial_rotary_factor": 0.5, "head_dim": 64}
        ),
        (2, 3, 0, 1),
    ),
    # 16 turn.
    "gpt_neox": (Architecture("GPTNeoXConfig", "GPTNeoXForCausalLM", _SIZES | {"rotary_pct": 0.25}), (1, 2, 3, 0)),
    "stablelm": (Architecture("StableLmConfig", "StableLmForCausalLM", _SIZES), (1, 2, 3, 0)),
    # 32 turn, 2i with 2i + 1.
    "glm": (Architecture("GlmConfig", "GlmForCausalLM", _SIZES | {"head_dim": 64}), (2, 3, 1, 0)),
    "gptj": (
        Architecture(
            "GPTJConfig",
            "GPTJForCausalLM",
            {"vocab_size": VOCABULARY, "n_embd": 128, "n_head": 2, "n_layer": 1, "n_positions": 64, "rotary_dim": 32},
        ),
        (2, 3, 1, 0),
    ),
    # All turn, 2i with 2i + 1.
    "cohere": (Architecture("CohereConfig", "CohereForCausalLM", _SIZES), (3, 2, 1, 0)),
    "ernie4_5": (Architecture("Ernie4_5Config", "Ernie4_5ForCausalLM", _SIZES), (3, 2, 1, 0)),
    "llama4": (
        Architecture(
            "Llama4TextConfig",
            "Llama4ForCausalLM",
            _SIZES
            | {"head_dim": 64, "num_local_experts": 1, "interleave_moe_layer_step": 2, "use_qk_norm": False}
            | {"intermediate_size_mlp": 64},
        ),
        (3, 2, 1, 0),
    ),
}


@pytest.mark.parametrize("name", TINY)
def test_orders_of_tiny_models(name: str) -> None:
    architecture, order = TINY[name]
    assert key_order(architecture.config(), 64) == order


@torch.no_grad()
@pytest.mark.parametrize("name", TINY)
def test_orders_are_those_of_the_keys(name: str) -> None:
    """Keys of the same tokens at places 2 and 3, layer 0: the earlier a group comes, the less they differ."""
    architecture, order = TINY[name]
    model = architecture.model()
    found = []
    for place in (2, 3):
        cache = transformers.DynamicCache(config=model.config)
        options = {CACHE_ARGUMENT: cache, "position_ids": torch.tensor([[place]]), "use_cache": True}
        model(input_ids=torch.arange(3, VOCABULARY)[:, None], **options)
        layer: Any = cache.layers[0]
        found.append(layer.keys[:, :, -1].double())
    turned = ((found[1] - found[0]) ** 2).mean((0, 1)) / (found[0] ** 2 + found[1] ** 2).mean((0, 1))
    speed = np.log(turned.numpy() + 1e-12).reshape(-1, 16).mean(1)[list(order or (1, 3, 0, 2))]
    assert (np.diff(speed) > -0.5).all()  # of groups that are alike, about 0.2 is chance
    assert speed[-1] - speed[0] > 4


# (config class, options, head_dim, the order)
CONFIGS: list[tuple[str, dict[str, Any], int, tuple[int, ...]]] = [
    *((name, {}, 128, ()) for name in ("LlamaConfig", "Qwen3Config", "MistralConfig", "Gemma2Config", "GptOssConfig")),
    *((name, {}, 64, ()) for name in ("GPT2Config", "OPTConfig", "BloomConfig", "Gemma3TextConfig")),
    # 40 of 80: means of d % 20 in group 0 are 7.5, in 1 (16 to 19, 0 to 11) 8.5, of half of group 2 15.5.
    ("PhiConfig", {"partial_rotary_factor": 0.5}, 80, (3, 4, 2, 1, 0)),
    ("PhiConfig", {"partial_rotary_factor": 0.4}, 80, (2, 3, 4, 0, 1)),
    ("PhiConfig", {"partial_rotary_factor": 0.5}, 128, (4, 5, 6, 7, 1, 3, 0, 2)),
    ("PhiConfig", {"partial_rotary_factor": 1.0}, 128, ()),
    ("Phi3Config", {"partial_rotary_factor": 0.75}, 128, (6, 7, 2, 5, 1, 4, 0, 3)),
    ("GPTNeoXConfig", {"rotary_pct": 0.25}, 128, (2, 3, 4, 5, 6, 7, 0, 1)),
    ("PersimmonConfig", {}, 64, (2, 3, 0, 1)),
    ("GlmConfig", {}, 128, (4, 5, 6, 7, 3, 2, 1, 0)),
    ("Glm4Config", {}, 128, (4, 5, 6, 7, 3, 2, 1, 0)),
    ("Glm4MoeConfig", {}, 128, (4, 5, 6, 7, 1, 3, 0, 2)),
    ("Glm4vTextConfig", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, 64, (2, 3, 1, 0)),
    ("Ernie4_5_VLMoeTextConfig", {}, 128, (7, 6, 5, 4, 3, 2, 1, 0)),
    ("Qwen2_5_VLTextConfig", {}, 128, ()),
    ("Qwen3NextConfig", {}, 256, (*range(4, 16), 1, 3, 0, 2)),
    ("Cohere2Config", {}, 128, (7, 6, 5, 4, 3, 2, 1, 0)),
    ("GPTJConfig", {}, 256, (*range(4, 16), 3, 2, 1, 0)),
    ("RoFormerConfig", {}, 64, (3, 2, 1, 0)),
]


@pytest.mark.parametrize(("name", "options", "head_dim", "order"), CONFIGS, ids=str)
def test_orders_of_configurations(name: str, options: dict[str, Any], head_dim: int, order: tuple[int, ...]) -> None:
    assert key_order(getattr(transformers, name)(**options), head_dim) == order


def test_layers_that_turn_other_dimensions_count_alike() -> None:
    """In 64 and in all of 128, the means of both: 0.35, 1.10, 0.85, 1.60, 1.12, 1.37, 1.62, 1.87 of groups 0 to 7."""
    config = ARCHITECTURES["gemma3"].config()
    config.rope_parameters["full_attention"]["partial_rotary_factor"] = 0.5
    assert key_order(config, 128) == (7, 6, 3, 5, 4, 1, 2, 0)
    config.layer_types = ["sliding_attention", "full_attention", "sliding_attention"]
    assert key_order(config, 128) == (7, 3, 6, 5, 1, 2, 4, 0)  # 1 and 2 both have 47/96
    config.layer_types = ["full_attention", "full_attention"]
    assert key_order(config, 128) == (4, 5, 6, 7, 1, 3, 0, 2)
    # Of all pairs, the slowest stand still.
    config.rope_parameters["full_attention"]["rope_type"] = "proportional"
    assert key_order(config, 128) == ()


def test_a_factor_beside_the_rope_parameters() -> None:
    config = ARCHITECTURES["llama"].config()
    config.partial_rotary_factor = 0.5
    assert key_order(config, 64) == (2, 3, 0, 1)
    config.rope_parameters["partial_rotary_factor"] = 0.25  # which is what models read
    assert key_order(config, 64) == (1, 2, 3, 0)


def test_models_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    class Derived(transformers.CohereConfig):
        pass

    class Own(transformers.PreTrainedConfig):
        model_type = "own"

    assert key_order(Derived(), 64) == (3, 2, 1, 0)
    assert key_order(Own(), 64) == ()
    Own.__module__ = "somebody.configuration_own"
    assert key_order(Own(), 64) == ()  # no such module
    module = types.ModuleType("somebody.modeling_own")
    monkeypatch.setitem(sys.modules, "somebody", types.ModuleType("somebody"))
    monkeypatch.setitem(sys.modules, "somebody.modeling_own", module)
    assert key_order(Own(), 64) == ()
    module.rotate_half = lambda x: torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)  # type: ignore[attr-defined]
    assert key_order(Own(), 64) == (3, 2, 1, 0)
    module.rotate_half = lambda x, angle: x  # type: ignore[attr-defined]
    assert key_order(Own(), 64) == ()
