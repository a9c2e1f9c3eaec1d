"""Models whose embeddings and output layers are coded: loaded, run, saved, decoded again, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import sample_blobs as samples  # noqa: E402
from models import ARCHITECTURES, VOCABULARY  # noqa: E402

import kvpack  # noqa: E402
from kvpack.errors import InputError  # noqa: E402
from kvpack.format.layout import ElementKind, integer_layout  # noqa: E402
from kvpack.integrations.transformers.causal_models import weight_memory  # noqa: E402
from kvpack.runtime.weights.device_blob import DeviceBlob  # noqa: E402
from kvpack.runtime.weights.embedding import PlainEmbedding, RansEmbedding  # noqa: E402
from kvpack.runtime.weights.linear import RansLinear  # noqa: E402

# Model -> linear layers that are coded beside the output layer.
CODED = {"llama tied": 14, "llama": 14, "gpt2": 8, "mixtral": 32}
TIED = {"llama tied", "gpt2"}


class Directories:
    """A tiny model as it was, compressed, and decompressed again."""

    def __init__(self, folder: Path, name: str, **options: Any) -> None:
        self.name = name
        self.plain, self.coded, self.dense = folder / "plain", folder / "coded", folder / "dense"
        ARCHITECTURES[name].save(self.plain)
        self.report = kvpack.compress(self.plain, self.coded, **({"bits": 6.0, "embeddings": "code"} | options))
        kvpack.decompress(self.coded, self.dense)

    def load(self, path: Path | None = None, **options: Any) -> Any:
        class_ = ARCHITECTURES[self.name].class_
        return class_.from_pretrained(path or self.coded, **({"experts_implementation": "eager"} | options))

    def logits(self, model: Any, **options: Any) -> Any:
        with torch.no_grad():
            return model(**ARCHITECTURES[self.name].example(**options)).logits


def bytes_of(state: dict[str, Any]) -> dict[str, bytes]:
    return {name: tensor.contiguous().view(torch.uint8).numpy().tobytes() for name, tensor in state.items()}


@pytest.mark.parametrize("name", CODED)
def test_load_save_and_decode(tmp_path: Path, name: str) -> None:
    """The embedding and the output layer stay coded, tied ones in one blob; the logits are the decoded model's."""
    model_of = Directories(tmp_path, name)
    model, info = model_of.load(output_loading_info=True)
    assert {key: list(found) for key, found in info.items() if found} == {}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert type(embedding) is RansEmbedding
    assert type(head) is RansLinear
    assert (embedding.prepare() is head.prepare()) == (name in TIED)
    assert len([m for m in model.modules() if isinstance(m, RansLinear)]) == CODED[name] + 1
    dense = model_of.load(model_of.dense)
    assert (dense.get_output_embeddings().weight is dense.get_input_embeddings().weight) == (name in TIED)
    expected = model_of.logits(dense)
    torch.testing.assert_close(model_of.logits(model), expected, rtol=1e-5, atol=1e-5)
    ids = ARCHITECTURES[name].example()["input_ids"]
    assert torch.equal(embedding(ids), dense.get_input_embeddings()(ids))
    assert embedding(ids).dtype == torch.float32
    # Bytes in memory: a tied blob once, though two layers have it.
    weights = sum(parameter.numel() for parameter in dense.parameters())
    assert weight_memory(model).weights == weights

    model.save_pretrained(tmp_path / "saved")
    assert kvpack.verify(tmp_path / "saved", model_of.plain).mismatches == {}
    stored = (tmp_path / "saved" / "model.safetensors").stat().st_size
    assert stored < 1.1 * (model_of.coded / "model.safetensors").stat().st_size
    again = model_of.load(tmp_path / "saved")
    assert bytes_of(again.state_dict()) == bytes_of(model.state_dict())
    assert (again.get_input_embeddings().prepare() is again.get_output_embeddings().prepare()) == (name in TIED)
    assert torch.equal(model_of.logits(again), model_of.logits(model))

    plain = again.dequantize()
    assert type(plain.get_input_embeddings()) is torch.nn.Embedding
    assert (plain.get_output_embeddings().weight is plain.get_input_embeddings().weight) == (name in TIED)
    assert torch.equal(model_of.logits(plain), expected)
    config = transformers.AutoConfig.from_pretrained(model_of.coded)
    config.quantization_config["dequantize"] = True
    loaded_plain = model_of.load(config=config)
    assert type(loaded_plain.get_input_embeddings()) is torch.nn.Embedding
    assert torch.equal(model_of.logits(loaded_plain), expected)


