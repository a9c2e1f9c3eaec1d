"""replace_linears on models of transformers, against from_pretrained on the same checkpoint."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402

import kvpack  # noqa: E402
from kvpack.errors import ModelMismatchError, TensorCrcError  # noqa: E402
from kvpack.format.container import Container  # noqa: E402
from kvpack.runtime.weights.linear import RansLinear  # noqa: E402

Tensors = dict[str, Any]

SIZES = {
    "vocab_size": 128, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
IDS = torch.tensor([[1, 2, 3, 9, 20, 7, 5, 60]])


def config_of(kind: str) -> Any:
    grouped = SIZES | {"num_key_value_heads": 2}
    experts = {"num_experts_per_tok": 2, "moe_intermediate_size": 128}
    configs: dict[str, Callable[[], Any]] = {
        "llama": lambda: transformers.LlamaConfig(**grouped),
        "tied": lambda: transformers.LlamaConfig(**grouped, tie_word_embeddings=True),
        "gpt2": lambda: transformers.GPT2Config(vocab_size=128, n_embd=128, n_layer=2, n_head=4, n_positions=64),
        "mixtral": lambda: transformers.MixtralConfig(**grouped, num_local_experts=4),
        "qwen3_moe": lambda: transformers.Qwen3MoeConfig(**grouped, **experts, num_experts=4, head_dim=32),
        "deepseek_v3": lambda: transformers.DeepseekV3Config(
            **SIZES, **experts, num_key_value_heads=4, n_routed_experts=8, n_group=2, topk_group=1, q_lora_rank=64,
            first_k_dense_replace=1, kv_lora_rank=64, qk_rope_head_dim=16, v_head_dim=32, qk_nope_head_dim=32,
        ),
        "gpt_oss": lambda: transformers.GptOssConfig(
            **grouped, num_local_experts=4, num_experts_per_tok=2, head_dim=32, layer_types=["full_attention"] * 2
        ),
        "bert": lambda: transformers.BertConfig(**SIZES, max_position_embeddings=64),
        "t5": lambda: transformers.T5Config(
            vocab_size=128, d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4, decoder_start_token_id=0
        ),
        "marian": lambda: transformers.MarianConfig(
            vocab_size=128, d_model=128, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=256, decoder_ffn_dim=256, max_position_embeddings=64,
            pad_token_id=0, decoder_start_token_id=0, eos_token_id=1,
        ),
        "wav2vec2": lambda: transformers.Wav2Vec2Config(
            vocab_size=32, hidden_size=128, num_hidden_layers=1, num_attention_heads=4, intermediate_size=256,
            conv_dim=(32, 32), conv_stride=(5, 2), conv_kernel=(10, 3), num_feat_extract_layers=2,
            num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4,
        ),
    }  # fmt: skip
    return configs[kind]()


CLASSES = {
    "gpt2": "GPT2LMHeadModel", "mixtral": "MixtralForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM", "gpt_oss": "GptOssForCausalLM", "t5": "T5ForConditionalGeneration",
    "marian": "MarianMTModel", "wav2vec2": "Wav2Vec2ForCTC", "bert": "BertForMaskedLM", "llama": "LlamaForCausalLM",
    "tied": "LlamaForCausalLM",
}  # fmt: skip


def class_of(kind: str) -> Any:
    return getattr(transformers, CLASSES[kind])


def checkpoint(folder: Path, kind: str, edit: Callable[[Tensors], Tensors] | None = None, saved: Any = None) -> Path:
    """What save_pretrained writes of a random model; ``edit`` changes its tensors."""
    torch.manual_seed(0)
    (saved or class_of(kind))(config_of(kind)).save_pretrained(folder / "model")
    file = folder / "model" / "model.safetensors"
    if edit is not None:
        tensors = {name: tensor.contiguous() for name, tensor in edit(load_file(file)).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    return folder / "model"


def lossless(path: Path) -> Path:
    kvpack.compress(path, path.with_name("coded"), kvpack.QuantConfig(preset="lossless"))
    return path.with_name("coded")


def fresh(kind: str, device: str = "meta", dtype: Any = None, made: Any = None) -> Any:
    torch.manual_seed(1)
    with torch.device(device):
        return (made or class_of(kind))(config_of(kind)).to(dtype or torch.float32).eval()


def output(model: Any) -> Any:
    inputs: dict[str, Any] = {"input_ids": IDS}
    if model.config.model_type == "wav2vec2":
        inputs = {"input_values": torch.linspace(-1, 1, 1600)[None].sin()}
    elif model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = IDS
    with torch.no_grad():
        return model(**inputs)[0].float()


def loaded(path: Path, kind: str, dtype: Any = None, made: Any = None) -> Any:
    return output((made or class_of(kind)).from_pretrained(path, dtype=dtype or torch.float32).eval())


# kind → linear layers that stay coded in a lossless file. 8 of GPT-2 are Conv1D; a fused stack of experts is decoded.
CODED = {
    "llama": 15, "tied": 14, "gpt2": 8, "mixtral": 33, "qwen3_moe": 33, "deepseek_v3": 41, "gpt_oss": 9, "bert": 13,
    "t5": 32,
}  # fmt: skip


@pytest.mark.parametrize("kind", CODED)
def test_lossless_and_lossy(tmp_path: Path, kind: str) -> None:
    path = checkpoint(tmp_path, kind)
    coded = lossless(path)
    model = fresh(kind)
    report = kvpack.replace_linears(model, coded, device="cpu")
    expected = loaded(path, kind)
    torch.testing.assert_close(output(model), expected, rtol=0, atol=3e-6)
    assert len(report.replaced) == CODED[kind]
    assert (report.missing, report.unexpected) == ([], [])

    half = checkpoint(tmp_path / "half", kind, lambda t: {name: x.bfloat16() for name, x in t.items()})
    model = fresh(kind, dtype=torch.bfloat16)
    kvpack.replace_linears(model, lossless(half), device="cpu")
    # Products are rounded once, from fp32.
    torch.testing.assert_close(output(model), loaded(half, kind, torch.bfloat16), rtol=0.02, atol=0.02)

    kvpack.compress(path, tmp_path / "lossy", kvpack.QuantConfig(bits=4.25))
    kvpack.decompress(tmp_path / "lossy", tmp_path / "plain")
    model = fresh(kind, "cpu")
    kvpack.replace_linears(model, tmp_path / "lossy", device="cpu")
    torch.testing.assert_close(output(model), loaded(tmp_path / "plain", kind), rtol=0, atol=3e-6)
    assert float((output(model) - expected).abs().max()) > 1e-3  # quantization can be seen


def test_what_is_kept_in_fp32(tmp_path: Path) -> None:
    """transformers keeps the biases of DeepSeek's routers in fp32: in bf16 other experts are chosen."""
    path = checkpoint(tmp_path, "deepseek_v3")
    model = fresh("deepseek_v3", dtype=torch.bfloat16)
    kvpack.replace_linears(model, lossless(path), device="cpu")
    expected = transformers.DeepseekV3ForCausalLM.from_pretrained(path, dtype=torch.bfloat16).state_dict()
    kept = {name for name, tensor in expected.items() if tensor.dtype == torch.float32}
    assert "model.layers.1.mlp.gate.e_score_correction_bias" in kept  # later versions keep more
    for name, tensor in model.state_dict().items():
        assert "weight_kvpack" in name or tensor.dtype == expected[name].dtype, name


