"""Tokens a second of a model with the shape of Llama-3.1-8B: dense bf16 against coded weights, one CUDA graph a token.

    python benchmarks/llama_shape.py --json benchmarks/results/DATE-llama-shape.json
    python benchmarks/llama_shape.py --layers 8 --batches 1,8 --weights bf16,fast
    python benchmarks/llama_shape.py --shape tiny --device cpu --layers 2 --context 16 --no-compile  # tries it out

The decoder is as plain as a server's: q, k and v are one matrix, gate and up are one, norms, rotary embedding and
SwiGLU are fused by torch.compile (``--no-compile``: not), and attention is SDPA to exactly the context, the four query
heads of a group as rows. All of this, the head and the embedding are the same code and the same bf16 tensors for all
weights; only the linear layers differ.

Weights are random integers of 5 bits (Gaussian, σ = 3.9, one scale a row), made and coded on the device. One matrix of
each shape is made; each layer has a copy at an address of its own, so that none is in the L2 cache when its turn comes.
All of kvpack's layouts hold the same integers, and bf16 holds them dequantized. So all must give the same logits, which
is checked before anything is timed. ``humming-int4`` (int5, int8; groups of 128) quantizes the same weights by itself.
Weights that are compared are timed in turns, in the same process.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from bench_common import device_record, print_table, provenance, write_result
from torch.nn import functional

from kvpack.bench import peers
from kvpack.bench.linear import copies_of
from kvpack.bench.report import HUMMING, finite
from kvpack.bench.timing import Timed, Work, measure, relative_error
from kvpack.bench.tune import compile_ahead, kernel_of
from kvpack.encode.blob_encoder import encode_elements
from kvpack.format.layout import ElementKind, integer_layout
from kvpack.runtime.codec.encoder import encode_on_device
from kvpack.runtime.device.devices import device_limits, resolve_device
from kvpack.runtime.weights import ops, products
from kvpack.runtime.weights.device_blob import DeviceBlob

DENSE = "bf16"
LAYOUTS = ("fast", "balanced", "compact")
HUMMING_BITS = {name: bits for bits, name in HUMMING.items()}
BITS, SIGMA = 5, 3.9
EPSILON = 1e-5
ROPE_THETA = 500_000.0
# bf16 rounds the sums of each layer; one wrong matrix of a layer gives 0.1 and more. Humming has other weights.
TOLERANCE, OTHER_TOLERANCE = 0.06, 0.7

Product = Callable[[torch.Tensor], torch.Tensor]


class Shape(NamedTuple):
    """Sizes of a Llama."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int

    def matrices(self) -> dict[str, tuple[int, int]]:
        """(rows, columns) of a layer's matrices."""
        return {
            "qkv": ((self.heads + 2 * self.kv_heads) * self.head_dim, self.hidden),
            "o": (self.hidden, self.heads * self.head_dim),
            "gate_up": (2 * self.intermediate, self.hidden),
            "down": (self.hidden, self.intermediate),
        }


SHAPES = {"llama-3.1-8b": Shape(4096, 32, 8, 128, 14336, 128256), "tiny": Shape(128, 4, 2, 32, 256, 300)}


@dataclass
class Weights:
    """One way to hold the linear layers: the products of each layer, and the bytes of all of them."""

    name: str
    layers: list[dict[str, Product]]
    nbytes: int
    tolerance: float
    blobs: dict[str, DeviceBlob]


