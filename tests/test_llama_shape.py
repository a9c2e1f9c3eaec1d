"""benchmarks/llama_shape.py on the CPU, with a tiny shape: what it compares is the same model."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

torch = pytest.importorskip("torch")
FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(FOLDER)
    import llama_shape

    yield llama_shape
    torch.set_grad_enabled(True)


def run(script: ModuleType, monkeypatch: pytest.MonkeyPatch, path: Path, *options: str) -> Any:
    arguments = ["--shape", "tiny", "--device", "cpu", "--no-compile", "--context", "9", "--layers", "2"]
    monkeypatch.setattr(sys, "argv", ["llama_shape.py", *arguments, *options, "--json", str(path)])
    script.main()
    return json.loads(path.read_text())


def test_all_layouts_are_the_same_model(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run(
        script, monkeypatch, tmp_path / "found.json", "--batches", "1,3", "--weights", "fast,compact,humming-int4"
    )
    assert "humming-int4: not installed" in capsys.readouterr().err
    rows = {(row["weights"], row["batch"]): row for row in found["rows"]}
    assert list(rows) == [(name, batch) for batch in (1, 3) for name in ("bf16", "fast", "compact")]
    for (name, batch), row in rows.items():
        assert row["error"] is None
        assert row["relative_error"] < 0.02
        assert row["tokens_per_s"] == pytest.approx(1e6 * batch / row["us"])
        assert row["ratio_to_dense"] == pytest.approx(rows["bf16", batch]["us"] / row["us"])
        assert row["bits_per_weight"] == 16 if name == "bf16" else 4 < row["bits_per_weight"] < 8
    assert {"command", "commit", "device", "versions"} <= found.keys()


@pytest.mark.parametrize("matrix", ["qkv", "o", "gate_up", "down"])
def test_other_weights_are_seen(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, matrix: str
) -> None:
    """Where one matrix of a layout is another, its time is not given."""
    coded, shape = script.coded, script.SHAPES["tiny"].matrices()[matrix]

    def wrong(source: Any, layout: str, dtype: Any) -> Any:
        if source.integers.shape == shape:
            source = script.Source(source.integers.flip(0), source.scales)
        return coded(source, layout, dtype)

    monkeypatch.setattr(script, "coded", wrong)
    found = run(script, monkeypatch, tmp_path / "found.json", "--batches", "2", "--weights", "bf16,fast")
    dense, fast = found["rows"]
    assert dense["us"] is not None
    assert fast["us"] is None
    assert "WrongResult" in fast["error"]