def test_experts_stay_coded(tmp_path: Path) -> None:
    path = lossless(checkpoint(tmp_path, "mixtral"))
    model = fresh("mixtral")
    report = kvpack.replace_linears(model, path, device="cpu")
    layer = "model.layers.1.block_sparse_moe.experts"
    assert report.replaced["model.layers.1.mlp.experts.3.w3"] == f"{layer}.3.w3.weight"
    experts = model.model.layers[1].mlp.experts
    original = load_file(tmp_path / "model" / "model.safetensors")
    for expert in range(4):
        rows = torch.cat([original[f"{layer}.{expert}.{name}.weight"] for name in ("w1", "w3")])
        assert experts.gate_up_proj[expert].dequantize().equal(rows)
        assert experts.down_proj[torch.tensor(expert)].dequantize().equal(original[f"{layer}.{expert}.w2.weight"])
    assert experts.gate_up_proj.shape == (4, 512, 128)
    assert sum(isinstance(module, RansLinear) for module in experts.modules()) == 12
    assert not dict(experts.named_parameters())
    with pytest.raises(TypeError, match="coded experts are taken one by one"):
        torch.bmm(torch.zeros(4, 1, 128), experts.gate_up_proj)
    with pytest.raises(TypeError, match="taken one by one"):
        experts.gate_up_proj[torch.tensor([0, 1])]


