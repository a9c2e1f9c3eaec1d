"""Linear layers of vLLM with coded weights: merged ones as one product, a rank's part alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    QKVParallelLinear,
    ReplicatedLinear,
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
        self.dtype, self.sizes = params_dtype, list(output_partition_sizes)
        self.arrivals = Arrivals(self.prefix, params_dtype)
        self.arrivals.expect(layer, "weight", self.arrivals.keep)

    def process_weights_after_loading(self, layer: Any) -> None:
        if "coded" in layer._modules:
            return
        parts = stacked(rank_parts(layer, self.arrivals, self.sizes))
        layer.coded = CodedLayer(parts, layer.weight_kvpack.device)
        self.arrivals.forget(layer, "weight")
        layer.coded.warm_up(self.dtype)

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        coded: Any = layer.coded
        out: torch.Tensor = torch.ops.kvpack.linear_of(x, coded.handle, coded.rows, bias)
        return out


class DecodingLinearMethod(UnquantizedLinearMethod):  # type: ignore[misc]
    """vLLM's own dense layer, whose weights are decoded as they are loaded.

    For layers of which the checkpoint has some shards coded and others plain, and for all if that is asked for.

    Args:
        prefix: the layer's name, for messages; coded: which of the checkpoint's tensors of it are coded.
    """

    def __init__(self, prefix: str, coded: Sequence[bool]) -> None:
        super().__init__()
        self.prefix, self.coded_tensors = prefix, coded

    def create_weights(
        self,
        layer: Any,
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
        layer.weight.data.fill_(math.nan)  # what nothing is loaded into is found afterwards
        self.arrivals = Arrivals(self.prefix, params_dtype)
        self.arrivals.expect(layer, "weight", self.arrivals.keep)

    def process_weights_after_loading(self, layer: Any) -> None:
        if not hasattr(layer, "weight" + BLOB_SUFFIX):
            return
        names: Sequence[Shard] = _QKV if isinstance(layer, QKVParallelLinear) else range(len(self.coded_tensors))
        shards = list(self.arrivals.tensors)
        if None not in shards and len(self.coded_tensors) > 1:
            coded = [name for name, is_coded in zip(names, self.coded_tensors, strict=False) if is_coded]
            shards += [name for name in coded if name not in shards]
        for shard in shards:
            first = 0 if shard is None else sum(self.sizes[: _position(shard)])
            parts = shard_parts(layer, self.arrivals.shard(shard), shard, self.sizes)
            numbers = torch.cat([dense(part, self.dtype) for part in parts])
            layer.weight.data[first : first + len(numbers)].copy_(numbers)
        if layer.weight.isnan().any():
            raise ModelMismatchError(f"{self.prefix}: no weights came for a part of the layer, or they are NaN")
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
    """This rank's parts of one tensor of the checkpoint: one, or one for each layer that it holds.

    Raises:
        ModelMismatchError: it is of another shape than the layer.
    """
    header = tensor.header
    if isinstance(layer, RowParallelLinear):
        tensor.check_shape(sum(sizes), layer.input_size)
        return [tensor.inputs(layer.tp_rank, layer.tp_size)]
    if shard is None:
        own: Sequence[int] = range(len(sizes))
    else:
        own = shard if isinstance(shard, tuple) else (_position(shard),)
    # vLLM says the number of ranks to layers, too, that each of them has whole.
    is_whole = layer.tp_size == 1 or isinstance(layer, ReplicatedLinear)
    parts, first = [], 0
    for number in own:
        size, ranks, rank = sizes[number], layer.tp_size, layer.tp_rank
        if is_whole:
            ranks, rank = 1, 0
        elif isinstance(layer, QKVParallelLinear) and number > 0:  # few heads: some ranks have the same
            ranks, rank = ranks // layer.num_kv_head_replicas, rank // layer.num_kv_head_replicas
        parts.append((first + rank * size, first + (rank + 1) * size))
        first += ranks * size
    tensor.check_shape(first, layer.input_size)
    return [tensor.outputs(0, header.rows)] if is_whole else [tensor.outputs(*part) for part in parts]
