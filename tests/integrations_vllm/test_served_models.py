"""Real models, compressed and served, beside what ``kvpack decompress`` gives back: the same greedy tokens in fp32."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed: scripts/test-vllm has it in an environment", allow_module_level=True)

from coded_models import difference, run

import kvpack

TEXTS = [
    "The sea was calm that morning, and",
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of",
    "Once upon a time",
]
TOKENS = 24
# SmolLM2's output layer is the embedding, that of books-27m too: coded with all else.
OPTIONS: list[dict[str, Any]] = [{"bits": 4.25}, {"bits": 4.25, "embeddings": "code"}]


@pytest.mark.model
@pytest.mark.parametrize("options", OPTIONS, ids=["embeddings plain", "embeddings coded"])
@pytest.mark.parametrize("variable", ["KVPACK_SMOLLM2_MODEL", "KVPACK_BOOKS_MODEL"])
def test_the_same_as_decompressed(variable: str, options: dict[str, Any], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    if variable not in os.environ:
        pytest.skip(f"{variable} is not set")
    original, coded, plain = Path(os.environ[variable]), tmp_path / "coded", tmp_path / "plain"
    report = kvpack.compress(original, coded, **options)
    kvpack.decompress(coded, plain, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(original)
    prompts = [tokenizer(text)["input_ids"] for text in TEXTS]
    asked = {"prompts": prompts, "tokens": TOKENS, "logprobs": 0}
    said = run(tmp_path, [asked | {"model": str(plain)}, asked | {"model": str(coded), "ask": True}])
    assert difference(*said) < 1e-3
    blob_bytes = json.loads((coded / "config.json").read_text())["quantization_config"]["blob_bytes"]
    assert len(blob_bytes) == sum(tensor.method != "keep" for tensor in report.tensors)
    assert said[1]["ranks"][0]["coded_bytes"] == pytest.approx(sum(blob_bytes.values()), rel=0.02)
