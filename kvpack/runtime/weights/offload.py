"""Models larger than the device: coded weights stay in host memory or on disk, and pass through a few device buffers.

A :class:`LayerStream` owns ``prefetch + 1`` buffers ("slots"), each as large as the largest layer. While one layer is
computed, those that follow are copied on a stream of their own::

    slot 0   [ layer 0 computed ]        [ layer 3 copied … ]
    slot 1   [ copied ][ waits  ]  [ layer 1 computed ]
    slot 2       [ copied ][ waits      ]     [ layer 2 computed ]

Two events a slot keep this right without the host waiting for the device: a layer's kernels wait for ``ready`` (behind
the copy into its slot), and the next copy into the slot waits for ``free`` (behind those kernels). From disk, the host
waits for the thread that reads, and for nothing else.

What is streamed are the coded bytes. Tables, group offsets, scales and biases, a few percent of them, stay on the
device.
"""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from kvpack.encode.reader import Reader
from kvpack.errors import StreamingError
from kvpack.format.closing import Closing
from kvpack.format.container import BLOB_SUFFIX, Readable
from kvpack.format.header import HEADER_BYTES, BlobHeader
from kvpack.format.layout import align
from kvpack.runtime.device.devices import resolve_device
from kvpack.runtime.device.upload import Piece, Upload, Uploader, side_stream
from kvpack.runtime.weights.coded_matrix import BLOB, NUMBERS, PARTS, CodedMatrix
from kvpack.runtime.weights.device_blob import SLACK_BYTES, DeviceBlob
from kvpack.runtime.weights.load import CrcChecks, NumberTensors, numbers_beside

if TYPE_CHECKING:
    import os

Source = Literal["pinned", "disk"]

# Blobs in a slot begin at multiples of this, as a tensor of torch's allocator would.
_SLOT_ALIGNMENT = 512


@dataclass
class _Member:
    """One linear layer of a streamed layer: its bytes are ``offset … offset + blob_bytes`` of the slot, then slack."""

    linear: CodedMatrix
    offset: int
    blob_bytes: int
    piece: tuple[Readable, int] | None  # where the file has them: the one whose fronts and scales were read
    blob: DeviceBlob | None = None

    @property
    def end(self) -> int:
        return self.offset + self.blob_bytes + SLACK_BYTES


@dataclass
class _Layer:
    members: list[_Member]
    size_bytes: int
    # What a slot shall hold, in host memory; None if the file has it.
    host: torch.Tensor | None = None


@dataclass
class _Slot:
    buffer: torch.Tensor
    layer: int | None = None
    last_use: int = 0
    upload: Upload | None = None
    ready: torch.cuda.Event | None = None
    # The end of its last use on each stream that used what it holds.
    free: dict[int, torch.cuda.Event] = field(default_factory=dict)
    # Streams that the allocator has been told of.
    streams: set[int] = field(default_factory=set)

    def in_use_on(self, stream: torch.cuda.Stream) -> None:
        """The buffer, when it is freed, must not be handed out before this stream's work is done."""
        if stream.cuda_stream not in self.streams:
            self.streams.add(stream.cuda_stream)
            self.buffer.record_stream(stream)


def _whole_pages(size_bytes: int) -> torch.Tensor:
    """Zeroed host memory that shares no page with any other, since CUDA pins pages, each of them once."""
    if size_bytes == 0:
        return torch.zeros(0, dtype=torch.uint8, device="cpu")
    return torch.frombuffer(mmap.mmap(-1, size_bytes, access=mmap.ACCESS_COPY), dtype=torch.uint8)


def _register(host: torch.Tensor, device: torch.device) -> None:
    """Pin memory as it is: torch's own pinned memory is rounded up to powers of two, up to twice the weights.

    Through CuPy: what fails through ``torch.cuda.cudart()`` stays CUDA's last error, which torch would take for the
    next kernel's.
    """
    from cupy.cuda import runtime

    try:
        with torch.cuda.device(device):  # a context is made where there is none
            runtime.hostRegister(host.data_ptr(), host.nbytes, runtime.hostAllocPortable)
    except runtime.CUDARuntimeError as error:
        raise StreamingError(
            f"CUDA cannot pin {host.nbytes} bytes of host memory ({error}): use source='disk', or raise the limit of "
            "locked memory"
        ) from None


