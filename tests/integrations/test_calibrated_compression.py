"""``kvpack compress --calibrate``: one command from a text to a checked output."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from tiny_text_model import text, write_model
from typer.testing import CliRunner

import kvpack
from kvpack.cli import app
from kvpack.integrations.transformers import calibrated_compression
from kvpack.integrations.transformers.evaluation import Mean, evaluate

OK, USAGE = 0, 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def novel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "novel.txt"
    path.write_text(text(6000, seed=1))
    return path


def run(*arguments: object, code: int = OK) -> Any:
    result = CliRunner().invoke(app, ["compress", *map(str, arguments)], catch_exceptions=True)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def test_one_command_from_a_text(model: Path, novel: Path, tmp_path: Path) -> None:
    options = ("--bits", 4, "--calibrate", novel, "--calibration-tokens", 2048, "--embeddings", "keep")
    report = json.loads(run(model, "-o", tmp_path / "out", *options, "--json").stdout)
    calibration = report["calibration"]
    assert set(calibration["held_out_kl"]) == {"sensitivity", "tensor"}
    assert calibration["calibration_tokens"] >= 2048
    asked = f"{calibration['calibration_tokens']} tokens were read, not 2048: windows of 320 are whole"
    assert asked in report["notes"]
    best = min(calibration["held_out_kl"], key=lambda name: calibration["held_out_kl"][name]["value"])
    assert calibration["allocation"] == best
    assert kvpack.QuantConfig.from_directory(tmp_path / "out").allocation == best
    assert report["output"] == str(tmp_path / "out")
    # What is there is what was measured, and nothing else is left.
    assert sorted(os.listdir(tmp_path)) == ["out"]
    assert kvpack.verify(tmp_path / "out", model).mismatches == {}
    shown = run(model, "-o", tmp_path / "again", *options).stdout
    assert f"{calibration['held_out_tokens']} tokens held back" in shown.replace("\n", " ")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "out" / "model.safetensors"
    ).read_bytes()


def test_tokens_held_back_are_not_those_of_the_moments(
    model: Path, novel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = []
    calibrate, read_text = calibrated_compression.calibrate, calibrated_compression.read_text
    monkeypatch.setattr(
        calibrated_compression,
        "calibrate",
        lambda *a, **k: (parts.append(("moments", k["part"])), calibrate(*a, **k))[1],
    )
    monkeypatch.setattr(
        calibrated_compression, "read_text", lambda *a, **k: (parts.append(("held", k["part"])), read_text(*a, **k))[1]
    )
    calibrated_compression.compress_calibrated(
        model, tmp_path / "out", kvpack.QuantConfig(bits=4), text=novel, tokens=1024, part=(0.1, 0.9)
    )
    assert dict(parts) == {"moments": (0.1, pytest.approx(0.8)), "held": (pytest.approx(0.8), 0.9)}


def test_less_damage_than_without_a_text(model: Path, novel: Path, tmp_path: Path) -> None:
    """On tokens that nobody calibrated on, at each rate."""
    other = tmp_path / "other.txt"
    other.write_text(text(3000, seed=9))
    for bits in (2.5, 4.0):
        calibrated_compression.compress_calibrated(
            model, tmp_path / f"with{bits}", kvpack.QuantConfig(bits=bits), text=novel, tokens=4096
        )
        kvpack.compress(model, tmp_path / f"without{bits}", bits=bits)
        report = evaluate([tmp_path / f"with{bits}", tmp_path / f"without{bits}"], other, against=model, context=128)
        with_kl, without_kl = (found.full.kl for found in report.models)
        assert with_kl is not None
        assert without_kl is not None
        assert with_kl.value < without_kl.value


def test_equal_rates_are_kept_where_steps_by_sensitivity_do_worse(
    model: Path, novel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        calibrated_compression,
        "_held_out_kl",
        lambda *_: {"sensitivity": Mean(0.2, None), "tensor": Mean(0.1, None)},
    )
    report = calibrated_compression.compress_calibrated(
        model, tmp_path / "out", kvpack.QuantConfig(bits=4), text=novel, tokens=1024
    )
    assert report.allocation == "tensor"
    assert kvpack.QuantConfig.from_directory(tmp_path / "out").allocation == "tensor"
    assert all(3.5 < found.bits_per_weight <= 4 for found in report.compression.tensors if found.method == "uniform")


def test_an_allocation_that_was_asked_for_is_checked_too(model: Path, novel: Path, tmp_path: Path) -> None:
    options = ("--bits", 4, "--calibrate", novel, "--calibration-tokens", 320, "--allocation", "tensor")
    shown = " ".join(run(model, "-o", tmp_path / "out", *options).stdout.split())
    assert re.search(r"KL on \d+ tokens held back: 0\.\d{5} nats a token with equal rates, kept", shown)
    assert "steps by sensitivity" not in shown


def test_weights_are_coded_where_the_caller_says(
    model: Path, novel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And that the device is there is checked before the model reads anything."""
    asked: list[str] = []
    compress = calibrated_compression.compress

    def noted(*args: Any, device: str, **options: Any) -> Any:
        asked.append(device)
        return compress(*args, **options)

    monkeypatch.setattr(calibrated_compression, "compress", noted)
    monkeypatch.setattr(calibrated_compression, "coder_of", lambda device: asked.append(f"checked {device}"))
    arguments = (model, "-o", tmp_path / "o", "--bits", 4, "--calibrate", novel, "--calibration-tokens", 1024)
    run(*arguments, "--device", "cuda")
    assert asked == ["checked cuda", "cuda", "cuda"]


