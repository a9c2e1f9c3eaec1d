"""Embeddings that know of the quantization, in models of vLLM that do not tell them (Mixtral, Gemma 2)."""

from __future__ import annotations

from typing import Any

from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from kvpack.encode.model_config import METHOD

# Of the arguments of an embedding, counted from behind self.
_QUANT_CONFIG = 5


class _ToldVocabParallelEmbedding(VocabParallelEmbedding):  # type: ignore[misc]
    """An embedding that knows of the quantization: some models of vLLM (Mixtral, Gemma 2) do not tell theirs."""

    def __init__(self, *args: Any, **options: Any) -> None:
        config = get_current_vllm_config_or_none()
        quantization = getattr(config, "quant_config", None)
        is_told = len(args) > _QUANT_CONFIG or options.get("quant_config") is not None
        if quantization is not None and quantization.get_name() == METHOD and not is_told:
            options["quant_config"] = quantization
        super().__init__(*args, **options)


def tell_embeddings() -> None:
    """Have vLLM make embeddings that know of the quantization; those of other models are what they were."""
    if VocabParallelEmbedding.__name__ not in op_registry_oot:
        VocabParallelEmbedding.register_oot(_ToldVocabParallelEmbedding)
