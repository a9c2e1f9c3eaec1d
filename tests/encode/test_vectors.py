"""Column scales and row offsets: what is quantized with them decodes to the weights again, counted and checked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from independent_decoder import read_container
from safetensors.numpy import save_file
from typer.testing import CliRunner

import kvpack
from kvpack.cli import app
from kvpack.encode.compress import compress
from kvpack.encode.quant_config import QuantConfig
from kvpack.encode.report import describe
from kvpack.encode.tensor_encoder import Matrices
from kvpack.errors import InputError, ScaleError, TensorCrcError

ROWS, COLS = 192, 160
Array = npt.NDArray[Any]


def scales_of_columns(seed: int = 3, count: int = COLS) -> npt.NDArray[np.float16]:
    return np.random.default_rng(seed).lognormal(0, 1.5, count).astype(np.float16)


def by_columns(scales: Array, seed: int = 4, rows: int = ROWS) -> npt.NDArray[np.float32]:
    """Normal weights of deviation 1 times the column's scale."""
    normal = np.random.default_rng(seed).normal(size=(rows, len(scales))).astype(np.float32)
    return normal * scales.astype(np.float32)


def coded(weights: Array, folder: Path, config: QuantConfig, **vectors: Any) -> tuple[kvpack.TensorReport, Array]:
    """Compressed, checked against the original and with the independent decoder: the report, and the numbers."""
    source, out = folder / "m.safetensors", folder / "o.safetensors"
    save_file({"a.weight": weights, "b.bias": np.ones(5, np.float16)}, source)
    report = compress(source, out, config, force=True, **{key: {"a.weight": v} for key, v in vectors.items()})
    assert report.notes == []
    assert kvpack.verify(out, source).mismatches == {}
    with kvpack.open(out) as reader:
        decoded = reader.dequantize("a.weight")
        info = reader.info("a.weight")
    np.testing.assert_array_equal(decoded.view(np.uint32), read_container(out)["a.weight"].view(np.uint32))
    assert info is not None
    assert info.has_column_scales == ("column_scales" in vectors)
    assert info.has_row_offsets == ("row_offsets" in vectors)
    tensor = report.tensors[0]
    assert tensor.bits_per_weight == pytest.approx(info.bits_per_weight, abs=1e-6)
    return tensor, decoded.astype(np.float64)


def test_columns_of_unlike_size_have_like_noise(tmp_path: Path) -> None:
    """Each column's noise is that of the rate; without scales the small ones are lost."""
    scales = scales_of_columns()
    weights = by_columns(scales)
    config = QuantConfig(bits=4.5)
    tensor, decoded = coded(weights, tmp_path, config, column_scales=scales)
    assert tensor.method == "uniform"
    assert 4.4 < tensor.bits_per_weight <= 4.5
    column_db = 10 * np.log10(((decoded - weights) ** 2).sum(0) / (weights.astype(np.float64) ** 2).sum(0))
    assert column_db.max() < -20
    assert column_db.min() > -25
    measured = 10 * np.log10(((decoded - weights) ** 2).sum() / (weights.astype(np.float64) ** 2).sum())
    assert tensor.noise_db == pytest.approx(measured, abs=2e-4)
    _, plain = coded(weights, tmp_path, config)
    plain_db = 10 * np.log10(((plain - weights) ** 2).sum(0) / (weights.astype(np.float64) ** 2).sum(0))
    assert plain_db.max() > -5


def test_rows_far_from_zero(tmp_path: Path) -> None:
    offsets = np.random.default_rng(5).normal(0, 50, ROWS).astype(np.float32)
    weights = np.random.default_rng(6).normal(size=(ROWS, COLS)).astype(np.float32) + offsets[:, None]
    tensor, decoded = coded(weights, tmp_path, QuantConfig(bits=4.5), row_offsets=offsets)
    assert tensor.method == "uniform"
    assert tensor.bits_per_weight <= 4.5
    noise = 10 * np.log10(((decoded - weights) ** 2).mean())
    assert noise < -20
    plain, _ = coded(weights, tmp_path, QuantConfig(bits=4.5))
    assert plain.method == "lossless"  # no step at this rate says anything of the deviations


@pytest.mark.parametrize("preset", ["near-lossless", "int8-row"])
def test_presets(preset: str, tmp_path: Path) -> None:
    scales, offsets = scales_of_columns(7), np.linspace(-3, 3, ROWS).astype(np.float32)
    weights = (by_columns(scales, 8) / scales.astype(np.float32) + offsets[:, None]) * scales.astype(np.float32)
    tensor, decoded = coded(weights, tmp_path, QuantConfig(preset=preset), column_scales=scales, row_offsets=offsets)
    assert tensor.method == ("int8-row" if preset == "int8-row" else "uniform")
    column_db = 10 * np.log10(((decoded - weights) ** 2).sum(0) / (weights.astype(np.float64) ** 2).sum(0))
    assert column_db.max() < -35


def test_several_matrices_and_transposed_ones(tmp_path: Path) -> None:
    scales = scales_of_columns(9, 3 * 64)
    weights = np.stack([by_columns(part, 10 + i, 96) for i, part in enumerate(scales.reshape(3, 64))])
    _, decoded = coded(weights, tmp_path, QuantConfig(bits=6), column_scales=scales)
    error = ((decoded - weights) ** 2).sum(1) / (weights.astype(np.float64) ** 2).sum(1)
    assert 10 * np.log10(error.max()) < -25
    matrix = Matrices(by_columns(scales_of_columns(), 11).T, transposed=True)
    matrix.set_vectors(scales_of_columns())
    assert matrix.values(0).std(0).max() < 1.3


