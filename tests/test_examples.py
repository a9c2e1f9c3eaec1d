"""The scripts of examples/, each run as it is."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import kvpack

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for number in range(3):
        weights = np.random.default_rng(number).normal(size=(64, 160)).astype(np.float32)
        save_file({f"layers.{number}.up_proj.weight": weights}, folder / f"{number}.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_slurm(model: Path, tmp_path: Path) -> None:
    """Tasks as Slurm starts them: the numbers in the environment, the arguments of sbatch."""
    kvpack.compress(model, tmp_path / "one", bits=4)
    command = tmp_path / "bin" / "kvpack"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m kvpack "$@"\n')
    command.chmod(0o755)
    said = []
    for task in (2, 1):
        environment = {
            "PATH": f"{command.parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "SLURM_ARRAY_TASK_ID": str(task),
            "SLURM_ARRAY_TASK_COUNT": "2",
            "SLURM_CPUS_PER_TASK": "1",
        }
        script = [EXAMPLES / "compress-slurm.sh", model, tmp_path / "out", "--bits", "4"]
        done = subprocess.run(script, env=os.environ | environment, capture_output=True, text=True, check=True)
        said.append(done.stdout)
    assert '"joined": false' in said[0]
    assert '"joined": true' in said[1]
    assert contents(tmp_path / "out") == contents(tmp_path / "one")


def test_ray(model: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("ray") is None:
        pytest.skip("ray is not installed")
    kvpack.compress(model, tmp_path / "one", bits=4)
    script = [sys.executable, EXAMPLES / "compress_ray.py", model, tmp_path / "out", "--parts", "2", "--bits", "4"]
    done = subprocess.run(
        script, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True, timeout=300
    )
    assert sorted(line[:8] for line in done.stdout.splitlines() if line.startswith("part")) == ["part 1/2", "part 2/2"]
    assert contents(tmp_path / "out") == contents(tmp_path / "one")
