"""``kvpack.load``: the tensors of a compressed file or directory on a device, coded ones still coded."""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from kvpack.encode.coded_tensor import CodedTensor
from kvpack.encode.reader import Reader
from kvpack.errors import FormatError, InputError, TensorTableError
from kvpack.format.blob import TILE_METADATA, Blob
from kvpack.format.closing import Closing
from kvpack.format.container import BLOB_SUFFIX, NUMBER_DTYPES, Container, StoredTensor
from kvpack.format.header import HEADER_BYTES, BlobHeader
from kvpack.format.layout import align
from kvpack.format.tile_crc import check_tiles
from kvpack.runtime.device.devices import resolve_device
from kvpack.runtime.device.upload import Piece, Uploader
from kvpack.runtime.weights.coded_matrix import padded_buffer
from kvpack.runtime.weights.device_blob import SLACK_BYTES, DeviceBlob
from kvpack.runtime.weights.linear import RansLinear

if TYPE_CHECKING:
    import os

TORCH_DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F4": torch.float4_e2m1fn_x2,
}
# What `dtype=` converts: numbers that stand for themselves. fp8 tensors have scales beside them.
_PLAIN_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Torch's allocator takes larger requests from its pool of large segments, cut into multiples of these blocks.
_LARGE_BYTES = 1 << 20
_BLOCK_BYTES = 512
_HOST_BLOCK_BYTES = 32 << 20
# So many tiles (of some 70 KB) are checked by one thread at once: large tensors are shared, small ones are not split.
_TILES_A_CHECK = 64
# Small tensors are checked together: to give a thread something to do takes as long as to read 100 KB.
_CHECK_BYTES = 4 << 20
# Bytes that may wait for their checks beside one tensor's: reading is faster, and what was read is held meanwhile.
_MAX_PENDING_BYTES = 256 << 20

Progress = Callable[[int, int], None]


def piece_of(container: Container, stored: str, target: torch.Tensor) -> Piece:
    """A stored tensor's bytes in its file, to be brought to the front of ``target`` (u8).

    They are read from the file that the container has opened and checked, whatever lies under its path by now.
    """
    tensor = container.tensors[stored]
    return Piece(container.file, container.data_begin + tensor.begin, target[: tensor.size_bytes])


@contextmanager
def _named(reader: Reader, name: str) -> Iterator[None]:
    """Errors say which file and tensor they are about."""
    try:
        yield
    except ValueError as error:
        error.args = (f"{reader.container(name).path}, tensor {name!r}: {error}",)
        raise


class NumberTensors(NamedTuple):
    """What stands beside a blob, checked, on the CPU: ``scales`` f32 [0], [1] or [matrices · rows], and the vectors."""

    scales: torch.Tensor
    column_scales: torch.Tensor | None
    row_offsets: torch.Tensor | None


def numbers_beside(reader: Reader, name: str) -> NumberTensors:
    """Scales, column scales and row offsets of a coded tensor. Raises ScaleError."""
    info = reader.info(name)
    assert info is not None
    found = reader._numbers_beside(name, reader.container(name), info.header)
    scales, columns, offsets = (None if numbers is None else torch.from_numpy(numbers) for numbers in found)
    return NumberTensors(
        torch.empty(0, dtype=torch.float32, device="cpu") if scales is None else scales, columns, offsets
    )


def device_blob(reader: Reader, name: str, buffer: torch.Tensor, host: memoryview) -> DeviceBlob:
    """A coded tensor whose bytes are in ``buffer``, or on their way to it.

    Args:
        host: the same bytes in the host's memory.

    Raises:
        FormatError: its structure, or its entry in the metadata, breaks a rule; the message names file and tensor.
    """
    info = reader.info(name)
    assert info is not None
    numbers = numbers_beside(reader, name)
    with _named(reader, name):
        return DeviceBlob.from_buffer(
            buffer,
            numbers.scales,
            TORCH_DTYPES[info.dtype],
            info.shape,
            host=host,
            column_scales=numbers.column_scales,
            row_offsets=numbers.row_offsets,
        )


def coded_on_device(tensor: CodedTensor, device: torch.device | str) -> DeviceBlob:
    """A coded tensor of the host's memory, a device's part of one or a stack of several, as kernels take it.

    Example::

        qkv = CodedTensor.stack([reader.coded(name).part("outputs", rank, 8) for name in (q, k, v)])
        layer = RansLinear(coded_on_device(qkv, "cuda"), bias=None)

    Raises:
        FormatError: the blob or its scales break a rule.
        DeviceError: the device cannot be used, or its shared memory is too small for the blob's tiles.
    """
    return DeviceBlob.from_bytes(
        tensor.blob,
        tensor.scales,
        TORCH_DTYPES[tensor.dtype],
        tensor.shape,
        device,
        column_scales=tensor.column_scales,
        row_offsets=tensor.row_offsets,
    )


