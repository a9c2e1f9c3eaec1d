"""A run of a benchmark: stages, a time limit, and a report that is handed out as it grows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from kvpack.runtime.bench_report import Report, finite

Publish = Callable[[Report], None]


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
