"""Ctrl-C and SIGTERM: both end a command in order, with a line that says what to do and the shell's exit status."""

from __future__ import annotations

import signal
from types import FrameType
from typing import NoReturn

GOES_ON = "interrupted; run again to go on"
STARTS_ANEW = "interrupted; nothing half-written was left"


class Terminated(KeyboardInterrupt):
    """SIGTERM came: whatever is cleaned up after Ctrl-C is cleaned up now, too."""


def exit_status(interrupt: KeyboardInterrupt) -> int:
    """Return 128 and the number of the signal, as shells do."""
    return 128 + (signal.SIGTERM if isinstance(interrupt, Terminated) else signal.SIGINT)


def catch_termination() -> None:
    """From now on SIGTERM raises :class:`Terminated` in the main thread, once: a second one ends the process."""
    signal.signal(signal.SIGTERM, _terminate)


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    signal.signal(number, signal.SIG_DFL)
    raise Terminated
