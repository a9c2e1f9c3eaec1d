"""How close is a causal language model with coded weights to the original: KL, same top token, perplexity.

    python benchmarks/books_quality.py "$KVPACK_BOOKS_MODEL" "$KVPACK_BOOKS_TEXT" \\
        --json benchmarks/results/DATE-books-quality.json --plot books-quality.png
    python benchmarks/books_quality.py "$KVPACK_BOOKS_MODEL" "$KVPACK_BOOKS_TEXT" --find-default

The original runs in fp32 on its bf16 weights; a setting replaces the weights that kvpack codes by default (all linear
layers; embeddings and norms stay) with what a compressed file gives back. KL(original ‖ coded) and the share of equal
top tokens are means over the tokens of the first --windows windows of 1024 tokens that do not overlap; perplexity is
that of the next token after each position of the first --perplexity-windows, or of the whole text with --full.

Settings: ``tensor:BITS`` and ``model:BITS`` (rate for each tensor, or one step for the model; with ``:compact`` or
``:fast`` behind, in that layout; with ``:parts=N`` or ``:stack``, as --tensor-parallel N and --stack do),
``near-lossless``, and the fixed-width baselines ``int4-g128`` and ``int3-g128`` (asymmetric, fp16 scale and minimum per
128 weights).
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
from bench_common import (
    MeanNoise,
    environment_path,
    group_quantized,
    print_table,
    provenance,
    relative_noise,
    write_result,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvpack

WINDOW = 1024
TENSOR_BITS = (2.5, 3, 3.5, 4, 4.25, 4.5, 4.75, 5, 5.25, 5.5, 6)
MODEL_BITS = (3.5, 4.25)
DEFAULT_SETTINGS = [
    *(f"tensor:{bits:g}" for bits in TENSOR_BITS),
    *(f"model:{bits:g}" for bits in MODEL_BITS),
    "near-lossless",
    "int4-g128",
    "int3-g128",
]
GRID_PER_BIT = 20


class Evaluator:
    """A model whose linear layers are exchanged, and the original's answers to compare with."""

    def __init__(self, directory: Path, text: Path, windows: int, perplexity_windows: int | None, device: str) -> None:
        self.directory = directory
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval().to(device)
        tokenizer = AutoTokenizer.from_pretrained(directory)
        ids = tokenizer(text.read_text(encoding="utf-8"), return_tensors="pt", verbose=False).input_ids[0]
        self.tokens = len(ids)
        available = (len(ids) - 1) // WINDOW
        self.windows = min(windows, available)
        self.perplexity_windows = available if perplexity_windows is None else min(perplexity_windows, available)
        self.ids = ids.to(device)
        self.parameters = dict(self.model.named_parameters())
        # What compress codes by default; its method does not matter here.
        report = kvpack.compress(directory, config=kvpack.QuantConfig(preset="near-lossless"), dry_run=True)
        coded = [tensor.name for tensor in report.tensors if tensor.method != "keep"]
        self.original = {name: self.parameters[name].detach().cpu().numpy().copy() for name in coded}
        self.original_log_probabilities = torch.empty(self.windows, WINDOW, self.model.config.vocab_size, device=device)
        self.baseline = self._run(compare=False)

    def _run(self, *, compare: bool) -> dict[str, Any]:
        loss, kl, same = 0.0, [], 0
        with torch.inference_mode():
            for window in range(max(self.windows, self.perplexity_windows)):
                first = window * WINDOW
                logits = self.model(self.ids[None, first : first + WINDOW]).logits[0]
                log_probabilities = torch.log_softmax(logits, -1)
                if window < self.perplexity_windows:
                    following = self.ids[first + 1 : first + WINDOW + 1, None]
                    loss -= log_probabilities.gather(1, following).double().sum().item()
                if window >= self.windows:
                    continue
                reference = self.original_log_probabilities[window]
                if compare:
                    divergence = (reference.exp() * (reference - log_probabilities)).sum(-1)
                    kl.append(divergence.double().mean().item())
                    same += int((reference.argmax(-1) == log_probabilities.argmax(-1)).sum())
                else:
                    reference.copy_(log_probabilities)
        result: dict[str, Any] = {"perplexity": math.exp(loss / (self.perplexity_windows * WINDOW))}
        if compare:
            # The windows' spread tells how far the mean would move with other text.
            error = np.std(kl, ddof=1) / math.sqrt(len(kl)) if len(kl) > 1 else float("nan")
            result |= {
                "kl": float(np.mean(kl)),
                "kl_standard_error": None if math.isnan(error) else float(error),
                "same_top": same / (self.windows * WINDOW),
            }
        return result

    def _evaluate(self, weights_of: Callable[[str], np.ndarray[Any, Any]]) -> dict[str, Any]:
        noise = MeanNoise()
        with torch.no_grad():
            for name, original in self.original.items():
                coded = weights_of(name)
                noise.add(relative_noise(original, coded), original.size)
                self.parameters[name].copy_(torch.from_numpy(np.array(coded, np.float32)))
        return {"noise_db": noise.db, **self._run(compare=True)}

    def _compressed(self, **options: Any) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "coded"
            report = kvpack.compress(self.directory, out, kvpack.QuantConfig(**options))
            # A rate that a tensor does not reach leaves it as it is: its bits count, and it is named.
            chosen = [tensor for tensor in report.tensors if tensor.name in self.original]
            with kvpack.open(out) as reader:
                measured = self._evaluate(lambda name: reader.dequantize(name, "float32"))
        return {
            "bits": 8 * sum(tensor.bytes for tensor in chosen) / sum(w.size for w in self.original.values()),
            "not_coded": [tensor.name for tensor in chosen if tensor.method == "keep"],
            "layouts": sorted({tensor.layout for tensor in chosen if tensor.layout}),
            "output_bytes": report.output_bytes,
            "compress_seconds": report.seconds,
            "reported_noise_db": report.noise_db,
            **measured,
        }

    def _grouped(self, bits: int) -> dict[str, Any]:
        done = {name: group_quantized(weights, bits) for name, weights in self.original.items()}
        used = sum(total for _, total in done.values()) / sum(w.size for w in self.original.values())
        return {"bits": used, **self._evaluate(lambda name: done[name][0])}

    def setting(self, name: str) -> dict[str, Any]:
        """All measures of one setting."""
        began = time.perf_counter()
        kind, *rest = name.split(":")
        if kind in ("tensor", "model") and rest:
            options: dict[str, Any] = {"bits": float(rest[0]), "allocation": kind}
            for option in rest[1:]:
                if option == "stack":
                    options["stack"] = True
                elif option.startswith("parts="):
                    options["tensor_parallel"] = int(option.removeprefix("parts="))
                else:
                    options["layout"] = option
            result = self._compressed(**options)
        elif name == "near-lossless":
            result = self._compressed(preset=name)
        elif name in ("int4-g128", "int3-g128"):
            result = self._grouped(int(name[3]))
        else:
            raise SystemExit(f"unknown setting {name!r}; see --help")
        print(
            f"{name}: {result['bits']:.3f} b, KL {result['kl']:.5f} ({time.perf_counter() - began:.0f} s)",
            file=sys.stderr,
        )
        if result.get("not_coded"):
            print(f"{name}: not coded: {', '.join(result['not_coded'])}", file=sys.stderr)
        return {"setting": name, **result}


