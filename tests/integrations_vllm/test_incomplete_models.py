"""Compressed models that lack something, or have more than vLLM's class asks for, are refused by name."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import save_file

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed: scripts/test-vllm has it in an environment", allow_module_level=True)

from coded_models import both, make, run
from torch import nn

from kvpack.errors import ModelMismatchError


def _one_layer_less(model: Path) -> None:
    """config.json says one layer, the file has two."""
    _change_config(model, num_hidden_layers=1)


def _change_config(model: Path, **changes: Any) -> None:
    config = model / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))


def _without(model: Path, part: str) -> None:
    """The file without tensors whose names have that part, nor entries of them."""
    path = model / "model.safetensors"
    with safe_open(path, "pt") as file:
        metadata, names = file.metadata(), file.keys()
        tensors = {name: file.get_tensor(name) for name in names if part not in name}
    for key in ("kvpack_tensors", "kvpack_crc32"):
        entries = json.loads(metadata[key])
        metadata[key] = json.dumps({name: entry for name, entry in entries.items() if part not in name})
    save_file(tensors, path, metadata=metadata)


def _no_k(model: Path) -> None:
    _without(model, "layers.1.self_attn.k_proj")


def _no_down(model: Path) -> None:
    _without(model, "layers.1.mlp.down_proj")


CHANGES = {"one layer less": _one_layer_less, "no k": _no_k, "no down": _no_down}
WEIGHTS = ["coded", "dense"]


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], str]:
    folder = make(tmp_path_factory.mktemp("whole"), "llama", bits=4.25)
    requests = {}
    for name, change in CHANGES.items():
        shutil.copytree(folder / "coded", folder / name)
        change(folder / name)
        for weights in WEIGHTS:
            request = both(folder, additional_config={"kvpack": {"weights": weights}})[1]
            requests[name, weights] = request | {"model": str(folder / name)}
    return dict(zip(requests, (said["error"] for said in run(folder, list(requests.values()))), strict=True))


@pytest.mark.parametrize("weights", WEIGHTS)
def test_coded_tensors_that_no_layer_claims(errors: dict[tuple[str, str], str], weights: str) -> None:
    """Seven of the layer that is too many: said by kvpack, before vLLM looks for their place."""
    error = errors["one layer less", weights]
    assert error.startswith("ModelMismatchError: model.layers.1.mlp.down_proj.weight, ")
    assert "and 4 more: coded weights that vLLM's class of this model has no layers for" in error


@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_shard_that_never_comes(errors: dict[tuple[str, str], str], weights: str) -> None:
    error = errors["no k", weights]
    assert error.startswith("ModelMismatchError: model.layers.1.self_attn.qkv_proj: ")
    assert "no coded weight of shard 'k': the checkpoint lacks it" in error


@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_layer_that_never_comes(errors: dict[tuple[str, str], str], weights: str) -> None:
    error = errors["no down", weights]
    assert error.startswith("ModelMismatchError: model.layers.1.mlp.down_proj: ")


@pytest.mark.parametrize("unclaimed", ["model.layers.1.q_proj", "model.layers.2.q_proj", "model.layers.10.q_proj"])
def test_a_stage_of_a_pipeline_knows_what_is_another_s(unclaimed: str) -> None:
    """The last of two: of two layers it has layer 1 alone, and no embedding."""
    from vllm.model_executor.models.utils import PPMissingLayer

    from kvpack.integrations.vllm.quantization import KVPackQuantization

    stage = nn.Module()
    stage.model = nn.Module()
    stage.model.embed_tokens = PPMissingLayer()
    stage.model.layers = nn.ModuleList([PPMissingLayer(), nn.Identity()])
    names = ["model.embed_tokens", "model.layers.0.q_proj", "model.layers.1.o_proj"]
    quantization = KVPackQuantization({"blob_bytes": {f"{name}.weight": 8 for name in names}})
    quantization.coded_parts("model.layers.1.o_proj")
    quantization._check_claims(stage)
    quantization.blob_bytes[f"{unclaimed}.weight"] = 8
    with pytest.raises(ModelMismatchError, match=f"^{unclaimed}.weight: coded weights that vLLM's class"):
        quantization._check_claims(stage)


def test_a_missing_layer_has_each_of_its_names() -> None:
    """The output layer and the embedding are one module."""
    from vllm.model_executor.models.utils import PPMissingLayer

    from kvpack.integrations.vllm.quantization import KVPackQuantization

    stage = nn.Module()
    stage.model = nn.Module()
    stage.model.embed_tokens = stage.lm_head = PPMissingLayer()
    quantization = KVPackQuantization({"blob_bytes": {"model.embed_tokens.weight": 8, "lm_head.weight": 8}})
    quantization._check_claims(stage)


def test_coded_tensors_that_no_stage_claims(tmp_path: Path) -> None:
    """The file has a layer more than config.json says: neither rank takes it for the other's."""
    folder = make(tmp_path, "llama", sizes={"num_hidden_layers": 3}, bits=4.25)
    _change_config(folder / "coded", num_hidden_layers=2)
    (said,) = run(folder, both(folder, pipeline_parallel_size=2, enforce_eager=False)[1:], ranks=2)
    assert "error" in said
    unclaimed = "ModelMismatchError: model.layers.2.mlp.down_proj.weight, "
    assert unclaimed in said["log"]
    assert "model.layers.1" not in said["log"].partition(unclaimed)[2].partition("vLLM's class")[0]
