"""Options that kvpack does not know are refused before vLLM opens a file of weights or starts a process."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed: scripts/test-vllm has it in an environment", allow_module_level=True)

from coded_models import make, run

_CONNECTOR = {
    "kv_connector": "KVPackConnector",
    "kv_connector_module_path": "kvpack.integrations.vllm.kv_connector",
    "kv_role": "kv_both",
}


def _connector(policy: str = "recompute", **options: Any) -> dict[str, Any]:
    transfer = _CONNECTOR | {"kv_load_failure_policy": policy, "kv_connector_extra_config": options}
    return {"kv_transfer_config": transfer, "dtype": "bfloat16"}


# Options of vLLM → what the error says. The last ones are right, and so the weights are missed.
ASKED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"additional_config": {"kvpack": {"x": 1}}}, "additional_config: \"kvpack\" is {'x': 1}"),
    "no object": ({"additional_config": {"kvpack": "dense"}}, "additional_config: \"kvpack\" is 'dense'"),
    "misspelt": ({"additional_config": {"kvpack": {"weights": "denze"}}}, "is {'weights': 'denze'}"),
    "folder": (_connector(folder="kept"), "'folder'; KVPackConnector knows pages"),
    "policy": (_connector("fail"), "kv_load_failure_policy='recompute'"),
    "pages": (_connector(pages="FP16"), "pages=FP16: the model's keys and values are BF16"),
    "dtype": (_connector() | {"dtype": "float32"}, "keys and values are torch.float32"),
    "right": ({"additional_config": {"kvpack": {"weights": "dense"}}}, "Cannot find any model weights"),
    "right connector": (_connector(pages="INT8"), "Cannot find any model weights"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without its file of weights."""
    folder = make(tmp_path_factory.mktemp("early"), "llama", bits=4.25)
    (folder / "coded" / "model.safetensors").unlink()
    return folder


@pytest.fixture(scope="module")
def errors(model: Path) -> dict[str, str]:
    requests = [
        {"model": str(model / "coded"), "prompts": [[5]], "tokens": 1, "engine": options}
        for options, _ in ASKED.values()
    ]
    return dict(zip(ASKED, (said["error"] for said in run(model, requests)), strict=True))


@pytest.mark.parametrize("name", ASKED)
def test_before_weights_are_opened(errors: dict[str, str], name: str) -> None:
    assert ASKED[name][1] in errors[name]


@pytest.mark.parametrize("name", ["misspelt", "policy"])
def test_before_a_process_is_started(model: Path, name: str) -> None:
    """Engine and ranks, where they have processes of their own, would wait for one another."""
    asked, said = ASKED[name]
    options = asked | {"tensor_parallel_size": 2, "skip_tokenizer_init": True, "enforce_eager": True}
    (model / "start.py").write_text(
        f"""
import multiprocessing
if __name__ == "__main__":
    from vllm import LLM
    try:
        LLM({str(model / "coded")!r}, **{options!r})
    except Exception as error:
        print(len(multiprocessing.active_children()), "processes:", error)
"""
    )
    environment = os.environ | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    command = [sys.executable, "-W", "ignore", model / "start.py"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert "0 processes: " in done.stdout, done.stdout + done.stderr[-4000:]
    assert said in done.stdout
    assert "EngineCore" not in done.stdout + done.stderr