def _run_all(checks: Iterable[Callable[[], object]]) -> None:
    for check in checks:
        check()


class CrcChecks(Closing):
    """All bytes of tensors against their CRCs, by the reader's threads while others do something else.

    Kept tensors, and scales, are checked where the file gives CRCs (§9.3).
    """

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._next: list[Callable[[], object]] = []
        self._next_bytes = self._next_held_bytes = 0
        self._pending: deque[tuple[Future[None], int]] = deque()
        self._held_bytes = 0  # by all that is not done

    def covers(self, name: str) -> bool:
        """Whether there is anything to compare a tensor with."""
        container = self._reader.container(name)
        return name in container.coded or name in container.crc32

    def add(self, name: str, host: memoryview | None = None) -> None:
        """Check a tensor, and its scales; waits for earlier ones while many bytes are under way.

        Args:
            host: its stored bytes. A blob's front part (§§2–5) has been checked, as ``Blob`` does. Those of a tensor
                that is not coded are read from the file, in parts, if they are not given.

        Raises:
            FormatError: of an earlier one that is damaged.
        """
        container = self._reader.container(name)
        if name not in container.coded:
            if self.covers(name):
                size_bytes = container.tensors[name].size_bytes
                self._add(partial(self._check_plain, name, name, host), size_bytes, size_bytes)
                self._make_room(size_bytes)
            return
        assert host is not None
        header = BlobHeader.parse(host)
        begin = HEADER_BYTES + header.table_bytes
        tiles = np.frombuffer(host[begin : header.payload_offset], TILE_METADATA)
        payload = host[header.payload_offset :]
        for first in range(0, len(tiles), _TILES_A_CHECK):
            is_last = first + _TILES_A_CHECK >= len(tiles)  # done when all before it are
            check_bytes = len(host) * min(_TILES_A_CHECK, len(tiles) - first) // len(tiles)
            self._add(partial(self._check_coded, name, payload, tiles, first), check_bytes, len(host) if is_last else 0)
        self._make_room(len(host))

    def _add(self, check: Callable[[], object], check_bytes: int, held_bytes: int) -> None:
        self._next.append(check)
        self._next_bytes += check_bytes
        self._next_held_bytes += held_bytes
        self._held_bytes += held_bytes
        if self._next_bytes >= _CHECK_BYTES:
            self._submit()

    def _submit(self) -> None:
        if self._next:
            self._pending.append((self._reader._executor.submit(_run_all, self._next), self._next_held_bytes))
            self._next, self._next_bytes, self._next_held_bytes = [], 0, 0

    def _make_room(self, size_bytes: int) -> None:
        """Forget what is done, and wait while more is held than may be beside the last one's bytes."""
        if self._held_bytes - size_bytes > _MAX_PENDING_BYTES:
            self._submit()
        while self._pending:
            if not self._pending[0][0].done() and self._held_bytes - size_bytes <= _MAX_PENDING_BYTES:
                break
            self._wait_for_oldest()

    def _wait_for_oldest(self) -> None:
        check, held_bytes = self._pending.popleft()
        self._held_bytes -= held_bytes
        check.result()

    def _check_plain(self, name: str, stored: str, host: memoryview | None) -> None:
        self._reader.container(name).check_crc32(stored, host)

    def _check_coded(self, name: str, payload: memoryview, tiles: npt.NDArray[np.void], first: int) -> None:
        """Some tiles; in front of all, the scales."""
        if first == 0:
            for suffix in NUMBER_DTYPES:
                self._check_plain(name, name + suffix, None)
        with _named(self._reader, name):
            check_tiles(payload, tiles[first : first + _TILES_A_CHECK], first)

    @contextmanager
    def around(self, name: str, host: memoryview) -> Iterator[None]:
        """Around what looks at a tensor's structure: if that fails, damaged bytes are named, not what came of them."""
        try:
            yield
        except FormatError:
            if name in self._reader.container(name).coded:
                with _named(self._reader, name):
                    Blob(host)
            self.add(name, host)
            self.wait()
            raise
        self.add(name, host)

    def wait(self) -> None:
        """For all that were added.

        Raises:
            FormatError: of the first damaged one.
        """
        self._submit()
        while self._pending:
            self._wait_for_oldest()

    def close(self) -> None:
        """Leave out what has not been begun: after an error, nobody asks for it any more."""
        for check, _ in self._pending:
            check.cancel()
        self._pending.clear()
        self._next.clear()


