"""What the wheel carries, and where the CUDA sources are found."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from kvpack.runtime.device.sources import cuda_source_dir

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from hatchling.build import build_wheel

    folder = tmp_path_factory.mktemp("wheel")
    with contextlib.chdir(ROOT):
        return folder / build_wheel(str(folder))


@pytest.fixture
def installed(wheel: Path, tmp_path: Path) -> Path:
    """A folder such as site-packages, with NVIDIA's `cuda` beside kvpack."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    (tmp_path / "cuda").mkdir()
    return tmp_path


def find_sources(site: Path) -> subprocess.CompletedProcess[str]:
    code = "from kvpack.runtime.device.sources import cuda_source_dir; print(cuda_source_dir())"
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=site,
        env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_sources_of_this_installation() -> None:
    assert (cuda_source_dir() / "README.md").is_file()


def test_wheel_contents(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {"kvpack/_cuda/README.md", "kvpack/py.typed"} <= set(names)
    (info,) = {name.split("/")[0] for name in names if ".dist-info/" in name}
    assert f"{info}/licenses/LICENSE" in names
    assert {name.split("/")[0] for name in names} == {"kvpack", info}  # no `cuda`, no `tests`
    assert not [name for name in names if "__pycache__" in name]


def test_wheel_has_no_python_among_the_cuda_sources(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        sources = [name for name in archive.namelist() if name.startswith("kvpack/_cuda/")]
    assert not [name for name in sources if name.endswith(".py")]


def test_sources_of_an_installed_wheel(installed: Path) -> None:
    found = find_sources(installed)
    assert found.returncode == 0, found.stderr
    assert Path(found.stdout.strip()).samefile(installed / "kvpack" / "_cuda")


def test_missing_sources_are_an_error(installed: Path) -> None:
    shutil.rmtree(installed / "kvpack" / "_cuda")
    found = find_sources(installed)
    assert found.returncode != 0
    assert "FileNotFoundError: kvpack's CUDA sources are missing" in found.stderr
