"""RansLinear against products with the dequantized weights, and through all that torch does to modules."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import blob_surgery as surgery
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import load_file, save_file  # noqa: E402
from small_models import LAYERS, kernel_eps, layer_file, product_error  # noqa: E402

import kvpack  # noqa: E402
from kvpack.errors import LaneStateError, ModelMismatchError  # noqa: E402
from kvpack.runtime.device import kernels  # noqa: E402
from kvpack.runtime.weights import ops, products  # noqa: E402
from kvpack.runtime.weights.device_blob import SLACK_BYTES, DeviceBlob  # noqa: E402
from kvpack.runtime.weights.linear import RansLinear  # noqa: E402
from kvpack.runtime.weights.load import State, load  # noqa: E402

CODED = sorted(LAYERS)
FLOATS = (torch.float32, torch.float16, torch.bfloat16)

# torch's own, from importing Inductor, which torch._dynamo.reset does wherever there is a GPU.
imports_inductor = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is:DeprecationWarning")
# Also torch's own: the first graph of Inductor's pool has nothing in it.
captures_inductor = pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return layer_file(tmp_path_factory.mktemp("layers"))


@pytest.fixture
def state(path: Path) -> State:
    return load(path, "cpu")


@pytest.fixture(scope="module")
def weights(path: Path) -> dict[str, Any]:
    """The weights as the CPU decoder has them, fp32."""
    with kvpack.open(path) as reader:
        return {name: torch.from_numpy(reader.dequantize(f"{name}.weight", "float32")) for name in CODED}


def activations(name: str, *leading: int, dtype: Any = torch.float32, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*leading, LAYERS[name][1], generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", CODED)
def test_product(state: State, weights: dict[str, Any], name: str, dtype: Any) -> None:
    layer = state.linear(name)
    assert isinstance(layer, RansLinear)
    x = activations(name, 5, dtype=dtype)
    y = layer(x)
    assert y.dtype == dtype
    assert product_error(y, x, weights[name], layer.bias) <= 1
    assert (layer.bias is not None) == (name in ("biased", "exact"))


def test_outliers_count(state: State, weights: dict[str, Any]) -> None:
    """The layer called so has them, and they are in its products."""
    layer = state.linear("outliers")
    assert layer.prepare().has_outliers
    x = torch.zeros(1, 96)
    x[0, 5] = 1
    assert float(layer(x)[0, 3]) == float(weights["outliers"][3, 5]) == pytest.approx(4, rel=0.02)


@pytest.mark.parametrize("leading", [(), (1,), (0,), (2, 3), (2, 1, 4), (3, 0, 2)])
def test_leading_dimensions(state: State, weights: dict[str, Any], leading: tuple[int, ...]) -> None:
    x = activations("biased", *leading)
    y = state.linear("biased")(x)
    assert y.shape == (*leading, 96)
    assert product_error(y.reshape(-1, 96), x.reshape(-1, 416), weights["biased"], state["biased.bias"]) <= 1


def test_strided_activations(state: State, weights: dict[str, Any]) -> None:
    x = activations("rows", 6)
    wide = torch.zeros(6, 400)
    wide[:, ::2] = x
    for strided in (wide[:, ::2], x.T.contiguous().T, x[:1].expand(6, -1)):
        assert product_error(state.linear("rows")(strided), strided, weights["rows"], None) <= 1


def test_transposed_weights(tmp_path: Path) -> None:
    """Inputs × outputs, as GPT-2's Conv1D stores them."""
    generator = torch.Generator().manual_seed(3)
    stored = torch.randn(96, 288, generator=generator)
    save_file(
        {"h.0.attn.c_attn.weight": stored, "h.0.attn.c_attn.bias": torch.randn(288, generator=generator)},
        tmp_path / "in.safetensors",
    )
    kvpack.compress(tmp_path / "in.safetensors", tmp_path / "out.safetensors", kvpack.QuantConfig(bits=5))
    state = load(tmp_path / "out.safetensors", "cpu")
    layer = state.linear("h.0.attn.c_attn")
    assert layer.prepare().header.transposed
    assert (layer.in_features, layer.out_features) == (96, 288)
    with kvpack.open(tmp_path / "out.safetensors") as reader:
        weight = torch.from_numpy(reader.dequantize("h.0.attn.c_attn.weight"))
    assert layer.dequantize().equal(weight)
    assert weight.shape == (96, 288)
    x = torch.randn(4, 96, generator=generator)
    assert product_error(layer(x), x, weight.T, layer.bias) <= 1
    moved = copy.deepcopy(layer).half()
    assert moved.dequantize().equal(weight)


