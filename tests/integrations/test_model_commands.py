"""``kvpack generate`` and ``kvpack eval``: what is printed where, JSON, exit codes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file
from tiny_text_model import TEMPLATE, write_model, write_novel, write_tokenizer
from typer.testing import CliRunner

import kvpack
from kvpack.cli import app, printing

OK, USAGE, NO_DEVICE, INTERRUPTED = 0, 2, 5, 130


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_model(tmp_path_factory.mktemp("models") / "tiny")
    write_tokenizer(directory, template=TEMPLATE)
    return directory


@pytest.fixture(scope="module")
def novel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_novel(tmp_path_factory.mktemp("text"))


def run(*arguments: object, code: int = OK, given: str | None = None) -> Any:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=given, catch_exceptions=True)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def run_json(*arguments: object, code: int = OK) -> dict[str, Any]:
    result = run(*arguments, "--json", code=code)
    report = json.loads(result.stdout, parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"))
    assert isinstance(report, dict)
    assert report["ok"] is (code == OK)
    return report


def test_generate(model: Path) -> None:
    shown = run("generate", model, "--prompt", "the old house", "--max-new-tokens", 8)
    report = run_json("generate", model, "--prompt", "the old house", "--max-new-tokens", 8)
    assert shown.stdout == report["texts"][0] + "\n"
    assert shown.stderr.startswith("kvpack: ")
    assert re.search(r" tokens/s, loaded in \d+\.\d+ s, weights ", shown.stderr)
    assert report["load_seconds"] > 0
    assert f"{report['prompt_tokens']} prompt tokens, {report['new_tokens']} new, prefill " in shown.stderr
    assert set(report) == {
        "ok", "texts", "prompt_tokens", "new_tokens", "prefill_seconds", "tokens_per_second", "weights", "kv_bytes",
        "kv_bytes_16_bit", "peak_memory_bytes", "interrupted", "context_tokens", "saved_tokens", "saved_bytes",
        "shared_tokens", "load_seconds",
    }  # fmt: skip
    assert set(report["weights"]) == {"weights", "bytes", "dense_bytes"}


def test_generate_several_prompts(model: Path) -> None:
    alone = run_json("generate", model, "--prompt", "rain", "--max-new-tokens", 4)
    both = run("generate", model, "--prompt", "the old house", "--prompt", "rain", "--max-new-tokens", 4)
    assert both.stdout.startswith("--- prompt 1\n")
    assert both.stdout.endswith(f"--- prompt 2\n{alone['texts'][0]}\n")


def test_generate_reads_prompts(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("rain", encoding="utf-8")
    expected = run("generate", model, "--prompt", "rain", "--max-new-tokens", 4).stdout
    assert run("generate", model, "--prompt-file", file, "--max-new-tokens", 4).stdout == expected
    assert run("generate", model, "--prompt-file", "-", "--max-new-tokens", 4, given="rain").stdout == expected


def test_generate_chat(model: Path) -> None:
    chat = run_json("generate", model, "--chat", "--system", "be old", "--prompt", "rain", "--max-new-tokens", 4)
    whole = "[system] be old\n[user] rain\n[assistant] "
    assert chat["texts"] == run_json("generate", model, "--prompt", whole, "--max-new-tokens", 4)["texts"]


def test_generate_interrupted(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    monkeypatch.setattr(transformers.LlamaModel, "forward", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    shown = run("generate", model, "--prompt", "rain", code=INTERRUPTED)
    assert "kvpack: interrupted; " in shown.stderr
    assert "0 new, prefill – s" in shown.stderr


def test_eval(model: Path, novel: Path) -> None:
    options = ("--text", novel, "--context", 32, "--windows", 3)
    report = run_json("eval", model, model, "--against", model, *options)
    assert set(report) == {
        "ok", "text", "context", "windows", "windows_available", "scored_tokens", "begins_with", "device", "models",
        "original", "command", "kvpack", "date", "commit", "package_changed_since_commit", "cpu", "cores",
        "load_at_start", "python", "versions",
    }  # fmt: skip
    assert len(report["models"]) == 2
    first = report["models"][0]
    assert set(first) == {"model", "size", "weights_bytes", "dtype", "full", "stepwise", "kv_bits"}
    assert set(first["full"]) == {"perplexity", "loss", "kl", "same_top_token", "loss_increase"}
    assert set(first["full"]["kl"]) == {"value", "standard_error"}
    assert set(first["size"]) == {"bytes", "bits_per_weight", "coded_bits_per_weight"}
    assert first["size"]["bytes"] == (model / "model.safetensors").stat().st_size
    assert first["size"]["bits_per_weight"] == pytest.approx(32, abs=0.5)
    shown = run("eval", model, "--against", model, *options).stdout
    assert f"3 of {report['windows_available']} windows of 32 tokens, 93 scored, in float32" in shown
    assert "0.00000 ± 0.00000" in shown
    assert "KL" not in run("eval", model, *options).stdout


def test_rows_of_eval_are_told_apart(model: Path, novel: Path, tmp_path: Path) -> None:
    options = ("--text", novel, "--context", 32, "--windows", 1)
    itself = run("eval", model, "--against", model, *options).stdout
    assert [line.split("  ")[1] for line in itself.splitlines() if "tiny" in line] == ["tiny (original)", "tiny"]
    assert "±" not in itself  # of one window
    assert "; loss and KL(original ‖ model) in nats a token" in itself
    copy = shutil.copytree(model, tmp_path / "tiny")
    named = run("eval", copy, "--against", model, *options).stdout.split()
    assert [word for word in named if word.endswith("tiny")] == [str(model), str(copy)]


def test_progress_of_eval_where_stderr_is_no_terminal(
    model: Path, novel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("eval", model, "--against", model, "--text", novel, "--context", 32, "--windows", 2)
    monkeypatch.setattr(printing, "_SECONDS_BETWEEN_LINES", 1e9)
    assert run(*options).stderr == ""
    monkeypatch.setattr(printing, "_SECONDS_BETWEEN_LINES", 0.0)
    assert run(*options).stderr.splitlines() == [
        f"kvpack: eval: {tokens} of 128 tokens (tiny) …" for tokens in (32, 64, 96, 128)
    ]


def test_pages(model: Path, novel: Path) -> None:
    """--kv-bits and --kv-budget reach the cache."""
    shown = run("generate", model, "--prompt", "rain", "--max-new-tokens", 4, "--kv-bits", 16)
    assert shown.stdout == run("generate", model, "--prompt", "rain", "--max-new-tokens", 4).stdout
    assert " in 16 bits)" in shown.stderr
    sizes = re.findall(r"(?:weights|KV|peak memory) ([\d.]+ \w+)(?: \(([\d.]+ \w+) in 16 bits\))?", shown.stderr)
    assert len(sizes) == 3
    assert {size.split()[1] for pair in sizes for size in pair if size} == {"MB"}
    options = ("eval", model, "--text", novel, "--windows", 1, "--context", 224)
    four, two = (run_json(*options, *kv)["models"][0] for kv in (("--kv-bits", 4), ("--kv-budget", 0.6)))
    assert four["full"] == two["full"]
    assert four["stepwise"]["perplexity"] != two["stepwise"]["perplexity"] != four["full"]["perplexity"]
    assert f"tiny, KV in {four['kv_bits']:.2f} bits" in run(*options, "--kv-bits", 4).stdout


def test_eval_draws(model: Path, novel: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name, more in (("a.png", ()), ("b.png", ("--against", model))):
        done = run("eval", model, "--text", novel, "--windows", 1, "--plot", tmp_path / name, *more)
        assert f"drew {tmp_path / name}" in done.stderr
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "MODEL"), "give a --prompt or a --prompt-file"),
        (("generate", "MODEL", "--prompt", "a", "--prompt-file", "b"), "are both given"),
        (("generate", "MODEL", "--prompt", "a", "--system", "b"), "--system needs --chat"),
        (("generate", "org/name", "--prompt", "a"), "hf download org/name"),
        (("generate", "MODEL", "--prompt", "a", "--kv-bits", "4", "--kv-budget", "0.5"), "either --kv-bits or"),
        (("eval", "MODEL", "--text", "TEXT", "--kv-bits", "5"), "there are 16, 8, 4, 3, 2"),
        (("eval", "org/name", "--text", "TEXT"), "hf download org/name"),
        (("eval", "MODEL", "--text", "missing.txt"), "missing.txt does not exist"),
        (("eval", "MODEL", "--text", "TEXT", "--context", "1000"), "has positions for 320 tokens"),
    ],
)
def test_refusals(arguments: tuple[str, ...], message: str, model: Path, novel: Path) -> None:
    names = {"MODEL": str(model), "TEXT": str(novel)}
    report = run_json(*(names.get(argument, argument) for argument in arguments), code=USAGE)
    assert set(report) == {"ok", "error", "message", "exit_code"}
    assert message in report["message"]


def test_what_is_not_installed(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    shown = run("generate", model, "--prompt", "rain", code=NO_DEVICE)
    assert shown.stderr == "kvpack: kvpack generate needs transformers: pip install 'kvpack[transformers]'\n"


def test_a_config_of_another_model(model: Path, tmp_path: Path) -> None:
    """One sentence, and no traceback."""
    kvpack.compress(model, tmp_path / "coded", kvpack.QuantConfig(bits=4.25))
    config = json.loads((tmp_path / "coded" / "config.json").read_text())
    (tmp_path / "coded" / "config.json").write_text(json.dumps(config | {"intermediate_size": 192}))
    report = run_json("generate", tmp_path / "coded", "--prompt", "the old house", code=USAGE)
    assert report["error"] == "ModelMismatchError"
    assert "in the file, [192, 64] in the model" in report["message"]


def test_missing_weights_are_refused(model: Path, tmp_path: Path) -> None:
    """What has no weights would be random: an encoder, given to a command that needs a language model's head."""
    directory = tmp_path / "model"
    shutil.copytree(model, directory)
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    result = run("generate", directory, "--prompt", "a", code=USAGE)
    assert "has no weights for model.layers.1.mlp.down_proj.weight" in result.stderr


