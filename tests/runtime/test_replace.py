"""replace_linears on models of torch and transformers, against the same models with dequantized weights."""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import load_file, save_file  # noqa: E402
from small_models import merge_files  # noqa: E402
from torch import nn  # noqa: E402

import kvpack  # noqa: E402
from kvpack.errors import ContainerMetadataError, InputError, ModelMismatchError  # noqa: E402
from kvpack.runtime.weights.device_blob import DeviceBlob  # noqa: E402
from kvpack.runtime.weights.embedding import RansEmbedding  # noqa: E402
from kvpack.runtime.weights.linear import RansLinear  # noqa: E402
from kvpack.runtime.weights.load import load  # noqa: E402
from kvpack.runtime.weights.replace import Replacement, replace_linears  # noqa: E402


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Any) -> Any:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Model(nn.Module):
    """Embedding and output tied, a buffer in the file and one that is not."""

    def __init__(self, tied: bool = True, width: int = 128) -> None:
        super().__init__()
        self.embed = nn.Embedding(200, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(3))
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, 200, bias=False)
        self.register_buffer("mask", torch.ones(width), persistent=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Any) -> Any:
        x = self.embed(ids) * self.mask
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


IDS = torch.arange(0, 180, 9)


def make(tied: bool = True, seed: int = 0) -> Model:
    torch.manual_seed(seed)
    model = Model(tied).eval()
    for buffer in (model.norm.running_mean, model.norm.running_var):
        buffer.uniform_(0.5, 1.5)
    return model


def compressed(model: nn.Module, folder: Path, **options: Any) -> Path:
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if options.pop("without_head", False):
        del tensors["head.weight"]
    save_file(tensors, folder / "in.safetensors")
    config = kvpack.QuantConfig(bits=4.25, **options)
    kvpack.compress(folder / "in.safetensors", folder / "out.safetensors", config, force=True)
    return folder / "out.safetensors"


def with_dequantized(model: nn.Module, path: Path) -> nn.Module:
    """The model with the file's weights as plain numbers."""
    target = path.with_name("plain.safetensors")
    kvpack.decompress(path, target, force=True)
    plain = copy.deepcopy(model)
    missing, unexpected = plain.load_state_dict(load_file(target), strict=False)
    assert not unexpected
    assert set(missing) <= {"head.weight"}
    return plain


def output(model: nn.Module) -> Any:
    with torch.no_grad():
        return model(IDS.to(next(model.parameters()).device)).cpu()


def kinds(model: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules()}


BLOCK_LINEARS = [f"blocks.{i}.{name}" for i in range(3) for name in ("up", "down")]


def test_model_with_tied_weights(tmp_path: Path) -> None:
    path = compressed(make(), tmp_path, without_head=True)
    expected = output(with_dequantized(make(), path))
    model = make(seed=1)
    report = replace_linears(model, path)
    assert isinstance(report, Replacement)
    torch.testing.assert_close(output(model), expected)
    assert sorted(report.replaced) == sorted(BLOCK_LINEARS)
    assert report.replaced["blocks.1.up"] == "blocks.1.up.weight"
    assert report.tied == {"head.weight": "embed.weight"}
    assert model.head.weight is model.embed.weight
    assert report.missing == report.unexpected == []
    assert report.dequantized == {}
    assert "embed.weight" in report.loaded
    assert "norm.num_batches_tracked" in report.loaded
    assert len(report.loaded) == 1 + 3 * 3 + 5
    for name, kind in kinds(model).items():
        assert (kind is RansLinear) == (name in BLOCK_LINEARS)
        assert kind is not nn.Linear or name == "head"
    assert not model.blocks[0].up.training
    assert "6 linear layers coded" in str(report)


def test_bytes_of_the_report(tmp_path: Path) -> None:
    path = compressed(make(), tmp_path, without_head=True)
    model = make()
    dense = sum(p.nbytes for p in model.parameters()) + sum(b.nbytes for b in model.buffers())
    report = replace_linears(model, path)
    assert report.bytes_before == dense
    rest = dense - sum(4 * 2 * 128 * 128 for _ in BLOCK_LINEARS)
    coded = sum(model.get_submodule(name).prepare().nbytes for name in BLOCK_LINEARS)
    assert report.bytes_after == rest + coded
    with torch.device("meta"):
        lazy = Model().eval()
    lazy.mask = torch.ones(128)
    again = replace_linears(lazy, path, device="cpu")
    assert (again.bytes_before, again.bytes_after) == (report.bytes_before, report.bytes_after)


