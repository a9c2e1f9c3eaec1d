"""``kvpack.warmup``: compile now what the first requests would compile."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import nn

from kvpack.runtime.device import semaphores
from kvpack.runtime.weights.device_blob import DeviceBlob
from kvpack.runtime.weights.embedding import RansEmbedding
from kvpack.runtime.weights.experts import GroupedMatrices, grouped_products
from kvpack.runtime.weights.linear import RansLinear
from kvpack.runtime.weights.load import State

# One number of tokens for each kind of product: one vector, a few on tensor cores (three sizes; fp32 vectors are twice
# as many there), some with tiles that are decoded into shared memory (three sizes by gemm_wgmma.cu, one by
# gemm_mma.cu), many.
TOKENS = (1, 4, 8, 16, 32, 64, 128, 256, 257)
DTYPES = (torch.float16, torch.bfloat16)


def _blobs(target: nn.Module | State) -> Iterator[DeviceBlob]:
    if isinstance(target, State):
        yield from (t for t in target.values() if isinstance(t, DeviceBlob) and len(t.shape) == 2)
        return
    for module in target.modules():
        if isinstance(module, RansLinear) and not module.streamed and not module.weight_kvpack.is_meta:
            yield module.prepare()


def _embeddings(target: nn.Module | State) -> Iterator[RansEmbedding]:
    for module in () if isinstance(target, State) else target.modules():
        if isinstance(module, RansEmbedding) and not module.streamed and not module.weight_kvpack.is_meta:
            yield module


def _grouped(target: nn.Module | State) -> Iterator[tuple[GroupedMatrices, int]]:
    """Of each module of coded experts: its matrices, and how many experts a token has."""
    for module in () if isinstance(target, State) else target.modules():
        for matrices in grouped_products(module):
            yield matrices, getattr(getattr(module, "config", None), "num_experts_per_tok", None) or 1


def warmup(target: nn.Module | State, *, dtypes: Iterable[torch.dtype] = DTYPES, tokens: Iterable[int] = TOKENS) -> int:
    """Run each kind of coded layer once, so that neither a first request nor a CUDA graph's capture compiles.

    What has been compiled is kept on disk: the next process finds it. Streamed layers are left out.

    Args:
        target: a model with :class:`RansLinear` and :class:`RansEmbedding` layers, or what ``kvpack.load`` returned.
        dtypes: of the activations to come.
        tokens: how many at a time; the defaults reach every kernel.

    Returns:
        The number of products and look-ups that were run.
    """
    done: set[tuple[object, ...]] = set()
    devices: set[torch.device] = set()
    count = 0
    kinds, numbers = tuple(dtypes), tuple(tokens)
    for blob in _blobs(target):
        header = blob.header
        if header.layout.element_kind.is_integer and not len(blob.scales):
            continue  # plain integers are no weights
        kind = (header.layout, header.rows, header.cols, header.tile_cols, *blob.geometry[9:], blob.device)
        if kind in done:
            continue
        done.add(kind)
        devices.add(blob.device)
        for dtype in kinds:
            for number in numbers:
                blob.linear(torch.zeros(number, header.cols, dtype=dtype, device=blob.device))
                count += 1
    for embedding in _embeddings(target):
        embedding(torch.zeros(1, dtype=torch.int64, device=embedding.weight_kvpack.device))
        devices.add(embedding.weight_kvpack.device)
        count += 1
    for matrices, top_k in _grouped(target):
        blob = matrices.blobs[0][0]
        kind = (*(tuple(arguments[5]) for arguments in matrices.kinds), len(matrices.blobs), top_k, blob.device)
        if blob.device.type != "cuda" or kind in done:
            continue
        done.add(kind)
        for dtype in kinds:
            for number in numbers:
                x = torch.zeros(number, blob.header.cols, dtype=dtype, device=blob.device)
                matrices.linear(x, torch.arange(top_k, device=blob.device).expand(number, top_k))
                count += 1
    for device in devices:
        if device.type == "cuda":
            semaphores.prepare(device)
            torch.cuda.synchronize(device)
    return count
