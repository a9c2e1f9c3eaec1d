"""Quantizing with feedback by the GPU's steps: in the emulator here, and on a device where there is one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import emulator
import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import save_file

import kvpack
from kvpack.encode import feedback as on_cpu
from kvpack.encode.calibration import FEEDBACK_RATE_WEIGHT
from kvpack.encode.compress import compress
from kvpack.encode.moments import MomentsWriter
from kvpack.encode.quantize import DELTA_OFFSET, Quantized, Rounding
from kvpack.encode.tensor_encoder import Matrices
from kvpack.errors import DeviceError
from kvpack.format.container import Container
from kvpack.format.layout import ElementKind, integer_layout

torch = pytest.importorskip("torch")

from emulated_device import emulated_launch  # noqa: E402

from kvpack.runtime.codec import encoder, feedback  # noqa: E402
from kvpack.runtime.device.kernels import launch  # noqa: E402

F32 = np.float32
Array = npt.NDArray[Any]
needs_compiler = pytest.mark.skipif(emulator.compiler() is None, reason="no C++ compiler")
# Like codes of integers of a Gaussian.
BITS = (1.5 + 0.11 * np.arange(130, dtype=F32) ** 1.5).astype(F32)


def moment(k: int, seed: int = 0) -> Array:
    """Of correlated inputs with a few large channels, f32 [k, k]."""
    rng = np.random.default_rng(seed)
    scale = np.where(rng.random(k) < 0.05, 8.0, 1.0)
    mixing = rng.standard_normal((min(k, 24), k)) * scale
    found = mixing.T @ mixing / 24 + 0.1 * np.diag(scale**2)
    return ((found + found.T) / 2).astype(F32)


def weights(rows: int, k: int, seed: int = 1) -> Array:
    return np.random.default_rng(seed).standard_normal((rows, k)).astype(F32)


def rounding(rate_weight: float = FEEDBACK_RATE_WEIGHT) -> Rounding:
    return Rounding(np.full(129, 0.5, F32), F32(0.5), rate_weight, BITS)


def on_device(
    w: Array, steps: Array, element_bits: int, given: Rounding, made: feedback.DeviceFeedback, seed: int | None = None
) -> tuple[Array, Array, Array]:
    """Integers, outliers and errors of rows."""
    device = made.order.device

    def launcher(*args: Any, **kwargs: Any) -> None:
        emulated_launch(*args, shuffle_seed=seed, **kwargs)

    found = feedback.quantize_with_feedback(
        torch.from_numpy(w).to(device),
        torch.from_numpy(steps).to(device),
        element_bits,
        given,
        made,
        launch if device.type == "cuda" else launcher,
    )
    outliers = found.outliers.cpu().numpy()
    return found.elements.cpu().numpy(), outliers, found.row_errors.cpu().numpy()


def integers_of(quantized: Quantized, element_bits: int) -> Array:
    found = quantized.elements.astype(np.int64) - (1 << (element_bits - 1))
    for row, col, delta in quantized.outliers.astype(np.int64):
        found[row, col] += delta - DELTA_OFFSET
    return found


@pytest.mark.parametrize("k", [1, 31, 32, 33, 200])
def test_the_factor_is_the_cpus(k: int) -> None:
    h = moment(k)
    wanted, found = on_cpu.feedback_of(h), feedback.device_feedback(h, torch.device("cpu"))
    np.testing.assert_array_equal(found.order.numpy(), wanted.order)
    np.testing.assert_array_equal(found.order.numpy()[found.places.numpy()], np.arange(k))
    np.testing.assert_allclose(found.coefficients.numpy(), wanted.coefficients, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(found.variances.numpy(), wanted.variances, rtol=1e-6)
    assert found.mean_variance == pytest.approx(wanted.mean_variance, rel=1e-9)
    assert found.coefficients.is_contiguous()
    assert found.size_bytes == 4 * k * k


def test_inputs_that_are_always_zero_have_a_factor_that_feeds_nothing_back() -> None:
    found = feedback.device_feedback(np.zeros((40, 40), F32), torch.device("cpu"))
    assert found.mean_variance == 0
    assert not found.coefficients.any()
    assert (found.variances == 1).all()


@pytest.mark.parametrize("bad", [-1.0, math.inf])
def test_what_is_not_positive_definite_has_no_factor(bad: float) -> None:
    h = np.eye(50, dtype=F32)
    h[7, 9] = h[9, 7] = 3.0 * bad
    with pytest.raises(ValueError, match="not positive definite"):
        feedback.device_feedback(h, torch.device("cpu"))


def test_a_device_that_is_too_small_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.linalg, "cholesky_ex", full)
    with pytest.raises(DeviceError, match=r"feedback between 500 inputs, which takes 0\.0 GB.*device='cpu'"):
        feedback.device_feedback(moment(500), torch.device("cpu"))


@needs_compiler
@pytest.mark.parametrize("rate_weight", [0.0, FEEDBACK_RATE_WEIGHT, 0.5])
@pytest.mark.parametrize(("rows", "k", "element_bits"), [(1, 1, 2), (3, 7, 8), (130, 16, 3), (65, 16, 5)])
def test_a_block_of_columns_gives_the_cpus_integers(rows: int, k: int, element_bits: int, rate_weight: float) -> None:
    """Bit for bit, outliers and all: up to 16 columns both sum in one order."""
    w, h = weights(rows, k), moment(k)
    w[0, 0], w[-1, -1], w[rows // 2, 0] = 40.0, -3000.0, 20.1
    steps = np.full(rows, 0.3, F32)
    steps[rows // 3] = 0.0 if rows > 1 else 0.3
    made = feedback.device_feedback(h, torch.device("cpu"))
    same = on_cpu.Feedback(made.order.numpy(), made.coefficients.numpy(), made.variances.numpy(), made.mean_variance)
    wanted = on_cpu.quantize_with_feedback(w, steps, element_bits, rounding(rate_weight), same)
    elements, outliers, row_errors = on_device(w, steps, element_bits, rounding(rate_weight), made, seed=3)
    np.testing.assert_array_equal(elements, wanted.elements)
    np.testing.assert_array_equal(outliers + np.array([0, 0, DELTA_OFFSET]), wanted.outliers)
    np.testing.assert_allclose(row_errors, wanted.row_errors, rtol=1e-12)


@needs_compiler
@pytest.mark.parametrize("element_bits", [2, 4, 8])
@pytest.mark.parametrize("k", [33, 160, 321])
def test_errors_at_the_outputs_are_the_cpus(k: int, element_bits: int) -> None:
    rows = 300
    w, h = weights(rows, k), moment(k)
    steps = np.full(rows, {2: 1.5, 4: 0.4, 8: 0.1}[element_bits], F32)
    wanted = on_cpu.quantize_with_feedback(w, steps, element_bits, rounding(), on_cpu.feedback_of(h))
    made = feedback.device_feedback(h, torch.device("cpu"))
    elements, outliers, row_errors = on_device(w, steps, element_bits, rounding(), made)
    assert wanted.row_errors is not None
    assert row_errors.sum() == pytest.approx(wanted.row_errors.sum(), rel=0.01)
    integers = elements.astype(np.int64) - (1 << (element_bits - 1))
    integers[outliers[:, 0], outliers[:, 1]] += outliers[:, 2]
    # A row in which both see each target on the same side has the same integers.
    assert (integers == integers_of(wanted, element_bits)).all(1).mean() > 0.7
    e = w.astype(np.float64) - steps[:, None] * integers.astype(np.float64)
    damped = h.astype(np.float64) + on_cpu.DAMPING * np.diag(h).mean(dtype=np.float64) * np.eye(k)
    np.testing.assert_allclose(
        row_errors * made.mean_variance * steps.astype(np.float64) ** 2, ((e @ damped) * e).sum(1), rtol=2e-3
    )


@needs_compiler
def test_rows_are_quantized_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    w, made = weights(70, 32), feedback.device_feedback(moment(32), torch.device("cpu"))
    w[69, 3], w[0, 1] = 50.0, -50.0
    steps = np.linspace(0.2, 0.5, 70, dtype=F32)
    whole = on_device(w, steps, 4, rounding(), made)
    monkeypatch.setattr(feedback, "CHUNK_ELEMENTS", 9 * 32)
    for found, wanted in zip(on_device(w, steps, 4, rounding(), made), whole, strict=True):
        np.testing.assert_array_equal(found, wanted)


SHAPES: dict[str, tuple[int, ...]] = {"a.weight": (300, 160), "b.weight": (256, 96), "c.weight": (4, 96, 128)}


def write_model(folder: Path) -> tuple[Path, Path]:
    """A model directory and its moments, the first tensor the most sensitive."""
    source = folder / "model"
    source.mkdir()
    save_file({name: weights(math.prod(shape[:-1]), shape[-1]).reshape(shape) for name, shape in SHAPES.items()},
              source / "model.safetensors")  # fmt: skip
    (source / "config.json").write_text("{}")
    path = folder / "moments.safetensors"
    with MomentsWriter(path) as writer:
        for index, (name, (*experts, rows, k)) in enumerate(SHAPES.items()):
            count = math.prod(experts)
            writer.add_second_moment(
                name, (*experts, k, k), iter([moment(k, seed) for seed in range(count)]), np.full(count, 100)
            )
            writer.add_sensitivity(name, np.full((*experts, rows), 4.0**-index, F32))
        writer.finish({name: name for name in SHAPES}, np.array([100]), {"tokens": 100})
    return source, path


def check_compression(tmp_path: Path, coder: Any, device: str) -> None:
    source, moments = write_model(tmp_path)
    by_cpu = compress(source, tmp_path / "cpu", kvpack.QuantConfig(bits=3.5), moments=moments)
    config = kvpack.QuantConfig(bits=3.5)
    reports = [compress(source, tmp_path / name, config, moments=moments, coder=coder()) for name in ("one", "two")]
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert files[0] == files[1]
    calibration = kvpack.QuantConfig.from_directory(tmp_path / "one").calibration
    assert calibration == {"tokens": 100, "feedback_device": device}
    assert kvpack.QuantConfig.from_directory(tmp_path / "cpu").calibration == {"tokens": 100}
    for folder, wanted in (("one", device), ("cpu", None)):
        with Container(tmp_path / folder / "model.safetensors") as container:
            entries = json.loads(container.metadata["kvpack_tensors"])
            assert {entry.get("feedback_device") for entry in entries.values()} == {wanted}
    assert reports[0].bits_per_weight is not None
    assert 3.45 <= reports[0].bits_per_weight <= 3.5
    expected = [sum(tensor.expected_kl or math.nan for tensor in report.tensors) for report in (by_cpu, reports[0])]
    assert expected[1] == pytest.approx(expected[0], rel=0.03)
    with (
        kvpack.open(source / "model.safetensors") as original,
        kvpack.open(tmp_path / "one" / "model.safetensors") as coded,
    ):
        for tensor in reports[0].tensors:
            error = (original.dequantize(tensor.name) - coded.dequantize(tensor.name)).astype(np.float64)
            power = (original.dequantize(tensor.name).astype(np.float64) ** 2).sum()
            assert tensor.noise_db == pytest.approx(10 * math.log10((error**2).sum() / power), abs=0.01)


@needs_compiler
def test_compress(tmp_path: Path) -> None:
    check_compression(tmp_path, lambda: encoder.device_coder("cpu", emulated_launch), "cpu")


@needs_compiler
def test_the_trellis_is_the_cpus(tmp_path: Path) -> None:
    """A device codes it, with the CPU's factors: the bytes are the same, and name no device."""
    source, moments = write_model(tmp_path)
    config = kvpack.QuantConfig(bits=3.5, quantizer="trellis")
    for name, coder in (("cpu", encoder.CPU_CODER), ("device", encoder.device_coder("cpu", emulated_launch))):
        compress(source, tmp_path / name, config, moments=moments, coder=coder)
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "device" / file).read_bytes() == (tmp_path / "cpu" / file).read_bytes()


