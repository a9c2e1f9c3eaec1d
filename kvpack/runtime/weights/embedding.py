"""``RansEmbedding``: an embedding whose rows stay coded until they are looked up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch

from kvpack.errors import ModelMismatchError
from kvpack.format.layout import ElementKind
from kvpack.runtime.weights.coded_matrix import CodedMatrix, CodedWeight
from kvpack.runtime.weights.device_blob import DeviceBlob


class RansEmbedding(CodedMatrix):
    """Rows of an entropy-coded matrix, each decoded when it is asked for: a drop-in for ``nn.Embedding`` in inference.

    An output layer that is tied to it is a :class:`kvpack.RansLinear` of the same blob. The number of tokens cannot be
    changed: decode the model for that (``dequantize()``, or ``KVPackConfig(dequantize=True)``).

    Args:
        blob: the coded weight; a quantized matrix, a row for each token.
        dtype: of what is looked up; by default the original weight's. ``half``, ``to(dtype)`` and so on change it.
        padding_idx: as of ``nn.Embedding``; it says nothing in inference.
        tensor_name: of the weight in the file that it comes from; kept for streaming.

    Attributes:
        num_embeddings, embedding_dim, padding_idx: as of ``nn.Embedding``.
        dtype: of what is looked up.

    Raises:
        ModelMismatchError: the blob holds something other than one quantized matrix of tokens × features.
    """

    def __init__(
        self,
        blob: DeviceBlob,
        dtype: torch.dtype | None = None,
        padding_idx: int | None = None,
        *,
        tensor_name: str | None = None,
    ) -> None:
        if blob.header.layout.element_kind != ElementKind.SIGNED or not len(blob.scales) or blob.header.transposed:
            raise ModelMismatchError("an embedding needs a quantized matrix of tokens × features, not transposed")
        super().__init__(blob, tensor_name=tensor_name)
        self.dtype, self.padding_idx = dtype or blob.dtype, padding_idx

    @classmethod
    def empty(
        cls,
        num_embeddings: int,
        embedding_dim: int,
        blob_bytes: int,
        num_scales: int,
        dtype: torch.dtype,
        device: torch.device | str = "meta",
        *,
        weight_dtype: torch.dtype | None = None,
        padding_idx: int | None = None,
        tensor_name: str | None = None,
        column_scales: bool = False,
        row_offsets: bool = False,
    ) -> Self:
        """A layer of known sizes without weights, to be filled by ``load_state_dict``.

        Args:
            blob_bytes, num_scales, column_scales, row_offsets: as of :meth:`kvpack.RansLinear.empty`.
            dtype: of what is looked up; weight_dtype: of the original weight, by default the same.
        """
        layer = cls._without_weights(
            embedding_dim,
            num_embeddings,
            blob_bytes,
            num_scales,
            weight_dtype or dtype,
            device,
            tensor_name=tensor_name,
            transposed=False,
            column_scales=column_scales,
            row_offsets=row_offsets,
        )
        layer.dtype, layer.padding_idx = dtype, padding_idx
        return layer

    @property
    def num_embeddings(self) -> int:
        return self.out_features

    @property
    def embedding_dim(self) -> int:
        return self.in_features

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [...], i64 or i32 → their rows [..., embedding_dim].

        Raises:
            InputError: on the CPU, an id that names no row. On CUDA rows of such ids are zeros.
        """
        blob = self._current()
        if blob is None:
            blob = self.prepare()
        return blob.rows(ids, self.dtype)

    @property
    def weight(self) -> CodedWeight:
        """Its shape, its device, and the dtype of what is looked up: for code that asks ``embedding.weight.dtype``."""
        known = super().weight
        return CodedWeight(self.dtype, known.device, known.shape)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {super().extra_repr()}"

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.dtype = fn(torch.zeros(1, dtype=self.dtype, device="cpu")).dtype
        return self
