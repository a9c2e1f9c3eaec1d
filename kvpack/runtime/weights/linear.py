"""``RansLinear``: a linear layer whose weights stay coded."""

from __future__ import annotations

from typing import Self

import torch

from kvpack.errors import ModelMismatchError
from kvpack.runtime.weights.coded_matrix import CodedMatrix
from kvpack.runtime.weights.device_blob import DeviceBlob


class RansLinear(CodedMatrix):
    """``y = x · Wᵀ + bias`` with entropy-coded W, decoded inside the product (on the CPU: before it).

    A drop-in for ``nn.Linear`` in inference: any leading dimensions, fp16, bf16 or fp32 activations, output in the
    activations' dtype. ``to``, ``half`` and so on move everything, but convert the bias alone: coded bytes are no
    numbers, and scales are fp32 by definition (§8). The weights cannot be trained.

    ``torch.compile`` specializes on the length of each blob. Compile the whole model; to compile layer by layer, raise
    ``torch._dynamo.config.recompile_limit`` to the number of layers.

    Args:
        blob: the coded weight; a matrix.
        bias: [out_features] on the blob's device, or None.
        tensor_name: of the weight in the file that it comes from; kept for streaming.

    Attributes:
        in_features, out_features: as of ``nn.Linear``, also for weights that are stored transposed.
        weight_kvpack: u8 [blob bytes], a buffer.
        weight_kvpack_scale: f32 [1] or [out_features], a buffer; None for lossless weights.
        weight_kvpack_column_scale, weight_kvpack_row_offset: f16 [in_features] and f32 [out_features], buffers; None
            if the weight has none.
        bias: [out_features], a buffer, or None.
        weight_dtype: dtype of the original weight; weight_shape: its shape.

    Raises:
        ModelMismatchError: the blob holds something other than one matrix, or the bias does not fit it.
    """

    bias: torch.Tensor | None

    def __init__(self, blob: DeviceBlob, bias: torch.Tensor | None = None, *, tensor_name: str | None = None) -> None:
        super().__init__(blob, tensor_name=tensor_name)
        if bias is not None and tuple(bias.shape) != (self.out_features,):
            raise ModelMismatchError(f"the bias is {tuple(bias.shape)}, the weight has {self.out_features} outputs")
        self.register_buffer("bias", None if bias is None else bias.detach())

    @classmethod
    def empty(
        cls,
        in_features: int,
        out_features: int,
        blob_bytes: int,
        num_scales: int,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device | str = "meta",
        *,
        tensor_name: str | None = None,
        transposed: bool = False,
        column_scales: bool = False,
        row_offsets: bool = False,
    ) -> Self:
        """A layer of known sizes without weights, to be filled by ``load_state_dict``.

        Args:
            blob_bytes: length of the blob (``blob_bytes`` in a model's config.json has it; §9.4). A state dict may
                bring a blob of another length: it depends on the weights' values.
            num_scales: 0 for lossless weights, else 1 or ``out_features``.
            dtype: of the original weight, and of the bias.
            transposed: the original weight is inputs × outputs.
            column_scales, row_offsets: whether the weight has such.
        """
        layer = cls._without_weights(
            in_features,
            out_features,
            blob_bytes,
            num_scales,
            dtype,
            device,
            tensor_name=tensor_name,
            transposed=transposed,
            column_scales=column_scales,
            row_offsets=row_offsets,
        )
        layer.register_buffer("bias", torch.zeros(out_features, dtype=dtype, device=device) if bias else None)
        return layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in_features] → [..., out_features], both of x's dtype."""
        if x.shape[-1] != self.in_features:
            raise ValueError(f"x is {tuple(x.shape)}, the layer has {self.in_features} inputs")
        blob = self._current()
        if blob is None:
            blob = self.prepare()
        return blob.linear(x, self.bias)

    @property
    def memory_bytes(self) -> int:
        """Bytes of the device's memory that the layer takes, tables and scales and the bias included."""
        bias = 0 if self.bias is None or self.bias.is_meta else self.bias.nbytes
        return super().memory_bytes + bias

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{sizes}, {super().extra_repr()}"
