"""Quantizers that others use, with data and without, beside kvpack's calibrated weights: KL to the original, and bits.

    python benchmarks/calibrated_peers.py --model $KVPACK_BOOKS_MODEL --variable KVPACK_BOOKS_MODEL \\
        --text $KVPACK_BOOKS_TEXT --windows 8 --window-tokens 1024 --moments text.safetensors --group 128 \\
        --ggml libggml-base.so --json benchmarks/results/DATE-calibrated-peers-books.json
    python benchmarks/calibrated_peers.py --model … --moments text.safetensors --peers llmcompressor-gptq \\
        --calibration-tokens 16384 --add-to benchmarks/results/DATE-calibrated-peers-books.json
    python benchmarks/calibrated_peers.py --draw PEERS.json CALIBRATED.json --plot calibrated-peers-books.png

Windows are the first of the text, as in calibrated_quality.py, and all that a quantizer stores for the linear layers
counts; embeddings and the output layer stay. Peers that see data see the tokens that the moments are of:

- ``gptq``, ``awq``: small ones of these scripts, from the moments. AWQ: asymmetric groups; inputs scaled by a power of
  their root mean square, of twenty the one of least error at the outputs, and largest values cut where that helps, as
  AutoAWQ does (no scales before o_proj where heads share values, no cuts in q and k). Scales do not count: they go into
  the layers before.
- ``llmcompressor-gptq``, ``llmcompressor-awq``: of the package, one layer after the other, on ``--calibration-tokens``
  tokens of the last quarter of the text. fp16 scales and 4-bit zero points count.
- ``hqq``, ``bnb-nf4``, ``torchao-int4``: of the packages hqq, bitsandbytes (doubly quantized) and torchao
  (IntxWeightOnlyConfig, asymmetric), without data.
- ``Q4_K_M`` …: llama.cpp's quantizers out of its own libggml-base with an importance matrix, which is the diagonal of
  the moments. Which tensor gets which type, and what stands in where columns are no multiple of 256, is
  llama-quantize's rule for Llama. ``…-plain``: without the matrix.

A peer that is not installed is named and left out.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import re
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from bench_common import provenance, require_inputs, require_plotting, write_result
from calibrated_quality import Array, Bench, add_bench_arguments, gptq
from equal_quality import from_groups, in_groups

from kvpack.encode.moments import Moments
from kvpack.integrations.transformers.calibration_text import read_text

Weights = dict[str, Array]
# Weights as a quantizer leaves them, and the bits that it stores.
Done = tuple[Weights, float]
_LAYER = re.compile(r"\.(\d+)\.(?:self_attn|mlp)\.(\w+)_proj\.weight$")
ALPHAS = np.linspace(0, 0.95, 20)
CUTS = np.linspace(0.55, 1.0, 10)


def groups_of(weights: Array, group: int) -> int:
    """How many groups a matrix has."""
    return int(weights.shape[0] * -(-weights.shape[1] // group))


def rounded(grouped: Array, bits: int, most: Array | None = None) -> Array:
    """Groups [rows, groups, G] rounded between least and greatest, by fp16 scales; first cut to ±``most`` if given."""
    if most is not None:
        grouped = np.clip(grouped, -most, most)
    low = grouped.min(-1, keepdims=True).astype(np.float16).astype(np.float32)
    step = ((grouped.max(-1, keepdims=True) - low) / (2**bits - 1)).astype(np.float16).astype(np.float32)
    step = np.where(step > 0, step, 1)
    return np.asarray(np.clip(np.rint((grouped - low) / step), 0, 2**bits - 1) * step + low, np.float32)


def cut(weights: Array, second_moment: Array, bits: int, group: int) -> Array:
    """Rounded, each group's largest values cut where that is less error at the outputs."""
    cols = weights.shape[1]
    grouped = in_groups(weights, group)
    padded = np.pad(second_moment, ((0, -cols % group),) * 2)
    blocks = np.stack([padded[at : at + group, at : at + group] for at in range(0, len(padded), group)])
    largest = np.abs(grouped).max(-1, keepdims=True)
    best, least = rounded(grouped, bits), np.full(largest.shape, np.inf, np.float32)
    for share in CUTS[::-1]:
        values = rounded(grouped, bits, largest * np.float32(share))
        error = (values - grouped).swapaxes(0, 1)
        cost = ((error @ blocks) * error).sum(-1).T[..., None]
        best = np.where(cost < least, values, best)
        least = np.minimum(cost, least)
    return from_groups(best, cols)


