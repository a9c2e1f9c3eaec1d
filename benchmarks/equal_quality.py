"""Bits of kvpack and of fixed-width quantizers at the same quality, and the speed of each at those bits.

    python benchmarks/equal_quality.py measure --model "$KVPACK_BOOKS_MODEL" --text "$KVPACK_BOOKS_TEXT" \\
        --json benchmarks/results/DATE-equal-quality-books.json
    python benchmarks/equal_quality.py measure --model "$KVPACK_MINILM" --text "$KVPACK_BOOKS_TEXT" \\
        --json benchmarks/results/DATE-equal-quality-minilm.json
    python benchmarks/equal_quality.py times benchmarks/results/DATE-equal-quality-*.json \\
        --json benchmarks/results/DATE-equal-quality-times.json        # on a GPU

Quality is the distance of a model whose linear layers were quantized from the original: for causal language models
KL(original ‖ quantized) in nats a token, for encoders 1 − cosine of mean-pooled embeddings. No quantizer sees data.
Every quantizer takes the tensors that kvpack codes by default, and everything it stores for them counts.

``measure`` quantizes with each peer, then looks for the rate at which kvpack has the same distance, for each layout: it
measures rates until two that are at most a quarter of a bit apart enclose the distance, and interpolates its logarithm.

``times`` measures products with one and eight vectors on four shapes of Llama-3.1-8B: kvpack's layouts with the bits
that those rates need (Gaussian integers), beside FP16 and the peers that have a kernel.

Peers: ``intB-gG`` rounds to B bits between a group's least and greatest value (fp16 scale and minimum for G weights);
``intB-sym-gG`` rounds symmetrically (fp16 scale), with the scale of least error among twenty; ``hqq`` moves the minimum
of int4 groups by HQQ's half-quadratic iteration; ``nf4`` is QLoRA's, blocks of 64 with doubly quantized maxima;
``q4_0`` … ``q8_0`` are llama.cpp's, quantized by the gguf package; ``q4_k`` and ``q5_k`` have its format (super-blocks
of 256, scales and minima of 6 bits), with scales that are searched here, as the package cannot, and q5_0 or q5_1 where
columns are no multiple of 256, as llama.cpp has it.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple, Protocol

import numpy as np
from bench_common import F32, device_record, environment_path, group_quantized, print_table, provenance, write_result

import kvpack
from kvpack.encode.blob_decoder import decode_integers
from kvpack.encode.dtypes import as_float32
from kvpack.encode.tensor_encoder import Matrices, NotEncodableError, encode_at_bits
from kvpack.encode.threads import default_threads
from kvpack.format.blob import Blob
from kvpack.format.layout import ElementKind, Layout

LAYOUTS = ("fast", "balanced", "compact")
LOWEST_BITS, HIGHEST_BITS = 2.5, 7.5
# Between rates so far apart the logarithm of the distance is a line, to a percent.
NEAR_BITS = 0.25
BATCH = 8  # embeddings at a time

Quantized = tuple[F32, float]  # what the weights become, and the bits that they take


# --- peers -------------------------------------------------------------------


def in_groups(matrix: F32, group: int) -> F32:
    """[rows, groups, group]; a row's last group is filled up with its last weight."""
    rows, cols = matrix.shape
    short = -cols % group
    return np.pad(matrix, ((0, 0), (0, short)), mode="edge").reshape(rows, -1, group)


def from_groups(grouped: F32, cols: int) -> F32:
    return np.ascontiguousarray(grouped.reshape(len(grouped), -1)[:, :cols])


def fp16(values: F32) -> F32:
    return values.astype(np.float16).astype(np.float32)


def symmetric(matrix: F32, bits: int, group: int) -> Quantized:
    """Integers from −2^(bits − 1), an fp16 scale for each group: of twenty the one of least error."""
    grouped = in_groups(matrix, group)
    most = 2 ** (bits - 1) - 1
    largest = np.abs(grouped).max(-1, keepdims=True)
    best, least = np.zeros_like(grouped), np.full(largest.shape, np.inf, np.float32)
    for share in np.linspace(0.62, 1.0, 20, dtype=np.float32):
        scale = fp16(largest * share / most)
        values = np.clip(np.rint(grouped / np.where(scale == 0, 1, scale)), -most - 1, most) * scale
        error = np.square(grouped - values).sum(-1, keepdims=True)
        best = np.where(error < least, values, best)
        least = np.minimum(error, least)
    return from_groups(best, matrix.shape[1]), matrix.size * bits + 16 * grouped.shape[0] * grouped.shape[1]


