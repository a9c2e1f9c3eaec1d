"""``kvpack tune``: measure on a device what the parts of a product's launch cost, and keep it.

A case is one product: a shape, a layout, a number of vectors. Of each, the launches are timed that some of the costs in
question like best, and some that differ from them; costs are fitted to the times; then those are timed that the fitted
costs like best, as long as there are new ones. In the end the costs win that choose the fastest launches. The shipped
costs are among the candidates: on what was timed, the result is never worse than they.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from kvpack.bench import run as bench_run
from kvpack.bench.linear import SOURCES, copies_of, rotated
from kvpack.bench.timing import Work, measure, relative_error, synchronize_or_stop
from kvpack.encode.progress import Progress
from kvpack.encode.threads import default_threads
from kvpack.errors import DeviceError
from kvpack.format.layout import ElementKind, Layout, integer_layout
from kvpack.runtime.codec.encoder import encode_on_device
from kvpack.runtime.device import devices
from kvpack.runtime.device.devices import Limits
from kvpack.runtime.device.kernels import Kernel
from kvpack.runtime.weights import launch_costs, launch_model, ops, products
from kvpack.runtime.weights.device_blob import DeviceBlob
from kvpack.runtime.weights.launch_costs import Costs, TimedCase, candidates, regret
from kvpack.runtime.weights.launch_model import BLOCKS_PER_SM, ProductFit, Terms

# The layers of models of 8 billion parameters, and of a smaller one.
SHAPES = ((4096, 4096), (28672, 4096), (4096, 14336), (2048, 5632))
LAYOUTS = ("fast", "balanced")
TOKENS = (1, 8, 16, 32, 64)
TIME_LIMIT_S = 60.0
# Timed of a case at first; of those with the same panels and members as a better one, so many at most.
_LAUNCHES, _ALIKE = 10, 3
_ROUNDS = 3
# Fewer cases say too little of a number of vectors: the shipped costs stay.
_LEAST_CASES = 3
_WEIGHT_DEVIATION = 0.02
_ROTATED_L2 = 4  # copies are so many times as large as the L2 cache
_TOLERANCE = 2e-3

Launches = list[tuple[Terms, ProductFit]]


class Case(NamedTuple):
    """A product to time; ``tile_cols`` None: as compress chooses them."""

    rows: int
    cols: int
    layout: str
    tokens: int
    tile_cols: int | None = None

    @property
    def eights(self) -> int:
        """By which the launch model counts vectors: 0 for one."""
        return 0 if self.tokens == 1 else products.token_tiles(self.tokens)

    @property
    def name(self) -> str:
        return f"{self.rows}×{self.cols}, {self.layout}, M = {self.tokens}"


def plan() -> list[Case]:
    """All cases, the most telling first, so that each number of vectors has some where time runs out."""
    return [Case(*shape, layout, tokens) for layout in LAYOUTS for shape in SHAPES for tokens in TOKENS]


def worth_timing(launches: Launches, costs: Terms, count: int) -> list[int]:
    """Numbers of the launches that costs like best, with some that differ from them; the best first."""
    picked: list[int] = []
    seen: set[tuple[int, ...]] = set()
    terms = np.array([terms for terms, _ in launches], np.float64)
    for number in np.argsort(terms @ np.array(costs), kind="stable").tolist():
        fit = launches[number][1]
        kind = (fit.panels, fit.member_width, fit.resident)
        if kind not in seen or len(picked) < _ALIKE:
            picked.append(number)
        seen.add(kind)
        if len(picked) == count:
            break
    return picked


@dataclass
class Timings:
    """All launches of a case that fit the device, and the times of those that were timed."""

    case: Case
    launches: Launches
    terms: npt.NDArray[np.float64]
    us: dict[int, float] = field(default_factory=dict)
    failed: set[int] = field(default_factory=set)

    def known(self) -> TimedCase:
        numbers = sorted(self.us)
        return TimedCase(self.terms[numbers], np.array([self.us[number] for number in numbers]))

    def favourite(self, costs: Terms) -> int:
        """The launch that costs like best, of those that work."""
        estimates = self.terms @ np.array(costs)
        estimates[sorted(self.failed)] = np.inf
        return int(estimates.argmin())

    def first(self, costs: Sequence[Terms]) -> list[int]:
        """What to time at first: what each of ``costs`` likes best, and launches of other kinds."""
        return list(dict.fromkeys(n for one in costs for n in worth_timing(self.launches, one, _LAUNCHES)))


# Times launches of a case: microseconds, or None where a launch failed.
TimeLaunches = Callable[[Case, Sequence[ProductFit]], Sequence[float | None]]


@dataclass(frozen=True)
class Tuned:
    """What tuning found.

    Attributes:
        costs: by eights of vectors. regrets: {eights: (of the shipped costs, of these)}, see
            :func:`kvpack.runtime.weights.launch_costs.regret`; without those of too few cases.
        timings: all that was timed. complete: whether time sufficed.
    """

    costs: dict[int, Terms]
    regrets: dict[int, tuple[float, float]]
    timings: list[Timings]
    complete: bool
    seconds: float

    @property
    def launches(self) -> int:
        return sum(len(timings.us) for timings in self.timings)


def tune(
    cases: Sequence[Case],
    launches_of: Callable[[Case], Launches],
    time_launches: TimeLaunches,
    shipped: Costs,
    *,
    time_limit_s: float = TIME_LIMIT_S,
    advance: Callable[[str], None] = lambda name: None,
    clock: Callable[[], float] = time.monotonic,
) -> Tuned:
    """Costs that choose the fastest launches of ``cases``.

    Args:
        launches_of: all launches of a case that fit the device. time_launches: the times of some.
        shipped: costs to begin with, and to fall back on.
        time_limit_s: no case is begun after so long.
        advance: called with a case's name when it is begun; at most ``rounds()`` times the number of cases.
    """
    began = clock()
    done: list[Timings] = []
    complete = True

    def in_time() -> bool:
        nonlocal complete
        complete = complete and clock() - began <= time_limit_s
        return complete

    def run(timings: Timings, numbers: list[int]) -> None:
        advance(timings.case.name)
        wanted = [n for n in numbers if n not in timings.us and n not in timings.failed]
        times = time_launches(timings.case, [timings.launches[n][1] for n in wanted]) if wanted else []
        timings.us |= {n: us for n, us in zip(wanted, times, strict=True) if us is not None}
        timings.failed |= {n for n, us in zip(wanted, times, strict=True) if us is None}

    for case in cases:
        if not in_time():
            break
        launches = launches_of(case)
        if not launches:
            advance(case.name)
            continue
        timings = Timings(case, launches, np.array([terms for terms, _ in launches], np.float64))
        run(timings, timings.first(list(dict.fromkeys((shipped[case.eights], launch_model.COSTS[case.eights])))))
        if timings.us:
            done.append(timings)
    of_eights = {eights: [t for t in done if t.case.eights == eights] for eights in shipped}
    enough = {eights: found for eights, found in of_eights.items() if len(found) >= _LEAST_CASES}
    for _ in range(_ROUNDS - 1):
        options = {e: candidates([timings.known() for timings in found], shipped[e]) for e, found in enough.items()}
        for timings in done:  # in the order of their weights, which are not made more often than needed
            if timings.case.eights in options and in_time():
                run(timings, list(dict.fromkeys(timings.favourite(one) for one in options[timings.case.eights])))
    costs, regrets = dict(shipped), {}
    for eights, found in enough.items():
        known = [timings.known() for timings in found]
        # Costs whose favourite was not timed promise what nobody has seen.
        sound = [
            one
            for one in candidates(known, shipped[eights])
            if one == shipped[eights] or all(timings.favourite(one) in timings.us for timings in found)
        ]
        costs[eights] = min(sound, key=lambda one: regret(known, one))  # the first of equals: shipped ones rather
        regrets[eights] = regret(known, shipped[eights]), regret(known, costs[eights])
    return Tuned(costs, regrets, done, complete, clock() - began)


def rounds() -> int:
    """How often each case is looked at."""
    return _ROUNDS


# --- on a device -------------------------------------------------------------


def launches_of(coded: products.Coded, tokens: int, limits: Limits) -> Launches:
    """All launches of a product that fit the device."""
    shape = (coded.header, coded.word_buffer_bytes, limits)
    if tokens == 1:
        warps = products.gemv_warps(coded.layout, limits.architecture)
        return list(launch_model.gemv_launches(*shape, warps, products.max_panels(coded, 1)))
    eights = products.token_tiles(tokens)
    warps, buffered = (products.gemm_warps(coded.layout, eights, limits.architecture, buffers) for buffers in (1, 2))
    panels = products.max_panels(coded, 8 * eights)
    return list(launch_model.gemm_launches(*shape, warps, eights, panels, buffered_max_warps=buffered))


def _kernel(
    layout: Layout, tokens: int, activation: torch.dtype, buffers: int, resident: int, architecture: int
) -> Kernel:
    if tokens == 1:
        return products.gemv_kernel(layout, activation, buffers, resident, architecture)
    return products.gemm_kernel(layout, activation, buffers, resident, products.token_tiles(tokens), architecture)


def kernel_of(
    coded: products.Coded, tokens: int, fit: ProductFit, limits: Limits, activation: torch.dtype = torch.float16
) -> Kernel:
    """The kernel of a launch."""
    return _kernel(coded.layout, tokens, activation, fit.buffers, fit.resident, limits.architecture)


def compile_ahead(kernels: Iterable[Kernel]) -> None:
    """Put kernels' code for the current device into CuPy's cache on disk, several at once."""
    import cupy

    device = torch.cuda.current_device()  # a thread begins with device 0

    def compile_one(kernel: Kernel) -> None:
        with cupy.cuda.Device(device):
            cupy.RawModule(code=kernel.text(), options=kernel.options()).get_function(kernel.function)

    with ThreadPoolExecutor(default_threads()) as executor:
        list(executor.map(compile_one, set(kernels)))


def _source_layout(name: str) -> Layout:
    return integer_layout(name, ElementKind.SIGNED, SOURCES[name][0])


class DeviceTimer:
    """Weights on a device, and times of launches: in CUDA graphs over rotated copies, once their results are right."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.limits = devices.device_limits(device)
        self.generator = torch.Generator(device=device)
        properties: Any = torch.cuda.get_device_properties(device)
        self.rotate_bytes = _ROTATED_L2 * getattr(properties, "L2_cache_size", 64 << 20)
        self.weights: tuple[Any, list[products.Coded], torch.Tensor] | None = None
        self.errors: dict[str, str] = {}

    def _coded(self, case: Case) -> tuple[list[products.Coded], torch.Tensor]:
        """Copies of a case's coded weights, and the same weights f64; kept until another matrix is wanted."""
        key = case._replace(tokens=0)
        if self.weights is None or self.weights[0] != key:
            self.weights = None
            bits, sigma = SOURCES[case.layout]
            half = 1 << (bits - 1)
            self.generator.manual_seed(0)  # the same words when they are made again
            normal = torch.randn(case.rows, case.cols, device=self.device, generator=self.generator) * sigma
            integers = normal.round_().clamp_(-half, half - 1)
            layout = _source_layout(case.layout)
            encoded = encode_on_device((integers + half).to(torch.uint8), layout, tile_cols=case.tile_cols)
            scales = np.full(case.rows, _WEIGHT_DEVIATION / sigma, np.float32)
            data = encoded.blob.cpu().numpy().data
            blob = DeviceBlob.from_bytes(data, scales, torch.float16, (case.rows, case.cols), self.device)
            several = copies_of(blob, rotated(blob.nbytes, self.rotate_bytes))
            coded = [ops._coded(*one._arguments()) for one in several]
            self.weights = key, coded, integers.double() * float(scales[0])
        return self.weights[1], self.weights[2]

    def compile(self, cases: Iterable[Case]) -> None:
        """All kernels that launches of these cases may have."""
        kinds = {(_source_layout(case.layout), case.tokens) for case in cases}
        shared = itertools.product((1, 2), range(1, BLOCKS_PER_SM + 1))
        variants = itertools.product(kinds, list(shared))
        architecture = self.limits.architecture
        compile_ahead(_kernel(*kind, torch.float16, *variant, architecture) for kind, variant in variants)

    def launches(self, case: Case) -> Launches:
        return launches_of(self._coded(case)[0][0], case.tokens, self.limits)

    def time(self, case: Case, fits: Sequence[ProductFit]) -> list[float | None]:
        """Microseconds of each launch; None, with the reason in ``errors``, where it failed or its result is wrong."""
        copies, exact = self._coded(case)
        x = torch.randn(case.tokens, case.cols, device=self.device, generator=self.generator).half()
        error = relative_error(x.double() @ exact.T)
        works = [
            Work([partial(products.multiply, one, x, None, self.limits, fit) for one in copies], error, _TOLERANCE)
            for fit in fits
        ]
        timed = measure(works, samples=5, sample_ms=0.5, case_ms=60)
        for one in timed:
            if one.us is None:
                self.errors.setdefault(case.name, str(one.error))
        synchronize_or_stop()
        return [one.us for one in timed]


