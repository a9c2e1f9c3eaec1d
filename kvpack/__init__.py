"""kvpack: LLM weights and KV caches, entropy-coded and computed on in place.

>>> import kvpack
>>> sorted(kvpack.__all__)
['Reader', '__version__', 'compress', 'decompress', 'open', 'verify']

Names are loaded when first used, so that ``import kvpack`` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvpack._version import __version__

if TYPE_CHECKING:
    from kvpack.encode.pipeline import compress, decompress
    from kvpack.encode.reader import Reader
    from kvpack.encode.reader import Reader as open  # noqa: N813
    from kvpack.encode.verify import verify

__all__ = ["Reader", "__version__", "compress", "decompress", "open", "verify"]

_HOMES = {
    "compress": ("kvpack.encode.pipeline", "compress"),
    "decompress": ("kvpack.encode.pipeline", "decompress"),
    "open": ("kvpack.encode.reader", "Reader"),
    "Reader": ("kvpack.encode.reader", "Reader"),
    "verify": ("kvpack.encode.verify", "verify"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'kvpack' has no attribute {name!r}")
    import importlib

    module, attribute = _HOMES[name]
    return getattr(importlib.import_module(module), attribute)
