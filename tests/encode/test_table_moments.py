"""Feedback of embeddings and output layers: costs against float64, and what compress makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import save_file

import kvpack
from kvpack.encode.calibration import Calibration
from kvpack.encode.feedback import DAMPING
from kvpack.encode.moments import Moments, MomentsWriter
from kvpack.encode.table_moments import table_moments
from kvpack.encode.tensor_encoder import Matrices
from kvpack.errors import MomentsError

F32 = np.float32
Array = npt.NDArray[Any]
ROWS, COLS = 700, 96
EMBEDDING, HEAD, LINEAR = "model.embed_tokens.weight", "lm_head.weight", "model.layers.0.mlp.up_proj.weight"
TOKENS = 40_000


def moment(k: int, seed: int) -> Array:
    """Of correlated numbers, a few of which are large."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((4000, 12)) @ rng.standard_normal((12, k)) + 0.3 * rng.standard_normal((4000, k))
    x *= np.where(rng.random(k) < 0.05, 5.0, 1.0)
    found = x.T @ x / len(x)
    return ((found + found.T) / 2).astype(F32)


def counts() -> Array:
    found = np.floor(TOKENS / 8 / np.arange(1, ROWS + 1) ** 1.1).astype(np.int64)
    found[600:] = 0  # that the text does not have
    return found


def sensitivity() -> Array:
    """About as frequencies are, of rare tokens too."""
    frequencies = (counts() + 0.3) / TOKENS
    return (frequencies * np.random.default_rng(4).uniform(0.6, 1.1, ROWS)).astype(F32)


def write_moments(
    path: Path, *, multiplied: str | None = EMBEDDING, looked_up: str | None = EMBEDDING, cols: int = COLS
) -> Path:
    with MomentsWriter(path) as writer:
        writer.add_second_moment(LINEAR, (COLS, COLS), iter([moment(COLS, 1)]), np.array([TOKENS]))
        writer.add_sensitivity(LINEAR, np.full(256, 1e-4, F32))
        inputs = {LINEAR: LINEAR}
        if multiplied is not None:
            writer.add_second_moment(multiplied, (COLS, COLS), iter([moment(COLS, 2)]), np.array([TOKENS]))
            writer.add_sensitivity(multiplied, sensitivity())
            inputs[multiplied] = multiplied
        if looked_up is not None:
            writer.add_gradient_moment(looked_up, 0.2 * moment(cols, 3))
        writer.finish(inputs, counts(), {"tokens": TOKENS, "shapes": {}})
    return path