def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """RMSNorm of [batch, hidden]."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPSILON)).to(x.dtype) * weight


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of [batch, heads, head_dim]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate) * up


class Decoder:
    """All of a model but its linear layers, and a cache of ``context`` tokens, for a batch of sequences.

    A step puts its token at position ``context``, each time anew, and attends to ``context + 1`` tokens.
    """

    def __init__(self, shape: Shape, layers: int, dtype: torch.dtype, device: torch.device, *, compiled: bool) -> None:
        self.shape, self.layers, self.device = shape, layers, device
        generator = torch.Generator(device=device).manual_seed(1)
        random = partial(torch.randn, dtype=dtype, device=device, generator=generator)
        self.embedding = random(shape.vocabulary, shape.hidden)
        self.head = random(shape.vocabulary, shape.hidden) * shape.hidden**-0.5
        self.norms = torch.ones(2 * layers + 1, shape.hidden, dtype=dtype, device=device)
        functions = (norm, rotate, swiglu)
        if compiled:
            functions = tuple(map(torch.compile, functions))
        self.norm, self.rotate, self.swiglu = functions
        self.random = random

    def start(self, batch: int, context: int) -> None:
        """A cache of random keys and values, and a token for each sequence.

        Values are so large that their mean is about 1: what attention gives shall weigh as much as an MLP's result.
        """
        shape = self.shape
        self.cache = self.random(self.layers, 2, batch, shape.kv_heads, context + 1, shape.head_dim)
        self.cache[:, 1] *= context**0.5
        self.tokens = torch.arange(batch, device=self.device) % shape.vocabulary
        half = torch.arange(0, shape.head_dim, 2, device=self.device) / shape.head_dim
        angles = (context / ROPE_THETA**half).repeat(2)
        self.cos, self.sin = angles.cos().to(self.cache.dtype), angles.sin().to(self.cache.dtype)

    def step(self, weights: Weights) -> torch.Tensor:
        """Logits [batch, vocabulary] of the next token."""
        shape = self.shape
        batch = len(self.tokens)
        x = functional.embedding(self.tokens, self.embedding)
        for number, layer in enumerate(weights.layers):
            qkv = layer["qkv"](self.norm(x, self.norms[2 * number]))
            qkv = qkv.view(batch, shape.heads + 2 * shape.kv_heads, shape.head_dim)
            turned = self.rotate(qkv[:, : shape.heads + shape.kv_heads], self.cos, self.sin)
            keys, values = self.cache[number]
            keys[:, :, -1] = turned[:, shape.heads :]
            values[:, :, -1] = qkv[:, shape.heads + shape.kv_heads :]
            q = turned[:, : shape.heads].reshape(batch, shape.kv_heads, -1, shape.head_dim)
            attended = functional.scaled_dot_product_attention(q, keys, values)
            x = x + layer["o"](attended.reshape(batch, -1))
            gate_up = layer["gate_up"](self.norm(x, self.norms[2 * number + 1]))
            x = x + layer["down"](self.swiglu(gate_up))
        return functional.linear(self.norm(x, self.norms[-1]), self.head)


class Source(NamedTuple):
    """One matrix: integers i8 [rows, cols] and scales f32 [rows]."""

    integers: torch.Tensor
    scales: torch.Tensor

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        return (self.integers.float() * self.scales[:, None]).to(dtype)


def sources(shape: Shape, device: torch.device) -> dict[str, Source]:
    generator = torch.Generator(device=device).manual_seed(0)
    half = 1 << (BITS - 1)
    found = {}
    for name, (rows, cols) in shape.matrices().items():
        normal = torch.randn(rows, cols, device=device, generator=generator) * SIGMA
        spread = 0.5 + torch.rand(rows, device=device, generator=generator)
        integers = normal.round_().clamp_(-half, half - 1).to(torch.int8)
        found[name] = Source(integers, spread / (SIGMA * cols**0.5))  # results are as large as activations
    return found


def coded(source: Source, layout_name: str, dtype: torch.dtype) -> DeviceBlob:
    """A matrix in one of kvpack's layouts, coded where it lies."""
    layout = integer_layout(layout_name, ElementKind.SIGNED, BITS)
    elements = (source.integers.to(torch.int16) + (1 << (BITS - 1))).to(torch.uint8)
    device = elements.device
    if device.type == "cuda":
        data = bytes(encode_on_device(elements, layout).blob.cpu().numpy())
    else:
        data = encode_elements(elements.numpy(), layout)
    return DeviceBlob.from_bytes(data, source.scales.cpu().numpy(), dtype, tuple(elements.shape), device)


def held(name: str, found: dict[str, Source], layers: int, dtype: torch.dtype) -> Weights:
    """The linear layers in one way.

    Raises:
        ImportError: Humming cannot be imported.
    """
    products_of: dict[str, list[Product]] = {}
    nbytes, blobs = 0, {}
    for matrix, source in found.items():
        if name in LAYOUTS:
            blobs[matrix] = blob = coded(source, name, dtype)
            products_of[matrix] = [one.linear for one in copies_of(blob, layers)]
            nbytes += layers * blob.nbytes
        elif name == DENSE:
            peer = peers.dense(source.dense(dtype), layers)
        else:
            peer = peers.humming(source.dense(dtype), HUMMING_BITS[name], lambda _: layers)
        if name not in LAYOUTS:
            products_of[matrix] = [partial(peer.apply, one) for one in peer.copies]
            nbytes += layers * peer.weight_bytes
    by_layer = [{matrix: ones[number] for matrix, ones in products_of.items()} for number in range(layers)]
    return Weights(name, by_layer, nbytes, OTHER_TOLERANCE if name in HUMMING_BITS else TOLERANCE, blobs)


