"""``RansEmbedding``: an embedding whose rows stay coded until they are looked up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import nn

from kvpack.errors import ModelMismatchError
from kvpack.format.layout import ElementKind
from kvpack.runtime.weights.coded_matrix import CodedMatrix, CodedWeight
from kvpack.runtime.weights.device_blob import DeviceBlob


@dataclass(frozen=True)
class PlainEmbedding:
    """What an embedding is when it is not coded: its class, and what that does with the rows.

    Attributes:
        padding_idx: as of ``nn.Embedding``.
        scale: what rows are multiplied with, as transformers' ``…ScaledWordEmbedding`` do; None: they are not.
        scale_is_tensor: the scale is rounded to the rows' dtype first.
    """

    kind: type[nn.Embedding] = nn.Embedding
    padding_idx: int | None = None
    scale: float | None = None
    scale_is_tensor: bool = False

    @classmethod
    def of(cls, module: nn.Module) -> PlainEmbedding | None:
        """None for a module that does something else with its rows, or may do so."""
        if not isinstance(module, nn.Embedding) or module.max_norm is not None:
            return None
        kind = type(module)
        if kind is nn.Embedding:
            return cls(kind, module.padding_idx)
        if not kind.__name__.endswith("ScaledWordEmbedding"):
            return None
        # Gemma's classes have the number beside a buffer of it, which may be on the meta device.
        scale = getattr(module, "scalar_embed_scale", None)
        is_tensor = scale is not None
        scale = scale if is_tensor else getattr(module, "embed_scale", None)
        if isinstance(scale, bool) or not isinstance(scale, int | float):
            return None
        return cls(kind, module.padding_idx, float(scale), is_tensor)

    def module(self, weight: nn.Parameter) -> nn.Embedding:
        """Such a module of plain numbers."""
        options: dict[str, Any] = {} if self.scale is None else {"embed_scale": self.scale}
        with torch.device("meta"):
            plain = self.kind(weight.shape[0], weight.shape[1], self.padding_idx, **options)
        plain.weight = weight
        if self.scale_is_tensor:
            plain._buffers["embed_scale"] = torch.tensor(self.scale, dtype=weight.dtype, device=weight.device)
        return plain

    def factor(self, dtype: torch.dtype) -> float | None:
        """What rows of ``dtype`` are multiplied with."""
        if self.scale is None or not self.scale_is_tensor:
            return self.scale
        return float(torch.tensor(self.scale, dtype=dtype, device="cpu"))


class RansEmbedding(CodedMatrix):
    """Rows of an entropy-coded matrix, each decoded when it is asked for: a drop-in for ``nn.Embedding`` in inference.

    An output layer that is tied to it is a :class:`kvpack.RansLinear` of the same blob. The number of tokens cannot be
    changed: decode the model for that (``dequantize()``, or ``KVPackConfig(dequantize=True)``).

    Args:
        blob: the coded weight; a quantized matrix, a row for each token.
        dtype: of what is looked up; by default the original weight's. ``half``, ``to(dtype)`` and so on change it.
        plain: what stood, or would stand, in its place.
        tensor_name: of the weight in the file that it comes from; kept for streaming.

    Attributes:
        num_embeddings, embedding_dim, padding_idx: as of ``nn.Embedding``.
        dtype: of what is looked up; plain: as given.

    Raises:
        ModelMismatchError: the blob holds something other than one quantized matrix of tokens × features.
    """

    def __init__(
        self,
        blob: DeviceBlob,
        dtype: torch.dtype | None = None,
        plain: PlainEmbedding = PlainEmbedding(),
        *,
        tensor_name: str | None = None,
    ) -> None:
        if blob.header.layout.element_kind != ElementKind.SIGNED or not len(blob.scales) or blob.header.transposed:
            raise ModelMismatchError("an embedding needs a quantized matrix of tokens × features, not transposed")
        super().__init__(blob, tensor_name=tensor_name)
        self.plain = plain
        self._set_dtype(dtype or blob.dtype)

    def _set_dtype(self, dtype: torch.dtype) -> None:
        self.dtype, self._factor = dtype, self.plain.factor(dtype)

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
        plain: PlainEmbedding = PlainEmbedding(),
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
        layer.plain = plain
        layer._set_dtype(dtype)
        return layer

    @property
    def padding_idx(self) -> int | None:
        return self.plain.padding_idx

    @property
    def num_embeddings(self) -> int:
        return self.out_features

    @property
    def embedding_dim(self) -> int:
        return self.in_features

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [...], i64 or i32 → their rows [..., embedding_dim], times the scale of ``plain`` if it has one.

        Raises:
            InputError: on the CPU, an id that names no row. On CUDA rows of such ids are zeros.
        """
        blob = self._current()
        if blob is None:
            blob = self.prepare()
        rows = blob.rows(ids, self.dtype)
        return rows if self._factor is None else rows * self._factor

    @property
    def weight(self) -> CodedWeight:
        """Its shape, its device, and the dtype of what is looked up: for code that asks ``embedding.weight.dtype``."""
        known = super().weight
        return CodedWeight(self.dtype, known.device, known.shape)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {super().extra_repr()}"

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self._set_dtype(fn(torch.zeros(1, dtype=self.dtype, device="cpu")).dtype)
        return self
