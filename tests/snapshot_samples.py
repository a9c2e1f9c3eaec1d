"""Small snapshots for tests: pages of any bytes, or such as a cache has, and files of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from kvpack.encode.page_coder import FLOAT_TYPES, quantize_blocks
from kvpack.encode.snapshot_coder import encode_run, write_snapshot
from kvpack.format.pages import PageFormat, Side
from kvpack.format.snapshot import Fingerprint, RunPages, SnapshotHeader, run_pages

FINGERPRINT = Fingerprint("0" * 64, "1" * 64, "2" * 64, {"theta": 10000.0, "type": "default"}, "float16")


def make_header(tokens: int, layers: int = 2, kv_heads: int = 2, head_dim: int = 64, **others: Any) -> SnapshotHeader:
    """A header with defaults for all that a test does not care about."""
    fields: dict[str, Any] = {
        "dtype": "F16",
        "key_order": (),
        "recent_tokens": 64,
        "sinks": 4,
        "formats": None,
        "budget": None,
        "policy": "importance",
        "fingerprint": FINGERPRINT,
    }
    return SnapshotHeader(tokens, layers, kv_heads, head_dim, **(fields | others))


class SamplePages:
    """Pages of all of a snapshot, made when they are first asked for.

    Args:
        random_bytes: any bytes; otherwise numbers that go up and down, quantized.
    """

    def __init__(self, header: SnapshotHeader, page_formats: np.ndarray, *, random_bytes: bool = False) -> None:
        self.header, self.page_formats, self.random_bytes = header, page_formats, random_bytes

    def blocks(self, pages: RunPages) -> np.ndarray:
        """u8 [pages, heads, block_bytes]."""
        made = [self._page(pages, layer, index) for layer, index in zip(pages.layers, pages.indices, strict=True)]
        return np.ascontiguousarray(np.stack(made))

    def _page(self, pages: RunPages, layer: int, index: int) -> np.ndarray:
        seed = [int(layer), int(pages.side), int(index), int(pages.format)]
        rng = np.random.default_rng(seed)
        heads, size = pages.block_shape[1:]
        if self.random_bytes:
            return rng.integers(0, 256, (heads, size), np.uint8)
        steps = rng.normal(0, 0.5, (heads, 64, self.header.head_dim))
        values = np.cumsum(steps, axis=1) + 3 * layer if pages.side == Side.K else 2 * steps
        return quantize_blocks(values.astype(FLOAT_TYPES.get(pages.format, np.dtype(np.float32))), pages.layout)

    def encoded(self, executor: Any = None) -> Any:
        """The blobs of each run."""
        for run in range(self.header.runs):
            yield encode_run(run_pages(self.header, self.page_formats, run), self.blocks, executor)

    def write(self, path: Path, **arrays: np.ndarray) -> int:
        tokens = np.arange(self.header.tokens, dtype=np.int32)
        stored = {"tokens": tokens, "page_formats": self.page_formats} | arrays
        return write_snapshot(path, self.header, stored, self.encoded())


def usual_formats(header: SnapshotHeader, page_format: PageFormat) -> np.ndarray:
    """u8 [layers, 2, pages]: 16 bits for the first and the last page, the given format between them."""
    formats = np.full((header.layers, len(Side), header.pages), page_format, np.uint8)
    formats[..., [0, -1]] = PageFormat.FP16 if header.dtype == "F16" else PageFormat.BF16
    return formats


def mixed_formats(header: SnapshotHeader, seed: int = 0) -> np.ndarray:
    """u8 [layers, 2, pages]: each page any format."""
    of_16_bits = PageFormat.FP16 if header.dtype == "F16" else PageFormat.BF16
    choices = [int(f) for f in PageFormat if f.is_quantized or f == of_16_bits]
    shape = header.layers, len(Side), header.pages
    return np.random.default_rng(seed).choice(choices, shape).astype(np.uint8)
