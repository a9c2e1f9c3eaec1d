"""Row scales of embeddings: what token counts and rows' sizes give, and that rates count the scales."""

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
from kvpack.encode.blob_decoder import ParsedBlob, decode_integers
from kvpack.encode.row_decoder import decode_rows
from kvpack.encode.row_factors import row_factors
from kvpack.encode.tensor_encoder import EncodedTensor, Matrices, NotEncodableError, encode_at_bits
from kvpack.errors import InputError, ScaleError

ROWS, COLS = 700, 128
EMBEDDING, HEAD, POSITIONS = "model.embed_tokens.weight", "lm_head.weight", "transformer.wpe.weight"


def table(seed: int = 0, rows: int = ROWS, cols: int = COLS) -> npt.NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    return (0.1 * rng.standard_normal((rows, cols)) * rng.lognormal(0, 0.3, (rows, 1))).astype(np.float32)


def zipf_counts(rows: int = ROWS) -> npt.NDArray[np.int64]:
    return (20000 / np.arange(1, rows + 1) ** 1.2).astype(np.int64)


def bytes_of(encoded: EncodedTensor) -> bytes:
    return bytes(encoded.blob.front) + bytes(encoded.blob.payload)


def decoded(encoded: EncodedTensor) -> npt.NDArray[np.float32]:
    integers = decode_integers(ParsedBlob(bytes_of(encoded)))[0].astype(np.float32)
    assert encoded.scales is not None
    return integers * encoded.scales[:, None]


def encoded_with(weights: Any, factors: Any, bits: float, **options: Any) -> EncodedTensor:
    matrices = Matrices(weights)
    matrices.set_vectors(row_factors=factors)
    return encode_at_bits(matrices, bits, **options)


@pytest.mark.parametrize("bits", [3.0, 4.25, 6.0])
def test_noise_of_rows_goes_with_their_factors(bits: float) -> None:
    """A row's noise is the square of its factor times one of all rows; the rate counts 32 bits of each row."""
    factors = np.exp2(np.random.default_rng(1).uniform(-1, 1, ROWS)).astype(np.float32)
    weights = table()
    encoded = encoded_with(weights, factors, bits)
    assert encoded.scales is not None
    assert encoded.scales.shape == (ROWS,)
    assert bits - 0.02 < 8 * encoded.size_bytes / weights.size <= bits
    assert encoded.size_bytes == encoded.blob.size_bytes + 4 * ROWS
    np.testing.assert_allclose(encoded.scales / factors, encoded.scales[0] / factors[0], rtol=1e-6)
    noise = ((decoded(encoded).astype(np.float64) - weights) ** 2).mean(1) / factors.astype(np.float64) ** 2
    coarse, fine = noise[factors > 1.4].mean(), noise[factors < 0.7].mean()
    assert 10 * np.log10(coarse / fine) == pytest.approx(0, abs=0.6)
    measured = 10 * np.log10(((decoded(encoded).astype(np.float64) - weights) ** 2).sum() / (weights**2).sum())
    assert encoded.noise_db == pytest.approx(measured, abs=1e-3)


def test_scales_are_the_best_multiple_of_the_factors() -> None:
    factors = np.exp2(np.random.default_rng(1).uniform(-1, 1, ROWS)).astype(np.float32)
    weights = table()
    encoded = encoded_with(weights, factors, 3.0)

    def weighted_noise(gain: float) -> float:
        error = gain * decoded(encoded).astype(np.float64) - weights
        return float(((error / factors[:, None]) ** 2).sum())

    assert weighted_noise(1.0) < min(weighted_noise(0.99), weighted_noise(1.01))


def test_extreme_factors_are_no_reason_for_another_rate() -> None:
    """They make a tensor noisier than a plain one of the rate, as was asked for."""
    factors = np.where(np.arange(ROWS) < ROWS // 2, 1.0, 64.0).astype(np.float32)
    encoded = encoded_with(table(), factors, 4.25)
    assert 4.2 < 8 * encoded.size_bytes / (ROWS * COLS) <= 4.25
    assert encoded.noise_db is not None
    assert encoded.noise_db > -8


def test_factors_with_other_vectors() -> None:
    columns = np.random.default_rng(2).lognormal(0, 1, COLS).astype(np.float16)
    offsets = np.random.default_rng(3).normal(0, 0.5, ROWS).astype(np.float32)
    factors = np.exp2(np.random.default_rng(4).uniform(-1, 1, ROWS)).astype(np.float32)
    weights = ((table() + offsets[:, None]) * columns.astype(np.float32)).astype(np.float32)
    matrices = Matrices(weights)
    matrices.set_vectors(columns, offsets, factors)
    encoded = encode_at_bits(matrices, 5.0)
    assert 4.97 < 8 * encoded.size_bytes / weights.size <= 5.0
    ours = (decoded(encoded) + offsets[:, None]) * columns.astype(np.float32)
    measured = 10 * np.log10(((ours.astype(np.float64) - weights) ** 2).sum() / (weights.astype(np.float64) ** 2).sum())
    assert measured < -20
    assert encoded.noise_db == pytest.approx(measured, abs=1e-3)


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        (np.ones(ROWS, np.float64), r"float64 \[700\]; needed are float32 \[700\]"),
        (np.ones(ROWS - 1, np.float32), r"float32 \[699\]"),
        (np.where(np.arange(ROWS) == 3, 0, 1).astype(np.float32), "row factor 3 is 0.0"),
        (np.where(np.arange(ROWS) == 4, np.nan, 1).astype(np.float32), "row factor 4 is nan"),
    ],
)
def test_factors_that_are_refused(factors: Any, message: str) -> None:
    with pytest.raises(ScaleError, match=message):
        Matrices(table()).set_vectors(row_factors=factors)


