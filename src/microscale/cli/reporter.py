"""Who listens to a job on the command line: bars and notes on standard error."""

from __future__ import annotations

from contextlib import AbstractContextManager

from microscale.cli.output import error_console, progress_bar
from microscale.jobs.reporting import Progress


class ConsoleReporter:
    """Draws a bar for each stage, and prints notes at once."""

    def stage(self, title: str) -> AbstractContextManager[Progress]:
        """Return the bar of a stage."""
        return progress_bar(title)

    def note(self, text: str) -> None:
        """Print a note."""
        error_console.print(text, style="dim", soft_wrap=True, markup=False)
