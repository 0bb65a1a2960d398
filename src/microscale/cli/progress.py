"""Progress as plain lines, where standard error is a file or a pipe and a bar would be nothing but noise."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from microscale.jobs.words import duration_text

SECONDS_BETWEEN = 10.0
"""Lines come no closer than this."""
SHARE_BETWEEN = 0.0499
"""How much of a stage lies between two lines; less where :data:`SILENCE` has passed."""
SILENCE = 60.0
"""Seconds after which a line comes, however little was done."""


@dataclass(slots=True)
class _Pace:
    """Since when steps of one kind are counted, from which on, and how far they were last."""

    started: float
    first: int
    done: int


class ProgressLines:
    """Writes how far a stage is: its title, n/total, the time since it began, and about how long it goes on.

    A stage may count several things, one in the other (layers, and the steps of learning in a layer): what has another
    total has a pace of its own, and one that begins again is measured anew.
    """

    def __init__(self, title: str, write: Callable[[str], object], clock: Callable[[], float] = time.monotonic) -> None:
        self._title = title
        self._write = write
        self._clock = clock
        self._started = self._told = clock()
        self._share = 0.0
        self._paces: dict[int, _Pace] = {}

    def __call__(self, done: int, total: int, label: str) -> None:
        """Take in that ``done`` of ``total`` steps are done, and write a line where one is due."""
        now = self._clock()
        pace = self._paces.get(total)
        if pace is None or done < pace.done:
            pace = self._paces[total] = _Pace(started=now, first=done, done=done)
        pace.done = done
        share, silence = done / max(total, 1), now - self._told
        if silence < SECONDS_BETWEEN or (abs(share - self._share) < SHARE_BETWEEN and silence < SILENCE):
            return
        self._told, self._share = now, share
        words = f"{self._title} {done}/{total}, {duration_text(now - self._started)}"
        if pace.first < done < total:
            left = (now - pace.started) * (total - done) / (done - pace.first)
            words += f", about {duration_text(left)} left"
        self._write(f"{words}: {label}" if label else words)
