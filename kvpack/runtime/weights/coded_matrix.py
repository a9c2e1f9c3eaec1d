"""``CodedMatrix``: what layers whose weights stay coded have in common, whatever they do with these.

Its buffers are those of the container (docs/FORMAT.md §9.2): ``weight_kvpack`` and, for quantized weights,
``weight_kvpack_scale``, so that a state dict written with safetensors has a compressed model's names. Whatever else the
kernels need is derived from them: a :class:`~kvpack.runtime.weights.device_blob.DeviceBlob`, made again whenever the
buffers are replaced or moved, and never saved.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn, Self

import torch
from torch import nn

from kvpack.errors import FormatError, ModelMismatchError, StreamingError
from kvpack.format.header import HEADER_BYTES, BlobHeader
from kvpack.runtime.weights.device_blob import SLACK_BYTES, DeviceBlob

BLOB = "weight_kvpack"
SCALE = "weight_kvpack_scale"
COLUMN_SCALE = "weight_kvpack_column_scale"
ROW_OFFSET = "weight_kvpack_row_offset"
# What stands beside the blob, and the types of it.
NUMBERS = {SCALE: torch.float32, COLUMN_SCALE: torch.float16, ROW_OFFSET: torch.float32}
PARTS = (BLOB, *NUMBERS)


def padded_buffer(blob_bytes: int, device: torch.device) -> torch.Tensor:
    """u8 [blob_bytes + slack] of unspecified bytes with slack of zeros: what a blob lies in."""
    buffer = torch.empty(blob_bytes + SLACK_BYTES, dtype=torch.uint8, device=device)
    if not buffer.is_meta:
        buffer[blob_bytes:].zero_()
    return buffer


def padded(coded: torch.Tensor) -> torch.Tensor:
    """The same bytes with slack behind them: ``coded`` itself where it lies in front of slack already, else a copy."""
    storage = coded.untyped_storage()
    if coded.is_contiguous() and coded.storage_offset() == 0 and storage.nbytes() == len(coded) + SLACK_BYTES:
        whole = torch.empty(0, dtype=torch.uint8, device=coded.device).set_(storage)
        whole[len(coded) :].zero_()
        return whole
    buffer = padded_buffer(len(coded), coded.device)
    buffer[: len(coded)].copy_(coded)
    return buffer


def _convert(apply: Callable[[torch.Tensor], torch.Tensor], tensor: torch.Tensor) -> torch.Tensor:
    """What ``Module.to``, ``half`` and the like do to a tensor, but for a change of its type."""
    probe = apply(torch.zeros(1, dtype=tensor.dtype, device=tensor.device))
    return apply(tensor) if probe.dtype == tensor.dtype else tensor.to(probe.device)


class CodedWeight:
    """``weight`` of a coded layer: what may be asked of it without decoding it. It is no ``torch.Tensor``.

    Attributes:
        dtype: of the original weight.
        device: where the coded weight is now.
        shape: of the original weight.

    Raises:
        TypeError: it is used as numbers, by an operator or a function of torch; the message names ``dequantize()``.
        AttributeError: so is another attribute of a tensor.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device, shape: tuple[int, ...]) -> None:
        self.dtype = dtype
        self.device = device
        self.shape = torch.Size(shape)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def dim(self) -> int:
        return len(self.shape)

    def numel(self) -> int:
        return self.shape.numel()

    def size(self, dim: int | None = None) -> torch.Size | int:
        """The shape, or one of its numbers."""
        return self.shape if dim is None else self.shape[dim]

    def __repr__(self) -> str:
        return f"CodedWeight({list(self.shape)}, {str(self.dtype).removeprefix('torch.')}, device='{self.device}')"

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"no {name!r} in {_STAYS_CODED}", name=name, obj=self)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        raise TypeError(f"{getattr(function, '__name__', function)}: {_STAYS_CODED}")


_STAYS_CODED = (
    "a weight that stays coded has dtype, device and shape alone; RansLinear.dequantize() gives its numbers, of an "
    "embedding RansEmbedding.dequantize()"
)


def _refusing(name: str) -> Callable[..., NoReturn]:
    def refuse(_self: CodedWeight, *_others: object, **_options: object) -> NoReturn:
        raise TypeError(f"{name}: {_STAYS_CODED}")

    return refuse


