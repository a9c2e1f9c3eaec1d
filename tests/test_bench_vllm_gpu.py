"""benchmarks/vllm_gpu.py takes no other model than it is asked for, and its tables may lack all figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("torch")

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.mark.parametrize(
    ("shape", "layers", "other"),
    [
        ("llama-3.1-8b", 12, "{'num_hidden_layers': 32}"),
        ("qwen3-30b-a3b", 32, "{'model_type': 'llama', 'hidden_size': 4096}"),
    ],
)
def test_another_model_in_the_folder_is_refused(tmp_path: Path, shape: str, layers: int, other: str) -> None:
    from vllm_gpu import make

    (tmp_path / "bf16").mkdir()
    config = {"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32}
    (tmp_path / "bf16" / "config.json").write_text(json.dumps(config))
    assert make(tmp_path, "bf16", None, "llama-3.1-8b", 32) == 0.0
    with pytest.raises(SystemExit) as refused:
        make(tmp_path, "int4", None, shape, layers)
    assert f"bf16 has {other}, not" in str(refused.value)
    assert not (tmp_path / "int4").exists()


def test_a_table_where_all_ways_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    import render_docs

    result = {"rows": [{"name": "bf16", "error": "no memory"}, {"name": "fast", "error": "no kernel"}]}
    monkeypatch.setattr(render_docs, "newest", lambda _name: result)
    monkeypatch.setattr(render_docs, "gpu_origin", lambda _result: "")
    assert render_docs.counts_of(result) == []
    assert "| `fast` | failed: no kernel |" in render_docs.vllm_gpu("vllm-gpu")()