def tune_device(
    name: str, *, time_limit_s: float = TIME_LIMIT_S, dry_run: bool = False, progress: Progress | None = None
) -> dict[str, Any]:
    """Tune the launches of a device, and keep the costs found; with ``dry_run``, say which are in use.

    Returns:
        A report: device, file, in_use and note (see :class:`.launch_costs.DeviceCosts`), costs, cases; once tuned also
        seconds, launches_timed, cases_timed, slower_than_best {eights: {before, after}}, complete, errors.

    Raises:
        DeviceError: it is no CUDA device, or nothing could be timed on it.
        InputError: the costs cannot be kept, or ``KVPACK_LAUNCH_COSTS`` has no meaning.
    """
    try:
        device = devices.resolve_device(name)
    except DeviceError:
        if name.partition(":")[0] == "cuda":
            bench_run.require_cuda("kvpack tune")  # whose advice is not another device
        raise
    if device.type != "cuda":
        raise DeviceError(f"launches are a GPU's: {name!r} has none to tune; use --device cuda")
    limits = devices.device_limits(device)
    cases = plan()
    now = launch_costs.device_costs(limits)
    report: dict[str, Any] = {
        "device": limits.name,
        "file": str(launch_costs.costs_file(limits)),
        "dry_run": dry_run,
        "in_use": now.origin,
        "note": now.note,
        "cases": len(cases),
    }
    if dry_run:
        return report | {"costs": _shown(now.costs)}
    launch_costs.require_writable(limits)
    told = progress or Progress()
    told.total(_ROUNDS * len(cases))

    def advance(case: str) -> None:
        told.tensor(case)
        told.advance(1)

    with torch.no_grad(), torch.cuda.device(device):
        began = time.monotonic()
        timer = DeviceTimer(device)
        told.tensor("compiling")
        timer.compile(cases)
        left_s = max(0.0, time_limit_s - (time.monotonic() - began))
        shipped = launch_costs.shipped_costs(limits).costs
        found = tune(cases, timer.launches, timer.time, shipped, time_limit_s=left_s, advance=advance)
        seconds = time.monotonic() - began
    measured = {
        "seconds": round(seconds, 1),
        "launches_timed": found.launches,
        "cases_timed": len(found.timings),
        "slower_than_best": {
            str(eights): {"before": before, "after": after} for eights, (before, after) in found.regrets.items()
        },
    }
    if not found.regrets:
        why = f"; {next(iter(timer.errors.values()))}" if timer.errors else ""
        raise DeviceError(
            f"nothing could be tuned in {time_limit_s:g} s ({len(found.timings)} of {len(cases)} products were "
            f"timed{why}): a higher --time-limit-s may do"
        )
    launch_costs.write_tuned(limits, launch_costs.made_for(limits), found.costs, measured)
    report |= {**measured, "complete": found.complete, "errors": timer.errors}
    return report | {"in_use": launch_costs.device_costs(limits).origin, "costs": _shown(found.costs)}


def _shown(costs: Costs) -> dict[str, dict[str, float]]:
    return {str(eights): terms._asdict() for eights, terms in costs.items()}