def test_weight_tells_without_decoding(
    state: State, weights: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(DeviceBlob, "dequantize", lambda *_: pytest.fail("decoded"))
    monkeypatch.setattr(DeviceBlob, "integers", lambda *_: pytest.fail("decoded"))
    for name in CODED:
        layer = state.linear(name)
        for asked in (layer, empty_like(layer), copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            weight = asked.weight
            assert weight.dtype == {"exact": torch.bfloat16, "half": torch.float16}.get(name, torch.float32)
            assert weight.device == asked.weight_kvpack.device
            assert isinstance(weight.shape, torch.Size)
            assert weight.shape == weight.size() == weights[name].shape
            assert weight.ndim == weight.dim() == 2
            assert weight.numel() == weights[name].numel()
            assert (weight.size(0), weight.size(-1)) == weights[name].shape
            assert not isinstance(weight, torch.Tensor)
            assert "CodedWeight([" in repr(weight)
            assert copy.deepcopy(weight).shape == pickle.loads(pickle.dumps(weight)).shape == weight.shape
            assert not hasattr(weight, "grad")
            assert weight is not None
            assert len({weight, weight}) == 1
        assert "weight" not in dict(layer.named_parameters()) | dict(layer.named_buffers()) | layer.state_dict()
        assert "CodedWeight" not in repr(layer)


@pytest.mark.parametrize(
    "use",
    [
        *(lambda w: w + 1, lambda w: 1 + w, lambda w: 2 * w, lambda w: w @ w, lambda w: torch.ones(2, 300) @ w),
        *(lambda w: torch.ones(300) + w, lambda w: -w, lambda w: w[0], len, list, bool, float, np.asarray),
        *(lambda w: w == 0, lambda w: torch.ones(1) == w, lambda w: w != w, lambda w: w > 0),
        *(lambda w: torch.nn.functional.linear(torch.ones(416), w), torch.isnan, lambda w: torch.stack([w, w])),
        *(lambda w: w.data, lambda w: w.float(), lambda w: w.to("cpu"), lambda w: w.T, lambda w: w.requires_grad),
        *(lambda w: torch.nn.init.normal_(w), torch.zeros_like, lambda w: torch.zeros(300, 416).copy_(w)),
    ],
)
def test_weight_is_no_tensor(state: State, use: Any) -> None:
    """Whatever needs the numbers is told how to get them."""
    with pytest.raises((TypeError, AttributeError), match=r"RansLinear\.dequantize\(\) gives its numbers"):
        use(state.linear("quantized").weight)


def test_weight_of_transposed_layers(tmp_path: Path) -> None:
    tensors = {"h.0.attn.c_attn.weight": torch.randn(96, 288), "h.0.attn.c_attn.bias": torch.zeros(288)}
    save_file(tensors, tmp_path / "in.safetensors")
    kvpack.compress(tmp_path / "in.safetensors", tmp_path / "out.safetensors", kvpack.QuantConfig(bits=5))
    layer = load(tmp_path / "out.safetensors", "cpu").linear("h.0.attn.c_attn")
    assert layer.weight.shape == layer.dequantize().shape == (96, 288)
    scales = len(layer.weight_kvpack_scale)
    empty = RansLinear.empty(96, 288, 10, scales, True, torch.float32, transposed=True)
    assert empty.weight.shape == (96, 288)
    unknown = RansLinear.empty(96, 288, 10, scales, True, torch.float32)
    assert unknown.weight.shape == (288, 96)
    unknown.load_state_dict(layer.state_dict(), assign=True)
    assert unknown.weight.shape == (96, 288)


def test_dequantize_is_a_copy_of_the_numbers(state: State, weights: dict[str, Any]) -> None:
    for name in CODED:
        weight = state.linear(name).dequantize()
        assert weight.dtype == {"exact": torch.bfloat16, "half": torch.float16}.get(name, torch.float32)
        assert weight.float().equal(weights[name])
        assert state.linear(name).dequantize(torch.float32).equal(weights[name])
        weight.zero_()
        assert state.linear(name).dequantize().float().equal(weights[name])


def test_description(state: State, path: Path) -> None:
    with kvpack.open(path) as reader:
        for name in CODED:
            info = reader.info(f"{name}.weight")
            assert info is not None
            assert state.linear(name).bits_per_weight == info.bits_per_weight
    text = repr(state.linear("rows"))
    assert "in_features=200, out_features=128, bias=False" in text
    assert "quantized to 8 bits, a scale per row" in text
    assert "device=cpu" in text
    assert "lossless" in repr(state.linear("exact"))
    assert f"{state.linear('quantized').bits_per_weight:.3f} bits/weight" in repr(state.linear("quantized"))


def test_memory(state: State) -> None:
    layer = state.linear("biased")
    blob = layer.prepare()
    assert layer.memory_bytes == blob.nbytes + 4 * 96
    assert blob.blob.numel() == len(layer.weight_kvpack) + SLACK_BYTES
    assert blob.nbytes <= blob.blob.numel() + 4 + 64
    # Nothing is held twice.
    assert layer.weight_kvpack.data_ptr() == blob.blob.data_ptr() == state["biased.weight"].blob.data_ptr()


# Saving and loading ------------------------------------------------------------------------------------------------


def empty_like(layer: RansLinear, device: str = "meta", blob_bytes: int | None = None) -> RansLinear:
    scales = layer.weight_kvpack_scale
    return RansLinear.empty(
        layer.in_features,
        layer.out_features,
        len(layer.weight_kvpack) if blob_bytes is None else blob_bytes,
        0 if scales is None else len(scales),
        layer.bias is not None,
        layer.weight_dtype,
        device,
    )


@pytest.mark.parametrize("name", CODED)
def test_state_dict_through_safetensors(state: State, path: Path, tmp_path: Path, name: str) -> None:
    layer = state.linear(name)
    save_file(layer.state_dict(prefix=f"{name}."), tmp_path / "layer.safetensors")
    saved, original = load_file(tmp_path / "layer.safetensors"), load_file(path)
    for key, tensor in saved.items():  # names, types and bytes are the container's
        assert tensor.dtype == original[key].dtype
        assert tensor.equal(original[key])
    assert f"{name}.weight_kvpack" in saved
    assert (f"{name}.weight_kvpack_scale" in saved) == (name not in ("exact", "half"))
    assert (f"{name}.bias" in saved) == (layer.bias is not None)

    own = {key.removeprefix(f"{name}."): tensor for key, tensor in saved.items()}
    x = activations(name, 3)
    expected = layer(x)
    for device, assign in (("cpu", False), ("cpu", True), ("meta", True)):
        other = empty_like(layer, device)
        assert other.load_state_dict(own, assign=assign) == ([], [])
        assert other(x).equal(expected), (device, assign)
        assert other.dequantize().equal(layer.dequantize())


def test_blob_of_another_length(state: State, weights: dict[str, Any]) -> None:
    """How long a blob is depends on the weights, so a layer takes what the state dict brings."""
    layer = state.linear("quantized")
    for device in ("cpu", "meta"):
        other = empty_like(layer, device, blob_bytes=17)
        other.load_state_dict(layer.state_dict(), assign=device == "meta")
        assert other.dequantize().equal(weights["quantized"])
        assert len(other.weight_kvpack) == len(layer.weight_kvpack)


def test_loading_does_not_touch_shared_memory(state: State, weights: dict[str, Any]) -> None:
    layer, other = state.linear("quantized"), copy.deepcopy(state.linear("quantized"))
    twin = RansLinear(state["quantized.weight"])
    state_dict = other.state_dict()
    layer.load_state_dict(state_dict)
    assert layer.weight_kvpack.data_ptr() != twin.weight_kvpack.data_ptr()
    assert layer.weight_kvpack.data_ptr() != state_dict["weight_kvpack"].data_ptr()
    assert twin.dequantize().equal(weights["quantized"])


def test_damaged_or_foreign_state_dicts(state: State) -> None:
    layer = state.linear("quantized")
    good = layer.state_dict()
    damaged = good["weight_kvpack"].clone()
    damaged[70] ^= 1
    with pytest.raises(RuntimeError, match=r"weight_kvpack: header_crc32 is"):
        empty_like(layer, "cpu").load_state_dict({**good, "weight_kvpack": damaged})
    with pytest.raises(RuntimeError, match="the blob holds 1 × 128 × 200 weights, the layer has 300 outputs"):
        empty_like(layer, "cpu").load_state_dict({**good, "weight_kvpack": state.linear("rows").weight_kvpack})
    with pytest.raises(RuntimeError, match=r"Missing key.*weight_kvpack_scale"):
        empty_like(layer, "cpu").load_state_dict({"weight_kvpack": good["weight_kvpack"]})
    with pytest.raises(RuntimeError, match=r"Missing key.*weight_kvpack"):
        empty_like(layer, "cpu").load_state_dict({"weight_kvpack_scale": good["weight_kvpack_scale"]})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*weight_kvpack_scale"):
        empty_like(state.linear("exact"), "cpu").load_state_dict(
            {**state.linear("exact").state_dict(), "weight_kvpack_scale": torch.ones(1)}
        )
    with pytest.raises(RuntimeError, match="scale 0 is -1"):
        empty_like(layer, "cpu").load_state_dict({**good, "weight_kvpack_scale": torch.tensor([-1.0])})
    with pytest.raises(RuntimeError, match="one row of bytes"):
        empty_like(layer, "meta").load_state_dict({**good, "weight_kvpack": damaged.to(torch.int32)}, assign=True)


def damaged_lanes(layer: RansLinear, seal: bool) -> dict[str, Any]:
    """The layer's state dict with words changed; sealed: with CRCs that hold, so that only lanes can tell."""
    header = layer.prepare().header
    good = layer.state_dict()
    blob = bytearray(good["weight_kvpack"].numpy().tobytes())
    for at in range(header.payload_offset + 2200, header.payload_offset + 2300):
        blob[at] ^= 0x5A
    if seal:
        surgery.mend_crcs(blob)
    return {**good, "weight_kvpack": torch.frombuffer(blob, dtype=torch.uint8)}


@pytest.mark.parametrize("seal", [False, True])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_damaged_lanes_of_state_dicts(state: State, device: str, seal: bool) -> None:
    """Found when they are loaded, and named, not by some later product."""
    model = torch.nn.ModuleDict({"up": empty_like(state.linear("quantized"), device)})
    damaged = {f"up.{key}": tensor for key, tensor in damaged_lanes(state.linear("quantized"), seal).items()}
    what = "lane" if seal else "payload_crc32"
    with pytest.raises(RuntimeError, match=rf"up\.weight_kvpack: .*{what}"):
        model.load_state_dict(damaged, assign=device == "meta")


@pytest.mark.parametrize("assign", [False, True])
def test_lanes_are_checked_once(state: State, monkeypatch: pytest.MonkeyPatch, assign: bool) -> None:
    checked: list[DeviceBlob] = []
    monkeypatch.setattr(DeviceBlob, "check_lanes", lambda blob: checked.append(blob))
    layer = empty_like(state.linear("quantized"), "meta" if assign else "cpu")
    layer.load_state_dict(state.linear("quantized").state_dict(), assign=assign)
    for _ in range(3):
        layer(activations("quantized", 2))
    assert checked == [layer.prepare()]


def test_empty_layers_compute_nothing(state: State) -> None:
    x = activations("quantized", 2)
    with pytest.raises(RuntimeError, match="on the meta device"):
        empty_like(state.linear("quantized"))(x)
    with pytest.raises(ValueError, match="magic is 0x00000000"):
        empty_like(state.linear("quantized"), "cpu")(x)
    with pytest.warns(UserWarning, match="no-op"):
        empty_like(state.linear("quantized")).load_state_dict(state.linear("quantized").state_dict())


def test_torch_save(state: State) -> None:
    layer, file = state.linear("biased"), io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = empty_like(layer)
    other.load_state_dict(torch.load(file, weights_only=True), assign=True)
    x = activations("biased", 2)
    assert other(x).equal(layer(x))


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("name", CODED)
def test_copies(state: State, name: str, how: str) -> None:
    layer = state.linear(name)
    x = activations(name, 3)
    expected = layer(x)
    other = copy.deepcopy(layer) if how == "deepcopy" else pickle.loads(pickle.dumps(layer))
    assert other._current() is not None  # ready without a first call
    assert other(x).equal(expected)
    assert other.weight_kvpack.data_ptr() != layer.weight_kvpack.data_ptr()
    assert other.weight_kvpack.untyped_storage().nbytes() == len(layer.weight_kvpack) + SLACK_BYTES
    assert repr(other) == repr(layer)
    layer.weight_kvpack.zero_()
    assert other(x).equal(expected)


# What Module.to and its like do -------------------------------------------------------------------------------------

CONVERSIONS = {
    "half": lambda layer: layer.half(),
    "double": lambda layer: layer.double(),
    "bfloat16": lambda layer: layer.to(torch.bfloat16),
    "type": lambda layer: layer.type(torch.float16),
    "cpu": lambda layer: layer.cpu(),
    "to": lambda layer: layer.to("cpu", torch.float16, non_blocking=True),
    "share_memory": lambda layer: layer.share_memory(),
}


@pytest.mark.parametrize("how", CONVERSIONS)
@pytest.mark.parametrize("name", ["biased", "rows", "exact"])
def test_conversions(state: State, weights: dict[str, Any], name: str, how: str) -> None:
    layer = copy.deepcopy(state.linear(name))
    before = layer.state_dict()
    model = torch.nn.Sequential(layer, torch.nn.LayerNorm(LAYERS[name][0]))
    assert CONVERSIONS[how](model)[0] is layer
    after = layer.state_dict()
    assert list(after) == list(before)
    assert after["weight_kvpack"].dtype == torch.uint8
    assert after["weight_kvpack"].equal(before["weight_kvpack"])
    if name != "exact":
        assert after["weight_kvpack_scale"].dtype == torch.float32
        assert after["weight_kvpack_scale"].equal(before["weight_kvpack_scale"])
    if layer.bias is not None:
        assert layer.bias.dtype == model[1].bias.dtype if how not in ("cpu", "share_memory") else before["bias"].dtype
    assert layer._current() is not None
    x = activations(name, 2)
    assert product_error(layer(x), x, weights[name], layer.bias) <= 1
    if how == "share_memory":
        assert layer.weight_kvpack.is_shared()


def test_meta_and_back(state: State) -> None:
    layer = copy.deepcopy(state.linear("biased"))
    good = copy.deepcopy(layer.state_dict())
    x = activations("biased", 2)
    expected = layer(x)
    layer.to("meta")
    assert all(tensor.is_meta for tensor in layer.state_dict().values())
    assert "device=meta" in repr(layer)
    layer.to_empty(device="cpu")
    layer.weight_kvpack.zero_()  # unspecified bytes until now
    with pytest.raises(ValueError, match="magic"):
        layer(x)
    layer.load_state_dict(good)
    assert layer(x).equal(expected)


@pytest.mark.parametrize("how", ["setattr", "buffers"])
def test_buffers_replaced_by_hand(state: State, how: str) -> None:
    """As loaders of transformers and accelerate do."""
    layer, other = state.linear("quantized"), empty_like(state.linear("quantized"))
    x = activations("quantized", 2)
    for name in ("weight_kvpack", "weight_kvpack_scale"):
        tensor = layer._buffers[name].clone()
        if how == "setattr":
            setattr(other, name, tensor)
        else:
            other._buffers[name] = tensor
    assert other(x).equal(layer(x))
    other._buffers["weight_kvpack_scale"] = 2 * layer.weight_kvpack_scale
    assert other(x).equal(2 * layer(x))
    other._buffers["weight_kvpack_scale"] = layer.weight_kvpack_scale
    other.prepare()
    assert other._buffers["weight_kvpack"].untyped_storage().nbytes() == len(layer.weight_kvpack) + SLACK_BYTES
    # A part of something larger is copied: what lies behind it is not slack.
    arena = torch.full((len(layer.weight_kvpack) + 3 * SLACK_BYTES,), 7, dtype=torch.uint8)
    arena[: len(layer.weight_kvpack)] = layer.weight_kvpack
    other.weight_kvpack = arena[: len(layer.weight_kvpack)]
    assert other.dequantize().equal(layer.dequantize())
    assert int(arena[len(layer.weight_kvpack)]) == 7


def test_refusals(state: State) -> None:
    with pytest.raises(ValueError, match=r"x is \(2, 415\), the layer has 416 inputs"):
        state.linear("quantized")(torch.zeros(2, 415))
    with pytest.raises(TypeError, match="int64"):
        state.linear("quantized")(torch.zeros(2, 416, dtype=torch.int64))
    with pytest.raises(ModelMismatchError, match=r"needs one matrix, the blob holds \(3, 64, 96\)"):
        RansLinear(state["experts"])
    with pytest.raises(ModelMismatchError, match=r"the bias is \(3,\), the weight has 300 outputs"):
        RansLinear(state["quantized.weight"], torch.zeros(3))


# torch.compile -------------------------------------------------------------------------------------------------------


class Two(torch.nn.Module):
    def __init__(self, state: State) -> None:
        super().__init__()
        self.up, self.down = copy.deepcopy(state.linear("quantized")), copy.deepcopy(state.linear("biased"))

    def forward(self, x: Any) -> Any:
        return torch.nn.functional.silu(self.up(x)).sum(-1, keepdim=True) * self.down(x)


@imports_inductor
def test_compile(state: State) -> None:
    torch._dynamo.reset()
    model = Two(state)
    x = activations("quantized", 3)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert compiled(x).equal(model(x))
    assert compiled(2 * x).equal(model(2 * x))
    model.half()  # other buffers: compiled anew, or guarded; never the old ones
    torch.testing.assert_close(compiled(x.half()), model(x.half()), rtol=0, atol=0)


@imports_inductor
def test_compile_code_that_asks_for_the_weights_type(state: State) -> None:
    """As transformers' T5 does, for each layer and token."""

    class Asking(Two):
        def forward(self, x: Any) -> Any:
            weight = self.up.weight
            if isinstance(weight, torch.Tensor) and weight.dtype != torch.int8:
                x = x.to(weight.dtype)
            assert weight.device == x.device
            return super().forward(x.to(weight.dtype)) * weight.shape[0]

    torch._dynamo.reset()
    model = Asking(state)
    x = activations("quantized", 3)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert compiled(x).equal(model(x))


@imports_inductor
def test_compile_after_copies_and_loads(state: State) -> None:
    """Whatever filled the layer has made it ready: nothing is left to derive under fullgraph."""
    layer = state.linear("quantized")
    x = activations("quantized", 2)
    loaded = empty_like(layer)
    loaded.load_state_dict(layer.state_dict(), assign=True)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), loaded, copy.deepcopy(layer).to("cpu")):
        torch._dynamo.reset()
        assert torch.compile(other, fullgraph=True, backend="aot_eager")(x).equal(layer(x))