def test_untied_head(tmp_path: Path) -> None:
    path = compressed(make(tied=False), tmp_path, include="head|embed")
    expected = output(with_dequantized(make(tied=False), path))
    model = make(tied=False, seed=1)
    report = replace_linears(model, path)
    torch.testing.assert_close(output(model), expected)
    assert isinstance(model.head, RansLinear)
    assert isinstance(model.embed, RansEmbedding)
    assert report.dequantized == {}
    assert report.replaced["embed"] == "embed.weight"
    assert report.tied == {}


@pytest.mark.parametrize("names", ["embed", "head"])
def test_tied_and_coded(tmp_path: Path, names: str) -> None:
    """One coded tensor for both: the embedding looks up in it, and the head multiplies with it."""
    stored = {name: t.clone() for name, t in make().state_dict().items()}
    stored[f"{names}.weight"] = stored["embed.weight"]
    stored.pop("head.weight" if names == "embed" else "embed.weight")
    save_file(stored, tmp_path / "in.safetensors")
    kvpack.compress(
        tmp_path / "in.safetensors", tmp_path / "out.safetensors", kvpack.QuantConfig(bits=4.25, include="head|embed")
    )
    model = make(seed=1)
    report = replace_linears(model, tmp_path / "out.safetensors")
    assert model.head.prepare() is model.embed.prepare()
    with kvpack.open(tmp_path / "out.safetensors") as reader:
        assert reader.info(f"{names}.weight") is not None
        values = torch.from_numpy(reader.dequantize(f"{names}.weight"))
    assert model.embed(torch.arange(len(values))).equal(values)
    assert model.head.dequantize().equal(values)
    assert report.dequantized == {}
    assert {report.replaced["embed"], report.replaced["head"]} == {f"{names}.weight"}
    assert len(report.tied) == 1
    # One of them left out leaves both out: they are tied.
    plain = make(seed=1)
    report = replace_linears(plain, tmp_path / "out.safetensors", exclude=names)
    assert plain.head.weight is plain.embed.weight
    assert plain.embed.weight.equal(values)
    assert report.dequantized == {f"{names}.weight": "excluded"}


def test_tied_in_any_order(tmp_path: Path) -> None:
    """The embedding decides, also where the linear layer comes first."""

    class Reversed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.embed = nn.Linear(128, 200, bias=False), nn.Embedding(200, 128)
            self.embed.weight = self.head.weight

    torch.manual_seed(0)
    save_file({"head.weight": torch.randn(200, 128)}, tmp_path / "in.safetensors")
    kvpack.compress(tmp_path / "in.safetensors", tmp_path / "out.safetensors", kvpack.QuantConfig(bits=4.25))
    model = Reversed()
    report = replace_linears(model, tmp_path / "out.safetensors")
    assert model.head.weight is model.embed.weight
    assert report.replaced == {}
    assert report.tied == {"embed.weight": "head.weight"}


def test_tied_model_untied_file(tmp_path: Path) -> None:
    """The file has both. A head of its own that is coded is used; otherwise the embedding counts, as tied."""
    coded = compressed(make(tied=False), tmp_path, include="head")
    model = make(tied=True, seed=1)
    replace_linears(model, coded)
    assert isinstance(model.head, RansLinear)
    torch.testing.assert_close(output(model), output(with_dequantized(make(tied=False), coded)))
    plain = compressed(make(tied=False), tmp_path, exclude="head")
    model = make(tied=True, seed=1)
    report = replace_linears(model, plain)
    assert model.head.weight is model.embed.weight
    assert model.embed.weight.equal(make(tied=False).embed.weight)
    assert report.tied == {"head.weight": "embed.weight"}


