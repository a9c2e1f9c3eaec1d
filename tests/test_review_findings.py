"""Regressions: each of these once lost data, lied, or ended in a traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import kvpack
from kvpack.encode import blob_decoder, jit
from kvpack.errors import DirectoryIndexError, InputError


def gaussian(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.02, shape).astype(np.float32)


def kvpack_json(*arguments: object) -> tuple[int, dict]:
    done = subprocess.run(
        [sys.executable, "-m", "kvpack", *map(str, arguments), "--json"], capture_output=True, text=True, check=False
    )
    assert done.stdout.count("\n") == 1, done.stdout + done.stderr
    return done.returncode, json.loads(done.stdout)


def test_values_near_the_end_of_fp16_do_not_become_infinite(tmp_path: Path) -> None:
    """At 2 bits the outermost level lies beyond 65504: such a tensor is kept."""
    weights = np.random.default_rng(1).uniform(-65504, 65504, (512, 512)).astype(np.float16)
    save_file({"a.weight": weights}, tmp_path / "m.safetensors")
    report = kvpack.compress(tmp_path / "m.safetensors", config=kvpack.QuantConfig(bits=2))
    with kvpack.open(report.output) as reader:
        assert np.isfinite(reader.dequantize("a.weight", "original").astype(np.float64)).all()


def test_one_name_in_two_shards_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    save_file({"w": gaussian(64, 64)}, folder / "a.safetensors")
    save_file({"w": gaussian(64, 64, seed=1)}, folder / "b.safetensors")
    with pytest.raises(DirectoryIndexError, match="'w'"):
        kvpack.compress(folder)
    assert not (tmp_path / "m-kvpack").exists()


def test_quantization_config_of_the_original_comes_back(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    save_file({"a.weight": gaussian(64, 128)}, folder / "model.safetensors")
    config = {"model_type": "llama", "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    (folder / "config.json").write_text(json.dumps(config))
    kvpack.compress(folder, config=kvpack.QuantConfig(preset="lossless"))
    packed = json.loads((tmp_path / "m-kvpack" / "config.json").read_text())
    assert packed["quantization_config"]["quant_method"] == "kvpack"
    assert packed["quantization_config"]["original"] == config["quantization_config"]
    kvpack.decompress(tmp_path / "m-kvpack", tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == config


def test_files_that_are_not_carried_over_do_not_count(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    (folder / "original").mkdir(parents=True)
    (folder / ".git").mkdir()
    save_file({"a.weight": gaussian(256, 256)}, folder / "model.safetensors")
    for name in ("pytorch_model.bin", "original/consolidated.pth", ".git/blob"):
        (folder / name).write_bytes(bytes(1_000_000))
    (folder / "original" / "params.json").write_text("{}")
    dry = kvpack.compress(folder, config=kvpack.QuantConfig(bits=4), dry_run=True)
    report = kvpack.compress(folder, config=kvpack.QuantConfig(bits=4))
    assert report.input_bytes == (folder / "model.safetensors").stat().st_size + 2  # and params.json
    assert report.left_out == dry.left_out == ["pytorch_model.bin", "original/consolidated.pth"]
    assert report.ratio < 8
    assert dry.output_bytes == pytest.approx(report.output_bytes, rel=0.02)
    output = Path(str(report.output))
    assert sorted(p.name for p in output.rglob("*") if p.is_file()) == [
        "config.json",
        "model.safetensors",
        "params.json",
    ]


def test_a_writer_makes_nothing_that_its_reader_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blob_decoder, "FREE_ELEMENTS", 1 << 14)
    save_file({"a.weight": np.zeros((512, 1024), np.float32)}, tmp_path / "m.safetensors")
    report = kvpack.compress(tmp_path / "m.safetensors", config=kvpack.QuantConfig(bits=4))
    assert report.tensors[0].method == "keep"
    assert kvpack.verify(str(report.output)).tensors == 1


def test_kernels_compile_where_nothing_can_be_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    from numba import njit as real

    def no_place(**options: object) -> object:
        if options.get("cache"):

            def refuse(function: object) -> object:
                raise RuntimeError("cannot cache function: no locator available")

            return refuse
        return real(**options)

    monkeypatch.setattr(jit, "njit", no_place)
    assert jit.kernel(lambda x: x + 1)(np.int64(41)) == 42


@pytest.mark.parametrize(
    "arguments",
    [["compress", "--bits", "abc", "x"], ["compress"], ["bench", "codec", "--threads", "0"], ["verify", "x", "--odd"]],
)
def test_json_on_wrong_usage(arguments: list[str]) -> None:
    code, answer = kvpack_json(*arguments)
    assert code == answer["exit_code"] == 2
    assert answer["ok"] is False
    assert answer["message"]


def test_allocation_by_model_lands_on_the_rate(tmp_path: Path) -> None:
    tensors = {f"layers.{i}.weight": gaussian(512, 512, seed=i) * np.float32(1 + i) for i in range(4)}
    save_file(tensors, tmp_path / "m.safetensors")
    for bits in (2.5, 4.25, 6.0):
        report = kvpack.compress(
            tmp_path / "m.safetensors", config=kvpack.QuantConfig(bits=bits, allocation="model"), force=True
        )
        assert report.bits_per_weight is not None
        assert bits - 0.02 <= report.bits_per_weight <= bits + 0.001


def run_with_odd_name(folder: Path, *arguments: object) -> None:
    """Run kvpack where a tensor's name has control characters and markup of rich and matplotlib, and see it printed."""
    source = folder / "m.safetensors"
    if not source.exists():
        save_file({"a[/b]\x1b[31m.$\\frac$.weight": gaussian(64, 128)}, source)
    done = subprocess.run(
        [sys.executable, "-m", "kvpack", *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    assert "a[/b]\ufffd[31m" in done.stdout


def test_names_with_control_characters_and_markup(tmp_path: Path) -> None:
    run_with_odd_name(tmp_path, "compress", tmp_path / "m.safetensors", "--bits", "4", "--verbose")
    run_with_odd_name(tmp_path, "inspect", tmp_path / "m.kvpack.safetensors")


def test_drawing_names_with_control_characters_and_markup(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="kvpack inspect --plot draws with matplotlib, which is not installed")
    run_with_odd_name(tmp_path, "compress", tmp_path / "m.safetensors", "--bits", "4", "--verbose")
    run_with_odd_name(tmp_path, "inspect", tmp_path / "m.kvpack.safetensors", "--plot", tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"


def test_force_through_a_symbolic_link(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "elsewhere").mkdir()
    save_file({"a.weight": gaussian(64, 128)}, tmp_path / "m" / "model.safetensors")
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere")
    kvpack.compress(tmp_path / "m", tmp_path / "out", force=True)
    assert "a.weight_kvpack" in load_file(tmp_path / "out" / "model.safetensors")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["elsewhere", "m", "out"]


def test_force_does_not_delete_other_peoples_files(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    save_file({"a.weight": gaussian(64, 128)}, tmp_path / "m" / "model.safetensors")
    mine = tmp_path / "mine"
    mine.mkdir()
    kvpack.compress(tmp_path / "m", mine)  # empty: nothing to lose
    assert "a.weight_kvpack" in load_file(mine / "model.safetensors")
    (mine / "model.safetensors").unlink()
    (mine / "thesis.txt").write_text("three years")
    with pytest.raises(InputError, match=r"holds no \.safetensors file"):
        kvpack.compress(tmp_path / "m", mine, force=True)
    assert (mine / "thesis.txt").read_text() == "three years"


def test_force_does_not_replace_what_is_no_file(tmp_path: Path) -> None:
    save_file({"a.weight": gaussian(64, 128)}, tmp_path / "m.safetensors")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="neither a file nor a directory"):
        kvpack.compress(tmp_path / "m.safetensors", tmp_path / "pipe", force=True)
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize("option", [{"include": "nosuch"}, {"exclude": "nosuch"}, {"tensor_bits": {"nosuch": 4.0}}])
def test_a_pattern_that_matches_nothing(option: dict, tmp_path: Path) -> None:
    save_file({"a.weight": gaussian(64, 128)}, tmp_path / "m.safetensors")
    with pytest.raises(InputError, match="'nosuch' matches no tensor"):
        kvpack.compress(tmp_path / "m.safetensors", config=kvpack.QuantConfig(**option))
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_other_forms_of_weights_are_named(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK\x03\x04" + bytes(100))
    code, answer = kvpack_json("compress", tmp_path / "pytorch_model.bin")
    assert code == 3
    assert "PyTorch pickle" in answer["message"]
    code, answer = kvpack_json("compress", tmp_path)
    assert code == 3
    assert "PyTorch pickle" in answer["message"]
    (tmp_path / "pytorch_model.bin").rename(tmp_path / "model.onnx")
    code, answer = kvpack_json("compress", tmp_path)
    assert code == 2
    assert "must be converted first" in answer["message"]