@pytest.mark.parametrize("name", ["llama tied", "llama"])
def test_generate(tmp_path: Path, name: str) -> None:
    model_of = Directories(tmp_path, name)
    model, dense = model_of.load(), model_of.load(model_of.dense)
    example = ARCHITECTURES[name].example()
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(example["input_ids"])}
    assert torch.equal(model.generate(**example, **options), dense.generate(**example, **options))
    embeds = dense.get_input_embeddings()(example["input_ids"])
    with torch.no_grad():
        assert torch.equal(model(inputs_embeds=embeds).logits, model(**example).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    """What is looked up has the model's dtype, also after a conversion."""
    model_of = Directories(tmp_path, "llama tied")
    model, dense = model_of.load(dtype=dtype), model_of.load(model_of.dense, dtype=dtype)
    ids = torch.arange(VOCABULARY)
    assert torch.equal(model.get_input_embeddings()(ids), dense.get_input_embeddings()(ids))
    assert model.get_input_embeddings().weight.dtype == dtype
    converted = model_of.load().to(dtype)
    assert converted.get_input_embeddings()(ids).dtype == dtype


def test_device_maps(tmp_path: Path) -> None:
    model_of = Directories(tmp_path, "llama tied")
    expected = model_of.logits(model_of.load())
    maps: list[Any] = ["cpu", {"": "cpu"}, {"": "disk"}]
    for number, device_map in enumerate(maps):
        folder = tmp_path / str(number)
        model = model_of.load(device_map=device_map, offload_folder=folder, offload_buffers=True)
        assert type(model.get_input_embeddings()) is RansEmbedding
        assert torch.equal(model_of.logits(model), expected)


def test_one_of_the_tied_is_not_to_be_converted(tmp_path: Path) -> None:
    """Both are plain numbers then, and one; nothing is missing."""
    model_of = Directories(tmp_path, "llama tied")
    config = transformers.AutoConfig.from_pretrained(model_of.coded)
    config.quantization_config["modules_to_not_convert"] = ["lm_head"]
    model, info = model_of.load(config=config, output_loading_info=True)
    assert not any(info.values())
    assert type(model.get_input_embeddings()) is torch.nn.Embedding
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert torch.equal(model_of.logits(model), model_of.logits(model_of.load(model_of.dense)))


def test_resizing_is_refused(tmp_path: Path) -> None:
    model = Directories(tmp_path, "llama tied").load()
    with pytest.raises(InputError, match=r"resize_token_embeddings.*dequantize"):
        model.resize_token_embeddings(VOCABULARY + 8)
    assert model.resize_token_embeddings(VOCABULARY) is model.get_input_embeddings()
    model.tie_weights()
    assert type(model.get_output_embeddings()) is RansLinear


def test_replace_linears(tmp_path: Path) -> None:
    model_of = Directories(tmp_path, "llama tied")
    model = ARCHITECTURES["llama tied"].model(seed=1)
    before = sum(parameter.nbytes for parameter in model.parameters())
    replacement = kvpack.replace_linears(model, model_of.coded)
    assert replacement.dequantized == {}
    assert replacement.replaced["model.embed_tokens"] == "model.embed_tokens.weight"
    assert replacement.replaced["lm_head"] == "model.embed_tokens.weight"
    assert model.get_input_embeddings().prepare() is model.get_output_embeddings().prepare()
    assert replacement.bytes_before == pytest.approx(before, rel=0.02)
    assert torch.equal(model_of.logits(model), model_of.logits(model_of.load()))


def test_state_dict_round_trip(tmp_path: Path) -> None:
    model_of = Directories(tmp_path, "llama")
    model, other = model_of.load(), model_of.load()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    other.load_state_dict(state)
    assert torch.equal(model_of.logits(other), model_of.logits(model))


def test_ids_that_name_no_row(tmp_path: Path) -> None:
    embedding = Directories(tmp_path, "llama tied").load().get_input_embeddings()
    for wrong in (-1, VOCABULARY):
        with pytest.raises(InputError, match=rf"is {wrong}: there are rows 0 to {VOCABULARY - 1}"):
            embedding(torch.tensor([0, wrong]))
    with pytest.raises(InputError, match="i64 or i32"):
        embedding(torch.tensor([0.0]))
    assert embedding(torch.empty((2, 0), dtype=torch.int32)).shape == (2, 0, 64)


def test_exact_embeddings_are_decoded(tmp_path: Path) -> None:
    """As before: their bits have no scales, and an output layer would be expanded at each step."""
    model_of = Directories(tmp_path, "llama tied", bits=None, preset="lossless", embeddings="keep")
    model = model_of.load()
    assert type(model.get_input_embeddings()) is torch.nn.Embedding
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_report_of_rates(tmp_path: Path) -> None:
    """`code` is the rate of the rest, a number another; positions are kept."""
    counts = np.arange(VOCABULARY)
    for embeddings, most in (("code", 5.0), (6.0, 6.0)):
        folder = tmp_path / str(embeddings)
        folder.mkdir()
        model_of = Directories(folder, "gpt2", bits=5.0, embeddings=embeddings, token_counts=counts)
        table = next(t for t in model_of.report.tensors if t.name == "transformer.wte.weight")
        assert table.method == "uniform"
        assert most - 1 < table.bits_per_weight <= most + 0.5
        positions = next(t for t in model_of.report.tensors if t.name == "transformer.wpe.weight")
        assert (positions.method, positions.reason) == ("keep", "embedding")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_scaled_embeddings(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    """Classes that multiply what they look up: so does the coded one, and it is of that class again when decoded."""
    model_of = Directories(tmp_path, name)
    model, dense = model_of.load(dtype=dtype), model_of.load(model_of.dense, dtype=dtype)
    embedding, plain = model.get_input_embeddings(), dense.get_input_embeddings()
    ids = torch.arange(VOCABULARY)
    assert type(embedding) is RansEmbedding
    assert torch.equal(embedding(ids), plain(ids))
    back = model.dequantize(dtype).get_input_embeddings()
    assert type(back) is type(plain)
    assert torch.equal(back(ids), plain(ids))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_as_scales(dtype: torch.dtype) -> None:
    """BART's class has a plain number, which is not rounded to the rows' type; others of the name are left alone."""
    bart = transformers.models.bart.modeling_bart.BartScaledWordEmbedding(300, 64, 1, embed_scale=0.3)
    data, scales = samples.quantized_blob(300, 64, integer_layout("balanced", ElementKind.SIGNED, 5), 64)
    blob = DeviceBlob.from_bytes(data, scales, torch.float32, (300, 64), "cpu")
    described = PlainEmbedding.of(bart)
    assert described == PlainEmbedding(type(bart), 1, 0.3)
    embedding = RansEmbedding(blob, dtype, described)
    bart.weight.data = blob.dequantize(dtype)
    ids = torch.arange(300)
    assert torch.equal(embedding(ids), bart(ids))
    assert torch.equal(described.module(bart.weight)(ids), bart(ids))
    bart.embed_scale = torch.nn.Parameter(torch.ones(1))
    assert PlainEmbedding.of(bart) is None
    assert PlainEmbedding.of(torch.nn.Embedding(10, 4, max_norm=1.0)) is None
    assert PlainEmbedding.of(torch.nn.Linear(4, 4)) is None


def test_embeddings_of_three_modules(tmp_path: Path) -> None:
    """T5's encoder, decoder and the model itself have one embedding, and its output layer is tied to it."""
    model_of = Directories(tmp_path, "t5")
    model = model_of.load()
    blobs = {
        id(m.prepare()) for m in model.modules() if isinstance(m, RansEmbedding) and m.num_embeddings == VOCABULARY
    }
    assert len(blobs) == 1
    expected = model_of.logits(model_of.load(model_of.dense))
    torch.testing.assert_close(model_of.logits(model), expected, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path / "saved")
    assert kvpack.verify(tmp_path / "saved", model_of.plain).mismatches == {}
    assert torch.equal(model_of.logits(model_of.load(tmp_path / "saved")), model_of.logits(model))


def test_decoded_embeddings_are_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules that may do something else with what they look up have plain numbers, and a warning says so."""
    model_of = Directories(tmp_path, "gemma3")
    monkeypatch.setattr(PlainEmbedding, "of", staticmethod(lambda _module: None))
    with pytest.warns(UserWarning, match=r"embed_tokens.weight is coded, and decoded.*ScaledWordEmbedding needs plain"):
        model = model_of.load()
    assert isinstance(model.get_input_embeddings(), torch.nn.Embedding)
    assert torch.equal(model_of.logits(model), model_of.logits(model_of.load(model_of.dense)))


def test_quantization_while_loading(tmp_path: Path) -> None:
    """The options are those of `compress`, and so are the bytes."""
    model_of = Directories(tmp_path, "llama tied")
    config = kvpack.KVPackConfig(bits=6.0, embeddings="code")
    model = model_of.load(model_of.plain, quantization_config=config)
    assert type(model.get_input_embeddings()) is RansEmbedding
    assert bytes_of(model.state_dict()) == bytes_of(model_of.load().state_dict())


def test_warmup_looks_a_row_up(tmp_path: Path) -> None:
    assert kvpack.warmup(Directories(tmp_path, "llama tied").load().get_input_embeddings()) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama tied", "gpt2", "gemma3"])
def test_on_the_device(tmp_path: Path, name: str) -> None:
    """Coded there, the same file; rows are the decoded model's, to the bit, and so are greedy tokens."""
    model_of = Directories(tmp_path, name)
    kvpack.compress(model_of.plain, tmp_path / "there", bits=6.0, embeddings="code", device="cuda")
    here, there = (path / "model.safetensors" for path in (model_of.coded, tmp_path / "there"))
    assert here.read_bytes() == there.read_bytes()
    model, dense = (model_of.load(path, device_map="cuda").eval() for path in (model_of.coded, model_of.dense))
    embedding = model.get_input_embeddings()
    assert type(embedding) is RansEmbedding
    assert embedding.weight.device.type == "cuda"
    ids = torch.arange(VOCABULARY, device="cuda")
    assert torch.equal(embedding(ids), dense.get_input_embeddings()(ids))
    example = {key: value.cuda() for key, value in ARCHITECTURES[name].example().items()}
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(example["input_ids"])}
    with torch.no_grad():
        torch.testing.assert_close(model(**example).logits, dense(**example).logits, rtol=1e-2, atol=1e-2)
    assert torch.equal(model.generate(**example, **options), dense.generate(**example, **options))
    embedding.prepare().check()
    model.save_pretrained(tmp_path / "saved")
    assert kvpack.verify(tmp_path / "saved", model_of.plain).mismatches == {}