def test_linears_that_share_their_weight(tmp_path: Path) -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(128, 128), nn.Linear(128, 128), nn.Linear(128, 128)
            self.b.weight = self.a.weight
            self.same = self.c

    torch.manual_seed(0)
    model = Shared()
    stored = {n: t.clone() for n, t in model.state_dict().items() if n != "b.weight" and not n.startswith("same")}
    save_file(stored, tmp_path / "in.safetensors")
    kvpack.compress(tmp_path / "in.safetensors", tmp_path / "out.safetensors", kvpack.QuantConfig(bits=5))
    report = replace_linears(model, tmp_path / "out.safetensors")
    assert set(report.replaced) == {"a", "b", "c", "same"}
    assert model.same is model.c
    assert model.a is not model.b
    assert model.a.weight_kvpack.data_ptr() == model.b.weight_kvpack.data_ptr()
    assert model.a.bias.equal(stored["a.bias"])
    assert model.b.bias.equal(stored["b.bias"])
    assert report.bytes_after == sum(m.prepare().nbytes for m in (model.a, model.c)) + 3 * 4 * 128


@pytest.mark.parametrize(("include", "exclude", "expected"), [
    ("up", None, BLOCK_LINEARS[::2]),
    (None, "up", BLOCK_LINEARS[1::2]),
    (r"blocks\.[01]\.", "down", ["blocks.0.up", "blocks.1.up"]),
])  # fmt: skip
def test_patterns(tmp_path: Path, include: str | None, exclude: str | None, expected: list[str]) -> None:
    path = compressed(make(), tmp_path, without_head=True)
    model = make(seed=1)
    report = replace_linears(model, path, include=include, exclude=exclude)
    assert sorted(report.replaced) == sorted(expected)
    assert len(report.dequantized) == 6 - len(expected)
    assert set(report.dequantized.values()) <= {"not included", "excluded"}
    torch.testing.assert_close(output(model), output(with_dequantized(make(), path)))
    with pytest.raises(ValueError, match="include 'nothing' matches no coded tensor"):
        replace_linears(make(), path, include="nothing")


def test_own_kinds_of_linear_stay(tmp_path: Path) -> None:
    """A subclass may do anything with its weight: it keeps numbers."""

    class Doubling(nn.Linear):
        def forward(self, x: Any) -> Any:
            return 2 * super().forward(x)

    model = make(seed=1)
    model.blocks[0].up = Doubling(128, 256)
    report = replace_linears(model, compressed(make(), tmp_path, without_head=True))
    assert type(model.blocks[0].up) is Doubling
    assert report.dequantized == {"blocks.0.up.weight": "Doubling needs plain numbers"}


def test_other_types_and_devices(tmp_path: Path) -> None:
    """Plain tensors take the model's types, coded ones give the activations'."""
    path = compressed(make(), tmp_path, without_head=True)
    model = make(seed=1).to(torch.bfloat16)
    replace_linears(model, path, device="cpu")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.blocks[0].up.bias.dtype == torch.bfloat16
    assert model.blocks[0].up.weight_kvpack_scale.dtype == torch.float32
    assert model.norm.num_batches_tracked.dtype == torch.int64
    result = output(model)
    assert result.dtype == torch.bfloat16
    expected = output(with_dequantized(make(), path))
    assert float((result.float() - expected).norm() / expected.norm()) < 0.02


def test_meta_model(tmp_path: Path) -> None:
    path = compressed(make(), tmp_path, without_head=True)
    with torch.device("meta"):
        model = Model().eval()
    with pytest.raises(ModelMismatchError, match="no file holds, and that the model does not compute: mask"):
        replace_linears(model, path, device="cpu")
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert nn.Linear in kinds(model).values()
    model.mask = torch.ones(128)
    replace_linears(model, path, device="cpu")
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert model.head.weight is model.embed.weight
    torch.testing.assert_close(output(model), output(with_dequantized(make(), path)))


