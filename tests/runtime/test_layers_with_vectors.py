"""Column scales and row offsets in layers: loaded, moved, saved, streamed, products as of the dequantized weights."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from safetensors.numpy import save_file  # noqa: E402
from safetensors.torch import load_file as load_state  # noqa: E402
from safetensors.torch import save_file as save_state  # noqa: E402
from torch import nn  # noqa: E402

import kvpack  # noqa: E402
from kvpack.encode.compress import compress  # noqa: E402
from kvpack.encode.quant_config import QuantConfig  # noqa: E402
from kvpack.errors import InputError, ModelMismatchError, ScaleError, TensorCrcError  # noqa: E402
from kvpack.runtime.weights.device_blob import DeviceBlob  # noqa: E402
from kvpack.runtime.weights.linear import RansLinear  # noqa: E402
from kvpack.runtime.weights.offload import stream_modules  # noqa: E402

# Layer → (outputs, inputs), whether it has column scales, row offsets.
SHAPES = {"columns": (96, 160), "offsets": (128, 96), "both": (64, 128), "none": (72, 64)}
VECTORS = {"columns": (True, False), "offsets": (False, True), "both": (True, True), "none": (False, False)}


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name, (outputs, inputs) in SHAPES.items():
            self.add_module(name, nn.Linear(inputs, outputs))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """m.safetensors and what it becomes: o.safetensors."""
    folder = tmp_path_factory.mktemp("vectors")
    rng = np.random.default_rng(1)
    tensors, columns, offsets = {}, {}, {}
    for name, (outputs, inputs) in SHAPES.items():
        weights = rng.normal(0, 1, (outputs, inputs)).astype(np.float32)
        if VECTORS[name][1]:
            offsets[f"{name}.weight"] = rng.normal(0, 3, outputs).astype(np.float32)
            weights += offsets[f"{name}.weight"][:, None]
        if VECTORS[name][0]:
            columns[f"{name}.weight"] = rng.lognormal(0, 1, inputs).astype(np.float16)
            weights *= columns[f"{name}.weight"].astype(np.float32)
        tensors[f"{name}.weight"] = weights
        tensors[f"{name}.bias"] = rng.normal(0, 1, outputs).astype(np.float32)
    save_file(tensors, folder / "m.safetensors")
    compress(
        folder / "m.safetensors", folder / "o.safetensors", QuantConfig(bits=6),
        column_scales=columns, row_offsets=offsets,
    )  # fmt: skip
    return folder


def model_of(folder: Path) -> Any:
    model = Chain()
    kvpack.replace_linears(model, folder / "o.safetensors")
    return model


def dense_of(folder: Path) -> Any:
    """The same with plain weights, as the reader dequantizes them."""
    model = Chain()
    with kvpack.open(folder / "o.safetensors") as reader:
        state = {name: torch.from_numpy(reader.dequantize(name).copy()) for name in reader}
    model.load_state_dict(state)
    return model


def same_products(model: Any, folder: Path, tolerance: float = 1e-5) -> None:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, layer in dense_of(folder).named_children():
            x = torch.randn(3, SHAPES[name][1], generator=generator)
            got, expected = getattr(model, name)(x), layer(x)
            assert (got - expected).norm() < tolerance * expected.norm(), name


def test_layers_have_the_readers_numbers(folder: Path) -> None:
    model = model_of(folder)
    same_products(model, folder)
    with kvpack.open(folder / "o.safetensors") as reader:
        for name, (has_columns, has_offsets) in VECTORS.items():
            layer, info = getattr(model, name), reader.info(f"{name}.weight")
            assert isinstance(layer, RansLinear)
            assert (layer.weight_kvpack_column_scale is not None) == has_columns
            assert (layer.weight_kvpack_row_offset is not None) == has_offsets
            expected = reader.dequantize(f"{name}.weight")
            np.testing.assert_array_equal(layer.dequantize().numpy(), expected)
            half = reader.dequantize(f"{name}.weight", "float16")
            np.testing.assert_array_equal(layer.dequantize(torch.float16).numpy(), half)
            assert info is not None
            assert layer.bits_per_weight == info.bits_per_weight
            assert ("column scales" in repr(layer), "row offsets" in repr(layer)) == (has_columns, has_offsets)
            blob = layer.prepare()
            assert blob.nbytes >= info.blob_bytes + blob.number_bytes


def test_what_torch_does_to_modules(folder: Path, tmp_path: Path) -> None:
    model = model_of(folder)
    for changed in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model_of(folder).half().float()):
        same_products(changed, folder, 1e-3)
    assert model_of(folder).half().both.weight_kvpack_row_offset.dtype == torch.float32
    save_state(model.state_dict(), tmp_path / "state.safetensors")
    state = load_state(tmp_path / "state.safetensors")
    assert {key for key in state if key.startswith("both")} == {
        "both.bias", *(f"both.weight_kvpack{part}" for part in ("", "_scale", "_column_scale", "_row_offset"))
    }  # fmt: skip
    other = model_of(folder)
    for key in ("both.weight_kvpack_column_scale", "both.weight_kvpack_row_offset"):
        state[key] = state[key] * 2
    other.load_state_dict(state)
    # (s·q + 2·offset) · 2·column scale
    both = model.both
    expected = 2 * both.dequantize().double()
    expected += 2 * torch.outer(both.weight_kvpack_row_offset.double(), both.weight_kvpack_column_scale.double())
    torch.testing.assert_close(other.both.dequantize().double(), expected, rtol=1e-6, atol=1e-6)
    data = bytes(model.both.weight_kvpack.numpy())
    plain = RansLinear(DeviceBlob.from_bytes(data, np.ones(1, np.float32), torch.float32, SHAPES["both"], "cpu"))
    with pytest.raises(RuntimeError, match=r"Unexpected key.*weight_kvpack_column_scale"):
        plain.load_state_dict({key.removeprefix("both."): value for key, value in state.items() if "both" in key})
    model.both.weight_kvpack_column_scale = model.both.weight_kvpack_column_scale.float()
    with pytest.raises(ModelMismatchError, match=r"weight_kvpack_column_scale is torch\.float32 .* one row of float16"):
        model.both.prepare()


@pytest.mark.parametrize("source", ["disk", "pinned"])
def test_streams(folder: Path, source: str) -> None:
    model = Chain()
    kvpack.replace_linears(model, folder / "o.safetensors")
    layers = [getattr(model, name) for name in SHAPES]
    path = folder / "o.safetensors" if source == "disk" else None
    with stream_modules(model, layers, source=source, path=path, device="cpu"):
        for _ in range(2):
            same_products(model, folder)
    if source == "pinned":
        same_products(model, folder)


def test_damage_to_vectors_is_found_when_a_file_is_loaded(folder: Path, tmp_path: Path) -> None:
    with kvpack.open(folder / "o.safetensors") as reader:
        container = reader.container("both.weight")
        places = {
            what: container.data_begin + container.tensors[f"both.weight_kvpack_{what}"].begin
            for what in ("column_scale", "row_offset")
        }
    for what, at in places.items():
        data = bytearray((folder / "o.safetensors").read_bytes())
        data[at] ^= 1
        (tmp_path / "d.safetensors").write_bytes(data)
        with pytest.raises(TensorCrcError, match=rf"both\.weight_kvpack_{what}"):
            kvpack.load(tmp_path / "d.safetensors", device="cpu")


def test_vectors_that_do_not_fit_a_blob(folder: Path) -> None:
    with kvpack.open(folder / "o.safetensors") as reader:
        data = bytes(reader.container("both.weight").data("both.weight_kvpack"))
    scales = np.ones(1, np.float32)
    columns, offsets = np.ones(128, np.float16), np.ones(64, np.float32)
    for vectors, message in (
        ({"column_scales": columns[1:]}, r"column scales are float16 \[127\] for 1 × 64 × 128 SIGNED elements"),
        ({"column_scales": columns.astype(np.float32)}, r"column scales are float32"),
        ({"row_offsets": offsets[1:]}, r"row offsets are float32 \[63\]"),
        ({"row_offsets": offsets * np.float32(np.inf)}, "row offset 0 is inf"),
        ({"column_scales": columns * np.float16(0)}, "column scale 0 is 0"),
    ):
        with pytest.raises(ScaleError, match=message):
            DeviceBlob.from_bytes(data, scales, torch.float32, (64, 128), "cpu", **vectors)
    with pytest.raises(ScaleError, match="no scales"):
        DeviceBlob.from_bytes(data, None, torch.float32, (64, 128), "cpu", column_scales=columns)


def test_no_grouped_products_yet(folder: Path) -> None:
    with kvpack.open(folder / "o.safetensors") as reader:
        data = bytes(reader.container("both.weight").data("both.weight_kvpack"))
    blob = DeviceBlob.from_bytes(
        data, np.ones(1, np.float32), torch.float32, (64, 128), "cpu", column_scales=np.ones(128, np.float16)
    )
    with pytest.raises(InputError, match="no grouped products with row offsets or column scales"):
        blob.grouped_linear(torch.ones(1, 128), torch.zeros((1, 1), dtype=torch.int64))


@pytest.mark.gpu
def test_on_a_gpu(folder: Path) -> None:
    """Decoded: the CPU's bits. Products: fused ones, and expanded ones."""
    cpu, gpu = model_of(folder), model_of(folder).cuda()
    for name in SHAPES:
        here, there = getattr(cpu, name), getattr(gpu, name)
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            assert torch.equal(there.dequantize(dtype).cpu(), here.dequantize(dtype))
            for tokens in (1, 7, 32, 200):
                x = torch.randn(tokens, SHAPES[name][1], generator=torch.Generator().manual_seed(tokens)).to(dtype)
                got, expected = there(x.cuda()).double().cpu(), x.double() @ here.dequantize(torch.float32).double().T
                expected += here.bias.double()
                assert (got - expected).norm() < (1e-2 if dtype == torch.bfloat16 else 1e-3) * expected.norm()
