"""fp8 checkpoints: exact by default, the weights they stand for at a rate; what then becomes of scales and config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner

import kvpack
from kvpack.cli import app

E4M3 = ml_dtypes.float8_e4m3fn
Tensors = dict[str, npt.NDArray[Any]]


def checkpoint(seed: int = 0) -> tuple[Tensors, dict[str, npt.NDArray[np.float64]]]:
    """Weights of every kind of scale, in two shards' worth of names, and what they stand for."""
    rng = np.random.default_rng(seed)

    def numbers(*shape: int) -> npt.NDArray[Any]:
        return rng.normal(0, 60, shape).astype(E4M3)

    def scales(*shape: int) -> npt.NDArray[np.float32]:
        return rng.uniform(1e-4, 4e-4, shape).astype(np.float32)

    tensors = {
        "a.blocks.weight": numbers(300, 400), "a.blocks.weight_scale_inv": scales(3, 4),
        "b.rows.weight": numbers(160, 256), "b.rows.weight_scale": scales(160, 1),
        "c.one.weight": numbers(128, 192), "c.one.weight_scale": scales(1), "c.one.input_scale": scales(1),
        "d.experts": numbers(3, 160, 256), "d.experts_scale_inv": scales(3, 2, 2),
        "norm.weight": np.ones(64, ml_dtypes.bfloat16),
    }  # fmt: skip
    blocks = np.repeat(np.repeat(tensors["a.blocks.weight_scale_inv"], 128, 0), 128, 1)[:300, :400]
    experts = np.repeat(np.repeat(tensors["d.experts_scale_inv"], 128, 1), 128, 2)[:, :160, :256]
    meant = {
        "a.blocks.weight": blocks, "b.rows.weight": tensors["b.rows.weight_scale"],
        "c.one.weight": tensors["c.one.weight_scale"], "d.experts": experts,
    }  # fmt: skip
    return tensors, {name: tensors[name].astype(np.float64) * scale for name, scale in meant.items()}


