"""``kvpack bench snapshot``: pages that are repeated, the prefill's layer, break-even, tables, pictures, and a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

torch = pytest.importorskip("torch")

from test_bench_linear import render_docs  # noqa: E402

from kvpack import KVCache, PageFormat  # noqa: E402
from kvpack.bench import snapshot_speed  # noqa: E402
from kvpack.bench.report import write_report  # noqa: E402
from kvpack.bench.snapshot import bench_snapshot  # noqa: E402
from kvpack.bench.snapshot_report import break_even_gb_per_s, prefill_row, tables  # noqa: E402
from kvpack.bench.snapshot_speed import (  # noqa: E402
    LlamaLayer,
    constructed_cache,
    layer_seconds,
    measure_speed,
    page_order,
    same_pages,
    tiled_cache,
)
from kvpack.cli import ExitCode, app  # noqa: E402
from kvpack.format.pages import PAGE_TOKENS, Side  # noqa: E402
from kvpack.format.snapshot import SnapshotFile  # noqa: E402

CPU = torch.device("cpu")


def context(path: Path, tokens: int = 700, layers: int = 3, heads: int = 3, dim: int = 48, **options: Any) -> KVCache:
    """A saved sequence whose tokens wander, so that pages differ."""
    cache = KVCache(layers, heads, dim, 1024, device="cpu", **(options or {"formats": PageFormat.INT4}))
    generator = torch.Generator().manual_seed(0)
    for layer in range(layers):
        k, v = torch.randn(2, 1, heads, tokens, dim, generator=generator).cumsum(3).half()
        cache.append(layer, k, v)
    cache.save(path)
    return cache


@pytest.mark.parametrize(
    ("tokens", "recent", "pages", "expected"),
    [
        (64 * 6, 128, 9, [0, 1, 2, 3, 1, 2, 3, 4, 5]),
        (64 * 6 + 1, 64, 7, [0, 1, 2, 3, 4, 1, 5]),
        (64 * 3, 1024, 6, [0, 0, 0, 0, 1, 2]),
        (64, 64, 3, [0, 0, 0]),
        (64 * 9, 256, 3, [0, 5, 6]),  # more of the newest than there is room for
    ],
)
def test_pages_are_repeated_between_the_first_and_the_newest(
    tokens: int, recent: int, pages: int, expected: list[int]
) -> None:
    assert page_order(tokens, recent, pages) == expected


@pytest.mark.parametrize("options", [{}, {"formats": PageFormat.INT2, "recent_tokens": 200}, {"budget": 0.4}], ids=str)
def test_a_tiled_cache_repeats_layers_heads_and_pages(tmp_path: Path, options: dict[str, Any]) -> None:
    source = context(tmp_path / "context", **options)
    with SnapshotFile(tmp_path / "context") as file:
        cache = tiled_cache(source, file, 1280, layers=5)
    assert (cache.num_layers, cache.num_kv_heads, cache.head_dim) == (5, 1024 // 48, 48)
    assert [cache.length(layer, 0) for layer in range(5)] == [1280] * 5
    order = page_order(700, source.recent_tokens, 20)
    for layer, side, page in np.ndindex(5, len(Side), 20):
        (found,) = cache.read_pages(cache.entries[layer, side, 0, page])
        (expected,) = source.read_pages(source.entries[layer % 3, side, 0, order[page]])
        assert all(torch.equal(block, expected[head % 3]) for head, block in enumerate(found))
    cache.check()
    cache.free(0)
    assert cache.pools.bytes_in_use == 0


def test_constructed_pages() -> None:
    cache = constructed_cache(2, 700, CPU, heads=3)
    assert [cache.length(layer, 0) for layer in range(2)] == [700, 700]
    keys, values = cache.read(1, 0)
    assert 2 < keys.mean(1).std() < 4.5  # means of channels
    assert 0.9 < values.std() < 1.1


@torch.no_grad()
def test_a_layer_sees_what_is_before_alone_whatever_its_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer = LlamaLayer(CPU, 8)
    x = torch.randn(75, layer.hidden).bfloat16()
    whole = layer.prefill(x)
    changed = x.clone()
    changed[50] += 1
    other = layer.prefill(changed)
    assert torch.equal(whole[:50], other[:50])
    assert not torch.equal(whole[60:], other[60:])
    monkeypatch.setattr(snapshot_speed, "CHUNK_TOKENS", 32)
    difference = (layer.prefill(x).float() - whole.float()).norm() / whole.float().norm()
    assert difference < 0.01
    taken = layer_seconds(layer, 65)
    assert taken is not None
    assert taken > 0


def test_a_prefill_that_has_no_memory_is_left_out() -> None:
    class Full(LlamaLayer):
        def prefill(self, x: torch.Tensor) -> torch.Tensor:
            raise torch.OutOfMemoryError

    assert layer_seconds(Full(CPU, 8), 64) is None


SHAPE = {
    "layers": 32, "kv_heads": 8, "head_dim": 128, "tokens": 1000, "elements": 10**9,
    "page_bytes": 5 * 10**8, "fp16_bytes": 2 * 10**9, "file_bytes": 4 * 10**8,
}  # fmt: skip


def test_break_even() -> None:
    """Twice the tokens: 0.8 GB of file, loaded in 0.4 s once it is there, against 32 · 0.075 s."""
    row = prefill_row(2000, 0.075, 32, SHAPE, 0.2, is_real=True)
    assert row["prefill_s"] == pytest.approx(2.4)
    assert (row["load_s"], row["file_bytes"]) == (0.4, 8 * 10**8)
    assert row["break_even_gb_per_s"] == pytest.approx(0.8 / 2.0)
    assert row["pages_break_even_gb_per_s"] == pytest.approx(1.0 / 2.4)
    assert row["fp16_break_even_gb_per_s"] == pytest.approx(4.0 / 2.4)
    never = prefill_row(2000, 0.01, 32, SHAPE, 0.2, is_real=True)
    assert never["break_even_gb_per_s"] is None
    constructed = prefill_row(2000, 0.075, 32, SHAPE, 0.2, is_real=False)
    assert [constructed[key] for key in row if "break_even" in key or key == "file_bytes"] == [None] * 4
    assert break_even_gb_per_s(1e9, 1.0, 1.0) is None


def gpu_report() -> dict[str, Any]:
    """As of a GPU whose coder is not measured."""
    speeds = {"encode on the GPU": None, "save": 2.0, "load from a warm file": 0.2}
    speed = [
        {
            "name": name,
            "seconds": s,
            "elements_per_s": None if s is None else 1e9 / s,
            "gb_per_s": None if s is None else 0.5 / s,
        }
        for name, s in speeds.items()
    ]
    row = {"bytes": 4 * 10**8, "of_fp16": 0.2, "of_pages": 0.8, "encode_gb_per_s": 1.0, "decode_gb_per_s": 2.0}
    return {
        "what": "bench-snapshot", "note": "", "command": "kvpack bench snapshot a.kv", "date": "2026-11-30", "cpu": "X",
        "cores": 2, "commit": "0" * 40, "versions": {"torch": "2"}, "threads": 2, "tokens": 700, "complete": True,
        "device": {"name": "a GPU", "driver": "1", "cuda": "13.0"}, "seconds": {"total": 1.0}, "stopped": None,
        "rows": [row | {"name": "kvpack"}, {"name": "lz4", "reason": "not installed"}],
        "shape": SHAPE, "speed": speed,
        "prefill": [prefill_row(n, n * 4e-5, 32, SHAPE, 0.2, is_real=True) for n in (1000, 2000)],
    }  # fmt: skip


def test_tables_and_pictures(tmp_path: Path) -> None:
    report = gpu_report()
    found = tables(report)
    assert list(found) == ["bytes", "speed", "prefill"]
    assert all(len(row) == len(one.headings) for one in found.values() for row in one.rows)
    assert found["bytes"].rows == [
        ["kvpack", "400,000,000", "0.200", "0.800", "1.000", "2.000"],
        ["lz4", "not installed", "–", "–", "–", "–"],
    ]
    assert found["speed"].rows[0] == ["encode on the GPU", "–", "–", "–"]
    assert found["speed"].rows[2] == ["load from a warm file", "0.200", "5.00", "2.50"]
    assert found["prefill"].rows[1] == ["2000", "2.56", "0.400", "6.4", "0.80", "0.370", "0.391", "1.562"]
    write_report(tmp_path / "2026-11-30-bench-snapshot.json", report)
    module = render_docs()
    names = [name for name in module.FIGURES if name.startswith("snapshot-")]
    assert names == ["snapshot-bytes", "snapshot-speed", "snapshot-prefill"]
    module.RESULTS = tmp_path
    assert all("a GPU, driver 1" in module.figures(name) for name in names)
    module.RESULTS = tmp_path / "none"
    assert {module.figures(name) for name in names} == {"benchmarks/results has no `bench-snapshot` yet.\n"}
    plot = pytest.importorskip("kvpack.bench.plot")
    for changed in ({}, {"prefill": []}, {"rows": []}):
        plot.plot_snapshot(report | changed, tmp_path / "plot.png")
        assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
        (tmp_path / "plot.png").unlink()


def check_speed(found: dict[str, Any], layers: int, tokens: int) -> None:
    shape = found["shape"]
    assert (shape["layers"], shape["tokens"]) == (layers, tokens)
    assert shape["elements"] == 2 * layers * shape["kv_heads"] * shape["head_dim"] * tokens
    assert shape["fp16_bytes"] == 2 * shape["elements"] > shape["page_bytes"] > shape["file_bytes"]
    seconds = {row["name"]: row["seconds"] for row in found["speed"]}
    assert min(seconds[name] for name in ("save", "load from a warm file", "read the warm file")) > 0
    for row in found["speed"]:
        if row["seconds"] is not None:
            assert row["gb_per_s"] == pytest.approx(shape["page_bytes"] / row["seconds"] / 1e9)


def test_a_run_on_the_cpu(tmp_path: Path) -> None:
    context(tmp_path / "context", heads=2, dim=64)
    said: list[str] = []
    found = measure_speed(
        tmp_path / "context",
        tmp_path,
        tokens=1024,
        threads=1,
        is_real=True,
        say=said.append,
        device=CPU,
        layers=2,
        prefill_tokens=(64, 128),
        layer=LlamaLayer(CPU, 8),
    )
    check_speed(found, 2, 1024)
    assert said == ["pages", "save", "load", "prefill of 64 tokens", "prefill of 128 tokens"]
    first, second = found["prefill"]
    assert (first["tokens"], second["load_s"]) == (64, 2 * first["load_s"])
    assert first["file_bytes"] == found["shape"]["file_bytes"] / 16


def test_a_load_that_changes_pages_is_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context(tmp_path / "context")
    monkeypatch.setattr(snapshot_speed, "same_pages", lambda one, other: not same_pages(one, other))
    with pytest.raises(AssertionError, match="not the same"):
        measure_speed(
            tmp_path / "context", tmp_path, tokens=512, threads=1, is_real=True, say=str, device=CPU, layers=1
        )


def test_other_pages_are_seen(tmp_path: Path) -> None:
    one, other = (constructed_cache(2, 300, CPU, heads=2) for _ in range(2))
    assert same_pages(one, other)
    (block,) = other.read_pages(other.entries[1, Side.V, 0, 300 // PAGE_TOKENS - 1])
    block.view(-1)[7] ^= 1
    assert not same_pages(one, other)


def run(*arguments: object, code: int = ExitCode.OK) -> Any:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("no_gpu")
def test_the_command_without_a_gpu(tmp_path: Path) -> None:
    context(tmp_path / "context")
    size = (tmp_path / "context").stat().st_size
    for command in (("bench", "snapshot"), ("kv", "bench")):
        out = run(*command, tmp_path / "context", "--threads", 1, "--report", tmp_path / "report.json", "--json").stdout
        report = json.loads(out)
        assert report == {"ok": True} | json.loads((tmp_path / "report.json").read_text())
        assert (report["source"], report["shape"], report["prefill"]) == ("file", None, [])
        rows = {row["name"]: row for row in report["rows"]}
        assert rows["kvpack"]["bytes"] == size
        assert rows["fp16"]["bytes"] == 2 * 2 * 3 * 3 * 48 * 700
    constructed = run("bench", "snapshot", "--threads", 1).stdout
    assert "Pages are constructed" in constructed
    assert "zlib" not in constructed
    assert not any(
        ",000" in line or "0." in line.split("–")[0] for line in constructed.splitlines() if "kvpack " in line
    )
    assert "no multiple of 64" in run("bench", "snapshot", "--tokens", 4097, code=ExitCode.USAGE).stderr
    refused = run("bench", "snapshot", "--threads", 1, "--plot", tmp_path / "p.png", "--json", code=ExitCode.USAGE)
    assert json.loads(refused.stdout)["error"] == "InputError"


@pytest.mark.usefixtures("no_gpu")
def test_constructed_pages_tell_no_sizes() -> None:
    report = bench_snapshot(threads=1)
    (row,) = report["rows"]
    assert row["name"] == "kvpack"
    assert [row[key] for key in ("bytes", "of_fp16", "of_pages")] == [None] * 3
    assert row["decode_gb_per_s"] > 0


@pytest.mark.gpu
def test_a_run_on_a_gpu(tmp_path: Path) -> None:
    context(tmp_path / "context", heads=2, dim=64)
    device = torch.device("cuda")
    found = measure_speed(
        tmp_path / "context",
        tmp_path,
        tokens=4096,
        threads=None,
        is_real=True,
        say=str,
        layers=2,
        prefill_tokens=(8192,),
        layer=LlamaLayer(device),
    )
    check_speed(found, 2, 4096)
    assert 0 < found["prefill"][0]["layer_s"] < 1
