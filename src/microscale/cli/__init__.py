"""The command line: parse, call, print."""

from __future__ import annotations

import sys

from microscale.cli.interrupts import STARTS_ANEW, catch_termination, exit_status
from microscale.errors import MicroscaleError


def main() -> None:
    """Run the command line; an interrupt or an error while libraries are still being imported is one line, too."""
    catch_termination()
    try:
        from microscale.cli.app import app
        from microscale.cli.output import tell_notes

        tell_notes()
        app()
    except KeyboardInterrupt as interrupt:
        sys.stderr.write(f"{STARTS_ANEW}\n")
        sys.exit(exit_status(interrupt))
    except MicroscaleError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(1)