def awq(weights: Weights, moments: Moments, bits: int, group: int) -> Done:
    """AWQ's scales and cuts; see the top."""
    done: Weights = {}
    by_inputs: dict[str, list[str]] = {}
    for name in weights:
        by_inputs.setdefault(moments.inputs[name], []).append(name)
    values = [name for name in weights if "v_proj" in name]
    shared_values = any(len(weights[v]) < weights[v.replace("v_proj", "o_proj")].shape[1] for v in values)
    for names in by_inputs.values():
        h = moments.second_moment(names[0])
        rms = np.sqrt(np.maximum(np.diag(h), 1e-12))
        best, least = np.ones_like(rms), np.inf
        for alpha in ALPHAS if not ("o_proj" in names[0] and shared_values) else [0.0]:
            scales = rms ** np.float32(alpha)
            scales /= np.sqrt(scales.max() * scales.min())
            error = 0.0
            for name in names:
                values = from_groups(rounded(in_groups(weights[name] * scales, group), bits), len(scales))
                e = values / scales - weights[name]
                error += float(((e @ h) * e).sum())
            if error < least:
                best, least = scales, error
        for name in names:
            scaled = weights[name] * best
            if "q_proj" in name or "k_proj" in name:
                values = from_groups(rounded(in_groups(scaled, group), bits), len(best))
            else:
                values = cut(scaled, h / best[:, None] / best, bits, group)
            done[name] = values / best
    return done, sum(bits * w.size + 32 * groups_of(w, group) for w in weights.values())


def own_gptq(weights: Weights, moments: Moments, bits: int, group: int) -> Done:
    """The one of calibrated_quality.py."""
    done = {name: gptq(w, moments.second_moment(name), bits, group) for name, w in weights.items()}
    return done, sum(bits * w.size + 32 * groups_of(w, group) for w in weights.values())


def hqq(weights: Weights, _: Moments, bits: int, group: int) -> Done:
    """hqq's quantizer; fp16 scales and zero points."""
    from hqq.core.quantize import Quantizer

    done = {}
    for name, w in weights.items():
        options = {"nbits": bits, "group_size": group, "axis": 1, "device": "cpu", "compute_dtype": torch.float32}
        coded, meta = Quantizer.quantize(torch.from_numpy(w.copy()), **options)
        for key in ("scale", "zero"):
            meta[key] = meta[key].half().float()
        done[name] = Quantizer.dequantize(coded, meta).float().numpy().reshape(w.shape)
    return done, sum(bits * w.size + 32 * groups_of(w, group) for w in weights.values())


