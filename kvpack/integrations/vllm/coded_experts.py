"""Coded matrices of a rank's experts, and the products with those that a router chose."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from kvpack.errors import NotSupportedError
from kvpack.integrations.vllm.arriving import Part
from kvpack.integrations.vllm.coded_layer import CodedLayer
from kvpack.runtime.weights.experts import GroupedMatrices
from kvpack.runtime.weights.grouped import has_many_rows
from kvpack.runtime.weights.warmup import TOKENS


class ExpertMatrices(nn.Module):
    """One matrix of each of a rank's experts.

    Args:
        experts: of each, its parts one below the other.
        device: where they are multiplied.

    Raises:
        NotSupportedError: on a GPU, matrices of which no grouped product takes all.
    """

    def __init__(self, experts: Sequence[Sequence[Part]], device: torch.device) -> None:
        super().__init__()
        self.experts = nn.ModuleList(CodedLayer(parts, device) for parts in experts)
        self.rows: int = self.experts[0].rows  # type: ignore[assignment]
        self.grouped: GroupedMatrices | None = None
        if device.type == "cuda":
            whole = all(part.is_whole for parts in experts for part in parts)
            self.grouped = GroupedMatrices.of([layer.blobs() for layer in self._layers()]) if whole else None
            if self.grouped is None:
                raise NotSupportedError(
                    "experts that are lossless, have column scales or row offsets, or whose part on this rank is no "
                    "multiple of 32 rows, have no grouped products: start vLLM with "
                    """--additional-config '{"kvpack": {"weights": "dense"}}'"""
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
            many = has_many_rows(len(self.experts), *ids.shape)
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
        chosen = torch.arange(top_k, device=device) % len(self.experts)
        for tokens in TOKENS:
            x = torch.zeros(tokens, columns, dtype=dtype, device=device)
            self.grouped.linear(x, chosen.expand(tokens, top_k).contiguous())
        for layer in self._layers()[:1]:
            layer.warm_up(dtype)
