"""What ``kvpack.decompress`` does: ordinary safetensors again, a tensor at a time.

Outputs are written beside their place and renamed at the end, files and directories alike.
"""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kvpack.encode.blob_decoder import check_expansion
from kvpack.encode.dtypes import FLOAT_NAMES, LOSSY_DTYPES, NUMPY_DTYPES
from kvpack.encode.model_config import CONFIG_NAME, decompressed_config, is_compressed, read_config
from kvpack.encode.model_directory import (
    copy_files,
    directory_in_place,
    refuse_other_files,
    size_bytes,
    write_json,
)
from kvpack.encode.model_tree import ModelTree, WeightFile
from kvpack.encode.output_files import Crc32, Shard, check_target, pieces, write_indexes
from kvpack.encode.progress import Progress
from kvpack.encode.reader import Reader
from kvpack.errors import InputError
from kvpack.format.container import (
    BLOB_SUFFIX,
    CRC_KEY,
    NUMBER_DTYPES,
    TENSORS_KEY,
    VERSION_KEY,
    ContainerWriter,
)


@dataclass
class DecompressReport:
    """What a decompression gave. ``left_out`` names what is no part of a model: hidden files, broken links."""

    input: str
    output: str
    input_bytes: int
    output_bytes: int
    tensors: int
    seconds: float
    left_out: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return {"ok": True, **asdict(self)}


def decompress(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    dtype: str = "original",
    threads: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
    max_elements: int | None = None,
) -> DecompressReport:
    """Write a compressed file or directory back as ordinary safetensors.

    Args:
        dtype: ``original``, or a float dtype for all coded float tensors (kept ones stay as they are).
        max_elements: refuse files whose coded tensors have more, all together (default: max(2^28, 256 × their bytes)).

    Raises:
        InputError, FormatError, OSError: as for :func:`compress`.
    """
    began = time.perf_counter()
    progress = progress or Progress()
    source, target = Path(path), Path(out)
    check_target(source, target, force=force)
    if dtype != "original" and dtype not in FLOAT_NAMES:
        raise InputError(f"dtype {dtype!r}: there are original, {', '.join(FLOAT_NAMES)}")
    with Reader(source, threads=threads, max_elements=max_elements, without=target) as reader:
        for container in reader.containers:
            check_expansion(container, max_elements)
        tree = reader.tree
        total = sum(t.size_bytes for c in reader.containers for t in c.tensors.values())
        if source.is_dir():
            configs = _decompressed_configs(tree)
            carried = [file for file in tree.others if file not in configs]
            progress.total(total + sum((source / file).stat().st_size for file in carried))
            written = [file for file, config in configs.items() if config is not None]
            written += [*carried, *(file.path for file in tree.weight_files), *(index.path for index in tree.indexes)]
            refuse_other_files(target, written)
            with directory_in_place(target) as temporary:
                shards = [
                    _decompress_file(reader, file, temporary / file.path, dtype, progress) for file in tree.weight_files
                ]
                write_indexes(temporary, tree, shards, [])
                for file, config in configs.items():
                    if config is not None:
                        write_json(temporary / file, config)
                copy_files(source, temporary, carried, progress.advance)
        else:
            progress.total(total)
            _decompress_file(reader, tree.weight_files[0], target, dtype, progress)
        tensors = len(reader)
        left_out = [str(file) for file in tree.passed_over]
    return DecompressReport(
        input=str(source),
        output=str(target),
        input_bytes=size_bytes(source),
        output_bytes=size_bytes(target),
        tensors=tensors,
        left_out=left_out,
        seconds=round(time.perf_counter() - began, 3),
    )


def _decompressed_configs(tree: ModelTree) -> dict[Path, dict[str, Any] | None]:
    """Each config.json that compress has changed, as it was; None where there was none."""
    configs = {folder / CONFIG_NAME: read_config(tree.path / folder) for folder in tree.folders}
    return {path: decompressed_config(config) for path, config in configs.items() if is_compressed(config)}


def _decompress_file(reader: Reader, file: WeightFile, target: Path, dtype: str, progress: Progress) -> Shard:
    container, shard = file.container, Shard(file.path)
    own_names = {name: own for own, name in file.names.items()}
    target.parent.mkdir(parents=True, exist_ok=True)

    def stored_dtype(name: str) -> str:
        entry = container.coded.get(name)
        if entry is None:
            return container.tensors[name].dtype
        own = str(entry["dtype"])
        return FLOAT_NAMES[dtype] if dtype != "original" and own in LOSSY_DTYPES else own

    def alignment(name: str) -> int:
        known = NUMPY_DTYPES.get(stored_dtype(name))
        return known.itemsize if known is not None else 1

    with ContainerWriter(target) as writer:
        for name in sorted(container.original_names(), key=lambda name: (-alignment(name), name)):
            progress.tensor(name)
            if name in container.coded:
                for suffix in NUMBER_DTYPES:
                    container.check_crc32(name + suffix)
                own = container.coded[name]["dtype"] == stored_dtype(name)
                values = np.ascontiguousarray(reader.dequantize(name, "original" if own else dtype))
                size, done = values.nbytes, container.tensors[name + BLOB_SUFFIX].size_bytes
                writer.add(
                    own_names[name], stored_dtype(name), values.shape, pieces(values.view(np.uint8).reshape(-1).data)
                )
            else:
                computed = Crc32(container.pieces(name))
                size, done = container.tensors[name].size_bytes, container.tensors[name].size_bytes
                writer.add(own_names[name], stored_dtype(name), container.tensors[name].shape, computed)
                container.compare_crc32(name, computed.value)
            shard.add(own_names[name], own_names[name], size)
            progress.advance(done)
        own_keys = (VERSION_KEY, TENSORS_KEY, CRC_KEY) if VERSION_KEY in container.metadata else ()
        writer.finish({k: v for k, v in container.metadata.items() if k not in own_keys})
    return shard
