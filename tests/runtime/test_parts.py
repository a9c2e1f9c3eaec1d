"""Parts and stacks of coded layers as products: the numbers of the whole, and one launch for a stack."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import emulator
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from emulated_device import LIMITS, coded_tensor, emulated_launch  # noqa: E402
from safetensors.numpy import save_file  # noqa: E402

import kvpack  # noqa: E402
from kvpack.encode.coded_tensor import CodedTensor  # noqa: E402
from kvpack.runtime.device import kernels  # noqa: E402
from kvpack.runtime.weights import products  # noqa: E402
from kvpack.runtime.weights.linear import RansLinear  # noqa: E402
from kvpack.runtime.weights.load import coded_on_device  # noqa: E402

SHAPES = {"q_proj": (512, 192), "k_proj": (256, 192), "v_proj": (256, 192), "down_proj": (64, 256)}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    rng = np.random.default_rng(1)
    tensors = {f"{name}.weight": rng.normal(0, 0.02, shape).astype(np.float32) for name, shape in SHAPES.items()}
    save_file(tensors, folder / "m.safetensors")
    kvpack.compress(folder / "m.safetensors", folder / "out", bits=4.5, tensor_parallel=2, stack=True)
    return folder / "out"


def linear(tensor: CodedTensor) -> RansLinear:
    return RansLinear(coded_on_device(tensor, "cpu"))


def parts_of(path: Path, *names: str) -> list[CodedTensor]:
    with kvpack.open(path) as reader:
        return [reader.coded(f"{name}.weight") for name in names]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 5])
def test_a_stack_gives_the_bits_of_the_single_products(path: Path, tokens: int, dtype: Any) -> None:
    q, k, v = parts_of(path, "q_proj", "k_proj", "v_proj")
    x = torch.randn(tokens, 192, generator=torch.Generator().manual_seed(2)).to(dtype)
    stacked = linear(CodedTensor.stack([q, k, v]))
    assert stacked.out_features == 1024
    single = torch.cat([linear(part)(x) for part in (q, k, v)], dim=-1)
    assert torch.equal(stacked(x), single)


def test_devices_that_share_a_block_of_layers(path: Path) -> None:
    """q, k, v split by outputs and down by inputs: what the devices have is the whole, or sums up to it."""
    q, k, v, down = parts_of(path, "q_proj", "k_proj", "v_proj", "down_proj")
    x = torch.randn(3, 192, generator=torch.Generator().manual_seed(3))
    whole = [linear(part)(x) for part in (q, k, v)]
    sums = torch.zeros(3, 64)
    for rank in (0, 1):
        mine = [part.part("outputs", rank, 2) for part in (q, k, v)]
        sizes = [part.shape[0] for part in mine]
        for got, expected in zip(linear(CodedTensor.stack(mine))(x).split(sizes, dim=-1), whole, strict=True):
            half = expected.chunk(2, dim=-1)[rank]
            torch.testing.assert_close(got, half, rtol=1e-5, atol=1e-6)
        hidden = whole[1].chunk(2, dim=-1)[rank]
        sums += linear(down.part("inputs", rank, 2))(hidden)
    torch.testing.assert_close(sums, linear(down)(whole[1]), rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(emulator.compiler() is None, reason="no C++ compiler for the emulator")
def test_a_stack_is_one_launch(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launches: list[str] = []

    def launch(kernel: Any, *arguments: Any, **options: Any) -> None:
        launches.append(kernel.function)
        emulated_launch(kernel, *arguments, **options)

    monkeypatch.setattr(kernels, "launch", launch)
    parts = [part.part("outputs", 1, 2) for part in parts_of(path, "q_proj", "k_proj", "v_proj")]
    x = torch.randn(1, 192, generator=torch.Generator().manual_seed(4))
    single = [products.multiply(coded_tensor(bytes(p.blob), p.scales), x, None, LIMITS) for p in parts]
    assert launches == ["gemv"] * 3
    stacked = CodedTensor.stack(parts)
    together = products.multiply(coded_tensor(bytes(stacked.blob), stacked.scales), x, None, LIMITS)
    assert launches == ["gemv"] * 4
    torch.testing.assert_close(together, torch.cat(single, dim=-1), rtol=1e-6, atol=1e-6)
