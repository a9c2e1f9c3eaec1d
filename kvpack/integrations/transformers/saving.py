"""``save_pretrained`` of a model with coded layers: what it writes is a compressed directory like any other."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import tempfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.core_model_loading import WeightRenaming

from kvpack.encode.model_config import CONFIG_NAME, GUARD, GUARD_KEY
from kvpack.encode.model_tree import is_index_name
from kvpack.format.container import (
    BLOB_SUFFIX,
    CONTAINER_VERSION,
    CRC_KEY,
    NUMBER_DTYPES,
    PART_SUFFIXES,
    TENSORS_KEY,
    VERSION_KEY,
)
from kvpack.runtime.weights.coded_matrix import PARTS, CodedMatrix
from kvpack.runtime.weights.load import TORCH_DTYPES

_PIECE_BYTES = 16 << 20
# In the metadata of files that transformers has written, until finish() has completed them.
_UNFINISHED = "kvpack_unfinished"
_SHARD_NUMBER = re.compile(r"-\d{5}-of-\d{5}(?=\.safetensors$)")
_DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


class SavePretrained:
    """``save_pretrained`` of one model: transformers' own, and then :func:`finish`.

    An attribute of the model, in front of the class's method; ``push_to_hub`` comes here too.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, save_directory: str | os.PathLike[str], *args: Any, **options: Any) -> None:
        model, directory = self.model, Path(save_directory)
        push = options.pop("push_to_hub", False)
        type(model).save_pretrained(model, save_directory, *args, **options)
        # None where only adapters are saved, or where another process writes.
        if files := [file for file in sorted(directory.glob("*.safetensors")) if _is_unfinished(file)]:
            finish(directory, files, model.config.quantization_config.to_dict())
            _remove_former(directory, files)
        if push:
            known = ("commit_message", "token", "create_pr", "max_shard_size", "revision", "private")
            repo_id = options.get("repo_id", directory.name)
            model.push_to_hub(repo_id, **{key: options[key] for key in known if key in options})


def _is_unfinished(path: Path) -> bool:
    try:
        with safe_open(path, "pt") as file:
            return _UNFINISHED in (file.metadata() or {})
    except SafetensorError:  # anything else that lies there
        return False


def _remove_former(directory: Path, files: Sequence[Path]) -> None:
    """What readers would take in place of these files, or miss.

    transformers removes the shards of an earlier save, but no index that names them, and no single file.
    """
    for path in list(directory.iterdir()):
        if is_index_name(path.name):
            shards = json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()
            if not all((directory / shard).exists() for shard in shards):
                path.unlink()
    for file in files:
        single = _SHARD_NUMBER.sub("", file.name)
        if single != file.name:
            (directory / single).unlink(missing_ok=True)


def coded_layers(model: torch.nn.Module) -> dict[str, CodedMatrix]:
    """Name in the model → coded layer, each once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, CodedMatrix)}


def saved_name(name: str, layer: CodedMatrix) -> str:
    """Of a layer's weight in a file: as in the file that it came from."""
    return layer.tensor_name or f"{name}.weight"


