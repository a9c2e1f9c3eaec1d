"""Experts of vLLM with coded weights: on a GPU the products of all chosen experts are one launch."""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.activation import MoEActivation, apply_moe_activation
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

from kvpack.errors import ModelMismatchError, NotSupportedError
from kvpack.format.container import BLOB_SUFFIX
from kvpack.integrations.vllm.arriving import Arrivals, Part, dense, stacked
from kvpack.integrations.vllm.coded_experts import ExpertMatrices, StackedExperts, rank_stacks

# Of a checkpoint's matrices of an expert, as vLLM names them.
_GATE, _DOWN, _UP = "w1", "w2", "w3"
_ACTIVATIONS = (MoEActivation.SILU, MoEActivation.GELU, MoEActivation.GELU_TANH)


_STEMS = ("w13_weight", "w2_weight")


def _expected(layer: Any, name: str, dtype: torch.dtype, *, is_stacked: bool) -> Arrivals:
    """What will come of a rank's experts: of (expert, matrix), or of a matrix of all of them."""
    arrivals = Arrivals(name, dtype)

    def keep(
        suffix: str,
        loaded_weight: torch.Tensor,
        weight_name: str = "",
        shard_id: str = "",
        expert_id: int = -1,
        return_success: bool = False,
    ) -> bool | None:
        if is_stacked:
            if shard_id != _UP:  # vLLM brings the same tensor for the gate, too
                arrivals.keep(suffix, loaded_weight, shard_id)
            return True if return_success else None
        own = layer._map_global_expert_id_to_local_expert_id(expert_id)
        if own >= 0:
            arrivals.keep(suffix, loaded_weight, (own, shard_id))
        return own >= 0 if return_success else None

    for stem in _STEMS:
        arrivals.expect(layer, stem, keep)
    return arrivals


def _forget(layer: Any, arrivals: Arrivals) -> None:
    for stem in _STEMS:
        arrivals.forget(layer, stem)


def _rank_parts(arrivals: Arrivals, expert: int, moe: Any) -> tuple[Part, Part, Part]:
    """A rank's parts of an expert's gate, up and down."""
    halves = []
    for shard in (_GATE, _UP):
        tensor = arrivals.shard((expert, shard))
        size = tensor.header.rows // moe.tp_size
        halves.append(tensor.outputs(moe.tp_rank * size, (moe.tp_rank + 1) * size))
    return halves[0], halves[1], arrivals.shard((expert, _DOWN)).inputs(moe.tp_rank, moe.tp_size)


def _rank_stacks(arrivals: Arrivals, layer: Any, intermediate: int, hidden: int) -> tuple[list[Part], list[Part]]:
    """A rank's parts of experts that are one tensor: gate and up, and down.

    Args:
        intermediate, hidden: of an expert on this rank.
    """
    moe = layer.moe_config
    gate_up, down = arrivals.shard(_GATE), arrivals.shard(_DOWN)
    whole = intermediate * moe.tp_size
    gate_up.check_shape(2 * whole, hidden, layer.global_num_experts)
    down.check_shape(hidden, whole, layer.global_num_experts)
    local = {layer._map_global_expert_id_to_local_expert_id(i): i for i in range(layer.global_num_experts)}
    own = [local[number] for number in sorted(local.keys() - {-1})]
    return rank_stacks(gate_up, down, own, moe.tp_rank, moe.tp_size)


