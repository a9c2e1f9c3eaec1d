"""``kvpack inspect``: a description of a compressed file or directory, without decoding it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from kvpack.encode.model_tree import WeightFile
from kvpack.encode.reader import Reader
from kvpack.errors import InputError


def _describe_tensor(reader: Reader, name: str) -> dict[str, Any]:
    info = reader.info(name)
    if info is None:
        kept = reader.container(name).tensors[name]
        elements = math.prod(kept.shape)
        return {
            "name": name,
            "shape": list(kept.shape),
            "dtype": kept.dtype,
            "method": "keep",
            "layout": None,
            "quantizer": None,
            "bits_per_weight": 8 * kept.size_bytes / elements if elements else 0.0,
            "entropy_bits": None,
            "noise_db": None,
            "outliers": 0,
        }
    return {
        "name": name,
        "shape": list(info.shape),
        "dtype": info.dtype,
        "method": info.method,
        "layout": info.layout,
        "quantizer": info.header.layout.quantizer.name.lower() if info.num_scales else None,
        "bits_per_weight": round(info.bits_per_weight, 6),
        "entropy_bits": info.entropy_bits,
        "noise_db": info.noise_db,
        "outliers": info.outliers,
        "element_bits": info.header.layout.element_bits,
        "raw_bits": info.header.layout.raw_bits,
        "tile_cols": info.header.tile_cols,
        "tiles": info.header.num_tiles,
        "tables": info.header.num_tables,
        "transposed": info.header.transposed,
        "tensor_parallel": info.tensor_parallel,
        "scales": info.num_scales,
        "column_scales": info.has_column_scales,
        "row_offsets": info.has_row_offsets,
        "expected_kl": info.expected_kl,
    }


def _describe_file(file: WeightFile) -> dict[str, Any]:
    """Which tensors are in a file, by what their names begin with, and why it is no part of its folder's model."""
    return {"path": str(file.path), "prefix": file.set_prefix, "tensors": len(file.names), "reason": file.reason}


def describe(path: str | Path, tensor: str | None = None) -> dict[str, Any]:
    """What ``kvpack inspect --json`` prints.

    Raises:
        InputError: there is no tensor of that name.
        FormatError: the file is damaged.
    """
    with Reader(path) as reader:
        if tensor is not None and tensor not in reader:
            raise InputError(f"{path} has no tensor {tensor!r}")
        names = reader.keys() if tensor is None else [tensor]
        tensors = [_describe_tensor(reader, name) for name in names]
        output_bytes = sum(container.path.stat().st_size for container in reader.containers)
        sets = [_describe_file(file) for file in reader.tree.weight_files]
    coded = [t for t in tensors if t["method"] != "keep"]
    weights = sum(math.prod(t["shape"]) for t in coded)
    noisy = [t for t in coded if t["noise_db"] is not None]
    noise = sum(math.prod(t["shape"]) * 10 ** (t["noise_db"] / 10) for t in noisy)
    noisy_weights = sum(math.prod(t["shape"]) for t in noisy)
    total_bits = sum(math.prod(t["shape"]) * t["bits_per_weight"] for t in coded)
    return {
        "ok": True,
        "input": str(path),
        "output_bytes": output_bytes,
        "coded": len(coded),
        "bits_per_weight": round(total_bits / weights, 6) if weights else None,
        "noise_db": round(10 * math.log10(noise / noisy_weights), 4) if noise > 0 else None,
        "files": sets,
        "tensors": tensors,
    }