def bnb_nf4(weights: Weights, _: Moments) -> Done:
    """bitsandbytes' NF4, doubly quantized: 8 bits for 64 weights, 32 for 256 of these."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    done, bits = {}, 0.0
    for name, w in weights.items():
        coded, state = quantize_4bit(
            torch.from_numpy(w.copy()), blocksize=64, quant_type="nf4", compress_statistics=True
        )
        done[name] = dequantize_4bit(coded, state).numpy()
        blocks = -(-w.size // 64)
        bits += 4 * w.size + 8 * blocks + 32 * -(-blocks // 256) + 32
    return done, bits


def torchao_int4(weights: Weights, _: Moments, group: int) -> Done:
    """torchao's asymmetric int4: bf16 scales, zero points of 8 bits."""
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup
    from torchao.quantization.quant_primitives import MappingType

    config = IntxWeightOnlyConfig(
        weight_dtype=torch.int4,
        granularity=PerGroup(group),
        mapping_type=MappingType.ASYMMETRIC,
        scale_dtype=torch.bfloat16,
    )
    done = {}
    for name, w in weights.items():
        linear = torch.nn.Sequential(torch.nn.Linear(w.shape[1], w.shape[0], bias=False))
        linear[0].weight.data.copy_(torch.from_numpy(w))
        quantize_(linear, config)
        done[name] = linear[0].weight.dequantize().float().detach().numpy()
    return done, sum(4 * w.size + 24 * groups_of(w, group) for w in weights.values())


def _more_bits(layer: int, layers: int) -> bool:
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def gguf_type(mix: str, kind: str, layer: int, layers: int, heads_a_value: int, cols: int) -> str:
    """llama-quantize's choice for a tensor of a Llama, with an importance matrix."""
    many, first, more = heads_a_value >= 4, layer < layers // 8, _more_bits(layer, layers)
    chosen = {"Q4_K_M": "Q4_K", "Q4_K_S": "Q4_K", "Q3_K_M": "Q3_K"}.get(mix, mix)
    special: dict[tuple[str, str], str] = {
        ("Q4_K_M", "v"): "Q6_K" if more else "Q4_K",
        ("Q4_K_M", "down"): "Q6_K" if more else "Q4_K",
        ("Q4_K_S", "v"): "Q5_K" if layer < 4 else "Q4_K",
        ("Q4_K_S", "down"): "Q5_K" if first else "Q4_K",
        ("IQ4_XS", "v"): "Q5_K" if many else "IQ4_XS",
        ("Q3_K_M", "v"): "Q5_K" if layer < 2 else "Q4_K",
        ("Q3_K_M", "down"): "Q5_K" if layer < layers // 16 else "Q4_K",
        ("Q3_K_M", "o"): "Q4_K",
        ("IQ3_S", "v"): "Q4_K" if many else "IQ3_S",
        ("Q2_K", "v"): "Q4_K" if many else "Q3_K",
        ("Q2_K", "down"): "Q3_K",
        ("Q2_K", "o"): "Q3_K",
    }
    chosen = special.get((mix, kind), chosen)
    if cols % 256:
        stands_in = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
        return stands_in.get(chosen, "IQ4_NL")
    return chosen