def _unregister(hosts: list[torch.Tensor], device: torch.device) -> None:
    from cupy.cuda import runtime

    # Errors are those of CUDA that has ended before, when the interpreter ends.
    with suppress(RuntimeError):
        # Not the copy stream's own wait: torch's sync debug mode refuses that one, and pages would stay pinned.
        torch.cuda.synchronize(device)
    for host in hosts:
        with suppress(RuntimeError):
            runtime.hostUnregister(host.data_ptr())
    hosts.clear()


class _Before:
    """Layers and other tensors as they were, to be put back if what streams them cannot be set up."""

    def __init__(self, linears: Iterable[CodedMatrix], others: Iterable[tuple[nn.Module, str]] = ()) -> None:
        self._linears = [(linear, dict(vars(linear)), dict(linear._buffers)) for linear in linears]
        self._parameters = [(m, key, p, p.data) for m, key in others if (p := m._parameters.get(key)) is not None]
        self._buffers = [(m, key, m._buffers[key]) for m, key in others if key in m._buffers]

    def restore(self) -> None:
        for linear, attributes, own in self._linears:
            vars(linear).update(attributes)
            linear._buffers.update(own)
        for module, key, parameter, data in self._parameters:
            module._parameters[key] = parameter
            parameter.data = data
        for module, key, buffer in self._buffers:
            module._buffers[key] = buffer


