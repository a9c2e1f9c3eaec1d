"""Coded matrices of a rank's experts, and the products with those that a router chose."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import islice

import torch
from torch import nn

from kvpack.errors import ModelMismatchError, NotSupportedError
from kvpack.integrations.vllm.arriving import ArrivedTensor, Part, stacked
from kvpack.integrations.vllm.coded_layer import CodedLayer
from kvpack.runtime.weights import products
from kvpack.runtime.weights.device_blob import DeviceBlob
from kvpack.runtime.weights.experts import GroupedMatrices
from kvpack.runtime.weights.grouped import has_many_rows
from kvpack.runtime.weights.handles import new_handle
from kvpack.runtime.weights.load import coded_on_device
from kvpack.runtime.weights.warmup import TOKENS

# No more are multiplied to warm up.
_MOST_TOKENS = 16384
_USE_DENSE = """start vLLM with --additional-config '{"kvpack": {"weights": "dense"}}'"""


class ExpertMatrices(nn.Module):
    """One matrix of each of a rank's experts.

    Args:
        experts: of each, its parts one below the other.
        device: where they are multiplied.

    Attributes:
        handle: by which ``torch.ops.kvpack.experts_of`` finds it.

    Raises:
        NotSupportedError: on a GPU, matrices of which no grouped product takes all.
    """

    def __init__(self, experts: Sequence[Sequence[Part]], device: torch.device) -> None:
        super().__init__()
        self.experts = nn.ModuleList(CodedLayer(parts, device) for parts in experts)
        self.rows: int = self.experts[0].rows  # type: ignore[assignment]
        self.handle = new_handle(self)
        self.grouped: GroupedMatrices | None = None
        if device.type == "cuda":
            whole = all(part.is_whole for parts in experts for part in parts)
            self.grouped = GroupedMatrices.of([layer.blobs() for layer in self._layers()]) if whole else None
            if self.grouped is None:
                raise NotSupportedError(
                    "experts that are lossless, have column scales or row offsets, or whose part on this rank is no "
                    f"multiple of 32 rows, have no grouped products: {_USE_DENSE}"
                )

    def _layers(self) -> list[CodedLayer]:
        return [layer for layer in self.experts if isinstance(layer, CodedLayer)]

    def product(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Rows of x with the matrices that ids name.

        Args:
            x: [tokens, columns] or [tokens, top_k, columns]; ids: i64 [tokens, top_k], −1 for none of this rank's.

        Returns:
            [tokens, top_k, rows] of x's dtype; zeros where an id is none of this rank's.
        """
        if self.grouped is not None:
            many = has_many_rows(len(self.experts), *ids.shape, weights=self.grouped.matrix_weights)
            if not many or torch.cuda.is_current_stream_capturing():
                return self.grouped.linear(x, ids)
        flat = ids.flatten()
        rows = x.reshape(-1, x.shape[-1])
        out = x.new_zeros((len(flat), self.rows))
        for number, layer in enumerate(self._layers()):
            pairs = torch.nonzero(flat == number)[:, 0]
            if len(pairs):
                out[pairs] = layer.product(rows[pairs // (len(flat) // len(rows))], None)
        return out.reshape(*ids.shape, self.rows)

    def warm_up(self, dtype: torch.dtype, columns: int, top_k: int) -> None:
        """Compile now what a CUDA graph's capture must not."""
        if self.grouped is None:
            return
        device = self.grouped.blobs[0][0].device
        x = torch.zeros(TOKENS[-1], columns, dtype=dtype, device=device)
        _run_each(self.grouped.linear, TOKENS, x, len(self.experts), top_k)
        for layer in self._layers()[:1]:
            layer.warm_up(dtype)


class StackedExperts(nn.Module):
    """One matrix of each of a rank's experts, where the checkpoint has all of them as one tensor: one blob still.

    Args:
        parts: of the same number of matrices, their rows one below the other.
        device: where they are multiplied.

    Attributes:
        handle: by which ``torch.ops.kvpack.experts_of`` finds it.

    Raises:
        NotSupportedError: column scales or row offsets; on a GPU, also lossless tensors.
    """

    def __init__(self, parts: Sequence[Part], device: torch.device) -> None:
        super().__init__()
        self.blobs = [coded_on_device(part.coded, device) for part in parts]
        self.spans = [(part.first, part.rows) for part in parts]
        self.count = self.blobs[0].header.matrices
        self.rows = sum(part.rows for part in parts)
        self.handle = new_handle(self)
        for blob in self.blobs:
            has_vectors = blob.column_scales is not None or blob.row_offsets is not None
            if has_vectors or (device.type == "cuda" and not products.can_multiply(blob.header.layout)):
                raise NotSupportedError(
                    "experts of one tensor that have column scales or row offsets, and on a GPU lossless ones, have no "
                    f"grouped products: {_USE_DENSE}"
                )

    def product(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """As that of :class:`ExpertMatrices`."""
        found = []
        for blob, (first, rows) in zip(self.blobs, self.spans, strict=True):
            of_blob = blob.grouped_linear(x, ids) if x.is_cuda else _product_on_the_cpu(blob, x, ids)
            found.append(of_blob if rows == blob.header.rows else of_blob[..., first : first + rows])
        return found[0] if len(found) == 1 else torch.cat(found, dim=-1)

    def warm_up(self, dtype: torch.dtype, columns: int, top_k: int) -> None:
        """Compile now what a CUDA graph's capture must not."""
        device = self.blobs[0].device
        if device.type != "cuda":
            return
        weights = self.blobs[0].header.matrix_elements
        numbers = range(TOKENS[-1], _MOST_TOKENS)
        many = [*TOKENS, *islice((n for n in numbers if has_many_rows(self.count, n, top_k, weights=weights)), 1)]
        x = torch.zeros(many[-1], columns, dtype=dtype, device=device)
        _run_each(self.product, many, x, self.count, top_k)


def _run_each(
    product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    tokens: Iterable[int],
    x: torch.Tensor,
    experts: int,
    top_k: int,
) -> None:
    """Each number of ``tokens``, of the first rows of x [tokens, columns], with as many experts as a token has."""
    chosen = torch.arange(top_k, device=x.device) % experts
    for count in tokens:
        product(x[:count], chosen.expand(count, top_k).contiguous())


def _product_on_the_cpu(blob: DeviceBlob, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """There ids have to name a matrix: with those that do."""
    flat, rows = ids.flatten(), x.reshape(-1, x.shape[-1])
    pairs = torch.nonzero(flat >= 0)[:, 0]
    out = x.new_zeros((len(flat), blob.header.rows))
    if len(pairs):
        out[pairs] = blob.grouped_linear(rows[pairs // (len(flat) // len(rows))], flat[pairs, None])[:, 0]
    return out.reshape(*ids.shape, -1)


def rank_stacks(
    gate_up: ArrivedTensor, down: ArrivedTensor, own: Sequence[int], rank: int, ranks: int
) -> tuple[list[Part], list[Part]]:
    """A rank's parts of experts that are one tensor in the checkpoint, all their matrices in each part.

    Args:
        gate_up: of matrices whose upper half is the gate; down: the ones behind the activation.
        own: numbers of the rank's experts, in order.
        rank, ranks: over how many of them each expert is spread.

    Returns:
        Gate and up, as one part where that can be; and down.

    Raises:
        ModelMismatchError: experts that do not follow each other at one distance.
        BlobError: what is read of them is damaged.
    """
    step = own[1] - own[0] if len(own) > 1 else 1
    chosen = range(own[0], own[-1] + 1, step)
    if list(chosen) != list(own):
        raise ModelMismatchError(f"{gate_up.name}: experts {list(own)} of a rank do not follow each other evenly")
    gate_up, down = gate_up.matrices(chosen), down.matrices(chosen)
    both, half = gate_up.header.rows, gate_up.header.rows // 2
    if ranks == 1:
        return [gate_up.outputs(0, both)], [down.inputs(0, 1)]
    size = half // ranks
    halves = [gate_up.outputs(first + rank * size, first + (rank + 1) * size) for first in (0, half)]
    return stacked(halves), [down.inputs(rank, ranks)]
