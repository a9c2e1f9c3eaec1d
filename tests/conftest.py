"""Options, markers and the hypothesis profile of all tests."""

from __future__ import annotations

import gc
import os
import sys
import warnings
from functools import cache
from pathlib import Path

import pytest
from hypothesis import settings

# The modules (blob_surgery, independent_decoder, make_golden) lie beside this file; benchmark scripts are tested too.
TESTS = Path(__file__).parent
for folder in (str(TESTS.parent / "benchmarks"), str(TESTS)):
    if folder not in sys.path:
        sys.path.insert(0, folder)

# NumPy and torch read this when they are imported, and processes that tests start inherit it. Products of tests are
# small: threads that wait for one another make them several times slower, more so on a machine with other work.
for library in ("OMP", "OPENBLAS", "MKL"):
    os.environ.setdefault(f"{library}_NUM_THREADS", "1")

settings.register_profile("kvpack", deadline=None, derandomize=True)
settings.load_profile("kvpack")


@cache
def cuda_available() -> bool:
    """Whether there is a CUDA device that CuPy can use; never raises."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import cupy

            return bool(cupy.cuda.is_available())
    except Exception:  # absent, or an installation that cannot be imported: no device either way
        return False


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require-gpu",
        action="store_true",
        help="fail the tests marked gpu instead of skipping them if there is no CUDA device",
    )
    parser.addoption(
        "--all-kernels",
        action="store_true",
        help="compile the whole product of kernels, layouts, options and GPUs, not a selection of it",
    )


def pytest_collection_finish() -> None:
    """What is alive now stays so; to look through it takes 0.3 s, each time that a bench or a test collects garbage."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("all_kernels") and not item.config.getoption("--all-kernels"):
        pytest.skip("takes long: --all-kernels is not given")
    if item.get_closest_marker("gpu") is None or cuda_available():
        return
    if item.config.getoption("--require-gpu"):
        pytest.fail("no CUDA device, and --require-gpu is given", pytrace=False)
    pytest.skip("no CUDA device")
