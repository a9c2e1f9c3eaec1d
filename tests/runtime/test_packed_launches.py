"""What the driver is given for a launch: addresses of eight bytes for each argument, on the thread that launches."""

from __future__ import annotations

import ctypes
import struct
import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from kvpack.runtime.device import kernels
from kvpack.runtime.device.kernels import Kernel

STREAM, ADDRESS = 0x5000, 0x7000
DEVICE = torch.device("cuda", 0)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[int, ...], list[bytes]]]:
    """All launches: what the driver is given but the arguments, and their bytes."""
    found = []

    def driver(*given: int) -> None:
        *shape, addresses, extra = given
        pointers = (ctypes.c_void_p * 4).from_address(addresses)
        found.append(((*shape, extra), [ctypes.string_at(pointer, 8) for pointer in pointers if pointer]))

    loaded = kernels._Loaded(None, ADDRESS, 0)
    monkeypatch.setattr(kernels, "_load", lambda *_: loaded)
    monkeypatch.setattr(kernels, "_launch_kernel", lambda: driver)
    monkeypatch.setattr(kernels, "_take_context", lambda: None)
    monkeypatch.setattr(kernels, "current_stream", lambda _: STREAM)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(kernels, "_slots", kernels._Slots())
    return found


def launch(*arguments: Any, grid: Any = (5, 6), block: Any = 32) -> None:
    kernels.launch(Kernel("a.cu", "a"), grid, block, arguments, device=DEVICE, shared_bytes=128)


def test_what_the_driver_is_given(launched: list[Any]) -> None:
    x = torch.arange(4)
    launch(x, np.uint32(4294967295), np.float32(-1.5), np.uint64(1 << 40))
    launch(None, np.uint32(7), np.float32(2), np.uint64(0), grid=3, block=(1, 2, 3))
    (shape, values), (later_shape, later) = launched
    assert shape == (ADDRESS, 5, 6, 1, 32, 1, 1, 128, STREAM, 0)
    assert later_shape == (ADDRESS, 3, 1, 1, 1, 2, 3, 128, STREAM, 0)
    assert values[0] == struct.pack("<Q", x.data_ptr())
    assert [values[1][:4], values[2][:4], values[3]] == [
        b"\xff" * 4,
        struct.pack("<f", -1.5),
        struct.pack("<Q", 1 << 40),
    ]
    assert later == [bytes(8), b"\7" + bytes(7), struct.pack("<f4x", 2), bytes(8)]


def test_parameters_are_tensors(launched: list[Any]) -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    launch(parameter, np.int32(-1), np.int64(-2), None)
    assert launched[0][1][0] == struct.pack("<Q", parameter.data_ptr())
    assert launched[0][1][1:3] == [b"\xff" * 4 + bytes(4), b"\xfe" + b"\xff" * 7]


@pytest.mark.parametrize("value", [3, 2.0, True, np.float64(1), "a"])
def test_what_is_no_argument(launched: list[Any], value: Any) -> None:
    with pytest.raises(TypeError, match="is no kernel argument"):
        launch(None, value)
    assert not launched


def test_a_number_that_its_type_does_not_hold(launched: list[Any]) -> None:
    launch(np.uint32(1))
    for value in (np.int64(-1), np.uint64(1 << 32), torch.zeros(1), np.float32(1.5)):
        with pytest.raises((struct.error, TypeError)):
            launch(value)
    assert len(launched) == 1


def test_as_many_arguments_as_there_is_room_for(launched: list[Any]) -> None:
    with pytest.raises(TypeError, match="65 arguments; a launch takes 64"):
        launch(*[None] * 65)
    launch(*[None] * 64)


def test_no_blocks_are_no_launch(launched: list[Any]) -> None:
    launch(None, grid=(4, 0))
    assert not launched


def test_threads_have_arguments_of_their_own(launched: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver gives Python's lock up before it has read them."""
    both, found, contexts = threading.Barrier(2), {}, []
    monkeypatch.setattr(kernels, "_take_context", lambda: contexts.append(threading.get_ident()))

    def driver(*given: int) -> None:
        both.wait(10)  # both have written their arguments
        pointer = ctypes.c_void_p.from_address(given[9]).value
        assert pointer is not None
        found[threading.current_thread().name] = ctypes.c_uint32.from_address(pointer).value
        both.wait(10)

    monkeypatch.setattr(kernels, "_launch_kernel", lambda: driver)
    kernels._load(SimpleNamespace(), 0, 0).arguments = struct.Struct("<I4x")
    threads = [threading.Thread(target=launch, args=(np.uint32(n),), name=str(n)) for n in (11, 22)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {"11": 11, "22": 22}
    assert len(set(contexts)) == 2
