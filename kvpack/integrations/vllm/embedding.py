"""Embeddings and output layers of vLLM with coded weights, tied or not."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.logger import init_logger
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from kvpack.errors import ModelMismatchError
from kvpack.format.layout import ElementKind
from kvpack.integrations.vllm.arriving import Arrivals, Part, dense
from kvpack.integrations.vllm.coded_layer import CodedLayer

logger = init_logger(f"vllm.{__name__}")


class KVPackEmbeddingMethod(QuantizeMethodBase):  # type: ignore[misc]
    """Looks rows of a coded matrix up, each decoded when it is asked for, and multiplies with it as an output layer.

    Rows of numbers that are not quantized cannot be looked up one by one: such an embedding is decoded as it is loaded.

    Args:
        prefix: the layer's name, for messages; is_dense: it is to be decoded whatever it is.
    """

    def __init__(self, prefix: str, *, is_dense: bool) -> None:
        self.prefix, self.is_dense = prefix, is_dense

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **_attributes: Any,
    ) -> None:
        self.dtype = params_dtype
        self.arrivals = Arrivals(self.prefix, params_dtype)
        self.arrivals.expect(layer, "weight", self.arrivals.keep)

    def process_weights_after_loading(self, layer: Any) -> None:
        if not hasattr(layer, "weight_kvpack"):
            return  # done, for the layer that this one is tied to
        tensor = self.arrivals.shard(None)
        header, indices = tensor.header, layer.shard_indices
        if layer.num_added_embeddings:
            raise ModelMismatchError(f"{self.prefix}: {layer.num_added_embeddings} added rows of a coded embedding")
        if (header.rows, header.cols) != (layer.org_vocab_size, layer.embedding_dim):
            raise ModelMismatchError(
                f"{self.prefix}: {header.rows} × {header.cols} in the checkpoint, {layer.org_vocab_size} × "
                f"{layer.embedding_dim} in the model"
            )
        part = tensor.outputs(indices.org_vocab_start_index, indices.org_vocab_end_index)
        is_quantized = header.layout.element_kind == ElementKind.SIGNED
        if self.is_dense or not is_quantized or header.transposed:
            self._decode(layer, part, because=None if is_quantized else "its numbers are not quantized")
            return
        layer.coded = CodedLayer([part], layer.weight_kvpack.device, layer.num_embeddings_per_partition)
        self.arrivals.forget(layer, "weight")
        layer.coded.warm_up(self.dtype)
        layer.coded.look_up(torch.zeros(1, dtype=torch.int64, device=layer.coded.blobs()[0].device), self.dtype)

    def _decode(self, layer: Any, part: Part, because: str | None) -> None:
        device = layer.weight_kvpack.device
        if because is not None:
            logger.warning_once("kvpack: %s is decoded as it is loaded: %s", self.prefix, because)
        weight = torch.zeros((layer.num_embeddings_per_partition, layer.embedding_dim), dtype=self.dtype, device=device)
        weight[: part.rows] = dense(part, self.dtype)
        self.arrivals.forget(layer, "weight")
        layer.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
        layer.quant_method = UnquantizedEmbeddingMethod()
        layer.quant_method.process_weights_after_loading(layer)

    def embedding(self, layer: Any, input_: torch.Tensor) -> torch.Tensor:
        coded = layer.coded
        out: torch.Tensor = torch.ops.kvpack.rows_of(input_, coded.handle, coded.columns, self.dtype)
        return out

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        coded = layer.coded
        out: torch.Tensor = torch.ops.kvpack.linear_of(x, coded.handle, coded.rows, bias)
        return out

    def tie_weights(self, layer: nn.Module, embed_tokens: nn.Module) -> nn.Module:
        """The embedding is the output layer as well: the layer of its own has no weights, or none that are read."""
        return embed_tokens