def test_experts_are_copied_saved_and_streamed(tmp_path: Path) -> None:
    path = lossless(checkpoint(tmp_path, "mixtral"))
    model = fresh("mixtral")
    kvpack.replace_linears(model, path, device="cpu")
    expected = output(model)
    assert output(copy.deepcopy(model)).equal(expected)
    assert output(pickle.loads(pickle.dumps(model))).equal(expected)

    other = checkpoint(tmp_path / "other", "mixtral", lambda t: {name: x * 2 for name, x in t.items()})
    model = fresh("mixtral")
    kvpack.replace_linears(model, lossless(other), device="cpu")
    assert not output(model).equal(expected)
    saved = fresh("mixtral")
    kvpack.replace_linears(saved, path, device="cpu")
    model.load_state_dict(saved.state_dict())
    assert output(model).equal(expected)
    # save_pretrained gives them the file's names.
    saved.save_pretrained(tmp_path / "saved")
    with Container(path / "model.safetensors") as container:
        expected_names = {f"{name}_kvpack" for name in container.coded if "experts" in name}
    assert len(expected_names) == 24
    assert expected_names <= load_file(tmp_path / "saved" / "model.safetensors").keys()

    for source in ("pinned", "disk"):
        model = fresh("mixtral")
        layers = model.model.layers
        kvpack.replace_linears(model, path, device="cpu", defer=layers)
        assert model.model.layers[0].mlp.experts.get_submodule("0.w1").weight_kvpack.is_meta
        with kvpack.stream_modules(model, layers, source=source, path=path, device="cpu"):
            assert output(model).equal(expected)


def test_some_experts_are_excluded(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, "mixtral")
    model = fresh("mixtral")
    report = kvpack.replace_linears(model, lossless(path), device="cpu", exclude=r"layers\.0.*experts\.1\.w3")
    torch.testing.assert_close(output(model), loaded(path, "mixtral"), rtol=0, atol=3e-6)
    assert isinstance(model.model.layers[0].mlp.experts.gate_up_proj, torch.nn.Parameter)
    assert len(report.replaced) == CODED["mixtral"] - 8
    assert "dequantized (model.layers.0.block_sparse_moe.experts.1.w3.weight is excluded" in str(report)


def without_prefix(prefix: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def renamed(*pairs: tuple[str, str]) -> Callable[[Tensors], Tensors]:
    def edit(tensors: Tensors) -> Tensors:
        for old, new in pairs:
            tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
        return tensors

    return edit


FORMS: dict[str, tuple[str, Callable[[Tensors], Tensors]]] = {
    "gpt2 without prefix": ("gpt2", without_prefix("transformer.")),
    "gpt2 with masks": (
        "gpt2", lambda t: t | {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 64, 64) for i in (0, 1)},
    ),
    "bert without prefix": ("bert", without_prefix("bert.")),
    "bert with gamma and beta": (
        "bert", renamed(("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")),
    ),
    "bert with position_ids": ("bert", lambda t: t | {"bert.embeddings.position_ids": torch.arange(64)[None]}),
    "llama without prefix": ("llama", without_prefix("model.")),
    "llama with inv_freq": (
        "llama", lambda t: t | {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.arange(16.0) for i in (0, 1)},
    ),
    "marian without sinusoids": ("marian", lambda t: {k: x for k, x in t.items() if "embed_positions" not in k}),
    "wav2vec2 with weight_g and weight_v": (
        "wav2vec2",
        renamed(("parametrizations.weight.original0", "weight_g"), ("parametrizations.weight.original1", "weight_v")),
    ),
}  # fmt: skip


