"""The options of ``inspect``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from microscale.jobs.option import Option, Options, Place


@dataclass(frozen=True, slots=True, kw_only=True)
class InspectOptions(Options):
    """Which checkpoint is looked into."""

    path: Annotated[Path, Option(help="Checkpoint directory.", place=Place.ARGUMENT)]