def hqq(matrix: F32, bits: int, group: int) -> Quantized:
    """Asymmetric groups whose zero point minimizes an l_0.7 norm (Badri and Shaji, 2023); fp16 scale and zero point."""
    grouped = in_groups(matrix, group)
    most, low = 2**bits - 1, grouped.min(-1, keepdims=True)
    spread = grouped.max(-1, keepdims=True) - low
    inverse = np.minimum(most / np.maximum(spread, 1e-8), 2e4)
    zero, beta = -low * inverse, 10.0
    best, least = zero, np.inf
    for _ in range(20):
        q = np.clip(np.rint(grouped * inverse + zero), 0, most)
        residual = grouped - (q - zero) / inverse
        error = float(np.abs(residual).mean())
        if error >= least:
            break
        best, least = zero, error
        size = np.abs(residual)
        shrunk = np.sign(residual) * np.maximum(size - np.maximum(size, 1e-8) ** (0.7 - 1) / beta, 0)
        zero = (q - (grouped - shrunk) * inverse).mean(-1, keepdims=True)
        beta *= 1.01
    scale, zero = fp16(1 / inverse), fp16(best)
    values = (np.clip(np.rint(grouped / scale + zero), 0, most) - zero) * scale
    return from_groups(values, matrix.shape[1]), matrix.size * bits + 32 * grouped.shape[0] * grouped.shape[1]


