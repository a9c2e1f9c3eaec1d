"""``kvpack bench linear`` where there is no GPU: options, targets, tables, the picture, and a run with stand-ins."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest

from kvpack.bench import report as bench_report
from kvpack.bench import run as bench_run
from kvpack.bench.report import (
    LAYOUTS,
    MS,
    SHAPES,
    SPECIFICATION_SHAPE,
    choose_best,
    evaluate_specification,
    evaluate_targets,
    finite,
    parse_options,
    ratio,
    tables,
    write_report,
    wrong_results,
)
from kvpack.format.layout import ElementKind, integer_layout

MEASUREMENT = {
    "relative_error": 2e-4, "us": 1.0, "us_low": 0.9, "us_high": 1.2, "samples": 15, "launches": 4, "timing": "graph",
    "error": None,
}  # fmt: skip
TOP_KEYS = {
    "what", "schema", "complete", "stopped", "note", "command", "kvpack", "date", "commit",
    "package_changed_since_commit", "cpu", "cores", "load_at_start", "python", "versions", "device", "options",
    "seconds", "copy", "tensors", "linear", "decode", "streams", "codecs", "encode", "targets", "specification",
}  # fmt: skip


def linear(shape: str, m: int, name: str, layout: str | None, us: float | None, **more: Any) -> dict[str, Any]:
    row = {
        "shape": shape, "m": m, "name": name, "layout": layout, "tile_cols": 128 if layout else None,
        "bits_per_weight": 16.0, "best": True, "note": None, **MEASUREMENT, "us": us,
    }  # fmt: skip
    return row | more


def synthetic_report() -> dict[str, Any]:
    """As a run on a GPU leaves it: FP16 takes 2 µs, balanced 1.6, fast 1.25, INT4 1.0; the copy 4000 GB/s."""
    report: dict[str, Any] = {
        "what": "bench-linear", "schema": 1, "complete": True, "stopped": None, "note": bench_report.NOTE,
        "command": "kvpack bench linear", "kvpack": "0", "date": "2026-11-25 00:00 UTC", "commit": "0" * 40,
        "package_changed_since_commit": None, "cpu": "a CPU", "cores": 16, "load_at_start": [0.0], "python": "3.12",
        "versions": {"torch": "2.11.0", "cupy-cuda13x": "14.2.0", "triton": "3.6.0"},
        "device": {"name": "a GPU", "driver": "1", "capability": "9.0", "multiprocessors": 132, "memory_bytes": 1,
                   "l2_bytes": 1, "cuda": "13.0"},
        "options": parse_options().as_dict(), "seconds": {"total": 200.0},
        "copy": [{"bytes": 1 << 32, "us": 2000.0, "gb_per_s": 4000.0}],
        "tensors": [], "linear": [], "decode": [], "streams": [], "codecs": [], "encode": [],
    }  # fmt: skip
    bits = {"balanced": 4.2, "fast": 4.5}
    for shape in SHAPES:
        for m in MS:
            rows = report["linear"]
            rows.append(linear(shape.label, m, "fp16", None, 2.0))
            rows += [linear(shape.label, m, "int4", None, 1.0)] if m <= 64 else []
            rows += [linear(shape.label, m, "int8", None, 1.1)] if m == 1 else []
            for layout, us in (("balanced", 1.6), ("fast", 1.25)):
                rows.append(linear(shape.label, m, "kvpack", layout, us, bits_per_weight=bits[layout]))
                if m == 1:
                    rows.append(linear(shape.label, m, "kvpack", layout, 9.0, best=False, tile_cols=256))
        for layout in LAYOUTS:
            report["tensors"].append(
                {"shape": shape.label, "layout": layout, "tile_cols": 128, "bits_per_weight": bits[layout],
                 "blob_bytes": 1000, "device_bytes": int(shape.rows * shape.cols * bits[layout] / 8),
                 "encode_ms": 5.0, "bit_exact": True, "dequantize_max_error": 1e-9,
                 "error_with_massive_activations": 3e-4, "best": True, "error": None}
            )  # fmt: skip
            for to in ("int8", "fp16"):
                report["decode"].append(
                    {"shape": shape.label, "layout": layout, "tile_cols": 128, "to": to, "moved_bytes": 10**7,
                     "elements_per_s": 1.6e12, "bound_us": 2.5, "fraction_of_bound": 0.8, **MEASUREMENT}
                )  # fmt: skip
    for layout in LAYOUTS:
        for work, m in (("decode", None), ("linear", 1), ("staged", 512)):
            report["streams"].append(
                {"work": work, "m": m, "layout": layout, "serial": {**MEASUREMENT, "us": 60.0},
                 "parallel": {**MEASUREMENT, "us": 40.0}, "speedup": 1.5, "fused_us": None}
            )  # fmt: skip
        for where, threads, rate in (("cpu", 1, 300e6), ("cpu", 16, 2e9), ("cuda", None, 100e9)):
            report["encode"].append(
                {"shape": SPECIFICATION_SHAPE.label, "layout": layout, "where": where, "threads": threads, "ms": 10.0,
                 "elements_per_s": rate, "blob_bytes": 1000, "error": None}
            )  # fmt: skip
        report["codecs"].append({"name": "nvCOMP ANS", "source": "8-bit", "layout": layout, "error": "not installed"})
    report["targets"] = evaluate_targets(report)
    report["specification"] = evaluate_specification(report)
    return report


def target(report: dict[str, Any], start: str) -> dict[str, Any]:
    found = [row for row in evaluate_targets(report) if row["what"].startswith(start)]
    assert len(found) == 1
    return found[0]


# --- options -----------------------------------------------------------------


def test_options_have_the_defaults_of_a_full_and_of_a_quick_run() -> None:
    full, quick = parse_options(), parse_options(quick=True)
    assert full.shapes == SHAPES
    assert full.ms == MS
    assert {s.label for s in full.shapes} >= bench_report.LLAMA_SHAPES | {SPECIFICATION_SHAPE.label}
    assert full.tile_cols == (128, 256, 512, 1024, 2048)  # to the longest that the format has
    assert set(quick.tile_cols) < set(full.tile_cols)
    assert set(quick.ms) < set(full.ms)
    assert len(quick.shapes) < len(full.shapes)
    assert full.as_dict().keys() == quick.as_dict().keys()
    json.dumps(full.as_dict())


def test_options_are_lists() -> None:
    options = parse_options(shapes="o, 512x96", ms="1,16,1", layouts="fast", tile_cols="32,2048")
    assert [shape.label for shape in options.shapes] == ["4096×4096", "512×96"]
    assert (options.ms, options.layouts, options.tile_cols) == ((1, 16), ("fast",), (32, 2048))


@pytest.mark.parametrize(
    "wrong",
    [
        {"shapes": "5"},
        {"shapes": "o,0x5"},
        {"shapes": ""},
        {"shapes": "huge"},
        {"ms": "0"},
        {"ms": "1,x"},
        {"layouts": "compact"},
        {"tile_cols": "33"},
        {"tile_cols": "2080"},
    ],
)
def test_wrong_options_are_named(wrong: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=f"^'?{next(iter(wrong.values())).split(',')[-1]}'?:? "):
        parse_options(**wrong)  # type: ignore[arg-type]


# --- targets -----------------------------------------------------------------


def test_targets_are_computed_from_the_rows() -> None:
    report = synthetic_report()
    row = target(report, "balanced 4096×4096, M = 1, against FP16")
    assert (row["measured"], row["target"], row["met"], row["then"]) == (1.25, 1.25, True, None)
    row = target(report, "fast 28672×4096, M = 1, against FP16")
    assert (row["measured"], row["target"], row["met"]) == (1.6, 1.95, False)
    row = target(report, "fast 28672×4096, M = 1, against torch INT4")
    assert (row["measured"], row["met"], row["then_met"]) == (0.8, None, False)
    assert target(report, "balanced 4096×14336, size")["met"] is True
    assert target(report, "fast, decode to fp16")["then_met"] is False


def test_a_missed_bound_on_size_and_a_missing_measurement() -> None:
    report = synthetic_report()
    for row in report["linear"]:
        if (row["name"], row["shape"], row["m"]) == ("kvpack", "4096×4096", 1) and row["best"]:
            row["bits_per_weight"] = 7.4
        if (row["shape"], row["m"], row["layout"]) == ("6144×4096", 8, "fast"):
            row.update(us=None, error="WrongResult")
    assert target(report, "balanced 4096×4096, size")["met"] is False
    missing = target(report, "fast, slowest shape, M = 8")
    assert (missing["measured"], missing["target"], missing["met"]) == (None, 1.0, None)
    report["decode"][0].update(us=None, elements_per_s=None, fraction_of_bound=None)
    slowest = [t for t in evaluate_targets(report) if t["what"] == "balanced, decode to int8, slowest shape"]
    assert [t["met"] for t in slowest if t["target"]] == [None]


def test_a_report_without_rows_has_no_verdicts() -> None:
    report = synthetic_report() | {"linear": [], "decode": [], "streams": [], "encode": [], "tensors": []}
    assert not [row for row in evaluate_targets(report) if row["met"] is not None]
    assert not evaluate_specification(report)


def test_specification() -> None:
    found = {row["what"]: row for row in evaluate_specification(synthetic_report())}
    assert found["fast: ratio over INT8"]["met"] is True
    assert found["balanced: ratio over INT8"]["measured"] == pytest.approx(8 / 4.2)
    assert found["fast: device memory over FP16"]["measured"] == pytest.approx(100 * 4.5 / 16)
    assert found["fast: device memory over INT8"]["met"] is None
    assert found["fast: encode, CPU, 16 threads"]["met"] is True
    assert found["balanced: five layers on streams"]["measured"] == pytest.approx(0.04)
    assert found["balanced: dequantization error"]["met"] is True
    large = synthetic_report()
    for tensor in large["tensors"]:
        tensor["bits_per_weight"] = 7.25
    assert {row["what"]: row for row in evaluate_specification(large)}["balanced: ratio over INT8"]["met"] is False


def test_the_fastest_tile_columns_within_the_size_are_chosen() -> None:
    rows = [
        linear("a", 1, "kvpack", "fast", 1.0, bits_per_weight=4.7),
        linear("a", 1, "kvpack", "fast", 3.0, bits_per_weight=4.5),
        linear("a", 1, "kvpack", "fast", 2.0, bits_per_weight=4.6),
        linear("a", 1, "kvpack", "fast", None, bits_per_weight=4.0),
    ]
    assert choose_best(rows, 4.6) is rows[2]
    assert choose_best(rows, 4.0) is rows[0]
    assert choose_best([], 4.0) is None


def test_ratio_needs_both() -> None:
    report = synthetic_report()
    assert ratio(report, "4096×4096", 1, "fast") == 1.6
    assert ratio(report, "4096×4096", 1, "fast", over="int8") == pytest.approx(0.88)
    assert ratio(report, "4096×4096", 128, "fast", over="int4") is None
    assert ratio(report, "1×1", 1, "fast") is None


# --- what is shown and written ------------------------------------------------


def test_tables_are_rectangular_and_complete() -> None:
    found = tables(synthetic_report())
    assert list(found) == [
        "batch-1", "batches", "tiles", "decode", "codecs", "streams", "encode", "copy", "targets", "specification",
    ]  # fmt: skip
    for table in found.values():
        assert all(len(row) == len(table.headings) for row in table.rows), table.title
        assert all(isinstance(cell, str) for row in table.rows for cell in row), table.title
    assert len(found["batches"].rows) == len(SHAPES) * len(MS)
    assert [found["tiles"].rows[2][1], found["tiles"].rows[2][-1]] == ["fast", "yes"]


def test_humming_is_shown_where_it_was_measured() -> None:
    report = synthetic_report()
    without = tables(report)
    report["linear"] += [linear(shape.label, m, "humming-int5", None, 0.8) for shape in SHAPES for m in MS]
    assert not [row for row in evaluate_targets(report) if "Humming" in row["what"]]
    missing = linear("4096×4096", 1, "humming-int8", None, None, error="ImportError: libnvrtc.so.13: no such file")
    report["linear"].append(missing)
    found = tables(report)
    for name in ("batch-1", "batches"):
        assert len(found[name].headings) == len(without[name].headings) + 1
        assert all(len(row) == len(found[name].headings) for row in found[name].rows)
    assert found["batch-1"].rows[0][found["batch-1"].headings.index("Humming INT5 g128, µs")] == "0.8"
    assert found["batches"].rows[0][found["batches"].headings.index("Humming INT5 g128, × FP16")] == "2.50"
    report["linear"].append(linear("4096×4096", 1, "humming-int4", None, 1.5))
    assert target(report, "fast 4096×4096, M = 1, against Humming INT4")["then_met"] is True
    assert target(report, "fast 6144×4096, M = 1, against Humming INT4")["then_met"] is None
    assert found["peers"].rows == [["humming-int8", "4096×4096", "1", "ImportError: libnvrtc.so.13: no such file"]]


class FakeHumming:
    """What is used of humming.layer.HummingLayer, with weights of 1/8."""

    def __init__(self, shape_n: int, shape_k: int, *, weight_config: dict[str, Any], torch_dtype: Any) -> None:
        self.shape, self.config, self.transformed = (shape_n, shape_k), weight_config, False
        assert weight_config["group_size"] == 128
        self.weight_schema = self

    def to(self, device: Any) -> FakeHumming:
        return self

    def load_from_unquantized(self, weights: Any) -> None:
        assert tuple(weights.shape) == self.shape
        self.weights = (8 * weights).round() / 8

    def named_parameters(self) -> Any:
        return [("weight", self.weights)]

    def dequant_tensors(self, tensors: dict[str, Any]) -> Any:
        assert not self.transformed
        return tensors["weight"].float()

    def transform(self) -> None:
        self.transformed = True

    def parameters(self) -> Any:
        return [self.weights.byte(), self.weights[:, :1]]

    def __call__(self, x: Any) -> Any:
        assert self.transformed
        return (x.double() @ self.weights.double().T).to(x.dtype)


@pytest.mark.parametrize("quick", [False, True])
def test_humming_is_a_peer(bench: Any, monkeypatch: pytest.MonkeyPatch, quick: bool) -> None:
    monkeypatch.setitem(sys.modules, "humming", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "humming.layer", SimpleNamespace(HummingLayer=FakeHumming))
    report = bench.bench_linear(replace(small(), quick=quick, shapes=small().shapes[:1], layouts=("fast",)))
    rows = [row for row in report["linear"] if row["name"].startswith("humming")]
    names = ["humming-int4"] if quick else ["humming-int4", "humming-int5", "humming-int8"]
    assert [(row["name"], row["m"]) for row in rows] == [(name, m) for m in (1, 2, 8) for name in names]
    assert all(row["us"] is not None and row["relative_error"] < 1e-3 for row in rows)
    assert rows[0]["bits_per_weight"] == 8 * (256 * 128 + 256 * 2) / (256 * 128)  # as FakeHumming stores them


@pytest.mark.parametrize(
    ("error", "module", "reason"),
    [
        (ModuleNotFoundError("No module named 'humming'", name="humming"), "humming", "not installed"),
        (ModuleNotFoundError("No module named 'nvidia'", name="nvidia"), "nvidia.nvcomp", "not installed"),
        (
            ModuleNotFoundError("No module named 'nvidia.nvcomp'", name="nvidia.nvcomp"),
            "nvidia.nvcomp",
            "not installed",
        ),
        (
            ModuleNotFoundError("No module named 'jinja2'", name="jinja2"),
            "humming",
            "ModuleNotFoundError: No module named 'jinja2'",
        ),
        (ImportError("libnvcomp.so.6: cannot open"), "nvidia.nvcomp", "ImportError: libnvcomp.so.6: cannot open"),
    ],
)
def test_a_broken_peer_is_not_called_absent(error: ImportError, module: str, reason: str) -> None:
    pytest.importorskip("torch")
    from kvpack.bench.peers import import_failure

    assert import_failure(error, module) == reason


def test_codecs_that_cannot_be_loaded_say_why(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*arguments: Any) -> Any:
        raise ImportError("libnvcomp.so.6: cannot open shared object file")

    monkeypatch.setattr(bench.bench_peers, "nvcomp_ans", missing)
    options = replace(small(), quick=False, shapes=small().shapes[:1], layouts=("fast",), ms=(1,))
    rows = {row["name"]: row for row in bench.bench_linear(options)["codecs"]}
    assert rows["nvCOMP ANS"]["error"] == "ImportError: libnvcomp.so.6: cannot open shared object file"
    assert rows["EntroPack tile-ANS"]["error"] == "not installed"


def test_a_partial_report_has_tables_too(tmp_path: Path) -> None:
    report = synthetic_report()
    report |= {"linear": report["linear"][:3], "decode": [], "streams": [], "tensors": [], "complete": False}
    report["linear"][0]["us"] = None
    for table in tables(report).values():
        assert all(len(row) == len(table.headings) for row in table.rows), table.title


def test_written_reports_are_json_without_infinities(tmp_path: Path) -> None:
    report = synthetic_report()
    report["linear"][0]["relative_error"] = float("inf")
    path = tmp_path / "report.json"
    write_report(path, report)
    loaded = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert loaded["linear"][0]["relative_error"] is None
    assert loaded.keys() == TOP_KEYS
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]
    assert finite((1.0, float("nan"))) == [1.0, None]


def test_only_kvpacks_own_failures_are_wrong_results() -> None:
    report = synthetic_report()
    assert wrong_results(report) == []
    report["linear"][0].update(us=None, error="not installed")
    assert wrong_results(report) == []
    failed = next(row for row in report["linear"] if row["name"] == "kvpack")
    failed.update(us=None, error="WrongResult: relative error 0.5")
    report["tensors"][0]["bit_exact"] = False
    report["decode"][0].update(us=None, error="DeviceError: gone")
    assert len(wrong_results(report)) == 3


def test_plot(tmp_path: Path) -> None:
    plot = pytest.importorskip("kvpack.bench.plot")
    for name, report in (("full", synthetic_report()), ("empty", synthetic_report())):
        if name == "empty":
            for row in report["linear"]:
                row["us"] = None
        plot.plot_linear(report, tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="nothing to draw"):
        plot.plot_linear(synthetic_report() | {"linear": []}, tmp_path / "none.png")


def render_docs() -> ModuleType:
    path = Path(__file__).resolve().parents[1] / "benchmarks" / "render_docs.py"
    spec = importlib.util.spec_from_file_location("render_docs", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_rendering(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = render_docs()
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    names = [name for name in module.FIGURES if name.startswith("linear-")]
    assert len(names) >= 8
    for name in names:
        assert "bench-linear" in module.figures(name)  # says which result is missing
    write_report(tmp_path / "2026-11-25-bench-linear.json", synthetic_report())
    for name in names:
        text = module.figures(name)
        assert text.startswith("| ")
        assert "a GPU" in text


# --- a run with stand-ins for the device ---------------------------------------


class FakeBlob:
    """Decodes on the CPU, and multiplies in float64."""

    def __init__(self, data: memoryview, scales: Any, dtype: Any, shape: tuple[int, ...]) -> None:
        import torch

        from kvpack.encode.blob_decoder import decode_integers
        from kvpack.format.blob import Blob

        self.blob = torch.from_numpy(np.frombuffer(data, np.uint8).copy())
        self.scales = torch.as_tensor(scales)
        self.dtype, self.shape, self.nbytes, self.blob_bytes = dtype, shape, len(data) + 64, len(data)
        self._integers = torch.from_numpy(decode_integers(Blob(data)).astype(np.int8))

    @classmethod
    def from_bytes(cls, data: memoryview, scales: Any, dtype: Any, shape: Any, device: Any) -> FakeBlob:
        return cls(data, scales, dtype, shape)

    def check(self) -> None:
        pass

    def integers(self) -> Any:
        return self._integers.clone()

    def dequantize(self, dtype: Any = None, out: Any = None) -> Any:
        weights = (self._integers[0].double() * self.scales.double()[:, None]).to(dtype)
        return weights if out is None else out.copy_(weights)

    def linear(self, x: Any, bias: Any = None) -> Any:
        import torch

        return (x.double() @ self.dequantize(torch.float64).T).to(x.dtype)


class WrongBlob(FakeBlob):
    def linear(self, x: Any, bias: Any = None) -> Any:
        return 2 * super().linear(x)


def fake_measure(works: Any, *, samples: int, sample_ms: float, case_ms: float) -> list[Any]:
    """Checks as the true one does, and invents the times."""
    from kvpack.bench.timing import Timed, tensors

    done = []
    for number, work in enumerate(works):
        worst = max(work.error(out) for call in work.calls for out in tensors(call()))
        timed = Timed(worst, 10.0 + number, 9.0, 12.0, samples, len(work.calls), "graph")
        if worst > work.tolerance:
            timed = Timed(worst, error=f"WrongResult: {worst}")
        done.append(timed)
    return done


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    torch = pytest.importorskip("torch")
    from kvpack.bench import linear as bench_linear

    device = {"name": "none", "driver": None, "cuda": None}
    monkeypatch.setattr(bench_linear, "DEVICE", "cpu")
    monkeypatch.setattr(bench_linear, "DeviceBlob", FakeBlob)
    monkeypatch.setattr(bench_linear, "measure", fake_measure)
    monkeypatch.setattr(bench_run, "device_report", lambda: device)
    monkeypatch.setattr(bench_run, "require_cuda", lambda command: None)
    monkeypatch.setattr(bench_linear, "synchronize_or_stop", lambda: None)
    monkeypatch.setattr(bench_linear, "COPY_BYTES", (1 << 10,))
    monkeypatch.setattr(bench_linear, "CODEC_BYTES", 1 << 16)
    monkeypatch.setattr(bench_linear, "MAX_COPIES", 3)
    monkeypatch.setattr(bench_linear, "STAGED_M", 32)
    monkeypatch.setattr(bench_linear, "SPECIFICATION_SHAPE", bench_report.Shape("wide", 256, 128))
    monkeypatch.setattr(bench_report, "SPECIFICATION_SHAPE", bench_report.Shape("wide", 256, 128))
    monkeypatch.setattr(bench_linear, "_ENCODE_REPEATS", 1)
    monkeypatch.setattr(
        bench_linear, "copy_bandwidth", lambda size: {"bytes": float(size), "us": 1.0, "gb_per_s": 4000.0}
    )
    stream = MagicMock()
    for name in ("Stream", "current_stream", "stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *arguments: stream)
    return bench_linear


def small(**options: Any) -> Any:
    return parse_options(shapes="256x128,300x64", ms="1,2,8", tile_cols="32,64", quick=True, **options)


def test_a_run_measures_everything_and_reports_as_it_goes(bench: Any) -> None:
    seen: list[str] = []
    stages: list[str] = []
    report = bench.bench_linear(small(), lambda so_far: seen.append(json.dumps(so_far, allow_nan=False)), stages.append)
    assert report.keys() == TOP_KEYS
    assert report["complete"] is True
    assert report["stopped"] is None
    assert stages == ["copy", "encode", "256×128", "300×64", "streams"]
    assert len(seen) > 6
    # At M = 1 all tile columns, afterwards the chosen ones.
    mine = [row for row in report["linear"] if row["name"] == "kvpack"]
    assert len(mine) == 2 * (4 + 2 * 2)
    assert sum(row["best"] for row in mine) == 2 * 3 * 2
    assert all(row["us"] is not None and row["relative_error"] < 1e-3 for row in mine)
    assert all(row["bits_per_weight"] > 1 and row["tile_cols"] in (32, 64) for row in mine)
    dense = [row for row in report["linear"] if row["name"] == "fp16"]
    assert [row["m"] for row in dense] == [1, 2, 8] * 2
    # Peers that need CUDA fail here: one row each says why.
    failed = [row for row in report["linear"] if row["us"] is None]
    assert {row["name"] for row in failed} <= {"int8", "int4", "humming-int4"}
    assert all(row["error"] for row in failed)
    assert len(report["decode"]) == 2 * 2 * 2
    assert all(row["fraction_of_bound"] > 0 for row in report["decode"])
    assert all(tensor["bit_exact"] for tensor in report["tensors"])
    assert [(row["work"], row["m"]) for row in report["streams"][:4]] == [
        ("decode", None), ("linear", 1), ("staged", 16), ("staged", 32),
    ]  # fmt: skip
    assert all(row["serial"]["us"] for row in report["streams"])
    assert {row["where"] for row in report["encode"]} == {"cpu", "cuda"}
    assert wrong_results(report) == []
    assert report["specification"]
    for table in tables(report).values():
        assert all(len(row) == len(table.headings) for row in table.rows)


def test_wrong_products_are_not_timed(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "DeviceBlob", WrongBlob)
    report = bench.bench_linear(small())
    mine = [row for row in report["linear"] if row["name"] == "kvpack"]
    assert mine
    assert all(row["us"] is None and "WrongResult" in row["error"] for row in mine)
    assert len(wrong_results(report)) == len(mine)


def test_copies_lie_elsewhere(bench: Any) -> None:
    data = bench.encode_elements(np.full((4, 32), 3, np.uint8), integer_layout("fast", ElementKind.SIGNED, 5))
    first = FakeBlob(memoryview(data), np.ones(4, np.float32), None, (4, 32))
    several = bench.copies_of(first, 3)
    assert several[0] is first
    assert len({blob.blob.data_ptr() for blob in several}) == 3
    assert len({blob.scales.data_ptr() for blob in several}) == 3
    assert bool((several[2].blob == first.blob).all())


def test_a_time_limit_leaves_what_there_is(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10**6, 10))
    monkeypatch.setattr(bench_run.time, "monotonic", lambda: next(clock))
    report = bench.bench_linear(small(time_limit_s=120))
    assert report["complete"] is False
    assert "time limit" in report["stopped"]
    assert report["linear"]


def test_a_failure_in_the_middle_is_reported_and_raised(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []

    def broken(self: Any) -> None:
        raise RuntimeError("the device does not answer")

    monkeypatch.setattr(bench.LinearBench, "_streams", broken)
    with pytest.raises(RuntimeError):
        bench.bench_linear(small(), lambda so_far: seen.append(json.loads(json.dumps(so_far))))
    assert "does not answer" in seen[-1]["stopped"]
    assert seen[-1]["linear"]
