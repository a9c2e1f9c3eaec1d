"""Operators that are given a number in place of a coded tensor: layers of one shape are one to ``torch.compile``.

The operators of :mod:`kvpack.runtime.weights.ops` take a blob whose length is its own, and its geometry as constants,
so that each layer is compiled for itself. These take a **handle**, i64 [] on the CPU, that names a module of this
process; what they compute differs by that number alone, which compiled code reads when it runs. A captured CUDA graph
keeps what the module was at the capture.
"""

from __future__ import annotations

import itertools
import secrets
from weakref import WeakValueDictionary

import torch
from torch import nn

from kvpack.errors import InputError

_LIBRARY = torch.library.Library("kvpack", "FRAGMENT")
_LIBRARY.define("linear_of(Tensor x, Tensor handle, int outputs, Tensor? bias) -> Tensor")
_LIBRARY.define("experts_of(Tensor x, Tensor ids, Tensor handle, int outputs) -> Tensor")
_LIBRARY.define("rows_of(Tensor ids, Tensor handle, int columns, ScalarType dtype) -> Tensor")

# Numbers of another process name nothing here: compiled code that had kept one would fail, not take another layer.
_numbers = itertools.count(secrets.randbits(40) << 20)
_modules: WeakValueDictionary[int, nn.Module] = WeakValueDictionary()


def new_handle(module: nn.Module) -> torch.Tensor:
    """A handle for a module, valid in this process as long as the module lives.

    Args:
        module: has ``product(x, bias)`` for ``linear_of``, ``product(x, ids)`` for ``experts_of``,
            ``look_up(ids, dtype)`` for ``rows_of``.

    Returns:
        i64 [] on the CPU.
    """
    number = next(_numbers)
    _modules[number] = module
    return torch.tensor(number, dtype=torch.int64, device="cpu")


def _module(handle: torch.Tensor) -> nn.Module:
    module = _modules.get(int(handle))
    if module is None:
        raise InputError(f"handle {int(handle)} names no coded layer of this process: another made it, or it is gone")
    return module


def _linear_of(x: torch.Tensor, handle: torch.Tensor, outputs: int, bias: torch.Tensor | None) -> torch.Tensor:
    out: torch.Tensor = _module(handle).product(x, bias)  # type: ignore[operator]
    return out


def _experts_of(x: torch.Tensor, ids: torch.Tensor, handle: torch.Tensor, outputs: int) -> torch.Tensor:
    out: torch.Tensor = _module(handle).product(x, ids)  # type: ignore[operator]
    return out


def _rows_of(ids: torch.Tensor, handle: torch.Tensor, columns: int, dtype: torch.dtype) -> torch.Tensor:
    out: torch.Tensor = _module(handle).look_up(ids, dtype)  # type: ignore[operator]
    return out


def _fake_linear_of(x: torch.Tensor, handle: torch.Tensor, outputs: int, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], outputs))


def _fake_experts_of(x: torch.Tensor, ids: torch.Tensor, handle: torch.Tensor, outputs: int) -> torch.Tensor:
    return x.new_empty((*ids.shape, outputs))


def _fake_rows_of(ids: torch.Tensor, handle: torch.Tensor, columns: int, dtype: torch.dtype) -> torch.Tensor:
    return ids.new_empty((*ids.shape, columns), dtype=dtype)


for _key in ("CPU", "CUDA"):
    _LIBRARY.impl("linear_of", _linear_of, _key)
    _LIBRARY.impl("experts_of", _experts_of, _key)
    _LIBRARY.impl("rows_of", _rows_of, _key)
torch.library.register_fake("kvpack::linear_of", _fake_linear_of, lib=_LIBRARY)
torch.library.register_fake("kvpack::experts_of", _fake_experts_of, lib=_LIBRARY)
torch.library.register_fake("kvpack::rows_of", _fake_rows_of, lib=_LIBRARY)
