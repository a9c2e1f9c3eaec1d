"""``kvpack bench kv-quant`` where there is no GPU: options, tables, the picture, and a run with stand-ins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_bench_linear import fake_measure, render_docs
from typer.testing import CliRunner

from kvpack.bench import kv_quant_report as report_module
from kvpack.bench.kv_quant_report import (
    FORMATS_SIZE,
    OTHER_WAYS,
    QUICK_SIZES,
    RANDOM_SOURCE,
    SIZES,
    VARIANTS,
    Size,
    parse_options,
    tables,
    wrong_results,
)
from kvpack.bench.report import write_report
from kvpack.cli import ExitCode, app

TOP_KEYS = {
    "what", "schema", "complete", "stopped", "note", "command", "kvpack", "date", "commit",
    "package_changed_since_commit", "cpu", "cores", "load_at_start", "python", "versions", "device", "options",
    "seconds", "copy", "processor", "matrices", "quality",
}  # fmt: skip
DEVICE = {"name": "a GPU", "driver": "1", "cuda": "13.0"}


def test_options_have_the_defaults_of_a_full_and_of_a_quick_run() -> None:
    full, quick = parse_options(), parse_options(quick=True, kv="keys.npz")
    assert (full.sizes, quick.sizes) == (SIZES, QUICK_SIZES)
    assert len(SIZES) == 10
    assert FORMATS_SIZE in full.sizes
    assert full.as_dict().keys() == quick.as_dict().keys()
    assert quick.as_dict()["kv"] == "keys.npz"
    assert [size.label for size in parse_options(sizes="300x20, 1×8,300x20").sizes] == ["300×20", "1×8"]
    assert len(list(full.cases(FORMATS_SIZE))) == 1 + len(OTHER_WAYS)
    assert [case.format for case in full.cases(SIZES[0])] == ["int8"]


@pytest.mark.parametrize("wrong", ["", "5", "0x5", "5x0", "x5", "5x70000", "16777217x1", "16777216x65536"])
def test_wrong_sizes_are_named(wrong: str) -> None:
    with pytest.raises(ValueError, match=f"^'{wrong}'"):
        parse_options(sizes=wrong)


# --- a run with stand-ins for the device ---------------------------------------


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("torch")
    from kvpack.bench import kv_quant as bench_kv_quant
    from kvpack.bench import run as bench_run

    monkeypatch.setattr(bench_kv_quant, "DEVICE", "cpu")
    monkeypatch.setattr(bench_kv_quant, "measure", fake_measure)
    monkeypatch.setattr(bench_run, "device_report", lambda: DEVICE)
    monkeypatch.setattr(bench_run, "require_cuda", lambda command: None)
    monkeypatch.setattr(bench_kv_quant, "MAX_COPIES", 2)
    monkeypatch.setattr(bench_kv_quant, "CPU_ELEMENTS", 4000)
    monkeypatch.setattr(
        bench_kv_quant, "copy_bandwidth", lambda size: {"bytes": float(size), "us": 1.0, "gb_per_s": 4000.0}
    )
    monkeypatch.setattr(report_module, "FORMATS_SIZE", Size(200, 40))
    return bench_kv_quant


def small(**options: Any) -> Any:
    return parse_options(sizes="64x21,200x40", **options)


def check_tables(report: dict[str, Any]) -> dict[str, Any]:
    found = tables(report)
    for table in found.values():
        assert all(len(row) == len(table.headings) for row in table.rows), table.title
        assert all(isinstance(cell, str) for row in table.rows for cell in row), table.title
    return found


def test_a_run_measures_everything_and_reports_as_it_goes(bench: Any, tmp_path: Path) -> None:
    seen: list[str] = []
    stages: list[str] = []
    report = bench.bench_kv_quant(small(), lambda so_far: seen.append(json.dumps(so_far)), stages.append)
    assert report.keys() == TOP_KEYS
    assert (report["complete"], report["stopped"], wrong_results(report)) == (True, None, [])
    assert stages == ["copy", "64×21", "200×40"]
    assert len(seen) > 8
    ways = 2 + len(OTHER_WAYS)
    assert len(report["processor"]) == len(report["quality"]) == ways
    assert [row["variant"] for row in report["matrices"]] == list(VARIANTS) * ways
    assert [row["measured_rows"] for row in report["processor"]] == [64] + [100] * (ways - 1)
    first = report["matrices"][0]
    assert first["quantize"]["relative_error"] == first["dequantize"]["relative_error"] == 0
    least_bytes = 64 * 21 * 2 + 64 * 24 + 21 * 4
    assert first["quantize_fraction"] == pytest.approx(least_bytes / 4e6 / first["quantize"]["us"])
    moved = {(row["axis"], row["variant"]): row["quantize_moved_fraction"] / row["quantize_fraction"]
             for row in report["matrices"] if row["format"] == "int8"}  # fmt: skip
    assert moved["token", "vectorized"] == 1
    assert all(ratio > 1.5 for case, ratio in moved.items() if case != ("token", "vectorized"))
    assert first["total_ms"] == pytest.approx((first["quantize"]["us"] + first["dequantize"]["us"]) / 1e3)
    assert first["quantize_speedup"] > 0
    assert {row["source"] for row in report["quality"]} == {RANDOM_SOURCE}
    error = {(row["format"], row["axis"]): row["relative_l2"] for row in report["quality"][1:]}
    assert error["int8", "channel"] < error["fp8_e4m3", "channel"] < error["int4", "channel"] < error["int2", "channel"]
    found = check_tables(report)
    assert list(found) == ["classic", "formats", "cpu", "quality", "copy"]
    assert len(found["classic"].rows) == 8
    assert found["cpu"].rows[0][-1] == ""
    assert found["cpu"].rows[1][-1].startswith("100 rows measured")

    write_report(tmp_path / "2026-11-25-bench-kv-quant.json", report)
    module = render_docs()
    module.RESULTS = tmp_path
    names = [name for name in module.FIGURES if name.startswith("kv-quant-")]
    assert names
    for name in names:
        assert "a GPU" in module.figures(name)
    module.RESULTS = tmp_path / "none"
    assert all("`bench-kv-quant`" in module.figures(name) for name in names)

    plot = pytest.importorskip("kvpack.bench.plot")
    plot.plot_kv_quant(report, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="nothing to draw"):
        plot.plot_kv_quant(report | {"matrices": []}, tmp_path / "none.png")


def test_keys_of_a_model(bench: Any, tmp_path: Path) -> None:
    keys = np.random.default_rng(0).normal(0, 1, (2, 3, 50, 16)).astype(np.float32)
    np.savez(tmp_path / "keys.npz", K=keys, V=keys[0])
    report = bench.bench_kv_quant(small(kv=str(tmp_path / "keys.npz")))
    assert [(row["source"], row["matrices"], row["rows"], row["columns"]) for row in report["quality"]] == [
        ("keys.npz", 6, 50, 16)
    ] * (1 + len(OTHER_WAYS))
    check_tables(report)
    np.savez(tmp_path / "wrong.npz", V=keys)
    (tmp_path / "text.npz").write_text("no arrays")
    np.savez(tmp_path / "mixed.npz", K0=keys, K1=keys[..., :8])
    for name in ("wrong", "text", "mixed"):
        with pytest.raises(ValueError, match=rf"{name}\.npz"):
            bench.load_matrices(tmp_path / f"{name}.npz")


def test_other_bytes_than_the_cpus_are_not_timed(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = bench.quantize_matrix

    def wrong(x: Any, page_format: Any, axis: Any, variant: str | None = None) -> Any:
        done = right(x, page_format, axis)
        if variant == "tiled":
            done.codes[3, 5] ^= 1
        return done

    monkeypatch.setattr(bench, "quantize_matrix", wrong)
    report = bench.bench_kv_quant(parse_options(sizes="64x21"))
    assert [row["quantize"]["us"] is None for row in report["matrices"]] == [name == "tiled" for name in VARIANTS]
    assert len(wrong_results(report)) == 1
    check_tables(report)

    def all_wrong(x: Any, page_format: Any, axis: Any, variant: str | None = None) -> Any:
        done = right(x, page_format, axis)
        done.scales[0] *= 2
        return done

    monkeypatch.setattr(bench, "quantize_matrix", all_wrong)
    assert len(wrong_results(bench.bench_kv_quant(parse_options(sizes="64x21")))) == 2 * len(VARIANTS)


def test_a_time_limit_leaves_what_there_is(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvpack.bench import run as bench_run

    clock = iter(range(0, 10**6, 10))
    monkeypatch.setattr(bench_run.time, "monotonic", lambda: next(clock))
    report = bench.bench_kv_quant(small(time_limit_s=80))
    assert (report["complete"], bool(report["matrices"])) == (False, True)
    assert "time limit" in report["stopped"]


def test_variants_are_those_of_the_kernels(bench: Any) -> None:
    assert [variant.name.lower() for variant in bench.Variant] == list(VARIANTS)


# --- the command -------------------------------------------------------------


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["bench", "kv-quant", *arguments])


def test_the_command_prints_writes_and_draws(bench: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    files = tmp_path / "report.json", tmp_path / "plot.png"
    arguments = ("--sizes", "64x21", "--report", str(files[0]), "--plot", str(files[1]))
    plain = run(*arguments)
    assert plain.exit_code == ExitCode.OK, plain.output
    assert "64×21" in plain.stdout
    assert "vectorized" in plain.stdout
    assert all(file.stat().st_size for file in files)
    as_json = json.loads(run(*arguments, "--json").stdout)
    assert as_json["ok"] is True
    assert run("--sizes", "64x21", "--kv", str(tmp_path / "absent.npz")).exit_code == ExitCode.USAGE