def test_defer(tmp_path: Path) -> None:
    path = compressed(make(), tmp_path, without_head=True)
    model = make(seed=1)
    report = replace_linears(model, path, defer=[model.blocks[1], model.blocks[2].up])
    assert len(report.replaced) == 6
    deferred = {name for name in BLOCK_LINEARS if model.get_submodule(name).weight_kvpack.is_meta}
    assert deferred == {"blocks.1.up", "blocks.1.down", "blocks.2.up"}
    state = load(path, "cpu")
    for name in deferred:
        layer, other = model.get_submodule(name), state.linear(name)
        assert layer.tensor_name == f"{name}.weight"
        assert layer.weight_kvpack.shape == other.weight_kvpack.shape
        assert layer.weight_kvpack_scale.shape == other.weight_kvpack_scale.shape
        assert (layer.in_features, layer.out_features) == (other.in_features, other.out_features)
        if other.bias is not None:
            assert layer.bias.equal(other.bias)
        layer.load_state_dict(other.state_dict(), assign=True)
    torch.testing.assert_close(output(model), output(with_dequantized(make(), path)))


def test_mismatches_change_nothing(tmp_path: Path) -> None:
    path = compressed(make(), tmp_path, without_head=True)

    def refuse(model: nn.Module, match: str) -> None:
        before, types = {k: v.clone() for k, v in model.state_dict().items()}, kinds(model)
        with pytest.raises(ModelMismatchError, match=match):
            replace_linears(model, path)
        assert kinds(model) == types
        for name, tensor in model.state_dict().items():
            assert tensor.equal(before[name])

    model = make()
    model.more = nn.Linear(3, 4)
    refuse(model, r"2 of the model are not in the file: more\.weight, more\.bias; what has no weights")
    model = make()
    del model.blocks[2]
    refuse(model, r"5 of the file are not in the model: blocks\.2\.down\.weight, ")
    model = make()
    model.blocks[0].up = nn.Linear(128, 250)
    refuse(model, r"2 of another shape: blocks\.0\.up\.weight is \[256, 128\] in the file, \[250, 128\] in the model")
    refuse(
        nn.ModuleDict({"model": make()}), r"21 of the model are not in the file.*21 of the file are not in the model"
    )
    model = make()
    model.embed.weight = model.head.weight = nn.Parameter(torch.zeros(250, 128))
    refuse(
        model, r"not the model's; 1 of another shape: embed\.weight is \[200, 128\] in the file, \[250, 128\] in the"
    )
    model = make()
    replace_linears(model, path)
    refuse(model, r"6 layers of the model are coded already \(blocks\.0\.up, .* and 1 more\).*make the model anew")
    single = nn.Linear(128, 128)
    save_file(single.state_dict(), tmp_path / "in.safetensors")
    kvpack.compress(tmp_path / "in.safetensors", tmp_path / "one.safetensors", kvpack.QuantConfig(bits=5))
    with pytest.raises(ModelMismatchError, match="the model itself is the linear layer"):
        replace_linears(single, tmp_path / "one.safetensors")


def test_a_component_of_a_directory(tmp_path: Path) -> None:
    """Subfolders and other sets of weights are other models: neither needed nor in the way, and named."""
    source, parts = tmp_path / "pipe", {"": make(seed=1), "unet": make(seed=2)}
    for folder, model in parts.items():
        (source / folder).mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        save_file(tensors, source / folder / "model.safetensors")
    save_file({"other.name": torch.ones(3)}, source / "consolidated.safetensors")
    packed = Path(str(kvpack.compress(source, preset="lossless").output))
    for folder, model in parts.items():
        found = make(seed=9)
        report = replace_linears(found, packed / folder)
        assert output(found).equal(output(model))
        assert report.other_weights == ([] if folder else ["unet", "consolidated.safetensors"])
        assert ("left alone: unet, consolidated.safetensors" in str(report)) == (not folder)
    (packed / "model.safetensors").unlink()
    (packed / "consolidated.safetensors").unlink()
    with pytest.raises(InputError, match=r"no \.safetensors file of its own.*: unet\. Give one of these"):
        replace_linears(make(), packed)


def test_not_strict(tmp_path: Path) -> None:
    path = compressed(make(), tmp_path, without_head=True)
    model = make(seed=1)
    del model.blocks[2]
    model.more = nn.Linear(3, 4)
    more = model.more.weight
    report = replace_linears(model, path, strict=False)
    assert report.missing == ["more.weight", "more.bias"]
    assert len(report.unexpected) == 5
    assert model.more.weight is more
    assert len(report.replaced) == 4
    assert "2 missing, 5 unexpected" in str(report)
    model = make()
    model.blocks[0].up = nn.Linear(128, 250)
    with pytest.raises(ModelMismatchError, match="another shape"):
        replace_linears(model, path, strict=False)


