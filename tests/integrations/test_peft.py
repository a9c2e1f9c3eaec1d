"""LoRA of PEFT over coded layers: what is trained, what is merged, and what is refused."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402
from torch import nn  # noqa: E402

import kvpack  # noqa: E402
from kvpack.errors import InputError  # noqa: E402
from kvpack.integrations.peft import RansLoraLinear, dense_copy, merge  # noqa: E402

# Names that transformers 5.24 will lose: peft 0.21 uses one, and earlier versions have no others.
pytestmark = pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning")

VOCABULARY, TOKENS = 128, 24
TARGETS = ["q_proj", "v_proj", "down_proj"]


def llama(dtype: Any = torch.float32) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
    )
    return transformers.LlamaForCausalLM(config).to(dtype).eval()


def gpt2() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=64, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config).eval()


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """name → (coded, decompressed)."""
    root = tmp_path_factory.mktemp("peft")
    found = {}
    for name, model in (("llama", llama()), ("gpt2", gpt2())):
        model.save_pretrained(root / name)
        kvpack.compress(root / name, root / f"{name}-coded", bits=4.25)
        kvpack.decompress(root / f"{name}-coded", root / f"{name}-dense")
        found[name] = root / f"{name}-coded", root / f"{name}-dense"
    return found


@pytest.fixture
def coded(directories: dict[str, tuple[Path, Path]]) -> Any:
    model = llama()
    kvpack.replace_linears(model, directories["llama"][0])
    return model


@pytest.fixture
def dense(directories: dict[str, tuple[Path, Path]]) -> Any:
    return transformers.LlamaForCausalLM.from_pretrained(directories["llama"][1]).eval()


def ids(rows: int = 2, seed: int = 1) -> Any:
    return torch.randint(0, VOCABULARY, (rows, TOKENS), generator=torch.Generator().manual_seed(seed))


def adapted(model: Any, **options: Any) -> Any:
    """The model with adapters that change something; the same ones for the same options."""
    torch.manual_seed(2)
    model = get_peft_model(model, LoraConfig(**{"r": 4, "target_modules": TARGETS, **options}))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    return model


def gradients(model: Any, rows: int = 2) -> dict[str, Any]:
    model.zero_grad()
    model(input_ids=ids(rows), labels=ids(rows)).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_gradients_equal_those_over_dense_weights(coded: Any, dense: Any) -> None:
    """Also below the topmost coded layer: gradients pass through all of them."""
    over_coded, over_dense = gradients(adapted(coded)), gradients(adapted(dense))
    assert len(over_coded) == 2 * 2 * len(TARGETS)
    assert over_coded.keys() == over_dense.keys()
    for name, expected in over_dense.items():
        assert expected.abs().max() > 1e-6, name
        difference = (over_coded[name] - expected).norm() / expected.norm()
        assert difference < 1e-5, name


def test_all_adapted_layers_are_coded(coded: Any) -> None:
    model = adapted(coded)
    layers = [module for module in model.modules() if isinstance(module, RansLoraLinear)]
    assert len(layers) == 2 * len(TARGETS)
    assert all(isinstance(layer.get_base_layer(), kvpack.RansLinear) for layer in layers)


def test_kinds_of_adapters(coded: Any, dense: Any) -> None:
    """aLoRA changes the layer's result in place."""
    for options in ({"use_rslora": True}, {"alora_invocation_tokens": [3], "task_type": "CAUSAL_LM"}):
        over_coded = gradients(adapted(copy.deepcopy(coded), **options))
        for name, expected in gradients(adapted(copy.deepcopy(dense), **options)).items():
            assert (over_coded[name] - expected).norm() <= 1e-5 * expected.norm(), (name, options)


