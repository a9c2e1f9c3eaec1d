"""The models that ``generation.py`` measures: shapes, and their linear layers in each way of holding weights."""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kvpack.bench import peers
from kvpack.bench.linear import copies_of
from kvpack.encode.tensor_encoder import CPU_CODER, Matrices, encode_at_bits
from kvpack.encode.threads import default_threads
from kvpack.runtime.codec.encoder import device_coder
from kvpack.runtime.weights.device_blob import DeviceBlob
from kvpack.runtime.weights.linear import RansLinear

DTYPE = torch.bfloat16
DENSE = "bf16"
PEERS = ("bnb-nf4", "torchao-int4", "tinygemm-int4")
# Kept as they are by every one of the ways, so that none has an advantage.
NOT_CODED = "lm_head"

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-3.1-8b": (
        "llama",
        {
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        },
    ),
    "qwen3-0.6b": (
        "qwen3",
        {
            "vocab_size": 151936,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 40960,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
            "tie_word_embeddings": True,
        },
    ),
    "qwen3-30b-a3b": (
        "qwen3_moe",
        {
            "vocab_size": 151936,
            "hidden_size": 2048,
            "moe_intermediate_size": 768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "max_position_embeddings": 40960,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        },
    ),
    # For this script's own tests, on a CPU.
    "tiny": (
        "llama",
        {
            "vocab_size": 300,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
        },
    ),
}