def gguf(weights: Weights, moments: Moments, mix: str, library: Path, heads_a_value: int) -> Done:
    """llama.cpp's quantizers; ``…-plain`` without importance."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize, quant_shape_to_byte_shape

    quantize = ctypes.CDLL(str(library.resolve())).ggml_quantize_chunk
    quantize.restype = ctypes.c_size_t
    floats = ctypes.POINTER(ctypes.c_float)
    places = {name: _LAYER.search(name) for name in weights}
    assert all(places.values()), "a Llama"
    layers = 1 + max(int(place[1]) for place in places.values() if place)
    done, total = {}, 0.0
    for name, w in weights.items():
        place = places[name]
        assert place is not None
        mixed = mix.removesuffix("-plain")
        kind = GGMLQuantizationType[gguf_type(mixed, place[2], int(place[1]), layers, heads_a_value, w.shape[1])]
        source = np.ascontiguousarray(w, np.float32)
        importance = np.ascontiguousarray(np.diag(moments.second_moment(name)), np.float32)
        coded = np.zeros(quant_shape_to_byte_shape(w.shape, kind), np.uint8)
        size = quantize(
            ctypes.c_int(int(kind)),
            source.ctypes.data_as(floats),
            coded.ctypes.data_as(ctypes.c_void_p),
            ctypes.c_int64(0),
            ctypes.c_int64(w.shape[0]),
            ctypes.c_int64(w.shape[1]),
            None if mix.endswith("-plain") else importance.ctypes.data_as(floats),
        )
        assert size == coded.nbytes, (name, size, coded.nbytes)
        done[name] = np.asarray(dequantize(coded, kind), np.float32).reshape(w.shape)
        total += 8 * size
    return done, total


def llmcompressor(bench: Bench, ids: torch.Tensor, method: str, bits: int, group: int) -> tuple[Any, float]:
    """A model that the package has quantized, its weights as they are multiplied with, and the bits that they take."""
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from llmcompressor import oneshot
    from llmcompressor.modifiers.awq import AWQModifier
    from llmcompressor.modifiers.quantization import GPTQModifier

    weights = {"num_bits": bits, "type": "int", "symmetric": False, "strategy": "group", "group_size": group}
    options = {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}, "ignore": ["lm_head"]}
    recipe = GPTQModifier(**options) if method == "gptq" else AWQModifier(**options)
    model = transformers.AutoModelForCausalLM.from_pretrained(bench.directory, dtype=torch.float32)
    given = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]
    oneshot(model=model, dataset=torch.utils.data.DataLoader(given, batch_size=1), recipe=[recipe],
            num_calibration_samples=len(given))  # fmt: skip
    used = 0.0
    for module in model.modules():
        if (scale := getattr(module, "weight_scale", None)) is not None:
            zero = module.weight_zero_point
            module.weight.data = fake_quantize(module.weight.data, scale, zero, module.quantization_scheme.weights)
            module.quantization_enabled = False
            used += bits * module.weight.numel() + (16 + bits) * scale.numel()
    return model, used


def draw(peers: dict[str, Any], calibrated: dict[str, Any], path: Path) -> None:
    """KL over bits: kvpack's lines, and a point for each peer."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.subplots()
    for method, label, style in (("sensitivity", "kvpack, calibrated", "o-"), ("without moments", "kvpack", "s--")):
        rows = [row for row in calibrated["rows"] if row["method"] == method and row["moments"] in (None, "text")]
        points = sorted((row["bits"], row["kl"]) for row in rows)
        axes.semilogy(*zip(*points, strict=True), style, label=label)
    for with_data, label, marker in ((True, "others, with data", "^"), (False, "others, without", "v")):
        rows = [row for row in peers["rows"] if row["with_data"] == with_data]
        axes.semilogy([row["bits"] for row in rows], [row["kl"] for row in rows], marker, label=label)
        for row in rows:
            axes.annotate(row["peer"], (row["bits"], row["kl"]), (4, 3), textcoords="offset points", fontsize=7)
    axes.margins(x=0.1)
    axes.set_xlabel("bits a weight of the linear layers, everything counted")
    axes.set_ylabel("KL(original ‖ quantized), nats a token")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120, format="png")


