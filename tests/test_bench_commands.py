"""What ``kvpack bench`` says where there is nothing to measure on, and of wrong usage."""

from __future__ import annotations

import json
from typing import Any

import pytest
from conftest import cuda_available
from typer.testing import CliRunner

from kvpack.cli import ExitCode, app

pytest.importorskip("torch")  # without it, that is what is missing

# Two wrong uses of each benchmark that needs a GPU.
WRONG = {
    "linear": (["--shapes", "nonsense"], ["--tile-cols", "7"]),
    "kv-quant": (["--sizes", "nonsense"], ["--sizes", "7"]),
    "attention": (["--contexts", "100"], ["--models", "7"]),
}


def run(name: str, *arguments: str) -> Any:
    return CliRunner().invoke(app, ["bench", name, *arguments])


@pytest.mark.skipif(cuda_available(), reason="there is a device")
@pytest.mark.parametrize("name", WRONG)
def test_without_a_device_it_says_so(name: str) -> None:
    plain = run(name, "--quick")
    assert (plain.exit_code, plain.stdout) == (ExitCode.NO_DEVICE, "")
    assert f"no CUDA device: `kvpack bench {name}`" in plain.stderr
    assert plain.stderr.count("\n") == 1
    as_json = json.loads(run(name, "--quick", "--json").stdout)
    assert (as_json["ok"], as_json["error"], as_json["exit_code"]) == (False, "DeviceError", ExitCode.NO_DEVICE)


@pytest.mark.parametrize("name", WRONG)
def test_wrong_usage_is_seen_before_the_device(name: str) -> None:
    plain, as_json = WRONG[name]
    assert run(name, *plain).exit_code == ExitCode.USAGE
    assert json.loads(run(name, *as_json, "--json").stdout)["exit_code"] == ExitCode.USAGE
