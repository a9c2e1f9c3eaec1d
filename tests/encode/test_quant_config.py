"""``QuantConfig``: what it refuses, its JSON, and that an output says how it was made."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner

import kvpack
from kvpack import QuantConfig
from kvpack.cli import app
from kvpack.cli.compress import AllocationOption, LayoutOption, PresetOption, QuantizerOption
from kvpack.encode.quant_config import ALLOCATIONS, LAYOUTS, PRESETS, QUANTIZERS
from kvpack.encode.rates import DEFAULT_BITS
from kvpack.errors import DirectoryIndexError, InputError

DEFAULTS = {
    "bits": 4.85, "preset": None, "layout": "auto", "tile_cols": None, "allocation": "auto", "include": None,
    "exclude": None, "tensor_bits": {}, "dequantize_fp8": False, "tensor_parallel": 1,
    "stack": False, "embeddings": "keep", "calibration": None, "quantizer": "scalar",
}  # fmt: skip
OTHERS = {
    "bits": 3.5, "preset": None, "layout": "fast", "tile_cols": 96, "allocation": "model", "include": "head",
    "exclude": r"^b\.", "tensor_bits": {"up": 2.5, "down": "lossless"}, "dequantize_fp8": True,
    "tensor_parallel": 2, "stack": False, "embeddings": 3.25, "calibration": {"tokens": 4096},
    "quantizer": "scalar",
}  # fmt: skip


def test_defaults() -> None:
    config = QuantConfig()
    assert config.to_json() == DEFAULTS
    assert config.bits == DEFAULT_BITS == 4.85
    assert [QuantConfig(preset=preset).bits for preset in PRESETS] == [None, None, None]


@pytest.mark.parametrize("options", [DEFAULTS, OTHERS, {**OTHERS, "bits": None, "preset": "near-lossless"}], ids=str)
def test_json(options: dict[str, Any]) -> None:
    config = QuantConfig.from_json(options)
    text = json.dumps(config.to_json(), allow_nan=False)
    assert json.loads(text) == options
    again = QuantConfig.from_json(json.loads(text))
    assert again == config
    assert hash(again) == hash(config)
    assert list(again.tensor_bits) == list(options["tensor_bits"])  # the last that matches counts


def test_what_is_missing_has_its_default() -> None:
    assert QuantConfig.from_json({}) == QuantConfig()
    assert QuantConfig.from_json({"preset": "lossless"}) == QuantConfig(preset="lossless")


def test_numbers_have_one_form() -> None:
    config = QuantConfig(bits=np.float32(4), tile_cols=np.int64(64), tensor_bits={"a": 3})  # type: ignore[arg-type]
    assert [type(config.bits), type(config.tile_cols), type(config.tensor_bits["a"])] == [float, int, float]
    assert config == QuantConfig(bits=4.0, tile_cols=64, tensor_bits={"a": 3.0})


def test_it_does_not_change() -> None:
    rates = {"a": 3.0}
    config = QuantConfig(tensor_bits=rates)
    rates["a"] = 99.0
    config.to_json()["tensor_bits"]["a"] = 99.0
    assert config.tensor_bits == {"a": 3.0}
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.bits = 3.0  # type: ignore[misc]
    assert dataclasses.replace(config, bits=3).bits == 3.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 4, "preset": "lossless"}, "bits and preset exclude each other"),
        ({"embeddings": "drop"}, "embeddings 'drop': there are keep, code, and a rate, as 4.25"),
        ({"embeddings": 1}, "embeddings: 1 bits a weight: rates from 1.5 to 32 are possible"),
        ({"embeddings": None}, "embeddings: None bits a weight: rates from 1.5 to 32 are possible"),
        ({"bits": 1.49}, "1.49 bits a weight: rates from 1.5 to 32 are possible"),
        ({"bits": 32.1}, "32.1 bits a weight: rates from 1.5 to 32 are possible"),
        ({"bits": math.nan}, "nan bits a weight"),
        ({"bits": "4"}, "4 bits a weight"),
        ({"bits": True}, "True bits a weight"),
        ({"preset": "tiny"}, "preset 'tiny': there are near-lossless, int8-row, lossless"),
        ({"layout": "wide"}, "layout 'wide': there are auto, "),
        ({"layout": None}, "layout None: there are auto, "),
        ({"allocation": 3}, "allocation 3: there are auto, tensor, model, sensitivity"),
        ({"stack": 1}, "stack 1: there are true and false"),
        ({"stack": True, "allocation": "model"}, "stack and allocation 'model' exclude each other"),
        ({"tile_cols": 0}, "tile_cols 0: multiples of 32 from 32 to 2048 are possible"),
        ({"tile_cols": 48}, "tile_cols 48: multiples of 32"),
        ({"tile_cols": 2080}, "tile_cols 2080: multiples of 32"),
        ({"tile_cols": 64.0}, "tile_cols 64.0: multiples of 32"),
        ({"include": "("}, r"include '\(' is not a regular expression"),
        ({"exclude": "["}, r"exclude '\[' is not a regular expression"),
        ({"exclude": 5}, "exclude 5: not text"),
        ({"tensor_bits": [("a", 4)]}, r"tensor_bits \[\('a', 4\)\]: not a mapping"),
        ({"tensor_bits": {"*": 4}}, r"tensor_bits '\*' is not a regular expression"),
        ({"tensor_bits": {None: 4}}, "tensor_bits None: not text"),
        ({"tensor_bits": {"a": 33}}, "33 bits a weight"),
        ({"tensor_bits": {"a": "near-lossless"}}, "near-lossless bits a weight"),
        ({"dequantize_fp8": "yes"}, "dequantize_fp8 'yes': there are true and false"),
        ({"tensor_bits": {"a": None}}, "None bits a weight"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        QuantConfig(**options)
    with pytest.raises(InputError, match=message):
        QuantConfig.from_json(options)


def test_json_of_something_else() -> None:
    with pytest.raises(InputError, match="options group_size, x: there are bits, preset, layout"):
        QuantConfig.from_json({"bits": 4, "group_size": 128, "x": 1})
    with pytest.raises(InputError, match="options 4: not an object"):
        QuantConfig.from_json(4)  # type: ignore[arg-type]


def test_options_by_name_are_a_config(tmp_path: Path) -> None:
    values = np.random.default_rng(1).standard_normal((64, 64)).astype(np.float32)
    save_file({"a.weight": values, "b.weight": values}, tmp_path / "m.safetensors")
    reports = [
        kvpack.compress(tmp_path / "m.safetensors", tmp_path / "one", bits=3, exclude="b"),
        kvpack.compress(tmp_path / "m.safetensors", tmp_path / "two", QuantConfig(bits=3, exclude="b")),
    ]
    assert Path(reports[0].output).read_bytes() == Path(reports[1].output).read_bytes()
    with pytest.raises(InputError, match="config, and bits beside it"):
        kvpack.compress(tmp_path / "m.safetensors", tmp_path / "three", QuantConfig(), bits=3)
    with pytest.raises(TypeError, match="bitz"):
        kvpack.compress(tmp_path / "m.safetensors", tmp_path / "three", bitz=3)
    assert not (tmp_path / "three").exists()


def test_the_command_has_the_same_names() -> None:
    for names, option in ((LAYOUTS, LayoutOption), (PRESETS, PresetOption), (ALLOCATIONS, AllocationOption),
                          (QUANTIZERS, QuantizerOption)):  # fmt: skip
        assert sorted(names) == sorted(option)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    rng = np.random.default_rng(1)
    tensors = {name: rng.normal(0, 0.02, (96, 128)).astype(np.float32) for name in ("a.up", "b.down", "c.other")}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def test_a_directory_says_how_it_was_made(folder: Path, tmp_path: Path) -> None:
    """By the function and by the command; and made again from what it says, it is the same byte for byte."""
    config = QuantConfig(bits=4, layout="fast", tile_cols=64, exclude="other", tensor_bits={"up": 3})
    kvpack.compress(folder, tmp_path / "one", config)
    assert QuantConfig.from_directory(tmp_path / "one") == config
    arguments = ["--bits", "4", "--layout", "fast", "--tile-cols", "64", "--exclude", "other", "--tensor-bits", "up=3"]
    done = CliRunner().invoke(app, ["compress", str(folder), "-o", str(tmp_path / "two"), *arguments])
    assert done.exit_code == 0, done.output
    kvpack.compress(folder, tmp_path / "three", QuantConfig.from_directory(tmp_path / "two"))
    for name in ("model.safetensors", "config.json"):
        assert len({(tmp_path / made / name).read_bytes() for made in ("one", "two", "three")}) == 1
    with kvpack.open(tmp_path / "one") as reader:
        up, down, other = (reader.info(name) for name in ("a.up", "b.down", "c.other"))
    assert up is not None
    assert 2.8 < up.bits_per_weight <= 3
    assert down is not None
    assert 3.8 < down.bits_per_weight <= 4
    assert other is None
    kvpack.decompress(tmp_path / "one", tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == {"model_type": "llama"}


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        (None, InputError, r"config\.json does not say how"),
        ({}, InputError, r"config\.json does not say how"),
        ({"quantization_config": {"quant_method": "fp8", "options": {}}}, InputError, "does not say how"),
        ({"quantization_config": {"quant_method": "kvpack"}}, InputError, "does not say how"),
        (
            {"quantization_config": {"quant_method": "kvpack", "options": {"bits": 99}}},
            InputError,
            r"config\.json: 99 bits a weight",
        ),
        (
            {"quantization_config": {"quant_method": "kvpack", "options": [4]}},
            InputError,
            r"config\.json: options \[4\]: not an object",
        ),
        ([], DirectoryIndexError, "not a JSON object"),
    ],
)
def test_directories_that_do_not_say(config: object, error: type[Exception], message: str, tmp_path: Path) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(error, match=message):
        QuantConfig.from_directory(tmp_path)


def test_a_directory_without_options_is_read(folder: Path, tmp_path: Path) -> None:
    """As earlier versions wrote them."""
    kvpack.compress(folder, tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    del config["quantization_config"]["options"]
    path.write_text(json.dumps(config))
    assert kvpack.verify(tmp_path / "out", folder).mismatches == {}
    kvpack.decompress(tmp_path / "out", tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == {"model_type": "llama"}


def test_several_patterns_have_one_form() -> None:
    config = QuantConfig(include=["a", "b", "a"], exclude=["c"])
    assert (config.include, config.exclude) == (("a", "b"), "c")
    assert json.loads(json.dumps(config.to_json()))["include"] == ["a", "b"]
    assert QuantConfig.from_json(config.to_json()) == config
    assert hash(QuantConfig.from_json(config.to_json())) == hash(config)
    assert QuantConfig(include=[]) == QuantConfig(include=()) == QuantConfig()
    for value, message in (("(", "include '\\(' is not a regular"), (5, "include 5: not text"), (b"a", "not text")):
        with pytest.raises(InputError, match=message):
            QuantConfig(include=["a", value])  # type: ignore[list-item]
    with pytest.raises(InputError, match="not text"):
        QuantConfig(include={"a": 1})  # type: ignore[arg-type]
