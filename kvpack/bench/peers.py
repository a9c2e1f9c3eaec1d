"""What ``kvpack bench linear`` compares with: dense FP16, torch's INT4, a plain INT8 product, Humming, entropy coders.

The packages that only serve as peers are loaded inside the functions that use them; where one is absent, the report
says so. Nothing else of kvpack uses them.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import torch

from kvpack.bench.provenance import package_version
from kvpack.bench.timing import relative_error, time_quickly

INT4_GROUP = 128
HUMMING_GROUP = 128
_INNER_K_TILES = 8
_CODEC_REPEATS = 7


class Peer(NamedTuple):
    """A way to multiply: ``apply(copy, x)`` for each of ``copies``; ``weights`` f64 [rows, cols] is what it means."""

    copies: list[Any]
    apply: Callable[[Any, torch.Tensor], torch.Tensor]
    weights: torch.Tensor
    dtype: torch.dtype
    weight_bytes: int
    note: str | None = None


def dense(weights: torch.Tensor, copies: int) -> Peer:
    """``torch.nn.functional.linear`` (cuBLAS) on weights f16 [rows, cols]."""
    several = [weights, *(weights.clone() for _ in range(copies - 1))]
    return Peer(several, lambda w, x: torch.nn.functional.linear(x, w), weights.double(), weights.dtype, weights.nbytes)


def int4(rows: int, cols: int, copies: Callable[[int], int], generator: torch.Generator) -> Peer:
    """torch's weight-only INT4 product (tinygemm): groups of 128 with bf16 scale and zero, bf16 activations.

    The weights are random integers: their values do not change how long it takes.
    """
    device = generator.device
    q = torch.randint(0, 16, (rows, cols), dtype=torch.uint8, device=device, generator=generator)
    groups = cols // INT4_GROUP
    scales = 0.005 * (0.5 + torch.rand(groups, rows, device=device, generator=generator))
    zeros = 0.01 * (torch.rand(groups, rows, device=device, generator=generator) - 0.5)
    scales_and_zeros = torch.stack([scales, zeros], dim=2).to(torch.bfloat16).contiguous()
    packed = torch.ops.aten._convert_weight_to_int4pack(q[:, ::2] << 4 | q[:, 1::2], _INNER_K_TILES)
    exact = scales_and_zeros.double().permute(1, 0, 2).repeat_interleave(INT4_GROUP, dim=1)
    weights = (q.double() - 8) * exact[..., 0] + exact[..., 1]
    weight_bytes = packed.nbytes + scales_and_zeros.nbytes
    several = [(packed, scales_and_zeros)]
    several += [(packed.clone(), scales_and_zeros.clone()) for _ in range(copies(weight_bytes) - 1)]

    def apply(copy: tuple[torch.Tensor, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.ops.aten._weight_int4pack_mm(x, copy[0], INT4_GROUP, copy[1])
        return out

    return Peer(several, apply, weights, torch.bfloat16, weight_bytes)


def humming(weights: torch.Tensor, bits: int, copies: Callable[[int], int]) -> Peer:
    """Humming's product of INT2 to INT8 weights, symmetric, groups of 128 with an fp16 scale; fp16 activations.

    vLLM's kernels for quantized weights. They are compiled when a layer is first called, some seconds for each shape.

    Args:
        weights: f16 [rows, cols] on the device, cols a multiple of 128; quantized by Humming itself.

    Raises:
        ImportError: humming-kernels, or something that it needs, cannot be imported.
    """
    module = import_module("humming.layer")
    rows, cols = weights.shape
    config = {"dtype": f"int{bits}", "group_size": HUMMING_GROUP}
    layer = module.HummingLayer(rows, cols, weight_config=config, torch_dtype=torch.float16).to(weights.device)
    layer.load_from_unquantized(weights)
    exact = layer.weight_schema.dequant_tensors(dict(layer.named_parameters())).double()
    layer.transform()
    weight_bytes = sum(parameter.nbytes for parameter in layer.parameters())
    several = [layer, *(copy.deepcopy(layer) for _ in range(copies(weight_bytes) - 1))]
    note = f"humming-kernels {package_version('humming-kernels')}"
    return Peer(several, lambda one, x: one(x), exact, torch.float16, weight_bytes, note)


def import_failure(error: ImportError, module: str) -> str:
    """Why a peer is missing: "not installed" only where its own module is what cannot be found."""
    parents = [module]
    while "." in parents[-1]:
        parents.append(parents[-1].rpartition(".")[0])
    if isinstance(error, ModuleNotFoundError) and error.name in parents:
        return "not installed"
    return f"{type(error).__name__}: {str(error)[:300]}"


def int8_gemv(integers: torch.Tensor, scales: torch.Tensor, copies: int, configs: Sequence[Any] | None = None) -> Peer:
    """A plain INT8 product for one activation vector (Triton), in the fastest of several configurations.

    Raises:
        ImportError: Triton is not installed.
        RuntimeError: no configuration gives right results.
    """
    from kvpack.bench.int8_gemv_triton import CONFIGS, compile_gemv

    gemv = compile_gemv()
    weights = integers.double() * scales.double()[:, None]
    several = [integers, *(integers.clone() for _ in range(copies - 1))]
    x = torch.randn(1, integers.shape[1], device=integers.device).half()
    error = relative_error(torch.nn.functional.linear(x.double(), weights))
    found: list[tuple[float, Any]] = []
    failures = []
    for config in configs or CONFIGS:
        try:
            distance = error(gemv(integers, x, scales, config))
            if not distance <= 1e-3:
                raise RuntimeError(f"relative error {distance:.1e}")
            calls = [partial(gemv, copy, x, scales, config) for copy in several]
            found.append((time_quickly(calls), config))
        except Exception as failure:
            failures.append(f"{tuple(config)}: {failure}")
            torch.cuda.synchronize()
    if not found:
        raise RuntimeError(f"no configuration works: {failures[0]}")
    best = min(found)[1]
    note = f"block {best.block_rows} × {best.block_cols}, {best.warps} warps" + (", packed" if best.packed else "")
    return Peer(
        several, lambda w, y: gemv(w, y, scales, best), weights, torch.float16, integers.nbytes + scales.nbytes, note
    )


def _wall_us(work: Callable[[], object]) -> float:
    """Median wall time of a call and all its device work: these libraries bring streams of their own."""
    found = []
    for number in range(_CODEC_REPEATS + 2):
        torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        torch.cuda.synchronize()
        if number >= 2:
            found.append(time.perf_counter() - began)
    return 1e6 * statistics.median(found)


def nvcomp_ans(elements: torch.Tensor) -> dict[str, Any]:
    """nvCOMP's ANS through its Python API on bytes u8 [n]: ratio, decode and encode times.

    Raises:
        ImportError: it is not installed.
    """
    nvcomp = import_module("nvidia.nvcomp")
    codec = nvcomp.Codec(algorithm="ANS")
    source = nvcomp.as_array(elements)
    encoded = codec.encode(source)
    decoded = torch.as_tensor(codec.decode(encoded), device=elements.device).view(torch.uint8)
    if not torch.equal(decoded.flatten(), elements):
        raise RuntimeError("decoded bytes differ")
    decode = _wall_us(lambda: codec.decode(encoded))
    encode = _wall_us(lambda: codec.encode(source))
    return {
        "version": getattr(nvcomp, "__version__", None),
        "bits_per_element": 8 * encoded.buffer_size / elements.numel(),
        "decode_us": decode,
        "encode_us": encode,
    }


def entropack_tile_ans(elements: torch.Tensor) -> dict[str, Any]:
    """EntroPack's tile-ANS on i8 [rows, cols]: rate, decode and encode times.

    Raises:
        ImportError: it is not installed.
    """
    entropack = import_module("entropack")
    config = entropack.TileANSConfig()
    packed = entropack.compress(elements, config)
    if not torch.equal(entropack.decompress(packed, config), elements):
        raise RuntimeError("decoded elements differ")
    decode = _wall_us(lambda: entropack.decompress(packed, config))
    encode = _wall_us(lambda: entropack.compress(elements, config))
    return {
        "version": package_version("entropack"),
        "bits_per_element": float(packed.actual_bpp),
        "decode_us": decode,
        "encode_us": encode,
    }
