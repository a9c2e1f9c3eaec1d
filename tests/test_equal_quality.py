"""benchmarks/equal_quality.py: the quantizers that kvpack is compared with, and the search for equal quality."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(FOLDER)
    import equal_quality

    return equal_quality


def noise_db(matrix: Any, values: Any) -> float:
    return 10 * math.log10(float(np.square(matrix - values).sum() / np.square(matrix).sum()))


@pytest.mark.parametrize(
    ("name", "bits", "low_db", "high_db"),
    [
        ("int4-g128", 4.25, -20.0, -19.0),
        ("int4-g64", 4.5, -21.2, -20.2),
        ("int4-g32", 5.0, -22.8, -21.6),
        ("int4-sym-g128", 4.125, -20.2, -19.0),
        ("int5-sym-g128", 5.125, -26.3, -25.0),
        ("int8-sym-g128", 8.125, -44.5, -43.0),
        ("hqq-int4-g64", 4.5, -21.5, -20.2),
        ("nf4", 4.127, -21.0, -20.0),
        ("q4_0", 4.5, -21.5, -20.5),
        ("q5_0", 5.5, -27.6, -26.8),
        ("q8_0", 8.5, -46.0, -44.5),
        ("q4_k", 4.5, -23.2, -22.2),
        ("q5_k", 5.5, -29.4, -28.4),
    ],
)
def test_peers_have_their_bits_and_noise(
    script: ModuleType, name: str, bits: float, low_db: float, high_db: float
) -> None:
    """Of Gaussian weights: what each format takes, and what it loses within a decibel."""
    if name.startswith("q"):
        pytest.importorskip("gguf")
    matrix = np.random.default_rng(0).normal(0, 0.02, (256, 1024)).astype(np.float32)
    values, used = script.PEERS[name](matrix)
    assert values.shape == matrix.shape
    assert values.dtype == np.float32
    assert used / matrix.size == pytest.approx(bits, abs=2e-3)
    assert low_db < noise_db(matrix, values) < high_db


@pytest.mark.parametrize("name", ["int4-g128", "int4-sym-g128", "hqq-int4-g64", "nf4", "q4_k"])
def test_peers_take_short_groups_and_zeros(script: ModuleType, name: str) -> None:
    if name.startswith("q"):
        pytest.importorskip("gguf")
    matrix = np.random.default_rng(1).normal(0, 1, (32, 576)).astype(np.float32)
    matrix[3] = 0
    values, used = script.PEERS[name](matrix)
    assert used >= 4 * matrix.size
    assert np.isfinite(values).all()
    assert noise_db(matrix, values) < -18
    assert np.abs(values[3]).max() < 1e-3


def test_levels_of_nf4(script: ModuleType) -> None:
    levels = script.nf4_levels()
    assert len(levels) == 16
    assert (np.diff(levels) > 0).all()
    assert levels[[0, 7, 15]].tolist() == [-1, 0, 1]
    assert levels[8] == pytest.approx(0.0796, abs=1e-4)  # as published
    assert levels[1] == pytest.approx(-0.6962, abs=1e-4)


def test_equal_distance_is_found_with_few_measurements(script: ModuleType) -> None:
    """On a curve that falls by 6 dB a bit, and bends: to 0.01 bit."""

    def measure(rate: float) -> tuple[float, float]:
        return rate - 0.005, distance(rate)

    def distance(rate: float) -> float:
        return 2.0 * math.exp(-1.39 * rate + 0.02 * (rate - 5) ** 2)

    curve = script.Curve(measure)
    for rate in (3.1, 4.2, 4.3, 6.9):
        assert curve.bits_at(distance(rate)) == pytest.approx(rate - 0.005, abs=0.01)
    assert len(curve.points) <= 16
    assert curve.bits_at(distance(2.0)) is None
    assert curve.bits_at(distance(7.6)) is None
    assert abs(curve.nearest(4.2) - 4.2) <= script.NEAR_BITS


def test_a_model_is_measured_and_its_integers_are_named(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With a stand-in for the model whose distance is the weights' noise."""

    class Weights:
        metric, record = "noise", {"windows": 1}
        original: ClassVar = {"w": np.random.default_rng(2).standard_t(5, (256, 512)).astype(np.float32)}

        def distance(self, weights: Any) -> float:
            return float(np.square(weights["w"] - self.original["w"]).mean())

    model, text = tmp_path / "model", tmp_path / "text.txt"
    model.mkdir()
    text.write_text("text")
    monkeypatch.setattr(script, "subject", lambda *arguments: Weights())
    out = tmp_path / "found.json"
    peers = "int4-g128,int8-sym-g128"
    arguments = [
        "measure",
        "--model",
        model,
        "--text",
        text,
        "--peers",
        peers,
        "--layouts",
        "fast,compact",
        "--json",
        out,
    ]
    monkeypatch.setattr(sys, "argv", ["equal_quality.py", *map(str, arguments)])
    script.main()
    found = json.loads(out.read_text())
    int4, int8 = found["rows"]
    assert int4["bits"] == 4.25
    compact, fast = int4["kvpack"]["compact"]["bits"], int4["kvpack"]["fast"]["bits"]
    assert 3.0 < compact < fast < 4.25
    # Measured again at the rate found: the same distance, within the tolerance of interpolation.
    with script.ThreadPoolExecutor(1) as executor:
        again = script.coded(Weights.original["w"], compact + 0.001, "compact", executor)
    assert Weights().distance({"w": again.values}) == pytest.approx(int4["distance"], rel=0.03)
    assert int4["kvpack"]["fast"]["integers"]["codes_per_symbol"] == 8
    assert int8["kvpack"]["fast"]["bits"] is None or int8["kvpack"]["fast"]["bits"] > 6
    layouts = script.wanted_integers([found])
    assert all(1 < sigma < 100 for sigma in layouts.values())
    assert {layout.codes_per_symbol for layout in layouts} >= {1, 8}
    assert found["model"] == "MODEL"


