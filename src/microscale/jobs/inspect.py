"""Say what a checkpoint holds: formats, sizes and rules, layer by layer."""

from __future__ import annotations

from microscale.jobs.reporting import SILENT, Reporter
from microscale.jobs.small_options import InspectOptions
from microscale.planning.inspection import Inspection, inspect_checkpoint


def inspect(options: InspectOptions, reporter: Reporter = SILENT) -> Inspection:
    """Read what a checkpoint says of itself; no weight is loaded.

    Raises:
        CheckpointError: a checkpoint that is missing, damaged, or of a layout that is not read.
    """
    del reporter  # there is nothing to wait for
    return inspect_checkpoint(options.path)
