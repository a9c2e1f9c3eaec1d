"""GPT-2 (weights of inputs × outputs, q, k and v in one tensor, biases), and models whose fused rows vLLM reorders."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed: scripts/test-vllm has it in an environment", allow_module_level=True)

from coded_models import TOLERANCE, VLLM_ARCHITECTURES, both, compress, difference, run
from models import ARCHITECTURES, Architecture

_SIZES = {"vocab_size": 256, "hidden_size": 128, "bos_token_id": 1, "eos_token_id": None}
# vLLM takes no ffn_hidden_size but four times the other one.
_FALCON = _SIZES | {"num_hidden_layers": 2, "num_attention_heads": 4, "ffn_hidden_size": 512}
_OLD_FALCON = _FALCON | {"new_decoder_architecture": False}
FUSED = {
    "gpt2": (ARCHITECTURES["gpt2"], {"n_embd": 128, "vocab_size": 256}),
    "gpt2, published names": (ARCHITECTURES["gpt2"], {"n_embd": 128, "vocab_size": 256}),
    "falcon, one head of k and v": (Architecture("FalconConfig", "FalconForCausalLM", _OLD_FALCON), {}),
}
REORDERED = {
    "falcon": Architecture("FalconConfig", "FalconForCausalLM", _OLD_FALCON | {"multi_query": False}),
    "new falcon": Architecture(
        "FalconConfig", "FalconForCausalLM", _FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}
    ),
    "bloom": Architecture("BloomConfig", "BloomForCausalLM", _SIZES | {"n_layer": 2, "n_head": 4}),
    "llama4_text": VLLM_ARCHITECTURES["llama4"],
}


def _without_prefix(folder: Path) -> None:
    """Names as in the published GPT-2: h.0.attn.c_attn.weight."""
    tensors = load_file(folder / "model.safetensors")
    named = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    assert named.keys() != tensors.keys()
    save_file(named, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Of the fused: plain, coded, dense by request; of the reordered ones, whose weights are taken away: an error."""
    requests: dict[str, list[dict[str, Any]]] = {}
    for name, (architecture, options) in FUSED.items():
        folder = tmp_path_factory.mktemp("fused")
        architecture.save(folder / "original", torch.bfloat16, **options)
        if "published" in name:
            _without_prefix(folder / "original")
        plain, coded = both(compress(folder, bits=4.25, embeddings="code"))
        requests[name] = [plain, coded, coded | {"engine": {"additional_config": {"kvpack": {"weights": "dense"}}}}]
    for name, architecture in REORDERED.items():
        folder = tmp_path_factory.mktemp("reordered")
        architecture.save(folder / "original", torch.bfloat16)
        kept = {"exclude": "experts"} if "llama" in name else {}
        requests[name] = both(compress(folder, bits=4.25, **kept))[1:]
        (folder / "coded" / "model.safetensors").unlink()
    said = iter(run(folder, [request for several in requests.values() for request in several]))
    return {name: [next(said) for _ in several] for name, several in requests.items()}


@pytest.mark.parametrize("name", FUSED)
def test_the_same_as_plain(results: dict[str, Any], name: str) -> None:
    """Two layers of four products and the embedding, which is the output layer."""
    plain, coded, dense = results[name]
    assert difference(plain, coded) < TOLERANCE
    assert difference(plain, dense) < 1e-4
    assert coded["ranks"][0]["layers"] == 9
    assert dense["ranks"][0]["coded_bytes"] == 0


@pytest.mark.parametrize("name", REORDERED)
def test_refused_before_weights_are_read(results: dict[str, Any], name: str) -> None:
    """vLLM's class would put rows of a plain weight in another order; a blob's bytes it would scramble, or leave."""
    (said,) = results[name]
    first = "0.self_attn.k_proj.weight, " if "llama" in name else "0.self_attention.query_key_value.weight, "
    assert first in said["error"]
    assert f"vLLM's class of {name.split()[-1]} models puts rows of these weights in another order" in said["error"]
