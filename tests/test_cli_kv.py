"""``kvpack kv``, and contexts of ``kvpack generate``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from integrations.tiny_text_model import TEMPLATE, write_model, write_tokenizer
from typer.testing import CliRunner

from kvpack.cli import app

OK, USAGE, CORRUPT = 0, 2, 3
LONG = "the old house was under rain and " * 20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_model(tmp_path_factory.mktemp("models") / "tiny")
    write_tokenizer(directory, template=TEMPLATE)
    return directory


def run(*arguments: object, code: int = OK, given: str | None = None) -> Any:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=given, catch_exceptions=True)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def run_json(*arguments: object, code: int = OK) -> dict[str, Any]:
    report = json.loads(run(*arguments, "--json", code=code).stdout)
    assert isinstance(report, dict)
    assert report["ok"] is (code == OK)
    return report


@pytest.mark.parametrize("bits", [16, 4])
def test_generate_goes_on_from_a_context(tmp_path: Path, model: Path, bits: int) -> None:
    """As if nothing had come between."""
    context = tmp_path / "context"
    options = ("--kv-bits", bits, "--max-new-tokens")
    whole = run_json("generate", model, "--prompt", LONG, *options, 40)
    first = run_json("generate", model, "--prompt", LONG, *options, 10, "--save-context", context)
    assert first["saved_tokens"] == first["prompt_tokens"] + 10
    assert first["saved_bytes"] == context.stat().st_size
    second = run_json("generate", model, "--load-context", context, "--max-new-tokens", 30)
    assert (second["context_tokens"], second["prompt_tokens"]) == (first["saved_tokens"], 0)
    assert first["texts"][0] + second["texts"][0] == whole["texts"][0]
    shown = run("generate", model, "--load-context", context, "--max-new-tokens", 30, "--save-context", context)
    assert shown.stdout == second["texts"][0] + "\n"
    assert f"kvpack: {first['saved_tokens']} tokens of context, 0 prompt tokens" in shown.stderr
    assert f"kvpack: saved a context of {first['saved_tokens'] + 30} tokens, " in shown.stderr


def test_inspect_and_verify(tmp_path: Path, model: Path) -> None:
    context = tmp_path / "context"
    run("generate", model, "--prompt", LONG, "--kv-bits", 4, "--max-new-tokens", 4, "--save-context", context)
    report = run_json("kv", "inspect", context)
    assert report["file_bytes"] == context.stat().st_size
    assert report["formats"] == [["INT4", "INT4"]] * 2
    shown = run("kv", "inspect", context).stdout
    assert f"{report['tokens']} tokens; 2 layers, 2 KV heads of 16, F16" in shown
    assert report["fingerprint"]["model"][:16] in shown
    assert run_json("kv", "verify", context)["intact_tokens"] == report["tokens"]
    assert run("kv", "verify", context).stdout.startswith(f"ok: {report['tokens']} tokens in 1 runs")
    damaged = bytearray(context.read_bytes())
    damaged[-100] ^= 1
    context.write_bytes(damaged)
    assert run_json("kv", "inspect", context)["tokens"] == report["tokens"]
    found = run_json("kv", "verify", context, code=CORRUPT)
    assert found["intact_tokens"] == 0
    assert found["damage"].startswith("run 0 (tokens 0")
    assert "DAMAGED: the first 0 of" in run("kv", "verify", context, code=CORRUPT).stdout
    assert run_json("generate", model, "--load-context", context, code=CORRUPT)["error"] == "DamagedRunError"
