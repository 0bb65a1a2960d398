"""The command line: parse, call, print."""

from __future__ import annotations

import sys

from microscale.errors import MicroscaleError


def main() -> None:
    """Run the command line; an interrupt or an error while libraries are still being imported is one line, too."""
    try:
        from microscale.cli.app import app

        app()
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; nothing half-written was left\n")
        sys.exit(130)
    except MicroscaleError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(1)
