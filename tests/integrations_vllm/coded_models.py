"""Tiny compressed models, and the plain ones of their very numbers, for vLLM to run both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import kvpack

sys.path.insert(0, str(Path(__file__).parents[1] / "integrations"))
from models import ARCHITECTURES, Architecture

# An engine that waits for ever has failed; all models of test_models.py take a tenth of it.
_LONGEST_S = 1800
ENGINE = Path(__file__).with_name("engine.py")
# Of log-probabilities in fp32. On a GPU one vector of fp32 is rounded to 16 bits of its largest in each chunk.
TOLERANCE = 1e-3 if torch.cuda.is_available() else 1e-4
PROMPTS = [[5, 17, 99, 140, 7], list(range(3, 40))]
# Its experts are one tensor in every checkpoint, under names of their own.
_GRANITE = {name: value for name, value in ARCHITECTURES["mixtral"].options.items() if name != "head_dim"}
VLLM_ARCHITECTURES = ARCHITECTURES | {
    "granite moe": Architecture("GraniteMoeConfig", "GraniteMoeForCausalLM", _GRANITE),
    "llama4": Architecture(
        "Llama4TextConfig",
        "Llama4ForCausalLM",
        ARCHITECTURES["mixtral"].options | {"num_experts_per_tok": 1, "intermediate_size_mlp": 256},
    ),
}
_SIZES = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 256}


def make(
    folder: Path, architecture: str, *, sizes: dict[str, Any] | None = None, stacked: bool = False, **options: Any
) -> Path:
    """``folder/coded``, and ``folder/plain`` with its numbers in fp32; ``options`` are those of ``kvpack.compress``.

    With ``stacked`` all experts are one tensor in the coded model, as in transformers' modules; not in the plain one.
    """
    config = _SIZES | (sizes or {})
    if "moe_intermediate_size" in VLLM_ARCHITECTURES[architecture].options:
        config.setdefault("moe_intermediate_size", 128)
    model = VLLM_ARCHITECTURES[architecture].model(torch.bfloat16, **config)
    model.save_pretrained(folder / "original", save_original_format=not stacked)
    compress(folder, **options)
    if stacked:
        model = VLLM_ARCHITECTURES[architecture].model(torch.float32, **config)
        model.load_state_dict(load_file(folder / "plain" / "model.safetensors"))
        model.save_pretrained(folder / "plain")  # a tensor for each expert, as a model that was not read from others
    return folder


def compress(folder: Path, **options: Any) -> Path:
    """``folder/original`` to the two of :func:`make`."""
    kvpack.compress(folder / "original", folder / "coded", **options)
    (folder / "plain").mkdir()
    numbers = {}
    for name, tensor in kvpack.load(folder / "coded", device="cpu").items():
        values = tensor if isinstance(tensor, torch.Tensor) else tensor.dequantize(torch.float32)
        numbers[name] = values.to(torch.float32).contiguous()
    save_file(numbers, folder / "plain" / "model.safetensors", metadata={"format": "pt"})
    (folder / "plain" / "config.json").write_text((folder / "original" / "config.json").read_text())
    return folder


def run(folder: Path, requests: list[dict[str, Any]], *, ranks: int = 1) -> list[dict[str, Any]]:
    """What ``engine.py`` says of them, in a process of its own."""
    asked, answered = folder / "requests.json", folder / "results.json"
    asked.write_text(json.dumps(requests))
    environment = {"TRITON_F32_DEFAULT": "ieee"} | os.environ  # experts and attention of vLLM's on a GPU: no TF32
    environment["PYTHONPATH"] = os.pathsep.join([str(ENGINE.parent), environment.get("PYTHONPATH", "")])
    if ranks > 1:
        if torch.cuda.is_available() and torch.cuda.device_count() < ranks:
            pytest.skip(f"needs {ranks} GPUs; there are {torch.cuda.device_count()}")
        cores = sorted(os.sched_getaffinity(0))
        environment |= {
            "VLLM_CPU_OMP_THREADS_BIND": "|".join(str(cores[rank % len(cores)]) for rank in range(ranks)),
            "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
            "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
            "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
        }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", ENGINE, asked, answered],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=_LONGEST_S,
    )
    results = json.loads(answered.read_text()) if answered.exists() else []
    assert len(results) == len(requests), done.stderr[-4000:]
    for result in results:
        result["log"] = done.stdout + done.stderr
    return results


def run_apart(folder: Path, requests: list[dict[str, Any]], processes: int = 8) -> list[dict[str, Any]]:
    """As :func:`run`; with a GPU, several processes share it, as to start an engine takes long there."""
    if not torch.cuda.is_available():
        return run(folder, requests)
    folders = [folder / f"process {number}" for number in range(processes)]
    for one in folders:
        one.mkdir()
    with ThreadPoolExecutor(processes) as pool:
        found = list(pool.map(run, folders, [requests[number::processes] for number in range(processes)]))
    return [found[number % processes][number // processes] for number in range(len(requests))]


def both(folder: Path, ranks: int = 1, **engine: Any) -> list[dict[str, Any]]:
    """Requests for the coded model as asked for, and for the plain one on one rank."""
    asked = {"prompts": PROMPTS, "tokens": 8}
    parallel = {"tensor_parallel_size": ranks} if ranks > 1 else {}
    coded = asked | {"model": str(folder / "coded"), "engine": parallel | engine, "ask": True}
    return [asked | {"model": str(folder / "plain")}, coded]


def difference(plain: dict[str, Any], coded: dict[str, Any]) -> float:
    """The largest of log-probabilities, at all steps; infinite where tokens differ."""
    for result in (plain, coded):
        assert "error" not in result, result["error"] + result["log"][-4000:]
    if plain["tokens"] != coded["tokens"]:
        return float("inf")
    one, other = (torch.tensor(list(chain(*result["logprobs"]))) for result in (plain, coded))
    return float((one - other).abs().max())
