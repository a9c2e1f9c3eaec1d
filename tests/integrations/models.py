"""Tiny models of transformers' architectures, random weights: one table for all tests of the integration.

Sizes are the smallest that exercise something: head_dim 32, matrices of 64 columns and more, a vocabulary of 160.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

VOCABULARY = 160
_SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 2, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
_GROUPED = _SIZES | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}


@dataclass(frozen=True)
class Architecture:
    """A model of random weights.

    Attributes:
        config_class, model_class: names in transformers.
        options: of the config.
        inputs: "ids", "ids and decoder ids", "features and decoder ids", or "pixels": what its forward takes.
        generates: whether ``generate`` runs on it.
    """

    config_class: str
    model_class: str
    options: dict[str, Any] = field(default_factory=dict)
    inputs: str = "ids"
    generates: bool = True

    def config(self, **options: Any) -> Any:
        """The config; ``options`` override those of the table."""
        return getattr(transformers, self.config_class)(**(self.options | options))

    @property
    def class_(self) -> Any:
        return getattr(transformers, self.model_class)

    def model(self, dtype: torch.dtype = torch.float32, seed: int = 0, **options: Any) -> Any:
        """A model of random weights, in evaluation mode. Its logits are far apart, so that greedy tokens are sure."""
        torch.manual_seed(seed)
        model = self.class_(self.config(**options)).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim >= 2 and "norm" not in name:
                    parameter.normal_(0, 0.08)
        return model.to(dtype)

    def save(self, folder: Path, dtype: torch.dtype = torch.float32, seed: int = 0, **options: Any) -> Path:
        """The same, as ``save_pretrained`` writes it to ``folder``."""
        self.model(dtype, seed, **options).save_pretrained(folder)
        return folder

    def example(self, dtype: torch.dtype = torch.float32, batch: int = 2, tokens: int = 12) -> dict[str, torch.Tensor]:
        """Arguments of the model's forward: the same at each call."""
        generator = torch.Generator().manual_seed(5)
        ids = torch.randint(3, VOCABULARY, (batch, tokens), generator=generator)
        if self.inputs == "pixels":
            return {"pixel_values": torch.randn(batch, 3, 32, 32, generator=generator).to(dtype)}
        if self.inputs == "features and decoder ids":
            return {
                "input_features": torch.randn(batch, 16, 60, generator=generator).to(dtype),
                "decoder_input_ids": ids,
            }
        if self.inputs == "ids and decoder ids":
            return {"input_ids": ids, "decoder_input_ids": ids.flip(1)}
        return {"input_ids": ids}


ARCHITECTURES = {
    "llama": Architecture("LlamaConfig", "LlamaForCausalLM", _GROUPED),
    "llama tied": Architecture("LlamaConfig", "LlamaForCausalLM", _GROUPED | {"tie_word_embeddings": True}),
    "mistral": Architecture("MistralConfig", "MistralForCausalLM", _GROUPED | {"sliding_window": 16}),
    "qwen2": Architecture("Qwen2Config", "Qwen2ForCausalLM", _GROUPED),
    "qwen3": Architecture("Qwen3Config", "Qwen3ForCausalLM", _GROUPED | {"tie_word_embeddings": True}),
    "qwen3 moe": Architecture("Qwen3MoeConfig", "Qwen3MoeForCausalLM", _GROUPED | _EXPERTS | {"num_experts": 4}),
    "gemma2": Architecture(
        "Gemma2Config", "Gemma2ForCausalLM", _GROUPED | {"sliding_window": 16, "query_pre_attn_scalar": 32}
    ),
    "gemma3": Architecture(
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        _GROUPED
        | {
            "sliding_window": 16,
            "query_pre_attn_scalar": 32,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "phi3": Architecture("Phi3Config", "Phi3ForCausalLM", _GROUPED),
    "gpt2": Architecture(
        "GPT2Config",
        "GPT2LMHeadModel",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 64,
            "n_layer": 2,
            "n_head": 2,
            "n_positions": 512,
            "bos_token_id": 1,
            "eos_token_id": None,
        },
    ),
    "gpt oss": Architecture(
        "GptOssConfig",
        "GptOssForCausalLM",
        _GROUPED
        | {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "mixtral": Architecture("MixtralConfig", "MixtralForCausalLM", _GROUPED | {"num_local_experts": 4}),
    "deepseek v3": Architecture(
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        _SIZES
        | _EXPERTS
        | {
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "n_group": 2,
            "topk_group": 1,
            "q_lora_rank": 32,
            "kv_lora_rank": 32,
            "qk_rope_head_dim": 16,
            "qk_nope_head_dim": 16,
            "v_head_dim": 32,
            "first_k_dense_replace": 1,
        },
    ),
    "bert": Architecture("BertConfig", "BertForMaskedLM", _SIZES | {"max_position_embeddings": 64}, generates=False),
    "t5": Architecture(
        "T5Config",
        "T5ForConditionalGeneration",
        {
            "vocab_size": VOCABULARY,
            "d_model": 64,
            "d_kv": 32,
            "d_ff": 128,
            "num_layers": 2,
            "num_heads": 2,
            "decoder_start_token_id": 0,
            "eos_token_id": None,
        },
        inputs="ids and decoder ids",
    ),
    "whisper": Architecture(
        "WhisperConfig",
        "WhisperForConditionalGeneration",
        {
            "vocab_size": VOCABULARY,
            "d_model": 64,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 128,
            "decoder_ffn_dim": 128,
            "num_mel_bins": 16,
            "max_source_positions": 30,
            "max_target_positions": 128,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "decoder_start_token_id": 1,
            "suppress_tokens": None,
            "begin_suppress_tokens": None,
        },
        inputs="features and decoder ids",
    ),
    "vit": Architecture(
        "ViTConfig",
        "ViTForImageClassification",
        {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
            "num_labels": 10,
        },
        inputs="pixels",
        generates=False,
    ),
    "mamba": Architecture(
        "MambaConfig",
        "MambaForCausalLM",
        {"vocab_size": VOCABULARY, "hidden_size": 64, "state_size": 8, "num_hidden_layers": 2, "eos_token_id": None},
    ),
}
# Decoders whose attention reads keys and values from a cache.
WITH_KV_CACHE = [
    name for name, one in ARCHITECTURES.items() if one.generates and one.inputs == "ids" and name != "mamba"
]