def test_steps_beyond_the_range() -> None:
    factors = np.where(np.arange(ROWS) == 3, 1e-37, 1).astype(np.float32)
    with pytest.raises(NotEncodableError, match=r"beyond the fp32 range|largest value"):
        encoded_with(table(), factors, 4.25)


def test_counts_and_sizes() -> None:
    """Frequent tokens are finer; without counts larger rows are coarser; rows of zeros do no harm."""
    weights = table()
    weights[5] = 0
    counts = zipf_counts()
    with_counts = row_factors(Matrices(weights), counts + 1.0)
    alone = row_factors(Matrices(weights), None)
    assert with_counts is not None
    assert alone is not None
    for factors in (with_counts, alone):
        assert np.log2(factors.astype(np.float64)).mean() == pytest.approx(0, abs=1e-5)
    rms = np.sqrt((weights.astype(np.float64) ** 2).mean(1))
    rows = [0, 10, 600]
    expected = (counts[rows] + 1.0) ** -0.25 * rms[rows] ** 0.5
    np.testing.assert_allclose(with_counts[rows] / with_counts[0], expected / expected[0], rtol=1e-5)
    np.testing.assert_allclose(alone[rows] / alone[0], rms[rows] ** 2 / rms[0] ** 2, rtol=1e-5)
    assert row_factors(Matrices(np.zeros((300, 64), np.float32)), counts[:300] + 1.0) is None
    assert row_factors(Matrices(np.full((300, 64), np.nan, np.float32)), None) is None


