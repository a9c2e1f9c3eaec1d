"""Keys and values in vLLM's cache ⇄ kvpack's pages, on the device where they lie.

vLLM's cache of a layer is [blocks, heads, tokens of a block, K and then V]; the attention of CPUs has another order in
a block's head (:mod:`~kvpack.integrations.vllm.cpu_block_order`). A page is 64 tokens of a request, wherever its blocks
begin and end.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from kvpack.errors import CacheInputError
from kvpack.format.layout import ceil_div
from kvpack.format.pages import PAGE_TOKENS, PageFormat, Side
from kvpack.runtime.kv.cache import KVCache
from kvpack.runtime.kv.page_kernels import left_out, new_status, quantize_pages, read_tokens, write_tokens
from kvpack.runtime.kv.run_coder import BlockSizes, Formats


class PagedLayers:
    """vLLM's KV cache, a tensor for each layer.

    Args:
        layers: [kernel blocks, heads, tokens of a kernel block, 2·head_dim] each, fp16 or bf16, of any strides.
        block_tokens: tokens of a block as the scheduler counts them; it consists of one or more kernel blocks.
        places: i64 [tokens of a kernel block, 2·head_dim], on the layers' device: where among the elements of a block's
            head each of a token's lies, K before V. None: in that order.

    Raises:
        CacheInputError: layers of different shapes, or no keys and values of such blocks.
    """

    def __init__(self, layers: Sequence[torch.Tensor], block_tokens: int, places: torch.Tensor | None = None) -> None:
        shapes = {tuple(layer.shape[1:]) for layer in layers}
        dtypes = {layer.dtype for layer in layers}
        if len(shapes) != 1 or len(dtypes) != 1 or any(layer.dim() != 4 for layer in layers):
            raise CacheInputError(f"layers of different kinds: shapes {sorted(shapes)}, types {dtypes}")
        (self.dtype,), ((self.heads, self.kernel_tokens, width),) = dtypes, shapes
        if width % 2 or block_tokens % self.kernel_tokens:
            raise CacheInputError(f"blocks are {(self.heads, self.kernel_tokens, width)}; no K and V of {block_tokens}")
        self.layers, self.block_tokens, self.head_dim = list(layers), block_tokens, width // 2
        self.device = layers[0].device
        self._places = places

    def _kernel_blocks(self, block_ids: Sequence[int], first: int, end: int) -> torch.Tensor:
        """i64 [n]: those that tokens ``first … end − 1`` of a request are in."""
        index = np.arange(first // self.kernel_tokens, ceil_div(end, self.kernel_tokens))
        split = self.block_tokens // self.kernel_tokens
        ids = torch.from_numpy(np.asarray(block_ids, np.int64)[index // split] * split + index % split)
        return ids.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else ids

    def copy_out(self, block_ids: Sequence[int], first: int, end: int) -> torch.Tensor:
        """A copy of the kernel blocks that these tokens are in, as they are: [layers, n, heads, tokens, 2·head_dim]."""
        ids = self._kernel_blocks(block_ids, first, end)
        shape = (len(self.layers), len(ids), *self.layers[0].shape[1:])
        out = torch.empty(shape, dtype=self.dtype, device=self.device)
        for layer, target in zip(self.layers, out, strict=True):
            torch.index_select(layer, 0, ids, out=target)
        return out

    def tokens_of(self, blocks: torch.Tensor, first: int, end: int) -> torch.Tensor:
        """The tokens ``first … end − 1`` that :meth:`copy_out` was given: [layers, tokens, heads, 2·head_dim]."""
        if self._places is not None:
            blocks = blocks.flatten(3)[..., self._places]
        skipped = first % self.kernel_tokens
        return blocks.transpose(2, 3).flatten(1, 2)[:, skipped : skipped + end - first]

    def put(self, values: torch.Tensor, block_ids: Sequence[int], first: int, end: int) -> None:
        """Put keys and values [layers, tokens, heads, 2·head_dim] where these tokens', of whole kernel blocks, are."""
        assert first % self.kernel_tokens == 0
        assert end % self.kernel_tokens == 0
        ids = self._kernel_blocks(block_ids, first, end)
        blocks = values.unflatten(1, (-1, self.kernel_tokens)).transpose(2, 3)
        if self._places is not None:
            placed = torch.empty_like(blocks.flatten(3))
            placed[..., self._places] = blocks
            blocks = placed.unflatten(3, (self.kernel_tokens, -1))
        for layer, source in zip(self.layers, blocks, strict=True):
            layer[ids] = source


