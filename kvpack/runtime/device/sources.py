"""Where the CUDA C++ sources lie."""

from __future__ import annotations

from importlib import resources
from pathlib import Path


def cuda_source_dir() -> Path:
    """The folder of the CUDA sources: ``kvpack/_cuda`` of a wheel, or ``cuda/`` of a checkout.

    Raises:
        FileNotFoundError: neither is there.
    """
    installed = resources.files("kvpack").joinpath("_cuda")
    if isinstance(installed, Path) and installed.is_dir():
        return installed
    root = Path(__file__).resolve().parents[3]
    # In site-packages a folder named `cuda` is NVIDIA's, so that the name alone proves nothing.
    if (root / "pyproject.toml").is_file() and (root / "cuda").is_dir():
        return root / "cuda"
    raise FileNotFoundError(
        f"kvpack's CUDA sources are missing: neither {installed} (installed) nor "
        f"{root / 'cuda'} beside a pyproject.toml (checkout) is there; reinstall kvpack"
    )
