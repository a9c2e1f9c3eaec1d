"""A run of a benchmark: a device, stages, a time limit, and a report that is handed out as it grows."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch

from kvpack.bench.provenance import environment, kvpack_command
from kvpack.bench.report import Report, Row, finite
from kvpack.errors import DeviceError

Publish = Callable[[Report], None]


def device_report() -> Row:
    """The GPU and the software that drives it."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
        driver = done.stdout.split("\n")[0].strip() or None
    except (OSError, subprocess.SubprocessError):
        driver = None
    return {
        "name": properties.name,
        "driver": driver,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": getattr(properties, "L2_cache_size", None),
        "cuda": torch.version.cuda,
    }


def require_cuda(command: str) -> None:
    """Raises DeviceError, which says what is missing, where nothing can be measured."""
    if not torch.cuda.is_available():
        beside = " (`kvpack bench codec` is the CPU's)" if command.startswith("kvpack bench") else ""
        why = "finds none: see whether `nvidia-smi` lists one"
        if torch.version.cuda is None:
            why = "is built without CUDA: pip uninstall torch, then pip install 'kvpack[cuda13]' (or [cuda12])"
        raise DeviceError(f"no CUDA device: `{command}` measures on a GPU{beside}, and torch {torch.__version__} {why}")
    try:
        import_module("cupy")
    except ImportError as error:
        raise DeviceError(f"CuPy is needed ({error}): pip install 'kvpack[cuda13]' or 'kvpack[cuda12]'") from None


def new_report(
    what: str, schema: int, note: str, options: Mapping[str, Any], sections: Sequence[str], peers: Sequence[str] = ()
) -> Report:
    """What a report begins with: where and with what it is measured, and empty sections.

    Args:
        peers: packages whose versions matter, besides torch and CuPy.
    """
    return {
        "what": what,
        "schema": schema,
        "note": note,
        "command": kvpack_command(),
        **environment(["torch", "cupy-cuda13x", "cupy-cuda12x", *peers]),
        "device": device_report(),
        "options": options,
        **{section: [] for section in sections},
    }


class TimeIsUp(Exception):
    """The time limit has passed."""


class BenchRun:
    """What all benchmarks of the GPU share; a subclass measures within :meth:`_running`, stage by stage.

    Args:
        report: to be filled in. ``complete``, ``stopped`` and ``seconds`` are added here.
        publish: called with the report so far after each step.
        say: called with the name of each stage as it begins.
    """

    def __init__(
        self, report: Report, time_limit_s: float | None, publish: Publish | None, say: Callable[[str], None]
    ) -> None:
        self.report = report | {"complete": False, "stopped": None, "seconds": {}}
        self.time_limit_s = time_limit_s
        self.publish = publish
        self.say = say
        self.began = time.monotonic()

    def _evaluate(self) -> None:
        """Fill in what follows from what has been measured."""

    def _check_time(self, what: str) -> None:
        limit = self.time_limit_s
        if limit is not None and time.monotonic() - self.began > limit:
            raise TimeIsUp(f"time limit of {limit:g} s reached before {what}")

    def _hand_out(self) -> None:
        self._evaluate()
        if self.publish is not None:
            self.publish(finite(self.report))

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        self._check_time(name)
        self.say(name)
        began = time.monotonic()
        try:
            yield
        finally:
            self.report["seconds"][name] = round(time.monotonic() - began, 2)
            self._hand_out()

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Around all stages: the report says whether all were measured, and if not, why."""
        try:
            yield
            self.report["complete"] = True
        except TimeIsUp as error:
            self.report["stopped"] = str(error)
        except (KeyboardInterrupt, SystemExit):
            self.report["stopped"] = "interrupted"
            raise
        except Exception as error:  # the device is gone, or a mistake in here: what was measured stays measured
            self.report["stopped"] = f"{type(error).__name__}: {error}"
            raise
        finally:
            self.report["seconds"]["total"] = round(time.monotonic() - self.began, 2)
            self._hand_out()