@imports_inductor
def test_coded_tensors_are_static_inputs(state: State) -> None:
    """Under CUDA graphs, inputs that are not static are copied at each replay: a second copy of the weights."""
    torch._dynamo.reset()
    static: dict[int, Any] = {}

    def backend(module: Any, inputs: Any) -> Any:
        placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
        for node, value in zip(placeholders, inputs, strict=True):
            kind = node.meta.get("tensor_dict", {}).get("_dynamo_static_input_type")
            if isinstance(value, torch.Tensor):
                static[value.numel()] = kind
        return module

    layer = state.linear("biased")
    torch.compile(layer, fullgraph=True, backend=backend)(activations("biased", 2))
    blob = layer.prepare()
    for tensor in (blob.blob, blob.scales, layer.bias):
        assert static[tensor.numel()] is not None
    assert static[2 * 416] is None


def test_gradient_of_activations(state: State, weights: dict[str, Any]) -> None:
    """Coded weights are constants; what comes before them can be trained."""
    x = activations("biased", 3).requires_grad_()
    y = state.linear("biased")(x)
    (y**2).sum().backward()
    expected = 2 * y.detach().double() @ weights["biased"].double()
    torch.testing.assert_close(x.grad.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_result_may_be_changed_in_place(state: State, dtype: Any) -> None:
    """As that of ``nn.Linear``, with gradients too."""
    x = activations("biased", 6, dtype=dtype).reshape(2, 3, -1).requires_grad_()
    y = state.linear("biased")(x)
    expected = y.detach() * 2
    y *= 2
    y[0, 1] += 1
    expected[0, 1] += 1
    assert torch.equal(y, expected)
    y.sum().backward()
    assert x.grad is not None


# On a GPU -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def cuda_state(path: Path) -> State:
    return load(path, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", CODED)
def test_cuda_product(cuda_state: State, weights: dict[str, Any], name: str, dtype: Any) -> None:
    layer = cuda_state.linear(name)
    for tokens in (1, 2, 8, 9, 16, 17, 32, 33, 100):
        x = activations(name, tokens, dtype=dtype, seed=tokens).cuda()
        y = layer(x)
        assert y.dtype == dtype
        assert product_error(y, x, weights[name].cuda(), layer.bias, kernel_eps(dtype)) <= 1, tokens
    blob = layer.prepare()
    assert isinstance(blob, DeviceBlob)
    blob.check()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS)
def test_cuda_gradient(cuda_state: State, weights: dict[str, Any], dtype: Any) -> None:
    layer = cuda_state.linear("biased")
    for tokens in (1, 8, 100):
        x = activations("biased", tokens, dtype=dtype).cuda().requires_grad_()
        y = layer(x)
        gradient = torch.randn_like(y)
        y.backward(gradient)
        expected = gradient.double() @ weights["biased"].cuda().double()
        assert (x.grad.double() - expected).norm() < 8 * torch.finfo(dtype).eps * expected.norm(), tokens


@pytest.mark.gpu
def test_cuda_moves(state: State, weights: dict[str, Any]) -> None:
    for name in CODED:
        layer = copy.deepcopy(state.linear(name))
        x = activations(name, 4)
        layer.cuda()
        assert layer.weight_kvpack.is_cuda
        assert layer._current() is not None
        assert layer._current().groups.is_cuda
        assert layer._current().groups.numel()
        error = product_error(layer(x.cuda()), x.cuda(), weights[name].cuda(), layer.bias, kernel_eps(x.dtype))
        assert error <= 1
        assert layer.dequantize().cpu().float().equal(weights[name])
        twin = copy.deepcopy(layer)
        again = pickle.loads(pickle.dumps(layer))
        assert twin(x.cuda()).equal(layer(x.cuda()))
        assert again(x.cuda()).equal(layer(x.cuda()))
        layer.to("cpu", torch.float16)
        assert layer.dequantize().float().equal(weights[name])
        assert product_error(layer(x), x, weights[name], layer.bias) <= 1


@pytest.mark.gpu
def test_cuda_damaged_lanes(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels do not raise: lanes are checked when a layer's bytes come to the device, and not at each product."""
    for device, assign in (("cuda", False), ("meta", True)):
        for seal in (False, True):
            damaged = damaged_lanes(state.linear("quantized"), seal)
            if assign:
                damaged = {key: tensor.cuda() for key, tensor in damaged.items()}
            with pytest.raises(RuntimeError, match=r"weight_kvpack: \d+ lanes did not end"):
                empty_like(state.linear("quantized"), device).load_state_dict(damaged, assign=assign)
    layer = empty_like(state.linear("quantized"), "cpu")
    for name, tensor in damaged_lanes(state.linear("quantized"), True).items():
        layer._buffers[name] = tensor
    layer.tensor_name = "up.weight"
    layer.cuda()
    with pytest.raises(LaneStateError, match=r"up\.weight: \d+ lanes did not end"):
        layer(activations("quantized", 2).cuda())

    checked: list[DeviceBlob] = []
    monkeypatch.setattr(DeviceBlob, "check_lanes", lambda blob: checked.append(blob))
    good = copy.deepcopy(state.linear("quantized")).cuda()
    for _ in range(3):
        good(activations("quantized", 2).cuda())
    assert checked == [good.prepare()]


@pytest.mark.gpu
def test_cuda_weight(cuda_state: State) -> None:
    assert cuda_state.linear("quantized").weight.device == torch.device("cuda", 0)


@pytest.mark.gpu
def test_cuda_load_state_dict(state: State, cuda_state: State) -> None:
    for name in CODED:
        layer = cuda_state.linear(name)
        x = activations(name, 4).cuda()
        for device, assign in (("cuda", False), ("meta", True)):
            other = empty_like(layer, device)
            other.load_state_dict(layer.state_dict(), assign=assign)
            assert other(x).equal(layer(x))
        other = empty_like(layer, "cuda")
        other.load_state_dict(state.linear(name).state_dict())  # from the host
        assert other(x).equal(layer(x))


@pytest.mark.gpu
def test_cuda_graph(cuda_state: State) -> None:
    """Captured, replayed with other activations: the results of those."""
    kvpack.warmup(cuda_state)
    for name in CODED:
        layer = cuda_state.linear(name)
        for tokens in (1, 8, 48):
            x = activations(name, tokens, dtype=torch.float16).cuda()
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                layer(x)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = layer(x)
            for seed in (1, 2, 3):
                x.copy_(activations(name, tokens, dtype=torch.float16, seed=seed))
                y.zero_()
                graph.replay()
                # Products of many tokens are cuBLAS's, which may choose otherwise in a capture.
                torch.testing.assert_close(
                    y, layer(x), rtol=0 if tokens <= 32 else 2e-3, atol=0 if tokens <= 32 else 2e-3
                )


@imports_inductor
@captures_inductor
@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_cuda_compile(state: State, mode: str) -> None:
    pytest.importorskip("triton")
    model = Two(state).cuda().half()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, mode=mode)
    for seed in range(4):
        x = activations("quantized", 2, dtype=torch.float16, seed=seed).cuda()
        torch.testing.assert_close(compiled(x).clone(), model(x), rtol=4e-3, atol=4e-3)


@imports_inductor
@captures_inductor
@pytest.mark.gpu
def test_cuda_compiled_products_of_several_panels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Panels share semaphores, which must not lie in the memory of Inductor's graphs."""
    pytest.importorskip("triton")
    generator = torch.Generator().manual_seed(0)
    save_file({"a.weight": torch.randn(64, 8192, generator=generator).half()}, tmp_path / "in.safetensors")
    kvpack.compress(tmp_path / "in.safetensors", tmp_path / "out.safetensors", kvpack.QuantConfig(bits=4.25))
    layer = load(tmp_path / "out.safetensors", "cuda").linear("a")
    panels = set()
    launch = kernels.launch

    def watched(kernel: kernels.Kernel, grid: tuple[int, int], *args: Any, **options: Any) -> None:
        panels.add(grid[1])
        launch(kernel, grid, *args, **options)

    monkeypatch.setattr(kernels, "launch", watched)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: layer(layer(x).repeat(1, 128)), fullgraph=True, mode="reduce-overhead")
    for tokens in (1, 2):
        for _ in range(5):
            x = torch.randn(tokens, 8192, device="cuda", dtype=torch.float16) / 64
            torch.testing.assert_close(compiled(x).clone(), layer(layer(x).repeat(1, 128)), rtol=4e-3, atol=4e-3)
            layer(x)  # on the streams' own semaphores, which the graphs must have left at zero
    assert min(panels) > 1


