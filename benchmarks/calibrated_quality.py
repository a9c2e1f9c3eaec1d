"""What moments of a model's activations are worth: KL to the original, with and without, at equal bits.

    kvpack moments $KVPACK_BOOKS_MODEL --text $KVPACK_BOOKS_TEXT --from 0.75 --window 1024 -o 125k.safetensors
    python benchmarks/calibrated_quality.py --model $KVPACK_BOOKS_MODEL --variable KVPACK_BOOKS_MODEL \\
        --text $KVPACK_BOOKS_TEXT --windows 8 --window-tokens 1024 --bits 4.25 3.5 3 2.5 2 \\
        --moments 125k=125k.safetensors --gptq 4:128 --json benchmarks/results/DATE-calibrated-books.json

The first windows of the text are read, which the moments must not be of. Everything that a coding stores for the linear
layers counts. GPTQ is a small one of this script's: asymmetric groups along the inputs, from the same moments, the most
active inputs first, ranges of the original weights; its fp16 scales and minima count, too.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from bench_common import provenance, require_inputs, write_result

import kvpack
from kvpack.encode.feedback import feedback_of
from kvpack.encode.moments import Moments

Array = np.ndarray[Any, Any]


def gptq(weights: Array, second_moment: Array, bits: int, group: int) -> Array:
    """f32 weights [rows, K] as GPTQ leaves them."""
    feedback = feedback_of(second_moment)
    rows, cols = weights.shape
    groups = -(-cols // group)
    padded = np.pad(weights, ((0, 0), (0, groups * group - cols)), mode="edge").reshape(rows, groups, group)
    least = padded.min(2).astype(np.float16).astype(np.float32)
    steps = ((padded.max(2) - least) / (2**bits - 1)).astype(np.float16).astype(np.float32)
    steps = np.where(steps > 0, steps, 1)
    errors = np.zeros((cols, rows), np.float32)
    done = np.empty_like(weights)
    for t, col in enumerate(feedback.order):
        target = weights[:, col] + feedback.coefficients[t, :t] @ errors[:t]
        step, low = steps[:, col // group], least[:, col // group]
        done[:, col] = np.clip(np.rint((target - low) / step), 0, 2**bits - 1) * step + low
        errors[t] = weights[:, col] - done[:, col]
    return done


class Bench:
    """The original's logits of the windows, and its weights in place of which others are put."""

    def __init__(self, directory: Path, text: Path, windows: int, window_tokens: int) -> None:
        self.directory = directory
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
        ids = tokenizer(text.read_text(), add_special_tokens=False, verbose=False).input_ids
        self.ids = torch.tensor(ids[: windows * window_tokens]).view(windows, window_tokens)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        self.parameters = dict(self.model.named_parameters())
        self.original = {
            f"{name}.weight": module.weight.detach().numpy().copy()
            for name, module in self.model.named_modules()
            if isinstance(module, torch.nn.Linear) and module is not self.model.get_output_embeddings()
        }
        self.embedding = next(
            name for name, p in self.parameters.items() if p is self.model.get_input_embeddings().weight
        )
        self.kept_embedding = self.parameters[self.embedding].detach().clone()
        self.reference = [self._log_probabilities(row) for row in self.ids]

    @torch.inference_mode()
    def _log_probabilities(self, row: torch.Tensor) -> torch.Tensor:
        return self.model(row[None], use_cache=False).logits[0, :-1].log_softmax(-1)

    def quality(self, weights_of: Callable[[str], Array], names: list[str]) -> dict[str, Any]:
        with torch.no_grad():
            self.parameters[self.embedding].copy_(self.kept_embedding)
            for name in names:
                self.parameters[name].copy_(torch.from_numpy(np.array(weights_of(name), np.float32)))
        kl, same = [], []
        for row, reference in zip(self.ids, self.reference, strict=True):
            found = self._log_probabilities(row)
            kl.append(float((reference.exp() * (reference - found)).sum(-1).double().mean()))
            same.append(float((reference.argmax(-1) == found.argmax(-1)).double().mean()))
        error = float(np.std(kl, ddof=1)) / math.sqrt(len(kl))
        return {"kl": float(np.mean(kl)), "kl_standard_error": error, "same_top": float(np.mean(same))}

    def coded(self, bits: float, moments: Path | None, **options: Any) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            report = kvpack.compress(self.directory, Path(folder) / "coded", bits=bits, moments=moments, **options)
            seconds = time.perf_counter() - began
            chosen = [tensor for tensor in report.tensors if tensor.name in self.original]
            names = [tensor.name for tensor in report.tensors if tensor.method != "keep"]
            with kvpack.open(Path(folder) / "coded") as reader:
                quality = self.quality(lambda name: reader.dequantize(name, "float32"), names)
        total = sum(weights.size for weights in self.original.values())
        return {
            "asked": bits,
            "bits": 8 * sum(tensor.bytes for tensor in chosen) / total,
            "not_coded": [tensor.name for tensor in chosen if tensor.method == "keep"],
            "expected_kl": sum(tensor.expected_kl or 0.0 for tensor in report.tensors) if moments else None,
            "output_bytes": report.output_bytes,
            "compress_seconds": round(seconds, 1),
            **quality,
        }

    def gptq(self, bits: int, group: int, moments: Path) -> dict[str, Any]:
        used = 0.0
        with Moments(moments) as found:
            done = {}
            for name, weights in self.original.items():
                done[name] = gptq(weights, found.second_moment(name), bits, group)
                used += bits * weights.size + 32 * weights.shape[0] * -(-weights.shape[1] // group)
        total = sum(weights.size for weights in self.original.values())
        return {"asked": bits, "bits": used / total, **self.quality(done.__getitem__, list(done))}


def add_bench_arguments(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """What a :class:`Bench` is made of, and what results call it."""
    parser.add_argument("--model", type=Path, required=required)
    parser.add_argument("--variable", required=required, help="what the result calls the model's path")
    parser.add_argument("--text", type=Path, required=required)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--window-tokens", type=int, default=1024)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_bench_arguments(parser, required=True)
    parser.add_argument("--bits", type=float, nargs="+", required=True)
    parser.add_argument("--moments", nargs="+", required=True, metavar="LABEL=FILE")
    parser.add_argument("--allocations", nargs="+", default=["sensitivity"])
    parser.add_argument("--quantizers", nargs="+", default=["scalar"], choices=["scalar", "trellis"])
    parser.add_argument("--without", action="store_true", help="without moments, too")
    parser.add_argument(
        "--embeddings",
        nargs="*",
        default=[],
        metavar="code|BITS",
        help="once more at the first rate, embeddings coded so",
    )
    parser.add_argument("--gptq", nargs="*", default=[], metavar="BITS:GROUP")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    files = {label: Path(file) for label, file in (given.split("=", 1) for given in arguments.moments)}
    require_inputs(parser, arguments.model, arguments.text, *files.values())
    bench = Bench(arguments.model, arguments.text, arguments.windows, arguments.window_tokens)
    rows: list[dict[str, Any]] = []

    def add(method: str, moments: str | None, row: dict[str, Any]) -> None:
        rows.append({"method": method, "moments": moments, **row})
        print(f"{method:24} {moments or '':10} {row['bits']:.3f} bits, KL {row['kl']:.5f}", file=sys.stderr)

    for bits in arguments.bits:
        for quantizer in arguments.quantizers:
            said = "" if quantizer == "scalar" else f", {quantizer}"
            if arguments.without:
                add(f"without moments{said}", None, bench.coded(bits, None, quantizer=quantizer))
            for label, file in files.items():
                for allocation in arguments.allocations:
                    row = bench.coded(bits, file, allocation=allocation, quantizer=quantizer)
                    add(f"{allocation}{said}", label, row)
    for label, file in files.items():
        for embeddings in arguments.embeddings:
            rate = "code" if embeddings == "code" else float(embeddings)
            options = {"allocation": "sensitivity", "embeddings": rate}
            add(f"embeddings {embeddings}", label, bench.coded(arguments.bits[0], file, **options))
        for given in arguments.gptq:
            width, group = map(int, given.split(":"))
            add(f"GPTQ INT{width} g{group}", label, bench.gptq(width, group, file))
    made = {}
    for label, file in files.items():
        with Moments(file) as moments:
            keys = ("text", "part", "tokens", "window_tokens", "seed")
            made[label] = {key: moments.made.get(key) for key in keys}
    if arguments.json is not None:
        write_result(
            arguments.json,
            {
                "benchmark": "calibrated-quality",
                "model": arguments.model.name,
                "windows": arguments.windows,
                "window_tokens": arguments.window_tokens,
                "linears": len(bench.original),
                "weights": sum(weights.size for weights in bench.original.values()),
                "moments": made,
                "rows": rows,
                **provenance(
                    {arguments.variable: arguments.model, "KVPACK_BOOKS_TEXT": arguments.text},
                    ("torch", "transformers"),
                ),
            },
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
