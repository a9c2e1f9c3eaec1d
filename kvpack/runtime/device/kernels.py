"""CUDA kernels: compiled when first needed, once for a device, and launched on torch's current stream.

A kernel is a file of ``cuda/`` with the ``-D`` options that make it: the format's constants (from
:mod:`kvpack.format.layout`), a tensor's layout, and what the operation asks for. NVRTC compiles it through CuPy, whose
disk cache keeps the result. That cache does not look into included files, so the options carry a hash of all sources.
"""

from __future__ import annotations

import ctypes
import hashlib
import struct
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch

from kvpack.errors import DeviceError
from kvpack.format import layout as constants
from kvpack.format import pages
from kvpack.format.layout import ElementKind, Layout, Predictor, Quantizer, TileMode
from kvpack.format.pages import PageFormat, Side
from kvpack.runtime.device.sources import cuda_source_dir

# Without this a block has 48 KiB.
_PLAIN_SHARED_BYTES = 48 * 1024
_MAX_ARGUMENTS = 64
# NumPy scalars in eight bytes, as `struct` has them.
_PACKED: dict[type, str] = {np.uint32: "I4x", np.int32: "i4x", np.float32: "f4x", np.uint64: "Q", np.int64: "q"}
# What a grid's or a block's other dimensions are, by how many are said.
_ONES = {1: (1, 1), 2: (1,), 3: ()}
MIN_COMPUTE_CAPABILITY = (8, 0)

_NAMES = (
    "TILE_ROWS",
    "GROUP_LANES",
    "CHUNK_COLS",
    "MAX_TILE_COLS",
    "ALIGNMENT_BYTES",
    "PROBABILITY_BITS",
    "STATE_LOW",
    "NUM_SYMBOLS",
    "MAX_STEPS_U8_LENGTHS",
    "OUTLIER_ROW_SHIFT",
    "OUTLIER_LEAST_COL_BITS",
    "TRELLIS_EXTRA_BITS",
)


