"""Keys and values of layers in blocks of tokens that a table names, as vLLM's cache has them, and rows of tokens there.

The kernels that write and read pages find these rows by themselves (cuda/kv/token_rows.cuh); elsewhere they are
gathered, and put back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kvpack.errors import CacheInputError
from kvpack.format.layout import ceil_div
from kvpack.format.pages import Side
from kvpack.runtime.device.upload import sent
from kvpack.runtime.kv.page_table import Ints

_TYPES = (torch.float16, torch.bfloat16)
_ROW_ALIGNMENT_BYTES = 16  # kernels load so many at once


class BlockCache:
    """Keys and values of some layers.

    Args:
        keys, values: of each layer, [blocks, num_kv_heads, block_tokens, head_dim], fp16 or bf16. All layers have the
            same strides and the same distance from keys to values. Rows lie in one piece, at multiples of 16 bytes;
            any other strides do, so these may be views of [2, blocks, …], [blocks, 2, …], or of K and V side by side.

    Raises:
        CacheInputError: they are not.
    """

    def __init__(self, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
        k = keys[0]
        shapes = {(tuple(one.shape), one.stride(), one.dtype, one.device) for one in (*keys, *values)}
        apart_bytes = {b.data_ptr() - a.data_ptr() for a, b in zip(keys, values, strict=True)}
        if len(shapes) != 1 or len(apart_bytes) != 1 or k.dim() != 4:
            raise CacheInputError(
                f"keys and values of layers lie in blocks of different kinds: shapes, strides, types and devices "
                f"{sorted(map(str, shapes))}; values {sorted(apart_bytes)} bytes behind keys"
            )
        if k.dtype not in _TYPES:
            raise CacheInputError(f"keys and values in blocks are {k.dtype}; float16 and bfloat16 are possible")
        steps = [step * k.element_size() for size, step in zip(k.shape[:3], k.stride()[:3], strict=True) if size > 1]
        places = [*steps, *(one.data_ptr() for one in (*keys, *values))]
        if k.stride(3) != 1 or any(place % _ROW_ALIGNMENT_BYTES for place in places):
            raise CacheInputError(
                f"rows of keys and values in blocks must lie in one piece at multiples of {_ROW_ALIGNMENT_BYTES} "
                f"bytes; shape {tuple(k.shape)} has strides {k.stride()}"
            )
        self.keys, self.values = list(keys), list(values)
        self.blocks, self.heads, self.block_tokens, self.head_dim = k.shape
        self.dtype, self.device = k.dtype, k.device
        # Where each layer's first block begins, i64 [layers], in elements from the first layer's.
        apart = [(one.data_ptr() - k.data_ptr()) // k.element_size() for one in keys]
        self.layer_offsets = torch.tensor(apart, dtype=torch.int64, device=k.device)

    def of_side(self, side: Side) -> list[torch.Tensor]:
        """Of each layer."""
        return self.keys if side == Side.K else self.values

    def rows(self, block_ids: Sequence[int] | Ints, first: int, tokens: int) -> BlockRows:
        """Tokens ``first … first + tokens − 1`` of those whose blocks are given in their order.

        Raises:
            CacheInputError: as of :func:`checked_blocks`.
        """
        ids = checked_blocks(block_ids, first, tokens, self.block_tokens, self.blocks)
        return self.rows_in(ids, first % self.block_tokens, tokens)

    def rows_in(self, ids: Ints, skipped: int, tokens: int) -> BlockRows:
        """Tokens behind so many ``skipped`` ones of blocks whose ids have been checked."""
        return BlockRows(self, sent(ids.astype(np.int32), self.device), skipped, tokens)


def checked_blocks(block_ids: Sequence[int] | Ints, first: int, tokens: int, block_tokens: int, blocks: int) -> Ints:
    """Of a block table those ids, i64, whose blocks have the tokens ``first … first + tokens − 1``.

    Raises:
        CacheInputError: a negative number of tokens; the table does not reach so far, has an id that is none of
            ``blocks`` blocks, or one twice.
    """
    if first < 0 or tokens < 0:
        raise CacheInputError(f"{tokens} tokens from token {first} on of a block table; neither may be negative")
    begin, end = first // block_tokens, ceil_div(first + tokens, block_tokens)
    ids = np.asarray(block_ids[begin:end], np.int64)
    if len(ids) != end - begin:
        raise CacheInputError(f"a block table of {len(block_ids)} blocks; {end} are wanted")
    if len(ids) and (ids.min() < 0 or ids.max() >= blocks):
        raise CacheInputError(f"a block table has blocks {ids.min()} to {ids.max()}; the cache has {blocks} blocks")
    if len(np.unique(ids)) != len(ids):
        raise CacheInputError("a block table has a block twice")
    return ids


@dataclass(frozen=True)
class BlockRows:
    """Neighbouring tokens in blocks of a cache, the same ones in all layers.

    Attributes:
        ids: i32 [n], on the cache's device: blocks that the tokens are in, in the tokens' order.
        skipped: how many tokens of the first block come before them.
        tokens: how many they are.
    """

    cache: BlockCache
    ids: torch.Tensor
    skipped: int
    tokens: int

    def gathered(self, side: Side) -> torch.Tensor:
        """A copy: [layers, num_kv_heads, tokens, head_dim]."""
        found = torch.stack([layer[self.ids.long()] for layer in self.cache.of_side(side)])
        return found.transpose(1, 2).flatten(2, 3)[:, :, self.skipped : self.skipped + self.tokens]

    def put(self, side: Side, values: torch.Tensor) -> None:
        """The inverse of :meth:`gathered`."""
        token = torch.arange(self.skipped, self.skipped + self.tokens, device=self.cache.device)
        block, place = self.ids.long()[token // self.cache.block_tokens], token % self.cache.block_tokens
        for layer, of_layer in zip(self.cache.of_side(side), values, strict=True):
            layer[block, :, place] = of_layer.transpose(0, 1)