def model(folder: Path) -> Path:
    folder.mkdir()
    tensors = {
        EMBEDDING: table(0), HEAD: table(1), POSITIONS: table(2), "model.layers.0.mlp.up_proj.weight": table(3),
        "model.embed_tokens.small": table(4, 30, 16),
    }  # fmt: skip
    save_file({name: tensor.astype(np.float16) for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


def by_name(report: kvpack.CompressReport) -> dict[str, kvpack.TensorReport]:
    return {tensor.name: tensor for tensor in report.tensors}


def test_what_is_coded(tmp_path: Path) -> None:
    source, out = model(tmp_path / "m"), tmp_path / "o"
    kept = by_name(kvpack.compress(source, out, bits=4.25))
    assert {kept[name].reason for name in (EMBEDDING, HEAD, POSITIONS)} == {"embedding"}
    coded = by_name(kvpack.compress(source, out, bits=4.25, embeddings="code", force=True))
    assert [coded[name].method for name in (EMBEDDING, HEAD, POSITIONS)] == ["uniform", "uniform", "keep"]
    for name in (EMBEDDING, HEAD):
        assert 4.2 < coded[name].bits_per_weight <= 4.25
    own = by_name(kvpack.compress(source, out, bits=4.25, embeddings=6, force=True))
    assert 5.9 < own[EMBEDDING].bits_per_weight <= 6
    assert 4.2 < own["model.layers.0.mlp.up_proj.weight"].bits_per_weight <= 4.25
    config = json.loads((out / "config.json").read_text())["quantization_config"]["options"]
    assert config["embeddings"] == 6.0
    assert kvpack.verify(out, source).mismatches == {}
    with kvpack.open(out) as reader:
        info, coded_tensor = reader.info(EMBEDDING), reader.coded(EMBEDDING)
        numbers = reader.dequantize(EMBEDDING)
    assert info is not None
    assert coded_tensor.scales is not None
    assert coded_tensor.scales.shape == (ROWS,)
    np.testing.assert_array_equal(
        numbers.view(np.uint32), read_container(out / "model.safetensors")[EMBEDDING].view(np.uint32)
    )


def test_rates_of_patterns_and_presets(tmp_path: Path) -> None:
    source, out = model(tmp_path / "m"), tmp_path / "o"
    rates = by_name(kvpack.compress(source, out, bits=4.25, embeddings="code", tensor_bits={"lm_head": 5.5}))
    assert 5.4 < rates[HEAD].bits_per_weight <= 5.5
    excluded = by_name(kvpack.compress(source, out, bits=4.25, embeddings="code", exclude="lm_head", force=True))
    assert (excluded[HEAD].method, excluded[HEAD].reason) == ("keep", "excluded")
    preset = by_name(kvpack.compress(source, out, preset="lossless", embeddings=5, force=True))
    assert [preset[name].method for name in (EMBEDDING, POSITIONS)] == ["uniform", "lossless"]
    near = by_name(kvpack.compress(source, out, preset="near-lossless", embeddings="code", force=True))
    assert near[EMBEDDING].noise_db == pytest.approx(-41.5, abs=0.6)
    whole = by_name(kvpack.compress(source, out, bits=4.25, allocation="model", embeddings="code", force=True))
    assert 4.2 < whole[EMBEDDING].bits_per_weight <= 4.25


def test_token_counts(tmp_path: Path) -> None:
    """Rows of frequent tokens are finer by the counts; tables of another vocabulary are named."""
    source, out = model(tmp_path / "m"), tmp_path / "o"
    counts = zipf_counts()
    report = kvpack.compress(source, out, bits=4.25, embeddings="code", token_counts=counts)
    assert report.notes == []
    with kvpack.open(out) as reader:
        scales = reader.coded(EMBEDDING).scales
        stored = reader.coded(EMBEDDING)
    assert scales is not None
    assert stored.shape == (ROWS, COLS)
    rms = np.sqrt((table(0).astype(np.float16).astype(np.float64) ** 2).mean(1))
    expected = (counts + 1.0) ** -0.25 * rms**0.5
    np.testing.assert_allclose(scales / scales[0], expected / expected[0], rtol=1e-4)
    report = kvpack.compress(source, out, bits=4.25, embeddings="code", token_counts=counts[:500], force=True)
    assert report.notes == [
        f"token counts are of 500 tokens; coded without them, as it has other rows: {HEAD}, {EMBEDDING}"
    ]
    for wrong in (counts[:, None], counts.astype(np.float32), counts - 100000, counts[:0]):
        with pytest.raises(InputError, match="token_counts"):
            kvpack.compress(source, out, bits=4.25, embeddings="code", token_counts=wrong, force=True)


def test_command(tmp_path: Path) -> None:
    source, out = model(tmp_path / "m"), tmp_path / "o"
    done = CliRunner().invoke(app, ["compress", str(source), "-o", str(out), "--bits", "4.25", "--embeddings", "5"])
    assert done.exit_code == 0, done.output
    assert "kept (embedding): transformer.wpe.weight" in done.output
    shown = CliRunner().invoke(app, ["inspect", str(out), "--json"])
    tensors = {tensor["name"]: tensor for tensor in json.loads(shown.stdout)["tensors"]}
    assert 4.9 < tensors[EMBEDDING]["bits_per_weight"] <= 5
    assert (tensors[EMBEDDING]["scales"], tensors["model.layers.0.mlp.up_proj.weight"]["scales"]) == (ROWS, 1)
    assert CliRunner().invoke(app, ["inspect", str(out)]).exit_code == 0
    failed = CliRunner().invoke(app, ["compress", str(source), "-o", str(out), "--embeddings", "none", "--force"])
    assert failed.exit_code == 2
    assert "embeddings 'none': there are keep, code, and a rate, as 4.25" in failed.output


@pytest.mark.parametrize(
    ("rows", "cols", "bits", "layout"), [(700, 130, 4.25, "auto"), (300, 640, 5.0, "fast"), (65, 64, 6.5, "compact")]
)
def test_rows_alone(rows: int, cols: int, bits: float, layout: str) -> None:
    """Any rows are those of the whole, whichever tiles and groups they lie in, outliers included."""
    weights = table(6, rows, cols)
    weights[rows - 1, 3] *= 200
    weights[0, cols - 1] *= 150
    encoded = encoded_with(weights, np.ones(rows, np.float32), bits, layout_name=layout, tile_cols=64)
    blob = ParsedBlob(bytes_of(encoded))
    whole = decode_integers(blob)[0]
    assert encoded.blob.outlier_count > 0
    for asked in ([0], [rows - 1], [0, 1, 31, 32, 33, rows - 1], list(range(rows)), []):
        found = decode_rows(blob, np.array(asked, np.int64))
        np.testing.assert_array_equal(found, whole[asked])