class PageCodec:
    """Pages' bytes, as of :class:`~kvpack.runtime.kv.host_tier.BlockBytes`: layer by layer, K before V.

    Args:
        cache: an empty one, of the shape, the type and the device of the keys and values.
    """

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache
        self._sizes = BlockSizes(cache.pools)

    def encode(self, values: torch.Tensor, formats: Formats) -> list[torch.Tensor]:
        """Keys and values of whole pages → their bytes.

        Args:
            values: [layers, 64·n, heads, 2·head_dim].
            formats: u8 [layers, 2, n].

        Returns:
            u8 [bytes] for each index.
        """
        cache, device = self._cache, values.device
        begins, bounds = self._sizes.places(formats)
        full = np.uint8(cache.full_format)
        is_quantized = formats != full
        # What is to be quantized is written in 16 bits first, behind the pages.
        full_bytes = int(self._sizes.page_bytes[0, full])
        scratch = bounds[-1] + full_bytes * (np.cumsum(is_quantized.reshape(-1)) - 1).reshape(formats.shape)
        memory = torch.zeros(int(bounds[-1]) + full_bytes * int(is_quantized.sum()), dtype=torch.uint8, device=device)
        written = np.where(is_quantized, scratch, begins) | int(full)
        status = new_status(device)
        k, v = values.permute(0, 2, 1, 3).split(cache.head_dim, -1)
        positions = torch.zeros(len(values), dtype=torch.int32, device=device)
        table = _sent(written.transpose(1, 0, 2), device)
        write_tokens(k, v, table, positions, status, memory, key_order=cache.key_order)
        for side in Side:
            for target in np.unique(formats[:, side][is_quantized[:, side]]).tolist():
                chosen = formats[:, side] == target
                jobs = np.stack([written[:, side][chosen], begins[:, side][chosen] | target], -1)
                quantize_pages(
                    _sent(jobs, device),
                    side,
                    cache.full_format,
                    PageFormat(target),
                    cache.head_dim,
                    cache.num_kv_heads,
                    status,
                    memory,
                )
        assert left_out(status) is None
        return [memory[begin:end] for begin, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)]

    def decode(self, pages: Sequence[torch.Tensor], formats: Formats, device: torch.device) -> torch.Tensor:
        """The inverse of :meth:`encode`, as far as the formats allow it; of 16 bits exactly.

        Args:
            pages: u8 [bytes] for each index, on any device.
            formats: u8 [layers, 2, n].

        Returns:
            [layers, 64·n, heads, 2·head_dim] on ``device``.
        """
        cache = self._cache
        begins, bounds = self._sizes.places(formats)
        memory = torch.empty(int(bounds[-1]), dtype=torch.uint8, device=device)
        for page, begin, end in zip(pages, bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            memory[begin:end].copy_(page, non_blocking=True)
        tokens = PAGE_TOKENS * len(pages)
        starts = torch.zeros(len(formats), dtype=torch.int32, device=device)
        status = new_status(device)
        both = [
            read_tokens(
                _sent(begins[:, side] | formats[:, side], device),
                side,
                starts,
                starts + tokens,
                tokens,
                cache.head_dim,
                cache.num_kv_heads,
                cache.dtype,
                status,
                memory,
                cache.key_order,
            )
            for side in Side
        ]
        assert left_out(status) is None
        return torch.cat(both, -1).transpose(1, 2)


def _sent(values: npt.NDArray[np.int64], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(device)
