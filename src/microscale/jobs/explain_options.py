"""The options of ``explain``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from microscale.jobs.option import Option, Options
from microscale.jobs.shared_options import CheckpointModel


@dataclass(frozen=True, slots=True, kw_only=True)
class ExplainOptions(Options):
    """Whose layers are explained, and where they would run; a loaded model is explained as it lies."""

    model: CheckpointModel
    device: Annotated[
        str | None, Option(help="Device that the model would be on: cpu (default), cuda, cuda:1 …; need not be there.")
    ] = None
    dtype: Annotated[str | None, Option(help="Float type of the layers' inputs (default: the model's).")] = None