def saved_state_dict(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The model's state dict with each coded weight once, be it that of an embedding and of an output layer."""
    state: dict[str, torch.Tensor] = model.state_dict()
    seen: set[str] = set()
    for name, layer in coded_layers(model).items():
        saved = saved_name(name, layer)
        if saved in seen:
            for part in PARTS:
                state.pop(f"{name}.{part}", None)
        seen.add(saved)
    return state


class SavedNames(WeightRenaming):  # type: ignore[misc]
    """Gives coded tensors their files' names when a model is saved, and all others the names that transformers gives.

    Args:
        own: transformers' renamings that a checkpoint was loaded with.
    """

    def __init__(self, model: torch.nn.Module, own: Iterable[WeightRenaming]) -> None:
        super().__init__("kvpack", "kvpack")
        self.model = model
        self.own = list(own)

    def reverse_transform(self) -> _ReversedNames:
        return _ReversedNames(self)


class _ReversedNames(WeightRenaming):  # type: ignore[misc]
    def __init__(self, names: SavedNames) -> None:
        super().__init__("kvpack", "kvpack")
        self.own = [renaming.reverse_transform() for renaming in reversed(names.own)]
        self.coded: dict[str, str] = {}
        for name, layer in coded_layers(names.model).items():
            for key, suffix in zip(PARTS, PART_SUFFIXES, strict=True):
                self.coded[f"{name}.{key}"] = saved_name(name, layer) + suffix

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        if source_key in self.coded:
            return self.coded[source_key], None
        key = source_key
        for renaming in self.own:
            key, _ = renaming.rename_source_key(key)
        return key, None


def metadata_of(model: torch.nn.Module, entries: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """``__metadata__`` of a file with all tensors of a model: FORMAT.md §9.3.

    The CRCs are not the tensors' own yet: :func:`finish` computes those when the files are written.

    Args:
        entries: coded tensor → its entry in the file that it came from.
    """
    coded: dict[str, Any] = {}
    crcs: dict[str, int] = {}
    for name, layer in coded_layers(model).items():
        saved = saved_name(name, layer)
        known = {"shape": list(layer.weight_shape), "dtype": _DTYPE_NAMES[layer.weight_dtype]}
        coded[saved] = {**entries.get(saved, {}), **known}
        crcs |= {saved + suffix: _WIDEST_CRC for suffix in NUMBER_DTYPES}
    crcs |= dict.fromkeys(model.state_dict(), _WIDEST_CRC)
    metadata = {VERSION_KEY: CONTAINER_VERSION, TENSORS_KEY: json.dumps(coded), CRC_KEY: json.dumps(crcs)}
    return metadata | {_UNFINISHED: ""}


# Takes the room that a CRC will need.
_WIDEST_CRC = (1 << 32) - 1


def finish(directory: Path, files: Iterable[Path], quantization: Mapping[str, Any]) -> None:
    """Complete what transformers has written: each file's own metadata and CRCs, and config.json.

    Args:
        quantization: config.json's ``quantization_config``, but for ``blob_bytes``.
    """
    blob_bytes: dict[str, int] = {}
    for file in files:
        blob_bytes |= _finish_file(file)
    path = directory / CONFIG_NAME
    config = json.loads(path.read_text(encoding="utf-8"))
    config["quantization_config"] = {**quantization, "blob_bytes": dict(sorted(blob_bytes.items()))}
    config[GUARD_KEY] = GUARD
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _finish_file(path: Path) -> dict[str, int]:
    """Write one file's header anew, in the room that it has. Returns the lengths of the file's blobs."""
    with path.open("r+b") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header: dict[str, Any] = json.loads(file.read(size))
        metadata = header.pop("__metadata__")
        del metadata[_UNFINISHED]
        entries = json.loads(metadata[TENSORS_KEY])
        here = {name: entry for name, entry in sorted(entries.items()) if name + BLOB_SUFFIX in header}
        crcs: dict[str, int] = {}
        for name, tensor in sorted(header.items()):
            if name.removesuffix(BLOB_SUFFIX) not in here:
                begin, end = tensor["data_offsets"]
                crcs[name] = _crc32(file, 8 + size + begin, end - begin)
        metadata |= {
            TENSORS_KEY: json.dumps(here, separators=(",", ":"), ensure_ascii=False),
            CRC_KEY: json.dumps(crcs, separators=(",", ":"), ensure_ascii=False),
        }
        in_order = dict(sorted(header.items(), key=lambda item: item[1]["data_offsets"]))
        written = {"__metadata__": dict(sorted(metadata.items())), **in_order}
        text = json.dumps(written, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= size:
            file.seek(8)
            file.write(text.ljust(size))
            return {name: header[name + BLOB_SUFFIX]["shape"][0] for name in here}
        # A converter of transformers has made more tensors than the model has: the data must move.
        file.seek(8 + size)
        text = text.ljust(-(-(8 + len(text)) // 64) * 64 - 8)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as longer:
            longer.write(struct.pack("<Q", len(text)) + text)
            shutil.copyfileobj(file, longer, _PIECE_BYTES)
    Path(longer.name).chmod(path.stat().st_mode)
    Path(longer.name).replace(path)
    return {name: header[name + BLOB_SUFFIX]["shape"][0] for name in here}


def _crc32(file: Any, begin: int, size_bytes: int) -> int:
    file.seek(begin)
    crc = 0
    while size_bytes:
        piece = file.read(min(size_bytes, _PIECE_BYTES))
        crc, size_bytes = zlib.crc32(piece, crc), size_bytes - len(piece)
    return crc
