"""Blocks of prefixes ⇄ the blobs of a run of them, by the CPU or by a GPU: the same bytes.

A block is its pages one after another: layer by layer, K before V.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from kvpack.encode.snapshot_coder import Blocks, decode_run, encode_run
from kvpack.errors import DeviceError
from kvpack.format.pages import PageFormat, Side
from kvpack.format.snapshot import RunPages, SnapshotFile, SnapshotHeader, run_pages
from kvpack.runtime.kv.page_pools import PagePools
from kvpack.runtime.kv.page_table import Ints
from kvpack.runtime.kv.snapshot_device import encode_runs, load_runs

Formats = npt.NDArray[np.uint8]
# What blocks in one piece of memory begin behind: an entry of 0 is of no page.
LEAD_BYTES = 64


class BlockSizes:
    """Bytes of pages and of blocks, for one shape of page."""

    def __init__(self, pools: PagePools) -> None:
        sizes = [[pools.page_bytes(side, page_format) for page_format in PageFormat] for side in Side]
        self.page_bytes = np.array(sizes, np.int64)

    def of_pages(self, formats: Formats) -> Ints:
        """Of each page, of formats u8 [layers, 2, blocks]."""
        return np.asarray(self.page_bytes[np.arange(len(Side))[:, None], formats])

    def places(self, formats: Formats) -> tuple[Ints, Ints]:
        """Of blocks one behind another, from :data:`LEAD_BYTES` on.

        Returns:
            Where each page begins, i64 [layers, 2, blocks]; where blocks begin and the last one ends, i64 [blocks + 1].
        """
        by_block = self.of_pages(formats).transpose(2, 0, 1)
        ends = LEAD_BYTES + np.cumsum(by_block.reshape(-1))
        begins = (ends - by_block.reshape(-1)).reshape(by_block.shape)
        bounds = np.concatenate([[LEAD_BYTES], ends.reshape(len(by_block), -1)[:, -1]])
        return begins.transpose(1, 2, 0), bounds


class RunCoder:
    """
    Args:
        sizes: of the blocks.
        device: that codes them; None: the CPU, without a copy to a device.
    """

    def __init__(self, sizes: BlockSizes, device: torch.device | None = None) -> None:
        self._sizes, self._device = sizes, device

    def encode(
        self, header: SnapshotHeader, formats: Formats, blocks: Sequence[torch.Tensor]
    ) -> list[tuple[str, bytes | memoryview]]:
        """The blobs of one run, with the names of their tensors.

        Args:
            formats: u8 [layers, 2, blocks].
            blocks: u8 [bytes] of each, on any device.
        """
        begins, _ = self._sizes.places(formats)
        run = run_pages(header, formats, 0)
        lead = torch.zeros(LEAD_BYTES, dtype=torch.uint8, device="cpu")
        if self._device is not None:
            memory = torch.cat([one.to(self._device, non_blocking=True) for one in (lead, *blocks)])

            def entries_of(pages: RunPages) -> Ints:
                return np.asarray(begins[pages.layers, pages.side, pages.indices] | int(pages.format))

            return [blob for blobs in encode_runs([run], self._device, entries_of, memory) for blob in blobs]
        held = torch.cat([lead, *(one.cpu() for one in blocks)]).numpy()

        def blocks_of(pages: RunPages) -> Blocks:
            size = int(self._sizes.page_bytes[pages.side, pages.format])
            found = np.empty((len(pages), size), np.uint8)
            for row, begin in zip(found, begins[pages.layers, pages.side, pages.indices].tolist(), strict=True):
                row[:] = held[begin : begin + size]
            return found.reshape(pages.block_shape)

        return list(encode_run(run, blocks_of))

    def decode(self, file: SnapshotFile) -> list[torch.Tensor]:
        """The blocks of a file of one run: u8 [bytes] of each, on the device that decodes.

        Raises:
            DamagedRunError: the message says where.
            FileChangedError, OSError: the file cannot be read, or has changed.
            DeviceError: the device finds damage where the CPU does not.
        """
        begins, bounds = self._sizes.places(file.page_formats)
        memory = torch.empty(int(bounds[-1]), dtype=torch.uint8, device=self._device or "cpu")
        if self._device is None:
            for pages, blocks in decode_run(file, 0):
                rows = blocks.reshape(len(pages), -1)
                for row, begin in zip(rows, begins[pages.layers, pages.side, pages.indices].tolist(), strict=True):
                    memory[begin : begin + len(row)] = torch.from_numpy(row)
        else:

            def entries_of(pages: RunPages) -> Ints:
                return np.asarray(begins[pages.layers, pages.side, pages.indices] | int(pages.format))

            if load_runs(file, [0], self._device, entries_of, memory):
                decode_run(file, 0)  # says what is wrong
                raise DeviceError(f"{file.container.path}: {self._device} found damage where the CPU finds none")
        return [memory[begin:end] for begin, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)]
