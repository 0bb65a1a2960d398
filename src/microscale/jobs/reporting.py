"""How a job says where it is: stages with their progress, and notes that cannot wait for the result.

A job gets one :class:`Reporter`. The command line draws bars, Python hands the numbers to a function of the user, and
tests listen. What is to be said of a *result* is in the result (``notes``).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

Progress = Callable[[int, int, str], None]
"""Called with (done, total, what is at hand)."""


class Reporter(Protocol):
    """Who listens to a job."""

    def stage(self, title: str) -> AbstractContextManager[Progress]:
        """Return a context that lasts as long as a stage of the job; it gives what the stage's progress goes to."""
        ...

    def note(self, text: str) -> None:
        """Say something before the job goes on, such as how much work lies ahead."""
        ...


class ProgressReporter:
    """Hands the progress of all stages to one function; by default it goes nowhere. Notes are dropped."""

    def __init__(self, progress: Progress = lambda done, total, what: None) -> None:
        self._progress = progress

    def stage(self, title: str) -> AbstractContextManager[Progress]:
        """Return a context that gives the function."""
        return nullcontext(self._progress)

    def note(self, text: str) -> None:
        """Say nothing."""


SILENT = ProgressReporter()
"""Nobody listens."""
