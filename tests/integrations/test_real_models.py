"""Real models through from_pretrained: books-27m, SmolLM2-135M-Instruct and MiniLM, by environment variables."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import kvpack  # noqa: E402
from kvpack.runtime.weights.linear import RansLinear  # noqa: E402

# Variable → class, layers that stay coded.
MODELS: dict[str, tuple[str, int]] = {
    "KVPACK_BOOKS_MODEL": ("AutoModelForCausalLM", 56),
    "KVPACK_SMOLLM2_MODEL": ("AutoModelForCausalLM", 210),
    "KVPACK_MINILM_MODEL": ("AutoModel", 37),
}


@pytest.mark.model
@pytest.mark.parametrize("variable", MODELS)
def test_real_model(tmp_path: Path, variable: str) -> None:
    path = os.environ.get(variable)
    if not path:
        pytest.skip(f"{variable} is not set")
    class_name, layers = MODELS[variable]
    class_: Any = getattr(transformers, class_name)
    # In fp32: numbers of a bf16 checkpoint would be rounded when it is decompressed, and those of coded layers are not.
    class_.from_pretrained(path, dtype=torch.float32).save_pretrained(tmp_path / "plain")
    kvpack.compress(tmp_path / "plain", tmp_path / "coded", kvpack.QuantConfig(bits=4.25))
    kvpack.decompress(tmp_path / "coded", tmp_path / "dense")
    coded = class_.from_pretrained(tmp_path / "coded", dtype=torch.float32)
    dense = class_.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    assert sum(isinstance(module, RansLinear) for module in coded.modules()) == layers
    ids = torch.arange(5, 45).reshape(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(coded(ids)[0], dense(ids)[0], rtol=0, atol=2e-4)
    if class_name == "AutoModelForCausalLM":
        options = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False, "pad_token_id": 0}
        mask = torch.ones_like(ids)
        assert torch.equal(
            coded.generate(ids, attention_mask=mask, **options), dense.generate(ids, attention_mask=mask, **options)
        )