def test_a_common_step_for_the_model(tmp_path: Path) -> None:
    scales = scales_of_columns(12)
    config = QuantConfig(bits=4.5, allocation="model")
    tensor, _ = coded(by_columns(scales, 13), tmp_path, config, column_scales=scales)
    assert tensor.bits_per_weight <= 4.5


def test_what_is_not_quantized_goes_without(tmp_path: Path) -> None:
    weights = by_columns(scales_of_columns())
    save_file({"a.weight": weights}, tmp_path / "m.safetensors")
    vectors = {"a.weight": scales_of_columns()}
    report = compress(
        tmp_path / "m.safetensors", tmp_path / "o.safetensors", QuantConfig(preset="lossless"), column_scales=vectors
    )
    assert report.notes == ["not quantized, so without column scales and row offsets: a.weight"]
    with kvpack.open(tmp_path / "o.safetensors") as reader:
        np.testing.assert_array_equal(reader.dequantize("a.weight"), weights)


@pytest.mark.parametrize("vector", ["column_scales", "row_offsets"])
def test_what_would_become_infinite_is_not_quantized(tmp_path: Path, vector: str) -> None:
    weights = np.full((ROWS, COLS), -2e38, np.float32)
    save_file({"a.weight": weights}, tmp_path / "m.safetensors")
    vectors: dict[str, Any] = {
        "column_scales": np.full(COLS, 2.0**-14, np.float16),
        "row_offsets": np.full(ROWS, 2e38, np.float32),
    }
    given = {vector: {"a.weight": vectors[vector]}}
    report = compress(tmp_path / "m.safetensors", tmp_path / "o.safetensors", QuantConfig(bits=4), **given)
    assert "not quantized, so without column scales and row offsets: a.weight" in report.notes
    with kvpack.open(tmp_path / "o.safetensors") as reader:
        np.testing.assert_array_equal(reader.dequantize("a.weight"), weights)


@pytest.mark.parametrize(
    ("vectors", "match"),
    [
        (
            {"column_scales": np.ones(COLS, np.float32)},
            r"the column scales are float32 \[160\]; needed are float16 ",
        ),
        (
            {"column_scales": np.ones(COLS - 1, np.float16)},
            r"the column scales are float16 \[159\]; needed are float16 \[160\]",
        ),
        ({"column_scales": np.zeros(COLS, np.float16)}, "column scale 0 is 0.0"),
        ({"column_scales": np.full(COLS, np.inf, np.float16)}, "column scale 0 is inf"),
        (
            {"row_offsets": np.ones(COLS, np.float32)},
            r"the row offsets are .* \[160\]; needed are float32 \[192\]",
        ),
        ({"row_offsets": np.full(ROWS, np.nan, np.float32)}, "row offset 0 is nan"),
    ],
)
def test_vectors_that_do_not_fit(vectors: dict[str, Array], match: str, tmp_path: Path) -> None:
    save_file({"a.weight": by_columns(scales_of_columns())}, tmp_path / "m.safetensors")
    given = {key: {"a.weight": value} for key, value in vectors.items()}
    with pytest.raises(ScaleError, match=f"tensor 'a.weight': {match}"):
        compress(tmp_path / "m.safetensors", tmp_path / "o.safetensors", QuantConfig(bits=4), **given)  # type: ignore[arg-type]
    assert not (tmp_path / "o.safetensors").exists()


def test_vectors_of_no_tensor(tmp_path: Path) -> None:
    save_file({"a.weight": by_columns(scales_of_columns())}, tmp_path / "m.safetensors")
    with pytest.raises(InputError, match="there are column scales for 'b', which is no tensor of"):
        compress(tmp_path / "m.safetensors", column_scales={"b": scales_of_columns()})


def test_what_inspect_verify_and_decompress_make_of_them(tmp_path: Path) -> None:
    scales, offsets = scales_of_columns(), np.ones(ROWS, np.float32)
    coded(by_columns(scales), tmp_path, QuantConfig(bits=5), column_scales=scales, row_offsets=offsets)
    out = tmp_path / "o.safetensors"
    shown = CliRunner().invoke(app, ["inspect", str(out)]).output
    assert "uniform + column scales + row offsets" in " ".join(shown.split())
    tensor = describe(out)["tensors"][0]
    assert (tensor["column_scales"], tensor["row_offsets"]) == (True, True)
    kvpack.decompress(out, tmp_path / "d.safetensors")
    with kvpack.open(tmp_path / "d.safetensors") as plain, kvpack.open(out) as reader:
        np.testing.assert_array_equal(plain.stored("a.weight"), reader.dequantize("a.weight"))
        container = reader.container("a.weight")
        begin = container.data_begin + container.tensors["a.weight_kvpack_column_scale"].begin
        header = json.loads(out.read_bytes()[8 : container.data_begin])
    data = bytearray(out.read_bytes())
    data[begin] ^= 1
    out.write_bytes(data)
    for check in (lambda: kvpack.verify(out), lambda: kvpack.decompress(out, tmp_path / "e.safetensors")):
        with pytest.raises(TensorCrcError, match=r"a\.weight_kvpack_column_scale"):
            check()
    crcs = json.loads(header["__metadata__"]["kvpack_crc32"])
    assert crcs.keys() >= {f"a.weight_kvpack_{what}" for what in ("scale", "column_scale", "row_offset")}