class LayerStream(Closing):
    """Streams the coded weights of a sequence of layers to a device, a few layers ahead of their use.

    A layer is a list of :class:`RansLinear`; :meth:`acquire` makes its weights usable by what the current stream does
    next, :meth:`release` says that the current stream has been given all that uses them. Layers are expected in order,
    again and again; any other order works, at the price of copies that nothing hides. The layers' weights are on the
    device between the two calls alone; using them at another time raises StreamingError.

    Inference only, from one thread, not in a CUDA graph's capture.

    Args:
        layers: the linear layers of each layer; those on the meta device (as ``replace_linears(defer=…)`` leaves
            them) are found in ``path`` by their ``tensor_name``.
        device: where they compute; by default CUDA where torch has it.
        source: ``"pinned"``: host memory, pinned (with CUDA); ``"disk"``: read from ``path`` each time.
        path: the compressed file or directory.
        prefetch: how many layers are copied ahead; the device holds one more.
        verify: compare what is taken from the file with all CRCs that it gives, once, before anything is streamed.

    Attributes:
        hits, misses: layers that were there, or under way, when asked for; and those that were not.
        uploads: layers copied to the device.

    Raises:
        StreamingError: a layer is in the sequence twice, or has neither weights nor a file.
        FormatError: the file is damaged; the message names the tensor.
        ValueError: an argument makes no sense.

    Whatever is raised while it is made, the layers are as they were.
    """

    def __init__(
        self,
        layers: Sequence[Sequence[CodedMatrix]],
        *,
        device: torch.device | str | None = None,
        source: Source = "pinned",
        path: str | os.PathLike[str] | None = None,
        prefetch: int = 2,
        verify: bool = True,
    ) -> None:
        if source not in ("pinned", "disk"):
            raise ValueError(f"source is {source!r}; there are 'pinned' and 'disk'")
        if prefetch < 0:
            raise ValueError(f"prefetch is {prefetch}")
        if source == "disk" and path is None:
            raise ValueError("source='disk' needs the path of the file")
        linears = [linear for layer in layers for linear in layer]
        if not linears:
            raise ValueError("there is no RansLinear to stream")
        if len({id(linear) for linear in linears}) != len(linears) or any(linear.streamed for linear in linears):
            raise StreamingError("a RansLinear is in two streamed layers, or streamed already")
        self.device = resolve_device(device)
        self.source = source
        self.prefetch = prefetch
        self.hits = self.misses = self.uploads = 0
        self._clock = 0
        self._active: set[int] = set()
        self._slot_of: dict[int, _Slot] = {}
        self._handles: list[Any] = []
        self._closed = False
        self._uploader: Uploader | None = None
        self._finalizer: Callable[[], object] | None = None
        self._copy_stream = side_stream(self.device)
        before = _Before(linears)
        try:
            self._set_up(layers, None if path is None else Path(path), verify)
        except BaseException:
            try:
                self._stop()
            finally:
                before.restore()
            raise

    # Setting up --------------------------------------------------------------------------------------------------

    def _set_up(self, layers: Sequence[Sequence[CodedMatrix]], path: Path | None, verify: bool) -> None:
        with nullcontext() if path is None else Reader(path, components=False) as reader:
            self._layers = [self._lay_out(layer, reader) for layer in layers]
            self._slots = self._make_slots(min(self.prefetch + 1, len(self._layers)))
            if self.source == "pinned":
                self._fill_hosts()
            with CrcChecks(reader) if verify and reader is not None else nullcontext() as checks:
                for layer in self._layers:
                    for member in layer.members:
                        member.blob = self._device_blob(layer, member, reader, checks)
                if checks is not None:
                    checks.wait()
        for layer in self._layers:
            for member in layer.members:
                self._take(layer, member)
        if self.source == "disk":
            self._uploader = Uploader(self.device, stream=self._copy_stream)

    def _lay_out(self, linears: Sequence[CodedMatrix], reader: Reader | None) -> _Layer:
        """Where in a slot each linear layer's bytes lie."""
        members: list[_Member] = []
        at = 0
        for linear in linears:
            name, piece, size = linear.tensor_name, None, len(linear.weight_kvpack)
            if self.source == "disk" or linear.weight_kvpack.is_meta:
                if reader is None or name is None:
                    raise StreamingError(
                        f"{name or 'a RansLinear'} is on the meta device, and path or its name unknown"
                    )
                container = reader.container(name)
                if name not in container.coded:
                    raise StreamingError(f"{name!r} is not coded in {container.path}")
                stored = container.tensors[name + BLOB_SUFFIX]
                piece, size = (container.file, container.data_begin + stored.begin), stored.size_bytes
            member = _Member(linear, align(at, _SLOT_ALIGNMENT), size, piece)
            members.append(member)
            at = member.end
        return _Layer(members, align(at, _SLOT_ALIGNMENT))

    def _make_slots(self, count: int) -> list[_Slot]:
        size = max(layer.size_bytes for layer in self._layers)
        with torch.inference_mode(False):  # slots are written to in whatever mode a layer is used in
            slots = [_Slot(torch.zeros(size, dtype=torch.uint8, device=self.device)) for _ in range(count)]
        if self._copy_stream is not None:
            # Before its first copy, and again when a slot is freed while a copy is under way.
            self._copy_stream.wait_stream(torch.cuda.current_stream(self.device))
            for slot in slots:
                slot.ready = torch.cuda.Event()
                slot.in_use_on(self._copy_stream)
        return slots

    def _fill_hosts(self) -> None:
        """Each layer's bytes into host memory, as a slot shall hold them."""
        with Uploader(torch.device("cpu")) as uploader:
            uploads = []
            for layer in self._layers:
                host = layer.host = _whole_pages(layer.size_bytes)
                pieces = []
                for member in layer.members:
                    target = host[member.offset : member.offset + member.blob_bytes]
                    if member.piece is None:
                        target.copy_(member.linear.weight_kvpack)
                    else:
                        pieces.append(Piece(*member.piece, target))
                uploads.append(uploader.submit(pieces))
            for upload in uploads:
                upload.wait()
        if self._copy_stream is not None:
            hosts: list[torch.Tensor] = []
            self._finalizer = weakref.finalize(self, _unregister, hosts, self.device)
            for layer in self._layers:
                if layer.host is not None and layer.host.nbytes:
                    _register(layer.host, self.device)
                    hosts.append(layer.host)

    def _device_blob(
        self, layer: _Layer, member: _Member, reader: Reader | None, checks: CrcChecks | None
    ) -> DeviceBlob:
        """The resident part of a blob; its bytes are those of the first slot until they are those of another."""
        linear, name = member.linear, member.linear.tensor_name
        if member.piece is not None:
            assert reader is not None
            assert name is not None
            numbers = numbers_beside(reader, name)
        else:
            own = linear.weight_kvpack_scale
            scales = torch.empty(0, dtype=torch.float32, device="cpu") if own is None else own
            numbers = NumberTensors(scales, linear.weight_kvpack_column_scale, linear.weight_kvpack_row_offset)
        if layer.host is not None:
            host = layer.host[member.offset : member.offset + member.blob_bytes].numpy().data
        else:
            assert reader is not None
            assert name is not None
            host = reader.container(name).data(name + BLOB_SUFFIX)
        header = BlobHeader.parse(host[:HEADER_BYTES])
        if (header.matrices, header.rows, header.cols) != (1, linear.out_features, linear.in_features):
            raise StreamingError(f"{name!r}: the file's blob is not one of {linear}")
        shape = (header.cols, header.rows) if header.transposed else (header.rows, header.cols)
        buffer = self._slots[0].buffer[member.offset : member.end]
        with nullcontext() if member.piece is None or checks is None else checks.around(str(name), host):
            return DeviceBlob.from_buffer(
                buffer,
                numbers.scales,
                linear.weight_dtype,
                shape,
                host=host,
                column_scales=numbers.column_scales,
                row_offsets=numbers.row_offsets,
            )

    def _take(self, layer: _Layer, member: _Member) -> None:
        """From now on the layer's buffers are the host's, or nothing; what it computes with is lent to it."""
        linear, blob = member.linear, member.blob
        assert blob is not None
        linear._lend(None)
        linear.streamed = True
        linear._buffers[BLOB] = (
            torch.empty(member.blob_bytes, dtype=torch.uint8, device="meta")
            if layer.host is None
            else layer.host[member.offset : member.offset + member.blob_bytes]
        )
        linear._take_numbers(blob)
        if linear.bias is not None:
            linear.bias = linear.bias.to(self.device)

    # Use ---------------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._layers)

    @property
    def device_bytes(self) -> int:
        """What streaming takes of the device's memory: slots, and what is resident of every layer."""
        members = [member for layer in self._layers for member in layer.members]
        resident = sum(m.blob.nbytes - m.blob.blob.nbytes for m in members if m.blob is not None)
        return resident + sum(slot.buffer.nbytes for slot in self._slots)

    @property
    def streamed_bytes(self) -> int:
        """What one pass over all layers copies at most."""
        return sum(layer.size_bytes for layer in self._layers)

    def acquire(self, index: int) -> None:
        """Layer ``index``'s weights, for what the current stream does next; starts copying those that follow.

        Raises:
            StreamingError: all slots are in use, or a CUDA graph is being captured.
            OSError: the file cannot be read.
        """
        if self._closed:
            raise StreamingError("the stream is closed")
        if self._copy_stream is not None and torch.cuda.is_current_stream_capturing():
            raise StreamingError("streamed layers cannot be captured in a CUDA graph: their weights change places")
        slot = self._slot_of.get(index)
        if slot is None:
            self.misses += 1
            slot = self._free_slot({(index + ahead) % len(self) for ahead in range(1, self.prefetch + 1)})
            slot = self._free_slot(set()) if slot is None else slot
            if slot is None:
                raise StreamingError(
                    f"{len(self._active)} layers are in use at once; prefetch={self.prefetch} has buffers for "
                    f"{len(self._slots)}"
                )
            self._start(index, slot)
        else:
            self.hits += 1
        if slot.upload is not None:
            try:
                slot.upload.wait()
            except Exception:
                self._forget(slot)
                raise
            slot.ready, slot.upload = slot.upload.ready, None
        if slot.ready is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(slot.ready)
            slot.in_use_on(stream)
        self._active.add(index)
        self._clock += 1
        slot.last_use = self._clock
        for member in self._layers[index].members:
            assert member.blob is not None
            member.blob.blob = slot.buffer[member.offset : member.end]
            member.linear._lend(member.blob)
        self._prefetch_after(index)

    def release(self, index: int) -> None:
        """All that uses layer ``index`` has been given to the current stream; behind it, the slot may be refilled."""
        if index not in self._active:
            return
        self._active.remove(index)
        for member in self._layers[index].members:
            member.linear._lend(None)
        slot = self._slot_of[index]
        if self._copy_stream is not None:
            stream = torch.cuda.current_stream(self.device)
            slot.free[stream.cuda_stream] = stream.record_event()

    @contextmanager
    def layers(self, *indices: int) -> Iterator[None]:
        """Several layers at once, for :func:`run_concurrently`; ``prefetch`` must be one less than their number, or
        more."""
        try:
            for index in indices:
                self.acquire(index)
            yield
        finally:
            for index in indices:
                self.release(index)

    def _free_slot(self, wanted: set[int]) -> _Slot | None:
        """The slot used longest ago, of those that are not in use and hold no wanted layer."""
        free = [s for s in self._slots if s.layer is None or (s.layer not in self._active and s.layer not in wanted)]
        return min(free, key=lambda slot: slot.last_use, default=None)

    def _prefetch_after(self, index: int) -> None:
        ahead = [(index + i) % len(self) for i in range(1, self.prefetch + 1)]
        for following in ahead:
            if following in self._slot_of:
                continue
            slot = self._free_slot({index, *ahead})
            if slot is None:
                return
            try:
                self._start(following, slot)
            except OSError:  # whoever needs the layer will meet it again
                return

    def _forget(self, slot: _Slot) -> None:
        """Whatever the slot holds, it is no layer any more."""
        if slot.layer is not None:
            del self._slot_of[slot.layer]
        slot.layer = slot.upload = None

    def _start(self, index: int, slot: _Slot) -> None:
        """Begin to bring layer ``index`` into ``slot``."""
        if slot.upload is not None:  # fetched, never used: the threads must be done with the slot
            with suppress(Exception):
                slot.upload.wait()
        self._forget(slot)
        self._fill(slot, self._layers[index])
        self._slot_of[index] = slot
        slot.layer = index
        self.uploads += 1

    def _fill(self, slot: _Slot, layer: _Layer) -> None:
        """Enqueue the copy of a layer into a slot, behind what still reads the slot."""
        if layer.host is not None:
            with torch.cuda.stream(self._copy_stream):
                self._wait_until_free(slot)
                slot.buffer[: layer.size_bytes].copy_(layer.host, non_blocking=True)
                if self._copy_stream is not None and slot.ready is not None:
                    slot.ready.record(self._copy_stream)
            return
        assert self._uploader is not None
        pieces = [
            Piece(*member.piece, slot.buffer[member.offset : member.offset + member.blob_bytes])
            for member in layer.members
            if member.piece is not None
        ]

        def begin() -> None:
            self._wait_until_free(slot)
            slot.buffer[: layer.size_bytes].zero_()  # the slack between blobs

        slot.upload = self._uploader.submit(pieces, begin=begin)

    def _wait_until_free(self, slot: _Slot) -> None:
        """The copying stream, which is the current one, waits for what reads the slot."""
        for event in slot.free.values():
            torch.cuda.current_stream(self.device).wait_event(event)
        slot.free.clear()

    def check(self) -> None:
        """Wait for the device, and raise LaneStateError if a kernel met damaged weights since the last check."""
        for layer in self._layers:
            for member in layer.members:
                if member.blob is not None:
                    member.blob.check()

    def _stop(self) -> None:
        """Nothing is read, copied or called any more; no file is open for threads, and no memory pinned."""
        self._closed = True
        for handle in self._handles:
            handle.remove()
        if self._uploader is not None:
            self._uploader.close()
        if self._copy_stream is not None:
            torch.cuda.synchronize(self.device)
        if self._finalizer is not None:
            self._finalizer()

    def close(self) -> None:
        """Stop, wait for the device, and give the layers back.

        From pinned memory they keep their coded weights in host memory, pinned no longer, with their scales: ready for
        the CPU, for ``model.to(device)`` or for another stream. From disk they have no weights (their buffers are on
        the meta device) until another stream or ``load_state_dict(…, assign=True)`` brings some; StreamingError says so
        if they are used. All else of the model stays on the device.
        """
        if self._closed:
            return
        self._stop()
        for layer in self._layers:
            for member in layer.members:
                linear = member.linear
                linear._lend(None)
                linear.streamed = False
                for part in NUMBERS:
                    numbers = linear._buffers[part]
                    linear._buffers[part] = None if numbers is None else numbers.to(linear.weight_kvpack.device)
                member.blob = member.piece = None
        self._slots.clear()
        self._slot_of.clear()
        self._active.clear()