def test_times_of_the_integers_that_were_found(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`times` with stand-ins for the device: every product is checked, and stands beside the peers that there are."""
    torch = pytest.importorskip("torch")
    import emulated_device

    from kvpack.bench import timing, tune
    from kvpack.encode.blob_encoder import encode_elements
    from kvpack.runtime.codec import encoder
    from kvpack.runtime.device import devices

    def check(works: Any, **options: Any) -> Any:
        for work in works:
            assert max(work.error(call()) for call in work.calls) <= work.tolerance
        return [timing.Timed(us=10.0 + number) for number, _ in enumerate(works)]

    def encoded(elements: Any, layout: Any) -> Any:
        data = np.frombuffer(encode_elements(elements.numpy(), layout), np.uint8).copy()
        return SimpleNamespace(blob=torch.from_numpy(data))

    monkeypatch.setattr(script, "DEVICE", "cpu")
    monkeypatch.setattr(script, "SHAPES", ((96, 128), (64, 256)))
    monkeypatch.setattr(script, "ROTATE_BYTES", 1)
    monkeypatch.setattr(timing, "measure", check)
    monkeypatch.setattr(tune, "compile_ahead", lambda kernels: None)
    monkeypatch.setattr(devices, "device_limits", lambda device: emulated_device.LIMITS)
    monkeypatch.setattr(encoder, "encode_on_device", encoded)
    integers = {"element_bits": 5, "code_bits": 1, "codes_per_symbol": 8, "folded": True, "sigma": 3.0}
    other = integers | {"sigma": 5.0}
    kvpacks = [{"fast": {"bits": 4.3, "integers": one}} for one in (integers, other)]
    rows = [{"kvpack": one} for one in [*kvpacks, {"fast": {"bits": None, "integers": None}}]]
    given, out = tmp_path / "given.json", tmp_path / "found.json"
    given.write_text(json.dumps({"rows": rows}))
    monkeypatch.setattr(sys, "argv", ["equal_quality.py", "times", str(given), "--json", str(out)])
    try:
        script.main()
    finally:
        torch.set_grad_enabled(True)
    found = json.loads(out.read_text())["rows"]
    assert "humming-int4, 96×128: not installed" in capsys.readouterr().err
    mine = [row for row in found if row["name"] == "kvpack"]
    assert [(row["shape"], row["tokens"]) for row in mine] == [(s, m) for s in ("96×128", "64×256") for m in (1, 8)]
    assert all(row["integers"] == integers | {"sigma": 4.0} for row in mine)  # the median
    assert {(row["name"], row["bits_per_weight"]) for row in found if row["name"] == "fp16"} == {("fp16", 16.0)}