def find_default(evaluator: Evaluator, max_kl: float, low: float, high: float) -> tuple[float, list[dict[str, Any]]]:
    """The lowest rate of a grid of 0.05 bits whose KL does not exceed ``max_kl``, and all that was evaluated."""
    done: dict[int, dict[str, Any]] = {}

    def passes(point: int) -> bool:
        if point not in done:
            done[point] = evaluator.setting(f"tensor:{point / GRID_PER_BIT:g}")
        return bool(done[point]["kl"] <= max_kl)

    fails, enough = round(low * GRID_PER_BIT), round(high * GRID_PER_BIT)
    if not passes(enough):
        raise SystemExit(f"KL is above {max_kl} even at {high} bits")
    if passes(fails):
        raise SystemExit(f"KL is at most {max_kl} already at {low} bits; lower --low")
    while enough - fails > 1:
        middle = (fails + enough) // 2
        if passes(middle):
            enough = middle
        else:
            fails = middle
    return enough / GRID_PER_BIT, [done[point] for point in sorted(done)]


def plot(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """KL against bits a weight."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    for kind, label, style in (
        ("tensor", "kvpack, rate for each tensor", "o-"),
        ("model", "kvpack, one step for the model", "s--"),
        ("near-lossless", "kvpack near-lossless", "D"),
        ("int", "fixed width, groups of 128", "^"),
    ):
        points = sorted((row["bits"], row["kl"]) for row in rows if row["setting"].startswith(kind))
        if points:
            axes.semilogy([bits for bits, _ in points], [kl for _, kl in points], style, label=label)
    axes.axhline(0.01, color="0.6", lw=0.8)
    axes.set_xlabel("bits a weight of the coded tensors, everything counted")
    axes.set_ylabel("KL(original ‖ coded), nats a token")
    axes.set_title(title)
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120, format="png")


def show(rows: list[dict[str, Any]]) -> None:
    print_table(
        ("setting", "bits", "noise dB", "KL", "± (s.e.)", "same top", "perplexity", "compress s", "not coded"),
        (
            (
                row["setting"],
                f"{row['bits']:.3f}",
                f"{row['noise_db']:.2f}",
                f"{row['kl']:.5f}",
                "–" if row["kl_standard_error"] is None else f"{row['kl_standard_error']:.5f}",
                f"{row['same_top']:.4f}",
                f"{row['perplexity']:.3f}",
                f"{row['compress_seconds']:.1f}" if "compress_seconds" in row else None,
                len(row["not_coded"]) if "not_coded" in row else None,
            )
            for row in rows
        ),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", default=environment_path("KVPACK_BOOKS_MODEL"))
    parser.add_argument("text", type=Path, nargs="?", default=environment_path("KVPACK_BOOKS_TEXT"))
    parser.add_argument("--settings", default=",".join(DEFAULT_SETTINGS), help="comma-separated; default: all")
    parser.add_argument("--windows", type=int, default=8, help="windows for KL and equal top tokens (32 MB each)")
    parser.add_argument("--perplexity-windows", type=int, default=12)
    parser.add_argument("--full", action="store_true", help="perplexity over the whole text")
    parser.add_argument("--find-default", action="store_true", help="bisect for the lowest bits with KL <= --max-kl")
    parser.add_argument("--device", default="cpu", help="where the model runs (in fp32 proper); coding is the CPU's")
    parser.add_argument("--max-kl", type=float, default=0.01)
    parser.add_argument("--low", type=float, default=3.0, help="where --find-default begins: a rate that fails")
    parser.add_argument("--high", type=float, default=6.5, help="where --find-default begins: a rate that passes")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="a PNG")
    options = parser.parse_args()
    if options.model is None or options.text is None:
        parser.error("MODEL and TEXT are needed, or KVPACK_BOOKS_MODEL and KVPACK_BOOKS_TEXT")
    result: dict[str, Any] = {
        "what": "books-quality",
        **provenance(
            {"KVPACK_BOOKS_MODEL": options.model, "KVPACK_BOOKS_TEXT": options.text}, ("torch", "transformers")
        ),
        "torch_threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if options.device.startswith("cuda") else "cpu",
    }
    perplexity_windows = None if options.full else options.perplexity_windows
    evaluator = Evaluator(options.model, options.text, options.windows, perplexity_windows, options.device)
    result |= {
        "tokens_in_text": evaluator.tokens,
        "window_tokens": WINDOW,
        "kl_windows": evaluator.windows,
        "perplexity_windows": evaluator.perplexity_windows,
        "coded_tensors": len(evaluator.original),
        "coded_weights": sum(weights.size for weights in evaluator.original.values()),
        "original_perplexity": evaluator.baseline["perplexity"],
    }
    print(f"original: perplexity {result['original_perplexity']:.3f}", file=sys.stderr)
    if options.find_default:
        default, rows = find_default(evaluator, options.max_kl, options.low, options.high)
        result |= {"max_kl": options.max_kl, "lowest_bits": default}
    else:
        rows = [evaluator.setting(name) for name in options.settings.split(",")]
    result["rows"] = rows
    show(rows)
    print(f"\noriginal perplexity {result['original_perplexity']:.3f} on {evaluator.perplexity_windows} windows")
    if options.find_default:
        print(f"lowest rate with KL <= {options.max_kl} on {evaluator.windows} windows: {default:g} bits")
    if options.json:
        write_result(options.json, result)
    if options.plot:
        plot(rows, options.plot, f"{options.model.name}: distance from the original")


if __name__ == "__main__":
    main()
