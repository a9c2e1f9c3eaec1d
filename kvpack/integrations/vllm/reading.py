"""Tensors of compressed files for vLLM's loader, as views: of blobs nothing is read before it is asked for.

vLLM asks safetensors, which brings each tensor into memory whole: every rank would read all of a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from kvpack.encode.model_config import is_compressed, read_config
from kvpack.errors import NotSupportedError
from kvpack.format.container import BLOB_SUFFIX, Container
from kvpack.integrations.vllm.arriving import read_ahead, read_as_asked
from kvpack.runtime.weights.load import TORCH_DTYPES


def _nothing(model: nn.Module) -> None:
    pass


_check_layers: Callable[[nn.Module], None] = _nothing


def mapped_tensors(files: Iterable[str], *, check_all: bool = True) -> Iterator[tuple[str, torch.Tensor]]:
    """All stored tensors of safetensors files: (name, a view of the file). Blobs have CRCs of their own, by tile.

    Args:
        check_all: whether plain tensors of more than 1 MiB are compared with their CRCs, and so read whole; smaller
            ones are, and what stands beside blobs.

    Raises:
        ContainerError: a file breaks a rule of FORMAT.md §9, or a tensor is damaged.
        NotSupportedError: a tensor of a type that torch does not have.
    """
    for file in sorted(files):
        with Container(file) as container:
            if not container.tensors:
                continue
            data = torch.from_numpy(np.memmap(file, np.uint8, mode="c"))
            read_as_asked(memoryview(data.numpy().data))
            for tensor in container.tensors.values():
                begin = container.data_begin + tensor.begin
                part = data[begin : begin + tensor.size_bytes]
                dtype = TORCH_DTYPES.get(tensor.dtype)
                if dtype is None:
                    raise NotSupportedError(f"{file}: {tensor.name} is {tensor.dtype}, which vLLM cannot load")
                if not tensor.name.endswith(BLOB_SUFFIX) and (check_all or tensor.size_bytes <= _SMALL_BYTES):
                    view = memoryview(part.numpy().data)
                    read_ahead(view)
                    container.check_crc32(tensor.name, view)
                if part.storage_offset() % dtype.itemsize:
                    part = part.clone()
                yield tensor.name, part.view(dtype).reshape(tensor.shape)


def _is_kvpack(files: Iterable[str]) -> bool:
    return all(is_compressed(read_config(folder)) for folder in {Path(file).parent for file in files})


_SMALL_BYTES = 1 << 20


def read_as_needed(check_layers: Callable[[nn.Module], None]) -> None:
    """Have vLLM's loader take :func:`mapped_tensors` for compressed models; others are read as they were.

    Of several ranks the first one compares large plain tensors with their CRCs.

    Args:
        check_layers: called with a compressed model before it is read; the newest one counts.
    """
    global _check_layers
    _check_layers = check_layers
    from vllm.model_executor.model_loader import default_loader

    usual = default_loader.safetensors_weights_iterator
    if getattr(usual, "is_kvpack", False):
        return
    loader: Any = default_loader.DefaultModelLoader
    usual_weights = loader.get_all_weights
    read: list[nn.Module] = []  # the model, while it is

    def get_all_weights(self: Any, model_config: Any, model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        read.append(model)
        try:
            yield from usual_weights(self, model_config, model)
        finally:
            read.remove(model)

    def weights_iterator(hf_weights_files: list[str], *args: Any, **options: Any) -> Iterator[tuple[str, torch.Tensor]]:
        if hf_weights_files and _is_kvpack(hf_weights_files):
            from vllm.distributed import get_tensor_model_parallel_rank

            _check_layers(read[-1])
            return mapped_tensors(hf_weights_files, check_all=get_tensor_model_parallel_rank() == 0)
        return usual(hf_weights_files, *args, **options)  # type: ignore[no-any-return]

    weights_iterator.is_kvpack = True  # type: ignore[attr-defined]
    default_loader.safetensors_weights_iterator = weights_iterator
    loader.get_all_weights = get_all_weights