def test_gradient_checkpointing(coded: Any) -> None:
    model = adapted(coded).train()
    expected = gradients(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    decoded = gradients(model)
    for name, gradient in expected.items():
        torch.testing.assert_close(decoded[name], gradient, rtol=1e-5, atol=1e-8, msg=name)


def test_training_lowers_the_loss(coded: Any) -> None:
    blobs = {name: buffer.clone() for name, buffer in coded.named_buffers() if name.endswith("weight_kvpack")}
    model = get_peft_model(coded, LoraConfig(r=8, lora_alpha=32, target_modules="all-linear")).train()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(25):
        loss = model(input_ids=ids(), labels=ids()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.85 * losses[0], losses
    after = {name.replace("base_layer.", ""): buffer for name, buffer in model.base_model.model.named_buffers()}
    assert len(blobs) == 14
    for name, blob in blobs.items():
        assert torch.equal(after[name], blob), name


class _Texts(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Any]:
        text = ids(1, seed=0)[0]
        return {"input_ids": text, "labels": text}


def test_trainer(directories: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    """A model of from_pretrained, prepared as quantized ones are; its adapter serves transformers without PEFT's."""
    directory, _ = directories["llama"]
    base = peft.prepare_model_for_kbit_training(transformers.AutoModelForCausalLM.from_pretrained(directory))
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    options = transformers.TrainingArguments(
        output_dir=tmp_path / "out",
        max_steps=6,
        per_device_train_batch_size=2,
        learning_rate=2e-2,
        report_to=[],
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(model=model, args=options, train_dataset=_Texts())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.92 * losses[0], losses
    model.eval().save_pretrained(tmp_path / "adapter")
    other = transformers.AutoModelForCausalLM.from_pretrained(directory)
    other.load_adapter(tmp_path / "adapter")
    torch.testing.assert_close(other(input_ids=ids()).logits, model(input_ids=ids()).logits)
    merged = merge(model)
    merged.save_pretrained(tmp_path / "merged")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(again(input_ids=ids()).logits, other(input_ids=ids()).logits, rtol=1e-4, atol=1e-5)


def test_compiled_training_step(coded: Any) -> None:
    model = adapted(coded)
    expected = gradients(model)
    model.compile(backend="aot_eager")
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(directories: dict[str, tuple[Path, Path]], dtype: Any) -> None:
    """Activations of 16 bits under adapters of 32, as PEFT has them: as far from fp32 as dense weights are."""
    directory, decompressed = directories["llama"]
    exact = gradients(adapted(transformers.LlamaForCausalLM.from_pretrained(decompressed).eval()), rows=16)
    dense = transformers.LlamaForCausalLM.from_pretrained(decompressed, dtype=dtype).eval()
    model = llama(dtype)
    kvpack.replace_linears(model, directory)
    error, usual = (
        sum((found[name].float() - gradient).square().sum() for name, gradient in exact.items()) ** 0.5
        for found in (gradients(adapted(model), rows=16), gradients(adapted(dense), rows=16))
    )
    assert 0 < error < 1.5 * usual, (error, usual)


def test_adapters_are_saved_and_loaded(coded: Any, tmp_path: Path) -> None:
    base = copy.deepcopy(coded)
    model = adapted(coded)
    expected = model(input_ids=ids()).logits
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 40_000
    assert not torch.allclose(base(input_ids=ids()).logits, expected, atol=1e-3)
    assert torch.equal(PeftModel.from_pretrained(base, tmp_path)(input_ids=ids()).logits, expected)


def test_adapter_may_be_switched_off_and_taken_away(coded: Any) -> None:
    expected = coded(input_ids=ids()).logits
    model = adapted(coded)
    with model.disable_adapter():
        assert torch.equal(model(input_ids=ids()).logits, expected)
    unloaded = model.unload()
    assert sum(isinstance(module, kvpack.RansLinear) for module in unloaded.modules()) == 14
    assert torch.equal(unloaded(input_ids=ids()).logits, expected)


@pytest.mark.parametrize("name", ["merge_and_unload", "merge_adapter"])
def test_nothing_is_merged_unasked(coded: Any, name: str) -> None:
    """Nor by half: the dense output layer is left alone as well."""
    model = adapted(coded, target_modules=["lm_head", *TARGETS])
    expected = model(input_ids=ids()).logits
    with pytest.raises(InputError, match=r"q_proj.*kvpack\.integrations\.peft\.merge\(model\)"):
        getattr(model, name)()
    assert torch.equal(model(input_ids=ids()).logits, expected)
    layer = next(module for module in model.modules() if isinstance(module, RansLoraLinear))
    with pytest.raises(InputError, match=r"kvpack\.integrations\.peft\.merge\(model\)"):
        layer.merge()


def test_merged_on_request(coded: Any) -> None:
    model = adapted(coded, target_modules=["lm_head", *TARGETS])
    expected = model(input_ids=ids()).logits
    merged = merge(model)
    assert type(merged) is transformers.LlamaForCausalLM
    assert sum(isinstance(module, kvpack.RansLinear) for module in merged.modules()) == 2 * (7 - len(TARGETS))
    assert type(merged.model.layers[0].self_attn.q_proj) is nn.Linear
    torch.testing.assert_close(merged(input_ids=ids()).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_merged_in_the_dtype_of_the_model(dtype: Any, tmp_path: Path) -> None:
    """The file's may be another one: a bf16 checkpoint that is trained in fp32."""
    llama(torch.bfloat16).save_pretrained(tmp_path / "bf16")
    kvpack.compress(tmp_path / "bf16", tmp_path / "coded", bits=6)
    model = adapted(transformers.LlamaForCausalLM.from_pretrained(tmp_path / "coded", dtype=dtype)).eval()
    with torch.no_grad():
        expected = model(input_ids=ids()).logits
        merged = merge(model)
        assert {parameter.dtype for parameter in merged.parameters()} == {dtype}
        # What an adapter adds is rounded into the weights once, in the weights' dtype.
        tolerance = 1e-5 if dtype == torch.float32 else 0.05
        torch.testing.assert_close(merged(input_ids=ids()).logits, expected, rtol=tolerance, atol=tolerance)


def test_merging_what_is_not_adapted(coded: Any, dense: Any) -> None:
    with pytest.raises(InputError, match="no adapters of PEFT"):
        merge(coded)
    with pytest.raises(InputError, match="no adapter is over coded weights"):
        merge(adapted(dense))


def test_conv1d(directories: dict[str, tuple[Path, Path]]) -> None:
    """Weights stored inputs × outputs: gradients, and the merged copy is again a Conv1D."""
    directory, decompressed = directories["gpt2"]
    model = gpt2()
    kvpack.replace_linears(model, directory)
    dense = transformers.GPT2LMHeadModel.from_pretrained(decompressed).eval()
    names = ["c_attn", "c_fc"]
    over_coded = adapted(model, target_modules=names)
    over_dense = adapted(dense, target_modules=names, fan_in_fan_out=True)
    expected, found = gradients(over_dense), gradients(over_coded)
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() < 1e-5 * gradient.norm(), name
    logits = over_coded(input_ids=ids()).logits
    merged = merge(over_coded)
    assert type(merged.transformer.h[0].attn.c_attn).__name__ == "Conv1D"
    torch.testing.assert_close(merged(input_ids=ids()).logits, logits, rtol=1e-4, atol=1e-5)
    assert merged.state_dict()["transformer.h.0.attn.c_attn.weight"].shape == (64, 192)


def test_dense_copy_is_the_decompressed_layer(coded: Any, dense: Any) -> None:
    layer = dense_copy(coded.model.layers[1].mlp.up_proj)
    assert torch.equal(layer.weight, dense.model.layers[1].mlp.up_proj.weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "use_dora.*needs? the base weights as numbers|DoRA"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'.*model.layers.0.self_attn.q_proj is coded"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
    ],
)
def test_what_needs_dense_weights_is_refused(coded: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        get_peft_model(coded, LoraConfig(target_modules=TARGETS, **options))


@pytest.mark.parametrize("order", [("kvpack", "peft"), ("peft", "kvpack"), ("peft", "kvpack", "kvpack")])
def test_known_to_peft_in_any_order_of_imports(order: tuple[str, ...]) -> None:
    script = "\n".join(f"import {name}" for name in order)
    script += """
import numpy, torch
from peft import LoraConfig, get_peft_model
import kvpack
from kvpack.runtime.weights.linear import RansLinear
class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(64, 64)
        self.layer = RansLinear.empty(64, 64, 100, 1, False, torch.float32)
print(type(get_peft_model(Model(), LoraConfig(target_modules=["layer"])).base_model.model.layer).__name__)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.stdout == "RansLoraLinear\n", done.stderr


def test_offloaded_layers_are_refused(directories: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    """An adapter would be on the meta device, and the sum of no numbers."""
    places = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    coded = directories["llama"][0]
    model = transformers.LlamaForCausalLM.from_pretrained(coded, device_map=places, offload_folder=tmp_path)
    with pytest.raises(InputError, match=r"device_map has the weights of model\.layers\.1\.\w+\.\w+\.weight on"):
        get_peft_model(model, LoraConfig(target_modules=TARGETS))
