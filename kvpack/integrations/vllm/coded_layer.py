"""Coded weights of a layer of vLLM, and the products with them, as ``torch.compile`` sees them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from kvpack.integrations.vllm.arriving import Part
from kvpack.runtime.weights.device_blob import DeviceBlob
from kvpack.runtime.weights.handles import new_handle
from kvpack.runtime.weights.linear import RansLinear
from kvpack.runtime.weights.load import coded_on_device
from kvpack.runtime.weights.warmup import warmup


class CodedLayer(nn.Module):
    """Rows of coded tensors, one below the other: what a rank has of a layer.

    Args:
        parts: of the same columns.
        device: where they are multiplied.
        rows: of the products; those that no part has are 0.

    Attributes:
        handle: by which ``torch.ops.kvpack.linear_of`` and ``rows_of`` find it.
    """

    def __init__(self, parts: Sequence[Part], device: torch.device, rows: int | None = None) -> None:
        super().__init__()
        self.matrices = nn.ModuleList(RansLinear(coded_on_device(part.coded, device)) for part in parts)
        self.spans = [(part.first, part.rows) for part in parts]
        self.columns = parts[0].coded.header.cols
        self._own_rows = sum(part.rows for part in parts)
        self.rows = self._own_rows if rows is None else rows
        self.handle = new_handle(self)

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x [..., columns] · Wᵀ (+ bias [rows]), [..., rows] of x's dtype."""
        if len(self.matrices) == 1 and self.spans[0] == (0, self.rows) and self._blob(0).header.rows == self.rows:
            return self._blob(0).product(x, bias)
        products = [self._blob(i).product(x)[..., first : first + rows] for i, (first, rows) in enumerate(self.spans)]
        if self.rows > self._own_rows:
            products.append(x.new_zeros((*x.shape[:-1], self.rows - self._own_rows)))
        out = torch.cat(products, dim=-1)
        return out if bias is None else out + bias

    def look_up(self, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Rows of the first part, [..., columns]."""
        first, _ = self.spans[0]
        return self._blob(0).rows(ids + first if first else ids, dtype)

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """[rows, columns]"""
        numbers = [self._blob(i).dequantize(dtype)[first : first + rows] for i, (first, rows) in enumerate(self.spans)]
        return torch.cat(numbers)

    def _blob(self, index: int) -> DeviceBlob:
        matrix: Any = self.matrices[index]
        blob: DeviceBlob = matrix.prepare()
        return blob

    def blobs(self) -> list[DeviceBlob]:
        """All of its blobs, in order."""
        return [self._blob(index) for index in range(len(self.matrices))]

    def warm_up(self, dtype: torch.dtype) -> None:
        """Compile now what a CUDA graph's capture must not."""
        if self._blob(0).device.type == "cuda":
            warmup(self, dtypes=(dtype,))
