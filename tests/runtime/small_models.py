"""Small compressed files for the tests of the runtime, and what their layers must compute."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import torch
from safetensors.numpy import save_file

import kvpack
from kvpack.format.container import CONTAINER_VERSION, CRC_KEY, TENSORS_KEY, VERSION_KEY, Container, ContainerWriter

# One layer of each kind: name, outputs × inputs.
LAYERS = {
    "quantized": (300, 416),
    "biased": (96, 416),
    "rows": (128, 200),
    "outliers": (64, 96),
    "exact": (130, 260),
    "half": (256, 96),
}


def layer_file(folder: Path) -> Path:
    """A file with a coded layer of each kind, and tensors of many types that are not coded."""
    rng = np.random.default_rng(7)
    arrays = {f"{name}.weight": (rng.standard_t(5, shape) * 0.02).astype(np.float32) for name, shape in LAYERS.items()}
    arrays["outliers.weight"] = (rng.normal(size=LAYERS["outliers"]) * 0.02).astype(np.float32)
    arrays["outliers.weight"][3, 5], arrays["outliers.weight"][60, 95] = 4.0, -3.0
    arrays["exact.weight"] = arrays["exact.weight"].astype(ml_dtypes.bfloat16)
    arrays["half.weight"] = arrays["half.weight"].astype(np.float16)
    arrays["biased.bias"] = rng.normal(size=96).astype(np.float32)
    arrays["exact.bias"] = rng.normal(size=130).astype(ml_dtypes.bfloat16)
    arrays["codes.weight"] = np.rint(rng.normal(size=(64, 128)) * 9).astype(np.int8)
    arrays["experts"] = (rng.normal(size=(3, 64, 96)) * 0.02).astype(np.float32)
    arrays["norm"] = rng.normal(size=300).astype(np.float32)
    arrays["ids"] = np.arange(12, dtype=np.int64).reshape(3, 4)
    arrays["flags"] = np.array([True, False, True])
    arrays["scalar"] = np.array(3.5, np.float64)
    arrays["small.f8"] = rng.normal(size=(3, 5)).astype(ml_dtypes.float8_e4m3fn)
    arrays["none"] = np.zeros((0, 7), np.float32)
    save_file({"rows.weight": arrays.pop("rows.weight")}, folder / "rows.safetensors")
    save_file(arrays, folder / "others.safetensors")
    kvpack.compress(folder / "rows.safetensors", folder / "1.safetensors", kvpack.QuantConfig(preset="int8-row"))
    kvpack.compress(
        folder / "others.safetensors",
        folder / "2.safetensors",
        kvpack.QuantConfig(preset="lossless", tensor_bits={"^(quantized|biased|outliers|experts)": 4.25}),
    )
    return merge_files(folder / "layers.kvpack.safetensors", folder / "1.safetensors", folder / "2.safetensors")


def merge_files(target: Path, *sources: Path) -> Path:
    """All tensors of several compressed files in one."""
    with ContainerWriter(target) as writer:
        coded: dict[str, object] = {}
        crc32: dict[str, int] = {}
        for source in sources:
            with Container(source) as container:
                for name, tensor in container.tensors.items():
                    writer.add(name, tensor.dtype, tensor.shape, [bytes(container.data(name))])
                coded |= container.coded
                crc32 |= container.crc32
        writer.finish({VERSION_KEY: CONTAINER_VERSION, TENSORS_KEY: json.dumps(coded), CRC_KEY: json.dumps(crc32)})
    return target


def product_error(
    y: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    product_eps: float = 2.0**-13,
) -> float:
    """The largest error of y against x · Wᵀ + bias in f64, in units of what rounding may cost.

    A unit is one rounding of y to its type, and ``product_eps`` of the sum of the products' magnitudes.
    """
    x, weight = x.double(), weight.double()
    exact, magnitude = x @ weight.T, x.abs() @ weight.abs().T
    if bias is not None:
        added = bias.to(y.dtype).double()
        exact, magnitude = exact + added, magnitude + added.abs()
    unit = torch.finfo(y.dtype).eps * exact.abs() + product_eps * magnitude
    return float(((y.double() - exact).abs() / (unit + 1e-30)).max()) if y.numel() else 0.0


def kernel_eps(dtype: torch.dtype) -> float:
    """``product_eps`` on a GPU: weights are rounded to 16 bits for tensor cores, activations to no less than fp16's."""
    return max(torch.finfo(dtype).eps / 2, 2.0**-11)