def peers_of(arguments: argparse.Namespace, heads_a_value: int) -> dict[str, tuple[bool, Callable[..., Done]]]:
    """Name → whether it sees data, and what it does."""
    group = arguments.group
    found: dict[str, tuple[bool, Callable[..., Done]]] = {}
    for bits in (4, 3):
        found[f"gptq-int{bits}-g{group}"] = True, partial(own_gptq, bits=bits, group=group)
        found[f"awq-int{bits}-g{group}"] = True, partial(awq, bits=bits, group=group)
        found[f"hqq-int{bits}-g{group}"] = False, partial(hqq, bits=bits, group=group)
    found["bnb-nf4"] = False, bnb_nf4
    found[f"torchao-int4-g{group}"] = False, partial(torchao_int4, group=group)
    if arguments.ggml is not None:
        for mix in ("Q4_K_M", "Q4_K_S", "IQ4_XS", "Q3_K_M", "IQ3_S", "Q2_K"):
            for end in ("", "-plain"):
                options = {"mix": mix + end, "library": arguments.ggml, "heads_a_value": heads_a_value}
                found[mix + end] = not end, partial(gguf, **options)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_bench_arguments(parser, required=False)
    parser.add_argument("--moments", type=Path)
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--ggml", type=Path, help="llama.cpp's libggml-base.so")
    parser.add_argument("--peers", nargs="*", help="all but llmcompressor's by default")
    parser.add_argument("--calibration-tokens", type=int, default=16384, help="of llmcompressor's")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--add-to", type=Path, help="a result whose rows are kept")
    parser.add_argument("--draw", type=Path, nargs=2, metavar=("PEERS", "CALIBRATED"))
    parser.add_argument("--plot", type=Path, help="a PNG")
    arguments = parser.parse_args()
    if arguments.draw is not None:
        require_plotting(parser, arguments.plot)
        draw(*(json.loads(path.read_text()) for path in arguments.draw), arguments.plot)
        return 0
    require_inputs(parser, arguments.model, arguments.text, arguments.moments)
    bench = Bench(arguments.model, arguments.text, arguments.windows, arguments.window_tokens)
    total = sum(weights.size for weights in bench.original.values())
    config = bench.model.config
    target = arguments.json or arguments.add_to
    earlier = json.loads(arguments.add_to.read_text()) if arguments.add_to else {}
    rows: list[dict[str, Any]] = earlier.get("rows", [])

    def add(peer: str, with_data: bool, bits: float, seconds: float, quality: dict[str, Any], **more: Any) -> None:
        rows[:] = [row for row in rows if row["peer"] != peer]
        rows.append({"peer": peer, "with_data": with_data, "bits": bits / total, "seconds": seconds, **quality, **more})
        print(f"{peer:24} {bits / total:.3f} bits, KL {quality['kl']:.5f}, {seconds:.0f} s", file=sys.stderr)
        if target is not None:
            write()

    def write() -> None:
        packages = ("torch", "transformers", "gguf")
        optional = ("llmcompressor", "compressed-tensors", "hqq", "bitsandbytes", "torchao")
        result = {
            "benchmark": "calibrated-peers",
            "model": arguments.model.name,
            "windows": arguments.windows,
            "window_tokens": arguments.window_tokens,
            "linears": len(bench.original),
            "moments": made,
            "rows": rows,
            **provenance(
                {arguments.variable: arguments.model, "KVPACK_BOOKS_TEXT": arguments.text}, packages + optional
            ),
        }
        if earlier:
            result["command"] = f"{earlier['command']} && {result['command']}"
        write_result(target, result, quiet=True)

    known = peers_of(arguments, config.num_attention_heads // config.num_key_value_heads)
    with Moments(arguments.moments) as moments:
        keys = ("text", "part", "tokens", "window_tokens")
        made = {key: moments.made.get(key) for key in keys}
        for peer in arguments.peers or known:
            began = time.perf_counter()
            try:
                if peer.startswith("llmcompressor-"):
                    method, bits = re.fullmatch(r"llmcompressor-(gptq|awq)-int(\d)", peer).groups()  # type: ignore[union-attr]
                    tokens, window = arguments.calibration_tokens, arguments.window_tokens
                    text = read_text(arguments.model, arguments.text, tokens=tokens, window=window, part=(0.75, 1.0))
                    model, used = llmcompressor(bench, text.ids, method, int(bits), arguments.group)  # type: ignore[arg-type]
                    seconds, own, bench.model = time.perf_counter() - began, bench.model, model
                    name = f"{peer}-g{arguments.group}"
                    add(name, True, used, seconds, bench.quality(lambda _: np.empty(0), []), tokens=text.tokens)
                    bench.model = own
                else:
                    with_data, quantize = known[peer]
                    done, used = quantize(bench.original, moments)
                    seconds = time.perf_counter() - began
                    add(peer, with_data, used, seconds, bench.quality(done.__getitem__, list(done)))
            except (ImportError, OSError) as error:
                print(f"{peer}: left out: {error}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