def dense_model(name: str, directory: Path | None, layers: int | None, device: torch.device) -> nn.Module:
    """A model in bf16 on the device: of a directory, or of a shape with random weights (seed 0)."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if directory is not None:
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=DTYPE, attn_implementation="sdpa").to(device)
    else:
        kind, options = SHAPES[name]
        config = AutoConfig.for_model(kind, **(options if layers is None else options | {"num_hidden_layers": layers}))
        torch.manual_seed(0)
        with torch.device(device):  # made where they stay: on the host 8 billion weights would take minutes
            model = AutoModelForCausalLM.from_config(config, dtype=DTYPE, attn_implementation="sdpa")
    model.generation_config.pad_token_id = 0
    return model.eval().requires_grad_(False)


def coded(weight: torch.Tensor, bits: float, layout: str) -> DeviceBlob:
    """A weight at a rate, coded where it lies, with the bytes that ``kvpack compress --bits`` would write."""
    host = weight.detach().float().cpu().numpy()
    coder = device_coder(weight.device) if weight.device.type == "cuda" else CPU_CODER
    with ThreadPoolExecutor(default_threads()) as executor:
        encoded = encode_at_bits(Matrices(host), bits, layout_name=layout, executor=executor, coder=coder)
    return DeviceBlob.from_bytes(encoded.blob.data, encoded.scales, DTYPE, tuple(weight.shape), weight.device)


def _coded_linears(bits: float, layout: str, *, alike: bool) -> Callable[[nn.Linear], nn.Module]:
    """``alike``: weights of a shape are random numbers of one distribution, of which one is coded and the rest are
    copies at other addresses."""
    known: dict[torch.Size, DeviceBlob] = {}

    def replacement(linear: nn.Linear) -> nn.Module:
        if alike and (found := known.get(linear.weight.shape)) is not None:
            blob = copies_of(found, 2)[1]
        else:
            blob = known[linear.weight.shape] = coded(linear.weight, bits, layout)
        return RansLinear(blob, linear.bias)

    return replacement


def _nf4(linear: nn.Linear) -> nn.Module:
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(
        linear.in_features, linear.out_features, bias=linear.bias is not None, compute_dtype=DTYPE, quant_type="nf4"
    )
    layer.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
    if linear.bias is not None:
        layer.bias = linear.bias
    return layer.to(linear.weight.device)


def _torchao(linear: nn.Linear) -> nn.Module:
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    alone = nn.Sequential(copy.copy(linear))
    alone[0]._parameters = dict(linear._parameters)
    quantize_(alone, Int4WeightOnlyConfig(group_size=peers.INT4_GROUP, int4_packing_format="tile_packed_to_4d"))
    return alone[0]


class TinygemmLinear(nn.Module):
    """torch's own weight-only INT4 product, which torchao calls; of random weights, for its time."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        if linear.bias is not None:
            raise ValueError("no bias here")
        generator = torch.Generator(linear.weight.device).manual_seed(0)
        rows, cols = linear.weight.shape
        groups = cols // peers.INT4_GROUP
        device = linear.weight.device
        packed = torch.randint(0, 256, (rows, cols // 2), dtype=torch.uint8, device=device, generator=generator)
        self.register_buffer("packed", torch.ops.aten._convert_weight_to_int4pack(packed, 8))
        scales = torch.rand(groups, rows, 2, device=device, generator=generator).mul_(0.01).to(DTYPE)
        self.register_buffer("scales", scales)
        self.out_features = rows

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        out: torch.Tensor = torch.ops.aten._weight_int4pack_mm(flat, self.packed, peers.INT4_GROUP, self.scales)
        return out.view(*x.shape[:-1], self.out_features)


_PEERS: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "bnb-nf4": _nf4,
    "torchao-int4": _torchao,
    "tinygemm-int4": TinygemmLinear,
}


def model_with(dense: nn.Module, weights: str, *, alike: bool) -> nn.Module:
    """The model with its linear layers held in another way; embeddings, norms and the head are shared with it.

    Args:
        weights: "bf16", one of :data:`PEERS`, or a rate and a layout of kvpack's: "4.25:fast".
    """
    shared = [*dense.parameters(), *dense.buffers()]
    model = copy.deepcopy(dense, {id(tensor): tensor for tensor in shared})
    if weights == DENSE:
        return model
    if weights in _PEERS:
        replacement = _PEERS[weights]
    else:
        bits, _, layout = weights.partition(":")
        replacement = _coded_linears(float(bits), layout or "auto", alike=alike)
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and NOT_CODED not in name:
            model.set_submodule(name, replacement(module))
    return model


def linear_bytes(model: nn.Module) -> tuple[int, int]:
    """Bytes on the device of all layers that are coded in some of the ways, and how many weights those are."""
    size = count = 0
    for name, module in model.named_modules():
        if NOT_CODED in name:
            continue
        if isinstance(module, RansLinear):
            size, count = size + module.memory_bytes, count + module.in_features * module.out_features
        elif isinstance(module, TinygemmLinear):
            size += module.packed.nbytes + module.scales.nbytes
            count += module.packed.numel() * module.packed.element_size() * 2
        elif isinstance(module, nn.Linear):
            size, count = size + _parameter_bytes(module), count + module.in_features * module.out_features
    return size, count


def _parameter_bytes(module: nn.Module) -> int:
    size = 0
    for parameter in module.parameters():
        state = getattr(parameter, "quant_state", None)
        names = getattr(parameter, "tensor_data_names", None)
        if names is not None:  # torchao's
            size += sum(getattr(parameter, name).nbytes for name in names)
        else:
            size += parameter.nbytes
        if state is not None:  # bitsandbytes'
            size += state.absmax.nbytes + state.code.nbytes
            size += state.state2.absmax.nbytes if state.nested else 0
    return size


def other_bytes(model: nn.Module) -> int:
    """Bytes of what all ways share: embeddings, norms, the head."""
    seen: dict[int, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.Linear) and (NOT_CODED in name or isinstance(module, nn.Embedding)):
            seen[module.weight.data_ptr()] = module.weight.nbytes
        elif "norm" in type(module).__name__.lower():
            seen |= {p.data_ptr(): p.nbytes for p in module.parameters()}
    return sum(seen.values())


def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """What RMSNorm of Llama and Qwen3 do, in one function that a compiler sees as such."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


class SmallLayersCompiled:
    """Within: norms and rotary embeddings run as torch.compile fuses them, one kernel in place of seven."""

    def __init__(self, models: list[nn.Module]) -> None:
        self.module = sys.modules[type(models[0]).__module__]
        self.norms = [m for model in models for m in model.modules() if type(m).__name__.endswith("RMSNorm")]
        self.rotary = self.module.apply_rotary_pos_emb

    def __enter__(self) -> None:
        compiled = torch.compile(_norm, dynamic=False)
        for norm in self.norms:
            norm.forward = lambda x, norm=norm: compiled(x, norm.weight, norm.variance_epsilon)
        self.module.apply_rotary_pos_emb = torch.compile(self.rotary, dynamic=False)

    def __exit__(self, *_: object) -> None:
        for norm in self.norms:
            del norm.forward
        self.module.apply_rotary_pos_emb = self.rotary


def built(dense: nn.Module, weights: str, *, alike: bool) -> tuple[nn.Module, dict[str, Any]]:
    """A model, and what its weights take."""
    began = time.perf_counter()
    model = model_with(dense, weights, alike=alike)
    if next(model.parameters()).device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    size, count = linear_bytes(model)
    return model, {
        "linear_bytes": size,
        "linear_weights": count,
        "bits_per_weight": 8 * size / count,
        "other_bytes": other_bytes(model),
        "head_bytes": model.get_output_embeddings().weight.nbytes,
        "build_seconds": seconds,
    }
