"""Linear layers of vLLM with coded weights: merged ones as one product, a rank's part alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    QKVParallelLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)

from kvpack.errors import ModelMismatchError
from kvpack.format.container import BLOB_SUFFIX
from kvpack.integrations.vllm.arriving import Arrivals, ArrivedTensor, Part, Shard, dense, stacked
from kvpack.integrations.vllm.coded_layer import CodedLayer

_QKV = ("q", "k", "v")


class KVPackLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """Products with coded weights.

    Args:
        prefix: the layer's name, for messages.
    """

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix

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
        self.inputs, self.dtype = input_size_per_partition, params_dtype
        self.sizes = list(output_partition_sizes)
        self.arrivals = Arrivals(self.prefix, params_dtype)
        self.arrivals.expect(layer, "weight", self.arrivals.keep)

    def process_weights_after_loading(self, layer: Any) -> None:
        if "coded" in layer._modules:
            return
        parts = stacked(rank_parts(layer, self.arrivals, self.sizes))
        self._check(parts)
        layer.coded = CodedLayer(parts, layer.weight_kvpack.device)
        self.arrivals.forget(layer, "weight")
        layer.coded.warm_up(self.dtype)

    def _check(self, parts: list[Part]) -> None:
        rows = sum(part.rows for part in parts)
        columns = {part.coded.header.cols for part in parts}
        if rows != sum(self.sizes) or columns != {self.inputs}:
            raise ModelMismatchError(
                f"{self.prefix}: coded weights of {rows} outputs and {sorted(columns)} inputs; vLLM's layer has "
                f"{sum(self.sizes)} and {self.inputs} on this rank"
            )

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        coded: Any = layer.coded
        out: torch.Tensor = torch.ops.kvpack.linear_of(x, coded.handle, coded.rows, bias)
        return out


class DecodingLinearMethod(UnquantizedLinearMethod):  # type: ignore[misc]
    """vLLM's own dense layer, whose weights are decoded as they are loaded.

    For layers of which the checkpoint has some shards coded and others plain, and for all if that is asked for.
    """

    def __init__(self, prefix: str) -> None:
        super().__init__()
        self.prefix = prefix

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **attributes: Any,
    ) -> None:
        super().create_weights(
            layer,
            input_size_per_partition,
            output_partition_sizes,
            input_size,
            output_size,
            params_dtype,
            **attributes,
        )
        self.dtype, self.sizes = params_dtype, list(output_partition_sizes)
        self.arrivals = Arrivals(self.prefix, params_dtype)
        self.arrivals.expect(layer, "weight", self.arrivals.keep)

    def process_weights_after_loading(self, layer: Any) -> None:
        for shard in list(self.arrivals.tensors):
            first = 0 if shard is None else sum(self.sizes[: _position(shard)])
            parts = shard_parts(layer, self.arrivals.shard(shard), shard, self.sizes)
            numbers = torch.cat([dense(part, self.dtype) for part in parts])
            layer.weight.data[first : first + len(numbers)].copy_(numbers)
        if hasattr(layer, "weight" + BLOB_SUFFIX):
            self.arrivals.forget(layer, "weight")
        super().process_weights_after_loading(layer)


def _position(shard: Shard) -> int:
    if isinstance(shard, tuple):
        return int(shard[0])
    return _QKV.index(shard) if isinstance(shard, str) else int(shard)


def rank_parts(layer: nn.Module, arrivals: Arrivals, sizes: list[int]) -> list[Part]:
    """This rank's parts of all shards of a layer, in order.

    Args:
        sizes: outputs of each shard on this rank.
    """
    shards: list[Shard] = sorted(arrivals.tensors, key=_position) if None not in arrivals.tensors else [None]
    if shards != [None]:
        expected: list[Shard] = list(_QKV[: len(sizes)] if isinstance(layer, QKVParallelLinear) else range(len(sizes)))
        covered = [one for shard in shards for one in (shard if isinstance(shard, tuple) else (shard,))]
        missing = [shard for shard in expected if shard not in covered]
        if missing:
            arrivals.shard(missing[0])  # says so
    elif len(arrivals.tensors) > 1:
        raise ModelMismatchError(f"{arrivals.name}: the checkpoint has the layer in one tensor, and its shards as well")
    return [part for shard in shards for part in shard_parts(layer, arrivals.shard(shard), shard, sizes)]


def shard_parts(layer: Any, tensor: ArrivedTensor, shard: Shard, sizes: list[int]) -> list[Part]:
    """This rank's parts of one tensor of the checkpoint: one, or one for each layer that it holds."""
    if isinstance(layer, RowParallelLinear):
        return [tensor.inputs(layer.tp_rank, layer.tp_size)]
    if layer.tp_size == 1:
        return [tensor.outputs(0, tensor.header.rows)]
    if shard is None:
        own = range(len(sizes))
    elif isinstance(shard, tuple):
        own = shard  # type: ignore[assignment]
    else:
        own = range(_position(shard), _position(shard) + 1)
    parts, first = [], 0
    for number in own:
        size, ranks, rank = sizes[number], layer.tp_size, layer.tp_rank
        if isinstance(layer, QKVParallelLinear) and number > 0:  # few heads: some ranks have the same
            ranks, rank = ranks // layer.num_kv_head_replicas, rank // layer.num_kv_head_replicas
        parts.append(tensor.outputs(first + rank * size, first + (rank + 1) * size))
        first += ranks * size
    if first != tensor.header.rows:
        raise ModelMismatchError(f"{tensor.name}: {tensor.header.rows} outputs in the checkpoint, {first} on all ranks")
    return parts
