"""Keys and values in vLLM's cache ⇄ kvpack's pages, on the device where they lie.

On a GPU kernels read and write vLLM's blocks by the block table (:mod:`~kvpack.runtime.kv.block_table`); on a CPU
tokens are gathered, and put back.

vLLM's cache of a layer is [blocks, heads, tokens of a block, K and then V]; the attention of CPUs has another order in
a block's head (:mod:`~kvpack.integrations.vllm.cpu_block_order`). A page is 64 tokens of a request, wherever its blocks
begin and end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kvpack.errors import CacheInputError
from kvpack.format.layout import ceil_div
from kvpack.format.pages import PAGE_TOKENS, PageFormat, Side
from kvpack.runtime.device.upload import sent
from kvpack.runtime.kv.block_table import BlockCache, BlockRows, checked_blocks
from kvpack.runtime.kv.cache import KVCache
from kvpack.runtime.kv.page_kernels import (
    left_out,
    new_status,
    quantize_pages,
    read_to_blocks,
    read_tokens,
    write_from_blocks,
    write_tokens,
)
from kvpack.runtime.kv.page_table import Ints
from kvpack.runtime.kv.run_coder import BlockSizes, Formats
from kvpack.runtime.kv.snapshot_device import runs_kernels


class PagedLayers:
    """vLLM's KV cache, a tensor for each layer.

    Args:
        layers: [kernel blocks, heads, tokens of a kernel block, 2·head_dim] each, fp16 or bf16, of any strides.
        block_tokens: tokens of a block as the scheduler counts them; it consists of one or more kernel blocks.
        places: i64 [tokens of a kernel block, 2·head_dim], on the layers' device: where among the elements of a block's
            head each of a token's lies, K before V. None: in that order.

    Attributes:
        blocks: keys and values as kernels find them; None on a device that has none.

    Raises:
        CacheInputError: layers of different shapes, or no keys and values of such blocks; on a GPU also what
            :class:`~kvpack.runtime.kv.block_table.BlockCache` refuses.
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
        self.blocks: BlockCache | None = None
        if runs_kernels(self.device):
            width = self.head_dim
            self.blocks = BlockCache([one[..., :width] for one in layers], [one[..., width:] for one in layers])

    def _kernel_blocks(self, block_ids: Sequence[int], first: int, end: int) -> Ints:
        """Those that tokens ``first … end − 1`` of a request are in."""
        split = self.block_tokens // self.kernel_tokens
        ids = checked_blocks(block_ids, first, end - first, self.block_tokens, len(self.layers[0]) // split)
        index = np.arange(first // self.kernel_tokens, ceil_div(end, self.kernel_tokens))
        return ids[index // split - first // self.block_tokens] * split + index % split

    def rows(self, block_ids: Sequence[int], first: int, end: int) -> BlockRows:
        """Tokens ``first … end − 1`` of a request, where kernels find them by its blocks.

        Raises:
            CacheInputError: as of :func:`~kvpack.runtime.kv.block_table.checked_blocks`.
        """
        assert self.blocks is not None
        ids = self._kernel_blocks(block_ids, first, end)
        return self.blocks.rows_in(ids, first % self.kernel_tokens, end - first)

    def copy_out(self, block_ids: Sequence[int], first: int, end: int) -> torch.Tensor:
        """A copy of the kernel blocks that these tokens are in, as they are: [layers, n, heads, tokens, 2·head_dim]."""
        ids = sent(self._kernel_blocks(block_ids, first, end), self.device)
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
        ids = sent(self._kernel_blocks(block_ids, first, end), self.device)
        blocks = values.unflatten(1, (-1, self.kernel_tokens)).transpose(2, 3)
        if self._places is not None:
            placed = torch.empty_like(blocks.flatten(3))
            placed[..., self._places] = blocks
            blocks = placed.unflatten(3, (self.kernel_tokens, -1))
        for layer, source in zip(self.layers, blocks, strict=True):
            layer[ids] = source


@dataclass(frozen=True)
class CopiedPages:
    """Pages on their way: keys and values in 16 bits, and room for what is quantized.

    Attributes:
        memory: u8: pages as they will be, then those of 16 bits that are quantized.
        formats: u8 [layers, 2, n], what pages will have.
        begins: i64 [layers, 2, n]: where each will be.
        bounds: i64 [n + 1]: where each index's pages begin, and the last one's end.
        copied: i64 [layers, 2, n]: entries of the pages in 16 bits.
        status: of the kernels.
    """

    memory: torch.Tensor
    formats: Formats
    begins: Ints
    bounds: Ints
    copied: Ints
    status: torch.Tensor


class PageCodec:
    """Pages' bytes, as of :class:`~kvpack.runtime.kv.host_tier.BlockBytes`: layer by layer, K before V.

    Args:
        cache: an empty one, of the shape, the type and the device of the keys and values.
    """

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache
        self._sizes = BlockSizes(cache.pools)
        self._full_bytes = int(self._sizes.page_bytes[0, cache.full_format])

    def encode(self, values: torch.Tensor, formats: Formats) -> list[torch.Tensor]:
        """Keys and values of whole pages → their bytes.

        Args:
            values: [layers, 64·n, heads, 2·head_dim].
            formats: u8 [layers, 2, n].

        Returns:
            u8 [bytes] for each index.
        """
        cache, device = self._cache, values.device
        pages = self._new_pages(formats, device)
        k, v = values.permute(0, 2, 1, 3).split(cache.head_dim, -1)
        positions = torch.zeros(len(values), dtype=torch.int32, device=device)
        table = sent(pages.copied.transpose(1, 0, 2), device)
        write_tokens(k, v, table, positions, pages.status, pages.memory, key_order=cache.key_order)
        return self.quantized(pages)

    def page_bytes(self, formats: Formats) -> list[int]:
        """Of each index, of formats u8 [layers, 2, n]: what :meth:`encode` gives."""
        return self._sizes.of_pages(formats).sum((0, 1)).tolist()

    def copied_bytes(self, formats: Formats) -> int:
        """Memory that :meth:`copy` takes."""
        return self._copied_places(formats)[2]

    def _copied_places(self, formats: Formats) -> tuple[Ints, Ints, int]:
        """Where pages will be, and the bounds of each index, as of :meth:`BlockSizes.places`; and how much memory they
        take with those of 16 bits that are quantized, which lie behind them."""
        begins, bounds = self._sizes.places(formats)
        quantized = int((formats != self._cache.full_format).sum())
        return begins, bounds, int(bounds[-1]) + self._full_bytes * quantized

    def copy(self, rows: BlockRows, formats: Formats) -> CopiedPages:
        """Whole pages of tokens out of vLLM's blocks, by one kernel: what is enqueued next may overwrite these.

        Nothing waits for the device.

        Args:
            formats: u8 [layers, 2, n], what :meth:`quantized` is to make of them.
        """
        pages = self._new_pages(formats, rows.cache.device)
        table = sent(pages.copied.transpose(1, 0, 2), rows.cache.device)
        write_from_blocks(rows, table, pages.status, pages.memory, self._cache.key_order)
        return pages

    def _new_pages(self, formats: Formats, device: torch.device) -> CopiedPages:
        begins, bounds, size_bytes = self._copied_places(formats)
        full = np.uint8(self._cache.full_format)
        is_quantized = formats != full
        behind = bounds[-1] + self._full_bytes * (np.cumsum(is_quantized.reshape(-1)) - 1).reshape(formats.shape)
        memory = torch.empty(size_bytes, dtype=torch.uint8, device=device)
        copied = np.where(is_quantized, behind, begins) | int(full)
        return CopiedPages(memory, formats, begins, bounds, copied, new_status(device))

    def quantized(self, pages: CopiedPages) -> list[torch.Tensor]:
        """The bytes of pages that have been copied, u8 [bytes] for each index; waits for the device."""
        cache, formats, memory = self._cache, pages.formats, pages.memory
        if memory.is_cuda:
            # Another stream's memory, which must not be given to others while kernels write to it.
            for one in (memory, pages.status):
                one.record_stream(torch.cuda.current_stream(memory.device))
        for side in Side:
            of_side = formats[:, side]
            for target in np.unique(of_side[of_side != cache.full_format]).tolist():
                chosen = of_side == target
                jobs = np.stack([pages.copied[:, side][chosen], pages.begins[:, side][chosen] | target], -1)
                quantize_pages(
                    sent(jobs, memory.device),
                    side,
                    cache.full_format,
                    PageFormat(target),
                    cache.head_dim,
                    cache.num_kv_heads,
                    pages.status,
                    memory,
                )
        assert left_out(pages.status) is None
        return _split(memory, pages.bounds)

    def decode(self, pages: Sequence[torch.Tensor], formats: Formats, device: torch.device) -> torch.Tensor:
        """The inverse of :meth:`encode`, as far as the formats allow it; of 16 bits exactly.

        Args:
            pages: u8 [bytes] for each index, on any device.
            formats: u8 [layers, 2, n].

        Returns:
            [layers, 64·n, heads, 2·head_dim] on ``device``.
        """
        cache = self._cache
        memory, entries = self._placed(pages, formats, device)
        tokens = PAGE_TOKENS * len(pages)
        starts = torch.zeros(len(formats), dtype=torch.int32, device=device)
        status = new_status(device)
        both = [
            read_tokens(
                sent(entries[:, side], device),
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

    def put(self, pages: Sequence[torch.Tensor], formats: Formats, first: int, rows: BlockRows) -> None:
        """Tokens of pages into vLLM's blocks, by a kernel for K and one for V; waits for the device.

        Args:
            pages: u8 [bytes] for each index, on any device.
            formats: u8 [layers, 2, n].
            first: which token of the pages the first row is.
        """
        device = rows.cache.device
        memory, entries = self._placed(pages, formats, device)
        status = new_status(device)
        for side in Side:
            read_to_blocks(rows, sent(entries[:, side], device), side, first, status, memory, self._cache.key_order)
        assert left_out(status) is None

    def _placed(
        self, pages: Sequence[torch.Tensor], formats: Formats, device: torch.device
    ) -> tuple[torch.Tensor, Ints]:
        """Pages in one piece of memory, and their entries [layers, 2, n]."""
        begins, bounds = self._sizes.places(formats)
        memory = torch.empty(int(bounds[-1]), dtype=torch.uint8, device=device)
        for page, there in zip(pages, _split(memory, bounds), strict=True):
            there.copy_(page, non_blocking=True)
        return memory, begins | formats


def _split(memory: torch.Tensor, bounds: Ints) -> list[torch.Tensor]:
    return [memory[begin:end] for begin, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)]
