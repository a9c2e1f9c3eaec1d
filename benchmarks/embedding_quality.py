"""What coding the embedding alone costs: KL of a causal language model to itself, with row scales of several kinds.

    python benchmarks/embedding_quality.py "$KVPACK_BOOKS_MODEL" "$KVPACK_BOOKS_TEXT" --json embedding-quality.json

The model runs in fp32 on its own weights; only its token embedding (and an output layer that is tied to it) is coded
at --bits, everything counted. KL(original ‖ coded) is a mean over the first --windows windows of --context
tokens; tokens are counted in the last quarter of the text, which no window reaches.

Settings: ``plain`` (one scale), ``default`` (row scales without token counts), ``counts`` (with them), and ``P:R``: a
row's step goes with (its token's count + 1)^P and with its root mean square to the R.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from bench_common import environment_path, print_table, provenance, require_inputs, write_result
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvpack.encode.blob_decoder import decode_integers
from kvpack.encode.quant_config import LAYOUTS
from kvpack.encode.row_factors import row_factors
from kvpack.encode.tensor_encoder import Matrices, encode_at_bits
from kvpack.format.blob import Blob

F32 = npt.NDArray[np.float32]
SETTINGS = "plain,default,counts"


class Evaluator:
    """A model whose embedding is exchanged, and the original's answers."""

    def __init__(self, directory: Path, text: Path, windows: int, context: int) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(directory)
        content = text.read_text(encoding="utf-8")
        last = 3 * len(content) // 4

        def tokens(part: str) -> torch.Tensor:
            return torch.tensor(tokenizer(part, add_special_tokens=False, verbose=False).input_ids)

        ids = tokens(content[:last])
        if len(ids) < windows * context:
            raise SystemExit(f"three quarters of the text have {len(ids)} tokens, fewer than {windows} × {context}")
        self.ids = ids[: windows * context].view(windows, context)
        self.weight = self.model.get_input_embeddings().weight
        self.original: F32 = self.weight.detach().numpy().copy()
        self.counts = np.bincount(tokens(content[last:]).numpy(), minlength=len(self.original)).astype(np.int64)
        self.reference = [self._log_probabilities(window) for window in self.ids]

    def _log_probabilities(self, window: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return torch.log_softmax(self.model(input_ids=window[None], use_cache=False).logits[0], -1)

    def kl(self, embedding: F32) -> tuple[float, float]:
        """The mean over the windows, and its standard error."""
        with torch.no_grad():
            self.weight.copy_(torch.from_numpy(embedding))
        means = []
        for window, reference in zip(self.ids, self.reference, strict=True):
            ours = self._log_probabilities(window)
            means.append((reference.exp() * (reference - ours)).sum(-1).double().mean().item())
        return float(np.mean(means)), float(np.std(means, ddof=1)) / math.sqrt(len(means))

    def factors(self, setting: str) -> F32 | None:
        if setting == "plain":
            return None
        if setting in ("default", "counts"):
            return row_factors(Matrices(self.original), self.counts + 1.0 if setting == "counts" else None)
        frequency, size = map(float, setting.split(":"))
        rms = np.sqrt(np.square(self.original, dtype=np.float64).mean(1))
        logarithms = frequency * np.log(self.counts + 1.0) + size * np.log(np.maximum(rms, rms.mean() / 64))
        return np.exp(logarithms - logarithms.mean()).astype(np.float32)

    def setting(self, name: str, bits: float, layout: str, tile_cols: int | None) -> dict[str, Any]:
        began = time.perf_counter()
        matrices = Matrices(self.original)
        matrices.set_vectors(row_factors=self.factors(name))
        encoded = encode_at_bits(matrices, bits, layout_name=layout, tile_cols=tile_cols)
        blob = Blob(bytes(encoded.blob.front) + bytes(encoded.blob.payload))
        assert encoded.scales is not None
        kl, error = self.kl(decode_integers(blob)[0].astype(np.float32) * encoded.scales[:, None])
        achieved = 8 * encoded.size_bytes / self.original.size
        print(f"{name}: {achieved:.3f} bits, KL {kl:.5f} ({time.perf_counter() - began:.0f} s)", file=sys.stderr)
        return {
            "setting": name,
            "bits": achieved,
            "noise_db": encoded.noise_db,
            "kl": kl,
            "kl_standard_error": error,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", default=environment_path("KVPACK_BOOKS_MODEL"))
    parser.add_argument("text", type=Path, nargs="?", default=environment_path("KVPACK_BOOKS_TEXT"))
    parser.add_argument("--settings", default=SETTINGS, help=f"comma-separated; default: {SETTINGS}")
    parser.add_argument("--bits", type=float, default=4.25)
    parser.add_argument("--layout", choices=LAYOUTS, default="auto")
    parser.add_argument("--tile-cols", type=int)
    parser.add_argument("--windows", type=int, default=8, help="2 or more")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.model is None or options.text is None:
        parser.error("MODEL and TEXT are needed, or KVPACK_BOOKS_MODEL and KVPACK_BOOKS_TEXT")
    require_inputs(parser, options.model, options.text)
    result: dict[str, Any] = {
        "what": "embedding-quality",
        **provenance(
            {"KVPACK_BOOKS_MODEL": options.model, "KVPACK_BOOKS_TEXT": options.text}, ("torch", "transformers")
        ),
        "torch_threads": torch.get_num_threads(),
    }
    evaluator = Evaluator(options.model, options.text, options.windows, options.context)
    result["counted_tokens"] = int(evaluator.counts.sum())
    result["results"] = [
        evaluator.setting(name, options.bits, options.layout, options.tile_cols) for name in options.settings.split(",")
    ]
    print_table(
        ("setting", "bits", "noise dB", "KL", "± (s.e.)"),
        (
            (
                row["setting"],
                f"{row['bits']:.3f}",
                f"{row['noise_db']:.2f}",
                f"{row['kl']:.5f}",
                f"{row['kl_standard_error']:.5f}",
            )
            for row in result["results"]
        ),
    )
    if options.json is not None:
        write_result(options.json, result)


if __name__ == "__main__":
    main()
