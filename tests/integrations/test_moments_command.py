"""``kvpack moments``: what it prints and writes, what it refuses before it reads a model, exit codes."""

from __future__ import annotations

import functools
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from safetensors.numpy import save_file
from safetensors.torch import load_file
from safetensors.torch import save_file as save_torch_file
from tiny_text_model import write_model, write_novel, write_tokenizer
from typer.testing import CliRunner

import kvpack
from kvpack.cli import app, printing
from kvpack.encode.moments import Moments
from kvpack.integrations.transformers import calibration
from kvpack.integrations.transformers.calibration_work import WorkDirectory

OK, USAGE, INTERRUPTED = 0, 2, 130


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def novel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_novel(tmp_path_factory.mktemp("text"))


def run(*arguments: object, code: int = OK) -> Any:
    result = CliRunner().invoke(app, ["moments", *map(str, arguments)], catch_exceptions=True)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def test_report(model: Path, novel: Path, tmp_path: Path) -> None:
    output = tmp_path / "m.safetensors"
    shown = run(model, "--text", novel, "-o", output, "--tokens", 100, "--window", 40, "--seed", 3)
    assert "15 tensors, 9 second moments; 120 tokens in 3 windows of 40, in float32\n" in shown.stdout
    assert f"wrote {output}, " in shown.stdout
    report = json.loads(
        run(
            *(model, "--text", novel, "-o", output, "--tokens", 100, "--window", 40, "--seed", 3, "--json", "--force")
        ).stdout
    )
    assert (report["ok"], report["tensors"], report["windows"], report["output_bytes"]) == (
        True, 15, 3, output.stat().st_size
    )  # fmt: skip
    assert {"command", "versions", "seconds", "peak_memory_bytes", "resumed"} <= report.keys()
    with Moments(output) as moments:
        assert moments.made["text"] == "novel.txt"
        assert (moments.made["seed"], moments.made["part"], moments.made["tokens"]) == (3, [0.0, 1.0], 120)
        assert moments.made["shapes"]["model.layers.1.mlp.down_proj.weight"] == [64, 128]
        assert moments.token_counts.sum() == 120
        assert not any(str(tmp_path) in str(value) for value in moments.made.values())


def test_other_numbers_of_tokens_than_asked_for_are_said(model: Path, novel: Path, tmp_path: Path) -> None:
    options = ("--text", novel, "-o", tmp_path / "m.safetensors", "--no-sensitivities", "--window", 300, "--force")
    assert "600 tokens were read, not 400: windows of 300 are whole\n" in run(model, *options, "--tokens", 400).stdout
    assert "were read" not in run(model, *options, "--tokens", 300).stdout
    report = json.loads(run(model, *options, "--tokens", 10**6, "--json").stdout)
    assert report["asked_tokens"] == 10**6
    shown = run(model, *options, "--tokens", 10**6).stdout
    assert f"{report['tokens']} tokens were read, not 1000000: the text has no more whole windows\n" in shown


_WITHOUT_TORCH = """
import sys
from kvpack.cli import app
try:
    app(sys.argv[1:])
except SystemExit as end:
    print(end.code, "torch" in sys.modules)
"""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("moments MODEL --text NONE -o OUT", "NONE does not exist"),
        ("moments MODEL --text TEXT -o TEXT --force", "is the text that is read"),
        ("moments MODEL --text TEXT -o OUT --from 0.5 --to 0.4", "name no part of a text"),
        ("moments NONE --text TEXT -o OUT", "NONE is no directory"),
        ("compress MODEL --calibrate NONE -o OUT", "NONE does not exist"),
        ("compress NONE --calibrate TEXT -o OUT", "NONE does not exist"),
        ("compress MODEL --calibrate TEXT -o TEXT", "exists already"),
        ("compress MODEL --calibrate TEXT -o OUT --preset lossless", "preset 'lossless' and calibration exclude"),
    ],
)
def test_bad_arguments_are_refused_before_torch_is_loaded(
    arguments: str, message: str, model: Path, novel: Path, tmp_path: Path
) -> None:
    names = {"MODEL": model, "TEXT": novel, "OUT": tmp_path / "out", "NONE": tmp_path / "NONE"}
    given = [str(names.get(word, word)) for word in arguments.split()]
    done = subprocess.run([sys.executable, "-c", _WITHOUT_TORCH, *given], capture_output=True, text=True, check=False)
    assert message in " ".join(done.stderr.split())
    assert done.stdout == f"{USAGE} False\n"


