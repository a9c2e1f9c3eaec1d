"""What the parts of a product's launch cost on a device: figures that come with kvpack, and those that were measured.

The launch model adds up what a launch is made of (:class:`.launch_model.Terms`). Its costs differ between devices:

* Measured with ``kvpack tune``, on this device, and kept in a file below :func:`cache_directory`. They are read when
  the first product of a process is launched. A file that was made for another driver, other kernels or another
  version counts no longer; a warning says so.
* Shipped: ``MEASURED``. For other devices they are estimated from an H100's, by public specifications
  (``estimated_costs``).

``KVPACK_LAUNCH_COSTS=shipped`` leaves the file alone.
"""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from kvpack._version import __version__
from kvpack.errors import InputError
from kvpack.format.layout import CHUNK_COLS, GROUP_LANES
from kvpack.runtime.device.devices import Limits
from kvpack.runtime.device.kernels import source_hash
from kvpack.runtime.weights.launch_model import COSTS, Terms

Costs: TypeAlias = Mapping[int, Terms]

SCHEMA = 1
CHOICE_VARIABLE = "KVPACK_LAUNCH_COSTS"
DIRECTORY_VARIABLE = "KVPACK_CACHE_DIR"
_CHOICES = ("tuned", "shipped")
# A cost above this, in µs, is no measurement.
_MOST_US = 1e4


class Specification(NamedTuple):
    """What a manufacturer says of a device: the part of its name that tells it, boost clock, bandwidth of memory."""

    name: str
    architecture: int
    clock_mhz: int
    bandwidth_gb_per_s: int


H100 = Specification("H100", 90, 1980, 3350)
# From NVIDIA's data sheets and architecture white papers. Of those of one architecture the first stands for unknown
# ones.
SPECIFICATIONS = (
    Specification("A100", 80, 1410, 2039),
    Specification("A30", 80, 1440, 933),
    Specification("RTX 3090", 86, 1695, 936),
    Specification("A40", 86, 1740, 696),
    Specification("A10", 86, 1695, 600),
    Specification("RTX A6000", 86, 1800, 768),
    Specification("RTX 4090", 89, 2520, 1008),
    Specification("L40S", 89, 2520, 864),
    Specification("L4", 89, 2040, 300),
    Specification("RTX 6000 Ada", 89, 2505, 960),
    Specification("H100 PCIe", 90, 1755, 2039),
    Specification("H100 NVL", 90, 1785, 3938),
    H100,
    Specification("GH200", 90, 1980, 4000),
    Specification("H200", 90, 1980, 4800),
    Specification("B200", 100, 1965, 8000),
    Specification("RTX 5090", 120, 2407, 1792),
    Specification("RTX PRO 6000", 120, 2617, 1792),
)
# By the name of a specification; those of other devices are estimates, and so are those for 64 vectors. Those for 8 of
# an H200 are an H100's: no others chose better launches. In order: heaviest, longest, unbuffered,
# activations, rounds, members, panels, parts.
MEASURED: dict[str, Costs] = {
    H100.name: COSTS,
    "H200": {
        0: Terms(0.0252, 0.160, 0.0103, 0.130, 0.174, 0.0, 0.862, 0.055),
        1: COSTS[1],
        2: Terms(0.0351, 0.421, 0.040, 0.641, 5.87, 0.75, 0.467, 0.383),
        4: Terms(0.0335, 0.469, 0.0423, 1.04, 8.48, 1.35, 1.17, 0.699),
        8: COSTS[8],
    },
}
# A chunk is 32 rows of 32 columns, of about 4.4 bits.
_CHUNK_BYTES = GROUP_LANES * CHUNK_COLS * 4.4 / 8
# Of the bandwidth that is specified, so much is reached.
_REACHED = 0.9
# Their time is that of instructions. `unbuffered`, `panels` and `parts` wait for memory instead, whose latency is much
# the same on all these devices.
_CLOCKED = ("heaviest", "longest", "activations", "rounds", "members")


def specification(limits: Limits) -> Specification | None:
    """That of a device by its name, else of another of its architecture; None for an architecture without any."""
    of_architecture = [one for one in SPECIFICATIONS if one.architecture == limits.architecture]
    named = [one for one in of_architecture if re.search(rf"\b{re.escape(one.name)}\b", limits.name)]
    if named:
        return max(named, key=lambda one: len(one.name))
    if limits.architecture == H100.architecture:
        return H100
    return of_architecture[0] if of_architecture else None