@pytest.mark.parametrize(
    ("config", "weights", "message"),
    [
        (None, None, " has no weights, neither *.safetensors nor pytorch_model*.bin"),
        (None, b"no such file", ": transformers cannot load a causal language model of it: Error while deserializing"),
        ('{"model_type": "nonesuch"}', b"", " has a model of type 'nonesuch', which transformers "),
        (
            '{"model_type": "t5"}',
            b"",
            " has a model of type 't5', of which transformers makes no causal",
        ),
        ("{}", b"", "/config.json has no model_type"),
        ("{", b"", "/config.json is no JSON"),
    ],
)
def test_directories_that_no_model_comes_of(
    config: str | None, weights: bytes | None, message: str, model: Path, tmp_path: Path
) -> None:
    directory = shutil.copytree(model, tmp_path / "model")
    (directory / "model.safetensors").unlink()
    if weights is not None:
        (directory / "model.safetensors").write_bytes(weights)
    if config is not None:
        (directory / "config.json").write_text(config)
    for command in (("generate", directory, "--prompt", "a"), ("generate", directory, "--prompt", "a", "--kv-bits", 4)):
        assert run(*command, code=USAGE).stderr.startswith(f"kvpack: {directory}{message}")


def test_threads_of_torch_do_not_spin() -> None:
    """The variable is read when torch is loaded, so that only a process of its own shows it; a user's own counts."""
    code = (
        "import os, sys; from kvpack.cli.failures import require_transformers; require_transformers('x');"
        "assert 'torch' not in sys.modules; print(os.environ['OMP_WAIT_POLICY'])"
    )
    for given, expected in (({}, "passive"), ({"OMP_WAIT_POLICY": "active"}, "active")):
        environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"} | given
        found = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
        )
        assert found.stdout == expected + "\n"