def check_lanes(reader: Reader, tensors: Mapping[str, DeviceBlob | torch.Tensor]) -> None:
    """Decode every lane of all coded tensors to nowhere, and wait for the device once.

    Raises:
        LaneStateError: the message names file and tensor.
    """
    coded = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, DeviceBlob)}
    for tensor in coded.values():
        torch.ops.kvpack.check_lanes(*tensor._arguments())
    if coded and torch.stack([tensor.status for tensor in coded.values()]).any():
        for name, tensor in coded.items():
            with _named(reader, name):
                tensor.check()


def stored_name(reader: Reader, name: str) -> str:
    """Under which name the bytes of an original tensor are stored."""
    return name + BLOB_SUFFIX if name in reader.container(name).coded else name


def stored_bytes(reader: Reader, name: str) -> int:
    """Size of those bytes."""
    return reader.container(name).tensors[stored_name(reader, name)].size_bytes


def kept_shape(tensor: StoredTensor) -> tuple[int, ...]:
    """The shape that torch gives a kept tensor: of F4 it counts pairs, a byte each, in the last dimension."""
    if tensor.dtype != "F4":
        return tensor.shape
    if not tensor.shape or tensor.shape[-1] % 2:
        raise TensorTableError(
            f"tensor {tensor.name!r}: F4 {list(tensor.shape)}, and torch has F4 in pairs along a row"
        )
    return (*tensor.shape[:-1], tensor.shape[-1] // 2)


def _allocate(reader: Reader, name: str, device: torch.device) -> torch.Tensor:
    """Memory for a tensor: a blob's bytes with slack, or the tensor itself."""
    container = reader.container(name)
    if name in container.coded:
        return padded_buffer(stored_bytes(reader, name), device)
    tensor = container.tensors[name]
    dtype = TORCH_DTYPES.get(tensor.dtype)
    if dtype is None:
        raise TypeError(f"{container.path}, tensor {name!r}: torch has no type for {tensor.dtype}")
    return torch.empty(kept_shape(tensor), dtype=dtype, device=device)


def _host_buffers(blob_bytes: list[int]) -> list[torch.Tensor]:
    """Memory for blobs on the CPU with slack of zeros, several in a block, which stays as long as one of them.

    NumPy asks for huge pages where memory is large: page by page, first writes take most of a read's time.
    """
    sizes = [align(size + SLACK_BYTES, _BLOCK_BYTES) for size in blob_bytes]
    buffers: list[torch.Tensor] = []
    while len(buffers) < len(sizes):
        ends = np.cumsum(sizes[len(buffers) :])
        count = max(1, int(np.searchsorted(ends, _HOST_BLOCK_BYTES, side="right")))
        block = np.empty(ends[count - 1], np.uint8)
        for size, end in zip(blob_bytes[len(buffers) :], ends[:count], strict=False):
            begin = end - sizes[len(buffers)]
            block[begin + size : begin + size + SLACK_BYTES] = 0
            buffers.append(torch.from_numpy(block[begin : begin + size + SLACK_BYTES]))
    return buffers


def _coded_bytes(reader: Reader, names: Iterable[str], wait: Callable[[str], None]) -> Iterator[memoryview]:
    """The blobs' bytes in the host's memory, read ahead by the reader's threads while few wait to be taken.

    Args:
        wait: until a blob is worth reading.
    """
    ahead: deque[tuple[Future[memoryview], int]] = deque()
    ahead_bytes = 0

    def read(name: str) -> memoryview:
        wait(name)
        return reader.container(name).data(name + BLOB_SUFFIX)

    try:
        for name in names:
            size_bytes = stored_bytes(reader, name)
            while ahead and ahead_bytes + size_bytes > _MAX_PENDING_BYTES:
                reading, taken_bytes = ahead.popleft()
                ahead_bytes -= taken_bytes
                yield reading.result()
            ahead.append((reader._executor.submit(read, name), size_bytes))
            ahead_bytes += size_bytes
        while ahead:
            yield ahead.popleft()[0].result()
    finally:
        for reading, _ in ahead:
            reading.cancel()


def _reserve(size_bytes: int, device: torch.device) -> None:
    """Let the allocator get one segment to carve tensors from: hundreds of cudaMalloc take longer than the copies."""
    spare = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if size_bytes > spare:
        with suppress(torch.cuda.OutOfMemoryError):  # then in pieces, or not at all
            torch.empty(size_bytes, dtype=torch.uint8, device=device)


def load_tensors(
    reader: Reader,
    names: Iterable[str],
    device: torch.device,
    *,
    verify: bool = True,
    progress: Callable[[int], None] | None = None,
) -> dict[str, DeviceBlob | torch.Tensor]:
    """The named tensors on ``device``, complete when this returns.

    Args:
        verify: compare all bytes with the CRCs that the file gives. On the CPU those that were loaded, else the
            file's, read a second time.
        progress: called with bytes as they are done, from several threads.

    Raises:
        FormatError: a blob's structure is broken, or (on CUDA, or with ``verify``) its contents; with ``verify``
            those of another tensor.
        OSError: a file cannot be read.
    """
    # In the order of the files, so that what is waited for first is read first.
    pieces_of = {name: reader.container(name) for name in names}
    order = sorted(
        pieces_of, key=lambda n: (str(pieces_of[n].path), pieces_of[n].tensors[stored_name(reader, n)].begin)
    )
    if device.type == "cuda":
        sizes = [stored_bytes(reader, name) for name in order]
        _reserve(sum(size + _BLOCK_BYTES + SLACK_BYTES for size in sizes if size >= _LARGE_BYTES), device)
    if device.type == "cpu":
        blob_bytes = {name: stored_bytes(reader, name) for name in order if name in pieces_of[name].coded}
        buffers = dict(zip(blob_bytes, _host_buffers(list(blob_bytes.values())), strict=True))
    else:
        buffers = {}
    buffers |= {name: _allocate(reader, name, device) for name in order if name not in buffers}
    pieces = [
        piece_of(container, stored_name(reader, name), buffers[name].reshape(-1).view(torch.uint8))
        for name, container in ((name, pieces_of[name]) for name in order)
    ]
    loaded: dict[str, DeviceBlob | torch.Tensor] = {}
    with (
        CrcChecks(reader) if verify else nullcontext() as checks,
        Uploader(device, progress=progress) as uploader,
    ):
        upload = uploader.submit(pieces, begin=uploader.after_current_work())
        numbers = {name: number for number, name in enumerate(order)}
        coded = [name for name in order if name in pieces_of[name].coded]
        # The host reads the file, too: behind the readers, it need not wait for the disk.
        hosts = _coded_bytes(reader, coded, lambda name: upload.wait_piece(numbers[name]))
        for number, name in enumerate(order):
            loaded[name] = buffers[name]
            is_coded = name in pieces_of[name].coded
            if not is_coded and (checks is None or not checks.covers(name)):
                continue
            host = None
            if device.type == "cpu" or not is_coded:
                upload.wait_piece(number)
            if device.type == "cpu":
                host = pieces[number].target.numpy().data
            if not is_coded:
                assert checks is not None
                checks.add(name, host)
                continue
            if host is None:
                host = next(hosts)
            with checks.around(name, host) if checks else nullcontext():
                loaded[name] = device_blob(reader, name, buffers[name], host)
        upload.wait()
        if checks is not None:
            checks.wait()
    # Closing the uploader has waited for its copies, so that no tensor needs record_stream.
    if device.type == "cuda":
        check_lanes(reader, loaded)
    return loaded


class State(Mapping[str, Any]):
    """A mapping of the original names to tensors: coded ones are ``DeviceBlob``, the others plain tensors.

    :meth:`linear` gives a coded matrix as a layer::

        state = kvpack.load("model.kvpack.safetensors", device="cuda")
        y = state.linear("model.layers.0.mlp.down_proj")(x)
        w = state["model.layers.0.mlp.down_proj.weight"].dequantize()

    Attributes:
        device: where the tensors are.
        not_loaded: other sets of weights in the directory; give such a file or index as the path to load it.
    """

    def __init__(
        self,
        tensors: Mapping[str, DeviceBlob | torch.Tensor],
        device: torch.device,
        not_loaded: Iterable[str] = (),
    ) -> None:
        self._tensors = dict(tensors)
        self.not_loaded = list(not_loaded)
        self._layers: dict[str, RansLinear] = {}
        self.device = device

    def __getitem__(self, name: str) -> Any:
        if name in self._tensors:
            return self._tensors[name]
        advice = f"; linear({name!r}) gives the layer" if f"{name}.weight" in self._tensors else ""
        raise KeyError(f"there is no tensor {name!r}{advice}")

    def linear(self, name: str) -> RansLinear:
        """The layer of a coded matrix, the same each time; it shares the state's memory.

        Args:
            name: of the layer, whose matrix is ``name.weight``, or of the matrix itself. The layer of ``….weight`` has
                ``….bias`` as its bias, if there is one.

        Raises:
            KeyError: there is no such tensor, or it is not coded.
            ModelMismatchError: it is no matrix, or the bias does not fit it.
        """
        own = f"{name}.weight" if f"{name}.weight" in self._tensors else name
        if own not in self._layers:
            weight = self._tensors.get(own)
            if weight is None:
                raise KeyError(f"there is no tensor {name!r}, and no {name + '.weight'!r}")
            if not isinstance(weight, DeviceBlob):
                raise KeyError(f"{own!r} is not coded: it is a plain tensor under that name")
            bias_name = own.removesuffix(".weight") + ".bias"
            bias = self._tensors.get(bias_name) if own.endswith(".weight") else None
            if isinstance(bias, DeviceBlob):
                raise KeyError(f"{bias_name!r} is coded, which a bias cannot be")
            self._layers[own] = RansLinear(weight, bias, tensor_name=own)
        return self._layers[own]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    @property
    def nbytes(self) -> int:
        """Bytes on the device, all tensors together."""
        return sum(tensor.nbytes for tensor in self._tensors.values())

    def __repr__(self) -> str:
        coded = sum(isinstance(tensor, DeviceBlob) for tensor in self._tensors.values())
        rest = f"; not loaded: {', '.join(self.not_loaded)}" if self.not_loaded else ""
        return f"<kvpack state: {len(self)} tensors, {coded} coded, {self.nbytes / 1e6:.2f} MB on {self.device}{rest}>"


@contextmanager
def progress_bar(title: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr, gone when done."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as bar:
        task = bar.add_task(title, total=total_bytes)
        yield lambda size: bar.advance(task, size)


def _counted(progress: Progress, total_bytes: int) -> Callable[[int], None]:
    lock, done = threading.Lock(), 0

    def advance(size: int) -> None:
        nonlocal done
        with lock:
            done += size
            progress(done, total_bytes)

    return advance


@contextmanager
def shown_progress(
    progress: bool | Progress | None, title: str, total_bytes: int
) -> Iterator[Callable[[int], None] | None]:
    """What ``progress`` of :func:`load` asks for, as a function of bytes done since the last call."""
    if progress is None:
        progress = sys.stderr.isatty()
    if callable(progress):
        yield _counted(progress, total_bytes)
    elif progress:
        with progress_bar(title, total_bytes) as advance:
            yield advance
    else:
        yield None


def load(
    path: str | os.PathLike[str],
    device: torch.device | str | None = None,
    *,
    verify: bool = True,
    progress: bool | Progress | None = None,
    dtype: torch.dtype | None = None,
) -> State:
    """Load a compressed file or model directory; coded tensors stay coded on the device.

    Every blob's structure is checked, and all bytes of all tensors against the CRCs that the file gives. On CUDA each
    lane of every coded tensor is decoded once, to see that it ends as it must (§5.2); on the CPU that happens whenever
    a tensor is decoded.

    Args:
        path: a .safetensors file, or a model directory: its own tensors by their names, those of a subfolder's model
            with the folder before (``unet/…``). Other sets of weights in a folder, as variants, are not loaded.
        device: ``"cuda"``, ``"cuda:1"``, ``"cpu"``; by default CUDA where torch has it, else the CPU.
        verify: check all CRCs, on the CPU: those of coded tensors, and those that the file gives for the others.
            Without it, damage to tensors that are kept as they are, and to scales, goes unseen.
        progress: True for a bar, False for none, None for a bar on a terminal; or a function of (bytes done, bytes).
        dtype: convert tensors that are not coded, if they are fp16, bf16, fp32 or fp64, to this type.

    Raises:
        InputError: a directory without a safetensors file, or with several sets of weights of which none is the model.
        FormatError: the file is damaged; the message names the tensor.
        DeviceError: the device cannot be used; the message says what to install.
        OSError: a file cannot be read.
    """
    where = resolve_device(device)
    with Reader(Path(path)) as reader:
        names = reader.main_keys()
        others = reader.other_sets()
        if others and not names:
            raise InputError(f"{path} holds several sets of weights, none of them its model: give one of {others}")
        with shown_progress(progress, "loading", sum(stored_bytes(reader, name) for name in names)) as advance:
            loaded = load_tensors(reader, names, where, verify=verify, progress=advance)
    if dtype is not None:
        for name, tensor in loaded.items():
            if isinstance(tensor, torch.Tensor) and tensor.dtype in _PLAIN_FLOATS:
                loaded[name] = tensor.to(dtype)
    return State({name: loaded[name] for name in names}, where, others)
