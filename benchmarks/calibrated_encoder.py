"""An encoder's linears quantized with data and without, kvpack beside others: error of their outputs, at equal bits.

    python benchmarks/calibrated_encoder.py --model "$KVPACK_MINILM" --variable KVPACK_MINILM \\
        --text "$KVPACK_BOOKS_TEXT" --windows 64 --window-tokens 128 --tokens 65536 --bits 4.25 4.1875 4.125 3.25 3 \\
        --json benchmarks/results/DATE-calibrated-encoder-minilm.json

An encoder has no loss of its own, so no sensitivities: kvpack codes each matrix at the rate, with feedback by the
second moments of its inputs. Those who see data see the same ``--tokens`` tokens from three quarters of the text on;
errors are of the first windows of the text, with the inputs that the original's linears get there: Σ|Δy|² / Σ|y|²,
biases aside, which is tr(E·H·Eᵀ) / tr(W·H·Wᵀ) with the windows' second moment H. All that a quantizer stores for these
linears counts.

Others are those of calibrated_peers.py that know nothing of a decoder: ``gptq``, ``hqq``, ``bnb-nf4``,
``torchao-int4``. A peer that is not installed is named and left out.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from bench_common import provenance, require_inputs, write_result
from calibrated_peers import Done, Weights, bnb_nf4, hqq, own_gptq, torchao_int4
from calibrated_quality import add_bench_arguments
from equal_quality import BATCH, Encoder

import kvpack
from kvpack.encode.moments import F32, Moments, MomentsWriter

LAYERS = "encoder.layer."


def second_moments(model: torch.nn.Module, names: list[str], ids: torch.Tensor) -> dict[str, F32]:
    """E[x·xᵀ] of the inputs of linears, by their weights' names, over windows i64 [windows, tokens]."""
    modules = {name: model.get_submodule(name.removesuffix(".weight")) for name in names}
    sums = {name: torch.zeros((module.in_features,) * 2, dtype=torch.float64) for name, module in modules.items()}

    def add(_: Any, inputs: tuple[torch.Tensor], name: str) -> None:
        x = inputs[0].reshape(-1, inputs[0].shape[-1])
        sums[name] += (x.T @ x).double()

    handles = [module.register_forward_pre_hook(partial(add, name=name)) for name, module in modules.items()]
    with torch.inference_mode():
        for batch in ids.split(BATCH):
            model(batch)
    for handle in handles:
        handle.remove()
    return {name: (total / ids.numel()).float().numpy() for name, total in sums.items()}


class Bench:
    """The original, what its linears get on held-out windows, and moments of others in a file."""

    def __init__(self, arguments: argparse.Namespace, moments: Path) -> None:
        self.directory = arguments.model
        self.encoder = Encoder(self.directory, arguments.text, arguments.windows, arguments.window_tokens)
        self.original = {name: w for name, w in self.encoder.original.items() if name.startswith(LAYERS)}
        names = list(self.original)
        self.held_out = second_moments(self.encoder.model, names, self.encoder.ids)
        tokenizer = transformers.AutoTokenizer.from_pretrained(self.directory)
        ids = tokenizer(arguments.text.read_text("utf-8"), return_tensors="pt", verbose=False).input_ids[0]
        begin, window = len(ids) * 3 // 4, arguments.window_tokens
        own = ids[begin : begin + arguments.tokens // window * window].reshape(-1, window)
        self.tokens = own.numel()
        with MomentsWriter(moments) as writer:
            for name, moment in second_moments(self.encoder.model, names, own).items():
                writer.add_second_moment(name, moment.shape, iter([moment]), np.array([self.tokens]))
            counts = np.bincount(own.reshape(-1), minlength=tokenizer.vocab_size)
            writer.finish({name: name for name in names}, counts, {"tokens": self.tokens})

    def quality(self, weights: Weights) -> dict[str, Any]:
        errors = {}
        for name, original in self.original.items():
            h = self.held_out[name].astype(np.float64)
            error, values = weights[name].astype(np.float64) - original, original.astype(np.float64)
            errors[name] = float(((error @ h) * error).sum() / ((values @ h) * values).sum())
        worst = max(errors, key=errors.__getitem__)
        return {
            "error": float(np.mean(list(errors.values()))),
            "worst_error": errors[worst],
            "worst": worst,
            "distance": self.encoder.distance(weights),
        }

    def coded(self, bits: float, moments: Path | None, quantizer: str) -> Done:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "coded"
            options = {"moments": moments, "quantizer": quantizer, "exclude": "pooler"}
            report = kvpack.compress(self.directory, out, bits=bits, **options)
            used = 8 * sum(tensor.bytes for tensor in report.tensors if tensor.name in self.original)
            with kvpack.open(out) as reader:
                return {name: np.array(reader.dequantize(name, "float32")) for name in self.original}, used


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_bench_arguments(parser, required=True)
    parser.add_argument("--tokens", type=int, default=65536, help="that those read who see data")
    parser.add_argument("--bits", type=float, nargs="+", required=True)
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    require_inputs(parser, arguments.model, arguments.text)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "moments.safetensors"
        bench = Bench(arguments, file)
        total = sum(weights.size for weights in bench.original.values())

        def add(quantizer: str, with_data: bool, quantize: Callable[[], Done]) -> None:
            began = time.perf_counter()
            try:
                weights, bits = quantize()
            except (ImportError, OSError) as error:
                print(f"{quantizer}: left out: {error}", file=sys.stderr)
                return
            seconds = round(time.perf_counter() - began, 1)
            row = {"quantizer": quantizer, "with_data": with_data, "bits": bits / total, "seconds": seconds}
            rows.append({**row, **bench.quality(weights)})
            print(f"{quantizer:20} {bits / total:.3f} bits, error {rows[-1]['error']:.6f}", file=sys.stderr)

        for bits in arguments.bits:
            for quantizer, name in (("scalar", "kvpack"), ("trellis", "kvpack, trellis")):
                for moments in (None, file):
                    add(name, moments is not None, partial(bench.coded, bits, moments, quantizer))
        group = arguments.group
        with Moments(file) as found:
            for bits in (4, 3):
                for with_data, peer in ((True, own_gptq), (False, hqq)):
                    name = f"{peer.__name__.removeprefix('own_')}-int{bits}-g{group}"
                    add(name, with_data, partial(peer, bench.original, found, bits, group))
            add("bnb-nf4", False, partial(bnb_nf4, bench.original, found))
            add(f"torchao-int4-g{group}", False, partial(torchao_int4, bench.original, found, group))
    if arguments.json is not None:
        write_result(
            arguments.json,
            {
                "benchmark": "calibrated-encoder",
                "model": arguments.model.name,
                "windows": arguments.windows,
                "window_tokens": arguments.window_tokens,
                "linears": len(bench.original),
                "tokens": bench.tokens,
                "text": arguments.text.name,
                "metric": bench.encoder.metric,
                "rows": rows,
                **provenance(
                    {arguments.variable: arguments.model, "KVPACK_BOOKS_TEXT": arguments.text},
                    ("torch", "transformers", "hqq", "bitsandbytes", "torchao"),
                ),
            },
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