def directory(folder: Path, tensors: Tensors) -> Path:
    source = folder / "model"
    source.mkdir()
    # DeepSeek's shards may part a weight from its scales.
    first = {name: values for name, values in tensors.items() if "scale" not in name}
    save_file(first, source / "model-00001-of-00002.safetensors")
    save_file({n: v for n, v in tensors.items() if n not in first}, source / "model-00002-of-00002.safetensors")
    weight_map = {name: f"model-0000{1 + (name not in first)}-of-00002.safetensors" for name in tensors}
    (source / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    quantization = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (source / "config.json").write_text(json.dumps({"model_type": "x", "quantization_config": quantization}))
    return source


@pytest.mark.parametrize("options", [{}, {"preset": "near-lossless"}, {"tensor_bits": {"norm": 4.0}}])
def test_exact_unless_a_rate_is_given(tmp_path: Path, options: dict[str, Any]) -> None:
    tensors, _ = checkpoint()
    source = directory(tmp_path, tensors)
    report = kvpack.compress(source, tmp_path / "out", **options)
    assert sum("4 tensors coded exactly" in note for note in report.notes) == 1
    with kvpack.open(tmp_path / "out") as reader:
        for name, values in tensors.items():
            assert reader.dequantize(name, "original").tobytes() == values.tobytes(), name
    assert kvpack.verify(tmp_path / "out", source).mismatches == {}
    kvpack.decompress(tmp_path / "out", tmp_path / "back")
    assert json.loads((tmp_path / "back/config.json").read_text()) == json.loads((source / "config.json").read_text())


def test_a_rate_codes_the_weights_that_are_meant(tmp_path: Path) -> None:
    tensors, meant = checkpoint()
    source = directory(tmp_path, tensors)
    report = kvpack.compress(source, tmp_path / "out", bits=5, tensor_bits={"rows": "lossless"})
    note = (
        "fp8: 4 tensors multiplied by their scales and coded as bf16; 5 tensors of scales dropped, "
        "quantization_config removed from config.json"
    )
    assert note in report.notes
    methods = {tensor.name: tensor.method for tensor in report.tensors}
    assert methods == {
        "a.blocks.weight": "uniform", "b.rows.weight": "lossless", "c.one.weight": "uniform", "d.experts": "uniform",
        "norm.weight": "keep",
    }  # fmt: skip
    with kvpack.open(tmp_path / "out") as reader:
        assert set(reader) == {*meant, "norm.weight"}
        for name, weights in meant.items():
            values = reader.dequantize(name, "original")
            assert values.dtype == ml_dtypes.bfloat16
            noise = np.mean((values.astype(np.float64) - weights) ** 2) / np.mean(weights**2)
            # bf16 alone rounds to 2^-9; five bits of a Gaussian are worth 27 dB, of blocks of unlike spread less.
            assert 10 * np.log10(noise) < (-50 if name == "b.rows.weight" else -25), name
    assert kvpack.verify(tmp_path / "out", source).mismatches == {}
    # What comes back is a plain bf16 model.
    kvpack.decompress(tmp_path / "out", tmp_path / "back")
    assert json.loads((tmp_path / "back/config.json").read_text()) == {"model_type": "x"}


def test_damage_is_found_against_the_fp8_original(tmp_path: Path) -> None:
    tensors, _ = checkpoint()
    source = directory(tmp_path, tensors)
    kvpack.compress(source, tmp_path / "out", bits=5, exclude="one")
    other = {**tensors, "c.one.weight_scale": tensors["c.one.weight_scale"] * np.float32(1.1)}
    (tmp_path / "other").mkdir()
    changed = directory(tmp_path / "other", other)
    assert kvpack.verify(tmp_path / "out", source).mismatches == {}
    assert kvpack.verify(tmp_path / "out", changed).mismatches == {"c.one.weight": "its bytes differ"}


def test_scales_of_an_unknown_shape_leave_everything_as_it_is(tmp_path: Path) -> None:
    tensors, _ = checkpoint()
    tensors = {"a.weight": tensors["a.blocks.weight"], "a.weight_scale_inv": np.ones((5, 7), np.float32)}
    save_file(tensors, tmp_path / "m.safetensors")
    report = kvpack.compress(tmp_path / "m.safetensors", bits=5)
    assert "fp8 without scales of a known shape, coded exactly: a.weight" in report.notes
    with kvpack.open(report.output) as reader:
        assert reader.dequantize("a.weight", "original").tobytes() == tensors["a.weight"].tobytes()


def test_the_line_is_printed(tmp_path: Path) -> None:
    tensors, _ = checkpoint()
    source = directory(tmp_path, tensors)
    for options, line in (([], "coded exactly, their scales kept"), (["--bits", "5"], "5 tensors of scales dropped")):
        result = CliRunner().invoke(app, ["compress", str(source), "--dry-run", *options])
        assert result.exit_code == 0, result.output
        assert line in result.output


def test_folders_and_their_configs_one_by_one(tmp_path: Path) -> None:
    """Scales are found in each set of weights, by the blocks of its folder's config.json."""
    rng = np.random.default_rng(1)
    numbers = rng.normal(0, 60, (256, 512)).astype(E4M3)
    wide, narrow = (rng.uniform(1e-4, 4e-4, shape).astype(np.float32) for shape in ((2, 4), (4, 8)))
    source = directory(tmp_path, {"a.weight": numbers, "a.weight_scale_inv": wide})
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]}, "dtype": "float8_e4m3fn"}
    for folder, scale in (("draft", narrow), ("other", wide)):
        (source / folder).mkdir()
        save_file({"a.weight": numbers, "a.weight_scale_inv": scale}, source / folder / "model.safetensors")
        (source / folder / "config.json").write_text(json.dumps(config))
    save_file({"a.weight": np.ones((256, 512), np.float32)}, source / "draft/model.fp32.safetensors")
    report = kvpack.compress(source, tmp_path / "out", bits=5)
    told = "1 tensor multiplied by its scales and coded as bf16; 1 tensor of scales dropped"
    assert [note for note in report.notes if "fp8" in note] == [
        f"fp8: {told}, quantization_config removed from config.json",
        f"draft/: fp8: {told}, quantization_config removed from config.json",
        "other/: fp8 without scales of a known shape, coded exactly: other/a.weight",
        "kept: 1 tensor of a fp8 quantization",
    ]
    with kvpack.open(tmp_path / "out") as reader:
        for name, scale, size in (("a.weight", wide, 128), ("draft/a.weight", narrow, 64)):
            weights = numbers.astype(np.float64) * np.repeat(np.repeat(scale, size, 0), size, 1)
            error = reader.dequantize(name, "float64") - weights
            assert 10 * np.log10(np.mean(error**2) / np.mean(weights**2)) < -25, name
        assert reader.dequantize("other/a.weight", "original").tobytes() == numbers.tobytes()
        assert "other/a.weight_scale_inv" in reader
        assert "draft/a.weight_scale_inv" not in reader
        assert np.all(reader.dequantize("draft/model.fp32.safetensors/a.weight") == 1)
    assert kvpack.verify(tmp_path / "out", source).mismatches == {}
    kvpack.decompress(tmp_path / "out", tmp_path / "back")
    configs = {f: json.loads((tmp_path / "back" / f / "config.json").read_text()) for f in ("draft", "other")}
    assert configs == {"draft": {"dtype": "bfloat16"}, "other": config}
    # What config.json says of the quantization is compared, too.
    (source / "other/config.json").write_text("{}")
    assert list(kvpack.verify(tmp_path / "out", source).mismatches) == ["other/config.json"]


def test_one_step_for_the_model(tmp_path: Path) -> None:
    """Weights are made when they are asked for, in the strips of every pass: the same as those of a bf16 model."""
    tensors, meant = checkpoint()
    source = directory(tmp_path, tensors)
    plain = {name: values.astype(np.float32).astype(ml_dtypes.bfloat16) for name, values in meant.items()}
    save_file(plain, tmp_path / "plain.safetensors")
    kvpack.compress(source, tmp_path / "out", bits=4, allocation="model")
    kvpack.compress(tmp_path / "plain.safetensors", tmp_path / "plain-out", bits=4, allocation="model")
    with kvpack.open(tmp_path / "out") as ours, kvpack.open(tmp_path / "plain-out") as theirs:
        for name in meant:
            assert ours.dequantize(name).tobytes() == theirs.dequantize(name).tobytes(), name