def nf4_levels() -> F32:
    """The sixteen levels of QLoRA: quantiles of a normal distribution, with an exact zero."""
    quantile, offset = NormalDist().inv_cdf, 0.9677083
    above = [quantile(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    below = [-quantile(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    levels = np.array(sorted([*below, 0.0, *above]), np.float32)
    return levels / levels.max()


def nf4(matrix: F32) -> Quantized:
    """Blocks of 64 in the order of memory; their maxima in 8 bits, of which 256 share an fp32 scale, around a mean."""
    levels, block = nf4_levels(), 64
    flat = in_groups(matrix.reshape(1, -1), block)[0]
    largest = np.abs(flat).max(-1)
    mean = largest.mean()
    offsets = in_groups((largest - mean)[None], 256)[0]
    scale = np.abs(offsets).max(-1, keepdims=True) / 127
    coded = np.rint(offsets / np.where(scale == 0, 1, scale)) * scale
    largest = np.maximum(coded.reshape(-1)[: len(largest)] + mean, 1e-12)
    between = (levels[1:] + levels[:-1]) / 2
    values = levels[np.searchsorted(between, flat / largest[:, None])] * largest[:, None]
    bits = 4 * matrix.size + 8 * len(largest) + 32 * len(scale) + 32
    return values.reshape(-1)[: matrix.size].reshape(matrix.shape).astype(np.float32), bits


def gguf_legacy(matrix: F32, name: str) -> Quantized:
    """A type of llama.cpp that the gguf package quantizes; blocks of 32 weights.

    Raises:
        ValueError: columns that are no multiple of 32.
    """
    from gguf import GGMLQuantizationType, quants

    kind = GGMLQuantizationType[name.upper()]
    coded = quants.quantize(np.ascontiguousarray(matrix), kind)
    return quants.dequantize(coded, kind).astype(np.float32), 8.0 * coded.nbytes


def gguf_k(matrix: F32, bits: int) -> Quantized:
    """Q4_K or Q5_K: blocks of 32 with scale and minimum of 6 bits each, 8 blocks with two fp16 factors of these.

    As llama.cpp does, Q5_0 or Q5_1 where columns are no multiple of 256.
    """
    rows, cols = matrix.shape
    if cols % 256:
        return gguf_legacy(matrix, {4: "q5_0", 5: "q5_1"}[bits])
    blocks = matrix.reshape(rows, -1, 8, 32)
    most = 2**bits - 1
    low = np.minimum(blocks.min(-1, keepdims=True), 0)
    high = np.maximum(blocks.max(-1, keepdims=True), low)
    best_scale, best_low = (high - low) / most, low
    least = np.full(low.shape, np.inf, np.float32)
    for share in np.linspace(0.8, 1.1, 13, dtype=np.float32):
        scale = (high - low) * share / most
        q = np.clip(np.rint((blocks - low) / np.where(scale == 0, 1, scale)), 0, most)
        # The scale and minimum of least squares for these integers.
        centred = q - q.mean(-1, keepdims=True)
        energy = np.square(centred).sum(-1, keepdims=True)
        fitted = (centred * blocks).sum(-1, keepdims=True) / np.where(energy == 0, 1, energy)
        minimum = np.minimum(blocks.mean(-1, keepdims=True) - fitted * q.mean(-1, keepdims=True), 0)
        fitted = np.maximum(fitted, 0)
        error = np.square(blocks - minimum - fitted * q).sum(-1, keepdims=True)
        best_scale = np.where(error < least, fitted, best_scale)
        best_low = np.where(error < least, minimum, best_low)
        least = np.minimum(error, least)
    factors = []
    for values in (best_scale, -best_low):
        unit = fp16(values.max(2, keepdims=True) / 63)
        factors.append(unit * np.clip(np.rint(values / np.where(unit == 0, 1, unit)), 0, 63))
    scale, minimum = factors
    q = np.clip(np.rint((blocks + minimum) / np.where(scale == 0, 1, scale)), 0, most)
    return (q * scale - minimum).reshape(matrix.shape), matrix.size * (bits + 12 / 32 + 32 / 256)


PEERS: dict[str, Callable[[F32], Quantized]] = {
    "int4-g128": partial(group_quantized, bits=4, group=128),
    "int4-g64": partial(group_quantized, bits=4, group=64),
    "int4-g32": partial(group_quantized, bits=4, group=32),
    "int4-sym-g128": partial(symmetric, bits=4, group=128),
    "int5-sym-g128": partial(symmetric, bits=5, group=128),
    "int8-sym-g128": partial(symmetric, bits=8, group=128),
    "hqq-int4-g64": partial(hqq, bits=4, group=64),
    "nf4": nf4,
    "q4_0": partial(gguf_legacy, name="q4_0"),
    "q5_0": partial(gguf_legacy, name="q5_0"),
    "q8_0": partial(gguf_legacy, name="q8_0"),
    "q4_k": partial(gguf_k, bits=4),
    "q5_k": partial(gguf_k, bits=5),
}
# The kernels that `times` measures, by the peers whose weights they take.
KERNELS = {
    "int4-g128": "int4",
    "int4-sym-g128": "humming-int4",
    "int5-sym-g128": "humming-int5",
    "int8-sym-g128": "humming-int8",
}


# --- models ------------------------------------------------------------------


class Subject(Protocol):
    """A model whose linear layers are exchanged."""

    original: dict[str, F32]
    metric: str
    record: dict[str, Any]

    def distance(self, weights: Mapping[str, F32]) -> float: ...


def coded_weights(model: Path) -> dict[str, F32]:
    """What compress codes by default, as f32."""
    report = kvpack.compress(model, config=kvpack.QuantConfig(preset="near-lossless"), dry_run=True)
    names = [tensor.name for tensor in report.tensors if tensor.method != "keep"]
    with kvpack.open(model) as reader:
        return {name: as_float32(reader.stored(name)).copy() for name in names}


class _TorchSubject:
    """Weights put into a model of torch in float32."""

    model: Any
    original: dict[str, F32]

    def _put(self, weights: Mapping[str, F32]) -> None:
        import torch

        parameters = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, values in weights.items():
                parameters[name].copy_(torch.from_numpy(np.ascontiguousarray(values, np.float32)))


class CausalModel(_TorchSubject):
    """KL of the next token, mean over windows of a text."""

    metric = "KL, nats a token"

    def __init__(self, model: Path, text: Path, windows: int, window_tokens: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        ids = AutoTokenizer.from_pretrained(model)(text.read_text("utf-8"), return_tensors="pt", verbose=False)
        self.ids = ids.input_ids[0][: windows * window_tokens].reshape(-1, window_tokens)
        self.original = coded_weights(model)
        self.reference = [self._log_probabilities(window) for window in self.ids]
        self.record = {"windows": len(self.ids), "window_tokens": window_tokens}

    def _log_probabilities(self, window: Any) -> Any:
        import torch

        with torch.inference_mode():
            return torch.log_softmax(self.model(window[None]).logits[0], -1)

    def distance(self, weights: Mapping[str, F32]) -> float:
        self._put(weights)
        kl = []
        for window, reference in zip(self.ids, self.reference, strict=True):
            found = self._log_probabilities(window)
            kl.append((reference.exp() * (reference - found)).sum(-1).double().mean().item())
        return float(np.mean(kl))


class Encoder(_TorchSubject):
    """1 − cosine of embeddings (mean over tokens, as sentence-transformers pools), mean over pieces of a text."""

    metric = "1 − cosine of embeddings"

    def __init__(self, model: Path, text: Path, windows: int, window_tokens: int) -> None:
        import torch
        from transformers import AutoModel, AutoTokenizer

        self.model = AutoModel.from_pretrained(model, dtype=torch.float32).eval()
        ids = AutoTokenizer.from_pretrained(model)(text.read_text("utf-8"), return_tensors="pt", verbose=False)
        self.ids = ids.input_ids[0][: windows * window_tokens].reshape(-1, window_tokens)
        self.original = coded_weights(model)
        self.reference = self._embeddings()
        self.record = {"windows": len(self.ids), "window_tokens": window_tokens}

    def _embeddings(self) -> Any:
        import torch

        with torch.inference_mode():
            found = [self.model(batch).last_hidden_state.mean(1) for batch in self.ids.split(BATCH)]
            return torch.nn.functional.normalize(torch.cat(found).double(), dim=-1)

    def distance(self, weights: Mapping[str, F32]) -> float:
        self._put(weights)
        return float(1 - (self._embeddings() * self.reference).sum(-1).mean())


def subject(model: Path, text: Path, windows: int, window_tokens: int) -> Subject:
    architectures = json.loads((model / "config.json").read_text())["architectures"]
    kind = CausalModel if architectures[0].endswith("ForCausalLM") else Encoder
    return kind(model, text, windows, window_tokens)


# --- kvpack at a rate --------------------------------------------------------


class Coded(NamedTuple):
    """What a matrix becomes at a rate: its values, its bytes, the layout and the deviation of its integers."""

    values: F32
    size_bytes: int
    layout: Layout | None
    sigma: float


def coded(weights: F32, bits: float, layout: str, executor: ThreadPoolExecutor) -> Coded:
    """A matrix at a rate; as it is, in 16 bits, where it cannot be coded so."""
    try:
        encoded = encode_at_bits(Matrices(weights), bits, layout_name=layout, executor=executor)
    except NotEncodableError:
        return Coded(weights, 2 * weights.size, None, 0.0)
    integers = decode_integers(Blob(encoded.blob.data)).reshape(weights.shape).astype(np.float32)
    scales = np.float32(1) if encoded.scales is None else encoded.scales.reshape(-1, 1)
    return Coded(integers * scales, encoded.size_bytes, encoded.layout, float(integers.std()))


def usual_integers(done: Mapping[str, Coded]) -> dict[str, Any] | None:
    """The layout that most weights have, and the median deviation of its integers: what `times` makes up."""
    sizes: Counter[Layout] = Counter()
    for one in done.values():
        if one.layout is not None:
            sizes[one.layout] += one.values.size
    if not sizes:
        return None
    layout = sizes.most_common(1)[0][0]
    return integers_record(layout, float(np.median([one.sigma for one in done.values() if one.layout == layout])))


def integers_record(layout: Layout, sigma: float) -> dict[str, Any]:
    names = ("element_bits", "code_bits", "codes_per_symbol", "folded")
    return {**{name: getattr(layout, name) for name in names}, "sigma": sigma}


class Curve:
    """Distances of one layout by rate, measured where they are needed.

    Args:
        measure: rate → (bits that it took, distance), the first growing and the second falling.
    """

    def __init__(self, measure: Callable[[float], tuple[float, float]]) -> None:
        self.measure = measure
        self.points: dict[float, tuple[float, float]] = {}

    def _at(self, rate: float) -> tuple[float, float]:
        rate = round(rate, 2)
        if rate not in self.points:
            self.points[rate] = self.measure(rate)
        return self.points[rate]

    def bits_at(self, distance: float) -> float | None:
        """Bits at which the distance is so large; None where no rate in reach has it."""
        if not self._at(LOWEST_BITS)[1] >= distance >= self._at(HIGHEST_BITS)[1]:
            return None
        while True:
            low = max(rate for rate, (_, found) in self.points.items() if found >= distance)
            high = min(rate for rate in self.points if rate > low)
            (bits_low, worse), (bits_high, better) = self.points[low], self.points[high]
            share = math.log(worse / distance) / math.log(worse / better)
            if high - low <= NEAR_BITS:
                return bits_low + share * (bits_high - bits_low)
            # A little beyond where it should be, so that the next rate is likely to enclose it from the other side.
            beyond = min(0.4 * NEAR_BITS, (high - low) / 4)
            aim = low + share * (high - low) + (beyond if share < 0.5 else -beyond)
            self._at(min(max(aim, low + beyond / 2), high - beyond / 2))

    def nearest(self, bits: float) -> float:
        """The rate that was measured and took most nearly these bits."""
        return min(self.points, key=lambda rate: abs(self.points[rate][0] - bits))


def quantized(found: Subject, name: str) -> dict[str, Any]:
    """A peer's bits and distance; an error where it does not take the model's tensors."""
    began = time.perf_counter()
    try:
        done = {key: PEERS[name](weights) for key, weights in found.original.items()}
    except (ValueError, ImportError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return {"peer": name, "bits": None, "distance": None, "error": str(error), "kvpack": {}}
    bits = sum(used for _, used in done.values()) / sum(weights.size for weights in found.original.values())
    distance = found.distance({key: values for key, (values, _) in done.items()})
    print(f"{name}: {bits:.3f} b, {distance:.3e} ({time.perf_counter() - began:.0f} s)", file=sys.stderr)
    return {"peer": name, "bits": bits, "distance": distance, "error": None, "kvpack": {}}


def measure_model(found: Subject, peers: Sequence[str], layouts: Sequence[str]) -> dict[str, Any]:
    """Rows, one for each peer, with kvpack's bits at its distance; and what was measured of each layout."""
    total = sum(weights.size for weights in found.original.values())
    rows = [quantized(found, name) for name in peers]
    points: dict[str, list[dict[str, Any]]] = {}
    with ThreadPoolExecutor(default_threads()) as executor:
        for layout in layouts:
            integers: dict[float, dict[str, Any] | None] = {}

            def at(rate: float, layout: str = layout, integers: Any = integers) -> tuple[float, float]:
                began = time.perf_counter()
                done = {key: coded(weights, rate, layout, executor) for key, weights in found.original.items()}
                bits = 8 * sum(one.size_bytes for one in done.values()) / total
                distance = found.distance({key: one.values for key, one in done.items()})
                integers[rate] = usual_integers(done)
                seconds = time.perf_counter() - began
                print(f"{layout} {rate:.2f}: {bits:.3f} b, {distance:.3e} ({seconds:.0f} s)", file=sys.stderr)
                return bits, distance

            curve = Curve(at)
            for row in rows:
                if row["distance"] is not None:
                    bits = curve.bits_at(row["distance"])
                    kind = None if bits is None else integers[curve.nearest(bits)]
                    row["kvpack"][layout] = {"bits": bits, "integers": kind}
            points[layout] = [
                {"rate": rate, "bits": bits, "distance": distance}
                for rate, (bits, distance) in sorted(curve.points.items())
            ]
    return {"rows": rows, "points": points}


def measure_main(options: argparse.Namespace) -> None:
    began = time.perf_counter()
    found = subject(options.model, options.text, options.windows, options.window_tokens)
    layouts = options.layouts.split(",")
    measured = measure_model(found, options.peers.split(","), layouts)
    table = [
        [
            row["peer"],
            None if row["bits"] is None else f"{row['bits']:.3f}",
            None if row["distance"] is None else f"{row['distance']:.3e}",
            *(shown_bits(row["kvpack"].get(layout)) for layout in layouts),
        ]
        for row in measured["rows"]
    ]
    headings = ["peer", "bits", found.metric, *(f"bits of {layout} at that" for layout in layouts)]
    print_table(headings, table, options.model.name)
    if options.json:
        variable = options.variable
        result = {
            "benchmark": "equal-quality",
            **provenance(
                {variable: options.model, "KVPACK_BOOKS_TEXT": options.text}, ("torch", "transformers", "gguf")
            ),
            "model": variable.removeprefix("KVPACK_"),
            "metric": found.metric,
            "kernels": KERNELS,
            "tensors": len(found.original),
            "weights": sum(weights.size for weights in found.original.values()),
            **found.record,
            "seconds": time.perf_counter() - began,
            **measured,
        }
        write_result(options.json, result)


def shown_bits(found: Mapping[str, Any] | None) -> str | None:
    return None if found is None or found["bits"] is None else f"{found['bits']:.3f}"


# --- times -------------------------------------------------------------------

SHAPES = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
TOKENS = (1, 8)
DEVICE = "cuda"  # tests put the CPU here
ROTATE_BYTES = 256 << 20


def wanted_integers(results: Sequence[Mapping[str, Any]]) -> dict[Layout, float]:
    """The layouts that kvpack has in results, each with the median deviation of its integers."""
    sigmas: dict[Layout, list[float]] = {}
    for result in results:
        for row in result["rows"]:
            for one in row["kvpack"].values():
                if kind := one["integers"]:
                    sigmas.setdefault(layout_of(kind), []).append(kind["sigma"])
    return {layout: float(np.median(found)) for layout, found in sigmas.items()}


def layout_of(kind: Mapping[str, Any]) -> Layout:
    sizes = (kind[name] for name in ("element_bits", "code_bits", "codes_per_symbol"))
    return Layout(ElementKind.SIGNED, *sizes, folded=kind["folded"])


def times_main(options: argparse.Namespace) -> None:
    import torch

    from kvpack.bench import peers as bench_peers
    from kvpack.bench.linear import TOLERANCES, copies_of, rotated
    from kvpack.bench.report import HUMMING, finite
    from kvpack.bench.timing import Work, measure, relative_error
    from kvpack.bench.tune import compile_ahead, kernel_of
    from kvpack.runtime.codec.encoder import encode_on_device
    from kvpack.runtime.device.devices import device_limits
    from kvpack.runtime.weights import ops, products
    from kvpack.runtime.weights.device_blob import DeviceBlob

    torch.set_grad_enabled(False)
    limits = device_limits(torch.device(DEVICE))
    layouts = wanted_integers([json.loads(path.read_text()) for path in options.results])
    generator = torch.Generator(device=DEVICE).manual_seed(0)
    rows = []
    copies = partial(rotated, rotate_bytes=ROTATE_BYTES)
    for rows_out, cols in SHAPES:
        shape = f"{rows_out}×{cols}"
        dense = 0.02 * torch.randn(rows_out, cols, device=DEVICE, generator=generator).half()
        makers: dict[str, Callable[[], Any]] = {"fp16": lambda: bench_peers.dense(dense, copies(dense.nbytes))}  # noqa: B023
        makers["int4"] = partial(bench_peers.int4, rows_out, cols, copies, generator)
        makers |= {name: partial(bench_peers.humming, dense, bits, copies) for bits, name in HUMMING.items()}
        contestants: list[tuple[dict[str, Any], Any]] = []
        for name, make in makers.items():
            try:
                contestants.append(({"name": name, "integers": None}, make()))
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
                if isinstance(error, ImportError):
                    reason = bench_peers.import_failure(error, "humming")
                print(f"{name}, {shape}: {reason}", file=sys.stderr)
        wanted = set()
        for layout, sigma in layouts.items():
            half = 1 << (layout.element_bits - 1)
            normal = torch.randn(rows_out, cols, device=DEVICE, generator=generator) * sigma
            integers = normal.round_().clamp_(-half, half - 1)
            encoded = encode_on_device((integers + half).to(torch.uint8), layout)
            scales = np.full(rows_out, 0.02 / sigma, np.float32)
            data = encoded.blob.cpu().numpy().data
            blob = DeviceBlob.from_bytes(data, scales, torch.float16, (rows_out, cols), DEVICE)
            several = copies_of(blob, copies(blob.nbytes))
            exact = integers.double() * float(scales[0])
            peer = bench_peers.Peer(several, DeviceBlob.linear, exact, torch.float16, len(data))
            record = {
                name: getattr(layout, name) for name in ("element_bits", "code_bits", "codes_per_symbol", "folded")
            }
            contestants.append(({"name": "kvpack", "integers": record | {"sigma": sigma}}, peer))
            for tokens in TOKENS:
                coded_weights = ops._coded(*blob._arguments())
                fit = products.fit_product(coded_weights, tokens, limits)
                if fit is not None:
                    wanted.add(kernel_of(coded_weights, tokens, fit, limits))
        compile_ahead(wanted)
        for tokens in TOKENS:
            x = torch.randn(tokens, cols, device=DEVICE, generator=generator).half()
            works = []
            for _, peer in contestants:
                mine = x.to(peer.dtype)
                error = relative_error(mine.double() @ peer.weights.T)
                calls = [partial(peer.apply, one, mine) for one in peer.copies]
                works.append(Work(calls, error, TOLERANCES[peer.dtype]))
            timed = measure(works, samples=9, sample_ms=0.5, case_ms=400)
            for (what, peer), one in zip(contestants, timed, strict=True):
                bits = 8 * peer.weight_bytes / (rows_out * cols)
                rows.append({**what, "shape": shape, "tokens": tokens, "bits_per_weight": bits, **one.as_dict()})
                if one.error:
                    print(f"{what}, {shape}, M = {tokens}: {one.error}", file=sys.stderr)
        del contestants, works
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
    table = [
        [
            row["name"],
            row["integers"] and tuple(row["integers"].values()),
            row["shape"],
            row["tokens"],
            f"{row['us']:.1f}",
        ]
        for row in rows
        if row["us"] is not None
    ]
    print_table(["name", "integers", "out × in", "M", "µs"], table)
    if options.json:
        result = {
            "benchmark": "equal-quality-times",
            "device": device_record(torch.device(DEVICE)),
            **provenance({}, ["torch", "cupy-cuda13x", "cupy-cuda12x", "triton", "humming-kernels"]),
            "rows": finite(rows),
        }
        write_result(options.json, result)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    measuring = commands.add_parser("measure", help="bits at equal quality, of one model")
    measuring.add_argument("--model", type=Path, required=True)
    measuring.add_argument("--variable", default="KVPACK_MODEL", help="what the result calls the model's path")
    measuring.add_argument("--text", type=Path, default=environment_path("KVPACK_BOOKS_TEXT"))
    measuring.add_argument("--windows", type=int, default=8)
    measuring.add_argument("--window-tokens", type=int, default=512)
    measuring.add_argument("--peers", default=",".join(PEERS))
    measuring.add_argument("--layouts", default=",".join(LAYOUTS))
    measuring.add_argument("--json", type=Path)
    measuring.set_defaults(run=measure_main)
    timing = commands.add_parser("times", help="speed at those bits, on a GPU")
    timing.add_argument("results", type=Path, nargs="+", help="what `measure` wrote")
    timing.add_argument("--json", type=Path)
    timing.set_defaults(run=times_main)
    options = parser.parse_args()
    if getattr(options, "text", True) is None:
        parser.error("--text is needed, or KVPACK_BOOKS_TEXT")
    options.run(options)


if __name__ == "__main__":
    main()