def estimated_costs(found: Specification, multiprocessors: int) -> Costs:
    """An H100's costs for another device.

    What instructions take goes with the clock: multiprocessors of all these architectures issue four instructions a
    cycle. A multiprocessor does not decode faster than its share of the memory's bandwidth brings the bytes.
    """
    slower = H100.clock_mhz / found.clock_mhz
    bytes_per_us = _REACHED * found.bandwidth_gb_per_s * 1e3 / multiprocessors
    costs = {}
    for eights, terms in COSTS.items():
        scaled = {name: value * (slower if name in _CLOCKED else 1) for name, value in terms._asdict().items()}
        scaled["heaviest"] = max(scaled["heaviest"], _CHUNK_BYTES / bytes_per_us)
        costs[eights] = Terms(**scaled)
    return costs


@dataclass(frozen=True)
class DeviceCosts:
    """Costs by eights of vectors (0: one vector), in µs, and where they come from.

    Attributes:
        origin: ``"tuned"``, ``"shipped, measured on …"`` or ``"shipped, estimated from …"``.
        note: why there are no tuned ones, where a file of them is not used.
    """

    costs: Costs
    origin: str
    note: str | None = None


def shipped_costs(limits: Limits) -> DeviceCosts:
    """What comes with kvpack for a device."""
    found = specification(limits)
    if found is None:
        return DeviceCosts(COSTS, f"shipped, measured on an {H100.name} (nothing is known of this architecture)")
    if found.name in MEASURED:
        return DeviceCosts(MEASURED[found.name], f"shipped, measured on an {found.name} (for 64 vectors: estimated)")
    origin = f"shipped, estimated from the specification of {found.name}"
    return DeviceCosts(estimated_costs(found, limits.multiprocessors), origin)


# --- the file ----------------------------------------------------------------


def cache_directory() -> Path:
    """``$KVPACK_CACHE_DIR``, else ``kvpack`` in ``$XDG_CACHE_HOME`` or in ``~/.cache``."""
    if named := os.environ.get(DIRECTORY_VARIABLE):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "kvpack"


def costs_file(limits: Limits) -> Path:
    """Where the costs that were measured on a device are kept, whether they are there or not."""
    name = re.sub(r"[^a-z0-9]+", "-", limits.name.lower()).strip("-")
    return cache_directory() / f"launch-costs-{name}-{limits.multiprocessors}.json"


def made_for(limits: Limits) -> dict[str, Any]:
    """What a file of costs depends on: with another value of any of these it counts no longer."""
    import cupy

    return {
        "device": limits.name,
        "multiprocessors": limits.multiprocessors,
        "shared_bytes": limits.shared_bytes,
        "driver": int(cupy.cuda.runtime.driverGetVersion()),
        "kvpack": __version__,
        "kernels": source_hash(),
    }


def _costs_of(found: Any) -> Costs:
    """Raises ValueError unless these are costs."""
    if not isinstance(found, dict) or set(found) != {str(eights) for eights in COSTS}:
        raise ValueError(f"'costs' are not those of {', '.join(map(str, COSTS))} eights of vectors")
    costs = {}
    for eights, terms in found.items():
        if not isinstance(terms, dict) or set(terms) != set(Terms._fields):
            raise ValueError(f"the costs of {eights} eights are not {', '.join(Terms._fields)}")
        for name, value in terms.items():
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not (math.isfinite(value) and 0 <= value <= _MOST_US):
                raise ValueError(f"{name} of {eights} eights is {value!r}")
        if not any(terms.values()):
            raise ValueError(f"all costs of {eights} eights are 0")
        costs[int(eights)] = Terms(**{name: float(value) for name, value in terms.items()})
    return costs


