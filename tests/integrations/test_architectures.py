"""Tiny models of many architectures, compressed and loaded: as their decompressed twins, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from models import ARCHITECTURES  # noqa: E402

import kvpack  # noqa: E402
from kvpack.runtime.weights.linear import RansLinear  # noqa: E402

TOKENS = 64
# Layers that stay coded, and coded tensors of the file that are decoded: convolutions, and experts that the file has as
# one tensor a layer.
CODED = {
    "llama": (14, 0),
    "llama tied": (14, 0),
    "mistral": (14, 0),
    "qwen2": (14, 0),
    "qwen3": (14, 0),
    "qwen3 moe": (32, 0),
    "gemma2": (14, 0),
    "gemma3": (14, 0),
    "phi3": (8, 0),
    "gpt2": (8, 0),
    "gpt oss": (8, 4),
    "mixtral": (32, 0),
    "deepseek v3": (20, 0),
    "bert": (13, 0),
    "t5": (32, 0),
    "whisper": (32, 1),
    "vit": (12, 1),
    "mamba": (4, 0),
}


def generated(model: Any, name: str) -> Any:
    inputs = ARCHITECTURES[name].example(batch=1)
    if ARCHITECTURES[name].inputs != "ids":
        inputs.pop("decoder_input_ids")
    if "input_ids" in inputs:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    options = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False}
    return model.generate(**inputs, **options)


@pytest.mark.filterwarnings("ignore")  # of generate, on configs of its own making
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architecture(tmp_path: Path, name: str) -> None:
    architecture = ARCHITECTURES[name]
    kvpack.compress(architecture.save(tmp_path / "plain"), tmp_path / "coded", kvpack.QuantConfig(bits=4.25))
    kvpack.decompress(tmp_path / "coded", tmp_path / "dense")
    options = {"dtype": torch.float32, "experts_implementation": "eager"}
    coded = architecture.class_.from_pretrained(tmp_path / "coded", **options)
    dense = architecture.class_.from_pretrained(tmp_path / "dense", **options)

    layers = {module.tensor_name for module in coded.modules() if isinstance(module, RansLinear)}
    with kvpack.open(tmp_path / "coded") as reader:
        in_file = {tensor for tensor in reader if reader.info(tensor) is not None}
    assert (len(layers), len(in_file - layers)) == CODED[name]
    with torch.no_grad():
        expected = dense(**architecture.example()).logits
        assert torch.equal(coded(**architecture.example()).logits, expected)
        # Quantization can be seen: it is no comparison of a model with itself.
        plain = architecture.class_.from_pretrained(tmp_path / "plain", **options)
        assert float((plain(**architecture.example()).logits - expected).abs().max()) > 1e-3
    if architecture.generates:
        tokens = generated(coded, name)
        assert tokens.shape[1] >= TOKENS
        assert torch.equal(tokens, generated(dense, name))