@needs_compiler
def test_vectors_are_taken_out_of_the_weights() -> None:
    """Column scales and row offsets, of each of two matrices, stored transposed or not: as the CPU takes them out."""
    rng = np.random.default_rng(4)
    for transposed in (False, True):
        array = rng.standard_normal((2, 40, 64)).astype(F32)
        stored = np.ascontiguousarray(array.swapaxes(1, 2)) if transposed else array
        found = []
        for strips in ("cpu", "device"):
            matrices = Matrices(stored, transposed=transposed)
            matrices.set_vectors(np.linspace(0.5, 2, 128).astype(np.float16), np.linspace(-0.1, 0.1, 80).astype(F32))
            coder = encoder.device_coder("cpu", emulated_launch) if strips == "device" else encoder.CPU_CODER

            class Known:
                def of_matrix(self, matrix: int) -> Any:
                    return coder.feedback_of(np.eye(64, dtype=F32) * (1 + matrix), executor=None)  # noqa: B023

                def row_weights(self, matrix: int) -> Array:
                    return np.ones(40)

            matrices.feedback = Known()
            layout = integer_layout("balanced", ElementKind.SIGNED, 4)
            quantized = coder.quantize(matrices, np.full(1, 0.3, F32), layout, rounding())
            header = matrices.header(layout, None)
            counted = quantized.count(header, None)
            parts = [quantized.strip(index) for index in range(2)]
            found.append((parts, counted, quantized.expected_kl()))
        (cpu, cpu_counts, cpu_kl), (device, device_counts, device_kl) = found
        for wanted, got in zip(cpu, device, strict=True):
            np.testing.assert_array_equal(got.elements, wanted.elements)
            np.testing.assert_array_equal(got.outliers, wanted.outliers)
        np.testing.assert_array_equal(device_counts.tiles, cpu_counts.tiles)
        assert device_kl == pytest.approx(cpu_kl, rel=1e-12)