def read_tuned(limits: Limits, key: Mapping[str, Any]) -> tuple[Costs | None, str | None]:
    """The costs that were measured on a device, or None and why there are none (None if there is no file)."""
    path = costs_file(limits)
    again = "run `kvpack tune` again"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or found.get("schema") != SCHEMA:
            raise ValueError(f"it is no object of schema {SCHEMA}")
        changed = [name for name, value in key.items() if found.get(name) != value]
        if changed:
            return None, f"{path} was made for another {' and '.join(changed)} and is not used: {again}"
        return _costs_of(found.get("costs")), None
    except FileNotFoundError:
        return None, None
    except OSError as error:
        return None, f"{path} cannot be read ({error.strerror or error}) and is not used"
    except (ValueError, RecursionError) as error:
        return None, f"{path} is damaged ({error}) and is not used: {again}"


def require_writable(limits: Limits) -> None:
    """Before a minute is spent on measuring what could not be kept.

    Raises:
        InputError: the file of costs cannot be written.
    """
    folder = costs_file(limits).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(
            f"costs cannot be kept in {folder} ({error.strerror or error}): set {DIRECTORY_VARIABLE} to a folder that "
            "can be written to"
        ) from None


def write_tuned(limits: Limits, key: Mapping[str, Any], costs: Costs, made: Mapping[str, Any]) -> Path:
    """Keep costs for later processes; the file appears in one piece. ``made``: how they were found, for readers.

    Raises:
        OSError: it cannot be written.
    """
    path = costs_file(limits)
    path.parent.mkdir(parents=True, exist_ok=True)
    shown = {str(eights): terms._asdict() for eights, terms in costs.items()}
    text = json.dumps({"schema": SCHEMA, **key, "costs": shown, **made}, indent=1, allow_nan=False) + "\n"
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise
    device_costs.cache_clear()
    return path


@lru_cache
def device_costs(limits: Limits) -> DeviceCosts:
    """The costs by which launches are chosen on a device.

    Raises:
        InputError: ``KVPACK_LAUNCH_COSTS`` is neither "tuned" nor "shipped".
    """
    shipped = shipped_costs(limits)
    choice = os.environ.get(CHOICE_VARIABLE) or "tuned"
    if choice not in _CHOICES:
        raise InputError(f"{CHOICE_VARIABLE} is {choice!r}: it is {' or '.join(_CHOICES)}")
    if choice == "shipped" or not limits.name or not costs_file(limits).exists():
        return shipped
    costs, note = read_tuned(limits, made_for(limits))
    if costs is None:
        if note is not None:
            warnings.warn(f"{note}; launches are chosen by costs that come with kvpack", stacklevel=2)
        return DeviceCosts(shipped.costs, shipped.origin, note)
    return DeviceCosts(costs, "tuned")


# --- costs from timings ------------------------------------------------------


class TimedCase(NamedTuple):
    """Launches of one product that were timed: terms f64 [launches, 8], times f64 [launches] in µs."""

    terms: npt.NDArray[np.float64]
    us: npt.NDArray[np.float64]


def least_squares(cases: Sequence[TimedCase]) -> Terms:
    """Costs ≥ 0 of least relative error, with a constant beside them; columns that want to be negative are dropped."""
    times = np.concatenate([case.us for case in cases])
    terms = np.concatenate([case.terms for case in cases])
    weighted = np.column_stack([np.ones(len(times)), terms]) / times[:, None]
    used = list(range(weighted.shape[1]))
    while True:
        solution = np.linalg.lstsq(weighted[:, used], np.ones(len(times)), rcond=None)[0]
        if (solution >= 0).all():
            break
        del used[int(solution.argmin())]
    costs = np.zeros(weighted.shape[1])
    costs[used] = solution
    return Terms(*costs[1:].tolist())


def regret(cases: Sequence[TimedCase], costs: Terms) -> float:
    """By how much the launches that ``costs`` choose are slower than the best that were timed: mean of cases, ≥ 0."""
    chosen = [case.us[int((case.terms @ np.array(costs)).argmin())] / case.us.min() for case in cases]
    return float(np.mean(chosen)) - 1


def candidates(cases: Sequence[TimedCase], shipped: Terms) -> list[Terms]:
    """Costs to choose among: the shipped ones, those of least squares, and mixtures of both."""
    found, before = np.array(least_squares(cases)), np.array(shipped)
    mixed = [Terms(*(share * found + (1 - share) * before).tolist()) for share in (0.25, 0.5, 0.75, 1.0)]
    return [shipped, *(one for one in mixed if any(one))]