@cache
def source_hash() -> str:
    """SHA-256 over the names and contents of all CUDA sources."""
    digest = hashlib.sha256()
    root = cuda_source_dir()
    for path in sorted(root.rglob("*.cu*")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def format_defines() -> dict[str, int]:
    """The format's constants under the names that the sources use."""
    defines = {f"KVPACK_{name}": int(getattr(constants, name)) for name in _NAMES}
    defines |= {f"KVPACK_MODE_{mode.name}": int(mode) for mode in TileMode}
    defines |= {f"KVPACK_KIND_{kind.name}": int(kind) for kind in ElementKind}
    defines["KVPACK_PREDICTOR_PREVIOUS"] = int(Predictor.PREVIOUS)
    defines |= {f"KVPACK_{name}": getattr(pages, name) for name in ("PAGE_TOKENS", "GROUP_DIMS", "ENTRY_FORMAT_BITS")}
    defines |= {f"KVPACK_FORMAT_{page_format.name}": int(page_format) for page_format in PageFormat}
    # Bits 8·f … say how many bits an element of format f has.
    defines["KVPACK_FORMAT_BITS"] = sum(page_format.element_bits << 8 * page_format for page_format in PageFormat)
    defines |= {f"KVPACK_SIDE_{side.name}": int(side) for side in Side}
    return defines


def layout_defines(layout: Layout) -> dict[str, int]:
    """A layout's numbers under the names that the sources use."""
    return {
        "KVPACK_ELEMENT_KIND": int(layout.element_kind),
        "KVPACK_ELEMENT_BITS": layout.element_bits,
        "KVPACK_CODE_BITS": layout.code_bits,
        "KVPACK_CODES_PER_SYMBOL": layout.codes_per_symbol,
        "KVPACK_RAW_BITS": layout.raw_bits,
        "KVPACK_FOLDED": int(layout.folded),
        "KVPACK_TRELLIS": int(layout.quantizer == Quantizer.TRELLIS),
    }


@dataclass(frozen=True)
class Kernel:
    """One kernel: a function of a source file, and the ``-D`` options that it is compiled with."""

    source: str
    function: str
    defines: tuple[tuple[str, int], ...] = field(default=())
    architecture: str = ""
    """What it is compiled for, if that is not simply the GPU's: ``sm_90a`` has instructions that no other GPU has."""

    @cached_property
    def _hash(self) -> int:
        return hash((self.source, self.function, self.defines, self.architecture))

    def __hash__(self) -> int:
        """Found once: each launch looks its kernel up."""
        return self._hash

    @classmethod
    def of(
        cls,
        source: str,
        function: str,
        layout: Layout | None = None,
        defines: Mapping[str, int] | None = None,
        architecture: str = "",
    ) -> Kernel:
        all_defines = dict(defines or {})
        if layout is not None:
            all_defines |= layout_defines(layout)
        return cls(source, function, tuple(sorted(all_defines.items())), architecture)

    def options(self) -> tuple[str, ...]:
        """What NVRTC is given, besides what CuPy adds."""
        defines = format_defines() | dict(self.defines)
        return (
            "--std=c++17",
            f"-I{cuda_source_dir()}",
            f"-DKVPACK_SOURCE_HASH=0x{source_hash()[:8]}",
            *(f"-D{name}={value}" for name, value in sorted(defines.items())),
            *((f"-arch={self.architecture}",) if self.architecture else ()),
        )

    def text(self) -> str:
        return (cuda_source_dir() / self.source).read_text(encoding="utf-8")


def require_device(device: torch.device) -> None:
    """Check that kernels can be compiled for and run on ``device``.

    Raises:
        DeviceError: no CUDA in torch, no driver, no CuPy, or a GPU before sm_80.
    """
    _check_device(device.type, device.index)


@cache
def _check_device(kind: str, index: int | None) -> None:
    advice = "pip install 'kvpack[cuda13]' (or [cuda12]) beside an NVIDIA driver, or use device='cpu'"
    if kind != "cuda":
        raise DeviceError(f"kernels run on CUDA devices, not on {kind!r}")
    if not torch.cuda.is_available():
        if torch.version.cuda is None:
            # pip keeps a torch that is there, whatever it is built for.
            raise DeviceError(f"torch {torch.__version__} is built without CUDA: pip uninstall torch, then {advice}")
        raise DeviceError(
            f"torch {torch.__version__} is built for CUDA {torch.version.cuda}, but finds no CUDA device: see whether "
            "`nvidia-smi` lists a GPU (if not, the driver is missing) and whether CUDA_VISIBLE_DEVICES hides it, or "
            "use device='cpu'"
        )
    if index is not None and index >= torch.cuda.device_count():
        raise DeviceError(f"there is no device cuda:{index}: torch finds {torch.cuda.device_count()}")
    capability = torch.cuda.get_device_capability(index)
    if capability < MIN_COMPUTE_CAPABILITY:
        raise DeviceError(
            f"{torch.cuda.get_device_name(index)} has compute capability {capability[0]}.{capability[1]}; kvpack's "
            f"kernels need {MIN_COMPUTE_CAPABILITY[0]}.{MIN_COMPUTE_CAPABILITY[1]} (Ampere) or newer; use device='cpu'"
        )
    try:
        import cupy

        cupy.cuda.runtime.getDeviceCount()
    except ImportError as error:
        raise DeviceError(f"CuPy cannot be imported ({error}): {advice}") from None
    except Exception as error:
        raise DeviceError(f"CuPy finds no usable CUDA device ({error}): {advice}") from None


_compile_lock = threading.Lock()
_loaded: dict[tuple[Kernel, int, int], _Loaded] = {}


@dataclass
class _Loaded:
    """A kernel of one device.

    Attributes:
        function: CuPy's; address: the driver's.
        shared_bytes: the most dynamic shared memory that has been allowed.
        arguments: packs values, eight bytes each; known when it is launched first.
    """

    function: Any
    address: int
    shared_bytes: int
    arguments: struct.Struct | None = None


def _load(kernel: Kernel, device: int, shared_bytes: int) -> _Loaded:
    """A kernel for the current device, with at least ``shared_bytes`` of dynamic shared memory allowed."""
    limit = 0 if shared_bytes <= _PLAIN_SHARED_BYTES else 1
    found = _loaded.get((kernel, device, limit))
    if found is not None and (not limit or found.shared_bytes >= shared_bytes):
        return found
    with _compile_lock:
        import cupy

        module = cupy.RawModule(code=kernel.text(), options=kernel.options())
        try:
            function = module.get_function(kernel.function)
            if limit:
                function.max_dynamic_shared_size_bytes = shared_bytes
            found = _Loaded(function, function.kernel.ptr, shared_bytes)
        except Exception as error:
            raise DeviceError(f"{kernel.source} cannot be made ready for cuda:{device}: {error}") from error
        _loaded[kernel, device, limit] = found
    return found


class _Slots(threading.local):
    """Where a thread puts a launch's arguments: each has eight bytes, whose addresses stay. The driver copies them.

    Attributes:
        values: the eight bytes of each.
        addresses: of the list of their addresses.
        devices: those whose context this thread has.
    """

    def __init__(self) -> None:
        self.values = (ctypes.c_uint64 * _MAX_ARGUMENTS)()
        first = ctypes.addressof(self.values)
        self._list = (ctypes.c_void_p * _MAX_ARGUMENTS)(*(first + 8 * i for i in range(_MAX_ARGUMENTS)))
        self.addresses = ctypes.addressof(self._list)
        self.devices: set[int] = set()


_slots = _Slots()


def _packing(arguments: Sequence[torch.Tensor | np.generic | None]) -> struct.Struct:
    """How a kernel's arguments are packed, from the types of those of its first launch."""
    formats = []
    for value in arguments:
        code = "Q" if value is None or isinstance(value, torch.Tensor) else _PACKED.get(type(value))
        if code is None:  # a Python int could be any of them
            raise TypeError(f"{value!r} is no kernel argument: tensors, NumPy scalars and None are")
        formats.append(code)
    if len(formats) > _MAX_ARGUMENTS:
        raise TypeError(f"{len(formats)} arguments; a launch takes {_MAX_ARGUMENTS}")
    return struct.Struct("<" + "".join(formats))


def launch(
    kernel: Kernel,
    grid: int | tuple[int, ...],
    block: int | tuple[int, ...],
    arguments: Sequence[torch.Tensor | np.generic | None],
    *,
    device: torch.device,
    shared_bytes: int = 0,
) -> None:
    """Launch on torch's current stream of ``device``, sampled now (a stream kept from earlier would miss a capture).

    The driver is asked directly: CuPy's own call takes longer than most kernels of one token (docs/DESIGN-NOTES.md).

    Args:
        arguments: tensors (passed as pointers; they must lie on the device), NumPy scalars of the parameters' exact
            types, None for a null pointer.
        shared_bytes: dynamic shared memory of a block.
    """
    dimensions, threads = (size if isinstance(size, tuple) else (size,) for size in (grid, block))
    if 0 in dimensions:
        return
    current = torch.cuda.current_device()
    index = current if device.index is None else device.index
    if index != current:  # torch's, which makes no context on the device that was current before, where there is none
        with torch.cuda.device(index):
            launch(kernel, grid, block, arguments, device=device, shared_bytes=shared_bytes)
        return
    found = _load(kernel, index, shared_bytes)
    if found.arguments is None:
        found.arguments = _packing(arguments)
    values = [
        value.data_ptr() if isinstance(value, torch.Tensor) else 0 if value is None else value for value in arguments
    ]
    slots = _slots
    if index not in slots.devices:
        _take_context()
        slots.devices.add(index)
    found.arguments.pack_into(slots.values, 0, *values)
    _launch_kernel()(
        found.address,
        *dimensions,
        *_ONES[len(dimensions)],
        *threads,
        *_ONES[len(threads)],
        shared_bytes,
        current_stream(index),
        slots.addresses,
        0,
    )


def current_stream(device: int) -> int:
    """The address of torch's current stream of a device; no object of torch's is made for it."""
    return torch._C._cuda_getCurrentRawStream(device)  # type: ignore[no-any-return]


@cache
def _launch_kernel() -> Callable[..., None]:
    """``cuLaunchKernel``, as CuPy has it."""
    import cupy

    return cupy.cuda.driver.launchKernel  # type: ignore[no-any-return]


def _take_context() -> None:
    """Have the current device's context be this thread's: the driver asks for one, the runtime takes it by itself."""
    import cupy

    cupy.cuda.runtime.memGetInfo()  # may be called during a capture, too
