"""What archives of a KV cache take, and what their noise does to the next tokens (docs/DESIGN-NOTES.md).

    python benchmarks/kv_archive.py MODEL TEXT --noise 0.12,0.3,0.6

A prefix of unseen text goes through the model; its keys and values become a snapshot, an archive of it and a snapshot
again, and the model goes on from those. KL is of its distributions of the next 64 tokens from those with the exact
ones, in nats a token. A model whose RoPE turns dimension d with d + half of them is needed.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from kvpack.encode.archive_coder import ArchiveReport, archive_snapshot, restore_snapshot
from kvpack.encode.page_coder import dequantize_blocks, quantize_blocks
from kvpack.encode.snapshot_coder import decode_runs, encode_run, write_snapshot
from kvpack.format.pages import PAGE_TOKENS, PageFormat, Side
from kvpack.format.snapshot import RunPages, SnapshotFile, SnapshotHeader, run_pages

NEXT_TOKENS = 64


def write(path: Path, kv: np.ndarray, page_format: PageFormat) -> None:
    """A snapshot of fp16 [2, layers, heads, tokens, head_dim], its first and last page in 16 bits."""
    _, layers, heads, tokens, head_dim = kv.shape
    header = SnapshotHeader(tokens, layers, heads, head_dim, "F16", (), 64, 4, None, None, "importance", None)
    formats = np.full((layers, len(Side), header.pages), page_format, np.uint8)
    formats[..., [0, -1]] = PageFormat.FP16

    def blocks(pages: RunPages) -> np.ndarray:
        places = zip(pages.layers.tolist(), pages.indices.tolist(), strict=True)
        found = [kv[pages.side, layer, :, PAGE_TOKENS * i : PAGE_TOKENS * (i + 1)] for layer, i in places]
        return np.ascontiguousarray(quantize_blocks(np.stack(found), pages.layout))

    arrays = {"tokens": np.full(tokens, -1, np.int32), "page_formats": formats}
    runs = (encode_run(run_pages(header, formats, run), blocks) for run in range(header.runs))
    write_snapshot(path, header, arrays, runs)


def read(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """The numbers of a snapshot, fp32 of that shape."""
    kv = np.empty(shape, np.float32)
    with SnapshotFile(path) as file:
        for _, run in decode_runs(file, range(file.header.runs)):
            for pages, blocks in run:
                numbers = dequantize_blocks(blocks, pages.layout)
                for layer, i, page in zip(pages.layers, pages.indices, numbers, strict=True):
                    kv[pages.side, layer, :, PAGE_TOKENS * i : PAGE_TOKENS * (i + 1)] = page
    return kv


class Prefix:
    """A window of text: its exact keys and values, and what the model makes of the tokens behind it with any."""

    def __init__(self, model: Any, ids: torch.Tensor, tokens: int) -> None:
        self.model, self.ids, self.tokens = model, ids, tokens
        with torch.inference_mode():
            layers = model.model(ids[:, :tokens], use_cache=True).past_key_values.layers
        sides = [np.stack([getattr(layer, side)[0].numpy() for layer in layers]) for side in ("keys", "values")]
        self.kv = np.stack(sides).astype(np.float16)
        self.exact = self.log_probabilities(self.kv.astype(np.float32))

    def log_probabilities(self, kv: np.ndarray) -> torch.Tensor:
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(zip(*kv, strict=True)):
            cache.update(torch.from_numpy(keys.copy())[None], torch.from_numpy(values.copy())[None], layer)
        with torch.inference_mode():
            logits = self.model(self.ids[:, self.tokens :], past_key_values=cache, use_cache=True).logits[0]
        return torch.log_softmax(logits.double(), -1)

    def kl(self, kv: np.ndarray) -> float:
        found = self.log_probabilities(kv)
        return float((self.exact.exp() * (self.exact - found)).sum(-1).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--noise", default="0.12,0.3,0.6")
    parser.add_argument("--format", default="FP16", choices=[f.name for f in PageFormat if f.name != "BF16"])
    parser.add_argument("--tokens", type=int, default=1984, help="of the prefix: a multiple of 64")
    parser.add_argument("--windows", type=int, default=3)
    options = parser.parse_args()
    model: Any = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    size = options.tokens + NEXT_TOKENS
    text = options.text.read_text(encoding="utf-8")[: 30 * size * options.windows]
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    frequencies = model.model.rotary_emb.inv_freq.double().tolist()
    prefixes = [Prefix(model, ids[3 * w * size :][:size][None], options.tokens) for w in range(options.windows)]
    print("noise | of keys, values | bits a number | times smaller than 16 bits | KL")
    with tempfile.TemporaryDirectory() as folder:
        snapshot, archive, restored = (Path(folder) / name for name in ("s", "a", "r"))
        for noise in map(float, options.noise.split(",")):
            reports: list[ArchiveReport] = []
            kls = []
            for prefix in prefixes:
                write(snapshot, prefix.kv, PageFormat[options.format])
                reports.append(archive_snapshot(snapshot, archive, noise=noise, rope_frequencies=frequencies))
                restore_snapshot(archive, restored)
                kls.append(prefix.kl(read(restored, prefix.kv.shape)))
            times = sum(r.fp16_bytes for r in reports) / sum(r.file_bytes for r in reports)
            keys, values = np.mean([(r.key_noise, r.value_noise) for r in reports], axis=0)
            print(
                f"{noise} | {keys:.3f}, {values:.3f} | {16 / times:.2f} | {times:.1f} | {np.mean(kls):.5f}", flush=True
            )


if __name__ == "__main__":
    main()
