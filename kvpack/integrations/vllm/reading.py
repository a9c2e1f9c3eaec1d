"""Tensors of compressed files for vLLM's loader, as views: of blobs nothing is read before it is asked for.

vLLM asks safetensors, which brings each tensor into memory whole: every rank would read all of a model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvpack.encode.model_config import is_compressed, read_config
from kvpack.format.container import Container
from kvpack.runtime.weights.load import TORCH_DTYPES


def mapped_tensors(files: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """All stored tensors of safetensors files: (name, a view of the file).

    Raises:
        ContainerError: a file breaks a rule of FORMAT.md §9.
    """
    for file in sorted(files):
        with Container(file) as container:
            stored, begin = list(container.tensors.values()), container.data_begin
        if not stored:
            continue
        data = torch.from_numpy(np.memmap(file, np.uint8, mode="c"))
        for tensor in stored:
            part = data[begin + tensor.begin : begin + tensor.end]
            dtype = TORCH_DTYPES[tensor.dtype]
            if part.storage_offset() % dtype.itemsize:
                part = part.clone()
            yield tensor.name, part.view(dtype).reshape(tensor.shape)


def _is_kvpack(files: Iterable[str]) -> bool:
    return all(is_compressed(read_config(folder)) for folder in {Path(file).parent for file in files})


def read_as_needed() -> None:
    """Have vLLM's loader take :func:`mapped_tensors` for compressed models; others are read as they were."""
    from vllm.model_executor.model_loader import default_loader

    usual = default_loader.safetensors_weights_iterator
    if getattr(usual, "is_kvpack", False):
        return

    def weights_iterator(hf_weights_files: list[str], *args: Any, **options: Any) -> Iterator[tuple[str, torch.Tensor]]:
        if hf_weights_files and _is_kvpack(hf_weights_files):
            return mapped_tensors(hf_weights_files)
        return usual(hf_weights_files, *args, **options)  # type: ignore[no-any-return]

    weights_iterator.is_kvpack = True  # type: ignore[attr-defined]
    default_loader.safetensors_weights_iterator = weights_iterator