def test_text_of_its_own(model: Path, tmp_path: Path) -> None:
    report = json.loads(
        run(
            model, "-o", tmp_path / "o", "--bits", 4, "--calibrate", "self", "--calibration-tokens", 640, "--json"
        ).stdout
    )
    assert report["calibration"]["calibration_tokens"] >= 640
    config = kvpack.QuantConfig.from_directory(tmp_path / "o").calibration
    assert config is not None
    assert config["text"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--preset", "lossless"), "exclude each other"),
        (("--moments", "m.safetensors"), "exclude each other"),
        (("--dry-run",), "exclude each other"),
    ],
)
def test_options_that_exclude_one_another(
    options: tuple[str, ...], message: str, model: Path, novel: Path, tmp_path: Path
) -> None:
    done = run(model, "-o", tmp_path / "o", "--calibrate", novel, *options, code=USAGE)
    assert message in done.output.replace("\n", " ")
    assert os.listdir(tmp_path) == []


def test_what_cannot_be_calibrated_is_refused_before_a_model_is_loaded(
    model: Path, novel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrated_compression, "calibrate", lambda *_, **__: pytest.fail("a model was run"))
    single = model / "model.safetensors"
    done = run(single, "-o", tmp_path / "o", "--bits", 4, "--calibrate", novel, code=USAGE)
    assert "needs its directory" in done.output.replace("\n", " ")
    short = tmp_path / "short.txt"
    short.write_text("the old house")
    done = run(model, "-o", tmp_path / "o", "--bits", 4, "--calibrate", short, code=USAGE)
    assert "fewer than" in done.output.replace("\n", " ")
    # The last eighth has to have a window, of the model's 320 positions here.
    assert "fewer than the 2560 that it takes for one window of 320 in its part from 0.875 to 1" in " ".join(
        done.output.split()
    )
    assert "--window" not in done.output
    kvpack.compress(model, tmp_path / "there", bits=6)
    (tmp_path / "there" / "thesis.tex").write_text("")
    for options, message in (((), "exists already"), (("--force",), "thesis.tex")):
        done = run(model, "-o", tmp_path / "there", "--bits", 4, "--calibrate", novel, *options, code=USAGE)
        assert message in done.output.replace("\n", " ")
    run(model, "-o", tmp_path / "o", "--bits", 4, "--calibrate", tmp_path / "none.txt", code=USAGE)


def test_what_a_killed_process_left_is_removed(
    model: Path, novel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not while that process runs."""
    code = (
        "import os, sys; from pathlib import Path\n"
        "from kvpack.integrations.transformers import calibrated_compression as here\n"
        "here._held_out_kl = lambda *_: (print('ready', flush=True), sys.stdin.read())\n"
        "here.compress_calibrated(Path(sys.argv[1]), Path(sys.argv[3]), text=Path(sys.argv[2]), tokens=512)\n"
    )
    out = tmp_path / "out"
    command = [sys.executable, "-c", code, str(model), str(novel), str(out)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        (left,) = tmp_path.iterdir()
        assert re.fullmatch(r"\.out\.[0-9a-f]{8}\.tmp", left.name)
        kvpack.compress(model, out, bits=6)
        assert sorted(os.listdir(tmp_path)) == sorted([left.name, "out"])
        process.kill()
    monkeypatch.setattr(
        calibrated_compression,
        "_held_out_kl",
        lambda *_: {"sensitivity": Mean(0.1, None), "tensor": Mean(0.2, None)},
    )
    began = time.perf_counter()
    report = calibrated_compression.compress_calibrated(model, out, text=novel, tokens=512, force=True)
    taken = time.perf_counter() - began
    assert os.listdir(tmp_path) == ["out"]
    assert 0.8 * taken < report.compression.seconds <= taken  # of all of it


def test_an_old_output_stays_where_something_fails(
    model: Path, novel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kvpack.compress(model, tmp_path / "out", bits=6)
    before = (tmp_path / "out" / "model.safetensors").read_bytes()

    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(calibrated_compression, "_held_out_kl", fail)
    with pytest.raises(OSError, match="no space left"):
        calibrated_compression.compress_calibrated(
            model, tmp_path / "out", kvpack.QuantConfig(bits=4), text=novel, tokens=1024, force=True
        )
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    assert os.listdir(tmp_path) == ["out"]
