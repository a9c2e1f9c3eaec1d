"""How device work is timed: CUDA graphs over rotated copies, interleaved, after the results have been checked.

A :class:`Work` holds the same operation on several copies of its weights, enough of them that none is still in the L2
cache when its turn comes again. All calls together are captured in one graph; the time of a call is the graph's time
over their number. Works that are compared are sampled in turns, so that a change of the clocks meets all of them.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypeAlias

import torch

# Each sample follows one replay that is not timed, so that the launch of a graph hides behind running work.
_LONG_REPLAY_MS = 5.0
_MIN_ROUNDS = 5
_MAX_REPLAYS = 200

Result: TypeAlias = torch.Tensor | tuple[torch.Tensor, ...]


class WrongResult(AssertionError):
    """A result is farther from its reference than it may be, so its time is worth nothing."""


@dataclass
class Work:
    """One operation to check and time.

    Args:
        calls: the operation on each copy of the weights; all give the same result.
        error: distance of a result from its reference (0 is exact).
        tolerance: the largest error that is accepted.
        capture: False for what cannot be captured in a graph (a library with streams of its own).
    """

    calls: Sequence[Callable[[], Result]]
    error: Callable[[torch.Tensor], float]
    tolerance: float
    capture: bool = True


@dataclass
class Timed:
    """What is known of one work. Times are microseconds a call; ``error`` says why there are none."""

    relative_error: float | None = None
    us: float | None = None
    us_low: float | None = None
    us_high: float | None = None
    samples: int = 0
    launches: int = 0
    timing: str | None = None
    error: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return dict(vars(self))


def synchronize_or_stop() -> None:
    """After a failure: passes if the device still answers; otherwise nothing more can be measured, and this raises."""
    torch.cuda.synchronize()


def relative_error(reference: torch.Tensor) -> Callable[[torch.Tensor], float]:
    """‖out − reference‖ / ‖reference‖ in float64; not a number counts as infinitely wrong."""
    norm = reference.double().norm().item()

    def error(out: torch.Tensor) -> float:
        difference = out.reshape(reference.shape).double() - reference
        value = difference.norm().item() / norm
        return value if math.isfinite(value) else math.inf

    return error


def differing(reference: torch.Tensor) -> Callable[[torch.Tensor], float]:
    """The share of elements that are not the reference's."""

    def error(out: torch.Tensor) -> float:
        return (out.reshape(reference.shape) != reference).count_nonzero().item() / reference.numel()

    return error


def tensors(result: Result) -> tuple[torch.Tensor, ...]:
    return (result,) if isinstance(result, torch.Tensor) else result


def poison(outputs: Sequence[torch.Tensor]) -> None:
    """Fill outputs with what no result contains, so that an element that is not written shows."""
    for out in outputs:
        out.fill_(math.nan if out.is_floating_point() else 85)


@dataclass
class Prepared:
    """A work that gave right results, ready to be replayed."""

    work: Work
    timed: Timed
    replay: Callable[[], object]
    outputs: list[torch.Tensor]
    kept: object = None  # what the replay needs alive
    replay_ms: float = 0.0
    replays: int = 1
    samples_us: list[float] = field(default_factory=list)

    def check(self) -> None:
        """Compare all outputs with the reference; remember the largest error."""
        worst = max(self.work.error(out) for out in self.outputs)
        self.timed.relative_error = max(worst, self.timed.relative_error or 0.0)
        if not worst <= self.work.tolerance:
            raise WrongResult(f"relative error {worst:.2e}, at most {self.work.tolerance:.1e} is expected")

    def sample(self) -> None:
        """One more sample of the time of a call."""
        if self.replay_ms < _LONG_REPLAY_MS:
            self.replay()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(self.replays):
            self.replay()
        end.record()
        end.synchronize()
        self.samples_us.append(1e3 * begin.elapsed_time(end) / self.replays / len(self.work.calls))


@cache
def _capture_stream() -> torch.cuda.Stream:
    """One stream for all captures: cuBLAS keeps a workspace for each stream it has seen."""
    return torch.cuda.Stream()


def _capture(work: Work) -> tuple[torch.cuda.CUDAGraph, list[torch.Tensor]]:
    """All calls in one graph, and the outputs they write.

    ``torch.cuda.graph`` would collect garbage and empty the allocator's cache for each graph, which costs more than
    what is measured here.
    """
    stream = _capture_stream()
    graph = torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    outputs: list[torch.Tensor] = []
    with torch.cuda.stream(stream):
        graph.capture_begin()
        try:
            for call in work.calls:
                outputs += tensors(call())
        finally:
            graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    return graph, outputs


