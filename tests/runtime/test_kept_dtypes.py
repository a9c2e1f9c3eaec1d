"""Tensors of every dtype that torch and safetensors share, beside a coded one: bit for bit, on every way."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import load_file, save_file  # noqa: E402
from torch import nn  # noqa: E402

import kvpack  # noqa: E402
from kvpack.errors import ModelMismatchError, TensorTableError  # noqa: E402
from kvpack.format.container import DTYPE_BITS, ContainerWriter  # noqa: E402
from kvpack.runtime.weights.load import TORCH_DTYPES  # noqa: E402

# torch has nothing for these two.
NAMES = sorted(DTYPE_BITS.keys() - {"F6_E2M3", "F6_E3M2"})


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def any_bits(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """All patterns of bits that the dtype has room for, NaNs included; booleans are 0 and 1."""
    generator = torch.Generator().manual_seed(3)
    size = torch.empty(shape, dtype=dtype).nbytes
    high = 2 if dtype == torch.bool else 256
    return torch.randint(high, (size,), dtype=torch.uint8, generator=generator).view(dtype).reshape(shape)


@pytest.fixture
def original(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    path = tmp_path / "model.safetensors"
    dtype = TORCH_DTYPES[request.param]
    weights = torch.randn(64, 96, generator=torch.Generator().manual_seed(1)) * 0.02
    tensors = {"layer.weight": weights, "kept": any_bits(dtype, (7,)), "layer.bias": torch.zeros(64)}
    tensors["deep.kept"] = any_bits(dtype, (2, 3, 4))
    save_file(tensors, path)
    return path


class Deep(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("kept", torch.empty(2, 3, 4, dtype=dtype))


class Model(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer = nn.Linear(96, 64)
        self.kept = nn.Parameter(torch.empty(7, dtype=dtype), requires_grad=False)
        self.deep = Deep(dtype)


@pytest.mark.parametrize("original", NAMES, indirect=True)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_every_way(original: Path, device: str) -> None:
    expected = load_file(original)
    report = kvpack.compress(original)
    assert [t.method for t in report.tensors if t.name == "layer.weight"] == ["uniform"]
    assert kvpack.verify(report.output, against=original).mismatches == {}

    state = kvpack.load(report.output, device="cpu", verify=True)
    with torch.device(device):
        model = Model(expected["kept"].dtype)
    replacement = kvpack.replace_linears(model, report.output, device="cpu")
    assert sorted(replacement.loaded) == ["deep.kept", "kept", "layer.bias"]
    kvpack.decompress(report.output, original.parent / "back.safetensors", force=True)
    back = load_file(original.parent / "back.safetensors")
    for name in ("kept", "deep.kept"):
        for found in (state[name], model.get_parameter("kept") if name == "kept" else model.deep.kept, back[name]):
            assert (found.dtype, found.shape) == (expected[name].dtype, expected[name].shape)
            assert bits(found) == bits(expected[name])


@pytest.mark.parametrize("original", [name for name in NAMES if name != "F4"], indirect=True)
def test_numpy_has_them_too(original: Path) -> None:
    expected = load_file(original)
    with kvpack.open(original) as reader:
        for name in ("kept", "deep.kept"):
            array = reader.stored(name)
            assert array.shape == tuple(expected[name].shape)
            assert array.tobytes() == bits(expected[name])


@pytest.mark.parametrize("original", ["F4"], indirect=True)
def test_packed_pairs_have_no_other_dtype(original: Path) -> None:
    """torch converts F4 to nothing: a model of another dtype is told, before anything is changed."""
    model = Model(torch.float32)
    before = model.layer.weight
    with pytest.raises(ModelMismatchError, match=r"float4_e2m1fn_x2 in the file, torch.float32 in the model"):
        kvpack.replace_linears(model, kvpack.compress(original).output, device="cpu")
    assert model.layer.weight is before


def test_half_a_pair(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with ContainerWriter(path) as writer:
        writer.add("odd", "F4", [2, 3], [np.arange(3, dtype=np.uint8).tobytes()])
        writer.finish({})
    with pytest.raises(TensorTableError, match=r"'odd': F4 \[2, 3\], and torch has F4 in pairs"):
        kvpack.load(path, device="cpu")
