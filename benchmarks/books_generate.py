"""Generating with coded weights: are the logits those of the dequantized weights, and how many tokens a second?

    python benchmarks/books_generate.py "$KVPACK_BOOKS_MODEL" "$KVPACK_BOOKS_TEXT" \\
        --json benchmarks/results/DATE-books-generate.json
    python benchmarks/books_generate.py "$KVPACK_BOOKS_MODEL" --device cpu --steps 4 --context 16

One sequence, a small Llama written here (so that nothing but the linear layers differs), and one CUDA graph a token:
the next token, its position and the KV cache are written inside it. The same graph runs over the context with each
token put in, which gives the logits of products with one activation vector; a second pass takes the whole context at
once. Both are compared with the fp32 logits of the weights that the coded file stands for. A model of 27 M parameters
lies in the L2 cache of a large GPU, coded or not: the tokens a second are about launches and small layers, not memory.

A setting is a rate or ``near-lossless``, with a layout after a colon: ``4.25``, ``4.25:fast``, ``near-lossless``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_common import device_record, environment_path, print_table, provenance, synchronize, write_result
from torch.nn.functional import linear, silu

import kvpack
from kvpack.runtime.weights.load import load

DEFAULT_SETTINGS = "4.25,4.25:fast,4.85,near-lossless"
REPEATS = 7
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

Tensors = dict[str, torch.Tensor]
Product = Callable[[torch.Tensor], torch.Tensor]


class Llama:
    """A Llama's forward pass over ``tensors`` (embeddings and norms) and ``products`` (the linear layers)."""

    def __init__(
        self, config: dict[str, Any], tensors: Tensors, products: dict[str, Product], dtype: torch.dtype
    ) -> None:
        self.config, self.products, self.dtype = config, products, dtype
        self.tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        self.device = next(iter(tensors.values())).device
        self.heads, self.kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.head_dim = config.get("head_dim") or config["hidden_size"] // self.heads
        self.layers = config["num_hidden_layers"]

    def begin(self, length: int) -> None:
        """An empty cache of ``length`` tokens."""
        shape = (self.layers, 2, self.kv_heads, length, self.head_dim)
        self.cache = torch.zeros(shape, dtype=self.dtype, device=self.device)
        exponents = torch.arange(0, self.head_dim, 2, device=self.device, dtype=torch.float32) / self.head_dim
        angles = torch.arange(length, device=self.device)[:, None] / self.config["rope_theta"] ** exponents
        angles = torch.cat([angles, angles], dim=-1)
        self.cosine, self.sine = angles.cos().to(self.dtype), angles.sin().to(self.dtype)
        self.places = torch.arange(length, device=self.device)

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.config["rms_norm_eps"])
        return wide.to(self.dtype) * self.tensors[name]

    def _rotate(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
        return x * self.cosine[positions] + turned * self.sine[positions]

    def logits(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Logits [tokens, vocabulary] of tokens at positions, which are written into the cache."""
        h = self.tensors["model.embed_tokens.weight"][tokens]
        hidden = (self.places <= positions[:, None]).logical_not()
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}"
            products = {
                name.rpartition(".")[2]: p for name, p in self.products.items() if name.startswith(f"{prefix}.")
            }
            n = self._norm(h, f"{prefix}.input_layernorm.weight")
            q, k, v = (
                products[name](n).view(len(tokens), -1, self.head_dim).transpose(0, 1)
                for name in ("q_proj", "k_proj", "v_proj")
            )
            keys, values = self.cache[layer]
            keys.index_copy_(1, positions, self._rotate(k, positions))
            values.index_copy_(1, positions, v)
            q = self._rotate(q, positions).reshape(self.kv_heads, -1, self.head_dim)
            scores = (q @ keys.transpose(1, 2)).float() * self.head_dim**-0.5
            scores = scores.view(self.heads, len(tokens), -1).masked_fill(hidden, float("-inf"))
            weights = scores.softmax(-1).to(self.dtype).view(self.kv_heads, -1, len(self.places))
            mixed = (weights @ values).view(self.heads, len(tokens), self.head_dim)
            h = h + products["o_proj"](mixed.transpose(0, 1).reshape(len(tokens), -1))
            n = self._norm(h, f"{prefix}.post_attention_layernorm.weight")
            h = h + products["down_proj"](silu(products["gate_proj"](n)) * products["up_proj"](n))
        h = self._norm(h, "model.norm.weight")
        head = self.tensors.get("lm_head.weight", self.tensors["model.embed_tokens.weight"])
        return linear(h, head)


class Generator:
    """One token after another: a graph on a GPU, the same calls on the CPU."""

    def __init__(self, model: Llama, length: int) -> None:
        self.model = model
        model.begin(length)
        self.token = torch.zeros(1, dtype=torch.int64, device=model.device)
        self.position = torch.zeros(1, dtype=torch.int64, device=model.device)
        self.step: Callable[[], object] = self._step
        self._step()
        if model.device.type == "cuda":
            torch.cuda.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self._step()
            self.step = self.graph.replay
        self.rewind(0)

    def _step(self) -> None:
        self.out = self.model.logits(self.token, self.position)
        self.token.copy_(self.out.argmax(-1))
        self.position.add_(1)

    def rewind(self, position: int) -> None:
        self.position.fill_(position)

    def read(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits after each of the given tokens, one step for each."""
        self.rewind(0)
        found = []
        for token in tokens:
            self.token.copy_(token[None])
            self.step()
            found.append(self.out[0].float().clone())
        return torch.stack(found)

    def generate(self, context: int, steps: int) -> float:
        """Seconds for ``steps`` tokens after ``context``."""
        self.rewind(context)
        synchronize(self.model.device)
        began = time.perf_counter()
        for _ in range(steps):
            self.step()
        synchronize(self.model.device)
        return time.perf_counter() - began


def distance(logits: torch.Tensor, reference: torch.Tensor) -> dict[str, float]:
    error = (logits.double() - reference.double()).norm() / reference.double().norm()
    same = (logits.argmax(-1) == reference.argmax(-1)).double().mean()
    return {"logit_error": error.item(), "same_top_percent": 100 * same.item()}


def is_linear(name: str) -> bool:
    return name.removesuffix(".weight").rpartition(".")[2] in LINEARS


def dense_products(weights: Tensors, dtype: torch.dtype) -> dict[str, Product]:
    def product(weight: torch.Tensor) -> Product:
        return lambda x: linear(x, weight)

    return {name.removesuffix(".weight"): product(w.to(dtype)) for name, w in weights.items() if is_linear(name)}


def compare_with_transformers(directory: Path, config: dict[str, Any], weights: Tensors, tokens: torch.Tensor) -> Any:
    """Is the forward pass above a Llama's? Relative difference of fp32 logits, or why there is none."""
    try:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        theirs = model(tokens.cpu()[None]).logits[0]
    except Exception as error:  # a check of this script, not a part of what it measures
        return f"not compared: {type(error).__name__}"
    cpu = {name: tensor.float().cpu() for name, tensor in weights.items()}
    mine = Llama(config, cpu, dense_products(cpu, torch.float32), torch.float32)
    mine.begin(len(tokens))
    ours = mine.logits(tokens.cpu(), torch.arange(len(tokens)))
    return distance(ours, theirs)["logit_error"]


def compress(directory: Path, out: Path, setting: str) -> Any:
    rate, _, layout = setting.partition(":")
    options: dict[str, Any] = {"preset": rate} if rate == "near-lossless" else {"bits": float(rate)}
    return kvpack.compress(directory, out, kvpack.QuantConfig(layout=layout or "auto", **options))


def whole(model: Llama, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of all tokens in one pass."""
    model.begin(len(tokens))
    return model.logits(tokens, torch.arange(len(tokens), device=tokens.device)).float()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", default=environment_path("KVPACK_BOOKS_MODEL"))
    parser.add_argument("text", type=Path, nargs="?", default=environment_path("KVPACK_BOOKS_TEXT"))
    parser.add_argument("--settings", default=DEFAULT_SETTINGS)
    parser.add_argument("--context", type=int, default=256, help="tokens whose logits are compared")
    parser.add_argument("--steps", type=int, default=256, help="tokens that are generated after them")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.model is None:
        parser.error("MODEL is needed, or KVPACK_BOOKS_MODEL")
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA device (--device cpu runs it without graphs, for its logits)")
    config = json.loads((options.model / "config.json").read_text())
    packages = ("torch", "transformers", "cupy-cuda13x", "cupy-cuda12x", "triton")
    variables = {"KVPACK_BOOKS_MODEL": options.model, "KVPACK_BOOKS_TEXT": options.text}
    result: dict[str, Any] = {
        "what": "books-generate",
        **provenance(variables, packages),
        "device": device_record(device),
        "context": options.context,
        "steps": options.steps,
    }
    if options.text is not None:
        from transformers import AutoTokenizer

        text = options.text.read_text(encoding="utf-8")[: 16 * options.context]
        ids = AutoTokenizer.from_pretrained(options.model)(text, verbose=False).input_ids[: options.context]
        tokens = torch.tensor(ids, device=device)
    else:
        tokens = torch.randint(0, config["vocab_size"], (options.context,), device=device)
    with torch.no_grad(), tempfile.TemporaryDirectory() as scratch:
        measure(options, config, device, tokens, Path(scratch), result)
    print_table(
        ("weights", "bits", "MB", "tokens/s", "× dense", "logits, M = 1", "logits, whole", "same top %"),
        (
            (
                row["setting"],
                f"{row['bits_per_weight']:.3f}",
                f"{row['linear_megabytes']:.1f}",
                f"{row['tokens_per_s']:.0f}",
                f"{row['ratio_to_dense']:.2f}",
                f"{row['logit_error']:.2e}",
                f"{row['whole_logit_error']:.2e}",
                f"{row['same_top_percent']:.2f}",
            )
            for row in result["rows"]
        ),
    )
    print(f"\nthe forward pass against transformers': {result['difference_from_transformers']}")
    if options.json:
        write_result(options.json, result)


def measure(
    options: argparse.Namespace,
    config: dict[str, Any],
    device: torch.device,
    tokens: torch.Tensor,
    scratch: Path,
    result: dict[str, Any],
) -> None:
    dtype = torch.bfloat16
    length = options.context + options.steps + 1
    with kvpack.open(options.model) as reader:
        original = {n: torch.from_numpy(reader.dequantize(n, "float32").copy()).to(device) for n in reader}
    others = {name: tensor for name, tensor in original.items() if not is_linear(name)}
    result["difference_from_transformers"] = compare_with_transformers(options.model, config, original, tokens)

    def reference(weights: Tensors) -> torch.Tensor:
        return whole(Llama(config, others, dense_products(weights, torch.float32), torch.float32), tokens)

    def row(setting: str, bits: float, size: int, model: Llama, target: torch.Tensor) -> dict[str, Any]:
        at_once = whole(model, tokens)
        generator = Generator(model, length)
        generators.append(generator)
        return {
            "setting": setting,
            "bits_per_weight": bits,
            "linear_megabytes": size / 1e6,
            **distance(generator.read(tokens), target),
            "whole_logit_error": distance(at_once, target)["logit_error"],
        }

    generators: list[Generator] = []
    count = sum(tensor.numel() for name, tensor in original.items() if is_linear(name))
    dense = Llama(config, others, dense_products(original, dtype), dtype)
    rows = [row("original, dense bf16", 16.0, 2 * count, dense, reference(original))]
    for setting in options.settings.split(","):
        print(f"{setting} …", file=sys.stderr)
        out = scratch / setting.replace(":", "-")
        compress(options.model, out, setting)
        state = load(out, device, progress=False)
        coded = [name for name in state if is_linear(name) and hasattr(state[name], "linear")]
        weights = {
            name: state[name].dequantize(torch.float32) if name in coded else original[name]
            for name in original
            if is_linear(name)
        }
        products = dense_products({name: w for name, w in weights.items() if name not in coded}, dtype)
        products |= {name.removesuffix(".weight"): state.linear(name.removesuffix(".weight")) for name in coded}
        target = reference(weights)
        size = sum(state[name].nbytes for name in coded) + sum(
            2 * w.numel() for n, w in weights.items() if n not in coded
        )
        stored = sum(8 * (state[name].blob_bytes + 4 * state[name].scales.numel()) for name in coded)
        bits = stored / sum(weights[name].numel() for name in coded)
        rows.append(row(f"{setting}, coded", bits, size, Llama(config, others, products, dtype), target))
        rows[-1]["not_coded"] = sorted(set(weights) - set(coded))
        same = Llama(config, others, dense_products(weights, dtype), dtype)
        rows.append(row(f"{setting}, its dequantized weights in bf16", 16.0, 2 * count, same, target))
    seconds: list[list[float]] = [[] for _ in generators]
    for _ in range(REPEATS):  # in turns, so that the clocks' changes meet all
        for found, generator in zip(seconds, generators, strict=True):
            found.append(generator.generate(options.context, options.steps))
    for entry, found in zip(rows, seconds, strict=True):
        entry["tokens_per_s"] = options.steps / statistics.median(found)
        entry["spread"] = (max(found) - min(found)) / statistics.median(found)
        entry["ratio_to_dense"] = entry["tokens_per_s"] / rows[0]["tokens_per_s"]
    result["rows"] = rows


if __name__ == "__main__":
    main()
