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