def test_dense_weights_are_let_go(tmp_path: Path) -> None:
    """Before the coded ones are loaded, not only after."""
    path = compressed(make(), tmp_path, without_head=True)
    model = make()
    dense = [weakref.ref(model.get_submodule(name).weight) for name in BLOCK_LINEARS]
    alive: list[int] = []
    gc.collect()
    replace_linears(model, path, progress=lambda _done, _total: alive.append(sum(r() is not None for r in dense)))
    assert alive[0] == 0


def test_orientation_that_does_not_fit(tmp_path: Path) -> None:
    """A blob of inputs × outputs in a plain Linear: decoded, not multiplied the wrong way round."""

    class Conv1D(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.empty(96, 288)), nn.Parameter(torch.empty(288))

        def forward(self, x: Any) -> Any:
            return x @ self.weight + self.bias

    torch.manual_seed(0)
    tensors = {"h.0.attn.c_attn.weight": torch.randn(96, 288), "h.0.attn.c_attn.bias": torch.randn(288)}
    plain = {"x.weight": torch.randn(128, 128), "x.bias": torch.randn(128)}
    for name, stored in (("gpt", tensors), ("plain", plain)):
        save_file(stored, tmp_path / f"{name}.safetensors")
        kvpack.compress(tmp_path / f"{name}.safetensors", tmp_path / f"{name}.k", kvpack.QuantConfig(bits=5))
    path = merge_files(tmp_path / "out.safetensors", tmp_path / "gpt.k", tmp_path / "plain.k")
    state = load(path, "cpu")

    def nested(leaf: nn.Module, x: nn.Module) -> nn.Module:
        return nn.ModuleDict({"h": nn.ModuleList([nn.ModuleDict({"attn": nn.ModuleDict({"c_attn": leaf})})]), "x": x})

    model = nested(Conv1D(), nn.Linear(128, 128))
    report = replace_linears(model, path)
    assert set(report.replaced) == {"h.0.attn.c_attn", "x"}
    layer = model.get_submodule("h.0.attn.c_attn")
    x = torch.randn(3, 96)
    expected = x @ state["h.0.attn.c_attn.weight"].dequantize() + tensors["h.0.attn.c_attn.bias"]
    torch.testing.assert_close(layer(x), expected)

    wrong = nn.Linear(288, 96)
    wrong.bias = nn.Parameter(torch.empty(288))
    model = nested(wrong, nn.Linear(128, 128))
    report = replace_linears(model, path)
    assert set(report.replaced) == {"x"}
    assert report.dequantized == {"h.0.attn.c_attn.weight": "stored as inputs × outputs, Linear is the other way round"}
    assert model.get_submodule("h.0.attn.c_attn").weight.equal(state["h.0.attn.c_attn.weight"].dequantize())


# transformers ---------------------------------------------------------------------------------------------------------


def llama(tied: bool, device: str | None = None) -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=352, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device or "cpu"):
        return transformers.LlamaForCausalLM(config).eval()


def gpt2(device: str | None = None) -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=256, n_embd=96, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0
    )
    torch.manual_seed(0)
    with torch.device(device or "cpu"):
        return transformers.GPT2LMHeadModel(config).eval()


def saved(model: Any, folder: Path) -> Path:
    """Compressed as a directory; the dequantized one beside it."""
    model.save_pretrained(folder / "model")
    kvpack.compress(folder / "model", folder / "coded", kvpack.QuantConfig(bits=4.25))
    kvpack.decompress(folder / "coded", folder / "plain")
    return folder / "coded"


def logits(model: Any, device: str = "cpu") -> Any:
    ids = torch.arange(40, device=device).reshape(2, 20) * 5 % 251
    with torch.no_grad():
        return model(ids).logits.cpu()