def table(seed: int) -> Array:
    return np.random.default_rng(seed).standard_normal((ROWS, COLS)).astype(F32) * F32(0.1)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    linear = np.random.default_rng(9).standard_normal((256, COLS)).astype(F32)
    save_file({EMBEDDING: table(0), HEAD: table(1), LINEAR: linear}, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def damage(error: Array, *, multiplied: bool = True, looked_up: bool = True, damping: float = 0.0) -> float:
    """½·Σ_v e_v·(s_v·H + f_v·G)·e_vᵀ in float64, with a part of their diagonals' means added to H and G."""
    error, total = error.astype(np.float64), 0.0
    for weights, matrix, counted in (
        (sensitivity().astype(np.float64), moment(COLS, 2).astype(np.float64), multiplied),
        (counts() / counts().sum(), 0.2 * moment(COLS, 3).astype(np.float64), looked_up),
    ):
        matrix += damping * np.diag(matrix).mean() * np.eye(COLS)
        total += counted * float((weights * ((error @ matrix) * error).sum(1)).sum()) / 2
    return total


def test_the_cost_is_that_of_both_uses(tmp_path: Path) -> None:
    error = np.random.default_rng(6).standard_normal((ROWS, COLS)) * np.random.default_rng(7).uniform(1, 3, (ROWS, 1))
    with Moments(write_moments(tmp_path / "m.safetensors")) as moments:
        found = table_moments(moments, EMBEDDING, moments.token_counts, looked_up=True)
    assert found is not None
    assert found.use.sum() == pytest.approx(1, abs=1e-12)
    assert (found.frequencies > 0.9 / TOKENS).all()
    assert found.frequencies == pytest.approx(found.use, abs=2 / TOKENS)
    ours = float((found.use * ((error @ found.metric) * error).sum(1)).sum()) / 2
    assert ours == pytest.approx(damage(error), rel=0.02)


@pytest.mark.parametrize(
    ("multiplied", "looked_up", "asked", "metric"),
    [
        (HEAD, EMBEDDING, HEAD, 2),
        (HEAD, EMBEDDING, EMBEDDING, 3),
        (EMBEDDING, None, EMBEDDING, None),
        (None, EMBEDDING, HEAD, None),
    ],
)
def test_a_table_of_one_use(
    multiplied: str | None, looked_up: str | None, asked: str, metric: int | None, tmp_path: Path
) -> None:
    """Apart, each has its own metric; a tied one of which lookups are not known has none, nor has one of no use."""
    path = write_moments(tmp_path / "m.safetensors", multiplied=multiplied, looked_up=looked_up)
    with Moments(path) as moments:
        found = table_moments(moments, asked, moments.token_counts, looked_up=asked == EMBEDDING)
    if metric is None:
        assert found is None
        return
    assert found is not None
    wanted = moment(COLS, metric)
    assert found.metric / np.trace(found.metric) == pytest.approx(wanted / np.trace(wanted), rel=1e-4, abs=1e-6)


def test_other_counts_and_no_counts(tmp_path: Path) -> None:
    with Moments(write_moments(tmp_path / "m.safetensors")) as moments:
        assert table_moments(moments, EMBEDDING, np.zeros(ROWS, np.int64), looked_up=True) is None
        assert table_moments(moments, EMBEDDING, counts()[:-1], looked_up=True) is None


def coded(model: Path, out: Path, **options: Any) -> tuple[kvpack.CompressReport, dict[str, Array]]:
    report = kvpack.compress(model, out, bits=4.25, force=True, **options)
    with kvpack.open(out) as reader:
        return report, {name: np.asarray(reader.dequantize(name, "float32")) for name in (EMBEDDING, HEAD, LINEAR)}


@pytest.mark.parametrize("tied", [True, False])
def test_damage_is_less_than_by_counts_alone(tied: bool, model: Path, tmp_path: Path) -> None:
    """At a rate of their own; the report says what was expected of the damage."""
    out = tmp_path / "o.safetensors"
    multiplied = EMBEDDING if tied else HEAD
    moments = write_moments(tmp_path / "m.safetensors", multiplied=multiplied)
    report, decoded = coded(model, out, embeddings=4.25, moments=moments)
    _, plain = coded(model, out, embeddings=4.25, token_counts=counts())
    tensors = {tensor.name: tensor for tensor in report.tensors}
    names = {EMBEDDING} if tied else {EMBEDDING, HEAD}
    for name in names:
        uses = {"multiplied": name == multiplied, "looked_up": name == EMBEDDING}
        original = table(0 if name == EMBEDDING else 1)
        assert 4.2 < tensors[name].bits_per_weight <= 4.25
        ours, theirs = damage(original - decoded[name], **uses), damage(original - plain[name], **uses)
        assert ours < 0.6 * theirs
        damped = damage(original - decoded[name], **uses, damping=DAMPING)
        assert tensors[name].expected_kl == pytest.approx(damped, rel=0.02)
    assert f"calibrated: {1 + len(names)} of 3 tensors with feedback" in " ".join(report.notes)


@pytest.mark.parametrize("given", [None, counts()[::-1].astype(np.int32)])
def test_rows_of_frequent_tokens_are_finer(given: Array | None, model: Path, tmp_path: Path) -> None:
    """By the moments' counts, or by those given in their place."""
    moments = write_moments(tmp_path / "m.safetensors")
    coded(model, tmp_path / "o.safetensors", embeddings=5, moments=moments, token_counts=given)
    used = counts() if given is None else given
    with kvpack.open(tmp_path / "o.safetensors") as reader:
        scales = reader.coded(EMBEDDING).scales
    assert scales is not None
    rms = np.sqrt(np.square(table(0).astype(np.float64)).mean(1))
    with Moments(moments) as found:
        frequencies = table_moments(found, EMBEDDING, used, looked_up=True).frequencies  # type: ignore[union-attr]
    expected = frequencies**-0.25 * rms**0.5
    np.testing.assert_allclose(scales / scales[0], expected / expected[0], rtol=1e-4)


def test_a_step_costs_rows_by_the_squares_of_their_factors(tmp_path: Path) -> None:
    factors = np.random.default_rng(8).uniform(0.25, 4, ROWS).astype(F32)
    with Moments(write_moments(tmp_path / "m.safetensors")) as moments:
        calibration, weights = Calibration(moments), Matrices(table(0))
        assert calibration.prepare_table(EMBEDDING, weights, looked_up=True)
        of_one_step = calibration.importance(EMBEDDING, weights)
        weights.set_vectors(row_factors=factors)
        by_row = calibration.importance(EMBEDDING, weights)
        use = table_moments(moments, EMBEDDING, counts(), looked_up=True).use  # type: ignore[union-attr]
    assert of_one_step is not None
    assert by_row == pytest.approx(of_one_step * (use @ np.square(factors)) / use.sum(), rel=1e-5)


def test_tables_at_the_rate_of_all_share_it_by_what_errors_cost(model: Path, tmp_path: Path) -> None:
    """One rate in all: what counts more gets more of it, and the damage of all is less than at equal rates."""
    out = tmp_path / "o.safetensors"
    moments = write_moments(tmp_path / "m.safetensors", multiplied=EMBEDDING)
    damages = {}
    for embeddings in ("code", 4.25):
        report, _ = coded(model, out, embeddings=embeddings, exclude="lm_head", moments=moments)
        tensors = {tensor.name: tensor for tensor in report.tensors if tensor.method != "keep"}
        damages[embeddings] = sum(tensor.expected_kl or 0.0 for tensor in tensors.values())
        weights = {name: np.prod(tensor.shape) for name, tensor in tensors.items()}
        rate = sum(weights[name] * tensor.bits_per_weight for name, tensor in tensors.items()) / sum(weights.values())
        assert 4.2 < rate <= 4.25
        apart = abs(tensors[EMBEDDING].bits_per_weight - tensors[LINEAR].bits_per_weight)
        assert apart > 0.5 if embeddings == "code" else apart < 0.05
    assert damages["code"] < 0.9 * damages[4.25]


def test_equal_rates_and_rates_of_their_own_stay(model: Path, tmp_path: Path) -> None:
    moments, out = write_moments(tmp_path / "m.safetensors"), tmp_path / "o.safetensors"
    report, _ = coded(model, out, embeddings="code", allocation="tensor", moments=moments)
    assert all(4.2 < tensor.bits_per_weight <= 4.25 for tensor in report.tensors)
    report, _ = coded(model, out, embeddings="code", tensor_bits={"embed": 6.0}, moments=moments)
    rates = {tensor.name: tensor.bits_per_weight for tensor in report.tensors}
    assert 5.9 < rates[EMBEDDING] <= 6.0


def test_rows_of_another_model(model: Path, tmp_path: Path) -> None:
    moments = write_moments(tmp_path / "m.safetensors", multiplied=HEAD, cols=64)
    with pytest.raises(
        MomentsError, match=r"moments of rows of 64 for 'model.embed_tokens.weight', which has rows of 96"
    ):
        kvpack.compress(model, tmp_path / "o.safetensors", bits=4.25, embeddings="code", moments=moments)
