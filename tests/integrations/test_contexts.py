"""Contexts of transformers' models: saved, loaded, gone on from with the same tokens, and refused by other models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from integrations.generation import greedy, logits  # noqa: E402
from integrations.models import ARCHITECTURES, VOCABULARY  # noqa: E402

from kvpack import KVPackCache  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:KVPackCache. the model is in torch.float32:UserWarning")


def llama(**options: Any) -> Any:
    model = ARCHITECTURES["llama"].model(**options)
    model.set_attn_implementation("kvpack")
    return model


@pytest.fixture(scope="module")
def model() -> Any:
    return llama()


def prompt(tokens: int, seed: int = 1, rows: int = 1) -> Any:
    return torch.randint(3, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def pages(cache: Any, row: int = 0) -> list[bytes]:
    count = -(-cache.kv.length(0, row) // 64)
    return [page.numpy().tobytes() for page in cache.kv.read_pages(cache.kv.entries[:, :, row, :count])]


@pytest.mark.parametrize("options", [{}, {"formats": "INT4"}, {"formats": "INT2"}, {"budget": 0.4}])
def test_the_same_tokens_from_a_file(tmp_path: Path, model: Any, options: dict[str, Any]) -> None:
    ids = prompt(300)
    cache = KVPackCache(model.config, **options)
    logits(model, ids[:, :-1], cache)
    cache.save(tmp_path / "context", model, ids)
    loaded = KVPackCache.load(tmp_path / "context", model)
    assert pages(loaded) == pages(cache)
    assert loaded.ids.tolist() == ids[:, :-1].tolist()
    assert repr(loaded).startswith("KVPackCache(299 columns; KVCache(2 layers, 2 heads of 32")
    want = greedy(model, ids, cache, 64)
    assert greedy(model, ids, loaded, 64).tolist() == want.tolist()
    assert pages(loaded) == pages(cache)