def test_progress_where_stderr_is_no_terminal(
    model: Path, novel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(printing, "_SECONDS_BETWEEN_LINES", 0.0)
    options = ("--text", novel, "-o", tmp_path / "m.safetensors", "--window", 20, "--tokens", 20)
    said = ("layer 1 of 2", "layer 2 of 2", "output layer", "layer 2 of 2, back", "layer 1 of 2, back")
    assert run(model, *options).stderr.splitlines() == [
        f"kvpack: moments: {20 * place} of 100 tokens through layers ({name}) …" for place, name in enumerate(said, 1)
    ]


def test_text_of_its_own(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "m.safetensors"
    shown = run(model, "--self-samples", "-o", output, "--tokens", 60, "--window", 20)
    assert "60 tokens in 3 windows of 20" in shown.stdout
    with Moments(output) as moments:
        assert moments.made["text"] is None


def test_moments_of_another_model_are_named(model: Path, novel: Path, tmp_path: Path) -> None:
    """Of the same shapes; those of a fine-tune's base are taken all the same."""
    moments = tmp_path / "m.safetensors"
    run(model, "--text", novel, "-o", moments, "--tokens", 60, "--window", 20)
    own = kvpack.compress(model, tmp_path / "own", bits=4, moments=moments)
    assert not any("other weights" in note for note in own.notes)
    tuned = tmp_path / "tuned"
    shutil.copytree(model, tuned)
    weights = load_file(tuned / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"] *= 1.01
    save_torch_file(weights, tuned / "model.safetensors", {"format": "pt"})
    arguments = ["compress", str(tuned), "--bits", "4", "--moments", str(moments), "--json"]
    result = CliRunner().invoke(app, arguments)
    (note,) = [note for note in json.loads(result.stdout)["notes"] if "other weights" in note]
    coded = sum(tensor.method == "uniform" for tensor in own.tensors)
    assert f"{moments} has moments of other weights than {tuned}: 1 of {coded} tensors differ" in note
    assert "(model.layers.1.mlp.down_proj.weight)" in note
    config = kvpack.QuantConfig.from_directory(tmp_path / "own").calibration
    assert config is not None
    assert "sampled_crc32" not in config


@pytest.fixture
def never_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object, **__: object) -> None:
        pytest.fail("the model was loaded")

    monkeypatch.setattr(calibration, "load_causal_model", load)


@pytest.mark.usefixtures("never_loaded")
class TestRefusals:
    def refused(self, *arguments: object) -> str:
        result = run(*arguments, code=USAGE)
        assert "Traceback" not in result.output
        return " ".join(result.stderr.split())

    def test_texts(self, model: Path, novel: Path, tmp_path: Path) -> None:
        output = ("-o", tmp_path / "m.safetensors")
        assert "missing.txt does not exist" in self.refused(model, "--text", tmp_path / "missing.txt", *output)
        short = tmp_path / "short.txt"
        short.write_text("", encoding="utf-8")
        told = self.refused(model, "--text", short, *output)
        assert "0 tokens, fewer than one window of 320: a longer text is needed" in told
        assert "--window" not in told
        assert "is a directory: the text is one file" in self.refused(model, "--text", tmp_path, *output)
        latin = tmp_path / "latin.txt"
        latin.write_text("caf\u00e9", encoding="latin-1")
        assert "iconv -f LATIN1 -t UTF-8" in self.refused(model, "--text", latin, *output)
        short.write_text("the river", encoding="utf-8")
        assert "fewer than one window of 320: a longer text is needed, or --window of at most" in self.refused(
            model, "--text", short, *output
        )
        binary = tmp_path / "text.bin"
        binary.write_bytes(b"\xff\xfe\x00")
        assert "is not UTF-8 text" in self.refused(model, "--text", binary, *output)
        lines = tmp_path / "lines.jsonl"
        lines.write_text('{"text": "rain"}\n{"words": "rain"}\n', encoding="utf-8")
        assert "lines.jsonl, line 2: no JSON object with a" in self.refused(model, "--text", lines, *output)
        assert "320 positions" in self.refused(model, "--text", novel, *output, "--window", 321)
        assert "name no part of a text" in self.refused(model, "--text", novel, *output, "--from", 0.5, "--to", 0.5)

    def test_ids(self, model: Path, tmp_path: Path) -> None:
        output = ("-o", tmp_path / "m.safetensors")
        (tmp_path / "words.json").write_text('["a"]', encoding="utf-8")
        assert "token ids are integers" in self.refused(model, "--text", tmp_path / "words.json", *output)
        (tmp_path / "no.json").write_text("[1, 2", encoding="utf-8")
        assert "has no token ids" in self.refused(model, "--text", tmp_path / "no.json", *output)
        np.save(tmp_path / "floats.npy", np.ones(400))
        assert "float64 [400]; token ids are integers" in self.refused(
            model, "--text", tmp_path / "floats.npy", *output
        )
        for ids, shown in ((np.arange(320) - 1, -1), (np.arange(320) // 2 + 1, 160)):
            np.save(tmp_path / "others.npy", ids)
            told = self.refused(model, "--text", tmp_path / "others.npy", *output)
            assert f"has a token {shown}, which is none of the model's 160" in told
        (tmp_path / "no.npy").write_bytes(b"text")
        assert "has no token ids" in self.refused(model, "--text", tmp_path / "no.npy", *output)
        save_file({"a": np.ones(4, np.int64), "b": np.ones(4, np.int64)}, tmp_path / "two.safetensors")
        assert "one tensor, of integers" in self.refused(model, "--text", tmp_path / "two.safetensors", *output)
        (tmp_path / "no.safetensors").write_bytes(b"text")
        assert "safetensors" in self.refused(model, "--text", tmp_path / "no.safetensors", *output)

    def test_models(self, model: Path, novel: Path, tmp_path: Path) -> None:
        text = ("--text", novel, "-o", tmp_path / "m.safetensors")
        assert "is no directory" in self.refused(tmp_path / "missing", *text)
        compressed = Path(kvpack.compress(model, tmp_path / "coded").output or "")
        assert "is compressed, and moments are of the original" in self.refused(compressed, *text)
        assert "name the directory that it was made of" in self.refused(compressed, *text)
        bert = tmp_path / "bert"
        bert.mkdir()
        (bert / "config.json").write_text('{"model_type": "vit"}', encoding="utf-8")
        assert "no causal language model" in self.refused(bert, *text)
        no_tokenizer = tmp_path / "no tokenizer"
        no_tokenizer.mkdir()
        for name in ("config.json", "model.safetensors"):
            (no_tokenizer / name).write_bytes((model / name).read_bytes())
        assert "transformers cannot load its tokenizer" in self.refused(no_tokenizer, *text)

    def test_either_a_text_or_its_own(self, model: Path, novel: Path, tmp_path: Path) -> None:
        output = ("-o", tmp_path / "m.safetensors")
        assert "either --text or --self-samples" in self.refused(model, *output)
        assert "either --text or --self-samples" in self.refused(model, "--text", novel, "--self-samples", *output)
        assert "with --self-samples there is none" in self.refused(model, "--self-samples", "--from", 0.5, *output)

    def test_inputs_are_never_replaced(self, model: Path, novel: Path, tmp_path: Path) -> None:
        directory, text = tmp_path / "model", tmp_path / "text.txt"
        shutil.copytree(model, directory)
        shutil.copy(novel, text)
        weights = directory / "model.safetensors"
        before = weights.read_bytes()
        told = self.refused(directory, "--text", text, "-o", weights, "--force")
        assert "model.safetensors is there, and no moments file: it is not replaced; name another output" in told
        for force in ((), ("--force",)):
            told = self.refused(directory, "--text", text, "-o", text, *force)
            assert "text.txt is the text that is read: name another output with -o" in told
        assert weights.read_bytes() == before
        assert text.read_bytes() == novel.read_bytes()

    def test_outputs(self, model: Path, novel: Path, tmp_path: Path) -> None:
        there = tmp_path / "there"
        there.write_bytes(b"mine")
        assert "exists already; --force" in self.refused(model, "--text", novel, "-o", there)
        assert "no moments file: it is not replaced" in self.refused(model, "--text", novel, "-o", there, "--force")
        assert there.read_bytes() == b"mine"
        assert "is a directory" in self.refused(model, "--text", novel, "-o", tmp_path, "--force")
        missing = tmp_path / "missing" / "m.safetensors"
        assert f"the directory {missing.parent} does not exist" in self.refused(model, "--text", novel, "-o", missing)


@pytest.mark.parametrize("kind", ["npy", "safetensors", "json"])
def test_token_ids(kind: str, model: Path, tmp_path: Path) -> None:
    ids = np.arange(96).reshape(2, 48) % 100
    path = tmp_path / f"ids.{kind}"
    if kind == "npy":
        np.save(path, ids.astype(np.uint16))
    elif kind == "json":
        path.write_text(json.dumps(ids.tolist()), encoding="utf-8")
    else:
        save_file({"tokens": ids.astype(np.int32)}, path)
    run(model, "--text", path, "-o", tmp_path / "m.safetensors", "--window", 24, "--from", 0.5)
    with Moments(tmp_path / "m.safetensors") as moments:
        assert moments.token_counts.tolist() == np.bincount(ids.reshape(-1)[48:], minlength=160).tolist()


def test_json_lines_and_the_token_before_a_text(tmp_path: Path) -> None:
    directory = write_model(tmp_path / "model")
    write_tokenizer(directory, begins=True)
    path = tmp_path / "lines.jsonl"
    path.write_text('{"text": "the river"}\n\n{"text": "rain"}\n' * 20, encoding="utf-8")
    run(directory, "--text", path, "-o", tmp_path / "m", "--window", 16, "--tokens", 32)
    with Moments(tmp_path / "m") as moments:
        counts = moments.token_counts
    assert counts.sum() == 32
    assert counts[0] == 2  # <s> before each of two windows
    assert counts[1] > 2  # </s> behind each document


def test_torch_is_as_it_was(model: Path, novel: Path, tmp_path: Path) -> None:
    before = torch.is_grad_enabled(), torch.get_num_threads(), torch.random.get_rng_state()
    run(model, "--text", novel, "-o", tmp_path / "m", "--window", 24, "--tokens", 48)
    assert (torch.is_grad_enabled(), torch.get_num_threads()) == before[:2]
    assert torch.equal(torch.random.get_rng_state(), before[2])


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_process_that_was_ended_goes_on(number: int, model: Path, novel: Path, tmp_path: Path) -> None:
    """By a signal when its first layer is finished; the next run gives the bytes of one that was not ended."""
    output = tmp_path / "m.safetensors"
    options = ("--text", novel, "--tokens", 600, "--window", 20, "--seed", 3)
    command = [sys.executable, "-m", "kvpack", "moments", str(model), "-o", str(output), *map(str, options)]
    # Whoever runs the tests in the background may have SIGINT ignored, and so would the process.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heed)
    work = tmp_path / ".m.safetensors.work"
    deadline = time.monotonic() + 300
    while not (work / "forward-0").exists() and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(number)
    _, errors = process.communicate(timeout=300)
    assert not output.exists()
    assert (work / "forward-0").exists()
    if number == signal.SIGINT:
        assert process.returncode == INTERRUPTED
        assert f"what is finished lies in {work}: the same command goes on from there" in errors
    else:
        assert process.returncode == -signal.SIGKILL
    assert "went on from what an earlier run had left" in run(model, "-o", output, *options).stderr
    run(model, "-o", tmp_path / "whole.safetensors", *options)
    assert output.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert not work.exists()


def test_two_runs_of_one_output(model: Path, novel: Path, tmp_path: Path) -> None:
    output = tmp_path / "m.safetensors"
    with WorkDirectory(output, {}):
        result = run(model, "--text", novel, "-o", output, "--window", 20, "--tokens", 20, code=USAGE)
    assert "another process makes" in result.stderr
    assert list(tmp_path.iterdir()) == []  # a work directory without anything finished goes


def test_numbers_that_are_not_finite(novel: Path, tmp_path: Path) -> None:
    directory = write_model(tmp_path / "model", dtype="float16")
    weights = load_file(directory / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] *= 30_000
    weights["model.layers.1.mlp.gate_proj.weight"] *= 1000
    save_torch_file(weights, directory / "model.safetensors", {"format": "pt"})
    text = ("--text", novel, "-o", tmp_path / "m.safetensors", "--window", 20, "--tokens", 40)
    result = run(directory, *text, code=USAGE)
    assert "inputs of model.layers.1.mlp.down_proj.weight are not finite: --dtype float32 may help" in result.stderr
    run(directory, *text, "--dtype", "float32")


@pytest.mark.gpu
def test_on_a_gpu(model: Path, novel: Path, tmp_path: Path) -> None:
    """In fp32 the numbers of the CPU but for rounding, twice the same bytes; on text of its own, too."""
    for source in (("--text", novel), ("--self-samples",)):
        options = (model, *source, "--window", 40, "--tokens", 200, "--dtype", "float32", "--force")
        for name, device in (("cpu", "cpu"), ("gpu", "cuda"), ("again", "cuda")):
            run(*options, "-o", tmp_path / name, "--device", device)
        assert (tmp_path / "gpu").read_bytes() == (tmp_path / "again").read_bytes()
        with Moments(tmp_path / "gpu") as ours, Moments(tmp_path / "cpu") as theirs:
            assert ours.made["device"] == "cuda"
            assert ours.made["whole_model"] is None
            assert ours.names == theirs.names
            if source == ("--self-samples",):
                assert ours.token_counts.sum() == 200
                continue  # a draw at the border of two tokens may go the other way
            for name in ours.names:
                expected = theirs.second_moment(name)
                assert np.abs(ours.second_moment(name) - expected).max() <= 1e-4 * np.abs(expected).max()
                found, wanted = ours.sensitivity(name), theirs.sensitivity(name)
                assert found is not None
                assert wanted is not None
                assert found == pytest.approx(wanted, rel=0.02, abs=1e-2 * float(wanted.max()))
