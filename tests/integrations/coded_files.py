"""Compressed files of one matrix, as vLLM's loader gives them to a rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import kvpack
from kvpack.integrations.vllm.arriving import ArrivedTensor
from kvpack.integrations.vllm.reading import mapped_tensors


def coded_file(folder: Path, shape: tuple[int, ...], *, seed: int = 3, **options: Any) -> Path:
    """A compressed file with a matrix, or several, of that shape, a mixture of normal distributions by row."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator) * (1 + torch.arange(shape[-2]) % 3)[:, None]
    save_file({"w.weight": weight.to(torch.bfloat16)}, folder / "plain.safetensors")
    kvpack.compress(
        folder / "plain.safetensors", folder / "coded.safetensors", include="w", **({"bits": 4.25} | options)
    )
    return folder / "coded.safetensors"


def arrived_from(file: Path) -> ArrivedTensor:
    tensors = {name.removeprefix("w.weight"): tensor for name, tensor in mapped_tensors([str(file)])}
    return ArrivedTensor("w", tensors, torch.float32)


def numbers_of(file: Path) -> torch.Tensor:
    tensor: Any = kvpack.load(file, device="cpu")["w.weight"]
    return tensor.dequantize(torch.float32)