# Python looks operators up in the class alone. Objects that know no comparison compare by identity: a wrong answer.
for _operator in (
    *(f"__{side}{name}__" for name in ("add", "sub", "mul", "truediv", "matmul", "pow") for side in ("", "r", "i")),
    *("__neg__", "__abs__", "__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__"),
    *("__getitem__", "__setitem__", "__len__", "__iter__", "__bool__", "__int__", "__float__", "__array__"),
):
    setattr(CodedWeight, _operator, _refusing(_operator))


class CodedMatrix(nn.Module):
    """A layer with one entropy-coded matrix, outputs × inputs; what it does with it is a subclass's.

    ``to``, ``half`` and so on move everything, and convert no coded weight: coded bytes are no numbers, and scales are
    fp32 by definition (§8). The weights cannot be trained.

    Args:
        blob: the coded weight; a matrix.
        tensor_name: of the weight in the file that it comes from; kept for streaming.

    Attributes:
        in_features, out_features: columns and rows of the blob, also for weights that are stored transposed.
        weight_kvpack: u8 [blob bytes], a buffer.
        weight_kvpack_scale: f32 [1] or [out_features], a buffer; None for lossless weights.
        weight_kvpack_column_scale, weight_kvpack_row_offset: f16 [in_features] and f32 [out_features], buffers; None
            if the weight has none.
        weight_dtype: dtype of the original weight; weight_shape: its shape.

    Raises:
        ModelMismatchError: the blob holds something other than one matrix.
    """

    weight_kvpack: torch.Tensor
    weight_kvpack_scale: torch.Tensor | None
    weight_kvpack_column_scale: torch.Tensor | None
    weight_kvpack_row_offset: torch.Tensor | None

    def __init__(self, blob: DeviceBlob, *, tensor_name: str | None = None) -> None:
        super().__init__()
        header = blob.header
        if header.matrices != 1 or len(blob.shape) != 2:
            raise ModelMismatchError(f"a layer needs one matrix, the blob holds {tuple(blob.shape)}")
        self._set_up(header.cols, header.rows, blob.dtype, blob.shape, tensor_name)
        for part in PARTS:
            self.register_buffer(part, None)
        self._take(blob)

    def _set_up(
        self, in_features: int, out_features: int, dtype: torch.dtype, shape: tuple[int, ...], tensor_name: str | None
    ) -> None:
        self.in_features = in_features
        self.out_features = out_features
        self.weight_dtype = dtype
        self.weight_shape = tuple(shape)
        self.tensor_name = tensor_name
        # While a LayerStream owns the weights, they have no home on the device, and `_blob` is what it lends.
        self.streamed = False
        self._blob: DeviceBlob | None = None
        self._blob_of: torch.Tensor | None = None
        self._numbers_of: tuple[torch.Tensor | None, ...] = ()

    @classmethod
    def _without_weights(
        cls,
        in_features: int,
        out_features: int,
        blob_bytes: int,
        num_scales: int,
        dtype: torch.dtype,
        device: torch.device | str,
        *,
        tensor_name: str | None,
        transposed: bool,
        column_scales: bool,
        row_offsets: bool,
    ) -> Self:
        """A layer of known sizes without weights; see :meth:`.linear.RansLinear.empty`."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        shape = (in_features, out_features) if transposed else (out_features, in_features)
        layer._set_up(in_features, out_features, dtype, shape, tensor_name)
        device = torch.device(device)
        whole = padded_buffer(blob_bytes, device)
        layer.register_buffer(BLOB, whole[:blob_bytes] if whole.is_meta else whole.zero_()[:blob_bytes])
        counts = (num_scales, in_features if column_scales else 0, out_features if row_offsets else 0)
        for (part, numbers), count in zip(NUMBERS.items(), counts, strict=True):
            layer.register_buffer(part, torch.zeros(count, dtype=numbers, device=device) if count else None)
        return layer

    def _take(self, blob: DeviceBlob) -> None:
        """Make ``blob`` the one that is used, and the buffers views of its tensors."""
        self._buffers[BLOB] = blob.blob[: blob.blob_bytes]
        self._take_numbers(blob)
        self._lend(blob)

    def _take_numbers(self, blob: DeviceBlob) -> None:
        self._buffers[SCALE] = blob.scales if blob.scales.numel() else None
        self._buffers[COLUMN_SCALE], self._buffers[ROW_OFFSET] = blob.column_scales, blob.row_offsets

    def _numbers(self) -> tuple[torch.Tensor | None, ...]:
        """Scales, column scales and row offsets."""
        return self.weight_kvpack_scale, self.weight_kvpack_column_scale, self.weight_kvpack_row_offset

    def _lend(self, blob: DeviceBlob | None) -> None:
        """Use ``blob`` as what the buffers stand for, or forget what was derived from them."""
        self._blob = blob
        if blob is not None:
            self.weight_shape = blob.shape
        self._blob_of = self.weight_kvpack if blob is not None else None
        self._numbers_of = self._numbers() if blob is not None else ()

    def _current(self) -> DeviceBlob | None:
        """The derived blob, None if the buffers are not those from which it was derived."""
        if self.weight_kvpack is not self._blob_of or not self._numbers_of:
            return None
        scales, columns, offsets = self._numbers_of
        if self.weight_kvpack_scale is not scales:
            return None
        if self.weight_kvpack_column_scale is not columns or self.weight_kvpack_row_offset is not offsets:
            return None
        return self._blob

    def prepare(self) -> DeviceBlob:
        """The coded weight, ready for use on the device where the buffers are.

        Happens by itself. To be called by whoever replaces the buffers by hand and then compiles the model or captures
        a CUDA graph: it copies to and from the device, and on CUDA decodes every lane once (§5.2).

        Raises:
            FormatError: the buffers hold no intact blob, LaneStateError among them.
            ModelMismatchError: a blob of another shape.
            StreamingError: the weights are streamed, and it is not this layer's turn; or they were left in the file.
            RuntimeError: the layer is on the meta device.
        """
        blob = self._current()
        if blob is not None:
            return blob
        try:
            return self._derive(None)
        except FormatError as error:
            error.args = (f"{self.tensor_name or f'a {type(self).__name__}'}: {error}",)
            raise

    def _derive(self, host: memoryview | None, *, check: bool = False) -> DeviceBlob:
        """Make the blob that the buffers stand for, and use it.

        Its lanes are checked first on CUDA, where products do not raise, and with ``check`` on the CPU too.
        """
        coded = self.weight_kvpack
        if self.streamed:
            raise StreamingError(
                f"the weights of {self.tensor_name or 'this layer'} are streamed, and on the device only while the "
                "module runs that was given to the stream"
            )
        if coded.is_meta and self.tensor_name is not None:
            raise StreamingError(
                f"weights of {self.tensor_name} are on the meta device: left in the file by replace_linears(defer=…) "
                "or by a stream from disk that has ended. Run it inside kvpack.runtime.weights.offload.stream_modules, "
                "or load them (load_state_dict, assign=True)"
            )
        if any(part is not None and part.is_meta for part in (coded, *self._numbers())):
            raise RuntimeError(
                f"this {type(self).__name__} is on the meta device: load its weights (load_state_dict, assign=True)"
            )
        if coded.dtype != torch.uint8 or coded.ndim != 1:
            raise ModelMismatchError(f"{BLOB} is {coded.dtype} {list(coded.shape)}, and must be one row of bytes")
        for (part, dtype), numbers in zip(NUMBERS.items(), self._numbers(), strict=True):
            if numbers is not None and (numbers.dtype != dtype or numbers.ndim != 1):
                wanted = str(dtype).removeprefix("torch.")
                raise ModelMismatchError(
                    f"{part} is {numbers.dtype} {list(numbers.shape)}, and must be one row of {wanted}"
                )
        scales, columns, offsets = (None if part is None else part.detach() for part in self._numbers())
        if scales is None:
            scales = torch.empty(0, dtype=torch.float32, device=coded.device)
        if host is None:
            header = BlobHeader.parse(coded.detach()[:HEADER_BYTES].cpu().numpy().data)
            host = coded.detach().numpy().data if coded.device.type == "cpu" else None
        else:
            header = BlobHeader.parse(host)
        if (header.matrices, header.rows, header.cols) != (1, self.out_features, self.in_features):
            raise ModelMismatchError(
                f"the blob holds {header.matrices} × {header.rows} × {header.cols} weights, the layer has "
                f"{self.out_features} outputs and {self.in_features} inputs"
            )
        shape = (header.cols, header.rows) if header.transposed else (header.rows, header.cols)
        blob = DeviceBlob.from_buffer(
            padded(coded.detach()),
            scales,
            self.weight_dtype,
            shape,
            host=host,
            column_scales=columns,
            row_offsets=offsets,
        )
        if check or blob.device.type == "cuda":
            blob.check_lanes()
        self._take(blob)
        return blob

    @property
    def weight(self) -> CodedWeight:
        """The original weight's dtype and shape, and the device: for code that asks ``layer.weight.dtype``."""
        blob = self._current()
        device = self.weight_kvpack.device if blob is None else blob.device
        return CodedWeight(self.weight_dtype, device, self.weight_shape)

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The weight as numbers, in its original shape: decoded at each call, a copy.

        Args:
            dtype: by default the original's.

        Raises:
            FormatError, StreamingError, RuntimeError: as of :meth:`prepare`.
        """
        return self.prepare().dequantize(dtype)

    @property
    def memory_bytes(self) -> int:
        """Bytes of the device's memory that the layer takes, tables and scales included."""
        blob = self._current()
        if blob is not None:
            return blob.nbytes
        tensors = [self.weight_kvpack, *self._numbers()]
        return sum(t.numel() * t.element_size() for t in tensors if t is not None and not t.is_meta)

    @property
    def bits_per_weight(self) -> float:
        """8 × stored bytes / weights, scales counted."""
        beside = sum(numbers.nbytes for numbers in self._numbers() if numbers is not None)
        return 8 * (self.weight_kvpack.numel() + beside) / (self.in_features * self.out_features)

    def extra_repr(self) -> str:
        parts = [f"{self.bits_per_weight:.3f} bits/weight"]
        blob = self._current()
        if blob is not None:
            layout = blob.header.layout
            rows = "a scale per row" if blob.scales.numel() > 1 else "one scale"
            method = f"quantized to {layout.element_bits} bits, {rows}" if blob.scales.numel() else "lossless"
            method += ", column scales" * (blob.column_scales is not None)
            method += ", row offsets" * (blob.row_offsets is not None)
            parts.append(f"{layout.name}, {method}" if blob.scales.numel() else method)
        parts.append("streamed" if self.streamed else f"device={self.weight_kvpack.device}")
        return ", ".join(parts)

    # What torch does to modules ---------------------------------------------------------------------------------

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """``to``, ``cuda``, ``half``, …: others as usual; the blob moves with its slack and is made ready anew."""
        held = {name: self._buffers[name] for name in PARTS}
        self._buffers.update(dict.fromkeys(held))  # which leaves them in their places, but passed over
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            self._buffers.update(held)
        coded, numbers = self.weight_kvpack, self._numbers()
        if self.streamed:
            return self
        blob = self._current()
        whole = coded if blob is None else blob.blob
        moved = _convert(fn, whole)
        moved_numbers = [part if part is None else _convert(fn, part) for part in numbers]
        if moved is whole and all(now is then for now, then in zip(moved_numbers, numbers, strict=True)):
            return self
        self._buffers[BLOB] = moved[: len(coded)]
        self._buffers.update(zip(NUMBERS, moved_numbers, strict=True))
        self._lend(None)
        self._derive_if_loaded(coded.detach().numpy().data if coded.device.type == "cpu" else None)
        return self

    def _derive_if_loaded(self, host: memoryview | None = None) -> None:
        """Make ready now what can be: ``to_empty`` and meta leave bytes that are no blob yet."""
        if not self.weight_kvpack.is_meta and not self.streamed:
            with suppress(FormatError):
                self._derive(host)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        """Blob and scales are never copied into: other layers may share their memory, and lengths may differ."""
        error_msgs: list[str] = arguments[-1]
        own, given = self.weight_kvpack, state_dict.get(prefix + BLOB)
        if self.streamed and given is not None:
            error_msgs.append(f"{prefix}{BLOB}: the weights are streamed; close the stream before loading others")
            return
        if isinstance(given, torch.Tensor) and given.ndim == 1:
            self._buffers[BLOB] = padded_buffer(len(given), own.device)[: len(given)]
            for part, dtype in NUMBERS.items():
                numbers = state_dict.get(prefix + part)
                if isinstance(numbers, torch.Tensor) and self._buffers[part] is not None:
                    self._buffers[part] = torch.empty_like(numbers, dtype=dtype, device=own.device)
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        if given is not None and self._current() is None and not self.weight_kvpack.is_meta:
            try:
                self._derive(None, check=True)
            except ValueError as error:
                error_msgs.append(f"{prefix}{BLOB}: {error}")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_blob": None, "_blob_of": None, "_numbers_of": (), "streamed": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._derive_if_loaded()
