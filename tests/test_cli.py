"""The command line end to end: exit codes, what is printed where, and what is written."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

import kvpack
from kvpack._version import __version__
from kvpack.cli import app
from kvpack.encode.progress import Progress
from kvpack.errors import OtherFilesError
from kvpack.format.container import Container

ROOT = Path(__file__).resolve().parents[1]
OK, FAILED, USAGE, CORRUPT, MISMATCH, NO_DEVICE = 0, 1, 2, 3, 4, 5
REPORT_KEYS = {
    "ok", "input", "output", "input_bytes", "output_bytes", "ratio", "bits_per_weight", "noise_db", "seconds",
    "left_out", "files", "notes", "tensors",
}  # fmt: skip
TENSOR_KEYS = {
    "name", "shape", "dtype", "method", "layout", "bits_per_weight", "entropy_bits", "noise_db", "outliers",
}  # fmt: skip

Arrays = dict[str, npt.NDArray[Any]]


def run(*arguments: object) -> Any:
    """The command in this process; what it prints to stdout and stderr is kept apart."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=True)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def run_json(*arguments: object, code: int = OK) -> dict[str, Any]:
    """The command with --json: one line on stdout, an object, whose ``ok`` fits the exit code."""
    result = run(*arguments, "--json")
    assert result.exit_code == code, result.output
    assert result.stdout.count("\n") == 1
    report = json.loads(result.stdout, parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"))
    assert report["ok"] is (code == OK)
    assert isinstance(report, dict)
    return report


def refused(*arguments: object, code: int, error: str, message: str) -> None:
    """The command fails with one sentence on stderr and nothing on stdout, and with --json with one object."""
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (code, ""), result.output
    assert result.stderr.startswith("kvpack: ")
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    report = run_json(*arguments, code=code)
    assert set(report) == {"ok", "error", "message", "exit_code"}
    assert (report["error"], report["exit_code"]) == (error, code)
    assert message in report["message"]


def process(*arguments: object) -> subprocess.CompletedProcess[str]:
    """``python -m kvpack`` as a process of its own; a first run's remark that it compiles is left out."""
    result = subprocess.run(
        [sys.executable, "-m", "kvpack", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"},
        timeout=120,
        check=False,
    )
    result.stderr = "".join(
        line for line in result.stderr.splitlines(keepends=True) if not line.startswith("compiling the CPU kernels")
    )
    return result


def weights(shape: tuple[int, ...], seed: int, spread: float = 0.02) -> npt.NDArray[np.float32]:
    return (np.random.default_rng(seed).standard_t(5, shape) * spread).astype(np.float32)


def model() -> Arrays:
    return {
        "model.embed_tokens.weight": weights((200, 96), 1).astype(ml_dtypes.bfloat16),
        "model.layers.0.mlp.up_proj.weight": weights((384, 256), 2).astype(ml_dtypes.bfloat16),
        "model.layers.0.mlp.down_proj.weight": weights((256, 384), 3, 0.05).astype(ml_dtypes.bfloat16),
        "model.layers.1.mlp.up_proj.weight": weights((128, 256), 4).astype(np.float32),
        "model.norm.weight": weights((256,), 5).astype(ml_dtypes.bfloat16),
        "steps": np.arange(5, dtype=np.int64),
    }


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file(model(), path, metadata={"format": "pt"})
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model directory: two shards, index, config, tokenizer, and what needs no copy."""
    folder = tmp_path / "tiny-model"
    folder.mkdir()
    arrays = model()
    weight_map = {}
    for number, names in enumerate((list(arrays)[:2], list(arrays)[2:]), 1):
        shard = f"model-0000{number}-of-00002.safetensors"
        save_file({name: arrays[name] for name in names}, folder / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, shard)
    index = {"metadata": {"total_size": sum(a.nbytes for a in arrays.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 256}))
    (folder / "tokenizer.json").write_text('{"é": 1}')
    (folder / "notes").mkdir()
    (folder / "notes" / "more.txt").write_text("more")
    (folder / "pytorch_model.bin").write_bytes(bytes(1000))
    (folder / ".hidden").write_text("not copied")
    return folder


def size_of(path: Path) -> int:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def input_size(folder: Path) -> int:
    """What is coded or has its like in the output: not hidden files and other forms of the weights."""
    return size_of(folder) - size_of(folder / "pytorch_model.bin") - size_of(folder / ".hidden")


def snapshot(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


# Processes of their own: what the shell sees


def test_help_and_version_as_a_process() -> None:
    result = process("--help")
    assert result.returncode == OK
    for command in ("compress", "decompress", "inspect", "verify", "bench", "tune"):
        assert command in result.stdout
    assert result.stderr == ""
    assert process("--version").stdout == f"kvpack {__version__}\n"


def test_a_round_as_processes(source: Path) -> None:
    """compress, verify, verify --against, damage, decompress: the exit codes that the shell sees."""
    output = source.with_name("model.kvpack.safetensors")
    result = process("compress", source, "--bits", 4, "--json")
    assert (result.returncode, result.stderr) == (OK, "")
    assert json.loads(result.stdout)["output"] == str(output)
    result = process("verify", output, "--against", source)
    assert (result.returncode, result.stderr) == (OK, "")
    assert result.stdout.startswith("ok: 6 tensors, 3 coded, ")
    result = process("compress", source)
    assert (result.returncode, result.stdout) == (USAGE, "")
    assert result.stderr == f"kvpack: {output} exists already; --force (force=True) replaces it\n"

    damaged = bytearray(output.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    output.write_bytes(damaged)
    result = process("verify", output)
    assert (result.returncode, result.stdout) == (CORRUPT, "")
    assert result.stderr.startswith(f"kvpack: {output}, tensor ")
    assert result.stderr.count("\n") == 1
    result = process("verify", output, "--json")
    assert result.returncode == CORRUPT
    assert json.loads(result.stdout)["error"] == "PayloadCrcError"
    assert result.stderr == ""
    result = process("verify", output.with_name("nothing.safetensors"))
    assert result.returncode == USAGE
    assert "nothing.safetensors does not exist" in result.stderr


def test_usage_as_a_process() -> None:
    for arguments in (["compress"], ["compress", "x", "--layout", "odd"], ["frobnicate"], ["verify", "x", "--no-such"]):
        result = process(*arguments)
        assert result.returncode == USAGE, arguments
        assert result.stdout == ""
        assert "Usage:" in result.stderr


# compress


@pytest.mark.parametrize("command", [[], ["compress"], ["decompress"], ["inspect"], ["verify"], ["bench"], ["tune"]])
def test_help(command: list[str]) -> None:
    result = run(*command, "--help")
    assert result.exit_code == OK
    assert "Usage:" in result.stdout
    assert run(*command, "-h").stdout == result.stdout


def test_compress_a_file(source: Path) -> None:
    report = run_json("compress", source, "--bits", 4)
    output = Path(report["output"])
    assert output == source.with_name("model.kvpack.safetensors")
    assert set(report) == REPORT_KEYS
    assert report["input_bytes"] == source.stat().st_size
    assert report["output_bytes"] == output.stat().st_size
    assert report["ratio"] == pytest.approx(report["input_bytes"] / report["output_bytes"], abs=1e-6)
    assert 0 < report["seconds"] < 60
    assert [tensor["name"] for tensor in report["tensors"]] == sorted(model())
    for tensor in report["tensors"]:
        assert set(tensor) == TENSOR_KEYS | {"bytes", "reason", "expected_kl"}
        original = model()[tensor["name"]]
        assert tensor["shape"] == list(original.shape)
        assert tensor["bits_per_weight"] == pytest.approx(8 * tensor["bytes"] / original.size, abs=1e-6)
        if ".mlp." in tensor["name"]:
            assert (tensor["method"], tensor["reason"]) == ("uniform", None)
            assert 3.9 < tensor["bits_per_weight"] <= 4
            assert tensor["entropy_bits"] < tensor["bits_per_weight"]
            assert -24 < tensor["noise_db"] < -17
        else:
            assert (tensor["method"], tensor["layout"], tensor["noise_db"]) == ("keep", None, None)
            assert tensor["bytes"] == original.nbytes
    reasons = {t["name"]: t["reason"] for t in report["tensors"] if t["method"] == "keep"}
    assert reasons == {"model.embed_tokens.weight": "embedding", "model.norm.weight": "1-D", "steps": "dtype I64"}


def test_totals_are_means_weighted_by_size(source: Path) -> None:
    report = run_json("compress", source, "--bits", 3, "--tensor-bits", "down_proj=6")
    coded = [tensor for tensor in report["tensors"] if tensor["method"] != "keep"]
    sizes = [math.prod(tensor["shape"]) for tensor in coded]
    assert len(set(sizes)) == 2
    bits = np.average([tensor["bits_per_weight"] for tensor in coded], weights=sizes)
    assert report["bits_per_weight"] == pytest.approx(bits, abs=2e-6)
    noise = np.average([10 ** (tensor["noise_db"] / 10) for tensor in coded], weights=sizes)
    assert report["noise_db"] == pytest.approx(10 * np.log10(noise), abs=2e-4)
    # An unweighted mean would be another number.
    assert abs(bits - np.mean([tensor["bits_per_weight"] for tensor in coded])) > 0.01
    inspected = run_json("inspect", report["output"])
    assert inspected["bits_per_weight"] == pytest.approx(report["bits_per_weight"], abs=2e-6)
    assert inspected["noise_db"] == pytest.approx(report["noise_db"], abs=2e-4)


def test_compress_prints_a_table_and_what_was_kept(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out [bold] name.safetensors"
    result = run("compress", source, "-o", output, "--bits", 4)
    assert result.exit_code == OK
    lines = result.stdout.replace("\n", " ")
    for text in ("kept (embedding): model.embed_tokens.weight", "kept (1-D): model.norm.weight", "times smaller"):
        assert text in lines
    assert "out [bold] name.safetensors" in lines
    assert result.stderr == ""
    report = run_json("compress", source, "-o", output, "--bits", 4, "--force")
    rows = [tensor["name"] for tensor in report["tensors"] if tensor["method"] != "keep"]
    assert len(rows) > 2
    shown, verbose = (
        [line.split() for line in run(*command).stdout.splitlines()]
        for command in (
            ("compress", source, "-o", output, "--bits", 4, "--force"),
            ("compress", source, "-o", output, "--bits", 4, "--force", "--verbose"),
        )
    )
    assert not [words for words in shown if words and words[0] in rows]
    assert [words[0] for words in verbose if words and words[0] in rows] == rows


def test_the_rate_and_the_tile_columns(source: Path, tmp_path: Path) -> None:
    for layout in ("balanced", "fast", "compact"):
        output = tmp_path / f"{layout}.safetensors"
        run_json("compress", source, "-o", output, "--bits", 5, "--layout", layout, "--tile-cols", 64)
        tensors = [t for t in run_json("inspect", output)["tensors"] if t["method"] != "keep"]
        assert {(t["layout"], t["tile_cols"]) for t in tensors} == {(layout, 64)}
        assert all(4.9 < t["bits_per_weight"] <= 5 for t in tensors)
        tiles = {t["name"]: t["tiles"] for t in tensors}
        assert tiles["model.layers.0.mlp.up_proj.weight"] == 2 * 4
        assert tiles["model.layers.0.mlp.down_proj.weight"] == 1 * 6


def test_include_exclude_and_rates_of_their_own(source: Path) -> None:
    options = ["--include", "embed", "--exclude", r"layers\.1", "--tensor-bits", "mlp=3", "--tensor-bits", "down=6.5"]
    report = run_json("compress", source, "--bits", 4, *options)
    found = {t["name"]: (t["method"], round(t["bits_per_weight"], 1)) for t in report["tensors"]}
    assert found == {
        "model.embed_tokens.weight": ("uniform", 4.0),
        "model.layers.0.mlp.up_proj.weight": ("uniform", 3.0),
        "model.layers.0.mlp.down_proj.weight": ("uniform", 6.5),
        "model.layers.1.mlp.up_proj.weight": ("keep", 32.0),
        "model.norm.weight": ("keep", 16.0),
        "steps": ("keep", 64.0),
    }


@pytest.mark.parametrize("value", ["mlp", "=4", "mlp=", "mlp=four"])
def test_malformed_rates_of_their_own(source: Path, value: str) -> None:
    result = run("compress", source, "--tensor-bits", value)
    assert (result.exit_code, result.stdout) == (USAGE, "")
    assert "is not REGEX=BITS" in result.stderr
    report = run_json("compress", source, "--tensor-bits", value, code=USAGE)
    assert report["message"] == f"'{value}' is not REGEX=BITS"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bits", "1.4"], "1.4 bits a weight: rates from 1.5 to 32 are possible"),
        (["--bits", "32.6"], "32.6 bits a weight"),
        (["--bits", "nan"], "nan bits a weight"),
        (["--bits", "4", "--preset", "lossless"], "bits and preset exclude each other"),
        (["--tile-cols", "48"], "tile_cols 48: multiples of 32"),
        (["--tile-cols", "2080"], "tile_cols 2080"),
        (["--tile-cols", "0"], "tile_cols 0"),
        (["--include", "("], "include '(' is not a regular expression"),
        (["--exclude", "["], "exclude '[' is not a regular expression"),
        (["--tensor-bits", "*=4"], "tensor_bits '*' is not a regular expression"),
        (["--tensor-bits", "mlp=99"], "99.0 bits a weight"),
    ],
)
def test_options_that_cannot_be_used(source: Path, options: list[str], message: str) -> None:
    refused("compress", source, *options, code=USAGE, error="InputError", message=message)
    assert list(source.parent.iterdir()) == [source]


def test_a_name_of_the_hub_is_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    hint = "owner/name does not exist; a model of the Hugging Face Hub is fetched first: hf download owner/name"
    refused("compress", "owner/name", code=USAGE, error="InputError", message=hint)
    (tmp_path / "owner").mkdir()  # then it is a path with a slip
    result = run("compress", "owner/name")
    assert result.exit_code == USAGE
    assert "Hugging Face" not in result.stderr


def test_a_folder_without_safetensors_says_what_else_is_read(tmp_path: Path) -> None:
    refused("compress", tmp_path, code=USAGE, error="InputError", message="also reads folders of pytorch_model*.bin")


def test_inputs_and_outputs_that_cannot_be_used(source: Path, folder: Path, tmp_path: Path) -> None:
    missing = tmp_path / "nothing.safetensors"
    refused("compress", missing, code=USAGE, error="InputError", message=f"{missing} does not exist")
    refused("decompress", missing, "-o", "x", code=USAGE, error="InputError", message="does not exist")
    refused("inspect", missing, code=USAGE, error="InputError", message=f"{missing} does not exist")
    refused("verify", missing, code=USAGE, error="InputError", message=f"{missing} does not exist")
    refused("verify", source, "--against", missing, code=USAGE, error="InputError", message=f"{missing} does not exist")
    for output, message in (
        (source, "is the input"),
        (folder, "is a directory"),
        (tmp_path / "no" / "such" / "folder", "does not exist"),
    ):
        refused("compress", source, "-o", output, "--force", code=USAGE, error="InputError", message=message)
    refused("compress", folder, "-o", source, "--force", code=USAGE, error="InputError", message="is a file")
    refused("compress", folder, "-o", tmp_path, "--force", code=USAGE, error="InputError", message="contains the input")
    text = tmp_path / "text.safetensors"
    text.write_text("no safetensors file at all")
    for command in ("compress", "inspect", "verify"):
        refused(command, text, code=CORRUPT, error="NotAContainerError", message=f"{text}: ")
    (tmp_path / "empty").mkdir()
    for arguments in (
        ["compress"],
        ["decompress", "-o", "x"],
        ["inspect"],
        ["verify"],
        ["verify", source, "--against"],
    ):
        refused(*arguments, tmp_path / "empty", code=USAGE, error="InputError", message="holds no .safetensors file")


def test_an_existing_output_is_not_touched(source: Path) -> None:
    output = source.with_name("out.safetensors")
    output.write_bytes(b"precious")
    refused("compress", source, "-o", output, code=USAGE, error="InputError", message="exists already; --force")
    assert output.read_bytes() == b"precious"
    assert run_json("compress", source, "-o", output, "--dry-run")["output"] is None
    assert output.read_bytes() == b"precious"
    run_json("compress", source, "-o", output, "--force")
    run_json("verify", output, "--against", source)
    assert sorted(source.parent.iterdir()) == [source, output]


@pytest.mark.parametrize("what", ["file", "directory"])
def test_dry_run(source: Path, folder: Path, what: str) -> None:
    path = source if what == "file" else folder
    before = snapshot(path.parent)
    report = run_json("compress", path, "--bits", 4, "--dry-run")
    assert snapshot(path.parent) == before
    assert report["output"] is None
    text = run("compress", path, "--bits", 4, "--dry-run").stdout
    assert "dry run: nothing was written" in text
    assert snapshot(path.parent) == before
    written = run_json("compress", path, "--bits", 4)
    assert report["tensors"] == written["tensors"]
    # Headers, index and configuration are estimated.
    assert report["output_bytes"] == pytest.approx(written["output_bytes"], abs=2500)


def test_the_bytes_do_not_depend_on_threads(source: Path, folder: Path) -> None:
    for options in (["--bits", "4"], ["--bits", "4", "--allocation", "model"], ["--preset", "near-lossless"]):
        outputs = []
        for threads in (1, 2, 5):
            output = source.with_name(f"out{threads}.safetensors")
            run_json("compress", source, "-o", output, "--threads", threads, "--force", *options)
            outputs.append(output.read_bytes())
        assert outputs[0] == outputs[1] == outputs[2]
    directories = []
    for threads in (1, 2):
        run_json("compress", folder, "--threads", threads, "--force")
        directories.append(snapshot(folder.with_name("tiny-model-kvpack")))
    assert directories[0] == directories[1]
    assert run("compress", source, "--threads", 0).exit_code == USAGE


def test_allocation_by_model(source: Path) -> None:
    report = run_json("compress", source, "--bits", 4, "--allocation", "model")
    found = {t["name"]: t["bits_per_weight"] for t in report["tensors"] if t["method"] != "keep"}
    # Two and a half times the spread: log2(2.5) bits more.
    difference = found["model.layers.0.mlp.down_proj.weight"] - found["model.layers.0.mlp.up_proj.weight"]
    assert difference == pytest.approx(math.log2(2.5), abs=0.2)
    assert 3.9 < report["bits_per_weight"] < 4.03


# Directories


def test_compress_a_directory(folder: Path) -> None:
    report = run_json("compress", folder, "--bits", 4)
    output = folder.with_name("tiny-model-kvpack")
    assert report["output"] == str(output)
    assert (report["input_bytes"], report["output_bytes"]) == (input_size(folder), size_of(output))
    assert report["left_out"] == ["pytorch_model.bin"]
    assert set(snapshot(output)) == {
        "config.json", "model.safetensors.index.json", "notes/more.txt", "tokenizer.json",
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
    }  # fmt: skip
    assert (output / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()

    stored: dict[str, tuple[str, int]] = {}
    for shard in sorted(output.glob("*.safetensors")):
        stored |= {name: (shard.name, array.nbytes) for name, array in load_file(shard).items()}
    index = json.loads((output / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: shard for name, (shard, _) in sorted(stored.items())}
    assert index["metadata"]["total_size"] == sum(size for _, size in stored.values())
    assert stored["model.layers.0.mlp.up_proj.weight_kvpack_scale"] == ("model-00001-of-00002.safetensors", 4)

    config = json.loads((output / "config.json").read_text())
    assert {key: config[key] for key in ("model_type", "hidden_size")} == {"model_type": "llama", "hidden_size": 256}
    assert config["quantization_config"] == {
        "quant_method": "kvpack",
        "format_version": 1,
        "options": kvpack.QuantConfig(bits=4).to_json(),
        "blob_bytes": {name: stored[f"{name}_kvpack"][1] for name in sorted(model()) if ".mlp." in name},
    }

    assert run_json("verify", output, "--against", folder)["compared"] is True
    with kvpack.open(output) as reader:
        for name, array in model().items():
            info = reader.info(name)
            if info is None:
                assert reader.dequantize(name, "original").tobytes() == array.tobytes()
            else:
                error = reader.dequantize(name).astype(np.float64) - array.astype(np.float64)
                noise = 10 * np.log10((error**2).sum() / (array.astype(np.float64) ** 2).sum())
                assert info.noise_db == pytest.approx(noise, abs=1e-4)
    refused("compress", folder, code=USAGE, error="InputError", message="exists already")


def test_a_directory_there_and_back(folder: Path, tmp_path: Path) -> None:
    output, back = tmp_path / "packed", tmp_path / "back"
    run_json("compress", folder, "-o", output, "--preset", "lossless")
    report = run_json("decompress", output, "-o", back)
    assert (report["tensors"], report["output_bytes"]) == (6, size_of(back))
    found: Arrays = {}
    for shard in sorted(back.glob("*.safetensors")):
        found |= load_file(shard)
    assert found.keys() == model().keys()
    for name, array in model().items():
        assert found[name].dtype == array.dtype
        assert found[name].tobytes() == array.tobytes()
    index = json.loads((back / "model.safetensors.index.json").read_text())
    assert index == json.loads((folder / "model.safetensors.index.json").read_text())
    assert json.loads((back / "config.json").read_text()) == json.loads((folder / "config.json").read_text())
    assert (back / "tokenizer.json").read_text() == '{"é": 1}'


def test_force_replaces_a_directory(folder: Path) -> None:
    output = folder.with_name("tiny-model-kvpack")
    run_json("compress", folder)
    before = snapshot(output)
    (output / "tokenizer.json").write_text("old")
    (output / "model-00001-of-00002.safetensors").rename(output / "earlier.safetensors")  # of another model, say
    run_json("compress", folder, "--force")
    assert snapshot(output) == before
    assert {path.name for path in folder.parent.iterdir()} == {"tiny-model", "tiny-model-kvpack"}
    back = folder.with_name("back")
    for force in ([], ["--force"]):
        run_json("decompress", output, "-o", back, *force)


@pytest.mark.parametrize(
    ("files", "listed"),
    [
        (["thesis.tex"], "1 entry that is no part of the output (thesis.tex)"),
        ([".git/HEAD", ".git/objects/ab"], f"(.git{os.sep})"),
        (["notes/mine.txt"], "(notes/mine.txt)"),
        (["tokenizer.json/mine"], f"(tokenizer.json{os.sep})"),
        (["weights.safetensors"], "(weights.safetensors)"),  # somebody's, not an earlier output
        ([f"{i}.txt" for i in range(7)], "7 entries that are no part of the output (0.txt, 1.txt, 2.txt, 3.txt, 4.txt"),
    ],
)
def test_force_deletes_nothing_but_an_earlier_output(
    folder: Path, source: Path, tmp_path: Path, files: list[str], listed: str
) -> None:
    output, packed = tmp_path / "mine", tmp_path / "packed"
    output.mkdir()
    (output / "model-00001-of-00002.safetensors").write_bytes(source.read_bytes())
    for file in files:
        (output / file).parent.mkdir(parents=True, exist_ok=True)
        (output / file).write_bytes(source.read_bytes())
    before = snapshot(tmp_path)
    refused("compress", folder, "-o", output, "--force", code=USAGE, error="OtherFilesError", message=listed)
    assert snapshot(tmp_path) == before
    run_json("compress", folder, "-o", packed)
    before = snapshot(tmp_path)
    refused("decompress", packed, "-o", output, "--force", code=USAGE, error="OtherFilesError", message=listed)
    assert snapshot(tmp_path) == before


def test_other_files_are_found_before_the_work_and_behind_it(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    run_json("compress", folder, "-o", output)
    (output / "thesis.tex").write_text("three years")
    began: list[str] = []
    progress = Progress(tensor=began.append)
    with pytest.raises(OtherFilesError, match=r"thesis\.tex"):
        kvpack.compress(folder, output, force=True, progress=progress)
    assert began == []

    (output / "thesis.tex").unlink()
    progress = Progress(tensor=lambda _: (output / "thesis.tex").write_text("three years") and None)
    with pytest.raises(OtherFilesError, match=rf"^{output} is not replaced.*thesis\.tex"):
        kvpack.compress(folder, output, force=True, progress=progress)
    assert (output / "thesis.tex").read_text() == "three years"
    assert {path.name for path in tmp_path.iterdir()} == {"tiny-model", "out"}


@pytest.mark.parametrize("place", [".", ".."])
def test_the_working_directory_is_no_output(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    output = tmp_path / "out"
    run_json("compress", folder, "-o", output)
    monkeypatch.chdir(output if place == "." else output / "notes")
    before = snapshot(tmp_path)
    refused("compress", folder, "-o", place, "--force", code=USAGE, error="InputError", message="the working directory")
    monkeypatch.chdir(folder)
    refused("compress", folder, "-o", ".", "--force", code=USAGE, error="InputError", message="is the input")
    assert snapshot(tmp_path) == before


def test_an_output_inside_the_input(folder: Path) -> None:
    """It is neither copied into itself nor counted as input."""
    before = input_size(folder)
    report = run_json("compress", folder, "-o", folder / "packed", "--bits", 4)
    assert report["input_bytes"] == before
    assert not (folder / "packed" / "packed").exists()
    run_json("verify", folder / "packed")


def test_the_default_output_lies_beside_a_link(source: Path, tmp_path: Path) -> None:
    """Model caches link names to files that are named by their hash."""
    cache = tmp_path / "snapshot"
    cache.mkdir()
    (cache / "weights.safetensors").symlink_to(source)
    report = run_json("compress", cache / "weights.safetensors")
    assert report["output"] == str(cache / "weights.kvpack.safetensors")


def test_names_of_its_own_are_refused(tmp_path: Path) -> None:
    source = tmp_path / "in.safetensors"
    for name in ("a_kvpack", "a_kvpack_scale"):
        save_file({name: np.zeros(4, np.uint8)}, source)
        refused("compress", source, code=CORRUPT, error="ContainerMetadataError", message=f"'{name}'")
    save_file({"a.weight": weights((64, 128), 1)}, source)
    run_json("compress", source, "-o", tmp_path / "out.safetensors")
    again = ("compress", tmp_path / "out.safetensors", "-o", tmp_path / "again.safetensors")
    refused(*again, code=USAGE, error="InputError", message="is compressed already")


def test_a_file_without_tensors(tmp_path: Path) -> None:
    save_file({}, tmp_path / "in.safetensors")
    report = run_json("compress", tmp_path / "in.safetensors")
    assert (report["tensors"], report["bits_per_weight"], report["noise_db"]) == ([], None, None)
    assert run_json("verify", report["output"])["tensors"] == 0
    (tmp_path / "dir").mkdir()
    save_file({}, tmp_path / "dir" / "in.safetensors")
    assert run_json("compress", tmp_path / "dir", "--dry-run")["tensors"] == []


# decompress, inspect, verify


def test_decompress_is_exact_for_lossless(source: Path, tmp_path: Path) -> None:
    packed, back = tmp_path / "packed.safetensors", tmp_path / "back.safetensors"
    report = run_json("compress", source, "-o", packed, "--preset", "lossless")
    assert {t["method"] for t in report["tensors"] if t["shape"][1:]} == {"lossless"}
    assert report["noise_db"] is None
    run_json("decompress", packed, "-o", back)
    found = load_file(back)
    for name, array in model().items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert found[name].tobytes() == array.tobytes()
    with Container(back) as container:
        assert container.metadata == {"format": "pt"}
    refused("decompress", packed, "-o", back, code=USAGE, error="InputError", message="exists already")
    run_json("decompress", packed, "-o", back, "--force", "--threads", 1)
    assert load_file(back)["steps"].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("option", "dtype"),
    [("original", None), ("float32", np.float32), ("float16", np.float16), ("bfloat16", ml_dtypes.bfloat16)],
)
def test_decompress_to_a_type(source: Path, tmp_path: Path, option: str, dtype: Any) -> None:
    packed, back = tmp_path / "packed.safetensors", tmp_path / "back.safetensors"
    run_json("compress", source, "-o", packed, "--bits", 5)
    run_json("decompress", packed, "-o", back, "--dtype", option)
    found = load_file(back)
    with kvpack.open(packed) as reader:
        for name, array in model().items():
            coded = reader.info(name) is not None
            assert found[name].dtype == (dtype if coded and dtype else array.dtype)
            expected = reader.dequantize(name).astype(found[name].dtype) if coded else array
            assert found[name].tobytes() == expected.tobytes()


def test_inspect(source: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed.safetensors"
    compressed = run_json("compress", source, "-o", packed, "--bits", 4)
    report = run_json("inspect", packed)
    assert report["coded"] == 3
    assert report["output_bytes"] == packed.stat().st_size
    by_name = {tensor["name"]: tensor for tensor in compressed["tensors"]}
    assert [tensor["name"] for tensor in report["tensors"]] == sorted(by_name)
    for tensor in report["tensors"]:
        for key in TENSOR_KEYS:
            assert tensor[key] == by_name[tensor["name"]][key], key
    one = run_json("inspect", packed, "--tensor", "model.layers.1.mlp.up_proj.weight")
    assert [tensor["name"] for tensor in one["tensors"]] == ["model.layers.1.mlp.up_proj.weight"]
    assert one["bits_per_weight"] == one["tensors"][0]["bits_per_weight"]
    refused("inspect", packed, "--tensor", "none", code=USAGE, error="InputError", message="has no tensor 'none'")
    text = run("inspect", packed).stdout
    assert "6 tensors, 3 coded" in text
    assert "uniform" in text
    ordinary = run_json("inspect", source)
    assert (ordinary["coded"], ordinary["bits_per_weight"]) == (0, None)


def test_inspect_draws(source: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    packed, picture = tmp_path / "packed.safetensors", tmp_path / "picture.png"
    run_json("compress", source, "-o", packed)
    result = run("inspect", packed, "--plot", picture)
    assert (result.exit_code, result.stderr) == (OK, f"drew {picture}\n")
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert picture.stat().st_size > 10_000
    picture.unlink()
    run_json("inspect", packed, "--plot", picture)
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    refused("inspect", source, "--plot", picture, code=USAGE, error="InputError", message="nothing to draw")


@pytest.mark.parametrize("command", [["inspect", "in"], ["bench", "linear", "--quick"]])
def test_drawing_without_matplotlib(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before anything else is done, and with the code of what is not installed."""
    monkeypatch.delitem(sys.modules, "kvpack.bench.plot", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    refused(
        *command, "--plot", "x.png", code=NO_DEVICE, error="NotInstalledError", message="pip install 'kvpack[plot]'"
    )


def test_verify_against(source: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed.safetensors"
    run_json("compress", source, "-o", packed, "--bits", 4)
    report = run_json("verify", packed, "--against", source)
    assert report == {
        "ok": True, "tensors": 6, "coded": 3, "tiles": 2 + 1 + 1, "elements": 2 * 384 * 256 + 128 * 256,
        "bytes_without_checksum": 0, "compared": True, "mismatches": {},
        "files": 0, "left_out": {}, "extra_files": [],
    }  # fmt: skip
    changed = model()
    changed["model.layers.1.mlp.up_proj.weight"] = changed["model.layers.1.mlp.up_proj.weight"] * np.float32(1.01)
    changed["model.norm.weight"] = changed["model.norm.weight"].copy()
    changed["model.norm.weight"].view(np.uint16)[7] ^= 1
    save_file(changed, source)
    report = run_json("verify", packed, "--against", source, code=MISMATCH)
    assert set(report["mismatches"]) == {"model.layers.1.mlp.up_proj.weight", "model.norm.weight"}
    assert report["mismatches"]["model.norm.weight"] == "its bytes differ"
    result = run("verify", packed, "--against", source)
    assert result.exit_code == MISMATCH
    assert result.stdout.startswith("MISMATCH: ")
    assert "kvpack: model.norm.weight: its bytes differ\n" in result.stderr


def test_damage_is_found_wherever_it_is(source: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed.safetensors"
    run_json("compress", source, "-o", packed, "--bits", 4)
    content = packed.read_bytes()
    with Container(packed) as container:
        start = len(content) - sum(tensor.size_bytes for tensor in container.tensors.values())
        blob = container.tensors["model.layers.0.mlp.up_proj.weight_kvpack"]
    for offset, error in (
        (start + blob.begin, "MagicError"),
        (start + blob.begin + 4, "VersionError"),
        (start + blob.begin + 61, "HeaderCrcError"),
        (start + blob.begin + 70, "HeaderCrcError"),
        (start + blob.begin + blob.size_bytes // 2, "PayloadCrcError"),
    ):
        damaged = bytearray(content)
        damaged[offset] ^= 0x10
        packed.write_bytes(damaged)
        refused("verify", packed, code=CORRUPT, error=error, message="model.layers.0.mlp.up_proj.weight")
        out = tmp_path / "out.safetensors"
        refused("decompress", packed, "-o", out, code=CORRUPT, error=error, message="up_proj")
        assert not out.exists()
    packed.write_bytes(content[:-1])
    refused("inspect", packed, code=CORRUPT, error="TensorTableError", message=str(packed))
    packed.write_bytes(content)
    assert {path.name for path in tmp_path.iterdir()} == {"packed.safetensors", "model.safetensors"}


@pytest.mark.parametrize("name", ["model.norm.weight", "steps", "model.layers.1.mlp.up_proj.weight_kvpack_scale"])
def test_damage_is_found_in_what_is_not_coded(source: Path, tmp_path: Path, name: str) -> None:
    packed, out = tmp_path / "packed.safetensors", tmp_path / "out.safetensors"
    run_json("compress", source, "-o", packed, "--bits", 4)
    content = bytearray(packed.read_bytes())
    with Container(packed) as container:
        end = container.tensors[name].end - sum(tensor.size_bytes for tensor in container.tensors.values())
    content[len(content) + end - 3] ^= 0x04
    packed.write_bytes(content)
    refused("verify", packed, code=CORRUPT, error="TensorCrcError", message=f"tensor {name!r}: kvpack_crc32 is 0x")
    refused("decompress", packed, "-o", out, code=CORRUPT, error="TensorCrcError", message=repr(name))
    assert not out.exists()


def test_bytes_without_a_checksum_are_counted(source: Path, tmp_path: Path) -> None:
    """A file of a writer that gave no CRCs, or not all of them, and an ordinary one."""
    packed = tmp_path / "packed.safetensors"
    run_json("compress", source, "-o", packed, "--bits", 4)
    assert "checksum" not in run("verify", packed).stdout
    with Container(packed) as container:
        sizes = {n: t.size_bytes for n, t in container.tensors.items() if not n.endswith("_kvpack")}
        metadata, arrays = container.metadata, load_file(packed)
    assert json.loads(metadata["kvpack_crc32"]).keys() == sizes.keys()
    fewer = {name: crc for name, crc in json.loads(metadata["kvpack_crc32"]).items() if name != "steps"}
    save_file(arrays, packed, metadata | {"kvpack_crc32": json.dumps(fewer)})
    assert run_json("verify", packed)["bytes_without_checksum"] == sizes["steps"] == 40
    save_file(arrays, packed, {k: v for k, v in metadata.items() if k != "kvpack_crc32"})
    assert run_json("verify", packed)["bytes_without_checksum"] == sum(sizes.values())
    size = f"{sum(sizes.values()) / 1000:.2f} KB"
    assert run("verify", packed).stdout.endswith(
        f" decoded; {size} carry no checksum: only --against finds damage there\n"
    )
    compared = run("verify", packed, "--against", source).stdout
    assert compared.endswith(f", compared with the original; {size} carry no checksum\n")
    ordinary = run_json("verify", source)
    assert ordinary["bytes_without_checksum"] == sum(array.nbytes for array in model().values())


def test_an_ordinary_files_own_metadata_stay(tmp_path: Path) -> None:
    """`kvpack_crc32` means something beside `kvpack_version` alone."""
    path, back = tmp_path / "in.safetensors", tmp_path / "back.safetensors"
    save_file({"a": np.arange(5)}, path, {"kvpack_crc32": "mine"})
    run_json("verify", path)
    run_json("decompress", path, "-o", back)
    with Container(back) as container:
        assert container.metadata == {"kvpack_crc32": "mine"}


def test_a_damaged_directory(folder: Path) -> None:
    output = folder.with_name("tiny-model-kvpack")
    run_json("compress", folder)
    index = output / "model.safetensors.index.json"
    original = index.read_text()
    index.write_text(original.replace("model-00001", "model-00003"))
    refused("verify", output, code=CORRUPT, error="DirectoryIndexError", message="does not exist")
    index.write_text(original.replace("model-00001-of-00002.safetensors", "../x.safetensors", 1))
    refused("inspect", output, code=CORRUPT, error="DirectoryIndexError", message="weight_map")
    index.write_text(original)
    (folder / "config.json").write_text("[")
    refused("compress", folder, "--force", code=CORRUPT, error="DirectoryIndexError", message="config.json")
    run_json("verify", output)


def test_a_fault_of_its_own_is_no_usage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def faulty(*_: object) -> None:
        raise KeyError("internal")

    monkeypatch.setattr("kvpack.encode.report.describe", faulty)
    result = CliRunner().invoke(app, ["inspect", str(tmp_path), "--json"])
    assert isinstance(result.exception, KeyError)
    assert result.exit_code == 1


def test_an_output_that_is_larger_is_called_so(tmp_path: Path) -> None:
    save_file({"model.norm.weight": np.ones(4, np.float32)}, tmp_path / "tiny.safetensors")
    result = run("compress", tmp_path / "tiny.safetensors", "--bits", 4)
    assert result.exit_code == OK
    assert "times larger" in result.stdout
    assert "times smaller" not in result.stdout
