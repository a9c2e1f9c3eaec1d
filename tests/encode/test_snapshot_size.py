"""How large snapshots are, everything counted: of pages that nothing can be saved of, and of a real model's."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from snapshot_samples import SamplePages, make_header, mixed_formats, usual_formats

from kvpack.encode.page_coder import quantize_blocks
from kvpack.encode.snapshot_coder import decode_runs
from kvpack.format.blob import Blob
from kvpack.format.pages import PageFormat
from kvpack.format.snapshot import RunPages, SnapshotFile
from kvpack.format.snapshot_summary import describe_snapshot


def blob_bytes(path: Path) -> tuple[int, int, int]:
    """(bytes of all blobs, of those in front of their payloads, how many there are)."""
    with SnapshotFile(path) as file:
        parts = [p for run in range(file.header.runs) for pages in file.pages_of_run(run) for p in pages.parts]
        blobs = [Blob(file.blob(part)) for part in parts]
    return sum(len(b.buffer) for b in blobs), sum(b.header.payload_offset for b in blobs), len(blobs)


@pytest.mark.parametrize("page_format", [f for f in PageFormat if f != PageFormat.BF16])
def test_noise_takes_what_pages_take(tmp_path: Path, page_format: PageFormat) -> None:
    """Blobs fall back to plain bits, tile by tile."""
    header = make_header(64 * 32, 4, 2, 64)
    formats = np.full((4, 2, 32), page_format, np.uint8)
    SamplePages(header, formats, random_bytes=True).write(tmp_path / "x")
    found = describe_snapshot(tmp_path / "x")
    assert blob_bytes(tmp_path / "x")[0] <= 1.003 * found["page_bytes"]
    # Beside them there are 4 bytes for each token, one for each page, and the header.
    assert found["file_bytes"] <= 1.003 * found["page_bytes"] + 4 * header.tokens + formats.size + 2048


def test_noise_in_mixed_formats_takes_little_more(tmp_path: Path) -> None:
    header = make_header(64 * 64, 8, 2, 64)
    SamplePages(header, mixed_formats(header), random_bytes=True).write(tmp_path / "x")
    assert blob_bytes(tmp_path / "x")[0] <= 1.005 * describe_snapshot(tmp_path / "x")["page_bytes"]


@cache
def books_kv(windows: int = 2, tokens: int = 2048) -> np.ndarray:
    """Keys and values of the books model over unseen text: fp16 [windows, 2, layers, heads, tokens, head_dim]."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    path, text = os.environ.get("KVPACK_BOOKS_MODEL"), os.environ.get("KVPACK_BOOKS_TEXT")
    if not path or not text:
        pytest.skip("KVPACK_BOOKS_MODEL or KVPACK_BOOKS_TEXT is not set")
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    ids = tokenizer(Path(text).read_text(encoding="utf-8")[: 30 * windows * tokens], add_special_tokens=False)
    found = []
    for window in range(windows):
        chosen = torch.tensor(ids["input_ids"][3 * window * tokens :][:tokens])[None]
        with torch.inference_mode():
            layers = model.model(chosen, use_cache=True).past_key_values.layers
        sides = [torch.stack([getattr(layer, side)[0] for layer in layers]) for side in ("keys", "values")]
        found.append(torch.stack(sides).half().numpy())
    return np.stack(found)


class RealPages(SamplePages):
    """Pages of recorded keys and values, fp16 [2, layers, heads, tokens, head_dim]."""

    def __init__(self, header: Any, page_formats: np.ndarray, kv: np.ndarray) -> None:
        super().__init__(header, page_formats)
        self.kv = kv

    def blocks(self, pages: RunPages) -> np.ndarray:
        places = zip(pages.layers.tolist(), pages.indices.tolist(), strict=True)
        values = [self.kv[pages.side, layer, :, 64 * index : 64 * index + 64] for layer, index in places]
        return np.ascontiguousarray(quantize_blocks(np.stack(values), pages.layout))


@pytest.mark.model
@pytest.mark.parametrize(
    ("page_format", "least_saved"),
    # Measured 8.2, 10.0, 12.6, 4.8 and 14.5 %. docs/DESIGN-NOTES.md says why it cannot be much more.
    [("INT4", 0.08), ("INT3", 0.098), ("INT2", 0.124), ("INT8", 0.045), ("FP16", 0.14)],
)
def test_a_real_cache_takes_less_than_its_pages(tmp_path: Path, page_format: str, least_saved: float) -> None:
    for kv in books_kv():
        _, layers, heads, tokens, head_dim = kv.shape
        header = make_header(tokens, layers, heads, head_dim)
        pages = RealPages(header, usual_formats(header, PageFormat[page_format]), kv)
        size = pages.write(tmp_path / "x")
        with SnapshotFile(tmp_path / "x") as file:
            page_bytes = file.page_bytes
            for _, decoded in decode_runs(file, range(header.runs)):
                for found, blocks in decoded:
                    np.testing.assert_array_equal(blocks, pages.blocks(found))
        assert size <= (1 - least_saved) * page_bytes
        coded, front, _ = blob_bytes(tmp_path / "x")
        assert front + size - coded < 0.02 * size  # tables, tiles' metadata, header, token ids