def test_t5_decodes_no_weight_to_learn_its_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its forward pass asks ``wo.weight.dtype`` twice a layer."""
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(vocab_size=256, d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4)
    torch.manual_seed(0)
    original = transformers.T5EncoderModel(config).eval()
    ids = torch.arange(40).reshape(2, 20) * 5 % 251
    path = saved(original, tmp_path)
    model = copy.deepcopy(original)
    report = replace_linears(model, path)
    assert "encoder.block.1.layer.1.DenseReluDense.wo" in report.replaced
    monkeypatch.setattr(DeviceBlob, "dequantize", lambda *_: pytest.fail("decoded"))
    with torch.no_grad():
        expected = type(original).from_pretrained(tmp_path / "plain").eval()(ids).last_hidden_state
        torch.testing.assert_close(model(ids).last_hidden_state, expected)


@pytest.mark.parametrize("meta", [False, True])
@pytest.mark.parametrize("kind", ["llama", "tied", "gpt2"])
def test_transformers(tmp_path: Path, kind: str, meta: bool) -> None:
    original = gpt2() if kind == "gpt2" else llama(kind == "tied")
    path = saved(original, tmp_path)
    expected = logits(type(original).from_pretrained(tmp_path / "plain").eval())
    device = "meta" if meta else None
    model = gpt2(device) if kind == "gpt2" else llama(kind == "tied", device)
    report = replace_linears(model, path, device="cpu")
    torch.testing.assert_close(logits(model), expected)
    assert float((logits(model) - logits(original)).abs().max()) > 1e-3  # quantization can be seen
    assert len(report.replaced) == (8 if kind == "gpt2" else 14)
    linears = nn.Linear if kind != "gpt2" else type(original.transformer.h[0].attn.c_attn)
    left = [name for name, module in model.named_modules() if type(module) is linears]
    assert left == ([] if kind == "gpt2" else ["lm_head"])
    if kind != "llama":
        assert model.lm_head.weight is model.get_input_embeddings().weight
    generated = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert generated.shape[1] <= 8


@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_state_comes_back(tmp_path: Path, tied: bool) -> None:
    """As docs/RUNTIME.md shows it: a state dict, and a directory of save_pretrained, which is no compressed one."""
    path = saved(llama(tied), tmp_path)

    def fresh() -> Any:
        model = llama(tied, "meta")
        replace_linears(model, path, device="cpu")
        return model

    changed = fresh()
    changed.model.norm.weight.data *= 2
    expected = logits(changed)
    assert not logits(fresh()).equal(expected)

    torch.save(changed.state_dict(), tmp_path / "state.pt")
    model = fresh()
    model.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert logits(model).equal(expected)

    changed.save_pretrained(tmp_path / "saved")
    with pytest.raises(ContainerMetadataError, match=r"after replace_linears.*and then this with load_state_dict"):
        kvpack.open(tmp_path / "saved")
    with pytest.raises(ContainerMetadataError, match="load_state_dict"):
        replace_linears(llama(tied, "meta"), tmp_path / "saved", device="cpu")
    model = fresh()
    missing, unexpected = model.load_state_dict(load_file(tmp_path / "saved" / "model.safetensors"), strict=False)
    assert (missing, unexpected) == (["lm_head.weight"] if tied else [], [])
    assert logits(model).equal(expected)


@pytest.mark.gpu
@pytest.mark.parametrize("meta", [False, True])
def test_cuda_transformers(tmp_path: Path, meta: bool) -> None:
    original = llama(True)
    path = saved(original, tmp_path)
    expected = logits(type(original).from_pretrained(tmp_path / "plain").eval())
    model = llama(True, "meta" if meta else None)
    replace_linears(model, path, device="cuda")
    assert all(tensor.is_cuda for tensor in (*model.parameters(), *model.buffers()))
    torch.testing.assert_close(logits(model, "cuda"), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
def test_cuda_model_stays_where_it_is(tmp_path: Path) -> None:
    path = compressed(make(), tmp_path, without_head=True)
    model = make(seed=1).cuda()
    replace_linears(model, path)
    assert all(tensor.is_cuda for tensor in (*model.parameters(), *model.buffers()))
    torch.testing.assert_close(output(model), output(with_dequantized(make(), path)), rtol=1e-2, atol=1e-2)