def _poison_cache(shaped: Sequence[torch.Tensor]) -> None:
    """Leave poisoned memory of the outputs' sizes to the allocator, which hands it out again."""
    copies = [torch.empty_like(out) for out in shaped]
    poison(copies)


def prepare(work: Work, timed: Timed, sample_ms: float) -> Prepared | None:
    """Check a work's results and capture it; None if it fails, with the reason in ``timed.error``.

    A work that does not let itself be captured is timed call by call (``timing`` says so). Raises what CUDA raises
    if the device does not answer any more.
    """
    try:
        first = tensors(work.calls[0]())  # compiles what has to be compiled
        _poison_cache(first)
        del first
        eager = list(tensors(work.calls[0]()))
        prepared = Prepared(work, timed, lambda: [call() for call in work.calls], eager)
        prepared.check()
        timed.timing, timed.launches = "eager", len(work.calls)
        if work.capture:
            try:
                graph, outputs = _capture(work)
            except Exception as error:
                timed.error = f"not captured: {_first_line(error)}"
                synchronize_or_stop()
            else:
                prepared = Prepared(work, timed, graph.replay, outputs, kept=graph)
                timed.timing = "graph"
                poison(outputs)
                graph.replay()
                prepared.check()
        for _ in range(2):  # the first replay uploads the graph
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            prepared.replay()
            end.record()
            end.synchronize()
            prepared.replay_ms = begin.elapsed_time(end)
        prepared.replays = min(_MAX_REPLAYS, max(1, math.ceil(sample_ms / max(prepared.replay_ms, 1e-3))))
    except Exception as error:
        timed.error = f"{type(error).__name__}: {_first_line(error)}"
        synchronize_or_stop()
        return None
    return prepared


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def measure(works: Sequence[Work], *, samples: int, sample_ms: float, case_ms: float) -> list[Timed]:
    """Check works, then time them in turns; a work that fails does not stop the others.

    Args:
        samples: at most so many samples of each work (an odd number), at least five.
        sample_ms: a sample repeats its graph until it lasts about so long.
        case_ms: a bound on all samples together, by taking fewer.
    """
    done = [Timed() for _ in works]
    ready = [p for w, t in zip(works, done, strict=True) if (p := prepare(w, t, sample_ms)) is not None]
    if not ready:
        return done
    round_ms = sum(p.replay_ms * (p.replays + (p.replay_ms < _LONG_REPLAY_MS)) for p in ready)
    rounds = max(_MIN_ROUNDS, min(samples, int(case_ms / max(round_ms, 1e-3))))
    for number in range(rounds):
        for prepared in ready if number % 2 == 0 else reversed(ready):
            prepared.sample()
    for prepared in ready:
        timed = prepared.timed
        try:
            prepared.check()  # after many replays: nothing adds up that should have been zeroed
        except WrongResult as error:
            timed.error = f"after {rounds} samples: {error}"
            continue
        found = sorted(prepared.samples_us)
        timed.us = statistics.median(found)
        timed.us_low, timed.us_high = found[len(found) // 10], found[-1 - len(found) // 10]
        timed.samples = len(found)
    return done


def time_quickly(calls: Sequence[Callable[[], Result]], *, rounds: int = 5) -> float:
    """Microseconds a call, of one work alone and unchecked: for choosing among variants."""
    work = Work(calls, lambda out: 0.0, 1.0)
    timed = measure([work], samples=rounds, sample_ms=0.3, case_ms=20.0)[0]
    if timed.us is None:
        raise RuntimeError(timed.error)
    return timed.us


def copy_bandwidth(size_bytes: int, repeats: int = 11) -> dict[str, float]:
    """Device copy of ``size_bytes``: median time, and GB/s counting bytes read and bytes written."""
    source = torch.randint(0, 256, (size_bytes,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    found = []
    for number in range(repeats + 2):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        if number >= 2:
            found.append(begin.elapsed_time(end))
    ms = statistics.median(found)
    return {"bytes": float(size_bytes), "us": 1e3 * ms, "gb_per_s": 2 * size_bytes / ms / 1e6}
