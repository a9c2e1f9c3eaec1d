"""from_pretrained on compressed directories."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from models import ARCHITECTURES  # noqa: E402

import kvpack  # noqa: E402
from kvpack.runtime.weights.linear import RansLinear  # noqa: E402


def logits(model: Any, name: str, dtype: Any = torch.float32) -> Any:
    with torch.no_grad():
        return model(**ARCHITECTURES[name].example(dtype)).logits


def coded_layers(model: Any) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, RansLinear)]


def test_load(tmp_path: Path) -> None:
    plain = ARCHITECTURES["llama"].save(tmp_path / "plain")
    kvpack.compress(plain, tmp_path / "coded", kvpack.QuantConfig(bits=4.25))
    kvpack.decompress(tmp_path / "coded", tmp_path / "dense")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "coded")
    dense = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert len(coded_layers(model)) == 14
    assert torch.equal(logits(model, "llama"), logits(dense, "llama"))
