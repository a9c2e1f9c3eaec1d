"""What quantizing pages costs on the keys and values of a real model: noise by format, beside the plain symmetric form.

    python benchmarks/page_noise.py $KVPACK_BOOKS_MODEL $KVPACK_BOOKS_TEXT

Noise is 10·log10(Σ(x − x̃)²/Σx²) over all layers, heads and the text's first tokens; bits count scales and centers. The
symmetric form has a scale of largest magnitude / (2^(b−1) − 1) for the same values, and no center.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from bench_common import require_inputs

from kvpack.encode.page_coder import dequantize_blocks, quantize_blocks
from kvpack.format.pages import PAGE_TOKENS, PageFormat, PageLayout, Side


def noise_db(x: np.ndarray, found: np.ndarray) -> float:
    return float(10 * np.log10(np.square(x - found, dtype=np.float64).sum() / np.square(x, dtype=np.float64).sum()))


def symmetric(x: np.ndarray, bits: int, axis: int) -> np.ndarray:
    limit = 2 ** (bits - 1) - 1
    scale = (np.abs(x).max(axis, keepdims=True) / limit).astype(np.float16).astype(np.float32)
    codes = np.round(np.divide(x, scale, out=np.zeros_like(x), where=scale != 0))
    return scale * np.clip(codes, -limit, limit)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokens", type=int, default=2048, help="a multiple of 64")
    options = parser.parse_args()
    if options.tokens < PAGE_TOKENS or options.tokens % PAGE_TOKENS:
        parser.error(f"--tokens is {options.tokens}; a multiple of {PAGE_TOKENS} is wanted")
    require_inputs(parser, options.model, options.text)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = options.text.read_text(encoding="utf-8")[: 20 * options.tokens]
    tokens = AutoTokenizer.from_pretrained(options.model)(text, return_tensors="pt").input_ids[:, : options.tokens]
    if tokens.shape[1] < options.tokens:
        parser.error(f"the text has {tokens.shape[1]} tokens, fewer than --tokens {options.tokens}")
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    with torch.no_grad():
        layers = model(tokens, use_cache=True).past_key_values.layers
    print("| side | format | bits an element | noise, dB | symmetric, dB |\n|---|---|---|---|---|")
    for side in Side:
        values = torch.stack([(layer.keys, layer.values)[side][0] for layer in layers])
        x = values.unflatten(2, (-1, PAGE_TOKENS)).to(torch.float16).float().numpy()
        for page_format in (PageFormat.INT8, PageFormat.INT4, PageFormat.INT3, PageFormat.INT2):
            layout = PageLayout(side, page_format, x.shape[-1])
            found = noise_db(x, dequantize_blocks(quantize_blocks(x, layout), layout))
            plain = noise_db(x, symmetric(x, page_format.element_bits, -2 if side == Side.K else -1))
            print(f"| {side.name} | {page_format.name} | {layout.bits_per_element:.3f} | {found:.1f} | {plain:.1f} |")


if __name__ == "__main__":
    main()
