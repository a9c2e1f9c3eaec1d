"""kvpack in transformers: ``from_pretrained`` on compressed models, and a cache and attention of quantized pages.

After ``import kvpack`` transformers knows all of it (``registration``). Nothing is imported before it is used.
"""

from __future__ import annotations

from typing import Any

_HOMES: dict[str, str] = {
    "KVPackCache": "kvpack.integrations.transformers.cache",
    "KVPackConfig": "kvpack.integrations.transformers.config",
    "KVPackQuantizer": "kvpack.integrations.transformers.quantizer",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'kvpack.integrations.transformers' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
