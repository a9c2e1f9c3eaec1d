"""config.json of a folder with weights: what compress adds, decompress takes away, and readers check."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

from kvpack.errors import DirectoryIndexError
from kvpack.format.layout import VERSION

CONFIG_NAME = "config.json"
QUANTIZATION_KEY = "quantization_config"
# Where the original's own quantization_config is kept, to be put back by decompress.
ORIGINAL_KEY = "original"
# With which options the weights were compressed.
OPTIONS_KEY = "options"
# Whether the original has no config.json at all.
ADDED_KEY = "added"
METHOD = "kvpack"
# transformers takes the name of a model's file from this key. Where kvpack is not imported, it would load what it does
# not know as a model of random weights; a name that can be none makes it raise an error that quotes the name.
GUARD_KEY = "transformers_weights"
GUARD = "coded by kvpack: run `import kvpack` before from_pretrained (pip install kvpack)"
# Where the original's own value of that key is kept.
ORIGINAL_GUARD_KEY = "original_transformers_weights"
# A config.json with this key is diffusers', which knows no such name.
_DIFFUSERS_KEY = "_class_name"


def read_config(directory: Path) -> dict[str, Any]:
    """config.json of a model directory, {} if there is none.

    Raises:
        DirectoryIndexError: it is not a JSON object.
    """
    path = directory / CONFIG_NAME
    if not path.exists():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DirectoryIndexError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(config, dict):
        raise DirectoryIndexError(f"{path}: not a JSON object")
    return config


def compressed_config(
    config: Mapping[str, Any] | None, options: Mapping[str, Any], blob_bytes: Mapping[str, int]
) -> dict[str, Any]:
    """config.json of the compressed model: FORMAT.md §9.4. None: the original has none."""
    quantization: dict[str, Any] = {
        "quant_method": METHOD,
        "format_version": VERSION,
        OPTIONS_KEY: dict(options),
        "blob_bytes": dict(sorted(blob_bytes.items())),
    }
    if config is None:
        quantization[ADDED_KEY] = True
    elif QUANTIZATION_KEY in config:
        quantization[ORIGINAL_KEY] = config[QUANTIZATION_KEY]
    written = {**(config or {}), QUANTIZATION_KEY: quantization}
    if _DIFFUSERS_KEY not in written:
        if GUARD_KEY in written:
            quantization[ORIGINAL_GUARD_KEY] = written[GUARD_KEY]
        written[GUARD_KEY] = GUARD
    return written


def unguarded(value: object, quantization: Mapping[str, Any]) -> object:
    """What the key of the guard holds in the original; None if the original has none.

    Args:
        value: what it holds in the compressed model.
    """
    return quantization.get(ORIGINAL_GUARD_KEY) if value == GUARD else value


def _is_kvpack(quantization: object) -> TypeGuard[dict[str, Any]]:
    return isinstance(quantization, dict) and quantization.get("quant_method") == METHOD


def is_compressed(config: Mapping[str, Any]) -> bool:
    """Whether :func:`compressed_config` made it."""
    return _is_kvpack(config.get(QUANTIZATION_KEY))


def written_options(directory: Path) -> Any:
    """What config.json says of the options, as it stands there; None if it says nothing.

    Raises:
        DirectoryIndexError: config.json is not a JSON object.
    """
    quantization = read_config(directory).get(QUANTIZATION_KEY)
    return quantization.get(OPTIONS_KEY) if _is_kvpack(quantization) else None


def decompressed_config(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The inverse of :func:`compressed_config`; None if the original has no config.json."""
    restored = dict(config)
    quantization = restored.get(QUANTIZATION_KEY)
    if _is_kvpack(quantization):
        del restored[QUANTIZATION_KEY]
        file = unguarded(restored.pop(GUARD_KEY, None), quantization)
        if file is not None:
            restored[GUARD_KEY] = file
        if ORIGINAL_KEY in quantization:
            restored[QUANTIZATION_KEY] = quantization[ORIGINAL_KEY]
        elif quantization.get(ADDED_KEY) is True and not restored:
            return None
    return restored


def check_config(directory: Path, blob_bytes: Mapping[str, int], is_coded: bool) -> None:
    """Check what config.json says of a folder's coded tensors; nothing if it has no ``quantization_config``.

    Args:
        blob_bytes: coded tensor, named within the folder → length of its blob.
        is_coded: whether any file of the folder is one of kvpack's.

    Raises:
        DirectoryIndexError: it contradicts the files, or is of a version that this reader does not know.
    """
    quantization = read_config(directory).get(QUANTIZATION_KEY)
    where = f"{directory / CONFIG_NAME}: {QUANTIZATION_KEY}"
    if quantization is None:
        return
    if not _is_kvpack(quantization):
        if is_coded:
            method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
            raise DirectoryIndexError(
                f"{where} has quant_method {method!r}, but files of the folder are coded by kvpack: config.json is "
                "another model's, or the original's"
            )
        return
    version = quantization.get("format_version")
    if version != VERSION or isinstance(version, bool):
        raise DirectoryIndexError(f"{where} has format_version {version!r}, this reader knows {VERSION}")
    given = quantization.get("blob_bytes")
    if not isinstance(given, dict):
        raise DirectoryIndexError(f"{where} has no object blob_bytes")
    for name in sorted(given.keys() | blob_bytes.keys()):
        says, is_there = given.get(name), blob_bytes.get(name)
        if says != is_there or isinstance(says, bool | float):
            found = "no such tensor is coded" if is_there is None else f"its blob has {is_there}"
            raise DirectoryIndexError(f"{where}: blob_bytes of {name!r} is {says!r}, but {found}")