def stream_modules(
    model: nn.Module,
    modules: Sequence[nn.Module],
    *,
    source: Source = "pinned",
    path: str | os.PathLike[str] | None = None,
    prefetch: int = 2,
    device: torch.device | str | None = None,
    verify: bool = True,
) -> LayerStream:
    """Let ``modules`` (a model's decoder layers, in the order in which they run) compute on streamed weights.

    Each module's coded weights are on the device from its forward pre-hook to its forward hook; everything else of
    the model is moved to the device for good::

        model = transformers.AutoModelForCausalLM.from_config(config)      # on the meta device, say
        layers = model.model.layers
        kvpack.replace_linears(model, path, device="cuda", defer=layers)   # all but the layers' coded weights
        stream = stream_modules(model, layers, source="disk", path=path, device="cuda")

    Without ``defer`` the weights that the modules hold are taken over. Works under ``torch.compile`` with graph breaks
    at each module, not with ``fullgraph=True``.

    Args:
        source, path, prefetch, device, verify: as of :class:`LayerStream`.

    Returns:
        The stream; closing it removes the hooks, and leaves the modules as :meth:`LayerStream.close` says.

    Raises:
        StreamingError: modules without coded weights, nested in each other, or other weights on the meta device.

    Whatever is raised, ``model.to(device)``'s errors among it, the model is as it was.
    """
    names = {id(module): name for name, module in model.named_modules()}
    layers = []
    for module in modules:
        if id(module) not in names:
            raise StreamingError(f"a {type(module).__name__} to be streamed is not part of the model")
        layers.append([inner for inner in module.modules() if isinstance(inner, CodedMatrix)])
        if not layers[-1]:
            raise StreamingError(f"{names[id(module)]!r} has no RansLinear: call kvpack.replace_linears before")
    streamed = {id(linear): linear for layer in layers for linear in layer}
    others: list[tuple[nn.Module, str]] = []
    for name, module in model.named_modules():
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            coded = isinstance(module, CodedMatrix) and key in PARTS and id(module) in streamed
            if tensor is not None and tensor.is_meta and not coded:
                raise StreamingError(f"{name}.{key} is on the meta device: load it with kvpack.replace_linears before")
            if id(module) not in streamed:
                others.append((module, key))
    before = _Before(streamed.values(), others)
    stream = None
    try:
        for linear in streamed.values():
            linear.tensor_name = linear.tensor_name or f"{names[id(linear)]}.weight"
        stream = LayerStream(layers, device=device, source=source, path=path, prefetch=prefetch, verify=verify)
        model.to(stream.device)
        acquire, release = torch.compiler.disable(stream.acquire), torch.compiler.disable(stream.release)
        for index, module in enumerate(modules):
            stream._handles.append(
                module.register_forward_pre_hook(lambda _module, _args, i=index: acquire(i), prepend=True)
            )
            stream._handles.append(
                module.register_forward_hook(lambda _module, _args, _output, i=index: release(i), always_call=True)
            )
    except BaseException:
        try:
            if stream is not None:
                stream.close()
        finally:
            before.restore()
        raise
    return stream


