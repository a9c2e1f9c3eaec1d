"""What ``kvpack.decompress`` does: ordinary safetensors again, a tensor at a time.

Outputs are written beside their place and renamed at the end, files and directories alike.
"""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kvpack.encode.blob_decoder import check_expansion
from kvpack.encode.dtypes import FLOAT_NAMES, LOSSY_DTYPES, NUMPY_DTYPES
from kvpack.encode.model_directory import (
    CONFIG_NAME,
    copy_files,
    decompressed_config,
    directory_in_place,
    other_files,
    read_config,
    refuse_other_files,
    size_bytes,
    write_json,
)
from kvpack.encode.output_files import Crc32, Shard, check_target, pieces, write_shard_index
from kvpack.encode.progress import Progress
from kvpack.encode.reader import INDEX_NAME, Reader
from kvpack.errors import InputError
from kvpack.format.container import (
    BLOB_SUFFIX,
    CRC_KEY,
    SCALE_SUFFIX,
    TENSORS_KEY,
    VERSION_KEY,
    Container,
    ContainerWriter,
)


@dataclass
class DecompressReport:
    """What a decompression gave."""

    input: str
    output: str
    input_bytes: int
    output_bytes: int
    tensors: int
    seconds: float

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
    with Reader(source, threads=threads, max_elements=max_elements) as reader:
        for container in reader.containers:
            check_expansion(container, max_elements)
        progress.total(sum(t.size_bytes for c in reader.containers for t in c.tensors.values()))
        if source.is_dir():
            carried, _ = other_files(source, target)
            config = decompressed_config(read_config(source))
            refuse_other_files(
                target,
                [*([Path(CONFIG_NAME)] if config else []), *(Path(c.path.name) for c in reader.containers), *carried],
            )
            with directory_in_place(target) as temporary:
                shards = [
                    _decompress_container(reader, container, temporary / container.path.name, dtype, progress)
                    for container in reader.containers
                ]
                if (source / INDEX_NAME).exists():
                    write_shard_index(temporary, shards)
                if config:
                    write_json(temporary / CONFIG_NAME, config)
                copy_files(source, temporary, carried)
        else:
            _decompress_container(reader, reader.containers[0], target, dtype, progress)
        tensors = len(reader)
    return DecompressReport(
        input=str(source),
        output=str(target),
        input_bytes=size_bytes(source),
        output_bytes=size_bytes(target),
        tensors=tensors,
        seconds=round(time.perf_counter() - began, 3),
    )


def _decompress_container(reader: Reader, container: Container, target: Path, dtype: str, progress: Progress) -> Shard:
    shard = Shard(target.name, [], 0, {})

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
                container.check_crc32(name + SCALE_SUFFIX)
                own = container.coded[name]["dtype"] == stored_dtype(name)
                values = np.ascontiguousarray(reader.dequantize(name, "original" if own else dtype))
                size, done = values.nbytes, container.tensors[name + BLOB_SUFFIX].size_bytes
                writer.add(name, stored_dtype(name), values.shape, pieces(values.view(np.uint8).reshape(-1).data))
            else:
                computed = Crc32(container.pieces(name))
                size, done = container.tensors[name].size_bytes, container.tensors[name].size_bytes
                writer.add(name, stored_dtype(name), container.tensors[name].shape, computed)
                container.compare_crc32(name, computed.value)
            shard.stored_names.append(name)
            shard.stored_bytes += size
            progress.advance(done)
        own_keys = (VERSION_KEY, TENSORS_KEY, CRC_KEY) if VERSION_KEY in container.metadata else ()
        writer.finish({k: v for k, v in container.metadata.items() if k not in own_keys})
    return shard
