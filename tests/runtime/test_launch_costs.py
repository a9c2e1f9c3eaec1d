"""The costs by which launches are chosen: shipped ones, the file of measured ones, and how they are found."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

torch = pytest.importorskip("torch")

import emulated_device  # noqa: E402

from kvpack.bench import tune as tuning  # noqa: E402
from kvpack.bench.timing import Timed  # noqa: E402
from kvpack.cli.application import app  # noqa: E402
from kvpack.encode.blob_encoder import encode_elements  # noqa: E402
from kvpack.errors import InputError  # noqa: E402
from kvpack.format.header import BlobHeader  # noqa: E402
from kvpack.format.layout import ElementKind, integer_layout  # noqa: E402
from kvpack.runtime.device import devices, kernels  # noqa: E402
from kvpack.runtime.device.devices import Limits  # noqa: E402
from kvpack.runtime.weights import launch_costs, launch_model, products  # noqa: E402
from kvpack.runtime.weights.launch_costs import TimedCase  # noqa: E402
from kvpack.runtime.weights.launch_model import COSTS, ProductFit, Terms  # noqa: E402

H100 = Limits(90, 132, 228 << 10, 227 << 10, "NVIDIA H100 80GB HBM3")
L4 = Limits(89, 58, 100 << 10, 99 << 10, "NVIDIA L4")
KEY = {"device": "NVIDIA L4", "multiprocessors": 58, "driver": 13000, "kvpack": "1", "kernels": "ab"}
OTHER = {eights: Terms(*(2 * cost for cost in terms)) for eights, terms in COSTS.items()}


MADE_FOR = launch_costs.made_for


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("KVPACK_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("KVPACK_LAUNCH_COSTS", raising=False)
    monkeypatch.setattr(launch_costs, "made_for", lambda limits: KEY)
    launch_costs.device_costs.cache_clear()
    yield
    launch_costs.device_costs.cache_clear()


@pytest.mark.parametrize(
    ("name", "architecture", "found"),
    [
        ("NVIDIA H100 80GB HBM3", 90, "H100"),
        ("NVIDIA H100 PCIe", 90, "H100 PCIe"),
        ("NVIDIA H200", 90, "H200"),
        ("NVIDIA A100-SXM4-80GB", 80, "A100"),
        ("NVIDIA A10", 86, "A10"),
        ("NVIDIA L40S", 89, "L40S"),
        ("NVIDIA GeForce RTX 4070", 89, "RTX 4090"),  # the architecture's first
        ("", 90, "H100"),
        ("NVIDIA B200", 100, "B200"),
        ("NVIDIA GeForce RTX 5090", 120, "RTX 5090"),
    ],
)
def test_devices_are_found_by_name(name: str, architecture: int, found: str) -> None:
    specification = launch_costs.specification(Limits(architecture, 100, 1 << 17, 1 << 16, name))
    assert specification is not None
    assert specification.name == found


def test_estimates_scale_an_h100s_costs() -> None:
    """Instructions with the clock; decoding no faster than memory; latencies of memory as they are."""
    assert launch_costs.shipped_costs(H100).costs == COSTS
    assert launch_costs.estimated_costs(launch_costs.H100, 132) == COSTS
    found = launch_costs.shipped_costs(L4)
    assert "estimated" in found.origin
    assert "L4" in found.origin
    for eights, before in COSTS.items():
        now = found.costs[eights]
        assert now.longest == pytest.approx(before.longest * 1980 / 2040)
        assert (now.panels, now.parts, now.unbuffered) == (before.panels, before.parts, before.unbuffered)
        # 563 bytes of a chunk at 300 GB/s · 0.9 / 58 multiprocessors.
        assert now.heaviest == pytest.approx(563.2 / (270e3 / 58), rel=1e-6)
    unknown = launch_costs.shipped_costs(Limits(150, 300, 1 << 17, 1 << 16, "NVIDIA X"))
    assert unknown.costs == COSTS
    assert "nothing is known" in unknown.origin


def test_measured_costs_are_kept_and_used() -> None:
    assert launch_costs.device_costs(L4).origin.startswith("shipped, estimated")
    path = launch_costs.write_tuned(L4, KEY, OTHER, {"seconds": 1.0})
    assert path.name == "launch-costs-nvidia-l4-58.json"
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    found = launch_costs.device_costs(L4)
    assert (found.origin, found.costs) == ("tuned", OTHER)
    assert launch_costs.device_costs(H100).origin.startswith("shipped")  # another device


def test_measured_costs_choose_launches() -> None:
    """Costs under which nothing but panels costs anything lead to the fewest; the shipped ones to more."""
    header = BlobHeader(layout=integer_layout("fast", ElementKind.SIGNED, 5), rows=512, cols=14336, tile_cols=256)
    coded = products.Coded(header, 500, False, False, *(torch.zeros(1, 1),) * 5)
    panels = dict.fromkeys(COSTS, Terms(0, 0, 0, 0, 0, 0, 1, 1))
    shipped = [products.fit_product(coded, tokens, replace(L4, name="")) for tokens in (1, 8, 32)]
    launch_costs.write_tuned(L4, KEY, panels, {})
    for tokens, before in zip((1, 8, 32), shipped, strict=True):
        tuned = products.fit_product(coded, tokens, L4)
        fewest = min(fit.panels for _, fit in tuning.launches_of(coded, tokens, L4))
        assert before is not None
        assert tuned is not None
        assert tuned.panels == fewest < before.panels


def test_the_environment_switches_them_off(monkeypatch: pytest.MonkeyPatch) -> None:
    launch_costs.write_tuned(L4, KEY, OTHER, {})
    monkeypatch.setenv("KVPACK_LAUNCH_COSTS", "shipped")
    assert launch_costs.device_costs(L4).origin.startswith("shipped")
    launch_costs.device_costs.cache_clear()
    monkeypatch.setenv("KVPACK_LAUNCH_COSTS", "fast")
    with pytest.raises(InputError, match="KVPACK_LAUNCH_COSTS is 'fast': it is tuned or shipped"):
        launch_costs.device_costs(L4)


def damaged(**changes: Any) -> str:
    costs = {str(eights): terms._asdict() for eights, terms in OTHER.items()}
    return json.dumps({"schema": 1, **KEY, "costs": costs} | changes)


def with_cost(value: Any) -> dict[str, Any]:
    costs: dict[str, Any] = {str(eights): terms._asdict() for eights, terms in OTHER.items()}
    costs["4"]["longest"] = value
    return costs


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "damaged"),
        ("[]", "no object of schema 1"),
        ("[" * 100_000, "damaged"),
        ("\udcff", "damaged"),
        (damaged(schema=2), "no object of schema 1"),
        (damaged(costs={}), "'costs' are not those of 0, 1, 2, 4, 8"),
        (damaged(costs=with_cost(-1)), "longest of 4 eights is -1"),
        (damaged(costs=with_cost(True)), "longest of 4 eights is True"),
        (damaged(costs=with_cost(float("nan"))), "longest of 4 eights is nan"),
        (damaged(costs=with_cost(1e9)), "longest of 4 eights is 1000000000.0"),
        (damaged(costs=with_cost({})), "longest of 4 eights"),
        (damaged(costs=dict.fromkeys("01248", dict.fromkeys(Terms._fields, 0))), "all costs of 0 eights are 0"),
        (damaged(driver=12080), "made for another driver and is not used: run `kvpack tune` again"),
        (damaged(kvpack="0", kernels="cd"), "made for another kvpack and kernels"),
    ],
)
def test_other_files_are_named_and_not_used(text: str, reason: str) -> None:
    path = launch_costs.costs_file(L4)
    path.parent.mkdir()
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.warns(UserWarning, match=reason) as caught:
        found = launch_costs.device_costs(L4)
    assert len(caught) == 1
    assert str(path) in str(caught[0].message)
    assert found.costs == launch_costs.shipped_costs(L4).costs
    assert found.note is not None
    assert launch_costs.device_costs(L4) is found  # said once


def test_an_unreadable_file_is_named() -> None:
    launch_costs.costs_file(L4).mkdir(parents=True)
    with pytest.warns(UserWarning, match="cannot be read .* and is not used"):
        assert launch_costs.device_costs(L4).origin.startswith("shipped")


def test_a_failed_write_leaves_the_old_file(monkeypatch: pytest.MonkeyPatch) -> None:
    path = launch_costs.write_tuned(L4, KEY, OTHER, {})
    before = path.read_bytes()

    def fail(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space"):
        launch_costs.write_tuned(L4, KEY, COSTS, {})
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_least_squares_finds_the_costs() -> None:
    random = np.random.default_rng(0)
    terms = random.uniform(0, 10, (60, 8))
    expected = Terms(0.03, 0.4, 0.0, 0.2, 1.4, 1.0, 3.0, 0.1)
    found = launch_costs.least_squares([TimedCase(terms, 5 + terms @ np.array(expected))])
    np.testing.assert_allclose(found, expected, atol=1e-9)
    noisy = launch_costs.least_squares([TimedCase(terms, 5 + terms @ np.array(expected) + random.normal(0, 1, 60))])
    assert min(noisy) >= 0


# --- tuning, with a device whose times are made up ---------------------------

# A device that an H100's costs describe badly: a warp alone is slow, panels are nearly free, but not their parts.
TRUE = Terms(0.03, 3.0, 0.0, 0.05, 0.2, 0.1, 0.1, 3.0)


def fake_launches(case: tuning.Case) -> tuning.Launches:
    layout = integer_layout(case.layout, ElementKind.SIGNED, 5)
    header = BlobHeader(layout=layout, rows=case.rows, cols=case.cols, tile_cols=256)
    shape = (header, 4096, L4, 8)
    return list(
        launch_model.gemv_launches(*shape) if case.eights == 0 else launch_model.gemm_launches(*shape, case.eights)
    )


class FakeDevice:
    """Times by ``TRUE`` costs, in a clock that a launch takes 0.01 s of."""

    def __init__(self, fails: bool = False) -> None:
        self.now = 0.0
        self.fails = fails
        self.timed: list[tuple[tuning.Case, ProductFit]] = []

    def time(self, case: tuning.Case, fits: Sequence[ProductFit]) -> list[float | None]:
        known = {fit: terms for terms, fit in fake_launches(case)}
        self.timed += [(case, fit) for fit in fits]
        self.now += 0.01 * len(fits)
        return [
            None if self.fails or fit.resident == 2 else 7 + launch_model.estimated_us(known[fit], TRUE) for fit in fits
        ]


CASES = [tuning.Case(rows, 2048, "fast", tokens) for rows in (512, 1024, 4096, 8192) for tokens in (1, 8)]


def test_tuning_finds_better_launches() -> None:
    device = FakeDevice()
    names: list[str] = []
    found = tuning.tune(
        CASES, fake_launches, device.time, COSTS, advance=names.append, clock=lambda: device.now, time_limit_s=60
    )
    assert found.complete
    assert set(found.regrets) == {0, 1}
    assert len(names) <= tuning.rounds() * len(CASES)
    assert len(device.timed) == len(set(device.timed))  # none twice
    assert found.costs[2] == COSTS[2]
    assert found.costs[4] == COSTS[4]
    for eights, (before, after) in found.regrets.items():
        assert before > 0.02
        assert after < before / 2
        # Of all launches that work, timed or not, the chosen ones are among the fastest.
        for case in CASES:
            if case.eights == eights:
                working = [(terms, fit) for terms, fit in fake_launches(case) if fit.resident == 1]
                true = {fit: 7 + launch_model.estimated_us(terms, TRUE) for terms, fit in working}
                chosen = min(working, key=lambda one: launch_model.estimated_us(one[0], found.costs[eights]))[1]
                assert true[chosen] <= 1.05 * min(true.values())


def test_tuning_ends_in_time() -> None:
    device = FakeDevice()
    found = tuning.tune(CASES, fake_launches, device.time, COSTS, clock=lambda: device.now, time_limit_s=0.3)
    assert not found.complete
    assert found.seconds < 0.6
    assert 0 < len(found.timings) < len(CASES)
    assert found.costs == COSTS
    assert not found.regrets


def test_tuning_keeps_what_cannot_be_bettered() -> None:
    """Where the shipped costs choose the fastest launches they stay, and where nothing runs too."""

    class Shipped(FakeDevice):
        def time(self, case: tuning.Case, fits: Sequence[ProductFit]) -> list[float | None]:
            known = {fit: terms for terms, fit in fake_launches(case)}
            return [7 + launch_model.estimated_us(known[fit], COSTS[case.eights]) for fit in fits]

    found = tuning.tune(CASES, fake_launches, Shipped().time, COSTS)
    assert found.costs == COSTS
    assert all(slower == (0, 0) for slower in found.regrets.values())
    broken = tuning.tune(CASES, fake_launches, FakeDevice(fails=True).time, COSTS)
    assert broken.costs == COSTS
    assert not broken.regrets
    assert not broken.launches


def test_the_plan_reaches_every_kernel_early() -> None:
    cases = tuning.plan()
    assert {case.eights for case in cases} == set(COSTS)
    assert {case.eights for case in cases[: len(cases) // 2]} == set(COSTS)
    assert {case.layout for case in cases} == {"fast", "balanced"}


# --- the command -------------------------------------------------------------


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> FakeDevice:
    """`kvpack tune` finds the device of `FakeDevice`, which is said to be an L4."""
    fake = FakeDevice()
    timer = SimpleNamespace(
        launches=fake_launches, time=fake.time, compile=lambda cases: None, errors={"512×2048": "not captured"}
    )
    monkeypatch.setattr(tuning, "DeviceTimer", lambda _: timer)
    monkeypatch.setattr(tuning, "plan", lambda: CASES)
    monkeypatch.setattr("kvpack.runtime.device.devices.resolve_device", lambda name: torch.device("cuda", 0))
    monkeypatch.setattr("kvpack.runtime.device.devices.device_limits", lambda _: L4)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    return fake


def test_the_command_tunes_once(device: FakeDevice) -> None:
    def run(*options: str) -> dict[str, Any]:
        done = CliRunner().invoke(app, ["tune", *options, "--json"])
        assert done.exit_code == 0, done.output
        return dict(json.loads(done.stdout))

    before = run("--dry-run")
    assert before["in_use"].startswith("shipped, estimated")
    assert not device.timed
    assert not Path(before["file"]).exists()
    assert before["costs"]["0"] == launch_costs.shipped_costs(L4).costs[0]._asdict()
    found = run()
    assert found["in_use"] == "tuned"
    assert found["launches_timed"] > 60
    assert found["cases_timed"] == len(CASES)
    for slower in found["slower_than_best"].values():
        assert 0 <= slower["after"] < slower["before"]
    kept = json.loads(Path(found["file"]).read_text())
    assert kept["costs"] == found["costs"] != before["costs"]
    assert run("--dry-run")["costs"] == found["costs"]
    shown = CliRunner().invoke(app, ["tune"])
    assert shown.exit_code == 0
    assert "NVIDIA L4: launches are chosen by costs that are tuned" in shown.stdout
    assert "up to 8 vectors: chosen launches were" in shown.stdout
    assert "kvpack: 512×2048: not captured" in shown.stderr


def test_the_command_keeps_nothing_of_too_few_times(device: FakeDevice) -> None:
    device.fails = True
    done = CliRunner().invoke(app, ["tune", "--json"])
    assert done.exit_code == 5
    assert (
        "nothing could be tuned in 60 s (0 of 8 products were timed; not captured)"
        in json.loads(done.stdout)["message"]
    )
    assert not launch_costs.costs_file(L4).exists()


def test_the_command_sees_first_whether_costs_can_be_kept(
    device: FakeDevice, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("KVPACK_CACHE_DIR", str(file / "folder"))
    done = CliRunner().invoke(app, ["tune", "--json"])
    assert done.exit_code == 2
    assert "(Not a directory): set KVPACK_CACHE_DIR" in json.loads(done.stdout)["message"]
    assert not device.timed


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_the_command_needs_a_device() -> None:
    messages = {"cuda": "no CUDA device: `kvpack tune`", "cpu": "launches are a GPU's", "tpu": "is no device"}
    for name, message in messages.items():
        done = CliRunner().invoke(app, ["tune", "--device", name, "--json"])
        assert done.exit_code == 5
        assert message in json.loads(done.stdout)["message"]


@pytest.mark.gpu
def test_times_on_a_device() -> None:
    """Launches of one product, of several kinds, all with right results."""
    timer = tuning.DeviceTimer(torch.device("cuda", torch.cuda.current_device()))
    for tokens in (1, 8):
        case = tuning.Case(2048, 2048, "fast", tokens)
        launches = timer.launches(case)
        chosen = tuning.worth_timing(launches, COSTS[case.eights], 6)
        times = timer.time(case, [launches[number][1] for number in chosen])
        assert not timer.errors
        assert all(us is not None and 1 < us < 1000 for us in times)


@pytest.mark.parametrize("tokens", [1, 8])
def test_times_are_of_right_results(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    """`DeviceTimer` on the emulator: launches of several kinds give the product that they are compared with."""
    works: list[Any] = []

    def check(given: Any, **options: Any) -> Any:
        works.extend(given)
        right = [work.error(work.calls[-1]()) <= work.tolerance for work in given]
        return [Timed(us=1.0 if one else None, error=None if one else "wrong") for one in right]

    def encoded(elements: Any, layout: Any, *, tile_cols: int | None) -> Any:
        data = encode_elements(elements.numpy(), layout, tile_cols=tile_cols)
        return SimpleNamespace(blob=torch.from_numpy(np.frombuffer(data, np.uint8).copy()))

    blobs: list[Any] = []

    def from_bytes(data: Any, scales: Any, *more: Any) -> Any:
        blobs.append(emulated_device.coded_tensor(bytes(data), scales))
        return SimpleNamespace(nbytes=len(data), _arguments=lambda: (blobs[-1],))

    compiled: set[Any] = set()
    monkeypatch.setattr(tuning, "measure", check)
    monkeypatch.setattr(tuning, "encode_on_device", encoded)
    monkeypatch.setattr(tuning.DeviceBlob, "from_bytes", from_bytes)
    monkeypatch.setattr(tuning.ops, "_coded", lambda blob: blob)
    monkeypatch.setattr(tuning, "compile_ahead", compiled.update)
    monkeypatch.setattr(tuning, "synchronize_or_stop", lambda: None)
    monkeypatch.setattr("kvpack.runtime.device.devices.device_limits", lambda _: emulated_device.LIMITS)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(L2_cache_size=1))
    monkeypatch.setattr(kernels, "launch", emulated_device.emulated_launch)
    timer = tuning.DeviceTimer(torch.device("cpu"))
    case = tuning.Case(200, 256, "fast", tokens, 64)
    launches = timer.launches(case)
    chosen = tuning.worth_timing(launches, COSTS[case.eights], 5)
    fits = [launches[number][1] for number in chosen]
    assert timer.time(case, fits) == [1.0] * 5
    assert len({(fit.panels, fit.member_width, fit.resident) for fit in fits}) > 2
    timer.compile([case])
    assert {tuning.kernel_of(blobs[0], tokens, fit, emulated_device.LIMITS) for fit in fits} <= compiled
    assert len(compiled) == 4  # one or two buffers, and blocks
    assert len(works) == 5
    assert timer.launches(case) == launches  # of the same weights
    assert len(blobs) == 1
    # A result that is not the product's has no time.
    monkeypatch.setattr(products, "multiply", lambda coded, x, *more: torch.zeros(len(x), 200))
    assert timer.time(case, fits[:1]) == [None]
    assert timer.errors == {case.name: "wrong"}


@pytest.mark.gpu
def test_costs_of_this_device_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the device's true name, driver and kernels: read back by what a first product calls."""
    monkeypatch.setattr(launch_costs, "made_for", MADE_FOR)
    limits = devices.device_limits(torch.device("cuda", torch.cuda.current_device()))
    key = MADE_FOR(limits)
    assert key["driver"] >= 12000
    launch_costs.write_tuned(limits, key, OTHER, {})
    assert launch_costs.device_costs(limits).costs == OTHER