_side_streams: dict[torch.device, list[torch.cuda.Stream]] = {}


def run_concurrently(layers: Sequence[nn.Module], inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """``[layer(x) for layer, x in zip(layers, inputs)]``, on CUDA each on a stream of its own.

    The layers must not depend on each other. The current stream waits for all of them, so that results are used as
    any others; may be captured in a CUDA graph. Small layers, which leave parts of the device idle, gain.
    """
    if len(layers) != len(inputs):
        raise ValueError(f"{len(layers)} layers and {len(inputs)} inputs")
    if not inputs or inputs[0].device.type != "cuda":
        return [layer(x) for layer, x in zip(layers, inputs, strict=True)]
    device = inputs[0].device
    for layer in layers:
        if isinstance(layer, CodedMatrix):
            layer.prepare()  # on this stream, on which it will be used and freed later
    streams = _side_streams.setdefault(device, [])
    while len(streams) < len(layers):
        streams.append(torch.cuda.Stream(device))
    current = torch.cuda.current_stream(device)
    begun = current.record_event()
    outputs = []
    used = []
    try:
        for layer, x, stream in zip(layers, inputs, streams, strict=False):
            stream.wait_event(begun)
            used.append(stream)
            with torch.cuda.stream(stream):
                output = layer(x)
            # Its memory is the side stream's: not to be handed out there before the current stream has read it.
            output.record_stream(current)
            outputs.append(output)
    finally:
        for stream in used:  # also what has failed must not outlive its inputs
            current.wait_stream(stream)
    return outputs
