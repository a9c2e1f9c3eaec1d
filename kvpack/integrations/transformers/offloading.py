"""Coded layers of modules that a ``device_map`` puts on "cpu" or "disk": weights come for each forward pass.

accelerate's own hook moves a module's tensors one by one and keeps buffers where the module runs. A coded layer lends
itself a blob instead: of a layer on "cpu" one that lies in the host's memory, of a layer on "disk" one that is read
from the compressed file, which must stay.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, ModelHook, SequentialHook, add_hook_to_module, remove_hook_from_module
from accelerate.utils import send_to_device

from kvpack.encode.reader import Reader
from kvpack.runtime.weights.coded_matrix import PARTS, CodedMatrix, padded
from kvpack.runtime.weights.device_blob import DeviceBlob
from kvpack.runtime.weights.load import load_tensors


def offloading_hook(layer: CodedMatrix) -> AlignDevicesHook | None:
    """What accelerate has put on a layer of an offloaded module."""
    hook = getattr(layer, "_hf_hook", None)
    hooks = hook.hooks if isinstance(hook, SequentialHook) else (hook,)
    return next((one for one in hooks if isinstance(one, AlignDevicesHook) and one.offload), None)


class LentWeights(ModelHook):  # type: ignore[misc]
    """Gives a layer its coded weights for the time of a forward pass.

    Args:
        device: on which the layer runs.
        reader: of the file that the weights stay in; None: the layer has them, in the host's memory.
    """

    def __init__(self, layer: CodedMatrix, device: torch.device, reader: Reader | None) -> None:
        self.device = device
        self.reader = reader
        self.weights_map = _Stored(layer, self)

    def blob(self, layer: CodedMatrix) -> DeviceBlob:
        """The weights on the device."""
        if self.reader is not None:
            assert layer.tensor_name is not None
            blob = load_tensors(self.reader, [layer.tensor_name], self.device)[layer.tensor_name]
            assert isinstance(blob, DeviceBlob)
            return blob
        home = layer.prepare()
        if home.device == self.device:
            return home
        host = home.blob[: home.blob_bytes].numpy().data
        coded = padded(home.blob[: home.blob_bytes].to(self.device))
        return DeviceBlob.from_buffer(
            coded,
            home.scales,
            home.dtype,
            home.shape,
            host=host,
            column_scales=home.column_scales,
            row_offsets=home.row_offsets,
        )

    def pre_forward(self, module: CodedMatrix, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        self.home = None if self.reader is not None else module.prepare()
        module._lend(self.blob(module))
        return send_to_device(args, self.device), send_to_device(kwargs, self.device)

    def post_forward(self, module: CodedMatrix, output: Any) -> Any:
        module._lend(self.home)
        return output


class _Stored:
    """What save_pretrained asks for tensors that are on the meta device."""

    def __init__(self, layer: CodedMatrix, hook: LentWeights) -> None:
        self.layer, self.hook = layer, hook

    def __getitem__(self, key: str) -> torch.Tensor:
        blob = self.hook.blob(self.layer)
        stored = (blob.blob[: blob.blob_bytes], blob.scales, blob.column_scales, blob.row_offsets)
        part = dict(zip(PARTS, stored, strict=True))[key]
        assert part is not None  # the layer has a buffer for it
        return part.cpu()


def lend_weights(layer: CodedMatrix, hook: AlignDevicesHook, reader: Reader | None) -> None:
    """Put a :class:`LentWeights` in the place of accelerate's hook.

    Args:
        reader: of the file, for a layer on "disk"; None for one on "cpu", whose weights are in its buffers.
    """
    device = torch.device(hook.execution_device)
    bias = getattr(layer, "bias", None)
    if bias is not None:
        bias = hook.weights_map["bias"] if bias.is_meta else bias
        layer._buffers["bias"] = bias.to(device)
    hook.original_devices = {}  # nothing is to be moved back
    remove_hook_from_module(layer)
    add_hook_to_module(layer, LentWeights(layer, device, reader))