@pytest.mark.gpu
def test_compress_on_a_gpu(tmp_path: Path) -> None:
    name = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    check_compression(tmp_path, lambda: encoder.device_coder("cuda"), name)


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "k"), [(4096, 4096), (1000, 14336)])
def test_errors_at_the_outputs_on_a_gpu(rows: int, k: int) -> None:
    """What a GPU leaves is that of the form: e·H·eᵀ in double precision; twice the same; TF32 changes nothing."""
    w, h = weights(rows, k), moment(k)
    steps = np.full(rows, 0.4, F32)
    made = feedback.device_feedback(h, torch.device("cuda"))
    elements, outliers, row_errors = on_device(w, steps, 5, rounding(), made)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        again = on_device(w, steps, 5, rounding(), feedback.device_feedback(h, torch.device("cuda")))
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    for first, second in zip((elements, outliers, row_errors), again, strict=True):
        np.testing.assert_array_equal(first, second)
    integers = torch.from_numpy(elements.astype(np.float64) - 16).cuda()
    integers[outliers[:, 0], outliers[:, 1]] += torch.from_numpy(outliers[:, 2]).double().cuda()
    e = torch.from_numpy(w).cuda().double() - float(steps[0]) * integers
    damped = torch.from_numpy(h).cuda().double()
    damped.diagonal().add_(on_cpu.DAMPING * damped.diagonal().mean())
    wanted = ((e @ damped) * e).sum(1).cpu().numpy()
    np.testing.assert_allclose(row_errors * made.mean_variance * float(steps[0]) ** 2, wanted, rtol=5e-3)