@pytest.mark.gpu
def test_cuda_memory_is_the_coded_weights(tmp_path: Path) -> None:
    """Neither loading nor products of up to 32 tokens hold anything that grows with the weights but their bytes."""
    generator = torch.Generator().manual_seed(0)
    shape = (4096, 2048)
    tensors = {f"layers.{i}.weight": torch.randn(shape, generator=generator).half() for i in range(4)}
    save_file(tensors, tmp_path / "in.safetensors")
    kvpack.compress(tmp_path / "in.safetensors", tmp_path / "out.safetensors", kvpack.QuantConfig(bits=4.25))
    kvpack.warmup(load(tmp_path / "out.safetensors", "cuda"), dtypes=[torch.float16])  # semaphores and the like
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    state = load(tmp_path / "out.safetensors", "cuda")
    coded_bytes = (tmp_path / "out.safetensors").stat().st_size
    assert coded_bytes < 0.28 * 4 * 2 * shape[0] * shape[1]
    # Tables, group offsets and slack: 2 percent and 128 KiB a tensor; 1 MiB for the allocator's blocks.
    allowance = coded_bytes // 50 + 4 * (128 << 10) + (1 << 20)
    assert torch.cuda.max_memory_allocated() - before <= coded_bytes + allowance
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    layers = [state.linear(f"layers.{i}") for i in range(4)]
    for tokens in (1, 8, 32):
        x = torch.randn(tokens, shape[1], device="cuda", dtype=torch.float16)
        for layer in layers:
            layer(x)
    # x and y, and fp32 partial sums: at most 32 parts of them.
    activations_bytes = 32 * 2 * sum(shape)
    assert torch.cuda.max_memory_allocated() - held <= activations_bytes + 32 * 4 * 32 * shape[0]
    assert torch.cuda.memory_allocated() - held <= activations_bytes + (1 << 20)