def compile_kernels(ways: Sequence[Weights], batches: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
    """All kernels of fused products at once, by several threads, before they are needed one after another."""
    limits = device_limits(device)
    wanted = set()
    for way in ways:
        for blob in way.blobs.values():
            for tokens in batches:
                matrix = ops._coded(*blob._arguments())
                fit = products.fit_product(matrix, tokens, limits) if tokens <= products.MAX_FUSED_TOKENS else None
                if fit is not None:
                    wanted.add(kernel_of(matrix, tokens, fit, limits, dtype))
    compile_ahead(wanted)


def timed(works: Sequence[Work], device: torch.device) -> list[Timed]:
    """Checked and timed in turns; on the CPU, one after another."""
    if device.type == "cuda":
        return measure(works, samples=11, sample_ms=20.0, case_ms=2500)
    done = []
    for work in works:
        began = time.perf_counter()
        error = work.error(torch.as_tensor(work.calls[0]()))
        us = 1e6 * (time.perf_counter() - began)
        wrong = None if error <= work.tolerance else f"WrongResult: relative error {error:.2e}"
        done.append(Timed(error, None if wrong else us, us, us, 1, 1, "eager", wrong))
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--batches", default="1,8,32,128")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--weights", default=",".join((DENSE, *LAYOUTS)), help=f"also {', '.join(HUMMING_BITS)}")
    parser.add_argument("--no-compile", action="store_true", help="leave the small operations to torch, unfused")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path, help="write the result here")
    options = parser.parse_args()
    names = options.weights.split(",")
    if unknown := [name for name in names if name not in (DENSE, *LAYOUTS, *HUMMING_BITS)]:
        parser.error(f"--weights: {', '.join(unknown)} is not one of {', '.join((DENSE, *LAYOUTS, *HUMMING_BITS))}")
    if DENSE not in names:
        names.insert(0, DENSE)  # what the others are compared with
    batches = list(map(int, options.batches.split(",")))
    torch.set_grad_enabled(False)
    device = resolve_device(options.device)
    # Humming's default is fp16; kvpack and torch take both.
    dtype = torch.float16 if set(names) & HUMMING_BITS.keys() else torch.bfloat16
    shape = SHAPES[options.shape]
    found = sources(shape, device)
    weights_count = options.layers * sum(source.integers.numel() for source in found.values())
    ways, rows = [], []
    for name in names:
        began = time.perf_counter()
        try:
            ways.append(held(name, found, options.layers, dtype))
        except ImportError as error:
            print(f"{name}: {peers.import_failure(error, 'humming')}", file=sys.stderr)
            continue
        print(f"{name}: {ways[-1].nbytes / 1e9:.2f} GB, {time.perf_counter() - began:.1f} s", file=sys.stderr)
    if device.type == "cuda":
        compile_kernels(ways, batches, dtype, device)
    decoder = Decoder(shape, options.layers, dtype, device, compiled=not options.no_compile)
    for batch in batches:
        decoder.start(batch, options.context)
        error = relative_error(decoder.step(ways[0]).double())
        works = [Work([partial(decoder.step, way)], error, way.tolerance) for way in ways]
        for way, one in zip(ways, timed(works, device), strict=True):
            rows.append(
                {
                    "weights": way.name,
                    "batch": batch,
                    "linear_bytes": way.nbytes,
                    "bits_per_weight": 8 * way.nbytes / weights_count,
                    "tokens_per_s": None if one.us is None else 1e6 * batch / one.us,
                    **one.as_dict(),
                }
            )
            if one.error:
                print(f"{way.name}, batch {batch}: {one.error}", file=sys.stderr)
    dense = {row["batch"]: row["us"] for row in rows if row["weights"] == DENSE}
    table = []
    for row in rows:
        row["ratio_to_dense"] = dense[row["batch"]] / row["us"] if row["us"] and dense[row["batch"]] else None
        if row["us"]:
            cells = [row["weights"], row["batch"], f"{row['bits_per_weight']:.2f}", f"{row['us'] / 1e3:.3f}"]
            table.append([*cells, f"{row['tokens_per_s']:.0f}", f"{row['ratio_to_dense'] or np.nan:.2f}"])
    headings = ["weights", "batch", "bits a weight", "ms a token", "tokens/s", "× dense"]
    print_table(headings, table, f"{options.shape}, {options.layers} layers, context {options.context}")
    if options.json:
        result = {
            "benchmark": "llama-shape",
            "device": device_record(device),
            **provenance({}, ["torch", "cupy-cuda13x", "cupy-cuda12x", "triton", "humming-kernels"]),
            "shape": {"name": options.shape, **shape._asdict()},
            "layers": options.layers,
            "context": options.context,
            "dtype": str(dtype).removeprefix("torch."),
            "compiled": not options.no_compile,
            "rows": finite(rows),
        }
        write_result(options.json, result)


if __name__ == "__main__":
    main()
