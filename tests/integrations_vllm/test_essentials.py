"""The least that has to run in vLLM: ``scripts/test-vllm --short`` runs this, the server, and a model on two ranks."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed: scripts/test-vllm has it in an environment", allow_module_level=True)

from coded_models import TOLERANCE, both, difference, make, run

# Two blocks of 128 tokens, and some more. In bf16 the first two tokens of each step differ by 0.2 and more.
PROMPT = [3 + (17 * place * place + place) % 150 for place in range(300)]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """In one process the plain model, the coded one, and that without and with the connector; in another one that with
    the connector once more."""
    model = make(tmp_path_factory.mktemp("essentials"), "llama", bits=4.25, embeddings="code")
    plain, coded = both(model)
    longer = {"dtype": "bfloat16", "max_model_len": 512}
    transfer = {
        "kv_connector": "KVPackConnector",
        "kv_connector_module_path": "kvpack.integrations.vllm.kv_connector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"directory": str(model / "kept")},
    }
    without = {"model": str(model / "coded"), "prompts": [PROMPT], "tokens": 8, "engine": longer}
    connected = without | {"engine": longer | {"kv_transfer_config": transfer}}
    return run(model, [plain, coded, without, connected]) + run(model, [connected])


def test_a_model_as_it_is_when_plain(results: list[dict[str, Any]]) -> None:
    assert difference(results[0], results[1]) < TOLERANCE
    assert results[1]["ranks"][0]["layers"] == 10


def test_prompts_outlive_the_engine(results: list[dict[str, Any]]) -> None:
    """Saved, found by a new engine, and the same tokens come of them."""
    without, first, second = results[2:]
    assert [said["cached_tokens"] for said in (first, second)] == [[0], [256]]
    assert first["tokens"] == second["tokens"] == without["tokens"]