def test_other_devices_are_refused(state: State) -> None:
    """A kernel would take the address as its own device's."""
    blob = copy.deepcopy(state.linear("quantized")).prepare()
    x = torch.ones(2, blob.shape[1])
    with pytest.raises(ValueError, match=r"activations are on meta, the weight on cpu"):
        ops._check_product(x.to("meta"), blob.scales, blob.geometry)
    with pytest.raises(ValueError, match=r"bias is on meta, activations are on cpu"):
        ops._bias(torch.ones(3, device="meta"), x, 3)


def test_on_the_cpu_a_blob_is_parsed_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables and tiles that are parsed at each product took longer than the decoding itself."""
    layer = load(path, "cpu").linear(next(iter(LAYERS)))
    x = torch.randn(2, layer.in_features)
    expected = layer(x)

    def again(*_arguments: object) -> None:
        raise AssertionError("parsed again")

    monkeypatch.setattr(ops.ParsedBlob, "__init__", again)
    assert torch.equal(layer(x), expected)
    known = len(ops._parsed)
    del layer
    assert len(ops._parsed) == known - 1, "what was parsed goes with the layer"


def test_on_the_cpu_other_bytes_are_parsed_anew(path: Path) -> None:
    """Another blob where one lay before, as those of streamed layers do: the derived blob decides, not the address."""
    state = load(path, "cpu")
    coded = [state[f"{name}.weight"] for name in CODED]
    room = torch.zeros(max(len(blob.blob) for blob in coded), dtype=torch.uint8)
    for blob in coded:
        buffer = room[: len(blob.blob)]
        buffer.copy_(blob.blob)
        there = DeviceBlob.from_buffer(buffer, blob.scales, blob.dtype, blob.shape)
        assert torch.equal(there.dequantize(), blob.dequantize())


def test_halves_of_fp32() -> None:
    """Their sum is the number itself; each has no more bits than fp16 holds, the second after it is rounded."""
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 1 << 32, 4096, dtype=np.uint32)
    numbers = bits.view(np.float32)
    numbers = numbers[np.isfinite(numbers) & (np.abs(numbers) > 1e-30)]
    x = torch.from_numpy(np.append(numbers, [0.0, -0.0, np.inf, -np.inf]).astype(np.float32))[None]
    upper, lower = products.halves_of(x)
    assert torch.equal(upper + lower, x[0])
    mantissas, _ = np.frexp(upper[:-2].numpy())
    assert np.array_equal(mantissas, mantissas.astype(np.float16))
    assert (lower[:-2].abs() <= x[0, :-2].abs() * 2.0**-10).all()
    assert not lower[-2:].any()