@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize("form", FORMS)
def test_names_that_from_pretrained_forgives(tmp_path: Path, form: str, device: str) -> None:
    kind, edit = FORMS[form]
    path = checkpoint(tmp_path, kind, edit)
    model = fresh(kind, device)
    report = kvpack.replace_linears(model, lossless(path), device="cpu")
    torch.testing.assert_close(output(model), loaded(path, kind), rtol=0, atol=3e-6)
    assert report.replaced
    assert (report.missing, report.unexpected) == ([], [])
    left_out = len(load_file(path / "model.safetensors")) - len(
        load_file(checkpoint(tmp_path / "whole", kind) / "model.safetensors")
    )
    assert len(report.computed) == max(left_out, 0)


def test_body_without_the_head(tmp_path: Path) -> None:
    """from_pretrained leaves out a head; it is said, and no error. The other way round the head would be random."""
    path = checkpoint(tmp_path, "llama")
    model = fresh("llama", made=transformers.LlamaModel)
    report = kvpack.replace_linears(model, lossless(path), device="cpu")
    torch.testing.assert_close(output(model), loaded(path, "llama", made=transformers.LlamaModel), rtol=0, atol=3e-6)
    assert report.unexpected == ["lm_head.weight"]
    assert "unexpected, and not used: lm_head.weight" in str(report)
    body = lossless(checkpoint(tmp_path / "body", "llama", saved=transformers.LlamaModel))
    for device in ("meta", "cpu"):
        with pytest.raises(
            ModelMismatchError, match=r"1 of the model are not in the file: lm_head\.weight; what has no"
        ):
            kvpack.replace_linears(fresh("llama", device), body, device="cpu")
    kvpack.replace_linears(fresh("tied"), body, device="cpu")


def refusal(tmp_path: Path, kind: str, edit: Callable[[Tensors], Tensors]) -> str:
    model = fresh(kind, "cpu")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ModelMismatchError) as caught:
        kvpack.replace_linears(model, lossless(checkpoint(tmp_path, kind, edit)), device="cpu")
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())
    return str(caught.value)


MOVED = "layers.1.block_sparse_moe.experts.4.w1"


def test_weights_that_are_not_there(tmp_path: Path) -> None:
    """Never random ones, nor advice that would lead to them."""
    message = refusal(tmp_path / "a", "bert", renamed(("layer.0.attention.self.query", "layer.0.attention.self.qury")))
    assert "self.query.weight (the file has bert.encoder.layer.0.attention.self.qury.weight)" in message
    assert "strict=False" not in message
    message = refusal(
        tmp_path / "b", "mixtral", lambda t: {k: x for k, x in t.items() if "0.block_sparse_moe.experts.2" not in k}
    )
    lacking = ", ".join(f"model.layers.0.block_sparse_moe.experts.2.w{i}.weight" for i in (1, 3, 2))
    assert f"model.layers.0.mlp.experts: the file has some of its experts' matrices, and not {lacking};" in message
    message = refusal(tmp_path / "c", "mixtral", lambda t: {k: x for k, x in t.items() if "experts.2.w3" not in k})
    assert "c/coded: model.layers.0.mlp.experts: the file has some" in message
    assert "and not model.layers.0.block_sparse_moe.experts.2.w3.weight;" in message
    message = refusal(tmp_path / "d", "qwen3_moe", lambda t: {k: x for k, x in t.items() if "experts" not in k})
    assert "4 of the model are not in the file: model.layers.0.mlp.experts.gate_up_proj" in message
    message = refusal(tmp_path / "e", "llama", lambda t: {f"module.{k}": x for k, x in t.items()})
    assert "names of the file begin with 'module.', and are the same but for that" in message
    message = refusal(tmp_path / "f", "llama", lambda t: t | {"model.more": torch.zeros(3)})
    assert message.endswith("1 of the file are not in the model: model.more (strict=False leaves these out)")


