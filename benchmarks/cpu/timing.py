"""Times of several things, measured in turns, so that noise hits all of them alike; and how noisy the machine was."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """Seconds of every run of one thing."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle one."""
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The first and the third."""
        if len(self.seconds) < 2:
            return self.seconds[0], self.seconds[0]
        first, _, third = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return first, third

    def rate(self, amount: float) -> dict[str, float]:
        """Return ``amount`` per second in the median and at the quartiles, the slower one first."""
        first, third = self.quartiles
        return {"median": amount / self.median, "q1": amount / third, "q3": amount / first}


def timed(run: Callable[[], object]) -> float:
    """Return the wall-clock seconds of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def take_turns(cases: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, Times]:
    """Run every case once uncounted, then ``rounds`` times each, in turns and every round in another order."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    names = list(cases)
    for name in names:
        cases[name]()
    for turn in range(rounds):
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            seconds[name].append(timed(cases[name]))
    return {name: Times(seconds=tuple(values)) for name, values in seconds.items()}


class ForeignLoad:
    """How many cores other processes kept busy between two moments (0 on a quiet machine; Linux only)."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.before = _busy_seconds(), _own_seconds()

    def cores(self) -> float | None:
        """Return the average since the start; our own children count only after they ended."""
        busy, own = _busy_seconds(), _own_seconds()
        if busy is None or self.before[0] is None:
            return None
        elapsed = time.perf_counter() - self.started
        return max(0.0, ((busy - self.before[0]) - (own - self.before[1])) / max(elapsed, 0.01))


def wait_until_quiet(limit: float, patience_seconds: float) -> float | None:
    """Wait until other processes keep fewer than ``limit`` cores busy, at most so long; returns the last value."""
    deadline = time.monotonic() + patience_seconds
    while True:
        load = ForeignLoad()
        time.sleep(1.0)
        cores = load.cores()
        if cores is None or cores < limit or time.monotonic() > deadline:
            return cores


def _busy_seconds() -> float | None:
    stat = Path("/proc/stat")
    if not stat.exists():
        return None
    user, nice, system, _, _, irq, softirq, steal = (int(word) for word in stat.read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