class KVPackExpertsMethod(FusedMoEMethodBase):  # type: ignore[misc]
    """Experts whose matrices stay coded.

    Args:
        moe: vLLM's; prefix: the layer's name, for messages.
        is_stacked: whether the checkpoint has a tensor of all experts, instead of one for each.

    Raises:
        NotSupportedError: experts with biases, limits or another activation function.
    """

    def __init__(self, moe: Any, prefix: str, *, is_stacked: bool) -> None:
        super().__init__(moe)
        self.prefix, self.is_stacked = prefix, is_stacked
        if moe.has_bias or moe.swiglu_limit is not None or moe.activation not in _ACTIVATIONS:
            raise NotSupportedError(
                f"{prefix}: experts with biases, limits or the activation {moe.activation.value} cannot be coded in "
                "vLLM; kvpack decompress gives the plain model back"
            )

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **_attributes: Any,
    ) -> None:
        self.experts, self.dtype = num_experts, params_dtype
        self.hidden, self.intermediate = hidden_size, intermediate_size_per_partition
        self.arrivals = _expected(layer, self.prefix, params_dtype, is_stacked=self.is_stacked)

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        return None

    def process_weights_after_loading(self, layer: Any) -> None:
        if "coded_up" in layer._modules:
            return
        device, moe = layer.w13_weight_kvpack.device, layer.moe_config
        if self.is_stacked:
            up, down = _rank_stacks(self.arrivals, layer, self.intermediate, self.hidden)
            layer.coded_up, layer.coded_down = StackedExperts(up, device), StackedExperts(down, device)
        else:
            parts = [_rank_parts(self.arrivals, expert, moe) for expert in range(self.experts)]
            layer.coded_up = ExpertMatrices([stacked([gate, up]) for gate, up, _ in parts], device)
            layer.coded_down = ExpertMatrices([[down] for _, _, down in parts], device)
            self._check(layer)
        _forget(layer, self.arrivals)
        layer.coded_up.warm_up(self.dtype, self.hidden, layer.top_k)
        layer.coded_down.warm_up(self.dtype, self.intermediate, layer.top_k)

    def _check(self, layer: Any) -> None:
        for matrices, rows, columns in (
            (layer.coded_up, 2 * self.intermediate, self.hidden),
            (layer.coded_down, self.hidden, self.intermediate),
        ):
            for number, one in enumerate(matrices.experts):
                if (one.rows, one.columns) != (rows, columns):
                    raise ModelMismatchError(
                        f"{self.prefix}, expert {number}: {one.rows} × {one.columns} in the checkpoint, {rows} × "
                        f"{columns} on this rank of the model"
                    )

    def apply(
        self,
        layer: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any = None,
        shared_experts_input: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x [tokens, hidden] → the weighted sum of the chosen experts' results, of those that this rank has."""
        ids = topk_ids.to(torch.int64)
        if layer.expert_map is not None:
            ids = layer.expert_map.to(torch.int64)[ids]
        weights = topk_weights.to(torch.float32)
        if layer.apply_router_weight_on_input:
            x, weights = x * topk_weights.to(x.dtype), torch.ones_like(weights)
        up, down = layer.coded_up, layer.coded_down
        both = torch.ops.kvpack.experts_of(x, ids, up.handle, up.rows)
        hidden = x.new_empty((*ids.shape, self.intermediate)).flatten(0, 1)
        apply_moe_activation(layer.activation, hidden, both.flatten(0, 1))
        out = torch.ops.kvpack.experts_of(hidden.reshape(*ids.shape, -1), ids, down.handle, down.rows)
        return (out.to(torch.float32) * weights.unsqueeze(-1)).sum(1).to(x.dtype)


class DecodingExpertsMethod(UnquantizedFusedMoEMethod):  # type: ignore[misc]
    """vLLM's own dense experts, whose weights are decoded as they are loaded."""

    def __init__(self, moe: Any, prefix: str, *, is_stacked: bool) -> None:
        super().__init__(moe)
        self.prefix, self.is_stacked = prefix, is_stacked

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **attributes: Any,
    ) -> None:
        super().create_weights(
            layer, num_experts, hidden_size, intermediate_size_per_partition, params_dtype, **attributes
        )
        self.experts, self.dtype = num_experts, params_dtype
        self.hidden, self.intermediate = hidden_size, intermediate_size_per_partition
        self.arrivals = _expected(layer, self.prefix, params_dtype, is_stacked=self.is_stacked)

    def process_weights_after_loading(self, layer: Any) -> None:
        if hasattr(layer, "w13_weight" + BLOB_SUFFIX):
            decode = self._decode_stacks if self.is_stacked else self._decode_each
            decode(layer)
            _forget(layer, self.arrivals)
        super().process_weights_after_loading(layer)

    def _decode_stacks(self, layer: Any) -> None:
        gate_up, down = _rank_stacks(self.arrivals, layer, self.intermediate, self.hidden)
        for expert in range(self.experts):
            for parts, weights in ((gate_up, layer.w13_weight), (down, layer.w2_weight)):
                numbers = torch.cat([dense(part.matrix(expert), self.dtype) for part in parts])
                weights.data[expert, : len(numbers), : numbers.shape[1]] = numbers

    def _decode_each(self, layer: Any) -> None:
        for expert in range(self.experts):
            gate, up, down = (dense(part, self.dtype) for part in _rank_parts(self.arrivals, expert, layer.moe_config))
            for matrix in (gate, up, down.T):
                if matrix.shape != (self.intermediate, self.hidden):
                    raise ModelMismatchError(
                        f"{self.prefix}, expert {expert}: a matrix of {tuple(matrix.shape)} in the checkpoint, of "
                        f"{(self.intermediate, self.hidden)} on this rank of the model"
                    )
            layer.w13_weight.data[expert, : len(gate), : gate.shape[1]] = gate
            layer.w13_weight.data[expert, len(gate) : len(gate) + len(up), : up.shape[1]] = up
            layer.w2_weight.data[expert, : len(down), : down.shape[1]] = down