def test_matrices_of_different_experts(tmp_path: Path) -> None:
    """As many of each kind as the model has experts, and yet not those of the same experts."""
    message = refusal(tmp_path / "a", "mixtral", renamed(("layers.1.block_sparse_moe.experts.3.w1", MOVED)))
    lacking = ", ".join(f"model.layers.1.block_sparse_moe.experts.{i}.weight" for i in ("3.w1", "4.w3", "4.w2"))
    assert f"model.layers.1.mlp.experts: the file has some of its experts' matrices, and not {lacking};" in message


def test_one_name_too_many(tmp_path: Path) -> None:
    """The model's own name counts; what else would become the same tensor is unexpected."""
    message = refusal(tmp_path, "gpt2", lambda t: t | {"h.0.ln_1.weight": torch.zeros(128)})
    assert "1 of the file are not in the model: h.0.ln_1.weight" in message


def test_values_drawn_by_chance_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names that a class says may be missing are believed if the model computes them."""
    path = lossless(checkpoint(tmp_path, "llama", lambda t: {k: x for k, x in t.items() if k != "lm_head.weight"}))
    monkeypatch.setattr(transformers.LlamaForCausalLM, "_keys_to_ignore_on_load_missing", [r"lm_head\.weight"])
    for device in ("meta", "cpu"):
        model = fresh("llama", device)
        model._keys_to_ignore_on_load_missing = {r"lm_head\.weight"}
        with pytest.raises(ModelMismatchError, match=r"1 of the model are not in the file: lm_head\.weight"):
            kvpack.replace_linears(model, path, device="cpu")


def test_tied_model_whose_file_has_two(tmp_path: Path) -> None:
    """transformers does not tie them then."""
    path = checkpoint(tmp_path, "tied", lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"] * 2})
    for kept in (None, "lm_head|embed_tokens"):
        target = tmp_path / f"coded-{kept is None}"
        kvpack.compress(path, target, kvpack.QuantConfig(preset="lossless", exclude=kept))
        model = fresh("tied")
        kvpack.replace_linears(model, target, device="cpu")
        torch.testing.assert_close(output(model), loaded(path, "tied"), rtol=0, atol=3e-6)
    path = checkpoint(
        tmp_path / "same", "tied", lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"].clone()}
    )
    kvpack.compress(
        path, tmp_path / "same" / "coded", kvpack.QuantConfig(preset="lossless", exclude="lm_head|embed_to")
    )
    model = fresh("tied")
    kvpack.replace_linears(model, tmp_path / "same" / "coded", device="cpu")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_tied_model_whose_file_has_two_of_the_same_integers(tmp_path: Path) -> None:
    """Twice the numbers are the same integers with twice the scale."""
    path = checkpoint(tmp_path, "tied", lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"] * 2})
    config = kvpack.QuantConfig(preset="lossless", tensor_bits={"embed_tokens|lm_head": 6.0})
    kvpack.compress(path, tmp_path / "coded", config)
    names = ["model.embed_tokens.weight", "lm_head.weight"]
    with kvpack.open(tmp_path / "coded") as reader:
        blobs = [bytes(reader.container(name).data(name + "_kvpack")) for name in names]
        assert blobs[0] == blobs[1]
        expected = [torch.from_numpy(reader.dequantize(name)) for name in names]
    for device in ("meta", "cpu"):
        model = fresh("tied", device)
        report = kvpack.replace_linears(model, tmp_path / "coded", device="cpu", exclude="embed_tokens|lm_head")
        assert report.tied == {}
        assert model.model.embed_tokens.weight.equal(expected[0])
        assert model.lm_head.weight.equal(expected[1])
        model = fresh("tied", device)
        report = kvpack.replace_linears(model, tmp_path / "coded", device="cpu", exclude="lm_head")
        assert report.tied == {}
        assert model.model.embed_tokens.dequantize(torch.float32).equal(expected[0])
        assert model.lm_head.weight.equal(expected[1])


class FusedLlama(transformers.LlamaForCausalLM):  # type: ignore[misc]
    """Its checkpoints hold gate and up in one tensor, and the output projection in two."""


def test_tensors_that_are_split_and_joined(tmp_path: Path) -> None:
    from transformers.conversion_mapping import register_checkpoint_conversion_mapping
    from transformers.core_model_loading import Chunk, Concatenate, WeightConverter

    register_checkpoint_conversion_mapping(
        "FusedLlama",
        [
            WeightConverter("mlp.gate_up.weight", ["mlp.gate_proj.weight", "mlp.up_proj.weight"], [Chunk(0)]),
            WeightConverter(
                ["self_attn.o_1.weight", "self_attn.o_2.weight"], "self_attn.o_proj.weight", [Concatenate(1)]
            ),
        ],
        overwrite=True,
    )

    def edit(tensors: Tensors) -> Tensors:
        for layer in ("model.layers.0.", "model.layers.1."):
            parts = [tensors.pop(f"{layer}mlp.{name}_proj.weight") for name in ("gate", "up")]
            tensors[f"{layer}mlp.gate_up.weight"] = torch.cat(parts)
            whole = tensors.pop(f"{layer}self_attn.o_proj.weight")
            tensors[f"{layer}self_attn.o_1.weight"], tensors[f"{layer}self_attn.o_2.weight"] = whole.chunk(2, 1)
        return tensors

    path = checkpoint(tmp_path, "llama", edit)
    model = fresh("llama", made=FusedLlama)
    report = kvpack.replace_linears(model, lossless(path), device="cpu")
    expected = output(transformers.LlamaForCausalLM.from_pretrained(checkpoint(tmp_path / "whole", "llama")).eval())
    torch.testing.assert_close(output(model), expected, rtol=0, atol=3e-6)
    assert len(report.replaced) == CODED["llama"] - 6
    assert (
        report.dequantized["model.layers.0.mlp.gate_up.weight"]
        == "made by transformers (Chunk) from 1 tensor of the file"
    )


def test_a_file_without_coded_tensors(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, "mixtral")
    model = fresh("mixtral")
    report = kvpack.replace_linears(model, path, device="cpu")
    torch.testing.assert_close(output(model), loaded(path, "mixtral"), rtol=0, atol=3e-6)
    assert str(report).endswith("nothing in the file is coded: the model is as an uncompressed file would have made it")


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_another_attempt(tmp_path: Path, device: str) -> None:
    """What failed for a damaged or changed file can be tried again with the same model, ties and all."""
    path = lossless(checkpoint(tmp_path, "tied"))
    file = path / "model.safetensors"
    intact = file.read_bytes()
    with Container(file) as container:
        at = container.data_begin + container.tensors["model.norm.weight"].begin
    file.write_bytes(intact[:at] + b"!" + intact[at + 1 :])
    model = fresh("tied", device)
    with pytest.raises(TensorCrcError):
        kvpack.replace_linears(model, path, device="cpu")
    assert all(parameter.is_meta for parameter in model.parameters())
    file.write_bytes(intact)
    kvpack.replace_linears(model, path, device="cpu")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    torch.testing.assert_close(output(model), loaded(tmp_path / "model", "tied"), rtol=0, atol=3e-6)


def test_damage_is_found(tmp_path: Path) -> None:
    path = lossless(checkpoint(tmp_path, "llama")) / "model.safetensors"
    with Container(path) as container:
        at = container.data_begin + container.tensors["model.norm.weight"].begin + 5
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(TensorCrcError, match=r"tensor 'model\.norm\.weight'"):
        kvpack.replace_linears(fresh("llama"), path, device="cpu")
    kvpack.replace_linears(fresh("llama"), path, device="cpu", verify=False)
